"""What gradients are taken on: prompts with completions, cut into micro-batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Value = float | npt.NDArray[np.float32]

PARTS = 8
"""Micro-batches of a step, so that as many workers have something to do."""
LEAST_TOKENS, MOST_TOKENS = 512, 4096
"""Of a micro-batch: fewer would each take longer, more would need much memory."""
WORTH_IT = 0.75
"""Tokens to read in two parts over those to read at once. The second part attends with a mask, which is slower."""


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
    """How many tokens, padding included, micro-batches of samples may have where nobody says it: an eighth of all, or
    those of a prompt's samples where they are more; 512 at least and 4096 at most. A function of the samples alone."""
    groups = _by_prompt(samples, [[place] for place in range(len(samples))])
    largest = max((_tokens_whole([samples[place] for (place,) in group]) for group in groups), default=0)
    return min(MOST_TOKENS, max(LEAST_TOKENS, largest, sum(sample.tokens for sample in samples) // PARTS))


def reads_prompts_once(samples: Sequence[Sample]) -> bool:
    """Whether a micro-batch is read as its different prompts, less their last tokens, and then all completions: where
    that is worth it, for the tokens that it saves, padding included."""
    if all(len(sample.prompt_ids) == 1 for sample in samples):
        return False
    return _tokens_once(samples) <= WORTH_IT * _tokens_whole(samples)


def micro_batches(samples: Sequence[Sample], max_tokens: int, together: int = 1) -> list[list[int]]:
    """The places of samples in micro-batches of at most `max_tokens` tokens, prompts counted with each completion and
    padding included; a function of the samples alone.

    Samples of similar length share a micro-batch, or those of the same prompt do, whichever leaves less to read; the
    longest come first. Each run of `together` samples, such as the two completions of a preference, stays in one
    micro-batch side by side, which may then be larger than `max_tokens`.
    """
    assert len(samples) % together == 0, "runs of samples are whole"
    runs = [list(range(first, first + together)) for first in range(0, len(samples), together)]
    runs.sort(key=lambda run: -max(samples[place].tokens for place in run))
    units = [unit for group in _by_prompt(samples, runs) for unit in _units(samples, group, max_tokens)]
    arrangements = [_filled(samples, each, max_tokens) for each in (runs, units)]
    best = min(arrangements, key=lambda batches: sum(_tokens_to_read(samples, batch) for batch in batches))
    return sorted(best, key=lambda batch: -max(samples[place].tokens for place in batch))


def _by_prompt(samples: Sequence[Sample], runs: Sequence[list[int]]) -> list[list[list[int]]]:
    """Runs of places by their prompt, which is that of the first."""
    groups: defaultdict[tuple[int, ...], list[list[int]]] = defaultdict(list)
    for run in runs:
        groups[samples[run[0]].prompt_ids].append(run)
    return list(groups.values())


def _units(samples: Sequence[Sample], runs: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """What of a prompt's runs is not to be parted: all of it, where it fits into a micro-batch."""
    whole = [place for run in runs for place in run]
    return [whole] if _tokens_whole([samples[place] for place in whole]) <= max_tokens else list(runs)


def _filled(samples: Sequence[Sample], units: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """Micro-batches of units in the order given, each as full as may be."""
    batches: list[list[int]] = []
    width = 0  # of the last micro-batch
    for unit in units:
        longest = max(samples[place].tokens for place in unit)
        if not batches or max(width, longest) * (len(batches[-1]) + len(unit)) > max_tokens:
            batches.append([])
            width = 0
        width = max(width, longest)
        batches[-1].extend(unit)
    return batches


def _tokens_to_read(samples: Sequence[Sample], places: Sequence[int]) -> int:
    batch = [samples[place] for place in places]
    return _tokens_once(batch) if reads_prompts_once(batch) else _tokens_whole(batch)


def _tokens_whole(samples: Sequence[Sample]) -> int:
    return len(samples) * max(sample.tokens for sample in samples)


def _tokens_once(samples: Sequence[Sample]) -> int:
    prompts = {sample.prompt_ids for sample in samples}
    after = len(samples) * max(1 + len(sample.completion_ids) for sample in samples)
    return len(prompts) * max(len(prompt) - 1 for prompt in prompts) + after
