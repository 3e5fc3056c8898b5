"""Jobs of torchrun on the nodes of a network."""

import re
import sys
from collections.abc import Sequence

from tests.cluster.nodes import Command, Node
from tests.stops import Stop, wait_until

PORT = 29400
# A node counts as lost after 10 s, and a smaller job starts 5 s after it has enough nodes.
RENDEZVOUS = "keep_alive_interval=2,keep_alive_max_attempt=5,last_call_timeout=5"


class Job:
    """torchrun on each of `nodes`, with tests/stops.py, which is train_imagenet.py with a stop.

    nnodes, nproc: its options --nnodes and --nproc-per-node.
    flags: options of train_imagenet.py.
    endpoint: host name of the store; None: of the first node.
    more: more options of torchrun.
    stop: the point at which the run is held.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        flags: Sequence[str],
        *,
        nnodes: str = "",
        nproc: int = 1,
        endpoint: str | None = None,
        more: Sequence[str] = (),
        stop: Stop | None = None,
        env: dict[str, str] | None = None,
        program: str = "tests/stops.py",
    ):
        self.nodes = nodes
        self._env = {**(stop.env if stop else {}), **(env or {})}
        self._command = [
            *(sys.executable, "-m", "torch.distributed.run"),
            f"--nnodes={nnodes or len(nodes)}",
            f"--nproc-per-node={nproc}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={endpoint or nodes[0].name}:{PORT}",
            *more,
        ]
        self._program, self._id = [program, *flags], 0
        # of each node, in the order of their starts
        self.started: dict[str, list[Command]] = {node.name: [] for node in nodes}
        for node in nodes:
            self.start_on(node)

    def start_on(self, node: Node):
        """Starts torchrun on a node, also on one that has returned."""
        command = [*self._command, f"--rdzv-id=test{self._id}", *self._program]
        self.started[node.name].append(node.start(*command, env=self._env))

    def start_again(self):
        """Starts all of the job again, with another --rdzv-id."""
        for node in self.nodes:
            if self.started[node.name][-1].poll() is None:
                self.started[node.name][-1].kill()
                self.started[node.name][-1].process.wait()
        self._id += 1
        for node in self.nodes:
            self.start_on(node)

    def text(self, *nodes: Node) -> str:
        """What the job has printed on these nodes; on all of them if none is given."""
        return "".join(
            command.text() for node in nodes or self.nodes for command in self.started[node.name]
        )

    def errors(self, *nodes: Node) -> list[str]:
        """The lines of text() that report an error of the run."""
        return re.findall(r"^(?:\[\S+\]:)?error: .*", self.text(*nodes), re.M)

    def statuses(self, *nodes: Node) -> list[int]:
        """The exit statuses of the processes that another one's end has ended. torchrun does not
        print them if it waits for a lost store (docs/nodes.md)."""
        return [
            int(status) for status in re.findall(r"^exit status (\d+)", self.text(*nodes), re.M)
        ]

    def wait_until(self, condition, node: Node | None = None):
        """Returns when `condition()` is true. Fails the test if the newest torchrun of `node` (the
        first one) ends before."""
        wait_until(condition, self.started[(node or self.nodes[0]).name][-1])

    def wait(self, *nodes: Node) -> list[int]:
        """The exit statuses of the newest torchrun of each of these nodes; of all if none is
        given."""
        return [self.started[node.name][-1].wait() for node in nodes or self.nodes]
