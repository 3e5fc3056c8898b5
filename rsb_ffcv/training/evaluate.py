"""Accuracy on an evaluation file: exactly its images, each counted once, over any number of processes."""
from contextlib import closing

import torch
from torch.nn import functional as F

from rsb_ffcv.loading import EvalLoader
from rsb_ffcv.loading.batch import normalize
from rsb_ffcv.training.compute import Compute, sum_over_processes


@torch.no_grad()
def evaluate(model, loader: EvalLoader, compute: Compute, flip_tta: bool, progress=None) -> dict:
    """{"top1", "top5": per cent, "loss": cross-entropy, "images"} of `model` in eval mode over all processes.

    flip_tta: the logits of the image and of its mirror image are averaged.
    """
    model.eval()
    counts = torch.zeros(3, device=compute.device, dtype=torch.float64)  # correct, correct in 5, loss
    seen = 0
    with closing(iter(loader)) as batches:
        for images, labels in batches:
            images = normalize(images).contiguous(memory_format=compute.memory_format)
            with compute.autocast():
                logits = model(images)
                if flip_tta:
                    logits = (logits + model(images.flip(3))) / 2
            logits = logits.float()
            best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
            counts += torch.stack([best[:, 0].sum(), best.sum(), F.cross_entropy(logits, labels, reduction="sum")])
            seen += len(labels)
            if progress is not None:
                progress.update()
    totals = torch.cat([counts, torch.tensor([seen], device=counts.device)])
    correct, correct5, loss, images = sum_over_processes(totals).tolist()
    return {"top1": 100 * correct / images, "top5": 100 * correct5 / images, "loss": loss / images,
            "images": int(images)}
