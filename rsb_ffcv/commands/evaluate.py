"""Evaluates a file of weights on an evaluation file."""

import csv
import io
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rsb_ffcv import InputError, counted, option_names
from rsb_ffcv.atomic import atomic_file
from rsb_ffcv.beton import Beton
from rsb_ffcv.config.train import EvalOptions, TrainConfig
from rsb_ffcv.export.formats import read_program
from rsb_ffcv.learning.model import build_model
from rsb_ffcv.learning.weights import load_weights, model_of
from rsb_ffcv.loading.batch import MEAN
from rsb_ffcv.reporting.console import Console
from rsb_ffcv.training import build, compute
from rsb_ffcv.training.compute import Compute
from rsb_ffcv.training.evaluate import evaluate, read_label_sets


def evaluate_weights(c: TrainConfig, options: EvalOptions) -> None:
    """Prints the results as one JSON line, and writes those of each class to options.csv.

    A file of this program says which model it is of; for other files, c.model.arch does, and
    c.model.num_classes (0: the classes of the evaluation file). The programs that the command
    export writes (.pt2, .onnx) are evaluated as they are.

    Raises InputError if a file cannot be read or written, or if the files do not fit each other.
    """
    path = Path(options.weights)
    where = build.hardware(c)
    console = Console(where.is_main)
    threads = where.loader_threads(c.data.num_workers)
    decode = "cpu" if c.data.decode == "auto" else c.data.decode
    with closing(build.val_loader(c, where, threads, decode=decode)) as loader:
        beton = loader.beton
        is_program = path.suffix in (".pt2", ".onnx")
        subject = (_program if is_program else _model)(c, options, where, beton=beton)
        if beton.num_classes > subject.classes:
            raise InputError(
                f"data.val_dataset={beton.path}: has "
                f"{counted(beton.num_classes, 'class', 'classes')}, and eval.weights={path} are of "
                f"a model with {subject.classes}; use another file"
            )
        console.info(subject.title)
        per_class = torch.zeros(subject.classes, 3, dtype=torch.float64, device=where.device)
        sets = (
            read_label_sets(c.validation.labels, beton.names(), subject.classes)
            if c.validation.labels
            else None
        )
        with (
            build.within_memory(c, "validation", c.validation.resolution),
            console.bar("evaluation", len(loader)) as bar,
        ):
            result = evaluate(
                subject.run,
                loader,
                compute=where,
                flip_tta=c.validation.lr_tta,
                label_sets=sets,
                per_class=per_class,
                after_batch=lambda _: bar.update(),
                prepare=subject.prepare,
            )
    if where.is_main:
        if options.csv:
            _write_classes(beton, per_class.cpu(), Path(options.csv))
        print(json.dumps({"weights": str(path), "which": options.which, **result}))
    compute.destroy_process_group()


class _Subject(NamedTuple):
    """What is evaluated.

    run: prepared images -> logits.
    prepare: see `evaluate`.
    classes: number of outputs.
    title: what was loaded, for the console.
    """

    run: Callable[[torch.Tensor], torch.Tensor]
    prepare: Callable[[torch.Tensor], torch.Tensor] | None
    classes: int
    title: str


def _model(c: TrainConfig, options: EvalOptions, where: Compute, *, beton: Beton) -> _Subject:
    """A model with the weights of a file. beton: the evaluation file."""
    path = Path(options.weights)
    with option_names({"path": "eval.weights"}):
        known = model_of(path)
    arch = known.get("arch", c.model.arch)
    classes = known.get("num_classes") or c.model.num_classes or beton.num_classes
    with option_names(build.TRAIN_OPTIONS):
        model: Any = build_model(
            arch, classes, blurpool=known.get("blurpool", c.training.use_blurpool), mean=MEAN
        )
    with option_names({**build.TRAIN_OPTIONS, "path": "eval.weights", "which": "eval.which"}):
        loaded = load_weights(model, path, which=options.which)
    model = model.to(where.device, memory_format=where.memory_format).eval()
    return _Subject(model, None, classes, f"{arch}: {loaded}")


def _program(c: TrainConfig, options: EvalOptions, where: Compute, *, beton: Beton) -> _Subject:
    """A program that the command export wrote."""
    path = Path(options.weights)
    with option_names({"path": "eval.weights", "formats": "eval.weights"}):
        program = read_program(path, where.device)
    if options.which != "model":
        raise InputError(
            f"eval.which={options.which}: eval.weights={path} has one set of weights; use model"
        )
    names = beton.about.classes if beton.about else program.classes
    if names != program.classes:
        raise InputError(
            f"data.val_dataset={beton.path}: its classes ({', '.join(names[:3])}, ...) are not "
            f"those of eval.weights={path} ({', '.join(program.classes[:3])}, ...); use a file "
            f"with these"
        )
    if program.side != c.validation.resolution:
        raise InputError(
            f"validation.resolution={c.validation.resolution}: eval.weights={path} takes images of "
            f"{program.side} px; use that"
        )
    classes = len(program.classes)
    title = f"the program {path}: {counted(classes, 'class', 'classes')}"
    return _Subject(program.run, program.prepare, classes, title)


def _write_classes(beton: Beton, counts: torch.Tensor, path: Path) -> None:
    """Writes label, name, images, top-1 and top-5 of each class that has images."""
    names = beton.about.classes if beton.about else []
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("label", "name", "images", "top1", "top5"))
    for label, (images, correct, correct5) in enumerate(counts.tolist()):
        if images:
            name = names[label] if label < len(names) else ""
            table.writerow(
                (
                    label,
                    name,
                    int(images),
                    f"{100 * correct / images:.2f}",
                    f"{100 * correct5 / images:.2f}",
                )
            )
    with atomic_file(path, "give another eval.csv") as file:
        file.write(text.getvalue().encode())
