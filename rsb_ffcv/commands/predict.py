"""Classifies pictures with an exported model.

Files are converted as by write_ffcv.py, without its max_resolution. They and the images of a .beton
file are cropped by the operation of the run's evaluation.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch

from rsb_ffcv import InputError, counted, option_names
from rsb_ffcv.atomic import atomic_file
from rsb_ffcv.beton import Beton, read_beton
from rsb_ffcv.config.train import PredictOptions
from rsb_ffcv.dataset.picture import BadPicture, conversion, load_rgb
from rsb_ffcv.dataset.sources import is_image
from rsb_ffcv.dataset.workers import ordered
from rsb_ffcv.export.description import Description
from rsb_ffcv.export.formats import read_model
from rsb_ffcv.loading import EvalLoader
from rsb_ffcv.loading.batch import normalize
from rsb_ffcv.ops.crop import CenterCrop
from rsb_ffcv.reporting.console import Console
from rsb_ffcv.training import compute

FIX = "give files, folders or patterns of pictures, or .beton files"
OPTIONS = {name: f"predict.{name}" for name in ("model", "batch_size", "num_workers")}


class Found(NamedTuple):
    """A picture and its prediction.

    path: of the file, or <.beton file>:<name of the image>.
    target: name of its class in a .beton file, else empty.
    error: why it could not be read, else empty.
    scores: probabilities of all classes, float32 (classes,); None if it could not be read.
    """

    path: str
    target: str
    error: str
    scores: np.ndarray | None


def predict(given: list[str], options: PredictOptions) -> int:
    """Prints the classes of pictures, in their order. Returns the exit status: 1 if a picture could
    not be read.

    given: files, folders and patterns of pictures, and .beton files.

    Raises InputError if there are no such files, or if the model cannot be read.
    """
    given_files = sources(given)
    if not given_files:
        raise InputError(f"predict: no picture; {FIX}")
    with option_names(OPTIONS):
        predictor = _Predictor(options)
        pictures = sum(map(len, given_files))
        unread = right = targets = others = 0
        known = {*predictor.about.classes}
        with (
            _output(options.out) as out,
            Console(True) as console,
            console.bar("pictures", pictures) as bar,
        ):
            write = _writer(out, predictor.about, options)
            for found in predictor.predict(given_files):
                write(found)
                bar.update()
                if found.scores is None:
                    unread += 1
                    console.warn(found.error)
                elif found.target in known:
                    targets += 1
                    best = int(found.scores.argmax())
                    right += predictor.about.classes[best] == found.target
                else:
                    others += found.target != ""
    if others:
        print(
            f"{counted(others, 'image')} of classes that the model does not have", file=sys.stderr
        )
    if targets:
        print(f"top-1: {100 * right / targets:.2f} % of {targets} images", file=sys.stderr)
    if unread:
        print(f"{unread} of {counted(pictures, 'picture')} could not be read", file=sys.stderr)
    return int(unread > 0)


def sources(given: list[str]) -> list[Beton | list[Path]]:
    """The .beton files, and lists of the pictures between them, in their order.

    given: files, folders and patterns of pictures, and .beton files.

    Raises InputError if one of them has no picture, or if a .beton file cannot be read.
    """
    found: list[Beton | list[Path]] = []
    for path in (path for name in given for path in _paths(name)):
        if path.suffix == ".beton":
            found.append(read_beton(path))
        elif found and isinstance(found[-1], list):
            found[-1].append(path)
        else:
            found.append([path])
    return found


def _paths(name: str) -> list[Path]:
    """The files that an argument names."""
    path = Path(name)
    if path.is_dir():
        found = sorted(one for one in path.rglob("*") if is_image(one.name) and one.is_file())
    elif os.path.lexists(path):  # also a link whose target is missing: an error in its row
        return [path]
    else:
        found = sorted(Path(one) for one in glob(name, recursive=True) if Path(one).is_file())
    if not found:
        raise InputError(f"{name}: no such picture, or a folder without pictures; {FIX}")
    return found


class _Predictor:
    """An exported model on a device."""

    def __init__(self, options: PredictOptions) -> None:
        """Raises InputError if the model cannot be read, or if there is no such device."""
        try:
            self._where = compute.set_up(
                options.device, options.precision, compile="0", channels_last=True, threads=0
            )
        except InputError as error:
            raise InputError(str(error).replace("compute.", "predict.")) from error.__cause__
        self._options = options
        model, self.about = read_model(Path(options.model))
        self._crop = CenterCrop(self.about.side, self.about.crop_ratio, self.about.interpolation)
        self._model = model.to(self._where.device, memory_format=self._where.memory_format)

    def predict(self, given: Sequence[Beton | list[Path]]) -> Iterator[Found]:
        for source in given:
            yield from self._files(source) if isinstance(source, list) else self._beton(source)

    def _files(self, paths: list[Path]) -> Iterator[Found]:
        size = self._options.batch_size
        with (
            conversion(),
            closing(
                ordered(self._read, paths, threads=self._options.num_workers, ahead=2 * size)
            ) as images,
        ):
            for start in range(0, len(paths), size):
                chunk = list(islice(images, size))
                readable = [image for image in chunk if isinstance(image, np.ndarray)]
                scores = iter(
                    self._scores(torch.from_numpy(np.stack(readable))) if readable else ()
                )
                for path, image in zip(paths[start:], chunk):
                    if isinstance(image, np.ndarray):
                        yield Found(str(path), "", "", next(scores))
                    else:
                        yield Found(str(path), "", image, None)

    def _read(self, path: Path) -> np.ndarray | str:
        """The crop of a picture, or why it cannot be read."""
        if path.exists() and not path.is_file():
            return f"{path}: is not a file; leave it out"
        try:
            pixels = load_rgb(path.read_bytes(), str(path), self._options.max_pixels)
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror}); correct or remove it"
        except BadPicture as error:
            return str(error).replace("`max_pixels`", "predict.max_pixels")
        return self._crop.apply(pixels)

    def _beton(self, beton: Beton) -> Iterator[Found]:
        names = beton.names()
        loader = EvalLoader(
            beton.path,
            batch_size=self._options.batch_size,
            resolution=self.about.side,
            num_workers=self._options.num_workers,
            crop_ratio=self.about.crop_ratio,
            interpolation=self.about.interpolation,
        )
        with closing(loader), closing(iter(loader)) as batches:
            for images, labels, samples in batches:
                for scores, label, sample in zip(self._scores(images), labels, samples):
                    path = f"{beton.path}:{names[sample]}"
                    yield Found(path, self._target(beton, int(label)), "", scores)

    def _target(self, beton: Beton, label: int) -> str:
        """The name of a label. A file that lists no classes has the model's."""
        if beton.about or label >= len(self.about.classes):
            return beton.class_name(label)
        return self.about.classes[label]

    @torch.no_grad()
    def _scores(self, images: torch.Tensor) -> np.ndarray:
        """uint8 (n, side, side, 3) -> probabilities, float32 (n, classes)."""
        mean, std = tuple(self.about.mean), tuple(self.about.std)
        pixels = normalize(images.to(self._where.device), mean, std)
        pixels = pixels.contiguous(memory_format=self._where.memory_format)
        with self._where.autocast():
            logits = self._model(pixels)
            if self._options.lr_tta:
                logits = (logits + self._model(pixels.flip(3))) / 2
        return logits.float().softmax(1).cpu().numpy()


@contextmanager
def _output(path: str) -> Iterator[TextIO]:
    """The file at `path`, which appears when it is complete; standard output if that is empty."""
    if not path:
        if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
        yield sys.stdout
        return
    with atomic_file(path, "give another predict.out") as file:
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        yield text
        text.detach()  # flushes and does not close


def _writer(out: TextIO, about: Description, options: PredictOptions) -> Callable[[Found], object]:
    """A function that writes one prediction."""
    count = min(options.top, len(about.classes))

    def best(scores: np.ndarray) -> list[dict[str, Any]]:
        order = np.argsort(-scores, kind="stable")[:count]
        return [
            {
                "class": about.classes[label],
                **({"title": about.titles[label]} if about.titles else {}),
                "probability": round(float(scores[label]), 6),
            }
            for label in order.tolist()
        ]

    if options.format == "json":

        def line(found: Found) -> None:
            row: dict[str, Any] = {"path": found.path}
            if found.target:
                row["target"] = found.target
            row |= {"error": found.error} if found.scores is None else {"top": best(found.scores)}
            out.write(json.dumps(row) + "\n")

        return line
    columns = ["class", *(["title"] if about.titles else []), "probability"]
    table = csv.writer(out, lineterminator="\n")
    table.writerow(
        ["path", "target", "error"]
        + [f"{name}_{place}" for place in range(1, count + 1) for name in columns]
    )

    def row(found: Found) -> None:
        classes = [] if found.scores is None else best(found.scores)
        values = [one[name] for one in classes for name in columns]
        values += [""] * (count * len(columns) - len(values))
        table.writerow([found.path, found.target, found.error, *values])

    return row
