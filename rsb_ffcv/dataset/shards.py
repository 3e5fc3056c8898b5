"""Sources whose pictures are in shards: WebDataset's tar files, Hugging Face's parquet files and
datasets; and torchvision's datasets."""

import fnmatch
import json
import os
import posixpath
import re
import sys
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

import numpy as np

from rsb_ffcv import InputError, counted, first_line
from rsb_ffcv.dataset.files import Files, open_root, opened, tar_members
from rsb_ffcv.dataset.picture import BadPicture
from rsb_ffcv.dataset.sources import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    Index,
    Place,
    Source,
    label_numbers,
    refuse_val,
)

GROUPS_KEPT = 4  # parquet row groups in memory at once


def shard_names(place: Place, split: str, suffix: str) -> tuple[Files, list[str]]:
    """Returns (root, names of the split's shards).

    place.data_dir is a folder or a pattern (`{split}`, `{000..147}`, `{a,b}`, `*`). In a folder,
    the shards are used whose file or folder name contains the split's name. split "": those of
    train, or all if there are none. suffix: end of the shards' names. Raises InputError if there
    are none, and with split "" if there are shards of val.
    """
    import bracex

    if not split and "{split}" in place.data_dir:
        refuse_val(place, "{split} stands for train and val")
    pattern = place.data_dir.replace("{split}", split)
    files, name = open_root(pattern, place.follow_links)
    if not name:
        everything = [path for path in files.list() if path.endswith(suffix)]
        known = {
            each: [
                path
                for path in everything
                if re.search(rf"(^|[^a-z])({'|'.join(words)})([^a-z]|$)", path.lower())
            ]
            for each, words in SPLIT_NAMES.items()
        }
        if not split and known["val"]:
            refuse_val(place, known["val"][0])
        found = known[split] if split else known["train"] or everything
        if not found:
            words = f" with {' or '.join(SPLIT_NAMES[split])} in its name" if split else ""
            raise InputError(
                f"`data_dir`={place.data_dir}: contains no {suffix} file{words}; give a pattern, "
                f"such as {place.data_dir}/{{split}}-{{000..147}}{suffix}"
                + (", or `val_share` to divide all" if everything and split else "")
            )
        return files, found
    found, listed = [], None
    try:
        patterns = bracex.expand(name, limit=100000)
    except bracex.ExpansionLimitException as error:
        raise InputError(
            f"`data_dir`={place.data_dir}: matches more than 100000 shards; correct the pattern"
        ) from error
    for wanted in patterns:
        if any(mark in wanted for mark in "*?["):
            listed = files.list() if listed is None else listed
            matches = [path for path in listed if fnmatch.fnmatchcase(path, wanted)]
        else:
            matches = [wanted] if files.is_file(wanted) else []
        if not matches:
            raise InputError(
                f"{files.path(wanted)} is missing; correct `data_dir`={place.data_dir}"
            )
        found += matches
    return files, found


def webdataset(place: Place, split: str) -> Source:
    """Tar files in WebDataset's layout. A sample is the members with one key (the name up to its
    first dot): an image, and `.cls` or `.json` with its label."""
    files, shards = shard_names(place, split, ".tar")
    index = Index(files)
    labels: list[str | None] = []
    without: list[str] = []
    for shard in shards:
        index.paths.append(shard)
        with opened(files, shard) as file:
            key: str | None = None
            parts: dict[str, tuple[int, int]] = {}
            for name, start, length in tar_members(file, files.path(shard)):
                folder, base = posixpath.split(name)
                stem, _, extension = base.partition(".")
                if posixpath.join(folder, stem) != key:
                    _add_sample(
                        index, labels, without=without, file=file, shard=shard, key=key, parts=parts
                    )
                    key, parts = posixpath.join(folder, stem), {}
                extension = extension.lower()
                if extension in parts:
                    raise InputError(
                        f"{files.path(shard)}: contains {name} twice; write the shard again"
                    )
                parts[extension] = start, length
            _add_sample(
                index, labels, without=without, file=file, shard=shard, key=key, parts=parts
            )
    if without:
        print(
            f"{place.data_dir}: {counted(len(without), 'member')} left out (no image "
            f"with their key, or a second one): {', '.join(without[:5])}"
            f"{' ...' if len(without) > 5 else ''}",
            file=sys.stderr,
        )
    classes, numbers = label_numbers(
        place.data_dir, {label for label in labels if label is not None}
    )
    for place_in, label in enumerate(labels):
        if label is None:
            index.faults[place_in] = "has no label (no .cls and no .json with label or cls)"
        else:
            index.labels[place_in] = numbers[label]
    return index.source(classes)


def _add_sample(
    index: Index,
    labels: list[str | None],
    *,
    without: list[str],
    file: IO[bytes],
    shard: str,
    key: str | None,
    parts: dict[str, tuple[int, int]],
) -> None:
    """Adds one sample of a shard to the index.

    index: the image is added to it
    labels: its label is appended to them, None if it has none
    without: the names of members that are not used are appended to them
    file: the open shard
    shard: its name
    key: of the sample
    parts: the sample's members: extension -> (first byte, bytes)
    """
    images: list[str | None] = [
        extension for extension in parts if f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES
    ]
    image, *others = images or [None]
    without += [f"{key}.{extension}" for extension in others]
    if image is None:
        without += [f"{key}.{extension}" for extension in parts]
        return
    start, length = parts[image]
    index.add_member(f"{posixpath.splitext(shard)[0]}/{key}.{image}", 0, start=start, length=length)
    labels.append(_sample_label(file, parts))


def _sample_label(file: IO[bytes], parts: dict[str, tuple[int, int]]) -> str | None:
    for extension in ("cls", "json"):
        if extension in parts and 0 <= parts[extension][1] < 1 << 24:
            start, length = parts[extension]
            file.seek(start)
            try:
                text = file.read(length).decode().strip()
                label = (
                    text
                    if extension == "cls"
                    else next(
                        json.loads(text)[key]
                        for key in ("label", "cls", "class")
                        if key in json.loads(text)
                    )
                )
            # not text, not JSON, no such key
            except (ValueError, TypeError, StopIteration, RecursionError):
                continue
            if (
                isinstance(label, (int, str))
                and not isinstance(label, bool)
                and str(label).isprintable()
                and str(label)
            ):
                return str(label)
    return None


def parquet(place: Place, split: str) -> Source:
    """Rows of parquet files: a column of image bytes (Hugging Face's {bytes, path}, or binary) and
    a column of labels."""
    import pyarrow
    from pyarrow import parquet as pq

    files, shards = shard_names(place, split, ".parquet")
    groups: list[tuple[str, int, int]] = []
    labels: list[Any] = []
    names: list[str] = []
    classes: list[str] = []
    image = label = None
    for shard in shards:
        try:
            with opened(files, shard) as file, pq.ParquetFile(file) as table:
                if image is None or label is None:
                    image, label = _columns(place, table.schema_arrow, files.path(shard))
                known = _class_names(table.schema_arrow, label)
                if groups and known != classes:
                    raise InputError(
                        f"{files.path(shard)}: its list of classes differs from that of the "
                        f"previous shards; give shards of one dataset"
                    )
                classes = known
                paths = (
                    []
                    if pyarrow.types.is_binary(kind := table.schema_arrow.field(image).type)
                    or kind.get_field_index("path") < 0
                    else [f"{image}.path"]
                )
                read = table.read(columns=[label, *paths])
                labels += read.column(label).to_pylist()
                found = (
                    [row["path"] if row else None for row in read.column(image).to_pylist()]
                    if paths
                    else [None] * len(read)
                )
                base = posixpath.splitext(shard)[0]
                names += [
                    f"{base}/{row:08d}{posixpath.splitext(name or '.img')[1]}"
                    if not name
                    else f"{base}/{row:08d}_{posixpath.basename(name)}"
                    for row, name in enumerate(found)
                ]
                at = 0
                for group in range(table.num_row_groups):
                    rows = table.metadata.row_group(group).num_rows
                    groups.append((shard, group, len(labels) - len(read) + at))
                    at += rows
        except (pyarrow.ArrowException, KeyError) as error:
            raise InputError(
                f"{files.path(shard)}: not a parquet file of images ({first_line(error)}); "
                f"download it again"
            ) from error
    if not names:
        raise InputError(
            f"`data_dir`={place.data_dir}: its parquet files contain no rows; give others"
        )
    assert image is not None  # set by the first file
    return _labelled(
        place,
        classes,
        names=names,
        labels=labels,
        read=_RowGroups(files, groups, image).read,
        origin=files.path(shards[0]),
    )


def _labelled(
    place: Place,
    classes: list[str],
    *,
    names: list[str],
    labels: list[Any],
    read: Callable[[int], bytes],
    origin: str = "",
) -> Source:
    """Makes a Source of labels and a function that reads.

    place: the dataset
    classes: names in the order of the labels, or empty: the labels are the class names
    names: names of the pictures
    labels: numbers or texts; None, and numbers outside a given list of classes, are faults
    read: returns a picture file's bytes by its number
    origin: place of the first picture
    """
    if classes:
        faults = {
            row: f"has label {label!r}, but there are {len(classes)} classes"
            for row, label in enumerate(labels)
            if not isinstance(label, int) or not 0 <= label < len(classes)
        }
        return Source(
            classes=classes,
            names=names,
            labels=np.array(
                [0 if row in faults else label for row, label in enumerate(labels)], np.int64
            ),
            read=read,
            faults=faults,
            origin=origin,
        )
    faults = {
        row: "has no label"
        for row, label in enumerate(labels)
        if label is None or str(label).startswith("-")
    }
    classes, numbers = label_numbers(
        place.data_dir, {str(label) for row, label in enumerate(labels) if row not in faults}
    )
    return Source(
        classes=classes,
        names=names,
        labels=np.array(
            [0 if row in faults else numbers[str(label)] for row, label in enumerate(labels)],
            np.int64,
        ),
        read=read,
        faults=faults,
        origin=origin,
    )


def _columns(place: Place, schema: Any, path: str) -> tuple[str, str]:
    """Names of the image column and the label column: those that `place` gives, otherwise "image"
    and "label", otherwise the only columns with a matching type. Raises InputError if there is no
    such column."""
    import pyarrow

    def is_image(kind: Any) -> bool:
        return (
            pyarrow.types.is_binary(kind)
            or pyarrow.types.is_large_binary(kind)
            or pyarrow.types.is_struct(kind)
            and kind.get_field_index("bytes") >= 0
        )

    def is_label(kind: Any) -> bool:
        return pyarrow.types.is_integer(kind) or pyarrow.types.is_string(kind)

    image, label = (
        _column(
            path,
            option,
            given=given,
            columns=[(field.name, fits(field.type)) for field in schema],
            preferred=preferred,
        )
        for option, given, fits, preferred in (
            ("image_column", place.image_column, is_image, "image"),
            ("label_column", place.label_column, is_label, "label"),
        )
    )
    return image, label


def _column(
    path: str, option: str, *, given: str, columns: list[tuple[str, bool]], preferred: str
) -> str:
    fitting = [name for name, fits in columns if fits]
    choice = given or (
        preferred if preferred in fitting else fitting[0] if len(fitting) == 1 else ""
    )
    if choice not in fitting:
        raise InputError(
            f"{path}: `{option}`={given!r} is not one of its columns with a matching type "
            f"({', '.join(fitting) or 'none'}; all columns: "
            f"{', '.join(name for name, _ in columns)}); name one"
        )
    return choice


def _class_names(schema: Any, label: str) -> list[str]:
    """The class names that Hugging Face stores in a parquet file's metadata; empty if there are
    none."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        names = feature["names"]
        return [
            str(name)
            for name in (
                names if isinstance(names, list) else [names[str(i)] for i in range(len(names))]
            )
        ]
    except (KeyError, ValueError, TypeError):
        return []


class _RowGroups:
    """Images of parquet files by row. The last GROUPS_KEPT row groups stay in memory. No two
    threads load the same row group at once.

    groups: (shard, row group in it, first row) of each row group. column: that of the images.
    """

    def __init__(self, files: Files, groups: list[tuple[str, int, int]], column: str) -> None:
        self.files, self.groups, self.column = files, groups, column
        self.starts = np.array([first for *_, first in groups])
        self._kept: OrderedDict[int, tuple[threading.Lock, list[Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, row: int) -> bytes:
        number = int(np.searchsorted(self.starts, row, "right")) - 1
        with self._lock:
            if number not in self._kept:
                self._kept[number] = threading.Lock(), []
                while len(self._kept) > GROUPS_KEPT:
                    self._kept.popitem(last=False)
            lock, kept = self._kept[number]
        with lock:
            if not kept:
                kept.append(self._load(*self.groups[number][:2]))
        cell = kept[0][row - int(self.starts[number])].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not data:
            raise BadPicture(
                f"{self.files.path(self.groups[number][0])}: row {row} has no image; replace or "
                f"remove it"
            )
        return data

    def _load(self, shard: str, group: int) -> Any:
        import pyarrow
        from pyarrow import parquet as pq

        try:
            with opened(self.files, shard) as file, pq.ParquetFile(file) as table:
                return table.read_row_group(group, columns=[self.column], use_threads=False).column(
                    0
                )
        except pyarrow.ArrowException as error:
            raise InputError(
                f"{self.files.path(shard)}: row group {group} cannot be read "
                f"({first_line(error)}); download it again"
            ) from error


def hugging_face(place: Place, split: str) -> Source:
    """A dataset of the `datasets` library, given by its name or by the folder of its files. split
    "": its train split, or its only one."""
    import datasets

    names = SPLIT_NAMES[split or "train"]
    try:
        known = datasets.get_dataset_split_names(place.data_dir)
        if not split and (val := next((name for name in known if name in SPLIT_NAMES["val"]), "")):
            refuse_val(place, f"the split {val}")
        theirs = next((name for name in known if name in names), None)
        if theirs is None and not split and len(known) == 1:
            theirs = known[0]
        if theirs is None:
            raise InputError(
                f"`data_dir`={place.data_dir}: has the splits {', '.join(known)}, but none of "
                f"{', '.join(names)}; give another dataset, `split` or `val_share`"
            )
        table = datasets.load_dataset(place.data_dir, split=theirs)
    except InputError:
        raise
    # The library has no common type for errors of what it cannot find, reach or read
    except Exception as error:
        raise InputError(
            f"`data_dir`={place.data_dir}: the datasets library cannot load it "
            f"({type(error).__name__}: {first_line(error)}); correct the name, log in, or connect "
            f"to the network"
        ) from error
    columns = [(name, isinstance(kind, datasets.Image)) for name, kind in table.features.items()]
    image = _column(
        place.data_dir, "image_column", given=place.image_column, columns=columns, preferred="image"
    )
    columns = [
        (
            name,
            isinstance(kind, datasets.ClassLabel)
            or getattr(kind, "dtype", "") in ("int64", "int32", "string"),
        )
        for name, kind in table.features.items()
    ]
    label = _column(
        place.data_dir, "label_column", given=place.label_column, columns=columns, preferred="label"
    )
    classes = list(getattr(table.features[label], "names", None) or [])
    labels = list(table[label])
    table = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    lock = threading.Lock()

    def read(row: int) -> bytes:
        with lock:
            cell = table[row][image]
        if cell and cell["bytes"]:
            return cell["bytes"]
        if not cell or not cell["path"]:
            raise BadPicture(f"{place.data_dir}: row {row} has no image; replace or remove it")
        # A row may name any file. Only the library's cache and the dataset's folder are allowed
        path = os.path.realpath(cell["path"])
        if not any(
            path.startswith(os.path.realpath(root) + os.sep)
            for root in (datasets.config.HF_CACHE_HOME, place.data_dir)
        ):
            raise BadPicture(
                f"{place.data_dir}: row {row} names {cell['path']}, which is outside the dataset; "
                f"replace or remove it"
            )
        files, name = open_root(path)
        return files.read(name)

    return _labelled(
        place, classes, names=[f"{row:08d}" for row in range(len(labels))], labels=labels, read=read
    )


def torchvision(place: Place, split: str) -> Source:
    """CIFAR-10/100 and Imagenette. torchvision downloads them to data_dir if they are missing."""
    from torchvision import datasets  # takes seconds to import; only these three need it

    dataset, root = place.dataset, Path(place.data_dir)
    try:
        if dataset == "imagenette":
            there = (root / "imagenette2").is_dir()
            data = datasets.Imagenette(str(root), split=split, size="full", download=not there)
            files, _ = open_root(str(root), place.follow_links)
            index = Index(files)
            for path, label in data._samples:
                name = Path(path).relative_to(root).as_posix()
                index.add_file(name, label, name.partition(f"/{split}/")[2])
            return index.source(list(data.wnids), [", ".join(names) for names in data.classes])
        kind = datasets.CIFAR100 if dataset == "cifar100" else datasets.CIFAR10
        data = kind(str(root), train=split == "train", download=True)
    except (OSError, RuntimeError, HTTPException, tarfile.TarError, zlib.error) as error:
        raise InputError(
            f"`dataset`: {dataset} is not in {root} and cannot be downloaded "
            f"({first_line(error)}); connect to the network, or copy the archive to that folder"
        ) from error
    return Source(
        classes=list(data.classes),
        names=[f"{number:05d}.png" for number in range(len(data.data))],
        labels=data.targets,
        read=data.data.__getitem__,
    )
