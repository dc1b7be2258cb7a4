"""Training that diverges ends in a sentence, keeps what it had reached, and says the same when it is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from command_line import refusal
from small_runs import SessionPool, small_config, train_here, write_config

from es_engine import session, trainer
from es_engine.config import SgdConfig
from es_engine.costs import Costs
from es_engine.ledger import Ledger
from es_engine.methods.base import Directions
from es_engine.optimizers import build_optimizer
from es_engine.past import State
from es_engine.session import gather
from es_engine.status import read_status
from workers.divergence import Diverged
from workers.gradient import GradientModel, PartialGradient

WILD = {"kind": "adam", "lr": 1e30}
SGD = {"kind": "sgd", "lr": 1e30}
DIGITS = """
def digits(rollout):
    text = rollout.completion
    return sum(character.isdigit() for character in text) / max(1, len(text))
"""
DIGITS_AT_FIRST = """
from pathlib import Path
scored = Path(__file__).with_suffix(".scored")
def digits(rollout):
    with scored.open("a") as file:
        file.write(".")
    at_first = scored.stat().st_size <= 16
    return sum(character.isdigit() for character in rollout.completion) if at_first else 0.0
"""
SMALL_ES = {"kind": "es", "population": 4, "sigma": 0.1, "prompts": 4}


@pytest.mark.parametrize(
    ("method", "optimizer", "what"),
    [
        ({"kind": "sft", "batch": 4}, WILD, "the gradient is not finite in every reply to gradient 0"),
        ({"kind": "grpo", "prompts": 4, "samples": 2}, WILD, "the gradient is not finite in every reply to gradient 0"),
        ({"kind": "dpo", "batch": 4, "samples": 4}, SGD, "the gradient is not finite in every reply to gradient 0"),
        (SMALL_ES | {"fitness": "references"}, WILD, "the likelihood of a reference is not finite in every reply to"),
    ],
    ids=["sft", "grpo", "dpo", "es"],
)
def test_a_learning_rate_that_is_far_too_large_ends_a_run_in_one_sentence_and_loses_nothing(
    random_llama: Path, tmp_path: Path, method: dict[str, Any], optimizer: dict[str, Any], what: str
) -> None:
    (tmp_path / "verifier.py").write_text(DIGITS)
    task = {} if method.get("fitness") else {"verifier": f"{tmp_path}/verifier.py:digits"}
    config = small_config(random_llama, method, optimizer=optimizer, task=task)
    run = tmp_path / "run"
    with patch.object(session, "Pool", SessionPool):
        said = refusal("train", write_config(config, tmp_path / "config.yaml"), "--run-dir", run)
        steps = len(Ledger(run / "ledger.jsonl").generations)
        assert said.startswith(f"training diverged in step {steps + 1}: {what}")
        assert "lower optimizer.lr (1e+30)" in said
        assert ("or method.sigma" in said) == (method["kind"] == "es")
        kept = {path: path.read_bytes() for path in run.rglob("*") if path.suffix in (".jsonl", ".safetensors")}
        assert len(Ledger(run / "eval.jsonl").lines) == 1
        assert refusal("resume", run) == said
    assert read_status(run).error == said
    del kept[run / "log.jsonl"]
    assert {path: path.read_bytes() for path in kept} == kept


def test_grpo_notices_that_it_diverged_where_all_nonsense_scores_alike(random_llama: Path, tmp_path: Path) -> None:
    """Eight held-out completions and eight of the first step are scored by their digits, and no others."""
    (tmp_path / "verifier.py").write_text(DIGITS_AT_FIRST)
    method = {"kind": "grpo", "prompts": 4, "samples": 2}
    config = small_config(random_llama, method, optimizer=WILD, task={"verifier": f"{tmp_path}/verifier.py:digits"})
    with pytest.raises(Diverged, match=r"^training diverged in step 2: the gradient is not finite"):
        train_here(config, tmp_path / "run")


def test_a_step_that_leaves_float32_is_a_divergence() -> None:
    theta = np.zeros(3, dtype=np.float32)
    state = State(0, theta, build_optimizer(SgdConfig(lr=1e30), theta), Costs())

    def directions() -> Directions:
        yield np.full(3, 1e10, dtype=np.float32)
        raise AssertionError("it must not come to a second one")

    with pytest.raises(Diverged, match=r"^theta is not finite$"):
        trainer._climb(state, directions(), 1e30)


def test_es_goes_on_where_members_can_only_be_told_to_answer_nonsense(random_llama: Path, tmp_path: Path) -> None:
    """Which is not to be had from the distribution of a model that has none."""
    config = small_config(random_llama, SMALL_ES | {"temperature": 1.0}, optimizer=WILD)
    run = train_here(config, tmp_path / "run")
    assert len(Ledger(run / "ledger.jsonl").generations) == 4


def test_a_member_of_the_first_generation_without_likelihoods_is_put_down_to_sigma(
    random_llama: Path, tmp_path: Path
) -> None:
    """A comparison's grid of sigmas goes on then, as it would not where the base model were to blame."""
    config = small_config(random_llama, SMALL_ES | {"fitness": "references", "sigma": 1e30})
    with pytest.raises(Diverged, match=r"diverged in step 1: .* lower optimizer.lr \(\S+\) or method.sigma$"):
        train_here(config, tmp_path / "run")


def test_numbers_that_are_not_finite_before_theta_has_moved_are_not_put_down_to_training(
    random_llama: Path, tmp_path: Path
) -> None:
    config = small_config(random_llama, {"kind": "sft", "batch": 4})
    bad = PartialGradient(np.full(gather(config).space.dim, np.nan, dtype=np.float32), 1.0, {}, 1)
    with patch.object(GradientModel, "gradient", lambda *_: bad), pytest.raises(ValueError, match="another") as caught:
        train_here(config, tmp_path / "run")
    assert not isinstance(caught.value, Diverged)
    assert str(caught.value).startswith(
        "the gradient is not finite in every reply to gradient 0, before training has changed anything: "
    )
