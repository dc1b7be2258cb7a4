"""Gradients with respect to theta, against finite differences and plain PEFT; and the pool's sum of them."""

from __future__ import annotations

import itertools
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
import ray
import simple_losses
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import random_center, random_prompts
from simple_losses import MeanNll, Weighted, reverse_kl, squared_margins
from transformers import AutoModelForCausalLM, GPTNeoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from es_engine.config import SftMethodConfig, parse_config
from es_engine.methods import gradients
from es_engine.methods.es import CallRunner
from es_engine.methods.updates import Updates
from es_engine.spaces.lora import LoraSpace, Train, Units
from workers import actor
from workers.actor import WorkerSetup
from workers.calls import Call
from workers.chunks import Chunk
from workers.cluster import environment
from workers.divergence import NotFinite
from workers.engine import Sampling, Vector
from workers.gradient import GradientModel, Loss, PartialGradient, _takes_contexts, collate
from workers.models import fingerprint, linear_matrices
from workers.pool import Pool
from workers.samples import LogProbs, Sample, micro_batches, suitable_tokens

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
    model = GradientModel(random_llama, space, "float32")
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
    model = GradientModel(random_llama, space, "float32")
    model.set_theta(center(space))
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


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=24),
    max_tokens=st.integers(1, 200),
    together=st.sampled_from([1, 2]),
)
def test_micro_batches_hold_every_sample_once_within_their_size(
    lengths: list[tuple[int, int]], max_tokens: int, together: int
) -> None:
    found = [Sample((1,) * prompt, (1,) * completion) for prompt, completion in lengths * together]
    batches = micro_batches(found, max_tokens, together)
    assert sorted(place for batch in batches for place in batch) == list(range(len(found)))
    sizes = [[found[place].tokens for place in batch] for batch in batches]
    for batch, tokens in zip(batches, sizes, strict=True):
        assert len(batch) == together or max(tokens) * len(batch) <= max_tokens
        runs = [batch[first : first + together] for first in range(0, len(batch), together)]
        assert all(run == list(range(run[0], run[0] + together)) and run[0] % together == 0 for run in runs)


def test_micro_batches_are_of_samples_of_similar_length_or_of_the_same_prompt_whichever_is_less_to_read() -> None:
    """Prompts of 20 tokens with completions of 1 and 2, then the other way round."""
    few = [Sample((prompt,) * 20, (1,) * length) for prompt in (1, 2) for length in (1, 2)]
    assert micro_batches(few, 44) == [[1, 0], [3, 2]]
    many = [Sample((prompt,) * 2, (1,) * length) for prompt in (1, 2) for length in (1, 20)]
    assert micro_batches(many, 44) == [[1, 3], [0, 2]]


@pytest.mark.parametrize(("count", "tokens", "batches"), [(2, 512, 1), (32, 512, 4), (80, 570, 8), (1_000, 4096, 15)])
def test_where_nobody_says_how_large_micro_batches_are_they_are_an_eighth_of_all_tokens_within_bounds(
    count: int, tokens: int, batches: int
) -> None:
    found = [Sample((number,) * 50, (1,) * 7) for number in range(count)]
    updates = Updates(SftMethodConfig(), dim=1, parameters=1, adapted=1)
    assert updates.micro_batch_tokens(found) == tokens
    assert len(micro_batches(found, tokens)) == batches
    told = Updates(SftMethodConfig(micro_batch_tokens=77), dim=1, parameters=1, adapted=1)
    assert told.micro_batch_tokens(found) == 77


def test_a_prompts_completions_are_not_parted_where_they_fit() -> None:
    """Eight of at most 80 tokens with their prompt are more than an eighth of all; 80 are more than there may be."""
    eight = [Sample((prompt,) * 70, (1,) * (3 + length)) for length in range(8) for prompt in range(8)]
    assert suitable_tokens(eight) == 8 * 80
    for batch in micro_batches(eight, 8 * 80):
        assert len(batch) == 8
        assert len({eight[place].prompt_ids for place in batch}) == 1
    assert suitable_tokens([Sample((1,) * 70, (1,) * 10)] * 80) == 4096


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Sample((), (1,)), "need at least one token"),
        (lambda: Sample((1,), ()), "need at least one token"),
        (lambda: Sample((1,), (1, 2), {"weight": np.zeros(3, np.float32)}), r"weight has shape \(3,\); .*\(2,\)"),
        (lambda: collate([Sample((1,), (1,), {"one": 1.0}), Sample((1,), (1,))]), "the same values, .*has one$"),
        (lambda: collate([Sample((1,), (1,), {"one": value}) for value in (1.0, np.ones(1))]), "the same values"),
    ],
)
def test_a_sample_that_cannot_be_is_refused(build: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^sample: .*{words}"):
        build()


# On the pool


class ModelRunner:
    """Workers that share a model, which does the last call first."""

    def __init__(self, model: GradientModel, size: int) -> None:
        self.model, self.size = model, size
        self.waves: list[int] = []

    def put(self, value: Any) -> Any:
        return value

    def run(self, calls: Sequence[Call]) -> list[Any]:
        self.waves.append(len(calls))
        results = {number: self._carry_out(calls[number]) for number in reversed(range(len(calls)))}
        return [results[number] for number in range(len(calls))]

    def _carry_out(self, call: Call) -> Any:
        if call.method == "logprobs":
            found, theta, _, temperature = call.arguments
            rows = self.model.logprobs(found, temperature, of="base" if theta is None else "theta")
            return LogProbs(rows, self.model.tokens_read(found), 0.5)
        loss, found, _, _ = call.arguments
        return self.model.gradient(loss, found)


def test_the_pools_gradient_is_that_of_all_samples(model: GradientModel, space: LoraSpace) -> None:
    whole = model.gradient(Weighted(), samples())
    runner = ModelRunner(model, 2)
    found = gradients.gradient(runner, Weighted(), samples(), center(space), 0, dim=space.dim, max_tokens=32)
    assert runner.waves == [4]
    np.testing.assert_allclose(found.gradient, whole.gradient, atol=2e-6 * np.abs(whole.gradient).max())
    assert found.gradient.dtype == np.float32
    assert found.loss == pytest.approx(whole.loss, rel=1e-5)
    assert found.metrics == {"weight": pytest.approx(whole.metrics["weight"], rel=1e-5)}
    assert found.tokens == sum(map(sum, LENGTHS))


def test_the_size_of_waves_does_not_change_a_bit(
    model: GradientModel, space: LoraSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "IN_FLIGHT_BYTES", 0)
    found = []
    for size in (1, 2, 3):
        runner = ModelRunner(model, size)
        found.append(gradients.gradient(runner, Weighted(), samples(), None, 0, dim=space.dim, max_tokens=32))
        assert max(runner.waves) == size
        assert sum(runner.waves) == 4
    assert len({each.gradient.tobytes() for each in found}) == 1
    assert len({(each.loss, each.metrics["weight"]) for each in found}) == 1


def test_pairs_stay_together(model: GradientModel, space: LoraSpace) -> None:
    whole = model.gradient(squared_margins, samples())
    runner = ModelRunner(model, 2)
    found = gradients.gradient(runner, squared_margins, samples(), None, 0, dim=space.dim, max_tokens=1, together=2)
    assert sum(runner.waves) == 3
    np.testing.assert_allclose(found.gradient, whole.gradient, atol=2e-6 * np.abs(whole.gradient).max())


def test_the_pools_logprobs_are_in_the_order_of_the_samples(model: GradientModel, space: LoraSpace) -> None:
    for theta in (center(space), None):
        expected = model.logprobs(samples(), 0.8, of="base" if theta is None else "theta")
        found = gradients.logprobs(ModelRunner(model, 2), samples(), theta, 0, max_tokens=32, temperature=0.8)
        for one, other in zip(found.rows, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
        assert (found.tokens, found.seconds) == (sum(map(sum, LENGTHS)), 4 * 0.5)


class OnOneWorker:
    """A pool of which only the first worker is used."""

    size = 1

    def __init__(self, pool: Pool) -> None:
        self.put, self._pool = pool.put, pool

    def run(self, calls: Sequence[Call]) -> list[Any]:
        return self._pool.run([replace(call, preferred=0) for call in calls])


@pytest.mark.ray
def test_any_number_of_workers_gives_the_same_bits(random_llama: Path, space: LoraSpace) -> None:
    """One, two, two that build their models again, and one thread of this process."""
    ray.cloudpickle.register_pickle_by_value(simple_losses)
    with two_workers(random_llama, space) as pool:
        theta = pool.put(center(space))
        found = [on_runner(OnOneWorker(pool), space, theta), on_runner(pool, space, theta)]
        pool.run([Call("release", "release_gradients", (), worker) for worker in range(2)])
        found.append(on_runner(pool, space, theta))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = GradientModel(random_llama, space, "float32")
    model.set_theta(center(space))
    found.append(on_runner(ModelRunner(model, 3), space, center(space)))
    torch.set_num_threads(threads)
    for mine, theirs in itertools.pairwise(found):
        assert mine[0].gradient.tobytes() == theirs[0].gradient.tobytes()
        assert (mine[0].loss, mine[0].metrics) == (theirs[0].loss, theirs[0].metrics)
        assert [row.tobytes() for row in mine[1]] == [row.tobytes() for row in theirs[1]]


def two_workers(folder: Path, space: LoraSpace) -> Pool:
    config = parse_config(
        {
            "name": "gradients",
            "model": {"source": str(folder)},
            "optimizer": {"lr": 1.0},
            "task": {},
            "engine": {"kind": "hf", "dtype": "float32", "device": "cpu"},
            "pool": {"workers": 2},
            "budget": {"generations": 1},
        }
    )
    setup = WorkerSetup(config, space, fingerprint(folder), tuple(random_prompts(5, 9)), slots=2, parameters=1)
    return Pool(setup, lambda _: None)


def on_runner(pool: CallRunner, space: LoraSpace, theta: Any) -> tuple[gradients.Gradient, list[Vector]]:
    """Some samples are read whole, and a group's prompt once."""
    drawn = [replace(sample, values={}) for sample in [*samples(), *groups()[:3]]]
    rows = gradients.logprobs(pool, drawn, None, -1, max_tokens=70).rows
    return gradients.gradient(pool, reverse_kl, drawn, theta, 3, dim=space.dim, max_tokens=70), rows


class Asked:
    """Workers that note their calls, and say that each token is certain."""

    size = 1

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def put(self, value: Any) -> Any:
        return value

    def run(self, calls: Sequence[Call]) -> list[Any]:
        self.calls += calls
        return [LogProbs([np.zeros(len(each.completion_ids)) for each in call.arguments[0]], 1, 0.5) for call in calls]


def test_only_a_teacher_may_lack_a_token_and_nobody_may_say_what_is_no_number() -> None:
    runner = Asked()
    gradients.logprobs(runner, samples()[:1], None, -1, max_tokens=1000)
    gradients.teacher_logprobs(runner, samples()[:1], max_tokens=1000)
    faults = []
    for call in runner.calls:
        for value in (-1.0, -np.inf, np.nan):
            row = np.full(len(samples()[0].completion_ids), -1.0)
            row[-1] = value
            faults.append(call.fault(LogProbs([row], 1, 0.5)))
    mine, teachers = "a log-probability is not finite", "a log-probability of the teacher is not finite"
    assert faults == [None, mine, mine, None, None, teachers]
    assert all(isinstance(fault, NotFinite) for fault in faults if fault is not None)


# In a worker


class Recorder:
    """An engine or a model of which all that matters is what it is asked, and in what order."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self.log.append(f"{self.name}.{method}")
            return PartialGradient(np.zeros(1, np.float32), 0.0, {}, 0)

        return call


def test_a_worker_begins_with_what_torch_wants_for_sums_in_a_fixed_order_on_a_gpu() -> None:
    """It looks at its first product on a GPU, which is the engine's, and refuses all gradients if it was not there."""
    assert environment(threads=1)["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")


def test_engine_and_gradients_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    worker: Any = actor.Worker(Any, 0, None)  # type: ignore[arg-type]
    worker._engine, worker._model = Recorder("engine", log), None
    monkeypatch.setattr(actor, "build_gradient_model", lambda *_: Recorder("model", log))
    theta = np.zeros(1, np.float32)

    def asked(method: str, *arguments: Any) -> list[str]:
        log.clear()
        getattr(worker, method)(*arguments)
        return list(log)

    def evaluated() -> list[str]:
        log.clear()
        with pytest.raises(AttributeError):  # for want of a scorer
            worker.evaluate(Chunk(0, 0, 0.0, (), (), Sampling(1)), [], theta, 0)
        return list(log)

    assert evaluated() == ["engine.set_center", "engine.write_slots"]
    taken = ["engine.rest", "model.wake"]
    loaded = ["engine.rest", *taken]
    assert asked("gradient", None, [], theta, 4) == [*loaded, "model.set_theta", "model.gradient"]
    assert asked("gradient", None, [], theta, 4) == [*taken, "model.gradient"]
    assert asked("logprobs", [], None, 5) == [*taken, "model.logprobs", "model.tokens_read"]
    assert asked("gradient", None, [], theta, 5) == [*taken, "model.set_theta", "model.gradient"]
    assert evaluated() == ["model.rest", "engine.wake", "engine.write_slots"]
    assert asked("release_gradients") == ["model.rest", "engine.wake"]
    assert evaluated() == ["engine.write_slots"]
    assert asked("gradient", None, [], theta, 5) == [*loaded, "model.set_theta", "model.gradient"]
    # Another run: slots are written, which on a GPU must be in its memory then.
    monkeypatch.setattr(actor, "_noise_cache_bytes", lambda _: 0)
    worker._setup = SimpleNamespace(config=SimpleNamespace(task=None, seed=1), space=None)
    assert asked("assign", worker._setup) == ["model.rest", "engine.wake", "engine.assign"]
    assert asked("gradient", None, [], theta, 5) == [*loaded, "model.set_theta", "model.gradient"]
    assert evaluated() == ["model.rest", "engine.wake", "engine.set_center", "engine.write_slots"]


def test_gradients_are_not_taken_in_float16() -> None:
    """A loss is a mean over all tokens of an update: its slopes are below what float16 can hold."""
    worker: Any = actor.Worker(Any, 0, None)  # type: ignore[arg-type]
    for learns, dtype in ((True, "bfloat16"), (False, "float16")):
        worker._setup, worker._engine = SimpleNamespace(learns=learns), SimpleNamespace(dtype=dtype)
        worker._check_type()
    worker._setup.learns = True
    with pytest.raises(ValueError, match=r"^engine\.dtype: the model is in float16, .* accepted .* are bfloat16"):
        worker._check_type()


def test_loading_the_model_costs_a_run_no_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run of a comparison has workers load it anew: methods without gradients would have more of the budget."""
    now = 0.0
    monkeypatch.setattr(actor, "time", SimpleNamespace(perf_counter=lambda: now))

    def load(*_: object) -> Recorder:
        nonlocal now
        now += 60.0
        return Recorder("model", [])

    monkeypatch.setattr(actor, "build_gradient_model", load)
    worker: Any = actor.Worker(Any, 0, None)  # type: ignore[arg-type]
    worker._engine, worker._model = Recorder("engine", []), None
    theta = np.zeros(1, np.float32)
    assert worker.gradient(None, [], theta, 0).seconds == 0
    worker.release_gradients()
    assert worker.logprobs([], theta, 0).seconds == 0
    worker.release_gradients()
    assert worker.teacher_logprobs([]).seconds == 0
    assert now == 3 * 60
