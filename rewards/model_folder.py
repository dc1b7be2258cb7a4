"""A model's folder, looked at before a library reads it: it may be anybody's.

Libraries find more in a folder than its weights: pickles, an adapter, code on a hub, the names of other models.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewards.trees import flat

INDEX = "model.safetensors.index.json"
NOT_BESIDE = "no file of safetensors beside it"
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def check_folder(folder: Path, field: str) -> None:
    """Raises ValueError, naming `field`, for a folder that is not, or not only, a model of safetensors."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{field}: {folder} has no config.json; accepted is a model in safetensors")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{field}: {folder} holds an adapter (adapter_config.json), which would be worn unasked")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{field}: {folder} has no *.safetensors file, and no other kind of weights is read")
    tensors = sum(_tensors(file, field) for file in files)
    _refuse(path, field, lambda name, value: _wrong_in_config(name, value, tensors))
    if (folder / INDEX).exists():
        _refuse(folder / INDEX, field, _wrong_in_index)


def _refuse(path: Path, field: str, wrong: Callable[[str, Any], str | None]) -> None:
    """Raises ValueError where something is wrong with a value in a file of JSON, or with the file."""
    try:
        values = list(flat(json.loads(path.read_text(encoding="utf-8"))))
    except (AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{field}: {path} is no JSON object ({error})") from None
    for name, value in values:
        if reason := wrong(name, value):
            raise ValueError(f"{field}: {path} has {name}: {value!r:.60}, {reason}")


def _wrong_in_index(name: str, value: Any) -> str | None:
    return NOT_BESIDE if name.startswith("weight_map") and not _is_beside(value) else None


def _wrong_in_config(name: str, value: Any, tensors: int) -> str | None:
    key = name.rpartition(".")[2]
    if "_implementation" in name and "/" in str(value):
        return "code on a hub, which is not run"
    if "speculators_config" in name:
        return "by which another model would be taken"
    if key == "transformers_weights" and not _is_beside(str(value).removesuffix(".index.json")):
        return NOT_BESIDE
    if key in LAYERS and isinstance(value, int) and value > tensors:
        return f"and there are {tensors} tensors beside it"
    return None


def _is_beside(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _tensors(file: Path, field: str) -> int:
    """How many there are in a file, by its header, which has to fit the file."""
    from safetensors import SafetensorError, safe_open  # here, since most who import verifiers have no use for it

    try:
        with safe_open(file, framework="np") as tensors:
            return len(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"{field}: {file} is not a whole safetensors file ({error})") from None
