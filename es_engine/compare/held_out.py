"""What a run answered to held-out problems, as figures of each problem.

Shapes: E evaluations, P problems, n completions of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from es_engine.ledger import Line, read_samples
from es_engine.methods.rollouts import mean_of_samples
from es_engine.run_folder import RunFolder

Array = npt.NDArray[np.float64]
Row = Mapping[str, Any]


def held_out_scores(folder: RunFolder) -> tuple[Array, Array | None]:
    """Rewards (E, P) and accuracy (E, P) of a run's evaluations; accuracy is None where the task knows no right and
    wrong, and 0 in an evaluation without a verdict. The reward of a problem without a score is NaN.

    Raises ValueError, naming the file, for completions that are missing or damaged.
    """
    rows = [(_rows(folder, line), line["samples"]) for line in folder.open_evaluations().lines]
    accuracy = [problem_accuracy(*each) for each in rows]
    known = [each for each in accuracy if each is not None]
    table = np.stack([np.zeros_like(known[0]) if each is None else each for each in accuracy]) if known else None
    return np.stack([problem_rewards(*each) for each in rows]), table


def problem_rewards(rows: Sequence[Row], samples: int) -> Array:
    """The mean reward (P,) of each problem's scored completions, NaN where none is scored."""
    return mean_of_samples(_figures(rows, samples, "reward")[None])[0]


def problem_accuracy(rows: Sequence[Row], samples: int) -> Array | None:
    """The mean accuracy (P,) of each problem's completions, of which one without a verdict solved nothing; None where
    none has a verdict."""
    accuracy = _figures(rows, samples, "accuracy")
    return None if np.isnan(accuracy).all() else np.nan_to_num(accuracy).mean(axis=1)


def correct_counts(rows: Sequence[Row], samples: int) -> tuple[int, ...] | None:
    """How many completions of each problem are right; None where none has a verdict."""
    accuracy = _figures(rows, samples, "accuracy")
    if np.isnan(accuracy).all():
        return None
    return tuple(int(count) for count in (np.nan_to_num(accuracy) >= 1).sum(axis=1))


def _figures(rows: Sequence[Row], samples: int, figure: str) -> Array:
    """A figure of each completion, (P, n), NaN where it has none."""
    values = [np.nan if row[figure] is None else float(row[figure]) for row in rows]
    return np.array(values, dtype=np.float64).reshape(-1, samples)


def _rows(folder: RunFolder, evaluation: Line) -> list[Line]:
    path, step = folder.samples_file(evaluation["step"]), evaluation["step"]
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but the run was evaluated after step {step}")
    rows = list(read_samples(path))
    expected = evaluation["problems"] * evaluation["samples"]
    if len(rows) != expected:
        raise ValueError(f"{path}: {len(rows)} completions, but the evaluation after step {step} had {expected}")
    return rows
