"""The lease of a run's folder: only the process that holds it changes the folder.

The lease of generation N is the folder `.lease-N`. It contains `holder`, which describes the
process, and a folder with a random name, the place of `atomic.fenced`: every change of the run is a
rename out of this place or into it. A thread writes a counter to `alive` in the place, as a sign
that the process runs.

A process that ends renames its lease to `.released-N`. One that is killed leaves it behind. A
process that is stopped, or whose machine is unreachable, keeps it, and may continue at any later
time. So a process that takes the lease over renames it to `.revoked-N` and removes its content.
From then on no change of the earlier process succeeds, without a check that could come too early:
the names that its renames begin or end with are gone. That is so on every file system on which a
rename is atomic, with or without locks.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from rsb_ffcv import duration, first_line, warn
from rsb_ffcv.atomic import NO_LOCKS, atomic_file, fenced

LOST = 3  # exit status: this process can no longer take part in the run
# Kinds of folders: held by a process; ended by its process; taken from its process
HELD, RELEASED, REVOKED = "lease", "released", "revoked"
PREPARED = ".lease_part-"  # beginning of the name of a lease that is not complete
HOLDER, ALIVE = "holder", "alive"
SIGN = b"%020d\n"  # content of ALIVE
NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)  # of renaming to, or removing, a folder with content
LARGEST_TIMEOUT = 86400.0  # largest dist.timeout_s, in seconds
# Signs of life per timeout, and limits of the time between two of them, in seconds
SIGNS, SHORTEST, LONGEST = 10, 0.2, 5.0
# A process whose file lock is gone is considered dead after this number of missing signs. The lock
# alone proves nothing: on some file systems, locks are only known to one machine.
MISSING_SIGNS = 3
ATTEMPTS = 20  # to empty a folder in which an unreachable process may still create a file


class InUse(BlockingIOError):
    """The lease is held by a process that responds. Its text names the process, if that is
    known."""


class _Found(NamedTuple):
    """A folder of some generation. The newest one is the maximum."""

    generation: int
    held: bool
    kind: str
    path: Path


def _find(folder: Path) -> list[_Found]:
    """The leases in `folder`, of all kinds. Raises OSError."""
    pattern = rf"\.({HELD}|{RELEASED}|{REVOKED})-(\d{{6,}})"
    names = [re.fullmatch(pattern, name) for name in os.listdir(folder)]
    return [
        _Found(int(name[2]), name[1] == HELD, name[1], folder / name[0]) for name in names if name
    ]


def _path(folder: Path, kind: str, generation: int) -> Path:
    return folder / f".{kind}-{generation:06d}"


def seconds_between_signs(timeout_s: float) -> float:
    """The time between two signs of life of a process with this dist.timeout_s."""
    return min(LONGEST, max(SHORTEST, timeout_s / SIGNS))


# ---------------------------------------------------------------- who holds it


class Holder(NamedTuple):
    """The process that holds a lease.

    host: name of its machine, for messages.
    boot: ID of this start of the machine. Empty if unknown.
    namespace: of its process ID. Empty if unknown.
    pid: process ID.
    started: when the process started, in clock ticks since the start of the machine.
    timeout_s: its dist.timeout_s.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: int
    timeout_s: float

    def has_ended(self) -> bool:
        """Whether the process was one of this machine and has certainly ended. Its ID may have been
        given to another process since."""
        here = _this_process(0)
        if not self.boot or not self.namespace:
            return False
        if (self.boot, self.namespace) != (here.boot, here.namespace):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        state, started = _state(self.pid)
        if started not in (0, self.started):
            return True
        try:
            # The main thread of a process that is being killed may end before the others
            return state in ("Z", "X") and len(os.listdir(f"/proc/{self.pid}/task")) == 1
        except OSError:  # it was removed from the list of processes meanwhile
            return True


def _state(pid: int) -> tuple[str, int]:
    """State of a process (see proc(5)), and when it started, in clock ticks since the start of the
    machine; "" and 0 if the system does not tell."""
    try:
        # The name in parentheses may contain anything
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return "", 0


def _this_process(timeout_s: float) -> Holder:
    boot = namespace = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    pid = os.getpid()
    return Holder(socket.gethostname(), boot, namespace, pid, _state(pid)[1], timeout_s)


def _read_holder(path: Path) -> Holder | None:
    """The holder of the lease at `path`. None if its file is missing or damaged."""
    try:
        found = Holder(**json.loads((path / HOLDER).read_text()))
        valid = (
            # In messages, which are one line
            all(isinstance(text, str) and text.isprintable() for text in found[:3])
            and all(type(number) is int for number in (found.pid, found.started))
            and 0 < found.pid < 2**31  # what os.kill takes
            and found.started >= 0
            and 0 < found.timeout_s <= LARGEST_TIMEOUT
        )
        return found if valid else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _lock_is_free(path: Path) -> bool:
    """Whether the file system has locks, and no process has that of the lease at `path`."""
    try:
        with open(path / HOLDER, "rb") as file:
            # Shared, so that two processes that look at the same time do not see each other
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except OSError as error:
        # The second group: it is locked, or gone
        if error.errno not in {*NO_LOCKS, errno.EWOULDBLOCK, errno.ENOENT, errno.ESTALE}:
            raise
        return False


# ---------------------------------------------------------------- taking it


def take(folder: Path, timeout_s: float, appended: tuple[str, ...] = ()) -> "Lease":
    """Takes the lease of `folder`, which exists. Waits until a process that does not respond has
    been silent for its timeout.

    Clocks of machines are not compared: this process measures how long it sees no sign.

    timeout_s: dist.timeout_s of this process.
    appended: patterns of the files that `atomic.append` writes.

    Raises InUse if another process holds the lease and responds, OSError if the folder cannot be
    used, and InputError if an appended file cannot be copied.
    """
    while True:
        newest = max(_find(folder), default=None)
        if newest and newest.held:
            _wait_for_end(newest.path, timeout_s)
            if not _retire(newest.path, REVOKED, newest.generation):
                continue  # it was released meanwhile, or another process was faster
        lease = Lease(folder, newest.generation + 1 if newest else 1, timeout_s)
        if lease.begin():
            break
    try:
        _clear_earlier(folder, lease.generation, appended)
    except BaseException:
        lease.close()
        raise
    return lease


def _wait_for_end(path: Path, timeout_s: float) -> None:
    """Returns when the process that holds the lease at `path` has released it, has ended, or has
    been silent for long enough. Raises InUse if it gives a sign of life."""
    holder = _read_holder(path)
    if holder and holder.has_ended():
        return
    timeout_s = holder.timeout_s if holder else timeout_s
    who = f"process {holder.pid} on {holder.host}" if holder else "a process"
    what = f"logging.folder={path.parent}: {who}, which trained in this folder,"
    between = seconds_between_signs(timeout_s)
    # The time that this process has watched: not that in which it was stopped itself, or in which
    # the file system has not responded to it, and so not to the other process
    before, silent, announced = _signs(path), 0.0, False
    while True:
        limit = min(MISSING_SIGNS * between, timeout_s) if _lock_is_free(path) else timeout_s
        if silent >= limit:
            break
        if not announced and silent > 2 * between:
            announced = True
            warn(f"{what} does not respond; waiting {duration(limit - silent)} before taking over")
        time.sleep(between / 4)
        silent += between / 4
        now = _signs(path)
        if now is None or holder and holder.has_ended():
            return
        if now != before:
            raise InUse(f"process {holder.pid} on {holder.host}" if holder else "")
    warn(f"{what} has not responded for {duration(silent)}; this process takes over the run")


def _signs(path: Path) -> list[bytes] | None:
    """The counter of the lease at `path`, in a list; None if there is no lease any more. Opening a
    file makes a network file system ask for its present content."""
    try:
        places = [path / name / ALIVE for name in os.listdir(path)]
    except FileNotFoundError:
        return None
    found = []
    for alive in places:
        with suppress(FileNotFoundError, NotADirectoryError):
            found.append(alive.read_bytes())
    return found


def _retire(path: Path, kind: str, generation: int) -> bool:
    """Renames the lease at `path` to another kind. Returns False if it is gone."""
    while True:
        try:
            os.rename(path, _path(path.parent, kind, generation))
            return True
        except FileNotFoundError:
            return False
        except OSError as error:
            # The other kind of this generation exists: a process was killed in `begin`
            if error.errno not in NOT_EMPTY:
                raise
            generation += 1


def _clear_earlier(folder: Path, generation: int, appended: tuple[str, ...]) -> None:
    """Removes the folders of earlier generations. After a revocation, it first replaces the
    appended files by copies: the earlier process may have opened them.

    On NFS, the machine of the earlier process may keep the handle of a folder that was renamed. Its
    changes would still find the folder, so it is not enough to rename it: the place is removed,
    and the handle becomes stale.
    """
    earlier = [found for found in _find(folder) if found.generation < generation]
    for found in earlier:
        if not found.path.is_symlink():  # whose content belongs to others
            for name in os.listdir(found.path):
                _remove(found.path / name)
    if any(found.kind != RELEASED for found in earlier):
        for pattern in appended:
            for path in filter(Path.is_file, folder.glob(pattern)):
                fix = "free space, correct the permissions, or choose another logging.folder"
                with open(path, "rb") as whole, atomic_file(path, fix) as file:
                    shutil.copyfileobj(whole, file)
    for path in [*(found.path for found in earlier), *folder.glob(f"{PREPARED}*")]:
        _remove(path)


def _remove(path: Path) -> None:
    """Removes a file, a folder, or a symbolic link without what it names. Raises OSError.

    A process of this machine may have files of an NFS folder open. Their names, .nfs..., stay until
    it closes them, and so does the folder. That is safe: on one machine, no handle is kept.
    """
    for attempt in range(ATTEMPTS):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (*NOT_EMPTY, errno.EBUSY):
                raise
            left = [file.name for file in path.rglob("*") if not file.is_dir()]
            if left and all(name.startswith(".nfs") for name in left):
                return
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(0.05)


# ---------------------------------------------------------------- holding it


class Lease:
    """The lease of `folder`. See `take`.

    generation: one more than that of the lease before it.
    timeout_s: dist.timeout_s of this process.
    """

    def __init__(self, folder: Path, generation: int, timeout_s: float) -> None:
        self.folder, self.generation, self._timeout_s = folder, generation, timeout_s
        self._path = _path(folder, HELD, generation)
        # The random name tells this lease from one of a folder that was removed and made again
        self._place = self._path / uuid.uuid4().hex[:12]
        self._between, self._signs = seconds_between_signs(timeout_s), 0
        self._released, self._releasing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._open = ExitStack()

    def begin(self) -> bool:
        """Creates the lease. Returns False if another process has this generation or a later one.
        Raises OSError.

        The lease is complete when it gets its name, so none is without a holder. A folder cannot
        get the name of another one that is not empty.
        """
        prepared = self.folder / f"{PREPARED}{self._place.name}"
        try:
            (prepared / self._place.name).mkdir(parents=True)
            (prepared / self._place.name / ALIVE).write_bytes(SIGN % 0)
            # Stays open: closing the file releases its lock
            file = self._open.enter_context(open(prepared / HOLDER, "w"))  # noqa: SIM115
            json.dump(_this_process(self._timeout_s)._asdict(), file)
            file.flush()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            os.rename(prepared, self._path)
            # This process may have looked for the newest generation long ago
            others = [found for found in _find(self.folder) if found.path != self._path]
            if any(found.generation >= self.generation for found in others):
                os.rename(self._path, prepared)
        except OSError as error:
            # Missing: the process that has the lease has removed what it found
            if error.errno not in (errno.ENOENT, *NOT_EMPTY):
                self._give_up(prepared)
                raise
        if not self._place.is_dir():
            self._give_up(prepared)
            return False
        _held.add(self)
        self._open.enter_context(fenced(self.folder, self._place, self.check))
        self._thread.start()
        return True

    def _give_up(self, prepared: Path) -> None:
        with suppress(OSError):  # a full disk: closing the file tries once more to write it
            self._open.close()
        shutil.rmtree(prepared, ignore_errors=True)

    def check(self) -> None:
        """Ends this process if the lease was taken from it. Raises OSError, with the reason as its
        text, if the lease is gone or cannot be seen.

        An error alone does not show that: the file system may have failed. The place must be
        missing, and the folder must have a lease of another process, of any kind.
        """
        try:
            # It changes something, so that NFS asks the server and not its cache
            os.utime(self._place)
        except FileNotFoundError:
            if not self._released.is_set() and _find(self.folder):
                self._end_process()
            raise FileNotFoundError(
                errno.ENOENT, f"the lease of this run, {self._path.name}, was removed"
            ) from None

    def release(self) -> None:
        """Ends the lease. Changes of the folder fail from here on. Ends this process if the lease
        was taken from it."""
        with self._releasing:
            if self._released.is_set():
                return
            self._released.set()
            if self._thread.is_alive():
                self._thread.join()
            _held.discard(self)
            released = False
            with suppress(OSError):  # then the next process waits until this one is silent
                released = _retire(self._path, RELEASED, self.generation)
                if not released and _find(self.folder):
                    self._end_process()
            if released:
                # What is left is only the memory of the generation
                path = _path(self.folder, RELEASED, self.generation)
                shutil.rmtree(path / self._place.name, ignore_errors=True)
                with suppress(OSError):
                    (path / HOLDER).unlink()

    def close(self) -> None:
        """Releases the lease. From here on, this process may take it again."""
        self.release()
        self._open.close()

    def _sign(self) -> None:
        """Gives a sign of life. It replaces the one before byte by byte, which needs no space on a
        full disk."""
        self._signs += 1
        file = os.open(self._place / ALIVE, os.O_WRONLY | os.O_CREAT)
        try:
            os.pwrite(file, SIGN % self._signs, 0)
        finally:
            os.close(file)

    def _renew(self) -> None:
        warned = False
        while not self._released.wait(self._between):
            try:
                self._sign()
            except OSError as error:
                with suppress(OSError):
                    self.check()
                if not warned and not self._released.is_set():
                    warned = True
                    warn(
                        f"logging.folder={self.folder}: the sign of life cannot be written "
                        f"({first_line(error)}); the run continues, and may be taken over by "
                        f"another process that is started in this folder"
                    )

    def _end_process(self) -> NoReturn:
        _ending.acquire()  # never released: a second thread blocks here until os._exit
        who, generation = "another process", ""
        with suppress(OSError, ValueError):
            newest = max(_find(self.folder))
            holder = _read_holder(newest.path)
            who += f" ({holder.host}, process {holder.pid})" if holder else ""
            if newest.kind != REVOKED:
                generation = f" (generation {newest.generation})"
        # The leading newline ends the line of a progress bar.
        try:
            print(
                f"\nerror: logging.folder={self.folder}: {who} has taken over this run{generation} "
                f"while this one did not respond; this process ends and writes nothing",
                file=sys.stderr,
                flush=True,
            )
        finally:
            os._exit(LOST)


_held: set[Lease] = set()
_ending = threading.Lock()


def with_held(action: Callable[[Lease], None], seconds: float) -> None:
    """Calls `action` with each lease that this process holds. Waits up to `seconds`: a file system
    may not respond."""

    def act() -> None:
        for lease in list(_held):
            with suppress(OSError):
                action(lease)

    thread = threading.Thread(target=act, name="leases", daemon=True)
    thread.start()
    thread.join(seconds)
