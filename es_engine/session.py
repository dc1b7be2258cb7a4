"""A config brought to life: its model, space, task, method and pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    LoraSpaceConfig,
    OpdMethodConfig,
    SftMethodConfig,
    teacher_of,
    uses_torch,
)
from es_engine.config.base import in_yaml, problem
from es_engine.config.method import GradientMethodConfig
from es_engine.data import Fingerprints, data_fingerprints, refuse_changed, verifier_fingerprints
from es_engine.methods import chunk_size, population
from es_engine.methods.base import Method
from es_engine.methods.dpo import Dpo, pairs
from es_engine.methods.es import EvolutionStrategies
from es_engine.methods.fitness import Fitness, ReferenceFitness, RewardFitness, TeacherFitness
from es_engine.methods.grpo import Grpo
from es_engine.methods.opd import Opd
from es_engine.methods.sft import Sft, demonstrations
from es_engine.methods.updates import Updates
from es_engine.spaces.base import Matrix
from es_engine.spaces.lora import LoraSpace
from rewards.base import SingleTurnTask, Split, Task
from rewards.composition import without_gpu
from rewards.trees import flat
from workers.actor import WorkerSetup
from workers.chunks import Problem
from workers.completions import Completions, load_completions
from workers.engine import Sampling
from workers.models import fingerprint, linear_matrices, multiplying_parameters
from workers.pool import Pool
from workers.prompts import engine_context, load_preparer, surely_fits
from workers.scoring import open_scorer
from workers.sources import local_model
from workers.teacher import Teacher, find_teacher, fingerprint_of

CANARY_PROMPTS = 4
KEPT_PROBLEMS = 4096


class LocalModel:
    """A base model's folder and what is known of it, each thing found out once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._matrices: dict[object, list[Matrix]] = {}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what it computes."""
        return fingerprint(self.folder)

    @cached_property
    def parameters(self) -> int:
        """The parameters that multiply."""
        return multiplying_parameters(self.folder)

    def matrices(self, space: LoraSpaceConfig) -> list[Matrix]:
        """The matrices that a space adapts. Raises ValueError for targets that the model does not have."""
        if space.targets not in self._matrices:
            self._matrices[space.targets] = linear_matrices(self.folder, space.targets)
        return self._matrices[space.targets]


@dataclass(frozen=True)
class Materials:
    """Everything about a run that needs no workers."""

    config: Config
    task: Task
    base: LocalModel
    space: LoraSpace
    method: Method
    teacher: Teacher | None
    data: Fingerprints

    @property
    def model(self) -> Path:
        """The folder of the base model."""
        return self.base.folder

    @property
    def model_fingerprint(self) -> str:
        """A hash of the base model."""
        return self.base.fingerprint

    @property
    def inputs(self) -> Fingerprints:
        """Hashes of all that was found outside, by its name in the config."""
        found = self.data | verifier_fingerprints(self.config) | {"the base model": self.model_fingerprint}
        taught, init = teacher_of(self.config.method), self.config.space.init
        if taught is not None and self.teacher is not None:
            found[f"the teacher {' with '.join(filter(None, (taught.model, taught.adapter)))}"] = (
                self.teacher.fingerprint
            )
        if init is not None:
            found[init] = fingerprint_of(None, Path(init))
        return found

    def problems(self, split: Split, numbers: Sequence[int]) -> list[Problem]:
        """Problems of a split by number, ready for the model; the last few thousand stay tokenised."""
        return [self._problem(split, number) for number in numbers]

    def check_prompts(self) -> None:
        """Raises ValueError for a training prompt from a file that leaves no room to answer, which would end the run
        when its turn comes."""
        room = engine_context(self.config, self.model) - self.task.max_tokens
        for number in range(self.task.rows or 0):
            if not surely_fits(self.task.example("train", number), room):
                self.problems("train", [number])

    @cached_property
    def _problem(self) -> Callable[[Split, int], Problem]:
        prepare = load_preparer(self.config, self.model, self.task.max_tokens)

        @lru_cache(KEPT_PROBLEMS)
        def problem(split: Split, number: int) -> Problem:
            return prepare(self.task.example(split, number))

        return problem


@contextmanager
def errors_in_place(config: Config) -> Iterator[None]:
    """Inside, what is wrong with the method of a stage is told with the stage's place in the config."""
    try:
        yield
    except ValueError as error:
        if not config.place or not str(error).startswith("method."):
            raise
        raise ValueError(f"{config.place}{error}") from error


def gather(config: Config, base: LocalModel | None = None) -> Materials:
    """Find the model and build space, task and method; `base` is a model that may be the config's and is known already.

    Raises ValueError for whatever does not exist or fit.
    """
    with errors_in_place(config):
        return _gather(config, base)


def _gather(config: Config, base: LocalModel | None) -> Materials:
    data = data_fingerprints(config)  # before it is read, so that a change in between is refused later, not missed
    task = config.task.build()
    model = local_model(config)
    if base is None or base.folder != model:
        base = LocalModel(model)
    space = LoraSpace(
        base.matrices(config.space),
        rank=config.space.rank,
        alpha=config.space.alpha,
        train=config.space.train,
        units=config.units,
        seed=config.space.seed,
        init=Path(config.space.init) if config.space.init else None,
    )
    taught = teacher_of(config.method)
    teacher = None if taught is None else find_teacher(taught, model)
    return Materials(config, task, base, space, _build_method(config, task, base, space, teacher), teacher, data)


def _build_method(config: Config, task: Task, base: LocalModel, space: LoraSpace, teacher: Teacher | None) -> Method:
    method = config.method
    if isinstance(method, EsMethodConfig):
        chunk = config.engine.chunk
        if chunk == "auto":  # until it is settled
            chunk = chunk_size.most_slots(method.population, space)
        fitness = _build_fitness(config, method, task, base.folder, teacher)
        return EvolutionStrategies(method, chunk=chunk, sampling=_sampling_of(config, method, task), fitness=fitness)
    updates = Updates(method, space.dim, base.parameters, base.parameters + space.adapter_parameters)
    if isinstance(method, GrpoMethodConfig):
        return Grpo(method, _sampling_of(config, method, task), updates)
    if isinstance(method, OpdMethodConfig):
        assert teacher is not None
        sampled = sampling(config, task, method.samples, method.temperature)
        return Opd(method, sampled, updates, teacher.parameters)
    completions = _load_completions(base.folder, task, method.data)
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
        if config.engine.kind == "vllm":  # which reads a text only where there is room for one more token
            context = min(completions.context, config.engine.max_model_len or completions.context)
            completions = replace(completions, context=context - 1)
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


@dataclass(frozen=True, slots=True)
class Needs:
    """What runs need of the engines of their pool: slots for so many adapters, whether they want a model in torch, and
    whether they learn by its gradients."""

    slots: int
    gradients: bool
    learns: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(max(self.slots, other.slots), self.gradients or other.gradients, self.learns or other.learns)


def needs(materials: Materials) -> Needs:
    """What a run needs of the engines of its pool."""
    method = materials.config.method
    return Needs(materials.method.slots, uses_torch(method), isinstance(method, GradientMethodConfig))


def worker_setup(materials: Materials, needs: Needs) -> WorkerSetup:
    """What workers of a run are made from, in a pool of which so much is needed."""
    canary = materials.problems("heldout", range(CANARY_PROMPTS))
    return WorkerSetup(
        materials.config,
        materials.space,
        materials.model_fingerprint,
        tuple(problem.prompt_ids for problem in canary),
        slots=needs.slots,
        parameters=materials.base.parameters,
        teacher=materials.teacher.fingerprint if materials.teacher else None,
        gradients=needs.gradients,
        learns=needs.learns,
    )


class Session:
    """Materials with a pool of workers, which can be turned to other runs; a context manager."""

    def __init__(
        self,
        config: Config,
        notify: Callable[[str], None],
        others: Sequence[Config] = (),
        *,
        gradients: bool = False,
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        """Begins with a run, on a pool that can also serve `others`; with `gradients` it can hold a model in torch even
        if none of them asks for one. `inputs` are hashes of what all is made of, as far as it must be the same.

        Raises ValueError for anything about the configs that can only be seen with the model and the cluster at hand,
        and where the others differ in what a pool cannot change (see `turn_to`).
        """
        self.inputs = dict(inputs or {})
        self.materials = self._unchanged(gather(config))
        self._needs = needs(self.materials) | Needs(slots=0, gradients=gradients)
        _try_verifier(self.materials)
        for other in others:
            found = self._gathered(other)
            self._needs |= needs(found)
            if other.task != config.task:
                _try_verifier(found)
        self.pool = Pool(worker_setup(self.materials, self._needs), notify)

    def turn_to(self, config: Config) -> None:
        """Have the pool serve another run from now on, on the engines that it has.

        Raises ValueError, naming the field, where the run wants another model, pool or engine (but for its chunk), a
        space of another rank or other targets, or more of the engines than the configs that the session was made for;
        and where what it is made of has changed since the session began.
        """
        found = self._gathered(config)
        wanted = needs(found)
        if wanted.slots > self._needs.slots:
            raise problem("engine.chunk", wanted.slots, f"at most {self._needs.slots}, the slots that the pool has")
        if wanted.gradients > self._needs.gradients:
            raise problem("method.kind", config.method.kind, "es, for which alone the pool was started")
        if config.task != self.materials.config.task:
            _try_verifier(found)
        self.pool.assign(worker_setup(found, self._needs))
        self.materials = found

    def _gathered(self, config: Config) -> Materials:
        _check_pool(config, self.materials.config)
        found = gather(config, self.materials.base)
        if found.base is not self.materials.base:
            accepted = "a model that does not depend on the task, for runs on one pool share it"
            raise problem("model.kind", config.model.kind, accepted)
        return self._unchanged(found)

    def _unchanged(self, found: Materials) -> Materials:
        """The materials, of whose inputs the session knows from now on what they were. Raises ValueError if it knows
        one as another."""
        now = found.inputs
        refuse_changed(self.inputs, now)
        self.inputs |= now
        return found

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


def _try_verifier(materials: Materials) -> None:
    """Raises ValueError for a verifier that cannot be loaded, which should fail here, not on a worker."""
    open_scorer(materials.config.task, without_gpu(materials.task.verifier)).close()


def _check_pool(config: Config, other: Config) -> None:
    """Raises ValueError, naming the field, where two configs differ in what runs on one pool share."""
    mine, theirs = _shared(config), _shared(other)
    for field in sorted(mine.keys() | theirs.keys(), key=lambda field: (not field.endswith(".kind"), field)):
        if mine.get(field) != theirs.get(field):
            accepted = f"{in_yaml(theirs.get(field))}, for runs on one pool share it"
            raise problem(field, mine.get(field), accepted)


def _shared(config: Config) -> dict[str, object]:
    fields = dict(flat(config.model_dump(include={"model", "pool", "engine"}, exclude={"model": {"lessons"}})))
    del fields["engine.chunk"]
    return fields | {"space.rank": config.space.rank, "space.targets": config.space.targets}
