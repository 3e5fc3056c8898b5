"""Takes a recipe through all its phases in minutes: a shortened recipe, see `shorten`, is trained
as any other, stopped once and resumed. Its log must then show what the recipe states.

The expected strengths of mixing and erasing are computed here again, with NumPy's random numbers.
"""

import math
import os
import re
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rsb_ffcv import InputError, counted, option_names
from rsb_ffcv.atomic import lock
from rsb_ffcv.beton import listed_files
from rsb_ffcv.commands.plan import print_changes, print_columns
from rsb_ffcv.commands.shorten import Short, groups_per_step, shorten
from rsb_ffcv.config.options import as_dict
from rsb_ffcv.config.train import AugmentOptions, MixOptions, TrainConfig
from rsb_ffcv.dataset import Place, subset, write_splits
from rsb_ffcv.dataset.synthetic import CLASSES, make_demo_images
from rsb_ffcv.dataset.writer import evenly
from rsb_ffcv.learning.loss import Loss
from rsb_ffcv.reporting.log import METRICS, read_metrics
from rsb_ffcv.training import build, compute, facts, run
from rsb_ffcv.training.interrupt import REQUEUE, Interrupt
from rsb_ffcv.training.launch import read_slurm
from rsb_ffcv.training.plan import Plan, resolution

SUFFIX = "_smoke"
MARK = "smoke.txt"
IMAGENET = 1_281_167  # training images: those of a recipe without files
MOST_IMAGES, VAL_IMAGES = 512, 60  # of the files that smoke writes
PER_EPOCH = 1_000_000  # steps, to read the learning rate of the recipe at any position
SAMPLES = 100_000  # of the expected strengths
SIGMAS = 5  # that a mean may be away from its expected value


class Check(NamedTuple):
    """A line of the result."""

    name: str
    expected: str
    found: str
    ok: bool


def smoke(c: TrainConfig) -> int:
    """Runs the recipe `c` shortened, prints what was changed and a line for each check, and returns
    the exit status: 1 if a check failed.

    The files of the recipe are read if they exist, and a part of their images is used. If neither
    exists, images are drawn.

    Raises InputError if the recipe, its files or the folder cannot be used.
    """
    read_slurm()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: smoke runs in one process; start it without "
            f"torchrun, and with one task of srun"
        )
    with _folder(Path(f"{c.logging.folder or 'runs/recipe'}".rstrip("/") + SUFFIX)) as folder:
        short = prepare(c, folder)
        _print_changes(c, short)
        print(f"\nThe run in {folder} is stopped in its second epoch and resumed.\n", flush=True)
        pause = _Pause(folder / "run")
        try:
            run(short.config, pause)
        except SystemExit as end:
            if end.code != REQUEUE or pause.signal is not None:
                raise
            run(short.config)
        checks = check(c, short)
    print()
    print_columns(
        [("", "check", "expected", "found")]
        + [("ok" if line.ok else "fail", *line[:3]) for line in checks]
    )
    failed = [line for line in checks if not line.ok]
    print(
        f"\n{len(failed)} of {len(checks)} checks failed; see {folder}"
        if failed
        else f"\nall {len(checks)} checks passed; log and curves are in {folder}/run"
    )
    return int(bool(failed))


class _Pause(Interrupt):
    """Also requests the end of the run when its log has an epoch. signal: what was received."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.signal: signal.Signals | None = None
        super().__init__(forwarded=False)

    @property
    def received(self) -> signal.Signals | None:
        if self.signal is None and (self._folder / METRICS).exists() and read_metrics(self._folder):
            return signal.SIGTERM
        return self.signal

    @received.setter
    def received(self, value: signal.Signals | None) -> None:
        self.signal = value


# ---------------------------------------------------------------- folder and files


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """The folder of the smoke, empty but for its mark, and locked. Raises InputError if it is not
    that of an earlier smoke, or if it cannot be written."""
    mark = path / MARK
    fix = "remove it, or choose another logging.folder"
    if path.exists() and not mark.exists():
        raise InputError(f"{path}: exists, and smoke did not make it; {fix}")
    with ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(mark, "a"))
            lock(file, path)
            file.truncate(0)
            file.write("Made by train_imagenet.py smoke, which replaces this folder.\n")
            file.flush()
            for other in path.iterdir():
                if other.is_dir():
                    shutil.rmtree(other)
                elif other != mark:
                    other.unlink()
        except BlockingIOError as error:
            raise InputError(f"{path}: another smoke is running in it; wait for it") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); {fix}") from error
        yield path


def _exists(path: str) -> bool:
    """Whether all files that a data option names exist."""
    try:
        return all(map(os.path.isfile, listed_files(path)))
    except InputError:
        return False


def prepare(c: TrainConfig, folder: Path) -> Short:
    """Shortens the recipe and writes its files to `folder`."""
    paths = {"train": c.data.train_dataset, "val": c.data.val_dataset}
    missing = [split for split, path in paths.items() if not _exists(path)]
    places = {split: folder / f"{split}.beton" for split in paths}
    files = {split: build.read_file(c, split) for split in paths if split not in missing}
    if len(missing) == 1:
        (split,) = missing
        raise InputError(
            f"data.{split}_dataset={paths[split]}: no such file, and the other one exists; "
            f"correct the path"
        )
    size = len(files["train"]) if files else IMAGENET
    if files:
        num_classes = build.check_files(c, files["train"], files["val"])
        if c.checkpoint.warm_start:
            _check_weights(c, num_classes)
    short = shorten(
        c,
        images=size,
        available=min(MOST_IMAGES, size),
        num_classes=c.model.num_classes if files else 0,
        train=places["train"],
        val=places["val"],
        folder=folder / "run",
    )
    counts = {"train": short.steps * short.config.training.global_batch, "val": VAL_IMAGES}
    threads = compute.available_cores()
    for split, file in files.items():
        subset(
            str(file.path),
            str(places[split]),
            num_workers=threads,
            samples=",".join(map(str, evenly(len(file), counts[split]))),
        )
    if not files:
        print(
            f"data.train_dataset={facts.shown(paths['train'])} and data.val_dataset="
            f"{facts.shown(paths['val'])} do not exist: smoke draws images, and takes the recipe "
            f"as one for ImageNet's {IMAGENET:,}; give both files to check them too",
            flush=True,
        )
        each = {split: -(-count // len(CLASSES)) for split, count in counts.items()}
        make_demo_images(folder / "images", each)
        write_splits(
            Place(dataset="demo", data_dir=str(folder / "images")),
            str(folder),
            num_workers=threads,
        )
        shutil.rmtree(folder / "images")
    return short


def _check_weights(c: TrainConfig, num_classes: int) -> None:
    """Loads checkpoint.warm_start into the recipe's own model. Raises InputError if it does not
    fit."""
    here = compute.Compute(
        device=torch.device("cpu"), precision="fp32", compile=False, channels_last=False
    )
    own = replace(c, model=replace(c.model, pretrained=False))
    with option_names(build.TRAIN_OPTIONS):
        build.model(own, num_classes, here, new=True, report=print)


def _print_changes(c: TrainConfig, short: Short) -> None:
    print("\nWhat differs from the recipe:")
    print_changes(facts.changes(as_dict(c), as_dict(short.config)), "recipe")
    print(
        f"\nThe recipe's {counted(c.training.epochs, 'epoch')} as "
        f"{counted(short.config.training.epochs, 'epoch')} of {counted(short.steps, 'step')}:"
    )
    rows = [("epochs", "here", "begins with")]
    for (start, here, name), (stop, end, _) in zip(short.borders, short.borders[1:]):
        if end > here:
            rows.append(
                (
                    f"{start + 1:g} to {max(stop, start + 1):g}",
                    f"{here + 1} to {end}",
                    name or "the first epoch",
                )
            )
    print_columns(rows)
    unchecked = {
        "model.pretrained": c.model.pretrained,
        "checkpoint.warm_start": c.checkpoint.warm_start
        if not _exists(c.data.train_dataset)
        else "",
        "checkpoint.branch": c.checkpoint.branch,
        "validation.labels": c.validation.labels,
    }
    for name, value in unchecked.items():
        if value:
            print(f"not checked: {name}={value}")


# ---------------------------------------------------------------- checks


def check(c: TrainConfig, short: Short) -> list[Check]:
    """Compares the log of a short run with the recipe `c`."""
    folder = Path(short.config.logging.folder)
    rows = read_metrics(folder)
    epochs = short.config.training.epochs
    if [row["epoch"] for row in rows] != list(range(epochs)):
        found = ", ".join(str(row["epoch"] + 1) for row in rows)
        return [Check("epochs in the log", f"1 to {epochs}", found, False)]
    return [
        *learning_rates(c, short, rows),
        *phases(c, short, rows),
        *strengths(c, short, rows),
        *_results(short, rows),
        *_files(short, folder),
    ]


def _position(c: TrainConfig, short: Short, position: float) -> float:
    """The position in the original's schedule, in epochs, of a position of the short run. SWA is
    left out: the schedule goes on to the end."""
    first, end = float(c.lr.from_epoch), float(c.training.epochs)
    kind = c.lr.lr_schedule_type
    inner = [first]
    if c.lr.warmup_epochs:
        inner.append(first + c.lr.warmup_epochs)
    if kind == "cyclic" and first + c.lr.lr_peak_epoch < end:
        inner.append(first + c.lr.lr_peak_epoch)
    if kind == "step":
        inner += np.arange(first + c.lr.step_length, end, c.lr.step_length).tolist()
    borders = [(0.0, 0), *((there, short.here(there)) for there in inner), (end, short.here(end))]
    number = max(n for n, (_, here) in enumerate(borders[:-1]) if here <= position)
    (start, here), (stop, until) = borders[number], borders[number + 1]
    if kind == "step":  # falls in the last epoch before a step
        return max(start, stop - (until - position))
    if kind == "cosine_spanning" and number == len(borders) - 2:  # which begins before the warm-up
        start, here = first, short.here(first)
    return start + (position - here) / (until - here) * (stop - start)


def learning_rates(c: TrainConfig, short: Short, rows: list[dict[str, Any]]) -> list[Check]:
    """Compares them with those of the recipe `c` at the same places of its schedule."""
    original = Plan(replace(c, swa=replace(c.swa, epochs=0)), PER_EPOCH)
    swa, epochs = short.config.swa, len(rows)
    at_swa_lr = epochs - swa.epochs + swa.anneal_epochs if swa.epochs else epochs

    def expected(position: float) -> float | None:
        """None while the rate falls to swa.lr, which takes another share of the short run."""
        if position < epochs - swa.epochs:
            return original.lr(round(_position(c, short, position) * PER_EPOCH))
        return c.swa.lr if position >= at_swa_lr else None

    last = 1 - 1 / short.steps  # of an epoch: the beginning of its last step
    first, warm = short.config.lr.from_epoch, int(short.config.lr.warmup_epochs)
    named = [("start", 0, "lr_first")]
    if warm:
        named += [("last step of the warm-up", first + warm - 1, "lr")]
    named += [
        (name, here, "lr_first")
        for _, here, names in short.borders
        for name in names.split(", ")
        if here < epochs and ("schedule" in name or "learning rate" in name)
    ]
    if swa.epochs:
        named += [("SWA at swa.lr", int(at_swa_lr), "lr_first")] * (at_swa_lr < epochs)
    named += [("end", epochs - 1, "lr")]
    once: dict[tuple[int, str], str] = {}
    for name, epoch, key in named:
        once.setdefault((epoch, key), name)
    found = []
    for (epoch, key), name in once.items():
        want = expected(epoch + (last if key == "lr" else 0))
        if want is not None:
            found.append(
                _near(f"learning rate, {name} (epoch {epoch + 1})", want, rows[epoch][key])
            )
    pairs = [
        (want, row[key])
        for row in rows
        for key, part in (("lr_first", 0.0), ("lr", last))
        if (want := expected(row["epoch"] + part)) is not None
    ]
    right = sum(_near("", want, value).ok for want, value in pairs)
    found.append(_equal("first and last learning rates of all epochs", len(pairs), right))
    return found


def phases(c: TrainConfig, short: Short, rows: list[dict[str, Any]]) -> list[Check]:
    """Groups, images, resolution, loss and mixing of each epoch."""
    batch, groups = short.config.training.batch_size, groups_per_step(c)
    end, mixes = float(c.training.epochs), bool(c.mix.mixup or c.mix.cutmix)
    off = short.here(end - c.mix.off_epochs) if mixes else 0
    changes = [
        short.here(float(epoch))
        for epoch in range(1, c.training.epochs)
        if resolution(c, epoch) != resolution(c, epoch - 1)
    ]
    sides = [short.sides[sum(here <= row["epoch"] for here in changes)] for row in rows]
    loss = Loss(kind=c.training.loss)
    names = [loss.name(row["epoch"] < off) for row in rows]
    found = [
        _equal(
            f"{key} of a step",
            f"{count} x {len(rows)}",
            _runs([f"{row[key] / row['steps']:g}" for row in rows]),
        )
        for key, count in (("groups", groups), ("images", groups * batch))
    ]
    return [
        *found,
        _equal("resolution", _runs(sides), _runs([row["resolution"] for row in rows])),
        _equal("loss", _runs(names), _runs([row["loss"] for row in rows])),
        _equal(
            "epochs with mixing",
            _numbers(range(off)),
            _numbers(row["epoch"] for row in rows if row["mixed"] > 0),
        ),
    ]


def strengths(c: TrainConfig, short: Short, rows: list[dict[str, Any]]) -> list[Check]:
    """How strongly images are mixed and erased, on the mean."""
    mixed = [row for row in rows if row["mixed"] > 0]
    batch = short.config.training.batch_size
    found = []
    if (c.mix.mixup or c.mix.cutmix) and mixed:
        weights = [_own_weights(c.mix, row["resolution"]) for row in mixed]
        groups = sum(row["groups"] for row in mixed)
        draws = groups * {"batch": 1, "pair": batch // 2, "elem": batch}[c.mix.mode]
        shares = [(weight < 1).astype(float) for weight in weights]
        found += [
            _mean("mixed images, share", shares, [row["mixed"] for row in mixed], draws=draws),
            _mean(
                "weight of an image's own label",
                weights,
                [row["own_weight"] for row in mixed],
                draws=draws,
            ),
        ]
    if c.augment.erase_prob:
        areas = [_erased_areas(c.augment, row["resolution"]) for row in rows]
        images = sum(row["images"] for row in rows)
        found.append(
            _mean("erased pixels, share", areas, [row["erased"] for row in rows], draws=images)
        )
    else:
        found.append(_equal("erased pixels, share", 0.0, max(row["erased"] for row in rows)))
    return found


@cache
def _own_weights(m: MixOptions, side: int) -> np.ndarray:
    """SAMPLES draws of the weight of an image's own label, as timm's Mixup draws it."""
    rng = np.random.default_rng(0)
    cutmix = rng.random(SAMPLES) < (m.switch_prob if m.mixup and m.cutmix else bool(m.cutmix))
    lam = np.where(
        cutmix,
        rng.beta(m.cutmix or 1, m.cutmix or 1, SAMPLES),
        rng.beta(m.mixup or 1, m.mixup or 1, SAMPLES),
    )
    cut = (side * np.sqrt(1 - lam)).astype(int)
    sides = []
    for _ in range(2):
        centre = rng.integers(0, side, SAMPLES)
        low, high = centre - cut // 2, centre + (cut + 1) // 2
        sides.append(np.minimum(high, side) - np.maximum(low, 0))
    lam = np.where(cutmix, 1 - sides[0] * sides[1] / side**2, lam)
    return np.where(rng.random(SAMPLES) < m.prob, lam, 1.0)


@cache
def _erased_areas(a: AugmentOptions, side: int) -> np.ndarray:
    """SAMPLES draws of the erased share of an image, as timm's RandomErasing draws it."""
    rng = np.random.default_rng(0)
    found = np.zeros(SAMPLES)
    waiting = rng.random(SAMPLES) < a.erase_prob
    for _ in range(10):
        area = side**2 * rng.uniform(a.erase_min, a.erase_max, SAMPLES)
        aspect = np.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3), SAMPLES))
        height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = waiting & (height < side) & (width < side)
        found[fits] = (height * width / side**2)[fits]
        waiting &= ~fits
    return found


def _results(short: Short, rows: list[dict[str, Any]]) -> list[Check]:
    epochs = len(rows)
    validated = range(epochs) if short.config.logging.log_level else [epochs - 1]
    averaged = [e for e in validated if e >= epochs - short.config.swa.epochs]

    def has(row: dict[str, Any], key: str) -> bool:
        # After a few steps at the highest learning rate, the running statistics of the batch norms
        # may be so far off that the validation overflows in fp16. At the end, it must not.
        unstable = key != "train_loss" and row is not rows[-1]
        return _finite(row.get(key)) or unstable and key in row

    return [
        _equal(
            f"epochs with {name}",
            _numbers(wanted),
            _numbers(row["epoch"] for row in rows if has(row, key)),
        )
        for name, key, wanted in (
            ("a finite training loss", "train_loss", range(epochs)),
            ("a result of the weights", "val_loss", validated),
            ("a result of the EMA", "ema_val_loss", validated if short.config.ema.decay else []),
            ("a result of SWA", "swa_val_loss", averaged),
        )
    ]


def _files(short: Short, folder: Path) -> list[Check]:
    config = short.config
    averages = {"": True, "_ema": config.ema.decay, "_swa": config.swa.epochs}
    wanted = [f"final_weights{name}.pt" for name, used in averages.items() if used]
    found = sorted(path.name for path in folder.glob("final_weights*.pt"))
    checks = [_equal("weights at the end", ", ".join(wanted), ", ".join(found))]
    if config.training.epochs > 1:
        text = (folder / "training.log").read_text()
        resumed = re.search(r"resuming .* after step (\d+) of (\d+)", text)
        checks.append(
            _equal(
                "resumed after step",
                f"{short.steps + 1} of {short.steps * config.training.epochs}",
                " of ".join(resumed.groups()) if resumed else "not resumed",
            )
        )
    return checks


def _near(name: str, expected: float, found: float) -> Check:
    close = math.isclose(expected, found, rel_tol=1e-4, abs_tol=1e-12)
    return Check(name, f"{expected:.6g}", f"{found:.6g}", close)


def _equal(name: str, expected: object, found: object) -> Check:
    return Check(name, str(expected), str(found), expected == found)


def _mean(name: str, samples: list[np.ndarray], found: list[float], *, draws: int) -> Check:
    """Whether the mean over epochs is that of `samples`, within SIGMAS of its error.

    samples: of the strength in each epoch.
    found: the means of the epochs.
    draws: independent draws of all epochs together.
    """
    all_samples = np.concatenate(samples)
    error = SIGMAS * float(all_samples.std()) * math.sqrt(1 / draws + 1 / SAMPLES)
    mean, measured = float(all_samples.mean()), float(np.mean(found))
    return Check(
        name, f"{mean:.4f} +- {error:.4f}", f"{measured:.4f}", abs(measured - mean) <= error
    )


def _runs(values: list[Any]) -> str:
    """Equal neighbours together: "32 x 5, 40 x 2"."""
    return ", ".join(f"{value} x {len(list(group))}" for value, group in groupby(values))


def _numbers(epochs: Iterable[int]) -> str:
    return ", ".join(str(epoch + 1) for epoch in epochs) or "none"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
