"""Batch-norm statistics that do not depend on how mix groups are distributed to processes.

torch averages the statistics of successive groups over time on one process, and not at all over
several processes. Here each step updates the running statistics once, with the mean over its groups
on all processes. The averaged model (SWA) gets separate statistics at the end of a run.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rsb_ffcv.learning.average import Swa, batch_norms
from rsb_ffcv.loading import TrainLoader
from rsb_ffcv.loading.batch import normalize
from rsb_ffcv.reporting.console import Console
from rsb_ffcv.training.compute import Compute, mean_over_processes


def _statistics(norms: list[_BatchNorm]) -> list[torch.Tensor]:
    return [
        buffer
        for norm in norms
        for buffer in (norm.running_mean, norm.running_var)
        if buffer is not None  # for the type checker: tracked statistics are never None
    ]


def _counters(norms: list[_BatchNorm]) -> list[torch.Tensor]:
    return [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]


def _copies(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    # torch._foreach_clone came with torch 2.12; this takes as few launches
    return torch._foreach_mul(tensors, 1)


class RunningStatistics:
    """Updates the batch-norm buffers of `module` once per step, with the mean over the step's
    groups. The buffers are the same on all processes. Those of frozen batch norms do not change.

    groups: groups of a step that this process takes.
    mean_groups: groups of a step / number of processes.
    repeated: whether the backward pass repeats forward passes (gradient checkpointing).
    """

    def __init__(
        self, module: nn.Module, groups: int, mean_groups: float, *, repeated: bool = False
    ) -> None:
        norms = batch_norms(module)
        self._buffers, self._counters = _statistics(norms), _counters(norms)
        self._mean_groups, self._repeated = mean_groups, repeated
        self._alone = groups == 1 and mean_groups == 1  # every process takes one group
        # Buffers and counters before the step in progress, and the sum of its groups' buffers
        self._start: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]] | None = None
        self._sum: tuple[torch.Tensor, ...] | None = None

    def begin_group(self, group: int) -> None:
        """Call before the forward pass of group `group`, counted from 0 on this process."""
        if self._alone or not self._buffers:
            return
        if group == 0:
            self._start = _copies(self._buffers), _copies(self._counters)
            return
        self._add()
        assert self._start is not None  # set by group 0
        torch._foreach_copy_(self._buffers, self._start[0])

    @contextmanager
    def backward(self) -> Iterator[None]:
        """A context for the backward pass. Forward passes that it repeats do not count."""
        if not (self._repeated and self._buffers):
            yield
            return
        buffers, counters = _copies(self._buffers), _copies(self._counters)
        yield
        torch._foreach_copy_(self._buffers, buffers)
        torch._foreach_copy_(self._counters, counters)

    def end_step(self) -> None:
        """Call after the last forward pass of the step."""
        if not self._buffers:
            return
        if not self._alone:
            self._add()
            assert self._start is not None and self._sum is not None  # set by group 0 and _add
            # Divided by the mean number of groups, the mean over processes is that over groups.
            torch._foreach_div_(self._sum, self._mean_groups)
            torch._foreach_copy_(self._buffers, self._sum)
            torch._foreach_copy_(self._counters, torch._foreach_add(self._start[1], 1))
            self._start = self._sum = None
        mean_over_processes(self._buffers)

    def _add(self) -> None:
        if self._sum is None:
            self._sum = _copies(self._buffers)
        else:
            torch._foreach_add_(self._sum, self._buffers)


def estimate(
    swa: Swa,
    loader: TrainLoader,
    where: Compute,
    *,
    epoch: int,
    steps: int,
    save_every: int,
    console: Console,
    after_round: Callable[[bool], None],
) -> None:
    """Estimates the averaged model's batch-norm statistics, in place, or continues an estimate that
    was interrupted.

    They are the mean over training images without mixing and erasing. The groups of a step are
    taken in rounds, one group per process. In the last round of a step some processes may have no
    group. The mean is then taken over the other processes.

    swa: its `rounds` is the number of rounds done so far, -1 before the first call.
    loader: of the training images.
    where: device and processes.
    epoch: its images are used, in its order.
    steps: number of steps to take.
    save_every: steps from one checkpoint to the next; 0 for none.
    console: shows the progress.
    after_round: called after each round with whether a checkpoint is due.
    """
    if swa.finished:
        return
    swa.begin_batch_norm() if swa.rounds < 0 else swa.resume_batch_norm()
    norms, groups = batch_norms(swa.module), loader.groups
    buffers, counters = _statistics(norms), _counters(norms)
    rounds = -(-groups // where.world_size)  # of a step: the most groups that any process takes
    start, done = divmod(swa.rounds, rounds)
    with (
        closing(loader.epoch(epoch, start)) as batches,
        console.bar("batch norm", steps * rounds, swa.rounds) as bar,
    ):
        for _ in range(min(done, loader.batches_per_step)):
            next(batches)
        while swa.rounds < steps * rounds:
            step, number = divmod(swa.rounds, rounds)
            before = step * groups + number * where.world_size  # groups counted so far
            present = min(where.world_size, groups - number * where.world_size)
            for norm in norms:
                norm.momentum = present / (before + present)
            if where.rank < present:
                images = normalize(next(batches).images)
                images = images.contiguous(memory_format=where.memory_format)
                with torch.no_grad(), where.autocast():
                    swa.module(images)
            elif buffers:
                torch._foreach_zero_(buffers)
                torch._foreach_add_(counters, 1)
            mean_over_processes(buffers, present)
            swa.rounds += 1
            bar.update()
            after_round(bool(save_every) and swa.rounds % (save_every * rounds) == 0)
    swa.end_batch_norm()
