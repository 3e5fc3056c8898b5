"""Where a run takes place: versions, device, machine, processes, and the commit of the code.

Nothing of the process's environment variables is recorded. torch is imported on use: the benchmarks
describe their machine without it.
"""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsb_ffcv import __version__

if TYPE_CHECKING:
    from rsb_ffcv.beton import Beton
    from rsb_ffcv.training.compute import Compute

PACKAGES = ("torch", "torchvision", "timm", "numpy", "numba", "ffcv")
NVIDIA = Path("/proc/driver/nvidia/version")
VECTORS = ("avx2", "avx512f", "asimd")  # instruction sets that the core has code for
ROOT = Path(__file__).parents[2]  # of the repository, if the package is used in one
SECONDS = 10  # that git and nvidia-smi may take


def describe(where: "Compute", *, decode: str, threads: int, train: "Beton", val: "Beton") -> dict:
    """The environment of this process's run, as plain values that JSON can hold.

    where: device, precision and processes.
    decode: what decodes the training images, "cpu" or "gpu".
    threads: of the loader.
    train, val: the data files.
    """
    import torch

    from rsb_ffcv.training.compute import available_cores

    name, vectors = processor()
    device: dict[str, Any] = {"device": where.device.type}
    if where.device.type == "cuda":
        about = torch.cuda.get_device_properties(where.device)
        device |= {
            "gpu": about.name,
            "gpu_memory_gib": round(about.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver(),
        }
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "rsb_ffcv": __version__,
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        **device,
        "precision": where.precision,
        "compile": where.compile,
        "channels_last": where.channels_last,
        "processes": where.world_size,
        "hosts": len(set(where.hosts)) or 1,
        "processor": name,
        "instruction_sets": vectors,
        "cores": available_cores(),
        "memory_gib": memory_gib(),
        "system": platform.platform(),
        "torch_threads": torch.get_num_threads(),
        "loader_threads": threads,
        "decode": decode,
        "files": {split: _file(beton) for split, beton in (("train", train), ("val", val))},
    }


def _file(beton: "Beton") -> dict:
    return {
        "path": str(beton.path),
        "images": len(beton),
        "classes": beton.num_classes,
        "bytes": beton.num_bytes,
        "fingerprint": beton.fingerprint(),
    }


def versions(names: Iterable[str]) -> dict[str, str | None]:
    """The version of each package, None if it is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def processor() -> tuple[str, list[str]]:
    """The name of the processor, and which of VECTORS it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = facts.get("flags", facts.get("Features", "")).split()
    return facts.get("model name", platform.machine()), [name for name in VECTORS if name in flags]


def memory_gib() -> int:
    """The memory of the machine."""
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)


def driver() -> str:
    """The version of the NVIDIA driver, "unknown" if it cannot be found out."""
    try:
        about = NVIDIA.read_text()
    except OSError:  # not on WSL
        about = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
    found = re.search(r"\d+\.\d+(\.\d+)?", about)
    return found[0] if found else "unknown"


def nccl_version() -> str:
    """The version of NCCL that torch uses, empty if it has none."""
    import torch

    if not torch.distributed.is_nccl_available():
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))


def commit() -> str:
    """The commit of the code, and whether tracked files differ from it; empty if the package is not
    used in its git repository."""
    git = ("git", "-C", str(ROOT))
    top = _output(*git, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT.resolve():
        return ""
    head = _output(*git, "rev-parse", "HEAD") or ""
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no")
    return f"{head} with changes" if head and changed else head


def _output(*command: str) -> str | None:
    """What a program prints, None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
