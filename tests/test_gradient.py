"""Gradients with respect to theta, against finite differences and plain PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from inputs import random_center, random_prompts
from simple_losses import MeanNll, Weighted, reverse_kl
from transformers import AutoModelForCausalLM, GPTNeoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from es_engine.spaces.lora import LoraSpace, Train, Units
from workers.engine import Vector
from workers.gradient import GradientModel, Loss, _takes_contexts, collate
from workers.models import linear_matrices
from workers.samples import Sample

LENGTHS = ((5, 9), (1, 4), (17, 2), (8, 8), (3, 20), (12, 1))
TOKENS = sum(length for _, length in LENGTHS)
LOSSES: dict[str, Loss] = {"mean nll": MeanNll(TOKENS), "weighted": Weighted(0.7), "reverse kl": reverse_kl}


def build_space(model: Path, train: Train = "B", units: Units = "weight") -> LoraSpace:
    return LoraSpace(linear_matrices(model, "all-linear"), rank=4, alpha=10.0, train=train, units=units)


def center(space: LoraSpace) -> Vector:
    return random_center(space, 0.1)


def samples() -> list[Sample]:
    rng = np.random.default_rng(4)
    found = []
    for (prompt, completion), ids in zip(LENGTHS, random_prompts(*map(sum, LENGTHS)), strict=True):
        weight = rng.standard_normal(completion).astype(np.float32)
        values = {"advantage": float(rng.standard_normal()), "weight": weight}
        found.append(Sample(ids[:prompt], ids[prompt:], values))
    return found


def groups() -> list[Sample]:
    """Prompts of several lengths, one of them a single token, three completions of each, which are of several too."""
    rng = np.random.default_rng(6)
    prompts, completions = random_prompts(17, 1, 6), random_prompts(2, 4, 6, 3, 5, 7, 1, 9, 2)
    return [
        Sample(prompts[place // 3], ids, {"advantage": float(rng.standard_normal())})
        for place, ids in enumerate(completions)
    ]


@pytest.fixture(scope="module")
def space(random_llama: Path) -> LoraSpace:
    return build_space(random_llama)


@pytest.fixture(scope="module")
def model(random_llama: Path, space: LoraSpace) -> GradientModel:
    return model_at_center(random_llama, space)


def model_at_center(folder: Path, space: LoraSpace) -> GradientModel:
    model = GradientModel(folder, space, "float32")
    model.set_theta(center(space))
    return model


def plain_peft(folder: Path, space: LoraSpace, theta: Vector, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers + PEFT, from the files that the space writes."""
    space.save(theta, adapter, str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return peft.PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()


def plain_logprobs(model: Any, sample: Sample) -> torch.Tensor:
    """All log-probabilities at a sample's completion tokens, (T, V), one sample at a time and without padding."""
    logits = model(torch.tensor([sample.prompt_ids + sample.completion_ids])).logits[0]
    return logits[len(sample.prompt_ids) - 1 : -1].log_softmax(-1)


def chosen(scores: torch.Tensor, sample: Sample) -> torch.Tensor:
    return scores.gather(-1, torch.tensor(sample.completion_ids)[:, None])[:, 0]


# The gradient itself


@pytest.fixture
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers rounds to float32 in them, which no small step survives."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.mark.usefixtures("norms_in_float64")
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("units", ["weight", "raw"])
@pytest.mark.parametrize("train", ["B", "A", "AB"])
def test_the_gradient_is_that_of_central_differences(
    random_llama: Path, train: Train, units: Units, loss: Loss
) -> None:
    """In float64, along random directions and along the largest coordinate of every seventh factor."""
    space = build_space(random_llama, train, units)
    model = GradientModel(random_llama, space, "float64")
    theta = (space.start() + 0.02 * space.matrix_scale * np.random.default_rng(3).standard_normal(space.dim)).astype(
        float
    )
    model.set_theta(theta)  # type: ignore[arg-type]
    gradient = model.gradient(loss, samples()).gradient
    assert (gradient.shape, gradient.dtype) == ((space.dim,), np.float32)

    directions = list(np.random.default_rng(5).standard_normal((3, space.dim)) / np.sqrt(space.dim))
    for place in space.placements[::7]:
        largest = place.start + np.abs(gradient[place.start : place.stop]).argmax()
        directions.append(np.eye(1, space.dim, largest)[0])
    step = 1e-5 * space.matrix_scale

    def value(at: Any) -> float:
        model.set_theta(at)
        return model.gradient(loss, samples()).loss

    for direction in directions:
        expected = (value(theta + step * direction) - value(theta - step * direction)) / (2 * step)
        size = float(np.linalg.norm(gradient) * np.linalg.norm(direction) / np.sqrt(space.dim))
        assert gradient.astype(float) @ direction == pytest.approx(expected, rel=1e-5, abs=1e-5 * size)


@pytest.mark.parametrize(("which", "train"), [("random_llama", "B"), ("random_qwen", "A"), ("random_llama", "AB")])
@pytest.mark.parametrize("units", ["weight", "raw"])
@pytest.mark.parametrize("drawn", [samples, groups])
def test_the_gradient_is_that_of_plain_peft(
    which: str,
    train: Train,
    units: Units,
    drawn: Callable[[], list[Sample]],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    folder: Path = request.getfixturevalue(which)
    space = build_space(folder, train, units)
    theta = center(space) if units == "weight" else random_center(space, 0.01)
    compare_with_plain_peft(folder, space, theta, drawn(), tmp_path)


def compare_with_plain_peft(
    folder: Path, space: LoraSpace, theta: Vector, drawn: Sequence[Sample], adapter: Path
) -> None:
    """A gradient of ours, in float64, and that of one sample at a time."""
    model = GradientModel(folder, space, "float64")
    model.set_theta(theta)
    tokens = sum(len(sample.completion_ids) for sample in drawn)
    found = model.gradient(MeanNll(tokens), drawn)

    reference = plain_peft(folder, space, theta, adapter, torch.float64)
    loss = -sum(chosen(plain_logprobs(reference, sample), sample).sum() for sample in drawn) / tokens
    loss.backward()
    for place in space.placements:
        layer = reference.get_submodule(f"base_model.model.{place.matrix.name}")
        slope = (layer.lora_A if place.factor == "A" else layer.lora_B)["default"].weight.grad.numpy()
        expected = place.scale * slope.ravel()
        mine = found.gradient[place.start : place.stop]
        np.testing.assert_allclose(mine, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert found.loss == pytest.approx(loss.item(), rel=1e-6)
    assert found.metrics == {"tokens": tokens, "samples": len(drawn)}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_gradients_of_parts_add_up_to_that_of_the_whole(model: GradientModel, loss: Loss) -> None:
    whole = model.gradient(loss, samples())
    parts = [model.gradient(loss, [samples()[place] for place in part]) for part in ((3, 0), (4,), (5, 2, 1))]
    total = np.sum([part.gradient for part in parts], axis=0)
    np.testing.assert_allclose(total, whole.gradient, atol=2e-6 * np.abs(whole.gradient).max())
    assert sum(part.loss for part in parts) == pytest.approx(whole.loss, rel=1e-5)
    for name, number in whole.metrics.items():
        assert sum(part.metrics[name] for part in parts) == pytest.approx(number, rel=1e-5)


def test_a_gradient_leaves_theta_alone_and_comes_again(model: GradientModel) -> None:
    once = model.gradient(reverse_kl, samples())
    again = model.gradient(reverse_kl, samples())
    assert once.gradient.tobytes() == again.gradient.tobytes()
    assert (once.loss, once.metrics) == (again.loss, again.metrics)


def test_only_thetas_factors_are_trained_also_after_the_adapter_was_off(model: GradientModel, space: LoraSpace) -> None:
    model.logprobs(samples(), of="base")
    trained = [name for name, weight in model._model.named_parameters() if weight.requires_grad]
    assert len(trained) == len(space.matrices)
    assert all(name.endswith("lora_B.default.weight") for name in trained)


# Prompts that are read once


def tokens_through(model: GradientModel, drawn: Sequence[Sample]) -> list[tuple[int, ...]]:
    """The shapes of what the first MLP reads while a gradient is taken."""
    read: list[tuple[int, ...]] = []
    mlp = next(layer for name, layer in model._model.named_modules() if name.endswith("layers.0.mlp"))
    with mlp.register_forward_hook(lambda _, inputs, __: read.append(tuple(inputs[0].shape[:2]))):
        model.gradient(MeanNll(1), drawn)
    return read


def test_a_groups_prompt_is_read_once(model: GradientModel) -> None:
    """All but its last token, which each completion comes after."""
    assert tokens_through(model, groups()) == [(3, 16), (9, 10)]
    assert model.tokens_read(groups()) == 17 + 1 + 6 + 39
    assert model.gradient(MeanNll(1), groups()).tokens == model.tokens_read(groups())


def test_where_no_prompt_comes_again_all_is_read_at_once(model: GradientModel) -> None:
    assert tokens_through(model, samples()) == [(6, 23)]
    assert model.tokens_read(samples()) == sum(map(sum, LENGTHS))
    one_token = [replace(sample, prompt_ids=(5,)) for sample in samples()]
    assert tokens_through(model, one_token) == [(6, 21)]


WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, "layer_types": None}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}


@pytest.mark.parametrize("changes", [WINDOWS, DYNAMIC], ids=["windows", "positions by the longest text"])
def test_a_model_for_which_padding_counts_reads_prompts_with_each_completion(
    changes: dict[str, Any], random_qwen: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(random_qwen, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    space = build_space(folder)
    model = GradientModel(folder, space, "float32")
    assert tokens_through(model, groups()) == [(9, 23)]
    assert model.tokens_read(groups()) == sum(sample.tokens for sample in groups())
    compare_with_plain_peft(folder, space, center(space), groups(), tmp_path / "adapter")


def test_a_model_whose_positions_are_not_rotary_reads_prompts_with_each_completion() -> None:
    plain, learned = LlamaConfig(), GPTNeoConfig(attention_types=[[["global", "local"], 12]])
    assert [_takes_contexts(SimpleNamespace(config=config)) for config in (plain, learned)] == [True, False]


def test_a_shared_prompts_gradient_comes_again_on_several_threads(random_llama: Path, space: LoraSpace) -> None:
    """Sums over a prompt's completions are large enough here for torch to share them out among threads."""
    shared = [Sample((7,) * 150, (1, 2, number)) for number in range(12)]
    model = model_at_center(random_llama, space)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = {model.gradient(MeanNll(1), shared).gradient.tobytes() for _ in range(8)}
    finally:
        torch.set_num_threads(threads)
    assert tokens_through(model, shared) == [(1, 149), (12, 4)]
    assert len(found) == 1


# Log-probabilities


@pytest.mark.parametrize("drawn", [samples(), groups()], ids=["samples", "groups"])
def test_logprobs_are_those_of_plain_peft(
    drawn: list[Sample], model: GradientModel, random_llama: Path, space: LoraSpace, tmp_path: Path
) -> None:
    reference = plain_peft(random_llama, space, center(space), tmp_path)
    for temperature in (1.0, 0.6):
        for row, sample in zip(model.logprobs(drawn, temperature), drawn, strict=True):
            scores = (plain_logprobs(reference, sample) / temperature).log_softmax(-1)
            np.testing.assert_allclose(row, chosen(scores, sample).detach(), atol=1e-5)


def test_without_the_adapter_the_model_is_the_base_model(model: GradientModel, random_llama: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(random_llama, dtype=torch.float32)
    worn, bare = model.logprobs(samples()), model.logprobs(samples(), of="base")
    assert np.abs(np.concatenate(worn) - np.concatenate(bare)).mean() > 0.1
    for row, sample in zip(bare, samples(), strict=True):
        np.testing.assert_allclose(row, chosen(plain_logprobs(base, sample), sample).detach(), atol=1e-5)
    for one, other in zip(model.logprobs(samples()), worn, strict=True):
        np.testing.assert_array_equal(one, other)


def test_at_zero_nothing_diverges_from_the_base_model(random_llama: Path, space: LoraSpace) -> None:
    found = GradientModel(random_llama, space, "float32").gradient(reverse_kl, samples())
    assert abs(found.loss) < 1e-5
    assert np.abs(found.gradient).max() < 1e-5


def test_a_half_precision_base_wears_a_float32_adapter(
    random_llama: Path, space: LoraSpace, model: GradientModel
) -> None:
    half = GradientModel(random_llama, space, "bfloat16")
    half.set_theta(center(space))
    dtypes = {name.split(".")[-3]: weight.dtype for name, weight in half._model.named_parameters() if "lora" in name}
    assert dtypes == {"lora_A": torch.float32, "lora_B": torch.float32}
    assert half._model.get_output_embeddings().weight.dtype == torch.bfloat16
    found, exact = (each.gradient(MeanNll(TOKENS), samples()) for each in (half, model))
    assert found.loss == pytest.approx(exact.loss, rel=0.01)
    error = np.linalg.norm(found.gradient - exact.gradient) / np.linalg.norm(exact.gradient)
    assert 1e-4 < error < 0.1


# Samples


def test_a_batch_is_padded_on_the_right() -> None:
    weight = np.array([0.5, -1], np.float32)
    batch = collate(
        [
            Sample((7, 8), (9, 10), {"advantage": 2.0, "weight": weight}),
            Sample((5,), (6,), {"advantage": -1.0, "weight": weight[:1]}),
        ]
    )
    assert batch.token_ids.tolist() == [[7, 8, 9, 10], [5, 6, 0, 0]]
    assert batch.predicts.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert batch.completion_ids.tolist() == [[9, 10], [6, 0]]
    assert batch.mask.tolist() == [[True, True], [True, False]]
    assert batch.values["advantage"].tolist() == [2, -1]
    assert batch.values["weight"].tolist() == [[0.5, -1], [0.5, 0]]
    assert batch.spread(torch.tensor([1.0, 2.0, 3.0])).tolist() == [[1, 2], [3, 0]]
    assert batch.spread(torch.ones(3, 5)).sum((1, 2)).tolist() == [10, 5]


def test_contexts_are_prompts_without_their_last_tokens() -> None:
    batch = collate([Sample((7, 8, 9), (1, 2)), Sample((5,), (6,)), Sample((7, 8, 9), (3,))], prompts_once=True)
    assert batch.contexts is not None
    assert batch.contexts.token_ids.tolist() == [[7, 8], [0, 0]]
    assert batch.contexts.lengths.tolist() == [2, 0]
    assert batch.contexts.of.tolist() == [0, 1, 0]
    assert batch.token_ids.tolist() == [[9, 1, 2], [5, 6, 0], [9, 3, 0]]
    assert batch.predicts.tolist() == [[True, True, False], [True, False, False], [True, False, False]]
    assert batch.completion_ids.tolist() == [[1, 2], [6, 0], [3, 0]]
    least = batch.clamped(6)
    assert least.contexts is not None
    assert (least.contexts.token_ids.tolist(), least.token_ids[0].tolist()) == ([[6, 6], [0, 0]], [6, 1, 2])


@pytest.mark.parametrize(("drawn", "made"), [(samples(), [TOKENS]), (groups(), [0, 39])], ids=["samples", "groups"])
def test_logits_are_made_of_completion_tokens_alone(drawn: list[Sample], made: list[int], model: GradientModel) -> None:
    shapes: list[torch.Size] = []
    layer = model._model.get_output_embeddings()
    with layer.register_forward_hook(lambda _, inputs, logits: shapes.append(logits.shape)):
        model.gradient(MeanNll(TOKENS), drawn)
    assert shapes == [(1, tokens, 64) for tokens in made]
