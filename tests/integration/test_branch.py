"""Runs that continue another one under a changed recipe (checkpoint.branch)."""

import json
import shutil

import pytest

from rsb_ffcv.training import checkpoint
from tests.integration.runs import assert_same, options, rows, state

BASE = {"checkpoint.every_minutes": 0, "checkpoint.keep": 100, "checkpoint.every_steps": 2}


@pytest.fixture(scope="module")
def source(betons, tmp_path_factory, train):
    """A finished run of 3 epochs of 3 steps, with the checkpoints of steps 2, 3, 4, 6, 8 and 9."""
    folder = tmp_path_factory.mktemp("runs") / "source"
    statuses, _, err = train(options(betons, folder, **BASE)).wait()
    assert statuses == [0], err
    return folder


@pytest.fixture
def branch(betons, tmp_path, train):
    """branch(source, **changed options): (status, folder, stdout, stderr)."""

    def run(source, **changed):
        folder = tmp_path / "branch"
        flags = {**BASE, "checkpoint.branch": source, **changed}
        statuses, out, err = train(options(betons, folder, **flags)).wait()
        return statuses[0], folder, out, err

    return run


def at(folder, step):
    return folder / checkpoint.NAME.format(step)


@pytest.mark.parametrize("step", [3, 4])
def test_branch_with_nothing_changed_equals_going_on(source, branch, step):
    """From an epoch's end, and from the middle of an epoch."""
    status, folder, out, err = branch(at(source, step))
    assert status == 0, err
    assert "no setting is changed" in out
    mine, theirs = state(folder), state(source)
    assert mine.pop("lineage") == [
        {"checkpoint": str(at(source, step)), "epochs": 1, "step": step, "changed": {}}
    ]
    for saved in (mine, theirs):
        for name in ("best", "recipe"):
            del saved[name]
        saved.pop("lineage", None)
        for row in saved["rows"]:
            row.pop("events", None)
    assert_same(mine, theirs)
    assert "nothing changed" in rows(folder)[1]["events"][0]
    assert json.loads((folder / "config.json").read_text())["lineage"][0]["step"] == step


def test_swa_tail_of_a_finished_run(source, branch):
    """As 90 epochs and then 10 of SWA."""
    status, folder, out, err = branch(
        source,
        **{
            "training.epochs": 5,
            "swa.epochs": 2,
            "swa.lr": 0.0001,
            "lr.lr_schedule_type": "constant",
        },
    )
    assert status == 0, err
    assert "training.epochs: 3 -> 5" in out and "swa.epochs: 0 -> 2" in out
    assert "EMA: goes on; SWA: starts after epoch 4" in out
    logged = rows(folder)
    assert [row["epoch"] for row in logged] == [0, 1, 2, 3, 4]
    assert logged[:3] == rows(source) and "swa_top1" in logged[-1]
    assert logged[-1]["lr"] == pytest.approx(0.0001, rel=0.9)


@pytest.mark.long
def test_average_that_ends_and_one_that_begins(source, branch, betons, tmp_path, train):
    status, folder, out, err = branch(at(source, 3), **{"ema.decay": 0})
    assert status == 0, err
    assert "EMA: none" in out
    assert ["ema_top1" in row for row in rows(folder)] == [True, False, False]
    assert state(folder)["ema"] is None
    again = tmp_path / "again"
    flags = {**BASE, "checkpoint.branch": folder, "training.epochs": 4}
    statuses, out, err = train(options(betons, again, **flags)).wait()
    assert statuses == [0] and "EMA: starts with the first step" in out, err
    assert ["ema_top1" in row for row in rows(again)] == [True, False, False, True]
    assert len(state(again)["lineage"]) == 2 and state(again)["ema"]["updates"] == 3


def test_learning_rate_and_augmentation_change_with_a_new_schedule(source, branch):
    changed = {
        "training.epochs": 6,
        "lr.from_epoch": 3,
        "lr.lr": 0.002,
        "augment.erase_prob": 0.35,
        "mix.mixup": 0.3,
    }
    status, folder, out, err = branch(source, **changed)
    assert status == 0, err
    for line in (
        "lr.lr: 0.005 -> 0.002",
        "augment.erase_prob: 0.25 -> 0.35",
        "epochs left: 3 of 6",
    ):
        assert line in out
    # warm-up from 0.00005 over epoch 4, then a cosine over 2 epochs; the last of 3 steps each
    found = [row["lr"] for row in rows(folder)[3:]]
    assert found[0] == pytest.approx(0.00005 + 0.00195 * 2 / 3)
    assert 0.002 > found[1] > found[2] > 0
    assert "5e-05 (next step, epoch 4), 0.002 (end of the warm-up, epoch 5)" in out


def test_steps_are_counted_again_with_another_global_batch(source, branch):
    status, folder, out, err = branch(
        source, **{"training.epochs": 5, "training.global_batch": 64, "checkpoint.every_steps": 0}
    )
    assert status == 0, err
    assert [row["steps"] for row in rows(folder)] == [3, 3, 3, 1, 1]
    assert state(folder)["step"] == 5 and "of 1 step" in out


def test_another_optimizer_begins_with_new_state(source, branch):
    status, folder, _, err = branch(
        source, **{"training.epochs": 4, "training.optimizer": "sgd", "lr.lr": 0.01}
    )
    assert (
        status == 2
        and "checkpoint.branch_optimizer=keep: the checkpoint's optimizer is lamb" in err
    )
    status, folder, out, err = branch(
        source,
        **{
            "training.epochs": 4,
            "training.optimizer": "sgd",
            "lr.lr": 0.01,
            "checkpoint.branch_optimizer": "new",
        },
    )
    assert status == 0 and "optimizer state: new" in out, err


def test_kept_optimizer_has_the_new_options(source, branch):
    status, folder, _, err = branch(source, **{"training.epochs": 4, "training.weight_decay": 0.1})
    assert status == 0, err
    groups = state(folder)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
    assert all(group["step"] == 12 for group in groups)


def test_branch_resumes_without_its_source(source, branch, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(source, copied)
    changed = {"training.epochs": 4, "lr.lr": 0.001}
    status, folder, _, err = branch(copied, **changed)
    assert status == 0, err
    whole = state(folder)
    for step in (10, 12):
        at(folder, step).unlink(missing_ok=True)
    shutil.rmtree(copied)
    status, folder, out, err = branch(copied, **changed)
    assert status == 0 and "resuming" in out, err
    assert_same(state(folder), whole)


@pytest.mark.parametrize(
    "step, changed, message",
    [
        (4, {"training.global_batch": 64}, "is in the middle of epoch 2, whose order, images and"),
        (
            9,
            {"training.epochs": 3},
            r"training.epochs=3: checkpoint.branch=.* has 3 epochs already",
        ),
        (9, {"training.epochs": 4, "model.arch": "test_resnet"}, "does not fit the recipe"),
        (9, {"training.epochs": 4, "checkpoint.warm_start": "x.pt"}, "gives other initial weights"),
        (
            9,
            {"training.epochs": 4, "lr.from_epoch": 4},
            "lr.from_epoch=4: the schedule would begin",
        ),
    ],
)
def test_branch_that_does_not_fit_is_named(source, branch, step, changed, message):
    import re

    status, folder, _, err = branch(at(source, step), **changed)
    assert status == 2 and re.search(message, err), err
    assert not list(folder.glob("checkpoint*")) and not (folder / "metrics.jsonl").exists()


def test_source_that_is_no_run_is_named(branch, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, _, err = branch(tmp_path / "empty")
    assert status == 2 and "has no checkpoint; give a run's folder or one of its checkpoints" in err
    status, _, _, err = branch(tmp_path / "absent.pt")
    assert status == 2 and "checkpoint.branch=" in err and "cannot be read" in err
