"""Jobs on a SLURM cluster of four nodes, with the job scripts of examples/slurm. A finished run
equals one that was never interrupted."""

import json
import re
import sys

import psutil
import pytest

from rsb_ffcv.training.launch import node_names
from tests.conftest import ROOT
from tests.integration.runs import assert_same_run, options
from tests.stops import Stop

PLACE = (
    "import os, json; from rsb_ffcv.training import launch; place = launch.place_in_job(); "
    "print(json.dumps([*place, launch.host_name(), os.environ.get('MASTER_ADDR'), "
    "os.environ.get('MASTER_PORT')]))"
)
# A run of train_imagenet.py that holds at a point; see tests/stops.py
HELD = """\
import sys
from tests import stops
stops.install()
stops.lengthen_timeouts()
from rsb_ffcv import exit_status
from train_imagenet import main
sys.argv[0] = "train_imagenet.py"
sys.exit(exit_status(main))
"""
A2 = ["--config-file", "rsb_configs/a2_300.yaml"]
# a2_300 expects the curve of ImageNet
SMALL = {"model.num_classes": 3, "logging.expected": "", "validation.crop_ratio": 1}
TWO = {**SMALL, "training.batch_size": 8, "data.num_workers": 1}


def places(text: str) -> list[list]:
    """What PLACE has printed, by rank."""
    return sorted(json.loads(line) for line in text.splitlines() if line.startswith("["))


def test_every_task_knows_its_place_and_where_the_first_one_listens(cluster):
    python = [sys.executable, "-c", PLACE]
    found = places(cluster.call("srun", "-n4", "-N2", "--ntasks-per-node=2", *python))
    port = found[0].pop()
    assert 20000 <= int(port) < 30000 and [place.pop() for place in found[1:]] == [port] * 3
    assert found == [
        [0, 4, 0, 2, "node1", "node1"],
        [1, 4, 1, 2, "node1", "node1"],
        [2, 4, 0, 2, "node2", "node1"],
        [3, 4, 1, 2, "node2", "node1"],
    ]
    two = ("-n4", "-N2", "--ntasks-per-node=2", "--distribution=cyclic", "-wnode3,node4")
    found = places(cluster.call("srun", *two, *python))
    assert [place[:6] for place in found] == [
        [0, 4, 0, 2, "node3", "node3"],
        [1, 4, 0, 2, "node4", "node3"],
        [2, 4, 1, 2, "node3", "node3"],
        [3, 4, 1, 2, "node4", "node3"],
    ]


def test_one_process_of_a_job_of_several_tasks_is_alone(cluster, tmp_path):
    """In a job script and in salloc, SLURM_NTASKS is 4. Two steps of the job have their own
    ports."""
    alone = [0, 1, 0, 1]
    (tmp_path / "place.py").write_text(PLACE)
    python, env = f"{sys.executable} {tmp_path}/place.py", {"PYTHONPATH": str(ROOT)}
    job = cluster.submit(
        "--ntasks=4",
        "--nodes=2",
        f"--wrap={python}; srun -n1 -N1 {python}; "
        f"srun -n2 -N2 {python}; srun -n2 -N2 {python}; echo $SLURM_NTASKS",
        env=env,
    )
    assert job.wait() == "0:0, restarts 0", job.text()
    # srun may also print that it waits for a node that is still busy with the step before
    printed = [line for line in job.text().splitlines() if line.startswith("[")]
    first, second, *others = [json.loads(line) for line in printed]
    assert first[:4] == second[:4] == alone and job.text().splitlines()[-1] == "4"
    assert sorted(place[:4] for place in others) == [[0, 2, 0, 1]] * 2 + [[1, 2, 0, 1]] * 2
    assert len({place[6] for place in others}) == 2
    lines = f"echo $SLURM_NTASKS; {python}"
    shell = cluster.call("salloc", "--ntasks=4", "sh", "-c", lines, env=env)
    assert shell.splitlines()[0] == "4" and places(shell)[0][:4] == alone


@pytest.fixture(scope="module")
def whole_run(betons, tmp_path_factory, train):
    """whole(more, world): the folder of an uninterrupted run of a2_300 with these options."""
    made = {}

    def whole(more: dict, world: int):
        key = json.dumps(more), world
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            flags = [*A2, *options(betons, made[key], **more)]
            statuses, _, err = train(flags, world).wait()
            assert statuses == [0] * world, err
        return made[key]

    return whole


@pytest.mark.long
def test_srun_needs_no_wrapper_and_no_flags(cluster, betons, tmp_path, whole_run):
    """Two tasks on two nodes equal two processes on one machine."""
    more = {**TWO, "training.epochs": 1, "lr.warmup_epochs": 0, "mix.off_epochs": 0}
    flags = options(betons, tmp_path / "run", **more)
    status, out, err = cluster.run(
        "srun", "-n2", "-N2", sys.executable, "train_imagenet.py", *A2, *flags
    )
    assert status == 0 and "2 processes" in out, err
    assert_same_run(tmp_path / "run", whole_run(more, 2))


class Held:
    """A job of a script of examples/slurm whose run holds at the first step of its second epoch."""

    def __init__(self, cluster, betons, folder, script, *, sbatch, more, tasks):
        self.folder, self._stop = folder / "run", Stop(("epoch 2", 1), folder, tasks)
        python = folder / "python"
        (folder / "held.py").write_text(HELD)
        python.write_text(
            f'#!/bin/sh\nshift\nPYTHONPATH={ROOT} exec {sys.executable} {folder}/held.py "$@"\n'
        )
        python.chmod(0o755)
        self.job = cluster.submit(
            *sbatch,
            ROOT / "examples" / "slurm" / script,
            *options(betons, self.folder, **more),
            env={"PYTHON": str(python), **self._stop.env},
        )

    def wait_until_held(self):
        self.job.wait_until(self._stop.reached)

    def wait_for_text(self, text: str, count: int = 1):
        self.job.wait_until(lambda: self.job.text().count(text) >= count)

    def kill_on(self, node: str):
        """Kills its processes on a node."""
        script = str(self._stop.folder / "held.py")
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if script in command and process.environ().get("SLURMD_NODENAME") == node:
                process.kill()

    def go_on(self):
        self._stop.go_on()

    def assert_equal(self, whole, restarts: int = 1):
        assert self.job.wait() == f"0:0, restarts {restarts}", self.job.text()
        assert self.job.text().count("resuming") == restarts
        assert self.job.text().count("saved after step") == restarts, self.job.text()
        assert "Traceback" not in self.job.text() and "error: process" not in self.job.text()
        assert_same_run(self.folder, whole)


@pytest.mark.long
def test_time_limit_one_gpu(cluster, betons, tmp_path, whole_run):
    """SLURM sends SIGUSR1 before the limit. The run saves, and the job requeues itself. The limit
    is lowered when the run is held: a step that has not begun would not receive the signal."""
    signal = ("--time=60", "--signal=USR1@60")
    held = Held(cluster, betons, tmp_path, "one_gpu.sh", sbatch=signal, more=SMALL, tasks=1)
    held.wait_until_held()
    cluster.call("scontrol", "update", f"jobid={held.job.number}", "timelimit=1")
    held.wait_for_text("SIGUSR1: finishing the step and saving")
    cluster.call("scontrol", "update", f"jobid={held.job.number}", "timelimit=60")
    held.go_on()
    held.job.wait_until(lambda: held.job.show()["Restarts"] == "1")
    held.assert_equal(whole_run(SMALL, 1))


@pytest.mark.long
def test_requeue_one_node(cluster, betons, tmp_path, whole_run):
    """`scontrol requeue` of a running job."""
    tasks = ("--ntasks-per-node=2",)
    held = Held(cluster, betons, tmp_path, "one_node.sh", sbatch=tasks, more=TWO, tasks=2)
    held.wait_until_held()
    cluster.call("scontrol", "requeue", held.job.number)
    held.wait_for_text("SIGTERM: finishing the step and saving", 2)
    held.go_on()
    held.assert_equal(whole_run(TWO, 2))


@pytest.mark.long
@pytest.mark.parametrize("state", ["drain", "down"])
def test_drained_and_failed_node_several_nodes(cluster, betons, tmp_path, whole_run, state):
    """The job is requeued, by the user if a node is drained, by SLURM if one is down, and continues
    on other nodes. The processes of a node that is down are gone, so that the run is not saved."""
    nodes = ("--nodes=2", "--ntasks-per-node=1")
    more = {**TWO, "checkpoint.every_minutes": 0}
    held = Held(cluster, betons, tmp_path, "several_nodes.sh", sbatch=nodes, more=more, tasks=2)
    held.wait_until_held()
    assert held.job.show()["NodeList"] == "node[1-2]"
    held.job.wait_until((held.folder / "checkpoint_000000003.pt").exists)
    cluster.call("scontrol", "update", "nodename=node2", f"state={state}", "reason=test")
    try:
        if state == "drain":
            cluster.call("scontrol", "requeue", held.job.number)
            held.wait_for_text("SIGTERM: finishing the step and saving", 2)
        else:
            held.wait_for_text("Node failure on node2")
            held.kill_on("node2")
            held.wait_for_text("error: process 1 (node2) of 2 ended")
        held.go_on()
        assert held.job.wait() == "0:0, restarts 1", held.job.text()
    finally:  # a node that was down may have come back: then this changes nothing, and fails
        cluster.run("scontrol", "update", "nodename=node2", "state=resume")
    last = node_names(held.job.show()["NodeList"])
    assert len(last) == 2 and "node2" not in last and "resuming" in held.job.text()
    assert_same_run(held.folder, whole_run(more, 2))


@pytest.mark.long
def test_preemption(cluster, betons, tmp_path, whole_run):
    """A job of a partition with a higher priority takes all nodes."""
    where = ("--partition=low", "--ntasks-per-node=2")
    more = {**TWO, "checkpoint.every_minutes": 5}
    held = Held(cluster, betons, tmp_path, "preemptible.sh", sbatch=where, more=more, tasks=2)
    held.wait_until_held()
    other = cluster.submit("--partition=high", "--nodes=4", "--exclusive", "--wrap=true")
    held.wait_for_text("SIGTERM: finishing the step and saving", 2)
    held.go_on()
    assert other.wait() == "0:0, restarts 0"
    held.assert_equal(whole_run(more, 2))
    assert "DUE TO PREEMPTION" in held.job.text()


@pytest.mark.long
def test_scripts_end_with_the_status_of_an_error(cluster, tmp_path):
    for script, tasks in (("one_gpu.sh", 1), ("several_nodes.sh", 4)):
        job = cluster.submit(
            "--ntasks-per-node=2" if tasks > 1 else "--ntasks=1",
            ROOT / "examples" / "slurm" / script,
            "--training.epochs=none",
            env={"PYTHON": sys.executable},
        )
        assert job.wait() == "2:0, restarts 0"
        assert len(re.findall("^error: training.epochs='none'", job.text(), re.M)) == tasks


@pytest.mark.long
def test_torchrun_or_one_task_that_starts_the_processes(cluster, betons, tmp_path, whole_run):
    """One task a node with torchrun, and one task with training.distributed=1."""
    more = {**TWO, "training.epochs": 1, "lr.warmup_epochs": 0, "mix.off_epochs": 0}
    flags = [*A2, *options(betons, tmp_path / "torchrun", **more)]
    torchrun = "torch.distributed.run --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d"
    status, _, err = cluster.run(
        *("srun", "-n2", "-N2", sys.executable, "-m", *torchrun.split()),
        *("--rdzv_id=1", "--rdzv_endpoint=node1:29400", "train_imagenet.py", *flags),
    )
    assert status == 0, err
    assert_same_run(tmp_path / "torchrun", whole_run(more, 2))
    flags = [*A2, *options(betons, tmp_path / "spawned", **more)]
    status, _, err = cluster.run(
        *("srun", "-n1", sys.executable, "train_imagenet.py", *flags),
        *("--training.distributed=1", "--dist.world_size=2"),
    )
    assert status == 0, err
    assert_same_run(tmp_path / "spawned", whole_run(more, 2))


@pytest.mark.long
def test_task_that_never_connects_is_named_once(cluster, betons, tmp_path):
    """The others wait for it after they have started; see RENDEZVOUS_SECONDS."""
    code = f"""
import os, sys, time
from pathlib import Path
from rsb_ffcv import exit_status
from rsb_ffcv.training import join, trainer
join.RENDEZVOUS_SECONDS = 60
import train_imagenet
rank = int(os.environ["SLURM_PROCID"])
Path("{tmp_path}", str(rank)).touch()
while len(list(Path("{tmp_path}").glob("[01]"))) < 2:
    time.sleep(0.01)
sys.exit(exit_status(train_imagenet.main) if rank < 2 else 0)
"""
    (tmp_path / "start.py").write_text(code)
    status, _, err = cluster.run(
        *("srun", "-n3", "-N3", sys.executable, tmp_path / "start.py"),
        *options(betons, tmp_path / "run", **{**TWO, "training.batch_size": 4}),
        env={"PYTHONPATH": str(ROOT)},
    )
    lines = re.findall("error: .*", re.sub("srun: error.*", "", err))
    assert status == 2 and len(lines) == 1, err
    assert re.match(
        r"error: 2 of 3 processes have connected; missing: 2 \(none has from node3\) at "
        r"node1:2\d{4} after 60 s; see whether they have started",
        lines[0],
    ), err
