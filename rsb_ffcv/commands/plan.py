"""Prints the epochs of a recipe as a table."""

from itertools import groupby

from rsb_ffcv import InputError, counted
from rsb_ffcv.beton import read_beton
from rsb_ffcv.config.train import TrainConfig
from rsb_ffcv.training.plan import Epoch, Plan


def print_plan(config: TrainConfig) -> None:
    """Prints one line for each range of epochs with the same resolution, mixing and averaging.

    A step takes training.global_batch images. If that is 0: training.batch_size x processes, of
    which there is one unless training.distributed is on.
    Raises InputError if the data file has fewer images than a step.
    """
    try:
        images = len(read_beton(config.data.train_dataset))
    except InputError as error:
        raise InputError(f"data.train_dataset={error}") from error.__cause__
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
    print(
        f"{counted(plan.epochs, 'epoch')} of {counted(plan.steps_per_epoch, 'step')} of "
        f"{batch} images: {counted(plan.total_steps, 'step')}"
    )
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
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{text:<{width}}" for text, width in zip(row, widths)).rstrip())


def _kind(epoch: Epoch) -> tuple[int, bool, bool]:
    return epoch.resolution, epoch.mixing, epoch.averaging
