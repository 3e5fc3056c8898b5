"""Measures the time of a small run from its command to its first finished step, and of the imports
that it cannot avoid.

    python benchmarks/start.py --out records/<date>_start

Makes a training file with one batch, and starts `train_imagenet.py` on it with the ingredients of
the A2 recipe (LAMB, mixup and cutmix, RandAugment, random erasing, EMA), on the CPU in fp32. The
first step is finished when its loss appears in the progress bar on stderr, a pseudo-terminal: the
program reads the loss back before it shows it, so the program is measured without changes. Then the
run is killed. An earlier run that is not killed warms the caches. `python -c "import torch, timm"`
is timed twice: as a complete process, and until both are imported, without the exit of the process,
which the killed run does not reach either. `import ffcv` is timed as a complete process. All run
interleaved.
Out: results.json, table.md.
"""

import argparse
import json
import os
import pty
import shutil
import statistics
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import runner  # noqa: E402

TARGET = 1.2  # target of first step / import torch, timm
OURS, IMPORTS, IMPORTED, FFCV = (
    "first step",
    "import torch, timm",
    "import torch, timm: until imported",
    "import ffcv",
)


def make_files(folder: Path, batch: int, side: int):
    """Makes train.beton with one batch and val.beton with two images: noise of `side` x `side`
    pixels in two classes."""
    from rsb_ffcv.dataset import Place, write_splits

    rng = np.random.default_rng(0)
    for split, count in (("train", batch), ("val", 2)):
        for number in range(count):
            path = folder / "pictures" / split / f"class_{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(path)
    write_splits(
        Place(dataset="imagenet", data_dir=str(folder / "pictures")), str(folder), num_workers=1
    )


def command(folder: Path, arch: str, batch: int, resolution: int, threads: int) -> list[str]:
    flags = {
        "data.train_dataset": folder / "train.beton",
        "data.val_dataset": folder / "val.beton",
        "data.num_workers": 2,
        "data.in_memory": 1,
        "logging.folder": folder / "run",
        "model.arch": arch,
        "resolution.min_res": resolution,
        "resolution.max_res": resolution,
        "validation.resolution": resolution,
        "validation.batch_size": 2,
        "training.epochs": 1,
        "training.batch_size": batch,
        "training.optimizer": "lamb",
        "training.weight_decay": 0.02,
        "lr.lr": 0.005,
        "mix.mixup": 0.1,
        "mix.cutmix": 1.0,
        "augment.rand_augment": "rand-m7-mstd0.5-inc1",
        "augment.erase_prob": 0.25,
        "ema.decay": 0.99,
        "compute.device": "cpu",
        "compute.precision": "fp32",
        "compute.threads": threads,
    }
    return [
        sys.executable,
        str(ROOT / "train_imagenet.py"),
        *(f"--{name}={value}" for name, value in flags.items()),
    ]


def until(arguments: list[str], sign: bytes, stream: str) -> float:
    """Returns the seconds from the start of a process until it writes `sign` to its stdout or
    stderr, a terminal for it, and kills it then."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 100))
    began = time.perf_counter()
    streams: dict[str, Any] = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        stream: its,
    }
    process, seen = subprocess.Popen(arguments, cwd=ROOT, **streams), b""
    os.close(its)
    try:
        while sign not in seen:
            try:
                seen += os.read(ours, 1 << 16)
            except OSError:  # the process has closed its side
                raise RuntimeError(
                    f"{arguments[1:3]} ended without {sign!r}: "
                    f"{seen.decode(errors='replace')[-2000:]}"
                ) from None
        return time.perf_counter() - began
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def first_step(arguments: list[str], folder: Path) -> float:
    """Returns the seconds from the start of a new run to its first finished step."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    return until(arguments, b"loss=", "stderr")


def whole(code: str) -> float:
    """Returns the seconds of a complete Python process that runs `code`."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def measure(folder: Path, arguments: list[str], repeats: int) -> dict:
    """Returns {row: {"seconds": [...]} or {"absent": reason}}."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    subprocess.run(
        arguments, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    rows = {
        OURS: lambda: first_step(arguments, folder),
        IMPORTS: lambda: whole("import torch, timm"),
        IMPORTED: lambda: until(
            [sys.executable, "-c", "import torch, timm, os; os.write(1, b'.')"], b".", "stdout"
        ),
        FFCV: lambda: whole("import ffcv"),
    }
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in rows}
    for number in range(repeats + 1):
        for name, run in rows.items():
            if "absent" in found[name]:
                continue
            os.sync()  # flushes what the previous row wrote, outside the timing
            try:
                seconds = run()
            except subprocess.CalledProcessError:
                if name != FFCV:
                    raise
                found[name] = {"absent": "cannot be imported here"}
                continue
            if number:  # the first repeat is a warm-up
                found[name]["seconds"].append(round(seconds, 3))
    return found


def table(results: dict) -> str:
    lines = [
        "| from the command to | seconds, median (low .. high) | first step / it | target | |",
        "|---|---|---|---|---|",
    ]
    ours = statistics.median(results["rows"][OURS]["seconds"])
    for name, row in results["rows"].items():
        if "absent" in row:
            lines.append(f"| {name} | {row['absent']} | | | not compared |")
            continue
        seconds = row["seconds"]
        ratio = ours / statistics.median(seconds)
        outcome = f"{ratio:.2f} | | " if name != OURS else " | | "
        if name == IMPORTS:
            outcome = f"{ratio:.2f} | {TARGET} | {'reached' if ratio <= TARGET else 'not reached'}"
        lines.append(
            f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f} .. "
            f"{max(seconds):.2f}) | {outcome} |"
        )
    return "\n".join([*lines, ""])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for results.json and table.md"
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="repeats of each row, after one warm-up repeat"
    )
    parser.add_argument("--arch", default="resnet18", help="name of a timm model")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--resolution", type=int, default=64, help="pixels per side")
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="torch's threads in the run; 0: one per core, the default of a run. Measure on an "
        "idle machine: a core that another program uses delays the step",
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="start-benchmark-"))
    try:
        make_files(folder, options.batch, 2 * options.resolution)
        arguments = command(
            folder, options.arch, options.batch, options.resolution, options.threads
        )
        found = measure(folder, arguments, options.repeats)
    finally:
        shutil.rmtree(folder)
    results = {
        "command": f"benchmarks/start.py --repeats {options.repeats} --arch {options.arch} "
        f"--batch {options.batch} --resolution {options.resolution} --threads {options.threads}",
        "environment": runner.environment(["rsb_ffcv", "torch", "timm", "ffcv"]),
        "rows": found,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
