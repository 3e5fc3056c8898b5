"""Labelled pictures into one `.beton` file that stock FFCV reads, whatever stops the work in
between.

FFCV's own writer hands pages to processes and waits for a counter: one unreadable picture hangs it
for ever, and the file's bytes depend on which worker was faster. Here threads read and encode, and
one thread lays the results into pages in the source's order. While it works, the file stands under
`.<name>.part`, and beside it a journal: the settings, and a record for each picture whose bytes
have reached the disk. The same command again goes on after the last such record. At the end every
image is read back and held against its checksum; then the file takes its name.

The bytes are a function of the pictures and the settings alone: not of threads, machine, place,
time or interruptions.
"""

import errno
import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from tqdm import tqdm

from rsb_ffcv import InputError, __version__, beton
from rsb_ffcv.atomic import flush_folder, lock, write_table
from rsb_ffcv.beton import PAGE_BYTES, About, Beton
from rsb_ffcv.dataset.picture import BadPicture, Stored
from rsb_ffcv.dataset.workers import ordered
from rsb_ffcv.ops import native

SYNC_BYTES, SYNC_SECONDS = 1 << 26, 1.0  # how much work an interruption may cost
SAMPLED = (
    20  # pictures that are looked at again before a begun or finished file is taken for theirs
)
READ_AT_ONCE = 64  # pictures that are read back at a time
HOW = ("kept", "encoded", "raw", "left out")
_LEFT_OUT = HOW.index("left out")
# What became of picture `index`. source: its Source.identity; how: place in HOW; check: XXH64 of
# the record up to here
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
    """What a file is written from: a Source, or Samples of other files (see there)."""

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
    """skip: leave out a picture that cannot be used, instead of ending; at most `most` of all
    (share, 0 .. 1). report: CSV file that names them."""

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
    """Writes the pictures of `source` (a Source, or what has its classes, titles, labels, names,
    place, identity and fingerprint) to `path`, and returns the file as read back.

    store(index): a Stored, or BadPicture raised. settings: what the images' bytes depend on;
    described: kind of dataset and split; both are kept in the file. num_workers: threads, 1 or
    more. chunk_size: how many pictures may be encoded ahead of the writing.

    Raises InputError where a picture cannot be read or stored, the file cannot be written, another
    process is writing it, or what stands there was begun or written with other settings. What is
    done by then stays, under a hidden name, and the next call goes on from there.
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
        with _journal(path, about) as journal:
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
            f"{path}: cannot be written ({error.strerror}); free space, see to permissions or "
            f"choose another "
            f"`write_path`, and give the same command again: it goes on from there"
        ) from error
    return beton.read_beton(path)


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers below `count`, from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int))


def _finished(
    path: Path, about: About, source: Pictures, *, store: Callable[[int], Stored]
) -> Beton:
    """The file that stands there, where it is the one that would be written."""
    there = beton.read_beton(path)
    mend = "remove it or choose another `write_path`"
    if there.about is None:
        raise InputError(f"{path}: exists, and this program did not write it; {mend}")
    for what, old, new in (
        ("settings", there.about.settings, about.settings),
        ("pictures", there.about.source, about.source),
    ):
        if old != new:
            raise InputError(
                f"{path}: exists, written with other {what} ({_differing(old, new)}); {mend}"
            )
    assert there.extras is not None  # as `about`: this program wrote it
    if len(there) == len(source):  # samples are pictures, one for one
        for index in evenly(len(there), SAMPLED).tolist():
            if store(index).checksum != there.extras["checksum"][index]:
                raise InputError(
                    f"{path}: exists, and {source.place(index)} is another picture than when it "
                    f"was written; {mend}"
                )
    _journal_path(path).unlink(
        missing_ok=True
    )  # left where the program was stopped between its last two steps
    print(
        f"{path}: is there already, from pictures of these names with these settings; remove it to "
        f"write it again",
        flush=True,
    )
    return there


def _differing(old: dict, new: dict) -> str:
    return ", ".join(
        f"{key} {old.get(key)!r}, now {new.get(key)!r}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    )


def part_path(path: Path) -> Path:
    """Where a file stands while it is being written."""
    return path.with_name(f".{path.name}.part")


def _journal_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.journal")


@contextmanager
def _journal(path: Path, about: About) -> Iterator[io.FileIO]:
    """The journal, locked, at its first record. Its first line holds the settings."""
    name = _journal_path(path)
    head = json.dumps({**about.tool, **about.settings}, ensure_ascii=False).encode()
    with open(name, "ab+", buffering=0) as file:
        try:
            lock(file, path)
        except BlockingIOError as error:
            raise InputError(
                f"{path}: another process is writing it; wait for it, or choose another "
                f"`write_path`"
            ) from error
        file.seek(0)
        known, line_end, _ = file.read(1 << 20).partition(b"\n")
        if line_end and known != head:
            try:
                why = _differing(json.loads(known), json.loads(head))
            except ValueError:
                why = "which cannot be read any more"
            raise InputError(
                f"{path}: was begun with other settings ({why}); give those, or remove {name} to "
                f"begin anew"
            )
        if not line_end:
            file.truncate(0)
            _write_all(file, head + b"\n")
            flush_folder(path.parent)
        file.seek(len(head) + 1)
        yield file


def _write_all(file: io.FileIO, data: bytes | np.ndarray) -> None:
    """Raises OSError where an unbuffered file takes a part only."""
    if file.write(data) != memoryview(data).nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Pages:
    """Where images go in an open unbuffered file: one behind the other from `end` on."""

    def __init__(self, file: io.FileIO, end: int) -> None:
        self.file, self.end = file, end
        file.truncate(end)
        file.seek(end)

    def add(self, data: np.ndarray) -> int:
        """The byte at which `data` (uint8, at most a page) now begins."""
        room = -self.end % PAGE_BYTES or PAGE_BYTES
        if data.nbytes > room:  # FFCV reads page by page: no image may cross a boundary
            _write_all(self.file, bytes(room))
            self.end += room
        _write_all(self.file, data)
        self.end += data.nbytes
        return self.end - data.nbytes


class _Part:
    """The unfinished file. records: of the pictures so far, `count` of them; pages: where the next
    image goes."""

    def __init__(
        self, path: Path, file: io.FileIO, *, journal: io.FileIO, source: Pictures
    ) -> None:
        self.file, self.journal = file, journal
        self.records = np.zeros(len(source), RECORD)
        front = beton.front_bytes(len(source))
        self.start, self.journal_start = front + -front % PAGE_BYTES, journal.tell()
        self.count, end = self._take_up(path, source, self.start)
        self.synced, self._synced_end, self._sync_at = (
            self.count,
            end,
            time.monotonic() + SYNC_SECONDS,
        )
        self.pages = Pages(file, end)
        self._thread = ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None

    def _take_up(self, path: Path, source: Pictures, start: int) -> tuple[int, int]:
        """How many pictures of an earlier call are whole and still the source's, and where they
        end: those stay."""
        head = self.journal.tell()
        known = self.journal.read()
        known = np.frombuffer(known[: len(known) // RECORD.itemsize * RECORD.itemsize], RECORD)[
            : len(source)
        ]
        there, count, last = os.fstat(self.file.fileno()).st_size, 0, start
        for index in range(len(known)):
            record = known[index : index + 1]
            end = int(record["pointer"][0]) + int(record["size"][0]) + int(record["entry_bytes"][0])
            misplaced = (
                record["how"][0] != _LEFT_OUT and last == start and record["pointer"][0] != start
            )  # of a longer or shorter table
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
                        f"{path}: was begun from other pictures ('{source.names[0]}' is the first "
                        f"now); give those, or "
                        f"remove {_journal_path(path)} to begin anew"
                    )
                break
            count, last = index + 1, max(last, end)
        self.records[:count] = known[:count]
        self.journal.truncate(head + count * RECORD.itemsize)
        return count, last

    def add(self, index: int, source: Pictures, stored: Stored | None) -> None:
        """A picture in its turn; None: left out."""
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
        """Forgets the pictures from number `count` on."""
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
        """Brings the images to the disk and then their records to the journal, which so never
        speaks of what is not there. Unless it is to `wait`, another thread does it, and where that
        is not done yet, this is left for later."""
        if self._syncing is not None:
            if not wait and not self._syncing.done():
                return
            self._syncing.result()
        known = self.records[self.synced : self.count].tobytes()

        def bring() -> None:
            os.fdatasync(self.file.fileno())
            _write_all(self.journal, known)

        self._syncing = self._thread.submit(bring)
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
                f"`max_skipped`="
                f"{on_error.most:g} allows (the last: {error}); see {on_error.report}, and mend "
                f"them or raise the limit"
            )

    for index in np.flatnonzero(
        part.records["how"][: part.count] == _LEFT_OUT
    ).tolist():  # by an earlier call: say why again
        result = try_to_store(index)
        if not isinstance(result, BadPicture):
            part.keep(index)  # it can be read by now: from there on, again
            break
        leave_out(index, result)
    stored = np.flatnonzero(part.records["how"][: part.count] != _LEFT_OUT)
    for index in stored[evenly(len(stored), SAMPLED)].tolist():
        if store(index).checksum != part.records["checksum"][index]:
            raise InputError(
                f"{source.place(index)}: is another picture than when {title} was begun; give the "
                f"same pictures, or remove "
                f"{part.journal.name} to begin anew"
            )
    if part.count:
        print(f"{title}: going on after {part.count} of {len(source)} pictures", flush=True)
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
    write_table(path, ["path", "class", "reason"], rows, mend="choose another `report`")


def _finish(part: _Part, source: Pictures, about: About, *, unfinished: Path) -> None:
    """Everything around the images."""
    known = part.records[part.records["how"] != _LEFT_OUT]
    if not len(known):
        raise InputError(
            f"{unfinished}: none of the {len(source)} pictures can be used; see their reasons"
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
    beton.put_around(
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
    """Holds a file's images (default: all) against their checksums. Raises InputError naming one
    that is not as it was written."""
    samples = np.arange(len(file)) if samples is None else samples
    with open(file.path, "rb", buffering=0) as opened:

        def check(chosen: np.ndarray) -> None:
            for index in chosen.tolist():
                try:
                    file.read(opened.fileno(), index)
                except ValueError as error:
                    raise InputError(
                        f"{file.path}: sample {index} {error}, just after it was written; see to "
                        f"the disk, remove the "
                        f"file and write it again"
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
