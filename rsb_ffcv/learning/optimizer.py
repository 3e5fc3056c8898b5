"""Optimizers by name, with weight decay on weights of two or more dimensions only."""

import difflib

import timm.optim
import torch
from torch import nn

from rsb_ffcv import InputError, first_line
from rsb_ffcv.learning.lamb import Lamb
from rsb_ffcv.learning.layers import lr_scales


def decay_groups(
    model: nn.Module, weight_decay: float, *, layer_decay: float = 1.0, head_lr_scale: float = 1.0
) -> list[dict]:
    """Returns two parameter groups, with and without weight decay, of the parameters that are not
    frozen. With `layer_decay` or `head_lr_scale`, these two for each factor of the learning rate,
    which is the group's "lr_scale".

    A tensor is excluded from decay by its shape (ndim <= 1) or because it is a `.bias`. Names of
    norm layers are not used: they miss batch norms such as `downsample.1`.

    layer_decay, head_lr_scale: see `layers.lr_scales`, which also says when InputError is raised.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scales = lr_scales(model, layer_decay, head_lr_scale)
    groups: list[dict] = []
    for scale in dict.fromkeys(scales[name] for name, _ in named):
        scaled = [(name, p) for name, p in named if scales[name] == scale]
        no_decay = [p for name, p in scaled if p.ndim <= 1 or name.endswith(".bias")]
        no_decay_ids = {id(p) for p in no_decay}
        decay = [p for _, p in scaled if id(p) not in no_decay_ids]
        factor = {"lr_scale": scale} if (layer_decay, head_lr_scale) != (1, 1) else {}
        groups += [
            {"params": decay, "weight_decay": weight_decay, **factor},
            {"params": no_decay, "weight_decay": 0.0, **factor},
        ]
    return groups


def check_optimizer(optimizer: str) -> None:
    """Raises InputError for a name that `build_optimizer` does not support."""
    # adahessian needs second derivatives, which the training step does not provide.
    known = sorted(
        {"sgd", "adamw", "lamb", *map(str, timm.optim.list_optimizers())} - {"adahessian"}
    )
    if optimizer not in known:
        raise InputError(
            f"`optimizer`={optimizer} is not an optimizer of timm, or is not supported here; "
            f"similar names: {', '.join(difflib.get_close_matches(optimizer, known, 5, 0.3))}"
        )


def build_optimizer(
    optimizer: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    layer_decay: float = 1.0,
    head_lr_scale: float = 1.0,
) -> torch.optim.Optimizer:
    """Builds an optimizer by name.

    "sgd" (without Nesterov) and "adamw" are torch's, fused on CUDA. "lamb" is `lamb.Lamb`. Other
    names are timm's. In fp16, the first three handle overflow on the device. With the others, the
    host synchronizes with the device in each step.

    optimizer: its name.
    model: the module whose parameters it updates.
    lr: the peak learning rate.
    weight_decay: for the tensors that `decay_groups` decays.
    momentum: of "sgd" and of timm's optimizers with momentum.
    layer_decay, head_lr_scale: see `decay_groups`. The caller multiplies the learning rate of each
        group by its "lr_scale" in each step.

    Raises InputError if timm has no such optimizer, if it cannot be built, or as `decay_groups`
    does.
    """
    groups = decay_groups(model, weight_decay, layer_decay=layer_decay, head_lr_scale=head_lr_scale)
    fused = next(model.parameters()).is_cuda
    if optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=fused)
        # torch's fused step allocates these buffers, and leaves them uninitialized if the first
        # step overflows.
        if momentum:
            for p in filter(lambda p: p.requires_grad, model.parameters()):
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    if optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    if optimizer == "lamb":
        return Lamb(groups, lr=lr)
    check_optimizer(optimizer)
    try:
        return timm.optim.create_optimizer_v2(
            groups, opt=optimizer, lr=lr, weight_decay=weight_decay, momentum=momentum
        )
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"`optimizer`={optimizer}: cannot be built here ({first_line(error)}); choose another"
        ) from error
