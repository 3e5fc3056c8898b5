"""LAMB equals timm's over many steps and settings."""

import copy
from typing import Any

import pytest
import timm.optim
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rsb_ffcv import InputError
from rsb_ffcv.learning.lamb import Lamb
from rsb_ffcv.learning.model import build_model
from rsb_ffcv.learning.optimizer import decay_groups

SETTINGS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "no clip": {"max_grad_norm": None},
    "small clip": {"max_grad_norm": 1e-3},
    "trust clip": {"trust_clip": True},
    "always": {"always_adapt": True},
    "decoupled": {"decoupled_decay": True},
    "no averaging": {"grad_averaging": False},
    "no correction": {"bias_correction": False},
    "all": {
        "always_adapt": True,
        "trust_clip": True,
        "decoupled_decay": True,
        "betas": (0.8, 0.99),
        "eps": 1e-8,
    },
}
SHAPES = [(64, 32, 3, 3), (10, 64), (64,), (10,), (1,), (7, 5)]


def pair(make_theirs, make_ours, seed=0):
    """Returns two optimizers over equal parameters, with and without weight decay."""
    torch.manual_seed(seed)
    values = [torch.randn(shape) * 0.1 for shape in SHAPES]
    values[5].zero_()  # a weight of norm 0 has trust ratio 1
    both = []
    for make in (make_theirs, make_ours):
        params = [nn.Parameter(value.clone()) for value in values]
        both.append(
            make(
                [
                    {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.02},
                    {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
                ]
            )
        )
    return both


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def steps(count, *optimizers, start=0):
    for step in range(start, start + count):
        torch.manual_seed(1000 + step)
        for mine, *others in zip(*(parameters(optimizer) for optimizer in optimizers)):
            mine.grad = torch.randn_like(mine) * 10 ** float(torch.randint(-4, 2, ()))
            for other in others:
                other.grad = mine.grad.clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.005 * (1 + step % 7)
            optimizer.step()


def assert_equal(theirs, ours, tolerance=1e-6):
    for a, b in zip(parameters(theirs), parameters(ours)):
        assert (a - b).norm() <= tolerance * a.norm(), (a.shape, float((a - b).norm() / a.norm()))
        torch.testing.assert_close(b, a, rtol=2e-5, atol=tolerance * float(a.detach().abs().max()))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("foreach", [False, True])
def test_fifty_steps_equal_timms(settings, foreach):
    theirs, ours = pair(
        lambda groups: timm.optim.Lamb(groups, lr=0.005, foreach=foreach, **SETTINGS[settings]),
        lambda groups: Lamb(groups, lr=0.005, **SETTINGS[settings]),
    )
    steps(50, theirs, ours)
    assert_equal(theirs, ours)


def test_state_dicts_are_exchangeable_with_timms():
    theirs, ours = pair(
        lambda groups: timm.optim.Lamb(groups, lr=0.005), lambda groups: Lamb(groups, lr=0.005)
    )
    steps(10, theirs, ours)
    swapped_theirs, swapped_ours = copy.deepcopy(theirs), copy.deepcopy(ours)
    # copies, because torch's load_state_dict shares the tensors
    swapped_theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    swapped_ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for group in swapped_ours.param_groups:
        assert group["step"] == 10
    steps(10, theirs, ours, swapped_theirs, swapped_ours, start=10)
    for other in (ours, swapped_theirs, swapped_ours):
        assert_equal(theirs, other, 2e-6)
    cautious = pair(lambda groups: timm.optim.Lamb(groups, lr=0.005, caution=True), Lamb)[0]
    with pytest.raises(InputError, match="caution"):
        ours.load_state_dict(cautious.state_dict())


class Launches(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_resnet50_needs_a_fifth_of_the_launches_of_timms_loop():
    model = build_model("resnet50", 1000)
    counts = []
    for make in (lambda groups: timm.optim.Lamb(groups, foreach=False), Lamb):
        optimizer = make(decay_groups(model, 0.02))
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()
        with Launches() as launches:
            optimizer.step()
        counts.append(launches.count)
    assert counts[1] * 5 <= counts[0], counts


def test_an_overflowed_step_changes_nothing_and_is_not_counted():
    """With torch.amp.GradScaler, which passes found_inf and the scale to the optimizer."""
    theirs, ours = pair(
        lambda groups: timm.optim.Lamb(groups, lr=0.005), lambda groups: Lamb(groups, lr=0.005)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(20):
        torch.manual_seed(step)
        scale = scaler.get_scale() if step else 1024.0
        overflows = step % 5 == 2
        before = (
            [p.clone() for p in parameters(ours)],
            [copy.deepcopy(ours.state[p]) for p in parameters(ours)],
        )
        scaler.scale(torch.zeros(1))  # as for a loss, so that the scale exists
        for mine, other in zip(parameters(ours), parameters(theirs)):
            other.grad = torch.randn_like(other)
            mine.grad = other.grad * scale
            if overflows and mine.ndim == 4:
                mine.grad[0, 0, 0, 0], mine.grad[1, 0, 0, 0] = float("inf"), float("nan")
        scaler.step(ours)
        scaler.update()
        if overflows:
            assert all(torch.equal(a, b) for a, b in zip(before[0], parameters(ours)))
            assert all(
                torch.equal(state[name], ours.state[p][name])
                for state, p in zip(before[1], parameters(ours))
                for name in state
            )
            assert scaler.get_scale() == scale / 2
        else:
            theirs.step()
    assert_equal(theirs, ours)
    assert all(float(group["step"]) == 16 for group in ours.param_groups)
