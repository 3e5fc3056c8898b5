"""Loads batches of uint8 images and int64 labels from a checked `.beton` file.

FFCV's loader compiles its loops again in each process, returns views of ring buffers that it later
overwrites, and hangs if a worker dies. This loader draws the random numbers of a batch from
addresses and passes the rest to threads that do not need the interpreter (`pool`). Each batch has
its own memory. An error names the sample that cannot be read. The content of a batch depends only
on (seed, epoch, slots).
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from rsb_ffcv import InputError, check_choice, option_names
from rsb_ffcv.beton import RAW, Images, read_beton
from rsb_ffcv.gpu.batch import Decoded, DeviceDecoder, Slab
from rsb_ffcv.loading.order import Order, epoch_order, group_slots
from rsb_ffcv.loading.pool import Pool, Work, trace_events
from rsb_ffcv.ops.augment import ColorJitter, RandAugment
from rsb_ffcv.ops.crop import CenterCrop, RandomResizedCrop
from rsb_ffcv.ops.native import AUGMENT, DAMAGE, SAMPLE, reason
from rsb_ffcv.ops.operation import Address, Decoder, DrawnOperation

# how far the threads may prefetch: this many images or batches, whichever is more
IMAGES_AHEAD, BATCHES_AHEAD = 512, 3
MEMORY_MB = 1024  # of the device, to decode
MAX_REPLACEMENTS = 1000  # a file with this many bad samples in a row is not usable


class Batch(NamedTuple):
    """A batch of n images.

    images: uint8 (n, resolution, resolution, 3), on the loader's device.
    labels: int64 (n,), on the loader's device.
    slots: int64 (n,), numpy. In training, the position of each image in the epoch's global order,
        which is part of its address; in evaluation, its index in the file.
    """

    images: torch.Tensor
    labels: torch.Tensor
    slots: np.ndarray


Batches = Generator[Batch, None, None]


class _Begun(NamedTuple):
    """A batch in progress. indices: of its images in the file."""

    work: Work
    address: Address
    indices: np.ndarray


class Sent(NamedTuple):
    """A batch on its way to the loader's device. decoded: if the device decodes it."""

    begun: _Begun
    images: torch.Tensor
    indices: np.ndarray
    decoded: Decoded | None


class Windows:
    """Tells the system which windows of an epoch's order will be read, and which were.

    descriptors: of the open files.
    """

    def __init__(self, descriptors: np.ndarray, order: Order) -> None:
        self._descriptors, self._order, self._advised = descriptors, order, 0

    def reach(self, place: int) -> None:
        """place: position in the order of the sample that is read next."""
        extents = self._order.extents
        current = int(np.searchsorted(self._order.starts, place, "right")) - 1
        # this window and the next one
        while self._advised < len(extents) and self._advised <= current + 1:
            if self._advised >= current:
                self._advise(extents[self._advised], os.POSIX_FADV_WILLNEED)
            if self._advised >= 2:
                self._advise(extents[self._advised - 2], os.POSIX_FADV_DONTNEED)
            self._advised += 1

    def _advise(self, extents: np.ndarray, advice: int) -> None:
        with suppress(OSError):  # only a hint; some file systems do not support it
            for file, offset, length in extents.tolist():
                os.posix_fadvise(int(self._descriptors[file]), offset, length, advice)


class ImageLoader:
    """The images of a file, threads, and a list of operations: first a decoder, then ops that
    change each image in place. A subclass says which image is in which batch, and calls `_start`
    at the end of __init__.

    images: of the file.
    batch_size: images per batch.
    device: device of the batches.
    decode, memory_mb: as in TrainLoader.
    pinned: whether the batches are in memory from which a GPU can copy by itself. A `device` that
        is a GPU needs it.
    """

    # if not None: the events of the threads are appended, see pool.trace_events
    events: list[dict[str, Any]] | None = None
    _other_fix = ""  # what the user can do about a bad sample instead of writing the file again

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        decode: str = "cpu",
        memory_mb: int = MEMORY_MB,
        pinned: bool = False,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"`batch_size`={batch_size}: must be positive; use 1 or more")
        check_choice("decode", decode, ("cpu", "gpu"))
        self.images, self.batch_size = images, batch_size
        self.device = torch.device(device)
        is_gpu = self.device.type == "cuda"
        self._pinned = pinned or is_gpu
        self._ahead = max(BATCHES_AHEAD, -(-IMAGES_AHEAD // batch_size))
        self._copying = torch.cuda.Stream(self.device) if is_gpu else None
        self._decoder = DeviceDecoder(self.device, memory_mb) if decode == "gpu" else None

    def _start(self, pool: Pool) -> None:
        """Opens the files. pool: the threads."""
        self._pool = pool
        self._opened = self.images.open()

    def close(self) -> None:
        """Ends the threads. Iterators that are still open raise an error. Garbage collection also
        closes the loader."""
        self._pool.close()
        self._opened.close()

    def check_memory(self, resolution: int) -> None:
        """Raises InputError if `memory_mb` is too little to decode batches of `resolution` pixels
        per side on the device."""
        if self._decoder is not None:
            self._decoder.check(self.batch_size, resolution)

    def preload(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Reads the files once, in order, so that their pages are in memory before the first epoch.
        Raises InputError if they do not fit. stop: called between reads; if it returns True, the
        rest is not read."""
        available = psutil.virtual_memory().available
        if self.images.num_bytes > 0.9 * available:
            raise InputError(
                f"{self.images.path} has {self.images.num_bytes / 1e9:.1f} GB and "
                f"{available / 1e9:.1f} GB of memory are free"
            )
        block = bytearray(1 << 24)
        for file in self._opened.descriptors.tolist():
            at = 0
            while not stop() and (read := os.preadv(file, [block], at)):
                at += read

    def _submit(
        self,
        ops: Sequence[DrawnOperation],
        address: Address,
        indices: np.ndarray,
        *,
        alone: bool = False,
    ) -> _Begun:
        """Draws the random numbers of a batch and queues it. alone: the CPU decodes it, ahead of
        all batches that no thread has started."""
        self._pool.check()
        b = self.images
        samples = np.zeros(len(indices), SAMPLE)
        for name in ("height", "width", "pointer", "size"):
            samples[name] = getattr(b, f"{name}s")[indices]
        samples["raw"] = b.modes[indices] == RAW
        samples["file"] = self._opened.descriptors[b.files[indices]]
        if b.extras is not None:
            samples["verify"] = 1
            for name in b.extras.dtype.names or ():
                samples[name] = b.extras[name][indices]
        first, *others = ops
        assert isinstance(first, Decoder)
        first.draw_into(samples, address)
        heights, widths = (np.full(len(indices), side) for side in first.shape[:2])
        operations = [
            (op.generate_code(), np.ascontiguousarray(op.draw(address, heights, widths)), op.passes)
            for op in others
            if op.passes
        ]
        shape = (len(indices), *first.shape)
        place: torch.Tensor | Slab
        if self._decoder is None or alone:
            place = self._pool.memory(shape, self._pinned)
        else:
            place = self._decoder.slab(
                samples,
                shape,
                draws=[draws for _, draws, _ in operations],
                memory=lambda size: self._pool.memory(size, self._pinned),
            )
        work = Work(
            place,
            decoder=first.generate_code(),
            samples=samples,
            operations=operations,
            measured=self.events is not None,
        )
        self._pool.submit(work, alone)
        return _Begun(work, address, indices)

    def _send(self, ops: Sequence[DrawnOperation], begun: _Begun, order: np.ndarray | None) -> Sent:
        """Waits until the threads have finished a batch, and starts its way to the device. order:
        of the epoch, None in evaluation."""
        work, _, indices = begun
        place = work.place
        self._pool.wait(work, lambda row: self.images.place(int(indices[row])))
        if self.events is not None and work.times is not None:
            names = [type(op).__name__ for op in ops for _ in range(op.passes)]
            self.events += trace_events(work, names, indices)
        for row in np.flatnonzero(work.status):
            indices = indices.copy()  # it may be a view of the caller's array
            indices[row], image = self._replacement(
                ops, begun, int(row), status=work.status[row], order=order
            )
            if isinstance(place, Slab):
                place.put(int(row), image.numpy())
            else:
                place[row] = image
        if isinstance(place, Slab):
            assert self._decoder is not None  # it has made the slab
            decoded = self._decoder.decode(place)
            return Sent(begun, decoded.images, indices, decoded)
        if self._copying is None:
            return Sent(begun, place.to(self.device), indices, None)
        # on a separate stream, so that the copy overlaps with steps that the device still computes
        with torch.cuda.stream(self._copying):
            return Sent(begun, place.to(self.device, non_blocking=True), indices, None)

    def _finish(self, ops: Sequence[DrawnOperation], sent: Sent, order: np.ndarray | None) -> Batch:
        """Completes a batch: makes the rows that the device has left to the CPU, and lets the
        current stream wait for the rest."""
        begun, images, indices, decoded = sent
        # not on the stream of the decoder, which is busy with the next batch
        stream = self._copying
        for row in decoded.failed_rows() if decoded is not None else ():
            indices = indices.copy()
            address = begun.address._replace(slots=begun.address.slots[row : row + 1])
            wrong, image = self._alone(ops, address, indices[row : row + 1])
            if wrong:
                indices[row], image = self._replacement(
                    ops, begun, int(row), status=wrong, order=order
                )
            # The device has finished the other rows: failed_rows has waited for it.
            with torch.cuda.stream(stream):  # of a CPU: None, which changes nothing
                images[row].copy_(image, non_blocking=True)
        labels = self._labels(indices)
        slots = begun.address.slots
        if stream is None:
            return Batch(images, labels.to(self.device), slots)
        with torch.cuda.stream(stream):
            labels = labels.pin_memory().to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(stream)
        if decoded is not None and decoded.finished is not None:
            current.wait_event(decoded.finished)
            images.record_stream(stream)
        for part in (images, labels):
            part.record_stream(current)
        return Batch(images, labels, slots)

    def _alone(
        self, ops: Sequence[DrawnOperation], address: Address, index: np.ndarray
    ) -> tuple[int, torch.Tensor]:
        """Makes one image on the CPU, ahead of all batches. Returns its status and its pixels.
        index: int64 (1,), in the file."""
        single = self._submit(ops, address, index, alone=True).work
        self._pool.wait(single)
        assert isinstance(single.place, torch.Tensor)  # the CPU has decoded it
        return int(single.status[0]), single.place[0]

    def _labels(self, indices: np.ndarray) -> torch.Tensor:
        """What a batch contains beside its images: here, the indices in the file."""
        return torch.from_numpy(indices)

    def _replacement(
        self,
        ops: Sequence[DrawnOperation],
        begun: _Begun,
        row: int,
        *,
        status: int,
        order: np.ndarray | None,
    ) -> tuple[int, torch.Tensor]:
        """Returns the index and the pixels of the image that replaces one that cannot be read."""
        raise InputError(self._error_text(begun.indices[row], status))

    def _error_text(self, index: int, status: int) -> str:
        if status not in DAMAGE:
            return (
                f"{self.images.place(index)} {reason(status)}; correct the operation or the size "
                f"of the images"
            )
        return (
            f"{self.images.place(index)} {reason(status)}; write the file again with "
            f"write_ffcv.py{self._other_fix}"
        )

    def _iterate(
        self,
        ops: Sequence[DrawnOperation],
        batches: Iterable[tuple[Address, np.ndarray]],
        order: np.ndarray | None = None,
    ) -> Batches:
        """Yields the batches of `batches`, an iterable of (Address, indices), and prefetches the
        next ones."""
        begun: deque[_Begun] = deque()
        sent: deque[Sent] = deque()

        def send() -> None:
            sent.append(self._send(ops, begun[0], order))
            begun.popleft()

        # A batch that the device decodes is finished after the next one has been sent: its
        # status is then there already, and the host does not wait for the device.
        later = 0 if self._decoder is None else 1
        try:
            for address, indices in batches:
                begun.append(self._submit(ops, address, indices))
                if len(begun) > self._ahead:
                    send()
                    if len(sent) > later:
                        yield self._finish(ops, sent.popleft(), order)
            while begun or sent:
                if begun:
                    send()
                if len(sent) > later or not begun:
                    yield self._finish(ops, sent.popleft(), order)
        finally:
            self._pool.cancel([batch.work for batch in begun])


class _Loader(ImageLoader):
    """The images and labels of a file."""

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        batch_size: int,
        *,
        device: str | torch.device,
        decode: str,
        memory_mb: int,
    ) -> None:
        self.beton = read_beton(path)
        super().__init__(self.beton, batch_size, device=device, decode=decode, memory_mb=memory_mb)

    def _labels(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.beton.labels[indices])


class TrainLoader(_Loader):
    """Random-resized crops, flips and augmentations of a training file, in an order that is a
    function of `seed` and epoch.

    path: a .beton file, or several: see beton.read_beton.
    batch_size: images per batch, which is a mix group.
    resolution: pixels per side; may be changed between epochs.
    num_workers: number of threads.
    seed: seed of every draw.
    global_batch: slots of a step over all processes, a multiple of batch_size; 0: batch_size x
        world_size. If world_size does not divide the number of groups, the first processes take one
        group more. Slots that do not fill a step are left out of the epoch.
    scale: range of the area of torchvision's RandomResizedCrop.
    ratio: range of its aspect.
    flip_prob: probability of a horizontal flip.
    rand_augment: a spec (see ops.policies.parse_policy), for example rand-m7-mstd0.5-inc1 or
        ra-n2-m9, or "" for none.
    color_jitter: brightness, contrast, saturation, hue (see ops.augment.ColorJitter), applied after
        rand_augment.
    interpolation: of the crop, and of geometric ops unless the spec has its own: "bilinear",
        "bicubic", or "random", which chooses one of the two for each image, as timm does.
    ops: further operations (see ops.operation), applied last.
    repeats: repeated augmentation: the number of copies of an image in an epoch. The copies have
        different draws and are in different groups of a step. The number of steps does not change.
    order: "random", "sequential", or "quasi_random", which reads the file in chunks of 1 MiB and
        shuffles `window_bytes` of it at a time, for files larger than memory.
    window_bytes: see order.
    on_bad_sample: "raise", or "skip": an image that cannot be read is replaced by the image of the
        next readable slot, and listed in `skipped`.
    rank: number of this process among those that share each step.
    world_size: number of processes that share each step.
    device: device of the batches.
    decode: "cpu", or "gpu": the device decodes, crops and augments; the batches have the same
        bytes. If `device` is a CPU, it emulates the device. `ops` must be empty.
    memory_mb: bound of the device memory for decoding, beside the batches, in MiB.

    Raises InputError if the file is damaged or holds fewer images than a step takes, or if a
    setting is out of range.
    """

    _other_fix = ", or train with `on_bad_sample`=skip"

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        batch_size: int,
        resolution: int,
        num_workers: int,
        seed: int = 0,
        global_batch: int = 0,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_prob: float = 0.5,
        rand_augment: str = "",
        color_jitter: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
        interpolation: str = "random",
        ops: Sequence[DrawnOperation] = (),
        repeats: int = 1,
        order: str = "random",
        window_bytes: int = 1 << 30,
        on_bad_sample: str = "raise",
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        decode: str = "cpu",
        memory_mb: int = MEMORY_MB,
    ) -> None:
        super().__init__(
            path,
            batch_size,
            device=device,
            decode=decode,
            memory_mb=memory_mb,
        )
        global_batch = global_batch or batch_size * world_size
        if global_batch % batch_size:
            raise InputError(
                f"`global_batch`={global_batch} is not a multiple of `batch_size`={batch_size}; "
                f"change one of them"
            )
        if global_batch < batch_size * world_size:
            raise InputError(
                f"`global_batch`={global_batch}: {global_batch // batch_size} groups of "
                f"`batch_size`={batch_size} are fewer than the {world_size} processes; start fewer "
                f"processes, or lower `batch_size`"
            )
        if global_batch > len(self.beton):
            raise InputError(
                f"`global_batch`={global_batch}: {self.beton.path} has only {len(self.beton)} "
                f"images; lower `batch_size` or `global_batch`, or write more images"
            )
        for name, value, choices in (
            ("order", order, ("random", "sequential", "quasi_random")),
            ("on_bad_sample", on_bad_sample, ("raise", "skip")),
        ):
            check_choice(name, value, choices)
        if repeats < 1 or window_bytes < 1 or not 0 <= rank < world_size or resolution < 1:
            raise InputError(
                f"`repeats`={repeats}, `window_bytes`={window_bytes} and `resolution`={resolution} "
                f"must be 1 or more, and `rank`={rank} must be 0 or more and below "
                f"`world_size`={world_size}; correct them"
            )
        self.resolution, self.seed, self.rank, self.world_size = resolution, seed, rank, world_size
        self.global_batch, self.repeats, self.order = global_batch, repeats, order
        self.window_bytes, self.on_bad_sample = window_bytes, on_bad_sample
        self.steps_per_epoch = len(self.beton) // global_batch
        self.groups = global_batch // batch_size
        self._places = range(rank, self.groups, world_size)  # the groups of this process in a step
        self.batches_per_step = len(self._places)
        # of the newest epoch: (sample, reason)
        self.skipped: list[tuple[int, str]] = []
        self._crop: dict[str, Any] = {
            "scale": scale,
            "ratio": ratio,
            "flip_prob": flip_prob,
            "interpolation": interpolation,
        }
        jitter = ("brightness", "contrast", "saturation", "hue")
        names = {name: f"`color_jitter`[{place}]" for place, name in enumerate(jitter)}
        with option_names({"policy": "`rand_augment`", **names}):
            self._ops: list[DrawnOperation] = (
                [RandAugment(rand_augment, interpolation=interpolation)] if rand_augment else []
            )
            self._ops += [ColorJitter(*color_jitter), *ops]
        if decode == "gpu" and any(op.generate_code() != AUGMENT for op in ops):
            raise InputError(
                "`decode`='gpu': `ops` has an operation that only a CPU can run; use `decode`='cpu'"
            )
        RandomResizedCrop(resolution, **self._crop)  # raises now if its settings are invalid
        self.check_memory(resolution)
        self._start(Pool(num_workers))

    def __len__(self) -> int:
        """Number of batches of this process in an epoch."""
        return self.steps_per_epoch * self.batches_per_step

    def epoch(self, epoch: int, start_step: int = 0) -> Batches:
        """Yields the epoch's batches of batch_size images from step `start_step` on, without
        decoding the earlier ones. The caller may keep the batches. Closing the generator cancels
        the prefetched ones."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step={start_step} is not in 0 .. {self.steps_per_epoch}")
        if int(self.resolution) != self.resolution or self.resolution < 1:
            raise ValueError(
                f"resolution={self.resolution} is not an integer number of pixels, 1 or more"
            )
        self.skipped = []
        order = self._epoch_order(epoch)
        return self._iterate(
            self._operations(), self._batches(order, epoch, start_step), order.indices
        )

    def images_of(self, epoch: int, samples: np.ndarray) -> Batch:
        """Returns the samples as they appear in an epoch, for display: a batch as from `epoch`,
        with the slots of their first copies if there are several."""
        order = self._epoch_order(epoch)
        slots = np.argsort(order.indices)[samples] * self.repeats
        ops = self._operations()
        begun = self._submit(ops, Address(self.seed, epoch, slots), samples)
        return self._finish(ops, self._send(ops, begun, order.indices), order.indices)

    def _epoch_order(self, epoch: int) -> Order:
        return epoch_order(
            self.order,
            self.seed,
            epoch,
            files=self.beton.files,
            pointers=self.beton.pointers,
            sizes=self.beton.stored_bytes,
            window_bytes=self.window_bytes,
        )

    def _operations(self) -> list[DrawnOperation]:
        return [RandomResizedCrop(self.resolution, **self._crop), *self._ops]

    def _batches(
        self, order: Order, epoch: int, start_step: int
    ) -> Iterator[tuple[Address, np.ndarray]]:
        windows = Windows(self._opened.descriptors, order)
        steps = range(start_step, self.steps_per_epoch)
        for step, place in itertools.product(steps, self._places):
            slots = group_slots(
                step, place, batch_size=self.batch_size, groups=self.groups, repeats=self.repeats
            )
            places = slots // self.repeats
            windows.reach(int(places[0]))
            yield Address(self.seed, epoch, slots), order.indices[places]

    def _replacement(
        self,
        ops: Sequence[DrawnOperation],
        begun: _Begun,
        row: int,
        *,
        status: int,
        order: np.ndarray | None,
    ) -> tuple[int, torch.Tensor]:
        if self.on_bad_sample == "raise":
            return super()._replacement(ops, begun, row, status=status, order=order)
        _, address, indices = begun
        self.skipped.append((int(indices[row]), reason(status)))
        assert order is not None  # only evaluation has none
        slot = address.slots[row : row + 1]
        others = min(MAX_REPLACEMENTS, len(order) - 1)
        for further in range(1, others + 1):
            index = order[(slot // self.repeats + further) % len(order)]
            wrong, image = self._alone(ops, address._replace(slots=slot), index)
            if not wrong:
                return int(index[0]), image
        raise InputError(
            f"{self._error_text(indices[row], status)}; the {others} samples that follow it cannot "
            f"be read either"
        )


class EvalLoader(_Loader):
    """Central crops of an evaluation file, as in timm (see ops.crop.CenterCrop). Each image is
    loaded once over all processes: process r takes every world_size-th image, starting with the
    r-th, in file order. The batches are those of TrainLoader; the last one may be smaller. An image
    that cannot be read is an error, because an accuracy over fewer images is not comparable.

    path: a .beton file, or several: see beton.read_beton.
    batch_size: images per batch.
    resolution: pixels per side.
    num_workers: threads.
    crop_ratio: side of the crop divided by the shorter side of the resized image, 0 .. 1.
    interpolation: "bilinear" or "bicubic".
    rank, world_size: this process, and the number of processes.
    device: device of the batches.
    decode, memory_mb: as in TrainLoader.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        batch_size: int,
        resolution: int,
        num_workers: int,
        crop_ratio: float,
        interpolation: str = "bicubic",
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        decode: str = "cpu",
        memory_mb: int = MEMORY_MB,
    ) -> None:
        super().__init__(
            path,
            batch_size,
            device=device,
            decode=decode,
            memory_mb=memory_mb,
        )
        if not 0 < crop_ratio <= 1 or resolution < 1 or not 0 <= rank < world_size:
            raise InputError(
                f"`crop_ratio`={crop_ratio} must be above 0 and at most 1, "
                f"`resolution`={resolution} must be 1 or more, and `rank`={rank} must be 0 or more "
                f"and below `world_size`={world_size}; correct them"
            )
        self._crop = CenterCrop(resolution, crop_ratio, interpolation)
        self.indices = np.arange(rank, len(self.beton), world_size)
        self.check_memory(resolution)
        self._start(Pool(num_workers))

    def __len__(self) -> int:
        """Number of batches of this process."""
        return (len(self.indices) + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Batches:
        chunks = (
            self.indices[start : start + self.batch_size]
            for start in range(0, len(self.indices), self.batch_size)
        )
        return self._iterate([self._crop], ((Address(0, 0, chunk), chunk) for chunk in chunks))
