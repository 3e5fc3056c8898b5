"""Optimizers by name, with weight decay on weights of two or more dimensions only."""
import difflib

import timm.optim
import torch
from torch import nn

from rsb_ffcv import InputError, first_line


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: decayed, and not. A tensor is spared for its shape (ndim <= 1) or for being a `.bias`,
    never for a norm layer's name, which misses batch norms such as `downsample.1`."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    spared = [p for name, p in named if p.ndim <= 1 or name.endswith(".bias")]
    kept = {id(p) for p in spared}
    return [{"params": [p for _, p in named if id(p) not in kept], "weight_decay": weight_decay},
            {"params": spared, "weight_decay": 0.0}]


def check_optimizer(name: str):
    """Raises InputError for a name that `build_optimizer` does not take."""
    # adahessian differentiates twice, which the training step does not prepare for
    known = sorted({"sgd", "adamw", "lamb", *timm.optim.list_optimizers()} - {"adahessian"})
    if name not in known:
        raise InputError(f"training.optimizer={name} is not an optimizer of timm; "
                         f"near it: {', '.join(difflib.get_close_matches(name, known, 5, 0.3))}")


def build_optimizer(name: str, model: nn.Module, lr: float, weight_decay: float, momentum: float) -> torch.optim.Optimizer:
    """torch's SGD (no Nesterov) and AdamW; timm's Lamb (gradients clipped to a global norm of 1, bias correction, trust
    ratio on decayed groups); any other optimizer by timm's name for it."""
    groups = decay_groups(model, weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    if name == "lamb":
        return timm.optim.Lamb(groups, lr=lr)
    check_optimizer(name)
    try:
        return timm.optim.create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=weight_decay, momentum=momentum)
    except (AssertionError, ImportError, RuntimeError) as error:
        raise InputError(f"training.optimizer={name}: cannot be built here ({first_line(error)}); "
                         f"choose another") from error
