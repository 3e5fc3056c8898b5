"""The figure of a run, `training_curves.png`: accuracies, losses, learning rate and throughput.

It is drawn by a thread after an epoch, so that training continues meanwhile, and completed when the
run ends or is interrupted.
"""

import io
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from rsb_ffcv import first_line
from rsb_ffcv.atomic import atomic_file
from rsb_ffcv.reporting.log import FIX

CURVES = "training_curves.png"
# The thread shares the interpreter with training: it may take this share of the time at most.
LARGEST_SHARE = 0.02
# Okabe and Ito's palette, whose colours people with any colour vision can tell apart. The line
# styles differ as well, for prints without colour.
BLACK, BLUE, VERMILION, GREEN, GREY = "#000000", "#0072B2", "#D55E00", "#009E73", "#888888"
SETS = (("", "raw", BLUE, "-"), ("ema_", "EMA", VERMILION, "--"), ("swa_", "SWA", GREEN, "-."))

Points = list[tuple[int, float]]
Line = tuple[str, Points, str, str]  # label, points, colour, line style


def panels(rows: list[dict], expected: Mapping[int, float]) -> list[tuple[str, str, list[Line]]]:
    """The panels of the figure: title, unit, and lines. Epochs count from 1. Each loss has its own
    panel: values of different losses are not comparable.

    rows: of the log, at least one.
    expected: epoch, counted from 1 -> top-1 in per cent that the recipe states. Only the part up to
        twice the last epoch is shown.
    """
    last = rows[-1]["epoch"] + 1

    def points(key: str, chosen: list[dict] = rows) -> Points:
        return [(row["epoch"] + 1, row[key]) for row in chosen if row.get(key) is not None]

    def of_weights(key: str) -> list[Line]:
        return [
            (label, points(prefix + key), colour, style) for prefix, label, colour, style in SETS
        ]

    names = {"bce": "binary cross-entropy", "ce": "cross-entropy"}
    kinds = dict.fromkeys(row["loss"] for row in rows)
    found = [
        (
            "top-1",
            "%",
            [
                ("expected", sorted(p for p in expected.items() if p[0] <= 2 * last), GREY, "-"),
                ("training", points("train_top1"), BLACK, ":"),
                *of_weights("top1"),
            ],
        ),
        *(
            (
                "training loss",
                names[kind],
                [("", points("train_loss", [r for r in rows if r["loss"] == kind]), BLACK, "-")],
            )
            for kind in kinds
        ),
        ("validation loss", names["ce"], of_weights("val_loss")),
        ("learning rate at the end of the epoch", "", [("", points("lr"), BLACK, "-")]),
        (
            "throughput",
            "images/s",
            [
                ("training", points("images_per_s"), BLACK, "-"),
                ("with validation", points("images_per_s_with_val"), BLUE, "--"),
            ],
        ),
    ]
    return [(title, unit, [line for line in lines if line[1]]) for title, unit, lines in found]


def draw_curves(rows: list[dict], path: Path, expected: Mapping[int, float] | None = None) -> None:
    """Writes the figure of `rows` as a PNG, atomically; see `panels`. Works in any thread. Raises
    InputError as atomic_file does."""
    # Here, because the import takes seconds. Not pyplot, which is for the main thread only.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = panels(rows, expected or {})
    columns = -(-len(shown) // 2)
    figure = Figure(figsize=(4.6 * columns, 7))
    # Fixed margins: a layout engine would draw everything several times
    figure.subplots_adjust(
        left=0.25 / columns, right=0.98, top=0.95, bottom=0.08, wspace=0.3, hspace=0.32
    )
    for number, (title, unit, lines) in enumerate(shown):
        axis = figure.add_subplot(2, columns, number + 1)
        for label, points, colour, style in lines:
            # A line needs two points; a mark shows a single one
            marker = "o" if label == "expected" or len(points) == 1 else None
            axis.plot(
                *zip(*points), color=colour, linestyle=style, marker=marker, ms=5, label=label
            )
        axis.set(xlabel="epoch", ylabel=unit, title=title)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        if title == "throughput":
            axis.set_ylim(bottom=0)
        if any(label for label, *_ in lines):
            axis.legend()
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    with atomic_file(path, FIX) as file:
        file.write(png.getbuffer())


class Curves:
    """Keeps the figure of a run up to date. Use it as a context manager: after a finished run or a
    signal, the figure shows all epochs. A figure that cannot be drawn is one warning.

    path: of the PNG.
    expected: see `panels`.
    warn: called with the warning.
    """

    def __init__(
        self, path: Path, expected: Mapping[int, float], *, warn: Callable[[str], None]
    ) -> None:
        self._path, self._expected, self._warn = path, expected, warn
        self._rows: list[dict] = []  # not drawn yet
        self._thread: threading.Thread | None = None
        self._next_at = time.monotonic() + 1 / LARGEST_SHARE  # as if a figure had just taken 1 s
        self._failed = False

    def update(self, rows: list[dict]) -> None:
        """Call after each epoch. Draws now, or later if figures take too large a share of the
        time. rows: of the log; they do not change."""
        self._rows = list(rows)
        if time.monotonic() >= self._next_at and not (self._thread and self._thread.is_alive()):
            self._thread = threading.Thread(target=self._draw, name="curves")
            self._thread.start()

    def complete(self) -> None:
        """Draws the rows that are not drawn yet."""
        if self._thread is not None:
            self._thread.join()
        self._draw()

    def _draw(self) -> None:
        rows, self._rows = self._rows, []
        if not rows:
            return
        started = time.thread_time()
        try:
            draw_curves(rows, self._path, self._expected)
        # matplotlib and its configuration raise nearly any exception. No figure is worth a run.
        except Exception as error:
            if not self._failed:
                self._failed = True
                self._warn(f"{CURVES} was not drawn: {first_line(error)}; the run continues")
        self._next_at = time.monotonic() + (time.thread_time() - started) / LARGEST_SHARE

    def __enter__(self) -> "Curves":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is None or kind is SystemExit:
            self.complete()
        elif self._thread is not None:
            self._thread.join()
