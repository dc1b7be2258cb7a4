"""A member's theta and sums of noise: kept, drawn again or drawn ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from es_engine import noise
from workers.engine import CENTER, Member, Vector
from workers.perturbation import SPAN, Perturber

DIM = noise.BLOCK + 1000
PAIRS, WEIGHTS = (4, 1, 7), (0.5, -1.25, 3e-3)


def perturber(cached_pairs: int, dim: int = DIM) -> Perturber:
    made = Perturber(run_seed=5, dim=dim, cache_bytes=cached_pairs * 4 * dim)
    made.center = np.linspace(-1, 1, dim, dtype=np.float32)
    return made


def assert_nearly_equal(found: Vector, exact: npt.NDArray[np.float64]) -> None:
    """Values of order 1, rounded to float32 a few times."""
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """What is drawn from here on, as (generation, pair, in the background); pair 13 cannot be drawn there."""
    draws: list[tuple[int, int, bool]] = []

    def fill(out: Vector, run_seed: int, generation: int, pair: int, *rest: int) -> Iterator[int]:
        ahead = threading.current_thread() is not threading.main_thread()
        draws.append((generation, pair, ahead))
        if pair == 13 and ahead:
            raise MemoryError("no room for pair 13")
        return original(out, run_seed, generation, pair, *rest)

    original = noise.fill
    monkeypatch.setattr(noise, "fill", fill)
    return draws


def finish(made: Perturber) -> None:
    """Wait for the background."""
    made._background.submit(lambda: None).result(timeout=60)


# Members


def test_a_members_theta_is_the_center_and_its_noise() -> None:
    made = perturber(4)
    eps = noise.draw(5, 2, 3, DIM)
    for sign in (1, -1):
        assert_nearly_equal(made.theta(2, 0.3, Member(3, sign)), made.center + sign * 0.3 * eps.astype(np.float64))


def test_mirrored_members_are_mirror_images() -> None:
    """Exactly, around a center of zero; and the noise itself stays as it was."""
    made = Perturber(5, DIM, 10**9)
    plus, minus = made.theta(0, 0.7, Member(1, 1)), made.theta(0, 0.7, Member(1, -1))
    assert plus.tobytes() == (-minus).tobytes()
    assert made.eps(0, 1).tobytes() == noise.draw(5, 0, 1, DIM).tobytes()


def test_the_center_is_unperturbed() -> None:
    made = perturber(4)
    assert np.array_equal(made.theta(0, 0.3, CENTER), made.center)
    assert np.array_equal(made.theta(0, 0.0, Member(1, 1)), made.center)


@pytest.mark.parametrize("cached_pairs", [0, 1, 2, 100])
def test_room_that_is_given_is_written_and_nothing_else_is(cached_pairs: int) -> None:
    made = perturber(cached_pairs)
    center, room = made.center.copy(), np.empty(DIM, dtype=np.float32)
    for pair in (0, 1, 0, 2):
        written = made.theta(1, 0.3, Member(pair, 1), out=room)
        assert written is room
        assert room.tobytes() == perturber(100).theta(1, 0.3, Member(pair, 1)).tobytes()
    assert np.array_equal(made.center, center)


# Sums


def test_the_sum_is_that_of_weighted_noise() -> None:
    drawn = [noise.draw(5, 1, pair, DIM).astype(np.float64) for pair in PAIRS]
    assert_nearly_equal(perturber(2).noise_sum(1, PAIRS, WEIGHTS), np.array(WEIGHTS) @ drawn)


@pytest.mark.parametrize("cached_pairs", [0, 3])
def test_the_sum_is_taken_in_order_in_float32(cached_pairs: int) -> None:
    """Bit for bit that of whole vectors, over the edge of a span and with a partial last block."""
    dim = SPAN + noise.BLOCK + 1000
    expected = torch.zeros(dim)
    for pair, weight in zip(PAIRS, WEIGHTS, strict=True):
        expected.add_(torch.from_numpy(noise.draw(5, 1, pair, dim)), alpha=weight)
    made = perturber(cached_pairs, dim)
    for pair in PAIRS:
        made.eps(1, pair)
    assert made.noise_sum(1, PAIRS, WEIGHTS).tobytes() == expected.numpy().tobytes()


def test_sums_are_the_same_with_any_cache() -> None:
    """Whatever was asked for before, and however much of it was forgotten."""
    sums = set()
    for cached_pairs in (0, 1, 2, 3, 100):
        made = perturber(cached_pairs)
        for generation, pair in [(1, 1), (0, 4), (1, 4), (0, 7), (1, 9), (1, 2)]:
            made.eps(generation, pair)
        sums.add(made.noise_sum(1, PAIRS, WEIGHTS).tobytes())
        sums.add(made.noise_sum(1, PAIRS, WEIGHTS).tobytes())
    assert len(sums) == 1


@given(
    edge=st.sampled_from([0, noise.BLOCK, 2 * noise.BLOCK, SPAN]),
    over=st.integers(-20, 20),
    kept=st.sets(st.sampled_from(PAIRS)),
    threads=st.integers(1, 3),
)
@settings(max_examples=20, deadline=None)
def test_sums_and_members_of_any_dimension_are_the_heads_of_larger_ones(
    edge: int, over: int, kept: set[int], threads: int
) -> None:
    """Bit for bit, with noise that is kept, drawn ahead or drawn again and on any number of threads."""
    dim = max(1, edge + over)
    made = perturber(3, dim)
    made.center = LARGER.center[:dim]
    made.prepare(1, sorted(kept))
    with torch_threads(threads):
        assert made.noise_sum(1, PAIRS, WEIGHTS).tobytes() == LARGER_SUM[:dim].tobytes()
        assert made.theta(1, 0.3, Member(7, -1)).tobytes() == LARGER_THETA[:dim].tobytes()


LARGER = perturber(0, SPAN + 100)
LARGER_SUM, LARGER_THETA = LARGER.noise_sum(1, PAIRS, WEIGHTS), LARGER.theta(1, 0.3, Member(7, -1))


def test_a_sum_disturbs_nothing_that_is_kept(drawn: list[tuple[int, int, bool]]) -> None:
    made = perturber(2)
    before = [made.eps(1, pair) for pair in (4, 1)]
    made.noise_sum(1, PAIRS, WEIGHTS)
    drawn.clear()
    assert all(made.eps(1, pair) is eps for pair, eps in zip((4, 1), before, strict=True))
    assert drawn == []


# What is kept


@pytest.mark.parametrize(("cached_pairs", "kept"), [(0, 1), (1, 1), (3, 3)])
def test_the_cache_keeps_what_its_memory_holds(cached_pairs: int, kept: int) -> None:
    made = perturber(cached_pairs)
    buffers = {made.eps(0, pair).__array_interface__["data"][0] for pair in range(10)}
    assert len(buffers) == kept


def test_the_cache_forgets_what_was_used_longest_ago() -> None:
    made = perturber(2)
    first = made.eps(0, 1)
    made.eps(0, 2)
    made.eps(0, 1)
    made.eps(0, 3)  # in the place of pair 2
    assert first.tobytes() == noise.draw(5, 0, 1, DIM).tobytes()
    assert made.eps(0, 1) is first


# What is drawn ahead


def test_prepared_noise_is_drawn_once_in_the_background(drawn: list[tuple[int, int, bool]]) -> None:
    made = perturber(4)
    made.prepare(1, [4, 1])
    made.prepare(1, [4, 1])
    for pair in (4, 1, 4):
        assert made.eps(1, pair).tobytes() == perturber(1).eps(1, pair).tobytes()
    assert [draw for draw in drawn if draw[2]] == [(1, 4, True), (1, 1, True)]
    assert len(drawn) == 2 + 3


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("use", ["eps", "theta", "noise_sum", "prepare", "another eps"])
def test_what_goes_wrong_in_the_background_is_raised_once(
    drawn: list[tuple[int, int, bool]], use: str, finished: bool
) -> None:
    made = perturber(4)
    made.prepare(1, [13])
    uses = {
        "eps": lambda: made.eps(1, 13),
        "theta": lambda: made.theta(1, 0.3, Member(13, 1)),
        "noise_sum": lambda: made.noise_sum(1, [13], [1.0]),
        "prepare": lambda: made.prepare(1, []),
        "another eps": lambda: made.eps(1, 2),
    }
    if finished or use in ("prepare", "another eps"):
        finish(made)
    with pytest.raises(MemoryError, match="pair 13"):
        uses[use]()
    uses[use]()


def test_preparing_keeps_what_is_in_use() -> None:
    """Noise of the generation in use is never given up; that of others is, the oldest first."""
    made = perturber(3)
    old = made.eps(0, 1)
    first, second = made.eps(1, 1), made.eps(1, 2)
    made.prepare(1, [3, 4])  # pair 3 in the place of the old generation, pair 4 nowhere
    finish(made)
    assert made.eps(1, 3) is old
    assert made.eps(1, 1) is first
    assert made.eps(1, 2) is second


def test_preparing_the_next_generation_keeps_this_one(drawn: list[tuple[int, int, bool]]) -> None:
    made = perturber(3)
    before = [made.eps(1, pair) for pair in (1, 2, 3)]
    drawn.clear()
    made.prepare(2, [1, 2, 3])
    made.noise_sum(1, [1, 2, 3], WEIGHTS)
    assert all(made.eps(1, pair) is eps for pair, eps in zip((1, 2, 3), before, strict=True))
    assert drawn == []


def test_preparing_keeps_what_was_prepared_for_the_same_generation(drawn: list[tuple[int, int, bool]]) -> None:
    made = perturber(3)
    for pairs in ([1], [2, 3], [4]):
        made.prepare(2, pairs)
        finish(made)
    assert [pair for _, pair, _ in drawn] == [1, 2, 3]


def test_noise_on_its_way_takes_room(drawn: list[tuple[int, int, bool]]) -> None:
    made, go_on = perturber(3), threading.Event()
    made._background.submit(go_on.wait)
    made.prepare(2, [1, 2])
    for pair in (3, 4, 3):  # pair 4 in the place of pair 3
        made.eps(2, pair)
    go_on.set()
    for pair in (1, 2):
        made.eps(2, pair)
    assert sorted(drawn) == [(2, 1, True), (2, 2, True), (2, 3, False), (2, 3, False), (2, 4, False)]


@pytest.mark.parametrize("cached_pairs", [0, 1, 2, 3])
def test_with_little_memory_less_is_drawn_ahead(drawn: list[tuple[int, int, bool]], cached_pairs: int) -> None:
    """One place is left to what is asked for next; values are the same as ever."""
    made = perturber(cached_pairs)
    made.prepare(2, [1, 2, 3, 4])
    finish(made)
    assert [pair for _, pair, _ in drawn] == [1, 2, 3, 4][: max(0, cached_pairs - 1)]
    for pair in (9, 4, 3, 2, 1):
        assert made.eps(2, pair).tobytes() == perturber(1).eps(2, pair).tobytes()


def test_drawing_ahead_changes_no_value_in_use() -> None:
    """Members and sums of one generation while the next is being drawn, in memory for one and a half of them."""
    made, alone = perturber(6), perturber(100)
    for generation in range(4):
        for pair in range(4):
            made.prepare(generation + 1, range(4))
            member = Member(pair, -1)
            assert made.theta(generation, 0.3, member).tobytes() == alone.theta(generation, 0.3, member).tobytes()
        weights = [1.0, -2.0, 0.5, 3.0]
        assert made.noise_sum(generation, range(4), weights).tobytes() == (
            alone.noise_sum(generation, range(4), weights).tobytes()
        )


def test_there_is_no_thread_before_something_is_prepared() -> None:
    made = perturber(4)
    before = set(threading.enumerate())  # those of other tests may end meanwhile
    made.noise_sum(0, PAIRS, WEIGHTS)
    made.theta(0, 0.3, Member(1, 1))
    assert set(threading.enumerate()) <= before
