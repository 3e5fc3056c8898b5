"""Files and tables for people and programs: the log with one JSON line per epoch, curves, and the
closing table."""

import io
import json
from pathlib import Path

from rsb_ffcv.atomic import atomic_file

METRICS = "metrics.jsonl"
FIX = "free space or choose another `folder`"


def write_metrics(folder: Path, rows: list[dict]) -> None:
    """Replaces the log by `rows`, one JSON line each. It has at most a few hundred lines. Rewriting
    all of them atomically keeps the file complete if the run is killed."""
    with atomic_file(folder / METRICS, FIX) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def write_json(path: Path, content: object) -> None:
    """Writes `content` to a JSON file, atomically. Raises InputError as atomic_file does."""
    with atomic_file(path, FIX) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def table(rows: list[tuple[str, str]]) -> str:
    """Formats `rows` as two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def draw_curves(rows: list[dict], path: Path) -> None:
    """Writes a PNG with accuracy, loss and learning rate over epochs."""
    import matplotlib  # here, because the import takes a second and a run needs it only once

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    epochs = [row["epoch"] + 1 for row in rows]
    figure, (accuracy, loss, rate) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    evaluated = [row for row in rows if row.get("top1") is not None]
    for key, label in (("top1", "raw"), ("ema_top1", "EMA"), ("swa_top1", "SWA")):
        points = [(row["epoch"] + 1, row[key]) for row in evaluated if row.get(key) is not None]
        if points:
            accuracy.plot(*zip(*points), marker=".", label=label)
    accuracy.set(xlabel="epoch", ylabel="top-1, %", title="validation accuracy")
    accuracy.legend()
    # One line per loss function: their values are not comparable.
    for kind in dict.fromkeys(row["loss"] for row in rows):
        loss.plot(
            *zip(*[(row["epoch"] + 1, row["train_loss"]) for row in rows if row["loss"] == kind]),
            marker=".",
            label={"bce": "binary cross-entropy", "ce": "cross-entropy"}[kind],
        )
    loss.set(xlabel="epoch", title="training loss")
    loss.legend()
    rate.plot(epochs, [row["lr"] for row in rows], marker=".")
    rate.set(xlabel="epoch", title="learning rate at the epoch's end")
    for axis in (accuracy, loss, rate):
        axis.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, dpi=100, format="png")
    plt.close(figure)
    with atomic_file(path, FIX) as file:
        file.write(png.getbuffer())
