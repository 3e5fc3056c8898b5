"""Batch-norm statistics that do not depend on how mix groups are distributed to processes.

torch averages the statistics of successive groups over time on one process, and not at all over
several processes. Here each step updates the running statistics once, with the mean over its groups
on all processes. The averaged model (SWA) gets separate statistics at the end of a run.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rsb_ffcv.learning.average import Swa, batch_norms
from rsb_ffcv.loading import Batch
from rsb_ffcv.loading.batch import normalize
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


class RunningStatistics:
    """Updates the batch-norm buffers of `module` once per step, with the mean over the step's
    groups. The buffers are the same on all processes.

    groups: groups of a step that this process takes.
    mean_groups: groups of a step / number of processes.
    """

    def __init__(self, module: nn.Module, groups: int, mean_groups: float) -> None:
        norms = batch_norms(module)
        self._buffers, self._counters = _statistics(norms), _counters(norms)
        self._mean_groups = mean_groups
        self._alone = groups == 1 and mean_groups == 1  # every process takes one group
        # Buffers and counters before the step in progress, and the sum of its groups' buffers
        self._start: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]] | None = None
        self._sum: tuple[torch.Tensor, ...] | None = None

    def begin_group(self, group: int) -> None:
        """Call before the forward pass of group `group`, counted from 0 on this process."""
        if self._alone or not self._buffers:
            return
        if group == 0:
            self._start = torch._foreach_clone(self._buffers), torch._foreach_clone(self._counters)
            return
        self._add()
        assert self._start is not None  # set by group 0
        torch._foreach_copy_(self._buffers, self._start[0])

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
            self._sum = torch._foreach_clone(self._buffers)
        else:
            torch._foreach_add_(self._sum, self._buffers)


def estimate(
    swa: Swa,
    batches: Iterator[Batch],
    where: Compute,
    *,
    groups: int,
    needed: int,
    after_round: Callable[[], None],
) -> None:
    """Estimates the averaged model's batch-norm statistics, in place.

    They are the mean over training images without mixing and erasing. The groups of a step are
    taken in rounds, one group per process. In the last round of a step some processes may have no
    group. The mean is then taken over the other processes.

    swa: its `rounds` is the number of rounds done so far.
    batches: of this process, from the first that is not counted yet.
    where: device and processes.
    groups: groups of a step over all processes.
    needed: total number of rounds.
    after_round: called after each round.
    """
    norms = batch_norms(swa.module)
    buffers, counters = _statistics(norms), _counters(norms)
    rounds = rounds_of(groups, where.world_size)
    while swa.rounds < needed:
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
        after_round()


def rounds_of(groups: int, world_size: int) -> int:
    """The number of rounds of a step: the most groups that any process takes."""
    return -(-groups // world_size)
