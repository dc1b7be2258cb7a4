"""From the folders of a comparison to its numbers, tables and files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from rich.console import Console
from run_folders import SHARED, comparison_of, finish, made_up_measures, write_run

from es_engine.compare.held_out import correct_counts
from es_engine.compare.measures import (
    BeforeAndAfter,
    Measures,
    SampledEvaluation,
    Scores,
    read_measures,
    scores_of,
)
from es_engine.compare.outcome import read_outcome, with_one_floor
from es_engine.compare.plan import MEASURES_FILE, Trial, pending
from es_engine.compare.statistics import difference, share_interval
from es_engine.compare.summary import summarise
from es_engine.compare.tables import Table, number, tables
from es_engine.compare.writers import as_markdown, print_tables, write_results
from es_engine.config import ComparisonConfig
from es_engine.costs import Costs
from es_engine.run_folder import RunFolder

Array = npt.NDArray[np.float64]
OTHER = {"other_tasks": {"three": {"kind": "countdown", "numbers": [3]}}, "thresholds": [0.5, 0.99]}


def curve(trial: Trial) -> Array:
    """Accuracy (3, P): ES rises from 1/4 over 1/2 to 3/4, GRPO to 1/2, and a problem more for each seed."""
    problems = trial.config.evaluation.problems
    right = np.arange(problems) * 4 // problems
    extra = np.arange(problems) < trial.config.seed
    shares = [1, 2, 3] if trial.run == "es" else [1, 1, 2]
    return np.stack([(right >= 4 - share) | (extra & (place > 0)) for place, share in enumerate(shares)]).astype(float)


def finished(folder: Path, **fields: Any) -> ComparisonConfig:
    """A comparison whose runs are all made up."""
    comparison = comparison_of(**{**OTHER, **fields})
    before, after = (Scores(rewards=(1.0, None), accuracy=right) for right in ((1.0, 0.0), (0.0, 0.0)))
    others = {name: BeforeAndAfter(before=before, after=after) for name in comparison.other_tasks}
    while trials := pending(comparison, folder):
        for trial in trials:
            scores = curve(trial)
            finish(trial, folder, scores, scores * 2 - 1, made_up_measures(scores.shape[1], others))
    return comparison


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def summary(folder: Path) -> dict[str, Any]:
    return summarise(finished(folder), folder)


def test_an_outcome_is_what_the_folder_says(tmp_path: Path) -> None:
    (trial, *_) = pending(comparison_of(runs={"es": {}}), tmp_path)
    with pytest.raises(ValueError, match=r"runs/es/seed-1: this run is not finished"):
        read_outcome(trial, tmp_path)
    accuracy = np.zeros((3, 4, 2))
    accuracy[1:, 0] = 1
    rewards = accuracy.copy()
    accuracy[2, 3], rewards[2, 3] = np.nan, np.nan
    rewards[2, 0, 1] = np.nan
    path = write_run(tmp_path / trial.folder, trial.config, accuracy=accuracy, rewards=rewards)
    (path / MEASURES_FILE).write_text(made_up_measures(4).model_dump_json())
    found = read_outcome(trial, tmp_path)
    assert found.steps == (0, 2, 4)
    assert found.costs == (Costs(), Costs(2000, 10_000, 2 * 10**9, 4.0), Costs(4000, 20_000, 4 * 10**9, 8.0))
    assert found.accuracy is not None
    assert found.accuracy.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_array_equal(found.rewards[2], [1, 0, 0, np.nan])
    (filled,) = with_one_floor([found])
    assert filled.rewards[2].tolist() == [1, 0, 0, 0]
    assert filled.best == 1
    assert (found.failed, found.constant, found.seconds, found.evaluating.generated) == (1 / 8, 1 / 4, 8.0, 3 * 64)


def test_figures_come_with_intervals_over_seeds_and_problems(summary: dict[str, Any], folder: Path) -> None:
    assert [data["method"] for data in summary["runs"].values()] == ["es", "grpo (dapo)"]
    es = summary["runs"]["es"]["figures"]
    scores = np.stack([curve(trial)[-1] for trial in _finals(folder, "es")])
    expected = share_interval(scores)
    assert es["accuracy_final"]["seeds"] == [13 / 16, 14 / 16, 15 / 16]
    assert es["accuracy_final"]["mean"] == pytest.approx(14 / 16)
    assert (es["accuracy_final"]["low"], es["accuracy_final"]["high"]) == pytest.approx((expected.low, expected.high))
    assert es["reward_final"]["mean"] == pytest.approx(2 * 14 / 16 - 1)
    assert es["accuracy_area"]["mean"] == pytest.approx((4 / 16 + 2 * 10 / 16 + 14 / 16) / 4)
    assert es["pass@4"]["mean"] == pytest.approx(12 / 16)
    assert [name for name in es if name.startswith("pass")] == ["pass@1", "pass@2", "pass@4"]


def _finals(folder: Path, run: str) -> list[Trial]:
    comparison = comparison_of(**OTHER)
    return [
        Trial(
            run, "final", 1, {}, Path("runs") / run / f"seed-{seed}", comparison.final(run, {"optimizer.lr": 1.0}, seed)
        )
        for seed in comparison.seeds
    ]


def test_runs_are_compared_in_pairs(summary: dict[str, Any], folder: Path) -> None:
    one, other = (np.stack([curve(trial)[-1] for trial in _finals(folder, run)]) for run in ("es", "grpo"))
    expected = difference(other, one)
    pair = summary["pairs"][0]
    assert (pair["figure"], pair["runs"]) == ("accuracy_final", ["es", "grpo"])
    assert (pair["difference"], pair["p"]) == pytest.approx((-0.25, float(expected.p)))
    assert pair["p_holm"] == pair["p"]
    assert len(summary["pairs"]) == 2


def test_what_it_cost_to_reach_an_accuracy(summary: dict[str, Any]) -> None:
    half, nearly_all = summary["runs"]["es"]["thresholds"]
    assert (half["reached"], nearly_all["reached"]) == (3, 0)
    assert half["costs"]["generated"] == pytest.approx(2000 * 4 / 6)
    assert half["costs"]["steps"] == pytest.approx(2 * 4 / 6)
    assert set(nearly_all["costs"].values()) == {None}


def test_scores_are_told_at_equal_cost_of_each_kind(tmp_path: Path) -> None:
    """ES spends twice of GRPO's FLOPs in its four steps, so that half-way it had spent what GRPO had in the end; SFT
    generates nothing, and spends the fewest seconds."""
    costs = {
        "es": Costs(1000, 5000, 2 * 10**9, 2.0),
        "grpo": Costs(1000, 5000, 10**9, 2.0),
        "sft": Costs(0, 5000, 10**9, 0.5),
    }
    comparison = comparison_of(
        runs={"es": {}, "grpo": {"method": {"kind": "grpo"}}, "sft": {"method": {"kind": "sft"}}},
        budget={"processed_tokens": 20_000},
    )
    for trial in pending(comparison, tmp_path):
        scores = curve(trial)
        finish(trial, tmp_path, scores, scores * 2 - 1, costs=costs[trial.run])
    found = summarise(comparison, tmp_path)
    amounts = {measure: each["amount"] for measure, each in found["equal_costs"].items()}
    assert amounts == {"generated": 4000, "processed": 20_000, "flops": 4e9, "worker_seconds": 2}
    generated, processed, flops, seconds = found["equal_costs"].values()
    for run, data in found["runs"].items():
        assert processed["runs"][run]["accuracy"] == data["figures"]["accuracy_final"]
    assert list(generated["runs"]) == ["es", "grpo"]
    assert generated["runs"]["es"]["accuracy"]["seeds"] == [13 / 16, 14 / 16, 15 / 16]
    half_way = np.stack([curve(trial)[1] for trial in _finals(tmp_path, "es")])
    expected = share_interval(half_way)
    at_flops = flops["runs"]["es"]["accuracy"]
    assert (at_flops["mean"], at_flops["low"], at_flops["high"]) == pytest.approx(
        (10 / 16, float(expected.low), float(expected.high))
    )
    assert flops["runs"]["es"]["reward"]["mean"] == pytest.approx(2 * 10 / 16 - 1)
    assert flops["runs"]["grpo"]["accuracy"]["mean"] == pytest.approx(10 / 16)
    assert seconds["runs"]["grpo"]["accuracy"]["mean"] == pytest.approx((4 + 6) / 2 / 16)  # half-way to its step 2
    (table,) = (table for table in tables(found) if table.heading == "At equal cost")
    assert table.columns == [
        "run",
        "4,000 generated tokens",
        "20,000 processed tokens",
        "4G estimated FLOPs",
        "2 worker seconds",
    ]
    assert table.rows[2][1] == "–"
    assert "Settings" not in table.text  # none was picked


def test_at_equal_cost_a_run_that_diverged_is_left_out_only_if_it_spends_none(tmp_path: Path) -> None:
    """All seeds of GRPO diverged within their first step, all of SFT, which generates nothing, after two."""
    comparison = comparison_of(
        runs={"es": {}, "grpo": {"method": {"kind": "grpo"}}, "sft": {"method": {"kind": "sft"}}},
        budget={"processed_tokens": 20_000},
    )
    for trial in pending(comparison, tmp_path):
        whole = curve(trial)
        evaluations = {"es": 3, "grpo": 1, "sft": 2}[trial.run]
        finish(trial, tmp_path, whole[:evaluations], costs=Costs(0, 500, 10**9, 2.0) if trial.run == "sft" else None)
        if trial.run != "es":
            RunFolder(tmp_path / trial.folder).diverged_file.write_text("{}")
    found = summarise(comparison, tmp_path)
    generated, processed = (found["equal_costs"][measure] for measure in ("generated", "processed"))
    assert (generated["amount"], list(generated["runs"])) == (4000, ["es", "grpo"])
    assert (processed["amount"], list(processed["runs"])) == (20_000, ["es", "grpo", "sft"])
    for run in ("grpo", "sft"):
        assert processed["runs"][run]["accuracy"] == found["runs"][run]["figures"]["accuracy_final"]


def test_ability_at_another_task_is_measured_before_and_after(summary: dict[str, Any]) -> None:
    other = summary["runs"]["es"]["other_tasks"]["three"]
    assert (other["figure"], other["before"]["mean"], other["after"]["mean"]) == ("accuracy", 0.5, 0)
    assert (other["change"]["mean"], other["change"]["seeds"]) == (-0.5, [-0.5, -0.5, -0.5])


def test_seeds_without_any_verdict_are_wrong_and_counted(tmp_path: Path) -> None:
    """A trained model of which nothing at all could be scored is no reason to look at rewards, nor to look away."""
    comparison = comparison_of(**OTHER, runs={"es": {}, "grpo": {"method": {"kind": "grpo"}}})
    before, after, silent = (
        Scores(rewards=(1.0, 0.2), accuracy=(1.0, 0.0)),
        Scores(rewards=(1.0, 1.0), accuracy=(1.0, 1.0)),
        Scores(rewards=(None, None), accuracy=None),
    )
    for trial in pending(comparison, tmp_path):
        lost = trial.run == "grpo" and trial.config.seed == 3
        scores = curve(trial)
        others = {"three": BeforeAndAfter(before=before, after=silent if lost else after)}
        measures = made_up_measures(scores.shape[1], others)
        if lost:
            sampled = SampledEvaluation(samples=4, temperature=1.0, correct=None)
            measures = measures.model_copy(update={"sampled": sampled, "kl": None})
        finish(trial, tmp_path, scores, scores, measures)
    found = summarise(comparison, tmp_path)
    es, grpo = (found["runs"][run] for run in ("es", "grpo"))
    three = grpo["other_tasks"]["three"]
    assert (es["other_tasks"]["three"]["figure"], three["figure"]) == ("accuracy", "accuracy")
    assert (three["before"]["mean"], three["after"]["seeds"]) == (0.5, [1, 1, 0])
    assert grpo["figures"]["pass@4"]["mean"] == pytest.approx(es["figures"]["pass@4"]["mean"] * 2 / 3)
    (distance,) = (table for table in tables(found) if table.heading == "Distance from the base model")
    assert ["of 2 of 3 seeds" in str(row[1]) for row in distance.rows] == [False, True]


def test_a_limit_that_is_none_is_not_one(tmp_path: Path) -> None:
    sft = {"method": {"kind": "sft"}, "budget": {"generations": 4, "flops": None}}
    text = next(each.text for each in tables(summarise(finished(tmp_path, runs={"es": {}, "sft": sft}), tmp_path)))
    assert "4,000 generated tokens, sft also 4 steps." in text


def test_of_a_run_in_stages_their_budgets_are_told(tmp_path: Path) -> None:
    stages = [
        {"method": {"kind": "sft"}, "budget": {"generations": 2}},
        {"method": {"kind": "es"}, "budget": {"tokens": 1500}},
    ]
    both = {"stages": stages, "optimizer": {"kind": "adam", "lr": 0.1}}
    text = next(each.text for each in tables(summarise(finished(tmp_path, runs={"es": {}, "both": both}), tmp_path)))
    assert "4,000 generated tokens, both in stages of 2 steps and then 1,500 generated tokens." in text


def test_grids_show_the_winner(summary: dict[str, Any]) -> None:
    assert [trial["chosen"] for trial in summary["grids"]["es"]] == [True, False]
    assert [trial["setting"] for trial in summary["grids"]["grpo"]] == [{"optimizer.lr": 1e-4}, {"optimizer.lr": 1e-3}]


def test_a_grid_says_how_many_different_problems_its_winner_was_picked_on(tmp_path: Path) -> None:
    """Two of its eight validation problems come again and were asked once."""
    comparison = comparison_of()
    while trials := pending(comparison, tmp_path):
        for trial in trials:
            finish(trial, tmp_path, curve(trial)[:, 2 if trial.purpose == "tuning" else 0 :])
    texts = [table.text for table in tables(summarise(comparison, tmp_path)) if table.heading.startswith("Grid")]
    assert ["on 6 validation problems" in text for text in texts] == [True, True]


def test_files_are_the_same_for_the_same_folders(summary: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    write_results(summary, tmp_path / "one")
    write_results(json.loads(json.dumps(summarise(comparison_of(**OTHER), folder))), tmp_path / "other")
    for name in ("comparison.json", "comparison.csv", "comparison.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert json.loads((tmp_path / "one" / "comparison.json").read_text()) == summary
    rows = list(csv.DictReader(io.StringIO((tmp_path / "one" / "comparison.csv").read_text())))
    assert [(row["run"], row["seed"]) for row in rows] == [(run, seed) for run in ("es", "grpo") for seed in "123"]
    assert (rows[0]["accuracy_final"], rows[0]["generated"], rows[0]["three_accuracy_after"]) == (
        "0.8125",
        "4000.0",
        "0.0",
    )


def test_tables_say_what_was_shared_and_what_was_spent(summary: dict[str, Any]) -> None:
    made = {table.heading: table for table in tables(summary)}
    assert list(made) == [
        "Held-out accuracy",
        "Held-out reward",
        "Differences",
        "Sampled answers",
        "What the runs spent",
        "At equal cost",
        "Cost to reach an accuracy",
        "Distance from the base model",
        "Training rollouts",
        "Other task: three",
        "Grid: es",
        "Grid: grpo",
    ]
    assert all(len(row) == len(table.columns) for table in made.values() for row in table.rows)
    spent = made["What the runs spent"]
    assert "ends after the step that reaches 4,000 generated tokens" in spent.text
    assert spent.rows[0] == ["es", 4000, 20_000, 4e9, 8, 4, "0:00:08"]
    assert "Settings were picked for where the runs end" in made["At equal cost"].text
    assert made["Grid: es"].rows[0] == [1, "3.0", 0.5, 0.75, "chosen"]
    assert made["Cost to reach an accuracy"].rows[1][2:4] == ["0 of 3", None]


def test_a_run_that_spends_nothing_of_the_budget_is_told_of(tmp_path: Path) -> None:
    sft = {"method": {"kind": "sft"}, "budget": {"generations": 4}}
    comparison = comparison_of(runs={"es": {}, "sft": sft})
    for trial in pending(comparison, tmp_path):
        costs = Costs(0, 500, 10**9, 2.0) if trial.run == "sft" else None
        finish(trial, tmp_path, curve(trial), costs=costs)
    summary = summarise(comparison, tmp_path)
    text = tables(summary)[0].text
    assert "after the step that reaches 4,000 generated tokens, sft also 4 steps." in text
    assert "the budget of generated tokens. It is the final height of runs that spend none: sft." in text
    figures = summary["runs"]["sft"]["figures"]
    assert figures["accuracy_area"]["mean"] == pytest.approx(figures["accuracy_final"]["mean"])


def test_one_seed_gives_means_alone(tmp_path: Path) -> None:
    summary = summarise(finished(tmp_path, seeds=[5]), tmp_path)
    assert summary["runs"]["es"]["figures"]["accuracy_final"]["low"] is None
    assert (summary["pairs"][0]["p"], summary["pairs"][0]["p_holm"]) == (None, None)
    assert "[" not in tables(summary)[0].rows[0][3]


def little(folder: Path, accuracy: float, rewards: Sequence[float]) -> dict[str, Any]:
    """The summary of a comparison in which every problem has this accuracy, and these rewards one after the other."""
    run = {**SHARED, "evaluation": {"problems": len(rewards), "every": 2}}
    comparison = comparison_of(run=run, runs={"es": {}, "again": {}}, seeds=[1, 2], thresholds=[0.5])
    measures = made_up_measures(len(rewards))
    if np.isnan(accuracy):
        measures = measures.model_copy(update={"sampled": SampledEvaluation(samples=4, temperature=1.0, correct=None)})
    shape = (3, len(rewards))
    for trial in pending(comparison, folder):
        finish(trial, folder, np.full(shape, accuracy), np.broadcast_to(rewards, shape), measures)
    found = summarise(comparison, folder)
    write_results(found, folder)
    return found


def test_a_single_problem_shows_no_spread(tmp_path: Path) -> None:
    found = little(tmp_path, 1.0, [0.3])
    reward = found["runs"]["es"]["figures"]["reward_final"]
    assert (reward["mean"], reward["low"], found["pairs"][0]["p"]) == (0.3, None, None)


def test_runs_without_verdicts_are_compared_by_rewards_of_which_a_missing_one_is_the_lowest(tmp_path: Path) -> None:
    found = little(tmp_path, np.nan, [0.1, np.nan, 0.1, 0.4])
    figures = found["runs"]["es"]["figures"]
    assert {name.split("_")[0] for name in figures} == {"reward"}
    assert figures["reward_final"]["mean"] == pytest.approx((0.1 + 0.1 + 0.1 + 0.4) / 4)
    assert [(pair["figure"], pair["difference"], pair["p"]) for pair in found["pairs"]] == [("reward_final", 0, 1)]
    assert found["runs"]["es"]["thresholds"][0]["costs"]["steps"] is None
    made = {table.heading: table for table in tables(found)}
    assert next(iter(made)) == "Held-out reward"
    assert "Cost to reach an accuracy" not in made
    assert made["At equal cost"].text.startswith("Held-out reward")
    assert made["At equal cost"].rows[0][1].startswith("0.175")


def test_no_run_gains_by_answers_without_a_score(tmp_path: Path) -> None:
    """With a floor of its own, the run whose only scored answer is a good one would have that for all."""
    comparison = comparison_of(runs={"mute": {}, "sound": {}}, seeds=[1], run={**SHARED, "evaluation": {"problems": 4}})
    before = [0.2, 0.3, 0.4, 1.0]
    for trial in pending(comparison, tmp_path):
        start, end = ([1.0, *[np.nan] * 3], [np.nan] * 4) if trial.run == "mute" else (before, [0.5] * 4)
        finish(trial, tmp_path, np.full((2, 4), np.nan), np.array([start, end]), made_up_measures(4))
    found = summarise(comparison, tmp_path)
    finals = {run: data["figures"]["reward_final"]["mean"] for run, data in found["runs"].items()}
    assert (found["floor"], finals) == (0.2, {"mute": pytest.approx(0.2), "sound": 0.5})
    assert found["runs"]["mute"]["figures"]["reward_before"]["mean"] == pytest.approx((1 + 3 * 0.2) / 4)
    made = {table.heading: table.text for table in tables(found)}
    for heading in ("Held-out reward", "Differences"):
        assert "A problem without a score has the lowest reward that any run got: 0.200." in made[heading]


def test_of_another_task_too_a_missing_score_is_the_lowest_of_all_runs(tmp_path: Path) -> None:
    comparison = comparison_of(runs={"mute": {}, "sound": {}}, seeds=[1], **OTHER)
    for trial in pending(comparison, tmp_path):
        after = (None, None) if trial.run == "mute" else (-1.0, 1.0)
        pair = BeforeAndAfter(
            before=Scores(rewards=(1.0, 1.0), accuracy=None), after=Scores(rewards=after, accuracy=None)
        )
        finish(trial, tmp_path, np.zeros((2, 16)), measures=made_up_measures(16, {"three": pair}))
    found = summarise(comparison, tmp_path)
    assert found["runs"]["mute"]["other_tasks"]["three"]["after"]["mean"] == -1
    text = next(table.text for table in tables(found) if table.heading == "Other task: three")
    assert text.startswith("Held-out reward at 2 problems of another task")


def test_with_one_seed_no_intervals_are_promised(tmp_path: Path) -> None:
    texts = [table.text for table in tables(summarise(finished(tmp_path, seeds=[1]), tmp_path))]
    assert not [text for text in texts if "95% intervals over seeds" in text]
    assert [text for text in texts if text.endswith("With one seed there is neither interval nor test.")]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (-2.0, "-2"), (0.25, "0.25"), (0.12345, "0.1235"), (0.0001234, "1.2e-04"), (110_908.5, "110,909")),
        *((999_999, "999,999"), (1e6, "1M"), (6.796e11, "679.6G"), (2e18, "2E"), (None, "–")),
    ],
)
def test_numbers_are_written_as_the_page_writes_them(value: float | None, text: str) -> None:
    assert number(value) == text


def test_tables_survive_markdown_and_terminals() -> None:
    table = Table("Odd", "Text.", ["run", "a|b"], [["[red]x[/]", "1\n2"], ["y", 1234.5], ["z", None]])
    rows = "| [red]x[/] | 1 2 |\n| y | 1,235 |\n| z | – |\n"
    assert as_markdown("name", [table]) == f"# name\n\n## Odd\n\nText.\n\n| run | a\\|b |\n| --- | ---: |\n{rows}"
    console = Console(width=60, record=True, file=io.StringIO())
    print_tables([table], console)
    assert "[red]x[/]" in console.export_text()


def test_long_names_are_whole_on_a_narrow_terminal() -> None:
    names = [f"{'grpo-' * 9}{number}" for number in range(2)]
    console = Console(width=40, record=True, file=io.StringIO())
    print_tables(
        [Table("Long", "Text.", ["run", "figure"], [[name, "0.123 [0.100, 0.150]"] for name in names])], console
    )
    shown = "".join(line[:20].strip() for line in console.export_text().splitlines())
    assert all(name in shown for name in names)


def test_measures_come_back_from_their_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"measures.json: no such file"):
        read_measures(tmp_path)
    (tmp_path / MEASURES_FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"measures.json: not the measures of a run"):
        read_measures(tmp_path)
    measures = made_up_measures(3)
    (tmp_path / MEASURES_FILE).write_text(measures.model_dump_json())
    assert read_measures(tmp_path) == measures
    assert Measures.model_validate_json(measures.model_dump_json()) == measures


def test_scores_of_an_evaluations_rows() -> None:
    rows = [
        {"reward": reward, "accuracy": accuracy}
        for reward, accuracy in ((1.0, 1.0), (None, None), (None, None), (None, None), (0.5, 0.25), (0.0, 1.0))
    ]
    assert scores_of(rows, 2) == Scores(rewards=(1.0, None, 0.25), accuracy=(0.5, 0.0, 0.625))
    assert correct_counts(rows, 2) == (1, 0, 1)
    unjudged = [{"reward": 1.0, "accuracy": None}]
    assert scores_of(unjudged, 1) == Scores(rewards=(1.0,), accuracy=None)
    assert correct_counts(unjudged, 1) is None
