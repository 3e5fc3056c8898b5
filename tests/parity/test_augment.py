"""RandAugment, 3-Augment, TrivialAugmentWide and ColorJitter equal timm's and torchvision's:
arguments and pixels of the ops, and distributions of the draws."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import stats
from timm.data import auto_augment as timm_aa
from torchvision.transforms import ColorJitter as TorchvisionJitter
from torchvision.transforms import InterpolationMode, autoaugment
from torchvision.transforms import functional as F

from rsb_ffcv import InputError
from rsb_ffcv.ops import augment as ours
from rsb_ffcv.ops import native
from rsb_ffcv.ops.augment import (
    INCREASING_OPS,
    OPS,
    SETS,
    TIMM,
    WIDE,
    ColorJitter,
    RandAugment,
    parse_policy,
)
from rsb_ffcv.ops.operation import Address

SLOTS = np.arange(6000)
SIDES = np.full(6000, 224)
RESAMPLING = {
    0: (Image.Resampling.BILINEAR, InterpolationMode.BILINEAR),
    1: (Image.Resampling.BICUBIC, InterpolationMode.BICUBIC),
}


def images():
    """Yields photograph-like, noisy, flat and tiny images with even and odd sides."""
    rng = np.random.default_rng(0)
    for height, width in ((64, 48), (75, 131), (224, 224)):
        smooth = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        yield np.clip(np.asarray(smooth) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(
            np.uint8
        )
    for shape in ((33, 40, 3), (1, 1, 3), (2, 5, 3), (3, 3, 3), (90, 1, 3)):
        yield rng.integers(0, 256, shape, np.uint8)
    yield rng.integers(100, 140, (50, 60, 3), np.uint8)
    yield np.full((20, 30, 3), 77, np.uint8)


def layer(op, *argument, cubic=0):
    record = np.zeros((), native.LAYER)
    record["op"], record["argument"][: len(argument)], record["filter"], record["fill"] = (
        op,
        argument,
        cubic,
        ours.FILL,
    )
    return record


def apply(image, pair, level, sign, cubic=0):
    argument = np.empty(6)
    ours.op_argument(
        argument,
        pair[1],
        float(level),
        float(sign),
        0.5,
        float(image.shape[0]),
        float(image.shape[1]),
    )
    return native.augment(image, layer(pair[0], *argument, cubic=cubic))


def check(result, reference, geometric: bool):
    difference = np.abs(result.astype(int) - np.asarray(reference))
    assert difference.max(initial=0) <= geometric, (
        f"{difference.max()} grey levels, {(difference > geometric).sum()} values"
    )


@pytest.mark.parametrize("name", [name for name in TIMM if name != "GaussianBlurRand"])
def test_every_op_equals_timms(name, monkeypatch):
    pair = TIMM[name]
    geometric = pair[0] == native.AFFINE
    changed = 0
    for image in images():
        picture = Image.fromarray(image)
        for level in (0.0, 3.3, 7.0, 9.9, 10.0):
            for sign, cubic in ((1.0, 0), (-1.0, 1), (-1.0, 0), (1.0, 1)):
                monkeypatch.setattr(
                    timm_aa, "_randomly_negate", lambda value, sign=sign: value * sign
                )
                arguments: tuple = (
                    timm_aa.LEVEL_TO_ARG[name](level, {}) if timm_aa.LEVEL_TO_ARG[name] else ()
                )
                result = apply(image, pair, level, sign, cubic)
                # as in Pillow before 13; later versions raise an error for 0 bits
                if "Posterize" in name and arguments[0] == 0:
                    assert not result.any()
                    continue
                apply_theirs: Any = timm_aa.NAME_TO_OP[name]
                check(
                    result,
                    apply_theirs(
                        picture, *arguments, fillcolor=ours.FILL, resample=RESAMPLING[cubic][0]
                    ),
                    geometric,
                )
                changed += not np.array_equal(result, image)
    assert changed


@pytest.mark.parametrize("name", WIDE)
def test_every_op_equals_torchvisions_trivial_augment(name):
    magnitudes, signed = autoaugment.TrivialAugmentWide()._augmentation_space(31)[name]
    bins = ours._wide_bins(WIDE[name])
    if magnitudes.ndim:
        assert magnitudes.tolist() == bins.tolist()
    for image in images():
        for number in (0, 7, 15, 20, 30):
            for sign, cubic in ((1.0, 0), (-1.0, 1)) if signed else ((1.0, 0),):
                reference = autoaugment._apply_op(
                    Image.fromarray(image),
                    name,
                    float(bins[number]) * sign,
                    RESAMPLING[cubic][1],
                    list(map(float, ours.FILL)),
                )
                check(
                    apply(image, WIDE[name][:2], bins[number], sign, cubic),
                    reference,
                    WIDE[name][0] == native.AFFINE,
                )


def test_hue_and_blur_equal_torchvisions_and_pillows():
    for image in images():
        for shift in (-0.5, -0.21, 0.0, 0.004, 0.1, 0.5):
            check(
                native.augment(image, layer(native.HUE, shift)),
                F.adjust_hue(Image.fromarray(image), shift),
                False,
            )
        for sigma in (0.1, 0.7, 1.0, 2.0, 6.5):
            reference = Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))
            check(native.augment(image, layer(native.BLUR, sigma)), reference, False)


def test_hue_of_all_colours_equals_torchvisions():
    """Every 5th value of each channel, compared with Pillow's conversions."""
    axis = np.arange(0, 256, 5, dtype=np.uint8)
    cube = np.stack(np.meshgrid(axis, axis, axis), -1).reshape(52, -1, 3)
    for shift in (0.0, 0.33):
        check(
            native.augment(cube, layer(native.HUE, shift)),
            F.adjust_hue(Image.fromarray(cube), shift),
            False,
        )


@pytest.mark.parametrize("cubic", [0, 1])
def test_any_affine_map_equals_pillows(cubic):
    """Including zooms, mirrors and maps that only reach points outside the image."""
    rng = np.random.default_rng(cubic)
    image = next(images())
    maps = [tuple(rng.normal(0, 1, 6) * (1, 1, 30, 1, 1, 30)) for _ in range(40)]
    for coefficients in [
        *maps,
        (1, 0, 0, 0, 1, 0),
        (-1, 0, 48, 0, -1, 64),
        (1, 0, 500, 0, 1, 0),
        (0, 1, 0, 1, 0, 0),
        (0.01, 0, 20, 0, 0.01, 20),
        (1, 0, 0.5, 0, 1, 0.5),
        (50, 0, 0, 0, 50, 0),
    ]:
        reference = Image.fromarray(image).transform(
            (48, 64),
            Image.Transform.AFFINE,
            coefficients,
            RESAMPLING[cubic][0],
            fillcolor=ours.FILL,
        )
        check(
            native.augment(image, layer(native.AFFINE, *coefficients, cubic=cubic)), reference, True
        )


def test_unknown_ops_and_non_finite_arguments_are_rejected():
    image = next(images())
    for wrong in (
        layer(99),
        layer(-1),
        layer(native.AFFINE, math.nan, 0, 0, 0, 1, 0),
        layer(native.AFFINE, 1, 0, math.inf, 0, 1, 0),
    ):
        with pytest.raises(ValueError, match="parameters that are out of range"):
            native.augment(image, wrong)


def test_affine_map_of_an_image_with_too_many_rows_is_refused():
    """Positions in its copy, with a border, would not fit in 32 bits."""
    image = np.zeros((2**27, 1, 3), np.uint8)
    with pytest.raises(ValueError, match="out of range"):
        native.augment(image, layer(native.AFFINE, 1, 0, 0, 0, 1, 0))


def test_policies_are_parsed_as_in_timm():
    text = "rand-m9-n3-mstd0.5-inc1-p0.7-mmax15"
    policy, theirs = parse_policy(text), timm_aa.rand_augment_transform(text, {})
    op = theirs.ops[0]
    assert (
        policy.layers,
        policy.prob,
        policy.magnitude,
        policy.magnitude_std,
        policy.magnitude_max,
    ) == (theirs.num_layers, op.prob, op.magnitude, op.magnitude_std, op.magnitude_max)
    assert (
        [op.name for op in theirs.ops]
        == list(INCREASING_OPS)
        == timm_aa._RAND_INCREASING_TRANSFORMS
    )
    assert list(OPS) == timm_aa._RAND_TRANSFORMS
    assert (
        parse_policy("rand-inc0").ops == parse_policy("rand").ops != parse_policy("rand-inc1").ops
    )
    assert parse_policy("rand-mstd101").magnitude_std == math.inf
    for name in SETS:
        theirs = timm_aa.rand_augment_transform(f"rand-t{name}", {})
        policy = parse_policy(f"rand-t{name}")
        assert policy.ops == tuple(TIMM[op.name] for op in theirs.ops)
        if theirs.choice_weights is not None:
            assert np.allclose(
                np.array(policy.weights) / sum(policy.weights), theirs.choice_weights
            )
    three = timm_aa.auto_augment_transform("3a", {})
    assert parse_policy("3a").ops == tuple(TIMM[sub[0].name] for sub in three.policy)
    assert parse_policy("3a").bins[:, 0].tolist() == [sub[0].magnitude for sub in three.policy]
    for wrong in (
        "rand-m",
        "rand-9",
        "rand-m7.5",
        "random-m7",
        "",
        "rand-n0",
        "rand-p2",
        "rand-tfoo",
        "rand-n17",
        "3aw",
        "rand-tweights-n16",
        "augmix",
    ):
        with pytest.raises(InputError, match="`policy`="):
            parse_policy(wrong)


def draws(policy, **options):
    return RandAugment(policy, **options).draw(Address(0, 0, SLOTS), SIDES, SIDES)


def test_draws_have_timms_distribution():
    drawn = draws("rand-m7-mstd0.5-inc1")
    applied = drawn["op"] > 0
    assert abs(applied.mean() - 0.5) < 0.02
    counts = np.bincount(drawn["op"][applied], minlength=14)[1:]
    expected = (
        np.bincount([TIMM[name][0] for name in INCREASING_OPS], minlength=14)[1:]
        / 15
        * applied.sum()
    )
    assert (counts[expected == 0] == 0).all() and stats.chisquare(
        counts[expected > 0], expected[expected > 0]
    ).pvalue > 0.01
    assert (
        abs(drawn["filter"][applied].mean() - 0.5) < 0.03
        and abs(np.corrcoef(drawn["op"].T)[0, 1]) < 0.05
    )
    # the argument of an enhancement is 1 + sign x 0.09 level, from which both follow
    factor = drawn["argument"][..., 0][
        np.isin(drawn["op"], (native.COLOR, native.CONTRAST, native.BRIGHTNESS, native.SHARPNESS))
    ]
    assert stats.kstest(np.abs(factor - 1) / 0.09, stats.norm(7, 0.5).cdf).pvalue > 0.01
    assert abs((factor > 1).mean() - 0.5) < 0.04
    clipped = draws("rand-m9-mstd3-inc1")
    levels = np.abs(clipped["argument"][..., 0][clipped["op"] == native.CONTRAST] - 1) / 0.09
    assert levels.max() < 10 + 1e-9 and 0.3 < (levels > 10 - 1e-9).mean() < 0.45
    uniform = draws("rand-m8-mstd101-inc1")
    levels = np.abs(uniform["argument"][..., 0][uniform["op"] == native.CONTRAST] - 1) / 0.72
    assert stats.kstest(levels, "uniform").pvalue > 0.01
    assert (
        draws("rand-m7", interpolation="bilinear")["filter"].max() == 0
        and draws("rand-m7-p1", interpolation="bicubic")["filter"].min() == 1
    )


def test_translations_are_proportional_to_the_size_of_the_image():
    op = RandAugment("rand-m10-n16-p1-inc1")
    drawn = op.draw(Address(0, 0, np.arange(500)), np.full(500, 100), np.full(500, 200))
    shifts = drawn["argument"][drawn["op"] == native.AFFINE]
    shifts = shifts[(shifts[:, 1] == 0) & (shifts[:, 3] == 0)]
    assert set(np.round(np.abs(shifts[:, 2]), 6)) == {0.0, 90.0} and set(
        np.round(np.abs(shifts[:, 5]), 6)
    ) == {0.0, 45.0}


def test_weighted_sets_draw_without_replacement_and_by_weight():
    drawn = draws("rand-n3-p1-t3aw")["op"]
    singles = [
        native.AUTOCONTRAST,
        native.EQUALIZE,
        native.INVERT,
        native.SOLARIZE,
        native.BLUR,
    ]
    for op in singles:
        assert ((drawn == op).sum(1) <= 1).all()
    first = np.bincount(drawn[:, 0], minlength=14)
    total = sum(SETS["3aw"].values())
    assert stats.binomtest(int(first[native.SOLARIZE]), 6000, 6 / total).pvalue > 0.01
    assert stats.binomtest(int(first[native.INVERT]), 6000, 1 / total).pvalue > 0.01


def test_three_augment_and_trivial_augment_draws():
    three = draws("3a")[:, 0]
    assert (
        stats.chisquare(
            np.bincount(three["op"], minlength=14)[[native.SOLARIZE, native.COLOR, native.BLUR]]
        ).pvalue
        > 0.01
    )
    assert set(three["argument"][three["op"] == native.SOLARIZE, 0]) == {128.0}
    assert set(three["argument"][three["op"] == native.COLOR, 0]) == {0.0}
    assert (
        stats.kstest(
            (three["argument"][three["op"] == native.BLUR, 0] - 0.1) / 1.9, "uniform"
        ).pvalue
        > 0.01
    )
    wide = draws("ta_wide")[:, 0]
    expected = np.bincount([row[0] for row in WIDE.values()], minlength=14)
    assert (
        stats.chisquare(
            np.bincount(wide["op"], minlength=14)[expected > 0], expected[expected > 0] * 6000 / 14
        ).pvalue
        > 0.01
    )
    factors = wide["argument"][wide["op"] == native.CONTRAST, 0]
    assert (
        len(np.unique(factors)) > 50
        and abs((factors > 1).mean() - 0.5) < 0.1
        and abs(factors - 1).max() > 0.98
    )


def test_colour_jitter_has_torchvisions_distribution():
    drawn = ColorJitter(0.4, 0.3, 2.0, 0.1).draw(Address(0, 0, SLOTS), SIDES, SIDES)
    assert (
        np.sort(drawn["op"], 1)
        == sorted((native.BRIGHTNESS, native.CONTRAST, native.COLOR, native.HUE))
    ).all()
    _, places = np.unique(drawn["op"], axis=0, return_inverse=True)
    counts = np.bincount(places)
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 0.01
    torch.manual_seed(0)
    theirs = TorchvisionJitter(0.4, 0.3, 2.0, 0.1)
    reference = np.array(
        [
            theirs.get_params(theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue)[1:]
            for _ in range(3000)
        ]
    )
    for column, op in enumerate((native.BRIGHTNESS, native.CONTRAST, native.COLOR, native.HUE)):
        assert (
            stats.ks_2samp(
                drawn["argument"][..., 0][drawn["op"] == op], reference[:, column]
            ).pvalue
            > 0.01
        )
    assert ColorJitter(0.4, 0, 0, 0).passes == 1 and ColorJitter().passes == 0
    for wrong in ((-1, 0, 0, 0), (0, 0, 0, 0.6)):
        with pytest.raises(InputError, match="`brightness`="):
            ColorJitter(*wrong)
