"""Weights from files of this program and of others, bit for bit, and files that are refused."""

import argparse
import fractions
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from rsb_ffcv import InputError
from rsb_ffcv.learning.model import add_blurpool, build_model
from rsb_ffcv.learning.weights import load_weights


def trained(seed: int, classes: int = 3, arch: str = "test_resnet") -> dict[str, torch.Tensor]:
    """A state_dict with random values, also of the batch-norm statistics and counters."""
    torch.manual_seed(seed)
    return {
        name: torch.randn_like(value) if value.is_floating_point() else torch.tensor(seed)
        for name, value in build_model(arch, classes).state_dict().items()
    }


RAW, AVERAGE, SWA = trained(1), trained(2), trained(3)
TOTAL = len(RAW)


def prefixed(prefix: str, weights: dict[str, torch.Tensor] = RAW) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in weights.items()}


OURS: dict[str, Any] = {
    "recipe": {},
    "step": 3,
    "model": RAW,
    "ema": {"module": AVERAGE, "updates": 3},
    "swa": {"module": SWA, "models": 2, "batches": 4, "finished": True},
}
TIMM = {
    "epoch": 1,
    "arch": "test_resnet",
    "args": argparse.Namespace(lr=0.1),
    "version": 2,
    "state_dict": RAW,
    "state_dict_ema": AVERAGE,
}
TORCHVISION_REFERENCE = {
    "model": RAW,
    "epoch": 1,
    "args": argparse.Namespace(),
    "model_ema": {"n_averaged": torch.tensor(3), **prefixed("module.", AVERAGE)},
}
LIGHTNING = {
    "epoch": 1,
    "pytorch-lightning_version": "2.5.0",
    "state_dict": {**prefixed("model."), "criterion.weight": torch.ones(3)},
    "hyper_parameters": {"lr": 0.1},
    "optimizer_states": [{}],
}


@pytest.mark.parametrize(
    "content, which, expected, line",
    [
        (RAW, "model", RAW, ""),
        (OURS, "model", RAW, ""),
        (OURS, "ema", AVERAGE, ""),
        (OURS, "swa", SWA, ""),
        (TIMM, "model", RAW, ""),
        (TIMM, "ema", AVERAGE, ""),
        ({"model": RAW}, "model", RAW, ""),
        (
            TORCHVISION_REFERENCE,
            "ema",
            AVERAGE,
            "; prefix module. removed; not used: n_averaged",
        ),
        (LIGHTNING, "model", RAW, "; prefix model. removed; not used: criterion.weight"),
        # ffcv-imagenet's file: the state_dict of a DDP module
        (prefixed("module."), "model", RAW, "; prefix module. removed"),
        (
            prefixed("_orig_mod.module."),
            "model",
            RAW,
            "; prefix _orig_mod.module. removed",
        ),
        (
            {"state_dict": prefixed("model._orig_mod.model.")},
            "model",
            RAW,
            "; prefix model._orig_mod.model. removed",
        ),
        (
            {"state_dict": prefixed("encoder.net.")},
            "model",
            RAW,
            "; prefix encoder.net. removed",
        ),
        (
            {"state_dict": {**prefixed("ema_model.", AVERAGE), **prefixed("model.")}},
            "model",
            RAW,
            "; prefix model. removed; not used: ema_model.bn1.bias, ema_model.bn1.num_batches_"
            f"tracked, ema_model.bn1.running_mean and {TOTAL - 3} more",
        ),
    ],
)
def test_weights_of_each_form_are_loaded_bit_for_bit(tmp_path, content, which, expected, line):
    path = tmp_path / "file.pt"
    for options in ({}, {"_use_new_zipfile_serialization": False}):  # and torch's before 1.6
        torch.save(content, path, **options)
        model = build_model("test_resnet", 3)
        loaded = load_weights(model, path, which=which)
        assert str(loaded) == f"the weights of {path}: {TOTAL} of {TOTAL} tensors{line}"
        assert model.state_dict().keys() == expected.keys()
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_safetensors_are_loaded_bit_for_bit(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(prefixed("module."), path)
    model = build_model("test_resnet", 3)
    assert "prefix module. removed" in str(load_weights(model, path))
    assert all(torch.equal(value, RAW[name]) for name, value in model.state_dict().items())
    path.write_bytes(path.read_bytes()[:-7])
    for damaged, message in ((path, "not a safetensors file"), (tmp_path / "no", "cannot be read")):
        with pytest.raises(InputError, match=f"^`path`={damaged}: {message} .*; give a"):
            load_weights(model, damaged)


def test_torchvision_model_gives_the_same_outputs(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().eval()
    for norm in (m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    state = theirs.state_dict()
    images = torch.randn(2, 3, 64, 64)
    for absent in (False, True):
        # Files of torchvision from before torch 1.0 do not have the counters
        kept = {k: v for k, v in state.items() if not absent or "num_batches" not in k}
        torch.save(kept, tmp_path / "resnet18.pth")
        ours = build_model("resnet18", 1000)
        line = str(load_weights(ours, tmp_path / "resnet18.pth"))
        assert line.endswith(
            ": 102 of 122 tensors; 20 num_batches_tracked are absent"
            if absent
            else ": 122 of 122 tensors"
        )
        with torch.no_grad():
            assert torch.equal(ours.eval()(images), theirs(images))


def test_ffcv_imagenets_blurpool_is_loaded_and_named_if_it_differs(tmp_path):
    """A torchvision model, whose strided convolutions ffcv-imagenet wraps, in DDP."""
    theirs = torchvision.models.resnet18()
    add_blurpool(theirs)
    torch.save(prefixed("module.", theirs.state_dict()), tmp_path / "final_weights.pt")
    ours = build_model("resnet18", 1000, blurpool=True)
    load_weights(ours, tmp_path / "final_weights.pt")
    state = theirs.state_dict()
    assert sum(name.endswith(".conv.weight") for name in state) == 6
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    with pytest.raises(InputError, match=r"of another model .*; use `blurpool`=1$"):
        load_weights(build_model("resnet18", 1000), tmp_path / "final_weights.pt")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "plain.pt")
    with pytest.raises(InputError, match=r"of another model .*; use `blurpool`=0$"):
        load_weights(ours, tmp_path / "plain.pt")


def with_head(classes: int) -> dict[str, torch.Tensor]:
    return {**RAW, "fc.weight": torch.ones(classes, 96), "fc.bias": torch.ones(classes)}


@pytest.mark.parametrize("classes", [3, 7])
def test_new_head_keeps_its_initialization(tmp_path, classes):
    path = tmp_path / "file.pt"
    torch.save(prefixed("module.", with_head(classes)), path)
    model = build_model("test_resnet", 3)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    line = str(load_weights(model, path, head="new"))
    assert line == (
        f"the weights of {path}: {TOTAL - 2} of {TOTAL} tensors; prefix module. removed; left at "
        f"their initialization: fc.weight, fc.bias; not used: module.fc.bias, module.fc.weight"
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, (initial if name.startswith("fc.") else RAW)[name]), name


@pytest.mark.parametrize("state", [with_head(7), {k: v for k, v in RAW.items() if "fc" not in k}])
def test_head_that_does_not_fit_is_an_error_that_names_the_option(tmp_path, state):
    path = tmp_path / "file.pt"
    torch.save(state, path)
    model = build_model("test_resnet", 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = r"\(7, 96\)" if "fc.weight" in state else "missing"
    with pytest.raises(InputError, match=rf"does not fit \(fc.weight {found}\); use `head`=new"):
        load_weights(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "file.pt"
    model = build_model("test_resnet", 3)
    quantized = {**RAW, "conv1.0.weight": RAW["conv1.0.weight"].to(torch.int8)}
    several = {"state_dict": {**prefixed("student."), **prefixed("teacher.", AVERAGE)}}
    other = trained(1, arch="resnet10t")
    not_yet = {**OURS, "ema": {"module": AVERAGE, "updates": 0}, "swa": None}
    for content, which, message in (
        (other, "model", "is of another model .* the first: .*; use its `arch` and number of"),
        ({**RAW, "more": torch.ones(1)}, "model", r"\(1 tensor differs, the first: more \(1,\)\)"),
        (quantized, "model", "1 tensor differs, the first: conv1.0.weight"),
        (several, "model", "has several models .student., teacher..; give a file with one"),
        (not_yet, "ema", "^`which`=ema: .* or not yet; use model"),
        (not_yet, "swa", "^`which`=swa: .* or not yet; use model"),
        (RAW, "ema", "^`which`=ema: .* not a checkpoint with such weights; use model"),
        ({**TIMM, "state_dict_ema": None}, "ema", "not a checkpoint with such weights; use model"),
        (TIMM, "swa", "not a checkpoint with such weights; use model"),
        ({}, "model", "contains no weights; give a"),
        ([1], "model", "contains no weights; give a"),
        ({"state_dict": {"a": 1}}, "model", "contains no weights; give a"),
    ):
        torch.save(content, path)
        with pytest.raises(InputError, match=message) as caught:
            load_weights(model, path, which=which)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="`head`='old': must be one of match, new"):
        load_weights(model, path, head="old")


def test_damaged_file_is_refused(tmp_path):
    path = tmp_path / "file.pt"
    for legacy in (False, True):
        torch.save(RAW, path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        for content, message in (
            (whole[: len(whole) // 2], "not a readable checkpoint"),
            (b"", "not a readable checkpoint"),
            (b"text", "not a readable checkpoint"),
            *(
                [(whole[:-9000] + b"\xff" + whole[-8999:], "damaged .* its checksum")]
                if not legacy
                else []
            ),
        ):
            path.write_bytes(content)
            with pytest.raises(InputError, match=f"^`path`={path}: {message}.*; give a") as caught:
                load_weights(build_model("test_resnet", 3), path)
            assert "\n" not in str(caught.value)


class Refused:
    """Would create a file if it were unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_python_objects_are_refused_and_the_command_in_the_message_converts(tmp_path, legacy):
    path = tmp_path / "it's.ckpt"
    content = {**LIGHTNING, "hyper_parameters": {"ratio": fractions.Fraction(1, 2)}}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    model = build_model("test_resnet", 3)
    with pytest.raises(
        InputError, match=r"contains Python objects \(fractions.Fraction\)"
    ) as caught:
        load_weights(model, path)
    message = str(caught.value)
    assert "\n" not in message and "if you trust the file, convert it" in message
    if legacy:
        return
    command = message[message.index("python -c") :].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, timeout=300)
    load_weights(model, tmp_path / "it's.ckpt.pt")
    assert all(torch.equal(value, RAW[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_of_a_file_runs(tmp_path, legacy):
    path, created = tmp_path / "file.pt", tmp_path / "created"
    torch.save({"state_dict": RAW, "x": Refused(created)}, path)
    with pytest.raises(InputError, match=re.escape(f"`path`={path}: ")) as caught:
        load_weights(build_model("test_resnet", 3), path)
    assert not created.exists() and "\n" not in str(caught.value)
