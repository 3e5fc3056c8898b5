"""A kill and a resume on CUDA, with images that the device decodes. Skipped if there is no CUDA
device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.command import command
from tests.stops import Stop, wait_until

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROOT = Path(__file__).parents[2]


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
