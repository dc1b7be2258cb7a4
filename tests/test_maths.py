"""Maths: its sources, prompts, how answers are found and compared, and that hostile ones cost nothing."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_engine.config import MathTaskConfig, parse_config
from rewards.answers import Form, extract, number, reading, same
from rewards.base import Rollout, Score, Split, VerifierSpec, as_score
from rewards.math_data import Dataset, identity, problem_key, read_rows
from rewards.math_prompts import WORKED
from rewards.maths import WEIGHTS, Maths, Template, math_verifier
from rewards.problems import split_of_key
from workers.scoring import Scorer

DATA = Path(__file__).parent / "data"
GSM8K = str(DATA / "gsm8k" / "test.jsonl")
MATH500 = str(DATA / "math500" / "math500_test.json")
SPLITS: tuple[Split, ...] = get_args(Split)
slow = settings(deadline=None, max_examples=50)


def judge(completion: str, answer: str, *forms: Form, **options: Any) -> Score:
    verifier = VerifierSpec("math", {"forms": forms or ("boxed",), **options}).load()
    return as_score(verifier(Rollout("", completion, answer, {})))


def write_rows(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(count)]


def references(path: str, dataset: Dataset) -> list[str]:
    return [row["answer"] for row in read_rows(path, "task.data", dataset)]


# Sources.


@pytest.mark.parametrize(
    ("dataset", "row", "question", "answer"),
    [
        ("gsm8k", {"question": "q", "answer": "1 + 1 = <<1+1=2>>2\n#### 1,002"}, "q", "1,002"),
        ("math500", {"problem": "p", "solution": "s", "answer": "\\frac{1}{2}", "level": 3}, "p", "\\frac{1}{2}"),
        ("aime24", {"id": 60, "problem": "p", "solution": "s", "answer": "023", "question": "q"}, "p", "023"),
        ("amc23", {"id": 0, "problem": "p", "answer": 27.0, "question": "q"}, "p", "27"),
        ("amc23", {"problem": "p", "answer": 0.5}, "p", "0.5"),
        ("minerva", {"problem": "p", "solution": "\\boxed{1} so \\boxed{4.5e33} ergs", "type": "t"}, "p", "4.5e33"),
        ("olympiadbench", {"question": "q", "final_answer": ["2"], "unit": None}, "q", "2"),
        ("olympiadbench", {"question": "q", "final_answer": ["$x=1$", "$x=\\sqrt{2}$"]}, "q", "x=1, x=\\sqrt{2}"),
        ("custom", {"question": "q", "answer": 12}, "q", "12"),
    ],
)
def test_each_data_set_is_read_by_its_own_rule(
    dataset: Dataset, row: dict[str, Any], question: str, answer: str, tmp_path: Path
) -> None:
    (read,) = read_rows(write_rows(tmp_path / "rows.jsonl", [row]), "task.data", dataset)
    assert read == {"question": question, "answer": answer, "record": row}


def test_fields_name_other_columns(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"ask": f"q{n}", "gold": "7", "answer": "8"} for n in range(9)])
    task = Maths(data=path, fields={"question": "ask", "answer": "gold"})
    example = task.example("train", 0)
    assert example.answer == "7"
    assert example.info["answer"] == "8"
    assert example.messages is not None
    assert example.messages[-1]["content"] == example.info["ask"]


@pytest.mark.parametrize(
    ("dataset", "row", "message"),
    [
        ("gsm8k", {"question": "q", "answer": "18"}, "`answer` is '18'; accepted is text that ends in ####"),
        ("minerva", {"problem": "p", "solution": "\\boxed{1"}, "accepted is text with the answer in \\boxed{}"),
        ("olympiadbench", {"question": "q", "final_answer": None}, "`final_answer` is None; accepted is a list"),
        ("olympiadbench", {"question": "q", "final_answer": []}, "`final_answer` is []"),
        ("olympiadbench", {"question": "q", "final_answer": ["1", None]}, "`final_answer` is ['1', None]"),
        ("custom", {"question": "q", "answer": True}, "`answer` is True"),
        ("custom", {"question": "q", "answer": " "}, "`answer` is ' '"),
        ("custom", {"question": "", "answer": 1}, "`question` is ''"),
        ("math500", {"question": "q", "answer": 1}, "`problem` is None"),
        ("custom", 7, "is not an object with `question` and `answer`"),
    ],
)
def test_a_bad_row_is_named(dataset: Dataset, row: Any, message: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Maths(data=path, dataset=dataset)
    assert str(caught.value).startswith(f"task.data: {path}, line 1")


def test_a_hub_data_set_is_loaded_by_the_package_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    write_rows(folder / "train.jsonl", rows_of(20))
    write_rows(folder / "test.jsonl", rows_of(3))
    task = Maths(data=f"hub:{folder}", heldout_data=f"hub:{folder}:test")
    assert {task.example("heldout", index).answer for index in range(3)} == {"0", "2", "4"}
    assert {task.example("train", index).answer for index in range(17)} == {str(2 * n) for n in range(3, 20)}
    with pytest.raises(ValueError, match=r"^task\.data: hub:/.*/absent cannot be loaded: "):
        Maths(data=f"hub:{tmp_path}/absent")
    with pytest.raises(ValueError, match=r"^task\.data: 'hub:' is no data set"):
        Maths(data="hub:")


def test_splits_are_disjoint_and_the_same_whatever_the_seed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows_of(100))
    first, second = Maths(data=path, seed=1), Maths(data=path, seed=2, template="few_shot")
    ids = {split: {first.example(split, index).id for index in range(300)} for split in SPLITS}
    assert not ids["train"] & ids["heldout"]
    assert len(ids["train"] | ids["heldout"]) == 100
    for split in SPLITS:
        assert {second.example(split, index).id for index in range(300)} == ids[split]
    held = {
        identity(row) for row in read_rows(path, "task.data", "custom") if split_of_key(problem_key(row)) == "heldout"
    }
    assert ids["heldout"] == held


def test_a_problem_of_the_heldout_file_is_left_out_of_training(tmp_path: Path) -> None:
    spaced = [{**row, "question": row["question"].replace(" ", "\n ")} for row in rows_of(10)]
    heldout = write_rows(tmp_path / "heldout.jsonl", spaced)
    task = Maths(data=write_rows(tmp_path / "rows.jsonl", rows_of(30)), heldout_data=heldout)
    assert {task.example("train", index).answer for index in range(60)} == {str(2 * n) for n in range(10, 30)}


# Prompts and worked solutions.


@pytest.mark.parametrize("template", get_args(Template))
@pytest.mark.parametrize(("path", "dataset"), [(GSM8K, "gsm8k"), (MATH500, "math500")])
def test_worked_solutions_get_the_whole_reward(path: str, dataset: Dataset, template: Template) -> None:
    task = Maths(data=path, dataset=dataset, template=template)
    verifier = task.verifier.load()
    for split in SPLITS:
        for index in range(16):
            example = task.example(split, index)
            assert (example.prompt is None) != (example.messages is None)
            completion = task.worked_solution(example)
            assert not any(stop in completion for stop in task.stop)
            score = as_score(verifier(Rollout("", completion, example.answer, example.info)))
            assert (score.value, score.accuracy) == (1.0, 1.0)


def test_the_few_shot_prompt_shows_worked_problems_with_right_answers() -> None:
    prompt = Maths(data=GSM8K, dataset="gsm8k", template="few_shot", shots=2).example("train", 0).prompt
    assert prompt is not None
    assert prompt.count("####") == 2
    assert prompt.endswith("\nSolution:")
    for _, steps, answer in WORKED:
        assert extract(steps, "last_number") == answer


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"dataset": "gsm9k"}, "dataset"),
        ({"template": "cot"}, "template"),
        ({"shots": 9}, "shots"),
        ({"fields": {"questoin": "q"}}, "fields"),
        ({"forms": ()}, "forms"),
        ({"forms": ("boxed", "circled")}, "forms"),
        ({"weights": {"solved": 1.0}}, "weights"),
        ({"weights": {"correct": -1.0}}, "weights"),
        ({"weights": {"correct": 1.0}, "verifier": "mine.py:score"}, "weights"),
        ({"data": "absent.jsonl"}, "data"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^task.{field}: "):
        Maths(**{"data": MATH500, "dataset": "math500", **options})


def test_the_config_builds_the_task_and_leaves_hub_names_alone(tmp_path: Path) -> None:
    task = {"kind": "math", "data": MATH500, "dataset": "math500", "forms": ["boxed", "last_number"]}
    base = {"name": "x", "model": {"source": "org/model"}, "optimizer": {"lr": 1.0}, "budget": {"generations": 1}}
    config = parse_config({**base, "task": task})
    assert isinstance(config.task, MathTaskConfig)
    options = {"forms": ["boxed", "last_number"], "weights": WEIGHTS}
    assert config.task.build().verifier == VerifierSpec("math", options)
    hub = parse_config({**base, "task": {**task, "data": "hub:openai/gsm8k@main"}})
    assert isinstance(hub.task, MathTaskConfig)
    assert hub.task.data == "hub:openai/gsm8k@main"
    with pytest.raises(
        ValueError, match=r"^task\.kind: got \"math\", accepted is countdown or sudoku while model\.kind is tiny"
    ):
        parse_config({**base, "model": {"kind": "tiny"}, "task": task})


# Finding the answer.


@pytest.mark.parametrize(
    ("form", "completion", "answer"),
    [
        ("boxed", "so \\boxed{1}, no: \\boxed{ \\frac{1}{2} }.", "\\frac{1}{2}"),
        ("boxed", "\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("boxed", "\\boxed{1} and \\boxed{2", "1"),
        ("boxed", "{ \\boxed{a \\fbox{b}} }", "b"),
        ("boxed", "} \\boxed {7}", "7"),
        ("boxed", "a \\\\boxed{7}", None),
        ("boxed", "\\boxed{}", None),
        ("boxed", "7", None),
        ("answer", "<answer>1</answer> <answer> 2\n</answer> <answer>3", "2"),
        ("answer", "<answer>1 <answer>2</answer></answer>", "2"),
        ("answer", "</answer><answer>", None),
        ("answer", "<answer> </answer>", None),
        ("hash", "#### 3\nthen #### 1,234 \nmore", "1,234"),
        ("hash", "#### \n3", None),
        ("hash", "### 3", None),
        ("last_number", "first 3, then -1,234.50.", "-1,234.50"),
        ("last_number", "10-3", "3"),
        ("last_number", "x = −.5", "−.5"),
        ("last_number", "x2 y_3 v4.5", None),
        ("last_number", "1,2345", "2345"),
    ],
)
def test_extract(form: Form, completion: str, answer: str | None) -> None:
    assert extract(completion, form) == answer


@given(st.text(alphabet="ab\\{} "), st.text(alphabet="ab\\{}boxed ") | st.text())
def test_what_was_boxed_is_found(inside: str, before: str) -> None:
    """Whatever comes before: an open brace there closes nothing after it."""
    balanced = re.sub(r"[\\{}]", "", inside)
    nested = f"{{{balanced}}}\\}}{balanced}" if balanced else "x"
    before = before if before.endswith(" ") else f"{before} "  # a backslash at its end would be before \boxed
    assert extract(f"{before}\\boxed{{{nested}}}", "boxed") == nested.strip()


@pytest.mark.parametrize("form", get_args(Form))
def test_extraction_takes_linear_time(form: Form) -> None:
    start = time.perf_counter()
    for piece in ("\\boxed{", "\\boxed ", "}", "\\", "<answer>", "</answer>", "#", "9", "1,234,", "1,", "9.", "-", " "):
        extract(piece * 200_000, form)
    assert time.perf_counter() - start < 5


def test_forms_are_tried_in_the_stated_order() -> None:
    text = "<answer>1</answer> \\boxed{2} 3"
    assert judge(text, "1", "answer", "boxed", "last_number").accuracy == 1
    assert judge(text, "2", "boxed", "answer").accuracy == 1
    assert judge(text, "3", "hash", "last_number").accuracy == 1
    assert judge(text, "3", "hash", "boxed", "last_number").accuracy == 0


# Comparing it.


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("18", "18"),
        ("18.0", "18"),
        ("$18", "18"),
        ("1234", "1,234"),
        ("32348", "\\$32,\\!348"),
        ("23", "023"),
        ("\\boxed{23}", "23"),
        ("0.5", "\\frac{1}{2}"),
        ("1/2", "\\frac12"),
        ("\\dfrac{1}{2}", "\\frac{1}{2}"),
        ("0.333333", "\\frac{1}{3}"),
        ("4.5 \\times 10^{33}", "4.5e33"),
        ("4.5e33 \\text{ ergs}", "4.5e33"),
        ("50", "50\\%"),
        ("90", "90^\\circ"),
        ("5.4", "5.4 \\text{ cents}"),
        ("9/5", "1\\frac{4}{5}"),
        ("1 4/5", "1\\frac{4}{5}"),
        ("-1\\frac45", "-1.8"),
        ("-0.75", "-\\frac{3}{4}"),
        ("10 000", "10,000"),
        ("x=5", "5"),
        ("\\left(3,\\frac{\\pi}{2}\\right)", "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("-2, 1", "1,-2"),
        ("-q+p", "p - q"),
        ("\\frac{\\cos x}{\\sin x}", "\\cot x"),
        ("1.414214", "\\sqrt{2}"),
        ("(x+1)^2", "x^2+2x+1"),
        ("Even", "\\text{even}"),
        ("\\text{evelyn}", "Evelyn"),
        ("52", "52_8"),
        ("52_{8}", "52_8"),
        ("\\begin{pmatrix} 0.2 \\\\ -3.6 \\end{pmatrix}", "\\begin{pmatrix} 1/5 \\\\ -18/5 \\end{pmatrix}"),
    ],
)
def test_the_same_answer(answer: str, reference: str) -> None:
    assert same(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("19", "18"),
        ("18.001", "18"),
        ("1000001", "1000000"),
        ("5 million", "5"),
        ("5 or 6", "5"),
        ("5, 6", "5"),
        ("neve", "even"),
        ("\\text{neve}", "\\text{even}"),
        ("52_7", "52_8"),
        ("0", "6.6e-34"),
        ("0.0", "6.6 \\times 10^{-34}"),
        ("0.0", "\\pi \\times 10^{-9}"),
        ("0.33", "\\frac{1}{3}"),
        ("14/5", "1\\frac{4}{5}"),
        ("1 1/2", "11/2"),
        ("1 2", "12"),
        ("3/0", "3"),
        ("(2,1)", "(1,2)"),
        ("q-p", "p-q"),
        ("x", "y"),
        ("5", "x"),
        ("\\frac{0}{0}", "5"),
        ("\\infty", "5"),
        ("", "5"),
        ("\\sum_{k=1}^{2} k", "3"),
    ],
)
def test_another_answer(answer: str, reference: str) -> None:
    assert not same(answer, reference)


def test_how_references_are_read() -> None:
    texts = {"\\text{(C)}": "words", "52_8": "based", "1,234": "number", "2\\sqrt{3}": "algebra", "9^{9^9}": "text"}
    assert {text: reading(text) for text in texts} == texts
    assert {reading(text) for text in references(GSM8K, "gsm8k")} == {"number"}
    assert "text" not in {reading(text) for text in references(MATH500, "math500")}


@given(st.fractions(max_denominator=10**6), st.integers(0, 3))
def test_numbers_are_read_exactly(value: Fraction, style: int) -> None:
    whole = value.numerator
    texts = (str(value), f"\\frac{{{abs(whole)}}}{{{value.denominator}}}", f"{whole:,}", f"{whole}e2")
    expected = (value, abs(value), Fraction(whole), Fraction(whole) * 100)
    assert number(texts[style]) == expected[style]


@given(st.integers(0, 11), st.data())
def test_a_changed_number_is_wrong_unless_it_is_the_same_number(row: int, data: st.DataObject) -> None:
    reference = references(GSM8K, "gsm8k")[row]
    place = data.draw(st.integers(0, len(reference) - 1))
    put = data.draw(st.text(alphabet="0123456789.-", max_size=2))
    mutated = reference[:place] + put + reference[place + data.draw(st.integers(0, 1)) :]
    try:
        equal = Fraction(mutated.replace(",", "")) == Fraction(reference.replace(",", ""))
    except ValueError:
        return
    if re.fullmatch(r"-?[0-9]*\.?[0-9]*", mutated):  # commas elsewhere than between thousands make it a list
        assert judge(f"\\boxed{{{mutated}}}", reference).accuracy == equal


@slow
@given(st.integers(0, 15), st.sampled_from(["{}+1", "2({})", "-({})", "{},7", "\\sqrt{{{}}}", "({})^2", "{}x"]))
def test_a_changed_formula_is_wrong_unless_numbers_say_otherwise(row: int, change: str) -> None:
    """The check is sympy's own parser of another notation, at a random point."""
    sympy = pytest.importorskip("sympy")
    formulas = {"p - q": "p - q", "6 - 5i": "6 - 5*I", "\\frac{14}{3}": "14/3", "2\\sqrt{3}": "2*sqrt(3)"}
    latex, python = list(formulas.items())[row % len(formulas)]
    changes = {"{}+1": "({})+1", "2({})": "2*({})", "-({})": "-({})", "\\sqrt{{{}}}": "sqrt({})", "({})^2": "({})**2"}
    point = {sympy.Symbol("p"): 0.731, sympy.Symbol("q"): 1.912, sympy.Symbol("x"): 2.417}
    if change in changes:
        difference = sympy.sympify(changes[change].format(python)) - sympy.sympify(python)
        assert abs(complex(difference.subs(point))) > 1e-6
    assert not same(change.format(latex), latex)


@slow
@given(st.text() | st.text(alphabet="0123456789+-*/^_{}()[]|\\,.=<>!x$% "), st.sampled_from(["5", "\\sqrt{2}", "x+1"]))
def test_any_answer_gets_a_score_that_is_the_sum_of_its_components(text: str, reference: str) -> None:
    score = judge(f"#### {text}", reference, "hash")
    assert score.value == sum(score.components.values())
    assert list(score.components) == ["format", "correct"]
    assert score.accuracy in (0, 1)
    assert score.components["format"] == pytest.approx(0.1 * (extract(f"#### {text}", "hash") is not None))


def test_weights() -> None:
    assert judge("\\boxed{3}", "4").components == {"format": 0.1, "correct": 0.0}
    assert judge("\\boxed{4}", "4", weights={"format": 0.0, "correct": 2.0}).value == 2.0
    assert judge("4", "4").value == 0.0
    with pytest.raises(ValueError, match=r"^task\.forms: \['circled'\] must be"):
        math_verifier(["circled"])  # type: ignore[list-item]


# Hostile answers.

HOSTILE = [
    "9^{9^{9}}",
    "(9^{9999})^{9999}",
    "\\begin{pmatrix} 9^{9^{9}} \\end{pmatrix}",
    "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}^{999999999}",
    "9999999999!",
    "5!!!!!!",
    "\\binom{99999999}{49999999}",
    "\\binom{9^{9}}{9^{8}}",
    "\\gcd(9^{9^{9}}, 2)",
    "\\sum_{k=1}^{999999999} k",
    "\\int_0^1 x^x dx",
    "4.5 \\times 10^{999999999}",
    "1e999999999",
    "9" * 100_000,
    "-" * 100_000 + "5",
    "(" * 1_000_000,
    "(" * 500_000 + ")" * 500_000,
    "{" * 30 + "5" + "}" * 30,
    "|x|" * 60,
    "a_" * 90 + "b",
    "x^" * 90 + "x",
    "\x00",
    "5\x00",
    "\ud800",
    "\\text{\ud800}",
    "\\frac{1}{0}",
]


def test_hostile_answers_are_refused_at_once_and_the_next_rollout_still_scores() -> None:
    """Each in a form, bare, and against references of every reading; none needs the deadline."""
    wanted = ["7", "\\sqrt{2}", "\\text{even}", "52_8", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"]
    spec = VerifierSpec("math", {"forms": ["boxed", "hash", "last_number"]})
    with Scorer(spec, deadline=20.0) as scorer:
        for number, text in enumerate(HOSTILE):
            for form, completion in (("boxed", f"\\boxed{{{text}}}"), ("hash", f"#### {text}"), ("bare", text)):
                answer = wanted[number % len(wanted)] if form == "bare" else wanted[1]
                scorer.submit((number, form), Rollout("", completion, answer, {}))
                scorer.submit((number, form, "next"), Rollout("", "\\boxed{\\frac{2}{\\sqrt{2}}}", "\\sqrt{2}", {}))
        scores = scorer.drain()
        assert not scorer.failures
    for key, score in scores.items():
        assert score.accuracy == (len(key) == 3), key  # type: ignore[arg-type]


def test_an_answer_that_takes_too_long_costs_its_rollout_only() -> None:
    """What no rule foresees ends with the deadline; here a comparison that any machine needs longer for."""
    slow_text = "\\boxed{" + "+".join(f"\\sin({n}x)\\cos({n}x)" for n in range(1, 12)) + "}"
    with Scorer(VerifierSpec("math"), deadline=0.3) as scorer:
        scorer.submit("slow", Rollout("", slow_text, "\\tan(x)^{11}+x^{7}", {}))
        scorer.submit("next", Rollout("", "\\boxed{7}", "7", {}))
        scores = scorer.drain()
        assert scorer.failures == {("math", "timeout"): 1}
    assert scores["slow"].value is None
    assert scores["next"].accuracy == 1
