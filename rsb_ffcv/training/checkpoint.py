"""A run's states on disk: the newest few and the best one, each whole or absent, checked before it
is used.

A checkpoint is one torch.save file, `checkpoint_<step>.pt`. Its ZIP container holds a CRC-32 of
every record, which torch writes and does not read; here every record is compared with it before the
file is loaded. `best.pt` is a second name (a hard link) of the checkpoint that was best. Writing
happens on a thread, from a copy, while training goes on.
"""

import io
import os
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from rsb_ffcv import InputError, first_line, warn
from rsb_ffcv.atomic import atomic_file, flush_folder, lock

MEND = "free space or choose another logging.folder"
NAME, PATTERN, BEST = "checkpoint_{:09d}.pt", f"checkpoint_{'[0-9]' * 9}.pt", "best.pt"
KEYS = {
    "recipe",
    "step",
    "rows",
    "best",
    "model",
    "optimizer",
    "scaler",
    "ema",
    "swa",
    "epoch",
    "health",
}


def on_host(state: Any) -> Any:
    """A copy of nested dicts, lists and tuples, its tensors on the CPU and nobody else's."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: on_host(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(on_host(value) for value in state)
    return state


def write(state: object, path: Path) -> None:
    """torch.save under `path`, flushed to disk, whole or not at all. Raises InputError where the
    system refuses."""
    serialized = (
        io.BytesIO()
    )  # torch reports a full disk as a RuntimeError; a plain write says what it is
    torch.save(state, serialized)
    with atomic_file(path, MEND) as file:
        file.write(serialized.getbuffer())


def read(path: Path) -> Any:
    """Tensors and plain values of a file that `torch.save` wrote, on the CPU. Raises InputError
    where a record does not have its checksum, or the file is none of torch's."""
    try:
        with zipfile.ZipFile(path) as records:
            damaged = records.testzip()
        if damaged:
            raise InputError(f"{path}: damaged (record {damaged} does not have its checksum)")
        return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or first_line(error)})"
        ) from error
    except (
        Exception
    ) as error:  # a damaged file makes zipfile, zlib and torch's reader raise nearly any kind
        raise InputError(
            f"{path}: not a readable checkpoint ({first_line(error)}; torch.save of today's torch "
            f"writes a zip "
            f"file)"
        ) from error


class Store:
    """The checkpoints of one folder. `lock` it before the first `save`.

    keep: how many of the newest stay. regular: whether a step is one that every run is saved at,
    whatever happens to it; the newest of these stays too, so that what a run goes back to does not
    depend on when it was interrupted.
    """

    def __init__(
        self, folder: Path, keep: int, regular: Callable[[int], bool] = lambda step: True
    ) -> None:
        self.folder, self.keep, self.regular = folder, keep, regular
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._lock: TextIO | None = None

    def lock(self) -> None:
        """Makes the folder and claims it: two runs in one folder would overwrite each other. Ends
        with the process."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Held while the process lives
            self._lock = open(self.folder / ".lock", "w")  # noqa: SIM115
            lock(self._lock, self.folder)
        except BlockingIOError:
            raise InputError(
                f"logging.folder={self.folder}: another process trains there; wait for it, end it, "
                f"or choose "
                f"another folder"
            ) from None
        except OSError as error:
            raise InputError(
                f"logging.folder={self.folder}: cannot be used ({error.strerror}); choose another"
            ) from error
        for unfinished in self.folder.glob(
            ".*.part"
        ):  # of a process that was killed while it wrote
            unfinished.unlink()

    def newest(self, regular: bool = False) -> tuple[Path, dict] | None:
        """The newest checkpoint (regular: of a regular step) that is whole, and its name; None
        where there is none at all. Damaged ones are passed over with a warning, and renamed where
        the folder is locked, so that they no longer count. Raises InputError where none is whole.
        """
        paths = [
            path
            for path in sorted(self.folder.glob(PATTERN), reverse=True)
            if not regular or self.regular(_step(path))
        ]
        mend = "remove the damaged files to start anew, or choose another logging.folder"
        for number, path in enumerate(paths):
            try:
                state = read(path)
            except InputError as error:
                warn(
                    f"{error}; "
                    + (
                        "falling back to the one before"
                        if number + 1 < len(paths)
                        else "none is left"
                    )
                )
                continue
            if not isinstance(state, dict) or not state.keys() >= KEYS:
                raise InputError(f"{path}: not a checkpoint of this program; {mend}")
            if self._lock is not None:
                for damaged in paths[:number]:
                    damaged.rename(damaged.with_suffix(".damaged"))
            return path, state
        if paths:
            raise InputError(
                f"{self.folder}: none of its {len(paths)} checkpoints can be read; {mend}"
            )
        return None

    def save(self, state: dict, best: bool) -> None:
        """Begins to write a copy of `state`; `best`: under the second name as well. What could not
        be written is a warning: the run goes on, and what was there before is intact."""
        self.finish()
        self._pending = self._writer.submit(self._write, on_host(state), best)

    def finish(self) -> bool:
        """Waits for the newest `save`; whether it is on disk."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except InputError as error:
            warn(
                f"no checkpoint was written: {error}; the ones before it are intact, the run goes "
                f"on"
            )
            return False
        return True

    def close(self) -> None:
        self.finish()
        self._writer.shutdown()
        if self._lock is not None:
            self._lock.close()

    def mark_best(self, path: Path) -> None:
        """Gives the checkpoint at `path` its second name."""
        temporary, best = self.folder / f".{BEST}.part", self.folder / BEST
        try:
            if best.exists() and best.samefile(path):
                return
            with suppress(FileNotFoundError):
                temporary.unlink()
            try:
                os.link(path, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, temporary)
            os.replace(temporary, best)
        except OSError as error:
            raise InputError(f"{best}: cannot be written ({error.strerror}); {MEND}") from error

    def give_up(self, step: int) -> bool:
        """Removes the states of steps after `step`, the newest first, so that no later start finds
        one of them. Returns whether the best was one. Raises InputError where one cannot be
        removed."""
        self.finish()
        later = [
            path for path in sorted(self.folder.glob(PATTERN), reverse=True) if _step(path) > step
        ]
        best = self.folder / BEST
        # None, or a damaged one, which nothing reads as a state of the run
        with suppress(InputError):
            if read(best)["step"] > step:
                later.append(best)
        try:
            for path in later:
                path.unlink()
        except OSError as error:
            raise InputError(
                f"{self.folder}: states of steps that the run has given up cannot be removed "
                f"({error.strerror}); "
                f"see to permissions, and start again"
            ) from error
        flush_folder(self.folder)
        return best in later

    def _write(self, state: dict, best: bool) -> None:
        path = self.folder / NAME.format(state["step"])
        write(state, path)
        if best:
            self.mark_best(path)
        there = sorted(old for old in self.folder.glob(PATTERN) if old <= path)
        keep = {
            path,
            *there[-self.keep :],
            *[old for old in there if self.regular(_step(old))][-1:],
        }
        for old in there:
            if old not in keep:
                try:
                    old.unlink()
                except OSError as error:
                    warn(f"{old}: cannot be removed ({error.strerror})")


def _step(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def check_recipe(saved: dict, current: dict, folder: Path) -> None:
    """Raises InputError naming the options that differ between the run in `folder` and this one."""
    differing = sorted(
        f"{section}.{key}: {saved.get(section, {}).get(key)} there, {value} now"
        for section, options in current.items()
        for key, value in options.items()
        if saved.get(section, {}).get(key) != value
    )
    if differing:
        raise InputError(
            f"{folder} holds a run of another recipe ({'; '.join(differing)}); use its options, "
            f"another "
            f"logging.folder, or checkpoint.warm_start to begin from its weights"
        )


def load_weights(model: torch.nn.Module, path: Path, which: str) -> None:
    """Puts weights into `model`: those of a checkpoint (`which`: "model", "ema" or "swa"), or a
    file that is a state_dict. Raises InputError where they are not there or do not fit."""
    state = read(path)
    if isinstance(state, dict) and state.keys() >= KEYS:
        average = state[which] or {}
        if which != "model" and not (average.get("updates") or average.get("finished")):
            raise InputError(
                f"checkpoint.warm_start_from={which}: {path} has no such weights, or not yet; use "
                f"model"
            )
        weights = average if which == "model" else average["module"]
    else:
        weights = state
    own = model.state_dict()
    if not isinstance(weights, dict) or not all(
        isinstance(value, torch.Tensor) for value in weights.values()
    ):
        raise InputError(
            f"checkpoint.warm_start={path}: holds no weights; give a checkpoint of this program or "
            f"a state_dict"
        )
    differing = [
        f"{name} {tuple(weights[name].shape) if name in weights else 'missing'}"
        for name in own
        if name not in weights or weights[name].shape != own[name].shape
    ] + sorted(weights.keys() - own.keys())
    if differing:
        raise InputError(
            f"checkpoint.warm_start={path}: is of another model ({len(differing)} tensors differ, "
            f"the first: "
            f"{differing[0]}); use its model.arch and number of classes"
        )
    model.load_state_dict(weights)
