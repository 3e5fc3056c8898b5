"""Communication between the processes of a job, with two real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import a_free_port

ROOT = Path(__file__).parents[2]
JOIN = """
import json, os, sys
from datetime import timedelta
import torch.distributed as dist
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
rank = dist.get_rank()
"""
LEAVE = """
dist.barrier()
dist.destroy_process_group()
"""


def in_two_processes(code: str) -> list:
    """Runs `code` as two processes of a job. Returns what each prints as JSON."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(a_free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN + code + LEAVE],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **address, "RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(output) for output in outputs]


def test_granted_vote_is_not_granted_twice():
    """A timed save is due on both processes until it is done. The second process notices it one
    step after the first."""
    granted = in_two_processes("""
from rsb_ffcv.training.processes import Votes
votes, due, saves = Votes(), False, []
for step in range(12):
    due |= step in (2 + rank, 7)
    (save,) = votes.cast(due)
    if save:
        saves.append(step)
        due = False
votes.count()
print(json.dumps(saves))
""")
    assert granted == [[3, 8], [3, 8]]


def test_a_store_that_does_not_answer_delays_an_error_and_does_not_block_it(monkeypatch):
    import threading
    import time

    from rsb_ffcv.training import compute

    class Frozen:
        def add(self, key, amount):
            threading.Event().wait()

    frozen: Any = Frozen()
    monkeypatch.setattr(compute, "STORE_SECONDS", 0.2)
    monkeypatch.setattr(compute, "_joined", [compute._Joined(frozen, 1, 3)])
    assert compute.is_first_to_report("an error")
    monkeypatch.setattr(compute, "_joined", [compute._Joined(frozen, 2, 3)])
    assert not compute.is_first_to_report("an error")
    began = time.monotonic()
    compute.wait_for_others(0.1)
    assert time.monotonic() - began < 60


def test_error_before_the_process_group_exists_is_reported_once(monkeypatch):
    """The processes have met in the store, but could not create the group."""
    from torch import distributed as dist

    from rsb_ffcv.training import compute

    store, failures = dist.HashStore(), list[Any]()
    monkeypatch.setattr("threading.excepthook", failures.append)
    said = []
    for rank in range(2):
        monkeypatch.setattr(compute, "_joined", [compute._Joined(store, rank, 2)])
        said.append(compute.is_first_to_report("an error"))
        compute.wait_for_others(0.1)
    assert said == [True, False] and not failures and store.add("ending", 0) == 2
