"""Samples behind those of a file, in place: what is there is not written again."""

import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rsb_ffcv import InputError, beton
from rsb_ffcv.atomic import atomic_file, flush_folder, lock
from rsb_ffcv.beton import PAGE_BYTES, About, Beton, read_beton
from rsb_ffcv.dataset.assemble import (
    Samples,
    all_samples,
    common_classes,
    common_settings,
    read_all,
)
from rsb_ffcv.dataset.workers import ordered
from rsb_ffcv.dataset.writer import Pages, read_back


class _Append:
    """The names under which an append stands while it is under way: the file itself, hidden; a note
    with its length before; and the new front, once all behind it is on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hidden, self.note, self.front = (
            path.with_name(f".{path.name}.{what}") for what in ("appending", "append", "front")
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One append at a time in a folder."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            lock(folder, self.path.parent)
            yield
        except BlockingIOError as error:
            raise InputError(
                f"{self.path.parent}: another process is appending to a file in it; wait for it"
            ) from error
        finally:
            os.close(folder)

    def recover(self, num_workers: int) -> dict:
        """Ends what an interrupted append began: forward where its front is there, else back. The
        note of one that is now complete, or nothing."""
        if not self.note.exists():
            return {}
        note = json.loads(self.note.read_text())
        if not self.hidden.exists():  # stopped before or after all of it
            self.finish()
            return (
                note if self.path.exists() and os.stat(self.path).st_size != note["bytes"] else {}
            )
        complete = self.front.exists()
        if self.path.exists():
            raise InputError(
                f"{self.path}: stands beside {self.hidden}, of an interrupted append; move one of "
                f"them away"
            )
        with open(self.hidden, "r+b") as file:
            if complete:
                file.write(self.front.read_bytes())
            else:
                file.truncate(note["bytes"])
            file.flush()
            os.fsync(file.fileno())
        if complete:
            whole = read_beton(self.hidden)
            read_back(
                whole,
                num_workers,
                self.path.name,
                samples=np.flatnonzero(whole.pointers >= note["bytes"]),
            )
        os.rename(self.hidden, self.path)
        self.finish()
        return note if complete else {}

    def finish(self) -> None:
        flush_folder(self.path.parent)
        for path in (self.front, self.note):
            path.unlink(missing_ok=True)


def concat(path: str, paths: list[str], num_workers: int) -> Beton:
    """Appends the samples of files to `path`, in place: its images stay where they are, but for
    those in the way of the longer table at the file's start, which are copied behind. Its classes
    keep their numbers; new ones follow.

    While it works the file is hidden; whatever stops it, the next call brings it back, as it was or
    with all that was to be appended. Raises InputError, also for samples that are there already, by
    name.
    """
    append = _Append(Path(path).resolve())  # the file itself, where `path` is a link
    try:
        with append.locked():
            wanted = [str(Path(part).resolve()) for part in paths]
            if append.recover(num_workers).get("paths") == wanted:
                print(f"{path}: the interrupted append is complete now")
                return read_beton(path)
            return _append(append, read_all([path, *paths]), wanted, num_workers=num_workers)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free space or see to permissions, and "
            f"give the same command "
            f"again"
        ) from error


def _append(append: _Append, files: list[Beton], wanted: list[str], *, num_workers: int) -> Beton:
    target, others = files[0], files[1:]
    if target.about is None:
        raise InputError(
            f"{append.path}: another program wrote it, without checksums; make a new file of all "
            f"with merge"
        )
    classes, titles, numbers = common_classes(files, target, fixed=True)
    choice = np.concatenate([all_samples(files, which) for which in range(1, len(files))])
    names = target.names()
    samples = Samples(others, choice - [1, 0], classes=classes, titles=titles, numbers=numbers[1:])
    moved = np.flatnonzero(target.pointers < beton.front_bytes(len(target) + len(samples)))
    itself = Samples(
        [target],
        np.stack([np.zeros_like(moved), moved], 1),
        classes=classes,
        titles=titles,
        numbers=[numbers[0]],
    )
    try:
        there = set(zip(names, target.labels.tolist()))
        twice = [
            name
            for name, label in zip(samples.names, samples.labels.tolist())
            if (name, label) in there
        ]
        if twice:
            raise InputError(
                f"{append.path}: holds '{twice[0]}' already, as {len(twice)} of the {len(samples)} "
                f"samples to append; "
                f"leave them out"
            )
        count = len(target) + len(samples)
        about = replace(
            target.about,
            classes=classes,
            titles=titles,
            settings=common_settings(files),
            counts={
                how: sum(
                    file.about.counts.get(how, 0) if file.about else len(file) * (how == "kept")
                    for file in files
                )
                for how in target.about.counts
            },
            source={
                **target.about.source,
                "images": count,
                "fingerprint": f"{target.fingerprint()}+{samples.fingerprint()}",
                "appended": [
                    *target.about.source.get("appended", []),
                    *(file.about.source if file.about else {} for file in others),
                ],
            },
        )
        with atomic_file(append.note, "free space") as note:
            note.write(json.dumps({"bytes": target.num_bytes, "paths": wanted}).encode())
        os.rename(append.path, append.hidden)
        try:
            _append_images(
                append,
                target,
                itself=itself,
                samples=samples,
                num_workers=num_workers,
                names=names + samples.names,
                about=about,
            )
        except BaseException:
            append.recover(num_workers)
            raise
    finally:
        samples.close()
        itself.close()
    file = read_beton(append.hidden)
    read_back(
        file,
        num_workers,
        append.path.name,
        samples=np.concatenate([moved, np.arange(len(target), count)]),
    )
    os.rename(append.hidden, append.path)
    append.finish()
    print(
        f"{append.path}: {len(samples)} images appended, {len(moved)} moved; {count} images, "
        f"{len(classes)} classes, "
        f"{file.num_bytes / 1e6:.1f} MB",
        flush=True,
    )
    return read_beton(append.path)


def _append_images(
    append: _Append,
    target: Beton,
    *,
    itself: Samples,
    samples: Samples,
    num_workers: int,
    names: list[str],
    about: About,
) -> None:
    """Copies the images of `itself`, samples of the target that must move, and of `samples` behind
    the target's end, and writes the tables anew."""
    old, count = len(target), len(target) + len(samples)
    metadata, table, extras = (
        np.zeros(count, kind) for kind in (beton.SAMPLE_METADATA, beton.ALLOCATION, beton.EXTRA)
    )
    for name in ("mode", "width", "height"):
        metadata["f0"][name][:old] = getattr(target, f"{name}s")
    metadata["f0"]["data_ptr"][:old], metadata["f1"][:old], metadata["f1"][old:] = (
        target.pointers,
        target.labels,
        samples.labels,
    )
    table["sample_id"], table["ptr"][:old], table["size"][:old], extras[:old] = (
        np.arange(count),
        target.pointers,
        target.sizes,
        target.extras,
    )
    with open(append.hidden, "r+b", buffering=0) as file:
        pages = Pages(file, target.num_bytes + -target.num_bytes % PAGE_BYTES)
        for part, places in ((itself, itself.choice[:, 1]), (samples, range(old, count))):
            with closing(
                ordered(part.store, range(len(part)), threads=num_workers, name=part.place)
            ) as images:
                for place, image in tqdm(
                    zip(places, images),
                    total=len(part),
                    desc=append.path.name,
                    unit="img",
                    disable=not len(part),
                ):
                    pointer = pages.add(image.data)
                    metadata["f0"][place] = image.mode, image.width, image.height, pointer
                    table["ptr"][place], table["size"][place] = pointer, image.size
                    extras[place] = image.checksum, image.data.nbytes - image.size
        os.fsync(file.fileno())

    def keep(front: bytes) -> None:
        with atomic_file(append.front, "free space") as file:
            file.write(front)

    beton.put_around(
        append.hidden,
        pages.end,
        metadata=metadata,
        table=table,
        extras=extras,
        names=names,
        about=about,
        keep_front=keep,
    )
