"""Schedule, weight-decay split, average and BlurPool."""
import math

import pytest
import torch
from torch import nn

from rsb_ffcv import InputError
from rsb_ffcv.learning.average import Ema
from rsb_ffcv.learning.model import BlurPoolConv2d, build_model
from rsb_ffcv.learning.optimizer import build_optimizer, decay_groups
from rsb_ffcv.learning.schedule import Schedule


def test_a2_schedule_warms_up_then_falls_to_zero():
    s = Schedule("cosine", 5e-3, 300, 625, 5, 5e-5)
    assert s.lr(0) == 5e-5
    assert s.lr(5 * 625) == 5e-3 == max(s.lr(step) for step in range(0, 300 * 625, 125))
    assert math.isclose(s.lr(5 * 625 // 2 + 1), 0.5 * (5e-5 + 5e-3), rel_tol=1e-3)
    assert math.isclose(s.lr(5 * 625 + 295 * 625 // 2), 2.5e-3, rel_tol=1e-4)
    assert 0 <= s.lr(300 * 625 - 1) < 1e-9 and s.lr(10 ** 9) == s.lr(300 * 625 - 1)


def test_warm_up_never_repeats_and_never_exceeds_the_peak():
    s = Schedule("cosine", 1.0, 10, 100, 2, 0.0)
    rates = [s.lr(step) for step in range(1000)]
    assert all(a < b for a, b in zip(rates[:200], rates[1:201])) and all(a > b for a, b in zip(rates[200:], rates[201:]))


def test_spanning_cosine_is_timms():
    from timm.scheduler import CosineLRScheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=8e-3)
    reference = CosineLRScheduler(optimizer, t_initial=100 * 20, lr_min=1e-5, warmup_t=5 * 20, warmup_lr_init=1e-4,
                                  t_in_epochs=False)
    s = Schedule("cosine_spanning", 8e-3, 100, 20, 5, 1e-4, 1e-5)
    for step in range(2000):
        assert math.isclose(s.lr(step), reference._get_lr(step)[0], rel_tol=1e-9), step


def test_cyclic_and_step_are_ffcv_imagenets():
    import numpy as np

    cyclic = Schedule("cyclic", 1.7, 16, 10, peak_epoch=2)
    for step in range(160):
        ends = np.interp([step // 10, step // 10 + 1], [0, 2, 16], [1e-4 * 1.7, 1.7, 0])
        assert math.isclose(cyclic.lr(step), np.interp(step % 10, [0, 10], ends), rel_tol=1e-9, abs_tol=1e-12)
    step_wise = Schedule("step", 0.5, 70, 4, step_ratio=0.1, step_length=30)
    assert [step_wise.lr(4 * epoch) for epoch in (0, 28, 30, 60)] == pytest.approx([0.5, 0.5, 0.05, 0.005])
    assert step_wise.lr(4 * 69 + 2) == pytest.approx(0.0025)  # towards 0 within the last epoch


def test_resnet50_decays_54_tensors_and_spares_107():
    decayed, spared = decay_groups(build_model("resnet50", 1000), 0.02)
    assert (len(decayed["params"]), len(spared["params"])) == (54, 107)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.02, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])


def test_optimizers_by_name():
    import timm.optim

    model = nn.Linear(3, 3)
    assert type(build_optimizer("sgd", model, 0.1, 0, 0.9)) is torch.optim.SGD
    assert type(build_optimizer("adamw", model, 0.1, 0, 0.9)) is torch.optim.AdamW
    lamb = build_optimizer("lamb", model, 0.1, 0.02, 0.9)
    assert type(lamb) is timm.optim.Lamb and lamb.defaults["max_grad_norm"] == 1.0 and lamb.defaults["eps"] == 1e-6
    assert "lion" in type(build_optimizer("lion", model, 0.1, 0, 0.9)).__name__.lower()
    with pytest.raises(InputError, match="training.optimizer=lam "):
        build_optimizer("lam", model, 0.1, 0, 0.9)


def test_the_average_follows_weights_and_batch_norm_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ema = Ema(model, 0.9)
    expected = None
    for step in range(4):
        with torch.no_grad():
            model[0].weight.normal_()
        model(torch.randn(8, 3, 5, 5) + 3)
        ema.update()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected = state if step == 0 else {
            name: 0.9 * old + 0.1 * state[name] if old.is_floating_point() else state[name]
            for name, old in expected.items()}
    for name, tensor in ema.module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    assert ema.module[1].running_mean.abs().min() > 0.01 and ema.module[1].num_batches_tracked == 4


def test_blurpool_blurs_before_strided_convolutions_only():
    model = build_model("resnet18", 10, blurpool=True)
    wrapped = [module for module in model.modules() if isinstance(module, BlurPoolConv2d)]
    assert len(wrapped) == 6 and all(max(module.conv.stride) > 1 for module in wrapped)
    flat = torch.full((1, wrapped[0].conv.in_channels, 9, 9), 2.0)
    blurred = torch.nn.functional.conv2d(flat, wrapped[0].blur_filter, padding=1, groups=flat.shape[1])
    assert torch.allclose(blurred[:, :, 1:-1, 1:-1], flat[:, :, 1:-1, 1:-1])
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_an_unknown_model_is_named_with_its_neighbours():
    with pytest.raises(InputError, match="model.arch=resnet5 .*resnet50"):
        build_model("resnet5", 10)


def test_a_model_that_cannot_take_the_resolution_is_named():
    from rsb_ffcv.learning.model import check_input_size

    model = build_model("vit_tiny_patch16_224", 10)
    check_input_size(model, "vit_tiny_patch16_224", "validation.resolution", 224)
    assert model.training
    with pytest.raises(InputError, match="validation.resolution=64: vit_tiny_patch16_224 cannot take"):
        check_input_size(model, "vit_tiny_patch16_224", "validation.resolution", 64)
    with pytest.raises(InputError, match="resnet50.nonsense"):
        build_model("resnet50.nonsense", 10)
