"""A transformers model that wears theta as a PEFT adapter: what the reference engine and gradients have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from es_engine.spaces.lora import Factor, LoraSpace
from workers.engine import Vector


def load_peft_model(model: Path, space: LoraSpace, dtype: str, device: str) -> Any:
    """The causal language model in a folder with an adapter on the space's matrices, in evaluation mode.

    `dtype` is that of the base model, `auto` its own; the adapter is float32, or float64 as the base.
    """
    import peft

    base = _base(model, dtype)
    config = peft.LoraConfig(
        r=space.rank,
        lora_alpha=space.alpha,
        target_modules=[matrix.name for matrix in space.matrices],
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(base, config).eval().to(device)


def load_frozen_model(model: Path, adapter: Path | None, dtype: str, device: str) -> Any:
    """The causal language model in a folder, with the PEFT adapter in another if there is one, not to be trained."""
    import peft

    base = _base(model, dtype)
    worn = base if adapter is None else peft.PeftModel.from_pretrained(base, adapter)
    return worn.eval().requires_grad_(False).to(device)


def _base(model: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype if dtype == "auto" else getattr(torch, dtype))


def adapted_layer(model: Any, matrix: str) -> Any:
    """PEFT's layer over a matrix, by the matrix's name in the base model."""
    return model.get_submodule(f"base_model.model.{matrix}")


def factor_weight(model: Any, matrix: str, factor: Factor) -> torch.nn.Parameter:
    """The adapter's A (r, in) or B (out, r) of a matrix, by the matrix's name in the base model."""
    layer = adapted_layer(model, matrix)
    return (layer.lora_A if factor == "A" else layer.lora_B)["default"].weight


def put_on(model: Any, space: LoraSpace, theta: Vector) -> None:
    """Make the model wear theta, shape (D,), of a space of the rank and on the matrices that it was loaded with: every
    factor is written, in place."""
    for name, pair in space.adapter(theta).items():
        adapted_layer(model, name).scaling["default"] = space.scaling
        factor_weight(model, name, "A").data.copy_(torch.from_numpy(pair.a))
        factor_weight(model, name, "B").data.copy_(torch.from_numpy(pair.b))
