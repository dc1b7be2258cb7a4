"""A reward model as the verifier: a Hugging Face sequence classifier that grades prompt and completion, in batches."""

from __future__ import annotations

from typing import Any

from rewards.base import Rollout, Verifier, register, verifier


@register("reward_model")
def reward_model_verifier(model: str, max_length: int = 2048, output: int = 0) -> Verifier:
    """The verifier of a reward model, a local folder or a hub id: the score is its logit number `output`.

    It reads the chat by the chat template of its own tokenizer, or, where it has none or the prompt is plain text, the
    prompt and the completion as one text. Of more than `max_length` tokens it reads the last. Raises ValueError where
    there is no such model or no such output.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, truncation_side="left")
        classifier = AutoModelForSequenceClassification.from_pretrained(model).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"verifier: reward_model cannot load {model!r} ({str(error).splitlines()[0]})") from error
    outputs = classifier.config.num_labels
    if not 0 <= output < outputs:
        raise ValueError(f"verifier: reward_model has output={output}; accepted for {model} are 0 to {outputs - 1}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    classifier.config.pad_token_id = tokenizer.pad_token_id

    @verifier(takes="batch")
    def verify(rollouts: list[Rollout]) -> list[float]:
        texts = [_text(rollout, tokenizer) for rollout in rollouts]
        read = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.inference_mode():
            logits = classifier(input_ids=read["input_ids"], attention_mask=read["attention_mask"]).logits
        return logits[:, output].tolist()

    return verify


def _text(rollout: Rollout, tokenizer: Any) -> str:
    if rollout.messages is None or tokenizer.chat_template is None:
        return rollout.prompt + rollout.completion
    chat = [*rollout.messages, *rollout.completion_messages]
    rendered: str = tokenizer.apply_chat_template(chat, tokenize=False)
    return rendered
