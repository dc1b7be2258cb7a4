"""vLLM as a population engine: many perturbed adapters in one continuous batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from es_engine.spaces.lora import LoraSpace
from workers.engine import Completion, Member, Request, Sampling, Vector
from workers.prompts import load_tokenizer
from workers.stops import LOOPS, cut_at_stop, stop_tokens

SLOT_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks vLLM allocates slots for; a LoRA of another rank is padded with zeros to the next."""


SECOND_SET_BYTES = 1 << 30
"""Most bytes of slots, in float32, when there are two sets of them: one to generate from, one to be written."""


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """How vLLM is started. None leaves a choice to vLLM, or to the space, where noted. With `rests` it can leave a GPU
    to others for a time."""

    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    block_size: int | None = None
    tensor_parallel: int = 1
    enforce_eager: bool = False
    rests: bool = False


class VllmEngine:
    """One vLLM instance in this process (or, tensor-parallel, its head); implements `PopulationEngine`."""

    def __init__(
        self, model: Path, space: LoraSpace, run_seed: int, slots: int, cache_bytes: int, options: VllmOptions
    ) -> None:
        # The engine core must live in this process: the slot writer is called between its steps.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
        from vllm.platforms import current_platform

        from workers import cpu_tuning

        if options.dtype == "float32" and current_platform.is_cuda():
            # asserted by the kernels of vLLM's LoRA
            raise ValueError("engine.dtype: got float32, accepted on a GPU are bfloat16 and float16")
        sets = _sets(space, slots)
        self._rests = options.rests and current_platform.is_sleep_mode_available()  # not on a CPU
        arguments = cpu_tuning.engine_arguments() | _llm_arguments(space, sets * slots, options)
        arguments |= {"enable_sleep_mode": True} if self._rests else {}
        self._llm = LLM(model=str(model), **arguments)
        # vLLM's auto is not transformers': it takes 16 bits in place of 32.
        self.dtype = str(self._llm.llm_engine.model_config.dtype).removeprefix("torch.")
        self._slots = slots
        self._writes = 0  # of all runs
        self._tokenizer = load_tokenizer(model)
        self._stop_tokens: dict[tuple[str, ...], tuple[int, ...] | None] = {}
        self._rpc("es_claim_slots", slots, sets)
        self.assign(space, run_seed, cache_bytes)

    def assign(self, space: LoraSpace, run_seed: int, cache_bytes: int) -> None:
        """Hold members of another run from now on, in a space of the same matrices and rank."""
        self._rpc("es_assign", space, run_seed, cache_bytes)
        self._first_slot = 0
        self._names: list[str] = []

    def set_center(self, theta: Vector) -> None:
        """Make theta, shape (D,), the center of the slots written from now on."""
        self._rpc("es_set_center", theta)

    def write_slots(self, generation: int, sigma: float, members: Sequence[Member]) -> None:
        """Write theta + sign*sigma*eps of each member into slot 0, 1, ..."""
        assert len(members) <= self._slots
        self._first_slot = self._rpc("es_write_slots", generation, sigma, tuple(members))[0]
        self._writes += 1
        # vLLM's prefix cache keys adapters by name: new contents need a name that was never used.
        self._names = [f"write-{self._writes}-slot-{slot}" for slot in range(len(members))]

    def prepare(self, generation: int, sigma: float, members: Sequence[Member]) -> None:
        """Make a later `write_slots` of the same arguments quick: in the background, draw the members' noise as far as
        there is room for it and, where there is a second set of slots, write them."""
        self._rpc("es_write_ahead", generation, sigma, tuple(members))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Complete the requests, each as soon as it is done; the order of requests decides the batches."""
        engine = self._llm.llm_engine
        ends = self._ends(sampling.stop)
        # One object for all members' requests of a prompt: vLLM takes as long over a new one as over the request.
        params = {seed: _sampling_params(sampling, seed, ends) for seed in {request.seed for request in requests}}
        try:
            for number, request in enumerate(requests):
                lora = self._lora(request)
                engine.add_request(str(number), _prompt(request), params[request.seed], lora_request=lora)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        yield from self._completions(output, sampling, decode=ends is not None)
        finally:  # a caller that stops early leaves nothing behind to answer the next one
            engine.abort_request([str(number) for number in range(len(requests))])

    def logprobs(self, requests: Sequence[Request]) -> list[Vector]:
        """Log-probability of every prompt token but the first, shape (T-1,), for each request."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self._llm.generate(
            [_prompt(request) for request in requests],
            params,
            lora_request=[self._lora(request) for request in requests],
            use_tqdm=False,
        )
        return [_prompt_logprobs(output) for output in outputs]

    def noise_sum(self, generation: int, pairs: Sequence[int], weights: Sequence[float]) -> Vector:
        """The sum of weight * eps(pair) over pairs, in the order given, shape (D,); good until the next call."""
        return self._rpc("es_noise_sum", generation, list(pairs), list(weights))[0]

    def rest(self) -> None:
        """Leave the GPU's memory to others, where `VllmOptions.rests` is set: weights and slots go to the CPU's, the KV
        cache and what is cached of prefixes are dropped."""
        if self._rests and not self._llm.llm_engine.is_sleeping():
            self._rpc("es_settle")
            self._llm.sleep(level=1)

    def wake(self) -> None:
        """Take the memory back."""
        if self._rests and self._llm.llm_engine.is_sleeping():
            self._llm.wake_up()

    def _ends(self, stops: tuple[str, ...]) -> tuple[int, ...] | None:
        if stops not in self._stop_tokens:
            self._stop_tokens[stops] = stop_tokens(self._tokenizer, stops)
        return self._stop_tokens[stops]

    def _completions(self, output: Any, sampling: Sampling, *, decode: bool) -> Iterator[Completion]:
        for sample in output.outputs:
            text = sample.text
            if decode:
                text = cut_at_stop(self._tokenizer.decode(sample.token_ids, skip_special_tokens=True), sampling.stop)
            yield Completion(
                request=int(output.request_id),
                sample=sample.index,
                text=text,
                token_ids=tuple(sample.token_ids),
                finish_reason=sample.finish_reason or "stop",
                logprobs=_token_logprobs(sample.logprobs, sample.token_ids) if sampling.logprobs else None,
            )

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        return self._llm.collective_rpc(method, args=args)

    def _lora(self, request: Request) -> Any:
        from vllm.lora.request import LoRARequest

        if request.slot is None:
            return None
        adapter = self._first_slot + request.slot + 1
        return LoRARequest(lora_name=self._names[request.slot], lora_int_id=adapter, lora_path="in-memory")


def _sets(space: LoraSpace, slots: int) -> int:
    """Two sets of slots where memory allows."""
    slot_bytes = space.adapter_bytes // space.rank * slot_rank(space.rank)
    return 2 if 2 * slots * slot_bytes <= SECOND_SET_BYTES else 1


def _llm_arguments(space: LoraSpace, slots: int, options: VllmOptions) -> dict[str, Any]:
    arguments = {
        "dtype": options.dtype,
        "max_num_seqs": options.max_num_seqs,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "tensor_parallel_size": options.tensor_parallel,
        "enforce_eager": options.enforce_eager,
        "max_model_len": options.max_model_len,
        "block_size": options.block_size,
        "kv_cache_memory_bytes": options.kv_cache_bytes,
        "distributed_executor_backend": "mp" if options.tensor_parallel > 1 else "uni",
    }
    return {
        **{key: value for key, value in arguments.items() if value is not None},
        "load_format": "safetensors",
        "trust_remote_code": False,
        "enable_lora": True,
        "max_loras": slots,
        "max_cpu_loras": slots,
        "max_lora_rank": slot_rank(space.rank),
        "lora_target_modules": sorted({matrix.name.rpartition(".")[2] for matrix in space.matrices}),
        "worker_extension_cls": "workers.vllm_extension.SlotExtension",
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": 0,
    }


def slot_rank(rank: int) -> int:
    """The smallest slot rank vLLM offers for a LoRA of this rank. Raises ValueError past the largest."""
    for offered in SLOT_RANKS:
        if rank <= offered:
            return offered
    raise ValueError(f"space.rank: vLLM holds ranks up to {SLOT_RANKS[-1]}, not {rank}")


def _prompt(request: Request) -> Any:
    return {"prompt_token_ids": list(request.prompt_ids)}


def _sampling_params(sampling: Sampling, seed: int, ends: tuple[int, ...] | None) -> Any:
    """`ends` are the tokens of the stop strings; None leaves the search for them, in the text, to vLLM."""
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

    loops = None
    if sampling.max_repeats is not None:
        loops = RepetitionDetectionParams(max(LOOPS), min(LOOPS), sampling.max_repeats)
    return SamplingParams(
        n=sampling.samples,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop=list(sampling.stop) if ends is None else None,
        stop_token_ids=list(ends) if ends else None,
        detokenize=ends is None,
        repetition_detection=loops,
        seed=seed if sampling.temperature > 0 else None,
        logprobs=0 if sampling.logprobs else None,  # of no more than the sampled token
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # what vLLM writes into it for a request is the same for all
    )


def _prompt_logprobs(output: Any) -> Vector:
    values = _token_logprobs(output.prompt_logprobs[1:], output.prompt_token_ids[1:])
    return np.array(values, dtype=np.float32)


def _token_logprobs(steps: Sequence[Any], tokens: Sequence[int]) -> tuple[float, ...]:
    return tuple(step[token].logprob for step, token in zip(steps, tokens, strict=True))
