"""The demo's pretrained model, converted from GGUF: vLLM says what transformers and PEFT say, token for token."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from inputs import random_center
from transformers import AutoModelForCausalLM, PreTrainedModel

from es_engine.spaces.lora import LoraSpace
from rewards.countdown import Countdown
from workers.engine import CENTER, Request, Sampling
from workers.models import linear_matrices
from workers.prompts import load_tokenizer
from workers.vllm_engine import VllmEngine, VllmOptions

pytestmark = pytest.mark.vllm

NEW_TOKENS = 24
EFFECT = 0.03  # of each matrix's RMS: what a run of the demo moves it by
QUESTIONS = (
    "The capital of France is",
    "The opposite of hot is",
    "1, 2, 3, 4, 5,",
    "def add(a, b):\n    return",
)


@pytest.fixture(scope="module")
def space(smollm2: Path) -> LoraSpace:
    return LoraSpace(linear_matrices(smollm2, "all-linear"), rank=8, alpha=32.0, train="B")


@pytest.fixture(scope="module")
def engine(smollm2: Path, space: LoraSpace) -> VllmEngine:
    options = VllmOptions(dtype="float32", max_model_len=128, max_num_seqs=16, kv_cache_bytes=1 << 28)
    return VllmEngine(smollm2, space, run_seed=0, slots=2, cache_bytes=0, options=options)


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[tuple[int, ...]]:
    tokenizer = load_tokenizer(smollm2)
    task = Countdown(template="few_shot", shots=2)
    problems = [task.example("heldout", index).prompt for index in range(8)]
    return [tuple(tokenizer(text).input_ids) for text in (*QUESTIONS, *problems)]


def engine_tokens(engine: VllmEngine, slot: int | None, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    done = engine.generate([Request(slot, prompt) for prompt in prompts], Sampling(NEW_TOKENS))
    found = {completion.request: completion.token_ids for completion in done}
    return [found[number] for number in range(len(prompts))]


def reference_tokens(model: PreTrainedModel | peft.PeftModel, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        found.append(tuple(out[0, len(prompt) :].tolist()))
    return found


def test_greedy_text_is_coherent_and_equal_in_transformers_and_vllm(
    smollm2: Path, engine: VllmEngine, prompts: list[tuple[int, ...]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokens = engine_tokens(engine, None, prompts)
    assert tokens == reference_tokens(model, prompts)
    tokenizer = load_tokenizer(smollm2)
    texts = [tokenizer.decode(ids) for ids in tokens[: len(QUESTIONS)]]
    for text, word in zip(texts, ("Paris", "cold", "6, 7, 8, 9, 10", "a + b"), strict=True):
        assert word in text


def test_an_adapter_gives_the_same_greedy_text_in_peft_and_in_a_slot(
    smollm2: Path, engine: VllmEngine, space: LoraSpace, prompts: list[tuple[int, ...]], tmp_path: Path
) -> None:
    theta = random_center(space, EFFECT)
    engine.set_center(theta)
    engine.write_slots(0, 0.0, [CENTER])
    tokens = engine_tokens(engine, 0, prompts)
    assert tokens != engine_tokens(engine, None, prompts)
    space.save(theta, tmp_path, str(smollm2))
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert tokens == reference_tokens(peft.PeftModel.from_pretrained(model, tmp_path), prompts)
