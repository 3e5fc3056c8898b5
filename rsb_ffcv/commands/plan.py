"""Prints what a recipe will do: its epochs, the size of the model, the hours, and what departs from
another recipe."""

import io
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch

from rsb_ffcv import InputError, counted
from rsb_ffcv.atomic import atomic_file
from rsb_ffcv.beton import read_beton
from rsb_ffcv.config.options import as_dict
from rsb_ffcv.config.train import PlanOptions, TrainConfig, read_recipe
from rsb_ffcv.learning.model import build_model
from rsb_ffcv.reporting.log import METRICS, read_metrics, table
from rsb_ffcv.training import facts
from rsb_ffcv.training.plan import Epoch, Plan

# Sections whose options define what is trained and how it is evaluated
COMPARED = (
    "model",
    "resolution",
    "augment",
    "mix",
    "lr",
    "training",
    "ema",
    "swa",
    "validation",
)
# float32 values for each parameter, beside the parameter and its gradient
STATES = {"sgd": 1, "lamb": 2, "adamw": 2}


def print_plan(config: TrainConfig, options: PlanOptions) -> None:
    """Prints one line for each range of epochs with the same resolution, mixing and averaging, then
    what `options` asks for.

    A step takes training.global_batch images. If that is 0: training.batch_size x processes, of
    which there is one unless training.distributed is on.

    Raises InputError if the data file has fewer images than a step, or if a file cannot be read or
    written.
    """
    try:
        beton = read_beton(config.data.train_dataset)
    except InputError as error:
        raise InputError(f"data.train_dataset={error}") from error.__cause__
    images = len(beton)
    c = config.training
    processes = config.dist.world_size if c.distributed else 1
    batch = c.global_batch or c.batch_size * processes
    if batch > images:
        of = f"training.batch_size={c.batch_size}"
        if c.global_batch:
            of = f"training.global_batch={batch}"
        elif processes > 1:
            of += f" with {processes} processes"
        raise InputError(
            f"{of}: data.train_dataset={config.data.train_dataset} has "
            f"only {images} images; lower it"
        )
    plan = Plan(config, images // batch)
    total = plan.total_steps * batch
    speed = _speed(options.images_per_s)
    other = read_recipe(options.against) if options.against else None
    print(
        f"{counted(plan.epochs, 'epoch')} of {counted(plan.steps_per_epoch, 'step')} of "
        f"{batch} images: {counted(plan.total_steps, 'step')}"
    )
    _print_epochs(plan)
    print()
    print(table([*_size(config, beton.num_classes), *_hours(plan, options, total, speed=speed)]))
    if other is not None:
        _print_differences(config, other, options.against)
    if options.picture:
        _draw(plan, Path(options.picture))


def _print_epochs(plan: Plan) -> None:
    head = ("epochs", "resolution", "mixing", "averaging (SWA)", "learning rate")
    rows = [head]
    epochs = (plan[number] for number in range(plan.epochs))
    for (resolution, mixing, averaging), group in groupby(epochs, _kind):
        found = list(group)
        last = plan.steps_per_epoch - 1
        first, final = found[0].lr(0), found[-1].lr(last)
        highest = max(epoch.lr(step) for epoch in found for step in (0, last))
        rows.append(
            (
                " to ".join(
                    dict.fromkeys(str(epoch.number + 1) for epoch in (found[0], found[-1]))
                ),
                str(resolution),
                "yes" if mixing else "no",
                "yes" if averaging else "no",
                f"{first:.3g} to {final:.3g}, at most {highest:.3g}",
            )
        )
    print_columns(rows)


def count_parameters(c: TrainConfig, num_classes: int) -> int:
    """The number of parameters of the model, which is built without memory."""
    with torch.device("meta"):
        model = build_model(c.model.arch, num_classes, drop_path=c.model.drop_path)
    return sum(parameter.numel() for parameter in model.parameters())


def _size(c: TrainConfig, num_classes: int) -> list[tuple[str, str]]:
    """Lines about the model."""
    parameters = count_parameters(c, num_classes)
    rows = [
        (c.model.arch, f"{parameters / 1e6:,.1f} M parameters, drop path {c.model.drop_path:g}")
    ]
    states = STATES.get(c.training.optimizer)
    if states is not None:
        copies = 2 + states + bool(c.ema.decay) + bool(c.swa.epochs)
        rows.append(
            (
                "memory of a GPU",
                f"{4 * copies * parameters / 1e9:.2f} GB for weights, gradients, optimizer and "
                f"averages; activations are not included",
            )
        )
    return rows


def _speed(given: str) -> tuple[float, float] | None:
    """Images/s of plan.images_per_s, and the seconds of a validation; None if it is empty."""
    if not given:
        return None
    fix = "give a number above 0, or the folder of a run"
    try:
        number = float(given)
    except ValueError:
        path = Path(given) / METRICS
        try:
            rows = read_metrics(Path(given))
        except (OSError, ValueError) as error:
            raise InputError(
                f"plan.images_per_s={given}: no number, and {path} cannot be read; {fix}"
            ) from error
        if not rows:
            raise InputError(f"plan.images_per_s={given}: {path} is empty; {fix}") from None
        return (
            statistics.median(row["images_per_s"] for row in rows),
            statistics.median(row.get("val_seconds", 0.0) for row in rows),
        )
    if not 0 < number < float("inf"):
        raise InputError(f"plan.images_per_s={given}: {fix}")
    return number, 0.0


def _hours(
    plan: Plan, options: PlanOptions, images: int, *, speed: tuple[float, float] | None
) -> list[tuple[str, str]]:
    rows = [("images", f"{images:,}")]
    if speed is None:
        return rows
    rate, validation = speed
    hours = (images / rate + validation * plan.epochs) / 3600
    rows.append(
        (
            "estimated hours",
            f"{hours:,.1f} at {rate:,.0f} images/s, "
            + ("with" if validation else "without")
            + " validation",
        )
    )
    if options.price:
        rows.append(
            (
                "estimated costs",
                f"{hours * options.gpus * options.price:,.2f} for {counted(options.gpus, 'GPU')} "
                f"at {options.price:g} an hour",
            )
        )
    return rows


def _print_differences(config: TrainConfig, other: TrainConfig, name: str) -> None:
    ours, theirs = ({key: as_dict(c)[key] for key in COMPARED} for c in (config, other))
    found = facts.changes(theirs, ours)
    print(f"\n{len(found)} options differ from {name}:" if found else f"\nthe same as {name}")
    rows = [("option", "there", "here")]
    rows += [
        (key, str(facts.shown(old)), str(facts.shown(new))) for key, (old, new) in found.items()
    ]
    if found:
        print_columns(rows)


def print_columns(rows: Sequence[tuple[str, ...]]) -> None:
    """Prints a table, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{text:<{width}}" for text, width in zip(row, widths)).rstrip())


def _draw(plan: Plan, path: Path) -> None:
    """Writes a PNG with the learning rate and the resolution of each epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    epochs = [plan[number] for number in range(plan.epochs)]
    points = [
        (epoch.number + step / epoch.steps, epoch.lr(step))
        for epoch in epochs
        for step in range(0, epoch.steps, max(1, epoch.steps // 20))
    ]
    figure, axes = plt.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    axes[0].plot(*zip(*points), color="#0072B2")
    axes[0].set(ylabel="learning rate")
    axes[1].step(
        [epoch.number for epoch in epochs] + [plan.epochs],
        [epoch.resolution for epoch in epochs] + [epochs[-1].resolution],
        where="post",
        color="#D55E00",
    )
    axes[1].set(xlabel="epochs", ylabel="resolution, px")
    for epoch in epochs:
        for axis in axes:
            if epoch.mixing:
                axis.axvspan(epoch.number, epoch.number + 1, color="#E69F00", alpha=0.12, lw=0)
            if epoch.averaging:
                axis.axvspan(epoch.number, epoch.number + 1, color="#009E73", alpha=0.2, lw=0)
    axes[0].set_title("mixing: orange; averaging (SWA): green", fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, dpi=100, format="png")
    plt.close(figure)
    with atomic_file(path, "give another plan.picture") as file:
        file.write(png.getbuffer())


def _kind(epoch: Epoch) -> tuple[int, bool, bool]:
    return epoch.resolution, epoch.mixing, epoch.averaging
