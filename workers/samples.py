"""What gradients are taken on: prompts with completions, cut into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Value = float | npt.NDArray[np.float32]

PARTS = 8
"""Micro-batches of a step, so that as many workers have something to do."""
WORTH_IT = 0.75
"""Tokens to read in two parts over those to read at once. The second part attends with a mask, which is slower."""
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


@dataclass(frozen=True, slots=True)
class LogProbs:
    """Log-probabilities (T,) of each sample's T completion tokens, in the order of the samples; the tokens that the
    model read, padding left out, and the seconds that workers spent."""

    rows: list[npt.NDArray[np.float32]]
    tokens: int
    seconds: float


def suitable_tokens(samples: Sequence[Sample]) -> int:
    """How many tokens, padding included, micro-batches of samples may have where nobody says it: an eighth of all, 512
    at least and 4096 at most. A function of the samples alone."""
    return min(MOST_TOKENS, max(LEAST_TOKENS, sum(sample.tokens for sample in samples) // PARTS))


def reads_prompts_once(samples: Sequence[Sample]) -> bool:
    """Whether a micro-batch is read as its different prompts, less their last tokens, and then all completions: where
    that is worth it, for the tokens that it saves, padding included."""
    if all(len(sample.prompt_ids) == 1 for sample in samples):
        return False
    return _tokens_once(samples) <= WORTH_IT * _tokens_whole(samples)


def micro_batches(samples: Sequence[Sample], max_tokens: int, together: int = 1) -> list[list[int]]:
    """The places of samples in micro-batches of at most `max_tokens` tokens, prompts counted with each completion and
    padding included; a function of the samples alone.

    Samples of similar length share a micro-batch, or those of the same prompt do, whichever leaves less to read. Each
    run of `together` samples, such as the two completions of a preference, stays in one micro-batch side by side, which
    may then be larger than `max_tokens`.
    """
    assert len(samples) % together == 0, "runs of samples are whole"
    runs = [range(first, first + together) for first in range(0, len(samples), together)]
    by_length = sorted(runs, key=lambda run: -max(samples[place].tokens for place in run))
    prompts: dict[tuple[int, ...], int] = {}
    for run in by_length:
        prompts.setdefault(samples[run[0]].prompt_ids, len(prompts))
    by_prompt = sorted(by_length, key=lambda run: prompts[samples[run[0]].prompt_ids])
    arrangements = [_filled(samples, order, max_tokens) for order in (by_length, by_prompt)]
    return min(arrangements, key=lambda batches: sum(_tokens_to_read(samples, batch) for batch in batches))


def _filled(samples: Sequence[Sample], runs: Sequence[range], max_tokens: int) -> list[list[int]]:
    """Micro-batches of runs of places in the order given, each as full as may be."""
    batches: list[list[int]] = []
    width = 0  # of the last micro-batch
    for run in runs:
        longest = max(samples[place].tokens for place in run)
        if not batches or max(width, longest) * (len(batches[-1]) + len(run)) > max_tokens:
            batches.append([])
            width = 0
        width = max(width, longest)
        batches[-1].extend(run)
    return batches


def _tokens_to_read(samples: Sequence[Sample], places: Sequence[int]) -> int:
    batch = [samples[place] for place in places]
    return _tokens_once(batch) if reads_prompts_once(batch) else _tokens_whole(batch)


def _tokens_whole(samples: Sequence[Sample]) -> int:
    return len(samples) * max(sample.tokens for sample in samples)


def _tokens_once(samples: Sequence[Sample]) -> int:
    prompts = {sample.prompt_ids for sample in samples}
    completions = len(samples) * max(len(sample.completion_ids) for sample in samples)
    return len(prompts) * max(len(prompt) for prompt in prompts) + completions
