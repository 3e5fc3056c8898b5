"""Layer-wise learning rates, frozen layers and gradient checkpointing, as timm has them."""

import copy
from typing import Any

import pytest
import timm
import timm.utils
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from rsb_ffcv import InputError
from rsb_ffcv.learning.average import Ema, Swa, batch_norms
from rsb_ffcv.learning.layers import eval_frozen, freeze, lr_scales
from rsb_ffcv.learning.model import build_model
from rsb_ffcv.learning.optimizer import build_optimizer, decay_groups
from rsb_ffcv.training.batch_norm import RunningStatistics


@pytest.mark.parametrize("arch", ["resnet50", "test_vit", "test_convnext"])
def test_layer_decay_groups_equal_timms(arch):
    model = build_model(arch, 10)
    freeze(model, 1)

    def by_parameter(groups):
        return {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}

    ours = by_parameter(decay_groups(model, 0.05, layer_decay=0.65))
    theirs = by_parameter(param_groups_layer_decay(model, 0.05, layer_decay=0.65))
    biases = {id(p) for n, p in model.named_parameters() if n.endswith(".bias") and p.ndim > 1}
    assert ours.keys() == theirs.keys() and not biases
    assert ours == theirs
    assert len({scale for scale, _ in ours.values()}) > 3


def test_head_factor_multiplies_the_decay():
    model = build_model("resnet50", 10)
    scales = lr_scales(model, 0.5, 10.0)
    assert scales["fc.weight"] == scales["fc.bias"] == 10
    assert scales["layer4.2.conv1.weight"] == 0.5 and scales["conv1.weight"] == 0.5**17
    assert set(lr_scales(model, 1.0, 10.0).values()) == {1.0, 10.0}
    assert "lr_scale" not in decay_groups(model, 0.02)[0]


@pytest.mark.parametrize(
    "arch, groups, names",
    [
        ("test_resnet", 1, ["conv1", "bn1"]),
        ("test_resnet", 3, ["conv1", "bn1", "layer1", "layer2"]),
    ],
)
def test_freezing_equals_timms(arch, groups, names):
    torch.manual_seed(0)
    ours = build_model(arch, 10)
    for norm in batch_norms(ours):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    theirs = copy.deepcopy(ours)
    timm.utils.freeze(theirs, names)
    line = freeze(ours, groups)
    frozen = [name for name, p in ours.named_parameters() if not p.requires_grad]
    assert frozen and frozen == [
        name for name, _ in ours.named_parameters() if name.split(".")[0] in names
    ]
    size = sum(p.numel() for p in ours.parameters() if not p.requires_grad) / 1e6
    assert line.startswith(f"frozen: {size:.2f} of ") and line.endswith(" batch norms")
    before = copy.deepcopy(ours.state_dict())
    images = torch.randn(4, 3, 64, 64)
    ours.train()
    eval_frozen(ours)
    results = []
    for model in (ours, theirs.train()):
        output = model(images)
        output.square().mean().backward()
        results.append(output)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    gradients: Any = dict(theirs.named_parameters())
    changed = set()
    for name, p in ours.named_parameters():
        assert (p.grad is None) == (name in frozen)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, gradients[name].grad, rtol=1e-2, atol=1e-4)
    changed = {name for name, value in ours.state_dict().items() if (value != before[name]).any()}
    statistics = {
        name for name in before if name.endswith(("running_mean", "running_var", "batches_tracked"))
    }
    assert changed == {name for name in statistics if name.split(".")[0] not in names}


@pytest.mark.parametrize(
    "arch, trained", [("test_resnet", 2), ("test_vit", 2), ("test_convnext", 2)]
)
def test_frozen_backbone_leaves_the_classifier(arch, trained):
    model: Any = build_model(arch, 10)
    freeze(model, "backbone")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == trained
    assert all(name.startswith(model.pretrained_cfg["classifier"]) for name in names)
    assert not batch_norms(model)


@pytest.mark.parametrize("groups", [1, 2])
def test_frozen_statistics_do_not_change_in_a_step_or_in_swa(groups):
    torch.manual_seed(0)
    model = build_model("test_resnet", 10)
    for norm in batch_norms(model):
        nn.init.uniform_(norm.running_mean)
    freeze(model, 2)
    norms = dict(model.named_modules())
    before = copy.deepcopy(model.state_dict())
    swa, ema = Swa(model), Ema(model, 0.9)
    statistics = RunningStatistics(model, groups, groups)
    model.train()
    eval_frozen(model)
    for number in range(groups):
        statistics.begin_group(number)
        model(torch.randn(4, 3, 32, 32))
    statistics.end_step()
    swa.update()
    ema.update()
    swa.begin_batch_norm()
    swa.module(torch.randn(4, 3, 32, 32))
    swa.end_batch_norm()
    for state in (model.state_dict(), swa.module.state_dict(), ema.module.state_dict()):
        for name in before:
            if name.endswith("running_mean"):
                frozen = name.startswith(("conv1", "bn1", "layer1"))
                assert torch.equal(state[name], before[name]) == frozen, name
                assert norms[name.removesuffix(".running_mean")].training != frozen


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb", "lion"])
def test_optimizers_step_and_reload_with_frozen_layers_and_factors(optimizer):
    def made():
        torch.manual_seed(0)
        model = build_model("test_resnet", 10, zero_init_last=False)
        freeze(model, 2)
        return model, build_optimizer(
            optimizer,
            model,
            lr=0.1,
            weight_decay=0.02,
            momentum=0.9,
            layer_decay=0.5,
            head_lr_scale=4.0,
        )

    model, built = made()
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    built.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad), name
    _, other = made()
    other.load_state_dict(copy.deepcopy(built.state_dict()))
    scales = [group["lr_scale"] for group in other.param_groups]
    assert scales == [group["lr_scale"] for group in built.param_groups]
    assert set(scales) == {4.0, 0.5, 0.25, 0.125}


@pytest.mark.parametrize(
    "arch, side, block, groups",
    [
        ("test_resnet", 32, "layer2.0.conv1", 1),
        ("test_resnet", 32, "layer2.0.conv1", 2),
        ("test_vit", 160, "blocks.1.norm1", 1),  # no batch norms
    ],
)
def test_gradient_checkpointing_changes_no_bit(arch, side, block, groups):
    results = []
    passes: list[bool] = []
    for on in (False, True):
        torch.manual_seed(0)
        model: Any = build_model(arch, 10, drop_path=0.2, grad_checkpointing=on).train()
        statistics = RunningStatistics(model, groups, groups, repeated=on)
        model.get_submodule(block).register_forward_hook(lambda *_, on=on: passes.append(on))
        for number in range(groups):
            statistics.begin_group(number)
            loss = model(torch.randn(4, 3, side, side)).square().mean()
            with statistics.backward():
                loss.backward()
        statistics.end_step()
        assert passes.count(on) == groups * (2 if on else 1)
        results.append((model.state_dict(), {n: p.grad for n, p in model.named_parameters()}))
    for plain, repeated in zip(*results):
        assert all(torch.equal(value, repeated[name]) for name, value in plain.items())


def test_models_without_support_are_errors_that_name_the_option():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    for call, message in (
        (lambda: freeze(plain, "backbone"), "`freeze`=backbone: timm does not name the classifier"),
        (lambda: lr_scales(plain, 0.5, 1.0), "`layer_decay`=0.5: timm does not group the layers"),
        (lambda: lr_scales(plain, 1.0, 2.0), "`head_lr_scale`=2: timm does not name the"),
        (
            lambda: build_model("inception_v3", 10, grad_checkpointing=True),
            "`grad_checkpointing`=1: timm does not support it for `arch`=inception_v3; use 0",
        ),
        (
            lambda: freeze(build_model("test_resnet", 10), 6),
            "`freeze`=6: this model has 5 groups before its head; use at most 5, or backbone",
        ),
    ):
        with pytest.raises(InputError, match=f"^{message}") as caught:
            call()
        assert "\n" not in str(caught.value)
    named: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    named.pretrained_cfg = {"classifier": "1"}
    with pytest.raises(InputError, match="`freeze`=1: timm does not group the layers"):
        freeze(named, 1)
    assert timm.is_model("inception_v3")
