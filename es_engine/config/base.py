"""What all configuration models share, and small types used on more than one axis."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Text = Annotated[str, Field(min_length=1)]

PLAIN, MAPPING = "plain value", "mapping"
"""The tags of a field that holds either."""


class ConfigError(ValueError):
    """A configuration that cannot be used: one sentence a line, each naming the field or the file."""


class ConfigModel(BaseModel):
    """A mapping of the configuration: immutable, no unknown keys, no conversions (true is no number, "8" neither).

    A validator of a whole model raises ValueError with a sentence that begins with the field it is about; the path of
    the model is put before it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)

    @property
    def idle(self) -> tuple[str, ...]:
        """Its own fields that do nothing, as the others are."""
        return ()

    @property
    def as_used(self) -> Self:
        """The same with idle fields as by default: equal for those that do the same, as far as that can be seen."""
        return self.model_copy(update={name: type(self).model_fields[name].default for name in self.idle})


def plain_or_mapping(value: object) -> str:
    """The tag of a value of such a field."""
    return MAPPING if isinstance(value, Mapping | BaseModel) else PLAIN


def problem(field: str, given: object, accepted: str) -> ValueError:
    """The error of a validator: the sentence that names the field, what was given and what is accepted."""
    return ValueError(f"{field}: got {in_yaml(given)}, accepted is {accepted}")


def in_yaml(value: object) -> str:
    """A value as one would write it in the YAML file, on one line, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
