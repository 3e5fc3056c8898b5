"""An invalid option is an error with its name, value, file and the nearest valid name."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import timm

from rsb_ffcv import InputError, __version__, option_names
from rsb_ffcv.commands import train, write
from rsb_ffcv.config.options import as_dict, config_files
from rsb_ffcv.config.train import RECIPE, read_config, read_recipe
from rsb_ffcv.reporting import log
from rsb_ffcv.training.facts import changes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def given(betons, tmp_path):
    """The options that have no default."""
    return [
        f"--data.train_dataset={betons}/train.beton",
        f"--data.val_dataset={betons}/val.beton",
        "--data.num_workers=2",
        "--data.in_memory=0",
        f"--logging.folder={tmp_path}/run",
    ]


def read(given, *more):
    return read_config("", [*given, *more])


def test_shared_defaults_equal_ffcv_imagenet(given):
    c = read(given)
    assert (
        c.lr.lr,
        c.lr.lr_schedule_type,
        c.lr.lr_peak_epoch,
        c.lr.step_ratio,
        c.lr.step_length,
    ) == (0.5, "cyclic", 2, 0.1, 30)
    assert (
        c.training.batch_size,
        c.training.optimizer,
        c.training.momentum,
        c.training.weight_decay,
        c.training.epochs,
        c.training.label_smoothing,
    ) == (512, "sgd", 0.9, 4e-5, 30, 0.1)
    assert (c.validation.batch_size, c.validation.resolution, c.validation.lr_tta) == (
        512,
        224,
        True,
    )
    assert (c.resolution.min_res, c.resolution.max_res) == (160, 160) and c.model.arch == "resnet50"


def test_off_and_on_are_read_from_yaml_without_quotes(given, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("health:\n  chance: off\n  average: 'off'\ncompute:\n  compile: on\n")
    c = read(given, f"--config-file={recipe}")
    assert (c.health.chance, c.health.average, c.compute.compile) == ("off", "off", "1")


def test_flags_override_files_and_later_files_earlier_ones(given, tmp_path):
    for name, lr in (("a", "1e-3"), ("b", "2e-3")):
        (tmp_path / f"{name}.yaml").write_text(f"lr:\n  lr: {lr}\ntraining:\n  epochs: 7\n")
    files = [f"--config-file={tmp_path}/a.yaml", f"--config-file={tmp_path}/b.yaml"]
    assert read(given, *files).lr.lr == 2e-3
    c = read(given, *files, "--lr.lr=3e-3")
    assert (c.lr.lr, c.training.epochs) == (3e-3, 7)


def test_recipe_extends_another(given, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("lr:\n  lr: 1.0\n  min_lr: 0.1\ntraining:\n  epochs: 7\n")
    (tmp_path / "sub" / "middle.yaml").write_text("extends: ../base.yaml\nlr:\n  lr: 2.0\n")
    (tmp_path / "top.yaml").write_text("training:\n  seed: 5\nextends: sub/middle.yaml\n")
    c = read(given, f"--config-file={tmp_path}/top.yaml", "--lr.power=3")
    assert (c.lr.lr, c.lr.min_lr, c.lr.power) == (2.0, 0.1, 3.0)
    assert (c.training.epochs, c.training.seed) == (7, 5)


def test_resolved_config_json_is_a_recipe(given, tmp_path):
    c = read(given, f"--config-file={ROOT}/rsb_configs/paper_a3_100.yaml", "--ema.decay=0.99999")
    lineage = {"lineage": [{"checkpoint": "a", "step": 3}]}  # which a branch has in addition
    log.write_json(tmp_path / "config.json", as_dict(c) | lineage)
    assert read_config("", [f"--config-file={tmp_path}/config.json"]) == c


def test_installed_recipes_are_found_in_any_folder(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "rsb_configs/a2_600.yaml"
    expected = read([f"--config-file={ROOT}/{name}", *given])
    assert expected.training.epochs == 600
    assert read([f"--config-file={name}", *given]) == expected
    (tmp_path / "sub").mkdir()
    own = tmp_path / "sub" / "own.yaml"
    own.write_text(f"extends: {name}\nema: {{decay: 0.5}}")
    assert as_dict(read([f"--config-file={own}", *given])) == as_dict(expected) | {
        "ema": as_dict(expected)["ema"] | {"decay": 0.5}
    }
    assert config_files(["--config-file", name, "--config-file=a2_600.yaml"]) == [
        f"{ROOT}/{name}",
        "a2_600.yaml",
    ]
    for folder, epochs in ((tmp_path / "sub", 5), (tmp_path, 6)):
        (folder / "rsb_configs").mkdir()
        (folder / name).write_text(f"training: {{epochs: {epochs}}}")
    assert read([f"--config-file={own}", *given]).training.epochs == 5
    assert read([f"--config-file={name}", *given]).training.epochs == 6
    for wrong in ("rsb_configs/a2.yaml", "a2_300.yaml", "sub/rsb_configs/a2_300.yaml"):
        message = f"--config-file={wrong}: cannot be read .*recipes are in {ROOT}/rsb_configs"
        with pytest.raises(InputError, match=message):
            read([f"--config-file={wrong}", *given])


@pytest.mark.parametrize(
    "text, message",
    [
        ("extends: nowhere.yaml\n", "extends: nowhere.yaml in .*top.yaml: cannot be read"),
        ("extends: top.yaml\n", "extends: top.yaml in .*top.yaml: the files extend each other"),
        ("extends: base.yaml\n", "extends: top.yaml in .*base.yaml: the files extend each other"),
        ("extends: [a, b]\n", r"top.yaml: extends=\['a', 'b'\]: must be the name of one file"),
        ("extends: wrong.yaml\n", "training.epocs .*in .*wrong.yaml is not an option"),
    ],
)
def test_invalid_extends_is_named(given, tmp_path, text, message):
    (tmp_path / "top.yaml").write_text(text)
    (tmp_path / "base.yaml").write_text("extends: top.yaml\n")
    (tmp_path / "wrong.yaml").write_text("training:\n  epocs: 3\n")
    with pytest.raises(InputError, match=message) as caught:
        read(given, f"--config-file={tmp_path}/top.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("training:\n  epocs: 3\n", ["training.epocs", "training.epochs"]),
        ("trainig:\n  epochs: 3\n", ["trainig.epochs", "training.epochs"]),
        (
            "training:\n  epochs: many\n",
            ["training.epochs='many'", "must be an integer, 1 or more"],
        ),
        ("training:\n  epochs: 2.5\n", ["training.epochs=2.5"]),
        ("training:\n  epochs: -1\n", ["training.epochs=-1", "1 or more"]),
        ("training:\n  epochs: [3]\n", ["training.epochs=[3]"]),
        ("lr:\n  lr: .nan\n", ["lr.lr=nan"]),
        ("lr:\n  lr_schedule_type: cosin\n", ["lr.lr_schedule_type='cosin'", "cosine"]),
        ("mix:\n  prob: 1.5\n", ["mix.prob=1.5", "must be a number from 0 to 1"]),
        ("ema:\n  warmup: yes please\n", ["ema.warmup='yes please'", "0 or 1"]),
        ("data:\n  num_workers: 0\n", ["data.num_workers=0", "1"]),
        (
            "data:\n  num_workers: many\n",
            ["data.num_workers='many'", "must be an integer from 1 to 1024 or auto"],
        ),
        ("training: 3\n", ["section 'training'"]),
        ("just text\n", ["contains no sections"]),
        ("lr:\n  lr: 0.1\nlr:\n  min_lr: 0.01\n", ["the key 'lr' occurs twice"]),
        ("lr:\n  lr: 0.1\n  lr: 0.2\n", ["the key 'lr' occurs twice"]),
        ("logging:\n  folder: ''\n", ["logging.folder=''", "must not be empty"]),
        ("training:\n  seed: " + "9" * 400 + "\n", ["training.seed="]),
        ("data:\n  num_workers:\n", ["data.num_workers=None"]),
        ("a: [\n", ["not valid YAML"]),
        ("x: !!python/object/apply:os.system [ls]\n", ["not valid YAML"]),
    ],
)
def test_invalid_recipe_error_names_option_and_file(given, tmp_path, text, parts):
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text(text)
    with pytest.raises(InputError) as caught:
        read(given, f"--config-file={recipe}")
    message = str(caught.value)
    assert "\n" not in message
    for part in [*parts, "wrong.yaml"]:
        assert part in message


@pytest.mark.parametrize(
    "flag, parts",
    [
        ("--training.batchsize=3", ["training.batchsize", "training.batch_size"]),
        ("--epochs=3", ["epochs", "training.epochs"]),
        ("--xyz", ["xyz"]),
        ("-training.epochs=3", ["-training.epochs=3"]),
        ("stray", ["stray"]),
        ("--training.eval_only", ["--training.eval_only"]),
        ("--data.train_dataset=" + "x" * 300, ["xxx"]),
        ("--data.in_memory=maybe", ["data.in_memory='maybe'"]),
        ("--config-file=nowhere.yaml", ["nowhere.yaml", f"recipes are in {ROOT}/rsb_configs"]),
        ("--data.train_dataset=nowhere.beton", ["data.train_dataset=nowhere.beton"]),
        (
            "--augment.scale_min=0.9 --augment.scale_max=0.5",
            ["augment.scale_min=0.9", "augment.scale_max=0.5"],
        ),
        ("--mix.mixup=0.2 --training.batch_size=33", ["training.batch_size=33"]),
        ("--ema.decay=1", ["ema.decay=1", "below 1"]),
        ("--lr.warmup_epochs=31", ["lr.warmup_epochs=31"]),
        ("--lr.warmup_epochs=2", ["lr.warmup_epochs=2", "lr.lr_schedule_type=cyclic"]),
    ],
)
def test_invalid_flag_is_named(given, flag, parts):
    with pytest.raises(InputError) as caught:
        read(given, *flag.split())
    for part in parts:
        assert part in str(caught.value)


def test_large_integers_and_numeric_strings_stay_exact(given, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("compute:\n  compile: 1\ndist:\n  port: 12355\ntraining:\n  epochs: 1e3\n")
    c = read(given, f"--config-file={recipe}", f"--training.seed={2**63 - 1}")
    assert (c.compute.compile, c.dist.port, c.training.epochs, c.training.seed) == (
        "1",
        12355,
        1000,
        2**63 - 1,
    )


def test_environment_variables_are_not_options(given, monkeypatch):
    monkeypatch.setenv("training.epochs", "99")
    monkeypatch.setenv("training", "99")
    assert read(given).training.epochs == 30


def test_program_errors_name_options_instead_of_parameters():
    with pytest.raises(InputError) as caught, option_names({"lr": "lr.lr", "keep": "`others`"}):
        try:
            raise OSError("no space")
        except OSError as error:
            raise InputError("`lr`=3 and `keep`=2: too much for `ulimit -n` and `x`") from error
    assert str(caught.value) == "lr.lr=3 and `others`=2: too much for `ulimit -n` and `x`"
    assert isinstance(caught.value.__cause__, OSError)


def test_missing_option_is_named():
    with pytest.raises(InputError, match="data.train_dataset is missing"):
        read([])


@pytest.mark.parametrize(
    "commands, name",
    [(commands, name) for commands in (train.COMMANDS, write.COMMANDS) for name in commands],
)
def test_help_shows_every_option_with_its_default(commands, name, capsys):
    with pytest.raises(SystemExit) as ended:
        commands[name].run(["--help"], "A program.")
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "A program." in shown
    for section, kind in commands[name].sections.items():
        for item in fields(kind):
            assert f"--{section}.{item.name}  [" in shown and item.metadata["text"] in shown


@pytest.mark.parametrize("program", ["train_imagenet.py", "write_ffcv.py"])
def test_programs_print_their_version(call_program, program, capfd):
    assert call_program(program, "--version") == (0, f"rsb_ffcv {__version__}\n", "")
    with pytest.raises(SystemExit):
        call_program(program, "--help")
    assert "--version prints the version" in capfd.readouterr().out


def test_limits_of_large_integers_are_exact(call_program):
    status, _, err = call_program("write_ffcv.py", "--cfg.data_dir=x", "--cfg.max_pixels=1e9")
    assert status == 2 and "must be an integer from 1 to 268435456" in err


def test_command_requires_only_the_options_it_reads(given, call_program, tmp_path):
    options = [given[0], "--training.epochs=16", "--training.batch_size=32"]
    status, out, err = call_program("train_imagenet.py", "plan", *options)
    assert status == 0 and not err
    assert out.splitlines()[0] == "16 epochs of 3 steps of 32 images: 48 steps"
    status, out, err = call_program("train_imagenet.py", "plan", *options, "--training.epochs=1")
    assert out.splitlines()[2].startswith("1  ")
    status, out, err = call_program("train_imagenet.py", *options)
    assert status == 2 and "data.val_dataset is missing" in err
    status, out, err = call_program("train_imagenet.py", *options, "plan")
    assert status == 2 and err == (
        "error: plan: the command comes first; write plan before the options\n"
    )
    status, out, err = call_program("train_imagenet.py", "plam", *options)
    assert status == 2 and "plam: no such command; did you mean plan? All: train, plan" in err


def test_plan_estimates_hours_compares_and_draws(given, call_program, tmp_path):
    (tmp_path / "run").mkdir()
    rows = [{"images_per_s": rate, "val_seconds": 36.0} for rate in (1.0, 2.0, 9.0)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "other.yaml").write_text("lr: {lr: 0.25}\nema: {decay: 0.5}\n")
    options = [
        *(
            given[0],
            "--training.epochs=10",
            "--training.batch_size=32",
            "--training.optimizer=lamb",
        ),
        *("--plan.gpus=4", "--plan.price=2.5", f"--plan.picture={tmp_path / 'plan.png'}"),
        *(f"--plan.against={tmp_path / 'other.yaml'}", "--model.arch=resnet10t"),
    ]
    status, out, err = call_program(
        "train_imagenet.py", "plan", *options, f"--plan.images_per_s={tmp_path / 'run'}"
    )
    assert status == 0, err
    # 10 epochs of 3 steps of 32 images at 2/s, and 10 validations of 36 s
    assert "estimated hours  0.2 at 2 images/s, with validation" in out
    assert "estimated costs  2.33 for 4 GPUs at 2.5 an hour" in out
    model = timm.create_model("resnet10t", num_classes=3)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"resnet10t        {parameters / 1e6:,.1f} M parameters" in out
    assert f"{16 * parameters / 1e9:.2f} GB for weights, gradients, optimizer and averages" in out
    assert "6 options differ from" in out and re.search(r"ema.decay +0.5 +0.0\n", out)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"drop path +0\n", out)
    status, out, err = call_program("train_imagenet.py", "plan", *options, "--model.drop_path=0.3")
    # resnet10t: 4 blocks, of which the first is never dropped
    assert re.search(r"drop path +0.1 to 0.3, over 3 branches\n", out), err
    for value in ("fast", "-1", "nan", str(tmp_path)):
        status, _, err = call_program(
            "train_imagenet.py", "plan", *options, f"--plan.images_per_s={value}"
        )
        assert status == 2 and f"plan.images_per_s={value}: " in err


def test_plan_shows_what_the_recipe_says_and_what_departs_from_it(given, call_program, tmp_path):
    recipe, own = tmp_path / "recipe.yaml", tmp_path / "own.yaml"
    recipe.write_text(
        "# A recipe.\n#\n# Source: none.\nlr: {lr: 0.25}\n# not this\nema: {decay: 0.5}"
    )
    own.write_text("training: {batch_size: 32}\n")
    files = [f"--config-file={recipe}", "--config-file", str(own)]
    common = [given[0], "--model.arch=test_resnet", "--training.epochs=4"]
    _, out, err = call_program("train_imagenet.py", "plan", *files, *common, "--lr.lr=0.5")
    assert f"\nabout {recipe}:\nA recipe.\n\nSource: none.\n\n4 options differ from" in out, err
    assert "not this" not in out
    for line in (
        "lr.lr +0.25 +0.5",
        "model.arch +resnet50 +test_resnet",
        "training.batch_size +512 +32",
        "training.epochs +30 +4",
    ):
        assert re.search(f"\n{line}\n", out + "\n"), line
    _, out, err = call_program("train_imagenet.py", "plan", *files[1:], *common)
    assert "about " not in out and "1 step" not in err  # own.yaml has no comment


def test_a2_departs_from_the_paper_in_what_its_head_states():
    ours, paper = (
        {name: as_dict(c)[name] for name in RECIPE}
        for c in (
            read_recipe(str(ROOT / "rsb_configs" / f"{name}.yaml"))
            for name in ("a2_300", "paper_a2_300")
        )
    )
    assert set(changes(paper, ours)) == {
        *("mix.mixup", "augment.repeats", "model.drop_path", "ema.decay"),
        *("augment.erase_prob", "augment.erase_mode", "augment.erase_max"),
        *("lr.lr_schedule_type", "lr.warmup_lr", "lr.min_lr"),
        *("training.loss", "training.label_smoothing"),
    }


@pytest.mark.parametrize(
    "options, steps",
    [
        ({"dist.world_size": 2, "training.distributed": 0}, "3 steps of 32 images"),
        ({"dist.world_size": 2, "training.distributed": 1}, "1 step of 64 images"),
        (
            {"training.batch_size": 100},
            "training.batch_size=100: data.train_dataset=",
        ),
        (
            {"dist.world_size": 4, "training.distributed": 1},
            "training.batch_size=32 with 4 processes: data.train_dataset=",
        ),
        ({"training.global_batch": 128}, "training.global_batch=128: data.train_dataset="),
    ],
)
def test_plan_has_the_steps_of_the_run(given, call_program, options, steps):
    options = {"training.batch_size": 32, **options}
    flags = [f"--{name}={value}" for name, value in options.items()]
    _, out, err = call_program("train_imagenet.py", "plan", given[0], *flags)
    assert steps in out + err


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "rsb_configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_recipe_is_valid(recipe, given):
    c = read([f"--config-file={recipe}", *given])
    assert as_dict(c)["data"]["num_workers"] == 2


def test_num_workers_defaults_to_auto(given):
    others = [flag for flag in given if not flag.startswith("--data.num_workers")]
    assert (
        read(others).data.num_workers
        == "auto"
        == read([*others, "--data.num_workers=auto"]).data.num_workers
    )
    assert read([*others, "--data.num_workers=3"]).data.num_workers == 3


def test_a2_recipes_have_the_a2_settings(given):
    for name, epochs in (("a2_300", 300), ("a2_600", 600)):
        c = read([f"--config-file={ROOT}/rsb_configs/{name}.yaml", *given])
        t = c.training
        assert (t.optimizer, t.weight_decay, t.epochs, t.batch_size, t.global_batch) == (
            "lamb",
            0.02,
            epochs,
            256,
            2048,
        )
        assert (
            c.lr.lr,
            c.lr.lr_schedule_type,
            c.lr.warmup_epochs,
            c.lr.warmup_lr,
            c.lr.min_lr,
        ) == (5e-3, "cosine", 5, 5e-5, 0)
        assert (c.mix.mixup, c.mix.cutmix, t.loss, t.label_smoothing, c.ema.decay) == (
            0.2,
            1.0,
            "auto",
            0.1,
            0.9999,
        )
        assert c.augment.rand_augment.startswith("rand-m7-") and c.augment.erase_prob == 0.25
        assert c.compute.precision == "auto" and c.model.arch == "resnet50"


@pytest.mark.parametrize(
    "epochs, start, end",
    [(16, 11, 13), (24, 17, 20), (32, 23, 27), (40, 29, 34), (56, 41, 48), (88, 65, 76)],
)
def test_ffcv_recipes_equal_the_published_ones(given, epochs, start, end):
    """rn50_configs/rn50_<epochs>_epochs.yaml of libffcv/ffcv-imagenet."""
    c = read([f"--config-file={ROOT}/rsb_configs/ffcv_rn50_{epochs}.yaml", *given])
    assert (c.training.epochs, c.resolution.start_ramp, c.resolution.end_ramp) == (
        epochs,
        start,
        end,
    )
    assert (c.resolution.min_res, c.resolution.max_res, c.validation.resolution, c.lr.lr) == (
        160,
        192,
        256,
        1.7,
    )
    assert c.training.use_blurpool and c.validation.lr_tta and c.lr.lr_schedule_type == "cyclic"


@pytest.mark.parametrize(
    "name, resolution, epochs, lr, decay, smoothing, drop_path, repeats, magnitude, mixup",
    [
        ("paper_a1_600", 224, 600, 5e-3, 0.01, 0.1, 0.05, 3, 7, 0.2),
        ("paper_a2_300", 224, 300, 5e-3, 0.02, 0.0, 0.05, 3, 7, 0.1),
        ("paper_a3_100", 160, 100, 8e-3, 0.02, 0.0, 0.0, 1, 6, 0.1),
    ],
)
def test_paper_recipes_equal_table_2(
    given, name, resolution, epochs, lr, decay, smoothing, drop_path, repeats, magnitude, mixup
):
    """Table 2 of arXiv:2110.00476."""
    c = read([f"--config-file={ROOT}/rsb_configs/{name}.yaml", *given])
    t = c.training
    assert (c.resolution.min_res, c.resolution.max_res, t.epochs, c.lr.lr, t.weight_decay) == (
        resolution,
        resolution,
        epochs,
        lr,
        decay,
    )
    assert (t.label_smoothing, c.model.drop_path, c.augment.repeats, c.mix.mixup, c.mix.cutmix) == (
        smoothing,
        drop_path,
        repeats,
        mixup,
        1.0,
    )
    assert (t.optimizer, t.loss, t.global_batch, c.lr.warmup_epochs, c.validation.crop_ratio) == (
        "lamb",
        "bce",
        2048,
        5,
        0.95,
    )
    assert (
        c.augment.rand_augment == f"rand-m{magnitude}-mstd0.5-inc1"
        and c.augment.erase_prob == 0 == c.ema.decay
    )


def test_deit_recipe_equals_the_published_command(given):
    """The command for ViT-S in README_revenge.md, and defaults of main.py, of
    facebookresearch/deit."""
    c = read([f"--config-file={ROOT}/rsb_configs/deit3_small_800.yaml", *given])
    t, a = c.training, c.augment
    assert (c.model.arch, c.model.drop_path) == ("deit3_small_patch16_224", 0.05)
    assert (t.optimizer, t.global_batch, t.epochs, t.weight_decay) == ("lamb", 2048, 800, 0.05)
    assert (c.lr.lr, c.lr.lr_schedule_type, c.lr.warmup_epochs) == (4e-3, "cosine_spanning", 5)
    assert (c.lr.warmup_lr, c.lr.min_lr) == (1e-6, 1e-5)
    assert (a.rand_augment, a.color_jitter, a.repeats, a.interpolation) == ("3a", 0.3, 3, "bicubic")
    assert (c.mix.mixup, c.mix.cutmix, c.mix.mode, a.erase_prob) == (0.8, 1.0, "batch", 0)
    assert (t.loss, t.label_smoothing, c.ema.decay, c.validation.crop_ratio) == ("bce", 0, 0, 1.0)
    assert 0 < t.bce_threshold <= 1e-6


def test_sgd_recipe_has_torchvisions_rand_augment(given):
    c = read([f"--config-file={ROOT}/rsb_configs/sgd_100_swa.yaml", *given])
    assert (c.augment.rand_augment, c.mix.mixup, c.mix.cutmix) == ("ra-n2-m9", 0.2, 1.0)


def test_finetune_recipe_equals_maes(given):
    """ViT-Base in FINETUNE.md, and the defaults of main_finetune.py, of facebookresearch/mae."""
    import timm

    from rsb_ffcv.loading.batch import MEAN

    c = read([f"--config-file={ROOT}/rsb_configs/finetune.yaml", *given])
    t = c.training
    assert (t.optimizer, t.layer_decay, t.weight_decay, t.epochs, t.global_batch, t.loss) == (
        "adamw",
        0.65,
        0.05,
        100,
        1024,
        "ce",
    )
    assert (c.lr.lr, c.lr.warmup_epochs, c.lr.warmup_lr, c.lr.min_lr) == (2e-3, 5, 0, 1e-6)
    assert (c.model.drop_path, c.mix.mixup, c.mix.cutmix, t.label_smoothing) == (0.1, 0.8, 1, 0.1)
    assert (c.augment.rand_augment, c.augment.erase_prob, c.augment.erase_mode) == (
        "rand-m9-mstd0.5-inc1",
        0.25,
        "pixel",
    )
    assert c.model.pretrained and timm.get_pretrained_cfg(c.model.arch).mean == MEAN


def test_documents_name_options_and_files_that_exist():
    """Options, recipes and links of every page."""
    known: dict[str, set[str]] = {}
    for commands in (train.COMMANDS, write.COMMANDS):
        for command in commands.values():
            for name, section in command.sections.items():
                known.setdefault(name, set()).update(item.name for item in fields(section))
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("examples/*.md")]
    assert len(pages) > 8
    option = re.compile(rf"(?<![\w./])({'|'.join(known)})\.(\w+)(\*?)(?![\w.(/])")
    suffixes = {
        "py",
        "pt",
        "json",
        "jsonl",
        "md",
        "log",
        "beton",
        "csv",
        "png",
        "yaml",
        "pt2",
        "onnx",
        "safetensors",
    }
    for page in pages:
        text = page.read_text()
        for section, name, star in option.findall(text):
            found = [one for one in known[section] if one == name or star and one.startswith(name)]
            assert found or name in suffixes, f"{page}: {section}.{name}"
        for name in re.findall(r"rsb_configs/([\w]+\.yaml)", text):
            assert (ROOT / "rsb_configs" / name).is_file(), f"{page}: {name}"
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            other = page.parent / target if target else page
            assert other.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(other), f"{page}: {target}#{anchor}"


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]


def test_page_of_options_is_up_to_date():
    """`make docs` writes it."""
    from rsb_ffcv.commands.options_page import page

    assert (ROOT / "docs" / "options.md").read_text() == page()
