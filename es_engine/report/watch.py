"""The live view: the report's page, served while runs go on. It only reads."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from es_engine.report.data import RunData, RunReader, find_runs, group_runs
from es_engine.report.page import content, page
from es_engine.text import name_of

SHARE_OF_TIME = 0.1
"""Most of one core's time that looking at the runs takes."""

HOST = re.compile(r"\[?([^\[\]]+?)\]?(?::\d+)?")
"""A name or an address, an IPv6 one in brackets, and a port."""


class LiveRuns:
    """The runs in some folders as they are now; may be asked by several threads."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Folders may be empty, or not be there yet."""
        self._paths = paths
        self._readers: dict[Path, RunReader] = {}
        self._lock = threading.Lock()
        self._json, self._page, self._tag = "", "", ""
        self._due = 0.0

    def json(self) -> tuple[str, str]:
        """The page's content, and a tag that is another where the content is."""
        with self._lock:
            self._refresh()
            return self._json, self._tag

    def page(self) -> str:
        """The page with the content in it."""
        with self._lock:
            self._refresh()
            return page(json.loads(self._json), live=True)

    def _refresh(self) -> None:
        if time.monotonic() < self._due:
            return
        started = time.monotonic()
        runs, problems = self._read()
        title = "Live: " + ", ".join(map(name_of, self._paths))
        self._json = json.dumps(content(group_runs(runs), title=title, problems=problems), allow_nan=False)
        self._tag = f'"{hashlib.sha256(self._json.encode()).hexdigest()}"'
        ended = time.monotonic()
        self._due = ended + (ended - started) / SHARE_OF_TIME

    def _read(self) -> tuple[list[RunData], list[str]]:
        """The runs that can be read, and sentences about the others: one that is damaged does not hide the rest."""
        runs, problems = [], []
        for path in find_runs(self._paths):
            try:
                runs.append(self._reader(path).read())
            except (ValueError, OSError) as error:
                problems.append(str(error))
                self._readers.pop(path, None)
        return runs, problems

    def _reader(self, path: Path) -> RunReader:
        reader = self._readers.get(path)
        if reader is None or reader.outdated:
            reader = self._readers[path] = RunReader(path)
        return reader


class WatchServer(ThreadingHTTPServer):
    """Serves the live view of some folders; `url` is where."""

    daemon_threads = True

    def __init__(self, paths: Sequence[Path], host: str = "127.0.0.1", port: int = 0) -> None:
        """Port 0 is any free one. Raises ValueError for an address that cannot be had."""
        self.runs = LiveRuns(paths)
        self.host = host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ValueError(f"--host, --port: {host}:{port} cannot be listened to: {error.strerror}") from error
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.server_address[1]}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """A page that is closed while it is sent is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    def is_own_name(self, host: str) -> bool:
        """Is this what a browser may call the server by? A name of somebody else's that leads here is not, so that no
        page of theirs reads the runs (DNS rebinding); an address cannot be such a name."""
        name = HOST.fullmatch(host)
        return name is not None and (name[1].lower() in ("localhost", self.host.lower()) or _is_address(name[1]))


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer

    def do_GET(self) -> None:
        if not self.server.is_own_name(self.headers.get("Host", "")):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "This server is not called by that name.\n")
        elif self.path == "/":
            self._send(HTTPStatus.OK, "text/html", self.server.runs.page())
        elif self.path == "/data.json":
            text, tag = self.server.runs.json()
            if self.headers.get("If-None-Match") == tag:
                self._send(HTTPStatus.NOT_MODIFIED, "application/json", "", tag)
            else:
                self._send(HTTPStatus.OK, "application/json", text, tag)
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "There is only / and /data.json.\n")

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        """A line for each poll would hide everything else."""

    def _send(self, status: HTTPStatus, kind: str, text: str, tag: str | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if tag is not None:
            self.send_header("ETag", tag)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
