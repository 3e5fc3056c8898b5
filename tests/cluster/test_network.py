"""The traps of jobs on several nodes: names, interfaces and processes that do not come."""

import re
import sys
from types import SimpleNamespace

import pytest

from tests.stops import wait_until

# A process of a job, which meets the others and sums 1 over all of them
JOIN = """
import os, sys
import torch, torch.distributed as dist
sys.path.insert(0, os.getcwd())
from rsb_ffcv import InputError
from rsb_ffcv.training import compute, join
join.RENDEZVOUS_SECONDS = int(os.environ.get("SECONDS", 600))
join.HELD_SECONDS = 3600.0
try:
    where = compute.set_up("cpu", "fp32", compile="0", channels_last=False, threads=1)
except InputError as error:
    first = join.is_first_to_report(str(error))
    if first:
        print(f"error: {error}", flush=True)
    join.wait_for_others()
    sys.exit(2)
found = compute.sum_over_processes(torch.ones(1))
print(int(found), os.environ.get("GLOO_SOCKET_IFNAME", "default"), flush=True)
dist.barrier()
compute.destroy_process_group()
"""

RUNS = SimpleNamespace(poll=lambda: None, kill=lambda: None)  # for wait_until
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # as the programs set it


def start(node, rank: int, world: int, **variables: str):
    job = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "node1"}
    env = {**job, "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1", **QUIET, **variables}
    return node.start(sys.executable, "-c", JOIN, env=env)


def test_nodes_whose_own_name_is_a_loopback_address_reach_each_other(make_nodes):
    """As Debian's installer sets /etc/hosts up. Each node takes the interface that reaches another
    one."""
    nodes = make_nodes(3, trap=True)
    started = [start(node, rank, 3) for rank, node in enumerate(nodes)]
    assert [process.wait() for process in started] == [0, 0, 0], started[0].text()
    assert [process.text() for process in started] == ["3 eth0\n"] * 3


@pytest.mark.long
def test_interface_that_does_not_exist_is_one_line_on_one_process(make_nodes):
    nodes = make_nodes(2)
    started = [
        start(nodes[0], 0, 2, GLOO_SOCKET_IFNAME="eth0"),
        start(nodes[1], 1, 2, GLOO_SOCKET_IFNAME="eth7"),
    ]
    assert 0 not in [process.wait() for process in started]
    (line,) = "".join(process.text() for process in started).splitlines()
    assert line == (
        "error: GLOO_SOCKET_IFNAME=eth7: node2 has no such interface (eth7), it has eth0 "
        "(10.77.0.2); set GLOO_SOCKET_IFNAME to one of them, or unset it"
    )


@pytest.mark.long
def test_absent_first_process_is_one_line_a_node(make_nodes):
    nodes = make_nodes(2)
    late = {"SECONDS": "5"}
    started = [start(node, rank, 5, **late) for rank, node in zip((1, 2, 3, 4), nodes * 2)]
    for name, *pair in zip(("node1", "node2"), started[:2], started[2:]):
        # the first one to report waits for the other
        wait_until(lambda pair=pair: any(item.process.poll() == 2 for item in pair), RUNS)
        text = "".join(process.text() for process in pair)
        assert re.fullmatch(
            rf"error: process 0 does not answer at node1:29500 \({name} waits for it\): no "
            rf"connection within 5 s \(.*Connection refused\); see .*\n",
            text,
        ), text
