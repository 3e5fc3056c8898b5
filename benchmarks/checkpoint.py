"""Measures what a checkpoint of a run costs.

    python benchmarks/checkpoint.py --folder <a folder of the disk> --out records/<date>_checkpoint

The state is that of `a2_300.yaml`: ResNet-50, LAMB, EMA; on the GPU, if there is one. Measured are
its size, the copy to the host, which the run waits for, the write in the background with its flush
to disk, and reading it with its checksums. Medians and the range of the repeats. Out:
checkpoint.json, and the table on stdout.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import runner

from rsb_ffcv.learning.average import Ema
from rsb_ffcv.learning.model import build_model
from rsb_ffcv.learning.optimizer import build_optimizer
from rsb_ffcv.learning.weights import read
from rsb_ffcv.reporting.log import write_json
from rsb_ffcv.training import checkpoint, environment


def measure(folder: Path, arch: str, repeats: int) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(arch, 1000).to(device)
    optimizer = build_optimizer("lamb", model, lr=0.005, weight_decay=0.02, momentum=0.9)
    ema = Ema(model, 0.9999)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict(),
    }
    path = folder / "checkpoint.pt"
    seconds: dict[str, list[float]] = {"copy": [], "write": [], "read": []}

    def timed(name: str, action: Callable[[], object]) -> object:
        started = time.perf_counter()
        made = action()
        seconds[name].append(time.perf_counter() - started)
        return made

    for _ in range(repeats):
        copied = timed("copy", lambda: checkpoint.on_host(state))
        timed("write", lambda: checkpoint.write(copied, path))  # noqa: B023  # called at once
        timed("read", lambda: read(path))
    return {
        "arch": arch,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": path.stat().st_size,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("."))
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        found = measure(Path(name), options.arch, options.repeats)
    found |= {"commit": environment.commit(), "environment": runner.environment(("torch", "timm"))}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "checkpoint.json", found)
    print(f"{found['arch']}: {found['parameters']:,} parameters, {found['bytes']:,} bytes")
    for what, times in found["seconds"].items():
        median = statistics.median(times)
        print(f"{what}: {median:.3f} s ({min(times):.3f} .. {max(times):.3f})")


if __name__ == "__main__":
    main()
