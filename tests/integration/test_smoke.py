"""smoke runs every recipe with all its phases, and its checks notice what differs from it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rsb_ffcv.commands import smoke as command
from rsb_ffcv.commands.shorten import shorten
from rsb_ffcv.commands.smoke import check, learning_rates, phases, smoke
from rsb_ffcv.config.train import read_config
from rsb_ffcv.learning.loss import Loss
from rsb_ffcv.reporting.log import read_metrics, write_metrics
from rsb_ffcv.training import build
from rsb_ffcv.training.plan import Plan

ROOT = Path(__file__).parents[2]
IN_BOTH_SUITES = ("a2_300", "sgd_100_swa")
FEW = ("--training.epochs=2", "--lr.warmup_epochs=1")


def arguments(betons, folder, recipe: str) -> list[str]:
    return [
        f"--config-file={ROOT}/rsb_configs/{recipe}.yaml",
        f"--data.train_dataset={betons}/train.beton",
        f"--data.val_dataset={betons}/val.beton",
        "--data.num_workers=2",
        "--model.num_classes=0",
        "--checkpoint.warm_start=",
        f"--logging.folder={folder}/run",
        "--compute.device=cpu",
        "--compute.precision=fp32",
        "--compute.threads=1",
    ]


def shortened(c, folder: Path):
    return shorten(
        c,
        images=96,
        available=96,
        num_classes=c.model.num_classes,
        train=folder / "train.beton",
        val=folder / "val.beton",
        folder=folder / "run",
    )


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(path.stem, marks=[] if path.stem in IN_BOTH_SUITES else pytest.mark.long)
        for path in sorted((ROOT / "rsb_configs").glob("*.yaml"))
    ],
)
def test_every_recipe_passes_through_its_phases(recipe, betons, call_program, tmp_path):
    given = arguments(betons, tmp_path, recipe)
    status, out, err = call_program("train_imagenet.py", "smoke", *given)
    assert status == 0, out + err
    assert "\nall " in out and "\nfail" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["run_smoke"]  # not the run's folder
    c, rows = read_config(None, given), read_metrics(tmp_path / "run_smoke" / "run")
    # Without the code that shortens: the recipe's own figures
    lrs = [row[key] for row in rows for key in ("lr_first", "lr")]
    assert max(lrs) <= c.lr.lr and max(lrs) > 0.9 * c.lr.lr
    assert lrs[0] == pytest.approx(c.lr.warmup_lr if c.lr.warmup_epochs else lrs[0])
    assert lrs[-1] < 0.15 * c.lr.lr and (not c.swa.epochs or lrs[-1] == c.swa.lr)
    groups = (c.training.global_batch or c.training.batch_size) / c.training.batch_size
    mixes = bool(c.mix.mixup or c.mix.cutmix)
    assert {row["groups"] / row["steps"] for row in rows} == {groups}
    assert (rows[0]["mixed"] > 0) == mixes
    assert (rows[-1]["mixed"] > 0) == (mixes and not c.mix.off_epochs)
    assert all((row["erased"] > 0) == bool(c.augment.erase_prob) for row in rows)
    assert all(("ema_top1" in row) == bool(c.ema.decay) for row in rows)
    assert ("swa_top1" in rows[0], "swa_top1" in rows[-1]) == (False, bool(c.swa.epochs))
    assert (rows[0]["resolution"] < rows[-1]["resolution"]) == (
        c.resolution.min_res < c.resolution.max_res
    )


@pytest.fixture(scope="module")
def done(betons, tmp_path_factory):
    """The recipe and the folder of a smoke with SWA, EMA, erasing, epochs without mixing, and two
    resolutions."""
    folder = tmp_path_factory.mktemp("smoke")
    options = {
        "ema.decay": 0.999,
        "augment.erase_prob": 0.25,
        "mix.off_epochs": 5,
        "lr.warmup_epochs": 5,
        "resolution.min_res": 160,
        "resolution.start_ramp": 39,
        "resolution.end_ramp": 40,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    c = read_config(None, [*arguments(betons, folder, "sgd_100_swa"), *flags])
    assert smoke(c) == 0
    return c, folder / "run_smoke"


@pytest.mark.parametrize(
    "epoch, figure, value, name",
    [
        (0, "lr_first", 0.001, "learning rate, start (epoch 1)"),
        (0, "lr", 0.1, "learning rate, last step of the warm-up (epoch 1)"),
        (1, "lr_first", 0.09, "learning rate, cosine schedule (epoch 2)"),
        (2, "lr", 0.099, "first and last learning rates of all epochs"),
        (-1, "lr", 0.01, "learning rate, end (epoch 9)"),
        (3, "groups", 16, "groups of a step"),
        (3, "images", 80, "images of a step"),
        (-1, "resolution", 40, "resolution"),
        (0, "loss", "bce", "loss"),
        (-1, "mixed", 0.5, "epochs with mixing"),
        (1, "mixed", 0.5, "mixed images, share"),
        (None, "own_weight", 0.9, "weight of an image's own label"),
        (1, "erased", 0.4, "erased pixels, share"),
        (2, "train_loss", None, "epochs with a finite training loss"),
        (-1, "val_loss", float("nan"), "epochs with a result of the weights"),
        (-1, "ema_val_loss", None, "epochs with a result of the EMA"),
        (0, "swa_val_loss", 1.0, "epochs with a result of SWA"),
        (4, "epoch", 5, "epochs in the log"),
    ],
)
def test_a_changed_figure_of_the_log_fails_its_check(done, tmp_path, epoch, figure, value, name):
    c, folder = done
    shutil.copytree(folder, tmp_path / "copy")
    short = shortened(c, tmp_path / "copy")
    assert all(line.ok for line in check(c, short))
    rows = read_metrics(tmp_path / "copy" / "run")
    for row in rows if epoch is None else [rows[epoch]]:
        assert row.get(figure) != value
        row[figure] = value
    write_metrics(tmp_path / "copy" / "run", rows)
    assert name in [line.name for line in check(c, short) if not line.ok]


def test_missing_weights_and_a_missing_resume_fail(done, tmp_path):
    c, folder = done
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "run" / "final_weights_swa.pt").unlink()
    (tmp_path / "copy" / "run" / "training.log").write_text("")
    failed = [line.name for line in check(c, shortened(c, tmp_path / "copy")) if not line.ok]
    assert failed == ["weights at the end", "resumed after step"]


@pytest.mark.long
def test_a_program_that_does_not_erase_fails(betons, call_program, tmp_path, monkeypatch):
    """A second smoke replaces the folder of the first."""
    made = build.batch_transform
    monkeypatch.setattr(build, "batch_transform", lambda c: replace(made(c), erase_prob=0.0))
    (tmp_path / "run_smoke").mkdir()
    (tmp_path / "run_smoke" / command.MARK).write_text("")
    (tmp_path / "run_smoke" / "of_the_first").mkdir()
    given = arguments(betons, tmp_path, "a2_300")
    status, out, _ = call_program("train_imagenet.py", "smoke", *given, *FEW)
    assert status == 1 and "1 of 19 checks failed" in out
    (line,) = [line for line in out.splitlines() if line.startswith("fail")]
    assert line.startswith("fail  erased pixels, share") and line.endswith(" 0.0000")
    assert not (tmp_path / "run_smoke" / "of_the_first").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"training.epochs": 1, "lr.warmup_epochs": 0},
        {"training.epochs": 3, "lr.warmup_epochs": 0.5, "mix.off_epochs": 1},
        {"lr.warmup_epochs": 7.5, "lr.lr_schedule_type": "cosine_spanning", "lr.from_epoch": 20},
        {"lr.lr_schedule_type": "constant", "mix.off_epochs": 90},
        {"lr.lr_schedule_type": "polynomial", "lr.power": 2, "lr.min_lr": 0.001},
        {"lr.lr_schedule_type": "cyclic", "lr.lr_peak_epoch": 18, "lr.warmup_epochs": 0},
        {"lr.lr_schedule_type": "cyclic", "lr.lr_peak_epoch": 0, "lr.warmup_epochs": 0},
        {"lr.lr_schedule_type": "step", "lr.step_length": 30, "lr.warmup_epochs": 0},
        {
            "lr.lr_schedule_type": "step",
            "lr.step_length": 33,
            "lr.warmup_epochs": 0,
            "mix.off_epochs": 50,
        },
        {"swa.epochs": 24, "swa.lr": 0.0005, "swa.anneal_epochs": 0},
        {"swa.epochs": 40, "swa.lr": 0.0005, "swa.anneal_epochs": 40, "mix.off_epochs": 60},
        {"resolution.min_res": 128, "resolution.start_ramp": 10, "resolution.end_ramp": 60},
        {
            "resolution.min_res": 96,
            "resolution.start_ramp": 0,
            "resolution.end_ramp": 99,
            "mix.off_epochs": 40,
        },
    ],
)
def test_a_short_plan_has_the_phases_of_the_recipe(betons, tmp_path, options):
    """Of any schedule: the figures that the plan gives a run are those that are expected."""
    base = {"training.epochs": 100, "lr.warmup_epochs": 5, **options}
    flags = [f"--{name}={value}" for name, value in base.items()]
    c = read_config(None, [*arguments(betons, tmp_path, "sgd_100_warmup"), *flags])
    short = shortened(c, tmp_path)
    training = short.config.training
    plan = Plan(short.config, short.steps)
    assert plan.epochs <= 15
    rows = [
        {
            "epoch": epoch.number,
            "steps": short.steps,
            "lr_first": epoch.lr(0),
            "lr": epoch.lr(short.steps - 1),
            "groups": short.steps,
            "images": short.steps * training.batch_size,
            "resolution": epoch.resolution,
            "loss": Loss(kind=training.loss).name(epoch.mixing),
            "mixed": float(epoch.mixing),
        }
        for epoch in (plan[number] for number in range(plan.epochs))
    ]
    checks = [*learning_rates(c, short, rows), *phases(c, short, rows)]
    assert not [line for line in checks if not line.ok]
    original = Plan(c, 100)
    kinds = {
        (epoch.resolution, epoch.mixing, epoch.averaging)
        for epoch in (original[number] for number in range(original.epochs))
    }
    short_kinds = {
        (epoch.resolution, epoch.mixing, epoch.averaging)
        for epoch in (plan[number] for number in range(plan.epochs))
    }
    assert len(short_kinds) == len(kinds)


def test_the_horizon_of_the_ema_is_the_same_share_of_the_run(betons, tmp_path):
    for more in ([], ["--ema.per_images=2048"]):
        c = read_config(None, [*arguments(betons, tmp_path, "a2_300"), *more])
        short = shorten(
            c,
            images=4096,
            available=96,
            num_classes=0,
            train=tmp_path,
            val=tmp_path,
            folder=tmp_path,
        )
        step = short.config.training.global_batch
        updates = short.steps * short.config.training.epochs
        decay = short.config.ema.decay ** (step / (short.config.ema.per_images or step))
        # 600 updates of the recipe
        assert decay**updates == pytest.approx(0.9999**600, rel=1e-2), more


def test_without_files_images_are_drawn(call_program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call_program(
        "train_imagenet.py",
        "smoke",
        f"--config-file={ROOT}/rsb_configs/continue_300to600.yaml",
        *FEW,
        "--compute.device=cpu",
        "--compute.threads=1",
    )
    assert status == 0, out + err
    assert "smoke draws images" in out and out.count("not checked: ") == 1
    assert "not checked: checkpoint.warm_start=runs/a2_300/final_weights.pt\n" in out
    written = json.loads(Path("runs/continue_300to600_smoke/run/config.json").read_text())
    assert written["training"]["global_batch"] == 16 * written["training"]["batch_size"]


def test_files_that_do_not_fit_are_refused(betons, call_program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = arguments(betons, tmp_path, "a2_300")

    def refusal(*more):
        status, _, err = call_program("train_imagenet.py", "smoke", *given, *more)
        assert status == 2 and len(err.splitlines()) == 1, err
        return err

    assert "model.num_classes=1000: data.train_dataset=" in refusal("--model.num_classes=1000")
    assert "data.val_dataset=missing.beton: no such file" in refusal(
        "--data.val_dataset=missing.beton"
    )
    assert "checkpoint.warm_start=w.pt" in refusal("--checkpoint.warm_start=w.pt")
    assert "has only 96 images, and two steps of 32 groups of 2 images take 128" in refusal(
        "--training.global_batch=8192"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE=2: smoke runs in one process" in refusal()
    monkeypatch.delenv("WORLD_SIZE")
    (tmp_path / "run_smoke").rename(tmp_path / "other_smoke")
    (tmp_path / "other_smoke" / command.MARK).unlink()
    assert "other_smoke: exists, and smoke did not make it" in refusal("--logging.folder=other")
    recipe = tmp_path / "one.yaml"
    recipe.write_text(f"data: {{train_dataset: {betons}/train.beton, val_dataset: gone.beton}}\n")
    status, _, err = call_program("train_imagenet.py", "smoke", f"--config-file={recipe}")
    assert status == 2 and "data.val_dataset=gone.beton: no such file, and the other" in err
