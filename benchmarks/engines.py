"""vLLM engines in processes of their own, each on one thread, if pinned of the same core, that take turns at work.

vLLM holds global state, and the engine replaces a part of its CPU platform, so that ways of serving members cannot be
compared within one process. A `Engine` here is a handle: `call` has the process do one piece of work and waits for it.

Every way makes the members of a population itself, from theta and the seed, so that all do the same work.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import shutil
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
    "ours": "slots written in memory, tokens grouped by slot, fused norms",
    "stock": "slots written in memory, vLLM's own LoRA arithmetic",
    "files": "a member at a time: adapter saved to files, loaded by a LoRARequest",
    "merged": "a member at a time: merged into the weights of a bare engine",
}
LEGEND = "\n".join(f"{kind}: {what}" for kind, what in KINDS.items())
RUN_SEED, SIGMA, ALPHA = 1, 0.03, 32
FOLDERS = 64
"""Adapter files that are there at the same time."""


@dataclass(frozen=True, slots=True)
class Setup:
    """An engine of a kind for a model: `slots` members at a time, of a rank that vLLM has slots for. `block_size` is of
    the KV cache, None the engine's own choice."""

    kind: Kind
    model: Path
    dtype: str
    rank: int
    slots: int
    max_model_len: int
    max_num_seqs: int
    kv_cache_bytes: int
    block_size: int | None = None
    gpu_memory_utilization: float = 0.9
    pinned: bool = True


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
    if setup.pinned:
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
        served.close()
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
        self.sigma = SIGMA
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
            "gpu_memory_utilization": setup.gpu_memory_utilization,
            "distributed_executor_backend": "uni",
            "disable_log_stats": True,
            "seed": 0,
            "enforce_eager": setup.kind == "bare, eager",
            **({} if setup.block_size is None else {"block_size": setup.block_size}),
        }

    def generate(self, load: Load, members: int) -> None:
        """Answer the whole load; `members` share it evenly."""
        self.answer(self.prompts(load), [None] * load.sequences, _exactly(load.new))

    def take_on(self, problems: Sequence[Any], sampling: Any, verifier: Any, sigma: float) -> None:
        """Get ready for whole generations in which every member, `sigma` from the center, answers these problems."""
        from workers.prompts import load_tokenizer
        from workers.scoring import Scorer
        from workers.stops import stop_tokens
        from workers.vllm_engine import _sampling_params

        self.problems, self.sampling, self.sigma = problems, sampling, sigma
        self.tokenizer = load_tokenizer(self.setup.model)
        self.params = _sampling_params(sampling, 0, stop_tokens(self.tokenizer, sampling.stop))
        self.scorer = Scorer(verifier)

    def prompts(self, load: Load) -> list[list[int]]:
        import numpy as np

        vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        return np.random.default_rng(0).integers(4, vocabulary, (load.sequences, load.prompt)).tolist()

    def answer(self, prompts: Sequence[Sequence[int]], loras: Sequence[Any], params: Any) -> list[tuple[int, ...]]:
        engine = self.llm.llm_engine
        self.llm.reset_prefix_cache()  # else the next round is not the same work
        for number, (prompt, lora) in enumerate(zip(prompts, loras, strict=True)):
            engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, params, lora_request=lora)
        answers = {}
        while engine.has_unfinished_requests():
            answers.update({output.request_id: tuple(output.outputs[0].token_ids) for output in engine.step()})
        assert not params.ignore_eos or all(len(answer) == params.max_tokens for answer in answers.values())
        return [answers[str(number)] for number in range(len(prompts))]

    def theta(self, member: Any) -> Any:
        """A member's theta, shape (D,)."""
        return self.perturber.theta(self.generation, self.sigma, member)

    def step(self, everyone: Sequence[Any], scores: dict[Any, Any]) -> Any:
        """The next theta, shape (D,), from the scores by (number of the member, place of the problem)."""
        import numpy as np

        from es_engine.methods import shaping

        rewards = np.array(
            [[scores[number, place].value for place in range(len(self.problems))] for number in range(len(everyone))]
        )
        weights = shaping.shape(rewards, "centered_rank")
        if weights is None:  # no spread: a run would make no step, but here every generation is to be the same work
            weights = np.ones(len(everyone))
        by_pair = {member.pair: 0.0 for member in everyone}
        for member, weight in zip(everyone, weights.tolist(), strict=True):
            by_pair[member.pair] += member.sign * weight
        direction = self.noise_sum(list(by_pair), list(by_pair.values()))
        return self.perturber.center + np.float32(self.sigma / len(everyone)) * direction

    def noise_sum(self, pairs: Sequence[int], weights: Sequence[float]) -> Any:
        return self.perturber.noise_sum(self.generation, pairs, weights)

    def score(self, key: Any, problem: Any, text: str) -> None:
        """Have an answer scored; `scorer.drain` has the score."""
        from rewards.base import Rollout

        example = problem.example
        self.scorer.submit(key, Rollout(problem.prompt, text, example.answer, example.info))

    def draw(self, members: int) -> None:
        """Draw the noise of members, and nothing else."""
        self.generation += 1
        for number in range(members):
            self.perturber.eps(self.generation, number)

    def close(self) -> None:
        """Leave nothing behind."""

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
            gpu_memory_utilization=setup.gpu_memory_utilization,
        )
        noise = 4 * self.space.dim * setup.slots
        self.engine = VllmEngine(setup.model, self.space, RUN_SEED, setup.slots, noise, options)
        self.engine.set_center(self.space.start())
        self.write(setup.slots)
        return self.engine._llm

    def generate(self, load: Load, members: int) -> None:
        """The slots stay as they are: a run writes those of the next chunk while this one generates."""
        from workers.engine import Request

        loras = [self.engine._lora(Request(slot, ())) for slot in range(members)]
        share = load.sequences // members
        self.answer(self.prompts(load), [lora for lora in loras for _ in range(share)], _exactly(load.new))

    def write(self, members: int) -> None:
        """Fill as many slots with new members."""
        self.generation += 1
        self.engine.write_slots(self.generation, self.sigma, alone(members))

    def whole_generation(self, members: int) -> None:
        """Write, ask and score all members at once; then a step, which the next generation does not begin from: every
        one is the same work."""
        from workers.engine import Request

        self.generation += 1
        everyone = mirrored(members)
        self.engine.write_slots(self.generation, self.sigma, everyone)
        asked = [(slot, place) for slot in range(members) for place in range(len(self.problems))]
        requests = [Request(slot, self.problems[place].prompt_ids) for slot, place in asked]
        for completion in self.engine.generate(requests, self.sampling):
            slot, place = asked[completion.request]
            self.score((slot, place), self.problems[place], completion.text)
        self.step(everyone, self.scorer.drain())

    def noise_sum(self, pairs: Sequence[int], weights: Sequence[float]) -> Any:
        return self.engine.noise_sum(self.generation, pairs, weights)


class StockSlots(Slots):
    """The same, but for vLLM's own arithmetic and layers."""

    def build(self) -> Any:
        from vllm.platforms import current_platform

        from workers import cpu_tuning

        cpu_tuning.install = cpu_tuning.keep_logits = lambda *_: None  # type: ignore[assignment]
        cpu_tuning.engine_arguments = dict
        platform = type(current_platform)
        stock = platform.__dict__["get_punica_wrapper"]
        import workers.vllm_extension  # noqa: F401  replaces the arithmetic

        platform.get_punica_wrapper = stock
        return super().build()


class OneAtATime(Bare):
    """The ways of public ES code: members come in one after another."""

    def bring_in(self, member: Any) -> Any:
        """Make the engine answer as a member does; what its requests must carry."""
        raise NotImplementedError

    def generate(self, load: Load, members: int) -> None:
        self.generation += 1
        share = load.sequences // members
        prompts = self.prompts(load)
        for number, member in enumerate(alone(members)):
            lora = self.bring_in(member)
            self.answer(prompts[number * share :][:share], [lora] * share, _exactly(load.new))

    def whole_generation(self, members: int) -> None:
        """Bring in, ask and score each member in turn; then a step, for which the noise is drawn again."""
        from workers.stops import cut_at_stop

        self.generation += 1
        everyone = mirrored(members)
        scores = {}
        for number, member in enumerate(everyone):
            lora = self.bring_in(member)
            prompts = [problem.prompt_ids for problem in self.problems]
            for place, tokens in enumerate(self.answer(prompts, [lora] * len(prompts), self.params)):
                text = cut_at_stop(self.tokenizer.decode(tokens, skip_special_tokens=True), self.sampling.stop)
                self.score((number, place), self.problems[place], text)
            scores.update(self.scorer.drain())
        self.step(everyone, scores)


class Files(OneAtATime):
    """Public code's first way: a member's adapter is saved to files and loaded by name."""

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

    def bring_in(self, member: Any) -> Any:
        self.loaded += 1
        return self.request(self.loaded, self.save(self.loaded % FOLDERS, member))

    def close(self) -> None:
        shutil.rmtree(self.folder)

    def save(self, number: int, member: Any) -> Path:
        folder = self.folder / str(number)
        self.space.save(self.theta(member), folder, str(self.setup.model))
        return folder

    def request(self, adapter: int, folder: Path, *, in_place: bool = False) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"member-{adapter}", adapter, str(folder), load_inplace=in_place)

    def save_and_load(self, members: int) -> None:
        """Fill as many slots with new members, from files with names of their own."""
        self.generation += 1
        for member in alone(members):
            assert self.llm.llm_engine.add_lora(self.bring_in(member))

    def load_in_place(self, members: int) -> None:
        """The same, from files under the names of the members before."""
        self.generation += 1
        for number, member in enumerate(alone(members), start=1):
            assert self.llm.llm_engine.add_lora(self.request(number, self.save(number, member), in_place=True))

    def from_tensors(self, members: int) -> None:
        """The same, without files: vLLM's own LoRAModel, added to its manager."""
        import torch
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        self.generation += 1
        manager = self.runner().lora_manager._adapter_manager
        helper = PEFTHelper(r=self.setup.rank, lora_alpha=ALPHA, target_modules="all-linear")
        for number, member in enumerate(alone(members), start=1):
            tensors = {}
            for name, pair in self.space.adapter(self.theta(member)).items():
                tensors[f"base_model.model.{name}.lora_A.weight"] = torch.from_numpy(pair.a)
                tensors[f"base_model.model.{name}.lora_B.weight"] = torch.from_numpy(pair.b)
            model = LoRAModel.from_lora_tensors(
                number, tensors, helper, device="cpu", dtype=manager.lora_config.lora_dtype
            )
            manager.remove_adapter(model.id)
            if len(manager) + 1 > manager.capacity:
                manager.remove_oldest_adapter()
            assert manager.add_adapter(model)
            manager.activate_adapter(model.id)


class Merged(OneAtATime):
    """Public code's second way: a member is merged into the weights of an engine without LoRA.

    vLLM packs a CPU layer's weight for oneDNN when it is loaded and keeps nothing else. Here the weights as loaded are
    kept beside, and a merged layer is packed again and put in the place of the one before, which compiled code takes
    up, since it reads the address of the packed weight from a tensor.
    """

    def build(self) -> Any:
        llm = super().build()
        self.llm = llm
        self.layers = self._find_layers()
        return llm

    def bring_in(self, member: Any) -> Any:
        self.merge(self.theta(member))

    def write(self, members: int) -> None:
        """Merge as many members, one after another."""
        self.generation += 1
        for member in alone(members):
            self.bring_in(member)

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


def alone(count: int) -> list[Any]:
    """Members with noise of their own."""
    from es_engine.methods.population import members

    return members(count, mirrored=False)


def mirrored(count: int) -> list[Any]:
    """Mirrored pairs of members."""
    from es_engine.methods.population import members

    return members(count, mirrored=True)


def _exactly(new: int) -> Any:
    """Greedy answers of so many tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=new,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


SERVED: dict[Kind, type[Bare]] = {
    "bare": Bare,
    "bare, eager": Bare,
    "ours": Slots,
    "stock": StockSlots,
    "files": Files,
    "merged": Merged,
}
