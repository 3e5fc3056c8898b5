"""Policies: which ops may be applied to an image, how one is chosen, and how strong it is. A spec
(rand-m7-mstd0.5-inc1) becomes a `Policy`, from which `augment.RandAugment` draws.

Sources matched: `timm/data/auto_augment.py` of timm 1.0.31 (`rand_augment_transform`,
`auto_augment_policy_3a`), and `transforms/autoaugment.py` of torchvision 0.27 (`RandAugment`,
`AutoAugment`, `TrivialAugmentWide`) applied to PIL images.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from rsb_ffcv import InputError
from rsb_ffcv.ops import native as n

# round(255 x ImageNet's mean): timm's colour for pixels that a geometric op leaves uncovered
FILL = (124, 116, 104)
BLACK = (0, 0, 0)  # torchvision's
FILTERS = {"nearest": n.NEAREST, "bilinear": n.BILINEAR, "bicubic": n.BICUBIC}

# The functions that turn a level and a sign into the argument of an op (timm's `level_fn`). timm's
# use level / 10. torchvision's use the magnitude itself, except REACH_X and REACH_Y, whose
# magnitude depends on the size of the image: these use the number of the bin.
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
    REACH_X,
    REACH_Y,
) = range(25)

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
# torchvision's TrivialAugmentWide: (op, level_fn, magnitude of the first bin, of the last bin);
# None: it depends on the size of the image
WIDE: dict[str, tuple[int, int, float, float | None]] = {
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
# torchvision's RandAugment, which does not invert, and AutoAugment
SPACE = WIDE | {
    "ShearX": (n.AFFINE, SLANT_X, 0, 0.3),
    "ShearY": (n.AFFINE, SLANT_Y, 0, 0.3),
    "TranslateX": (n.AFFINE, REACH_X, 0, None),
    "TranslateY": (n.AFFINE, REACH_Y, 0, None),
    "Rotate": (n.AFFINE, DEGREES, 0, 30),
    "Brightness": (n.BRIGHTNESS, SIGNED, 0, 0.9),
    "Color": (n.COLOR, SIGNED, 0, 0.9),
    "Contrast": (n.CONTRAST, SIGNED, 0, 0.9),
    "Sharpness": (n.SHARPNESS, SIGNED, 0, 0.9),
    "Posterize": (n.POSTERIZE, PLAIN, 8, 4),
    "Invert": (n.INVERT, NONE, 0, 0),
}
BINS = 31  # torchvision's num_magnitude_bins; AutoAugment has 10
AUTO_BINS = 10
# torchvision's AutoAugment: a sub-policy of two ops a line; name, probability and bin of each
AUTO = {
    "imagenet": """
        Posterize    0.4 8    Rotate       0.6 9
        Solarize     0.6 5    AutoContrast 0.6 -
        Equalize     0.8 -    Equalize     0.6 -
        Posterize    0.6 7    Posterize    0.6 6
        Equalize     0.4 -    Solarize     0.2 4
        Equalize     0.4 -    Rotate       0.8 8
        Solarize     0.6 3    Equalize     0.6 -
        Posterize    0.8 5    Equalize     1.0 -
        Rotate       0.2 3    Solarize     0.6 8
        Equalize     0.6 -    Posterize    0.4 6
        Rotate       0.8 8    Color        0.4 0
        Rotate       0.4 9    Equalize     0.6 -
        Equalize     0.0 -    Equalize     0.8 -
        Invert       0.6 -    Equalize     1.0 -
        Color        0.6 4    Contrast     1.0 8
        Rotate       0.8 8    Color        1.0 2
        Color        0.8 8    Solarize     0.8 7
        Sharpness    0.4 7    Invert       0.6 -
        ShearX       0.6 5    Equalize     1.0 -
        Color        0.4 0    Equalize     0.6 -
        Equalize     0.4 -    Solarize     0.2 4
        Solarize     0.6 5    AutoContrast 0.6 -
        Invert       0.6 -    Equalize     1.0 -
        Color        0.6 4    Contrast     1.0 8
        Equalize     0.8 -    Equalize     0.6 -
    """,
    "cifar10": """
        Invert       0.1 -    Contrast     0.2 6
        Rotate       0.7 2    TranslateX   0.3 9
        Sharpness    0.8 1    Sharpness    0.9 3
        ShearY       0.5 8    TranslateY   0.7 9
        AutoContrast 0.5 -    Equalize     0.9 -
        ShearY       0.2 7    Posterize    0.3 7
        Color        0.4 3    Brightness   0.6 7
        Sharpness    0.3 9    Brightness   0.7 9
        Equalize     0.6 -    Equalize     0.5 -
        Contrast     0.6 7    Sharpness    0.6 5
        Color        0.7 7    TranslateX   0.5 8
        Equalize     0.3 -    AutoContrast 0.4 -
        TranslateY   0.4 3    Sharpness    0.2 6
        Brightness   0.9 6    Color        0.2 8
        Solarize     0.5 2    Invert       0.0 -
        Equalize     0.2 -    AutoContrast 0.6 -
        Equalize     0.2 -    Equalize     0.6 -
        Color        0.9 9    Equalize     0.6 -
        AutoContrast 0.8 -    Solarize     0.2 8
        Brightness   0.1 3    Color        0.7 0
        Solarize     0.4 5    AutoContrast 0.9 -
        TranslateY   0.9 9    TranslateY   0.7 9
        AutoContrast 0.9 -    Solarize     0.8 3
        Equalize     0.8 -    Invert       0.1 -
        TranslateY   0.7 9    AutoContrast 0.9 -
    """,
    "svhn": """
        ShearX       0.9 4    Invert       0.2 -
        ShearY       0.9 8    Invert       0.7 -
        Equalize     0.6 -    Solarize     0.6 6
        Invert       0.9 -    Equalize     0.6 -
        Equalize     0.6 -    Rotate       0.9 3
        ShearX       0.9 4    AutoContrast 0.8 -
        ShearY       0.9 8    Invert       0.4 -
        ShearY       0.9 5    Solarize     0.2 6
        Invert       0.9 -    AutoContrast 0.8 -
        Equalize     0.6 -    Rotate       0.9 3
        ShearX       0.9 4    Solarize     0.3 3
        ShearY       0.8 8    Invert       0.7 -
        Equalize     0.9 -    TranslateY   0.6 6
        Invert       0.9 -    Equalize     0.6 -
        Contrast     0.3 3    Rotate       0.8 4
        Invert       0.8 -    TranslateY   0.0 2
        ShearY       0.7 6    Solarize     0.4 8
        Invert       0.6 -    Rotate       0.8 4
        ShearY       0.3 7    TranslateX   0.9 3
        ShearX       0.1 6    Invert       0.6 -
        Solarize     0.7 2    TranslateY   0.6 7
        ShearY       0.8 4    Invert       0.8 -
        ShearX       0.7 9    TranslateY   0.8 3
        ShearY       0.8 5    AutoContrast 0.7 -
        ShearX       0.7 2    Invert       0.1 -
    """,
}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The ops that may be applied to an image, and how they are drawn.

    ops: (op, level_fn) pairs, one of which is chosen in each layer.
    layers: number of ops per image.
    joint: `ops` are sub-policies of `layers` ops each. One of these is chosen for an image.
    prob: probability that the chosen op is applied, of all ops or of each.
    magnitude: level of an op if `bins` is None, on timm's scale of 10.
    magnitude_std: standard deviation of normal noise that is added to the level; inf: the level is
        uniform from 0 to `magnitude`.
    magnitude_max: upper limit of the level with its noise; the lower limit is 0.
    bins: a row per op, from which its level is drawn.
    num_bins: torchvision's num_magnitude_bins, of which a level of REACH_X or REACH_Y is one.
    weights: weights of the choice, which is then without replacement.
    filter: of geometric ops, a number of the compiled core; None: not part of the policy.
    fill: RGB of the pixels that a geometric op leaves uncovered.
    """

    ops: tuple[tuple[int, int], ...]
    layers: int = 2
    joint: bool = False
    prob: float | tuple[float, ...] = 0.5
    magnitude: float = 10.0
    magnitude_std: float = 0.0
    magnitude_max: float = 10.0
    bins: np.ndarray | None = None
    num_bins: int = BINS
    weights: tuple[float, ...] = ()
    filter: int | None = None
    fill: tuple[int, int, int] = FILL


def parse_policy(policy: str) -> Policy:
    """Parses a spec. Raises InputError for anything else.

    timm's: `rand-m7-n2-mstd0.5-inc1-p0.5-mmax10-tweights` (all parts after `rand` are optional and
        in any order), and `3a`.
    torchvision's: `ra-n2-m9-b31` (RandAugment: num_ops, magnitude, num_magnitude_bins; each is
        optional), `aa-imagenet`, `aa-cifar10`, `aa-svhn` (AutoAugment), and `ta_wide`
        (TrivialAugmentWide). Geometric ops fill with black, and with `-bilinear` or `-bicubic` at
        the end of the spec they interpolate; else, or with `-nearest`, they take the nearest pixel,
        torchvision's default. A `ta_wide` with none of these three endings has timm's fill and no
        filter of its own.
    """
    if policy == "3a":
        return Policy(
            ops=tuple(TIMM[name] for name in ("Solarize", "Desaturate", "GaussianBlurRand")),
            layers=1,
            prob=1.0,
            bins=np.array([[5.0], [10.0], [10.0]]),
        )
    if policy.split("-")[0] == "rand":
        return _timm_policy(policy)
    return _torchvision_policy(policy)


def _torchvision_policy(policy: str) -> Policy:
    match = re.fullmatch(
        r"(?:ta_wide|aa-(?P<auto>[a-z0-9]+)|(?P<rand>ra)(?:-n(?P<n>\d+))?(?:-m(?P<m>\d+))?"
        r"(?:-b(?P<b>\d+))?)(?:-(?P<filter>nearest|bilinear|bicubic))?",
        policy,
        re.ASCII,
    )
    if not match or match["auto"] not in (None, *AUTO):
        raise InputError(
            f"`policy`={policy!r}: is not a valid policy; use timm's format, for example "
            f"rand-m7-mstd0.5-inc1, or 3a, or torchvision's: ra-n2-m9-b31, "
            f"{', '.join(f'aa-{name}' for name in AUTO)} or ta_wide, each of which may end in "
            f"-nearest, -bilinear or -bicubic"
        )
    like_torchvision: dict[str, Any] = {
        "filter": FILTERS[match["filter"] or "nearest"],
        "fill": BLACK,
    }
    if match["auto"]:
        return _auto_policy(AUTO[match["auto"]], **like_torchvision)
    if not match["rand"]:
        return Policy(
            ops=tuple(row[:2] for row in WIDE.values()),
            layers=1,
            prob=1.0,
            bins=np.stack([bins_of(row, BINS) for row in WIDE.values()]),
            **(like_torchvision if match["filter"] else {}),
        )
    layers, magnitude, num_bins = (
        int(match[part] or default) for part, default in (("n", 2), ("m", 9), ("b", BINS))
    )
    if not 1 <= layers <= 16 or not 2 <= num_bins <= 1000 or magnitude >= num_bins:
        raise InputError(
            f"`policy`={policy!r}: n must be 1 to 16, b 2 to 1000, and m less than b; correct it"
        )
    rows = [SPACE[name] for name in WIDE]  # all but Invert
    return Policy(
        ops=tuple(row[:2] for row in rows),
        layers=layers,
        prob=1.0,
        bins=np.array([[bins_of(row, num_bins)[magnitude]] for row in rows]),
        num_bins=num_bins,
        **like_torchvision,
    )


def _auto_policy(table: str, **like_torchvision: Any) -> Policy:
    """table: a value of AUTO."""
    cells = table.split()
    names, probs, numbers = cells[::3], cells[1::3], cells[2::3]
    return Policy(
        ops=tuple(SPACE[name][:2] for name in names),
        joint=True,
        prob=tuple(map(float, probs)),
        bins=np.array(
            [
                [0.0 if number == "-" else bins_of(SPACE[name], AUTO_BINS)[int(number)]]
                for name, number in zip(names, numbers)
            ]
        ),
        num_bins=AUTO_BINS,
        **like_torchvision,
    )


def _timm_policy(policy: str) -> Policy:
    names: dict[str, tuple[str, Callable[[str], Any]]] = {
        "m": ("magnitude", int),
        "n": ("layers", int),
        "p": ("prob", float),
        "mstd": ("magnitude_std", float),
        "mmax": ("magnitude_max", int),
        "inc": ("inc", lambda digits: bool(int(digits))),
    }
    found: dict[str, Any] = {}
    chosen = None
    for part in policy.split("-")[1:]:
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
    if not 1 <= made.layers <= most or not 0 <= found.get("prob", 0) <= 1:
        raise InputError(
            f"`policy`={policy!r}: n must be 1 to {most}, and p must be 0 to 1; correct it"
        )
    return made


@njit(cache=True, nogil=True)
def linspace(first: float, last: float, num: int, i: int) -> float:
    """Element `i` of torch.linspace(first, last, num), which has float32, as torch computes it on a
    CPU with fused products. Without them, torch's may differ in the last bit."""
    first32, last32 = np.float32(first), np.float32(last)
    step = np.float64((last32 - first32) / np.float32(num - 1))
    if i < num // 2:
        return np.float64(np.float32(first32 + step * i))
    return np.float64(np.float32(last32 - step * (num - 1 - i)))


def bins_of(row: tuple[int, int, float, float | None], num: int) -> np.ndarray:
    """The magnitudes of an op's `num` bins, float64 (num,); of REACH_X and REACH_Y, their numbers.
    row: an entry of WIDE or SPACE."""
    op, _, first, last = row
    if last is None:
        return np.arange(num, dtype=np.float64)
    if op == n.POSTERIZE:
        return first - np.round(
            np.arange(num, dtype=np.float32) / np.float32((num - 1) / (first - last))
        ).astype(np.float64)
    return np.array([linspace(float(first), float(last), num, i) for i in range(num)])
