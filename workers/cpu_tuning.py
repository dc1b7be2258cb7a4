"""What vLLM leaves slow on a CPU when it serves LoRA, norms, activations and the sampler's logits; and where it fails.

On a CPU vLLM counts on torch.compile to fuse norms and activations, and turns it off for LoRA; what is left are chains
of torch calls. Its library has C++ kernels for norms all the same, and here they are put in their place. And its
sampler takes new memory for a float32 copy of the logits at every step, so much that the C library gets it from the
kernel each time, with a page fault for every 4 KiB; here the copy has a place of its own. Where a prompt is longer than
what is left of a step, it draws a token for the part that it has read and takes the draw back, as no generator of a CPU
can; here there is no such draw.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite.binding import ffi
from vllm import ir
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.platforms import current_platform
from vllm.v1.sample.sampler import Sampler

# At its start vLLM looks into the __dict__ of every object of every module; once numba is there, this one would answer
# with a function.
ffi.lib._fntab["__dict__"] = {}

VECTOR = 8
"""The kernels take rows of a multiple of so many numbers."""

BLOCK_SIZE = 32
"""Tokens in a block of the KV cache, the unit in which prompts share what they begin with: the least that vLLM's
attention is as fast with as with its own choice of 128."""

PROVIDER = "cpu_c"
"""The name under which vLLM's `ir_op_priority` knows the kernels of norms."""


def install() -> None:
    """Put faster layers in vLLM's place in this process, if it serves on a CPU. Call before the engine is built."""
    if not current_platform.is_cpu() or PROVIDER in ir.ops.rms_norm.impls:
        return
    SiluAndMul.register_oot(_SiluAndMul, name="SiluAndMul")
    ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_is_plain_norm)(_rms_norm)
    ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_is_plain_add_norm, inplace=True)(_add_rms_norm)


def keep_logits(sampler: Any) -> None:
    """Have vLLM's sampler copy logits of half precision to float32 in the same memory at every step."""
    if not current_platform.is_cpu() or not isinstance(sampler, Sampler):
        return
    kept = torch.empty(0)

    def in_float32(_: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal kept
        logits = keywords["logits"]
        if logits.dtype == torch.float32:
            return args, keywords
        if kept.numel() < logits.numel():
            kept = torch.empty(logits.numel())
        copy = kept[: logits.numel()].view(logits.shape)
        return args, {**keywords, "logits": copy.copy_(logits)}

    sampler.register_forward_pre_hook(in_float32, with_kwargs=True)


def spare_generators(runner: Any) -> None:
    """Have vLLM's model runner sample without a request's generator until its prompt is read whole."""
    if not current_platform.is_cpu():
        return
    sample_tokens = runner.sample_tokens

    def of_whole_prompts(grammar_output: Any) -> Any:
        batch = runner.input_batch
        unread = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist()
        spared = {row: batch.generators.pop(row) for row in unread if row in batch.generators}
        try:
            return sample_tokens(grammar_output)
        finally:
            batch.generators.update(spared)

    runner.sample_tokens = of_whole_prompts


def engine_arguments() -> dict[str, object]:
    """Arguments of vLLM's engine that choose the kernels and how finely prefixes are shared, none where this is no
    CPU."""
    if not current_platform.is_cpu():
        return {}
    norms = {name: [PROVIDER] for name in ("rms_norm", "fused_add_rms_norm")}
    return {"ir_op_priority": norms, "compilation_config": {"custom_ops": ["all"]}, "block_size": BLOCK_SIZE}


class _SiluAndMul(SiluAndMul):
    """In two torch calls without a second temporary: vLLM's C++ kernel of it takes twice as long."""

    def forward_cpu(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


def _is_plain_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    known = variance_size is None and weight is not None and weight.dtype == x.dtype
    return known and x.is_contiguous() and x.shape[-1] % VECTOR == 0


def _add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def _is_plain_add_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    alike = x_residual.shape == x.shape and x_residual.dtype == x.dtype and x_residual.is_contiguous()
    return alike and _is_plain_norm(x, weight, epsilon, variance_size)
