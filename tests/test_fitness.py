"""The fitness of ES beside the reward: what it is for every member, where it leads, and what is refused."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from conftest import ALPHABET, build_random_model
from inputs import random_center, random_prompts
from scipy import stats
from small_runs import (
    GENERATIONS,
    LocalPool,
    materials_of,
    resume_here,
    small_config,
    train_here,
    write_rows,
)
from test_gradient import plain_logprobs
from test_runs import assert_same_run
from transformers import AutoModelForCausalLM

from es_engine import cli, noise
from es_engine.config import ConfigError, EsMethodConfig, TeacherConfig, parse_config
from es_engine.costs import Costs
from es_engine.ledger import Ledger
from es_engine.methods.es import Estimate, EvolutionStrategies
from es_engine.methods.fitness import TeacherFitness
from es_engine.methods.opd import ExactLoss
from es_engine.past import replay
from es_engine.run_folder import RunFolder
from es_engine.session import Materials, gather
from es_engine.spaces.lora import LoraSpace
from rewards.base import Example, Score
from workers.calls import Call
from workers.chunks import Chunk, ChunkResult, Outcome, Outcomes, Problem, Transcript, WeightedNoise, collect
from workers.engine import Completion, Sampling, Vector
from workers.gradient import GradientModel, Outputs, collate
from workers.models import linear_matrices, multiplying_parameters
from workers.perturbation import Perturber
from workers.samples import LogProbs, Sample
from workers.teacher import find_teacher

REFERENCES = {"kind": "es", "fitness": "references", "population": 8, "prompts": 6, "sigma": 0.1}
SIGMA = 0.1


@pytest.fixture(scope="module")
def adapter(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's."""
    folder = tmp_path_factory.mktemp("adapter")
    space = LoraSpace(linear_matrices(random_llama, "all-linear"), rank=3, alpha=7.0, train="AB", seed=5)
    space.save(random_center(space, 0.3), folder, str(random_llama))
    return folder


def imitation(adapter: Path, **method: Any) -> dict[str, Any]:
    teacher = {"adapter": str(adapter)}
    return {**REFERENCES, "fitness": "teacher", "teacher": teacher, "temperature": 1.0, "samples": 2, **method}


def member_theta(materials: Materials, center: Vector, generation: int, member: Sequence[int]) -> Vector:
    pair, sign = member
    return center + np.float32(sign * SIGMA) * noise.draw(materials.config.seed, generation, pair, len(center))


def worn(model: Path, adapter: Path) -> Any:
    """A plain PEFT model."""
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype="float32"), adapter)


def sequence_logprob(model: Any, sample: Sample) -> float:
    rows = plain_logprobs(model, sample).double()
    return float(rows.gather(-1, rows.new_tensor(sample.completion_ids).long()[:, None]).sum())


def generation(materials: Materials, pool: LocalPool, center: Vector) -> dict[str, Any]:
    """The record of the first generation around a center."""
    step = materials.method.step(pool, center, 0, 0.0, materials.problems)
    next(step)
    with pytest.raises(StopIteration) as end:
        step.send(center)
    record: dict[str, Any] = end.value.value.record
    return {**record, "costs": end.value.value.costs}


# What fitness is


def test_likelihoods_are_those_of_every_members_own_adapter(random_llama: Path, tmp_path: Path) -> None:
    """A member's mean over the problems is minus the loss of SFT; a problem that has no solution counts nowhere."""
    rows = [{"numbers": [a, b], "target": target} for a, b, target in [(1, 2, 3), (3, 4, 90), (2, 2, 4), (9, 9, 18)]]
    held = [{"numbers": [9, 8], "target": 17}]
    data = write_rows(tmp_path / "task.jsonl", rows)
    task = {"data": data, "heldout_data": write_rows(tmp_path / "held.jsonl", held), "template": "few_shot"}
    found = materials_of(random_llama, REFERENCES | {"prompts": 4}, task=task, engine={"chunk": 4})
    pool, center = LocalPool(found, workers=2), random_center(found.space, 0.02)
    record = generation(found, pool, center)
    assert isinstance(found.method, EvolutionStrategies)
    batch = found.method.fitness.batch(range(4), found.problems)
    samples = [Sample(each.prompt_ids, each.reference) if each.reference else None for each in batch]
    tokens = sum(len(sample.completion_ids) for sample in samples if sample)
    assert sum(sample is None for sample in samples) == 1

    for member, row in zip(record["members"], record["fitness"], strict=True):
        found.space.save(member_theta(found, center, 0, member), tmp_path / "member", str(random_llama))
        model = worn(random_llama, tmp_path / "member")
        sums = np.array([sequence_logprob(model, sample) if sample else np.nan for sample in samples])
        np.testing.assert_allclose(np.array(row, dtype=float), 3 * sums / tokens, rtol=1e-5)
        assert np.nanmean(np.array(row, dtype=float)) == pytest.approx(np.nansum(sums) / tokens, rel=1e-5)
    read = 8 * sum(sample.tokens for sample in samples if sample)
    assert (record["tokens"], record["rollouts"], record["unscored"], record["prompt_tokens"]) == (0, 0, 0, read)
    assert (record["reward_mean"], record["accuracy"]) == (None, None)
    assert record["costs"].processed == read
    assert sorted(record["workers"]) == [0, 1]


def test_closeness_to_a_teacher_is_that_of_every_members_own_completions(
    random_llama: Path, adapter: Path, tmp_path: Path
) -> None:
    found = materials_of(random_llama, imitation(adapter, population=4, prompts=2, sigma=SIGMA))
    pool, center = LocalPool(found), random_center(found.space, 0.02)
    record = generation(found, pool, center)
    (told,) = [call.arguments[0] for call in pool.calls if call.method == "evaluate"]
    batch = found.problems("train", range(2))
    again = pool.workers[0].evaluate(told, batch, center, 7)
    assert again.transcripts is not None

    teacher = worn(random_llama, adapter)
    sums, tokens = np.zeros((4, 2, 2)), 0
    for slot, member in enumerate(record["members"]):
        found.space.save(member_theta(found, center, 0, member), tmp_path / "member", str(random_llama))
        model = worn(random_llama, tmp_path / "member")
        for place, sample in np.ndindex(2, 2):
            completion = again.transcripts[slot][place][sample].completion
            assert completion is not None
            said = Sample(batch[place].prompt_ids, completion.token_ids)
            sums[slot, place, sample] = sequence_logprob(model, said) - sequence_logprob(teacher, said)
            tokens += len(completion.token_ids)
    np.testing.assert_allclose(record["fitness"], -sums.mean(-1) / (tokens / 16), rtol=1e-4, atol=1e-5)
    assert record["learning"]["reverse_kl"] == pytest.approx(sums.sum() / tokens, rel=1e-4)
    np.testing.assert_array_equal(record["rewards"], again.rewards.mean(-1))
    assert record["tokens"] == tokens
    assert found.teacher is not None
    adapted = multiplying_parameters(random_llama) + found.space.adapter_parameters
    read = record["prompt_tokens"] // 4 + tokens  # by the teacher, who reads a prompt once for all members
    assert record["costs"].flops == 2 * (adapted * (record["prompt_tokens"] + tokens) + found.teacher.parameters * read)
    worked = [record["times"][phase] for phase in ("slots", "generate", "score", "noise", "teacher")]
    assert min(worked) > 0
    assert sum(worked) == pytest.approx(record["costs"].worker_seconds)


class OneToken:
    """A pool whose members say one token, drawn from their distribution with the same, evenly spread random numbers."""

    size = 1

    def __init__(self, model: GradientModel, space: LoraSpace, speechless: int | None = None) -> None:
        """`speechless` is the number of a member whose probabilities are not numbers."""
        self.model = model
        self.space = space
        self.speechless = speechless
        self.perturber = Perturber(1, space.dim, 10**8)

    def put(self, value: Any) -> Any:
        return value

    def run(self, calls: Sequence[Call]) -> list[Any]:
        return [getattr(self, call.method)(*call.arguments) for call in calls]

    def evaluate(self, chunk: Chunk, batch: Sequence[Problem], theta: Vector, *rest: object) -> ChunkResult:
        self.perturber.center = theta
        asked = collate([Sample(problem.prompt_ids, (0,)) for problem in batch])
        outcomes = []
        for slot, member in enumerate(chunk.members):
            self.model.set_theta(self.perturber.theta(chunk.generation, chunk.sigma, member))
            rows = Outputs(self.model, asked).logits().log_softmax(-1).detach().double().numpy()
            for place, row in enumerate(rows):
                count = chunk.sampling.samples
                drawn = (np.arange(count) + np.random.default_rng([chunk.generation, place]).random(count)) / count
                for sample, token in enumerate(np.searchsorted(np.exp(row).cumsum()[:-1], drawn).tolist()):
                    logprob = float("nan") if slot == self.speechless else float(row[token])
                    said = Completion(0, sample, "", (token,), "length", (logprob,))
                    question = slot * len(rows) + place
                    outcomes.append(Outcome(question, sample, Score(0.0), 1, True, False, Transcript("", {}, said)))
        return collect(chunk, Outcomes(outcomes, 0, 0.0))

    def teacher_logprobs(self, samples: Sequence[Sample], temperature: float) -> LogProbs:
        prompts = {sample.prompt_ids: place for place, sample in enumerate(samples)}  # one sample of each
        asked = collate([samples[place] for place in prompts.values()])
        rows = dict(zip(prompts, Outputs(self.model, asked, "teacher").logits().log_softmax(-1).numpy(), strict=True))
        return LogProbs([rows[sample.prompt_ids][list(sample.completion_ids)] for sample in samples], 0, 0.0)

    def noise_sum(self, generation: int, pairs: Sequence[int], weights: Sequence[float]) -> WeightedNoise:
        return WeightedNoise(self.perturber.noise_sum(generation, pairs, weights), Costs())


@pytest.fixture(scope="module")
def one_token(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> OneToken:
    """The teacher wears an adapter of the student's own space."""
    space = LoraSpace(linear_matrices(random_llama, ("v_proj",)), rank=1, alpha=2.0)
    folder = tmp_path_factory.mktemp("near")
    space.save(random_center(space, 1.0), folder, str(random_llama))
    teacher = find_teacher(TeacherConfig(adapter=str(folder)), random_llama)
    return OneToken(GradientModel(random_llama, space, "float32", teacher=teacher), space)


PROMPTS = random_prompts(5, 5, 5, 5)


def one_generation(pool: OneToken, theta: Vector, generation: int, population: int, shaping: str) -> Estimate:
    method = {"population": population, "prompts": 4, "samples": 32, "temperature": 1.0, "shaping": shaping}
    config = EsMethodConfig(**method, fitness="teacher", teacher=TeacherConfig(adapter="near"))
    es = EvolutionStrategies(config, chunk=32, sampling=Sampling(1, 32, 1.0), fitness=TeacherFitness(parameters=1))
    batch = [Problem(Example(str(number), answer="", info={}), "", ids) for number, ids in enumerate(PROMPTS)]
    return es.estimate(pool, theta, generation, batch, generation, sigma=0.3, dim=len(theta))


def imitate(pool: OneToken, theta: Vector, generation: int, population: int, shaping: str) -> Vector:
    """The direction of a generation."""
    direction = one_generation(pool, theta, generation, population, shaping).direction
    assert direction is not None
    return direction


def distil(pool: OneToken, theta: Vector) -> tuple[float, Vector]:
    """The exact divergence, the mean over prompts, and the direction in which OPD brings it down."""
    pool.model.set_theta(theta)
    found = pool.model.gradient(ExactLoss(len(PROMPTS)), [Sample(prompt, (9,)) for prompt in PROMPTS])
    return found.loss, -found.gradient


def test_minus_kl_leads_where_distillation_does(one_token: OneToken) -> None:
    """With completions of one token, the divergence of the token is that of the sequence, and OPD takes its whole
    gradient. Without noise of sampling, M = 64 mirrored pairs in D = 64 dimensions would estimate it with a cosine of
    about sqrt(M / (M + D + 1)) = 0.70; with it, 0.64 was measured. A direction that knows nothing of the gradient has a
    cosine above 0.5 once in 1e5 tests (Student's t with D - 1 degrees of freedom).
    """
    theta, dim = one_token.space.start(), one_token.space.dim
    _, gradient = distil(one_token, theta)
    direction = imitate(one_token, theta, 0, population=128, shaping="per_prompt")
    cosine = float(direction @ gradient / np.linalg.norm(direction) / np.linalg.norm(gradient))
    assert stats.t.sf(0.5 * math.sqrt((dim - 1) / (1 - 0.5**2)), dim - 1) < 1.2e-5
    assert 0.5 < cosine < 0.85


def test_a_teacher_is_approached(one_token: OneToken) -> None:
    theta = one_token.space.start()
    before, _ = distil(one_token, theta)
    for generation in range(1, 9):
        theta = theta + 2 * imitate(one_token, theta, generation, population=32, shaping="zscore")
    after, _ = distil(one_token, theta)
    assert after < 0.6 * before


def test_a_member_that_says_nothing_that_can_be_compared_is_left_out(one_token: OneToken) -> None:
    """As where half precision overflows under a large sigma."""
    speechless = OneToken(one_token.model, one_token.space, speechless=3)
    theta = one_token.space.start()
    records = [one_generation(pool, theta, 0, 8, "zscore").record for pool in (one_token, speechless)]
    whole, found = (np.array(record["fitness"], dtype=float) for record in records)
    assert np.isnan(found[3]).all()
    np.testing.assert_allclose(np.delete(found, 3, axis=0), np.delete(whole, 3, axis=0))
    assert records[1]["learning"]["reverse_kl"] == pytest.approx(-np.nanmean(found))


# Runs


def same_adapter(one: Path, other: Path) -> bool:
    name = "adapter_model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()


def test_references_become_likelier_and_replay_leads_there_again(random_llama: Path, tmp_path: Path) -> None:
    """The same six in every generation."""
    rows = [{"prompt": f"{number}+0=", "completion": f"{number}"} for number in range(6)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    method = REFERENCES | {"data": data, "population": 16, "sigma": "auto", "probe_sigmas": [0.03, 0.1]}
    one, two = (
        small_config(random_llama, method, optimizer={"lr": 0.1}, engine={"chunk": 4}, pool={"workers": workers})
        for workers in (1, 2)
    )
    whole = train_here(one, tmp_path / "whole")
    ledger = Ledger(whole / "ledger.jsonl")
    nll = [line["learning"]["nll"] for line in ledger.generations]
    assert nll[-1] < 0.9 * nll[0], nll
    (calibration,) = ledger.of_kind("calibration")
    assert calibration["center_mean"] == pytest.approx(-nll[0], rel=0.1)
    assert calibration["costs"]["generated"] == 0 < calibration["costs"]["processed"]
    assert_same_run(train_here(two, tmp_path / "two"), whole)
    assert same_adapter(replay(whole, GENERATIONS), whole / "adapter")


def test_imitation_resumed_or_replayed_leads_to_the_same_theta(
    random_llama: Path, adapter: Path, tmp_path: Path
) -> None:
    method = imitation(adapter, population=4, prompts=2, sigma="auto", probe_pairs=1, probe_sigmas=[0.1, 0.3])
    config = small_config(random_llama, method, engine={"chunk": 2}, pool={"workers": 2})
    whole = train_here(config, tmp_path / "whole")
    lines = Ledger(whole / "ledger.jsonl").lines
    assert lines[0]["teacher"]
    assert all(np.shape(line["fitness"]) == np.shape(line["rewards"]) == (4, 2) for line in lines[2:])
    assert same_adapter(replay(whole, GENERATIONS), whole / "adapter")

    cut = RunFolder(tmp_path / "cut")
    cut.create(config)
    for line in lines[:4]:  # the header, the calibration and two generations
        cut.open_ledger().append(line)
    cut.open_evaluations().append(Ledger(whole / "eval.jsonl").lines[0])
    assert_same_run(resume_here(cut.path), whole)


# Refusals


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence of a command line, in this process, that refuses its input with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["es-engine", *map(str, arguments)])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("es-engine: ")]
    assert len(told) == 1
    return told[0].removeprefix("es-engine: ")


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (
            {"kind": "opd", "teacher": {"model": "OTHER"}},
            "method.teacher.model: its vocabulary is not that of the stud",
        ),
        (imitation(Path("x"), teacher={"model": "OTHER"}), "method.teacher.model: its vocabulary is not that of the s"),
        ({"kind": "dpo", "data": "ROWS"}, "method.data: ROWS, line 1 has no `rejected`"),
        ({"kind": "sft", "data": "ROWS"}, "method.data: ROWS, line 1 has no `completion`"),
        (REFERENCES | {"data": "ROWS"}, "method.data: ROWS, line 1 has no `completion`"),
        ({"kind": "grpo", "samples": 1}, "method.samples: got 1, accepted is an integer >= 2"),
        ({"kind": "sft"}, "method.data: got null, and the task knows no solution of its first 32 problems; accepted"),
        (REFERENCES, "method.data: got null, and the task knows no solution of its first 6 problems; accepted"),
        (REFERENCES | {"samples": 2, "temperature": 1}, "method.temperature: got 1.0, accepted is 0 while fitness is"),
    ],
)
def test_bad_input_ends_the_command_and_leaves_nothing(
    method: dict[str, Any],
    sentence: str,
    random_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The task's problems have no solutions; the file's row is neither a demonstration nor a pair."""
    build_random_model(tmp_path / "other", alphabet=ALPHABET.replace("p", "q"))
    places = {
        "OTHER": str(tmp_path / "other"),
        "ROWS": write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+2=", "chosen": "3"}]),
    }
    unsolved = write_rows(tmp_path / "task.jsonl", [{"numbers": [number, 1], "target": 90} for number in range(1, 9)])
    whole = small_config(random_llama, {"kind": "es"}, task={"data": unsolved}).model_dump(mode="json")
    text = json.dumps(whole | {"method": method})
    for name, place in places.items():
        text, sentence = text.replace(name, place), sentence.replace(name, place)
    (tmp_path / "config.yaml").write_text(text)
    told = command(monkeypatch, capsys, "train", tmp_path / "config.yaml", "--run-dir", tmp_path / "run")
    assert told.startswith(sentence)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("limit", "context"), [(16, 16), (None, 512)])
def test_vllm_reads_references_that_leave_room_for_a_token(
    limit: int | None, context: int, random_llama: Path, tmp_path: Path
) -> None:
    """Beside 6 tokens: 5 of the prompt, and an end of one."""
    for length, fits in ((context - 7, True), (context - 6, False)):
        data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "10+1=", "completion": "1" * length}])
        whole = small_config(random_llama, REFERENCES | {"data": data}).model_dump(mode="json")
        config = parse_config(whole | {"engine": {"kind": "vllm", "max_model_len": limit}})
        sentence = rf"has {context} tokens with its completion, and .* {context - 1}"
        with nullcontext() if fits else pytest.raises(ValueError, match=sentence):
            gather(config)


@pytest.mark.parametrize(
    ("fitness", "axes", "sentence"),
    [
        ("teacher", {"engine": {"kind": "simulated"}}, "engine.kind: got .*, accepted is vllm or hf while method.fitn"),
        ("references", {"task": {"kind": "guess"}}, "task.kind: got .*, accepted is a task of one turn while method.f"),
        ("teacher", {"pool": {"tensor_parallel": 2}}, "pool.tensor_parallel: got 2, accepted is 1 while method.fitnes"),
        ("references", {"budget": {"tokens": 9}}, "budget.tokens: got 9, .*, for es with fitness references generates"),
    ],
)
def test_what_does_not_go_together(fitness: str, axes: dict[str, Any], sentence: str) -> None:
    method = REFERENCES if fitness == "references" else imitation(Path("x"))
    data = {"name": "x", "model": {"source": "x"}, "optimizer": {"lr": 1}, "task": {"kind": "countdown"}}
    with pytest.raises(ConfigError, match=rf"\A{sentence}[^\n]*\Z"):
        parse_config({**data, "budget": {"generations": 1}, "method": method, **axes})
