"""`measures.json` of a final run: what is measured of it once, when its training has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from es_engine.compare.held_out import problem_accuracy, problem_rewards
from es_engine.compare.plan import MEASURES_FILE
from es_engine.run_folder import write_text


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Scores(_Data):
    """Held-out problems, one entry each: the mean reward of its scored completions, None where none is scored, and the
    mean accuracy of all; None where the task knows no right and wrong."""

    rewards: tuple[float | None, ...]
    accuracy: tuple[float, ...] | None


class SampledEvaluation(_Data):
    """Several completions of each test problem: how many were drawn, at which temperature, and how many were right;
    None where the task knows no right and wrong."""

    samples: int
    temperature: float
    correct: tuple[int, ...] | None


class KlToBase(_Data):
    """The KL divergence of the trained model from the base model in nats, on completions of held-out prompts: its mean
    over their tokens and over completions."""

    per_token: float
    per_completion: float
    completions: int


class DeltaNorm(_Data):
    """The Frobenius norm of DeltaW over all adapted matrices, and the same as a fraction of that of their W."""

    absolute: float
    relative: float


class BeforeAndAfter(_Data):
    """Another task's held-out problems, answered by the model that training started from and by the trained one."""

    before: Scores
    after: Scores


class Measures(_Data):
    """Everything in `measures.json`."""

    sampled: SampledEvaluation
    kl: KlToBase | None
    delta: DeltaNorm
    other_tasks: dict[str, BeforeAndAfter] = {}


def write_measures(run: Path, measures: Measures) -> None:
    """Leave a run's measures in its folder: from then on it is finished."""
    write_text(run / MEASURES_FILE, measures.model_dump_json(indent=2) + "\n")


def read_measures(run: Path) -> Measures:
    """The measures in a run's folder. Raises ValueError, naming the file, for what is none."""
    path = run / MEASURES_FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the run is not finished")
    try:
        return Measures.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ValueError(f"{path}: not the measures of a run ({error.errors()[0]['msg']})") from error


def scores_of(rows: Sequence[Mapping[str, Any]], samples: int) -> Scores:
    """The scores in an evaluation's rows (those of `Evaluation.samples` or of a samples file), `samples` a problem."""
    rewards = problem_rewards(rows, samples)
    accuracy = problem_accuracy(rows, samples)
    return Scores(
        rewards=tuple(None if np.isnan(value) else float(value) for value in rewards),
        accuracy=None if accuracy is None else tuple(accuracy.tolist()),
    )
