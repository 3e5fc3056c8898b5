"""RandAugment, 3-Augment, TrivialAugmentWide and ColorJitter: which ops are applied to an image,
and how strong they are.

Sources matched: `timm/data/auto_augment.py` of timm 1.0.31 (`rand_augment_transform`,
`AugmentOp.__call__`, the `_*_level_to_arg` functions, `auto_augment_policy_3a`), torchvision's
`TrivialAugmentWide` and `ColorJitter`. This module draws the parameters, with the same
distributions, from addressed random numbers. `csrc/augment.c` computes the pixels.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from rsb_ffcv import InputError
from rsb_ffcv.ops import draws as d
from rsb_ffcv.ops import native as n
from rsb_ffcv.ops.crop import filter_number
from rsb_ffcv.ops.operation import Address, DrawnOperation

# round(255 x ImageNet's mean): timm's colour for pixels that a geometric op leaves uncovered
FILL = (124, 116, 104)

# The functions that turn a level and a sign into the argument of an op (timm's `level_fn`). timm's
# use level / 10, torchvision's use the magnitude itself.
(
    NONE,
    ROTATE,
    SHEAR_X,
    SHEAR_Y,
    TRANSLATE_X,
    TRANSLATE_Y,
    BITS,
    BITS_INC,
    THRESHOLD,
    THRESHOLD_INC,
    ADD,
    ENHANCE,
    ENHANCE_INC,
    DESATURATE,
    SIGMA,
    SIGMA_RANDOM,
    PLAIN,
    SIGNED,
    DEGREES,
    SLANT_X,
    SLANT_Y,
    PIXELS_X,
    PIXELS_Y,
) = range(23)

# name: (op of the compiled core, level_fn). The names are timm's.
TIMM = {
    "AutoContrast": (n.AUTOCONTRAST, NONE),
    "Equalize": (n.EQUALIZE, NONE),
    "Invert": (n.INVERT, NONE),
    "Rotate": (n.AFFINE, ROTATE),
    "ShearX": (n.AFFINE, SHEAR_X),
    "ShearY": (n.AFFINE, SHEAR_Y),
    "TranslateXRel": (n.AFFINE, TRANSLATE_X),
    "TranslateYRel": (n.AFFINE, TRANSLATE_Y),
    "Posterize": (n.POSTERIZE, BITS),
    "PosterizeIncreasing": (n.POSTERIZE, BITS_INC),
    "Solarize": (n.SOLARIZE, THRESHOLD),
    "SolarizeIncreasing": (n.SOLARIZE, THRESHOLD_INC),
    "SolarizeAdd": (n.SOLARIZE_ADD, ADD),
    "Color": (n.COLOR, ENHANCE),
    "ColorIncreasing": (n.COLOR, ENHANCE_INC),
    "Contrast": (n.CONTRAST, ENHANCE),
    "ContrastIncreasing": (n.CONTRAST, ENHANCE_INC),
    "Brightness": (n.BRIGHTNESS, ENHANCE),
    "BrightnessIncreasing": (n.BRIGHTNESS, ENHANCE_INC),
    "Sharpness": (n.SHARPNESS, ENHANCE),
    "SharpnessIncreasing": (n.SHARPNESS, ENHANCE_INC),
    "Desaturate": (n.COLOR, DESATURATE),
    "GaussianBlur": (n.BLUR, SIGMA),
    "GaussianBlurRand": (n.BLUR, SIGMA_RANDOM),
}
OPS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
INCREASING_OPS = tuple(f"{name}Increasing" if f"{name}Increasing" in TIMM else name for name in OPS)
# timm's other sets (-tweights, -t3a, -t3aw); if a set has weights, an image gets no op twice
SETS: dict[str, dict[str, float | None]] = {
    "3a": dict.fromkeys(("SolarizeIncreasing", "Desaturate", "GaussianBlur")),
    "3aw": {
        "SolarizeIncreasing": 6,
        "Desaturate": 6,
        "GaussianBlur": 6,
        "Rotate": 3,
        "ShearX": 2,
        "ShearY": 2,
        "PosterizeIncreasing": 1,
        "AutoContrast": 1,
        "ColorIncreasing": 1,
        "SharpnessIncreasing": 1,
        "ContrastIncreasing": 1,
        "BrightnessIncreasing": 1,
        "Equalize": 1,
        "Invert": 1,
    },
    "weights": {
        "Rotate": 3,
        "ShearX": 2,
        "ShearY": 2,
        "TranslateXRel": 1,
        "TranslateYRel": 1,
        "ColorIncreasing": 0.25,
        "SharpnessIncreasing": 0.25,
        "AutoContrast": 0.25,
        "SolarizeIncreasing": 0.05,
        "SolarizeAdd": 0.05,
        "ContrastIncreasing": 0.05,
        "BrightnessIncreasing": 0.05,
        "Equalize": 0.05,
        "PosterizeIncreasing": 0.05,
        "Invert": 0.05,
    },
}
# torchvision's TrivialAugmentWide: (op, level_fn, magnitude of the first bin, of the last bin)
WIDE = {
    "Identity": (n.IDENTITY, NONE, 0, 0),
    "ShearX": (n.AFFINE, SLANT_X, 0, 0.99),
    "ShearY": (n.AFFINE, SLANT_Y, 0, 0.99),
    "TranslateX": (n.AFFINE, PIXELS_X, 0, 32),
    "TranslateY": (n.AFFINE, PIXELS_Y, 0, 32),
    "Rotate": (n.AFFINE, DEGREES, 0, 135),
    "Brightness": (n.BRIGHTNESS, SIGNED, 0, 0.99),
    "Color": (n.COLOR, SIGNED, 0, 0.99),
    "Contrast": (n.CONTRAST, SIGNED, 0, 0.99),
    "Sharpness": (n.SHARPNESS, SIGNED, 0, 0.99),
    "Posterize": (n.POSTERIZE, PLAIN, 8, 2),
    "Solarize": (n.SOLARIZE, PLAIN, 255, 0),
    "AutoContrast": (n.AUTOCONTRAST, NONE, 0, 0),
    "Equalize": (n.EQUALIZE, NONE, 0, 0),
}
WIDE_BINS = 31


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The ops that may be applied to an image, and how they are drawn.

    ops: (op, level_fn) pairs, one of which is chosen in each layer.
    layers: number of choices per image.
    prob: probability that the chosen op is applied.
    magnitude: level of an op if `bins` is None, on timm's scale of 10.
    magnitude_std: standard deviation of normal noise that is added to the level; inf: the level is
        uniform from 0 to `magnitude`.
    magnitude_max: upper limit of the level with its noise; the lower limit is 0.
    bins: a row per op, from which its level is drawn.
    weights: weights of the choice, which is then without replacement.
    """

    ops: tuple[tuple[int, int], ...]
    layers: int = 2
    prob: float = 0.5
    magnitude: float = 10.0
    magnitude_std: float = 0.0
    magnitude_max: float = 10.0
    bins: np.ndarray | None = None
    weights: tuple[float, ...] = ()


def parse_policy(policy: str) -> Policy:
    """Parses timm's `rand-m7-n2-mstd0.5-inc1-p0.5-mmax10-tweights` (all parts after `rand` are
    optional and in any order) and `3a`, or torchvision's `ta_wide`. Raises InputError for anything
    else."""
    if policy == "3a":
        return Policy(
            ops=tuple(TIMM[name] for name in ("Solarize", "Desaturate", "GaussianBlurRand")),
            layers=1,
            prob=1.0,
            bins=np.array([[5.0], [10.0], [10.0]]),
        )
    if policy == "ta_wide":
        return Policy(
            ops=tuple(row[:2] for row in WIDE.values()),
            layers=1,
            prob=1.0,
            bins=np.stack([_wide_bins(row) for row in WIDE.values()]),
        )
    names: dict[str, tuple[str, Callable[[str], Any]]] = {
        "m": ("magnitude", int),
        "n": ("layers", int),
        "p": ("prob", float),
        "mstd": ("magnitude_std", float),
        "mmax": ("magnitude_max", int),
        "inc": ("inc", lambda digits: bool(int(digits))),
    }
    head, *parts = policy.split("-")
    if head != "rand":
        raise InputError(
            f"`policy`={policy!r}: is not a valid policy; use timm's format, for example "
            f"rand-m7-mstd0.5-inc1, or 3a or ta_wide"
        )
    found: dict[str, Any] = {}
    chosen = None
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if part.startswith("t") and part[1:] in SETS:
            chosen = SETS[part[1:]]
        elif match and match[1] in names and (names[match[1]][1] is float or "." not in match[2]):
            key, read = names[match[1]]
            found[key] = read(match[2])
        else:
            raise InputError(
                f"`policy`={policy!r}: part '{part}' is invalid; use parts like m7 n2 p0.5 mstd0.5 "
                f"mmax10 inc1 t{' t'.join(SETS)}"
            )
    if found.get("magnitude_std", 0) > 100:
        found["magnitude_std"] = math.inf
    chosen = chosen or dict.fromkeys(INCREASING_OPS if found.pop("inc", False) else OPS)
    found.pop("inc", None)
    weights = tuple(weight for weight in chosen.values() if weight is not None)
    made = Policy(ops=tuple(TIMM[name] for name in chosen), weights=weights, **found)
    most = len(weights) or 16
    if not 1 <= made.layers <= most or not 0 <= made.prob <= 1:
        raise InputError(
            f"`policy`={policy!r}: n must be 1 to {most}, and p must be 0 to 1; correct it"
        )
    return made


def _wide_bins(row: tuple[int, int, float, float]) -> np.ndarray:
    """The magnitudes of an op's bins, as torch.linspace computes them in float32; integers for
    posterize. row: an entry of WIDE."""
    op, level_fn, first, last = row
    if op == n.POSTERIZE:
        return 8 - np.round(np.arange(WIDE_BINS) / ((WIDE_BINS - 1) / 6))
    step = float((np.float32(last) - np.float32(first)) / np.float32(WIDE_BINS - 1))
    first, last, i = float(np.float32(first)), float(np.float32(last)), np.arange(WIDE_BINS)
    bins = np.where(i < WIDE_BINS // 2, first + step * i, last - step * (WIDE_BINS - 1 - i))
    return bins.astype(np.float32).astype(np.float64)


@njit(cache=True, nogil=True)
def _rotation(argument: np.ndarray, degrees: float, height: float, width: float) -> None:
    """The affine map of Pillow's Image.rotate around the centre."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    argument[:] = (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)


@njit(cache=True, nogil=True)
def op_argument(
    argument: np.ndarray,
    level_fn: int,
    level: float,
    sign: float,
    uniform: float,
    height: float,
    width: float,
) -> None:
    """Computes the argument of an op.

    argument: 6 numbers, overwritten with the result.
    level_fn: one of the numbers above.
    level: timm's level or torchvision's magnitude, see above.
    sign: +1 or -1.
    uniform: a draw in [0, 1).
    height: of the image, in pixels.
    width: of the image, in pixels.
    """
    share = level / 10.0
    argument[:] = 0.0
    if level_fn == ROTATE:
        _rotation(argument, sign * (share * 30.0), height, width)
    elif level_fn == DEGREES:
        _rotation(argument, sign * level, height, width)
    elif level_fn == SHEAR_X:
        argument[:] = (1.0, sign * (share * 0.3), 0.0, 0.0, 1.0, 0.0)
    elif level_fn == SHEAR_Y:
        argument[:] = (1.0, 0.0, 0.0, sign * (share * 0.3), 1.0, 0.0)
    elif level_fn == TRANSLATE_X:
        argument[:] = (1.0, 0.0, sign * (share * 0.45) * width, 0.0, 1.0, 0.0)
    elif level_fn == TRANSLATE_Y:
        argument[:] = (1.0, 0.0, 0.0, 0.0, 1.0, sign * (share * 0.45) * height)
    elif level_fn == SLANT_X:
        # torchvision shears by the tangent of an angle that it converts to degrees and back
        argument[:] = (
            1.0,
            math.tan(math.radians(math.degrees(math.atan(sign * level)))),
            0.0,
            0.0,
            1.0,
            0.0,
        )
    elif level_fn == SLANT_Y:
        argument[:] = (
            1.0,
            0.0,
            0.0,
            math.tan(math.radians(math.degrees(math.atan(sign * level)))),
            1.0,
            0.0,
        )
    elif level_fn == PIXELS_X:
        argument[:] = (1.0, 0.0, -float(int(sign * level)), 0.0, 1.0, 0.0)
    elif level_fn == PIXELS_Y:
        argument[:] = (1.0, 0.0, 0.0, 0.0, 1.0, -float(int(sign * level)))
    elif level_fn == BITS:
        argument[0] = int(share * 4)
    elif level_fn == BITS_INC:
        argument[0] = 4 - int(share * 4)
    elif level_fn == THRESHOLD:
        argument[0] = min(256, int(share * 256))
    elif level_fn == THRESHOLD_INC:
        argument[0] = 256 - min(256, int(share * 256))
    elif level_fn == ADD:
        argument[0] = min(128, int(share * 110))
    elif level_fn == ENHANCE:
        argument[0] = share * 1.8 + 0.1
    elif level_fn == ENHANCE_INC:
        argument[0] = max(0.1, 1.0 + sign * (share * 0.9))
    elif level_fn == DESATURATE:
        argument[0] = min(1.0, max(0.0, 1.0 - max(0.5, min(1.0, 0.5 + 0.5 * share))))
    elif level_fn == SIGMA:
        argument[0] = max(0.1, min(2.0, 0.1 + (2.0 - 0.1) * share))
    elif level_fn == SIGMA_RANDOM:
        argument[0] = 0.1 + (2.0 * max(0.0, min(1.0, share)) - 0.1) * uniform
    elif level_fn == SIGNED:
        argument[0] = 1.0 + sign * level
    elif level_fn == PLAIN:
        argument[0] = level


@njit(cache=True, nogil=True)
def _choose(uniform: float, weights: np.ndarray, chosen: np.ndarray) -> int:
    """Returns an index with a probability proportional to its weight, among those not set in
    `chosen`, and sets it there."""
    total = 0.0
    for i in range(len(weights)):
        total += 0.0 if chosen[i] else weights[i]
    last = 0
    for i in range(len(weights)):
        if not chosen[i]:
            last = i
            uniform -= weights[i] / total
            if uniform < 0.0:
                break
    chosen[last] = True
    return last


@njit(cache=True, nogil=True)
def _draw_layers(
    seed: int,
    epoch: int,
    slots: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    ops: np.ndarray,
    level_fns: np.ndarray,
    bins: np.ndarray,
    weights: np.ndarray,
    layers: int,
    prob: float,
    magnitude: float,
    std: float,
    upper: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws the layers of a batch. Returns the ops, int32 (n, layers); whether the filter is
    bicubic, uint8 (n, layers); and the arguments, float64 (n, layers, 6).

    seed: of the address.
    epoch: of the address.
    slots: int64 (n,), of the images.
    heights: (n,), of the images, in pixels.
    widths: (n,), of the images, in pixels.
    ops: int64 (m,), of the policy.
    level_fns: int64 (m,), the function of each op.
    bins: float64 (m, bins) levels of each op; (m, 0): `magnitude` is used.
    weights: float64 (m,), see Policy; (0,): none.
    layers: see Policy.
    prob: see Policy.
    magnitude: see Policy.
    std: magnitude_std of the Policy.
    upper: magnitude_max of the Policy.
    """
    drawn = np.zeros((len(slots), layers), np.int32)
    cubic = np.zeros((len(slots), layers), np.uint8)
    arguments = np.zeros((len(slots), layers, 6))
    for i in range(len(slots)):
        chosen = np.zeros(len(weights), np.bool_)
        for layer in range(layers):
            k = 8 * layer
            if len(weights):
                which = _choose(
                    d.uniform(seed, epoch, slots[i], d.RAND_AUGMENT, k), weights, chosen
                )
            else:
                which = d.below(seed, epoch, slots[i], d.RAND_AUGMENT, k, len(ops))
            if d.uniform(seed, epoch, slots[i], d.RAND_AUGMENT, k + 1) >= prob:
                continue
            level = magnitude
            if bins.shape[1]:
                level = bins[
                    which, d.below(seed, epoch, slots[i], d.RAND_AUGMENT, k + 2, bins.shape[1])
                ]
            else:
                if std == np.inf:
                    level = magnitude * d.uniform(seed, epoch, slots[i], d.RAND_AUGMENT, k + 2)
                elif std > 0.0:
                    level = magnitude + std * d.normal(seed, epoch, slots[i], d.RAND_AUGMENT, k + 2)
                level = max(0.0, min(level, upper))
            sign = 1.0 if d.uniform(seed, epoch, slots[i], d.RAND_AUGMENT, k + 4) < 0.5 else -1.0
            cubic[i, layer] = d.below(seed, epoch, slots[i], d.RAND_AUGMENT, k + 5, 2)
            drawn[i, layer] = ops[which]
            op_argument(
                arguments[i, layer],
                level_fns[which],
                level,
                sign,
                d.uniform(seed, epoch, slots[i], d.RAND_AUGMENT, k + 6),
                float(heights[i]),
                float(widths[i]),
            )
    return drawn, cubic, arguments


class _Layers(DrawnOperation):
    """Applies ops of the compiled core. Draws: (n, passes) records of `native.LAYER`."""

    def generate_code(self) -> int:
        return n.AUGMENT


class RandAugment(_Layers):
    """Applies a policy to each image.

    policy: see `parse_policy`.
    fill: RGB, 0 .. 255, of the pixels that a geometric op leaves uncovered.
    interpolation: of the geometric ops: "bilinear", "bicubic", or "random", which chooses one of
        the two for each op, as timm does.

    Raises InputError if `policy` or `interpolation` is invalid.
    """

    def __init__(
        self, policy: str, fill: tuple[int, ...] = FILL, interpolation: str = "random"
    ) -> None:
        super().__init__()
        self.policy, self.fill, self.filter = (
            parse_policy(policy),
            tuple(fill),
            filter_number(interpolation),
        )
        self.passes = self.policy.layers

    def draw(self, address: Address, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        p = self.policy
        ops, level_fns = np.array(p.ops, np.int64).T
        bins = np.empty((len(ops), 0)) if p.bins is None else p.bins
        layers = np.zeros((len(heights), p.layers), n.LAYER)
        layers["op"], layers["filter"], layers["argument"] = _draw_layers(
            address.seed,
            address.epoch,
            address.slots,
            heights,
            widths,
            ops,
            level_fns,
            bins,
            np.array(p.weights, np.float64),
            p.layers,
            float(p.prob),
            float(p.magnitude),
            float(p.magnitude_std),
            float(p.magnitude_max),
        )
        layers["fill"] = self.fill
        if self.filter >= 0:
            layers["filter"] = self.filter
        return layers


@njit(cache=True, nogil=True)
def _draw_jitter(
    seed: int, epoch: int, slots: np.ndarray, ops: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the order and the factors of a jitter. Returns the ops, int32 (n, m), and their
    arguments, float64 (n, m).

    seed: of the address.
    epoch: of the address.
    slots: int64 (n,), of the images.
    ops: int32 (m,), those with a strength above 0.
    low: float64 (m,), smallest argument of each.
    high: float64 (m,), largest argument of each.
    """
    order = np.zeros((len(slots), len(ops)), np.int32)
    factors = np.zeros((len(slots), len(ops)))
    for i in range(len(slots)):
        places = np.arange(len(ops))
        for at in range(len(ops)):
            other = at + d.below(seed, epoch, slots[i], d.JITTER, at, len(ops) - at)
            places[at], places[other] = places[other], places[at]
        for at in range(len(ops)):
            order[i, at] = ops[places[at]]
            share = d.uniform(seed, epoch, slots[i], d.JITTER, 4 + places[at])
            factors[i, at] = low[places[at]] + (high[places[at]] - low[places[at]]) * share
    return order, factors


class ColorJitter(_Layers):
    """torchvision's ColorJitter: changes brightness, contrast, saturation and hue in random order.

    With a strength of x, each changes by a factor uniform in [max(0, 1 - x), 1 + x]; hue by a shift
    in [-x, x] of the colour circle, x up to 0.5. A strength of 0 disables it. Raises InputError for
    other strengths.
    """

    def __init__(
        self,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
    ) -> None:
        super().__init__()
        strengths = (brightness, contrast, saturation, hue)
        if min(strengths) < 0 or hue > 0.5:
            raise InputError(
                f"`brightness`={brightness}, `contrast`={contrast}, `saturation`={saturation} and "
                f"`hue`={hue} must be 0 or more, and `hue` at most 0.5; change them"
            )
        rows = [
            (op, max(0.0, 1 - x) if op != n.HUE else -x, 1 + x if op != n.HUE else x)
            for op, x in zip((n.BRIGHTNESS, n.CONTRAST, n.COLOR, n.HUE), strengths)
            if x
        ]
        self.ops, self.low, self.high = np.array(rows, np.float64).reshape(-1, 3).T.copy()
        self.passes = len(rows)

    def draw(self, address: Address, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        layers = np.zeros((len(heights), self.passes), n.LAYER)
        layers["op"], layers["argument"][..., 0] = _draw_jitter(
            address.seed,
            address.epoch,
            address.slots,
            self.ops.astype(np.int32),
            self.low,
            self.high,
        )
        return layers
