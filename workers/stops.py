"""Where a completion ends: stop strings, the tokens that stand for them, and loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LOOPS = range(1, 33)
"""Lengths of the patterns that count as a loop when they are repeated, in tokens."""


def stop_tokens(tokenizer: Any, stops: Sequence[str]) -> tuple[int, ...] | None:
    """The tokens that end a completion just where the stop strings would, so that no text is needed to find its end.

    Only a single ASCII character has such tokens, all those that hold it: no tokenizer spreads one over two. None where
    a stop string is another.
    """
    if not all(len(stop) == 1 and stop.isascii() for stop in stops):
        return None
    if not stops:
        return ()
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], skip_special_tokens=True)
    return tuple(token for token, text in enumerate(texts) if any(stop in text for stop in stops))


def first_loop(ids: Sequence[int], repeats: int) -> int | None:
    """The smallest n for which ids[:n] ends in the same 1 to 32 tokens `repeats` times in a row; None without any.

    vLLM's rule (`RepetitionDetectionParams`), for engines that lack it.
    """
    ends = (n for n in range(1, len(ids) + 1) if any(_is_loop(ids[:n], size, repeats) for size in LOOPS))
    return next(ends, None)


def _is_loop(ids: Sequence[int], size: int, repeats: int) -> bool:
    return len(ids) >= size * repeats and all(ids[-n] == ids[-n - size] for n in range(1, size * (repeats - 1) + 1))


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it; all of it where there is none."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
