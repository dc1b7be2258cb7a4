"""The part that lives inside each of vLLM's own workers: adapter slots written in memory.

vLLM mixes `SlotExtension` into its worker class (`worker_extension_cls`), and the engine calls it by
`collective_rpc`, so the same code writes the slots of one process or of every rank of a tensor-parallel worker. What
crosses is theta once a generation and a few numbers a member; perturbed adapters are made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from es_engine.spaces.lora import Factor, LoraSpace, Placement, Train
from workers import cpu_tuning, grouped_lora
from workers.engine import Filling, Member, Vector, pairs_of
from workers.perturbation import Perturber
from workers.slot_writers import FusedWriter, Place, SlotWriter, StagedWriter
from workers.stale_cache import StaleCache

# Here, because every rank imports this module before it builds its layers.
cpu_tuning.install()
grouped_lora.install()


@dataclass(frozen=True, slots=True)
class SlotTensor:
    """One factor of one matrix in every slot: `stack` (slots, 1, rows, columns) of slice `part` of a vLLM layer."""

    layer: Any
    part: int
    stack: torch.Tensor


class SlotExtension:
    """Methods added to vLLM's worker; `es_` keeps them apart from its own."""

    model_runner: Any
    rank: int

    def es_claim_slots(self, slots: int, sets: int) -> None:
        """Claim all slots for good, `sets` times `slots` of them."""
        _claim_slots(self.model_runner.lora_manager, sets * slots)
        self._es_slots, self._es_sets = slots, sets
        self._es_background = ThreadPoolExecutor(1, thread_name_prefix="slots")
        self._es_writing: Future[Filling] | None = None
        self._es_cache = StaleCache(self.model_runner)
        cpu_tuning.keep_logits(self.model_runner.sampler)
        cpu_tuning.spare_generators(self.model_runner)

    def es_assign(self, space: LoraSpace, run_seed: int, cache_bytes: int) -> None:
        """Make the slots those of a run, and write the factors that it does not train into all of them."""
        self.es_settle()
        manager = self.model_runner.lora_manager._adapter_manager
        memory = grouped_lora.stack_slots(manager, shared=_untrained(space))
        self._es_space = space
        self._es_first = 0
        self._es_generation = -1
        self._es_ahead: Filling | None = None  # what the other set of slots already holds
        self._es_perturber = Perturber(run_seed, space.dim, cache_bytes)
        self._es_sum = np.empty(space.dim, dtype=np.float32)  # new memory would cost a page fault for every 4 KiB
        self._es_tensors = _find_slot_tensors(manager, space)
        for matrix, pair in zip(space.matrices, space.initial, strict=True):
            for slot in range(self._es_sets * self._es_slots):
                _write(self._es_tensors[matrix.name, "A"], slot, torch.from_numpy(pair.a), 1.0)
                _write(self._es_tensors[matrix.name, "B"], slot, torch.from_numpy(pair.b), space.scaling)
        places = [self._es_place(placement) for placement in space.placements]
        self._es_writer: SlotWriter = (
            StagedWriter(places, space.dim, self.model_runner.device)
            if memory is None
            else FusedWriter(places, space.rank, memory)
        )
        grouped_lora.pack_shared(manager)

    def es_set_center(self, theta: Vector) -> None:
        """Make theta, shape (D,), the center of the slots written from now on."""
        self.es_settle()
        self._es_ahead = None
        self._es_perturber.center = theta.copy()  # Ray's arrays are read-only, the caller's may change

    def es_write_slots(self, generation: int, sigma: float, members: tuple[Member, ...]) -> int:
        """Write members into a set of slots, fresh from theta + sign*sigma*eps, unless they have been written ahead;
        the first slot of the set."""
        assert len(members) <= self._es_slots
        self.es_settle()
        self._es_cache.clean()
        if self._es_ahead != (generation, sigma, members):
            self._es_write_set(generation, sigma, members)
        self._es_ahead = None
        self._es_generation = generation
        self._es_first = self._es_next_set()
        return self._es_first

    def es_write_ahead(self, generation: int, sigma: float, members: tuple[Member, ...]) -> None:
        """Draw members' noise in the background, as far as there is room for it, and write them into the other set of
        slots if there is one; not those of a later generation, whose center is not known yet."""
        self.es_settle()
        self._es_ahead = None
        self._es_perturber.prepare(generation, pairs_of(members))
        if self._es_sets > 1 and generation == self._es_generation:
            self._es_writing = self._es_background.submit(self._es_write_set, generation, sigma, members)

    def es_noise_sum(self, generation: int, pairs: Sequence[int], weights: Sequence[float]) -> Vector | None:
        """The sum of weight * eps(pair), shape (D,), by the first rank alone; good until the next call."""
        self.es_settle()
        if self.rank != 0:
            return None
        return self._es_perturber.noise_sum(generation, pairs, weights, out=self._es_sum)

    def es_settle(self) -> None:
        """Wait for the background, which alone uses the perturber while it writes; raises what went wrong there."""
        writing, self._es_writing = self._es_writing, None
        if writing is not None:
            self._es_ahead = writing.result()

    def _es_next_set(self) -> int:
        return (self._es_first + self._es_slots) % (self._es_sets * self._es_slots)

    def _es_write_set(self, generation: int, sigma: float, members: tuple[Member, ...]) -> Filling:
        """Write members into the set of slots that is not in use; what it then holds."""
        for slot, member in enumerate(members, start=self._es_next_set()):
            self._es_writer.write(slot, self._es_perturber, generation, sigma, member)
        if self.model_runner.device.type != "cpu":  # vLLM may run the model on a stream of its own
            torch.accelerator.synchronize(self.model_runner.device)  # of this rank: a new thread knows the first alone
        return generation, sigma, members

    def _es_place(self, placement: Placement) -> Place:
        """Where this rank's share of a trained factor goes."""
        tensor = self._es_tensors[placement.matrix.name, placement.factor]
        coordinates = torch.arange(placement.stop - placement.start)
        share = _shard(tensor, coordinates.view(placement.shape))
        first, stride = int(share[0, 0]), share.stride(0)
        if not torch.equal(share, coordinates.as_strided(share.shape, (stride, 1), first)):
            name = placement.matrix.name
            raise ValueError(f"pool.tensor_parallel: a worker's share of {name} is in several pieces; accepted is 1")
        rows, columns = share.shape
        scale = placement.scale * (self._es_space.scaling if placement.factor == "B" else 1.0)
        targets = tensor.stack[:, 0, :rows, :columns]
        return Place(placement.start + first, placement.stop, stride, scale, targets)


def _untrained(space: LoraSpace) -> Factor | None:
    """The factor that all members have in common."""
    untrained: dict[Train, Factor] = {"A": "B", "B": "A"}
    return untrained.get(space.train)


def _claim_slots(worker_manager: Any, slots: int) -> None:
    """Register and pin one zero adapter a slot, so that vLLM never loads, moves or evicts anything: slot i has id
    i+1."""
    from vllm.lora.request import LoRARequest

    worker_manager.remove_all_adapters()
    with worker_manager.dummy_lora_cache():
        for adapter_id in range(1, slots + 1):
            request = LoRARequest(lora_name=f"slot-{adapter_id - 1}", lora_int_id=adapter_id, lora_path="in-memory")
            worker_manager.add_dummy_lora(request, rank=1)
            worker_manager.pin_adapter(adapter_id)
    assert worker_manager._adapter_manager.lora_index_to_id == list(range(1, slots + 1))


def _find_slot_tensors(manager: Any, space: LoraSpace) -> dict[tuple[str, str], SlotTensor]:
    """The slot tensors of each matrix by (module name, factor). Raises ValueError if vLLM adapts no such module."""
    found: dict[tuple[str, str], SlotTensor] = {}
    for name, layer in manager.modules.items():
        for part, part_name in enumerate(manager.packed_modules.get(name, [name])):
            found[part_name, "A"] = SlotTensor(layer, part, layer.lora_a_stacked[part])
            found[part_name, "B"] = SlotTensor(layer, part, layer.lora_b_stacked[part])
    missing = [matrix.name for matrix in space.matrices if (matrix.name, "A") not in found]
    if missing:
        adapted = sorted({name.rpartition(".")[2] for name, _ in found})
        raise ValueError(f"space.targets: vLLM cannot adapt {missing[0]} of this model; it adapts {', '.join(adapted)}")
    return found


def _write(target: SlotTensor, slot: int, values: torch.Tensor, scale: float) -> None:
    """Write scale * values into this rank's share of a slot, casting to the slot's dtype; the rank is padded with
    zeros."""
    shard = _shard(target, values)
    stack = target.stack
    torch.mul(shard.to(stack.device), scale, out=stack[slot, 0, : shard.shape[0], : shard.shape[1]])


def _shard(target: SlotTensor, values: torch.Tensor) -> torch.Tensor:
    layer = target.layer
    if layer.tp_size == 1:
        return values
    is_a = target.stack is layer.lora_a_stacked[target.part]
    cut = layer.slice_lora_a if is_a else layer.slice_lora_b
    if layer.n_slices == 1:
        return cut(values)
    parts: list[torch.Tensor | None] = [None] * layer.n_slices
    parts[target.part] = values
    return cut(parts)[target.part]
