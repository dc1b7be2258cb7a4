"""The grouped wrapper against a loop over tokens; what the engine makes of it is in test_vllm_slots.py."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.vllm

SLOTS, RANK, FAN_IN = 5, 8, 12
PLAIN, PACKED = (10,), (10, 4, 6)
LAYOUTS = {
    "one slot": [2] * 6,
    "sorted and even": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "sorted and even, not from slot 0": [2, 2, 3, 3, 4, 4],
    "even and shuffled": [2, 0, 1, 1, 2, 0],
    "uneven, padded": [1, 0, 2, 0, 1, 2, 0],
    "uneven, sorted": [0, 0, 0, 1, 1, 2, 2],
    "uneven past the padding": [1, 0, 0, 0, 0, 0, 2, 0],
    "slots with a gap": [0, 3, 3, 0],
    "one token each": [4, 3, 2, 1, 0],
    "with bare tokens": [-1, 1, -1, 0, 1, 0, -1],
    "bare tokens between slots with a gap": [3, -1, 0, 0, -1],
    "bare tokens first": [-1, -1, 0, 0, 1, 1],
    "bare tokens last": [0, 0, 1, 1, -1, -1],
    "bare tokens only": [-1, -1, -1],
    "one bare token": [-1],
    "long runs": [0] * 33 + [1] * 40 + [2] * 37,
    "long runs, a slot twice": [3] * 40 + [0] * 50 + [3] * 34,
    "long runs between bare tokens": [-1] + [2] * 60 + [-1] * 3 + [0] * 33 + [-1] * 2,
}
SHARED = (None, "A", "B")


@dataclass
class Layer:
    """What a vLLM LoRA layer shows its wrapper, and a copy of what was `written` to its slots: (A, B) of each slice."""

    lora_a_stacked: tuple[torch.Tensor, ...]
    lora_b_stacked: tuple[torch.Tensor, ...]
    punica_wrapper: Any
    written: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()


def build_layer(
    outs: tuple[int, ...],
    wrapper: Any,
    dtype: torch.dtype = torch.float32,
    *,
    shared: Any = None,
    rank: int = RANK,
) -> Layer:
    """A layer with random adapters in its slots, stacked by the code under test; all have one `shared` factor."""
    from workers.grouped_lora import stack_slots

    layer = Layer(
        lora_a_stacked=tuple(torch.randn(SLOTS, 1, rank, FAN_IN, dtype=dtype) for _ in outs),
        lora_b_stacked=tuple(torch.randn(SLOTS, 1, out, rank, dtype=dtype) for out in outs),
        punica_wrapper=wrapper,
    )
    stack_slots(SimpleNamespace(modules={"layer": layer}), shared)
    layer.written = tuple(
        (random_slots(a.shape, dtype, one=shared == "A"), random_slots(b.shape, dtype, one=shared == "B"))
        for a, b in zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
    )
    for a, b, (written_a, written_b) in zip(layer.lora_a_stacked, layer.lora_b_stacked, layer.written, strict=True):
        for slot in range(SLOTS):
            a[slot] = written_a[slot]
            b[slot] = written_b[slot]
    return layer


def random_slots(shape: torch.Size, dtype: torch.dtype, *, one: bool) -> torch.Tensor:
    """Random numbers for every slot, or one set of them for all."""
    return torch.randn(1 if one else shape[0], *shape[1:], dtype=dtype).expand(shape)


def build_wrapper(slots: list[int]) -> Any:
    """The wrapper as vLLM tells it, through its own metadata, the slots (-1: none) of a step's tokens."""
    from workers.grouped_lora import GroupedLoraWrapper

    wrapper = GroupedLoraWrapper(max_num_batched_tokens=256, max_batches=256, device="cpu")
    tell(wrapper, slots)
    return wrapper


def tell(wrapper: Any, slots: list[int]) -> None:
    from vllm.lora.layers import LoRAMapping

    adapters = [slot + 1 for slot in slots]
    mapping = LoRAMapping(tuple(adapters), tuple(adapters), is_prefill=False)
    wrapper.update_metadata(mapping, list(range(1, SLOTS + 1)), SLOTS, 64)


def run(wrapper: Any, layer: Layer, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    outs = tuple(stack.shape[2] for stack in layer.lora_b_stacked)
    wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, outs)
    return y


def naive(layer: Layer, y: torch.Tensor, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
    """Token by token, slice by slice, in float64."""
    y = y.double().clone()
    for row, slot in enumerate(slots):
        start = 0
        for a, b in layer.written:
            if slot >= 0:
                y[row, start : start + b.shape[2]] += b[slot, 0].double() @ (a[slot, 0].double() @ x[row].double())
            start += b.shape[2]
    return y


def assert_equal_in_float32(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def activations(tokens: int, outs: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(tokens, sum(outs), dtype=dtype), torch.randn(tokens, FAN_IN, dtype=dtype)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("outs", [PLAIN, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("slots", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_of_tokens_equals_a_loop(slots: list[int], outs: tuple[int, ...], shared: str | None) -> None:
    wrapper = build_wrapper(slots)
    layer = build_layer(outs, wrapper, shared=shared)
    y, x = activations(len(slots), outs, torch.float32)
    assert_equal_in_float32(run(wrapper, layer, y, x), naive(layer, y, x, slots))


@pytest.mark.parametrize("rank", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("shared", SHARED)
def test_every_rank_equals_a_loop(rank: int, shared: str | None) -> None:
    for slots in ([0, 0, 1, 1], [2, 0, 1, 2, 2, -1], LAYOUTS["long runs, a slot twice"]):
        wrapper = build_wrapper(slots)
        layer = build_layer(PACKED, wrapper, rank=rank, shared=shared)
        y, x = activations(len(slots), PACKED, torch.float32)
        assert_equal_in_float32(run(wrapper, layer, y, x), naive(layer, y, x, slots))


@settings(max_examples=100, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 40)), min_size=1, max_size=6),
    shuffle=st.booleans(),
    shared=st.sampled_from(SHARED),
    seed=st.integers(0, 1000),
)
def test_any_layout_equals_a_loop(runs: list[tuple[int, int]], shuffle: bool, shared: str | None, seed: int) -> None:
    torch.manual_seed(seed)
    slots = [slot for slot, length in runs for _ in range(length)]
    if shuffle:
        slots = [slots[place] for place in torch.randperm(len(slots))]
    wrapper = build_wrapper(slots)
    layer = build_layer(PACKED, wrapper, shared=shared)
    y, x = activations(len(slots), PACKED, torch.float32)
    assert_equal_in_float32(run(wrapper, layer, y, x), naive(layer, y, x, slots))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
@pytest.mark.parametrize("shared", SHARED)
def test_half_precision_equals_a_loop_but_for_rounding(dtype: torch.dtype, bits: int, shared: str | None) -> None:
    slots = [0, 2, 1, 1, 0, 2, 2, -1]
    wrapper = build_wrapper(slots)
    layer = build_layer(PACKED, wrapper, dtype, shared=shared)
    y, x = activations(len(slots), PACKED, dtype)
    # A x and the sum with y are each rounded to `bits` bits; B multiplies the error of the first.
    expected = naive(layer, y, x, slots)
    torch.testing.assert_close(run(wrapper, layer, y, x).double(), expected, rtol=3 * 2**-bits, atol=64 * 2**-bits)


def test_rows_without_an_adapter_keep_their_bits() -> None:
    slots = LAYOUTS["with bare tokens"]
    wrapper = build_wrapper(slots)
    layer = build_layer(PACKED, wrapper)
    y, x = activations(len(slots), PACKED, torch.float32)
    bare = [row for row, slot in enumerate(slots) if slot < 0]
    assert torch.equal(run(wrapper, layer, y, x)[bare], y[bare])


def test_groups_in_another_order_give_the_same_bits() -> None:
    slots = [0, 0, 1, 1, 2, 2]
    order = torch.tensor([4, 2, 0, 3, 5, 1])
    wrapper = build_wrapper(slots)
    layer = build_layer(PACKED, wrapper)
    y, x = activations(len(slots), PACKED, torch.float32)
    straight = run(wrapper, layer, y, x)
    tell(wrapper, [slots[row] for row in order])
    assert torch.equal(run(wrapper, layer, y[order], x[order]), straight[order])


def test_a_token_has_the_same_bits_whatever_is_beside_it() -> None:
    alone, together = [1], [0, 1, 2, 1, -1]
    for dtype in (torch.float32, torch.bfloat16):
        wrapper = build_wrapper(together)
        layer = build_layer(PACKED, wrapper, dtype)
        y, x = activations(len(together), PACKED, dtype)
        beside = run(wrapper, layer, y, x)[3]
        tell(wrapper, alone)
        assert torch.equal(run(wrapper, layer, y[3:4], x[3:4])[0], beside)


@pytest.mark.parametrize("shared", SHARED)
def test_threads_change_no_bits(shared: str | None) -> None:
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("there is one core")
    slots = LAYOUTS["long runs between bare tokens"]
    wrapper = build_wrapper(slots)
    layer = build_layer((600, 40), wrapper, shared=shared)
    y, x = activations(len(slots), (600, 40), torch.float32)
    one = run(wrapper, layer, y, x)
    wrapper.threads = 2
    assert torch.equal(run(wrapper, layer, y, x), one)


@pytest.mark.parametrize("shared", ["A", "B"])
def test_a_shared_factor_is_held_once(shared: str) -> None:
    wrapper = build_wrapper([1])
    layer = build_layer(PACKED, wrapper, shared=shared)
    (stack,) = wrapper.stacks.values()
    a, b = stack.a, stack.b
    one, each = (a, b) if shared == "A" else (b, a)
    assert one.stride(0) == 0
    assert each.stride(0) == each[0].numel()
    first = layer.lora_a_stacked[0] if shared == "A" else layer.lora_b_stacked[0]
    first[3, 0] = 7.0
    assert (first[0] == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outs", [PLAIN, PACKED])
def test_a_packed_shared_a_gives_the_same_product(outs: tuple[int, ...], dtype: torch.dtype) -> None:
    from workers.grouped_lora import pack_shared

    slots = LAYOUTS["uneven, padded"]
    wrapper = build_wrapper(slots)
    layer = build_layer(outs, wrapper, dtype, shared="A")
    pack_shared(SimpleNamespace(modules={"layer": layer}))
    (stack,) = wrapper.stacks.values()
    unpacked = dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() == "AVX2"
    assert (stack.packed_a is None) == unpacked
    y, x = activations(len(slots), outs, dtype)
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (3 * 2**-8, 0.25)
    found = run(wrapper, layer, y, x).double()
    torch.testing.assert_close(found, naive(layer, y, x, slots), rtol=rtol, atol=atol)


def test_factors_of_each_slot_are_not_packed() -> None:
    from workers.grouped_lora import pack_shared

    wrapper = build_wrapper([0, 1])
    layer = build_layer(PACKED, wrapper, torch.float32, shared="B")
    pack_shared(SimpleNamespace(modules={"layer": layer}))
    (stack,) = wrapper.stacks.values()
    assert stack.packed_a is None


def test_stacks_are_shared_with_the_slots() -> None:
    wrapper = build_wrapper([1])
    layer = build_layer(PACKED, wrapper)
    (stack,) = wrapper.stacks.values()
    a, b = stack.a, stack.b
    assert a.shape == (SLOTS, len(PACKED) * RANK, FAN_IN)
    assert b.shape == (SLOTS, RANK, sum(PACKED))
    layer.lora_a_stacked[1][3, 0] = 7.0
    layer.lora_b_stacked[2][4, 0] = 8.0
    assert (a[3, RANK : 2 * RANK] == 7.0).all()
    assert (b[4, :, PACKED[0] + PACKED[1] :] == 8.0).all()


def test_all_slots_lie_in_one_memory_and_begin_at_zero() -> None:
    from workers.grouped_lora import GroupedLoraWrapper, stack_slots

    wrapper = GroupedLoraWrapper(max_num_batched_tokens=256, max_batches=256, device="cpu")
    layers = {
        name: Layer(
            tuple(torch.ones(SLOTS, 1, RANK, FAN_IN) for _ in outs),
            tuple(torch.ones(SLOTS, 1, out, RANK) for out in outs),
            wrapper,
        )
        for name, outs in (("plain", PLAIN), ("packed", PACKED))
    }
    memory = stack_slots(SimpleNamespace(modules=layers))
    assert memory is not None
    assert not memory.any()
    memory.fill_(1)
    stacks = [stack for layer in layers.values() for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked)]
    assert all((stack == 1).all() for stack in stacks)
    for stack in stacks:
        stack.zero_()
    assert memory.count_nonzero() == memory.numel() - sum(stack.numel() for stack in stacks)  # what aligns the stacks


def test_layers_do_not_mix() -> None:
    slots = [1, 0, 1]
    wrapper = build_wrapper(slots)
    for layer in [build_layer(PACKED, wrapper), build_layer(PACKED, wrapper), build_layer(PLAIN, wrapper)]:
        outs = tuple(stack.shape[2] for stack in layer.lora_b_stacked)
        y, x = activations(len(slots), outs, torch.float32)
        assert_equal_in_float32(run(wrapper, layer, y, x), naive(layer, y, x, slots))


def test_before_the_slots_are_stacked_vllm_answers() -> None:
    """vLLM's profiling run comes before the slots are claimed; its own arithmetic serves there."""
    slots = [1, 0, 1]
    wrapper = build_wrapper(slots)
    layer = Layer(
        lora_a_stacked=(torch.randn(SLOTS, 1, RANK, FAN_IN),),
        lora_b_stacked=(torch.randn(SLOTS, 1, PLAIN[0], RANK),),
        punica_wrapper=wrapper,
    )
    layer.written = tuple(zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True))
    y, x = activations(len(slots), PLAIN, torch.float32)
    torch.testing.assert_close(run(wrapper, layer, y, x).double(), naive(layer, y, x, slots), rtol=1e-4, atol=1e-4)


def test_wrappers_of_other_devices_are_left_alone() -> None:
    from workers.grouped_lora import stack_slots

    stacks = (torch.ones(SLOTS, 1, RANK, FAN_IN),)
    layer = Layer(stacks, (torch.ones(SLOTS, 1, PLAIN[0], RANK),), punica_wrapper=object())
    stack_slots(SimpleNamespace(modules={"layer": layer}))
    assert layer.lora_a_stacked is stacks


def test_install_makes_vllm_build_this_wrapper() -> None:
    from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper
    from vllm.platforms import current_platform

    from workers.grouped_lora import GroupedLoraWrapper, install

    if not current_platform.is_cpu():
        pytest.skip("vLLM has a fused kernel here")
    install()
    wrapper = get_punica_wrapper(16, max_batches=4, device="cpu", lora_config=None)
    assert type(wrapper) is GroupedLoraWrapper
