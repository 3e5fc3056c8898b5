"""The compiled core (`csrc/`): its data structures as numpy dtypes, its functions through ctypes.

`setup.py` builds it into one shared library beside this file. The library does not use Python's C
interface, and a call releases the interpreter lock. `csrc/rsb.h` documents the structures and
functions.
"""

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np

from rsb_ffcv import InputError

# rsb_sample and rsb_step of csrc/rsb.h, rsb_layer of csrc/shared/base.h, with the same layout
SAMPLE = np.dtype(
    [
        ("pointer", "<u8"),
        ("size", "<u8"),
        ("checksum", "<u8"),
        ("box", "<f8", 4),  # top, left, height, width
        ("height", "<i4"),
        ("width", "<i4"),
        ("file", "<i4"),  # descriptor
        ("entry_bytes", "<u4"),
        ("raw", "u1"),
        ("verify", "u1"),
        ("filter", "u1"),
        ("flip", "u1"),
        ("rows_first", "u1"),
    ],
    align=True,
)
LAYER = np.dtype(
    [("op", "<i4"), ("filter", "u1"), ("fill", "u1", 3), ("argument", "<f8", 6)], align=True
)
STEP = np.dtype([("kernel", "<u8"), ("draws", "<u8"), ("stride", "<i8")], align=True)

# rsb_slab of csrc/rsb.h
SLAB = np.dtype(
    [(name, "<u8") for name in ("memory", "capacity", "scratch", "used", "committed")], align=True
)
# rsb_packed_part, rsb_packed and rsb_launch of csrc/shared/packed.h
PACKED_PART = np.dtype(
    [
        ("first_block", "<u4"),
        ("block_columns", "<i4"),
        ("plane", "<u4"),
        ("left", "<i4"),
        ("top", "<i4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("h", "<i4"),
        ("v", "<i4"),
        ("dc", "<i4"),
        ("ac", "<i4"),
        ("quant", "<u2", 64),
    ],
    align=True,
)
PACKED = np.dtype(
    [
        ("box", "<f8", 4),  # top, left, height, width
        ("window", "<i4", 4),  # top, left, height, width
        ("height", "<i4"),
        ("width", "<i4"),
        ("kind", "<i4"),
        ("filter", "u1"),
        ("flip", "u1"),
        ("rows_first", "u1"),
        ("parts", "u1"),
        ("pixels", "<u4"),
        ("tables", "<u4"),
        ("entries", "<u4"),
        ("order", "<u4"),
        ("bases", "<u4"),
        ("mcu_column", "<i4"),
        ("mcu_columns", "<i4"),
        ("mcu_rows", "<i4"),
        ("first_column", "<i4"),
        ("segments_per_row", "<i4"),
        ("segments", "<i4"),
        ("blocks", "<u4"),
        ("h_max", "<i4"),
        ("v_max", "<i4"),
        ("scratch", "<u8"),
        ("scratch_bytes", "<u8"),
        ("second", "<u8"),
        ("taps", "<u8"),
        ("taps_down", "<u8"),
        ("part", PACKED_PART, 3),
    ],
    align=True,
)
LAUNCH = np.dtype(
    [
        ("slab", "<u8"),
        ("scratch", "<u8"),
        ("out", "<u8"),
        ("status", "<u8"),
        ("layers", "<u8"),
        ("layer_stride", "<i8"),
        ("starts", "<u8"),
        ("first", "<i4"),
        ("rows", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
    ],
    align=True,
)
PACKED_PIXELS, PACKED_RAW, PACKED_JPEG = 0, 1, 2  # kinds of a packed row
SLAB_PADDING = 2048  # readable bytes after a slab

# ops of `augment`, numbered as in csrc/rsb.h
(
    IDENTITY,
    AUTOCONTRAST,
    EQUALIZE,
    INVERT,
    POSTERIZE,
    SOLARIZE,
    SOLARIZE_ADD,
    COLOR,
    CONTRAST,
    BRIGHTNESS,
    SHARPNESS,
    BLUR,
    HUE,
    AFFINE,
) = range(14)
BILINEAR, BICUBIC, NEAREST = 0, 1, 2  # NEAREST: of AFFINE only

CSRC = Path(__file__).parent / "csrc"

# pixels, MCUs and bytes; as in csrc/jpeg.h and csrc/rsb.h
BLOCK_SIDE, ENTRY_INTERVAL, ENTRY_BYTES = 8, 8, 10

RUNNING = -2
STATUS = {  # the text follows the name of a sample
    1: "is not a decodable JPEG",
    2: "differs in height or width from the file's metadata",
    3: "is damaged: its bytes do not match their checksum",
    4: "cannot be read: the file ends too early, or reading it fails",
    5: "is neither greyscale nor RGB",
    6: "has more than 2 ** 28 pixels",
    7: "needs more memory than is available",
    8: "was given parameters that are out of range",
}
NO_MEMORY = 7
DAMAGE = {1, 2, 3, 4, 5, 6}  # those whose cause is the file


def reason(status: int) -> str:
    """The text for a status. A number that the core does not have comes from a user's operation."""
    return STATUS.get(int(status), f"was rejected by an operation, with status {status}")


class Job(ctypes.Structure):
    """One batch for the pool: rsb_job of csrc/rsb.h. Its pointers must stay valid until the pool
    has finished it."""

    _fields_ = [
        ("rows", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("num_steps", ctypes.c_int32),
        ("decoder", ctypes.c_void_p),
        ("samples", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
        ("slab", ctypes.c_void_p),
        ("times", ctypes.c_void_p),
        ("next", ctypes.c_int32),
        ("done", ctypes.c_int32),
        ("after", ctypes.c_void_p),
    ]


def _find() -> Path:
    folder = Path(__file__).parent
    for path in sorted(folder.glob("_native*.so")):
        return path
    raise InputError(
        f"{folder}: the compiled core is missing; build it with `make set-up` or `pip install .`"
    )


def bind(path: str | Path) -> ctypes.CDLL:
    """Loads the shared library at `path` and sets the argument types of its functions. Raises
    InputError if it cannot be loaded."""
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be loaded ({error}); install libturbojpeg, or rebuild it with `make`"
        ) from error
    pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for name, result, *arguments in (
        ("rsb_pool_new", pointer, integer),
        ("rsb_pool_stop", None, pointer),
        ("rsb_pool_free", None, pointer),
        ("rsb_pool_submit", None, pointer, pointer, integer),
        ("rsb_pool_progress", ctypes.c_uint64, pointer),
        ("rsb_pool_wait", integer, pointer, pointer, integer),
        ("rsb_pool_cancel", None, pointer, pointer),
        ("rsb_checksum", ctypes.c_uint64, pointer, size),
        ("rsb_jpeg_entries", size, pointer, size, pointer, size, pointer),
        ("rsb_jpeg_check", integer, pointer, size, pointer),
        ("rsb_scratch_new", pointer),
        ("rsb_scratch_free", None, pointer),
        ("rsb_load", integer, pointer, pointer, integer, integer, pointer),
        ("rsb_decode", integer, pointer, pointer, pointer, integer, integer, pointer),
        ("rsb_augment", integer, pointer, integer, integer, pointer, pointer),
        ("rsb_block_starts", None, pointer, integer, integer, integer, pointer),
        ("rsb_emulate", integer, integer, pointer, integer),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


library = bind(_find())
# Addresses of kernels. The first three are decoders.
DECODE, DECODE_MEMORY, KEEP, AUGMENT = (
    cast(int, ctypes.cast(function, ctypes.c_void_p).value)  # None would be address 0
    for function in (
        library.rsb_load,
        library.rsb_load_memory,
        library.rsb_keep,
        library.rsb_augment,
    )
)


class _Scratch:
    """The core's buffers. They grow as images need it, and are kept."""

    def __init__(self) -> None:
        self.pointer = library.rsb_scratch_new()

    def __del__(self) -> None:
        library.rsb_scratch_free(self.pointer)


class _ThreadLocal(threading.local):
    """The buffers of each thread that calls a function below."""

    def __init__(self) -> None:  # threading.local calls it in each thread
        self.scratch = _Scratch()
        # A scratch keeps the Huffman tables of its last image. A writer encodes an image between
        # decoding two others, with different tables: with a second scratch, both sets are kept.
        self.scratch_of_entries = _Scratch()


_thread = _ThreadLocal()


def checksum(data: np.ndarray) -> int:
    """XXH64 (seed 0) of a contiguous array's bytes."""
    return library.rsb_checksum(data.ctypes.data, data.nbytes)


def entry_points(jpeg: np.ndarray, height: int, width: int) -> np.ndarray:
    """The entry points of a JPEG (uint8 bytes; sides in pixels), as uint8 bytes (see
    csrc/jpeg_planes.c). With them, the decoder can reach a window without reading everything before
    it. Empty for a damaged JPEG, and for a kind that the core's own decoder does not handle."""
    rows = -(-height // BLOCK_SIDE)
    intervals = -(-width // (BLOCK_SIDE * ENTRY_INTERVAL))  # of 4:4:4, which has the most MCUs
    buffer = np.empty(ENTRY_BYTES * rows * intervals, np.uint8)
    used = library.rsb_jpeg_entries(
        jpeg.ctypes.data,
        jpeg.nbytes,
        buffer.ctypes.data,
        buffer.nbytes,
        _thread.scratch_of_entries.pointer,
    )
    return buffer[:used].copy()


def load(file: int, sample: np.ndarray | np.void, size: tuple[int, int]) -> np.ndarray:
    """Returns the image of one SAMPLE record of an open file, uint8 (*size, 3). The loader's
    threads do the same for each row of a batch. Raises ValueError with the reason if it cannot be
    read.

    size: height and width.
    """
    image, sample = np.empty((*size, 3), np.uint8), np.array(sample, SAMPLE)
    sample["file"] = file
    _run(library.rsb_load, sample.ctypes.data, image.ctypes.data, *size)
    return image


def check_jpeg(data: np.ndarray) -> None:
    """Raises ValueError with the reason unless a JPEG of any colours (uint8 bytes) decodes to its
    end without a warning."""
    _run(library.rsb_jpeg_check, data.ctypes.data, data.nbytes)


def resized(data: np.ndarray, size: tuple[int, int], to: tuple[int, int]) -> np.ndarray:
    """Returns a complete image, enlarged or reduced to uint8 (*to, 3) with Pillow's antialiased
    bicubic filter. Raises ValueError with the reason if it cannot be decoded.

    data: a JPEG (uint8 bytes), or pixels (*size, 3).
    size: height and width of the image.
    to: height and width of the result.
    """
    sample = np.zeros(1, SAMPLE)
    sample["box"], sample["filter"] = (0, 0, *size), BICUBIC
    return cropped(data, size, sample, to=to)


def cropped(
    data: np.ndarray, size: tuple[int, int], sample: np.ndarray, *, to: tuple[int, int]
) -> np.ndarray:
    """Returns a part of an image, resized to uint8 (*to, 3). Arguments and errors as in `resized`.

    sample: a SAMPLE record (1,), whose box, filter, flip and rows_first are used.
    """
    sample, data = sample.copy(), np.ascontiguousarray(data)
    sample["size"], sample["raw"] = data.nbytes, data.ndim == 3
    sample["height"], sample["width"] = size
    image = np.empty((*to, 3), np.uint8)
    _run(library.rsb_decode, data.ctypes.data, sample.ctypes.data, image.ctypes.data, *to)
    return image


def augment(image: np.ndarray, layer: np.ndarray | np.void) -> np.ndarray:
    """A copy of one (H, W, 3) uint8 image, changed by one LAYER record. The loader's threads do the
    same in place."""
    image, layer = np.array(image, np.uint8, order="C"), np.array(layer, LAYER)
    _run(library.rsb_augment, image.ctypes.data, *image.shape[:2], layer.ctypes.data)
    return image


def _run(function: Callable[..., int], *arguments: object) -> None:
    status = function(*arguments, _thread.scratch.pointer)
    if status == NO_MEMORY:
        raise MemoryError(reason(status))
    if status:
        raise ValueError(reason(status))
