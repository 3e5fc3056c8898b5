"""The options of train_imagenet.py: one frozen dataclass, one field a section.

Sections and names of libffcv/ffcv-imagenet keep their names, meaning and defaults, but for
model.arch (resnet18 there) and data.num_workers (required there).
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rsb_ffcv import InputError
from rsb_ffcv.config.options import REQUIRED, option, read_options


@dataclass(frozen=True, kw_only=True)
class Model:
    """the network"""

    arch: str = option("resnet50", "a model of timm, by its name there")
    pretrained: bool = option(False, "start from timm's published weights (downloaded)")
    num_classes: int = option(0, "outputs; 0: as many as the training file has classes", low=0)
    drop_path: float = option(
        0.0, "stochastic depth: probability of dropping the last block", low=0, high=0.99
    )
    zero_init_last: bool = option(True, "gamma of each block's last batch norm starts at 0")


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """resolution of the training images, in pixels a side"""

    min_res: int = option(160, "up to epoch start_ramp", low=8, high=4096)
    max_res: int = option(
        160, "from epoch end_ramp on; in between, interpolated to multiples of 32", low=8, high=4096
    )
    start_ramp: int = option(0, "last epoch (counted from 0) at min_res", low=0)
    end_ramp: int = option(0, "first epoch (counted from 0) at max_res", low=0)


@dataclass(frozen=True, kw_only=True)
class Data:
    """files and how they are read"""

    train_dataset: str = option(REQUIRED, ".beton file to train on")
    val_dataset: str = option(REQUIRED, ".beton file to evaluate on")
    num_workers: int | str = option(
        "auto",
        "loader threads of each process; auto: the cores shared among the machine's processes",
        low=1,
        high=1024,
        words=("auto",),
    )
    in_memory: bool = option(
        REQUIRED, "read the files into the page cache before training, if they fit"
    )
    order: str = option(
        "random",
        "of training images; quasi_random: runs of 1 MiB, mixed 1 GiB at a time, for files "
        "larger than memory",
        choices=("random", "sequential", "quasi_random"),
    )
    on_bad_sample: str = option(
        "raise",
        "a training image that cannot be read: end the run, or skip: take the next "
        "slot's, and name it in the log",
        choices=("raise", "skip"),
    )


@dataclass(frozen=True, kw_only=True)
class Augment:
    """augmentation of each training image"""

    scale_min: float = option(
        0.08, "random-resized-crop: smallest share of the area", low=0.001, high=1
    )
    scale_max: float = option(
        1.0, "random-resized-crop: largest share of the area", low=0.001, high=1
    )
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    repeats: int = option(
        1,
        "repeated augmentation: copies of an image in an epoch, in different groups",
        low=1,
        high=64,
    )
    rand_augment: str = option(
        "", "timm's spec, such as rand-m7-mstd0.5-inc1; 3a; torchvision's ta_wide; empty: none"
    )
    color_jitter: float = option(
        0.0,
        "strength of brightness, contrast and saturation jitter, after rand_augment",
        low=0,
        high=10,
    )
    interpolation: str = option(
        "random",
        "of the crop and of geometric ops; random: one of both each time, as timm",
        choices=("random", "bilinear", "bicubic"),
    )
    erase_prob: float = option(0.0, "random erasing: probability for an image", low=0, high=1)
    erase_mode: str = option(
        "const",
        "random erasing: fill with 0, one random colour, or random pixels",
        choices=("const", "rand", "pixel"),
    )
    erase_min: float = option(0.02, "random erasing: smallest share of the area", low=0, high=1)
    erase_max: float = option(1 / 3, "random erasing: largest share of the area", low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """mixup and cutmix"""

    mixup: float = option(0.0, "alpha of mixup's Beta(alpha, alpha); 0: off", low=0, high=100)
    cutmix: float = option(0.0, "alpha of cutmix's Beta(alpha, alpha); 0: off", low=0, high=100)
    prob: float = option(1.0, "probability of mixing at all", low=0, high=1)
    switch_prob: float = option(0.5, "probability of cutmix where both are on", low=0, high=1)
    mode: str = option(
        "batch",
        "what shares a draw: batch (training.batch_size images), pair (an image and its partner) "
        "or "
        "elem (each its own)",
        choices=("batch", "pair", "elem"),
    )
    off_epochs: int = option(0, "the last epochs that train without mixing", low=0)


@dataclass(frozen=True, kw_only=True)
class Lr:
    """learning rate, set for each step"""

    lr: float = option(0.5, "peak learning rate", low=0)
    lr_schedule_type: str = option(
        "cyclic",
        "cosine: after the warm-up; cosine_spanning: timm's, over all epochs; "
        "polynomial and constant: after the warm-up; cyclic and step: ffcv-imagenet's",
        choices=("cosine", "cosine_spanning", "polynomial", "constant", "cyclic", "step"),
    )
    warmup_epochs: float = option(0.0, "epochs of linear warm-up (not of cyclic and step)", low=0)
    warmup_lr: float = option(0.0, "learning rate of the first step of the warm-up", low=0)
    min_lr: float = option(0.0, "learning rate at the end of the cosine or polynomial", low=0)
    power: float = option(1.0, "polynomial: exponent", low=0.01, high=10)
    lr_peak_epoch: int = option(2, "cyclic: epoch of the peak", low=0)
    step_ratio: float = option(0.1, "step: factor", low=0)
    step_length: int = option(30, "step: epochs between two factors", low=1)


@dataclass(frozen=True, kw_only=True)
class Training:
    """the optimizer's side of training"""

    epochs: int = option(30, "epochs in all", low=1)
    batch_size: int = option(
        512, "images a process takes at once: also the mix and batch-norm group", low=2
    )
    global_batch: int = option(
        0,
        "images an optimizer step takes, by accumulation where the processes take fewer; "
        "0: batch_size x processes",
        low=0,
    )
    optimizer: str = option("sgd", "sgd, lamb, adamw or any optimizer of timm, by its name there")
    momentum: float = option(0.9, "of sgd and other momentum optimizers", low=0, high=1)
    weight_decay: float = option(4e-5, "on weights of two or more dimensions only", low=0)
    loss: str = option(
        "auto",
        "auto: bce on unsmoothed soft targets while mixing, else cross-entropy with "
        "label_smoothing; bce and ce: always, smoothed",
        choices=("auto", "bce", "ce"),
    )
    label_smoothing: float = option(
        0.1, "share of the target spread over all classes", low=0, high=0.999
    )
    bce_threshold: float = option(
        0.0, "bce: targets above it become 1, others 0; 0: soft targets", low=0, high=1
    )
    bce_sum: bool = option(False, "bce: sum over classes instead of mean")
    grad_clip: float = option(
        0.0, "largest norm of all gradients together; 0: no clip (lamb clips at 1 itself)", low=0
    )
    use_blurpool: bool = option(False, "blur before strided convolutions, as ffcv-imagenet")
    seed: int = option(0, "of every random number", low=0, high=2**63 - 1)
    eval_only: bool = option(False, "evaluate the newest checkpoint of logging.folder and end")
    distributed: bool = option(
        False, "start dist.world_size processes here (torchrun needs no flag)"
    )


@dataclass(frozen=True, kw_only=True)
class Ema:
    """exponential moving average of weights and batch-norm statistics, evaluated beside the raw
    weights"""

    decay: float = option(0.0, "share the average keeps at each step; 0: no average", low=0, high=1)
    warmup: bool = option(False, "decay of step s at most 1 - (1 + s) ** -power")
    warmup_power: float = option(2 / 3, "power of the warm-up", low=0.01, high=1)
    per_images: int = option(
        0, "decay is for so many images, whatever the batch; 0: for a step", low=0
    )
    buffers: str = option(
        "lerp", "batch-norm statistics: averaged too, or copied", choices=("lerp", "copy")
    )


@dataclass(frozen=True, kw_only=True)
class Swa:
    """equal average of the weights after each of the last epochs, its batch-norm statistics
    estimated anew at the end"""

    epochs: int = option(0, "last epochs that are averaged; 0: no average", low=0)
    lr: float = option(
        0.0, "learning rate of these epochs; not above what the schedule has reached", low=0
    )
    anneal_epochs: float = option(1.0, "epochs in which the learning rate goes down to it", low=0)
    bn_steps: int = option(
        0,
        "steps' worth of training images that the statistics are estimated from; 0: an epoch",
        low=0,
    )


@dataclass(frozen=True, kw_only=True)
class Validation:
    """evaluation after each epoch"""

    batch_size: int = option(512, "images a process takes at once", low=1)
    resolution: int = option(224, "pixels a side", low=8, high=4096)
    crop_ratio: float = option(
        224 / 256, "side of the central crop over the shorter side", low=0.01, high=1
    )
    interpolation: str = option(
        "bicubic", "of resizing, as timm evaluates", choices=("bilinear", "bicubic")
    )
    lr_tta: bool = option(True, "add the outputs for the mirrored image")
    labels: str = option(
        "",
        "JSON list of the labels (or lists of labels, as ImageNet-ReaL's) that each image may be "
        "given, in "
        "the order of ImageNet's numbers in the images' names, else of the file: top-1 by these is "
        "reported beside",
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """checkpoints, in logging.folder"""

    resume: str = option(
        "auto",
        "auto: continue the newest checkpoint of logging.folder where there is one; "
        "never: refuse a folder that has one",
        choices=("auto", "never"),
    )
    keep: int = option(
        2, "how many of the newest stay; the best one stays besides", low=1, high=1000
    )
    every_steps: int = option(
        0,
        "after each step that is a multiple of it, besides the one at each epoch's end; 0: none",
        low=0,
    )
    every_minutes: float = option(10.0, "minutes after the last one, besides; 0: none", low=0)
    warm_start: str = option(
        "", "checkpoint or state_dict that a new run takes its weights from, and nothing else"
    )
    warm_start_from: str = option(
        "model", "which weights of that checkpoint", choices=("model", "ema", "swa")
    )


@dataclass(frozen=True, kw_only=True)
class Health:
    """what is done when a run goes wrong: off, warn (a line, kept in the log), or act"""

    non_finite: str = option(
        "stop",
        "a loss or weight that is infinite or no number: stop the run; act: go back to the "
        "last regular checkpoint (epoch's end or every_steps) and leave out that step and the one "
        "before",
        choices=("off", "warn", "stop", "act"),
    )
    loss_rise: str = option(
        "warn",
        "the loss is more than `rise` above its recent median; act: go back to the last "
        "regular checkpoint and halve the learning rate",
        choices=("off", "warn", "act"),
    )
    rise: float = option(0.1, "loss_rise: share", low=0.001, high=100)
    chance: str = option(
        "warn",
        "top-1 after epoch chance_epoch is what guessing gives; act: stop the run",
        choices=("off", "warn", "act"),
    )
    chance_epoch: int = option(5, "chance: the epoch, counted from 1", low=1)
    average: str = option(
        "warn",
        "the EMA's top-1 is more than `gap` below the model's, and what it began from has less "
        "than "
        "1 % of it; act: the EMA starts again from the model",
        choices=("off", "warn", "act"),
    )
    gap: float = option(10.0, "average: points of top-1", low=0, high=100)


@dataclass(frozen=True, kw_only=True)
class Logging:
    """what a run leaves behind"""

    folder: str = option(REQUIRED, "where checkpoints, metrics.jsonl, config.json and curves go")
    log_level: int = option(
        1, "0: evaluate after the last epoch only; 1: after each", low=0, high=1
    )


@dataclass(frozen=True, kw_only=True)
class Dist:
    """the processes of a job; world_size, address and port are for those that
    training.distributed=1 starts"""

    world_size: int = option(1, "number of processes, one a GPU", low=1, high=4096)
    address: str = option("localhost", "of the process group")
    port: int = option(12355, "of the process group", low=1, high=65535)
    timeout_s: float = option(
        120.0,
        "seconds without a sign of life of a process after which the others end with status 3",
        low=1,
        high=86400,
    )


@dataclass(frozen=True, kw_only=True)
class Compute:
    """hardware"""

    device: str = option(
        "auto",
        "auto: cuda where there is one; an NVIDIA device that torch cannot use is an error",
        choices=("auto", "cpu", "cuda"),
    )
    precision: str = option(
        "auto",
        "auto: fp16 on cuda; on the CPU bf16 where it is native, else fp32",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    compile: str = option("auto", "torch.compile; auto: on cuda only", choices=("auto", "0", "1"))
    channels_last: bool = option(True, "memory layout of weights and images")
    threads: int = option(
        0,
        "CPU threads of the model in each process; 0: OMP_NUM_THREADS, else the cores shared "
        "among processes",
        low=0,
        high=1024,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One field a section."""

    data: Data
    model: Model
    resolution: Resolution
    augment: Augment
    mix: MixOptions
    lr: Lr
    training: Training
    ema: Ema
    swa: Swa
    validation: Validation
    checkpoint: Checkpoint
    health: Health
    logging: Logging
    dist: Dist
    compute: Compute


SECTIONS: dict[str, Any] = {item.name: item.type for item in fields(TrainConfig)}
IGNORED = {"training.bn_wd"}  # in ffcv-imagenet's published files, read by nothing there either


def read_config(
    description: str | None,
    arguments: Sequence[str] | None = None,
    unread: Collection[str] = (),
) -> TrainConfig:
    """The configuration from the command line; see `options.read_options`.

    unread: required options that the caller does not read; they may be left out and are not
        checked.
    Raises InputError for an option that is unknown, mistyped, out of range, missing, or at odds
    with another.
    """
    config = TrainConfig(
        **read_options(SECTIONS, description, arguments, ignored=IGNORED, unread=unread)
    )
    _check_together(config, unread)
    return config


def _check_together(c: TrainConfig, unread: Collection[str]) -> None:
    """What no option can be checked for by itself."""
    for name in ("train_dataset", "val_dataset"):
        path = getattr(c.data, name)
        if f"data.{name}" not in unread and not os.path.isfile(path):
            raise InputError(
                f"data.{name}={path}: no such file; write it with write_ffcv.py or correct the path"
            )
    for low, high in (
        ("augment.scale_min", "augment.scale_max"),
        ("augment.erase_min", "augment.erase_max"),
        ("resolution.min_res", "resolution.max_res"),
        ("resolution.start_ramp", "resolution.end_ramp"),
        ("lr.warmup_epochs", "training.epochs"),
        ("mix.off_epochs", "training.epochs"),
        ("swa.epochs", "training.epochs"),
        *([("swa.anneal_epochs", "swa.epochs")] if c.swa.epochs else []),
    ):
        below, above = (
            getattr(getattr(c, name.split(".")[0]), name.split(".")[1]) for name in (low, high)
        )
        if below > above:
            raise InputError(f"{low}={below} is larger than {high}={above}; change one of them")
    if (c.mix.mixup or c.mix.cutmix) and c.training.batch_size % 2:
        raise InputError(
            f"training.batch_size={c.training.batch_size} is odd, and mixup pairs images; make it "
            f"even"
        )
