"""What every engine does: hold a population's adapters in slots and complete prompts with them.

A chunk is one engine call: k members x P prompts x n samples in one batch. Member number i of the chunk is in slot i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from es_engine.spaces.lora import LoraSpace

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Member:
    """One perturbation of the center: theta + sign * sigma * eps(pair). Sign 0 is the center itself."""

    pair: int
    sign: int


CENTER = Member(pair=0, sign=0)

Filling = tuple[int, float, tuple[Member, ...]]
"""What slots are to hold: generation, sigma and members."""


def pairs_of(members: Sequence[Member]) -> tuple[int, ...]:
    """The pairs that members belong to, each once, in order."""
    return tuple(dict.fromkeys(member.pair for member in members if member.sign))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. At temperature 0 decoding is greedy and `samples` is 1.

    A completion that has just said the same 1 to 32 tokens `max_repeats` times in a row ends there; None lets it go on.
    With `logprobs` completions come with the log-probabilities of their tokens.
    """

    max_tokens: int
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    max_repeats: int | None = None
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt for the adapter in a slot. `seed` keys the sampling of all its samples; slot None is the bare model."""

    slot: int | None
    prompt_ids: tuple[int, ...]
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion of request number `request`; `text` ends before the stop string, `token_ids` may include it.

    `finish_reason` is `stop`, `length`, or `repetition` where `max_repeats` ended it. `logprobs`, one for each of
    `token_ids`, are the model's own, at temperature 1 and top_p 1 whatever was sampled with; None unless asked for.
    """

    request: int
    sample: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float, ...] | None = None


class PopulationEngine(Protocol):
    """An engine that answers with many perturbed adapters at once; `dtype` is the type of its base model's weights, in
    transformers' words."""

    dtype: str

    def assign(self, space: LoraSpace, run_seed: int, cache_bytes: int) -> None:
        """Hold members of another run from now on, in a space of the same matrices and rank. Center, slots and noise
        are forgotten: the next calls are `set_center` and `write_slots`. An engine that rests is to be woken first."""
        ...

    def set_center(self, theta: Vector) -> None:
        """Make theta, shape (D,), the center of the slots written from now on."""
        ...

    def write_slots(self, generation: int, sigma: float, members: Sequence[Member]) -> None:
        """Write theta + sign*sigma*eps of each member into slot 0, 1, ..."""
        ...

    def prepare(self, generation: int, sigma: float, members: Sequence[Member]) -> None:
        """Make a later `write_slots` of the same arguments quick: in the background, draw the members' noise as far as
        there is room for it and, where the engine has a second set of slots, write them."""
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Complete the requests, in any order, each as soon as it is done."""
        ...

    def logprobs(self, requests: Sequence[Request]) -> list[Vector]:
        """Log-probability of every prompt token but the first, shape (T-1,), for each request."""
        ...

    def noise_sum(self, generation: int, pairs: Sequence[int], weights: Sequence[float]) -> Vector:
        """The sum of weight * eps(pair) over pairs, in the order given, shape (D,); good until the next call."""
        ...

    def rest(self) -> None:
        """Leave a GPU's memory to others, as far as the engine can; slots and center stay as they are. Nothing may be
        asked of the engine but `noise_sum` and `set_center` until it wakes. Resting twice is resting once."""
        ...

    def wake(self) -> None:
        """Take the memory back."""
        ...
