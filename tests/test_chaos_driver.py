"""What can befall a driver and its disk, in runs without Ray: the run goes on to the ledger and the adapter that it
would have had, or is refused in a sentence that names the difference."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from chaos_runs import PATIENCE_S
from chaos_table import count
from safetensors.torch import load_file, save_file
from small_runs import resume_here, small_config, train_here, write_config

from es_engine.config import Config, TelemetryConfig, dump_config
from es_engine.ledger import Ledger, LedgerReader, first_difference
from es_engine.run_folder import RunFolder

GENERATIONS = 6
ES_ENGINE = Path(sys.executable).with_name("es-engine")


def config_of(model: Path, generations: int = GENERATIONS, **axes: dict[str, Any]) -> Config:
    """A run of seconds on the hf engine."""
    config = small_config(
        model,
        {"kind": "es", "population": 4, "sigma": 0.3, "prompts": 2},
        **{
            "task": {"max_tokens": 4},
            "engine": {"chunk": 2},
            "budget": {"generations": generations},
            "evaluation": {"every": 2, "problems": 4},
            **axes,
        },
    )
    return config.model_copy(update={"telemetry": TelemetryConfig(console=False, tensorboard=False)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(folder: Path, random_llama: Path) -> Path:
    return train_here(config_of(random_llama), folder / "undisturbed")


def assert_same_run(run: Path, reference: Path) -> None:
    assert first_difference(run / "ledger.jsonl", reference / "ledger.jsonl") is None
    mine, theirs = ((each / "adapter/adapter_model.safetensors").read_bytes() for each in (run, reference))
    assert mine == theirs
    steps = [[line["step"] for line in Ledger(each / "eval.jsonl").lines] for each in (run, reference)]
    assert steps[0] == steps[1]


# --- the driver


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.chaos)])
def test_drivers_killed_at_random_instants(random_llama: Path, folder: Path, kills: int) -> None:
    generations = 4 if kills == 4 else 30
    config = config_of(random_llama, generations)
    reference = train_here(config, folder / f"reference-{kills}")
    path, run = write_config(config, folder / f"{kills}.yaml"), folder / f"killed-{kills}"
    command = [sys.executable, Path(__file__).with_name("killed_drivers.py"), path, run, str(kills), "1"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    counts = list(map(int, done.stdout.split()))
    assert sum(counts) == kills
    for number in range(len(counts)):
        assert_same_run(Path(f"{run}-{number}"), reference)
    count("kill -9 of the driver at a random instant, and resume", kills)


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_a_signal_ends_a_run_within_ten_seconds_and_a_second_one_at_once(
    random_llama: Path, folder: Path, signals: list[signal.Signals]
) -> None:
    name = "-".join(each.name for each in signals)
    config = config_of(random_llama, 100_000)
    run = folder / name
    command = [ES_ENGINE, "train", write_config(config, folder / f"{name}.yaml"), "--run-dir", run]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE_S
    while not (run / "ledger.jsonl").exists() or len(Ledger(run / "ledger.jsonl").lines) < 3:
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    told = time.monotonic()
    for number in signals:
        driver.send_signal(number)
        time.sleep(0.2)
    _, printed = driver.communicate(timeout=30)
    took = time.monotonic() - told
    if len(signals) == 1:
        assert driver.returncode == 130
        assert "goes on from here" in printed
    else:
        assert driver.returncode in (130, -signals[1])
    assert took < 10
    count(f"{' and '.join(each.name for each in signals)} to the driver", 1, took)


def test_no_clock_but_the_monotonic_one_matters(random_llama: Path, undisturbed: Path, tmp_path: Path) -> None:
    jumps = itertools.cycle([0.0, 4e9, 1.0, 1e9])
    with patch.object(time, "time", lambda: next(jumps)):
        run = train_here(config_of(random_llama), tmp_path / "run")
    assert_same_run(run, undisturbed)
    count("time.time jumps by decades at every call", 1)


# --- its verifier

SLOW_VERIFIER = """
import time

def score(rollout):
    time.sleep(0.1)
    return float(len(rollout.completion))
"""


def scoring_processes() -> list[int]:
    """Those of this process."""
    found = []
    for children in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError):  # a thread, or a child, that has just ended
            pids = map(int, children.read_text().split())
            found += [pid for pid in pids if b"workers.scoring_child" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


@pytest.mark.chaos
def test_verifiers_killed_in_the_middle_of_a_rollout(random_llama: Path, tmp_path: Path) -> None:
    """One process in each generation but the first."""
    (tmp_path / "slow.py").write_text(SLOW_VERIFIER)
    config = config_of(random_llama, task={"max_tokens": 4, "verifier": f"{tmp_path}/slow.py:score"})
    run = tmp_path / "run"
    reader = LedgerReader(run / "ledger.jsonl")
    with ThreadPoolExecutor(1) as executor:  # one thread for both: each has its own number of OpenMP threads
        undisturbed = executor.submit(train_here, config, tmp_path / "undisturbed").result()
        training = executor.submit(train_here, config, run)
        while not training.done():
            if any(line["kind"] == "generation" for line in reader.new_lines()):
                time.sleep(0.3)
                for pid in scoring_processes():
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        training.result()
    assert_same_run(run, undisturbed)
    lines = [*Ledger(run / "ledger.jsonl").generations, *Ledger(run / "eval.jsonl").lines]
    assert not any(line["failures"] for line in lines)
    rescored = sum(line["rescored"] for line in lines)
    assert rescored >= GENERATIONS // 2
    count("kill -9 of a verifier's process at a rollout", rescored)


# --- its files


def interrupted(undisturbed: Path, run: Path, lines: int = 5) -> Path:
    """A copy of a run as it was when its ledger had so many lines, with the checkpoint after step 4 and those before:
    after generation 4, the fifth line."""
    shutil.copytree(undisturbed, run)
    for name, kept in (("ledger.jsonl", lines), ("eval.jsonl", 2)):
        path = run / name
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-000006")
    return run


def tear_the_last_line(run: Path) -> None:
    path = run / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-20])


def truncate_a_checkpoint(run: Path) -> None:
    path = run / "checkpoints/step-000004/state.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def lose_all_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def take_another_runs_checkpoint(run: Path) -> None:
    other = train_here(RunFolder(run).load_config().model_copy(update={"seed": 7}), run.with_name("other"))
    for step in ("step-000004", "step-000006"):
        shutil.rmtree(run / "checkpoints" / step, ignore_errors=True)
        shutil.copytree(other / "checkpoints" / step, run / "checkpoints" / step)


def give_the_optimizer_another_state(run: Path) -> None:
    path = run / "checkpoints/step-000004/state.safetensors"
    save_file({"theta": load_file(path)["theta"], "optimizer.exp_avg": torch.zeros(3)}, path)
    (run / "checkpoints/step-none").mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        tear_the_last_line,
        truncate_a_checkpoint,
        lose_all_checkpoints,
        take_another_runs_checkpoint,
        give_the_optimizer_another_state,
    ],
)
def test_a_damaged_run_goes_on_from_what_is_whole(
    undisturbed: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run = interrupted(undisturbed, tmp_path / "run")
    damage(run)
    resume_here(run)
    assert_same_run(run, undisturbed)
    count(damage.__name__.replace("_", " "), 1)


def test_a_run_holds_no_rollouts_of_the_steps_behind_it(undisturbed: Path, tmp_path: Path) -> None:
    """Neither of those that it found in its ledger nor of its own: its memory would grow with every step."""
    run, ledgers, append = interrupted(undisturbed, tmp_path / "run"), [], Ledger.append

    def noted(ledger: Ledger, line: dict[str, Any]) -> None:
        append(ledger, line)
        ledgers.append(ledger)

    with patch.object(Ledger, "append", noted):
        resume_here(run)
    (ledger,) = {id(each): each for each in ledgers if each.path.name == "ledger.jsonl"}.values()
    assert len(ledger.generations) == GENERATIONS
    assert not any({"members", "prompts", "rewards"} & line.keys() for line in ledger.lines)
    assert_same_run(run, undisturbed)


def test_a_run_of_another_model_or_config_is_refused_by_the_name_of_what_differs(
    undisturbed: Path, random_llama: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(random_llama, model)
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    run = interrupted(undisturbed, tmp_path / "run")
    config = RunFolder(run).load_config()
    source = config.model.model_copy(update={"source": str(model)})
    for sentence, changes in (
        ("config.model.source is .* now, but was", {"model": source}),
        ("config.method.prompts is 3 now, but was 2", {"method": config.method.model_copy(update={"prompts": 3})}),
        ("config.seed is 1 now, but was 0", {"seed": 1}),
    ):
        (run / "config.yaml").write_text(dump_config(config.model_copy(update=changes)))
        with pytest.raises(ValueError, match=rf"ledger.jsonl: {sentence}.* when the run began; it cannot go on"):
            resume_here(run)
    (run / "config.yaml").write_text(dump_config(config))
    before = (random_llama / "model.safetensors").read_bytes()
    try:
        (random_llama / "model.safetensors").write_bytes(bytes(data))
        with pytest.raises(ValueError, match=r"ledger.jsonl: model is \S+ now, but was \S+ when the run began"):
            resume_here(run)
    finally:
        (random_llama / "model.safetensors").write_bytes(before)
    resume_here(run)
    assert_same_run(run, undisturbed)
    count("a changed config, or one bit of the base model: refused by name", 4)


# --- its disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of eight MiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path], check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(
    ("owner", "method", "times"), [(RunFolder, "save_checkpoint", 2), (Ledger, "append", 4), (Ledger, "append", 6)]
)
def test_a_disk_that_is_full_for_a_time(
    random_llama: Path, undisturbed: Path, disk: Path, owner: type, method: str, times: int
) -> None:
    """Full when a checkpoint or a line is written for the so-manieth time."""
    ballast, calls, write = disk / "ballast", itertools.count(1), getattr(owner, method)

    def on_a_full_disk(*arguments: Any) -> None:
        if next(calls) == times:
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(b"0" * 4096):
                    pass
        write(*arguments)

    with patch.object(owner, method, on_a_full_disk), pytest.raises(OSError, match="No space left"):
        train_here(config_of(random_llama), disk / "run")
    with pytest.raises(OSError, match="No space left"):
        resume_here(disk / "run")
    ballast.unlink()
    resume_here(disk / "run")
    assert_same_run(disk / "run", undisturbed)
    count(f"a full disk in {method.replace('_', ' ')}, then freed", 1)
