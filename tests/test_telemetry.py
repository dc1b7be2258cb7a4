"""What the console, TensorBoard and Prometheus show of a run."""

from __future__ import annotations

import io
import math
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from es_engine.config.telemetry import TelemetryConfig
from es_engine.telemetry import open_telemetry
from es_engine.telemetry.base import Broadcast, EvaluationLine, GenerationLine, numbers
from es_engine.telemetry.console import LineTelemetry, LiveTelemetry, console_telemetry, sparkline
from es_engine.telemetry.prometheus import PrometheusTelemetry
from es_engine.telemetry.tensorboard import TensorBoardTelemetry

EVALUATION: dict[str, Any] = {
    **EvaluationLine(
        step=10,
        reward=0.39,
        reward_ci95=[0.35, 0.43],
        accuracy=0.21875,
        accuracy_ci95=None,
        pass_at_k={"1": 0.21875, "4": 0.5},
        failures={"mine": {"timeout": 0, "exception": 2}},
    ),
    "theta": "a fingerprint",
    "components": {"format": 1.0},
}
NOTHING_SCORED = {
    **dict.fromkeys(("reward_mean", "reward_best", "fitness_spread", "accuracy")),
    "components": {"exact": None},
}


def generation(step: int = 2, **changes: Any) -> dict[str, Any]:
    line = GenerationLine(
        step=step,
        generations=100,
        reward_mean=0.3125,
        reward_best=0.5,
        fitness_spread=0.0412,
        accuracy=0.185,
        components={"exact": 0.2, "format": 0.1125},
        rollouts=256,
        tokens=12000,
        spent={"generated": 36_000, "processed": 140_000, "flops": 2.5e12, "worker_seconds": 57.0},
        seconds=10.0,
        seconds_rollouts=9.3,
        seconds_update=0.2,
        sigma=0.03,
        lr=0.5,
        learning={},
        theta_rms=0.011,
        constant_members=1,
        failures={"mine.py:right": {"timeout": 3, "exception": 0}, "length": {"no score": 1}},
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


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples if not sample.name.endswith("_created")]
    return {
        "/".join([sample.name.removeprefix("es_engine_"), *sample.labels.values()]): sample.value for sample in samples
    }


def test_prometheus_is_scraped_and_lets_go_of_its_port() -> None:
    metrics = PrometheusTelemetry(0)
    metrics.generation(generation(0, worker_restarts=1))
    metrics.generation(generation(1, reward_mean=0.5, worker_restarts=2, accuracy=None))
    metrics.evaluation(EVALUATION)
    found = scrape(metrics.port)
    metrics.close()
    assert found["step"] == 2
    assert found["reward_mean"] == 0.5
    assert math.isnan(found["accuracy"])
    assert (found["rollouts_total"], found["tokens_total"]) == (512, 24000)
    assert found["verifier_failures_total/timeout/mine.py:right"] == 6
    assert found["verifier_failures_total/exception/mine.py:right"] == 0
    assert found["verifier_failures_total/no score/length"] == 2
    assert found["worker_restarts_total"] == 2
    assert found["spent/flops"] == 2.5e12
    assert found["reward_component/exact"] == 0.2
    assert found["evaluation/accuracy"] == 0.21875
    again = PrometheusTelemetry(metrics.port)
    again.close()


def test_prometheus_listens_on_loopback_only() -> None:
    metrics = PrometheusTelemetry(0)
    assert metrics._server.server_address[0] == "127.0.0.1"
    metrics.close()


def test_prometheus_port_in_use_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^telemetry.prometheus_port: port {port} is in use on 127.0.0.1; "):
            PrometheusTelemetry(port)


def test_open_telemetry_opens_what_the_config_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    telemetry = open_telemetry(TelemetryConfig(prometheus_port=port), tmp_path, first_step=0)
    telemetry.generation(generation(0))
    found = scrape(port)
    telemetry.close()
    assert found["step"] == 1
    assert scalars(tmp_path / "tb")["reward/best"] == [(1, 0.5)]
    told, figures = capsys.readouterr().out.splitlines()
    assert told == f"Prometheus metrics: http://127.0.0.1:{port}/metrics"
    assert figures.startswith("generation 1/100: reward 0.3125")


def test_open_telemetry_with_all_off_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = open_telemetry(TelemetryConfig(console=False, tensorboard=False), tmp_path, first_step=0)
    telemetry.generation(generation(0))
    telemetry.message("unheard")
    telemetry.close()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
