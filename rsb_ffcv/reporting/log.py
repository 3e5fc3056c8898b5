"""Files and tables for people and programs: the log with one JSON line per epoch, and the closing
table."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsb_ffcv import InputError, first_line
from rsb_ffcv.atomic import atomic_file

METRICS = "metrics.jsonl"
DOCUMENT, REPORT = "metrics.json", "report.html"
ENVIRONMENT = "environment.json"
# Of the sets of weights: the prefix of their results in the log, and their names for people
PREFIXES = {"model": "", "ema": "ema_", "swa": "swa_"}
WEIGHTS = {"model": "raw", "ema": "EMA", "swa": "SWA"}
FIX = "free space or choose another `folder`"


def write_metrics(folder: Path, rows: list[dict]) -> None:
    """Replaces the log by `rows`, one JSON line each. It has at most a few hundred lines. Rewriting
    all of them atomically keeps the file complete if the run is killed."""
    with atomic_file(folder / METRICS, FIX) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def read_metrics(folder: Path) -> list[dict]:
    """The rows of the log of a run. Raises OSError or ValueError if it cannot be read."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def read_run(folder: Path, fix: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The content of config.json and the rows of the log of the run in `folder`. Raises InputError
    if it has none. fix: what the user can do."""
    try:
        return json.loads((folder / "config.json").read_text()), read_metrics(folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: no run, or one without results ({first_line(error)}); {fix}"
        ) from error


def best_of(row: Mapping[str, Any]) -> tuple[str, float]:
    """The weights with the highest top-1 in an epoch's `row`: "model", "ema" or "swa", and this
    top-1 in per cent. Raises ValueError for an epoch without validation."""
    found = {
        weights: row[f"{prefix}top1"]
        for weights, prefix in PREFIXES.items()
        if row.get(f"{prefix}top1") is not None
    }
    weights = max(found, key=lambda name: found[name])
    return weights, found[weights]


def results_of(row: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The results of one set of weights in an epoch's `row`. prefix: of PREFIXES."""
    names = ("top1", "top5", "val_loss", "relabelled_top1")
    return {name: row[prefix + name] for name in names if prefix + name in row}


def write_json(path: Path, content: object) -> None:
    """Writes `content` to a JSON file, atomically. Raises InputError as atomic_file does."""
    with atomic_file(path, FIX) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def table(rows: list[tuple[str, str]]) -> str:
    """Formats `rows` as two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
