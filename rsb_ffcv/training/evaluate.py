"""Accuracy on an evaluation file. Each image is counted exactly once, over any number of
processes."""

import json
import re
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from rsb_ffcv import InputError
from rsb_ffcv.config.train import TrainConfig
from rsb_ffcv.loading import EvalLoader
from rsb_ffcv.loading.batch import normalize
from rsb_ffcv.reporting.console import Console
from rsb_ffcv.training import build
from rsb_ffcv.training.compute import Compute, sum_over_processes


def read_label_sets(path: str, names: list[str], classes: int) -> torch.Tensor:
    """Reads the accepted labels of each image: int64 (images, most labels of an image), padded with
    -1.

    path: a JSON list with one entry per image, a label or a list of labels. An empty list excludes
        the image (ImageNet-ReaL's format).
    names: the image names of the evaluation file. If all of them are ImageNet's
        (ILSVRC2012_val_00000001.JPEG), these numbers index the entries, as in ImageNet-ReaL. Else
        the entries are in the order of the file.
    classes: labels are 0 .. classes - 1.

    Raises InputError if the file cannot be read or does not fit the evaluation file.
    """
    fix = "give a JSON list of labels, or of lists of labels, one per image of data.val_dataset"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"validation.labels={path}: cannot be read ({error}); {fix}") from error
    sets = (
        [entry if isinstance(entry, list) else [entry] for entry in content]
        if isinstance(content, list)
        else []
    )
    numbered = [re.search(r"ILSVRC2012_val_(\d{8})\.\w+$", name) for name in names]
    if all(numbered):
        order = [int(found[1]) - 1 for found in numbered if found]
        if not 0 <= min(order) <= max(order) < len(sets):
            raise InputError(
                f"validation.labels={path}: has {len(sets)} entries, but data.val_dataset has the "
                f"image {names[order.index(max(order))]}; {fix}"
            )
        sets = [sets[place] for place in order]
    if len(sets) != len(names):
        raise InputError(
            f"validation.labels={path}: has {len(sets)} entries, but data.val_dataset has "
            f"{len(names)} images; {fix}"
        )
    for number, labels in enumerate(sets):
        if not all(type(label) is int and 0 <= label < classes for label in labels):
            raise InputError(
                f"validation.labels={path}: the entry of {names[number]} is {labels}, but classes "
                f"are 0 .. {classes - 1}; {fix}"
            )
    table = torch.full((len(sets), max(map(len, sets), default=0) or 1), -1)
    for row, labels in zip(table, sets):
        row[: len(labels)] = torch.tensor(labels, dtype=torch.int64)
    return table


@torch.no_grad()
def evaluate(
    model: Callable[[torch.Tensor], torch.Tensor],
    loader: EvalLoader,
    *,
    compute: Compute,
    flip_tta: bool,
    label_sets: torch.Tensor | None = None,
    per_class: torch.Tensor | None = None,
    per_image: torch.Tensor | None = None,
    after_batch: Callable[[int], object] = lambda number: None,
    prepare: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict:
    """Evaluates `model`, which is in eval mode, over all processes.

    Returns "top1" and "top5" in per cent, "val_loss" (mean cross-entropy) and "images". With
    `label_sets` it also returns "relabelled_images", the number of images with at least one
    accepted label, and "relabelled_top1" over these, in per cent.

    model: prepared images -> logits (n, classes).
    loader: this process's batches.
    compute: device, precision and processes.
    flip_tta: average the logits of each image and its mirror image.
    label_sets: accepted labels of each image, see read_label_sets.
    per_class: zeros (classes, 3), float64, on the device; images, correct, and correct in 5 of each
        class are added to it, over all processes.
    per_image: zeros (images of the file, 3), float64, on the device; of each image, the predicted
        class, 1 if it is correct in 5, and the loss are written to it, over all processes.
    after_batch: called with each batch's number.
    prepare: uint8 images (n, H, W, 3) -> the model's input; None: normalized images (n, 3, H, W).
    """

    def normalized(images: torch.Tensor) -> torch.Tensor:
        return normalize(images).contiguous(memory_format=compute.memory_format)

    prepare = prepare or normalized
    # correct, correct in 5, loss; of the relabelled images: correct, all
    counts = torch.zeros(5, device=compute.device, dtype=torch.float64)
    seen = 0
    with closing(iter(loader)) as batches:
        for number, (images, labels, samples) in enumerate(batches):
            with compute.autocast():
                logits = model(prepare(images))
                if flip_tta:
                    logits = (logits + model(prepare(images.flip(2)))) / 2
            logits = logits.float()
            best = logits.topk(min(5, logits.shape[1]), 1).indices
            right = best == labels[:, None]
            accepted = (
                torch.zeros((), device=compute.device),
                torch.zeros((), device=compute.device),
            )
            if label_sets is not None:
                sets = label_sets[samples].to(compute.device, non_blocking=True)
                accepted = (best[:, :1] == sets).any(1).sum(), (sets >= 0).any(1).sum()
            counts += torch.stack(
                [
                    right[:, 0].sum(),
                    right.sum(),
                    F.cross_entropy(logits, labels, reduction="sum"),
                    *accepted,
                ]
            )
            if per_class is not None:
                found = torch.stack([torch.ones_like(right[:, 0]), right[:, 0], right.any(1)], 1)
                per_class.index_add_(0, labels, found.to(per_class.dtype))
            if per_image is not None:
                losses = F.cross_entropy(logits, labels, reduction="none")
                rows = torch.from_numpy(samples).to(compute.device)
                columns = (best[:, 0], right.any(1), losses)
                per_image[rows] = torch.stack([column.double() for column in columns], 1)
            seen += len(labels)
            after_batch(number)
    for counted in (per_class, per_image):  # a process leaves the rows of the others at 0
        if counted is not None:
            sum_over_processes(counted)
    totals = torch.cat([counts, torch.tensor([seen], device=counts.device)])
    correct, correct5, loss, accepted, relabelled, images = sum_over_processes(totals).tolist()
    result = {
        "top1": 100 * correct / images,
        "top5": 100 * correct5 / images,
        "val_loss": loss / images,
        "images": int(images),
    }
    if label_sets is not None:
        result |= {
            "relabelled_top1": 100 * accepted / max(relabelled, 1),
            "relabelled_images": int(relabelled),
        }
    return result


class Evaluator:
    """Evaluates the weights of a run on its evaluation file.

    config: for the section validation.
    models: by the prefix of their results: "" for the raw weights, "ema_", "swa_".
    loader: this process's batches.
    label_sets: accepted labels of each image, see read_label_sets; or None.
    where: device, precision and processes.
    console: shows the progress.
    """

    def __init__(
        self,
        config: TrainConfig,
        models: dict[str, torch.nn.Module],
        *,
        loader: EvalLoader,
        label_sets: torch.Tensor | None,
        where: Compute,
        console: Console,
    ) -> None:
        self.config, self.models, self._loader = config, models, loader
        self._label_sets, self._compute, self._console = label_sets, where, console

    def __call__(
        self,
        *,
        swa: torch.nn.Module | None,
        after_batch: Callable[[], None] | None = None,
    ) -> dict:
        """The results of `evaluate` for each of the models under its prefix, with "val_images" and
        "val_seconds".

        swa: the averaged model with batch-norm statistics, if there is one. That of the run has
            none before its end.
        after_batch: called after each batch that every process has.
        """
        row, started = dict[str, Any](), time.perf_counter()
        for prefix, model in self.models.items():
            if prefix == "swa_":
                if swa is None:
                    continue
                model = swa
            title = f"validation {prefix[:-1].upper()}".strip()
            result = self._evaluate(model, title, after_batch=after_batch)
            row |= {prefix + name: number for name, number in result.items() if name != "images"}
            row["val_images"] = result["images"]
        return row | {"val_seconds": time.perf_counter() - started}

    def each_image(self, prefix: str, *, after_batch: Callable[[], None]) -> torch.Tensor:
        """Evaluates one of the models once more. Returns the predicted class, 1 if the label is
        among the five best, and the cross-entropy of each image of the file: float64 (images, 3),
        on the CPU.

        prefix: of the model.
        after_batch: called after each batch that every process has.
        """
        images = len(self._loader.beton)
        found = torch.zeros(images, 3, dtype=torch.float64, device=self._compute.device)
        self._evaluate(self.models[prefix], "report", after_batch=after_batch, per_image=found)
        return found.cpu()

    def _evaluate(
        self,
        model: torch.nn.Module,
        title: str,
        *,
        after_batch: Callable[[], None] | None,
        per_image: torch.Tensor | None = None,
    ) -> dict:
        """The results of `evaluate`, with the progress under `title`."""
        model.eval()
        loader = self._loader
        common = len(loader.beton) // (loader.batch_size * self._compute.world_size)
        with (
            build.within_memory(self.config, "validation", self.config.validation.resolution),
            self._console.bar(title, len(loader)) as bar,
        ):

            def advance(number: int) -> None:
                bar.update()
                if after_batch is not None and number < common:
                    after_batch()

            return evaluate(
                model,
                loader,
                compute=self._compute,
                flip_tta=self.config.validation.lr_tta,
                label_sets=self._label_sets,
                per_image=per_image,
                after_batch=advance,
            )
