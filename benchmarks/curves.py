"""Trains the same recipe with this project and with timm's train.py, and compares their accuracy.

    python benchmarks/curves.py --images <Tiny-ImageNet> --timm <checkout of pytorch-image-models> \
        --work <folder> --out records/<date>_curves [--device cuda --parallel 4]

The images are all classes of a folder in Tiny-ImageNet's layout; both read the same JPEG files.
RECIPE has each setting for both programs. With --no-prefetcher, timm erases before it mixes, as
this project does, and --mixup-off-epoch takes effect: the mixing of its default loader is done by
workers that live through all epochs and are not told. --warmup-prefix would add epochs.

The criterion, fixed before any run. Both programs train once with each of --seeds seeds. The figure
of a training is its top-1 of the raw weights on the validation images, its mean over the last four
epochs, which train without mixing. The differences of the pairs give a 95 % t-interval. Pairs are
added until it is narrower than +-3 points, at most --most. It must contain 0. EMA weights and
training losses are reported beside it.

A training that is complete in --work is not run again. Out: results.json, README.md, curves.png.
Exit status: 0 if the criterion holds, else 1.
"""

import argparse
import csv
import json
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import runner

from rsb_ffcv.reporting.log import read_metrics, write_json

ROOT = Path(__file__).parents[1]
LAST, NARROW = 4, 3.0
# meaning: (option of this project, option of timm's train.py); {} is filled in from the command
RECIPE = {
    "model": ("model.arch=resnet18", "--model resnet18"),
    "classes": ("model.num_classes={classes}", "--num-classes {classes}"),
    "resolution": (
        "resolution.min_res=64 resolution.max_res=64 validation.resolution=64",
        "--input-size 3 64 64",
    ),
    "crop for evaluation": ("validation.crop_ratio=1.0 validation.lr_tta=0", "--crop-pct 1.0"),
    "random resized crop": ("augment.scale_min=0.25", "--scale 0.25 1.0"),
    "RandAugment": (
        "augment.rand_augment=rand-m5-mstd0.5-inc1",
        "--aa rand-m5-mstd0.5-inc1 --color-jitter 0",
    ),
    "erasing": (
        "augment.erase_prob=0.25 augment.erase_mode=pixel",
        "--reprob 0.25 --remode pixel --no-prefetcher",
    ),
    "mixing": ("mix.mixup=0.2 mix.cutmix=1.0", "--mixup 0.2 --cutmix 1.0"),
    "last epochs without mixing": (
        f"mix.off_epochs={LAST}",
        "--mixup-off-epoch {mixed_epochs}",
    ),
    "loss": ("training.loss=bce training.label_smoothing=0.1", "--bce-loss --smoothing 0.1"),
    "optimizer": (
        "training.optimizer=lamb training.weight_decay=0.02",
        "--opt lamb --weight-decay 0.02",
    ),
    "batch": ("training.batch_size=128 validation.batch_size=250", "-b 128 -vb 250"),
    "epochs": ("training.epochs={epochs}", "--epochs {epochs}"),
    "learning rate": (
        "lr.lr=0.01 lr.lr_schedule_type=cosine_spanning lr.min_lr=0",
        "--lr 0.01 --sched cosine --sched-on-updates --min-lr 0",
    ),
    "warm-up": (
        "lr.warmup_epochs=2 lr.warmup_lr=0.0001",
        "--warmup-epochs 2 --warmup-lr 0.0001",
    ),
    "EMA": (
        "ema.decay=0.99 ema.warmup=1",
        "--model-ema --model-ema-decay 0.99 --model-ema-warmup",
    ),
    "seed": ("training.seed={seed}", "--seed {seed}"),
}
PRECISION = {
    "cuda": ("compute.precision=fp16", "--amp --channels-last --pin-mem"),
    "cpu": ("compute.precision=fp32", ""),
}
# of Student's t distribution: 97.5 % quantile for 1, 2, ... degrees of freedom
T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160),
    *(2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056),
)


def prepare(options) -> int:
    """Writes the images as folders of classes for timm and, from these, the .beton files. Returns
    the number of classes."""
    images = options.work / "images"
    source = options.images
    if not images.exists():
        making = options.work / "images.tmp"
        shutil.rmtree(making, ignore_errors=True)
        for path in sorted(source.glob("train/*/images/*.JPEG")):
            to = making / "train" / path.parts[-3] / path.name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
        with (source / "val" / "val_annotations.txt").open() as file:
            for name, label, *_ in csv.reader(file, delimiter="\t"):
                to = making / "val" / label / name
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / "val" / "images" / name, to)
        making.rename(images)
    for split in ("train", "val"):
        to = options.work / f"{split}.beton"
        if not to.exists():
            program(
                options.work / f"write_{split}.txt",
                *(sys.executable, ROOT / "write_ffcv.py", f"--cfg.data_dir={images}"),
                *("--cfg.dataset=imagenet", f"--cfg.split={split}", f"--cfg.write_path={to}"),
                *(f"--cfg.num_workers={options.workers}",),
            )
    return sum(path.is_dir() for path in (images / "train").iterdir())


def program(output: Path, *command: object) -> None:
    """Runs a program with its output in a file. Raises CalledProcessError if it fails."""
    with output.open("w") as file:
        subprocess.run(
            list(map(str, command)), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=True
        )


def settings(column: int, options, seed: int) -> list[str]:
    values = {
        "classes": options.classes,
        "epochs": options.epochs,
        "mixed_epochs": options.epochs - LAST,
        "seed": seed,
    }
    rows = [*RECIPE.values(), PRECISION[options.device]]
    return " ".join(row[column] for row in rows).format(**values).split()


def ours(folder: Path, options, seed: int) -> list[dict]:
    program(
        folder / "output.txt",
        *(sys.executable, ROOT / "train_imagenet.py"),
        *(f"--data.train_dataset={options.work / 'train.beton'}",),
        *(f"--data.val_dataset={options.work / 'val.beton'}", "--data.in_memory=1"),
        *(f"--data.num_workers={options.workers}", f"--logging.folder={folder}"),
        *(f"--compute.device={options.device}", "--compute.compile=0"),
        *(f"--{setting}" for setting in settings(0, options, seed)),
    )
    return [
        {"raw": row["top1"], "ema": row["ema_top1"], "train_loss": row["train_loss"]}
        for row in read_metrics(folder)
    ]


def timm(folder: Path, options, seed: int) -> list[dict]:
    output = folder / "output.txt"
    program(
        output,
        *(sys.executable, options.timm / "train.py", "--data-dir", options.work / "images"),
        *("--train-split", "train", "--val-split", "val", "--device", options.device),
        *("--workers", options.workers, "--checkpoint-hist", 1, "--log-interval", 100000),
        *("--output", folder, "--experiment", "run"),
        *settings(1, options, seed),
    )
    text = output.read_text()
    # the last batch of an evaluation has the mean of all in parentheses
    found = {
        name: [
            float(top1)
            for batch, last, top1 in re.findall(
                rf"{title}: \[ *(\d+)/(\d+)\].*Acc@1: +[\d.]+ \( *([\d.]+)\)", text
            )
            if batch == last
        ]
        for name, title in (("raw", "Test"), ("ema", r"Test \(EMA\)"))
    }
    with (folder / "run" / "summary.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    return [
        {"raw": raw, "ema": ema, "train_loss": loss}
        for raw, ema, loss in zip(found["raw"], found["ema"], losses, strict=True)
    ]


ENGINES = {"ours": ours, "timm": timm}


def train(options, job: tuple[str, int]) -> None:
    """Trains once, unless the result is there."""
    engine, seed = job
    folder = options.work / f"{engine}_{seed}"
    if (folder / "rows.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    print(f"{engine}, seed {seed}", flush=True)
    rows = ENGINES[engine](folder, options, seed)
    assert len(rows) == options.epochs, f"{folder}: {len(rows)} epochs"
    write_json(folder / "rows.json", rows)


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % t-interval."""
    count = len(differences)
    return statistics.mean(differences), T[count - 2] * statistics.stdev(differences) / count**0.5


def at_the_end(rows: list[dict], name: str) -> float:
    return statistics.mean(row[name] for row in rows[-LAST:])


def outcome(curves: dict[str, list[list[dict]]]) -> dict:
    """Of each figure: the pairs (ours, timm's), and mean and half-width of their differences."""
    found = {}
    for name in ("raw", "ema", "train_loss"):
        pairs = [
            tuple(at_the_end(rows, name) for rows in pair)
            for pair in zip(curves["ours"], curves["timm"], strict=True)
        ]
        mean, half = interval([one - other for one, other in pairs])
        found[name] = {"pairs": pairs, "mean": mean, "half_width": half}
    return found


def race(options) -> dict[str, list[list[dict]]]:
    """Trains pairs until the interval is narrow enough. Returns the rows of each training."""
    count = options.seeds
    while True:
        jobs = [(engine, seed) for seed in range(count) for engine in ENGINES]
        with ThreadPoolExecutor(options.parallel) as pool:
            list(pool.map(partial(train, options), jobs))
        curves = {
            engine: [
                json.loads((options.work / f"{engine}_{seed}" / "rows.json").read_text())
                for seed in range(count)
            ]
            for engine in ENGINES
        }
        raw = outcome(curves)["raw"]
        print(f"{count} pairs: {raw['mean']:+.2f} +- {raw['half_width']:.2f}", flush=True)
        if raw["half_width"] <= NARROW or count >= options.most:
            return curves
        count += 1


def plot(curves: dict[str, list[list[dict]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = {"raw": "top-1, raw weights, %", "ema": "top-1, EMA, %", "train_loss": "training loss"}
    looks = {"ours": ("#0072B2", "-"), "timm": ("#D55E00", "--")}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, (name, title) in zip(axes, titles.items()):
        for engine, (colour, style) in looks.items():
            for rows in curves[engine]:
                values = [row[name] for row in rows]
                axis.plot(range(1, len(rows) + 1), values, colour, lw=0.6, alpha=0.4, ls=style)
            middle = [statistics.mean(row[name] for row in epoch) for epoch in zip(*curves[engine])]
            label = f"{'this project' if engine == 'ours' else 'timm train.py'}, mean"
            axis.plot(range(1, len(middle) + 1), middle, colour, lw=2, ls=style, label=label)
        axis.set(xlabel="epoch", title=title)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=100)


def readme(results: dict) -> str:
    about, ends = results["environment"], results["outcome"]
    raw, count = ends["raw"], len(ends["raw"]["pairs"])
    verdict = "holds" if results["holds"] else "does NOT hold"
    lines = [
        f"# This project and timm's train.py, {count} pairs of trainings",
        "",
        f"`{results['command']}`, {about['date']}, commit {results['commit']}; timm's train.py of "
        f"commit {results['timm_commit']}, with the timm of that commit.",
        f"{results['gpu'] or 'no GPU'}, {about['cores']} cores of {about['processor']}, torch "
        f"{about['versions']['torch']}. {results['classes']} classes of Tiny-ImageNet, "
        f"{results['epochs']} epochs.",
        "",
        f"Difference of top-1 of the raw weights, mean over the last {LAST} epochs: "
        f"{raw['mean']:+.2f} +- {raw['half_width']:.2f} points (95 % t-interval of the pairs). "
        f"The criterion in the head of benchmarks/curves.py {verdict}.",
        "",
        "| mean over the last four epochs | this project | timm | difference, 95 % |",
        "|---|---|---|---|",
    ]
    names = {"raw": "top-1 raw, %", "ema": "top-1 EMA, %", "train_loss": "training loss"}
    for name, title in names.items():
        one, other = (statistics.mean(column) for column in zip(*ends[name]["pairs"]))
        digits = 4 if name == "train_loss" else 2
        lines.append(
            f"| {title} | {one:.{digits}f} | {other:.{digits}f} | "
            f"{ends[name]['mean']:+.{digits}f} +- {ends[name]['half_width']:.{digits}f} |"
        )
    lines += [
        "",
        "| seed | this project, raw | timm, raw | EMA | timm, EMA |",
        "|---|---|---|---|---|",
    ]
    for seed, (one, other) in enumerate(zip(raw["pairs"], ends["ema"]["pairs"])):
        lines.append(f"| {seed} | {one[0]:.2f} | {one[1]:.2f} | {other[0]:.2f} | {other[1]:.2f} |")
    lines += ["", "| setting | this project | timm's train.py |", "|---|---|---|"]
    lines += [f"| {name} | `{one}` | `{other}` |" for name, (one, other) in RECIPE.items()]
    lines += ["", "The rows of all epochs are in `results.json`.", "", "![](curves.png)"]
    return "\n".join(lines) + "\n"


def output_of(*command: str, folder: Path = ROOT) -> str | None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # not installed, or not a repository
        return None
    return done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of Tiny-ImageNet")
    parser.add_argument("--timm", type=Path, required=True, help="folder with train.py and timm/")
    parser.add_argument("--timm-commit", help="if that folder is no repository")
    parser.add_argument("--commit", help="of this project, if it is no repository")
    parser.add_argument("--work", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument("--seeds", type=int, default=5, help="pairs to begin with, 2 or more")
    parser.add_argument("--most", type=int, default=20, help="pairs at most, up to 27")
    parser.add_argument("--epochs", type=int, default=16, help="above 4")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="of a training's loader")
    parser.add_argument("--parallel", type=int, default=1, help="trainings at the same time")
    options = parser.parse_args()
    if not 2 <= options.seeds <= options.most <= len(T) + 1 or options.epochs <= LAST:
        parser.error(f"needs 2 <= --seeds <= --most <= {len(T) + 1} and --epochs > {LAST}")
    options.images, options.timm, options.work = (
        path.resolve() for path in (options.images, options.timm, options.work)
    )
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    options.classes = prepare(options)
    curves = race(options)
    ends = outcome(curves)
    raw = ends["raw"]
    results = {
        "command": " ".join(["python benchmarks/curves.py", *sys.argv[1:]]),
        "commit": options.commit or output_of("git", "rev-parse", "HEAD"),
        "timm_commit": options.timm_commit
        or output_of("git", "rev-parse", "HEAD", folder=options.timm),
        "environment": runner.environment(["torch", "torchvision", "numpy", "pillow"]),
        "gpu": output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
        if options.device == "cuda"
        else None,
        "classes": options.classes,
        "epochs": options.epochs,
        "holds": abs(raw["mean"]) <= raw["half_width"] <= NARROW,
        "outcome": ends,
        "curves": curves,
    }
    write_json(options.out / "results.json", results)
    plot(curves, options.out / "curves.png")
    (options.out / "README.md").write_text(readme(results))
    print((options.out / "README.md").read_text())
    return 0 if results["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
