"""A whole configuration: a name, a seed and one choice on every axis."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from es_engine.config.base import Seed, problem
from es_engine.config.budget import BudgetConfig
from es_engine.config.engine import EngineConfig, SimulatedEngineConfig, VllmEngineConfig
from es_engine.config.evaluation import EvaluationConfig
from es_engine.config.method import DpoMethodConfig, EsMethodConfig, MethodConfig, uses_torch
from es_engine.config.model import ModelConfig, TinyModelConfig
from es_engine.config.optimizer import OptimizerConfig
from es_engine.config.pool import PoolConfig
from es_engine.config.space import LoraSpaceConfig
from es_engine.config.stage import AxesConfig, StageConfig
from es_engine.config.tasks import LessonsTaskConfig, MultiTurnTaskConfig, TaskConfig
from es_engine.config.telemetry import TelemetryConfig

VLLM_MAX_RANK = 512  # vllm.config.lora.MaxLoRARanks
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Config(AxesConfig):
    """Everything a run depends on."""

    name: Name = Field(description="Name of the run and, under runs/, of its folder.")
    seed: Seed = Field(default=0, description="Keys the noise, the prompts and the sampling of the run.")
    model: ModelConfig = Field(description="Which base model is post-trained.")
    space: LoraSpaceConfig = Field(default=LoraSpaceConfig(), description="What theta is.")
    method: MethodConfig = Field(default=EsMethodConfig(), description="How a direction for theta is found.")
    optimizer: OptimizerConfig = Field(description="How theta steps along the direction.")
    task: TaskConfig = Field(description="The problems and how answers to them are scored.")
    pool: PoolConfig = Field(default=PoolConfig(), description="The workers and where they run.")
    engine: EngineConfig = Field(default=VllmEngineConfig(), description="What generates the completions.")
    budget: BudgetConfig = Field(description="When the run ends.")
    stages: Annotated[tuple[StageConfig, ...], Field(strict=False)] = Field(
        default=(),
        description="Methods that follow one another on the same theta, each with its optimizer and budget; what one "
        "leaves out is that of the run, which needs none that all stages have.",
    )
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="How the center is measured.")
    telemetry: TelemetryConfig = Field(default=TelemetryConfig(), description="How the run is watched.")

    _place: str = PrivateAttr(default="")

    @property
    def place(self) -> str:
        """What leads to the method, the optimizer and the budget in what the user wrote, such as `stages.0.`."""
        return self._place

    @property
    def by_stage(self) -> tuple[Config, ...]:
        """The stages, each as the config of a run that has none; of a run without stages it is the config itself."""
        return tuple(map(self._stage, range(len(self.stages)))) or (self,)

    def stage_after(self, begun: int) -> Config:
        """The stage that is under way where so many have begun; the first before that. Raises ValueError where there
        are fewer."""
        if begun > len(self.stages):
            raise ValueError(f"stages: {begun} of them have begun, and the config has {len(self.stages)}")
        return self.by_stage[max(0, begun - 1)]

    def _stage(self, number: int) -> Config:
        stage = self.stages[number]
        config = self.model_copy(
            update={"stages": (), "method": stage.method, "optimizer": stage.optimizer, "budget": stage.budget}
        )
        config._place = f"stages.{number}."
        return config

    @property
    def units(self) -> Literal["weight", "raw"]:
        """What theta is counted in."""
        return self.space.units or ("weight" if self.method.kind == "es" else "raw")

    @property
    def lessons(self) -> LessonsTaskConfig:
        """The task that the tiny model is taught."""
        assert isinstance(self.model, TinyModelConfig)
        taught = self.model.lessons or self.task
        assert isinstance(taught, LessonsTaskConfig)
        return taught

    @model_validator(mode="after")
    def _every_stage_is_possible(self) -> Self:
        for config in self.by_stage:
            _check_pairs(config)
            _check_gradients(config)
            _check_budget(config)
        return self

    @model_validator(mode="after")
    def _the_tiny_model_knows_the_task(self) -> Self:
        taught = isinstance(self.model, TinyModelConfig) and self.model.lessons is None
        if taught and not isinstance(self.task, LessonsTaskConfig):
            raise problem("task.kind", self.task.kind, "countdown or sudoku while model.kind is tiny")
        return self

    @model_validator(mode="after")
    def _made_up_answers_play_no_games(self) -> Self:
        if isinstance(self.engine, SimulatedEngineConfig) and isinstance(self.task, MultiTurnTaskConfig):
            raise problem("task.kind", self.task.kind, "a task of one turn while engine.kind is simulated")
        return self

    @model_validator(mode="after")
    def _engine_can_run_it(self) -> Self:
        if not isinstance(self.engine, VllmEngineConfig):
            if self.pool.tensor_parallel > 1:
                accepted = f"1 while engine.kind is {self.engine.kind}"
                raise problem("pool.tensor_parallel", self.pool.tensor_parallel, accepted)
            return self
        if self.space.rank > VLLM_MAX_RANK:
            raise problem("space.rank", self.space.rank, f"at most {VLLM_MAX_RANK} while engine.kind is vllm")
        wanted, length = self.task.max_tokens, self.engine.max_model_len
        if wanted is not None and length is not None and wanted >= length:
            raise problem("task.max_tokens", wanted, f"less than engine.max_model_len ({length})")
        return self


def _check_pairs(config: Config) -> None:
    """Raises ValueError where a mirrored pair would not stay in one chunk."""
    mirrored = isinstance(config.method, EsMethodConfig) and config.method.mirrored
    if mirrored and config.engine.chunk != "auto" and config.engine.chunk % 2:
        raise problem(
            "engine.chunk", config.engine.chunk, f"an even number while {config.place}method.mirrored is true"
        )


def _check_gradients(config: Config) -> None:
    """Raises ValueError where a method learns from a model's own words without a model, in games, or across devices."""
    method = config.method
    source = f"{config.place}method.kind is {method.kind}"
    if isinstance(method, EsMethodConfig):
        if method.fitness == "reward":
            return
        source = f"{config.place}method.fitness is {method.fitness}"
    if isinstance(config.engine, SimulatedEngineConfig):
        raise problem("engine.kind", config.engine.kind, f"vllm or hf while {source}")
    if isinstance(config.task, MultiTurnTaskConfig):
        raise problem("task.kind", config.task.kind, f"a task of one turn while {source}")
    if config.pool.tensor_parallel > 1 and uses_torch(method):
        raise problem("pool.tensor_parallel", config.pool.tensor_parallel, f"1 while {source}")


def generates(method: MethodConfig) -> bool:
    """Does a method have the model say anything?"""
    silent = {
        "es": isinstance(method, EsMethodConfig) and method.fitness == "references",
        "sft": True,
        "dpo": isinstance(method, DpoMethodConfig) and method.data is not None,
    }
    return not silent.get(method.kind, False)


def _check_budget(config: Config) -> None:
    """Raises ValueError where a method spends nothing of what its budget limits."""
    method, others = config.method, config.budget.model_dump(exclude={"tokens"}).values()
    if not generates(method) and all(limit is None for limit in others):
        source = f"{method.kind} with fitness references" if method.kind == "es" else method.kind
        accepted = f"another limit beside it, for {source} generates no tokens"
        raise problem(f"{config.place}budget.tokens", config.budget.tokens, accepted)
