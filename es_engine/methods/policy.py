"""What methods that learn from the center's own completions share: drawing them, going over them, and what is recorded
of them.

Shapes: P prompts, n completions of each, T tokens of a completion.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from es_engine.config.method import PolicyMethodConfig
from es_engine.methods.base import CallRunner
from es_engine.methods.gradients import Gradient
from es_engine.methods.rollouts import constant_rows, evaluate, figures, mean
from es_engine.methods.updates import Updates
from workers.chunks import Chunk, ChunkResult, Problem
from workers.engine import CENTER, Completion, Sampling, Vector
from workers.gradient import Loss
from workers.samples import Sample, Value


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Completions of a batch of problems and their rewards, (P, n), NaN where there is none; `completions` go problem
    by problem. They were begun and done at these times of `time.perf_counter`."""

    problems: list[Problem]
    rewards: npt.NDArray[np.float64]
    completions: list[Completion]
    results: list[ChunkResult]
    begun: float
    done: float

    @property
    def asked(self) -> list[Problem]:
        """The problem of each completion."""
        return [problem for problem in self.problems for _ in range(self.rewards.shape[1])]


def roll_out(
    pool: CallRunner, theta: Any, step: int, problems: Sequence[Problem], sampling: Sampling, chunk: int
) -> Rollouts:
    """Draw completions at the center theta (as the pool shares it), `chunk` problems in one engine call."""
    begun = time.perf_counter()
    chunks = [
        Chunk(
            generation=step,
            index=index,
            sigma=0.0,
            members=(CENTER,),
            problems=(tuple(range(start, min(start + chunk, len(problems)))),),
            sampling=sampling,
            keep_text=True,
        )
        for index, start in enumerate(range(0, len(problems), chunk))
    ]
    results = evaluate(pool, chunks, problems, theta, version=step)
    return Rollouts(
        problems=list(problems),
        rewards=np.concatenate([result.rewards[0] for result in results]),
        completions=[completion for result in results for completion in _completions(result)],
        results=results,
        begun=begun,
        done=time.perf_counter(),
    )


def learn(
    pool: CallRunner,
    theta: Any,
    step: int,
    samples: Sequence[Sample],
    loss: Callable[[Sequence[Sample]], Loss],
    config: PolicyMethodConfig,
    updates: Updates,
    teaches: Callable[[Sample], bool] = lambda _: True,
) -> Generator[Vector, Vector, list[Gradient]]:
    """Go over a step's samples `epochs` times in `minibatches`, from theta (as the pool shares it): directions that are
    answered by where they led, as those of a method. `loss` is that of a minibatch; it must have no gradient of samples
    that teach nothing, for they are not read. The gradients come back."""
    found: list[Gradient] = []
    for update in range(config.updates):
        minibatch = _minibatch(samples, config, update % config.minibatches)
        # One is always read: a model whose logits are no numbers may say only what scores alike.
        read = [sample for sample in minibatch if teaches(sample)] or [min(minibatch, key=lambda each: each.tokens)]
        gradient = updates.gradient(pool, loss(minibatch), read, theta, step * config.updates + update)
        found.append(gradient)
        theta = pool.put((yield -gradient.gradient))
    return found


def _minibatch(samples: Sequence[Sample], config: PolicyMethodConfig, number: int) -> list[Sample]:
    """Whole groups: every so-manieth prompt's."""
    prompts = range(number, config.prompts, config.minibatches)
    return [sample for prompt in prompts for sample in samples[prompt * config.samples :][: config.samples]]


def with_values(samples: Sequence[Sample], name: str, values: Sequence[Value]) -> list[Sample]:
    """The same samples, each with one more value."""
    return [sample.with_value(name, value) for sample, value in zip(samples, values, strict=True)]


def sampled_logprobs(completion: Completion) -> dict[str, Value]:
    """The engine's log-probabilities of a completion's tokens as a value of its sample, `sampled`, where there are
    any."""
    if completion.logprobs is None:
        return {}
    return {"sampled": np.array(completion.logprobs, dtype=np.float32)}


def record(rollouts: Rollouts) -> dict[str, Any]:
    """What the ledger keeps of the rollouts of a step that ends now, as plain JSON data."""
    rewards = rollouts.rewards
    kept = {
        "prompts": [problem.example.id for problem in rollouts.problems],
        "rewards": [[None if np.isnan(value) else value for value in row] for row in rewards.tolist()],
        "reward_mean": mean(rewards.ravel()),
        "constant_groups": constant_rows(rewards),
        **figures(rollouts.results),
    }
    kept["times"] |= {"rollouts": rollouts.done - rollouts.begun, "update": time.perf_counter() - rollouts.done}
    return kept


def _completions(result: ChunkResult) -> list[Completion]:
    assert result.transcripts is not None
    found = [transcript.completion for row in result.transcripts[0] for transcript in row]
    assert all(completion is not None for completion in found)
    return found  # type: ignore[return-value]
