"""The report as data and as text: what is read of runs, and that nothing of them can harm who reads it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from report_runs import config_of, step_line, write_run
from small_runs import resume_here, small_config, train_here
from typer.testing import CliRunner

from es_engine import trainer
from es_engine.cli import app
from es_engine.config import dump_config
from es_engine.report import RunGroup, Table, find_runs, group_runs, read_run
from es_engine.report.curves import Series, curve, mean_over, thin
from es_engine.report.data import RunReader, population, step_figures
from es_engine.report.page import (
    config_differences,
    content,
    embedded,
    page,
    summary,
    usual_title,
    write_report,
    write_run_report,
)
from es_engine.report.plots import Plot, plots
from es_engine.report.png import write_pngs
from es_engine.report.samples import samples

HOSTILE = "</script><script>alert(1)</script><!-- & <b>"


def series(run: str, spent: list[float], y: list[float]) -> Series:
    steps = np.arange(len(y), dtype=np.float64)
    return Series(run, {"generated": np.array(spent, dtype=np.float64), "steps": steps}, np.array(y, dtype=np.float64))


def embedded_data(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: two seeds of ES and GRPO, and one of SFT."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("es", "grpo"):
        for seed in range(2):
            write_run(folder / f"{method}-seed{seed}", method, seed=seed, completions=[HOSTILE, "4 * 6"])
    write_run(folder / "sft", "sft")
    return folder


def test_a_real_run_ends_with_its_report(random_llama: Path, tmp_path: Path) -> None:
    config = small_config(random_llama, {"kind": "grpo", "prompts": 2, "samples": 2})
    run = train_here(config, tmp_path / "run")
    data = embedded_data((run / "report.html").read_text())
    assert data["title"] == "run"
    assert {"held-out", "training", "components", "learning", "lengths", "time"} <= {
        plot["name"] for plot in data["plots"]
    }
    assert [len(rows) for rows in data["samples"]["runs"][0]["steps"].values()] == [8, 8]


def test_a_report_that_fails_costs_no_run(random_llama: Path, tmp_path: Path) -> None:
    config = small_config(random_llama, {"kind": "sft", "batch": 2}, budget={"generations": 1})
    run = tmp_path / "run"
    with (
        patch.object(trainer, "write_run_report", side_effect=OSError("no room")),
        pytest.raises(OSError, match="no room"),
    ):
        train_here(config, run)
    assert (read_run(run).steps, read_run(run).finished, (run / "report.html").exists()) == (1, True, False)
    resume_here(run)
    assert (run / "report.html").is_file()


def test_a_run_in_progress_is_read_and_left_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=6, every=2)
    shutil.rmtree(run / "adapter")
    for name in ("ledger.jsonl", "eval.jsonl"):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(whole[:-5])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    data = read_run(run)
    page(content(group_runs([data]), title="live"))
    assert (data.steps, data.finished, [line["step"] for line in data.evaluations]) == (5, False, [0, 2, 4])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config_of("run", "es", 0)))
    data = content(group_runs([read_run(run)]), title="begun")
    assert data["plots"] == []
    assert data["summary"]["rows"][0][:4] == ["run", "es", 1, 0]


def test_what_is_added_to_a_run_is_read_without_what_was_there(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3)
    reader = RunReader(run)
    assert reader.read().steps == 3
    ledger = run / "ledger.jsonl"
    size = ledger.stat().st_size
    with ledger.open("r+b") as file:
        file.write(b"x" * size)  # would be damage, if it were read again
        file.seek(size)
        line = json.dumps(step_line("es", 3, random.Random(0))).encode()
        file.write(line[:100])
    assert reader.read().steps == 3
    with ledger.open("ab") as file:
        file.write(line[100:] + b"\n")
    assert reader.read().steps == 4


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    ledger = run / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'{"kind": "generation"', b'{"kind: "generation"', 1))
    with pytest.raises(ValueError, match=r"ledger\.jsonl: line 2 is damaged"):
        read_run(run)


def test_the_population_is_quantiles_of_the_members_that_were_scored() -> None:
    assert population([[0.0, 2.0], [3.0, None], [None, None]]) == {
        "lowest": 1.0,
        "lower quarter": 1.5,
        "median": 2.0,
        "upper quarter": 2.5,
        "highest": 3.0,
    }
    assert population([[None], [None]]) == {}


def test_members_are_compared_by_the_fitness_of_the_method_where_it_is_not_the_reward() -> None:
    line = step_line("es", 0, random.Random(0)) | {"fitness": [[-1.0], [-3.0]]}
    assert step_figures(line)["population/median"] == -2


def test_parts_that_gave_no_score_leave_no_rollout_without_one() -> None:
    line = step_line("es", 0, random.Random(0)) | {"failures": {"one": {"no score": 32}, "other": {"timeout": 8}}}
    assert step_figures(line | {"unscored": 8})["unscored"] == 1 / 4


def test_a_run_of_stages_is_called_by_all_of_them(runs: Path) -> None:
    stages = [{"method": {"kind": "sft"}}, {"method": {"kind": "es", "fitness": "teacher"}}]
    run = replace(read_run(runs / "sft"), config={"stages": stages})
    assert run.method == "sft → es (teacher)"


def test_runs_that_differ_in_seeds_only_are_one_group(runs: Path) -> None:
    groups = group_runs([read_run(path) for path in find_runs([runs])])
    assert [(group.label, [run.seed for run in group.runs]) for group in groups] == [
        ("es", [0, 1]),
        ("grpo", [0, 1]),
        ("sft", [0]),
    ]


def test_seeds_that_timed_their_chunks_differently_are_one_group(runs: Path) -> None:
    one, other = (read_run(runs / f"es-seed{seed}") for seed in range(2))
    timed = replace(other, config={**other.config, "engine": {**other.config["engine"], "chunk": 8}})
    assert [len(group.runs) for group in group_runs([one, timed])] == [2]


def test_groups_of_one_completion_are_not_counted_as_constant() -> None:
    line = step_line("grpo", 0, random.Random(0)) | {"constant_groups": 2}
    assert step_figures(line | {"rewards": [[1.0, 1.0], [0.0, 0.0]]})["constant"] == 1
    assert "constant" not in step_figures(line | {"rewards": [[1.0], [0.0]]})


def test_runs_of_a_comparison_are_called_by_their_methods(tmp_path: Path) -> None:
    """Their folders are called by their seeds, and their configs by both."""
    for method, seed in (("es", 1), ("es", 2), ("grpo", 1)):
        run = write_run(tmp_path / f"runs/{method}/seed-{seed}", method, seed=seed)
        (run / "config.yaml").write_text(dump_config(config_of(f"{method}-seed-{seed}", method, seed)))
    groups = group_runs([read_run(path) for path in find_runs([tmp_path])])
    assert [(group.label, len(group.runs)) for group in groups] == [("es", 2), ("grpo-seed-1", 1)]


def test_seeds_whose_folders_say_nothing_else_are_called_by_their_method(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"seed{seed}", "es", seed=seed) for seed in range(2)]
    assert [group.label for group in group_runs([read_run(path) for path in paths])] == ["es"]


def test_runs_of_the_same_name_are_told_apart(runs: Path) -> None:
    one, other = (replace(read_run(runs / f"es-seed{seed}"), name="run") for seed in range(2))
    assert RunGroup("ES", (one, other)).run_labels == ("ES, seed 0", "ES, seed 1")
    assert RunGroup("ES", (one, replace(one, name="copy"))).run_labels == ("ES, run", "ES, copy")
    assert RunGroup("ES", (one, one)).run_labels == ("ES, run 1", "ES, run 2")
    assert [group.label for group in group_runs([one, read_run(runs / "grpo-seed0"), replace(one, config={})])] == [
        "run",
        "grpo-seed0",
        "run (2)",
    ]


def test_a_folder_whose_name_is_no_utf8_has_a_report(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", "es", seed=0).rename(tmp_path / os.fsdecode(b"run-\xff"))
    run = read_run(path)
    assert run.name == "run-\ufffd"
    assert "<title>run-\ufffd" in write_run_report(path).read_text(encoding="utf-8")
    pngs = tmp_path / "report.html"
    write_report(pngs, group_runs([run]), title=run.name)
    assert list(tmp_path.glob("report_plots/*.png"))


def test_runs_are_found_below_folders_that_may_be_empty_or_missing(runs: Path, tmp_path: Path) -> None:
    assert find_runs([runs / "sft", tmp_path, tmp_path / "missing"]) == [runs / "sft"]
    assert [path.name for path in find_runs([runs])] == ["es-seed0", "es-seed1", "grpo-seed0", "grpo-seed1", "sft"]


def test_a_folder_that_may_not_be_looked_into_is_for_its_reader_to_name(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests may be run by root, who may look into all of them."""
    for name in ("closed", "gone"):
        (tmp_path / "a" / name).mkdir(parents=True)

    def listed(path: Path, real: Any = Path.iterdir) -> Any:
        errors = {"closed": PermissionError, "gone": FileNotFoundError}
        if path.name in errors:
            raise errors[path.name](path)
        return real(path)

    monkeypatch.setattr(Path, "iterdir", listed)
    assert find_runs([tmp_path / "a", runs / "sft"]) == [tmp_path / "a/closed", runs / "sft"]


def test_seeds_are_averaged_over_what_they_had_spent_alike() -> None:
    one, other = series("a", [0, 10, 20], [0, 1, 2]), series("b", [0, 20, 40], [2, 2, 6])
    mean = mean_over("generated", [one, other])
    assert mean.x.tolist() == [0, 10, 20]
    assert mean.y.tolist() == [1, 1.5, 2]
    ((low, high),) = mean.bands
    assert (low.tolist(), high.tolist()) == ([0, 1, 2], [2, 2, 2])


def test_seeds_that_spend_nothing_of_a_budget_are_averaged_by_steps() -> None:
    mean = mean_over("generated", [series("a", [0, 0], [1, 2]), series("b", [0, 0], [3, 4])])
    assert (mean.x.tolist(), mean.y.tolist()) == ([0, 0], [2, 3])


def test_a_stage_that_spends_nothing_of_a_budget_stands_upright_in_the_mean() -> None:
    mean = mean_over("generated", [series("a", [0, 0, 10], [1, 2, 5]), series("b", [0, 0, 20], [3, 4, 7])])
    assert (mean.x.tolist(), mean.y.tolist()) == ([0, 0, 15], [2, 3, 6])


def test_a_curve_leaves_out_steps_without_the_figure_and_runs_without_any() -> None:
    gaps = series("a", [1, 2, 3], [5, np.nan, 7])
    none = series("b", [1, 2], [np.nan, np.nan])
    found = curve("x", 0, [gaps, none])
    assert found is not None
    assert (found.points["generated"].x.tolist(), found.points["generated"].y.tolist()) == ([1, 3], [5, 7])
    assert curve("x", 0, [none]) is None


@given(st.integers(1, 3000), st.integers(3, 50))
def test_thinning_keeps_the_ends_and_the_mean(count: int, most: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    thinned = thin(Series("a", {"steps": np.arange(count, dtype=np.float64)}, values), most)
    assert len(thinned.y) == min(count, most)
    assert (thinned.y[0], thinned.y[-1]) == (values[0], values[-1])
    assert (np.diff(thinned.spent["steps"]) > 0).all()
    assert values.min() <= thinned.y.min() <= thinned.y.max() <= values.max()


def test_curves_lie_over_every_budget(runs: Path) -> None:
    data = read_run(runs / "es-seed0")
    held_out = plots([RunGroup("es", (data,))])[0]
    assert isinstance(held_out, Plot)
    (drawn,) = held_out.variants[0].curves
    generated = np.cumsum([0, *[352] * 6])
    assert drawn.points["generated"].x.tolist() == generated[[0, 2, 4, 6]].tolist()
    assert drawn.points["steps"].x.tolist() == [0, 2, 4, 6]
    assert drawn.points["steps"].y.tolist() == [line["accuracy"] for line in data.evaluations]


def test_samples_that_do_not_fit_are_left_out_evenly_and_counted(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", steps=20, every=2, problems=40, completions=["x" * 500]))
    everything = samples(group_runs([run]))["runs"][0]
    assert (everything["rows"], everything["evaluations"], len(everything["steps"])) == (40, 11, 11)
    few = samples(group_runs([run]), room=60_000)["runs"][0]
    kept = {step: [row["key"] for row in rows] for step, rows in few["steps"].items()}
    assert (few["rows"], few["evaluations"]) == (40, 11)
    assert {"0", "20"} < set(kept) < set(everything["steps"])
    (places,) = {tuple(keys) for keys in kept.values()}
    assert 10 < len(places) < 40
    assert len(json.dumps(few)) < 60_000


def test_evaluations_that_fit_are_spread_between_the_first_and_the_last(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", steps=20, every=2, problems=8, completions=["x" * 500]))
    numbers = set()
    for room in range(15_000, 80_000, 1_000):
        kept = [int(step) for step in samples(group_runs([run]), room=room)["runs"][0]["steps"]]
        gaps = np.diff(kept)
        assert (kept[0], kept[-1]) == (0, 20)
        assert gaps.max() - gaps.min() <= 2  # an evaluation more or less
        numbers.add(len(kept))
    assert numbers == set(range(4, 12))


def test_two_evaluations_have_all_the_room(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", steps=20, every=20, problems=40, completions=["x" * 500]))
    size = len(json.dumps(samples(group_runs([run]))))
    assert len(samples(group_runs([run]), room=size * 3 // 2)["runs"][0]["steps"]["0"]) == 40


def test_a_completion_that_alone_takes_more_than_the_room_is_kept(tmp_path: Path) -> None:
    """Of two evaluations, all that a trial of a comparison's grid has, there are none between them to leave out."""
    completions = ["x" * 5000, *["y"] * 19]
    run = read_run(write_run(tmp_path / "run", steps=20, every=20, problems=20, completions=completions))
    few = samples(group_runs([run]), room=6_000)["runs"][0]["steps"]
    assert 0 < len(few["0"]) == len(few["20"]) < 20
    assert few["0"][0]["completion"] == completions[0]


def test_a_very_long_completion_is_shortened_in_its_middle(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", problems=1, completions=["(" * 500_000 + ")"]))
    (row,) = samples(group_runs([run]))["runs"][0]["steps"]["0"]
    assert len(row["completion"]) < 10_000
    assert re.fullmatch(r"\(+ \[…494001 characters left out…\] \(+\)", row["completion"])


@given(st.dictionaries(st.text(), st.text()))
def test_embedded_data_comes_back_and_holds_no_markup(texts: dict[str, str]) -> None:
    texts |= {"hostile": HOSTILE}
    written = embedded(texts)
    assert json.loads(written) == texts
    assert not set("<>&") & set(written)


def test_the_page_is_one_file_whose_policy_admits_its_own_scripts_alone(runs: Path) -> None:
    tables = [Table(HOSTILE, HOSTILE, [HOSTILE, "p"], [[HOSTILE, 0.5], ["none", None], ["lost", float("nan")]])]
    text = page(content(group_runs([read_run(runs / "es-seed0")]), title=HOSTILE, tables=tables, details=tables))
    assert "alert(1)</script>" not in text.replace("&lt;", "<").split("<style>")[1]
    assert f"<title>{HOSTILE}" not in text
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', text)
    assert policy.startswith("default-src &#39;none&#39;; script-src &#39;sha256-")
    assert "connect-src &#39;none&#39;" in policy
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", text.split('id="data"')[0])
    data = embedded_data(text)
    assert data["tables"] == data["details"]
    assert data["tables"][0]["rows"] == [[HOSTILE, 0.5], ["none", None], ["lost", None]]


def test_the_summary_and_the_differences_say_what_runs_are(runs: Path) -> None:
    groups = group_runs([read_run(path) for path in find_runs([runs])])
    rows = {row[0]: dict(zip(summary(groups).columns, row, strict=True)) for row in summary(groups).rows}
    assert (rows["es"]["Seeds"], rows["es"]["Generated tokens"], rows["es"]["State"]) == (2, 6 * 352, "finished")
    assert rows["es"]["Without a score"] == 2
    assert re.fullmatch(r"\d+\.\d% → \d+\.\d%", str(rows["grpo"]["Accuracy"]))
    differences = {row[0]: row[1:] for row in config_differences(groups).rows}
    assert differences["method.kind"] == ["es", "grpo", "sft"]
    assert differences["seed"] == ["0, 1", "0, 1", "0"]
    assert "task.kind" not in differences


def test_plots_are_pngs_too(runs: Path, tmp_path: Path) -> None:
    held_out, *_, time = plots([RunGroup("costs $5 & <b>\n", (read_run(runs / "es-seed1"),))])[:-1]
    written = write_pngs(tmp_path / "plots", [held_out, time], "flops")
    assert [path.name for path in written] == ["held-out-accuracy.png", "held-out-reward.png", "time.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


@pytest.mark.parametrize(
    ("name", "count"), [("a-run-of-a-name-with-34-characters", 3), ("run", 36), ("a-run-" + "x" * 200, 5)]
)
def test_what_a_png_names_is_all_on_it(runs: Path, tmp_path: Path, name: str, count: int) -> None:
    run = read_run(runs / "es-seed1")
    groups = [RunGroup(f"{name}-{number}", (run,)) for number in range(count)]
    figures: list[Figure] = []
    with patch.object(Figure, "savefig", lambda figure, *_, **__: figures.append(figure)):
        write_pngs(tmp_path, [plot for plot in plots(groups) if plot.name in ("held-out", "time")], "flops")
    assert len(figures) == 3
    for figure in figures:
        figure.draw_without_rendering()
        (axes,), (legend,) = figure.axes, figure.legends
        parts = [legend, *axes.get_yticklabels()]
        boxes = [part.get_window_extent() for part in parts]
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)
        assert axes.get_position().width > 0.6
        assert axes.get_position().height > 0.4
        rows = [box for part, box in zip(parts[1:], boxes[1:], strict=True) if part.get_text()]
        assert all(not one.overlaps(other) for one, other in pairwise(rows))
        assert len(axes.collections) == (count if count <= 6 and axes.lines else 0)  # bands


def test_plots_of_long_names_that_begin_alike_are_all_kept(runs: Path, tmp_path: Path) -> None:
    group = RunGroup("x" * 60, tuple(read_run(runs / f"es-seed{seed}") for seed in range(2)))
    (population,) = (plot for plot in plots([group]) if plot.name == "population")
    written = write_pngs(tmp_path, [population], "steps")
    name = f"population-{'x' * 50}"
    assert [path.name for path in written] == [f"{name}.png", f"{name}-2.png"]
    assert sorted(tmp_path.iterdir()) == sorted(written)


def test_the_title_of_many_runs_names_the_first_and_counts_the_others(runs: Path) -> None:
    run = read_run(runs / "sft")
    groups = [RunGroup(f"run{number}", (run,)) for number in range(9)]
    assert usual_title(groups[:2]) == "run0, run1"
    assert usual_title(groups) == "run0, run1, run2, run3, run4, run5 and 3 more"


def test_the_command_writes_one_page_on_many_runs(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(runs), "--out", str(out), "--over", "flops", "--no-png"])
    assert (done.exit_code, done.output) == (0, f"{out}\n")
    data = embedded_data(out.read_text())
    assert (data["title"], data["axis"]) == ("es, grpo, sft", "flops")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["."], r"\.: neither a run folder nor a folder of them"),
        (["run", "rum"], r"rum: neither a run folder nor a folder of them"),
        (["es-seed0", "--over", "tokens"], "--over: got tokens, accepted is generated, processed, flops"),
    ],
)
def test_the_command_refuses_what_it_cannot_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "run" in arguments:
        write_run(tmp_path / "run")
    with pytest.raises(ValueError, match=words):
        CliRunner().invoke(app, ["report", *arguments], catch_exceptions=False)
