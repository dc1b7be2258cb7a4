"""vLLM engines on the random models of conftest.py, the reference that their log-probabilities are checked against, and
what they are asked to generate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from inputs import random_prompts
from transformers import AutoModelForCausalLM

from es_engine import noise
from es_engine.spaces.lora import LoraSpace
from workers.engine import CENTER, Completion, Member, Request, Sampling, Vector
from workers.hf_engine import HfEngine
from workers.vllm_engine import VllmEngine, VllmOptions

RUN_SEED = 7
SIGMA = 0.4
SLOTS = 4
MEMBERS = (Member(0, 1), Member(0, -1), CENTER, Member(3, 1))
FLOAT32_TOLERANCE = 1e-4
NO_CACHE, LARGE_CACHE = 0, 1 << 28
GREEDY = Sampling(max_tokens=24, stop=("\n",))

STARTED: list[VllmEngine] = []
"""Engines kept to the end: the first that goes takes vLLM's process groups, and all engines of this process, down."""


def build_engine(model: Path, space: LoraSpace, cache_bytes: int = LARGE_CACHE, **options: Any) -> VllmEngine:
    """A small engine, with other options of vLLM where they are given."""
    small: dict[str, Any] = {
        "dtype": "float32",
        "kv_cache_bytes": 32 << 20,
        "block_size": 32,
        "max_model_len": 256,
        "max_num_seqs": 8,
    }
    STARTED.append(VllmEngine(model, space, RUN_SEED, SLOTS, cache_bytes, VllmOptions(**(small | options))))
    return STARTED[-1]


def member_theta(center: Vector, generation: int, member: Member) -> Vector:
    """Theta of a member around a center."""
    eps = noise.draw(RUN_SEED, generation, member.pair, len(center))
    return center + np.float32(member.sign * SIGMA) * eps


class Reference:
    """transformers + PEFT, from the files that `LoraSpace.save` writes, in float32."""

    def __init__(self, model: Path, space: LoraSpace, folder: Path) -> None:
        self._model, self._space, self._folder = model, space, folder

    def logprobs(self, theta: Vector | None, prompts: Sequence[tuple[int, ...]]) -> list[Vector]:
        model: Any = AutoModelForCausalLM.from_pretrained(self._model, dtype=torch.float32)
        if theta is not None:
            self._space.save(theta, self._folder, str(self._model))
            model = peft.PeftModel.from_pretrained(model, self._folder)
        return [self._prompt_logprobs(model, prompt) for prompt in prompts]

    @torch.inference_mode()
    def _prompt_logprobs(self, model: Any, prompt: tuple[int, ...]) -> Vector:
        scores = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        return scores[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])].numpy()


def differences(ones: Sequence[Vector], others: Sequence[Vector]) -> Vector:
    """How far log-probabilities are apart, token by token."""
    return np.abs(np.concatenate(ones) - np.concatenate(others))


def uneven(slots: Sequence[int | None]) -> list[Request]:
    """Prompts of many lengths, each slot another number of them, in no order; more than run at a time."""
    prompts = random_prompts(1, 3, 8, 13, 21, 34, 55, 90, 130, 200)
    requests = [Request(slot, prompt) for place, slot in enumerate(slots) for prompt in prompts[3 * place :]]
    return [requests[place] for place in np.random.default_rng(3).permutation(len(requests))]


def texts(engine: VllmEngine | HfEngine, requests: Sequence[Request], sampling: Sampling = GREEDY) -> list[Any]:
    """All that an engine generates, in the order of the requests."""
    return as_rows(list(engine.generate(requests, sampling)))


def as_rows(found: Sequence[Completion]) -> list[Any]:
    """Completions in the order of their requests and samples, in a form that can be compared."""
    found = sorted(found, key=lambda each: (each.request, each.sample))
    return [(each.request, each.sample, each.token_ids, each.text, each.finish_reason) for each in found]
