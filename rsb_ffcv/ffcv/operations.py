"""This project's decoders and augmentations as operations of FFCV's own pipelines.

FFCV's loader compiles the code that they generate. That code passes a batch to this core, whose
threads decode or augment the images. FFCV tells an operation neither the epoch nor the position of
a sample. The draws are therefore a function of (seed, epoch, index in the file), and the epoch is
what `set_epoch` was last given. A sample that comes twice in an epoch is refused, because both
copies would have the same draws. `rsb_ffcv.ffcv.Loader` takes the same operations and draws from
its own addresses, (seed, epoch, slot); they do not need `set_epoch` there.

FFCV's loader waits for ever if its thread fails. An error is therefore handed to the thread that
iterates, and raised there.
"""

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from queue import Full
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import numpy as np
import torch
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline import Compiler
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State

from rsb_ffcv import InputError
from rsb_ffcv.beton import RAW
from rsb_ffcv.loading.batch import BatchTransform, erase
from rsb_ffcv.loading.pool import Pool, Work
from rsb_ffcv.ops import augment, crop
from rsb_ffcv.ops.native import DECODE_MEMORY, KEEP, SAMPLE, reason
from rsb_ffcv.ops.operation import Address, Decoder, DrawnOperation

# Arguments: number of samples, their places, images, height, width. A place is three numbers: index
# in the file, address in memory, bytes
_RUN = ctypes.CFUNCTYPE(
    None,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
)


class _Addresses:
    """The addresses of an operation's draws, one epoch after the other.

    seed: of the draws.
    name: of the operation, for messages.
    """

    def __init__(self, seed: int, name: str) -> None:
        self._seed, self._name = seed, name
        self._epoch, self._used = 0, False
        # of each thread of FFCV, of which there is one per epoch: the epoch, and its samples so far
        self._threads: WeakKeyDictionary[threading.Thread, tuple[int, set[int]]]
        self._threads = WeakKeyDictionary()

    def set_epoch(self, epoch: int) -> None:
        self._epoch, self._used = epoch, False

    def of(self, indices: np.ndarray) -> Address:
        """Raises InputError if the draws of one of these samples were used in this epoch."""
        thread = threading.current_thread()
        if thread not in self._threads:
            if self._used:
                raise InputError(
                    f"{self._name}: a second epoch with the draws of epoch {self._epoch}; call "
                    f"set_epoch of the operation before each epoch"
                )
            self._threads[thread], self._used = (self._epoch, set()), True
        epoch, seen = self._threads[thread]
        for index in map(int, indices):
            if index in seen:
                raise InputError(
                    f"{self._name}: sample {index} comes twice in epoch {epoch}, with the same "
                    f"draws; use rsb_ffcv.ffcv.Loader for an order that repeats samples"
                )
            seen.add(index)
        return Address(self._seed, epoch, indices)


class _Failed:
    """Takes the place of the queue of FFCV's EpochIterator after an error. What is taken from it
    raises the error when the iterator unpacks it."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def put(self, item: object, block: bool = True, timeout: float | None = None) -> None:
        """Drops it."""

    def get(self) -> "_Failed":
        return self

    def __iter__(self) -> NoReturn:
        raise self._error


def _hand_over(error: Exception) -> None:
    """Lets FFCV's loader raise an error in the thread that iterates over it, and ends the thread
    that calls this function after its present batch."""
    thread = threading.current_thread()
    if not isinstance(thread, EpochIterator):
        raise error
    queue = thread.output_queue
    if isinstance(queue, _Failed):  # an earlier operation has failed on this batch
        return
    thread.output_queue = _Failed(error)
    thread.iter_ixes = iter(())
    with suppress(Full):  # then nobody waits for this queue
        queue.put_nowait(thread.output_queue)


class _Core:
    """Runs an operation of this core on batches of FFCV.

    operation: a decoder, or a transform.
    seed: of its draws; None: it draws nothing.
    name: of FFCV's operation.
    """

    def __init__(self, operation: DrawnOperation, seed: int | None, name: str) -> None:
        self.operation = operation
        self.addresses = None if seed is None else _Addresses(seed, name)
        self.metadata: np.ndarray | None = None  # of the images, for a decoder
        self.run = _RUN(self._run)  # compiled code calls it

    @cached_property
    def _pool(self) -> Pool:
        return Pool(Compiler.num_threads)

    def _run(self, count: int, places: int, images: int, height: int, width: int) -> None:
        try:
            self._batch(
                np.ctypeslib.as_array((ctypes.c_int64 * (3 * count)).from_address(places)),
                np.ctypeslib.as_array(
                    (ctypes.c_uint8 * (count * height * width * 3)).from_address(images)
                ).reshape(count, height, width, 3),
            )
        except Exception as error:  # compiled code cannot pass any on
            _hand_over(error)

    def _batch(self, places: np.ndarray, images: np.ndarray) -> None:
        """places: int64 (3 n). images: uint8 (n, H, W, 3), made or changed."""
        count, height, width, _ = images.shape
        indices, addresses, sizes = places.reshape(count, 3).T
        indices = np.ascontiguousarray(indices)
        samples, steps, decoder = np.zeros(count, SAMPLE), [], KEEP
        samples["height"], samples["width"] = height, width
        if self.metadata is not None:
            stored = self.metadata[indices]
            samples["height"], samples["width"] = stored["height"], stored["width"]
            samples["pointer"], samples["size"] = addresses, sizes
            samples["raw"] = stored["mode"] == RAW
            decoder = DECODE_MEMORY
        at = Address(0, 0, indices) if self.addresses is None else self.addresses.of(indices)
        if isinstance(self.operation, Decoder):
            self.operation.draw_into(samples, at)
        elif self.operation.passes:
            draws = self.operation.draw(at, samples["height"], samples["width"])
            draws = np.ascontiguousarray(draws)
            steps = [(self.operation.generate_code(), draws, self.operation.passes)]
        work = Work(torch.from_numpy(images), decoder=decoder, samples=samples, operations=steps)
        self._pool.submit(work)
        self._pool.wait(work, lambda row: f"sample {indices[row]}")
        for row in np.flatnonzero(work.status):
            raise InputError(
                f"sample {indices[row]} {reason(work.status[row])}; write the file again, or "
                f"correct the operation"
            )


class CoreDecoder(SimpleRGBImageDecoder):
    """core: of the decoder."""

    def __init__(self, core: _Core) -> None:
        super().__init__()
        self.core = core

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch. FFCV's loader needs it before each one."""
        if self.core.addresses is not None:
            self.core.addresses.set_epoch(epoch)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        assert isinstance(self.core.operation, Decoder)
        self.core.metadata = self.metadata
        shape, kind = self.core.operation.shape, np.dtype("u1")
        return (
            replace(previous_state, jit_mode=True, shape=shape, dtype=kind),
            (AllocationQuery(shape, kind), AllocationQuery((3,), np.dtype("i8"))),
        )

    def generate_code(self) -> Callable:
        read, run = self.memory_read, self.core.run

        def decode(batch_indices, memory, metadata, storage_state):  # type: ignore[no-untyped-def]
            images, places = memory
            for i in range(len(batch_indices)):
                data = read(metadata[batch_indices[i]]["data_ptr"], storage_state)
                places[i, 0] = batch_indices[i]
                places[i, 1] = data.ctypes.data
                places[i, 2] = data.size
            count, height, width, _ = images.shape
            run(count, places.ctypes.data, images.ctypes.data, height, width)
            return images

        return decode


class CoreTransform(Operation):
    """core: of the transform."""

    def __init__(self, core: _Core) -> None:
        super().__init__()
        self.core = core

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch. FFCV's loader needs it before each one."""
        assert self.core.addresses is not None
        self.core.addresses.set_epoch(epoch)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        return replace(previous_state, jit_mode=True), AllocationQuery((3,), np.dtype("i8"))

    def generate_code(self) -> Callable:
        run = self.core.run

        def transform(images, places, indices):  # type: ignore[no-untyped-def]
            for i in range(len(indices)):
                places[i, 0] = indices[i]
            count, height, width, _ = images.shape
            run(count, places.ctypes.data, images.ctypes.data, height, width)
            return images

        transform.with_indices = True  # type: ignore[attr-defined]
        return transform


# ---------------------------------------------------------------- operations


class RandomResizedCropDecoder(CoreDecoder):
    """Decodes a random crop: see ops.crop.RandomResizedCrop, with a seed of its draws."""

    def __init__(
        self,
        size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        *,
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_prob: float = 0.5,
        interpolation: str = "random",
        seed: int = 0,
    ) -> None:
        operation = crop.RandomResizedCrop(
            size, scale, ratio=ratio, flip_prob=flip_prob, interpolation=interpolation
        )
        super().__init__(_Core(operation, seed, type(self).__name__))


class CenterCropDecoder(CoreDecoder):
    """Decodes timm's evaluation crop: see ops.crop.CenterCrop."""

    def __init__(self, resolution: int, ratio: float, interpolation: str = "bicubic") -> None:
        operation = crop.CenterCrop(resolution, ratio, interpolation)
        super().__init__(_Core(operation, None, type(self).__name__))


class RandAugment(CoreTransform):
    """Any policy: RandAugment, AutoAugment, TrivialAugmentWide (`ta_wide`), 3-Augment. See
    ops.augment.RandAugment, with a seed of its draws."""

    def __init__(
        self,
        policy: str,
        *,
        fill: tuple[int, ...] | None = None,
        interpolation: str = "random",
        seed: int = 0,
    ) -> None:
        operation = augment.RandAugment(policy, fill, interpolation)
        super().__init__(_Core(operation, seed, type(self).__name__))


class ColorJitter(CoreTransform):
    """torchvision's ColorJitter: see ops.augment.ColorJitter, with a seed of its draws."""

    def __init__(
        self,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        *,
        seed: int = 0,
    ) -> None:
        operation = augment.ColorJitter(brightness, contrast, saturation, hue)
        super().__init__(_Core(operation, seed, type(self).__name__))


class RandomErasing(Operation):
    """timm's random erasing of normalized images (n, C, H, W), on any device, in place.

    prob: probability of erasing, per image, 0 .. 1.
    mode: see loading.batch.erase.
    area: smallest and largest area, as shares of the image's area.
    aspect: smallest and largest height / width.
    seed: of its draws.
    """

    def __init__(
        self,
        prob: float,
        *,
        mode: str = "pixel",
        area: tuple[float, float] = (0.02, 1 / 3),
        aspect: tuple[float, float] = (0.3, 1 / 0.3),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "erase_prob": prob,
            "erase_mode": mode,
            "erase_area": area,
            "erase_aspect": aspect,
        }
        BatchTransform(seed=seed, **self.settings)  # raises now if the settings are invalid
        self.addresses = _Addresses(seed, type(self).__name__)

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch. FFCV's loader needs it before each one."""
        self.addresses.set_epoch(epoch)

    def apply(self, images: torch.Tensor, address: Address) -> torch.Tensor:
        transform = BatchTransform(seed=address.seed, **self.settings)
        sides = images.shape[2], images.shape[3]
        drawn = transform.draw(address.epoch, address.slots, sides, mixing=False)
        if drawn.boxes is not None:
            erase(images, drawn.boxes, transform.erase_mode, noise_seed=drawn.noise_seed)
        return images

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        return replace(previous_state, jit_mode=False), None

    def generate_code(self) -> Callable:
        def erase_boxes(images: torch.Tensor, _: Any, indices: np.ndarray) -> torch.Tensor:
            try:
                address = self.addresses.of(indices.astype(np.int64))
            except InputError as error:
                _hand_over(error)
                return images
            return self.apply(images, address)

        erase_boxes.with_indices = True  # type: ignore[attr-defined]
        return erase_boxes
