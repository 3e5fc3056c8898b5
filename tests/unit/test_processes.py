"""Communication between the processes of a job, with two real processes."""

import json
import os
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

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


def in_processes(code: str, count: int = 2) -> list:
    """Runs `code` as `count` processes of a job. Returns what each prints as JSON."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(a_free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN + code + LEAVE],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **address, "RANK": str(rank), "WORLD_SIZE": str(count)},
        )
        for rank in range(count)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    return [json.loads(output) for output in outputs]


def test_granted_vote_is_not_granted_twice():
    """A timed save is due on both processes until it is done. The second process notices it one
    step after the first."""
    granted = in_processes("""
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


def test_each_request_of_a_vote_is_counted_for_itself():
    """Of three: process 0 has the first, then process 1 the last, then both have one each."""
    granted = in_processes("""
from rsb_ffcv.training.processes import Votes
votes = Votes()
requests = [(rank == 0, False, False), (False, False, rank == 1), (rank == 1, rank == 0, False)]
found = [votes.cast(*requested) for requested in [*requests, (False,) * 3]]
votes.count()
print(json.dumps(found))
""")
    none, both = [False] * 3, [True, True, False]
    assert granted == [[none, [True, False, False], [False, False, True], both]] * 2


def test_gradients_of_three_processes_are_the_mean_in_the_order_of_the_ranks():
    """Bit for bit, also in several buckets. A job on the CPU uses this from three processes on."""
    printed = in_processes(
        """
import torch
from rsb_ffcv.training.compute import mean_in_order_of_ranks
def gradients(rank):
    torch.manual_seed(rank)
    return [torch.randn(shape) for shape in ((300,), (7, 50), (1,))]
class Products(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList(map(torch.zeros_like, gradients(0)))
    def forward(self, factors):
        return sum((weight * factor).sum() for weight, factor in zip(self.weights, factors))
module = Products()
wrapped = torch.nn.parallel.DistributedDataParallel(
    module, bucket_cap_mb=0.001, gradient_as_bucket_view=True
)
wrapped.register_comm_hook(None, mean_in_order_of_ranks)
same = []
for _ in range(3):
    module.zero_grad()
    wrapped(gradients(rank)).backward()
    for weight, a, b, c in zip(module.weights, *map(gradients, range(3))):
        same.append(torch.equal(weight.grad, ((a + b) + c) / 3))
print(json.dumps(same))
""",
        3,
    )
    assert printed == [[True] * 9] * 3


def test_differing_machines_are_named_with_what_differs(monkeypatch):
    from rsb_ffcv import InputError
    from rsb_ffcv.training import processes

    kinds = ["H100"] * 2 + ["A100"] * 2
    facts = [{"GPU": kind, "NCCL": "2.29"} for kind in kinds]
    monkeypatch.setattr(processes, "gather", lambda _: facts)
    with pytest.raises(InputError) as found:
        processes.check_same(facts[0], ["node1", "node1", "node2", "node2"])
    assert str(found.value) == (
        "process 2 (node2) differs from process 0 (node1): GPU: A100, but H100 on process 0; 2 "
        "processes differ from it, on node2; start all processes with the same recipe, files and "
        "versions, on GPUs of one kind"
    )
    facts[2:] = facts[:2]
    processes.check_same(facts[0], ["node1", "node1", "node2", "node2"])


def test_processes_compare_their_gpus_and_what_drives_them(betons, tmp_path, monkeypatch):
    import torch

    from rsb_ffcv.config.train import read_config
    from rsb_ffcv.training import build, facts
    from rsb_ffcv.training.compute import Compute
    from tests.integration.runs import options

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(facts, "driver", lambda: "580.1")
    monkeypatch.setattr(facts, "nccl_version", lambda: "2.29")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    c = read_config(None, options(betons, tmp_path / "run"))
    one = Compute(device=torch.device("cpu"), precision="fp32", compile=False, channels_last=True)
    with (
        closing(build.train_loader(c, one, 1, decode="cpu")) as train,
        closing(build.val_loader(c, one, 1, decode="cpu")) as val,
    ):

        def shared(device):
            where = replace(one, device=torch.device(device))
            return facts.shared(c, where, train_loader=train, val_loader=val, label_sets=None)

        of_gpu, of_cpu = shared("cuda:3"), shared("cpu")
    assert set(of_gpu) - set(of_cpu) == {"GPU", "driver", "CUDA", "cuDNN", "NCCL"}
    assert [of_gpu[name] for name in ("GPU", "driver", "CUDA", "NCCL")] == [
        "GPU 3",
        "580.1",
        "13.0",
        "2.29",
    ]
    assert {"rsb_ffcv", "Python", "torch", "timm", "numpy"} <= set(of_cpu)


def test_a_store_that_does_not_answer_delays_an_error_and_does_not_block_it(monkeypatch):
    import threading

    from rsb_ffcv.training import join

    class Frozen:
        def add(self, key, amount):
            threading.Event().wait()

    frozen: Any = Frozen()
    monkeypatch.setattr(join, "STORE_SECONDS", 0.2)
    monkeypatch.setattr(join, "_joined", [join._Joined(frozen, 1, 3)])
    assert join.is_first_to_report("an error")
    monkeypatch.setattr(join, "_joined", [join._Joined(frozen, 2, 3)])
    assert not join.is_first_to_report("an error")
    began = time.monotonic()
    join.wait_for_others(0.1)
    assert time.monotonic() - began < 60


def test_error_before_the_process_group_exists_is_reported_once(monkeypatch):
    """The processes have met in the store, but could not create the group."""
    from torch import distributed as dist

    from rsb_ffcv.training import join

    store, failures = dist.HashStore(), list[Any]()
    monkeypatch.setattr("threading.excepthook", failures.append)
    said = []
    for rank in range(2):
        monkeypatch.setattr(join, "_joined", [join._Joined(store, rank, 2)])
        said.append(join.is_first_to_report("an error"))
        join.wait_for_others(0.1)
    assert said == [True, False] and not failures and store.add("ending", 0) == 2


def test_processes_end_within_the_timeout():
    from rsb_ffcv.training.join import BEAT_SECONDS, REPORT_SECONDS, answer_seconds

    for timeout_s in (5, 6, 120, 86400):
        assert BEAT_SECONDS + answer_seconds(timeout_s) + REPORT_SECONDS < timeout_s
    assert answer_seconds(1) == 0.45


def test_processes_agree_on_who_is_lost(monkeypatch):
    """Processes 1 and 2 of 4 have an error. Process 3 has one as well, but is late."""
    from torch import distributed as dist

    from rsb_ffcv.training import join

    store, now = dist.HashStore(), time.monotonic()

    def agree(rank, until):
        monkeypatch.setattr(join, "_joined", [join._Joined(store, rank, 4)])
        return join.agree_on_lost(f"error {rank}", until)

    store.set("errors", "2 error 2\n")
    errors = {1: "error 1", 2: "error 2"}
    assert agree(1, now) == ([0, 3], errors, True)
    # The others do not wait for their own time
    assert agree(2, now + 1000) == ([0, 3], errors, False)
    assert agree(3, now + 1000) == ([0, 3], errors, False)


def test_processes_that_all_have_an_error_do_not_wait(monkeypatch):
    from torch import distributed as dist

    from rsb_ffcv.training import join

    store = dist.HashStore()
    store.set("errors", "0 error 0\n")
    monkeypatch.setattr(join, "_joined", [join._Joined(store, 1, 2)])
    found = join.agree_on_lost("error 1", time.monotonic() + 1000)
    assert found == ([], {0: "error 0", 1: "error 1"}, False)
