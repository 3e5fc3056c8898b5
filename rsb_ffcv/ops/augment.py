"""RandAugment, 3-Augment, TrivialAugmentWide and ColorJitter: which ops an image gets, and how strongly.

Sources matched: `timm/data/auto_augment.py` of timm 1.0.31 (`rand_augment_transform`, `AugmentOp.__call__`, the
`_*_level_to_arg` functions, `auto_augment_policy_3a`), torchvision's `TrivialAugmentWide` and `ColorJitter`. Here are the
policies; `csrc/draws.c` draws, with the same distributions from addressed random numbers; `csrc/augment.c` makes the pixels.
"""
import ctypes
import math
import re
from dataclasses import dataclass

import numpy as np

from rsb_ffcv import InputError
from rsb_ffcv.ops import native as n
from rsb_ffcv.ops.crop import filter_number
from rsb_ffcv.ops.operation import Address, DrawnOperation

FILL = (124, 116, 104)  # round(255 x ImageNet's mean): what timm puts where a geometric op uncovers nothing

# How a level and a sign become an op's argument, numbered as in csrc/draws.c. timm's laws take level / 10; torchvision's the
# magnitude itself.
(NONE, ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, BITS, BITS_INC, THRESHOLD, THRESHOLD_INC, ADD, ENHANCE, ENHANCE_INC,
 DESATURATE, SIGMA, SIGMA_RANDOM, PLAIN, SIGNED, DEGREES, SLANT_X, SLANT_Y, PIXELS_X, PIXELS_Y) = range(23)

# name: (op of the compiled core, law). The names are timm's.
TIMM = {"AutoContrast": (n.AUTOCONTRAST, NONE), "Equalize": (n.EQUALIZE, NONE), "Invert": (n.INVERT, NONE),
        "Rotate": (n.AFFINE, ROTATE), "ShearX": (n.AFFINE, SHEAR_X), "ShearY": (n.AFFINE, SHEAR_Y),
        "TranslateXRel": (n.AFFINE, TRANSLATE_X), "TranslateYRel": (n.AFFINE, TRANSLATE_Y),
        "Posterize": (n.POSTERIZE, BITS), "PosterizeIncreasing": (n.POSTERIZE, BITS_INC),
        "Solarize": (n.SOLARIZE, THRESHOLD), "SolarizeIncreasing": (n.SOLARIZE, THRESHOLD_INC),
        "SolarizeAdd": (n.SOLARIZE_ADD, ADD), "Color": (n.COLOR, ENHANCE), "ColorIncreasing": (n.COLOR, ENHANCE_INC),
        "Contrast": (n.CONTRAST, ENHANCE), "ContrastIncreasing": (n.CONTRAST, ENHANCE_INC),
        "Brightness": (n.BRIGHTNESS, ENHANCE), "BrightnessIncreasing": (n.BRIGHTNESS, ENHANCE_INC),
        "Sharpness": (n.SHARPNESS, ENHANCE), "SharpnessIncreasing": (n.SHARPNESS, ENHANCE_INC),
        "Desaturate": (n.COLOR, DESATURATE), "GaussianBlur": (n.BLUR, SIGMA), "GaussianBlurRand": (n.BLUR, SIGMA_RANDOM)}
OPS = ("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
       "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
INCREASING_OPS = tuple(f"{name}Increasing" if f"{name}Increasing" in TIMM else name for name in OPS)
# timm's other sets (-tweights, -t3a, -t3aw); where weights are given, an image gets no op twice
SETS = {"3a": dict.fromkeys(("SolarizeIncreasing", "Desaturate", "GaussianBlur")),
        "3aw": {"SolarizeIncreasing": 6, "Desaturate": 6, "GaussianBlur": 6, "Rotate": 3, "ShearX": 2, "ShearY": 2,
                "PosterizeIncreasing": 1, "AutoContrast": 1, "ColorIncreasing": 1, "SharpnessIncreasing": 1,
                "ContrastIncreasing": 1, "BrightnessIncreasing": 1, "Equalize": 1, "Invert": 1},
        "weights": {"Rotate": 3, "ShearX": 2, "ShearY": 2, "TranslateXRel": 1, "TranslateYRel": 1, "ColorIncreasing": 0.25,
                    "SharpnessIncreasing": 0.25, "AutoContrast": 0.25, "SolarizeIncreasing": 0.05, "SolarizeAdd": 0.05,
                    "ContrastIncreasing": 0.05, "BrightnessIncreasing": 0.05, "Equalize": 0.05,
                    "PosterizeIncreasing": 0.05, "Invert": 0.05}}
# torchvision's TrivialAugmentWide: (op, law, magnitudes of its first and last bin)
WIDE = {"Identity": (n.IDENTITY, NONE, 0, 0), "ShearX": (n.AFFINE, SLANT_X, 0, 0.99), "ShearY": (n.AFFINE, SLANT_Y, 0, 0.99),
        "TranslateX": (n.AFFINE, PIXELS_X, 0, 32), "TranslateY": (n.AFFINE, PIXELS_Y, 0, 32),
        "Rotate": (n.AFFINE, DEGREES, 0, 135), "Brightness": (n.BRIGHTNESS, SIGNED, 0, 0.99),
        "Color": (n.COLOR, SIGNED, 0, 0.99), "Contrast": (n.CONTRAST, SIGNED, 0, 0.99),
        "Sharpness": (n.SHARPNESS, SIGNED, 0, 0.99), "Posterize": (n.POSTERIZE, PLAIN, 8, 2),
        "Solarize": (n.SOLARIZE, PLAIN, 255, 0), "AutoContrast": (n.AUTOCONTRAST, NONE, 0, 0),
        "Equalize": (n.EQUALIZE, NONE, 0, 0)}
WIDE_BINS = 31


@dataclass(frozen=True)
class Policy:
    """What an image may get: `layers` times, with probability `prob`, one of `ops` (pairs of op and law).

    Its level is drawn from the op's row of `bins`, or, where that is None, is `magnitude` with normal noise of deviation
    `magnitude_std` (inf: uniform up to it), clipped to 0 .. magnitude_max; timm's scale of 10. weights: of the choice,
    which is then without replacement."""
    ops: tuple
    layers: int = 2
    prob: float = 0.5
    magnitude: float = 10.0
    magnitude_std: float = 0.0
    magnitude_max: float = 10.0
    bins: np.ndarray | None = None
    weights: tuple = ()


def parse_policy(text: str) -> Policy:
    """Reads timm's `rand-m7-n2-mstd0.5-inc1-p0.5-mmax10-tweights` (any order after `rand`, all parts optional) and `3a`,
    or torchvision's `ta_wide`. Raises InputError for anything else."""
    if text == "3a":
        return Policy(tuple(TIMM[name] for name in ("Solarize", "Desaturate", "GaussianBlurRand")), layers=1, prob=1.0,
                      bins=np.array([[5.0], [10.0], [10.0]]))
    if text == "ta_wide":
        return Policy(tuple(row[:2] for row in WIDE.values()), layers=1, prob=1.0,
                      bins=np.stack([_wide_bins(*row) for row in WIDE.values()]))
    names = {"m": ("magnitude", int), "n": ("layers", int), "p": ("prob", float), "mstd": ("magnitude_std", float),
             "mmax": ("magnitude_max", int), "inc": ("inc", lambda digits: bool(int(digits)))}
    head, *parts = text.split("-")
    if head != "rand":
        raise InputError(f"augment.rand_augment={text!r}: write timm's spec, such as rand-m7-mstd0.5-inc1, or 3a or ta_wide")
    found, chosen = {}, None
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if part.startswith("t") and part[1:] in SETS:
            chosen = SETS[part[1:]]
        elif match and match[1] in names and (names[match[1]][1] is float or "." not in match[2]):
            key, read = names[match[1]]
            found[key] = read(match[2])
        else:
            raise InputError(f"augment.rand_augment={text!r}: part '{part}' is not one of m7 n2 p0.5 mstd0.5 mmax10 inc1 "
                             f"t{' t'.join(SETS)}")
    if found.get("magnitude_std", 0) > 100:
        found["magnitude_std"] = math.inf
    chosen = chosen or dict.fromkeys(INCREASING_OPS if found.pop("inc", False) else OPS)
    found.pop("inc", None)
    weights = tuple(weight for weight in chosen.values() if weight is not None)
    policy = Policy(tuple(TIMM[name] for name in chosen), weights=weights, **found)
    most = len(weights) or 16
    if not 1 <= policy.layers <= most or not 0 <= policy.prob <= 1:
        raise InputError(f"augment.rand_augment={text!r}: n must be 1 .. {most} and p between 0 and 1")
    return policy


def _wide_bins(op: int, law: int, first: float, last: float) -> np.ndarray:
    """The magnitudes of an op's bins, as torch.linspace gives them in float32; whole ones for posterize."""
    if op == n.POSTERIZE:
        return 8 - np.round(np.arange(WIDE_BINS) / ((WIDE_BINS - 1) / 6))
    step = float((np.float32(last) - np.float32(first)) / np.float32(WIDE_BINS - 1))
    first, last, i = float(np.float32(first)), float(np.float32(last)), np.arange(WIDE_BINS)
    bins = np.where(i < WIDE_BINS // 2, first + step * i, last - step * (WIDE_BINS - 1 - i))
    return bins.astype(np.float32).astype(np.float64)


class _Layers(DrawnOperation):
    """Runs ops of the compiled core. Draws: (n, passes) records of `native.LAYER`."""

    def generate_code(self):
        return n.AUGMENT


class RandAugment(_Layers):
    """Applies a policy (see `parse_policy`) to each image.

    fill: RGB 0 .. 255 for what a geometric op leaves uncovered. interpolation: of the geometric ops; "random" is one of
    "bilinear" and "bicubic" for each op, as timm does.
    """

    def __init__(self, policy: str, fill=FILL, interpolation: str = "random"):
        super().__init__()
        self.policy, self.fill, self.filter = parse_policy(policy), tuple(fill), filter_number(interpolation)
        self.passes, p = self.policy.layers, self.policy
        ops, laws = np.array(p.ops, np.int32).T.copy()
        weights, bins = np.array(p.weights, np.float64), None if p.bins is None else np.ascontiguousarray(p.bins, np.float64)
        self._kept = ops, laws, weights, bins  # the record points into them
        self._record = n.PolicyRecord(
            ops.ctypes.data, laws.ctypes.data, weights.ctypes.data if len(weights) else None,
            None if bins is None else bins.ctypes.data, len(ops), 0 if bins is None else bins.shape[1], p.layers, p.prob,
            p.magnitude, p.magnitude_std, p.magnitude_max)

    def draw(self, address: Address, heights, widths):
        slots, heights, widths = (np.ascontiguousarray(values, np.int64) for values in (address.slots, heights, widths))
        layers = np.empty((len(slots), self.passes), n.LAYER)
        n.library.rsb_draw_layers(address.seed, address.epoch, slots.ctypes.data, heights.ctypes.data, widths.ctypes.data,
                                  len(slots), ctypes.byref(self._record), layers.ctypes.data)
        layers["fill"] = self.fill
        if self.filter >= 0:
            layers["filter"] = self.filter
        return layers


class ColorJitter(_Layers):
    """torchvision's ColorJitter: brightness, contrast, saturation and hue in random order, each by a factor uniform in
    [max(0, 1 - x), 1 + x] (hue: a shift in [-x, x] of the circle, x up to 0.5). 0 switches one off."""

    def __init__(self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0):
        super().__init__()
        strengths = (brightness, contrast, saturation, hue)
        if min(strengths) < 0 or hue > 0.5:
            raise InputError(f"color_jitter={strengths}: strengths are 0 or more, and hue at most 0.5")
        rows = [(op, max(0.0, 1 - x) if op != n.HUE else -x, 1 + x if op != n.HUE else x)
                for op, x in zip((n.BRIGHTNESS, n.CONTRAST, n.COLOR, n.HUE), strengths) if x]
        ops, self.low, self.high = np.array(rows, np.float64).reshape(-1, 3).T.copy()
        self.ops, self.passes = ops.astype(np.int32), len(rows)

    def draw(self, address: Address, heights, widths):
        slots = np.ascontiguousarray(address.slots, np.int64)
        layers = np.empty((len(slots), self.passes), n.LAYER)
        n.library.rsb_draw_jitter(address.seed, address.epoch, slots.ctypes.data, len(slots), self.ops.ctypes.data,
                                  self.low.ctypes.data, self.high.ctypes.data, self.passes, layers.ctypes.data)
        return layers
