"""On-policy distillation: its two forms against each other and against plain models, and whole steps of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import yaml
from command_line import refusal
from conftest import ALPHABET, build_random_model
from inputs import random_center, random_prompts
from test_gradient import build_space, plain_logprobs, plain_peft
from test_gradient_pool import OnOneWorker
from test_runs import write_config
from transformers import AutoModelForCausalLM

from es_engine import past, trainer
from es_engine.config import TeacherConfig, load_config
from es_engine.methods import policy
from es_engine.methods.opd import ExactLoss, SampledLoss
from es_engine.run_folder import RunFolder
from es_engine.session import Materials, Session, gather
from es_engine.spaces.lora import LoraSpace
from workers.actor import Worker, WorkerSetup
from workers.calls import Call
from workers.engine import Sampling, Vector
from workers.gradient import GradientModel
from workers.models import fingerprint, multiplying_parameters
from workers.samples import Sample, reads_prompts_once
from workers.teacher import Teacher, find_teacher

LENGTHS = ((5, 9), (1, 4), (17, 2), (3, 20))
TOKENS = sum(length for _, length in LENGTHS)
FORMS = ("sampled", "exact")


def center(space: LoraSpace) -> Vector:
    return random_center(space, 0.1)


def samples() -> list[Sample]:
    ids = random_prompts(*map(sum, LENGTHS))
    return [Sample(row[:prompt], row[prompt:]) for row, (prompt, _) in zip(ids, LENGTHS, strict=True)]


def groups() -> list[Sample]:
    """Two prompts, each with three completions."""
    ids = random_prompts(19, 16, 4, 5, 7, 2, 1, 3)
    return [Sample(ids[place // 3], ids[2 + place]) for place in range(6)]


@pytest.fixture(scope="module")
def space(random_llama: Path) -> LoraSpace:
    return build_space(random_llama)


@pytest.fixture(scope="module")
def adapter(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another rank and alpha than the student's, and on both factors."""
    folder = tmp_path_factory.mktemp("adapter")
    space = LoraSpace(build_space(random_llama).matrices[3:], rank=3, alpha=7.0, train="AB", seed=5)
    space.save(random_center(space, 0.3), folder, str(random_llama))
    return folder


@pytest.fixture(scope="module")
def other_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def teachers(random_llama: Path, other_llama: Path, adapter: Path) -> dict[str, Teacher]:
    configs = {
        "base": TeacherConfig(model=str(random_llama)),
        "adapter": TeacherConfig(adapter=str(adapter)),
        "other": TeacherConfig(model=str(other_llama)),
        "other with adapter": TeacherConfig(model=str(other_llama), adapter=str(adapter)),
    }
    return {name: find_teacher(config, random_llama) for name, config in configs.items()}


def student(folder: Path, space: LoraSpace, teacher: Teacher, theta: Vector, dtype: str = "float32") -> GradientModel:
    model = GradientModel(folder, space, dtype, teacher=teacher)
    model.set_theta(theta)
    return model


# The teacher


@pytest.mark.parametrize("which", ["base", "adapter", "other", "other with adapter"])
@pytest.mark.parametrize("drawn", [samples(), groups()], ids=["samples", "groups"])
def test_the_exact_form_is_that_of_two_plain_models(
    which: str,
    drawn: list[Sample],
    teachers: dict[str, Teacher],
    random_llama: Path,
    space: LoraSpace,
    tmp_path: Path,
) -> None:
    teacher = teachers[which]
    model = student(random_llama, space, teacher, center(space), "float64")
    tokens = sum(len(sample.completion_ids) for sample in drawn)
    assert reads_prompts_once(drawn) == (len(drawn) == 6)
    found = model.gradient(ExactLoss(tokens, temperature=0.7), drawn)
    told = model.logprobs(drawn, 0.7, "teacher")

    mine = plain_peft(random_llama, space, center(space), tmp_path, torch.float64)
    theirs = AutoModelForCausalLM.from_pretrained(teacher.model or random_llama, dtype=torch.float64)
    if teacher.adapter is not None:
        theirs = peft.PeftModel.from_pretrained(theirs, teacher.adapter)
    loss = torch.zeros((), dtype=torch.float64)
    for row, sample in zip(told, drawn, strict=True):
        p = (plain_logprobs(mine, sample) / 0.7).log_softmax(-1)
        q = (plain_logprobs(theirs, sample) / 0.7).log_softmax(-1).detach()
        loss = loss + (p.exp() * (p - q)).sum() / tokens
        np.testing.assert_allclose(row, q.gather(-1, torch.tensor(sample.completion_ids)[:, None])[:, 0], atol=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert found.loss == pytest.approx(loss.item(), rel=1e-6)
    assert found.metrics["reverse_kl"] == pytest.approx(tokens * loss.item(), rel=1e-6)
    assert found.metrics["tokens"] == tokens
    for place in space.placements:
        slope = mine.get_submodule(f"base_model.model.{place.matrix.name}").lora_B["default"].weight.grad.numpy()
        expected = place.scale * slope.ravel()
        np.testing.assert_allclose(
            found.gradient[place.start : place.stop], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max()
        )


def test_a_student_that_is_the_teacher_has_nothing_to_learn(
    teachers: dict[str, Teacher], random_llama: Path, space: LoraSpace
) -> None:
    found = student(random_llama, space, teachers["base"], space.start()).gradient(ExactLoss(TOKENS), samples())
    assert abs(found.loss) < 1e-6
    assert np.abs(found.gradient).max() < 1e-6


@pytest.mark.parametrize("which", ["adapter", "other"])
def test_the_teacher_leaves_the_student_as_it_was(
    which: str, teachers: dict[str, Teacher], random_llama: Path, space: LoraSpace
) -> None:
    model = student(random_llama, space, teachers[which], center(space))
    before = [model.logprobs(samples(), of=speaker) for speaker in ("theta", "base")]
    model.logprobs(samples(), of="teacher")
    after = [model.logprobs(samples(), of=speaker) for speaker in ("theta", "base")]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.concatenate(one), np.concatenate(other))
    trained = [name for name, weight in model._model.named_parameters() if weight.requires_grad]
    assert len(trained) == len(space.matrices)
    assert all(name.endswith("lora_B.default.weight") for name in trained)


def test_a_teachers_parameters_are_those_of_model_and_adapter(
    teachers: dict[str, Teacher], random_llama: Path, adapter: Path
) -> None:
    base, worn = teachers["base"], teachers["adapter"]
    assert (base.model, worn.model, worn.adapter) == (None, None, adapter)
    assert base.parameters == multiplying_parameters(random_llama)
    numbers = peft.utils.load_peft_weights(str(adapter), device="cpu")
    assert worn.parameters - base.parameters == sum(tensor.numel() for tensor in numbers.values())
    assert len({each.fingerprint for each in teachers.values()}) == 4


@pytest.mark.parametrize("outputs", [48, 80])
def test_outputs_of_other_sizes_are_compared_where_both_have_them(
    outputs: int, random_llama: Path, space: LoraSpace, tmp_path: Path
) -> None:
    """The vocabulary's 41 tokens are padded to 64 outputs of the student and to others of the teacher."""
    folder = build_random_model(tmp_path / "teacher", seed=2, outputs=outputs)
    teacher = find_teacher(TeacherConfig(model=str(folder)), random_llama)
    model = student(random_llama, space, teacher, center(space), "float64")
    sample = Sample((5, 6, 7), (8, 60, 9))  # the student's 60 is none of the smaller teacher's
    common = min(64, outputs)

    mine = AutoModelForCausalLM.from_pretrained(random_llama, dtype=torch.float64)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    bare = student(random_llama, space, teacher, space.start(), "float64")
    first = replace(sample, completion_ids=(8,))
    p, q = (plain_logprobs(each, first)[:, :common].log_softmax(-1) for each in (mine, theirs))
    found = bare.gradient(ExactLoss(1.0), [first])
    assert found.loss == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-6)

    (told,) = model.logprobs([sample], of="teacher")
    once, whole = [replace(sample, prompt_ids=(60, 61, 62) * 4)] * 4, replace(sample, prompt_ids=(60, 61, 62) * 4)
    assert reads_prompts_once(once)
    np.testing.assert_allclose(
        model.logprobs(once, of="teacher")[3], model.logprobs([whole], of="teacher")[0], atol=1e-5
    )
    assert np.isfinite(told).tolist() == [True, outputs > 60, True]
    judged = model.gradient(SampledLoss(3.0), [sample.with_value("teacher", told)])
    assert np.isfinite(judged.gradient).all()
    assert judged.metrics["tokens"] == np.isfinite(told).sum()


# The sampled form


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("which", ["adapter", "other"])
def test_over_all_tokens_the_sampled_form_is_the_exact_one(
    which: str, temperature: float, teachers: dict[str, Teacher], random_llama: Path, space: LoraSpace
) -> None:
    """Every token of the vocabulary once, as if drawn with density 1: the importance weight is its probability."""
    model = student(random_llama, space, teachers[which], center(space), "float64")
    (prompt,) = random_prompts(6)
    zero = np.zeros(1, np.float32)
    drawn = [Sample(prompt, (token,), {"sampled": zero}) for token in range(64)]
    drawn = policy.with_values(drawn, "teacher", model.logprobs(drawn, temperature, "teacher"))
    sampled = model.gradient(SampledLoss(1.0, temperature, importance_cap=2.0), drawn)
    exact = model.gradient(ExactLoss(1.0, temperature), [Sample(prompt, (9,))])
    assert sampled.loss == pytest.approx(exact.loss, rel=1e-5)
    np.testing.assert_allclose(sampled.gradient, exact.gradient, atol=1e-5 * np.abs(exact.gradient).max())


class InProcess:
    """A pool of one worker, here."""

    size = 1

    def __init__(self, materials: Materials) -> None:
        teacher = materials.teacher
        setup = WorkerSetup(
            materials.config,
            materials.space,
            fingerprint(materials.model),
            tuple(random_prompts(5, 9)),
            slots=2,
            parameters=multiplying_parameters(materials.model),
            teacher=teacher.fingerprint if teacher else None,
        )
        self.worker = Worker(setup, 0, None)
        self.worker.start()

    def put(self, value: Any) -> Any:
        return value

    def run(self, calls: Sequence[Call]) -> list[Any]:
        return [getattr(self.worker, call.method)(*call.arguments) for call in calls]


def opd_config(folder: Path, model: Path, teacher: dict[str, str], **method: object) -> Path:
    folder.mkdir(exist_ok=True)
    path = write_config(folder, model, budget__generations=3, evaluation__problems=4)
    whole = yaml.safe_load(path.read_text())
    whole["method"] = {"kind": "opd", "teacher": teacher, "prompts": 8, "samples": 4, **method}
    whole["optimizer"] = {"kind": "adam", "lr": 0.01}
    whole["engine"] = {"kind": "hf", "dtype": "float32", "device": "cpu"}
    path.write_text(yaml.safe_dump(whole))
    return path


def test_the_sampled_form_estimates_the_exact_one_on_the_engines_completions(
    random_llama: Path, adapter: Path, tmp_path: Path
) -> None:
    """The two forms' gradients on the same completions differ by noise of mean 0. Along the exact gradient and 9 random
    directions, the mean over 40 groups of 16 completions lies within 5.2 of its standard errors, which fails by chance
    less than once in 1e4 tests; half the exact gradient would be more than 7 of them.
    """
    materials = gather(load_config(opd_config(tmp_path, random_llama, {"adapter": str(adapter)})))
    pool, space = InProcess(materials), materials.space
    theta = center(space)
    found = completions(pool, materials, theta, problems=40, samples=16)
    model = pool.worker._gradients_at(theta, 0)
    found = policy.with_values(found, "teacher", model.logprobs(found, of="teacher"))
    groups = [found[first : first + 16] for first in range(0, len(found), 16)]
    sampled, exact = (
        np.array([model.gradient(loss, group).gradient for group in groups]).astype(float)
        for loss in (SampledLoss(1.0), ExactLoss(1.0))
    )
    whole = exact.mean(0)
    for direction in (whole, *np.random.default_rng(6).standard_normal((9, space.dim))):
        differences = (sampled - exact) @ direction
        error = differences.std(ddof=1) / math.sqrt(len(groups))
        assert abs(differences.mean()) < 5.2 * error
        if direction is whole:
            assert 0.5 * whole @ whole > 7 * error


def completions(
    pool: InProcess, materials: Materials, theta: Vector, problems: int, samples: int, version: int = 0
) -> list[Sample]:
    """Those of theta, drawn as in a step."""
    asked = materials.problems("heldout", range(problems))
    sampling = Sampling(8, samples=samples, temperature=1.0)
    drawn = policy.roll_out(pool, theta, version, asked, sampling, chunk=problems)
    return [
        Sample(problem.prompt_ids, completion.token_ids)
        for problem, completion in zip(drawn.asked, drawn.completions, strict=True)
    ]


# Steps


@pytest.mark.parametrize("form", FORMS)
def test_the_divergence_from_the_teacher_falls(form: str, random_llama: Path, adapter: Path, tmp_path: Path) -> None:
    """Measured exactly, on completions of held-out prompts; and every pass of a model is counted."""
    method = {"form": form, "samples": 16, "micro_batch_tokens": 1 << 20}
    path = opd_config(tmp_path, random_llama, {"adapter": str(adapter)}, **method)
    materials = gather(load_config(path))
    pool, state = InProcess(materials), past.beginning(materials)
    before = divergence(pool, materials, state.theta, version=100)
    for step in range(10):
        directions = materials.method.step(pool, state.theta, step, 0.0, materials.problems)
        report, moves = trainer._climb(state, directions, lr=0.01)
        assert moves == 1
    assert divergence(pool, materials, state.theta, version=101) < 0.85 * before
    learning = report.record["learning"]
    assert learning["reverse_kl"] == pytest.approx(learning["loss"], rel=1e-4)
    assert np.shape(report.record["rewards"]) == (8, 16)

    assert materials.teacher is not None
    prompts, answers = report.record["prompt_tokens"], report.record["tokens"]
    read = prompts + answers  # by the engine and in a micro-batch: a prompt once for all of its completions
    adapted = multiplying_parameters(random_llama) + materials.space.adapter_parameters
    assert report.costs.processed == 3 * read
    assert report.costs.flops == read * (8 * adapted + 2 * materials.teacher.parameters)


def divergence(pool: InProcess, materials: Materials, theta: Vector, version: int) -> float:
    found = completions(pool, materials, theta, problems=8, samples=8, version=version)
    tokens = sum(len(sample.completion_ids) for sample in found)
    return pool.worker._gradients_at(theta, version).gradient(ExactLoss(tokens), found).loss


@pytest.mark.ray
def test_two_workers_learn_what_one_does(random_llama: Path, adapter: Path, tmp_path: Path) -> None:
    """In several updates, which need the log-probabilities of the step's start."""
    method = {"prompts": 4, "samples": 2, "epochs": 2, "minibatches": 2, "micro_batch_tokens": 32}
    path = opd_config(tmp_path, random_llama, {"adapter": str(adapter)}, **method)
    thetas, records = [], []
    with Session(load_config(path, ["pool.workers=2"]), lambda _: None) as session:
        for pool in (OnOneWorker(session.pool), session.pool):
            state = past.beginning(session.materials)
            directions = session.materials.method.step(pool, state.theta, 0, 0.0, session.materials.problems)
            report, moves = trainer._climb(state, directions, lr=0.01)
            assert moves == 4
            assert report.record["learning"]["approx_kl"] > 0
            thetas.append(state.theta.tobytes())
            records.append({**report.record, "times": None})
    assert thetas[0] == thetas[1]
    assert records[0] == records[1]


def test_another_teacher_than_the_runs_is_noticed(random_llama: Path, tmp_path: Path, space: LoraSpace) -> None:
    space.save(center(space), tmp_path / "teacher", str(random_llama))
    config = load_config(opd_config(tmp_path, random_llama, {"adapter": str(tmp_path / "teacher")}))
    materials = gather(config)
    ledger = RunFolder(tmp_path / "run")
    ledger.create(config)
    lines = ledger.open_ledger()
    stages = past.Stages(config, materials)
    lines.append(past.header(stages, past.beginning(materials)))
    past.restore(stages, ledger, lines)
    space.save(2 * center(space), tmp_path / "teacher", str(random_llama))
    with pytest.raises(ValueError, match=r"teacher is .* now, but was .* when the run began"):
        past.restore(past.Stages(config), ledger, lines)


# Refusals


def test_another_vocabulary_is_refused_before_anything_is_written(random_llama: Path, tmp_path: Path) -> None:
    other = build_random_model(tmp_path / "other", alphabet=ALPHABET.replace("p", "q"))
    config = opd_config(tmp_path / "inputs", random_llama, {"model": str(other)})
    sentence = refusal("train", config, "--run-dir", tmp_path / "run")
    assert sentence.startswith("method.teacher.model: its vocabulary is not that of the student")
    assert "'p' is no token" in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ({"model": "/no/such/model"}, r"method\.teacher\.model: '/no/such/model' is no local folder"),
        ({"adapter": "/no/such/adapter"}, r"method\.teacher\.adapter: /no/such/adapter is not a PEFT adapter"),
    ],
)
def test_a_teacher_that_is_not_there_is_refused(teacher: dict[str, str], words: str, random_llama: Path) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        find_teacher(TeacherConfig(**teacher), random_llama)


def test_a_teacher_without_a_tokenizer_is_refused(random_llama: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((random_llama / name).read_bytes())
    with pytest.raises(ValueError, match=rf"^method\.teacher\.model: {tmp_path} has no tokenizer that can be read"):
        find_teacher(TeacherConfig(model=str(tmp_path)), random_llama)


def test_an_adapter_of_another_model_is_refused(random_llama: Path, space: LoraSpace, tmp_path: Path) -> None:
    wide = [replace(matrix, out_features=matrix.out_features + 1) for matrix in space.matrices]
    named = [replace(matrix, name=f"model.{matrix.name}") for matrix in space.matrices]
    for name, matrices, words in (("wide", wide, "has A .* the model wants"), ("named", named, "no linear layer of")):
        odd = LoraSpace(matrices, rank=2, alpha=4.0)
        odd.save(odd.start(), tmp_path / name, str(random_llama))
        with pytest.raises(ValueError, match=rf"^method\.teacher\.adapter: .*{words}"):
            find_teacher(TeacherConfig(adapter=str(tmp_path / name)), random_llama)
