"""The noise: random access, independent streams, normal values.

Statistical tests have fixed seeds, so they give the same verdict on every run; the error rate in each is the chance
that a right implementation with other seeds would fail it.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from es_engine import noise
from es_engine.spaces.base import Matrix
from es_engine.spaces.lora import LoraSpace

Z_ONE_IN_A_MILLION = 4.9  # two-sided normal quantile of 1e-6


def whole_block(run_seed: int = 1, generation: int = 2, pair: int = 3, block: int = 0) -> noise.Vector:
    out = np.empty(noise.BLOCK, dtype=np.float32)
    noise.fill_block(out, run_seed, generation, pair, block)
    return out


def correlation_z(one: noise.Vector, other: noise.Vector) -> float:
    """Standard normal for long vectors of independent noise."""
    return float(np.corrcoef(one, other)[0, 1] * np.sqrt(len(one)))


def test_any_block_drawn_alone_equals_its_part_of_the_whole() -> None:
    dim = 3 * noise.BLOCK + 17
    whole = noise.draw(7, 8, 9, dim)
    for index, start, stop in reversed(list(noise.blocks(dim))):
        part = np.empty(stop - start, dtype=np.float32)
        noise.fill_block(part, 7, 8, 9, index)
        assert part.tobytes() == whole[start:stop].tobytes()


def test_noise_can_be_drawn_from_any_block_on() -> None:
    dim = 3 * noise.BLOCK + 17
    whole = noise.draw(7, 8, 9, dim)
    for first, start, _ in noise.blocks(dim):
        assert noise.draw(7, 8, 9, dim - start, first_block=first).tobytes() == whole[start:].tobytes()


@given(blocks=st.integers(0, 2), over=st.integers(-20, 20))
@settings(max_examples=25, deadline=None)
def test_a_smaller_dimension_is_the_head_of_a_larger_one(blocks: int, over: int) -> None:
    dim = max(0, blocks * noise.BLOCK + over)
    assert noise.draw(1, 2, 3, dim).tobytes() == noise.draw(1, 2, 3, 3 * noise.BLOCK)[:dim].tobytes()


@given(length=st.integers(1, noise.BLOCK))
@settings(max_examples=25, deadline=None)
def test_a_short_block_is_the_head_of_a_whole_one(length: int) -> None:
    assert noise.draw(1, 2, 3, length).tobytes() == whole_block()[:length].tobytes()


@given(dim=st.integers(0, 10 * noise.BLOCK))
def test_blocks_tile_the_vector(dim: int) -> None:
    cuts = list(noise.blocks(dim))
    assert [index for index, _, _ in cuts] == list(range(len(cuts)))
    assert [start for _, start, _ in cuts] == [index * noise.BLOCK for index in range(len(cuts))]
    assert [stop for _, _, stop in cuts] == [*(start for _, start, _ in cuts[1:]), *([dim] if cuts else [])]


def test_values_do_not_depend_on_where_they_are_written() -> None:
    """The vectorised sampler must not treat unaligned memory otherwise."""
    expected = noise.draw(1, 2, 3, noise.BLOCK + 5)
    for offset in range(1, 9):
        room = np.empty(noise.BLOCK + 5 + offset, dtype=np.float32)
        given_back = noise.draw(1, 2, 3, noise.BLOCK + 5, out=room[offset:])
        assert np.shares_memory(given_back, room)
        assert given_back.tobytes() == expected.tobytes()


def test_values_do_not_depend_on_threads() -> None:
    dim, before = 4 * noise.BLOCK, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = noise.draw(5, 6, 7, dim)
        torch.set_num_threads(2)
        together = np.empty(dim, dtype=np.float32)
        with ThreadPoolExecutor(4) as pool:
            jobs = [
                pool.submit(noise.fill_block, together[start:stop], 5, 6, 7, index)
                for index, start, stop in reversed(list(noise.blocks(dim)))
            ]
        assert [job.result() for job in jobs] == [None] * 4
    finally:
        torch.set_num_threads(before)
    assert together.tobytes() == alone.tobytes()


def test_torchs_own_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    noise.draw(1, 2, 3, 100)
    assert torch.equal(torch.get_rng_state(), before)


def test_blocks_come_from_a_twister_filled_by_philox() -> None:
    """The documented recipe, with numpy's Philox and MT19937 in the place of torch's generator."""
    philox = np.random.Philox(key=[11, 12], counter=[0, 0, 13, 14])
    twister = np.random.MT19937()
    words = (philox.random_raw(624) & 0xFFFFFFFF).astype(np.uint32)
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    uniform = (twister.random_raw(16) & (2**24 - 1)) * 2.0**-24
    radius, angle = np.sqrt(-2 * np.log1p(-uniform[:8])), 2 * np.pi * uniform[8:]
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    np.testing.assert_allclose(whole_block(11, 12, 13, 14)[:16], expected, atol=1e-6)


def test_values_are_pinned() -> None:
    """Ledgers of earlier runs replay only while these stay. To the last bits they may differ on other kinds of CPU."""
    expected = [-1.2214360, 0.2254456, -0.4097631, -0.8831382]
    np.testing.assert_allclose(noise.draw(0, 0, 0, 4), expected, rtol=1e-5)


def test_streams_with_other_keys_are_uncorrelated() -> None:
    """Bonferroni: 120 comparisons at 1e-6 each, so an error rate of about 1e-4."""
    small = [(1, 2, 3, 0), (2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1), (2, 1, 3, 0), (1, 3, 2, 0)]
    large = [(1 + 2**32, 2, 3, 0), (1, 2 + 2**32, 3, 0), (1, 2, 3 + 2**32, 0), (1, 2, 3, 2**32), (2**63, 2, 3, 0)]
    swapped = [(1, 2, 0, 3), (3, 2, 1, 0), (0, 0, 0, 0), (2**64 - 1, 2**64 - 2, 0, 0)]
    streams = {key: whole_block(*key) for key in small + large + swapped}
    assert len(streams) == 16
    for (key, one), (other_key, other) in itertools.combinations(streams.items(), 2):
        assert not np.isin(one[:16], other).all(), (key, other_key)
        assert abs(correlation_z(one, other)) < Z_ONE_IN_A_MILLION, (key, other_key)


def test_streams_with_other_keys_are_not_each_others_shift() -> None:
    """The same twister from another place on would be the same noise, moved. Error rate 1e-6."""
    streams = [whole_block(1, 2, pair, block) for pair in (0, 1) for block in (0, 1)]
    for one, other in itertools.combinations(streams, 2):
        cross = np.fft.irfft(np.fft.rfft(one) * np.conj(np.fft.rfft(other))) / np.sqrt(len(one))
        assert np.abs(cross).max() < 7  # BLOCK standard normals: P(any |z| > 7) < 2e-7


@pytest.mark.parametrize("key", [(0, 0, 0), (1, 2, 3), (2**40, 2**33, 5)])
def test_values_are_standard_normal(key: tuple[int, int, int]) -> None:
    """Four moments and Kolmogorov-Smirnov, each at an error rate of about 1e-6."""
    n = 8 * noise.BLOCK
    values = noise.draw(*key, n).astype(np.float64)
    variances = {1: 1, 2: 2, 3: 15, 4: 96}  # of x, x^2, x^3, x^4 for a standard normal x
    means = {1: 0, 2: 1, 3: 0, 4: 3}
    for power, variance in variances.items():
        z = ((values**power).mean() - means[power]) / np.sqrt(variance / n)
        assert abs(z) < Z_ONE_IN_A_MILLION, power
    assert stats.kstest(values, "norm").pvalue > 1e-6


def test_neighbours_are_independent() -> None:
    """No correlation at the distances at which a Box-Muller sampler could have one. Error rate 8e-6."""
    values = noise.draw(4, 5, 6, 2 * noise.BLOCK)
    for lag in (1, 2, 4, 8, 16, 624, 1248, noise.BLOCK - 1):
        assert abs(correlation_z(values[:-lag], values[lag:])) < Z_ONE_IN_A_MILLION, lag


def test_tensors_of_the_same_shape_get_different_noise() -> None:
    """One seed for every tensor gives tensors of one shape the same noise. Error rate 28e-6 for the z-tests."""
    space = LoraSpace([Matrix(f"layers.{i}.q_proj", 512, 512, 1.0) for i in range(8)], rank=8, alpha=8)
    adapter = space.adapter(noise.draw(0, 0, 0, space.dim))
    tensors = [pair.b.ravel() for pair in adapter.values()]
    assert {tensor.shape for tensor in tensors} == {(4096,)}
    for one, other in itertools.combinations(tensors, 2):
        assert not np.isin(one[:64], other).all()
        assert abs(correlation_z(one, other)) < Z_ONE_IN_A_MILLION


def test_a_fresh_adapter_is_not_made_of_the_runs_noise() -> None:
    """With equal seeds the fixed factors and the noise draw from one Philox key; their counters must be apart."""
    seed, index = 5, 2
    philox = np.random.Philox(key=[seed, index], counter=[0, 0, 0, 0])  # where the noise of pair 0, block 0 begins
    same = np.random.Generator(philox).standard_normal(64)
    space = LoraSpace([Matrix(f"m{i}", 4, 64, 1.0) for i in range(3)], rank=1, alpha=1, seed=seed)
    assert not np.allclose(space.initial[index].a[0], same / np.linalg.norm(same))
