"""Labelled raw images as people own them: each source is a list of names and labels, and a way to
read any of them.

Class numbers are positions in the sorted list of class names (wnids for ImageNet), the order that
torchvision, timm and every published checkpoint use; sources that carry numbers keep theirs.
"""

import re
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

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
    """Labelled pictures. classes: names in the order of the labels; names: a picture's path within
    the source; labels: int64, 0 .. len(classes) - 1. read(index): a picture file's bytes, or uint8
    pixels (height, width, 3); raises BadPicture naming it. titles: what people call the classes, or
    empty. faults: what is wrong with a picture before it is read. origin: where the first picture
    lies. place(index): where a picture is, for people. stamp(index): changes where the picture's
    file does."""

    classes: list[str]
    names: list[str]
    labels: np.ndarray
    read: Callable[[int], bytes | np.ndarray]
    titles: list[str] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)
    origin: str = ""
    place: Callable[[int], str] = None  # type: ignore[assignment]  # set by __post_init__
    stamp: Callable[[int], tuple] = lambda index: ()

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
        """The first `count` pictures, or all where there are fewer."""
        return replace(
            self,
            names=self.names[:count],
            labels=self.labels[:count],
            faults={index: why for index, why in self.faults.items() if index < count},
        )

    def picture(self, index: int) -> bytes | np.ndarray:
        """What `read` gives. Raises BadPicture for one that has a fault."""
        if index in self.faults:
            raise BadPicture(f"{self.place(index)}: {self.faults[index]}; correct or remove it")
        return self.read(index)

    def identity(self, index: int) -> int:
        """CRC-32 of name, label and stamp."""
        known = f"{self.names[index]}\0{self.labels[index]}\0{self.stamp(index)}"
        return zlib.crc32(known.encode("utf-8", "surrogateescape"))

    def fingerprint(self) -> str:
        """Tells apart sources with other names, labels, order or classes."""
        text = "\0".join([*self.names, "", *self.classes, "", *self.titles])
        known = text.encode("utf-8", "surrogateescape") + self.labels.tobytes()
        return f"{checksum(np.frombuffer(known, np.uint8)):016x}"


def _storable(name: str) -> str:
    """As UTF-8 and without a zero byte, which ends a name in the file. Bytes of a file system that
    are no UTF-8 stay."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        name = name.encode("utf-8", "replace").decode()
    return name.replace("\0", "_")


class Index:
    """Pictures as ranges of files, in compact form: a million take tens of megabytes."""

    def __init__(self, files: Files) -> None:
        self.files, self.labels = files, array("q")
        self.paths: list[str] = []
        self.names: list[str] = []
        self.faults: dict[int, str] = {}
        self._stamps: dict[int, tuple] = {}
        self._ranges = array(
            "q"
        )  # of each picture: number of its file, first byte, bytes (-1: all)

    def add_file(self, name: str, label: int, shown: str) -> None:
        self.paths.append(name)
        self._add(shown, label, start=0, length=-1)

    def add_member(self, shown: str, label: int, *, start: int, length: int) -> None:
        """A part of the file that was last put into `paths`."""
        if length < 0:
            self.faults[len(self.names)] = "a link or device in its archive, not a file"
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
        if path not in self._stamps:  # of a file that holds many
            self._stamps[path] = self.files.stamp(self.paths[path])
        return start, *self._stamps[path]

    def place(self, index: int) -> str:
        path, _, length = self._ranges[3 * index : 3 * index + 3]
        return self.files.path(self.paths[path]) + (f": {self.names[index]}" if length >= 0 else "")

    def source(self, classes: list[str], titles: Sequence[str] = ()) -> Source:
        if not self.names:
            raise InputError(
                f"{self.files.path('')} holds no image; give a folder with labelled images"
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
        )


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a dataset is and how to read it: the options of the command line that bear on it.
    class_names: a text file of them, one a line. callable: module:function."""

    dataset: str
    data_dir: str
    follow_links: bool = False
    class_names: str = ""
    callable: str = ""
    image_column: str = ""
    label_column: str = ""


def is_image(path: str) -> bool:
    """By its name."""
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def label_numbers(where: str, labels: set[str]) -> tuple[list[str], dict[str, int]]:
    """Class names, and the number of each label: itself where all are numbers, else its place among
    the sorted ones."""
    if labels and all(re.fullmatch(r"\d{1,9}", label) for label in labels):
        count = max(map(int, labels)) + 1
        if count > MAX_CLASSES:
            raise InputError(
                f"{where}: label {count - 1} is more than {MAX_CLASSES - 1}; correct it"
            )
        return [str(number) for number in range(count)], {label: int(label) for label in labels}
    if wrong := sorted(label for label in labels if re.fullmatch(r"-\d+", label) or not label):
        raise InputError(f"{where}: '{wrong[0]}' is no label; correct it")
    classes = sorted(labels)
    return classes, {label: number for number, label in enumerate(classes)}
