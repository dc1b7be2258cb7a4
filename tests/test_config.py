"""The configuration: what it accepts, and what it refuses and in which words."""

from __future__ import annotations

import inspect
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from config_files import load, refusal
from pydantic import BaseModel

from es_engine.config import (
    Config,
    ConfigError,
    PretrainedModelConfig,
    Schedule,
    explain,
    field_docs,
    load_config,
    parse_config,
)
from es_engine.config.reflection import models_of
from rewards.countdown import WEIGHTS, Countdown

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))

# --- what is shipped


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_load_and_build_their_task(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # their paths are found beside them
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert config.name == name
    example = config.task.build().example("heldout", 0)
    assert example.prompt


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("es_engine.config", {"torch", "ray", "vllm", "transformers", "numpy"}),
        ("es_engine.status, es_engine.report.watch", {"torch", "ray", "vllm", "transformers"}),  # read often
    ],
)
def test_import_is_light(modules: str, heavy: set[str]) -> None:
    code = f"import sys, {modules}; print({heavy} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"


# --- defaults, kinds, types


def test_kinds_have_defaults(tmp_path: Path) -> None:
    config = load(tmp_path)
    kinds = (config.model.kind, config.space.kind, config.method.kind, config.optimizer.kind, config.engine.kind)
    assert kinds == ("pretrained", "lora", "es", "sgd", "vllm")
    assert isinstance(config.model, PretrainedModelConfig)


def test_whole_numbers_become_floats(tmp_path: Path) -> None:
    assert repr(load(tmp_path, "space.alpha=16").space.alpha) == "16.0"


def test_config_is_immutable_and_crosses_processes(tmp_path: Path) -> None:
    config = load(tmp_path, "space.targets=[q_proj, v_proj]")
    with pytest.raises(ValueError, match="frozen"):
        config.space.rank = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(config.model_copy())


def test_task_fields_are_those_of_countdown(tmp_path: Path) -> None:
    accepted = set(inspect.signature(Countdown).parameters)
    assert set(type(load(tmp_path).task).model_fields) - {"kind", "reward", "deadline", "memory_gb"} == accepted


def test_task_defaults_are_those_of_countdown(tmp_path: Path) -> None:
    task = load(tmp_path).task
    for name, parameter in inspect.signature(Countdown).parameters.items():
        assert getattr(task, name) == parameter.default, name


def test_task_weights_reach_the_verifier(tmp_path: Path) -> None:
    task = load(tmp_path, "task.weights.solved=2").task.build()
    assert task.verifier.options["weights"] == {**WEIGHTS, "solved": 2.0}
    default = load(tmp_path, "task.weights={}").task.weights
    assert default is not None
    assert default.model_dump() == WEIGHTS


# --- refusals, word by word


SENTENCES = {
    "method.populaton=8": "method.populaton: unknown key, perhaps population; accepted for kind es are kind, "
    "fitness, teacher, data, population, mirrored, min_pairs, sigma, sigma_schedule, shaping, prompts, sharing, "
    "samples, temperature, top_p, probe_pairs, probe_sigmas",
    "optimizer.betas=[0.9, 0.9]": "optimizer.betas: unknown key; accepted for kind sgd are kind, lr, lr_schedule, "
    "momentum, nesterov, weight_decay, decay_to",
    "space.rank=0": "space.rank: got 0, accepted is an integer >= 1",
    "space.rank=true": "space.rank: got true, accepted is an integer >= 1",
    "space.rank=8.0": "space.rank: got 8.0, accepted is an integer >= 1",
    "space.rank='8'": 'space.rank: got "8", accepted is an integer >= 1',
    "space.rank=": "space.rank: got null, accepted is an integer >= 1",
    "space.rank=513": "space.rank: got 513, accepted is at most 512 while engine.kind is vllm",
    "space.alpha=true": "space.alpha: got true, accepted is a number > 0",
    "space.targets=[]": "space.targets: got [], accepted is all-linear or a non-empty list, each item non-empty text",
    "method.population=7": "method.population: got 7, accepted is an even number while mirrored is true",
    "method.sigma=Auto": 'method.sigma: got "Auto", accepted is a number > 0 or auto',
    "method.sigma=.inf": 'method.sigma: got ".inf", accepted is a number > 0 or auto',
    "method.mirrored=1": "method.mirrored: got 1, accepted is true or false",
    "method.probe_sigmas=[1, x]": 'method.probe_sigmas: got [1, "x"], accepted is a non-empty list, '
    "each item a number > 0",
    "method=3": "method: got 3, accepted is a mapping of kind es, grpo, opd, sft or dpo",
    "method.kind=cma": 'method.kind: got "cma", accepted is es, grpo, opd, sft or dpo',
    "optimizer.kind=lion": 'optimizer.kind: got "lion", accepted is sgd, adam or adamw',
    "optimizer.kind=null": "optimizer.kind: got null, accepted is sgd, adam or adamw",
    "optimizer.kind=adam": "optimizer.lr: missing, accepted is a number > 0 and <= 1e+30",
    "optimizer=[]": "optimizer: got [], accepted is a mapping of kind sgd, adam or adamw",
    "optimizer={kind: adam, lr: 1, betas: [0.9]}": "optimizer.betas: got [0.9], accepted is a list of 2, "
    "each item a number >= 0 and < 1",
    "task.template=poem": 'task.template: got "poem", accepted is plain, few_shot, chat, r1 or dataset',
    "task.curriculum=[{problems: 9}, {problems: 9, numbers: [7]}]": "task.curriculum.1.numbers: got [7], accepted is "
    "null or a non-empty list, each item an integer >= 2 and <= 6",
    "task.curriculum=[{number: 3}]": "task.curriculum.0.problems: missing, accepted is an integer >= 1\n"
    "task.curriculum.0.number: unknown key, perhaps numbers; accepted are problems, numbers, low, high, operations, "
    "targets, solutions",
    "task.weights.solved=-1": "task.weights.solved: got -1, accepted is a number >= 0",
    "task.weights=1": "task.weights: got 1, accepted is null or a mapping of format, numbers, solved",
    "method.min_pairs=17": "method.min_pairs: got 17, accepted is null or at most 16, the pairs of a generation",
    "pool.workers=0": "pool.workers: got 0, accepted is an integer >= 1 or auto or a mapping of min, max",
    "pool.workers={min: 3, max: 2}": "pool.workers.max: got 2, accepted is at least min (3)",
    "pool.workers={min: 0, max: 2}": "pool.workers.min: got 0, accepted is an integer >= 1",
    "pool.workers={most: 2}": "pool.workers.max: missing, accepted is an integer >= 1\n"
    "pool.workers.most: unknown key; accepted are min, max",
    "pool.address=head": 'pool.address: got "head", accepted is null, auto or host:port',
    "pool.address=ray://head:10001": 'pool.address: got "ray://head:10001", accepted is null, auto or host:port',
    "budget.generations=null": "budget.generations: got null, accepted is an integer >= 1 while all other "
    "limits are null too",
    "budget={flops: 0}": "budget.flops: got 0, accepted is null or a number > 0",
    "name=../x": 'name: got "../x", accepted is text that matches ^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$',
    "seed=-1": "seed: got -1, accepted is an integer >= 0 and <= 9223372036854775807",
    "seed=9223372036854775808": "seed: got 9223372036854775808, accepted is an integer >= 0 and <= 9223372036854775807",
    "sede=1": "sede: unknown key, perhaps seed; accepted are name, seed, model, space, method, optimizer, task, pool, "
    "engine, budget, stages, evaluation, telemetry",
    "telemetry.prometheus_port=70000": "telemetry.prometheus_port: got 70000, accepted is null or "
    "an integer >= 0 and <= 65535",
    "method.population": "override method.population: accepted is KEY=VALUE, such as method.population=64",
    "=3": "override =3: accepted is KEY=VALUE, such as method.population=64",
}


@pytest.mark.parametrize("override", SENTENCES)
def test_refusal_is_one_sentence(override: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, override) == SENTENCES[override]


IMPOSSIBLE = {
    "method.population": ["method.population=3"],
    "method.sharing": ["method.mirrored=false", "method.sharing=pair"],
    "method.shaping": ["method.shaping=per_prompt", "method.sharing=member"],
    "method.samples": ["method.samples=2"],
    "method.sigma_schedule.final": ["method.sigma_schedule={kind: linear, final: 0}"],
    "method.sigma_schedule.warmup": ["method.sigma_schedule.warmup=0.1"],
    "method.teacher": ["method.fitness=teacher", "method.temperature=1"],
    "method.data": ["method.data=rows.jsonl"],
    "method.temperature": ["method.fitness=teacher", "method.teacher.adapter=x"],
    "method.top_p": ["method.fitness=teacher", "method.teacher.adapter=x", "method.temperature=1", "method.top_p=0.9"],
    "method.teacher.model": ["method={kind: opd, teacher: {}}"],
    "method.minibatches": ["method={kind: opd, teacher: {adapter: x}, prompts: 2, minibatches: 3}"],
    "method.importance_cap": ["method={kind: opd, teacher: {adapter: x}, temperature: 0.5}"],
    "optimizer.lr_schedule.final": ["optimizer.lr_schedule.kind=cosine"],
    "optimizer.momentum": ["optimizer.nesterov=true"],
    "model.heads": ["model={kind: tiny, hidden: 128, heads: 8}"],
    "engine.chunk": ["engine.chunk=3"],
    "pool.tensor_parallel": ["engine.kind=hf", "pool.tensor_parallel=2"],
    "space.rank": ["space.rank=1000"],
    "task.max_tokens": ["engine.max_model_len=64", "task.max_tokens=64"],
    "budget.generations": ["budget.generations=null"],
    "evaluation.samples": ["evaluation.samples=4"],
}


@pytest.mark.parametrize("field", IMPOSSIBLE)
def test_impossible_combination_names_its_field(field: str, tmp_path: Path) -> None:
    sentence = refusal(tmp_path, *IMPOSSIBLE[field])
    assert re.fullmatch(rf"{re.escape(field)}: got .+, accepted is .+", sentence)


POSSIBLE = (
    ["method.population=3", "method.mirrored=false", "engine.chunk=3"],
    ["method.sharing=pair"],
    ["method.shaping=per_prompt"],
    ["method.samples=2", "method.temperature=0.7"],
    ["method.sigma_schedule={kind: linear, final: 0.1}"],
    ["optimizer.lr_schedule={kind: linear, final: 0, warmup: 0.1}"],
    ["method={kind: opd, teacher: {adapter: x}, temperature: 0.5, form: exact}"],
    ["method.fitness=teacher", "method.teacher.adapter=x", "method.temperature=1", "method.samples=2"],
    ["method.fitness=references", "method.data=rows.jsonl", "pool.tensor_parallel=2"],
    ["optimizer.nesterov=true", "optimizer.momentum=0.9"],
    ["model={kind: tiny, hidden: 128, heads: 2}"],
    ["pool.tensor_parallel=2"],
    ["space.rank=1000", "engine.kind=hf"],
    ["engine.max_model_len=65", "task.max_tokens=64"],
    *(
        ["budget.generations=null", f"budget.{limit}"]
        for limit in ("tokens=1", "processed_tokens=1", "flops=1e18", "worker_seconds=0.5")
    ),
    ["evaluation.samples=4", "evaluation.temperature=1"],
    ["pool.address=auto"],
    ["pool.address=10.0.0.1:6379"],
)


@pytest.mark.parametrize("overrides", POSSIBLE, ids=" ".join)
def test_possible_neighbour_is_accepted(overrides: list[str], tmp_path: Path) -> None:
    load(tmp_path, *overrides)


def test_each_problem_has_its_line(tmp_path: Path) -> None:
    lines = refusal(tmp_path, "space.rank=0", "pool.threads=0", "colour=1").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["space.rank", "pool.threads", "colour"]


def test_missing_axes_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "x"})
    lines = str(caught.value).splitlines()
    assert lines[0] == "model: missing, accepted is a mapping of kind pretrained or tiny"
    assert [line.partition(":")[0] for line in lines] == ["model", "optimizer", "task", "budget"]


def test_config_that_is_no_mapping() -> None:
    with pytest.raises(ConfigError, match=r"^the configuration: got \[1\], accepted is a mapping of name, seed,"):
        parse_config([1])  # type: ignore[arg-type]


# --- schedules


@pytest.mark.parametrize("warmup", [0.0, 0.2])
@pytest.mark.parametrize(
    ("kind", "final", "half"),
    [("constant", 1.0, 1.0), ("linear", 0.2, 0.6), ("cosine", 0.2, 0.6), ("exponential", 0.25, 0.5)],
)
def test_schedule_closed_forms(kind: Any, final: float, half: float, warmup: float) -> None:
    schedule = Schedule(kind=kind, final=final, warmup=warmup)
    assert schedule.factor(warmup) == 1.0
    assert schedule.factor(1.0) == pytest.approx(final, rel=1e-15)
    assert schedule.factor((1 + warmup) / 2) == pytest.approx(half, rel=1e-15)
    if warmup:
        assert schedule.factor(0.0) == 0.0
        assert schedule.factor(0.05) == pytest.approx(0.25)


def test_cosine_and_exponential_at_a_quarter() -> None:
    assert Schedule(kind="cosine", final=0.0).factor(0.25) == pytest.approx((2 + math.sqrt(2)) / 4)
    assert Schedule(kind="exponential", final=1 / 16).factor(0.25) == pytest.approx(0.5)
    assert Schedule(kind="linear", final=3.0).factor(0.25) == 1.5


# --- the reference


def all_models(model: type[BaseModel]) -> set[type[BaseModel]]:
    inner = (each for info in model.model_fields.values() for each in models_of(info.annotation))
    return {model}.union(*(all_models(each) for each in inner))


def test_every_field_has_a_line_of_prose() -> None:
    models = all_models(Config)
    assert len(models) > 15
    for model in models:
        for name, info in model.model_fields.items():
            assert info.description, f"{model.__name__}.{name} has no description"
            assert info.description[0].isupper() or info.description.startswith(("vLLM", "transformers"))
            assert info.description.endswith("."), info.description
            assert "\n" not in info.description


def test_explain_mentions_every_field() -> None:
    lines = {line.strip() for line in explain().splitlines()}
    for model in all_models(Config):
        for name, info in model.model_fields.items():
            assert any(
                re.match(rf"([\w.]+\.)?{name}\b", line) and line.endswith(f": {info.description}") for line in lines
            ), f"{model.__name__}.{name}"
    assert "space.rank (an integer >= 1; default 8): Rank r of every adapted matrix." in lines
    assert "optimizer.lr (a number > 0 and <= 1e+30; required): Learning rate." in lines
    assert "engine of kind hf: What generates the completions." in lines


def test_names_that_people_rely_on() -> None:
    names = {doc.name for doc in field_docs(Config)}
    relied_on = (
        "model.source space.rank space.alpha space.train space.targets method.population method.sigma method.shaping "
        "optimizer.lr task.kind engine.kind engine.dtype pool.workers pool.address budget.generations budget.tokens "
        "budget.processed_tokens budget.flops budget.worker_seconds "
        "evaluation.every seed"
    )
    assert set(relied_on.split()) <= names
