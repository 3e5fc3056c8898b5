"""The layers of a timm model in their order, for fine-tuning: which parameters are its head, what
is frozen, and how the learning rate falls from layer to layer.

Sources matched: `group_parameters` of timm 1.0.31 with the model's `group_matcher`,
`param_groups_layer_decay` (`timm/optim/_param_groups.py`) and `freeze` (`timm/utils/model.py`).
"""

from typing import Any

from timm.models import group_parameters
from timm.models._manipulate import group_with_matcher
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rsb_ffcv import InputError, counted


def head_prefixes(model: Any, needed_by: str = "") -> tuple[str, ...]:
    """What the names of the classifier's parameters begin with: ("fc.",) of a ResNet.

    needed_by: the parameter, with its value, that needs a classifier. Empty: there may be none.

    Raises InputError if it is needed, and timm does not name the model's classifier.
    """
    found = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([found] if isinstance(found, str) else found))
    if needed_by and not any(name.startswith(prefixes) for name, _ in model.named_parameters()):
        raise InputError(
            f"{needed_by}: timm does not name the classifier of this model; use another "
            f"model, or remove this option"
        )
    return prefixes


def _matcher(model: Any, needed_by: str, coarse: bool) -> Any:
    """timm's grouping of the model's layers, for `group_parameters`."""
    if not hasattr(model, "group_matcher"):
        raise InputError(
            f"{needed_by}: timm does not group the layers of this model; use another model, or "
            f"remove this option"
        )
    return model.group_matcher(coarse=coarse)


def lr_scales(model: nn.Module, layer_decay: float, head_lr_scale: float) -> dict[str, float]:
    """The factor of the learning rate of each parameter, by name.

    layer_decay: the factor is layer_decay ** (number of groups after the parameter's), 0 .. 1. The
        groups are timm's: the stem, each block, and the head with all that precedes no block.
    head_lr_scale: additional factor of the classifier head, above 0.

    Raises InputError if timm does not know the model's groups or its classifier.
    """
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    if layer_decay != 1:
        matcher = _matcher(model, f"`layer_decay`={layer_decay:g}", coarse=False)
        groups = group_parameters(model, matcher, reverse=True)
        last = max(groups.values())
        scales = {name: layer_decay ** (last - groups[name]) for name in scales}
    if head_lr_scale != 1:
        head = head_prefixes(model, f"`head_lr_scale`={head_lr_scale:g}")
        scales |= {
            name: scale * head_lr_scale for name, scale in scales.items() if name.startswith(head)
        }
    return scales


def freeze(model: nn.Module, groups: int | str) -> str:
    """Freezes the first layers of `model`: their parameters need no gradient, and their batch norms
    use and keep their running statistics (see `eval_frozen`), as with timm's `freeze`.

    groups: number of first groups, timm's coarse ones: the stem, then each stage of a ResNet or
        each block of a transformer. "backbone": everything but the classifier head.

    Returns a line that says what is frozen. Raises InputError if timm does not know the model's
    groups or its classifier, or if there are fewer groups before the head.
    """
    option = f"`freeze`={groups}"
    head = head_prefixes(model, option)
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    if groups == "backbone":
        frozen = {name for name in names if not name.startswith(head)}
    else:
        group_of = group_with_matcher(
            ((name, None) for name in names), _matcher(model, option, coarse=True), reverse=True
        )
        most = min(group_of[name] for name in names if name.startswith(head))
        if int(groups) > most:
            raise InputError(
                f"{option}: this model has {counted(most, 'group')} before its head; use at most "
                f"{most}, or backbone"
            )
        frozen = {name for name in names if group_of[name] < int(groups)}
    numbers = [0, 0]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
        numbers[name in frozen] += parameter.numel()
    norms = 0
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and f"{name}.running_mean" in frozen:
            setattr(module, "frozen", True)  # noqa: B010 (mypy knows no such attribute)
            norms += 1
    eval_frozen(model)
    return (
        f"frozen: {numbers[True] / 1e6:.2f} of {sum(numbers) / 1e6:.2f} million parameters, "
        f"{counted(norms, 'batch norm')}"
    )


def is_frozen(module: nn.Module) -> bool:
    """Whether `freeze` has frozen this batch norm, or the one that it is a copy of."""
    return getattr(module, "frozen", False)


def eval_frozen(model: nn.Module) -> None:
    """Puts the frozen batch norms of `model` in eval mode; call after each `model.train()`."""
    for module in model.modules():
        if is_frozen(module):
            module.eval()
