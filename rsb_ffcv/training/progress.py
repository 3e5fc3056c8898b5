"""The progress of a run, and what each process has counted in the epoch in progress.

A process counts its own images. A checkpoint contains the counts of all processes. If another
number of processes resumes it, rank 0 takes over the sum of all counts.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from rsb_ffcv.loading.batch import WEIGHT_UNIT
from rsb_ffcv.reporting.log import best_of
from rsb_ffcv.training import compute
from rsb_ffcv.training.compute import Compute
from rsb_ffcv.training.plan import Epoch
from rsb_ffcv.training.step import Taken

NO_BEST = {"top1": -1.0, "epoch": -1, "step": -1, "weights": ""}
RECENT_EPOCHS = 5  # whose mean duration predicts that of the others
SYNC_EVERY = 20  # steps between two loss readings: each one synchronizes with the device


class Progress:
    """The progress of a run and the counts of the epoch in progress.

    step: number of optimizer steps done.
    rows: the log, one dict per finished epoch.
    best: top-1 in per cent, epoch and step of the best epoch so far, and the weights that reached
        it: "model", "ema" or "swa".
    lineage: the runs that this one continues, the oldest first, see `branch.take_over`.

    weight: mix groups of a step that this process takes, as a multiple of the mean over processes.
    """

    def __init__(self, where: Compute, weight: float) -> None:
        self._compute, self._weight = where, weight
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, Any] = dict(NO_BEST)
        self.lineage: list[dict[str, Any]] = []
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Resets the counts of the epoch."""
        device = self._compute.device
        # loss x images, correct, images
        self.totals = torch.zeros(3, device=device, dtype=torch.float64)
        self.window = torch.zeros(SYNC_EVERY, device=device, dtype=torch.float64)
        # the steps whose losses are in `window` and not read yet
        self.unread: list[int] = []
        self.seconds = self.waited = 0.0
        self.own_ms: list[float] = []  # see step.OwnTime; steps since the last start only
        self.counts = Counter[str]()  # see loading.batch.Drawn.counts
        self.lrs: list[float] = []  # learning rates of the first and the newest step
        self.skipped: list[tuple[int, str]] = []
        self.events: list[str] = []

    # ---------------------------------------------------------------- counting

    def add(self, taken: Taken, lr: float) -> None:
        """Adds the step in progress. lr: its learning rate."""
        sums = taken.sums
        self.totals += sums
        self.window[len(self.unread)] = sums[0] / sums[2] * self._weight
        self.unread.append(self.step)
        self.waited += taken.waited
        self.counts.update(taken.counts)
        self.lrs = [*self.lrs[:1], lr]

    def note(self, event: str) -> None:
        """Adds a message to the epoch's row of the log."""
        self.events = self.events + [event]

    def new_best(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Updates `best` from a validated epoch's `row`. Returns the previous best if this epoch is
        better, else None."""
        weights, top1 = best_of(row)
        previous_best = self.best
        if top1 <= previous_best["top1"]:
            return None
        self.best = {
            "top1": top1,
            "epoch": row["epoch"],
            "step": self.step,
            "weights": weights,
        }
        return previous_best

    @property
    def window_is_full(self) -> bool:
        return len(self.unread) == SYNC_EVERY

    def read_losses(self) -> tuple[list[int], list[float]]:
        """Returns the steps since the last reading and their losses, the mean over processes.
        Synchronizes with the device."""
        if not self.unread:
            return [], []
        losses = compute.mean_over_processes([self.window])[0][: len(self.unread)].tolist()
        steps, self.unread = self.unread, []
        return steps, losses

    def losses_are_finite(self) -> bool:
        """Whether the losses since the last reading are finite on all processes."""
        if not self.unread:
            return True
        window = self.window[: len(self.unread)]
        return bool(compute.sum_over_processes(window.sum()).isfinite())

    def summary(self, lr: float) -> dict[str, str]:
        """Figures for a progress bar: loss and top-1 of this process's part of the epoch so far,
        the learning rate, and img_s, images per second of all processes."""
        loss, correct, images = self.totals.tolist()
        img_s = images * self._compute.world_size / self._weight / max(self.seconds, 1e-9)
        return {
            "loss": f"{loss / max(images, 1):.4f}",
            "top1": f"{100 * correct / max(images, 1):.1f}%",
            "lr": f"{lr:.2e}",
            "img_s": f"{img_s:.0f}",
        }

    def pace(self, row: dict[str, Any], epochs: int) -> dict[str, float]:
        """The figures of an epoch that include its validation: images of training per second, if
        there was one, and the seconds left if the other epochs take as long as the last few.

        row: the epoch's.
        epochs: of the run.
        """

        def seconds(row: dict[str, Any]) -> float:
            return row["seconds"] + row.get("val_seconds", 0.0)

        recent = [seconds(item) for item in [*self.rows, row][-RECENT_EPOCHS:]]
        found = {"eta_s": statistics.fmean(recent) * (epochs - 1 - row["epoch"])}
        if "val_seconds" in row:
            images = row["images_per_s"] * row["seconds"]
            found["images_per_s_with_val"] = images / seconds(row)
        return found

    def row(self, epoch: Epoch, *, loss: str, lr: float) -> dict[str, Any]:
        """The log's figures of an epoch's training, over all processes.

        loss: "bce" or "ce".
        lr: learning rate of the last step, if no step was taken.
        """
        total, correct, images = compute.sum_over_processes(self.totals.clone()).tolist()
        own_ms = statistics.median(self.own_ms or [0.0])
        # One gather, which is two collectives on the CPU
        parts = compute.gather([(self.skipped, self.counts, own_ms, self._weight)])
        found = sorted({item for skipped, *_ in parts for item in skipped})
        counts = sum((counts for _, counts, *_ in parts), Counter[str]())
        row: dict[str, Any] = {
            "epoch": epoch.number,
            "steps": epoch.steps,
            "loss": loss,
            "train_loss": total / images if images else None,
            "train_top1": 100 * correct / images if images else None,
            "lr_first": self.lrs[0] if self.lrs else None,
            "lr": self.lrs[-1] if self.lrs else lr,
            "resolution": epoch.resolution,
            "images": int(images),
            "groups": counts["groups"],
            "mixed": counts["mixed"] / max(1, counts["images"]),
            "own_weight": counts["weight"] * WEIGHT_UNIT / max(1, counts["images"]),
            "erased": counts["erased"] / max(1, counts["pixels"]),
            "images_per_s": images / self.seconds,
            "seconds": self.seconds,
            "data_wait_s": self.waited,
            "peak_memory_mb": self._compute.peak_memory_mb(),
        }
        if found:
            row |= {
                "skipped": len(found),
                "skipped_samples": [f"sample {index} {reason}" for index, reason in found],
            }
        if len(parts) > 1 and own_ms:
            times, weights = [ms for *_, ms, _ in parts], [weight for *_, weight in parts]
            row |= slowest(times, weights, self._compute.hosts)
        return row

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict:
        own = {
            "totals": self.totals.tolist(),
            "window": self.window[: len(self.unread)].tolist(),
            "skipped": self.skipped,
            "counts": dict(self.counts),
        }
        # The durations are those of rank 0, so that every process has the same state
        counted = compute.gather([(own, self.seconds, self.waited)])
        _, seconds, waited = counted[0]
        return {
            "step": self.step,
            "rows": self.rows,
            "best": self.best,
            "lineage": self.lineage,
            "epoch": {
                "processes": [process for process, *_ in counted],
                "unread": self.unread,
                "lrs": self.lrs,
                "seconds": seconds,
                "waited": waited,
                "events": self.events,
            },
        }

    def load_state_dict(self, state: dict) -> None:
        self.step, self.rows, self.best = state["step"], list(state["rows"]), state["best"]
        self.lineage = state.get("lineage", [])  # earlier versions have none
        self.begin_epoch()
        epoch = state["epoch"]
        mine = _shared_out(epoch["processes"], self._compute.world_size)[self._compute.rank]
        self.totals += torch.tensor(mine["totals"], dtype=torch.float64, device=self.totals.device)
        self.unread = list(epoch["unread"])
        self.window[: len(self.unread)] = torch.tensor(mine["window"], dtype=torch.float64)
        self.skipped = [tuple(item) for item in mine["skipped"]]
        self.counts = Counter(mine.get("counts", {}))  # earlier versions have none
        self.lrs = list(epoch.get("lrs", []))
        self.seconds, self.waited, self.events = (
            epoch["seconds"],
            epoch["waited"],
            list(epoch["events"]),
        )


def slowest(own_ms: list[float], weights: list[float], hosts: Sequence[str]) -> dict[str, Any]:
    """The log's figures of the processes' own times.

    own_ms: the median of the own time per step of each process, by rank; see `step.OwnTime`.
    weights: mix groups that each process takes, as a multiple of the mean. A process with more
        groups is not slower for that: the processes are compared by the time per group.
    hosts: the host name of each process.
    """
    per_group = [ms / weight for ms, weight in zip(own_ms, weights)]
    process = max(range(len(per_group)), key=per_group.__getitem__)
    above = per_group[process] / statistics.median(per_group) - 1
    return {
        "own_step_ms": [round(ms, 2) for ms in own_ms],
        "slowest": {
            "process": process,
            "host": hosts[process],
            "own_step_ms": round(own_ms[process], 2),
            "percent_above_median": round(100 * above, 1),
        },
    }


def _shared_out(counted: list[dict], world_size: int) -> list[dict]:
    """Distributes the counts of a checkpoint to `world_size` processes. If their number has
    changed, rank 0 gets the sum of the counts, and every process the mean of the losses."""
    if len(counted) == world_size:
        return counted
    windows = [process["window"] for process in counted]
    window = [statistics.fmean(losses) for losses in zip(*windows)]
    first = {
        "totals": [sum(numbers) for numbers in zip(*(process["totals"] for process in counted))],
        "window": window,
        "skipped": [item for process in counted for item in process["skipped"]],
        "counts": sum((Counter(process.get("counts", {})) for process in counted), Counter()),
    }
    return [first] + [{"totals": [0.0] * 3, "window": window, "skipped": []}] * (world_size - 1)
