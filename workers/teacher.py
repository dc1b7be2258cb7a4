"""The teacher that a model is distilled from, as a config names it: a model, an adapter, or a model with an adapter."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from es_engine.config import TeacherConfig
from es_engine.spaces.base import Matrix
from es_engine.spaces.lora import adapted_modules, adapter_config, load_adapter
from workers.models import fingerprint, linear_shapes, multiplying_parameters, resolve
from workers.prompts import load_tokenizer


@dataclass(frozen=True, slots=True)
class Teacher:
    """`model` is the folder of its model, None where that is the student's base model; `adapter` that of the adapter it
    wears, if any. `parameters` are those that multiply; `fingerprint` is a hash of what it computes, but for the base
    model."""

    model: Path | None
    adapter: Path | None
    parameters: int
    fingerprint: str


def find_teacher(config: TeacherConfig, student: Path) -> Teacher:
    """This machine's copy of the teacher; `student` is the folder of the base model.

    Raises ValueError where there is no such model or adapter, where the adapter is not a plain LoRA of the model, and
    where the model's vocabulary is not the student's.
    """
    model = student if config.model is None else _resolved(config.model)
    if model != student:
        _check_vocabulary(model, student)
    adapter = None if config.adapter is None else Path(config.adapter)
    return Teacher(
        model=None if model == student else model,
        adapter=adapter,
        parameters=multiplying_parameters(model) + (_adapter_parameters(adapter, model) if adapter else 0),
        fingerprint=fingerprint_of(None if model == student else model, adapter),
    )


def _resolved(source: str) -> Path:
    try:
        return resolve(source)
    except ValueError as error:
        raise ValueError(f"method.teacher.model: {str(error).removeprefix('model.source: ')}") from error


def _check_vocabulary(model: Path, student: Path) -> None:
    theirs, mine = _vocabulary(model), load_tokenizer(student).get_vocab()
    if theirs != mine:
        odd = min(token for token, _ in theirs.items() ^ mine.items())
        raise ValueError(
            f"method.teacher.model: its vocabulary is not that of the student, whose tokens it has to read: {odd!r} is "
            f"{_number(theirs, odd)} in {model} and {_number(mine, odd)} in {student}"
        )


def _vocabulary(model: Path) -> dict[str, int]:
    try:
        found: dict[str, int] = load_tokenizer(model).get_vocab()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"method.teacher.model: {model} has no tokenizer that can be read, which is needed to see that its "
            f"vocabulary is the student's ({type(error).__name__})"
        ) from error
    return found


def _number(vocabulary: dict[str, int], token: str) -> str:
    return f"token {vocabulary[token]}" if token in vocabulary else "no token"


def _adapter_parameters(adapter: Path, model: Path) -> int:
    """The numbers in an adapter. Raises ValueError if it is not a plain LoRA of the model."""
    try:
        config, names, shapes = adapter_config(adapter), adapted_modules(adapter), linear_shapes(model)
        unknown = next((name for name in names if name not in shapes), None)
        if unknown is not None:
            raise ValueError(f"{adapter} adapts {unknown}, which is no linear layer of {model}")
        matrices = [Matrix(name, *shapes[name], rms=1.0) for name in names]
        pairs = load_adapter(adapter, matrices, config["r"], config["lora_alpha"])
    except ValueError as error:
        raise ValueError(f"method.teacher.adapter: {str(error).removeprefix('space.init: ')}") from error
    return sum(pair.a.size + pair.b.size for pair in pairs)


def fingerprint_of(model: Path | None, adapter: Path | None) -> str:
    """A hash of what a model with a PEFT adapter computes, each where there is one."""
    whole = hashlib.sha256()
    if model is not None:
        whole.update(fingerprint(model).encode())
    if adapter is not None:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            whole.update((adapter / name).read_bytes())
    return whole.hexdigest()
