"""A run that is killed at any instant and restarted with the same command ends like one that was
never killed."""

import json
import random
import re
import shutil
import signal
import time

import pytest

from tests.integration.runs import TRACKER, assert_same_run, options, rows, tracked
from tests.sizes import KILLS

# Every kind of state at once: warm-up, accumulation, repeated augmentation, EMA, SWA with its
# batch-norm phase, validation
EVERYTHING = {
    "model.arch": "test_resnet",
    "training.epochs": 4,
    "swa.epochs": 2,
    "swa.lr": 0.0005,
    "swa.anneal_epochs": 1,
    "checkpoint.every_steps": 1,
    "training.optimizer": "sgd",
    "lr.lr": 0.05,
    "health.rise": 100,
}
PHASES = ("epoch 1", "epoch 2", "epoch 3", "epoch 4", "validation", "batch norm")
# Limit of the progress bar updates from a start to its kill; a complete run makes 45
MAX_MOVES = 16


def phase(err: str) -> str:
    """The name of the progress bar that was made last; see stops."""
    found = max(((err.rfind(name), name) for name in PHASES), default=(-1, ""))
    return found[1] if found[0] >= 0 else "start"


@pytest.mark.parametrize("world", [1, 2])
def test_run_killed_at_random_instants_equals_uninterrupted(betons, tmp_path, train, report, world):
    more = {**EVERYTHING, "training.batch_size": 16 // world}
    statuses, out, err = train(options(betons, tmp_path / "whole", **more), world).wait()
    assert statuses == [0] * world, err
    rng, kills, chains = random.Random(world), 0, 0
    phases: dict[str, int] = {}
    while kills < (KILLS if world == 1 else max(3, KILLS // 5)):
        folder = tmp_path / f"chain{chains}"
        chains += 1
        for _ in range(500):
            moves = rng.randrange(MAX_MOVES)
            run = train(options(betons, folder, **more), world, stop_at=("", moves))
            if moves:  # with 0, the kill comes during the start
                run.wait_for_stop(or_end=True)
                run.go_on()
            # Any instant after a known point; no result depends on which one it is. A run in which
            # a process has ended is killed half of the time, so that it ends.
            if run.poll() is None or rng.random() < 0.5:
                time.sleep(rng.uniform(0, 0.1 if moves else 1.0))
                run.kill()
            statuses, out, err = run.wait()
            if statuses == [0] * world:
                break
            assert set(statuses) <= {-signal.SIGKILL, 0}, err  # one process may just have ended
            kills += 1
            phases[phase(err)] = phases.get(phase(err), 0) + 1
        assert_same_run(folder, tmp_path / "whole")
        shutil.rmtree(folder)
    report(f"{kills} kills of {chains} runs in {world} process(es), by phase: {json.dumps(phases)}")
    assert len(phases) > 2 or kills < 20


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)]
)
def test_signal_saves_after_the_step_and_the_run_resumes(betons, tmp_path, train, number):
    """Only one of two processes gets the signal. It gets it twice, as from a parent that forwards
    its own."""
    more = {
        "checkpoint.every_minutes": 0,
        "training.epochs": 2,
        "training.batch_size": 8,
        "training.optimizer": "sgd",
    }
    statuses, _, err = train(options(betons, tmp_path / "whole", **more), 2).wait()
    assert statuses == [0, 0], err
    run = train(options(betons, tmp_path / "run", **more), 2, stop_at=("epoch 1", 1))
    run.wait_for_stop()
    run.signal(number, rank=1)
    run.wait_until(lambda: number.name in run.err.read_text())
    run.signal(signal.SIGTERM, rank=1)
    run.go_on()
    statuses, out, err = run.wait()
    assert (
        statuses == [75, 75] and "saved after step 2; the same command resumes from here" in out
    ), err
    assert len(list((tmp_path / "run").glob("checkpoint_*.pt"))) == 1 and not rows(tmp_path / "run")
    statuses, out, err = train(options(betons, tmp_path / "run", **more), 2).wait()
    assert statuses == [0, 0] and "resuming" in out, err
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("fail, world", [(None, 2), ("log", 1)])
def test_interrupted_run_has_its_curves_its_log_and_one_run_in_trackers(
    betons, tmp_path, train, fail, world
):
    folder, more = tmp_path / "run", {"logging.trackers": "mlflow", "model.arch": "test_resnet"}
    prepare = f"FAIL = {fail!r}{TRACKER}"
    run = train(options(betons, folder, **more), world, stop_at=("epoch 2", 1), prepare=prepare)
    run.wait_for_stop()
    assert not (folder / "training_curves.png").exists()  # so far, it would take too large a share
    run.signal(signal.SIGTERM)
    run.go_on()
    statuses, _, err = run.wait()
    assert statuses == [75] * world, err
    assert (folder / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    statuses, out, again = train(options(betons, folder, **more), world, prepare=prepare).wait()
    assert statuses == [0] * world, again
    text = "; the run continues, and metrics.jsonl is complete"
    for part in (err, again):
        assert part.count(f"mlflow failed (network is unreachable){text}") == (fail is not None)
    log = (folder / "training.log").read_text()
    step = int(re.search(r"saved after step (\d);", log)[1])
    assert log.index("saved after") < log.index(f"resuming {folder} after step {step} of 9")
    assert all(line[20:] in log for line in out.splitlines()) and log.count("device cpu") == 2
    calls = tracked(folder)
    opened, resumed = [call for call in calls if call[0] == "open"]
    assert opened[1:] == [(folder / "run_id").read_text().strip(), "run", 0, 0]
    assert resumed[1:] == [opened[1], "run", 0, step]  # the last epoch is sent again
    assert [call[:3] for call in calls if call[0] != "open"] == [
        ["log", "step", 3],
        ["log", "epoch", 1],
        ["close", False],
        ["log", "epoch", 1],
        ["log", "step", 6],
        ["log", "epoch", 2],
        ["log", "step", 9],
        ["log", "epoch", 3],
        ["close", True],
    ]
    last = rows(folder)[-1]
    assert calls[-2][3].items() >= {"top1": last["top1"], "ema_top1": last["ema_top1"]}.items()


def test_signal_before_the_first_step_saves_after_it(betons, tmp_path, train):
    run = train(options(betons, tmp_path / "run"), stop_at=("device", 0))
    run.wait_for_stop()
    run.signal(signal.SIGTERM)
    run.go_on()
    statuses, out, err = run.wait()
    assert (
        statuses == [75] and "saved after step 1" in out and (tmp_path / "run" / "requeue").exists()
    ), err
    assert list((tmp_path / "run").glob(".released-*"))
    statuses, _, err = train(options(betons, tmp_path / "run")).wait()
    assert statuses == [0] and not (tmp_path / "run" / "requeue").exists(), err


def test_requeue_mark_that_cannot_be_removed_is_one_line(betons, tmp_path, call_program):
    (tmp_path / "run" / "requeue").mkdir(parents=True)
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "run"))
    assert status == 2 and err.splitlines()[-1].startswith(f"error: {tmp_path}/run/requeue: cannot")


def test_error_of_the_first_process_ends_all_with_one_line(betons, tmp_path, train):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint_000000001.pt").write_bytes(b"damaged")
    for more, message in (
        ({}, "none of its 1 checkpoints can be read"),
        ({"logging.folder": "/dev/null/x"}, "cannot be used"),
        ({"compute.precision": "fp16"}, "compute.precision=fp16"),
        ({"lr.lr": 1e30, "training.optimizer": "sgd"}, "lower lr.lr"),
    ):
        folder = tmp_path / ("run" if not more else "other")
        statuses, _, err = train(
            options(betons, folder, **{"training.batch_size": 8, "training.grad_clip": 0, **more}),
            2,
        ).wait()
        assert (
            statuses == [2, 2]
            and err.count("error:") == 1
            and message in err
            and "Traceback" not in err
        ), err


def test_second_signal_ends_the_run_at_once(betons, tmp_path, train):
    run = train(options(betons, tmp_path / "run"), stop_at=("epoch 1", 1))
    run.wait_for_stop()
    run.signal(signal.SIGTERM)
    run.wait_until(lambda: "SIGTERM" in run.err.read_text())
    run.signal(signal.SIGUSR1)
    statuses, _, err = run.wait(120)  # the run is still held
    assert statuses == [128 + signal.SIGUSR1] and not list((tmp_path / "run").glob("*.pt")), err


@pytest.mark.parametrize("lost", [0, 1])
def test_process_that_dies_ends_the_job_with_one_line(betons, tmp_path, train, lost):
    run = train(
        options(betons, tmp_path / "run", **{"training.epochs": 200, "training.batch_size": 8}),
        2,
        stop_at=("epoch 2", 1),
    )
    run.wait_for_stop()
    run.signal(signal.SIGKILL, rank=lost)
    run.go_on()
    statuses, _, err = run.wait(120)  # a collective would block for half an hour
    assert statuses[lost] == -signal.SIGKILL and statuses[1 - lost] == 3, err
    assert len(list((tmp_path / "run").glob(".lease-*" if lost == 0 else ".released-*"))) == 1
    assert (
        err.count("error:") == 1
        and re.search(rf"process {lost} \(.+\) of 2 ended", err)
        and "Traceback" not in err
    )
