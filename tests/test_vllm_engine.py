"""One vLLM engine against PEFT and `HfEngine`: what it reads from its slots as they are written and written again, what
it generates from them, and the noise that it draws. Its start is the costly part, so that all tests share it.

Log-probabilities are checked against transformers + PEFT, greedy tokens against `HfEngine`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from inputs import random_center, random_prompts
from vllm_engines import (
    FLOAT32_TOLERANCE,
    GREEDY,
    LARGE_CACHE,
    MEMBERS,
    NO_CACHE,
    RUN_SEED,
    SIGMA,
    SLOTS,
    Reference,
    as_rows,
    build_engine,
    differences,
    member_theta,
    texts,
    uneven,
)

from es_engine import noise
from es_engine.spaces.lora import LoraSpace, Train
from workers import vllm_engine
from workers.engine import CENTER, Completion, Member, Request, Sampling
from workers.hf_engine import HfEngine
from workers.models import linear_matrices
from workers.vllm_engine import VllmEngine

pytestmark = pytest.mark.vllm

END = 2


@pytest.fixture(scope="module")
def space(random_llama: Path) -> LoraSpace:
    return LoraSpace(linear_matrices(random_llama, "all-linear"), rank=5, alpha=16.0, train="B")


@pytest.fixture(scope="module")
def started(random_llama: Path, space: LoraSpace) -> VllmEngine:
    return build_engine(random_llama, space)


@pytest.fixture(scope="module")
def hf(random_llama: Path, space: LoraSpace) -> HfEngine:
    return HfEngine(random_llama, space, RUN_SEED, NO_CACHE, "float32")


@pytest.fixture
def engine(started: VllmEngine, hf: HfEngine, space: LoraSpace) -> VllmEngine:
    """The shared engine, with the slots of generation 0 around the random center, as in the reference."""
    for each in (started, hf):
        each.set_center(random_center(space))
        each.write_slots(0, SIGMA, MEMBERS)
    return started


def test_a_type_that_vllm_has_no_lora_in_on_a_gpu_is_refused(
    random_llama: Path, space: LoraSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    with pytest.raises(ValueError, match=r"^engine.dtype: got float32, accepted on a GPU are bfloat16 and float16$"):
        build_engine(random_llama, space)


def test_the_type_of_the_weights_is_known(started: VllmEngine) -> None:
    """The model that gradients are taken with has the same, also where it is vLLM's own choice."""
    assert started.dtype == "float32"


# What slots hold


def test_without_an_adapter_the_engine_is_the_base_model(
    engine: VllmEngine, random_llama: Path, space: LoraSpace, tmp_path: Path
) -> None:
    prompts = random_prompts(3, 20, 60)
    expected = Reference(random_llama, space, tmp_path).logprobs(None, prompts)
    alone = engine.logprobs([Request(None, prompt) for prompt in prompts])
    mixed = engine.logprobs([Request(slot, prompt) for slot in (None, 3) for prompt in prompts])
    assert differences(alone, expected).max() < FLOAT32_TOLERANCE
    assert differences(mixed[: len(prompts)], expected).max() < FLOAT32_TOLERANCE


def test_zero_is_the_base_model_in_every_slot(engine: VllmEngine, space: LoraSpace) -> None:
    prompts = random_prompts(12, 30)
    engine.set_center(np.zeros(space.dim, dtype=np.float32))
    engine.write_slots(0, SIGMA, [CENTER] * SLOTS)
    base = engine.logprobs([Request(None, prompt) for prompt in prompts])
    for slot in range(SLOTS):
        found = engine.logprobs([Request(slot, prompt) for prompt in prompts])
        assert differences(found, base).max() < FLOAT32_TOLERANCE


def test_a_prompt_of_one_token_has_no_logprobs(engine: VllmEngine) -> None:
    assert [len(found) for found in engine.logprobs([Request(0, (5,)), Request(None, (5, 6))])] == [0, 1]


def test_slots_written_again_hold_nothing_of_the_members_before(engine: VllmEngine) -> None:
    requests = [Request(slot, prompt) for slot in range(SLOTS) for prompt in random_prompts(9, 33)]
    before = engine.logprobs(requests)
    engine.write_slots(1, 3 * SIGMA, [Member(pair, -1) for pair in range(8, 8 + SLOTS)])
    assert differences(engine.logprobs(requests), before).mean() > 0.5
    engine.write_slots(0, SIGMA, MEMBERS)
    for again, once in zip(engine.logprobs(requests), before, strict=True):
        np.testing.assert_array_equal(again, once)


def test_members_without_finite_numbers_leave_nothing_in_the_cache_for_others(
    engine: VllmEngine, space: LoraSpace
) -> None:
    """They fill all of its blocks, whose ends the prompts of the others then leave as they are."""
    requests = [Request(slot, prompt) for prompt in random_prompts(9, 33, 150) for slot in range(SLOTS)]
    before = engine.logprobs(requests)
    engine.set_center(np.full(space.dim, 1e30, dtype=np.float32))
    engine.write_slots(0, SIGMA, MEMBERS)
    wild = [Request(number % SLOTS, prompt) for number, prompt in enumerate(random_prompts(*[255] * 260))]
    assert len(list(engine.generate(wild, Sampling(max_tokens=1)))) == len(wild)
    engine.set_center(random_center(space))
    engine.write_slots(0, SIGMA, MEMBERS)
    for again, once in zip(engine.logprobs(requests), before, strict=True):
        np.testing.assert_array_equal(again, once)


def test_an_engine_assigned_to_another_run_is_as_one_made_for_it(
    engine: VllmEngine, random_llama: Path, space: LoraSpace, tmp_path: Path
) -> None:
    """Through spaces that train either factor and both, of which each shares other memory, and back: the first run's
    values are the engine's own from when it was made for that run, bit for bit."""
    prompts = random_prompts(9, 33, 150)
    requests = [Request(slot, prompt) for prompt in prompts for slot in range(SLOTS)]
    engine.write_slots(2, SIGMA, MEMBERS)
    engine.write_slots(1, SIGMA, MEMBERS)
    before, sums = engine.logprobs(requests), engine.noise_sum(1, [0, 3], [1.0, -0.5]).copy()
    engine.prepare(1, SIGMA, MEMBERS)  # is under way, and would be what the other run asks for
    run_seed = RUN_SEED + 1
    for train in get_args(Train):
        other = LoraSpace(space.matrices, rank=space.rank, alpha=9.0, train=train, units="raw", seed=5)
        center = random_center(other, 0.1)
        engine.assign(other, run_seed, LARGE_CACHE)
        engine.set_center(center)
        engine.write_slots(1, SIGMA / 3, MEMBERS)
        found, base = engine.logprobs(requests), engine.logprobs([Request(None, prompt) for prompt in prompts])
        reference = Reference(random_llama, other, tmp_path / train)
        for slot, member in enumerate(MEMBERS):
            eps = noise.draw(run_seed, 1, member.pair, other.dim)
            expected = reference.logprobs(center + np.float32(member.sign * SIGMA / 3) * eps, prompts)
            assert differences(expected, base).mean() > 0.1, "an adapter too weak to be told from another"
            assert differences(found[slot::SLOTS], expected).max() < FLOAT32_TOLERANCE
    engine.assign(space, RUN_SEED, LARGE_CACHE)
    engine.set_center(random_center(space))
    engine.write_slots(1, SIGMA, MEMBERS)
    for again, once in zip(engine.logprobs(requests), before, strict=True):
        np.testing.assert_array_equal(again, once)
    np.testing.assert_array_equal(engine.noise_sum(1, [0, 3], [1.0, -0.5]), sums)


def test_a_shorter_list_of_members_replaces_the_first_slots_and_hides_the_others(
    engine: VllmEngine, random_llama: Path, space: LoraSpace, tmp_path: Path
) -> None:
    members = [Member(6, -1), Member(5, 1)]
    engine.write_slots(2, SIGMA, members)
    prompts = random_prompts(9, 33)
    reference = Reference(random_llama, space, tmp_path)
    for slot, member in enumerate(members):
        expected = reference.logprobs(member_theta(random_center(space), 2, member), prompts)
        found = engine.logprobs([Request(slot, prompt) for prompt in prompts])
        assert differences(found, expected).max() < FLOAT32_TOLERANCE
    with pytest.raises(IndexError):
        engine.logprobs([Request(2, prompts[0])])


def test_more_members_than_slots_are_refused(engine: VllmEngine) -> None:
    with pytest.raises(AssertionError):
        engine.write_slots(0, SIGMA, [CENTER] * (SLOTS + 1))


def test_the_center_is_taken_by_value(engine: VllmEngine, space: LoraSpace) -> None:
    """Ray hands out read-only arrays, of which torch warns; a trainer may step theta in place."""
    requests = [Request(2, prompt) for prompt in random_prompts(20)]
    before = engine.logprobs(requests)
    theta = random_center(space)
    engine.set_center(theta)
    theta *= 0
    engine.write_slots(0, SIGMA, MEMBERS)
    np.testing.assert_array_equal(engine.logprobs(requests)[0], before[0])


# Generation


def test_what_prompts_of_a_slot_have_in_common_is_read_once(
    random_llama: Path, space: LoraSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of the engine's own choice, which are shorter than vLLM's."""
    engine = build_engine(random_llama, space, block_size=None)
    engine.set_center(random_center(space))
    engine.write_slots(0, SIGMA, MEMBERS)
    (common,) = random_prompts(64)
    requests = [Request(slot, (*common, 3 + number)) for slot in range(SLOTS) for number in range(8)]
    spared: list[int] = []
    completions = engine._completions

    def counted(output: Any, *arguments: Any, **keywords: Any) -> Iterator[Completion]:
        spared.append(output.num_cached_tokens)
        return completions(output, *arguments, **keywords)

    monkeypatch.setattr(engine, "_completions", counted)
    assert len(list(engine.generate(requests, GREEDY))) == len(requests)
    assert sorted(spared) == [0] * SLOTS + [64] * 7 * SLOTS


@pytest.mark.parametrize(
    "slots", [(0, 1, 2, 3), (3, 1, 0), (0, 3), (2,), (None,), (1, None, 3)], ids=lambda slots: f"slots {slots}"
)
def test_greedy_completions_equal_the_reference(engine: VllmEngine, hf: HfEngine, slots: Sequence[int | None]) -> None:
    requests = uneven(slots)
    found = texts(engine, requests)
    assert found == texts(hf, requests)
    assert {reason for *_, reason in found} == {"stop", "length"}, "members should finish at different times"


def test_prompts_prefilled_in_parts_complete_as_whole_ones(
    random_llama: Path, space: LoraSpace, hf: HfEngine, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of up to 200 tokens with 24 a step, prefill of some beside decoding of others; and no noise is kept."""
    whole = vllm_engine._llm_arguments
    monkeypatch.setattr(vllm_engine, "_llm_arguments", lambda *args: whole(*args) | {"max_num_batched_tokens": 24})
    parts = build_engine(random_llama, space, cache_bytes=NO_CACHE)
    parts.set_center(random_center(space))
    parts.write_slots(0, SIGMA, MEMBERS)
    requests = uneven((0, 1, 2, 3, None))
    assert texts(parts, requests) == texts(hf, requests)
    drawn = Sampling(max_tokens=16, samples=3, temperature=1.0)
    assert texts(parts, requests, drawn) == texts(engine, requests, drawn)
    assert differences(parts.logprobs(requests), engine.logprobs(requests)).max() < FLOAT32_TOLERANCE
    expected = engine.noise_sum(3, [5, 0, 2], [0.5, -2.0, 1.25])
    np.testing.assert_array_equal(parts.noise_sum(3, [5, 0, 2], [0.5, -2.0, 1.25]), expected)


@pytest.mark.parametrize("repeats", [2, 3])
def test_loops_end_completions_as_in_the_reference(engine: VllmEngine, hf: HfEngine, repeats: int) -> None:
    requests = [Request(slot, prompt) for slot in (0, 1, 2, 3) for prompt in random_prompts(*range(3, 15))]
    sampling = Sampling(max_tokens=24, stop=("\n",), max_repeats=repeats)
    found = texts(engine, requests, sampling)
    assert found == texts(hf, requests, sampling)
    assert {reason for *_, reason in found} >= {"repetition", "length"}


@pytest.mark.parametrize("length", [1, 2], ids=["found by its tokens", "found in the text"])
def test_a_completion_ends_before_its_stop_string(engine: VllmEngine, length: int) -> None:
    requests = uneven((0, 1, 2, 3))
    free = texts(engine, requests, Sampling(max_tokens=24))
    stop = next(text[3 : 3 + length] for *_, text, _ in free if len(text) > 8)
    cut = texts(engine, requests, Sampling(max_tokens=24, stop=(stop, "\n")))
    assert sum(stop in text for *_, text, _ in free) > 0
    for (*_, free_ids, free_text, _), (*_, ids, text, reason) in zip(free, cut, strict=True):
        stops = [free_text.index(each) for each in (stop, "\n") if each in free_text]
        assert text == free_text[: min(stops, default=None)]
        assert ids == free_ids[: len(ids)]
        assert reason == ("stop" if stops or ids[-1] == END else "length")


def test_samples_are_seeded_and_differ(engine: VllmEngine) -> None:
    sampling = Sampling(max_tokens=16, samples=3, temperature=1.0)

    def sample(seed: int) -> list[Any]:
        prompts = random_prompts(5, 40)
        return texts(engine, [Request(slot, prompt, seed) for slot in (0, 3, None) for prompt in prompts], sampling)

    found = sample(11)
    assert [each[:2] for each in found] == [(request, sample) for request in range(6) for sample in range(3)]
    assert found == sample(11)
    for request in range(6):
        assert len({ids for number, _, ids, *_ in found if number == request}) == 3
    # Sample i of a seed is sample 0 of the i-th next one, which hashed seeds do not come upon.
    assert sum(one == other for one, other in zip(found, sample(1100), strict=True)) <= 2


def test_samples_belong_to_their_request(engine: VllmEngine) -> None:
    """With top_p near 0 every sample is the greedy completion of its own prompt, by its own slot."""
    requests = uneven((0, 3, None))
    greedy = texts(engine, requests, Sampling(max_tokens=8))
    sampled = texts(engine, requests, Sampling(max_tokens=8, samples=3, temperature=1.0, top_p=1e-6))
    assert [ids for _, _, ids, *_ in sampled] == [ids for _, _, ids, *_ in greedy for _ in range(3)]


@pytest.mark.parametrize("stop", ["\n", "ab"], ids=["found by its tokens", "found in the text"])
def test_logprobs_of_completions_are_the_models_own(engine: VllmEngine, hf: HfEngine, stop: str) -> None:
    """Those of a prompt that goes on with the tokens, whatever they were sampled with."""
    requests = uneven((0, 3, None))
    lean = Sampling(max_tokens=16, samples=2, temperature=0.6, top_p=0.8, stop=(stop,), max_repeats=3)
    asked = list(engine.generate(requests, replace(lean, logprobs=True)))
    assert as_rows(asked) == texts(engine, requests, lean)
    assert all(each.logprobs is None for each in engine.generate(requests[:1], lean))
    wholes = [
        replace(requests[each.request], prompt_ids=requests[each.request].prompt_ids + each.token_ids) for each in asked
    ]
    found = [np.array(each.logprobs) for each in asked]
    for reference in (engine, hf):
        rows = reference.logprobs(wholes)
        said = [row[-len(each.token_ids) :] for row, each in zip(rows, asked, strict=True)]
        assert differences(found, said).max() < FLOAT32_TOLERANCE


def test_the_largest_seed_is_accepted(engine: VllmEngine) -> None:
    sampling = Sampling(max_tokens=4, samples=3, temperature=0.7, top_p=0.9)
    assert len(texts(engine, [Request(0, (5, 6, 7), seed=2**63 - 1)], sampling)) == 3


def test_the_same_composition_gives_the_same_bits(engine: VllmEngine) -> None:
    requests = uneven((0, 1, 2, 3, None))
    once, again = engine.logprobs(requests), engine.logprobs(requests)
    for one, other in zip(once, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_generation_given_up_leaves_nothing_behind(engine: VllmEngine, hf: HfEngine) -> None:
    from vllm.exceptions import VLLMValidationError

    requests = uneven((0, 1, 2, 3))
    given_up = engine.generate(requests, GREEDY)
    next(given_up)
    given_up.close()  # type: ignore[attr-defined]
    with pytest.raises(VLLMValidationError, match="256 tokens"):
        list(engine.generate([Request(0, (5, 6)), Request(1, (5,) * 300)], GREEDY))
    fewer = uneven((2, 1))
    assert texts(engine, fewer) == texts(hf, fewer)


# Sleep


def test_a_rested_engine_goes_on_with_its_slots(
    engine: VllmEngine, hf: HfEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the memory stays where it is, but all else is as on a GPU."""
    monkeypatch.setattr(engine, "_rests", True)
    requests = uneven((0, 1, None))
    members = (Member(8, 1), Member(8, -1))
    engine.prepare(0, SIGMA, members)
    for _ in range(2):
        engine.rest()
    assert engine._llm.llm_engine.is_sleeping()
    np.testing.assert_array_equal(engine.noise_sum(0, [3], [1.0]), hf.noise_sum(0, [3], [1.0]))
    for _ in range(2):
        engine.wake()
    assert texts(engine, requests) == texts(hf, requests)
    for each in (engine, hf):
        each.write_slots(0, SIGMA, members)
    assert texts(engine, requests) == texts(hf, requests)


# The prefix cache


@pytest.fixture
def long_requests() -> list[Request]:
    """Prompts that fill several blocks of 32 tokens and share their beginning."""
    first, second = random_prompts(140, 60)
    return [Request(0, first), Request(0, first[:100] + second)]


def test_a_rewritten_slot_is_not_answered_from_the_prefix_cache(
    engine: VllmEngine, hf: HfEngine, long_requests: list[Request]
) -> None:
    for generation, member in [(0, Member(0, 1)), (0, Member(1, 1)), (1, Member(0, 1)), (1, Member(0, -1))]:
        for each in (engine, hf):
            each.write_slots(generation, SIGMA, [member])
        assert texts(engine, long_requests) == texts(hf, long_requests)


def test_a_name_used_twice_would_be_answered_from_the_prefix_cache(
    engine: VllmEngine, hf: HfEngine, long_requests: list[Request]
) -> None:
    """The trap that the test above guards against is there."""
    engine.write_slots(0, SIGMA, [Member(0, 1)])
    names = engine._names
    texts(engine, long_requests)
    for each in (engine, hf):
        each.write_slots(0, SIGMA, [Member(1, 1)])
    engine._names = names
    assert texts(engine, long_requests) != texts(hf, long_requests)


def test_faster_layers_are_in_use(engine: VllmEngine) -> None:
    from vllm import ir
    from vllm.platforms import current_platform

    from workers import cpu_tuning

    if not current_platform.is_cpu():
        pytest.skip("for CPUs only")
    assert ir.ops.rms_norm.get_priority()[0] == ir.ops.fused_add_rms_norm.get_priority()[0] == cpu_tuning.PROVIDER
    runner = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    assert type(runner.model.model.layers[0].mlp.act_fn) is cpu_tuning._SiluAndMul
    assert runner.sampler._forward_pre_hooks


# Slots written ahead


def count_writes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows by what every set of slots is filled with."""
    from workers.vllm_extension import SlotExtension

    written: list[Any] = []
    write = SlotExtension._es_write_set

    def counted(self: Any, *filling: Any) -> Any:
        written.append(filling)
        return write(self, *filling)

    monkeypatch.setattr(SlotExtension, "_es_write_set", counted)
    return written


def test_slots_written_ahead_are_the_slots_written_at_need(
    engine: VllmEngine, hf: HfEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the chunk before is still generating, and without disturbing it."""
    members = (Member(8, 1), Member(8, -1), Member(9, 1))
    requests = [Request(slot, prompt) for slot in range(3) for prompt in random_prompts(9, 20)]
    written = count_writes(monkeypatch)
    before = texts(hf, requests)
    completions = engine.generate(requests, GREEDY)
    found = [next(completions)]
    engine.prepare(0, SIGMA, members)
    assert as_rows([*found, *completions]) == before
    for each in (engine, hf):
        each.write_slots(0, SIGMA, members)
    assert texts(engine, requests) == texts(hf, requests) != before
    assert written == [(0, SIGMA, members)]


@pytest.mark.parametrize("change", ["center", "sigma", "members", "generation"])
def test_slots_written_ahead_for_something_else_are_written_again(
    engine: VllmEngine, hf: HfEngine, space: LoraSpace, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    members = (Member(8, 1), Member(8, -1), Member(9, 1))
    requests = [Request(slot, prompt) for slot in range(3) for prompt in random_prompts(9, 20)]
    written = count_writes(monkeypatch)
    engine.prepare(1 if change == "generation" else 0, SIGMA, members)
    if change == "center":
        for each in (engine, hf):
            each.set_center(random_center(space, 0.2))
    sigma = SIGMA / 2 if change == "sigma" else SIGMA
    wanted = members[::-1] if change == "members" else members
    for each in (engine, hf):
        each.write_slots(1 if change == "generation" else 0, sigma, wanted)
    assert texts(engine, requests) == texts(hf, requests)
    # A later generation's center is not known yet, so nothing is written ahead for it.
    assert len(written) == (1 if change == "generation" else 2)


def test_a_write_ahead_that_fails_is_told_and_never_taken_for_done(
    engine: VllmEngine, hf: HfEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Request(0, prompt) for prompt in random_prompts(9, 20)]
    with monkeypatch.context() as patch:
        patch.setattr("workers.slot_writers.FusedWriter.write", lambda self, *member: 1 / 0)
        engine.prepare(0, SIGMA, MEMBERS[3:])
        with pytest.raises(ZeroDivisionError):
            engine.write_slots(0, SIGMA, MEMBERS[3:])
    for each in (engine, hf):
        each.write_slots(0, SIGMA, MEMBERS[3:])
    assert texts(engine, requests) == texts(hf, requests)


def test_where_memory_is_short_there_is_one_set_of_slots(
    random_llama: Path, space: LoraSpace, hf: HfEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "SECOND_SET_BYTES", 2 * SLOTS * space.adapter_bytes - 1)
    engine = build_engine(random_llama, space)
    assert engine._llm.llm_engine.vllm_config.lora_config.max_loras == SLOTS
    requests = [Request(slot, prompt) for slot in range(SLOTS) for prompt in random_prompts(9, 20)]
    for each in (engine, hf):
        each.set_center(random_center(space))
        each.write_slots(0, SIGMA, MEMBERS)
    written = count_writes(monkeypatch)
    engine.prepare(0, SIGMA, MEMBERS[::-1])
    engine.noise_sum(0, [0], [1.0])  # waits for the background
    assert not written
    assert texts(engine, requests) == texts(hf, requests)
    for each in (engine, hf):
        each.write_slots(0, SIGMA, MEMBERS[::-1])
    assert texts(engine, requests) == texts(hf, requests)


# Noise


def test_noise_drawn_ahead_is_the_noise_drawn_at_need(engine: VllmEngine) -> None:
    members = (Member(8, 1), Member(9, -1))
    requests = [Request(slot, prompt) for slot in (0, 1) for prompt in random_prompts(9, 20)]
    engine.prepare(11, SIGMA, members)
    found = []
    for generation in (11, 12, 11):
        engine.write_slots(generation, SIGMA, members)
        found.append(np.concatenate(engine.logprobs(requests)))
    np.testing.assert_array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[1])


def test_noise_sum_is_the_weighted_sum(engine: VllmEngine, hf: HfEngine, space: LoraSpace) -> None:
    """Pairs 0 and 3 are in the engine's cache, 9 is not; the reference keeps none."""
    pairs, weights = [3, 9, 0], [0.5, -1.25, 2.0]
    drawn = [noise.draw(RUN_SEED, 0, pair, space.dim).astype(np.float64) for pair in pairs]
    exact = sum(weight * eps for weight, eps in zip(weights, drawn, strict=True))
    found = engine.noise_sum(0, pairs, weights)
    np.testing.assert_allclose(found, exact, atol=1e-6)
    np.testing.assert_array_equal(found, hf.noise_sum(0, pairs, weights))


# Tensor parallelism


@pytest.fixture
def parallel(random_llama: Path, space: LoraSpace, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmEngine]:
    # vLLM binds each process to a NUMA node of its own, of which a small machine has one.
    monkeypatch.setattr("vllm.envs.VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engine = build_engine(random_llama, space, tensor_parallel=2)
    yield engine
    engine._llm.llm_engine.engine_core.engine_core.model_executor.shutdown()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPU cores")
def test_tensor_parallel_slots_hold_each_ranks_share(
    engine: VllmEngine, hf: HfEngine, parallel: VllmEngine, space: LoraSpace
) -> None:
    """q, gate and up are cut along their outputs, o and down along their inputs, the one head of k and v is copied."""
    parallel.set_center(random_center(space))
    parallel.write_slots(0, SIGMA, MEMBERS)
    requests = [Request(slot, prompt) for slot in range(SLOTS) for prompt in random_prompts(5, 40, 100)]
    assert differences(parallel.logprobs(requests), engine.logprobs(requests)).max() < FLOAT32_TOLERANCE
    assert texts(parallel, requests) == texts(hf, requests)
    expected = engine.noise_sum(0, [0, 3], [1.0, -0.5])
    np.testing.assert_array_equal(parallel.noise_sum(0, [0, 3], [1.0, -0.5]), expected)
    for train in get_args(Train):  # of a run that it is assigned to afterwards
        other = LoraSpace(space.matrices, rank=space.rank, alpha=9.0, train=train, units="raw", seed=5)
        before = parallel.logprobs(requests)
        for each in (engine, parallel):
            each.assign(other, RUN_SEED + 1, LARGE_CACHE)
            each.set_center(random_center(other, 0.1))
            each.write_slots(0, SIGMA / 3, MEMBERS)
        found = parallel.logprobs(requests)
        assert differences(found, before).mean() > 0.1
        assert differences(found, engine.logprobs(requests)).max() < FLOAT32_TOLERANCE
        np.testing.assert_array_equal(parallel.noise_sum(0, [3], [1.0]), engine.noise_sum(0, [3], [1.0]))
    engine.assign(space, RUN_SEED, LARGE_CACHE)
