"""What a finished run of a comparison left in its folder, as numbers.

Shapes: E evaluations, P held-out problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from es_engine.compare.held_out import held_out_scores
from es_engine.compare.measures import Measures, read_measures
from es_engine.compare.plan import Trial
from es_engine.costs import Costs
from es_engine.ledger import Line, running_costs
from es_engine.methods.shaping import with_lowest
from es_engine.run_folder import RunFolder

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished final run.

    `steps`, `costs`, `rewards` (E, P) and `accuracy` (E, P; None where the task knows no right and wrong) are those of
    its held-out evaluations: the first is before training, the last after it. The reward of a problem without a score
    is NaN, until `with_one_floor` has filled it. `evaluating` are the costs of the evaluations, which count against no
    budget; `seconds` are those of all steps by the clock. `failed` is the share of training rollouts without a score;
    `constant` that of the groups (of ES, the members) whose rewards are all equal or missing; both are None for methods
    without rollouts. One that `diverged` ended early: its last evaluation is where its last step had led.
    """

    trial: Trial
    diverged: bool
    steps: tuple[int, ...]
    costs: tuple[Costs, ...]
    rewards: Array
    accuracy: Array | None
    evaluating: Costs
    seconds: float
    failed: float | None
    constant: float | None
    measures: Measures

    @property
    def spent(self) -> Costs:
        """What training cost."""
        return self.costs[-1]

    @property
    def best(self) -> int:
        """Which evaluation had the highest mean reward, the first of equals."""
        return int(np.argmax(self.rewards.mean(axis=1)))


def read_outcome(trial: Trial, comparison_folder: Path) -> Outcome:
    """The outcome of a final run. Raises ValueError, naming its folder, if it is not finished."""
    if trial.stage(comparison_folder) != "finished":
        raise ValueError(f"{comparison_folder / trial.folder}: this run is not finished; run the comparison again")
    folder = RunFolder(comparison_folder / trial.folder)
    lines = folder.open_ledger().generations
    evaluations = folder.open_evaluations().lines
    spent = running_costs(lines)
    rewards, accuracy = held_out_scores(folder)
    return Outcome(
        trial=trial,
        diverged=trial.diverged(comparison_folder),
        steps=tuple(line["step"] for line in evaluations),
        costs=tuple(spent[line["step"]] for line in evaluations),
        rewards=rewards,
        accuracy=accuracy,
        evaluating=sum((Costs.from_json(line["costs"]) for line in evaluations), Costs()),
        seconds=float(sum(line["times"]["total"] for line in lines)),
        failed=_failed(lines),
        constant=_constant(lines),
        measures=read_measures(folder.path),
    )


def with_one_floor(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Outcomes in which a problem without a score has the lowest reward that any of them got: with floors of their own,
    the run whose scored answers were the better would gain by each that it has not."""
    filled = with_lowest(*(each.rewards for each in outcomes))
    return [replace(each, rewards=rewards) for each, rewards in zip(outcomes, filled, strict=True)]


def _failed(lines: Sequence[Line]) -> float | None:
    rollouts = sum(line["rollouts"] for line in lines)
    return sum(line.get("unscored", 0) for line in lines) / rollouts if rollouts else None


def _constant(lines: Sequence[Line]) -> float | None:
    """Groups of one completion do not count: they are constant whatever it is."""
    grouped = [line for line in lines if any(len(group) > 1 for group in line.get("rewards", []))]
    groups = sum(len(line["rewards"]) for line in grouped)
    constant = sum(line["constant_groups" if "constant_groups" in line else "constant_members"] for line in grouped)
    return constant / groups if groups else None
