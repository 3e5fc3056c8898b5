"""The reader of each kind of dataset, and checks of what the splits of a dataset have in common."""

import re
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import PurePosixPath

from rsb_ffcv import InputError, check_choice
from rsb_ffcv.dataset import layouts, shards
from rsb_ffcv.dataset.files import open_root, read_text
from rsb_ffcv.dataset.picture import BadPicture
from rsb_ffcv.dataset.sources import SPLIT_NAMES, Place, Source, refuse_val

READERS = {
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
    "cifar": shards.torchvision,
    "cifar10": shards.torchvision,
    "cifar100": shards.torchvision,
    "imagenette": shards.torchvision,
}
# Datasets that may have no validation images. With the split "", their readers return all images
UNDIVIDED = {"imagenet", "csv", "callable", "webdataset", "parquet", "datasets"}


def open_undivided(place: Place) -> Source:
    """Opens a dataset that has no val split: all its images. Raises InputError, also if it has
    one."""
    check_choice("dataset", place.dataset, READERS)
    if place.dataset not in UNDIVIDED:
        refuse_val(place, f"every `dataset`={place.dataset} has")
    return _open(place, [""])[""]


def open_sources(place: Place, splits: list[str]) -> dict[str, Source]:
    """Opens the splits ("train", "val") of a dataset, with one list of classes. Raises InputError,
    which names what is missing and the fix, also for an unknown dataset or split."""
    check_choice("dataset", place.dataset, READERS)
    for split in splits:
        check_choice("split", split, SPLIT_NAMES)
    return _open(place, splits)


def _open(place: Place, splits: list[str]) -> dict[str, Source]:
    reader = READERS[place.dataset]
    try:
        sources = {split: reader(place, split) for split in splits}
    except BadPicture as error:  # for a list or an archive, not a picture
        raise InputError(str(error)) from error
    if place.class_names:
        sources = {split: _renamed(source, place.class_names) for split, source in sources.items()}
    for source in sources.values():
        twice = [name for name, count in Counter(source.classes).items() if count > 1]
        if twice:
            raise InputError(
                f"`data_dir`={place.data_dir}: two classes have the name '{twice[0]}'; give "
                f"different names with `class_names`"
            )
    longest = max((source.classes for source in sources.values()), key=len)
    for source in sources.values():
        if source.classes != longest[: len(source.classes)]:
            differing = sorted(set(longest) ^ set(source.classes)) or ["the order"]
            raise InputError(
                f"`data_dir`={place.data_dir}: train and val do not have the same classes "
                f"(difference: {', '.join(differing[:5])}); correct one of them, or write each "
                f"with `split`"
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
            f"`data_dir`={place.data_dir}: train and val would contain the same images; give "
            f"`split`, {{split}} in a pattern, or `val_share` to divide them"
        )
    return sources


def _renamed(source: Source, listing: str) -> Source:
    files, name = open_root(listing)
    names = [line.strip() for line in read_text(files, name).splitlines() if line.strip()]
    if len(names) < len(source.classes) or len(set(names)) < len(names):
        raise InputError(
            f"`class_names`={listing}: {len(names)} lines ({len(set(names))} different) for "
            f"{len(source.classes)} classes; give one name per line, in the order of the labels"
        )
    return replace(source, classes=names, titles=[])


def _known_titles(classes: list[str]) -> list[str]:
    """The titles of wnids in timm's table of synsets; empty if one is not in it."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return []
    spec = find_spec("timm")  # importing timm would take seconds
    assert spec is not None and spec.origin is not None  # this package depends on it
    timm = PurePosixPath(spec.origin).parent
    with open(timm / "data/_info/imagenet_synset_to_lemma.txt", encoding="utf-8") as table:
        titles = dict(line.rstrip("\n").split("\t", 1) for line in table if "\t" in line)
    return [titles[name] for name in classes] if all(name in titles for name in classes) else []
