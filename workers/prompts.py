"""From a task's example to the tokens the model reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from es_engine.config import Config
from rewards.base import Example
from workers.chunks import Problem

Preparer = Callable[[Example], Problem]


class PromptTooLong(ValueError):
    """A prompt leaves no room to answer it."""


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of a local model folder; no code that it brings is run."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def load_preparer(config: Config, model: Path, max_tokens: int) -> Preparer:
    """The function that tokenises examples for a local model within the context that the engine's config leaves it."""
    return preparer(load_tokenizer(model), engine_context(config, model), max_tokens)


def engine_context(config: Config, model: Path) -> int:
    """The most tokens that a local model reads and says in the engine of a config."""
    context, limit = context_length(model), getattr(config.engine, "max_model_len", None)
    return context if limit is None else min(context, limit)


def surely_fits(example: Example, room: int, completion: str = "") -> bool:
    """Whether prompt and completion have at most so many tokens, as far as that can be told without tokenising them: a
    token is at least a byte, and half of the room is enough for what a template adds."""
    said = [example.prompt or "", completion, *(message["content"] for message in example.messages or ())]
    return sum(len(text.encode()) for text in said) <= room // 2


def preparer(tokenizer: Any, context: int, max_tokens: int) -> Preparer:
    """A function that tokenises an example, and raises PromptTooLong for one that leaves no room to answer."""

    def prepare(example: Example) -> Problem:
        problem = tokenised(example, tokenizer)
        if len(problem.prompt_ids) + max_tokens > context:
            raise PromptTooLong(
                f"task: the prompt of {example.id} has {len(problem.prompt_ids)} tokens, which with "
                f"task.max_tokens={max_tokens} is more than the context of {context} tokens"
            )
        return problem

    return prepare


def tokenised(example: Example, tokenizer: Any) -> Problem:
    """The example as the model reads it. Raises ValueError for a chat where the model has no chat template, or one that
    does not take it."""
    prompt = _render(example, tokenizer)
    return Problem(example, prompt, token_ids(prompt, example, tokenizer))


def token_ids(text: str, example: Example, tokenizer: Any) -> tuple[int, ...]:
    """The tokens of a text that begins with the example's prompt."""
    return tuple(tokenizer(text, add_special_tokens=example.messages is None)["input_ids"])


def _render(example: Example, tokenizer: Any) -> str:
    if example.messages is None:
        assert example.prompt is not None
        return example.prompt
    if tokenizer.chat_template is None:
        raise ValueError("task.template: this model has no chat template; use a plain template")
    try:  # in jinja's sandbox
        rendered = tokenizer.apply_chat_template(list(example.messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"task.template: the model's chat template does not take {example.id} ({error})") from error
    assert isinstance(rendered, str)
    return rendered


def context_length(model: Path) -> int:
    """The number of tokens a local model can attend to."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    return int(config.get_text_config().max_position_embeddings)
