"""A run on CUDA: fp16 with the scaler, torch.compile, an average that follows. Skipped where there is no device."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_compiled_run_learns_and_its_average_follows(betons, tmp_path, precision):
    flags = {"data.train_dataset": betons / "train.beton", "data.val_dataset": betons / "val.beton",
             "data.num_workers": 4, "data.in_memory": 1, "logging.folder": tmp_path / "run", "model.arch": "resnet18",
             "resolution.min_res": 32, "resolution.max_res": 32, "mix.mixup": 0.2, "lr.lr": 0.01,
             "lr.lr_schedule_type": "cosine", "lr.warmup_epochs": 1, "training.epochs": 8, "training.batch_size": 16,
             "training.global_batch": 32, "training.optimizer": "lamb", "training.weight_decay": 0.02, "ema.decay": 0.9,
             "ema.warmup": 1, "validation.batch_size": 10, "validation.resolution": 32, "compute.precision": precision}
    command = [sys.executable, "train_imagenet.py", *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert f"precision {precision}, compile on" in done.stdout.splitlines()[0]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["top1"] > 60 and last["ema_top1"] > 60 and last["val_images"] == 27
