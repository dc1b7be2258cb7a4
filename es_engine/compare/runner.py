"""Run a comparison on one pool, which is turned from run to run.

What has been done is told from the comparison's folder, so it can be stopped at any instant: begun again, it goes on
with the run that was under way and repeats none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from es_engine.compare.measures import Scores, write_measures
from es_engine.compare.measuring import measure, measure_other_tasks
from es_engine.compare.plan import (
    BEFORE_FILE,
    Trial,
    check_splits,
    choose,
    final_trials,
    keep_inputs,
    known_inputs,
    open_folder,
    pending,
)
from es_engine.compare.progress import Progress
from es_engine.compare.summary import summarise
from es_engine.compare.tables import details, results, tables
from es_engine.compare.writers import print_tables, write_results
from es_engine.config import ComparisonConfig, Config, on_other_task
from es_engine.past import Stages, present_stage, restore
from es_engine.report import RunData, RunGroup, read_run, write_report
from es_engine.run_folder import RunFolder, write_text
from es_engine.run_lock import locked
from es_engine.session import Session
from es_engine.telemetry import check_places
from es_engine.trainer import Notices, begin, conclude, go_on
from workers.divergence import Diverged

REPORT = "report.html"


def compare(comparison: ComparisonConfig, folder: Path | str | None = None) -> Path:
    """Run whatever is not finished of a comparison in its folder (default: comparisons/NAME), write its tables and its
    report, and print the tables. Raises ValueError for bad input."""
    folder = Path(folder) if folder is not None else Path("comparisons") / comparison.name
    check_splits(comparison)
    open_folder(comparison, folder)
    if pending(comparison, folder):
        with locked(folder):
            _run(comparison, folder)
    summary = summarise(comparison, folder)
    write_results(summary, folder)
    write_report(
        folder / REPORT,
        _groups(comparison, folder),
        title=comparison.name,
        tables=results(summary),
        details=details(summary),
        over=summary["measure"],
    )
    print_tables(tables(summary), Console())
    return folder


def _run(comparison: ComparisonConfig, folder: Path) -> None:
    notices = Notices()
    first, *others = configs = _every_config(comparison)
    for telemetry in {config.telemetry for config in configs}:
        check_places(telemetry)
    console, progress = Console(), Progress(comparison, folder)
    with Session(first, notices, others, gradients=True, inputs=known_inputs(folder)) as session:
        keep_inputs(folder, session.inputs)
        if comparison.other_tasks:  # now, so that one that cannot be measured is known before hours of training
            run = next(iter(comparison.runs))
            final = comparison.final(run, comparison.settings(run)[0], comparison.seeds[0])
            _scores_before(session, comparison, final.by_stage[0], folder / BEFORE_FILE)
        for trial in _until_done(comparison, folder):
            console.print(progress.title(trial), markup=False, highlight=False)
            started = time.monotonic()
            _train(session, trial, folder, notices, console)
            if trial.purpose == "final":
                _measure(session, comparison, trial, folder)
            progress.done(trial, time.monotonic() - started)


def _until_done(comparison: ComparisonConfig, folder: Path) -> Iterator[Trial]:
    """What is to be run, one after the other; the final runs are known when the grids are done."""
    while todo := pending(comparison, folder):
        yield from todo


def _every_config(comparison: ComparisonConfig) -> list[Config]:
    """Everything that the pool may have to serve, apart from seeds."""
    stages = [
        stage
        for run in comparison.runs
        for number in range(1, 1 + len(comparison.settings(run)))
        for stage in comparison.trial(run, number).by_stage
    ]
    return [*stages, *(on_other_task(stages[0], task) for task in comparison.other_tasks.values())]


def _train(session: Session, trial: Trial, folder: Path, notices: Notices, console: Console) -> None:
    """Train a trial to its end, from wherever it is; the session serves its last stage then. Where training diverges,
    that is the end."""
    run = RunFolder(folder / trial.folder)
    if not trial.diverged(folder):
        try:
            _go_on(session, trial, folder, notices)
            return
        except Diverged as error:
            console.print(str(error), markup=False, highlight=False)
            write_text(run.diverged_file, json.dumps({"reason": str(error)}) + "\n")
    if trial.purpose == "final":
        with locked(run.path):
            session.turn_to(present_stage(run))
            if not run.adapter.is_dir():
                conclude(session, run, notices)


def _go_on(session: Session, trial: Trial, folder: Path, notices: Notices) -> None:
    run = RunFolder(folder / trial.folder)
    match trial.stage(folder):
        case "absent":
            session.turn_to(trial.config.by_stage[0])
            begin(session, trial.config, run, notices)
        case "begun":
            with locked(run.path):
                session.turn_to(present_stage(run))
                go_on(session, run, notices)
        case _:
            session.turn_to(present_stage(run))


def _measure(session: Session, comparison: ComparisonConfig, trial: Trial, folder: Path) -> None:
    run, config = RunFolder(folder / trial.folder), session.materials.config
    theta = restore(Stages(run.load_config(), session.materials), run, run.open_ledger()).theta
    before = _scores_before(session, comparison, config, folder / BEFORE_FILE)
    write_measures(run.path, measure(session, comparison, theta, before))


def _groups(comparison: ComparisonConfig, folder: Path) -> list[RunGroup]:
    """The final runs as the report shows them: the seeds of each run together, under its name."""
    found: dict[str, list[RunData]] = {}
    for trial in final_trials(comparison, choose(comparison, folder)):
        found.setdefault(trial.run, []).append(read_run(folder / trial.folder))
    return [RunGroup(run, tuple(each)) for run, each in found.items()]


def _scores_before(session: Session, comparison: ComparisonConfig, config: Config, file: Path) -> dict[str, Scores]:
    """What is scored at the other tasks where a run's training starts: found once, and kept in a file. The session
    serves the run again afterwards."""
    known = json.loads(file.read_text()) if file.is_file() else {}
    start = config.space.init or "the base model"
    if start not in known:
        found = measure_other_tasks(session, comparison, config, None)
        session.turn_to(config)
        known[start] = {name: scores.model_dump() for name, scores in found.items()}
        write_text(file, json.dumps(known, indent=2) + "\n")
    return {name: Scores.model_validate(scores) for name, scores in known[start].items()}
