"""From a completion that is given to the tokens with which the model would have said it, and ended.

A chat's answer is what the chat template writes after the prompt, up to the end token. Other completions end with a
stop string, which is added where it is missing, or with the end token where the task has no stop strings.

Prompt and completion are tokenised together, so that a completion may begin within a word; but the prompt's tokens are
those that every method gives the model. Where the two together would begin with other tokens, which a model that has
read the prompt cannot say, the completion is tokenised alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.base import Example
from workers.chunks import Problem
from workers.prompts import context_length, load_tokenizer, surely_fits, token_ids, tokenised
from workers.samples import Sample
from workers.stops import cut_at_stop


@dataclass(frozen=True, slots=True)
class Completions:
    """Makes samples of completions for a model. `ends` are the tokens that end its completions, `stops` the task's stop
    strings; `field` is where the completions are from, for error messages."""

    tokenizer: Any
    ends: frozenset[int]
    stops: tuple[str, ...]
    context: int
    field: str

    def problem(self, example: Example) -> Problem:
        """The example made ready for the model. Raises ValueError for a chat where the model has no chat template."""
        self._check_template(example)
        return tokenised(example, self.tokenizer)

    def sample(self, problem: Problem, completion: str) -> Sample:
        """The prompt with a completion, its end included. Raises ValueError, naming the example, where they are too
        long for the model, where the prompt is empty, and where the completion goes on after a stop string."""
        ids = self._ids(problem, completion)
        name, tokens = problem.example.id, len(problem.prompt_ids) + len(ids)
        if not problem.prompt_ids:
            raise ValueError(f"{self.field}: the prompt of {name} is empty")
        if tokens > self.context:
            raise ValueError(
                f"{self.field}: {name} has {tokens} tokens with its completion, and the model's context {self.context}"
            )
        return Sample(problem.prompt_ids, ids)

    def check(self, example: Example, completion: str) -> None:
        """Raises what `sample` would; it tokenises only what might be refused."""
        self._check_template(example)
        self._ended(example, completion)
        if example.prompt == "" or not surely_fits(example, self.context, completion):
            self.sample(self.problem(example), completion)

    def _check_template(self, example: Example) -> None:
        if example.messages is not None and self.tokenizer.chat_template is None:
            raise ValueError(f"{self.field}: {example.id} is a chat, and this model has no chat template")

    def _ids(self, problem: Problem, completion: str) -> tuple[int, ...]:
        example, tokenizer = problem.example, self.tokenizer
        ended = self._ended(example, completion)
        text = self._in_template(problem, completion) if example.messages is not None else ended
        together = token_ids(problem.prompt + text, example, tokenizer)
        start = len(problem.prompt_ids)
        fits = together[:start] == problem.prompt_ids
        ids = together[start:] if fits else tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        if end is not None:
            return ids[: end + 1]
        stopped = example.messages is None and self.stops
        return ids if stopped else (*ids, tokenizer.eos_token_id)

    def _in_template(self, problem: Problem, completion: str) -> str:
        """What the chat template writes after the prompt; the bare completion where the template writes the answers of
        the past otherwise than it opens a new one, such as without their thoughts."""
        chat = [*(problem.example.messages or ()), {"role": "assistant", "content": completion}]
        written = self.tokenizer.apply_chat_template(chat, tokenize=False)
        assert isinstance(written, str)
        return written[len(problem.prompt) :] if written.startswith(problem.prompt) else completion

    def _ended(self, example: Example, completion: str) -> str:
        """The completion up to the end of its first stop string, which is added where it has none."""
        if not self.stops:
            return completion
        before = cut_at_stop(completion, self.stops)
        if before == completion:
            return completion + self.stops[0]
        rest = completion[len(before) :]
        if rest not in self.stops:
            stop = next(stop for stop in self.stops if rest.startswith(stop))
            raise ValueError(
                f"{self.field}: the completion of {example.id} goes on after {stop!r}, where task.stop ends it"
            )
        return completion


def load_completions(model: Path, stops: tuple[str, ...], field: str) -> Completions:
    """What makes samples of completions for a local model. Raises ValueError where it has no end token."""
    tokenizer = load_tokenizer(model)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.source: the tokenizer of {model} has no end token, so no completion can end")
    return Completions(tokenizer, _end_tokens(model) | {tokenizer.eos_token_id}, stops, context_length(model), field)


def _end_tokens(model: Path) -> frozenset[int]:
    """The tokens at which engines end a completion."""
    from transformers import AutoConfig, GenerationConfig

    if (model / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    else:
        ends = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config().eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())
