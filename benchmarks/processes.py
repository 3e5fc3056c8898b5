"""Measures what the processes of a job exchange besides gradients: the vote of each step, the
heartbeat, and what they gather at the start and at the end of an epoch.

    unshare --net sh -c 'ip link set lo up; exec python benchmarks/processes.py --out <folder>'

Starts the processes of a job on this machine, on the CPU with gloo. The votes follow each other
without steps in between, so that each process waits for each vote; in training, a vote is counted
during the next step. An all-reduce of 1,000 numbers, far less than the gradients of a step, is the
comparison. With more processes than cores, wall time is mostly the time for which the processes
wait for a core: CPU time, of all threads of a process, and TCP segments of all processes are what
counts. The segments are those of the machine, so run it in a network namespace of its own.
Out: processes.json, table.md.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import runner

from rsb_ffcv.training import compute
from rsb_ffcv.training.processes import Heartbeat, Votes, check_same
from rsb_ffcv.training.progress import Progress

TITLES = {
    "start": "start: connect, and create the group",
    "check_same": "start: compare the facts",
    "heartbeat": "heartbeat, per second",
    "vote": "vote, per step",
    "gradients": "all-reduce of 1,000 numbers, for comparison",
    "row": "row of an epoch",
}


def segments() -> int:
    """The TCP segments that this machine has sent."""
    names, values = [
        line.split()[1:]
        for line in Path("/proc/net/snmp").read_text().splitlines()
        if line.startswith("Tcp:")
    ]
    return int(values[names.index("OutSegs")])


class Meter:
    """Measures actions of a process: wall and CPU seconds, and the segments of all processes.

    before: called before each action, and after it, so that segments of other actions do not count.
    """

    def __init__(self, before):
        self.found: dict[str, list[list[float]]] = {}
        self._before = before

    def measure(self, name: str, action, count: int = 1):
        """Measures `action()`, which does `count` of what is to be measured."""
        self._before()
        sent, cpu, started = segments(), time.process_time(), time.perf_counter()
        action()
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        self._before()
        self.found.setdefault(name, []).append(
            [value / count for value in (wall, cpu, segments() - sent)]
        )


def run_process(rank: int, barrier, results, options):
    """One process of the job."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    meter, joined = Meter(barrier.wait), []
    meter.measure(
        "start",
        lambda: joined.append(
            compute.set_up("cpu", "fp32", compile="0", channels_last=False, threads=1)
        ),
    )
    where = joined[0]
    facts = {f"section.option_{number}": f"value {number}" for number in range(120)}
    gradients = torch.ones(1000)

    def cast():
        for _ in range(options.steps):
            votes.cast(False, False)
        votes.count()

    def reduce():
        for _ in range(options.steps):
            dist.all_reduce(gradients)

    def row():
        progress.row(epoch, loss="bce", lr=0.1)

    def beats():
        with Heartbeat(120.0, where.hosts):
            barrier.wait()
            meter.measure("heartbeat", lambda: time.sleep(options.seconds), options.seconds)
            barrier.wait()

    progress, votes = Progress(where, 1.0), Votes()
    progress.seconds, progress.own_ms = 1.0, [10.0]
    progress.counts = Counter(groups=1, mixed=1, images=1, weight=1, erased=1, pixels=1)
    epoch: Any = SimpleNamespace(number=0, steps=options.steps, resolution=224)
    cast(), reduce(), row()  # the first collectives connect
    for _ in range(options.repeats):
        meter.measure("check_same", lambda: check_same(facts, where.hosts))
        meter.measure("row", row)
        meter.measure("vote", cast, options.steps)
        meter.measure("gradients", reduce, options.steps)
    beats()
    results.put((rank, meter.found))
    results.close()
    results.join_thread()
    barrier.wait()
    os._exit(0)  # without gloo's threads, which the closures above would keep


def measure(processes: int, options) -> dict:
    """The figures of a job: medians over the repeats, CPU time also over the processes."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    forked = multiprocessing.get_context("fork")  # torch is imported once
    barrier, results = forked.Barrier(processes), forked.Queue()
    started = [
        forked.Process(target=run_process, args=(rank, barrier, results, options))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    of_rank = dict(results.get(timeout=3600) for _ in started)
    for process in started:
        process.join()
    assert not any(process.exitcode for process in started)
    found: dict[str, Any] = {}
    for name in of_rank[0]:
        repeats = list(zip(*(of_rank[rank][name] for rank in range(processes))))
        found[name] = {
            # The slowest process of each repeat: the others wait for it
            "wall_s": statistics.median(max(one[0] for one in repeat) for repeat in repeats),
            "cpu_s": statistics.median(
                statistics.fmean(one[1] for one in repeat) for repeat in repeats
            ),
            "segments": statistics.median(
                statistics.median(one[2] for one in repeat) for repeat in repeats
            ),
        }
    return found


def table(results: dict[int, dict]) -> str:
    """Markdown: a row for each part and number of processes."""
    lines = [
        "| what | processes | CPU ms of a process | TCP segments of a process | wall time, ms |",
        "|---|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        for processes, found in results.items():
            one = found[name]
            lines.append(
                f"| {title} | {processes} | {1000 * one['cpu_s']:.3f} | "
                f"{one['segments'] / processes:.1f} | {1000 * one['wall_s']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 8, 32, 64])
    parser.add_argument("--steps", type=int, default=100, help="steps per repeat")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the heartbeat")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    results = {count: measure(count, options) for count in options.processes}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "processes.json").write_text(
        json.dumps(
            {
                "command": " ".join(sys.argv),
                "environment": runner.environment(["rsb_ffcv", "torch"]),
                "processes": results,
            },
            indent=1,
        )
        + "\n"
    )
    (options.out / "table.md").write_text(table(results))
    print(table(results), end="")


if __name__ == "__main__":
    main()
