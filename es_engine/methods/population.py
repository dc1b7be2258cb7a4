"""Who is in a generation, who answers which prompts, and how members are cut into chunks."""

from __future__ import annotations

from collections.abc import Sequence

from es_engine.config.method import EsMethodConfig
from workers.chunks import Chunk
from workers.engine import Member, Sampling


def members(count: int, mirrored: bool) -> list[Member]:
    """A population: mirrored pairs (+, -) side by side, or members with noise of their own."""
    if not mirrored:
        return [Member(pair, 1) for pair in range(count)]
    return [Member(pair, sign) for pair in range(count // 2) for sign in (1, -1)]


def batch_size(method: EsMethodConfig) -> int:
    """How many different prompts a generation needs."""
    return method.prompts * method.population // sharers(method)


def sharers(method: EsMethodConfig) -> int:
    """How many members, one after the other, answer the same prompts."""
    return {"population": method.population, "pair": 2, "member": 1}[method.sharing]


def places(method: EsMethodConfig, member: int) -> tuple[int, ...]:
    """The places in the generation's batch of the prompts that member number `member` answers."""
    group = member // sharers(method)
    return tuple(range(group * method.prompts, (group + 1) * method.prompts))


def chunks(
    population: Sequence[Member],
    answered: Sequence[tuple[int, ...]],
    *,
    size: int,
    generation: int,
    sigma: float,
    sampling: Sampling,
) -> list[Chunk]:
    """Cut a population into chunks of `size` members; `answered` are each member's places in the batch."""
    return [
        Chunk(
            generation=generation,
            index=index,
            sigma=sigma,
            members=tuple(population[start : start + size]),
            problems=tuple(answered[start : start + size]),
            sampling=sampling,
        )
        for index, start in enumerate(range(0, len(population), size))
    ]
