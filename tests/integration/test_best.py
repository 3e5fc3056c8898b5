"""The files of weights that a run keeps: the best ones, archived checkpoints, and the averages."""

import pytest
import torch

from rsb_ffcv.training import checkpoint
from tests.integration.runs import assert_same, options, rows, state

TAIL = {
    "model.arch": "test_resnet",
    "model.drop_path": 0,
    "training.epochs": 5,
    "swa.epochs": 3,
    "swa.lr": 0.001,
    "checkpoint.every_minutes": 0,
    "checkpoint.archive_every": 2,
}


@pytest.fixture(scope="module")
def tail(betons, tmp_path_factory, train):
    """A run of 5 epochs of 3 steps, the last three of which are averaged."""
    folder = tmp_path_factory.mktemp("runs") / "tail"
    statuses, _, err = train(options(betons, folder, **TAIL)).wait()
    assert statuses == [0], err
    return folder


def test_average_is_evaluated_during_its_tail(tail):
    assert ["swa_top1" in row for row in rows(tail)] == [False, False, True, True, True]


def test_evaluation_of_the_average_does_not_change_the_run(betons, tail, tmp_path, train):
    more = {**TAIL, "logging.log_level": 0}  # evaluates after the last epoch only
    statuses, _, err = train(options(betons, tmp_path / "quiet", **more)).wait()
    assert statuses == [0], err
    ours, quiet = state(tail), state(tmp_path / "quiet")
    for name in ("model", "optimizer", "ema", "swa", "step"):
        assert_same(ours[name], quiet[name], name)


def test_best_weights_are_those_of_the_best_top1(tail):
    found = torch.load(tail / "best_weights.pt", weights_only=True)
    logged = rows(tail)
    prefixes = {"model": "", "ema": "ema_", "swa": "swa_"}
    row = logged[found["epoch"]]
    best = max(
        row[prefix + "top1"]
        for row in logged
        for prefix in prefixes.values()
        if prefix + "top1" in row
    )
    prefix = prefixes[found["weights"]]
    assert found["metrics"] == {
        name: row[prefix + name] for name in ("top1", "top5", "val_loss") if prefix + name in row
    }
    assert found["metrics"]["top1"] == best
    assert (found["arch"], found["num_classes"]) == ("test_resnet", 3)
    assert found["step"] == state(tail)["best"]["step"] == 3 * (found["epoch"] + 1)
    saved = torch.load(tail / "best.pt", weights_only=True)
    if found["weights"] != "swa":
        expected = saved["model"] if not prefix else saved["ema"]["module"]
        assert_same(found["state_dict"], expected)


def test_archived_checkpoints_are_kept(tail):
    assert sorted(path.name for path in tail.glob("checkpoint_*")) == [
        checkpoint.NAME.format(step) for step in (6, 12, 15)
    ]


def test_going_back_removes_later_best_weights(tmp_path):
    store = checkpoint.Store(tmp_path, keep=3)
    for step in (1, 2):
        checkpoint.write({"step": step}, tmp_path / checkpoint.NAME.format(step))
        checkpoint.write({"step": step}, tmp_path / checkpoint.BEST_WEIGHTS)
    store.remove_after(1)
    assert not (tmp_path / checkpoint.BEST_WEIGHTS).exists()
    checkpoint.write({"step": 1}, tmp_path / checkpoint.BEST_WEIGHTS)
    store.remove_after(1)
    assert (tmp_path / checkpoint.BEST_WEIGHTS).exists()
