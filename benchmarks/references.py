"""Whether the reference answers of data sets verify as right, each put into its template's form.

For maths, further columns count how references are read (see rewards.answers.reading), and how many of those read as
algebra math-verify finds equal to themselves. Those of which only the very text is right are listed.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import cast, get_args

from rich.console import Console
from rich.table import Table

from rewards.answers import Reading, equal_by_algebra, reading
from rewards.arc import Arc, read_folder
from rewards.base import Example, Rollout, Split, judge_now
from rewards.math_data import Dataset, read_rows
from rewards.maths import Maths, Template

CONSOLE = Console(width=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", metavar="DATASET=PATH", help="such as gsm8k=test.jsonl or arc=training")
    table = Table(title="References")
    for column in ("data set", "file", "rows", "right", *get_args(Reading), "equal"):
        table.add_column(column, justify="left" if column in ("data set", "file") else "right")
    for source in parser.parse_args().sources:
        name, _, path = source.partition("=")
        cells = arc_cells(Path(path)) if name == "arc" else maths_cells(cast(Dataset, name), path)
        table.add_row(name, Path(path).name, *cells)
    CONSOLE.print(table)


def arc_cells(folder: Path) -> list[str]:
    rows = read_folder(folder, "task.data")
    return [str(len(rows)), f"{right(Arc(data=folder)) / len(rows):.2%}"]


def maths_cells(dataset: Dataset, path: str) -> list[str]:
    references = [row["answer"] for row in read_rows(path, "task.data", dataset)]
    tasks = [Maths(data=path, dataset=dataset, template=template) for template in get_args(Template)]
    share = min(right(task) for task in tasks) / len(references)
    read: dict[Reading, list[str]] = {kind: [] for kind in get_args(Reading)}
    for reference in references:
        read[reading(reference)].append(reference)
    for reference in read["text"]:
        CONSOLE.print(f"{dataset}, only this very text is right: {reference!r}", markup=False, highlight=False)
    unequal = [reference for reference in read["algebra"] if not equal_by_algebra(reference, reference)]
    for reference in unequal:
        CONSOLE.print(f"{dataset}, not found equal to itself: {reference!r}", markup=False, highlight=False)
    counts = [*map(len, read.values()), len(read["algebra"]) - len(unequal)]
    return [str(len(references)), f"{share:.2%}", *map(str, counts)]


def right(task: Maths | Arc) -> int:
    """The problems of both splits whose worked solution gets the whole reward."""
    verifier = task.verifier.load()
    count = 0
    for example in everything(task):
        completion = task.worked_solution(example)
        (score,) = judge_now(verifier, [Rollout("", completion, example.answer, example.info)], asyncio.run)
        count += score.accuracy == 1 and score.value == 1
    return count


def everything(task: Maths | Arc) -> Iterator[Example]:
    """Each problem of a task once: a split's stream up to where it begins again."""
    for split in get_args(Split):
        seen: set[str] = set()
        while (example := task.example(split, len(seen))).id not in seen:
            seen.add(example.id)
            yield example


if __name__ == "__main__":
    main()
