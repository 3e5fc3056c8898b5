"""The exponential moving average of a model: parameters and batch-norm statistics alike.

Source matched: `ModelEmaV3` of timm 1.0.31 (`timm/utils/model_ema.py`): floating
tensors are interpolated, integer ones copied, warm-up 1 - (1 + s / gamma) ** -power with gamma 1.
"""
import copy

import torch
from torch import nn


class Ema:
    """A float32 copy of `model` that follows it. Build it from the bare module, before compile and DDP wrap it.

    decay: share kept at each update. warmup: the decay of update s (0, 1, ...) is at most 1 - (1 + s) ** -power, so
    that the first updates copy the model instead of keeping its initial weights for thousands of steps.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = False, power: float = 2 / 3):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup, self.power, self.updates = decay, warmup, power, 0
        own, followed = self.module.state_dict(), model.state_dict()
        assert own.keys() == followed.keys()
        floating = [name for name, tensor in own.items() if tensor.is_floating_point()]
        copied = [name for name in own if name not in floating]
        # state_dict() shares memory with the module, and neither optimizer nor batch norm replaces a tensor
        self._floating = [own[name] for name in floating], [followed[name] for name in floating]
        self._copied = [own[name] for name in copied], [followed[name] for name in copied]

    def current_decay(self) -> float:
        """Of the next update."""
        if self.updates == 0:
            return 0.0  # the first update copies the model, as timm's does
        return min(self.decay, 1 - (1 + self.updates) ** -self.power) if self.warmup else self.decay

    @torch.no_grad()
    def update(self):
        """Moves the average towards the model as it is now."""
        torch._foreach_lerp_(*self._floating, 1 - self.current_decay())
        for mine, other in zip(*self._copied):
            mine.copy_(other)
        self.updates += 1

    def state_dict(self) -> dict:
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict):
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]
