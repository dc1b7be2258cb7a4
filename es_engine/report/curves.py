"""Curves: a run's figures as few points as a screen can show, and the mean of several runs over a common axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

POINTS = 400
"""Most points of a curve."""


@dataclass(frozen=True, slots=True)
class Points:
    """A line through (x, y), and bands (low, high) around it, the widest first; all (n,). A band is NaN where there is
    none."""

    x: Array
    y: Array
    bands: tuple[tuple[Array, Array], ...] = ()


@dataclass(frozen=True, slots=True)
class Series:
    """A figure of one run: values (n,), bands around them, and what the run had spent by then, by axis, (n,)."""

    run: str
    spent: Mapping[str, Array]
    y: Array
    bands: tuple[tuple[Array, Array], ...] = ()

    def over(self, axis: str) -> Points:
        """The series over one of its axes."""
        return Points(self.spent[axis], self.y, self.bands)


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot by axis: a run, or the mean of several with what it is the mean of. Curves of the same group
    have the same `style` in every plot."""

    label: str
    style: int
    points: Mapping[str, Points]
    seeds: tuple[tuple[str, Mapping[str, Points]], ...] = ()


def curve(label: str, style: int, series: Sequence[Series]) -> Curve | None:
    """The curve of a group's series; None where no run has the figure. Of several runs it is the mean, with a band from
    the lowest to the highest, as far as all of them have come."""
    thinned = [thin(each) for each in map(_without_gaps, series) if len(each.y)]
    if not thinned:
        return None
    axes = thinned[0].spent
    if len(thinned) == 1:
        return Curve(label, style, {axis: thinned[0].over(axis) for axis in axes})
    seeds = tuple((each.run, {axis: each.over(axis) for axis in axes}) for each in thinned)
    return Curve(label, style, {axis: mean_over(axis, thinned) for axis in axes}, seeds)


def thin(series: Series, most: int = POINTS) -> Series:
    """The series with at most so many points: means of neighbours, but for the first point and the last."""
    count = len(series.y)
    if count <= most:
        return series
    starts = np.unique(np.concatenate([[0], np.linspace(1, count - 1, most - 1).astype(int)]))
    sizes = np.diff(np.append(starts, count))

    def bucket_means(values: Array) -> Array:
        return np.add.reduceat(values, starts) / sizes

    return Series(
        series.run,
        {axis: bucket_means(values) for axis, values in series.spent.items()},
        bucket_means(series.y),
        tuple((bucket_means(low), bucket_means(high)) for low, high in series.bands),
    )


def mean_over(axis: str, series: Sequence[Series]) -> Points:
    """The mean of several series over an axis, with the range of them, where all of them have values: at every point
    that one of them has, interpolated for the others. Over an axis on which one stands still for a while, it is taken
    by steps."""
    along = axis if all((np.diff(each.spent[axis]) > 0).all() for each in series) else "steps"
    start = max(each.spent[along][0] for each in series)
    end = min(each.spent[along][-1] for each in series)
    grid = np.unique(np.concatenate([each.spent[along] for each in series]))
    grid = grid[(grid >= start) & (grid <= end)]
    values = np.array([np.interp(grid, each.spent[along], each.y) for each in series])
    x = np.mean([np.interp(grid, each.spent[along], each.spent[axis]) for each in series], axis=0)
    mean = Series("", {axis: x}, values.mean(axis=0), ((values.min(axis=0), values.max(axis=0)),))
    return thin(mean).over(axis)


def _without_gaps(series: Series) -> Series:
    there = ~np.isnan(series.y)
    return Series(
        series.run,
        {axis: values[there] for axis, values in series.spent.items()},
        series.y[there],
        tuple((low[there], high[there]) for low, high in series.bands),
    )
