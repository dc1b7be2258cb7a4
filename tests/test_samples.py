"""Samples, and the micro-batches that they are cut into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from es_engine.config import SftMethodConfig
from es_engine.methods.updates import Updates
from workers.gradient import collate
from workers.samples import Sample, micro_batches, suitable_tokens


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=24),
    max_tokens=st.integers(1, 200),
    together=st.sampled_from([1, 2]),
)
def test_micro_batches_hold_every_sample_once_within_their_size(
    lengths: list[tuple[int, int]], max_tokens: int, together: int
) -> None:
    found = [Sample((1,) * prompt, (1,) * completion) for prompt, completion in lengths * together]
    batches = micro_batches(found, max_tokens, together)
    assert sorted(place for batch in batches for place in batch) == list(range(len(found)))
    sizes = [[found[place].tokens for place in batch] for batch in batches]
    for batch, tokens in zip(batches, sizes, strict=True):
        assert len(batch) == together or max(tokens) * len(batch) <= max_tokens
        runs = [batch[first : first + together] for first in range(0, len(batch), together)]
        assert all(run == list(range(run[0], run[0] + together)) and run[0] % together == 0 for run in runs)
    assert [max(tokens) for tokens in sizes] == sorted((max(tokens) for tokens in sizes), reverse=True)


def test_micro_batches_are_of_samples_of_similar_length_or_of_the_same_prompt_whichever_is_less_to_read() -> None:
    """Prompts of 20 tokens with completions of 1 and 2, then the other way round."""
    few = [Sample((prompt,) * 20, (1,) * length) for prompt in (1, 2) for length in (1, 2)]
    assert micro_batches(few, 44) == [[1, 0], [3, 2]]
    many = [Sample((prompt,) * 2, (1,) * length) for prompt in (1, 2) for length in (1, 20)]
    assert micro_batches(many, 44) == [[1, 3], [0, 2]]


@pytest.mark.parametrize(("count", "tokens", "batches"), [(2, 512, 1), (32, 512, 4), (80, 570, 8), (1_000, 4096, 15)])
def test_where_nobody_says_how_large_micro_batches_are_they_are_an_eighth_of_all_tokens_within_bounds(
    count: int, tokens: int, batches: int
) -> None:
    found = [Sample((number,) * 50, (1,) * 7) for number in range(count)]
    updates = Updates(SftMethodConfig(), dim=1, parameters=1, adapted=1)
    assert updates.micro_batch_tokens(found) == tokens
    assert len(micro_batches(found, tokens)) == batches
    told = Updates(SftMethodConfig(micro_batch_tokens=77), dim=1, parameters=1, adapted=1)
    assert told.micro_batch_tokens(found) == 77


def test_a_prompts_completions_are_not_parted_where_they_fit() -> None:
    """Eight of at most 80 tokens with their prompt are more than an eighth of all; 80 are more than there may be."""
    eight = [Sample((prompt,) * 70, (1,) * (3 + length)) for length in range(8) for prompt in range(8)]
    assert suitable_tokens(eight) == 8 * 80
    for batch in micro_batches(eight, 8 * 80):
        assert len(batch) == 8
        assert len({eight[place].prompt_ids for place in batch}) == 1
    assert suitable_tokens([Sample((1,) * 70, (1,) * 10)] * 80) == 4096


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Sample((), (1,)), "need at least one token"),
        (lambda: Sample((1,), ()), "need at least one token"),
        (lambda: Sample((1,), (1, 2), {"weight": np.zeros(3, np.float32)}), r"weight has shape \(3,\); .*\(2,\)"),
        (lambda: collate([Sample((1,), (1,), {"one": 1.0}), Sample((1,), (1,))]), "the same values, .*has one$"),
        (lambda: collate([Sample((1,), (1,), {"one": value}) for value in (1.0, np.ones(1))]), "the same values"),
    ],
)
def test_a_sample_that_cannot_be_is_refused(build: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^sample: .*{words}"):
        build()
