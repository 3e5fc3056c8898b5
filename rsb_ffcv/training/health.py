"""Health checks: they detect a run that goes wrong, and ignore it, warn, or act.

Each check uses numbers that are equal on every process, so that all processes decide alike.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from rsb_ffcv.reporting.log import PREFIXES, WEIGHTS, best_of

# Loss readings: the median of the newest RECENT is compared with that of the BEFORE earlier ones.
RECENT, BEFORE = 5, 25
# Epochs of the medians of top-1 that `falling` compares
WINDOW = 5
# While the EMA's initial weights contribute more, it lags behind the model by design.
SMALL_SHARE = 0.01
# Going back more often than this in a row does not fix the run.
MAX_RETURNS = 10


class GoBack(Exception):
    """Requests a return to the last regular checkpoint.

    skip: steps to leave out after the return. factor: multiplies every learning rate after it.
    """

    def __init__(self, reason: str, skip: tuple[int, ...] = (), factor: float = 1.0) -> None:
        super().__init__(reason)
        self.reason, self.skip, self.factor = reason, skip, factor


class Stop(Exception):
    """Requests the end of the run."""


def decisions(state: dict) -> tuple[int, float]:
    """How often a run had gone back when `state` (see Health.state_dict) was saved, as a key that
    orders states: each return leaves out steps, or lowers the learning rate."""
    return len(state["skipped_steps"]), -state["lr_factor"]


@dataclass(kw_only=True)
class Health:
    """The policies of the checks and their state. A policy is "off", "warn" or "act"; non_finite
    may also be "stop".

    report: called with each message.
    non_finite: a loss or a weight is infinite or NaN. act: go back to the last regular checkpoint
        and leave out that step and the one before it, whose update may have been the cause.
    loss_rise: the loss is more than `rise` above its recent median. act: go back and halve the
        learning rate.
    rise: a share: 0.1 is 10 %.
    chance: after epoch `chance_epoch`, or the next one that is validated, top-1 is still at chance
        level. act: end the run.
    chance_epoch: counted from 1.
    average: the EMA's top-1 is more than `gap` below the model's, and the EMA's initial weights
        contribute less than SMALL_SHARE to it. act: restart the EMA from the model.
    gap: percentage points of top-1.
    falling: the top-1 of a set of weights has fallen by more than `fall` while the training loss
        fell; see check_course. "off" or "warn".
    fall: percentage points of top-1.
    expected: top-1 is more than `behind` below the curve that the recipe states. "off" or "warn".
    behind: percentage points of top-1.
    """

    report: Callable[[str], None]
    non_finite: str = "stop"
    loss_rise: str = "warn"
    rise: float = 0.1
    chance: str = "warn"
    chance_epoch: int = 5
    average: str = "warn"
    gap: float = 10.0
    falling: str = "warn"
    fall: float = 3.0
    expected: str = "warn"
    behind: float = 3.0
    history: list[float] = field(default_factory=list)
    risen: bool = False
    lr_factor: float = 1.0
    skipped_steps: list[int] = field(default_factory=list)
    returns: int = 0  # in a row, without an intact epoch in between
    returned: bool = False  # the run went back in this epoch
    chance_checked: bool = False

    STATE = (
        "history",
        "risen",
        "lr_factor",
        "skipped_steps",
        "returns",
        "returned",
        "chance_checked",
    )

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict) -> None:
        for name in self.STATE:
            value = state[name]
            setattr(self, name, list(value) if isinstance(value, list) else value)

    def reset_history(self) -> None:
        """Clears the loss history. Call it when the loss function or the resolution changes."""
        self.history, self.risen = [], False

    def check_losses(self, steps: list[int], losses: list[float]) -> None:
        """Checks the losses of `steps`. Raises GoBack or Stop."""
        for step, loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss) and self.non_finite != "off":
                self._diverged(f"the loss of step {step} is {loss}", (step - 1, step))
                break
        finite = [loss for loss in losses if math.isfinite(loss)]
        if not finite or self.loss_rise == "off":
            return
        self.history = (self.history + [statistics.fmean(finite)])[-RECENT - BEFORE :]
        if len(self.history) < RECENT + BEFORE:
            return
        now, usual = (
            statistics.median(self.history[-RECENT:]),
            statistics.median(self.history[:-RECENT]),
        )
        was, self.risen = self.risen, now > (1 + self.rise) * usual
        if self.risen and not was:
            reason = (
                f"at step {steps[-1]} the loss, {now:.4g}, is {100 * (now / usual - 1):.0f} % "
                f"above its recent median, {usual:.4g}"
            )
            if self.loss_rise == "act":
                raise GoBack(reason, factor=0.5)
            self.report(f"{reason}; a lower lr.lr may be needed")

    def end_epoch(self) -> None:
        self.returns, self.returned = self.returns if self.returned else 0, False

    def check_weights(self, step: int, tensors: Iterable[torch.Tensor]) -> None:
        """Checks weights and batch-norm statistics before the state after `step` is saved, because
        the run may go back to this checkpoint. Raises GoBack or Stop."""
        if self.non_finite in ("stop", "act"):
            norms = torch._foreach_norm(
                [tensor for tensor in tensors if tensor.is_floating_point()]
            )
            if not torch.stack(norms).sum().isfinite():
                self._diverged(f"the weights after step {step} are not finite", (step,))

    def _diverged(self, reason: str, steps: tuple[int, ...]) -> None:
        if self.non_finite == "act":
            raise GoBack(reason, skip=steps)
        if self.non_finite == "stop":
            raise Stop(
                f"{reason}; lower lr.lr, set training.grad_clip, use compute.precision=bf16, or "
                f"health.non_finite=act to leave such steps out"
            )
        self.report(reason)

    def check_accuracy(
        self,
        epoch: int,
        row: dict,
        *,
        classes: int,
        initial_share: float = 0.0,
        ema_warmup: bool = False,
    ) -> bool:
        """Call after an epoch's validation. Returns whether the caller must restart the EMA. Raises
        Stop.

        epoch: counted from 0.
        row: the validation's results, with "top1" and, if there is an EMA, "ema_top1", in per cent.
        classes: number of classes.
        initial_share: share that the EMA's initial weights still have in it, 1 .. 0.
        ema_warmup: whether ema.warmup is on.
        """
        chance = 100 / classes
        due = not self.chance_checked and epoch + 1 >= self.chance_epoch
        self.chance_checked |= due
        if (
            self.chance != "off"
            and due
            and row["top1"] < chance + min(0.5 * chance, 0.05 * (100 - chance))
        ):
            reason = (
                f"after epoch {epoch + 1} top-1 is {row['top1']:.2f} %, at chance level "
                f"({chance:.2f} %); likely causes: a learning rate that is too high, a warm-up "
                f"that is too short, labels that differ between the two files, or a loss that does "
                f"not fit the mixing"
            )
            if self.chance == "act":
                raise Stop(f"{reason}; correct it, or use health.chance=warn to continue")
            self.report(reason)
        behind = row["top1"] - row.get("ema_top1", row["top1"])
        if self.average != "off" and behind > self.gap and initial_share < SMALL_SHARE:
            fix = "a lower ema.decay" if ema_warmup else "ema.warmup=1 or a lower ema.decay"
            self.report(
                f"after epoch {epoch + 1} the EMA's top-1 is {behind:.1f} percentage points "
                f"below the model's: its decay is too high for this run; use {fix}"
                + ("; the EMA restarts from the model" if self.average == "act" else "")
            )
            return self.average == "act"
        return False

    def check_course(self, rows: list[dict], curve: Mapping[int, float]) -> None:
        """Call after an epoch's validation. It has no state: it reads the log.

        falling: of each set of weights, the median top-1 of the last WINDOW epochs is compared with
        the highest such median. Single values vary too much: with a noise of one point per epoch,
        the medians of a rising run stay within 3 points of their maximum (see the tests). SWA,
        whose top-1 hardly varies and which has few epochs, is compared with its highest value and
        with the raw weights. Only epochs with the present
        loss and resolution count, as for loss_rise. Reported once, until top-1 has recovered.

        rows: of the log, with that of the epoch.
        curve: epoch, counted from 1 -> top-1 in per cent that the recipe states.
        """
        last = rows[-1]
        epoch = last["epoch"] + 1
        _, reached = best_of(last)
        if self.expected != "off" and reached < curve.get(epoch, -math.inf) - self.behind:
            self.report(
                f"after epoch {epoch} top-1 is {reached:.1f} %, and the recipe states "
                f"{curve[epoch]:g} % (logging.expected); compare options, data and global batch "
                f"with the recipe's"
            )
        if self.falling == "off":
            return
        phase = [
            row for row in rows if all(row[name] == last[name] for name in ("loss", "resolution"))
        ]
        for weights, prefix in PREFIXES.items():
            now, before = _fall(phase, prefix), _fall(phase[:-1], prefix)
            if now <= self.fall or before > self.fall:
                continue
            compared, advice = (
                f"its highest median of {WINDOW} epochs, while the training loss falls",
                "more augmentation, fewer epochs or a lower learning rate may be needed",
            )
            if prefix == "swa_":
                compared = "its own highest or that of the raw weights"
                advice = "fewer swa.epochs or a lower swa.lr may be needed"
            self.report(
                f"after epoch {epoch} the top-1 of the {WEIGHTS[weights]} weights is {now:.1f} "
                f"percentage points below {compared}: {advice}"
            )


def _fall(rows: list[dict], prefix: str) -> float:
    """By how many points the top-1 of a set of weights is below its highest median of WINDOW
    epochs; 0 if the training loss is not lower than then, or after too few epochs."""
    rows = [row for row in rows if prefix + "top1" in row or prefix == "swa_" and "top1" in row]
    if len(rows) <= WINDOW or prefix + "top1" not in rows[-1]:
        return 0.0
    key = "top1" if prefix == "swa_" else prefix + "top1"
    windows = [rows[end - WINDOW : end] for end in range(WINDOW, len(rows) + 1)]
    best, now = max(windows, key=lambda window: _median(window, key)), windows[-1]
    if prefix == "swa_":
        own = [row["swa_top1"] for row in rows if "swa_top1" in row]
        return max(_median(best, key), *own) - own[-1]
    if _median(now, "train_loss") >= _median(best, "train_loss"):
        return 0.0
    return _median(best, key) - _median(now, key)


def _median(rows: list[dict], key: str) -> float:
    """The median of the rows that have a value; NaN, which is not below anything, if none has."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(values) if values else math.nan
