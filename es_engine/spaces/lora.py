"""theta as the factors of a LoRA: DeltaW = (alpha/r) B A for every adapted matrix (Hu et al., arXiv 2106.09685).

Shapes: A (r, in), B (out, r), theta (D,). theta is the concatenation, matrix by matrix, of the trained factors in
row-major order (B before A where both are trained), each divided by its scale: factor = scale * coordinates.

With `units: weight` the scale is chosen so that theta + sigma*eps changes each matrix by sigma times that matrix's
own RMS, whatever the rank, alpha and layer: for a trained B, Var(DeltaW_ij) = (s*scale*sigma)^2 sum_k A_kj^2 with s =
alpha/r, whose mean over j is (s*scale*sigma)^2 |A|_F^2 / in; hence scale = RMS(W) sqrt(in) / (s |A|_F), and the
mirror image for a trained A. Where both are trained, A is perturbed by sigma times its own RMS, so that the statement
holds for B at the start up to a factor sqrt(1 + sigma^2). With `units: raw` every scale is 1: theta holds PEFT's own
numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from es_engine.spaces.base import Matrix

Array = npt.NDArray[np.float32]
Factor = Literal["A", "B"]
Train = Literal["A", "B", "AB"]
Units = Literal["weight", "raw"]

PLAIN_FIELDS = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "fan_in_fan_out", "ensure_weight_tying", "init_lora_weights"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
    }
)
"""Of PEFT's LoraConfig, what leaves an adapter plain, whatever it says. Any other field must say nothing."""
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""The choices of PEFT's `init_lora_weights` that leave the base model as it is."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one trained factor of one matrix lies in theta: values `theta[start:stop]`, to be reshaped and scaled."""

    matrix: Matrix
    factor: Factor
    start: int
    stop: int
    shape: tuple[int, int]
    scale: float


@dataclass(frozen=True, slots=True)
class Pair:
    """One matrix's LoRA factors in PEFT's orientation: `a` (r, in), `b` (out, r)."""

    a: Array
    b: Array


class LoraSpace:
    """Coordinates of a LoRA over a list of matrices; pure functions of theta."""

    def __init__(
        self,
        matrices: Sequence[Matrix],
        *,
        rank: int,
        alpha: float,
        train: Train = "B",
        units: Units = "weight",
        seed: int = 0,
        init: Path | None = None,
    ) -> None:
        """Raises ValueError for a matrix without scale, or an `init` adapter that does not fit."""
        self.matrices = tuple(matrices)
        self.rank = rank
        self.alpha = alpha
        self.train: Train = train
        self.units: Units = units
        self.seed = seed
        self._init = load_adapter(init, self.matrices, rank, alpha) if init else None
        self.placements = tuple(self._place())
        self.dim = self.placements[-1].stop

    @property
    def scaling(self) -> float:
        """alpha/r, the factor between B A and DeltaW."""
        return self.alpha / self.rank

    @property
    def adapter_parameters(self) -> int:
        """The numbers in an adapter: both factors of all matrices, trained or not."""
        return sum(self.rank * (matrix.in_features + matrix.out_features) for matrix in self.matrices)

    @property
    def adapter_bytes(self) -> int:
        """The size of an adapter in float32."""
        return 4 * self.adapter_parameters

    @property
    def matrix_scale(self) -> float:
        """The sigma that changes a typical matrix by its own RMS: 1 in weight units, a median over matrices in raw
        ones."""
        if self.units == "weight":
            return 1.0
        return float(np.median([self._weight_scale(index, matrix) for index, matrix in enumerate(self.matrices)]))

    @cached_property
    def initial(self) -> tuple[Pair, ...]:
        """Every matrix's factors before training, in the order of `matrices`; the untrained factor stays as it is."""
        if self._init is not None:
            return self._init
        return tuple(self._fresh(index, matrix) for index, matrix in enumerate(self.matrices))

    def start(self) -> Array:
        """theta before training, shape (D,): zeros, but for an A that is trained beside B or an adapter to start
        from."""
        return self._coordinates({matrix.name: pair for matrix, pair in zip(self.matrices, self.initial, strict=True)})

    def converted(self, theta: Array, other: LoraSpace) -> Array:
        """theta (D,) of another space that differs in nothing but its units, in the units of this one: the same
        adapter, as far as float32 holds it."""
        return theta if other.units == self.units else self._coordinates(other.adapter(theta))

    def adapter(self, theta: Array) -> dict[str, Pair]:
        """The PEFT tensors of theta by module name. Factors that are not trained are shared, not copied."""
        assert theta.shape == (self.dim,)
        factors = {
            matrix.name: {"A": pair.a, "B": pair.b} for matrix, pair in zip(self.matrices, self.initial, strict=True)
        }
        for place in self.placements:
            values = theta[place.start : place.stop].reshape(place.shape)
            factors[place.matrix.name][place.factor] = values * np.float32(place.scale)
        return {name: Pair(a=pair["A"], b=pair["B"]) for name, pair in factors.items()}

    def delta_norm(self, theta: Array) -> tuple[float, float]:
        """The Frobenius norm of DeltaW at theta (D,) over all matrices, and the same as a fraction of that of their W.

        DeltaW itself is never formed: |B A|^2 = trace(B'B A A'), and both of these are r by r.
        """
        squared = 0.0
        for pair in self.adapter(theta).values():
            a, b = pair.a.astype(np.float64), pair.b.astype(np.float64)
            squared += float(np.sum((b.T @ b) * (a @ a.T)))
        weights = sum(matrix.rms**2 * matrix.out_features * matrix.in_features for matrix in self.matrices)
        norm = self.scaling * float(np.sqrt(max(0.0, squared)))
        return norm, norm / float(np.sqrt(weights))

    def save(self, theta: Array, folder: Path, base_model: str) -> None:
        """Write theta as a standard PEFT adapter (adapter_config.json, adapter_model.safetensors)."""
        import peft
        from safetensors.numpy import save

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, pair in self.adapter(theta).items():
            tensors[_key(name, "A")] = np.ascontiguousarray(pair.a)
            tensors[_key(name, "B")] = np.ascontiguousarray(pair.b)
        # As bytes, because safetensors' own writing to a file hides the OSError of a full disk.
        (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
        peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=[matrix.name for matrix in self.matrices],
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_model,
            inference_mode=True,
        ).save_pretrained(folder)
        _sort_targets(folder / "adapter_config.json")

    def _coordinates(self, adapter: Mapping[str, Pair]) -> Array:
        """The theta of an adapter's trained factors."""
        theta = np.empty(self.dim, dtype=np.float32)
        for place in self.placements:
            pair = adapter[place.matrix.name]
            theta[place.start : place.stop] = (pair.b if place.factor == "B" else pair.a).ravel() / place.scale
        return theta

    def _place(self) -> list[Placement]:
        placements: list[Placement] = []
        start = 0
        for index, matrix in enumerate(self.matrices):
            for factor in sorted(self.train, reverse=True):
                shape = (matrix.out_features, self.rank) if factor == "B" else (self.rank, matrix.in_features)
                stop = start + shape[0] * shape[1]
                scale = self._scale(index, matrix, factor)
                placements.append(Placement(matrix, factor, start, stop, shape, scale))  # type: ignore[arg-type]
                start = stop
        return placements

    def _scale(self, index: int, matrix: Matrix, factor: str) -> float:
        if self.units == "raw":
            return 1.0
        if matrix.rms == 0:
            raise ValueError(f"space.units: {matrix.name} holds only zeros, so weight units have no scale; use raw")
        if self.train == "AB" and factor == "A":
            return self._norm(index, "A") / float(np.sqrt(self.rank * matrix.in_features))
        return self._weight_scale(index, matrix)

    def _weight_scale(self, index: int, matrix: Matrix) -> float:
        """RMS of noise on one factor (A where only A is trained, else B) that changes DeltaW by the matrix's RMS."""
        other: Factor = "B" if self.train == "A" else "A"
        fan = matrix.out_features if self.train == "A" else matrix.in_features
        return matrix.rms * float(np.sqrt(fan)) / (self.scaling * self._norm(index, other))

    def _norm(self, index: int, factor: Factor) -> float:
        """Frobenius norm of a matrix's initial factor; sqrt(r) for fresh factors, whose r vectors have unit length."""
        if self._init is None:
            return float(np.sqrt(self.rank))
        pair = self._init[index]
        norm = float(np.linalg.norm((pair.a if factor == "A" else pair.b).astype(np.float64)))
        if norm == 0:
            raise ValueError(
                f"space.init: factor {factor} of {self.matrices[index].name} is zero, so nothing scales its partner"
            )
        return norm

    def _fresh(self, index: int, matrix: Matrix) -> Pair:
        """One factor random with unit vectors, keyed by (space seed, matrix); the other zero, so that DeltaW = 0."""
        # A counter that no noise has (there its second word is 0), should the seed be the run's too.
        key = np.array([self.seed, index], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key, counter=[0, 1, 0, 0]))
        fixed: Factor = "B" if self.train == "A" else "A"
        fan = matrix.out_features if fixed == "B" else matrix.in_features
        vectors = rng.standard_normal((self.rank, fan))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = vectors.astype(np.float32)
        if fixed == "B":
            return Pair(a=np.zeros((self.rank, matrix.in_features), np.float32), b=np.ascontiguousarray(unit.T))
        return Pair(a=unit, b=np.zeros((matrix.out_features, self.rank), np.float32))


def load_adapter(folder: Path, matrices: Sequence[Matrix], rank: int, alpha: float) -> tuple[Pair, ...]:
    """Read a PEFT LoRA adapter of this rank, as float32, with B rescaled where its alpha differs.

    Raises ValueError if it does not fit.
    """
    config = adapter_config(folder)
    if config["r"] != rank:
        raise ValueError(f"space.rank: {folder} has rank {config['r']}, not {rank}")
    rescale = np.float32(float(config["lora_alpha"]) / alpha)
    with _opened(folder) as tensors:
        wanted = {_key(matrix.name, factor) for matrix in matrices for factor in ("A", "B")}
        if wanted != set(tensors.keys()):
            odd = sorted(wanted ^ set(tensors.keys()))[0]
            raise ValueError(
                f"space.targets: {folder} does not adapt the same matrices: {odd} is in one and not the other"
            )
        for matrix in matrices:  # before any of them is read
            _check_shapes(tensors, matrix, rank)
        return tuple(_pair(tensors, matrix, rescale) for matrix in matrices)


def adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a plain PEFT LoRA. Raises ValueError for anything else."""
    path = folder / "adapter_config.json"
    if not path.is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"{folder} is not a PEFT adapter: it needs adapter_config.json and adapter_model.safetensors")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the file is damaged, it is not JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: only plain LoRA adapters are accepted, and it is not of peft_type LORA")
    if odd := next((field for field, value in config.items() if _changes(field, value)), None):
        raise ValueError(
            f"{path}: only plain LoRA adapters are accepted (no DoRA, rsLoRA or ranks and alphas of single modules), "
            f"and it has {odd}: {config[odd]!r:.60}"
        )
    if not (_is_count(config.get("r")) and _is_positive(config.get("lora_alpha"))):
        raise ValueError(f"{path}: r and lora_alpha must be a whole number of at least 1, and a number above 0")
    if config.get("init_lora_weights") not in PLAIN_INITS:
        raise ValueError(
            f"{path}: its init_lora_weights, {config['init_lora_weights']!r}, changes the base model as well; convert "
            "the adapter to a plain LoRA first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config


def adapted_modules(folder: Path) -> tuple[str, ...]:
    """The names of the modules that a PEFT LoRA adapter changes, sorted. Raises ValueError if it is not one."""
    adapter_config(folder)
    with _opened(folder) as tensors:
        keys = list(tensors.keys())
    prefix, suffix = _key("", "A").split("..", 1)
    return tuple(
        sorted(key.removeprefix(f"{prefix}.").removesuffix(f".{suffix}") for key in keys if key.endswith(suffix))
    )


def _changes(field: str, value: Any) -> bool:
    """Does a field of an adapter's config make it more than a plain LoRA?"""
    return bool(value) and field not in PLAIN_FIELDS and (field, value) != ("bias", "none")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    """An adapter's tensors, of which only those that are asked for are read."""
    from safetensors import SafetensorError, safe_open

    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as tensors:  # numpy has no bfloat16
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def _sort_targets(config_file: Path) -> None:
    """PEFT writes a set, in an order that changes from process to process."""
    config = json.loads(config_file.read_text())
    config["target_modules"].sort()
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True))


def _check_shapes(tensors: Any, matrix: Matrix, rank: int) -> None:
    a, b = (tuple(tensors.get_slice(_key(matrix.name, factor)).get_shape()) for factor in ("A", "B"))
    if a != (rank, matrix.in_features) or b != (matrix.out_features, rank):
        raise ValueError(
            f"space.init: {matrix.name} has A {a} and B {b} in the adapter, but the model wants "
            f"({rank}, {matrix.in_features}) and ({matrix.out_features}, {rank})"
        )


def _pair(tensors: Any, matrix: Matrix, rescale: np.float32) -> Pair:
    a, b = (tensors.get_tensor(_key(matrix.name, factor)).float().numpy() for factor in ("A", "B"))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"space.init: {matrix.name} has numbers in the adapter that are infinite, or none")
    return Pair(a=a, b=b * rescale)


def _key(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"
