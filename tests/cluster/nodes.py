"""Nodes of a cluster on this machine, with real parts: each node has its own network, with an
address on a bridge, its own mounts, host name and processes.

The nodes see the same file system, as nodes with a shared folder do, except for `private` folders.
All of it is in one process namespace, whose first process reads a pipe of the tests. When the tests
end, however they end, the kernel ends every process of every node, and its network with it.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.conftest import ROOT
from tests.stops import wait_until

ENTER = ["--net", "--mount", "--uts", "--pid"]
UNSHARE = ["unshare", *ENTER, "--fork", "--kill-child", "--mount-proc"]
# The first process of a node. Ended processes without a parent leave no zombie.
INIT = "trap '' CHLD; ip link set lo up; hostname {name}; {mounts} exec sleep infinity"


def missing() -> str:
    """What this machine lacks for nodes, as text for a message; empty if nothing."""
    if os.geteuid():
        return "root"
    for program in ("ip", "unshare", "nsenter"):
        if not shutil.which(program):
            return f"the program {program} (Debian: iproute2, util-linux)"
    bridge = [*UNSHARE, "ip", "link", "add", "bridge", "type", "bridge"]
    done = subprocess.run(bridge, capture_output=True, text=True)
    return f"the right to create namespaces ({done.stderr.strip()})" if done.returncode else ""


def in_namespaces(pid: int, *command: object, options: Sequence[str] = ENTER) -> list[str]:
    """The command line that runs a command in the namespaces of process `pid`."""
    return ["nsenter", f"--target={pid}", *options, "--", *map(str, command)]


class Command:
    """A running command of a node.

    process: a shell outside of the node, which ends with the command and has its exit status (128 +
        the signal that ended it). It is not stopped or killed with the node.
    out: the file with stdout and stderr.
    """

    def __init__(self, process: subprocess.Popen, out: Path):
        self.process, self.out = process, out

    def text(self) -> str:
        return self.out.read_text(errors="replace")

    def poll(self) -> str | None:
        """Returns None while it runs, then its exit status and the end of its output."""
        status = self.process.poll()
        return None if status is None else f"{status}: {self.text()[-3000:]}"

    def kill(self):
        """Kills the command with the processes that it has started."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            _signal(process.pid, signal.SIGKILL)

    def wait(self, seconds: float = 600) -> int:
        """Returns its exit status. Kills it, and fails the test, after `seconds`."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still runs after {seconds} s: {self.text()[-3000:]}") from None

    def wait_until(self, condition):
        wait_until(condition, self)

    def wait_for_text(self, text: str, count: int = 1):
        self.wait_until(lambda: self.text().count(text) >= count)


class Node:
    """A node: name, address, and its first process (`pid`, or 0 while the node is off)."""

    def __init__(self, network: "Network", number: int):
        self._network, self.number = network, number
        self.name, self.address = f"node{number}", f"10.77.0.{number}"
        self._port = f"port{number}"  # its link's end at the bridge
        self.folder = network.folder / self.name
        (self.folder / "private").mkdir(parents=True)
        self.boot()

    def boot(self):
        """Starts the node, also after `kill`, with the same name and address."""
        hosts = self.folder / "hosts"
        own = ["127.0.0.1 localhost", *([f"127.0.1.1 {self.name}"] if self._network.trap else [])]
        names = [f"10.77.0.{number} node{number}" for number in range(1, self._network.count + 1)]
        hosts.write_text("\n".join([*own, *names]) + "\n")
        mounts = f"mount --bind {hosts} /etc/hosts;"
        for number, path in enumerate(self._network.private):
            (self.folder / "private" / str(number)).mkdir(exist_ok=True)
            mounts += f"mount --bind {self.folder}/private/{number} {path};"
        with open(self.folder / "boot.txt", "a") as output:
            self._holder = subprocess.Popen(
                in_namespaces(
                    self._network.pid,
                    *(*UNSHARE, "sh", "-ec", INIT.format(name=self.name, mounts=mounts)),
                    options=["--net", "--mount", "--pid"],
                ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        wait_until(lambda: self._first_process() is not None, self._holder)
        self.pid = self._first_process() or 0
        self._network.ip(
            "link", "add", self._port, "type", "veth", "peer", "eth0", "netns", self.pid
        )
        self._network.ip("link", "set", self._port, "master", "bridge", "up")
        for change in (
            ["addr", "add", f"{self.address}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
        ):
            here = in_namespaces(self.pid, "ip", *change, options=["--net"])
            subprocess.run(here, check=True)

    def _first_process(self) -> int | None:
        """The process ID of the shell of INIT when that has become `sleep`."""
        for process in psutil.Process(self._holder.pid).children(recursive=True):
            try:
                if process.name() == "sleep":
                    return process.pid
            except psutil.NoSuchProcess:
                continue
        return None

    def private(self, path: Path) -> Path:
        """Where the tests see the node's own content of a private folder."""
        return self.folder / "private" / str(self._network.private.index(path))

    def start(self, *command: object, env: dict[str, str] | None = None) -> Command:
        """Starts a command in the repository."""
        out = self.folder / f"out_{time.monotonic_ns()}.txt"
        with open(out, "w") as file:
            process = subprocess.Popen(
                in_namespaces(
                    self.pid,
                    *("sh", "-c", 'cd "$0"; "$@"; exit $?', ROOT, *command),
                    # nsenter itself would stop with the command
                    options=[*ENTER, "--no-fork"],
                ),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
            )
        return Command(process, out)

    def run(self, *command: object, env: dict[str, str] | None = None) -> tuple[int, str]:
        """Runs a command. Returns its exit status and output."""
        started = self.start(*command, env=env)
        return started.wait(), started.text()

    def processes(self) -> list[psutil.Process]:
        """All its processes, without the first one."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/pid") == self._pid_namespace():
                    found.append(process)
            except OSError:  # it has ended
                continue
        return [process for process in found if process.pid != self.pid]

    def _pid_namespace(self) -> str:
        return os.readlink(f"/proc/{self.pid}/ns/pid")

    # ---------------------------------------------------------------- cuts

    def link_down(self):
        """Cuts its network. No connection is closed; packets are lost."""
        self._network.ip("link", "set", self._port, "down")

    def link_up(self):
        self._network.ip("link", "set", self._port, "up")

    def freeze(self):
        """Stops all its processes. The kernel still acknowledges what they receive."""
        while running := [
            process for process in self.processes() if _status(process) not in ("stopped", "gone")
        ]:
            for process in running:
                _signal(process.pid, signal.SIGSTOP)

    def thaw(self):
        for process in self.processes():
            _signal(process.pid, signal.SIGCONT)

    def kill(self, closes: bool = False):
        """Ends the node with all its processes at once, as a power failure does. closes: the
        network works until then, so that the kernel closes the connections, as when the
        out-of-memory killer ends the job."""
        if not closes:
            self.link_down()
        _signal(self.pid, signal.SIGKILL)
        self._holder.wait(60)
        self.pid = 0
        # the kernel removes the link with the namespace, a moment later
        subprocess.run(self._network.ip_command("link", "delete", self._port), capture_output=True)


def _status(process: psutil.Process) -> str:
    try:
        found = process.status()
    except psutil.NoSuchProcess:
        return "gone"
    return "gone" if found in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else found


def _signal(pid: int, number: int):
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has ended
        return


class Network:
    """node1 to node<count>, connected by a bridge.

    private: folders of which each node has its own, empty at the beginning.
    trap: each node's own name resolves to 127.0.1.1, as Debian's installer sets it up.
    """

    def __init__(self, folder: Path, count: int, private: Sequence[Path] = (), trap: bool = False):
        self.folder, self.count, self.private, self.trap = folder, count, list(private), trap
        self._holder = subprocess.Popen(
            [
                *UNSHARE,
                "sh",
                "-ec",
                "ip link add bridge type bridge; ip link set bridge up; exec cat",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        self.nodes: list[Node] = []
        try:
            children = psutil.Process(self._holder.pid).children
            wait_until(lambda: [c for c in children() if c.name() == "cat"], self._holder)
            (first,) = children()
            self.pid = first.pid
            for number in range(1, count + 1):
                self.nodes.append(Node(self, number))
        except BaseException:
            self.stop()
            raise

    def ip_command(self, *arguments: object) -> list[str]:
        return in_namespaces(self.pid, "ip", *arguments, options=["--net"])

    def ip(self, *arguments: object):
        """Runs ip where the bridge is."""
        subprocess.run(self.ip_command(*arguments), check=True)

    def stop(self):
        """Ends all processes of all nodes."""
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        try:
            self._holder.wait(60)
        finally:
            self._holder.kill()
        for node in self.nodes:
            node._holder.wait(60)
