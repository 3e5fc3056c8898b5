"""Writes labelled pictures to one `.beton` file that stock FFCV reads, and survives interruptions.

FFCV's writer distributes pages to processes and waits for a counter: one unreadable picture makes
it hang forever, and the file's bytes depend on which worker was faster. Here threads read and
encode, and one thread writes the results to pages in the source's order. The unfinished file is
`.<name>.part`. Beside it is a journal: the settings, and a record for each picture whose bytes are
on the disk. The same command continues after the last record. At the end every image is read back
and compared with its checksum. Then the file is renamed to its final name.

The bytes are a function of the pictures and the settings. They do not depend on threads, machine,
place, time or interruptions.
"""

import errno
import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from tqdm import tqdm

from rsb_ffcv import InputError, __version__, beton
from rsb_ffcv.atomic import flush_folder, hidden, lock, write_table
from rsb_ffcv.beton import PAGE_BYTES, About, Beton
from rsb_ffcv.dataset.picture import BadPicture, Stored
from rsb_ffcv.dataset.workers import ordered
from rsb_ffcv.ops import native

SYNC_BYTES, SYNC_SECONDS = 1 << 26, 1.0  # an interruption loses at most this much work
# Before a file is continued or accepted as finished, this many pictures are compared again
SAMPLED = 20
READ_AT_ONCE = 64  # images per read-back task
HOW = ("kept", "encoded", "raw", "left out")
_LEFT_OUT = HOW.index("left out")
# The result for picture `index`. source: its Source.identity; how: index in HOW; check: XXH64 of
# the fields before it
RECORD = np.dtype(
    [
        ("index", "<u8"),
        ("source", "<u8"),
        ("pointer", "<u8"),
        ("checksum", "<u8"),
        ("label", "<i8"),
        ("size", "<u4"),
        ("entry_bytes", "<u4"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("mode", "u1"),
        ("how", "u1"),
        ("unused", "<u2"),
        ("check", "<u8"),
    ]
)


class Pictures(Protocol):
    """The pictures to write: sources.Source, or assemble.Samples, which are samples of other
    files. Their docstrings describe the members."""

    classes: list[str]
    titles: list[str]
    names: list[str]
    labels: np.ndarray

    def __len__(self) -> int: ...

    def place(self, index: int, /) -> str: ...

    def identity(self, index: int, /) -> int: ...

    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class OnError:
    """What to do with a picture that cannot be used.

    skip: leave it out instead of raising. most: largest share that may be left out, 0 .. 1.
    report: CSV file that lists the pictures left out.
    """

    skip: bool = False
    most: float = 0.0
    report: Path = Path("skipped.csv")


def write_beton(
    path: str | Path,
    source: Pictures,
    *,
    store: Callable[[int], Stored],
    settings: dict,
    num_workers: int,
    chunk_size: int = 100,
    on_error: OnError = OnError(),
    described: dict | None = None,
) -> Beton:
    """Writes the pictures of `source` to `path`, and returns the file as read back.

    path: the file
    source: a Source, or another object that has the members of Pictures
    store(index): returns the Stored of a picture, or raises BadPicture
    settings: what the images' bytes depend on; kept in the file
    num_workers: threads, 1 or more
    chunk_size: maximum number of encoded images that wait to be written
    on_error: what to do with pictures that cannot be used
    described: kind of dataset and split; kept in the file

    Raises InputError if a picture cannot be read or stored, the file cannot be written, another
    process is writing it, or an unfinished or finished file has other settings. The completed work
    is kept under a hidden name, and the next call continues it.
    """
    path = Path(path)
    about = About(
        tool={"rsb_ffcv": __version__, "pillow": version("pillow"), "opencv": cv2.__version__},
        settings=settings,
        source={**(described or {}), "images": len(source), "fingerprint": source.fingerprint()},
        classes=source.classes,
        titles=source.titles,
        counts={},
    )
    try:
        if path.exists():
            return _finished(path, about, source, store=store)
        with _journal(path) as journal:
            if path.exists():  # another process has finished it since
                os.unlink(journal.name)
                return _finished(path, about, source, store=store)
            _begin(journal, path, about)
            unfinished = part_path(path)
            with (
                open(
                    os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666),
                    "r+b",
                    buffering=0,
                ) as file,
                closing(_Part(path, file, journal=journal, source=source)) as part,
            ):
                try:
                    _write(
                        part,
                        source,
                        store=store,
                        num_workers=num_workers,
                        chunk_size=chunk_size,
                        on_error=on_error,
                        title=path.name,
                    )
                finally:
                    part.sync()
            _finish(part, source, about, unfinished=unfinished)
            read_back(beton.read_beton(unfinished), num_workers, path.name)
            os.rename(unfinished, path)
            flush_folder(path.parent)
            os.unlink(journal.name)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free space or correct the "
            f"permissions, and run the same command again to continue, or choose another "
            f"`write_path`"
        ) from error
    return beton.read_beton(path)


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers 0 .. count - 1, spread evenly from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int))


def _finished(
    path: Path, about: About, source: Pictures, *, store: Callable[[int], Stored]
) -> Beton:
    """The existing file, if it has the settings and pictures of the file that would be written.
    Raises InputError otherwise."""
    existing = beton.read_beton(path)
    fix = "remove it or choose another `write_path`"
    if existing.about is None:
        raise InputError(f"{path}: exists, and this program did not write it; {fix}")
    for what, old, new in (
        ("settings", existing.about.settings, about.settings),
        ("pictures", existing.about.source, about.source),
    ):
        if old != new:
            raise InputError(
                f"{path}: exists, written with other {what} ({_differing(old, new)}); {fix}"
            )
    assert existing.extras is not None  # as `about`: this program wrote it
    if len(existing) == len(source):  # none left out: sample numbers are picture numbers
        for index in evenly(len(existing), SAMPLED).tolist():
            if store(index).checksum != existing.extras["checksum"][index]:
                raise InputError(
                    f"{path}: exists, and {source.place(index)} has changed since it was written; "
                    f"{fix}"
                )
    # The journal is left if the program was interrupted between its last two steps
    _journal_path(path).unlink(missing_ok=True)
    print(
        f"{path}: exists already, with pictures of these names and with these settings; remove it "
        f"to write it again",
        flush=True,
    )
    return existing


def _differing(old: dict, new: dict) -> str:
    return ", ".join(
        f"{key} {old.get(key)!r}, now {new.get(key)!r}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    )


def part_path(path: Path) -> Path:
    """The path of an unfinished file."""
    return hidden(path, "part")


def _journal_path(path: Path) -> Path:
    return hidden(path, "journal")


@contextmanager
def _journal(path: Path) -> Iterator[io.FileIO]:
    """Opens and locks the journal. Raises InputError if another process has the lock."""
    name, locked = _journal_path(path), False
    while not locked:
        with open(name, "ab+", buffering=0) as file:
            try:
                lock(file, path)
            except BlockingIOError as error:
                raise InputError(
                    f"{path}: another process is writing it; wait until it has finished, or choose "
                    f"another `write_path`"
                ) from error
            # A process that finished between opening and locking has removed this file. Its lock
            # excludes nobody; open the one that now has the name
            with suppress(FileNotFoundError):
                locked = os.path.samestat(os.fstat(file.fileno()), os.stat(name))
            if locked:
                yield file


def _begin(journal: io.FileIO, path: Path, about: About) -> None:
    """Positions the journal at its first record. Its first line contains the settings. Raises
    InputError if they differ."""
    head = json.dumps({**about.tool, **about.settings}, ensure_ascii=False).encode()
    journal.seek(0)
    known, line_end, _ = journal.read(1 << 20).partition(b"\n")
    if line_end and known != head:
        try:
            why = _differing(json.loads(known), json.loads(head))
        except ValueError:
            why = "they cannot be read"
        raise InputError(
            f"{path}: the unfinished file has other settings ({why}); give the same settings, "
            f"or remove {_journal_path(path)} to start over"
        )
    if not line_end:
        journal.truncate(0)
        _write_all(journal, head + b"\n")
        flush_folder(path.parent)
    journal.seek(len(head) + 1)


def _write_all(file: io.FileIO, data: bytes | np.ndarray) -> None:
    """Writes `data` to an unbuffered file. Raises OSError if only a part is written."""
    if file.write(data) != memoryview(data).nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Pages:
    """Writes images to an open unbuffered file, one after the other, from byte `end` on."""

    def __init__(self, file: io.FileIO, end: int) -> None:
        self.file, self.end = file, end
        file.truncate(end)
        file.seek(end)

    def add(self, data: np.ndarray) -> int:
        """Writes `data` (uint8, at most a page) and returns its first byte in the file."""
        remaining = -self.end % PAGE_BYTES or PAGE_BYTES
        if data.nbytes > remaining:  # FFCV reads page by page: no image may cross a boundary
            _write_all(self.file, bytes(remaining))
            self.end += remaining
        _write_all(self.file, data)
        self.end += data.nbytes
        return self.end - data.nbytes


class _Part:
    """The unfinished file. records: RECORD of the first `count` pictures, those that are written;
    pages: writes the next image; synced: number of records passed to the journal."""

    def __init__(
        self, path: Path, file: io.FileIO, *, journal: io.FileIO, source: Pictures
    ) -> None:
        self.file, self.journal = file, journal
        self.records = np.zeros(len(source), RECORD)
        front = beton.front_bytes(len(source))
        self.start, self.journal_start = front + -front % PAGE_BYTES, journal.tell()
        self.count, end = self._resume(path, source, self.start)
        self.synced, self._synced_end, self._sync_at = (
            self.count,
            end,
            time.monotonic() + SYNC_SECONDS,
        )
        self.pages = Pages(file, end)
        self._thread = ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None

    def _resume(self, path: Path, source: Pictures, start: int) -> tuple[int, int]:
        """Keeps the pictures of an earlier call that are complete and unchanged in the source.
        Returns their number and the byte at which they end. Raises InputError if the first picture
        is not the same."""
        head = self.journal.tell()
        known = self.journal.read()
        known = np.frombuffer(known[: len(known) // RECORD.itemsize * RECORD.itemsize], RECORD)[
            : len(source)
        ]
        there, count, last = os.fstat(self.file.fileno()).st_size, 0, start
        for index in range(len(known)):
            record = known[index : index + 1]
            end = int(record["pointer"][0]) + int(record["size"][0]) + int(record["entry_bytes"][0])
            # The first image is elsewhere: the table had another length
            misplaced = (
                record["how"][0] != _LEFT_OUT and last == start and record["pointer"][0] != start
            )
            if (
                misplaced
                or record["index"][0] != index
                or record["check"][0] != _check(record)
                or end > there
            ):
                break
            if record["source"][0] != source.identity(index):
                if index == 0:
                    raise InputError(
                        f"{path}: the unfinished file has other pictures (the first one is now "
                        f"'{source.names[0]}'); give the same pictures, or remove "
                        f"{_journal_path(path)} to start over"
                    )
                break
            count, last = index + 1, max(last, end)
        self.records[:count] = known[:count]
        self.journal.truncate(head + count * RECORD.itemsize)
        return count, last

    def add(self, index: int, source: Pictures, stored: Stored | None) -> None:
        """Writes the next picture and its record. stored None: the picture is left out."""
        record = self.records[index : index + 1]
        record["index"], record["source"], record["label"] = (
            index,
            source.identity(index),
            source.labels[index],
        )
        record["how"] = _LEFT_OUT
        if stored is not None:
            record["how"], record["pointer"] = HOW.index(stored.how), self.pages.add(stored.data)
            record["checksum"], record["size"] = stored.checksum, stored.size
            record["entry_bytes"] = stored.data.nbytes - stored.size
            record["height"], record["width"], record["mode"] = (
                stored.height,
                stored.width,
                stored.mode,
            )
        record["check"] = _check(record)
        self.count = index + 1
        if self.pages.end - self._synced_end >= SYNC_BYTES or time.monotonic() >= self._sync_at:
            self.sync(wait=False)

    def keep(self, count: int) -> None:
        """Removes the pictures from number `count` on."""
        self.sync()
        kept = self.records[:count][self.records["how"][:count] != _LEFT_OUT]
        end = (
            int(kept[-1]["pointer"]) + int(kept[-1]["size"]) + int(kept[-1]["entry_bytes"])
            if len(kept)
            else self.start
        )
        self.journal.truncate(self.journal_start + count * RECORD.itemsize)
        self.pages, self.count = Pages(self.file, end), count
        self.synced, self._synced_end = count, end

    def sync(self, wait: bool = True) -> None:
        """Flushes the images to disk and then writes their records to the journal. The journal
        therefore lists only images that are on the disk.

        Another thread does the work; with `wait`, this returns when it is done. Without `wait`, a
        call does nothing while the previous one is in progress.
        """
        if self._syncing is not None:
            if not wait and not self._syncing.done():
                return
            self._syncing.result()
        known = self.records[self.synced : self.count].tobytes()

        def flush() -> None:
            os.fdatasync(self.file.fileno())
            _write_all(self.journal, known)

        self._syncing = self._thread.submit(flush)
        self.synced, self._synced_end, self._sync_at = (
            self.count,
            self.pages.end,
            time.monotonic() + SYNC_SECONDS,
        )
        if wait:
            self._syncing.result()

    def close(self) -> None:
        """Waits for the thread."""
        self._thread.shutdown()


def _check(record: np.ndarray) -> int:
    return native.checksum(record.view(np.uint8)[:-8])


def _write(
    part: _Part,
    source: Pictures,
    *,
    store: Callable[[int], Stored],
    num_workers: int,
    chunk_size: int,
    on_error: OnError,
    title: str,
) -> None:
    """Writes the pictures that the unfinished file does not contain yet.

    part: the unfinished file
    source, store, num_workers, chunk_size, on_error: as in write_beton
    title: name of the file in messages

    Raises InputError as write_beton does.
    """
    left_out: list[tuple[int, str]] = []

    def try_to_store(index: int) -> Stored | BadPicture:
        try:
            return store(index)
        except BadPicture as error:
            if on_error.skip:
                return error
            raise

    def leave_out(index: int, error: BadPicture) -> None:
        left_out.append((index, str(error)))
        if len(left_out) > on_error.most * len(source):
            _report(on_error.report, source, left_out)
            raise InputError(
                f"{len(left_out)} of {len(source)} pictures cannot be used, more than "
                f"`max_skipped`={on_error.most:g} allows (the last: {error}); see "
                f"{on_error.report}, and correct them or raise the limit"
            )

    # Left out by an earlier call: report the reasons again
    for index in np.flatnonzero(part.records["how"][: part.count] == _LEFT_OUT).tolist():
        result = try_to_store(index)
        if not isinstance(result, BadPicture):
            part.keep(index)  # it is readable now: write it and all pictures after it
            break
        leave_out(index, result)
    stored = np.flatnonzero(part.records["how"][: part.count] != _LEFT_OUT)
    for index in stored[evenly(len(stored), SAMPLED)].tolist():
        if store(index).checksum != part.records["checksum"][index]:
            raise InputError(
                f"{source.place(index)}: has changed since it was written to the unfinished "
                f"{title}; give the same pictures, or remove {part.journal.name} to start over"
            )
    if part.count:
        print(f"{title}: continuing after {part.count} of {len(source)} pictures", flush=True)
    began, end_then = time.monotonic(), part.pages.end
    with (
        tqdm(total=len(source), initial=part.count, desc=title, unit="img", smoothing=0.05) as bar,
        closing(
            ordered(
                try_to_store,
                range(part.count, len(source)),
                threads=num_workers,
                ahead=chunk_size,
                name=source.place,
            )
        ) as results,
    ):
        for index, result in enumerate(results, part.count):
            part.add(index, source, None if isinstance(result, BadPicture) else result)
            if isinstance(result, BadPicture):
                leave_out(index, result)
            if index % 16 == 0:
                rate = (part.pages.end - end_then) / 1e6 / (time.monotonic() - began + 1e-9)
                bar.set_postfix_str(f"{rate:.1f} MB/s", refresh=False)
            bar.update()
    if left_out:
        _report(on_error.report, source, left_out)


def _report(path: Path, source: Pictures, left_out: list[tuple[int, str]]) -> None:
    rows = [
        [source.names[index], source.classes[source.labels[index]], reason]
        for index, reason in left_out
    ]
    write_table(path, ["path", "class", "reason"], rows, fix="choose another `report`")


def _finish(part: _Part, source: Pictures, about: About, *, unfinished: Path) -> None:
    """Writes everything around the images. Raises InputError if there is no image."""
    known = part.records[part.records["how"] != _LEFT_OUT]
    if not len(known):
        raise InputError(
            f"{unfinished}: none of the {len(source)} pictures can be used; see the report for "
            f"the reasons, and correct them"
        )
    counts = Counter(HOW[how] for how in part.records["how"].tolist())
    metadata, table, extras = (
        np.zeros(len(known), kind)
        for kind in (beton.SAMPLE_METADATA, beton.ALLOCATION, beton.EXTRA)
    )
    for name in ("mode", "width", "height"):
        metadata["f0"][name] = known[name]
    metadata["f0"]["data_ptr"], metadata["f1"] = known["pointer"], known["label"]
    table["sample_id"], table["ptr"], table["size"] = (
        np.arange(len(known)),
        known["pointer"],
        known["size"],
    )
    for name in beton.EXTRA.names or ():
        extras[name] = known[name]
    beton.write_structure(
        unfinished,
        part.pages.end,
        metadata=metadata,
        table=table,
        extras=extras,
        names=[source.names[index] for index in known["index"].tolist()],
        about=replace(about, counts={how: counts[how] for how in HOW}),
    )


def read_back(
    file: Beton, num_workers: int, title: str, *, samples: np.ndarray | None = None
) -> None:
    """Reads a file's images and compares them with their checksums. samples: numbers of the images,
    default all. Raises InputError, which names the first damaged image."""
    samples = np.arange(len(file)) if samples is None else samples
    with file.open() as opened:

        def check(chosen: np.ndarray) -> None:
            for index in chosen.tolist():
                try:
                    file.read(opened, index)
                except ValueError as error:
                    raise InputError(
                        f"{file.path}: sample {index} {error}, just after it was written; check "
                        f"the disk, remove the file and write it again"
                    ) from error

        parts = np.array_split(samples, range(READ_AT_ONCE, len(samples), READ_AT_ONCE))
        with (
            closing(
                ordered(
                    check,
                    parts,
                    threads=num_workers,
                    name=lambda chosen: f"{title}: sample {chosen[0]}",
                )
            ) as results,
            tqdm(
                total=len(samples), desc=f"{title}, reading back", unit="img", smoothing=0.05
            ) as bar,
        ):
            for part, _ in zip(parts, results):
                bar.update(len(part))
