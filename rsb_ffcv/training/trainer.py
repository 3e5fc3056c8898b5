"""One run: loaders, model, optimizer and schedule put together, trained step by step, saved and
continued anywhere.

What a step sees is a function of the recipe and the step's number: the loader's slots, the mix's
and the noise's addresses, the learning rate, and the seed that torch's own generator (stochastic
depth) is set to before each group. What it changes is in `_state`, whole; so a run that is killed
and started again ends with the bits of one that was not.
"""

import json
import platform
import statistics
import sys
import time
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy
import timm
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from rsb_ffcv import InputError, __version__, warn
from rsb_ffcv.config import TrainConfig
from rsb_ffcv.learning.average import Ema, Swa, decay_of_step
from rsb_ffcv.learning.loss import Loss
from rsb_ffcv.learning.model import check_arch
from rsb_ffcv.learning.optimizer import build_optimizer, check_optimizer
from rsb_ffcv.loading.batch import normalize
from rsb_ffcv.ops.native import checksum
from rsb_ffcv.options import as_dict
from rsb_ffcv.reporting import log
from rsb_ffcv.training import build, checkpoint, compute
from rsb_ffcv.training.evaluate import evaluate, read_label_sets
from rsb_ffcv.training.health import MOST_RETURNS, GoBack, Health, Stop
from rsb_ffcv.training.interrupt import REQUEUE, Interrupt
from rsb_ffcv.training.plan import Epoch, Plan
from rsb_ffcv.training.processes import Heartbeat, Votes, check_same, check_shared
from rsb_ffcv.training.step import RunningStatistics, TrainStep

REQUEUE_MARK = (
    "requeue"  # in the folder while a run that was asked to end waits to be started again
)
NO_BEST = {"top1": -1.0, "epoch": -1, "step": -1}
# What each process of a job may have its own way: where it finds its files, which are compared by
# what they hold, and its threads
OWN = {
    "data.train_dataset",
    "data.val_dataset",
    "data.num_workers",
    "data.in_memory",
    "validation.labels",
    "checkpoint.warm_start",
    "logging.folder",
    "compute.threads",
    "compute.device",
    "compute.precision",
    "compute.compile",
    "dist.address",
    "dist.port",
}
SYNC_EVERY = 20  # steps between two readings of the loss: each one waits for the device


class Trainer:
    """Builds a run from `config`, resumes it where its folder has a checkpoint, and trains it to
    the end.

    Raises InputError for whatever the user can mend. Use as a context manager: it ends the loaders'
    threads.
    """

    def __init__(self, config: TrainConfig, interrupt: Interrupt) -> None:
        self.config, self.interrupt, self._open = config, interrupt, ExitStack()
        self.heartbeat: Heartbeat | None = None
        try:
            self._build()
        except BaseException as error:
            self._open.close()
            self._end_beat(error)
            raise

    def _build(self) -> None:
        c = self.config
        self.compute = compute.set_up(
            c.compute.device,
            c.compute.precision,
            c.compute.compile,
            c.compute.channels_last,
            c.compute.threads,
            c.dist.timeout_s,
        )
        self.heartbeat = Heartbeat(c.dist.timeout_s, self.compute.hosts)
        self._say(self.compute.describe())
        check_arch(c.model.arch)
        check_optimizer(c.training.optimizer)
        threads = self.compute.loader_threads(c.data.num_workers)
        self.train_loader = self._open.enter_context(
            closing(build.train_loader(c, self.compute, threads))
        )
        self.val_loader = self._open.enter_context(
            closing(build.val_loader(c, self.compute, threads))
        )
        self.num_classes = build.check_files(c, self.train_loader.beton, self.val_loader.beton)
        self.label_sets = (
            read_label_sets(c.validation.labels, self.val_loader.beton.names(), self.num_classes)
            if c.validation.labels
            else None
        )
        self.recipe = self._recipe()
        check_same(self._facts())
        self.steps_per_epoch = self.train_loader.steps_per_epoch
        self.plan = Plan(c, self.steps_per_epoch)
        self.folder = Path(c.logging.folder)
        self.store = self._open.enter_context(
            closing(checkpoint.Store(self.folder, c.checkpoint.keep, self.plan.is_regular))
        )
        if not c.training.eval_only:
            compute.on_first_process(self.store.lock)
            if self.compute.world_size > 1:
                check_shared(self.folder)
        found = self._newest()
        self.model = build.model(c, self.num_classes, self.compute, new=found is None)
        if found is None and c.checkpoint.warm_start:
            self._say(f"beginning from the weights of {c.checkpoint.warm_start}")
        self.ema = (
            Ema(
                self.model,
                decay_of_step(c.ema.decay, c.ema.per_images, self.train_loader.global_batch),
                c.ema.warmup,
                c.ema.warmup_power,
                c.ema.buffers,
            )
            if c.ema.decay
            else None
        )
        self.swa = Swa(self.model) if c.swa.epochs else None
        self.optimizer = build_optimizer(
            c.training.optimizer,
            self.model,
            c.lr.lr,
            c.training.weight_decay,
            c.training.momentum,
            compiled=self.compute.compile and self.compute.device.type == "cuda",
        )
        self.loss = Loss(
            c.training.loss,
            c.training.label_smoothing,
            c.training.bce_threshold,
            c.training.bce_sum,
        )
        self.health = Health(
            self._note,
            c.health.non_finite,
            c.health.loss_rise,
            c.health.rise,
            c.health.chance,
            c.health.chance_epoch,
            c.health.average,
            c.health.gap,
        )
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, Any] = dict(NO_BEST)
        self._beaten: dict[str, Any] | None = None
        self._begin_epoch()
        left_out = (
            len(self.train_loader.beton) - self.steps_per_epoch * self.train_loader.global_batch
        )
        if left_out and c.augment.repeats == 1 and not c.training.eval_only:
            self._say(
                f"{left_out} of {len(self.train_loader.beton)} training images do not fill a step "
                f"of "
                f"{self.train_loader.global_batch} and are left out of each epoch"
                f"{', the same ones' if c.data.order == 'sequential' else ', others each time'}"
            )
        wrapped = self.model
        if self.compute.compile:  # of a module it makes a module
            wrapped = cast(torch.nn.Module, torch.compile(self.model, dynamic=False))
        if (
            self.compute.world_size > 1
        ):  # batch-norm statistics are averaged by the step, not copied from the first process
            wrapped = DistributedDataParallel(
                wrapped, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.train_step = TrainStep(
            self.model,
            wrapped,
            self.optimizer,
            self.loss,
            build.batch_transform(c),
            self.compute,
            groups=self.train_loader.batches_per_step,
            seed=c.training.seed,
            grad_clip=c.training.grad_clip,
            ema=self.ema,
        )
        if found is not None:
            self._resume(*found)
        for loader in (self.train_loader, self.val_loader) if c.data.in_memory else ():
            loader.preload(lambda: self.interrupt.received is not None)
        self.votes = Votes()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._open.close()
        if kind is None or kind is SystemExit:
            assert self.heartbeat is not None  # since _build
            self.votes.count()
            self.heartbeat.end()
            del self.votes, self.heartbeat, self.train_step  # they hold process groups
            compute.leave()
        else:
            self._end_beat(error)

    def _end_beat(self, error: BaseException | None) -> None:
        """Before this process ends with `error`."""
        if self.heartbeat is None:
            return
        if isinstance(error, InputError):
            self.heartbeat.say_no_more()
        elif isinstance(error, Exception):
            self.heartbeat.verdict(error)

    # ---------------------------------------------------------------- the run

    def fit(self) -> None:
        """Trains from where the run stands to the end, and prints the closing table."""
        self._open_folder()
        self._saved_at = time.monotonic()
        while len(self.rows) < self.plan.epochs:
            try:
                epoch = self.plan[len(self.rows)]
                self._train_epoch(epoch)
                if self.swa is not None and epoch.last:
                    self._estimate_batch_norm(epoch)
                self._close_epoch(epoch)
            except GoBack as request:
                self._go_back(request)
            except Stop as request:
                raise InputError(str(request)) from request
        if not self.store.finish() and self.compute.is_main:
            raise InputError(
                f"{self.folder}: the last checkpoint could not be written; {checkpoint.MEND}, and "
                f"start again"
            )
        if self.compute.is_main:
            self._finish()

    def evaluate_only(self) -> None:
        """Evaluates the newest checkpoint of logging.folder and prints the result as one JSON
        line."""
        if (
            self.step == 0
            and not self.config.model.pretrained
            and not self.config.checkpoint.warm_start
        ):
            raise InputError(
                f"training.eval_only=1: {self.folder} has no checkpoint; train first, name its "
                f"folder, or "
                f"use model.pretrained=1 or checkpoint.warm_start"
            )
        self._say(
            json.dumps(
                {
                    "epoch": self.step // self.steps_per_epoch - 1,
                    "step": self.step,
                    **self._evaluate(len(self.rows) == self.plan.epochs, heed=False),
                }
            )
        )

    # ---------------------------------------------------------------- an epoch

    def _begin_epoch(self) -> None:
        """What is counted over an epoch, in this process."""
        device = self.compute.device
        self.totals = torch.zeros(
            3, device=device, dtype=torch.float64
        )  # loss x images, correct, images
        self.window = torch.zeros(SYNC_EVERY, device=device, dtype=torch.float64)
        # the steps whose losses stand in `window`, since they were last read
        self.unread: list[int] = []
        self.seconds = self.waited = 0.0
        self.skipped: list[tuple[int, str]] = []
        self.events: list[str] = []

    def _train_epoch(self, epoch: Epoch) -> None:
        """The steps of the epoch that are still to be done."""
        done = self.step - epoch.number * epoch.steps
        if done == epoch.steps:
            return
        loader = self.train_loader
        loader.resolution = epoch.resolution
        self.train_step.wrapped.train()
        skipped_before = self.skipped
        with (
            self._within_memory("training", epoch.resolution),
            closing(loader.epoch(epoch.number, done)) as batches,
            self._bar(f"epoch {epoch.number + 1}", epoch.steps, done) as bar,
        ):
            for step in range(done, epoch.steps):
                started = time.perf_counter()
                lr = epoch.lr(step) * self.health.lr_factor
                if self.step in self.health.skipped_steps:
                    for _ in range(loader.batches_per_step):
                        next(batches)
                else:
                    sums, waited = self.train_step(epoch.number, batches, lr, epoch.mixing)
                    self.totals += sums
                    self.window[len(self.unread)] = sums[0] / sums[2]
                    self.unread.append(self.step)
                    self.waited += waited
                self.step += 1
                self.skipped = skipped_before + loader.skipped
                last = step + 1 == epoch.steps
                if self.swa is not None and last and epoch.averaging:
                    self.swa.update()
                reads = len(self.unread) == SYNC_EVERY or last
                if reads:
                    self._read_losses()
                self.seconds += time.perf_counter() - started
                if reads:
                    self._show(bar, lr)
                bar.update()
                self._heed(not last and self.plan.is_regular(self.step))

    def _read_losses(self) -> None:
        """Waits for the device and lets the health checks look at the losses since the last
        time."""
        if self.unread:
            losses = compute.mean_over_processes([self.window])[0][: len(self.unread)].tolist()
            steps, self.unread = self.unread, []
            self.health.check_losses(steps, losses)

    def _show(self, bar: tqdm, lr: float) -> None:
        """Where the run stands, in its progress bar."""
        loss, correct, images = self.totals.tolist()
        rate = images * self.compute.world_size / max(self.seconds, 1e-9)
        bar.set_postfix(
            loss=f"{loss / max(images, 1):.4f}",
            top1=f"{100 * correct / max(images, 1):.1f}%",
            lr=f"{lr:.2e}",
            img_s=f"{rate:.0f}",
        )

    def _estimate_batch_norm(self, epoch: Epoch) -> None:
        """The averaged model's batch-norm statistics, over training images without mixing and
        erasing."""
        c, swa, loader = self.config, self.swa, self.train_loader
        assert swa is not None  # else there is nothing to estimate them for
        needed = (
            min(c.swa.bn_steps or self.steps_per_epoch, self.steps_per_epoch)
            * loader.batches_per_step
        )
        if swa.finished:
            return
        swa.begin_batch_norm() if swa.batches < 0 else swa.resume_batch_norm()
        averaged = RunningStatistics(swa.module, 1)
        loader.resolution = epoch.resolution
        start = swa.batches // loader.batches_per_step
        with (
            self._within_memory("training", epoch.resolution),
            closing(loader.epoch(self.plan.epochs, start)) as batches,
            self._bar("batch norm", needed, swa.batches) as bar,
        ):
            for _ in range(start * loader.batches_per_step, swa.batches):
                next(batches)
            while swa.batches < needed:
                images = normalize(next(batches).images).contiguous(
                    memory_format=self.compute.memory_format
                )
                with torch.no_grad(), self.compute.autocast():
                    swa.module(images)
                averaged.end_step()
                swa.batches += 1
                bar.update()
                self._heed(
                    bool(c.checkpoint.every_steps)
                    and swa.batches % (c.checkpoint.every_steps * loader.batches_per_step) == 0
                )
        swa.end_batch_norm()

    def _close_epoch(self, epoch: Epoch) -> None:
        """Validates, and writes the epoch's row and a checkpoint."""
        self._check_state()
        self._settle()
        loss, correct, images = compute.sum_over_processes(self.totals.clone()).tolist()
        found = sorted(set(compute.gather(self.skipped)))
        row: dict[str, Any] = {
            "epoch": epoch.number,
            "steps": epoch.steps,
            "loss": self.loss.name(epoch.mixing),
            "train_loss": loss / images if images else None,
            "train_top1": 100 * correct / images if images else None,
            "lr": epoch.lr(epoch.steps - 1) * self.health.lr_factor,
            "resolution": epoch.resolution,
            "images_per_s": images / self.seconds,
            "seconds": self.seconds,
            "data_wait_s": self.waited,
            "peak_memory_mb": self.compute.peak_memory_mb(),
        }
        if found:
            row |= {
                "skipped": len(found),
                "skipped_samples": [f"sample {index} {reason}" for index, reason in found],
            }
        improved, beaten = False, self.best
        if self.config.logging.log_level or epoch.last:
            row |= self._evaluate(epoch.last)
            if self.health.check_accuracy(
                epoch.number,
                row,
                self.num_classes,
                self.ema.initial_share() if self.ema else 0.0,
                self.config.ema.warmup,
            ):
                assert self.ema is not None  # it was compared
                self.ema.restart()
            top1 = max(row[name] for name in ("top1", "ema_top1", "swa_top1") if name in row)
            improved = top1 > self.best["top1"]
            if improved:
                self.best = {"top1": top1, "epoch": epoch.number, "step": self.step}
        if self.events:
            row["events"] = self.events
        self.health.end_epoch()
        self.rows = self.rows + [row]
        if not epoch.last:
            following = self.plan[epoch.number + 1]
            if (following.mixing, following.resolution) != (epoch.mixing, epoch.resolution):
                self.health.forget()
        self._begin_epoch()
        self._save(improved)
        self._beaten = beaten if improved else None
        if self.compute.is_main:
            try:
                log.write_metrics(self.folder, self.rows)
            except InputError as error:  # each epoch writes the whole log, and a restart does
                warn(f"{error}; the run goes on")
            print(json.dumps(row), flush=True)

    def _evaluate(self, with_swa: bool, heed: bool = True) -> dict:
        """Raw and averaged weights on the validation file. heed: look for signals on the way."""
        row: dict[str, Any] = {}
        started, c = time.perf_counter(), self.config.validation
        common = len(self.val_loader.beton) // (
            self.val_loader.batch_size * self.compute.world_size
        )  # batches of every process
        models = {"": self.model} | ({"ema_": self.ema.module} if self.ema is not None else {})
        if self.swa is not None and with_swa:
            models["swa_"] = self.swa.module
        for prefix, model in models.items():
            with (
                self._within_memory("validation", c.resolution),
                self._bar(f"validation {prefix[:-1].upper()}".strip(), len(self.val_loader)) as bar,
            ):

                def after_batch(number: int) -> None:
                    bar.update()
                    if heed and number < common:
                        self._heed(False)

                result = evaluate(
                    model, self.val_loader, self.compute, c.lr_tta, self.label_sets, after_batch
                )
            row |= {prefix + name: number for name, number in result.items() if name != "images"}
            row["val_images"] = result["images"]
        return row | {"val_seconds": time.perf_counter() - started}

    def _within_memory(self, section: str, resolution: int) -> AbstractContextManager[None]:
        """Around work on batches of `section`.batch_size images."""
        lower = (
            "lower training.batch_size (and keep training.global_batch: more groups are "
            "accumulated) or resolution.max_res"
        )
        return compute.within_memory(
            f"{section}.batch_size={getattr(self.config, section).batch_size} images of "
            f"{resolution} px",
            lower
            if section == "training"
            else "lower validation.batch_size or validation.resolution",
        )

    # ---------------------------------------------------------------- state

    def _heed(self, regular: bool) -> None:
        """After a step: saves where it is time (regular: always), and ends where a signal asked for
        it, all processes alike."""
        minutes = self.config.checkpoint.every_minutes
        due, stop = self.votes.cast(
            bool(minutes) and time.monotonic() - self._saved_at > 60 * minutes,
            self.interrupt.received is not None,
        )
        if due or stop or regular:
            self._check_state()
            self._save(False)
        if stop:
            if not self.store.finish():
                raise InputError(
                    f"{self.folder}: the run was asked to end and could not be saved; "
                    f"{checkpoint.MEND}"
                )
            if self.compute.is_main:
                (self.folder / REQUEUE_MARK).touch()
            self._say(
                f"saved after step {self.step}; the same command goes on from here (exit status "
                f"{REQUEUE})"
            )
            raise SystemExit(REQUEUE)

    def _check_state(self) -> None:
        """Before a save: what is saved may have to be gone back to. Raises GoBack or Stop."""
        if (
            self.health.non_finite in ("stop", "act")
            and self.unread
            and not compute.sum_over_processes(self.window[: len(self.unread)].sum()).isfinite()
        ):
            self._read_losses()
        self.health.check_weights(self.step - 1, self.model.state_dict().values())

    def _save(self, best: bool) -> None:
        self._settle()
        state = self._state()
        if self.compute.is_main:
            self.store.save(state, best)
        self._saved_at = time.monotonic()

    def _settle(self) -> None:
        """Waits for the save in progress. A best state that is not on disk is none."""
        if not self.store.finish() and self._beaten is not None:
            self.best = self._beaten
        self._beaten = None

    def _state(self) -> dict:
        counted = {
            "totals": self.totals.tolist(),
            "window": self.window[: len(self.unread)].tolist(),
            "skipped": self.skipped,
        }
        return {
            "recipe": self.recipe,
            "step": self.step,
            "rows": self.rows,
            "best": self.best,
            "epoch": {
                "processes": compute.gather([counted]),
                "unread": self.unread,
                "seconds": self.seconds,
                "waited": self.waited,
                "events": self.events,
            },
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.train_step.scaler.state_dict(),
            "health": self.health.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "swa": self.swa.state_dict() if self.swa is not None else None,
        }

    def _newest(self, regular: bool = False) -> tuple[Path, dict] | None:
        """The folder's newest whole checkpoint (see Store.newest), on every process the one that
        the first has found."""
        found: tuple[Path, dict] | None = None

        def look() -> str | None:
            nonlocal found
            found = self.store.newest(regular)
            return str(found[0]) if found else None

        path = compute.on_first_process(look)
        return found if found or path is None else (Path(path), checkpoint.read(Path(path)))

    def _resume(self, path: Path, state: dict) -> None:
        if self.config.checkpoint.resume == "never":
            raise InputError(
                f"checkpoint.resume=never: {self.folder} has a checkpoint; use "
                f"checkpoint.resume=auto to continue "
                f"it or another logging.folder"
            )
        self._load(state)
        if (
            self.compute.is_main
            and not self.config.training.eval_only
            and self.best["step"] == self.step
        ):
            self.store.mark_best(path)  # a kill may have come between its two names
        self._say(f"resuming {self.folder} after step {self.step} of {self.plan.total_steps}")

    def _load(self, state: dict) -> None:
        checkpoint.check_recipe(state["recipe"], self.recipe, self.folder)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run so far needed no scaler
            self.train_step.scaler.load_state_dict(state["scaler"])
        for average, name in ((self.ema, "ema"), (self.swa, "swa")):
            if average is not None:
                average.load_state_dict(state[name])
        if (
            self.swa is not None
            and len(state["epoch"]["processes"]) != self.compute.world_size
            and not self.swa.finished
        ):
            self.swa.batches = -1  # counted for another number of processes
        self.health.load_state_dict(state["health"])
        self.step, self.rows, self.best = state["step"], list(state["rows"]), state["best"]
        self._begin_epoch()
        epoch, rank, world = state["epoch"], self.compute.rank, self.compute.world_size
        counted = epoch["processes"]
        if (
            len(counted) != world
        ):  # another number of processes: the first one takes what all had counted
            windows = [process["window"] for process in counted]
            window = [statistics.fmean(losses) for losses in zip(*windows)]
            first = {
                "totals": [
                    sum(numbers) for numbers in zip(*(process["totals"] for process in counted))
                ],
                "window": window,
                "skipped": [item for process in counted for item in process["skipped"]],
            }
            counted = [first] + [{"totals": [0.0] * 3, "window": window, "skipped": []}] * (
                world - 1
            )
        mine = counted[rank]
        self.totals += torch.tensor(mine["totals"], dtype=torch.float64, device=self.totals.device)
        self.unread = list(epoch["unread"])
        self.window[: len(self.unread)] = torch.tensor(mine["window"], dtype=torch.float64)
        self.skipped = [tuple(item) for item in mine["skipped"]]
        self.seconds, self.waited, self.events = (
            epoch["seconds"],
            epoch["waited"],
            list(epoch["events"]),
        )

    def _go_back(self, request: GoBack) -> None:
        """To the newest checkpoint, and on from there otherwise than before."""
        self.store.finish()
        returns = self.health.returns + 1
        found = self._newest(regular=True)
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
        if (
            compute.on_first_process(lambda: self.store.give_up(self.step))
            and self.best["step"] != self.step
        ):
            self.best = dict(NO_BEST)
        self.health.returns, self.health.returned = returns, True
        self.health.lr_factor *= request.factor
        self.health.skipped_steps.extend(request.skip)
        self.health.forget()
        self._note(
            f"{request.reason}: back to step {self.step}, "
            + (
                f"leaving out step {' and '.join(map(str, request.skip))}"
                if request.skip
                else f"learning rate x {self.health.lr_factor:g} from here on"
            )
        )
        self._save(self.best["step"] == self.step)

    def _recipe(self) -> dict:
        """What decides the run's result: a checkpoint belongs to one recipe."""
        recipe = as_dict(self.config)
        kept = {
            name: dict(recipe[name])
            for name in ("model", "resolution", "augment", "mix", "lr", "training", "ema", "swa")
        }
        kept["model"]["num_classes"] = self.num_classes
        for name in ("eval_only", "distributed"):
            del kept["training"][name]
        kept["training"]["global_batch"] = self.train_loader.global_batch
        beton = self.train_loader.beton
        kept["data"] = {
            "train_images": len(beton),
            "train_fingerprint": beton.fingerprint(),
            "order": self.config.data.order,
        }
        kept["checkpoint"] = {"warm_start": self.config.checkpoint.warm_start}
        return kept

    # ---------------------------------------------------------------- what people see

    def _facts(self) -> dict:
        """What has to be the same on all processes: the recipe and its rhythm, what the files hold,
        versions."""
        facts = {
            f"{section}.{name}": value
            for section, options in as_dict(self.config).items()
            for name, value in options.items()
            if f"{section}.{name}" not in OWN
        }
        for name, loader in (("train", self.train_loader), ("val", self.val_loader)):
            beton = loader.beton
            facts[f"data.{name}_dataset"] = (
                f"{len(beton)} images of {beton.num_classes} classes, fingerprint "
                f"{beton.fingerprint()}, "
                f"labels {checksum(beton.labels):016x}"
            )
        if self.label_sets is not None:
            facts["validation.labels"] = f"{checksum(self.label_sets.numpy()):016x}"
        where = self.compute
        return facts | {
            "device": where.device.type,
            "precision": where.precision,
            "compile": where.compile,
            "rsb_ffcv": __version__,
            "Python": ".".join(platform.python_version_tuple()[:2]),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": numpy.__version__,
        }

    def _open_folder(self) -> None:
        if self.compute.is_main:
            (self.folder / REQUEUE_MARK).unlink(missing_ok=True)
            log.write_metrics(
                self.folder, self.rows
            )  # a run killed after its log and before its checkpoint logs again
            log.write_json(self.folder / "config.json", as_dict(self.config))

    def _finish(self) -> None:
        rows = self.rows
        log.draw_curves(rows, self.folder / "training_curves.png")
        last, lines = rows[-1], []
        for name, module, prefix, suffix in (
            ("raw", self.model, "", ""),
            ("EMA", self.ema and self.ema.module, "ema_", "_ema"),
            ("SWA", self.swa and self.swa.module, "swa_", "_swa"),
        ):
            if module is not None:
                weights = checkpoint.on_host(module.state_dict())
                checkpoint.write(weights, self.folder / f"final_weights{suffix}.pt")
                lines.append(
                    (
                        f"top-1 (top-5), {name} weights",
                        f"{last[prefix + 'top1']:.2f} % ({last[prefix + 'top5']:.2f} %)",
                    )
                )
        wait = 100 * sum(row["data_wait_s"] for row in rows) / sum(row["seconds"] for row in rows)
        lines += [
            ("best top-1", f"{self.best['top1']:.2f} % after epoch {self.best['epoch'] + 1}"),
            ("validation images", str(last["val_images"])),
            (
                "training images/s, median",
                f"{statistics.median(row['images_per_s'] for row in rows):.0f}",
            ),
            ("waiting for data", f"{wait:.1f} % of training time"),
            ("weights, metrics, curves", f"{self.folder}/"),
        ]
        print(log.table(lines), flush=True)

    def _bar(self, title: str, total: int, done: int = 0) -> tqdm:
        return tqdm(
            total=total,
            initial=done,
            desc=title,
            disable=not self.compute.is_main,
            leave=False,
            file=sys.stderr,
            mininterval=0.5,
        )

    def _say(self, text: str) -> None:
        if self.compute.is_main:
            print(text, flush=True)

    def _note(self, text: str) -> None:
        """A warning that the epoch's row keeps."""
        self.events = self.events + [text]
        if self.compute.is_main:
            warn(text)
