"""Optimizers by name, with weight decay on weights of two or more dimensions only."""

import difflib

import timm.optim
import torch
from torch import nn

from rsb_ffcv import InputError, first_line
from rsb_ffcv.learning.lamb import Lamb


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Returns two parameter groups, with and without weight decay.

    A tensor is excluded from decay by its shape (ndim <= 1) or because it is a `.bias`. Names of
    norm layers are not used: they miss batch norms such as `downsample.1`.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    no_decay = [p for name, p in named if p.ndim <= 1 or name.endswith(".bias")]
    no_decay_ids = {id(p) for p in no_decay}
    decay = [p for _, p in named if id(p) not in no_decay_ids]
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]


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

    Raises InputError if timm has no such optimizer, or if it cannot be built.
    """
    groups = decay_groups(model, weight_decay)
    fused = next(model.parameters()).is_cuda
    if optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=fused)
        # torch's fused step allocates these buffers, and leaves them uninitialized if the first
        # step overflows.
        if momentum:
            for p in model.parameters():
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
