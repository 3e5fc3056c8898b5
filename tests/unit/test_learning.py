"""Schedules, weight decay groups, weight averages, optimizers and BlurPool."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from rsb_ffcv import InputError
from rsb_ffcv.learning.average import Ema, Swa
from rsb_ffcv.learning.loss import Loss
from rsb_ffcv.learning.model import BlurPoolConv2d, build_model
from rsb_ffcv.learning.optimizer import build_optimizer, decay_groups
from rsb_ffcv.learning.schedule import Schedule


def test_a2_schedule_warms_up_then_falls_to_zero():
    s = Schedule(
        kind="cosine", peak=5e-3, epochs=300, steps_per_epoch=625, warmup_epochs=5, warmup_lr=5e-5
    )
    assert s.lr(0) == 5e-5
    assert s.lr(5 * 625) == 5e-3 == max(s.lr(step) for step in range(0, 300 * 625, 125))
    assert math.isclose(s.lr(5 * 625 // 2 + 1), 0.5 * (5e-5 + 5e-3), rel_tol=1e-3)
    assert math.isclose(s.lr(5 * 625 + 295 * 625 // 2), 2.5e-3, rel_tol=1e-4)
    assert 0 <= s.lr(300 * 625 - 1) < 1e-9 and s.lr(10**9) == s.lr(300 * 625 - 1)


def test_warmup_rises_strictly_to_the_peak():
    s = Schedule(
        kind="cosine", peak=1.0, epochs=10, steps_per_epoch=100, warmup_epochs=2, warmup_lr=0.0
    )
    rates = [s.lr(step) for step in range(1000)]
    assert all(a < b for a, b in zip(rates[:200], rates[1:201])) and all(
        a > b for a, b in zip(rates[200:], rates[201:])
    )


def test_spanning_cosine_equals_timm():
    from timm.scheduler import CosineLRScheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=8e-3)
    reference = CosineLRScheduler(
        optimizer,
        t_initial=100 * 20,
        lr_min=1e-5,
        warmup_t=5 * 20,
        warmup_lr_init=1e-4,
        t_in_epochs=False,
    )
    s = Schedule(
        kind="cosine_spanning",
        peak=8e-3,
        epochs=100,
        steps_per_epoch=20,
        warmup_epochs=5,
        warmup_lr=1e-4,
        min_lr=1e-5,
    )
    for step in range(2000):
        assert math.isclose(s.lr(step), reference._get_lr(step)[0], rel_tol=1e-9), step


def test_cyclic_and_step_equal_ffcv_imagenet():
    import numpy as np

    cyclic = Schedule(kind="cyclic", peak=1.7, epochs=16, steps_per_epoch=10, peak_epoch=2)
    for step in range(160):
        ends = np.interp([step // 10, step // 10 + 1], [0, 2, 16], [1e-4 * 1.7, 1.7, 0])
        assert math.isclose(
            cyclic.lr(step), np.interp(step % 10, [0, 10], ends), rel_tol=1e-9, abs_tol=1e-12
        )
    step_wise = Schedule(
        kind="step", peak=0.5, epochs=70, steps_per_epoch=4, step_ratio=0.1, step_length=30
    )
    assert [step_wise.lr(4 * epoch) for epoch in (0, 28, 30, 60)] == pytest.approx(
        [0.5, 0.5, 0.05, 0.005]
    )
    assert step_wise.lr(4 * 69 + 2) == pytest.approx(0.0025)  # towards 0 within the last epoch


def test_resnet50_decays_54_tensors_and_excludes_107():
    decayed, spared = decay_groups(build_model("resnet50", 1000), 0.02)
    assert (len(decayed["params"]), len(spared["params"])) == (54, 107)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.02, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])


def test_build_optimizer_by_name():
    from rsb_ffcv.learning.lamb import Lamb

    model = nn.Linear(3, 3)
    assert (
        type(build_optimizer("sgd", model, lr=0.1, weight_decay=0, momentum=0.9)) is torch.optim.SGD
    )
    assert (
        type(build_optimizer("adamw", model, lr=0.1, weight_decay=0, momentum=0.9))
        is torch.optim.AdamW
    )
    lamb = build_optimizer("lamb", model, lr=0.1, weight_decay=0.02, momentum=0.9)
    assert (
        type(lamb) is Lamb
        and lamb.defaults["max_grad_norm"] == 1.0
        and lamb.defaults["eps"] == 1e-6
    )
    assert (
        "lion"
        in type(
            build_optimizer("lion", model, lr=0.1, weight_decay=0, momentum=0.9)
        ).__name__.lower()
    )
    with pytest.raises(InputError, match="`optimizer`=lam "):
        build_optimizer("lam", model, lr=0.1, weight_decay=0, momentum=0.9)


def test_ema_averages_weights_and_batch_norm_statistics():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    model = nn.Sequential(conv, nn.BatchNorm2d(4))
    ema = Ema(model, 0.9)
    expected: dict[str, torch.Tensor] = {}
    for step in range(4):
        with torch.no_grad():
            conv.weight.normal_()
        model(torch.randn(8, 3, 5, 5) + 3)
        ema.update()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected = (
            state
            if step == 0
            else {
                name: 0.9 * old + 0.1 * state[name] if old.is_floating_point() else state[name]
                for name, old in expected.items()
            }
        )
    for name, tensor in ema.module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    norm: Any = ema.module.get_submodule("1")
    assert norm.running_mean.abs().min() > 0.01 and norm.num_batches_tracked == 4


def test_blurpool_blurs_before_strided_convolutions_only():
    model = build_model("resnet18", 10, blurpool=True)
    wrapped = [module for module in model.modules() if isinstance(module, BlurPoolConv2d)]
    assert len(wrapped) == 6 and all(max(module.conv.stride) > 1 for module in wrapped)
    flat = torch.full((1, wrapped[0].conv.in_channels, 9, 9), 2.0)
    blurred = torch.nn.functional.conv2d(
        flat, wrapped[0].blur_filter, padding=1, groups=flat.shape[1]
    )
    assert torch.allclose(blurred[:, :, 1:-1, 1:-1], flat[:, :, 1:-1, 1:-1])
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_unknown_model_error_suggests_similar_names():
    with pytest.raises(InputError, match="`arch`=resnet5 .*resnet50"):
        build_model("resnet5", 10)


def test_model_that_rejects_the_resolution_is_named():
    from rsb_ffcv.learning.model import check_input_size

    model = build_model("vit_tiny_patch16_224", 10)
    check_input_size(model, "vit_tiny_patch16_224", 224)
    assert model.training
    with pytest.raises(InputError, match="`side`=64: vit_tiny_patch16_224 cannot take"):
        check_input_size(model, "vit_tiny_patch16_224", 64)
    with pytest.raises(InputError, match="resnet50.nonsense"):
        build_model("resnet50.nonsense", 10)


# kind -> (epoch of 20, learning rate), computed by hand or with the sources named in `Schedule`
GOLDEN = {
    "cosine": [(0, 0.01), (2, 1.0), (11, 0.55), (20, 0.1)],
    "polynomial": [(0, 0.01), (2, 1.0), (11, 0.325), (20, 0.1)],
    "cosine_spanning": [(0, 0.01), (2, 0.977975), (10, 0.55), (20, 0.1)],
    "constant": [(0, 0.01), (2, 1.0), (20, 1.0)],
    "cyclic": [(0, 1e-4), (4, 1.0), (12, 0.5), (20, 0.0)],
    "step": [(0, 1.0), (7, 1.0), (8, 0.1), (16, 0.01)],
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_learning_rates_equal_golden_values(kind):
    s = Schedule(
        kind=kind,
        peak=1.0,
        epochs=20,
        steps_per_epoch=1000,
        warmup_epochs=2,
        warmup_lr=0.01,
        min_lr=0.1,
        peak_epoch=4,
        step_ratio=0.1,
        step_length=8,
        power=2.0,
    )
    for epoch, rate in GOLDEN[kind]:
        assert s.lr(1000 * epoch) == pytest.approx(rate, abs=2e-3 if epoch == 20 else 1e-6), epoch


def test_swa_tail_falls_to_its_rate_and_stays():
    s = Schedule(
        kind="cosine",
        peak=0.1,
        epochs=100,
        steps_per_epoch=10,
        swa_epochs=10,
        swa_lr=0.001,
        swa_anneal_epochs=2,
    )
    plain = Schedule(kind="cosine", peak=0.1, epochs=100, steps_per_epoch=10)
    assert [s.lr(step) for step in range(901)] == [plain.lr(step) for step in range(901)]
    tail = [s.lr(step) for step in range(900, 1000)]
    assert all(a >= b for a, b in zip(tail, tail[1:])) and set(tail[20:]) == {0.001}
    assert tail[10] == pytest.approx((plain.lr(900) + 0.001) / 2)
    assert s.before_swa == plain.lr(900)


def test_ema_skip_on_the_device_equals_skip_on_the_host():
    torch.manual_seed(0)
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear, nn.BatchNorm1d(4))
    for warmup in (False, True):
        host, device = Ema(model, 0.9, warmup=warmup), Ema(model, 0.9, warmup=warmup)
        for step in range(12):
            with torch.no_grad():
                linear.weight.normal_()
            overflowed = step in (0, 3, 4)
            if not overflowed:
                host.update()
            device.update(torch.tensor(float(overflowed)))
        assert device.state_dict()["updates"] == host.updates == 9
        for a, b in zip(host.module.state_dict().values(), device.module.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_ema_buffers_are_averaged_or_copied():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    lerped, copied = Ema(model, 0.9), Ema(model, 0.9, buffers="copy")
    for _ in range(4):
        model(torch.randn(2, 3, 8, 8) + 5)
        lerped.update()
        copied.update()
    own, mean, copy = (
        m.get_buffer("1.running_mean") for m in (model, lerped.module, copied.module)
    )
    assert torch.equal(copy, own) and not torch.allclose(mean, own)
    for average in (lerped, copied):
        assert average.module.get_buffer("1.num_batches_tracked") == 4


def test_swa_and_its_batch_norm_equal_torch():
    from torch.optim.swa_utils import AveragedModel, update_bn

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=0.3)
    )
    ours, theirs = Swa(model), AveragedModel(model)
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update()
        theirs.update_parameters(model)
    images = [torch.randn(4, 3, 9, 9) * number for number in range(1, 7)]
    update_bn(images, theirs)
    ours.begin_batch_norm()
    with torch.no_grad():
        for batch in images[:3]:
            ours.module(batch)
        ours.rounds = 3
        resumed = Swa(model)  # interrupted here, and resumed from its state
        resumed.load_state_dict(ours.state_dict())
        resumed.resume_batch_norm()
        for batch in images[3:]:
            resumed.module(batch)
    resumed.end_batch_norm()
    for (name, a), b in zip(
        theirs.module.state_dict().items(), resumed.module.state_dict().values()
    ):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=name)
    momenta = [resumed.module.get_submodule(name).momentum for name in ("1", "3")]
    assert momenta == [0.1, 0.3] and not resumed.module.training


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("overflows", [(), (0,), (0, 1), (3,)])
def test_overflowed_steps_leave_no_trace_in_any_optimizer(name, overflows):
    """As with fused CUDA steps, the scaler reports the overflow on the device. The result equals a
    run of only the other steps."""

    def run(steps, scaled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 4))
        optimizer: Any = build_optimizer(name, model, lr=0.01, weight_decay=0.02, momentum=0.9)
        for group in optimizer.param_groups:
            group["fused"] = group.get("fused") is not None and scaled
        optimizer._step_supports_amp_scaling = scaled
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator) * (
                    scaler.scale(torch.ones(())) if scaled else 1
                )
                if scaled and step in overflows:
                    parameter.grad[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        return [parameter.detach() for parameter in model.parameters()]

    # Fill memory with NaN and free it: a read of uninitialized memory then shows
    spoiled = [torch.full((2000,), float("nan")) for _ in range(50)]
    del spoiled
    ours, plain = (
        run(range(6), True),
        run([step for step in range(6) if step not in overflows], False),
    )
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("decay, warmup", [(0.9, False), (0.99, True), (0.5, True)])
def test_initial_share_is_the_weight_of_the_first_weights(decay, warmup):
    """The weight is 1 at the first update and 0 afterwards, so that its average is the share."""
    model = nn.Linear(1, 1, bias=False).double()
    ema = Ema(model, decay, warmup=warmup)
    for update in range(40):
        nn.init.constant_(model.weight, float(update == 0))
        ema.update()
        assert ema.initial_share() == pytest.approx(
            ema.module.get_parameter("weight").item(), rel=1e-9
        ), update
    nn.init.constant_(model.weight, 1.0)
    ema.restart()
    assert ema.initial_share() == 1.0


def test_a2_average_is_checked_from_epoch_74():
    """With an EMA of 0.9999 without warm-up and 625 steps per epoch, the share falls below 1 % in
    epoch 74. The health check checks the average from that epoch on."""
    ema = Ema(nn.Linear(1, 1), 0.9999)
    shares = []
    for ema.updates in (625 * 20, 625 * 73, 625 * 74):
        shares.append(ema.initial_share())
    assert shares[0] > 0.28 and shares[1] > 0.01 > shares[2]


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: Schedule(kind="cosin", peak=1.0, epochs=2, steps_per_epoch=2),
            "`kind`='cosin': must be one of cosine, cosine_spanning,",
        ),
        (lambda: Loss(kind="bcee"), "`kind`='bcee': must be one of bce, ce, auto"),
        (
            lambda: Ema(nn.Linear(1, 1), 0.9, buffers="avg"),
            "`buffers`='avg': must be one of lerp, copy",
        ),
    ],
)
def test_unknown_kinds_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()
