"""Where a completion ends: stop strings, and the tokens that stand for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it; all of it where there is none."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
