"""FFCV's pipelines, divided into what this core runs and what FFCV compiles.

In: for each output of a loader, a decoder and transforms: FFCV's classes, or a user's. Out: an
`Output`. Of an image's pipeline, the core's threads run the decoder and the transforms that they
know, up to the first one that they do not. FFCV's `Compiler` compiles the later ones that work on
arrays, and what FFCV alone can decode. Those that work on tensors are called, as in FFCV.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from ffcv.fields import basics, bytes, ndarray, rgb_image
from ffcv.fields.base import Field
from ffcv.memory_managers import OSCacheManager
from ffcv.pipeline import Compiler, PipelineSpec
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from ffcv.reader import Reader
from ffcv.transforms import (
    Cutout,
    NormalizeImage,
    RandomBrightness,
    RandomContrast,
    RandomHorizontalFlip,
    RandomSaturation,
    RandomTranslate,
    ReplaceLabel,
    ToDevice,
    ToTorchImage,
)
from numba.core.errors import NumbaError

from rsb_ffcv import InputError, warn
from rsb_ffcv.beton import Structure
from rsb_ffcv.ffcv import kernels
from rsb_ffcv.ffcv.operations import CoreDecoder, CoreTransform, RandomErasing
from rsb_ffcv.ops import native as n
from rsb_ffcv.ops.operation import Address, DrawnOperation

CPU = torch.device("cpu")
FIRST = State(True, CPU, (), np.dtype("u1"))  # before a decoder
ENHANCE = {RandomBrightness: n.BRIGHTNESS, RandomContrast: n.CONTRAST, RandomSaturation: n.COLOR}

# The simplest threading layer of numba ends the process if two threads run parallel code at once.
_compiled_code = threading.Lock()
_announced: set[type] = set()


class PipelineError(InputError, TypeError):
    """A pipeline is invalid. For some of these, FFCV raises TypeError."""


@dataclass(eq=False, kw_only=True)
class Batch:
    """A batch on its way through the steps.

    indices: (n,), of its samples in the file, an integer type.
    address: of its draws.
    decoded: what the core has made, by output.
    results: the newest result of each output, by name, and of each operation, by id.
    shared: the shared memory of operations, by id.
    """

    indices: np.ndarray
    address: Address
    decoded: dict[str, np.ndarray] = field(default_factory=dict)
    results: dict[str | int, Any] = field(default_factory=dict)
    shared: dict[int, Any] = field(default_factory=dict)


class Step(NamedTuple):
    """What the core's threads do not run. run: (result of the step before, batch) -> result."""

    operation: Operation
    run: Callable[[Any, Batch], Any]


@dataclass(eq=False, kw_only=True)
class Output:
    """One output of a loader.

    name: of the output.
    core: the operations of the core, the decoder first; empty if it does not decode this output.
    steps: the first one takes the core's result, or decodes. The last one may copy to a GPU.
    gpu_steps: what follows on the GPU.
    """

    name: str
    core: list[DrawnOperation] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    gpu_steps: list[Step] = field(default_factory=list)

    def run(self, steps: list[Step], batch: Batch) -> None:
        value = batch.results.get(self.name)
        for operation, run in steps:
            value = batch.results[id(operation)] = run(value, batch)
        batch.results[self.name] = value


def read_specs(
    pipelines: Mapping[str, Any], handlers: Mapping[str, Field]
) -> dict[str, PipelineSpec]:
    """Returns copies of the pipelines of all outputs, in FFCV's order: those of the file's fields,
    then the others. Raises PipelineError.

    pipelines: for each output a sequence of operations, a PipelineSpec, or None for no output. A
        field that is not in it has FFCV's default pipeline.
    handlers: FFCV's field of each name in the file.
    """
    found = {}
    for name in [*handlers, *(name for name in pipelines if name not in handlers)]:
        given = pipelines.get(name, PipelineSpec(name))
        if given is None:
            continue
        if isinstance(given, PipelineSpec):
            spec = PipelineSpec(given.source, given.decoder, list(given.transforms))
        elif isinstance(given, Sequence) and not isinstance(given, str):
            spec = PipelineSpec(name, None, list(given))
        else:
            raise PipelineError(
                f"`pipelines`[{name!r}]={given!r}: must be a sequence of operations, a "
                f"PipelineSpec, or None; change it"
            )
        decoder = None
        if not isinstance(spec.source, Operation):
            if spec.source not in handlers:
                raise PipelineError(
                    f"`pipelines`[{name!r}]: the file has no field {spec.source!r}; use one of "
                    f"{', '.join(handlers)}, or a PipelineSpec whose source is one of them"
                )
            decoder = handlers[spec.source].get_decoder_class()
        with _named(name):
            spec.accept_decoder(decoder, name)
        for operation in spec.transforms:
            if not isinstance(operation, Operation):
                raise PipelineError(
                    f"`pipelines`[{name!r}]: {operation!r} is neither an operation of FFCV nor a "
                    f"torch.nn.Module; change it"
                )
        found[name] = spec
    return found


class Planner:
    """Makes the outputs of a loader for each epoch, from the present settings of its operations.

    structure: of the file.
    handlers: see `read_specs`.
    file: descriptor of the open file.
    reader: returns FFCV's reader of the file, for what FFCV decodes.
    num_threads: of compiled operations.
    memory: returns uint8 memory of a shape, for results of the core.
    pinned: whether steps get memory from which a GPU can copy by itself.

    code: what FFCV has compiled, by the id of the operation and the kind of function. It is kept
        for later epochs.
    """

    def __init__(
        self,
        structure: Structure,
        handlers: Mapping[str, Field],
        *,
        file: int,
        reader: Callable[[], Reader],
        num_threads: int,
        memory: Callable[[Sequence[int]], torch.Tensor],
        pinned: bool,
    ) -> None:
        self._structure, self._handlers, self._reader = structure, handlers, reader
        most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        self.num_threads = min(num_threads, most)
        self._memory, self._pinned = memory, pinned
        self._file = file
        self.code: dict[tuple[int, str], Callable] = {}
        self._sources: set[int] = set()  # ids of the operations from which outputs continue
        # by the id of each operation: its field, and the state after it
        self._after: dict[int, tuple[str, State]] = {}

    def outputs(self, specs: Mapping[str, PipelineSpec]) -> list[Output]:
        """Returns the outputs for an epoch. Raises PipelineError."""
        Compiler.set_num_threads(self.num_threads)  # also torch's, as FFCV does
        self._sources = {id(spec.source) for spec in specs.values()}
        self._after.clear()
        made = []
        for name, spec in specs.items():
            with _named(name):
                made.append(self._output(name, spec))
        return made

    def _output(self, name: str, spec: PipelineSpec) -> Output:
        output, transforms = Output(name=name), list(spec.transforms)
        if isinstance(spec.source, Operation):
            last = spec.source
            if id(last) not in self._after:
                raise PipelineError(
                    f"continues from {_name(last)}, which is in no pipeline before it; move it "
                    f"behind that pipeline"
                )
            column, state = self._after[id(last)]
            first = Step(last, lambda _, batch: batch.results[id(spec.source)])
        else:
            last, column = spec.decoder, spec.source
            state, allocation = self._declare(last, column, FIRST)
            output.core = self._core_decoder(last, column)
            if output.core:
                while transforms and id(last) not in self._sources:
                    place = len(spec.transforms) - len(transforms)
                    if not self._add_to_core(output.core, transforms[0], place):
                        break
                    last = transforms.pop(0)
                    state, _ = self._declare(last, column, state)
                first = Step(last, lambda _, batch: batch.decoded[name])
            else:
                first = Step(last, self._first(last, column, allocation))
        steps = output.steps if state.device == CPU else output.gpu_steps
        steps.append(first)
        self._after[id(last)] = column, state
        for operation in transforms:
            steps = output.steps if state.device == CPU else output.gpu_steps
            run, state = self._step(operation, column, state)
            steps.append(Step(operation, run))
            self._after[id(operation)] = column, state
        return output

    def _declare(
        self, operation: Operation, column: str, state: State, *, read: Any = None
    ) -> tuple[State, Any]:
        """Returns the state after an operation, and the memory that it needs. read: the function
        with which compiled decoders read the file."""
        operation.accept_field(self._handlers[column])
        operation.accept_globals(self._structure.column(column), read)
        return operation.declare_state_and_memory(state)

    # ---- what the core runs

    def _core_decoder(self, decoder: Operation, column: str) -> list[DrawnOperation]:
        """Returns the core's operation for an image's decoder, or none."""
        if type(decoder) is rgb_image.SimpleRGBImageDecoder:
            image = self._structure.column(column)[0]  # _declare has checked that all are equal
            return [kernels.WholeImage(int(image["height"]), int(image["width"]))]
        if type(decoder) is rgb_image.CenterCropRGBImageDecoder:
            return [kernels.CentralSquare(_pair(decoder.output_size), decoder.ratio)]
        if type(decoder) is rgb_image.RandomResizedCropRGBImageDecoder:
            return [
                kernels.RandomCrop(_pair(decoder.output_size), decoder.scale, ratio=decoder.ratio)
            ]
        if isinstance(decoder, CoreDecoder):
            return [decoder.core.operation]
        return []

    def _add_to_core(self, core: list[DrawnOperation], operation: Operation, place: int) -> bool:
        """Adds an image's transform to the operations of the core. Returns whether it has one for
        it. place: of the transform after the decoder."""
        if isinstance(core[-1], kernels.Normalize):  # its result is no image any more
            return False
        if type(operation) is RandomHorizontalFlip:
            if isinstance(core[-1], kernels.RandomCrop):
                core[-1] = core[-1].flipped(operation.flip_prob)
            else:
                core.append(kernels.Flip(place, operation.flip_prob))
        elif type(operation) is Cutout:
            core.append(kernels.Cutout(place, operation.crop_size, operation.fill))
        elif type(operation) is RandomTranslate:
            core.append(kernels.Translate(place, operation.padding, operation.fill))
        elif type(operation) in ENHANCE:
            op, magnitude, p = ENHANCE[type(operation)], operation.magnitude, operation.p
            core.append(kernels.Enhance(place, op, magnitude=magnitude, p=p))
        elif type(operation) is NormalizeImage and _table(operation).itemsize in kernels.NORMALIZE:
            core.append(kernels.Normalize(_table(operation), self._memory))
        elif isinstance(operation, CoreTransform):
            core.append(operation.core.operation)
        else:
            return False
        return True

    # ---- decoding without the core

    def _first(
        self, decoder: Operation, column: str, allocation: Any
    ) -> Callable[[Any, Batch], Any]:
        """Returns what decodes a field."""
        metadata, handler = self._structure.column(column), self._handlers[column]
        if type(decoder) in (basics.IntDecoder, basics.FloatDecoder):
            return lambda _, batch: metadata[batch.indices].reshape(-1, 1)
        if type(decoder) is ndarray.NDArrayDecoder:
            # not the file's: a custom field may have another description of it
            shape, kind = tuple(map(int, handler.shape)), handler.dtype
            width = int(np.prod(shape)) * kind.itemsize
            self._structure.check_inside(column, metadata, np.uint64(width))
            sizes = np.broadcast_to(width, len(metadata))
            return lambda _, batch: (
                self._read(column, metadata, sizes=sizes, batch=batch, width=width)
                .view(kind)
                .reshape(-1, *shape)
            )
        if type(decoder) is bytes.BytesDecoder:
            pointers, sizes = self._structure.texts(column)
            width = int(sizes.max())
            return lambda _, batch: self._read(
                column, pointers, sizes=sizes, batch=batch, width=width
            )
        self._announce(decoder)
        storage = self._storage
        self._declare(decoder, column, FIRST, read=storage.read)
        decode = self._compiled(decoder, "decoder", decoder.generate_code())

        def run(_: Any, batch: Batch) -> Any:
            memory = self._allocate(allocation, len(batch.indices))
            with _compiled_code:
                return decode(batch.indices, memory, metadata, storage.state)

        return run

    def _read(
        self,
        column: str,
        pointers: np.ndarray,
        *,
        sizes: np.ndarray,
        batch: Batch,
        width: int,
    ) -> np.ndarray:
        """Reads the data of a batch: uint8 (n, width). The rest of a row is 0."""
        rows = np.zeros((len(batch.indices), width), np.uint8)
        for row, index in zip(rows, batch.indices):
            size = int(sizes[index])
            if os.preadv(self._file, [row[:size]], int(pointers[index])) != size:
                raise InputError(
                    f"{self._structure.path}: sample {index} cannot be read: the file ends inside "
                    f"its {column!r}; write the file again"
                )
        return rows

    # ---- transforms

    def _step(
        self, operation: Operation, column: str, state: State
    ) -> tuple[Callable[[Any, Batch], Any], State]:
        """Returns what runs a transform, and the state after it."""
        is_tensor = isinstance(state.dtype, torch.dtype)
        if type(operation) is ToDevice:
            device = torch.device(operation.device)
            if not is_tensor:
                raise PipelineError("ToDevice gets an array; put ToTensor before it")
            # FFCV copies also if the tensor is already there: its memory is used again.
            return (
                lambda value, _: value.to(device, non_blocking=operation.non_blocking),
                replace(state, device=device),
            )
        if type(operation) is NormalizeImage and is_tensor:
            return self._normalize(operation, state)
        if type(operation) is RandomErasing:
            return lambda images, batch: operation.apply(images, batch.address), state
        if type(operation) is ReplaceLabel and not is_tensor:

            def relabel(labels: np.ndarray, batch: Batch) -> np.ndarray:
                labels[np.isin(batch.indices, operation.indices)] = operation.new_label
                return labels

            return relabel, state
        before = state
        try:
            state, allocation = self._declare(operation, column, state)
        except AssertionError as error:  # of FFCV's State
            if not is_tensor:
                raise
            raise PipelineError(
                f"{_name(operation)} works on arrays and comes after ToTensor; put it before "
                f"ToTensor"
            ) from error
        if type(operation) is ToTorchImage:
            return _to_torch_image(operation), state
        return self._generated(operation, state, before=before, allocation=allocation), state

    def _generated(
        self, operation: Operation, state: State, *, before: State, allocation: Any
    ) -> Callable[[Any, Batch], Any]:
        """Returns what runs the code that an operation generates, compiled if it works on arrays.
        before: the state before it."""
        shared_allocation = operation.declare_shared_memory(before)
        code, begin = operation.generate_code(), operation.generate_code_for_shared_state()
        with_indices = getattr(code, "with_indices", False)
        lock: Any = nullcontext()
        if state.jit_mode:
            self._announce(operation)
            lock = _compiled_code
            code = self._compiled(operation, "code", code)
            begin = begin and self._compiled(operation, "shared", begin)

        def run(value: Any, batch: Batch) -> Any:
            count = len(batch.indices)
            arguments = [value, self._allocate(allocation, count)]
            if with_indices:
                arguments.append(batch.indices)
            with lock:
                if begin is not None:
                    if id(operation) not in batch.shared:
                        shared = self._allocate(shared_allocation, count)
                        batch.shared[id(operation)] = shared
                        begin(shared)
                    arguments.append(batch.shared[id(operation)])
                try:
                    return code(*arguments)
                except NumbaError as error:
                    raise PipelineError(
                        f"{_name(operation)} cannot be compiled: {_one_line(error)}; correct it, "
                        f"or put it after ToTensor if it works on tensors"
                    ) from error

        return run

    def _normalize(
        self, operation: NormalizeImage, state: State
    ) -> tuple[Callable[[Any, Batch], Any], State]:
        """NormalizeImage on tensors (n, 3, H, W): looks values up in its table. FFCV has this on
        GPUs only, and needs cupy."""
        if len(state.shape) != 3 or state.shape[0] != 3 or state.dtype is not torch.uint8:
            raise PipelineError(
                "NormalizeImage needs uint8 images (3, height, width) here; put ToTorchImage "
                "before it, or NormalizeImage before ToTensor"
            )
        table = torch.from_numpy(_table(operation).view(operation.original_dtype))
        flat = table.reshape(-1).to(state.device)
        channel = torch.arange(3, device=state.device, dtype=torch.int32)

        def run(images: torch.Tensor, _: Batch) -> torch.Tensor:
            places = images.permute(0, 2, 3, 1).int().mul_(3).add_(channel)
            return flat[places].permute(0, 3, 1, 2)

        return run, replace(state, dtype=table.dtype)

    # ---- FFCV's compiler

    def _announce(self, operation: Operation) -> None:
        """Warns once that FFCV compiles operations of this type."""
        if type(operation) not in _announced:
            _announced.add(type(operation))
            warn(
                f"{_name(operation)} runs through FFCV's compiler: it compiles for seconds, and "
                f"random numbers are not reproducible"
            )

    def _compiled(self, operation: Operation, kind: str, code: Callable) -> Callable:
        if (id(operation), kind) not in self.code:
            self.code[id(operation), kind] = Compiler.compile(code)
        return self.code[id(operation), kind]

    @cached_property
    def _storage(self) -> "_Storage":
        return _Storage(self._reader())

    def _allocate(self, wanted: Any, count: int) -> Any:
        """Memory for a batch of `count` samples: an array, a tensor, a tuple of these, or None."""
        if wanted is None:
            return None
        if not isinstance(wanted, AllocationQuery):
            return tuple(self._allocate(one, count) for one in wanted)
        shape, kind = (count, *map(int, wanted.shape)), wanted.dtype
        on_cpu = wanted.device is None or torch.device(wanted.device) == CPU
        if isinstance(kind, torch.dtype):
            pinned = self._pinned and on_cpu
            return torch.empty(shape, dtype=kind, device=wanted.device, pin_memory=pinned)
        dtype = torch.from_numpy(np.empty(0, kind)).dtype
        return torch.empty(shape, dtype=dtype, pin_memory=self._pinned).numpy()


class _Storage:
    """The file for FFCV's compiled decoders. read: a compiled function; state: its argument."""

    def __init__(self, reader: Reader) -> None:
        manager = OSCacheManager(reader)
        self.read = manager.compile_reader()
        context = manager.schedule_epoch(())
        context.__enter__()  # it maps the file, and has nothing to undo
        self.state = context.state


# ---------------------------------------------------------------- helpers


@contextmanager
def _named(output: str) -> Iterator[None]:
    """Raises the errors of a pipeline, also FFCV's, as a PipelineError that names the output."""
    try:
        yield
    except (AssertionError, TypeError, ValueError) as error:
        if isinstance(error, InputError) and not isinstance(error, PipelineError):
            raise
        raise PipelineError(f"`pipelines`[{output!r}]: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _name(operation: Operation) -> str:
    return type(operation).__name__


def _pair(size: Sequence[int]) -> tuple[int, int]:
    height, width = size
    return int(height), int(width)


def _table(operation: NormalizeImage) -> np.ndarray:
    """(256, 3). If FFCV's own loader has used the operation on a GPU, its table is a tensor."""
    table = operation.lookup_table
    return table.cpu().numpy() if isinstance(table, torch.Tensor) else table


def _to_torch_image(operation: ToTorchImage) -> Callable[[Any, Batch], torch.Tensor]:
    """FFCV's copies to memory of the CPU if channels_last is False, also on a GPU."""
    layout = torch.channels_last if operation.channels_last else torch.contiguous_format

    def run(images: torch.Tensor, _: Batch) -> torch.Tensor:
        if operation.enable_int16conv:
            images = images.view(torch.float16)
        return images.permute(0, 3, 1, 2).contiguous(memory_format=layout)

    return run
