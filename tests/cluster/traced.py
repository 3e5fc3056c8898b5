"""train_imagenet.py, with a record of each step, and held before the end of a step.

The environment variable RSB_TEST_TRACE is a folder. Process 0 adds a line to <folder>/trace.jsonl
after each step: the life of the process (where its job meets and how many it has), the step, and
the loss over all processes. A process whose step is not below the number in <folder>/until writes
"<life> <step>" to <folder>/held_<host> and waits until that number is larger, or until it receives
a signal.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

VARIABLE = "RSB_TEST_TRACE"


# ---- in the test


class Trace:
    """The record of a job, and where it is held."""

    def __init__(self, folder: Path):
        self.folder, self.env = folder, {VARIABLE: str(folder)}
        self.hold_at(0)

    def hold_at(self, step: int):
        """Lets the processes run until they are in step `step`, counted from 0."""
        _write(self.folder / "until", str(step))

    def held(self, names: Sequence[str], step: int = 0) -> int | None:
        """The step in which a job of exactly the nodes `names`, with a process each, is held, at
        `step` or later; None while it is not."""
        marks = [self.folder / f"held_{name}" for name in names]
        found = {mark.read_text() for mark in marks if mark.exists()}
        if len(found) != 1 or not all(mark.exists() for mark in marks):
            return None
        life, _, at = found.pop().partition(" ")
        return int(at) if life.endswith(f"/{len(names)}") and int(at) >= step else None

    def forget(self):
        """Removes the marks of processes that were held and have ended."""
        for mark in self.folder.glob("held_*"):
            mark.unlink()

    def steps(self) -> list[dict]:
        """The steps of the final timeline: without those that a restart repeated."""
        timeline: list[dict] = []
        ended = set()  # a process that was stopped, and goes on, may add a line
        path = self.folder / "trace.jsonl"
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row["life"] in ended:
                continue
            if timeline and timeline[-1]["life"] != row["life"]:
                ended.add(timeline[-1]["life"])
                timeline = [done for done in timeline if done["step"] < row["step"]]
            timeline.append(row)
        return timeline


def _write(path: Path, text: str):
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").rename(path)


# ---- in the run


def install(folder: Path):
    import torch.distributed as dist

    from rsb_ffcv.training.interrupt import Interrupt
    from rsb_ffcv.training.progress import Progress

    life = "{MASTER_ADDR}:{MASTER_PORT}/{WORLD_SIZE}".format(**os.environ)
    mark = folder / f"held_{socket.gethostname()}"
    interrupts, begin, add = [], Interrupt.__init__, Progress.add

    def recorded_begin(self, forwarded):
        begin(self, forwarded)
        interrupts.append(self)

    def traced_add(self, taken, lr):
        add(self, taken, lr)
        sums = taken.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        if os.environ["RANK"] == "0":
            row = {"life": life, "step": self.step, "loss": float(sums[0] / sums[2])}
            with open(folder / "trace.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        while self.step >= int((folder / "until").read_text()) and not interrupts[0].received:
            if not mark.exists() or mark.read_text() != f"{life} {self.step}":
                _write(mark, f"{life} {self.step}")
            time.sleep(0.01)

    Interrupt.__init__ = recorded_begin  # type: ignore[method-assign]  # patched for the tests
    Progress.add = traced_add  # type: ignore[method-assign]  # patched too


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2])]
    from rsb_ffcv import exit_status
    from train_imagenet import main

    install(Path(os.environ[VARIABLE]))
    sys.exit(exit_status(main))
