"""Compares every byte of the batches of decode="gpu", emulated, with those of decode="cpu":
python compare.py <epochs> <file.beton>..."""

import sys

import torch

from rsb_ffcv import EvalLoader, TrainLoader

RECIPES = {
    "crop + flip": {},
    "RandAugment": {"rand_augment": "rand-m9-n3-mstd0.5-inc1"},
    "3-Augment, jitter": {"rand_augment": "3a", "color_jitter": (0.3, 0.3, 0.3, 0.1)},
    "TrivialAugment": {"rand_augment": "ta_wide"},
}
epochs, *paths = sys.argv[1:]


def compare(loaders, name, epoch):
    images = 0
    for one, other in zip(*loaders, strict=True):
        assert torch.equal(one.images, other.images), (name, epoch)
        assert torch.equal(one.labels, other.labels), (name, epoch)
        images += len(one.labels)
    return images


for path in paths:
    for resolution in (224, 97):
        common = {"resolution": resolution, "num_workers": 2}
        for name, more in RECIPES.items():
            images = 0
            ways = [
                TrainLoader(path, batch_size=64, seed=5, decode=way, **common, **more)
                for way in ("cpu", "gpu")
            ]
            for epoch in range(int(epochs)):
                images += compare([way.epoch(epoch) for way in ways], name, epoch)
            print(f"{path} {resolution} px, {name}: {images} images equal", flush=True)
        for crop_ratio in (0.875, 1.0):
            ways = [
                EvalLoader(path, batch_size=64, crop_ratio=crop_ratio, decode=way, **common)
                for way in ("cpu", "gpu")
            ]
            images = compare([iter(way) for way in ways], "evaluation", crop_ratio)
            print(
                f"{path} {resolution} px, evaluation crop {crop_ratio}: {images} images equal",
                flush=True,
            )
