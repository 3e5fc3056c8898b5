"""What a run is, as plain values: the recipe that its result depends on, and what all processes of
a job must have in common."""

import platform

import numpy
import timm
import torch

from rsb_ffcv import __version__
from rsb_ffcv.config.options import as_dict
from rsb_ffcv.config.train import TrainConfig
from rsb_ffcv.loading import EvalLoader, TrainLoader
from rsb_ffcv.ops.native import checksum
from rsb_ffcv.training.compute import Compute

# What each process of a job may have its own way: where it finds its files, which are compared by
# what they hold, and its threads
OWN = {
    "data.train_dataset",
    "data.val_dataset",
    "data.num_workers",
    "data.in_memory",
    "validation.labels",
    "checkpoint.warm_start",
    "logging.folder",
    "compute.threads",
    "compute.device",
    "compute.precision",
    "compute.compile",
    "dist.address",
    "dist.port",
}


def recipe(c: TrainConfig, train_loader: TrainLoader, num_classes: int) -> dict:
    """What decides the run's result: a checkpoint belongs to one recipe."""
    every = as_dict(c)
    kept = {
        name: dict(every[name])
        for name in ("model", "resolution", "augment", "mix", "lr", "training", "ema", "swa")
    }
    kept["model"]["num_classes"] = num_classes
    for name in ("eval_only", "distributed"):
        del kept["training"][name]
    kept["training"]["global_batch"] = train_loader.global_batch
    beton = train_loader.beton
    kept["data"] = {
        "train_images": len(beton),
        "train_fingerprint": beton.fingerprint(),
        "order": c.data.order,
    }
    kept["checkpoint"] = {"warm_start": c.checkpoint.warm_start}
    return kept


def shared(
    c: TrainConfig,
    where: Compute,
    *,
    train_loader: TrainLoader,
    val_loader: EvalLoader,
    label_sets: torch.Tensor | None,
) -> dict:
    """What has to be the same on all processes: the recipe and its rhythm, what the files hold,
    versions."""
    facts = {
        f"{section}.{name}": value
        for section, options in as_dict(c).items()
        for name, value in options.items()
        if f"{section}.{name}" not in OWN
    }
    for name, loader in (("train", train_loader), ("val", val_loader)):
        beton = loader.beton
        facts[f"data.{name}_dataset"] = (
            f"{len(beton)} images of {beton.num_classes} classes, fingerprint "
            f"{beton.fingerprint()}, labels {checksum(beton.labels):016x}"
        )
    if label_sets is not None:
        facts["validation.labels"] = f"{checksum(label_sets.numpy()):016x}"
    return facts | {
        "device": where.device.type,
        "precision": where.precision,
        "compile": where.compile,
        "rsb_ffcv": __version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
    }
