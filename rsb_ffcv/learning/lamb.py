"""LAMB over lists of tensors: few kernel launches per step, and no synchronization with the host.

Source matched: `Lamb` of timm 1.0.31 (`timm/optim/lamb.py`, aa4b5850), which follows NVIDIA's
NvLamb: gradients clipped to a global norm of 1, bias correction, weight decay inside the update, a
trust ratio for groups with weight decay.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from rsb_ffcv import InputError

CACHED_NUMBERS = 1 << 21  # parameters: 32 MB with their gradients and moments


class Lamb(Optimizer):
    """You et al., "Large Batch Optimization for Deep Learning" (ICLR 2020).

    params: parameters or parameter groups.
    lr: learning rate.
    betas: decay of the two moments.
    eps: added to the root of the second moment.
    weight_decay: coefficient of the weights, which are added to the update.
    bias_correction: divide the moments by 1 - beta ** step.
    grad_averaging: multiply the gradient by 1 - beta1.
    max_grad_norm: largest norm of all gradients together; None: no clip.
    trust_clip: limit trust ratios to 1 (LAMBC).
    always_adapt: use trust ratios for groups without weight decay too.
    decoupled_decay: multiply the weights by 1 - lr x weight_decay instead, as in AdamW.

    A state_dict can be loaded into timm's Lamb, and timm's into this one. A state that uses
    `caution` or `corrected_weight_decay` raises InputError. `step` overwrites the gradients.
    """

    # torch.amp.GradScaler then passes found_inf and the scale to `step`, on the device, instead of
    # waiting for their values.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        max_grad_norm: float | None = 1.0,
        trust_clip: bool = False,
        always_adapt: bool = False,
        decoupled_decay: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "grad_averaging": grad_averaging,
                "max_grad_norm": max_grad_norm,
                "trust_clip": trust_clip,
                "always_adapt": always_adapt,
                "decoupled_decay": decoupled_decay,
            },
        )

    def __setstate__(self, state: dict[str, Any]) -> None:  # load_state_dict and copy call it
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("caution", "corrected_weight_decay"):
                if group.get(name):
                    raise InputError(
                        f"optimizer state: uses timm's {name}, which this Lamb does not support; "
                        f"use timm's Lamb"
                    )
            if "step" in group:
                group["step"] = float(group["step"])

    def state_dict(self) -> dict[str, Any]:
        """In timm's form: the step is a tensor."""
        state = super().state_dict()
        for group in state["param_groups"]:
            if "step" in group:
                group["step"] = torch.tensor(float(group["step"]))
        return state

    @torch.no_grad()
    def step(  # type: ignore[override]  # one signature for torch's two overloads
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Updates the parameters. Returns the loss of `closure`, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p.grad.is_sparse:
                    raise RuntimeError("Lamb does not take sparse gradients")
                if not self.state[p]:
                    self.state[p] = {
                        name: torch.zeros_like(p, memory_format=torch.preserve_format)
                        for name in ("exp_avg", "exp_avg_sq")
                    }
            work.append((group, params, [p.grad for p in params]))
        grads = [grad for _, _, group_grads in work for grad in group_grads]
        if not grads:
            return loss
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        applied = None  # on the device: 1 if the step counts, 0 if the gradients overflowed
        if found_inf is not None:
            applied = 1 - found_inf.to(grads[0].device)
            scale = None if scale is None else scale.to(grads[0].device)
        _prepare(grads, applied, scale, limit=self.defaults["max_grad_norm"])
        for group, params, group_grads in work:
            self._step_group(group, params, group_grads, applied=applied)
        return loss

    def _step_group(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        *,
        applied: torch.Tensor | None,
    ) -> None:
        if applied is not None and not isinstance(group.get("step", 0.0), torch.Tensor):
            group["step"] = torch.full_like(applied, group.get("step", 0.0), dtype=torch.float64)
        group["step"] = group.get("step", 0.0) + (1 if applied is None else applied)
        if not params:
            return
        step, (beta1, beta2), lr = group["step"], group["betas"], group["lr"]
        bias_correction1, bias_correction2 = (
            (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
        )
        if applied is not None:  # as tensors, because it is on the device
            device = params[0].device
            bias_correction1, bias_correction2, lr = (
                value.float()
                if isinstance(value, torch.Tensor)
                else torch.full((), value, device=device)
                for value in (bias_correction1, bias_correction2, lr)
            )
            bias_correction1 = torch.where(applied > 0, bias_correction1, 1.0)
            bias_correction2 = torch.where(applied > 0, bias_correction2, 1.0)
        for chunk in _chunks(params):
            states = [self.state[p] for p in params[chunk]]
            _update(
                params[chunk],
                grads[chunk],
                exp_avgs=[state["exp_avg"] for state in states],
                exp_avg_sqs=[state["exp_avg_sq"] for state in states],
                lr=lr,
                bias_correction1=bias_correction1,
                bias_correction2=bias_correction2,
                applied=applied,
                beta1=beta1,
                beta2=beta2,
                beta3=1 - beta1 if group["grad_averaging"] else 1.0,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                trust_clip=group["trust_clip"],
                always_adapt=group["always_adapt"],
                decoupled_decay=group["decoupled_decay"],
            )


def _chunks(params: list[torch.Tensor]) -> list[slice]:
    """Splits `params` into the slices that are updated together. On CUDA, one slice. On the CPU,
    each slice with its gradients and moments fits in the cache, so that it stays there between
    passes."""
    if params[0].device.type != "cpu":
        return [slice(None)]
    starts, numbers = [0], 0
    for index, param in enumerate(params):
        if numbers and numbers + param.numel() > CACHED_NUMBERS:
            starts.append(index)
            numbers = 0
        numbers += param.numel()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(params)])]


def _prepare(
    grads: list[torch.Tensor],
    applied: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    limit: float | None,
) -> None:
    """Prepares the gradients for the update, in place: sets them to 0 if the step does not
    count, divides by the scaler's `scale`, and clips their common norm to `limit`."""
    if applied is not None:
        # As integers, because 0 x NaN is NaN. torch has no nan_to_num_ for lists.
        for size, integer in ((2, torch.int16), (4, torch.int32), (8, torch.int64)):
            same = [grad.view(integer) for grad in grads if grad.element_size() == size]
            if same:
                torch._foreach_mul_(same, applied.to(integer))
    divisor = scale
    if limit is not None:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        # One division by the product saves a pass over the gradients. The scale is a power of 2.
        divisor = (norm / limit if scale is None else norm / scale / limit).clamp_(min=1.0)
        divisor = divisor if scale is None else divisor * scale
    if divisor is not None:
        torch._foreach_div_(grads, divisor)


def _update(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    *,
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    lr: float | torch.Tensor,
    bias_correction1: float | torch.Tensor,
    bias_correction2: float | torch.Tensor,
    applied: torch.Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    eps: float,
    weight_decay: float,
    trust_clip: bool,
    always_adapt: bool,
    decoupled_decay: bool,
) -> None:
    """Updates the parameters and moments of one group, in place.

    params, grads, exp_avgs, exp_avg_sqs: weights, gradients, first and second moments.
    lr, bias_correction1, bias_correction2, applied: 0-dim tensors; or numbers, with applied None.
    bias_correction1, bias_correction2: of the first and the second moment.
    applied: 1 if the step counts, 0 if it is skipped.
    beta1, beta2: decay of the two moments.
    beta3: factor of the gradient.
    eps, weight_decay, trust_clip, always_adapt, decoupled_decay: see Lamb.
    """
    # If applied is 0, so are the gradients, and the moments do not change.
    decay1, decay2 = (
        beta if applied is None else 1 - (1 - beta) * applied for beta in (beta1, beta2)
    )
    if applied is None and beta3 == 1 - beta1:
        torch._foreach_lerp_(exp_avgs, grads, beta3)
    else:
        torch._foreach_mul_(exp_avgs, decay1)
        torch._foreach_add_(exp_avgs, grads, alpha=beta3)
    torch._foreach_mul_(exp_avg_sqs, decay2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
    # With the bias corrections c1 and c2: m / c1 / (sqrt(v / c2) + eps) = scale x m / (sqrt(v) +
    # eps x sqrt(c2)), which saves two passes over the tensors.
    root = bias_correction2**0.5
    updates = torch._foreach_sqrt(exp_avg_sqs)
    if isinstance(root, torch.Tensor):
        # Without alpha, torch takes the overload for numbers, and waits for the device to read one.
        torch._foreach_add_(updates, eps * root, alpha=1)
    else:
        torch._foreach_add_(updates, eps * root)
    torch._foreach_reciprocal_(updates)
    torch._foreach_mul_(updates, exp_avgs)
    scale, step_size = root / bias_correction1, lr if applied is None else lr * applied
    if weight_decay and decoupled_decay:
        torch._foreach_mul_(params, 1 - step_size * weight_decay)
    elif weight_decay:
        if applied is None:
            alpha = weight_decay / scale  # a number, because `applied` is None
            torch._foreach_add_(updates, params, alpha=alpha)  # type: ignore[arg-type]  # see above
        else:
            torch._foreach_add_(updates, torch._foreach_mul(params, weight_decay / scale))
    if weight_decay or always_adapt:
        weights, sizes = (
            torch.stack(torch._foreach_norm(params)),
            torch.stack(torch._foreach_norm(updates)) * scale,
        )
        ratios = torch.where((weights > 0) & (sizes > 0), weights / sizes, 1.0)
        if trust_clip:
            ratios = ratios.clamp(max=1.0)
        torch._foreach_mul_(updates, list((ratios * (-step_size * scale)).unbind()))
        torch._foreach_add_(params, updates)
    elif applied is None:
        alpha = -step_size * scale  # a number, as above
        torch._foreach_add_(params, updates, alpha=alpha)  # type: ignore[arg-type]  # see above
    else:
        torch._foreach_mul_(updates, -step_size * scale)
        torch._foreach_add_(params, updates)
