"""One run: built from a configuration, trained step by step, validated and saved after each epoch.

The inputs of a step are a function of the recipe and the step's number: the loader's slots, the
addresses of the mixing and noise draws, the learning rate, and the seed that torch's global
generator (stochastic depth) is set to before each group. `resume.State` contains everything that a
step changes.
"""

import json
import time
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from types import TracebackType

import torch

from rsb_ffcv import InputError, option_names
from rsb_ffcv.config.options import as_dict
from rsb_ffcv.config.train import TrainConfig
from rsb_ffcv.learning.model import check_arch
from rsb_ffcv.learning.optimizer import check_optimizer
from rsb_ffcv.reporting import log
from rsb_ffcv.reporting.console import Console
from rsb_ffcv.training import batch_norm, build, checkpoint, compute, facts
from rsb_ffcv.training.evaluate import evaluate_all, read_label_sets
from rsb_ffcv.training.health import GoBack, Stop
from rsb_ffcv.training.interrupt import Interrupt
from rsb_ffcv.training.plan import Epoch, Plan
from rsb_ffcv.training.processes import Heartbeat, check_same, check_shared
from rsb_ffcv.training.progress import Progress
from rsb_ffcv.training.resume import Checkpointer, State, newest
from rsb_ffcv.training.step import TrainStep


class Trainer:
    """Builds a run from `config`, resumes it if its folder has a checkpoint, and trains it to the
    end.

    Raises InputError for every error that the user can fix. Use it as a context manager, which ends
    the loaders' threads.
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

    # ---------------------------------------------------------------- build

    def _build(self) -> None:
        c = self.config
        self.compute = compute.set_up(
            c.compute.device,
            c.compute.precision,
            compile=c.compute.compile,
            channels_last=c.compute.channels_last,
            threads=c.compute.threads,
            timeout_s=c.dist.timeout_s,
        )
        self.heartbeat = Heartbeat(c.dist.timeout_s, self.compute.hosts)
        self.console = Console(self.compute.is_main)
        self.console.say(self.compute.describe())
        check_arch(c.model.arch)
        check_optimizer(c.training.optimizer)
        self._build_loaders()
        self.plan = Plan(c, self.train_loader.steps_per_epoch)
        self.folder = Path(c.logging.folder)
        store = self._open.enter_context(
            closing(checkpoint.Store(self.folder, c.checkpoint.keep, self.plan.is_regular))
        )
        if not c.training.eval_only:
            compute.on_first_process(store.lock)
            if self.compute.world_size > 1:
                check_shared(self.folder)
        found = newest(store)
        self.model = build.model(c, self.num_classes, self.compute, new=found is None)
        if found is None and c.checkpoint.warm_start:
            self.console.say(f"starting from the weights of {c.checkpoint.warm_start}")
        self.ema, self.swa = build.averages(c, self.model, self.train_loader.global_batch)
        optimizer = build.optimizer(c, self.model, self.compute)
        mean_groups = self.train_loader.groups / self.compute.world_size
        own_groups = self.train_loader.batches_per_step
        self.progress = Progress(self.compute, own_groups / mean_groups)
        self.health = build.health(c, self._note)
        if left_out := build.left_out(c, self.train_loader):
            self.console.say(left_out)
        self.train_step = TrainStep(
            self.model,
            build.wrapped(self.model, self.compute),
            optimizer=optimizer,
            loss=build.loss(c),
            transform=build.batch_transform(c),
            compute=self.compute,
            groups=own_groups,
            mean_groups=mean_groups,
            seed=c.training.seed,
            grad_clip=c.training.grad_clip,
            ema=self.ema,
        )
        state = State(
            recipe=self.recipe,
            progress=self.progress,
            model=self.model,
            optimizer=optimizer,
            scaler=self.train_step.scaler,
            health=self.health,
            ema=self.ema,
            swa=self.swa,
        )
        self.checkpointer = Checkpointer(
            c,
            state,
            store=store,
            where=self.compute,
            console=self.console,
            interrupt=self.interrupt,
        )
        if found is not None:
            self.checkpointer.resume(*found, self.plan.total_steps)
        for loader in (self.train_loader, self.val_loader) if c.data.in_memory else ():
            try:
                loader.preload(lambda: self.interrupt.received is not None)
            except InputError as error:
                raise InputError(f"data.in_memory=1: {error}; use data.in_memory=0") from error

    def _build_loaders(self) -> None:
        """Builds the loaders, and what depends on their files: classes, label sets, recipe."""
        c = self.config
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
        self.recipe = facts.recipe(c, self.train_loader, self.num_classes)
        check_same(
            facts.shared(
                c,
                self.compute,
                train_loader=self.train_loader,
                val_loader=self.val_loader,
                label_sets=self.label_sets,
            )
        )

    def _note(self, text: str) -> None:
        """Prints a warning, and adds it to the epoch's row."""
        self.progress.note(text)
        self.console.warn(text)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._open.close()
        if kind is None or kind is SystemExit:
            assert self.heartbeat is not None  # set by _build
            self.checkpointer.close()
            self.heartbeat.end()
            # They reference process groups; see compute.leave.
            del self.checkpointer, self.heartbeat, self.train_step
            compute.leave()
        else:
            self._end_beat(error)

    def _end_beat(self, error: BaseException | None) -> None:
        """Call before this process ends with `error`."""
        if self.heartbeat is None:
            return
        if isinstance(error, InputError):
            self.heartbeat.say_no_more()
        elif isinstance(error, Exception):
            self.heartbeat.verdict(error)

    # ---------------------------------------------------------------- fit

    def fit(self) -> None:
        """Trains from the current step to the end, and prints the closing table."""
        self.checkpointer.begin()
        rows = self.progress.rows
        if self.compute.is_main:
            # The log may be ahead of the checkpoint if the run was killed between the two.
            log.write_metrics(self.folder, rows)
            log.write_json(self.folder / "config.json", as_dict(self.config))
        while len(self.progress.rows) < self.plan.epochs:
            try:
                epoch = self.plan[len(self.progress.rows)]
                self._train_epoch(epoch)
                if self.swa is not None and epoch.last:
                    self._estimate_batch_norm(epoch)
                self._close_epoch(epoch)
            except GoBack as request:
                self.checkpointer.go_back(request)
            except Stop as request:
                raise InputError(str(request)) from request
        if not self.checkpointer.store.finish() and self.compute.is_main:
            raise InputError(
                f"{self.folder}: the last checkpoint could not be written; {checkpoint.FIX}, and "
                f"start again"
            )
        if self.compute.is_main:
            self._finish()

    def _finish(self) -> None:
        log.draw_curves(self.progress.rows, self.folder / "training_curves.png")
        models = self._models(with_swa=True)
        for prefix, model in models.items():
            state = checkpoint.on_host(model.state_dict())
            suffix = f"_{prefix.removesuffix('_')}" if prefix else ""
            checkpoint.write(state, self.folder / f"final_weights{suffix}.pt")
        self.console.closing_table(
            self.progress.rows, self.progress.best, list(models), folder=self.folder
        )

    def _models(self, with_swa: bool) -> dict[str, torch.nn.Module]:
        """The weights to evaluate, by the prefix of their results: raw, EMA and SWA."""
        models = {"": self.model}
        if self.ema is not None:
            models["ema_"] = self.ema.module
        if self.swa is not None and with_swa:
            models["swa_"] = self.swa.module
        return models

    def evaluate_only(self) -> None:
        """Evaluates the newest checkpoint of logging.folder and prints the result as one JSON
        line."""
        c, step = self.config, self.progress.step
        if step == 0 and not c.model.pretrained and not c.checkpoint.warm_start:
            raise InputError(
                f"training.eval_only=1: {self.folder} has no checkpoint; train first, set "
                f"logging.folder to a run's folder, or use model.pretrained=1 or "
                f"checkpoint.warm_start"
            )
        result = self._evaluate(len(self.progress.rows) == self.plan.epochs, check_signals=False)
        self.console.say(
            json.dumps({"epoch": step // self.plan.steps_per_epoch - 1, "step": step, **result})
        )

    # ---------------------------------------------------------------- one epoch

    def _train_epoch(self, epoch: Epoch) -> None:
        """Runs the remaining steps of the epoch."""
        progress, loader = self.progress, self.train_loader
        done = progress.step - epoch.number * epoch.steps
        if done == epoch.steps:
            return
        loader.resolution = epoch.resolution
        self.train_step.wrapped.train()
        skipped_before = progress.skipped
        with (
            self._within_memory("training", epoch.resolution),
            closing(loader.epoch(epoch.number, done)) as batches,
            self.console.bar(f"epoch {epoch.number + 1}", epoch.steps, done) as bar,
        ):
            for step in range(done, epoch.steps):
                started = time.perf_counter()
                lr = epoch.lr(step) * self.health.lr_factor
                if progress.step in self.health.skipped_steps:
                    for _ in range(loader.batches_per_step):
                        next(batches)
                else:
                    sums, waited = self.train_step(
                        epoch.number, batches, lr=lr, mixing=epoch.mixing
                    )
                    progress.add(sums, waited)
                progress.step += 1
                progress.skipped = skipped_before + loader.skipped
                last = step + 1 == epoch.steps
                if self.swa is not None and last and epoch.averaging:
                    self.swa.update()
                reads = progress.window_is_full or last
                if reads:
                    self.health.check_losses(*progress.read_losses())
                progress.seconds += time.perf_counter() - started
                if reads:
                    s = progress.summary()
                    bar.set_postfix(
                        loss=f"{s['loss']:.4f}",
                        top1=f"{s['top1']:.1f}%",
                        lr=f"{lr:.2e}",
                        img_s=f"{s['img_s']:.0f}",
                    )
                bar.update()
                self.checkpointer.after_step(not last and self.plan.is_regular(progress.step))

    def _estimate_batch_norm(self, epoch: Epoch) -> None:
        """Estimates the averaged model's batch-norm statistics; see `batch_norm.estimate`."""
        c, swa, loader = self.config, self.swa, self.train_loader
        assert swa is not None  # checked by the caller
        if swa.finished:
            return
        rounds = batch_norm.rounds_of(loader.groups, self.compute.world_size)
        needed = min(c.swa.bn_steps or epoch.steps, epoch.steps) * rounds
        swa.begin_batch_norm() if swa.rounds < 0 else swa.resume_batch_norm()
        loader.resolution = epoch.resolution
        start, done = divmod(swa.rounds, rounds)
        every = c.checkpoint.every_steps * rounds
        with (
            self._within_memory("training", epoch.resolution),
            closing(loader.epoch(self.plan.epochs, start)) as batches,
            self.console.bar("batch norm", needed, swa.rounds) as bar,
        ):
            for _ in range(min(done, loader.batches_per_step)):
                next(batches)

            def after_round() -> None:
                bar.update()
                self.checkpointer.after_step(bool(every) and swa.rounds % every == 0)

            batch_norm.estimate(
                swa,
                batches,
                self.compute,
                groups=loader.groups,
                needed=needed,
                after_round=after_round,
            )
        swa.end_batch_norm()

    # ---------------------------------------------------------------- closing it

    def _close_epoch(self, epoch: Epoch) -> None:
        """Validates, and writes the epoch's row and a checkpoint."""
        progress, health = self.progress, self.health
        self.checkpointer.check()
        self.checkpointer.settle()
        row = progress.row(
            epoch,
            loss=self.train_step.loss.name(epoch.mixing),
            lr=epoch.lr(epoch.steps - 1) * health.lr_factor,
        )
        beaten = None
        if self.config.logging.log_level or epoch.last:
            row |= self._evaluate(epoch.last)
            share = self.ema.initial_share() if self.ema else 0.0
            if health.check_accuracy(
                epoch.number,
                row,
                classes=self.num_classes,
                initial_share=share,
                ema_warmup=self.config.ema.warmup,
            ):
                assert self.ema is not None  # check_accuracy has compared it with the model
                self.ema.restart()
            top1 = max(row[name] for name in ("top1", "ema_top1", "swa_top1") if name in row)
            if top1 > progress.best["top1"]:
                beaten = progress.best
                progress.best = {"top1": top1, "epoch": epoch.number, "step": progress.step}
        if progress.events:
            row["events"] = progress.events
        health.end_epoch()
        progress.rows = progress.rows + [row]
        if not epoch.last:
            following = self.plan[epoch.number + 1]
            if (following.mixing, following.resolution) != (epoch.mixing, epoch.resolution):
                health.forget()
        progress.begin_epoch()
        self.checkpointer.save_epoch(beaten)
        if self.compute.is_main:
            try:
                with option_names(build.TRAIN_OPTIONS):
                    log.write_metrics(self.folder, progress.rows)
            except InputError as error:  # the next epoch, or a restart, writes the complete log
                self.console.warn(f"{error}; the run continues")
        self.console.say(json.dumps(row))

    def _evaluate(self, with_swa: bool, check_signals: bool = True) -> dict:
        """Evaluates raw and averaged weights on the validation file. check_signals: look for
        signals between batches."""
        # number of batches that every process has
        loader = self.val_loader
        common = len(loader.beton) // (loader.batch_size * self.compute.world_size)

        def after_batch(number: int) -> None:
            if check_signals and number < common:
                self.checkpointer.after_step(False)

        with self._within_memory("validation", self.config.validation.resolution):
            return evaluate_all(
                self._models(with_swa),
                loader,
                compute=self.compute,
                console=self.console,
                flip_tta=self.config.validation.lr_tta,
                label_sets=self.label_sets,
                after_batch=after_batch,
            )

    def _within_memory(self, section: str, resolution: int) -> AbstractContextManager[None]:
        """A context for work on batches of `section`.batch_size images; see
        compute.within_memory."""
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
