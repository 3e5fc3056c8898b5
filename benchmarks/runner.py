"""Shared code of the benchmarks: contestants in separate processes, run interleaved, and a
description of the machine.

A contestant is a class in a Python file. Its process imports only what it measures, warms up, and
then replies to each "go" with (images, seconds) of one repeat. If it has a dict `facts`, that is
added to its result. The contestants of a row repeat in turn, so that a slow minute of the machine
affects all of them. The results that matter are ratios within one row.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from datetime import date

# some loaders prefetch after the end of their repeat, which must not slow the next contestant down
SETTLE_SECONDS = 1.0


def environment(packages) -> dict:
    """Returns hardware, date and versions. The version of a package that is not installed is
    None."""
    # here, because the processes of the contestants import only what they measure
    from rsb_ffcv.training.environment import memory_gib, processor, versions

    name, vectors = processor()
    return {
        "date": date.today().isoformat(),
        "processor": name,
        "vectors": vectors,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": memory_gib(),
        "python": platform.python_version(),
        "versions": versions(packages),
    }


class Contestant:
    """A process that measures. factory: "file.py:Class". arguments: the keyword arguments of the
    class."""

    def __init__(self, name: str, factory: str, arguments: dict):
        self.name = name
        self.rates: list[float] = []
        self.facts: dict = {}
        self.absent: str | None = None
        self._process = subprocess.Popen(
            [sys.executable, __file__, factory, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def repeat(self):
        """Runs one repeat and appends its rate, in images per second, to `rates`."""
        if self.absent is None:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
            reply = self._answer()
            if reply:
                self.rates.append(reply["images"] / reply["seconds"])
                self.facts = reply["facts"]

    def _answer(self):
        line = self._process.stdout.readline()
        reply = (
            json.loads(line)
            if line
            else {"absent": f"its process ended with status {self._process.wait()}"}
        )
        self.absent = reply.get("absent")
        return None if self.absent else reply

    def close(self):
        self._process.stdin.close()
        self._process.wait()

    def result(self) -> dict:
        if self.absent is not None:
            return {"absent": self.absent}
        return {
            "images_per_s": statistics.median(self.rates),
            "low": min(self.rates),
            "high": max(self.rates),
            "repeats": [round(rate, 1) for rate in self.rates],
            **self.facts,
        }


def race(contestants: dict, repeats: int) -> dict:
    """Returns {name: result} of the contestants {name: (factory, arguments)}, run interleaved after
    one warm-up repeat of each."""
    made = [Contestant(name, *what) for name, what in contestants.items()]
    for number in range(repeats + 1):
        for contestant in made:
            os.sync()  # flushes what the previous contestant wrote, outside the timing
            time.sleep(SETTLE_SECONDS)
            contestant.repeat()
            if number == 0:
                contestant.rates.clear()
    for contestant in made:
        contestant.close()
    return {contestant.name: contestant.result() for contestant in made}


def _serve(factory: str, arguments: str):
    """The process of one contestant. What it prints goes to stderr; stdout is for the replies."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**what):
        print(json.dumps(what), file=replies, flush=True)

    path, name = factory.rsplit(":", 1)
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(path))))
    try:
        contestant = getattr(__import__(os.path.splitext(os.path.basename(path))[0]), name)(
            **json.loads(arguments)
        )
        reply(ready=True)
        for _ in sys.stdin:
            started = time.perf_counter()
            images = contestant.repeat()
            seconds = time.perf_counter() - started
            reply(images=images, seconds=seconds, facts=getattr(contestant, "facts", None) or {})
    except ImportError as error:
        reply(absent=f"not installed ({error})")
    except Exception as error:  # goes into the table: a failure of one must not hide the others
        traceback.print_exc()
        reply(absent=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    _serve(*sys.argv[1:])
