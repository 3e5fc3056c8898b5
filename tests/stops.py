"""Holds a run of train_imagenet.py at a known point until the test lets it continue, so that the
effect of a signal or a kill does not depend on the speed of the machine.

The environment variable RSB_TEST_STOP is {"at": [title, count], "folder": path}. The point is one
of these:

- The progress bar `title` has advanced `count` times, counted from the beginning of what it shows.
  ("epoch 2", 1) is after the first step of the epoch and before anything is saved after it.
- With an empty title: all bars together have advanced `count` times since the start of the process.
- With a count of 0: the run prints a line whose first word is `title`.

At this point the process writes its process ID to <folder>/reached_<rank> and waits for
<folder>/go. Its other threads continue, and signals are handled.

This module is also a program, for torchrun: with the arguments of train_imagenet.py, it runs
train_imagenet.py with such a stop.
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
    """Returns when `condition()` is true. Fails the test if `process` (a Popen or a Run) ends
    before, or after `seconds`, which is far longer than necessary even on a busy machine."""
    until = time.monotonic() + seconds
    while not condition():
        if (status := process.poll()) is not None and not condition():
            raise AssertionError(
                f"the process ended ({status}) before the condition of the test was met"
            )
        if time.monotonic() > until:
            process.kill()
            raise AssertionError(f"the condition of the test was not met within {seconds:g} s")
        time.sleep(0.005)


class Stop:
    """A point at which a run is held. at: (title, count), see above."""

    def __init__(self, at: tuple[str, int], folder: Path, world: int):
        self.folder, self.marks = folder, [folder / f"reached_{rank}" for rank in range(world)]
        self.env = {VARIABLE: json.dumps({"at": at, "folder": str(folder)})}

    def reached(self) -> bool:
        """Whether all processes of the run are at this point."""
        return all(mark.exists() for mark in self.marks)

    def processes(self) -> list[int]:
        """The process IDs, by rank."""
        return [int(mark.read_text()) for mark in self.marks]

    def go_on(self):
        (self.folder / "go").touch()


# ---- in the run


def install():
    """Makes this process stop at the point in RSB_TEST_STOP, if that is set."""
    if VARIABLE not in os.environ:
        return
    from rsb_ffcv.reporting.console import Console

    wanted = json.loads(os.environ[VARIABLE])
    at, folder, parent = tuple(wanted["at"]), Path(wanted["folder"]), os.getppid()
    info, make_bar, moves = Console.info, Console.bar, 0

    def reached(*point):
        if point != at or (folder / "go").exists():
            return
        mark = folder / f"reached_{os.environ.get('RANK', '0')}"
        mark.with_suffix(".part").write_text(str(os.getpid()))
        mark.with_suffix(".part").rename(mark)
        while not (folder / "go").exists():
            if os.getppid() != parent:  # the tests have ended, so <folder>/go will never exist
                os._exit(1)
            time.sleep(0.002)

    def stopping_info(self, text):
        reached(text.partition(" ")[0], 0)
        info(self, text)

    def stopping_bar(self, title, total, done=0):
        print(f"started: {title}", file=sys.stderr, flush=True)  # for tests that look for it
        bar, count = make_bar(self, title, total, done), done
        move = bar.update

        def update(by=1):
            nonlocal count, moves
            count, moves = count + by, moves + by
            move(by)
            reached(title, count)
            reached("", moves)

        bar.update = update  # type: ignore[method-assign]  # patched for the tests
        return bar

    Console.info = stopping_info  # type: ignore[method-assign]  # patched too
    Console.bar = stopping_bar  # type: ignore[method-assign]  # patched too


def lengthen_timeouts():
    """Lengthens the times that a process waits for other processes and for a repeated signal. The
    defaults can expire on a busy machine, and which message is printed would then depend on
    timing."""
    from rsb_ffcv.training import interrupt, join

    join.wait_for_others = functools.partial(join.wait_for_others, 60.0)
    interrupt.ECHO_SECONDS = 600.0


def print_status():
    """Makes os._exit print its status. torchrun does not always print it."""
    leave = os._exit

    def print_and_leave(status):
        os.write(2, f"exit status {status}\n".encode())
        leave(status)

    os._exit = print_and_leave


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]
    from rsb_ffcv import exit_status
    from train_imagenet import main

    install()
    print_status()
    sys.exit(exit_status(main))
