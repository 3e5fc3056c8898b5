"""Divides a source that has no validation images into train and val.

An image's name decides where it goes: val gets the images whose hash lies in the lowest part of the
range. The number of images in val is therefore close to the share, not exactly the share: of 100
images of a class at 0.1, 10 +- 3. In return, images that are added later move none of the others
from train to val, where a model that was trained before has seen them. (The exception is a class of
very few images, all of whose hashes lie in that part: one of them is put in train, and a new image
can take its place.)
"""

from collections.abc import Sequence
from contextlib import closing

import numpy as np
from tqdm import tqdm

from rsb_ffcv import InputError, counted, warn
from rsb_ffcv.dataset.picture import BadPicture
from rsb_ffcv.dataset.sources import Source
from rsb_ffcv.dataset.workers import ordered
from rsb_ffcv.ops.native import checksum


def divided(source: Source, val_share: float, num_workers: int) -> dict[str, Source]:
    """Divides a source into train and val, and prints the number of images in each.

    source: all images
    val_share: expected share of each class in val, above 0 and below 1
    num_workers: threads that read pictures of equal size

    The result depends on the names, the labels and val_share, and on which pictures are
    byte-identical. Copies of a picture go to the same split if the source knows the sizes of its
    files: folders, lists of files, and tar archives, but not parquet and `datasets`, and of remote
    files only those in tar archives. If all copies are of one class, that is certain.

    A class with two or more different images has at least one in each split. A class with one has
    it in train, and a warning is printed. Raises InputError if val would be empty.
    """
    positions = _positions(source, num_workers)
    in_val = positions < val_share
    alone = []
    ends = np.cumsum(np.bincount(source.labels, minlength=len(source.classes)))
    bad = np.array(sorted(source.faults), np.int64)  # not written: these do not count
    by_class = np.split(np.argsort(source.labels, kind="stable"), ends[:-1])
    for name, everything in zip(source.classes, by_class):
        members = np.setdiff1d(everything, bad, assume_unique=True)
        if not len(members):
            continue
        own = positions[members]
        if own.min() == own.max():  # one image, and its copies
            in_val[members] = False
            alone.append(name)
        elif not in_val[members].any():
            in_val[members[own == own.min()]] = True
        elif in_val[members].all():
            in_val[members[own == own.max()]] = False
    in_val[bad] = False
    if not in_val.any():
        raise InputError(
            f"`val_share`={val_share:g}: val would be empty, because no class has two different "
            f"images; add images"
        )
    if alone:
        warn(
            f"{counted(len(alone), 'class', 'classes')} of {len(source.classes)} without an image "
            f"in val, because there is only one, in train: {_listed(alone)}"
        )
    count = int(in_val.sum())
    print(
        f"divided {counted(len(source), 'image')}: {len(source) - count} in train, {count} in val "
        f"({count / len(source):.1%})",
        flush=True,
    )
    return {
        "train": source.chosen(np.flatnonzero(~in_val)),
        "val": source.chosen(np.flatnonzero(in_val)),
    }


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _positions(source: Source, num_workers: int) -> np.ndarray:
    """A number 0 .. 1 of each picture, uniformly distributed: XXH64 of its name. Copies share the
    highest of theirs: a new copy can then move the others from val to train, but not back."""
    names = (name.encode("utf-8", "surrogateescape") for name in source.names)
    positions = np.array([checksum(np.frombuffer(name, np.uint8)) for name in names]) / 2.0**64
    copies = _copies(source, num_workers)
    for copied in copies:
        positions[copied] = positions[copied].max()
    if copies:
        print(
            f"byte-identical copies of other images: "
            f"{sum(map(len, copies)) - len(copies)}, each in the split of the other",
            flush=True,
        )
    return positions


def _copies(source: Source, num_workers: int) -> list[list[int]]:
    """The numbers of the pictures that have the same bytes, for each content that occurs more than
    once. Only pictures of known, equal size are read."""
    by_size: dict[int, list[int]] = {}
    for index in range(len(source)):
        # An empty file is a bad picture
        if (size := source.size(index)) and index not in source.faults:
            by_size.setdefault(size, []).append(index)
    alike = [index for same in by_size.values() if len(same) > 1 for index in same]
    if not alike:
        return []
    by_content: dict[int, list[int]] = {}

    def content(index: int) -> int | None:
        try:
            return checksum(np.frombuffer(source.picture(index), np.uint8))
        except BadPicture:  # reported when the picture is written
            return None

    with (
        closing(ordered(content, alike, threads=num_workers, name=source.place)) as contents,
        tqdm(total=len(alike), desc="reading pictures of equal size", unit="img") as bar,
    ):
        for index, found in zip(alike, contents):
            if found is not None:
                by_content.setdefault(found, []).append(index)
            bar.update()
    return [copied for copied in by_content.values() if len(copied) > 1]
