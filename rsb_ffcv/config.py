"""Flags and YAML files -> one frozen dataclass a program. The only reader of either.

Every option is declared once, as a field of a section below, with its default, meaning, unit and range; fastargs gets
its sections, its `--help` and its flags from there. fastargs by itself ignores what it does not know and turns
`bool("0")` into True; here every key and value of a file or a flag is checked before anything else happens, and the
first wrong one ends the program with its name, value, place and the nearest valid name.

Sections and names of libffcv/ffcv-imagenet keep their names, meaning and defaults.
"""
import difflib
import math
import os
import sys
from argparse import ArgumentParser
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import yaml
from fastargs import Param, Section
from fastargs.config import Config
from fastargs.validation import Checker

from rsb_ffcv import InputError

REQUIRED = object()


class _Value(Checker):
    """A fastargs checker that reads one option: type, range and choices."""

    def __init__(self, kind, low, high, choices, needed=False):
        self.kind, self.low, self.high, self.choices, self.needed = kind, low, high, choices, needed

    def check(self, value):
        if self.kind is bool:
            text = str(value).lower()
            if text not in ("0", "1", "true", "false"):
                raise ValueError(self.help())
            value = text in ("1", "true")
        elif self.kind is str:
            if isinstance(value, bool):
                value = int(value)  # YAML reads on and off as these
            if not isinstance(value, (str, int)) or self.needed and not str(value):
                raise ValueError(self.help())
            value = str(value)
        else:
            value = self._number(value)
            if value < self.low or value > self.high:
                raise ValueError(self.help())
        if self.choices and value not in self.choices:
            raise ValueError(self.help())
        return value

    def _number(self, value):
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(self.help())
        if self.kind is int and isinstance(value, (int, str)):
            try:
                return int(value)
            except ValueError:
                pass  # a text such as 1e3, read below
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or self.kind is int and not number.is_integer():
            raise ValueError(self.help())
        return int(number) if self.kind is int else number

    def help(self):
        if self.choices:
            return "one of " + ", ".join(str(choice) for choice in self.choices)
        if self.kind is bool:
            return "0 or 1"
        if self.kind is str:
            return "text, not empty" if self.needed else "text"
        name = "whole number" if self.kind is int else "number"
        low, high = (f"{x:g}" if abs(x) < 2 ** 31 else str(x) if math.isfinite(x) else None for x in (self.low, self.high))
        return (f"{name} from {low} to {high}" if low and high else f"{name}, {low} or more" if low
                else f"{name}, at most {high}" if high else name)


def option(kind, default, text, low=-math.inf, high=math.inf, choices=()):
    """One option. text: meaning and unit, shown by --help."""
    extra = {} if default is REQUIRED else {"default": default}
    return field(metadata={"checker": _Value(kind, low, high, choices, default is REQUIRED), "text": text}, **extra)


def flag(default, text):
    return option(bool, default, text)


@dataclass(frozen=True, kw_only=True)
class Model:
    """the network"""
    arch: str = option(str, "resnet50", "a model of timm, by its name there")
    pretrained: bool = flag(False, "start from timm's published weights (downloaded)")
    num_classes: int = option(int, 0, "outputs; 0: as many as the training file has classes", 0)
    drop_path: float = option(float, 0.0, "stochastic depth: probability of dropping the last block", 0, 0.99)
    zero_init_last: bool = flag(True, "gamma of each block's last batch norm starts at 0")


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """resolution of the training images, in pixels a side"""
    min_res: int = option(int, 160, "up to epoch start_ramp", 8, 4096)
    max_res: int = option(int, 160, "from epoch end_ramp on; in between, interpolated to multiples of 32", 8, 4096)
    start_ramp: int = option(int, 0, "last epoch (counted from 0) at min_res", 0)
    end_ramp: int = option(int, 0, "first epoch (counted from 0) at max_res", 0)


@dataclass(frozen=True, kw_only=True)
class Data:
    """files and how they are read"""
    train_dataset: str = option(str, REQUIRED, ".beton file to train on")
    val_dataset: str = option(str, REQUIRED, ".beton file to evaluate on")
    num_workers: int = option(int, REQUIRED, "loader threads of each process", 1, 1024)
    in_memory: bool = option(bool, REQUIRED, "read the files into the page cache before training, if they fit")


@dataclass(frozen=True, kw_only=True)
class Augment:
    """augmentation of each training image"""
    scale_min: float = option(float, 0.08, "random-resized-crop: smallest share of the area", 0.001, 1)
    scale_max: float = option(float, 1.0, "random-resized-crop: largest share of the area", 0.001, 1)
    hflip: float = option(float, 0.5, "probability of a horizontal flip", 0, 1)
    rand_augment: str = option(str, "", "timm's spec, such as rand-m7-mstd0.5-inc1; empty: none")
    interpolation: str = option(str, "random", "of RandAugment's geometric ops",
                                choices=("random", "bilinear", "bicubic"))
    erase_prob: float = option(float, 0.0, "random erasing: probability for an image", 0, 1)
    erase_mode: str = option(str, "const", "random erasing: fill with 0, one random colour, or random pixels",
                             choices=("const", "rand", "pixel"))
    erase_min: float = option(float, 0.02, "random erasing: smallest share of the area", 0, 1)
    erase_max: float = option(float, 1 / 3, "random erasing: largest share of the area", 0, 1)


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """mixup and cutmix, one draw for each training.batch_size images"""
    mixup: float = option(float, 0.0, "alpha of mixup's Beta(alpha, alpha); 0: off", 0, 100)
    cutmix: float = option(float, 0.0, "alpha of cutmix's Beta(alpha, alpha); 0: off", 0, 100)
    prob: float = option(float, 1.0, "probability of mixing at all", 0, 1)
    switch_prob: float = option(float, 0.5, "probability of cutmix where both are on", 0, 1)
    off_epochs: int = option(int, 0, "the last epochs that train without mixing", 0)


@dataclass(frozen=True, kw_only=True)
class Lr:
    """learning rate, set for each step"""
    lr: float = option(float, 0.5, "peak learning rate", 0)
    lr_schedule_type: str = option(str, "cyclic", "cosine: after the warm-up; cosine_spanning: timm's, over all epochs; "
                                   "cyclic and step: ffcv-imagenet's; constant: after the warm-up",
                                   choices=("cosine", "cosine_spanning", "cyclic", "step", "constant"))
    warmup_epochs: float = option(float, 0.0, "epochs of linear warm-up (cosine, cosine_spanning, constant)", 0)
    warmup_lr: float = option(float, 0.0, "learning rate of the first step of the warm-up", 0)
    min_lr: float = option(float, 0.0, "learning rate at the end of the cosine", 0)
    lr_peak_epoch: int = option(int, 2, "cyclic: epoch of the peak", 0)
    step_ratio: float = option(float, 0.1, "step: factor", 0)
    step_length: int = option(int, 30, "step: epochs between two factors", 1)


@dataclass(frozen=True, kw_only=True)
class Training:
    """the optimizer's side of training"""
    epochs: int = option(int, 30, "epochs in all", 1)
    batch_size: int = option(int, 512, "images a process takes at once: also the mix and batch-norm group", 1)
    global_batch: int = option(int, 0, "images an optimizer step takes, by accumulation where the processes take fewer; "
                               "0: batch_size x processes", 0)
    optimizer: str = option(str, "sgd", "sgd, lamb, adamw or any optimizer of timm, by its name there")
    momentum: float = option(float, 0.9, "of sgd and other momentum optimizers", 0, 1)
    weight_decay: float = option(float, 4e-5, "on weights of two or more dimensions only", 0)
    loss: str = option(str, "auto", "auto: bce on unsmoothed soft targets while mixing, else cross-entropy with "
                       "label_smoothing; bce and ce: always, smoothed", choices=("auto", "bce", "ce"))
    label_smoothing: float = option(float, 0.1, "share of the target spread over all classes", 0, 0.999)
    bce_threshold: float = option(float, 0.0, "bce: targets above it become 1, others 0; 0: soft targets", 0, 1)
    bce_sum: bool = flag(False, "bce: sum over classes instead of mean")
    grad_clip: float = option(float, 0.0, "largest norm of all gradients together; 0: no clip (lamb clips at 1 itself)", 0)
    use_blurpool: bool = flag(False, "blur before strided convolutions, as ffcv-imagenet")
    seed: int = option(int, 0, "of every random number", 0, 2 ** 63 - 1)
    eval_only: bool = flag(False, "evaluate the newest checkpoint of logging.folder and end")
    distributed: bool = flag(False, "start dist.world_size processes here (torchrun needs no flag)")


@dataclass(frozen=True, kw_only=True)
class Ema:
    """exponential moving average of weights and batch-norm statistics, evaluated beside the raw weights"""
    decay: float = option(float, 0.0, "share the average keeps at each step; 0: no average", 0, 1)
    warmup: bool = flag(False, "decay of step s at most 1 - (1 + s) ** -power")
    warmup_power: float = option(float, 2 / 3, "power of the warm-up", 0.01, 1)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """evaluation after each epoch"""
    batch_size: int = option(int, 512, "images a process takes at once", 1)
    resolution: int = option(int, 224, "pixels a side", 8, 4096)
    crop_ratio: float = option(float, 224 / 256, "side of the central crop over the shorter side", 0.01, 1)
    lr_tta: bool = flag(True, "add the outputs for the mirrored image")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """checkpoints, in logging.folder"""
    resume: str = option(str, "auto", "auto: continue the newest checkpoint of logging.folder where there is one; "
                         "never: refuse a folder that has one", choices=("auto", "never"))


@dataclass(frozen=True, kw_only=True)
class Logging:
    """what a run leaves behind"""
    folder: str = option(str, REQUIRED, "where checkpoints, metrics.jsonl, config.json and curves go")
    log_level: int = option(int, 1, "0: evaluate after the last epoch only; 1: after each", 0, 1)


@dataclass(frozen=True, kw_only=True)
class Dist:
    """processes started by training.distributed=1"""
    world_size: int = option(int, 1, "number of processes, one a GPU", 1, 4096)
    address: str = option(str, "localhost", "of the process group")
    port: str = option(str, "12355", "of the process group")


@dataclass(frozen=True, kw_only=True)
class Compute:
    """hardware"""
    device: str = option(str, "auto", "auto: cuda where there is one", choices=("auto", "cpu", "cuda"))
    precision: str = option(str, "auto", "auto: fp16 on cuda; on the CPU bf16 where it is native, else fp32",
                            choices=("auto", "fp32", "fp16", "bf16"))
    compile: str = option(str, "auto", "torch.compile; auto: on cuda only", choices=("auto", "0", "1"))
    channels_last: bool = flag(True, "memory layout of weights and images")
    threads: int = option(int, 0, "CPU threads of the model in each process; 0: OMP_NUM_THREADS, else the cores shared "
                         "among processes", 0, 1024)


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
    validation: Validation
    checkpoint: Checkpoint
    logging: Logging
    dist: Dist
    compute: Compute


@dataclass(frozen=True, kw_only=True)
class Write:
    """writing .beton files"""
    dataset: str = option(str, "imagenet", "imagenet: folders <split>/<class>/<image>; cifar: cifar10; the others by their layout",
                          choices=("imagenet", "tiny_imagenet", "cifar", "cifar10", "cifar100", "imagenette", "demo"))
    split: str = option(str, "", "train or val; empty: both", choices=("", "train", "val"))
    data_dir: str = option(str, REQUIRED, "folder of the images (cifar, imagenette and demo are put there)")
    write_path: str = option(str, REQUIRED, "the .beton file, or a folder for train.beton and val.beton")
    write_mode: str = option(str, "jpg", "jpg, raw, smart (jpg where raw exceeds smart_threshold) or proportion",
                             choices=("jpg", "raw", "smart", "proportion"))
    max_resolution: int = option(int, 0, "longer side in pixels that larger images are shrunk to; 0: keep", 0, 65535)
    num_workers: int = option(int, 16, "threads that read and encode", 1, 1024)
    chunk_size: int = option(int, 100, "images that may be encoded ahead of the writing", 1, 100000)
    jpeg_quality: int = option(int, 90, "of images stored as JPEG", 1, 100)
    subset: int = option(int, -1, "first images of each split to use; -1: all", -1)
    compress_probability: float = option(float, 0.5, "proportion: share of images stored as JPEG", 0, 1)
    smart_threshold: int = option(int, 3 * 256 * 256, "smart: largest image stored raw, in bytes", 0)


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """Everything write_ffcv.py can be told."""
    cfg: Write


def read_config(program: type, description: str, arguments=None):
    """The `program` dataclass (TrainConfig, WriteConfig) from the command line.

    Flags are `--section.name=value`; `--config-file FILE` reads YAML, may be repeated, and later files and flags win.
    Raises InputError for anything unknown, mistyped, out of range or missing.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sections = {section.name: section.type for section in fields(program)}
    config = Config()
    for name, section in sections.items():
        Section(name, section.__doc__, config).params(**{
            item.name: Param(item.metadata["checker"], item.metadata["text"],
                             default=None if item.default is MISSING else _shown(item.default),
                             required=item.default is MISSING) for item in fields(section)})
    parser = _Parser(description=description, allow_abbrev=False)
    _check_flags(arguments, sections)
    # fastargs would read the files named in sys.argv and the variables of the environment, without a check
    saved, sys.argv = (sys.argv, dict(os.environ)), sys.argv[:1]
    os.environ.clear()
    try:
        config.augment_argparse(parser)
    finally:
        sys.argv = saved[0]
        os.environ.update(saved[1])
    parser.epilog = _options_text(sections)  # fastargs' own is drawn for a VT100 and speaks of environment variables
    given = parser.parse_args(arguments)

    values = {name: {} for name in sections}
    for path in given.config_file:
        for name, key, value in _read_yaml(path):
            _set(values, sections, name, key, value, f"in {path}")
    for flag_name, value in vars(given).items():
        if flag_name != "config_file" and value is not None:
            _set(values, sections, *flag_name.split(".", 1), value, "on the command line")
    for name, section in sections.items():
        for item in fields(section):
            if item.default is MISSING and item.name not in values[name]:
                raise InputError(f"{name}.{item.name} is missing ({item.metadata['text']}); give --{name}.{item.name}=... "
                                 f"or set it in the file of --config-file")
    config = program(**{name: section(**values[name]) for name, section in sections.items()})
    if program is TrainConfig:
        _check_together(config)
    return config


def _check_together(c: TrainConfig):
    """What no option can be checked for by itself."""
    for name in ("train_dataset", "val_dataset"):
        path = getattr(c.data, name)
        if not os.path.isfile(path):
            raise InputError(f"data.{name}={path}: no such file; write it with write_ffcv.py or correct the path")
    for low, high in (("augment.scale_min", "augment.scale_max"), ("augment.erase_min", "augment.erase_max"),
                      ("resolution.min_res", "resolution.max_res"), ("resolution.start_ramp", "resolution.end_ramp"),
                      ("lr.warmup_epochs", "training.epochs"), ("mix.off_epochs", "training.epochs")):
        below, above = (getattr(getattr(c, name.split(".")[0]), name.split(".")[1]) for name in (low, high))
        if below > above:
            raise InputError(f"{low}={below} is larger than {high}={above}; change one of them")
    if (c.mix.mixup or c.mix.cutmix) and c.training.batch_size % 2:
        raise InputError(f"training.batch_size={c.training.batch_size} is odd, and mixup pairs images; make it even")


def as_dict(config) -> dict:
    """{section: {option: value}} of a config: plain values, ready for JSON."""
    return {section.name: {item.name: getattr(getattr(config, section.name), item.name)
                           for item in fields(section.type)} for section in fields(config)}


class _Parser(ArgumentParser):
    def error(self, message):
        raise InputError(f"command line: {message}; options are --section.name=value, see --help")


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which by itself keeps the last of two equal keys without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = [key for key in keys if keys.count(key) > 1]
        if repeated:
            raise yaml.constructor.ConstructorError(problem=f"'{repeated[0]}' stands there twice",
                                                    problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _options_text(sections):
    lines = ["Options, as --section.name=value or in the YAML file as 'section:' and below it '  name: value':"]
    for name, section in sections.items():
        lines += ["", f"{name}: {section.__doc__}"]
        for item in fields(section):
            default = "required" if item.default is MISSING else f"default {_shown(item.default)}"
            lines.append(f"  --{name}.{item.name}  [{default}; {item.metadata['checker'].help()}]\n"
                         f"        {item.metadata['text']}")
    return "\n".join(lines)


def _shown(default):
    if isinstance(default, float):
        return f"{default:.6g}"
    return int(default) if isinstance(default, bool) else "empty" if default == "" else default


def _check_flags(arguments, sections):
    """argparse would say "unrecognized arguments"; this names the nearest flag."""
    for argument in arguments:
        name, _, value = argument[2:].partition("=")
        if argument.startswith("--") and name not in ("config-file", "help"):
            section, _, key = name.partition(".")
            _find(sections, section, key, f"(value {value!r}) on the command line")


def _read_yaml(path):
    """(section, key, value) of each line of a recipe."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise InputError(f"--config-file={path}: cannot be read ({error.strerror}); recipes are in rsb_configs/") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config-file={path}: not a recipe in YAML ({' '.join(str(error).split())[:160]}); correct it") from error
    if not isinstance(content, dict):
        raise InputError(f"--config-file={path}: holds no sections; write 'section:' and below it '  key: value'")
    for name, section in content.items():
        if not isinstance(section, dict):
            raise InputError(f"--config-file={path}: section '{name}' must hold 'key: value' lines, holds {section!r}")
        for key, value in section.items():
            yield str(name), str(key), value


def _find(sections, name, key, where):
    """The field behind `name.key`, or InputError with the nearest valid name."""
    known = {f"{section_name}.{item.name}": item for section_name, section in sections.items()
             for item in fields(section)}
    if f"{name}.{key}" not in known:
        given = f"{name}.{key}" if key else name
        near = ([full for full in known if full.split(".")[1] in (key, given)]
                or difflib.get_close_matches(given, [*known, "config-file", "help"], 1, 0.5))
        hint = f"did you mean {near[0]}?" if near else f"sections are {', '.join(sections)}"
        raise InputError(f"{given} {where} is not an option; {hint}")
    return known[f"{name}.{key}"]


def _set(values, sections, name, key, value, where):
    item = _find(sections, name, key, f"(value {value!r}) {where}")
    try:
        values[name][key] = item.metadata["checker"].check(value)
    except ValueError as error:
        raise InputError(f"{name}.{key}={value!r} {where}: must be {item.metadata['checker'].help()}") from error
