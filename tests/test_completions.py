"""Given completions as tokens: how they begin, and how they end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from tokenizers.pre_tokenizers import Metaspace, Split

from rewards.base import Example
from workers.completions import Completions, load_completions
from workers.prompts import load_tokenizer

BOS, EOS = 1, 2
ASKED = ({"role": "user", "content": "3+4"},)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}u:{{ m.content }}\n{% else %}a:{{ m.content.split(')')[-1] }}</s>"
    "\n{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def asking(prompt: str | None = "3+4=", messages: Any = None) -> Example:
    return Example("row", "", {}, prompt=prompt, messages=messages)


def completions_of(model: Path, *stops: str) -> Completions:
    return load_completions(model, stops, "method.data")


def said(completions: Completions, completion: str, example: Example | None = None) -> str:
    sample = completions.sample(completions.problem(example or asking()), completion)
    text = completions.tokenizer.decode(sample.completion_ids)
    assert isinstance(text, str)
    return text


def test_a_text_ends_with_the_end_token_once(random_llama: Path) -> None:
    completions = completions_of(random_llama)
    assert said(completions, "7") == said(completions, "7</s>") == said(completions, "7</s>8") == "7</s>"
    assert said(completions, "") == "</s>"


def test_where_there_are_stop_strings_a_text_ends_with_the_first_of_them_or_its_own(random_llama: Path) -> None:
    completions = completions_of(random_llama, "\n", "::")
    assert said(completions, "7") == said(completions, "7\n") == "7\n"
    assert said(completions, "7::") == "7::"


def test_a_chats_answer_is_what_the_template_writes_up_to_the_end_token(random_llama: Path) -> None:
    completions = completions_of(random_llama, "\n")
    completions.tokenizer.chat_template = TEMPLATE
    chat = asking(None, ASKED)
    assert completions.problem(chat).prompt == "u:3+4\na:"
    assert said(completions, "7", chat) == "7</s>"
    opens = TEMPLATE.replace("%}a:{% endif %}", "%}a:(b)2*{% endif %}")
    completions.tokenizer.chat_template = opens
    assert said(completions, "(b)7", chat) == "(b)7</s>", "the template would write the answer without its thought"


def test_a_completion_begins_where_the_prompt_ends(random_llama: Path) -> None:
    """A tokenizer that puts a space before every text puts none within."""
    completions = completions_of(random_llama)
    tokens = completions.tokenizer.backend_tokenizer
    tokens.pre_tokenizer = pre_tokenizers.Sequence(
        [Metaspace(replacement=" ", prepend_scheme="first"), Split("", "isolated")]
    )
    assert said(completions, "7") == "7</s>"
    assert completions.tokenizer.decode(completions.problem(asking()).prompt_ids) == " 3+4="


def test_a_completion_that_would_merge_with_the_prompt_is_tokenised_alone(random_llama: Path) -> None:
    completions = completions_of(random_llama)
    tokens = completions.tokenizer.backend_tokenizer
    tokens.pre_tokenizer = Split("a=", "isolated")  # all else is one token, which only "a" and "b" are known as
    problem = completions.problem(asking("a"))
    assert completions.sample(problem, "b").prompt_ids == problem.prompt_ids
    alone = load_tokenizer(random_llama)("b")["input_ids"]
    assert completions.sample(problem, "b").completion_ids == (*alone, EOS)


def test_what_the_model_cannot_learn_is_refused_in_one_sentence(random_llama: Path) -> None:
    completions = completions_of(random_llama, "\n")
    refused = [
        (asking(), "7\n8", r"method\.data: the completion of row goes on after '\\n', where task.stop ends it"),
        (asking(), "1" * 508, r"method\.data: row has 513 tokens with its completion, and the model's context 512"),
        (asking(""), "7", r"method\.data: the prompt of row is empty"),
        (asking(None, ASKED), "7", r"method\.data: row is a chat, and this model has no chat template"),
    ]
    for example, completion, sentence in refused:
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            completions.check(example, completion)
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            completions.sample(completions.problem(example), completion)
    completions.check(asking(), "1" * 507)
