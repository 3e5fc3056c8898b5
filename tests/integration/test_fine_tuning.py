"""Fine-tuning from a file of weights: frozen layers, learning rates by layer, gradient
checkpointing, with every kind of state."""

import json

import pytest
import torch
import torch.utils.checkpoint

from rsb_ffcv.learning.model import build_model
from tests.integration.runs import assert_same, assert_same_run, options, state
from tests.integration.test_kill import EVERYTHING

FROZEN = ("conv1.", "bn1.", "layer1.")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A Lightning-like file of test_resnet with 5 classes and random statistics."""
    torch.manual_seed(0)
    state = {
        name: value + 0.01 * torch.rand_like(value) if value.is_floating_point() else value + 7
        for name, value in build_model("test_resnet", 5).state_dict().items()
    }
    path = tmp_path_factory.mktemp("weights") / "last.ckpt"
    torch.save({"state_dict": {f"model.{name}": value for name, value in state.items()}}, path)
    return path


def fine_tuning(weights):
    return {
        **EVERYTHING,
        "training.epochs": 3,
        "swa.epochs": 1,
        "lr.lr": 0.01,
        "checkpoint.warm_start": weights,
        "checkpoint.warm_start_head": "new",
        "model.freeze": 2,
        "model.grad_checkpointing": 1,
        "training.layer_decay": 0.5,
        "training.head_lr_scale": 4,
    }


@pytest.mark.parametrize(
    "world, optimizer", [(1, "sgd"), pytest.param(2, "lamb", marks=pytest.mark.long)]
)
def test_fine_tuning_that_is_killed_and_resumed_equals_uninterrupted(
    betons, tmp_path, train, weights, world, optimizer
):
    more = {
        **fine_tuning(weights),
        "training.optimizer": optimizer,
        "training.batch_size": 16 // world,
    }
    statuses, out, err = train(options(betons, tmp_path / "whole", **more), world).wait()
    assert statuses == [0] * world, err
    assert (
        f"starting from the weights of {weights}: 90 of 92 tensors; prefix model. removed; left at "
        f"their initialization: fc.weight, fc.bias; not used: model.fc.bias, model.fc.weight\n"
    ) in out
    assert "\nfrozen: 0.0" in out
    for stop in (("epoch 2", 2), ("batch norm", 1)):
        run = train(options(betons, tmp_path / "run", **more), world, stop_at=stop)
        run.wait_for_stop()
        run.kill()
        run.wait()
    statuses, out, err = train(options(betons, tmp_path / "run", **more), world).wait()
    assert statuses == [0] * world and "resuming" in out, err
    assert_same_run(tmp_path / "run", tmp_path / "whole")

    end = state(tmp_path / "run")
    given = torch.load(weights, weights_only=True)["state_dict"]
    for kind, values in (
        ("raw", end["model"]),
        ("EMA", end["ema"]["module"]),
        ("SWA", end["swa"]["module"]),
    ):
        for name, value in values.items():
            if value.is_floating_point():
                same = value.shape == given[f"model.{name}"].shape and torch.equal(
                    value, given[f"model.{name}"]
                )
                assert same == name.startswith(FROZEN), f"{kind} {name}"
    groups = end["optimizer"]["param_groups"]
    assert {group["lr_scale"] for group in groups} == {4.0, 0.5, 0.25, 0.125}
    base = end["rows"][-1]["lr"]
    assert base > 0 and all(group["lr"] == base * group["lr_scale"] for group in groups)


def test_gradient_checkpointing_changes_no_bit_of_a_run(
    betons, tmp_path, call_program, monkeypatch
):
    more = {"model.arch": "test_resnet", "training.epochs": 1, "swa.epochs": 1}
    ends, calls = [], []
    checkpointed = torch.utils.checkpoint.checkpoint

    def counted(*given, **named):
        calls.append(1)
        return checkpointed(*given, **named)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    for on in (0, 1):
        folder = tmp_path / str(on)
        status, _, err = call_program(
            "train_imagenet.py",
            *options(betons, folder, **more, **{"model.grad_checkpointing": on}),
        )
        assert status == 0 and bool(calls) == on, err
        ends.append(state(folder))
    assert_same(*ends)  # the recipe too: a run may go on with less memory


def test_weights_of_another_program_are_evaluated(betons, tmp_path, call_program, weights):
    more = {"model.arch": "test_resnet", "training.eval_only": 1, "checkpoint.warm_start": weights}
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "x", **more))
    assert status == 2
    assert err.splitlines()[-1].startswith(
        f"error: checkpoint.warm_start={weights}: its classifier head does not fit (fc.weight "
        f"(5, 96)); use checkpoint.warm_start_head=new to leave "
    )
    given = torch.load(weights, weights_only=True)
    given["state_dict"]["model.fc.weight"] = given["state_dict"]["model.fc.weight"][:3]
    given["state_dict"]["model.fc.bias"] = given["state_dict"]["model.fc.bias"][:3]
    torch.save(given, tmp_path / "fits.ckpt")
    more["checkpoint.warm_start"] = tmp_path / "fits.ckpt"
    status, out, err = call_program("train_imagenet.py", *options(betons, tmp_path / "x", **more))
    assert status == 0 and "92 of 92 tensors; prefix model. removed\n" in out, err
    assert json.loads(out.splitlines()[-1])["val_images"] == 27


def test_fine_tuning_options_are_part_of_the_recipe(betons, tmp_path, call_program, weights):
    more = {**fine_tuning(weights), "training.epochs": 1, "swa.epochs": 0, "ema.decay": 0}
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "x", **more))
    assert status == 0, err
    for option, value, message in (
        ("model.freeze", 0, "model.freeze: 2 in the folder, 0 now"),
        ("model.freeze", "backbone", "model.freeze: 2 in the folder, backbone now"),
        ("training.layer_decay", 0.75, "training.layer_decay: 0.5 in the folder, 0.75 now"),
        ("checkpoint.warm_start_head", "match", "warm_start_head: new in the folder, match now"),
    ):
        status, _, err = call_program(
            "train_imagenet.py", *options(betons, tmp_path / "x", **{**more, option: value})
        )
        assert status == 2 and message in err.splitlines()[-1]
        assert err.splitlines()[-1].count(" now") == 1


@pytest.mark.parametrize(
    "given, message",
    [
        ({"model.freeze": 7}, "model.freeze=7: this model has 5 groups before its head; use at"),
        (
            {"model.arch": "inception_v3", "model.drop_path": 0},
            "model.grad_checkpointing=1: timm does not support it for model.arch=inception_v3;",
        ),
        ({"checkpoint.warm_start": "", "checkpoint.warm_start_head": "match"}, "model.freeze=2: "),
        ({"checkpoint.warm_start": "", "model.freeze": 0}, "checkpoint.warm_start_head=new: is"),
        ({"model.freeze": "head"}, "model.freeze='head' on the command line: must"),
    ],
)
def test_option_that_does_not_fit_is_one_line(
    betons, tmp_path, call_program, weights, given, message
):
    more = {**fine_tuning(weights), **given}
    status, _, err = call_program("train_imagenet.py", *options(betons, tmp_path / "x", **more))
    assert status == 2 and err.splitlines()[-1].startswith(f"error: {message}"), err
