"""A run's state on disk: written whole or not at all, and refused where it belongs to another run."""
import io
from pathlib import Path

import torch

from rsb_ffcv import InputError, first_line
from rsb_ffcv.atomic import atomic_file

NAME = "checkpoint.pt"
KEYS = {"recipe", "next_epoch", "best", "model", "optimizer", "scaler", "ema"}


def save(state: dict, path: Path):
    """Writes `state` with torch.save: a reader sees the old file or the new one, never a part."""
    serialized = io.BytesIO()  # torch reports a full disk as a RuntimeError; a plain write says what it is
    torch.save(state, serialized)
    with atomic_file(path, "free space or choose another logging.folder; what was there before is intact") as file:
        file.write(serialized.getbuffer())


def load(folder: Path) -> dict | None:
    """The checkpoint of `folder` on the CPU, or None where it has none. Reads tensors and plain values only."""
    path = folder / NAME
    if not path.exists():
        return None
    mend = "remove it to start anew or choose another logging.folder"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch's reader raise nearly any kind
        raise InputError(f"{path}: not a readable checkpoint ({first_line(error)}); {mend}") from error
    if not isinstance(state, dict) or not KEYS <= state.keys():
        raise InputError(f"{path}: not a checkpoint of this program; {mend}")
    return state


def check_recipe(saved: dict, current: dict, folder: Path):
    """Raises InputError naming the options that differ between the run in `folder` and this one."""
    differing = sorted(f"{section}.{key}: {saved.get(section, {}).get(key)} there, {value} now"
                       for section, options in current.items() for key, value in options.items()
                       if saved.get(section, {}).get(key) != value)
    if differing:
        raise InputError(f"{folder} holds a run of another recipe ({'; '.join(differing)}); use its options or another "
                         f"logging.folder")
