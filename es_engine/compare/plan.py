"""What a comparison has to run: first the trials of the grids, then the winners on all seeds.

A comparison's folder:

    comparison.yaml         what is compared
    inputs.json             hashes of what its runs are made of: data sets, models, adapters
    before.json             what is scored at the other tasks before training
    tuning/RUN/trial-02/    a run folder for each trial of a grid, evaluated on the validation split
    runs/RUN/seed-1/        a run folder for each final run, evaluated on the test split, with its measures.json

A run folder has a diverged.json where training diverged: a trial ends there without a score, a final run is evaluated
and measured as it is.

What is done is told from the folders alone, so a comparison that was killed goes on where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from es_engine.compare.held_out import held_out_scores
from es_engine.config import ComparisonConfig, Config, dump_comparison, load_comparison
from es_engine.config.base import in_yaml
from es_engine.config.comparison import Setting
from es_engine.data import Fingerprints
from es_engine.ledger import innermost_difference
from es_engine.methods.shaping import with_lowest
from es_engine.run_folder import RunFolder, is_free, refuse_no_place, refuse_ways_out, write_text
from rewards.base import Task

Purpose = Literal["tuning", "final"]
Stage = Literal["absent", "begun", "trained", "finished"]

MEASURES_FILE = "measures.json"
CONFIG_FILE = "comparison.yaml"
INPUTS_FILE = "inputs.json"
BEFORE_FILE = "before.json"
"""What is scored at the other tasks where training starts: at the base model, or at each `space.init`."""
MOST_REPEATED = 0.05
"""The share of test problems that may be the same as others."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run to be made. `folder` is relative to that of the comparison; `number` counts the settings of the run's
    grid from 1; `setting` is what the grid gives its fields."""

    run: str
    purpose: Purpose
    number: int
    setting: Setting
    folder: Path
    config: Config

    def stage(self, comparison_folder: Path) -> Stage:
        """How far it is: without a run folder, begun (it is to be resumed), trained to its end, or finished, which for
        a final run means with its measures."""
        run = RunFolder(comparison_folder / self.folder)
        if not run.config_file.is_file():
            return "absent"
        if self.purpose == "tuning" and self.diverged(comparison_folder):
            return "finished"
        if not run.adapter.is_dir():  # the last thing that training leaves
            return "begun"
        return "trained" if self.purpose == "final" and not (run.path / MEASURES_FILE).is_file() else "finished"

    def diverged(self, comparison_folder: Path) -> bool:
        """Whether its training led to numbers that are not finite."""
        return RunFolder(comparison_folder / self.folder).diverged_file.is_file()


@dataclass(frozen=True, slots=True)
class Choice:
    """The setting of a run's grid that is taken to the final runs, and the number of its trial."""

    number: int
    setting: Setting


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What a trial of a grid reached on the validation split, of so many different problems, at the end of training.
    One that diverged was asked none; scores are None where there is none."""

    trial: Trial
    problems: int | None
    reward: float | None
    accuracy: float | None
    diverged: bool = False


def tuning_trials(comparison: ComparisonConfig) -> list[Trial]:
    """The trials of all grids; none where every run has a single setting."""
    if not comparison.tunes:
        return []
    return [
        Trial(
            run,
            "tuning",
            number,
            setting,
            Path("tuning") / run / f"trial-{number:02d}",
            comparison.trial(run, number),
        )
        for run in comparison.runs
        for number, setting in enumerate(comparison.settings(run), start=1)
    ]


def final_trials(comparison: ComparisonConfig, choices: Mapping[str, Choice]) -> list[Trial]:
    """The final runs, seed by seed."""
    return [
        Trial(
            run,
            "final",
            choices[run].number,
            choices[run].setting,
            Path("runs") / run / f"seed-{seed}",
            comparison.final(run, choices[run].setting, seed),
        )
        for seed in comparison.seeds
        for run in comparison.runs
    ]


def pending(comparison: ComparisonConfig, folder: Path) -> list[Trial]:
    """What can be run now and is not finished: trials of the grids, or after them the final runs; empty at the end."""
    tuning = [trial for trial in tuning_trials(comparison) if trial.stage(folder) != "finished"]
    if tuning:
        return tuning
    final = final_trials(comparison, choose(comparison, folder))
    return [trial for trial in final if trial.stage(folder) != "finished"]


def tuning_results(comparison: ComparisonConfig, folder: Path) -> dict[str, list[TrialResult]]:
    """What each trial of each grid reached; nothing where there are no grids. A problem without a score has the lowest
    reward that any trial got. Raises ValueError if one is not finished."""
    trials = tuning_trials(comparison)
    for trial in trials:
        if trial.stage(folder) != "finished":
            raise ValueError(
                f"{folder / trial.folder}: this trial is not finished; run the comparison again to continue it"
            )
    ended = [trial for trial in trials if not trial.diverged(folder)]
    scores = [held_out_scores(RunFolder(folder / trial.folder)) for trial in ended]
    rewards = with_lowest(*(each for each, _ in scores))
    found = {
        trial.folder: TrialResult(
            trial,
            raw.shape[1],
            None if np.isnan(raw).all() else float(filled[-1].mean()),
            None if accuracy is None else float(accuracy[-1].mean()),
        )
        for trial, (raw, accuracy), filled in zip(ended, scores, rewards, strict=True)
    }
    results: dict[str, list[TrialResult]] = {}
    for trial in trials:
        result = found.get(trial.folder, TrialResult(trial, None, None, None, diverged=True))
        results.setdefault(trial.run, []).append(result)
    return results


def choose(comparison: ComparisonConfig, folder: Path) -> dict[str, Choice]:
    """The setting of each run with the best mean reward on the validation split at the end of training; accuracy
    decides between equals, then the order of the grid. One that diverged is chosen only if all did.

    Raises ValueError if a trial is not finished.
    """
    if not comparison.tunes:
        return {run: Choice(1, comparison.settings(run)[0]) for run in comparison.runs}
    return {
        run: Choice(best.trial.number, best.trial.setting)
        for run, results in tuning_results(comparison, folder).items()
        for best in [max(results, key=_merit)]
    }


def _merit(result: TrialResult) -> tuple[bool, float, float]:
    reward, accuracy = (-math.inf if value is None else value for value in (result.reward, result.accuracy))
    return not result.diverged, reward, accuracy


def open_folder(comparison: ComparisonConfig, folder: Path) -> None:
    """Begin a comparison's folder, or check that it is this comparison's; seeds and thresholds may have changed, and
    all of it where no run has begun.

    Raises ValueError if it holds another comparison, or something else.
    """
    file = folder / CONFIG_FILE
    refuse_no_place(folder)
    if file.is_file():
        refuse_ways_out(folder)
        free = {"seeds": comparison.seeds, "thresholds": comparison.thresholds}
        if not _has_begun(folder):
            (folder / BEFORE_FILE).unlink(missing_ok=True)  # of the comparison that it was to be
        elif (held := load_comparison(file).model_copy(update=free)) != comparison:
            where, there, here = innermost_difference(held.model_dump(mode="json"), comparison.model_dump(mode="json"))
            raise ValueError(
                f"{folder}: it holds another comparison, whose {where} is {in_yaml(there)} and not {in_yaml(here)}; "
                "give another folder"
            )
    elif not is_free(folder, CONFIG_FILE):
        raise ValueError(f"{folder}: it exists and holds no comparison; give another folder")
    write_text(file, dump_comparison(comparison))


def known_inputs(folder: Path) -> Fingerprints:
    """Hashes of what the runs of a comparison are made of, so that those to come are made of the same; nothing where
    none has begun. Raises ValueError, naming the file, if it holds no such thing."""
    file = folder / INPUTS_FILE
    if not (_has_begun(folder) and file.is_file()):
        return {}
    try:
        return TypeAdapter(Fingerprints).validate_json(file.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{file}: accepted is a JSON object of hashes by name; it was damaged, remove it") from error


def keep_inputs(folder: Path, inputs: Fingerprints) -> None:
    """Have `known_inputs` find these."""
    write_text(folder / INPUTS_FILE, json.dumps(inputs, indent=2) + "\n")


def _has_begun(folder: Path) -> bool:
    return any((folder / part).exists() for part in ("tuning", "runs"))


def check_splits(comparison: ComparisonConfig) -> None:
    """Raises ValueError for a task of too few held-out problems: where test problems would come again and again, or a
    validation problem would also be a test problem; and for another task that cannot be."""
    run = next(iter(comparison.runs))
    trial, final = comparison.trial(run, 1), comparison.final(run, comparison.settings(run)[0], comparison.seeds[0])
    task = trial.task.build()
    _refuse_repeated(task, final.evaluation.numbers)
    if comparison.tunes:
        _refuse_shared(task, final.evaluation.numbers, trial.evaluation.numbers)
    for name, other in comparison.other_tasks.items():
        with errors_of_other_task(name):
            other.build()


@contextmanager
def errors_of_other_task(name: str) -> Iterator[None]:
    """Inside, what is wrong with another task is told with its place in the comparison."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("task"):
            raise
        raise ValueError(f"other_tasks.{name}{str(error).removeprefix('task')}") from error


def _refuse_repeated(task: Task, test: range) -> None:
    """Each is asked once, so that there would be fewer than the config says; a few less by chance do no harm."""
    repeated = len(test) - len({task.example("heldout", number).problem for number in test})
    if repeated > MOST_REPEATED * len(test):
        raise ValueError(
            f"run.evaluation.problems: got {len(test)}, but {repeated} of these held-out problems are the same as "
            "others: the task has too few"
        )


def _refuse_shared(task: Task, test: range, validation: range) -> None:
    known = {task.example("heldout", number).problem: number for number in test}
    for number in validation:
        shared = known.get(task.example("heldout", number).problem)
        if shared is not None:
            raise ValueError(
                f"tuning.problems: got {len(validation)}, but held-out problem {number}, a validation problem, is the "
                f"same as number {shared}, a test problem: the task has too few held-out problems for "
                f"{len(test)} (evaluation.problems) and {len(validation)} others"
            )
