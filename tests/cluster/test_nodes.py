"""Jobs of torchrun on several nodes, which are cut off, stopped and switched off."""

import os
import random
import re
import sys
import time

import psutil
import pytest
import torch

from tests.cluster.jobs import RENDEZVOUS, Job
from tests.cluster.nodes import Network
from tests.cluster.traced import Trace
from tests.conftest import ROOT
from tests.integration.runs import assert_same_course, assert_same_run, options, rows, state
from tests.sizes import CUTS
from tests.stops import Stop, wait_until

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


@pytest.mark.long
@pytest.mark.parametrize("count, nproc", [(2, 1), (2, 2), (3, 1), (4, 1)])
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


@pytest.mark.long
@pytest.mark.parametrize("number", [3, 1])
@pytest.mark.parametrize("cut", CUT)
def test_cut_ends_the_others_with_a_line_that_names_the_node(
    make_nodes, betons, tmp_path, cut, number, report
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
    began = time.monotonic()
    CUT[cut](lost)
    for node in others:
        job.wait_until(lambda node=node: job.statuses(node) == [3], node)
    report(f"the others have ended after {time.monotonic() - began:.1f} s")
    what = "ended (killed, or with the message above)" if cut == "killed" else SILENT
    line = f"error: process {number - 1} ({lost.name}) of 3 {what}{RESUMES}"
    if number > 1:
        assert job.errors(*others) == [line]
    else:
        assert [job.errors(node) for node in others] == [[line], [line]]
    if cut == "link":
        job.wait_until(lambda: job.errors(lost), lost)
        assert all(SILENT in found for found in job.errors(lost))


@pytest.mark.long
@pytest.mark.parametrize("number", [1, 2])
def test_all_processes_of_a_lost_node_are_named(make_nodes, betons, tmp_path, number):
    """Two nodes of two processes. Without the store, which is on node1, only process 0 is known to
    be lost."""
    nodes = make_nodes(2)
    stop = Stop(("epoch 1", 1), tmp_path, 4)
    flags = options(betons, tmp_path / "run", **GROUPS, **{"dist.timeout_s": 5})
    job = Job(nodes, flags, nproc=2, stop=stop)
    job.wait_until(stop.reached)
    lost, other = nodes[number - 1], nodes[2 - number]
    lost.kill()
    job.wait_until(lambda: job.statuses(other) == [3, 3], other)
    named = "process 0 (node1)" if number == 1 else "processes 2 (node2), 3 (node2)"
    assert job.errors(other) == [f"error: {named} of 4 {SILENT}{RESUMES}"]


# ---------------------------------------------------------------- at the start

# The times are long enough for a busy machine: the last process of three is ready much earlier
START = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
from rsb_ffcv import exit_status
from rsb_ffcv.training import join, trainer
join.RENDEZVOUS_SECONDS = 60
import train_imagenet
rank, folder = int(os.environ["RANK"]), Path(os.environ["FOLDER"])
def wait_until_all_are_ready(count):
    (folder / f"ready_{rank}").touch()
    while len(list(folder.glob("ready_*"))) < count:
        time.sleep(0.01)
meet = join._private_store
def marked_meet(*arguments, **options):
    (folder / f"meets_{rank}").touch()
    return meet(*arguments, **options)
join._private_store = marked_meet
def hold(*_, **__):
    (folder / "held").touch()
    time.sleep(1000)
{more}
sys.exit(exit_status(train_imagenet.main))
"""

HELD_WHEN_REGISTERED = (
    "within = join.within; "
    "join.within = lambda s, f: (within(s, f), f.__name__ == 'register' and hold())[0]"
)


@pytest.fixture
def start(betons, tmp_path):
    """start(nodes, world, more): starts one of `world` processes on each node, without torchrun.
    more: Python code that it runs first."""

    def start(nodes, world: int, more: str):
        (tmp_path / "start.py").write_text(START.replace("{more}", more))
        return [
            node.start(
                *(sys.executable, tmp_path / "start.py"),
                *options(betons, tmp_path / "run", **GROUPS, **{"dist.timeout_s": 5}),
                env={
                    "RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "LOCAL_RANK": "0",
                    "LOCAL_WORLD_SIZE": "1",
                    "MASTER_ADDR": nodes[0].name,
                    "MASTER_PORT": "2000",
                    "PYTHONPATH": str(ROOT),
                    "FOLDER": str(tmp_path),
                },
            )
            for rank, node in enumerate(nodes)
        ]

    return start


def errors(*commands) -> list[str]:
    return [line for it in commands for line in re.findall("^error: .*", it.text(), re.M)]


@pytest.mark.long
def test_node_that_never_arrives_is_reported_once(make_nodes, start):
    """The others wait for it after all of them have started."""
    jobs = start(make_nodes(2), 3, "wait_until_all_are_ready(2)")
    assert [job.wait() for job in jobs] == [2, 2]
    (line,) = errors(*jobs)
    assert line == (
        "error: 2 of 3 processes have connected; missing: 2 at node1:2000 after 60 s; see whether "
        "they have started, and the error message of one that ended"
    )


@pytest.mark.long
def test_port_in_use_is_reported_by_process_0(make_nodes, start):
    nodes = make_nodes(2)
    occupy = (
        "import socket, time; s = socket.create_server(('', 2000)); print('ready', flush=True);"
    )
    nodes[0].start(sys.executable, "-c", occupy + " time.sleep(1000)").wait_for_text("ready")
    jobs = start(nodes, 2, "")
    assert jobs[0].wait() == 2
    assert errors(jobs[0]) == [
        "error: MASTER_PORT=2000: process 0 cannot listen on it on node1 (Address already in use); "
        "set MASTER_PORT to a free port"
    ]
    # The program that listens there accepts its connection, and does not answer
    assert jobs[1].wait() == 2
    (line,) = errors(jobs[1])
    assert line.startswith("error: process 1 of 2 cannot connect to the others at node1:2000 (")


@pytest.mark.long
@pytest.mark.parametrize("number", [3, 1])
@pytest.mark.parametrize("function", ["meet", "init_process_group", "new_group"])
@pytest.mark.parametrize("cut", ["link", "killed"])
def test_node_that_is_lost_before_the_heartbeat_starts_ends_the_others(
    make_nodes, start, tmp_path, number, function, cut
):
    """The process is registered in the store and has not yet found the others there, or has met
    them and not yet connected to them, for training or for the heartbeat."""
    nodes = make_nodes(3)
    held = HELD_WHEN_REGISTERED if function == "meet" else f"dist.{function} = hold"
    jobs = start(nodes, 3, f"if rank == {number - 1}: {held}")
    lost = jobs.pop(number - 1)
    lost.wait_until((tmp_path / "held").exists)
    lost.wait_until(lambda: all((tmp_path / f"meets_{rank}").exists() for rank in range(3)))
    if cut == "link":
        nodes[number - 1].link_down()
    else:
        lost.kill()
    assert [job.wait() for job in jobs] == [3, 3]
    found = errors(*jobs)
    # Without process 0, which has the store, the others cannot agree on who reports
    assert len(found) == (1 if number == 3 else 2)
    named = f"error: process {number - 1} (node{number}) of 3 "
    assert all(line.startswith(named) and line.endswith(RESUMES) for line in found)
    if function != "new_group":
        assert all("did not connect within 5 s (dist.timeout_s): " in line for line in found)
    assert not any("Traceback" in job.text() for job in jobs)


@pytest.mark.long
def test_node_of_process_0_that_is_lost_before_all_have_met_ends_the_others(
    make_nodes, start, tmp_path
):
    """The last of four processes has not started yet."""
    nodes = make_nodes(3)
    jobs = start(nodes, 4, "")
    jobs[0].wait_until(lambda: all((tmp_path / f"meets_{rank}").exists() for rank in range(3)))
    nodes[0].link_down()
    assert [job.wait() for job in jobs[1:]] == [3, 3]
    for job in jobs[1:]:
        (line,) = errors(job)
        assert line == (
            "error: process 0 (node1) of 4 did not connect within 5 s (dist.timeout_s): ended, "
            f"stopped, or the machine or its network failed{RESUMES}"
        )


@pytest.mark.long
def test_processes_that_cannot_connect_although_none_is_lost_have_one_error(make_nodes, start):
    fail = "def fail(*_, **__):\n    raise RuntimeError(f'no route {rank}')"
    jobs = start(make_nodes(3), 3, f"{fail}\ndist.init_process_group = fail")
    assert [job.wait() for job in jobs] == [2, 2, 2]
    (line,) = errors(*jobs)
    assert line.startswith(
        "error: the 3 processes cannot connect to each other: process 0 (node1) reports no route 0;"
    )


# ---------------------------------------------------------------- going on with fewer nodes

# The command of docs/nodes.md
STORE = (
    "import signal, torch.distributed as dist; "
    "store = dist.TCPStore('0.0.0.0', 29400, is_master=True, wait_for_workers=False); "
    "print('ready', flush=True); signal.pause()"
)


def test_documented_store_is_the_tested_one():
    assert f'\npython -c "{STORE}"\n' in (ROOT / "docs" / "nodes.md").read_text()


def _runs(process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class ElasticJob(Job):
    """A job of all nodes but the last one, which has the store, with its trace.

    shares: whether torchrun's processes meet at a store of the first node, as is the default. It is
        lost with the node.
    """

    def __init__(self, nodes, folder, flags, *, nnodes="1:3", shares=False):
        *nodes, self.host = nodes
        self.trace, self.names = Trace(folder), [node.name for node in nodes]
        self.store = self.host.start(sys.executable, "-c", STORE)
        self.store.wait_for_text("ready")
        super().__init__(
            nodes,
            flags,
            nnodes=nnodes,
            endpoint=self.host.name,
            more=["--max-restarts=1000", f"--rdzv-conf=is_host=0,{RENDEZVOUS}"],
            env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(int(not shares)), **self.trace.env},
            program="tests/cluster/traced.py",
        )

    def wait_until_held(self, *lost, step=0) -> int:
        """Returns the step in which the job of all nodes but `lost` is held, `step` or later."""
        names = [node.name for node in self.nodes if node not in lost]
        live = next(node for node in self.nodes if node.name in names)
        self.wait_until(lambda: self.trace.held(names, step) is not None, live)
        return self.trace.held(names, step)

    def keep_running(self) -> str:
        """Starts torchrun on nodes where it has ended. If it has closed the rendezvous, all start
        again (docs/nodes.md). Returns what has been done, as text for a message."""
        newest = {node: self.started[node.name][-1] for node in self.nodes}
        ended = [node for node, command in newest.items() if command.poll() is not None]
        if any("RendezvousClosedError" in newest[node].text() for node in ended):
            self.start_again()
            return "all start again, with another --rdzv-id"
        for node in ended:
            self.start_on(node)
        return f"torchrun starts again on {[node.name for node in ended]}" * bool(ended)

    def cut(self, node, cut):
        """Returns when the processes of the others have ended."""
        others = [other for other in self.nodes if other is not node]
        running = filter(_runs, [process for other in others for process in other.processes()])
        program = ["-u", "tests/cluster/traced.py"]  # torchrun has other arguments before it
        trained = [process for process in running if process.cmdline()[1:3] == program]
        assert len(trained) == len(others)
        CUT[cut](node)
        self.wait_until(lambda: not any(map(_runs, trained)), others[0])
        self.trace.forget()

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
        like the uninterrupted one in `whole`. Returns the largest differences.

        Two uninterrupted runs of 38 epochs, with two processes and with three, differ as much: by
        0.2 % in an epoch's loss, 0.04 % in the weights, and 3 % in the biases alone.
        """
        assert [row["step"] for row in self.trace.steps()] == list(range(3 * epochs))
        assert_same_course(folder, whole, rounding=1e-2, early=1e-5)
        losses = [[row["train_loss"] for row in rows(path)] for path in (folder, whole)]
        loss = max(abs(one / other - 1) for one, other in zip(*losses))
        weights, expected = (
            torch.cat([tensor.flatten() for key, tensor in state(path)["model"].items()])
            for path in (folder, whole)
        )
        difference = (weights - expected).norm() / expected.norm()
        return f"the losses differ by up to {loss:.1e}, the weights by {difference:.1e}"


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
@pytest.mark.parametrize("count", [3, 4])
def test_job_goes_on_without_the_node_of_process_0_and_takes_it_back(
    make_nodes, betons, tmp_path, train, count
):
    """One process less takes the 4 groups of a step, then all of them again."""
    more = {**ELASTIC, "training.epochs": 4}
    flags = options(betons, tmp_path / "run", **more)
    job = ElasticJob(make_nodes(count + 1), tmp_path, flags, nnodes=f"1:{count}")
    job.trace.hold_at(4)
    job.wait_until_held()
    one = job.nodes[0]
    job.cut(one, "power")
    job.trace.hold_at(5)
    job.wait_until_held(one, step=5)
    job.bring_back(one)
    job.wait_until_held(step=5)
    job.trace.hold_at(100)
    assert job.wait() == [0] * count, job.text()
    assert job.errors() == [f"error: process 0 (node1) of {count} {SILENT}{RESUMES}"] * (count - 1)
    lives = [row["life"] for row in job.trace.steps()]
    sizes = [int(life[-1]) for life in dict.fromkeys(lives)]
    assert sizes == [count, count - 1, count], lives
    assert train(options(betons, tmp_path / "whole", **more), count).wait()[0] == [0] * count
    job.assert_equal(tmp_path / "run", tmp_path / "whole", more["training.epochs"])


@pytest.mark.long
def test_job_that_waits_for_the_lost_node_has_the_same_bits(make_nodes, betons, tmp_path, train):
    """--nnodes=3. The node of process 0 is lost in the middle of an epoch."""
    more = {**ELASTIC, "training.epochs": 3}
    flags = options(betons, tmp_path / "run", **more)
    job = ElasticJob(make_nodes(4), tmp_path, flags, nnodes="3")
    job.trace.hold_at(4)
    job.wait_until_held(step=4)
    job.wait_until((tmp_path / "run" / "checkpoint_000000003.pt").exists)
    job.cut(job.nodes[0], "power")
    job.trace.hold_at(100)
    job.bring_back(job.nodes[0])
    assert job.wait() == [0, 0, 0], job.text()
    assert "resuming" in job.text()
    assert train(options(betons, tmp_path / "whole", **more), 3).wait()[0] == [0] * 3
    job.assert_equal(tmp_path / "run", tmp_path / "whole", more["training.epochs"])
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.long
def test_job_is_saved_when_the_machine_of_torchruns_store_shuts_down(make_nodes, betons, tmp_path):
    flags = options(betons, tmp_path / "run", **ELASTIC)
    job = ElasticJob(make_nodes(4), tmp_path, flags)
    job.wait_until_held()
    job.host.kill(closes=True)
    assert job.wait() == [1, 1, 1]
    assert "saved after step 2;" in job.text() and not job.errors(), job.text()


@pytest.mark.long
@pytest.mark.parametrize("returns", [True, False])
def test_torchrun_that_shares_its_store_does_not_go_on_without_it(
    make_nodes, betons, tmp_path, returns
):
    """The trap of docs/nodes.md, with a node of process 0 that is lost, and returns."""
    flags = options(betons, tmp_path / "run", **ELASTIC)
    nnodes = "3" if returns else "1:3"
    job = ElasticJob(make_nodes(4), tmp_path, flags, nnodes=nnodes, shares=True)
    job.wait_until_held()
    one, two, _ = job.nodes
    job.cut(one, "power")
    if returns:
        job.bring_back(one)
        named = (
            r"error: process \d of 3 cannot connect to the others at node1:\d+ \(.*\); torchrun "
            r"listens there; if that machine was lost, start torchrun with "
            r"TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all machines"
        )
        job.wait_until(lambda: any(re.fullmatch(named, line) for line in job.errors(two)), two)
    else:
        assert job.wait(two) == [1] and job.text(two).endswith("\nAssertionError\n")


@pytest.mark.long
def test_stopped_node_of_process_0_changes_nothing_when_it_goes_on(
    make_nodes, betons, tmp_path, train
):
    """The others take over its folder, and finish the run."""
    more = {**ELASTIC, "training.epochs": 3}
    run = tmp_path / "run"
    job = ElasticJob(make_nodes(4), tmp_path, options(betons, run, **more))
    job.trace.hold_at(4)
    job.wait_until_held(step=4)
    job.wait_until((run / "checkpoint_000000003.pt").exists)
    one, *others = job.nodes
    job.cut(one, "stopped")
    job.trace.hold_at(100)
    assert job.wait(*others) == [0, 0], job.text()
    assert job.text(*others).count("this process takes over the run") == 1, job.text()

    def content():
        return {
            path: (path.stat().st_mtime_ns, path.read_bytes())
            for path in run.rglob("*")
            if path.is_file()
        }

    finished = content()
    (stopped,) = [
        process
        for process in one.processes()
        if "tests/cluster/traced.py" in process.cmdline()[1:3]
    ]
    one.thaw()
    job.wait_until(lambda: not _runs(stopped), one)
    assert len(job.errors(one)) == 1, job.text(one)
    assert "has taken over this run" in job.errors(one)[0], job.text(one)
    one.kill()
    assert content() == finished
    assert train(options(betons, tmp_path / "whole", **more), 3).wait()[0] == [0] * 3
    job.assert_equal(run, tmp_path / "whole", more["training.epochs"])


@pytest.mark.long
@pytest.mark.parametrize("nnodes, cuts", [("1:3", CUTS), ("3", CUTS // 5)])
def test_random_cuts(make_nodes, betons, tmp_path, train, report, nnodes, cuts):
    """With nnodes=3, the job waits for the lost node, and the result has the same bits. RSB_SEED:
    of an earlier run, to repeat its cuts."""
    seed = int(os.environ.get("RSB_SEED", random.randrange(10**6)))
    print(f"RSB_SEED={seed}")
    rng = random.Random(seed)
    more = {**ELASTIC, "training.epochs": 8 + cuts, "logging.log_level": 0}
    flags = options(betons, tmp_path / "run", **more)
    job = ElasticJob(make_nodes(4), tmp_path, flags, nnodes=nnodes)
    step = job.wait_until_held()
    for number in range(cuts):
        step += rng.randint(0, 2)
        job.trace.hold_at(step)
        step = job.wait_until_held(step=step)
        node, cut = rng.choice(job.nodes), rng.choice(list(CUT))
        print(f"cut {number}: {cut} of {node.name} in step {step}", flush=True)
        job.cut(node, cut)
        if nnodes != "3" and rng.random() < 0.5:
            step += 1
            job.trace.hold_at(step)
            step = job.wait_until_held(node, step=step)
        job.bring_back(node)
        step = job.wait_until_held()
    job.trace.hold_at(10**6)
    assert job.wait() == [0, 0, 0], job.text()
    assert train(options(betons, tmp_path / "whole", **more), 3).wait()[0] == [0] * 3
    difference = job.assert_equal(tmp_path / "run", tmp_path / "whole", more["training.epochs"])
    report(f"{cuts} cuts with RSB_SEED={seed}: {difference}")
    if nnodes == "3":
        assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.long
def test_cuts_at_random_instants(make_nodes, betons, tmp_path, train, report):
    """Also while processes start, meet, validate and save. What a cut hits depends on the speed of
    the machine; the result does not."""
    seed = int(os.environ.get("RSB_SEED", random.randrange(10**6)))
    print(f"RSB_SEED={seed}")
    rng, cuts = random.Random(seed), CUTS // 3
    more = {**ELASTIC, "training.epochs": 4 + 2 * cuts, "logging.log_level": 0}
    flags = options(betons, tmp_path / "run", **more)
    job = ElasticJob(make_nodes(4), tmp_path, flags)
    step = job.wait_until_held()
    for number in range(cuts):
        step += rng.randint(1, 6)
        job.trace.hold_at(step)
        time.sleep(rng.uniform(0, 20))
        node, cut = rng.choice(job.nodes), rng.choice(list(CUT))
        print(f"cut {number}: {cut} of {node.name}, held at {step}", job.keep_running(), flush=True)
        CUT[cut](node)
        time.sleep(rng.uniform(0, 20))
        job.bring_back(node)
    job.trace.forget()

    def held():
        if done := job.keep_running():
            print(done, flush=True)
        return job.trace.held([node.name for node in job.nodes], step) is not None

    wait_until(held, job.host.start("sleep", 1000))
    job.trace.hold_at(10**6)
    assert job.wait() == [0, 0, 0], job.text()
    assert train(options(betons, tmp_path / "whole", **more), 3).wait()[0] == [0] * 3
    difference = job.assert_equal(tmp_path / "run", tmp_path / "whole", more["training.epochs"])
    starts = sum(map(len, job.started.values()))
    report(f"{cuts} cuts with RSB_SEED={seed}, {starts} starts of torchrun: {difference}")
