"""Any picture file as upright 8-bit RGB, or an error that names it."""
import numpy as np
from PIL import Image, ImageOps

from rsb_ffcv import InputError


def to_rgb(picture: Image.Image) -> Image.Image:
    """Mode RGB, EXIF orientation applied. Greyscale is replicated; CMYK, YCbCr, LAB and palettes are converted; alpha is
    laid on white, as a browser's page would show it; 16-bit and float grey is scaled to 0 .. 255."""
    picture = ImageOps.exif_transpose(picture)
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


def load_rgb(picture, name: str) -> np.ndarray:
    """uint8 (H, W, 3). picture: a path or a PIL image. Raises InputError naming the picture where it cannot be read."""
    try:
        if isinstance(picture, Image.Image):
            return np.asarray(to_rgb(picture))
        with Image.open(picture) as opened:
            return np.asarray(to_rgb(opened))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: not a readable picture ({str(error).splitlines()[0]}); replace or remove it") from error
