"""Labelled raw images as people own them: each source is a list of names and labels, and a way to read any of them.

Class numbers are positions in the sorted list of class names (wnids for ImageNet), the order that torchvision, timm
and every published checkpoint use; sources that carry numbers keep theirs.
"""
import csv
import io
import re
import sys
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

import numpy as np

from rsb_ffcv import InputError, first_line
from rsb_ffcv.beton import MAX_CLASSES
from rsb_ffcv.dataset import synthetic
from rsb_ffcv.dataset.files import inside, open_root, opened, read_text, tar_members
from rsb_ffcv.dataset.picture import BadPicture
from rsb_ffcv.ops.native import checksum

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".jfif", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid")}
DEVKIT = "ILSVRC2012_devkit_t12"


@dataclass
class Source:
    """Labelled pictures. classes: names in the order of the labels; names: a picture's path within the source; labels: int64,
    0 .. len(classes) - 1. read(index): a picture file's bytes, or uint8 pixels (height, width, 3); raises BadPicture naming
    it. titles: what people call the classes, or empty. faults: what is wrong with a picture before it is read. origin: where
    the first picture lies. place(index): where a picture is, for people. stamp(index): changes where the picture's file does."""
    classes: list[str]
    names: list[str]
    labels: np.ndarray
    read: Callable
    titles: list[str] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)
    origin: str = ""
    place: Callable | None = None
    stamp: Callable = lambda index: ()

    def __post_init__(self):
        self.names, self.classes, self.titles = ([_storable(name) for name in part] for part in (self.names, self.classes, self.titles))
        self.place = self.place or self.names.__getitem__
        self.labels = np.asarray(self.labels, np.int64)
        if len(set(self.names)) < len(self.names):
            seen = set()
            for index, name in enumerate(self.names):
                if name in seen:
                    self.faults.setdefault(index, "the source has this name twice")
                seen.add(name)

    def __len__(self):
        return len(self.names)

    def first(self, count: int) -> "Source":
        """The first `count` pictures, or all where there are fewer."""
        return replace(self, names=self.names[:count], labels=self.labels[:count],
                       faults={index: why for index, why in self.faults.items() if index < count})

    def picture(self, index: int):
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
        text = text.encode("utf-8", "surrogateescape") + self.labels.tobytes()
        return f"{checksum(np.frombuffer(text, np.uint8)):016x}"


def _storable(name: str) -> str:
    """As UTF-8 and without a zero byte, which ends a name in the file. Bytes of a file system that are no UTF-8 stay."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        name = name.encode("utf-8", "replace").decode()
    return name.replace("\0", "_")


class Index:
    """Pictures as ranges of files, in compact form: a million take tens of megabytes."""

    def __init__(self, files):
        self.files, self.paths, self.names, self.labels, self.faults = files, [], [], array("q"), {}
        self._stamps = {}
        self._ranges = array("q")  # of each picture: number of its file, first byte, bytes (-1: all)

    def add_file(self, name: str, label: int, shown: str):
        self.paths.append(name)
        self._add(shown, label, 0, -1)

    def add_member(self, shown: str, label: int, start: int, length: int):
        """A part of the file that was last put into `paths`."""
        if length < 0:
            self.faults[len(self.names)] = "a link or device in its archive, not a file"
        self._add(shown, label, start, max(length, 0))

    def _add(self, shown, label, start, length):
        self.names.append(shown)
        self.labels.append(label)
        self._ranges.extend((len(self.paths) - 1, start, length))

    def read(self, index: int) -> bytes:
        path, start, length = self._ranges[3 * index:3 * index + 3]
        return self.files.read(self.paths[path], start, length)

    def stamp(self, index: int) -> tuple:
        path, start, length = self._ranges[3 * index:3 * index + 3]
        if length < 0:
            return self.files.stamp(self.paths[path])
        if path not in self._stamps:  # of a file that holds many
            self._stamps[path] = self.files.stamp(self.paths[path])
        return start, *self._stamps[path]

    def place(self, index: int) -> str:
        path, _, length = self._ranges[3 * index:3 * index + 3]
        return self.files.path(self.paths[path]) + (f": {self.names[index]}" if length >= 0 else "")

    def source(self, classes: list[str], titles=()) -> Source:
        if not self.names:
            raise InputError(f"{self.files.path('')} holds no image; give a folder with labelled images")
        return Source(classes, self.names, np.frombuffer(self.labels, np.int64), self.read, list(titles), self.faults,
                      f"{self.files.path(self.paths[0])}:{self._ranges[1]}", self.place, self.stamp)


@dataclass(frozen=True)
class Place:
    """Where a dataset is and how to read it: the options of the command line that bear on it. class_names: a text file of
    them, one a line. callable: module:function."""
    dataset: str
    data_dir: str
    follow_links: bool = False
    class_names: str = ""
    callable: str = ""
    image_column: str = ""
    label_column: str = ""


def open_sources(place: Place, splits: list[str]) -> dict[str, Source]:
    """The splits ("train", "val") of a dataset, with one list of classes. Raises InputError naming what is missing and how
    to mend it."""
    from rsb_ffcv.dataset import shards

    readers = {"imagenet": _image_folder, "demo": _demo, "tiny_imagenet": _tiny_imagenet, "imagenet_archives": _archives,
               "kaggle": _kaggle, "csv": _csv, "callable": _callable, "webdataset": shards.webdataset,
               "parquet": shards.parquet, "datasets": shards.hugging_face}
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
            raise InputError(f"cfg.data_dir={place.data_dir}: two classes are called '{twice[0]}'; give other names with cfg.class_names")
    longest = max((source.classes for source in sources.values()), key=len)
    for split, source in sources.items():
        if source.classes != longest[:len(source.classes)]:
            differing = sorted(set(longest) ^ set(source.classes)) or ["in another order"]
            raise InputError(f"cfg.data_dir={place.data_dir}: train and val do not have the same classes "
                             f"({', '.join(differing[:5])} in one only); correct one, or write them apart with cfg.split")
        source.classes = longest
        source.titles = source.titles if len(source.titles) == len(longest) else _known_titles(longest)
    if len(sources) == 2 and len({source.origin for source in sources.values()}) == 1 and source.origin:
        raise InputError(f"cfg.data_dir={place.data_dir}: train and val would hold the same images; give cfg.split, or {{split}} in a "
                         f"pattern")
    return sources


def _renamed(source: Source, listing: str) -> Source:
    files, name = open_root(listing)
    names = [line.strip() for line in read_text(files, name).splitlines() if line.strip()]
    if len(names) < len(source.classes) or len(set(names)) < len(names):
        raise InputError(f"cfg.class_names={listing}: {len(names)} lines ({len(set(names))} different) for {len(source.classes)} "
                         f"classes; give a name a line, in the order of the labels")
    return replace(source, classes=names, titles=[])


def _known_titles(classes: list[str]) -> list[str]:
    """What timm's table of synsets calls wnids; nothing where one is not in it."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return []
    from importlib.util import find_spec

    timm = PurePosixPath(find_spec("timm").origin).parent  # found without importing it, which takes seconds
    with open(timm / "data/_info/imagenet_synset_to_lemma.txt", encoding="utf-8") as table:
        titles = dict(line.rstrip("\n").split("\t", 1) for line in table if "\t" in line)
    return [titles[name] for name in classes] if all(name in titles for name in classes) else []


def _demo(place: Place, split: str) -> Source:
    from pathlib import Path

    try:
        synthetic.make_demo_images(Path(place.data_dir))
    except OSError as error:
        raise InputError(f"cfg.data_dir={place.data_dir}: the demo pictures cannot be put there ({error.strerror}); "
                         f"choose another") from error
    return _image_folder(place, split)


def _root(place: Place):
    files, name = open_root(place.data_dir, place.follow_links)
    if not name:
        return files
    if files.is_file(name):
        raise InputError(f"cfg.data_dir={place.data_dir}: is a file; cfg.dataset={place.dataset} needs the folder above it")
    raise InputError(f"cfg.data_dir: {place.data_dir} is not a folder; give the folder that holds the images")


def _image_folder(place: Place, split: str) -> Source:
    """<split>/<class>/.../<image> of a folder, or of a tar file (there also <class>/<image>, which is every split)."""
    files, name = open_root(place.data_dir, place.follow_links)
    if name.endswith(".tar"):
        return _image_tar(files, name, split)
    files = _root(place)
    if not files.is_folder(split):
        found = files.folders("")[:5]
        raise InputError(f"cfg.split: {place.data_dir} has no folder '{split}' (it has {', '.join(found) or 'no folder'}); "
                         f"give the folder above train/<class>/ and val/<class>/")
    classes = _subfolders(files, split)
    other = "val" if split == "train" else "train"
    if files.is_folder(other) and (differing := set(classes) ^ set(_subfolders(files, other))):
        # A class more or less in one split would shift the numbers of all that follow
        raise InputError(f"{place.data_dir}: train and val do not have the same classes ({', '.join(sorted(differing)[:5])} "
                         f"in one only); add or remove class folders")
    index = Index(files)
    _class_folders(index, split, classes)
    return index.source(classes)


def _subfolders(files, name: str) -> list[str]:
    classes = files.folders(name)
    if not classes:
        raise InputError(f"{files.path(name)} has no class folder; images belong in {files.path(name)}/<class>/")
    return classes


def _class_folders(index: Index, folder: str, classes: list[str], inner: str = ""):
    """Adds the images below folder/<class>/inner; other files are counted and said."""
    left_out = 0
    for label, name in enumerate(classes):
        where = f"{folder}/{name}/{inner}".rstrip("/")
        if not index.files.is_folder(where):
            raise InputError(f"class '{name}' has no folder {index.files.path(where)}; add its images or take the class out "
                             f"of the list")
        found = index.files.list(where)
        images = [path for path in found if _is_image(path)]
        left_out += len(found) - len(images)
        if not images:
            raise InputError(f"class '{name}' has no image in {index.files.path(where)} ({', '.join(sorted(IMAGE_SUFFIXES))}); "
                             f"add images or remove the folder")
        for path in images:
            index.add_file(path, label, path[len(folder) + 1:])
    _say_left_out(index.files.path(folder), left_out)


def _say_left_out(where: str, count: int):
    if count:
        print(f"{where}: {count} files left out, whose names do not end in {', '.join(sorted(IMAGE_SUFFIXES))}", file=sys.stderr)


def _is_image(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def _image_tar(files, name: str, split: str) -> Source:
    path = files.path(name)
    with opened(files, name) as file:
        everything = list(tar_members(file, path))
    members = sorted(member for member in everything if _is_image(member[0]))
    _say_left_out(path, len(everything) - len(members))
    if not members:
        raise InputError(f"{path}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    prefix, wanted = "", []
    while True:  # folders around all of it come off, but for the class's own
        wanted = [member for member in members if member[0].startswith(f"{prefix}{split}/")]
        tops = {member[0][len(prefix):].split("/")[0] for member in members}
        if wanted or len(tops) > 1 or any(member[0][len(prefix):].count("/") < 2 for member in members):
            break
        prefix += f"{tops.pop()}/"
    if wanted:
        prefix, members = f"{prefix}{split}/", wanted
    outside = next((member[0] for member in members if "/" not in member[0][len(prefix):]), None)
    if outside is not None or prefix.rstrip("/").rpartition("/")[2] in {"train", "val"} - {split} or tops & {"train", "val"} and not wanted:
        raise InputError(f"{path}: {f'{outside} lies in no class folder' if outside else f'has no folder {split}'}; it should hold "
                         f"{split}/<class>/<image>, or <class>/<image>")
    classes = sorted({member[0][len(prefix):].split("/")[0] for member in members})
    numbers = {wnid: number for number, wnid in enumerate(classes)}
    index = Index(files)
    index.paths.append(name)
    for member, start, length in members:
        shown = member[len(prefix):]
        index.add_member(shown, numbers[shown.split("/")[0]], start, length)
    return index.source(classes)


def _archives(place: Place, split: str) -> Source:
    """ILSVRC2012_img_train.tar (a tar a class) or ILSVRC2012_img_val.tar with the devkit, as downloaded."""
    files = _root(place)
    kit = _devkit(files)
    index = Index(files)
    name = f"ILSVRC2012_img_{split}.tar"
    if not files.is_file(name):
        raise InputError(f"{files.path(name)} is missing; cfg.data_dir must hold ImageNet's archives as downloaded")
    index.paths.append(name)
    with opened(files, name) as file:
        path = files.path(name)
        if split == "train":
            inner = [(PurePosixPath(member).stem, start, length) for member, start, length in tar_members(file, path)
                     if member.endswith(".tar")]
            classes = sorted(wnid for wnid, *_ in inner)
            if not classes:
                raise InputError(f"{path}: holds no tar of a class; cfg.data_dir must hold ImageNet's archives as downloaded")
            if kit and classes != kit.classes:
                raise InputError(f"{path}: its classes are not the devkit's ({len(classes)} here, {len(kit.classes)} there; "
                                 f"{', '.join(sorted(set(classes) ^ set(kit.classes))[:5])} in one only); use the devkit of these images")
            for wnid, start, length in sorted(inner):
                for member, *where in tar_members(file, f"{path}: {wnid}.tar", start, length):
                    index.add_member(f"{wnid}/{member}", classes.index(wnid), *where)
        else:
            if not kit or not kit.truth:
                raise InputError(f"{files.path('')}: {DEVKIT}.tar.gz is missing or holds no ground truth; the labels of "
                                 f"{name} are in it")
            classes = kit.classes
            for member, *where in sorted(tar_members(file, path)):
                if not (number := re.search(r"_(\d+)\.\w+$", member)) or not 0 < int(number[1]) <= len(kit.truth):
                    raise InputError(f"{path}: {member} has no line among the ground truth's {len(kit.truth)}; use the devkit of "
                                     f"these images")
                index.add_member(member, kit.truth[int(number[1]) - 1], *where)
            if len(index.names) != len(kit.truth):
                raise InputError(f"{path}: holds {len(index.names)} images, and the ground truth {len(kit.truth)}; download it again")
    return index.source(classes, kit.titles if kit else ())


@dataclass
class _Devkit:
    """truth: labels of the validation images, by their numbers."""
    classes: list[str]
    titles: list[str]
    truth: list[int]


def _devkit(files) -> _Devkit | None:
    """From the archive, its folder, or its files lying beside the images: the ground truth (a number or wnid a line, or
    .mat), and the synset table, which gives the numbers' wnids: meta.mat, or text, `wnid number word...` a line."""
    texts = {}
    if files.is_file(f"{DEVKIT}.tar.gz"):
        try:
            with opened(files, f"{DEVKIT}.tar.gz") as file, tarfile.open(fileobj=file, mode="r:gz") as archive:
                for member in archive:
                    if member.isreg() and "/data/" in member.name and member.size < 1 << 26:
                        texts[PurePosixPath(member.name).name] = archive.extractfile(member).read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InputError(f"{files.path(f'{DEVKIT}.tar.gz')}: cannot be read ({first_line(error)}); download it again") from error
    else:
        for folder in (f"{DEVKIT}/data/", "data/", ""):
            for name in ("ILSVRC2012_validation_ground_truth.txt", "ILSVRC2012_validation_ground_truth.mat", "meta.mat",
                         "map_clsloc.txt", "synsets.txt"):
                if name not in texts and files.is_file(folder + name):
                    texts[name] = files.read(folder + name)
    try:
        return _read_devkit(texts) if texts else None
    except (ValueError, KeyError, TypeError, IndexError, NotImplementedError) as error:  # what a table of another shape gives
        raise InputError(f"{files.path('')}: the devkit's tables cannot be used ({type(error).__name__}: {first_line(error)}); "
                         f"download it again") from error


def _read_devkit(texts: dict[str, bytes]) -> _Devkit:
    wnids, words = {}, {}
    if "meta.mat" in texts:
        from scipy.io import loadmat

        table = np.atleast_1d(loadmat(io.BytesIO(texts["meta.mat"]), squeeze_me=True)["synsets"])
        if "num_children" in table.dtype.names:
            table = table[table["num_children"].astype(int) == 0]  # the others are groups of classes
        for number, wnid, word in zip(table["ILSVRC2012_ID"], table["WNID"], table["words"]):
            wnids[int(number)], words[str(wnid)] = str(wnid), str(word)
    for name in ("map_clsloc.txt", "synsets.txt"):
        for line in texts.get(name, b"").decode().splitlines() if not wnids else ():
            wnid, number, *word = line.split(None, 2)
            wnids[int(number)], words[wnid] = wnid, " ".join(word).replace("_", " ")
    truth = []
    if "ILSVRC2012_validation_ground_truth.txt" in texts:
        truth = texts["ILSVRC2012_validation_ground_truth.txt"].decode().split()
    elif "ILSVRC2012_validation_ground_truth.mat" in texts:
        from scipy.io import loadmat

        content = loadmat(io.BytesIO(texts["ILSVRC2012_validation_ground_truth.mat"]))
        truth = [str(int(number)) for key, value in content.items() if not key.startswith("__") for number in np.ravel(value)]
    named = [wnids[int(text)] if text.isdigit() else text for text in truth]
    classes = sorted(set(wnids.values()) or set(named))
    numbers = {wnid: number for number, wnid in enumerate(classes)}
    return _Devkit(classes, [words[wnid] for wnid in classes] if words else [], [numbers[wnid] for wnid in named])


def _kaggle(place: Place, split: str) -> Source:
    """ILSVRC/Data/CLS-LOC/{train/<wnid>,val}, LOC_val_solution.csv, LOC_synset_mapping.txt."""
    files = _root(place)
    base = next((base for base in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC") if files.is_folder(base)), None)
    mapping = "LOC_synset_mapping.txt"
    if base is None or not files.is_file(mapping):
        raise InputError(f"{files.path(mapping if base else 'ILSVRC/Data/CLS-LOC')} is missing; cfg.data_dir must be Kaggle's "
                         f"download, unpacked")
    titles = dict((line.split(" ", 1) + [""])[:2] for line in read_text(files, mapping).splitlines() if line.strip())
    classes = sorted(titles)
    index = Index(files)
    if split == "train":
        _class_folders(index, f"{base}/train", classes)
        return index.source(classes, [titles[wnid] for wnid in classes])
    numbers = {wnid: number for number, wnid in enumerate(classes)}
    solution = "LOC_val_solution.csv"
    if not files.is_file(solution):
        raise InputError(f"{files.path(solution)} is missing; the labels of the validation images are in it")
    answers = {}
    for row in _rows(files, solution, csv.DictReader):
        wnid = (row.get("PredictionString") or "").split(" ")[0]
        if wnid not in numbers or not row.get("ImageId"):
            raise InputError(f"{files.path(solution)}: '{row.get('ImageId')}' has no class of {mapping}; download it again")
        answers[row["ImageId"]] = numbers[wnid]
    found = {PurePosixPath(path).stem: path for path in files.list(f"{base}/val") if _is_image(path)}
    if without := sorted(set(found) - set(answers)):
        raise InputError(f"{files.path(found[without[0]])}: has no line in {solution}; download that again or remove the image")
    for stem in sorted(answers):  # one that is not there is a bad picture, found when it is read
        path = found.get(stem, f"{base}/val/{stem}.JPEG")
        index.add_file(path, answers[stem], PurePosixPath(path).name)
    return index.source(classes, [titles[wnid] for wnid in classes])


def _tiny_imagenet(place: Place, split: str) -> Source:
    """The archive's own layout: train/<wnid>/images/*.JPEG; val/images with val_annotations.txt; wnids.txt, words.txt."""
    files = _root(place)
    if not files.is_file("wnids.txt"):
        raise InputError(f"{files.path('wnids.txt')} is missing; cfg.data_dir must be Tiny-ImageNet's unpacked folder")
    wnids = sorted(read_text(files, "wnids.txt").split())
    titles = []
    if files.is_file("words.txt"):
        words = dict(line.split("\t", 1) for line in read_text(files, "words.txt").splitlines() if "\t" in line)
        titles = [words[wnid] for wnid in wnids] if all(wnid in words for wnid in wnids) else []
    index = Index(files)
    if split == "train":
        _class_folders(index, "train", wnids, inner="images")
        return index.source(wnids, titles)
    annotations = "val/val_annotations.txt"
    if not files.is_file(annotations):
        raise InputError(f"{files.path(annotations)} is missing; cfg.data_dir must be Tiny-ImageNet's unpacked folder")
    numbers = {wnid: number for number, wnid in enumerate(wnids)}
    for line_number, line in enumerate(read_text(files, annotations).splitlines(), 1):
        name, wnid = (line.split("\t") + [""])[:2]
        if wnid not in numbers or not name or PurePosixPath(name).name != name:
            raise InputError(f"{files.path(annotations)}:{line_number}: '{line[:60]}' is not an image of a class in wnids.txt")
        index.add_file(f"val/images/{name}", numbers[wnid], name)
    return index.source(wnids, titles)


def _csv(place: Place, split: str) -> Source:
    """<split>.csv in a folder, or one file: `path,label` a line, with or without a head; paths relative to the file's folder."""
    files, name = open_root(place.data_dir, place.follow_links)
    name = name or f"{split}.csv"
    if not files.is_file(name):
        raise InputError(f"{files.path(name)} is missing; give the folder of train.csv and val.csv, or one file with cfg.split")
    pairs = _csv_pairs(files, name)
    other = f"{'val' if split == 'train' else 'train'}.csv"
    others = _csv_pairs(files, other) if name == f"{split}.csv" and files.is_file(other) else []
    return _listed(files, pairs, {label for _, label in others}, files.path(name))


def _rows(files, name: str, reader) -> list:
    try:
        return list(reader(io.StringIO(read_text(files, name)), strict=True))
    except csv.Error as error:
        raise InputError(f"{files.path(name)}: not a table of comma-separated values ({first_line(error)}); correct it") from error


def _csv_pairs(files, name: str) -> list[tuple[str, str]]:
    rows = [row for row in _rows(files, name, csv.reader) if row]
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    path, label = 0, 1
    if "label" in head or "class" in head:
        label = head.index("label") if "label" in head else head.index("class")
        path = next((head.index(cell) for cell in ("path", "image", "file", "filename", "filepath", "image_path") if cell in head),
                    int(label == 0))
        rows = rows[1:]
    for number, row in enumerate(rows, 1):
        if len(row) <= max(path, label) or not row[label].strip() or not row[path]:
            raise InputError(f"{files.path(name)}: image {number} ('{','.join(row)[:60]}') has no path or no label; correct the line")
    return [(row[path], row[label].strip()) for row in rows]


def _callable(place: Place, split: str) -> Source:
    """What module:function(split) gives: (path, label) pairs, paths relative to data_dir."""
    from importlib import import_module

    files = _root(place)
    module, _, function = place.callable.partition(":")
    if not module or not function:
        raise InputError(f"cfg.callable={place.callable!r}: give module:function, which takes a split and gives (path, label) pairs")
    sys.path.insert(0, "")  # modules of the current folder, as `python -m` finds them
    try:
        pairs = [(str(path), str(label)) for path, label in getattr(import_module(module), function)(split)]
    except Exception as error:  # the user's own code
        raise InputError(f"cfg.callable={place.callable}: {type(error).__name__}: {first_line(error)}; it has to give (path, label) "
                         f"pairs") from error
    finally:
        sys.path.remove("")
    return _listed(files, pairs, set(), f"cfg.callable={place.callable}")


def _listed(files, pairs, other_labels, where: str) -> Source:
    """Labels that are all numbers are kept; others are class names."""
    classes, numbers = label_numbers(where, {label for _, label in pairs} | other_labels)
    index = Index(files)
    root = f"{getattr(files, 'root', '')}/"
    for path, label in pairs:
        try:
            shown = inside(path.removeprefix(root))
        except ValueError as error:
            raise InputError(f"{where}: {first_line(error)}; paths are relative to {files.path('')} and stay below it") from error
        index.add_file(shown, numbers[label], shown)
    return index.source(classes)


def label_numbers(where: str, labels: set[str]) -> tuple[list[str], dict[str, int]]:
    """Class names, and the number of each label: itself where all are numbers, else its place among the sorted ones."""
    if labels and all(re.fullmatch(r"\d{1,9}", label) for label in labels):
        count = max(map(int, labels)) + 1
        if count > MAX_CLASSES:
            raise InputError(f"{where}: label {count - 1} is more than {MAX_CLASSES - 1}; correct it")
        return [str(number) for number in range(count)], {label: int(label) for label in labels}
    if wrong := sorted(label for label in labels if re.fullmatch(r"-\d+", label) or not label):
        raise InputError(f"{where}: '{wrong[0]}' is no label; correct it")
    classes = sorted(labels)
    return classes, {label: number for number, label in enumerate(classes)}
