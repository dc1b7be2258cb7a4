"""What watches runs: the lock, `status` and `runs`, and Prometheus with the files under deploy/."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import refusal
from report_runs import config_of
from run_folders import write_run
from small_runs import small_config, train_here
from typer.testing import CliRunner

from es_engine import cli
from es_engine.ledger import LedgerReader
from es_engine.run_lock import holder, locked
from es_engine.status import read_status
from es_engine.telemetry.metrics import METRICS, PREFIX
from es_engine.telemetry.prometheus import PrometheusTelemetry

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
NAMES = {metric.full_name for metric in METRICS}

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="needs prometheus and promtool (Debian: apt-get install prometheus)",
)


def finished_run(path: Path) -> Path:
    """Four steps of ten, 2 s each, with evaluations at 0, 2 and 4."""
    return write_run(path, config_of(path.name, "es", seed=0), accuracy=np.array([[0.0, 0.5], [0.5, 0.5], [1.0, 0.5]]))


# --- the lock


def test_a_killed_process_lets_go_of_its_run(tmp_path: Path) -> None:
    program = "import sys, time, pathlib, es_engine.run_lock as lock\nwith lock.locked(pathlib.Path(sys.argv[1])):\n"
    command = [sys.executable, "-c", program + "    print('held', flush=True)\n    time.sleep(60)", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        named = rf"process {process.pid} on {socket.gethostname()} since 20\d\d-\S+"
        assert re.fullmatch(named, holder(tmp_path) or "")
        with pytest.raises(ValueError, match=rf"^{tmp_path}: {named} is at work in this folder"), locked(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
    assert holder(tmp_path) is None
    with locked(tmp_path):
        assert f"process {process.pid}" not in (holder(tmp_path) or "")


def test_a_file_system_without_locks_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refused)
    with pytest.raises(ValueError, match=r"\.lock: the file system has no locks \(.*\); mount it"), locked(tmp_path):
        pass


def test_a_run_that_is_trained_is_neither_resumed_nor_touched(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    with (run / "ledger.jsonl").open("a") as file:
        file.write('{"kind": "generation", "being')
    before = (run / "ledger.jsonl").read_bytes()
    with locked(run):
        assert "is at work in this folder; wait for its end, or stop it" in refusal("resume", run)
    assert (run / "ledger.jsonl").read_bytes() == before


# --- status


def test_status_tells_running_stopped_finished_and_unreadable_runs_apart(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "runs/a")
    done = read_status(run)
    assert (done.state, done.step, done.process, done.eta_seconds) == ("finished", 4, None, None)
    assert (done.training_reward, done.reward, done.accuracy, done.stage) == (0.475, 0.75, 0.75, "es")
    (run / "adapter").rmdir()
    (run / "log.jsonl").write_text('{"level": "info", "starts": true, "message": "begun"}\n')
    with (run / "log.jsonl").open("a") as log:
        log.write('{"level": "error", "message": "No space left"}\n')
    with (run / "ledger.jsonl").open("a") as ledger:
        ledger.write('{"kind": "generation", "being')
    damaged = finished_run(tmp_path / "runs/b")
    (damaged / "ledger.jsonl").write_text("{\n{}\n")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    stopped = read_status(run)
    assert (stopped.state, stopped.error, stopped.eta_seconds) == ("stopped", "No space left", None)
    unreadable = read_status(damaged)
    assert unreadable.state == "unreadable"
    assert "line 1 is damaged" in (unreadable.error or "")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files, "only read"
    with locked(run):
        running = read_status(run)
        table = CliRunner().invoke(cli.app, ["runs", str(tmp_path)], env={"COLUMNS": "80"}).output
    assert running.state == "running"
    assert running.eta_seconds == pytest.approx(6 * 2.0)
    first, second = table.splitlines()[1:]
    assert re.search(r"runs/a +running +4/10 +es +0\.475 +0\.750 +0\.750 +0:00:12 +No space left", first)
    assert re.search(r"runs/b +unreadable", second)


def test_status_of_no_run_is_refused(tmp_path: Path) -> None:
    assert "not a run folder" in refusal("status", tmp_path)
    assert "neither a run folder nor a folder of them" in refusal("runs", tmp_path)


# --- names


def test_the_page_has_the_table_of_metrics() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    rows = [
        f"| `{each.full_name}` | {each.kind} | {', '.join(f'`{label}`' for label in each.labels)} | {each.meaning} |"
        for each in METRICS
    ]
    assert re.findall(rf"^\| `{PREFIX}.*$", page, re.MULTILINE) == rows


def test_dashboard_and_alerts_use_the_metrics_by_their_names_and_labels() -> None:
    dashboard = json.loads((DEPLOY / "grafana/dashboards/es-engine.json").read_text())
    drawn = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert names_in(" ".join(drawn)) == NAMES, "every metric is drawn, and no other"
    alerts = (DEPLOY / "prometheus/alerts.yml").read_text()
    assert names_in(alerts) <= NAMES
    labels = {metric.full_name: {*metric.labels, "instance", "job"} for metric in METRICS}
    for name, matchers in re.findall(rf"({PREFIX}\w+)\{{([^}}]*)\}}", " ".join(drawn) + alerts):
        assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= labels[name], name
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            (first, *_) = names_in(target["expr"])
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels[first] | {"run"}, panel["title"]


def names_in(text: str) -> set[str]:
    return set(re.findall(rf"\b{PREFIX}\w+", text))


# --- the real Prometheus


@needs_prometheus
@pytest.mark.parametrize(
    "command", ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"]
)
def test_promtool_passes(command: str) -> None:
    folder = DEPLOY / "prometheus"
    done = subprocess.run(["promtool", *command.split()], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Prometheus with the deployed files, five times a second; the ports of a run to scrape and of its own."""
    target, own = free_port(), free_port()
    shutil.copytree(DEPLOY / "prometheus", tmp_path / "prometheus")
    config = tmp_path / "prometheus/prometheus.yml"
    text = config.read_text()
    assert "127.0.0.1:9108" in text
    config.write_text(text.replace("127.0.0.1:9108", f"127.0.0.1:{target}").replace("15s", "200ms"))
    address = f"--web.listen-address=127.0.0.1:{own}"
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/data", address]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: ask(own, "query", query="1"))
            yield target, own
        finally:
            process.terminate()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ask(port: int, what: str, **query: str) -> Any:
    """Prometheus' answer; None if there is nobody to answer yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{what}?{urllib.parse.urlencode(query)}") as answer:
            return json.load(answer)["data"]
    except OSError:
        return None


def until(seen: Any, seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := seen()):
        assert time.monotonic() < deadline, "Prometheus did not come to it"
        time.sleep(0.1)
    return found


@needs_prometheus
def test_prometheus_scrapes_a_run_as_its_ledger_has_it(
    prometheus: tuple[int, int], random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, server = prometheus

    def course(query: str) -> dict[float, float]:
        """Values by the times of their scrapes."""
        series = ask(server, "query", query=f"{query}[5m]")["result"]
        return {at: float(value) for at, value in series[0]["values"]} if series else {}

    def close_when_seen(telemetry: PrometheusTelemetry, error: BaseException | None = None) -> None:
        until(lambda: 3.0 in course("es_engine_generation").values())
        close(telemetry, error)

    close = PrometheusTelemetry.close
    monkeypatch.setattr(PrometheusTelemetry, "close", close_when_seen)
    method = {"kind": "grpo", "prompts": 4, "samples": 2}
    telemetry = {"prometheus_port": port, "console": False, "tensorboard": False}
    config = small_config(random_llama, method, budget={"generations": 3})
    config = config.model_copy(update={"telemetry": config.telemetry.model_copy(update=telemetry)})
    run = train_here(config, tmp_path / "scraped")

    lines = [line for line in LedgerReader(run / "ledger.jsonl").new_lines() if line["kind"] == "generation"]
    steps = course("es_engine_generation")
    for query, key in (('es_engine_reward{split="train"}', "reward_mean"), ("es_engine_learning_rate", "lr")):
        scraped = course(query)
        assert scraped.keys() == steps.keys()
        assert all(scraped[at] == lines[int(step) - 1][key] for at, step in steps.items())
    tokens = course('es_engine_tokens_total{split="train",kind="generated"}')
    assert max(tokens.values()) == sum(line["tokens"] for line in lines)
    assert max(course('es_engine_run_info{run="scraped"}').values()) == 1
    assert max(course("es_engine_kl{figure='approx_kl'}").values()) >= 0
    found = {name for name in ask(server, "label/__name__/values") if name.startswith(PREFIX)}
    assert found <= NAMES
    (group,) = ask(server, "rules")["groups"]
    assert "EsEngineNoProgress" in {rule["name"] for rule in group["rules"]}
