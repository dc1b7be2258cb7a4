"""GRPO: a model learns, the same on any number of workers, and whatever happens to the driver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inputs import random_center
from small_runs import LocalPool, climb, materials_of, resume_here, train_and_kill, train_here
from test_runs import assert_same_run

from es_engine.config import ConfigError, GrpoMethodConfig, parse_config
from es_engine.ledger import Ledger
from es_engine.methods import policy
from es_engine.methods.gradients import Gradient
from es_engine.methods.grpo import Grpo, GrpoLoss
from es_engine.methods.policy import Rollouts
from es_engine.methods.updates import Updates
from es_engine.past import replay
from es_engine.report import RunGroup, read_run
from es_engine.report.plots import Bars, plots
from rewards.base import Example
from workers.chunks import Problem
from workers.engine import Completion, Sampling, Vector
from workers.samples import Sample, reads_prompts_once

VERIFIER = """
def digits(rollout):
    text = rollout.completion
    return sum(character.isdigit() for character in text) / max(1, len(text))
"""
STEPS = 6


def settings(folder: Path, model: Path | str, **method: Any) -> dict[str, Any]:
    verifier = folder / "verifier.py"
    verifier.write_text(VERIFIER)
    return {
        "name": "grpo",
        "model": {"source": str(model)},
        "space": {"rank": 4, "alpha": 8.0, "train": "AB"},
        "method": {"kind": "grpo", "prompts": 6, "samples": 6, "chunk": 2, "micro_batch_tokens": 256, **method},
        "optimizer": {"kind": "adam", "lr": 0.02},
        "task": {"template": "plain", "high": 9, "max_tokens": 8, "verifier": f"{verifier}:digits"},
        "pool": {"workers": 1},
        "engine": {"kind": "hf", "dtype": "float32", "device": "cpu"},
        "budget": {"generations": STEPS},
        "evaluation": {"every": 3, "problems": 8, "chunk": 8},
        "telemetry": {"console": False, "tensorboard": False},
    }


# What is learned from.


def grpo(**changes: Any) -> Grpo:
    config = GrpoMethodConfig(**{"prompts": 2, "samples": 3, **changes})
    return Grpo(config, Sampling(4, 3, 1.0), Updates(config, dim=1, parameters=1, adapted=1))


def rollouts(rewards: list[list[float]]) -> Rollouts:
    """Two prompts with three completions each, of one to three tokens; the longest were cut short."""
    problems = [Problem(Example(name, "", {}, prompt=name), name, (5, 6)) for name in "ab"]
    completions = [
        Completion(number, sample, "", (7,) * (1 + sample), "length" if sample == 2 else "stop", (-1.0,) * (1 + sample))
        for number in range(2)
        for sample in range(3)
    ]
    return Rollouts(problems, np.array(rewards), completions, [], 0.0, 0.0)


def test_a_completions_advantage_is_its_rewards_place_in_its_group() -> None:
    nan = float("nan")
    samples = grpo(scale_rewards="none")._samples(rollouts([[1.0, 2.0, 6.0], [4.0, nan, 4.0]]))
    assert [sample.values["advantage"] for sample in samples] == [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]
    assert [sample.completion_ids for sample in samples] == [(7,), (7, 7), (7, 7, 7)] * 2
    scaled = grpo()._samples(rollouts([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]))
    spread = np.std([1, 2, 6], ddof=1) + 1e-4
    np.testing.assert_allclose(
        [sample.values["advantage"] for sample in scaled[:3]], np.array([-2, -1, 3]) / spread, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("rewards", "constant"),
    [
        ([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]], 1),
        ([[1.0, float("nan"), 1.0], [float("nan"), 0.0, 1.0]], 1),
        ([[float("nan")] * 3, [float("nan"), float("nan"), 2.0]], 2),
    ],
)
def test_groups_from_which_nothing_is_learned_are_counted_whatever_was_not_scored(
    rewards: list[list[float]], constant: int
) -> None:
    found = rollouts(rewards)
    advantages = [sample.values["advantage"] for sample in grpo()._samples(found)]
    silent = [not any(advantages[:3]), not any(advantages[3:])]
    assert policy.record(found)["constant_groups"] == sum(silent) == constant


def test_dr_grpo_does_not_scale_by_itself() -> None:
    assert [GrpoMethodConfig(loss=loss).reward_scale for loss in ("grpo", "dr_grpo", "dapo", "gspo")] == [
        "std",
        "none",
        "std",
        "std",
    ]


def test_truncated_completions_count_for_nothing_where_that_is_asked() -> None:
    samples = grpo(mask_truncated=True)._samples(rollouts([[1.0, 2.0, 6.0]] * 2))
    assert [sample.values["learn"] for sample in samples] == [1.0, 1.0, 0.0] * 2
    assert grpo(mask_truncated=True)._loss(samples).normaliser == 2 * (1 + 2)
    assert grpo()._loss(grpo()._samples(rollouts([[1.0, 2.0, 6.0]] * 2))).normaliser == 2 * (1 + 2 + 3)


def test_minibatches_are_whole_groups_and_together_all() -> None:
    method = grpo(minibatches=2)
    samples = method._samples(rollouts([[1.0, 2.0, 6.0], [0.0, 1.0, 5.0]]))
    halves = [policy._minibatch(samples, method.config, number) for number in range(2)]
    assert [len(half) for half in halves] == [3, 3]
    assert [sample for half in halves for sample in half] == samples


MIXED = [[1.0, 2.0, 6.0], [4.0, 4.0, 4.0], [float("nan"), 0.0, 3.0]]


def three_prompts(rewards: list[list[float]]) -> Rollouts:
    """Those of `rollouts` and one more prompt's, all different."""
    found = rollouts(rewards)
    problems = [replace(found.problems[0], prompt_ids=(5, first)) for first in (6, 7, 8)]
    completions = [
        replace(completion, token_ids=tuple(range(9 + number, 9 + number + length)), logprobs=(-1.0,) * length)
        for number, completion in enumerate((found.completions * 2)[:9])
        for length in [len(completion.token_ids)]
    ]
    return replace(found, problems=problems, completions=completions)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_what_has_no_advantage_is_read_only_to_be_held_to_the_base_model(
    loss: str, beta: float, random_llama: Path
) -> None:
    """The gradient is that of all, completions that are cut short left out."""
    fields = {"prompts": 3, "samples": 3, "loss": loss, "beta": beta, "mask_truncated": True, "max_norm": None}
    found = materials_of(random_llama, {"kind": "grpo", **fields}, engine={"chunk": 2})
    method, pool, theta = found.method, LocalPool(found), random_center(found.space, 0.02)
    assert isinstance(method, Grpo)
    samples = method._samples(three_prompts(MIXED))

    def direction(teaches: Callable[[Sample], bool]) -> tuple[Vector, Gradient]:
        steps = policy.learn(pool, theta, 0, samples, method._loss, method.config, method._updates, teaches)
        ascent = next(steps)
        with pytest.raises(StopIteration) as end:
            steps.send(theta)
        return ascent, end.value.value[0]

    (expected, whole), (mine, part) = direction(lambda sample: bool(sample.values["learn"])), direction(method._teaches)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(mine, expected, atol=1e-5 * np.abs(expected).max())
    assert part.loss == pytest.approx(whole.loss, abs=1e-6)
    learned = part.metrics["tokens"]
    # Of 6 completions of 1 and 2 tokens that are not cut short, a group of two and one without a score have no part.
    assert (whole.metrics["tokens"], learned) == (9, 5 if beta == 0 else 9)


def test_old_logprobs_are_of_what_teaches_something(random_llama: Path) -> None:
    found = materials_of(random_llama, {"kind": "grpo", "prompts": 3, "samples": 3, "epochs": 2}, engine={"chunk": 2})
    method, pool, theta = found.method, LocalPool(found), random_center(found.space, 0.02)
    assert isinstance(method, Grpo)
    samples = method._samples(three_prompts(MIXED))
    judged, costs = method._with_old(pool, samples, theta, 0)
    assert ["old" in sample.values for sample in judged] == [True] * 3 + [False] * 4 + [True] * 2
    assert [sample.completion_ids for sample in judged] == [sample.completion_ids for sample in samples]
    for sample in (judged[0], judged[8]):
        (row,) = pool.workers[0].logprobs([sample], theta, 0).rows
        np.testing.assert_allclose(sample.values["old"], row, atol=1e-5)
    assert costs.processed == sum(sample.tokens for sample in judged if "old" in sample.values)


def test_where_all_rewards_are_equal_the_shortest_sample_alone_is_read(random_llama: Path) -> None:
    """For the sake of a model whose logits are no numbers."""
    found = materials_of(random_llama, {"kind": "grpo", "prompts": 3, "samples": 3}, engine={"chunk": 2})
    method, pool, theta = found.method, LocalPool(found), found.space.start()
    assert isinstance(method, Grpo)
    samples = method._samples(three_prompts([[1.0] * 3] * 3))
    steps = policy.learn(pool, theta, 0, samples, method._loss, method.config, method._updates, method._teaches)
    assert not next(steps).any()
    with pytest.raises(StopIteration) as end:
        steps.send(theta)
    assert [call.arguments[1] for call in pool.calls] == [[samples[0]]]
    assert method._updates.costs(end.value.value).processed == samples[0].tokens == 3
    figures = method._updates.figures(end.value.value)
    assert (figures["loss"], figures["norm"]) == (0, 0)


class Said:
    """In place of a model's outputs: log-probabilities that gradients reach."""

    def __init__(self, logprobs: torch.Tensor) -> None:
        self._logprobs = logprobs

    def logprobs(self, temperature: float = 1.0) -> torch.Tensor:
        assert temperature == 1
        return self._logprobs


def test_a_single_update_follows_advantages_and_what_the_engine_found_less_likely() -> None:
    """d loss / d logprob = -advantage * min(p/q, cap) / normaliser at every token to learn from."""
    from workers.gradient import collate

    method = grpo(scale_rewards="none")
    samples = method._samples(rollouts([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]))
    batch = collate(samples)
    logprobs = torch.full(batch.mask.shape, -0.5, requires_grad=True)
    value, sums = method._loss(samples)(Said(logprobs), batch)  # type: ignore[arg-type]
    value.backward()
    weight = min(np.exp(-0.5 + 1.0), 2.0)
    advantages = torch.tensor([-2.0, -1.0, 3.0, -1.0, -1.0, 2.0])[:, None]
    expected = torch.where(batch.mask, -advantages * weight / 12, 0.0)
    torch.testing.assert_close(logprobs.grad, expected)
    assert float(sums["tokens"]) == 12


def test_the_loss_is_what_is_sent_to_workers() -> None:
    import pickle

    loss = grpo()._loss(grpo()._samples(rollouts([[1.0, 2.0, 6.0]] * 2)))
    assert isinstance(loss, GrpoLoss)
    assert pickle.loads(pickle.dumps(loss)) == loss


# Runs.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grpo")


@pytest.fixture(scope="module")
def undisturbed(folder: Path, random_llama: Path) -> Path:
    """A run with several updates a step, on one worker, that nothing happened to."""
    config = parse_config(settings(folder, random_llama, epochs=2, minibatches=2, beta=0.01))
    return train_here(config, folder / "undisturbed")


def test_a_model_learns_to_say_digits(undisturbed: Path) -> None:
    before, after = (Ledger(undisturbed / "eval.jsonl").lines[place]["reward"] for place in (0, -1))
    assert after > before + 0.3
    lines = Ledger(undisturbed / "ledger.jsonl").generations
    assert [line["moves"] for line in lines] == [4] * STEPS
    assert all(line["learning"]["kl"] > 0 for line in lines[1:])
    assert all(0.5 < line["learning"]["ratio"] < 2 for line in lines)
    assert [line["costs"]["generated"] for line in lines] == [line["tokens"] for line in lines]


def test_every_pass_over_a_steps_samples_is_counted(random_llama: Path) -> None:
    fields = {"prompts": 6, "samples": 6, "epochs": 2, "minibatches": 2, "beta": 0.01, "micro_batch_tokens": 1 << 20}
    found = materials_of(random_llama, {"kind": "grpo", **fields}, engine={"chunk": 2})
    pool = LocalPool(found)
    (report,) = climb(found, pool, 1, lr=0.1)[1]
    assert all(reads_prompts_once(call.arguments[1]) for call in pool.calls if call.method == "gradient")
    # Once to be drawn; once for the old log-probabilities; twice by the policy and twice by the base model.
    assert report.costs.processed == 6 * (report.record["prompt_tokens"] + report.record["tokens"])


def test_workers_seconds_are_told_by_the_work_they_went_into(undisturbed: Path) -> None:
    phases = {"slots", "generate", "score", "learn"}
    for line in Ledger(undisturbed / "ledger.jsonl").generations:
        assert line["times"].keys() == phases | {"rollouts", "update", "total"}
        assert sum(line["times"][phase] for phase in phases) == pytest.approx(line["costs"]["worker_seconds"])
    (bars,) = [each for each in plots([RunGroup("grpo", (read_run(undisturbed),))]) if each.name == "worker-time"]
    assert isinstance(bars, Bars)
    assert bars.parts.keys() == phases
    assert bars.parts["learn"][0] > 0


def test_two_workers_and_a_killed_driver_change_nothing(undisturbed: Path, folder: Path, random_llama: Path) -> None:
    given = settings(folder, random_llama, epochs=2, minibatches=2, beta=0.01) | {"pool": {"workers": 2}}
    run = train_and_kill(parse_config(given), folder / "two", calls=70)
    assert 2 <= len(Ledger(run / "ledger.jsonl").generations) < STEPS
    assert_same_run(resume_here(run), undisturbed)


def test_replay_gives_what_was_kept_and_says_what_that_is(undisturbed: Path, folder: Path) -> None:
    before = (undisturbed / "ledger.jsonl").read_bytes()
    with pytest.raises(ValueError, match="exists already; give another folder"):
        replay(undisturbed, STEPS, undisturbed)
    assert (undisturbed / "ledger.jsonl").read_bytes() == before
    replayed = replay(undisturbed, STEPS, folder / "replayed")
    name = "adapter_model.safetensors"
    assert (replayed / name).read_bytes() == (undisturbed / "adapter" / name).read_bytes()
    with pytest.raises(ValueError, match=r"^--step: grpo is replayed from checkpoints; there are 3, 5, 6$"):
        replay(undisturbed, 2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": {"kind": "grpo", "samples": 1}}, "method.samples: got 1, accepted is an integer >= 2"),
        (
            {"engine": {"kind": "simulated"}},
            'engine.kind: got "simulated", accepted is vllm or hf while method.kind is grpo',
        ),
        (
            {"task": {"kind": "guess"}},
            'task.kind: got "guess", accepted is a task of one turn while method.kind is grpo',
        ),
        ({"method": {"kind": "grpo", "temperature": 0.7}}, "method.importance_cap: got 2.0, accepted is null unless"),
        (
            {"method": {"kind": "grpo", "minibatches": 40}},
            "method.minibatches: got 40, accepted is at most prompts (32)",
        ),
        ({"method": {"kind": "grpo", "sigma": 0.1}}, "method.sigma: "),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(settings(tmp_path, "org/model") | changes)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
