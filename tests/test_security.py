"""docs/security.md, promise by promise: what somebody else made (text, models, adapters, run folders) does no harm."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import time
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import save_adapter
from command_line import command, refusal
from hypothesis import given
from hypothesis import strategies as st
from report_runs import config_of, write_run
from rich.console import Console
from small_runs import resume_here, small_config, train_here

from es_engine import cli
from es_engine.config import ConfigError, EsMethodConfig, TelemetryConfig, load_config, parse_config
from es_engine.config.yaml_text import parse as parse_yaml
from es_engine.ledger import Ledger, LedgerReader
from es_engine.methods.es import EvolutionStrategies
from es_engine.past import replay
from es_engine.report import find_runs, group_runs, read_run
from es_engine.report.page import content
from es_engine.report.watch import WatchServer
from es_engine.run_folder import refuse_ways_out, write_text
from es_engine.spaces.base import Matrix
from es_engine.spaces.lora import LoraSpace
from es_engine.status import read_status
from es_engine.telemetry.console import LineTelemetry, LiveTelemetry
from es_engine.telemetry.log import LogTelemetry
from es_engine.telemetry.trackers import remembered_id
from es_engine.text import HIDDEN, discreet, visible
from workers.engine import Sampling
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


# --- run folders of other people


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", steps=4)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/mine.txt").write_text("mine")
    return tmp_path / "outside"


COMMANDS: dict[str, list[Any]] = {
    "resume": [],
    "replay": ["--step", "1"],
    "eval": [],
    "status": [],
    "report": ["--no-png"],
    "export": ["--out", "out"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_follows_a_link_out_of_a_run_folder(
    run: Path, outside: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(outside.parent)
    for place, target in (
        *((place, outside / "mine.txt") for place in (".lock", "log.jsonl", "report.html.partial", "adapter/extra")),
        ("tb", outside),
        ("wandb/deep/link", Path("../../..")),
    ):
        (run / place).parent.mkdir(parents=True, exist_ok=True)
        (run / place).symlink_to(target)
        code, output = command(name, run, *COMMANDS[name])
        assert code == (0 if name == "status" else 2), output
        assert "a link out of" in " ".join(output.split())
        assert str(run / place) in output.replace("\n", "") or name == "status"
        (run / place).unlink()
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"mine.txt": "mine"}
    assert not (outside.parent / "out").exists()


def test_links_within_a_run_folder_are_followed_and_pipes_are_not_waited_for(run: Path) -> None:
    (run / "wandb").mkdir()
    (run / "wandb/latest-run").symlink_to("offline-run-1")
    refuse_ways_out(run)
    assert read_status(run).state == "finished"
    (run / "ledger.jsonl").rename(run / "old.jsonl")
    os.mkfifo(run / "ledger.jsonl")
    assert read_status(run).state == "unreadable"
    with pytest.raises(ValueError, match=r"ledger\.jsonl: neither a file nor a folder; remove it$"):
        read_run(run)


def test_the_config_of_a_run_extends_no_other_file(run: Path, outside: Path) -> None:
    with (run / "config.yaml").open("a") as file:
        file.write(f"extends: {outside}/mine.txt\n")
    assert refusal("report", run).startswith("extends: unknown key")


def test_runs_are_looked_for_where_no_link_leads(run: Path, outside: Path) -> None:
    runs = run.parent / "runs"
    for name in ("one", "two"):
        (runs / name).mkdir(parents=True)
        (runs / name / "up").symlink_to(runs)
    (runs / "elsewhere").symlink_to(run)
    assert find_runs([runs]) == []
    assert find_runs([runs / "elsewhere"]) == [runs / "elsewhere"]


def test_a_file_that_is_written_replaces_a_link_that_lies_there(outside: Path) -> None:
    path = outside.parent / "text"
    for link in (path, path.with_name("text.partial")):
        link.symlink_to(outside / "mine.txt")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert not path.is_symlink()
    assert (outside / "mine.txt").read_text() == "mine"


def test_an_export_holds_the_adapter_and_nothing_else(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "adapter")
    save_adapter(run / "adapter")
    (run / "adapter/notes.txt").write_text("hers")
    code, output = command("export", run, "--out", tmp_path / "out")
    assert code == 0, output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"costs": {"generated": -1, "processed": 1, "flops": 1, "worker_seconds": 1.0}}, "costs.generated"),
        ({"costs": {"generated": 1, "processed": 1, "flops": 10**40, "worker_seconds": 1.0}}, "costs.flops"),
        ({"costs": {"generated": 1, "processed": 1, "flops": 1, "worker_seconds": 1.0, "x": 1}}, "costs.x"),
        ({"costs": None}, "costs"),
        ({"times": {}}, "times.total"),
        ({"times": {"total": 1e300}}, "times.total"),
        ({"times": {"total": 1.0, "x": "y"}}, "times.x"),
        ({"step": "../../x"}, "step"),
        ({"step": True}, "step"),
        ({"reward_mean": float("inf")}, "reward_mean"),
        ({"accuracy": float("nan")}, "accuracy"),
        ({"lr": 1e305}, "lr"),
        ({"rewards": [[0.0], [0.0, 1.0]]}, "rewards: Value error, its rows are of different lengths"),
        ({"rewards": [["x"]]}, "rewards.0.0"),
        ({"rewards": []}, "rewards"),
        ({"failures": {"verifier": 3}}, "failures.verifier"),
        ({"components": {"a": [1]}}, "components.a"),
        ({"kind": "stage", "stage": -1}, "stage"),
        ({"kind": "calibration", "sigma": 0}, "sigma"),
        ({"kind": "run", "config": json.loads('{"a":' * 80 + "1" + "}" * 80)}, "config: .*levels deep"),
    ],
)
def test_a_ledger_line_that_no_run_writes_is_refused_by_its_place(
    run: Path, change: dict[str, Any], words: str
) -> None:
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    lines[2] |= change
    (run / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=rf"ledger\.jsonl: line 3 is none of a run's: {words}") as refused:
        read_run(run)
    assert "\n" not in str(refused.value)
    status = read_status(run)
    assert (status.state, status.error) == ("unreadable", str(refused.value))


@pytest.mark.parametrize(
    "damage", [b'{"kind": [1]}', b"[" * 10**6, b'{"kind": ' + b'{"a":' * 10**5, b'{"a": ' + b"9" * 10**5 + b"}"]
)
def test_a_ledger_line_that_is_no_json_for_people_is_damaged(run: Path, damage: bytes) -> None:
    path = run / "ledger.jsonl"
    path.write_bytes(damage + b"\n" + path.read_bytes())
    with pytest.raises(ValueError, match="line 1 is damaged"):
        list(LedgerReader(path).new_lines())


def test_a_line_of_any_length_is_not_read_to_its_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("es_engine.ledger.LONGEST", 1000)
    path = run / "ledger.jsonl"
    path.write_bytes(b'{"kind": "run", "x": "' + b"x" * 5000 + b'"}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 1 is damaged"):
        Ledger(path)
    assert path.read_bytes() == before


def test_more_stages_than_a_config_has_are_refused(run: Path) -> None:
    with (run / "ledger.jsonl").open("a") as file:
        file.write('{"kind": "stage", "stage": 0, "step": 4, "method": "es", "theta": "0"}\n')
    assert read_status(run).error == "stages: 1 of them have begun, and the config has 0"


def test_evaluations_out_of_range_name_no_file(run: Path) -> None:
    path = run / "eval.jsonl"
    path.write_text(path.read_text().replace('"step": 2', '"step": "../../../x"'))
    with pytest.raises(ValueError, match=r"eval\.jsonl: line 2 is none of a run's: step"):
        read_run(run)


@pytest.mark.parametrize(
    "line",
    ["[" * 10**5, "{}", '{"id": 1}', '{"id": "a", "prompt": "", "completion": "", "reward": 1e999, "accuracy": 1}'],
)
def test_damaged_samples_are_named_and_hide_no_other_run(run: Path, line: str) -> None:
    other = write_run(run.parent / "other", "sft")
    with (run / "samples/step-000000.jsonl").open("a") as file:
        file.write(line + "\n")
    page = content(group_runs([read_run(run), read_run(other)]), title="x")
    (problem,) = page["problems"]
    assert re.search(r"step-000000\.jsonl: line 9 is no completion of an evaluation \(", problem)
    assert [each["rows"] for each in page["samples"]["runs"]] == [0, 8]


def test_ids_of_trackers_are_no_paths(tmp_path: Path) -> None:
    for known in ('{"wandb": "../../x"}', '{"wandb": 3}', "[]"):
        (tmp_path / "trackers.json").write_text(known)
        with pytest.raises(ValueError, match=r"trackers\.json: accepted are ids by tracker"):
            remembered_id(tmp_path, "wandb", lambda: "new")


def test_a_generation_of_another_population_is_not_replayed() -> None:
    sampling = Sampling(max_tokens=4, samples=1, temperature=1.0)
    method = EvolutionStrategies(EsMethodConfig(population=4, sigma=0.1), chunk=2, sampling=sampling)
    record = {"step": 0, "sigma": 0.1, "rewards": [[1.0], [0.0], [0.5], [0.2]]}

    def noise(generation: int, pairs: Any, weights: Any) -> Any:
        return np.zeros(3, np.float32)

    assert method.replay(record, noise) is not None
    for change in ({"rewards": [[1.0]] * 3}, {"rewards": []}, {"sigma": None}, {"absent": [0, 1]}, {"absent": [7]}):
        with pytest.raises(ValueError, match="ledger: step 0 is no generation of 4 members"):
            method.replay({**record, **change}, noise)


def test_only_what_generates_runs_the_code_that_a_config_names(random_llama: Path, tmp_path: Path) -> None:
    """Whoever resumes another's run runs its verifier; to look at it, to replay it and to export it does not."""
    verifier, ran = tmp_path / "verifier.py", tmp_path / "ran"
    verifier.write_text("def verify(rollout):\n    return len(rollout.completion)\n")
    method = {"kind": "es", "population": 4, "sigma": 0.3, "prompts": 2}
    axes = {
        "task": {"max_tokens": 2, "verifier": f"{verifier}:verify"},
        "engine": {"chunk": 2},
        "budget": {"generations": 2},
    }
    config = small_config(random_llama, method, **axes)
    quiet = TelemetryConfig(console=False, tensorboard=False)
    run = train_here(config.model_copy(update={"telemetry": quiet}), tmp_path / "run")
    verifier.write_text(f"open({str(ran)!r}, 'w')\n{verifier.read_text()}")
    for arguments in (
        ["status", run],
        ["report", run, "--no-png"],
        ["replay", run, "--step", 1],
        ["diff", run, run],
        ["export", run, "--out", tmp_path / "adapter"],
        ["export", run, "--merged", "--out", tmp_path / "merged"],
    ):
        code, output = command(*arguments)
        assert code == 0, output
    assert not ran.exists()
    resume_here(run)
    assert ran.exists()
    change_ledger(run, '"step":1,', '"step":7,')
    with pytest.raises(ValueError, match=r"a generation of step 7 where one of step 1 should be"):
        replay(run, 1)


def change_ledger(run: Path, before: str, after: str) -> None:
    path = run / "ledger.jsonl"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


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
        parse_config({**data, "pool": {"address": "ray://me:hush@head:10001"}})


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
