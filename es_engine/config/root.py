"""A whole configuration: a name, a seed and one choice on every axis."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from es_engine.config.base import ConfigModel, Seed, problem
from es_engine.config.budget import BudgetConfig
from es_engine.config.engine import EngineConfig, SimulatedEngineConfig, VllmEngineConfig
from es_engine.config.evaluation import EvaluationConfig
from es_engine.config.method import DpoMethodConfig, EsMethodConfig, MethodConfig, uses_torch
from es_engine.config.model import ModelConfig, TinyModelConfig
from es_engine.config.optimizer import OptimizerConfig
from es_engine.config.pool import PoolConfig
from es_engine.config.reflection import default_kinds
from es_engine.config.space import LoraSpaceConfig
from es_engine.config.tasks import CountdownTaskConfig, MultiTurnTaskConfig, TaskConfig
from es_engine.config.telemetry import TelemetryConfig

VLLM_MAX_RANK = 512  # vllm.config.lora.MaxLoRARanks
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Config(ConfigModel):
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
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="How the center is measured.")
    telemetry: TelemetryConfig = Field(default=TelemetryConfig(), description="How the run is watched.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_kinds(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kinds = default_kinds(cls)
        return {
            key: {"kind": kinds[key], **value} if key in kinds and isinstance(value, dict) else value
            for key, value in data.items()
        }

    @model_validator(mode="after")
    def _pairs_stay_in_one_chunk(self) -> Self:
        mirrored = isinstance(self.method, EsMethodConfig) and self.method.mirrored
        if mirrored and self.engine.chunk != "auto" and self.engine.chunk % 2:
            raise problem("engine.chunk", self.engine.chunk, "an even number while method.mirrored is true")
        return self

    @model_validator(mode="after")
    def _what_is_learned_from_has_a_model_and_one_turn(self) -> Self:
        method = self.method
        source = f"method.kind is {method.kind}"
        if isinstance(method, EsMethodConfig):
            if method.fitness == "reward":
                return self
            source = f"method.fitness is {method.fitness}"
        if isinstance(self.engine, SimulatedEngineConfig):
            raise problem("engine.kind", self.engine.kind, f"vllm or hf while {source}")
        if isinstance(self.task, MultiTurnTaskConfig):
            raise problem("task.kind", self.task.kind, f"a task of one turn while {source}")
        if self.pool.tensor_parallel > 1 and uses_torch(method):
            raise problem("pool.tensor_parallel", self.pool.tensor_parallel, f"1 while {source}")
        return self

    @model_validator(mode="after")
    def _the_budget_ends(self) -> Self:
        method, others = self.method, self.budget.model_dump(exclude={"tokens"}).values()
        silent = {
            "es": isinstance(method, EsMethodConfig) and method.fitness == "references",
            "sft": True,
            "dpo": isinstance(method, DpoMethodConfig) and method.data is not None,
        }
        if silent.get(method.kind, False) and all(limit is None for limit in others):
            source = f"{method.kind} with fitness references" if method.kind == "es" else method.kind
            accepted = f"another limit beside it, for {source} generates no tokens"
            raise problem("budget.tokens", self.budget.tokens, accepted)
        return self

    @model_validator(mode="after")
    def _the_tiny_model_knows_the_task(self) -> Self:
        if isinstance(self.model, TinyModelConfig) and not isinstance(self.task, CountdownTaskConfig):
            raise problem("task.kind", self.task.kind, "countdown while model.kind is tiny")
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
