"""`report.html`: the document of a run (`metrics.json`) as one HTML page.

The page needs no network and no other file. All text that comes from users is escaped.
"""

import html
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rsb_ffcv import counted, duration
from rsb_ffcv.config.train import RECIPE
from rsb_ffcv.reporting.charts import chart, histogram
from rsb_ffcv.reporting.curves import panels
from rsb_ffcv.reporting.log import PREFIXES, WEIGHTS
from rsb_ffcv.reporting.style import SCRIPT, STYLE

LISTED = 10  # worst and best classes, and pairs, outside the collapsed tables
FIELDS = {
    "command": "command",
    "started": "last start (UTC)",
    "commit": "commit of the code",
    "rsb_ffcv": "rsb_ffcv",
    "python": "Python",
    "versions": "packages",
    "gpu": "GPU",
    "gpu_memory_gib": "GPU memory, GiB",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "driver": "NVIDIA driver",
    "device": "device",
    "precision": "precision",
    "compile": "torch.compile",
    "channels_last": "channels_last",
    "processes": "processes",
    "hosts": "hosts",
    "processor": "processor",
    "instruction_sets": "instruction sets",
    "cores": "cores",
    "memory_gib": "memory, GiB",
    "system": "system",
    "torch_threads": "threads of torch in a process",
    "loader_threads": "threads of each loader in a process",
    "decode": "decoding on",
}


# ---------------------------------------------------------------- pieces


def text(value: object) -> str:
    """`value` as escaped text. Control characters, which HTML does not allow, are replaced."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", str(value)))


def option_value(value: object) -> str:
    """An option's value as escaped text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        value = int(value)
    return f"<code>{text(value) if value != '' else '(empty)'}</code>"


def decimals(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} %"


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    label: str,
    numbers: Iterable[int] = (),
    kind: str = "",
) -> str:
    """A table in a box of its own, which scrolls if the page is narrow.

    head: titles of the columns.
    rows: cells, HTML. A cell that begins with "<td" is taken as it is.
    label: what the table has, for screen readers.
    numbers: columns that are aligned to the right.
    kind: its class.
    """
    right = set(numbers)

    def cell(column: int, content: str) -> str:
        if content.startswith("<td"):
            return content
        return f'<td class="n">{content}</td>' if column in right else f"<td>{content}</td>"

    titles = "".join(
        f'<th scope="col"{" class=n" if column in right else ""}>{title}</th>'
        for column, title in enumerate(head)
    )
    body = "".join(
        f"<tr>{''.join(cell(column, content) for column, content in enumerate(row))}</tr>\n"
        for row in rows
    )
    return (
        f'<div class="box" role="region" tabindex="0" aria-label="{text(label)}">'
        f'<table class="{kind}"><thead><tr>{titles}</tr></thead><tbody>\n{body}</tbody></table>'
        f"</div>"
    )


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """A list of names and values. The values are HTML."""
    return (
        '<dl class="facts">'
        + "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in rows)
        + "</dl>"
    )


def details(summary: str, content: str, *, opened: bool = False) -> str:
    return (
        f"<details{' open' if opened else ''}><summary>{text(summary)}</summary>{content}</details>"
    )


def note(content: str) -> str:
    return f'<p class="note">{text(content)}</p>'


def class_name(about: Mapping[str, Any]) -> str:
    """A class for people: the first of its titles, and its name."""
    if "title" not in about:
        return text(about["name"])
    first = about["title"].split(",")[0]
    return f'{text(first)} <span class="id">{text(about["name"])}</span>'


# ---------------------------------------------------------------- the page


def page(made: Mapping[str, Any], pictures: Mapping[int, str], *, no_pictures: str) -> str:
    """The page of a run.

    made: the document, as JSON gives it back.
    pictures: number of an evaluation sample -> JPEG in base64.
    no_pictures: why there are none; empty if they are there.
    """
    sections = [
        ("recipe", "Recipe and lineage", _recipe(made)),
        ("curves", "Curves", _curves(made)),
        ("throughput", "Throughput", _throughput(made)),
        ("classes", "Accuracy per class", _classes(made)),
        ("confused", "Most confused pairs", _confused(made, pictures, no_pictures)),
        ("worst", "Worst losses", _worst(made, pictures, no_pictures)),
        ("environment", "Environment", _environment(made)),
        ("warnings", "Warnings and events", _warnings(made)),
    ]
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in sections)
    body = "\n".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>\n'
        f"{content}</section>"
        for key, title, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(made["name"])}: training report</title>
<style>{STYLE}</style>
</head>
<body>
<header>{_head(made)}</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{body}
</main>
<footer>Made by rsb_ffcv {text(made["rsb_ffcv"])} from metrics.json in the same folder. Epochs count
from 1 here, and from 0 in metrics.json.</footer>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _total(made: Mapping[str, Any]) -> int:
    return made["config"]["training"]["epochs"]


def _files(made: Mapping[str, Any]) -> Mapping[str, Any]:
    return (made["environment"] or {}).get("files", {})


def _head(made: Mapping[str, Any]) -> str:
    rows, evaluation, best = made["epochs"], made["evaluation"], made["best"]
    total = _total(made)
    train = _files(made).get("train")
    data = (
        f", {train['images']:,} training images of {counted(train['classes'], 'class', 'classes')}"
        if train
        else ""
    )
    state = (
        f"finished, {counted(total, 'epoch')}"
        if made["finished"]
        else f"not finished: {len(rows)} of {counted(total, 'epoch')}"
    )
    tiles = []
    if evaluation:
        of = f"{WEIGHTS[evaluation['weights']]} weights after epoch {evaluation['epoch'] + 1}"
        tiles.append(("top-1", percent(evaluation["top1"]), of))
        tiles.append(("top-5", percent(evaluation["top5"]), f"{evaluation['images']:,} images"))
    if best:
        where = f"{WEIGHTS[best['weights']]} weights, epoch {best['epoch'] + 1}"
        tiles.append(("best top-1", percent(best["top1"]), where))
    if rows:
        seconds = sum(row["seconds"] + (row.get("val_seconds") or 0) for row in rows)
        speed = statistics.median(row["images_per_s"] for row in rows)
        tiles.append(("images/s", f"{speed:,.0f}", "in training, median"))
        tiles.append(("time", duration(seconds), "training and validation"))
    noted = len(made["events"]) + len(made["warnings"])
    tiles.append(("messages", str(noted), "warnings and events"))
    shown = "".join(
        f"<li><span>{name}</span><strong>{value}</strong><small>{text(about)}</small></li>"
        for name, value, about in tiles
    )
    mark = "done" if made["finished"] else "open"
    return (
        f'<p class="kicker">training report</p><h1>{text(made["name"])}</h1>'
        f'<p class="lead"><span class="state {mark}">{state}</span> '
        f"{text(made['config']['model'].get('arch', ''))}{text(data)}</p>"
        f'<ul class="tiles">{shown}</ul>'
    )


def _recipe(made: Mapping[str, Any]) -> str:
    config, changed = made["config"], made["changed_options"]
    sections = [name for name in RECIPE if name in config]
    own = {name: both for name, both in changed.items() if name.partition(".")[0] in sections}
    blocks = []
    for section in sections:
        given = [
            (name.partition(".")[2], option_value(value))
            for name, (_, value) in own.items()
            if name.partition(".")[0] == section
        ]
        if given:
            blocks.append(f"<div><h3>{section}</h3>{facts(given)}</div>")
    every = table(
        ("option", "value", "default"),
        (
            (
                f"<code>{text(f'{section}.{name}')}</code>",
                option_value(value),
                option_value(changed[f"{section}.{name}"][0])
                if f"{section}.{name}" in changed
                else '<span class="id">the same</span>',
            )
            for section, options in config.items()
            for name, value in options.items()
        ),
        label="All options",
    )
    lineage = [
        f"<li><p>Continues <code>{text(step['checkpoint'])}</code>, after "
        f"{counted(step['epochs'], 'epoch')} and step {step['step']:,}.</p>"
        + (
            table(
                ("changed option", "before", "from here on"),
                (
                    (f"<code>{text(name)}</code>", option_value(old), option_value(new))
                    for name, (old, new) in step["changed"].items()
                ),
                label="Changed options",
            )
            if step["changed"]
            else note("No option was changed.")
        )
        + "</li>"
        for step in made["lineage"]
    ]
    start = config.get("checkpoint", {}).get("warm_start")
    initial = (
        f"The initial weights are those of {start}."
        if start
        else "The initial weights are timm's published ones."
        if config["model"].get("pretrained")
        else "It began with random weights."
    )
    return (
        "<p>Options that differ from their defaults:</p>"
        f'<div class="blocks">{"".join(blocks)}</div>'
        + details("All options, with those of this machine and this start", every)
        + "<h3>Lineage</h3>"
        + (
            f'<ol class="lineage">{"".join(lineage)}</ol>'
            if lineage
            else note(f"This run does not continue another one. {initial}")
        )
    )


def _curves(made: Mapping[str, Any]) -> str:
    rows = made["epochs"]
    if not rows:
        return note("Missing: no epoch has finished.")
    expected = {int(epoch): top1 for epoch, top1 in made["expected"]}
    drawn = [panel for panel in panels(rows, expected) if panel[0] != "throughput"]
    charts = "".join(chart(*panel) for panel in drawn)
    return (
        f'<div class="charts">{charts}</div>'
        "<h3>Against the expectation</h3>"
        + _expected(rows, expected)
        + details("Every epoch", _epochs(rows))
    )


def _expected(rows: Sequence[Mapping[str, Any]], expected: Mapping[int, float]) -> str:
    if not expected:
        return note("The recipe states no expected curve (logging.expected).")
    lines = []
    for epoch, wanted in sorted(expected.items()):
        row = rows[epoch - 1] if epoch <= len(rows) else {}
        found = [row[f"{p}top1"] for p in PREFIXES.values() if row.get(f"{p}top1") is not None]
        gap = f"{max(found) - wanted:+.2f}" if found else "–"
        lines.append(
            (str(epoch), percent(wanted), percent(max(found)) if found else "not reached", gap)
        )
    return (
        "<p>The best top-1 of any weights, at the epochs of <code>logging.expected</code>:</p>"
        + (
            table(
                ("epoch", "expected", "measured", "difference, points"),
                lines,
                label="Expected and measured top-1",
                numbers=range(4),
                kind="small",
            )
        )
    )


def _epochs(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = {
        "loss": ("train_loss", "{:.4g}"),
        "train top-1": ("train_top1", "{:.2f}"),
        "top-1": ("top1", "{:.2f}"),
        "top-5": ("top5", "{:.2f}"),
        "EMA top-1": ("ema_top1", "{:.2f}"),
        "SWA top-1": ("swa_top1", "{:.2f}"),
        "val. loss": ("val_loss", "{:.4g}"),
        "relabelled top-1": ("relabelled_top1", "{:.2f}"),
        "lr": ("lr", "{:.3g}"),
        "px": ("resolution", "{}"),
        "images/s": ("images_per_s", "{:,.0f}"),
        "wait, s": ("data_wait_s", "{:.1f}"),
        "train, s": ("seconds", "{:,.0f}"),
        "val., s": ("val_seconds", "{:,.0f}"),
        "memory, MiB": ("peak_memory_mb", "{:,.0f}"),
    }
    shown = {
        title: what
        for title, what in columns.items()
        if any(row.get(what[0]) is not None for row in rows)
    }
    return table(
        ("epoch", *shown),
        (
            (
                str(row["epoch"] + 1),
                *(
                    "–" if row.get(key) is None else form.format(row[key])
                    for key, form in shown.values()
                ),
            )
            for row in rows
        ),
        label="Every epoch",
        numbers=range(len(shown) + 1),
    )


def _throughput(made: Mapping[str, Any]) -> str:
    rows = made["epochs"]
    if not rows:
        return note("Missing: no epoch has finished.")
    seconds = sum(row["seconds"] for row in rows)
    validation = sum(row.get("val_seconds") or 0 for row in rows)
    with_val = [row["images_per_s_with_val"] for row in rows if "images_per_s_with_val" in row]
    speeds = [row["images_per_s"] for row in rows]
    wait = sum(row["data_wait_s"] for row in rows)
    listed = [
        ("images/s in training, median", f"{statistics.median(speeds):,.0f}"),
        ("lowest and highest epoch", f"{min(speeds):,.0f} … {max(speeds):,.0f}"),
        *(
            [("images/s with validation, median", f"{statistics.median(with_val):,.0f}")]
            if with_val
            else []
        ),
        ("waiting for data", f"{100 * wait / seconds:.1f} % of the training time"),
        ("training", duration(seconds)),
        ("validation", duration(validation)),
        ("peak memory", f"{max(row['peak_memory_mb'] for row in rows) / 1024:.1f} GiB"),
    ]
    (panel,) = [panel for panel in panels(rows, {}) if panel[0] == "throughput"]
    return f'<div class="charts">{chart(*panel, from_zero=True)}{facts(listed)}</div>'


# ---------------------------------------------------------------- each image


def _missing(made: Mapping[str, Any]) -> str:
    """Why the results of each image are missing."""
    if made["finished"]:
        return note(
            "Missing: each image is evaluated once more after the last epoch, and this run was "
            "ended before that. Start the same command again."
        )
    return note(
        f"Missing: each image is evaluated once more after the last epoch. So far "
        f"{counted(len(made['epochs']), 'epoch')} of {_total(made)} "
        f"{'has' if len(made['epochs']) == 1 else 'have'} finished."
    )


def _class_rows(classes: Iterable[Mapping[str, Any]]) -> Iterable[Sequence[str]]:
    for about in classes:
        top1 = about["top1"]
        yield (
            str(about["label"]),
            class_name(about),
            f"{about['images']:,}",
            "–"
            if top1 is None
            else f'<td class="n bar" style="--share:{top1:.1f}%">{top1:.1f}</td>',
            "–" if about["top5"] is None else f"{about['top5']:.1f}",
            f"{about['predicted']:,}",
        )


def _class_table(classes: Iterable[Mapping[str, Any]], label: str, kind: str = "classes") -> str:
    head = ("label", "class", "images", "top-1, %", "top-5, %", "predicted")
    return table(head, _class_rows(classes), label=label, numbers=(0, 2, 3, 4, 5), kind=kind)


def _classes(made: Mapping[str, Any]) -> str:
    evaluation = made["evaluation"]
    if evaluation is None:
        return _missing(made)
    classes = evaluation["classes"]
    known = sorted(
        (about for about in classes if about["images"]),
        key=lambda about: (about["top1"], about["label"]),
    )
    figures = [
        f"top-1 {percent(evaluation['top1'])}",
        f"top-5 {percent(evaluation['top5'])}",
        f"cross-entropy {decimals(evaluation['val_loss'], 4)}",
    ]
    if "relabelled_top1" in evaluation:
        figures.append(
            f"top-1 with <code>validation.labels</code> {percent(evaluation['relabelled_top1'])} "
            f"of {evaluation['relabelled_images']:,} images"
        )
    about = (
        f"<p>Results of the {WEIGHTS[evaluation['weights']]} weights after epoch "
        f"{evaluation['epoch'] + 1} on {evaluation['images']:,} images: {', '.join(figures)}. "
        f"<em>predicted</em> is how often the class was predicted.</p>"
    )
    complete = _class_table(classes, "Every class", "sortable")
    if len(known) <= 2 * LISTED:
        return about + complete
    return (
        about
        + f'<div class="charts">{histogram([about["top1"] for about in known])}</div>'
        + f"<h3>The {LISTED} worst classes</h3>"
        + _class_table(known[:LISTED], "Worst classes")
        + f"<h3>The {LISTED} best classes</h3>"
        + _class_table(known[: -LISTED - 1 : -1], "Best classes")
        + details(f"All {len(classes):,} classes", complete)
    )


def _picture(image: Mapping[str, Any], pictures: Mapping[int, str], names: Sequence[str]) -> str:
    sample = image["sample"]
    alt = text(f"sample {sample}, of class {names[image['label']]}")
    if sample not in pictures:
        return (
            f'<span class="thumb none" role="img" aria-label="{alt}, no picture">no picture</span>'
        )
    return (
        f'<img class="thumb" loading="lazy" alt="{alt}" title="{text(image["name"])}" '
        f'src="data:image/jpeg;base64,{pictures[sample]}">'
    )


def _names(evaluation: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The name of each class, plain, and as HTML."""
    classes = evaluation["classes"]
    return [about["name"] for about in classes], [class_name(about) for about in classes]


def _no_pictures(reason: str) -> str:
    return note(f"The pictures are missing: {reason}.") if reason else ""


def _confused(made: Mapping[str, Any], pictures: Mapping[int, str], no_pictures: str) -> str:
    evaluation = made["evaluation"]
    if evaluation is None:
        return _missing(made)
    if not evaluation["confused"]:
        return note("None: every prediction is correct.")
    plain, shown = _names(evaluation)
    rows = []
    for pair in evaluation["confused"]:
        images = evaluation["classes"][pair["label"]]["images"]
        examples = "".join(_picture(image, pictures, plain) for image in pair["examples"])
        rows.append(
            (
                shown[pair["label"]],
                shown[pair["predicted"]],
                f"{pair['images']:,} of {images:,}",
                f"{100 * pair['images'] / images:.1f}",
                f'<td class="pair">{examples}</td>',
            )
        )

    def listed(chosen: Sequence[Sequence[str]], label: str) -> str:
        head = ("true class", "predicted class", "images", "% of the true class", "examples")
        return table(head, chosen, label=label, numbers=(2, 3), kind="confused")

    return (
        "<p>The most frequent wrong predictions, and the images of each with the highest loss.</p>"
        + _no_pictures(no_pictures)
        + listed(rows[:LISTED], "Most confused pairs")
        + (
            details(f"{len(rows) - LISTED} more", listed(rows[LISTED:], "More pairs"))
            if len(rows) > LISTED
            else ""
        )
    )


def _worst(made: Mapping[str, Any], pictures: Mapping[int, str], no_pictures: str) -> str:
    evaluation = made["evaluation"]
    if evaluation is None:
        return _missing(made)
    plain, shown = _names(evaluation)
    figures = []
    for image in evaluation["worst"]:
        loss = "not finite" if image["loss"] is None else f"{image['loss']:.2f}"
        accepted = (
            "<span>accepted by <code>validation.labels</code></span>"
            if image.get("accepted")
            else ""
        )
        figures.append(
            f'<figure class="card">{_picture(image, pictures, plain)}<figcaption>'
            f"<span><em>true</em> {shown[image['label']]}</span>"
            f"<span><em>predicted</em> {shown[image['predicted']]}</span>{accepted}"
            f"<span><em>loss</em> <b>{loss}</b></span>"
            f'<span class="id">sample {image["sample"]:,}, {text(image["name"])}</span>'
            f"</figcaption></figure>\n"
        )
    return (
        "<p>The images with the highest cross-entropy: often wrong labels, or several objects.</p>"
        + _no_pictures(no_pictures)
        + f'<div class="cards">{"".join(figures)}</div>'
    )


# ---------------------------------------------------------------- circumstances


def _environment(made: Mapping[str, Any]) -> str:
    found = made["environment"]
    if found is None:
        return note("Missing: the folder has no environment.json; an earlier version wrote it.")

    def shown(key: str, value: Any) -> str:
        if key == "versions":
            return ", ".join(
                f"{text(name)} {text(version)}" for name, version in value.items() if version
            )
        if key == "command":
            return f"<code>{text(value)}</code>"
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, list):
            return text(", ".join(value)) or "–"
        return text(value) if value not in (None, "") else "–"

    listed = [(title, shown(key, found[key])) for key, title in FIELDS.items() if key in found]
    listed += [
        (
            f"{split} file",
            f"<code>{text(about['path'])}</code>: {about['images']:,} images, "
            f"{counted(about['classes'], 'class', 'classes')}, {about['bytes'] / 1e9:.3f} GB, "
            f"fingerprint <code>{text(about['fingerprint'])}</code>",
        )
        for split, about in found.get("files", {}).items()
    ]
    return facts(listed)


def _warnings(made: Mapping[str, Any]) -> str:
    rows = [(str(event["epoch"] + 1), text(event["text"])) for event in made["events"]]
    rows += [(text(warning["time"]), text(warning["text"])) for warning in made["warnings"]]
    if not rows:
        return note("None.")
    return table(("epoch, or time", "message"), rows, label="Warnings and events", kind="messages")
