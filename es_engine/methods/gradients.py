"""Gradients of a loss on the pool: samples are dealt out in micro-batches that depend on the samples alone, and what
comes back is added in the order of the micro-batches, so that the result does not depend on who computed what.

The sum is kept in float64 and rounded to float32 once. Shapes: D = len(theta), T completion tokens of a sample.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from es_engine.methods.base import CallRunner
from workers.calls import Call
from workers.divergence import NotFinite
from workers.engine import Vector
from workers.gradient import Loss, PartialGradient
from workers.samples import LogProbs, Sample, micro_batches

IN_FLIGHT_BYTES = 1 << 30
"""Most bytes of gradients in the driver and in Ray's object store at once; yet one for each worker."""


@dataclass(frozen=True, slots=True)
class Gradient:
    """The gradient of a loss with respect to theta, shape (D,), which a step goes against; the loss, what it reports,
    the tokens that the model read, and the seconds that workers spent, all summed over the samples."""

    gradient: Vector
    loss: float
    metrics: dict[str, float]
    tokens: int
    seconds: float


def gradient(
    pool: CallRunner,
    loss: Loss,
    samples: Sequence[Sample],
    theta: Any,
    version: int,
    *,
    dim: int,
    max_tokens: int,
    together: int = 1,
) -> Gradient:
    """The gradient of a loss over samples at theta (as the pool shares it, `version` names it) of `dim` coordinates.

    A micro-batch has at most `max_tokens` tokens with padding; `together` samples in a row stay in one.
    """
    calls = [
        Call(
            f"gradient {number}",
            "gradient",
            (loss, [samples[place] for place in places], theta, version),
            fault=partial(_fault_of_gradient, dim),
        )
        for number, places in enumerate(micro_batches(samples, max_tokens, together))
    ]
    total = np.zeros(dim)
    value = seconds = 0.0
    tokens = 0
    metrics: defaultdict[str, float] = defaultdict(float)
    for part in _in_waves(pool, calls, max(pool.size, IN_FLIGHT_BYTES // (4 * dim))):
        total += part.gradient
        value += part.loss
        tokens += part.tokens
        seconds += part.seconds
        for name, number in part.metrics.items():
            metrics[name] += number
    return Gradient(total.astype(np.float32), value, dict(metrics), tokens, seconds)


def logprobs(
    pool: CallRunner,
    samples: Sequence[Sample],
    theta: Any,
    version: int,
    *,
    max_tokens: int,
    temperature: float = 1.0,
) -> LogProbs:
    """Log-probabilities of the samples' completions at theta (as the pool shares it, `version` names it); where theta
    is None, by the base model."""
    return _logprobs(pool, "logprobs", samples, max_tokens, theta, version, temperature)


def teacher_logprobs(
    pool: CallRunner, samples: Sequence[Sample], *, max_tokens: int, temperature: float = 1.0
) -> LogProbs:
    """The teacher's log-probabilities of the samples' completions."""
    return _logprobs(pool, "teacher_logprobs", samples, max_tokens, temperature)


def _logprobs(pool: CallRunner, method: str, samples: Sequence[Sample], max_tokens: int, *arguments: Any) -> LogProbs:
    """What a method of the workers says of all samples, given micro-batches of them and the other arguments."""
    batches = micro_batches(samples, max_tokens)
    calls = [
        Call(
            f"{method} {number}",
            method,
            ([samples[place] for place in places], *arguments),
            fault=partial(_fault_of_rows, [samples[place] for place in places], method == "teacher_logprobs"),
        )
        for number, places in enumerate(batches)
    ]
    parts: list[LogProbs] = pool.run(calls)
    found: dict[int, Vector] = {}
    for places, part in zip(batches, parts, strict=True):
        found.update(zip(places, part.rows, strict=True))
    rows = [found[place] for place in range(len(samples))]
    return LogProbs(rows, sum(part.tokens for part in parts), sum(part.seconds for part in parts))


def _fault_of_gradient(dim: int, reply: PartialGradient) -> str | None:
    """What is wrong with a worker's gradient, if anything."""
    if reply.gradient.shape != (dim,):
        return f"it has shape {reply.gradient.shape}, not {(dim,)}"
    numbers: dict[str, Any] = {"gradient": reply.gradient, "loss": reply.loss, **reply.metrics}
    wild = next((name for name, value in numbers.items() if not np.isfinite(value).all()), None)
    return None if wild is None else NotFinite(f"the {wild} is not finite")


def _fault_of_rows(samples: Sequence[Sample], teacher: bool, reply: LogProbs) -> str | None:
    """What is wrong with a worker's log-probabilities, if anything; that of a token that a teacher lacks is -inf."""
    found, expected = [len(row) for row in reply.rows], [len(sample.completion_ids) for sample in samples]
    if found != expected:
        return f"it has {sum(found)} tokens of {len(found)} samples, not {sum(expected)}"
    wild = np.isnan if teacher else _not_finite
    if any(wild(row).any() for row in reply.rows):
        return NotFinite(f"a log-probability{' of the teacher' if teacher else ''} is not finite")
    return None


def _not_finite(row: Vector) -> npt.NDArray[np.bool_]:
    return ~np.isfinite(row)


def _in_waves(pool: CallRunner, calls: Sequence[Call], size: int) -> Iterator[Any]:
    for first in range(0, len(calls), size):
        yield from pool.run(calls[first : first + size])
