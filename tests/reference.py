"""Prints hashes of small runs that together have every kind of state. `python -m tests.reference`
must print the same lines before and after a refactoring.

A line has the name of a run and the SHA-256 (first 16 digits) of its newest checkpoint, its log and
its final weights, without timings, options and the wording of events. The hash covers every loss,
weight, average, count and decision of the run. Hashes are comparable between two commits on the
same machine with the same versions, not between machines.
"""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from rsb_ffcv.dataset import Place, write_splits
from tests.conftest import make_pictures
from tests.integration.runs import options, rows, state
from tests.integration.test_go_back import MORE as GOING_BACK
from tests.integration.test_go_back import OVERFLOW
from tests.integration.test_kill import EVERYTHING

ROOT = Path(__file__).parents[1]
# Figures that the log did not have at first. They only count what a run does: draws and steps.
NEWER = ("lr_first", "images", "groups", "mixed", "own_weight", "erased")


def parts(value: object) -> Iterable[bytes]:
    """Yields the bytes of a state in a fixed order; tensors with their type and shape."""
    if isinstance(value, dict):
        for key in value:
            yield repr(key).encode()
            yield from parts(value[key])
    elif isinstance(value, (list, tuple)):
        yield b"["
        for item in value:
            yield from parts(item)
        yield b"]"
    elif isinstance(value, torch.Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.contiguous().numpy().tobytes()
    else:
        yield repr(value).encode()


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    weights = [
        torch.load(path, weights_only=True) for path in sorted(folder.glob("final_weights*.pt"))
    ]
    log, saved = rows(folder), state(folder)
    for name in ("recipe", "lineage"):  # not results; a new option adds to them
        saved.pop(name, None)
    for row in log + saved["rows"]:  # the number of events, not their wording
        row["events"] = len(row.get("events", []))
        for name in NEWER:
            row.pop(name, None)
    for counted in (saved["epoch"], *saved["epoch"]["processes"]):
        for name in ("lrs", "counts"):
            counted.pop(name, None)
    for part in parts([saved, log, weights]):
        found.update(part)
    return found.hexdigest()[:16]


def main() -> None:
    with TemporaryDirectory() as place:
        root = Path(place)
        make_pictures(root / "pictures")
        with redirect_stdout(sys.stderr):
            write_splits(
                Place(dataset="imagenet", data_dir=str(root / "pictures")), str(root), num_workers=2
            )

        def run(
            name: str,
            changes: dict[str, object],
            world: int = 1,
            resumed: tuple[str, int] | None = None,
            prepare: str = "",
        ) -> None:
            """Runs the program and prints its hash.

            changes: options that differ from the defaults of the tests.
            world: number of processes.
            resumed: (name of an earlier run, step of its checkpoint to resume from).
            prepare: Python code that runs first.
            """
            folder = root / name
            if resumed:
                folder.mkdir()
                earlier, step = resumed
                (found,) = (root / earlier).glob(f"checkpoint_*{step}.pt")
                shutil.copy(found, folder)
            with socket.create_server(("localhost", 0)) as free:
                port = free.getsockname()[1]
            several = {"training.distributed": 1, "dist.world_size": world, "dist.port": port}
            flags = {"checkpoint.keep": 1000, **(several if world > 1 else {}), **changes}
            code = f"{prepare}\nimport sys, rsb_ffcv, train_imagenet\n" + (
                "sys.exit(rsb_ffcv.exit_status(train_imagenet.main))"
            )
            done = subprocess.run(
                [sys.executable, "-c", code, *options(root, folder, **flags)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            if done.returncode or "going back to step" not in done.stderr and prepare:
                raise SystemExit(f"{name}: exit status {done.returncode}\n{done.stderr}")
            print(f"{name:40s} {digest(folder)}", flush=True)

        everything = {**EVERYTHING, "training.batch_size": 8}
        run("one process", everything)
        run("two processes", everything, 2)
        run("one, continued by two in an epoch", everything, 2, ("one process", 5))
        run("two, continued by one in an epoch", everything, 1, ("two processes", 8))
        run("a process a group", {**everything, "training.batch_size": 16}, 2)
        run("three processes, four groups", everything, 3)
        run("gone back", GOING_BACK, prepare=OVERFLOW)
        other = {
            "model.arch": "test_resnet",
            "ema.decay": 0,
            "augment.repeats": 1,
            "data.order": "random",
            "training.optimizer": "adamw",
            "lr.lr": 0.001,
            "compute.precision": "bf16",
            "resolution.max_res": 64,
            "resolution.end_ramp": 2,
        }
        run("AdamW, bf16, resolutions, no averages", other)


if __name__ == "__main__":
    main()
