"""Which device, precision, compiler and processes a run uses: decided once, said in the first lines of output."""
import os
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rsb_ffcv import InputError

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
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("compute.device=cuda: this machine has no usable CUDA device; use compute.device=auto or cpu")
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
        raise InputError("compute.precision=fp16: the CPU trains in fp32 or bf16; use compute.precision=auto")
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return Compute(chosen, precision, {"0": False, "1": True}.get(compile, kind == "cuda"), channels_last,
                   rank, world_size)


def copy_from_first_process(tensors):
    """Overwrites `tensors` on every process with the first one's."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


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
