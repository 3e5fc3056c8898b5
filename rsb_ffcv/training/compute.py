"""Which device, precision, compiler and processes a run uses: decided once, said in the first lines of output."""
import os
import time
import uuid
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from resource import RUSAGE_SELF, getrusage

import torch
import torch.distributed as dist

from rsb_ffcv import InputError, first_line

_stores = []  # of the process group: what processes can still tell each other when its collectives fail
MEETING_SECONDS = 600  # between the first and the last process of a job to be ready
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Compute:
    """Where and how this process computes. rank and world_size are those of the whole job."""
    device: torch.device
    precision: str
    compile: bool
    channels_last: bool
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        """Context in which the model's forward pass runs at the chosen precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def peak_memory_mb(self) -> float:
        """Of the device on CUDA, else of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2 ** 20
        return getrusage(RUSAGE_SELF).ru_maxrss / 2 ** 10

    def describe(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else \
            f"CPU, {torch.get_num_threads()} threads"
        return (f"device {self.device.type} ({name}), precision {self.precision}, compile {'on' if self.compile else 'off'}, "
                f"channels_last {'on' if self.channels_last else 'off'}, {self.world_size} process"
                f"{'es' if self.world_size > 1 else ''}, torch {torch.__version__}")


def set_up(device: str, precision: str, compile: str, channels_last: bool, threads: int) -> Compute:
    """Chooses what is "auto" and joins the process group that torchrun's environment describes, if there is one.

    Raises InputError where CUDA or a precision is asked for that this machine lacks.
    """
    wrong = ""
    if device == "cuda" and not torch.cuda.is_available():
        wrong, device = "compute.device=cuda: this machine has no usable CUDA device; use compute.device=auto or cpu", "cpu"
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = torch.device(kind)
    if kind == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"process {local_rank} has no CUDA device of its own ({torch.cuda.device_count()} here); "
                             f"start one process a GPU")
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True
    # ffcv sets torch to one thread when it is imported, so "torch's choice" has to be made again here.
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # torchrun sets it to 1 unless the user did
    torch.set_num_threads(threads or (int(asked) if asked.isdigit() and asked != "0" else
                          max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))))
    if precision == "auto":
        precision = "fp16" if kind == "cuda" else "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    if precision == "fp16" and kind == "cpu":
        wrong = wrong or "compute.precision=fp16: the CPU trains in fp32 or bf16; use compute.precision=auto"
    if world_size > 1 and not dist.is_initialized():
        try:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=MEETING_SECONDS)))
            store = _own_part(store, rank, world_size)
            _stores.append(store)
            dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=world_size)
        except (dist.DistError, OSError) as error:
            raise InputError(f"process {rank} of {world_size} cannot meet the others at {os.environ.get('MASTER_ADDR')}:"
                             f"{os.environ.get('MASTER_PORT')} ({first_line(error)}); give an address and a free port that all "
                             f"of them reach") from error
    if wrong:  # told after the processes have met, so that one of them can speak for all
        raise InputError(wrong)
    return Compute(chosen, precision, {"0": False, "1": True}.get(compile, kind == "cuda"), channels_last,
                   rank, world_size)


def _own_part(store, rank: int, world_size: int):
    """A part of `store` that only the processes now running know of. torchrun's store outlives a restart, and what the
    processes before it left there would send these to ports that nobody listens on (pytorch/pytorch#135712).

    Each process leaves a name of its own; the first one lists them until all have found themselves in its list.
    """
    mine, waits_until = uuid.uuid4().hex, time.monotonic() + MEETING_SECONDS

    def of_all(key: str) -> list | None:
        keys = [f"{key}/{other}" for other in range(world_size)]
        return [store.get(key).decode() for key in keys] if store.check(keys) else None

    store.set(f"here/{rank}", mine)
    while time.monotonic() < waits_until:
        here = of_all("here") if rank == 0 else None
        if here:
            store.set("meeting", " ".join(here))
        meeting = store.get("meeting").decode() if store.check(["meeting"]) else ""
        if mine in meeting:
            store.set(f"agreed/{rank}", meeting)
            if rank == 0 and of_all("agreed") == [meeting] * world_size:
                store.set(f"begun/{meeting}", "")
            if store.check([f"begun/{meeting}"]):
                return dist.PrefixStore(meeting, store)
        time.sleep(0.02)
    raise InputError(f"process {rank} of {world_size}: not all processes have come within {MEETING_SECONDS} s; look for the message "
                     f"of one that ended")


def leave():
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum of `values` over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(items: list) -> list:
    """The items of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return list(items)
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def mean_over_processes(tensors: list) -> list:
    """Each of `tensors` (one dtype, one device) becomes its mean over all processes, in place, by one collective."""
    if dist.is_initialized():
        together = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(together)
        together /= dist.get_world_size()
        parts = together.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors)])
    return tensors


def on_first_process(action):
    """What `action()` gives on the first process (text, numbers, None), on every process; an InputError too."""
    if not dist.is_initialized():
        return action()
    result, wrong = None, ""
    if dist.get_rank() == 0:
        try:
            result = action()
        except InputError as error:
            wrong = str(error)
    told = [result, wrong]
    dist.broadcast_object_list(told, 0, device="cpu")
    result, wrong = told
    if wrong:
        raise InputError(wrong)
    return result


def first_to_say(what: str) -> bool:
    """True on one process only, the first that asks for `what`, also where the job's collectives no longer work."""
    try:
        return not _stores or _stores[0].add(f"said/{what}", 1) == 1
    except RuntimeError:  # the store died with the first process: the second speaks
        return dist.get_rank() == 1


def wait_for_others(seconds: float = 2.0):
    """Before a process ends with an error: the others may be about to find the same, and need the first one's store to know
    that it has been said."""
    if not _stores:
        return
    until = time.monotonic() + seconds
    try:
        _stores[0].add("ending", 1)
        while _stores[0].add("ending", 0) < dist.get_world_size() and time.monotonic() < until:
            time.sleep(0.02)
    except RuntimeError:  # the store is gone, and with it whoever asks it
        return
