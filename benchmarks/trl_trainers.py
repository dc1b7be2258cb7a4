"""TRL's own trainers for a model, its adapter as a run begins it: what `gradient.py` and `trl_curves.py` compare with.

TRL imports vLLM where it finds it, which takes a minute; here its completions are drawn with transformers. Of TRL's
defaults the ones changed are those in which a run differs: float32 throughout, no gradient checkpointing, no dropout,
no weight decay, a constant learning rate, and rows in the order they are given in.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from es_engine.spaces.lora import LoraSpace
from workers.peft_model import put_on

with patch.object(import_module("trl.import_utils"), "is_vllm_available", lambda min_version=None: False):
    trl: Any = import_module("trl")
    TRAINERS = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
    }

Kind = Literal["sft", "dpo", "grpo"]
KINDS: tuple[Kind, ...] = ("sft", "dpo", "grpo")
IN_ORDER: dict[Kind, dict[str, Any]] = {
    "sft": {"train_sampling_strategy": "sequential"},
    "dpo": {"train_sampling_strategy": "sequential"},
    "grpo": {"shuffle_dataset": False},
}

disable_progress_bars()
disable_progress_bar()


def build_trainer(
    kind: Kind,
    model: Path,
    space: LoraSpace,
    rows: list[dict[str, Any]],
    out: Path,
    *,
    end: str | None = None,
    reward: Any = None,
    **settings: Any,
) -> Any:
    """A trainer of the kind, with TRL's further `settings`, for rows as TRL has them; it writes into `out`.

    `end` is the token that ends a completion, None the tokenizer's own; `reward` is GRPO's.
    """
    trainer, config = TRAINERS[kind]
    tokenizer = AutoTokenizer.from_pretrained(model)
    if end is not None:
        tokenizer.eos_token = end
    arguments = config(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **IN_ORDER[kind],
        **settings,
    )
    lora = LoraConfig(
        r=space.rank,
        lora_alpha=space.alpha,
        target_modules=[matrix.name for matrix in space.matrices],
        task_type="CAUSAL_LM",
    )
    made = trainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
        **({"reward_funcs": reward} if kind == "grpo" else {}),
    )
    put_on(made.model, space, space.start())
    return made
