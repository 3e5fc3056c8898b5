"""Rehearses a long run at the size of ImageNet. Images and model cost nearly nothing; what is left
is the bookkeeping of a run: epochs, validation, EMA, checkpoints, log, curves.

    python benchmarks/rehearsal.py --work /tmp/rehearsal --out records/<date>_rehearsal

1. prepare: makes 1,281,167 training and 50,000 validation JPEGs of 16 x 16 pixels in 1,000 classes,
   in one archive, and converts them with `write_ffcv.py`.
2. undisturbed: trains the recipe a2_300, at 8 px and with the model below, to its end.
3. disturbed: the same, killed at moments drawn from a seed, one in each part of the run, and
   started again: by SIGKILL in the middle of an epoch, in validation, while it writes a checkpoint
   and while it starts, and by SIGTERM in an epoch and in validation.
4. compare: every row of both logs but its times, the newest and the best checkpoint, and the final
   weights must be the same, bit by bit. Measures the time outside of steps, memory and open files
   in the first and the last epoch, and the sizes of all files.

Start it again after an interruption: it continues, and counts the interruption. `--only` runs a
part. The progress bars on stderr, a pseudo-terminal, show the moments: the program is not changed.
Times of epochs are those at which metrics.jsonl was written.
Out: results.json, README.md. Exit status: 1 if the runs differ or a kill is missing.
"""

import argparse
import ctypes
import io
import json
import os
import pty
import random
import re
import select
import signal
import statistics
import subprocess
import sys
import tarfile
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import runner  # noqa: E402

from rsb_ffcv import InputError, duration, exit_status  # noqa: E402
from rsb_ffcv.atomic import atomic_file  # noqa: E402
from rsb_ffcv.reporting.log import METRICS, read_metrics, write_json  # noqa: E402
from tests.integration.runs import assert_same, rows, state  # noqa: E402

IMAGES, CLASSES = {"train": 1_281_167, "val": 50_000}, 1000
SIDE = 16  # pixels: one block of 4:2:0 JPEG
RUNS = ("undisturbed", "disturbed")
FINAL = ("final_weights.pt", "final_weights_ema.pt")
FIX = "free space or choose another --work"


# ---------------------------------------------------------------- the images


def class_pictures(split: str, number: int, count: int) -> list[bytes]:
    """JPEGs of a class: a colour for each quarter of the picture, and noise of three scales. They
    are a function of the arguments."""
    quarters = np.random.default_rng(number).uniform(40, 215, (2, 2, 3))
    rng = np.random.default_rng([list(IMAGES).index(split), number])
    pixels = quarters + rng.normal(0, 25, (count, 1, 1, 3)) + rng.normal(0, 25, (count, 2, 2, 3))
    pixels = pixels.repeat(SIDE // 2, 1).repeat(SIDE // 2, 2)
    pixels += rng.normal(0, 8, pixels.shape)
    made = []
    for picture in np.clip(pixels, 0, 255).astype(np.uint8):
        done, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])
        assert done
        made.append(data.tobytes())
    return made


def make_archive(path: Path, images: dict[str, int], classes: int) -> None:
    """Writes <split>/<class>/<image>.jpg to a .tar. images: of each split."""
    with atomic_file(path, FIX) as file, tarfile.open(fileobj=file, mode="w") as archive:
        for split, total in images.items():
            for number in range(classes):
                count = total // classes + (number < total % classes)
                for index, data in enumerate(class_pictures(split, number, count)):
                    member = tarfile.TarInfo(f"{split}/c{number:04d}/c{number:04d}_{index:05d}.jpg")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def prepare(work: Path, images: dict[str, int], classes: int) -> None:
    """Makes train.beton and val.beton in `work`, unless they are there."""
    archive, note = work / "pictures.tar", {"images": images, "classes": classes}
    known = work / "images.json"
    if known.exists() and json.loads(known.read_text()) != note:
        raise InputError(f"--work={work}: has other images ({known}); choose another folder")
    work.mkdir(parents=True, exist_ok=True)
    write_json(known, note)
    if all((work / f"{split}.beton").exists() for split in images):
        return
    began = time.monotonic()
    if not archive.exists():
        make_archive(archive, images, classes)
    made = time.monotonic()
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "write_ffcv.py"),
            f"--cfg.data_dir={archive}",
            f"--cfg.write_path={work}",
        ],
        cwd=ROOT,
        check=True,
    )
    seconds = {"pictures": made - began, "write_ffcv.py": time.monotonic() - made}
    write_json(work / "prepared.json", {name: round(value, 1) for name, value in seconds.items()})


# ---------------------------------------------------------------- the program, in its own process


def train(parent: int, arguments: list[str]) -> int:
    """train_imagenet.py with one more model: the mean colours of an image's quarters, batch norm,
    and a linear layer. Ends with process `parent`, so that an interrupted rehearsal leaves none."""
    killed_with_parent = 1, signal.SIGKILL  # PR_SET_PDEATHSIG
    assert ctypes.CDLL(None).prctl(*killed_with_parent) == 0
    if os.getppid() != parent:  # it has ended since
        return 1
    from timm.models import register_model
    from torch import nn

    class Quarters(nn.Sequential):
        pretrained_cfg: dict[str, Any] = {}

    @register_model
    def rehearsal_quarters(num_classes: int = 1000, **_: object) -> nn.Module:
        parts = nn.AdaptiveAvgPool2d(2), nn.BatchNorm2d(3), nn.Flatten()
        return Quarters(*parts, nn.Linear(12, num_classes))

    from train_imagenet import main

    sys.argv = ["train_imagenet.py", *arguments]
    return exit_status(main)


def flags(work: Path, folder: Path, epochs: int, batch: int) -> list[str]:
    """Options of a run: those of a2_300 but for size, files and model."""
    changed = {
        "data.train_dataset": work / "train.beton",
        "data.val_dataset": work / "val.beton",
        "logging.folder": folder,
        "model.arch": "rehearsal_quarters",
        "resolution.min_res": 8,
        "resolution.max_res": 8,
        "validation.resolution": 8,
        "training.epochs": epochs,
        "training.batch_size": batch,
        "training.global_batch": 8 * batch,
        "validation.batch_size": batch,
        "lr.warmup_epochs": min(5, epochs // 10),
        "model.num_classes": 0,  # those of the file
        "compute.device": "cpu",
        "compute.precision": "fp32",
        "compute.threads": 1,  # the tensors are small: more threads wait for each other
    }
    recipe = ROOT / "rsb_configs" / "a2_300.yaml"
    return ["--config-file", str(recipe), *(f"--{name}={value}" for name, value in changed.items())]


# ---------------------------------------------------------------- one run, process after process

START, EPOCH, VALIDATION, CHECKPOINT = "start", "epoch", "validation", "checkpoint"
KINDS = (
    (EPOCH, signal.SIGKILL),
    (CHECKPOINT, signal.SIGKILL),
    (VALIDATION, signal.SIGKILL),
    (EPOCH, signal.SIGTERM),
    (START, signal.SIGKILL),
    (EPOCH, signal.SIGKILL),
    (CHECKPOINT, signal.SIGKILL),
    (VALIDATION, signal.SIGTERM),
    (EPOCH, signal.SIGKILL),
    (CHECKPOINT, signal.SIGKILL),
)
BAR = re.compile(r"(epoch \d+|validation(?: EMA)?): +\d+%\|[^|]*\| *(\d+)/(\d+)")
SAMPLE_SECONDS = 0.5  # between two readings of memory


@dataclass(frozen=True)
class Moment:
    """When to end a process: in the first `phase` after `epoch` finished epochs, after `share` of
    it, 0 .. 1. A start is the one after the kill before, in whichever epoch."""

    epoch: int
    phase: str
    number: signal.Signals
    share: float


def moments(epochs: int, kills: int, seed: int = 0) -> list[Moment]:
    """A moment in each of `kills` equal parts of a run of `epochs`, drawn from `seed`."""
    rng = random.Random(seed)
    found = []
    for part in range(kills):
        first, last = (epochs * edge // kills for edge in (part, part + 1))
        epoch = rng.randrange(first, max(last, first + 1))
        found.append(Moment(epoch, *KINDS[part % len(KINDS)], rng.uniform(0.05, 0.95)))
    return found


class Program:
    """train_imagenet.py with a terminal as its stderr.

    title, done, total: of its progress bar. since: the time at which the bar got this title. text:
    the end of what it has written.
    """

    def __init__(self, arguments: list[str]) -> None:
        self._ours, its = pty.openpty()
        termios.tcsetwinsize(its, (24, 160))
        self.process = subprocess.Popen(
            [sys.executable, __file__, "train", str(os.getpid()), *arguments],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=its,
        )
        os.close(its)
        self.began = self.since = time.time()
        self.text, self.title, self.done, self.total = "", "", 0, 0
        self._open = True

    def read(self, seconds: float) -> None:
        """Reads what is there, and waits at most `seconds` for it."""
        if not self._open or not select.select([self._ours], [], [], seconds)[0]:
            return
        try:
            new = os.read(self._ours, 1 << 16)
        except OSError:  # the process has closed its side
            new = b""
        self._open = bool(new)
        self.text = (self.text + new.decode(errors="replace"))[-2000:]
        if found := BAR.findall(self.text):
            title, done, total = found[-1]
            if title != self.title:
                self.title, self.since = title, time.time()
            self.done, self.total = int(done), int(total)

    def usage(self) -> dict[str, float]:
        """Memory in MiB, threads, and open files."""
        folder = Path("/proc") / str(self.process.pid)
        facts = dict(re.findall(r"(\w+):\s+(\d+)", (folder / "status").read_text()))
        return {
            "rss_mib": int(facts.get("VmRSS", 0)) / 1024,
            "anonymous_mib": int(facts.get("RssAnon", 0)) / 1024,
            "threads": int(facts["Threads"]),
            "files": len(os.listdir(folder / "fd")),
        }

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def parts(folder: Path) -> list[str]:
    """Files that are being written, or were, when the process was killed."""
    return sorted(path.name for path in folder.glob(".lease-*/*/*.part"))


class Run:
    """A run, and what is known of it: `events`, which <name>.jsonl keeps.

    start: a process was started; rows: epochs finished before.
    ready: its first progress bar appeared, `seconds` after that.
    epoch: the row of an epoch was written at the time `at`; since: when that of the epoch before it
        was, if by the same process; usage: the medians of Program.usage in that time.
    end: the process ended with `status`; kill: of which moment, if any, and what it was doing.
    """

    def __init__(self, work: Path, name: str, *, arguments: list[str], plan: list[Moment]) -> None:
        self.folder, self._journal = work / name, work / f"{name}.jsonl"
        self._arguments, self._plan = arguments, plan
        self.events: list[dict[str, Any]] = []
        if self._journal.exists():
            self.events = [json.loads(line) for line in self._journal.read_text().splitlines()]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def kills(self) -> list[dict[str, Any]]:
        return [event["kill"] for event in self.of("end") if event["kill"]]

    @property
    def interruptions(self) -> int:
        """How often the rehearsal itself ended during the run, which is finished."""
        return len(self.of("start")) - len(self.of("end"))

    @property
    def finished(self) -> bool:
        return any(event["status"] == 0 for event in self.of("end"))

    def rows(self) -> list[dict[str, Any]]:
        path = self.folder / METRICS
        return read_metrics(self.folder) if path.exists() else []

    def _note(self, event: str, **facts: object) -> None:
        self.events.append({"event": event, **facts})
        with open(self._journal, "a") as file:
            file.write(json.dumps(self.events[-1]) + "\n")

    def complete(self) -> None:
        """Starts processes until the run has ended. Raises InputError if one of them fails."""
        while not self.finished:
            left = self._plan[len(self.kills) :]
            program = Program(self._arguments)
            try:
                self._note("start", rows=len(self.rows()))
                kill = self._follow(program, left[0] if left else None)
                status = program.process.wait()
            finally:
                program.close()
            if status not in ((-signal.SIGKILL, 75) if kill else (0,)):
                lines = program.text.strip().splitlines() or ["no message"]
                raise InputError(f"{self.folder}: the run ended with {status}: {lines[-1]}")
            if kill:
                kill["left"] = parts(self.folder)
                print(f"{self.folder.name}: {json.dumps(kill)}", flush=True)
            self._note("end", status=status, kill=kill)

    def _follow(self, program: Program, moment: Moment | None) -> dict[str, Any] | None:
        """Notes events until the process ends, or until `moment`, when it sends the signal. Returns
        what the process was doing then."""
        log, known, last = self.folder / METRICS, len(self.rows()), None
        written, sampled, ready = log.stat().st_mtime if log.exists() else 0.0, 0.0, False
        samples: list[dict[str, float]] = []
        running = True
        while running:
            running = program.process.poll() is None  # the last row may be written before that
            # A checkpoint takes milliseconds
            hunting = (
                moment is not None
                and (moment.phase, program.title) == (CHECKPOINT, "validation EMA")
                and known >= moment.epoch
            )
            program.read(0 if hunting else 0.02)
            if program.title and not ready:
                ready, samples = True, []
                self._note("ready", seconds=program.since - program.began)
            if running and moment is not None and self._due(moment, program, known):
                program.process.send_signal(moment.number)
                doing = {name: getattr(program, name) for name in ("title", "done", "total")}
                return {"signal": moment.number.name, "aim": moment.phase, "rows": known} | doing
            if hunting and running:
                continue
            if time.time() - sampled >= SAMPLE_SECONDS:
                sampled = time.time()
                with suppress(OSError, KeyError):  # the process has just ended
                    samples.append(program.usage())
            at = log.stat().st_mtime if log.exists() else 0.0
            if at == written:
                continue
            written, before, known = at, known, len(self.rows())
            if not ready or known <= before:
                continue  # a start writes the log of the checkpoint
            middle = {
                name: statistics.median(sample[name] for sample in samples)
                for name in (samples[0] if samples else ())
            }
            self._note("epoch", epoch=known - 1, at=at, since=last, usage=middle)
            samples, last = [], at
        return None

    def _due(self, moment: Moment, program: Program, known: int) -> bool:
        if moment.phase == START:
            typical = statistics.median(event["seconds"] for event in self.of("ready"))
            return time.time() - program.began >= moment.share * typical
        if known < moment.epoch:
            return False
        if moment.phase == CHECKPOINT:
            writing = ("checkpoint_", "best_weights")
            return any(name.startswith(writing) for name in parts(self.folder))
        if not program.title.startswith(moment.phase):
            return False
        if moment.phase == EPOCH:
            return program.done >= moment.share * program.total
        rows = self.rows()  # the last validation's time, for both sets of weights
        wait = moment.share * rows[-1]["val_seconds"] / 2 if rows else 0.0
        return time.time() - program.since >= wait


# ---------------------------------------------------------------- results


def differences(run: Run, other: Run) -> list[str]:
    """What is not the same in two finished runs, but for times and memory."""
    found = []
    log, other_log = rows(run.folder), rows(other.folder)
    if len(log) != len(other_log):
        found.append(f"{len(log)} and {len(other_log)} epochs")
    for row, its in zip(log, other_log):
        if wrong := sorted(key for key in row.keys() | its.keys() if row.get(key) != its.get(key)):
            found.append(f"epoch {row['epoch'] + 1}: {', '.join(wrong)}")
    weights = (*FINAL, "best_weights.pt", "best.pt")
    pairs = [
        (name, *(_loaded(folder / name) for folder in (run.folder, other.folder)))
        for name in weights
    ]
    for name, a, b in [*pairs, ("the newest checkpoint", state(run.folder), state(other.folder))]:
        try:
            assert_same(a, b, name)
        except AssertionError as error:
            found.append(f"{error} differs".splitlines()[0])
    return found


def _loaded(path: Path) -> Any:
    content = torch.load(path, weights_only=True)
    return content["model"] if path.name == "best.pt" else content


def times(run: Run) -> list[dict[str, float]]:
    """Seconds of each epoch that one process ran from its beginning, after its first one: wall, of
    the training steps (of them waiting for images), of validation, and of the rest."""
    found, log = [], {row["epoch"]: row for row in run.rows()}
    for event in run.of("epoch"):
        if event["since"] is None:
            continue
        row, wall = log[event["epoch"]], event["at"] - event["since"]
        found.append(
            {
                "epoch": event["epoch"],
                "wall": wall,
                "steps": row["seconds"],
                "waiting": row["data_wait_s"],
                "validation": row["val_seconds"],
                "rest": wall - row["seconds"] - row["val_seconds"],
            }
        )
    return found


def measured(run: Run, epochs: int) -> dict[str, Any]:
    """The figures of a finished run. The parts of an epoch are medians of a tenth of the run."""
    tenth, found = max(1, epochs // 10), times(run)
    by_part = {
        "first tenth": [item for item in found if item["epoch"] <= tenth],
        "last tenth": [item for item in found if item["epoch"] >= epochs - tenth],
    }
    usage = {event["epoch"]: event["usage"] for event in run.of("epoch") if event["usage"]}
    starts = [event["rows"] for event in run.of("start")]
    ready = [event["seconds"] for event in run.of("ready")]
    total = sum(item["wall"] for item in found)
    return {
        "epochs": epochs,
        "processes": len(starts),
        "interruptions": run.interruptions,
        "kills": run.kills,
        "seconds_of_an_epoch": {
            name: {
                key: round(statistics.median(item[key] for item in items), 3)
                for key in ("wall", "steps", "waiting", "validation", "rest")
            }
            for name, items in by_part.items()
            if items
        },
        "outside_of_steps": {
            key: round(sum(item[key] for item in found) / total, 5)
            for key in ("validation", "rest")
        }
        if found
        else {},
        "longest_rest_s": round(max((item["rest"] for item in found), default=0.0), 3),
        # Not only the first: the library that draws the curves is imported after a minute
        "usage": {
            f"epoch {epoch + 1}": usage[epoch] for epoch in (0, tenth, epochs - 1) if epoch in usage
        },
        "start_s": round(ready[0], 2),
        "resume_s": round(statistics.median(ready[1:]), 2) if ready[1:] else None,
        "bytes": {
            path.name: path.stat().st_size
            for path in sorted(run.folder.iterdir())
            if path.is_file() and path.stat().st_size
        },
    }


def readme(results: dict[str, Any]) -> str:
    a, b = results["undisturbed"], results["disturbed"]
    about, images = results["environment"], results["images"]
    wrong = results["differences"]
    lines = [
        "# A rehearsal of a long run at full size",
        "",
        f"`{results['command']}`, commit {results['commit']}, {about['date']}, {about['cores']} "
        f"cores of {about['processor']}, {about['memory_gib']} GiB, Python {about['python']}, "
        f"torch {about['versions']['torch']}.",
        "",
        f"{images['train']:,} training and {images['val']:,} validation images of {SIDE} px in "
        f"{results['classes']:,} classes, a2_300 at 8 px for {a['epochs']} epochs, and a model of "
        f"one linear layer. The rehearsal was interrupted {a['interruptions']} times in the "
        f"undisturbed and {b['interruptions']} times in the disturbed run.",
        "",
        f"**{len(b['kills'])} kills; "
        + (
            f"the runs differ: {'; '.join(wrong[:10])}**"
            if wrong
            else "every row of the log, the checkpoints and the final weights are those of the "
            "undisturbed run, bit by bit**"
        ),
        "",
        "| seconds of an epoch, median | wall | steps | of them waiting | validation | rest |",
        "|---|---|---|---|---|---|",
        *(
            f"| {run}, {part} | {' | '.join(f'{value:.2f}' for value in item.values())} |"
            for run in ("undisturbed", "disturbed")
            for part, item in results[run]["seconds_of_an_epoch"].items()
        ),
        "",
        "| | undisturbed | disturbed |",
        "|---|---|---|",
    ]

    def add(title: str, value: Callable[[dict[str, Any]], str]) -> None:
        lines.append(f"| {title} | {value(a)} | {value(b)} |")

    def share(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda run: f"{100 * run['outside_of_steps'].get(key, 0.0):.2f} %"

    def usage(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda run: ", ".join(f"{part[key]:.0f}" for part in run["usage"].values())

    def size(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda run: f"{run['bytes'].get(name, 0):,}"

    add("processes", lambda run: str(run["processes"]))
    add("validation, share of the wall time", share("validation"))
    add("rest, share of the wall time", share("rest"))
    add("longest rest of an epoch, s", lambda run: f"{run['longest_rest_s']:.2f}")
    add("start, resume to the first step, s", lambda run: f"{run['start_s']}, {run['resume_s']}")
    for key, title in (
        ("rss_mib", "memory, MiB"),
        ("anonymous_mib", "of it, anonymous, MiB"),
        ("threads", "threads"),
        ("files", "open files"),
    ):
        add(f"{title}: {', '.join(a['usage'])}", usage(key))
    for name in sorted({*a["bytes"], *b["bytes"]}):
        add(f"{name}, bytes", size(name))
    lines += ["", "Kills:", ""]
    for kill in b["kills"]:
        written = f"; left behind: {', '.join(kill['left'])}" if kill["left"] else ""
        lines.append(
            f"- {kill['signal']} after {kill['rows']} epochs, in {kill['title'] or 'the start'} "
            f"({kill['done']}/{kill['total']}), aimed at: {kill['aim']}{written}"
        )
    return "\n".join([*lines, ""])


def compare(runs: dict[str, Run], options: argparse.Namespace, about: dict[str, Any]) -> int:
    """Writes the results. Returns 1 if the runs differ or a kill is missing, else 0."""
    for name, run in runs.items():
        if not run.finished:
            raise InputError(f"--only=compare: the {name} run is not finished; run it first")
    undisturbed, disturbed = runs.values()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    results = {
        "command": f"benchmarks/rehearsal.py --epochs {options.epochs} --kills {options.kills} "
        f"--images {options.images} --val-images {options.val_images} --classes {options.classes} "
        f"--batch {options.batch}",
        "commit": commit,
        "environment": runner.environment(["rsb_ffcv", "torch", "timm"]),
        **about,
        "differences": differences(disturbed, undisturbed),
        **{name: measured(run, options.epochs) for name, run in runs.items()},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "results.json", results)
    (options.out / "README.md").write_text(readme(results))
    print(readme(results))
    return int(bool(results["differences"]) or len(disturbed.kills) < options.kills)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of images and runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--epochs", type=int, default=300, help="100 if an epoch takes over 20 s")
    parser.add_argument("--kills", type=int, default=10, help="of the disturbed run")
    parser.add_argument("--images", type=int, default=1_281_167, help="training images")
    parser.add_argument("--val-images", type=int, default=50_000, help="validation images")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=256, help="an eighth of the global batch")
    parser.add_argument("--only", choices=("prepare", *RUNS, "compare"), help="only this part")
    options = parser.parse_args()
    work = options.work.resolve()
    about = {
        "images": {"train": options.images, "val": options.val_images},
        "classes": options.classes,
    }
    if options.only in (None, "prepare"):
        prepare(work, about["images"], options.classes)
    runs = {
        name: Run(
            work,
            name,
            arguments=flags(work, work / name, options.epochs, options.batch),
            plan=moments(options.epochs, options.kills) if name == "disturbed" else [],
        )
        for name in RUNS
    }
    for name, run in runs.items():
        if options.only in (None, name):
            began = time.monotonic()
            run.complete()
            print(f"{name}: finished after {duration(time.monotonic() - began)}", flush=True)
    return compare(runs, options, about) if options.only in (None, "compare") else 0


if __name__ == "__main__":
    sys.exit(
        train(int(sys.argv[2]), sys.argv[3:]) if sys.argv[1:2] == ["train"] else exit_status(main)
    )
