from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es_engine.spaces.lora import LoraSpace, Train, Units
from workers import canary
from workers.canary import CanaryReport
from workers.engine import CENTER, Member, Request, Vector
from workers.hf_engine import HfEngine
from workers.models import linear_matrices

RUN_SEED = 7


def build_space(model: Path, train: Train = "B", units: Units = "weight", init: Path | None = None) -> LoraSpace:
    return LoraSpace(linear_matrices(model, "all-linear"), rank=4, alpha=8.0, train=train, units=units, init=init)


def random_prompts() -> list[tuple[int, ...]]:
    rng = np.random.default_rng(2)
    return [tuple(int(token) for token in rng.integers(3, 38, length)) for length in (12, 25, 40)]


def check(model: Path, space: LoraSpace, kind: type[HfEngine], reference: bool = True) -> CanaryReport:
    engine = kind(model, space, RUN_SEED, 0, "float32")
    sound = HfEngine(model, space, RUN_SEED, 0, "float32") if reference else None
    return canary.check(engine, space, random_prompts(), sound)


@pytest.mark.parametrize("train", ["A", "B", "AB"])
@pytest.mark.parametrize("units", ["weight", "raw"])
def test_a_sound_engine_passes(random_llama: Path, train: Train, units: Units) -> None:
    report = check(random_llama, build_space(random_llama, train, units), HfEngine)
    assert 0.5 < report.effect < 0.8, "one size of random adapter for every space"
    assert report.zero == report.reference == 0.0


@pytest.mark.parametrize("train", ["A", "B", "AB"])
def test_a_space_that_starts_from_an_adapter_passes(random_llama: Path, train: Train, tmp_path: Path) -> None:
    random = build_space(random_llama, "AB")
    random.save(np.random.default_rng(0).standard_normal(random.dim).astype(np.float32), tmp_path, str(random_llama))
    report = check(random_llama, build_space(random_llama, train, init=tmp_path), HfEngine)
    assert report.effect > 0.3
    assert report.zero == report.reference == 0.0


def test_without_a_reference_only_the_base_model_is_compared(random_llama: Path) -> None:
    report = check(random_llama, build_space(random_llama), HfEngine, reference=False)
    assert report.effect > 0.1
    assert report.reference is None


# Faults, each in a real engine


class NeverWritten(HfEngine):
    """Its slots keep what they began with."""

    def _load(self, theta: Vector) -> None:
        super()._load(self._space.start())


class WrittenOnce(HfEngine):
    """Slot 0 is written and served to everyone."""

    def _load(self, theta: Vector) -> None:
        super()._load(self._thetas[0])


class ScaledTwice(HfEngine):
    """alpha/r is folded into B and then applied once more."""

    def _load(self, theta: Vector) -> None:
        super()._load(theta * np.float32(self._space.scaling))


class NeverScaled(HfEngine):
    """alpha/r is forgotten."""

    def _load(self, theta: Vector) -> None:
        super()._load(theta / np.float32(self._space.scaling))


class Swapped(HfEngine):
    """Two slices of each packed module are in each other's place."""

    first, second = "", ""

    def _load(self, theta: Vector) -> None:
        super()._load(theta)
        modules = dict(self._model.named_modules())
        for name, one in modules.items():
            if name.endswith(self.first):
                other = modules[name.replace(self.first, self.second)]
                for factor in ("lora_A", "lora_B"):
                    mine, theirs = (getattr(each, factor)["default"].weight.data for each in (one, other))
                    rows = min(len(mine), len(theirs))
                    mine[:rows], theirs[:rows] = theirs[:rows].clone(), mine[:rows].clone()


class KeyAndValueSwapped(Swapped):
    first, second = "k_proj", "v_proj"


class QueryAndKeySwapped(Swapped):
    first, second = "q_proj", "k_proj"


class GateAndUpSwapped(Swapped):
    first, second = "gate_proj", "up_proj"


class MembersPermuted(HfEngine):
    """Members are written from the last slot to the first."""

    def write_slots(self, generation: int, sigma: float, members: Sequence[Member]) -> None:
        super().write_slots(generation, sigma, members[::-1])


class SlotOfTheNeighbour(HfEngine):
    """Requests without an adapter get the last slot's, as from vLLM's own CPU wrapper."""

    def logprobs(self, requests: Sequence[Request]) -> list[Vector]:
        return super().logprobs([Request(1 if each.slot is None else each.slot, each.prompt_ids) for each in requests])


class OtherSeed(HfEngine):
    """Draws other noise than the reference."""

    def write_slots(self, generation: int, sigma: float, members: Sequence[Member]) -> None:
        super().write_slots(generation, sigma, [Member(each.pair + each.sign, each.sign) for each in members])


class NotANumber(HfEngine):
    """Overflows."""

    def logprobs(self, requests: Sequence[Request]) -> list[Vector]:
        return [np.full_like(found, np.nan) for found in super().logprobs(requests)]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (NeverWritten, "a random adapter does not change"),
        (WrittenOnce, "a random adapter does not change"),
        (NotANumber, "the engine gives log-probabilities that are not numbers; try another engine.dtype"),
        (MembersPermuted, "the zero adapter differs from the base model"),
        (SlotOfTheNeighbour, "the zero adapter differs from the base model"),
        (ScaledTwice, "the engine differs from the reference"),
        (NeverScaled, "the engine differs from the reference"),
        (KeyAndValueSwapped, "the engine differs from the reference"),
        (QueryAndKeySwapped, "the engine differs from the reference"),
        (GateAndUpSwapped, "the engine differs from the reference"),
        (OtherSeed, "the engine differs from the reference"),
    ],
)
def test_a_faulty_engine_is_refused(random_llama: Path, fault: type[HfEngine], message: str) -> None:
    with pytest.raises(ValueError, match=f"^canary: {message}") as refused:
        check(random_llama, build_space(random_llama), fault)
    assert "\n" not in str(refused.value)


def test_a_reference_that_fails_is_no_reference(random_llama: Path) -> None:
    space = build_space(random_llama)
    sound, broken = (kind(random_llama, space, RUN_SEED, 0, "float32") for kind in (HfEngine, NotANumber))
    with pytest.raises(ValueError, match=r"^canary: the engine differs from the reference by nan"):
        canary.check(sound, space, random_prompts(), broken)


# vLLM, in half precision, where a sound engine differs most


@pytest.fixture(scope="module")
def half_reference(random_llama: Path) -> HfEngine:
    return HfEngine(random_llama, build_space(random_llama), RUN_SEED, 0, "bfloat16")


@pytest.fixture(scope="session")  # to the end: vLLM's process groups go with an engine, from all of this process
def vllm_engine(random_llama: Path) -> Any:
    from workers.vllm_engine import VllmEngine, VllmOptions

    options = VllmOptions(dtype="bfloat16", kv_cache_bytes=32 << 20, max_model_len=256)
    return VllmEngine(random_llama, build_space(random_llama), RUN_SEED, 2, 0, options)


@pytest.mark.vllm
def test_vllm_passes(vllm_engine: Any, random_llama: Path, half_reference: HfEngine) -> None:
    report = canary.check(vllm_engine, build_space(random_llama), random_prompts(), half_reference)
    assert report.effect > 0.1
    assert report.reference is not None
    assert max(report.zero, report.reference) < 0.1 * report.effect


@pytest.mark.vllm
@pytest.mark.parametrize("with_reference", [True, False])
def test_vllm_with_slots_never_written_is_refused(
    vllm_engine: Any,
    random_llama: Path,
    half_reference: HfEngine,
    with_reference: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from workers.slot_writers import FusedWriter

    space = build_space(random_llama)
    vllm_engine.set_center(space.start())
    for _ in range(2):  # it has two sets of slots
        vllm_engine.write_slots(0, 1.0, [CENTER, CENTER])
    monkeypatch.setattr(FusedWriter, "write", lambda self, slot, *member: None)
    with pytest.raises(ValueError, match=r"^canary: "):
        canary.check(vllm_engine, space, random_prompts(), half_reference if with_reference else None)


@pytest.mark.vllm
def test_vllm_that_writes_only_one_set_of_slots_is_refused(
    vllm_engine: Any, random_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.slot_writers import FusedWriter

    space = build_space(random_llama)
    vllm_engine.set_center(space.start())
    for _ in range(2):
        vllm_engine.write_slots(0, 1.0, [CENTER, CENTER])
    write = FusedWriter.write
    monkeypatch.setattr(FusedWriter, "write", lambda self, slot, *member: slot < 2 and write(self, slot, *member))
    with pytest.raises(ValueError, match=r"^canary: "):
        canary.check(vllm_engine, space, random_prompts(), None)


@pytest.mark.vllm
def test_vllm_that_scales_twice_is_refused(
    vllm_engine: Any, random_llama: Path, half_reference: HfEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.slot_writers import FusedWriter

    space = build_space(random_llama)
    write = FusedWriter.write

    def write_twice_scaled(self: Any, *member: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(self, "_scales", self._scales * np.float32(space.scaling))
            write(self, *member)

    monkeypatch.setattr(FusedWriter, "write", write_twice_scaled)
    with pytest.raises(ValueError, match=r"^canary: the engine differs from the reference"):
        canary.check(vllm_engine, space, random_prompts(), half_reference)
