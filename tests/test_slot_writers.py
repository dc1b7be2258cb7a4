"""Both ways to write slots give the same bits, those of theta itself; what engines make of them is tested there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from es_engine import noise
from es_engine.spaces.base import Matrix
from es_engine.spaces.lora import Placement
from workers.engine import CENTER, Member
from workers.perturbation import Perturber

pytestmark = pytest.mark.vllm

SLOTS = 3
MEMBERS = (Member(3, 1), Member(3, -1), CENTER)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def factors(rank: int) -> list[tuple[str, int, int, int, int]]:
    """Factors of theta as (name, rows, columns, first row, rows of this rank): whole ones, and shares of them."""
    return [
        ("B", 700, rank, 0, 700),
        ("A", rank, 900, 0, rank),
        ("B", 40_000, rank, 0, 40_000),
        ("B", 96, rank, 32, 64),
        ("A", rank, 33, 0, rank),
        ("B", 1, rank, 0, 1),
    ]


def build(rank: int, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """Slots of these factors in one memory, their places and a perturber of theta."""
    from workers.slot_writers import Place

    slot_rank = rank + 3  # vLLM pads
    places, start, targets = [], 0, 0
    shapes = [(slot_rank, rows) if name == "B" else (slot_rank, columns) for name, rows, columns, *_ in factors(rank)]
    memory = torch.zeros(SLOTS * sum(rows * columns for rows, columns in shapes), dtype=dtype)
    for (name, rows, columns, first, count), (down, across) in zip(factors(rank), shapes, strict=True):
        size = SLOTS * down * across
        stack = memory[targets : targets + size].view(SLOTS, down, across)
        stack = stack.mT[:, :count, :rank] if name == "B" else stack[:, :rank, :columns]
        stop = start + rows * columns
        places.append(Place(start + first * columns, stop, columns, 0.3 * len(places) + 0.1, stack))
        start, targets = stop, targets + size
    perturber = Perturber(7, start, cache_bytes=4 * start)
    perturber.center = noise.draw(1, 1, 1, start)
    return memory, places, perturber


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slots_hold_theta_to_the_bit(rank: int, dtype: torch.dtype) -> None:
    from workers.slot_writers import FusedWriter, StagedWriter

    fused, places, perturber = build(rank, dtype)
    staged, staged_places, _ = build(rank, dtype)
    writers = (
        FusedWriter(places, rank, fused),
        StagedWriter(staged_places, perturber.dim, torch.device("cpu")),
    )
    for writer in writers:
        for slot, member in enumerate(MEMBERS):
            writer.write(slot, perturber, 5, 0.25, member)
    for slot, member in enumerate(MEMBERS):
        theta = torch.from_numpy(perturber.theta(5, 0.25, member))
        for place, other in zip(places, staged_places, strict=True):
            expected = (place.of(theta) * place.scale).to(dtype)
            assert torch.equal(place.targets[slot], expected)
            assert torch.equal(other.targets[slot], expected)
    assert torch.equal(fused, staged)  # neither wrote anything beside


def test_a_factor_is_written_only_when_all_its_noise_is_there() -> None:
    """Noise comes block by block; a factor that a block ends in waits for the next."""
    from workers.slot_writers import FusedWriter

    memory, places, perturber = build(2, torch.float32)
    assert any(place.start < noise.BLOCK < place.stop for place in places)
    writer = FusedWriter(places, 2, memory)
    fresh = Perturber(7, perturber.dim, cache_bytes=0)
    fresh.center = perturber.center
    perturber.eps(5, 3)
    for each in (perturber, fresh):  # noise that is kept, and noise that is drawn
        memory.zero_()
        writer.write(1, each, 5, 0.25, Member(3, 1))
        theta = torch.from_numpy(each.theta(5, 0.25, Member(3, 1)))
        assert all(torch.equal(place.targets[1], place.of(theta) * place.scale) for place in places)


def place_of(share: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The place of a B (8, 2) that begins at coordinate 10, on a rank whose share of it is this."""
    from workers.vllm_extension import SlotExtension, SlotTensor

    extension: Any = SlotExtension()
    layer = SimpleNamespace(tp_size=2, n_slices=1, lora_a_stacked=(torch.zeros(0),), slice_lora_b=share)
    extension._es_tensors = {("m", "B"): SlotTensor(layer, 0, torch.zeros(SLOTS, 1, 4, 2))}
    extension._es_space = SimpleNamespace(scaling=2.0)
    return extension._es_place(Placement(Matrix("m", 4, 8, 1.0), "B", 10, 26, (8, 2), 0.5))


def test_the_place_of_a_ranks_share() -> None:
    place = place_of(lambda b: b[4:])
    assert (place.start, place.stop, place.stride, place.scale) == (18, 26, 2, 1.0)
    assert place.targets.shape == (SLOTS, 4, 2)


def test_a_share_in_pieces_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^pool\.tensor_parallel: a worker's share of m is in several pieces"):
        place_of(lambda b: torch.cat([b[:2], b[6:]]))
