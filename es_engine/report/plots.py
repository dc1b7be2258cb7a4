"""The plots of a report as plain data, which the page and the PNGs both draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from es_engine.ledger import Line
from es_engine.report.curves import Array, Curve, Series, curve
from es_engine.report.data import AXES, RunData, RunGroup


@dataclass(frozen=True, slots=True)
class Variant:
    """One figure of a plot: its name in the list of figures, its curves, and the key of the run it is of, if one."""

    name: str
    label: str
    curves: tuple[Curve, ...]
    share: bool = False
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Plot:
    """Curves over any axis; of several variants one is shown."""

    name: str
    title: str
    caption: str
    variants: tuple[Variant, ...]


@dataclass(frozen=True, slots=True)
class Bars:
    """A stacked bar for each group: its parts by name, each with a value for each label."""

    name: str
    title: str
    caption: str
    unit: str
    labels: tuple[str, ...]
    parts: Mapping[str, tuple[float, ...]]


def plots(groups: Sequence[RunGroup]) -> list[Plot | Bars]:
    """Every plot for which there are figures."""
    made = [_held_out(groups), _training(groups), _population(groups), _components(groups)]
    made += [_learning(groups), _lengths(groups), _failures(groups)]
    return [*(plot for plot in made if plot.variants), *_times(groups)]


def _held_out(groups: Sequence[RunGroup]) -> Plot:
    return Plot(
        "held-out",
        "Held-out evaluation",
        "The center on held-out problems, before the first step and on the way. The band of a single run is the 95% "
        "interval over problems; that of several seeds runs from the lowest to the highest, as far as all of them have "
        "come. A run that spends nothing of the budget stands upright at 0.",
        _variants(
            _evaluated(groups, "accuracy", "accuracy", "Held-out accuracy", share=True),
            _evaluated(groups, "reward", "reward", "Held-out reward"),
        ),
    )


def _training(groups: Sequence[RunGroup]) -> Plot:
    return Plot(
        "training",
        "Training rollouts",
        "The mean over the rollouts of each step: for ES those of the perturbed members, otherwise of the center.",
        _variants(
            _stepwise(groups, "reward", "reward", "Training reward"),
            _stepwise(groups, "accuracy", "accuracy", "Training accuracy", share=True),
        ),
    )


def _population(groups: Sequence[RunGroup]) -> Plot:
    """A variant for each run, since the bands of several would hide each other."""
    variants = []
    for style, group in enumerate(groups):
        for label, run in zip(group.run_labels, group.runs, strict=True):
            figures = {name.removeprefix("population/"): values for name, values in run.figures.items()}
            if "median" not in figures:
                continue
            bands = ((figures["lowest"], figures["highest"]), (figures["lower quarter"], figures["upper quarter"]))
            found = curve(label, style, [Series(label, _after_steps(run), figures["median"], bands)])
            variants.append(_variant(label, "Fitness of members", [found], key=run.key))
    return Plot(
        "population",
        "Population",
        "Fitness of the members of each ES generation, their mean reward unless the method says otherwise: the "
        "median, the middle half (dark band), and all from the worst to the best (light band).",
        _variants(*variants),
    )


def _components(groups: Sequence[RunGroup]) -> Plot:
    held_out = dict.fromkeys(
        name for run in _runs(groups) for line in run.evaluations for name in line.get("components") or {}
    )
    return Plot(
        "components",
        "Reward components",
        "The mean of each named part of the reward, in held-out completions and in training rollouts.",
        _variants(
            *(_evaluated(groups, f"{name}, held-out", _component(name), name) for name in held_out),
            *(
                _stepwise(groups, f"{name.removeprefix('components/')}, training", name, name.split("/", 1)[1])
                for name in _names(groups, "components/")
            ),
        ),
    )


def _learning(groups: Sequence[RunGroup]) -> Plot:
    return Plot(
        "learning",
        "Learning signal",
        "What a step has to learn from. Spread is the standard deviation of fitness over ES members; constant is the "
        "share of members, or of prompts' groups of completions, whose rewards are all equal and say nothing; all "
        "others are what a gradient method reports of its loss.",
        _variants(
            _stepwise(groups, "fitness spread", "spread", "Fitness spread"),
            _stepwise(groups, "constant share", "constant", "Constant share", share=True),
            *(
                _stepwise(groups, _words(name.removeprefix("learning/")), name, _words(name.removeprefix("learning/")))
                for name in _names(groups, "learning/")
            ),
            _stepwise(groups, "sigma", "sigma", "Sigma"),
            _stepwise(groups, "learning rate", "lr", "Learning rate"),
        ),
    )


def _lengths(groups: Sequence[RunGroup]) -> Plot:
    return Plot(
        "lengths",
        "Completion lengths",
        "Tokens of a completion, and the share of completions that were cut off at the limit or went round in a loop.",
        _variants(
            _evaluated(groups, "held-out", _length, "Held-out tokens"),
            _stepwise(groups, "training", "length", "Training tokens"),
            _stepwise(groups, "cut off", "truncated", "Share cut off", share=True),
            _stepwise(groups, "in a loop", "looped", "Share in a loop", share=True),
        ),
    )


def _failures(groups: Sequence[RunGroup]) -> Plot:
    failed = any(run.unscored for run in _runs(groups))
    return Plot(
        "failures",
        "Rollouts without a score",
        "The share of training rollouts that were left without a score.",
        _variants(_stepwise(groups, "share", "unscored", "Share unscored", share=True)) if failed else (),
    )


def _times(groups: Sequence[RunGroup]) -> list[Bars]:
    """Where the seconds went, by the driver's clock and by the workers' own."""
    driver = [{"rollouts": 0.0, "update": 0.0, "rest": 0.0} for _ in groups]
    workers: list[dict[str, float]] = [{} for _ in groups]
    for place, group in enumerate(groups):
        for run in group.runs:
            total = {
                name.removeprefix("times/"): float(np.nansum(values)) / len(group.runs)
                for name, values in run.figures.items()
                if name.startswith("times/")
            }
            rest = total.get("total", 0.0) - total.get("rollouts", 0.0) - total.get("update", 0.0)
            _add(driver[place], {**{part: total.get(part, 0.0) for part in ("rollouts", "update")}, "rest": rest})
            _add(workers[place], {part: value for part, value in total.items() if part not in (*driver[0], "total")})
    bars = [
        _bars(groups, "time", "Time of the driver", "Wall-clock seconds of a run's steps by phase.", driver),
        _bars(
            groups,
            "worker-time",
            "Time of the workers",
            "Seconds of a run's steps by what workers did, added over workers: its worker seconds. Of scoring that is "
            "what was waited for when generation was over.",
            workers,
        ),
    ]
    return [each for each in bars if any(sum(values) > 0 for values in each.parts.values())]


def _bars(
    groups: Sequence[RunGroup], name: str, title: str, caption: str, seconds: Sequence[Mapping[str, float]]
) -> Bars:
    parts = dict.fromkeys(part for each in seconds for part in each)
    values = {part: tuple(each.get(part, 0.0) for each in seconds) for part in parts}
    return Bars(name, title, caption, "Seconds", tuple(group.label for group in groups), values)


def _add(sums: dict[str, float], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


def _variants(*variants: Variant | None) -> tuple[Variant, ...]:
    return tuple(variant for variant in variants if variant is not None)


def _variant(
    name: str, label: str, curves: Iterable[Curve | None], share: bool = False, key: str | None = None
) -> Variant | None:
    present = tuple(each for each in curves if each is not None)
    return Variant(name, label, present, share, key) if present else None


def _stepwise(groups: Sequence[RunGroup], name: str, figure: str, label: str, share: bool = False) -> Variant | None:
    """A figure of the steps, each at what the run had spent after it."""

    def series(label: str, run: RunData) -> Series:
        return Series(label, _after_steps(run), run.figures.get(figure, np.full(run.steps, np.nan)))

    return _variant(name, label, _curves(groups, series), share)


def _evaluated(
    groups: Sequence[RunGroup],
    name: str,
    figure: str | Callable[[Line], float | None],
    label: str,
    share: bool = False,
) -> Variant | None:
    """A figure of the held-out evaluations, with its interval where it has one."""

    def series(label: str, run: RunData) -> Series:
        steps = [line["step"] for line in run.evaluations]
        spent = {axis: run.spent[axis][steps] for axis in AXES}
        if not isinstance(figure, str):
            return Series(label, spent, _numbers(map(figure, run.evaluations)))
        intervals = [line.get(f"{figure}_ci95") or (None, None) for line in run.evaluations]
        band = (_numbers(low for low, _ in intervals), _numbers(high for _, high in intervals))
        return Series(label, spent, _numbers(line.get(figure) for line in run.evaluations), (band,))

    return _variant(name, label, _curves(groups, series), share)


def _curves(groups: Sequence[RunGroup], series: Callable[[str, RunData], Series]) -> list[Curve | None]:
    return [
        curve(group.label, style, [series(*each) for each in zip(group.run_labels, group.runs, strict=True)])
        for style, group in enumerate(groups)
    ]


def _after_steps(run: RunData) -> dict[str, Array]:
    return {axis: values[1:] for axis, values in run.spent.items()}


def _component(name: str) -> Callable[[Line], float | None]:
    return lambda line: (line.get("components") or {}).get(name)


def _length(line: Line) -> float | None:
    completions = line["problems"] * line["samples"]
    return line["tokens"] / completions if completions else None


def _names(groups: Sequence[RunGroup], prefix: str) -> list[str]:
    return list(dict.fromkeys(name for run in _runs(groups) for name in run.figures if name.startswith(prefix)))


def _runs(groups: Sequence[RunGroup]) -> list[RunData]:
    return [run for group in groups for run in group.runs]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _numbers(values: Iterable[Any]) -> Array:
    return np.array(list(values), dtype=np.float64)  # None becomes NaN
