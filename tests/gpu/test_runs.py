"""Compiled runs on CUDA: fp16 with the gradient scaler, and bf16, with weight averages. Skipped if
there is no CUDA device."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.gpu.command import command

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROOT = Path(__file__).parents[2]


def test_compiled_runs_and_their_averages_learn(betons, tmp_path):
    """Both at the same time: compilers take most of it."""
    started = {
        precision: subprocess.Popen(
            command(betons, tmp_path / precision, precision, **{"data.decode": "auto"}),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for precision in ("fp16", "bf16")
    }
    for precision, process in started.items():
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
        assert f"precision {precision}, compile on" in out.splitlines()[0]
        assert re.search(r"data.decode=auto: .pu \(\d+ images/s with cpu, \d+ with gpu\)", out)
        rows = (tmp_path / precision / "metrics.jsonl").read_text().splitlines()
        last = json.loads(rows[-1])
        assert last["top1"] > 60 and last["ema_top1"] > 60 and last["val_images"] == 27
