"""Runs of several stages: one theta and one ledger, whatever happens at whatever instant; and what a stage inherits."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import listeners
import numpy as np
import pytest
from command_line import refusal
from small_runs import (
    LocalPool,
    resume_here,
    small_config,
    train_and_kill,
    train_here,
    write_config,
    write_rows,
)
from test_runs import adapter_bytes, assert_same_run

from es_engine import past, trainer
from es_engine.config import Config, ConfigError, dump_config, load_config, parse_config
from es_engine.config.yaml_text import parse as parse_yaml
from es_engine.ledger import Ledger
from es_engine.run_folder import RunFolder
from es_engine.session import gather
from workers.cluster import TOKEN
from workers.pool import Pool

VERIFIER = "def checksum(rollout):\n    return sum(map(ord, rollout.completion)) % 17 / 17\n"
PAIRS = [{"prompt": f"{number}+0=", "chosen": f"{number}", "rejected": "no"} for number in range(4)]
KINDS = ["sft", "es", "dpo", "es"]
STEPS = 2
"""Of each stage."""


@pytest.fixture(scope="module")
def config(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Gradient stages beside those of es, which have other units and each a sigma of its own."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "verifier.py").write_text(VERIFIER)
    es = {"population": 4, "prompts": 4, "probe_pairs": 1, "probe_sigmas": [0.05, 0.1, 0.2, 0.3]}
    dpo = {"kind": "dpo", "batch": 4, "data": write_rows(folder / "pairs.jsonl", PAIRS)}
    run = small_config(
        random_llama,
        es,
        task={"verifier": f"{folder}/verifier.py:checksum"},
        budget={"generations": STEPS},
        evaluation={"every": 3, "problems": 4},
    ).model_dump(mode="json")
    sft = {"method": {"kind": "sft", "batch": 4}, "budget": {"generations": 9, "processed_tokens": 50}}
    last = {
        "method": es | {"population": 6, "probe_sigmas": [0.04, 0.15, 0.25]},
        "optimizer": {"kind": "sgd", "lr": 0.05, "lr_schedule": {"kind": "linear", "final": 0.5}},
    }
    quiet = {"console": False, "tensorboard": False}
    return parse_config(run | {"telemetry": quiet, "stages": [sft, {}, {"method": dpo}, last]})


@pytest.fixture(scope="module")
def undisturbed(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(config, tmp_path_factory.mktemp("stages") / "run")


def ledger_of(run: Path) -> Ledger:
    return Ledger(run / "ledger.jsonl")


def test_one_theta_goes_through_all_stages_each_with_its_own_budget_sigma_and_schedule(undisturbed: Path) -> None:
    ledger = ledger_of(undisturbed)
    expected = ["run"]
    for kind in KINDS:
        expected += ["stage", *(["calibration"] if kind == "es" else []), *["generation"] * STEPS]
    assert [line["kind"] for line in ledger.lines] == expected
    assert [(line["stage"], line["step"], line["method"]) for line in ledger.stages] == [
        (number, STEPS * number, kind) for number, kind in enumerate(KINDS)
    ]
    generations = ledger.generations
    assert [line["step"] for line in generations] == list(range(STEPS * len(KINDS)))
    assert [line["lr"] for line in generations] == [0.02] * 6 + [0.05, pytest.approx(0.0375)]
    assert [len(line["members"]) for line in generations if "members" in line] == [4, 4, 6, 6]
    first, second = [line["sigma"] for line in ledger.of_kind("calibration")]
    assert [line["sigma"] for line in generations if "sigma" in line] == [first] * 2 + [second] * 2
    assert first in (0.05, 0.1, 0.2, 0.3)
    assert second in (0.04, 0.15, 0.25)
    assert all(line["moves"] for line in generations)
    evaluations = Ledger(undisturbed / "eval.jsonl").lines
    assert [line["step"] for line in evaluations] == [0, 2, 3, 4, 6, 8], "the start, each third step, ends of stages"


def test_the_adapter_stays_as_it_is_where_stages_meet(config: Config) -> None:
    raw, weight = (gather(each).space for each in config.by_stage[:2])
    theta = np.random.default_rng(0).standard_normal(raw.dim).astype(np.float32)
    there = weight.converted(theta, raw)
    assert not np.allclose(there, theta)
    for space, converted in ((weight, there), (raw, raw.converted(there, weight))):
        for name, pair in raw.adapter(theta).items():
            np.testing.assert_allclose(space.adapter(converted)[name].b, pair.b, rtol=3e-7)
            np.testing.assert_array_equal(space.adapter(converted)[name].a, pair.a)
    assert weight.converted(there, weight) is there


class Killed(BaseException):
    """In place of kill -9, in this process."""


def killed_by(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, fatal: Callable[..., bool]) -> None:
    """Have a function raise as soon as `fatal` is true of its arguments."""
    function = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        if fatal(*arguments):
            raise Killed
        return function(*arguments)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("stage", "instant"),
    [
        (1, "before its line"),
        (2, "after its line"),
        (3, "before its line"),
        (3, "in its last step"),
    ],
)
def test_a_run_that_ends_anywhere_resumes_to_the_same_ledger(
    undisturbed: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, instant: str
) -> None:
    run = tmp_path / "run"

    def done(steps: int) -> bool:
        return (run / "ledger.jsonl").exists() and len(ledger_of(run).generations) >= steps

    with monkeypatch.context() as patched:
        if instant == "before its line":
            killed_by(patched, Ledger, "append", lambda _, line: line.get("stage") == stage)
        elif instant == "after its line":
            killed_by(patched, trainer, "_run_stage", lambda *given: given[3].stage == stage)
        else:
            killed_by(patched, LocalPool, "run", lambda *_: done(STEPS * (stage + 1) - 1))
        with pytest.raises(Killed):
            train_here(config, run)
    assert len(ledger_of(run).stages) == stage + (instant != "before its line")
    assert_same_run(resume_here(run), undisturbed)


def test_a_step_that_is_done_is_in_a_whole_checkpoint_at_every_instant(
    undisturbed: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stage with gradients, whose last step is evaluated too."""
    run = tmp_path / "run"

    def done_and_between_two_names(path: Path, _: object) -> bool:
        return path.name == f"step-{STEPS:06d}.partial" and len(ledger_of(run).generations) == STEPS

    with monkeypatch.context() as patched, suppress(Killed):
        killed_by(patched, Path, "rename", done_and_between_two_names)
        train_here(config, run)
    assert_same_run(resume_here(run), undisturbed)


def test_kill_9_between_the_last_step_of_a_stage_and_its_evaluation(
    undisturbed: Path, config: Config, tmp_path: Path
) -> None:
    run = train_and_kill(config, tmp_path / "killed", calls=3)
    assert (len(ledger_of(run).stages), len(ledger_of(run).generations)) == (1, STEPS)
    assert_same_run(resume_here(run), undisturbed)


@pytest.mark.ray
def test_two_workers_on_ray_go_from_stage_to_stage_with_the_ledger_of_one_here(
    undisturbed: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens to other machines meanwhile, and no secret is written down, in Ray's logs neither."""
    secrets = {name: f"secret-{name}".encode() for name in ("HF_TOKEN", "WANDB_API_KEY")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value.decode())
    looked = listeners.look_before(Pool, "close", monkeypatch)
    path = write_config(config, tmp_path / "config.yaml")
    trainer.train(load_config(path, ["pool.workers=2"]), tmp_path / "run")
    assert len(looked.addresses) >= 3
    assert not TOKEN.is_file() or TOKEN.stat().st_mode & 0o077 == 0
    assert {address for _, address in looked.addresses} <= {"127.0.0.1", "::1"}, looked.addresses
    written = [*looked.ray_logs.rglob("*"), *(tmp_path / "run").rglob("*")]
    texts = {file: file.read_bytes() for file in written if file.is_file()}
    assert len(texts) > 20
    assert [str(file) for file, text in texts.items() if any(value in text for value in secrets.values())] == []
    assert {line["restarts"] for line in ledger_of(tmp_path / "run").generations} == {0}
    assert_same_run(tmp_path / "run", undisturbed)


def test_steps_of_es_are_replayed_from_where_gradients_have_left_theta(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for step in (3, 4, 7, 8):
        shutil.rmtree(run / f"checkpoints/step-{step:06d}", ignore_errors=True)
    foreign = shutil.copytree(run / "checkpoints/step-000002", run / "checkpoints/step-000008")
    assert foreign.is_dir()
    folder, generations = RunFolder(run), ledger_of(run).generations
    for step in (3, 4, 6, 8):
        state = past._at_the_end(past._past(ledger_of(run), step), past.Stages(folder.load_config()), folder)
        assert past.fingerprint(state.theta) == generations[step - 1]["theta"]
    assert adapter_bytes(past.replay(run, 8)) == adapter_bytes(run / "adapter")
    with pytest.raises(ValueError, match=r"^--step: sft is replayed from checkpoints; there are 2, "):
        past.replay(run, 1)


def test_a_stage_that_has_changed_since_is_named(undisturbed: Path, config: Config) -> None:
    data = config.model_dump(mode="json")
    data["stages"][3]["method"]["prompts"] = 3
    sentence = (
        r"ledger\.jsonl: config\.stages\[3\]\.method\.prompts is 3 now, but was 4 when the run began; it cannot go on$"
    )
    with pytest.raises(ValueError, match=sentence):
        past.restore(past.Stages(parse_config(data)), RunFolder(undisturbed), ledger_of(undisturbed))


# Configs


def text_config(stages: str, run: str = "optimizer: {lr: 1}\nbudget: {generations: 9}") -> str:
    return f"name: small\nmodel: {{source: org/model}}\ntask: {{kind: countdown}}\n{run}\nstages:\n{stages}\n"


def test_a_stage_takes_what_it_leaves_out_from_the_run(tmp_path: Path) -> None:
    stages = "- {method: {kind: sft, data: rows.jsonl}}\n- {budget: {tokens: 5}}"
    (tmp_path / "parent.yaml").write_text(text_config(stages))
    for name in ("rows.jsonl", "adapter"):
        (tmp_path / name).touch()
    (tmp_path / "child.yaml").write_text("extends: parent.yaml\nmethod: {population: 6}\nseed: 3")
    found = load_config(tmp_path / "child.yaml")
    sft, es = found.by_stage
    assert (sft.method.kind, sft.stages, sft.seed, sft.budget.generations) == ("sft", (), 3, 9)
    assert sft.method.model_dump()["data"] == str(tmp_path / "rows.jsonl")
    assert (es.method.model_dump()["population"], es.budget.tokens, es.budget.generations) == (6, 5, None)
    (tmp_path / "printed.yaml").write_text(dump_config(found))
    assert load_config(tmp_path / "printed.yaml") == found
    alone = "- {method: {kind: opd, teacher: {adapter: adapter}}, optimizer: {lr: 1}, budget: {generations: 2}}"
    (tmp_path / "alone.yaml").write_text(text_config(alone, run=""))
    (opd,) = load_config(tmp_path / "alone.yaml").by_stage
    assert opd.method.model_dump()["teacher"]["adapter"] == str(tmp_path / "adapter")
    whole = small_config(tmp_path, {})
    assert whole.by_stage == (whole,)


def test_an_override_that_would_change_no_stage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text_config("- {budget: {tokens: 5}}\n- {}"))
    assert [stage.budget.generations for stage in load_config(path, ["budget.generations=1"]).by_stage] == [None, 1]
    path.write_text(dump_config(load_config(path)))
    with pytest.raises(ValueError, match=r"^override budget.generations=1: every stage has budget of its own"):
        load_config(path, ["seed=2", "budget.generations=1"])


@pytest.mark.parametrize(
    ("stages", "run", "sentence"),
    [
        ("- {method: {kind: sft, batch: 0}}", "", "stages.0.method.batch: got 0, accepted is an integer >= 1"),
        ("- {}\n- {method: {kind: sfd}}", "", 'stages.1.method.kind: got "sfd", accepted is es, grpo, opd, sft or dpo'),
        ("- {task: {}}", "", "stages.0.task: unknown key; accepted are method, optimizer, budget"),
        (
            "- {}\n- {method: {kind: sft}, budget: {tokens: 9}}",
            "",
            "stages.1.budget.tokens: got 9, accepted is",
        ),
        ("- {method: {kind: dpo}}", "engine: {kind: simulated}", "vllm or hf while stages.0.method.kind is dpo"),
        ("- {}", "engine: {chunk: 3}", "an even number while stages.0.method.mirrored is true"),
        ("  sft: {}", "", "accepted is a list, each item a mapping of method, optimizer, budget"),
        ("- {}\n- {}", "optimizer: {lr: -1}", "optimizer.lr: got -1, accepted is a number > 0"),
    ],
)
def test_bad_stages_are_told_of_once_by_the_name_of_the_field(stages: str, run: str, sentence: str) -> None:
    given = {"optimizer": {"lr": 1}, "budget": {"generations": 9}}
    with pytest.raises(ConfigError, match=r"\A[^\n]*\Z") as refused:
        parse_config(given | parse_yaml(text_config(stages, run), "stages"))
    assert sentence in str(refused.value)


def test_what_a_stage_and_the_run_leave_out_ends_the_command(tmp_path: Path) -> None:
    stages = "- {budget: {generations: 2}, optimizer: {lr: 1}}\n- {optimizer: {lr: 1}}"
    (tmp_path / "config.yaml").write_text(text_config(stages, run=""))
    sentence = refusal("train", tmp_path / "config.yaml", "--run-dir", tmp_path / "run")
    assert sentence.startswith("stages.1.budget: missing, accepted is a mapping of generations, tokens")
    assert not (tmp_path / "run").exists()


def test_what_is_found_out_later_names_the_stage_too(config: Config, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "chosen": "2"}])
    blind = {"method": {"kind": "es", "population": 4, "prompts": 4, "probe_sigmas": [1e-30], "probe_pairs": 1}}
    for stage, sentence in (
        ({"method": {"kind": "sft", "data": data}}, rf"^stages\.1\.method\.data: {data}, line 1 has no `completion`"),
        (blind, r"^stages\.1\.method\.sigma: auto found no sigma"),
    ):
        stages = [{"method": {"kind": "sft", "batch": 4}, "budget": {"generations": 1}}, stage]
        with pytest.raises(ValueError, match=sentence):
            train_here(parse_config(config.model_dump(mode="json") | {"stages": stages}), tmp_path / "run")


def test_the_stages_on_the_page_are_a_config() -> None:
    page = (Path(__file__).parents[1] / "docs/methods.md").read_text()
    (block,) = re.findall(r"```yaml\n(optimizer: [^`]*\nstages:\n.*?)```", page, re.DOTALL)
    run = {"name": "staged", "model": {"source": "org/model"}, "task": {"kind": "countdown"}}
    config = parse_config(run | parse_yaml(block, "docs/methods.md"))
    assert [each.method.kind for each in config.by_stage] == ["sft", "dpo", "es"]
