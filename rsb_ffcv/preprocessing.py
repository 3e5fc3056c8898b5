"""From a picture to the input of a model: RGB, upright, and the evaluation crop.

Exported folders contain a copy of this file. It needs Pillow and NumPy only:

    from preprocessing import preprocess
    pixels = preprocess(Image.open("picture.jpg"), side=224, crop_ratio=0.95)

The result has the pixels of timm's evaluation transforms, except for pictures that are rotated by
their EXIF data or have an alpha channel. The loader, with which the run measured its accuracy,
resizes and crops in one step: there, a few values in a thousand differ by one of 255 levels, of
small pictures up to 5 %, and single ones by two.
"""

import math
from typing import Any

import numpy as np
from PIL import Image

# Pillow reads other formats, too; for some of them it starts programs
FORMATS = ["JPEG", "PNG", "PPM", "BMP", "GIF", "TIFF", "WEBP"]

# EXIF orientation -> the operation that makes the stored pixels upright. Pillow's exif_transpose
# also rewrites the EXIF block, which fails for unusual but harmless blocks of cameras and editors.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


MAX_ASPECT = 100  # the longer side of a picture / the shorter one: the resized picture is in memory


def preprocess(
    picture: Image.Image, *, side: int, crop_ratio: float, interpolation: str = "bicubic"
) -> np.ndarray:
    """The evaluation crop of a picture: uint8 (side, side, 3), RGB.

    The shorter side is resized to floor(side / crop_ratio) pixels with Pillow's antialiased filter,
    and the central square is taken.

    picture: of any mode.
    side: of the crop, in pixels.
    crop_ratio: side of the crop divided by the shorter side of the resized picture, 0 .. 1.
    interpolation: "bilinear" or "bicubic".

    Raises ValueError if the picture is more than MAX_ASPECT times as long as wide.
    """
    shorter, target = min(picture.size), math.floor(side / crop_ratio)
    if max(picture.size) > MAX_ASPECT * shorter:
        raise ValueError(f"is more than {MAX_ASPECT} times as long as wide")
    picture = to_rgb(picture)
    # torchvision's: the longer side is truncated, and the margins are rounded half to even
    size = [target if own == shorter else target * own // shorter for own in picture.size]
    resized = picture.resize((size[0], size[1]), Image.Resampling[interpolation.upper()])
    left, top = (round((own - side) / 2) for own in size)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def to_rgb(picture: Image.Image) -> Image.Image:
    """Converts a picture to mode RGB with the EXIF orientation applied (Pillow applies TIFF's when
    it loads the file). Greyscale is replicated. CMYK, YCbCr, LAB and palettes are converted. Alpha
    is blended onto white, as on a web page. 16-bit and float grey are scaled to 0 .. 255."""
    picture.load()
    turn = UPRIGHT.get(_orientation(picture))
    if turn is not None:
        picture = picture.transpose(turn)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.float64)
        if picture.mode != "F":  # integers: the 16-bit range, not the range of this picture
            values = values / 257.0
        elif values.max(initial=0.0) <= 1.0:
            values = values * 255.0
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        page = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(page, picture).convert("RGB")
    return picture.convert("RGB")


def _orientation(picture: Image.Image) -> Any:
    try:
        return picture.getexif().get(0x0112)
    # Pillow raises any type of error for a damaged EXIF block, without which the picture is usable
    except Exception:
        return None
