"""A comparison's files, all made from the same plain data, and its tables on the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from es_engine.compare.tables import NAMES, number, tables
from es_engine.report import Cell, Table
from es_engine.run_folder import write_text

Data = Mapping[str, Any]


def write_results(summary: Data, folder: Path) -> None:
    """Write comparison.json, comparison.csv and comparison.md: the same bytes for the same data."""
    write_text(folder / "comparison.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    write_text(folder / "comparison.csv", as_csv(summary))
    write_text(folder / "comparison.md", as_markdown(summary["name"], tables(summary)))


def as_csv(summary: Data) -> str:
    """A header, and a row for each run and seed."""
    rows = [_csv_row(summary, run, place) for run in summary["runs"] for place in range(len(summary["seeds"]))]
    columns = dict.fromkeys(column for row in rows for column in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_row(summary: Data, run: str, place: int) -> dict[str, Any]:
    data = summary["runs"][run]
    figures = {
        **data["figures"],
        **{name: data["spent"][name] for name in NAMES},
        **data["observed"],
        **{
            f"{task}_{each['figure']}_{when}": each[when]
            for task, each in data["other_tasks"].items()
            for when in ("before", "after")
        },
    }
    return {
        "run": run,
        "method": data["method"],
        "seed": summary["seeds"][place],
        "trial": data["trial"],
        "setting": json.dumps(data["setting"]),
        "diverged": summary["seeds"][place] in data["diverged"],
        **{name: figure["seeds"][place] for name, figure in figures.items()},
    }


def as_markdown(name: str, those: Sequence[Table]) -> str:
    """A page of a heading and tables."""
    return "\n\n".join([f"# {name}", *(_section(table) for table in those)]) + "\n"


def _section(table: Table) -> str:
    ruler = ["---", *("---:" for _ in table.columns[1:])]
    lines = [table.columns, ruler, *table.rows]
    grid = "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)
    return f"## {table.heading}\n\n{table.text}\n\n{grid}"


def _cell(value: Cell) -> str:
    return _text(value).replace("|", "\\|").replace("\n", " ")


def _text(value: Cell) -> str:
    return value if isinstance(value, str) else number(value)


def print_tables(those: Sequence[Table], console: Console) -> None:
    """Show tables on a terminal."""
    for table in those:
        shown = RichTable(title=Text(table.heading), title_justify="left", box=None, pad_edge=False)
        for column in table.columns:
            shown.add_column(Text(column), justify="left" if column == table.columns[0] else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*(Text(_text(cell)) for cell in row))
        console.print(shown)
        console.print(Text(table.text, style="dim"))
        console.print()
