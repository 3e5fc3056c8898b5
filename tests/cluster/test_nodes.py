"""Jobs of torchrun on several nodes, which are cut off, stopped and switched off."""

import os
import random
import sys

import psutil
import pytest
import torch

from tests.cluster.jobs import RENDEZVOUS, Job
from tests.cluster.nodes import Network
from tests.cluster.traced import Trace
from tests.integration.runs import assert_same_course, assert_same_run, options, state
from tests.sizes import CUTS
from tests.stops import Stop

LISTEN = """
import socket, sys
server = socket.create_server(("", 2000))
print("ready", flush=True)
peer, _ = server.accept()
while got := peer.recv(100):
    print(got.decode(), flush=True)
print("closed", flush=True)
"""
SEND = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], 2000))
peer.send(b"hello ")
print("sent", flush=True)
time.sleep(1000)
"""


def test_nodes_have_their_own_name_address_processes_and_folders(make_nodes, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    one, two = make_nodes(2, private=[private], trap=True)
    assert one.run("hostname") == (0, "node1\n") and two.run("hostname") == (0, "node2\n")
    names = "import socket; print(*map(socket.gethostbyname, ('node1', 'node2')))"
    assert one.run(sys.executable, "-c", names) == (0, "127.0.1.1 10.77.0.2\n")
    assert two.run("sh", "-c", f"echo 2 > {private}/file; ls {private}") == (0, "file\n")
    assert one.run("ls", private) == (0, "") and not list(private.iterdir())
    assert (two.private(private) / "file").read_text() == "2\n"
    sleep = one.start("sleep", "1000")
    sleep.wait_until(lambda: [process.name() for process in one.processes()] == ["sleep"])
    assert not two.processes()


def test_cuts_of_a_node(make_nodes):
    one, two = make_nodes(2)

    def connect():
        listen = one.start(sys.executable, "-c", LISTEN)
        listen.wait_for_text("ready")
        send = two.start(sys.executable, "-c", SEND, one.address)
        listen.wait_for_text("hello")
        send.wait_for_text("sent")
        return listen

    listen = connect()
    two.freeze()
    assert {process.status() for process in two.processes()} == {"stopped"}
    two.thaw()
    assert "stopped" not in {process.status() for process in two.processes()}
    # without a network, the end of the process does not arrive
    two.kill()
    assert listen.poll() is None and "closed" not in listen.text()
    listen.kill()
    two.boot()
    listen = connect()
    two.link_down()
    two.link_up()
    two.kill(closes=True)
    listen.wait_for_text("closed")
    assert listen.wait() == 0


def test_nothing_is_left_of_the_nodes(make_nodes, tmp_path):
    network = Network(tmp_path, 2)
    started = [node.start("sleep", "1000") for node in network.nodes]
    started[0].wait_until(lambda: all(node.processes() for node in network.nodes))
    inside = [process for node in network.nodes for process in node.processes()]
    network.stop()
    assert all(command.wait() for command in started)
    assert not any(process.is_running() for process in inside)
    assert not [name for name in psutil.net_if_addrs() if "port" in name or name == "bridge"]


# ---------------------------------------------------------------- without cuts

# 4 mix groups of 8 images in a step, 3 steps in an epoch
GROUPS = {"training.batch_size": 8, "data.num_workers": 1}


@pytest.mark.parametrize(
    "count, nproc",
    [
        (2, 1),
        *(pytest.param(*it, marks=pytest.mark.long) for it in ((2, 2), (3, 1), (4, 1))),
    ],
)
def test_several_nodes_equal_one(make_nodes, betons, tmp_path, train, count, nproc):
    """Also three nodes, which take 2, 1 and 1 of the 4 groups of a step."""
    job = Job(make_nodes(count), options(betons, tmp_path / "run", **GROUPS), nproc=nproc)
    assert job.wait() == [0] * count, job.text()
    assert f"{count * nproc} processes" in job.text()
    statuses, _, err = train(options(betons, tmp_path / "one", **GROUPS), count * nproc).wait()
    assert statuses == [0] * count * nproc, err
    assert_same_run(tmp_path / "run", tmp_path / "one")


# ---------------------------------------------------------------- cuts

SILENT = "did not respond for 5 s (dist.timeout_s): stopped, or the machine or its network failed"
RESUMES = "; start the job again, and it resumes from the last checkpoint, if there is one"
CUT = {
    "link": lambda node: node.link_down(),
    "stopped": lambda node: node.freeze(),
    "power": lambda node: node.kill(),
    "killed": lambda node: node.kill(closes=True),
}


@pytest.mark.parametrize(
    "cut, number",
    [
        ("link", 3),
        *(
            pytest.param(cut, number, marks=pytest.mark.long)
            for cut, number in (
                *(("stopped", 3), ("power", 3), ("killed", 3)),
                *(("link", 1), ("stopped", 1), ("power", 1), ("killed", 1)),
            )
        ),
    ],
)
def test_cut_ends_the_others_with_a_line_that_names_the_node(
    make_nodes, betons, tmp_path, cut, number
):
    """node1 has process 0 and both stores, torchrun's and that of the processes. Without a store,
    each node reports."""
    nodes = make_nodes(3)
    stop = Stop(("epoch 2", 1), tmp_path, 3)
    flags = options(betons, tmp_path / "run", **GROUPS, **{"dist.timeout_s": 5})
    job = Job(nodes, flags, stop=stop)
    job.wait_until(stop.reached)
    lost = nodes[number - 1]
    others = [node for node in nodes if node is not lost]
    CUT[cut](lost)
    for node in others:
        job.wait_until(lambda node=node: job.statuses(node) == [3], node)
    what = "ended (killed, or with the message above)" if cut == "killed" else SILENT
    line = f"error: process {number - 1} ({lost.name}) of 3 {what}{RESUMES}"
    if number > 1:
        assert job.errors(*others) == [line]
    else:
        assert [job.errors(node) for node in others] == [[line], [line]]
    if cut == "link":
        job.wait_until(lambda: job.errors(lost), lost)
        assert all(SILENT in found for found in job.errors(lost))


# ---------------------------------------------------------------- going on with fewer nodes

# The command of docs/nodes.md
STORE = (
    "import signal, torch.distributed as dist; "
    "store = dist.TCPStore('0.0.0.0', 29400, is_master=True, wait_for_workers=False); "
    "print('ready', flush=True); signal.pause()"
)


class ElasticJob(Job):
    """A job of 1 to 3 of three nodes, with a store on the fourth, and its trace."""

    def __init__(self, nodes, folder, flags):
        *nodes, self.host = nodes
        self.trace, self.names = Trace(folder), [node.name for node in nodes]
        self.store = self.host.start(sys.executable, "-c", STORE)
        self.store.wait_for_text("ready")
        super().__init__(
            nodes,
            flags,
            nnodes="1:3",
            endpoint=self.host.name,
            more=["--max-restarts=1000", f"--rdzv-conf=is_host=0,{RENDEZVOUS}"],
            # else the processes meet at a store of the first node, which is lost with it
            env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **self.trace.env},
            program="tests/cluster/traced.py",
        )

    def wait_until_held(self, *lost, step=0) -> int:
        """Returns the step in which the job of all nodes but `lost` is held, `step` or later."""
        names = [node.name for node in self.nodes if node not in lost]
        live = next(node for node in self.nodes if node.name in names)
        self.wait_until(lambda: self.trace.held(names, step) is not None, live)
        return self.trace.held(names, step)

    def cut(self, node, cut):
        """Returns when the others have reported it."""
        others = [other for other in self.nodes if other is not node]
        before = len(self.errors(*others))
        CUT[cut](node)
        self.wait_until(lambda: len(self.errors(*others)) > before, others[0])

    def bring_back(self, node):
        """Undoes a cut."""
        if not node.pid:
            node.boot()
        node.thaw()
        node.link_up()
        if self.started[node.name][-1].poll() is not None:
            self.start_on(node)

    def assert_equal(self, folder, whole, epochs) -> str:
        """Asserts that each step is once in the final timeline, and that the run in `folder` ends
        like the uninterrupted one in `whole`. Returns the largest relative difference of the
        weights."""
        assert [row["step"] for row in self.trace.steps()] == list(range(3 * epochs))
        assert_same_course(folder, whole)
        weights, expected = (
            torch.cat([tensor.flatten() for key, tensor in state(path)["model"].items()])
            for path in (folder, whole)
        )
        difference = (weights - expected).norm() / expected.norm()
        return f"the weights differ by {difference:.1e} of their norm"


# SGD, as the rounding of LAMB's and of clipped steps grows faster
ELASTIC = {
    **GROUPS,
    "training.optimizer": "sgd",
    "training.grad_clip": 0,
    "mix.off_epochs": 0,
    "checkpoint.every_minutes": 0,
    "dist.timeout_s": 5,
}


@pytest.mark.long
def test_job_goes_on_without_the_node_of_process_0_and_takes_it_back(
    make_nodes, betons, tmp_path, train
):
    """Two processes take the 4 groups of a step, then three again."""
    more = {**ELASTIC, "training.epochs": 4}
    job = ElasticJob(make_nodes(4), tmp_path, options(betons, tmp_path / "run", **more))
    job.trace.hold_at(4)
    job.wait_until_held()
    one = job.nodes[0]
    job.cut(one, "power")
    job.trace.hold_at(5)
    job.wait_until_held(one, step=5)
    job.bring_back(one)
    job.wait_until_held(step=5)
    job.trace.hold_at(100)
    assert job.wait() == [0, 0, 0], job.text()
    assert job.errors() == [f"error: process 0 (node1) of 3 {SILENT}{RESUMES}"] * 2
    lives = [row["life"] for row in job.trace.steps()]
    assert [life[-1] for life in dict.fromkeys(lives)] == ["3", "2", "3"], lives
    assert train(options(betons, tmp_path / "whole", **more), 3).wait()[0] == [0] * 3
    job.assert_equal(tmp_path / "run", tmp_path / "whole", more["training.epochs"])


@pytest.mark.long
def test_random_cuts(make_nodes, betons, tmp_path, train, report):
    """RSB_SEED: of an earlier run, to repeat its cuts."""
    seed = int(os.environ.get("RSB_SEED", random.randrange(10**6)))
    print(f"RSB_SEED={seed}")
    rng = random.Random(seed)
    more = {**ELASTIC, "training.epochs": 8 + CUTS, "logging.log_level": 0}
    job = ElasticJob(make_nodes(4), tmp_path, options(betons, tmp_path / "run", **more))
    step = job.wait_until_held()
    for number in range(CUTS):
        step += rng.randint(0, 2)
        job.trace.hold_at(step)
        step = job.wait_until_held(step=step)
        node, cut = rng.choice(job.nodes), rng.choice(list(CUT))
        print(f"cut {number}: {cut} of {node.name} in step {step}", flush=True)
        job.cut(node, cut)
        # A stopped process 0 keeps the lock of the folder.
        if cut != "stopped" and rng.random() < 0.5:
            step += 1
            job.trace.hold_at(step)
            step = job.wait_until_held(node, step=step)
        job.bring_back(node)
        step = job.wait_until_held()
    job.trace.hold_at(10**6)
    assert job.wait() == [0, 0, 0], job.text()
    assert train(options(betons, tmp_path / "whole", **more), 3).wait()[0] == [0] * 3
    difference = job.assert_equal(tmp_path / "run", tmp_path / "whole", more["training.epochs"])
    report(f"{CUTS} cuts with RSB_SEED={seed}: {difference}")
