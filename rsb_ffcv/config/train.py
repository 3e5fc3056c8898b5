"""The options of train_imagenet.py: one frozen dataclass with one field per section.

Sections and options that libffcv/ffcv-imagenet has keep their names, meanings and defaults.
Exceptions: the default of model.arch is resnet18 in ffcv-imagenet, and data.num_workers is required
in it.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rsb_ffcv import InputError
from rsb_ffcv.config.options import REQUIRED, option, read_options


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """the network"""

    arch: str = option("resnet50", "timm's name of the model")
    pretrained: bool = option(False, "start from timm's published weights (downloaded)")
    num_classes: int = option(
        0, "number of outputs; 0: the number of classes in the training file", low=0
    )
    drop_path: float = option(
        0.0, "stochastic depth: probability of dropping the last block", low=0, high=0.99
    )
    zero_init_last: bool = option(
        True, "initialize gamma of each block's last batch norm to 0 (ResNets)"
    )
    freeze: int | str = option(
        0,
        "number of first layer groups that stay as they are, with their batch-norm statistics: "
        "timm's groups, the stem and then each stage (ResNets) or block (transformers); backbone: "
        "all but the classifier head",
        low=0,
        high=1000,
        words=("backbone",),
    )
    grad_checkpointing: bool = option(
        False,
        "compute activations again in the backward pass instead of storing them: less memory, more "
        "time, the same result",
    )


@dataclass(frozen=True, kw_only=True)
class ResolutionOptions:
    """side of the training images in pixels"""

    min_res: int = option(160, "side in pixels up to epoch start_ramp", low=8, high=4096)
    max_res: int = option(
        160,
        "side in pixels from epoch end_ramp on; between the two epochs, it is interpolated and "
        "rounded to multiples of 32",
        low=8,
        high=4096,
    )
    start_ramp: int = option(0, "last epoch (counted from 0) at min_res", low=0)
    end_ramp: int = option(0, "first epoch (counted from 0) at max_res", low=0)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """data files and how they are read"""

    train_dataset: str = option(
        REQUIRED,
        ".beton file to train on; several as one dataset: separated by commas, or a pattern such "
        "as 'shards/*.beton'",
        several=True,
    )
    val_dataset: str = option(REQUIRED, ".beton file to evaluate on, or several", several=True)
    num_workers: int | str = option(
        "auto",
        "loader threads per process; auto: the machine's cores divided by its processes",
        low=1,
        high=1024,
        words=("auto",),
    )
    in_memory: bool = option(
        REQUIRED, "read the files into the page cache before training, if they fit"
    )
    order: str = option(
        "random",
        "order of the training images; quasi_random: shuffles chunks of 1 MiB, 1 GiB at a time, "
        "for files larger than memory",
        choices=("random", "sequential", "quasi_random"),
    )
    on_bad_sample: str = option(
        "raise",
        "if a training image cannot be read: raise: end the run; skip: use the next slot's image "
        "instead, and list the sample in the log",
        choices=("raise", "skip"),
    )
    decode: str = option(
        "auto",
        "what decodes, crops and augments; gpu: the training device (with compute.device=cpu it is "
        "emulated, which is slow); auto: the faster one, measured at the start of a run on a GPU. "
        "The images have the same bytes",
        choices=("cpu", "gpu", "auto"),
    )
    decode_memory_mb: int = option(
        1024,
        "decode=gpu: bound of the device memory for packed and partly decoded images, in MiB; for "
        "each of the two loaders",
        low=16,
        high=65536,
    )
    affinity: bool = option(
        True,
        "run on the cores of the NUMA node of the process's GPU, where the machine's topology is "
        "known; a process alone on the machine does so only if the GPU decodes",
    )


@dataclass(frozen=True, kw_only=True)
class AugmentOptions:
    """augmentation of each training image"""

    scale_min: float = option(
        0.08, "random resized crop: smallest share of the image's area", low=0.001, high=1
    )
    scale_max: float = option(
        1.0, "random resized crop: largest share of the image's area", low=0.001, high=1
    )
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    repeats: int = option(
        1,
        "repeated augmentation: copies of an image in an epoch, in different mix groups",
        low=1,
        high=64,
    )
    rand_augment: str = option(
        "",
        "timm's RandAugment spec, for example rand-m7-mstd0.5-inc1; or 3a; or torchvision's "
        "ra-n2-m9-b31 (RandAugment), aa-imagenet, aa-cifar10, aa-svhn (AutoAugment) or ta_wide; "
        "empty: none",
    )
    color_jitter: float = option(
        0.0,
        "strength of brightness, contrast and saturation jitter, after rand_augment",
        low=0,
        high=10,
    )
    hue: float = option(
        0.0,
        "strength of hue jitter, as a share of the colour circle; in random order with "
        "color_jitter",
        low=0,
        high=0.5,
    )
    interpolation: str = option(
        "random",
        "interpolation of the crop, and of geometric ops unless rand_augment is torchvision's; "
        "random: bilinear or bicubic for each draw, as in timm",
        choices=("random", "bilinear", "bicubic"),
    )
    erase_prob: float = option(0.0, "random erasing: probability per image", low=0, high=1)
    erase_mode: str = option(
        "const",
        "random erasing: fill with 0 (const), one random colour (rand), or random pixels (pixel)",
        choices=("const", "rand", "pixel"),
    )
    erase_min: float = option(
        0.02, "random erasing: smallest share of the image's area", low=0, high=1
    )
    erase_max: float = option(
        1 / 3, "random erasing: largest share of the image's area", low=0, high=1
    )


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """mixup and cutmix"""

    mixup: float = option(0.0, "alpha of mixup's Beta(alpha, alpha); 0: off", low=0, high=100)
    cutmix: float = option(0.0, "alpha of cutmix's Beta(alpha, alpha); 0: off", low=0, high=100)
    prob: float = option(1.0, "probability that mixup or cutmix is applied", low=0, high=1)
    switch_prob: float = option(0.5, "probability of cutmix if both are on", low=0, high=1)
    mode: str = option(
        "batch",
        "images that share a draw: batch (training.batch_size images), pair (an image and its "
        "partner) or elem (none: one draw per image)",
        choices=("batch", "pair", "elem"),
    )
    off_epochs: int = option(0, "number of last epochs without mixing", low=0)


@dataclass(frozen=True, kw_only=True)
class LrOptions:
    """learning rate, updated in each step"""

    lr: float = option(0.5, "peak learning rate", low=0)
    lr_schedule_type: str = option(
        "cyclic",
        "cosine, polynomial and constant: after the warm-up; cosine_spanning: timm's cosine over "
        "all epochs, whose beginning the warm-up replaces; cyclic and step: ffcv-imagenet's",
        choices=("cosine", "cosine_spanning", "polynomial", "constant", "cyclic", "step"),
    )
    warmup_epochs: float = option(
        0.0, "epochs of linear warm-up; 0 for cyclic and step, which have none", low=0
    )
    warmup_lr: float = option(0.0, "learning rate of the first step of the warm-up", low=0)
    min_lr: float = option(0.0, "learning rate at the end of the cosine or polynomial", low=0)
    power: float = option(1.0, "polynomial: exponent", low=0.01, high=10)
    lr_peak_epoch: int = option(2, "cyclic: epoch (counted from 0) of the peak", low=0)
    step_ratio: float = option(0.1, "step: factor of the learning rate at each step", low=0)
    step_length: int = option(30, "step: epochs between two steps", low=1)
    from_epoch: int = option(
        0,
        "epoch (counted from 0) at whose beginning warm-up and schedule begin, over the epochs "
        "that are left; for a branch, which otherwise follows the schedule of all epochs",
        low=0,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """optimizer, loss and general settings"""

    epochs: int = option(30, "number of epochs", low=1)
    batch_size: int = option(
        512,
        "images per forward pass of a process; also the mix group, which shares mixup and cutmix "
        "draws and batch-norm statistics",
        low=2,
    )
    global_batch: int = option(
        0,
        "images of an optimizer step over all processes; gradients are accumulated if the "
        "processes take fewer per forward pass; 0: batch_size x processes",
        low=0,
    )
    optimizer: str = option("sgd", "sgd, lamb, adamw, or timm's name of any other optimizer")
    momentum: float = option(0.9, "momentum of sgd and other momentum optimizers", low=0, high=1)
    weight_decay: float = option(
        4e-5, "weight decay, of weights with two or more dimensions only", low=0
    )
    layer_decay: float = option(
        1.0,
        "factor of the learning rate from a layer group to the one before it: timm's groups, the "
        "head, each block and the stem; 1: the same for all",
        low=0.01,
        high=1,
    )
    head_lr_scale: float = option(
        1.0, "additional factor of the classifier head's learning rate", low=0.01, high=1000
    )
    loss: str = option(
        "auto",
        "auto: bce on unsmoothed soft targets while mixing, else cross-entropy with "
        "label_smoothing; bce, ce: always this loss, with label_smoothing",
        choices=("auto", "bce", "ce"),
    )
    label_smoothing: float = option(
        0.1, "share of the target that is spread over all classes", low=0, high=0.999
    )
    bce_threshold: float = option(
        0.0,
        "bce: targets above this value become 1, the others 0; 0: soft targets",
        low=0,
        high=1,
    )
    bce_sum: bool = option(False, "bce: sum over classes instead of mean")
    grad_clip: float = option(
        0.0, "largest norm of all gradients together; 0: no clip (lamb always clips to 1)", low=0
    )
    use_blurpool: bool = option(False, "blur before strided convolutions, as in ffcv-imagenet")
    seed: int = option(0, "seed of all random numbers", low=0, high=2**63 - 1)
    eval_only: bool = option(False, "evaluate the newest checkpoint of logging.folder, then exit")
    distributed: bool = option(
        False, "start dist.world_size processes on this machine (not needed with torchrun)"
    )


@dataclass(frozen=True, kw_only=True)
class EmaOptions:
    """exponential moving average of weights and batch-norm statistics, evaluated in addition to the
    raw weights"""

    decay: float = option(
        0.0, "share that the average keeps at each step, below 1; 0: no average", low=0, high=1
    )
    warmup: bool = option(
        False, "limit the decay of step s to 1 - (1 + s) ** -warmup_power at the beginning"
    )
    warmup_power: float = option(2 / 3, "exponent of the warm-up", low=0.01, high=1)
    per_images: int = option(
        0, "decay is per this number of images, for any global batch; 0: per step", low=0
    )
    buffers: str = option(
        "lerp",
        "batch-norm statistics: lerp: averaged; copy: copied from the raw model",
        choices=("lerp", "copy"),
    )


@dataclass(frozen=True, kw_only=True)
class SwaOptions:
    """equal average of the weights after each of the last epochs; its batch-norm statistics are
    estimated again at the end"""

    epochs: int = option(0, "number of last epochs to average; 0: no average", low=0)
    lr: float = option(
        0.0,
        "learning rate in these epochs; must not be above the schedule's value at their beginning",
        low=0,
    )
    anneal_epochs: float = option(
        1.0, "number of epochs in which the learning rate falls to swa.lr", low=0
    )
    bn_steps: int = option(
        0,
        "number of steps whose images are used to estimate the batch-norm statistics; 0: one epoch",
        low=0,
    )


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """evaluation after each epoch"""

    batch_size: int = option(512, "images per forward pass of a process", low=1)
    resolution: int = option(224, "side of the images in pixels", low=8, high=4096)
    crop_ratio: float = option(
        224 / 256, "side of the central crop / shorter side of the image", low=0.01, high=1
    )
    interpolation: str = option(
        "bicubic",
        "interpolation of resizing; timm evaluates with bicubic",
        choices=("bilinear", "bicubic"),
    )
    lr_tta: bool = option(True, "average the outputs for the image and its mirror image")
    labels: str = option(
        "",
        "JSON list of labels (or lists of labels, as in ImageNet-ReaL) that count as correct for "
        "each image, in the order of the ImageNet numbers in the images' names, or else in the "
        "order of the file; top-1 with these labels is reported in addition",
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """checkpoints, in logging.folder"""

    resume: str = option(
        "auto",
        "auto: resume from the newest checkpoint of logging.folder, if there is one; "
        "never: refuse a folder that has a checkpoint",
        choices=("auto", "never"),
    )
    keep: int = option(
        2,
        "number of newest checkpoints to keep, in addition to the best one and the newest regular "
        "one (epoch's end or every_steps)",
        low=1,
        high=1000,
    )
    every_steps: int = option(
        0,
        "steps between checkpoints, in addition to the one at each epoch's end; 0: none",
        low=0,
    )
    archive_every: int = option(
        0, "epochs from one checkpoint that is kept for good to the next; 0: none", low=0
    )
    every_minutes: float = option(
        10.0, "save if the last checkpoint is older than this number of minutes; 0: off", low=0
    )
    warm_start: str = option(
        "",
        "file from which a new run takes its initial weights only: a checkpoint or state_dict of "
        "this program, timm, torchvision, ffcv-imagenet or Lightning, or .safetensors",
    )
    warm_start_from: str = option(
        "model",
        "which weights of that file to use; ema: also a timm checkpoint's",
        choices=("model", "ema", "swa"),
    )
    warm_start_head: str = option(
        "match",
        "match: the classifier head in that file has to fit; new: leave the head at its "
        "initialization",
        choices=("match", "new"),
    )
    branch: str = option(
        "",
        "run folder or checkpoint that a new run continues under a changed recipe: it takes over "
        "weights, optimizer, averages and epoch; from the middle of an epoch only if order, images "
        "and batches stay the same",
    )
    branch_optimizer: str = option(
        "keep",
        "branch: keep the optimizer's state (moments), or begin a new one",
        choices=("keep", "new"),
    )


@dataclass(frozen=True, kw_only=True)
class HealthOptions:
    """health checks: off, warn (a message, also in the log), or act; non_finite also has stop"""

    non_finite: str = option(
        "stop",
        "a loss or weight is infinite or NaN; stop: end the run; act: go back to the last regular "
        "checkpoint (epoch's end or every_steps) and leave out that step and the one before it",
        choices=("off", "warn", "stop", "act"),
    )
    loss_rise: str = option(
        "warn",
        "the loss is more than `rise` above its recent median; act: go back to the last "
        "regular checkpoint and halve the learning rate",
        choices=("off", "warn", "act"),
    )
    rise: float = option(0.1, "loss_rise: share; 0.1 is 10 %", low=0.001, high=100)
    chance: str = option(
        "warn",
        "top-1 after epoch chance_epoch is at chance level; act: end the run",
        choices=("off", "warn", "act"),
    )
    chance_epoch: int = option(5, "chance: the epoch, counted from 1", low=1)
    average: str = option(
        "warn",
        "the EMA's top-1 is more than `gap` below the model's, and the initial weights contribute "
        "less than 1 % to it; act: restart the EMA from the model",
        choices=("off", "warn", "act"),
    )
    gap: float = option(10.0, "average: percentage points of top-1", low=0, high=100)
    falling: str = option(
        "warn",
        "the median top-1 of the last 5 epochs is more than `fall` below the highest such median, "
        "and the training loss has fallen since; SWA's top-1 is compared with the raw weights",
        choices=("off", "warn"),
    )
    fall: float = option(3.0, "falling: percentage points of top-1", low=0, high=100)
    expected: str = option(
        "warn",
        "top-1 after an epoch of logging.expected is more than `behind` below it",
        choices=("off", "warn"),
    )
    behind: float = option(3.0, "expected: percentage points of top-1", low=0, high=100)


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """output of a run"""

    folder: str = option(
        REQUIRED,
        "folder of checkpoints, metrics.jsonl, training.log, config.json, curves and report.html",
    )
    log_level: int = option(
        1, "0: evaluate after the last epoch only; 1: evaluate after each epoch", low=0, high=1
    )
    expected: str = option(
        "",
        "the best top-1 of any weights in per cent that is expected after epochs, counted from 1, "
        "for example '5=25, 300=79.8'; it is drawn in the curves, see also health.expected",
    )
    trackers: str = option(
        "",
        "experiment trackers that get the figures as well: any of tensorboard, wandb, mlflow, "
        "separated by commas",
    )
    project: str = option("rsb_ffcv", "project (wandb) or experiment (mlflow) of the run")
    run_name: str = option("", "name of the run in trackers; empty: the name of logging.folder")


@dataclass(frozen=True, kw_only=True)
class DistOptions:
    """the processes of a job; world_size, address and port are used with training.distributed=1
    only"""

    world_size: int = option(1, "number of processes, one per GPU", low=1, high=4096)
    address: str = option("localhost", "address of the process group")
    port: int = option(12355, "port of the process group", low=1, high=65535)
    timeout_s: float = option(
        120.0,
        "if a process becomes silent, the others end with status 3 within this number of seconds; "
        "after it, the same command may take over its run",
        low=1,
        high=86400,
    )


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """hardware"""

    device: str = option(
        "auto",
        "auto: cuda if there is a device, else cpu; an NVIDIA device that torch cannot use is an "
        "error",
        choices=("auto", "cpu", "cuda"),
    )
    precision: str = option(
        "auto",
        "auto: fp16 on cuda; on the CPU bf16 if the processor supports it natively, else fp32",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    compile: str = option(
        "auto",
        "torch.compile; auto: on cuda only, if the machine has what it needs: a C compiler and "
        "Python's headers",
        choices=("auto", "0", "1"),
    )
    profile: int = option(
        0,
        "write a trace of this number of steps to trace.json in logging.folder, from the 11th step "
        "of the process on; 0: none",
        low=0,
        high=1000,
    )
    channels_last: bool = option(True, "use the channels_last memory layout for weights and images")
    threads: int = option(
        0,
        "CPU threads of torch per process; 0: OMP_NUM_THREADS, else the machine's cores divided "
        "by its processes",
        low=0,
        high=1024,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The configuration of a run, one field per section."""

    data: DataOptions
    model: ModelOptions
    resolution: ResolutionOptions
    augment: AugmentOptions
    mix: MixOptions
    lr: LrOptions
    training: TrainingOptions
    ema: EmaOptions
    swa: SwaOptions
    validation: ValidationOptions
    checkpoint: CheckpointOptions
    health: HealthOptions
    logging: LoggingOptions
    dist: DistOptions
    compute: ComputeOptions


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """what plan prints in addition"""

    against: str = option(
        "", "another recipe's YAML file: list the options that differ, with both values"
    )
    images_per_s: str = option(
        "",
        "estimate the hours at this number of images/s of all GPUs, or at the median of the run in "
        "this folder",
    )
    gpus: int = option(1, "number of GPUs, for the costs", low=1, high=65536)
    price: float = option(0.0, "price of a GPU-hour, for the costs; 0: none", low=0)
    picture: str = option(
        "", "PNG file: learning rate and resolution over the epochs, drop path of the layers"
    )


def _which_weights() -> Any:
    return option(
        "model",
        "which weights of a file with several sets, such as a checkpoint",
        choices=("model", "ema", "swa"),
    )


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """what eval evaluates"""

    weights: str = option(
        REQUIRED,
        "best_weights.pt, a checkpoint, or any file that checkpoint.warm_start takes (then "
        "model.arch and model.num_classes say what it is of); or a program that export wrote, "
        "model.pt2 or model.onnx",
    )
    which: str = _which_weights()
    csv: str = option("", "file for the results of each class; empty: none")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """exporting the weights of a run"""

    folder: str = option(REQUIRED, "new folder for the model")
    formats: str = option(
        "timm",
        "what to write beside the weights, any of timm, torch, onnx, separated by commas. timm: "
        "the files of the Hugging Face Hub; torch: a torch.export program; onnx: an ONNX model",
    )
    input: str = option(
        "uint8",
        "torch, onnx: the input: uint8 (n, side, side, 3), or float (n, 3, side, side) in 0 .. 1; "
        "the program contains the normalization",
        choices=("uint8", "float"),
    )
    weights: str = option("", "file of the run's weights; empty: its best_weights.pt")
    which: str = _which_weights()
    data: str = option(
        "",
        ".beton file that lists the classes; empty: the run's data.train_dataset",
        several=True,
    )
    repository: str = option(
        "", "<user>/<name> on the Hugging Face Hub, for the model card; empty: the folder's name"
    )
    license: str = option(
        "unknown",
        "license of the weights, an identifier of the Hugging Face Hub such as apache-2.0",
    )


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """predicting the classes of pictures"""

    model: str = option(REQUIRED, "folder that export wrote")
    format: str = option("csv", "output: csv, or json lines", choices=("csv", "json"))
    out: str = option("", "file for the output; empty: standard output")
    top: int = option(5, "number of classes of each picture", low=1, high=1000)
    lr_tta: bool = option(False, "average the outputs for the picture and its mirror image")
    batch_size: int = option(64, "pictures per forward pass", low=1, high=65536)
    num_workers: int = option(4, "threads that read and decode", low=1, high=1024)
    max_pixels: int = option(
        100_000_000,
        "pictures with more pixels are not read",
        low=1,
        high=2**28,
    )
    device: str = option(
        "auto", "auto: cuda if there is a device, else cpu", choices=("auto", "cpu", "cuda")
    )
    precision: str = option(
        "fp32",
        "auto: fp16 on cuda; on the CPU bf16 if the processor supports it natively, else fp32",
        choices=("auto", "fp32", "fp16", "bf16"),
    )


@dataclass(frozen=True, kw_only=True)
class AppOptions:
    """writing an app for a model"""

    folder: str = option(REQUIRED, "new folder for the app")
    examples: str = option(
        "",
        "pictures that the app offers: files, folders, patterns and .beton files, separated by "
        "commas; empty: none",
        several=True,
    )
    count: int = option(6, "largest number of examples, spread over them", low=1, high=100)


def processes(c: TrainConfig) -> int:
    """The processes that the configuration itself starts; torchrun's are not known to it."""
    return c.dist.world_size if c.training.distributed else 1


def images_per_step(c: TrainConfig) -> int:
    """The images of an optimizer step, with `processes`."""
    return c.training.global_batch or c.training.batch_size * processes(c)


# Sections whose options define what is trained and how it is evaluated; the others are about one
# machine or one start
RECIPE = (
    "model",
    "resolution",
    "augment",
    "mix",
    "lr",
    "training",
    "ema",
    "swa",
    "validation",
)
SECTIONS: dict[str, Any] = {item.name: item.type for item in fields(TrainConfig)}
# Sections that one command reads in addition
COMMAND_SECTIONS: dict[str, Any] = {
    "plan": PlanOptions,
    "eval": EvalOptions,
    "export": ExportOptions,
    "predict": PredictOptions,
    "app": AppOptions,
}
# Required options that only a run reads
ONLY_FOR_RUNS = {"data.val_dataset", "data.in_memory", "logging.folder"}
TRACKERS = ("tensorboard", "wandb", "mlflow")
# Options in ffcv-imagenet's published files that its own trainer does not use
IGNORED = {"training.bn_wd"}


def read_config(
    description: str | None,
    arguments: Sequence[str] | None = None,
    unread: Collection[str] = (),
) -> TrainConfig:
    """Reads the configuration from the command line; see `options.read_options`.

    unread: required options that the caller does not read. They may be omitted and are not checked.

    Raises InputError for an option that is unknown, mistyped, out of range or missing, or that
    conflicts with another one.
    """
    return _read(description, arguments, unread=unread)[0]


def read_plan(description: str | None, arguments: Sequence[str]) -> tuple[TrainConfig, PlanOptions]:
    """Reads the configuration and the options of the command plan; see read_config."""
    return _read(description, arguments, unread=ONLY_FOR_RUNS, own=PlanOptions)


def read_eval(description: str | None, arguments: Sequence[str]) -> tuple[TrainConfig, EvalOptions]:
    """Reads the configuration and the options of the command eval; see read_config."""
    unread = {"data.train_dataset", "data.in_memory", "logging.folder"}
    return _read(description, arguments, unread=unread, own=EvalOptions)


def read_words(
    description: str | None, arguments: Sequence[str], *, command: str, words: tuple[str, str]
) -> tuple[Any, list[str]]:
    """Reads the options of a command that has its own section only, and the words beside them.

    command: its name, of COMMAND_SECTIONS. words: see read_options.
    """
    found = read_options({command: COMMAND_SECTIONS[command]}, description, arguments, words=words)
    return found[command], found[words[0]]


def _read(
    description: str | None,
    arguments: Sequence[str] | None,
    *,
    unread: Collection[str],
    own: type[Any] | None = None,
) -> tuple[TrainConfig, Any]:
    """Returns the configuration and the options of a command's own section, if it has one."""
    extra = {name: section for name, section in COMMAND_SECTIONS.items() if section is own}
    options = read_options(SECTIONS | extra, description, arguments, ignored=IGNORED, unread=unread)
    given = [options.pop(name) for name in extra]
    config = TrainConfig(**options)
    _check_together(config, unread)
    expected_curve(config)
    tracker_names(config)
    return config, given[0] if given else None


def read_recipe(path: str) -> TrainConfig:
    """Reads a recipe's YAML file. Its data files need not exist. Raises InputError as read_config
    does."""
    return TrainConfig(
        **read_options(
            SECTIONS,
            None,
            ["--config-file", path],
            ignored=IGNORED,
            unread={*ONLY_FOR_RUNS, "data.train_dataset"},
        )
    )


def expected_curve(c: TrainConfig) -> dict[int, float]:
    """logging.expected: epoch, counted from 1 -> top-1 in per cent."""
    return expected_points(c.logging.expected)


def expected_points(expected: str) -> dict[int, float]:
    """The same from the option's text. Raises InputError if it is invalid."""
    curve = {}
    for point in filter(None, expected.replace(" ", "").split(",")):
        epoch, _, top1 = point.partition("=")
        try:
            curve[int(epoch)] = float(top1)
        except ValueError:
            curve[0] = 0.0
    if not all(epoch > 0 and 0 < top1 <= 100 for epoch, top1 in curve.items()):
        raise InputError(
            f"logging.expected={expected!r}: must be epoch=top-1 pairs, for example "
            f"'5=25, 300=79.8', with epochs from 1 and top-1 in per cent"
        )
    return curve


def tracker_names(c: TrainConfig) -> list[str]:
    """logging.trackers, each name once."""
    names = list(filter(None, c.logging.trackers.replace(" ", "").split(",")))
    if not set(names) <= set(TRACKERS):
        raise InputError(
            f"logging.trackers={c.logging.trackers!r}: must be any of {', '.join(TRACKERS)}, "
            f"separated by commas; metrics.jsonl is always written"
        )
    return list(dict.fromkeys(names))


def _check_together(c: TrainConfig, unread: Collection[str]) -> None:
    """Raises InputError for a data file that does not exist, and for options that conflict."""
    for name in ("train_dataset", "val_dataset"):
        path = getattr(c.data, name)
        # Whether files of a list or pattern exist is known when they are read.
        several = any(sign in path for sign in ",*?[")
        if f"data.{name}" not in unread and not several and not os.path.isfile(path):
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
    if c.model.freeze and not (c.model.pretrained or c.checkpoint.warm_start):
        raise InputError(
            f"model.freeze={c.model.freeze}: would freeze random weights; give the weights with "
            f"model.pretrained=1 or checkpoint.warm_start"
        )
    if c.checkpoint.warm_start_head == "new" and not c.checkpoint.warm_start:
        raise InputError(
            "checkpoint.warm_start_head=new: is used with checkpoint.warm_start only; give that "
            "file, or remove this option (model.pretrained=1 needs none)"
        )
    if c.lr.warmup_epochs and c.lr.lr_schedule_type in ("cyclic", "step"):
        raise InputError(
            f"lr.warmup_epochs={c.lr.warmup_epochs:g}: lr.lr_schedule_type="
            f"{c.lr.lr_schedule_type} has no warm-up; set it to 0 or choose another schedule"
        )
    if c.lr.from_epoch + c.lr.warmup_epochs > c.training.epochs - (c.lr.from_epoch > 0):
        raise InputError(
            f"lr.from_epoch={c.lr.from_epoch}: the schedule would begin at or after the end, with "
            f"training.epochs={c.training.epochs} and lr.warmup_epochs={c.lr.warmup_epochs:g}; "
            f"lower it or train more epochs"
        )
    if c.checkpoint.branch and c.checkpoint.warm_start:
        raise InputError(
            f"checkpoint.branch={c.checkpoint.branch}: checkpoint.warm_start gives other initial "
            f"weights; remove one of them"
        )
    if c.ema.decay == 1:
        raise InputError(
            "ema.decay=1: the average would never change; use a value below 1, or 0 for no average"
        )
    if (c.mix.mixup or c.mix.cutmix) and c.training.batch_size % 2:
        raise InputError(
            f"training.batch_size={c.training.batch_size} is odd, but mixup and cutmix pair "
            f"images; make it even"
        )
