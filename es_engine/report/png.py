"""The plots of a report as PNGs, drawn by matplotlib."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, count
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from es_engine.report.data import AXES
from es_engine.report.plots import Bars, Plot, Variant

# The page's own, in page.js.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0508e", "#8a6d00", "#3a9bd1", "#5c6370")
MARKERS = "osD^XP*"
DASHES = ("-", "--", ":")
MARKED_POINTS = 14
CLEAR_BANDS = 6
LONGEST_LABEL = 22  # characters of a label on an axis

LEGEND_WIDTH = 95  # characters of a legend's line, with 6 for each entry's sign
LONGEST_NAME = 50  # characters, of up to four bytes each


def write_pngs(folder: Path, plots: Sequence[Plot | Bars], over: str) -> list[Path]:
    """Draw every figure of every plot over an axis into a folder; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for plot in plots:
        if isinstance(plot, Bars):
            path = _free(folder / f"{plot.name}.png", written)
            written.append(_save(path, plot.title, partial(_bars, plot), height=1.5 + 0.28 * len(plot.labels)))
            continue
        for variant in plot.variants:
            name = plot.name if len(plot.variants) == 1 else f"{plot.name}-{_plain(variant.name)}"
            title = plot.title if len(plot.variants) == 1 else f"{plot.title}: {variant.name}"
            path = _free(folder / f"{name}.png", written)
            written.append(_save(path, title, partial(_curves, variant, over)))
    return written


def _curves(variant: Variant, over: str, axes: Axes) -> None:
    for curve in variant.curves:
        points = curve.points[over]
        colour = COLOURS[curve.style % len(COLOURS)]
        for place, (low, high) in enumerate(points.bands if len(variant.curves) <= CLEAR_BANDS else ()):
            axes.fill_between(points.x, low, high, color=colour, alpha=0.3 if place else 0.16, linewidth=0)
        axes.plot(
            points.x,
            points.y,
            DASHES[curve.style // len(COLOURS) % len(DASHES)],
            color=colour,
            marker=MARKERS[curve.style % len(MARKERS)],
            markevery=max(1, len(points.x) // MARKED_POINTS),
            markersize=5,
            label=_shortened(curve.label, LEGEND_WIDTH - 6),
        )
    axes.set_xlabel(AXES[over])
    axes.set_ylabel(_literal(variant.label))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if variant.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)


def _bars(bars: Bars, axes: Axes) -> None:
    places = np.arange(len(bars.labels))
    left = np.zeros(len(bars.labels))
    for number, (part, values) in enumerate(bars.parts.items()):
        axes.barh(places, values, 0.65, left, color=COLOURS[number % len(COLOURS)], label=_literal(part), edgecolor="w")
        left += np.array(values)
    axes.set_yticks(places, [_shortened(label, LONGEST_LABEL) for label in bars.labels])
    axes.invert_yaxis()
    axes.set_xlabel(bars.unit)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _save(path: Path, title: str, draw: Callable[[Axes], None], height: float = 0) -> Path:
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_shortened(title, LEGEND_WIDTH // 2))
    lines = _legend(figure, axes)
    figure.set_size_inches(7, max(4.4, height) + 0.2 * (lines - 1))
    figure.savefig(path, dpi=150)
    return path


def _legend(figure: Figure, axes: Axes) -> int:
    """A legend below, in as many columns as fit; its number of lines."""
    _, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=0)
    columns = max(1, min(3, LEGEND_WIDTH // (longest + 6)))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    return max(1, math.ceil(len(labels) / columns))


def _free(path: Path, taken: Sequence[Path]) -> Path:
    """The path, or one with a number where that is taken: long names may begin alike."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return next(each for each in chain([path], numbered) if each not in taken)


def _shortened(text: str, most: int) -> str:
    """A literal text of at most so many characters, whose beginning and end are kept."""
    end = (most - 1) * 3 // 7
    return _literal(text if len(text) <= most else f"{text[: most - 1 - end]}…{text[-end:]}")


def _literal(text: str) -> str:
    """Text in which matplotlib finds no formula, on one line of characters that can be seen."""
    return "".join(character if character.isprintable() else "·" for character in text).replace("$", r"\$")


def _plain(name: str) -> str:
    """A name of a file, or of as much of it as a file system takes."""
    return re.sub(r"[^\w-]+", "_", name)[:LONGEST_NAME]
