"""The two programs as a user runs them: a whole run, a killed and resumed one, several processes, and bad input."""
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TIMINGS = {"images_per_s", "seconds", "data_wait_s", "peak_memory_mb", "val_seconds"}


def options(betons, folder, **more):
    """A small run with every A2 ingredient: 3 epochs of 3 steps of 2 x 16 images, resnet10t at 32 px."""
    flags = {"data.train_dataset": betons / "train.beton", "data.val_dataset": betons / "val.beton",
             "data.num_workers": 2, "data.in_memory": 1, "logging.folder": folder, "model.arch": "resnet10t",
             "model.drop_path": 0.1, "resolution.min_res": 32, "resolution.max_res": 32,
             "augment.rand_augment": "rand-m7-mstd0.5-inc1", "augment.color_jitter": 0.2, "augment.repeats": 2,
             "data.order": "quasi_random", "augment.erase_prob": 0.25, "augment.erase_mode": "pixel",
             "mix.mixup": 0.2, "mix.cutmix": 1.0, "mix.off_epochs": 1, "lr.lr": 0.005, "lr.lr_schedule_type": "cosine",
             "lr.warmup_epochs": 1, "lr.warmup_lr": 0.00005, "training.epochs": 3, "training.batch_size": 16,
             "training.global_batch": 32, "training.optimizer": "lamb", "training.weight_decay": 0.02,
             "training.grad_clip": 1.0, "ema.decay": 0.9, "ema.warmup": 1, "validation.batch_size": 10,
             "validation.resolution": 32, "compute.device": "cpu", "compute.precision": "fp32", "compute.threads": 1, **more}
    return [f"--{name}={value}" for name, value in flags.items()]


def rows(folder):
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS}
            for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same(a, b, where="state"):
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


@pytest.fixture(scope="module")
def finished(betons, tmp_path_factory):
    """A run from beginning to end: (folder, stdout)."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = subprocess.run([sys.executable, "train_imagenet.py", *options(betons, folder)], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def test_a_run_says_what_it_uses_and_leaves_what_it_promises(finished):
    folder, out, err = finished
    first = out.splitlines()[0]
    for part in ("device cpu", "precision fp32", "compile off", "channels_last on", "1 process"):
        assert part in first
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in written] == [0, 1, 2]
    for row in written:
        assert {"train_loss", "top1", "top5", "ema_top1", "ema_top5", "lr", "images_per_s", "data_wait_s",
                "peak_memory_mb"} <= row.keys()
        assert row["val_images"] == 27 and row["steps"] == 3
        assert 0 <= row["data_wait_s"] <= row["seconds"] and row["images_per_s"] > 0 and row["peak_memory_mb"] > 50
    assert [json.loads(line) for line in out.splitlines() if line.startswith("{")] == written
    for part in ("loss=", "top1=", "lr=", "img_s="):
        assert part in err
    assert (folder / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text())["lr"]["lr"] == 0.005
    assert {"top-1 (top-5), raw weights", "waiting for data", "training images/s, median"} <= {
        line.split("  ")[0].strip() for line in out.splitlines()}
    assert not [path for path in folder.iterdir() if path.name.endswith(".part")]
    for name in ("final_weights.pt", "final_weights_ema.pt"):
        assert not any(key.startswith(("module.", "_orig_mod.")) for key in torch.load(folder / name, weights_only=True))


def test_a_killed_run_started_again_is_the_run_that_was_never_killed(betons, finished, tmp_path, run_program):
    command = [sys.executable, "train_imagenet.py", *options(betons, tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith('{"epoch": 0'):
            time.sleep(0.3)  # into the next epoch
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    assert state(tmp_path / "run")["next_epoch"] < 3
    status, out, err = run_program(*command[1:])
    assert status == 0, err
    assert "resuming" in out
    assert_same(state(tmp_path / "run"), state(finished[0]))
    assert rows(tmp_path / "run") == rows(finished[0])


def test_a_finished_run_started_again_changes_nothing(betons, finished, run_program):
    folder = finished[0]
    before = state(folder), rows(folder)
    status, out, err = run_program("train_imagenet.py", *options(betons, folder))
    assert status == 0, err
    assert_same(state(folder), before[0])
    assert rows(folder) == before[1] and "best top-1" in out


def test_eval_only_gives_the_numbers_of_the_run(betons, finished, call_program):
    status, out, err = call_program("train_imagenet.py", *options(betons, finished[0], **{"training.eval_only": 1}))
    assert status == 0, err
    result, last = json.loads(out.splitlines()[-1]), rows(finished[0])[-1]
    assert {key: result[key] for key in ("top1", "top5", "ema_top1")} == {key: last[key] for key in
                                                                      ("top1", "top5", "ema_top1")}


def test_two_processes_train_as_one_does(betons, tmp_path, run_program, call_program):
    """torchrun and dist.world_size, 2 x 16 against 16 accumulated twice. SGD without clip sees a gradient of the wrong
    scale, which LAMB does not; batch-norm statistics of evaluation differ, those of training do not."""
    sgd = {"training.optimizer": "sgd", "training.grad_clip": 0, "lr.lr": 0.2, "model.drop_path": 0, "training.epochs": 2,
           "mix.off_epochs": 0}
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "alone", **sgd))
    assert status == 0, err
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517", "train_imagenet.py"]
    spawned = {"training.distributed": 1, "dist.world_size": 2, "dist.port": 29519}
    for name, start, more in (("torchrun", torchrun, {}), ("spawn", ["train_imagenet.py"], spawned)):
        status, out, err = run_program(*start, *options(betons, tmp_path / name, **sgd, **more))
        assert status == 0, err
        assert "2 processes" in out and out.count('{"epoch": 0') == 1
        for mine, alone in zip(rows(tmp_path / name), rows(tmp_path / "alone"), strict=True):
            assert mine["val_images"] == 27
            assert mine["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-5)
    weights = [state(tmp_path / name)["model"] for name in ("alone", "torchrun")]
    for key, tensor in weights[0].items():
        if "running" not in key and tensor.is_floating_point():
            torch.testing.assert_close(weights[1][key], tensor, rtol=1e-3, atol=1e-4)
    # What was logged is what the checkpoint holds, whichever process evaluated which image
    status, out, err = call_program("train_imagenet.py", *options(betons, tmp_path / "torchrun", **sgd,
                                                                  **{"training.eval_only": 1}))
    assert status == 0, err
    result, last = json.loads(out.splitlines()[-1]), rows(tmp_path / "torchrun")[-1]
    for key in ("top1", "top5", "ema_top1", "val_loss", "ema_val_loss"):
        assert result[key] == pytest.approx(last[key], rel=1e-5), key


def test_a_compiled_run_saves_plain_weights_and_gives_the_same_losses(betons, finished, tmp_path, run_program):
    status, out, err = run_program("train_imagenet.py", *options(betons, tmp_path / "run", **{"compute.compile": 1}),
                                   timeout=500)
    assert status == 0, err
    assert "compile on" in out.splitlines()[0]
    assert state(tmp_path / "run")["model"].keys() == state(finished[0])["model"].keys()
    assert rows(tmp_path / "run")[0]["train_loss"] == pytest.approx(rows(finished[0])[0]["train_loss"], rel=1e-3)


@pytest.mark.parametrize("more, message", [
    ({"lr.lr": 0.004}, "lr.lr: 0.005 there, 0.004 now"), ({"checkpoint.resume": "never"}, "checkpoint.resume=never")])
def test_a_folder_with_another_run_is_refused(betons, finished, call_program, more, message):
    status, _, err = call_program("train_imagenet.py", *options(betons, finished[0], **more))
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize("damage", ["truncated", "empty", "random", "weights only"])
def test_a_damaged_checkpoint_is_named(betons, finished, tmp_path, call_program, damage):
    (tmp_path / "run").mkdir()
    whole = (finished[0] / "checkpoint.pt").read_bytes()
    content = {"truncated": whole[:len(whole) // 2], "empty": b"", "random": bytes(range(256)) * 9,
               "weights only": (finished[0] / "final_weights.pt").read_bytes()}[damage]
    (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "run"))
    assert status == 2 and "checkpoint.pt: not a" in err.splitlines()[-1]


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_log_that_does_not_match_the_checkpoint_is_named(betons, finished, tmp_path, call_program, damage):
    shutil.copytree(finished[0], tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    log.unlink() if damage == "missing" else log.write_text(log.read_text()[:-5])
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "run"))
    assert status == 2 and "metrics.jsonl" in err.splitlines()[-1]


def test_another_number_of_processes_without_the_same_global_batch_is_refused(betons, finished, call_program):
    status, _, err = call_program("train_imagenet.py", *options(betons, finished[0], **{"training.global_batch": 16}))
    assert status == 2 and "training.global_batch: 32 there, 16 now" in err.splitlines()[-1]


@pytest.mark.parametrize("damage", ["truncated", "not a .beton"])
def test_a_bad_file_ends_the_program_before_anything_is_written(betons, tmp_path, call_program, damage):
    path = tmp_path / "train.beton"
    path.write_bytes((betons / "train.beton").read_bytes()[:-1000] if damage == "truncated" else b"hello" * 100)
    status, _, err = call_program("train_imagenet.py",
                                 *options(betons, tmp_path / "run", **{"data.train_dataset": path}))
    assert status == 2 and str(path) in err.splitlines()[-1] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("more, message", [
    ({"model.num_classes": 10}, "model.num_classes=10"), ({"training.batch_size": 200, "training.global_batch": 0}, "holds 96"),
    ({"data.num_workers": 0}, "data.num_workers='0'"), ({"logging.folder": "/dev/null/run"}, "logging.folder=/dev/null/run"),
    ({"compute.precision": "fp16"}, "compute.precision=fp16"), ({"model.arch": "resnet5"}, "model.arch=resnet5"),
    ({"training.optimizer": "lam"}, "training.optimizer=lam"), ({"augment.rand_augment": "rand-x"}, "augment.rand_augment="),
    ({"validation.resolution": 8, "model.arch": "vit_tiny_patch16_224"}, "resolution.min_res=32"),
    ({"training.eval_only": 1}, "training.eval_only=1")])
def test_wrong_settings_end_the_program_with_one_line(betons, tmp_path, call_program, more, message):
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "run", **more))
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_and_absent_is_named(betons, tmp_path, call_program):
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "run", **{"compute.device": "cuda"}))
    assert status == 2 and "compute.device=cuda" in err.splitlines()[-1] and not (tmp_path / "run").exists()


def limit_file_size(size):
    """The kernel then refuses to let any file grow past `size` bytes, as a full disk would."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_while_writing_leaves_no_half_file(pictures, tmp_path, run_program):
    status, _, err = run_program("write_ffcv.py", f"--cfg.data_dir={pictures}", f"--cfg.write_path={tmp_path}/out",
                                 "--cfg.num_workers=2", preexec_fn=limit_file_size(8_500_000))
    assert status == 2 and "train.beton: cannot be written" in err.splitlines()[-1]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_while_training_leaves_the_last_checkpoint_whole(betons, finished, tmp_path, run_program):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    status, _, err = run_program("train_imagenet.py", *options(betons, folder), preexec_fn=limit_file_size(1_000_000))
    assert status == 2 and "checkpoint.pt: cannot be written" in err.splitlines()[-1]
    assert not [path for path in folder.iterdir() if "checkpoint" in path.name]


def test_an_unreadable_picture_does_not_hang_the_writer(pictures, tmp_path, run_program):
    for split in ("train", "val"):
        (tmp_path / "in" / split).mkdir(parents=True)
        for name in ("amber", "blue", "cyan"):
            os.symlink(pictures / split / name, tmp_path / "in" / split / name)
    bad = tmp_path / "in" / "train" / "red"
    bad.mkdir()
    (tmp_path / "in" / "val" / "red").mkdir()
    (bad / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    os.symlink(pictures / "val" / "blue" / "1.jpg", tmp_path / "in" / "val" / "red" / "1.jpg")
    status, _, err = run_program("write_ffcv.py", f"--cfg.data_dir={tmp_path}/in", f"--cfg.write_path={tmp_path}/out",
                                 "--cfg.num_workers=2", timeout=60)
    assert status == 2 and "broken.jpg: not a readable picture" in err.splitlines()[-1]
    assert list((tmp_path / "out").iterdir()) == []


def test_the_writer_shows_progress_and_a_line_for_each_file(pictures, tmp_path, call_program):
    status, out, err = call_program("write_ffcv.py", f"--cfg.data_dir={pictures}", f"--cfg.write_path={tmp_path}/out",
                                   "--cfg.num_workers=2", "--cfg.max_resolution=60")
    assert status == 0, err
    assert "train.beton: 96 images, 3 classes" in out and "val.beton: 27 images" in out
    assert "img/s" in err and "100%" in err
    status, out, err = call_program("write_ffcv.py", f"--cfg.data_dir={pictures}", "--cfg.split=val",
                                   f"--cfg.write_path={tmp_path}/only.beton", "--cfg.num_workers=2")
    assert status == 0 and (tmp_path / "only.beton").exists(), err
    status, _, err = call_program("write_ffcv.py", f"--cfg.data_dir={pictures}", f"--cfg.write_path={tmp_path}/x.beton")
    assert status == 2 and "cfg.write_path" in err.splitlines()[-1]


def test_bad_images_end_a_run_or_are_skipped_and_named(betons, tmp_path):
    """Two damaged images: an error that names one; with data.on_bad_sample=skip, on two processes, a line in the log."""
    from rsb_ffcv.beton import read_beton

    file, data = read_beton(betons / "train.beton"), bytearray((betons / "train.beton").read_bytes())
    for sample in (5, 60):
        at = int(file.pointers[sample]) + int(file.sizes[sample]) // 2
        data[at:at + 30] = bytes(30)
    (tmp_path / "train.beton").write_bytes(data)
    shutil.copy(betons / "val.beton", tmp_path)
    more = {"training.epochs": 1, "lr.warmup_epochs": 0, "augment.repeats": 1}
    done = subprocess.run([sys.executable, "train_imagenet.py", *options(tmp_path, tmp_path / "stopped", **more)], cwd=ROOT,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"error: .*train.beton: sample (5|60) is damaged: its bytes do not match their checksum; .*skip", done.stderr)
    skipping = options(tmp_path, tmp_path / "skipped", **more, **{
        "data.on_bad_sample": "skip", "training.distributed": 1, "dist.world_size": 2, "dist.port": 12399})
    done = subprocess.run([sys.executable, "train_imagenet.py", *skipping], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (row,) = rows(tmp_path / "skipped")
    reason = "is damaged: its bytes do not match their checksum"
    assert row["skipped"] == 2 and row["skipped_samples"] == [f"sample 5 {reason}", f"sample 60 {reason}"]
