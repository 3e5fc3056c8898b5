"""The curves of a run and other diagrams as inline SVG, for the report.

Colours are CSS variables of the page, so that light and dark both work; sizes are in the units of
the view box, about a pixel.
"""

import math
from collections.abc import Sequence

from rsb_ffcv.reporting.curves import BLACK, BLUE, GREEN, GREY, VERMILION, Line

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 78, 18, 12, 46  # margins
# Okabe and Ito's palette has a second blue for dark backgrounds; see the variables in page.py
NAMES = {BLACK: "ink", BLUE: "blue", VERMILION: "vermilion", GREEN: "green", GREY: "grey"}
DASHES = {"-": "", "--": "7 4", "-.": "9 3 2 3", ":": "2 3"}


def ticks(low: float, high: float, *, count: int = 5, whole: bool = False) -> list[float]:
    """At most `count` + 1 round numbers from `low` to `high`, which is larger. whole: integers."""
    wanted = (high - low) / count
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(power * by for by in (1, 2, 5, 10) if power * by >= wanted * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def number(value: float) -> str:
    """A readable number: 12,500, 57.3, 0.00498."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _range(values: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if from_zero:
        low = min(0.0, low)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if from_zero else low - margin), high + margin


def chart(title: str, unit: str, lines: Sequence[Line], *, from_zero: bool = False) -> str:
    """One panel of `curves.panels`: a figure with a caption, the legend, and the curves over the
    epochs. Values that are not finite are left out. from_zero: the vertical axis begins at 0."""
    finite: list[Line] = [
        (label, [(x, y) for x, y in points if math.isfinite(y)], colour, style)
        for label, points, colour, style in lines
    ]
    finite = [line for line in finite if line[1]]
    caption = f"<figcaption>{title}{f' <span>({unit})</span>' if unit else ''}</figcaption>"
    if not finite:
        return f'<figure class="chart">{caption}<p class="note">No values.</p></figure>'
    first, last = (pick(x for line in finite for x, _ in line[1]) for pick in (min, max))
    left, right = (first, last) if last > first else (first - 0.5, last + 0.5)
    low, high = _range([y for line in finite for _, y in line[1]], from_zero=from_zero)

    def at_x(x: float) -> float:
        return LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    bottom = HEIGHT - BOTTOM
    parts = []
    for y in ticks(low, high):
        parts.append(f'<path class="grid" d="M{LEFT} {at_y(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:,g}</text>')
    for x in ticks(left, right, count=6, whole=True):
        parts.append(f'<path class="grid" d="M{at_x(x):.1f} {bottom}v5"/>')
        parts.append(f'<text x="{at_x(x):.1f}" y="{bottom + 20}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">epoch</text>')
    if unit:
        centre = (TOP + bottom) / 2
        parts.append(
            f'<text x="14" y="{centre}" text-anchor="middle" '
            f'transform="rotate(-90 14 {centre})">{unit}</text>'
        )
    for label, points, colour, style in finite:
        places = [(at_x(x), at_y(y)) for x, y in points]
        kind = "expected" if label == "expected" else "line"
        dash = f' stroke-dasharray="{DASHES[style]}"' if DASHES[style] else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline class="{kind}" style="--c:var(--{NAMES[colour]})"{dash} points="{path}"/>'
        )
        # A line needs two points; a mark shows a single one
        if label == "expected" or len(places) == 1:
            parts += [
                f'<circle style="--c:var(--{NAMES[colour]})" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
                for x, y in places
            ]
    ends = ", ".join(
        f"{label or title}: {number(points[-1][1])} at epoch {points[-1][0]}"
        for label, points, *_ in finite
    )
    legend = "".join(
        f'<li><svg width="30" height="10" aria-hidden="true"><path class="line" '
        f'style="--c:var(--{NAMES[colour]})" stroke-dasharray="{DASHES[style]}" d="M1 5h28"/></svg>'
        f"{label} <b>{number(points[-1][1])}</b></li>"
        for label, points, colour, style in finite
        if label
    )
    return (
        f'<figure class="chart">{caption}'
        f"{f'<ul class=legend>{legend}</ul>' if legend else ''}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{title} over the epochs. Last values: {ends}">{"".join(parts)}</svg></figure>'
    )


def histogram(values: Sequence[float], *, bins: int = 20) -> str:
    """How many of `values`, 0 .. 100 per cent, are in each of `bins` equal parts."""
    counts = [0] * bins
    for value in values:
        counts[min(int(value * bins / 100), bins - 1)] += 1
    bottom, step = HEIGHT - BOTTOM, (WIDTH - LEFT - RIGHT) / bins
    high = max(counts) * 1.06
    parts = []
    for y in ticks(0, high, whole=True):
        place = bottom - y / high * (bottom - TOP)
        parts.append(f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{place + 4:.1f}" text-anchor="end">{y:g}</text>')
    for place, count in enumerate(counts):
        height = count / high * (bottom - TOP)
        parts.append(
            f'<rect x="{LEFT + place * step + 1:.1f}" y="{bottom - height:.1f}" '
            f'width="{step - 2:.1f}" height="{height:.1f}"/>'
        )
    for x in range(0, 101, 20):
        at = LEFT + x / 100 * (WIDTH - LEFT - RIGHT)
        parts.append(f'<text x="{at:.1f}" y="{bottom + 20}" text-anchor="middle">{x}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>')
    middle, centre = (LEFT + WIDTH - RIGHT) / 2, (TOP + bottom) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">top-1 in %</text>')
    parts.append(
        f'<text x="14" y="{centre}" text-anchor="middle" '
        f'transform="rotate(-90 14 {centre})">classes</text>'
    )
    return (
        f'<figure class="chart"><figcaption>classes by their top-1</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Histogram of the top-1 of '
        f'{len(values)} classes, from {min(values):.0f} to {max(values):.0f} %">'
        f"{''.join(parts)}</svg></figure>"
    )
