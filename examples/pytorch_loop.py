"""The loader alone, in a plain PyTorch training loop: optimizer, mixed precision, evaluation, and a
checkpoint from which the loop continues in the middle of an epoch.

    python examples/pytorch_loop.py runs/my/train.beton runs/my/val.beton --checkpoint loop.pt

Trains torchvision's ResNet-18 on one GPU, or on the CPU if there is none. Run the same command
again after an interruption: it continues with the images that the loop had not seen, and on a CPU
the result is bit-identical to that of a loop that was never interrupted.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

from rsb_ffcv import EvalLoader, TrainLoader, normalize

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("train", help="train.beton")
parser.add_argument("val", help="val.beton")
parser.add_argument("--checkpoint", type=Path, required=True, help="file to save and continue")
parser.add_argument("--save-every", type=int, default=500, help="steps from one save to the next")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--resolution", type=int, default=224, help="pixels per side")
parser.add_argument("--lr", type=float, default=0.05, help="peak learning rate")
parser.add_argument("--workers", type=int, default=8, help="threads that load images")
parser.add_argument(
    "--max-minutes", type=float, default=1e9, help="then save and end: a job's time"
)


def evaluate(model: torch.nn.Module, loader: EvalLoader, device: torch.device) -> float:
    """Top-1 in percent. Each image of the file is counted once."""
    model.eval()
    correct = torch.zeros((), device=device)
    with torch.inference_mode(), torch.autocast(device.type, enabled=device.type == "cuda"):
        for images, labels, _ in loader:
            correct += (model(normalize(images)).argmax(1) == labels).sum()
    return 100 * correct.item() / len(loader.beton)


def main() -> None:
    options = parser.parse_args()
    ends = time.monotonic() + 60 * options.max_minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Batches are uint8 (n, height, width, 3) on the device. decode="gpu" decodes there, which takes
    # a tenth of the CPU time; the bytes are the same
    common = {
        "batch_size": options.batch_size,
        "resolution": options.resolution,
        "num_workers": options.workers,
        "device": device,
        "decode": "gpu" if device.type == "cuda" else "cpu",
    }
    train = TrainLoader(options.train, seed=0, rand_augment="rand-m7-mstd0.5-inc1", **common)
    val = EvalLoader(options.val, crop_ratio=0.95, **common)

    torch.manual_seed(0)
    model = resnet18(num_classes=train.beton.num_classes)
    model = model.to(device, memory_format=torch.channels_last)  # the layout that normalize gives
    optimizer = torch.optim.SGD(
        model.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-5, nesterov=True
    )
    total_steps = options.epochs * len(train)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps)
    scaler = torch.amp.GradScaler(enabled=device.type == "cuda")  # fp16 on a GPU, fp32 on a CPU

    # All that changes during training. The loader has no state of its own: its batches are a
    # function of seed, epoch and step
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    step = 0  # of the whole training
    if options.checkpoint.exists():
        saved = torch.load(options.checkpoint, map_location=device, weights_only=True)
        step = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        print(f"continuing at step {step} of {total_steps}", flush=True)

    def save() -> None:
        state = {name: part.state_dict() for name, part in parts.items()}
        unfinished = options.checkpoint.with_suffix(".part")
        torch.save({"step": step, **state}, unfinished)
        os.replace(unfinished, options.checkpoint)  # an interrupted save leaves the old file

    while step < total_steps:
        epoch, start_step = divmod(step, len(train))
        model.train()
        for images, labels, _ in train.epoch(epoch, start_step):
            with torch.autocast(device.type, enabled=device.type == "cuda"):
                loss = cross_entropy(model(normalize(images)), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            step += 1
            out_of_time = time.monotonic() > ends
            if step % options.save_every == 0 or out_of_time:
                save()
            if out_of_time and step < total_steps:
                print(f"out of time at step {step} of {total_steps}; run the command again")
                return
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}", end=", ")
        print(f"top-1 {evaluate(model, val, device):.2f} %", flush=True)
    save()
    train.close()
    val.close()


if __name__ == "__main__":
    main()
