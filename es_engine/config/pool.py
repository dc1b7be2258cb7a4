"""The pool axis: the workers and where they run."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from es_engine.config.base import (
    MAPPING,
    PLAIN,
    ConfigModel,
    PositiveFloat,
    PositiveInt,
    Text,
    plain_or_mapping,
    problem,
)

_ADDRESS = re.compile(r"auto|[^\s/@]+:\d+")


class WorkerRangeConfig(ConfigModel):
    """As many workers as there is room for, within bounds."""

    min: PositiveInt = Field(default=1, description="Fewest workers that the run goes on with.")
    max: PositiveInt = Field(description="Most workers that the run uses.")

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.max < self.min:
            raise problem("max", self.max, f"at least min ({self.min})")
        return self


class PoolConfig(ConfigModel):
    """Ray actors, each with one engine and one scorer."""

    workers: Annotated[
        Annotated[PositiveInt | Literal["auto"], Tag(PLAIN)] | Annotated[WorkerRangeConfig, Tag(MAPPING)],
        Discriminator(plain_or_mapping),
    ] = Field(
        default="auto",
        description="Number of workers; auto fills the cluster, as it grows and shrinks, and so do min and max, within "
        "them; an autoscaler is asked for max.",
    )
    address: Text | None = Field(
        default=None,
        description="The Ray cluster to join: auto or the host:port of its head; null starts a local one.",
    )
    threads: PositiveInt = Field(default=1, description="CPU threads, each on a core of its own, of a worker.")
    tensor_parallel: PositiveInt = Field(default=1, description="Devices that share one worker's model.")
    chunk_timeout_s: PositiveFloat = Field(
        default=1800.0, description="Seconds after which a chunk goes to another worker."
    )
    straggler_s: PositiveFloat = Field(
        default=60.0, description="Seconds for which the other pairs are waited for once method.min_pairs are there."
    )
    node_timeout_s: PositiveFloat = Field(
        default=600.0, description="Seconds for which nodes are waited for while there is no room for enough workers."
    )
    start_timeout_s: PositiveFloat = Field(default=900.0, description="Seconds a worker may take to start.")
    retries: int = Field(default=3, ge=0, description="Workers that one chunk may cost before the run stops.")

    @model_validator(mode="after")
    def _address_is_one(self) -> Self:
        if self.address is not None and not _ADDRESS.fullmatch(self.address):
            raise problem("address", self.address, "null, auto or host:port")
        return self
