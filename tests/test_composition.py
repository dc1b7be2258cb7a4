"""Rewards made of several."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.base import InvalidScore, Rollout, Score, VerifierSpec, judge_now, takes
from rewards.composition import without_gpu
from workers.scoring import Scorer

MINE = """
import asyncio, os, sys, time
from rewards.base import Score, verifier

def form(rollout):
    return Score(0.5, {"brackets": float("(" in rollout.completion)}, accuracy=0.25)

async def right(rollout):
    return float(rollout.completion == rollout.answer)

def sometimes(rollout):
    return None if rollout.completion == "skip" else 2.0

def noted(rollout):
    return Score(1.0, notes={"read": rollout.completion})

def broken(rollout):
    return "rubbish"

def hostile(rollout):
    return eval(rollout.completion)  # the tests' own text

async def later(rollout):
    return await asyncio.sleep(1000 if rollout.completion == "1" else 0)

@verifier(takes="group")
def rank(rollouts):
    lengths = sorted(len(rollout.completion) for rollout in rollouts)
    return [lengths.index(len(rollout.completion)) for rollout in rollouts]
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("composition") / "mine.py"
    path.write_text(MINE)
    return path


def scores(parts: list[dict[str, Any]], *completions: str) -> list[Score]:
    rollouts = [Rollout("", text, "x", {}, token_ids=tuple(range(len(text)))) for text in completions]
    verifier = VerifierSpec("sum", {"parts": parts}).load()
    return judge_now(verifier, rollouts, asyncio.run)


def part(mine: Path, function: str, **fields: Any) -> dict[str, Any]:
    return {"name": function, "verifier": f"{mine}:{function}", **fields}


def test_notes_are_kept_by_part(mine: Path) -> None:
    (score,) = scores([part(mine, "right"), part(mine, "noted")], "x")
    assert score.notes == {"noted": {"read": "x"}}


def test_parts_are_weighted_and_named(mine: Path) -> None:
    parts = [part(mine, "form", weight=2.0), part(mine, "right", weight=0.5)]
    right, wrong = scores(parts, "x", "y")
    assert right == Score(1.5, {"form": 1.0, "right": 0.5}, accuracy=0.25)
    assert wrong == Score(1.0, {"form": 1.0, "right": 0.0}, accuracy=0.25)


def test_a_part_may_be_a_component_or_the_accuracy(mine: Path) -> None:
    parts = [part(mine, "form", of="accuracy"), {**part(mine, "form", of="brackets", weight=3.0), "name": "brackets"}]
    assert scores(parts, "()", "")[0].components == {"form": 0.25, "brackets": 3.0}


def test_a_gate_lets_a_part_count_only_with_another(mine: Path) -> None:
    brackets = {**part(mine, "form", of="brackets", weight=0.0), "name": "brackets"}
    parts = [brackets, part(mine, "sometimes", gate="brackets")]
    assert [score.value for score in scores(parts, "(", "")] == [2.0, 0.0]


@given(low=st.floats(-3, 3), size=st.floats(0, 3), weight=st.floats(-2, 2))
def test_a_part_is_clipped_before_it_is_weighted(low: float, size: float, weight: float) -> None:
    parts = [{"name": "length", "verifier": "length", "options": {"free": 0, "most": 4}, "weight": weight}]
    parts[0]["clip"] = [low, low + size]
    for text in ("", "ab", "abcdef"):
        unclipped = -min(1.0, len(text) / 4)
        assert scores(parts, text)[0].value == weight * min(max(unclipped, low), low + size)


@pytest.mark.parametrize("number", ["float('inf')", "float('-inf')", "float('nan')", "'text'", "10**400"])
def test_a_component_that_is_no_finite_number_is_not_hidden_by_a_clip(tmp_path: Path, number: str) -> None:
    file = tmp_path / "rubbish.py"
    file.write_text(
        f"from rewards.base import Score\ndef rubbish(rollout):\n    return Score(1.0, {{'a': {number}}})\n"
    )
    parts = [{"name": "a", "verifier": f"{file}:rubbish", "of": "a", "clip": [-1.0, 1.0]}]
    (score,) = scores(parts, "x")
    assert isinstance(score, InvalidScore)
    assert str(score.error).startswith("a: the verifier returned ")


def test_a_part_may_start_an_event_loop_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "import asyncio\nasync def one():\n    return 1.0\ndef loop(rollout):\n    return asyncio.run(one())\n"
    )
    assert scores([{"name": "own", "verifier": f"{file}:loop"}], "x") == [Score(1.0, {"own": 1.0})]


def test_what_is_wrong_with_a_part_is_a_failure_and_not_a_missing_score(mine: Path) -> None:
    for parts in ([part(mine, "broken")], [part(mine, "form", of="spelling")]):
        with Scorer(VerifierSpec("sum", {"parts": parts})) as scorer:
            scorer.submit("key", Rollout("", "x", "", {}))
            assert scorer.drain()["key"].value is None
            assert scorer.failures == {(parts[0]["name"], "invalid value"): 1}


@pytest.mark.parametrize(
    ("completion", "failures"),
    [
        ("1 / 0", {("hostile", "exception"): 1}),
        ("sys.exit()", {("hostile", "exception"): 1}),
        ("'rubbish'", {("hostile", "invalid value"): 1}),
        ("bytearray(1 << 60)", {("hostile", "out of memory"): 1}),
        ("time.sleep(1000)", {("hostile", "timeout"): 1}),
        ("os._exit(1)", {("hostile", "died"): 1}),
        ("None", {("hostile", "no score"): 1, ("later", "no score"): 1, ("again", "no score"): 1}),
        ("1", {("later", "timeout"): 1}),
        ("0", {("later", "no score"): 1, ("again", "no score"): 1}),
    ],
)
def test_a_failure_is_counted_against_the_part_that_failed(
    mine: Path, completion: str, failures: dict[tuple[str, str], int]
) -> None:
    parts = [part(mine, "form"), part(mine, "hostile"), part(mine, "later")]
    again = {**parts[1], "name": "again", "of": "accuracy"}  # its verifier is asked in the name of the first
    with Scorer(VerifierSpec("sum", {"parts": [*parts, again]}), deadline=0.5) as scorer:
        scorer.submit("key", Rollout("", completion, "", {}))
        scorer.drain()
        assert scorer.failures == failures


def test_a_length_needs_tokens() -> None:
    with pytest.raises(ValueError, match="no token_ids"):
        VerifierSpec("length", {"free": 1, "most": 2}).load()(Rollout("", "x", "", {}))  # type: ignore[arg-type]


def test_a_part_without_a_verdict_counts_nothing(mine: Path) -> None:
    parts = [part(mine, "sometimes"), part(mine, "right")]
    assert scores(parts, "skip")[0] == Score(0.0, {"right": 0.0}, missing=("sometimes",))
    assert scores(parts[:1], "skip")[0] == Score(None, missing=("sometimes",))
    component = part(mine, "sometimes", of="exact")
    assert scores([component, parts[1]], "skip")[0] == Score(0.0, {"right": 0.0}, missing=("sometimes",))


def test_reward_models_are_tried_without_a_gpu() -> None:
    graded = {"model": "m", "device": "cuda"}
    assert without_gpu(VerifierSpec("reward_model", graded)) == VerifierSpec("reward_model", graded | {"device": "cpu"})
    parts = [{"name": name, "verifier": name, "options": graded} for name in ("reward_model", "other")]
    (model, other) = without_gpu(VerifierSpec("sum", {"parts": parts})).options["parts"]
    assert (model["options"]["device"], other["options"]["device"]) == ("cpu", "cuda")
    assert without_gpu(VerifierSpec("math", {"forms": ["boxed"]})) == VerifierSpec("math", {"forms": ["boxed"]})


def test_a_part_with_an_error_leaves_no_score(mine: Path) -> None:
    (score,) = scores([part(mine, "right"), part(mine, "broken")], "x")
    assert score.value is None
    assert str(score.error).startswith("broken: the verifier returned str")


def test_a_component_that_is_not_there_is_named(mine: Path) -> None:
    (score,) = scores([part(mine, "form", of="spelling")], "x")
    assert score.error == "form: its verifier gave no component 'spelling'; it gave brackets"


def test_a_group_verifier_makes_the_sum_take_groups(mine: Path) -> None:
    parts = [part(mine, "right"), part(mine, "rank", weight=10.0)]
    assert takes(VerifierSpec("sum", {"parts": parts}).load()) == "group"
    assert [score.value for score in scores(parts, "xyz", "x", "xy")] == [20.0, 1.0, 10.0]


def test_a_verifier_that_several_parts_name_is_asked_once(tmp_path: Path) -> None:
    (tmp_path / "counting.py").write_text(
        "asked = []\ndef count(rollout):\n    asked.append(1)\n    return len(asked)\n"
    )
    one = {"verifier": f"{tmp_path / 'counting.py'}:count"}
    (score,) = scores([{"name": "a", **one}, {"name": "b", "weight": 10.0, **one}], "x")
    assert score.value == 11.0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ([{"name": "length"}], "2 parts are called 'length'"),
        ([{"gate": "form"}], "the gate of 'b' is 'form', which is no other part"),
        ([{"gate": "b"}], "the gate of 'b' is 'b', which is no other part"),
        ([{"clip": [1, 0]}], "the clip of 'b' is [1, 0]; accepted is"),
        ([{"options": {"free": 3, "most": 3}}], "length has free=3 and most=3"),
    ],
)
def test_parts_that_make_no_sense_are_refused(changes: list[dict[str, Any]], sentence: str) -> None:
    length = {"verifier": "length", "options": {"free": 1, "most": 2}}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        VerifierSpec("sum", {"parts": [{"name": "length", **length}, {"name": "b", **length, **changes[0]}]}).load()


def test_no_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="it has no parts"):
        VerifierSpec("sum", {"parts": []}).load()
