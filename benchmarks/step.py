"""Measures the speed of a training step, and the parts of it that are not the model.

    python benchmarks/step.py --train train.beton --out records/<date>_step

For each precision and memory format: images/s on one batch that stays on the device (synthetic) and
on batches of the loader (loaded), for each way to decode; the share of a loaded step that waits for
data, the share of a step that the optimizer and the average take, and the peak memory. Synthetic
and loaded steps run interleaved. Out: step.json, and the table on stdout.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import runner

from rsb_ffcv.learning.average import Ema
from rsb_ffcv.learning.loss import Loss
from rsb_ffcv.learning.model import build_model
from rsb_ffcv.learning.optimizer import build_optimizer
from rsb_ffcv.loading import Batch, TrainLoader
from rsb_ffcv.loading.batch import BatchTransform
from rsb_ffcv.loading.loader import BATCHES_AHEAD, IMAGES_AHEAD
from rsb_ffcv.training import compute
from rsb_ffcv.training.step import TrainStep


def device_seconds(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Returns the seconds of one `action`. On a GPU: those of its kernels and copies. The host is
    ahead of the device in a step, and its own time does not count."""
    started = time.perf_counter()
    if device.type == "cpu":
        for _ in range(repeats):
            action()
        return (time.perf_counter() - started) / repeats
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            action()
        torch.cuda.synchronize()
    us = sum(
        event.self_device_time_total
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    return us / 1e6 / repeats


def measure(options, precision: str, channels_last: bool) -> dict:
    where = compute.set_up(
        "auto", precision, compile=options.compile, channels_last=channels_last, threads=0
    )
    cuda = where.device.type == "cuda"
    started = time.perf_counter()
    loaders = {
        way: TrainLoader(
            options.train,
            batch_size=options.batch,
            resolution=options.resolution,
            num_workers=options.workers,
            rand_augment="rand-m7-mstd0.5-inc1",
            device=where.device,
            decode=way,
        )
        for way in options.decode
    }
    classes = next(iter(loaders.values())).beton.num_classes
    model: Any = build_model(options.arch, classes)
    model = model.to(where.device, memory_format=where.memory_format)
    ema = Ema(model, 0.9999)
    optimizer = build_optimizer(
        options.optimizer,
        model,
        lr=0.005,
        weight_decay=0.02,
        momentum=0.9,
    )
    wrapped: Any = torch.compile(model, dynamic=False) if where.compile else model
    step = TrainStep(
        model,
        wrapped.train(),
        optimizer=optimizer,
        loss=Loss(kind="bce"),
        transform=BatchTransform(seed=0, mixup_alpha=0.1, cutmix_alpha=1.0),
        compute=where,
        groups=1,
        mean_groups=1,
        seed=0,
        grad_clip=0.0,
        ema=ema,
    )
    synthetic = itertools.repeat(
        Batch(
            torch.randint(
                0,
                256,
                (options.batch, options.resolution, options.resolution, 3),
                dtype=torch.uint8,
                device=where.device,
            ),
            torch.zeros(options.batch, dtype=torch.int64, device=where.device),
            np.arange(options.batch),
        )
    )
    loaded = {
        way: itertools.chain.from_iterable(map(loader.epoch, itertools.count()))
        for way, loader in loaders.items()
    }

    def steps(batches) -> tuple[float, float]:
        """Returns (seconds per step, share of that time spent waiting for data)."""
        if batches is not synthetic:  # the loader has prefetched in the meantime
            for _ in range(max(BATCHES_AHEAD, -(-IMAGES_AHEAD // options.batch)) + 2):
                step(0, batches, lr=1e-6, mixing=True)
            if cuda:
                torch.cuda.synchronize()
        started, waited = time.perf_counter(), 0.0
        for _ in range(options.steps):
            waited += step(0, batches, lr=1e-6, mixing=True).waited
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return seconds / options.steps, waited / seconds

    def update() -> None:
        for parameter in model.parameters():
            parameter.grad = gradients[parameter]
        step.scaler.step(optimizer)  # in fp16 the optimizer does more
        step.scaler.update()

    for batches in (synthetic, *loaded.values()):  # compile, tune and fill the caches
        steps(batches)
    first_seconds = time.perf_counter() - started
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    gradients = {parameter: torch.full_like(parameter, 1e-6) for parameter in model.parameters()}
    update()
    found: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(options.repeats):
        found["synthetic"].append(steps(synthetic)[0])
        for way, batches in loaded.items():
            seconds, share = steps(batches)
            found[f"loaded, {way}"].append(seconds)
            found[f"waiting, {way}"].append(share)
        # of the optimizer and of the average, which follows its steps
        found["update"].append(device_seconds(update, where.device, options.steps))
    for loader in loaders.values():
        loader.close()
    middle = {name: statistics.median(values) for name, values in found.items()}
    return {
        "precision": where.precision,
        "channels_last": channels_last,
        "compile": where.compile,
        "device": where.describe(),
        "synthetic_images_per_s": options.batch / middle["synthetic"],
        "loaded": {
            way: {
                "images_per_s": options.batch / middle[f"loaded, {way}"],
                "of_synthetic": middle["synthetic"] / middle[f"loaded, {way}"],
                "waiting_for_data": middle[f"waiting, {way}"],
            }
            for way in loaders
        },
        "optimizer_and_ema_of_step": middle["update"] / middle["synthetic"],
        "peak_memory_mb": where.peak_memory_mb(),
        "seconds_to_start": first_seconds,
        "seconds": {name: [round(value, 5) for value in values] for name, values in found.items()},
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, required=True, help=".beton file of training images")
    parser.add_argument("--out", type=Path, required=True, help="folder for step.json")
    parser.add_argument("--arch", default="resnet50", help="name of a timm model")
    parser.add_argument("--batch", type=int, default=256, help="images per step")
    parser.add_argument("--resolution", type=int, default=224, help="pixels per side")
    parser.add_argument("--workers", type=int, default=16, help="loader threads")
    parser.add_argument("--optimizer", default="lamb", help="name, as in training.optimizer")
    parser.add_argument("--steps", type=int, default=20, help="steps per repeat")
    parser.add_argument("--repeats", type=int, default=5, help="repeats, after one warm-up repeat")
    parser.add_argument(
        "--precisions", nargs="+", default=["auto"], help="fp32, fp16, bf16 or auto"
    )
    parser.add_argument(
        "--formats", nargs="+", default=["channels_last"], choices=["channels_last", "contiguous"]
    )
    parser.add_argument("--compile", default="auto", choices=["auto", "0", "1"])
    parser.add_argument("--decode", nargs="+", default=["cpu"], choices=["cpu", "gpu"])
    options = parser.parse_args()
    results: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "environment": runner.environment(["rsb_ffcv", "torch", "timm"]),
        "rows": [],
    }
    print(
        "| precision | format | decode | synthetic img/s | loaded img/s | loaded / synthetic | "
        "waiting | optimizer + EMA | peak MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for precision, form in itertools.product(options.precisions, options.formats):
        row = measure(options, precision, form == "channels_last")
        results["rows"].append(row)
        for way, loaded in row["loaded"].items():
            print(
                f"| {row['precision']} | {form} | {way} | {row['synthetic_images_per_s']:,.1f} | "
                f"{loaded['images_per_s']:,.1f} | {loaded['of_synthetic']:.3f} | "
                f"{100 * loaded['waiting_for_data']:.1f} % | "
                f"{100 * row['optimizer_and_ema_of_step']:.1f} % | {row['peak_memory_mb']:,.0f} |",
                flush=True,
            )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "step.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
