"""A finished comparison as plain data: what comparison.json holds and all tables are made from.

Shapes: S seeds, P problems, E evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from es_engine.compare.measures import BeforeAndAfter, Scores
from es_engine.compare.outcome import Outcome, read_outcome, with_one_floor
from es_engine.compare.plan import Choice, TrialResult, choose, final_trials, tuning_results
from es_engine.compare.statistics import (
    Interval,
    area,
    cost_to_reach,
    difference,
    holm,
    mean_interval,
    median_cost,
    share_interval,
    value_at,
)
from es_engine.config import ComparisonConfig, Config
from es_engine.costs import Measure
from es_engine.evaluation import pass_at_k
from es_engine.methods.shaping import with_lowest
from es_engine.report.data import method_name

Array = npt.NDArray[np.float64]
Data = dict[str, Any]

LIMITS = {
    "tokens": "generated",
    "processed_tokens": "processed",
    "flops": "flops",
    "worker_seconds": "worker_seconds",
    "generations": "steps",
}
"""For each limit of a budget, what of a run it limits. Curves go over the first of these that the budget has."""
MEASURES = tuple(LIMITS.values())
PAIRED = ("accuracy_final", "reward_final")
"""The figures by which every two runs are compared."""


def summarise(comparison: ComparisonConfig, folder: Path) -> Data:
    """Everything about a comparison whose runs are all finished, as JSON can write it: the same for the same folders.

    Raises ValueError, naming a run that is not finished.
    """
    choices = choose(comparison, folder)
    trials = tuning_results(comparison, folder)
    read = [read_outcome(trial, folder) for trial in final_trials(comparison, choices)]
    filled = with_one_floor(read)
    outcomes = {run: [each for each in filled if each.trial.run == run] for run in comparison.runs}
    limit = next(name for name in LIMITS if getattr(comparison.budget, name) is not None)
    measure, budget = LIMITS[limit], float(getattr(comparison.budget, limit))
    sampled = any(each.measures.sampled.correct is not None for those in outcomes.values() for each in those)
    tables = {
        run: _score_tables(those, measure, budget) | (_pass_tables(those) if sampled else {})
        for run, those in outcomes.items()
    }
    others = {name: _other_task(outcomes, name) for name in comparison.other_tasks}
    return {
        "name": comparison.name,
        "budget": comparison.budget.model_dump(exclude_none=True),
        "measure": measure,
        "seeds": list(comparison.seeds),
        "problems": next(iter(tables.values()))["reward_final"].shape[1],
        "floor": _floor(read, filled),
        "tuning": _tuning(comparison, trials) if comparison.tunes else None,
        "samples": comparison.samples.model_dump(),
        "runs": {
            run: _run_data(
                comparison, run, outcomes[run], tables[run], {name: found[run] for name, found in others.items()}
            )
            for run in comparison.runs
        },
        "pairs": [pair for figure in PAIRED for pair in _pairs(tables, figure)],
        "equal_costs": {each: _equal_cost(outcomes, each) for each in get_args(Measure)},
        "grids": _grids(trials, choices),
    }


def _floor(outcomes: Sequence[Outcome], filled: Sequence[Outcome]) -> float | None:
    """The reward that stands for those that are missing, None where none is."""
    missing = any(np.isnan(each.rewards).any() for each in outcomes)
    return float(min(each.rewards.min() for each in filled)) if missing else None


def _run_data(
    comparison: ComparisonConfig,
    run: str,
    outcomes: Sequence[Outcome],
    tables: Mapping[str, Array],
    other_tasks: Mapping[str, Data],
) -> Data:
    trial = outcomes[0].trial
    return {
        "method": method_name(trial.config.model_dump(mode="json")),
        "trial": trial.number,
        "setting": trial.setting,
        "own_budget": _own_budget(comparison, run, trial.config),
        "stage_budgets": [stage.budget.model_dump(exclude_none=True) for stage in trial.config.stages],
        "diverged": [each.trial.config.seed for each in outcomes if each.diverged],
        "figures": {name: _interval(table, _kind_of_interval(name)) for name, table in tables.items()},
        "observed": _observed(outcomes),
        "spent": {measure: _range([_costs(each, measure)[-1] for each in outcomes]) for measure in MEASURES},
        "evaluating": {
            name: _range([getattr(each.evaluating, name) for each in outcomes]) for name in get_args(Measure)
        },
        "thresholds": _thresholds(outcomes, comparison.thresholds),
        "other_tasks": dict(other_tasks),
        "curves": [_curve(each) for each in outcomes],
    }


def _own_budget(comparison: ComparisonConfig, run: str, config: Config) -> Data:
    """The limits of a run beside those of all; each of its stages has its own instead."""
    own = {} if config.stages else comparison.runs[run].get("budget", {})
    return {name: most for name, most in own.items() if most is not None}


def _kind_of_interval(figure: str) -> Callable[[Array], Interval]:
    """Rewards may be any numbers; all else is from 0 to 1."""
    return mean_interval if figure.startswith("reward") else share_interval


def _score_tables(outcomes: Sequence[Outcome], measure: str, budget: float) -> dict[str, Array]:
    """The figures that every seed and problem has a part in, by name, (S, P)."""
    tables: dict[str, Array] = {}
    for name, those in _score_curves(outcomes).items():
        tables[f"{name}_before"] = np.stack([curve[0] for curve in those])
        tables[f"{name}_final"] = np.stack([curve[-1] for curve in those])
        tables[f"{name}_best"] = np.stack([curve[each.best] for each, curve in zip(outcomes, those, strict=True)])
        tables[f"{name}_area"] = np.stack(
            [area(_costs(each, measure), curve, budget) for each, curve in zip(outcomes, those, strict=True)]
        )
    return tables


def _score_curves(outcomes: Sequence[Outcome]) -> dict[str, list[Array]]:
    """Of each score that all outcomes have, their curves (E, P)."""
    curves = {"reward": [each.rewards for each in outcomes]}
    accuracy = [each.accuracy for each in outcomes if each.accuracy is not None]
    return {"accuracy": accuracy, **curves} if len(accuracy) == len(outcomes) else curves


def _pass_tables(outcomes: Sequence[Outcome]) -> dict[str, Array]:
    """pass@k of each problem for powers of two up to the samples there are; a seed without any verdict has no right
    answer."""
    sampled = [each.measures.sampled for each in outcomes]
    correct = [each.measures.sampled.correct or np.zeros(each.rewards.shape[1], dtype=np.int64) for each in outcomes]
    n = min(each.samples for each in sampled)
    powers = [2**power for power in range(n.bit_length())]
    return {
        f"pass@{k}": np.array(
            [
                [pass_at_k(np.array([c]), each.samples, k) for c in those]
                for each, those in zip(sampled, correct, strict=True)
            ]
        )
        for k in powers
    }


def _interval(table: Array, interval: Callable[[Array], Interval]) -> Data:
    found = interval(table)
    ends = {"low": _number(found.low), "high": _number(found.high)}
    return {"mean": float(found.mean), **ends, "seeds": table.mean(axis=1).tolist()}


def _number(value: Array | float) -> float | None:
    return None if math.isnan(value) else float(value)


def _observed(outcomes: Sequence[Outcome]) -> Data:
    """What is known of each seed as a whole."""
    divergences = [each.measures.kl for each in outcomes]
    figures: dict[str, list[float | None]] = {
        "kl_per_token": [None if kl is None else kl.per_token for kl in divergences],
        "kl_per_completion": [None if kl is None else kl.per_completion for kl in divergences],
        "delta_norm": [each.measures.delta.absolute for each in outcomes],
        "delta_relative": [each.measures.delta.relative for each in outcomes],
        "failed": [each.failed for each in outcomes],
        "constant": [each.constant for each in outcomes],
        "seconds": [each.seconds for each in outcomes],
    }
    return {name: _range(values) for name, values in figures.items()}


def _range(values: Sequence[float | None]) -> Data:
    """The mean, the least and the most over the seeds that have a value, and all values."""
    known = [value for value in values if value is not None]
    mean, least, most = (sum(known) / len(known), min(known), max(known)) if known else (None, None, None)
    return {"mean": mean, "least": least, "most": most, "seeds": list(values)}


def _costs(outcome: Outcome, measure: str) -> list[float]:
    """What the run had spent by each of its evaluations."""
    if measure == "steps":
        return [float(step) for step in outcome.steps]
    return [float(getattr(costs, measure)) for costs in outcome.costs]


def _thresholds(outcomes: Sequence[Outcome], thresholds: Sequence[float]) -> list[Data]:
    found = []
    for threshold in thresholds:
        curves = [(each, each.accuracy.mean(axis=1).tolist()) for each in outcomes if each.accuracy is not None]
        costs = {
            measure: [cost_to_reach(_costs(each, measure), curve, threshold) for each, curve in curves]
            for measure in MEASURES
        }
        reached = sum(cost is not None for cost in costs["steps"])
        medians = {measure: median_cost(those) if those else None for measure, those in costs.items()}
        found.append({"accuracy": threshold, "reached": reached, "costs": medians})
    return found


def _other_task(outcomes: Mapping[str, Sequence[Outcome]], name: str) -> Data:
    """Of each run, held-out ability at another task: accuracy, or reward where no run has any verdict."""
    both = {run: [each.measures.other_tasks[name] for each in those] for run, those in outcomes.items()}
    scores = [each for those in both.values() for pair in those for each in (pair.before, pair.after)]
    by_accuracy = any(each.accuracy is not None for each in scores)
    found = with_lowest(*(_before_and_after(those, by_accuracy) for those in both.values()))
    return {run: _change(before, after, by_accuracy) for run, (before, after) in zip(both, found, strict=True)}


def _before_and_after(both: Sequence[BeforeAndAfter], by_accuracy: bool) -> Array:
    """Ability (2, S, P), NaN where there is none."""
    return np.array([[_of_task(getattr(each, when), by_accuracy) for each in both] for when in ("before", "after")])


def _change(before: Array, after: Array, by_accuracy: bool) -> Data:
    """Ability (S, P) before and after, and the change, paired over problems."""
    interval = share_interval if by_accuracy else mean_interval
    return {
        "figure": "accuracy" if by_accuracy else "reward",
        "problems": before.shape[1],
        "before": _interval(before, interval),
        "after": _interval(after, interval),
        "change": _interval(after - before, mean_interval),
    }


def _of_task(scores: Scores, by_accuracy: bool) -> Array:
    if by_accuracy:  # without any verdict no answer is right
        return np.array(scores.accuracy or np.zeros(len(scores.rewards)), dtype=np.float64)
    return np.array(scores.rewards, dtype=np.float64)  # None becomes NaN


def _curve(outcome: Outcome) -> Data:
    """The held-out means of each evaluation over what had been spent by then."""
    costs = {measure: _costs(outcome, measure) for measure in MEASURES}
    accuracy = None if outcome.accuracy is None else outcome.accuracy.mean(axis=1).tolist()
    return {**costs, "reward": outcome.rewards.mean(axis=1).tolist(), "accuracy": accuracy}


def _equal_cost(outcomes: Mapping[str, Sequence[Outcome]], measure: str) -> Data:
    """The held-out scores of all runs that spend of a measure, when each has spent as much of it as the seed that spent
    least. One that diverged is not that seed: it ended early, and its curve goes on level, as for its area."""
    ends = {run: [_costs(each, measure)[-1] for each in those if not each.diverged] for run, those in outcomes.items()}
    amount = min((end for those in ends.values() for end in those if end > 0), default=None)
    if amount is None:
        return {"amount": None, "runs": {}}
    spending = {run: those for run, those in outcomes.items() if _spends(those, measure)}
    return {"amount": amount, "runs": {run: _scores_at(those, measure, amount) for run, those in spending.items()}}


def _spends(outcomes: Sequence[Outcome], measure: str) -> bool:
    """Whether a run spends of a measure; one of which no seed got through a step is not known to spend none."""
    return any(_costs(each, measure)[-1] > 0 for each in outcomes) or not any(each.steps[-1] for each in outcomes)


def _scores_at(outcomes: Sequence[Outcome], measure: str, cost: float) -> Data:
    tables = {
        score: np.stack(
            [value_at(_costs(each, measure), curve, cost) for each, curve in zip(outcomes, curves, strict=True)]
        )
        for score, curves in _score_curves(outcomes).items()
    }
    return {score: _interval(table, _kind_of_interval(score)) for score, table in tables.items()}


def _pairs(tables: Mapping[str, Mapping[str, Array]], figure: str) -> list[Data]:
    """Every two runs by a figure that all have: the second minus the first, with p values adjusted over all pairs."""
    if any(figure not in those for those in tables.values()):
        return []
    found: list[Data] = []
    for one, other in combinations(tables, 2):
        result = difference(tables[other][figure], tables[one][figure])
        numbers = {name: _number(getattr(result, name)) for name in ("low", "high", "p")}
        found.append({"figure": figure, "runs": [one, other], "difference": float(result.mean), **numbers})
    p_values = [pair["p"] for pair in found]
    adjusted = holm(p_values) if None not in p_values else p_values
    return [{**pair, "p_holm": p} for pair, p in zip(found, adjusted, strict=True)]


def _tuning(comparison: ComparisonConfig, trials: Mapping[str, Sequence[TrialResult]]) -> Data:
    """How the winners of the grids were picked; `problems` are different ones, each of which was asked once."""
    asked = (result.problems for results in trials.values() for result in results if result.problems is not None)
    return comparison.tuning.model_dump() | {"problems": next(asked, comparison.tuning.problems)}


def _grids(trials: Mapping[str, Sequence[TrialResult]], choices: Mapping[str, Choice]) -> Data:
    """What each trial of each grid reached on the validation split, and which one won."""
    return {
        run: [
            {
                "trial": result.trial.number,
                "setting": result.trial.setting,
                "reward": result.reward,
                "accuracy": result.accuracy,
                "diverged": result.diverged,
                "chosen": result.trial.number == choices[run].number,
            }
            for result in results
        ]
        for run, results in trials.items()
    }
