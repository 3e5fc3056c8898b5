"""Decoding on a GPU: its own stream beside a busy one, bounded memory, and batches that no later
batch overwrites. tests/parity/test_gpu.py compares the pixels. Skipped without a CUDA device."""

import pytest
import torch

from rsb_ffcv.loading import TrainLoader

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def loader(betons, decode="gpu", **options):
    return TrainLoader(
        betons / "train.beton",
        **{
            "batch_size": 16,
            "resolution": 96,
            "num_workers": 4,
            "rand_augment": "rand-m7-mstd0.5-inc1",
            "device": "cuda",
            "decode": decode,
            **options,
        },
    )


def test_batches_are_right_beside_a_busy_stream(betons):
    """100 epochs of a few batches. Each batch is kept and compared after the next ones were made,
    while another stream computes and its memory is freed and allocated again."""
    made, plain = loader(betons), loader(betons, decode="cpu", device="cpu")
    other, work = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for epoch in range(100):
        kept = []
        for batch in made.epoch(epoch):
            with torch.cuda.stream(other):
                for _ in range(3):
                    work = torch.tanh(work @ work)
            kept.append(batch)
            torch.empty_like(batch.images).fill_(7)
        for batch, expected in zip(kept, plain.epoch(epoch), strict=True):
            assert torch.equal(batch.images.cpu(), expected.images)
            assert torch.equal(batch.labels.cpu(), expected.labels)


def test_no_batch_makes_the_host_wait_for_the_device(betons):
    """The status of a batch is read after the next batch has been sent; torch sees no
    synchronization."""
    made = loader(betons)
    list(made.epoch(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = torch.zeros((), device="cuda")
        for batch in made.epoch(1):
            total += batch.images.float().mean()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(total) > 0


def test_changing_resolutions_do_not_leak_device_memory(betons):
    made, used = loader(betons), []
    for epoch in range(12):
        made.resolution = (64, 128, 96, 160)[epoch % 4]
        for _ in made.epoch(epoch):
            pass
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert max(used[8:]) <= max(used[4:8])
