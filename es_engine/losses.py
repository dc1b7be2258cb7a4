"""The losses of GRPO, on-policy distillation (OPD), SFT and DPO: pure functions on tensors, to be minimised.

Shapes: S sequences, T tokens, V vocabulary; P prompts with G rollouts each. `mask`, bool (S, T), is true on the tokens
to learn from: not the prompt, not padding, nothing of a completion left out for being cut off. What other tensors hold
where it is false has no effect, even if it is NaN.

A step's sequences are split into micro-batches, and the losses and gradients of those are summed. So every loss is a
sum over sequences or tokens, divided by its `normaliser`: a number known of the whole step beforehand (see
`policy_normaliser`; elsewhere the step's tokens to learn from, or its pairs). Metrics are sums, for the same reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

Variant = Literal["grpo", "dr_grpo", "dapo", "gspo"]
Scale = Literal["std", "none"]

TOKENS_AT_A_TIME = 64
"""Of which a softmax is kept for `reverse_kl`: 40 MB of a vocabulary of 150,000."""


class Loss(NamedTuple):
    """A loss to differentiate, scalar, and metrics: detached scalars to add over micro-batches and then divide.

    Every metric is a sum over `tokens` (for DPO, over `pairs`), which is their number.
    """

    value: Tensor
    sums: dict[str, Tensor]


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """The log-probability of every completion, (S, T) to (S,): what `dpo_loss` takes."""
    return _inside(logprobs, mask).sum(-1)


def advantages(rewards: Tensor, scale: Scale) -> Tensor:
    """Rewards (P, G) relative to their prompt's mean, for "std" over (their standard deviation + 1e-4); (P, G).

    GRPO, arXiv 2402.03300, section 4.1.2, with TRL's 1e-4 and n - 1; "none" is Dr. GRPO, arXiv 2503.20783, section 3.2.
    A rollout without a score (NaN) is left out of both and has advantage 0, as has every rollout of a prompt whose
    rewards are all the same.
    """
    scored = ~rewards.isnan()
    relative = rewards - rewards.nanmean(1, keepdim=True)
    if scale == "std":
        others = (scored.sum(1, keepdim=True) - 1).clamp(min=1)
        relative = relative / ((relative.square().nansum(1, keepdim=True) / others).sqrt() + 1e-4)
    highest = rewards.nan_to_num(nan=-torch.inf).amax(1, keepdim=True)
    lowest = rewards.nan_to_num(nan=torch.inf).amin(1, keepdim=True)
    # The mean of equal rewards may differ from them by rounding, which dividing by 1e-4 would turn into a signal.
    return torch.where(scored & (highest > lowest), relative, 0.0)


def policy_normaliser(variant: Variant, lengths: Sequence[int], max_tokens: int) -> float:
    """What `policy_loss` is divided by, from every sequence of the step: its number of tokens to learn from, maybe 0.

    A mean over sequences (grpo, gspo), sequences of the longest permitted length (dr_grpo), or tokens (dapo).
    """
    match variant:
        case "grpo" | "gspo":
            return float(len(lengths))
        case "dr_grpo":
            return float(len(lengths) * max_tokens)
        case "dapo":
            return float(max(sum(lengths), 1))


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    variant: Variant,
    clip: tuple[float, float],
    normaliser: float,
    beta: float = 0.0,
    reference: Tensor | None = None,
    weights: Tensor | None = None,
) -> Loss:
    """The clipped surrogate -min(ratio A, clip(ratio, 1 - low, 1 + high) A), and beta times the KL to a reference.

    grpo: the ratio of a token is exp(logprobs - old_logprobs); a mean over each sequence's tokens, then over sequences
        (arXiv 2402.03300, equation 3).
    dr_grpo: a sum over tokens, over a constant instead of the lengths (arXiv 2503.20783, section 3.2).
    dapo: a mean over all tokens (arXiv 2503.14476, equation 8, with its two bounds, which all variants have here).
    gspo: one ratio a sequence, the geometric mean of its tokens' (arXiv 2507.18071, equations 5 and 7).

    The KL is `kl_k3` times the ratio, so that its gradient is that of the exact reverse KL at every token, but for
    gspo's, whose ratio is the sequence's (DeepSeek-V3.2, arXiv 2512.02556, "Unbiased KL Estimate"; TRL's default).
    Without the ratio, as in arXiv 2402.03300, the estimate of the value is right but its gradient is the forward KL's.

    Args:
        logprobs: (S, T), of the policy; gradients flow through these alone.
        old_logprobs: (S, T), at the step's start; `logprobs.detach()` where it is the only update.
        advantages: (S,), or (S, T) where every token has its own.
        clip: how far the ratio may fall below 1 and rise above 1.
        normaliser: see `policy_normaliser`.
        reference: (S, T), log-probabilities of the reference; wanted if beta is not 0.
        weights: (S, T), factors of the surrogate but not of the KL (see `truncated_importance`).

    Metrics: `ratio`; `clipped_low` and `clipped_high`, tokens whose surrogate has no gradient; `approx_kl`, k3 to
    the old policy; `entropy`, -logprobs, an estimate of it for samples of the policy itself; `kl`, to the reference,
    if beta is not 0.
    """
    logprobs, old_logprobs = _inside(logprobs, mask), _inside(old_logprobs, mask)
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else _inside(advantages, mask)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    log_ratio = logprobs - old_logprobs
    if variant == "gspo":
        log_ratio = log_ratio.sum(1, keepdim=True) / lengths
    ratio = log_ratio.exp()
    low, high = 1 - clip[0], 1 + clip[1]
    losses = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if weights is not None:
        losses = losses * _inside(weights, mask)
    metrics = {
        "ratio": ratio,
        "clipped_low": (ratio < low) & (advantages < 0),
        "clipped_high": (ratio > high) & (advantages > 0),
        "approx_kl": kl_k3(old_logprobs, logprobs),
        "entropy": -logprobs,
    }
    if beta != 0:
        assert reference is not None, "a KL term needs the reference's log-probabilities"
        kl = ratio * kl_k3(logprobs, _inside(reference, mask))
        losses = losses + beta * kl
        metrics["kl"] = kl
    losses = losses * mask
    if variant in ("grpo", "gspo"):
        losses = losses / lengths
    return Loss(losses.sum() / normaliser, _token_sums(mask, metrics))


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) from tokens of the policy, never negative; any shape, elementwise.

    Schulman, "Approximating KL Divergence" (2020), estimator k3; arXiv 2402.03300, equation 4.
    """
    gap = reference - logprobs
    return gap.expm1() - gap


def truncated_importance(logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor, cap: float) -> Tensor:
    """min(p / q, cap) for tokens sampled from q though the policy is p, all (S, T): vLLM's numerics are not torch's.

    A factor for `weights`, detached. 1 where the sampler gave no log-probability (NaN) and outside the mask. Yao et
    al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025): truncated importance sampling.
    """
    gap = _inside(logprobs.detach(), mask) - _inside(sampling_logprobs, mask)
    return gap.nan_to_num(nan=0.0).exp().clamp(max=cap)


def opd_sampled_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    normaliser: float,
    weights: Tensor | None = None,
) -> Loss:
    """On-policy distillation from the sampled tokens' log-probabilities alone; all (S, T).

    Policy gradient with advantage -(log p - log q) at every token, p the student and q the teacher, and discount 0: a
    token answers for its own divergence, not for that of the tokens it leads to (Lu and Thinking Machines Lab,
    "On-Policy Distillation", 2025). Importance sampling, exp(logprobs - old_logprobs), makes up for tokens drawn from
    an older student, and the advantage is the current student's. The gradient is therefore, for samples of the old
    student, an unbiased estimate of that of `opd_exact_loss` on the same prefixes. `weights` is as in `policy_loss`.

    Metrics: `reverse_kl`, the estimate; `ratio`, `approx_kl` and `entropy` as in `policy_loss`.
    """
    logprobs, old_logprobs, teacher = (_inside(x, mask) for x in (logprobs, old_logprobs, teacher))
    ratio = (logprobs - old_logprobs).exp()
    losses = ratio * (logprobs - teacher).detach()
    if weights is not None:
        losses = losses * _inside(weights, mask)
    metrics = {
        "reverse_kl": losses,
        "ratio": ratio,
        "approx_kl": kl_k3(old_logprobs, logprobs),
        "entropy": -logprobs,
    }
    return Loss(losses.sum() / normaliser, _token_sums(mask, metrics))


def opd_exact_loss(divergences: Tensor, mask: Tensor, *, normaliser: float) -> Loss:
    """On-policy distillation from whole distributions: the sum of the tokens' `reverse_kl`; both (S, T).

    GKD, arXiv 2306.13649, section 3, with sequences of the student alone (lambda 1), the reverse KL as divergence and
    no gradient through the sampling; a mean over tokens if `normaliser` is their number. Metrics: `reverse_kl`.
    """
    losses = _inside(divergences, mask)
    return Loss(losses.sum() / normaliser, _token_sums(mask, {"reverse_kl": losses}))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(student || teacher) over the vocabulary at n tokens: logits or log-probabilities (n, V) to (n,).

    The softmax exists for a few tokens at a time, for gradients too, which compute it again.
    """

    def of_some(student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        return (student.exp() * (student - teacher)).sum(-1)

    few_at_a_time = (logits.split(TOKENS_AT_A_TIME) for logits in (student_logits, teacher_logits))
    again = partial(checkpoint, of_some, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(*some) for some in zip(*few_at_a_time, strict=True)])


def sft_loss(logprobs: Tensor, mask: Tensor, *, normaliser: float) -> Loss:
    """Cross-entropy: minus the log-probabilities (S, T) of the tokens to learn from. Metrics: `nll`, the same sum."""
    losses = -_inside(logprobs, mask)
    return Loss(losses.sum() / normaliser, _token_sums(mask, {"nll": losses}))


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    normaliser: float,
) -> Loss:
    """Direct preference optimisation, arXiv 2305.18290, equation 7, from `sequence_logprobs` of the pairs; all (S,).

    Metrics, sums over `pairs`: `chosen_reward` and `rejected_reward`, which are beta times the log-ratio to the
    reference; `margin`, the first less the second; `ordered`, whether that is positive.
    """
    chosen_reward, rejected_reward = beta * (chosen - reference_chosen), beta * (rejected - reference_rejected)
    margin = chosen_reward - rejected_reward
    metrics = {
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "margin": margin,
        "ordered": margin > 0,
    }
    sums = {name: metric.detach().sum() for name, metric in metrics.items()}
    return Loss(
        -logsigmoid(margin).sum() / normaliser, {"pairs": torch.tensor(len(margin), device=margin.device), **sums}
    )


def _inside(values: Tensor, mask: Tensor) -> Tensor:
    """Zero outside the mask: a product with the mask would keep NaN there, and send it back in the gradient."""
    return values.masked_fill(~mask, 0.0)


def _token_sums(mask: Tensor, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the tokens of the mask; what is (S, 1) counts for each token of its sequence."""
    return {"tokens": mask.sum(), **{name: (metric.detach() * mask).sum() for name, metric in metrics.items()}}
