"""A comparison's plain data as tables that a person reads: in Markdown, on the terminal, and in a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from es_engine.compare.summary import LIMITS
from es_engine.config.base import in_yaml
from es_engine.report import Cell, Table
from es_engine.report.data import AXES

Data = Mapping[str, Any]
Write = Callable[[float], str]

NAMES = {measure: name[0].lower() + name[1:] for measure, name in AXES.items()}
"""What a run spends, in words."""
NONE = "–"


def tables(summary: Data) -> list[Table]:
    """All tables of a comparison; those that would be empty are left out."""
    return [*results(summary), *details(summary)]


def results(summary: Data) -> list[Table]:
    """What a comparison is made for: how good the runs became, and which of them differ."""
    return _with_rows(_scores(summary, "accuracy"), _scores(summary, "reward"), _pairs(summary))


def details(summary: Data) -> list[Table]:
    """All other tables."""
    return _with_rows(
        _samples(summary),
        _spent(summary),
        _equal_costs(summary),
        _thresholds(summary),
        _distance(summary),
        _rollouts(summary),
        *_other_tasks(summary),
        *_grids(summary),
    )


def _with_rows(*made: Table) -> list[Table]:
    return [table for table in made if table.rows]


def _scores(summary: Data, score: str) -> Table:
    seeds, problems = len(summary["seeds"]), summary["problems"]
    text = (
        f"{problems} held-out problems, {_count(seeds, 'seed')}; each run ends after the step that reaches "
        f"{_limits(summary)}. {_intervals(summary)} Best is the evaluation with the highest reward, chosen on these "
        "same problems and so too good, the more so the more evaluations there were; area is the mean over the budget "
        f"of {NAMES[summary['measure']]}.{_level(summary)}{_diverged(summary)}"
    )
    if score == "reward":
        text += _floor(summary)
    columns = {f"{score}_{when}": when for when in ("before", "final", "best", "area")}
    return _of_runs(summary, f"Held-out {score}", text, columns if _has(summary, f"{score}_final") else {})


def _samples(summary: Data) -> Table:
    samples = summary["samples"]
    names = [name for run in summary["runs"].values() for name in run["figures"] if name.startswith("pass@")]
    text = (
        f"The final model's {_count(samples['n'], 'answer')} to each held-out problem at temperature "
        f"{samples['temperature']:g}: the probability that k of them hold a right one. {_intervals(summary)}"
    )
    return _of_runs(summary, "Sampled answers", text, {name: name for name in dict.fromkeys(names)})


def _of_runs(summary: Data, heading: str, text: str, columns: Mapping[str, str]) -> Table:
    """A row a run of the figures that are named, each with its interval."""
    if not columns:
        return Table(heading, text, [], [])
    rows = [
        [run, data["method"], *(_estimate(data["figures"].get(name)) for name in columns)]
        for run, data in summary["runs"].items()
    ]
    return Table(heading, text, ["run", "method", *columns.values()], rows)


def _has(summary: Data, figure: str) -> bool:
    return any(figure in run["figures"] for run in summary["runs"].values())


def _pairs(summary: Data) -> Table:
    text = (
        "One run minus another, with 95% intervals, paired over problems. p is the probability of a difference at "
        f"least as large between equal methods; Holm's is adjusted for the number of pairs.{_floor(summary)}"
    )
    if len(summary["seeds"]) == 1:
        text += " With one seed there is neither interval nor test."
    rows = [
        [
            f"{pair['runs'][1]} - {pair['runs'][0]}",
            "accuracy" if pair["figure"] == "accuracy_final" else "reward",
            _estimate({"mean": pair["difference"], **pair}, sign="+"),
            _p_value(pair["p"]),
            _p_value(pair["p_holm"]),
        ]
        for pair in summary["pairs"]
    ]
    return Table("Differences", text, ["runs", "final", "difference", "p", "p (Holm)"], rows)


def _spent(summary: Data) -> Table:
    text = (
        f"Each run ends after the step that reaches {_limits(summary)}. What its steps spent in all measures, "
        "evaluations and tuning apart, and how long they took; means over seeds."
        f"{_diverged(summary)}"
    )
    rows: list[list[Cell]] = [
        [
            run,
            *(data["spent"][measure]["mean"] for measure in NAMES),
            str(timedelta(seconds=round(data["observed"]["seconds"]["mean"]))),
        ]
        for run, data in summary["runs"].items()
    ]
    return Table("What the runs spent", text, ["run", *NAMES.values(), "wall time"], rows)


def _equal_costs(summary: Data) -> Table:
    score = "accuracy" if _has(summary, "accuracy_final") else "reward"
    text = (
        f"Held-out {score} of each run when it had spent as much as the seed that spent least, for each kind of cost, "
        f"on straight lines between evaluations. {_intervals(summary)} Runs that spend none of a kind have no figure "
        f"there.{_diverged(summary)}"
    )
    if summary["tuning"]:
        text += " Settings were picked for where the runs end, and not for these amounts."
    shown = {measure: each for measure, each in summary["equal_costs"].items() if len(each["runs"]) > 1}
    rows: list[list[Cell]] = [
        [run, *(_estimate(each["runs"].get(run, {}).get(score)) for each in shown.values())] for run in summary["runs"]
    ]
    columns = [f"{number(each['amount'])} {NAMES[measure]}" for measure, each in shown.items()]
    return Table("At equal cost", text, ["run", *columns], rows if shown else [])


def _limits(summary: Data) -> str:
    """Where runs end."""
    runs = summary["runs"].items()
    own = [f"{run} also {_budget(data['own_budget'])}" for run, data in runs if data["own_budget"]]
    staged = [
        f"{run} in stages of {' and then '.join(map(_budget, data['stage_budgets']))}"
        for run, data in runs
        if data["stage_budgets"]
    ]
    return ", ".join([_budget(summary["budget"]), *own, *staged])


def _level(summary: Data) -> str:
    """A sentence about the runs whose area says nothing of how they came to their ends; nothing where there is none."""
    found = [run for run, data in summary["runs"].items() if data["spent"][summary["measure"]]["most"] == 0]
    return f" It is the final height of runs that spend none: {', '.join(found)}." if found else ""


def _diverged(summary: Data) -> str:
    """A sentence about the final runs that diverged; nothing where none did."""
    found = [
        f"{run} (seed {', '.join(map(str, data['diverged']))})"
        for run, data in summary["runs"].items()
        if data["diverged"]
    ]
    return f" Diverged, and counted as they were after their last step: {', '.join(found)}." if found else ""


def _intervals(summary: Data) -> str:
    return "In brackets are 95% intervals over seeds and problems." if len(summary["seeds"]) > 1 else "No intervals."


def _floor(summary: Data) -> str:
    """A sentence about problems without a score; nothing where all have one."""
    floor = summary["floor"]
    return "" if floor is None else f" A problem without a score has the lowest reward that any run got: {floor:.3f}."


def _thresholds(summary: Data) -> Table:
    text = (
        "What had been spent when held-out accuracy first reached a threshold, on straight lines between evaluations: "
        "the median over seeds, in which one that never got there counts as more than any other."
    )
    rows: list[list[Cell]] = [
        [
            run,
            each["accuracy"],
            f"{each['reached']} of {len(summary['seeds'])}",
            *(each["costs"][measure] for measure in NAMES),
        ]
        for run, data in summary["runs"].items()
        for each in data["thresholds"]
        if _has(summary, "accuracy_final")
    ]
    return Table("Cost to reach an accuracy", text, ["run", "accuracy", "seeds", *NAMES.values()], rows)


def _distance(summary: Data) -> Table:
    text = (
        "KL divergence of the final model from the base model in nats, on its completions of held-out prompts, and the "
        "Frobenius norm of DeltaW, also as a fraction of that of the adapted W. Means over seeds, least to most."
    )
    names = {
        "kl_per_token": "KL per token",
        "kl_per_completion": "KL per completion",
        "delta_norm": "norm of DeltaW",
        "delta_relative": "relative to W",
    }
    return Table(
        "Distance from the base model", text, ["run", *names.values()], _observed(summary, list(names), _digits)
    )


def _rollouts(summary: Data) -> Table:
    text = (
        "Of the rollouts that a run learned from, the share that got no score, and of its groups of completions (of "
        "ES, its members) the share whose rewards were all equal or missing. Means over seeds, least to most."
    )
    columns = ["run", "failed rollouts", "constant groups"]
    return Table("Training rollouts", text, columns, _observed(summary, ["failed", "constant"], _percent))


def _observed(summary: Data, names: Sequence[str], write: Write) -> list[list[str]]:
    return [[run, *(_range(data["observed"][name], write) for name in names)] for run, data in summary["runs"].items()]


def _other_tasks(summary: Data) -> list[Table]:
    names = dict.fromkeys(name for data in summary["runs"].values() for name in data["other_tasks"])
    made = []
    for name in names:
        found = {run: data["other_tasks"][name] for run, data in summary["runs"].items()}
        first = next(iter(found.values()))
        rows = [
            [run, *(_estimate(each[when]) for when in ("before", "after")), _estimate(each["change"], sign="+")]
            for run, each in found.items()
        ]
        text = (
            f"Held-out {first['figure']} at {_count(first['problems'], 'problem')} of another task, before and after "
            f"training. {_intervals(summary)}"
        )
        made.append(Table(f"Other task: {name}", text, ["run", "before", "after", "change"], rows))
    return made


def _grids(summary: Data) -> list[Table]:
    made = []
    for run, trials in summary["grids"].items():
        tuning = summary["tuning"]
        text = (
            f"Each setting was trained with seed {tuning['seed']} to the same budget. The one with the best final "
            f"reward on {tuning['problems']} validation problems, none of which is a test problem, went to the final "
            "runs."
        )
        settings = list(trials[0]["setting"])
        rows: list[list[Cell]] = [
            [
                trial["trial"],
                *(in_yaml(trial["setting"][name]) for name in settings),
                trial["reward"],
                trial["accuracy"],
                ", ".join(word for word in ("diverged", "chosen") if trial[word]),
            ]
            for trial in trials
        ]
        made.append(Table(f"Grid: {run}", text, ["trial", *settings, "reward", "accuracy", "outcome"], rows))
    return made


def number(value: float | None) -> str:
    """A number as the page writes it: whole where it is or is large, and very large by its power of a thousand."""
    if value is None:
        return NONE
    size = abs(value)
    if size >= 1e6:
        power = min(6, int(math.log10(size) / 3))
        return f"{value / 1000**power:.4g}{' kMGTPE'[power]}"
    if value == int(value) or size >= 1000:
        return f"{math.floor(value + 0.5):,}"
    return f"{value:.1e}" if size < 1e-3 else f"{value:.4g}"


def _budget(budget: Mapping[str, float]) -> str:
    return " or ".join(f"{number(value)} {NAMES[LIMITS[name]]}" for name, value in budget.items())


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _estimate(found: Data | None, sign: str = "") -> str:
    if found is None:
        return NONE
    if found["low"] is None:
        return f"{found['mean']:{sign}.3f}"
    return f"{found['mean']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def _range(found: Data, write: Write) -> str:
    if found["mean"] is None:
        return NONE
    known = sum(value is not None for value in found["seeds"])
    missing = f" of {known} of {len(found['seeds'])} seeds" if known < len(found["seeds"]) else ""
    if found["least"] == found["most"]:
        return write(found["mean"]) + missing
    return f"{write(found['mean'])} ({write(found['least'])} to {write(found['most'])}){missing}"


def _digits(value: float) -> str:
    return f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _p_value(value: float | None) -> str:
    if value is None:
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
