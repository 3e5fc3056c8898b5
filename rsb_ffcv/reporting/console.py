"""Console output of a run: messages, progress bars, and the closing table."""

import statistics
import sys
from pathlib import Path

from tqdm import tqdm

from rsb_ffcv import duration, warn
from rsb_ffcv.reporting.log import table


class Console:
    """Prints on one process of a job only. enabled: whether this process is that one."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def info(self, text: str) -> None:
        """Prints a line on stdout."""
        if self.enabled:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Prints a one-line warning on stderr."""
        if self.enabled:
            warn(text)

    def bar(self, title: str, total: int, done: int = 0) -> tqdm:
        """Returns a progress bar of `total` steps, `done` of them done, on stderr."""
        return tqdm(
            total=total,
            initial=done,
            desc=title,
            disable=not self.enabled,
            leave=False,
            file=sys.stderr,
            mininterval=0.5,
        )

    def epoch(self, row: dict, epochs: int) -> None:
        """Prints a line about a finished epoch. row: of the log. epochs: of the run."""
        self.info(epoch_line(row, epochs))

    def closing_table(
        self, rows: list[dict], best: dict, prefixes: list[str], *, folder: Path
    ) -> None:
        """Prints the table at the end of a run.

        rows: of the log.
        best: top-1 in per cent, and epoch.
        prefixes: of the results of each set of weights in the rows; "" for the raw weights.
        folder: of the run.
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
        ]
        self.info(table(lines))


def epoch_line(row: dict, epochs: int) -> str:
    """The main figures of a finished epoch, and the time left if the others take as long.

    row: of the log.
    epochs: of the run.
    """
    done, seconds = row["epoch"] + 1, row["seconds"] + row.get("val_seconds", 0.0)
    parts = []
    if row["train_loss"] is not None:  # all steps of the epoch may have been left out
        parts.append(f"loss {row['train_loss']:.3f}")
    if "top1" in row:
        averages = [
            f"{name} {row[key]:.1f} %"
            for name, key in (("EMA", "ema_top1"), ("SWA", "swa_top1"))
            if key in row
        ]
        parts.append(
            f"top-1 {row['top1']:.1f} %" + (f" ({', '.join(averages)})" if averages else "")
        )
    parts.append(f"{seconds:.1f} s" if seconds < 60 else duration(seconds))
    if done < epochs:
        parts.append(f"about {duration(seconds * (epochs - done))} left")
    return f"epoch {done}/{epochs}: {', '.join(parts)}"
