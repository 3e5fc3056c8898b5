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
    """Writes a PNG with accuracy, losses and learning rate over epochs, counted from 1.

    rows: of the log.
    """
    import matplotlib  # here, because the import takes a second and a run needs it only once

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = _curves(rows)
    size = (4.5 * len(curves), 4)
    figure, axes = plt.subplots(1, len(curves), figsize=size, layout="constrained")
    for axis, (title, unit, lines) in zip(axes, curves):
        for label, points in lines:
            axis.plot(*zip(*points), marker=".", label=label)
        axis.set(xlabel="epoch", ylabel=unit, title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if any(label for label, _ in lines):
            axis.legend()
    png = io.BytesIO()
    figure.savefig(png, dpi=100, format="png")
    plt.close(figure)
    with atomic_file(path, FIX) as file:
        file.write(png.getbuffer())


Points = list[tuple[int, float]]


def _curves(rows: list[dict]) -> list[tuple[str, str, list[tuple[str, Points]]]]:
    """The panels of the figure: title, unit, and lines of (label, points). Each loss has its own
    panel: values of different losses are not comparable."""

    def points(key: str, chosen: list[dict] = rows) -> Points:
        return [(row["epoch"] + 1, row[key]) for row in chosen if row.get(key) is not None]

    def of_weights(key: str) -> list[tuple[str, Points]]:
        names = (("", "raw weights"), ("ema_", "EMA"), ("swa_", "SWA"))
        return [(name, points(prefix + key)) for prefix, name in names if points(prefix + key)]

    names = {"bce": "binary cross-entropy", "ce": "cross-entropy"}
    kinds = dict.fromkeys(row["loss"] for row in rows)
    return [
        ("validation top-1", "%", of_weights("top1")),
        *(
            (
                "training loss",
                names[kind],
                [("", points("train_loss", [row for row in rows if row["loss"] == kind]))],
            )
            for kind in kinds
        ),
        ("validation loss", names["ce"], of_weights("val_loss")),
        ("learning rate at the end of the epoch", "", [("", points("lr"))]),
    ]
