"""New files from files: merge, subset and shard. Images are taken over as they are stored."""

import re
from pathlib import Path

import numpy as np

from rsb_ffcv import InputError, first_line
from rsb_ffcv.beton import JPG, Beton, read_beton
from rsb_ffcv.dataset.inspect import read_sound
from rsb_ffcv.dataset.picture import BadPicture, Stored, stored
from rsb_ffcv.dataset.writer import write_beton
from rsb_ffcv.ops import native


class Samples:
    """Chosen samples of files, as what write_beton takes. files: to take them from; choice: int64
    (n, 2), file and sample; classes, titles: of the new file; numbers: for each file, the new label
    of each of its labels."""

    def __init__(
        self,
        files: list[Beton],
        choice: np.ndarray,
        *,
        classes: list[str],
        titles: list[str],
        numbers: list[np.ndarray],
    ) -> None:
        self.files, self.choice, self.classes, self.titles = files, choice, classes, titles
        names = [file.names() for file in files]
        self.names = [names[which][sample] for which, sample in choice.tolist()]
        self.labels = np.array(
            [numbers[which][files[which].labels[sample]] for which, sample in choice.tolist()],
            np.int64,
        )
        self._opened = []
        try:
            for file in files:
                # Open until close()
                self._opened.append(open(file.path, "rb", buffering=0))  # noqa: SIM115
        except OSError as error:
            self.close()
            raise InputError(
                f"{file.path}: cannot be opened as number {len(self._opened) + 1} "
                f"({error.strerror}); merge fewer at a time, "
                f"or raise `ulimit -n`"
            ) from error

    def __len__(self) -> int:
        return len(self.choice)

    def close(self) -> None:
        for file in self._opened:
            file.close()

    def place(self, index: int) -> str:
        which, sample = self.choice[index].tolist()
        return f"{self.files[which].path}: sample {sample}"

    def identity(self, index: int) -> int:
        """XXH64 of what tells this sample from others."""
        which, sample = self.choice[index].tolist()
        file = self.files[which]
        known = [
            int(self.labels[index]),
            int(file.pointers[sample]),
            int(file.sizes[sample]),
            int(file.extras["checksum"][sample]) if file.extras is not None else 0,
        ]
        return native.checksum(np.array(known, np.uint64))

    def fingerprint(self) -> str:
        parts = (
            "".join(file.fingerprint() for file in self.files).encode()
            + self.choice.tobytes()
            + self.labels.tobytes()
            + chr(0).join(self.classes).encode("utf-8", "surrogateescape")
        )
        return f"{native.checksum(np.frombuffer(parts, np.uint8)):016x}"

    def store(self, index: int) -> Stored:
        """The sample as it is stored, with entry points where its file has none. Raises BadPicture
        for a damaged one."""
        which, sample = self.choice[index].tolist()
        file, opened = self.files[which], self._opened[which].fileno()
        try:
            data = read_sound(opened, file, sample, decode=file.extras is None)
        except ValueError as error:
            raise BadPicture(
                f"{self.place(index)} {first_line(error)}; write that file again, or leave the "
                f"sample out"
            ) from error
        size, height, width = (
            int(file.sizes[sample]),
            int(file.heights[sample]),
            int(file.widths[sample]),
        )
        entries = data[size:]
        if file.extras is None and file.modes[sample] == JPG:
            entries = native.entry_points(data, height, width)
        return stored(
            data[:size],
            entries,
            mode=int(file.modes[sample]),
            height=height,
            width=width,
            how="kept",
            name=self.place(index),
        )


def merge(paths: list[str], write_path: str, num_workers: int) -> Beton:
    """One new file of all samples of some files, in their order. Classes are brought together by
    their names."""
    files = read_all(paths)
    classes, titles, numbers = common_classes(files, files[0])
    choice = np.concatenate([all_samples(files, which) for which in range(len(files))])
    return _write(
        write_path,
        Samples(files, choice, classes=classes, titles=titles, numbers=numbers),
        num_workers=num_workers,
    )


def subset(
    path: str,
    write_path: str,
    *,
    num_workers: int,
    classes: str = "",
    samples: str = "",
    per_class: int = 0,
) -> Beton:
    """A new file of some samples. classes: names or numbers, separated by commas; they are numbered
    anew, in their old order. samples: numbers and ranges, such as 0-99,200. per_class: the first so
    many of each class; 0: all. Together: those that fit all of them."""
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
        raise InputError(
            f"{path}: no sample fits `classes`={classes}, `samples`={samples} and "
            f"`per_class`={per_class}; widen "
            f"them"
        )
    numbers = np.full(len(names), -1, np.int64)
    numbers[wanted] = np.arange(len(wanted))
    titles = (
        [file.about.titles[label] for label in wanted] if file.about and file.about.titles else []
    )
    choice = np.stack([np.zeros(int(kept.sum()), np.int64), np.flatnonzero(kept)], 1)
    return _write(
        write_path,
        Samples(
            [file],
            choice,
            classes=[names[label] for label in wanted],
            titles=titles,
            numbers=[numbers],
        ),
        num_workers=num_workers,
    )


def shard(path: str, write_path: str, shards: int, *, num_workers: int) -> list[Beton]:
    """`shards` new files of consecutive samples in the folder write_path, as equal as they can be:
    each with all classes."""
    file = read_beton(path)
    if shards > len(file):
        raise InputError(f"`shards`={shards}: {path} has {len(file)} samples only; give fewer")
    _make_folder(Path(write_path))
    classes, titles, numbers = common_classes([file], file)
    parts = np.array_split(all_samples([file], 0), shards)
    return [
        _write(
            str(Path(write_path) / f"{file.path.stem}-{number:05d}-of-{shards:05d}.beton"),
            Samples([file], part, classes=classes, titles=titles, numbers=numbers),
            num_workers=num_workers,
        )
        for number, part in enumerate(parts)
    ]


def sample_numbers(text: str, count: int) -> list[int]:
    """Of "0-99,200": all numbers, each below `count`. Raises InputError."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if (
            not re.fullmatch("[0-9]{1,15}", first)
            or not re.fullmatch("[0-9]{1,15}", last)
            or not int(first) <= int(last) < count
        ):
            raise InputError(
                f"`samples`={text}: '{part}' is no number or range below {count}; give such as "
                f"0-99,200"
            )
        found += range(int(first), int(last) + 1)
    return found


def class_number(file: Beton, wanted: str) -> int:
    """The label of a class by its name or number. Raises InputError."""
    names = [file.class_name(label) for label in range(file.num_classes)]
    if wanted in names:
        return names.index(wanted)
    if re.fullmatch("[0-9]{1,9}", wanted) and int(wanted) < len(names):
        return int(wanted)
    raise InputError(f"`classes`: {file.path} has no class '{wanted}'; info lists its {len(names)}")


def read_all(paths: list[str]) -> list[Beton]:
    """Raises InputError where there is none, or one cannot be read."""
    if not paths:
        raise InputError("`paths` names no file; give .beton files, separated by commas")
    return [read_beton(path) for path in paths]


def all_samples(files: list[Beton], which: int) -> np.ndarray:
    """A choice, as Samples takes it, of all of one file's."""
    return np.stack([np.full(len(files[which]), which, np.int64), np.arange(len(files[which]))], 1)


def common_classes(
    files: list[Beton], first: Beton, fixed: bool = False
) -> tuple[list[str], list[str], list[np.ndarray]]:
    """Classes and titles of several files together, and each file's labels in them. Where their
    lists differ, they are sorted anew, or, `fixed`, the first file's stay and others follow. A file
    without names has the first's numbers."""
    lists = [
        [file.class_name(label) for label in range(file.num_classes)] if file.about else None
        for file in files
    ]
    named = [names for names in lists if names is not None]
    if not named:
        classes = [str(label) for label in range(max(file.num_classes for file in files))]
    else:
        known = set(named[0])
        others = [
            name
            for name in dict.fromkeys(name for names in named for name in names)
            if name not in known
        ]
        classes = named[0] + others
        if others and not fixed:
            classes = sorted(
                classes,
                key=(lambda name: (len(name), name)) if all(map(str.isdigit, classes)) else None,
            )
    numbers = []
    for file, names in zip(files, lists):
        if names is None:
            if file.num_classes > len(classes) or named and classes != named[0]:
                raise InputError(
                    f"{file.path}: has no class names, and its numbers cannot be matched with "
                    f"classes that others bring; "
                    f"merge it with files of its own classes"
                )
            names = classes[: file.num_classes]
        places = {name: number for number, name in enumerate(classes)}
        numbers.append(np.array([places[name] for name in names], np.int64))
    titles: dict[str, str] = {}
    for file in files:
        if file.about and file.about.titles:
            titles.update(zip(file.about.classes, file.about.titles))
    return (
        classes,
        [titles[name] for name in classes] if all(name in titles for name in classes) else [],
        numbers,
    )


def common_settings(files: list[Beton]) -> dict:
    """What the images were stored with: one answer, or the files' different ones."""
    known = []
    for file in files:
        settings = file.about.settings if file.about else {"write_mode": "of another program"}
        known += [part for part in settings.get("of_parts", [settings]) if part not in known]
    return known[0] if len(known) == 1 else {"of_parts": known}


def _write(write_path: str, samples: Samples, num_workers: int) -> Beton:
    path = Path(write_path)
    if any(path.resolve() == file.path.resolve() for file in samples.files):
        raise InputError(f"`write_path`={path}: is one of the files to read; choose another")
    _make_folder(path.parent)
    try:
        sources = [
            file.about.source if file.about else {"dataset": "unknown"} for file in samples.files
        ]
        split = {source.get("split") for source in sources}
        written = write_beton(
            path,
            samples,
            store=samples.store,
            settings=common_settings(samples.files),
            num_workers=num_workers,
            described={"dataset": "beton", "split": split.pop() if len(split) == 1 else None},
        )
    finally:
        samples.close()
    print(
        f"{path}: {len(written)} images, {written.num_classes} classes, "
        f"{written.num_bytes / 1e6:.1f} MB",
        flush=True,
    )
    return written


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"`write_path`={path}: cannot be made ({error.strerror}); choose another"
        ) from error
