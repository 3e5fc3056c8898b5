"""What a run leaves behind for people and programs: one JSON line an epoch, curves, and a closing table."""
import json
import os
from pathlib import Path

METRICS = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict]:
    """The epochs logged so far. A last line that a kill cut short is left out."""
    path = folder / METRICS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def append_metrics(folder: Path, row: dict):
    """Adds one line, flushed to disk."""
    with open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def keep_epochs_before(folder: Path, epoch: int):
    """Drops the lines of `epoch` and later ones: a resumed run writes those again."""
    rows = [row for row in read_metrics(folder) if row["epoch"] < epoch]
    temporary = folder / f".{METRICS}.part"
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, folder / METRICS)


def write_json(path: Path, content):
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def draw_curves(rows: list[dict], path: Path):
    """A PNG with accuracy, loss and learning rate over epochs."""
    import matplotlib  # a second to import; a run needs it once

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    epochs = [row["epoch"] + 1 for row in rows]
    figure, (accuracy, loss, rate) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    evaluated = [row for row in rows if row.get("top1") is not None]
    for key, label in (("top1", "raw"), ("ema_top1", "EMA")):
        points = [(row["epoch"] + 1, row[key]) for row in evaluated if row.get(key) is not None]
        if points:
            accuracy.plot(*zip(*points), marker=".", label=label)
    accuracy.set(xlabel="epoch", ylabel="top-1, %", title="validation accuracy")
    accuracy.legend()
    loss.plot(epochs, [row["train_loss"] for row in rows], marker=".")
    loss.set(xlabel="epoch", title="training loss")
    rate.plot(epochs, [row["lr"] for row in rows], marker=".")
    rate.set(xlabel="epoch", title="learning rate at the epoch's end")
    for axis in (accuracy, loss, rate):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)
