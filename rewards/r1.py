"""The form in which a model thinks aloud before it answers: <think>...</think> and then <answer>...</answer>.

Prompts of the form end with <think>, so what is read here is the completion with <think> put before it.
"""

from __future__ import annotations


def last_answer(text: str) -> str | None:
    """What the last match of <answer>.*?</answer> holds, matched from the left; found in linear time."""
    answer = None
    start = text.find("<answer>")
    while start >= 0:
        end = text.find("</answer>", start)
        if end < 0:
            break
        answer = text[start + len("<answer>") : end]
        start = text.find("<answer>", end)
    return answer


def format_grade(text: str) -> float:
    """The grade of the form in "Evolution Strategies at Scale" (arXiv:2509.24372), 0 to 1; `text` starts with <think>.

    1 if the whole is "<think>...</think>\\n<answer>...</answer>", else 0.1 for a <think>...</think> and 0.5 for an
    <answer>...</answer>.
    """
    body = text.removesuffix("\n")
    if "</think>\n<answer>" in body and body.endswith("</answer>"):
        return 1.0
    return 0.1 * ("</think>" in text) + 0.5 * (last_answer(text) is not None)
