"""One pool for several runs: what workers that were turned to another do is what its own would have done."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from inputs import random_center
from small_runs import LocalPool, SessionPool, small_config, train_here, write_rows

from es_engine import session
from es_engine.config import Config, parse_config
from es_engine.evaluation import evaluate_center
from es_engine.run_folder import RunFolder
from es_engine.session import Materials, Session, sampling
from es_engine.trainer import Notices, begin

ES = {"kind": "es", "population": 4, "sigma": 0.3, "prompts": 4}
SFT = {"kind": "sft", "batch": 4}
VERIFIERS = """
def letters(rollout):
    return len(set(rollout.completion)) / 8

def length(rollout):
    return float(len(rollout.completion))
"""


def opened(config: Config, *others: Config) -> Session:
    with patch.object(session, "Pool", SessionPool):
        return Session(config, print, others)


def figures(found: Materials, pool: Any) -> list[Any]:
    """What workers make of a center: rewards, and a direction."""
    theta = random_center(found.space, 0.1)
    drawn = sampling(found.config, found.task, 1, 0.0)
    evaluation = evaluate_center(pool, theta, 7, found.problems("heldout", range(4)), drawn, 4)
    direction = next(found.method.step(pool, theta, 7, 0.0, found.problems))
    return [[row["completion"] for row in evaluation.samples], evaluation.summary["reward"], direction.tobytes()]


def test_a_pool_that_is_turned_to_a_run_serves_it_as_its_own_pool_would(random_llama: Path, tmp_path: Path) -> None:
    """Other methods, units, alphas, trained factors, seeds and tasks, each after the others, with the same versions."""
    (tmp_path / "verifier.py").write_text(VERIFIERS)
    letters, length = ({"verifier": f"{tmp_path}/verifier.py:{name}"} for name in ("letters", "length"))
    configs = [
        small_config(random_llama, ES, task=letters),
        small_config(random_llama, SFT, task=letters, space={"alpha": 3.0}),
        small_config(random_llama, ES, task=letters, space={"train": "A", "seed": 3}).model_copy(update={"seed": 5}),
        small_config(random_llama, ES, task=length | {"max_tokens": 5}),
    ]
    with opened(configs[0], *configs[1:]) as turned:
        for config in (*configs[1:], configs[0]):
            turned.turn_to(config)
            assert turned.materials.config is config
            fresh = session.gather(config)
            assert figures(turned.materials, turned.pool) == figures(fresh, LocalPool(fresh))


@pytest.mark.parametrize(
    ("axis", "fields", "sentence"),
    [
        ("space", {"rank": 8}, r"space\.rank: got 8, accepted is 4, for runs on one pool share it"),
        ("space", {"targets": ["q_proj"]}, r"space\.targets: got \[\"q_proj\"\], accepted is \"all-linear\""),
        ("engine", {"dtype": "bfloat16"}, r"engine\.dtype: got \"bfloat16\", accepted is \"float32\""),
        ("engine", {"kind": "simulated", "dtype": None, "device": None}, r"engine\.kind: got \"simulated\""),
        ("pool", {"threads": 3}, r"pool\.threads: got 3"),
        ("model", {"source": "elsewhere"}, r"model\.source: got \"elsewhere\""),
    ],
)
def test_runs_that_cannot_share_a_pool_are_told_why(
    random_llama: Path, axis: str, fields: dict[str, Any], sentence: str
) -> None:
    other = small_config(random_llama, ES).model_dump()
    other[axis] = {key: value for key, value in (other[axis] | fields).items() if value is not None or axis != "engine"}
    if fields.get("kind") == "simulated":
        other["engine"] = {"kind": "simulated"}
    with pytest.raises(ValueError, match=sentence):
        opened(small_config(random_llama, ES), session.Config.model_validate(other))


def test_a_session_turns_to_no_run_that_needs_more_of_the_engines(random_llama: Path) -> None:
    with opened(small_config(random_llama, ES, engine={"chunk": 4})) as found:
        with pytest.raises(ValueError, match=r"^engine\.chunk: got 8, accepted is at most 4"):
            found.turn_to(small_config(random_llama, ES, engine={"chunk": 8}))
        with pytest.raises(ValueError, match=r"^method\.kind: got \"sft\", accepted is es"):
            found.turn_to(small_config(random_llama, SFT))


def test_a_run_counts_what_befalls_its_workers_from_its_own_beginning(random_llama: Path, tmp_path: Path) -> None:
    config = small_config(random_llama, SFT, budget={"generations": 1})
    run = RunFolder(tmp_path / "run")
    with opened(config) as shared:
        shared.pool.restarts = shared.pool.speculative = 3  # in a run before
        begin(shared, config, run, Notices())
    (line,) = run.open_ledger().generations
    assert (line["restarts"], line["speculative"]) == (0, 0)


def test_a_training_prompt_that_leaves_no_room_is_refused_before_the_run_begins(
    random_llama: Path, tmp_path: Path
) -> None:
    """In the middle of it, it would end the run, and every resumption."""
    (tmp_path / "verifier.py").write_text(VERIFIERS)
    short, long = ({"id": name, "prompt": text, "answer": "3"} for name, text in (("a", "1+2="), ("b", "1+" * 50_000)))
    task = {
        "kind": "chat",
        "template": "plain",
        "data": write_rows(tmp_path / "rows.jsonl", [short, long]),
        "heldout_data": write_rows(tmp_path / "heldout.jsonl", [{"prompt": "2+2="}]),
        "verifier": f"{tmp_path}/verifier.py:letters",
        "max_tokens": 4,
    }
    config = parse_config(small_config(random_llama, ES).model_dump(mode="json") | {"task": task})
    with pytest.raises(ValueError, match=r"^task: the prompt of b has \d+ tokens, which with task.max_tokens=4"):
        train_here(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
