"""The whole program of ffcv-imagenet, with its import of Loader changed to rsb_ffcv.ffcv, trains on
small images.

    git clone https://github.com/libffcv/ffcv-imagenet
    RSB_FFCV_IMAGENET=ffcv-imagenet python -m pytest tests/gpu/test_ffcv_imagenet.py

The program needs the packages ffcv and torchmetrics. NEEDED has all changes of its lines: the
import, and the argument compute_on_step, which torchmetrics no longer has and which had no effect.
The form for the CPU, which shows that the rest of this test is right where there is no GPU, changes
the device as well, and float16 to float32, because the program's autocast is for GPUs only.
"""

import json
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from ffcv_programs import IMAGENET, changed  # noqa: E402

CHECKOUT = os.environ.get("RSB_FFCV_IMAGENET", "")
MISSING = [name for name in ("ffcv", "torchmetrics") if find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(
        not CHECKOUT, reason="needs a checkout of ffcv-imagenet: RSB_FFCV_IMAGENET=<its folder>"
    ),
    pytest.mark.skipif(bool(MISSING), reason=f"needs the packages {', '.join(MISSING)}"),
]
LOADER, DEVICE = IMAGENET
NEEDED = (LOADER, (r",? ?\bcompute_on_step=False", ""))
ON_CPU = (DEVICE, (r"\.to\(self\.gpu\)", ".to('cpu')"), (r"np\.float16", "np.float32"))
# number of changed lines
CHANGED = {"cuda": 4, "cpu": 9}
EPOCHS = 10


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ),
    ],
)
def test_the_program_trains_with_this_loader(betons, tmp_path, device):
    text, differing = changed(
        (Path(CHECKOUT) / "train_imagenet.py").read_text(),
        NEEDED + (ON_CPU if device == "cpu" else ()),
    )
    assert len(differing) == 2 * CHANGED[device], differing
    assert "+ from rsb_ffcv.ffcv import Loader, OrderOption" in differing
    program = tmp_path / "train_imagenet.py"
    program.write_text(text)
    flags = {
        "config-file": Path(CHECKOUT).resolve() / "rn18_configs" / "rn18_16_epochs.yaml",
        "data.train_dataset": betons / "train.beton",
        "data.val_dataset": betons / "val.beton",
        "data.num_workers": 2,
        "logging.folder": tmp_path / "logs",
        "logging.log_level": 2,  # shows the loss of each step
        "training.epochs": EPOCHS,
        "training.batch_size": 16,
        "lr.lr": 0.02,
        "resolution.min_res": 32,
        "resolution.max_res": 64,
        "resolution.start_ramp": 2,
        "resolution.end_ramp": 4,
        "validation.batch_size": 10,
        "validation.resolution": 64,
    }
    done = subprocess.run(
        [sys.executable, program, *(f"--{name}={value}" for name, value in flags.items())],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            **({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if device == "cpu" else {}),
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FFCV's compiler" not in done.stderr  # the whole pipeline runs on this core

    # Each step's line of the progress bar has its epoch, number, shape and loss
    steps = {
        (int(epoch), int(step)): (int(side), float(loss))
        for epoch, step, side, loss in re.findall(
            r"ep=(\d+), iter=(\d+), shape=\(16, 3, (\d+), \d+\), .*?loss=([^:,\s]+)", done.stderr
        )
    }
    assert set(steps) == {(epoch, step) for epoch in range(EPOCHS) for step in range(96 // 16)}
    assert all(math.isfinite(loss) for _, loss in steps.values())
    sides = [steps[epoch, 0][0] for epoch in range(EPOCHS)]
    assert sides == [32] * 3 + [64] * 7  # 48, in epoch 3, is rounded to a multiple of 32

    (log,) = (tmp_path / "logs").glob("*/log")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    # It evaluates after each epoch, and again at the end
    assert [row["epoch"] for row in rows] == [*range(EPOCHS), EPOCHS - 1]
    assert all(0 <= row["top_1"] <= row["top_5"] <= 1 for row in rows)
    # Three classes. The program sets no seed, so no single epoch is certain to be good
    assert max(row["top_1"] for row in rows) > 0.6
    assert abs(round(27 * rows[-1]["top_1"]) - 27 * rows[-1]["top_1"]) < 1e-3  # of 27 images
    weights = torch.load(log.parent / "final_weights.pt", weights_only=True, map_location="cpu")
    assert weights["fc.weight"].shape == (1000, 512)
