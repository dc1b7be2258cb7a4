"""A reward model's scores are the classifier's own, whatever else is in the batch."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from reward_models import own_logits
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from rewards.base import Rollout, VerifierSpec, judge_now
from rewards.reward_model import local_folder
from workers.scoring import Scorer

ASK = ({"role": "user", "content": "3+4"},)
ROLLOUTS = [
    Rollout("12+7=", "19", "19", {}),
    Rollout("12+7=", "20 and a good deal more than that (1+2)", "19", {}),
    Rollout("unused", "7", "7", {}, messages=ASK),
    Rollout("", "", "", {}, messages=ASK),
]


@pytest.mark.parametrize("output", [0, 1])
def test_scores_are_the_classifiers_own(classifier: Path, output: int) -> None:
    verifier = VerifierSpec("reward_model", {"model": str(classifier), "output": output}).load()
    found = [score.value for score in judge_now(verifier, ROLLOUTS, asyncio.run)]
    chat = "<user>3+4\n<assistant>{}\n"
    texts = ["12+7=19", ROLLOUTS[1].prompt + ROLLOUTS[1].completion, chat.format("7"), chat.format("")]
    expected = [own_logits(classifier, text)[output] for text in texts]
    assert len(set(expected)) == len(expected)
    assert found == pytest.approx(expected, abs=1e-5)
    alone = [judge_now(verifier, [rollout], asyncio.run)[0].value for rollout in ROLLOUTS]
    assert found == alone  # to the last bit: a batch is whatever comes together, and a ledger is to be had again


def test_a_chat_template_writes_the_special_tokens_itself(classifier: Path, tmp_path: Path) -> None:
    shutil.copytree(classifier, tmp_path / "judge")
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = "<s>" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "judge")
    verifier = VerifierSpec("reward_model", {"model": str(tmp_path / "judge")}).load()
    (score,) = judge_now(verifier, [ROLLOUTS[2]], asyncio.run)
    assert score.value == pytest.approx(own_logits(classifier, "<s><user>3+4\n<assistant>7\n")[0], abs=1e-5)
    (score,) = judge_now(verifier, [ROLLOUTS[0]], asyncio.run)
    assert score.value == pytest.approx(own_logits(classifier, "<s>12+7=19")[0], abs=1e-5)


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
    with pytest.raises(ValueError, match=r"^verifier: reward_model has device=tpu; accepted are auto, cpu, cuda$"):
        VerifierSpec("reward_model", {"model": str(classifier), "device": "tpu"}).load()
    with pytest.raises(ValueError, match=r"^verifier: reward_model has output=2; accepted for .* are 0 to 1$"):
        VerifierSpec("reward_model", {"model": str(classifier), "output": 2}).load()


def test_a_model_of_the_hub_is_its_snapshot(classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--judge" / "snapshots" / ("0" * 40)
    shutil.copytree(classifier, snapshot)
    (tmp_path / "models--org--judge" / "refs").mkdir()
    (tmp_path / "models--org--judge" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert local_folder("org/judge", "task.reward_model") == snapshot
    assert local_folder(str(classifier), "task.reward_model") == classifier
    with pytest.raises(ValueError, match=r"^task\.reward_model: 'org/other' is no local folder, and the hub gives no"):
        local_folder("org/other", "task.reward_model")
