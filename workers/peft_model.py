"""A transformers model that wears theta as a PEFT adapter, or somebody's adapter: what the reference engine, gradients
and export have in common.

PEFT never reads an adapter's files itself, for it does more that they say than wear a plain LoRA: it may import modules
that they name. It is given numbers that were checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from es_engine.spaces.base import Matrix
from es_engine.spaces.lora import Factor, LoraSpace, Pair, adapted_modules, adapter_config, load_adapter
from workers.engine import Vector


def load_peft_model(model: Path, space: LoraSpace, dtype: str, device: str) -> Any:
    """The causal language model in a folder with an adapter on the space's matrices, in evaluation mode.

    `dtype` is that of the base model, `auto` its own; the adapter is float32, or float64 as the base.
    """
    import peft

    config = _lora(space.rank, space.alpha, [matrix.name for matrix in space.matrices])
    return peft.get_peft_model(load_base(model, dtype), config).eval().to(device)


def load_frozen_model(model: Path, adapter: Path | None, dtype: str, device: str) -> Any:
    """The causal language model in a folder, with the PEFT adapter in another if there is one, not to be trained.
    Raises ValueError for an adapter that does not fit."""
    base = load_base(model, dtype)
    worn = base if adapter is None else wearing(base, adapter)
    return worn.eval().requires_grad_(False).to(device)


def load_base(model: Path, dtype: str) -> Any:
    """The causal language model in a folder; no code that it brings is run."""
    from transformers import AutoModelForCausalLM

    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    return AutoModelForCausalLM.from_pretrained(model, dtype=chosen, use_safetensors=True, trust_remote_code=False)


def wearing(base: Any, folder: Path) -> Any:
    """A model with the PEFT adapter in a folder. Raises ValueError for one that does not fit."""
    import peft

    config, pairs = _adapter(base, folder)
    worn = peft.get_peft_model(base, config)
    _write(worn, pairs, "default")
    return worn


def add_adapter(model: Any, folder: Path, name: str) -> None:
    """Give a model that wears an adapter already another one, from a folder, to be worn on demand. Raises ValueError
    for one that does not fit."""
    config, pairs = _adapter(model.get_base_model(), folder)
    model.add_adapter(name, config)
    _write(model, pairs, name)


def _lora(rank: int, alpha: float, modules: list[str]) -> Any:
    import peft

    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, task_type="CAUSAL_LM")


def _adapter(base: Any, folder: Path) -> tuple[Any, dict[str, Pair]]:
    """The adapter in a folder as PEFT may know it, and its factors by module."""
    config, names = adapter_config(folder), adapted_modules(folder)
    layers = dict(base.named_modules())
    matrices = []
    for name in names:
        # Where it wears an adapter already, the layer itself is further down.
        layer = layers.get(f"{name}.base_layer", layers.get(name))
        if not isinstance(layer, torch.nn.Linear):
            raise ValueError(f"{folder} adapts {name}, which is no linear layer of the model")
        matrices.append(Matrix(name, layer.out_features, layer.in_features, rms=1.0))
    pairs = load_adapter(folder, matrices, config["r"], config["lora_alpha"])
    return _lora(config["r"], config["lora_alpha"], list(names)), dict(zip(names, pairs, strict=True))


def _write(model: Any, pairs: Mapping[str, Pair], adapter: str) -> None:
    for name, pair in pairs.items():
        factor_weight(model, name, "A", adapter).data.copy_(torch.from_numpy(pair.a))
        factor_weight(model, name, "B", adapter).data.copy_(torch.from_numpy(pair.b))


def adapted_layer(model: Any, matrix: str) -> Any:
    """PEFT's layer over a matrix, by the matrix's name in the base model."""
    return model.get_submodule(f"base_model.model.{matrix}")


def factor_weight(model: Any, matrix: str, factor: Factor, adapter: str = "default") -> torch.nn.Parameter:
    """An adapter's A (r, in) or B (out, r) of a matrix, by the matrix's name in the base model."""
    layer = adapted_layer(model, matrix)
    return (layer.lora_A if factor == "A" else layer.lora_B)[adapter].weight


def put_on(model: Any, space: LoraSpace, theta: Vector) -> None:
    """Make the model wear theta, shape (D,), of a space of the rank and on the matrices that it was loaded with: every
    factor is written, in place."""
    pairs = space.adapter(theta)
    for name in pairs:
        adapted_layer(model, name).scaling["default"] = space.scaling
    _write(model, pairs, "default")
