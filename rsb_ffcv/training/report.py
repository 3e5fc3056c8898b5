"""The results of a run as one document, `metrics.json`, and as a page, `report.html`.

Both are functions of the run's folder and of what was found in the evaluation of each image:
config, environment, log and console output are read from their files. The same code writes them at
the end of a run and for the command report.
"""

import base64
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rsb_ffcv import InputError, __version__, first_line
from rsb_ffcv.atomic import atomic_file
from rsb_ffcv.beton import Beton, OpenFiles, read_beton
from rsb_ffcv.config.train import SECTIONS, expected_points
from rsb_ffcv.reporting import log
from rsb_ffcv.reporting.console import LOG
from rsb_ffcv.reporting.log import PREFIXES, best_of
from rsb_ffcv.reporting.page import page

CONFUSED, WORST = 24, 24  # pairs of classes and images that are listed
EXAMPLES = 2  # images of a pair
SIDE, QUALITY = 112, 80  # of a thumbnail: longest side in pixels, JPEG quality
FIX = "give the folder of a run"


# ---------------------------------------------------------------- each image


def findings(
    beton: Beton,
    num_classes: int,
    *,
    weights: str,
    row: dict[str, Any],
    per_image: np.ndarray,
    label_sets: torch.Tensor | None,
) -> dict[str, Any]:
    """The section "evaluation" of the document.

    beton: the evaluation file.
    num_classes: of the training file.
    weights: that were evaluated: "model", "ema" or "swa".
    row: of the epoch's log.
    per_image: float64 (images, 3), see Evaluator.each_image.
    label_sets: accepted labels of each image (see `read_label_sets`), or None.
    """
    labels, predicted = beton.labels, per_image[:, 0].astype(np.int64)
    classes = max(num_classes, int(labels.max()) + 1, int(predicted.max()) + 1)
    losses = per_image[:, 2]
    # A loss that is not a number is the worst of all
    rank = np.argsort(-np.nan_to_num(losses, nan=np.inf, posinf=np.inf), kind="stable")
    confused = list(_confused(labels, predicted, rank, classes=classes))
    worst = rank[:WORST].tolist()
    names = beton.names_of([*worst, *(one for *_, shown in confused for one in shown)])

    def image(sample: int) -> dict[str, Any]:
        about = {
            "sample": sample,
            "name": names[sample],
            "label": int(labels[sample]),
            "predicted": int(predicted[sample]),
            "loss": float(losses[sample]),
        }
        if label_sets is not None:
            about["accepted"] = about["predicted"] in label_sets[sample].tolist()
        return about

    prefix = PREFIXES[weights]
    metrics = ("top1", "top5", "val_loss", "relabelled_top1", "relabelled_images")
    return {
        "weights": weights,
        "epoch": row["epoch"],
        **{name: row[prefix + name] for name in metrics if prefix + name in row},
        "images": len(beton),
        "file": str(beton.path),
        "fingerprint": beton.fingerprint(),
        "classes": _classes(beton, classes, predicted=predicted, in_five=per_image[:, 1] > 0),
        "confused": [
            {"label": true, "predicted": wrong, "images": count, "examples": [*map(image, shown)]}
            for true, wrong, count, shown in confused
        ],
        "worst": [*map(image, worst)],
    }


def _classes(
    beton: Beton, classes: int, *, predicted: np.ndarray, in_five: np.ndarray
) -> list[dict[str, Any]]:
    """Names and counts of each class, in the order of the labels."""
    names = beton.about.classes if beton.about else []
    titles = beton.about.titles if beton.about else []
    labels = beton.labels
    images, correct, correct5, times = (
        np.bincount(numbers, minlength=classes)
        for numbers in (labels, labels[predicted == labels], labels[in_five], predicted)
    )
    return [
        {
            "label": label,
            "name": names[label] if label < len(names) else str(label),
            **({"title": titles[label]} if label < len(titles) else {}),
            "images": int(images[label]),
            "correct": int(correct[label]),
            "correct5": int(correct5[label]),
            "predicted": int(times[label]),
            "top1": 100 * correct[label] / images[label] if images[label] else None,
            "top5": 100 * correct5[label] / images[label] if images[label] else None,
        }
        for label in range(classes)
    ]


def _confused(
    labels: np.ndarray, predicted: np.ndarray, rank: np.ndarray, *, classes: int
) -> Iterable[tuple[int, int, int, list[int]]]:
    """Yields (true class, predicted class, images, samples with the highest losses) of the most
    frequent pairs. Pairs of the same count come in the order of the labels. rank: the samples, the
    highest loss first."""
    wrong = rank[predicted[rank] != labels[rank]]
    pairs = labels[wrong] * classes + predicted[wrong]
    found, counts = np.unique(pairs, return_counts=True)
    for place in np.argsort(-counts, kind="stable")[:CONFUSED]:
        true, other = divmod(int(found[place]), classes)
        yield true, other, int(counts[place]), wrong[pairs == found[place]][:EXAMPLES].tolist()


# ---------------------------------------------------------------- the document


def write(folder: Path, evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """Writes metrics.json and report.html in the folder of a run, and returns the document.

    evaluation: see `findings`; None if there is none.

    Raises InputError if the folder has no run, or as atomic_file does.
    """
    made = _finite(document(folder, evaluation))
    log.write_json(folder / log.DOCUMENT, made)
    pictures, reason = _pictures(made)
    with atomic_file(folder / log.REPORT, log.FIX) as file:
        file.write(page(made, pictures, no_pictures=reason).encode("utf-8", "backslashreplace"))
    return made


def document(folder: Path, evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """The content of metrics.json, from the files of a run. Raises InputError if it has none."""
    config, rows = log.read_run(folder, FIX)
    lineage = config.pop("lineage", [])
    try:
        environment = json.loads((folder / log.ENVIRONMENT).read_text())
    except (OSError, ValueError):  # of an earlier version, or not complete
        environment = None
    try:
        options = {section: config[section] for section in ("logging", "training", "model")}
        epochs, logging = options["training"]["epochs"], options["logging"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder}/config.json: not of a run ({error}); {FIX}") from error
    events = [
        {"epoch": row["epoch"], "text": text} for row in rows for text in row.get("events", [])
    ]
    events += [
        {"epoch": row["epoch"], "text": f"left out: {text}"}
        for row in rows
        for text in row.get("skipped_samples", [])
    ]
    return {
        "rsb_ffcv": __version__,
        "name": logging.get("run_name") or folder.resolve().name,
        "finished": len(rows) >= epochs,
        "config": config,
        "changed_options": _changed(config),
        "lineage": lineage,
        "expected": sorted(expected_points(logging.get("expected", "")).items()),
        "best": _best(rows, lineage),
        "epochs": rows,
        "evaluation": evaluation,
        "events": sorted(events, key=lambda event: event["epoch"]),
        "warnings": _warnings(folder, known={event["text"] for event in events}),
        "environment": environment,
    }


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """The section "evaluation" of metrics.json, None if there is none, or if it is of another state
    of the run. Raises InputError if the file is damaged."""
    path = folder / log.DOCUMENT
    _, rows = log.read_run(folder, FIX)
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        return found["evaluation"] if found["epochs"] == _finite(rows) else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); remove it") from error


def _changed(config: dict[str, Any]) -> dict[str, list[Any]]:
    """The options that differ from their defaults: section.option -> [default, value]. A required
    option has no default."""
    found = {}
    for section in filter(config.get, SECTIONS):
        for item in fields(SECTIONS[section]):
            value = config[section].get(item.name, item.default)
            if value != item.default:
                default = None if item.default is MISSING else item.default
                found[f"{section}.{item.name}"] = [default, value]
    return found


def _best(rows: Sequence[dict[str, Any]], lineage: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The best epoch in the log of the run itself, without those that it has taken over. It
    is not that of `best.pt` if the checkpoint of this epoch could not be written."""
    first = lineage[-1]["epochs"] if lineage else 0
    found = [
        {"top1": top1, "epoch": row["epoch"], "weights": weights}
        for row in rows[first:]
        if any(f"{prefix}top1" in row for prefix in PREFIXES.values())
        for weights, top1 in [best_of(row)]
    ]
    return max(found, key=lambda best: best["top1"], default=None)


def _warnings(folder: Path, *, known: set[str]) -> list[dict[str, str]]:
    """The warnings in training.log that are no events, each text once."""
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # its disk was full, which is a warning in itself
        lines = []
    found: dict[str, str] = {}
    for line in lines:
        parts = re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) warning: (.*)", line)
        if parts and parts[2] not in known:
            found.setdefault(parts[2], parts[1])
    return [{"time": time, "text": text} for text, time in found.items()]


def _finite(value: Any) -> Any:
    """`value` as JSON gives it back, with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---------------------------------------------------------------- pictures


def _pictures(made: dict[str, Any]) -> tuple[dict[int, str], str]:
    """Thumbnails of the images that the document lists: sample -> JPEG in base64; and why there are
    none, if that is so."""
    evaluation = made["evaluation"]
    if evaluation is None:
        return {}, ""
    listed = [pair["examples"] for pair in evaluation["confused"]] + [evaluation["worst"]]
    samples = {image["sample"] for images in listed for image in images}
    try:
        beton = read_beton(evaluation["file"])
        if beton.fingerprint() != evaluation["fingerprint"]:
            return {}, f"{beton.path} has other images now"
        with beton.open() as opened:
            return {sample: _thumbnail(beton, opened, sample) for sample in samples}, ""
    except (InputError, OSError, ValueError) as error:
        return {}, first_line(error)


def _thumbnail(beton: Beton, opened: OpenFiles, sample: int) -> str:
    image = Image.fromarray(beton.picture(opened, sample))
    image.thumbnail((SIDE, SIDE))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=QUALITY)
    return base64.b64encode(jpeg.getvalue()).decode()
