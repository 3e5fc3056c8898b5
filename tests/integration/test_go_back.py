"""A run that goes back discards the steps after that point. Whatever interrupts it, they are never
resumed."""

import signal

import pytest
import torch

from tests.integration.runs import TRACKER, assert_same_run, options, rows, state, tracked

# An epoch has 12 steps. Step 20 overflows the weights, which is detected before they are saved. The
# run goes back to step 12, the end of the first epoch. Then the folder contains checkpoints of
# steps 19 and 20, because one is due after each step.
MORE = {
    "model.arch": "test_resnet",
    "training.epochs": 2,
    "training.batch_size": 8,
    "training.global_batch": 8,
    "mix.off_epochs": 0,
    "training.optimizer": "sgd",
    "training.grad_clip": 0,
    "health.non_finite": "act",
    "checkpoint.every_minutes": 1e-9,
    "logging.log_level": 0,
}
OVERFLOW = """
from rsb_ffcv.learning.schedule import Schedule
plain = Schedule.lr
Schedule.lr = lambda self, step: 1e38 if step == 20 else plain(self, step)
"""
NOTICE = (
    OVERFLOW
    + """
import os
from rsb_ffcv.training.resume import Checkpointer
after_step = Checkpointer.after_step
def interrupted(self, regular):
    if self.health.skipped_steps and self.progress.step == {step}:
        os.kill(os.getpid(), {number})
    after_step(self, regular)
Checkpointer.after_step = interrupted
"""
)


@pytest.fixture(scope="module")
def whole(betons, tmp_path_factory, train):
    """Folder of the run that goes back and is not interrupted."""
    folder = tmp_path_factory.mktemp("go_back") / "whole"
    (status,), _, err = train(options(betons, folder, **MORE), prepare=OVERFLOW).wait()
    assert (
        status == 0
        and "the weights after step 20 are not finite: going back to step 12, leaving out step 20"
        in err
    ), err
    assert state(folder)["health"]["skipped_steps"] == [20]
    return folder


@pytest.mark.parametrize(
    "number, step",
    [
        *((signal.SIGTERM, step) for step in (13, 18, 23)),
        (signal.SIGKILL, 13),
        *(
            pytest.param(number, step, marks=pytest.mark.long)
            for number in (signal.SIGTERM, signal.SIGKILL)
            for step in range(14, 24)
            if number == signal.SIGKILL or step not in (18, 23)
        ),
    ],
)
def test_run_interrupted_after_going_back_equals_uninterrupted(
    betons, whole, tmp_path, train, number, step
):
    (status,), out, err = train(
        options(betons, tmp_path / "run", **MORE),
        prepare=NOTICE.format(step=step, number=int(number)),
    ).wait()
    assert status == (75 if number == signal.SIGTERM else -number), err
    assert all(int(path.stem[-9:]) <= step for path in (tmp_path / "run").glob("checkpoint_*"))
    (status,), out, err = train(options(betons, tmp_path / "run", **MORE), prepare=OVERFLOW).wait()
    assert status == 0 and "resuming" in out, err
    assert_same_run(tmp_path / "run", whole)
    assert rows(tmp_path / "run")[1]["events"] == rows(whole)[1]["events"]


def test_trackers_get_the_values_after_the_return_again(betons, tmp_path, train):
    (status,), _, err = train(
        options(betons, tmp_path / "run", **MORE, **{"logging.trackers": "mlflow"}),
        prepare=OVERFLOW + "FAIL = None" + TRACKER,
    ).wait()
    assert status == 0, err
    calls = [call[:3] for call in tracked(tmp_path / "run")]
    assert [call for call in calls if call[0] != "open"] == [
        ["log", "step", 12],
        ["log", "epoch", 1],
        ["rewind", 1, 12],
        ["log", "step", 24],
        ["log", "epoch", 2],
        ["close", True],
    ]


@pytest.mark.long
def test_run_killed_while_discarding_steps_goes_back_again(betons, whole, tmp_path, train):
    """Killed before the first of the two checkpoints is removed, after it, and after both."""
    for acts in (0, 1, 2):
        stop = (
            OVERFLOW
            + f"""
import os
from rsb_ffcv.training import checkpoint
remove, acts = checkpoint.remove, []
def counted(path):
    if path.name.startswith("checkpoint_") and int(path.stem[-9:]) > 18:
        acts.append(path)
        if len(acts) > {acts}:
            os.kill(os.getpid(), 9)
    remove(path)
remove_after = checkpoint.Store.remove_after
def watched(self, step):
    checkpoint.remove = counted
    removed = remove_after(self, step)
    os.kill(os.getpid(), 9)
checkpoint.Store.remove_after = watched
"""
        )
        folder = tmp_path / f"run{acts}"
        (status,), _, err = train(options(betons, folder, **MORE), prepare=stop).wait()
        assert status == -signal.SIGKILL, err
        (status,), out, err = train(options(betons, folder, **MORE), prepare=OVERFLOW).wait()
        assert status == 0 and "going back to step 12, leaving out step 20" in err, err
        assert_same_run(folder, whole)


def test_best_checkpoint_of_discarded_steps_is_removed(tmp_path):
    from rsb_ffcv.training.checkpoint import KEYS, Store, read

    def saved(step):
        return {**dict.fromkeys(KEYS), "step": step, "model": {"w": torch.ones(1)}}

    store = Store(tmp_path, keep=3)
    store.lock()
    for step, best in ((10, True), (20, True), (21, False)):
        store.save(saved(step), best)
    store.finish()
    assert store.remove_after(10)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["checkpoint_000000010.pt"]
    store.mark_best(tmp_path / "checkpoint_000000010.pt")
    assert not store.remove_after(10)
    assert read(tmp_path / "best.pt")["step"] == 10
    store.close()
