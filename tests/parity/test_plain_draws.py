"""The compiled draws equal the same functions in plain Python, bit for bit.

tests/unit/test_draws.py compares Philox4x32-10 with its published words. The other files in this
folder compare the distributions with torchvision's and timm's. This file compares each number of a
batch.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rsb_ffcv.loading.batch import erase_boxes
from rsb_ffcv.ops import augment as a
from rsb_ffcv.ops import crop, draws
from rsb_ffcv.ops import policies as s
from rsb_ffcv.ops.operation import Address

MASK = 0xFFFFFFFF
PLACES = [(7, 3), (2**62 + 5, 299)]  # seed, epoch
SLOTS = np.arange(200)
HEIGHTS, WIDTHS = np.random.default_rng(0).integers(1, 700, (2, 200)).astype(np.int32)


class Stream:
    """The draws of one (seed, epoch, slot, op), computed with Python integers."""

    def __init__(self, seed, epoch, slot, op):
        self.seed, self.counter = seed, (int(slot), epoch, op)

    def word(self, k):
        k0, k1, (c0, c1, c2), c3 = self.seed & MASK, self.seed >> 32 & MASK, self.counter, k // 4
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
            c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & MASK, p0 >> 32 ^ c3 ^ k1, p0 & MASK
            k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
        return (c0, c1, c2, c3)[k % 4]

    def uniform(self, k):
        return self.word(k) * 2.0**-32

    def below(self, k, n):
        return self.word(k) * n >> 32

    def normal(self, k):
        u = (self.word(k) + 1.0) * 2.0**-32
        return math.sqrt(-2.0 * math.log(u)) * math.cos(2.0 * math.pi * self.uniform(k + 1))

    def log_gamma(self, k, shape):
        d = (shape if shape >= 1.0 else shape + 1.0) - 1.0 / 3.0
        c = 1.0 / math.sqrt(9.0 * d)
        while True:
            x, u = self.normal(k), (self.word(k + 2) + 1.0) * 2.0**-32
            k += 3
            v = 1.0 + c * x
            v = v * (v * v)
            if v > 0.0 and math.log(u) < 0.5 * x * x + d - d * v + d * math.log(v):
                break
        result = math.log(d * v)
        if shape < 1.0:
            result, k = result + math.log((self.word(k) + 1.0) * 2.0**-32) / shape, k + 1
        return result, k

    def beta(self, k, alpha):
        x, k = self.log_gamma(k, alpha)
        y, _ = self.log_gamma(k, alpha)
        return 1.0 / (1.0 + math.exp(min(y - x, 700.0)))


@pytest.mark.parametrize("seed, epoch", PLACES)
def test_single_draws_equal_plain_python(seed, epoch):
    for slot in SLOTS:
        at: tuple[Any, Any, Any, int] = (seed, epoch, slot, draws.MIX)
        stream = Stream(*at)
        k, n = int(slot) % 9, 1 + 10 * int(slot)
        assert draws.word(*at, k) == stream.word(k) and draws.uniform(*at, k) == stream.uniform(k)
        assert draws.below(*at, k, n) == stream.below(k, n) and draws.normal(
            *at, k
        ) == stream.normal(k)
        for alpha in (0.1, 0.2, 1.0, 4.0):
            assert draws.beta(*at, 8, alpha)[0] == stream.beta(8, alpha)
    words = draws.words64(seed, epoch, draws.ORDER, 50)
    streams = [Stream(seed, epoch, slot, draws.ORDER) for slot in range(50)]
    assert words.tolist() == [stream.word(0) << 32 | stream.word(1) for stream in streams]


def crop_box(stream, height, width, scale, ratio):
    low, high = map(math.log, ratio)
    for k in range(0, 40, 4):
        target = height * width * (scale[0] + (scale[1] - scale[0]) * stream.uniform(k))
        aspect = math.exp(low + (high - low) * stream.uniform(k + 1))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return stream.below(k + 2, height - h + 1), stream.below(k + 3, width - w + 1), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = min(width, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("seed, epoch", PLACES)
@pytest.mark.parametrize(
    "scale, ratio",
    [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.2, 5.0)), ((1.0, 1.0), (0.75, 1.5))],
)
def test_crops_equal_plain_python(seed, epoch, scale, ratio):
    (scale_lo, scale_hi), (ratio_lo, ratio_hi) = scale, ratio
    boxes, filters, flips = crop._random_boxes(
        seed, epoch, SLOTS, HEIGHTS, WIDTHS, scale_lo, scale_hi, ratio_lo, ratio_hi, 0.3
    )
    for slot, height, width, box, cubic, flip in zip(
        SLOTS, HEIGHTS.tolist(), WIDTHS.tolist(), boxes, filters, flips
    ):
        stream = Stream(seed, epoch, slot, draws.CROP)
        assert tuple(box) == crop_box(stream, height, width, scale, ratio)
        assert cubic == stream.below(40, 2) and flip == (
            Stream(seed, epoch, slot, draws.FLIP).uniform(0) < 0.3
        )


@pytest.mark.parametrize("seed, epoch", PLACES)
def test_boxes_to_erase_equal_plain_python(seed, epoch):
    height, width, low, high = 160, 224, math.log(0.3), math.log(1 / 0.3)
    boxes = erase_boxes(seed, epoch, SLOTS, height, width, 0.5, 0.02, 0.9, 0.3, 1 / 0.3)
    for slot, box in zip(SLOTS, boxes):
        stream, expected = Stream(seed, epoch, slot, draws.ERASE), (0, 0, 0, 0)
        for k in range(4, 44, 4) if stream.uniform(0) < 0.5 else ():
            area = height * width * (0.02 + (0.9 - 0.02) * stream.uniform(k))
            aspect = math.exp(low + (high - low) * stream.uniform(k + 1))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = stream.below(k + 2, height - h + 1), stream.below(k + 3, width - w + 1)
                expected = top, top + h, left, left + w
                break
        assert tuple(box) == expected
    assert boxes.any(1).sum() > 50


def rotation(degrees, height, width):
    """The affine map of Pillow's Image.rotate."""
    angle, x, y = -math.radians(degrees % 360.0), width / 2, height / 2
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


def slant(shear):
    return math.tan(math.radians(math.degrees(math.atan(shear))))


def reach(sign, number, bins, side):
    """torchvision's translation in pixels."""
    return int(sign * torch.linspace(0.0, 150.0 / 331.0 * side, bins)[int(number)].item())


LEVEL_FNS: dict[int, Callable[..., tuple]] = {
    s.NONE: lambda level, sign, u, h, w, *_: (),
    s.ROTATE: lambda level, sign, u, h, w, *_: rotation(sign * (level / 10 * 30.0), h, w),
    s.DEGREES: lambda level, sign, u, h, w, *_: rotation(sign * level, h, w),
    s.SHEAR_X: lambda level, sign, u, h, w, *_: (1, sign * (level / 10 * 0.3), 0, 0, 1, 0),
    s.SHEAR_Y: lambda level, sign, u, h, w, *_: (1, 0, 0, sign * (level / 10 * 0.3), 1, 0),
    s.TRANSLATE_X: lambda level, sign, u, h, w, *_: (1, 0, sign * (level / 10 * 0.45) * w, 0, 1, 0),
    s.TRANSLATE_Y: lambda level, sign, u, h, w, *_: (1, 0, 0, 0, 1, sign * (level / 10 * 0.45) * h),
    s.SLANT_X: lambda level, sign, u, h, w, *_: (1, slant(sign * level), 0, 0, 1, 0),
    s.SLANT_Y: lambda level, sign, u, h, w, *_: (1, 0, 0, slant(sign * level), 1, 0),
    s.PIXELS_X: lambda level, sign, u, h, w, *_: (1, 0, -int(sign * level), 0, 1, 0),
    s.PIXELS_Y: lambda level, sign, u, h, w, *_: (1, 0, 0, 0, 1, -int(sign * level)),
    s.REACH_X: lambda level, sign, u, h, w, bins: (1, 0, -reach(sign, level, bins, w), 0, 1, 0),
    s.REACH_Y: lambda level, sign, u, h, w, bins: (1, 0, 0, 0, 1, -reach(sign, level, bins, h)),
    s.BITS: lambda level, *_: (int(level / 10 * 4),),
    s.BITS_INC: lambda level, *_: (4 - int(level / 10 * 4),),
    s.THRESHOLD: lambda level, *_: (min(256, int(level / 10 * 256)),),
    s.THRESHOLD_INC: lambda level, *_: (256 - min(256, int(level / 10 * 256)),),
    s.ADD: lambda level, *_: (min(128, int(level / 10 * 110)),),
    s.ENHANCE: lambda level, *_: (level / 10 * 1.8 + 0.1,),
    s.ENHANCE_INC: lambda level, sign, *_: (max(0.1, 1.0 + sign * (level / 10 * 0.9)),),
    s.DESATURATE: lambda level, *_: (
        min(1.0, max(0.0, 1.0 - max(0.5, min(1.0, 0.5 + 0.5 * (level / 10))))),
    ),
    s.SIGMA: lambda level, *_: (max(0.1, min(2.0, 0.1 + (2.0 - 0.1) * (level / 10))),),
    s.SIGMA_RANDOM: lambda level, sign, u, h, w, *_: (
        0.1 + (2.0 * max(0.0, min(1.0, level / 10)) - 0.1) * u,
    ),
    s.SIGNED: lambda level, sign, *_: (1.0 + sign * level,),
    s.PLAIN: lambda level, *_: (level,),
}


def layers_of(stream, policy, height, width):
    """Yields (op, filter, argument) of each layer of one image."""
    left = dict(enumerate(policy.weights))
    probs = policy.prob if isinstance(policy.prob, tuple) else [policy.prob] * len(policy.ops)
    for k in range(0, 8 * policy.layers, 8):
        which = stream.below(k, len(policy.ops))
        if policy.weights:
            share, total = stream.uniform(k), sum(left.values())
            for which, weight in left.items():  # noqa: B007 used after the loop
                share -= weight / total
                if share < 0.0:
                    break
            del left[which]
        if policy.joint:
            which = policy.layers * stream.below(0, len(policy.ops) // policy.layers) + k // 8
        if stream.uniform(k + 1) >= probs[which]:
            yield 0, policy.filter or 0, ()
            continue
        if policy.bins is not None:
            level = float(policy.bins[which, stream.below(k + 2, policy.bins.shape[1])])
        else:
            level = policy.magnitude
            if policy.magnitude_std == math.inf:
                level *= stream.uniform(k + 2)
            elif policy.magnitude_std:
                level += policy.magnitude_std * stream.normal(k + 2)
            level = max(0.0, min(level, policy.magnitude_max))
        sign = 1.0 if stream.uniform(k + 4) < 0.5 else -1.0
        op, level_fn = policy.ops[which]
        yield (
            op,
            stream.below(k + 5, 2) if policy.filter is None else policy.filter,
            LEVEL_FNS[level_fn](level, sign, stream.uniform(k + 6), height, width, policy.num_bins),
        )


@pytest.mark.parametrize("seed, epoch", PLACES)
@pytest.mark.parametrize(
    "spec",
    [
        "rand-m7-mstd0.5-inc1",
        "rand-m9-n3-mstd101-p0.7",
        "rand-m6-n4-tweights-mstd1",
        "rand-m9-t3aw-n3",
        "rand-m12-n2-t3a-mmax10",
        "3a",
        "ta_wide",
        "ta_wide-bilinear",
        "ra-n5-m9",
        "ra-n3-m7-b10-bicubic",
        "aa-imagenet",
        "aa-cifar10",
        "aa-svhn",
    ],
)
def test_layers_equal_plain_python(seed, epoch, spec):
    operation, seen = a.RandAugment(spec), set()
    policy = operation.policy
    drawn = operation.draw(Address(seed, epoch, SLOTS), HEIGHTS, WIDTHS)
    for slot, height, width, layers in zip(SLOTS, HEIGHTS.tolist(), WIDTHS.tolist(), drawn):
        expected = layers_of(Stream(seed, epoch, slot, draws.RAND_AUGMENT), policy, height, width)
        for layer, (op, filter, argument) in zip(layers, expected, strict=True):
            assert (layer["op"], layer["filter"]) == (op, filter)
            assert tuple(layer["fill"]) == (s.FILL if policy.filter is None else s.BLACK)
            # a tolerance, because Python rounds a rotation's cosine to 15 places in decimal
            assert layer["argument"].tolist() == pytest.approx(
                [*argument, *[0] * (6 - len(argument))], rel=1e-13, abs=1e-12
            )
            seen.add(op)
    # an op of few sub-policies may be applied to none of the images
    assert len({op for op, _ in policy.ops} - seen) <= policy.joint


@pytest.mark.parametrize("seed, epoch", PLACES)
@pytest.mark.parametrize("strengths", [(0.4, 0.3, 0.2, 0.1), (0.2, 0.0, 0.3, 0.0)])
def test_jitter_equals_plain_python(seed, epoch, strengths):
    operation = a.ColorJitter(*strengths)
    ops, low, high = operation.ops.tolist(), operation.low.tolist(), operation.high.tolist()
    for slot, layers in zip(SLOTS, operation.draw(Address(seed, epoch, SLOTS), HEIGHTS, WIDTHS)):
        stream, places = Stream(seed, epoch, slot, draws.JITTER), list(range(len(ops)))
        for at in range(len(ops)):
            other = at + stream.below(at, len(ops) - at)
            places[at], places[other] = places[other], places[at]
        assert layers["op"].tolist() == [ops[place] for place in places]
        assert layers["argument"][:, 0].tolist() == [
            low[p] + (high[p] - low[p]) * stream.uniform(4 + p) for p in places
        ]
        assert not layers["argument"][:, 1:].any()
