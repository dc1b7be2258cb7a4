"""What the slots of a vLLM engine hold in spaces of every kind, with an engine each, and what they cannot hold.

Log-probabilities are checked against transformers + PEFT, loaded from the adapter folder the space itself writes: a
path that shares no code with the slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from inputs import random_center, random_prompts
from vllm_engines import FLOAT32_TOLERANCE, MEMBERS, SIGMA, Reference, build_engine, differences, member_theta

from es_engine.spaces.base import Matrix
from es_engine.spaces.lora import LoraSpace, Train
from workers.engine import Request
from workers.models import linear_matrices
from workers.vllm_engine import SLOT_RANKS, slot_rank

pytestmark = pytest.mark.vllm


@dataclass(frozen=True)
class Case:
    """A model, a space and a type; the ranks that vLLM has no slots for are padded to the next it has."""

    model: str
    rank: int
    alpha: float
    train: Train
    targets: Any = "all-linear"
    dtype: str = "float32"


CASES = {
    "rank 1 in 1, A": Case("random_llama", 1, 3.0, "A"),
    "rank 5 in 8, B": Case("random_llama", 5, 16.0, "B"),
    "rank 8 in 8, AB, q and v only": Case("random_llama", 8, 4.0, "AB", ("q_proj", "v_proj")),
    "rank 16 in 16, B, biases": Case("random_qwen", 16, 40.0, "B"),
    "rank 40 in 64, AB, biases": Case("random_qwen", 40, 16.0, "AB"),
    "rank 5 in 8, B, bfloat16": Case("random_llama", 5, 16.0, "B", dtype="bfloat16"),
}


def build_space(model: Path, case: Case) -> LoraSpace:
    return LoraSpace(linear_matrices(model, case.targets), rank=case.rank, alpha=case.alpha, train=case.train)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_slot_of_a_batch_gives_its_own_members_logprobs(
    case: Case, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: Path = request.getfixturevalue(case.model)
    space = build_space(model, case)
    engine = build_engine(model, space, dtype=case.dtype)
    center = random_center(space)
    engine.set_center(center)
    engine.write_slots(5, SIGMA, MEMBERS)
    prompts = random_prompts(2, 17, 40, 150)
    slots: list[int | None] = [*range(len(MEMBERS)), None]
    # Prompt by prompt, so that neighbours in the batch have different adapters, and one of them none.
    found = engine.logprobs([Request(slot, prompt) for prompt in prompts for slot in slots])

    reference = Reference(model, space, tmp_path)
    base = reference.logprobs(None, prompts)
    for place, slot in enumerate(slots):
        theta = None if slot is None else member_theta(center, 5, MEMBERS[slot])
        expected = reference.logprobs(theta, prompts)
        error = differences(found[place :: len(slots)], expected)
        effect = differences(expected, base)
        assert slot is None or effect.mean() > 0.5, "an adapter too weak to be told from another"
        if case.dtype == "float32":
            assert error.max() < FLOAT32_TOLERANCE, f"slot {slot}"
        else:  # 8 bits of mantissa through two layers: a twentieth of what an adapter changes
            assert error.mean() < 0.05, f"slot {slot}"


# What is refused


def test_slot_ranks_are_vllms_own() -> None:
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == SLOT_RANKS


@pytest.mark.parametrize(("rank", "slot"), [(1, 1), (2, 8), (5, 8), (8, 8), (9, 16), (40, 64), (321, 512), (512, 512)])
def test_a_rank_is_padded_to_the_next_of_vllms(rank: int, slot: int) -> None:
    assert slot_rank(rank) == slot


def test_a_rank_beyond_vllms_is_refused() -> None:
    with pytest.raises(ValueError, match=r"space\.rank: vLLM holds ranks up to 512, not 513"):
        slot_rank(513)


def test_a_matrix_that_vllm_does_not_adapt_is_named() -> None:
    from workers.vllm_extension import _find_slot_tensors

    def layer(parts: int) -> Any:
        stacks = tuple(torch.zeros(1, 1, 8, 4) for _ in range(parts))
        return SimpleNamespace(lora_a_stacked=stacks, lora_b_stacked=stacks)

    manager = SimpleNamespace(
        modules={"layers.0.qkv_proj": layer(2), "layers.1.qkv_proj": layer(2), "layers.0.o_proj": layer(1)},
        packed_modules={f"layers.{n}.qkv_proj": [f"layers.{n}.q_proj", f"layers.{n}.k_proj"] for n in (0, 1)},
    )
    fits = LoraSpace([Matrix("layers.1.k_proj", 4, 4, 1.0)], rank=2, alpha=2.0)
    assert ("layers.1.k_proj", "B") in _find_slot_tensors(manager, fits)
    misfit = LoraSpace([Matrix("layers.0.router", 4, 4, 1.0)], rank=2, alpha=2.0)
    with pytest.raises(ValueError, match=r"^space\.targets: .*layers\.0\.router.*k_proj, o_proj, q_proj$"):
        _find_slot_tensors(manager, misfit)
