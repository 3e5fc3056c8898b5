"""Files that appear under their name whole or not at all."""
import csv
import io
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from rsb_ffcv import InputError


@contextmanager
def atomic_file(path, mend: str):
    """A binary file to write that takes the name `path` when the block ends: flushed to disk, renamed, and the
    folder flushed as well.

    Where the block raises, what stood under `path` before stays and the unfinished file is removed. Raises InputError
    naming `path` and `mend` where the system refuses to write (no such folder, no permission, full disk).
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


def write_table(path, head: list[str], rows, mend: str):
    """A CSV file, whole or not at all. Raises InputError as atomic_file does."""
    with atomic_file(path, mend) as file:
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        table = csv.writer(text)
        table.writerow(head)
        table.writerows(rows)
        text.detach()  # flushed, and not closed


def flush_folder(path):
    """The names in a folder outlive a power failure from now on. Raises OSError."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
