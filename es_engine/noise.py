"""Seeded, random-access Gaussian noise.

A member's noise eps in R^D is cut into blocks of `BLOCK` coordinates. Each block is its own stream: the whole
624-word state of a Mersenne Twister is filled by the counter-based generator Philox4x64 (Salmon et al., SC'11), whose
128-bit key is (run_seed, generation) and whose counter holds (pair, block). Streams are told apart by all 64 bits of
all four numbers, so no two coincide by chance, and any slice of any member can be drawn anywhere, in any order, on
any number of threads. Filling the twister and letting torch's vectorised sampler draw from it costs a quarter of
sampling Philox directly.

Values are bit-identical for the same release of torch on the same kind of CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

Vector = npt.NDArray[np.float32]

BLOCK = 1 << 16
_MT_WORDS = 624
_MT_OFFSET = 3  # in 64-bit words: the seed, (left, seeded) and the position come first in torch's generator state
_EMPTY_STATE = torch.Generator().manual_seed(0).get_state()


def draw(
    run_seed: int, generation: int, pair: int, dim: int, out: Vector | None = None, *, first_block: int = 0
) -> Vector:
    """The noise eps of one pair: `dim` standard normal float32 values, shape (D,), from `first_block` on.

    All three keys are integers in [0, 2**64). `out`, where given, receives the values and is returned.
    """
    eps = np.empty(dim, dtype=np.float32) if out is None else out
    assert eps.shape == (dim,)
    assert eps.flags.c_contiguous
    for _ in fill(eps, run_seed, generation, pair, first_block):
        pass
    return eps


def fill(out: Vector, run_seed: int, generation: int, pair: int, first_block: int = 0) -> Iterator[int]:
    """Fill `out` as `draw` does, and say after each block how many of its values are there."""
    for index, start, stop in blocks(len(out)):
        fill_block(out[start:stop], run_seed, generation, pair, first_block + index)
        yield stop


def blocks(dim: int) -> Iterator[tuple[int, int, int]]:
    """The blocks of a vector of `dim` coordinates, each as (index, start, stop)."""
    for index, start in enumerate(range(0, dim, BLOCK)):
        yield index, start, min(start + BLOCK, dim)


def fill_block(out: Vector, run_seed: int, generation: int, pair: int, block: int) -> None:
    """Write the first len(out) <= BLOCK values of one block into `out`."""
    generator = _generator(run_seed, generation, pair, block)
    if len(out) == BLOCK:
        torch.from_numpy(out).normal_(generator=generator)
    else:
        # The sampler's values depend on how many are asked for, so a short block is the head of a whole one.
        out[:] = torch.empty(BLOCK).normal_(generator=generator).numpy()[: len(out)]


def _generator(run_seed: int, generation: int, pair: int, block: int) -> torch.Generator:
    philox = np.random.Philox(
        key=np.array([run_seed, generation], dtype=np.uint64),
        counter=np.array([0, 0, pair, block], dtype=np.uint64),
    )
    state = _EMPTY_STATE.clone()
    words = state.numpy().view(np.uint64)[_MT_OFFSET : _MT_OFFSET + _MT_WORDS]
    words[:] = philox.random_raw(_MT_WORDS) & np.uint64(0xFFFFFFFF)
    generator = torch.Generator()
    generator.set_state(state)
    return generator
