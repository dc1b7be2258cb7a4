"""What is measured of a final run when its training has ended: see `measures.py` for what each figure is."""

from __future__ import annotations

import math

import numpy as np
import torch

from es_engine.compare.held_out import correct_counts
from es_engine.compare.measures import (
    BeforeAndAfter,
    DeltaNorm,
    KlToBase,
    Measures,
    SampledEvaluation,
    Scores,
    scores_of,
)
from es_engine.compare.plan import errors_of_other_task
from es_engine.config import ComparisonConfig, Config, MultiTurnTaskConfig, on_other_task
from es_engine.evaluation import Evaluation, evaluate_center
from es_engine.losses import kl_k3
from es_engine.methods import gradients, policy
from es_engine.session import Session, sampling
from workers.chunks import KL_DIVERGENCE
from workers.divergence import Diverged
from workers.engine import Vector
from workers.samples import Sample

VERSION = -2
"""Names the theta that is measured; training has other names."""
KL_TOKENS = 4096
"""Tokens, with padding, of which a worker finds the log-probabilities at a time."""


def measure(session: Session, comparison: ComparisonConfig, theta: Vector, before: dict[str, Scores]) -> Measures:
    """Everything that is measured at theta (D,) on a session that serves the run, which is then turned to the other
    tasks; `before` is what was scored at those where training started."""
    config, space = session.materials.config, session.materials.space
    absolute, relative = space.delta_norm(theta)
    wanted = comparison.samples
    sampled = _evaluate(session, theta, wanted.n, wanted.temperature)
    kl = _kl_to_base(session, theta)
    after = measure_other_tasks(session, comparison, config, theta)
    return Measures(
        sampled=SampledEvaluation(
            samples=wanted.n, temperature=wanted.temperature, correct=correct_counts(sampled.samples, wanted.n)
        ),
        kl=kl,
        delta=DeltaNorm(absolute=absolute, relative=relative),
        other_tasks={name: BeforeAndAfter(before=before[name], after=scores) for name, scores in after.items()},
    )


def measure_other_tasks(
    session: Session, comparison: ComparisonConfig, config: Config, theta: Vector | None
) -> dict[str, Scores]:
    """What theta (D,) in the space of a run's config, None for where its training starts, scores at the other tasks, on
    which the session is turned to each."""
    scores = {}
    for name, task in comparison.other_tasks.items():
        with errors_of_other_task(name):
            session.turn_to(on_other_task(config, task))
            at = session.materials.space.start() if theta is None else theta
            evaluation = _evaluate(session, at, config.evaluation.samples, config.evaluation.temperature)
        scores[name] = scores_of(evaluation.samples, config.evaluation.samples)
    return scores


def _evaluate(session: Session, theta: Vector, samples: int, temperature: float) -> Evaluation:
    """On the held-out problems that the session's config evaluates."""
    found = session.materials
    wanted = found.config.evaluation
    problems = found.problems("heldout", wanted.numbers)
    drawn = sampling(found.config, found.task, samples, temperature)
    return evaluate_center(session.pool, session.pool.put(theta), VERSION, problems, drawn, wanted.chunk)


def _kl_to_base(session: Session, theta: Vector) -> KlToBase | None:
    """Estimated by k3 on a completion of each held-out prompt; None where there is no model in torch to ask, where
    what is said is not one completion, and where it is not finite."""
    found = session.materials
    config = found.config
    if (
        isinstance(config.task, MultiTurnTaskConfig)
        or config.engine.kind == "simulated"
        or config.pool.tensor_parallel > 1
    ):
        return None
    shared = session.pool.put(theta)
    problems = found.problems("heldout", config.evaluation.numbers)
    drawn = sampling(config, found.task, samples=1, temperature=1.0)
    rollouts = policy.roll_out(session.pool, shared, KL_DIVERGENCE, problems, drawn, config.evaluation.chunk)
    samples = [
        Sample(problem.prompt_ids, completion.token_ids)
        for problem, completion in zip(rollouts.asked, rollouts.completions, strict=True)
    ]
    try:
        mine = gradients.logprobs(session.pool, samples, shared, VERSION, max_tokens=KL_TOKENS)
    except Diverged:
        return None
    base = gradients.logprobs(session.pool, samples, None, VERSION, max_tokens=KL_TOKENS)
    sums = [
        float(kl_k3(torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)).sum())
        for one, other in zip(mine.rows, base.rows, strict=True)
    ]
    if not math.isfinite(sum(sums)):
        return None
    tokens = sum(len(row) for row in mine.rows)
    return KlToBase(per_token=sum(sums) / tokens, per_completion=float(np.mean(sums)), completions=len(sums))
