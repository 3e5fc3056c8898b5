"""Fixtures of all tests: small datasets, created once per session and read-only, and runs of the
programs."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Timer

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.sizes import LONG
from tests.stops import Stop, wait_until

ROOT = Path(__file__).parents[1]
REPORTED = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[REPORTED] = []


def pytest_collection_modifyitems(items):
    for item in items if not LONG else ():
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="long: RSB_LONG=1, or make test-all"))


@pytest.fixture
def report(request):
    """report(text): adds a line about this test to the summary at the end of the session."""
    return lambda text: request.config.stash[REPORTED].append(f"{request.node.name}: {text}")


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[REPORTED]:
        terminalreporter.section("reported by the tests")
        for line in config.stash[REPORTED]:
            terminalreporter.line(line)


def make_pictures(root: Path) -> None:
    """train/ and val/ with three classes, 32 and 9 pictures per class. The pictures are noise of
    40 .. 90 px whose hue depends on the class."""
    for split, count in (("train", 32), ("val", 9)):
        for label, name in enumerate(("amber", "blue", "cyan")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng([label, number, split == "val"])
                height, width = rng.integers(40, 91, 2)
                pixels = rng.integers(0, 120, (height, width, 3))
                pixels[..., label] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(
                    root / split / name / f"{number}.jpg", quality=92
                )


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    make_pictures(root)
    return root


@pytest.fixture(scope="session")
def betons(pictures, tmp_path_factory) -> Path:
    """A folder with train.beton (96 images) and val.beton (27 images): JPEG, 3 classes."""
    from rsb_ffcv.dataset import Place, write_splits

    folder = tmp_path_factory.mktemp("betons")
    write_splits(Place(dataset="imagenet", data_dir=str(pictures)), str(folder), num_workers=2)
    return folder


@pytest.fixture
def run_program():
    """run(script, arguments): runs an entry script as a user would, and returns (exit status,
    stdout, stderr)."""

    def run(*arguments, timeout=900, env=None, **options):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **(env or {})},
            **options,
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def call_program(capfd):
    """call(script, arguments): runs an entry script's main() in this process, which has already
    imported everything, and returns (exit status, stdout, stderr)."""

    def call(script, *arguments):
        import importlib

        from rsb_ffcv import exit_status

        capfd.readouterr()
        main = importlib.import_module(script.removesuffix(".py")).main
        saved, sys.argv = sys.argv, [script, *map(str, arguments)]
        try:
            status = exit_status(main)
        finally:
            sys.argv = saved
        return status, *capfd.readouterr()

    return call


class Run:
    """A run of train_imagenet.py, with one process or the processes of a job, forked from the
    zygote."""

    def __init__(
        self,
        request,
        folder: Path,
        arguments,
        world: int = 1,
        largest_file: int | None = None,
        stop_at=None,
        prepare: str = "",
        own: dict[int, list[str]] | None = None,
    ):
        self._request, self.out, self.err = request, folder / "out.txt", folder / "err.txt"
        self.out.write_text(""), self.err.write_text("")
        self._stop = stop_at and Stop(stop_at, folder, world)
        job = (
            {
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(a_free_port()),
            }
            if world > 1
            else {}
        )
        self.processes = [
            request(
                start=[*map(str, arguments), *(own or {}).get(rank, [])],
                out=str(self.out),
                err=str(self.err),
                largest_file=largest_file,
                prepare=prepare,
                env={
                    **(self._stop.env if self._stop else {}),
                    **job,
                    **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if job else {}),
                },
            )
            for rank in range(world)
        ]

    def poll(self) -> str | None:
        """Returns None while all its processes run, else the end of its stderr."""
        if all(
            psutil.Process(process).status() != psutil.STATUS_ZOMBIE for process in self.processes
        ):
            return None
        return self.err.read_text()[-2000:] or "no output"

    def wait_until(self, condition):
        wait_until(condition, self)

    def wait_for_stop(self, or_end: bool = False):
        """Returns when all its processes are at `stop_at`. or_end: also when one of them has
        ended."""
        self.wait_until(lambda: self._stop.reached() or or_end and self.poll())

    def go_on(self):
        self._stop.go_on()

    def signal(self, number, rank: int | None = None):
        for process in self.processes if rank is None else [self.processes[rank]]:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def kill(self):
        """Kills all its processes at once, so that none can react to the end of another."""
        self.signal(signal.SIGSTOP)
        self.signal(signal.SIGKILL)

    def wait(self, seconds: float = 600, rank: int | None = None) -> tuple[list[int], str, str]:
        """Returns (exit statuses, stdout, stderr) of one process or all. Kills processes that still
        run after `seconds`."""
        hanging = Timer(seconds, self.signal, [signal.SIGKILL])
        hanging.start()
        statuses = [
            self._request(wait=process)
            for process in (self.processes if rank is None else [self.processes[rank]])
        ]
        hanging.cancel()
        # of each process that was not killed
        self.threads = [path.read_text().split() for path in self.out.parent.glob("*.threads_*")]
        return statuses, self.out.read_text(), self.err.read_text()


@pytest.fixture
def free_port() -> int:
    return a_free_port()


def a_free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def train(tmp_path_factory):
    """train(arguments, world=1, ...): starts train_imagenet.py and returns a Run.

    world: number of processes.
    largest_file: size in bytes above which writing to a file fails, as on a full disk.
    stop_at: the point at which the run is held (see Stop).
    prepare: Python code that each process runs first.
    own: {rank: additional arguments of this process}.
    """
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("zygote.py")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def request(**what):
        process.stdin.write(json.dumps(what) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    assert json.loads(process.stdout.readline()) == "ready"
    yield lambda arguments, world=1, **options: Run(
        request, tmp_path_factory.mktemp("output"), arguments, world, **options
    )
    process.stdin.close()
    process.wait()
