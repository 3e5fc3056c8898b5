"""Converts a picture file to upright 8-bit RGB, or keeps the bytes of its JPEG. A picture for which
neither is possible is rejected with an error that names it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from rsb_ffcv import InputError, beton, check_choice, first_line
from rsb_ffcv.ops import native
from rsb_ffcv.preprocessing import FORMATS, UPRIGHT, to_rgb

MAX_SIDE = 65535  # largest width and height in a .beton's metadata


@contextmanager
def conversion() -> Iterator[None]:
    """A context with the settings of Pillow and OpenCV for converting pictures. They apply to the
    whole process, and are restored at the end."""
    saved = Image.MAX_IMAGE_PIXELS, cv2.getNumThreads()
    # load_rgb compares every picture with max_pixels before it decodes it
    Image.MAX_IMAGE_PIXELS = None
    cv2.setNumThreads(1)  # one thread per picture: the writer's threads work in parallel
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = saved[0]
        cv2.setNumThreads(saved[1])


class BadPicture(InputError):
    """One picture cannot be used. Others may be usable."""


class Stored(NamedTuple):
    """An image as it is stored in a file.

    data: uint8, the bytes of the image, followed by its entry points
    size: bytes of the image
    checksum: XXH64 of `data`
    mode: beton.JPG or beton.RAW
    height, width: pixels
    how: "kept", "encoded" or "raw"
    """

    data: np.ndarray
    size: int
    checksum: int
    mode: int
    height: int
    width: int
    how: str


class Frame(NamedTuple):
    """Values from a JPEG's headers.

    kind: marker of its SOF (0xC0 baseline, 0xC2 progressive)
    bits: bits per component
    height, width: pixels, before the orientation is applied
    components: number of color components
    orientation: EXIF orientation
    """

    kind: int
    bits: int
    height: int
    width: int
    components: int
    orientation: int


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How images are stored.

    mode: "jpg", "raw", "smart" (JPEG if the raw pixels exceed smart_threshold bytes) or
        "proportion" (JPEG with compress_probability, drawn from the image's position)
    max_resolution: upper limit of the longer side, in pixels. Larger images are shrunk with
        Pillow's antialiased bicubic filter; 0 keeps every size
    jpeg_quality: 1 .. 100; chroma is 4:2:0
    smart_threshold: bytes; see mode
    compress_probability: 0 .. 1; see mode
    pass_through: a JPEG that needs no change keeps its bytes: within max_resolution, 8-bit baseline
        or progressive, grey or RGB, upright, and decodable to its end without a warning
    max_pixels: pictures with more pixels are rejected before they are decoded

    Raises InputError for an unknown mode or a number out of its range.
    """

    mode: str = "jpg"
    max_resolution: int = 0
    jpeg_quality: int = 90
    smart_threshold: int = 3 * 256 * 256
    compress_probability: float = 0.5
    pass_through: bool = True
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("jpg", "raw", "smart", "proportion"))
        for name, value, low, high in (
            ("max_resolution", self.max_resolution, 0, MAX_SIDE),
            ("jpeg_quality", self.jpeg_quality, 1, 100),
            ("smart_threshold", self.smart_threshold, 0, math.inf),
            ("compress_probability", self.compress_probability, 0, 1),
            ("max_pixels", self.max_pixels, 1, 2**28),
        ):
            if not low <= value <= high:
                raise InputError(f"`{name}`={value}: must be {low} .. {high}")

    def store(self, index: int, picture: bytes | np.ndarray, name: str) -> Stored:
        """Converts a picture to its stored form.

        index: position in the source. picture: a picture file's bytes, or uint8 pixels (height,
        width, 3). name: the picture's name in messages. Raises BadPicture if the picture cannot be
        read or stored.
        """
        frame = jpeg_frame(picture) if isinstance(picture, bytes) else None
        if frame:
            self._sides(frame.height, frame.width, name)
        if frame and frame.kind in (0xC0, 0xC2) and frame.bits == 8 and frame.components in (1, 3):
            data = np.frombuffer(picture, np.uint8)
            height, width = self._sides(frame.height, frame.width, name)
            upright, same = frame.orientation not in UPRIGHT, (height, width) == frame[2:4]
            if (
                upright
                and same
                and self.pass_through
                and self._mode(index, height, width) == beton.JPG
                and data.nbytes <= beton.PAGE_BYTES
            ):
                entries = native.entry_points(data, height, width)
                # A kind of JPEG without entry points, or a damaged one: decode it to find out
                if not len(entries):
                    _decode(data, name, size=(height, width), to=(height, width))
                return stored(
                    data, entries, mode=beton.JPG, height=height, width=width, how="kept", name=name
                )
            pixels = _decode(data, name, size=(frame.height, frame.width), to=(height, width))
            if not upright:
                pixels = np.asarray(Image.fromarray(pixels).transpose(UPRIGHT[frame.orientation]))
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
        """The stored (height, width), rounded to the nearest pixel. FFCV truncates a float product
        instead, so many sizes are one pixel below the maximum. Raises BadPicture if the picture is
        too large."""
        _check_pixels(height, width, self.max_pixels, name=name)
        ratio = self.max_resolution / max(height, width)
        if 0 < ratio < 1:
            height, width = max(1, round(height * ratio)), max(1, round(width * ratio))
        if max(height, width) > MAX_SIDE:
            raise BadPicture(
                f"{name}: {width} x {height} pixels are more than a .beton can store (at most "
                f"{MAX_SIDE} per side); give `max_resolution`, or shrink or remove it"
            )
        return height, width

    def _mode(self, index: int, height: int, width: int) -> int:
        if self.mode == "smart":
            return beton.JPG if 3 * height * width > self.smart_threshold else beton.RAW
        if self.mode == "proportion":
            from rsb_ffcv.ops import draws  # compiles functions; only this mode needs it

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
    """Makes a Stored. If image and entry points together do not fit in a page, the entry points are
    left out. Raises BadPicture if the image alone does not fit.

    data: uint8, the bytes of the image
    entries: uint8, its entry points, or empty
    mode, height, width, how: as in Stored
    name: the picture's name in messages
    """
    if len(data) > beton.PAGE_BYTES:
        raise BadPicture(
            f"{name}: {len(data)} bytes do not fit in a page of {beton.PAGE_BYTES} bytes; lower "
            f"`max_resolution` or use `mode`=jpg"
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


def _check_pixels(height: int, width: int, max_pixels: int, *, name: str) -> None:
    if height * width > max_pixels:
        raise BadPicture(
            f"{name}: {width} x {height} pixels are more than `max_pixels`={max_pixels}; shrink or "
            f"remove it, or raise the limit"
        )


def out_of_memory(name: str) -> InputError:
    return InputError(
        f"{name}: not enough memory to decode it; lower `num_workers` or `max_pixels`, and run "
        f"the command again to continue"
    )


def jpeg_frame(data: bytes) -> Frame | None:
    """Reads the headers of a JPEG up to its first scan. Returns None if `data` is not a JPEG or has
    no frame before the scan."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    at, frame, orientation = 2, None, 1
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
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
            # A damaged EXIF block does not matter for the pixels. Pillow raises any type of error
            except Exception:
                pass
        at += 2 + length
    if frame is None or not frame[2] or not frame[3]:
        return None
    return Frame(*frame, orientation if isinstance(orientation, int) else 1)


def load_rgb(data: bytes, name: str, max_pixels: int = Encoding.max_pixels) -> np.ndarray:
    """Decodes a picture file's bytes to uint8 (H, W, 3). name: the picture's name in messages.
    Raises BadPicture if it cannot be read, InputError if there is not enough memory."""
    try:
        if data[:2] == b"\xff\xd8":
            native.check_jpeg(np.frombuffer(data, np.uint8))  # Pillow ignores libjpeg's warnings
        with Image.open(BytesIO(data), formats=FORMATS) as opened:
            if opened.format == "PNG":
                opened.verify()  # checks the checksums of the chunks; loading does not
        with Image.open(BytesIO(data), formats=FORMATS) as opened:
            _check_pixels(opened.height, opened.width, max_pixels, name=name)
            return np.asarray(to_rgb(opened))
    except InputError:
        raise
    except MemoryError as error:
        raise out_of_memory(name) from error
    # Pillow's decoders raise many types for damaged files; each means that this picture is bad
    except Exception as error:
        why = (
            "it is empty"
            if not data
            else "unknown format"
            if isinstance(error, UnidentifiedImageError)
            else first_line(error)
        )
        raise BadPicture(f"{name}: not a readable picture ({why}); replace or remove it") from error
