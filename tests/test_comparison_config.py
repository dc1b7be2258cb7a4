"""A comparison's config: what runs share, what each has of its own, and what is no fair comparison."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from run_folders import SHARED, comparison_of

from es_engine.config import (
    ConfigError,
    SudokuTaskConfig,
    TinyModelConfig,
    dump_comparison,
    dump_config,
    load_comparison,
    on_other_task,
    parse_comparison,
)
from es_engine.config.loading import merge, nested

ROOT = Path(__file__).resolve().parent.parent
ADAM = {"kind": "adam", "lr": 1e-4}
GRPO = {"method": {"kind": "grpo"}, "optimizer": {"kind": "adam"}}


def refusal(**fields: Any) -> str:
    with pytest.raises(ConfigError) as error:
        comparison_of(**fields)
    return str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/comparisons").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_comparisons_load(path: Path) -> None:
    assert load_comparison(path).name == path.stem


def test_a_run_is_its_part_laid_over_the_shared_one() -> None:
    comparison = comparison_of()
    es, grpo = (comparison.final(run, comparison.settings(run)[1], seed=2) for run in ("es", "grpo"))
    assert (es.name, es.seed, es.budget.tokens) == ("es-seed-2", 2, 4000)
    assert (es.optimizer.kind, es.optimizer.lr, grpo.optimizer.kind, grpo.optimizer.lr) == ("sgd", 6.0, "adam", 1e-3)
    assert es.task == grpo.task
    assert es.evaluation.numbers == range(16)


def test_trials_have_another_seed_and_never_see_a_test_problem() -> None:
    trial = comparison_of().trial("es", 1)
    assert (trial.name, trial.seed, trial.optimizer.lr) == ("es-trial-01", 0, 3.0)
    assert trial.evaluation.numbers == range(16, 24)


def test_a_grid_is_every_combination_of_its_values() -> None:
    grid = {"optimizer.lr": [1.0, 2.0], "method": {"sigma": [0.1, 0.2]}}
    comparison = comparison_of(runs={"es": {"method": {"kind": "es"}, "grid": grid}})
    pairs = [(setting["optimizer.lr"], setting["method.sigma"]) for setting in comparison.settings("es")]
    assert pairs == [(1.0, 0.1), (1.0, 0.2), (2.0, 0.1), (2.0, 0.2)]
    assert comparison.trial("es", 3).method.sigma == 0.1
    assert not comparison_of(runs={"es": {}, "grpo": GRPO | {"optimizer": {"kind": "adam", "lr": 1e-4}}}).tunes


def test_a_run_may_add_limits_to_the_shared_budget() -> None:
    sft = {"method": {"kind": "sft"}, "optimizer": {"kind": "adam", "lr": 1e-4}}
    budget = comparison_of(runs={"sft": sft | {"budget": {"generations": 7}}}).final("sft", {}, 1).budget
    assert (budget.tokens, budget.generations) == (4000, 7)
    assert refusal(runs={"sft": sft}).startswith("runs.sft.budget.tokens: got 4000, accepted is another limit")


def test_a_run_of_short_steps_may_be_evaluated_after_more_of_them() -> None:
    sft = {"method": {"kind": "sft"}, "optimizer": ADAM, "evaluation": {"every": 20}, "budget": {"generations": 99}}
    comparison = comparison_of(runs={"es": {}, "sft": sft})
    every = {run: comparison.final(run, {}, 1).evaluation.every for run in comparison.runs}
    assert every == {"es": 2, "sft": 20}


def test_the_stages_of_a_run_share_its_budget() -> None:
    def staged(*stages: dict[str, Any]) -> dict[str, Any]:
        return {"runs": {"es": {}, "both": {"optimizer": ADAM, "stages": list(stages)}}}

    sft, es = {"method": {"kind": "sft"}}, {"method": {"kind": "es", "sigma": 0.5}}
    short = {"budget": {"tokens": 1000}}
    # What a stage leaves out is the budget of the whole run, and once more that of the next.
    accepted = "accepted is limits of 4000 together at most, for each run has one budget"
    assert refusal(**staged(es, es)) == f"runs.both.stages.budget.tokens: got [4000, 4000], {accepted}"
    unlimited = {"budget": {"generations": 3}}
    assert refusal(**staged(es | short, es | unlimited)).startswith("runs.both.stages.budget.tokens: got [1000, null]")
    comparison = comparison_of(**staged(sft | unlimited, es | short, es | {"budget": {"tokens": 3000}}))
    assert [each.budget.tokens for each in comparison.final("both", {}, 1).by_stage] == [None, 1000, 3000]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"runs": {"es": {"grid": {"optimizer.lr": [1.0, 2.0]}}, "sgd": {"grid": {"optimizer.lr": [1.0]}}}},
            "runs: grids of unequal size (es 2, sgd 1), accepted is the same number of trials for each run",
        ),
        ({"runs": {"es": {"grid": {"optimizer.lr": [1.0, 1.0]}}}}, "runs.es.grid.optimizer.lr: got [1.0, 1.0]"),
        ({"runs": {"es": {"grid": {"budget.tokens": [1, 2]}}}}, "runs.es.grid.budget.tokens: got [1, 2]"),
        ({"runs": {"es": {"grid": {"method.sigma": [-1.0, 1.0]}}}}, "runs.es.method.sigma: got -1.0, accepted is"),
        ({"runs": {"es": {"optimizer": {"learning": 1}}}}, "runs.es.optimizer.learning: unknown key"),
        ({"runs": {"es": {"seed": 1}}}, "runs.es.seed: got 1, accepted is nothing"),
        ({"runs": {"es": {"budget": {"tokens": 1}}}}, "runs.es.budget.tokens: got 1, accepted is nothing"),
        ({"runs": {"es": 3}}, "runs.es: got 3, accepted is the path of a config file, or a mapping"),
        ({"runs": {"a/b": {}}}, 'runs: got "a/b", accepted is names'),
        (
            {"runs": {"es": {}, "wide": {"space": {"rank": 4}}}},
            "runs.wide.space.rank: got 4, accepted is that of runs.es, 8, for one pool serves all",
        ),
        (
            {"runs": {"es": {}, "few": {"evaluation": {"problems": 4}}}},
            "runs.few.evaluation.problems: got 4, accepted is that of runs.es, 16, for one pool serves all",
        ),
        (
            {
                "runs": {
                    "es": {"grid": {"optimizer.lr": [1.0, 2.0]}},
                    "both": {
                        "stages": [{"optimizer": ADAM, "budget": {"tokens": 9}}] * 2,
                        "grid": {"optimizer.lr": [1.0, 2.0]},
                    },
                }
            },
            "runs.both.grid.optimizer.lr: got [1.0, 2.0], accepted is nothing: every stage has optimizer of its own",
        ),
        (
            {
                "runs": {
                    "es": {},
                    "both": {
                        "stages": [{"optimizer": ADAM, "budget": {"tokens": 9}}] * 2,
                        "budget": {"generations": 7},
                    },
                }
            },
            'runs.both.budget: got {"generations": 7}, accepted is nothing: every stage has a budget of its own',
        ),
        ({"runs": {"es": {"grid": {"optimizer.lr.": [1.0, 2.0]}}}}, "optimizer.lr.: a name with an empty part"),
        ({"seeds": [1, 1]}, "seeds: got [1, 1], accepted is seeds that differ"),
        ({"tuning": {"seed": 3}}, "tuning.seed: got 3, accepted is a seed that is not among seeds"),
        ({"thresholds": [1.5]}, "thresholds: got"),
        ({"other_tasks": {"logic": {"kind": "nothing"}}}, "other_tasks.logic.kind: got"),
        ({"run": {**SHARED, "budget": {"tokens": 1}}}, 'run.budget: got {"tokens": 1}, accepted is nothing'),
    ],
)
def test_what_is_no_fair_comparison_is_refused_by_the_place(fields: dict[str, Any], sentence: str) -> None:
    assert refusal(**fields).startswith(sentence)


@pytest.mark.parametrize(
    ("run", "grid", "trials"),
    [
        ({}, {"evaluation.every": [1, 2]}, "1 and 2"),
        ({}, {"telemetry.prometheus_port": [1, 2]}, "1 and 2"),
        ({}, {"optimizer": [{"lr": 1.0}, {"lr": 1.0, "kind": "sgd"}]}, "1 and 2"),
        ({}, {"optimizer.lr": [1.0, 2.0], "optimizer": [{"lr": 3.0}, {"lr": 4.0}]}, "1 and 3"),
        ({}, {"optimizer.lr": [1.0, 2.0], "telemetry.prometheus_port": [1, 2]}, "1 and 2"),
        ({"method": {"sigma": 0.1}}, {"method.probe_pairs": [1, 2]}, "1 and 2"),
        (GRPO | {"optimizer": ADAM}, {"method.scale_rewards": [None, "none", "std"]}, "1 and 3"),
        (
            {"method": {"kind": "dpo", "data": "pairs.jsonl"}, "optimizer": ADAM, "budget": {"generations": 2}},
            {"method.samples": [2, 4]},
            "1 and 2",
        ),
        ({}, {"method.top_p": [0.9, 1.0]}, "1 and 2"),
        ({}, {"method.min_pairs": [None, 16]}, "1 and 2"),
        ({}, {"space.units": [None, "weight"]}, "1 and 2"),
        ({}, {"optimizer.decay_to": ["zero", "start"]}, "1 and 2"),
        (
            {
                "method": {"kind": "opd", "teacher": {"adapter": "a"}, "form": "exact"},
                "optimizer": ADAM,
            },
            {"method.importance_cap": [1.0, 2.0]},
            "1 and 2",
        ),
        (
            {"stages": [{"method": {"kind": "es"}, "budget": {"tokens": 9}}], "method": {"kind": "es"}},
            {"method.population": [2, 4]},
            "",
        ),
    ],
)
def test_a_grid_of_which_two_trials_are_one_is_refused(run: dict[str, Any], grid: dict[str, Any], trials: str) -> None:
    sentence = refusal(runs={"only": run | {"grid": grid}})
    assert sentence.startswith("runs.only.grid")
    assert sentence.endswith(
        f"accepted is settings that differ in training, which those of trials {trials} do not"
        if trials
        else "accepted is nothing: every stage has method of its own, so that all trials are one"
    )


def test_what_a_method_uses_may_be_in_its_grid() -> None:
    grids = [
        ({}, {"method.probe_pairs": [1, 2]}),
        (GRPO | {"optimizer": ADAM}, {"method.scale_rewards": ["none", "std"]}),
        ({"method": {"kind": "dpo"}, "optimizer": ADAM}, {"method.samples": [2, 4]}),
        ({"method": {"temperature": 1.0}}, {"method.top_p": [0.9, 1.0]}),
        ({}, {"method.min_pairs": [None, 15]}),
        ({}, {"space.units": [None, "raw"]}),
        ({"optimizer": {"weight_decay": 0.1, "lr": 1.0}}, {"optimizer.decay_to": ["zero", "start"]}),
        ({"stages": [{"budget": {"tokens": 9}}, {"budget": {"tokens": 8}}]}, {"method.population": [2, 4]}),
    ]
    for run, grid in grids:
        assert len(comparison_of(runs={"only": run | {"grid": grid}}).settings("only")) == 2


def test_seeds_may_have_that_of_the_trials_where_there_are_none() -> None:
    assert comparison_of(runs={"es": {}}, seeds=[0, 1, 2]).seeds == (0, 1, 2)


def test_the_config_of_a_run_does_not_bring_its_space_seed(tmp_path: Path) -> None:
    """As `dump_config` writes it, which has every field: all seeds would draw the same factor."""
    first = comparison_of().final("es", {}, 7)
    (tmp_path / "config.yaml").write_text(dump_config(first))
    comparison = comparison_of(run=str(tmp_path / "config.yaml"), runs={"es": {}})
    assert [comparison.final("es", {}, seed).space.seed for seed in (1, 2)] == [1, 2]
    fixed = comparison_of(run={"extends": str(tmp_path / "config.yaml"), "space": {"seed": 5}}, runs={"es": {}})
    assert fixed.final("es", {}, 1).space.seed == 5


def test_another_task_must_suit_the_runs() -> None:
    run = {**SHARED, "engine": {"kind": "simulated"}}
    sentence = refusal(run=run, other_tasks={"game": {"kind": "guess"}}, runs={"es": {"method": {"kind": "es"}}})
    assert (
        sentence == 'other_tasks.game.kind: got "guess", accepted is a task of one turn while engine.kind is simulated'
    )


@pytest.mark.parametrize(("run", "units"), [({"method": {"kind": "es"}}, "weight"), (GRPO, "raw")])
def test_another_task_need_not_suit_the_method(run: dict[str, Any], units: str) -> None:
    comparison = comparison_of(other_tasks={"game": {"kind": "guess"}}, runs={"only": run | {"optimizer": ADAM}})
    config = comparison.final("only", {}, 1)
    other = on_other_task(config, comparison.other_tasks["game"])
    assert (other.task.kind, other.units, other.space.rank) == ("guess", units, config.space.rank)


def test_another_task_leaves_the_tiny_model_what_it_was_taught() -> None:
    config = comparison_of(run={**SHARED, "model": {"kind": "tiny"}}).final("es", {}, 1)
    other = on_other_task(config, SudokuTaskConfig(template="plain"))
    assert isinstance(other.model, TinyModelConfig)
    assert other.task == SudokuTaskConfig(template="plain")
    assert other.lessons == config.task


def test_dump_loads_as_the_same_comparison_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / "data.jsonl").write_text("")
    (here / "shared.yaml").write_text(
        "name: shared\nseed: 5\nbudget: {generations: 3}\nmodel: {source: ./model}\noptimizer: {kind: sgd, lr: 1.0}\n"
        "task: {kind: countdown, data: data.jsonl}\n"
    )
    (here / "es.yaml").write_text("extends: shared.yaml\nmethod: {population: 8}\n")
    (here / "comparison.yaml").write_text(
        "name: c\nrun: shared.yaml\nbudget: {tokens: 10}\nother_tasks: {own: {kind: countdown, data: data.jsonl}}\n"
        "runs:\n  es: es.yaml\n  warm: {extends: es.yaml, space: {init: a}, grid: {optimizer.lr: [2.0]}}\n"
        "  starts: {grid: {space.init: [a]}}\n"
    )
    comparison = load_comparison(here / "comparison.yaml")
    es = comparison.final("es", {}, 1)
    assert (es.method.population, es.budget.tokens, es.budget.generations) == (8, 10, None)  # type: ignore[union-attr]
    assert es.task.data == comparison.other_tasks["own"].data == str(here / "data.jsonl")  # type: ignore[union-attr]
    (there / "again.yaml").write_text(dump_comparison(comparison))
    monkeypatch.chdir(there)
    assert load_comparison("again.yaml") == comparison


def test_overrides_reach_every_part(tmp_path: Path) -> None:
    path = tmp_path / "comparison.yaml"
    path.write_text(dump_comparison(comparison_of()))
    overrides = ["budget.tokens=7", "run.task.max_tokens=9", "runs.es.grid.optimizer.lr=[1.0, 2.0]", "seeds=[4, 5]"]
    comparison = load_comparison(path, overrides)
    assert comparison.seeds == (4, 5)
    config = comparison.trial("es", 2)
    assert (config.budget.tokens, config.task.max_tokens, config.optimizer.lr) == (7, 9, 2.0)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("runs.gpro.optimizer.lr=0.1", "there is no runs.gpro, accepted are runs.es, runs.grpo"),
        ("runs.es.optimizer.lr=0.1", "the grid of runs.es gives optimizer.lr; set runs.es.grid"),
        ("other_tasks.logic.seed=1", "there is no other_tasks.logic, accepted are none, for there are no other_tasks"),
    ],
)
def test_an_override_of_a_run_that_is_not_there_is_refused(tmp_path: Path, override: str, sentence: str) -> None:
    path = tmp_path / "comparison.yaml"
    path.write_text(dump_comparison(comparison_of()))
    with pytest.raises(ConfigError) as error:
        load_comparison(path, [override])
    assert str(error.value) == f"override {override}: {sentence}"


def test_an_override_may_add_a_whole_run(tmp_path: Path) -> None:
    path = tmp_path / "comparison.yaml"
    path.write_text(dump_comparison(comparison_of(runs={"es": {}})))
    overrides = ["runs.wide={method: {population: 64}}", "runs.wide.method.prompts=4", "other_tasks.game={kind: guess}"]
    comparison = load_comparison(path, overrides)
    assert list(comparison.runs) == ["es", "wide"]
    assert list(comparison.other_tasks) == ["game"]
    method = comparison.final("wide", {}, 1).method
    assert (method.population, method.prompts) == (64, 4)  # type: ignore[union-attr]


def test_runs_that_are_no_mapping_are_refused_beside_an_override_too(tmp_path: Path) -> None:
    path = tmp_path / "comparison.yaml"
    for runs in ("[]", "3", "{es: 3}", "{es: {grid: 3}}"):
        path.write_text(f"name: c\nbudget: {{tokens: 1}}\nruns: {runs}\n")
        with pytest.raises(ConfigError, match=r"runs"):
            load_comparison(path, ["runs.es={grid: 3}"])


@pytest.mark.parametrize("override", ["seeds", "=3", "", "runs"])
def test_what_is_no_override_is_refused_in_words(tmp_path: Path, override: str) -> None:
    path = tmp_path / "comparison.yaml"
    path.write_text(dump_comparison(comparison_of()))
    with pytest.raises(ConfigError, match=f"^override {override}: accepted is KEY=VALUE"):
        load_comparison(path, [override])


def test_files_that_hold_no_comparison_are_named(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("[]")
    with pytest.raises(ConfigError, match=r"list.yaml: got \[\], accepted is a mapping of name, run, budget"):
        load_comparison(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match=r"none.yaml: cannot read the config file"):
        load_comparison(tmp_path / "none.yaml")


def test_the_comparison_of_the_docs_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/compare.md").read_text()
    (tmp_path / "comparison.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    comparison = load_comparison(tmp_path / "comparison.yaml")
    assert {run: len(comparison.settings(run)) for run in comparison.runs} == {"es": 4, "grpo": 4, "sft": 4}


PLACES = [
    *(
        "name",
        "run",
        "budget",
        "seeds",
        "tuning",
        "runs",
        "thresholds",
        "other_tasks",
        "samples",
        "run.model",
        "run.task",
    ),
    *("runs.es", "runs.es.grid", "runs.es.grid.optimizer.lr", "runs.es.budget", "runs.es.extends", "runs.es.method"),
    *("runs.grpo.space", "other_tasks.two", "other_tasks.two.kind", "tuning.seed", "budget.tokens", "unknown"),
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.floats() | st.sampled_from(["", "es", "countdown", "x.yaml"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "a b", "optimizer.lr"]), inner)
    ),
    max_leaves=4,
)


@given(st.sampled_from(PLACES), VALUES)
@settings(max_examples=60, deadline=None)
@example("runs", {1: {}})
@example("runs.es.budget", {1: 2})
@example("runs.es.grid", {1: [2]})
@example("runs.es", {1: 2})
@example("other_tasks", {1: {"kind": "countdown"}})
def test_any_value_at_any_place_is_accepted_or_refused_in_words(place: str, value: Any) -> None:
    data = merge(comparison_of().model_dump(mode="json"), nested(place, value))
    with suppress(ConfigError):
        assert parse_comparison(data).settings(next(iter(data["runs"])))
