"""The plan of a run: resolution, mixing, averaging and learning rate of each epoch, from the
recipe. The trainer reads it once per epoch. No other module computes these values."""

from dataclasses import dataclass

import numpy as np

from rsb_ffcv import InputError
from rsb_ffcv.config.train import TrainConfig
from rsb_ffcv.learning.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One epoch.

    number: counted from 0.
    steps: number of optimizer steps.
    resolution: side of the training images in pixels.
    mixing: whether mixup or cutmix is applied.
    averaging: whether the weights after the last step are added to the equal average (SWA).
    last: whether this is the run's last epoch.
    schedule: the learning rates of the run.
    """

    number: int
    steps: int
    resolution: int
    mixing: bool
    averaging: bool
    last: bool
    schedule: Schedule

    def lr(self, step: int) -> float:
        """The learning rate of step `step` of this epoch, counted from 0."""
        return self.schedule.lr(self.number * self.steps + step)


class Plan:
    """The epochs of a run, `plan[0]` to `plan[plan.epochs - 1]`.

    Raises InputError if swa.lr would raise the learning rate.
    """

    def __init__(self, config: TrainConfig, steps_per_epoch: int) -> None:
        self._config, self.steps_per_epoch = config, steps_per_epoch
        self.epochs = config.training.epochs
        self._schedule = _schedule(config, steps_per_epoch)

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def __getitem__(self, number: int) -> Epoch:
        if not 0 <= number < self.epochs:
            raise IndexError(number)
        c = self._config
        return Epoch(
            number=number,
            steps=self.steps_per_epoch,
            resolution=resolution(c, number),
            mixing=bool(c.mix.mixup or c.mix.cutmix) and number < self.epochs - c.mix.off_epochs,
            averaging=number >= self.epochs - c.swa.epochs,
            last=number == self.epochs - 1,
            schedule=self._schedule,
        )

    def lr(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0 over the run."""
        return self._schedule.lr(step)

    def is_regular(self, step: int) -> bool:
        """Whether the checkpoint after `step` steps is a regular one: at the end of an epoch, or at
        a multiple of checkpoint.every_steps. Every run of the recipe saves these."""
        every = self._config.checkpoint.every_steps
        return step % self.steps_per_epoch == 0 or bool(every) and step % every == 0

    def is_archived(self, step: int) -> bool:
        """Whether the checkpoint after `step` steps is kept for good (checkpoint.archive_every)."""
        every = self._config.checkpoint.archive_every * self.steps_per_epoch
        return bool(every) and step % every == 0


def resolution(c: TrainConfig, epoch: int) -> int:
    """The side of the training images in pixels: ffcv-imagenet's progressive resizing."""
    r = c.resolution
    if epoch <= r.start_ramp:
        return r.min_res
    if epoch >= r.end_ramp:
        return r.max_res
    between = (
        int(np.round(np.interp(epoch, [r.start_ramp, r.end_ramp], [r.min_res, r.max_res]) / 32))
        * 32
    )
    return min(max(between, r.min_res), r.max_res)


def _schedule(c: TrainConfig, steps_per_epoch: int) -> Schedule:
    made = Schedule(
        kind=c.lr.lr_schedule_type,
        peak=c.lr.lr,
        epochs=c.training.epochs,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=c.lr.warmup_epochs,
        warmup_lr=c.lr.warmup_lr,
        min_lr=c.lr.min_lr,
        peak_epoch=c.lr.lr_peak_epoch,
        step_ratio=c.lr.step_ratio,
        step_length=c.lr.step_length,
        power=c.lr.power,
        from_epoch=c.lr.from_epoch,
        swa_epochs=c.swa.epochs,
        swa_lr=c.swa.lr,
        swa_anneal_epochs=c.swa.anneal_epochs,
    )
    if c.swa.epochs and c.swa.lr > made.before_swa:
        raise InputError(
            f"swa.lr={c.swa.lr:g}: would raise the learning rate, which is {made.before_swa:.3g} "
            f"when the average starts; lower it"
        )
    return made
