"""Run folders of other people: wherever their links lead and whatever their ledgers say, they do no harm."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import save_adapter
from command_line import command, refusal
from report_runs import write_run
from small_runs import resume_here, small_config, train_here

from es_engine.config import EsMethodConfig, TelemetryConfig
from es_engine.ledger import Ledger, LedgerReader
from es_engine.methods.es import EvolutionStrategies
from es_engine.past import replay
from es_engine.report import find_runs, group_runs, read_run
from es_engine.report.page import content
from es_engine.run_folder import refuse_ways_out, write_text
from es_engine.status import read_status
from es_engine.telemetry.trackers import remembered_id
from workers.engine import Sampling


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", steps=4)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/mine.txt").write_text("mine")
    return tmp_path / "outside"


COMMANDS: dict[str, list[Any]] = {
    "resume": [],
    "replay": ["--step", "1"],
    "eval": [],
    "status": [],
    "report": ["--no-png"],
    "export": ["--out", "out"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_follows_a_link_out_of_a_run_folder(
    run: Path, outside: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(outside.parent)
    for place, target in (
        *((place, outside / "mine.txt") for place in (".lock", "log.jsonl", "report.html.partial", "adapter/extra")),
        ("tb", outside),
        ("wandb/deep/link", Path("../../..")),
    ):
        (run / place).parent.mkdir(parents=True, exist_ok=True)
        (run / place).symlink_to(target)
        code, output = command(name, run, *COMMANDS[name])
        assert code == (0 if name == "status" else 2), output
        assert "a link out of" in " ".join(output.split())
        assert str(run / place) in output.replace("\n", "") or name == "status"
        (run / place).unlink()
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"mine.txt": "mine"}
    assert not (outside.parent / "out").exists()


def test_links_within_a_run_folder_are_followed_and_pipes_are_not_waited_for(run: Path) -> None:
    (run / "wandb").mkdir()
    (run / "wandb/latest-run").symlink_to("offline-run-1")
    refuse_ways_out(run)
    assert read_status(run).state == "finished"
    (run / "ledger.jsonl").rename(run / "old.jsonl")
    os.mkfifo(run / "ledger.jsonl")
    assert read_status(run).state == "unreadable"
    with pytest.raises(ValueError, match=r"ledger\.jsonl: neither a file nor a folder; remove it$"):
        read_run(run)


def test_the_config_of_a_run_extends_no_other_file(run: Path, outside: Path) -> None:
    with (run / "config.yaml").open("a") as file:
        file.write(f"extends: {outside}/mine.txt\n")
    assert refusal("report", run).startswith("extends: unknown key")
    (run / "adapter/adapter_config.json").write_text("{}")
    assert refusal("eval", run / "adapter").startswith("extends: unknown key"), "its config is the run's"


def test_runs_are_looked_for_where_no_link_leads(run: Path, outside: Path) -> None:
    runs = run.parent / "runs"
    for name in ("one", "two"):
        (runs / name).mkdir(parents=True)
        (runs / name / "up").symlink_to(runs)
    (runs / "elsewhere").symlink_to(run)
    assert find_runs([runs]) == []
    assert find_runs([runs / "elsewhere"]) == [runs / "elsewhere"]


def test_a_file_that_is_written_replaces_a_link_that_lies_there(outside: Path) -> None:
    path = outside.parent / "text"
    for link in (path, path.with_name("text.partial")):
        link.symlink_to(outside / "mine.txt")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert not path.is_symlink()
    assert (outside / "mine.txt").read_text() == "mine"


def test_an_export_holds_the_adapter_and_nothing_else(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "adapter")
    save_adapter(run / "adapter")
    (run / "adapter/notes.txt").write_text("hers")
    code, output = command("export", run, "--out", tmp_path / "out")
    assert code == 0, output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"costs": {"generated": -1, "processed": 1, "flops": 1, "worker_seconds": 1.0}}, "costs.generated"),
        ({"costs": {"generated": 1, "processed": 1, "flops": 10**40, "worker_seconds": 1.0}}, "costs.flops"),
        ({"costs": {"generated": 1, "processed": 1, "flops": 1, "worker_seconds": 1.0, "x": 1}}, "costs.x"),
        ({"costs": None}, "costs"),
        ({"times": {}}, "times.total"),
        ({"times": {"total": 1e300}}, "times.total"),
        ({"times": {"total": 1.0, "x": "y"}}, "times.x"),
        ({"step": "../../x"}, "step"),
        ({"step": True}, "step"),
        ({"reward_mean": float("inf")}, "reward_mean"),
        ({"accuracy": float("nan")}, "accuracy"),
        ({"lr": 1e305}, "lr"),
        ({"rewards": [[0.0], [0.0, 1.0]]}, "rewards: Value error, its rows are of different lengths"),
        ({"rewards": [["x"]]}, "rewards.0.0"),
        ({"rewards": []}, "rewards"),
        ({"failures": {"verifier": 3}}, "failures.verifier"),
        ({"components": {"a": [1]}}, "components.a"),
        ({"kind": "stage", "stage": -1}, "stage"),
        ({"kind": "calibration", "sigma": 0}, "sigma"),
        ({"kind": "run", "config": json.loads('{"a":' * 80 + "1" + "}" * 80)}, "config: .*levels deep"),
    ],
)
def test_a_ledger_line_that_no_run_writes_is_refused_by_its_place(
    run: Path, change: dict[str, Any], words: str
) -> None:
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    lines[2] |= change
    (run / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=rf"ledger\.jsonl: line 3 is none of a run's: {words}") as refused:
        read_run(run)
    assert "\n" not in str(refused.value)
    status = read_status(run)
    assert (status.state, status.error) == ("unreadable", str(refused.value))


@pytest.mark.parametrize(
    "damage", [b'{"kind": [1]}', b"[" * 10**6, b'{"kind": ' + b'{"a":' * 10**5, b'{"a": ' + b"9" * 10**5 + b"}"]
)
def test_a_ledger_line_that_is_no_json_for_people_is_damaged(run: Path, damage: bytes) -> None:
    path = run / "ledger.jsonl"
    path.write_bytes(damage + b"\n" + path.read_bytes())
    with pytest.raises(ValueError, match="line 1 is damaged"):
        list(LedgerReader(path).new_lines())


def test_a_line_of_any_length_is_not_read_to_its_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("es_engine.ledger.LONGEST", 1000)
    path = run / "ledger.jsonl"
    path.write_bytes(b'{"kind": "run", "x": "' + b"x" * 5000 + b'"}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 1 is damaged"):
        Ledger(path)
    assert path.read_bytes() == before


def test_more_stages_than_a_config_has_are_refused(run: Path) -> None:
    with (run / "ledger.jsonl").open("a") as file:
        file.write('{"kind": "stage", "stage": 0, "step": 4, "method": "es", "theta": "0"}\n')
    assert read_status(run).error == "stages: 1 of them have begun, and the config has 0"


def test_evaluations_out_of_range_name_no_file(run: Path) -> None:
    path = run / "eval.jsonl"
    path.write_text(path.read_text().replace('"step": 2', '"step": "../../../x"'))
    with pytest.raises(ValueError, match=r"eval\.jsonl: line 2 is none of a run's: step"):
        read_run(run)


def test_an_evaluation_without_what_is_drawn_of_it_is_refused_and_other_lines_are_nobodys_business(run: Path) -> None:
    path = run / "eval.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"kind": "x", "reward": "a"}\n')
    assert [line["step"] for line in read_run(run).evaluations] == [0, 2, 4]
    assert read_status(run).reward == read_run(run).evaluations[-1]["reward"]
    path.write_text(whole.replace('"problems"', '"questions"', 1))
    with pytest.raises(ValueError, match=r"eval\.jsonl: line 1 is none of a run's: problems"):
        read_run(run)


@pytest.mark.parametrize(
    "line",
    ["[" * 10**5, "{}", '{"id": 1}', '{"id": "a", "prompt": "", "completion": "", "reward": 1e999, "accuracy": 1}'],
)
def test_damaged_samples_are_named_and_hide_no_other_run(run: Path, line: str) -> None:
    other = write_run(run.parent / "other", "sft")
    with (run / "samples/step-000000.jsonl").open("a") as file:
        file.write(line + "\n")
    page = content(group_runs([read_run(run), read_run(other)]), title="x")
    (problem,) = page["problems"]
    assert re.search(r"step-000000\.jsonl: line 9 is no completion of an evaluation \(", problem)
    assert [each["rows"] for each in page["samples"]["runs"]] == [0, 8]


def test_ids_of_trackers_are_no_paths(tmp_path: Path) -> None:
    for known in ('{"wandb": "../../x"}', '{"wandb": 3}', "[]"):
        (tmp_path / "trackers.json").write_text(known)
        with pytest.raises(ValueError, match=r"trackers\.json: accepted are ids by tracker"):
            remembered_id(tmp_path, "wandb", lambda: "new")


def test_a_generation_of_another_population_is_not_replayed() -> None:
    sampling = Sampling(max_tokens=4, samples=1, temperature=1.0)
    method = EvolutionStrategies(EsMethodConfig(population=4, sigma=0.1), chunk=2, sampling=sampling)
    record = {"step": 0, "sigma": 0.1, "rewards": [[1.0], [0.0], [0.5], [0.2]]}

    def noise(generation: int, pairs: Any, weights: Any) -> Any:
        return np.zeros(3, np.float32)

    assert method.replay(record, noise) is not None
    for change in ({"rewards": [[1.0]] * 3}, {"rewards": []}, {"sigma": None}, {"absent": [0, 1]}, {"absent": [7]}):
        with pytest.raises(ValueError, match="ledger: step 0 is no generation of 4 members"):
            method.replay({**record, **change}, noise)


def test_only_what_generates_runs_the_code_that_a_config_names(random_llama: Path, tmp_path: Path) -> None:
    """Whoever resumes another's run runs its verifier; to look at it, to replay it and to export it does not."""
    verifier, ran = tmp_path / "verifier.py", tmp_path / "ran"
    verifier.write_text("def verify(rollout):\n    return len(rollout.completion)\n")
    method = {"kind": "es", "population": 4, "sigma": 0.3, "prompts": 2}
    axes = {
        "task": {"max_tokens": 2, "verifier": f"{verifier}:verify"},
        "engine": {"chunk": 2},
        "budget": {"generations": 2},
    }
    config = small_config(random_llama, method, **axes)
    quiet = TelemetryConfig(console=False, tensorboard=False)
    run = train_here(config.model_copy(update={"telemetry": quiet}), tmp_path / "run")
    verifier.write_text(f"open({str(ran)!r}, 'w')\n{verifier.read_text()}")
    for arguments in (
        ["status", run],
        ["report", run, "--no-png"],
        ["replay", run, "--step", 1],
        ["diff", run, run],
        ["export", run, "--out", tmp_path / "adapter"],
        ["export", run, "--merged", "--out", tmp_path / "merged"],
    ):
        code, output = command(*arguments)
        assert code == 0, output
    assert not ran.exists()
    resume_here(run)
    assert ran.exists()
    change_ledger(run, '"step":1,', '"step":7,')
    with pytest.raises(ValueError, match=r"a generation of step 7 where one of step 1 should be"):
        replay(run, 1)


def change_ledger(run: Path, before: str, after: str) -> None:
    path = run / "ledger.jsonl"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
