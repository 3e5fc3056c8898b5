"""New files from existing ones: merge, subset and shard. Images are copied as they are stored."""

import re
from pathlib import Path

import numpy as np

from rsb_ffcv import InputError, counted, first_line
from rsb_ffcv.beton import JPG, Beton, OpenFiles, common_classes, read_beton
from rsb_ffcv.dataset.inspect import read_verified
from rsb_ffcv.dataset.picture import BadPicture, Stored, stored
from rsb_ffcv.dataset.writer import write_beton
from rsb_ffcv.ops import native


class Samples:
    """Chosen samples of files, in the form that write_beton takes (writer.Pictures).

    files: the files to read
    choice: int64 (n, 2), number of the file and of the sample in it
    classes, titles: those of the new file
    numbers: for each file, the new label of each of its labels

    Raises InputError if a file cannot be opened.
    """

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
        self._opened: list[OpenFiles] = []
        try:
            for file in files:
                self._opened.append(file.open())
        except InputError:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.choice)

    def close(self) -> None:
        """Closes the files."""
        for file in self._opened:
            file.close()

    def place(self, index: int) -> str:
        """The file and number of sample `index`, for messages."""
        which, sample = self.choice[index].tolist()
        return f"{self.files[which].path}: sample {sample}"

    def identity(self, index: int) -> int:
        """XXH64 of label, pointer, size and checksum, which identify a sample."""
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
        """Differs between different choices, labels, classes and files."""
        parts = (
            "".join(file.fingerprint() for file in self.files).encode()
            + self.choice.tobytes()
            + self.labels.tobytes()
            + chr(0).join(self.classes).encode("utf-8", "surrogateescape")
        )
        return f"{native.checksum(np.frombuffer(parts, np.uint8)):016x}"

    def store(self, index: int) -> Stored:
        """The sample as it is stored. If its file has no entry points, they are added. Raises
        BadPicture if the sample is damaged."""
        which, sample = self.choice[index].tolist()
        file, opened = self.files[which], self._opened[which]
        try:
            data = read_verified(opened, file, sample, decode=file.extras is None)
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
    """Writes all samples of the files `paths`, in their order, to one new file. Classes are matched
    by name. Raises InputError if a file cannot be read or written, or a sample is damaged."""
    files = read_all(paths)
    classes, titles, numbers = common_classes(files)
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
    """Writes some samples of a file to a new one: those that meet all conditions.

    path: the file to read
    write_path: the new file
    num_workers: threads
    classes: names or numbers, separated by commas. They are renumbered in their old order
    samples: numbers and ranges, such as 0-99,200
    per_class: number of samples to keep per class, from its start; 0: all

    Raises InputError if no sample meets the conditions, a file cannot be read or written, or a
    sample is damaged.
    """
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
            f"{path}: no sample matches `classes`={classes}, `samples`={samples} and "
            f"`per_class`={per_class}; choose more"
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
    """Writes `shards` new files of consecutive samples to the folder write_path. Their sizes differ
    by one sample at most, and each lists all classes. Raises InputError as merge does."""
    file = read_beton(path)
    if shards > len(file):
        raise InputError(f"`shards`={shards}: {path} has only {len(file)} samples; lower it")
    _make_folder(Path(write_path))
    classes, titles, numbers = common_classes([file])
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
    """The numbers in a text such as "0-99,200". Raises InputError for a text of another form or a
    number that is not below `count`."""
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
                f"`samples`={text}: '{part}' is not a number or range below {count}; give numbers "
                f"and ranges, such as 0-99,200"
            )
        found += range(int(first), int(last) + 1)
    return found


def class_number(file: Beton, wanted: str) -> int:
    """The label of a class, given by name or number. Raises InputError if the class is missing."""
    names = [file.class_name(label) for label in range(file.num_classes)]
    if wanted in names:
        return names.index(wanted)
    if re.fullmatch("[0-9]{1,9}", wanted) and int(wanted) < len(names):
        return int(wanted)
    raise InputError(
        f"`classes`: {file.path} has no class '{wanted}'; info lists its {len(names)} classes"
    )


def read_all(paths: list[str]) -> list[Beton]:
    """Opens the files. Raises InputError if the list is empty or a file cannot be read."""
    if not paths:
        raise InputError("`paths` is empty; give .beton files, separated by commas")
    return [read_beton(path) for path in paths]


def all_samples(files: list[Beton], which: int) -> np.ndarray:
    """All samples of one file, as a `choice` for Samples. which: number of the file."""
    return np.stack([np.full(len(files[which]), which, np.int64), np.arange(len(files[which]))], 1)


def common_settings(files: list[Beton]) -> dict:
    """The settings that the images were stored with: one dict, or a list of the different ones
    under "of_parts"."""
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
        f"{path}: {counted(len(written), 'image')}, "
        f"{counted(written.num_classes, 'class', 'classes')}, "
        f"{written.num_bytes / 1e6:.1f} MB",
        flush=True,
    )
    return written


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"`write_path`={path}: cannot be created ({error.strerror}); choose another"
        ) from error
