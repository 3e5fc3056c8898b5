"""Labelled raw images as people own them: each source is a list of names and labels, and a way to
read any of them.

Class numbers are positions in the sorted list of class names (wnids for ImageNet), the order that
torchvision, timm and every published checkpoint use; sources that carry numbers keep theirs.
"""

import re
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

import numpy as np

from rsb_ffcv import InputError
from rsb_ffcv.beton import MAX_CLASSES
from rsb_ffcv.dataset.files import Files, open_root, read_text
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


@dataclass
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
        self._add(shown, label, 0, -1)

    def add_member(self, shown: str, label: int, start: int, length: int) -> None:
        """A part of the file that was last put into `paths`."""
        if length < 0:
            self.faults[len(self.names)] = "a link or device in its archive, not a file"
        self._add(shown, label, start, max(length, 0))

    def _add(self, shown: str, label: int, start: int, length: int) -> None:
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
            classes,
            self.names,
            np.frombuffer(self.labels, np.int64),
            self.read,
            list(titles),
            self.faults,
            f"{self.files.path(self.paths[0])}:{self._ranges[1]}",
            self.place,
            self.stamp,
        )


@dataclass(frozen=True)
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


def open_sources(place: Place, splits: list[str]) -> dict[str, Source]:
    """The splits ("train", "val") of a dataset, with one list of classes. Raises InputError naming
    what is missing and how to mend it."""
    from rsb_ffcv.dataset import layouts, shards

    readers = {
        "imagenet": layouts.image_folder,
        "demo": layouts.demo,
        "tiny_imagenet": layouts.tiny_imagenet,
        "imagenet_archives": layouts.archives,
        "kaggle": layouts.kaggle,
        "csv": layouts.csv_list,
        "callable": layouts.python_callable,
        "webdataset": shards.webdataset,
        "parquet": shards.parquet,
        "datasets": shards.hugging_face,
    }
    reader = readers.get(place.dataset, shards.torchvision)
    try:
        sources = {split: reader(place, split) for split in splits}
    except BadPicture as error:  # a list or archive, not a picture
        raise InputError(str(error)) from error
    if place.class_names:
        sources = {split: _renamed(source, place.class_names) for split, source in sources.items()}
    for source in sources.values():
        twice = [name for name, count in Counter(source.classes).items() if count > 1]
        if twice:
            raise InputError(
                f"cfg.data_dir={place.data_dir}: two classes are called '{twice[0]}'; give other "
                f"names with cfg.class_names"
            )
    longest = max((source.classes for source in sources.values()), key=len)
    for source in sources.values():
        if source.classes != longest[: len(source.classes)]:
            differing = sorted(set(longest) ^ set(source.classes)) or ["in another order"]
            raise InputError(
                f"cfg.data_dir={place.data_dir}: train and val do not have the same classes "
                f"({', '.join(differing[:5])} in one only); correct one, or write them apart with "
                f"cfg.split"
            )
        source.classes = longest
        source.titles = (
            source.titles if len(source.titles) == len(longest) else _known_titles(longest)
        )
    if (
        len(sources) == 2
        and len({source.origin for source in sources.values()}) == 1
        and source.origin
    ):
        raise InputError(
            f"cfg.data_dir={place.data_dir}: train and val would hold the same images; give "
            f"cfg.split, or {{split}} in a "
            f"pattern"
        )
    return sources


def _renamed(source: Source, listing: str) -> Source:
    files, name = open_root(listing)
    names = [line.strip() for line in read_text(files, name).splitlines() if line.strip()]
    if len(names) < len(source.classes) or len(set(names)) < len(names):
        raise InputError(
            f"cfg.class_names={listing}: {len(names)} lines ({len(set(names))} different) for "
            f"{len(source.classes)} "
            f"classes; give a name a line, in the order of the labels"
        )
    return replace(source, classes=names, titles=[])


def _known_titles(classes: list[str]) -> list[str]:
    """What timm's table of synsets calls wnids; nothing where one is not in it."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return []
    from importlib.util import find_spec

    spec = find_spec("timm")  # found without importing it, which takes seconds
    assert spec is not None and spec.origin is not None  # this package depends on it
    timm = PurePosixPath(spec.origin).parent
    with open(timm / "data/_info/imagenet_synset_to_lemma.txt", encoding="utf-8") as table:
        titles = dict(line.rstrip("\n").split("\t", 1) for line in table if "\t" in line)
    return [titles[name] for name in classes] if all(name in titles for name in classes) else []


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
