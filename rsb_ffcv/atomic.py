"""Files that appear under their name whole or not at all, and locks on them; on file systems
without locks or without directories that can be flushed, too."""

import csv
import errno
import fcntl
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rsb_ffcv import InputError, first_line, warn

# What flock says where the file system does not have it: Lustre mounted without, NFS without its
# lock service and of folders (which are open for reading only), some of FUSE
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}


@contextmanager
def atomic_file(path: str | Path, mend: str) -> Iterator[io.BufferedWriter]:
    """A binary file to write that takes the name `path` when the block ends: flushed to disk,
    renamed, and the folder flushed as well.

    Where the block raises, what stood under `path` before stays and the unfinished file is removed.
    Raises InputError naming `path` and `mend` where the system refuses to write (no such folder, no
    permission, full disk).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); {mend}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_table(
    path: str | Path, head: list[str], rows: Iterable[Iterable[object]], *, mend: str
) -> None:
    """A CSV file, whole or not at all. Raises InputError as atomic_file does."""
    with atomic_file(path, mend) as file:
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        table = csv.writer(text)
        table.writerow(head)
        table.writerows(rows)
        text.detach()  # flushed, and not closed


def flush_folder(path: str | Path) -> None:
    """The names in a folder outlive a power failure from now on. Some file systems (SMB, some of
    FUSE) cannot flush a folder: a warning, once a folder, since the names are in place."""
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
    """Takes the exclusive lock of an open file, which ends with it. Raises BlockingIOError where
    another process has it. Where the file system of `path` has no locks: a warning, once."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn_once(
            f"{path}: its file system has no locks ({error.strerror}); take care that only one "
            f"process writes there"
        )


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warn(text)
