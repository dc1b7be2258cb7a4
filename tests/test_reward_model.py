"""A reward model's scores are the classifier's own, whatever else is in the batch."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from rewards.base import Rollout, VerifierSpec, judge_now
from workers.scoring import Scorer

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
ASK = ({"role": "user", "content": "3+4"},)
ROLLOUTS = [
    Rollout("12+7=", "19", "19", {}),
    Rollout("12+7=", "20 and a good deal more than that (1+2)", "19", {}),
    Rollout("unused", "7", "7", {}, messages=ASK),
    Rollout("", "", "", {}, messages=ASK),
]


@pytest.fixture(scope="module")
def classifier(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with two outputs, and its character tokenizer with a chat template."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(random_llama, num_labels=2)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(random_llama)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def own_logits(folder: Path, text: str) -> list[float]:
    """What the classifier itself says of one text."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    with torch.inference_mode():
        return model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits[0].tolist()


@pytest.mark.parametrize("output", [0, 1])
def test_scores_are_the_classifiers_own(classifier: Path, output: int) -> None:
    verifier = VerifierSpec("reward_model", {"model": str(classifier), "output": output}).load()
    found = [score.value for score in judge_now(verifier, ROLLOUTS, asyncio.run)]
    chat = "<user>3+4\n<assistant>{}\n"
    texts = ["12+7=19", ROLLOUTS[1].prompt + ROLLOUTS[1].completion, chat.format("7"), chat.format("")]
    expected = [own_logits(classifier, text)[output] for text in texts]
    assert len(set(expected)) == len(expected)
    assert found == pytest.approx(expected, abs=1e-5)


def test_of_a_long_text_the_end_is_read(classifier: Path) -> None:
    verifier = VerifierSpec("reward_model", {"model": str(classifier), "max_length": 4}).load()
    (score,) = judge_now(verifier, [Rollout("12+7=", "1234", "", {})], asyncio.run)
    assert score.value == pytest.approx(own_logits(classifier, "1234")[0], abs=1e-5)


def test_a_scoring_process_asks_it_in_batches(classifier: Path) -> None:
    spec = VerifierSpec("reward_model", {"model": str(classifier)})
    with Scorer(spec, deadline=20) as scorer:
        scorer.submit_group(range(len(ROLLOUTS)), ROLLOUTS)
        found = scorer.drain()
    expected = judge_now(spec.load(), ROLLOUTS, asyncio.run)
    assert [found[key].value for key in range(len(ROLLOUTS))] == pytest.approx(
        [score.value for score in expected], abs=1e-5
    )


def test_a_model_or_an_output_that_is_not_there_is_refused(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^verifier: reward_model cannot load"):
        VerifierSpec("reward_model", {"model": str(tmp_path)}).load()
    with pytest.raises(ValueError, match=r"^verifier: reward_model has output=2; accepted for .* are 0 to 1$"):
        VerifierSpec("reward_model", {"model": str(classifier), "output": 2}).load()
