"""Checkpoints of a run on disk: the newest few and the best one. Writes are atomic, and each file
is checked before it is loaded.

A checkpoint is one torch.save file, `checkpoint_<step>.pt`. Its ZIP container holds a CRC-32 of
every record. torch writes these checksums but does not read them; `weights.read` verifies all of
them before it loads the file. `best.pt` is a second name (a hard link) of the best checkpoint. A
background thread writes a copy of the state while training continues.
"""

import io
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from rsb_ffcv import InputError, warn
from rsb_ffcv.atomic import atomic_file, flush_folder, link, lock, remove, rename
from rsb_ffcv.learning.weights import read
from rsb_ffcv.reporting.console import LOG
from rsb_ffcv.reporting.curves import CURVES
from rsb_ffcv.reporting.log import ENVIRONMENT, METRICS
from rsb_ffcv.reporting.trackers import EVENTS, RUN_ID
from rsb_ffcv.training import facts, lease

FIX = "free space or choose another logging.folder"
SHOWN = 5  # number of differences between recipes that a message lists
NAME, PATTERN, BEST = "checkpoint_{:09d}.pt", f"checkpoint_{'[0-9]' * 9}.pt", "best.pt"
BEST_WEIGHTS = "best_weights.pt"
BESTS = {BEST, BEST_WEIGHTS}
APPENDED = (LOG, EVENTS)  # what a run appends to, as patterns
EARLIER_LOCK = ".lock"  # a process of an earlier version locks this file
# What earlier versions of this program wrote as `.<name>.part` in the run's folder, as patterns
WRITTEN = (
    PATTERN,
    BEST,
    BEST_WEIGHTS,
    METRICS,
    "config.json",
    ENVIRONMENT,
    CURVES,
    RUN_ID,
    "final_weights.pt",
    "final_weights_*.pt",
)
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


class AllDamaged(InputError):
    """A folder has checkpoints, `paths`, and none of them can be read."""

    def __init__(self, text: str, paths: list[Path]) -> None:
        super().__init__(text)
        self.paths = paths


def on_host(state: Any) -> Any:
    """A deep copy of nested dicts, lists and tuples, with all tensors copied to the CPU.

    torch.save then writes the same bytes for equal states: pickle writes a string again that is
    another object of the same value.
    """
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if type(state) is str:
        return sys.intern(state)
    if isinstance(state, dict):
        return {on_host(key): on_host(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(on_host(value) for value in state)
    return state


def write(state: object, path: Path) -> None:
    """Saves `state` to `path` with torch.save, atomically, and flushes it to disk. Raises
    InputError if the file cannot be written."""
    # torch.save reports a full disk as a RuntimeError; a plain write raises the precise OSError.
    serialized = io.BytesIO()
    torch.save(state, serialized)
    with atomic_file(path, FIX) as file:
        file.write(serialized.getbuffer())


def records(path: Path) -> int | None:
    """A checksum of the names, sizes and CRC-32 of a checkpoint's records: two files with the same
    one have the same content, unless a record is damaged. None if there is no such file. Reads the
    file's end only."""
    try:
        with zipfile.ZipFile(path) as file:
            listed = [(item.filename, item.file_size, item.CRC) for item in file.infolist()]
    # zipfile raises nearly any exception for a damaged file.
    except Exception:
        return None
    return zlib.crc32(repr(listed).encode())


class Store:
    """The checkpoints of one folder. Call `lock` before the first `save`.

    machine: names the machine in warnings, if the job writes to several.

    keep: number of newest checkpoints to keep.
    regular: whether a step has a regular checkpoint. The newest regular checkpoint is kept too, so
        that the checkpoint that a run goes back to does not depend on when it was interrupted.
    archived: whether a step's checkpoint is kept for good.
    timeout_s: a process that has locked the folder and is silent for this time counts as lost.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        *,
        regular: Callable[[int], bool] = lambda step: True,
        archived: Callable[[int], bool] = lambda step: False,
        timeout_s: float = 120.0,
    ) -> None:
        self.folder, self.keep, self.regular, self.archived = folder, keep, regular, archived
        self.machine, self.timeout_s = "", timeout_s
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._lease: lease.Lease | None = None

    def lock(self) -> None:
        """Creates the folder and locks it, until `close` or the end of the process. Two runs in one
        folder would overwrite each other's checkpoints. See `lease`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            earlier = self.folder / EARLIER_LOCK
            if earlier.exists():
                with open(earlier, "r+b") as file:
                    lock(file, self.folder)
            self._lease = lease.take(self.folder, self.timeout_s, APPENDED)
            # Left behind by a process that was killed while writing. Other programs use
            # `.<name>.part` as well: a conversion may be unfinished in this folder.
            for name in [EARLIER_LOCK, *(f".{name}.part" for name in WRITTEN)]:
                for left in self.folder.glob(name):
                    remove(left)
        except BlockingIOError as error:
            who = f" ({error})" if isinstance(error, lease.InUse) and str(error) else ""
            raise InputError(
                f"logging.folder={self.folder}: another process is training in this folder{who}; "
                f"wait for it, end it, or choose another folder"
            ) from None
        except OSError as error:
            raise InputError(
                f"logging.folder={self.folder}: cannot be used ({error.strerror}); choose another"
            ) from error

    def newest(self, regular: bool = False) -> tuple[Path, dict] | None:
        """Returns the path and the content of the newest intact checkpoint, None if there is no
        checkpoint at all.

        A damaged checkpoint is skipped with a warning. If the folder is locked, it is also renamed,
        so that it is not tried again. Raises AllDamaged, or InputError if the newest intact one is
        not of this program.

        regular: consider regular checkpoints only.
        """
        paths = [path for path in self.paths() if not regular or self.regular(step_of(path))]
        fix = "remove the damaged files to start from scratch, or choose another logging.folder"
        for number, path in enumerate(paths):
            fallback = (
                "falling back to the checkpoint before it"
                if number + 1 < len(paths)
                else "no other checkpoint is left in this folder"
            )
            try:
                state = read(path, fallback)
            except InputError as error:
                self.warn(str(error))
                continue
            if not isinstance(state, dict) or not state.keys() >= KEYS:
                raise InputError(f"{path}: not a checkpoint of this program; {fix}")
            self.set_aside(paths[:number])
            return path, state
        if paths:
            raise AllDamaged(
                f"{self.folder}: none of its {len(paths)} checkpoints can be read; {fix}", paths
            )
        return None

    def set_aside(self, damaged: list[Path]) -> None:
        """Renames damaged checkpoints, if the folder is locked, so that they are not tried
        again. If that fails, the run continues with a warning."""
        for path in damaged if self._lease is not None else ():
            try:
                rename(path, path.with_suffix(".damaged"))
            except OSError as error:
                self.warn(f"{path}: cannot be renamed to .damaged ({error.strerror})")

    def warn(self, text: str) -> None:
        warn(f"{self.machine}: {text}" if self.machine else text)

    def save(self, state: dict, best: bool, best_weights: dict | None = None) -> None:
        """Starts to write a copy of `state` in the background.

        best: give it the second name `best.pt` as well.
        best_weights: the content of `best_weights.pt`, if that changes. It is written first: if the
            process is killed in between, the epoch is repeated, and writes the same again.

        A failed write is reported as a warning by `finish`. The run continues, and the earlier
        checkpoints stay intact.
        """
        self.finish()
        self._pending = self._writer.submit(
            self._write, on_host(state), best, on_host(best_weights)
        )

    def finish(self) -> bool:
        """Waits for the last `save`. Returns False if it failed."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except InputError as error:
            self.warn(
                f"the checkpoint was not written: {error}; earlier checkpoints are intact, and the "
                f"run continues"
            )
            return False
        return True

    def close(self) -> None:
        """Waits for the last `save`, and releases the lock."""
        self.finish()
        self._writer.shutdown()
        if self._lease is not None:
            self._lease.close()

    def mark_best(self, path: Path) -> None:
        """Gives the checkpoint at `path` the second name `best.pt`."""
        best = self.folder / BEST
        try:
            if best.exists() and best.samefile(path):
                return
        except OSError as error:
            raise InputError(f"{best}: cannot be written ({error.strerror}); {FIX}") from error
        link(path, best, FIX)

    def remove_after(self, step: int) -> bool:
        """Removes the checkpoints of steps after `step`, the newest first, so that no later start
        resumes from one of them.

        Returns whether `best.pt` was among them. Raises InputError if a file cannot be removed.
        """
        self.finish()
        later = [path for path in self.paths() if step_of(path) > step]
        best = self.folder / BEST
        for path in (best, self.folder / BEST_WEIGHTS):
            # Another one is ignored: nothing resumes from it.
            found = _step_inside(path)
            if found is not None and found > step:
                later.append(path)
        self.remove(later)
        return best in later

    def remove(self, paths: Iterable[Path]) -> None:
        """Removes files of steps that the run has gone back from. Raises InputError if that
        fails."""
        try:
            for path in paths:
                remove(path)
        except OSError as error:
            raise InputError(
                f"{self.folder}: the checkpoints that the run has gone back from cannot be removed "
                f"({error.strerror}); correct the permissions and start again"
            ) from error
        flush_folder(self.folder)

    def paths(self) -> list[Path]:
        """All checkpoints, the newest first."""
        return sorted(self.folder.glob(PATTERN), reverse=True)

    def contents(self, best_step: int) -> dict[str, int]:
        """The files with their `records`: all checkpoints, and `best.pt` and `best_weights.pt` if
        they are intact and of `best_step`."""
        found = {path.name: records(path) for path in self.paths()}
        for name in BESTS:
            if _step_inside(self.folder / name) == best_step:
                found[name] = records(self.folder / name)
        return {name: made for name, made in found.items() if made is not None}

    def put(self, name: str, content: io.BytesIO) -> None:
        """Writes a file that another process has sent. Raises InputError if it is damaged, or
        cannot be written."""
        path = self.folder / name
        read(path, "start the job again", content=content)
        with atomic_file(path, FIX) as file:
            file.write(content.getbuffer())

    def _write(self, state: dict, best: bool, best_weights: dict | None) -> None:
        if best_weights is not None:
            write(best_weights, self.folder / BEST_WEIGHTS)
        path = self.folder / NAME.format(state["step"])
        write(state, path)
        if best:
            self.mark_best(path)
        existing = sorted(old for old in self.folder.glob(PATTERN) if old <= path)
        keep = {
            path,
            *existing[-self.keep :],
            *[old for old in existing if self.regular(step_of(old))][-1:],
        }
        for old in existing:
            if old not in keep and not self.archived(step_of(old)):
                try:
                    remove(old)
                except OSError as error:
                    self.warn(f"{old}: cannot be removed ({error.strerror})")


def step_of(path: Path) -> int:
    """The step of a checkpoint's name."""
    return int(path.stem.rpartition("_")[2])


def _step_inside(path: Path) -> int | None:
    """The step in the content of a file; None if it is missing, damaged, or not of this program."""
    try:
        content = read(path)
    except InputError:
        return None
    step = content.get("step") if isinstance(content, dict) else None
    return step if isinstance(step, int) else None


def check_recipe(saved: dict, current: dict, folder: Path) -> None:
    """Raises InputError if the run in `folder` has another recipe. The message names the options
    that differ."""
    differing = [
        f"{option}: {facts.shown(old)} in the folder, {facts.shown(new)} now"
        for option, (old, new) in facts.changes(saved, current).items()
    ]
    if differing:
        more = len(differing) - SHOWN
        listed = "; ".join(differing[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise InputError(
            f"{folder} contains a run of another recipe ({listed}); use its options, or another "
            f"logging.folder with checkpoint.branch={folder} to continue it under this recipe, or "
            f"with checkpoint.warm_start to start from its weights"
        )
