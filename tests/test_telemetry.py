"""What the console, the log, TensorBoard and Prometheus are told of a run."""

from __future__ import annotations

import io
import json
import math
import socket
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from figures import ALONE, EVALUATION, MadeUpWorkers, generation, opened
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from small_runs import small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from es_engine.run_folder import RunFolder
from es_engine.telemetry.base import Broadcast, numbers
from es_engine.telemetry.console import LineTelemetry, LiveTelemetry, console_telemetry, sparkline
from es_engine.telemetry.log import last_error
from es_engine.telemetry.metrics import METRICS
from es_engine.telemetry.prometheus import PrometheusTelemetry
from es_engine.telemetry.tensorboard import TensorBoardTelemetry
from es_engine.text import duration
from es_engine.trainer import train
from workers.calls import Call, Notice

NOTHING_SCORED = {
    **dict.fromkeys(("reward_mean", "reward_best", "fitness_spread", "accuracy")),
    "components": {"exact": None},
}


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
    time.sleep(1)  # files are named by seconds, and those of one second by a number that is not sorted as one
    resumed = TensorBoardTelemetry(tmp_path, first_step=2)
    resumed.generation(generation(2, reward_mean=0.75))
    resumed.close()
    found = scalars(tmp_path)
    assert found["reward/mean"] == [(1, 0.25), (2, 0.25), (3, 0.75)]
    assert found["evaluation/reward"] == [(2, 0.25)]


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
    metrics.generation(generation(0, learning={"loss": 0.1, "approx_kl": 0.02}, components={"a stage's before": 1.0}))
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
    assert "reward_component/a stage's before/train" not in found
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


def test_a_place_that_cannot_be_had_is_refused_before_a_run_begins(tmp_path: Path) -> None:
    """A run folder would name it, and `resume` change nothing."""
    config = small_config(tmp_path, {"kind": "sft", "batch": 4})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wanted = config.telemetry.model_copy(update={"prometheus_port": taken.getsockname()[1]})
        with pytest.raises(ValueError, match=r"^telemetry.prometheus_port: port \d+ on 127.0.0.1 is in use; "):
            train(config.model_copy(update={"telemetry": wanted}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_time_that_is_far_too_long_is_told_all_the_same() -> None:
    """Of a budget that was to be none, such as 1e30 FLOPs."""
    assert duration(93_784.4) == "1 day, 2:03:04"
    assert duration(1e19) == duration(1e10)


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
