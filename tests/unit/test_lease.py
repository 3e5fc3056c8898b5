"""The lease of a run's folder: who may take it, when, and that only one process does."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import psutil
import pytest

from rsb_ffcv import InputError, atomic
from rsb_ffcv.training import lease
from rsb_ffcv.training.checkpoint import Store
from tests.stops import wait_until

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from rsb_ffcv.training import lease
try:
    held = lease.take(Path(sys.argv[1]), float(sys.argv[2]))
except BlockingIOError:
    print("busy", flush=True)
else:
    print(held.generation, flush=True)
    sys.stdin.read()
    held.close()
"""


class Ended(Exception):
    """Instead of the end of the process."""


@pytest.fixture
def ended(monkeypatch):
    def end(self):
        raise Ended

    monkeypatch.setattr(lease.Lease, "_end_process", end)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only sleeping advances. `at`: {seconds: function that is called then}."""
    found = types.SimpleNamespace(now=0.0, at={})

    def sleep(seconds):
        found.now += seconds
        for due in [due for due in found.at if due <= found.now]:
            found.at.pop(due)()

    fake = types.SimpleNamespace(monotonic=lambda: found.now, sleep=sleep)
    monkeypatch.setattr(lease, "time", fake)
    return found


@pytest.fixture
def frequent(monkeypatch):
    """Signs of life come more often than processes can be late."""
    monkeypatch.setattr(lease, "seconds_between_signs", lambda timeout_s: 0.2)


def start(folder, timeout_s: float = 20):
    """A process that takes the lease and holds it until its stdin is closed."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(timeout_s)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def holding(tmp_path):
    """A process that holds the lease of generation 1 of tmp_path, with a timeout of 20 s."""
    process = start(tmp_path)
    assert process.stdout.readline() == "1\n"
    yield process
    process.kill()
    process.wait()


def leave(folder, generation=3, **changes):
    """A lease as a process of another machine leaves it. Returns its folder."""
    path = folder / f".lease-{generation:06d}"
    (path / "place").mkdir(parents=True)
    (path / "place" / "alive").write_bytes(b"5")
    about = lease._this_process(40.0)._asdict() | {"host": "far", "boot": "another"} | changes
    (path / "holder").write_text(json.dumps(about))
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_generations_count_starts_and_leave_one_folder(tmp_path):
    for generation in (1, 2, 3):
        held = lease.take(tmp_path, 1)
        assert held.generation == generation and names(tmp_path) == [f".lease-{generation:06d}"]
        held.close()
        assert names(tmp_path) == [f".released-{generation:06d}"]
        assert not list((tmp_path / f".released-{generation:06d}").iterdir())
    held.close()  # without effect


@pytest.mark.parametrize("known", [True, False])
def test_lease_of_a_killed_process_of_this_machine_is_taken_at_once(
    tmp_path, holding, clock, known
):
    """Also if its parent does not know yet that it has ended."""
    holding.kill()
    if known:
        holding.wait()
    else:
        tasks = Path(f"/proc/{holding.pid}/task")
        until = time.monotonic() + 60
        while psutil.Process(holding.pid).status() != "zombie" or len(list(tasks.iterdir())) > 1:
            assert time.monotonic() < until
    held = lease.take(tmp_path, 1)
    assert held.generation == 2 and clock.now == 0 and names(tmp_path) == [".lease-000002"]
    held.close()


def test_process_with_the_id_of_a_killed_one_does_not_delay_it(tmp_path, clock):
    here = lease._this_process(40.0)
    leave(tmp_path, boot=here.boot, started=here.started + 1)
    held = lease.take(tmp_path, 1)
    assert held.generation == 4 and clock.now == 0
    held.close()


def test_stopped_process_is_given_its_timeout(tmp_path, holding, clock, capsys):
    """Its file lock is held, and its own timeout counts, not that of the process that waits."""
    holding.send_signal(signal.SIGSTOP)
    wait_until(lambda: psutil.Process(holding.pid).status() == "stopped", holding)
    held = lease.take(tmp_path, 1000)
    assert held.generation == 2 and 20 <= clock.now < 21
    first, second = capsys.readouterr().err.splitlines()
    assert f"process {holding.pid} on " in first and "does not respond; waiting" in first
    assert "has not responded for 20 s; this process takes over the run" in second
    held.close()


def test_process_that_runs_keeps_the_lease(tmp_path, holding):
    who = rf"another process is training in this folder \(process {holding.pid} on \S+\); wait"
    with pytest.raises(InputError, match=who):
        Store(tmp_path, 1).lock()
    assert names(tmp_path) == [".lease-000001"]
    holding.stdin.close()
    holding.wait()
    store = Store(tmp_path, 1)
    store.lock()
    store.close()
    assert names(tmp_path) == [".released-000002"]


@pytest.mark.parametrize("locks, seconds", [("free", 12), ("held", 40), ("none", 40)])
def test_silent_process_of_another_machine(tmp_path, monkeypatch, clock, locks, seconds):
    """With a timeout of 40 s it gives a sign of life every 4 s. If its lock is free, three missing
    signs are enough."""
    path = leave(tmp_path)
    with open(path / "holder", "rb") as file:
        if locks == "held":
            fcntl.flock(file, fcntl.LOCK_EX)
        if locks == "none":

            def refuse(*_):
                raise OSError(errno.ENOLCK, "No locks")

            monkeypatch.setattr(fcntl, "flock", refuse)
        held = lease.take(tmp_path, 1000)
    assert held.generation == 4 and seconds <= clock.now <= seconds + 2
    assert names(tmp_path) == [".lease-000004"]
    held.close()


@pytest.mark.parametrize("after", [0.5, 11])
def test_sign_of_life_ends_the_waiting(tmp_path, clock, after):
    path = leave(tmp_path)
    clock.at[after] = lambda: (path / "place" / "alive").write_bytes(b"6")
    with pytest.raises(BlockingIOError):
        lease.take(tmp_path, 1000)
    assert after <= clock.now <= after + 2 and names(tmp_path) == [".lease-000003"]


def test_time_in_which_the_file_system_does_not_respond_is_no_silence(tmp_path, clock, monkeypatch):
    """Nor is that in which the process that waits is stopped."""
    path = leave(tmp_path)
    read, moments = lease._signs, []

    def slow(path):
        found = read(path)
        moments.append(clock.now)
        clock.now += 1000
        return found

    monkeypatch.setattr(lease, "_signs", slow)
    clock.at[2500] = lambda: (path / "place" / "alive").write_bytes(b"6")
    with pytest.raises(BlockingIOError):
        lease.take(tmp_path, 1000)
    assert len(moments) == 4 and names(tmp_path) == [".lease-000003"]


def test_lease_that_is_released_or_taken_while_another_process_waits(tmp_path, clock, monkeypatch):
    path = leave(tmp_path)
    clock.at[1] = lambda: path.rename(tmp_path / ".released-000003")
    held = lease.take(tmp_path, 1000)
    assert held.generation == 4 and clock.now <= 2
    held.close()
    path = leave(tmp_path, 5)

    def take_over():
        path.rename(tmp_path / ".revoked-000005")
        newer = leave(tmp_path, 6)
        clock.at[clock.now + 3] = lambda: (newer / "place" / "alive").write_bytes(b"6")

    clock.at[clock.now + 1] = take_over
    with pytest.raises(BlockingIOError):
        lease.take(tmp_path, 1000)


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"host": "a", "boot": "b", "namespace": "c", "pid": "1", "started": 1, "timeout_s": 1}',
        b'{"host": "a", "boot": "b", "namespace": "c", "pid": -1, "started": 1, "timeout_s": 1}',
        b'{"host": "a", "boot": "%BOOT%", "namespace": "%NAMESPACE%", "pid": 1e9, "started": 1, '
        b'"timeout_s": 1}',
        b'{"host": "a", "boot": "%BOOT%", "namespace": "%NAMESPACE%", "pid": 1000000000000, '
        b'"started": 1, "timeout_s": 1}',
        b'{"host": "a\\nb", "boot": "b", "namespace": "c", "pid": 1, "started": 1, "timeout_s": 1}',
        b"[" * 100_000,
        b'{"host": "a", "boot": "b", "namespace": 3, "pid": 1, "started": 1, "timeout_s": 1}',
        b'{"host": "a", "boot": "b", "namespace": "c", "pid": 1, "started": 1, "timeout_s": 1e99}',
        b'{"host": "a", "boot": "b", "namespace": "c", "pid": 1, "started": 1, "timeout_s": NaN}',
    ],
)
def test_damaged_holder_does_not_block_the_folder_for_ever(tmp_path, clock, content, capsys):
    """The timeout of the process that waits counts."""
    path = leave(tmp_path)
    (path / "holder").unlink()
    if content is not None:
        here = lease._this_process(1)
        content = content.replace(b"%BOOT%", here.boot.encode())
        (path / "holder").write_bytes(content.replace(b"%NAMESPACE%", here.namespace.encode()))
    held = lease.take(tmp_path, 20)
    assert held.generation == 4 and clock.now <= 22
    assert clock.now >= (20 if content is None else 6)
    assert capsys.readouterr().err.count("\n") == 2  # waiting, and taking over
    held.close()


def test_one_of_many_threads_takes_the_lease_of_a_dead_process(tmp_path, holding, frequent):
    holding.kill()
    holding.wait()
    for _round in range(5):
        count = 12
        barrier, results = threading.Barrier(count), list[lease.Lease | None]()

        def attempt(barrier=barrier, results=results):
            barrier.wait()
            try:
                results.append(lease.take(tmp_path, 20))
            except BlockingIOError:
                results.append(None)

        threads = [threading.Thread(target=attempt) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [held for held in results if held]
        assert len(results) == count and names(tmp_path) == [f".lease-{winner.generation:06d}"]
        winner.check()
        winner._released.set()  # as if killed: its lease stays, with the holder below
        winner._thread.join()
        lease._held.discard(winner)
        winner._open.close()
        path = tmp_path / f".lease-{winner.generation:06d}" / "holder"
        about = json.loads(path.read_text())
        path.write_text(json.dumps({**about, "started": about["started"] + 1}))


def test_one_of_many_processes_takes_the_lease(tmp_path, holding):
    holding.kill()
    holding.wait()
    processes = [start(tmp_path) for _ in range(6)]
    answers = [process.stdout.readline().strip() for process in processes]
    (winner,) = [answer for answer in answers if answer != "busy"]
    assert names(tmp_path) == [f".lease-{int(winner):06d}"]
    for process in processes:
        process.communicate()
        assert process.returncode == 0


def test_no_two_threads_hold_the_lease_while_it_changes_hands(tmp_path, frequent):
    """Released leases are taken again all the time, also with numbers that were read long ago."""
    inside, most, taken, errors = 0, 0, 0, []
    counter = threading.Lock()

    def work():
        nonlocal inside, most, taken
        try:
            for _ in range(15):
                try:
                    held = lease.take(tmp_path, 20)
                except BlockingIOError:
                    continue
                with counter:
                    inside, taken = inside + 1, taken + 1
                    most = max(most, inside)
                held.check()
                with counter:
                    inside -= 1
                held.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and most == 1 and taken > 10
    assert len(names(tmp_path)) == 1


USE = """
import fcntl, os, random, signal, sys
from pathlib import Path
from rsb_ffcv.training import lease
lease.seconds_between_signs = lambda timeout_s: 0.2
folder, dies = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
for _ in range(10):
    try:
        held = lease.take(folder, 60)
    except BlockingIOError:
        continue
    with open(folder.with_name("used"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print(held.generation, file=file, flush=True)
        held.check()
        if dies.random() < 0.3:
            os.kill(os.getpid(), signal.SIGKILL)
    held.close()
"""


@pytest.mark.long
def test_no_two_processes_hold_the_lease_while_some_are_killed(tmp_path, report):
    """Each locks a file while it holds the lease: that fails if another process holds it too."""
    (tmp_path / "run").mkdir()
    for block in range(10):
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", USE, str(tmp_path / "run"), str(6 * block + number)],
                cwd=ROOT,
            )
            for number in range(6)
        ]
        assert {process.wait() for process in processes} <= {0, -signal.SIGKILL}
    used = [int(line) for line in (tmp_path / "used").read_text().splitlines()]
    assert used == sorted(set(used)) and len(used) > 60
    report(f"{len(used)} leases of 60 processes")


def test_number_that_was_read_long_ago_is_not_used(tmp_path, monkeypatch):
    """A slow process read generation 1; since then, 2 has come and gone and 3 is held."""
    (tmp_path / ".released-000001").mkdir()
    slow = lease.Lease(tmp_path, 2, 1)
    for _ in range(2):
        held = lease.take(tmp_path, 1)
        if held.generation == 2:
            held.close()
    assert not slow.begin() and names(tmp_path) == [".lease-000003"]
    held.check()
    held.close()


def test_revocation_that_was_interrupted_is_completed(tmp_path):
    """A process was killed after it had revoked a lease. The appended files are copied: the earlier
    process may have opened them."""
    (tmp_path / "log").write_text("text")
    (tmp_path / ".revoked-000005" / "place").mkdir(parents=True)
    (tmp_path / ".revoked-000005" / "place" / "file").touch()
    with open(tmp_path / "log", "a") as earlier:
        held = lease.take(tmp_path, 1, ("log",))
        earlier.write("more")
    assert (tmp_path / "log").read_text() == "text" and held.generation == 6
    assert names(tmp_path) == [".lease-000006", "log"]
    held.close()
    inode = (tmp_path / "log").stat().st_ino
    lease.take(tmp_path, 1, ("log",)).close()
    assert (tmp_path / "log").stat().st_ino == inode  # not after a release


@pytest.mark.parametrize("name", [".lease-000003", ".released-000003", ".lease_part-3"])
def test_symbolic_link_in_place_of_a_lease_is_removed_without_what_it_names(tmp_path, clock, name):
    (tmp_path / "other" / "folder").mkdir(parents=True)
    (tmp_path / "other" / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "other")
    held = lease.take(tmp_path / "run", 1)
    assert names(tmp_path / "run") == [held._path.name]
    assert names(tmp_path / "other") == ["file", "folder"]
    held.close()


def test_disk_that_is_full_at_the_start_keeps_nothing_of_the_lease(tmp_path):
    """The limit on a file's size fails at the same write as a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        with pytest.raises(InputError, match="logging.folder=.*: cannot be used"):
            Store(tmp_path, 1).lock()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


def test_process_whose_lease_was_taken_notices(tmp_path, ended, clock):
    """By its check, and by the attempt to release it; not by an error alone."""
    held = lease.take(tmp_path, 1)
    held.check()
    path = tmp_path / ".lease-000001"
    path.rename(tmp_path / ".revoked-000001")
    with pytest.raises(Ended):
        held.check()
    with pytest.raises(Ended):
        held.close()
    held._open.close()


def test_lease_that_was_removed_by_hand_is_named(tmp_path, ended):
    held = lease.take(tmp_path, 20)
    shutil.rmtree(tmp_path / ".lease-000001")
    reason = r"cannot be written \(the lease of this run, .lease-000001, was removed\); free space"
    with pytest.raises(InputError, match=reason), atomic.atomic_file(tmp_path / "a", "free space"):
        pass
    held.close()
    assert names(tmp_path) == []


def test_folder_that_was_removed_and_made_again_belongs_to_the_new_process(tmp_path, ended):
    """Its generation is the same one again."""
    folder = tmp_path / "run"
    folder.mkdir()
    held = lease.take(folder, 1)
    held._released.set()  # no signs of life from here on
    held._thread.join()
    held._released.clear()
    folder.rename(tmp_path / "old")
    with pytest.raises(FileNotFoundError):
        held.check()  # nobody has the folder: there is none
    folder.mkdir()
    with pytest.raises(FileNotFoundError):
        held.check()
    newer = lease.take(folder, 1)
    assert newer.generation == held.generation
    with pytest.raises(Ended):
        held.check()
    newer.check()
    newer.close()
    with pytest.raises(Ended):
        held.close()
    held._open.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.ENOENT])
def test_error_of_the_file_system_does_not_end_the_run(
    tmp_path, monkeypatch, capsys, ended, number
):
    held = lease.take(tmp_path, 1)
    failed = threading.Event()

    def fail(*_):
        failed.set()
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    if number != errno.ENOENT:  # then the place is still seen
        monkeypatch.setattr(os, "utime", fail)
    for _ in range(3):
        failed.clear()
        assert failed.wait(60)
    monkeypatch.undo()
    held.close()
    err = capsys.readouterr().err
    assert err.count("warning:") == 1 and "the sign of life cannot be written" in err


def test_file_system_that_does_not_respond_delays_the_end_for_a_limited_time(tmp_path, monkeypatch):
    held = lease.take(tmp_path, 1)
    rename, go_on = os.rename, threading.Event()

    def hang(*arguments):
        go_on.wait()
        rename(*arguments)

    monkeypatch.setattr(os, "rename", hang)
    lease.with_held(lease.Lease.release, 0.1)
    assert names(tmp_path) == [".lease-000001"]
    go_on.set()
    held.close()  # waits for the attempt
    assert names(tmp_path) == [".released-000001"]


def test_folder_that_an_earlier_version_uses_is_refused(tmp_path):
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is training in this folder"):
            Store(tmp_path, 1).lock()
    store = Store(tmp_path, 1)
    store.lock()
    store.close()
    assert names(tmp_path) == [".released-000001"]


def test_changes_of_a_process_without_its_place_fail_and_leave_the_folder_alone(tmp_path):
    folder, place = tmp_path / "run", tmp_path / "run" / "place"
    place.mkdir(parents=True)
    (folder / "log").write_text("text")
    calls = []
    with atomic.fenced(folder, place, lambda: calls.append(place.is_dir())):
        with atomic.atomic_file(folder / "file", "fix") as file:
            file.write(b"1")
        atomic.link(folder / "file", folder / "second", "fix")
        atomic.append(folder / "log", b", more")
        atomic.append(folder / "new", b"1")
        atomic.make_folder(folder / "deep" / "er")
        atomic.append(folder / "deep" / "er" / "log", b"1")
        atomic.rename(folder / "new", folder / "renamed")
        atomic.remove(folder / "renamed")
        assert calls == [True]  # of the file that was opened
        assert not list(place.iterdir()) and (folder / "log").read_text() == "text, more"
        assert (folder / "second").samefile(folder / "file")
        assert names(folder) == ["deep", "file", "log", "place", "second"]
        place.rename(tmp_path / "gone")
        before = {path: path.stat() for path in [folder, *folder.rglob("*")]}

        def write():
            with atomic.atomic_file(folder / "file", "fix") as file:
                file.write(b"2")

        for change in (
            write,
            lambda: atomic.link(folder / "log", folder / "second", "fix"),
            lambda: atomic.append(folder / "absent", b"2"),
            lambda: atomic.append(folder / "deep" / "er" / "absent", b"2"),
            lambda: atomic.make_folder(folder / "deep" / "er" / "est"),
            lambda: atomic.rename(folder / "log", folder / "renamed"),
            lambda: atomic.remove(folder / "log"),
        ):
            calls.clear()
            with pytest.raises((OSError, InputError)):
                change()
            assert calls and not any(calls)
        assert {path: path.stat() for path in [folder, *folder.rglob("*")]} == before
    assert not atomic._fences
