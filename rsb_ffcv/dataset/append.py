"""Appends samples to a file in place, without writing its existing samples again."""

import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rsb_ffcv import InputError, beton, counted
from rsb_ffcv.atomic import atomic_file, flush_folder, hidden, lock
from rsb_ffcv.beton import PAGE_BYTES, About, Beton, common_classes, read_beton
from rsb_ffcv.dataset.assemble import (
    Samples,
    all_samples,
    common_settings,
    read_all,
)
from rsb_ffcv.dataset.workers import ordered
from rsb_ffcv.dataset.writer import Pages, read_back


class _Append:
    """The files of an append in progress: the file itself under a hidden name; a state file with
    its previous length; and the new front, which exists as soon as everything else is on the
    disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hidden, self.note, self.front = (
            hidden(path, what) for what in ("appending", "append", "front")
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder: one append at a time. Raises InputError if another process has the
        lock."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            lock(folder, self.path.parent)
            yield
        except BlockingIOError as error:
            raise InputError(
                f"{self.path.parent}: another process is appending to a file in this folder; wait "
                f"until it has finished"
            ) from error
        finally:
            os.close(folder)

    def recover(self, num_workers: int) -> dict:
        """Completes an interrupted append if its front exists, and undoes it otherwise.

        Returns the state of an append that is now complete, or {}. Raises InputError if the file
        exists under both names, or an appended image cannot be read back.
        """
        if not self.note.exists():
            return {}
        note = json.loads(self.note.read_text())
        if not self.hidden.exists():  # interrupted before or after all of the work
            self.finish()
            return (
                note if self.path.exists() and os.stat(self.path).st_size != note["bytes"] else {}
            )
        complete = self.front.exists()
        if self.path.exists():
            raise InputError(
                f"{self.path}: exists, and so does {self.hidden} of an interrupted append; move "
                f"one of them away"
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
    """Appends the samples of the files `paths` to `path`, in place.

    The images of `path` are not moved, except for those at the start that must make room for the
    longer table; these are copied to the end. Its classes keep their numbers; new classes follow.

    The file is hidden while this function works. After any interruption, the next call restores it,
    either unchanged or with all new samples. Raises InputError if a file cannot be read or written,
    or a sample has the name and the class of one that `path` already contains or of another one to
    append.
    """
    append = _Append(Path(path).resolve())  # the file itself if `path` is a link
    try:
        with append.locked():
            wanted = [str(Path(part).resolve()) for part in paths]
            if append.recover(num_workers).get("paths") == wanted:
                print(f"{path}: the interrupted append is now complete")
                return read_beton(path)
            return _append(append, read_all([path, *paths]), wanted, num_workers=num_workers)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free space or correct the "
            f"permissions, and run the same command again"
        ) from error


def _append(append: _Append, files: list[Beton], wanted: list[str], *, num_workers: int) -> Beton:
    target, others = files[0], files[1:]
    if target.about is None:
        raise InputError(
            f"{append.path}: another program wrote it, without checksums; write all samples to a "
            f"new file with merge"
        )
    classes, titles, numbers = common_classes(files, fixed=True)
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
        existing, duplicates = set(zip(names, target.labels.tolist())), []
        for sample in zip(samples.names, samples.labels.tolist()):
            if sample in existing:
                duplicates.append(sample[0])
            existing.add(sample)
        if duplicates:
            raise InputError(
                f"{append.path}: would contain '{duplicates[0]}' twice; {len(duplicates)} of the "
                f"{len(samples)} samples to append are duplicates; write the others to a new "
                f"file with the command subset, and append that"
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
        f"{append.path}: {counted(len(samples), 'image')} appended, {len(moved)} moved; "
        f"{counted(count, 'image')}, {counted(len(classes), 'class', 'classes')}, "
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
    """Copies images to the end of the target and writes its tables again.

    append: the names of the append
    target: the file to append to
    itself: samples of the target that must move
    samples: the samples to append
    num_workers: threads
    names: names of all samples, those of the target first
    about: the new description of the file
    """
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

    beton.write_structure(
        append.hidden,
        pages.end,
        metadata=metadata,
        table=table,
        extras=extras,
        names=names,
        about=about,
        before_front=keep,
    )
