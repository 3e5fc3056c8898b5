"""Shortens a recipe: the same phases in a few epochs, with few images and a small model.

In: a recipe. Out: a recipe that the trainer runs as it is, and which of its epochs corresponds to
which one of the original.

A phase is what lies between two borders: an epoch at which the learning rate's rule, the
resolution, mixing or averaging changes. Each phase keeps at least one epoch, and the long ones keep
their proportions. The strength of every augmentation, the loss, the optimizer and the learning
rates are the recipe's.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch

from rsb_ffcv import InputError, option_names
from rsb_ffcv.config.train import EmaOptions, ResolutionOptions, TrainConfig, images_per_step
from rsb_ffcv.learning.layers import freeze
from rsb_ffcv.learning.model import build_model, check_arch, check_input_size
from rsb_ffcv.training import plan
from rsb_ffcv.training.build import TRAIN_OPTIONS

EPOCHS = 6  # of a recipe without short phases
IMAGES = 256  # of an epoch, unless two steps take more
BATCH_SIZES = (16, 8, 4, 2)
# Resolutions are divided by this, and rounded to multiples of 8
SMALLER, SMALLEST_SIDE = 5, 32


@dataclass(frozen=True, kw_only=True)
class Short:
    """A shortened recipe.

    config: the recipe to run.
    steps: of an epoch.
    sides: the resolutions in pixels, from the first on; one for each resolution of the original.
    borders: the epochs at which a phase begins, and the end: (position in the original, position
        here, what begins there). Positions are counted from 0; in the original they may be
        fractional.
    """

    config: TrainConfig
    steps: int
    sides: list[int]
    borders: list[tuple[float, int, str]]

    def here(self, position: float) -> int:
        """The position here of a border of the original."""
        return next(here for there, here, _ in self.borders if there == position)


def groups_per_step(c: TrainConfig) -> int:
    """The mix groups of an optimizer step of the recipe."""
    images = images_per_step(c)
    groups, rest = divmod(images, c.training.batch_size)
    if rest or groups < 1:
        raise InputError(
            f"training.global_batch={images} is not a multiple of training.batch_size="
            f"{c.training.batch_size}; change one of them"
        )
    return groups


def shorten(
    c: TrainConfig,
    *,
    images: int,
    available: int,
    num_classes: int,
    train: Path,
    val: Path,
    folder: Path,
) -> Short:
    """Shortens the recipe `c`.

    images: of an epoch of the original, for the horizon of the EMA.
    available: images of `train`; an epoch takes at most so many.
    num_classes: the value of model.num_classes.
    train, val: the files to use.
    folder: of the run.

    Raises InputError if the images do not suffice for two steps, or if the recipe is invalid.
    """
    groups = groups_per_step(c)
    batch, steps = _sizes(groups, available)
    borders, levels = _borders(c)
    arch = small_model(c.model.arch)
    short = Short(config=c, steps=steps, sides=_sides(c, arch, levels), borders=borders)
    here, end = short.here, float(c.training.epochs)
    epochs, first, swa_at = here(end), float(c.lr.from_epoch), end - c.swa.epochs

    def since_first(count: float) -> int:
        """Epochs from lr.from_epoch to the border that is `count` epochs after it."""
        return here(first + count) - here(first)

    lr = {"from_epoch": here(first), "warmup_epochs": float(since_first(c.lr.warmup_epochs))}
    for kind, name in (("cyclic", "lr_peak_epoch"), ("step", "step_length")):
        count = getattr(c.lr, name)
        if c.lr.lr_schedule_type == kind and first + count < end:
            lr[name] = since_first(count)
    mixes = bool(c.mix.mixup or c.mix.cutmix)
    swa = c.swa
    if swa.epochs:
        anneal = here(swa_at + min(swa.anneal_epochs, swa.epochs)) - here(swa_at)
        swa = replace(swa, epochs=epochs - here(swa_at), anneal_epochs=float(anneal))
    # Judgments of results, which a short run does not have
    judgments = dict.fromkeys(("loss_rise", "chance", "average", "falling", "expected"), "off")
    config = replace(
        c,
        data=replace(c.data, train_dataset=str(train), val_dataset=str(val)),
        model=replace(
            c.model,
            arch=arch,
            pretrained=False,
            num_classes=num_classes,
            freeze=_freeze(arch, c.model.freeze),
        ),
        resolution=_ramp(short, levels),
        lr=replace(c.lr, **lr),  # type: ignore[arg-type]  # of several types
        mix=replace(
            c.mix,
            off_epochs=epochs - here(end - c.mix.off_epochs)
            if mixes
            else min(c.mix.off_epochs, epochs),
        ),
        training=replace(
            c.training,
            epochs=epochs,
            batch_size=batch,
            global_batch=batch * groups,
            distributed=False,
            eval_only=False,
        ),
        ema=_ema(
            c.ema,
            updates=c.training.epochs * (images // (groups * c.training.batch_size)),
            updates_here=epochs * steps,
            batch=(groups * c.training.batch_size, groups * batch),
        ),
        swa=swa,
        validation=replace(
            c.validation, resolution=_side(arch, c.validation.resolution), labels=""
        ),
        checkpoint=replace(c.checkpoint, resume="auto", warm_start="", branch=""),
        health=replace(c.health, **judgments),  # type: ignore[arg-type]  # of several types
        logging=replace(c.logging, folder=str(folder), expected="", trackers=""),
        compute=replace(c.compute, profile=0),
    )
    return replace(short, config=config)


def _sizes(groups: int, images: int) -> tuple[int, int]:
    """The batch size and the steps of an epoch, two or more."""
    for batch in BATCH_SIZES:
        steps = min(max(2, IMAGES // (batch * groups)), images // (batch * groups))
        if steps >= 2:
            return batch, steps
    raise InputError(
        f"data.train_dataset: has only {images} images, and two steps of "
        f"{groups} groups of 2 images take {4 * groups}; use a larger file"
    )


# ---------------------------------------------------------------- epochs


def _borders(c: TrainConfig) -> tuple[list[tuple[float, int, str]], list[float]]:
    """The borders (see Short), and those of them at which the resolution changes."""
    end = float(c.training.epochs)
    named: dict[float, list[str]] = {0.0: [], end: ["the end"]}

    def add(position: float, name: str) -> None:
        if 0 <= position < end:
            named.setdefault(position, []).append(name)

    first, kind = float(c.lr.from_epoch), c.lr.lr_schedule_type
    add(first, "warm-up" if c.lr.warmup_epochs else f"{kind} schedule")
    if c.lr.warmup_epochs:
        add(first + c.lr.warmup_epochs, f"{kind} schedule")
    if kind == "cyclic":
        add(first + c.lr.lr_peak_epoch, "the learning rate falls")
    stairs = [first]
    if kind == "step":
        while stairs[-1] + c.lr.step_length < end:
            stairs.append(stairs[-1] + c.lr.step_length)
            add(stairs[-1], "a step of the learning rate")
    levels = []
    for epoch in range(1, c.training.epochs):
        side = plan.resolution(c, epoch)
        if side != plan.resolution(c, epoch - 1):
            levels.append(float(epoch))
            add(float(epoch), f"{side} px")
    if c.mix.mixup or c.mix.cutmix:
        add(end - c.mix.off_epochs, "no mixing")
    swa_at = end - c.swa.epochs
    if c.swa.epochs:
        add(swa_at, "SWA")
        add(swa_at + min(c.swa.anneal_epochs, c.swa.epochs), "SWA at swa.lr")

    positions = sorted(named)
    share = min(1.0, EPOCHS / end)
    lengths = {
        start: max(1, (math.ceil if start >= swa_at else round)((stop - start) * share))
        for start, stop in zip(positions, positions[1:])
    }  # rounded up in SWA's epochs: the learning rate before them is then high enough for swa.lr

    def within(limits: list[float]) -> list[list[float]]:
        """The positions from each of `limits` to the next one."""
        return [
            [start for start in positions if low <= start < high]
            for low, high in zip(limits, limits[1:])
        ]

    def extend(run: list[float], length: int) -> None:
        """Gives the phases of `run` together `length` epochs or more."""
        lengths[run[-1]] += max(0, length - sum(lengths[start] for start in run))

    if ramp := within(levels):  # of equal and odd length, because they are rounded multiples
        lengths |= {start: 1 for run in ramp for start in run}
        each = max(map(len, ramp)) | 1
        for run in ramp:
            extend(run, each)
        (before,) = within([0.0, levels[0]])
        extend(before, _half(each))
    if len(stairs) > 1:
        treads = within([*stairs, end])
        longest = max(sum(lengths[start] for start in run) for run in treads)
        for run in treads[:-1]:  # of equal length, because they have one option
            extend(run, longest)
    found, here = [], 0
    for position in positions:
        found.append((position, here, ", ".join(named[position])))
        here += lengths.get(position, 0)
    return found, levels


def _ema(ema: EmaOptions, *, updates: int, updates_here: int, batch: tuple[int, int]) -> EmaOptions:
    """The options with the horizon as the same share of the run.

    updates: of the original.
    updates_here: of the short run.
    batch: images of a step of both.
    """
    if not ema.decay:
        return ema
    longer = max(1, updates) / updates_here
    if ema.per_images:
        per_images = ema.per_images / longer * batch[1] / batch[0]
        return replace(ema, per_images=max(1, round(per_images)))
    return replace(ema, decay=min(1 - 1e-6, max(1e-6, round(ema.decay**longer, 6))))


# ---------------------------------------------------------------- model and resolution


def small_model(arch: str) -> str:
    """timm's test model of the same class as `arch`; `arch` itself if there is none."""
    with option_names(TRAIN_OPTIONS):
        check_arch(arch)
    with torch.device("meta"):
        kind = type(timm.create_model(arch))
        for name in timm.list_models("test_*"):
            if issubclass(kind, type(timm.create_model(name))):
                return str(name)
    return arch


def _freeze(arch: str, groups: int | str) -> int | str:
    """model.freeze=`groups`, at most all groups of the small model."""
    while isinstance(groups, int) and groups > 0:
        with torch.device("meta"):
            model = build_model(arch, 2)
        try:
            freeze(model, groups)
            break
        except InputError:  # it has fewer
            groups -= 1
    return groups


def _side(arch: str, side: int) -> int:
    """A resolution for the small model: `side` / SMALLER, or the model's own size if it takes no
    other."""
    smaller = max(SMALLEST_SIDE, 8 * round(side / SMALLER / 8))
    model: Any = build_model(arch, 2)
    try:
        check_input_size(model, arch, smaller)
    except InputError:
        return int(model.pretrained_cfg["input_size"][1])
    return smaller


def _half(epochs: int) -> int:
    """Epochs from the middle of one level, of an odd number of epochs, to the next level."""
    return (epochs + 1) // 2


def _sides(c: TrainConfig, arch: str, levels: list[float]) -> list[int]:
    """The resolutions for the small model; see Short. levels: the epochs at which they change."""
    if len(levels) > 1:  # those that `plan.resolution` gives to successive epochs
        return [32 * number for number in range(1, len(levels) + 2)]
    sides = [_side(arch, plan.resolution(c, int(epoch))) for epoch in (0.0, *levels)]
    if len(sides) == 2 and sides[0] == sides[1] == SMALLEST_SIDE:
        sides[1] += 8
    return sides


def _ramp(short: Short, levels: list[float]) -> ResolutionOptions:
    start = end = 0
    if levels:
        first, last = short.here(levels[0]), short.here(levels[-1])
        each = (last - first) // max(1, len(levels) - 1) or 1  # epochs of a level
        start, end = first - _half(each), last + each - _half(each)
    return replace(
        short.config.resolution,
        min_res=short.sides[0],
        max_res=short.sides[-1],
        start_ramp=start,
        end_ramp=end,
    )
