"""Options of small runs for the tests of the programs, and the comparison of two runs."""

import json

import pytest
import torch

TIMINGS = {
    "images_per_s",
    "images_per_s_with_val",
    "seconds",
    "val_seconds",
    "eta_s",
    "data_wait_s",
    "own_step_ms",
    "slowest",
    "peak_memory_mb",
}

# Code for Run(prepare=...): makes "mlflow" a tracker that writes its calls to tracked.jsonl in the
# run's folder, and whose method `FAIL` raises
TRACKER = """
import json
from rsb_ffcv.reporting import trackers
class Fake:
    def __init__(self, run):
        self.path = run.folder / "tracked.jsonl"
        self.note("open", run.id, run.name, run.epoch, run.step)
    def note(self, *call):
        with open(self.path, "a") as file:
            file.write(json.dumps(call) + chr(10))
        if call[0] == FAIL:
            raise OSError("network is unreachable")
    def __getattr__(self, name):
        return lambda *arguments: self.note(name, *arguments)
trackers.CLASSES["mlflow"], trackers.MODULES["mlflow"] = Fake, "json"
"""


def tracked(folder):
    """The calls of TRACKER."""
    return [json.loads(line) for line in (folder / "tracked.jsonl").read_text().splitlines()]


def options(betons, folder, **more):
    """Flags of a small run with every A2 ingredient: 3 epochs of 3 steps of 2 x 16 images,
    resnet10t at 32 px. `more` overrides or adds options."""
    flags = {
        "data.train_dataset": betons / "train.beton",
        "data.val_dataset": betons / "val.beton",
        "data.num_workers": 2,
        "data.in_memory": 1,
        "logging.folder": folder,
        "model.arch": "resnet10t",
        "model.drop_path": 0.1,
        "resolution.min_res": 32,
        "resolution.max_res": 32,
        "augment.rand_augment": "rand-m7-mstd0.5-inc1",
        "augment.color_jitter": 0.2,
        "augment.repeats": 2,
        "data.order": "quasi_random",
        "augment.erase_prob": 0.25,
        "augment.erase_mode": "pixel",
        "mix.mixup": 0.2,
        "mix.cutmix": 1.0,
        "mix.off_epochs": 1,
        "lr.lr": 0.005,
        "lr.lr_schedule_type": "cosine",
        "lr.warmup_epochs": 1,
        "lr.warmup_lr": 0.00005,
        "training.epochs": 3,
        "training.batch_size": 16,
        "training.global_batch": 32,
        "training.optimizer": "lamb",
        "training.weight_decay": 0.02,
        "training.grad_clip": 1.0,
        "ema.decay": 0.9,
        "ema.warmup": 1,
        "validation.batch_size": 10,
        "validation.resolution": 32,
        "compute.device": "cpu",
        "compute.precision": "fp32",
        "compute.threads": 1,
        **more,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def rows(folder):
    """The rows of metrics.jsonl without timings."""
    path = folder / "metrics.jsonl"
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMINGS}
        for line in (path.read_text().splitlines() if path.exists() else [])
    ]


def state(folder):
    """The newest checkpoint without timings."""
    newest = torch.load(max(folder.glob("checkpoint_*.pt")), weights_only=True)
    newest["rows"] = [
        {key: value for key, value in row.items() if key not in TIMINGS} for row in newest["rows"]
    ]
    newest["epoch"] = {
        key: value for key, value in newest["epoch"].items() if key not in ("seconds", "waited")
    }
    return newest


def assert_same(a, b, where="state"):
    """Asserts that `a` and `b` are bit-identical."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{number}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(folder, other):
    """Asserts that weights, averages, optimizer, best, log and final weights are bit-identical, and
    that no partial file and no lease is left."""
    assert_same(state(folder), state(other))
    assert_same(rows(folder), rows(other), "log")
    names = {path.name for path in other.glob("final_weights*.pt")}
    assert names == {path.name for path in folder.glob("final_weights*.pt")}
    for name in names:
        assert_same(
            torch.load(folder / name, weights_only=True),
            torch.load(other / name, weights_only=True),
            name,
        )
    best = [torch.load(path / "best.pt", weights_only=True) for path in (folder, other)]
    assert_same(best[0]["model"], best[1]["model"], "best")
    assert not list(folder.glob(".*.part"))
    (released,) = [path for path in folder.iterdir() if path.is_dir() and path.name[0] == "."]
    assert released.name.startswith(".released-") and not list(released.iterdir())


def assert_same_course(folder, other, rounding: float = 1e-3, early: float = 1e-6):
    """Asserts that two runs are equal up to the order of float32 sums, a difference that grows from
    step to step.

    rounding: largest relative difference of the losses after three epochs, and a tenth of that of
        the norms of the weights, the biases and the statistics.
    early: largest relative difference of the losses of the first three epochs.
    """
    for mine, theirs in zip(rows(folder), rows(other), strict=True):
        assert mine["train_loss"] == pytest.approx(
            theirs["train_loss"], rel=early if mine["epoch"] < 3 else rounding
        ), mine["epoch"]
        assert mine.get("val_images", 27) == 27
        for name in ("lr_first", "images", "groups", "mixed", "own_weight", "erased"):
            assert mine[name] == theirs[name], name
    ends = [state(path) for path in (folder, other)]
    for part in (lambda state: state["model"], lambda state: state["ema"]["module"]):
        for kind in ("weight", "bias", "running_mean", "running_var"):
            one, two = (
                torch.cat(
                    [tensor.flatten() for key, tensor in part(end).items() if key.endswith(kind)]
                )
                for end in ends
            )
            assert (one - two).norm() <= 10 * rounding * two.norm(), kind
