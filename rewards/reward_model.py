"""A reward model as the verifier: a Hugging Face sequence classifier that grades prompt and completion, in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from rewards.base import Rollout, Verifier, register, verifier
from rewards.model_folder import check_folder

Device = Literal["auto", "cpu", "cuda"]

_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


@register("reward_model")
def reward_model_verifier(model: str, max_length: int = 2048, output: int = 0, device: Device = "cpu") -> Verifier:
    """The verifier of a reward model, a local folder or a hub id: the score is its logit number `output`.

    It reads the chat by the chat template of its own tokenizer, or, where it has none or the prompt is plain text, the
    prompt and the completion as one text. Of more than `max_length` tokens it reads the last.

    It runs on the cores of its process, in float32, unless `device` says otherwise: `cuda`, or `auto`, which is cuda
    where there is one. Then it shares its worker's GPU, in the type of its own weights, and reads a batch at once: what
    vLLM leaves of the memory has to hold it, and scores differ in their last digits with what else is in the batch.

    Raises ValueError where there is no such model in safetensors, no such output or no GPU.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    place = _place(device, torch.cuda.is_available())
    dtype = torch.float32 if place == "cpu" else "auto"
    try:
        folder = local_folder(model, "model")
        check_folder(folder, "model")
        tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left", trust_remote_code=False)
        classifier = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"verifier: reward_model cannot load {model!r} ({str(error).splitlines()[0]})") from error
    classifier.eval().to(place)
    outputs = classifier.config.num_labels
    if not 0 <= output < outputs:
        raise ValueError(f"verifier: reward_model has output={output}; accepted for {model} are 0 to {outputs - 1}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    classifier.config.pad_token_id = tokenizer.pad_token_id

    def grade(texts: list[list[int]]) -> list[float]:
        read = tokenizer.pad({"input_ids": texts}, return_tensors="pt").to(place)
        with torch.inference_mode():
            logits = classifier(input_ids=read["input_ids"], attention_mask=read["attention_mask"]).logits
        return logits[:, output].tolist()

    @verifier(takes="batch")
    def verify(rollouts: list[Rollout]) -> list[float]:
        texts = [_tokens(rollout, tokenizer, max_length) for rollout in rollouts]
        if place == "cuda":
            return grade(texts)
        # As fast as all at once on a CPU, and a score never depends, in its last digits, on what else is asked.
        return [score for text in texts for score in grade([text])]

    return verify


def local_folder(model: str, field: str) -> Path:
    """The folder of a reward model; one on the hub is fetched, but for weights that are no safetensors. Raises
    ValueError, naming `field`, where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    try:
        return Path(snapshot_download(model, allow_patterns=list(_FILES)))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{field}: {model!r} is no local folder, and the hub gives no model ({reason})") from error


def _place(device: str, has_gpu: bool) -> str:
    if device not in get_args(Device):
        raise ValueError(f"verifier: reward_model has device={device}; accepted are {', '.join(get_args(Device))}")
    if device == "cuda" and not has_gpu:
        raise ValueError("verifier: reward_model has device=cuda, and torch finds no GPU; accepted are cpu and auto")
    return "cuda" if has_gpu and device != "cpu" else "cpu"


def _tokens(rollout: Rollout, tokenizer: Any, max_length: int) -> list[int]:
    text, is_chat = rollout.prompt + rollout.completion, False
    if rollout.messages is not None and tokenizer.chat_template is not None:
        chat = [*rollout.messages, *rollout.completion_messages]
        text, is_chat = tokenizer.apply_chat_template(chat, tokenize=False), True
    # A chat template writes the special tokens itself.
    read = tokenizer(text, add_special_tokens=not is_chat, truncation=True, max_length=max_length)
    tokens: list[int] = read["input_ids"]
    return tokens
