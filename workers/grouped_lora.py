"""Multi-LoRA on CPU at close to the speed of the bare model.

vLLM's own CPU path gathers a copy of the adapter's weights for every token. Here tokens are grouped by slot once, when
their layout changes, and each layer is two matrix products over slots: batched where groups are even, in place where a
slot's tokens are neighbours. A factor that is not trained is the same in every slot, so it is held once; where that is
A, its product is one plain matrix product for all tokens, with A packed as vLLM packs the base model's weights. Where a
layer packs several matrices (q, k, v), their slot tensors are views of one stack: A (slots, n*r, in), and B (slots,
out, n*r) block-diagonal, so that a packed layer costs the same two products as a plain one. Tokens without an adapter
are left alone (vLLM 0.32's CPU path gives them the last slot's).

Shapes: T tokens, S slots in use, L = the longest group, n slices, r slot rank, K = n*r.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
import torch
from vllm import _custom_ops
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

Factor = Literal["A", "B"]

LONG_RUN = 32
"""Mean length of the runs of a slot's tokens from which a product a run, in place, is cheaper than gathering tokens."""
MAX_PADDING = 2.5
"""Groups are padded to the longest one up to this many times the tokens; past it, a product a group is cheaper."""


PACKED_DTYPES = (torch.float32, torch.bfloat16)
PACKED_SIZES = 32
"""Numbers of tokens for which oneDNN keeps a product it has prepared; vLLM's own number."""


class Layout(Protocol):
    """Where each slot's tokens are in the batch."""

    def shrink(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """A[slot] x, (T, K), for x (T, in) and A (slots, K, in); rows without an adapter may hold anything."""
        ...

    def add(self, y: torch.Tensor, shrunk: torch.Tensor, b: torch.Tensor) -> None:
        """y (T, out) += B[slot] shrunk, in place, for shrunk (T, K) and B (slots, out, K)."""
        ...


@dataclass(slots=True)
class Stack:
    """The adapters of a layer in all slots: `a` (slots, K, in), `b` (slots, out, K). `packed_a` is an A that all slots
    share, once it is written, in the order in which oneDNN multiplies fastest."""

    a: torch.Tensor
    b: torch.Tensor
    packed_a: Any = None

    def shrink(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """A[slot] x, (T, K), for x (T, in)."""
        if self.packed_a is not None:
            return _custom_ops.onednn_mm(self.packed_a, x, None)
        return x @ self.a[0].T if _is_shared(self.a) else layout.shrink(x, self.a)


class GroupedLoraWrapper(PunicaWrapperCPU):
    """vLLM's CPU wrapper with `add_lora_linear` replaced."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stacks: dict[int, Stack] = {}
        self.layout: Layout | None = None

    def update_metadata(self, mapping: Any, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any) -> None:
        """vLLM calls it before a step, where the step's tokens are not laid out as those of the last one."""
        if not self.stacks:  # vLLM's profiling run, which its own arithmetic serves
            super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)
        slot_of = np.full(1 + max((adapter for adapter in lora_index_to_id if adapter), default=0), -1)
        for slot, adapter in enumerate(lora_index_to_id):
            if adapter:
                slot_of[adapter] = slot
        self.layout = lay_out(torch.from_numpy(slot_of[np.array(mapping.index_mapping)]))

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
        if self.layout is not None:
            self.layout.add(y, stack.shrink(x, self.layout), stack.b)


@dataclass(frozen=True, slots=True)
class Even:
    """As many neighbouring tokens in each of neighbouring slots: rows [start, start + S*L), slots [first, first+S)."""

    start: int
    first: int
    count: int
    length: int

    def shrink(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        shrunk = x.new_empty(len(x), a.shape[1])
        torch.bmm(self._grouped(x), self._used(a), out=self._grouped(shrunk))
        return shrunk

    def add(self, y: torch.Tensor, shrunk: torch.Tensor, b: torch.Tensor, *, beta: int = 1) -> None:
        self._grouped(y).baddbmm_(self._grouped(shrunk), self._used(b), beta=beta)

    def _grouped(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[self.start : self.start + self.count * self.length].unflatten(0, (self.count, self.length))

    def _used(self, stack: torch.Tensor) -> torch.Tensor:
        return stack[self.first : self.first + self.count].mT


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of neighbouring tokens of a slot, as (slot, rows); a slot may have several."""

    runs: list[tuple[int, slice]]

    def shrink(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        shrunk = x.new_empty(len(x), a.shape[1])
        for slot, rows in self.runs:
            torch.mm(x[rows], a[slot].T, out=shrunk[rows])
        return shrunk

    def add(self, y: torch.Tensor, shrunk: torch.Tensor, b: torch.Tensor, *, beta: int = 1) -> None:
        for slot, rows in self.runs:
            y[rows].addmm_(shrunk[rows], b[slot].T, beta=beta)


class Gathered:
    """Tokens in any order, brought together by slot: `inner` lays them out, `source` (G,) are their rows, `real` those
    of the G that are no padding, and `place` (T,) says where among the G each token is that has an adapter."""

    def __init__(self, inner: Even | Runs, source: torch.Tensor, real: torch.Tensor, tokens: int) -> None:
        self.inner, self.source, self.real = inner, source, real
        self.adapted = source[real]
        self.place = torch.zeros(tokens, dtype=torch.int64)
        self.place[self.adapted] = real

    def shrink(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return self.inner.shrink(x.index_select(0, self.source), a).index_select(0, self.place)

    def add(self, y: torch.Tensor, shrunk: torch.Tensor, b: torch.Tensor) -> None:
        delta = y.new_empty(len(self.source), y.shape[1])
        self.inner.add(delta, shrunk.index_select(0, self.source), b, beta=0)
        if len(self.adapted) == len(y):
            y.add_(delta.index_select(0, self.place))
        else:
            y.index_add_(0, self.adapted, delta.index_select(0, self.real))


def lay_out(slots: torch.Tensor) -> Layout | None:
    """The cheapest layout for the slots (T,) of a step's tokens, -1 for none; None where none has an adapter."""
    runs = _runs(slots)
    if not runs:
        return None
    tokens = sum(rows.stop - rows.start for _, rows in runs)
    if _is_even(runs):
        first, rows = runs[0]
        return Even(rows.start, first, len(runs), rows.stop - rows.start)
    if tokens >= LONG_RUN * len(runs):
        return Runs(runs)
    return _gather(slots)


def _runs(slots: torch.Tensor) -> list[tuple[int, slice]]:
    found, counts = torch.unique_consecutive(slots, return_counts=True)
    bounds = [0, *counts.cumsum(0).tolist()]
    return [(slot, slice(*rows)) for slot, rows in zip(found.tolist(), pairwise(bounds), strict=True) if slot >= 0]


def _is_even(runs: list[tuple[int, slice]]) -> bool:
    length = runs[0][1].stop - runs[0][1].start
    return all(
        rows.stop - rows.start == length and rows.start == before.stop and slot == slot_before + 1
        for (slot_before, before), (slot, rows) in pairwise(runs)
    )


def _gather(slots: torch.Tensor) -> Gathered:
    order = torch.argsort(slots, stable=True)
    order = order[slots[order] >= 0]
    first = int(slots[order[0]])
    counts = torch.bincount(slots[order] - first)
    longest = int(counts.max())
    if longest * len(counts) > MAX_PADDING * len(order):
        return Gathered(Runs(_runs(slots[order])), order, torch.arange(len(order)), len(slots))
    real = (torch.arange(longest) < counts[:, None]).flatten().nonzero().squeeze(1)
    source = torch.zeros(longest * len(counts), dtype=torch.int64)  # padding is row 0, whose result nobody reads
    source[real] = order
    return Gathered(Even(0, first, len(counts), longest), source, real, len(slots))


def install() -> None:
    """Make vLLM build this wrapper where it has no fused multi-LoRA kernel. Call before the engine is built."""
    if current_platform.is_cpu():
        qualified = f"{GroupedLoraWrapper.__module__}.{GroupedLoraWrapper.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: qualified)


def stack_slots(manager: Any, shared: Factor | None = None) -> None:
    """Re-bind the slot tensors of every layer as views of one A and one B stack, all zero, known to the layer's
    wrapper. The `shared` factor is one for all slots: what is written to any slot is in all of them."""
    for layer in manager.modules.values():
        wrapper = getattr(layer, "punica_wrapper", None)
        if isinstance(wrapper, GroupedLoraWrapper):
            a, b = _stack_layer(layer, shared)
            wrapper.stacks[a.data_ptr()] = Stack(a, b)


def pack_shared(manager: Any) -> None:
    """Pack every A that all slots share; from now on it must not be written."""
    for layer in manager.modules.values():
        wrapper = getattr(layer, "punica_wrapper", None)
        if isinstance(wrapper, GroupedLoraWrapper):
            stack = wrapper.stacks[layer.lora_a_stacked[0].data_ptr()]
            if _is_shared(stack.a) and _custom_ops._supports_onednn and stack.a.dtype in PACKED_DTYPES:
                stack.packed_a = _custom_ops.create_onednn_mm(stack.a[0].T, PACKED_SIZES)


def _stack_layer(layer: Any, shared: Factor | None) -> tuple[torch.Tensor, torch.Tensor]:
    slots, _, rank, fan_in = layer.lora_a_stacked[0].shape
    outs = [part.shape[2] for part in layer.lora_b_stacked]
    parts = len(outs)
    a = layer.lora_a_stacked[0].new_zeros(1 if shared == "A" else slots, parts * rank, fan_in).expand(slots, -1, -1)
    b = layer.lora_b_stacked[0].new_zeros(1 if shared == "B" else slots, sum(outs), parts * rank).expand(slots, -1, -1)
    starts = [sum(outs[:part]) for part in range(parts)]
    ranks = [slice(part * rank, (part + 1) * rank) for part in range(parts)]
    layer.lora_a_stacked = tuple(a[:, None, ranks[part]] for part in range(parts))
    layer.lora_b_stacked = tuple(
        b[:, None, starts[part] : starts[part] + outs[part], ranks[part]] for part in range(parts)
    )
    return a, b


def _is_shared(stack: torch.Tensor) -> bool:
    return stack.stride(0) == 0
