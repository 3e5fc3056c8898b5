"""Console output of a run: messages, progress, and the closing table; and its copy with times of
day, `training.log`.

In a terminal, progress is a bar on stderr. Elsewhere (a file, a pipe, a job's output) it is a line
on stderr whenever nothing was printed for a minute.
"""

import os
import statistics
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Protocol

from tqdm import tqdm

from rsb_ffcv import InputError, duration, first_line, warn, warning_listeners
from rsb_ffcv.atomic import append
from rsb_ffcv.reporting.log import REPORT, table

LOG = "training.log"
# The slowest process is named from this difference on: GPUs of one kind differ by a few per cent
SLOWER_PERCENT = 5.0
QUIET_SECONDS = 60.0  # without a terminal: longest time without a line about the progress


def has_terminal() -> bool:
    """Whether stderr is a terminal of known size; tqdm shows nothing in one of unknown size."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines > 0


class Bar(Protocol):
    """The progress of some steps. A context manager."""

    def update(self, n: float = 1) -> object:
        """Call after `n` more steps."""

    def set_postfix(self, ordered_dict: dict[str, str]) -> None:
        """Sets the figures to show, by name."""

    def __enter__(self) -> "Bar": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...


class Console:
    """Prints on one process of a job only. Use it as a context manager: it notes the error that
    ends the run in the log.

    enabled: whether this process is that one.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._log: Path | None = None
        self._early = ""  # what the log lacks: lines from before `log_to`
        self._lock = threading.RLock()  # threads warn; a warning about the log is a line for it
        self._failed = False
        self.printed_at = time.monotonic()

    def __enter__(self) -> "Console":
        if self.enabled:
            warning_listeners.append(self._note_warning)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if not self.enabled:
            return
        warning_listeners.remove(self._note_warning)
        if isinstance(error, InputError):
            self._note(f"error: {error}")
        elif kind is KeyboardInterrupt:
            self._note("interrupted")
        elif (
            error is not None and kind is not SystemExit
        ):  # after a signal, a line has been printed
            self._note(f"error: {type(error).__name__}: {first_line(error)}")

    def log_to(self, folder: Path) -> None:
        """Adds what was printed so far and from here on to `training.log` in `folder`. A log that
        cannot be written is one warning."""
        if self.enabled:
            self._log = folder / LOG
            self._append("")

    def info(self, text: str) -> None:
        """Prints lines on stdout."""
        if self.enabled:
            with tqdm.external_write_mode(sys.stdout):
                print(text, flush=True)
            self._note(text)

    def warn(self, text: str) -> None:
        """Prints a one-line warning on stderr."""
        if self.enabled:
            with tqdm.external_write_mode(sys.stderr):
                warn(text)

    def progress(self, text: str) -> None:
        """Prints a line about the progress on stderr."""
        if self.enabled:
            print(text, file=sys.stderr, flush=True)
            self._note(text)

    def bar(self, title: str, total: int, done: int = 0) -> Bar:
        """Returns the progress of `total` steps, `done` of them done."""
        if not has_terminal():
            return _Lines(self, title, total=total, done=done)
        return tqdm(
            total=total,
            initial=done,
            desc=title,
            disable=not self.enabled,
            leave=False,
            file=sys.stderr,
            mininterval=0.5,
            dynamic_ncols=True,
        )

    def _note_warning(self, text: str) -> None:
        self._note(f"warning: {text}")

    def _note(self, text: str) -> None:
        """Adds lines to the log."""
        self.printed_at = time.monotonic()
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._append("".join(f"{now} {line}\n" for line in text.splitlines()))

    def _append(self, text: str) -> None:
        with self._lock:
            self._early += text
            if self._log is not None:
                self._write(self._log)

    def _write(self, path: Path) -> None:
        try:
            # Opened for each line: lines are rare, and the file may be moved or its disk return
            append(path, self._early.encode("utf-8", "backslashreplace"))
            self._early = ""
        except OSError as error:
            if not self._failed:
                self._failed = True
                self.warn(f"{path}: cannot be written ({error.strerror}); the run continues")

    def epoch(self, row: dict, epochs: int, best: dict) -> None:
        """Prints a line about a finished epoch; see epoch_line."""
        self.info(epoch_line(row, epochs, best))

    def closing_table(
        self, rows: list[dict], best: dict, prefixes: list[str], *, folder: Path, report: bool
    ) -> None:
        """Prints the table at the end of a run.

        rows: of the log.
        best: top-1 in per cent, and epoch.
        prefixes: of the results of each set of weights in the rows; "" for the raw weights.
        folder: of the run.
        report: whether it has a report.
        """
        last = rows[-1]
        lines = [
            (
                f"top-1 (top-5), {prefix.removesuffix('_').upper() or 'raw'} weights",
                f"{last[prefix + 'top1']:.2f} % ({last[prefix + 'top5']:.2f} %)",
            )
            for prefix in prefixes
        ]
        wait = 100 * sum(row["data_wait_s"] for row in rows) / sum(row["seconds"] for row in rows)
        lines += [
            ("best top-1", f"{best['top1']:.2f} % after epoch {best['epoch'] + 1}"),
            ("validation images", str(last["val_images"])),
            (
                "training images/s, median",
                f"{statistics.median(row['images_per_s'] for row in rows):.0f}",
            ),
            ("waiting for data", f"{wait:.1f} % of training time"),
            ("weights, metrics, curves", f"{folder}/"),
            *([("report", str(folder / REPORT))] if report else []),
        ]
        self.info(table(lines))


class _Lines:
    """The progress as lines on the console, for a stderr that is no terminal."""

    def __init__(self, console: Console, title: str, *, total: int, done: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._first, self._done, self._figures = done, float(done), ""
        self._started = time.monotonic()

    def update(self, n: float = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._console.printed_at < QUIET_SECONDS:
            return
        seconds = (now - self._started) * (self._total - self._done) / (self._done - self._first)
        self._console.progress(
            f"{self._title}: {self._done:.0f}/{self._total} "
            f"({100 * self._done / self._total:.0f} %){self._figures}, about {duration(seconds)} "
            f"left"
        )

    def set_postfix(self, ordered_dict: dict[str, str]) -> None:
        self._figures = "".join(f", {name}={value}" for name, value in ordered_dict.items())

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def epoch_line(row: dict, epochs: int, best: dict) -> str:
    """The figures of a finished epoch in one line.

    row: of the log.
    epochs: of the run.
    best: top-1 in per cent, and epoch, of the best epoch so far.
    """
    done = row["epoch"] + 1
    parts = []
    if row["train_loss"] is not None:  # all steps of the epoch may have been left out
        parts.append(f"loss {row['train_loss']:.3g}")
    names = {"train": "train_top1", "val": "top1", "EMA": "ema_top1", "SWA": "swa_top1"}
    top1 = [f"{name} {row[key]:.1f}" for name, key in names.items() if row.get(key) is not None]
    if row.get("train_top1") is not None and "top1" in row:
        top1.append(f"gap {row['train_top1'] - row['top1']:.1f}")
    if best["epoch"] >= 0:
        top1.append(f"best {best['top1']:.1f} ({best['epoch'] + 1})")
    if top1:
        parts.append(f"top-1 {' '.join(top1)}")
    speed = f"{row['images_per_s']:.0f} img/s"
    if "images_per_s_with_val" in row:
        speed += f" ({row['images_per_s_with_val']:.0f} with val)"
    parts += [
        f"lr {row['lr']:.3g}",
        speed,
        f"wait {100 * row['data_wait_s'] / row['seconds']:.1f} %",
        f"{row['peak_memory_mb'] / 1024:.1f} GiB",
    ]
    if done < epochs:
        parts.append(f"{duration(row['eta_s'])} left")
    return f"epoch {done}/{epochs}: {', '.join(parts)}{_slowest(row)}"


def _slowest(row: dict) -> str:
    """The process that the others of the job wait for, if it is so slow that it is worth a look."""
    found = row.get("slowest")
    if found is None or found["percent_above_median"] < SLOWER_PERCENT:
        return ""
    ms = found["own_step_ms"]
    return (
        f"; slowest: process {found['process']} ({found['host']}), "
        f"{f'{ms:.0f}' if ms >= 10 else f'{ms:.2g}'} ms a step, "
        f"{found['percent_above_median']:.0f} % above the median"
    )
