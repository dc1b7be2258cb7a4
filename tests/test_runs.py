"""Whole runs on Ray: the same ledger whatever happens to workers and driver, and what a run leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from chaos_runs import PATIENCE_S
from command_line import refusal

from es_engine.ledger import Ledger, first_difference

pytestmark = pytest.mark.ray

# Rewards digits, so that a random model has something to learn. Where a file `kill` lies beside it, the worker that
# waits for the 21st score, five after the first evaluation, is killed: kill -9 in the middle of a generation, once.
VERIFIER = """
import os, signal
from pathlib import Path
from typing import Any

KILL = Path(__file__).with_name("kill")
calls = 0

def digits(rollout):
    global calls
    calls += 1
    if calls == 21 and KILL.exists():
        KILL.unlink()
        os.kill(os.getppid(), signal.SIGKILL)
    text = rollout.completion
    return sum(character.isdigit() for character in text) / max(1, len(text))
"""

GENERATIONS = 4
ES_ENGINE = Path(sys.executable).with_name("es-engine")


def write_config(folder: Path, model: Path, **changes: object) -> Path:
    """A config of a small run, with fields changed by dotted name."""
    verifier = folder / "verifier.py"
    verifier.write_text(VERIFIER)
    config = {
        "name": "small",
        "model": {"source": str(model)},
        "space": {"rank": 4, "alpha": 8.0},
        "method": {"population": 8, "sigma": 0.3, "prompts": 6},
        "optimizer": {"kind": "adam", "lr": 0.1},
        "task": {
            "kind": "countdown",
            "template": "plain",
            "high": 9,
            "max_tokens": 8,
            "verifier": f"{verifier}:digits",
        },
        "pool": {"workers": 1},
        "engine": {"kind": "vllm", "dtype": "float32", "chunk": 2, "max_model_len": 64, "kv_cache_gib": 0.0625},
        "budget": {"generations": GENERATIONS},
        "evaluation": {"every": 2, "problems": 16, "chunk": 8},
    }
    for name, value in changes.items():
        axis, field = name.split("__")
        config[axis][field] = value  # type: ignore[index]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def es_engine(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    command = [ES_ENGINE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def succeed(*arguments: object) -> str:
    done = es_engine(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def adapter_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_same_run(run: Path, reference: Path) -> None:
    assert first_difference(run / "ledger.jsonl", reference / "ledger.jsonl") is None
    assert adapter_bytes(run / "adapter") == adapter_bytes(reference / "adapter")
    mine, theirs = (Ledger(folder / "eval.jsonl").lines for folder in (run, reference))
    assert [(line["step"], line["reward"]) for line in mine] == [(line["step"], line["reward"]) for line in theirs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config(folder: Path, random_llama: Path) -> Path:
    return write_config(folder, random_llama)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, config: Path) -> Path:
    """A run on one worker that nothing happened to."""
    run = folder / "undisturbed"
    succeed("train", config, "--run-dir", run)
    return run


@pytest.mark.vllm
def test_a_run_leaves_everything_behind(undisturbed: Path) -> None:
    for name in ("config.yaml", "ledger.jsonl", "eval.jsonl", "adapter/adapter_model.safetensors", "tb", "report.html"):
        assert (undisturbed / name).exists(), name
    assert (undisturbed / "best/adapter_config.json").exists()
    assert [line["step"] for line in Ledger(undisturbed / "eval.jsonl").lines] == [0, 2, 4]
    rows = [json.loads(line) for line in (undisturbed / "samples/step-000004.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert all(row["reward"] is not None for row in rows)
    assert any(row["completion"] for row in rows)
    generations = Ledger(undisturbed / "ledger.jsonl").generations
    assert [line["step"] for line in generations] == list(range(GENERATIONS))
    assert all(line["moves"] for line in generations)


@pytest.mark.vllm
def test_two_workers_give_the_ledger_of_one(undisturbed: Path, config: Path, folder: Path) -> None:
    run = folder / "two-workers"
    succeed("train", config, "--run-dir", run, "--set", "pool.workers=2")
    assert {worker for line in Ledger(run / "ledger.jsonl").generations for worker in line["workers"]} == {0, 1}
    assert_same_run(run, undisturbed)
    assert "equal" in succeed("diff", run, undisturbed)


@pytest.mark.vllm
def test_a_killed_worker_changes_nothing(undisturbed: Path, config: Path, folder: Path) -> None:
    (folder / "kill").touch()
    run = folder / "killed-worker"
    printed = succeed("train", config, "--run-dir", run)
    assert not (folder / "kill").exists()
    assert "worker 0 is replaced" in printed
    assert Ledger(run / "ledger.jsonl").generations[-1]["restarts"] == 1
    assert_same_run(run, undisturbed)


@pytest.mark.vllm
def test_a_killed_driver_resumes_to_the_same_ledger(undisturbed: Path, config: Path, folder: Path) -> None:
    """Kill -9 in a generation in the middle of the run."""
    run = folder / "killed-driver"
    command = [ES_ENGINE, "train", config, "--run-dir", run]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for_lines(run / "ledger.jsonl", 3, driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert len(Ledger(run / "ledger.jsonl").generations) < GENERATIONS
    succeed("resume", run)
    assert_same_run(run, undisturbed)


def wait_for_lines(path: Path, lines: int, driver: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not (path.exists() and path.read_bytes().count(b"\n") >= lines):
        assert driver.poll() is None, "the run ended before it could be killed"
        if time.monotonic() > deadline:
            driver.kill()  # or it would go on beside the other tests
            pytest.fail(f"{path} had no {lines} lines in {PATIENCE_S:.0f} s")
        time.sleep(0.005)


@pytest.mark.vllm
def test_replay_rebuilds_every_step_without_rollouts(undisturbed: Path, folder: Path) -> None:
    succeed("replay", undisturbed, "--step", GENERATIONS, "--out", folder / "replayed")
    assert adapter_bytes(folder / "replayed") == adapter_bytes(undisturbed / "adapter")
    assert "steps 0 to 4" in refusal("replay", undisturbed, "--step", GENERATIONS + 1)


@pytest.mark.vllm
def test_the_adapter_in_peft_answers_as_the_engine_did(undisturbed: Path, random_llama: Path) -> None:
    """Greedy completions of the final adapter in transformers + PEFT equal those kept by the run, in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(random_llama, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, undisturbed / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(random_llama)
    for line in (undisturbed / "samples/step-000004.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        output = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert text.split("\n")[0] == row["completion"]


@pytest.mark.vllm
def test_eval_and_export_and_the_python_interface(undisturbed: Path, config: Path, folder: Path) -> None:
    from es_engine import Run

    run = Run(undisturbed)
    found = run.evaluate(problems=16)
    assert found.summary["reward"] == run.evaluations[-1]["reward"]
    out = folder / "evaluation"
    succeed("eval", run.adapter, "--problems", 8, "--samples", 4, "--temperature", 1, "--out", out)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["samples"] == 4
    assert len((out / "samples.jsonl").read_text().splitlines()) == 32
    succeed("export", undisturbed, "--out", folder / "exported")
    assert adapter_bytes(folder / "exported") == adapter_bytes(run.adapter)
    succeed("export", undisturbed, "--merged", "--out", folder / "merged")
    assert (folder / "merged/model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["method.populaton=8"], "method.populaton: "),
        (["model.source=/no/such/model"], "/no/such/model"),
        (["space.rank=0"], "space.rank: "),
        (["method.population=7"], "method.population: "),
        (["task.max_tokens=63"], "more than the context of 64"),
        (["task.verifier=verifier.py:nothing"], "has no function 'nothing'"),
        (["pool.workers=1000"], "pool.workers: "),
        (["pool.address=127.0.0.1:1"], "pool.address: "),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], sentence: str
) -> None:
    monkeypatch.chdir(folder)
    run = folder / "refused"
    options = [option for change in changes for option in ("--set", change)]
    assert sentence in refusal("train", config, "--run-dir", run, *options)
    assert not run.exists()


@pytest.mark.vllm
def test_a_run_folder_is_never_overwritten(undisturbed: Path, config: Path) -> None:
    before = (undisturbed / "ledger.jsonl").read_bytes()
    assert "exists already" in refusal("train", config, "--run-dir", undisturbed)
    assert (undisturbed / "ledger.jsonl").read_bytes() == before


@pytest.mark.vllm
def test_sigterm_ends_a_run_at_once_in_one_sentence(config: Path, folder: Path) -> None:
    run = folder / "interrupted"
    command = [ES_ENGINE, "train", config, "--run-dir", run, "--set", "budget.generations=100000"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_lines(run / "ledger.jsonl", 3, driver)
    driver.terminate()
    _, printed = driver.communicate(timeout=30)
    assert driver.returncode == 130
    assert "es-engine: interrupted; `es-engine resume RUN` goes on from here" in printed


@pytest.mark.vllm
def test_an_automatic_chunk_is_settled_before_the_run_and_kept_in_its_config(folder: Path, random_llama: Path) -> None:
    inputs = folder / "chunk-inputs"
    inputs.mkdir()
    config = write_config(inputs, random_llama, engine__chunk="auto", budget__generations=1)
    run = folder / "chunk-run"
    succeed("train", config, "--run-dir", run)
    size = yaml.safe_load((run / "config.yaml").read_text())["engine"]["chunk"]
    assert size in (2, 4, 8)
    assert Ledger(run / "ledger.jsonl").generations[0]["chunks"] == [size] * (8 // size)
