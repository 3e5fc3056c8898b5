"""FFCV's Loader on this core.

In: the arguments of `ffcv.loader.Loader`. Out: for each batch a tuple with one value per output,
with FFCV's shapes, types and order of samples. The core's threads decode the images. A thread runs
what follows on the CPU, ahead of the caller; the caller's thread runs what follows on a GPU. Each
batch has its own memory, and an error in any of these threads is raised in the caller's.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
import torch.distributed
from ffcv.fields.base import Field
from ffcv.loader import OrderOption
from ffcv.reader import Reader
from ffcv.transforms import ToDevice
from ffcv.traversal_order import Random, Sequential
from ffcv.traversal_order.base import TraversalOrder
from ffcv.types import TYPE_ID_HANDLER

from rsb_ffcv import InputError, first_line
from rsb_ffcv.beton import (
    ARRAY_TYPE_ID,
    BYTES_TYPE_ID,
    IMAGE_TYPE_ID,
    JSON_TYPE_ID,
    TENSOR_TYPE_ID,
    Images,
    read_images,
    read_structure,
)
from rsb_ffcv.ffcv import kernels
from rsb_ffcv.ffcv.pipeline import Batch, Output, Planner, read_specs
from rsb_ffcv.loading.loader import Batch as ImageBatch
from rsb_ffcv.loading.loader import Batches, ImageLoader, Sent, Windows
from rsb_ffcv.loading.order import Order, epoch_order
from rsb_ffcv.loading.pool import Pool
from rsb_ffcv.ops.operation import Address, DrawnOperation

WINDOW_BYTES = 1 << 30  # see loading/order.py


class Loader:
    """A drop-in replacement for `ffcv.loader.Loader`.

    fname: a .beton file with any fields.
    batch_size: samples per batch.
    num_workers: threads of the core, of compiled operations and, as in FFCV, of torch; below 1: one
        per CPU.
    os_cache: False: with QUASI_RANDOM, pages that are not needed any more leave the page cache. The
        core always reads through it.
    order: SEQUENTIAL and RANDOM give FFCV's order. QUASI_RANDOM is `quasi_random` of TrainLoader,
        also if distributed. A subclass of FFCV's TraversalOrder is a user's own order.
    distributed: whether processes share an epoch, as torch's DistributedSampler divides it.
    seed: of the order and of every draw; None: a random one, or 0 if RANDOM and distributed.
    indices: the samples to load; None: all.
    pipelines: for each output a sequence of FFCV's operations and torch modules, a PipelineSpec, or
        None for no output. Settings of the operations may be changed between epochs.
    custom_fields: FFCV's Field class of each field whose type is not FFCV's own.
    drop_last: whether to leave out a last batch that is not full.
    batches_ahead: batches prepared in advance.
    recompile: whether FFCV compiles its operations again in each epoch, so that changes of their
        settings have an effect.

    next_epoch: the epoch that the next `iter` begins. It may be set.

    Raises InputError if the file is damaged, or a parameter or pipeline is invalid.
    """

    def __init__(
        self,
        fname: str | Path,
        batch_size: int,
        num_workers: int = -1,
        os_cache: bool = True,
        order: OrderOption | type[TraversalOrder] = OrderOption.SEQUENTIAL,
        distributed: bool = False,
        seed: int | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        pipelines: Mapping[str, Any] | None = None,
        custom_fields: Mapping[str, type[Field]] | None = None,
        drop_last: bool = True,
        batches_ahead: int = 3,
        recompile: bool = False,
    ) -> None:
        if batch_size < 1 or batches_ahead < 1:
            raise InputError(
                f"`batch_size`={batch_size} and `batches_ahead`={batches_ahead} must be 1 or more; "
                f"change them"
            )
        if seed is None:
            fixed = distributed and order == OrderOption.RANDOM
            seed = 0 if fixed else int(np.random.randint(0, np.iinfo("int32").max))
        self._arguments: dict[str, Any] = {
            "fname": fname,
            "batch_size": batch_size,
            "num_workers": num_workers,
            "os_cache": os_cache,
            "order": order,
            "distributed": distributed,
            "seed": seed,
            "indices": indices,
            "pipelines": pipelines,
            "custom_fields": custom_fields,
            "drop_last": drop_last,
            "batches_ahead": batches_ahead,
            "recompile": recompile,
        }
        self.fname, self.batch_size, self.batches_ahead = str(fname), batch_size, batches_ahead
        self.seed, self.drop_last, self.distributed = seed, drop_last, distributed
        self.os_cache, self.recompile = os_cache, recompile
        self.num_workers = num_workers if num_workers >= 1 else os.cpu_count() or 1
        self._custom = dict(custom_fields or {})
        self._handlers: dict[str, Field] = {}
        self._structure = read_structure(fname, self._metadata_type)
        for field in self._structure.fields:
            if field.name not in self._handlers:
                kind = TYPE_ID_HANDLER[field.type_id]
                self._handlers[field.name] = self._handler(kind, field.name, field.arguments)
        count = len(self._structure.metadata)
        every = np.arange(count, dtype="uint64")
        self.indices = _checked("indices", every if indices is None else indices, count)
        self._specs = read_specs(pipelines or {}, self._handlers)
        devices = [
            torch.device(operation.device)
            for spec in self._specs.values()
            for operation in spec.transforms
            if isinstance(operation, ToDevice)
        ]
        gpu = next((device for device in devices if device.type == "cuda"), None)
        self._copying = None if gpu is None else torch.cuda.Stream(gpu)
        self._pool = Pool(self.num_workers)
        self._file = open(fname, "rb", buffering=0)  # noqa: SIM115 closed in close()
        self._planner = Planner(
            self._structure,
            self._handlers,
            file=self._file.fileno(),
            reader=lambda: self.reader,
            num_threads=self.num_workers,
            memory=lambda shape: self._pool.memory(shape, gpu is not None),
            pinned=gpu is not None,
        )
        self._streams = {}
        for number, output in enumerate(o for o in self._planner.outputs(self._specs) if o.core):
            images = read_images(self._structure, self._specs[output.name].source)
            # different draws for each output
            self._streams[output.name] = _Stream(
                images,
                batch_size,
                pinned=gpu is not None,
                seed=seed ^ number << 32,
                pool=self._pool,
                ahead=batches_ahead,
            )
        self.traversal_order = self._traversal(order)
        self.next_epoch = 0
        self.first_traversal_order = self.next_traversal_order()

    # ---- the file

    def _handler(self, kind: type[Field], name: str, arguments: bytes) -> Field:
        try:
            return kind.from_binary(np.frombuffer(arguments, np.uint8))
        except (ValueError, TypeError, LookupError, AssertionError) as error:
            raise InputError(
                f"{self.fname}: damaged: the description of field {name!r} cannot be read "
                f"({first_line(error)}); write the file again"
            ) from error

    def _metadata_type(self, name: str, arguments: bytes) -> np.dtype | None:
        """The metadata of a field in `custom_fields`; None for others."""
        if name not in self._custom:
            return None
        self._handlers[name] = self._handler(self._custom[name], name, arguments)
        return self._handlers[name].metadata_type

    @cached_property
    def reader(self) -> Reader:
        """FFCV's reader of the file."""
        return Reader(self.fname, self._custom)

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Position and bytes in the file of each sample's data: of its first field that has any.
        uint64."""
        structure = self._structure
        for field in structure.fields:
            column = structure.column(field.name)
            if field.type_id in (ARRAY_TYPE_ID, TENSOR_TYPE_ID):
                return column, structure.sizes(column)
            if field.type_id in (BYTES_TYPE_ID, JSON_TYPE_ID):
                return structure.texts(field.name)
            if field.type_id == IMAGE_TYPE_ID:
                images = read_images(structure, field.name)
                return images.pointers, images.stored_bytes
        return (np.zeros(len(structure.metadata), np.uint64),) * 2

    # ---- the order

    def _traversal(self, order: OrderOption | type[TraversalOrder]) -> TraversalOrder:
        kinds = {
            OrderOption.SEQUENTIAL: Sequential,
            OrderOption.RANDOM: Random,
            OrderOption.QUASI_RANDOM: _QuasiRandom,
        }
        kind = kinds.get(order, order) if isinstance(order, OrderOption) else order
        if not (isinstance(kind, type) and issubclass(kind, TraversalOrder)):
            raise InputError(
                f"`order`={order!r}: must be an OrderOption or a subclass of FFCV's "
                f"TraversalOrder; change it"
            )
        if self.distributed and not torch.distributed.is_initialized():
            raise InputError(
                "`distributed`=True: this process is in no process group; call "
                "torch.distributed.init_process_group first, or use `distributed`=False"
            )
        return kind(self)

    def share(self) -> tuple[int, int]:
        """The number of this process, and of all processes that share an epoch."""
        if not self.distributed:
            return 0, 1
        return torch.distributed.get_rank(), torch.distributed.get_world_size()

    def next_traversal_order(self) -> np.ndarray:
        """The samples of the next epoch, in this process's order."""
        return self._order(self.next_epoch)

    def _order(self, epoch: int) -> np.ndarray:
        order = self.traversal_order.sample_order(epoch)
        return _checked("order", order, len(self._structure.metadata))

    def __len__(self) -> int:
        """Batches of an epoch."""
        count = len(self.first_traversal_order)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    # ---- the batches

    @property
    def code(self) -> dict[tuple[int, str], Callable]:
        """What FFCV has compiled for this loader, by operation."""
        return dict(self._planner.code)

    def __iter__(self) -> Iterator[tuple]:
        """Begins the next epoch."""
        epoch, self.next_epoch = self.next_epoch, self.next_epoch + 1
        return self.epoch(epoch)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple]:
        """Yields the batches of an epoch from batch `start_step` on, without decoding the earlier
        ones. `next_epoch` does not change. Closing the generator cancels the prefetched ones."""
        if not 0 <= start_step <= len(self):
            raise InputError(f"`start_step`={start_step}: must be 0 to {len(self)}; change it")
        if self.recompile:
            self._planner.code = {}
        outputs = self._planner.outputs(self._specs)
        order = self._order(epoch)[: len(self) * self.batch_size]
        return self._batches(outputs, epoch, order=order, start_step=start_step)

    def _batches(
        self, outputs: list[Output], epoch: int, *, order: np.ndarray, start_step: int
    ) -> Iterator[tuple]:
        rank, processes = self.share()
        slots = np.arange(len(order)) * processes + rank  # positions in the order of all processes
        starts = range(start_step * self.batch_size, len(order), self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in starts]
        windows = None
        if isinstance(self.traversal_order, _QuasiRandom) and not self.os_cache:
            windows = Windows(
                np.array([self._file.fileno()]), self.traversal_order.all_places(epoch)
            )

        def addressed(seed: int) -> Iterator[tuple[Address, np.ndarray]]:
            for part in parts:
                if windows is not None:
                    windows.reach(int(slots[part.start]))
                yield Address(seed, epoch, slots[part]), order[part].astype(np.int64)

        decoding = {
            output.name: self._streams[output.name].batches(output.core, addressed)
            for output in outputs
            if output.core
        }
        context: Any = nullcontext()
        if self._copying is not None:
            context = torch.cuda.stream(self._copying)

        def prepare(part: slice) -> tuple[Batch, torch.cuda.Event | None]:
            batch = Batch(indices=order[part], address=Address(self.seed, epoch, slots[part]))
            for name, images in decoding.items():
                batch.decoded[name] = next(images).images.numpy()
            with context:
                for output in outputs:
                    output.run(output.steps, batch)
            return batch, None if self._copying is None else self._copying.record_event()

        threads = ThreadPoolExecutor(
            1, "rsb_ffcv", numba.set_num_threads, (self._planner.num_threads,)
        )
        prepared: deque[Future] = deque()
        try:
            for part in parts:
                prepared.append(threads.submit(prepare, part))
                if len(prepared) > self.batches_ahead:
                    yield self._finish(outputs, *prepared.popleft().result())
            while prepared:
                yield self._finish(outputs, *prepared.popleft().result())
        finally:
            threads.shutdown(cancel_futures=True)
            for images in decoding.values():
                images.close()

    def _finish(
        self, outputs: list[Output], batch: Batch, copied: torch.cuda.Event | None
    ) -> tuple:
        """Runs what remains to be run on the GPU, in the caller's stream."""
        if copied is not None and self._copying is not None:
            current = torch.cuda.current_stream(self._copying.device)
            current.wait_event(copied)
            for value in batch.results.values():
                if isinstance(value, torch.Tensor) and value.is_cuda:
                    value.record_stream(current)
        for output in outputs:
            output.run(output.gpu_steps, batch)
        return tuple(batch.results[output.name] for output in outputs)

    def filter(self, field_name: str, condition: Callable[[Any], bool]) -> "Loader":
        """Returns a loader of the samples for which `condition(value)` is true. value: one row of
        the output `field_name`. FFCV takes the positions within `indices` for indices of the file;
        this function does not."""
        if field_name not in self._handlers:
            raise InputError(
                f"`field_name`={field_name!r}: the file has no such field; use one of "
                f"{', '.join(self._handlers)}"
            )
        pipelines: dict[str, Any] = dict.fromkeys(self._handlers)
        given = self._arguments["pipelines"] or {}
        if field_name in given:
            pipelines[field_name] = given[field_name]
        else:
            del pipelines[field_name]
        alone = {
            "pipelines": pipelines,
            "order": OrderOption.SEQUENTIAL,
            "drop_last": False,
            "distributed": False,
        }
        loader = Loader(**(self._arguments | alone))
        chosen = [bool(condition(value)) for (batch,) in loader for value in batch]
        loader.close()
        return Loader(**(self._arguments | {"indices": self.indices[np.array(chosen, bool)]}))

    def close(self) -> None:
        """Ends the threads. Garbage collection also closes the loader."""
        for stream in self._streams.values():
            stream.close()
        self._pool.close()
        self._file.close()


class _Stream(ImageLoader):
    """The images of one output.

    images, batch_size, pinned: see ImageLoader.
    seed: of its draws.
    pool: the threads, of all outputs.
    ahead: batches prepared in advance.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        pinned: bool,
        seed: int,
        pool: Pool,
        ahead: int,
    ) -> None:
        super().__init__(images, batch_size, pinned=pinned)
        self._seed, self._ahead = seed, ahead
        self._start(pool)

    def batches(
        self,
        ops: Sequence[DrawnOperation],
        addressed: Callable[[int], Iterable[tuple[Address, np.ndarray]]],
    ) -> Batches:
        """addressed: returns the addresses for a seed, and the indices of their images."""
        return self._iterate(ops, addressed(self._seed))

    def _finish(
        self, ops: Sequence[DrawnOperation], sent: Sent, order: np.ndarray | None
    ) -> ImageBatch:
        batch = super()._finish(ops, sent, order)
        if isinstance(last := ops[-1], kernels.Normalize):
            _, draws, _ = sent.begun.work.operations[-1]
            batch = batch._replace(images=torch.from_numpy(last.result(draws)))
        return batch


class _QuasiRandom(TraversalOrder):
    """`quasi_random` of loading/order.py, over `indices`. Distributed, the processes share it as
    torch's DistributedSampler shares an order: with the first samples repeated at the end until
    their number is a multiple of the processes."""

    _newest: tuple[int, Order] | None = None  # an epoch needs it twice

    def all_places(self, epoch: int) -> Order:
        """The order of all processes: positions in `indices`."""
        if self._newest is None or self._newest[0] != epoch:
            self._newest = epoch, self._places(epoch)
        return self._newest[1]

    def _places(self, epoch: int) -> Order:
        pointers, sizes = self.loader.places
        return epoch_order(
            "quasi_random",
            self.seed,
            epoch,
            files=np.zeros(len(self.indices), np.uint16),
            pointers=pointers[self.indices],
            sizes=sizes[self.indices],
            window_bytes=WINDOW_BYTES,
        )

    def sample_order(self, epoch: int) -> np.ndarray:
        places = self.all_places(epoch).indices
        rank, processes = self.loader.share()
        shared = np.resize(places, -(-len(places) // processes) * processes)
        return self.indices[shared[rank::processes]]


def _checked(name: str, values: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """Returns indices of samples as an array. Raises InputError unless all are 0 .. count - 1."""
    found = np.asarray(values)
    if found.size == 0:
        return found.astype(np.int64).reshape(-1)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise InputError(
            f"`{name}`: must be a sequence of integers, not an array of {found.dtype} with "
            f"{found.ndim} dimensions; change it"
        )
    outside = (found < 0) | (found >= count)
    if outside.any():
        raise InputError(
            f"`{name}`: {found[np.argmax(outside)]} is not a sample of the file; use 0 to "
            f"{count - 1}"
        )
    return found
