"""A config brought to life: its model, space, task, method and pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import cast

from es_engine.config import (
    Config,
    DpoMethodConfig,
    EsMethodConfig,
    GrpoMethodConfig,
    OpdMethodConfig,
    SftMethodConfig,
    teacher_of,
)
from es_engine.methods import chunk_size, population
from es_engine.methods.base import Method
from es_engine.methods.dpo import Dpo, pairs
from es_engine.methods.es import EvolutionStrategies
from es_engine.methods.fitness import Fitness, ReferenceFitness, RewardFitness, TeacherFitness
from es_engine.methods.grpo import Grpo
from es_engine.methods.opd import Opd
from es_engine.methods.sft import Sft, demonstrations
from es_engine.methods.updates import Updates
from es_engine.spaces.lora import LoraSpace
from rewards.base import SingleTurnTask, Split, Task
from workers.actor import WorkerSetup
from workers.chunks import Problem
from workers.completions import Completions, load_completions
from workers.engine import Sampling
from workers.models import fingerprint, linear_matrices, multiplying_parameters
from workers.pool import Pool
from workers.prompts import load_preparer
from workers.scoring import open_scorer
from workers.sources import local_model
from workers.teacher import Teacher, find_teacher

CANARY_PROMPTS = 4
KEPT_PROBLEMS = 4096


@dataclass(frozen=True)
class Materials:
    """Everything about a run that needs no workers."""

    config: Config
    task: Task
    model: Path
    space: LoraSpace
    method: Method
    teacher: Teacher | None

    @cached_property
    def model_fingerprint(self) -> str:
        """A hash of the base model."""
        return fingerprint(self.model)

    def problems(self, split: Split, numbers: Sequence[int]) -> list[Problem]:
        """Problems of a split by number, ready for the model; the last few thousand stay tokenised."""
        return [self._problem(split, number) for number in numbers]

    @cached_property
    def _problem(self) -> Callable[[Split, int], Problem]:
        prepare = load_preparer(self.config, self.model, self.task.max_tokens)

        @lru_cache(KEPT_PROBLEMS)
        def problem(split: Split, number: int) -> Problem:
            return prepare(self.task.example(split, number))

        return problem


def gather(config: Config) -> Materials:
    """Find the model and build space, task and method. Raises ValueError for whatever does not exist or fit."""
    task = config.task.build()
    model = local_model(config)
    space = LoraSpace(
        linear_matrices(model, config.space.targets),
        rank=config.space.rank,
        alpha=config.space.alpha,
        train=config.space.train,
        units=config.space.units or ("weight" if config.method.kind == "es" else "raw"),
        seed=config.space.seed,
        init=Path(config.space.init) if config.space.init else None,
    )
    taught = teacher_of(config.method)
    teacher = None if taught is None else find_teacher(taught, model)
    return Materials(config, task, model, space, _build_method(config, task, model, space, teacher), teacher)


def _build_method(config: Config, task: Task, model: Path, space: LoraSpace, teacher: Teacher | None) -> Method:
    method = config.method
    if isinstance(method, EsMethodConfig):
        chunk = config.engine.chunk
        if chunk == "auto":  # until it is settled
            chunk = chunk_size.most_slots(method.population, space)
        fitness = _build_fitness(config, method, task, model, teacher)
        return EvolutionStrategies(method, chunk=chunk, sampling=_sampling_of(config, method, task), fitness=fitness)
    parameters = multiplying_parameters(model)
    updates = Updates(method, space.dim, parameters, parameters + space.adapter_parameters)
    if isinstance(method, GrpoMethodConfig):
        return Grpo(method, _sampling_of(config, method, task), updates)
    if isinstance(method, OpdMethodConfig):
        assert teacher is not None
        sampled = sampling(config, task, method.samples, method.temperature)
        return Opd(method, sampled, updates, teacher.parameters)
    completions = _load_completions(model, task, method.data)
    if isinstance(method, SftMethodConfig):
        source = demonstrations(method.data, method.batch, config.seed, cast(SingleTurnTask, task), completions)
        return Sft(method, source, completions, updates)
    return Dpo(method, pairs(method, config.seed, _sampling_of(config, method, task), completions), updates)


def _build_fitness(config: Config, method: EsMethodConfig, task: Task, model: Path, teacher: Teacher | None) -> Fitness:
    if method.fitness == "teacher":
        assert teacher is not None
        return TeacherFitness(teacher.parameters)
    if method.fitness == "references":
        completions = _load_completions(model, task, method.data)
        limit = getattr(config.engine, "max_model_len", None)
        if limit is not None:  # vLLM reads a text only where there is room for one more token
            completions = replace(completions, context=min(completions.context, limit) - 1)
        size = population.batch_size(method)
        source = demonstrations(method.data, size, config.seed, cast(SingleTurnTask, task), completions)
        return ReferenceFitness(source, completions)
    return RewardFitness()


def _load_completions(model: Path, task: Task, data: str | None) -> Completions:
    return load_completions(model, task.stop, "task" if data is None else "method.data")


def _sampling_of(config: Config, method: EsMethodConfig | GrpoMethodConfig | DpoMethodConfig, task: Task) -> Sampling:
    return sampling(config, task, method.samples, method.temperature, method.top_p)


def sampling(config: Config, task: Task, samples: int, temperature: float, top_p: float = 1.0) -> Sampling:
    """How completions are drawn for a task: what the task and the engine's config say of their end, and this."""
    repeats = getattr(config.engine, "max_repeats", None)
    return Sampling(task.max_tokens, samples, temperature, top_p, task.stop, repeats)


class Session:
    """Materials with a pool of workers; a context manager."""

    def __init__(self, config: Config, notify: Callable[[str], None]) -> None:
        """Raises ValueError for anything about the config that can only be seen with the model and the cluster at
        hand."""
        self.materials = gather(config)
        canary = self.materials.problems("heldout", range(CANARY_PROMPTS))
        # A verifier that cannot be loaded should fail here, not on a worker.
        open_scorer(config.task, self.materials.task.verifier).close()
        setup = WorkerSetup(
            config,
            self.materials.space,
            self.materials.model_fingerprint,
            tuple(problem.prompt_ids for problem in canary),
            slots=self.materials.method.slots,
            parameters=multiplying_parameters(self.materials.model),
            teacher=self.materials.teacher.fingerprint if self.materials.teacher else None,
        )
        self.pool = Pool(setup, notify)

    def settle_chunk(self) -> None:
        """Replace `engine.chunk: auto`, in the config too, by the size that this pool is fastest with."""
        found = self.materials
        config, method = found.config, found.method
        if config.engine.chunk != "auto" or not isinstance(method, EvolutionStrategies):
            return
        sigma = method.config.sigma if method.config.sigma != "auto" else min(method.config.probe_sigmas)
        size = chunk_size.find(
            method,
            self.pool,
            self.pool.put(found.space.start()),
            method.fitness.batch(range(method.batch_size), found.problems),
            sigma=sigma,
            slots=method.chunk,
            workers=len(self.pool.workers),
        )
        settled = config.model_copy(update={"engine": config.engine.model_copy(update={"chunk": size})})
        self.materials = replace(found, config=settled, method=method.with_chunk(size))

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.close()
