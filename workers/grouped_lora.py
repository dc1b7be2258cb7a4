"""Multi-LoRA on CPU at close to the speed of the bare model.

vLLM's own CPU path gathers a copy of the adapter's weights for every token. Here tokens are grouped by slot once, when
their layout changes, and each layer is two products over groups (`cpu_kernels.py`). A factor that is not trained is the
same in every slot, so it is held once; where that is A, its product is one plain matrix product for all tokens, with A
packed as vLLM packs the base model's weights, where the CPU multiplies numbers of its type. Where a layer packs several
matrices (q, k, v), their slot tensors are views of one stack: A (slots, n*r, in), and B (slots, r, out) with each
matrix in columns of its own. Tokens without an adapter are left alone (vLLM 0.32's CPU path gives them the last
slot's).

Shapes: T tokens, n slices, r slot rank, K = n*r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from vllm import _custom_ops
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

from workers import cpu_kernels

Factor = Literal["A", "B"]

PACKED_SIZES = 32
"""Numbers of tokens for which oneDNN keeps a product it has prepared; vLLM's own number."""

ALIGNED = 32
"""Numbers of half precision in a cache line, at which every stack begins."""


class Groups(NamedTuple):
    """A step's tokens by slot: group g is `tokens[bounds[g] : bounds[g + 1]]`, whose slot is `slots[g]`."""

    tokens: cpu_kernels.Array
    bounds: cpu_kernels.Array
    slots: cpu_kernels.Array


@dataclass(slots=True)
class Stack:
    """The adapters of a layer in all slots: `a` (slots, K, in), `b` (slots, r, out) and the tiles of its columns.

    `packed_a` is an A that all slots share, once it is written, in the order in which oneDNN multiplies fastest.
    """

    a: torch.Tensor
    b: torch.Tensor
    tiles: cpu_kernels.Array
    packed_a: Any = None

    def shrink(self, x: torch.Tensor, groups: Groups, threads: int) -> torch.Tensor:
        """A[slot] x, (T, K), for x (T, in); rows of tokens without an adapter may hold anything."""
        if self.packed_a is not None:
            return _custom_ops.onednn_mm(self.packed_a, x, None)
        if _is_shared(self.a):
            return x @ self.a[0].T
        shrunk = x.new_empty(len(x), self.a.shape[1])
        out, rows, factors = map(cpu_kernels.as_array, (shrunk, x, self.a))
        cpu_kernels.shrink(out, rows, factors, *groups, threads=threads)
        return shrunk

    def add(self, y: torch.Tensor, shrunk: torch.Tensor, groups: Groups, threads: int) -> None:
        """y (T, out) += B[slot] shrunk, in place, for shrunk (T, K)."""
        out, rows, factors = map(cpu_kernels.as_array, (y, shrunk, self.b))
        cpu_kernels.add_expanded(out, rows, factors, *groups, self.tiles, threads=threads)


class GroupedLoraWrapper(PunicaWrapperCPU):
    """vLLM's CPU wrapper with `add_lora_linear` replaced."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stacks: dict[int, Stack] = {}
        self.groups: Groups | None = None
        self.threads = cpu_kernels.start_threads()

    def update_metadata(self, mapping: Any, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any) -> None:
        """vLLM calls it before a step, where the step's tokens are not laid out as those of the last one."""
        if not self.stacks:  # vLLM's profiling run, which its own arithmetic serves
            super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)
        slot_of = np.full(1 + max((adapter for adapter in lora_index_to_id if adapter), default=0), -1)
        for slot, adapter in enumerate(lora_index_to_id):
            if adapter:
                slot_of[adapter] = slot
        self.groups = group(slot_of[np.array(mapping.index_mapping)])

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """y (T, out) += scale * B[slot] A[slot] x, for x (T, in), in place."""
        stack = self.stacks.get(lora_a_stacked[0].data_ptr())
        if stack is None:  # vLLM's profiling run, before the slots are claimed
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, **kwargs)
            return
        assert scale == 1.0
        if self.groups is not None:
            stack.add(y, stack.shrink(x, self.groups, self.threads), self.groups, self.threads)


def group(slots: cpu_kernels.Array) -> Groups | None:
    """Group a step's tokens by their slots (T,), -1 for none, in slots' order; None where none has an adapter."""
    tokens = np.argsort(slots, kind="stable")
    tokens = tokens[np.searchsorted(slots[tokens], 0) :]
    if not len(tokens):
        return None
    grouped, starts = np.unique(slots[tokens], return_index=True)
    return Groups(tokens, np.append(starts, len(tokens)), grouped)


def install() -> None:
    """Make vLLM build this wrapper where it has no fused multi-LoRA kernel. Call before the engine is built."""
    if current_platform.is_cpu():
        cpu_kernels.start_threads()
        qualified = f"{GroupedLoraWrapper.__module__}.{GroupedLoraWrapper.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: qualified)


def stack_slots(manager: Any, shared: Factor | None = None) -> torch.Tensor | None:
    """Re-bind the slot tensors of every layer as views of one A and one B stack, all zero, known to the layer's
    wrapper, in place of those that it knew. The `shared` factor is one for all slots: what is written to any slot is in
    all of them.

    Returns the memory that all of them lie in, flat; None where vLLM's own kernels serve, whose slots stay as they are.
    """
    layers = _grouped_layers(manager)
    if not layers:
        return None
    shapes = [shape for layer in layers for shape in _stack_shapes(layer, shared)]
    sizes = [-(-math.prod(shape) // ALIGNED) * ALIGNED for shape in shapes]
    memory = layers[0].lora_a_stacked[0].new_zeros(sum(sizes))
    stacks = [part[: math.prod(shape)].view(shape) for part, shape in zip(memory.split(sizes), shapes, strict=True)]
    for layer in layers:
        layer.punica_wrapper.stacks.clear()
    for layer, a, b in zip(layers, stacks[::2], stacks[1::2], strict=True):
        _bind(layer, a, b)
    return memory


def pack_shared(manager: Any) -> None:
    """Pack every A that all slots share; from now on it must not be written."""
    for layer in _grouped_layers(manager):
        stack = layer.punica_wrapper.stacks[layer.lora_a_stacked[0].data_ptr()]
        if _is_shared(stack.a) and _packs(stack.a.dtype):
            stack.packed_a = _custom_ops.create_onednn_mm(stack.a[0].T, PACKED_SIZES)


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs matrices of a type here: those of bfloat16 only where the CPU has AVX-512 or the like."""
    if not _custom_ops._supports_onednn:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _grouped_layers(manager: Any) -> list[Any]:
    layers = manager.modules.values()
    return [layer for layer in layers if isinstance(getattr(layer, "punica_wrapper", None), GroupedLoraWrapper)]


def _stack_shapes(layer: Any, shared: Factor | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    slots, _, rank, fan_in = layer.lora_a_stacked[0].shape
    outs = _outs(layer)
    return (1 if shared == "A" else slots, len(outs) * rank, fan_in), (1 if shared == "B" else slots, rank, sum(outs))


def _bind(layer: Any, a: torch.Tensor, b: torch.Tensor) -> None:
    slots, _, rank, _ = layer.lora_a_stacked[0].shape
    outs = _outs(layer)
    a, b = a.expand(slots, -1, -1), b.expand(slots, -1, -1)
    parts = a.unflatten(1, (len(outs), rank)).unbind(1)
    layer.lora_a_stacked = tuple(part[:, None] for part in parts)
    layer.lora_b_stacked = tuple(part.mT[:, None] for part in b.split(outs, dim=2))
    layer.punica_wrapper.stacks[a.data_ptr()] = Stack(a, b, cpu_kernels.tiles(outs))


def _outs(layer: Any) -> tuple[int, ...]:
    return tuple(part.shape[2] for part in layer.lora_b_stacked)


def _is_shared(stack: torch.Tensor) -> bool:
    return stack.stride(0) == 0
