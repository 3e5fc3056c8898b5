"""The complete state of a run: how it is saved, resumed, and returned to.

The inputs of a step are a function of the recipe and of the step's number. `State` contains
everything that a run changes. A run that is killed and resumed therefore ends with exactly the same
bits as an uninterrupted one.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from rsb_ffcv import InputError
from rsb_ffcv.atomic import atomic_file, remove
from rsb_ffcv.config.train import TrainConfig
from rsb_ffcv.learning.average import Ema, Swa
from rsb_ffcv.reporting.console import Console
from rsb_ffcv.training import checkpoint
from rsb_ffcv.training.compute import Compute
from rsb_ffcv.training.copies import Copies
from rsb_ffcv.training.health import MAX_RETURNS, GoBack, Health
from rsb_ffcv.training.interrupt import REQUEUE, Interrupt
from rsb_ffcv.training.processes import Votes
from rsb_ffcv.training.progress import NO_BEST, Progress

# Exists in the folder from the time a signal stops a run until the run is restarted.
REQUEUE_MARK = "requeue"


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that a run changes.

    recipe: the options and data that define the run, see `facts.recipe`.
    progress: position, log and counts.
    model: the bare module.
    optimizer: with its moments.
    scaler: of the gradients; disabled unless the precision is fp16.
    health: the health checks.
    ema: exponential moving average, or None.
    swa: equal average, or None.
    """

    recipe: dict
    progress: Progress
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    health: Health
    ema: Ema | None
    swa: Swa | None

    def state_dict(self) -> dict:
        return {
            "recipe": self.recipe,
            **self.progress.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "health": self.health.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "swa": self.swa.state_dict() if self.swa is not None else None,
        }

    def load_state_dict(self, saved: dict, world_size: int) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty if the run has not used a scaler so far
            self.scaler.load_state_dict(saved["scaler"])
        for average, name in ((self.ema, "ema"), (self.swa, "swa")):
            if average is not None:
                average.load_state_dict(saved[name])
        if (
            self.swa is not None
            and len(saved["epoch"]["processes"]) != world_size
            and not self.swa.finished
        ):
            self.swa.rounds = -1  # counted for another number of processes
        self.health.load_state_dict(saved["health"])
        self.progress.load_state_dict(saved)


class Checkpointer:
    """Saves a run's state when due, ends the run after a signal, resumes it, and goes back to an
    earlier checkpoint. Every process of a job has one, and calls its methods at the same steps.

    config: for the sections checkpoint and training.
    state: what is saved.
    copies: the run's folders.
    where: device and processes.
    console: for messages.
    interrupt: the signals that were received.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: State,
        *,
        copies: Copies,
        where: Compute,
        console: Console,
        interrupt: Interrupt,
    ) -> None:
        self.config, self.state, self.copies = config, state, copies
        self.compute, self.console, self.interrupt = where, console, interrupt
        self.folder = copies.store.folder
        self.health, self.progress = state.health, state.progress
        self._previous_best: dict | None = None  # while a new best is being written
        self._saved_at = time.monotonic()
        self._votes = Votes()

    def begin(self) -> None:
        """Call before the first step. Raises InputError if the folder cannot be changed."""
        mark = self.folder / REQUEUE_MARK
        try:
            if self.copies.is_writer and mark.exists():
                remove(mark)
        except OSError as error:
            raise InputError(
                f"{mark}: cannot be removed ({error.strerror}); correct the permissions"
            ) from error
        self._saved_at = time.monotonic()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        """After a finished run or a signal, completes the vote in progress, so that no process
        waits for it."""
        if kind is None or kind is SystemExit:
            self._votes.count()

    # ---------------------------------------------------------------- saving

    def after_step(self, regular: bool) -> None:
        """Saves if a checkpoint is due, and ends the run if a signal was received, on all processes
        alike.

        regular: a regular checkpoint is due now.

        Raises SystemExit(REQUEUE) after a signal, InputError if the checkpoint could not be written
        then, and GoBack or Stop as `check` does.
        """
        minutes = self.config.checkpoint.every_minutes
        due, stop = self._votes.cast(
            bool(minutes) and time.monotonic() - self._saved_at > 60 * minutes,
            self.interrupt.received is not None,
        )
        if due or stop or regular:
            self.check()
            self._save(False)
        if stop:
            self.copies.finish_or_fail(
                f"a signal was received, but the checkpoint could not be written; {checkpoint.FIX}"
            )
            if self.compute.is_main:
                with atomic_file(self.folder / REQUEUE_MARK, checkpoint.FIX):
                    pass
            self.console.info(
                f"saved after step {self.progress.step}; the same command resumes from here (exit "
                f"status {REQUEUE})"
            )
            raise SystemExit(REQUEUE)

    def check(self) -> None:
        """Call before a save: the run may go back to this state. Raises GoBack or Stop if a loss or
        a weight is not finite."""
        progress = self.progress
        if self.health.non_finite in ("stop", "act") and not progress.losses_are_finite():
            self.health.check_losses(*progress.read_losses())
        self.health.check_weights(progress.step - 1, self.state.model.state_dict().values())

    def save_epoch(
        self, previous_best: dict | None = None, best_weights: dict | None = None
    ) -> None:
        """Saves after an epoch's row is complete.

        previous_best: the best before this epoch if this epoch is better, else None.
        best_weights: then the content of `best_weights.pt`.
        """
        self._save(previous_best is not None, best_weights)
        self._previous_best = previous_best

    def _save(self, best: bool, best_weights: dict | None = None) -> None:
        self.wait_for_save()
        state = self.state.state_dict()
        self.copies.save(state, best, best_weights)
        self._saved_at = time.monotonic()

    def wait_for_save(self) -> None:
        """Waits for the save in progress. If it failed, a new best in it does not count."""
        if not self.copies.finish() and self._previous_best is not None:
            self.progress.best = self._previous_best
        self._previous_best = None

    # ---------------------------------------------------------------- resuming

    def resume(self, path: Path, saved: dict, total_steps: int) -> None:
        """Resumes from the checkpoint `saved`, whose path in a writer's folder is `path`. Raises
        InputError if it is of another recipe."""
        folder = self.folder
        self._load(saved)
        if not self.config.training.eval_only and self.progress.best["step"] == self.progress.step:
            self.copies.mark_best(path)  # the run may have been killed before it got this name
        step = self.progress.step
        if len(self.progress.rows) == self.config.training.epochs:
            self.console.info(
                f"{folder}: training finished already, after step {step} of {total_steps}"
            )
        else:
            self.console.info(f"resuming {folder} after step {step} of {total_steps}")

    def _load(self, saved: dict) -> None:
        checkpoint.check_recipe(saved["recipe"], self.state.recipe, self.folder)
        self.state.load_state_dict(saved, self.compute.world_size)

    def go_back(self, request: GoBack) -> None:
        """Returns to the newest regular checkpoint, and applies `request` from there on. Raises
        InputError if there is none, or after MAX_RETURNS returns in a row."""
        # A failed save has been reported, and an earlier checkpoint is then the newest one
        self.copies.finish()
        health, progress = self.health, self.progress
        returns = health.returns + 1
        found = self.copies.find(regular=True)
        if found is None or returns > MAX_RETURNS:
            raise InputError(
                f"{request.reason}, and "
                + (
                    "there is no checkpoint to go back to; set checkpoint.every_steps"
                    if found is None
                    else f"going back {MAX_RETURNS} times did not fix it; lower lr.lr"
                )
            )
        _, saved = self.copies.fetch(found)
        self._load(saved)
        # Before the state with this decision is saved. A run that is killed in between repeats the
        # steps and decides again.
        store = self.copies.store
        best_was_removed, *_ = self.copies.on_writers(lambda: store.remove_after(progress.step))
        if best_was_removed and progress.best["step"] != progress.step:
            progress.best = dict(NO_BEST)
        health.returns, health.returned = returns, True
        health.lr_factor *= request.factor
        health.skipped_steps.extend(request.skip)
        health.reset_history()
        health.report(
            f"{request.reason}: going back to step {progress.step}, "
            + (
                f"leaving out step {' and '.join(map(str, request.skip))}"
                if request.skip
                else f"learning rate x {health.lr_factor:g} from here on"
            )
        )
        self._save(progress.best["step"] == progress.step)
