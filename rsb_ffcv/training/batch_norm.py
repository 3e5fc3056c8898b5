"""Batch-norm statistics that do not depend on how mix groups are dealt to processes.

torch by itself would average them over time on one process, and not at all over several. Here each
step moves them once, by the mean over its groups; and the averaged model (SWA) gets statistics of
its own at the end of a run.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rsb_ffcv.learning.average import Swa
from rsb_ffcv.loading import Batch
from rsb_ffcv.loading.batch import normalize
from rsb_ffcv.training.compute import Compute, mean_over_processes


class RunningStatistics:
    """The batch-norm buffers of `module`, moved once a step by the mean over the step's groups, on
    all processes alike."""

    def __init__(self, module: nn.Module, groups: int) -> None:
        norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self._buffers = [
            buffer
            for norm in norms
            for buffer in (norm.running_mean, norm.running_var)
            if buffer is not None  # never, where they are tracked
        ]
        self._counters = [
            norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None
        ]
        self._groups = groups
        # of the step in progress: buffers and counters before it, and the sum of its groups'
        self._start: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]] | None = None
        self._sum: tuple[torch.Tensor, ...] | None = None

    def begin_group(self, group: int) -> None:
        """Before the forward pass of the step's group number `group`."""
        if self._groups == 1 or not self._buffers:
            return
        if group == 0:
            self._start = torch._foreach_clone(self._buffers), torch._foreach_clone(self._counters)
            return
        self._add()
        assert self._start is not None  # by group 0
        torch._foreach_copy_(self._buffers, self._start[0])

    def end_step(self) -> None:
        """After the last forward pass."""
        if not self._buffers:
            return
        if self._groups > 1:
            self._add()
            assert self._start is not None and self._sum is not None  # by group 0 and _add
            torch._foreach_div_(self._sum, self._groups)
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
    needed: int,
    after_batch: Callable[[], None],
) -> None:
    """The averaged model's statistics, over training images without mixing and erasing.

    batches: from the one that follows the last that was counted. needed: how many are counted in
    all. after_batch: called after each.
    """
    averaged = RunningStatistics(swa.module, 1)
    while swa.batches < needed:
        images = normalize(next(batches).images)
        images = images.contiguous(memory_format=where.memory_format)
        with torch.no_grad(), where.autocast():
            swa.module(images)
        averaged.end_step()
        swa.batches += 1
        after_batch()
