"""Countdown: its problems, prompts, files and verdicts."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.base import Example, Rollout, Score, Split, VerifierSpec, as_score
from rewards.countdown import Countdown, Template, countdown_verifier
from rewards.countdown_problems import problem_key, split_of
from rewards.countdown_solver import count_solutions
from rewards.expressions import evaluate, literals, parse
from rewards.prompts import PLAIN_ALPHABET, WORKED

SPLITS: tuple[Split, ...] = get_args(Split)
INFO = {"numbers": [3, 7, 2], "target": "27"}
CONTEXT = "Using the numbers [44 19 35], create an equation that equals 98.\n<think>"


def judge(completion: str, form: str = "plain", info: dict[str, Any] = INFO, **options: Any) -> Score:
    verifier = VerifierSpec("countdown", {"form": form, **options}).load()
    return as_score(verifier(Rollout("", completion, info["target"], info)))


def keys(task: Countdown, split: Split, count: int) -> list[str]:
    return [problem_key(task.example(split, index).info) for index in range(count)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(count: int) -> list[dict[str, Any]]:
    """Rows without repeats, such as {"numbers": [5, 6, 7], "target": 18}."""
    return [{"numbers": [n, n + 1, n + 2], "target": 3 * n + 3} for n in range(1, count + 1)]


TRAIN_IDS = ["5,18,2=11", "1,1,15=14", "6,15,15=7"]
HELDOUT_IDS = ["19,13,7=39", "7,11,10=8", "5,12,2=22"]

# The generator.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"high": 9, "template": "plain"},
        {"numbers": (3, 4), "high": 99},
        {"numbers": (6,), "low": 2, "targets": (100, 999)},
        {"operations": "-/"},
    ],
)
def test_generated_problems_keep_to_the_settings_and_can_be_solved(options: dict[str, Any]) -> None:
    task = Countdown(**options)
    smallest, largest = options.get("targets", (1, 100))
    for split in SPLITS:
        for index in range(100):
            row = task.example(split, index).info
            assert len(row["numbers"]) in options.get("numbers", (3,))
            assert all(options.get("low", 1) <= number <= options.get("high", 20) for number in row["numbers"])
            assert smallest <= int(row["target"]) <= largest
            solution = parse(row["solution"])
            assert set(row["solution"]) & set("+-*/") <= set(options.get("operations", "+-*/"))
            assert sorted(literals(solution)) == sorted(row["numbers"])
            assert evaluate(solution) == int(row["target"])


def test_a_problem_depends_on_seed_split_and_index_alone() -> None:
    forwards, backwards = Countdown(seed=5), Countdown(seed=5)
    for split in SPLITS:
        ahead = [forwards.example(split, index) for index in range(60)]
        assert ahead == [backwards.example(split, index) for index in reversed(range(60))][::-1]
        assert ahead[-1] == Countdown(seed=5).example(split, 59)


def test_the_stream_of_a_seed_never_changes() -> None:
    """Ledgers name problems by split and index: these must mean the same in every version."""
    assert [Countdown(seed=1).example("train", index).id for index in (0, 1, 10**12)] == TRAIN_IDS
    assert [Countdown(seed=1).example("heldout", index).id for index in (0, 1, 2000)] == HELDOUT_IDS


def test_seeds_give_different_problems_from_the_same_splits() -> None:
    first, second = Countdown(seed=1), Countdown(seed=2)
    for split in SPLITS:
        assert keys(first, split, 20) != keys(second, split, 20)
    assert not set(keys(first, "train", 500)) & set(keys(second, "heldout", 500))


@pytest.mark.parametrize("high", [4, 9, 20])
def test_splits_are_disjoint(high: int) -> None:
    task = Countdown(high=high, template="plain")
    assert not set(keys(task, "train", 1000)) & set(keys(task, "heldout", 100))


def test_the_split_does_not_see_the_order_of_numbers_or_the_spelling_of_the_target() -> None:
    spellings = [
        {"numbers": list(order), "target": target} for order in permutations((5, 6, 7)) for target in ("18", 18, "18.0")
    ]
    assert len({split_of(row) for row in spellings}) == 1
    assert len({problem_key(row) for row in spellings}) == 1


def test_solved_problems_of_the_prompt_are_not_held_out() -> None:
    for numbers, target, expression in WORKED:
        assert judge(expression, info={"numbers": list(numbers), "target": target}).accuracy == 1
        assert split_of({"numbers": list(numbers), "target": target}) == "train"


@pytest.mark.parametrize("options", [{}, {"high": 9, "template": "plain"}])
def test_512_heldout_problems_are_all_different(options: dict[str, Any]) -> None:
    assert len(set(keys(Countdown(**options), "heldout", 512))) == 512


def test_too_few_problems_repeat_and_none_is_an_error() -> None:
    few = Countdown(numbers=(2,), high=3, template="plain")
    assert len(set(keys(few, "heldout", 30))) < 30
    with pytest.raises(ValueError, match="gave no train problem with numbers"):
        Countdown(high=1, targets=(50, 60))


# Curricula.

STAGES: tuple[dict[str, Any], ...] = (
    {"problems": 3, "numbers": (2,), "high": 9},
    {"problems": 4, "numbers": (3,), "operations": "+-", "solutions": (1, 2)},
)


def test_stages_follow_one_another_and_then_comes_the_task_itself() -> None:
    task, plain = (Countdown(numbers=(4,), curriculum=stages) for stages in (STAGES, ()))
    rows = [task.example("train", index).info for index in range(9)]
    assert [len(row["numbers"]) for row in rows] == [2] * 3 + [3] * 4 + [4] * 2
    assert all(number <= 9 for row in rows[:3] for number in row["numbers"])
    assert all(set(row["solution"]) & set("+-*/") <= set("+-") and row["solutions"] <= 2 for row in rows[3:7])
    assert rows[7:] == [plain.example("train", index).info for index in (7, 8)]
    assert [task.example("heldout", index) for index in range(5)] == [
        plain.example("heldout", index) for index in range(5)
    ]


def test_no_stage_trains_on_a_heldout_problem_of_any_other() -> None:
    ranges = [{"numbers": (count,), "high": 4} for count in (2, 3)]
    task = Countdown(curriculum=[{"problems": 200, **each} for each in ranges], high=4)
    trained = set(keys(task, "train", 600))
    for each in ranges:
        assert not trained & set(keys(Countdown(**each), "heldout", 200))
    assert {split_of(task.example("train", index).info) for index in range(600)} == {"train"}


@pytest.mark.parametrize("count", range(2, 7))
def test_problems_of_2_to_6_numbers_have_the_solutions_that_were_asked_for(count: int) -> None:
    task = Countdown(numbers=(count,), solutions=(1, 200))
    verifier = task.verifier.load()
    for split in SPLITS:
        example = task.example(split, 0)
        solutions = example.info["solutions"]
        assert len(example.info["numbers"]) == count
        assert solutions == count_solutions(example.info["numbers"], Fraction(example.answer)) <= 200
        score = as_score(verifier(Rollout("", task.worked_solution(example), example.answer, example.info)))
        assert score.accuracy == 1


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        ({"problems": 0}, "task.curriculum.1.problems: 0 is not a number"),
        ({}, "task.curriculum.1.problems: None is not a number"),
        ({"problems": 5, "number": 3}, "task.curriculum.1: 'number' is not one of problems, numbers, low, high,"),
        ({"problems": 5, "low": 21}, "task.curriculum.1.low: 21 to 20"),
        ({"problems": 5, "solutions": (2, 1)}, "task.curriculum.1.solutions: (2, 1) is no range"),
        ({"problems": 5, "high": 1, "targets": (50, 60)}, "task.curriculum.1: 20000 draws gave no train problem with"),
    ],
)
def test_a_stage_that_cannot_be_is_named(stage: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        Countdown(curriculum=[{"problems": 2}, stage])


@pytest.mark.parametrize("options", [{"curriculum": STAGES}, {"solutions": (1, 2)}])
def test_problems_of_a_file_have_no_curriculum(options: dict[str, Any], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows_of(30))
    with pytest.raises(ValueError, match=rf"^task\.{next(iter(options))}: it is for generated problems"):
        Countdown(data=data, **options)


# Prompts and worked solutions.


@pytest.mark.parametrize("template", get_args(Template))
def test_every_template_has_a_prompt_and_a_solution_its_verifier_accepts(template: Template, tmp_path: Path) -> None:
    rows = [{**row, "context": CONTEXT} for row in rows_of(20)]
    data = write_rows(tmp_path / "rows.jsonl", rows) if template == "dataset" else None
    task = Countdown(template=template, data=data)
    verifier = task.verifier.load()
    for split in SPLITS:
        for index in range(20):
            example = task.example(split, index)
            assert (example.prompt is None) != (example.messages is None)
            completion = task.worked_solution(example)
            score = as_score(verifier(Rollout("", completion, example.answer, example.info)))
            assert score.value == pytest.approx(1)
            assert score.accuracy == 1


def test_a_plain_line_keeps_to_its_alphabet() -> None:
    task = Countdown(template="plain", numbers=(3, 4), high=99)
    for index in range(200):
        example = task.example("train", index)
        assert example.prompt is not None
        assert set(example.prompt + task.worked_solution(example)) <= set(PLAIN_ALPHABET)
        assert set(task.stop) <= set(PLAIN_ALPHABET)


def test_the_few_shot_prompt_shows_worked_lines_and_asks_for_one_more() -> None:
    prompt = Countdown(shots=2).example("train", 0).prompt
    assert prompt is not None
    lines = prompt.split("\n")
    assert len(lines) == 3
    assert lines[0] == "3 7 2 = 27: 3*(7+2)"
    assert lines[2].endswith(":")


def test_the_published_prompt_is_used_as_it_is(tmp_path: Path) -> None:
    rows = [{**row, "context": CONTEXT, "solution": "(1 + 1)", "id": 7} for row in rows_of(20)]
    (tmp_path / "countdown.json").write_text(json.dumps(rows, indent=2))
    task = Countdown(template="dataset", data=tmp_path / "countdown.json")
    example = task.example("train", 0)
    assert example.prompt == CONTEXT
    assert example.info["id"] == 7
    assert isinstance(example.info["target"], str)
    assert task.verifier.options["form"] == "r1"


# Files.


def test_one_file_is_split_and_gone_through_in_a_new_order_each_epoch(tmp_path: Path) -> None:
    task = Countdown(data=write_rows(tmp_path / "rows.jsonl", rows_of(50)), seed=3)
    sizes = {split: sum(split_of(row) == split for row in rows_of(50)) for split in SPLITS}
    for split in SPLITS:
        size = sizes[split]
        stream = keys(task, split, 2 * size)
        assert set(stream[:size]) == set(stream[size:]) == {problem_key(r) for r in rows_of(50) if split_of(r) == split}
        assert stream[:size] != stream[size:]
        assert keys(task, split, size) == stream[:size]


def test_a_problem_of_the_heldout_file_is_left_out_of_training(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", rows_of(30))
    twisted = [{"numbers": row["numbers"][::-1], "target": f"{row['target']}.0"} for row in rows_of(10)]
    task = Countdown(data=data, heldout_data=write_rows(tmp_path / "heldout.jsonl", twisted))
    assert len(set(keys(task, "heldout", 10))) == 10
    assert set(keys(task, "train", 60)) == {problem_key(row) for row in rows_of(30)[10:]}


def test_targets_need_not_be_whole(tmp_path: Path) -> None:
    rows = [{"numbers": [10, 3, n], "target": f"{10 / 3 + n:.6f}"} for n in range(1, 30)]
    task = Countdown(data=write_rows(tmp_path / "rows.jsonl", rows))
    info = task.example("train", 0).info
    assert judge(f"10/3+{info['numbers'][2]}", info=info).accuracy == 1
    assert judge(f"10/3-{info['numbers'][2]}", info=info).accuracy == 0


def test_a_problem_without_solution_has_no_worked_one() -> None:
    example = Example("1,1,1=50", "50", {"numbers": [1, 1, 1], "target": "50", "solution": "50"}, prompt="")
    with pytest.raises(ValueError, match="no expression of the numbers"):
        Countdown().worked_solution(example)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"numbers": [1, 2]', "line 1 is not JSON"),
        ('\n{"numbers": [1, 2]}', "line 2: `target` is None"),
        ('{"numbers": "1 2", "target": 3}', "`numbers` is '1 2'"),
        ('{"numbers": [1, 2.5], "target": 3}', "`numbers` is"),
        ('{"numbers": [1, true], "target": 3}', "`numbers` is"),
        ('{"numbers": [], "target": 3}', "`numbers` is"),
        ('{"numbers": [1, 2], "target": "three"}', "`target` is 'three'"),
        ('{"numbers": [1, 2], "target": "1e999999999"}', "`target` is '1e999999999'"),
        ('[{"numbers": [1, 2], "target": 3}, 4]', "row 2 is not an object"),
        ("[" * 100_000, "is not JSON"),
        ("", "no row for the"),
        ('{"numbers": [1, 2], "target": 3}', "no row for the"),
    ],
    ids=range(12),
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Countdown(data=file)
    assert str(caught.value).startswith("task.data: ")
    assert str(file) in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.data: no file"):
        Countdown(data=tmp_path / "absent.jsonl")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8"):
        Countdown(data=tmp_path / "bytes")
    with pytest.raises(ValueError, match="has no prompt text in `context`"):
        Countdown(data=write_rows(tmp_path / "rows.jsonl", rows_of(9)), template="dataset")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"numbers": ()}, "numbers"),
        ({"numbers": (3, 7)}, "numbers"),
        ({"low": 0}, "low"),
        ({"low": 9, "high": 8}, "low"),
        ({"operations": "+^"}, "operations"),
        ({"operations": ""}, "operations"),
        ({"targets": (0, 5)}, "targets"),
        ({"targets": (9, 5)}, "targets"),
        ({"solutions": (0, 5)}, "solutions"),
        ({"template": "r2"}, "template"),
        ({"template": "dataset"}, "template"),
        ({"shots": -1}, "shots"),
        ({"shots": 99}, "shots"),
        ({"heldout_data": "rows.jsonl"}, "heldout_data"),
        ({"weights": {"lenght": 1.0}}, "weights"),
        ({"weights": {"solved": float("nan")}}, "weights"),
        ({"weights": {"solved": 1.0}, "verifier": "mine.py:score"}, "weights"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^task.{field}: "):
        Countdown(**options)


def test_a_users_verifier_takes_the_place_of_ours() -> None:
    assert Countdown(verifier="mine.py:score").verifier == VerifierSpec("mine.py:score")


# The plain verdict.


@pytest.mark.parametrize(
    "completion",
    [
        "3*(7+2)",
        " 3 * (7 + 2) ",
        "3×(7+2)",
        "(7+2)×3=27",
        "3*(7+2) = 27",
        "3*(7+2)=27.0",
        "3*(7+2)\n8 5 2 = 15:",
        "3*(7+2)\r\n",
        "3*(7−−2)",
        "--3*(+7+2)",
    ],
)
def test_plain_solutions(completion: str) -> None:
    score = judge(completion)
    assert score.accuracy == 1
    assert score.value == pytest.approx(1)


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("", 0.0),
        ("\n3*(7+2)", 0.0),
        ("the answer is 27", 0.0),
        ("3*(7+2", 0.0),
        ("3*(7+2)=", 0.0),
        ("3*(7+2)=3*9", 0.0),
        ("3*(7+2).", 0.0),
        ("3/(7-7)", 0.0),
        ("3**7", 0.0),
        ("27", 0.1),
        ("7", 0.1 + 0.2 / 3),
        ("7+3", 0.1 + 0.4 / 3),
        ("7+3+3", 0.1 + 0.4 / 3),
        ("3*(7+2)+0", 0.1 + 0.6 / 4),
        ("3+7+2", 0.3),
        ("3+7+2=12", 0.3),
        ("3+7+2=27", 0.3),
        ("3*(7+2)=28", 0.3),
    ],
)
def test_plain_partial_credit(completion: str, value: float) -> None:
    score = judge(completion)
    assert score.accuracy == 0
    assert score.value == pytest.approx(value)


def test_operators_as_typed() -> None:
    assert judge("6÷(5−4)", info={"numbers": [4, 5, 6], "target": "6"}).accuracy == 1


def test_numbers_given_twice_are_used_twice() -> None:
    info = {"numbers": [5, 5, 2], "target": "12"}
    assert judge("5+5+2", info=info).accuracy == 1
    assert judge("5+2+5*1", info=info).accuracy == 0
    assert judge("12*5/5", info=info).accuracy == 0
    assert judge("10+2", info=info).accuracy == 0
    assert judge("5+2", info={"numbers": [5, 5, 2], "target": "7"}).accuracy == 0


@given(st.text() | st.text(alphabet="0123456789 +-*/()=×÷−.\n"), st.sampled_from(["plain", "r1"]))
def test_any_completion_gets_a_score_that_is_the_sum_of_its_components(completion: str, form: str) -> None:
    score = judge(completion, form)
    assert score.value == sum(score.components.values())
    assert 0 <= score.value <= 1.0001
    assert list(score.components) == ["format", "numbers", "solved"]
    assert score.accuracy in (0, 1)


def test_weights() -> None:
    score = judge("3*(7+2)", weights={"format": 0.0, "solved": 2.0})
    assert score.components == {"format": 0.0, "numbers": 0.2, "solved": 2.0}
    with pytest.raises(ValueError, match=r"task\.weights: 'format' is -1"):
        countdown_verifier("plain", {"format": -1})
    with pytest.raises(ValueError, match="form is 'chat'"):
        countdown_verifier("chat")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["plain", "r1"])
def test_a_huge_completion_is_scored_at_once(form: str) -> None:
    start = time.perf_counter()
    for piece in ("<answer>", "</think>\n<answer>", "<answer></answer>", "(", "9", "=", " "):
        judge(piece * 200_000, form)
    assert time.perf_counter() - start < 2


# The R1 verdict.


@pytest.mark.parametrize(
    ("completion", "accuracy"),
    [
        ("so </think>\n<answer>3*(7+2)</answer>", 1),
        ("<answer>3*(7+2)</answer>", 1),
        ("</think> <answer> 3 * (7 + 2) </answer>", 1),
        ("</think>\n<answer>\n3*(7+2)\n</answer>", 1),
        ("<answer>1</answer> no, <answer>3*(7+2)</answer> and on", 1),
        ("<answer>3*(7+2)</answer> no, <answer>3+7+2</answer>", 0),
        ("<answer>3*(7+2)</answer> no, <answer>", 1),
        ("<answer>3*(7+2)</answer> no, <answer></answer>", 0),
        ("<answer>3*(7+2)", 0),
        ("3*(7+2)", 0),
        ("<answer>3*(7+2)=27</answer>", 0),
        ("<answer>3×(7+2)</answer>", 0),
        ("<answer>3*(7+2.0)</answer>", 0),
        ("<answer>03*(7+2)</answer>", 0),
        ("<answer>27</answer>", 0),
        ("<answer>so <answer>3*(7+2)</answer>", 0),
    ],
)
def test_r1_follows_the_published_rule(completion: str, accuracy: int) -> None:
    assert judge(completion, "r1").accuracy == accuracy


@pytest.mark.parametrize(
    ("target", "accuracy"), [("3.333333", 1), ("3.33333", 1), ("3.33332", 0), ("3.3333", 0), ("3", 0)]
)
def test_the_value_is_within_1e_5_of_the_target(target: str, accuracy: int) -> None:
    assert judge("<answer>10/3</answer>", "r1", {"numbers": [10, 3], "target": target}).accuracy == accuracy


PIECES = ["<think>", "</think>", "<answer>", "</answer>", "\n", " ", "3*(7+2)", "3+7+2", "x"]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@settings(max_examples=500)
def test_r1_reads_the_structure_as_the_published_patterns_do(completion: str) -> None:
    text = "<think>" + completion
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if re.match(r"^<think>.*?</think>\n<answer>.*?</answer>$", text, re.DOTALL):
        expected = 1.0
    else:
        expected = 0.1 * bool(re.search(r"<think>.*?</think>", text, re.DOTALL)) + 0.5 * bool(answers)
    score = judge(completion, "r1", weights={"format": 1.0})
    assert score.components["format"] == expected
    assert score.accuracy == (bool(answers) and answers[-1].strip() == "3*(7+2)")


def test_weights_can_make_the_published_reward() -> None:
    published = {"format": 0.1, "numbers": 0.0, "solved": 1.0}
    assert judge(" so </think>\n<answer>3*(7+2)</answer>", "r1", weights=published).value == pytest.approx(1.1)
    assert judge(" so </think>\n<answer>3+7+2</answer>", "r1", weights=published).value == pytest.approx(0.1)
    assert judge(" so </think> <answer>3*(7+2)</answer>", "r1", weights=published).value == pytest.approx(1.06)
