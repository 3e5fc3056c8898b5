"""Compares the speed of this project's loader and of other loaders in one run.

    python benchmarks/loader.py --images <folder of class folders> --out records/<date>_loader

Repeats the list of images to `--count` images. Writes them at no more than 500 px, as JPEG of
quality 90 and as raw pixels. Our loader, stock FFCV, DALI on the CPU, timm, torchvision,
WebDataset, LitData and SPDL run interleaved on the same number of threads, with the files in the
page cache. libjpeg-turbo's region decode of our crops, without anything else, is measured too.
Rates count only if the mean colour of a repeat agrees with ours. Loaders that are not installed are
reported as not installed. Out: results.json, table.md, rates.png.

The project does not use DALI, WebDataset, LitData and SPDL. To measure them, install them in a
separate folder, so that the environment keeps its versions. SPDL needs FFmpeg's libraries:

    pip install --target peers --no-deps nvidia-dali-cuda120 astunparse gast six optree nvtx \\
        makefun libcst nvidia-nvimgcodec-cu12 nvidia-libnvcomp-cu12==5.3.0.16 \\
        webdataset braceexpand spdl-core spdl-io \\
        litdata lightning-utilities filelock boto3 botocore jmespath s3transfer requests \\
        certifi idna charset-normalizer urllib3 tifffile obstore
    apt-get install --no-install-recommends libavdevice59 libavfilter8
    PYTHONPATH=peers python benchmarks/loader.py ...
"""

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import runner  # noqa: E402
from contestants import LitData, WebDataset  # noqa: E402

SPEC = "rand-m7-mstd0.5-inc1"
ROWS = {
    "crop": "RandomResizedCrop(0.08-1) + flip",
    "augment": f"the same + RandAugment {SPEC}",
    "raw": "raw images, RRC + flip",
    "eval": "evaluation: resize + centre crop 0.95 bicubic",
    # here, ours is rsb_ffcv.ffcv.Loader, with FFCV's classes in the pipeline
    "ffcv": "FFCV's pipeline: RRC + flip + ToTensor",
    "ffcv_half": "FFCV's pipeline: RRC + flip + NormalizeImage float16",
}
# row: {loader: target of our speed divided by its speed}; "region decode only" does less work
TARGETS = {
    "crop": {"stock ffcv": 2.5, "DALI CPU": 2.3, "timm": 6.0, "region decode only": 0.75},
    "augment": {"DALI CPU": 5.0, "timm": 4.5},
    "raw": {"stock ffcv": 2.0},
    "eval": {"stock ffcv": 2.5},
    "ffcv": {"stock ffcv": 3.0},
    "ffcv_half": {"stock ffcv": 3.0},
}
FIRST_BATCH_SECONDS = 1.0
MEAN_TOLERANCE = 3.0  # of the mean colour of 2048 random crops; that of fewer crops varies more


def prepare(images: Path, work: Path, count: int, *, threads: int) -> dict:
    """Makes two .beton files, a folder of JPEG files, and shards of WebDataset and LitData (in a
    shuffled order, as both advise) in `work`, with the same `count` images each. Returns facts
    about the images."""
    from rsb_ffcv.beton import read_beton

    pictures = sorted(path for path in images.glob("*/*") if path.is_file())
    for number in range(count):
        picture = pictures[number % len(pictures)]
        to = work / "pictures" / "train" / picture.parent.name
        to.mkdir(parents=True, exist_ok=True)
        (to / f"{number:06d}{picture.suffix}").symlink_to(picture.resolve())
    for mode in ("jpg", "raw"):
        subprocess.run(
            [
                sys.executable,
                HERE.parent / "write_ffcv.py",
                f"--cfg.data_dir={work / 'pictures'}",
                "--cfg.split=train",
                f"--cfg.write_path={work / mode}.beton",
                "--cfg.max_resolution=500",
                f"--cfg.write_mode={mode}",
                "--cfg.num_workers=2",
                "--cfg.pass_through=0",
                "--cfg.follow_links=1",
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )
    file, data = read_beton(work / "jpg.beton"), np.memmap(work / "jpg.beton", np.uint8, "r")
    for number in range(count):
        to = work / "files" / f"{file.labels[number]:04d}"
        to.mkdir(parents=True, exist_ok=True)
        start, size = int(file.pointers[number]), int(file.sizes[number])
        (to / f"{number:06d}.jpg").write_bytes(data[start : start + size])
    files = [(str(path), int(path.parent.name)) for path in sorted(work.glob("files/*/*.jpg"))]
    shuffled = [files[index] for index in np.random.default_rng(0).permutation(count)]
    for kind, folder in ((WebDataset, "tar"), (LitData, "litdata")):
        # without the package there are no shards: its contestant reports "not installed"
        with contextlib.suppress(ImportError):
            kind.write(shuffled, work / folder, threads)
    return {
        "images": count,
        "different": len(pictures),
        "mean_bytes": float(file.sizes.mean()),
        "mean_pixels": float((file.heights.astype(int) * file.widths).mean()),
    }


def contestants(work: Path, threads: int) -> dict:
    source = f"{HERE / 'contestants.py'}"
    jpg, raw, files = str(work / "jpg.beton"), str(work / "raw.beton"), str(work / "files")
    tar, chunks = str(work / "tar"), str(work / "litdata")
    at = {"threads": threads}
    return {
        "crop": {
            "ours": (f"{source}:Ours", {"path": jpg, **at}),
            "stock ffcv": (f"{source}:StockFFCV", {"path": jpg, **at}),
            "DALI CPU": (f"{source}:Dali", {"folder": files, **at}),
            "timm": (f"{source}:Timm", {"folder": files, **at}),
            "torchvision": (f"{source}:TorchVision", {"folder": files, **at}),
            "WebDataset": (f"{source}:WebDataset", {"shards": tar, **at}),
            "LitData": (f"{source}:LitData", {"chunks": chunks, **at}),
            "SPDL": (f"{source}:Spdl", {"folder": files, **at}),
            "region decode only": (f"{source}:RegionDecode", {"path": jpg, **at}),
        },
        "augment": {
            "ours": (f"{source}:Ours", {"path": jpg, "rand_augment": SPEC, **at}),
            "DALI CPU": (f"{source}:Dali", {"folder": files, "rand_augment": True, **at}),
            "timm": (f"{source}:Timm", {"folder": files, "rand_augment": SPEC, **at}),
            "torchvision": (
                f"{source}:TorchVision",
                {"folder": files, "rand_augment": True, **at},
            ),
            "WebDataset": (f"{source}:WebDataset", {"shards": tar, "rand_augment": True, **at}),
            "LitData": (f"{source}:LitData", {"chunks": chunks, "rand_augment": True, **at}),
        },
        "raw": {
            "ours": (f"{source}:Ours", {"path": raw, **at}),
            "stock ffcv": (f"{source}:StockFFCV", {"path": raw, **at}),
        },
        "eval": {
            "ours": (f"{source}:Ours", {"path": jpg, "evaluate": True, **at}),
            "stock ffcv": (f"{source}:StockFFCV", {"path": jpg, "evaluate": True, **at}),
            "torchvision": (f"{source}:TorchVision", {"folder": files, "evaluate": True, **at}),
            "SPDL": (f"{source}:Spdl", {"folder": files, "evaluate": True, **at}),
        },
        "ffcv": {
            "ours": (f"{source}:Door", {"path": jpg, **at}),
            "stock ffcv": (f"{source}:StockFFCV", {"path": jpg, **at}),
        },
        "ffcv_half": {
            "ours": (f"{source}:Door", {"path": jpg, "normalized": True, **at}),
            "stock ffcv": (f"{source}:StockFFCV", {"path": jpg, "normalized": True, **at}),
        },
    }


def refuse_wrong_pixels(row: dict, count: int) -> dict:
    """The results of a row, without the rates of loaders whose mean red, green or blue is not ours:
    they did other work. count: images of a repeat."""
    ours = row["ours"].get("mean_pixel")
    most = MEAN_TOLERANCE * max(1.0, (2048 / count) ** 0.5)

    def checked(result: dict) -> dict:
        mean = result.get("mean_pixel")
        if not mean or not ours or np.abs(np.subtract(mean, ours)).max() <= most:
            return result
        return {"absent": f"wrong pixels: mean {mean}, ours {ours}"}

    return {name: checked(result) for name, result in row.items()}


def scaling(work: Path, cores: int, repeats: int) -> dict:
    """{threads: result} of our loader on 1, 2, 4, ... threads up to the number of cores,
    interleaved."""
    threads = sorted({min(2**i, cores) for i in range(10)})
    return runner.race(
        {
            str(n): (
                f"{HERE / 'contestants.py'}:Ours",
                {"path": str(work / "jpg.beton"), "threads": n},
            )
            for n in threads
        },
        repeats,
    )


def first_batch(work: Path, threads: int, repeats: int) -> dict:
    """{name: seconds of each new process}, interleaved, without the first start of each."""
    found: dict[str, dict] = {}
    for number in range(repeats + 1):
        for name, kind, spec in (
            ("ours", "Ours", ""),
            ("ours + RandAugment", "Ours", SPEC),
            ("stock ffcv", "StockFFCV", ""),
            ("FFCV's pipeline, ours", "Door", ""),
        ):
            done = subprocess.run(
                [
                    sys.executable,
                    HERE / "first_batch.py",
                    kind,
                    work / "jpg.beton",
                    str(threads),
                    spec,
                ],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                found[name] = {"absent": done.stderr.strip().splitlines()[-1]}
            elif number:
                found.setdefault(name, {"seconds": []})["seconds"].append(
                    float(done.stdout.split()[-1])
                )
    return found


def class_mixing() -> dict:
    """The number of classes in a batch of 256 for each order. The file has the size of ImageNet's
    training set, is sorted by class, and has 110 kB per image. Windows of 1 GiB."""
    from rsb_ffcv.loading.order import epoch_order

    labels = np.repeat(np.arange(1000), 1281)
    sizes = np.full(len(labels), 110_000, np.uint64)
    pointers = np.cumsum(sizes) - sizes + np.uint64(1 << 23)
    found = {}
    for kind in ("random", "quasi_random", "sequential"):
        indices = epoch_order(
            kind,
            0,
            0,
            files=np.zeros(len(labels), np.uint16),
            pointers=pointers,
            sizes=sizes,
            window_bytes=1 << 30,
        ).indices
        batches = np.sort(labels[indices][: len(labels) // 256 * 256].reshape(-1, 256), 1)
        classes = 1 + (np.diff(batches) != 0).sum(1)
        found[kind] = {"median": float(np.median(classes)), "least": int(classes.min())}
    return found


def table(results: dict) -> str:
    """The results as Markdown, each factor with its target."""
    lines = [
        "| pipeline | loader | images/s (low .. high) | ours / it | target | |",
        "|---|---|---|---|---|---|",
    ]
    for row, title in ROWS.items():
        if row not in results["rows"]:
            continue
        ours = results["rows"][row]["ours"].get("images_per_s")
        for name, result in results["rows"][row].items():
            if "absent" in result:
                lines.append(f"| {title} | {name} | {result['absent']} | | | not compared |")
                continue
            rate = f"{result['images_per_s']:,.0f} ({result['low']:,.0f} .. {result['high']:,.0f})"
            target = TARGETS[row].get(name)
            factor = ours / result["images_per_s"] if ours else float("nan")
            outcome = "" if target is None else "reached" if factor >= target else "not reached"
            lines.append(
                f"| {title} | {name} | {rate} | {f'{factor:.2f}' if name != 'ours' else ''} | "
                f"{target or ''} | {outcome} |"
            )
    for name, result in results["first_batch"].items():
        if "absent" in result:
            lines.append(
                f"| first batch, second start | {name} | {result['absent']} | | | not compared |"
            )
            continue
        seconds = statistics.median(result["seconds"])
        most = FIRST_BATCH_SECONDS if name.startswith("ours") else None
        outcome = "" if most is None else "reached" if seconds <= most else "not reached"
        lines.append(
            f"| first batch, second start | {name} | "
            f"{seconds:.2f} s ({min(result['seconds']):.2f} .. {max(result['seconds']):.2f}) | | "
            f"{'' if most is None else f'{most} s'} | {outcome} |"
        )
    rates = "; ".join(
        f"{n} threads {r['images_per_s']:,.0f}" for n, r in results["scaling"].items()
    )
    mixing = "; ".join(
        f"{kind} {m['median']:.0f} (minimum {m['least']})"
        for kind, m in results["class_mixing"].items()
    )
    return "\n".join(
        [
            *lines,
            "",
            f"Thread scaling of our loader, images/s: {rates}.",
            "",
            f"Number of the 1000 classes in a batch of 256, file sorted by class: {mixing}.",
            "",
        ]
    )


def plot(results: dict, path: Path):
    rows = [row for row in ROWS if row in results["rows"]]
    pairs = [rows[first : first + 2] for first in range(0, len(rows), 2)]
    bars = [max(len(results["rows"][row]) for row in pair) for pair in pairs]
    figure, axes = plt.subplots(
        len(pairs),
        2,
        figsize=(12, 1 + 0.5 * sum(bars)),
        layout="constrained",
        height_ratios=bars,
        squeeze=False,
    )
    for axis in axes.flat[len(rows) :]:
        axis.set_axis_off()
    for axis, row in zip(axes.flat, rows):
        title = ROWS[row]
        found = {
            name: result for name, result in results["rows"][row].items() if "absent" not in result
        }
        rates = [result["images_per_s"] for result in found.values()]
        spread = [
            [rate - r["low"] for rate, r in zip(rates, found.values())],
            [r["high"] - rate for rate, r in zip(rates, found.values())],
        ]
        colours = [
            "#2b6cb0" if name == "ours" else "#cbd5e0" if "only" in name else "#a0aec0"
            for name in found
        ]
        axis.barh(range(len(found)), rates, xerr=spread, color=colours, capsize=3)
        axis.set_yticks(range(len(found)), list(found))
        for number, result in enumerate(found.values()):
            text = f" {result['images_per_s']:,.0f}"
            axis.text(result["high"], number, text, va="center", fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        f"images/s, {results['threads']} threads (median, lowest, highest)", fontsize=10
    )
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=Path, required=True, help="folder with one folder of images per class"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for results.json, table.md and rates.png"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="threads or worker processes of each loader"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="repeats of each loader, after one warm-up repeat"
    )
    parser.add_argument(
        "--count", type=int, default=2048, help="images per repeat; a shorter list is repeated"
    )
    parser.add_argument(
        "--rows", default=",".join(ROWS), help="pipelines to measure, separated by commas"
    )
    options = parser.parse_args()
    chosen = options.rows.split(",")
    if unknown := set(chosen) - ROWS.keys():
        parser.error(f"--rows={options.rows}: no row {', '.join(unknown)}; use {', '.join(ROWS)}")
    work = Path(tempfile.mkdtemp(prefix="loader-benchmark-"))
    try:
        results = {
            "command": f"benchmarks/loader.py --images {options.images.name} "
            f"--threads {options.threads} --repeats {options.repeats} --count {options.count} "
            f"--rows {options.rows}",
            "threads": options.threads,
            "environment": runner.environment(
                [
                    "rsb_ffcv",
                    "ffcv",
                    "nvidia-dali-cuda120",
                    "timm",
                    "torch",
                    "torchvision",
                    "webdataset",
                    "litdata",
                    "spdl-core",
                    "spdl-io",
                    "numba",
                    "pillow",
                ]
            ),
            "data": prepare(options.images, work, options.count, threads=options.threads),
        }
        results["rows"] = {
            row: runner.race(who, options.repeats)
            for row, who in contestants(work, options.threads).items()
            if row in chosen
        }
        for row in results["rows"].keys() - {"augment"}:
            # not of "augment": each loader's RandAugment is a different one
            results["rows"][row] = refuse_wrong_pixels(results["rows"][row], options.count)
        results["scaling"] = scaling(work, results["environment"]["cores"], options.repeats)
        results["first_batch"] = first_batch(work, options.threads, options.repeats)
        results["class_mixing"] = class_mixing()
    finally:
        shutil.rmtree(work)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "table.md").write_text(table(results))
    plot(results, options.out / "rates.png")
    print(table(results))


if __name__ == "__main__":
    main()
