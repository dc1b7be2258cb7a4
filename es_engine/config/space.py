"""The space axis: what theta is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from es_engine.config.base import ConfigModel, PositiveFloat, PositiveInt, Seed, Text


class LoraSpaceConfig(ConfigModel):
    """theta is the trained factors of a LoRA: DeltaW = (alpha/r) B A (Hu et al., arXiv 2106.09685)."""

    kind: Literal["lora"] = Field(default="lora", description="Low-rank adapters on the linear layers.")
    rank: PositiveInt = Field(default=8, description="Rank r of every adapted matrix.")
    alpha: PositiveFloat = Field(default=32.0, description="DeltaW = (alpha/r) B A.")
    train: Literal["B", "A", "AB"] = Field(
        default="B", description="The factors theta is made of; a factor that is not trained stays as initialised."
    )
    targets: Literal["all-linear"] | Annotated[tuple[Text, ...], Field(strict=False, min_length=1)] = Field(
        default="all-linear", description="The adapted modules, by the ends of their names such as q_proj."
    )
    units: Literal["weight", "raw"] | None = Field(
        default=None,
        description="In weight units sigma is a fraction of each matrix's own RMS; raw is PEFT's own numbers, which "
        "the usual learning rates of gradient methods are for; null: weight for es, else raw.",
    )
    seed: Seed = Field(default=0, description="Keys the random factor that is not trained.")
    init: Text | None = Field(
        default=None,
        description="Folder of a plain PEFT LoRA to start from, of this rank on these targets; null: the base model.",
    )
