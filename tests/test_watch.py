"""The live view on loopback: what it serves, to whom, and that it follows the runs."""

from __future__ import annotations

import errno
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_runs import write_run

from es_engine.report import RunData, watch
from es_engine.report.watch import WatchServer


def has_ipv6_loopback() -> bool:
    """Not every container has one."""
    with socket.socket(socket.AF_INET6) as probe:
        return probe.connect_ex(("::1", 1)) == errno.ECONNREFUSED


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WatchServer]:
    """A server of a folder that is not there yet, which looks at it whenever it is asked."""
    monkeypatch.setattr(watch, "SHARE_OF_TIME", float("inf"))
    with WatchServer([tmp_path / "runs"]) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: WatchServer, path: str, method: str = "GET", **headers: str) -> tuple[int, str, str | None]:
    """Status, body and tag of an answer."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers["ETag"]


def test_the_data_follow_the_runs_and_are_sent_when_they_have_changed(server: WatchServer, tmp_path: Path) -> None:
    status, body, tag = ask(server, "/data.json")
    assert (status, json.loads(body)["groups"]) == (200, [])
    assert tag is not None
    assert ask(server, "/data.json", **{"If-None-Match": tag}) == (304, "", tag)
    write_run(tmp_path / "runs/es", steps=3)
    status, body, new = ask(server, "/data.json", **{"If-None-Match": tag})
    (group,) = json.loads(body)["groups"]
    assert (status, group["label"], group["runs"]) == (200, "es", ["es"])
    assert new != tag


def test_a_damaged_run_is_named_and_hides_no_other(server: WatchServer, tmp_path: Path) -> None:
    write_run(tmp_path / "runs/es")
    ledger = write_run(tmp_path / "runs/grpo", "grpo") / "ledger.jsonl"
    ledger.write_bytes(b"rubbish\n" + ledger.read_bytes())
    data = json.loads(ask(server, "/data.json")[1])
    assert [group["label"] for group in data["groups"]] == ["es"]
    assert ["line 1 is damaged" in problem for problem in data["problems"]] == [True]


def test_a_run_that_may_not_be_read_is_named_and_hides_no_other(
    server: WatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests may be run by root, who may read all of them."""
    write_run(tmp_path / "runs/es")
    write_run(tmp_path / "runs/closed")

    class Reader(watch.RunReader):
        def read(self) -> RunData:
            if self.folder.path.name == "closed":
                raise PermissionError("closed may not be read")
            return super().read()

    monkeypatch.setattr(watch, "RunReader", Reader)
    data = json.loads(ask(server, "/data.json")[1])
    assert [group["label"] for group in data["groups"]] == ["es"]
    assert data["problems"] == ["closed may not be read"]


def test_a_run_that_was_begun_anew_is_read_anew(server: WatchServer, tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs/es", steps=6)
    assert json.loads(ask(server, "/data.json")[1])["summary"]["rows"][0][3] == 6
    run.rename(tmp_path / "old")
    write_run(run, steps=2)
    assert json.loads(ask(server, "/data.json")[1])["summary"]["rows"][0][3] == 2


def test_the_page_may_ask_its_own_server_alone_and_nothing_else_is_served(server: WatchServer) -> None:
    status, body, _ = ask(server, "/")
    assert status == 200
    assert "connect-src &#39;self&#39;" in body
    assert ask(server, "/", "HEAD")[:2] == (200, "")
    assert ask(server, "/../config.yaml")[0] == 404
    assert ask(server, "/", "POST")[0] == 501


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("[::1]:9", 200),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("[evil", 403),
        ("", 403),
    ],
)
def test_a_name_of_somebody_else_is_refused(server: WatchServer, host: str, status: int) -> None:
    assert ask(server, "/data.json", Host=host)[0] == status


@pytest.mark.skipif(not has_ipv6_loopback(), reason="this machine has no ::1")
def test_an_ipv6_address_is_one_to_serve_at(tmp_path: Path) -> None:
    with WatchServer([tmp_path], host="::1") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with urllib.request.urlopen(f"{server.url}data.json", timeout=20) as answer:
            assert json.loads(answer.read())["groups"] == []
        server.shutdown()


def test_an_address_that_is_taken_is_one_sentence(server: WatchServer) -> None:
    port = server.server_address[1]
    with pytest.raises(ValueError, match=rf"127\.0\.0\.1:{port} cannot be listened to: Address already in use"):
        WatchServer([], port=port)


def test_ctrl_c_ends_the_command_cleanly(tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("es-engine"), "watch", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("watching at http://127.0.0.1:")
        os.kill(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (0, "stopped watching; the runs go on\n", "")
