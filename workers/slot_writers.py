"""Members written into adapter slots, in the way that suits the slots' memory.

vLLM would fold alpha/r into B on loading an adapter. No adapter is loaded here, so alpha/r is part of the scale of B.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from workers import cpu_kernels
from workers.engine import Member, Vector
from workers.perturbation import Perturber


@dataclass(frozen=True, slots=True)
class Place:
    """Where a trained factor of a matrix goes: this rank's share of it begins at coordinate `start` of theta, as rows
    that lie `stride` apart there, and all of it is there before coordinate `stop`; times `scale`, it goes to its
    `targets` (slots, rows, columns)."""

    start: int
    stop: int
    stride: int
    scale: float
    targets: torch.Tensor

    def of(self, theta: torch.Tensor) -> torch.Tensor:
        """The factor's coordinates in theta (D,), a view."""
        return theta.as_strided(self.targets.shape[1:], (self.stride, 1), self.start)


class SlotWriter(Protocol):
    """Writes members of a perturber's population into slots."""

    def write(self, slot: int, perturber: Perturber, generation: int, sigma: float, member: Member) -> None:
        """Make a slot hold theta + sign*sigma*eps of the member."""
        ...


class StagedWriter:
    """For the memory of accelerators: theta is made beside the model and goes from there to its places."""

    def __init__(self, places: Sequence[Place], dim: int, device: torch.device) -> None:
        self._theta = torch.empty(dim)
        self._staged = torch.empty(dim, device=device)
        # Views are made once: to make them at every write takes longer than to write.
        shares = [(place.of(self._staged), place.scale, place.targets.unbind()) for place in places]
        slots = range(len(places[0].targets))
        self._copies = [[(values, scale, targets[slot]) for values, scale, targets in shares] for slot in slots]

    def write(self, slot: int, perturber: Perturber, generation: int, sigma: float, member: Member) -> None:
        """Make a slot hold theta + sign*sigma*eps of the member."""
        theta = perturber.theta(generation, sigma, member, out=self._theta.numpy())
        self._staged.copy_(torch.from_numpy(theta))
        for values, scale, target in self._copies[slot]:
            torch.mul(values, scale, out=target)


class FusedWriter:
    """For slots in one piece of the CPU's own `memory`: factors are perturbed, scaled, rounded and put in place as soon
    as their noise is drawn, while it is in the cache."""

    def __init__(self, places: Sequence[Place], rank: int, memory: torch.Tensor) -> None:
        self._memory = cpu_kernels.as_array(memory)
        self._write = cpu_kernels.factor_writer(rank)
        self._stops = [place.stop for place in places]
        self._scales = np.array([place.scale for place in places], dtype=np.float32)
        self._tables = [np.array([_row(place, slot) for place in places]) for slot in range(len(places[0].targets))]

    def write(self, slot: int, perturber: Perturber, generation: int, sigma: float, member: Member) -> None:
        """Make a slot hold theta + sign*sigma*eps of the member."""
        alpha, center = np.float32(member.sign * sigma), perturber.center
        parts = iter([(center, len(center))]) if alpha == 0 else perturber.growing_eps(generation, member.pair)
        for eps, first, last in self._whole_factors(parts):
            self._write(self._memory, center, eps, alpha, self._tables[slot][first:last], self._scales[first:last])

    def _whole_factors(self, parts: Iterator[tuple[Vector, int]]) -> Iterator[tuple[Vector, int, int]]:
        """Which factors are new each time that more noise is there: first, and past the last."""
        written = 0
        for eps, there in parts:
            whole = bisect(self._stops, there)
            yield eps, written, whole
            written = whole


def _row(place: Place, slot: int) -> tuple[int, ...]:
    """A row of the kernel's table."""
    _, rows, columns = place.targets.shape
    leap, *strides = place.targets.stride()
    return place.start, rows, columns, place.stride, place.targets.storage_offset() + slot * leap, *strides
