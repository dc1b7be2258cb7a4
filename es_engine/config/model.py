"""The model axis: which base model is post-trained."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from es_engine.config.base import ConfigModel, PositiveFloat, PositiveInt, Seed, Text, problem
from es_engine.config.tasks import LessonsTaskConfig


class PretrainedModelConfig(ConfigModel):
    """A model that exists."""

    kind: Literal["pretrained"] = Field(
        default="pretrained", description="A pretrained model from a hub, a disk or a package."
    )
    source: Text = Field(
        description="A hub id, a local folder, a .gguf file, or package:import_name/file.gguf for a GGUF inside an "
        "installed Python package."
    )
    revision: Text | None = Field(default=None, description="The hub's branch, tag or commit; null is its main branch.")


class TinyModelConfig(ConfigModel):
    """The fast test bed: a character-level Llama, trained on the spot on worked solutions."""

    kind: Literal["tiny"] = Field(
        default="tiny", description="A small character-level Llama, trained before the run starts."
    )
    source: Literal["tiny"] = Field(default="tiny", description="The name the model goes by; it comes from nowhere.")
    lessons: Annotated[LessonsTaskConfig, Field(discriminator="kind")] | None = Field(
        default=None, description="The task it is taught, countdown or sudoku; null: that of the run."
    )
    steps: PositiveInt = Field(default=1000, description="Training steps.")
    hidden: PositiveInt = Field(default=128, description="Width of the hidden state.")
    layers: PositiveInt = Field(default=4, description="Number of transformer layers.")
    heads: PositiveInt = Field(default=4, description="Attention heads; hidden / heads must be 32 or 64.")
    batch: PositiveInt = Field(default=64, description="Worked solutions in a training step.")
    lr: PositiveFloat = Field(default=3e-3, description="Peak learning rate of AdamW.")
    seed: Seed = Field(default=0, description="Keys the initial weights and the training data.")

    @model_validator(mode="after")
    def _head_dim_runs_in_vllm(self) -> Self:
        # vLLM's CPU attention starts with other head sizes and then fails.
        if self.hidden not in (32 * self.heads, 64 * self.heads):
            raise problem("heads", self.heads, f"a number for which hidden ({self.hidden}) / heads is 32 or 64")
        return self


ModelConfig = Annotated[PretrainedModelConfig | TinyModelConfig, Field(discriminator="kind")]
