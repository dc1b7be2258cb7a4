"""TRL's own trainers for a model, its adapter as a run begins it: what `gradient.py` and `trl_curves.py` compare with.

Of TRL's defaults those are changed in which a run differs: float32 throughout, no gradient checkpointing, no weight
decay, a constant learning rate, and rows in the order they are given in.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from es_engine.spaces.lora import LoraSpace

Kind = Literal["sft", "dpo", "grpo"]
KINDS: tuple[Kind, ...] = ("sft", "dpo", "grpo")
IN_ORDER: dict[Kind, dict[str, Any]] = {
    "sft": {"train_sampling_strategy": "sequential"},
    "dpo": {"train_sampling_strategy": "sequential"},
    "grpo": {"shuffle_dataset": False},
}


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
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

    from workers.peft_model import put_on

    tokenizer = AutoTokenizer.from_pretrained(model)
    if end is not None:
        tokenizer.eos_token = end
    arguments = getattr(_trl(), f"{kind.upper()}Config")(
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
    trainer = getattr(_trl(), f"{kind.upper()}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
        **({"reward_funcs": reward} if kind == "grpo" else {}),
    )
    trainer.remove_callback(PrinterCallback)
    put_on(trainer.model, space, space.start())
    return trainer


@cache
def _trl() -> Any:
    """The library, kept from importing vLLM, which takes a minute and is for generation alone, and from talking."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from datasets import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with patch.object(import_module("trl.import_utils"), "is_vllm_available", lambda min_version=None: False):
        trl: Any = import_module("trl")
        for kind in KINDS:  # each is imported when it is first asked for
            getattr(trl, f"{kind.upper()}Trainer")
    return trl
