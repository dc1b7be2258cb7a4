"""What the lines of a ledger, of evaluations and of samples must hold for those that read them: they may be anybody's.

Only what is read is looked at, and a kind of line that is not known here is nobody's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

LARGEST = 1e300
"""Of a number, so that a sum of many is one too."""
DEEPEST = 50

Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=-1e12, le=1e12)]  # rounded, no time may be a little less than none
Count = Annotated[int, Field(ge=0, le=10**30)]
Figures = dict[str, Number | None]
Failures = dict[str, dict[str, Count]]


def check(line: Mapping[str, Any]) -> None:
    """Raises ValueError, with the place in the line and what is wrong there, for a line that cannot be used."""
    if (model := _KINDS.get(line["kind"])) is not None:
        _check(line, model)


def check_sample(row: Any) -> None:
    """The same for a completion of an evaluation."""
    _check(row, _Sample)


def _check(line: Any, model: type[_Line]) -> None:
    try:
        model.model_validate(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "line"
        raise ValueError(f"{place}: {first['msg']}") from None


def _rectangular(rows: Sequence[Sequence[float | None]]) -> Sequence[Sequence[float | None]]:
    if len({len(row) for row in rows}) > 1:
        raise ValueError("its rows are of different lengths")
    return rows


def _shallow(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree, if those that go through it, which call themselves at each level, can reach its leaves."""
    level: list[Any] = [tree]
    for _ in range(DEEPEST):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            return tree
    raise ValueError(f"it is more than {DEEPEST} levels deep")


Row = Annotated[list[Number | None], Field(fail_fast=True)]
Table = Annotated[list[Row], Field(fail_fast=True, min_length=1), AfterValidator(_rectangular)]


class _Line(BaseModel):
    model_config = ConfigDict(strict=True)


class _Costs(_Line):
    model_config = ConfigDict(strict=True, extra="forbid")

    generated: Count
    processed: Count
    flops: Count
    worker_seconds: Seconds


class _Times(_Line):
    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, Seconds]

    total: Seconds


class _Run(_Line):
    config: Annotated[dict[str, Any], AfterValidator(_shallow)] = {}
    data: dict[str, str] = {}


class _Calibration(_Line):
    sigma: Annotated[Number, Field(gt=0)]


class _Stage(_Line):
    stage: Count
    step: Count
    method: str
    theta: str
    data: dict[str, str] = {}


class _Generation(_Line):
    step: Count
    costs: _Costs
    times: _Times
    theta: str
    lr: Number
    reward_mean: Number | None
    accuracy: Number | None
    components: Figures
    failures: Failures
    rollouts: Count
    unscored: Count = 0
    tokens: Count
    truncated: Count
    looped: Count
    learning: Figures = {}
    rewards: Table | None = None
    fitness: Table | None = None
    absent: list[Count] = []
    sigma: Number | None = None
    fitness_spread: Number | None = None
    constant_members: Count | None = None
    constant_groups: Count | None = None


class _Evaluation(_Line):
    step: Count
    problems: Count
    samples: Count
    tokens: Count
    reward: Number | None
    accuracy: Number | None
    reward_lowest: Number = 0.0
    unscored: Number = 0.0
    reward_ci95: Annotated[list[Number], Field(min_length=2, max_length=2)] | None
    accuracy_ci95: Annotated[list[Number], Field(min_length=2, max_length=2)] | None
    components: Figures
    failures: Failures


class _Sample(_Line):
    id: str
    prompt: str
    completion: str
    reward: Number | None
    accuracy: Number | None
    components: Figures | None = None
    tokens: Count | None = None


_KINDS: dict[str, type[_Line]] = {
    "run": _Run,
    "calibration": _Calibration,
    "stage": _Stage,
    "generation": _Generation,
    "evaluation": _Evaluation,
}
