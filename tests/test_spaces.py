"""theta as a LoRA: the scale of sigma, the factors, and the way to PEFT's files and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from es_engine import noise
from es_engine.spaces.base import Matrix
from es_engine.spaces.lora import LoraSpace, Pair, Train, adapter_config
from workers.models import linear_matrices

MATRICES = (
    Matrix("layers.0.q_proj", 24, 16, rms=0.2),
    Matrix("layers.0.k_proj", 8, 16, rms=0.05),
    Matrix("layers.0.down_proj", 16, 40, rms=1.7),
)
DRAWS = 200


def delta(space: LoraSpace, theta: noise.Vector) -> dict[str, Any]:
    """DeltaW of every matrix, in float64."""
    return {
        name: space.scaling * pair.b.astype(np.float64) @ pair.a.astype(np.float64)
        for name, pair in space.adapter(theta).items()
    }


def some_theta(space: LoraSpace, pair: int = 0) -> noise.Vector:
    return noise.draw(1, 2, pair, space.dim)


def assert_close(one: dict[str, Any], other: dict[str, Any], rtol: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=rtol, atol=rtol * np.abs(other[name]).max())


def perturbed_rms(space: LoraSpace, sigma: float) -> dict[str, float]:
    """RMS, over entries and draws, of what noise of scale sigma adds to DeltaW."""
    start = delta(space, space.start())
    squares = dict.fromkeys(start, 0.0)
    for pair in range(DRAWS):
        moved = delta(space, space.start() + np.float32(sigma) * some_theta(space, pair))
        for name in squares:
            squares[name] += float(np.mean((moved[name] - start[name]) ** 2)) / DRAWS
    return {name: float(np.sqrt(square)) for name, square in squares.items()}


def tolerance(space: LoraSpace, matrix: Matrix, fixed: Any) -> float:
    """Five standard deviations of the measured RMS, relative: an error rate below 1e-5 for each matrix.

    The square is a mean over rows of quadratic forms of normals in F = A A^T (or B^T B), with relative variance
    2 tr(F^2) / tr(F)^2 for each row.
    """
    gram = fixed @ fixed.T
    rows = matrix.in_features if space.train == "A" else matrix.out_features
    variance = 2 * np.trace(gram @ gram) / np.trace(gram) ** 2 / (rows * DRAWS)
    return 5 * float(np.sqrt(variance)) / 2


@pytest.mark.parametrize("train", ["B", "A"])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (4, 32.0), (8, 2.5), (32, 16.0)])
def test_sigma_in_weight_units_is_a_fraction_of_each_matrixs_rms(train: Train, rank: int, alpha: float) -> None:
    space = LoraSpace(MATRICES, rank=rank, alpha=alpha, train=train, seed=3)
    measured = perturbed_rms(space, sigma=0.03)
    for matrix, pair in zip(MATRICES, space.initial, strict=True):
        fixed = pair.a if train == "B" else pair.b.T
        expected = 0.03 * matrix.rms
        assert measured[matrix.name] == pytest.approx(expected, rel=tolerance(space, matrix, fixed)), matrix.name


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_where_both_factors_are_trained_the_cross_term_adds_sigma_squared(sigma: float) -> None:
    space = LoraSpace(MATRICES, rank=8, alpha=32, train="AB")
    measured = perturbed_rms(space, sigma)
    for matrix in MATRICES:
        expected = sigma * matrix.rms * np.sqrt(1 + sigma**2)
        assert measured[matrix.name] == pytest.approx(expected, rel=0.05), matrix.name


def test_an_adapter_to_start_from_keeps_sigma_in_weight_units(tmp_path: Path) -> None:
    """Its factors are of any size; noise is measured against them, not against those of a fresh adapter."""
    raw = LoraSpace(MATRICES, rank=4, alpha=8, train="AB", units="raw")
    sizes = np.repeat(np.array([0.01, 3, 20], np.float32), -(-raw.dim // 3))[: raw.dim]
    raw.save(some_theta(raw) * sizes, tmp_path, "base")
    for train in ("A", "B"):
        space = LoraSpace(MATRICES, rank=4, alpha=8, train=train, init=tmp_path)
        measured = perturbed_rms(space, sigma=0.03)
        for matrix, pair in zip(MATRICES, space.initial, strict=True):
            slack = tolerance(space, matrix, pair.a if train == "B" else pair.b.T)
            assert measured[matrix.name] == pytest.approx(0.03 * matrix.rms, rel=slack), (train, matrix.name)


def test_matrix_scale_says_how_large_a_raw_sigma_is() -> None:
    matrix = MATRICES[0]
    assert LoraSpace([matrix], rank=4, alpha=8).matrix_scale == 1.0
    raw = LoraSpace([matrix], rank=4, alpha=8, units="raw")
    slack = tolerance(raw, matrix, raw.initial[0].a)
    assert perturbed_rms(raw, raw.matrix_scale)[matrix.name] == pytest.approx(matrix.rms, rel=slack)


@pytest.mark.parametrize("train", ["A", "B", "AB"])
def test_the_norm_of_delta_is_that_of_the_dense_matrices(train: Train) -> None:
    space = LoraSpace(MATRICES, rank=4, alpha=8.0, train=train, units="raw")
    theta = some_theta(space)
    dense = np.sqrt(sum(np.sum(np.square(each, dtype=np.float64)) for each in delta(space, theta).values()))
    weights = np.sqrt(sum(matrix.rms**2 * matrix.out_features * matrix.in_features for matrix in MATRICES))
    assert space.delta_norm(theta) == pytest.approx((dense, dense / weights), rel=1e-6)
    assert space.delta_norm(np.zeros_like(theta)) == (0, 0)


@pytest.mark.parametrize("train", ["A", "B"])
def test_delta_is_linear_in_theta_while_one_factor_is_fixed(train: Train) -> None:
    space = LoraSpace(MATRICES, rank=4, alpha=32, train=train)
    one, other = some_theta(space, 0), some_theta(space, 1)
    left, right = delta(space, one), delta(space, other)
    both = delta(space, np.float32(2) * one - np.float32(0.5) * other)
    assert_close(both, {name: 2 * left[name] - 0.5 * right[name] for name in left})


@pytest.mark.parametrize("units", ["weight", "raw"])
@pytest.mark.parametrize("train", ["A", "B", "AB"])
def test_a_fresh_start_is_the_base_model(train: Train, units: Any) -> None:
    space = LoraSpace(MATRICES, rank=4, alpha=32, train=train, units=units)
    assert all(not change.any() for change in delta(space, space.start()).values())
    factors = [pair.b if train == "A" else pair.a for pair in space.adapter(space.start()).values()]
    assert all(factor.any() for factor in factors)  # or no step could ever change anything


@pytest.mark.parametrize("train", ["A", "B", "AB"])
def test_theta_holds_the_trained_factors_and_nothing_else(train: Train) -> None:
    space = LoraSpace(MATRICES, rank=4, alpha=32, train=train)
    sizes = {"A": sum(4 * m.in_features for m in MATRICES), "B": sum(4 * m.out_features for m in MATRICES)}
    assert space.dim == sum(sizes[factor] for factor in train)
    assert [place.start for place in space.placements] == [0, *(place.stop for place in space.placements[:-1])]
    moved, start = space.adapter(space.start() + 1), space.adapter(space.start())
    for name in start:
        assert np.all(moved[name].a != start[name].a) == ("A" in train)
        assert np.all(moved[name].b != start[name].b) == ("B" in train)


def test_factors_are_row_major_and_in_the_order_of_the_matrices() -> None:
    space = LoraSpace(MATRICES[:2], rank=2, alpha=2, train="AB", units="raw")
    adapter = space.adapter(np.arange(space.dim, dtype=np.float32))
    flat = [factor.ravel() for pair in adapter.values() for factor in (pair.b, pair.a)]
    assert np.concatenate(flat).tolist() == list(range(space.dim))
    assert [pair.b.shape for pair in adapter.values()] == [(24, 2), (8, 2)]
    assert [pair.a.shape for pair in adapter.values()] == [(2, 16), (2, 16)]


def test_fixed_factors_have_unit_vectors_keyed_by_seed_and_matrix() -> None:
    space = LoraSpace(MATRICES, rank=4, alpha=8, seed=1)
    for pair in space.initial:
        np.testing.assert_allclose(np.linalg.norm(pair.a, axis=1), 1, rtol=1e-6)
    for pair in LoraSpace(MATRICES, rank=4, alpha=8, seed=1, train="A").initial:
        np.testing.assert_allclose(np.linalg.norm(pair.b, axis=0), 1, rtol=1e-6)
    again, other = (LoraSpace(MATRICES, rank=4, alpha=8, seed=seed).initial for seed in (1, 2))
    assert all(np.array_equal(one.a, two.a) for one, two in zip(space.initial, again, strict=True))
    assert all(not np.isclose(one.a, two.a).any() for one, two in zip(space.initial, other, strict=True))
    assert not np.isclose(space.initial[0].a, space.initial[1].a).any()


def test_a_matrix_of_zeros_has_no_weight_units() -> None:
    matrices = [MATRICES[0], Matrix("dead", 4, 4, rms=0.0)]
    with pytest.raises(ValueError, match=r"space\.units: dead holds only zeros"):
        LoraSpace(matrices, rank=2, alpha=2)
    assert LoraSpace(matrices, rank=2, alpha=2, units="raw").dim == 2 * 28


def saved(folder: Path, *, rank: int = 4, alpha: float = 8.0) -> tuple[LoraSpace, noise.Vector]:
    """An adapter whose A and B are both random, saved in a folder."""
    space = LoraSpace(MATRICES, rank=rank, alpha=alpha, train="AB", units="raw")
    theta = some_theta(space)
    space.save(theta, folder, "base")
    return space, theta


@pytest.mark.parametrize("train", ["A", "B", "AB"])
def test_an_adapter_comes_back_through_its_files(tmp_path: Path, train: Train) -> None:
    first, theta = saved(tmp_path)
    raw = LoraSpace(MATRICES, rank=4, alpha=8, train=train, units="raw", init=tmp_path)
    assert_same(raw.adapter(raw.start()), first.adapter(theta))
    if train == "AB":
        assert raw.start().tobytes() == theta.tobytes()
    scaled = LoraSpace(MATRICES, rank=4, alpha=8, train=train, units="weight", init=tmp_path)
    assert_close(delta(scaled, scaled.start()), delta(first, theta))


def assert_same(one: dict[str, Pair], other: dict[str, Pair]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert np.array_equal(one[name].a, other[name].a), name
        assert np.array_equal(one[name].b, other[name].b), name


def test_an_adapter_of_another_alpha_keeps_its_effect(tmp_path: Path) -> None:
    first, theta = saved(tmp_path, alpha=8)
    second = LoraSpace(MATRICES, rank=4, alpha=3, units="raw", init=tmp_path)
    assert_close(delta(second, second.start()), delta(first, theta))


def test_a_bfloat16_adapter_is_read(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    halves = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(halves, path)
    space = LoraSpace(MATRICES, rank=4, alpha=8, units="raw", init=tmp_path)
    expected = halves["base_model.model.layers.0.q_proj.lora_B.weight"].float().numpy()
    assert np.array_equal(space.adapter(space.start())["layers.0.q_proj"].b, expected)


def test_a_zero_partner_is_refused_in_weight_units(tmp_path: Path) -> None:
    fresh = LoraSpace(MATRICES, rank=4, alpha=8)
    fresh.save(fresh.start(), tmp_path, "base")
    with pytest.raises(ValueError, match=r"space\.init: factor B of layers\.0\.q_proj is zero"):
        LoraSpace(MATRICES, rank=4, alpha=8, train="A", init=tmp_path)
    assert LoraSpace(MATRICES, rank=4, alpha=8, train="B", init=tmp_path).start().any() == np.False_


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"^space\.rank: .* has rank 4, not 8$"):
        LoraSpace(MATRICES, rank=8, alpha=8, init=tmp_path)
    with pytest.raises(ValueError, match=r"^space\.targets: .*down_proj.* is in one and not the other$"):
        LoraSpace(MATRICES[:2], rank=4, alpha=8, init=tmp_path)
    with pytest.raises(ValueError, match=r"^space\.targets: .*up_proj.* is in one and not the other$"):
        LoraSpace([*MATRICES, Matrix("layers.0.up_proj", 4, 4, 1.0)], rank=4, alpha=8, init=tmp_path)
    wider = [*MATRICES[:2], Matrix("layers.0.down_proj", 16, 41, 1.7)]
    with pytest.raises(ValueError, match=r"^space\.init: layers\.0\.down_proj has A \(4, 40\) .* wants \(4, 41\)"):
        LoraSpace(wider, rank=4, alpha=8, init=tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "only plain LoRA"),
        ({"use_rslora": True}, "only plain LoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "only plain LoRA"),
        ({"alpha_pattern": {"q_proj": 2}}, "only plain LoRA"),
        ({"peft_type": "LOHA"}, "only plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights, 'pissa', changes the base model"),
        ({"init_lora_weights": "olora"}, "init_lora_weights, 'olora', changes the base model"),
    ],
)
def test_adapters_of_other_kinds_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=words) as caught:
        LoraSpace(MATRICES, rank=4, alpha=8, init=tmp_path)
    assert "adapter_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a PEFT adapter: it needs"):
        adapter_config(tmp_path)
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        LoraSpace(MATRICES, rank=4, alpha=8, init=tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text()[:-5])
    with pytest.raises(ValueError, match=r"adapter_config\.json: the file is damaged, it is not JSON"):
        adapter_config(tmp_path)


def base_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("targets", ["all-linear", ("layers.1.mlp.up_proj", "v_proj")])
def test_peft_loads_what_is_saved(random_llama: Path, tmp_path: Path, targets: Any) -> None:
    """On exactly the matrices of the space, and with exactly its DeltaW: W + (alpha/r) B A once merged."""
    space = LoraSpace(linear_matrices(random_llama, targets), rank=4, alpha=10, train="AB")
    theta = space.start() + np.float32(0.3) * some_theta(space)
    space.save(theta, tmp_path, str(random_llama))
    before = {name: weight.clone() for name, weight in base_model(random_llama).state_dict().items()}
    model = peft.PeftModel.from_pretrained(base_model(random_llama), tmp_path)
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert adapted == {matrix.name for matrix in space.matrices}
    for name, pair in space.adapter(theta).items():
        layer = model.base_model.model.get_submodule(name)
        assert np.array_equal(layer.lora_A["default"].weight.detach().numpy(), pair.a)
        assert np.array_equal(layer.lora_B["default"].weight.detach().numpy(), pair.b)
    merged = model.merge_and_unload().state_dict()
    changes = delta(space, theta)
    assert merged.keys() == before.keys()
    for name, weight in merged.items():
        expected = before[name].double().numpy() + changes.get(name.removesuffix(".weight"), 0.0)
        np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(weight, before[name]) == (name.removesuffix(".weight") not in changes)


def test_what_peft_saves_is_loaded(random_llama: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base_model(random_llama), config)
    model.save_pretrained(tmp_path)
    space = LoraSpace(linear_matrices(random_llama, "all-linear"), rank=4, alpha=16, units="raw", init=tmp_path)
    for name, pair in space.adapter(space.start()).items():
        layer = model.base_model.model.get_submodule(name)
        assert np.array_equal(layer.lora_A["default"].weight.detach().numpy(), pair.a)
        assert np.array_equal(layer.lora_B["default"].weight.detach().numpy(), pair.b)


def test_the_config_file_does_not_depend_on_the_order_of_a_set(tmp_path: Path) -> None:
    """PEFT keeps target modules in a set, whose order changes with the hash seed of the process."""
    space = LoraSpace([Matrix(f"layers.{i}.q_proj", 4, 4, 1.0) for i in range(12)], rank=1, alpha=1)
    space.save(space.start(), tmp_path, "base")
    written = adapter_config(tmp_path)["target_modules"]
    assert written == sorted(matrix.name for matrix in space.matrices)
