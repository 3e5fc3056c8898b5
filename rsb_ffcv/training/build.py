"""Builds the parts of a run, each from its section of the config.

Files and options that do not fit together raise InputError, which names them.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import cast

import torch
from torch.nn.parallel import DistributedDataParallel

from rsb_ffcv import InputError, counted, option_names
from rsb_ffcv.beton import Beton, read_beton
from rsb_ffcv.config.train import TrainConfig
from rsb_ffcv.learning.average import Ema, Swa, decay_of_step
from rsb_ffcv.learning.layers import freeze
from rsb_ffcv.learning.loss import Loss
from rsb_ffcv.learning.model import build_model, check_input_size
from rsb_ffcv.learning.optimizer import build_optimizer
from rsb_ffcv.learning.weights import load_weights
from rsb_ffcv.loading import EvalLoader, TrainLoader
from rsb_ffcv.loading.batch import MEAN, BatchTransform
from rsb_ffcv.ops import draws
from rsb_ffcv.training import compute, plan
from rsb_ffcv.training.compute import Compute
from rsb_ffcv.training.health import Health
from rsb_ffcv.training.step import TrainStep

# Parameter of a library function -> the option that its value comes from
TRAIN_OPTIONS = {
    "num_workers": "data.num_workers",
    "order": "data.order",
    "on_bad_sample": "data.on_bad_sample",
    "decode": "data.decode",
    "memory_mb": "data.decode_memory_mb",
    "batch_size": "training.batch_size",
    "global_batch": "training.global_batch",
    "resolution": "resolution.min_res",
    "repeats": "augment.repeats",
    "rand_augment": "augment.rand_augment",
    "arch": "model.arch",
    "pretrained": "model.pretrained",
    "freeze": "model.freeze",
    "grad_checkpointing": "model.grad_checkpointing",
    "blurpool": "training.use_blurpool",
    "layer_decay": "training.layer_decay",
    "head_lr_scale": "training.head_lr_scale",
    "optimizer": "training.optimizer",
    "folder": "logging.folder",
}
WARM_START_OPTIONS = {
    "path": "checkpoint.warm_start",
    "which": "checkpoint.warm_start_from",
    "head": "checkpoint.warm_start_head",
}
VAL_OPTIONS = {
    "decode": "data.decode",
    "memory_mb": "data.decode_memory_mb",
    "num_workers": "data.num_workers",
    "batch_size": "validation.batch_size",
    "resolution": "validation.resolution",
    "crop_ratio": "validation.crop_ratio",
}


def hardware(c: TrainConfig) -> Compute:
    """Device, precision and processes of the sections compute and dist; see compute.set_up."""
    return compute.set_up(
        c.compute.device,
        c.compute.precision,
        compile=c.compute.compile,
        channels_last=c.compute.channels_last,
        threads=c.compute.threads,
        timeout_s=c.dist.timeout_s,
    )


@contextmanager
def _options_named(names: Mapping[str, str], option: str) -> Iterator[None]:
    """option_names, which also names the `option` of the files in an error of reading them."""
    with option_names(names):
        try:
            yield
        except InputError as error:
            if re.search(r"`\w+`", str(error)):  # it names a parameter
                raise
            raise InputError(f"{option}={error}") from error.__cause__


def train_loader(c: TrainConfig, where: Compute, num_workers: int, *, decode: str) -> TrainLoader:
    """The loader of data.train_dataset, at resolution.min_res. num_workers: threads."""
    try:
        with _options_named(TRAIN_OPTIONS, "data.train_dataset"):
            return _train_loader(c, where, num_workers, decode=decode)
    except InputError as error:
        if c.training.global_batch:
            raise
        # The value is not an option, but computed from others
        images = c.training.batch_size * where.world_size
        message = str(error).replace(
            f"training.global_batch={images}:",
            f"training.batch_size={c.training.batch_size} with {where.world_size} "
            f"process{'es' if where.world_size > 1 else ''}, {images} images per step:",
        )
        message = message.replace(
            " or training.global_batch", " or start fewer processes" * (where.world_size > 1)
        )
        raise InputError(message) from error.__cause__


def _train_loader(c: TrainConfig, where: Compute, num_workers: int, *, decode: str) -> TrainLoader:
    a = c.augment
    return TrainLoader(
        c.data.train_dataset,
        batch_size=c.training.batch_size,
        global_batch=c.training.global_batch,
        resolution=c.resolution.min_res,
        seed=c.training.seed,
        scale=(a.scale_min, a.scale_max),
        flip_prob=a.hflip,
        rand_augment=a.rand_augment,
        color_jitter=(a.color_jitter,) * 3 + (a.hue,),
        interpolation=a.interpolation,
        repeats=a.repeats,
        order=c.data.order,
        on_bad_sample=c.data.on_bad_sample,
        num_workers=num_workers,
        rank=where.rank,
        world_size=where.world_size,
        device=where.device,
        decode=decode,
        memory_mb=c.data.decode_memory_mb,
    )


def val_loader(c: TrainConfig, where: Compute, num_workers: int, *, decode: str) -> EvalLoader:
    """The loader of data.val_dataset. num_workers: threads."""
    with _options_named(VAL_OPTIONS, "data.val_dataset"):
        return EvalLoader(
            c.data.val_dataset,
            batch_size=c.validation.batch_size,
            resolution=c.validation.resolution,
            crop_ratio=c.validation.crop_ratio,
            interpolation=c.validation.interpolation,
            num_workers=num_workers,
            rank=where.rank,
            world_size=where.world_size,
            device=where.device,
            decode=decode,
            memory_mb=c.data.decode_memory_mb,
        )


def read_file(c: TrainConfig, split: str) -> Beton:
    """Reads the metadata of data.train_dataset or data.val_dataset. split: "train" or "val". Raises
    InputError if it cannot be read."""
    name = f"{split}_dataset"
    try:
        return read_beton(getattr(c.data, name))
    except InputError as error:
        raise InputError(f"data.{name}={error}") from error.__cause__


def left_out(c: TrainConfig, loader: TrainLoader) -> str:
    """How many training images an epoch leaves out, as a line for the console; empty for none."""
    count = len(loader.beton) - loader.steps_per_epoch * loader.global_batch
    if not count or c.augment.repeats > 1 or c.training.eval_only:
        return ""
    return (
        f"{count} of {len(loader.beton)} training images are left out of each epoch, because they "
        f"do not fill a step of {loader.global_batch}; "
        + (
            "always the same ones"
            if c.data.order == "sequential"
            else "which ones changes each epoch"
        )
    )


def same_files(c: TrainConfig, train: Beton, val: Beton) -> str:
    """A warning if the run is evaluated on its training images; empty if not."""
    if c.training.eval_only or train.fingerprint() != val.fingerprint():
        return ""
    return (
        f"data.val_dataset={val.path}: has the same content as data.train_dataset={train.path}, so "
        f"top-1 is that of training images; use a file of other images"
    )


def check_files(c: TrainConfig, train: Beton, val: Beton) -> int:
    """Returns the number of classes.

    Raises InputError if the two files do not fit the recipe or each other.
    """
    wanted = c.model.num_classes
    if wanted and train.num_classes != wanted:
        raise InputError(
            f"model.num_classes={wanted}: data.train_dataset={train.path} has "
            f"{counted(train.num_classes, 'class', 'classes')}; correct one of them"
        )
    if val.num_classes > train.num_classes:
        raise InputError(
            f"data.val_dataset={val.path}: has "
            f"{counted(val.num_classes, 'class', 'classes')}, and the training file "
            f"has {train.num_classes}; write both from the same list of classes"
        )
    if train.about and val.about:
        for label, (ours, theirs) in enumerate(zip(train.about.classes, val.about.classes)):
            if ours != theirs:
                raise InputError(
                    f"data.val_dataset={val.path}: class {label} is '{theirs}', and in "
                    f"{train.path} it is '{ours}'; write both from the same list of classes"
                )
        if train.about.source.get("split") == "val" and val.about.source.get("split") == "train":
            raise InputError(
                f"data.train_dataset={train.path} was written from the split val, and "
                f"data.val_dataset={val.path} from train; exchange them"
            )
    sides = {
        "resolution.max_res": (train, c.resolution.max_res),
        "validation.resolution": (val, c.validation.resolution),
    }
    for option, (file, side) in sides.items():
        largest = file.about.settings.get("max_resolution", 0) if file.about else 0
        if 0 < largest < side:
            raise InputError(
                f"{option}={side}: the images of {file.path} were shrunk to "
                f"cfg.max_resolution={largest} when it was written, and would be enlarged; "
                f"write it with {side} or more, or lower {option}"
            )
    return train.num_classes


def model(
    c: TrainConfig,
    num_classes: int,
    where: Compute,
    *,
    new: bool,
    report: Callable[[str], None],
) -> torch.nn.Module:
    """Builds the model on the device.

    c: for the sections model, training and checkpoint, and for the resolutions.
    num_classes: number of outputs.
    where: device and memory layout.
    new: give it the initial weights of a run (random, pretrained or checkpoint.warm_start). False:
        the weights are loaded from a checkpoint later.
    report: called with a line about the weights that were loaded, and one about frozen layers.

    Raises InputError if the weights or a resolution of the run do not fit the model, or if it does
    not support an option.
    """
    torch.manual_seed(draws.torch_seed(c.training.seed, 0, 0, draws.INIT))
    made = build_model(
        c.model.arch,
        num_classes,
        pretrained=c.model.pretrained and new,
        drop_path=c.model.drop_path,
        zero_init_last=c.model.zero_init_last,
        blurpool=c.training.use_blurpool,
        grad_checkpointing=c.model.grad_checkpointing,
        mean=MEAN,
    )
    if c.checkpoint.warm_start and new:

        def load() -> str:
            with option_names(WARM_START_OPTIONS):
                loaded = load_weights(
                    made,
                    Path(c.checkpoint.warm_start),
                    which=c.checkpoint.warm_start_from,
                    head=c.checkpoint.warm_start_head,
                )
            return str(loaded)

        # The other machines may not have the file
        report(f"starting from {compute.on_first_process(load)}")
        compute.copy_from_first_process(made.state_dict().values())
    sizes: dict[int, str] = {}
    for side, option in (
        (c.resolution.min_res, "resolution.min_res"),
        (c.resolution.max_res, "resolution.max_res"),
        (c.validation.resolution, "validation.resolution"),
        *((plan.resolution(c, epoch), "resolution.end_ramp") for epoch in range(c.training.epochs)),
    ):
        sizes.setdefault(side, option)
    for side, option in sizes.items():
        with option_names({"side": option}):
            check_input_size(made, c.model.arch, side)
    if c.model.freeze:
        report(freeze(made, c.model.freeze))
    return made.to(  # type: ignore[call-overload]  # torch's stub lacks memory_format
        where.device, memory_format=where.memory_format
    )


def averages(
    c: TrainConfig, model: torch.nn.Module, global_batch: int
) -> tuple[Ema | None, Swa | None]:
    """The averages of the sections ema and swa, None for one that is off. global_batch: images of a
    step."""
    ema = (
        Ema(
            model,
            decay_of_step(c.ema.decay, c.ema.per_images, global_batch),
            warmup=c.ema.warmup,
            power=c.ema.warmup_power,
            buffers=c.ema.buffers,
        )
        if c.ema.decay
        else None
    )
    return ema, Swa(model) if c.swa.epochs else None


def batch_transform(c: TrainConfig) -> BatchTransform:
    """The transform of the sections mix and augment: uint8 (n, H, W, 3) -> float32 (n, 3, H, W)."""
    return BatchTransform(
        seed=c.training.seed,
        mixup_alpha=c.mix.mixup,
        cutmix_alpha=c.mix.cutmix,
        mix_prob=c.mix.prob,
        switch_prob=c.mix.switch_prob,
        erase_prob=c.augment.erase_prob,
        erase_mode=c.augment.erase_mode,
        erase_area=(c.augment.erase_min, c.augment.erase_max),
        mode=c.mix.mode,
    )


def train_step(
    c: TrainConfig,
    model: torch.nn.Module,
    *,
    ema: Ema | None,
    loader: TrainLoader,
    where: Compute,
) -> TrainStep:
    """The training step of the sections lr and training, with its optimizer and loss.

    model: the bare module.
    ema: updated after each step, or None.
    loader: of the training images.
    where: device, precision and processes.
    """
    return TrainStep(
        model,
        _wrapped(model, where),
        optimizer=build_optimizer(
            c.training.optimizer,
            model,
            lr=c.lr.lr,
            weight_decay=c.training.weight_decay,
            momentum=c.training.momentum,
            layer_decay=c.training.layer_decay,
            head_lr_scale=c.training.head_lr_scale,
        ),
        loss=Loss(
            kind=c.training.loss,
            smoothing=c.training.label_smoothing,
            threshold=c.training.bce_threshold,
            sum_classes=c.training.bce_sum,
        ),
        transform=batch_transform(c),
        compute=where,
        groups=loader.batches_per_step,
        mean_groups=loader.groups / where.world_size,
        seed=c.training.seed,
        grad_clip=c.training.grad_clip,
        ema=ema,
        grad_checkpointing=c.model.grad_checkpointing,
    )


def _wrapped(model: torch.nn.Module, where: Compute) -> torch.nn.Module:
    """Returns the module, compiled and wrapped in DDP if the run uses these."""
    if where.compile:
        model = cast(torch.nn.Module, torch.compile(model, dynamic=False))
    if where.world_size == 1:
        return model
    # The step averages the batch-norm statistics, so DDP must not broadcast them from rank 0.
    wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    if where.device.type == "cpu" and where.world_size > 2:
        wrapped.register_comm_hook(None, compute.mean_in_order_of_ranks)
    return wrapped


def health(c: TrainConfig, report: Callable[[str], None]) -> Health:
    """The checks of the section health. report: called with each message."""
    return Health(
        report=report,
        non_finite=c.health.non_finite,
        loss_rise=c.health.loss_rise,
        rise=c.health.rise,
        chance=c.health.chance,
        chance_epoch=c.health.chance_epoch,
        average=c.health.average,
        gap=c.health.gap,
        falling=c.health.falling,
        fall=c.health.fall,
        expected=c.health.expected,
        behind=c.health.behind,
    )


def within_memory(c: TrainConfig, section: str, resolution: int) -> AbstractContextManager[None]:
    """A context for work on batches of `section`.batch_size images of `resolution` pixels; see
    compute.within_memory."""
    lower = {
        "training": "lower training.batch_size (and keep training.global_batch: more groups are "
        "accumulated) or resolution.max_res",
        "validation": "lower validation.batch_size or validation.resolution",
    }
    images = getattr(c, section).batch_size
    return compute.within_memory(
        f"{section}.batch_size={images} images of {resolution} px", lower[section]
    )
