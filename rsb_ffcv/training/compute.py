"""Chooses the device, precision, compilation and processes of a run, once, at its start. The first
lines of output report the choice."""

import gc
import math
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from rsb_ffcv import InputError, counted, first_line, warn
from rsb_ffcv.training import join, launch


class _Place(NamedTuple):
    """Where a process runs. device: see _device_id. cores: that it may use. wrong: what this
    machine lacks, as text for a message; empty if nothing."""

    host: str
    device: str
    cores: set[int]
    wrong: str = ""


# Timeout of collectives while all processes are alive: one of them may be reading a large file.
COLLECTIVE_SECONDS = 1800
# Texts of out-of-memory errors that torch does not raise as OutOfMemoryError: from the CPU's
# allocator, cuBLAS and cuDNN, and the driver.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "alloc_failed",
    "cuda error: out of memory",
)
Result = TypeVar("Result")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Device, precision and processes that this process uses.

    device: where the model and the batches are.
    precision: "fp32", "fp16" or "bf16", of the forward pass.
    compile: whether the model is compiled.
    channels_last: memory layout of weights and images.
    rank, world_size: this process, and the number of processes, in the complete job.
    local_world_size: processes of the job on this machine.
    sharing: those of them that may run on the same cores as this process, with itself. SLURM may
        bind each process to its own cores.
    hosts: the name of each process's machine.
    """

    device: torch.device
    precision: str
    compile: bool
    channels_last: bool
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    sharing: int = 1
    hosts: tuple[str, ...] = ()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[object]:
        """A context in which the model's forward pass runs in the chosen precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])

    def seed(self, seed: int) -> None:
        """Seeds torch's global generators of the CPU and of this process's device, with the numbers
        of torch.manual_seed. That formats a stack trace for each kind of device that is not in use,
        which takes longer than a small model's step."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def loader_threads(self, requested: int | str) -> int:
        """The number of loader threads for data.num_workers=`requested`. Warns, with a number
        that fits, if the processes of this machine have more threads than cores."""
        cores = available_cores()
        fitting = max(1, cores // self.sharing)
        if isinstance(requested, str):  # "auto"
            return fitting
        if self.is_main and requested * self.sharing > cores:
            warn(
                f"data.num_workers={requested}: with {self.sharing} "
                f"process{'es' if self.sharing > 1 else ''} on these cores, this starts "
                f"{requested * self.sharing} threads on {cores} cores; "
                f"use data.num_workers={fitting} or auto"
            )
        return requested

    def peak_memory_mb(self) -> float:
        """Peak memory in MiB, of the device on CUDA, else of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return getrusage(RUSAGE_SELF).ru_maxrss / 2**10

    def describe(self) -> str:
        """The choice as one line for the console."""
        name = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"CPU, {counted(torch.get_num_threads(), 'thread')}"
        )
        return (
            f"device {self.device.type} ({name}), precision {self.precision}, "
            f"compile {'on' if self.compile else 'off'}, "
            f"channels_last {'on' if self.channels_last else 'off'}, "
            f"{self.world_size} process{'es' if self.world_size > 1 else ''}, "
            f"torch {torch.__version__}"
        )


def set_up(
    device: str,
    precision: str,
    *,
    compile: str,
    channels_last: bool,
    threads: int,
    timeout_s: float = 120.0,
) -> Compute:
    """Resolves "auto", and joins the process group of the job, if any (see launch).

    device: "auto", "cpu" or "cuda".
    precision: "auto", "fp32", "fp16" or "bf16".
    compile: "auto", "0" or "1"; "auto" warns if a GPU's model cannot be compiled.
    channels_last: whether weights and images use this memory layout.
    threads: CPU threads of torch; 0: OMP_NUM_THREADS, else an equal share of the cores.
    timeout_s: seconds after which a silent process counts as lost (see processes.Heartbeat).

    Raises InputError if this machine lacks the requested device or precision, or what torch.compile
    needs, if it has a CUDA device that torch cannot use, if the environment describes a job
    incompletely, if the processes cannot connect to each other, or if two of them have the same
    GPU.
    """
    rank, world_size, local_rank, local_world_size = launch.place_in_job()
    wrong = ""
    if device != "cpu" and not torch.cuda.is_available():
        found = nvidia_devices()
        if found:
            wrong = (
                f"compute.device={device}: this machine has {found}, but torch {torch.__version__} "
                f"cannot use it ({_why_no_cuda()}); install a driver and a torch that match "
                f"(https://pytorch.org/get-started), or train on the CPU with compute.device=cpu"
            )
        elif device == "cuda":
            wrong = (
                "compute.device=cuda: this machine has no usable CUDA device; use "
                "compute.device=auto or cpu"
            )
        device = "cpu"
    kind = "cuda" if device != "cpu" else "cpu"
    chosen = torch.device(kind)
    if kind == "cuda":
        chosen = torch.device("cuda", own_device(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True
    if precision == "auto":
        precision = (
            "fp16"
            if kind == "cuda"
            else "bf16"
            if torch.cpu._is_avx512_bf16_supported()
            else "fp32"
        )
    if precision == "fp16" and kind == "cpu":
        wrong = (
            wrong
            or "compute.precision=fp16: the CPU trains in fp32 or bf16; use compute.precision=auto"
        )
    lacking = missing_for_compile(kind)
    if compile == "1" and lacking:
        wrong = wrong or (
            f"compute.compile=1: torch.compile needs {lacking}; install it, or use "
            f"compute.compile=0, which trains more slowly"
        )
    if compile == "auto" and kind == "cuda" and lacking and rank == 0:
        warn(
            f"compute.compile=auto: the model is not compiled, and trains more slowly: "
            f"torch.compile needs {lacking}; install it, or use compute.compile=0"
        )
    place = _Place(launch.host_name(), _device_id(chosen), os.sched_getaffinity(0), wrong)
    if world_size > 1 and not dist.is_initialized():
        places = join.join(
            rank,
            world_size,
            backend="cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            timeout_s=timeout_s,
            collective_s=max(COLLECTIVE_SECONDS, 2 * timeout_s),
            place=place,
        )
    else:
        places = gather([place])
    # The error of one is raised by all of them, and reported once.
    for number, other in enumerate(places):
        if other.wrong:
            who = f"process {number} ({other.host}): " if world_size > 1 else ""
            raise InputError(f"{who}{other.wrong}")
    check_devices([(other.host, other.device) for other in places])
    sharing = sum(
        other.host == place.host and not place.cores.isdisjoint(other.cores) for other in places
    )
    # torchrun sets it to 1 unless the user has set it.
    requested = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    torch.set_num_threads(
        threads
        or (
            int(requested)
            if requested.isdigit() and requested != "0"
            else max(1, available_cores() // sharing)
        )
    )
    return Compute(
        device=chosen,
        precision=precision,
        compile=compile == "1" or compile == "auto" and kind == "cuda" and not lacking,
        channels_last=channels_last,
        rank=rank,
        world_size=world_size,
        local_world_size=local_world_size,
        sharing=sharing,
        hosts=tuple(other.host for other in places),
    )


def available_cores() -> int:
    """The number of cores that this process may use: its affinity, limited by the container's CPU
    quota (cgroup v2), rounded up."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2
        return cores


def missing_for_compile(kind: str) -> str:
    """What torch.compile needs for a device of this kind, "cpu" or "cuda", and this machine lacks,
    as text for a message; empty if nothing.

    The code that inductor (for the CPU) and Triton (for CUDA) make and compile includes Python.h.
    """
    missing = []
    if kind == "cuda":
        if not find_spec("triton"):
            missing.append("the package triton")
        if not any(
            map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])
        ):
            missing.append("a C compiler (gcc or clang, or the one that CC names)")
    elif not shutil.which(os.environ.get("CXX", "g++")):
        missing.append("a C++ compiler (g++, or the one that CXX names)")
    # not the scheme of Debian's own Python, whose headers are elsewhere; Triton does the same
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
        missing.append("Python's headers (Debian: python3-dev)")
    return " and ".join(missing)


def nvidia_devices(root: str = "/dev") -> str:
    """The NVIDIA devices that this process may see, as text for a message; empty if there are
    none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"):
        return ""
    return ", ".join(sorted(str(path) for path in Path(root).glob("nvidia[0-9]*")))


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "it was built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return "it finds no device"


def own_device(local_rank: int, count: int) -> int:
    """The index of this process's CUDA device among the `count` visible ones.

    A process that sees one device uses it, as with `srun --gpus-per-task=1`; check_devices detects
    two processes that share it. Raises InputError if there are fewer devices than local processes.
    """
    if count == 1:
        return 0
    if local_rank >= count:
        raise InputError(
            f"LOCAL_RANK={local_rank}: no CUDA device is left for this process ({count} visible); "
            f"start one process per GPU"
        )
    return local_rank


def _device_id(device: torch.device) -> str:
    """The UUID of a GPU; empty for the CPU, and for a part of a GPU (MIG)."""
    if device.type != "cuda" or "MIG" in torch.cuda.get_device_name(device):
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


def check_devices(places: list[tuple[str, str]]) -> None:
    """Raises InputError if two processes use the same GPU. places: (host, device UUID) of each
    process."""
    for rank, place in enumerate(places):
        first = places.index(place)
        if place[1] and first != rank:
            raise InputError(
                f"processes {first} and {rank} have the same GPU ({place[0]}, {place[1]}); start "
                f"one process per GPU"
            )


@contextmanager
def within_memory(what: str, fix: str) -> Iterator[None]:
    """Turns an out-of-memory error of the device or the machine into an InputError.

    what: what needed the memory, for the message. fix: what the user can do.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(
            sign in text for sign in OUT_OF_MEMORY
        ):
            raise
        raise InputError(f"out of memory with {what} ({first_line(error)}); {fix}") from error


def destroy_process_group() -> None:
    """Destroys the process group, if there is one, and ends its threads.

    The caller must have dropped every reference to a group before. A thread that still released a
    tensor during the interpreter's shutdown would abort the process (pytorch/pytorch#179291).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum of `values` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(items: list[Result]) -> list[Result]:
    """The items of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return list(items)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def mean_over_processes(tensors: list[torch.Tensor], present: int = 0) -> list[torch.Tensor]:
    """Replaces each of `tensors` by its mean over processes, in place, with one collective.

    tensors: all of one dtype and on one device.
    present: divide by this number of processes; the tensors of the others must be 0. 0: all.
    """
    if dist.is_initialized() and tensors:
        together = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(together)
        together /= present or dist.get_world_size()
        parts = together.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(
            tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors)]
        )
    return tensors


def mean_in_order_of_ranks(
    _: object, bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """A communication hook of DDP on the CPU: the mean of the gradients, added in the order of the
    ranks.

    gloo's own sum adds each part of a bucket in another order of the ranks, and DDP changes the
    buckets after the first step. A resumed run of three or more processes would have other bits.
    """
    own = bucket.buffer()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]

    def mean(_: object) -> torch.Tensor:
        torch.add(parts[0], parts[1], out=own)
        for part in parts[2:]:
            own.add_(part)
        return own.div_(len(parts))

    work = dist.all_gather(parts, own, async_op=True)
    return work.get_future().then(mean)


def on_first_process(action: Callable[[], Result]) -> Result:
    """on_process of rank 0."""
    return on_process(0, action)


def on_process(rank: int, action: Callable[[], Result]) -> Result:
    """Runs `action()` on one process only, and returns its result (text, numbers, None) on every
    process. An InputError is raised on every process too."""
    if not dist.is_initialized():
        return action()
    result, wrong = None, ""
    if dist.get_rank() == rank:
        try:
            result = action()
        except InputError as error:
            wrong = str(error)
    outcome: list[Any] = [result, wrong]
    dist.broadcast_object_list(outcome, rank, device=torch.device("cpu"))
    if outcome[1]:
        raise InputError(outcome[1])
    return outcome[0]


def on_each(action: Callable[[], Result], name: Callable[[int], str]) -> list[Result]:
    """Runs `action()` on every process. Returns all results (plain values), by rank. The InputError
    of the first process that has one is raised on every process.

    name: the text for a rank that precedes its message; empty for none.
    """
    if not dist.is_initialized():
        return [action()]
    result, wrong = None, ""
    try:
        result = action()
    except InputError as error:
        wrong = str(error)
    outcomes: list[Any] = gather([(result, wrong)])
    for rank, (_, wrong) in enumerate(outcomes):
        if wrong:
            raise InputError(f"{name(rank)}: {wrong}" if name(rank) else wrong)
    return [result for result, _ in outcomes]


def copy_from_first_process(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrites tensors of the CPU by those of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
