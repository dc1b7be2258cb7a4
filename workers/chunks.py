"""The unit of dispatch and of retry: a few members, the problems each of them answers, and what came of it.

Shapes: k members of the chunk, P problems a member, n samples a problem.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rewards.base import Example
from workers.engine import Member, Sampling, pairs_of

Scores = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

Failures = Mapping[tuple[str, str], int]
"""Rollouts by the verifier that left them without a score, and by kind of failure."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An example made ready for the model: `prompt` as the model reads it, and its tokens."""

    example: Example
    prompt: str
    prompt_ids: tuple[int, ...]


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

    def __str__(self) -> str:
        return f"chunk {self.index} of generation {self.generation}"


@dataclass(slots=True)
class ChunkResult:
    """What a chunk's rollouts were worth. Arrays are (k, P, n); a rollout without a score is NaN.

    `truncated` counts the completions that max_tokens ended, `looped` those that max_repeats ended. `error` is what was
    said of one of the rollouts in `failures`.
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
    texts: list[list[list[str]]] | None
    seconds: dict[str, float]
    worker: int = -1


def by_verifier(failures: Failures) -> dict[str, dict[str, int]]:
    """Counts of failures as JSON can write them: by verifier, then by kind."""
    table: dict[str, dict[str, int]] = {}
    for (verifier, kind), count in sorted(failures.items()):
        table.setdefault(verifier, {})[kind] = count
    return table


def sampling_seed(run_seed: int, generation: int, problem_id: str) -> int:
    """The sampling seed of a problem in a generation: 63 bits of a hash, the same for every member (common random
    numbers)."""
    text = f"{run_seed}/{generation}/{problem_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
