"""Prints what a recipe will do: its epochs, the size of the model, the hours, what its file says
about it, and what departs from that file or from another recipe."""

import io
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby, takewhile
from pathlib import Path

import torch
from timm.layers import DropPath
from torch import nn

from rsb_ffcv import InputError, counted
from rsb_ffcv.atomic import atomic_file
from rsb_ffcv.config.options import as_dict
from rsb_ffcv.config.train import (
    RECIPE,
    PlanOptions,
    TrainConfig,
    images_per_step,
    processes,
    read_recipe,
)
from rsb_ffcv.learning.model import build_model
from rsb_ffcv.reporting.log import METRICS, read_metrics, table
from rsb_ffcv.training import build, facts
from rsb_ffcv.training.plan import Epoch, Plan

# float32 values for each parameter, beside the parameter and its gradient
STATES = {"sgd": 1, "lamb": 2, "adamw": 2}


def print_plan(config: TrainConfig, options: PlanOptions, files: Sequence[str] = ()) -> None:
    """Prints one line for each range of epochs with the same resolution, mixing and averaging, the
    head comment of the recipe with what departs from it, and what `options` asks for.

    files: that `config` was read from. The recipe is the last one with a head comment.

    A step takes training.global_batch images. If that is 0: training.batch_size x processes, of
    which there is one unless training.distributed is on.

    Raises InputError if the data file has fewer images than a step, or if a file cannot be read or
    written.
    """
    beton = build.read_file(config, "train")
    images = len(beton)
    c = config.training
    batch, started = images_per_step(config), processes(config)
    if batch > images:
        of = f"training.batch_size={c.batch_size}"
        if c.global_batch:
            of = f"training.global_batch={batch}"
        elif started > 1:
            of += f" with {started} processes"
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
    model = meta_model(config, beton.num_classes)
    print(table([*_size(config, model), *_hours(plan, options, total, speed=speed)]))
    _print_recipe(config, files)
    if other is not None:
        _print_differences(config, other, options.against)
    if options.picture:
        _draw(plan, drop_paths(model), Path(options.picture))


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


def meta_model(c: TrainConfig, num_classes: int) -> nn.Module:
    """The model, built without memory."""
    with torch.device("meta"):
        return build_model(c.model.arch, num_classes, drop_path=c.model.drop_path)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def drop_paths(model: nn.Module) -> list[float]:
    """The probability of stochastic depth of each branch that has one, from first to last."""
    return [part.drop_prob for part in model.modules() if isinstance(part, DropPath)]


def _size(c: TrainConfig, model: nn.Module) -> list[tuple[str, str]]:
    """Lines about the model."""
    parameters, rates = count_parameters(model), drop_paths(model)
    rows = [(c.model.arch, f"{parameters / 1e6:,.1f} M parameters")]
    text = f"{c.model.drop_path:g}"
    if rates:
        text = (
            f"{rates[0]:.3g} to {rates[-1]:.3g}, over {counted(len(rates), 'branch', 'branches')}"
        )
    rows.append(("drop path", text))
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
    ours, theirs = ({key: as_dict(c)[key] for key in RECIPE} for c in (config, other))
    found = facts.changes(theirs, ours)
    print(f"\n{len(found)} options differ from {name}:" if found else f"\nthe same as {name}")
    if found:
        print_changes(found, "there")


def print_changes(changed: Mapping[str, tuple[object, object]], other: str) -> None:
    """Prints the options of `facts.changes` as a table. other: heads the column of old values."""
    rows = [
        (key, str(facts.shown(old)), str(facts.shown(new))) for key, (old, new) in changed.items()
    ]
    print_columns([("option", other, "here"), *rows])


def head_comment(path: str) -> str:
    """The comment at the head of a recipe's file, without `#`; empty if there is none."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    head = takewhile(lambda line: line.startswith("#"), lines)
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in head)


def _print_recipe(config: TrainConfig, files: Sequence[str]) -> None:
    described = [path for path in files if head_comment(path)]
    if described:
        recipe = described[-1]
        print(f"\nabout {recipe}:\n{head_comment(recipe)}")
        _print_differences(config, read_recipe(recipe), recipe)


def print_columns(rows: Sequence[tuple[str, ...]]) -> None:
    """Prints a table, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{text:<{width}}" for text, width in zip(row, widths)).rstrip())


def _draw(plan: Plan, rates: list[float], path: Path) -> None:
    """Writes a PNG with the learning rate and the resolution of each epoch, and the drop paths
    `rates` of the model's branches, if it has any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    epochs = [plan[number] for number in range(plan.epochs)]
    points = [
        (epoch.number + step / epoch.steps, epoch.lr(step))
        for epoch in epochs
        for step in range(0, epoch.steps, max(1, epoch.steps // 20))
    ]
    count = 3 if rates else 2
    figure, axes = plt.subplots(count, 1, figsize=(8, 2.5 * count), layout="constrained")
    axes[0].sharex(axes[1])
    axes[0].tick_params(labelbottom=False)
    axes[0].plot(*zip(*points), color="#0072B2")
    axes[0].set(ylabel="learning rate")
    axes[1].step(
        [epoch.number for epoch in epochs] + [plan.epochs],
        [epoch.resolution for epoch in epochs] + [epochs[-1].resolution],
        where="post",
        color="#D55E00",
    )
    axes[1].set(xlabel="epochs", ylabel="resolution, px")
    if rates:
        axes[2].plot(range(1, len(rates) + 1), rates, "o-", ms=3, color="#000000")
        axes[2].set(xlabel="residual branches, from first to last", ylabel="drop path")
        axes[2].set_ylim(bottom=0)
    for epoch in epochs:
        for axis in axes[:2]:
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
