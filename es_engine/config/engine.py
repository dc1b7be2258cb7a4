"""The engine axis: what generates the completions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from es_engine.config.base import ConfigModel, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Repeats = Annotated[int, Field(ge=2)]


CPU_KV_CACHE_GIB = 1.0
"""vLLM's own choice of a KV cache fails beside other processes on a CPU, where memory is nobody's alone."""


class VllmEngineConfig(ConfigModel):
    """vLLM: many perturbed adapters in one batch."""

    kind: Literal["vllm"] = Field(default="vllm", description="vLLM with one adapter slot for each member of a chunk.")
    dtype: Dtype = Field(
        default="auto",
        description="Type of the base model's weights; auto is the model's own, or one of 16 bits in place of 32. On a "
        "GPU vLLM has no LoRA in float32.",
    )
    chunk: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="Members evaluated in one engine call: the number of adapter slots. auto times a few sizes before "
        "the run begins, and the run's own config keeps the best.",
    )
    max_model_len: PositiveInt | None = Field(
        default=None, description="Most tokens of prompt and completion; null: the model's."
    )
    max_num_seqs: PositiveInt = Field(default=256, description="Sequences that are generated at the same time.")
    kv_cache_gib: PositiveFloat | None = Field(
        default=None,
        description="Size of the KV cache in GiB; null: on a GPU, what gpu_memory_utilization leaves, on a CPU 1.",
    )
    gpu_memory_utilization: Fraction = Field(default=0.9, description="Fraction of a GPU's memory that vLLM may use.")
    block_size: PositiveInt | None = Field(
        default=None, description="Tokens in a block of the KV cache; null: on a GPU vLLM's choice, on a CPU 32."
    )
    enforce_eager: bool = Field(
        default=False, description="Run without CUDA graphs and compilation: starts sooner, runs slower."
    )
    max_repeats: Repeats | None = Field(
        default=None,
        description="End a completion that says the same 1 to 32 tokens this many times in a row; null lets it go on.",
    )
    noise_cache_gib: NonNegativeFloat | None = Field(
        default=None,
        description="Memory in GiB of a worker for noise, so that an update need not draw it again; null: what a "
        "generation needs, up to a share of an eighth of the machine's memory.",
    )


class HfEngineConfig(ConfigModel):
    """transformers and PEFT: slow, and the reference for every other engine."""

    kind: Literal["hf"] = Field(default="hf", description="transformers and PEFT, the reference engine.")
    dtype: Dtype = Field(default="auto", description="Type of the base model's weights; auto is the model's own.")
    chunk: PositiveInt = Field(default=16, description="Members evaluated in one engine call.")
    max_repeats: Repeats | None = Field(
        default=None,
        description="End a completion that says the same 1 to 32 tokens this many times in a row; null lets it go on.",
    )
    noise_cache_gib: NonNegativeFloat | None = Field(
        default=None,
        description="Memory in GiB of a worker for noise, so that an update need not draw it again; null: what a "
        "generation needs, up to a share of an eighth of the machine's memory.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the model runs; auto prefers a GPU."
    )


class SimulatedEngineConfig(ConfigModel):
    """No model at all: made-up answers that take the time real ones would, to test what drives the workers."""

    kind: Literal["simulated"] = Field(
        default="simulated", description="Made-up answers and noise at a realistic pace; many workers fit on a machine."
    )
    chunk: PositiveInt = Field(default=16, description="Members evaluated in one engine call.")
    answer_tokens: PositiveFloat = Field(
        default=100.0, description="Median length of an answer; task.max_tokens cuts the longest."
    )
    answer_spread: NonNegativeFloat = Field(
        default=0.6, description="Standard deviation of the logarithm of an answer's length."
    )
    step_ms: PositiveFloat = Field(default=20.0, description="Milliseconds of a decoding step, whatever the batch.")
    sequence_ms: NonNegativeFloat = Field(
        default=0.05, description="Milliseconds that each running sequence adds to a step."
    )
    stragglers: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.01, description="Share of engine calls that are slow."
    )
    slowdown: Annotated[float, Field(ge=1)] = Field(
        default=2.0, description="How many times longer a slow engine call takes."
    )
    workers_per_process: PositiveInt = Field(
        default=32, description="Workers that share a process, a thread each; they also die together."
    )


EngineConfig = Annotated[VllmEngineConfig | HfEngineConfig | SimulatedEngineConfig, Field(discriminator="kind")]
