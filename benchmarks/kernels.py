"""Compiles the device kernels for GPUs that need not be there, and lists what they take.

    python benchmarks/kernels.py --out records/<date>_kernels

For each architecture and kernel: registers per thread, stack, local and shared memory, and the
theoretical occupancy: resident threads as a share of what a multiprocessor can have. Out:
kernels.json, and the table on stdout.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import runner

from rsb_ffcv.gpu import driver

# Of a multiprocessor (CUDA C++ Programming Guide, compute capabilities): threads, shared memory in
# bytes, blocks. A block takes 1 KiB of shared memory for itself, which the compiler lists from 9.0
# on.
LIMITS = {
    (8, 0): (2048, 164 << 10, 32),
    (9, 0): (2048, 228 << 10, 32),
    (10, 0): (2048, 228 << 10, 32),
    (12, 0): (1536, 100 << 10, 24),
}
REGISTERS, REGISTER_STEP, WARP = 65536, 256, 32


def usage(major: int, minor: int) -> dict[str, dict[str, int]]:
    """Returns {kernel: {"REG": ..., "STACK": ..., "SHARED": ..., "LOCAL": ...}}. Raises
    FileNotFoundError without torch's triton, which has cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    image, log = driver.compile_for(major, minor)
    if log.strip():
        raise RuntimeError(log)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        name: {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", numbers)}
        for name, numbers in re.findall(r"Function rsb_(\w+):\s+(.*)", text)
    }


def occupancy(capability: tuple[int, int], threads: int, taken: dict[str, int]) -> float:
    """The share of a multiprocessor's threads that can be resident, 0 .. 1."""
    max_threads, shared, max_blocks = LIMITS[capability]
    per_warp = -(-taken["REG"] * WARP // REGISTER_STEP) * REGISTER_STEP
    warps = threads // WARP
    blocks = min(
        max_blocks,
        max_threads // threads,
        REGISTERS // (per_warp * warps),
        shared // (taken["SHARED"] + (1024 if capability[0] < 9 else 0) or 1024),
    )
    return blocks * threads / max_threads


def rows() -> list[dict]:
    return [
        {
            "architecture": f"sm_{10 * major + minor}",
            "kernel": name,
            "threads": driver.THREADS[driver.NAMES.index(name)],
            "registers": taken["REG"],
            "stack": taken["STACK"],
            "local": taken["LOCAL"],
            "shared": taken["SHARED"],
            "occupancy": occupancy((major, minor), driver.THREADS[driver.NAMES.index(name)], taken),
        }
        for major, minor in LIMITS
        for name, taken in sorted(usage(major, minor).items())
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder of the record")
    options = parser.parse_args()
    found = rows()
    print("| architecture | kernel | threads | registers | stack, local | shared | occupancy |")
    print("|---|---|---|---|---|---|---|")
    for row in found:
        print(
            f"| {row['architecture']} | {row['kernel']} | {row['threads']} | {row['registers']} | "
            f"{row['stack']}, {row['local']} B | {row['shared']} B | "
            f"{100 * row['occupancy']:.0f} % |"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "command": f"benchmarks/kernels.py --out {options.out}",
        "environment": runner.environment(["nvidia-cuda-nvrtc", "cuda-bindings", "torch"]),
        "kernels": found,
    }
    (options.out / "kernels.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
