"""The training step on a device that is not there: fake CUDA tensors have a device, a type and a
shape, and meta tensors also gradients. An operation on tensors of two devices, and a read of a
value on the host, which would make a step wait for the device, are errors.

Streams, DDP, bf16, torch.compile and fused SGD need a GPU: see tests/gpu.
"""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.cuda.amp.common
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from rsb_ffcv.learning.average import Ema, Swa
from rsb_ffcv.learning.loss import Loss
from rsb_ffcv.learning.model import build_model
from rsb_ffcv.learning.optimizer import build_optimizer
from rsb_ffcv.loading import Batch
from rsb_ffcv.loading.batch import BatchTransform
from rsb_ffcv.training.compute import Compute
from rsb_ffcv.training.step import TrainStep

ROWS = 16


@pytest.fixture(autouse=True)
def no_generators(monkeypatch):
    """A generator of a device that is not there cannot be made."""
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: generator("cpu"))


@pytest.fixture
def fake_cuda(monkeypatch):
    """FakeTensorMode in which autocast and GradScaler are not switched off for want of a GPU."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # not in fake tensors
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        yield


def where(device: str, precision: str = "fp32") -> Compute:
    return Compute(
        device=torch.device(device), precision=precision, compile=False, channels_last=True
    )


def transform(**more) -> BatchTransform:
    return BatchTransform(
        seed=0,
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
        mix_prob=1.0,
        switch_prob=0.5,
        erase_prob=0.5,
        erase_area=(0.02, 0.3),
        **{"erase_mode": "pixel", "mode": "batch", **more},
    )


def batch(device: str) -> Batch:
    images = torch.empty(ROWS, 64, 64, 3, dtype=torch.uint8, device=device)
    labels = torch.empty(ROWS, dtype=torch.int64, device=device)
    return Batch(images, labels, np.arange(ROWS))


def optimizer(name: str, model, monkeypatch) -> torch.optim.Optimizer:
    # fused SGD has no fake implementation
    monkeypatch.setattr(torch.optim, "SGD", partial(_unfused, torch.optim.SGD))
    return build_optimizer(name, model, lr=0.005, weight_decay=0.02, momentum=0.9)


def _unfused(kind, *arguments, fused: bool, **options):
    return kind(*arguments, **options)


def test_read_of_a_value_on_the_host_is_an_error_here(fake_cuda):
    with pytest.raises(DataDependentOutputException):
        torch.ones(()).item()
    assert torch.ones(1).device.type == "cuda"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("erase_mode", ["pixel", "const", "rand"])
@pytest.mark.parametrize("kind", ["bce", "ce"])
def test_forward_loss_and_transforms_stay_on_the_device(
    fake_cuda, precision, mode, erase_mode, kind
):
    place = where("cuda", precision)
    model: Any = build_model("resnet10t", 10).train()
    given = batch("cuda")
    images, lam = transform(mode=mode, erase_mode=erase_mode)(
        given.images, 0, given.slots, mixing=True
    )
    images = images.contiguous(memory_format=place.memory_format)
    with place.autocast():
        assert torch.is_autocast_enabled("cuda") == (precision == "fp16")
        logits = model(images)
    loss = Loss(kind=kind, smoothing=0.1, threshold=0.0, sum_classes=False)(
        logits, given.labels, lam
    )
    assert logits.dtype == (torch.float16 if precision == "fp16" else torch.float32)
    assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.shape == ()


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["lamb", "sgd", "adamw"])
def test_optimizers_do_not_read_from_the_device(fake_cuda, monkeypatch, name, scaled, clip):
    """Three steps, the first of which makes the state."""
    model: Any = build_model("resnet10t", 10)
    built = optimizer(name, model, monkeypatch)
    scaler = torch.amp.GradScaler("cuda", enabled=scaled)
    assert scaler.is_enabled() == scaled
    # torch's fallback for optimizers without support of the scaler reads `found_inf`; so does SGD
    # without fusing
    reads = scaled and name == "sgd"
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        scaler.scale(torch.zeros(()))
        if clip:
            scaler.unscale_(built)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if reads:
            with pytest.raises(DataDependentOutputException):
                scaler.step(built)
            return
        scaler.step(built)
        scaler.update()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["lamb", "sgd", "adamw"])
def test_a_complete_step_with_averages_does_not_read_from_the_device(name, groups):
    """Forward, backward, optimizer, EMA and SWA, with meta tensors."""
    model: Any = build_model("resnet10t", 10, drop_path=0.1).to("meta").train()
    ema, swa = Ema(model, 0.999, warmup=True), Swa(model)
    step = TrainStep(
        model,
        model,
        optimizer=build_optimizer(name, model, lr=0.005, weight_decay=0.02, momentum=0.9),
        loss=Loss(kind="bce", smoothing=0.1, threshold=0.0, sum_classes=False),
        transform=transform(),
        compute=where("meta"),
        groups=groups,
        mean_groups=groups,
        seed=0,
        grad_clip=1.0,
        ema=ema,
    )
    for epoch in range(2):
        sums = step(epoch, iter([batch("meta")] * groups), lr=0.005, mixing=True).sums
        assert sums.device.type == "meta" and sums.shape == (3,)
        swa.update()
    with pytest.raises(RuntimeError):
        sums.tolist()
