"""Shows in a few minutes what a GPU makes of this project: its tests there, then its speed.

    make gpu-check [TRAIN=train.beton]     (python benchmarks/gpu_check.py --out records/<date>_gpu)

1. The environment: hardware, driver, versions, commit, and a hash of the source.
2. All tests that need a GPU: tests/gpu, and tests/parity/test_gpu.py, which compares every byte.
   At the same time, a short real training on the demo set.
3. Limits of the card: copies in both directions, on the card, and an fp16 matrix product.
4. Decoding on the CPU and on the GPU: images/s, and milliseconds of each kernel.
5. The batch transforms.
6. The training step with ResNet-50: synthetic and loaded, with each way to decode, for each
   precision, with and without compile.

A part that fails is listed as failed, and the others go on; the exit status is then 1. Out, written
again after each part: check.json with all repeats, README.md with the table of targets, and
rates.png. Without --train, the demo set is used: its rates are not comparable with those of
photographs, and the table says so.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import runner
import step

from rsb_ffcv.gpu import driver
from rsb_ffcv.loading import TrainLoader
from rsb_ffcv.loading.batch import BatchTransform
from rsb_ffcv.reporting.log import write_json

ROOT = Path(__file__).parents[1]
PARTS = ("programs", "limits", "decode", "transforms", "step")
RAND_AUGMENT = "rand-m7-mstd0.5-inc1"
# name: (least or most, where the figure is in the results)
TARGETS: dict[str, tuple[str, float, tuple[str, ...]]] = {
    "decode, crop, flip on the GPU, images/s": (">=", 40_000, ("decode", "crop", "gpu")),
    "the same with RandAugment, images/s": (">=", 25_000, ("decode", "RandAugment", "gpu")),
    "ResNet-50, fp16, compiled, loaded, images/s": (
        ">=",
        3_600,
        ("step", "fp16 compile", "loaded", "gpu", "images_per_s"),
    ),
    "waiting for data, share of a step": (
        "<=",
        0.01,
        ("step", "fp16 compile", "loaded", "gpu", "waiting_for_data"),
    ),
    "loaded / synthetic": (
        ">=",
        0.97,
        ("step", "fp16 compile", "loaded", "gpu", "of_synthetic"),
    ),
    "optimizer + EMA, share of a step": (
        "<=",
        0.03,
        ("step", "fp16 compile", "optimizer_and_ema_of_step"),
    ),
    "batch transforms, share of a step": ("<=", 0.01, ("transforms", "share_of_step")),
}


def source_hash() -> str:
    """SHA-256 of all files of the package, the tests and the benchmarks."""
    total = hashlib.sha256()
    for folder in ("rsb_ffcv", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".c", ".h", ".cu"):
                total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def environment() -> dict:
    def output(*command: str) -> str | None:
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):  # not installed, or not a repository
            return None
        return done.stdout.strip()

    fields = "name,driver_version,memory.total,clocks.max.sm,power.limit,pcie.link.gen.max"
    return {
        **runner.environment(["torch", "torchvision", "timm", "numba", "triton", "cuda-bindings"]),
        "gpu": output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        # a bundle is no repository, and names its commit
        "commit": os.environ.get("RSB_COMMIT") or output("git", "rev-parse", "HEAD"),
        "changed_files": output("git", "status", "--porcelain"),
        "source": source_hash(),
    }


def tests(options) -> dict:
    """Runs each file of tests in a process of its own, all at the same time: most of their time is
    that of compilers and of starting programs."""
    files = options.tests
    reports = [options.out / f"tests_{path.parent.name}_{path.stem}.xml" for path in files]
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    wrong, deadline = [], time.monotonic() + options.test_seconds
    with contextlib.ExitStack() as stack:
        running = []
        for path, report in zip(files, reports):
            output = stack.enter_context(report.with_suffix(".txt").open("w"))
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
                    *(str(path), f"--junitxml={report}"),
                ],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            running.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process, report in zip(running, reports):
            try:
                status: object = process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                status = f"not finished after {options.test_seconds} s"
            if status:
                wrong.append(f"{report.stem}: {status}")
            if report.exists():
                suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
                for name in counts:
                    counts[name] += int(suite.get(name, 0))
    if wrong:
        raise RuntimeError(f"{counts}; {'; '.join(wrong)}; see the files tests_*.txt")
    return counts


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(action: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after one to warm up."""
    found = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        action()
        synchronize(device)
        found.append(time.perf_counter() - started)
    return found[1:]


def limits(options) -> dict:
    device, size = options.device, options.limit_bytes
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    one, other = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    side = int((size / 4) ** 0.5) // 64 * 64
    kind = torch.float16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))

    def rate(action: Callable[[], object], amount: float) -> float:
        return amount / statistics.median(seconds_of(action, device, options.repeats))

    return {
        "host_to_device_gb_s": rate(lambda: one.copy_(host, non_blocking=True), size / 1e9),
        "device_to_host_gb_s": rate(lambda: host.copy_(one, non_blocking=True), size / 1e9),
        "copy_on_device_gb_s": rate(lambda: one.copy_(other), 2 * size / 1e9),
        "matrix_product_tflops": rate(lambda: a @ b, 2 * side**3 / 1e12),
    }


class Timed:
    """A driver that measures each kernel."""

    def __init__(self, inner: driver.Driver, device: torch.device) -> None:
        self.inner, self.device = inner, device
        self._ms = dict.fromkeys(driver.NAMES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def launch(self, kernel: int, argument: np.ndarray, blocks: int) -> None:
        name, started = driver.NAMES[kernel], time.perf_counter()
        if self.device.type == "cpu":
            self.inner.launch(kernel, argument, blocks)
            self._ms[name] += 1000 * (time.perf_counter() - started)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.inner.launch(kernel, argument, blocks)
        end.record()
        self._events.append((name, start, end))

    def ms(self) -> dict[str, float]:
        """Milliseconds of each kernel in all launches."""
        synchronize(self.device)
        for name, start, end in self._events:
            self._ms[name] += start.elapsed_time(end)
        self._events.clear()
        return self._ms


def decode(options) -> dict:
    found: dict[str, Any] = {}
    for name, spec in (("crop", ""), ("RandAugment", RAND_AUGMENT)):
        ways = {
            way: TrainLoader(
                options.train,
                batch_size=options.batch,
                resolution=options.resolution,
                num_workers=options.workers,
                rand_augment=spec,
                decode=way,
                device=options.device,
            )
            for way in ("cpu", "gpu")
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(options.repeats + 1):
            for way, loader in ways.items():
                synchronize(options.device)
                started, images = time.perf_counter(), 0
                # several epochs, if the file is small: the first batches of each fill the pipeline
                for epoch in range(options.epochs):
                    images += sum(len(batch.labels) for batch in loader.epoch(epoch))
                synchronize(options.device)
                if repeat:
                    rates[way].append(images / (time.perf_counter() - started))
        row: dict[str, Any] = {way: statistics.median(values) for way, values in rates.items()}
        device_decoder = ways["gpu"]._decoder
        assert device_decoder is not None  # decode="gpu"
        timed = device_decoder.driver = Timed(device_decoder.driver, options.device)
        batches = sum(1 for _ in ways["gpu"].epoch(0))
        row["ms_per_batch"] = {kernel: ms / batches for kernel, ms in timed.ms().items()}
        row["repeats"] = {way: [round(rate) for rate in values] for way, values in rates.items()}
        for loader in ways.values():
            loader.close()
        found[name] = row
    return found


def training_step(options, results: dict) -> None:
    for precision, compiled in itertools.product(options.precisions, options.compile):
        settings = SimpleNamespace(
            train=options.train,
            arch=options.arch,
            batch=options.batch,
            resolution=options.resolution,
            workers=options.workers,
            optimizer="lamb",
            steps=options.steps,
            repeats=options.repeats,
            compile=compiled,
            decode=["gpu", "cpu"],
        )
        name = f"{precision}{' compile' if compiled == '1' else ''}"
        results["step"][name] = step.measure(settings, precision, True)
        write_record(results, options)  # a compiler may take minutes for the next one


def transforms(options) -> dict:
    images = torch.randint(
        0,
        256,
        (options.batch, options.resolution, options.resolution, 3),
        dtype=torch.uint8,
        device=options.device,
    )
    slots = np.arange(options.batch)
    found = {}
    for name, erase_prob in (("mix", 0.0), ("mix and erase", 0.25)):
        transform = BatchTransform(
            seed=0, mixup_alpha=0.1, cutmix_alpha=1.0, erase_prob=erase_prob, erase_mode="pixel"
        )
        action = partial(transform, images, 0, slots, mixing=True)
        action()
        seconds = [step.device_seconds(action, options.device, 10) for _ in range(options.repeats)]
        found[f"{name}_ms"] = 1000 * statistics.median(seconds)
    return found


def short_training(options) -> dict:
    folder = options.out / "run"
    command = [
        *(sys.executable, "train_imagenet.py", "--config-file", "rsb_configs/demo.yaml"),
        *(f"--data.train_dataset={options.demo / 'train.beton'}",),
        *(f"--data.val_dataset={options.demo / 'val.beton'}",),
        *("--data.decode=gpu", f"--data.num_workers={options.workers}"),
        *(f"--logging.folder={folder}", f"--compute.device={options.device.type}"),
        *options.training,
    ]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    (options.out / "training.txt").write_text(done.stdout)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-500:]}")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "seconds": time.perf_counter() - started,
        **{name: last[name] for name in ("epoch", "top1", "ema_top1") if name in last},
    }


def write_demo(options) -> None:
    command = [sys.executable, "write_ffcv.py", "--cfg.dataset=demo"]
    command += [f"--cfg.data_dir={options.demo / 'images'}", f"--cfg.write_path={options.demo}"]
    subprocess.run(
        [*command, f"--cfg.num_workers={options.workers}"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def programs(options, results: dict) -> None:
    """Runs the tests and the training at the same time: both take the time of compilers."""
    with ThreadPoolExecutor(1) as other:
        trained = other.submit(short_training, options)
        with part(results, "tests"):
            results["tests"] = tests(options)
        with part(results, "training"):
            results["training"] = trained.result()


@contextlib.contextmanager
def part(results: dict, name: str) -> Iterator[None]:
    """Runs a part. An error goes into the results, and the other parts go on."""
    started = time.perf_counter()
    print(f"{name} ...", flush=True)
    try:
        yield
    except Exception as error:  # listed in the table, and in the exit status
        traceback.print_exc()
        results["failed"][name] = f"{type(error).__name__}: {error}"
    results["seconds"][name] = round(time.perf_counter() - started, 1)


def lines(results: dict) -> list[str]:
    """The table of targets as Markdown."""
    found = ["| target | limit | measured | |", "|---|---|---|---|"]
    for name, (relation, limit, place) in TARGETS.items():
        value: Any = results
        for key in place:
            value = value.get(key, {}) if isinstance(value, dict) else {}
        if isinstance(value, dict):
            found.append(f"| {name} | {relation} {limit:,} | not measured | |")
            continue
        good = value >= limit if relation == ">=" else value <= limit
        shown = f"{value:,.0f}" if value >= 100 else f"{value:.4f}"
        found.append(
            f"| {name} | {relation} {limit:,} | {shown} | {'reached' if good else 'MISSED'} |"
        )
    return found


def readme(results: dict, options) -> str:
    about = results["environment"]
    text = [
        "# Check on a GPU",
        "",
        f"`{results['command']}`, {about['date']}, commit {about['commit']}"
        f"{' with changed files' if about['changed_files'] else ''}, source "
        f"{about['source'][:16]}.",
        f"{about['gpu'] or 'no GPU'}; torch {about['versions']['torch']}, CUDA {about['cuda']}, "
        f"{about['cores']} cores of {about['processor']}.",
        "",
        *lines(results),
        "",
    ]
    if not options.photographs:
        text += ["The images are the demo set's: these rates are not those of photographs.", ""]
    text += [f"FAILED: {name}: {error}" for name, error in results["failed"].items()]
    text += ["", "All figures and repeats: `check.json`."]
    return "\n".join(text) + "\n"


def plot(results: dict, path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for offset, way in ((-0.2, "cpu"), (0.2, "gpu")):
        rows = [results["decode"][name][way] for name in results["decode"]]
        axes[0].bar(np.arange(len(rows)) + offset, rows, 0.4, label=f"decode={way}")
    axes[0].set_xticks(range(len(results["decode"])), list(results["decode"]))
    axes[0].set_ylabel("images/s")
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncol=2, frameon=False)
    bottom = np.zeros(len(results["decode"]))
    for kernel in driver.NAMES:
        ms = np.array([row["ms_per_batch"][kernel] for row in results["decode"].values()])
        axes[1].bar(range(len(ms)), ms, 0.6, bottom=bottom, label=kernel)
        bottom += ms
    axes[1].set_xticks(range(len(bottom)), list(results["decode"]))
    axes[1].set_ylabel("ms per batch, kernels one after another")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def check(options) -> dict:
    results: dict[str, Any] = {
        "command": " ".join(["benchmarks/gpu_check.py", *sys.argv[1:]]),
        "environment": environment(),
        "failed": {},
        "seconds": {},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    options.demo = options.out / "demo"
    with part(results, "demo set"):
        write_demo(options)
    options.photographs = options.train is not None
    options.train = options.train or options.demo / "train.beton"
    results["step"] = {}
    actions: dict[str, Callable[[], None]] = {
        "programs": lambda: programs(options, results),
        "limits": lambda: results.update(limits=limits(options)),
        "decode": lambda: results.update(decode=decode(options)),
        "transforms": lambda: results.update(transforms=transforms(options)),
        "step": lambda: training_step(options, results),
    }
    for name in options.parts:
        with part(results, name):
            actions[name]()
        with part(results, "record"):
            write_record(results, options)
    return results


def write_record(results: dict, options) -> None:
    fastest = results["step"].get("fp16 compile")
    if fastest and "transforms" in results:
        step_ms = 1000 * options.batch / fastest["synthetic_images_per_s"]
        results["transforms"]["share_of_step"] = results["transforms"]["mix_ms"] / step_ms
    if "decode" in results:
        plot(results, options.out / "rates.png")
    write_json(options.out / "check.json", results)
    (options.out / "README.md").write_text(readme(results, options))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument("--train", type=Path, help=".beton file of photographs, with entry points")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--workers", type=int, default=16, help="loader threads")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=PARTS, help="of the check"
    )
    parser.add_argument("--precisions", nargs="+", default=["fp16", "bf16"], help="of the step")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: this machine has no CUDA device that torch can use", file=sys.stderr)
        return 2
    vars(options).update(
        device=torch.device("cuda"),
        limit_bytes=1 << 28,
        tests=[*sorted((ROOT / "tests/gpu").glob("test_*.py")), ROOT / "tests/parity/test_gpu.py"],
        test_seconds=240,
        epochs=4,
        compile=["1", "0"],
        arch="resnet50",
        steps=20,
        training=[],
    )
    results = check(options)
    print((options.out / "README.md").read_text())
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
