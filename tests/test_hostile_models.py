"""Models and adapters that somebody else made: what their files say is compared with what is there, and nothing in them
is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import MATRICES, save_adapter
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_models import write_gguf

from es_engine.spaces.lora import adapter_config, load_adapter
from rewards.base import Example, VerifierSpec
from workers.gguf_header import check_gguf
from workers.models import fingerprint, linear_matrices, resolve
from workers.peft_model import load_base, wearing
from workers.prompts import load_tokenizer, tokenised

# --- models


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self._path),)


def copied(model: Path, folder: Path, **config: Any) -> Path:
    """A copy of a model with other values in its config."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def test_pickles_beside_a_model_are_never_opened(random_llama: Path, tmp_path: Path) -> None:
    harmed = tmp_path / "harmed"
    model = copied(random_llama, tmp_path / "model")
    for name in ("pytorch_model.bin", "model.pt", "adapter_model.bin", "training_args.bin"):
        (model / name).write_bytes(pickle.dumps(Harm(harmed)))
    load_base(resolve(str(model)), "auto")
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.source: .* has no \*\.safetensors file, and no other kind"):
        resolve(str(model))
    (model / "x.safetensors").write_bytes((random_llama / "model.safetensors").read_bytes())
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load_base(resolve(str(model)), "auto")
    assert not harmed.exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"attn_implementation": "org/kernel"}, "attn_implementation: 'org/kernel', code on a hub, which is not run"),
        ({"_attn_implementation": {"": "org/kernel"}}, "code on a hub"),
        ({"speculators_config": {"verifier": {"name_or_path": "org/other"}}}, "by which another model would be taken"),
        ({"transformers_weights": "adapter_model.bin"}, "no file of safetensors beside it"),
        ({"transformers_weights": "../other.safetensors"}, "no file of safetensors beside it"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers: 1000000000, and there are \d+ tensors"),
        (
            {"model_type": "unheard_of"},
            "no causal language model that transformers knows; code that a model brings is never",
        ),
    ],
)
def test_a_config_that_asks_for_more_than_weights_is_refused(
    random_llama: Path, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    model = copied(random_llama, tmp_path / "model", **config)
    with pytest.raises(ValueError, match=rf"^model\.source: .*{words}") as refused:
        linear_matrices(resolve(str(model)), "all-linear")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["[]", "{", '{"a":' * 10**5])
def test_a_config_that_is_no_object_is_refused(random_llama: Path, tmp_path: Path, text: str) -> None:
    (copied(random_llama, tmp_path / "model") / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"^model\.source: .*config\.json is no JSON object \("):
        resolve(str(tmp_path / "model"))


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "pytorch_model.bin", 3])
def test_an_index_names_files_of_safetensors_beside_it(random_llama: Path, tmp_path: Path, place: Any) -> None:
    model = copied(random_llama, tmp_path / "model")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": place}}))
    with pytest.raises(ValueError, match=r"has weight_map\.a\.weight: .*, no file of safetensors beside it"):
        resolve(str(model))


def test_an_adapter_in_a_models_folder_is_not_worn_unasked(random_llama: Path, tmp_path: Path) -> None:
    model = copied(random_llama, tmp_path / "model")
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config\.json\), which would be worn unasked"):
        resolve(str(model))
    with pytest.raises(ValueError, match=r"^verifier: reward_model cannot load .* which would be worn unasked"):
        VerifierSpec("reward_model", {"model": str(model)}).load()


def test_code_that_a_model_brings_is_neither_run_nor_asked_about(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")
    auto_map = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": ["code.T", None]}
    model = copied(random_llama, tmp_path / "model", model_type="brought", auto_map=auto_map)
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="code that a model brings is never run"):
        linear_matrices(resolve(str(model)), "all-linear")
    tokenizer = model / "tokenizer_config.json"
    changed = {**json.loads(tokenizer.read_text()), "auto_map": auto_map, "tokenizer_class": "Brought"}
    tokenizer.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_tokenizer(model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["cut", "longer", "beyond", "shape", "missing"])
def test_safetensors_whose_header_lies_are_refused(random_llama: Path, tmp_path: Path, damage: str) -> None:
    model = copied(random_llama, tmp_path / "model")
    path = model / "model.safetensors"
    data, name = path.read_bytes(), "model.layers.0.self_attn.q_proj.weight"
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "longer":
        path.write_bytes(struct.pack("<Q", 1 << 60) + data[8:])
    elif damage == "beyond":
        header[name]["data_offsets"][1] += 1 << 40
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    else:
        tensors = load_file(path)
        tensor = tensors.pop(name)
        save_file(tensors if damage == "missing" else {**tensors, name: tensor[:-1]}, path)
    with pytest.raises(ValueError, match=r"^model\.source: .*(not a whole safetensors file|config\.json asks for)"):
        linear_matrices(resolve(str(model)), "all-linear")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, seed=1)
    check_gguf(path)
    return path


def gguf_with(*values: bytes, tensors: tuple[bytes, ...] = ()) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)) + b"".join(values + tensors)


def gguf_value(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGUF", "its header is longer than the file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "accepted are 2 and 3, little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "its header is longer than the file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "its header is longer than the file"),
        (gguf_with(gguf_value(b"a", 9, struct.pack("<IQ", 4, 1 << 62))), "more than 4194304 items"),
        (gguf_with(gguf_value(b"a", 9, struct.pack("<IQ", 4, 1 << 20))), "its header is longer than the file"),
        (gguf_with(gguf_value(b"a", 9, struct.pack("<IQ", 9, 1))), "of type 9, which is none"),
        (gguf_with(gguf_value(b"a", 77, b"")), "of type 77, which is none"),
        (gguf_with(gguf_value(b"a", 8, struct.pack("<Q", 1 << 63))), "its header is longer than the file"),
        (gguf_with(gguf_value(b"a", 7, b"1"), gguf_value(b"a", 7, b"1")), "it has 'a' twice"),
        (gguf_with(gguf_value(b"\xff", 7, b"1")), "can't decode"),
        (gguf_with(gguf_value(b"general.alignment", 4, struct.pack("<I", 3))), "no power of two"),
        (gguf_with(gguf_value(b"llama.block_count", 10, struct.pack("<Q", 1 << 40))), "blocks, but 0 tensors"),
        (gguf_with(tensors=(struct.pack("<QcIQIQ", 1, b"t", 1, 1 << 40, 0, 0)[:-1],)), "longer than the file"),
        (gguf_with(tensors=(struct.pack("<QcIQIQ", 1, b"t", 1, 1 << 40, 0, 0),)), "lie behind its end"),
        (gguf_with(tensors=(struct.pack("<QcIQIQ", 1, b"t", 1, 0, 99, 0),)), "of type 99, which there is not"),
        (gguf_with(tensors=(struct.pack("<QcI", 1, b"t", 1 << 30),)), "has 1073741824 dimensions"),
    ],
)
def test_a_gguf_whose_header_lies_is_refused_at_once(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"^model\.source: .*model\.gguf is damaged: .*{words}"):
        resolve(str(path))


def test_a_gguf_whose_tensors_lie_behind_its_end_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:-64])
    with pytest.raises(ValueError, match="tensors are said to lie behind its end"):
        check_gguf(cut)


@given(place=st.integers(4, 1200), bits=st.integers(1, 255))
def test_a_gguf_with_a_changed_byte_is_checked_or_refused_at_once(gguf_file: Path, place: int, bits: int) -> None:
    data = bytearray(gguf_file.read_bytes())
    data[place] ^= bits
    changed = gguf_file.with_name("changed.gguf")
    changed.write_bytes(data)
    with suppress(ValueError):
        check_gguf(changed)


def test_what_lies_beside_a_gguf_is_not_read(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("alone", "among"):
        monkeypatch.setenv("ES_ENGINE_CACHE", str(tmp_path / f"cache-{name}"))
        (tmp_path / name).mkdir()
        shutil.copy(gguf_file, tmp_path / name)
        if name == "among":
            for other in ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json"):
                (tmp_path / name / other).write_text(
                    '{"auto_map": {"AutoTokenizer": ["code.T", null]}, "bos_token": "?"}'
                )
            (tmp_path / name / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
        folder = resolve(str(tmp_path / name / gguf_file.name))
        found.append((fingerprint(folder), (folder / "tokenizer_config.json").read_text()))
    assert found[0] == found[1]
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('no') }}",
        "{% if %}",
        "{{ messages.pop() }}",
    ],
)
def test_a_chat_template_runs_in_a_sandbox_and_is_refused_in_a_sentence(random_llama: Path, template: str) -> None:
    tokenizer = load_tokenizer(random_llama)
    tokenizer.chat_template = template
    example = Example("p7", answer="", info={}, messages=({"role": "user", "content": "1+1"},))
    with pytest.raises(ValueError, match=r"^task\.template: the model's chat template does not take p7 \("):
        tokenised(example, tokenizer)


# --- adapters


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "code"}, "and it has megatron_config"),
        ({"alora_invocation_tokens": [1]}, "and it has alora_invocation_tokens"),
        ({"modules_to_save": ["lm_head"]}, "and it has modules_to_save"),
        ({"bias": "all"}, "and it has bias"),
        ({"a_field_of_tomorrow": True}, "and it has a_field_of_tomorrow"),
        ({"r": 0}, "r and lora_alpha must be"),
        ({"r": "4"}, "r and lora_alpha must be"),
        ({"lora_alpha": float("nan")}, "r and lora_alpha must be"),
        ({"lora_alpha": -1}, "r and lora_alpha must be"),
    ],
)
def test_an_adapter_that_is_more_than_a_plain_lora_is_refused(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    save_adapter(tmp_path, **config)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{words}"):
        adapter_config(tmp_path)


@pytest.mark.parametrize("text", ["[]", "[" * 10**5, "{}"])
def test_an_adapters_config_is_an_object_of_peft(tmp_path: Path, text: str) -> None:
    save_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json: "):
        adapter_config(tmp_path)


def test_an_adapter_of_pickles_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    (tmp_path / "adapter/adapter_model.bin").write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
    with pytest.raises(ValueError, match=r"it needs adapter_config\.json and adapter_model\.safetensors$"):
        load_adapter(tmp_path / "adapter", MATRICES, 4, 8.0)
    assert not (tmp_path / "harmed").exists()


def test_names_and_sizes_are_compared_before_a_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    last = "base_model.model.layers.0.k_proj.lora_B.weight"

    def read(*_: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("es_engine.spaces.lora._pair", read)
    for changed, words in (
        ({last: np.zeros((9, 4), np.float32)}, "has A"),
        ({"x": np.zeros(1, np.float32)}, "x is in one"),
    ):
        save_file({**tensors, **changed}, path)
        with pytest.raises(ValueError, match=words):
            load_adapter(tmp_path, MATRICES, 4, 8.0)
    monkeypatch.undo()
    save_file({**tensors, last: np.full((8, 4), np.inf, np.float32)}, path)
    with pytest.raises(ValueError, match=r"layers\.0\.k_proj has numbers in the adapter that are infinite, or none"):
        load_adapter(tmp_path, MATRICES, 4, 8.0)


def test_an_adapter_is_worn_as_peft_wears_it_whatever_base_and_modules_its_config_names(
    random_llama: Path, tmp_path: Path
) -> None:
    import peft

    adapter = save_adapter(tmp_path / "adapter", linear_matrices(random_llama, ["q_proj", "down_proj"]))
    ids = torch.tensor([[1, 5, 9, 20]])
    expected = peft.PeftModel.from_pretrained(load_base(random_llama, "float32"), adapter)(ids).logits
    path = adapter / "adapter_config.json"
    lies = {
        "base_model_name_or_path": "/no/such/model",
        "target_modules": "(x+x+)+y",
        "auto_mapping": {"parent_library": "os"},
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **lies}))
    worn = wearing(load_base(random_llama, "float32"), adapter)
    assert torch.equal(worn(ids).logits, expected)
    with pytest.raises(ValueError, match=r"adapts layers\.0\.k_proj, which is no linear layer of the model"):
        wearing(load_base(random_llama, "float32"), save_adapter(tmp_path / "other"))
