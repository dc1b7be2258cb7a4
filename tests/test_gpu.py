"""The engine, the gradients and whole runs on a GPU, where there is one: against PEFT in float32 on the CPU.

vLLM's LoRA is in 16 bits on a GPU and its sums have no fixed order there, so that tolerances are those of float16;
members are as far apart as to be told from each other all the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as workers have it; read at torch's first product

import numpy as np
import psutil
import pytest
import torch
from inputs import random_center, random_prompts
from programs import run
from simple_losses import MeanNll
from vllm_engines import (
    GREEDY,
    LARGE_CACHE,
    MEMBERS,
    RUN_SEED,
    SIGMA,
    SLOTS,
    Reference,
    build_engine,
    differences,
    member_theta,
    texts,
)

from es_engine import noise
from es_engine.spaces.lora import LoraSpace, Train
from workers.engine import Member, Request, Sampling
from workers.gradient import GradientModel
from workers.models import linear_matrices
from workers.samples import Sample, reads_prompts_once
from workers.vllm_engine import VllmEngine

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CONFIG = Path(__file__).parents[1] / "configs/countdown_tiny.yaml"
FLOAT16_TOLERANCE = 0.05
APART = 0.3
"""Mean difference, at least, between log-probabilities of different members."""
MEMORY = {"dtype": "float16", "gpu_memory_utilization": 0.2, "block_size": None}


@pytest.fixture(scope="module")
def space(random_llama: Path) -> LoraSpace:
    return LoraSpace(linear_matrices(random_llama, "all-linear"), rank=5, alpha=16.0, train="B")


@pytest.fixture(scope="module")
def started(random_llama: Path, space: LoraSpace) -> VllmEngine:
    return build_engine(random_llama, space, **MEMORY, rests=True)


@pytest.fixture
def engine(started: VllmEngine, space: LoraSpace) -> VllmEngine:
    started.set_center(random_center(space))
    started.write_slots(0, SIGMA, MEMBERS)
    return started


def of_all_slots(*lengths: int) -> list[Request]:
    return [Request(slot, prompt) for prompt in random_prompts(*lengths) for slot in range(SLOTS)]


def used_bytes() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_slots_hold_their_members_and_none_is_the_base_model(
    engine: VllmEngine, random_llama: Path, space: LoraSpace, tmp_path: Path
) -> None:
    prompts = random_prompts(9, 33, 150)
    reference = Reference(random_llama, space, tmp_path)
    requests = [Request(slot, prompt) for prompt in prompts for slot in (*range(SLOTS), None)]
    found = engine.logprobs(requests)
    base = reference.logprobs(None, prompts)
    assert differences(found[SLOTS :: SLOTS + 1], base).max() < FLOAT16_TOLERANCE
    for slot, member in enumerate(MEMBERS):
        expected = reference.logprobs(member_theta(random_center(space), 0, member), prompts)
        assert differences(expected, base).mean() > APART
        assert differences(found[slot :: SLOTS + 1], expected).max() < FLOAT16_TOLERANCE


@pytest.mark.parametrize("train", get_args(Train))
def test_an_engine_assigned_to_another_run_holds_its_members(
    engine: VllmEngine, random_llama: Path, space: LoraSpace, tmp_path: Path, train: Train
) -> None:
    prompts = random_prompts(9, 33)
    other = LoraSpace(space.matrices, rank=space.rank, alpha=9.0, train=train, units="raw", seed=5)
    center = random_center(other, 0.1)
    engine.assign(other, RUN_SEED + 1, LARGE_CACHE)
    engine.set_center(center)
    engine.write_slots(1, SIGMA / 3, MEMBERS)
    found = engine.logprobs(of_all_slots(9, 33))
    reference = Reference(random_llama, other, tmp_path)
    for slot, member in enumerate(MEMBERS):
        eps = noise.draw(RUN_SEED + 1, 1, member.pair, other.dim)
        expected = reference.logprobs(center + np.float32(member.sign * SIGMA / 3) * eps, prompts)
        assert differences(found[slot::SLOTS], expected).max() < FLOAT16_TOLERANCE
    engine.assign(space, RUN_SEED, LARGE_CACHE)


def test_slots_written_ahead_hold_what_those_written_at_once_hold(engine: VllmEngine) -> None:
    others = tuple(Member(pair, -1) for pair in range(8, 8 + SLOTS))
    requests = of_all_slots(9, 33)
    before = engine.logprobs(requests)
    engine.write_slots(0, SIGMA, others)
    at_once = engine.logprobs(requests)
    engine.write_slots(0, SIGMA, MEMBERS)
    engine.prepare(0, SIGMA, others)
    assert differences(engine.logprobs(requests), before).max() < FLOAT16_TOLERANCE, "written under those in use"
    engine.write_slots(0, SIGMA, others)
    assert differences(engine.logprobs(requests), at_once).max() < FLOAT16_TOLERANCE
    assert differences(at_once, before).mean() > APART


def test_what_is_generated_is_the_members_own_and_never_from_the_prefix_cache_of_one_before(
    engine: VllmEngine, random_llama: Path, space: LoraSpace, tmp_path: Path
) -> None:
    (prompt,) = random_prompts(140)
    reference = Reference(random_llama, space, tmp_path)
    asked = Sampling(max_tokens=16, logprobs=True)
    for generation, member in [(0, Member(0, 1)), (0, Member(1, 1)), (1, Member(0, 1)), (1, Member(0, -1))]:
        engine.write_slots(generation, SIGMA, [member])
        (completion,) = engine.generate([Request(0, prompt)], asked)
        theta = member_theta(random_center(space), generation, member)
        (expected,) = reference.logprobs(theta, [prompt + completion.token_ids])
        found = np.array(completion.logprobs)
        assert differences([found], [expected[-len(found) :]]).max() < FLOAT16_TOLERANCE


def test_members_without_finite_numbers_leave_nothing_in_the_cache_for_others(
    engine: VllmEngine, space: LoraSpace
) -> None:
    """They fill all of its blocks, whose ends the prompts of the others then leave as they are."""
    requests = of_all_slots(9, 33, 150)
    before, greedy = engine.logprobs(requests), texts(engine, requests)
    engine.set_center(np.full(space.dim, 1e30, dtype=np.float32))
    engine.write_slots(0, SIGMA, MEMBERS)
    blocks = engine._llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    wild = [Request(number % SLOTS, prompt) for number, prompt in enumerate(random_prompts(*[255] * (blocks // 15)))]
    assert len(list(engine.generate(wild, Sampling(max_tokens=1)))) == len(wild)
    engine.set_center(random_center(space))
    engine.write_slots(0, SIGMA, MEMBERS)
    assert differences(engine.logprobs(requests), before).max() < FLOAT16_TOLERANCE
    again = texts(engine, requests)
    assert sum(one == other for one, other in zip(again, greedy, strict=True)) > len(greedy) * 3 / 4


def test_samples_are_seeded(engine: VllmEngine) -> None:
    sampling = Sampling(max_tokens=8, samples=3, temperature=1.0)
    requests = [Request(slot, prompt, 11) for slot in (0, 3, None) for prompt in random_prompts(5, 40)]
    once, again = texts(engine, requests, sampling), texts(engine, requests, sampling)
    assert sum(one == other for one, other in zip(once, again, strict=True)) > len(once) * 3 / 4
    assert len({ids for *_, ids, _, _ in once}) > len(once) / 2


def test_a_rested_engine_frees_the_gpu_and_goes_on_with_its_slots(engine: VllmEngine) -> None:
    requests = of_all_slots(9, 33)
    before, used = engine.logprobs(requests), used_bytes()
    engine.prepare(0, SIGMA, (Member(8, 1), Member(8, -1)))
    for _ in range(2):
        engine.rest()
    assert used - used_bytes() > 32 << 20, "the KV cache alone is that large"
    for _ in range(2):
        engine.wake()
    assert differences(engine.logprobs(requests), before).max() < FLOAT16_TOLERANCE
    assert texts(engine, requests, GREEDY)


@pytest.mark.parametrize("prompts", [4, 1], ids=["prompts that differ", "a prompt that is read once"])
def test_gradients_are_those_of_a_cpu_and_the_same_again(prompts: int, random_llama: Path, space: LoraSpace) -> None:
    asked = random_prompts(*[30] * prompts)
    samples = [Sample(asked[place % prompts], ids) for place, ids in enumerate(random_prompts(11, 2, 16, 13))]
    assert reads_prompts_once(samples) == (prompts == 1)
    loss = MeanNll(sum(len(sample.completion_ids) for sample in samples))
    found = []
    for device in ("cpu", "cuda"):
        model = GradientModel(random_llama, space, "float32", device)
        model.set_theta(random_center(space, 0.1))
        found.append(model.gradient(loss, samples).gradient)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-3 * float(np.abs(found[0]).max()))
    held = torch.cuda.memory_allocated()
    model.rest()
    assert torch.cuda.memory_allocated() < held
    model.wake()
    np.testing.assert_array_equal(model.gradient(loss, samples).gradient, found[1])


# Whole runs


def command(folder: Path, *changes: str) -> list[str]:
    small = ("engine.dtype=bfloat16", "engine.gpu_memory_utilization=0.3", "model.steps=60", "evaluation.problems=64")
    sets = [part for change in (*small, *changes) for part in ("--set", change)]
    program = Path(sys.executable).with_name("es-engine")
    return [str(program), "train", str(CONFIG), "--run-dir", str(folder), *sets]


GRADIENTS = {
    "grpo": "{kind: grpo, prompts: 16, samples: 4}",
    "opd": "{kind: opd, form: exact, prompts: 16, samples: 4, teacher: {adapter: ES/adapter}}",
    "sft": "{kind: sft, batch: 32}",
    "dpo": "{kind: dpo, batch: 16, samples: 4}",
}


@pytest.fixture(scope="module")
def es_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "es"
    run(command(folder, "budget.generations=4", "method.population=16", "method.prompts=16"), folder.parent)
    return folder


@pytest.mark.ray
def test_a_run_of_es_ends_well(es_run: Path) -> None:
    assert generations(es_run) == 4


@pytest.mark.ray
@pytest.mark.parametrize("method", GRADIENTS)
def test_a_run_with_gradients_ends_well(es_run: Path, tmp_path: Path, method: str) -> None:
    folder = tmp_path / method
    changed = GRADIENTS[method].replace("ES", str(es_run))
    changes = ("budget.generations=3", f"method={changed}", "optimizer={kind: adam, lr: 0.001}")
    run(command(folder, *changes), tmp_path)
    assert generations(folder) == 3


@pytest.mark.ray
def test_a_run_goes_on_after_its_worker_is_killed(tmp_path: Path) -> None:
    """Its memory of the GPU is free again when another takes its place."""
    folder = tmp_path / "run"
    changes = ("budget.generations=25", "method.population=16", "method.prompts=16", "pool.workers=1")
    with subprocess.Popen(
        command(folder, *changes), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:
        while driver.poll() is None and not ((folder / "ledger.jsonl").exists() and generations(folder) > 2):
            time.sleep(0.2)
        killed = [each for each in psutil.Process(driver.pid).children(recursive=True) if is_worker(each)]
        for each in killed:
            each.kill()
        said, _ = driver.communicate()
    assert killed, said[-3000:]
    assert driver.returncode == 0, said[-3000:]
    assert generations(folder) == 25


def is_worker(process: psutil.Process) -> bool:
    return "ray::Worker" in " ".join(process.cmdline())


def generations(folder: Path) -> int:
    return (folder / "ledger.jsonl").read_text().count('"kind":"generation"')
