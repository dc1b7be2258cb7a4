"""Runs sent as jobs: what travels, what is refused, the log, and the end."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
from command_line import refusal
from job_server import JobServer

from es_engine import cli, submit
from es_engine.config import Config, load_config
from es_engine.config.yaml_text import parse

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs/countdown_tiny.yaml"
FIGURES = {"step": 3, "reward": 0.5, "accuracy": 0.25, "accuracy_ci95": [0.1, 0.4]}
SUMMARY = {"run": "runs/tiny", "steps": 3, "before": FIGURES, "after": FIGURES}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was, whatever address the command leaves in it."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setattr(submit, "TICK_S", 0.01)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """One that names two files of the same name, one of them twice, and a folder."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rewards.py").write_text(f"# {name}\n")
    (tmp_path / "start").mkdir()
    (tmp_path / "start/adapter_config.json").write_text("{}")
    (tmp_path / "start/.gitignore").write_text("*\n")
    first, second = tmp_path / "a/rewards.py", tmp_path / "b/rewards.py"
    verifiers = {"one": f"{first}:f", "two": f"trl:{second}:g", "three": f"{first}:h"}
    parts = json.dumps({name: {"verifier": verifier} for name, verifier in verifiers.items()})
    return load_config(TINY, [f"task.reward={parts}", f"space.init={tmp_path}/start", "space.units=raw"])


def test_files_travel_and_are_found_again_wherever_they_land(config: Config, tmp_path: Path) -> None:
    with JobServer(log=[]).running() as server:
        submit.submit(config, server.url)
    assert server.jobs[0]["entrypoint"] == "es-engine train config.yaml --run-dir ~/runs/countdown_tiny --summary"
    there = tmp_path / "there"
    for name, text in server.files.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text(text)
    arrived = load_config(there / "config.yaml")
    assert arrived.pool.address == "auto"
    assert arrived.model_copy(update={"pool": config.pool, "space": config.space, "task": config.task}) == config
    assert sorted(path.name for path in Path(arrived.space.init or "").iterdir()) == ["adapter_config.json"]
    verifiers = [part.verifier for part in (arrived.task.reward or {}).values()]
    assert [name.rpartition(":")[2] for name in verifiers] == ["f", "g", "h"]
    assert verifiers[1].startswith(f"trl:{there}")
    files = [name.removeprefix("trl:").rpartition(":")[0] for name in verifiers]
    assert [Path(file).read_text() for file in files] == ["# a\n", "# b\n", "# a\n"]
    assert files[0] == files[2]


def test_files_of_the_cluster_stay_where_they_are(config: Config, tmp_path: Path) -> None:
    """Here a folder, and one with a file of the config in it."""
    (tmp_path / "job").mkdir()
    submit.pack(config, tmp_path / "job", [f"{tmp_path}/start", f"{tmp_path}/b"])
    tree = parse((tmp_path / "job/config.yaml").read_text(), "config.yaml")
    assert tree["space"]["init"] == f"{tmp_path}/start"
    assert tree["task"]["reward"]["two"]["verifier"] == f"trl:{tmp_path}/b/rewards.py:g"
    assert [path.name for path in (tmp_path / "job").rglob("*.*")] == ["config.yaml", "rewards.py"]


def test_what_cannot_travel_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = ["--address", "http://127.0.0.1:9"]
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(bytes(5000))
    monkeypatch.setattr(submit, "MOST_BYTES", 5000)
    large = refusal("submit", TINY, *at, "--set", f"model={{kind: pretrained, source: {model}}}")
    assert large.startswith(f"{model}: 0.00 GiB")
    assert large.endswith(f"add --on-cluster {model}, or name a model by its hub id")
    missing = refusal("submit", TINY, *at, "--set", "task.verifier=/no/such.py:f")
    assert missing == "/no/such.py: not on this machine; if every node has it there, add --on-cluster /no/such.py"


def test_bad_addresses_and_folders_are_refused_in_a_sentence() -> None:
    assert "accepted is the URL of a job server" in refusal("submit", TINY, "--address", "head:6379")
    assert "no Ray job server answers" in refusal("submit", TINY, "--address", "http://127.0.0.1:9")
    relative = refusal("submit", TINY, "--address", "http://127.0.0.1:9", "--run-dir", "runs/x")
    assert relative == "--run-dir: got runs/x, accepted is an absolute path on the cluster's head"
    with JobServer(log=[], token="secret").running() as server:
        assert "asks for the cluster's token" in refusal("submit", TINY, "--address", server.url)


def submitted(server: JobServer, *options: str) -> tuple[int | None, list[str]]:
    """The exit code of the command, and the lines it prints."""
    output = io.StringIO()
    arguments = ["es-engine", "submit", str(TINY), "--address", server.url, *options]
    with (
        patch("sys.argv", arguments),
        patch("signal.signal"),
        redirect_stdout(output),
        pytest.raises(SystemExit) as end,
    ):
        cli.main()
    return end.value.code, output.getvalue().splitlines()  # type: ignore[return-value]


def test_the_log_is_followed_once_though_connections_break_and_the_end_is_shown() -> None:
    log = ["generation 1\ngener", "ation 2\n", submit.summary_line(SUMMARY) + "\n"]
    with JobServer(log=log, drops=2).running() as server:
        code, lines = submitted(server)
    assert code == 0
    broken = [line for line in lines if line.startswith("es-engine: the log broke off (")]
    assert len(broken) == 2
    assert [line for line in lines if line not in broken][:3] == ["job: raysubmit_1", "generation 1", "generation 2"]
    assert lines[-3] == "run: runs/tiny"
    assert ["before", "0.500", "0.250", "0.100", "to", "0.400"] in [line.split() for line in lines]


def test_the_last_words_of_a_driver_that_was_killed_are_shown() -> None:
    log = ["generation 1\ngenerat", "ion 2: rew"]
    with JobServer(log=log, status="FAILED", exit_code=137, drops=1).running() as server:
        code, lines = submitted(server)
    assert code == 137
    assert [line for line in lines if "generation" in line] == ["generation 1", "generation 2: rew"]


def test_the_command_ends_as_the_job_does(capsys: pytest.CaptureFixture[str]) -> None:
    with JobServer(log=["es-engine: task.data: not there\n"], status="FAILED", exit_code=3).running() as server:
        assert submitted(server)[0] == 3
    assert "job raysubmit_1 ended with exit code 3\n" in capsys.readouterr().err
    with JobServer(log=[], status="STOPPED", exit_code=None, message="by hand").running() as server:
        assert submitted(server)[0] == 1
    assert "ended with exit code 1 (by hand)" in capsys.readouterr().err


def test_a_job_need_not_be_waited_for() -> None:
    with JobServer(log=["a line\n"]).running() as server:
        assert submitted(server, "--no-wait") == (0, ["job: raysubmit_1"])


def test_a_server_that_is_gone_is_not_waited_for_for_ever(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with JobServer(log=[]).running() as server:
        job = submit.submit(config, server.url)
    monkeypatch.setattr(submit, "PATIENCE_S", 0.1)
    with pytest.raises(ValueError, match=r"has not answered for 0 s .* job raysubmit_1 may go on"):
        job.follow(print)


@pytest.mark.parametrize(("cause", "code"), [(cli._Interrupted(), 130), (OSError(), None)])
def test_a_job_that_is_stopped_while_ray_waits_ends_in_a_sentence(
    cause: BaseException, code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waiting() -> None:
        raise SystemError("returned a result with an exception set") from cause  # as Ray does of a signal's exception

    monkeypatch.setattr(cli, "app", waiting)
    with patch("signal.signal"), pytest.raises(SystemError if code is None else SystemExit) as end:
        cli.main()
    assert getattr(end.value, "code", None) == code
