"""Any picture file as upright 8-bit RGB, or an error that names it."""
import numpy as np
from PIL import Image

from rsb_ffcv import InputError, first_line

# EXIF orientation -> how to turn the stored pixels upright. Pillow's own exif_transpose also writes the EXIF block anew,
# which fails for odd but harmless blocks that cameras and editors leave.
_UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90}


def to_rgb(picture: Image.Image) -> Image.Image:
    """Mode RGB, EXIF orientation applied. Greyscale is replicated; CMYK, YCbCr, LAB and palettes are converted; alpha is
    laid on white, as a browser's page would show it; 16-bit and float grey is scaled to 0 .. 255."""
    turn = _UPRIGHT.get(_orientation(picture))
    if turn is not None:
        picture = picture.transpose(turn)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.float64)
        if picture.mode != "F":  # integers: 16-bit range, whatever the picture's own extremes
            values = values / 257.0
        elif values.max(initial=0.0) <= 1.0:
            values = values * 255.0
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        page = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(page, picture).convert("RGB")
    return picture.convert("RGB")


def _orientation(picture: Image.Image):
    try:
        return picture.getexif().get(0x0112)
    except Exception:  # a damaged EXIF block says nothing of the pixels: Pillow raises whatever its parser trips over
        return None


def load_rgb(picture, name: str) -> np.ndarray:
    """uint8 (H, W, 3). picture: a path or a PIL image. Raises InputError naming the picture where it cannot be read."""
    try:
        if isinstance(picture, Image.Image):
            return np.asarray(to_rgb(picture))
        with Image.open(picture) as opened:
            return np.asarray(to_rgb(opened))
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files: each means this picture
        raise InputError(f"{name}: not a readable picture ({first_line(error)}); replace or remove it") from error
