"""Batches that a device decodes: the memory that the host packs them into, and the launches of the
kernels.

A batch is done in parts whose scratch memory fits a bound, whatever the sizes of the images. The
kernels write a status for each row; the CPU core makes the rows whose status is not 0.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import numpy as np
import torch

from rsb_ffcv import InputError, first_line
from rsb_ffcv.gpu import driver
from rsb_ffcv.ops.native import (
    LAUNCH,
    LAYER,
    PACKED,
    PACKED_PIXELS,
    SLAB,
    SLAB_PADDING,
    library,
)

ALIGNMENT = 64
LEAST_SLAB = 4 << 20
MAX_SLAB = (1 << 32) - (1 << 20)  # offsets in a slab have 32 bits
HEAD_BYTES = 4096  # of a packed JPEG, beside its bytes and entry points
MAX_SCRATCH_BYTES = (1 << 31) - 1  # of an image: the kernels number its pixels with 32 bits
MAX_PASSES = 16  # of all operations on an image, as far as `check` plans for them


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _row_bytes(shape: Sequence[int]) -> int:
    """Bytes of a slab that each row of a batch (n, H, W, 3) may take: its finished pixels."""
    return _aligned(int(np.prod(shape[1:])))


def _starts_bytes(rows: int) -> int:
    """Bytes of the `starts` of all kernels, if each row were a part of its own."""
    return _aligned(len(driver.NAMES) * 2 * rows * 4)


class Layers(NamedTuple):
    """The draws of one pass of an operation in a slab. stride: bytes from a row to the next."""

    offset: int
    stride: int


class Part(NamedTuple):
    """Consecutive rows of a batch that are decoded together.

    starts: uint32 (kernels, rows + 1), the first block of each row and the number of all blocks.
    offset: of `starts` in the slab.
    scratch_bytes: of all rows.
    """

    first: int
    rows: int
    starts: np.ndarray
    offset: int
    scratch_bytes: int


class Slab:
    """Memory for one packed batch: its records, its draws, and the bytes of its rows.

    shape: (n, H, W, 3) of the batch.
    structure: the SLAB record that the core's threads use.
    records: PACKED records (n,), after the threads have finished.
    layers: of each pass, in their order.
    """

    def __init__(
        self,
        memory: torch.Tensor,
        shape: tuple[int, int, int, int],
        *,
        draws: Sequence[np.ndarray],
        scratch_bytes: int,
    ) -> None:
        """memory: uint8, ALIGNMENT + SLAB_PADDING bytes more than the capacity.
        draws: LAYER records, (n,) or (n, passes), of each operation.
        scratch_bytes: of the device for one image; larger ones are decoded by the CPU core."""
        self._whole, self.shape = memory, shape
        rows = shape[0]
        self.memory = memory[-memory.data_ptr() % ALIGNMENT :]
        self._array = self.memory.numpy()
        self.records = self._array[: rows * PACKED.itemsize].view(PACKED)
        self.records[:] = 0
        at = _aligned(self.records.nbytes)
        self.layers: list[Layers] = []
        for drawn in draws:
            passes = drawn.reshape(rows, -1)
            self._array[at : at + passes.nbytes] = passes.view(np.uint8).ravel()
            self.layers += [
                Layers(at + i * LAYER.itemsize, passes.strides[0]) for i in range(passes.shape[1])
            ]
            at += _aligned(passes.nbytes)
        self._starts = at
        at += _starts_bytes(rows)
        self.structure = np.zeros(1, SLAB)
        self.structure["memory"] = self.memory.data_ptr()
        self.structure["capacity"] = len(self.memory) - SLAB_PADDING
        self.structure["scratch"] = scratch_bytes
        self.structure["used"] = at
        self.structure["committed"] = at + rows * _row_bytes(shape)

    @property
    def used(self) -> int:
        return int(self.structure["used"][0])

    def parts(self, bound: int) -> list[Part]:
        """Cuts the packed rows into parts of at most `bound` bytes of scratch memory, and gives
        each row its place there."""
        sizes, found, at = self.records["scratch_bytes"].astype(np.int64), [], self._starts
        _, height, width, _ = self.shape
        for first, end in _ranges(sizes, bound):
            own = sizes[first:end]
            self.records["scratch"][first:end] = np.cumsum(own) - own
            rows = end - first
            size = len(driver.NAMES) * (rows + 1) * 4
            starts = self._array[at : at + size].view(np.uint32).reshape(-1, rows + 1)
            records = self.records[first:end]
            library.rsb_block_starts(records.ctypes.data, rows, height, width, starts.ctypes.data)
            found.append(Part(first, rows, starts, at, int(own.sum())))
            at += size
        return found

    def put(self, row: int, image: np.ndarray) -> None:
        """Replaces a row that the threads could not make. image: uint8 (H, W, 3)."""
        record = self.records[row]
        at = int(record["pixels"]) if record["kind"] == PACKED_PIXELS else 0
        if at == 0:
            at = self.used
            self.structure["used"] += _row_bytes(self.shape)
        record["kind"], record["pixels"], record["scratch_bytes"] = PACKED_PIXELS, at, 0
        self._array[at : at + image.size] = image.ravel()


class Decoded(NamedTuple):
    """A batch on its way through the device.

    images: uint8 (n, H, W, 3), on the device.
    status: int32 (n,), on the host once `finished` has happened: not 0 where the CPU core must make
        the row.
    finished: None on a CPU.
    """

    images: torch.Tensor
    status: torch.Tensor
    finished: torch.cuda.Event | None

    def failed_rows(self) -> np.ndarray:
        """The rows that the CPU core must make. Waits for the batch."""
        if self.finished is not None:
            self.finished.synchronize()
        return np.flatnonzero(self.status.numpy())


class DeviceDecoder:
    """Decodes packed batches on a device. Batches are copied to it on one stream and decoded on
    another, beside the streams of the caller.

    device: "cpu" emulates the kernels.
    memory_mb: bound of the memory for slabs and scratch on the device, in MiB.
    order: of the threads of an emulated block, see rsb_emulate of csrc/rsb.h.

    Raises InputError if the device cannot run the kernels.
    """

    def __init__(self, device: torch.device, memory_mb: int, order: int = 0) -> None:
        self.device, self.memory_mb = device, memory_mb
        is_gpu = device.type == "cuda"
        self.driver: driver.Driver = driver.Cuda(device) if is_gpu else driver.Emulator(order)
        self.stream = torch.cuda.Stream(device) if is_gpu else None
        self._copying = torch.cuda.Stream(device) if is_gpu else None
        self._scratch = torch.empty(0, dtype=torch.uint8, device=device)
        # Two slabs may be on the device: that of the batch in progress, and the next one.
        self._scratch_bytes = (memory_mb << 20) // 2
        self._slab_bytes = min((memory_mb << 20) // 4, MAX_SLAB)

    def slab(
        self,
        samples: np.ndarray,
        shape: tuple[int, int, int, int],
        *,
        draws: Sequence[np.ndarray],
        memory: Callable[[Sequence[int]], torch.Tensor],
    ) -> Slab:
        """Returns memory for a batch.

        samples: SAMPLE records (n,).
        shape: (n, H, W, 3) of the batch.
        draws: LAYER records of each operation, (n,) or (n, passes).
        memory: returns an uninitialized uint8 tensor on the host.

        Raises InputError if `memory_mb` is too little for the batch.
        """
        fixed = _aligned(shape[0] * PACKED.itemsize) + sum(_aligned(part.nbytes) for part in draws)
        fixed += _starts_bytes(shape[0])
        row_bytes = _row_bytes(shape)
        least = fixed + shape[0] * row_bytes
        if least > self._slab_bytes:
            self._raise_too_large(shape, least)
        packed = samples["size"] + 3 * samples["entry_bytes"].astype(np.uint64) + HEAD_BYTES
        most = fixed + int(np.maximum(packed, row_bytes).sum())
        # A power of 2, as torch's allocator of pinned memory takes: few sizes, which are reused
        extra = ALIGNMENT + SLAB_PADDING
        size = max(LEAST_SLAB, 1 << (most + extra - 1).bit_length())
        return Slab(
            memory((min(size, self._slab_bytes + extra),)),
            shape,
            draws=draws,
            scratch_bytes=min(self._scratch_bytes, MAX_SCRATCH_BYTES),
        )

    def check(self, rows: int, side: int) -> None:
        """Raises InputError if `memory_mb` is too little for batches of `rows` images of `side` x
        `side` pixels."""
        draws = MAX_PASSES * LAYER.itemsize
        least = rows * (PACKED.itemsize + draws + 3 * side * side + ALIGNMENT) + LEAST_SLAB
        least += _starts_bytes(rows)
        if least > self._slab_bytes:
            self._raise_too_large((rows, side, side, 3), least)

    def _raise_too_large(self, shape: tuple[int, int, int, int], least: int) -> NoReturn:
        if least > MAX_SLAB:
            raise InputError(
                f"`batch_size`={shape[0]}: images of {shape[1]} px are too many to decode on the "
                f"device; lower it, or {driver.FIX}"
            )
        raise InputError(
            f"`memory_mb`={self.memory_mb}: too little to decode batches of {shape[0]} images of "
            f"{shape[1]} px on the device; use {-(-4 * least >> 20)} or more, or {driver.FIX}"
        )

    def decode(self, slab: Slab) -> Decoded:
        """Starts a batch that the host has packed. Its kernels run after those of the batches
        before it, its copy beside them.

        Raises InputError if the device has too little free memory.
        """
        try:
            with torch.cuda.stream(self._copying):  # None, on a CPU, changes nothing
                parts = slab.parts(self._scratch_bytes)
                packed = slab.memory[: slab.used + SLAB_PADDING]
                packed = packed.to(self.device, non_blocking=True)
            if self.stream is None or self._copying is None:
                return self._decode(slab, packed, parts)
            self.stream.wait_event(self._copying.record_event())
            packed.record_stream(self.stream)
            with torch.cuda.stream(self.stream):
                return self._decode(slab, packed, parts)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"`memory_mb`={self.memory_mb}: the device has too little free memory to decode "
                f"({first_line(error)}); lower it or the batch size, or {driver.FIX}"
            ) from error

    def _decode(self, slab: Slab, packed: torch.Tensor, parts: Sequence[Part]) -> Decoded:
        """Runs the kernels on the current stream. packed: the slab on the device."""
        rows, height, width, _ = slab.shape
        needed = max(part.scratch_bytes for part in parts)
        if len(self._scratch) < needed + ALIGNMENT:
            self._scratch = torch.empty(0, dtype=torch.uint8)  # freed before the larger one
            # with room for larger batches, so that it seldom grows
            size = max(needed, min(needed + needed // 4, self._scratch_bytes)) + ALIGNMENT
            self._scratch = torch.empty(size, dtype=torch.uint8, device=self.device)
        images = torch.empty(slab.shape, dtype=torch.uint8, device=self.device)
        status = torch.zeros(rows, dtype=torch.int32, device=self.device)
        for part in parts:
            launch = np.zeros(1, LAUNCH)
            launch["slab"], launch["out"] = packed.data_ptr(), images.data_ptr()
            launch["scratch"] = self._scratch.data_ptr() + -self._scratch.data_ptr() % ALIGNMENT
            launch["status"], launch["first"], launch["rows"] = (
                status.data_ptr(),
                part.first,
                part.rows,
            )
            launch["height"], launch["width"] = height, width
            self._run(launch, part, slab.layers)
        if self.stream is None:
            return Decoded(images, status, None)
        on_host = status.to("cpu", non_blocking=True)
        return Decoded(images, on_host, self.stream.record_event())

    def _run(self, launch: np.ndarray, part: Part, layers: Sequence[Layers]) -> None:
        """Runs all kernels on the rows of a part."""
        slab = int(launch["slab"][0])
        for kernel, starts in enumerate(part.starts):
            blocks = int(starts[-1])
            if blocks == 0:
                continue
            launch["starts"] = slab + part.offset + kernel * starts.nbytes
            for layer in layers if kernel == driver.AUGMENT else (None,):
                if layer is not None:
                    launch["layers"] = slab + layer.offset
                    launch["layer_stride"] = layer.stride
                self.driver.launch(kernel, launch, blocks)


def _ranges(sizes: np.ndarray, bound: int) -> list[tuple[int, int]]:
    """Cuts rows of these sizes into consecutive parts of at most `bound`, but of one row at
    least."""
    parts, start, total = [], 0, 0
    for row, size in enumerate(sizes.tolist()):
        if row > start and total + size > bound:
            parts.append((start, row))
            start, total = row, 0
        total += size
    return [*parts, (start, len(sizes))]
