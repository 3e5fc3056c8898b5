"""One run: built from a configuration, trained step by step, validated and saved after each epoch.

The inputs of a step are a function of the recipe and the step's number: the loader's slots, the
addresses of the mixing and noise draws, the learning rate, and the seed that torch's global
generator (stochastic depth) is set to before each group. `resume.State` contains everything that a
step changes.
"""

import copy
import json
import statistics
import time
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType

import torch

from rsb_ffcv import InputError, first_line, option_names
from rsb_ffcv.config.options import as_dict
from rsb_ffcv.config.train import TrainConfig, expected_curve, tracker_names
from rsb_ffcv.learning.model import check_arch
from rsb_ffcv.learning.optimizer import check_optimizer
from rsb_ffcv.reporting import log, trackers
from rsb_ffcv.reporting.console import Console
from rsb_ffcv.reporting.curves import CURVES, Curves
from rsb_ffcv.training import (
    batch_norm,
    branch,
    build,
    checkpoint,
    compute,
    environment,
    report,
)
from rsb_ffcv.training.copies import Copies
from rsb_ffcv.training.data import open_data
from rsb_ffcv.training.evaluate import Evaluator
from rsb_ffcv.training.health import GoBack, Stop
from rsb_ffcv.training.interrupt import Interrupt
from rsb_ffcv.training.plan import Epoch, Plan
from rsb_ffcv.training.processes import Heartbeat
from rsb_ffcv.training.profile import Profile
from rsb_ffcv.training.progress import Progress
from rsb_ffcv.training.resume import Checkpointer, State


class Trainer:
    """Builds a run from `config`, resumes it if its folder has a checkpoint, and trains it to the
    end.

    Raises InputError for every error that the user can fix. Use it as a context manager, which ends
    the loaders' threads.
    """

    def __init__(self, config: TrainConfig, interrupt: Interrupt) -> None:
        self.config = config
        with ExitStack() as stack:
            self._build(stack, interrupt)
            self._open = stack.pop_all()

    # ---------------------------------------------------------------- build

    def _build(self, stack: ExitStack, interrupt: Interrupt) -> None:
        c = self.config
        last = stack.enter_context(ExitStack())  # what is closed after the last line of the log
        self.compute = where = build.hardware(c)
        stack.enter_context(Heartbeat(c.dist.timeout_s, where.hosts))
        self.console = stack.enter_context(Console(where.is_main))
        self.console.info(where.describe())
        trackers_used = [] if c.training.eval_only else tracker_names(c)
        compute.on_first_process(lambda: trackers.check(trackers_used))
        check_arch(c.model.arch)
        check_optimizer(c.training.optimizer)
        self.data = stack.enter_context(open_data(c, where, self.console))
        self.plan = Plan(c, self.data.train_loader.steps_per_epoch)
        self.folder = Path(c.logging.folder)
        store = checkpoint.Store(
            self.folder,
            c.checkpoint.keep,
            regular=self.plan.is_regular,
            archived=self.plan.is_archived,
            timeout_s=c.dist.timeout_s,
        )
        last.enter_context(closing(store))
        stack.callback(store.finish)
        copies = Copies(store, where)
        if not c.training.eval_only and (copied := copies.lock()):
            self.console.info(copied)
        choice = copies.find(self.data.recipe)
        if choice is not None and c.checkpoint.resume == "never":
            raise InputError(
                f"checkpoint.resume=never: {choice.path.parent} has a checkpoint; use "
                f"checkpoint.resume=auto to resume it, or another logging.folder"
            )
        if choice is not None and not c.training.eval_only:
            copies.synchronize(choice)
        if choice is not None and choice.owner:
            self.console.info(f"the newest checkpoint is that of {copies.name(choice.owner)}")
        found = copies.fetch(choice) if choice is not None else None
        source = branch.find(c.checkpoint.branch) if c.checkpoint.branch and not found else None
        model = build.model(
            c,
            self.data.num_classes,
            where,
            new=found is None and source is None,
            report=self.console.info,
        )
        self.ema, self.swa = build.averages(c, model, self.data.train_loader.global_batch)
        self.train_step = build.train_step(
            c, model, ema=self.ema, loader=self.data.train_loader, where=where
        )
        self.progress = Progress(where, self.train_step.groups / self.train_step.mean_groups)
        self.health = build.health(c, self._note)
        if same := build.same_files(c, self.data.train_loader.beton, self.data.val_loader.beton):
            self.console.warn(same)
        if left_out := build.left_out(c, self.data.train_loader):
            self.console.info(left_out)
        averages = {"ema_": self.ema, "swa_": self.swa}
        self.evaluate = Evaluator(
            c,
            {"": model} | {key: made.module for key, made in averages.items() if made is not None},
            loader=self.data.val_loader,
            label_sets=self.data.label_sets,
            where=where,
            console=self.console,
        )
        state = State(
            recipe=self.data.recipe,
            progress=self.progress,
            model=model,
            optimizer=self.train_step.optimizer,
            scaler=self.train_step.scaler,
            health=self.health,
            ema=self.ema,
            swa=self.swa,
        )
        self.checkpointer = Checkpointer(
            c, state, copies=copies, where=where, console=self.console, interrupt=interrupt
        )
        stack.enter_context(self.checkpointer)
        self.profile = Profile(
            c.compute.profile if where.is_main else 0,
            self.data.train_loader,
            path=self.folder / "trace.json",
            console=self.console,
        )
        if found is not None:
            self.checkpointer.resume(*found, self.plan.total_steps)
        elif source is not None:
            path, saved = source
            for line in branch.take_over(c, state, self.plan, path=path, saved=saved):
                self.console.info(line)
            if not c.training.eval_only:
                self.checkpointer.save_epoch()  # from here on, the run needs no other folder
        if not c.training.eval_only:
            self.console.log_to(self.folder)
        self._report_to(trackers_used if where.is_main else [], stack)
        if c.data.in_memory:
            self.data.preload(lambda: interrupt.received is not None)

    def _report_to(self, names: list[str], stack: ExitStack) -> None:
        """Opens the trackers `names`, and the figure of the run."""
        c, progress = self.config, self.progress
        # An epoch that was saved may be missing there, so the last one is sent again.
        last = progress.rows[-1:]
        run = trackers.TrackedRun(
            folder=self.folder,
            id=trackers.run_id(self.folder) if names else "",
            project=c.logging.project,
            name=c.logging.run_name or self.folder.resolve().name,
            options=as_dict(c),
            epoch=len(progress.rows) - len(last),
            step=progress.step,
        )
        self.trackers = stack.enter_context(
            trackers.Trackers(
                {name: trackers.CLASSES[name] for name in names}, run, warn=self.console.warn
            )
        )
        for row in last:
            self.trackers.log("epoch", row["epoch"] + 1, row)
        self.expected = expected_curve(c)
        self.curves = stack.enter_context(
            Curves(self.folder / CURVES, self.expected, warn=self.console.warn)
        )

    def _note(self, text: str) -> None:
        """Prints a warning, and adds it to the epoch's row."""
        self.progress.note(text)
        self.console.warn(text)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)
        if kind is None or kind is SystemExit:
            # They reference process groups; see compute.destroy_process_group.
            del self.checkpointer, self.train_step
            compute.destroy_process_group()

    # ---------------------------------------------------------------- fit

    def fit(self) -> None:
        """Trains from the current step to the end, evaluates each image, and prints the closing
        table."""
        self.checkpointer.begin()
        if self.compute.is_main:
            # The log may be ahead of the checkpoint if the run was killed between the two.
            log.write_metrics(self.folder, self.progress.rows)
            lineage = {"lineage": self.progress.lineage} if self.progress.lineage else {}
            log.write_json(self.folder / "config.json", as_dict(self.config) | lineage)
            self._write_environment()
        while len(self.progress.rows) < self.plan.epochs:
            try:
                epoch = self.plan[len(self.progress.rows)]
                self._train_epoch(epoch)
                self._close_epoch(epoch)
            except GoBack as request:
                self.checkpointer.go_back(request)
                self.trackers.rewind(len(self.progress.rows), self.progress.step)
            except Stop as request:
                raise InputError(str(request)) from request
        self.profile.close()
        self.checkpointer.copies.finish_or_fail(
            f"the last checkpoint could not be written; {checkpoint.FIX}, and start again"
        )
        weights, _ = log.best_of(self.progress.rows[-1])
        per_image = self.evaluate.each_image(
            log.PREFIXES[weights], after_batch=lambda: self.checkpointer.after_step(False)
        )
        if self.compute.is_main:
            self._finish(weights, per_image)

    def _write_environment(self) -> None:
        """Writes environment.json. That of a finished run stays as it is."""
        path = self.folder / log.ENVIRONMENT
        if len(self.progress.rows) < self.plan.epochs or not path.exists():
            data = self.data
            about = environment.describe(
                self.compute,
                decode=data.decode,
                threads=data.threads,
                train=data.train_loader.beton,
                val=data.val_loader.beton,
            )
            log.write_json(path, about)

    def _finish(self, weights: str, per_image: torch.Tensor) -> None:
        """Writes the weights and the report. weights, per_image: see report.findings."""
        rows, models = self.progress.rows, self.evaluate.models
        self.curves.update(rows)
        self.curves.complete()
        self.trackers.finished()
        for prefix, model in models.items():
            state = checkpoint.on_host(model.state_dict())
            suffix = f"_{prefix.removesuffix('_')}" if prefix else ""
            checkpoint.write(state, self.folder / f"final_weights{suffix}.pt")
        written = self._write_report(weights, per_image)
        self.console.closing_table(
            rows, self.progress.best, list(models), folder=self.folder, report=written
        )

    def _write_report(self, weights: str, per_image: torch.Tensor) -> bool:
        """Writes metrics.json and report.html. Returns whether that worked; if not, it is one
        warning."""
        rows, data = self.progress.rows, self.data
        try:
            with option_names(build.TRAIN_OPTIONS):
                log.write_metrics(self.folder, rows)  # the last epoch may have found a full disk
                found = report.findings(
                    data.val_loader.beton,
                    data.num_classes,
                    weights=weights,
                    row=rows[-1],
                    per_image=per_image.numpy(),
                    label_sets=data.label_sets,
                )
                report.write(self.folder, found)
        # Names, pictures and figures come from the user's files. No report is worth a run.
        except Exception as error:
            self.console.warn(
                f"{log.REPORT} was not written: {first_line(error)}; the run is complete, and the "
                f"same command writes it"
            )
            return False
        return True

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
        swa = self.swa.module if self.swa is not None and self.swa.finished else None
        result = self.evaluate(swa=swa)
        epoch = step // self.plan.steps_per_epoch - 1
        self.console.info(json.dumps({"epoch": epoch, "step": step, **result}))

    # ---------------------------------------------------------------- one epoch

    def _train_epoch(self, epoch: Epoch) -> None:
        """Runs the remaining steps of the epoch."""
        progress, loader = self.progress, self.data.train_loader
        done = progress.step - epoch.number * epoch.steps
        if done == epoch.steps:
            return
        loader.resolution = epoch.resolution
        self.train_step.begin_epoch()
        skipped_before = progress.skipped
        with (
            build.within_memory(self.config, "training", epoch.resolution),
            closing(loader.epoch(epoch.number, done)) as batches,
            self.console.bar(f"epoch {epoch.number + 1}", epoch.steps, done) as bar,
        ):
            for step in range(done, epoch.steps):
                self.profile.before_step()
                started = time.perf_counter()
                lr = epoch.lr(step) * self.health.lr_factor
                if progress.step in self.health.skipped_steps:
                    for _ in range(loader.batches_per_step):
                        next(batches)
                else:
                    progress.add(
                        self.train_step(epoch.number, batches, lr=lr, mixing=epoch.mixing), lr
                    )
                progress.step += 1
                progress.skipped = skipped_before + loader.skipped
                last = step + 1 == epoch.steps
                if self.swa is not None and last and epoch.averaging:
                    self.swa.update()
                reads = progress.window_is_full or last
                if reads:
                    steps, losses = progress.read_losses()
                    if self.train_step.own_time is not None:
                        progress.own_ms += self.train_step.own_time.read()
                    self.health.check_losses(steps, losses)
                progress.seconds += time.perf_counter() - started
                self.profile.after_step()
                if reads:
                    bar.set_postfix(progress.summary(lr))
                    if losses:
                        mean = statistics.fmean(losses)
                        self.trackers.log("step", progress.step, {"train_loss": mean, "lr": lr})
                bar.update()
                self.checkpointer.after_step(not last and self.plan.is_regular(progress.step))

    def _averaged_model(self, epoch: Epoch) -> torch.nn.Module | None:
        """The SWA model after an epoch with batch-norm statistics, if there is one: the run's own
        at its end, before that a copy, so that the run does not depend on its evaluation."""
        if self.swa is None or not epoch.averaging:
            return None
        swa = self.swa if epoch.last else copy.deepcopy(self.swa)
        self.data.train_loader.resolution = epoch.resolution
        with build.within_memory(self.config, "training", epoch.resolution):
            batch_norm.estimate(
                swa,
                self.data.train_loader,
                self.compute,
                epoch=self.plan.epochs,  # the order of an epoch that is not trained
                steps=min(self.config.swa.bn_steps or epoch.steps, epoch.steps),
                save_every=self.config.checkpoint.every_steps if epoch.last else 0,
                console=self.console,
                after_round=self.checkpointer.after_step,
            )
        return swa.module

    # ---------------------------------------------------------------- closing it

    def _close_epoch(self, epoch: Epoch) -> None:
        """Validates, and writes the epoch's row and a checkpoint."""
        progress, health = self.progress, self.health
        evaluates = bool(self.config.logging.log_level) or epoch.last
        swa = self._averaged_model(epoch) if evaluates else None
        self.checkpointer.check()
        self.checkpointer.wait_for_save()
        row = progress.row(
            epoch,
            loss=self.train_step.loss.name(epoch.mixing),
            lr=epoch.lr(epoch.steps - 1) * health.lr_factor,
        )
        previous_best = best_weights = None
        if evaluates:
            row |= self.evaluate(swa=swa, after_batch=lambda: self.checkpointer.after_step(False))
            if health.check_accuracy(
                epoch.number,
                row,
                classes=self.data.num_classes,
                initial_share=self.ema.initial_share() if self.ema else 0.0,
                ema_warmup=self.config.ema.warmup,
            ):
                assert self.ema is not None  # check_accuracy has compared it with the model
                self.ema.restart()
            health.check_course([*progress.rows, row], self.expected)
            previous_best = progress.new_best(row)
            if previous_best is not None:
                best_weights = self._best_weights(row, swa)
        row |= progress.pace(row, self.plan.epochs)
        if progress.events:
            row["events"] = progress.events
        health.end_epoch()
        # The durations and memory of process 0, so that every process has the same log
        row = compute.on_first_process(lambda: row)
        progress.rows = progress.rows + [row]
        if not epoch.last:
            following = self.plan[epoch.number + 1]
            if (following.mixing, following.resolution) != (epoch.mixing, epoch.resolution):
                health.reset_history()
        progress.begin_epoch()
        self.checkpointer.save_epoch(previous_best, best_weights)
        if self.compute.is_main:
            try:
                with option_names(build.TRAIN_OPTIONS):
                    log.write_metrics(self.folder, progress.rows)
            except InputError as error:  # the next epoch, or a restart, writes the complete log
                self.console.warn(f"{error}; the run continues")
            self.curves.update(progress.rows)
            self.trackers.log("epoch", epoch.number + 1, row)
        self.console.epoch(row, self.plan.epochs, progress.best)

    def _best_weights(self, row: dict, swa: torch.nn.Module | None) -> dict:
        """The content of `best_weights.pt` after an epoch that is the best one so far. swa: the
        averaged model that was evaluated."""
        best = self.progress.best
        prefix = log.PREFIXES[best["weights"]]
        module = swa if prefix == "swa_" and swa is not None else self.evaluate.models[prefix]
        return {
            "state_dict": module.state_dict(),
            "weights": best["weights"],
            "epoch": best["epoch"],
            "step": best["step"],
            "metrics": log.results_of(row, prefix),
            "arch": self.config.model.arch,
            "num_classes": self.data.num_classes,
        }
