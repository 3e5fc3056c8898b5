"""The examples run as their heads say, with options for small images on the CPU."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import FastCollateMixup, create_dataset, create_loader

from rsb_ffcv import InputError, TrainLoader, normalize, read_beton
from tests.integration.runs import assert_same

ROOT = Path(__file__).parents[2]
TIMM_TRAIN = os.environ.get("RSB_TIMM_TRAIN", "")
SMALL = [
    "--resolution.min_res=32",
    "--resolution.max_res=32",
    "--validation.resolution=32",
    "--data.num_workers=2",
    "--training.batch_size=16",
    "--lr.warmup_epochs=1",
]


def run(*command: object, status: int = 0) -> tuple[str, str]:
    """Runs a command in the repository as after `pip install -e .`. Returns its output."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",  # more would wait for each other on busy cores
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def last_row(folder: Path) -> dict:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_a_folder_of_images_becomes_a_trained_model_in_two_commands(pictures, tmp_path):
    photos, out = tmp_path / "my photos", tmp_path / "runs"
    shutil.copytree(pictures / "train", photos)
    script = (ROOT / "examples/own_images.sh").read_text()
    assert len(re.findall(r"^python ", script, re.M)) == 2
    small = ["--model.arch=resnet10t", "--training.epochs=4", *SMALL]
    run("sh", "examples/own_images.sh", photos, out, *small)
    train, val = (read_beton(out / f"{split}.beton") for split in ("train", "val"))
    assert sorted(train.names() + val.names()) == sorted(
        str(path.relative_to(photos)) for path in photos.rglob("*.jpg")
    )
    row = last_row(out / "run")
    assert row["val_images"] == len(val) > 3 and row["top1"] > 60
    weights = torch.load(out / "run" / "final_weights.pt", weights_only=True)
    assert weights["fc.weight"].shape == (3, 512)  # the classes of the folder


def test_fine_tuning_starts_from_the_given_weights(betons, tmp_path):
    torch.manual_seed(0)
    published = timm.create_model("test_resnet", num_classes=1000).state_dict()
    save_file(published, tmp_path / "model.safetensors")
    out, _ = run(
        "python",
        "train_imagenet.py",
        "--config-file=examples/fine_tune.yaml",
        f"--data.train_dataset={betons}/train.beton",
        f"--data.val_dataset={betons}/val.beton",
        f"--logging.folder={tmp_path}/run",
        "--model.arch=test_resnet",
        "--model.pretrained=0",
        f"--checkpoint.warm_start={tmp_path}/model.safetensors",
        "--checkpoint.warm_start_head=new",
        "--model.freeze=1",
        "--training.epochs=6",
        *SMALL,
    )
    assert "left at their initialization: fc.weight, fc.bias" in out
    row = last_row(tmp_path / "run")
    assert row["val_images"] == 27 and row["top1"] > 60
    trained = torch.load(tmp_path / "run" / "final_weights.pt", weights_only=True)
    assert torch.equal(trained["conv1.0.weight"], published["conv1.0.weight"])  # frozen
    assert not torch.equal(trained["layer4.0.conv1.weight"], published["layer4.0.conv1.weight"])


@pytest.fixture
def loop(betons, tmp_path):
    """loop(checkpoint, options): runs the PyTorch loop and returns its output."""

    def call(name, *more):
        out, _ = run(
            *("python", "examples/pytorch_loop.py", betons / "train.beton", betons / "val.beton"),
            *("--checkpoint", tmp_path / name, "--epochs", 3, "--batch-size", 16, "--lr", 0.01),
            *("--resolution", 32, "--workers", 2, *more),
        )
        return out

    return call


@pytest.mark.long
def test_pytorch_loop_learns(loop, tmp_path):
    out = loop("whole.pt")
    top1 = [float(value) for value in re.findall(r"top-1 ([\d.]+) %", out)]
    assert len(top1) == 3 and top1[-1] > 60
    assert abs(round(0.27 * top1[-1]) - 0.27 * top1[-1]) < 0.01  # of 27 images
    assert torch.load(tmp_path / "whole.pt", weights_only=True)["step"] == 18


@pytest.mark.long
def test_pytorch_loop_continues_in_the_middle_of_an_epoch_with_the_same_bits(loop, tmp_path):
    loop("whole.pt")
    out = loop("parts.pt", "--max-minutes", 0)
    assert "out of time at step 1 of 18; run the command again\n" in out
    out = loop("parts.pt")
    assert "continuing at step 1 of 18\n" in out
    whole, parts = (
        torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "parts.pt")
    )
    assert_same(whole, parts)


@pytest.fixture(scope="module")
def adapter() -> Any:
    spec = importlib.util.spec_from_file_location("timm_train", ROOT / "examples/timm_train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMMON: dict[str, Any] = {
    "input_size": (3, 48, 48),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "device": torch.device("cpu"),
}


def test_timm_adapter_evaluates_the_images_of_timms_loader(adapter, pictures, betons):
    options = {**COMMON, "batch_size": 10, "crop_pct": 0.9, "interpolation": "bicubic"}
    theirs = create_loader(
        create_dataset("", root=str(pictures), split="val"), num_workers=0, **options
    )
    ours = adapter.Loader(adapter.Dataset("", root=str(betons), split="val"), **options)
    assert len(ours) == len(theirs) == 3
    for (images, targets), (expected, labels) in zip(ours, theirs, strict=True):
        assert torch.equal(targets, labels) and images.shape == expected.shape
        assert images.dtype == expected.dtype
        grey_levels = (images - expected).abs() * 255 * torch.tensor(options["std"])[:, None, None]
        assert grey_levels.max() < 2.01


def test_timm_adapter_trains_on_the_batches_of_the_loader(adapter, betons):
    dataset = adapter.Dataset("", root=str(betons), split="train", seed=3)
    mix = FastCollateMixup(mixup_alpha=0.4, label_smoothing=0.1, num_classes=3)
    options = {**COMMON, "batch_size": 16, "is_training": True, "interpolation": "random"}
    options |= {"scale": [0.3, 1.0], "color_jitter": 0.4, "hflip": 0.2}
    plain, mixed = (adapter.Loader(dataset, collate_fn=mixing, **options) for mixing in (None, mix))
    erased = adapter.Loader(dataset, re_prob=1.0, re_mode="const", **options)
    loader = TrainLoader(
        betons / "train.beton",
        batch_size=16,
        resolution=48,
        num_workers=1,
        seed=3,
        scale=(0.3, 1.0),
        flip_prob=0.2,
        color_jitter=(0.4, 0.4, 0.4, 0.0),
    )
    dataset.set_epoch(5)  # as train.py does
    np.random.seed(0)  # timm's mixup draws from this generator, and train.py seeds it
    assert len(plain) == 6
    mixed.mixup_enabled = True
    weights = []
    for batch, one, two, three in zip(loader.epoch(5), plain, mixed, erased, strict=True):
        expected = normalize(batch.images, COMMON["mean"], COMMON["std"])
        assert torch.equal(one[0], expected) and torch.equal(one[1], batch.labels)
        # timm's soft targets: image i is mixed with image n - 1 - i, which has another label or not
        own = torch.nn.functional.one_hot(batch.labels, 3) * 0.9 + 0.1 / 3
        lam = ((two[0] - expected.flip(0)).norm() / (expected - expected.flip(0)).norm()).item()
        assert torch.allclose(two[1], lam * own + (1 - lam) * own.flip(0), atol=1e-4)
        weights.append(lam)
        gone = (three[0] == 0).all(1, keepdim=True)
        assert torch.equal(three[0], torch.where(gone, 0, expected))
        assert (gone.float().mean((1, 2, 3)) > 0.015).all()
    assert len({round(lam, 3) for lam in weights}) == 6
    mixed.mixup_enabled = False
    (images, targets), (expected, labels) = next(iter(mixed)), next(iter(plain))
    assert torch.equal(images, expected) and torch.equal(targets.argmax(1), labels)
    assert targets.shape == (16, 3) and not mixed.mixup_enabled


@pytest.mark.parametrize("world", [2, 4])
def test_timm_adapter_gives_each_process_as_many_evaluation_images(
    adapter, betons, monkeypatch, world
):
    """As timm's sampler, which repeats the first images."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    dataset, seen = adapter.Dataset("", root=str(betons), split="val"), []
    for rank in range(world):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        loader = adapter.Loader(dataset, batch_size=5, distributed=True, **COMMON)
        batches = [targets for _, targets in loader]
        assert len(batches) == len(loader)
        seen.append(torch.cat(batches))
    assert {len(targets) for targets in seen} == {-(-27 // world)}
    labels = read_beton(betons / "val.beton").labels
    padded = np.concatenate([labels, labels])[: world * len(seen[0])]
    assert torch.stack(seen, 1).flatten().tolist() == padded.tolist()


@pytest.mark.parametrize(
    "option", [{"vflip": 0.5}, {"no_aug": True}, {"input_size": (1, 48, 48)}, {"re_split": True}]
)
def test_timm_adapter_refuses_what_it_cannot_do(adapter, betons, option):
    dataset = adapter.Dataset("", root=str(betons), split="train")
    with pytest.raises(InputError, match=next(iter(option))):
        adapter.Loader(dataset, **{**COMMON, "batch_size": 16, "is_training": True, **option})
    with pytest.raises(InputError, match="class_map='a.txt'"):
        adapter.Dataset("", root=str(betons), split="train", class_map="a.txt")


def test_timm_adapter_needs_the_path_of_train_py():
    _, err = run("python", "examples/timm_train.py", "--model", "resnet18", status=1)
    assert err == "error: the first argument must be the path of timm's train.py\n"


@pytest.mark.long
@pytest.mark.skipif(not TIMM_TRAIN, reason="needs timm's train.py: RSB_TIMM_TRAIN=<its path>")
@pytest.mark.parametrize("prefetcher", [True, False])
def test_timms_train_py_learns_with_this_loader(betons, tmp_path, prefetcher):
    command = ["python", "examples/timm_train.py", TIMM_TRAIN, "--data-dir", betons, "--val-split"]
    command += ["val", "--model", "test_resnet", "--num-classes", 3, "--input-size", 3, 32, 32]
    command += ["-b", 16, "-vb", 10, "--epochs", 4, "--opt", "adamw", "--lr", 0.003, "--device"]
    command += ["cpu", "--warmup-epochs", 0, "--workers", 2, "--aa", "rand-m3-mstd0.5-inc1"]
    command += ["--reprob", 0.25, "--mixup", 0.2, "--mixup-off-epoch", 2, "--model-ema"]
    command += ["--model-ema-decay", 0.9, "--output", tmp_path, "--experiment", "run"]
    command += [] if prefetcher else ["--no-prefetcher"]
    out, err = run(*command)
    results = json.loads(out.partition("--result\n")[2])
    assert len(results) == 4 and max(row["validation"]["top1"] for row in results) > 60
    assert "Train: 3 [   5/6 (100%)]" in err and "Test: [   2/2]" in err  # 6 and 3 batches
    if prefetcher:
        return
    _, err = run(*command, "--vflip", 0.5, "--experiment", "refused", status=1)
    assert err.splitlines()[-1].startswith("error: vflip=0.5: this loader cannot do it")
