"""The training step: images to gradients to weights, without a word to the host.

An optimizer step takes some mix groups, one after another on each process. What it does to the
model does not depend on how the groups are distributed to processes: gradients are averaged over
all of them, and so are the batch-norm statistics.
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rsb_ffcv.learning.average import Ema
from rsb_ffcv.learning.loss import Loss
from rsb_ffcv.loading import Batch
from rsb_ffcv.loading.batch import BatchTransform
from rsb_ffcv.ops import draws
from rsb_ffcv.training.batch_norm import RunningStatistics
from rsb_ffcv.training.compute import Compute


class TrainStep:
    """One optimizer step.

    model: the bare module.
    wrapped: the same one, compiled and in DDP as the run has it.
    groups: mix groups of a step that this process takes, 1 or more.
    mean_groups: how many a process takes on average: all groups of a step / processes.
    """

    def __init__(
        self,
        model: nn.Module,
        wrapped: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        transform: BatchTransform,
        compute: Compute,
        groups: int,
        mean_groups: float,
        seed: int,
        grad_clip: float,
        ema: Ema | None = None,
    ) -> None:
        self.model, self.wrapped, self.optimizer, self.loss, self.transform = (
            model,
            wrapped,
            optimizer,
            loss,
            transform,
        )
        self.compute, self.groups, self.seed, self.grad_clip = compute, groups, seed, grad_clip
        # DDP averages gradients over processes: divided by this, their mean is that over groups
        self.mean_groups = mean_groups
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")
        self.statistics = RunningStatistics(model, groups, mean_groups)
        if ema is not None:
            # Where the scaler leaves a step out it does not call the optimizer, or tells it by
            # `found_inf` on the device
            optimizer.register_step_post_hook(
                lambda opt, *_: ema.update(getattr(opt, "found_inf", None))
            )

    def __call__(
        self,
        epoch: int,
        batches: Iterator[Batch],
        *,
        lr: float,
        mixing: bool,
    ) -> tuple[torch.Tensor, float]:
        """batches: the step takes `groups` of them. Returns float64 (loss x images, correct,
        images) on the device, and the seconds it waited for `batches`."""
        totals, waited = torch.zeros(3, device=self.compute.device, dtype=torch.float64), 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for number in range(self.groups):
            asked = time.perf_counter()
            images, labels, slots = next(batches)
            waited += time.perf_counter() - asked
            images, lam = self.transform(images, epoch, slots, mixing=mixing)
            images = images.contiguous(memory_format=self.compute.memory_format)
            torch.manual_seed(draws.torch_seed(self.seed, epoch, int(slots[0]), draws.DROP))
            self.statistics.begin_group(number)
            last = number == self.groups - 1
            alone = last or self.compute.world_size == 1  # several processes: wrapped in DDP
            with nullcontext() if alone else cast(DistributedDataParallel, self.wrapped).no_sync():
                with self.compute.autocast():
                    logits = self.wrapped(images)
                loss = self.loss(logits, labels, lam)
                self.scaler.scale(loss / self.mean_groups).backward()
            with torch.no_grad():
                correct = (logits.argmax(1) == labels).sum()
                totals += torch.stack(
                    [loss.detach() * len(labels), correct, torch.full_like(correct, len(labels))]
                )
        self.statistics.end_step()
        if self.grad_clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return totals, waited
