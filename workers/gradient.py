"""Gradients with respect to theta: a PEFT model whose adapter is theta, and autograd.

A loss is a sum over samples, its normalisers plain numbers, so that the gradients of micro-batches add up to that of
the whole. With factor = scale * coordinates, d loss / d coordinates = scale * d loss / d factor.

Samples of the same prompt, such as GRPO's groups, have it read once, gradients included: the keys and values that
attention has of it go to each of its completions.

Shapes: S samples of a micro-batch, P different prompts, C tokens of the longest but for the last, L tokens of what is
read of the longest sample, T completion tokens of the longest completion, n completion tokens of all samples together,
V = vocabulary, D = len(theta).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from es_engine.spaces.lora import LoraSpace
from workers.engine import Vector
from workers.peft_model import adapted_layer, add_adapter, factor_weight, load_frozen_model, load_peft_model, put_on
from workers.samples import Sample, reads_prompts_once
from workers.teacher import Teacher

Speaker = Literal["theta", "base", "teacher"]
"""Whose word it is: the model's that wears theta, the base model's, or the teacher's."""

TEACHER = "teacher"
"""PEFT's name of the teacher's adapter, where it is one on the run's own base model."""


@dataclass(frozen=True, slots=True)
class Contexts:
    """The different prompts of a micro-batch, all but their last tokens: `token_ids` (P, C), padded on the right with
    zeros, and how many of them are there, `lengths` (P,). `of` (S,) says whose context each is by its place."""

    token_ids: torch.Tensor
    lengths: torch.Tensor
    of: torch.Tensor

    def to(self, device: torch.device) -> Contexts:
        """The same on a device."""
        return Contexts(self.token_ids.to(device), self.lengths.to(device), self.of.to(device))


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch as tensors, padded on the right with zeros.

    `token_ids` and `predicts` are (S, L), `completion_ids` and `mask` (S, T); `mask` is true at a completion's tokens,
    `predicts` where the model's output predicts one of them. `values` are the samples', (S,) or (S, T), by name. What
    comes before `token_ids` are the `contexts`, where there are any.
    """

    token_ids: torch.Tensor
    predicts: torch.Tensor
    completion_ids: torch.Tensor
    mask: torch.Tensor
    values: Mapping[str, torch.Tensor]
    contexts: Contexts | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(
            self.token_ids.to(device),
            self.predicts.to(device),
            self.completion_ids.to(device),
            self.mask.to(device),
            {name: value.to(device) for name, value in self.values.items()},
            None if self.contexts is None else self.contexts.to(device),
        )

    def clamped(self, most: int) -> Batch:
        """The same batch to be read, with `most` in place of tokens beyond it."""
        contexts = self.contexts
        if contexts is not None:
            contexts = replace(contexts, token_ids=contexts.token_ids.clamp(max=most))
        return replace(self, token_ids=self.token_ids.clamp(max=most), contexts=contexts)

    def spread(self, flat: torch.Tensor) -> torch.Tensor:
        """What holds for the n completion tokens, (n,) or (n, V), as (S, T) or (S, T, V), zero at padding."""
        spread = flat.new_zeros(*self.mask.shape, *flat.shape[1:])
        spread[self.mask] = flat
        return spread


def collate(samples: Sequence[Sample], *, prompts_once: bool = False) -> Batch:
    """The tensors of samples, to be read whole or with the different prompts as contexts. Raises ValueError where one
    has other values than the first."""
    kinds = [{name: np.ndim(value) for name, value in sample.values.items()} for sample in samples]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(
            f"sample: the samples of a batch need the same values, and the first has {', '.join(kinds[0]) or 'none'}"
        )
    skipped = [len(sample.prompt_ids) - 1 if prompts_once else 0 for sample in samples]  # the contexts have it
    read = [(sample.prompt_ids + sample.completion_ids)[skip:] for sample, skip in zip(samples, skipped, strict=True)]
    end = torch.tensor([len(row) for row in read])[:, None]
    length = torch.tensor([len(sample.completion_ids) for sample in samples])[:, None]
    place = torch.arange(int(end.max())) + 1  # of what is predicted
    return Batch(
        token_ids=_padded(read),
        predicts=(end - length <= place) & (place < end),
        completion_ids=_padded([sample.completion_ids for sample in samples]),
        mask=torch.arange(int(length.max())) < length,
        values={name: _stacked([sample.values[name] for sample in samples]) for name in kinds[0]},
        contexts=_contexts(samples) if prompts_once else None,
    )


def _contexts(samples: Sequence[Sample]) -> Contexts:
    prompts: dict[tuple[int, ...], int] = {}
    of = [prompts.setdefault(sample.prompt_ids, len(prompts)) for sample in samples]
    return Contexts(
        token_ids=_padded([prompt[:-1] for prompt in prompts]),
        lengths=torch.tensor([len(prompt) - 1 for prompt in prompts]),
        of=torch.tensor(of),
    )


def _padded(rows: Sequence[Any], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row, dtype=dtype) for row in rows], batch_first=True)


def _stacked(values: Sequence[Any]) -> torch.Tensor:
    return _padded(values, torch.float32) if np.ndim(values[0]) else torch.tensor(values, dtype=torch.float32)


class Outputs:
    """What the model says at the completion tokens of a micro-batch, which it was given the prompts for."""

    def __init__(self, model: GradientModel, batch: Batch, of: Speaker = "theta") -> None:
        self._model = model
        self._batch = batch
        self._logits = model.logits(batch, of)

    def logprobs(self, temperature: float = 1.0) -> torch.Tensor:
        """Log-probabilities of the completion tokens, (S, T), zero at padding; of a token that the model lacks -inf."""
        ids = self._batch.completion_ids[self._batch.mask]
        return self._batch.spread(token_logprobs(self.logits(temperature), ids))

    def logits(self, temperature: float = 1.0) -> torch.Tensor:
        """The logits that predict the n completion tokens, (n, V), over the temperature, sample by sample;
        `Batch.spread` arranges what is made of them."""
        return self._logits if temperature == 1 else self._logits / temperature

    @cached_property
    def base(self) -> Outputs:
        """What the base model says of the same completions: the adapter is off, and nothing is differentiated."""
        return self._frozen("base")

    @cached_property
    def teacher(self) -> Outputs:
        """What the teacher says of the same completions; nothing is differentiated. Its V, which may be smaller than
        the model's, counts the tokens that the outputs of both have."""
        return self._frozen("teacher")

    def _frozen(self, speaker: Speaker) -> Outputs:
        with torch.no_grad():
            return Outputs(self._model, self._batch, speaker)


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log softmax(logits) at the given tokens: (..., V) and ids (...) to (...); -inf for a token beyond V."""
    known = ids < logits.shape[-1]
    chosen = logits.gather(-1, ids.where(known, 0)[..., None])[..., 0].where(known, -torch.inf)
    return chosen - logits.logsumexp(-1)


class Loss(Protocol):
    """A loss as it is sent to the workers: a function or a dataclass of its options, importable there."""

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor | float]]:
        """The loss, a scalar tensor, and numbers to be reported by name; all of them sums over the samples."""
        ...


@dataclass(slots=True)
class PartialGradient:
    """What a micro-batch adds to the gradient, shape (D,), to the loss and to what is reported; the tokens that the
    model read of it, and the seconds that a worker spent on it."""

    gradient: Vector
    loss: float
    metrics: dict[str, float]
    tokens: int
    seconds: float = 0.0


class GradientModel:
    """A causal language model whose adapter is theta, and the teacher if there is one; all but theta is frozen, dropout
    is off."""

    def __init__(
        self, model: Path, space: LoraSpace, dtype: str = "auto", device: str = "cpu", teacher: Teacher | None = None
    ) -> None:
        """`dtype` is that of the base model and the teacher; theta's factors and all probabilities are float32 (float64
        where it is). A teacher that is the base model, with an adapter or without, is not loaded again."""
        self._space = space
        self._device = torch.device(device)
        self._model = load_peft_model(model, space, dtype, device)
        self._teacher = teacher
        self._other = None  # the teacher's model, where it is not the base model
        if teacher is not None and teacher.model is not None:
            self._other = load_frozen_model(teacher.model, teacher.adapter, dtype, device)
        elif teacher is not None and teacher.adapter is not None:
            add_adapter(self._model, teacher.adapter, TEACHER)
        self._models = [each for each in (self._model, self._other) if each is not None]
        self._shares = all(_takes_contexts(each) for each in self._models)
        self._layers = [adapted_layer(self._model, matrix.name) for matrix in space.matrices]
        self._factors = [factor_weight(self._model, place.matrix.name, place.factor) for place in space.placements]
        self._freeze()
        self.set_theta(space.start())

    def set_theta(self, theta: Vector) -> None:
        """Make theta, shape (D,), the adapter."""
        put_on(self._model, self._space, theta)

    @torch.no_grad()
    def logprobs(self, samples: Sequence[Sample], temperature: float = 1.0, of: Speaker = "theta") -> list[Vector]:
        """Log-probabilities of each sample's completion tokens."""
        found = Outputs(self, self._batch(samples), of).logprobs(temperature).float().cpu().numpy()
        return [row[: len(sample.completion_ids)] for row, sample in zip(found, samples, strict=True)]

    def gradient(self, loss: Loss, samples: Sequence[Sample]) -> PartialGradient:
        """The gradient of a loss over samples; the same bits for the same theta and samples on the same kind of
        machine."""
        batch = self._batch(samples)
        with _deterministic(self._device):
            value, metrics = loss(Outputs(self, batch), batch)
            slopes = torch.autograd.grad(value, self._factors)
        scaled = [slope.flatten() * place.scale for slope, place in zip(slopes, self._space.placements, strict=True)]
        return PartialGradient(
            gradient=torch.cat(scaled).float().cpu().numpy(),
            loss=value.item(),
            metrics={name: float(number) for name, number in metrics.items()},
            tokens=self.tokens_read(samples),
        )

    def tokens_read(self, samples: Sequence[Sample]) -> int:
        """How many tokens the model reads of samples in one micro-batch, as costs count them: padding left out, and
        what is read twice of a shared prompt, its last token, counted once."""
        prompts = [sample.prompt_ids for sample in samples]
        completions = sum(len(sample.completion_ids) for sample in samples)
        return completions + sum(map(len, set(prompts) if self._reads_once(samples) else prompts))

    def logits(self, batch: Batch, of: Speaker) -> torch.Tensor:
        """The logits that predict the n completion tokens, (n, V), in float32 or wider."""
        if of == "teacher" and self._other is not None:
            # The same vocabulary may be padded to other sizes: what is beyond either's end is the text of no token.
            most = self._other.get_input_embeddings().num_embeddings - 1
            found = _completion_logits(self._other, batch.clamped(most))
            return found[:, : self._model.get_output_embeddings().out_features]
        with self._speaking(of):
            return _completion_logits(self._model, batch)

    def rest(self) -> None:
        """Leave a GPU's memory to others."""
        self._move(torch.device("cpu"))

    def wake(self) -> None:
        """Take the memory back."""
        self._move(self._device)

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        return collate(samples, prompts_once=self._reads_once(samples)).to(self._device)

    def _reads_once(self, samples: Sequence[Sample]) -> bool:
        return self._shares and reads_prompts_once(samples)

    def _freeze(self) -> None:
        """Leave nothing to be trained but theta's factors."""
        self._model.requires_grad_(False)
        for factor in self._factors:
            factor.requires_grad_(True)

    @contextmanager
    def _speaking(self, of: Speaker) -> Iterator[None]:
        """Inside, the model wears what makes it that speaker."""
        if of == "theta":
            yield
            return
        assert of == "base" or self._teacher is not None, "there is no teacher"
        if of == "teacher" and self._teacher is not None and self._teacher.adapter is not None:
            self._model.set_adapter(TEACHER, inference_mode=True)
            try:
                yield
            finally:
                self._model.set_adapter("default")
        else:
            self._wear(False)
            try:
                yield
            finally:
                self._wear(True)
        self._freeze()  # PEFT would have both factors trained from now on

    def _wear(self, worn: bool) -> None:
        # PEFT's `disable_adapter` looks through all modules several times, which takes longer than a small model does.
        for layer in self._layers:
            layer.enable_adapters(worn)

    def _move(self, device: torch.device) -> None:
        if self._device.type == "cuda" and self._factors[0].device.type != device.type:
            for model in self._models:
                model.to(device)  # in place: the parameters stay the same objects
            torch.cuda.empty_cache()


def _takes_contexts(model: Any) -> bool:
    """Whether a model reads on rightly after contexts of any lengths side by side: all layers attend to all tokens
    before, and positions are rotary. Windows, states and other positions would count padding as tokens, and two kinds
    of rotary ones depend on the longest text beside."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None)
    rotary = isinstance(rope, dict) and rope.get("rope_type") not in ("dynamic", "longrope")
    return rotary and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def _completion_logits(model: Any, batch: Batch) -> torch.Tensor:
    before = {} if batch.contexts is None else _after(model, batch.contexts, batch.token_ids.shape[1])
    logits = _read(model, batch.token_ids, batch.predicts, **before)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _after(model: Any, contexts: Contexts, length: int) -> dict[str, Any]:
    """What a model needs to know to read `length` tokens of each sample after its context, which is read here."""
    cache, nothing = DynamicCache(config=model.config), torch.zeros_like(contexts.token_ids, dtype=torch.bool)
    _read(model, contexts.token_ids, nothing, past_key_values=cache)
    for layer in cache.layers:  # not by `batch_select_indices`, whose gradients several threads add in any order
        layer.keys, layer.values = (each.index_select(0, contexts.of) for each in (layer.keys, layer.values))
    ends, width = contexts.lengths[contexts.of][:, None], contexts.token_ids.shape[1]
    place = torch.arange(width + length, device=ends.device)
    return {
        "past_key_values": cache,
        "attention_mask": ((place < ends) | (place >= width)).long(),
        "position_ids": ends + place[:length],
    }


def _read(model: Any, token_ids: torch.Tensor, wanted: torch.Tensor, **before: Any) -> torch.Tensor:
    """The logits (n, V) at the places that are wanted, of (S, L).

    The hidden states are thinned out on their way into the output layer: logits of prompts and padding would take most
    of the memory. Causal attention never looks at padding on the right, so that needs no mask.
    """
    thin_out = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: inputs[0][wanted][None])
    with thin_out:
        return model(input_ids=token_ids, use_cache=bool(before), **before).logits[0]


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Inside, a GPU's sums are taken in a fixed order, for which a worker's environment has what torch wants; on a CPU
    they always are."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
