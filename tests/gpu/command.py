"""The command of a small run on CUDA."""

import sys


def command(betons, folder, precision, **more):
    flags = {
        "data.train_dataset": betons / "train.beton",
        "data.val_dataset": betons / "val.beton",
        "data.num_workers": 4,
        "data.in_memory": 1,
        "data.decode": "gpu",
        "logging.folder": folder,
        "model.arch": "test_resnet",
        "resolution.min_res": 32,
        "resolution.max_res": 32,
        "mix.mixup": 0.2,
        "lr.lr": 0.01,
        "lr.lr_schedule_type": "cosine",
        "lr.warmup_epochs": 1,
        "training.epochs": 8,
        "training.batch_size": 16,
        "training.global_batch": 32,
        "training.optimizer": "lamb",
        "training.weight_decay": 0.02,
        "ema.decay": 0.9,
        "ema.warmup": 1,
        "validation.batch_size": 10,
        "validation.resolution": 32,
        "compute.precision": precision,
        **more,
    }
    return [
        sys.executable,
        "train_imagenet.py",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]
