"""Simulated workers: their latency model, their answers, and whole runs of the real driver and pool on many of them."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import FunctionRunner, problems

from es_engine import noise
from es_engine.config import Config, ConfigError, EsMethodConfig, SimulatedEngineConfig, parse_config
from es_engine.costs import Costs
from es_engine.ledger import Ledger, first_difference
from es_engine.methods import es as methods
from es_engine.methods.es import EvolutionStrategies
from es_engine.spaces.base import Matrix
from es_engine.spaces.lora import LoraSpace
from es_engine.trainer import train
from workers import actor, simulated_engine
from workers.actor import WorkerSetup
from workers.calls import Call
from workers.chunks import Chunk, Problem, fault_of
from workers.engine import Completion, Member, Request, Sampling, Vector
from workers.simulated_engine import PATTERN, SimulatedEngine, SimulatedWorkers, decoding_seconds

ROOT = Path(__file__).resolve().parent.parent
PAIR = (Member(3, 1), Member(3, -1))
SAMPLING = Sampling(max_tokens=200, samples=2, temperature=1.0)


def requests(count: int, seed: int = 5) -> list[Request]:
    return [Request(number % 2, (1, 2), seed + number) for number in range(count)]


def build_engine(
    dim: int = 10, generation: int = 4, members: Sequence[Member] = PAIR, run_seed: int = 1, **fields: Any
) -> SimulatedEngine:
    engine = SimulatedEngine(SimulatedEngineConfig(**fields), run_seed, dim)
    engine.write_slots(generation, 0.1, members)
    return engine


class Clock:
    """Time that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (actor, simulated_engine):
        monkeypatch.setattr(module, "time", clock)
    return clock


# --- the latency model


def test_decoding_times_are_those_of_step_by_step_decoding() -> None:
    lengths = np.random.default_rng(0).integers(1, 12, 40)
    expected = np.zeros(len(lengths))
    for step in range(1, 13):
        expected[lengths >= step] += 0.5 + 0.25 * (lengths >= step).sum()
    np.testing.assert_allclose(decoding_seconds(lengths, 0.5, 0.25), expected)


def test_lengths_and_stragglers_are_as_configured() -> None:
    fields = {"answer_tokens": 50.0, "answer_spread": 0.4, "sequence_ms": 0.0, "step_ms": 10.0}
    normal, slow = 0, 0
    logarithms = []
    for generation in range(400):
        engine = build_engine(generation=generation, stragglers=0.25, slowdown=3.0, **fields)
        plan = engine.plan(requests(10), SAMPLING)
        pace = plan.seconds / np.minimum(plan.lengths, 200)
        assert np.allclose(pace, 0.01) or np.allclose(pace, 0.03)
        normal, slow = normal + np.allclose(pace, 0.01), slow + np.allclose(pace, 0.03)
        logarithms.append(np.log(plan.lengths))
    assert slow / (normal + slow) == pytest.approx(0.25, abs=0.07)
    assert np.exp(np.median(logarithms)) == pytest.approx(50, rel=0.03)
    assert np.std(logarithms) == pytest.approx(0.4, rel=0.03)


def test_a_plan_depends_on_run_generation_members_and_problems_alone() -> None:
    def lengths(engine: SimulatedEngine, seed: int = 5) -> bytes:
        return engine.plan(requests(4, seed), SAMPLING).lengths.tobytes()

    again = build_engine()
    again.write_slots(9, 0.1, PAIR)
    again.write_slots(4, 0.1, PAIR)
    assert lengths(again) == lengths(build_engine())
    others = [lengths(build_engine(generation=5)), lengths(build_engine(members=(Member(2, 1),)))]
    others += [lengths(build_engine(), seed=6), lengths(build_engine(run_seed=2))]
    assert len({lengths(build_engine()), *others}) == 5


def test_every_completion_comes_once_when_its_time_has_come(clock: Clock) -> None:
    engine = build_engine(answer_tokens=150.0)
    plan, began = engine.plan(requests(20), SAMPLING), clock.now
    seen: list[tuple[Completion, float]] = [
        (completion, clock.now - began) for completion in engine.generate(requests(20), SAMPLING)
    ]
    assert {(done.request, done.sample) for done, _ in seen} == {(r, s) for r in range(20) for s in range(2)}
    assert len(seen) == 40
    for completion, when in seen:
        place = 2 * completion.request + completion.sample
        assert when == pytest.approx(plan.seconds[place])
        cut = plan.lengths[place] > 200
        assert completion.finish_reason == ("length" if cut else "stop")
        assert len(completion.token_ids) == min(plan.lengths[place], 200)
        assert bool(completion.text) == (not cut)
    assert {done.finish_reason for done, _ in seen} == {"length", "stop"}


def test_slots_and_sums_take_their_time(clock: Clock) -> None:
    engine = build_engine(dim=1_000_000)
    assert clock.now == pytest.approx(1e6 * (simulated_engine.DRAW_S + 2 * simulated_engine.WRITE_S))
    began = clock.now
    engine.noise_sum(4, [1, 2, 3], [1.0, 1.0, 1.0])
    assert clock.now - began == pytest.approx(1e6 * 3 * simulated_engine.SUM_S)


def test_noise_sums_are_weighted_sums_of_pairs() -> None:
    engine = build_engine(dim=2 * PATTERN + 7)
    one, two = engine.noise_sum(4, [1], [1.0]), engine.noise_sum(4, [2], [1.0])
    both = engine.noise_sum(4, [1, 2], [0.5, -2.0])
    assert both.shape == (2 * PATTERN + 7,)
    assert both.dtype == np.float32
    np.testing.assert_allclose(both, 0.5 * one - 2 * two, rtol=1e-5, atol=1e-6)
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.1
    assert engine.noise_sum(5, [1], [1.0]).tobytes() != one.tobytes()


def test_simulated_workers_are_light() -> None:
    """Hundreds of them share a machine."""
    code = "import sys, workers.simulated_engine; print({'torch', 'transformers', 'vllm'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"


# --- workers


def build_config(**fields: Any) -> Config:
    """A small run; fields are changed by dotted name."""
    config: dict[str, Any] = {
        "name": "simulated",
        "model": {"source": "none"},
        "space": {"rank": 4},
        "method": {"population": 16, "sigma": 0.3, "prompts": 3},
        "optimizer": {"kind": "adam", "lr": 0.1},
        "task": {"template": "plain", "high": 9, "max_tokens": 16},
        "pool": {"workers": 1},
        "engine": {"kind": "simulated", "chunk": 2, "answer_tokens": 10.0, "step_ms": 1.0},
        "budget": {"generations": 3},
        "evaluation": {"every": 2, "problems": 8, "chunk": 4},
    }
    for name, value in fields.items():
        axis, field = name.split("__")
        config[axis][field] = value
    return parse_config(config)


def test_a_simulated_worker_takes_any_rank_and_one_device() -> None:
    assert build_config(space__rank=3008).space.rank == 3008
    with pytest.raises(ConfigError, match=r"pool.tensor_parallel: got 2, accepted is 1 while engine.kind is simulated"):
        build_config(pool__tensor_parallel=2)


def test_workers_of_one_process_answer_alike_and_are_graded(clock: Clock) -> None:
    config = build_config()
    space = LoraSpace([Matrix("layer", 8, 8, 1.0)], rank=4, alpha=8.0)
    setup = WorkerSetup(config, space, "", (), slots=2, parameters=100)
    process = SimulatedWorkers()
    for index in (0, 7):
        assert process.carry_out(index, "start", setup)["index"] == index
    chunk = Chunk(1, 0, 0.3, PAIR, ((0, 1, 2), (0, 1, 2)), Sampling(16))
    task = config.task.build()
    batch = [simulated_problem(task.example("train", number)) for number in range(3)]
    results = [process.carry_out(index, "evaluate", chunk, batch, space.start(), 1) for index in (0, 7, 0)]
    assert [result.worker for result in results] == [0, 7, 0]
    for result in results:
        assert result.rewards.shape == (2, 3, 1)
        assert result.rewards.tobytes() == results[0].rewards.tobytes()
        uncut = result.tokens < 16
        assert (result.components["format"][uncut] > 0).all()
        assert result.seconds["slots"] + result.seconds["generate"] == pytest.approx(clock.now / 3)
        generated = int(result.tokens.sum())
        processed = 2 * 3 * 3 + generated
        assert (result.costs.generated, result.costs.processed) == (generated, processed)
        assert result.costs.flops == 2 * (100 + 4 * (8 + 8)) * processed
        assert result.costs.worker_seconds == pytest.approx(clock.now / 3)  # without what it waited for work
    # The second worker has waited since the generation came to the process, the first one since its own last chunk.
    assert [result.seconds["waited"] for result in results] == pytest.approx([0.0, clock.now / 3, clock.now / 3])
    assert process.carry_out(7, "noise_sum", 1, (3,), (1.0,)).vector.shape == (space.dim,)


def test_a_worker_waits_for_nothing_between_two_runs(clock: Clock) -> None:
    config = build_config()
    setup = WorkerSetup(config, LoraSpace([Matrix("layer", 8, 8, 1.0)], rank=4, alpha=8.0), "", (), 2, parameters=100)
    process = SimulatedWorkers()
    process.carry_out(0, "start", setup)
    batch = [simulated_problem(config.task.build().example("train", 0))]
    chunk = Chunk(1, 0, 0.3, PAIR, ((0,), (0,)), Sampling(16))
    for _ in range(2):
        clock.sleep(1000.0)
        process.carry_out(0, "assign", setup)
        result = process.carry_out(0, "evaluate", chunk, batch, setup.space.start(), 1)
        assert result.seconds["waited"] == 0


def test_samples_share_their_prompt_and_sums_cost_seconds_alone(clock: Clock) -> None:
    config = build_config()
    space = LoraSpace([Matrix("layer", 1000, 1000, 1.0)], rank=4, alpha=8.0)
    process = SimulatedWorkers()
    process.carry_out(0, "start", WorkerSetup(config, space, "", (), slots=2, parameters=10**6))
    batch = [simulated_problem(config.task.build().example("train", number)) for number in range(2)]
    chunk = Chunk(1, 0, 0.3, PAIR, ((0, 1), (0, 1)), Sampling(16, samples=5, temperature=1.0))
    result = process.carry_out(0, "evaluate", chunk, batch, space.start(), 1)
    assert result.costs.processed - result.costs.generated == 2 * 2 * 3
    seconds = space.dim * 3 * simulated_engine.SUM_S
    assert process.carry_out(0, "noise_sum", 1, (1, 2, 3), (1.0, 1.0, 1.0)).costs == Costs(
        worker_seconds=pytest.approx(seconds)
    )


def simulated_problem(example: Any) -> Problem:
    return Problem(example, example.prompt, (1, 2, 3))


def test_replies_that_cannot_be_right_are_recognised(clock: Clock) -> None:
    config = build_config()
    space = LoraSpace([Matrix("layer", 8, 8, 1.0)], rank=4, alpha=8.0)
    process = SimulatedWorkers()
    process.carry_out(0, "start", WorkerSetup(config, space, "", (), slots=2, parameters=100))
    chunk = Chunk(1, 0, 0.3, PAIR, ((0, 1), (0, 1)), Sampling(16))
    batch = [simulated_problem(config.task.build().example("train", number)) for number in range(2)]
    good = process.carry_out(0, "evaluate", chunk, batch, space.start(), 1)
    assert fault_of(chunk, batch, good) is None
    assert fault_of(chunk, batch, replace(good, rewards=good.rewards[:1])) is not None
    for value, counted in ((np.nan, False), (np.inf, False), (np.nan, True)):
        rewards = good.rewards.copy()
        rewards[1, 0, 0] = value
        failures = {**good.failures, ("verifier", "timeout"): 1} if counted else good.failures
        assert (fault_of(chunk, batch, replace(good, rewards=rewards, failures=failures)) is None) == counted


# --- the update


class CountingRunner(FunctionRunner):
    """Counts the noise sums that are alive whenever some have been asked for."""

    def __init__(self, dim: int) -> None:
        super().__init__(lambda theta, *_: float(theta[0]), dim)
        self.sums: list[weakref.ref[Vector]] = []
        self.most = 0

    def run(self, calls: Sequence[Call]) -> list[Any]:
        results = super().run(calls)
        if calls[0].method == "noise_sum":
            self.sums += [weakref.ref(result.vector) for result in results]
            self.most = max(self.most, sum(reference() is not None for reference in self.sums))
        return results


def update(runner: FunctionRunner) -> Vector:
    es = EvolutionStrategies(EsMethodConfig(population=80, prompts=1, sigma=0.1), chunk=2, sampling=Sampling(8))
    direction = es.estimate(runner, noise.draw(9, 9, 9, 300), 0, problems(1), 0, 0.1, 300).direction
    assert direction is not None
    return direction


def test_an_update_holds_a_few_vectors_whatever_the_population() -> None:
    runner = CountingRunner(300)
    update(runner)
    assert len(runner.sums) == 40
    assert runner.most <= 9


def test_how_many_sums_are_asked_for_at_a_time_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    directions = set()
    for count in (1, 3, 8, 1000):
        monkeypatch.setattr(methods, "SUMS_AT_A_TIME", count)
        directions.add(update(CountingRunner(300)).tobytes())
    assert len(directions) == 1


# --- whole runs

# Where a file `kill` lies beside it, a worker at its 31st rollout kills its process, with all its fellows in it, once.
VERIFIER = """
import os, signal
from pathlib import Path

KILL = Path(__file__).with_name("kill")
calls = 0

def length(rollout):
    global calls
    calls += 1
    if calls == 31 and KILL.exists():
        KILL.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return len(rollout.token_ids) / 16
"""


@pytest.mark.ray
def test_a_run_is_the_same_on_one_worker_on_many_and_when_a_process_dies(random_llama: Path, tmp_path: Path) -> None:
    verifier = tmp_path / "verifier.py"
    verifier.write_text(VERIFIER)
    runs = {}
    for name, workers in (("one", 1), ("many", 24), ("killed", 3)):
        if name == "killed":
            (tmp_path / "kill").touch()
        config = build_config(
            model__source=str(random_llama),
            task__verifier=f"{verifier}:length",
            pool__workers=workers,
            engine__workers_per_process=8,
        )
        runs[name] = Ledger(train(config, tmp_path / name).path / "ledger.jsonl")
    assert not (tmp_path / "kill").exists()
    assert runs["killed"].generations[-1]["restarts"] == 3
    assert len({worker for line in runs["many"].generations for worker in line["workers"]}) == 8
    assert all(line["moves"] for line in runs["one"].generations)
    for name in ("many", "killed"):
        assert first_difference(runs[name].path, runs["one"].path) is None, name
