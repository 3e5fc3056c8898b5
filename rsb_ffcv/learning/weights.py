"""Weights from a file: read, found among the file's content, and loaded into a model.

Tensors and plain values only are unpickled (`weights_only`). Names and shapes must fit exactly,
apart from a common prefix and, on request, the classifier head. Nothing is mapped by position or
resized.

Sources matched: the keys of timm 1.0.31 (`timm/models/_helpers.py`,
`timm/utils/checkpoint_saver.py`), DeiT and torchvision's references ("model", "model_ema"), and
Lightning ("state_dict").
"""

import argparse
import io
import pickle
import re
import shlex
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rsb_ffcv import InputError, check_choice, counted, first_line
from rsb_ffcv.learning.layers import head_prefixes

# In torch's message, the class or function that it refuses to load
REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed global")
ZIP = b"PK\x03\x04"
SAFETENSORS = ".safetensors"
FORMS = (
    "give a checkpoint of this program or a state_dict (of this program, timm, torchvision, "
    "ffcv-imagenet, Lightning; .safetensors too)"
)
# The sets of weights in files of others, the first key that is there
KEYS_OF = {"model": ("state_dict", "model"), "ema": ("state_dict_ema", "model_ema"), "swa": ()}
OURS = {"recipe", "model", "ema", "swa"}
WRAPPERS = {"module", "_orig_mod", "model"}  # DDP and DataParallel, torch.compile, Lightning
SHOWN = 3  # number of names that a message lists


def read(path: Path, fix: str = "use another file", *, content: io.BytesIO | None = None) -> Any:
    """Loads tensors and plain values from a torch.save file, on the CPU.

    content: of the file, if it is not on this machine.

    Raises InputError, whose message ends with `fix`, if the file cannot be read, or if a record
    does not match its checksum (files of torch before 1.6 have none). If the file contains other
    objects, the message has a command that converts it instead.
    """
    source = content or path
    try:
        if content:
            head = bytes(content.getbuffer()[: len(ZIP)])
        else:
            with open(path, "rb") as file:
                head = file.read(len(ZIP))
        if head == ZIP:
            with zipfile.ZipFile(source) as records:
                damaged = records.testzip()
            if damaged:
                raise InputError(
                    f"{path}: damaged (record {damaged} does not match its checksum); {fix}"
                )
        if content:
            content.seek(0)
        # timm's checkpoints contain their arguments
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(source, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or first_line(error)}); {fix}"
        ) from error
    # zipfile, zlib and torch's reader raise nearly any exception for a damaged file.
    except Exception as error:
        refused = isinstance(error, pickle.UnpicklingError) and REFUSED.search(str(error))
        raise InputError(
            f"{path}: contains Python objects ({refused[1]}), and loading them can run any code; "
            f"if you trust the file, convert it and give the result: {_conversion(path)}"
            if refused
            else f"{path}: not a readable checkpoint ({_reason(error)}); {fix}"
        ) from error


def _reason(error: Exception) -> str:
    """What is wrong, without torch's general advice before it."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2]
    return (text.strip().splitlines() or [type(error).__name__])[0][:160]


def _conversion(path: Path) -> str:
    """A shell command that writes the weights in a file, without its other objects, to
    `<path>.pt`."""
    keys = tuple(key for keys in KEYS_OF.values() for key in keys)
    code = (
        f"import torch; s = torch.load({str(path)!r}, weights_only=False); "
        f"s = s if isinstance(s, dict) else s.state_dict(); "
        f"torch.save({{k: s[k] for k in s if k in {keys}}} or s, {str(path) + '.pt'!r})"
    )
    return f"python -c {shlex.quote(code)}"


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _content(path: Path) -> Any:
    """The content of a safetensors or torch.save file."""
    try:
        return _read_either(path)
    except InputError as error:
        raise InputError(f"`path`={error}") from error.__cause__


def _read_either(path: Path) -> Any:
    if path.suffix != SAFETENSORS:
        return read(path, FORMS)
    from safetensors import SafetensorError  # timm's own dependency
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or first_line(error)}); {FORMS}"
        ) from error
    except SafetensorError as error:
        raise InputError(
            f"{path}: not a safetensors file ({first_line(error)}); {FORMS}"
        ) from error


def _chosen(content: Any, path: Path, which: str) -> Any:
    """One set of weights of a file's content: "model", "ema" or "swa"."""
    if isinstance(content, dict) and content.keys() >= OURS:
        average = content[which] or {}
        if which != "model" and not (average.get("updates") or average.get("finished")):
            raise InputError(
                f"`which`={which}: {path} does not contain such weights, or not yet; use model"
            )
        return average if which == "model" else average["module"]
    for key in KEYS_OF[which]:
        if isinstance(content, dict) and isinstance(content.get(key), Mapping):
            return content[key]
    if which != "model":
        raise InputError(
            f"`which`={which}: {path} is not a checkpoint with such weights; use model to start "
            f"from the weights in this file"
        )
    return content


def _prefix(weights: dict[str, torch.Tensor], own: dict[str, torch.Tensor], path: Path) -> str:
    """What precedes the model's names in the file's: "", "module.", "model._orig_mod.", ..."""
    first = next(iter(own))
    fitting = {
        prefix: sum(prefix + name in weights for name in own)
        for prefix in (name.removesuffix(first) for name in weights if name.endswith(first))
        if not prefix or prefix.endswith(".")
    }
    most = max(fitting.values(), default=0)
    if most < len(own) / 2:
        return ""  # another model
    best = [prefix for prefix in fitting if fitting[prefix] == most]
    if len(best) > 1:  # for example model. and ema_model.
        best = [prefix for prefix in best if {*prefix.split(".")[:-1]} <= WRAPPERS] or best
    if len(best) > 1:
        raise InputError(
            f"`path`={path}: has several models ({_listed(sorted(best))}); give a file with one of "
            f"them"
        )
    return best[0]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What `load_weights` did.

    path: of the file.
    count, total: tensors loaded, and tensors of the model.
    prefix: removed from the file's names.
    initial: names of the model's tensors that keep their initial values, without counters.
    counters: number of batch-norm counters that the file does not have.
    left_out: names in the file that were not loaded.
    """

    path: Path
    count: int
    total: int
    prefix: str
    initial: list[str]
    counters: int
    left_out: list[str]

    def __str__(self) -> str:
        """One line for the console."""
        parts = [f"the weights of {self.path}: {self.count} of {self.total} tensors"]
        if self.prefix:
            parts.append(f"prefix {self.prefix} removed")
        if self.initial:
            parts.append(f"left at their initialization: {_listed(self.initial)}")
        if self.counters:
            parts.append(f"{self.counters} num_batches_tracked are absent")
        if self.left_out:
            parts.append(f"not used: {_listed(self.left_out)}")
        return "; ".join(parts)


def model_of(path: Path) -> dict[str, Any]:
    """The model that a file of this program is of: "arch", "num_classes" and, in checkpoints,
    "blurpool"; empty for other files. Raises InputError if the file cannot be read."""
    content = _content(path)
    if isinstance(content, dict) and content.keys() >= OURS:
        recipe = content["recipe"]
        return {name: recipe["model"][name] for name in ("arch", "num_classes")} | {
            "blurpool": recipe["training"]["use_blurpool"]
        }
    if isinstance(content, dict) and {"arch", "num_classes", "weights"} <= content.keys():
        return {name: content[name] for name in ("arch", "num_classes")}
    return {}


def load_weights(
    model: nn.Module, path: Path, *, which: str = "model", head: str = "match"
) -> Loaded:
    """Loads weights into `model` from a file: a checkpoint of this program, a state_dict, or a dict
    that contains one, in torch.save's or the safetensors format.

    A prefix that all names of the model have in the file (`module.`, `_orig_mod.`, `model.`, also
    nested, or any other) is removed; tensors without it are not used. Batch-norm counters
    (`num_batches_tracked`) may be absent.

    path: of the file; `.safetensors` for that format.
    which: the weights to use if the file has several sets, "model", "ema" or "swa".
    head: "match": load the classifier head as well; "new": leave it at its initialization.

    Raises InputError if the file has no such weights, or if they do not fit the model. `model` is
    then unchanged.
    """
    check_choice("which", which, tuple(KEYS_OF))
    check_choice("head", head, ("match", "new"))
    content = _content(path)
    weights = _chosen(content, path, which)
    if (
        not isinstance(weights, Mapping)
        or not weights
        or not all(isinstance(value, torch.Tensor) for value in weights.values())
    ):
        raise InputError(f"`path`={path}: contains no weights; {FORMS}")
    weights, own = dict(weights), model.state_dict()
    prefix = _prefix(weights, own, path)
    in_head = head_prefixes(model, f"`head`={head}" if head == "new" else "")
    taken = {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }
    new = {name for name in {*own, *taken} if head == "new" and name.startswith(in_head)}
    counters = [name for name in own if name.endswith(".num_batches_tracked") and name not in taken]
    wanted = own.keys() - new - {*counters}
    differing = [name for name in own if name in wanted and not _fits(taken.get(name), own[name])]
    differing += sorted(taken.keys() - own.keys() - new)
    if differing:
        raise InputError(_misfit(path, differing, taken, in_head=in_head))
    model.load_state_dict({**own, **{name: taken[name] for name in own if name in wanted}})
    return Loaded(
        path=path,
        count=len(wanted),
        total=len(own),
        prefix=prefix,
        initial=[name for name in own if name in new],
        counters=len(counters),
        left_out=sorted(prefix + name for name in new & taken.keys())
        + sorted(name for name in weights if not name.startswith(prefix)),
    )


def _fits(value: torch.Tensor | None, own: torch.Tensor) -> bool:
    return (
        value is not None
        and value.shape == own.shape
        and value.is_floating_point() >= own.is_floating_point()  # no quantized weights
    )


def _misfit(
    path: Path,
    differing: list[str],
    taken: dict[str, torch.Tensor],
    *,
    in_head: tuple[str, ...],
) -> str:
    """The message for weights that do not fit: the first tensor of `differing` and the fix.

    path: of the file.
    differing: names of tensors in only one of the file and the model, or that do not fit.
    taken: the file's tensors under the model's names.
    in_head: what the names of the classifier head begin with.
    """
    first = differing[0]
    found = f"{first} {tuple(taken[first].shape) if first in taken else 'missing'}"
    if all(name.startswith(in_head) for name in differing):
        return (
            f"`path`={path}: its classifier head does not fit ({found}); use `head`=new to leave "
            f"the head at its initialization, or the number of classes of the file"
        )
    fix = "use its `arch` and number of classes"
    blurs = [name for name in differing if name.endswith(".blur_filter")]
    if blurs:
        fix = f"use `blurpool`={int(blurs[0] in taken)}"
    return (
        f"`path`={path}: is of another model ({counted(len(differing), 'tensor')} "
        f"differ{'s' if len(differing) == 1 else ''}, the first: {found}); {fix}"
    )
