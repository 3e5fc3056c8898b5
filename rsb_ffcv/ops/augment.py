"""RandAugment, AutoAugment, 3-Augment, TrivialAugmentWide and ColorJitter: which ops are applied to
an image, and how strong they are.

Sources matched: `timm/data/auto_augment.py` of timm 1.0.31 (`AugmentOp.__call__`, the
`_*_level_to_arg` functions), torchvision's `transforms/autoaugment.py` and `ColorJitter`. This
module draws the parameters of a `policies.Policy`, with the same distributions, from addressed
random numbers. `csrc/augment.c` computes the pixels.
"""

import math

import numpy as np
from numba import njit

from rsb_ffcv import InputError
from rsb_ffcv.ops import draws as d
from rsb_ffcv.ops import native as n
from rsb_ffcv.ops.crop import filter_number
from rsb_ffcv.ops.operation import Address, DrawnOperation
from rsb_ffcv.ops.policies import (
    ADD,
    BITS,
    BITS_INC,
    DEGREES,
    DESATURATE,
    ENHANCE,
    ENHANCE_INC,
    PIXELS_X,
    PIXELS_Y,
    PLAIN,
    REACH_X,
    REACH_Y,
    ROTATE,
    SHEAR_X,
    SHEAR_Y,
    SIGMA,
    SIGMA_RANDOM,
    SIGNED,
    SLANT_X,
    SLANT_Y,
    THRESHOLD,
    THRESHOLD_INC,
    TRANSLATE_X,
    TRANSLATE_Y,
    linspace,
    parse_policy,
)


@njit(cache=True, nogil=True)
def _rotation(argument: np.ndarray, degrees: float, height: float, width: float) -> None:
    """The affine map of Pillow's Image.rotate around the centre."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    argument[:] = (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)


@njit(cache=True, nogil=True)
def _reach(bin_number: float, num_bins: int, side: float) -> float:
    """torchvision's translation in pixels, a bin of up to 150 / 331 of the image's side."""
    return linspace(0.0, 150.0 / 331.0 * side, num_bins, int(bin_number))


@njit(cache=True, nogil=True)
def op_argument(
    argument: np.ndarray,
    level_fn: int,
    level: float,
    sign: float,
    uniform: float,
    height: float,
    width: float,
    num_bins: int,
) -> None:
    """Computes the argument of an op.

    argument: 6 numbers, overwritten with the result.
    level_fn: one of the numbers of policies.py.
    level: timm's level, torchvision's magnitude or the number of a bin, see there.
    sign: +1 or -1.
    uniform: a draw in [0, 1).
    height: of the image, in pixels.
    width: of the image, in pixels.
    num_bins: see Policy.
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
    elif level_fn == REACH_X:
        argument[:] = (1.0, 0.0, -float(int(sign * _reach(level, num_bins, width))), 0.0, 1.0, 0.0)
    elif level_fn == REACH_Y:
        argument[:] = (1.0, 0.0, 0.0, 0.0, 1.0, -float(int(sign * _reach(level, num_bins, height))))
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
    joint: bool,
    probs: np.ndarray,
    num_bins: int,
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
    joint: see Policy.
    probs: float64 (m,), see Policy.
    num_bins: see Policy.
    magnitude: see Policy.
    std: magnitude_std of the Policy.
    upper: magnitude_max of the Policy.
    """
    drawn = np.zeros((len(slots), layers), np.int32)
    cubic = np.zeros((len(slots), layers), np.uint8)
    arguments = np.zeros((len(slots), layers, 6))
    for i in range(len(slots)):
        chosen = np.zeros(len(weights), np.bool_)
        sub_policy = 0
        if joint:
            sub_policy = d.below(seed, epoch, slots[i], d.RAND_AUGMENT, 0, len(ops) // layers)
        for layer in range(layers):
            k = 8 * layer
            if len(weights):
                which = _choose(
                    d.uniform(seed, epoch, slots[i], d.RAND_AUGMENT, k), weights, chosen
                )
            elif joint:
                which = sub_policy * layers + layer
            else:
                which = d.below(seed, epoch, slots[i], d.RAND_AUGMENT, k, len(ops))
            if d.uniform(seed, epoch, slots[i], d.RAND_AUGMENT, k + 1) >= probs[which]:
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
                num_bins,
            )
    return drawn, cubic, arguments


class _Layers(DrawnOperation):
    """Applies ops of the compiled core. Draws: (n, passes) records of `native.LAYER`."""

    def generate_code(self) -> int:
        return n.AUGMENT


class RandAugment(_Layers):
    """Applies a policy to each image.

    policy: see `policies.parse_policy`.
    fill: RGB, 0 .. 255, of the pixels that a geometric op leaves uncovered; None: the policy's.
    interpolation: of the geometric ops, for a policy with no filter of its own: "bilinear",
        "bicubic", or "random", which chooses one of the two for each op, as timm does.

    Raises InputError if `policy` or `interpolation` is invalid.
    """

    def __init__(
        self,
        policy: str,
        fill: tuple[int, ...] | None = None,
        interpolation: str = "random",
    ) -> None:
        super().__init__()
        self.policy, self.filter = parse_policy(policy), filter_number(interpolation)
        if self.policy.filter is not None:
            self.filter = self.policy.filter
        self.fill = self.policy.fill if fill is None else tuple(fill)
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
            p.joint,
            np.array(np.broadcast_to(p.prob, len(ops)), np.float64),
            p.num_bins,
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
