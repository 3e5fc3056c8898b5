"""The threads of `csrc/pool.c`, the batches they work on, and the memory of those batches."""

import ctypes
import faulthandler
import os
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch

from rsb_ffcv import InputError
from rsb_ffcv.ops.native import RUNNING, STEP, Job, library

STALL_SECONDS = 300.0  # no image takes nearly as long: a disk that does not answer, or a defect
_abandoned: list["_State"] = []  # pools with a stuck thread, and what it may still write to


class Work:
    """Images in the making: (n, H, W, 3) uint8 `images`, and each row's `status` (see
    csrc/rsb.h)."""

    def __init__(
        self,
        images: torch.Tensor,
        file: int,
        *,
        decoder: int,
        samples: np.ndarray,
        operations: Sequence[tuple[int, np.ndarray, int]],
    ) -> None:
        """operations: pairs of a kernel's address and its draws, (n, ...) or (n, k, ...) with k
        passes."""
        self.images = images
        rows, height, width, _ = images.shape
        self.status = np.empty(rows, np.int32)
        steps = [
            (kernel, draws[:, i].ctypes.data if passes > 1 else draws.ctypes.data, draws.strides[0])
            for kernel, draws, passes in operations
            for i in range(passes)
        ]
        self._kept = samples, operations, np.array(steps, STEP)  # the job points into them
        self.job = Job(
            file,
            rows,
            height,
            width,
            len(steps),
            decoder,
            samples.ctypes.data,
            self._kept[2].ctypes.data,
            images.data_ptr(),
            self.status.ctypes.data,
        )


class _State:
    """What a Pool's end needs to know after the Pool itself is gone."""

    def __init__(self, handle: int) -> None:
        self.handle, self.process, self.closed, self.stuck = handle, os.getpid(), False, False
        self.held: dict[
            int, Work
        ] = {}  # every batch that threads may still write to, whoever has lost interest in it

    def end(self, function: Callable[[int], object]) -> None:
        """function: rsb_pool_stop or rsb_pool_free. A forked child has no such threads; a stuck one
        cannot be joined."""
        self.closed = True
        if os.getpid() == self.process and not self.stuck:
            function(self.handle)
            self.held.clear()


class Pool:
    """A fixed number of threads that decode and augment, without the interpreter."""

    def __init__(self, num_workers: int) -> None:
        handle = library.rsb_pool_new(num_workers)
        if not handle:
            raise InputError(
                f"`num_workers`={num_workers}: the system refuses as many threads; lower it"
            )
        self._state = _State(handle)
        self._free: dict[
            int, list[np.ndarray]
        ] = {}  # batch memory by size, to be used again: fresh pages cost as much as a resize
        weakref.finalize(self, self._state.end, library.rsb_pool_free)

    def close(self) -> None:
        """Ends the threads; a `wait` in progress, in whatever thread, ends with RuntimeError.
        Garbage collection closes, too, and the end of the interpreter."""
        self._state.end(library.rsb_pool_stop)

    def memory(self, shape: Sequence[int], pin: bool) -> torch.Tensor:
        """An uninitialized uint8 tensor. It is the caller's; what it lay in is used again once
        nobody holds it."""
        if pin:
            return torch.empty(
                shape, dtype=torch.uint8, pin_memory=True
            )  # torch's pinned allocator reuses by itself
        size = int(np.prod(shape))
        free = self._free.setdefault(size, [])
        if len(self._free) > 4:  # resolutions that have passed
            self._free = {size: free}
        block = free.pop() if free else np.empty(size, np.uint8)
        view = block[:]

        def take_back() -> None:
            if len(free) < 8:
                free.append(block)

        weakref.finalize(view, take_back).atexit = False
        return torch.from_numpy(view).view(shape)

    def submit(self, work: Work, urgent: bool = False) -> None:
        """Begins with `work` after those submitted before it; urgent: before those that nobody has
        begun."""
        self.check()
        self._state.held[id(work)] = work
        library.rsb_pool_submit(self._state.handle, ctypes.byref(work.job), urgent)

    def wait(self, work: Work, name: Callable[[int], str] = str) -> None:
        """Returns when `work` is done. Where no image gets done for STALL_SECONDS, writes all
        threads' stacks to stderr and raises RuntimeError, naming the rows in progress by
        `name(row)`."""
        self.check()
        waited, before = 0.0, None
        while left := library.rsb_pool_wait(self._state.handle, ctypes.byref(work.job), 200):
            if left < 0:
                raise RuntimeError("the loader was closed")
            progress = library.rsb_pool_progress(self._state.handle)
            waited, before = (waited + 0.2, before) if progress == before else (0.0, progress)
            if waited > STALL_SECONDS:
                self._state.stuck = True
                _abandoned.append(self._state)
                faulthandler.dump_traceback(2)  # the descriptor: a notebook's sys.stderr has none
                rows = ", ".join(name(int(row)) for row in np.flatnonzero(work.status == RUNNING))
                raise RuntimeError(
                    f"the loader stands still: no image has been finished for {STALL_SECONDS:.0f} "
                    f"s; "
                    f"in progress: {rows or 'none'}"
                )
        self._state.held.pop(id(work), None)

    def cancel(self, works: Sequence[Work]) -> None:
        """Gives up `works`; returns when no thread works on them any more."""
        if self._state.closed or os.getpid() != self._state.process:
            return
        for work in works:
            library.rsb_pool_cancel(self._state.handle, ctypes.byref(work.job))
        for work in works:
            if not self._state.stuck:
                self.wait(work)

    def check(self) -> None:
        """Raises RuntimeError where the threads are gone."""
        if self._state.closed:
            raise RuntimeError("the loader is closed")
        if os.getpid() != self._state.process:
            raise RuntimeError(
                "this process was forked from the loader's and does not have its threads; make a "
                "loader "
                "here, or start processes by spawn"
            )
