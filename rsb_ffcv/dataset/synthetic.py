"""The demo set: ten classes of shapes in photo-like JPEGs, generated from a seed.

The classes differ only in the outline of the shape. Colour, size, position, rotation, background,
lighting, clutter, noise, blur, picture size and JPEG quality vary independently of the class. A
network therefore has to learn the shape, and augmentations such as crops and mixing behave as they
do on photographs.
"""

import math
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from rsb_ffcv.atomic import atomic_folder

CLASSES = [
    "arrow",
    "bars",
    "crescent",
    "cross",
    "disc",
    "flower",
    "ring",
    "square",
    "star",
    "triangle",
]
IMAGES_PER_CLASS = {"train": 320, "val": 50}


def make_demo_images(
    root: Path, images_per_class: Mapping[str, int] = IMAGES_PER_CLASS, seed: int = 0
) -> None:
    """Writes JPEGs of about 128 px to root/train/<class>/ and root/val/<class>/. A split that
    exists is skipped.

    A split gets its name when it is complete. The pictures are a function of `seed`, split, class
    and number.
    """
    for split_number, (split, count) in enumerate(images_per_class.items()):
        target = root / split
        if target.is_dir():
            continue
        with (
            atomic_folder(target, "choose another `data_dir`") as unfinished,
            ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        ):
            draw = partial(
                _draw_class, unfinished, count=count, seed=seed, split_number=split_number
            )
            for _ in tqdm(
                pool.map(draw, CLASSES),
                total=len(CLASSES),
                desc=f"demo pictures, {split}",
                unit="class",
            ):
                pass


def _draw_class(folder: Path, name: str, *, count: int, seed: int, split_number: int) -> None:
    (folder / name).mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng([seed, split_number, CLASSES.index(name), number])
        picture = draw_picture(name, rng)
        picture.save(folder / name / f"{name}_{number:04d}.jpg", quality=int(rng.integers(75, 96)))


def draw_picture(name: str, rng: np.random.Generator) -> Image.Image:
    """Draws one picture of class `name`: RGB, each side about 128 px."""
    width, height = (int(side) for side in rng.integers(112, 145, 2))
    canvas = _texture(rng, width, height, contrast=rng.uniform(10, 40))
    for _ in range(rng.integers(0, 4)):
        canvas.paste(_texture(rng, width, height, contrast=30), mask=_clutter(rng, width, height))

    side = min(width, height)
    radius = side * rng.uniform(0.28, 0.45)
    centre = [rng.uniform(0.9 * radius, length - 0.9 * radius) for length in (width, height)]
    mask = _shape_mask(
        name, width, height, centre=centre, radius=radius, angle=rng.uniform(-0.5, 0.5)
    )
    canvas.paste(_contrasting(rng, canvas, mask), mask=mask)

    if rng.random() < 0.5:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    pixels = np.asarray(canvas, np.float32)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    light = 1 + rng.uniform(0, 0.35) * ((x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle))
    pixels = pixels * light[..., None] + rng.uniform(2, 10) * rng.standard_normal(
        pixels.shape, np.float32
    )
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _texture(
    rng: np.random.Generator,
    width: int,
    height: int,
    *,
    contrast: float,
    base: np.ndarray | None = None,
) -> Image.Image:
    """Smooth colour noise at two scales around one colour (RGB 0 .. 255, drawn unless given)."""
    base = _colour(rng) if base is None else base
    total = np.empty((height, width, 3), np.float32)
    coarse = rng.normal(0, 0.7 * contrast, (4, 4, 3)), rng.normal(0, 0.3 * contrast, (12, 12, 3))
    for c in range(3):
        layers = [
            np.asarray(
                Image.fromarray(noise[..., c].astype(np.float32)).resize(
                    (width, height), Image.Resampling.BILINEAR
                )
            )
            for noise in coarse
        ]
        total[..., c] = base[c] + layers[0] + layers[1]
    return Image.fromarray(np.clip(total, 0, 255).astype(np.uint8))


def _colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(40, 215, 3)


def _contrasting(rng: np.random.Generator, canvas: Image.Image, mask: Image.Image) -> Image.Image:
    """A texture whose colour differs visibly from the background that the shape will cover."""
    under = np.asarray(canvas)[np.asarray(mask) > 0].mean(0)
    while abs((base := _colour(rng)).mean() - under.mean()) < 50:
        pass
    return _texture(rng, *canvas.size, contrast=rng.uniform(10, 40), base=base)


def _clutter(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A mask of a thin line or a small blot, always smaller than a shape."""
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    points = [(rng.uniform(0, width), rng.uniform(0, height)) for _ in range(2)]
    if rng.random() < 0.5:
        draw.line(points, fill=255, width=int(rng.integers(1, 4)))
    else:
        (x, y), r = points[0], rng.uniform(3, 9)
        draw.ellipse((x - r, y - r * rng.uniform(0.5, 1), x + r, y + r), fill=255)
    return mask


def _polar(radii: list[float]) -> list[tuple[float, float]]:
    """Corner points at equal angles with the given radii; the first one is at the top."""
    return [
        (r * math.sin(2 * math.pi * i / len(radii)), -r * math.cos(2 * math.pi * i / len(radii)))
        for i, r in enumerate(radii)
    ]


def _rectangle(
    *, left: float, top: float, right: float, bottom: float
) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


# Each class as polygons in the unit disc: those to fill, then those to cut out
_CIRCLE = _polar([1.0] * 72)
_OUTLINES = {
    "arrow": (
        [[(0, -1), (0.7, -0.1), (0.28, -0.1), (0.28, 1), (-0.28, 1), (-0.28, -0.1), (-0.7, -0.1)]],
        [],
    ),
    "bars": (
        [
            _rectangle(left=-0.85, top=y - 0.17, right=0.85, bottom=y + 0.17)
            for y in (-0.62, 0, 0.62)
        ],
        [],
    ),
    "crescent": ([_CIRCLE], [[(0.8 * x + 0.5, 0.8 * y) for x, y in _CIRCLE]]),
    "cross": (
        [
            _rectangle(left=-1, top=-0.27, right=1, bottom=0.27),
            _rectangle(left=-0.27, top=-1, right=0.27, bottom=1),
        ],
        [],
    ),
    "disc": ([_CIRCLE], []),
    "flower": ([_polar([0.68 + 0.32 * math.cos(2 * math.pi * i / 20) for i in range(120)])], []),
    "ring": ([_CIRCLE], [[(0.55 * x, 0.55 * y) for x, y in _CIRCLE]]),
    "square": ([_rectangle(left=-0.75, top=-0.75, right=0.75, bottom=0.75)], []),
    "star": ([_polar([1.0, 0.4] * 5)], []),
    "triangle": ([_polar([1.0] * 3)], []),
}


def _shape_mask(
    name: str, width: int, height: int, *, centre: list[float], radius: float, angle: float
) -> Image.Image:
    """Antialiased coverage of the rotated shape, mode L.

    name: the class
    width, height: size of the mask in pixels
    centre: (x, y) of the shape, pixels
    radius: pixels
    angle: radians
    """
    over = 3
    mask = Image.new("L", (width * over, height * over))
    draw = ImageDraw.Draw(mask)
    for polygons, value in zip(_OUTLINES[name], (255, 0)):
        for polygon in polygons:
            draw.polygon(
                [
                    (
                        (centre[0] + radius * (x * math.cos(angle) - y * math.sin(angle))) * over,
                        (centre[1] + radius * (x * math.sin(angle) + y * math.cos(angle))) * over,
                    )
                    for x, y in polygon
                ],
                fill=value,
            )
    return mask.resize((width, height), Image.Resampling.BOX)
