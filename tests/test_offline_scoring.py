"""`es-engine score` and `es-engine tasks`, and rewards of parts in a config."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from es_engine import scoring
from es_engine.cli import app
from es_engine.config import ConfigError, explain, load_config, load_task, task_kinds
from rewards.base import VerifierSpec

ROW = {"prompt": "3 7 2 = 27:", "numbers": [3, 7, 2], "target": "27", "answer": "27", "note": "kept"}
DATA = Path(__file__).parent / "data"


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lines_come_back_with_their_scores(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {**ROW, "completion": "3*(7+2)"}, {**ROW, "completion": "3+7"})
    summary = scoring.score_file(load_task("countdown"), source, tmp_path / "out.jsonl")
    right, wrong = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    components = {"format": 0.1, "numbers": 0.2, "solved": 0.7}
    assert right == {
        **ROW,
        "completion": "3*(7+2)",
        "score": 1.0,
        "accuracy": 1.0,
        "components": components,
        "error": None,
    }
    assert (wrong["note"], wrong["accuracy"]) == ("kept", 0.0)
    assert (summary["completions"], summary["accuracy"], summary["failures"]) == (2, 0.5, {})


def test_a_prompt_may_be_a_chat_and_equal_prompts_are_a_group(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from rewards.base import verifier\n\n@verifier(takes='group')\n"
        "def size(rollouts):\n    assert rollouts[0].messages[0]['content'] == rollouts[0].prompt\n"
        "    return [len(rollouts)] * len(rollouts)\n"
    )
    chats = [[{"role": "user", "content": text}] for text in ("a", "a", "b")]
    source = write_lines(tmp_path / "in.jsonl", *({"prompt": chat, "completion": "x"} for chat in chats))
    task = load_task("countdown", [f"task.verifier={tmp_path / 'mine.py'}:size"])
    scoring.score_file(task, source, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == [2.0, 2.0, 1.0]


def test_a_completion_that_hangs_the_verifier_is_a_line_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import time\ndef slow(rollout):\n    time.sleep(1000 if rollout.completion == 'hang' else 0)\n    return 1\n"
    )
    source = write_lines(tmp_path / "in.jsonl", *({**ROW, "completion": text} for text in ("fine", "hang", "fine")))
    task = load_task("countdown", [f"task.verifier={tmp_path / 'mine.py'}:slow", "task.deadline=0.5"])
    summary = scoring.score_file(task, source, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == [1.0, None, 1.0]
    assert "took longer than 0.5 s" in rows[1]["error"]
    assert summary["failures"] == {f"{tmp_path / 'mine.py'}:slow": {"timeout": 1}}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("text", "line 2 is not an object with `prompt` and `completion`"),
        ({"prompt": "p"}, "line 2 is not an object with `prompt` and `completion`"),
        ({"prompt": 3, "completion": "c"}, "line 2: `prompt` is 3; accepted is text or a list of messages"),
        ({"prompt": [{"role": "user"}], "completion": "c"}, "line 2: `prompt` is [{'role': 'user'}]; accepted is"),
        ({**ROW, "completion": "c", "token_ids": 5}, "line 2: `token_ids` is 5; accepted is a list of whole numbers"),
        ({**ROW, "completion": "c", "token_ids": "abc"}, "line 2: `token_ids` is 'abc'; accepted is a list"),
        ({**ROW, "completion": "c", "token_ids": [1, -1]}, "line 2: `token_ids` is [1, -1]; accepted is a list"),
        ({**ROW, "completion": "c", "token_ids": [True]}, "line 2: `token_ids` is [True]; accepted is a list"),
        ({**ROW, "completion": "c", "finish_reason": 5}, "line 2: `finish_reason` is 5; accepted is text"),
    ],
)
def test_a_line_that_is_none_is_named_and_nothing_is_written(tmp_path: Path, row: Any, sentence: str) -> None:
    source = write_lines(tmp_path / "in.jsonl", {**ROW, "completion": "c"}, row)
    with pytest.raises(ValueError, match="--in: ") as caught:
        scoring.score_file(load_task("countdown"), source, tmp_path / "out.jsonl")
    assert sentence in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("countdown", ["task.template=r1"]),
        ("sudoku", ["task.size=9"]),
        ("math", [f"task.data={DATA / 'gsm8k/test.jsonl'}"]),
        ("arc", [f"task.data={DATA / 'arc-agi-1/training'}"]),
        ("conciseness", []),
        ("reasoning_gym", ["task.dataset=chain_sum"]),
    ],
)
def test_a_task_shows_a_right_and_a_wrong_answer(kind: str, overrides: list[str]) -> None:
    assert kind in task_kinds()
    task = load_task(kind, overrides)
    shown = list(scoring.graded(task))
    assert len(shown) == scoring.SHOWN
    assert all(each.right_score.accuracy == 1 for each in shown)
    assert all(each.wrong_score.accuracy == 0 for each in shown if each.right != each.wrong)


def test_what_a_line_may_lack_may_be_null(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def ids(r):\n    return 10 * len(r.token_ids) + len(r.finish_reason)\n")
    task = load_task("countdown", [f"task.verifier={tmp_path / 'mine.py'}:ids"])
    lines = ({"token_ids": None, "finish_reason": None}, {}, {"token_ids": [1, 2], "finish_reason": "length"})
    source = write_lines(tmp_path / "in.jsonl", *({**ROW, "completion": "c", **line} for line in lines))
    scoring.score_file(task, source, tmp_path / "out.jsonl")
    scores = [json.loads(line)["score"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert scores == [4, 4, 26]


MATHS = {"prompt": "6*7=", "completion": "It is \\boxed{42}."}


@pytest.mark.parametrize(
    ("overrides", "row"),
    [
        ([], {"answer": 42}),
        (["task.fields={answer: label}"], {"label": "42", "question": "q"}),
        (["task.fields={answer: label}"], {"answer": "42"}),
        (["task.dataset=gsm8k"], {"answer": "6 times 7\n#### 42"}),
        (["task.dataset=gsm8k"], {"answer": "42"}),
        (["task.dataset=minerva"], {"solution": "so \\boxed{42}"}),
        (["task.dataset=olympiadbench"], {"final_answer": ["42"]}),
    ],
)
def test_the_answer_of_a_line_is_read_as_that_of_a_row(
    tmp_path: Path, overrides: list[str], row: dict[str, Any]
) -> None:
    data = write_lines(
        tmp_path / "data.jsonl",
        *(
            {"question": f"{n}?", "problem": f"{n}?", "answer": "#### 1", "label": "1", "solution": "\\boxed{1}"}
            | {"final_answer": ["1"]}
            for n in range(20)
        ),
    )
    task = load_task("math", [f"task.data={data}", *overrides])
    source = write_lines(tmp_path / "in.jsonl", {**MATHS, **row}, {**MATHS, **row, "completion": "\\boxed{41}"})
    assert scoring.score_file(task, source, tmp_path / "out.jsonl")["accuracy"] == 0.5


def test_a_line_of_maths_without_an_answer_is_refused(tmp_path: Path) -> None:
    """It would be counted as wrong."""
    task = load_task("math", [f"task.data={DATA / 'gsm8k/test.jsonl'}", "task.dataset=gsm8k"])
    source = write_lines(tmp_path / "in.jsonl", {**MATHS, "answer": "42"}, MATHS)
    with pytest.raises(
        ValueError, match=r"line 2: `answer` is None; accepted is text that .*, or the answer alone under"
    ):
        scoring.score_file(task, source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_verifier_of_yours_may_do_without_the_answer(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def short(rollout):\n    return 1 / (1 + len(rollout.answer))\n")
    mine = f"{tmp_path / 'mine.py'}:short"
    source = write_lines(tmp_path / "in.jsonl", MATHS)
    for chosen in (f"task.verifier={mine}", f"task.reward={{short: {{verifier: '{mine}'}}}}"):
        task = load_task("math", [f"task.data={DATA / 'gsm8k/test.jsonl'}", "task.dataset=gsm8k", chosen])
        assert scoring.score_file(task, source, tmp_path / "out.jsonl")["score"] == 1


@pytest.mark.parametrize("kind", ["countdown", "sudoku", "conciseness", "reasoning_gym"])
def test_a_verifier_of_yours_sees_the_answer_of_training(tmp_path: Path, kind: str) -> None:
    (tmp_path / "mine.py").write_text("def same(rollout):\n    return float(rollout.completion == rollout.answer)\n")
    dataset = ["task.dataset=chain_sum"] if kind == "reasoning_gym" else []
    task = load_task(kind, [f"task.verifier={tmp_path / 'mine.py'}:same", *dataset])
    examples = [task.build().example("train", number) for number in range(4)]
    lines = ({**example.info, "prompt": "p", "completion": example.answer} for example in examples)
    source = write_lines(tmp_path / "in.jsonl", *lines)
    assert scoring.score_file(task, source, tmp_path / "out.jsonl")["score"] == 1


def test_the_answer_of_a_chat_is_in_the_column_that_the_task_names(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def same(rollout):\n    return float(rollout.completion == rollout.answer)\n")
    data = write_lines(tmp_path / "data.jsonl", *({"prompt": f"{n}?", "good": "x"} for n in range(20)))
    overrides = [f"task.data={data}", "task.fields={answer: good}", f"task.verifier={tmp_path / 'mine.py'}:same"]
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "p", "completion": "yes", "good": "yes", "answer": "no"})
    assert scoring.score_file(load_task("chat", overrides), source, tmp_path / "out.jsonl")["score"] == 1


def test_a_task_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r'^task: got "sudko", accepted is countdown, sudoku, .* or a config file$'):
        load_task("sudko")
    with pytest.raises(ConfigError, match=r"^task\.size: got 5, accepted is "):
        load_task("sudoku", ["task.size=5"])


# Rewards of parts


def test_a_reward_of_parts_is_the_tasks_verifier(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def brief(rollout):\n    return -len(rollout.completion)\n")
    config = tmp_path / "config.yaml"
    config.write_text(
        "name: parts\nmodel: {source: org/model}\noptimizer: {kind: sgd, lr: 1.0}\nbudget: {generations: 1}\n"
        "task:\n  kind: countdown\n  reward:\n"
        "    form: {of: format, weight: 0.5}\n"
        "    right: {of: accuracy, gate: form}\n"
        "    brief: {verifier: 'mine.py:brief', weight: 0.01, clip: [-10, 0]}\n"
    )
    task = load_config(config, ["task.reward.form.weight=2"]).task
    own = load_task("countdown").build().verifier
    shared = {"verifier": own.name, "options": own.options}
    rest = {"of": None, "clip": None, "gate": None}
    assert task.build().verifier == VerifierSpec(
        "sum",
        {
            "parts": [
                {"name": "form", **shared, **rest, "of": "format", "weight": 2.0},
                {"name": "right", **shared, **rest, "of": "accuracy", "weight": 1.0, "gate": "form"},
                {
                    **rest,
                    "name": "brief",
                    "verifier": f"{tmp_path / 'mine.py'}:brief",
                    "options": {},
                    "weight": 0.01,
                    "clip": (-10.0, 0.0),
                },
            ]
        },
    )
    source = write_lines(tmp_path / "in.jsonl", {**ROW, "completion": "3*(7+2)"})
    scoring.score_file(task, source, tmp_path / "out.jsonl")
    scored = json.loads((tmp_path / "out.jsonl").read_text())
    assert scored["components"] == pytest.approx({"form": 0.2, "right": 1.0, "brief": -0.07})
    assert scored["score"] == pytest.approx(1.13)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("form.wieght=2", "task.reward.form.wieght: unknown key, perhaps weight; accepted are verifier, options, of"),
        ("form.weight=heavy", 'task.reward.form.weight: got "heavy", accepted is a number'),
        ("form=2", "task.reward.form: got 2, accepted is null or a mapping, each value a mapping of verifier"),
        ("form.clip=[1, 0]", "task.reward.form.clip: got [1.0, 0.0], accepted is [the least, the greatest]"),
        ("form.options={free: 1}", "task.reward.form.options: got {"),
        ("form.gate=right", 'task.reward.form.gate: got "right", accepted is null or another part (none)'),
    ],
)
def test_a_part_that_makes_no_sense_is_named(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(sentence)):
        load_task("countdown", [f"task.reward.{override}"])


def test_a_reward_without_parts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^task\.reward: got {}, accepted is null or a"):
        load_task("countdown", ["task.reward={}"])


def test_the_parts_are_explained() -> None:
    assert "  task.reward.NAME.gate (null or non-empty text; default null): Another part" in explain()


def test_what_is_shown_of_a_verifier_that_fails_is_its_error(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def broken(rollout):\n    raise KeyError('no such column')\n")
    result = CliRunner().invoke(app, ["tasks", "--show", "sudoku", "--set", f"task.verifier={tmp_path}/mine.py:broken"])
    assert "the verifier raised KeyError: 'no such column'" in result.output
