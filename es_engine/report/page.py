"""The page: one HTML file that needs nothing else, with its data as JSON, and scripts that its policy knows by hash."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from es_engine.report.curves import Array, Curve, Points
from es_engine.report.data import AXES, MEASURES, RunData, RunGroup, group_runs, read_run
from es_engine.report.plots import Bars, Plot, plots
from es_engine.report.samples import samples
from es_engine.run_folder import RunFolder, write_text
from es_engine.text import name_of
from rewards.trees import flat

Cell = str | float | None

DIGITS = 5
"""Significant digits of the numbers that are drawn."""

MOST_NAMED = 6
"""Groups that a title names."""


@dataclass(frozen=True, slots=True)
class Table:
    """A section of the page: a heading, a paragraph and a table of plain text and numbers."""

    heading: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def to_json(self) -> dict[str, Any]:
        """The table as the page's script reads it."""
        rows = [[_finite(cell) for cell in row] for row in self.rows]
        return {"heading": self.heading, "text": self.text, "columns": list(self.columns), "rows": rows}


def write_report(
    path: Path,
    groups: Sequence[RunGroup],
    *,
    title: str,
    tables: Sequence[Table] = (),
    details: Sequence[Table] = (),
    over: str | None = None,
    pngs: bool = True,
) -> None:
    """Write the page and, beside it in STEM_plots, every plot as a PNG. `tables` stand before the curves and `details`
    after them; `over` is the axis that is chosen first, and that of the PNGs."""
    over = over or usual_axis(groups)
    write_text(path, page(content(groups, title=title, tables=tables, details=details, over=over)))
    if pngs:
        from es_engine.report.png import write_pngs  # here, so that a run that only ends needs no matplotlib

        write_pngs(path.with_name(f"{path.stem}_plots"), plots(groups), over)


def write_run_report(run: Path) -> Path:
    """Write the page of a run, without PNGs, into its folder; the file."""
    path = RunFolder(run).report
    write_report(path, group_runs([read_run(run)]), title=name_of(run), pngs=False)
    return path


def content(
    groups: Sequence[RunGroup],
    *,
    title: str,
    tables: Sequence[Table] = (),
    details: Sequence[Table] = (),
    over: str | None = None,
    problems: Sequence[str] = (),
) -> dict[str, Any]:
    """All that the page shows, as plain JSON data. `problems` are sentences that stand above everything else."""
    runs = [run for group in groups for run in group.runs]
    arrays = _Arrays()
    drawn = [_bars(each) if isinstance(each, Bars) else _plot(each, arrays) for each in plots(groups)]
    kept = samples(groups)
    return {
        "title": title,
        "subtitle": subtitle(runs),
        "problems": [*problems, *kept["problems"]],
        "axes": AXES,
        "axis": over or usual_axis(groups),
        "groups": [
            {"label": group.label, "runs": list(group.run_labels), "keys": [run.key for run in group.runs]}
            for group in groups
        ],
        "summary": summary(groups).to_json(),
        "tables": [table.to_json() for table in tables],
        "details": [table.to_json() for table in details],
        "plots": drawn,
        "arrays": arrays.lists,
        "failures": _failures(groups).to_json(),
        "differences": config_differences(groups).to_json(),
        "configs": [
            {"key": run.key, "name": label, "text": run.config_text}
            for group in groups
            for label, run in zip(group.run_labels, group.runs, strict=True)
        ],
        "samples": kept,
        "samples_version": hashlib.sha256(json.dumps(kept).encode()).hexdigest(),
    }


def page(data: Mapping[str, Any], live: bool = False) -> str:
    """The page around its content; a live one asks for new content at `data.json` beside it."""
    scripts = [_plotly(), _asset("page.js")]
    connect = "'self'" if live else "'none'"
    policy = [
        "default-src 'none'",
        f"script-src {' '.join(_hash(script) for script in scripts)}",
        "style-src 'unsafe-inline'",  # plotly writes rules and attributes of its own
        "img-src data: blob:",
        f"connect-src {connect}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return _template().render(
        title=data["title"],
        policy="; ".join(policy),
        style=Markup(_asset("page.css")),
        scripts=[Markup(script) for script in scripts],
        data=Markup(embedded(data)),
        live=live,
    )


def embedded(data: Mapping[str, Any]) -> str:
    """JSON that may stand in an HTML element, whatever texts are in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def usual_axis(groups: Sequence[RunGroup]) -> str:
    """Generated tokens, or processed ones where a run generates none."""
    done = [run for group in groups for run in group.runs if run.steps]
    return "generated" if all(run.spent["generated"][-1] > 0 for run in done) else "processed"


def usual_title(groups: Sequence[RunGroup]) -> str:
    """What a page is called that nobody gave a title: by its first groups."""
    labels, others = [group.label for group in groups[:MOST_NAMED]], len(groups) - MOST_NAMED
    return ", ".join(labels) + (f" and {others} more" if others > 0 else "")


def summary(groups: Sequence[RunGroup]) -> Table:
    """A line for each group: where it began, where it is, and what that cost; means over its seeds."""
    columns = ["Run", "Method", "Seeds", "Steps", "Accuracy", "Reward", *(AXES[measure] for measure in MEASURES)]
    columns += ["Without a score", "State"]
    rows: list[list[Cell]] = []
    for group in groups:
        rows.append(
            [
                group.label,
                ", ".join(dict.fromkeys(run.method for run in group.runs)),
                len(group.runs),
                _mean([run.steps for run in group.runs]),
                _before_and_after(group, "accuracy", ".1%"),
                _before_and_after(group, "reward", ".3f"),
                *(_mean([float(run.spent[measure][-1]) for run in group.runs]) for measure in MEASURES),
                sum(run.unscored for run in group.runs),
                _state(group),
            ]
        )
    return Table(
        "Summary",
        "Accuracy and reward of the center on held-out problems, before the first step and at the last evaluation, the "
        "reward of those problems that have a score; and what the steps spent, evaluations apart. With several seeds, "
        "their means; rollouts without a score are those of all of them.",
        columns,
        rows,
    )


def subtitle(runs: Sequence[RunData]) -> str:
    """How many runs there are, of which tasks and models."""
    if not runs:
        return "No run yet"
    tasks = dict.fromkeys(str(run.config["task"]["kind"]) for run in runs)
    models = dict.fromkeys(_model_name(run.config["model"]) for run in runs)
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return f"{count} · task: {', '.join(tasks)} · model: {', '.join(models)}"


def _model_name(model: Mapping[str, Any]) -> str:
    return str(model.get("source") or model["kind"]).rstrip("/").rpartition("/")[2]


def config_differences(groups: Sequence[RunGroup]) -> Table:
    """The fields in which runs differ, with the values of each group."""
    flat = [[_fields(run.config) for run in group.runs] for group in groups]
    everyone = [fields for group in flat for fields in group]
    names = dict.fromkeys(name for fields in everyone for name in fields)
    differing = [name for name in names if name != "name" and len({fields.get(name, "—") for fields in everyone}) > 1]
    rows = [
        [name, *(", ".join(dict.fromkeys(fields.get(name, "—") for fields in group)) for group in flat)]
        for name in differing
    ]
    text = "The fields in which the runs differ; a dash where a run has no such field." if rows else "There are none."
    return Table("Config differences", text, ["Field", *(group.label for group in groups)], rows)


def _failures(groups: Sequence[RunGroup]) -> Table:
    kinds = sorted({kind for group in groups for run in group.runs for kind in run.failures})
    rows: list[list[Cell]] = [
        [kind, *(sum(run.failures.get(kind, 0) for run in group.runs) for group in groups)] for kind in kinds
    ]
    text = (
        "Scores of training rollouts that were not given, by verifier, or part of a sum, and kind. A rollout of which "
        "only a part has none is scored by the others, unless that part failed."
    )
    return Table(
        "Failures", text if rows else "There are none.", ["Verifier: kind", *(group.label for group in groups)], rows
    )


def _state(group: RunGroup) -> str:
    states = Counter(
        "diverged" if run.diverged else "finished" if run.finished else "not finished" for run in group.runs
    )
    if len(states) == 1:
        return next(iter(states))
    return ", ".join(f"{count} {state}" for state, count in states.items() if state != "finished")


def _before_and_after(group: RunGroup, figure: str, form: str) -> str:
    evaluated = [run.evaluations for run in group.runs if run.evaluations]
    ends = [
        _mean([lines[end][figure] for lines in evaluated])
        for end in ((0, -1) if any(len(lines) > 1 for lines in evaluated) else (0,))
    ]
    return " → ".join(format(value, form) for value in ends if value is not None) or "–"


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _fields(config: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a config by their dotted names, as text."""
    stages = {str(number): stage for number, stage in enumerate(config.get("stages") or ())}
    fields = flat({**config, "stages": stages})
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields}


class _Arrays:
    """Arrays of numbers, each kept once: curves of a run share their axes."""

    def __init__(self) -> None:
        self.lists: list[list[float | None]] = []
        self._places: dict[bytes, int] = {}

    def place(self, values: Array) -> int:
        key = np.ascontiguousarray(values).tobytes()
        if key not in self._places:
            self._places[key] = len(self.lists)
            self.lists.append([_rounded(value) for value in values.tolist()])
        return self._places[key]


def _plot(plot: Plot, arrays: _Arrays) -> dict[str, Any]:
    variants = [
        {
            "key": variant.key or variant.name,
            "name": variant.name,
            "label": variant.label,
            "share": variant.share,
            "curves": [_curve(each, arrays) for each in variant.curves],
        }
        for variant in plot.variants
    ]
    return {"kind": "curves", "name": plot.name, "title": plot.title, "caption": plot.caption, "variants": variants}


def _curve(curve: Curve, arrays: _Arrays) -> dict[str, Any]:
    return {
        "label": curve.label,
        "style": curve.style,
        "points": _points(curve.points, arrays),
        "seeds": [{"label": run, "points": _points(points, arrays)} for run, points in curve.seeds],
    }


def _points(points: Mapping[str, Points], arrays: _Arrays) -> dict[str, list[Any]]:
    return {
        axis: [
            arrays.place(each.x),
            arrays.place(each.y),
            [[arrays.place(low), arrays.place(high)] for low, high in each.bands],
        ]
        for axis, each in points.items()
    }


def _bars(bars: Bars) -> dict[str, Any]:
    return {
        "kind": "bars",
        "name": bars.name,
        "title": bars.title,
        "caption": bars.caption,
        "unit": bars.unit,
        "labels": list(bars.labels),
        "parts": {part: [_rounded(value) for value in values] for part, values in bars.parts.items()},
    }


def _rounded(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() else short


def _finite(cell: Cell) -> Cell:
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


@cache
def _asset(name: str) -> str:
    return files("es_engine.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    return Environment(loader=PackageLoader("es_engine.report", ""), autoescape=True).get_template("page.html")
