"""Draws a contact sheet: images of a file as they are stored, and as a recipe augments them."""

import math
import os
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from rsb_ffcv import InputError, counted, first_line
from rsb_ffcv.atomic import atomic_file
from rsb_ffcv.beton import Beton, read_beton
from rsb_ffcv.config.train import ONLY_FOR_RUNS, read_config
from rsb_ffcv.dataset.assemble import class_number, sample_numbers
from rsb_ffcv.dataset.writer import evenly
from rsb_ffcv.loading.batch import MEAN, STD
from rsb_ffcv.training import build, plan
from rsb_ffcv.training.compute import Compute

# Pixels: longer side of an image, height of its label, space between cells
CELL, LABEL, GAP = 192, 32, 4
MAX_CELLS = 4000
DEFAULT_EPOCHS = 5


def show(
    path: str, write_path: str, *, samples: str, classes: str, count: int, recipe: str, epochs: int
) -> None:
    """Writes a contact sheet to a PNG file.

    path: the .beton file
    write_path: the PNG file; its name ends in .png
    samples: numbers and ranges of samples, or empty
    classes: names or numbers of classes, or empty; the first `count` samples of each are shown
    count: number of images; without samples and classes, they are spread evenly over the file
    recipe: YAML file, or empty. Beside each stored image are its crop, flip, RandAugment, jitter
        and erasing in the recipe's first epochs (without mixup and cutmix, which need a batch)
    epochs: number of these epochs; 0: DEFAULT_EPOCHS if there is a recipe

    Raises InputError if a sample is damaged, an option does not fit the file, or a file cannot be
    read or written.
    """
    file = read_beton(path)
    if os.path.realpath(path) == os.path.realpath(write_path):
        raise InputError(f"cfg.write_path={write_path}: is the file itself; choose another")
    if not write_path.lower().endswith(".png"):
        raise InputError(f"cfg.write_path={write_path}: must end in .png; the sheet is a PNG file")
    if epochs and not recipe:
        raise InputError(f"cfg.epochs={epochs}: are the epochs of a recipe; give cfg.recipe too")
    epochs = epochs or DEFAULT_EPOCHS * bool(recipe)
    chosen = _chosen(file, samples, classes, count=count)
    cells = 1 + epochs  # of an image
    if len(chosen) * cells > MAX_CELLS:
        given = {"samples": samples, "classes": classes, "count": "" if samples else count}
        given |= {"epochs": epochs} if recipe else {}
        raise InputError(
            f"{', '.join(f'cfg.{name}={value}' for name, value in given.items() if value)}: "
            f"{len(chosen)} images x {cells} cells exceed the limit of {MAX_CELLS} cells; choose "
            f"fewer"
        )
    stored = [Image.fromarray(picture) for picture in _stored(file, chosen)]
    names = file.names_of(chosen.tolist())
    titles = file.about.titles if file.about else []
    labels = [
        f"{index}  {file.class_name(label)}\n{titles[label] if titles else names[index]}"
        for index, label in zip(chosen.tolist(), file.labels[chosen].tolist())
    ]
    if recipe:
        made = [
            [Image.fromarray(picture) for picture in row]
            for row in zip(*_augmented(path, chosen, recipe, epochs=epochs))
        ]
        rows = [[picture, *others] for picture, others in zip(stored, made)]
        texts = [[label, *(f"epoch {epoch + 1}" for epoch in range(epochs))] for label in labels]
    else:
        across = math.ceil(math.sqrt(len(stored)))
        rows = [stored[at : at + across] for at in range(0, len(stored), across)]
        texts = [labels[at : at + across] for at in range(0, len(stored), across)]
    with atomic_file(write_path, "choose another cfg.write_path") as target:
        _sheet(rows, texts).save(target, "PNG")
    print(
        f"{write_path}: {counted(len(stored), 'image')} of {path}"
        + (f", as {recipe} augments them in {counted(epochs, 'epoch')}" if recipe else "")
    )


def _chosen(file: Beton, samples: str, classes: str, *, count: int) -> np.ndarray:
    if samples and classes:
        raise InputError(f"cfg.samples={samples} and cfg.classes={classes}: give one of them")
    if samples:
        return np.array(sample_numbers(samples, len(file)))
    if classes:
        chosen = [
            np.flatnonzero(file.labels == class_number(file, name.strip()))[:count]
            for name in classes.split(",")
        ]
        if not all(map(len, chosen)):
            raise InputError(
                f"cfg.classes={classes}: one of these classes has no samples in {file.path}; info "
                f"lists the classes"
            )
        return np.concatenate(chosen)
    return evenly(len(file), count)


def _stored(file: Beton, chosen: np.ndarray) -> Iterator[np.ndarray]:
    with file.open() as opened:
        for index in chosen.tolist():
            try:
                yield file.picture(opened, index)
            except ValueError as error:
                raise InputError(
                    f"{file.place(index)} {first_line(error)}; verify lists all damaged samples"
                ) from error


def _augmented(path: str, chosen: np.ndarray, recipe: str, *, epochs: int) -> Iterator[np.ndarray]:
    """Yields the images of each epoch: uint8 (n, side, side, 3)."""
    arguments = [
        "--config-file",
        recipe,
        f"--data.train_dataset={path}",
        "--training.batch_size=2",
        "--training.global_batch=2",
    ]
    try:
        c = read_config(None, arguments, unread=ONLY_FOR_RUNS)
    except InputError as error:
        message = str(error).replace("--config-file=", "cfg.recipe=")
        raise InputError(message) from error.__cause__
    here = Compute(device=torch.device("cpu"), precision="fp32", compile=False, channels_last=False)
    transform = build.batch_transform(c)
    with closing(build.train_loader(c, here, 1, decode="cpu")) as loader:
        for epoch in range(epochs):
            loader.resolution = plan.resolution(c, min(epoch, c.training.epochs - 1))
            images, _, slots = loader.images_of(epoch, chosen)
            images, _ = transform(images, epoch, slots, mixing=False)
            pixels = images.permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)
            yield (pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def _sheet(rows: list[list[Image.Image]], texts: list[list[str]]) -> Image.Image:
    font = ImageFont.load_default(12)
    sheet = Image.new(
        "RGB",
        (max(map(len, rows)) * (CELL + GAP) + GAP, len(rows) * (CELL + LABEL + GAP) + GAP),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for y, (row, labels) in enumerate(zip(rows, texts)):
        for x, (picture, label) in enumerate(zip(row, labels)):
            left, top = GAP + x * (CELL + GAP), GAP + y * (CELL + LABEL + GAP)
            scale = CELL / max(picture.size)
            shown = picture.resize(
                [max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC
            )
            sheet.paste(shown, (left + (CELL - shown.width) // 2, top + (CELL - shown.height) // 2))
            lines = [
                line if font.getlength(line) <= CELL else _shortened(line, font)
                for line in label.split("\n")
            ]
            draw.multiline_text((left, top + CELL + 1), "\n".join(lines), "black", font, spacing=1)
    return sheet


def _shortened(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    while font.getlength(line + "...") > CELL:
        line = line[:-1]
    return line + "..."
