"""Measures what decoding on a GPU leaves to the CPU.

    python benchmarks/pack.py --train train.beton --out records/<date>_pack

The loader runs over the file with decode="cpu" and with decode="gpu", in turn. The device kernels
are not run: the CPU time of the process is that of drawing, reading, checking and packing. For each
row: CPU time per image of both, their ratio, and the bytes per image that go to the device. Out:
pack.json, and the table on stdout.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import runner

from rsb_ffcv.loading import TrainLoader
from rsb_ffcv.reporting.log import table

ROWS = {
    "random-resized crop + flip": "",
    "the same with RandAugment": "rand-m7-mstd0.5-inc1",
}
TARGETS = {"random-resized crop + flip": 8, "the same with RandAugment": 12}
EPOCHS = 10
TARGET_BYTES = 0.5  # of those of the pixels


class Idle:
    """A driver that runs nothing."""

    def launch(self, kernel: int, argument: np.ndarray, blocks: int) -> None:
        pass


class Contestant:
    """The loader with one way to decode. cpu_us: CPU time per image of each repeat, in
    microseconds. sent: bytes per image that go to the device."""

    def __init__(self, options: argparse.Namespace, decode: str, rand_augment: str):
        self.loader = TrainLoader(
            options.train,
            batch_size=options.batch,
            resolution=options.resolution,
            num_workers=options.workers,
            rand_augment=rand_augment,
            decode=decode,
        )
        self.cpu_us: list[float] = []
        self.sent = 3.0 * options.resolution**2
        if self.loader._decoder is not None:
            self.loader._decoder.driver = Idle()
            self._given: list[float] = []
            give = self.loader._decoder.decode

            def decode_and_count(slab):
                self._given.append(slab.used / slab.shape[0])
                return give(slab)

            self.loader._decoder.decode = decode_and_count  # type: ignore[method-assign]

    def repeat(self, epoch: int):
        """Measures an epoch; with decode="gpu" several, so that both take as long."""
        started, images = time.process_time(), 0
        for number in range(1 if self.loader._decoder is None else EPOCHS):
            for batch in self.loader.epoch(epoch * EPOCHS + number):
                images += len(batch.labels)
        self.cpu_us.append((time.process_time() - started) / images * 1e6)
        if self.loader._decoder is not None:
            self.sent = statistics.fmean(self._given)


def measure(options: argparse.Namespace, rand_augment: str) -> dict:
    ways = {decode: Contestant(options, decode, rand_augment) for decode in ("cpu", "gpu")}
    for epoch in range(options.repeats + 1):
        for way in ways.values():
            way.repeat(epoch)
            if epoch == 0:  # warm-up
                way.cpu_us.clear()
    for way in ways.values():
        way.loader.close()
    cpu, gpu = (ways[decode].cpu_us for decode in ("cpu", "gpu"))
    ratios = [one / other for one, other in zip(cpu, gpu)]
    return {
        "cpu_us": statistics.median(cpu),
        "gpu_us": statistics.median(gpu),
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "bytes": ways["gpu"].sent,
        "bytes_of_pixels": ways["cpu"].sent,
    }


def lines(results: dict) -> list[tuple[str, str]]:
    """The table: a line per row."""
    found = [("", "CPU us an image: cpu, gpu; ratio (range; target); bytes to the device")]
    for name, row in results.items():
        share = row["bytes"] / row["bytes_of_pixels"]
        reached = row["ratio"] >= TARGETS[name] and share <= TARGET_BYTES
        found.append(
            (
                name,
                f"{row['cpu_us']:.0f}, {row['gpu_us']:.1f}; {row['ratio']:.1f} "
                f"({min(row['ratios']):.1f} .. {max(row['ratios']):.1f}; {TARGETS[name]}); "
                f"{row['bytes'] / 1000:.1f} kB, {100 * share:.0f} % of the pixels; "
                f"{'reached' if reached else 'MISSED'}",
            )
        )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help=".beton file")
    parser.add_argument("--out", required=True, type=Path, help="folder of the record")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    results = {name: measure(options, rand_augment) for name, rand_augment in ROWS.items()}
    print(table(lines(results)))
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "command": "benchmarks/pack.py " + " ".join(f"--{k}={v}" for k, v in vars(options).items()),
        "environment": runner.environment(["numpy", "torch", "numba"]),
        "results": results,
    }
    (options.out / "pack.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
