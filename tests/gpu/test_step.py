"""The training step on CUDA: it does not synchronize, and LAMB takes few kernel launches. Skipped
if there is no CUDA device."""

from inspect import signature
from typing import Any

import numpy as np
import pytest
import timm
import torch

from rsb_ffcv.learning.average import Ema
from rsb_ffcv.learning.lamb import Lamb
from rsb_ffcv.learning.loss import Loss
from rsb_ffcv.learning.model import build_model
from rsb_ffcv.learning.optimizer import build_optimizer, decay_groups
from rsb_ffcv.loading import Batch
from rsb_ffcv.loading.batch import BatchTransform
from rsb_ffcv.training import compute
from rsb_ffcv.training.step import OwnTime, TrainStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("precision, clip", [("fp16", 0.0), ("fp16", 1.0), ("bf16", 0.0)])
@pytest.mark.parametrize("optimizer", ["lamb", "sgd", "adamw"])
def test_no_step_synchronizes_with_the_device(precision, clip, optimizer):
    where = compute.set_up("cuda", precision, compile="0", channels_last=True, threads=0)
    model: Any = build_model("resnet18", 10)
    model = model.to(where.device, memory_format=where.memory_format)
    built = build_optimizer(optimizer, model, lr=0.005, weight_decay=0.02, momentum=0.9)
    step = TrainStep(
        model,
        model.train(),
        optimizer=built,
        loss=Loss(kind="bce"),
        transform=BatchTransform(
            seed=0, mixup_alpha=0.2, cutmix_alpha=1.0, erase_prob=0.5, erase_mode="pixel"
        ),
        compute=where,
        groups=2,
        mean_groups=2,
        seed=0,
        grad_clip=clip,
        ema=Ema(model, 0.9, warmup=True),
    )
    group = Batch(
        torch.randint(0, 256, (16, 64, 64, 3), dtype=torch.uint8, device=where.device),
        torch.arange(16, device=where.device) % 10,
        np.arange(16),
    )
    step(0, iter([group] * 2), lr=0.001, mixing=True)
    step.own_time = OwnTime(where.device)  # as with several processes
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step(0, iter([group] * 2), lr=0.001, mixing=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    own_ms = step.own_time.read()
    assert len(own_ms) == 3 and all(0 < ms < 60_000 for ms in own_ms)


def test_lamb_on_the_device_equals_timms_with_a_fifth_of_its_kernel_launches():
    """Kernel launches as counted by the profiler. timm: a loop over the parameters, which newer
    versions call foreach=False."""
    loop: dict[str, Any] = {}
    if "foreach" in signature(timm.optim.Lamb).parameters:
        loop["foreach"] = False
    found = {}
    for name, make in (
        ("timm", lambda groups: timm.optim.Lamb(groups, lr=0.005, **loop)),
        ("ours", lambda groups: Lamb(groups, lr=0.005)),
    ):
        torch.manual_seed(0)
        model = build_model("resnet18", 1000).cuda()
        optimizer = make(decay_groups(model, 0.02))
        for number in range(6):
            generator = torch.Generator("cuda").manual_seed(number)
            for parameter in model.parameters():
                parameter.grad = (
                    torch.randn(parameter.shape, generator=generator, device="cuda") * 0.01
                )
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA]
            ) as profile:
                optimizer.step()
                torch.cuda.synchronize()
        launches = sum(
            event.count
            for event in profile.key_averages()
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        found[name] = launches, [parameter.detach().clone() for parameter in model.parameters()]
    print({name: launches for name, (launches, _) in found.items()})
    assert found["ours"][0] * 5 <= found["timm"][0]
    for ours, theirs in zip(found["ours"][1], found["timm"][1]):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm() + 1e-9
