"""The training step: images to gradients to weights, without synchronizing with the host.

An optimizer step takes several mix groups, one after another on each process. Gradients and
batch-norm statistics are averaged over all groups of the step. Its result does not depend on how
the groups are distributed to processes.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rsb_ffcv.learning.average import Ema
from rsb_ffcv.learning.layers import eval_frozen
from rsb_ffcv.learning.loss import Loss
from rsb_ffcv.loading import Batch
from rsb_ffcv.loading.batch import BatchTransform
from rsb_ffcv.ops import draws
from rsb_ffcv.training.batch_norm import RunningStatistics
from rsb_ffcv.training.compute import Compute


class Taken(NamedTuple):
    """What this process has done in a step.

    sums: float64 (loss x images, correct, images), on the device.
    waited: seconds spent waiting for batches. A wait counts unless the device still has work after
        it.
    counts: see `loading.batch.Drawn.counts`.
    """

    sums: torch.Tensor
    waited: float
    counts: Counter[str]


class OwnTime:
    """The own time of this process in each step: that of the step without the wait for the other
    processes.

    The time of a step is the same on all processes, because each one waits for the slowest when
    gradients are averaged. The own time leaves out the part from the moment at which this process
    has all its gradients until they and the batch-norm statistics are averaged. It includes the
    wait for data.

    On a GPU the moments are events on its stream, so that no step synchronizes with the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._steps: list[list[Any]] = []  # the moments of each step that is not read yet

    def begin_epoch(self) -> None:
        """Drops the steps that are not read: the run may have gone back."""
        self._steps = []

    def begin_step(self) -> None:
        self._steps.append([])
        self.mark()

    def mark(self) -> None:
        """Notes a moment of the step: begin, gradients exist, gradients are averaged, end."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._steps[-1].append(event)
        else:
            self._steps[-1].append(time.perf_counter())

    def mark_gradients(self, logits: torch.Tensor) -> None:
        """Has the backward pass from `logits` mark that the gradients exist. Autograd calls back in
        the order of the requests. This one is made before that of DDP, which waits there for the
        other processes."""
        engine = torch.autograd.Variable._execution_engine
        logits.register_hook(lambda _: engine.queue_callback(self.mark))

    def read(self) -> list[float]:
        """The own time of each step since the last call, in ms. On a GPU: call it after a
        synchronization with the device."""
        steps, self._steps = self._steps, []

        def ms(start: Any, end: Any) -> float:
            return start.elapsed_time(end) if self._cuda else 1000 * (end - start)

        return [ms(begin, exist) + ms(averaged, end) for begin, exist, averaged, end in steps]


class TrainStep:
    """One optimizer step.

    model: the bare module.
    wrapped: the same module, compiled and in DDP if the run uses these.
    optimizer: of the model's parameters. The learning rate of its groups is set in each step.
    loss: of the logits.
    transform: mixes and erases the images of a group.
    compute: device, precision and processes.
    groups: mix groups of a step that this process takes, 1 or more.
    mean_groups: mix groups of a step / number of processes.
    seed: of the run, 0 or more.
    grad_clip: largest norm of all gradients together; 0: no clip.
    ema: updated after each step.
    grad_checkpointing: whether the model computes activations again in the backward pass.
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
        grad_checkpointing: bool = False,
    ) -> None:
        self.model, self.wrapped, self.optimizer, self.loss, self.transform = (
            model,
            wrapped,
            optimizer,
            loss,
            transform,
        )
        self.compute, self.groups, self.seed, self.grad_clip = compute, groups, seed, grad_clip
        # DDP averages gradients over processes. Divided by this, the mean is that over groups.
        self.mean_groups = mean_groups
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")
        self.statistics = RunningStatistics(model, groups, mean_groups, repeated=grad_checkpointing)
        # A process alone waits for no other
        self.own_time = OwnTime(compute.device) if compute.world_size > 1 else None
        # of the newest work for the device
        self._work = torch.cuda.Event() if compute.device.type == "cuda" else None
        if ema is not None:
            # To skip a step, the scaler does not call the optimizer, or sets its `found_inf` on the
            # device.
            optimizer.register_step_post_hook(
                lambda opt, *_: ema.update(getattr(opt, "found_inf", None))
            )

    def begin_epoch(self) -> None:
        """Puts the model in training mode; frozen batch norms stay in eval mode."""
        self.wrapped.train()
        if self.own_time is not None:
            self.own_time.begin_epoch()
        eval_frozen(self.model)

    def __call__(
        self,
        epoch: int,
        batches: Iterator[Batch],
        *,
        lr: float,
        mixing: bool,
    ) -> Taken:
        """Takes one step.

        epoch: counted from 0, for the random draws.
        batches: the step takes `groups` of them.
        lr: learning rate. A group's "lr_scale", if it has one, multiplies it.
        mixing: whether mixup or cutmix is applied.
        """
        totals, waited = torch.zeros(3, device=self.compute.device, dtype=torch.float64), 0.0
        counts = Counter[str]()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if self.own_time is not None:
            self.own_time.begin_step()
        for number in range(self.groups):
            started = time.perf_counter()
            images, labels, slots = next(batches)
            if self._work is None or self._work.query():
                waited += time.perf_counter() - started
            sides = images.shape[1], images.shape[2]
            drawn = self.transform.draw(epoch, slots, sides, mixing=mixing)
            counts.update(drawn.counts())
            images, lam = self.transform.apply(images, drawn)
            images = images.contiguous(memory_format=self.compute.memory_format)
            self.compute.seed(draws.torch_seed(self.seed, epoch, int(slots[0]), draws.DROP))
            self.statistics.begin_group(number)
            last = number == self.groups - 1
            alone = last or self.compute.world_size == 1  # else `wrapped` is a DDP module
            with nullcontext() if alone else cast(DistributedDataParallel, self.wrapped).no_sync():
                with self.compute.autocast():
                    logits = self.wrapped(images)
                loss = self.loss(logits, labels, lam)
                if self.own_time is not None and last:
                    self.own_time.mark_gradients(logits)
                with self.statistics.backward():
                    self.scaler.scale(loss / self.mean_groups).backward()
            with torch.no_grad():
                correct = (logits.argmax(1) == labels).sum()
                totals += torch.stack(
                    [loss.detach() * len(labels), correct, torch.full_like(correct, len(labels))]
                )
            if self._work is not None:
                self._work.record()
        self.statistics.end_step()
        if self.own_time is not None:
            self.own_time.mark()
        if self.grad_clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self._work is not None:
            self._work.record()
        if self.own_time is not None:
            self.own_time.mark()
        return Taken(totals, waited, counts)
