"""The unit of dispatch and of retry: a few members, the problems each of them answers, and what came of it.

Shapes: k members of the chunk, P problems a member, n samples a problem.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from es_engine.costs import Costs
from rewards.base import Example, Message, Rollout, Score
from workers.divergence import NotFinite
from workers.engine import Completion, Member, Sampling, Vector, pairs_of

Scores = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

Failures = Mapping[tuple[str, str], int]
"""Rollouts by the verifier, or part of a sum, that gave them no score, and by kind of failure."""

EVALUATION = 2**64 - 2
"""The generation that keys the sampling of evaluations: the same at every step, so that steps are compared on equal
terms. No run's steps come this far."""
KL_DIVERGENCE = 2**64 - 3
"""That of the completions on which the KL divergence from the base model is measured."""
OUT_OF_TRAINING = {EVALUATION: "an evaluation", KL_DIVERGENCE: "the measurement of KL"}


@dataclass(frozen=True, slots=True)
class Problem:
    """An example made ready for the model: `prompt` as the model reads it, and its tokens.

    With a `reference`, the tokens of a completion that is given, members do not complete the prompt but say how likely
    that completion is. It is empty where there is none to give. In a batch all problems have one, or no problem has.
    """

    example: Example
    prompt: str
    prompt_ids: tuple[int, ...]
    reference: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """k members and, for each, the places of its P problems in the generation's batch.

    Plain data, independent of workers.
    """

    generation: int
    index: int
    sigma: float
    members: tuple[Member, ...]
    problems: tuple[tuple[int, ...], ...]
    sampling: Sampling
    keep_text: bool = False

    @property
    def pairs(self) -> tuple[int, ...]:
        """The pairs of this chunk, in order."""
        return pairs_of(self.members)

    @property
    def questions(self) -> list[tuple[int, int]]:
        """What the members are asked as (slot, place in the batch), slot by slot: k x P questions."""
        return [(slot, place) for slot, places in enumerate(self.problems) for place in places]

    def __str__(self) -> str:
        return f"chunk {self.index} of {OUT_OF_TRAINING.get(self.generation, f'generation {self.generation}')}"


@dataclass(frozen=True, slots=True)
class Transcript:
    """What is kept of a rollout: its text, the verifier's notes and the completion itself or, of a game, the whole
    chat."""

    text: str
    notes: dict[str, Any] = field(default_factory=dict)
    completion: Completion | None = None
    messages: tuple[Message, ...] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a rollout, a completion or a game: sample number `sample` of one of the chunk's questions."""

    question: int
    sample: int
    score: Score
    tokens: int
    truncated: bool
    looped: bool
    transcript: Transcript


@dataclass(frozen=True, slots=True)
class Outcomes:
    """All rollouts of a chunk, the tokens of the prompts that the model was given for them, each counted once however
    many samples there are of it, and the seconds spent on nothing but waiting for scores."""

    rollouts: list[Outcome]
    prompt_tokens: int
    waited: float


@dataclass(slots=True)
class ChunkResult:
    """What a chunk's rollouts were worth. Arrays are (k, P, n); a rollout without a score is NaN.

    `truncated` counts the rollouts that max_tokens (or, in a game, the context) cut short, `looped` those that
    max_repeats did. `error` is what was said of one of the rollouts in `failures`. `rescored` counts those that were
    given to the verifier again because its process died at them. `transcripts` are by member, problem and sample, None
    where the chunk does not keep them. An `absent` one was given up: nothing came of it.
    """

    rewards: Scores
    accuracy: Scores
    components: dict[str, Scores]
    tokens: Counts
    truncated: int
    looped: int
    prompt_tokens: int
    failures: Failures
    error: str | None
    transcripts: list[list[list[Transcript]]] | None
    seconds: dict[str, float]
    costs: Costs
    rescored: int = 0
    worker: int = -1
    absent: bool = False


@dataclass(frozen=True, slots=True)
class WeightedNoise:
    """A weighted sum of noise, shape (D,), and what it cost."""

    vector: Vector
    costs: Costs


def rollout_of(problem: Problem, completion: Completion) -> Rollout:
    """What a verifier sees of a completion of the problem's prompt."""
    example = problem.example
    return Rollout(
        prompt=problem.prompt,
        completion=completion.text,
        answer=example.answer,
        info=example.info,
        messages=example.messages,
        token_ids=completion.token_ids,
        finish_reason=completion.finish_reason,
    )


def collect(chunk: Chunk, found: Outcomes) -> ChunkResult:
    """Arrange what came of all rollouts of a chunk; its failures, seconds and costs are for the caller to fill in."""
    outcomes, final = found.rollouts, (len(chunk.members), len(chunk.problems[0]), chunk.sampling.samples)
    shape = (final[0] * final[1], final[2])
    names = sorted({name for outcome in outcomes for name in outcome.score.components})
    rewards, accuracy = np.full(shape, np.nan), np.full(shape, np.nan)
    components = {name: np.full(shape, np.nan) for name in names}
    tokens = np.zeros(shape, dtype=np.int64)
    transcripts = [[Transcript("")] * shape[1] for _ in range(shape[0])]
    for outcome in outcomes:
        place, score = (outcome.question, outcome.sample), outcome.score
        rewards[place] = np.nan if score.value is None else score.value
        accuracy[place] = np.nan if score.accuracy is None else score.accuracy
        for name, value in score.components.items():
            components[name][place] = value
        tokens[place] = outcome.tokens
        transcripts[outcome.question][outcome.sample] = outcome.transcript
    return ChunkResult(
        rewards=rewards.reshape(final),
        accuracy=accuracy.reshape(final),
        components={name: values.reshape(final) for name, values in components.items()},
        tokens=tokens.reshape(final),
        truncated=sum(outcome.truncated for outcome in outcomes),
        looped=sum(outcome.looped for outcome in outcomes),
        prompt_tokens=found.prompt_tokens,
        failures={},
        error=next((outcome.score.error for outcome in outcomes if outcome.score.error is not None), None),
        transcripts=[transcripts[slot * final[1] : (slot + 1) * final[1]] for slot in range(final[0])]
        if chunk.keep_text
        else None,
        seconds={},
        costs=Costs(),
    )


def absent(chunk: Chunk) -> ChunkResult:
    """The result of a chunk that was given up."""
    return replace(collect(chunk, Outcomes([], 0, 0.0)), absent=True)


def fault_of(chunk: Chunk, batch: Sequence[Problem], result: ChunkResult) -> str | None:
    """What is wrong with a worker's reply, None if nothing is: every rollout has a finite reward or is counted as a
    failure, and every reference that there is has its likelihood."""
    shape = (len(chunk.members), len(chunk.problems[0]), chunk.sampling.samples)
    if not result.rewards.shape == result.accuracy.shape == result.tokens.shape == shape:
        return f"it has rewards of shape {result.rewards.shape}, not {shape}"
    if batch[0].reference is not None and _wild_references(chunk, batch, result):
        return NotFinite("the likelihood of a reference is not finite")
    if np.isinf(result.rewards).any():
        return "a reward is infinite"
    accounted = sum(result.failures.values()) + sum(batch[place].reference == () for _, place in chunk.questions)
    if (missing := int(np.isnan(result.rewards).sum()) - accounted) > 0:
        return f"{missing} rollouts have neither a reward nor a failure"
    return None


def _wild_references(chunk: Chunk, batch: Sequence[Problem], result: ChunkResult) -> bool:
    """Whether a reference that there is has a likelihood that is not finite."""
    given = np.array([batch[place].reference != () for _, place in chunk.questions], dtype=np.bool_)
    return not np.isfinite(result.rewards.reshape(len(given), -1)[given]).all()


def by_verifier(failures: Failures) -> dict[str, dict[str, int]]:
    """Counts of failures as JSON can write them: by verifier, then by kind."""
    table: dict[str, dict[str, int]] = {}
    for (verifier, kind), count in sorted(failures.items()):
        table.setdefault(verifier, {})[kind] = count
    return table


def sampling_keys(batch: Sequence[Problem]) -> list[str]:
    """What the sampling of each problem of a batch is keyed by: its id and, where the batch asks it again, how often it
    was asked before; completions that are drawn in its place should be others."""
    asked: Counter[str] = Counter()
    keys = []
    for problem in batch:
        name = problem.example.id
        keys.append(f"{name}#{asked[name]}" if asked[name] else name)
        asked[name] += 1
    return keys


def sampling_seed(run_seed: int, generation: int, key: str) -> int:
    """The sampling seed of what `key` names in a generation: 63 bits of a hash, the same for every member (common
    random numbers)."""
    text = f"{run_seed}/{generation}/{key}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
