"""Images of the tests of pixels."""

import io

import numpy as np
from PIL import Image


def photograph(rng, height, width):
    """Returns an image with gradients, edges, saturated patches and grain."""
    small = (
        rng.integers(-60, 316, (max(2, height // 24), max(2, width // 24), 3))
        .clip(0, 255)
        .astype(np.uint8)
    )
    picture = np.asarray(
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    ).astype(float)
    for _ in range(4):
        y, x = rng.integers(0, height), rng.integers(0, width)
        picture[y : y + height // 4, x : x + width // 5] = rng.integers(0, 2, 3) * 255
    return np.clip(picture + rng.normal(0, rng.uniform(0, 12), picture.shape), 0, 255).astype(
        np.uint8
    )


def jpeg(image, **options) -> tuple[bytes, np.ndarray]:
    """Returns the encoded bytes, and the pixels that Pillow decodes from them."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", **options)
    return buffer.getvalue(), np.asarray(Image.open(buffer).convert("RGB"))


KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "own tables": {"subsampling": 2, "optimize": True},
    "progressive": {"subsampling": 2, "progressive": True},
    "restarts": {"subsampling": 2, "restart_marker_blocks": 3},
    "quality 100": {"quality": 100, "subsampling": 0},
    "quality 5": {"quality": 5, "subsampling": 2},
}
