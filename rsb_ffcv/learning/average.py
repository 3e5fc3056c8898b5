"""Averages of a model's weights over a run, with batch-norm statistics: exponential (EMA) and equal
(SWA).

Build them from the bare module, before torch.compile and DDP wrap it. The wrappers share the
module's tensors, and the optimizer and batch norm update these in place.

Sources matched: `ModelEmaV3` of timm 1.0.31 (`timm/utils/model_ema.py`) and torch's
`torch.optim.swa_utils` (`AveragedModel` with its equal average, `update_bn`).
"""

import copy
import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rsb_ffcv import check_choice
from rsb_ffcv.learning.layers import is_frozen


def decay_of_step(decay: float, per_images: int, batch: int) -> float:
    """The decay of one update after `batch` images.

    decay: share that remains after `per_images` images, or after one update if `per_images` is 0.
    """
    return decay ** (batch / per_images) if per_images else decay


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch-norm layers of `module` whose running statistics are updated."""
    return [
        m
        for m in module.modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats and not is_frozen(m)
    ]


class _Average:
    """An average in `module`, a copy of `model` in eval mode without gradients. Its tensors are
    paired with the model's."""

    def __init__(self, model: nn.Module, buffers: str = "lerp") -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        own, followed = self.module.state_dict(), model.state_dict()
        assert own.keys() == followed.keys()
        parameters = {name for name, _ in model.named_parameters()}
        averaged = [
            name
            for name, tensor in own.items()
            if tensor.is_floating_point() and (buffers == "lerp" or name in parameters)
        ]
        copied = [name for name in own if name not in set(averaged)]
        self._averaged = [own[name] for name in averaged], [followed[name] for name in averaged]
        self._copied = [own[name] for name in copied], [followed[name] for name in copied]

    def _move(self, share: float | torch.Tensor) -> None:
        """average += share * (model - average). Tensors that are not averaged are copied."""
        # torch accepts a 0-dim tensor as a number; its type stub does not.
        torch._foreach_lerp_(*self._averaged, share)  # type: ignore[arg-type]  # see above
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)


class Ema(_Average):
    """An exponential moving average of `model`.

    decay: share that the average keeps at each update.
    warmup: limit the decay of update s (0, 1, ...) to 1 - (1 + s) ** -power. The first updates then
        copy the model, instead of keeping its initial weights for thousands of steps.
    power: see warmup.
    buffers: "lerp" averages batch-norm statistics as well, "copy" copies the model's. Integers are
        always copied.

    Raises InputError for another value of `buffers`.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        *,
        warmup: bool = False,
        power: float = 2 / 3,
        buffers: str = "lerp",
    ) -> None:
        check_choice("buffers", buffers, ("lerp", "copy"))
        super().__init__(model, buffers)
        self.decay, self.warmup, self.power = decay, warmup, power
        # A tensor if only the device knows which updates were skipped.
        self.updates: int | torch.Tensor = 0

    def current_decay(self) -> float | torch.Tensor:
        """The decay of the next update."""
        if self.updates == 0:
            return 0.0  # the first update copies the model, as timm's does
        return min(self.decay, 1 - (1 + self.updates) ** -self.power) if self.warmup else self.decay

    def initial_share(self) -> float:
        """The share that the initial weights, those after the first update, still have in the
        average: 1 .. 0."""
        updates = int(self.updates)
        if not self.warmup:
            return self.decay ** max(0, updates - 1)
        return math.prod(
            min(self.decay, 1 - (1 + update) ** -self.power) for update in range(1, updates)
        )

    @torch.no_grad()
    def update(self, skipped: torch.Tensor | None = None) -> None:
        """Moves the average towards the current model.

        skipped: a float tensor on the device. It is 1 if the optimizer skipped its step (fp16
            overflow), and the average then does not change; else 0. The host does not read it, and
            so does not synchronize with the device.
        """
        if skipped is None:
            self._move(1 - self.current_decay())
            self.updates += 1
            return
        if not isinstance(self.updates, torch.Tensor):
            self.updates = torch.tensor(float(self.updates), device=skipped.device)
        decay = torch.full_like(skipped, self.decay)
        if self.warmup:
            decay = torch.minimum(decay, 1 - (1 + self.updates) ** -self.power)
        share = (1 - torch.where(self.updates == 0, 0.0, decay)) * (1 - skipped)
        difference = torch._foreach_sub(self._averaged[1], self._averaged[0])
        torch._foreach_mul_(difference, share)
        torch._foreach_add_(self._averaged[0], difference)
        # Batch-norm counters and, with "copy", statistics. An overflow does not affect them.
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)
        self.updates += 1 - skipped

    def restart(self) -> None:
        """Restarts the average from the current model."""
        self._move(1.0)
        self.updates = 1

    def state_dict(self) -> dict:
        """The averaged tensors and the number of updates."""
        return {"module": self.module.state_dict(), "updates": int(self.updates)}

    def load_state_dict(self, state: dict) -> None:
        """Restores what state_dict returned."""
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]


class Swa(_Average):
    """The equal average of the models at each `update`.

    The averaged weights need new batch-norm statistics. After the last update, call
    `begin_batch_norm`, run forward passes over training batches, then call `end_batch_norm`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "copy")
        self.models = 0
        # Rounds of the estimation of statistics done (one batch per process each); -1: not started
        self.rounds = -1
        self.finished = False  # whether the estimation is complete

    @torch.no_grad()
    def update(self) -> None:
        """Adds the current model."""
        self._move(1 / (self.models + 1))
        self.models += 1

    def begin_batch_norm(self) -> None:
        """Resets the statistics. The following forward passes average theirs with equal weights."""
        for norm in batch_norms(self.module):
            norm.reset_running_stats()
        self.rounds = 0
        self.resume_batch_norm()

    def resume_batch_norm(self) -> None:
        """Continues the estimation after `load_state_dict`, with the statistics so far."""
        self._momenta = [norm.momentum for norm in batch_norms(self.module)]
        for norm in batch_norms(self.module):
            norm.momentum = None  # torch's value for the equal average
            # Only the norms: dropout and stochastic depth stay off, as in evaluation.
            norm.train()

    def end_batch_norm(self) -> None:
        """Ends the estimation. The statistics are complete."""
        for norm, momentum in zip(batch_norms(self.module), self._momenta):
            norm.momentum = momentum
        self.module.eval()
        self.finished = True

    def state_dict(self) -> dict:
        """The averaged tensors, the number of models, and the state of the estimation."""
        return {
            "module": self.module.state_dict(),
            "models": self.models,
            "batches": self.rounds,
            "finished": self.finished,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what state_dict returned."""
        self.module.load_state_dict(state["module"])
        self.models, self.rounds, self.finished = (
            state["models"],
            state["batches"],
            state["finished"],
        )
