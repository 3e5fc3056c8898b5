"""Decode, crop, resize and flip: from a stored image to an H x W x 3 uint8 one.

Decoding and resizing are libffcv's (libjpeg-turbo with its fast DCT; OpenCV INTER_AREA). Unlike FFCV's own decoders
these take their crops from addressed draws, report the decoder's status for each sample, and keep one scratch image a
thread instead of one a sample.
"""
import math
from dataclasses import replace

import numpy as np
from ffcv.pipeline.allocation_query import AllocationQuery
from numba import int64, njit

from rsb_ffcv.ops import draws as d
from rsb_ffcv.ops.native import imdecode, resize
from rsb_ffcv.ops.operation import Address, DrawnOperation

JPG = 0  # the storage mode of a .beton sample; any other one that a checked file holds is raw


@njit(cache=True, nogil=True)
def random_resized_crop_box(seed, epoch, slot, height, width, scale_lo, scale_hi, ratio_lo, ratio_hi):
    """(top, left, height, width) in pixels, as torchvision's RandomResizedCrop.get_params draws it.

    Area is uniform in [scale_lo, scale_hi] of the image's, aspect (width / height) log-uniform in [ratio_lo,
    ratio_hi]; after 10 tries that do not fit, the largest central crop whose aspect is in range.
    """
    area = height * width
    log_lo, log_hi = math.log(ratio_lo), math.log(ratio_hi)
    for attempt in range(10):
        k = 4 * attempt  # one Philox block an attempt
        target = area * (scale_lo + (scale_hi - scale_lo) * d.uniform(seed, epoch, slot, d.CROP, k))
        aspect = math.exp(log_lo + (log_hi - log_lo) * d.uniform(seed, epoch, slot, d.CROP, k + 1))
        w = int(round(math.sqrt(target * aspect)))
        h = int(round(math.sqrt(target / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return (d.below(seed, epoch, slot, d.CROP, k + 2, height - h + 1),
                    d.below(seed, epoch, slot, d.CROP, k + 3, width - w + 1), h, w)
    h, w = height, width
    if width / height < ratio_lo:
        h = min(height, int(round(width / ratio_lo)))
    elif width / height > ratio_hi:
        w = min(width, int(round(height * ratio_hi)))
    return (height - h) // 2, (width - w) // 2, h, w


@njit(cache=True, nogil=True)
def _random_boxes(seed, epoch, slots, heights, widths, scale_lo, scale_hi, ratio_lo, ratio_hi, flip_prob):
    boxes = np.empty((len(slots), 4), np.int64)
    flips = np.empty(len(slots), np.bool_)
    for i in range(len(slots)):
        boxes[i] = random_resized_crop_box(seed, epoch, slots[i], int64(heights[i]), int64(widths[i]),
                                           scale_lo, scale_hi, ratio_lo, ratio_hi)
        flips[i] = d.uniform(seed, epoch, slots[i], d.FLIP, 0) < flip_prob
    return boxes, flips


@njit(cache=True, nogil=True)
def flip_rows(image):
    """Mirrors an (H, W, C) image left to right, in place."""
    height, width, channels = image.shape
    for y in range(height):
        for x in range(width // 2):
            for c in range(channels):
                image[y, x, c], image[y, width - 1 - x, c] = image[y, width - 1 - x, c], image[y, x, c]


@njit(cache=True, nogil=True)
def _decode_crop_resize(data, indices, pointers, sizes, modes, heights, widths, boxes, flips, out, lo, hi):
    """Rows lo .. hi of the batch, from the file's bytes into `out` (n, H, W, 3). Returns -1, or the first row of
    the batch whose JPEG the decoder refuses."""
    most = 1
    for row in range(lo, hi):
        i = indices[row]
        if modes[i] == JPG:
            most = max(most, int64(heights[i]) * int64(widths[i]) * 3)
    scratch = np.empty(most, np.uint8)
    for row in range(lo, hi):
        i = indices[row]
        height, width, start = int64(heights[i]), int64(widths[i]), int64(pointers[i])
        source = data.ctypes.data + start
        if modes[i] == JPG:
            jpeg = data[start:start + int64(sizes[i])]
            if imdecode(jpeg.ctypes, sizes[i], height, width, scratch.ctypes, height, width, 0, 0, 1, 1, 0, 0) != 0:
                return row
            source = scratch.ctypes.data
        top, left, h, w = boxes[row]
        target = out[row]
        resize(0, source, height, width, top, top + h, left, left + w,
               target.ctypes.data, target.shape[0], target.shape[1])
        if flips[row]:
            flip_rows(target)
    return -1


class _CropDecoder(DrawnOperation):
    """Decodes a batch and resizes one box of each image. `draw` gives (boxes (n, 4) int64, flips (n,) bool)."""

    def __init__(self, resolution: int):
        super().__init__()
        self.resolution = resolution

    def declare_state_and_memory(self, previous_state):
        shape = (self.resolution, self.resolution, 3)
        return (replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("u1")),
                AllocationQuery(shape, np.dtype("u1")))

    def generate_code(self):
        def decode(indices, out, beton, data, lo, hi, draws):
            boxes, flips = draws
            return _decode_crop_resize(data, indices, beton.pointers, beton.sizes, beton.modes, beton.heights,
                                       beton.widths, boxes, flips, out, lo, hi)
        return decode


class RandomResizedCrop(_CropDecoder):
    """A random crop of `scale` of the area and `ratio` aspect, resized to resolution x resolution and mirrored with
    probability `flip_prob` (torchvision's RandomResizedCrop, then RandomHorizontalFlip)."""

    def __init__(self, resolution: int, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip_prob: float = 0.5):
        super().__init__(resolution)
        self.scale, self.ratio, self.flip_prob = scale, ratio, flip_prob

    def draw(self, address: Address, heights, widths):
        return _random_boxes(address.seed, address.epoch, address.slots, heights, widths,
                             *map(float, (*self.scale, *self.ratio, self.flip_prob)))


class CenterCrop(_CropDecoder):
    """The central square of side int(ratio x shorter side), resized to resolution x resolution, as FFCV's
    CenterCropRGBImageDecoder. No draws."""

    def __init__(self, resolution: int, ratio: float):
        super().__init__(resolution)
        self.ratio = ratio

    def draw(self, address: Address, heights, widths):
        heights, widths = heights.astype(np.int64), widths.astype(np.int64)
        side = np.maximum(1, (np.minimum(heights, widths) * self.ratio).astype(np.int64))
        return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], 1), np.zeros(len(side), bool)
