"""What holds of the losses whatever TRL does (for which see test_trl_losses.py).

Distillation is tested on a policy whose every sequence can be listed: three tokens from a vocabulary of two, with
logits of its own after each of the seven prefixes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from es_engine.losses import (
    TOKENS_AT_A_TIME,
    Loss,
    Scale,
    Variant,
    advantages,
    dpo_loss,
    opd_exact_loss,
    opd_sampled_loss,
    policy_loss,
    policy_normaliser,
    reverse_kl,
    sequence_logprobs,
    sft_loss,
    truncated_importance,
)
from workers.gradient import token_logprobs

VARIANTS: tuple[Variant, ...] = get_args(Variant)
SCALES: tuple[Scale, ...] = get_args(Scale)
ROWS, TOKENS, VOCABULARY = 6, 5, 7
NAN = float("nan")

Pieces = list[list[int]]
LossOfRows = Callable[[Tensor, list[int]], Loss]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Sums over micro-batches, and what the mask leaves out ---

MASK = torch.tensor(
    [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
)
MASK = MASK.bool()
LOGITS = normal(ROWS, TOKENS, VOCABULARY, seed=0)
TEACHER = normal(ROWS, TOKENS, VOCABULARY, seed=1)
IDS = torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % VOCABULARY
OLD, REFERENCE, SAMPLED = (token_logprobs(LOGITS + 0.4 * normal(*LOGITS.shape, seed=s), IDS) for s in (2, 3, 4))
ADVANTAGES = normal(ROWS, TOKENS, seed=5)


def of_policy(variant: Variant, logits: Tensor, rows: list[int], hidden: float = 0.0) -> Loss:
    """The rows' part of a step's loss, with `hidden` in every place that the mask leaves out."""
    mask = MASK[rows]
    logprobs, old, reference, sampled, relative = (
        of.masked_fill(~mask, hidden)
        for of in (
            token_logprobs(logits[rows], IDS[rows]),
            OLD[rows],
            REFERENCE[rows],
            SAMPLED[rows],
            ADVANTAGES[rows],
        )
    )
    return policy_loss(
        logprobs,
        old,
        relative,
        mask,
        variant=variant,
        clip=(0.2, 0.28),
        normaliser=17.0,
        beta=0.1,
        reference=reference,
        weights=truncated_importance(old, sampled, mask, 1.1),
    )


def of_sampled_opd(logits: Tensor, rows: list[int], hidden: float = 0.0) -> Loss:
    mask = MASK[rows]
    logprobs, old, teacher = (
        of.masked_fill(~mask, hidden) for of in (token_logprobs(logits[rows], IDS[rows]), OLD[rows], REFERENCE[rows])
    )
    return opd_sampled_loss(logprobs, old, teacher, mask, normaliser=17.0, weights=SAMPLED[rows].exp())


def of_exact_opd(logits: Tensor, rows: list[int], hidden: float = 0.0) -> Loss:
    divergences = reverse_kl(logits[rows].flatten(0, 1), TEACHER[rows].flatten(0, 1)).view(len(rows), TOKENS)
    return opd_exact_loss(divergences.masked_fill(~MASK[rows], hidden), MASK[rows], normaliser=17.0)


def of_sft(logits: Tensor, rows: list[int], hidden: float = 0.0) -> Loss:
    logprobs = token_logprobs(logits[rows], IDS[rows]).masked_fill(~MASK[rows], hidden)
    return sft_loss(logprobs, MASK[rows], normaliser=17.0)


def of_dpo(logits: Tensor, rows: list[int], hidden: float = 0.0) -> Loss:
    """Of pairs: a row, chosen, with the next, rejected."""
    logprobs = token_logprobs(logits, IDS).masked_fill(~MASK, hidden)
    policy, reference = sequence_logprobs(logprobs, MASK), sequence_logprobs(REFERENCE, MASK)
    others = [(row + 1) % ROWS for row in rows]
    return dpo_loss(policy[rows], policy[others], reference[rows], reference[others], beta=0.1, normaliser=17.0)


LOSSES: dict[str, LossOfRows] = {
    **{variant: partial(of_policy, variant) for variant in VARIANTS},
    "opd, sampled": of_sampled_opd,
    "opd, exact": of_exact_opd,
    "sft": of_sft,
    "dpo": of_dpo,
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@st.composite
def splits(draw: st.DrawFn) -> Pieces:
    """All rows, in any order, in any pieces."""
    order = draw(st.permutations(range(ROWS)))
    cuts = sorted(draw(st.sets(st.integers(1, ROWS - 1))))
    return [list(order[start:end]) for start, end in zip([0, *cuts], [*cuts, ROWS], strict=True)]


@each_loss
@settings(max_examples=25, deadline=None)
@given(pieces=splits())
def test_micro_batches_add_up_to_the_whole(loss: LossOfRows, pieces: Pieces) -> None:
    whole, gradient = evaluate(partial(loss, rows=list(range(ROWS))))
    parts, gradients = zip(*(evaluate(partial(loss, rows=piece)) for piece in pieces), strict=True)
    torch.testing.assert_close(sum(part.value for part in parts), whole.value, rtol=0, atol=1e-14)
    torch.testing.assert_close(sum(gradients), gradient, rtol=0, atol=1e-14)
    for name, total in whole.sums.items():
        torch.testing.assert_close(sum(part.sums[name] for part in parts), total, rtol=0, atol=1e-13)


@each_loss
def test_what_the_mask_leaves_out_has_no_effect(loss: LossOfRows) -> None:
    rows = list(range(ROWS))
    expected, gradient = evaluate(partial(loss, rows=rows))
    found, found_gradient = evaluate(partial(loss, rows=rows, hidden=NAN))
    assert torch.equal(found.value, expected.value)
    assert torch.equal(found_gradient, gradient)
    assert found.sums == expected.sums


@each_loss
def test_metrics_carry_no_gradient(loss: LossOfRows) -> None:
    found, _ = evaluate(partial(loss, rows=[0, 1]))
    assert not any(total.requires_grad for total in found.sums.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_without_a_token_to_learn_from_has_loss_zero(variant: Variant) -> None:
    logprobs = OLD.clone().requires_grad_()
    nothing = torch.zeros_like(MASK)
    normaliser = policy_normaliser(variant, [0] * ROWS, TOKENS)
    found = policy_loss(logprobs, OLD, ADVANTAGES, nothing, variant=variant, clip=(0.2, 0.2), normaliser=normaliser)
    found.value.backward()
    assert found.value == 0
    assert logprobs.grad is not None
    assert not logprobs.grad.any()


def evaluate(loss: Callable[[Tensor], Loss], logits: Tensor = LOGITS) -> tuple[Loss, Tensor]:
    logits = logits.clone().requires_grad_()
    found = loss(logits)
    (gradient,) = torch.autograd.grad(found.value, logits)
    return Loss(found.value.detach(), found.sums), gradient


# --- Advantages ---


@pytest.mark.parametrize("scale", SCALES)
def test_a_group_of_equal_rewards_or_with_one_score_has_advantage_zero(scale: Scale) -> None:
    """Though the mean of seven times 0.3, in float32, is another number."""
    rewards = torch.tensor([[0.3] * 7, [0.6] * 6 + [NAN], [NAN] * 6 + [5.0], [NAN] * 7])
    assert not advantages(rewards, scale).any()


def test_advantages_are_of_the_scored_rollouts_alone() -> None:
    rewards = torch.tensor([[0.0, 1.0, NAN, 2.0]], dtype=torch.float64)
    assert advantages(rewards, "none").tolist() == [[-1.0, 0.0, 0.0, 1.0]]
    assert advantages(rewards, "std")[0].tolist() == pytest.approx([-1 / 1.0001, 0.0, 0.0, 1 / 1.0001])


# --- From logits ---


def test_gradients_of_log_probabilities_and_divergences_are_their_finite_differences() -> None:
    logits, teacher = LOGITS[0].clone().requires_grad_(), TEACHER[0]
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x / 0.7, IDS[0]), logits)
    assert torch.autograd.gradcheck(lambda x: reverse_kl(x, teacher), logits)


def test_reverse_kl_is_torchs() -> None:
    """And so is its gradient, over more tokens than it goes over at a time."""
    student, teacher = (normal(2 * TOKENS_AT_A_TIME + 1, VOCABULARY, seed=seed) for seed in (6, 7))
    weights = torch.arange(len(student), dtype=student.dtype)

    def torchs(logits: Tensor) -> Tensor:
        return kl_divergence(Categorical(logits=logits), Categorical(logits=teacher))

    torch.testing.assert_close(reverse_kl(student, teacher), torchs(student), rtol=0, atol=1e-12)
    leaf = student.requires_grad_()
    (found,), (expected,) = (
        torch.autograd.grad((divergence(leaf) * weights).sum(), leaf)
        for divergence in (lambda logits: reverse_kl(logits, teacher), torchs)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


# --- Distillation and the KL term, over every sequence there is ---

STEPS = 3
BITS = torch.arange(STEPS - 1, -1, -1)
EVERY = torch.arange(2**STEPS).unsqueeze(1) >> BITS & 1  # (8, 3), every sequence
AFTER = torch.tensor([0, 1, 3]) + (EVERY @ torch.tensor([[0, 1, 2], [0, 0, 1], [0, 0, 0]]))  # the prefix of each token
ALL = torch.ones(EVERY.shape, dtype=torch.bool)
STUDENT, OLDER, TAUGHT = normal(3, 2**STEPS - 1, 2, seed=6)


def logprobs_of(table: Tensor) -> Tensor:
    """Every sequence's tokens' log-probabilities, (8, 3), from the logits after each prefix, (7, 2)."""
    return token_logprobs(table[AFTER], EVERY)


def probabilities(table: Tensor) -> Tensor:
    return logprobs_of(table).sum(1).exp()


def sampled_opd(table: Tensor, old: Tensor, sequences: Tensor, normaliser: float) -> Loss:
    logprobs, old_logprobs, teacher = (logprobs_of(of)[sequences] for of in (table, old, TAUGHT))
    return opd_sampled_loss(logprobs, old_logprobs, teacher, ALL[sequences], normaliser=normaliser)


def kl_term(table: Tensor, old: Tensor, sequences: Tensor, normaliser: float) -> Loss:
    """GRPO without advantages: what is left is the KL to the reference, here the teacher."""
    return policy_loss(
        logprobs_of(table)[sequences],
        logprobs_of(old)[sequences],
        torch.zeros(len(sequences), dtype=torch.float64),
        ALL[sequences],
        variant="dapo",
        clip=(0.2, 0.2),
        normaliser=normaliser,
        beta=1.0,
        reference=logprobs_of(TAUGHT)[sequences],
    )


def exact(table: Tensor, drawn_from: Tensor) -> Tensor:
    """The reverse KL at every token, over sequences from a policy, through whose probabilities gradients may flow."""
    divergence = torch.stack(
        [
            opd_exact_loss(reverse_kl(table[AFTER[y]], TAUGHT[AFTER[y]])[None], ALL[[y]], normaliser=1.0).value
            for y in range(8)
        ]
    )
    return (probabilities(drawn_from) * divergence).sum()


def sequence_kl(table: Tensor) -> Tensor:
    return (probabilities(table) * (logprobs_of(table) - logprobs_of(TAUGHT)).sum(1)).sum()


def gradient_of(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    table = STUDENT.clone().requires_grad_()
    value = function(table)
    return value.detach(), torch.autograd.grad(value, table)[0]


def test_the_exact_form_is_the_divergence_of_whole_sequences_but_for_the_gradient_through_the_prefixes() -> None:
    value, gradient = gradient_of(sequence_kl)
    by_token, by_token_gradient = gradient_of(lambda table: exact(table, drawn_from=table))
    torch.testing.assert_close(by_token, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(by_token_gradient, gradient, rtol=0, atol=1e-12)

    used, used_gradient = gradient_of(lambda table: exact(table, drawn_from=STUDENT))
    torch.testing.assert_close(used, value, rtol=0, atol=1e-12)
    last = slice(3, None)  # after two tokens nothing follows that a token could answer for
    torch.testing.assert_close(used_gradient[last], gradient[last], rtol=0, atol=1e-12)
    assert (used_gradient[:3] - gradient[:3]).abs().min() > 1e-3


@pytest.mark.parametrize("estimator", [sampled_opd, kl_term])
@pytest.mark.parametrize("old", [STUDENT, OLDER], ids=["on-policy", "off-policy"])
def test_the_estimators_expectation_is_the_exact_form(estimator: Callable[..., Loss], old: Tensor) -> None:
    """For sequences of the old policy and with discount 0: the gradient of the KL after each of their prefixes."""
    each = [gradient_of(lambda table, y=y: estimator(table, old, torch.tensor([y]), 1.0).value) for y in range(8)]
    values, gradients = (torch.stack(of) for of in zip(*each, strict=True))
    value, gradient = gradient_of(lambda table: exact(table, drawn_from=old))
    chances = probabilities(old)
    torch.testing.assert_close((chances * values).sum(), value, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.einsum("y,ynv->nv", chances, gradients), gradient, rtol=0, atol=1e-12)


def test_metrics_are_estimates_of_what_they_are_named_after() -> None:
    def expected(name: str, old: Tensor) -> float:
        each = [sampled_opd(STUDENT, old, torch.tensor([y]), 1.0).sums[name] for y in range(8)]
        return (probabilities(old) @ torch.stack(each)).item()

    def over_prefixes(old: Tensor, values: Tensor) -> float:
        return (probabilities(old) @ values[AFTER].sum(1)).item()

    student, older = Categorical(logits=STUDENT), Categorical(logits=OLDER)
    assert expected("ratio", OLDER) == pytest.approx(STEPS)
    assert expected("approx_kl", OLDER) == pytest.approx(over_prefixes(OLDER, kl_divergence(older, student)))
    assert expected("entropy", STUDENT) == pytest.approx(over_prefixes(STUDENT, student.entropy()))
    cross_entropy = older.entropy() + kl_divergence(older, student)
    assert expected("entropy", OLDER) == pytest.approx(over_prefixes(OLDER, cross_entropy))
    assert expected("reverse_kl", STUDENT) == pytest.approx(sequence_kl(STUDENT).item())


def test_sampled_distillation_is_unbiased_by_a_z_test() -> None:
    """Rejects an unbiased estimator once in a million seeds, and does reject the gradient of whole sequences' KL.

    One test for each prefix (its two logits' gradients are opposite), at level 1e-6 / 7.
    """
    samples, level = 20_000, 1e-6
    bound = NormalDist().inv_cdf(1 - level / (2**STEPS - 1) / 2)
    chances = probabilities(STUDENT)
    each = [
        gradient_of(lambda table, y=y: sampled_opd(table, STUDENT, torch.tensor([y]), 1.0).value)[1] for y in range(8)
    ]
    gradients = torch.stack(each)[..., 0]
    _, expected = gradient_of(lambda table: exact(table, drawn_from=STUDENT))
    deviation = (chances @ (gradients - expected[:, 0]).square()).sqrt()

    drawn = torch.multinomial(chances, samples, replacement=True, generator=torch.Generator().manual_seed(0))
    _, mean = gradient_of(lambda table: sampled_opd(table, STUDENT, drawn, samples).value)

    def z(of: Tensor) -> Tensor:
        return ((mean - of)[:, 0] / (deviation / samples**0.5)).abs()

    assert z(expected).max() < bound
    assert z(gradient_of(sequence_kl)[1]).max() > bound
