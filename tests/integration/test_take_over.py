"""A run whose process does not respond is taken over by the same command. When the earlier process
continues, at whatever instant it was stopped, it ends and changes nothing."""

import signal
import socket

import psutil
import pytest

from tests.integration.runs import assert_same_run, options

MORE = {
    "model.arch": "test_resnet",
    "checkpoint.keep": 1,
    "checkpoint.every_minutes": 0,
    "training.optimizer": "sgd",
    "lr.lr": 0.05,
}
# Code for Run(prepare=...): `before(module, name, condition)` makes the process stop itself before
# the first call of a function for which `condition(*arguments)` is true. When it continues, it
# makes this call before it ends.
BEFORE = """
import json, os, signal, threading
from pathlib import Path
from rsb_ffcv import atomic
stopped, called, leave = [], threading.Event(), os._exit
def stop():
    stopped.append(True)
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
def leave_after_call(status):
    if stopped:
        called.wait()
    leave(status)
os._exit = leave_after_call
def before(module, name, condition):
    plain = getattr(module, name)
    def replaced(*arguments, **named):
        if stopped or not condition(*map(str, arguments)):
            return plain(*arguments, **named)
        stop()
        try:
            return plain(*arguments, **named)
        finally:
            called.set()
    setattr(module, name, replaced)
"""
INSTANTS = {
    "creation of a file": """
atomic.open = open
before(atomic, "open", lambda path, mode: "_000000006.pt" in path and mode == "wb")
""",
    "rename of a checkpoint": 'before(os, "replace", lambda _, to: to.endswith("_000000006.pt"))',
    "removal of a checkpoint": 'before(os, "replace", lambda _, to: to.endswith("03.pt.removed"))',
    "rename of best.pt": 'before(os, "replace", lambda _, to: to.endswith("/best.pt"))',
    "middle of the log": 'before(json, "dumps", lambda row, **_: "\'epoch\': 1, " in row)',
    "opening of training.log": """
before(
    os, "open",
    lambda path, *_: path.endswith("training.log") and "epoch 2" in Path(path).read_text()
)
""",
    "line of training.log": """
class Opened:
    def __init__(self, file):
        self.file = file
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()
        if stopped:
            called.set()
    def write(self, content):
        if not stopped and b"epoch 2/3" in content:
            stop()
        self.file.write(content)
atomic.open = lambda file, mode: Opened(open(file, mode)) if mode == "ab" else open(file, mode)
""",
    "release": 'before(os, "rename", lambda _, to: "/.released-" in to)',
}
NO_LOCKS = """
import errno, fcntl
def refuse(*_):
    raise OSError(errno.{name}, "no locks here")
fcntl.flock = refuse
"""


@pytest.fixture(scope="module")
def whole(betons, tmp_path_factory, train):
    folder = tmp_path_factory.mktemp("whole") / "run"
    statuses, _, err = train(options(betons, folder, **MORE)).wait()
    assert statuses == [0], err
    return folder


def content(folder):
    """Everything in a folder, with the times at which it was changed."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


def is_stopped(process):
    return psutil.Process(process).status() == psutil.STATUS_STOPPED


@pytest.mark.parametrize(
    "instant, locks",
    [
        ("rename of a checkpoint", ""),
        ("opening of training.log", "ENOLCK"),
        *(
            pytest.param(instant, locks, marks=pytest.mark.long)
            for instant in INSTANTS
            for locks in ("", "EOPNOTSUPP")
        ),
    ],
)
def test_process_that_was_stopped_writes_nothing_after_its_run_was_taken_over(
    betons, whole, tmp_path, train, instant, locks
):
    system = NO_LOCKS.format(name=locks) if locks else ""
    flags = options(betons, tmp_path / "run", **MORE, **{"dist.timeout_s": 1})
    check(train, flags, tmp_path / "run", prepare=(system, BEFORE + INSTANTS[instant]))
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.long
@pytest.mark.parametrize("name", ["open", "replace"])
def test_tensorboard_of_a_process_that_was_stopped_does_not_change(
    betons, whole, tmp_path, train, name
):
    """It is stopped before it opens an event file, or before it creates one."""
    pytest.importorskip("tensorboard")
    more = {"dist.timeout_s": 1, "logging.trackers": "tensorboard"}
    at = f'before(os, "{name}", lambda *paths: "events.out" in "".join(paths[:2]))'
    flags = options(betons, tmp_path / "run", **MORE, **more)
    check(train, flags, tmp_path / "run", prepare=("", BEFORE + at))
    assert_same_run(tmp_path / "run", whole)
    assert list((tmp_path / "run" / "tensorboard" / "epoch").glob("events.out.*"))


def check(train, flags, folder, prepare):
    """A run stops itself, the same command takes it over and finishes, and the first process goes
    on. prepare: code for both, and for the first."""
    stopped = train(flags, prepare="".join(prepare))
    stopped.wait_until(lambda: is_stopped(stopped.processes[0]))
    statuses, _, err = train(flags, prepare=prepare[0]).wait()
    assert statuses == [0] and "this process takes over the run" in err, err
    before = content(folder)
    stopped.signal(signal.SIGCONT)
    statuses, _, err = stopped.wait()
    assert statuses == [3] and content(folder) == before, err
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert line == (
        f"error: logging.folder={folder}: another process has taken over this run (generation 2) "
        f"while this one did not respond; this process ends and writes nothing"
    )
    assert "warning" not in err and "Traceback" not in err


def test_earlier_process_that_continues_during_the_run_of_the_later_one_ends(
    betons, whole, tmp_path, train
):
    folder = tmp_path / "run"
    flags = options(betons, folder, **MORE, **{"dist.timeout_s": 1})
    earlier = train(flags, stop_at=("epoch 2", 1))
    earlier.wait_for_stop()
    earlier.signal(signal.SIGSTOP)
    later = train(flags, stop_at=("epoch 3", 1))
    later.wait_for_stop()
    earlier.go_on()
    earlier.signal(signal.SIGCONT)
    statuses, _, err = earlier.wait()
    assert statuses == [3] and err.count("error:") == 1, err
    assert f"process {later.processes[0]}) has taken over this run (generation 2)" in err
    later.go_on()
    statuses, _, err = later.wait()
    assert statuses == [0], err
    assert_same_run(folder, whole)


def test_second_run_in_a_folder_is_refused_without_a_change(betons, tmp_path, train):
    """With and without file locks."""
    folder = tmp_path / "run"
    for system in ("", NO_LOCKS.format(name="ENOLCK")):
        flags = options(betons, folder, **MORE)
        first = train(flags, stop_at=("epoch 1", 1), prepare=system)
        first.wait_for_stop()
        statuses, _, err = train(flags, prepare=system).wait()
        assert statuses == [2], err
        who = f"process {first.processes[0]} on {socket.gethostname()}"
        assert f"another process is training in this folder ({who}); wait for it" in err
        first.kill()
        assert first.wait()[0] == [-signal.SIGKILL]
    # The killed process was one of this machine: nobody waits for it
    statuses, _, err = train(flags, prepare=system).wait()
    assert statuses == [0] and "takes over" not in err, err


@pytest.mark.long
def test_job_whose_first_process_was_stopped_goes_on_elsewhere(betons, tmp_path, train):
    """The second process ends because the first one is silent, and the job is started again on
    another machine. Then the first process continues."""
    more = {**MORE, "training.batch_size": 8, "data.num_workers": 1, "dist.timeout_s": 10}
    statuses, _, err = train(options(betons, tmp_path / "whole", **more), 2).wait()
    assert statuses == [0, 0], err
    flags = options(betons, tmp_path / "run", **more)
    job = train(flags, 2, stop_at=("epoch 2", 1))
    job.wait_for_stop()
    job.signal(signal.SIGSTOP, rank=0)
    job.go_on()
    (status,), _, err = job.wait(rank=1)
    assert status == 3 and "process 0" in err and "did not respond for 10 s" in err, err
    elsewhere = """
import socket
from rsb_ffcv.training import lease
this_process = lease._this_process
lease._this_process = lambda timeout_s: this_process(timeout_s)._replace(host="b", boot="b")
"""
    statuses, _, later = train(flags, 2, prepare=elsewhere).wait()
    assert statuses == [0, 0] and "this process takes over the run" in later, later
    before = content(tmp_path / "run")
    job.signal(signal.SIGCONT, rank=0)
    (status,), _, both = job.wait(rank=0)
    assert status == 3 and content(tmp_path / "run") == before, both
    assert both.count("error:") == err.count("error:") + 1 and "Traceback" not in both
    assert "has taken over this run (generation 2)" in both.removeprefix(err)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
