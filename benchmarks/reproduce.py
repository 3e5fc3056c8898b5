"""Trains a recipe on your data and hardware, and compares it with the figures of its source.

    make reproduce RECIPE=paper_a3_100 [PROCESSES=8] [OPTIONS="--data.train_dataset=..."]
    (python benchmarks/reproduce.py --recipe paper_a3_100 --processes 8 [options of train_imagenet])

1. Verifies both files: every checksum, and every image.
2. Trains, or continues the run in logging.folder: the same command can be given again after an
   interruption.
3. Compares top-1 after each epoch of logging.expected; benchmarks/curves.yaml has its source.
4. Writes records/<date>_<recipe>/: README.md with command, commit, hardware, versions, files and
   the comparison, the run's config.json and metrics.jsonl, and curve.png.

Exit status: 0 if all epochs are reached within the tolerance, 1 if not, else that of the step that
failed (75: interrupted and saved).
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
import runner

from rsb_ffcv import InputError, exit_status
from rsb_ffcv.beton import read_beton
from rsb_ffcv.config.train import TrainConfig, expected_curve, read_config
from rsb_ffcv.reporting.curves import draw_curves

ROOT = Path(__file__).parents[1]


def curve_of(recipe: str, path: Path) -> dict:
    """The entry of a recipe in the file of curves. Raises InputError if there is none."""
    curves = yaml.safe_load(path.read_text())
    if recipe not in curves:
        raise InputError(
            f"--recipe={recipe}: {path.name} has no figures of it; choose one of "
            f"{', '.join(curves)}"
        )
    return curves[recipe]


def run(*command: object) -> None:
    """Runs a program. Raises SystemExit with its status if that is not 0."""
    status = subprocess.run(list(map(str, command)), cwd=ROOT).returncode
    if status:
        raise SystemExit(status)


def compare(curve: dict, rows: list[dict]) -> list[tuple[int, float, float | None, bool | None]]:
    """(epochs, expected top-1, measured top-1, whether it is within the tolerance) of each point.
    None: the run has not come so far, or was not validated then."""
    found = []
    for epochs, expected in sorted(curve["top1"].items()):
        row = rows[epochs - 1] if epochs <= len(rows) else {}
        measured = max(
            (row[name] for name in ("top1", "ema_top1", "swa_top1") if name in row), default=None
        )
        good = None if measured is None else measured >= expected - curve["tolerance"]
        found.append((epochs, expected, measured, good))
    return found


def readme(options, c: TrainConfig, *, curve: dict, rows: list[dict]) -> str:
    about = runner.environment(["torch", "torchvision", "timm", "numba"])
    commit, changed = (
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
    )
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hours = sum(row["seconds"] + row.get("val_seconds", 0) for row in rows) / 3600
    text = [
        f"# {options.recipe}: {len(rows)} of {c.training.epochs} epochs",
        "",
        f"`{' '.join(['benchmarks/reproduce.py', *sys.argv[1:]])}`, {about['date']}, commit "
        f"{commit or 'unknown'}{' with changed files' if changed else ''}.",
        f"{options.processes} process{'es' if options.processes > 1 else ''}; "
        f"{', '.join(gpus) or 'no GPU'}; {about['cores']} cores of {about['processor']}; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + ".",
        "",
        f"{hours:.2f} hours of training and validation; median "
        f"{statistics.median(row['images_per_s'] for row in rows):,.0f} images/s.",
        "",
    ]
    for name in ("train", "val"):
        beton = read_beton(getattr(c.data, f"{name}_dataset"))
        text.append(
            f"- {name}: {len(beton)} images of {beton.num_classes} classes, fingerprint "
            f"{beton.fingerprint()}, verified"
        )
    text += [
        "",
        f"Expected ({curve['kind']}): {curve['source']}. Tolerance {curve['tolerance']} points.",
        "",
        "| epochs | expected top-1 | measured | |",
        "|---|---|---|---|",
    ]
    verdicts = {True: "reached", False: "MISSED", None: "not measured"}
    text += [
        f"| {epochs} | {expected} | {'' if measured is None else f'{measured:.2f}'} | "
        f"{verdicts[good]} |"
        for epochs, expected, measured, good in compare(curve, rows)
    ]
    return "\n".join(text) + "\n"


def reproduce(options: argparse.Namespace, more: list[str]) -> int:
    arguments = ["--config-file", f"rsb_configs/{options.recipe}.yaml", *more]
    c = read_config(None, arguments)
    curve = curve_of(options.recipe, options.curves) | {"top1": expected_curve(c)}
    for path in (c.data.train_dataset, c.data.val_dataset):
        run(sys.executable, "write_ffcv.py", "verify", f"--cfg.path={path}")
    launcher: list[object] = [sys.executable]
    if options.processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={options.processes}"]
    run(*launcher, "train_imagenet.py", *arguments)
    folder = Path(c.logging.folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "config.json"):
        shutil.copy(folder / name, options.out / name)
    draw_curves(rows, options.out / "curve.png", curve["top1"])
    text = readme(options, c, curve=curve, rows=rows)
    (options.out / "README.md").write_text(text)
    print(text)
    return 0 if all(good for *_, good in compare(curve, rows)) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", required=True, help="name of a file of rsb_configs/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument("--processes", type=int, default=1, help="one per GPU")
    parser.add_argument(
        "--curves", type=Path, default=ROOT / "benchmarks" / "curves.yaml", help="expected figures"
    )
    return reproduce(*parser.parse_known_args())


if __name__ == "__main__":
    sys.exit(exit_status(main))
