"""A run on the terminal: a live view where someone watches, otherwise one line a generation."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from es_engine.telemetry.base import Line, Telemetry
from es_engine.text import discreet, duration, visible

BARS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 60


def console_telemetry(console: Console) -> Telemetry:
    """The form that suits the console: live on a terminal, lines of plain text in a file or a pipe."""
    return LiveTelemetry(console) if console.is_interactive else LineTelemetry(console)


class LineTelemetry:
    """One line of plain text for each thing told."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def generation(self, line: Line) -> None:
        self.message(f"{generation_title(line)}: {', '.join(f'{name} {value}' for name, value in figures(line))}")

    def evaluation(self, line: Line) -> None:
        self.message(evaluation_text(line))

    def message(self, text: str) -> None:
        self._console.print(_told(text), soft_wrap=True)

    def close(self, error: BaseException | None = None) -> None:
        """Nothing is held open."""


class LiveTelemetry:
    """The last generation's figures, the course of the reward and a progress bar; what else is told scrolls above."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rewards: deque[float] = deque(maxlen=SPARKLINE_WIDTH)
        self._progress = Progress(
            *(TextColumn("generation"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("elapsed"))
        )
        self._task = self._progress.add_task("", total=None)
        self._live = Live(console=console)

    def generation(self, line: Line) -> None:
        self._live.start()
        if line["reward_mean"] is not None:
            self._rewards.append(line["reward_mean"])
        self._progress.update(self._task, completed=line["step"] + 1, total=line["generations"])
        course = Text.assemble("reward mean ", (sparkline(self._rewards), "green"))
        self._live.update(Group(figures_table(line), course, self._progress), refresh=True)

    def evaluation(self, line: Line) -> None:
        self._console.print(_told(evaluation_text(line), "bold"))

    def message(self, text: str) -> None:
        self._console.print(_told(text))

    def close(self, error: BaseException | None = None) -> None:
        self._live.stop()


def _told(text: str, style: str = "") -> Text:
    return Text(visible(discreet(text)), style)


def generation_title(line: Line) -> str:
    total = "" if line["generations"] is None else f"/{line['generations']}"
    return f"generation {line['step'] + 1}{total}"


def evaluation_text(line: Line) -> str:
    shown = [f"{name} {_number(line[name])}{_interval(line[f'{name}_ci95'])}" for name in ("reward", "accuracy")]
    shown += [f"pass@{k} {_number(value)}" for k, value in line["pass_at_k"].items() if k != "1"]
    shown += [f"{name} {count}" for name, count in _failures(line)]
    return f"evaluation at {line['step']}: {', '.join(shown)}"


def figures(line: Line) -> list[tuple[str, str]]:
    """What is shown of a generation, as names and formatted values."""
    shown = [
        ("reward", _number(line["reward_mean"])),
        *_of_the_method(line),
        ("accuracy", _number(line["accuracy"])),
        ("tokens/s", f"{line['tokens'] / line['seconds']:.0f}"),
        ("rollouts", f"{line['seconds_rollouts'] / line['seconds']:.0%} of time"),
        *_spent(line),
        *_failures(line),
    ]
    if line["worker_restarts"]:
        shown.append(("worker restarts", str(line["worker_restarts"])))
    if line["eta_seconds"] is not None:
        shown.append(("ETA", duration(line["eta_seconds"])))
    return shown


def _of_the_method(line: Line) -> list[tuple[str, str]]:
    """What tells how well a population, or a gradient, shows the way."""
    if line["learning"]:
        return [(name, _number(value)) for name, value in line["learning"].items()]
    return [("best", _number(line["reward_best"])), ("spread", _number(line["fitness_spread"]))]


def _spent(line: Line) -> list[tuple[str, str]]:
    """What the run has spent so far, tokens in millions."""
    spent = line["spent"]
    return [
        ("processed", f"{spent['processed'] / 1e6:.2f}M"),
        ("TFLOPs", f"{spent['flops'] / 1e12:.2f}"),
        ("worker min", f"{spent['worker_seconds'] / 60:.1f}"),
    ]


def _failures(line: Line) -> list[tuple[str, str]]:
    """How many scores each verifier did not give, by kind: `brief timeout 3`."""
    return [
        (f"{verifier} {kind}", str(count))
        for verifier, kinds in sorted(line["failures"].items())
        for kind, count in sorted(kinds.items())
        if count
    ]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f" (95% {bounds[0]:.4f} to {bounds[1]:.4f})"


def figures_table(line: Line) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, _ in figures(line):
        table.add_column(_told(name), justify="right")
    table.add_row(*(value for _, value in figures(line)))
    return table


def sparkline(values: Sequence[float]) -> str:
    """One block a value, the lowest value the lowest block."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    height = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * height)] for value in values)
