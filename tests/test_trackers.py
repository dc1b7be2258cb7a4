"""What W&B and MLflow are told of a run."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from figures import ALONE, EVALUATION, config_with, generation, opened
from hypothesis import given
from hypothesis import strategies as st

from es_engine.run_folder import refuse_ways_out
from es_engine.telemetry.mlflow import metric_name


def test_wandb_offline_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    for first_step in (0, 1):
        with opened(tmp_path, **ALONE | {"wandb": {"project": "trials"}}) as telemetry:
            refuse_ways_out(tmp_path)  # or nobody could watch the run
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
    refuse_ways_out(tmp_path)


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
