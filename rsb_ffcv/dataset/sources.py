"""Sources of labelled raw images: a list of names and labels, and a function that reads each image.

Class numbers are positions in the sorted list of class names (wnids for ImageNet), the order that
torchvision, timm and every published checkpoint use. If a source has numeric labels, they are kept.
"""

import re
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import NoReturn

import numpy as np

from rsb_ffcv import InputError
from rsb_ffcv.beton import MAX_CLASSES
from rsb_ffcv.dataset.files import Files
from rsb_ffcv.dataset.picture import BadPicture
from rsb_ffcv.ops.native import checksum

IMAGE_SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".png",
    ".jfif",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
    ".gif",
}
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid")}


@dataclass(kw_only=True)
class Source:
    """Labelled pictures.

    classes: names in the order of the labels
    names: the pictures' paths within the source
    labels: int64, 0 .. len(classes) - 1
    read(index): a picture file's bytes, or uint8 pixels (height, width, 3); raises BadPicture,
        which names the picture
    titles: readable names of the classes, or empty
    faults: for a picture that is known to be bad before it is read, what is wrong with it
    origin: place of the first picture
    place(index): the place of a picture, for messages
    stamp(index): changes when the picture's file changes
    size(index): bytes of a picture's file, or None if they are not known without reading it
    """

    classes: list[str]
    names: list[str]
    labels: np.ndarray
    read: Callable[[int], bytes | np.ndarray]
    titles: list[str] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)
    origin: str = ""
    place: Callable[[int], str] = None  # type: ignore[assignment]  # set by __post_init__
    stamp: Callable[[int], tuple] = lambda index: ()
    size: Callable[[int], int | None] = lambda index: None

    def __post_init__(self) -> None:
        self.names, self.classes, self.titles = (
            [_storable(name) for name in part] for part in (self.names, self.classes, self.titles)
        )
        if self.place is None:
            self.place = self.names.__getitem__
        self.labels = np.asarray(self.labels, np.int64)
        if len(set(self.names)) < len(self.names):
            seen: set[str] = set()
            for index, name in enumerate(self.names):
                if name in seen:
                    self.faults.setdefault(index, "the source has this name twice")
                seen.add(name)

    def __len__(self) -> int:
        return len(self.names)

    def first(self, count: int) -> "Source":
        """The first `count` pictures, or all if there are fewer."""
        return self.chosen(np.arange(min(count, len(self))))

    def chosen(self, numbers: np.ndarray) -> "Source":
        """The pictures with these numbers, in this order."""
        kept = numbers.tolist()
        return replace(
            self,
            names=[self.names[number] for number in kept],
            labels=self.labels[numbers],
            faults={
                index: self.faults[number]
                for index, number in enumerate(kept)
                if number in self.faults
            },
            read=lambda index: self.read(kept[index]),
            place=lambda index: self.place(kept[index]),
            stamp=lambda index: self.stamp(kept[index]),
            size=lambda index: self.size(kept[index]),
        )

    def picture(self, index: int) -> bytes | np.ndarray:
        """read(index). Raises BadPicture if the picture has a fault."""
        if index in self.faults:
            raise BadPicture(f"{self.place(index)}: {self.faults[index]}; correct or remove it")
        return self.read(index)

    def identity(self, index: int) -> int:
        """CRC-32 of name, label and stamp."""
        known = f"{self.names[index]}\0{self.labels[index]}\0{self.stamp(index)}"
        return zlib.crc32(known.encode("utf-8", "surrogateescape"))

    def fingerprint(self) -> str:
        """Differs between sources with different names, labels, order or classes."""
        text = "\0".join([*self.names, "", *self.classes, "", *self.titles])
        known = text.encode("utf-8", "surrogateescape") + self.labels.tobytes()
        return f"{checksum(np.frombuffer(known, np.uint8)):016x}"


def _storable(name: str) -> str:
    """The name as it can be stored: valid UTF-8, and without zero bytes, which end a name in the
    file. Bytes from a file system that are not UTF-8 are kept."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        name = name.encode("utf-8", "replace").decode()
    return name.replace("\0", "_")


class Index:
    """Pictures as ranges of files, in a compact form: a million pictures take tens of megabytes."""

    def __init__(self, files: Files) -> None:
        self.files, self.labels = files, array("q")
        self.paths: list[str] = []
        self.names: list[str] = []
        self.faults: dict[int, str] = {}
        self._stamps: dict[int, tuple] = {}
        # For each picture: number of its file, first byte, bytes (-1: all)
        self._ranges = array("q")

    def add_file(self, name: str, label: int, shown: str) -> None:
        """Adds a whole file. name: its path in `files`; shown: the image's name."""
        self.paths.append(name)
        self._add(shown, label, start=0, length=-1)

    def add_member(self, shown: str, label: int, *, start: int, length: int) -> None:
        """Adds a part of the last file in `paths`. length -1: not a regular file."""
        if length < 0:
            self.faults[len(self.names)] = "is a link or device in its archive, not a file"
        self._add(shown, label, start=start, length=max(length, 0))

    def _add(self, shown: str, label: int, *, start: int, length: int) -> None:
        self.names.append(shown)
        self.labels.append(label)
        self._ranges.extend((len(self.paths) - 1, start, length))

    def read(self, index: int) -> bytes:
        path, start, length = self._ranges[3 * index : 3 * index + 3]
        return self.files.read(self.paths[path], start, length)

    def stamp(self, index: int) -> tuple:
        path, start, length = self._ranges[3 * index : 3 * index + 3]
        if length < 0:
            return self.files.stamp(self.paths[path])
        if path not in self._stamps:  # many images in one file: read its stamp once
            self._stamps[path] = self.files.stamp(self.paths[path])
        return start, *self._stamps[path]

    def size(self, index: int) -> int | None:
        path, _, length = self._ranges[3 * index : 3 * index + 3]
        if length >= 0:
            return length
        stamp = self.files.stamp(self.paths[path])  # empty if the file is remote
        return stamp[0] if stamp else None

    def place(self, index: int) -> str:
        path, _, length = self._ranges[3 * index : 3 * index + 3]
        return self.files.path(self.paths[path]) + (f": {self.names[index]}" if length >= 0 else "")

    def source(self, classes: list[str], titles: Sequence[str] = ()) -> Source:
        if not self.names:
            raise InputError(
                f"{self.files.path('')} contains no image; give a folder with labelled images"
            )
        return Source(
            classes=classes,
            names=self.names,
            labels=np.frombuffer(self.labels, np.int64),
            read=self.read,
            titles=list(titles),
            faults=self.faults,
            origin=f"{self.files.path(self.paths[0])}:{self._ranges[1]}",
            place=self.place,
            stamp=self.stamp,
            size=self.size,
        )


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a dataset is and how to read it.

    dataset: kind of dataset, as in the option --cfg.dataset
    data_dir: folder, file, pattern of shards or fsspec URL
    follow_links: read symbolic links that leave data_dir
    class_names: text file of class names, one per line, or empty
    callable: module:function that takes a split and returns (path, label) pairs, or empty
    image_column, label_column: columns of a table; empty: found by name and type
    """

    dataset: str
    data_dir: str
    follow_links: bool = False
    class_names: str = ""
    callable: str = ""
    image_column: str = ""
    label_column: str = ""


def refuse_val(place: Place, found: str) -> NoReturn:
    """Raises InputError: `val_share` is given, and the dataset has validation images."""
    raise InputError(
        f"`val_share`: `data_dir`={place.data_dir} has validation images ({found}); leave out "
        f"`val_share`, or give only the images to divide"
    )


def is_image(path: str) -> bool:
    """Whether the path has the suffix of an image file."""
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def label_numbers(where: str, labels: set[str]) -> tuple[list[str], dict[str, int]]:
    """Returns (class names, number of each label). If all labels are numbers, they are kept;
    otherwise the number is the position in the sorted labels. Raises InputError for a negative or
    empty label, and for a number that is too large."""
    if labels and all(re.fullmatch(r"\d{1,9}", label) for label in labels):
        count = max(map(int, labels)) + 1
        if count > MAX_CLASSES:
            raise InputError(
                f"{where}: label {count - 1} is larger than {MAX_CLASSES - 1}; correct it"
            )
        return [str(number) for number in range(count)], {label: int(label) for label in labels}
    if wrong := sorted(label for label in labels if re.fullmatch(r"-\d+", label) or not label):
        raise InputError(f"{where}: '{wrong[0]}' is not a valid label; correct it")
    classes = sorted(labels)
    return classes, {label: number for number, label in enumerate(classes)}
