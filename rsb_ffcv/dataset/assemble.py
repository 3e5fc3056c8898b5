"""Files from files: merge, subset and shard write new ones, concat appends to one. Images are taken over as they are stored."""
import fcntl
import json
import os
import re
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rsb_ffcv import InputError, beton, first_line
from rsb_ffcv.atomic import atomic_file, flush_folder
from rsb_ffcv.beton import JPG, PAGE_BYTES, About, Beton, read_beton
from rsb_ffcv.dataset.inspect import read_sound
from rsb_ffcv.dataset.picture import BadPicture, Stored, stored
from rsb_ffcv.dataset.workers import ordered
from rsb_ffcv.dataset.writer import Pages, read_back, write_beton
from rsb_ffcv.ops import native


class Samples:
    """Chosen samples of files, as what write_beton takes. files: to take them from; choice: int64 (n, 2), file and sample;
    classes, titles: of the new file; numbers: for each file, the new label of each of its labels."""

    def __init__(self, files: list[Beton], choice: np.ndarray, classes: list[str], titles: list[str], numbers: list[np.ndarray]):
        self.files, self.choice, self.classes, self.titles = files, choice, classes, titles
        names = [file.names() for file in files]
        self.names = [names[which][sample] for which, sample in choice.tolist()]
        self.labels = np.array([numbers[which][files[which].labels[sample]] for which, sample in choice.tolist()], np.int64)
        self._opened = []
        try:
            for file in files:
                self._opened.append(open(file.path, "rb", buffering=0))
        except OSError as error:
            self.close()
            raise InputError(f"{file.path}: cannot be opened as number {len(self._opened) + 1} ({error.strerror}); merge fewer at a time, "
                             f"or raise `ulimit -n`") from error

    def __len__(self):
        return len(self.choice)

    def close(self):
        for file in self._opened:
            file.close()

    def place(self, index: int) -> str:
        which, sample = self.choice[index].tolist()
        return f"{self.files[which].path}: sample {sample}"

    def identity(self, index: int) -> int:
        """XXH64 of what tells this sample from others."""
        which, sample = self.choice[index].tolist()
        file = self.files[which]
        known = [int(self.labels[index]), int(file.pointers[sample]), int(file.sizes[sample]), int(file.extras["checksum"][sample])
                 if file.extras is not None else 0]
        return native.checksum(np.array(known, np.uint64))

    def fingerprint(self) -> str:
        parts = "".join(file.fingerprint() for file in self.files).encode() + self.choice.tobytes() + self.labels.tobytes()
        return f"{native.checksum(np.frombuffer(parts + chr(0).join(self.classes).encode('utf-8', 'surrogateescape'), np.uint8)):016x}"

    def store(self, index: int) -> Stored:
        """The sample as it is stored, with entry points where its file has none. Raises BadPicture for a damaged one."""
        which, sample = self.choice[index].tolist()
        file, opened = self.files[which], self._opened[which].fileno()
        try:
            data = read_sound(opened, file, sample, file.extras is None)
        except ValueError as error:
            raise BadPicture(f"{self.place(index)} {first_line(error).removeprefix('the image ')}; write that file again, or leave the "
                             f"sample out") from error
        size, height, width = int(file.sizes[sample]), int(file.heights[sample]), int(file.widths[sample])
        entries = data[size:]
        if file.extras is None and file.modes[sample] == JPG:
            entries = native.entry_points(data, height, width)
        return stored(data[:size], entries, int(file.modes[sample]), height, width, "kept", self.place(index))


def merge(paths: list[str], write_path: str, num_workers: int) -> Beton:
    """One new file of all samples of some files, in their order. Classes are brought together by their names."""
    files = _read(paths)
    classes, titles, numbers = _common_classes(files, files[0])
    choice = np.concatenate([_all(files, which) for which in range(len(files))])
    return _write(write_path, Samples(files, choice, classes, titles, numbers), num_workers)


def subset(path: str, write_path: str, num_workers: int, classes: str = "", samples: str = "", per_class: int = 0) -> Beton:
    """A new file of some samples. classes: names or numbers, separated by commas; they are numbered anew, in their old order.
    samples: numbers and ranges, such as 0-99,200. per_class: the first so many of each class; 0: all. Together: those that
    fit all of them."""
    file = read_beton(path)
    names = [file.class_name(label) for label in range(file.num_classes)]
    kept = np.ones(len(file), bool)
    wanted = list(range(len(names)))
    if classes:
        wanted = sorted({class_number(file, name.strip()) for name in classes.split(",")})
        kept &= np.isin(file.labels, wanted)
    if samples:
        chosen = np.zeros(len(file), bool)
        chosen[sample_numbers(samples, len(file))] = True
        kept &= chosen
    if per_class:
        order = np.argsort(file.labels, kind="stable")
        _, firsts = np.unique(file.labels[order], return_index=True)
        rank = np.empty(len(file), np.int64)
        rank[order] = np.arange(len(file)) - np.repeat(firsts, np.diff([*firsts, len(file)]))
        kept &= rank < per_class
    if not kept.any():
        raise InputError(f"{path}: no sample fits cfg.classes={classes}, cfg.samples={samples} and cfg.per_class={per_class}; widen "
                         f"them")
    numbers = np.full(len(names), -1, np.int64)
    numbers[wanted] = np.arange(len(wanted))
    titles = [file.about.titles[label] for label in wanted] if file.about and file.about.titles else []
    choice = np.stack([np.zeros(int(kept.sum()), np.int64), np.flatnonzero(kept)], 1)
    return _write(write_path, Samples([file], choice, [names[label] for label in wanted], titles, [numbers]), num_workers)


def shard(path: str, write_path: str, shards: int, num_workers: int) -> list[Beton]:
    """`shards` new files of consecutive samples in the folder write_path, as equal as they can be: each with all classes."""
    file = read_beton(path)
    if shards > len(file):
        raise InputError(f"cfg.shards={shards}: {path} has {len(file)} samples only; give fewer")
    _make_folder(Path(write_path))
    classes, titles, numbers = _common_classes([file], file)
    parts = np.array_split(_all([file], 0), shards)
    return [_write(str(Path(write_path) / f"{file.path.stem}-{number:05d}-of-{shards:05d}.beton"),
                   Samples([file], part, classes, titles, numbers), num_workers) for number, part in enumerate(parts)]


def sample_numbers(text: str, count: int) -> list[int]:
    """Of "0-99,200": all numbers, each below `count`. Raises InputError."""
    found = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not re.fullmatch("[0-9]{1,15}", first) or not re.fullmatch("[0-9]{1,15}", last) or not int(first) <= int(last) < count:
            raise InputError(f"cfg.samples={text}: '{part}' is no number or range below {count}; give such as 0-99,200")
        found += range(int(first), int(last) + 1)
    return found


def class_number(file: Beton, wanted: str) -> int:
    """The label of a class by its name or number. Raises InputError."""
    names = [file.class_name(label) for label in range(file.num_classes)]
    if wanted in names:
        return names.index(wanted)
    if re.fullmatch("[0-9]{1,9}", wanted) and int(wanted) < len(names):
        return int(wanted)
    raise InputError(f"cfg.classes: {file.path} has no class '{wanted}'; info lists its {len(names)}")


def _read(paths: list[str]) -> list[Beton]:
    if not paths:
        raise InputError("cfg.paths names no file; give .beton files, separated by commas")
    return [read_beton(path) for path in paths]


def _all(files: list[Beton], which: int) -> np.ndarray:
    return np.stack([np.full(len(files[which]), which, np.int64), np.arange(len(files[which]))], 1)


def _common_classes(files: list[Beton], first: Beton, fixed: bool = False) -> tuple[list[str], list[str], list[np.ndarray]]:
    """Classes and titles of several files together, and each file's labels in them. Where their lists differ, they are sorted
    anew, or, `fixed`, the first file's stay and others follow. A file without names has the first's numbers."""
    lists = [[file.class_name(label) for label in range(file.num_classes)] if file.about else None for file in files]
    named = [names for names in lists if names is not None]
    if not named:
        classes = [str(label) for label in range(max(file.num_classes for file in files))]
    else:
        known = set(named[0])
        others = [name for name in dict.fromkeys(name for names in named for name in names) if name not in known]
        classes = named[0] + others
        if others and not fixed:
            classes = sorted(classes, key=(lambda name: (len(name), name)) if all(map(str.isdigit, classes)) else None)
    numbers = []
    for file, names in zip(files, lists):
        if names is None:
            if file.num_classes > len(classes) or named and classes != named[0]:
                raise InputError(f"{file.path}: has no class names, and its numbers cannot be matched with classes that others bring; "
                                 f"merge it with files of its own classes")
            names = classes[:file.num_classes]
        places = {name: number for number, name in enumerate(classes)}
        numbers.append(np.array([places[name] for name in names], np.int64))
    titles = {}
    for file in files:
        if file.about and file.about.titles:
            titles.update(zip(file.about.classes, file.about.titles))
    return classes, [titles[name] for name in classes] if all(name in titles for name in classes) else [], numbers


def _settings(files: list[Beton]) -> dict:
    """What the images were stored with: one answer, or the files' different ones."""
    known = []
    for file in files:
        settings = file.about.settings if file.about else {"write_mode": "of another program"}
        known += [part for part in settings.get("of_parts", [settings]) if part not in known]
    return known[0] if len(known) == 1 else {"of_parts": known}


def _write(write_path: str, samples: Samples, num_workers: int) -> Beton:
    path = Path(write_path)
    if any(path.resolve() == file.path.resolve() for file in samples.files):
        raise InputError(f"cfg.write_path={path}: is one of the files to read; choose another")
    _make_folder(path.parent)
    try:
        sources = [file.about.source if file.about else {"dataset": "unknown"} for file in samples.files]
        split = {source.get("split") for source in sources}
        written = write_beton(path, samples, samples.store, _settings(samples.files), num_workers,
                              described={"dataset": "beton", "split": split.pop() if len(split) == 1 else None})
    finally:
        samples.close()
    print(f"{path}: {len(written)} images, {written.num_classes} classes, {written.num_bytes / 1e6:.1f} MB", flush=True)
    return written


def _make_folder(path: Path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cfg.write_path={path}: cannot be made ({error.strerror}); choose another") from error


# ---- append in place ------------------------------------------------------------------------------------------------

class _Append:
    """The names under which an append stands while it is under way: the file itself, hidden; a note with its length before; and
    the new front, once all behind it is on the disk."""

    def __init__(self, path: Path):
        self.path = path
        self.hidden, self.note, self.front = (path.with_name(f".{path.name}.{what}") for what in ("appending", "append", "front"))

    @contextmanager
    def locked(self):
        """One append at a time in a folder."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise InputError(f"{self.path.parent}: another process is appending to a file in it; wait for it") from error
        finally:
            os.close(folder)

    def recover(self, num_workers: int) -> dict:
        """Ends what an interrupted append began: forward where its front is there, else back. The note of one that is now
        complete, or nothing."""
        if not self.note.exists():
            return {}
        note = json.loads(self.note.read_text())
        if not self.hidden.exists():  # stopped before or after all of it
            self.finish()
            return note if self.path.exists() and os.stat(self.path).st_size != note["bytes"] else {}
        complete = self.front.exists()
        if self.path.exists():
            raise InputError(f"{self.path}: stands beside {self.hidden}, of an interrupted append; move one of them away")
        with open(self.hidden, "r+b") as file:
            if complete:
                file.write(self.front.read_bytes())
            else:
                file.truncate(note["bytes"])
            file.flush()
            os.fsync(file.fileno())
        if complete:
            file = read_beton(self.hidden)
            read_back(file, num_workers, self.path.name, np.flatnonzero(file.pointers >= note["bytes"]))
        os.rename(self.hidden, self.path)
        self.finish()
        return note if complete else {}

    def finish(self):
        flush_folder(self.path.parent)
        for path in (self.front, self.note):
            path.unlink(missing_ok=True)


def concat(path: str, paths: list[str], num_workers: int) -> Beton:
    """Appends the samples of files to `path`, in place: its images stay where they are, but for those in the way of the longer
    table at the file's start, which are copied behind. Its classes keep their numbers; new ones follow.

    While it works the file is hidden; whatever stops it, the next call brings it back, as it was or with all that was to be
    appended. Raises InputError, also for samples that are there already, by name.
    """
    append = _Append(Path(path).resolve())  # the file itself, where `path` is a link
    try:
        with append.locked():
            wanted = [str(Path(part).resolve()) for part in paths]
            if append.recover(num_workers).get("paths") == wanted:
                print(f"{path}: the interrupted append is complete now")
                return read_beton(path)
            return _append(append, _read([path, *paths]), wanted, num_workers)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); free space or see to permissions, and give the same command "
                         f"again") from error


def _append(append: _Append, files: list[Beton], wanted: list[str], num_workers: int) -> Beton:
    target, others = files[0], files[1:]
    if target.about is None:
        raise InputError(f"{append.path}: another program wrote it, without checksums; make a new file of all with merge")
    classes, titles, numbers = _common_classes(files, target, fixed=True)
    choice = np.concatenate([_all(files, which) for which in range(1, len(files))])
    names = target.names()
    samples = Samples(others, choice - [1, 0], classes, titles, numbers[1:])
    moved = np.flatnonzero(target.pointers < beton.front_bytes(len(target) + len(samples)))
    itself = Samples([target], np.stack([np.zeros_like(moved), moved], 1), classes, titles, [numbers[0]])
    try:
        there = set(zip(names, target.labels.tolist()))
        twice = [name for name, label in zip(samples.names, samples.labels.tolist()) if (name, label) in there]
        if twice:
            raise InputError(f"{append.path}: holds '{twice[0]}' already, as {len(twice)} of the {len(samples)} samples to append; "
                             f"leave them out")
        count = len(target) + len(samples)
        about = replace(target.about, classes=classes, titles=titles, settings=_settings(files), counts={
            how: sum(file.about.counts.get(how, 0) if file.about else len(file) * (how == "kept") for file in files)
            for how in target.about.counts}, source={
            **target.about.source, "images": count, "fingerprint": f"{target.fingerprint()}+{samples.fingerprint()}",
            "appended": [*target.about.source.get("appended", []), *(file.about.source if file.about else {} for file in others)]})
        with atomic_file(append.note, "free space") as note:
            note.write(json.dumps({"bytes": target.num_bytes, "paths": wanted}).encode())
        os.rename(append.path, append.hidden)
        try:
            _append_images(append, target, itself, samples, num_workers, names + samples.names, about)
        except BaseException:
            append.recover(num_workers)
            raise
    finally:
        samples.close()
        itself.close()
    file = read_beton(append.hidden)
    read_back(file, num_workers, append.path.name, np.concatenate([moved, np.arange(len(target), count)]))
    os.rename(append.hidden, append.path)
    append.finish()
    print(f"{append.path}: {len(samples)} images appended, {len(moved)} moved; {count} images, {len(classes)} classes, "
          f"{file.num_bytes / 1e6:.1f} MB", flush=True)
    return read_beton(append.path)


def _append_images(append: _Append, target: Beton, itself: Samples, samples: Samples, num_workers: int, names: list[str], about: About):
    """Copies the images of `itself`, samples of the target that must move, and of `samples` behind the target's end, and writes the
    tables anew."""
    old, count = len(target), len(target) + len(samples)
    metadata, table, extras = (np.zeros(count, kind) for kind in (beton.SAMPLE_METADATA, beton.ALLOCATION, beton.EXTRA))
    for name in ("mode", "width", "height"):
        metadata["f0"][name][:old] = getattr(target, f"{name}s")
    metadata["f0"]["data_ptr"][:old], metadata["f1"][:old], metadata["f1"][old:] = target.pointers, target.labels, samples.labels
    table["sample_id"], table["ptr"][:old], table["size"][:old], extras[:old] = np.arange(count), target.pointers, target.sizes, target.extras
    with open(append.hidden, "r+b", buffering=0) as file:
        pages = Pages(file, target.num_bytes + -target.num_bytes % PAGE_BYTES)
        for part, places in ((itself, itself.choice[:, 1]), (samples, range(old, count))):
            with closing(ordered(part.store, range(len(part)), num_workers, name=part.place)) as images:
                for place, image in tqdm(zip(places, images), total=len(part), desc=append.path.name, unit="img", disable=not len(part)):
                    pointer = pages.add(image.data)
                    metadata["f0"][place] = image.mode, image.width, image.height, pointer
                    table["ptr"][place], table["size"][place] = pointer, image.size
                    extras[place] = image.checksum, image.data.nbytes - image.size
        os.fsync(file.fileno())

    def keep(front: bytes):
        with atomic_file(append.front, "free space") as file:
            file.write(front)

    beton.put_around(append.hidden, pages.end, metadata, table, extras, names, about, keep)
