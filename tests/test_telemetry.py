"""What the console, the log, TensorBoard, Prometheus, W&B and MLflow are told of a run."""

from __future__ import annotations

import io
import json
import math
import socket
import struct
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from es_engine.config import Config, parse_config
from es_engine.run_folder import RunFolder
from es_engine.telemetry import open_telemetry
from es_engine.telemetry.base import Broadcast, EvaluationLine, GenerationLine, numbers
from es_engine.telemetry.console import LineTelemetry, LiveTelemetry, console_telemetry, sparkline
from es_engine.telemetry.log import last_error
from es_engine.telemetry.metrics import METRICS
from es_engine.telemetry.mlflow import metric_name
from es_engine.telemetry.prometheus import PrometheusTelemetry
from es_engine.telemetry.tensorboard import TensorBoardTelemetry
from workers.calls import Call, Notice
from workers.canary import CanaryReport

EVALUATION: dict[str, Any] = {
    **EvaluationLine(
        step=10,
        reward=0.39,
        reward_ci95=[0.35, 0.43],
        accuracy=0.21875,
        accuracy_ci95=None,
        pass_at_k={"1": 0.21875, "4": 0.5},
        components={"format": 1.0},
        problems=16,
        samples=4,
        tokens=900,
        prompt_tokens=160,
        seconds=2.5,
        times={"generate": 2.0, "score": 0.25},
        failures={"mine": {"timeout": 0, "exception": 2}},
        rescored=0,
    ),
    "theta": "a fingerprint",
}
NOTHING_SCORED = {
    **dict.fromkeys(("reward_mean", "reward_best", "fitness_spread", "accuracy")),
    "components": {"exact": None},
}


def generation(step: int = 2, **changes: Any) -> dict[str, Any]:
    line = GenerationLine(
        step=step,
        stage=1,
        generations=100,
        reward_mean=0.3125,
        reward_best=0.5,
        fitness_spread=0.0412,
        accuracy=0.185,
        components={"exact": 0.2, "format": 0.1125},
        rollouts=256,
        tokens=12000,
        prompt_tokens=5120,
        spent={"generated": 36_000, "processed": 140_000, "flops": 2.5e12, "worker_seconds": 57.0},
        seconds=10.0,
        seconds_rollouts=9.3,
        seconds_update=0.2,
        times={"generate": 17.5, "score": 0.75},
        sigma=0.03,
        lr=0.5,
        learning={},
        theta_rms=0.011,
        delta_norm=1.5,
        delta_norm_ratio=0.015,
        constant_members=1,
        failures={"mine.py:right": {"timeout": 3, "exception": 0}, "length": {"no score": 1}},
        rescored=1,
        worker_restarts=0,
        eta_seconds=970.2,
    )
    return {**line, **changes}


def test_plain_console_is_one_line_each() -> None:
    out = io.StringIO()
    console = console_telemetry(Console(file=out, width=40))
    assert isinstance(console, LineTelemetry)
    console.message("two [workers] are ready")
    console.generation(generation())
    console.evaluation(EVALUATION)
    console.generation(
        generation(3, generations=None, failures={}, worker_restarts=1, eta_seconds=None, **NOTHING_SCORED)
    )
    console.close()
    assert out.getvalue().splitlines() == [
        "two [workers] are ready",
        "generation 3/100: reward 0.3125, best 0.5000, spread 0.0412, accuracy 0.1850, tokens/s 1200, "
        "rollouts 93% of time, processed 0.14M, TFLOPs 2.50, worker min 0.9, length no score 1, "
        "mine.py:right timeout 3, ETA 0:16:10",
        "evaluation at 10: reward 0.3900 (95% 0.3500 to 0.4300), accuracy 0.2188, pass@4 0.5000, mine exception 2",
        "generation 4: reward none, best none, spread none, accuracy none, tokens/s 1200, rollouts 93% of time, "
        "processed 0.14M, TFLOPs 2.50, worker min 0.9, worker restarts 1",
    ]


def test_live_console_shows_the_last_generation_and_keeps_what_was_told() -> None:
    out = io.StringIO()
    console = console_telemetry(Console(file=out, force_terminal=True, width=120, _environ={"TERM": "xterm"}))
    assert isinstance(console, LiveTelemetry)
    console.message("two [workers] are ready")
    for step in range(3):
        console.generation(generation(step, reward_mean=0.1 * step))
    console.evaluation(EVALUATION)
    console.close()
    text = Console(file=out).render_str(out.getvalue(), markup=False).plain
    for words in ("two [workers] are ready", "1/100", "3/100", "0.2000", "▁▅█", "0:16:10", "evaluation at 10"):
        assert words in text


def test_live_console_bears_a_run_in_which_nothing_is_scored() -> None:
    out = io.StringIO()
    console = LiveTelemetry(Console(file=out, force_terminal=True, width=120))
    console.generation(generation(0, generations=None, **NOTHING_SCORED))
    console.close()
    assert "none" in out.getvalue()


def test_live_console_without_a_generation_closes_quietly() -> None:
    out = io.StringIO()
    LiveTelemetry(Console(file=out, force_terminal=True)).close()
    assert out.getvalue() == ""


def test_sparkline_spans_low_to_high() -> None:
    assert sparkline([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    assert sparkline([5.0, 5.0]) == "▁▁"


def test_numbers_are_flattened_without_step_and_words() -> None:
    line = {
        "step": 1,
        "reward": 0.5,
        "theta": "words",
        "ci95": [0.4, 0.6],
        "components": {"format": 1.0, "exact": None},
    }
    assert dict(numbers(line)) == {"reward": 0.5, "components/format": 1.0}
    assert dict(numbers({"step": 1, "done": True, "missing": None})) == {}


def test_a_line_that_lacks_a_figure_is_refused() -> None:
    line = generation()
    del line["tokens"]
    with pytest.raises(AssertionError, match="lacks tokens"):
        Broadcast([]).generation(line)
    with pytest.raises(AssertionError, match="lacks accuracy, accuracy_ci95, "):
        Broadcast([]).evaluation({"step": 1})


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    board = TensorBoardTelemetry(tmp_path, first_step=0)
    board.evaluation(EVALUATION | {"step": 0})
    board.generation(generation(0))
    board.generation(generation(1, accuracy=None))
    board.generation(generation(2, **NOTHING_SCORED))
    found = scalars(tmp_path)  # before close: every line is flushed
    board.close()
    assert found["reward/mean"] == [(1, 0.3125), (2, 0.3125)]
    assert found["reward/accuracy"] == [(1, pytest.approx(0.185))]
    assert found["throughput/tokens_per_second"] == [(1, 1200.0), (2, 1200.0), (3, 1200.0)]
    assert found["spent/processed"] == [(step, 140_000.0) for step in (1, 2, 3)]
    assert found["components/format"] == [(1, pytest.approx(0.1125)), (2, pytest.approx(0.1125))]
    assert found["failures/mine.py:right/timeout"] == [(1, 3.0), (2, 3.0), (3, 3.0)]
    assert found["evaluation/accuracy"] == [(0, 0.21875)]
    assert found["evaluation/pass_at_k/4"] == [(0, 0.5)]
    assert all(tag.count("/") == 1 for tag in found if not tag.startswith(("evaluation/", "failures/")))


def test_tensorboard_resume_hides_what_is_done_again(tmp_path: Path) -> None:
    killed = TensorBoardTelemetry(tmp_path, first_step=0)
    for step in range(4):
        killed.generation(generation(step, reward_mean=0.25))
    killed.evaluation(EVALUATION | {"step": 2, "reward": 0.25})
    killed.close()
    resumed = TensorBoardTelemetry(tmp_path, first_step=2)
    resumed.generation(generation(2, reward_mean=0.75))
    resumed.close()
    found = scalars(tmp_path)
    assert found["reward/mean"] == [(1, 0.25), (2, 0.25), (3, 0.75)]
    assert found["evaluation/reward"] == [(2, 0.25)]


class MadeUpWorkers:
    """As much of a pool as is told of."""

    restarts = 2
    retries = 3

    def __init__(self) -> None:
        self.canaries = {0: CanaryReport(effect=0.5, zero=0.0, reference=0.01), 1: CanaryReport(0.25, 0.001, None)}

    def states(self) -> dict[str, int]:
        return {"busy": 1, "idle": 2, "starting": 0}


def open_prometheus(folder: Path, port: int = 0, host: str = "127.0.0.1") -> PrometheusTelemetry:
    return PrometheusTelemetry(host, port, RunFolder(folder), MadeUpWorkers())


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    return {
        "/".join([sample.name.removeprefix("es_engine_"), *dict(sorted(sample.labels.items())).values()]): sample.value
        for sample in samples
    }


def test_prometheus_is_scraped_and_lets_go_of_its_port(tmp_path: Path) -> None:
    metrics = open_prometheus(tmp_path)
    metrics.generation(generation(0, learning={"loss": 0.1, "approx_kl": 0.02}))
    metrics.generation(generation(1, reward_mean=0.5, accuracy=None, learning={"reverse_kl": 0.3, "loss": 0.2}))
    metrics.evaluation(EVALUATION)
    (tmp_path / "checkpoints/step-000002").mkdir(parents=True)
    found = scrape(metrics.port)
    metrics.close()
    expected = {
        f"run_info/{tmp_path.name}": 1,
        "generation": 2,
        "stage": 1,
        "eta_seconds": 970.2,
        "reward/train": 0.5,
        "reward/heldout": 0.39,
        "accuracy/heldout": 0.21875,
        "pass_at_k/4": 0.5,
        "reward_component/exact/train": 0.2,
        "reward_component/format/heldout": 1.0,
        "rollouts_total/train": 512,
        "rollouts_total/heldout": 64,
        "tokens_total/generated/train": 24000,
        "tokens_total/prompt/heldout": 160,
        "tokens_per_second": 1200,
        "phase_seconds_total/rollouts": 18.6,
        "phase_seconds_total/other": 1.0,
        "phase_seconds_total/evaluation": 2.5,
        "worker_seconds_total/generate/train": 35,
        "worker_seconds_total/score/heldout": 0.25,
        "workers/idle": 2,
        "worker_restarts_total": 2,
        "retries_total": 3,
        "verifier_failures_total/timeout/train/mine.py:right": 6,
        "verifier_failures_total/exception/train/mine.py:right": 0,
        "verifier_failures_total/no score/train/length": 2,
        "verifier_failures_total/exception/heldout/mine": 2,
        "rollouts_rescored_total/train": 2,
        "kl/reverse_kl": 0.3,
        "learning/loss": 0.2,
        "delta_norm": 1.5,
        "delta_norm_ratio": 0.015,
        "learning_rate": 0.5,
        "spent/flops": 2.5e12,
        "canary/effect": 0.5,
        "canary/zero": 0.001,
        "canary/reference": 0.01,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert math.isnan(found["accuracy/train"])
    assert "kl/approx_kl" not in found
    assert 0 <= found["last_checkpoint_age_seconds"] < 60
    assert 0 < found["disk_free_bytes"] < found["disk_size_bytes"]
    names = {name.split("/")[0] for name in found}
    assert names == {metric.name for metric in METRICS}, "every metric of the table has a value, and there is no other"
    open_prometheus(tmp_path, metrics.port).close()


def test_prometheus_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^telemetry.prometheus_port: port {port} on 127.0.0.1 is in use; "):
            open_prometheus(tmp_path, port)
    with pytest.raises(ValueError, match=r"port 0 on 203.0.113.9 cannot be had: the machine has no such address"):
        open_prometheus(tmp_path, host="203.0.113.9")


def config_with(**telemetry: Any) -> Config:
    return parse_config(
        {
            "name": "told",
            "model": {"source": "none"},
            "optimizer": {"lr": 1.0},
            "task": {},
            "budget": {"generations": 1},
            "telemetry": telemetry,
        }
    )


def opened(folder: Path, first_step: int = 0, **telemetry: Any) -> Broadcast:
    return open_telemetry(config_with(**telemetry), RunFolder(folder), first_step, MadeUpWorkers())


ALONE = {"console": False, "tensorboard": False, "log": False}


def test_open_telemetry_opens_what_the_config_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    telemetry = opened(tmp_path, prometheus_port=port)
    server = telemetry.places[2]
    assert isinstance(server, PrometheusTelemetry)
    assert server._server.server_address[0] == "127.0.0.1", "loopback unless told otherwise"
    telemetry.generation(generation(0))
    found = scrape(port)
    telemetry.close()
    assert found["generation"] == 1
    assert scalars(tmp_path / "tb")["reward/best"] == [(1, 0.5)]
    told, figures = capsys.readouterr().out.splitlines()
    assert told == f"Prometheus metrics: http://127.0.0.1:{port}/metrics"
    assert figures.startswith("generation 1/100: reward 0.3125")


def test_open_telemetry_with_all_off_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = opened(tmp_path, **ALONE)
    telemetry.generation(generation(0))
    telemetry.message("unheard")
    telemetry.close()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


# --- the log


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_log_names_run_generation_chunk_and_worker(tmp_path: Path) -> None:
    call = Call("the noise of chunk 3", "noise_sum", (), chunk=3)
    with opened(tmp_path, **ALONE | {"log": True}) as telemetry:
        telemetry.generation(generation(0))
        telemetry.message(Notice("worker 1 is late", 1, call))
        telemetry.evaluation(EVALUATION)
        telemetry.message('a "quoted"\nline of ½')
    begun, first, notice, evaluation, message, ended = logged(tmp_path)
    assert {line["run"] for line in logged(tmp_path)} == {tmp_path.name}
    assert [line["generation"] for line in logged(tmp_path)] == [0, 1, 1, 1, 1, 1]
    assert datetime.fromisoformat(begun["time"]) <= datetime.fromisoformat(ended["time"]) <= datetime.now(UTC)
    assert first["figures"]["reward_mean"] == 0.3125
    assert first["figures"]["failures/mine.py:right/timeout"] == 3
    assert evaluation["figures"]["accuracy"] == 0.21875
    about = {"worker": 1, "chunk": 3, "call": "the noise of chunk 3"}
    assert {key: notice[key] for key in ("level", "message", *about)} == {
        "level": "warning",
        "message": "worker 1 is late",
        **about,
    }
    assert message["message"] == 'a "quoted"\nline of ½'
    assert (ended["level"], ended["message"]) == ("info", "ended")


def fail(folder: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), opened(folder, 7, **ALONE | {"log": True}):
        raise error


def test_the_log_ends_with_what_ended_the_run_and_outlives_a_kill(tmp_path: Path) -> None:
    fail(tmp_path, ValueError("task: nothing could be scored"))
    assert last_error(tmp_path) == "task: nothing could be scored"
    error = logged(tmp_path)[-1]
    assert (error["level"], error["error"], error["generation"]) == ("error", "ValueError", 7)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"time": "cut off')
    fail(tmp_path, KeyboardInterrupt())
    *_, cut, begun, interrupted = (tmp_path / "log.jsonl").read_text().splitlines()
    assert cut == '{"time": "cut off'
    told = [json.loads(line)["message"] for line in (begun, interrupted)]
    assert told == ["begun after 7 generations", "interrupted"]
    assert last_error(tmp_path) is None, "an interrupt is none, and what was before is past"


# --- trackers


def test_wandb_offline_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    for first_step in (0, 1):
        with opened(tmp_path, **ALONE | {"wandb": {"project": "trials"}}) as telemetry:
            telemetry.generation(generation(first_step, reward_mean=0.25 + first_step))
            telemetry.evaluation(EVALUATION | {"step": first_step + 1})
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    records = [record for file in files for record in wandb_records(file)]
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {(run.project, run.display_name) for run in runs} == {("trials", tmp_path.name)}
    assert {run.run_id for run in runs} == {json.loads((tmp_path / "trackers.json").read_text())["wandb"]}
    deadline = time.monotonic() + 20  # W&B's own process may still be writing
    while len(history := wandb_history(files)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [(line["_step"], line["reward/mean"], line["evaluation/accuracy"]) for line in history] == [
        (1, 0.25, 0.21875),
        (2, 1.25, 0.21875),
    ]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"0123456789" * 4 not in written
    assert b"hf_secret_token" not in written


def wandb_history(files: Sequence[Path]) -> list[dict[str, float]]:
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for file in files
        for record in wandb_records(file)
        if record.WhichOneof("record_type") == "history"
    ]


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of W&B's file: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB; each fragment has a
    checksum of 4 bytes, its length, and whether it is whole, first, middle or last of a record)."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 < len(data):
        if (left := -place % 32768) and left < 7:
            place += left
        length, kind = struct.unpack_from("<HB", data, place + 4)
        if place + 7 + length > len(data):
            return  # still being written
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a store in files, which is all that mlflow-skinny has beside servers."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file://{tmp_path}/store"


def test_mlflow_reads_back_and_goes_on_with_a_resumed_run(tmp_path: Path, mlflow_store: str) -> None:
    from mlflow.tracking import MlflowClient

    wanted = ALONE | {"mlflow": {"tracking_uri": mlflow_store, "experiment": "trials"}}
    with opened(tmp_path, **wanted) as telemetry:
        telemetry.evaluation(EVALUATION | {"step": 0})
        telemetry.generation(generation(0))
    resumed = opened(tmp_path, 1, **wanted)
    resumed.generation(generation(1, reward_mean=0.75))
    resumed.close(OSError("full"))
    client = MlflowClient(tracking_uri=mlflow_store)
    experiment = client.get_experiment_by_name("trials")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (tmp_path.name, "FAILED")
    assert run.data.params["optimizer.lr"] == "1.0"
    course = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "reward/mean")]
    assert sorted(course) == [(1, 0.3125), (2, 0.75)]
    assert run.data.metrics["failures/mine.py_right/timeout"] == 3
    assert run.data.metrics["evaluation/pass_at_k/4"] == 0.5


@given(tag=st.text())
def test_every_tag_becomes_a_name_that_mlflow_accepts(tag: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(metric_name(f"failures/{tag}"))


def test_an_mlflow_that_is_down_costs_no_figure(
    tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    with opened(tmp_path, **ALONE | {"console": True, "mlflow": {"tracking_uri": mlflow_store}}) as telemetry:
        with monkeypatch.context() as patch:

            def refuse(*_: object, **__: object) -> None:
                raise MlflowException("no route")

            patch.setattr(MlflowClient, "log_batch", refuse)
            telemetry.generation(generation(0))
        telemetry.generation(generation(1))
    assert "figures wait for MLflow (no route)" in capsys.readouterr().out
    client = MlflowClient(tracking_uri=mlflow_store)
    (run,) = client.search_runs([client.get_experiment_by_name("es-engine").experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "reward/mean")) == 2


def test_a_tracker_that_is_not_installed_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"^telemetry.wandb: wandb is not installed; use null, or install it with "):
        opened(tmp_path, **ALONE | {"wandb": {}})


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match=r"^telemetry.mlflow.tracking_uri: it holds a name or a password") as refused:
        config_with(mlflow={"tracking_uri": "https://me:hush@example.org"})
    assert "hush" not in str(refused.value)
