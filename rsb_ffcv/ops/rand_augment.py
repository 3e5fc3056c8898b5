"""RandAugment with timm's spec strings, op set, magnitudes and distribution, on addressed draws.

Source matched: `timm/data/auto_augment.py` of timm 1.0.31: `rand_augment_transform`
(the spec), `AugmentOp.__call__` (probability, magnitude noise and clipping), the `_*_level_to_arg` functions
(magnitude to argument) and `RandAugment.__call__` (choice with replacement). The pixel work is timm's own functions on
Pillow images; what is ours is where the randomness comes from.
"""
import re
from dataclasses import dataclass

import numpy as np
from numba import njit
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP

from rsb_ffcv import InputError
from rsb_ffcv.ops import draws as d
from rsb_ffcv.ops.operation import Address, DrawnOperation

OPS = ["AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color",
       "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"]
INCREASING_OPS = [f"{name}Increasing" if name in ("Posterize", "Solarize", "Color", "Contrast", "Brightness",
                                                  "Sharpness") else name for name in OPS]


@dataclass(frozen=True)
class Spec:
    """magnitude m and its deviation mstd (inf: uniform in [0, m]), both on timm's scale of 10; mmax the upper clip;
    n layers, each applied with probability p."""
    magnitude: float = 10.0
    layers: int = 2
    prob: float = 0.5
    magnitude_std: float = 0.0
    magnitude_max: float = 10.0
    increasing: bool = False


def parse_spec(text: str) -> Spec:
    """Reads `rand-m7-n2-mstd0.5-inc1-p0.5-mmax10` (any order after `rand`, all parts optional)."""
    names = {"m": ("magnitude", int), "n": ("layers", int), "p": ("prob", float), "mstd": ("magnitude_std", float),
             "mmax": ("magnitude_max", int), "inc": ("increasing", lambda digits: bool(int(digits)))}
    head, *parts = text.split("-")
    found = {}
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if not match or match[1] not in names or (names[match[1]][1] is not float and "." in match[2]):
            raise InputError(f"augment.rand_augment={text!r}: part '{part}' is not one of m7 n2 p0.5 mstd0.5 mmax10 inc1")
        key, read = names[match[1]]
        found[key] = read(match[2])
    if head != "rand":
        raise InputError(f"augment.rand_augment={text!r} does not start with 'rand'; write for example "
                         f"rand-m7-mstd0.5-inc1")
    if found.get("magnitude_std", 0) > 100:
        found["magnitude_std"] = float("inf")
    spec = Spec(**found)
    if spec.layers < 1 or not 0 <= spec.prob <= 1:
        raise InputError(f"augment.rand_augment={text!r}: n must be 1 or more and p between 0 and 1")
    return spec


@njit(cache=True, nogil=True)
def _draw_layers(seed, epoch, slots, layers, prob, magnitude, std, upper, num_ops):
    """Per sample and layer: op (-1: not applied), magnitude, sign (+1/-1), bilinear (0) or bicubic (1)."""
    ops = np.empty((len(slots), layers), np.int64)
    levels = np.empty((len(slots), layers))
    signs = np.empty((len(slots), layers))
    cubic = np.empty((len(slots), layers), np.int64)
    for i in range(len(slots)):
        for layer in range(layers):
            k = 8 * layer
            ops[i, layer] = d.below(seed, epoch, slots[i], d.RAND_AUGMENT, k, num_ops)
            if d.uniform(seed, epoch, slots[i], d.RAND_AUGMENT, k + 1) >= prob:
                ops[i, layer] = -1
            level = magnitude
            if std == np.inf:
                level = magnitude * d.uniform(seed, epoch, slots[i], d.RAND_AUGMENT, k + 2)
            elif std > 0.0:
                level = magnitude + std * d.normal(seed, epoch, slots[i], d.RAND_AUGMENT, k + 2)
            levels[i, layer] = max(0.0, min(level, upper))
            signs[i, layer] = 1.0 if d.uniform(seed, epoch, slots[i], d.RAND_AUGMENT, k + 4) < 0.5 else -1.0
            cubic[i, layer] = d.below(seed, epoch, slots[i], d.RAND_AUGMENT, k + 5, 2)
    return ops, levels, signs, cubic


def level_to_arg(name: str, level: float, sign: float) -> tuple:
    """timm's argument of op `name` at magnitude `level` (0 .. 10) for one sign of its coin: () where it takes none."""
    fraction = level / 10.0
    if name in ("AutoContrast", "Equalize", "Invert"):
        return ()
    if name == "Rotate":
        return (sign * fraction * 30.0,)  # degrees
    if name in ("ShearX", "ShearY"):
        return (sign * fraction * 0.3,)
    if name in ("TranslateXRel", "TranslateYRel"):
        return (sign * fraction * 0.45,)  # of the side
    if name == "Posterize":
        return (int(fraction * 4),)  # bits kept
    if name == "PosterizeIncreasing":
        return (4 - int(fraction * 4),)
    if name == "Solarize":
        return (min(256, int(fraction * 256)),)  # threshold
    if name == "SolarizeIncreasing":
        return (256 - min(256, int(fraction * 256)),)
    if name == "SolarizeAdd":
        return (min(128, int(fraction * 110)),)
    if name.endswith("Increasing"):
        return (max(0.1, 1.0 + sign * fraction * 0.9),)  # enhancement factor, 1 changes nothing
    return (fraction * 1.8 + 0.1,)


class RandAugment(DrawnOperation):
    """Applies a RandAugment spec to each image of a batch, in place.

    fill: RGB 0 .. 255 for what a geometric op leaves uncovered. interpolation: "bilinear", "bicubic", or "random" (one
    of both for each op, as timm does).
    """

    def __init__(self, spec: str, fill=(124, 116, 104), interpolation: str = "random"):
        super().__init__()
        self.spec, self.fill, self.interpolation = parse_spec(spec), tuple(fill), interpolation
        self.names = INCREASING_OPS if self.spec.increasing else OPS

    def declare_state_and_memory(self, previous_state):
        return previous_state, None

    def draw(self, address: Address, heights, widths):
        s = self.spec
        ops, levels, signs, cubic = _draw_layers(
            address.seed, address.epoch, address.slots, s.layers, float(s.prob), float(s.magnitude),
            float(s.magnitude_std), float(s.magnitude_max), len(self.names))
        if self.interpolation != "random":
            cubic[:] = self.interpolation == "bicubic"
        return ops, levels, signs, cubic

    def apply(self, image: np.ndarray, ops, levels, signs, cubic) -> np.ndarray:
        """One (H, W, 3) uint8 image through its layers; each argument has one entry a layer."""
        picture = Image.fromarray(image)
        for op, level, sign, use_cubic in zip(ops, levels, signs, cubic):
            if op >= 0:
                name = self.names[op]
                picture = NAME_TO_OP[name](
                    picture, *level_to_arg(name, level, sign), fillcolor=self.fill,
                    resample=Image.Resampling.BICUBIC if use_cubic else Image.Resampling.BILINEAR)
        return np.asarray(picture)

    def generate_code(self):
        def rand_augment(images, lo, hi, draws):
            for row in range(lo, hi):
                if (draws[0][row] >= 0).any():
                    images[row] = self.apply(images[row], *(draw[row] for draw in draws))
        return rand_augment
