"""Atomic files and file locks.

A file appears under its name when it is complete, or not at all. Both also work on file systems
that have no locks or cannot flush a directory: there, a warning is printed once.
"""

import csv
import errno
import fcntl
import io
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
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
    temporary = hidden(path, "part")
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is not a regular file; {fix}")
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); {fix}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


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
