"""The threads of `csrc/pool.c`, the batches that they work on, and the memory of those batches."""

import ctypes
import faulthandler
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from rsb_ffcv import STALL_SECONDS, InputError
from rsb_ffcv.gpu.batch import Slab
from rsb_ffcv.ops.native import RUNNING, STEP, Job, library

# pools with a stuck thread, kept because the thread may still write to their memory
_abandoned: list["_State"] = []


class Work:
    """A batch in progress: its pixels, or its packed images, and the `status` of each row (see
    csrc/rsb.h).

    place: uint8 (n, H, W, 3), or the slab of a batch that a device decodes.
    decoder: address of the decoder's kernel.
    samples: SAMPLE records (n,).
    operations: (address of a kernel, its draws, number of passes). The draws have the shape
        (n, ...), or (n, k, ...) with k passes.
    measured: whether to set `times`, int64 (n, passes of all operations + 3): see rsb_job of
        csrc/rsb.h. Otherwise it is None.
    """

    def __init__(
        self,
        place: torch.Tensor | Slab,
        *,
        decoder: int,
        samples: np.ndarray,
        operations: Sequence[tuple[int, np.ndarray, int]],
        measured: bool = False,
    ) -> None:
        self.place = place
        rows, height, width, _ = place.shape
        self.status = np.empty(rows, np.int32)
        steps = [
            (kernel, draws[:, i].ctypes.data if passes > 1 else draws.ctypes.data, draws.strides[0])
            for kernel, draws, passes in operations
            for i in range(passes)
        ]
        self.times = np.zeros((rows, len(steps) + 3), np.int64) if measured else None
        self.operations = operations
        self._kept = samples, np.array(steps, STEP)  # the job points into them
        self.job = Job(
            rows,
            height,
            width,
            len(steps),
            decoder,
            samples.ctypes.data,
            self._kept[1].ctypes.data,
            0 if isinstance(place, Slab) else place.data_ptr(),
            self.status.ctypes.data,
            place.structure.ctypes.data if isinstance(place, Slab) else None,
            None if self.times is None else self.times.ctypes.data,
        )


def trace_events(work: Work, names: Sequence[str], indices: np.ndarray) -> list[dict[str, Any]]:
    """The times of a measured batch as events of a Chrome trace: name, category, thread, and start
    and duration in microseconds of CLOCK_MONOTONIC.

    names: of the decoder and of each pass after it.
    indices: of the images in the file.
    """
    assert work.times is not None  # it is measured
    return [
        {
            "name": name,
            "cat": "loader",
            "tid": int(row[-1]),
            "ts": int(row[step]) / 1000,
            "dur": int(row[step + 1] - row[step]) / 1000,
            "args": {"sample": int(index)},
        }
        for row, index in zip(work.times, indices)
        for step, name in enumerate(names)
        if row[step + 1]
    ]


class _State:
    """What ending the threads requires after the Pool itself has been collected."""

    def __init__(self, handle: int) -> None:
        self.handle, self.process, self.closed, self.stuck = handle, os.getpid(), False, False
        # every batch that threads may still write to, even if it was given up
        self.held: dict[int, Work] = {}

    def end(self, function: Callable[[int], object]) -> None:
        """function: rsb_pool_stop or rsb_pool_free. It is not called in a forked child, which does
        not have the threads, nor if a thread is stuck, because that thread cannot be joined."""
        self.closed = True
        if os.getpid() == self.process and not self.stuck:
            function(self.handle)
            self.held.clear()


class Pool:
    """A fixed number of threads that decode and augment, without the interpreter."""

    def __init__(self, num_workers: int) -> None:
        if num_workers < 1:
            raise InputError(
                f"`num_workers`={num_workers}: the loader needs at least one thread; use 1 or more"
            )
        handle = library.rsb_pool_new(num_workers)
        if not handle:
            raise InputError(
                f"`num_workers`={num_workers}: the system cannot start this many threads; lower it"
            )
        self._state = _State(handle)
        # batch memory by size, for reuse: fresh pages cost as much as a resize
        self._free: dict[int, list[np.ndarray]] = {}
        weakref.finalize(self, self._state.end, library.rsb_pool_free)

    def close(self) -> None:
        """Ends the threads. A `wait` in progress in any thread raises RuntimeError. Garbage
        collection and the exit of the interpreter also close the pool."""
        self._state.end(library.rsb_pool_stop)

    def memory(self, shape: Sequence[int], pin: bool) -> torch.Tensor:
        """Returns an uninitialized uint8 tensor that belongs to the caller. Its memory is reused
        when no reference to it is left. pin: in memory from which a GPU can copy by itself."""
        if pin:
            # torch's allocator of pinned memory reuses freed blocks itself
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        size = int(np.prod(shape))
        free = self._free.setdefault(size, [])
        if len(self._free) > 4:  # sizes of earlier resolutions
            self._free = {size: free}
        block = free.pop() if free else np.empty(size, np.uint8)
        view = block[:]

        def recycle() -> None:
            if len(free) < 8:
                free.append(block)

        weakref.finalize(view, recycle).atexit = False
        return torch.from_numpy(view).view(shape)

    def submit(self, work: Work, urgent: bool = False) -> None:
        """Queues `work` behind the work submitted before it. urgent: ahead of all work that no
        thread has started."""
        self.check()
        self._state.held[id(work)] = work
        library.rsb_pool_submit(self._state.handle, ctypes.byref(work.job), urgent)

    def wait(self, work: Work, name: Callable[[int], str] = str) -> None:
        """Returns when `work` is done. If no image is finished for STALL_SECONDS, writes the stacks
        of all threads to stderr and raises RuntimeError, which names each row in progress by
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
                faulthandler.dump_traceback(2)  # descriptor 2: a notebook's sys.stderr has none
                rows = ", ".join(name(int(row)) for row in np.flatnonzero(work.status == RUNNING))
                raise RuntimeError(
                    f"the loader hangs: no image was finished for {STALL_SECONDS:.0f} s; "
                    f"in progress: {rows or 'none'}"
                )
        self._state.held.pop(id(work), None)

    def cancel(self, works: Sequence[Work]) -> None:
        """Cancels `works`. Returns when no thread works on them any more."""
        if self._state.closed or os.getpid() != self._state.process:
            return
        for work in works:
            library.rsb_pool_cancel(self._state.handle, ctypes.byref(work.job))
        for work in works:
            if not self._state.stuck:
                self.wait(work)

    def check(self) -> None:
        """Raises RuntimeError if the threads do not exist any more."""
        if self._state.closed:
            raise RuntimeError("the loader is closed")
        if os.getpid() != self._state.process:
            raise RuntimeError(
                "this process was forked from the loader's process and does not have its threads; "
                "create a loader in this process, or start processes with spawn"
            )
