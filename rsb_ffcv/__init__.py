"""rsb_ffcv: ImageNet-scale image classifiers from `.beton` files, with the ResNet-Strikes-Back
recipes.

Data runs one way: raw images -> `dataset` -> .beton -> `ops` -> `loading` -> `learning` ->
`training` -> `reporting`. `beton` holds the file format, which `dataset` writes and `loading`
reads; `config` declares the programs' options; `commands` has what the two programs do.

For code of your own, this module offers the names of `__all__`. Each is imported when it is first
used: `import rsb_ffcv` alone imports nothing slow.
"""

import importlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
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


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: the thing, its value, and
    the fix. A function names its own parameters, as `name`; see `option_names`.

    Programs print it without a traceback and exit with status 2; every other exception is a defect
    and keeps its traceback.
    """


@contextmanager
def option_names(names: Mapping[str, str]) -> Iterator[None]:
    """Around calls of functions that do not know the program's options: in the message of an
    InputError each `parameter` becomes the option that its value came from.

    names: parameter -> option.
    """
    try:
        yield
    except InputError as error:
        told = re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[0]), str(error))
        raise InputError(told) from error.__cause__


def first_line(error: BaseException) -> str:
    """An exception's own words on one line, for a message that people read."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def warn(text: str) -> None:
    """One line on stderr about something that the run can do without."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def exit_status(program: Callable[..., int | None], *arguments: object) -> int:
    """Runs `program(*arguments)`: what it returns, 0 for nothing; 2 and one line on stderr where it
    raises InputError, 130 where the user interrupts it, 141 where nobody reads its output any more
    (`| head`)."""
    from tqdm import tqdm  # here: a library user may not need it

    # tqdm's own lock is for processes too. From Python 3.14 on that starts a process, which
    # complains when this one is killed.
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
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the interpreter flushes it once more
        return 141
