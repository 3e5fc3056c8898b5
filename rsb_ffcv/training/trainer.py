"""One run: loaders, model, optimizer and schedule put together, trained epoch by epoch, checkpointed at each end.

What a step sees is a function of the recipe and the step's number: the loader's slots, the mix's and the noise's
addresses, the learning rate, and the seed that torch's own generator (stochastic depth) is set to before each group.
"""
import json
import statistics
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from rsb_ffcv import InputError
from rsb_ffcv.config import TrainConfig
from rsb_ffcv.learning.average import Ema
from rsb_ffcv.learning.loss import Loss
from rsb_ffcv.learning.model import build_model, check_arch, check_input_size
from rsb_ffcv.learning.optimizer import build_optimizer, check_optimizer
from rsb_ffcv.learning.schedule import Schedule
from rsb_ffcv.loading import EvalLoader, TrainLoader
from rsb_ffcv.loading.batch import MEAN, BatchTransform
from rsb_ffcv.ops import draws
from rsb_ffcv.options import as_dict
from rsb_ffcv.reporting import log
from rsb_ffcv.training import checkpoint, compute
from rsb_ffcv.training.evaluate import evaluate

SYNC_EVERY = 20  # steps between two readings of the loss: each one waits for the device


class Trainer:
    """Builds a run from `config`, resumes it where its folder has a checkpoint, and trains it to the end.

    Raises InputError for whatever the user can mend. Use as a context manager: it ends the loaders' threads.
    """

    def __init__(self, config: TrainConfig):
        self.config = c = config
        self.compute = compute.set_up(c.compute.device, c.compute.precision, c.compute.compile, c.compute.channels_last,
                                      c.compute.threads)
        self.folder = Path(c.logging.folder)
        self._say(self.compute.describe())
        check_arch(c.model.arch)
        check_optimizer(c.training.optimizer)

        common = {"num_workers": c.data.num_workers, "rank": self.compute.rank, "world_size": self.compute.world_size,
                  "device": self.compute.device}
        a = c.augment
        self.train_loader = TrainLoader(
            c.data.train_dataset, batch_size=c.training.batch_size, global_batch=c.training.global_batch,
            resolution=c.resolution.min_res, seed=c.training.seed, scale=(a.scale_min, a.scale_max), flip_prob=a.hflip,
            rand_augment=a.rand_augment, color_jitter=(a.color_jitter,) * 3 + (0.0,), interpolation=a.interpolation,
            repeats=a.repeats, order=c.data.order, on_bad_sample=c.data.on_bad_sample, **common)
        self.val_loader = EvalLoader(c.data.val_dataset, batch_size=c.validation.batch_size,
                                     resolution=c.validation.resolution, crop_ratio=c.validation.crop_ratio,
                                     interpolation=c.validation.interpolation, **common)
        self.num_classes = self._check_classes()
        self.transform = BatchTransform(
            c.training.seed, c.mix.mixup, c.mix.cutmix, c.mix.prob, c.mix.switch_prob, a.erase_prob, a.erase_mode,
            (a.erase_min, a.erase_max))
        self.loss = Loss(c.training.loss, c.training.label_smoothing, c.training.bce_threshold, c.training.bce_sum)
        self.schedule = Schedule(
            c.lr.lr_schedule_type, c.lr.lr, c.training.epochs, self.train_loader.steps_per_epoch, c.lr.warmup_epochs,
            c.lr.warmup_lr, c.lr.min_lr, c.lr.lr_peak_epoch, c.lr.step_ratio, c.lr.step_length)

        torch.manual_seed(draws.torch_seed(c.training.seed, 0, 0, draws.INIT))
        model = build_model(c.model.arch, self.num_classes, pretrained=c.model.pretrained, drop_path=c.model.drop_path,
                            zero_init_last=c.model.zero_init_last, blurpool=c.training.use_blurpool, mean=MEAN)
        sizes = {}
        for option, side in (("resolution.min_res", c.resolution.min_res), ("resolution.max_res", c.resolution.max_res),
                             ("validation.resolution", c.validation.resolution)):
            sizes.setdefault(side, option)
        for side, option in sizes.items():
            check_input_size(model, c.model.arch, option, side)
        self.model = model.to(self.compute.device, memory_format=self.compute.memory_format)
        self.ema = Ema(self.model, c.ema.decay, c.ema.warmup, c.ema.warmup_power) if c.ema.decay else None
        self.optimizer = build_optimizer(c.training.optimizer, self.model, self.schedule.lr(0), c.training.weight_decay,
                                         c.training.momentum)
        self.scaler = torch.amp.GradScaler(self.compute.device.type, enabled=self.compute.precision == "fp16")
        if self.ema is not None:  # called only where the scaler let the step through
            self.optimizer.register_step_post_hook(lambda *_: self.ema.update())
        self.next_epoch = 0
        self.best = {"top1": -1.0, "epoch": -1}
        self._resume()
        if c.data.in_memory:
            self.train_loader.preload()
            self.val_loader.preload()
        wrapped = torch.compile(self.model) if self.compute.compile else self.model
        self.wrapped = wrapped if self.compute.world_size == 1 else DistributedDataParallel(wrapped)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.train_loader.close()
        self.val_loader.close()
        compute.leave()

    # ---------------------------------------------------------------- the run

    def fit(self):
        """Trains from the next epoch to the last, and prints the closing table."""
        epochs = self.config.training.epochs
        if self.compute.is_main:
            self._open_folder()
        for epoch in range(self.next_epoch, epochs):
            row = {"epoch": epoch, **self._train_epoch(epoch)}
            if self.config.logging.log_level or epoch == epochs - 1:
                row |= self._evaluate()
                top1 = max(row["top1"], row.get("ema_top1", 0.0))
                if top1 > self.best["top1"]:
                    self.best = {"top1": top1, "epoch": epoch}
            self.next_epoch = epoch + 1
            if self.compute.is_main:
                log.write_metrics(self.folder, log.read_metrics(self.folder) + [row])
                checkpoint.save(self._state(), self.folder / checkpoint.NAME)
                print(json.dumps(row), flush=True)
        if self.compute.is_main:
            self._finish()

    def evaluate_only(self):
        """Evaluates the newest checkpoint of logging.folder and prints the result as one JSON line."""
        if self.next_epoch == 0 and not self.config.model.pretrained:
            raise InputError(f"training.eval_only=1: {self.folder} has no checkpoint; train first, name its folder, or "
                             f"use model.pretrained=1")
        self._say(json.dumps({"epoch": self.next_epoch - 1, **self._evaluate()}))

    # ---------------------------------------------------------------- an epoch

    def _train_epoch(self, epoch: int) -> dict:
        steps = self.train_loader.steps_per_epoch
        self.train_loader.resolution = self._resolution(epoch)
        self.wrapped.train()
        totals = torch.zeros(3, device=self.compute.device, dtype=torch.float64)  # loss, correct, images
        waited, started = 0.0, time.perf_counter()
        with closing(self.train_loader.epoch(epoch)) as batches, self._bar(f"epoch {epoch + 1}", steps) as bar:
            for step in range(steps):
                lr = self.schedule.lr(epoch * steps + step)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                waited += self._train_step(epoch, step, batches, totals)
                bar.update()
                if step % SYNC_EVERY == 0 or step == steps - 1:
                    loss, correct, images = totals.tolist()
                    rate = images * self.compute.world_size / (time.perf_counter() - started)
                    bar.set_postfix(loss=f"{loss / images:.4f}", top1=f"{100 * correct / images:.1f}%", lr=f"{lr:.2e}",
                                    img_s=f"{rate:.0f}")
        seconds = time.perf_counter() - started
        loss, correct, images = compute.sum_over_processes(totals).tolist()
        return {"steps": steps, "loss": self.loss.name(self._mixing(epoch) and self.transform.mixes),
                "train_loss": loss / images, "train_top1": 100 * correct / images, "lr": lr,
                "resolution": self.train_loader.resolution, "images_per_s": images / seconds, "seconds": seconds,
                "data_wait_s": waited, "peak_memory_mb": self._peak_memory_mb(), **self._skipped()}

    def _skipped(self) -> dict:
        """Which samples of the epoch could not be read, over all processes; nothing where all could."""
        found = sorted(set(compute.gather(self.train_loader.skipped)))
        names = [f"sample {index} {reason}" for index, reason in found]
        return {"skipped": len(names), "skipped_samples": names} if names else {}

    def _train_step(self, epoch: int, step: int, batches, totals) -> float:
        """One optimizer step over the groups of this process; adds to `totals`; returns the seconds it waited for data."""
        groups = self.train_loader.batches_per_step
        mixing = self._mixing(epoch)
        waited = 0.0
        for group in range(groups):
            asked = time.perf_counter()
            images, labels = next(batches)
            waited += time.perf_counter() - asked
            slots = self.train_loader.slots(step * groups + group)
            images, lam = self.transform(images, epoch, slots, mixing)
            images = images.contiguous(memory_format=self.compute.memory_format)
            torch.manual_seed(draws.torch_seed(self.config.training.seed, epoch, int(slots[0]), draws.DROP))
            last = group == groups - 1
            with nullcontext() if last or self.compute.world_size == 1 else self.wrapped.no_sync():
                with self.compute.autocast():
                    logits = self.wrapped(images)
                loss = self.loss(logits, labels, lam)
                self.scaler.scale(loss / groups).backward()
            with torch.no_grad():
                correct = (logits.argmax(1) == labels).sum()
                totals += torch.stack([loss.detach() * len(labels), correct, torch.full_like(correct, len(labels))])
        if self.config.training.grad_clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.training.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return waited

    def _evaluate(self) -> dict:
        """Raw and, where there is one, averaged weights on the validation file."""
        row, started = {}, time.perf_counter()
        if self.compute.world_size > 1:  # batch-norm statistics are each process's own; the first one's are saved
            compute.copy_from_first_process([*self.model.buffers(), *(self.ema.module.buffers() if self.ema else ())])
        models = {"": self.model} | ({"ema_": self.ema.module} if self.ema is not None else {})
        for prefix, model in models.items():
            with self._bar("validation" + (" EMA" if prefix else ""), len(self.val_loader)) as bar:
                result = evaluate(model, self.val_loader, self.compute, self.config.validation.lr_tta, bar)
            row |= {f"{prefix}top1": result["top1"], f"{prefix}top5": result["top5"], f"{prefix}val_loss": result["loss"],
                    "val_images": result["images"]}
        return row | {"val_seconds": time.perf_counter() - started}

    def _mixing(self, epoch: int) -> bool:
        return epoch < self.config.training.epochs - self.config.mix.off_epochs

    def _resolution(self, epoch: int) -> int:
        """ffcv-imagenet's progressive resizing."""
        r = self.config.resolution
        if epoch <= r.start_ramp:
            return r.min_res
        if epoch >= r.end_ramp:
            return r.max_res
        return int(np.round(np.interp(epoch, [r.start_ramp, r.end_ramp], [r.min_res, r.max_res]) / 32)) * 32

    # ---------------------------------------------------------------- state

    def _recipe(self) -> dict:
        """What decides the run's result: a checkpoint belongs to one recipe."""
        recipe = as_dict(self.config)
        kept = {name: dict(recipe[name]) for name in ("model", "resolution", "augment", "mix", "lr", "training", "ema")}
        kept["model"]["num_classes"] = self.num_classes
        for name in ("eval_only", "distributed"):
            del kept["training"][name]
        kept["training"]["global_batch"] = self.train_loader.global_batch
        kept["data"] = {"train_images": len(self.train_loader.beton), "order": self.config.data.order}
        return kept

    def _state(self) -> dict:
        return {"recipe": self._recipe(), "next_epoch": self.next_epoch, "best": self.best,
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "ema": self.ema.state_dict() if self.ema is not None else None}

    def _resume(self):
        state = checkpoint.load(self.folder)
        if state is None:
            return
        if self.config.checkpoint.resume == "never":
            raise InputError(f"checkpoint.resume=never: {self.folder} has a checkpoint of {state['next_epoch']} epochs; "
                             f"use checkpoint.resume=auto to continue it or another logging.folder")
        checkpoint.check_recipe(state["recipe"], self._recipe(), self.folder)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run so far needed no scaler
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.next_epoch, self.best = state["next_epoch"], state["best"]
        self._say(f"resuming {self.folder} after epoch {self.next_epoch} of {self.config.training.epochs}")

    def _check_classes(self) -> int:
        wanted = self.config.model.num_classes
        train, val = self.train_loader.beton, self.val_loader.beton
        if wanted and train.num_classes != wanted:
            raise InputError(f"model.num_classes={wanted}: {train.path} has labels up to {train.num_classes - 1}, that "
                             f"is {train.num_classes} classes; correct one of them")
        if val.num_classes > train.num_classes:
            raise InputError(f"data.val_dataset={val.path}: has {val.num_classes} classes, the training file has "
                             f"{train.num_classes}; write both from the same list of classes")
        return train.num_classes

    # ---------------------------------------------------------------- what people see

    def _open_folder(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"logging.folder={self.folder}: cannot be made ({error.strerror}); choose another") from error
        # A run killed between its log and its checkpoint logs that epoch again
        rows = [row for row in log.read_metrics(self.folder) if row["epoch"] < self.next_epoch]
        if len(rows) != self.next_epoch:
            raise InputError(f"{self.folder}: {log.METRICS} has {len(rows)} of the {self.next_epoch} epochs that the "
                             f"checkpoint has; restore it or remove {checkpoint.NAME} to start anew")
        log.write_metrics(self.folder, rows)
        log.write_json(self.folder / "config.json", as_dict(self.config))

    def _finish(self):
        rows = log.read_metrics(self.folder)
        log.draw_curves(rows, self.folder / "training_curves.png")
        self._save_weights(self.model, "final_weights.pt")
        last = rows[-1]
        lines = [("top-1 (top-5), raw weights", f"{last['top1']:.2f} % ({last['top5']:.2f} %)")]
        if self.ema is not None:
            self._save_weights(self.ema.module, "final_weights_ema.pt")
            lines.append(("top-1 (top-5), EMA weights", f"{last['ema_top1']:.2f} % ({last['ema_top5']:.2f} %)"))
        wait = 100 * sum(row["data_wait_s"] for row in rows) / sum(row["seconds"] for row in rows)
        lines += [("best top-1", f"{self.best['top1']:.2f} % after epoch {self.best['epoch'] + 1}"),
                  ("validation images", str(last["val_images"])),
                  ("training images/s, median", f"{statistics.median(row['images_per_s'] for row in rows):.0f}"),
                  ("waiting for data", f"{wait:.1f} % of training time"),
                  ("weights, metrics, curves", f"{self.folder}/")]
        print(log.table(lines), flush=True)

    def _save_weights(self, model: nn.Module, name: str):
        """A state_dict that loads on any machine."""
        checkpoint.save({key: tensor.cpu() for key, tensor in model.state_dict().items()}, self.folder / name)

    def _peak_memory_mb(self) -> float:
        """Of the device on CUDA, else of this process."""
        if self.compute.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.compute.device) / 2 ** 20
        return getrusage(RUSAGE_SELF).ru_maxrss / 2 ** 10

    def _bar(self, title: str, total: int) -> tqdm:
        return tqdm(total=total, desc=title, disable=not self.compute.is_main, leave=False, file=sys.stderr,
                    mininterval=0.5)

    def _say(self, text: str):
        if self.compute.is_main:
            print(text, flush=True)
