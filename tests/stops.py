"""Holds a run of train_imagenet.py at a known point until the test lets it go on: what a test does
there (a signal, a kill) does not depend on how fast the machine is.

The environment variable RSB_TEST_STOP is {"at": [title, count], "folder": path}. The point is where
the progress bar `title` has made `count` moves, counted from the beginning of what it shows ("epoch
2", 1: after the first step, before what is saved then); with an empty title, any bar, counted from
the start of the process; or where the run prints a line that begins with the word `title` (count
0). There the process writes its number to <folder>/reached_<rank> and waits for <folder>/go. Its
other threads go on, and signals are handled.

As a program, with the arguments of train_imagenet.py: that program with such a stop, for torchrun.
"""

import functools
import json
import os
import sys
import time
from pathlib import Path

VARIABLE = "RSB_TEST_STOP"


# ---- in the test


def wait_until(condition, process, seconds: float = 300):
    """Returns when `condition()` holds. Fails the test where `process` (a Popen or a Run) ends
    before, or after `seconds`: far more than it takes on a machine that is busy with something
    else."""
    until = time.monotonic() + seconds
    while not condition():
        if (status := process.poll()) is not None and not condition():
            raise AssertionError(f"the process ended ({status}) before what the test waits for")
        if time.monotonic() > until:
            process.kill()
            raise AssertionError(f"what the test waits for has not come within {seconds:g} s")
        time.sleep(0.005)


class Stop:
    """A point where a run is held. at: the bar's title and its moves."""

    def __init__(self, at: tuple[str, int], folder: Path, world: int):
        self.folder, self.marks = folder, [folder / f"reached_{rank}" for rank in range(world)]
        self.env = {VARIABLE: json.dumps({"at": at, "folder": str(folder)})}

    def reached(self) -> bool:
        """Whether all processes of the run are there."""
        return all(mark.exists() for mark in self.marks)

    def processes(self) -> list[int]:
        """Their numbers, by rank."""
        return [int(mark.read_text()) for mark in self.marks]

    def go_on(self):
        (self.folder / "go").touch()


# ---- in the run


def install():
    """Makes this process stop where RSB_TEST_STOP says, if it says anything."""
    if VARIABLE not in os.environ:
        return
    from rsb_ffcv.reporting.console import Console

    wanted = json.loads(os.environ[VARIABLE])
    at, folder, parent = tuple(wanted["at"]), Path(wanted["folder"]), os.getppid()
    say, make_bar, moves = Console.say, Console.bar, 0

    def reached(*point):
        if point != at or (folder / "go").exists():
            return
        mark = folder / f"reached_{os.environ.get('RANK', '0')}"
        mark.with_suffix(".part").write_text(str(os.getpid()))
        mark.with_suffix(".part").rename(mark)
        while not (folder / "go").exists():
            if os.getppid() != parent:  # the tests have ended, and nobody will let it go on
                os._exit(1)
            time.sleep(0.002)

    def stopping_say(self, text):
        reached(text.partition(" ")[0], 0)
        say(self, text)

    def stopping_bar(self, title, total, done=0):
        bar, count = make_bar(self, title, total, done), done
        move = bar.update

        def update(by=1):
            nonlocal count, moves
            count, moves = count + by, moves + by
            move(by)
            reached(title, count)
            reached("", moves)

        bar.update = update  # type: ignore[method-assign]  # the tests' stops
        return bar

    Console.say, Console.bar = stopping_say, stopping_bar  # type: ignore[method-assign]  # see above


def be_patient():
    """What a process waits for others, before it takes them for gone or for silent, is made for
    people. Where the machine is busy with something else it would run out, and which message comes
    would depend on that."""
    from rsb_ffcv.training import compute, interrupt

    compute.wait_for_others = functools.partial(compute.wait_for_others, 60.0)
    interrupt.ECHO_SECONDS = 600.0


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]
    from rsb_ffcv import exit_status
    from train_imagenet import main

    install()
    sys.exit(exit_status(main))
