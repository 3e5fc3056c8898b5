"""The facts of a run, as plain values: the recipe, which defines the run, and the values that must
be equal on all processes of a job."""

import platform
from dataclasses import fields

import numpy
import timm
import torch

from rsb_ffcv import __version__
from rsb_ffcv.config.options import as_dict
from rsb_ffcv.config.train import SECTIONS, TrainConfig
from rsb_ffcv.loading import EvalLoader, TrainLoader
from rsb_ffcv.ops.native import checksum
from rsb_ffcv.training.compute import Compute
from rsb_ffcv.training.environment import driver, nccl_version

# Options that may differ between the processes of a job: the paths of files, which are compared by
# their content, the number of threads, and `auto` choices, which are compared by their results
OWN = {
    "data.train_dataset",
    "data.val_dataset",
    "data.num_workers",
    "data.in_memory",
    "data.affinity",
    "validation.labels",
    "logging.folder",
    "compute.threads",
    "compute.device",
    "compute.precision",
    "compute.compile",
    "compute.profile",
    "dist.address",
    "dist.port",
}


def recipe(c: TrainConfig, train_loader: TrainLoader, num_classes: int) -> dict:
    """The options and data that define the run. A checkpoint belongs to one recipe.

    Precision, device and number of processes are not included: a run may resume on other hardware,
    then without identical bits.
    """
    every = as_dict(c)
    kept = {
        name: dict(every[name])
        for name in ("model", "resolution", "augment", "mix", "lr", "training", "ema", "swa")
    }
    kept["model"]["num_classes"] = num_classes
    for name in ("eval_only", "distributed"):
        del kept["training"][name]
    del kept["model"]["grad_checkpointing"]  # less memory, the same results
    kept["training"]["global_batch"] = train_loader.global_batch
    beton = train_loader.beton
    kept["data"] = {
        "train_images": len(beton),
        "train_fingerprint": beton.fingerprint(),
        "order": c.data.order,
    }
    kept["checkpoint"] = {
        name: every["checkpoint"][name]
        for name in ("warm_start", "warm_start_head", "branch", "branch_optimizer")
    }
    return kept


def changes(saved: dict, current: dict) -> dict[str, tuple[object, object]]:
    """What differs between the recipe of a checkpoint and another one: {option: (old, new)}. An
    option that the version of the checkpoint did not have counts as its default."""
    found = {}
    for section, options in current.items():
        before = {item.name: item.default for item in fields(SECTIONS[section])}
        before |= saved.get(section, {})
        for name, value in options.items():
            if before.get(name) != value:
                found[f"{section}.{name}"] = (before.get(name), value)
    return dict(sorted(found.items()))


def shown(value: object) -> object:
    """An option's value in a message."""
    return value if value != "" else "''"


def shared(
    c: TrainConfig,
    where: Compute,
    *,
    train_loader: TrainLoader,
    val_loader: EvalLoader,
    label_sets: torch.Tensor | None,
) -> dict:
    """The facts that must be equal on all processes: options, the content of the files, device,
    precision, versions, and the kind of the GPUs: others have another speed and other bits."""
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
    if where.device.type == "cuda":
        facts |= {
            "GPU": torch.cuda.get_device_name(where.device),
            "driver": driver(),
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "NCCL": nccl_version(),
        }
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
