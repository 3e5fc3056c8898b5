"""Shows how runs differ in their recipes and in their results."""

import statistics
from pathlib import Path
from typing import Any

from rsb_ffcv import InputError
from rsb_ffcv.commands.plan import print_columns
from rsb_ffcv.config.train import RECIPE
from rsb_ffcv.reporting.log import PREFIXES, WEIGHTS, read_run

FIX = "give the folders of two or more runs"


def compare(folders: list[str]) -> None:
    """Prints the options in which the runs in `folders` differ, and their results.

    Raises InputError if a folder has no run.
    """
    if len(folders) < 2:
        raise InputError(f"compare: {len(folders)} folders; {FIX}")
    runs = [_read(Path(folder)) for folder in folders]
    print_columns([("", *folders), *_differences([config for config, _ in runs])])
    print()
    print_columns([("", *folders), *_results([rows for _, rows in runs])])


def _read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    config, rows = read_run(folder, FIX)
    if not rows:
        raise InputError(f"{folder}: has not finished an epoch; {FIX}")
    return config, rows


def _differences(configs: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each option of the recipe that is not the same in all runs."""
    names = dict.fromkeys(
        (section, name)
        for section in RECIPE
        for config in configs
        for name in config.get(section, {})
    )
    rows = []
    for section, name in names:
        # a run of an earlier version does not have all options
        values = [str(config.get(section, {}).get(name, "-")) or "''" for config in configs]
        if len(set(values)) > 1:
            rows.append((f"{section}.{name}", *values))
    return rows or [("the recipes are the same", *[""] * len(configs))]


def _results(logs: list[list[dict[str, Any]]]) -> list[tuple[str, ...]]:
    found = [("epochs", *(str(len(rows)) for rows in logs))]
    for weights, prefix in PREFIXES.items():
        key, name = f"{prefix}top1", f"{WEIGHTS[weights]} weights"
        if any(key in row for rows in logs for row in rows):
            last = [next((row[key] for row in reversed(rows) if key in row), None) for rows in logs]
            best = [max((row[key] for row in rows if key in row), default=None) for rows in logs]
            found.append((f"top-1, {name}, last", *map(_percent, last)))
            found.append((f"top-1, {name}, best", *map(_percent, best)))
    for key in ("train_loss", "val_loss"):
        values = [
            next((r[key] for r in reversed(rows) if r.get(key) is not None), None) for rows in logs
        ]
        found.append((key.replace("_", " "), *("-" if v is None else f"{v:.4f}" for v in values)))
    speed = [statistics.median(row["images_per_s"] for row in rows) for rows in logs]
    hours = [
        sum(row["seconds"] + row.get("val_seconds", 0.0) for row in rows) / 3600 for rows in logs
    ]
    found.append(("images/s, median", *(f"{value:,.0f}" for value in speed)))
    found.append(("hours", *(f"{value:,.2f}" for value in hours)))
    found.append(
        ("messages", *(str(sum(len(row.get("events", [])) for row in rows)) for rows in logs))
    )
    return found


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"
