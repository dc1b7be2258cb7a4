"""vLLM engines in processes of their own, each on one thread of the same core, that take turns at work.

vLLM holds global state, and the engine replaces a part of its CPU platform, so that ways of serving members cannot be
compared within one process. A `Engine` here is a handle: `call` has the process do one piece of work and waits for it.

Every way makes the members of a population itself, from theta and the seed, so that all do the same work.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

Kind = Literal["bare", "bare, eager", "ours", "stock", "files", "merged"]
KINDS: dict[Kind, str] = {
    "bare": "vLLM without LoRA",
    "bare, eager": "vLLM without LoRA and without torch.compile, which vLLM turns off for LoRA on CPUs",
    "ours": "slots written in memory, tokens grouped by slot",
    "stock": "slots written in memory, vLLM's own LoRA arithmetic",
    "files": "a member at a time: adapter saved to files, loaded by a LoRARequest",
    "merged": "a member at a time: merged into the weights of a bare engine",
}
RUN_SEED, SIGMA, ALPHA = 1, 0.03, 32


@dataclass(frozen=True, slots=True)
class Setup:
    """An engine of a kind for a model: `slots` members at a time, of a rank that vLLM has slots for."""

    kind: Kind
    model: Path
    dtype: str
    rank: int
    slots: int
    max_model_len: int
    max_num_seqs: int
    kv_cache_bytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """`sequences` prompts of `prompt` tokens, no two alike, answered by `new` tokens each."""

    sequences: int
    prompt: int
    new: int


class Engine:
    """A handle of an engine in a process of its own."""

    def __init__(self, setup: Setup) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # read by the child when it imports torch
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, setup))
        self._process.start()
        theirs.close()
        self._receive()

    def call(self, method: str, *args: Any) -> Any:
        """Run a method of the served object there. Raises RuntimeError with the traceback of what it raises."""
        self._pipe.send((method, args))
        return self._receive()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _receive(self) -> Any:
        failed, answer = self._pipe.recv()
        if failed:
            raise RuntimeError(answer)
        return answer


def _serve(pipe: Connection, setup: Setup) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before torch is imported
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    _silence()
    try:
        served = SERVED[setup.kind](setup)
        pipe.send((False, None))
        while True:
            method, args = pipe.recv()
            pipe.send((False, getattr(served, method)(*args)))
    except EOFError:  # the handle was closed
        os._exit(0)  # vLLM's own farewell waits for process groups that were never asked for
    except Exception:  # noqa: BLE001 - the handle raises it
        pipe.send((True, traceback.format_exc()))


def _silence() -> None:
    """vLLM and its libraries write hundreds of lines, some of them past Python."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


class Bare:
    """vLLM without LoRA; the base of the others."""

    def __init__(self, setup: Setup) -> None:
        from es_engine.spaces.lora import LoraSpace
        from workers.models import linear_matrices
        from workers.perturbation import Perturber

        self.setup = setup
        self.space = LoraSpace(linear_matrices(setup.model, "all-linear"), rank=setup.rank, alpha=ALPHA)
        self.perturber = Perturber(RUN_SEED, self.space.dim, cache_bytes=0)
        self.perturber.center = self.space.start()
        self.generation = 0
        self.llm = self.build()

    def build(self) -> Any:
        from vllm import LLM

        return LLM(**self.arguments())

    def arguments(self) -> dict[str, Any]:
        setup = self.setup
        return {
            "model": str(setup.model),
            "dtype": setup.dtype,
            "max_model_len": setup.max_model_len,
            "max_num_seqs": setup.max_num_seqs,
            "kv_cache_memory_bytes": setup.kv_cache_bytes,
            "distributed_executor_backend": "uni",
            "disable_log_stats": True,
            "seed": 0,
            "enforce_eager": setup.kind == "bare, eager",
        }

    def generate(self, load: Load, members: int) -> None:
        """Answer the whole load; `members` share it evenly."""
        self.answer(self.prompts(load), [None] * load.sequences, load.new)

    def prompts(self, load: Load) -> list[list[int]]:
        import numpy as np

        vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        return np.random.default_rng(0).integers(4, vocabulary, (load.sequences, load.prompt)).tolist()

    def answer(self, prompts: Sequence[list[int]], loras: Sequence[Any], new: int) -> list[tuple[int, ...]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=new,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine = self.llm.llm_engine
        self.llm.reset_prefix_cache()  # else the next round is not the same work
        for number, (prompt, lora) in enumerate(zip(prompts, loras, strict=True)):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params, lora_request=lora)
        answers = {}
        while engine.has_unfinished_requests():
            answers.update({output.request_id: tuple(output.outputs[0].token_ids) for output in engine.step()})
        assert all(len(answer) == new for answer in answers.values())
        return [answers[str(number)] for number in range(len(prompts))]

    def member(self, number: int) -> Any:
        """theta of a member that never was, shape (D,)."""
        from workers.engine import Member

        return self.perturber.theta(self.generation, SIGMA, Member(number, 1))

    def draw(self, members: int) -> None:
        """Draw the noise of members, and nothing else."""
        self.generation += 1
        for number in range(members):
            self.perturber.eps(self.generation, number)

    def runner(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


class Slots(Bare):
    """The engine of a run: all members in one batch, each in a slot that is written in memory."""

    def build(self) -> Any:
        from workers.vllm_engine import VllmEngine, VllmOptions

        setup = self.setup
        options = VllmOptions(
            dtype=setup.dtype,
            max_model_len=setup.max_model_len,
            max_num_seqs=setup.max_num_seqs,
            kv_cache_bytes=setup.kv_cache_bytes,
        )
        self.engine = VllmEngine(setup.model, self.space, RUN_SEED, setup.slots, 0, options)
        self.engine.set_center(self.space.start())
        self.write(setup.slots)
        return self.engine._llm

    def generate(self, load: Load, members: int) -> None:
        """The slots stay as they are: a run writes those of the next chunk while this one generates."""
        from workers.engine import Request

        loras = [self.engine._lora(Request(slot, ())) for slot in range(members)]
        share = load.sequences // members
        self.answer(self.prompts(load), [lora for lora in loras for _ in range(share)], load.new)

    def write(self, members: int) -> None:
        """Fill as many slots with new members."""
        from workers.engine import Member

        self.generation += 1
        self.engine.write_slots(self.generation, SIGMA, [Member(number, 1) for number in range(members)])


class StockSlots(Slots):
    """The same, but for vLLM's own arithmetic."""

    def build(self) -> Any:
        from vllm.platforms import current_platform

        platform = type(current_platform)
        stock = platform.__dict__["get_punica_wrapper"]
        import workers.vllm_extension  # noqa: F401  replaces the arithmetic

        platform.get_punica_wrapper = stock
        return super().build()


class Files(Bare):
    """Public code's first way: a member at a time, its adapter saved to files and loaded by name."""

    def build(self) -> Any:
        self.folder = Path(tempfile.mkdtemp())
        self.loaded = 0
        return super().build()

    def arguments(self) -> dict[str, Any]:
        from workers.vllm_engine import slot_rank

        lora = {
            "enable_lora": True,
            "max_loras": self.setup.slots,
            "max_cpu_loras": self.setup.slots,
            "max_lora_rank": slot_rank(self.setup.rank),
            "lora_target_modules": sorted({matrix.name.rpartition(".")[2] for matrix in self.space.matrices}),
        }
        return super().arguments() | lora

    def generate(self, load: Load, members: int) -> None:
        self.generation += 1
        share = load.sequences // members
        prompts = self.prompts(load)
        for number in range(members):
            self.loaded += 1
            folder = self.save(number)
            lora = self.request(self.loaded, folder)
            self.answer(prompts[number * share :][:share], [lora] * share, load.new)

    def save(self, number: int) -> Path:
        folder = self.folder / str(number)
        self.space.save(self.member(number), folder, str(self.setup.model))
        return folder

    def request(self, adapter: int, folder: Path, *, in_place: bool = False) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"member-{adapter}", adapter, str(folder), load_inplace=in_place)

    def save_and_load(self, members: int) -> None:
        """Fill as many slots with new members, from files with names of their own."""
        self.generation += 1
        for number in range(members):
            self.loaded += 1
            assert self.llm.llm_engine.add_lora(self.request(self.loaded, self.save(number)))

    def load_in_place(self, members: int) -> None:
        """The same, from files under the names of the members before."""
        self.generation += 1
        for number in range(members):
            assert self.llm.llm_engine.add_lora(self.request(number + 1, self.save(number), in_place=True))

    def from_tensors(self, members: int) -> None:
        """The same, without files: vLLM's own LoRAModel, added to its manager."""
        import torch
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        self.generation += 1
        manager = self.runner().lora_manager._adapter_manager
        helper = PEFTHelper(r=self.setup.rank, lora_alpha=ALPHA, target_modules="all-linear")
        for number in range(members):
            tensors = {}
            for name, pair in self.space.adapter(self.member(number)).items():
                tensors[f"base_model.model.{name}.lora_A.weight"] = torch.from_numpy(pair.a)
                tensors[f"base_model.model.{name}.lora_B.weight"] = torch.from_numpy(pair.b)
            model = LoRAModel.from_lora_tensors(
                number + 1, tensors, helper, device="cpu", dtype=manager.lora_config.lora_dtype
            )
            manager.remove_adapter(model.id)
            if len(manager) + 1 > manager.capacity:
                manager.remove_oldest_adapter()
            assert manager.add_adapter(model)
            manager.activate_adapter(model.id)


class Merged(Bare):
    """Public code's second way: a member at a time, merged into the weights of an engine without LoRA.

    vLLM packs a CPU layer's weight for oneDNN when it is loaded and keeps nothing else. Here the weights as loaded are
    kept beside, and a merged layer is packed again and put in the place of the one before, which compiled code takes
    up, since it reads the address of the packed weight from a tensor.
    """

    def build(self) -> Any:
        llm = super().build()
        self.llm = llm
        self.layers = self._find_layers()
        return llm

    def generate(self, load: Load, members: int) -> None:
        self.generation += 1
        share = load.sequences // members
        prompts = self.prompts(load)
        for number in range(members):
            self.merge(self.member(number))
            self.answer(prompts[number * share :][:share], [None] * share, load.new)

    def write(self, members: int) -> None:
        """Merge as many members, one after another."""
        self.generation += 1
        for number in range(members):
            self.merge(self.member(number))

    def merge(self, theta: Any) -> None:
        import torch

        pairs = self.space.adapter(theta)
        for weight, names, handler in self.layers:
            merged = weight.clone()
            rows = 0
            for name in names:
                a, b = (torch.from_numpy(factor).to(weight.dtype) for factor in (pairs[name].a, pairs[name].b))
                merged[rows : rows + len(b)].addmm_(b, a, alpha=self.space.scaling)
                rows += len(b)
            address = handler.handler_tensor
            packed = torch.ops._C.create_onednn_mm_handler(merged.t(), 32)
            torch.ops._C.release_dnnl_matmul_handler(address.item())
            address.fill_(packed)

    def _find_layers(self) -> list[tuple[Any, list[str], Any]]:
        """Each linear layer as loaded, (out, in); the matrices packed in it, in order; oneDNN's handler of it."""
        import torch
        from safetensors.torch import load_file

        model = self.runner().model
        files = sorted(self.setup.model.glob("*.safetensors"))
        weights = {name: value for file in files for name, value in load_file(file).items()}
        known = {matrix.name for matrix in self.space.matrices}
        dtype = self.llm.llm_engine.model_config.dtype
        found = []
        for name, layer in model.named_modules():
            parent, _, leaf = name.rpartition(".")
            names = [f"{parent}.{part}" for part in model.packed_modules_mapping.get(leaf, [leaf])]
            if known.issuperset(names):
                weight = torch.cat([weights[f"{each}.weight"] for each in names]).to(dtype)
                handler = inspect.getclosurevars(layer.cpu_linear).nonlocals["handler"]
                found.append((weight, names, handler))
        assert sum(len(names) for _, names, _ in found) == len(known)
        return found


SERVED: dict[Kind, type[Bare]] = {
    "bare": Bare,
    "bare, eager": Bare,
    "ours": Slots,
    "stock": StockSlots,
    "files": Files,
    "merged": Merged,
}
