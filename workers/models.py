"""Where a model comes from, and what is in it: any source to a local folder of safetensors, its linear layers, and how
many parameters multiply."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from gguf import GGUFReader
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from es_engine.spaces.base import Matrix
from rewards.model_folder import check_folder
from workers.gguf_header import check_gguf

ACCEPTED = "a hub id, a local folder of safetensors, a .gguf file or package:IMPORT_NAME/FILE.gguf"
PACKAGE = "package:"

# Part of the cache key: raise it whenever the conversion itself changes.
CONVERTER = 1

# Pre-tokenizers of llama.cpp that cut every digit off before GPT-2's splitting; transformers knows only the latter.
# Source: llama.cpp, llama-vocab.cpp, the regular expressions by pre-tokenizer type.
DIGITS_APART = frozenset({"codeshell", "command-r", "exaone", "refact", "smollm", "starcoder"})

RMS_BLOCK = 1 << 22  # numbers converted to float64 at a time


def resolve(source: str, revision: str | None = None) -> Path:
    """The local folder that holds a model as safetensors, with its tokenizer; downloads or converts where needed.

    `source` is a hub id (`revision` is a branch, tag or commit of it), a local folder, a `.gguf` file, or
    `package:IMPORT_NAME/FILE.gguf`, a file inside an installed Python package. A GGUF file is converted once to float32
    safetensors, cached by its content. Raises ValueError where there is no such model, or none in safetensors, or where
    its files are not what they say.
    """
    local = source.startswith(PACKAGE) or source.endswith(".gguf") or Path(source).expanduser().is_dir()
    if local and revision is not None:
        raise ValueError(f"model.revision: only a hub id has revisions, and model.source is {source!r}")
    if source.startswith(PACKAGE):
        return _converted(_file_in_package(source))
    if source.endswith(".gguf"):
        return _converted(Path(source).expanduser())
    if local:
        return _checked(Path(source).expanduser())
    return _checked(_downloaded(source, revision))


def fingerprint(folder: Path) -> str:
    """SHA-256 (hex) of what a model computes: its config.json and every safetensors file, in order of name."""
    whole = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        whole.update(f"{path.name}\0{_digest(path)}\n".encode())
    return whole.hexdigest()


def linear_matrices(folder: Path, targets: Literal["all-linear"] | Sequence[str]) -> list[Matrix]:
    """The linear layers of a causal language model that `targets` names, in module order.

    "all-linear" means every one but the output embedding, as in PEFT; otherwise each target is the end of a module path
    (`q_proj`, `layers.0.mlp.up_proj`). Raises ValueError for a target that names no such layer, and where the weights
    of one are not those that the model's config asks for.
    """
    shapes = linear_shapes(folder)
    if not shapes:
        raise ValueError(f"model.source: {folder} has no linear layers for LoRA to adapt; GPT-2's are of another kind")
    if targets != "all-linear":
        _check_targets(targets, shapes)
        shapes = {name: shape for name, shape in shapes.items() if any(_ends_in(name, target) for target in targets)}
    files = _tensor_files(folder)
    return [Matrix(name, *shape, rms=_rms(files, f"{name}.weight", shape)) for name, shape in shapes.items()]


def linear_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """The linear layers of a causal language model but the output embedding, in module order: (out, in) by name."""
    model = _without_weights(folder)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }


def multiplying_parameters(folder: Path) -> int:
    """The parameters by which a causal language model multiplies tokens: all matrices but those that they are looked up
    in. The output embedding counts, even where it is the input's too; biases and norms do not. Of experts all count.
    """
    return sum(
        parameter.numel()
        for module in _without_weights(folder).modules()
        if not isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim > 1
    )


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the model cache; `build` fills it where it is missing, in one process at a time.

    The cache is `$ES_ENGINE_CACHE/models`, by default `~/.cache/es-engine/models`. A folder appears whole or not
    at all.
    """
    cache = Path(os.environ.get("ES_ENGINE_CACHE", "~/.cache/es-engine")).expanduser() / "models"
    cache.mkdir(parents=True, exist_ok=True)
    folder, partial = cache / name, cache / f"{name}.partial"
    with FileLock(cache / f"{name}.lock"):
        if not folder.is_dir():
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir()
            build(partial)
            partial.rename(folder)
    return folder


def _downloaded(hub_id: str, revision: str | None) -> Path:
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model"],
                ignore_patterns=["*/*", "consolidated*"],  # other formats of the same weights
            )
        )
    except (OSError, HFValidationError) as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"model.source: {hub_id!r} is no local folder, and the hub gives no model of that name{at} ({reason}); "
            f"accepted are {ACCEPTED}"
        ) from error


def _checked(folder: Path) -> Path:
    check_folder(folder, "model.source")
    return folder


def _file_in_package(source: str) -> Path:
    package, _, inside = source.removeprefix(PACKAGE).partition("/")
    if not package.isidentifier() or not inside.endswith(".gguf"):
        raise ValueError(f"model.source: {source!r} is not of the form package:IMPORT_NAME/FILE.gguf")
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ValueError(
            f"model.source: no Python package {package!r} is installed to take {inside} from; "
            f"install it (pip install {package.replace('_', '-')})"
        )
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    found = next((place / inside for place in places if (place / inside).is_file()), None)
    if found is None:
        there = ", ".join(sorted(path.name for place in places for path in place.glob("*.gguf"))) or "none"
        raise ValueError(
            f"model.source: the installed package {package!r} has no file {inside} (its .gguf files: {there}); "
            f"install a version that has it (pip install {package.replace('_', '-')})"
        )
    return found


def _converted(gguf_file: Path) -> Path:
    if not gguf_file.is_file():
        raise ValueError(f"model.source: there is no file {gguf_file}; accepted are {ACCEPTED}")
    check_gguf(gguf_file)
    key = hashlib.sha256(f"{CONVERTER}:{_digest(gguf_file)}".encode()).hexdigest()[:16]
    try:
        return cached_folder(f"{gguf_file.stem}-{key}", lambda folder: _convert(gguf_file, folder))
    except (AttributeError, LookupError, TypeError) as error:  # transformers' words for a file that lacks something
        raise ValueError(f"model.source: {gguf_file} is no model that can be converted ({error!r})") from error


def _convert(gguf_file: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        alone = Path(name) / "model.gguf"  # what lies beside the file would be read too
        alone.symlink_to(gguf_file.resolve())
        model = AutoModelForCausalLM.from_pretrained(
            alone.parent,
            gguf_file=alone.name,
            quantization_config=GgufConfig(dequantize=True),  # without it the model refuses to be saved
            dtype=torch.float32,
            trust_remote_code=False,
        )
        model.save_pretrained(folder)
        _tokenizer(alone).save_pretrained(folder)


def _tokenizer(gguf_file: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, trust_remote_code=False)
    splitting = GGUFReader(gguf_file).get_field("tokenizer.ggml.pre")
    if splitting is not None and splitting.contents() in DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _digest(path: Path) -> str:
    about = path.stat()
    return _digest_once(path, (about.st_ino, about.st_size, about.st_mtime_ns))


@cache
def _digest_once(path: Path, _state: tuple[int, int, int]) -> str:
    """A digest for each state of a file: a comparison asks for that of a teacher's gigabytes at every run."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_weights(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(
            f"model.source: {folder} is no causal language model that transformers knows; code that a model brings is "
            f"never run ({str(error).splitlines()[0]})"
        ) from error


def _check_targets(targets: Sequence[str], names: Iterable[str]) -> None:
    for target in targets:
        if not any(_ends_in(name, target) for name in names):
            accepted = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise ValueError(
                f"space.targets: {target!r} names no linear layer of the model; "
                f"accepted are all-linear, {accepted} and longer ends of their module paths"
            )


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _tensor_files(folder: Path) -> dict[str, Path]:
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            files.update(dict.fromkeys(tensors.keys(), path))
    return files


def _rms(files: dict[str, Path], tensor: str, shape: tuple[int, int]) -> float:
    if tensor not in files:
        raise ValueError(f"model.source: config.json asks for {tensor}, which no file of safetensors has")
    with safe_open(files[tensor], framework="pt") as tensors:
        found = tuple(tensors.get_slice(tensor).get_shape())
        if found != shape:
            raise ValueError(f"model.source: config.json asks for {tensor} of shape {shape}, not {found}")
        weight = tensors.get_tensor(tensor).flatten()
    squares = sum(block.double().square().sum().item() for block in weight.split(RMS_BLOCK))
    return float(squares / weight.numel()) ** 0.5
