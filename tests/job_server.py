"""A stand-in for the job server of a Ray cluster, which needs packages that the tests do without: it speaks its HTTP,
keeps what it is sent, and tells the log and the end that a test gives it."""

from __future__ import annotations

import asyncio
import io
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from aiohttp import web


@dataclass
class JobServer:
    """Jobs end at once; the log is told in pieces, and `drops` connections break after the first one."""

    log: list[str]
    exit_code: int | None = 0
    status: str = "SUCCEEDED"
    message: str = ""
    drops: int = 0
    token: str | None = None
    url: str = ""
    jobs: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def running(self) -> Iterator[JobServer]:
        loop = asyncio.new_event_loop()
        runner = web.AppRunner(self._app())
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._listen(runner), loop).result(30)
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(30)
            loop.close()

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 29, middlewares=[self._ask_for_token])
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/packages/{protocol}/{name}", self._has_package)
        app.router.add_put("/api/packages/{protocol}/{name}", self._take_package)
        app.router.add_post("/api/jobs/", self._take_job)
        app.router.add_get("/api/jobs/{job}", self._tell_job)
        app.router.add_get("/api/jobs/{job}/logs/tail", self._tell_log)
        return app

    async def _listen(self, runner: web.AppRunner) -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    @web.middleware
    async def _ask_for_token(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.token is not None:
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        return await handler(request)

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""})

    async def _has_package(self, _: web.Request) -> web.Response:
        return web.Response(status=404)

    async def _take_package(self, request: web.Request) -> web.Response:
        with zipfile.ZipFile(io.BytesIO(await request.read())) as archive:
            self.files = {name: archive.read(name).decode() for name in archive.namelist() if not name.endswith("/")}
        return web.Response()

    async def _take_job(self, request: web.Request) -> web.Response:
        self.jobs.append(await request.json())
        return web.json_response({"job_id": "raysubmit_1", "submission_id": "raysubmit_1"})

    async def _tell_job(self, _: web.Request) -> web.Response:
        status = "RUNNING" if self.drops else self.status
        details = {"type": "SUBMISSION", "submission_id": "raysubmit_1", "entrypoint": self.jobs[-1]["entrypoint"]}
        ending = {"status": status, "message": self.message, "driver_exit_code": self.exit_code}
        return web.json_response({**details, **ending})

    async def _tell_log(self, request: web.Request) -> web.WebSocketResponse:
        answer = web.WebSocketResponse()
        await answer.prepare(request)
        for piece in self.log:
            await answer.send_str(piece)
            if self.drops:
                self.drops -= 1
                assert request.transport is not None
                request.transport.abort()
                return answer
        await answer.close()
        return answer
