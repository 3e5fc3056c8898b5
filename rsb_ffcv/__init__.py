"""rsb_ffcv: training of ImageNet-scale image classifiers from `.beton` files, with the
ResNet-Strikes-Back recipes.

Data flows in one direction: raw images -> `dataset` -> .beton -> `ops` -> `loading` -> `learning`
-> `training` -> `reporting`. `beton` defines the file format, which `dataset` writes and `loading`
reads. `config` declares the programs' options. `commands` implements the commands of the two
programs.

The public API is `__all__`. Each name is imported on first use, so that `import rsb_ffcv` alone
imports nothing slow.
"""

import importlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsb_ffcv.beton import Beton, read_beton
    from rsb_ffcv.dataset import Encoding, Place, write_splits
    from rsb_ffcv.learning.average import Ema, Swa
    from rsb_ffcv.learning.lamb import Lamb
    from rsb_ffcv.learning.loss import Loss
    from rsb_ffcv.learning.schedule import Schedule
    from rsb_ffcv.loading import Batch, EvalLoader, TrainLoader
    from rsb_ffcv.loading.batch import BatchTransform, normalize
    from rsb_ffcv.ops.operation import Address, DrawnOperation

__version__ = "0.1.0"

__all__ = [
    "Address",
    "Batch",
    "BatchTransform",
    "Beton",
    "DrawnOperation",
    "Ema",
    "Encoding",
    "EvalLoader",
    "InputError",
    "Lamb",
    "Loss",
    "Place",
    "Schedule",
    "Swa",
    "TrainLoader",
    "normalize",
    "read_beton",
    "write_splits",
]
_HOME = {
    "rsb_ffcv.beton": ("Beton", "read_beton"),
    "rsb_ffcv.dataset": ("Encoding", "Place", "write_splits"),
    "rsb_ffcv.learning.average": ("Ema", "Swa"),
    "rsb_ffcv.learning.lamb": ("Lamb",),
    "rsb_ffcv.learning.loss": ("Loss",),
    "rsb_ffcv.learning.schedule": ("Schedule",),
    "rsb_ffcv.loading": ("Batch", "EvalLoader", "TrainLoader"),
    "rsb_ffcv.loading.batch": ("BatchTransform", "normalize"),
    "rsb_ffcv.ops.operation": ("Address", "DrawnOperation"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'rsb_ffcv' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Without a result for this time, a thread is considered stuck. No image takes nearly this long: it
# is a disk or network that does not respond, or a defect.
STALL_SECONDS = 300.0


class InputError(ValueError):
    """A user input is invalid. The message is one line: the input, its value, and the
    fix. A library function names its own parameters, as `name`; see `option_names`.

    Programs print the message without a traceback and exit with status 2. Every other exception is
    a bug in the program and keeps its traceback.
    """


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises InputError if `value`, of the parameter `name`, is not one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise InputError(f"`{name}`={value!r}: must be one of {', '.join(choices)}")


@contextmanager
def option_names(names: Mapping[str, str]) -> Iterator[None]:
    """A context for calls of library functions, which do not know the program's options. In the
    message of an InputError, it replaces each `parameter` by the option that its value came from.

    names: parameter -> option.
    """
    try:
        yield
    except InputError as error:
        message = re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[0]), str(error))
        raise InputError(message) from error.__cause__


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 160 characters; its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def counted(count: int, noun: str, plural: str = "") -> str:
    """The number and the noun, for messages: "1 image", "2 images", "2 classes". plural: if it is
    not the noun with an s."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """A readable duration: less than 1 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 1:
        return "less than 1 s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{rest} s"
        if not minutes
        else f"{minutes} min {rest} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60} min"
    )


# Called with each warning as well. The log of a run adds itself here.
warning_listeners: list[Callable[[str], None]] = []


def warn(text: str) -> None:
    """Prints a one-line warning on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
    for listener in warning_listeners:
        listener(text)


def exit_status(program: Callable[..., int | None], *arguments: object) -> int:
    """Runs `program(*arguments)` and returns the exit status.

    It is the program's return value, or 0 for None; 2 after an InputError, whose message goes to
    stderr; 130 if the user interrupts it; 141 if the reader of its output closed the pipe
    (`| head`).
    """
    from tqdm import tqdm  # here, because not every library user needs it

    # tqdm's default lock also works across processes. From Python 3.14 on, creating it starts a
    # process, which prints errors when this one is killed.
    tqdm.set_lock(threading.RLock())
    try:
        return program(*arguments) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
