"""Runs on CUDA: fp16 with the gradient scaler and bf16, torch.compile, weight averages, decoding on
the device, a kill and a resume. Skipped if there is no CUDA device."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.stops import Stop, wait_until

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_compiled_run_and_its_average_learn(betons, tmp_path, precision):
    done = subprocess.run(
        command(betons, tmp_path / "run", precision, **{"data.decode": "auto"}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert f"precision {precision}, compile on" in done.stdout.splitlines()[0]
    assert re.search(r"data.decode=auto: .pu \(\d+ images/s with cpu, \d+ with gpu\)", done.stdout)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["top1"] > 60 and last["ema_top1"] > 60 and last["val_images"] == 27


def test_a_killed_run_resumes_to_losses_near_those_of_an_uninterrupted_run(betons, tmp_path):
    """CUDA's sums are not reproducible bit for bit, so losses are compared with a tolerance."""
    more = {"compute.compile": 0, "checkpoint.every_steps": 1, "model.drop_path": 0.1}
    whole, killed = (
        command(betons, tmp_path / name, "fp16", **more) for name in ("whole", "killed")
    )
    assert subprocess.run(whole, cwd=ROOT, timeout=900).returncode == 0
    stop = Stop(("epoch 2", 1), tmp_path, 1)
    process = subprocess.Popen(
        [sys.executable, "tests/stops.py", *killed[2:]], cwd=ROOT, env={**os.environ, **stop.env}
    )
    wait_until(
        lambda: stop.reached() and len(list((tmp_path / "killed").glob("checkpoint_*"))) == 2,
        process,
    )
    process.kill()
    process.wait()
    done = subprocess.run(killed, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "resuming" in done.stdout, done.stderr
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert len(logs[1]) == 8
    for one, other in zip(*logs):
        assert (
            one["train_loss"] == pytest.approx(other["train_loss"], rel=0.02)
            and one["lr"] == other["lr"]
        )
