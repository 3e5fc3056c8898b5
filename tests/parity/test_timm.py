"""Losses, mixing, erasing and averaging equal timm's on the same draws."""

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data import mixup as timm_mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

from rsb_ffcv.learning.average import Ema
from rsb_ffcv.learning.loss import Loss, soft_targets
from rsb_ffcv.loading.batch import (
    BatchTransform,
    Mix,
    cutmix_box,
    draw_mix,
    erase,
    erase_boxes,
    mix_each,
    mix_images,
    normalize,
)

SLOTS = np.arange(4000)


def logits_and_labels(seed, n=32, classes=11):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, classes, generator=generator) * 3, torch.randint(
        0, classes, (n,), generator=generator
    )


@pytest.mark.parametrize("seed", range(20))
def test_losses_equal_timms(seed):
    logits, labels = logits_and_labels(seed)
    lam = float(np.random.default_rng(seed).beta(0.2, 0.2))
    smoothing = (0.0, 0.1)[seed % 2]
    soft = timm_mixup.mixup_target(labels, 11, lam, smoothing)
    torch.testing.assert_close(
        soft_targets(labels, 11, lam, smoothing=smoothing), soft, rtol=0, atol=0
    )
    for threshold, summed in ((0.0, False), (0.2, False), (0.0, True), (0.2, True)):
        reference = BinaryCrossEntropy(smoothing, threshold or None, sum_classes=summed)
        ours = Loss(kind="bce", smoothing=smoothing, threshold=threshold, sum_classes=summed)
        torch.testing.assert_close(
            ours(logits, labels, lam), reference(logits, soft), rtol=1e-6, atol=0
        )
        torch.testing.assert_close(
            ours(logits, labels), reference(logits, labels), rtol=1e-6, atol=0
        )
    torch.testing.assert_close(
        Loss(kind="ce", smoothing=smoothing)(logits, labels, lam),
        SoftTargetCrossEntropy()(logits, soft),
    )
    torch.testing.assert_close(
        Loss(kind="ce", smoothing=smoothing)(logits, labels),
        LabelSmoothingCrossEntropy(smoothing)(logits, labels),
    )


def test_auto_loss_is_bce_while_mixing_and_smoothed_cross_entropy_otherwise():
    logits, labels = logits_and_labels(0)
    auto = Loss(kind="auto", smoothing=0.1)
    torch.testing.assert_close(
        auto(logits, labels, 0.3),
        BinaryCrossEntropy(0)(logits, timm_mixup.mixup_target(labels, 11, 0.3, 0.0)),
    )
    torch.testing.assert_close(
        auto(logits, labels), LabelSmoothingCrossEntropy(0.1)(logits, labels)
    )


class Scripted:
    """Replaces numpy.random in timm's Mixup and returns given draws."""

    def __init__(self, **draws):
        for name, values in draws.items():
            setattr(self, name, lambda *_, remaining=list(values), **__: remaining.pop(0))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("cutmix", [False, True])
def test_mix_of_a_batch_equals_timms(seed, cutmix, monkeypatch):
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(20, 60, 2))
    lam, centre = float(rng.beta(1, 1)), (int(rng.integers(height)), int(rng.integers(width)))
    images, labels = (
        torch.from_numpy(rng.normal(size=(8, 3, height, width)).astype(np.float32)),
        torch.arange(8),
    )
    script = Scripted(rand=[0.0, 0.0 if cutmix else 0.9], beta=[lam], randint=centre)
    monkeypatch.setattr(timm_mixup.np, "random", script)
    theirs, their_targets = timm_mixup.Mixup(0.2, 1.0, num_classes=8, label_smoothing=0.0)(
        images.clone(), labels
    )
    mix = (
        cutmix_box(lam, height, width, centre_y=centre[0], centre_x=centre[1])
        if cutmix
        else Mix(lam)
    )
    torch.testing.assert_close(mix_images(images.clone(), mix), theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        soft_targets(labels, 8, mix.lam), their_targets, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("mode", ["pair", "elem"])
def test_mix_of_each_image_or_pair_equals_timms(seed, mode, monkeypatch):
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(20, 60, 2))
    count = {"pair": 4, "elem": 8}[mode]
    lam, cutmix, mixed = (
        rng.beta(1, 1, count).astype(np.float32),
        rng.random(count) < 0.5,
        rng.random(count) < 0.7,
    )
    centres = np.stack([rng.integers(height, size=count), rng.integers(width, size=count)], 1)
    images, labels = (
        torch.from_numpy(rng.normal(size=(8, 3, height, width)).astype(np.float32)),
        torch.arange(8),
    )
    script = Scripted(
        rand=[np.where(cutmix, 0.0, 0.9), np.where(mixed, 0.0, 0.99)],
        beta=[lam, lam],
        randint=centres[cutmix & mixed].ravel().tolist(),
    )
    monkeypatch.setattr(timm_mixup.np, "random", script)
    reference = timm_mixup.Mixup(0.2, 1.0, prob=0.7, num_classes=8, label_smoothing=0.0, mode=mode)
    theirs, their_targets = reference(images.clone(), labels)
    mixes = [
        Mix()
        if not on
        else cutmix_box(
            float(share), height, width, centre_y=int(centre[0]), centre_x=int(centre[1])
        )
        if cut
        else Mix(float(share))
        for share, cut, on, centre in zip(lam, cutmix, mixed, centres)
    ]
    ours, kept = mix_each(images.clone(), mixes)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(soft_targets(labels, 8, kept), their_targets, rtol=1e-6, atol=1e-6)


def test_each_image_or_pair_draws_from_its_own_slot():
    images, slots = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8), np.arange(40, 48)
    for mode, count in (("elem", 8), ("pair", 4)):
        out, lam = BatchTransform(seed=3, mixup_alpha=0.5, cutmix_alpha=1.0, mode=mode)(
            images, 2, slots
        )
        assert isinstance(lam, torch.Tensor)
        drawn = [
            draw_mix(3, 2, int(slot), height=16, width=16, mixup_alpha=0.5, cutmix_alpha=1.0)
            for slot in slots[:count]
        ]
        assert lam.shape == (8, 1) and lam[:count, 0].tolist() == pytest.approx(
            [mix.lam for mix in drawn]
        )
        torch.testing.assert_close(out, mix_each(normalize(images), drawn)[0])
        assert mode == "elem" or torch.equal(lam, lam.flip(0))


def test_draws_of_the_mix_have_timms_distribution():
    drawn = [
        draw_mix(0, 0, slot, height=224, width=224, mixup_alpha=0.2, cutmix_alpha=1.0)
        for slot in range(6000)
    ]
    mixups = [mix.lam for mix in drawn if mix.box is None]
    assert abs(len(mixups) / 6000 - 0.5) < 0.03
    assert stats.kstest(mixups, stats.beta(0.2, 0.2).cdf).pvalue > 0.01
    np.random.seed(0)
    boxes = [
        timm_mixup.cutmix_bbox_and_lam((3, 224, 224), np.random.beta(1, 1)) for _ in range(3000)
    ]
    ours = [mix for mix in drawn if mix.box is not None]
    assert stats.ks_2samp([mix.lam for mix in ours], [lam for _, lam in boxes]).pvalue > 0.01
    for edge in range(4):
        assert (
            stats.ks_2samp([mix.box[edge] for mix in ours], [box[edge] for box, _ in boxes]).pvalue
            > 0.001
        )
    assert all(
        draw_mix(0, 0, slot, height=32, width=32, mixup_alpha=0.2, cutmix_alpha=1.0, prob=0.0)
        == Mix()
        for slot in range(50)
    )
    assert all(
        draw_mix(0, 0, slot, height=32, width=32, mixup_alpha=0.2, cutmix_alpha=0.0).box is None
        for slot in range(50)
    )
    assert all(
        draw_mix(0, 0, slot, height=32, width=32, mixup_alpha=0.0, cutmix_alpha=1.0).box is not None
        for slot in range(50)
    )


def test_erasing_has_timms_distribution():
    boxes = erase_boxes(0, 0, SLOTS, 96, 64, 0.25, 0.02, 1 / 3, 0.3, 1 / 0.3)
    erased = boxes[boxes[:, 1] > 0]
    assert abs(len(erased) / 4000 - 0.25) < 0.02
    import random

    random.seed(0)
    reference = RandomErasing(1.0, mode="const", device="cpu")
    found = []
    for _ in range(1000):
        hit = torch.nonzero(reference(torch.ones(1, 96, 64))[0] == 0)
        found.append([*hit.min(0).values, *hit.max(0).values + 1])
    theirs = np.array(found)[:, [0, 2, 1, 3]]
    areas = [(b[:, 1] - b[:, 0]) * (b[:, 3] - b[:, 2]) for b in (erased, theirs)]
    assert stats.ks_2samp(*areas).pvalue > 0.01
    for edge in range(4):
        assert stats.ks_2samp(erased[:, edge], theirs[:, edge]).pvalue > 0.001


def test_images_are_erased_before_they_are_mixed():
    """As in torchvision's references and in timm without its prefetcher. The mix shows the erased
    boxes of both images."""
    slots = np.arange(8)
    images = torch.randint(
        0, 256, (8, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    transform = BatchTransform(seed=3, mixup_alpha=1.0, erase_prob=1.0)
    mixed, lam = transform(images.clone(), 2, slots)
    erased = normalize(images)
    erase(
        erased,
        erase_boxes(3, 2, slots, 40, 40, 1.0, 0.02, 1 / 3, 0.3, 1 / 0.3),
        "const",
        noise_seed=0,
    )
    assert 0.05 < lam < 0.95 and (erased == 0).any()
    torch.testing.assert_close(mixed, lam * erased + (1 - lam) * erased.flip(0))


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_fills_its_box_and_nothing_else(mode):
    images = torch.full((3, 3, 20, 30), 5.0).contiguous(memory_format=torch.channels_last)
    boxes = np.array([[2, 9, 4, 25], [0, 0, 0, 0], [0, 20, 0, 30]])
    out = erase(images.clone(), boxes, mode, noise_seed=7)
    assert (out[1] == 5).all() and (out[0, :, 9:] == 5).all() and (out[0, :, 2:9, 25:] == 5).all()
    inside = out[0, :, 2:9, 4:25]
    if mode == "const":
        assert (inside == 0).all() and (out[2] == 0).all()
    elif mode == "rand":
        assert (inside == inside[:, :1, :1]).all() and len(inside[:, 0, 0].unique()) == 3
        assert not torch.equal(inside[:, 0, 0], out[2, :, 0, 0])
    else:
        assert abs(out[2].mean()) < 0.1 and abs(out[2].std() - 1) < 0.1
    assert torch.equal(out, erase(images.clone(), boxes, mode, noise_seed=7))
    assert mode == "const" or not torch.equal(out, erase(images.clone(), boxes, mode, noise_seed=8))


def test_a_decay_per_images_does_not_depend_on_the_batch_size():
    """The first weights have the same share after n steps of 8 images and n / 4 steps of 32."""
    from rsb_ffcv.learning.average import decay_of_step

    assert decay_of_step(0.99, 32, 32) == 0.99 and decay_of_step(0.99, 0, 32) == 0.99
    assert decay_of_step(0.99, 32, 8) ** 4 == pytest.approx(0.99) == decay_of_step(0.99, 8, 8)


@pytest.mark.parametrize("warmup", [False, True])
def test_average_equals_timms(warmup):
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(linear, torch.nn.BatchNorm1d(4))
    theirs, ours = ModelEmaV3(model, 0.95, use_warmup=warmup), Ema(model, 0.95, warmup=warmup)
    for step in range(1, 30):
        with torch.no_grad():
            linear.weight.normal_()
        model(torch.randn(8, 4))
        theirs.update(model, step=step)
        ours.update()
        for a, b in zip(theirs.module.state_dict().values(), ours.module.state_dict().values()):
            assert torch.equal(a, b)
