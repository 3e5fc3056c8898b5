"""Any picture file as upright 8-bit RGB, or as the JPEG that it is; what neither can be made of is
refused by name."""

from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from rsb_ffcv import InputError, beton, first_line
from rsb_ffcv.ops import native

MAX_SIDE = 65535  # what a .beton's metadata can say
FORMATS = [
    "JPEG",
    "PNG",
    "PPM",
    "BMP",
    "GIF",
    "TIFF",
    "WEBP",
]  # Pillow knows others, some of which start programs

# load_rgb holds every picture against a limit of its own before it decodes it
Image.MAX_IMAGE_PIXELS = None
cv2.setNumThreads(1)  # one thread a picture: the writer's threads are the parallelism

# EXIF orientation -> how to turn the stored pixels upright. Pillow's own exif_transpose also writes
# the EXIF block anew, which fails for odd but harmless blocks that cameras and editors leave.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadPicture(InputError):
    """One picture cannot be used; the others may."""


class Stored(NamedTuple):
    """An image as it stands in a file. data: uint8, its bytes and then its entry points; size: of
    the former; checksum: XXH64 of both. how: "kept", "encoded" or "raw"."""

    data: np.ndarray
    size: int
    checksum: int
    mode: int
    height: int
    width: int
    how: str


class Frame(NamedTuple):
    """What a JPEG's headers say. kind: marker of its SOF (0xC0 baseline, 0xC2 progressive)."""

    kind: int
    bits: int
    height: int
    width: int
    components: int
    orientation: int


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How images are stored. mode: "jpg", "raw", "smart" (JPEG where raw pixels exceed
    smart_threshold bytes) or "proportion" (JPEG with compress_probability, drawn from the image's
    position). max_resolution: the longer side is shrunk to it, in pixels, by Pillow's antialiased
    bicubic filter; 0 keeps every size. jpeg_quality: 1 .. 100, chroma 4:2:0. pass_through: a JPEG
    that needs no change keeps its bytes: within max_resolution, 8-bit baseline or progressive, grey
    or RGB, upright, and decodable to its end without a warning. max_pixels: a picture with more is
    refused before it is decoded."""

    mode: str = "jpg"
    max_resolution: int = 0
    jpeg_quality: int = 90
    smart_threshold: int = 3 * 256 * 256
    compress_probability: float = 0.5
    pass_through: bool = True
    max_pixels: int = 100_000_000

    def store(self, index: int, picture: bytes | np.ndarray, name: str) -> Stored:
        """A picture file's bytes, or uint8 pixels (height, width, 3), as they go into the file.
        index: position in the source. Raises BadPicture naming the picture where it cannot be read
        or stored."""
        frame = jpeg_frame(picture) if isinstance(picture, bytes) else None
        if frame:
            self._sides(frame.height, frame.width, name)
        if frame and frame.kind in (0xC0, 0xC2) and frame.bits == 8 and frame.components in (1, 3):
            data = np.frombuffer(picture, np.uint8)
            height, width = self._sides(frame.height, frame.width, name)
            upright, same = frame.orientation not in _UPRIGHT, (height, width) == frame[2:4]
            if (
                upright
                and same
                and self.pass_through
                and self._mode(index, height, width) == beton.JPG
                and data.nbytes <= beton.PAGE_BYTES
            ):
                entries = native.entry_points(data, height, width)
                if not len(
                    entries
                ):  # of a kind without entry points, or damaged: decoding it tells
                    _decode(data, name, size=(height, width), to=(height, width))
                return stored(
                    data, entries, mode=beton.JPG, height=height, width=width, how="kept", name=name
                )
            pixels = _decode(data, name, size=(frame.height, frame.width), to=(height, width))
            if not upright:
                pixels = np.asarray(Image.fromarray(pixels).transpose(_UPRIGHT[frame.orientation]))
        else:
            pixels = (
                load_rgb(picture, name, self.max_pixels) if isinstance(picture, bytes) else picture
            )
            rows, columns = pixels.shape[:2]
            height, width = self._sides(rows, columns, name)
            if (rows, columns) != (height, width):
                pixels = native.resized(pixels, (rows, columns), (height, width))
        height, width = pixels.shape[:2]
        if self._mode(index, height, width) == beton.RAW:
            data = np.ascontiguousarray(pixels).reshape(-1)
            return stored(
                data, data[:0], mode=beton.RAW, height=height, width=width, how="raw", name=name
            )
        done, data = cv2.imencode(
            ".jpg",
            cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR),
            [
                cv2.IMWRITE_JPEG_QUALITY,
                self.jpeg_quality,
                cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
                cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
            ],
        )
        if not done:
            raise BadPicture(
                f"{name}: {width} x {height} pixels cannot be stored as JPEG; replace or remove it"
            )
        data = data.reshape(-1)
        return stored(
            data,
            native.entry_points(data, height, width),
            mode=beton.JPG,
            height=height,
            width=width,
            how="encoded",
            name=name,
        )

    def _sides(self, height: int, width: int, name: str) -> tuple[int, int]:
        """The stored sides: rounded to the nearest pixel. FFCV truncates a float product there and
        misses the stated maximum by one for many sizes."""
        if height * width > self.max_pixels:
            raise BadPicture(
                f"{name}: {width} x {height} pixels are more than "
                f"`max_pixels`={self.max_pixels}; shrink or "
                f"remove it, or raise the limit"
            )
        ratio = self.max_resolution / max(height, width)
        if 0 < ratio < 1:
            height, width = max(1, round(height * ratio)), max(1, round(width * ratio))
        if max(height, width) > MAX_SIDE:
            raise BadPicture(
                f"{name}: {width} x {height} pixels are more than a .beton holds ({MAX_SIDE} a "
                f"side); give "
                f"`max_resolution`, or shrink or remove it"
            )
        return height, width

    def _mode(self, index: int, height: int, width: int) -> int:
        if self.mode == "smart":
            return beton.JPG if 3 * height * width > self.smart_threshold else beton.RAW
        if self.mode == "proportion":
            from rsb_ffcv.ops import draws  # compiles, and nothing else here needs it

            return (
                beton.JPG
                if draws.uniform(0, 0, index, draws.STORE, 0) < self.compress_probability
                else beton.RAW
            )
        return beton.JPG if self.mode == "jpg" else beton.RAW


def stored(
    data: np.ndarray,
    entries: np.ndarray,
    *,
    mode: int,
    height: int,
    width: int,
    how: str,
    name: str,
) -> Stored:
    """Without its entry points where both do not fit a page. Raises BadPicture where the image
    itself does not."""
    if len(data) > beton.PAGE_BYTES:
        raise BadPicture(
            f"{name}: {len(data)} bytes do not fit a page of {beton.PAGE_BYTES}; lower "
            f"`max_resolution` or use "
            f"`mode`=jpg"
        )
    if len(data) + len(entries) > beton.PAGE_BYTES:
        entries = entries[:0]
    both = np.concatenate([data, entries])
    return Stored(both, len(data), native.checksum(both), mode, height, width, how)


def _decode(
    data: np.ndarray, name: str, *, size: tuple[int, int], to: tuple[int, int]
) -> np.ndarray:
    try:
        return native.resized(data, size, to)
    except MemoryError as error:
        raise out_of_memory(name) from error
    except ValueError as error:
        raise BadPicture(
            f"{name}: not a readable picture (a JPEG that {first_line(error)}); replace or remove "
            f"it"
        ) from error


def out_of_memory(name: str) -> InputError:
    return InputError(
        f"{name}: there is not enough memory for it; lower `num_workers` or `max_pixels`, and "
        f"give the same command "
        f"again: it goes on from there"
    )


def jpeg_frame(data: bytes) -> Frame | None:
    """The headers of a JPEG up to its first scan; None where it is none, or has no frame there."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    at, frame, orientation = 2, None, 1
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        if marker in (0xDA, 0xD9):
            break
        length = int.from_bytes(data[at + 2 : at + 4])
        body = data[at + 4 : at + 2 + length]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if len(body) < 6:
                return None
            frame = marker, body[0], int.from_bytes(body[1:3]), int.from_bytes(body[3:5]), body[5]
        elif marker == 0xE1 and body[:6] == b"Exif\0\0":
            exif = Image.Exif()
            try:
                exif.load(body)
                orientation = exif.get(0x0112, 1)
            # a damaged EXIF block says nothing of the pixels: Pillow raises whatever its parser
            # trips over
            except Exception:
                pass
        at += 2 + length
    if frame is None or not frame[2] or not frame[3]:
        return None
    return Frame(*frame, orientation if isinstance(orientation, int) else 1)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Mode RGB, EXIF orientation applied (TIFF's, by Pillow as it loads). Greyscale is replicated;
    CMYK, YCbCr, LAB and palettes are converted; alpha is laid on white, as a browser's page would
    show it; 16-bit and float grey is scaled to 0 .. 255."""
    picture.load()
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


def _orientation(picture: Image.Image) -> Any:
    try:
        return picture.getexif().get(0x0112)
    except Exception:  # as above
        return None


def load_rgb(data: bytes, name: str, max_pixels: int = Encoding.max_pixels) -> np.ndarray:
    """uint8 (H, W, 3) of a picture file's bytes. Raises BadPicture naming the picture where it
    cannot be read."""
    try:
        if data[:2] == b"\xff\xd8":
            native.check_jpeg(
                np.frombuffer(data, np.uint8)
            )  # Pillow passes over libjpeg's warnings
        with Image.open(BytesIO(data), formats=FORMATS) as opened:
            if opened.format == "PNG":
                opened.verify()  # the chunks' checksums, which loading passes over
        with Image.open(BytesIO(data), formats=FORMATS) as opened:
            if opened.width * opened.height > max_pixels:
                raise BadPicture(
                    f"{name}: {opened.width} x {opened.height} pixels are more than "
                    f"`max_pixels`={max_pixels}; "
                    f"shrink or remove it, or raise the limit"
                )
            return np.asarray(to_rgb(opened))
    except InputError:
        raise
    except MemoryError as error:
        raise out_of_memory(name) from error
    except (
        Exception
    ) as error:  # Pillow's decoders raise many kinds for damaged files: each means this picture
        why = (
            "it is empty"
            if not data
            else "of no kind that is read here"
            if isinstance(error, UnidentifiedImageError)
            else first_line(error)
        )
        raise BadPicture(f"{name}: not a readable picture ({why}); replace or remove it") from error
