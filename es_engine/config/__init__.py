"""The configuration of a run: pydantic models, one file an axis."""

from es_engine.config.base import ConfigError
from es_engine.config.budget import BudgetConfig
from es_engine.config.comparison import (
    ComparisonConfig,
    SamplesConfig,
    TuningConfig,
    dump_comparison,
    load_comparison,
    on_other_task,
    parse_comparison,
)
from es_engine.config.engine import EngineConfig, HfEngineConfig, SimulatedEngineConfig, VllmEngineConfig
from es_engine.config.evaluation import EvaluationConfig
from es_engine.config.loading import (
    dump_config,
    load_config,
    load_resolved,
    load_task,
    parse_config,
    task_kinds,
)
from es_engine.config.method import (
    DpoMethodConfig,
    EsMethodConfig,
    GrpoMethodConfig,
    OpdMethodConfig,
    SftMethodConfig,
    TeacherConfig,
    teacher_of,
    uses_torch,
)
from es_engine.config.model import ModelConfig, PretrainedModelConfig, TinyModelConfig
from es_engine.config.optimizer import AdamConfig, AdamWConfig, OptimizerConfig, SgdConfig
from es_engine.config.pool import PoolConfig
from es_engine.config.reference import explain
from es_engine.config.reflection import FieldDoc, field_docs
from es_engine.config.root import Config
from es_engine.config.schedule import Schedule
from es_engine.config.space import LoraSpaceConfig
from es_engine.config.stage import StageConfig
from es_engine.config.tasks import (
    ArcTaskConfig,
    ChatTaskConfig,
    ConcisenessTaskConfig,
    CountdownTaskConfig,
    EnvironmentTaskConfig,
    GuessTaskConfig,
    MathTaskConfig,
    MultiTurnTaskConfig,
    ReasoningGymTaskConfig,
    SingleTurnTaskConfig,
    SudokuTaskConfig,
    TaskConfigModel,
)
from es_engine.config.telemetry import TelemetryConfig

__all__ = [
    "AdamConfig",
    "AdamWConfig",
    "ArcTaskConfig",
    "BudgetConfig",
    "ChatTaskConfig",
    "ComparisonConfig",
    "ConcisenessTaskConfig",
    "Config",
    "ConfigError",
    "CountdownTaskConfig",
    "DpoMethodConfig",
    "EngineConfig",
    "EnvironmentTaskConfig",
    "EsMethodConfig",
    "EvaluationConfig",
    "FieldDoc",
    "GrpoMethodConfig",
    "GuessTaskConfig",
    "HfEngineConfig",
    "LoraSpaceConfig",
    "MathTaskConfig",
    "ModelConfig",
    "MultiTurnTaskConfig",
    "OpdMethodConfig",
    "OptimizerConfig",
    "PoolConfig",
    "PretrainedModelConfig",
    "ReasoningGymTaskConfig",
    "SamplesConfig",
    "Schedule",
    "SftMethodConfig",
    "SgdConfig",
    "SimulatedEngineConfig",
    "SingleTurnTaskConfig",
    "StageConfig",
    "SudokuTaskConfig",
    "TaskConfigModel",
    "TeacherConfig",
    "TelemetryConfig",
    "TinyModelConfig",
    "TuningConfig",
    "VllmEngineConfig",
    "dump_comparison",
    "dump_config",
    "explain",
    "field_docs",
    "load_comparison",
    "load_config",
    "load_resolved",
    "load_task",
    "on_other_task",
    "parse_comparison",
    "parse_config",
    "task_kinds",
    "teacher_of",
    "uses_torch",
]
