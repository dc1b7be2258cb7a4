"""The losses and their gradients against TRL's own trainers, on the same numbers.

TRL's methods run unchanged, on trainers made without `__init__`, with the settings of TRL's own configs. Its
log-probabilities are either given, in float64, or come from logits through its fused head, which is float32.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from es_engine.losses import (
    Loss,
    Scale,
    Variant,
    advantages,
    dpo_loss,
    policy_loss,
    policy_normaliser,
    sequence_logprobs,
    sft_loss,
    truncated_importance,
)
from workers.gradient import token_logprobs

with pytest.MonkeyPatch.context() as patch:
    # TRL imports vLLM when it finds it, which takes a minute and is for generation alone.
    patch.setattr(import_module("trl.import_utils"), "is_vllm_available", lambda min_version=None: False)
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
    from trl.trainer.utils import add_fused_lm_head, selective_log_softmax

VARIANTS: tuple[Variant, ...] = get_args(Variant)
SCALES: tuple[Scale, ...] = get_args(Scale)
TRL_SCALES = {"std": "group", "none": "none"}
SEEDS = range(10)
PROMPTS, GROUP, PROMPT, TOKENS, VOCABULARY = 2, 4, 3, 6, 11
ROWS = PROMPTS * GROUP
PAD, EOS = 0, 1
CLIP = (0.2, 0.28)
CAP = 1.5
FLOAT64 = 1e-12
FLOAT32 = 1e-6


# --- TRL's trainers, without a model ---


class Logits(nn.Module):
    """A language model whose logits are its parameter, whatever it is given to read; with TRL's fused head."""

    is_gradient_checkpointing = False

    def __init__(self, logits: Tensor, temperature: float = 1.0) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)
        self._head = nn.Linear(logits.shape[-1], logits.shape[-1], bias=False)
        self._head.weight = nn.Parameter(torch.eye(logits.shape[-1]), requires_grad=False)
        add_fused_lm_head(self, temperature, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))

    def base_model(self, **inputs: object) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.logits)

    def get_output_embeddings(self) -> nn.Module:
        return self._head

    def forward(self) -> None:
        raise AssertionError("TRL calls its fused head instead")


def bare(trainer: type, args: Any, **attributes: object) -> Any:
    """A trainer with the settings of its config and the rest that its loss reads."""
    made = object.__new__(trainer)
    common = {
        "accelerator": Accelerator(cpu=True),
        "aux_loss_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "is_deepspeed_enabled": False,
    }
    made.__dict__.update(vars(args) | {"args": args} | common | attributes)
    return made


def config(kind: type, **settings: object) -> Any:
    return kind(output_dir="unused", bf16=False, use_cpu=True, report_to="none", **settings)


def grpo_trainer(variant: Variant, beta: float, **settings: object) -> Any:
    args = config(
        GRPOConfig,
        loss_type="grpo" if variant == "gspo" else variant,
        importance_sampling_level="sequence" if variant == "gspo" else "token",
        beta=beta,
        epsilon=CLIP[0],
        epsilon_high=CLIP[1],
        max_completion_length=TOKENS + 2,
        num_generations=GROUP,
        per_device_train_batch_size=ROWS,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=CAP,
        **settings,
    )
    return bare(
        GRPOTrainer,
        args,
        epsilon_low=args.epsilon,
        _entropy_bonus_enabled=False,
        environment_factories=None,
        environments=None,
        tools=None,
        _is_vlm=False,
        _tokenizer=SimpleNamespace(pad_token_id=PAD),
        eos_token_ids=[EOS],
        reward_weights=torch.ones(1),
        reward_funcs=[None],
        reward_func_names=["reward"],
        _pending_extra_logs={},
        _pending_metrics={},
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
    )


# --- GRPO ---


@dataclass
class Rollouts:
    """Rollouts of two prompts: ragged, some cut off, one group with equal rewards, some without a score."""

    rewards: Tensor
    ids: Tensor
    lengths: Tensor
    logits: Tensor
    old_logits: Tensor
    reference_logits: Tensor
    sampled: Tensor

    @property
    def present(self) -> Tensor:
        return torch.arange(TOKENS) < self.lengths.unsqueeze(1)

    @property
    def whole(self) -> Tensor:
        return (self.ids == EOS).any(1, keepdim=True)


def rollouts(seed: int) -> Rollouts:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, TOKENS + 1, (ROWS,), generator=random)
    lengths[seed % ROWS] = TOKENS  # TRL pads to the longest
    ids = torch.randint(2, VOCABULARY, (ROWS, TOKENS), generator=random)
    last, cut_off = lengths - 1, torch.rand(ROWS, generator=random) < 0.3
    ids[torch.arange(ROWS), last] = torch.where(cut_off, ids[torch.arange(ROWS), last], EOS)
    ids = ids.masked_fill(torch.arange(TOKENS) >= lengths.unsqueeze(1), PAD)
    rewards = torch.randint(0, 3, (PROMPTS, GROUP), generator=random) / 10
    if seed % 3 == 0:
        rewards[0] = 0.1
    if seed % 2:
        rewards[1, seed % GROUP] = torch.nan
    logits, step, drift = torch.randn(3, ROWS, PROMPT + TOKENS, VOCABULARY, generator=random)
    old_logits = logits + 0.4 * step
    sampled = of_completion(old_logits, ids) + 0.5 * torch.randn(ROWS, TOKENS, generator=random)
    sampled[4, 0] = torch.nan  # vLLM gave none
    return Rollouts(rewards, ids, lengths, logits, old_logits, logits + 0.5 * drift, sampled)


def of_completion(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of completions behind a prompt: the logits of a place are of the token after it."""
    return token_logprobs(logits[:, PROMPT - 1 : -1] / temperature, ids)


def scored_by_trl(trainer: Any, made: Rollouts) -> dict[str, Tensor]:
    """What TRL makes of the rollouts: masks, advantages, old and reference log-probabilities, importance weights."""
    ids = [row[:length].tolist() for row, length in zip(made.ids, made.lengths, strict=True)]
    sampled = [row[:length].tolist() for row, length in zip(made.sampled, made.lengths, strict=True)]
    prompts = [[2] * PROMPT] * ROWS
    trainer._generate = lambda _: (prompts, ids, None, [""] * ROWS, sampled, {}, None, None)
    trainer._calculate_rewards = lambda *_: made.rewards.reshape(ROWS, 1)
    return trainer._generate_and_score_completions([{"prompt": ""}] * ROWS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_from_logits_and_rewards_to_the_gradient_grpo_is_trls(variant: Variant, seed: int) -> None:
    """With recomputed old log-probabilities, truncated importance correction and, for some, cut-off ones left out."""
    made, beta, temperature = rollouts(seed), (0.0, 0.3)[seed % 2], (1.0, 0.7)[seed % 2]
    scale, leave_out = SCALES[seed // 2 % 2], seed % 4 < 2

    trainer = grpo_trainer(variant, beta, scale_rewards=TRL_SCALES[scale], mask_truncated_completions=leave_out)
    trainer.use_vllm = True
    trainer.model = Logits(made.old_logits, temperature)
    trainer.ref_model = Logits(made.reference_logits, temperature)
    policy = Logits(made.logits.clone(), temperature)
    expected = trainer._compute_loss(policy, scored_by_trl(trainer, made))
    expected.backward()

    logits = made.logits.clone().requires_grad_()
    mask = made.present & made.whole if leave_out else made.present
    old = of_completion(made.old_logits, made.ids, temperature)
    found = policy_loss(
        of_completion(logits, made.ids, temperature),
        old,
        advantages(made.rewards, scale).flatten(),
        mask,
        variant=variant,
        clip=CLIP,
        normaliser=policy_normaliser(variant, mask.sum(1).tolist(), TOKENS + 2),
        beta=beta,
        reference=of_completion(made.reference_logits, made.ids, temperature),
        weights=truncated_importance(old, made.sampled, mask, CAP),
    )
    found.value.backward()
    assert_close(found.value, expected, FLOAT32)
    assert_close(logits.grad, policy.logits.grad, FLOAT32)
    if variant != "gspo":  # of which TRL counts sequences, not their tokens
        assert_metrics_are_trls(found, trainer._metrics["train"])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("each_token_has_its_advantage", [False, True])
def test_policy_losses_are_trls_for_any_mask(variant: Variant, seed: int, each_token_has_its_advantage: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(5, ROWS, TOKENS, generator=random, dtype=torch.float64)
    start = noise[0] - 2
    old, reference, given = start + 0.4 * noise[1], start + 0.5 * noise[2], noise[3]
    if not each_token_has_its_advantage:
        given = given[:, 0]
    weights = noise[4].exp().clamp(max=CAP) if seed % 2 else None
    mask = torch.rand(ROWS, TOKENS, generator=random) < 0.6
    mask[seed % ROWS] = False  # a completion without a token, or left out
    first_epoch, beta = seed % 3 == 0, (0.0, 0.3)[seed // 2 % 2]

    theirs = start.clone().requires_grad_()
    trainer = grpo_trainer(variant, beta)
    trainer.use_vllm = weights is not None
    trainer.model = nn.Module()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (theirs, torch.zeros_like(theirs), None)
    ids = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": given,
        "old_per_token_logps": None if first_epoch else old,
        "ref_per_token_logps": reference,
        "importance_sampling_ratio": weights,
        "num_items_in_batch": mask.sum(),
    }
    expected = trainer._compute_loss(trainer.model, inputs)
    expected.backward()

    ours = start.clone().requires_grad_()
    found = policy_loss(
        ours,
        ours.detach() if first_epoch else old,
        given,
        mask,
        variant=variant,
        clip=CLIP,
        normaliser=policy_normaliser(variant, mask.sum(1).tolist(), TOKENS + 2),
        beta=beta,
        reference=reference,
        weights=weights,
    )
    found.value.backward()
    assert_close(found.value, expected, FLOAT64)
    assert_close(ours.grad, theirs.grad, FLOAT64)


def assert_metrics_are_trls(found: Loss, theirs: dict[str, list[float]]) -> None:
    names = {"clipped_low": "clip_ratio/low_mean", "clipped_high": "clip_ratio/high_mean", "kl": "kl"}
    for ours, name in names.items():
        assert (ours in found.sums) == (name in theirs)
        if ours in found.sums:
            mean = found.sums[ours] / found.sums["tokens"].clamp(min=1)
            assert mean.item() == pytest.approx(theirs[name][0], abs=FLOAT32)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("seed", SEEDS)
def test_advantages_and_importance_weights_are_trls(scale: Scale, seed: int) -> None:
    made = rollouts(seed)
    trainer = grpo_trainer("dapo", 0.0, scale_rewards=TRL_SCALES[scale])
    trainer.use_vllm, trainer.model = True, Logits(made.old_logits)
    theirs = scored_by_trl(trainer, made)
    assert_close(advantages(made.rewards, scale).flatten(), theirs["advantages"], FLOAT32)
    old = of_completion(made.old_logits, made.ids)
    weights = truncated_importance(old, made.sampled, made.present, CAP)
    assert_close(weights, theirs["importance_sampling_ratio"], FLOAT32)
    assert (weights == CAP).any()


# --- DPO, SFT and what they share ---


@pytest.mark.parametrize("seed", SEEDS)
def test_dpo_is_trls(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    shape = (ROWS, PROMPT + TOKENS)  # the first half are chosen, the second rejected
    ids = torch.randint(0, VOCABULARY, shape, generator=random)
    mask = completion_mask(random)
    logits, reference = torch.randn(2, *shape, VOCABULARY, generator=random)
    args = config(DPOConfig)
    trainer = bare(
        DPOTrainer,
        args,
        loss_types=args.loss_type,
        loss_weights=[1.0],
        precompute_ref_logps=False,
        model=Logits(logits.clone()),
        ref_model=Logits(reference),
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask.long()}
    expected = trainer.compute_loss(trainer.model, inputs)
    expected.backward()

    ours = logits.clone().requires_grad_()
    chosen, rejected, reference_chosen, reference_rejected = (
        half
        for of in (ours, reference)
        for half in sequence_logprobs(token_logprobs(of[:, :-1], ids[:, 1:]), mask[:, 1:]).chunk(2)
    )
    found = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=0.1, normaliser=ROWS // 2)
    found.value.backward()
    assert_close(found.value, expected, FLOAT32)
    assert_close(ours.grad, trainer.model.logits.grad, FLOAT32)
    for name in ("ordered", "margin", "chosen_reward", "rejected_reward"):
        their_name = {"ordered": "accuracies", "margin": "margins"}.get(name, name.removesuffix("_reward"))
        theirs = trainer._metrics["train"][f"rewards/{their_name}"][0]
        assert (found.sums[name] / found.sums["pairs"]).item() == pytest.approx(theirs, abs=FLOAT32)


@pytest.mark.parametrize("seed", SEEDS)
def test_sft_is_trls(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (ROWS, PROMPT + TOKENS), generator=random)
    mask = completion_mask(random)
    logits = torch.randn(*ids.shape, VOCABULARY, generator=random)
    model = Logits(logits.clone())
    trainer = bare(SFTTrainer, config(SFTConfig), compute_loss_func=None, label_smoother=None, model=model)
    labels = ids.masked_fill(~mask, -100)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    tokens = int(mask.sum())  # the first of a sequence is of the prompt, which nothing predicts
    expected = trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(tokens))
    expected.backward()

    ours = logits.clone().requires_grad_()
    found = sft_loss(token_logprobs(ours[:, :-1], ids[:, 1:]), mask[:, 1:], normaliser=max(tokens, 1))
    found.value.backward()
    assert_close(found.value, expected, FLOAT32)
    assert_close(ours.grad, model.logits.grad, FLOAT32)


def completion_mask(random: torch.Generator) -> Tensor:
    """Completions behind the prompt, of any length from none to all."""
    lengths = torch.randint(0, TOKENS + 1, (ROWS, 1), generator=random)
    places = torch.arange(PROMPT + TOKENS)
    return (places >= PROMPT) & (places < PROMPT + lengths)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_are_trls(temperature: float) -> None:
    random = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(4, 5, 50, generator=random)
    ids = torch.randint(0, 50, (4, 5), generator=random)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = token_logprobs(ours / temperature, ids)
    expected = selective_log_softmax(theirs, ids, temperature)
    assert torch.equal(found, expected)
    factors = torch.randn(4, 5, generator=random)
    (found * factors).sum().backward()
    (expected * factors).sum().backward()
    assert_close(ours.grad, theirs.grad, FLOAT32)


def assert_close(found: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, check_dtype=False)
