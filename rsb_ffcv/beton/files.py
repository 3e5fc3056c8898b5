"""The images of `.beton` files: of one file, or of several as one dataset.

In: the structure of each file (`layout`). Out: `Images` and `Beton`, arrays with one entry per
sample. Their pointers are checked and can be passed to native code.
"""

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rsb_ffcv import InputError
from rsb_ffcv.beton.layout import MAX_CLASSES, RAW, About, Structure, read_structure
from rsb_ffcv.ops.native import checksum, resized

MAX_FILES = 1 << 16  # of a dataset


@dataclass(frozen=True, eq=False, kw_only=True)
class Images:
    """The images of one or several files, whose pointers have all been checked. Arrays have one
    entry per sample, in dataset order: file by file.

    path: the file; of several, what named them, for messages
    paths: the files
    num_bytes: their length
    files: uint16, number of each sample's file in `paths`
    pointers: uint64, position of the stored image, in bytes from the start of its file
    sizes: uint64, bytes of the stored image
    modes: uint8, `JPG` or `RAW`
    heights, widths: uint16, pixels
    extras: EXTRA records; None in files that FFCV wrote
    """

    path: Path
    paths: tuple[Path, ...]
    num_bytes: int
    files: np.ndarray
    pointers: np.ndarray
    sizes: np.ndarray
    modes: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    extras: np.ndarray | None

    def __len__(self) -> int:
        return len(self.pointers)

    @cached_property
    def stored_bytes(self) -> np.ndarray:
        """uint64: bytes of each image with its entry points."""
        return self.sizes if self.extras is None else self.sizes + self.extras["entry_bytes"]

    def place(self, index: int) -> str:
        """The file of a sample and its number there, for messages."""
        number = int(self.files[index])
        inside = index - int(np.searchsorted(self.files, number))
        of_all = f" (sample {index} of {self.path})" if len(self.paths) > 1 else ""
        return f"{self.paths[number]}: sample {inside}{of_all}"

    def open(self) -> "OpenFiles":
        """Opens the files. Raises InputError if that fails."""
        return OpenFiles(self.paths)

    def read(self, opened: "OpenFiles", index: int) -> np.ndarray:
        """Reads an image and its entry points, uint8, as they are stored. Raises ValueError if the
        bytes changed after they were written, OSError if they cannot be read."""
        data = np.empty(int(self.stored_bytes[index]), np.uint8)
        file = int(opened.descriptors[self.files[index]])
        if os.preadv(file, [data], int(self.pointers[index])) != data.nbytes:
            raise ValueError("cannot be read: the file ends inside it")
        if self.extras is not None and checksum(data) != self.extras["checksum"][index]:
            raise ValueError("is damaged: its bytes do not match their checksum")
        return data

    def picture(self, opened: "OpenFiles", index: int) -> np.ndarray:
        """Reads and decodes an image: uint8 (height, width, 3). Arguments and errors as in `read`;
        also ValueError if the image cannot be decoded."""
        sides = int(self.heights[index]), int(self.widths[index])
        data = self.read(opened, index)[: int(self.sizes[index])]
        if self.modes[index] == RAW:
            return data.reshape(*sides, 3)
        return resized(data, sides, sides)


class OpenFiles:
    """Open files, also a context that closes them.

    descriptors: int32, one per file.

    Raises InputError if one cannot be opened.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: list[BinaryIO] = []
        for path in paths:
            try:
                self._files.append(open(path, "rb", buffering=0))  # noqa: SIM115 closed in close()
            except OSError as error:
                self.close()
                raise InputError(
                    f"{path}: cannot be opened as file number {len(self._files) + 1} "
                    f"({error.strerror}); use fewer files, or raise `ulimit -n`"
                ) from error
        self.descriptors = np.array([file.fileno() for file in self._files], np.int32)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True, eq=False, kw_only=True)
class Beton(Images):
    """The images and labels of one or several files.

    labels: int64, 0 or more
    about: the description; None in files that FFCV wrote
    names_at: of each file, the position of its names (first byte, length in bytes, XXH64); None in
        one that FFCV wrote
    """

    labels: np.ndarray
    about: About | None
    names_at: tuple[tuple[int, int, int] | None, ...]

    @property
    def num_classes(self) -> int:
        """The number of classes that the file lists. If it lists none: the largest label + 1."""
        return len(self.about.classes) if self.about else int(self.labels.max()) + 1

    def class_name(self, label: int) -> str:
        """The name that the file lists. If it lists none: the number."""
        return self.about.classes[label] if self.about else str(label)

    def names(self) -> list[str]:
        """The samples' names: their paths within the source, or `sample_<number>` if a file has no
        names. Raises InputError if they are damaged, OSError if they cannot be read."""
        found: list[str] = []
        for number, count in enumerate(np.bincount(self.files).tolist()):
            if (text := self._names_of_file(number)) is None:
                found += [f"sample_{inside:08d}" for inside in range(count)]
            else:
                found += text.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
        return found

    def names_of(self, samples: Iterable[int]) -> dict[int, str]:
        """The names of a few samples, as in `names`, without making all of them. Raises the same
        errors, for the files of these samples."""
        chosen, found = np.unique(np.fromiter(samples, np.int64)), dict[int, str]()
        for number in np.unique(self.files[chosen]).tolist():
            text, first = self._names_of_file(number), int(np.searchsorted(self.files, number))
            ends = np.flatnonzero(text == 0) if text is not None else ()
            for index in chosen[self.files[chosen] == number].tolist():
                inside = index - first
                if text is None:
                    found[index] = f"sample_{inside:08d}"
                    continue
                name = text[ends[inside - 1] + 1 if inside else 0 : ends[inside]].tobytes()
                found[index] = name.decode("utf-8", "surrogateescape")
        return found

    def _names_of_file(self, number: int) -> np.ndarray | None:
        """The names of a file's samples, uint8, each with a zero after it; None if it has none."""
        path, place = self.paths[number], self.names_at[number]
        if place is None:
            return None
        start, length, expected = place
        with open(path, "rb") as file:
            file.seek(start)
            text = np.fromfile(file, np.uint8, length)
        ends, count = np.count_nonzero(text == 0), np.count_nonzero(self.files == number)
        if checksum(text) != expected or ends != count:
            raise InputError(
                f"{path}: damaged: the samples' names do not match their checksum; write it "
                f"again with write_ffcv.py"
            )
        return text

    def fingerprint(self) -> str:
        """Differs between files with different images, labels or order. A copy under another name
        has the same fingerprint. That of several files does not depend on where one ends."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        parts = [self.sizes, self.labels.view(np.uint64)]
        if len(self.paths) == 1:
            parts.insert(0, self.pointers)
        if self.extras is not None:
            parts.append(self.extras["checksum"])
        return f"{checksum(np.concatenate(parts)):016x}"


# ---------------------------------------------------------------- reading


def read_images(structure: Structure, name: str) -> Images:
    """The images of the image field `name`. Raises InputError if one of them points outside the
    file, or if its shape or size is invalid."""
    image = structure.column(name)
    pointers = image["data_ptr"].astype(np.uint64)
    sizes = structure.sizes(pointers)
    # Only files that write_ffcv.py wrote have them, and these have one image field.
    extras = structure.extras if name == "image" else None
    stored = sizes if extras is None else sizes + extras["entry_bytes"]
    heights, widths = (image[side].astype(np.uint16) for side in ("height", "width"))
    modes = image["mode"].copy()
    raw_bytes = np.multiply(heights, widths, dtype=np.uint64)
    raw_bytes *= 3
    for bad, what in (
        (structure.outside(pointers, stored) | (stored < sizes), "points outside the file"),
        ((heights == 0) | (widths == 0), "has no pixels"),
        (modes > RAW, "has an unknown storage mode"),
        (sizes == 0, "has no data"),
        ((modes == RAW) & (sizes != raw_bytes), "has a size that is not height x width x 3"),
    ):
        structure.refuse_any(bad, what)
    return Images(
        path=structure.path,
        paths=(structure.path,),
        num_bytes=structure.num_bytes,
        files=np.zeros(len(pointers), np.uint16),
        pointers=pointers,
        sizes=sizes,
        modes=modes,
        heights=heights,
        widths=widths,
        extras=extras,
    )


def read_beton(path: str | Path | Sequence[str | Path]) -> Beton:
    """Opens one or several files and checks all of their structure: header, fields, table, and each
    image's pointer, size and shape.

    path: a file; several files; or a text that names several: separated by commas, or by a pattern
        such as `shards/*.beton`, in the order of their names. The samples of several files are one
        dataset, and their classes are matched by name.

    Raises InputError, which names the file and the fault: missing, not a .beton, truncated, without
    an image field `image` and an int field `label`, or with a sample that points outside the file;
    or files that cannot be one dataset.
    """
    files = [labelled_images(read_structure(one)) for one in listed_files(path)]
    return files[0] if len(files) == 1 else _united(files, path)


def listed_files(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that `path` names: see read_beton. Raises InputError if there are none, or if one
    is named twice."""
    given = [path] if isinstance(path, str | Path) else list(path)
    if isinstance(path, str) and not os.path.exists(path):
        given = [part.strip() for part in path.split(",") if part.strip()] or [path]
    found: list[Path] = []
    for one in given:
        pattern = str(one)
        if os.path.exists(pattern) or not any(sign in pattern for sign in "*?["):
            found.append(Path(one))
            continue
        matching = sorted(glob.glob(pattern, recursive=True))
        if not matching:
            raise InputError(f"{pattern}: no file matches this pattern; correct it")
        found += map(Path, matching)
    if not 0 < len(found) <= MAX_FILES:
        raise InputError(f"{path}: names {len(found)} files; give 1 to {MAX_FILES}")
    known: set[str] = set()
    for one in found:
        if (real := os.path.realpath(one)) in known:
            raise InputError(f"{one}: is named twice; name each file once")
        known.add(real)
    return found


def _united(files: list[Beton], given: str | Path | Sequence[str | Path]) -> Beton:
    """Several files as one dataset. given: see `path` of read_beton."""
    with_extras = [file.extras is not None for file in files]
    if len(set(with_extras)) > 1:
        raise InputError(
            f"{files[with_extras.index(False)].path}: has no checksums, and "
            f"{files[with_extras.index(True)].path} has; `write_ffcv.py merge` adds them"
        )
    classes, titles, numbers = common_classes(files)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(file, name) for file in files])

    return Beton(
        path=Path(given if isinstance(given, str | Path) else ",".join(map(str, given))),
        paths=tuple(file.path for file in files),
        num_bytes=sum(file.num_bytes for file in files),
        files=np.repeat(np.arange(len(files), dtype=np.uint16), [len(file) for file in files]),
        labels=np.concatenate([number[file.labels] for file, number in zip(files, numbers)]),
        extras=joined("extras") if with_extras[0] else None,
        about=_common_about([file.about for file in files if file.about], classes, titles),
        names_at=tuple(place for file in files for place in file.names_at),
        **{name: joined(name) for name in ("pointers", "sizes", "modes", "heights", "widths")},
    )


def _common_about(abouts: list[About], classes: list[str], titles: list[str]) -> About | None:
    """The description of several files: what all of them say, the sums of their counts, and the
    smallest max_resolution."""
    if not abouts:
        return None

    def common(name: str) -> dict:
        first, *others = (getattr(about, name) for about in abouts)
        return {
            key: value
            for key, value in first.items()
            if all(other.get(key) == value for other in others)
        }

    shrunk = [about.settings.get("max_resolution", 0) for about in abouts]
    return About(
        tool=common("tool"),
        settings=common("settings") | {"max_resolution": min(filter(None, shrunk), default=0)},
        source=common("source"),
        classes=classes,
        titles=titles,
        counts={key: sum(about.counts.get(key, 0) for about in abouts) for key in abouts[0].counts},
    )


def common_classes(
    files: list[Beton], *, fixed: bool = False
) -> tuple[list[str], list[str], list[np.ndarray]]:
    """Combines the classes of several files. Returns (classes, titles, for each file the new label
    of each of its labels).

    If the lists of classes differ, the result is sorted; with `fixed`, the classes of the first
    list keep their numbers and others follow. A file without class names has the numbers of the
    first list. Raises InputError if its numbers cannot be matched.
    """
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
    places = {name: number for number, name in enumerate(classes)}
    numbers = []
    for file, names in zip(files, lists):
        if names is None:
            if file.num_classes > len(classes) or named and classes != named[0]:
                raise InputError(
                    f"{file.path}: has no class names, and its numbers cannot be matched with the "
                    f"classes of the other files; merge it with files of the same classes"
                )
            names = classes[: file.num_classes]
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


def labelled_images(structure: Structure) -> Beton:
    """The images of the field `image`, with the labels of the field `label`. Raises InputError as
    read_beton does."""
    found = {field.name: field.type_id for field in structure.fields}
    if not structure.is_labelled:
        structure.refuse(f"needs an image field 'image' and an int field 'label', has {found}")
    images, labels = read_images(structure, "image"), structure.column("label")
    about = structure.about
    most = len(about.classes) if about else MAX_CLASSES
    structure.refuse_any((labels < 0) | (labels >= most), f"has a label outside 0 .. {most - 1}")
    return Beton(
        **{field.name: getattr(images, field.name) for field in fields(images)},
        labels=np.ascontiguousarray(labels),
        about=about,
        names_at=(structure.names_at,),
    )
