"""What gradients are taken on: prompts with completions, and how they are cut into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Value = float | npt.NDArray[np.float32]

PARTS = 8
"""Micro-batches of a step, so that as many workers have something to do."""
LEAST_TOKENS, MOST_TOKENS = 512, 4096
"""Of a micro-batch: fewer would each take longer, more would need much memory."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, its completion, and what a loss needs to know of them by name: a number of the whole completion, or an
    array with one for each of its tokens.

    Raises ValueError for an empty prompt or completion, and for an array of another length than the completion.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    values: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompt_ids or not self.completion_ids:
            raise ValueError("sample: prompt and completion need at least one token each")
        for name, value in self.values.items():
            if np.ndim(value) and np.shape(value) != (len(self.completion_ids),):
                raise ValueError(
                    f"sample: {name} has shape {np.shape(value)}; accepted are a number and "
                    f"({len(self.completion_ids)},), one number for each token of the completion"
                )

    def with_value(self, name: str, value: Value) -> Sample:
        """The same with one more value."""
        return Sample(self.prompt_ids, self.completion_ids, {**self.values, name: value})

    @property
    def tokens(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)


def suitable_tokens(samples: Sequence[Sample]) -> int:
    """How many tokens, padding included, micro-batches of samples may have where nobody says it: an eighth of all, 512
    at least and 4096 at most. A function of the samples alone."""
    return min(MOST_TOKENS, max(LEAST_TOKENS, sum(sample.tokens for sample in samples) // PARTS))


def micro_batches(samples: Sequence[Sample], max_tokens: int, together: int = 1) -> list[list[int]]:
    """The places of samples in micro-batches of at most `max_tokens` tokens, padding included; a function of the
    samples alone.

    Samples of similar length share a micro-batch, the longest come first. Each run of `together` samples, such as the
    two completions of a preference, stays in one micro-batch side by side, which may then be larger than `max_tokens`.
    """
    assert len(samples) % together == 0, "runs of samples are whole"
    runs = [range(first, first + together) for first in range(0, len(samples), together)]
    longest = [max(samples[place].tokens for place in run) for run in runs]
    batches: list[list[int]] = []
    width = 0  # of the last micro-batch
    for number in sorted(range(len(runs)), key=lambda number: (-longest[number], number)):
        if not batches or width * (len(batches[-1]) + together) > max_tokens:
            batches.append([])
            width = longest[number]
        batches[-1].extend(runs[number])
    return batches
