"""Measures what depends on the number of images of a file, at the size of ImageNet-21k: start-up,
memory, the order of an epoch, and the commands on a finished file.

    python benchmarks/many_images.py --work /tmp/many_images --out records/<date>_many_images

1. Makes `one.beton` and the same images as `shards/*.beton`: 14,197,122 raw images of 4 x 4 pixels
   in 21,841 classes, with checksums and names, unless they are there.
2. Measures each row in a new process, in turn, `--repeats` times, and prints the medians: wall and
   CPU time, and the highest memory of the process while it lasts, in MiB: resident, and the
   anonymous part of it, which processes do not share.
3. `--before <checkout>` measures another checkout in turn with this one, on the same files.

A row has parts, measured one after another in its process. The memory of a part includes what the
parts before it have kept. Imports and the first compilation are done before the first part.
Out: results.json, table.md.
"""

import argparse
import json
import os
import pty
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BENCHMARKS = Path(__file__).resolve().parent
# A measuring process takes rsb_ffcv from the checkout in which it is started
ROOT = Path(os.environ.get("RSB_CHECKOUT", BENCHMARKS.parent))
sys.path[:0] = [str(BENCHMARKS), str(ROOT)]

IMAGES, CLASSES, SHARDS = 14_197_122, 21_841, 32
SIDE = 4  # pixels
PATTERNS = 1 << 16  # different images
AT_ONCE = 1 << 17  # images that are written at once
BATCH, GROUPS = 256, 8  # images of a batch, and batches of a step
FIRST_STEP = re.compile(r"epoch 1: +\d+%\|[^|]*\| *[1-9]\d*/\d+")  # a bar with finished steps
SAMPLE_SECONDS = 0.005  # between two readings of memory


# ---------------------------------------------------------------- the files


def make_file(path: Path, first: int, labels: np.ndarray) -> None:
    """Writes a file of raw images.

    path: the file; written under another name first.
    first: number of the first image. Its pixels and its name depend on its number and label.
    labels: int64, sorted.
    """
    from rsb_ffcv import beton
    from rsb_ffcv.ops.native import checksum

    count, size = len(labels), SIDE * SIDE * 3
    patterns = np.random.default_rng(0).integers(0, 256, (PATTERNS, size), np.uint8)
    sums = np.array([checksum(pattern) for pattern in patterns], np.uint64)
    # as write_ffcv.py does: pages of their own, and no image in two pages
    start = -(-beton.front_bytes(count) // beton.PAGE_BYTES) * beton.PAGE_BYTES
    page, place = np.divmod(np.arange(count, dtype=np.uint64), beton.PAGE_BYTES // size)
    pointers = np.uint64(start) + page * np.uint64(beton.PAGE_BYTES) + place * np.uint64(size)
    numbers = np.arange(first, first + count)
    chosen = (numbers * 7919 + labels) % PATTERNS
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        for at in range(0, count, beton.PAGE_BYTES // size):
            file.seek(int(pointers[at]))
            file.write(patterns[chosen[at : at + beton.PAGE_BYTES // size]].tobytes())
    metadata = np.zeros(count, beton.SAMPLE_METADATA)
    table, extras = np.zeros(count, beton.ALLOCATION), np.zeros(count, beton.EXTRA)
    image = metadata["f0"]
    image["mode"], image["width"], image["height"] = beton.RAW, SIDE, SIDE
    image["data_ptr"], metadata["f1"] = pointers, labels
    table["sample_id"], table["ptr"], table["size"] = np.arange(count), pointers, size
    extras["checksum"] = sums[chosen]
    beton.write_structure(
        part,
        int(pointers[-1]) + size,
        metadata=metadata,
        table=table,
        extras=extras,
        names=[
            f"n{label:08d}/n{label:08d}_{number}.JPEG"
            for label, number in zip(labels.tolist(), numbers.tolist())
        ],
        about=beton.About(
            tool={"benchmark": "many_images"},
            settings={"mode": "raw"},
            source={"split": "train", "images": count},
            classes=[f"n{label:08d}" for label in range(CLASSES)],
            titles=[],
            counts={"raw": count},
        ),
    )
    os.replace(part, path)


def make_files(work: Path, images: int, shards: int) -> None:
    """Makes one.beton with `images` images, shards/*.beton with the same ones, and small.beton with
    2,000 of them, unless they are there. An image has the same name and pixels in each."""
    known, note = work / "images.json", {"images": images, "shards": shards, "side": SIDE}
    if not known.exists() or json.loads(known.read_text()) != note:
        shutil.rmtree(work, ignore_errors=True)
        (work / "shards").mkdir(parents=True)
        known.write_text(json.dumps(note))
    labels = np.arange(images) * CLASSES // images
    edges = np.linspace(0, images, shards + 1).astype(int).tolist()
    parts = [
        (work / "small.beton", 0, 2000),
        (work / "one.beton", 0, images),
        *(
            (work / "shards" / f"{number:05d}.beton", first, last)
            for number, (first, last) in enumerate(zip(edges, edges[1:]))
        ),
    ]
    for path, first, last in parts:
        if not path.exists():
            make_file(path, first, labels[first:last])


# ---------------------------------------------------------------- rows in Python


class Parts:
    """Announces each part of a row to the process that measures, on stdout."""

    def __init__(self) -> None:
        self._since = self._cpu = 0.0

    def begin(self) -> None:
        print("begin", flush=True)
        self._since, self._cpu = time.perf_counter(), time.process_time()

    def end(self, name: str, **facts: Any) -> None:
        seconds, cpu = time.perf_counter() - self._since, time.process_time() - self._cpu
        print(json.dumps({"part": name, "seconds": seconds, "cpu": cpu, **facts}), flush=True)
        self.begin()


def given(work: str, files: str) -> str:
    return f"{work}/shards/*.beton" if files == "shards" else f"{work}/{files}.beton"


def structure(work: str, files: str) -> None:
    """Reading the structure of the files, and what a run takes from it."""
    from rsb_ffcv.beton import read_beton

    read_beton(given(work, "small"))
    parts = Parts()
    parts.begin()
    file = read_beton(given(work, files))
    parts.end("read_beton", images=len(file))
    parts.end("fingerprint", fingerprint=file.fingerprint())
    parts.end("names", count=len(file.names()))


def loader(work: str, files: str, order: str, repeats: int, world_size: int) -> None:
    """The loader of process 0 up to the first batches."""
    from rsb_ffcv.loading import TrainLoader

    settings: dict[str, Any] = {
        "batch_size": BATCH,
        "resolution": 4,
        "num_workers": 1,
        "order": order,
        "repeats": repeats,
        "world_size": world_size,
        "global_batch": BATCH * GROUPS,
        # A window of tiny images would have a million of them; a real one has ten thousand
        "window_bytes": 1 << 24,
    }
    small = TrainLoader(given(work, "small"), **settings | {"batch_size": 32, "global_batch": 256})
    next(small.epoch(0))
    small.close()
    parts = Parts()
    parts.begin()
    made = TrainLoader(given(work, files), **settings)
    parts.end("TrainLoader")
    for epoch in range(2):
        batches = made.epoch(epoch)
        first = next(batches)
        parts.end(f"first batch of epoch {epoch}", labels=str(first.labels.tolist()))
        for _ in range(20):
            next(batches)
        parts.begin()
        batches.close()
    parts.end("later", **shared_memory())
    made.close()


def order(work: str, files: str, order: str) -> None:
    """epoch_order alone."""
    from rsb_ffcv.beton import read_beton
    from rsb_ffcv.loading.order import epoch_order
    from rsb_ffcv.ops.native import checksum

    def make(path: str, epoch: int) -> Callable[[], np.ndarray]:
        file = read_beton(given(work, path))
        places = {"files": file.files, "pointers": file.pointers, "sizes": file.stored_bytes}
        return lambda: epoch_order(order, 0, epoch, **places, window_bytes=1 << 24).indices

    make("small", 0)()
    made = make(files, 1)
    parts = Parts()
    parts.begin()
    indices = made()
    parts.end("epoch_order", checksum=f"{checksum(np.ascontiguousarray(indices)):016x}")


def report(work: str, files: str) -> None:
    """What the end of a run writes about each image of an evaluation file."""
    from rsb_ffcv.beton import read_beton
    from rsb_ffcv.training.report import findings

    def per_image(file: Any) -> np.ndarray:
        rng = np.random.default_rng(0)
        made = rng.random((len(file), 3))
        wrong = made[:, 0] < 0.5
        made[:, 0] = np.where(wrong, rng.integers(0, CLASSES, len(file)), file.labels)
        return made

    row = {"epoch": 0, "top1": 50.0, "top5": 70.0, "val_loss": 1.0}
    facts: dict[str, Any] = {"weights": "model", "row": row, "label_sets": None}
    small = read_beton(given(work, "small"))
    findings(small, CLASSES, per_image=per_image(small), **facts)
    file = read_beton(given(work, files))
    found = per_image(file)
    parts = Parts()
    parts.begin()
    made = findings(file, CLASSES, per_image=found, **facts)
    parts.end("findings of a report", bytes=len(json.dumps(made)))


def shared_memory() -> dict[str, float]:
    """Memory of this process in MiB: its own, and its share of what others map too."""
    text = Path("/proc/self/smaps_rollup").read_text()
    sizes = {name: int(kib) / 1024 for name, kib in re.findall(r"^(\w+): +(\d+) kB", text, re.M)}
    private = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return {"private_mib": round(private, 1), "pss_mib": round(sizes["Pss"], 1)}


# ---------------------------------------------------------------- measuring


def memory(pid: int) -> tuple[float, float]:
    """Resident memory of a process and the anonymous part of it, MiB; zeros if it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0, 0.0
    kib = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.M))
    return int(kib.get("VmRSS", 0)) / 1024, int(kib.get("RssAnon", 0)) / 1024


def measured_row(checkout: Path, name: str, arguments: list[Any]) -> dict[str, dict[str, Any]]:
    """Runs one of the functions above in a new process. Returns its parts."""
    process = subprocess.Popen(
        [sys.executable, __file__, "row", name, json.dumps(arguments)],
        stdout=subprocess.PIPE,
        env={**os.environ, "RSB_CHECKOUT": str(checkout)},
    )
    assert process.stdout is not None
    stream = process.stdout.fileno()
    os.set_blocking(stream, False)
    parts: dict[str, dict[str, Any]] = {}
    text, peak = b"", [0.0, 0.0]
    while True:
        ready = select.select([stream], [], [], SAMPLE_SECONDS)[0]
        peak = [max(pair) for pair in zip(peak, memory(process.pid))]
        if not ready:
            continue
        read = os.read(stream, 1 << 16)
        if not read:
            break
        text += read
        *lines, text = text.split(b"\n")
        for line in lines:
            if line != b"begin":
                part = json.loads(line)
                memories = {"rss_mib": round(peak[0], 1), "anonymous_mib": round(peak[1], 1)}
                parts[part.pop("part")] = part | memories
            peak = [0.0, 0.0]
    if process.wait():
        raise RuntimeError(f"{name} {arguments} ended with {process.returncode}")
    return parts


def measured_program(
    checkout: Path, arguments: list[Any], *, end: Callable[[str], bool] = lambda text: False
) -> dict[str, Any]:
    """Runs a program to its end, or until `end` of its output on stderr, a terminal, is true, and
    sends SIGTERM then. Returns its times and memory; "stopping" is the time from the signal on."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 160))
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        stderr=its,
    )
    os.close(its)
    assert process.stdout is not None
    streams, text, peak, stopped = [ours, process.stdout.fileno()], "", [0.0, 0.0], 0.0
    printed = 0
    while streams:
        for stream in select.select(streams, [], [], SAMPLE_SECONDS)[0]:
            try:
                read = os.read(stream, 1 << 16)
            except OSError:  # the terminal's other side is closed
                read = b""
            if not read:
                streams.remove(stream)
            if stream == ours:
                text = (text + read.decode(errors="replace"))[-4000:]
            else:
                printed += len(read)
        peak = [max(pair) for pair in zip(peak, memory(process.pid))]
        if not stopped and end(text):
            stopped = time.perf_counter()
            process.send_signal(signal.SIGTERM)
    os.close(ours)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    finished = time.perf_counter()
    if process.returncode != (75 if stopped else 0):
        raise RuntimeError(f"{arguments} ended with {process.returncode}: {text[-1000:]}")
    return {
        "seconds": (stopped or finished) - began,
        "cpu": usage.ru_utime + usage.ru_stime,
        "rss_mib": round(peak[0], 1),
        "anonymous_mib": round(peak[1], 1),
        **({"stopping": finished - stopped} if stopped else {"printed": printed}),
    }


def training(checkout: Path, work: Path, files: str) -> dict[str, dict[str, Any]]:
    """A run with a model of one layer: from the start to the first steps, a stop with its
    checkpoint, and the same again, resumed."""
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    flags = {
        "data.train_dataset": given(str(work), files),
        "data.val_dataset": work / "small.beton",
        "logging.folder": run,
        "model.arch": "rehearsal_quarters",
        "model.num_classes": 0,  # those of the file
        "resolution.min_res": 8,
        "resolution.max_res": 8,
        "validation.resolution": 8,
        "validation.batch_size": BATCH,
        "training.batch_size": BATCH,
        "training.global_batch": BATCH,
        "compute.device": "cpu",
        "compute.precision": "fp32",
        "compute.threads": 1,
    }
    arguments = [
        checkout / "benchmarks" / "rehearsal.py",
        *("train", os.getpid(), "--config-file", checkout / "rsb_configs" / "a2_300.yaml"),
        *(f"--{name}={value}" for name, value in flags.items()),
    ]
    found = {}
    for name in ("training: first step", "training: first step, resumed"):
        before = {path.name for path in run.glob("checkpoint_*.pt")}
        found[name] = measured_program(
            checkout,
            arguments,
            end=lambda text: bool(FIRST_STEP.search(text)),
        )
        (made,) = {path.name for path in run.glob("checkpoint_*.pt")} - before or {""}
        found[name] |= {"checkpoint_bytes": (run / made).stat().st_size if made else 0}
    return found


def together(checkout: Path, work: Path, files: str, processes: int) -> dict[str, dict[str, Any]]:
    """Loaders of several processes at once: what each holds alone, and its share of the rest."""
    held = "import sys, many_images as m; m.hold(*sys.argv[1:])"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", held, str(work), files, str(rank), str(processes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "RSB_CHECKOUT": str(checkout),
                "PYTHONPATH": f"{checkout}:{BENCHMARKS}",
            },
            text=True,
        )
        for rank in range(processes)
    ]
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    found = []
    for process in running:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("measure\n")
        process.stdin.flush()
        found.append(json.loads(process.stdout.readline()))
    for process in running:
        process.communicate("end\n")
    name = f"{processes} processes, each"
    return {name: {key: statistics.mean(one[key] for one in found) for key in found[0]}}


def hold(work: str, files: str, rank: str, processes: str) -> None:
    """A process of `together`."""
    from rsb_ffcv.loading import TrainLoader

    made = TrainLoader(
        given(work, files),
        batch_size=BATCH,
        resolution=4,
        num_workers=1,
        rank=int(rank),
        world_size=int(processes),
    )
    batches = made.epoch(0)
    next(batches)
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(shared_memory()), flush=True)
    sys.stdin.readline()


def rows(work: Path, verify: bool) -> dict[str, Callable[[Path], dict[str, dict[str, Any]]]]:
    """What is measured: title -> function of the checkout."""

    def python(*row: Any) -> Callable[[Path], dict[str, dict[str, Any]]]:
        return lambda checkout: measured_row(checkout, row[0], [str(work), *row[1:]])

    def program(name: str, *arguments: Any) -> Callable[[Path], dict[str, dict[str, Any]]]:
        return lambda checkout: {
            name: measured_program(checkout, [checkout / "write_ffcv.py", *arguments])
        }

    one = work / "one.beton"
    found = {
        "one file": python("structure", "one"),
        "32 shards": python("structure", "shards"),
        **{
            f"one file, {kind}": python("loader", "one", kind, 1, 1)
            for kind in ("random", "quasi_random", "sequential")
        },
        "one file, random, repeats=3": python("loader", "one", "random", 3, 1),
        "one file, random, world_size=8": python("loader", "one", "random", 1, 8),
        "32 shards, random": python("loader", "shards", "random", 1, 1),
        "32 shards, quasi_random": python("loader", "shards", "quasi_random", 1, 1),
        **{
            f"one file, order {kind}": python("order", "one", kind)
            for kind in ("random", "quasi_random", "sequential")
        },
        "one file, loaders": lambda checkout: together(checkout, work, "one", 2),
        "one file, run": lambda checkout: training(checkout, work, "one"),
        "one file, evaluated": python("report", "one"),
        "one file, command": program("write_ffcv.py info", "info", f"--cfg.path={one}"),
    }
    if verify:
        found["one file, check"] = program(
            "write_ffcv.py verify, decode=0", "verify", f"--cfg.path={one}", "--cfg.decode=0"
        )
    return found


TIMES = ("seconds", "cpu", "stopping")


def summary(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """The median, lowest and highest of each number; other facts must be the same in all."""
    found: dict[str, Any] = {}
    for key, first in repeats[0].items():
        values = [one[key] for one in repeats]
        if key in TIMES or key.endswith("_mib"):
            digits = 3 if key in TIMES else 1
            found[key] = [
                round(pick, digits)
                for pick in (statistics.median(values), min(values), max(values))
            ]
        else:
            assert all(value == first for value in values) or key == "checkpoint_bytes", values
            found[key] = first
    return found


def differences(found: dict[str, Any]) -> list[str]:
    """What is not the same in two checkouts, apart from times, memory, and the bytes of a
    checkpoint, which depend on times: orders, fingerprints, numbers and bytes."""

    def facts(name: str) -> dict[str, Any]:
        return {
            f"{row}, {part}: {key}": value
            for row, parts in found[name].items()
            for part, one in parts.items()
            for key, value in one.items()
            if not isinstance(value, list) and key != "checkpoint_bytes"
        }

    first, last = (facts(name) for name in (next(iter(found)), "now"))
    return [key for key in first if first[key] != last[key]]


def table(results: dict[str, Any]) -> str:
    names = list(results["rows"])
    lines = [
        "| files, row | part | "
        + " | ".join(
            f"{name}: seconds (low .. high) | CPU s | peak MiB | of it anonymous" for name in names
        )
        + " |",
        "|---|---|" + "---|---|---|---|" * len(names),
    ]
    for row, first in results["rows"][names[0]].items():
        for part in first:
            cells = [row, part]
            for name in names:
                one = results["rows"][name][row][part]
                if "seconds" in one:
                    middle, low, high = one["seconds"]
                    cells += [f"{middle:.2f} ({low:.2f} .. {high:.2f})", f"{one['cpu'][0]:.2f}"]
                    cells += [f"{one[key][0]:.0f}" for key in ("rss_mib", "anonymous_mib")]
                else:
                    cells += ["", "", f"{one['pss_mib'][0]:.0f} (PSS)"]
                    cells += [f"{one['private_mib'][0]:.0f} (private)"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the files, 4 GB")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--shards", type=int, default=SHARDS)
    parser.add_argument("--repeats", type=int, default=3, help="of each row")
    parser.add_argument("--before", type=Path, help="another checkout, with its core built")
    parser.add_argument("--only", default="", help="regular expression: only rows that it matches")
    parser.add_argument("--verify", type=int, default=1, help="0: without verify, which is slow")
    options = parser.parse_args()
    work = options.work.resolve()
    make_files(work, options.images, options.shards)
    checkouts = {"now": ROOT}
    if options.before:
        checkouts = {"before": options.before.resolve()} | checkouts
    found: dict[str, Any] = {name: {} for name in checkouts}
    for title, run in rows(work, bool(options.verify)).items():
        if not re.search(options.only, title):
            continue
        took: dict[str, list[dict[str, dict[str, Any]]]] = {name: [] for name in checkouts}
        for _ in range(options.repeats):
            for name, checkout in checkouts.items():
                took[name].append(run(checkout))
        for name, all_parts in took.items():
            found[name][title] = {
                part: summary([parts[part] for parts in all_parts]) for part in all_parts[0]
            }
            print(name, title, json.dumps(found[name][title]), flush=True)
    import runner

    results = {
        "command": f"benchmarks/many_images.py --images {options.images} --shards "
        f"{options.shards} --repeats {options.repeats} --only '{options.only}'",
        "differences": differences(found),
        "environment": runner.environment(["rsb_ffcv", "torch", "numpy", "numba"]),
        "rows": found,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["row"]:
        globals()[sys.argv[2]](*json.loads(sys.argv[3]))
    else:
        main()
