"""One worker: an engine, the scorer of what it generates, the noise of the chunks it evaluated, and gradients.

The model that gradients are taken with is built when the first is asked for. On a GPU it and the engine take turns:
whichever works, the other leaves the memory.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from es_engine.config import Config, MultiTurnTaskConfig, teacher_of
from es_engine.config.engine import CPU_KV_CACHE_GIB
from es_engine.costs import Costs, costs_of
from es_engine.spaces.lora import LoraSpace
from rewards.base import Score
from workers import games
from workers.chunks import (
    Chunk,
    ChunkResult,
    Outcome,
    Outcomes,
    Problem,
    Transcript,
    WeightedNoise,
    collect,
    rollout_of,
    sampling_keys,
    sampling_seed,
)
from workers.engine import Completion, Filling, PopulationEngine, Request, Vector
from workers.prompts import Preparer, load_preparer
from workers.samples import LogProbs, Sample
from workers.scoring import open_scorer

if TYPE_CHECKING:
    from workers.canary import CanaryReport
    from workers.gradient import GradientModel, Loss, PartialGradient, Speaker
    from workers.teacher import Teacher

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker is made from, the same for all workers of a run; `canary` are the prompts of its start-up check,
    `parameters` those of the base model that multiply, `teacher` the teacher's fingerprint where there is one.

    Of all runs that the pool is for, `slots` are the most members in a chunk, `gradients` says whether a model in torch
    is wanted beside the engine, and `learns` whether any of them learns by gradients."""

    config: Config
    space: LoraSpace
    fingerprint: str
    canary: tuple[tuple[int, ...], ...]
    slots: int
    parameters: int
    teacher: str | None = None
    gradients: bool = False
    learns: bool = False

    @property
    def adapted_parameters(self) -> int:
        """The parameters that multiply in a model that wears an adapter."""
        return self.parameters + self.space.adapter_parameters


class Worker:
    """The class of the pool's Ray actors."""

    def __init__(
        self,
        setup: WorkerSetup,
        index: int,
        cores: tuple[int, ...] | None,
        credentials: Mapping[str, str] | None = None,
    ) -> None:
        """`cores` are places among the CPU cores this process may use; None leaves it on all of them. `credentials` are
        for its environment."""
        os.environ.update(credentials or {})
        self._index = index
        self._setup = setup
        self._center_version = -1
        self._gradients: GradientModel | None = None
        self._gradients_version = -1
        self._prepare: Preparer | None = None  # for the later prompts of a game; all others are prepared by the driver
        if cores is not None:  # before torch starts its threads
            allowed = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {allowed[core % len(allowed)] for core in cores})

    def start(self) -> dict[str, Any]:
        """Start engine and scorer and run the canary, in worker 0 against the reference; says where the worker runs.

        Raises ValueError if the worker cannot take part.
        """
        self._model = model = _model_folder(self._setup)
        self._engine = build_engine(self._setup, model)
        self._check_type()
        self._open_task()
        report = _run_canary(self._engine, self._setup, model, with_reference=self._index == 0)
        return self._described(report)

    def assign(self, setup: WorkerSetup) -> dict[str, Any]:
        """Serve another run from now on, on the engine that is there; what was known of thetas is forgotten, for
        versions name those of one run. Says where the worker runs."""
        before, self._setup = self._setup, setup
        self.release_gradients()
        self._center_version = -1
        self._engine.assign(setup.space, setup.config.seed, _noise_cache_bytes(setup))
        if setup.config.task != before.config.task:
            self._scorer.close()
            self._open_task()
        return self._described()

    def evaluate(
        self, chunk: Chunk, batch: Sequence[Problem], theta: Vector, version: int, ahead: Filling | None = None
    ) -> ChunkResult:
        """Generate and score a chunk around theta, shape (D,), or score by references where the batch has them;
        `version` names theta, so that it is taken in only once. `ahead` is the chunk that will probably be next."""
        started = time.perf_counter()
        if self._gradients is not None:
            self._gradients.rest()
            self._engine.wake()
        if version != self._center_version:
            self._engine.set_center(theta)
            self._center_version = version
        self._engine.write_slots(chunk.generation, chunk.sigma, chunk.members)
        written = time.perf_counter()
        if ahead is not None:
            self._engine.prepare(*ahead)
        failures, rescored = Counter(self._scorer.failures), self._scorer.rescored
        found = self._roll_out(chunk, batch)
        scored = time.perf_counter()
        result = collect(chunk, found)
        result.failures = dict(Counter(self._scorer.failures) - failures)
        result.rescored = self._scorer.rescored - rescored
        result.seconds = {
            "slots": written - started,
            "generate": scored - found.waited - written,
            "score": time.perf_counter() - scored + found.waited,
        }
        generated = int(result.tokens.sum())
        result.costs = costs_of(
            self._setup.adapted_parameters,
            result.prompt_tokens + generated,
            generated=generated,
            seconds=sum(result.seconds.values()),
        )
        result.worker = self._index
        return result

    def noise_sum(self, generation: int, pairs: Sequence[int], weights: Sequence[float]) -> WeightedNoise:
        """The sum of weight * eps(pair), shape (D,); good until the next call."""
        started = time.perf_counter()
        vector = self._engine.noise_sum(generation, pairs, weights)
        return WeightedNoise(vector, Costs(worker_seconds=time.perf_counter() - started))

    def gradient(self, loss: Loss, samples: Sequence[Sample], theta: Vector, version: int) -> PartialGradient:
        """The gradient of a loss over a micro-batch at theta, shape (D,), which `version` names."""
        self._load_gradients()
        started = time.perf_counter()
        found = self._gradients_at(theta, version).gradient(loss, samples)
        found.seconds = time.perf_counter() - started
        return found

    def logprobs(
        self, samples: Sequence[Sample], theta: Vector | None, version: int, temperature: float = 1.0
    ) -> LogProbs:
        """Log-probabilities of samples' completion tokens at theta; where theta is None, by the base model."""
        return self._logprobs(samples, theta, version, temperature, "base" if theta is None else "theta")

    def teacher_logprobs(self, samples: Sequence[Sample], temperature: float = 1.0) -> LogProbs:
        """Log-probabilities of samples' completion tokens by the teacher."""
        return self._logprobs(samples, None, -1, temperature, "teacher")

    def release_gradients(self) -> None:
        """Drop the model that gradients are taken with; the next gradient builds it again."""
        if self._gradients is not None:
            self._gradients.rest()
            self._gradients, self._gradients_version = None, -1
            self._engine.wake()

    def _check_type(self) -> None:
        if self._setup.learns and self._engine.dtype == "float16":
            raise ValueError(
                "engine.dtype: the model is in float16, in which small gradients vanish; accepted for methods with "
                "gradients are bfloat16 and, with engine.kind=hf or without a GPU, float32"
            )

    def _open_task(self) -> None:
        config = self._setup.config
        task = config.task.build()
        self._scorer: Any = open_scorer(config.task, task.verifier)
        games = isinstance(config.task, MultiTurnTaskConfig)
        self._prepare = load_preparer(config, self._model, task.max_tokens) if games else None

    def _described(self, canary: CanaryReport | None = None) -> dict[str, Any]:
        return {"index": self._index, "pid": os.getpid(), "cores": sorted(os.sched_getaffinity(0)), "canary": canary}

    def _load_gradients(self) -> GradientModel:
        """The model that gradients are taken with. It is loaded before a call's seconds are counted: like the start of
        the engine, that is no part of a step."""
        if self._gradients is None:
            self._engine.rest()
            self._gradients = build_gradient_model(self._setup, self._model, self._engine.dtype)
        return self._gradients

    def _gradients_at(self, theta: Vector | None, version: int) -> GradientModel:
        """The model that gradients are taken with, wearing theta; None leaves what it wears."""
        model = self._load_gradients()
        self._engine.rest()
        model.wake()
        if theta is not None and version != self._gradients_version:
            model.set_theta(theta)
            self._gradients_version = version
        return model

    def _logprobs(
        self, samples: Sequence[Sample], theta: Vector | None, version: int, temperature: float, of: Speaker
    ) -> LogProbs:
        self._load_gradients()
        started = time.perf_counter()
        model = self._gradients_at(theta, version)
        rows = model.logprobs(samples, temperature, of)
        return LogProbs(rows, model.tokens_read(samples), time.perf_counter() - started)

    def _roll_out(self, chunk: Chunk, batch: Sequence[Problem]) -> Outcomes:
        if batch[0].reference is not None:
            return self._read_references(chunk, batch)
        if self._prepare is None:
            return self._answer(chunk, batch)
        return games.play_chunk(self._engine, self._scorer, self._prepare, self._setup.config.seed, chunk, batch)

    def _answer(self, chunk: Chunk, batch: Sequence[Problem]) -> Outcomes:
        """Have a chunk's questions answered, handing a prompt's completions to the scorer as soon as they are done."""
        asked = chunk.questions
        seed, keys_of = self._setup.config.seed, sampling_keys(batch)
        requests = [
            Request(slot, batch[place].prompt_ids, sampling_seed(seed, chunk.generation, keys_of[place]))
            for slot, place in asked
        ]
        completions = []
        samples: dict[int, list[Completion]] = {}
        for completion in self._engine.generate(requests, chunk.sampling):
            completions.append(completion)
            group = samples.setdefault(completion.request, [])
            group.append(completion)
            if len(group) == chunk.sampling.samples:
                problem = batch[asked[completion.request][1]]
                keys = [(each.request, each.sample) for each in group]
                self._scorer.submit_group(keys, [rollout_of(problem, each) for each in group])
        generated = time.perf_counter()
        scores = self._scorer.drain()
        waited = time.perf_counter() - generated
        outcomes = [_outcome(each, scores[each.request, each.sample]) for each in completions]
        return Outcomes(outcomes, sum(len(request.prompt_ids) for request in requests), waited)

    def _read_references(self, chunk: Chunk, batch: Sequence[Problem]) -> Outcomes:
        """Score a chunk's members by the log-probabilities of the references, each the sum over its tokens."""
        started = time.perf_counter()
        asked = [(number, slot, batch[place]) for number, (slot, place) in enumerate(chunk.questions)]
        given = [(number, slot, each.prompt_ids, each.reference) for number, slot, each in asked if each.reference]
        requests = [Request(slot, prompt + reference) for _, slot, prompt, reference in given]
        rows = self._engine.logprobs(requests) if requests else []
        outcomes = [
            Outcome(
                number, 0, Score(float(row[len(prompt) - 1 :].sum(dtype=np.float64))), 0, False, False, Transcript("")
            )
            for (number, _, prompt, _), row in zip(given, rows, strict=True)
        ]
        return Outcomes(outcomes, sum(len(request.prompt_ids) for request in requests), time.perf_counter() - started)


def build_engine(setup: WorkerSetup, model: Path) -> PopulationEngine:
    """The engine the config asks for, with as many slots as a chunk has members (and at least the canary's)."""
    config, engine = setup.config, setup.config.engine
    assert engine.kind != "simulated"  # its workers make their own
    cache_bytes = _noise_cache_bytes(setup)
    if engine.kind == "hf":
        from workers.hf_engine import HfEngine

        return HfEngine(model, setup.space, config.seed, cache_bytes, engine.dtype, _device(engine.device))
    from workers.vllm_engine import VllmEngine, VllmOptions

    return VllmEngine(
        model,
        setup.space,
        config.seed,
        slots=max(2, setup.slots),
        cache_bytes=cache_bytes,
        options=VllmOptions(
            dtype=engine.dtype,
            max_model_len=engine.max_model_len,
            max_num_seqs=engine.max_num_seqs,
            kv_cache_bytes=_kv_cache_bytes(engine.kv_cache_gib),
            gpu_memory_utilization=engine.gpu_memory_utilization,
            block_size=engine.block_size,
            tensor_parallel=config.pool.tensor_parallel,
            enforce_eager=engine.enforce_eager,
            rests=setup.gradients,
        ),
    )


def build_gradient_model(setup: WorkerSetup, model: Path, dtype: str) -> GradientModel:
    """The model that gradients are taken with, its weights of the engine's type, on a GPU where there is one."""
    from workers.gradient import GradientModel

    engine = setup.config.engine
    assert engine.kind != "simulated", "there is no model"
    device = engine.device if engine.kind == "hf" else "auto"
    return GradientModel(model, setup.space, dtype, _device(device), _teacher(setup, model))


def _teacher(setup: WorkerSetup, model: Path) -> Teacher | None:
    """This machine's copy of the teacher. Raises ValueError if it is not the driver's."""
    from workers.teacher import find_teacher

    config = teacher_of(setup.config.method)
    if config is None:
        return None
    teacher = find_teacher(config, model)
    if teacher.fingerprint != setup.teacher:
        raise ValueError("method.teacher: it differs on this node from the teacher that the run was started with")
    return teacher


def _noise_cache_bytes(setup: WorkerSetup) -> int:
    """Of each rank of a worker. As configured; or room for every pair of a generation and a chunk drawn ahead, as far
    as this worker's share of an eighth of the machine's memory goes."""
    config = setup.config
    if config.engine.kind == "simulated":  # its noise is made up where it is needed
        return 0
    if config.engine.noise_cache_gib is not None:
        return int(config.engine.noise_cache_gib * GIB) // config.pool.tensor_parallel
    population = config.method.population if config.method.kind == "es" else 0
    wanted = 4 * setup.space.dim * (population + setup.slots)
    neighbours = max(1, (os.cpu_count() or 1) // config.pool.threads)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(wanted, memory // 8 // neighbours // config.pool.tensor_parallel)


def _device(wanted: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def _kv_cache_bytes(gib: float | None) -> int | None:
    import torch

    if gib is None and not torch.cuda.is_available():
        gib = CPU_KV_CACHE_GIB
    return None if gib is None else int(gib * GIB)


def _model_folder(setup: WorkerSetup) -> Path:
    """This machine's copy of the base model. Raises ValueError if it is not the driver's model."""
    from workers.models import fingerprint
    from workers.sources import local_model

    folder = local_model(setup.config)
    if fingerprint(folder) != setup.fingerprint:
        raise ValueError(f"model.source: {folder} on this node differs from the model the run was started with")
    return folder


def _run_canary(engine: PopulationEngine, setup: WorkerSetup, model: Path, with_reference: bool) -> Any:
    from workers import canary

    reference: PopulationEngine | None = None
    if with_reference and setup.config.engine.kind == "vllm":
        from workers.hf_engine import HfEngine

        reference = HfEngine(model, setup.space, setup.config.seed, cache_bytes=0, dtype=engine.dtype)
    return canary.check(engine, setup.space, setup.canary, reference)


def _outcome(completion: Completion, score: Score) -> Outcome:
    return Outcome(
        question=completion.request,
        sample=completion.sample,
        score=score,
        tokens=len(completion.token_ids),
        truncated=completion.finish_reason == "length",
        looped=completion.finish_reason == "repetition",
        transcript=Transcript(completion.text, score.notes, completion),
    )
