"""What the tiny model is taught before a run: worked Countdown problems, half of them by the television game's rule.

On television a number may be left over; the task wants every number used. So the model can play and still has
something to learn that no single lesson tells it: as with pretrained models, what a run rewards is only one of its
habits.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from es_engine.config.tasks import CountdownTaskConfig
from rewards.base import Task
from rewards.countdown import Countdown
from rewards.countdown_problems import split_of
from rewards.prompts import plain

Lesson = tuple[str, str]  # prompt, completion

LEFT_OVER = 0.5
"""Share of the lessons in which a number is left over."""

DRAWS = 8
"""Problems looked through for one that is not held out; each is with probability 0.3, so all are once in 15,000."""


def lessons(config: CountdownTaskConfig) -> Callable[[int], Lesson]:
    """Lesson number i, from training problems only: of the task itself, or of one number fewer and one too many."""
    every_number = _countdown(config)
    fewer = tuple(max(2, count - 1) for count in config.numbers)
    one_over = _countdown(config.model_copy(update={"numbers": fewer, "data": None, "heldout_data": None}))

    def lesson(index: int) -> Lesson:
        stream = random.Random(f"lesson {index}")
        if stream.random() < LEFT_OVER:
            return _with_one_over(one_over, index, stream, config.low, config.high)
        example = every_number.example("train", index)
        assert example.prompt is not None
        return example.prompt, every_number.worked_solution(example)

    return lesson


def _with_one_over(task: Countdown, index: int, stream: random.Random, low: int, high: int) -> Lesson:
    """A solved problem whose prompt shows a further number, somewhere among the others."""
    for draw in range(DRAWS):
        example = task.example("train", DRAWS * index + draw)
        numbers, target = list(example.info["numbers"]), str(example.info["target"])
        further = low + int(stream.random() * (high - low + 1))
        numbers.insert(int(stream.random() * (len(numbers) + 1)), further)
        if split_of({"numbers": numbers, "target": target}) == "train":
            break
    return plain(numbers, target), task.worked_solution(example)


def _countdown(config: CountdownTaskConfig) -> Countdown:
    task: Task = config.build()
    assert isinstance(task, Countdown)
    return task
