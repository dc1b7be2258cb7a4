"""reasoning-gym's data sets: their problems, their way to the verifier, and their own verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st
from reasoning_gym.composite import DatasetSpec
from reasoning_gym.utils import extract_answer

from es_engine.config import ConfigError, ReasoningGymTaskConfig, load_config
from rewards.base import Example, Rollout, Score, Split, VerifierSpec, as_score
from rewards.reasoning_gym import BLOCK, SIZE, ReasoningGym, Template, from_json, to_json
from workers.scoring import Scorer

SPLITS: tuple[Split, ...] = get_args(Split)
IDS = [
    "chain_sum/2076537463/2357",
    "chain_sum/2081417463/6266",
    "chain_sum/2076547463/2292",
    "chain_sum/2081427463/8296",
]
# With tuples in their metadata, mappings with whole numbers as keys, fractions, no answers, answers of many lines,
# partial credit, a score that needs the tuples back, and few different questions.
VARIED: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3},
    "arc_agi": {},
    "graph_color": {},
    "gsm_symbolic": {},
    "mini_sudoku": {},
    "leg_counting": {},
    "propositional_logic": {},
    "count_bits": {"max_n": 300},
    "composite": {"datasets": [{"name": "gcd", "weight": 1, "config": {}}, {"name": "lcm", "weight": 2, "config": {}}]},
}


def rollout(example: Example, completion: str) -> Rollout:
    """As it comes out of the pipe to a scoring process."""
    return Rollout("", completion, example.answer, json.loads(json.dumps(example.info)), example.messages)


@lru_cache
def theirs(name: str, seed: int) -> Any:
    """The package's own data set of which an example says that it comes from it."""
    config = dict(VARIED[name])
    if name == "composite":
        config["datasets"] = [DatasetSpec(**each) for each in config["datasets"]]
    return reasoning_gym.create_dataset(name, **config, seed=seed, size=SIZE)


@pytest.mark.parametrize("name", VARIED)
def test_scores_are_those_of_the_package(name: str) -> None:
    task = ReasoningGym(dataset=name, config=VARIED[name])
    verify = task.verifier.load()
    for split in SPLITS:
        for index in range(2):
            example = task.example(split, index)
            row = rollout(example, "").info
            dataset = theirs(name, row["seed"])
            entry = dataset[row["index"]]
            assert {key: from_json(row[key]) for key in entry} == entry
            for text in ("<answer>1</answer>", "<answer>1 2\n3 4</answer>", "1", f"<answer>{example.answer}</answer>"):
                expected = dataset.score_answer(extract_answer(text), entry)
                assert as_score(verify(rollout(example, text))) == Score(expected, accuracy=float(expected == 1)), text


@pytest.mark.parametrize("template", get_args(Template))
@pytest.mark.parametrize("name", ["chain_sum", "gsm_symbolic", "mini_sudoku", "composite"])
def test_a_worked_solution_scores_one(name: str, template: Template) -> None:
    task = ReasoningGym(dataset=name, config=VARIED[name], template=template)
    verify = task.verifier.load()
    for split in SPLITS:
        example = task.example(split, 1)
        assert (example.prompt is None) != (example.messages is None)
        completion = task.worked_solution(example)
        assert not any(text in completion for text in task.stop)
        assert as_score(verify(rollout(example, completion))) == Score(1.0, accuracy=1.0)


def test_a_problem_whose_answer_is_unknown_has_no_worked_solution() -> None:
    task = ReasoningGym(dataset="graph_color")
    example = task.example("train", 0)
    assert example.answer == ""
    with pytest.raises(ValueError, match="graph_color knows no answer"):
        task.worked_solution(example)


@pytest.mark.parametrize("name", ["chain_sum", "count_bits", "leg_counting", "composite"])
def test_splits_share_neither_question_nor_seed(name: str) -> None:
    indices = (*range(150), *range(3 * BLOCK, 3 * BLOCK + 100))
    tasks = [ReasoningGym(dataset=name, config=VARIED[name], seed=seed) for seed in (0, 1)]
    rows = {split: [[task.example(split, index).info for index in indices] for task in tasks] for split in SPLITS}
    train, heldout = ({row["question"] for own in rows[split] for row in own} for split in SPLITS)
    assert not train & heldout
    for own in zip(rows["train"], rows["heldout"], strict=True):
        # What an entry is made of is the sum: data sets seed their generators with it.
        train_seeds, heldout_seeds = ({row["seed"] + row["index"] for row in part} for part in own)
        assert not train_seeds & heldout_seeds


def test_heldout_problems_differ() -> None:
    task = ReasoningGym(dataset="chain_sum", config=VARIED["chain_sum"])
    assert len({task.example("heldout", index).info["question"] for index in range(200)}) == 200


def test_a_problem_depends_on_seed_split_and_index_alone() -> None:
    places: list[tuple[Split, int]] = [("train", 0), ("heldout", 7), ("train", BLOCK), ("heldout", BLOCK), ("train", 1)]
    forwards, backwards = (ReasoningGym(dataset="leg_counting", seed=5) for _ in range(2))
    ahead = [forwards.example(*place) for place in places]
    assert ahead == [backwards.example(*place) for place in reversed(places)][::-1]
    assert ahead != [ReasoningGym(dataset="leg_counting", seed=6).example(*place) for place in places]
    assert len({example.id for example in ahead}) == len(places)


def test_the_stream_of_a_seed_never_changes() -> None:
    """Ledgers name problems by split and index: these must mean the same in every version."""
    task = ReasoningGym(dataset="chain_sum", seed=1)
    assert [task.example(split, index).id for split in SPLITS for index in (0, 10**6)] == IDS


def test_an_entry_that_another_process_would_make_otherwise_scores_still() -> None:
    """Why the entry travels: this data set walks through a set of texts."""
    code = (
        "from rewards.reasoning_gym import ReasoningGym\n"
        "print(repr(ReasoningGym(dataset='ransom_note').example('train', 0)))"
    )
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    task = ReasoningGym(dataset="ransom_note")
    example = task.example("train", 0)
    assert other.stdout.strip() != repr(example)
    with Scorer(task.verifier) as scorer:
        scorer.submit("right", Rollout("", task.worked_solution(example), example.answer, example.info))
        scorer.submit("silent", Rollout("", "no tags", example.answer, example.info))
        scorer.submit("foreign", Rollout("", "<answer>1</answer>", "", {"numbers": [1]}))
        scores = scorer.drain()
    assert scores["right"] == Score(1.0, accuracy=1.0)
    assert scores["silent"] == Score(0.0, accuracy=0.0)
    assert "this row has no `question`" in str(scores["foreign"].error)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.fractions(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner)
    ),
    max_leaves=12,
)


@given(values)
def test_what_goes_through_json_comes_back_exactly(value: Any) -> None:
    assert repr(from_json(json.loads(json.dumps(to_json(value))))) == repr(value)


def test_what_json_cannot_say_is_refused() -> None:
    assert to_json({1: (Fraction(1, 3),)}) == {"__items__": [[1, {"__tuple__": [{"__fraction__": "1/3"}]}]]}
    with pytest.raises(ValueError, match="an entry holds a set"):
        to_json({"metadata": [{1, 2}]})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dataset": "chain_sums"}, "task.dataset: reasoning-gym has no data set 'chain_sums', perhaps chain_sum"),
        ({"dataset": "chain_sum", "config": {"min_term": 2}}, "task.config: chain_sum of reasoning-gym refuses"),
        ({"dataset": "chain_sum", "config": {"min_terms": 0}}, "min_terms must be positive"),
        ({"dataset": "chain_sum", "config": {"seed": 1}}, "task.config: seed is set by the task"),
        ({"dataset": "composite"}, "Must specify at least one dataset"),
        ({"dataset": "chain_sum", "template": "few_shot"}, "task.template: got 'few_shot'"),
        ({"dataset": "count_bits", "config": {"min_n": 1, "max_n": 1}}, "gave no"),
    ],
)
def test_settings_without_problems_are_refused(options: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"^task") as caught:
        ReasoningGym(**options)
    assert words in str(caught.value)


def test_without_the_package_one_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.utils", None)
    with pytest.raises(ValueError, match=r"^task\.dataset: .* pip install reasoning-gym$"):
        ReasoningGym(dataset="chain_sum")
    with pytest.raises(ValueError, match=r"^verifier: rg:chain_sum needs .* pip install reasoning-gym$"):
        VerifierSpec("rg:chain_sum").load()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rg:chain_sum(extract='tags')", "extract is 'tags'; accepted are answer, text"),
        ("rg:chain_sum(strict=True)", "cannot be called with the arguments given"),
        ("rg:chain_sum:score", "names a function"),
    ],
)
def test_a_wrong_verifier_is_refused(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^verifier: ") as caught:
        VerifierSpec(name).load()
    assert words in str(caught.value)


def test_the_verifier_reads_entries_of_the_package_as_they_are() -> None:
    """Such as a file of rows that reasoning-gym exported, in a task of another kind."""
    entry = reasoning_gym.create_dataset("chain_sum", seed=3, size=1)[0]
    row = json.loads(json.dumps(entry))
    verify = VerifierSpec("rg:chain_sum(extract='text')").load()
    assert as_score(verify(Rollout("", f" {entry['answer']}\n", "", row))) == Score(1.0, accuracy=1.0)


def test_the_config_builds_the_task(tmp_path: Path) -> None:
    base = {
        "name": "sums",
        "model": {"source": "org/model"},
        "optimizer": {"lr": 1},
        "budget": {"generations": 1},
        "task": {"kind": "reasoning_gym", "dataset": "chain_sum", "config": {"min_terms": 2}, "seed": 4},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(base))
    config = load_config(path, ["task.config.max_terms=2", "task.verifier=rg:chain_sum"]).task
    assert isinstance(config, ReasoningGymTaskConfig)
    assert config.config == {"min_terms": 2, "max_terms": 2}
    task = config.build()
    expected = ReasoningGym(dataset="chain_sum", config=config.config, seed=4)
    assert task.example("train", 3) == expected.example("train", 3)
    assert task.verifier == expected.verifier
    with pytest.raises(ConfigError, match=r"accepted is countdown or sudoku while model\.kind is tiny"):
        load_config(path, ["model={kind: tiny}"])
    with pytest.raises(ConfigError, match=r"task\.dataset: got null, accepted is non-empty text"):
        load_config(path, ["task.dataset=null"])
