"""Where a completion ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.prompts import load_tokenizer
from workers.stops import cut_at_stop, first_loop, stop_tokens


def test_only_single_characters_have_stop_tokens(random_llama: Path) -> None:
    tokenizer = load_tokenizer(random_llama)
    assert stop_tokens(tokenizer, ("</answer>", "\n")) is None
    assert stop_tokens(tokenizer, ("é",)) is None
    assert stop_tokens(tokenizer, ()) == ()
    assert stop_tokens(tokenizer, ("\n", "7")) == tuple(sorted(tokenizer.convert_tokens_to_ids(["\n", "7"])))


def test_every_token_that_holds_the_character_stops(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    found = stop_tokens(tokenizer, ("\n",))
    assert found is not None
    assert len(found) > 100
    for text in ("a\nb", "a\n\n    b", "x = 1\n", "\r\n"):
        assert set(tokenizer(text).input_ids) & set(found)
    assert not set(tokenizer("no line ends here, though it is \\n long").input_ids) & set(found)


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("ab\ncd", ("\n",), "ab"),
        ("abcd", ("d", "b"), "a"),
        ("abc", (), "abc"),
        ("abc", ("x",), "abc"),
        ("", ("x",), ""),
    ],
)
def test_the_text_ends_before_the_first_stop_string(text: str, stops: tuple[str, ...], kept: str) -> None:
    assert cut_at_stop(text, stops) == kept


@pytest.mark.vllm
@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40), st.integers(2, 4))
def test_loops_are_those_that_vllm_finds(ids: list[int], repeats: int) -> None:
    """vLLM asks after every token; its function is here the reference."""
    from vllm.sampling_params import RepetitionDetectionParams
    from vllm.v1.core.sched.utils import check_sequence_repetition

    rule = RepetitionDetectionParams(max_pattern_size=32, min_pattern_size=1, min_count=repeats)
    expected = next((n for n in range(1, len(ids) + 1) if check_sequence_repetition(ids[:n], rule)), None)
    assert first_loop(ids, repeats) == expected
