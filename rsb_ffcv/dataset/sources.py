"""Where labelled raw images come from: each source is a list of (picture, label) that can be opened in any order.

Class numbers are positions in the sorted list of class names (wnids for ImageNet), the order that torchvision, timm
and every published checkpoint use.
"""
import os
import sys
import tarfile
import zlib
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

from PIL import Image

from rsb_ffcv import InputError, first_line
from rsb_ffcv.dataset import synthetic

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}


@dataclass
class Source:
    """Labelled pictures. pictures: file paths, or PIL images already in memory; labels: 0 .. len(classes) - 1."""
    classes: list[str]
    pictures: list
    labels: list[int] = field(default_factory=list)

    def __len__(self):
        return len(self.labels)

    def name(self, index: int) -> str:
        """How to tell a person which picture this is."""
        picture = self.pictures[index]
        return f"image {index}" if isinstance(picture, Image.Image) else str(picture)

    def first(self, count: int) -> "Source":
        """The first `count` pictures, or all where there are fewer."""
        return Source(self.classes, self.pictures[:count], self.labels[:count])


def open_source(dataset: str, data_dir: str, split: str) -> Source:
    """The `split` ("train" or "val") of a dataset. Raises InputError naming what is missing and how to mend it."""
    root = Path(data_dir)
    if dataset == "demo":
        try:
            synthetic.make_demo_images(root)
        except OSError as error:
            raise InputError(f"cfg.data_dir={root}: the demo pictures cannot be put there ({error.strerror}); "
                             f"choose another") from error
    if dataset in ("cifar", "cifar10", "cifar100", "imagenette"):
        return _torchvision(dataset, root, split)
    if not os.path.isdir(root):
        raise InputError(f"cfg.data_dir: {root} is not a folder; give the folder that holds the images")
    if dataset == "tiny_imagenet":
        return _tiny_imagenet(root, split)
    return _image_folder(root, split)


def _image_folder(root: Path, split: str) -> Source:
    """root/<split>/<class>/<image>."""
    folder = root / split
    if not folder.is_dir():
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())[:5]
        raise InputError(f"cfg.split: {root} has no folder '{split}' (it has {', '.join(found) or 'no folder'}); "
                         f"give the folder above train/<class>/ and val/<class>/")
    classes = _subfolders(folder)
    other = root / ("val" if split == "train" else "train")
    if other.is_dir() and (differing := set(classes) ^ set(_subfolders(other))):
        # A class more or less in one split would shift the numbers of all that follow
        raise InputError(f"{root}: train and val do not have the same classes ({', '.join(sorted(differing)[:5])} "
                         f"in one only); add or remove class folders")
    return _class_folders(folder, classes)


def _tiny_imagenet(root: Path, split: str) -> Source:
    """The archive's own layout: train/<wnid>/images/*.JPEG; val/images with val_annotations.txt; wnids.txt."""
    listing = root / "wnids.txt"
    if not listing.is_file():
        raise InputError(f"{listing} is missing; cfg.data_dir must be Tiny-ImageNet's unpacked folder")
    wnids = sorted(listing.read_text().split())
    if split == "train":
        return _class_folders(root / "train", wnids, inner="images")
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise InputError(f"{annotations} is missing; cfg.data_dir must be Tiny-ImageNet's unpacked folder")
    numbers = {wnid: number for number, wnid in enumerate(wnids)}
    paths, labels = [], []
    for line_number, line in enumerate(annotations.read_text().splitlines(), 1):
        file_name, wnid = (line.split("\t") + [""])[:2]
        if wnid not in numbers or Path(file_name).name != file_name:
            raise InputError(f"{annotations}:{line_number}: '{line[:60]}' is not an image of a class in {listing.name}")
        paths.append(str(root / "val" / "images" / file_name))
        labels.append(numbers[wnid])
    return _labelled(wnids, paths, labels, root / "val")


def _torchvision(dataset: str, root: Path, split: str) -> Source:
    """CIFAR-10/100 and Imagenette, downloaded into `root` by torchvision unless they are there already."""
    from torchvision import datasets  # seconds to import, needed by these three only

    try:
        if dataset == "imagenette":
            there = (root / "imagenette2").is_dir()
            data = datasets.Imagenette(str(root), split=split, size="full", download=not there)
            return _labelled(list(data.wnids), [path for path, _ in data._samples], [label for _, label in data._samples],
                             root)
        kind = datasets.CIFAR100 if dataset == "cifar100" else datasets.CIFAR10
        data = kind(str(root), train=split == "train", download=True)
    except (OSError, RuntimeError, HTTPException, tarfile.TarError, zlib.error) as error:
        raise InputError(f"cfg.dataset: {dataset} is neither in {root} nor could it be downloaded "
                         f"({first_line(error)}); connect to the network or put the archive there") from error
    return Source(list(data.classes), [Image.fromarray(pixels) for pixels in data.data], list(data.targets))


def _subfolders(folder: Path) -> list[str]:
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise InputError(f"{folder} has no class folder; images belong in {folder}/<class>/")
    return classes


def _class_folders(folder: Path, classes: list[str], inner: str = "") -> Source:
    paths, labels, skipped = [], [], 0
    for label, name in enumerate(classes):
        inside = folder / name / inner
        if not inside.is_dir():
            raise InputError(f"class '{name}' has no folder {inside}; add its images or take the class out of the list")
        found = sorted(str(Path(where) / file) for where, _, files in os.walk(inside, followlinks=True)
                       for file in files)
        files = [file for file in found if Path(file).suffix.lower() in IMAGE_SUFFIXES]
        skipped += len(found) - len(files)
        if not files:
            raise InputError(f"class '{name}' has no image in {inside} ({', '.join(sorted(IMAGE_SUFFIXES))}); "
                             f"add images or remove the folder")
        paths += files
        labels += [label] * len(files)
    if skipped:
        print(f"{folder}: {skipped} files left out, whose names do not end in {', '.join(sorted(IMAGE_SUFFIXES))}",
              file=sys.stderr)
    return _labelled(classes, paths, labels, folder)


def _labelled(classes, paths, labels, where) -> Source:
    if not paths:
        raise InputError(f"{where} holds no image; give a folder with labelled images")
    return Source(classes, paths, labels)
