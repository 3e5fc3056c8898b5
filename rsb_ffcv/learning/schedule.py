"""The learning rate as a pure function of the step. It has no state to save or restore."""

import math
from dataclasses import dataclass

from rsb_ffcv import check_choice


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate, lr(step), of steps 0 .. total_steps - 1. Later steps have the last value.

    kind:
      cosine           linear warm-up from warmup_lr, then a cosine from peak to min_lr over the
                       remaining steps
      cosine_spanning  timm's CosineLRScheduler: the cosine spans all steps, and the warm-up
                       replaces its beginning
      polynomial       linear warm-up, then
                       min_lr + (peak - min_lr) x (1 - share of the remaining steps) ** power
      constant         linear warm-up, then peak
      cyclic           ffcv-imagenet's: linear from 1e-4 x peak to peak at peak_epoch, then linear
                       to 0
      step             ffcv-imagenet's: peak x step_ratio ** (epoch // step_length) at each epoch's
                       start, 0 at the end, and linear in between
    peak: highest learning rate.
    epochs: of the run.
    steps_per_epoch: optimizer steps.
    warmup_epochs: may be fractional; it is rounded to a whole number of steps.
    warmup_lr: learning rate of the first step of the warm-up.
    min_lr: learning rate at the end of the cosine or polynomial.
    peak_epoch, step_ratio, step_length, power: see kind.
    from_epoch: the epoch at whose beginning warm-up and schedule begin, over the epochs that are
        left. Earlier steps have the first value. The epochs of cyclic and step count from it.
    swa_epochs: number of last epochs that use swa_lr; 0: none. At their beginning, the learning
        rate falls from the schedule's value to swa_lr, and then stays there.
    swa_lr: see swa_epochs.
    swa_anneal_epochs: duration of that fall, which follows half a cosine.

    Raises InputError for an unknown kind.
    """

    kind: str
    peak: float
    epochs: int
    steps_per_epoch: int
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    peak_epoch: int = 2
    step_ratio: float = 0.1
    step_length: int = 30
    power: float = 1.0
    from_epoch: int = 0
    swa_epochs: int = 0
    swa_lr: float = 0.0
    swa_anneal_epochs: float = 0.0

    def __post_init__(self) -> None:
        check_choice(
            "kind",
            self.kind,
            ("cosine", "cosine_spanning", "polynomial", "constant", "cyclic", "step"),
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.epochs * self.steps_per_epoch

    @property
    def before_swa(self) -> float:
        """The schedule's learning rate at the beginning of the last swa_epochs."""
        return self._base((self.epochs - self.swa_epochs) * self.steps_per_epoch)

    def lr(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0 over the run."""
        step = min(step, self.total_steps - 1)
        since = step - (self.epochs - self.swa_epochs) * self.steps_per_epoch
        if not self.swa_epochs or since < 0:
            return self._base(step)
        anneal = round(self.swa_anneal_epochs * self.steps_per_epoch)
        progress = min(1.0, since / anneal) if anneal else 1.0
        return self.swa_lr + 0.5 * (self.before_swa - self.swa_lr) * (
            1 + math.cos(math.pi * progress)
        )

    def _base(self, step: int) -> float:
        step = max(0, step - self.from_epoch * self.steps_per_epoch)
        if self.kind in ("cyclic", "step"):
            at_epoch = self._cyclic if self.kind == "cyclic" else self._step
            epoch, fraction = (
                step // self.steps_per_epoch,
                step % self.steps_per_epoch / self.steps_per_epoch,
            )
            return at_epoch(epoch) + (at_epoch(epoch + 1) - at_epoch(epoch)) * fraction
        warmup = round(self.warmup_epochs * self.steps_per_epoch)
        if step < warmup:
            return self.warmup_lr + (self.peak - self.warmup_lr) * step / warmup
        if self.kind == "constant":
            return self.peak
        start = 0 if self.kind == "cosine_spanning" else warmup
        total = (self.epochs - self.from_epoch) * self.steps_per_epoch
        progress = (step - start) / max(1, total - start)
        if self.kind == "polynomial":
            return self.min_lr + (self.peak - self.min_lr) * (1 - progress) ** self.power
        return self.min_lr + 0.5 * (self.peak - self.min_lr) * (1 + math.cos(math.pi * progress))

    def _cyclic(self, epoch: int) -> float:
        if epoch <= self.peak_epoch and self.peak_epoch > 0:
            return self.peak * (1e-4 + (1 - 1e-4) * epoch / self.peak_epoch)
        epochs = self.epochs - self.from_epoch
        return self.peak * max(0.0, (epochs - epoch) / max(1, epochs - self.peak_epoch))

    def _step(self, epoch: int) -> float:
        return (
            0.0
            if epoch >= self.epochs - self.from_epoch
            else self.peak * self.step_ratio ** (epoch // self.step_length)
        )
