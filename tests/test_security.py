"""docs/security.md, promise by promise, where no other file holds it: text, configs, the network, installation."""

from __future__ import annotations

import ast
import io
import json
import re
import time
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from command_line import command, refusal
from hypothesis import given
from hypothesis import strategies as st
from report_runs import config_of, write_run
from rich.console import Console

from es_engine import cli
from es_engine.config import ConfigError, TelemetryConfig, load_config, parse_config
from es_engine.config.yaml_text import parse as parse_yaml
from es_engine.report.watch import WatchServer
from es_engine.spaces.base import Matrix
from es_engine.spaces.lora import LoraSpace
from es_engine.telemetry.console import LineTelemetry, LiveTelemetry
from es_engine.telemetry.log import LogTelemetry
from es_engine.text import HIDDEN, discreet, visible
from es_engine.trainer import Notices
from workers.vllm_engine import VllmOptions, _llm_arguments

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("es_engine", "workers", "rewards", "benchmarks")
HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m[/red]\u202egnp\u2066\ud800\x00"
BOMB = "\n".join(["a: &a [x, x]", *(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in pairwise("abcdefghi"))])


def test_the_page_names_tests_that_exist() -> None:
    page = (ROOT / "docs/security.md").read_text()
    files = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    named = set(re.findall(r"::\s?(test_\w+)", page))
    assert len(named) > 30
    assert [name for name in named if not any(f"\ndef {name}(" in text for text in files.values())] == []
    assert set(re.findall(r"\b(test_\w+\.py)", page)) <= files.keys()


# --- text


@given(st.text())
def test_what_is_shown_can_be_seen_and_encoded(text: str) -> None:
    shown = visible(text)
    assert not set(re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown))
    assert shown.encode().decode() == visible(shown) == shown


def test_plain_text_is_shown_as_it_is() -> None:
    assert visible("naïve\t数学 👍\nا") == "naïve\t数学 👍\nا"
    assert visible("a\x1b[2J\u202e") == "aU+001B[2JU+202E"


def test_secrets_are_told_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    told = discreet("401 for hf_0123456789 at https://me:hush@example.org/a?b (false)")
    assert told == f"401 for {HIDDEN} at https://{HIDDEN}@example.org/a?b (false)"


@pytest.mark.parametrize("kind", [LineTelemetry, LiveTelemetry])
def test_the_console_of_a_run_shows_hostile_text_as_text(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    out = io.StringIO()
    kind(Console(file=out, color_system=None)).message(HOSTILE + "0123456789" * 4)
    shown = out.getvalue()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", shown)
    assert "U+001B[2J" in shown
    assert "[/red]" in shown
    assert "0123456789" not in shown


def test_what_is_told_before_there_is_a_console_is_as_safe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    Notices()("node 1 is given no more workers (https://me:hush@mirror said \x1b[2J to hf_0123456789)")
    assert capsys.readouterr().err == ("node 1 is given no more workers (https://***@mirror said U+001B[2J to ***)\n")


def test_the_log_takes_any_text_and_tells_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    log = LogTelemetry(tmp_path, 0)
    log.message(HOSTILE)
    log.close(ValueError("no access with hf_0123456789"))
    _, message, error = [json.loads(line)["message"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert message == HOSTILE
    assert error == f"no access with {HIDDEN}"


def test_the_command_line_shows_hostile_text_as_text(tmp_path: Path) -> None:
    folder = tmp_path / f"run{HOSTILE[:-2]}".replace("/", "|")
    run = write_run(tmp_path / "run", steps=2).rename(folder)
    error = json.dumps({"level": "error", "message": HOSTILE})
    (run / "log.jsonl").write_text(f'{error}\n"level": "error"\n["level": "error"]\n')
    for arguments in (["status", run], ["runs", tmp_path], ["report", run, "--no-png"], ["diff", run, run]):
        code, output = command(*arguments)
        assert code == 0, output
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", output), arguments
    shown = refusal("replay", folder, "--step", 7)
    assert "\x1b" not in shown
    assert "steps 0 to 2, not 7" in shown


def test_a_summary_holds_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    cli._print_summary({"components": {"[/nothing]\x1b": 1.0}})
    assert "[/nothing]" in capsys.readouterr().out


# --- configs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "more than 100000 values"),
        ("a: &a [*a]", "more than 100000 values, or an alias of what it is in"),
        ("a: &a {<<: *a}", "more than 100000 values"),
        ("[\n" * 1500, "not valid YAML"),
        ("a: " + "{b: " * 1000, "not valid YAML"),
        ("seed: " + "9" * 5000, "not valid YAML"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!timestamp now", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: " + "x" * (1 << 18), "is larger than 262144 bytes"),
    ],
)
def test_a_config_that_is_a_bomb_or_an_object_is_refused_at_once(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=words) as refused:
        load_config(path)
    assert time.monotonic() - started < 5
    assert "\n" not in str(refused.value)


def test_aliases_of_a_usual_size_are_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}", "x") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": {"x": 1, "y": 2},
    }


def test_only_the_safe_loader_reads_yaml_and_nothing_reads_pickles() -> None:
    """In the code of the project itself."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {name}"
        for path, nodes in sources()
        for node in nodes
        for name in _names(node)
        if name
        in {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.load", "np.load", "yaml.unsafe_load"}
        or (name == "yaml.load" and path.name != "yaml_text.py")
    ]
    assert found == []


@cache
def sources() -> list[tuple[Path, list[ast.AST]]]:
    """Every file of the project's code with its nodes."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [(path, list(ast.walk(ast.parse(path.read_text())))) for path in files]


def _names(node: ast.AST) -> list[str]:
    """What a node imports or calls, by the name that it has there."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [_called(node)] if isinstance(node, ast.Call) else []


def _called(node: ast.Call) -> str:
    """`module.function` or `function`; nothing for what is no plain name."""
    function = node.func
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return f"{function.value.id}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def test_nothing_is_loaded_that_brings_code_or_is_no_safetensors() -> None:
    calls = [
        (
            f"{path.relative_to(ROOT)}:{node.lineno}",
            _called(node),
            {each.arg: each.value for each in node.keywords},
        )
        for path, nodes in sources()
        if "benchmarks" not in path.parts
        for node in nodes
        if isinstance(node, ast.Call) and re.fullmatch(r"Auto\w+\.from_\w+", _called(node))
    ]
    assert len(calls) >= 8
    for where, name, arguments in calls:
        trust = arguments.get("trust_remote_code")
        assert isinstance(trust, ast.Constant), where
        assert trust.value is False, where
        weights = name.startswith("AutoModel") and name.endswith("from_pretrained")
        assert not weights or {"use_safetensors", "gguf_file"} & arguments.keys(), where
    space = LoraSpace([Matrix("q_proj", 4, 4, 1.0)], rank=1, alpha=1.0)
    arguments = _llm_arguments(space, 2, VllmOptions())
    assert (arguments["load_format"], arguments["trust_remote_code"]) == ("safetensors", False)


# --- the network


def test_what_listens_is_on_loopback_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    assert TelemetryConfig().prometheus_host == "127.0.0.1"
    with WatchServer([tmp_path]) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_addresses_hold_no_passwords(tmp_path: Path) -> None:
    told = refusal("submit", ROOT / "configs/countdown_tiny.yaml", "--address", "http://me:hush@127.0.0.1:1")
    assert told == "--address: it holds a name or a password; give the cluster's token in RAY_AUTH_TOKEN"
    data = config_of("x", "es", 0).model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"pool\.address: got"):
        parse_config({**data, "pool": {"address": "me:hush@head:6379"}})


def test_credentials_reach_workers_and_nothing_that_ray_writes_down(monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.cluster import credentials, environment

    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    inherited = environment(1)
    assert inherited["HF_HOME"] == "/somewhere"
    assert "hf_0123456789" not in inherited.values()
    assert credentials() == {"HF_TOKEN": "hf_0123456789"}


# --- what is installed


@pytest.mark.parametrize("name", ["cpu", "cluster", "cuda"])
def test_every_package_is_pinned_with_its_hashes(name: str) -> None:
    lines = [line for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines() if line[:1] != "#"]
    blocks = re.split(r"\n(?=\S)", "\n".join(lines))
    assert len(blocks) > 10
    for block in blocks:
        assert re.match(r"[\w.-]+==[\w.]+( ;.*)? \\\n( +--hash=sha256:[0-9a-f]{64}( \\\n)?)+$", block), block[:80]


def test_all_installers_insist_on_the_hashes() -> None:
    for name in ("scripts/setup.sh", "deploy/Dockerfile", "deploy/install_cuda.sh"):
        text = (ROOT / name).read_text().replace("\\\n", "")
        installs = [
            line for line in text.splitlines() if re.search(r"pip\S* install .*-r requirements/(?!torch)", line)
        ]
        assert installs, name
        assert all("--require-hashes" in line for line in installs), name
