"""FFCV's image transforms as operations of this core.

Each has the parameters and the effect of the class of the same name in FFCV. The random numbers are
drawn from addresses, not from a generator of each thread. Flip, cutout, poison and normalization
give FFCV's bytes for the same draws; the brightness, contrast and saturation of this core are
Pillow's, which differ by one grey level, and its resize is Pillow's antialiased bilinear filter
instead of OpenCV's INTER_AREA.

Sources matched: libffcv/ffcv 1.0.2, `ffcv/transforms/*.py`, `ffcv/fields/rgb_image.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, int32, njit, types, uint8
from numba.core import cgutils
from numba.extending import intrinsic

from rsb_ffcv.ops import draws as d
from rsb_ffcv.ops import native as n
from rsb_ffcv.ops.crop import CROP, CropDecoder, RandomResizedCrop
from rsb_ffcv.ops.operation import Address, DrawnOperation

# The first op of their addresses. Operation p of a pipeline has number FIRST_OP + p, so that two
# flips differ. ops/draws.py uses the numbers below it.
FIRST_OP = 256


def _kernel(draw_type: types.Type) -> Any:
    """Compiles a kernel of the loader (see ops/operation.py), and caches it on disk."""
    pixels, integer = types.CPointer(uint8), types.int32
    return cfunc(
        int32(pixels, integer, integer, types.CPointer(draw_type), types.voidptr), cache=True
    )


@njit(cache=True, nogil=True)
def _uniforms(seed: int, epoch: int, slots: np.ndarray, op: int, count: int) -> np.ndarray:
    """Returns float64 (n, count): the first `count` draws of each slot."""
    out = np.empty((len(slots), count))
    for i in range(len(slots)):
        for k in range(count):
            out[i, k] = d.uniform(seed, epoch, slots[i], op, k)
    return out


@njit(cache=True, nogil=True)
def _integers(seed: int, epoch: int, slots: np.ndarray, op: int, below: np.ndarray) -> np.ndarray:
    """Returns int64 (n, m): the first m draws of each slot, draw k below below[k]."""
    out = np.empty((len(slots), len(below)), np.int64)
    for i in range(len(slots)):
        for k in range(len(below)):
            out[i, k] = d.below(seed, epoch, slots[i], op, k, below[k])
    return out


# ---------------------------------------------------------------- decoders


class WholeImage(CropDecoder):
    """SimpleRGBImageDecoder: the image as it is. height, width: of all images, in pixels."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__(height, width, "bilinear")

    def draw(self, address: Address, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        crops = np.zeros(len(heights), CROP)
        crops["box"][:, 2], crops["box"][:, 3] = heights, widths
        crops["filter"] = self.filter
        return crops


class CentralSquare(CropDecoder):
    """CenterCropRGBImageDecoder: the central square whose side is int(ratio x the shorter side),
    resized to `size`, height and width in pixels."""

    def __init__(self, size: tuple[int, int], ratio: float) -> None:
        super().__init__(*size, "bilinear")
        self.ratio = ratio

    def draw(self, address: Address, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        sides = np.stack([heights, widths], 1).astype(np.int64)
        side = (self.ratio * sides.min(1, keepdims=True)).astype(np.int64)
        crops = np.zeros(len(sides), CROP)
        crops["box"] = np.concatenate([(sides - side) // 2, side, side], 1)
        crops["filter"] = self.filter
        return crops


class RandomCrop(RandomResizedCrop):
    """RandomResizedCropRGBImageDecoder, and the flip that follows it.

    size: of the result, height and width in pixels.
    scale, ratio, flip_prob: see RandomResizedCrop.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scale: Sequence[float],
        *,
        ratio: Sequence[float],
        flip_prob: float = 0.0,
    ) -> None:
        super().__init__(
            size,
            (float(scale[0]), float(scale[1])),
            ratio=(float(ratio[0]), float(ratio[1])),
            flip_prob=flip_prob,
            interpolation="bilinear",
        )

    def flipped(self, flip_prob: float) -> "RandomCrop":
        """The same with this probability of a flip."""
        *numbers, _ = self.numbers
        return RandomCrop(self.shape[:2], numbers[:2], ratio=numbers[2:], flip_prob=flip_prob)


# ---------------------------------------------------------------- transforms


class _Numbered(DrawnOperation):
    """place: of the operation in its pipeline."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self._op = FIRST_OP + place

    def _uniforms(self, address: Address, count: int) -> np.ndarray:
        return _uniforms(address.seed, address.epoch, address.slots, self._op, count)

    def _integers(self, address: Address, below: Sequence[int]) -> np.ndarray:
        return _integers(
            address.seed, address.epoch, address.slots, self._op, np.array(below, np.int64)
        )


@_kernel(types.uint8)
def _flip(image, height, width, draw, scratch):  # type: ignore[no-untyped-def]
    if draw[0]:
        pixels = carray(image, (height, width, 3))
        for y in range(height):
            for x in range(width // 2):
                for c in range(3):
                    left = pixels[y, x, c]
                    pixels[y, x, c] = pixels[y, width - 1 - x, c]
                    pixels[y, width - 1 - x, c] = left
    return 0


class Flip(_Numbered):
    """RandomHorizontalFlip. Draws: uint8 (n,)."""

    def __init__(self, place: int, flip_prob: float) -> None:
        super().__init__(place)
        self.flip_prob = flip_prob

    def draw(self, address: Address, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        return (self._uniforms(address, 1)[:, 0] < self.flip_prob).astype(np.uint8)

    def generate_code(self) -> int:
        return _flip.address


@_kernel(types.int64)
def _cutout(image, height, width, draw, scratch):  # type: ignore[no-untyped-def]
    top, left, side = draw[0], draw[1], draw[2]
    if top < 0 or left < 0 or side < 0 or top + side > height or left + side > width:
        return 8
    pixels = carray(image, (height, width, 3))
    for y in range(top, top + side):
        for x in range(left, left + side):
            for c in range(3):
                pixels[y, x, c] = draw[3 + c]
    return 0


class Cutout(_Numbered):
    """Cutout: fills a square of crop_size pixels with the colour `fill`. Draws: int64 (n, 6): top,
    left, side, red, green, blue."""

    def __init__(self, place: int, crop_size: int, fill: Sequence[int]) -> None:
        super().__init__(place)
        self.crop_size, self.fill = int(crop_size), tuple(map(int, fill))

    def draw(self, address: Address, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        free = [int(side) - self.crop_size + 1 for side in (heights[0], widths[0])]
        draws = np.empty((len(heights), 6), np.int64)
        # An image that is too small for the square: the kernel refuses it.
        draws[:, :2] = self._integers(address, free) if min(free) > 0 else -1
        draws[:, 2], draws[:, 3:] = self.crop_size, self.fill
        return draws

    def generate_code(self) -> int:
        return _cutout.address


class Translate(_Numbered):
    """RandomTranslate: moves the image by up to `padding` pixels; the colour `fill` enters. Draws:
    (n,) records of `native.LAYER`."""

    def __init__(self, place: int, padding: int, fill: Sequence[int]) -> None:
        super().__init__(place)
        self.padding, self.fill = int(padding), tuple(map(int, fill))

    def draw(self, address: Address, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        down, right = (self._integers(address, [2 * self.padding + 1] * 2) - self.padding).T
        layers = np.zeros(len(heights), n.LAYER)
        layers["op"], layers["filter"], layers["fill"] = n.AFFINE, n.NEAREST, self.fill
        layers["argument"][:, [0, 4]] = 1  # the source of pixel (x, y) is (x + right, y + down)
        layers["argument"][:, 2], layers["argument"][:, 5] = right, down
        return layers

    def generate_code(self) -> int:
        return n.AUGMENT


class Enhance(_Numbered):
    """RandomBrightness, RandomContrast and RandomSaturation: with the probability `p`, blends with
    black, with the mean grey or with the grey image. Draws: (n,) records of `native.LAYER`.

    place: see _Numbered.
    op: native.BRIGHTNESS, CONTRAST or COLOR.
    magnitude: the factor is uniform in [max(0, 1 - magnitude), 1 + magnitude].
    p: 0 .. 1.
    """

    def __init__(self, place: int, op: int, *, magnitude: float, p: float) -> None:
        super().__init__(place)
        self.op, self.magnitude, self.p = op, magnitude, p

    def draw(self, address: Address, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        apply, share = self._uniforms(address, 2).T
        low, high = max(0.0, 1 - self.magnitude), 1 + self.magnitude
        layers = np.zeros(len(heights), n.LAYER)
        layers["op"] = np.where(apply < self.p, self.op, n.IDENTITY)
        layers["argument"][:, 0] = low + (high - low) * share
        return layers

    def generate_code(self) -> int:
        return n.AUGMENT


@intrinsic
def _pointer(context, address):  # type: ignore[no-untyped-def]
    """The void pointer for an integer."""
    del context

    def generate(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


def _normalize(word: types.Type) -> Any:
    """Compiles the kernel for values that have the size of `word`, an unsigned integer."""

    @_kernel(types.uint64)
    def kernel(image, height, width, draw, scratch):  # type: ignore[no-untyped-def]
        out = carray(_pointer(draw[0]), (height * width, 3), word)  # type: ignore
        table = carray(_pointer(draw[1]), (256, 3), word)
        for at in range(height * width):
            for c in range(3):
                out[at, c] = table[image[3 * at + c], c]
        return 0

    return kernel


# by the bytes of a value
NORMALIZE = {
    size: _normalize(word)
    for size, word in ((2, types.uint16), (4, types.uint32), (8, types.uint64))
}


class Normalize(DrawnOperation):
    """NormalizeImage on arrays: looks each value up in a table and writes the result to an array of
    its own, as the last operation. Draws: uint64 (n, 2), addresses of an image's row in that array
    and of the table.

    table: (256, 3), of 2, 4 or 8 bytes per value.
    memory: returns uint8 memory of a shape.
    """

    def __init__(self, table: np.ndarray, memory: Callable[[Sequence[int]], torch.Tensor]) -> None:
        super().__init__()
        self.table, self._memory = np.ascontiguousarray(table), memory
        self._results: dict[int, np.ndarray] = {}  # by the address of their first row

    def draw(self, address: Address, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        shape = len(heights), int(heights[0]), int(widths[0]), 3
        size = self.table.itemsize
        result = self._memory((*shape[:3], 3 * size)).numpy().view(self.table.dtype)
        first = result.ctypes.data
        self._results[first] = result
        draws = np.empty((len(heights), 2), np.uint64)
        draws[:, 0] = first + np.arange(len(heights), dtype=np.uint64) * np.uint64(result[0].nbytes)
        draws[:, 1] = self.table.ctypes.data
        return draws

    def generate_code(self) -> int:
        return NORMALIZE[self.table.itemsize].address

    def result(self, draws: np.ndarray) -> np.ndarray:
        """The array (n, height, width, 3) of the batch with these draws, once."""
        return self._results.pop(int(draws[0, 0]))
