"""Gradients on workers: the same bits for any number of them, and what one does for a gradient."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import simple_losses
import torch
from inputs import random_prompts
from simple_losses import Weighted, reverse_kl, squared_margins
from test_gradient import LENGTHS, build_space, center, groups, model_at_center, samples

from es_engine.config import parse_config
from es_engine.methods import gradients
from es_engine.methods.es import CallRunner
from es_engine.spaces.lora import LoraSpace
from workers import actor
from workers.actor import WorkerSetup
from workers.calls import Call
from workers.chunks import Chunk
from workers.cluster import environment
from workers.divergence import NotFinite
from workers.engine import Sampling, Vector
from workers.gradient import GradientModel, PartialGradient
from workers.models import fingerprint
from workers.pool import Pool
from workers.samples import LogProbs, micro_batches, reads_prompts_once


@pytest.fixture(scope="module")
def space(random_llama: Path) -> LoraSpace:
    return build_space(random_llama)


@pytest.fixture(scope="module")
def model(random_llama: Path, space: LoraSpace) -> GradientModel:
    return model_at_center(random_llama, space)


class ModelRunner:
    """Workers that share a model, which does the last call first."""

    def __init__(self, model: GradientModel, size: int) -> None:
        self.model, self.size = model, size
        self.waves: list[int] = []

    def put(self, value: Any) -> Any:
        return value

    def run(self, calls: Sequence[Call]) -> list[Any]:
        self.waves.append(len(calls))
        results = {number: self._carry_out(calls[number]) for number in reversed(range(len(calls)))}
        return [results[number] for number in range(len(calls))]

    def _carry_out(self, call: Call) -> Any:
        if call.method == "logprobs":
            found, theta, _, temperature = call.arguments
            rows = self.model.logprobs(found, temperature, of="base" if theta is None else "theta")
            return LogProbs(rows, self.model.tokens_read(found), 0.5)
        loss, found, _, _ = call.arguments
        return self.model.gradient(loss, found)


def test_the_pools_gradient_is_that_of_all_samples(model: GradientModel, space: LoraSpace) -> None:
    whole = model.gradient(Weighted(), samples())
    runner = ModelRunner(model, 2)
    found = gradients.gradient(runner, Weighted(), samples(), center(space), 0, dim=space.dim, max_tokens=32)
    assert runner.waves == [4]
    np.testing.assert_allclose(found.gradient, whole.gradient, atol=2e-6 * np.abs(whole.gradient).max())
    assert found.gradient.dtype == np.float32
    assert found.loss == pytest.approx(whole.loss, rel=1e-5)
    assert found.metrics == {"weight": pytest.approx(whole.metrics["weight"], rel=1e-5)}
    assert found.tokens == sum(map(sum, LENGTHS))


def test_the_size_of_waves_does_not_change_a_bit(
    model: GradientModel, space: LoraSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "IN_FLIGHT_BYTES", 0)
    found = []
    for size in (1, 2, 3):
        runner = ModelRunner(model, size)
        found.append(gradients.gradient(runner, Weighted(), samples(), None, 0, dim=space.dim, max_tokens=32))
        assert max(runner.waves) == size
        assert sum(runner.waves) == 4
    assert len({each.gradient.tobytes() for each in found}) == 1
    assert len({(each.loss, each.metrics["weight"]) for each in found}) == 1


def test_pairs_stay_together(model: GradientModel, space: LoraSpace) -> None:
    whole = model.gradient(squared_margins, samples())
    runner = ModelRunner(model, 2)
    found = gradients.gradient(runner, squared_margins, samples(), None, 0, dim=space.dim, max_tokens=1, together=2)
    assert sum(runner.waves) == 3
    np.testing.assert_allclose(found.gradient, whole.gradient, atol=2e-6 * np.abs(whole.gradient).max())


def test_the_pools_logprobs_are_in_the_order_of_the_samples(model: GradientModel, space: LoraSpace) -> None:
    for theta in (center(space), None):
        expected = model.logprobs(samples(), 0.8, of="base" if theta is None else "theta")
        found = gradients.logprobs(ModelRunner(model, 2), samples(), theta, 0, max_tokens=32, temperature=0.8)
        for one, other in zip(found.rows, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
        assert (found.tokens, found.seconds) == (sum(map(sum, LENGTHS)), 4 * 0.5)


class OnOneWorker:
    """A pool of which only the first worker is used."""

    size = 1

    def __init__(self, pool: Pool) -> None:
        self.put, self._pool = pool.put, pool

    def run(self, calls: Sequence[Call]) -> list[Any]:
        return self._pool.run([replace(call, preferred=0) for call in calls])


@pytest.mark.ray
def test_any_number_of_workers_gives_the_same_bits(random_llama: Path, space: LoraSpace) -> None:
    """One, two, two that build their models again, and one thread of this process."""
    ray.cloudpickle.register_pickle_by_value(simple_losses)
    with two_workers(random_llama, space) as pool:
        theta = pool.put(center(space))
        found = [on_runner(OnOneWorker(pool), space, theta), on_runner(pool, space, theta)]
        pool.run([Call("release", "release_gradients", (), worker) for worker in range(2)])
        found.append(on_runner(pool, space, theta))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = model_at_center(random_llama, space)
    found.append(on_runner(ModelRunner(model, 3), space, center(space)))
    torch.set_num_threads(threads)
    for mine, theirs in itertools.pairwise(found):
        assert mine[0].gradient.tobytes() == theirs[0].gradient.tobytes()
        assert (mine[0].loss, mine[0].metrics) == (theirs[0].loss, theirs[0].metrics)
        assert [row.tobytes() for row in mine[1]] == [row.tobytes() for row in theirs[1]]


def two_workers(folder: Path, space: LoraSpace) -> Pool:
    config = parse_config(
        {
            "name": "gradients",
            "model": {"source": str(folder)},
            "optimizer": {"lr": 1.0},
            "task": {},
            "engine": {"kind": "hf", "dtype": "float32", "device": "cpu"},
            "pool": {"workers": 2},
            "budget": {"generations": 1},
        }
    )
    setup = WorkerSetup(config, space, fingerprint(folder), tuple(random_prompts(5, 9)), slots=2, parameters=1)
    return Pool(setup, lambda _: None)


def on_runner(pool: CallRunner, space: LoraSpace, theta: Any) -> tuple[gradients.Gradient, list[Vector]]:
    """Some samples are read whole, and a group's prompt once."""
    drawn = [replace(sample, values={}) for sample in [*samples(), *groups()[:3]]]
    batches = micro_batches(drawn, 70)
    assert sorted(reads_prompts_once([drawn[place] for place in batch]) for batch in batches)[-2:] == [False, True]
    rows = gradients.logprobs(pool, drawn, None, -1, max_tokens=70).rows
    return gradients.gradient(pool, reverse_kl, drawn, theta, 3, dim=space.dim, max_tokens=70), rows


class Asked:
    """Workers that note their calls, and say that each token is certain."""

    size = 1

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def put(self, value: Any) -> Any:
        return value

    def run(self, calls: Sequence[Call]) -> list[Any]:
        self.calls += calls
        return [LogProbs([np.zeros(len(each.completion_ids)) for each in call.arguments[0]], 1, 0.5) for call in calls]


def test_only_a_teacher_may_lack_a_token_and_nobody_may_say_what_is_no_number() -> None:
    runner = Asked()
    gradients.logprobs(runner, samples()[:1], None, -1, max_tokens=1000)
    gradients.teacher_logprobs(runner, samples()[:1], max_tokens=1000)
    faults = []
    for call in runner.calls:
        for value in (-1.0, -np.inf, np.nan):
            row = np.full(len(samples()[0].completion_ids), -1.0)
            row[-1] = value
            faults.append(call.fault(LogProbs([row], 1, 0.5)))
    mine, teachers = "a log-probability is not finite", "a log-probability of the teacher is not finite"
    assert faults == [None, mine, mine, None, None, teachers]
    assert all(isinstance(fault, NotFinite) for fault in faults if fault is not None)


# In a worker


class Recorder:
    """An engine or a model of which all that matters is what it is asked, and in what order."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self.log.append(f"{self.name}.{method}")
            return PartialGradient(np.zeros(1, np.float32), 0.0, {}, 0)

        return call


def test_a_worker_begins_with_what_torch_wants_for_sums_in_a_fixed_order_on_a_gpu() -> None:
    """It looks at its first product on a GPU, which is the engine's, and refuses all gradients if it was not there."""
    assert environment(threads=1)["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")


def test_engine_and_gradients_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    worker: Any = actor.Worker(Any, 0, None)  # type: ignore[arg-type]
    worker._engine, worker._model = Recorder("engine", log), None
    monkeypatch.setattr(actor, "build_gradient_model", lambda *_: Recorder("model", log))
    theta = np.zeros(1, np.float32)

    def asked(method: str, *arguments: Any) -> list[str]:
        log.clear()
        getattr(worker, method)(*arguments)
        return list(log)

    def evaluated() -> list[str]:
        log.clear()
        with pytest.raises(AttributeError):  # for want of a scorer
            worker.evaluate(Chunk(0, 0, 0.0, (), (), Sampling(1)), [], theta, 0)
        return list(log)

    assert evaluated() == ["engine.set_center", "engine.write_slots"]
    taken = ["engine.rest", "model.wake"]
    loaded = ["engine.rest", *taken]
    assert asked("gradient", None, [], theta, 4) == [*loaded, "model.set_theta", "model.gradient"]
    assert asked("gradient", None, [], theta, 4) == [*taken, "model.gradient"]
    assert asked("logprobs", [], None, 5) == [*taken, "model.logprobs", "model.tokens_read"]
    assert asked("gradient", None, [], theta, 5) == [*taken, "model.set_theta", "model.gradient"]
    assert evaluated() == ["model.rest", "engine.wake", "engine.write_slots"]
    assert asked("release_gradients") == ["model.rest", "engine.wake"]
    assert evaluated() == ["engine.write_slots"]
    assert asked("gradient", None, [], theta, 5) == [*loaded, "model.set_theta", "model.gradient"]
    # Another run: slots are written, which on a GPU must be in its memory then.
    monkeypatch.setattr(actor, "_noise_cache_bytes", lambda _: 0)
    worker._setup = SimpleNamespace(config=SimpleNamespace(task=None, seed=1), space=None)
    assert asked("assign", worker._setup) == ["model.rest", "engine.wake", "engine.assign"]
    assert asked("gradient", None, [], theta, 5) == [*loaded, "model.set_theta", "model.gradient"]
    assert evaluated() == ["model.rest", "engine.wake", "engine.set_center", "engine.write_slots"]


def test_gradients_are_not_taken_in_float16() -> None:
    """A loss is a mean over all tokens of an update: its slopes are below what float16 can hold."""
    worker: Any = actor.Worker(Any, 0, None)  # type: ignore[arg-type]
    for learns, dtype in ((True, "bfloat16"), (False, "float16")):
        worker._setup, worker._engine = SimpleNamespace(learns=learns), SimpleNamespace(dtype=dtype)
        worker._check_type()
    worker._setup.learns = True
    with pytest.raises(ValueError, match=r"^engine\.dtype: the model is in float16, .* accepted .* are bfloat16"):
        worker._check_type()


def test_loading_the_model_costs_a_run_no_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run of a comparison has workers load it anew: methods without gradients would have more of the budget."""
    now = 0.0
    monkeypatch.setattr(actor, "time", SimpleNamespace(perf_counter=lambda: now))

    def load(*_: object) -> Recorder:
        nonlocal now
        now += 60.0
        return Recorder("model", [])

    monkeypatch.setattr(actor, "build_gradient_model", load)
    worker: Any = actor.Worker(Any, 0, None)  # type: ignore[arg-type]
    worker._engine, worker._model = Recorder("engine", []), None
    theta = np.zeros(1, np.float32)
    assert worker.gradient(None, [], theta, 0).seconds == 0
    worker.release_gradients()
    assert worker.logprobs([], theta, 0).seconds == 0
    worker.release_gradients()
    assert worker.teacher_logprobs([]).seconds == 0
    assert now == 3 * 60
