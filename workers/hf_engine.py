"""transformers + PEFT as a population engine: one member after another, the reference every other engine must match."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from es_engine.spaces.lora import LoraSpace
from workers.engine import Completion, Member, Request, Sampling, Vector, pairs_of
from workers.peft_model import load_peft_model, put_on
from workers.perturbation import Perturber
from workers.prompts import load_tokenizer
from workers.stops import cut_at_stop, first_loop


class HfEngine:
    """A transformers model with one PEFT adapter that takes each member's values in turn; implements
    `PopulationEngine`."""

    def __init__(
        self, model: Path, space: LoraSpace, run_seed: int, cache_bytes: int, dtype: str = "auto", device: str = "cpu"
    ) -> None:
        from transformers import GenerationConfig

        self._model = load_peft_model(model, space, dtype, device)
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        self._device = torch.device(device)
        self._tokenizer = load_tokenizer(model)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        # Only the end tokens of the model's own generation settings count: sampling is the run's, not the model's.
        ends = self._model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        self._model.generation_config = GenerationConfig(eos_token_id=ends)
        self.assign(space, run_seed, cache_bytes)

    def assign(self, space: LoraSpace, run_seed: int, cache_bytes: int) -> None:
        """Hold members of another run from now on, in a space of the same matrices and rank."""
        self._space = space
        self._perturber = Perturber(run_seed, space.dim, cache_bytes)
        self._thetas: list[Vector] = []

    def set_center(self, theta: Vector) -> None:
        """Make theta, shape (D,), the center of the slots written from now on."""
        self._perturber.center = theta.copy()

    def write_slots(self, generation: int, sigma: float, members: Sequence[Member]) -> None:
        """Keep theta + sign*sigma*eps of each member as slot 0, 1, ..."""
        self._thetas = [self._perturber.theta(generation, sigma, member) for member in members]

    def prepare(self, generation: int, sigma: float, members: Sequence[Member]) -> None:
        """Draw the members' noise in the background, as far as there is room for it."""
        self._perturber.prepare(generation, pairs_of(members))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Complete the requests, a padded batch for each slot; a batch is seeded by its first request."""
        numbered = list(enumerate(requests))
        for slot, group in groupby(numbered, key=lambda item: item[1].slot):
            yield from self._generate_slot(slot, list(group), sampling)

    @torch.inference_mode()
    def logprobs(self, requests: Sequence[Request]) -> list[Vector]:
        """Log-probability of every prompt token but the first, shape (T-1,), for each request."""
        found = []
        for slot, group in groupby(requests, key=lambda request: request.slot):
            with self._adapter(slot):
                found += [self._token_logprobs(request.prompt_ids) for request in group]
        return found

    def noise_sum(self, generation: int, pairs: Sequence[int], weights: Sequence[float]) -> Vector:
        """The sum of weight * eps(pair) over pairs, in the order given, shape (D,)."""
        return self._perturber.noise_sum(generation, pairs, weights)

    def rest(self) -> None:
        """Nothing: the model keeps its memory."""

    def wake(self) -> None:
        """Nothing."""

    @torch.inference_mode()
    def _generate_slot(
        self, slot: int | None, requests: list[tuple[int, Request]], sampling: Sampling
    ) -> Iterator[Completion]:
        encoded = self._tokenizer.pad(
            {"input_ids": [list(request.prompt_ids) for _, request in requests]}, return_tensors="pt"
        ).to(self._device)
        start = encoded["input_ids"].shape[1]
        torch.manual_seed(requests[0][1].seed)
        drawn = _DrawnLogprobs()
        with self._adapter(slot):
            output = self._model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                pad_token_id=self._tokenizer.pad_token_id,
                stopping_criteria=[self._stopped(start, sampling)],
                logits_processor=[drawn, _drawable] if sampling.logprobs else [_drawable],
                **_generation_arguments(sampling),
            )
        logprobs = drawn.rows(output) if sampling.logprobs else None
        for row, ids in enumerate(output[:, start:].tolist()):
            number, _ = requests[row // sampling.samples]
            completion = self._completion(number, row % sampling.samples, ids, sampling)
            if logprobs is not None:
                completion = replace(completion, logprobs=tuple(logprobs[row][: len(completion.token_ids)]))
            yield completion

    def _stopped(self, start: int, sampling: Sampling) -> Callable[..., torch.Tensor]:
        """Tells rows whose completion holds a stop string (transformers' own criterion also finds one that begins in
        the prompt) or a loop."""

        def stopped(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            ended = [
                self._holds_stop(row, sampling.stop) or _loop(row, sampling) is not None
                for row in ids[:, start:].tolist()
            ]
            return torch.tensor(ended, device=ids.device)

        return stopped

    def _completion(self, request: int, sample: int, ids: list[int], sampling: Sampling) -> Completion:
        """A completion from a row of new tokens, which goes on with padding after an end token or a stop string."""
        end = next((place for place, token in enumerate(ids) if token in self._ends), None)
        kept = ids if end is None else ids[: end + 1]
        text = self._text(kept)
        cut = cut_at_stop(text, sampling.stop)
        if cut != text:  # up to the token that completes the first stop string
            kept = kept[: bisect_left(range(len(kept)), True, key=lambda n: self._holds_stop(kept[:n], sampling.stop))]
        stopped = end is not None or cut != text
        loop = _loop(kept, sampling)
        if loop is not None and (loop < len(kept) or (not stopped and loop < sampling.max_tokens)):
            return Completion(request, sample, self._text(kept[:loop]), tuple(kept[:loop]), "repetition")
        return Completion(
            request=request,
            sample=sample,
            text=cut,
            token_ids=tuple(kept),
            finish_reason="stop" if stopped else "length",
        )

    def _holds_stop(self, ids: list[int], stops: Sequence[str]) -> bool:
        return any(stop in self._text(ids) for stop in stops)

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _token_logprobs(self, token_ids: Sequence[int]) -> Vector:
        """Log-probability of every token but the first, shape (T-1,), by the model as it is."""
        ids = torch.tensor([token_ids], device=self._device)
        scores = self._model(ids).logits[0, :-1].float().log_softmax(-1)
        return scores.gather(-1, ids[0, 1:, None])[:, 0].cpu().numpy()

    def _adapter(self, slot: int | None) -> Any:
        """A context in which the model wears a slot's adapter, or none."""
        if slot is None:
            return self._model.disable_adapter()
        self._load(self._thetas[slot])
        return nullcontext()

    def _load(self, theta: Vector) -> None:
        put_on(self._model, self._space, theta)


def _loop(ids: Sequence[int], sampling: Sampling) -> int | None:
    return None if sampling.max_repeats is None else first_loop(ids, sampling.max_repeats)


def _generation_arguments(sampling: Sampling) -> dict[str, Any]:
    arguments: dict[str, Any] = {"max_new_tokens": sampling.max_tokens, "do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        arguments |= {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
            "num_return_sequences": sampling.samples,
        }
    return arguments


class _DrawnLogprobs:
    """Keeps the log-probability of each token that is drawn, at temperature 1 and top_p 1: a logits processor, before
    others, of N rows."""

    def __init__(self) -> None:
        self._next: torch.Tensor | None = None  # log-probabilities (N, V) of the token that has not been drawn yet
        self._drawn: list[torch.Tensor] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._look_up(ids)
        self._next = scores.float().log_softmax(-1)
        return scores

    def rows(self, ids: torch.Tensor) -> list[list[float]]:
        """Those of each row's tokens after the prompt, in rows of prompts and all that was drawn."""
        self._look_up(ids)
        rows: list[list[float]] = torch.cat(self._drawn, dim=1).tolist()
        return rows

    def _look_up(self, ids: torch.Tensor) -> None:
        if self._next is not None:
            self._drawn.append(self._next.gather(-1, ids[:, -1:]))


def _drawable(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Scores from which a token can be drawn where a model that diverged has none: one without a number is the
    likeliest, as it is to a greedy choice, and to vLLM."""
    return scores.where(scores < torch.inf, 1e30)
