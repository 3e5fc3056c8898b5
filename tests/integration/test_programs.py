"""The two programs as a user runs them: complete runs, killed and resumed ones, several processes,
and invalid input."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rsb_ffcv import InputError
from rsb_ffcv.reporting.console import epoch_line
from tests.integration.runs import (
    assert_same,
    assert_same_course,
    assert_same_run,
    options,
    rows,
    state,
)
from tests.stops import Stop, wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(betons, tmp_path_factory):
    """A complete run: (folder, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = subprocess.run(
        [sys.executable, "train_imagenet.py", *options(betons, folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def best_of(rows):
    """The best of a run so far, as the console shows it."""
    top1 = [max(row["top1"], row["ema_top1"]) for row in rows]
    return {"top1": max(top1), "epoch": top1.index(max(top1))}


def test_run_prints_its_setup_and_writes_the_documented_files(finished):
    folder, out, err = finished
    first = out.splitlines()[0]
    for part in ("device cpu", "precision fp32", "compile off", "channels_last on", "1 process"):
        assert part in first
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in written] == [0, 1, 2]
    assert [row["lr_first"] for row in written[:2]] == [0.00005, 0.005]  # warm-up, then the peak
    for row in written:
        assert {
            "train_loss",
            "top1",
            "top5",
            "ema_top1",
            "ema_top5",
            "lr",
            "images_per_s",
            "data_wait_s",
            "peak_memory_mb",
            "val_seconds",
            "images_per_s_with_val",
            "eta_s",
        } <= row.keys()
        assert row["val_images"] == 27 and row["steps"] == 3
        assert (row["images"], row["groups"]) == (96, 6)
        assert (row["mixed"] > 0.9 and row["own_weight"] < 0.9) == (row["epoch"] < 2)
        assert row["epoch"] < 2 or (row["mixed"], row["own_weight"]) == (0, 1)
        assert 0.005 < row["erased"] < 0.15
        assert (
            0 <= row["data_wait_s"] <= row["seconds"]
            and row["images_per_s"] > 0
            and row["peak_memory_mb"] > 50
        )
    assert [line for line in out.splitlines() if line.startswith("epoch ")] == [
        epoch_line(row, 3, best_of(written[: number + 1])) for number, row in enumerate(written)
    ]
    assert "\r" not in err and "loss=" not in err
    logged = [
        re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)", line)[1]
        for line in (folder / "training.log").read_text().splitlines()
    ]
    assert logged == out.splitlines() and not err
    assert (folder / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text())["lr"]["lr"] == 0.005
    assert {"top-1 (top-5), raw weights", "waiting for data", "training images/s, median"} <= {
        line.split("  ")[0].strip() for line in out.splitlines()
    }
    assert not [path for path in folder.iterdir() if path.name.endswith(".part")]
    assert [path.name for path in sorted(folder.glob("checkpoint_*"))] == [
        "checkpoint_000000006.pt",
        "checkpoint_000000009.pt",
    ]
    best = torch.load(folder / "best.pt", weights_only=True)
    assert (
        best["rows"][-1]["epoch"]
        == best["best"]["epoch"]
        == max(written, key=lambda row: max(row["top1"], row["ema_top1"]))["epoch"]
    )
    for name in ("final_weights.pt", "final_weights_ema.pt"):
        assert not any(
            key.startswith(("module.", "_orig_mod."))
            for key in torch.load(folder / name, weights_only=True)
        )


def test_rerun_of_a_finished_run_changes_nothing(betons, finished, train):
    folder = finished[0]
    before = state(folder), rows(folder)
    statuses, out, err = train(options(betons, folder)).wait()
    assert statuses == [0], err
    assert_same(state(folder), before[0])
    assert rows(folder) == before[1] and "best top-1" in out and not list(folder.glob(".*.part"))


def test_eval_only_equals_the_last_epoch(betons, finished, call_program):
    status, out, err = call_program(
        "train_imagenet.py", *options(betons, finished[0], **{"training.eval_only": 1})
    )
    assert status == 0, err
    result, last = json.loads(out.splitlines()[-1]), rows(finished[0])[-1]
    assert {key: result[key] for key in ("top1", "top5", "ema_top1")} == {
        key: last[key] for key in ("top1", "top5", "ema_top1")
    }


# 51 steps. SGD without clipping shows a gradient of the wrong scale, which LAMB hides
FIFTY = {
    "training.optimizer": "sgd",
    "training.grad_clip": 0,
    "lr.lr": 0.005,
    "training.epochs": 17,
    "mix.off_epochs": 0,
    "training.batch_size": 8,
    "logging.log_level": 0,
    "model.drop_path": 0.1,
    "checkpoint.every_minutes": 0,
}


@pytest.fixture(scope="module")
def alone(betons, tmp_path_factory, train):
    """Folder of 51 steps by one process that accumulates 4 groups of 8."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    statuses, _, err = train(options(betons, folder, **FIFTY)).wait()
    assert statuses == [0], err
    return folder


@pytest.mark.parametrize("world", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (3, 4))])
def test_any_split_of_a_step_over_processes_trains_the_same_model(
    betons, alone, tmp_path, train, world
):
    statuses, out, err = train(options(betons, tmp_path / "run", **FIFTY), world).wait()
    assert statuses == [0] * world, err
    assert f"{world} processes" in out and out.count("epoch 1/") == 1
    assert_same_course(tmp_path / "run", alone)


def end_at_stop(run):
    """Sends SIGTERM to a run at its stop."""
    run.wait_for_stop()
    run.signal(signal.SIGTERM)
    run.go_on()
    statuses, _, err = run.wait()
    assert statuses == [75] * len(statuses), err


def test_run_that_decodes_on_a_device_has_the_same_bits(betons, tmp_path, train):
    """On an emulated device, from the start or from the middle of an epoch on."""
    on_device = {"data.decode": "gpu"}
    assert train(options(betons, tmp_path / "cpu")).wait()[0] == [0]
    end_at_stop(train(options(betons, tmp_path / "both"), stop_at=("epoch 2", 1)))
    for name in ("gpu", "both"):
        statuses, _, err = train(options(betons, tmp_path / name, **on_device)).wait()
        assert statuses == [0], err
        assert_same_run(tmp_path / "cpu", tmp_path / name)


@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_profile_is_a_trace_with_the_work_of_the_loader(betons, tmp_path, train, decode):
    """The run ends before the number of steps is reached: what there is, is written."""
    more = {
        "compute.profile": 50,
        "data.decode": decode,
        "training.epochs": 6,
        "model.arch": "test_resnet",
    }
    statuses, out, err = train(options(betons, tmp_path / "run", **more)).wait()
    assert statuses == [0] and f"{tmp_path / 'run' / 'trace.json'}: a trace" in out, err
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    ours = [event for event in events if event.get("cat") == "loader"]
    names = {event["name"] for event in ours}
    assert names == (
        {"RandomResizedCrop", "RandAugment", "ColorJitter"}
        if decode == "cpu"
        else {"RandomResizedCrop"}
    )
    steps = [event for event in events if event.get("name", "").startswith("aten::conv")]
    first, last = min(event["ts"] for event in steps), max(event["ts"] for event in steps)
    assert len(steps) > 100 and {event["pid"] for event in ours} == {steps[0]["pid"]}
    # on one time line: the loader works before and during the steps that it feeds
    assert any(first < event["ts"] < last for event in ours) and len(ours) > 100
    assert all(event["dur"] >= 0 and event["ts"] > first - 60e6 for event in ours)
    assert len({event["tid"] for event in ours}) == 2
    assert {"sample"} == set(ours[0]["args"])


def test_no_process_group_thread_is_left_at_interpreter_exit(betons, tmp_path, train):
    """Such a thread occasionally aborts the interpreter, if it releases its last tensor only at the
    exit."""
    run = train(options(betons, tmp_path / "run", **FIFTY), 2, stop_at=("epoch 1", 1))
    end_at_stop(run)
    ended = train(options(betons, tmp_path / "run", **FIFTY, **{"training.eval_only": 1}), 2)
    assert ended.wait()[0] == [0, 0]
    for threads in run.threads + ended.threads:
        assert threads and not [name for name in threads if "gloo" in name]
    assert len(run.threads + ended.threads) == 4


@pytest.mark.long
def test_swa_can_be_finished_by_another_number_of_processes(betons, tmp_path, train):
    """The runs receive SIGTERM while SWA's batch-norm statistics are estimated, and while SWA is
    evaluated."""
    more = {
        **FIFTY,
        "training.epochs": 3,
        "swa.epochs": 2,
        "swa.lr": 0.001,
        "model.arch": "test_resnet",
    }
    statuses, _, err = train(options(betons, tmp_path / "whole", **more)).wait()
    assert statuses == [0], err
    for place in ("batch norm", "validation SWA"):
        end_at_stop(train(options(betons, tmp_path / place, **more), stop_at=(place, 1)))
        statuses, out, err = train(options(betons, tmp_path / place, **more), 3).wait()
        assert statuses == [0] * 3 and "resuming" in out, err
        ours, plain = (
            torch.load(tmp_path / name / "final_weights_swa.pt", weights_only=True)
            for name in (place, "whole")
        )
        for key, tensor in plain.items():
            if tensor.is_floating_point():
                assert (ours[key] - tensor).norm() <= 1e-4 * tensor.norm() + 1e-6, (place, key)


@pytest.mark.long
def test_run_can_change_its_number_of_processes(betons, alone, tmp_path, train):
    """Two, then three for the 4 groups of a step, then one."""
    end_at_stop(train(options(betons, tmp_path / "run", **FIFTY), 2, stop_at=("epoch 3", 1)))
    end_at_stop(train(options(betons, tmp_path / "run", **FIFTY), 3, stop_at=("epoch 5", 2)))
    statuses, out, err = train(options(betons, tmp_path / "run", **FIFTY)).wait()
    assert statuses == [0] and "resuming" in out, err
    assert_same_course(tmp_path / "run", alone)


@pytest.mark.long
def test_torchrun_restarts_a_job_whose_process_died(betons, tmp_path, call_program):
    """Also, its two processes of 16 images equal one process of 16 that accumulates twice."""
    more = {
        "training.epochs": 2,
        "model.drop_path": 0,
        "mix.off_epochs": 0,
        "training.optimizer": "sgd",
        "lr.lr": 0.05,
    }
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "alone", **more))
    assert status == 0, err
    stop = Stop(("epoch 2", 1), tmp_path, 2)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=2",
        "tests/stops.py",
        *options(betons, tmp_path / "torchrun", **more),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **stop.env},
    )
    try:
        wait_until(
            lambda: stop.reached() and list((tmp_path / "torchrun").glob("checkpoint_*")), process
        )
        os.kill(stop.processes()[0], signal.SIGKILL)
        stop.go_on()
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0 and "resuming" in out, err
    assert_same_course(tmp_path / "torchrun", tmp_path / "alone")
    # The log agrees with the checkpoint, whichever process evaluated which image
    status, out, err = call_program(
        "train_imagenet.py",
        *options(betons, tmp_path / "torchrun", **more, **{"training.eval_only": 1}),
    )
    assert status == 0, err
    result, last = json.loads(out.splitlines()[-1]), rows(tmp_path / "torchrun")[-1]
    for key in ("top1", "top5", "ema_top1", "val_loss", "ema_val_loss"):
        assert result[key] == pytest.approx(last[key], rel=1e-5), key


@pytest.mark.long
def test_compiled_run_saves_plain_weights_and_has_the_same_losses(
    betons, tmp_path, train, run_program
):
    more = {
        "model.arch": "test_resnet",
        "training.epochs": 2,
        "training.optimizer": "sgd",
        "lr.lr": 0.05,
    }
    statuses, _, err = train(options(betons, tmp_path / "plain", **more)).wait()
    assert statuses == [0], err
    status, out, err = run_program(
        "train_imagenet.py",
        *options(betons, tmp_path / "compiled", **more, **{"compute.compile": 1}),
        timeout=1800,
    )
    assert status == 0 and "compile on" in out.splitlines()[0], err
    assert state(tmp_path / "compiled")["model"].keys() == state(tmp_path / "plain")["model"].keys()
    for ours, plain in zip(rows(tmp_path / "compiled"), rows(tmp_path / "plain"), strict=True):
        assert ours["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"lr.lr": 0.004}, "lr.lr: 0.005 in the folder, 0.004 now"),
        ({"checkpoint.resume": "never"}, "checkpoint.resume=never"),
    ],
)
def test_folder_with_another_run_is_rejected(betons, finished, call_program, more, message):
    status, _, err = call_program("train_imagenet.py", *options(betons, finished[0], **more))
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err


def test_run_with_a_damaged_newest_checkpoint_ends_the_same(
    betons, finished, tmp_path, call_program
):
    shutil.copytree(finished[0], tmp_path / "run")
    newest = max((tmp_path / "run").glob("checkpoint_*"))
    newest.write_bytes(newest.read_bytes()[:-20_000] + bytes(20_000))
    status, out, err = call_program("train_imagenet.py", *options(betons, tmp_path / "run"))
    assert (
        status == 0
        and f"{newest.name}: " in err
        and "falling back to the checkpoint before it" in err
    )
    assert "after step 6 of 9" in out
    assert_same_run(tmp_path / "run", finished[0])


def test_folder_without_an_intact_checkpoint_is_an_error(betons, finished, tmp_path, call_program):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "checkpoint_000000001.pt"
    for content, message in (
        (b"\0" * 999, "none of its 1 checkpoints can be read"),
        ((finished[0] / "final_weights.pt").read_bytes(), "not a checkpoint of this program"),
    ):
        path.write_bytes(content)
        status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "run"))
        assert status == 2 and message in err.splitlines()[-1]


@pytest.mark.parametrize("damage", ["missing", "cut", "too long"])
def test_log_is_restored_from_the_checkpoint(betons, finished, tmp_path, call_program, damage):
    shutil.copytree(finished[0], tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    log.unlink() if damage == "missing" else log.write_text(
        log.read_text()[:-5] if damage == "cut" else log.read_text() * 2
    )
    status, out, err = call_program("train_imagenet.py", *options(betons, tmp_path / "run"))
    assert "training finished already, after step 9 of 9" in out and "resuming" not in out
    assert status == 0 and log.read_text() == (finished[0] / "metrics.jsonl").read_text(), err


def test_resume_with_another_global_batch_is_rejected(betons, finished, call_program):
    status, _, err = call_program(
        "train_imagenet.py", *options(betons, finished[0], **{"training.global_batch": 16})
    )
    assert status == 2 and "training.global_batch: 32 in the folder, 16 now" in err.splitlines()[-1]


def test_message_about_another_recipe_is_short():
    from rsb_ffcv.training.checkpoint import check_recipe

    saved, now = ({"lr": {f"k{n}": value for n in range(7)}} for value in (1, ""))
    with pytest.raises(InputError) as caught:
        check_recipe(saved, now, Path("run"))
    message = str(caught.value)
    assert "(lr.k0: 1 in the folder, '' now; " in message and message.count(" now") == 5
    assert "lr.k4: 1 in the folder, '' now; and 2 more); use its options" in message


@pytest.mark.parametrize("damage", ["truncated", "not a .beton"])
def test_invalid_file_is_an_error_before_anything_is_written(
    betons, tmp_path, call_program, damage
):
    path = tmp_path / "train.beton"
    path.write_bytes(
        (betons / "train.beton").read_bytes()[:-1000] if damage == "truncated" else b"hello" * 100
    )
    status, _, err = call_program(
        "train_imagenet.py", *options(betons, tmp_path / "run", **{"data.train_dataset": path})
    )
    assert status == 2 and str(path) in err.splitlines()[-1] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        ({"model.num_classes": 10}, "model.num_classes=10"),
        ({"training.batch_size": 200, "training.global_batch": 0}, "has only 96 images"),
        ({"data.num_workers": 0}, "data.num_workers='0'"),
        ({"logging.folder": "/dev/null/run"}, "logging.folder=/dev/null/run"),
        ({"compute.precision": "fp16"}, "compute.precision=fp16"),
        ({"model.arch": "resnet5"}, "model.arch=resnet5"),
        ({"training.optimizer": "lam"}, "training.optimizer=lam"),
        ({"augment.rand_augment": "rand-x"}, "augment.rand_augment="),
        (
            {"validation.resolution": 8, "model.arch": "vit_tiny_patch16_224"},
            "resolution.min_res=32",
        ),
        ({"training.eval_only": 1}, "training.eval_only=1"),
    ],
)
def test_invalid_settings_are_one_error_line(betons, tmp_path, call_program, more, message):
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "run", **more))
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_missing_cuda_is_an_error(betons, tmp_path, call_program):
    status, _, err = call_program(
        "train_imagenet.py", *options(betons, tmp_path / "run", **{"compute.device": "cuda"})
    )
    assert (
        status == 2
        and "compute.device=cuda" in err.splitlines()[-1]
        and not (tmp_path / "run").exists()
    )


def limit_file_size(size):
    """For preexec_fn: the kernel lets no file grow past `size` bytes, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_conversion_resumes_after_a_full_disk(pictures, betons, tmp_path, run_program):
    command = (
        "write_ffcv.py",
        f"--cfg.data_dir={pictures}",
        f"--cfg.write_path={tmp_path}/out",
        "--cfg.num_workers=2",
    )
    status, _, err = run_program(*command, preexec_fn=limit_file_size(8_500_000))
    assert (
        status == 2
        and "train.beton: cannot be written" in err.splitlines()[-1]
        and "the same command again" in err.splitlines()[-1]
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".train.beton.part",
        ".train.beton.journal",
    }
    assert run_program(*command)[0] == 0
    for name in ("train.beton", "val.beton"):
        assert (tmp_path / "out" / name).read_bytes() == (betons / name).read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train.beton", "val.beton"}


def test_full_disk_is_a_warning_in_training_and_an_error_at_its_end(betons, tmp_path, train):
    """No file larger than 1 MB can be written. Each checkpoint is a warning, existing files stay,
    and the end is an error. With free space again, the same command finishes the run."""
    folder, more = tmp_path / "run", {"training.epochs": 3}
    statuses, _, err = train(options(betons, tmp_path / "whole", **more)).wait()
    end_at_stop(train(options(betons, folder, **more), stop_at=("epoch 2", 1)))
    before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    (status,), _, err = train(options(betons, folder, **more), largest_file=1_000_000).wait()
    assert (
        status == 2
        and err.count("warning: the checkpoint was not written") >= 2
        and "could not be written" in err.splitlines()[-1]
    )
    assert {path.name: path.read_bytes() for path in folder.glob("*.pt")} == before and not list(
        folder.glob(".*.part")
    )
    assert [row["epoch"] for row in rows(folder)] == [0, 1, 2]
    statuses, _, err = train(options(betons, folder, **more)).wait()
    assert statuses == [0], err
    assert_same_run(folder, tmp_path / "whole")


def test_unwritable_log_is_a_warning(betons, finished, tmp_path, call_program, monkeypatch):
    from rsb_ffcv.reporting import log

    plain = log.write_metrics

    def full_once(folder, rows):
        if len(rows) == 2:
            raise InputError(f"{folder}/metrics.jsonl: cannot be written (No space left on device)")
        plain(folder, rows)

    monkeypatch.setattr(log, "write_metrics", full_once)
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "run"))
    assert status == 0 and err.count("No space left on device); the run continues") == 1
    assert_same_run(tmp_path / "run", finished[0])


def test_non_finite_loss_is_an_error_or_its_step_is_skipped(betons, tmp_path, call_program):
    """The learning rate overflows float32 in the first steps. Without the policy `act`, an error of
    one line names the step."""
    more = {
        "training.optimizer": "sgd",
        "training.grad_clip": 0,
        "lr.lr": 1e30,
        "ema.decay": 0,
        "training.epochs": 5,
    }
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "stops", **more))
    assert status == 2 and "the loss of step" in err.splitlines()[-1] and "Traceback" not in err
    more |= {"health.non_finite": "act", "checkpoint.every_steps": 1}
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "acts", **more))
    assert (
        status == 2
        and "leaving out step" in err
        and "going back 10 times did not fix it" in err.splitlines()[-1]
    )
    for path in (tmp_path / "acts").glob("checkpoint_*"):
        assert all(
            tensor.isfinite().all()
            for tensor in torch.load(path, weights_only=True)["model"].values()
        )


@pytest.mark.parametrize("every_steps", [0, 1])
def test_step_that_overflows_the_weights_is_skipped(
    betons, tmp_path, call_program, monkeypatch, every_steps
):
    """The learning rate of one step overflows float32. This is detected at once if each step is
    saved, else by the next loss."""
    from rsb_ffcv.learning.schedule import Schedule

    plain = Schedule.lr
    monkeypatch.setattr(Schedule, "lr", lambda self, step: 1e38 if step == 4 else plain(self, step))
    status, out, err = call_program(
        "train_imagenet.py",
        *options(
            betons,
            tmp_path / "run",
            **{
                "training.optimizer": "sgd",
                "training.grad_clip": 0,
                "health.non_finite": "act",
                "checkpoint.every_steps": every_steps,
            },
        ),
    )
    assert status == 0, err
    end = state(tmp_path / "run")
    assert all(
        tensor.isfinite().all()
        for tensor in [*end["model"].values(), *end["ema"]["module"].values()]
    )
    assert end["health"]["skipped_steps"] == ([4] if every_steps else [4, 5])
    (event,) = rows(tmp_path / "run")[1]["events"]
    assert (
        "the weights after step 4" if every_steps else "the loss of step 5"
    ) in event and "leaving out step 4" in event


def test_loss_rise_goes_back_at_half_the_learning_rate(betons, tmp_path, call_program, monkeypatch):
    from rsb_ffcv.learning.schedule import Schedule

    monkeypatch.setattr(Schedule, "lr", lambda self, step: 1e-4 if step < 96 else 30.0)
    status, out, err = call_program(
        "train_imagenet.py",
        *options(
            betons,
            tmp_path / "run",
            **{
                "model.arch": "test_resnet",
                "training.optimizer": "sgd",
                "training.epochs": 45,
                "mix.off_epochs": 0,
                "health.loss_rise": "act",
                "logging.log_level": 0,
                "checkpoint.every_minutes": 0,
                "model.drop_path": 0,
            },
        ),
    )
    assert status == 0, err
    (line,) = [line for line in err.splitlines() if line.startswith("warning: at step")]
    back = int(
        re.search(
            r"above its recent median, .*: going back to step (\d+), learning rate x 0.5 from",
            line,
        )[1]
    )
    assert back % 3 == 0 and back >= 96
    log = rows(tmp_path / "run")
    assert [row["lr"] for row in log] == [1e-4] * 32 + [30.0] * (back // 3 - 32) + [15.0] * (
        45 - back // 3
    )
    assert [line.removeprefix("warning: ")] == log[back // 3]["events"]


def test_warm_start_loads_the_weights_of_another_run(betons, finished, tmp_path, call_program):
    more = {"lr.lr": 0, "lr.warmup_lr": 0, "training.epochs": 1, "augment.repeats": 1}
    for which, source in (("model", "final_weights.pt"), ("model", "best.pt"), ("ema", "best.pt")):
        folder = tmp_path / f"{which}-{source}"
        status, out, err = call_program(
            "train_imagenet.py",
            *options(
                betons,
                folder,
                **more,
                **{
                    "checkpoint.warm_start": finished[0] / source,
                    "checkpoint.warm_start_from": which,
                },
            ),
        )
        assert status == 0 and "starting from the weights of" in out, err
        source = torch.load(finished[0] / source, weights_only=True)
        source = (
            source
            if "model" not in source
            else source["model"]
            if which == "model"
            else source["ema"]["module"]
        )
        assert torch.equal(state(folder)["model"]["conv1.0.weight"], source["conv1.0.weight"])
    for path, message in (
        (tmp_path / "absent.pt", "cannot be read"),
        (finished[0] / "config.json", "not a readable"),
        (betons / "val.beton", "not a readable"),
    ):
        status, _, err = call_program(
            "train_imagenet.py", *options(betons, tmp_path / "x", **{"checkpoint.warm_start": path})
        )
        last = err.splitlines()[-1]
        assert status == 2 and f"error: checkpoint.warm_start={path}: {message}" in last
        assert "; give a checkpoint of this program or a state_dict" in last
    average = {
        "checkpoint.warm_start": finished[0] / "final_weights.pt",
        "checkpoint.warm_start_from": "ema",
    }
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "x", **average))
    assert status == 2 and re.search(
        "error: checkpoint.warm_start_from=ema: .*weights.pt is not a checkpoint .*; use model",
        err.splitlines()[-1],
    )
    status, _, err = call_program(
        "train_imagenet.py",
        *options(
            betons,
            tmp_path / "x",
            **{"model.arch": "resnet18", "checkpoint.warm_start": finished[0] / "final_weights.pt"},
        ),
    )
    assert status == 2 and "is of another model" in err.splitlines()[-1]


def test_evaluation_on_the_training_images_is_a_warning(betons, tmp_path, call_program):
    copy = tmp_path / "copy.beton"
    copy.write_bytes((betons / "train.beton").read_bytes())
    more = {"data.val_dataset": copy, "training.epochs": 1, "lr.warmup_epochs": 0}
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "x", **more))
    assert status == 0 and err.count("warning: ") == 1, err
    assert f"warning: data.val_dataset={copy}: has the same content as data.train_dataset=" in err


@pytest.mark.parametrize("option", ["data.train_dataset", "data.val_dataset"])
def test_option_of_a_file_that_is_no_beton_is_named(betons, tmp_path, call_program, option):
    status, _, err = call_program(
        "train_imagenet.py", *options(betons, tmp_path / "x", **{option: "README.md"})
    )
    assert status == 2 and f"error: {option}=README.md: not a .beton file" in err
    if option == "data.train_dataset":
        status, _, err = call_program(
            "train_imagenet.py", "plan", *options(betons, tmp_path / "x", **{option: "README.md"})
        )
        assert status == 2 and f"error: {option}=README.md: not a .beton file" in err


def test_batch_that_is_too_large_names_the_options_given(betons, tmp_path):
    from dataclasses import replace

    import torch

    from rsb_ffcv.config.train import read_config
    from rsb_ffcv.training.build import train_loader
    from rsb_ffcv.training.compute import Compute

    c = read_config(
        None,
        options(betons, tmp_path, **{"training.batch_size": 32, "training.global_batch": 0}),
    )
    where = Compute(device=torch.device("cpu"), precision="fp32", compile=False, channels_last=True)
    with pytest.raises(
        InputError,
        match="^training.batch_size=32 with 8 processes, 256 images per step: .* has only 96 "
        "images; lower training.batch_size or start fewer processes, or write more images$",
    ):
        train_loader(c, replace(where, world_size=8), 1, decode="cpu")
    c = replace(c, training=replace(c.training, batch_size=100))
    with pytest.raises(
        InputError,
        match="^training.batch_size=100 with 1 process, 100 images per step: .* has only 96 "
        "images; lower training.batch_size, or write more images$",
    ):
        train_loader(c, where, 1, decode="cpu")


def test_unwritten_checkpoint_is_not_the_best(betons, tmp_path, call_program, monkeypatch):
    """The disk is full at the end of the second epoch, whose accuracy is made the highest."""
    from rsb_ffcv.training import checkpoint, evaluate

    plain_write, plain_evaluate = checkpoint.write, evaluate.evaluate
    tops = iter([10.0, 10.0, 90.0, 90.0, 50.0, 50.0, 50.0])  # the last one is for the report

    def full_once(state, path):
        if path.name == "checkpoint_000000006.pt":
            raise InputError(f"{path}: cannot be written (No space left on device)")
        plain_write(state, path)

    monkeypatch.setattr(checkpoint, "write", full_once)
    monkeypatch.setattr(
        evaluate,
        "evaluate",
        lambda *given, **more: {**plain_evaluate(*given, **more), "top1": next(tops)},
    )
    status, out, err = call_program("train_imagenet.py", *options(betons, tmp_path / "run"))
    assert status == 0 and err.count("warning: the checkpoint was not written") == 1, err
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert (
        state(tmp_path / "run")["best"] == {"top1": 50.0, "epoch": 2, "step": 9, "weights": "model"}
        and best["step"] == 9
    )
    assert "50.00 % after epoch 3" in out and not list((tmp_path / "run").glob(".*.part"))


def test_another_data_set_of_the_same_size_is_rejected(
    betons, finished, pictures, tmp_path, call_program
):
    from rsb_ffcv.dataset import Encoding, Place, write_splits

    write_splits(
        Place(dataset="imagenet", data_dir=str(pictures)),
        str(tmp_path),
        num_workers=2,
        encoding=Encoding(jpeg_quality=70, pass_through=False),
    )
    status, _, err = call_program("train_imagenet.py", *options(tmp_path, finished[0]))
    assert status == 2 and "data.train_fingerprint:" in err.splitlines()[-1]


def test_accuracy_on_other_labels_is_reported_as_well(betons, finished, tmp_path, call_program):
    from rsb_ffcv.beton import read_beton

    labels = read_beton(betons / "val.beton").labels.tolist()
    for content, accuracy in (
        (labels, None),
        ([[0, 1, 2]] * 27, 100.0),
        ([[] for _ in labels[1:]] + [[0, 1, 2]], 100.0),
    ):
        (tmp_path / "labels.json").write_text(json.dumps(content))
        status, out, err = call_program(
            "train_imagenet.py",
            *options(
                betons,
                finished[0],
                **{"training.eval_only": 1, "validation.labels": tmp_path / "labels.json"},
            ),
        )
        result = json.loads(out.splitlines()[-1])
        assert status == 0 and result["relabelled_top1"] == (
            result["top1"] if accuracy is None else accuracy
        ), err
    assert result["relabelled_images"] == 1


# rn50_configs/rn50_16_epochs.yaml as published by libffcv/ffcv-imagenet, key by key
FFCV_IMAGENETS_FILE = {
    "data": {"in_memory": 1, "num_workers": 12},
    "dist": {"world_size": 8},
    "logging": {"folder": "/tmp/"},
    "lr": {"lr": 1.7, "lr_schedule_type": "cyclic"},
    "model": {"arch": "resnet50"},
    "resolution": {"end_ramp": 13, "max_res": 192, "min_res": 160, "start_ramp": 11},
    "training": {
        "batch_size": 512,
        "bn_wd": 0,
        "distributed": 1,
        "epochs": 16,
        "label_smoothing": 0.1,
        "momentum": 0.9,
        "optimizer": "sgd",
        "weight_decay": 0.0001,
        "use_blurpool": 1,
    },
    "validation": {"lr_tta": True, "resolution": 256},
}


@pytest.mark.long
def test_published_ffcv_imagenet_recipe_runs_unchanged(betons, tmp_path, run_program, free_port):
    """Flags shorten the run, as a user would do on a small machine. It has two processes, a growing
    resolution and BlurPool."""
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(FFCV_IMAGENETS_FILE))
    small = {
        "data.train_dataset": betons / "train.beton",
        "data.val_dataset": betons / "val.beton",
        "logging.folder": tmp_path / "run",
        "dist.world_size": 2,
        "training.batch_size": 24,
        "training.epochs": 3,
        "data.num_workers": 1,
        "model.arch": "resnet10t",
        "resolution.min_res": 32,
        "resolution.max_res": 96,
        "resolution.start_ramp": 0,
        "resolution.end_ramp": 2,
        "validation.resolution": 64,
        "validation.batch_size": 16,
        "compute.precision": "fp32",
        "dist.port": free_port,
    }
    status, out, err = run_program(
        "train_imagenet.py",
        f"--config-file={tmp_path}/published.yaml",
        *(f"--{name}={value}" for name, value in small.items()),
    )
    assert status == 0 and "2 processes" in out, err
    assert err.count("training.bn_wd=0") == 1 and [
        row["resolution"] for row in rows(tmp_path / "run")
    ] == [32, 64, 96]
    assert any("blur_filter" in key for key in state(tmp_path / "run")["model"])


def test_unreadable_image_does_not_hang_the_writer(pictures, tmp_path, run_program):
    for split in ("train", "val"):
        (tmp_path / "in" / split).mkdir(parents=True)
        for name in ("amber", "blue", "cyan"):
            os.symlink(pictures / split / name, tmp_path / "in" / split / name)
    bad = tmp_path / "in" / "train" / "red"
    bad.mkdir()
    (tmp_path / "in" / "val" / "red").mkdir()
    (bad / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    os.symlink(pictures / "val" / "blue" / "1.jpg", tmp_path / "in" / "val" / "red" / "1.jpg")
    status, _, err = run_program(
        "write_ffcv.py",
        f"--cfg.data_dir={tmp_path}/in",
        f"--cfg.write_path={tmp_path}/out",
        "--cfg.num_workers=2",
        "--cfg.follow_links=1",
        timeout=300,
    )
    assert status == 2 and "broken.jpg: not a readable picture" in err.splitlines()[-1]
    assert not [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]


def test_writer_shows_progress_and_a_line_per_file(pictures, tmp_path, call_program):
    status, out, err = call_program(
        "write_ffcv.py",
        f"--cfg.data_dir={pictures}",
        f"--cfg.write_path={tmp_path}/out",
        "--cfg.num_workers=2",
        "--cfg.max_resolution=60",
    )
    assert status == 0, err
    assert "train.beton: 96 images, 3 classes" in out and "JPEGs copied unchanged" in out
    assert "val.beton: 27 images" in out
    assert (
        "img/s" in err
        and "MB/s" in err
        and "100%" in err
        and "images per class: amber 32, blue 32, cyan 32" in out
    )
    assert re.search(
        r"train.beton: about [\d.]+ MB and .+ s with 2 workers, estimated from 96 of 96 ",
        out,
    )
    status, out, err = call_program(
        "write_ffcv.py",
        f"--cfg.data_dir={pictures}",
        "--cfg.split=val",
        f"--cfg.write_path={tmp_path}/only.beton",
        "--cfg.num_workers=2",
    )
    assert status == 0 and (tmp_path / "only.beton").exists(), err
    status, _, err = call_program(
        "write_ffcv.py", f"--cfg.data_dir={pictures}", f"--cfg.write_path={tmp_path}/x.beton"
    )
    assert status == 2 and "cfg.write_path" in err.splitlines()[-1]


def test_bad_images_are_an_error_or_skipped_and_named(betons, tmp_path, train, call_program):
    """Two images are damaged. The error names one of them. With data.on_bad_sample=skip, on two
    processes, a line of the log names both."""
    from rsb_ffcv.beton import read_beton

    file, data = (
        read_beton(betons / "train.beton"),
        bytearray((betons / "train.beton").read_bytes()),
    )
    for sample in (5, 60):
        at = int(file.pointers[sample]) + int(file.sizes[sample]) // 2
        data[at : at + 30] = bytes(30)
    (tmp_path / "train.beton").write_bytes(data)
    shutil.copy(betons / "val.beton", tmp_path)
    more = {"training.epochs": 1, "lr.warmup_epochs": 0, "augment.repeats": 1}
    status, _, err = call_program(
        "train_imagenet.py", *options(tmp_path, tmp_path / "stopped", **more)
    )
    assert status == 2 and "Traceback" not in err
    assert re.search(
        r"error: .*train.beton: sample (5|60) is damaged: its bytes do not match their checksum; "
        r".*skip",
        err,
    )
    statuses, _, err = train(
        options(tmp_path, tmp_path / "skipped", **more, **{"data.on_bad_sample": "skip"}), 2
    ).wait()
    assert statuses == [0, 0], err
    (row,) = rows(tmp_path / "skipped")
    reason = "is damaged: its bytes do not match their checksum"
    assert row["skipped"] == 2 and row["skipped_samples"] == [
        f"sample 5 {reason}",
        f"sample 60 {reason}",
    ]


@pytest.mark.parametrize(
    "kind, text",
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
        (MemoryError, ""),
        (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
@pytest.mark.parametrize(
    "where, message",
    [
        (
            "train",
            "out of memory with training.batch_size=16 images of 32 px (.*); lower "
            "training.batch_size (and keep training.global_batch: ",
        ),
        (
            "evaluate",
            "out of memory with validation.batch_size=10 images of 32 px (.*); lower "
            "validation.batch_size or ",
        ),
        ("build", "out of memory with model.arch=resnet10t (.*); choose a smaller model"),
    ],
)
def test_out_of_memory_error_names_what_to_lower(
    betons, tmp_path, call_program, monkeypatch, kind, text, where, message
):
    from rsb_ffcv.training import build, evaluate, step

    def fail(*_, **__):
        raise kind(text)

    target, name = {
        "train": (step.TrainStep, "__call__"),
        "evaluate": (evaluate, "evaluate"),
        "build": (build, "model"),
    }[where]
    monkeypatch.setattr(target, name, fail)
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "run"))
    last = err.splitlines()[-1]
    assert (
        status == 2
        and "Traceback" not in err
        and re.search(re.escape(message).replace(r"\.\*", ".*"), last)
        and text in last
    ), err


@pytest.mark.long
def test_batch_larger_than_memory_is_one_error_line(betons, tmp_path, run_program):
    """The kernel refuses more than 8 GiB of address space to this process."""
    status, _, err = run_program(
        "train_imagenet.py",
        *options(
            betons,
            tmp_path / "run",
            **{
                "validation.resolution": 4096,
                "validation.batch_size": 1000,
                "training.epochs": 1,
                "lr.warmup_epochs": 0,
                "model.arch": "test_resnet",
            },
        ),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30,) * 2),
    )
    assert status == 2 and "Traceback" not in err, err
    assert re.search(
        r"out of memory with validation.batch_size=1000 images of 4096 px .*; lower validation",
        err.splitlines()[-1],
    ), err


def test_internal_error_keeps_its_traceback(betons, tmp_path, call_program, monkeypatch):
    from rsb_ffcv.training import step

    def fail(*_, **__):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(step.TrainStep, "__call__", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        call_program("train_imagenet.py", *options(betons, tmp_path / "run"))


def test_leftover_images_are_reported_once_and_the_bar_shows_the_rate(
    betons, tmp_path, call_program, monkeypatch
):
    monkeypatch.setattr("rsb_ffcv.reporting.console.has_terminal", lambda: True)
    more = {
        "training.batch_size": 80,
        "training.global_batch": 80,
        "augment.repeats": 1,
        "model.arch": "test_resnet",
    }
    status, out, err = call_program("train_imagenet.py", *options(betons, tmp_path / "run", **more))
    assert status == 0, err
    assert (
        out.count(
            "16 of 96 training images are left out of each epoch, because they do not fill a step "
            "of 80; which ones changes each epoch"
        )
        == 1
    )
    written = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["steps"] for row in written] == [1, 1, 1]
    shown = [float(rate) for rate in re.findall(r"img_s=([\d.e+]+)", err)]
    assert len(shown) >= 3
    for row in written:
        assert any(rate == pytest.approx(row["images_per_s"], rel=0.01, abs=1) for rate in shown), (
            shown,
            row["images_per_s"],
        )
    status, out, _ = call_program(
        "train_imagenet.py",
        *options(
            betons,
            tmp_path / "all",
            **{**more, "training.batch_size": 96, "training.global_batch": 96},
        ),
    )
    assert status == 0 and "left out" not in out


def test_signal_to_an_ended_child_is_ignored(monkeypatch):
    """With training.distributed=1, the parent forwards a signal to its children, one of which has
    ended."""
    import signal as signals

    from rsb_ffcv import training

    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    running = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    before = {number: signals.getsignal(number) for number in training.SIGNALS}
    try:
        received = training.forward_signals([done.pid, running.pid])
        os.kill(os.getpid(), signals.SIGTERM)
        assert running.wait(60) == -signals.SIGTERM and received == [signals.SIGTERM]
    finally:
        for number, handler in before.items():
            signals.signal(number, handler)
        running.kill()
