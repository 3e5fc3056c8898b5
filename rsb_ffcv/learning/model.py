"""The network: any model of timm, by name, optionally with ffcv-imagenet's BlurPool."""

from typing import Any, cast

import timm
import torch
from torch import nn
from torch.nn import functional as F

from rsb_ffcv import InputError, first_line


def check_arch(arch: str) -> None:
    """Raises InputError, with similar names, if timm has no model `arch`."""
    if not timm.is_model(arch):
        near = timm.list_models(f"*{arch[:4]}*")[:5]
        raise InputError(
            f"`arch`={arch} is not a model of timm {timm.__version__}"
            + (
                f"; similar names: {', '.join(near)}"
                if near
                else "; timm.list_models() lists all names"
            )
        )


def build_model(
    arch: str,
    num_classes: int,
    *,
    pretrained: bool = False,
    drop_path: float = 0.0,
    zero_init_last: bool = True,
    blurpool: bool = False,
    grad_checkpointing: bool = False,
    mean: tuple | None = None,
) -> nn.Module:
    """A float32 module (n, 3, H, W) -> (n, num_classes).

    arch: a model name of timm.
    num_classes: number of outputs.
    pretrained: load timm's published weights, which are downloaded if they are not cached.
    drop_path: stochastic depth rate.
    zero_init_last: initialize gamma of each residual block's last batch norm to 0 (ResNets; timm's
        default for them).
    blurpool: apply `add_blurpool`.
    grad_checkpointing: compute activations again in the backward pass, as the model's
        `set_grad_checkpointing` does, instead of storing them. A repeated forward pass also updates
        batch-norm statistics; see training.batch_norm.
    mean: the mean that images are normalized with. Published weights must use the same one.

    Raises InputError if timm has no such model, if the weights cannot be downloaded or expect
    another mean, or if the model does not support `grad_checkpointing`.
    """
    check_arch(arch)
    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    if not zero_init_last:
        options["zero_init_last"] = False
    try:
        model = timm.create_model(arch, pretrained=pretrained, num_classes=num_classes, **options)
    except TypeError as error:
        raise InputError(
            f"`arch`={arch} does not take {', '.join(options)}; remove that option"
        ) from error
    except (OSError, RuntimeError) as error:
        what = "the weights cannot be loaded" if pretrained else "the model cannot be built"
        raise InputError(
            f"`arch`={arch}, `pretrained`={int(pretrained)}: {what} ({first_line(error)}); "
            f"connect to the network, or choose another model"
        ) from error
    # All of timm's models have a pretrained_cfg.
    expected: Any = cast(dict[str, Any], model.pretrained_cfg).get("mean", mean)
    if pretrained and mean is not None and tuple(expected) != tuple(mean):
        raise InputError(
            f"`arch`={arch}: its published weights expect images normalized with mean "
            f"{expected}, but this program uses {mean}; choose another model or use `pretrained`=0"
        )
    if blurpool:
        add_blurpool(model)
    if grad_checkpointing:
        try:
            cast(Any, model).set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:  # timm's two ways to say no
            raise InputError(
                f"`grad_checkpointing`=1: timm does not support it for `arch`={arch}; use 0, and a "
                f"smaller batch if the memory does not suffice"
            ) from error
    return model


@torch.no_grad()
def check_input_size(model: nn.Module, arch: str, side: int) -> None:
    """Raises InputError if `model` cannot take images of `side` x `side` pixels."""
    was_training = model.training
    try:
        model.eval()(torch.zeros(1, 3, side, side))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"`side`={side}: {arch} cannot take images of this size ({first_line(error)}); choose "
            f"another resolution or model"
        ) from error
    finally:
        model.train(was_training)


class BlurPoolConv2d(nn.Module):
    """A strided convolution after a fixed 3 x 3 binomial blur (Zhang, "Making convolutional
    networks shift-invariant again", ICML 2019; as libffcv/ffcv-imagenet applies it)."""

    blur_filter: torch.Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
        self.conv = conv
        self.register_buffer("blur_filter", kernel.repeat(conv.in_channels, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.conv2d(x, self.blur_filter, padding=1, groups=self.conv.in_channels))


def add_blurpool(module: nn.Module) -> None:
    """Wraps every strided convolution in `module` with 16 or more input channels, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= 16:
            setattr(module, name, BlurPoolConv2d(child))
        else:
            add_blurpool(child)
