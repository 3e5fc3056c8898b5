"""RandAugment, AutoAugment, 3-Augment, TrivialAugmentWide and ColorJitter equal timm's and
torchvision's: arguments and pixels of the ops, and distributions of the draws."""

import itertools
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
from rsb_ffcv.ops import draws as draws_of
from rsb_ffcv.ops import native
from rsb_ffcv.ops.augment import ColorJitter, RandAugment
from rsb_ffcv.ops.operation import Address
from rsb_ffcv.ops.policies import (
    AUTO,
    BLACK,
    FILL,
    INCREASING_OPS,
    OPS,
    SETS,
    SPACE,
    TIMM,
    WIDE,
    bins_of,
    linspace,
    parse_policy,
)

SLOTS = np.arange(6000)
SIDES = np.full(6000, 224)
RESAMPLING = {
    0: (Image.Resampling.BILINEAR, InterpolationMode.BILINEAR),
    1: (Image.Resampling.BICUBIC, InterpolationMode.BICUBIC),
    2: (Image.Resampling.NEAREST, InterpolationMode.NEAREST),
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


def layer(op, *argument, filter=0, fill=FILL):
    record = np.zeros((), native.LAYER)
    record["op"], record["argument"][: len(argument)], record["filter"], record["fill"] = (
        op,
        argument,
        filter,
        fill,
    )
    return record


def apply(image, pair, level, sign, filter=0, num_bins=31, fill=FILL):
    argument = np.empty(6)
    ours.op_argument(
        argument,
        pair[1],
        float(level),
        float(sign),
        0.5,
        float(image.shape[0]),
        float(image.shape[1]),
        num_bins,
    )
    return native.augment(image, layer(pair[0], *argument, filter=filter, fill=fill))


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
                        picture, *arguments, fillcolor=FILL, resample=RESAMPLING[cubic][0]
                    ),
                    geometric,
                )
                changed += not np.array_equal(result, image)
    assert changed


@pytest.mark.parametrize("name", WIDE)
def test_every_op_equals_torchvisions_trivial_augment(name):
    magnitudes, signed = autoaugment.TrivialAugmentWide()._augmentation_space(31)[name]
    bins = bins_of(WIDE[name], 31)
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
                    list(map(float, FILL)),
                )
                check(
                    apply(image, WIDE[name][:2], bins[number], sign, cubic),
                    reference,
                    WIDE[name][0] == native.AFFINE,
                )


@pytest.mark.parametrize("filter", RESAMPLING)
@pytest.mark.parametrize("name", SPACE)
def test_every_op_equals_torchvisions_rand_augment_and_auto_augment(name, filter):
    """Byte for byte with the nearest filter, torchvision's default."""
    op, level_fn = SPACE[name][:2]
    rng = np.random.default_rng(1)
    # 150 / 331 of the side: bins that are whole pixels
    more = (rng.integers(0, 256, shape, np.uint8) for shape in ((331, 34, 3), (33, 331, 3)))
    for image in (*images(), *more):
        for num_bins, numbers in ((31, (0, 9, 16, 30)), (10, (2, 9))):
            policies = (autoaugment.RandAugment(), autoaugment.AutoAugment())
            spaces = [each._augmentation_space(num_bins, image.shape[:2]) for each in policies]
            magnitudes, signed = (spaces[0] | spaces[1])[name]
            for number in numbers:
                level = bins_of(SPACE[name], num_bins)[number]
                magnitude = magnitudes[number].item() if magnitudes.ndim else 0.0
                for sign in (1.0, -1.0) if signed else (1.0,):
                    reference = autoaugment._apply_op(
                        Image.fromarray(image),
                        name,
                        magnitude * sign,
                        RESAMPLING[filter][1],
                        None,
                    )
                    check(
                        apply(
                            image,
                            (op, level_fn),
                            level,
                            sign,
                            filter=filter,
                            num_bins=num_bins,
                            fill=BLACK,
                        ),
                        reference,
                        op == native.AFFINE and filter != native.NEAREST,
                    )


def test_bins_equal_torchvisions():
    for num_bins in (2, 3, 5, 10, 31, 64, 1000):
        space = autoaugment.RandAugment()._augmentation_space(num_bins, (1, 1))
        assert list(space) == list(WIDE)
        for name, (magnitudes, _) in space.items():
            if magnitudes.ndim and SPACE[name][3] is not None:
                assert magnitudes.tolist() == bins_of(SPACE[name], num_bins).tolist()
        if num_bins > 31:
            continue
        for side in range(1, 700):
            magnitudes, _ = autoaugment.RandAugment()._augmentation_space(num_bins, (9, side))[
                "TranslateX"
            ]
            last = 150.0 / 331.0 * side
            assert magnitudes.tolist() == [
                linspace(0.0, last, num_bins, i) for i in range(num_bins)
            ]


def forced(monkeypatch, spec, slot):
    """torchvision's policy of `spec`, with the draws that ours has in `slot`."""

    def at(kind, layer, k, *more):
        return kind(0, 0, slot, draws_of.RAND_AUGMENT, 8 * layer + k, *more)

    def sign(layer):  # 1 is negative, except in AutoAugment
        return int(at(draws_of.uniform, layer, 4) >= 0.5)

    layer = -1

    def randint(high, size, **_):
        nonlocal layer
        layer += high == len(WIDE)
        value = (
            at(draws_of.below, layer, 0, high)
            if high == len(WIDE)
            else sign(layer)
            if high == 2
            else at(draws_of.below, layer, 2, high)
        )
        return torch.tensor([value])

    monkeypatch.setattr(torch, "randint", randint)
    head, *parts = spec.split("-")
    if head == "ra":
        return autoaugment.RandAugment(*(int(part[1:]) for part in parts))
    if head == "ta_wide":
        return autoaugment.TrivialAugmentWide()
    theirs = autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy(parts[0]))
    params = (
        at(draws_of.below, 0, 0, 25),
        torch.tensor([at(draws_of.uniform, i, 1) for i in (0, 1)], dtype=torch.float64),
        torch.tensor([1 - sign(i) for i in (0, 1)]),
    )
    monkeypatch.setattr(theirs, "get_params", lambda number: params)
    return theirs


@pytest.mark.parametrize(
    "spec",
    [
        "ra-n2-m9",
        "ra-n4-m30-b31",
        "ra-n1-m2-b5",
        "aa-imagenet",
        "aa-cifar10",
        "aa-svhn",
        "ta_wide-nearest",
    ],
)
def test_torchvisions_policies_give_its_bytes_with_the_same_draws(spec, monkeypatch):
    operation, pictures, changed = RandAugment(spec), list(images()), 0
    for slot in range(150):
        image = pictures[slot % len(pictures)]
        height, width = image.shape[:2]
        ours = image
        at = Address(0, 0, np.array([slot]))
        for record in operation.draw(at, np.array([height]), np.array([width]))[0]:
            ours = native.augment(ours, record)
        theirs = forced(monkeypatch, spec, slot)(Image.fromarray(image))
        assert np.array_equal(ours, np.asarray(theirs)), (slot, image.shape)
        changed += not np.array_equal(ours, image)
    assert changed > 50


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


@pytest.mark.parametrize("filter", RESAMPLING)
def test_any_affine_map_equals_pillows(filter):
    """Including zooms, mirrors and maps that only reach points outside the image."""
    rng = np.random.default_rng(filter)
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
            RESAMPLING[filter][0],
            fillcolor=FILL,
        )
        check(
            native.augment(image, layer(native.AFFINE, *coefficients, filter=filter)),
            reference,
            filter != native.NEAREST,
        )


def test_unknown_ops_and_non_finite_arguments_are_rejected():
    image = next(images())
    for wrong in (
        layer(99),
        layer(-1),
        layer(native.AFFINE, math.nan, 0, 0, 0, 1, 0),
        layer(native.AFFINE, 1, 0, math.inf, 0, 1, 0),
        layer(native.AFFINE, 1, 0, 0, 0, 1, 0, filter=3),
        layer(native.AFFINE, 1, 0, 0, 4e4, 1, 0, filter=native.NEAREST),
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


def test_torchvisions_policies_are_parsed():
    assert str(parse_policy("ra")) == str(parse_policy("ra-n2-m9-b31-nearest"))
    theirs = autoaugment.RandAugment(3, 4, 12)
    policy = parse_policy("ra-n3-m4-b12")
    assert (policy.layers, policy.num_bins, policy.prob) == (3, 12, 1.0)
    assert policy.ops == tuple(SPACE[name][:2] for name in theirs._augmentation_space(12, (9, 9)))
    for name, table in AUTO.items():
        cells = iter(table.split())
        parsed = [
            (op, float(prob), None if k == "-" else int(k)) for op, prob, k in zip(*[cells] * 3)
        ]
        policies = autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy(name)).policies
        assert parsed == [op for pair in policies for op in pair]
        policy = parse_policy(f"aa-{name}")
        assert policy.joint and policy.layers == 2
        assert policy.prob == tuple(prob for _, prob, _ in parsed)
        assert policy.ops == tuple(SPACE[op][:2] for op, *_ in parsed)
    for ending, filter in (("nearest", 2), ("bilinear", 0), ("bicubic", 1)):
        for head in ("ra", "ra-n1", "aa-svhn", "ta_wide"):
            policy = parse_policy(f"{head}-{ending}")
            assert (policy.filter, policy.fill) == (filter, BLACK)
    assert (parse_policy("aa-svhn").filter, parse_policy("ra").fill) == (native.NEAREST, BLACK)
    assert (parse_policy("ta_wide").filter, parse_policy("ta_wide").fill) == (None, FILL)
    for wrong in (
        "ra-m31",
        "ra-n0",
        "ra-n17",
        "ra-b1-m0",
        "ra-b1001",
        "ra-m9-n2",
        "ra-m9.5",
        "ra-",
        "aa",
        "aa-",
        "aa-cifar100",
        "aa-imagenet-n2",
        "ta_wide-lanczos",
        "ra-bilinear-n2",
        "ra-n\u0662",
    ):
        with pytest.raises(InputError, match=r"^`policy`='.*'.*$"):
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


def test_torchvisions_rand_augment_draws_each_op_always_and_either_sign():
    drawn = draws("ra-n2-m15")
    expected = np.bincount([row[0] for name, row in SPACE.items() if name in WIDE], minlength=14)
    for layer in range(2):
        counts = np.bincount(drawn["op"][:, layer], minlength=14)
        assert (counts[expected == 0] == 0).all()
        assert (
            stats.chisquare(counts[expected > 0], expected[expected > 0] * 6000 / 14).pvalue > 0.01
        )
    assert abs(np.corrcoef(drawn["op"].T)[0, 1]) < 0.05
    factors = drawn["argument"][drawn["op"] == native.CONTRAST, 0]
    assert np.allclose(np.abs(factors - 1), 0.45) and abs((factors > 1).mean() - 0.5) < 0.05
    assert (drawn["filter"] == native.NEAREST).all() and not drawn["fill"].any()


@pytest.mark.parametrize("name", AUTO)
def test_auto_augment_draws_a_sub_policy_and_its_probabilities(name):
    drawn, policy = draws(f"aa-{name}"), parse_policy(f"aa-{name}")
    assert isinstance(policy.prob, tuple)
    # for each sub-policy, which of its two ops are applied
    expected: dict[tuple[int, int], float] = {}
    for i in range(0, 50, 2):
        for pair in itertools.product((False, True), repeat=2):
            share = 1 / 25
            for applied, prob in zip(pair, policy.prob[i : i + 2]):
                share *= prob if applied else 1 - prob
            first, second = (
                policy.ops[i + k][0] if applied else native.IDENTITY
                for k, applied in enumerate(pair)
            )
            expected[first, second] = expected.get((first, second), 0) + share
    counts = dict.fromkeys(expected, 0)
    for first, second in drawn["op"].tolist():
        counts[first, second] += 1  # fails for a pair that no sub-policy has
    common = sorted(expected, key=lambda pair: expected[pair])
    common = common[sum(share * 6000 < 10 for share in expected.values()) + 1 :]
    # the others count together
    found, shares = ([of[pair] for pair in common] for of in (counts, expected))
    found, shares = [*found, 6000 - sum(found)], [*shares, 1 - sum(shares)]
    assert stats.chisquare(found, [6000 * share for share in shares]).pvalue > 0.01


def test_an_explicit_fill_is_used():
    assert (draws("ra", fill=(1, 2, 3))["fill"] == (1, 2, 3)).all()


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
