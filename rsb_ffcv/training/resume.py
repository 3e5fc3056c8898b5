"""A run's whole state: how it is saved, resumed, and gone back to.

What a step sees is a function of the recipe and of the step's number. What a run changes is in
`State`; a run that is killed and started again ends with the bits of one that was not.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from rsb_ffcv import InputError
from rsb_ffcv.config.train import TrainConfig
from rsb_ffcv.learning.average import Ema, Swa
from rsb_ffcv.reporting.console import Console
from rsb_ffcv.training import checkpoint, compute
from rsb_ffcv.training.compute import Compute
from rsb_ffcv.training.health import MOST_RETURNS, GoBack, Health
from rsb_ffcv.training.interrupt import REQUEUE, Interrupt
from rsb_ffcv.training.processes import Votes
from rsb_ffcv.training.progress import NO_BEST, Progress

REQUEUE_MARK = (
    "requeue"  # in the folder while a run that was asked to end waits to be started again
)


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that a run changes. recipe: what it depends on, see `facts.recipe`."""

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
        if saved["scaler"]:  # empty where the run so far needed no scaler
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


def newest(store: checkpoint.Store, regular: bool = False) -> tuple[Path, dict] | None:
    """The folder's newest whole checkpoint (see Store.newest), on every process the one that the
    first has found."""
    found: tuple[Path, dict] | None = None

    def look() -> str | None:
        nonlocal found
        found = store.newest(regular)
        return str(found[0]) if found else None

    path = compute.on_first_process(look)
    return found if found or path is None else (Path(path), checkpoint.read(Path(path)))


class Checkpointer:
    """Saves a run's state where it is time, ends the run where a signal asks for it, resumes it and
    goes back. Every process of a job makes one, and calls its methods at the same steps."""

    def __init__(
        self,
        config: TrainConfig,
        state: State,
        *,
        store: checkpoint.Store,
        where: Compute,
        console: Console,
        interrupt: Interrupt,
    ) -> None:
        self.config, self.state, self.store = config, state, store
        self.compute, self.console, self.interrupt = where, console, interrupt
        self.health, self.progress = state.health, state.progress
        self._beaten: dict | None = None  # the best before the one that is being written
        self._saved_at = time.monotonic()
        self._votes = Votes()

    def begin(self) -> None:
        """Before the first step."""
        if self.compute.is_main:
            (self.store.folder / REQUEUE_MARK).unlink(missing_ok=True)
        self._saved_at = time.monotonic()

    def close(self) -> None:
        """After the last step: counts the vote in progress, so that no process waits for it."""
        self._votes.count()

    # ---------------------------------------------------------------- saving

    def after_step(self, regular: bool) -> None:
        """Saves where it is time (regular: always), and ends where a signal asked for it, all
        processes alike."""
        minutes = self.config.checkpoint.every_minutes
        due, stop = self._votes.cast(
            bool(minutes) and time.monotonic() - self._saved_at > 60 * minutes,
            self.interrupt.received is not None,
        )
        if due or stop or regular:
            self.check()
            self._save(False)
        if stop:
            folder = self.store.folder
            if not self.store.finish():
                raise InputError(
                    f"{folder}: the run was asked to end and could not be saved; {checkpoint.MEND}"
                )
            if self.compute.is_main:
                (folder / REQUEUE_MARK).touch()
            self.console.say(
                f"saved after step {self.progress.step}; the same command goes on from here (exit "
                f"status {REQUEUE})"
            )
            raise SystemExit(REQUEUE)

    def check(self) -> None:
        """Before a save: what is saved may have to be gone back to. Raises GoBack or Stop."""
        progress = self.progress
        if self.health.non_finite in ("stop", "act") and not progress.losses_are_finite():
            self.health.check_losses(*progress.read_losses())
        self.health.check_weights(progress.step - 1, self.state.model.state_dict().values())

    def save_epoch(self, beaten: dict | None) -> None:
        """After an epoch's row. beaten: the best before, where this epoch is the best."""
        self._save(beaten is not None)
        self._beaten = beaten

    def _save(self, best: bool) -> None:
        self.settle()
        state = self.state.state_dict()
        if self.compute.is_main:
            self.store.save(state, best)
        self._saved_at = time.monotonic()

    def settle(self) -> None:
        """Waits for the save in progress. A best state that is not on disk is none."""
        if not self.store.finish() and self._beaten is not None:
            self.progress.best = self._beaten
        self._beaten = None

    # ---------------------------------------------------------------- resuming

    def resume(self, path: Path, saved: dict, total_steps: int) -> None:
        """From the checkpoint `saved` at `path`. Raises InputError where it is of another recipe,
        or the configuration forbids it."""
        folder = self.store.folder
        if self.config.checkpoint.resume == "never":
            raise InputError(
                f"checkpoint.resume=never: {folder} has a checkpoint; use "
                f"checkpoint.resume=auto to continue it or another logging.folder"
            )
        self._load(saved)
        if (
            self.compute.is_main
            and not self.config.training.eval_only
            and self.progress.best["step"] == self.progress.step
        ):
            self.store.mark_best(path)  # a kill may have come between its two names
        self.console.say(f"resuming {folder} after step {self.progress.step} of {total_steps}")

    def _load(self, saved: dict) -> None:
        checkpoint.check_recipe(saved["recipe"], self.state.recipe, self.store.folder)
        self.state.load_state_dict(saved, self.compute.world_size)

    def go_back(self, request: GoBack) -> None:
        """To the newest regular checkpoint, and on from there otherwise than before."""
        self.store.finish()
        health, progress = self.health, self.progress
        returns = health.returns + 1
        found = newest(self.store, regular=True)
        if found is None or returns > MOST_RETURNS:
            raise InputError(
                f"{request.reason}, and "
                + (
                    "there is no checkpoint to go back to; set checkpoint.every_steps"
                    if found is None
                    else f"going back {MOST_RETURNS} times did not mend it; lower lr.lr"
                )
            )
        self._load(found[1])
        # Before the state with the decision is saved: a kill in between repeats the steps and
        # decides again
        best_is_gone = compute.on_first_process(lambda: self.store.give_up(progress.step))
        if best_is_gone and progress.best["step"] != progress.step:
            progress.best = dict(NO_BEST)
        health.returns, health.returned = returns, True
        health.lr_factor *= request.factor
        health.skipped_steps.extend(request.skip)
        health.forget()
        health.say(
            f"{request.reason}: back to step {progress.step}, "
            + (
                f"leaving out step {' and '.join(map(str, request.skip))}"
                if request.skip
                else f"learning rate x {health.lr_factor:g} from here on"
            )
        )
        self._save(progress.best["step"] == progress.step)
