"""Nodes with their own network (see nodes.py), and a SLURM cluster of four nodes on this machine:
munged, slurmctld, and one slurmd for each node.

SLURM's daemons have their own key, socket, ports and folders. They run in namespaces of their own:
/etc/hosts has the names of the nodes there, as a cluster's name service has them, and no process of
a job outlives the fixture.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster import nodes
from tests.conftest import ROOT, a_free_port
from tests.stops import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "unshare")
NODES = [f"node{number}" for number in range(1, 5)]
# The nodes claim more CPUs and GPUs than this machine has, so that the job scripts fit as they are.
# cred_expire: a requeued job starts after this number of seconds, which are 120 by default.
# A busy machine may need KillWait, in seconds between SIGTERM and SIGKILL, and OverTimeLimit, in
# minutes.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
KillWait=300
OverTimeLimit=60
UnkillableStepTimeout=600
ReturnToService=0
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
PlugStackConfig={folder}/plugstack.conf
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs=128 Gres=gpu:8\n"
# The daemons end with the shell, which ends when the pipe to its standard input is closed.
DAEMONS = """
mount --bind {folder}/hosts /etc/hosts
export SLURM_CONF={folder}/slurm.conf
munged --foreground --force --key-file={folder}/munge.key --socket={folder}/munge.socket \
    --pid-file={folder}/munged.pid --log-file={folder}/munged.log --seed-file={folder}/munge.seed &
slurmctld -D -c &
for node in {nodes}; do slurmd -D -N $node & done
read _
"""


class Job:
    """A submitted job. out: its output, of all its starts."""

    def __init__(self, cluster: "Cluster", number: str, out: Path):
        self._cluster, self.number, self.out = cluster, number, out

    def show(self) -> dict[str, str]:
        """What scontrol says about it."""
        text = self._cluster.call("scontrol", "show", "job", self.number)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def text(self) -> str:
        return self.out.read_text() if self.out.exists() else ""

    def poll(self) -> str | None:
        """Returns None until the job has ended, then its state and output."""
        state = self.show()["JobState"]
        if state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "PREEMPTED"):
            return None
        return f"{state}: {self.text()[-3000:]}"

    def kill(self):
        self._cluster.call("scancel", "--signal=KILL", self.number)

    def wait_until(self, condition):
        wait_until(condition, self)

    def wait(self) -> str:
        """Returns the exit status and the number of restarts, as "0, 1 restart"."""
        wait_until(lambda: self.poll() is not None, self)
        end = self.show()
        return f"{end['ExitCode']}, restarts {end['Restarts']}"


class Cluster:
    def __init__(self, folder: Path):
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._folder, host = folder, socket.gethostname()
        (folder / "state").mkdir()
        (folder / "munge.key").touch(0o600)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "plugstack.conf").touch()
        for number in range(8):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        conf = CONF.format(host=host, port=a_free_port(), folder=folder)
        hosts = Path("/etc/hosts").read_text() + "\n"
        for number, name in enumerate(NODES, 1):
            address = f"127.0.0.{number}"
            conf += NODE.format(name=name, host=host, address=address, port=a_free_port())
            hosts += f"{address} {name}\n"
        # partitions name the nodes, which must come before
        lines = conf.splitlines()
        (folder / "slurm.conf").write_text(
            "\n".join(sorted(lines, key=lambda line: line.startswith("PartitionName"))) + "\n"
        )
        (folder / "hosts").write_text(hosts)
        script = DAEMONS.format(folder=folder, nodes=" ".join(NODES))
        with open(folder / "daemons.txt", "w") as output:
            self._daemons = subprocess.Popen(
                ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
                + ["bash", "-c", script],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
            )

    def wait_until_idle(self):
        """Returns when all nodes are idle."""

        def idle() -> bool:
            done = subprocess.run(
                ["sinfo", "--noheader", "--Node", "--format=%T", "--partition=low"],
                env=self.env,
                capture_output=True,
                text=True,
            )
            return done.stdout.split() == ["idle"] * len(NODES)

        wait_until(idle, self._daemons)

    def stop(self):
        self._daemons.stdin.close()
        try:
            self._daemons.wait(60)
        finally:
            self._daemons.kill()

    def start(self, *command: object, **options) -> subprocess.Popen:
        """Starts a command of SLURM in the repository."""
        return subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env={**self.env, **options.pop("env", {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, *command: object, **options) -> tuple[int, str, str]:
        """Runs a command of SLURM. Returns (exit status, stdout, stderr)."""
        process = self.start(*command, **options)
        try:
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
        return process.returncode, out, err

    def call(self, *command: object, **options) -> str:
        """Runs a command that must succeed. Returns what it prints."""
        status, out, err = self.run(*command, **options)
        assert status == 0, (command, out, err)
        return out

    def submit(self, *arguments: object, **options) -> Job:
        """Submits a job with sbatch."""
        out = self._folder / f"job_{time.monotonic_ns()}.txt"
        number = self.call("sbatch", "--parsable", f"--output={out}", *arguments, **options)
        return Job(self, number.strip(), out)


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory):
    missing = [
        name
        for name in PROGRAMS
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if missing:
        pytest.skip(f"needs SLURM and munge (see CONTRIBUTING.md): {', '.join(missing)} not found")
    if os.geteuid():
        pytest.skip("needs root, as SLURM's daemons do")
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    if subprocess.run(namespaces, capture_output=True).returncode:
        pytest.skip("needs the right to create namespaces (unshare --mount --pid)")
    found = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        found.wait_until_idle()
        yield found
    finally:
        found.stop()


@pytest.fixture
def cluster(running_cluster):
    """The Cluster, all of whose nodes are idle. Ends the jobs of the test."""
    running_cluster.wait_until_idle()
    yield running_cluster
    running_cluster.call("scancel", "--user=root")
    running_cluster.call("scancel", "--user=root", "--signal=KILL", "--full")


@pytest.fixture
def make_nodes(tmp_path_factory):
    """make(count, private=[folders], trap=False): the nodes of a Network, which ends with the
    test."""
    if lacking := nodes.missing():
        pytest.skip(f"needs {lacking}")
    networks = []

    def make(count: int, **options) -> list[nodes.Node]:
        networks.append(nodes.Network(tmp_path_factory.mktemp("nodes"), count, **options))
        return networks[-1].nodes

    yield make
    for network in networks:
        network.stop()
