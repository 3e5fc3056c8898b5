"""Everything the two programs can be told: one frozen dataclass a program, one field a section.

Sections and names of libffcv/ffcv-imagenet keep their names, meaning and defaults, but for
model.arch (resnet18 there) and data.num_workers (required there).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rsb_ffcv import InputError
from rsb_ffcv.options import REQUIRED, Program, flag, option, read_options


@dataclass(frozen=True, kw_only=True)
class Model:
    """the network"""

    arch: str = option(str, "resnet50", "a model of timm, by its name there")
    pretrained: bool = flag(False, "start from timm's published weights (downloaded)")
    num_classes: int = option(int, 0, "outputs; 0: as many as the training file has classes", 0)
    drop_path: float = option(
        float, 0.0, "stochastic depth: probability of dropping the last block", 0, 0.99
    )
    zero_init_last: bool = flag(True, "gamma of each block's last batch norm starts at 0")


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """resolution of the training images, in pixels a side"""

    min_res: int = option(int, 160, "up to epoch start_ramp", 8, 4096)
    max_res: int = option(
        int, 160, "from epoch end_ramp on; in between, interpolated to multiples of 32", 8, 4096
    )
    start_ramp: int = option(int, 0, "last epoch (counted from 0) at min_res", 0)
    end_ramp: int = option(int, 0, "first epoch (counted from 0) at max_res", 0)


@dataclass(frozen=True, kw_only=True)
class Data:
    """files and how they are read"""

    train_dataset: str = option(str, REQUIRED, ".beton file to train on")
    val_dataset: str = option(str, REQUIRED, ".beton file to evaluate on")
    num_workers: int | str = option(
        int,
        "auto",
        "loader threads of each process; auto: the cores shared among the machine's processes",
        1,
        1024,
        words=("auto",),
    )
    in_memory: bool = option(
        bool, REQUIRED, "read the files into the page cache before training, if they fit"
    )
    order: str = option(
        str,
        "random",
        "of training images; quasi_random: runs of 1 MiB, mixed 1 GiB at a time, for files "
        "larger than memory",
        choices=("random", "sequential", "quasi_random"),
    )
    on_bad_sample: str = option(
        str,
        "raise",
        "a training image that cannot be read: end the run, or skip: take the next "
        "slot's, and name it in the log",
        choices=("raise", "skip"),
    )


@dataclass(frozen=True, kw_only=True)
class Augment:
    """augmentation of each training image"""

    scale_min: float = option(
        float, 0.08, "random-resized-crop: smallest share of the area", 0.001, 1
    )
    scale_max: float = option(
        float, 1.0, "random-resized-crop: largest share of the area", 0.001, 1
    )
    hflip: float = option(float, 0.5, "probability of a horizontal flip", 0, 1)
    repeats: int = option(
        int, 1, "repeated augmentation: copies of an image in an epoch, in different groups", 1, 64
    )
    rand_augment: str = option(
        str, "", "timm's spec, such as rand-m7-mstd0.5-inc1; 3a; torchvision's ta_wide; empty: none"
    )
    color_jitter: float = option(
        float,
        0.0,
        "strength of brightness, contrast and saturation jitter, after rand_augment",
        0,
        10,
    )
    interpolation: str = option(
        str,
        "random",
        "of the crop and of geometric ops; random: one of both each time, as timm",
        choices=("random", "bilinear", "bicubic"),
    )
    erase_prob: float = option(float, 0.0, "random erasing: probability for an image", 0, 1)
    erase_mode: str = option(
        str,
        "const",
        "random erasing: fill with 0, one random colour, or random pixels",
        choices=("const", "rand", "pixel"),
    )
    erase_min: float = option(float, 0.02, "random erasing: smallest share of the area", 0, 1)
    erase_max: float = option(float, 1 / 3, "random erasing: largest share of the area", 0, 1)


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """mixup and cutmix"""

    mixup: float = option(float, 0.0, "alpha of mixup's Beta(alpha, alpha); 0: off", 0, 100)
    cutmix: float = option(float, 0.0, "alpha of cutmix's Beta(alpha, alpha); 0: off", 0, 100)
    prob: float = option(float, 1.0, "probability of mixing at all", 0, 1)
    switch_prob: float = option(float, 0.5, "probability of cutmix where both are on", 0, 1)
    mode: str = option(
        str,
        "batch",
        "what shares a draw: batch (training.batch_size images), pair (an image and its partner) "
        "or "
        "elem (each its own)",
        choices=("batch", "pair", "elem"),
    )
    off_epochs: int = option(int, 0, "the last epochs that train without mixing", 0)


@dataclass(frozen=True, kw_only=True)
class Lr:
    """learning rate, set for each step"""

    lr: float = option(float, 0.5, "peak learning rate", 0)
    lr_schedule_type: str = option(
        str,
        "cyclic",
        "cosine: after the warm-up; cosine_spanning: timm's, over all epochs; "
        "polynomial and constant: after the warm-up; cyclic and step: ffcv-imagenet's",
        choices=("cosine", "cosine_spanning", "polynomial", "constant", "cyclic", "step"),
    )
    warmup_epochs: float = option(
        float, 0.0, "epochs of linear warm-up (not of cyclic and step)", 0
    )
    warmup_lr: float = option(float, 0.0, "learning rate of the first step of the warm-up", 0)
    min_lr: float = option(float, 0.0, "learning rate at the end of the cosine or polynomial", 0)
    power: float = option(float, 1.0, "polynomial: exponent", 0.01, 10)
    lr_peak_epoch: int = option(int, 2, "cyclic: epoch of the peak", 0)
    step_ratio: float = option(float, 0.1, "step: factor", 0)
    step_length: int = option(int, 30, "step: epochs between two factors", 1)


@dataclass(frozen=True, kw_only=True)
class Training:
    """the optimizer's side of training"""

    epochs: int = option(int, 30, "epochs in all", 1)
    batch_size: int = option(
        int, 512, "images a process takes at once: also the mix and batch-norm group", 2
    )
    global_batch: int = option(
        int,
        0,
        "images an optimizer step takes, by accumulation where the processes take fewer; "
        "0: batch_size x processes",
        0,
    )
    optimizer: str = option(
        str, "sgd", "sgd, lamb, adamw or any optimizer of timm, by its name there"
    )
    momentum: float = option(float, 0.9, "of sgd and other momentum optimizers", 0, 1)
    weight_decay: float = option(float, 4e-5, "on weights of two or more dimensions only", 0)
    loss: str = option(
        str,
        "auto",
        "auto: bce on unsmoothed soft targets while mixing, else cross-entropy with "
        "label_smoothing; bce and ce: always, smoothed",
        choices=("auto", "bce", "ce"),
    )
    label_smoothing: float = option(
        float, 0.1, "share of the target spread over all classes", 0, 0.999
    )
    bce_threshold: float = option(
        float, 0.0, "bce: targets above it become 1, others 0; 0: soft targets", 0, 1
    )
    bce_sum: bool = flag(False, "bce: sum over classes instead of mean")
    grad_clip: float = option(
        float, 0.0, "largest norm of all gradients together; 0: no clip (lamb clips at 1 itself)", 0
    )
    use_blurpool: bool = flag(False, "blur before strided convolutions, as ffcv-imagenet")
    seed: int = option(int, 0, "of every random number", 0, 2**63 - 1)
    eval_only: bool = flag(False, "evaluate the newest checkpoint of logging.folder and end")
    distributed: bool = flag(False, "start dist.world_size processes here (torchrun needs no flag)")


@dataclass(frozen=True, kw_only=True)
class Ema:
    """exponential moving average of weights and batch-norm statistics, evaluated beside the raw
    weights"""

    decay: float = option(float, 0.0, "share the average keeps at each step; 0: no average", 0, 1)
    warmup: bool = flag(False, "decay of step s at most 1 - (1 + s) ** -power")
    warmup_power: float = option(float, 2 / 3, "power of the warm-up", 0.01, 1)
    per_images: int = option(
        int, 0, "decay is for so many images, whatever the batch; 0: for a step", 0
    )
    buffers: str = option(
        str, "lerp", "batch-norm statistics: averaged too, or copied", choices=("lerp", "copy")
    )


@dataclass(frozen=True, kw_only=True)
class Swa:
    """equal average of the weights after each of the last epochs, its batch-norm statistics
    estimated anew at the end"""

    epochs: int = option(int, 0, "last epochs that are averaged; 0: no average", 0)
    lr: float = option(
        float, 0.0, "learning rate of these epochs; not above what the schedule has reached", 0
    )
    anneal_epochs: float = option(
        float, 1.0, "epochs in which the learning rate goes down to it", 0
    )
    bn_steps: int = option(
        int,
        0,
        "steps' worth of training images that the statistics are estimated from; 0: an epoch",
        0,
    )


@dataclass(frozen=True, kw_only=True)
class Validation:
    """evaluation after each epoch"""

    batch_size: int = option(int, 512, "images a process takes at once", 1)
    resolution: int = option(int, 224, "pixels a side", 8, 4096)
    crop_ratio: float = option(
        float, 224 / 256, "side of the central crop over the shorter side", 0.01, 1
    )
    interpolation: str = option(
        str, "bicubic", "of resizing, as timm evaluates", choices=("bilinear", "bicubic")
    )
    lr_tta: bool = flag(True, "add the outputs for the mirrored image")
    labels: str = option(
        str,
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
        str,
        "auto",
        "auto: continue the newest checkpoint of logging.folder where there is one; "
        "never: refuse a folder that has one",
        choices=("auto", "never"),
    )
    keep: int = option(int, 2, "how many of the newest stay; the best one stays besides", 1, 1000)
    every_steps: int = option(
        int,
        0,
        "after each step that is a multiple of it, besides the one at each epoch's end; 0: none",
        0,
    )
    every_minutes: float = option(float, 10.0, "minutes after the last one, besides; 0: none", 0)
    warm_start: str = option(
        str, "", "checkpoint or state_dict that a new run takes its weights from, and nothing else"
    )
    warm_start_from: str = option(
        str, "model", "which weights of that checkpoint", choices=("model", "ema", "swa")
    )


@dataclass(frozen=True, kw_only=True)
class Health:
    """what is done when a run goes wrong: off, warn (a line, kept in the log), or act"""

    non_finite: str = option(
        str,
        "stop",
        "a loss or weight that is infinite or no number: stop the run; act: go back to the "
        "last regular checkpoint (epoch's end or every_steps) and leave out that step and the one "
        "before",
        choices=("off", "warn", "stop", "act"),
    )
    loss_rise: str = option(
        str,
        "warn",
        "the loss is more than `rise` above its recent median; act: go back to the last "
        "regular checkpoint and halve the learning rate",
        choices=("off", "warn", "act"),
    )
    rise: float = option(float, 0.1, "loss_rise: share", 0.001, 100)
    chance: str = option(
        str,
        "warn",
        "top-1 after epoch chance_epoch is what guessing gives; act: stop the run",
        choices=("off", "warn", "act"),
    )
    chance_epoch: int = option(int, 5, "chance: the epoch, counted from 1", 1)
    average: str = option(
        str,
        "warn",
        "the EMA's top-1 is more than `gap` below the model's, and what it began from has less "
        "than "
        "1 % of it; act: the EMA starts again from the model",
        choices=("off", "warn", "act"),
    )
    gap: float = option(float, 10.0, "average: points of top-1", 0, 100)


@dataclass(frozen=True, kw_only=True)
class Logging:
    """what a run leaves behind"""

    folder: str = option(
        str, REQUIRED, "where checkpoints, metrics.jsonl, config.json and curves go"
    )
    log_level: int = option(int, 1, "0: evaluate after the last epoch only; 1: after each", 0, 1)


@dataclass(frozen=True, kw_only=True)
class Dist:
    """the processes of a job; world_size, address and port are for those that
    training.distributed=1 starts"""

    world_size: int = option(int, 1, "number of processes, one a GPU", 1, 4096)
    address: str = option(str, "localhost", "of the process group")
    port: int = option(int, 12355, "of the process group", 1, 65535)
    timeout_s: float = option(
        float,
        120.0,
        "seconds without a sign of life of a process after which the others end with status 3",
        1,
        86400,
    )


@dataclass(frozen=True, kw_only=True)
class Compute:
    """hardware"""

    device: str = option(
        str,
        "auto",
        "auto: cuda where there is one; an NVIDIA device that torch cannot use is an error",
        choices=("auto", "cpu", "cuda"),
    )
    precision: str = option(
        str,
        "auto",
        "auto: fp16 on cuda; on the CPU bf16 where it is native, else fp32",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    compile: str = option(
        str, "auto", "torch.compile; auto: on cuda only", choices=("auto", "0", "1")
    )
    channels_last: bool = flag(True, "memory layout of weights and images")
    threads: int = option(
        int,
        0,
        "CPU threads of the model in each process; 0: OMP_NUM_THREADS, else the cores shared "
        "among processes",
        0,
        1024,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything train_imagenet.py can be told; one field a section."""

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


@dataclass(frozen=True, kw_only=True)
class _Source:
    """where images come from and how they are stored"""

    dataset: str = option(
        str,
        "imagenet",
        "what data_dir holds. imagenet: <split>/<class>/<image>, as folders or in a tar; "
        "imagenet_archives: the official tars and devkit; kaggle: the CLS-LOC layout; webdataset, "
        "parquet: shards; "
        "datasets: a name on the Hugging Face hub; csv, callable: path,label lists; cifar: "
        "cifar10; the others by "
        "their layout",
        choices=(
            "imagenet",
            "imagenet_archives",
            "kaggle",
            "webdataset",
            "parquet",
            "datasets",
            "csv",
            "callable",
            "tiny_imagenet",
            "cifar",
            "cifar10",
            "cifar100",
            "imagenette",
            "demo",
        ),
    )
    split: str = option(str, "", "train or val; empty: both", choices=("", "train", "val"))
    data_dir: str = option(
        str,
        REQUIRED,
        "folder of the images, a file or pattern of shards ({split}, {000..147}, {a,b}, *), or any "
        "fsspec URL (cifar, imagenette and demo are put there)",
    )
    write_mode: str = option(
        str,
        "jpg",
        "jpg, raw, smart (jpg where raw exceeds smart_threshold) or proportion",
        choices=("jpg", "raw", "smart", "proportion"),
    )
    max_resolution: int = option(
        int, 0, "longer side in pixels that larger images are shrunk to; 0: keep", 0, 65535
    )
    pass_through: bool = flag(
        True, "JPEGs that need no change keep their bytes; 0: encode all anew"
    )
    num_workers: int = option(int, 16, "threads that read and encode", 1, 1024)
    chunk_size: int = option(int, 100, "images that may be encoded ahead of the writing", 1, 100000)
    jpeg_quality: int = option(int, 90, "of images that are encoded (chroma 4:2:0)", 1, 100)
    subset: int = option(int, -1, "first images of each split to use; -1: all", -1)
    compress_probability: float = option(
        float, 0.5, "proportion: share of images stored as JPEG", 0, 1
    )
    smart_threshold: int = option(
        int, 3 * 256 * 256, "smart: largest image stored raw, in bytes", 0
    )
    max_pixels: int = option(
        int, 100_000_000, "pictures with more pixels are refused before they are decoded", 1, 2**28
    )
    follow_links: bool = flag(False, "read symbolic links that leave data_dir")
    class_names: str = option(
        str, "", "text file of the classes' names, one a line, where the source has numbers only"
    )
    callable: str = option(
        str,
        "",
        "dataset=callable: module:function, which takes a split and gives (path, label) pairs",
    )
    image_column: str = option(
        str, "", "parquet, datasets: column of the images; empty: image, or the only one that fits"
    )
    label_column: str = option(
        str, "", "parquet, datasets: column of the labels; empty: label, or the only one that fits"
    )


@dataclass(frozen=True, kw_only=True)
class Write(_Source):
    """writing .beton files"""

    write_path: str = option(
        str, REQUIRED, "the .beton file, or a folder for train.beton and val.beton"
    )
    on_error: str = option(
        str,
        "fail",
        "a picture that cannot be used: end, or skip: leave it out, and name it in the report",
        choices=("fail", "skip"),
    )
    max_skipped: float = option(
        float, 0.01, "skip: end where more than this share is left out", 0, 1
    )
    report: str = option(
        str,
        "",
        "skip: CSV file of path, class and reason (of two splits: with .train and .val before its "
        "suffix); "
        "empty: <file>.skipped.csv",
    )


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """write: labelled images into .beton files"""

    cfg: Write


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """estimate: what write would take, in bytes and time, from a sample of the images"""

    cfg: _Source


_PATH = "the .beton file"
_WORKERS = option(int, 16, "threads", 1, 1024)


@dataclass(frozen=True, kw_only=True)
class Info:
    """what a file holds"""

    path: str = option(str, REQUIRED, _PATH)


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """info: samples, classes, sizes, modes, settings and bytes of a file"""

    cfg: Info


@dataclass(frozen=True, kw_only=True)
class Verify:
    """whether a file is sound"""

    path: str = option(str, REQUIRED, _PATH)
    decode: float = option(
        float, 1.0, "share of the images that are decoded; checksums are compared of all", 0, 1
    )
    num_workers: int = _WORKERS
    report: str = option(str, "", "CSV file of sample, path and reason; empty: none")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """verify: structure, every checksum, decoding; exit status 1 where something is damaged"""

    cfg: Verify


@dataclass(frozen=True, kw_only=True)
class Show:
    """a contact sheet"""

    path: str = option(str, REQUIRED, _PATH)
    write_path: str = option(str, REQUIRED, "the PNG file")
    samples: str = option(
        str, "", "numbers and ranges of samples, such as 0-7,200; empty: some, spread evenly"
    )
    classes: str = option(
        str, "", "classes by name or number, separated by commas: their first samples"
    )
    count: int = option(
        int, 16, "how many are shown, of each class where classes are given", 1, 1000
    )
    recipe: str = option(
        str,
        "",
        "YAML file of a training recipe: beside each image, what its augmentation makes of it",
    )
    epochs: int = option(int, 5, "recipe: in so many epochs", 1, 100)


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """show: a contact sheet of images, as stored and as a recipe augments them"""

    cfg: Show


@dataclass(frozen=True, kw_only=True)
class Merge:
    """one file of several"""

    paths: str = option(str, REQUIRED, ".beton files, separated by commas")
    write_path: str = option(str, REQUIRED, "the new .beton file")
    num_workers: int = _WORKERS


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """merge: all samples of some files into a new one, classes brought together by name (and stock
    FFCV's files into sound ones)"""

    cfg: Merge


@dataclass(frozen=True, kw_only=True)
class Subset:
    """some samples of a file"""

    path: str = option(str, REQUIRED, _PATH)
    write_path: str = option(str, REQUIRED, "the new .beton file")
    classes: str = option(
        str,
        "",
        "classes by name or number, separated by commas; they are numbered anew. Empty: all",
    )
    samples: str = option(str, "", "numbers and ranges of samples, such as 0-99,200; empty: all")
    per_class: int = option(int, 0, "the first so many of each class; 0: all", 0)
    num_workers: int = _WORKERS


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """subset: chosen classes or samples into a new file"""

    cfg: Subset


@dataclass(frozen=True, kw_only=True)
class Shard:
    """a file in parts"""

    path: str = option(str, REQUIRED, _PATH)
    write_path: str = option(str, REQUIRED, "folder for the parts, <name>-00000-of-00008.beton")
    shards: int = option(int, REQUIRED, "how many", 1, 100000)
    num_workers: int = _WORKERS


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """shard: a file into several of consecutive samples"""

    cfg: Shard


@dataclass(frozen=True, kw_only=True)
class Concat:
    """files behind a file"""

    path: str = option(str, REQUIRED, "the .beton file to append to")
    paths: str = option(str, REQUIRED, ".beton files, separated by commas")
    num_workers: int = _WORKERS


@dataclass(frozen=True, kw_only=True)
class ConcatConfig:
    """concat: append files to a file, in place, without writing again what is there"""

    cfg: Concat


@dataclass(frozen=True, kw_only=True)
class Export:
    """images as files again"""

    path: str = option(str, REQUIRED, _PATH)
    write_path: str = option(str, REQUIRED, "new folder, for <class>/<image>")
    num_workers: int = _WORKERS


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """export: a file's images into class folders, byte for byte as they are stored"""

    cfg: Export


# The first word of write_ffcv.py's command line -> what it can be told
WRITE_COMMANDS: dict[str, type[Any]] = {
    (kind.__doc__ or "").partition(":")[0]: kind
    for kind in (
        WriteConfig,
        EstimateConfig,
        InfoConfig,
        VerifyConfig,
        ShowConfig,
        MergeConfig,
        SubsetConfig,
        ShardConfig,
        ConcatConfig,
        ExportConfig,
    )
}


IGNORED = {"training.bn_wd"}  # in ffcv-imagenet's published files, read by nothing there either


def read_config(
    program: type[Program], description: str | None, arguments: Sequence[str] | None = None
) -> Program:
    """The `program` dataclass (TrainConfig, one of WRITE_COMMANDS) from the command line; see
    `options.read_options`.

    Raises InputError for an option that is unknown, mistyped, out of range, missing, or at odds
    with another.
    """
    config = read_options(program, description, arguments, IGNORED)
    if isinstance(config, TrainConfig):
        _check_together(config)
    return config


def _check_together(c: TrainConfig) -> None:
    """What no option can be checked for by itself."""
    for name in ("train_dataset", "val_dataset"):
        path = getattr(c.data, name)
        if not os.path.isfile(path):
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
