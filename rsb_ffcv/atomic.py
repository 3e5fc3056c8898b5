"""Atomic files and file locks.

A file appears under its name when it is complete, or not at all. Both also work on file systems
that have no locks or cannot flush a directory: there, a warning is printed once.

In a folder that is `fenced`, each change is a rename out of a given place or into it. To
remove this place ends all changes at once, also those of a process that is stopped between any two
instructions.
"""

import csv
import errno
import fcntl
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rsb_ffcv import InputError, first_line, warn

# Errors of flock on file systems without locks: Lustre mounted without them, NFS without its lock
# service or for folders (which are open for reading only), some FUSE file systems
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}


def hidden(path: Path, suffix: str) -> Path:
    """The hidden file `.<name>.<suffix>` beside `path`. Raises InputError if `path` has no name
    ("." or "/")."""
    if not path.name:
        raise InputError(f"{path}: names no file; give the path of a file")
    return path.with_name(f".{path.name}.{suffix}")


@dataclass(frozen=True)
class _Fence:
    """See `fenced`."""

    folder: Path
    place: Path
    check: Callable[[], None]


_fences: dict[Path, _Fence] = {}


@contextmanager
def fenced(folder: Path, place: Path, check: Callable[[], None]) -> Iterator[None]:
    """A context in which every change that this module makes in `folder`, at any depth, is a rename
    out of `place` or into it.

    place: an existing folder of the same file system, for this process only.
    check: called after a change has failed, and before an open file is written to. It raises
        OSError, which replaces that of the change, if `place` is gone or cannot be seen. It may end
        the process.
    """
    folder = Path(os.path.realpath(folder))
    fence = _fences[folder] = _Fence(folder, place, check)
    try:
        yield
    finally:
        if _fences.get(folder) is fence:
            del _fences[folder]


@contextmanager
def _change(path: Path) -> Iterator[_Fence | None]:
    """A context for a change of the file at `path`. Yields the fence of its folder, if any."""
    fence = None
    if _fences:
        parent = Path(os.path.realpath(path.parent))
        around = (_fences.get(folder) for folder in (parent, *parent.parents))
        fence = next((found for found in around if found), None)
    try:
        yield fence
    except OSError:
        if fence is not None:
            fence.check()
        raise


def _prepared(path: Path, fence: _Fence | None) -> Path:
    """Where a file is written before it is renamed to `path`."""
    return hidden(path, "part") if fence is None else fence.place / f"{path.name}.part"


@contextmanager
def atomic_file(path: str | Path, fix: str) -> Iterator[io.BufferedWriter]:
    """Yields a binary file for writing. When the block ends, the file is flushed to disk and
    renamed to `path`, and the folder is flushed.

    If the block raises, the previous file at `path` is kept and the unfinished file is removed. If
    `path` is a symbolic link, the file that it names is replaced. If the file cannot be written (no
    such folder, no permission, full disk, a device), InputError is raised. Its message contains
    `path`, and `fix`: what the user can do.
    """
    path = Path(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    try:
        with _change(path) as fence:
            temporary = _prepared(path, fence)
            if path.exists() and not path.is_file():
                raise InputError(f"{path}: is not a regular file; {fix}")
            try:
                with open(temporary, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                with suppress(OSError):
                    temporary.unlink()
        flush_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); {fix}") from error


def link(path: Path, name: Path, fix: str) -> None:
    """Gives the file at `path` the second name `name`, atomically; on a file system without hard
    links, a copy. Raises InputError as atomic_file does."""
    try:
        with _change(name) as fence:
            linked = _prepared(name, fence)
            with suppress(FileNotFoundError):
                linked.unlink()
            try:
                os.link(path, linked)
            except OSError:  # a file system without hard links
                with open(path, "rb") as whole, atomic_file(name, fix) as file:
                    shutil.copyfileobj(whole, file)
                return
            os.replace(linked, name)
        flush_folder(name.parent)
    except OSError as error:
        raise InputError(f"{name}: cannot be written ({error.strerror}); {fix}") from error


def remove(path: Path) -> None:
    """Removes a file. Raises OSError if that fails, FileNotFoundError if there is none."""
    with _change(path) as fence:
        if fence is not None:
            removed = fence.place / f"{path.name}.removed"
            os.replace(path, removed)
            path = removed
        path.unlink()


def rename(path: Path, name: Path) -> None:
    """Renames a file in its folder. If the process is killed meanwhile, a fenced file may be lost.
    Raises OSError."""
    with _change(name) as fence:
        if fence is not None:
            moved = _prepared(name, fence)
            os.replace(path, moved)
            path = moved
        os.replace(path, name)


def append(path: Path, content: bytes) -> None:
    """Adds `content` at the end of a file, which is created if it is missing. Raises OSError.

    In a fenced folder, a process that removes the fence's place must then replace the file by a
    copy of itself. A process that has opened the file before writes to the replaced one; a process
    that opens it after finds in the check that its place is gone.
    """
    with _change(path) as fence:
        if fence is None:
            with open(path, "ab") as file:
                file.write(content)
            return
        try:
            opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        except FileNotFoundError:
            new = _prepared(path, fence)
            new.write_bytes(content)
            os.replace(new, path)
            return
        with open(opened, "ab") as file:
            fence.check()
            file.write(content)


def make_folder(path: Path) -> None:
    """Creates a folder, and those that it is in, if they are missing. Raises OSError."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with _change(path) as fence:
        if fence is None:
            path.mkdir(exist_ok=True)
        else:
            new = _prepared(path, fence)
            new.mkdir(exist_ok=True)
            os.replace(new, path)


@contextmanager
def atomic_folder(path: str | Path, fix: str) -> Iterator[Path]:
    """Yields a new folder for writing. When the block ends, all of it is flushed to disk, and it is
    renamed to `path`; if the block raises, it is removed.

    Raises InputError, whose message contains `path` and ends with `fix`, if `path` exists and is
    not an empty folder, if another process is writing it, or if it cannot be written.
    """
    path = Path(path)
    unfinished = hidden(path, "part")
    held = None
    try:
        if os.path.lexists(path) and (
            path.is_symlink() or not path.is_dir() or any(path.iterdir())
        ):
            raise InputError(f"{path}: exists already; {fix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir(exist_ok=True)
        held = os.open(unfinished, os.O_RDONLY)
        _lock_folder(held, unfinished)
        for left in unfinished.iterdir():  # by a process that was killed
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        try:
            yield unfinished
            for written in [*unfinished.rglob("*"), unfinished]:
                flush_folder(written)
            os.replace(unfinished, path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        flush_folder(path.parent)
    except BlockingIOError as error:
        raise InputError(f"{path}: another process is writing it; {fix}") from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise InputError(f"{path}: cannot be written ({reason}); {fix}") from error
    finally:
        if held is not None:
            os.close(held)


def _lock_folder(held: int, path: Path) -> None:
    """Locks an open folder. Raises BlockingIOError if another process has it, or has renamed it."""
    lock(held, path)
    if not path.exists() or not os.path.samestat(os.fstat(held), path.stat()):
        raise BlockingIOError


def write_table(
    path: str | Path, head: list[str], rows: Iterable[Iterable[object]], *, fix: str
) -> None:
    """Writes a CSV file atomically. Raises InputError as atomic_file does."""
    with atomic_file(path, fix) as file:
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        table = csv.writer(text)
        table.writerow(head)
        table.writerows(rows)
        text.detach()  # flushes and does not close


def flush_folder(path: str | Path) -> None:
    """Flushes a folder to disk, so that its names survive a power failure; also a file's content.

    Some file systems (SMB, some FUSE file systems) cannot flush a folder. This is only a warning,
    printed once per folder, because the names are in place.
    """
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        _warn_once(
            f"{path}: this folder cannot be flushed ({first_line(error)}); after a power failure "
            f"its newest names may be missing"
        )


def lock(file: int | IO[Any], path: str | Path) -> None:
    """Takes the exclusive lock of an open file. Closing the file releases it.

    Raises BlockingIOError if another process has the lock. If the file system of `path` has no
    locks, a warning is printed once.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn_once(
            f"{path}: its file system has no locks ({error.strerror}); make sure that only one "
            f"process writes to it"
        )


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warn(text)
