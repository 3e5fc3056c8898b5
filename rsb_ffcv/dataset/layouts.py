"""Sources whose pictures are in folders, lists and archives: ImageNet as downloaded, unpacked or
from Kaggle, Tiny-ImageNet, CSV.

The readers listed in readers.UNDIVIDED also take the split "": all images, of a dataset without
validation images."""

import csv
import io
import re
import sys
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from rsb_ffcv import InputError, counted, first_line
from rsb_ffcv.dataset import synthetic
from rsb_ffcv.dataset.files import Files, inside, open_root, opened, read_text, tar_members
from rsb_ffcv.dataset.sources import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    Index,
    Place,
    Source,
    is_image,
    label_numbers,
    refuse_val,
)

Row = TypeVar("Row")

DEVKIT = "ILSVRC2012_devkit_t12"


def demo(place: Place, split: str) -> Source:
    """The demo pictures. They are drawn into data_dir if they are missing."""
    synthetic.make_demo_images(Path(place.data_dir))
    return image_folder(place, split)


def _root(place: Place) -> Files:
    files, name = open_root(place.data_dir, place.follow_links)
    if not name:
        return files
    if files.is_file(name):
        raise InputError(
            f"`data_dir`={place.data_dir}: is a file; `dataset`={place.dataset} needs the folder "
            f"that contains it"
        )
    raise InputError(
        f"`data_dir`: {place.data_dir} is not a folder; give the folder that contains the images"
    )


def image_folder(place: Place, split: str) -> Source:
    """<split>/<class>/.../<image> in a folder or in a tar file. A tar file may also contain
    <class>/<image>, which is used for every split. split "": <class>/.../<image>, also below
    train/."""
    files, name = open_root(place.data_dir, place.follow_links)
    if name.endswith(".tar"):
        return _image_tar(place, files, name=name, split=split)
    files = _root(place)
    if not split:
        return _undivided_folder(place, files)
    if not files.is_folder(split):
        found = files.folders("")[:5]
        content = f"the folders {', '.join(found)}" if found else "no folders"
        raise InputError(
            f"`data_dir`={place.data_dir}: has no folder '{split}' (it contains {content}); give "
            f"the folder that contains train/<class>/ and val/<class>/, or `val_share` to divide "
            f"<class>/<image>"
        )
    classes = _subfolders(files, split)
    other = "val" if split == "train" else "train"
    if files.is_folder(other) and (differing := set(classes) ^ set(_subfolders(files, other))):
        # An additional class in one split would shift the numbers of all classes after it
        raise InputError(
            f"{place.data_dir}: train and val do not have the same classes (only in one: "
            f"{', '.join(sorted(differing)[:5])}); add or remove class folders"
        )
    index = Index(files)
    _class_folders(index, split, classes)
    return index.source(classes)


def _undivided_folder(place: Place, files: Files) -> Source:
    """<class>/.../<image>, below train/ if there is such a folder."""
    # A folder that contains no folder is a class, whatever its name is
    known = {
        each: next((name for name in names if files.is_folder(name) and files.folders(name)), "")
        for each, names in SPLIT_NAMES.items()
    }
    if known["val"]:
        refuse_val(place, f"the folder '{known['val']}'")
    classes = _subfolders(files, known["train"])
    if len(classes) == 1:
        raise InputError(
            f"{files.path(known['train'])} has only the class folder '{classes[0]}'; give the "
            f"folder that contains the class folders"
        )
    index = Index(files)
    _class_folders(index, known["train"], classes)
    return index.source(classes)


def _subfolders(files: Files, name: str) -> list[str]:
    classes = files.folders(name)
    if not classes:
        raise InputError(
            f"{files.path(name)} has no class folder; move the images to "
            f"{files.path(name).rstrip('/')}/<class>/"
        )
    return classes


def _class_folders(index: Index, folder: str, classes: list[str], *, inner: str = "") -> None:
    """Adds the images below folder/<class>/inner, and prints the number of other files."""
    left_out = 0
    for label, name in enumerate(classes):
        where = "/".join(filter(None, (folder, name, inner)))
        if not index.files.is_folder(where):
            raise InputError(
                f"class '{name}' has no folder {index.files.path(where)}; add its images or "
                f"remove the class from the list"
            )
        found = index.files.list(where)
        images = [path for path in found if is_image(path)]
        left_out += len(found) - len(images)
        if not images:
            raise InputError(
                f"class '{name}' has no image in {index.files.path(where)} "
                f"({', '.join(sorted(IMAGE_SUFFIXES))}); add images or remove the folder"
            )
        for path in images:
            index.add_file(path, label, path.removeprefix(f"{folder}/"))
    _report_skipped(index.files.path(folder), left_out)


def _report_skipped(where: str, count: int) -> None:
    if count:
        print(
            f"{where}: {counted(count, 'file')} left out; their names do not end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}",
            file=sys.stderr,
        )


def _image_tar(place: Place, files: Files, *, name: str, split: str) -> Source:
    path = files.path(name)
    with opened(files, name) as file:
        everything = list(tar_members(file, path))
    members = sorted(member for member in everything if is_image(member[0]))
    _report_skipped(path, len(everything) - len(members))
    if not members:
        raise InputError(
            f"{path}: contains no image ({', '.join(sorted(IMAGE_SUFFIXES))}); give another archive"
        )
    if not split:
        if any(re.search(r"(^|/)val/[^/]+/[^/]", member[0]) for member in members):
            refuse_val(place, "the folder 'val'")
        split = "train"
    prefix, wanted = "", []
    while True:  # removes the folders that contain everything, except for the class folder
        wanted = [member for member in members if member[0].startswith(f"{prefix}{split}/")]
        tops = {member[0][len(prefix) :].split("/")[0] for member in members}
        if (
            wanted
            or len(tops) > 1
            or any(member[0][len(prefix) :].count("/") < 2 for member in members)
        ):
            break
        prefix += f"{tops.pop()}/"
    if wanted:
        prefix, members = f"{prefix}{split}/", wanted
    outside = next((member[0] for member in members if "/" not in member[0][len(prefix) :]), None)
    if (
        outside is not None
        or prefix.rstrip("/").rpartition("/")[2] in {"train", "val"} - {split}
        or tops & {"train", "val"}
        and not wanted
    ):
        wrong = f"{outside} is not in a class folder" if outside else f"has no folder {split}"
        raise InputError(
            f"{path}: {wrong}; give an archive of {split}/<class>/<image>, or of <class>/<image>"
        )
    classes = sorted({member[0][len(prefix) :].split("/")[0] for member in members})
    numbers = {wnid: number for number, wnid in enumerate(classes)}
    index = Index(files)
    index.paths.append(name)
    for member, start, length in members:
        shown = member[len(prefix) :]
        index.add_member(shown, numbers[shown.split("/")[0]], start=start, length=length)
    return index.source(classes)


def archives(place: Place, split: str) -> Source:
    """ILSVRC2012_img_train.tar (one tar per class) or ILSVRC2012_img_val.tar with the devkit, as
    downloaded."""
    files = _root(place)
    kit = _devkit(files)
    index = Index(files)
    name = f"ILSVRC2012_img_{split}.tar"
    if not files.is_file(name):
        raise InputError(
            f"{files.path(name)} is missing; `data_dir` must contain ImageNet's archives as "
            f"downloaded"
        )
    index.paths.append(name)
    with opened(files, name) as file:
        path = files.path(name)
        if split == "train":
            inner = [
                (PurePosixPath(member).stem, start, length)
                for member, start, length in tar_members(file, path)
                if member.endswith(".tar")
            ]
            classes = sorted(wnid for wnid, *_ in inner)
            if not classes:
                raise InputError(
                    f"{path}: contains no class archive; `data_dir` must contain ImageNet's "
                    f"archives as downloaded"
                )
            if kit and classes != kit.classes:
                raise InputError(
                    f"{path}: its classes differ from the devkit's ({len(classes)} in the "
                    f"archive, {len(kit.classes)} in the devkit; only in one: "
                    f"{', '.join(sorted(set(classes) ^ set(kit.classes))[:5])}); use the devkit "
                    f"of these images"
                )
            # `classes` are sorted too
            for label, (wnid, start, length) in enumerate(sorted(inner)):
                for member, at, size in tar_members(
                    file, f"{path}: {wnid}.tar", start=start, length=length
                ):
                    index.add_member(f"{wnid}/{member}", label, start=at, length=size)
        else:
            if not kit or not kit.truth:
                raise InputError(
                    f"{files.path('')}: {DEVKIT}.tar.gz is missing or contains no ground truth; "
                    f"download it: it contains the labels of {name}"
                )
            classes = kit.classes
            for member, at, size in sorted(tar_members(file, path)):
                if not (number := re.search(r"_(\d+)\.\w+$", member)) or not 0 < int(
                    number[1]
                ) <= len(kit.truth):
                    raise InputError(
                        f"{path}: {member} is not among the {len(kit.truth)} images of the ground "
                        f"truth; use the devkit of these images"
                    )
                index.add_member(member, kit.truth[int(number[1]) - 1], start=at, length=size)
            if len(index.names) != len(kit.truth):
                raise InputError(
                    f"{path}: contains {len(index.names)} images, and the ground truth "
                    f"{len(kit.truth)}; download it again"
                )
    return index.source(classes, kit.titles if kit else ())


@dataclass
class _Devkit:
    """classes: wnids, sorted; titles: their words, or empty; truth: labels of the validation
    images, in the order of their numbers."""

    classes: list[str]
    titles: list[str]
    truth: list[int]


def _devkit(files: Files) -> _Devkit | None:
    """Reads the devkit from its archive, its folder, or its files beside the images.

    It has the ground truth (one number or wnid per line, or .mat) and the synset table, which maps
    numbers to wnids (meta.mat, or text with `wnid number word...` per line). Returns None if there
    is no devkit. Raises InputError if its files cannot be read.
    """
    texts = {}
    if files.is_file(f"{DEVKIT}.tar.gz"):
        try:
            with (
                opened(files, f"{DEVKIT}.tar.gz") as file,
                tarfile.open(fileobj=file, mode="r:gz") as archive,
            ):
                for member in archive:
                    if member.isreg() and "/data/" in member.name and member.size < 1 << 26:
                        content = archive.extractfile(member)
                        assert content is not None  # a regular file has content
                        texts[PurePosixPath(member.name).name] = content.read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InputError(
                f"{files.path(f'{DEVKIT}.tar.gz')}: cannot be read ({first_line(error)}); "
                f"download it again"
            ) from error
    else:
        for folder in (f"{DEVKIT}/data/", "data/", ""):
            for name in (
                "ILSVRC2012_validation_ground_truth.txt",
                "ILSVRC2012_validation_ground_truth.mat",
                "meta.mat",
                "map_clsloc.txt",
                "synsets.txt",
            ):
                if name not in texts and files.is_file(folder + name):
                    texts[name] = files.read(folder + name)
    try:
        return _read_devkit(texts) if texts else None
    # What a table with another layout raises
    except (ValueError, KeyError, TypeError, IndexError, NotImplementedError) as error:
        raise InputError(
            f"{files.path('')}: the devkit's tables cannot be used ({type(error).__name__}: "
            f"{first_line(error)}); download it again"
        ) from error


def _read_devkit(texts: dict[str, bytes]) -> _Devkit:
    wnids, words = {}, {}
    if "meta.mat" in texts:
        from scipy.io import loadmat

        table = np.atleast_1d(loadmat(io.BytesIO(texts["meta.mat"]), squeeze_me=True)["synsets"])
        if "num_children" in (table.dtype.names or ()):
            # The rows with children are groups of classes
            table = table[table["num_children"].astype(int) == 0]
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
        truth = [
            str(int(number))
            for key, value in content.items()
            if not key.startswith("__")
            for number in np.ravel(value)
        ]
    named = [wnids[int(text)] if text.isdigit() else text for text in truth]
    classes = sorted(set(wnids.values()) or set(named))
    numbers = {wnid: number for number, wnid in enumerate(classes)}
    return _Devkit(
        classes,
        [words[wnid] for wnid in classes] if words else [],
        [numbers[wnid] for wnid in named],
    )


def kaggle(place: Place, split: str) -> Source:
    """ILSVRC/Data/CLS-LOC/{train/<wnid>,val}, LOC_val_solution.csv, LOC_synset_mapping.txt."""
    files = _root(place)
    base = next(
        (base for base in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC") if files.is_folder(base)), None
    )
    mapping = "LOC_synset_mapping.txt"
    if base is None or not files.is_file(mapping):
        raise InputError(
            f"{files.path(mapping if base else 'ILSVRC/Data/CLS-LOC')} is missing; `data_dir` "
            f"must be Kaggle's download, unpacked"
        )
    titles = dict(
        (line.split(" ", 1) + [""])[:2]
        for line in read_text(files, mapping).splitlines()
        if line.strip()
    )
    classes = sorted(titles)
    index = Index(files)
    if split == "train":
        _class_folders(index, f"{base}/train", classes)
        return index.source(classes, [titles[wnid] for wnid in classes])
    numbers = {wnid: number for number, wnid in enumerate(classes)}
    solution = "LOC_val_solution.csv"
    if not files.is_file(solution):
        raise InputError(
            f"{files.path(solution)} is missing; download it: it contains the labels of the "
            f"validation images"
        )
    labels = {}
    for row in _rows(files, solution, csv.DictReader):
        wnid = (row.get("PredictionString") or "").split(" ")[0]
        if wnid not in numbers or not row.get("ImageId"):
            raise InputError(
                f"{files.path(solution)}: the class of '{row.get('ImageId')}' is not in "
                f"{mapping}; download it again"
            )
        labels[row["ImageId"]] = numbers[wnid]
    found = {PurePosixPath(path).stem: path for path in files.list(f"{base}/val") if is_image(path)}
    if without := sorted(set(found) - set(labels)):
        raise InputError(
            f"{files.path(found[without[0]])}: has no line in {solution}; download that file "
            f"again or remove the image"
        )
    for stem in sorted(labels):  # a missing one is a bad picture, reported when it is read
        path = found.get(stem, f"{base}/val/{stem}.JPEG")
        index.add_file(path, labels[stem], PurePosixPath(path).name)
    return index.source(classes, [titles[wnid] for wnid in classes])


def tiny_imagenet(place: Place, split: str) -> Source:
    """The archive's layout: train/<wnid>/images/*.JPEG; val/images with val_annotations.txt;
    wnids.txt, words.txt."""
    files = _root(place)
    if not files.is_file("wnids.txt"):
        raise InputError(
            f"{files.path('wnids.txt')} is missing; `data_dir` must be Tiny-ImageNet's unpacked "
            f"folder"
        )
    wnids = sorted(read_text(files, "wnids.txt").split())
    titles = []
    if files.is_file("words.txt"):
        words = dict(
            line.split("\t", 1)
            for line in read_text(files, "words.txt").splitlines()
            if "\t" in line
        )
        titles = [words[wnid] for wnid in wnids] if all(wnid in words for wnid in wnids) else []
    index = Index(files)
    if split == "train":
        _class_folders(index, "train", wnids, inner="images")
        return index.source(wnids, titles)
    annotations = "val/val_annotations.txt"
    if not files.is_file(annotations):
        raise InputError(
            f"{files.path(annotations)} is missing; `data_dir` must be Tiny-ImageNet's unpacked "
            f"folder"
        )
    numbers = {wnid: number for number, wnid in enumerate(wnids)}
    for line_number, line in enumerate(read_text(files, annotations).splitlines(), 1):
        name, wnid = (line.split("\t") + [""])[:2]
        if wnid not in numbers or not name or PurePosixPath(name).name != name:
            raise InputError(
                f"{files.path(annotations)}:{line_number}: '{line[:60]}' is not an image of a "
                f"class in wnids.txt; correct the line"
            )
        index.add_file(f"val/images/{name}", numbers[wnid], name)
    return index.source(wnids, titles)


def csv_list(place: Place, split: str) -> Source:
    """<split>.csv in a folder, or one file. Each line is `path,label`; a header line is optional.
    Paths are relative to the file's folder."""
    files, name = open_root(place.data_dir, place.follow_links)
    if not name and not split and files.is_file("val.csv"):
        refuse_val(place, "val.csv")
    name = name or f"{split or 'train'}.csv"
    if not files.is_file(name):
        raise InputError(
            f"{files.path(name)} is missing; give the folder that contains train.csv and val.csv, "
            f"or one file with `split` or `val_share`"
        )
    pairs = _csv_pairs(files, name)
    other = f"{'val' if split == 'train' else 'train'}.csv"
    others = _csv_pairs(files, other) if name == f"{split}.csv" and files.is_file(other) else []
    return _listed(files, pairs, {label for _, label in others}, where=files.path(name))


def _rows(files: Files, name: str, reader: Callable[..., Iterable[Row]]) -> list[Row]:
    try:
        return list(reader(io.StringIO(read_text(files, name)), strict=True))
    except csv.Error as error:
        raise InputError(
            f"{files.path(name)}: not a CSV file ({first_line(error)}); correct it"
        ) from error


def _csv_pairs(files: Files, name: str) -> list[tuple[str, str]]:
    rows = [row for row in _rows(files, name, csv.reader) if row]
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    path, label = 0, 1
    if "label" in head or "class" in head:
        label = head.index("label") if "label" in head else head.index("class")
        path = next(
            (
                head.index(cell)
                for cell in ("path", "image", "file", "filename", "filepath", "image_path")
                if cell in head
            ),
            int(label == 0),
        )
        rows = rows[1:]
    for number, row in enumerate(rows, 1):
        if len(row) <= max(path, label) or not row[label].strip() or not row[path]:
            raise InputError(
                f"{files.path(name)}: image {number} ('{','.join(row)[:60]}') has no path or no "
                f"label; correct its line"
            )
    return [(row[path], row[label].strip()) for row in rows]


def python_callable(place: Place, split: str) -> Source:
    """The (path, label) pairs that module:function(split) returns. Paths are relative to
    data_dir. split "": those of train."""
    from importlib import import_module

    files = _root(place)
    module, _, function = place.callable.partition(":")
    if not module or not function:
        raise InputError(
            f"`callable`={place.callable!r}: not of the form module:function; give a function "
            f"that takes a split and returns (path, label) pairs"
        )
    sys.path.insert(0, "")  # modules of the current folder, as `python -m` finds them
    try:
        pairs = [
            (str(path), str(label))
            for path, label in getattr(import_module(module), function)(split or "train")
        ]
    except Exception as error:  # raised by the user's code
        raise InputError(
            f"`callable`={place.callable}: {type(error).__name__}: {first_line(error)}; it must "
            f"return (path, label) pairs"
        ) from error
    finally:
        sys.path.remove("")
    return _listed(files, pairs, set(), where=f"`callable`={place.callable}")


def _listed(
    files: Files, pairs: list[tuple[str, str]], other_labels: set[str], *, where: str
) -> Source:
    """A source of listed pictures. If all labels are numbers, they are kept; otherwise they are
    class names. where: the list's name in messages."""
    classes, numbers = label_numbers(where, {label for _, label in pairs} | other_labels)
    index = Index(files)
    root = f"{getattr(files, 'root', '')}/"
    for path, label in pairs:
        try:
            shown = inside(path.removeprefix(root))
        except ValueError as error:
            raise InputError(
                f"{where}: {first_line(error)}; give paths relative to {files.path('')} that stay "
                f"inside it"
            ) from error
        index.add_file(shown, numbers[label], shown)
    return index.source(classes)
