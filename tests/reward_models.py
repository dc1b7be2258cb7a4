"""A small reward model, and what it says itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"


def build_classifier(folder: Path, model: Path) -> Path:
    """A random classifier of a model's architecture, with two outputs, and its tokenizer with a chat template."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model, num_labels=2)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def own_logits(folder: Path, text: str) -> list[float]:
    """What the classifier itself says of one text."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    with torch.inference_mode():
        return model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits[0].tolist()
