"""Members of a population as vectors: the center, the noise around it and weighted sums of that noise.

One lives beside each set of slots. It keeps the noise of recent pairs while memory allows, and draws it again from the
seed where it does not; sums are the same either way. Both products are one fused multiply-add a coordinate, whose bits
depend neither on the place of a coordinate in memory nor on the number of threads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from es_engine import noise
from workers.engine import Member, Vector

SPAN = 8 * noise.BLOCK
"""Coordinates summed over all pairs before the next ones: enough to read at memory bandwidth, few enough for the
running sum to stay in cache."""

Key = tuple[int, int]


class Perturber:
    """The noise of a run around its current center; D = len(theta).

    It is used by one thread at a time; only `prepare` has another draw.
    """

    def __init__(self, run_seed: int, dim: int, cache_bytes: int) -> None:
        self.run_seed = run_seed
        self.dim = dim
        self.center: Vector = np.zeros(dim, dtype=np.float32)
        self._capacity = max(1, cache_bytes // (4 * dim))
        self._generation = -1
        self._kept: OrderedDict[Key, Vector] = OrderedDict()  # the one used longest ago comes first
        self._awaited: dict[Key, Future[Vector]] = {}
        self._background = ThreadPoolExecutor(1, thread_name_prefix="noise")

    def prepare(self, generation: int, pairs: Sequence[int]) -> None:
        """Have the noise of pairs drawn in the background, as far as there is room.

        Room is what is free or holds noise of generations other than this one and the one in use. What goes wrong in
        the background is raised by the next call that needs noise.
        """
        self._collect()
        for key in [(generation, pair) for pair in pairs]:
            if key in self._kept or key in self._awaited:
                continue
            if not self._can_spare_room(generation):
                return
            self._awaited[key] = self._background.submit(self._draw, key, self._make_room())

    def eps(self, generation: int, pair: int) -> Vector:
        """The noise of a pair, shape (D,); read only, and only until the next call."""
        *_, (eps, _) = self.growing_eps(generation, pair)
        return eps

    def growing_eps(self, generation: int, pair: int) -> Iterator[tuple[Vector, int]]:
        """The noise of a pair, shape (D,), as often as more of it is there, and how many coordinates are: what was
        drawn last is still in the cache."""
        self._collect()
        self._generation = generation
        key = (generation, pair)
        if self._held(key) is None:
            eps = self._make_room()
            eps = np.empty(self.dim, dtype=np.float32) if eps is None else eps
            for there in noise.fill(eps, self.run_seed, *key):
                yield eps, there
            self._kept[key] = eps
        self._kept.move_to_end(key)
        yield self._kept[key], self.dim

    def theta(self, generation: int, sigma: float, member: Member, out: Vector | None = None) -> Vector:
        """A member's own theta: center + sign * sigma * eps, in float32, shape (D,); read only without `out`."""
        if member.sign == 0 or sigma == 0:
            return self.center
        perturbed = np.empty_like(self.center) if out is None else out
        eps = torch.from_numpy(self.eps(generation, member.pair))
        torch.add(torch.from_numpy(self.center), eps, alpha=member.sign * sigma, out=torch.from_numpy(perturbed))
        return perturbed

    def noise_sum(
        self, generation: int, pairs: Sequence[int], weights: Sequence[float], out: Vector | None = None
    ) -> Vector:
        """The sum of weight * eps(pair), added in the order given in float32, shape (D,); into `out` where given.

        Noise that is gone is drawn span by span into a scratch and leaves what is kept where it is.
        """
        self._collect()
        keys = [(generation, pair) for pair in pairs]
        held = [self._held(key) for key in keys]
        total = np.empty(self.dim, dtype=np.float32) if out is None else out
        scratch = np.empty(min(SPAN, self.dim), dtype=np.float32)
        for start in range(0, self.dim, SPAN):
            part = total[start : start + SPAN]
            part.fill(0)
            sum_part = torch.from_numpy(part)
            for key, kept, weight in zip(keys, held, weights, strict=True):
                eps = self._draw(key, scratch[: len(part)], start) if kept is None else kept[start : start + SPAN]
                sum_part.add_(torch.from_numpy(eps), alpha=weight)
        return total

    def _draw(self, key: Key, out: Vector | None, start: int = 0) -> Vector:
        dim = self.dim if out is None else len(out)
        return noise.draw(self.run_seed, *key, dim, out=out, first_block=start // noise.BLOCK)

    def _held(self, key: Key) -> Vector | None:
        """The noise of a key where it is kept or on its way."""
        if key in self._awaited:
            self._kept[key] = self._awaited.pop(key).result()
        return self._kept.get(key)

    def _collect(self) -> None:
        """Take in what the background has drawn; raises what went wrong there."""
        for key in [key for key, drawn in self._awaited.items() if drawn.done()]:
            self._held(key)

    def _can_spare_room(self, generation: int) -> bool:
        """Whether noise of `generation` can be kept at no loss to what is in use; one place is left to `eps`."""
        if len(self._awaited) >= self._capacity - 1:
            return False
        return not self._is_full() or next(iter(self._kept))[0] not in (generation, self._generation)

    def _make_room(self) -> Vector | None:
        """The memory of what was used longest ago, None while there is free memory."""
        return self._kept.popitem(last=False)[1] if self._is_full() else None

    def _is_full(self) -> bool:
        return len(self._kept) + len(self._awaited) >= self._capacity
