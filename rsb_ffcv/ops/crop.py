"""Decode, crop, resize and flip: from a stored image to a uint8 H x W x 3 image.

The pixels are those of Pillow's `resize(box=..., reducing_gap=None)` of the fully decoded image,
within one grey level except for single values (`csrc/jpeg.h`, `csrc/resample.c`). This module
computes the boxes: which part of the image, with which filter, mirrored or not.
"""

import math

import numpy as np
from numba import int64, njit

from rsb_ffcv import InputError
from rsb_ffcv.ops import draws as d
from rsb_ffcv.ops.native import BICUBIC, BILINEAR, DECODE, SAMPLE, cropped
from rsb_ffcv.ops.operation import Address, Decoder

# box: top, left, height, width in pixels
CROP = np.dtype([("box", "<f8", 4), ("filter", "u1"), ("flip", "u1"), ("rows_first", "u1")])
FILTERS = {"bilinear": BILINEAR, "bicubic": BICUBIC, "random": -1}


def filter_number(interpolation: str) -> int:
    """Returns the number of the filter in the compiled core; -1: one of the two is drawn for each
    use. Raises InputError for a name that is not in FILTERS."""
    if interpolation not in FILTERS:
        raise InputError(
            f"`interpolation`={interpolation!r}: not valid; use one of {', '.join(FILTERS)}"
        )
    return FILTERS[interpolation]


def rows_first(
    heights: np.ndarray | int,
    widths: np.ndarray | int,
    *,
    out_heights: np.ndarray | int,
    out_widths: np.ndarray | int,
) -> np.ndarray:
    """Whether Pillow resizes vertically before horizontally. Pillow 13 and later do if the height
    shrinks by more than twice as many pixels as the width; earlier versions never do. The order
    decides how overshoots of the bicubic filter are clipped."""
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    return (heights > out_heights) & (2 * (widths - out_widths) < heights - out_heights)


@njit(cache=True, nogil=True)
def random_resized_crop_box(
    seed: int,
    epoch: int,
    slot: int,
    height: int,
    width: int,
    scale_lo: float,
    scale_hi: float,
    ratio_lo: float,
    ratio_hi: float,
) -> tuple[int, int, int, int]:
    """Returns (top, left, height, width) in pixels, drawn as in torchvision's
    RandomResizedCrop.get_params. If 10 tries do not fit, it is the largest central crop with an
    aspect in range.

    seed, epoch, slot: the address.
    height, width: of the image, in pixels.
    scale_lo, scale_hi: the area is uniform between these shares of the image's area.
    ratio_lo, ratio_hi: the aspect (width / height) is log-uniform between these.
    """
    area = height * width
    log_lo, log_hi = math.log(ratio_lo), math.log(ratio_hi)
    for attempt in range(10):
        k = 4 * attempt  # one Philox block per attempt
        target = area * (scale_lo + (scale_hi - scale_lo) * d.uniform(seed, epoch, slot, d.CROP, k))
        aspect = math.exp(log_lo + (log_hi - log_lo) * d.uniform(seed, epoch, slot, d.CROP, k + 1))
        w = int(round(math.sqrt(target * aspect)))
        h = int(round(math.sqrt(target / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return (
                d.below(seed, epoch, slot, d.CROP, k + 2, height - h + 1),
                d.below(seed, epoch, slot, d.CROP, k + 3, width - w + 1),
                h,
                w,
            )
    h, w = height, width
    if width / height < ratio_lo:
        h = min(height, int(round(width / ratio_lo)))
    elif width / height > ratio_hi:
        w = min(width, int(round(height * ratio_hi)))
    return (height - h) // 2, (width - w) // 2, h, w


@njit(cache=True, nogil=True)
def _random_boxes(
    seed: int,
    epoch: int,
    slots: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    scale_lo: float,
    scale_hi: float,
    ratio_lo: float,
    ratio_hi: float,
    flip_prob: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws the crops of a batch. Returns the boxes, float64 (n, 4): top, left, height, width; the
    filters, uint8 (n,), of "random"; and whether each is mirrored, uint8 (n,).

    seed: of the address.
    epoch: of the address.
    slots: int64 (n,), of the images.
    heights: (n,), of the images, in pixels.
    widths: (n,), of the images, in pixels.
    scale_lo: see random_resized_crop_box.
    scale_hi: see random_resized_crop_box.
    ratio_lo: see random_resized_crop_box.
    ratio_hi: see random_resized_crop_box.
    flip_prob: probability that a crop is mirrored.
    """
    boxes = np.empty((len(slots), 4))
    flips = np.empty(len(slots), np.uint8)
    filters = np.empty(len(slots), np.uint8)
    for i in range(len(slots)):
        boxes[i] = random_resized_crop_box(
            seed,
            epoch,
            slots[i],
            int64(heights[i]),
            int64(widths[i]),
            scale_lo,
            scale_hi,
            ratio_lo,
            ratio_hi,
        )
        flips[i] = d.uniform(seed, epoch, slots[i], d.FLIP, 0) < flip_prob
        filters[i] = d.below(seed, epoch, slots[i], d.CROP, 40, 2)
    return boxes, filters, flips


class CropDecoder(Decoder):
    """Decodes and resizes one box of each image. Draws: (n,) records of `CROP`.

    height, width: of the result, in pixels.
    interpolation: see `filter_number`.
    """

    def __init__(self, height: int, width: int, interpolation: str) -> None:
        super().__init__()
        self.filter, self.shape = filter_number(interpolation), (height, width, 3)

    def generate_code(self) -> int:
        return DECODE


class RandomResizedCrop(CropDecoder):
    """torchvision's RandomResizedCrop and a horizontal flip.

    size: of the result, in pixels: of each side, or height and width.
    scale: range of the area, as fractions of the image's area.
    ratio: range of the aspect.
    flip_prob: probability that the crop is mirrored.
    interpolation: "bilinear", "bicubic", or "random", which chooses one of the two for each image,
        as timm does.

    Raises InputError if a setting is out of range.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        *,
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_prob: float = 0.5,
        interpolation: str = "random",
    ) -> None:
        height, width = size if isinstance(size, tuple) else (size, size)
        super().__init__(height, width, interpolation)
        if not (0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1] and 0 <= flip_prob <= 1):
            raise InputError(
                f"`scale`={scale} must be two fractions of the area, the smaller first; "
                f"`ratio`={ratio} must be two positive numbers, the smaller first; and "
                f"`flip_prob`={flip_prob} must be 0 to 1; correct them"
            )
        self.numbers = tuple(map(float, (*scale, *ratio, flip_prob)))

    def draw(self, address: Address, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        crops = np.empty(len(heights), CROP)
        crops["box"], crops["filter"], crops["flip"] = _random_boxes(
            address.seed, address.epoch, address.slots, heights, widths, *self.numbers
        )
        crops["rows_first"] = rows_first(
            heights, widths, out_heights=self.shape[0], out_widths=self.shape[1]
        )
        if self.filter >= 0:
            crops["filter"] = self.filter
        return crops


class CenterCrop(CropDecoder):
    """timm's evaluation crop: the shorter side is resized to floor(resolution / ratio), and the
    central square is taken. Both are done in one step, as one box of the stored image. No draws.

    resolution: pixels per side of the result.
    ratio: 0 .. 1.
    interpolation: "bilinear" or "bicubic".

    Raises InputError for another interpolation.
    """

    def __init__(self, resolution: int, ratio: float, interpolation: str = "bicubic") -> None:
        super().__init__(resolution, resolution, interpolation)
        if self.filter < 0:
            raise InputError(
                "`interpolation`='random': is not supported in evaluation; use bilinear or bicubic"
            )
        self.resolution, self.ratio = resolution, ratio

    def draw(self, address: Address, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        sides = np.stack([heights, widths], 1).astype(np.int64)
        shorter, target = sides.min(1, keepdims=True), math.floor(self.resolution / self.ratio)
        scaled = np.where(sides == shorter, target, (target * sides / shorter).astype(np.int64))
        # rounds half to even, like Python's round in torchvision's center_crop
        first = np.round((scaled - self.resolution) / 2)
        crops = np.zeros(len(sides), CROP)
        crops["box"] = np.concatenate([first * sides / scaled, self.resolution * sides / scaled], 1)
        crops["filter"], crops["rows_first"] = (
            self.filter,
            rows_first(heights, widths, out_heights=scaled[:, 0], out_widths=scaled[:, 1]),
        )
        return crops

    def apply(self, image: np.ndarray) -> np.ndarray:
        """The crop of a decoded image: uint8 (height, width, 3) -> (resolution, resolution, 3)."""
        height, width, _ = image.shape
        sample = np.zeros(1, SAMPLE)
        sample["height"], sample["width"] = height, width
        self.draw_into(sample, Address(0, 0, np.zeros(1, np.int64)))
        return cropped(image, (height, width), sample, to=self.shape[:2])
