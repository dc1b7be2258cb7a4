"""The optimizer axis: how theta steps along the method's direction."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from es_engine.config.base import ConfigModel, NonNegativeFloat, PositiveFloat, problem
from es_engine.config.schedule import Schedule

DecayTo = Literal["zero", "start"]
Momentum = Annotated[float, Field(ge=0, lt=1)]
LearningRate = Annotated[PositiveFloat, Field(le=1e30)]  # past which a step of torch's may not fit into float32
Betas = Annotated[tuple[Momentum, Momentum], Field(strict=False)]


class SgdConfig(ConfigModel):
    """torch.optim.SGD."""

    kind: Literal["sgd"] = Field(default="sgd", description="Stochastic gradient descent with momentum.")
    lr: LearningRate = Field(description="Learning rate.")
    lr_schedule: Schedule = Field(default=Schedule(), description="How the learning rate changes over the budget.")
    momentum: Momentum = Field(default=0.0, description="Momentum.")
    nesterov: bool = Field(default=False, description="Nesterov's form of the momentum.")
    weight_decay: NonNegativeFloat = Field(
        default=0.0, description="Each step moves theta by lr*weight_decay of its distance."
    )
    decay_to: DecayTo = Field(
        default="zero", description="Where the decay leads: zero (the base model) or the start of the run."
    )

    @property
    def idle(self) -> tuple[str, ...]:
        return ("decay_to",) if self.weight_decay == 0 else ()

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise problem("momentum", self.momentum, "a number above 0 while nesterov is true")
        return self


class AdamConfig(ConfigModel):
    """torch.optim.Adam (Kingma and Ba, arXiv 1412.6980)."""

    kind: Literal["adam"] = Field(default="adam", description="Adam.")
    lr: LearningRate = Field(description="Learning rate.")
    lr_schedule: Schedule = Field(default=Schedule(), description="How the learning rate changes over the budget.")
    betas: Betas = Field(
        default=(0.9, 0.999), description="Decay of the running means of the direction and of its square."
    )
    eps: PositiveFloat = Field(default=1e-8, description="Added to the denominator.")


class AdamWConfig(ConfigModel):
    """torch.optim.AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    kind: Literal["adamw"] = Field(default="adamw", description="Adam with decoupled weight decay.")
    lr: LearningRate = Field(description="Learning rate.")
    lr_schedule: Schedule = Field(default=Schedule(), description="How the learning rate changes over the budget.")
    betas: Betas = Field(
        default=(0.9, 0.999), description="Decay of the running means of the direction and of its square."
    )
    eps: PositiveFloat = Field(default=1e-8, description="Added to the denominator.")
    weight_decay: NonNegativeFloat = Field(
        default=0.01, description="Each step moves theta by lr*weight_decay of its distance."
    )
    decay_to: DecayTo = Field(
        default="zero", description="Where the decay leads: zero (the base model) or the start of the run."
    )

    @property
    def idle(self) -> tuple[str, ...]:
        return ("decay_to",) if self.weight_decay == 0 else ()


OptimizerConfig = Annotated[SgdConfig | AdamConfig | AdamWConfig, Field(discriminator="kind")]
