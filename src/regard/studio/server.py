"""The studio's server: what a page may ask, and who may ask it.

A request must come with the token (a cookie, which the address that is printed sets), name this server as its host,
and, from a page, come from one of this server's own: another site, or a name that was made to point here, gets nothing.
"""

from __future__ import annotations

import hmac
import json
import mimetypes
import os
import secrets
import signal
import subprocess
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable
from importlib import resources
from pathlib import Path
from typing import Any

import anyio

from .. import catalog
from ..extras import needs

with needs("the studio", "studio"):
    import uvicorn
    from fastapi import FastAPI, HTTPException, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import (
        HTMLResponse,
        JSONResponse,
        PlainTextResponse,
        RedirectResponse,
        Response,
        StreamingResponse,
    )
    from pydantic import BaseModel
    from starlette.exceptions import HTTPException as NotServed

from . import steps as stepping
from .byhand import Edited, edit
from .circuit import Contrasted, Example, circuit, example
from .explained import Asked, explain, fitting
from .gazed import Gazed, gazed
from .jobs import PLAIN, Busy, Job, Jobs, plainly
from .work import Change, Desk, Given

LARGEST_UPLOAD = 16 * 2**20  # bytes
LARGEST_REQUEST = 2**20
CALLED = {  # fields of requests, as the page calls them
    "generate": "Tokens to generate",
    "clean": "Clean prompt",
    "corrupted": "Corrupted prompt",
    "heads": "Heads",
}
POLICY = (
    "default-src 'none'; img-src data:; style-src 'self'; script-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
BYTES = "application/octet-stream"


class Refused(BaseModel):
    """Why a request is not answered, in words for people."""

    why: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refused, "description": words}
    for status, words in {
        400: "The studio cannot do that",
        404: "There is no such thing",
        413: "The request is too large",
        422: "A field is missing, or out of range",
        429: "Too many jobs wait",
    }.items()
} | {
    status: {"description": words, "content": {"text/plain": {}}}
    for status, words in {403: "No token, or another site asked", 421: "Another host was meant"}.items()
}


def _gives(*kinds: str) -> dict[str, Any]:
    """What a route's answers are, other than JSON."""
    return {"response_class": Response, "responses": {200: {"content": {kind: {} for kind in kinds}}}}


TAKES_BYTES = {"requestBody": {"content": {BYTES: {"schema": {"type": "string", "format": "binary"}}}}}


class Guard:
    """ASGI middleware: who may ask, how much a request may hold, and what every answer says."""

    def __init__(self, inner: Any, token: str, hosts: set[str]) -> None:
        self.inner, self.token, self.hosts = inner, token.encode(), hosts
        port = next(iter(hosts)).rpartition(":")[2]
        self.cookie = f"regard-studio-{port}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.inner(scope, receive, send)
        if scope["type"] != "http":  # there is no WebSocket here
            return await send({"type": "websocket.close", "code": 1008})
        request = Request(scope)

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    *((name.encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            await send(message)

        refused = self._refused(request)
        if refused is not None:
            return await refused(scope, receive, sent)
        most = LARGEST_UPLOAD if request.url.path in ("/api/uploads", "/api/files") else LARGEST_REQUEST
        told = request.headers.get("content-length", "0")
        if not told.isdecimal() or int(told) > most:
            return await _too_large(most)(scope, receive, sent)
        taken = 0

        async def received() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:  # what had no length, or a wrong one
                raise HTTPException(413, f"a request holds at most {most:,} bytes")
            return message

        return await self.inner(scope, received, sent)

    def _refused(self, request: Request) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if host not in self.hosts:
            return PlainTextResponse("This is not the address of the studio.", 421)
        if origin is not None and origin.removeprefix("http://") not in self.hosts:
            return PlainTextResponse("Another site asked.", 403)
        if request.headers.get("sec-fetch-site") == "cross-site" and request.url.path != "/":
            return PlainTextResponse("Another site asked.", 403)
        given = request.query_params.get("token")
        if request.url.path == "/" and request.method == "GET" and given is not None and self._is(given):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(self.cookie, given, httponly=True, samesite="strict", path="/")
            return answer
        bearer = request.headers.get("authorization", "")
        known = bearer.removeprefix("Bearer ") if bearer.startswith("Bearer ") else request.cookies.get(self.cookie, "")
        if not self._is(known):
            return PlainTextResponse("Open the address that `regard studio` printed: it holds the token.", 403)
        return None

    def _is(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token)


def _asked(error: dict[str, Any]) -> str:
    """What a field must be, in the page's words."""
    limit = error.get("ctx", {})
    match error["type"]:
        case "greater_than_equal":
            return f"give {limit['ge']} or more"
        case "less_than_equal":
            return f"give {limit['le']} or less"
        case "string_too_short":
            return "is empty"
        case _:
            return error["msg"]


def _too_large(most: int) -> Response:
    return JSONResponse({"why": f"a request holds at most {most:,} bytes"}, 413)


def app(desk: Desk, token: str, hosts: set[str]) -> Guard:
    """The studio as an ASGI application that answers only who has the token and names one of `hosts`."""
    api = FastAPI(
        title="Regard studio", docs_url=None, redoc_url=None, openapi_url="/api/openapi.json", responses=REFUSALS
    )
    jobs = Jobs()
    view = resources.files("regard") / "view"
    files = {one.name: one.read_bytes() for one in view.iterdir() if one.name.endswith((".js", ".css"))}
    page = (view / "studio.html").read_bytes()

    @api.exception_handler(RequestValidationError)
    async def _(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse({"why": f"{CALLED.get(where, where)}: {_asked(first)}"}, 422)

    @api.exception_handler(NotServed)
    async def _(_request: Request, error: NotServed) -> JSONResponse:
        return JSONResponse({"why": error.detail}, error.status_code, error.headers)

    for kind in PLAIN:

        @api.exception_handler(kind)
        async def _(_request: Request, error: Exception) -> JSONResponse:
            message = error.args[0] if isinstance(error, KeyError) and error.args else error
            status = 404 if isinstance(error, KeyError) else 429 if isinstance(error, Busy) else 400
            return JSONResponse({"why": plainly(str(message))}, status)

    @api.get("/", response_class=HTMLResponse)
    def index() -> Response:
        return Response(page, media_type="text/html")

    @api.get("/view/{name}", **_gives("text/javascript", "text/css"))
    def module(name: str) -> Response:
        if name not in files:  # the files of the page, by name: no path is made of what is asked
            raise HTTPException(404, "there is no such file")
        kind = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0]
        return Response(files[name], media_type=kind)

    @api.get("/api/models")
    def models() -> dict[str, Any]:
        names = list(desk.names())
        return {"models": names, "start": desk.named or "reader"}

    @api.post("/api/uploads", openapi_extra=TAKES_BYTES)
    async def upload(request: Request) -> dict[str, Any]:
        data = await request.body()
        return await anyio.to_thread.run_sync(desk.upload, data)

    @api.post("/api/files", openapi_extra=TAKES_BYTES)
    async def keep(request: Request) -> dict[str, str]:
        return {"id": desk.keep(await request.body())}

    @api.get("/api/recordings")
    def recordings() -> list[dict[str, Any]]:
        return desk.listed()

    @api.get("/api/recordings/{key}")
    def recording(key: str) -> dict[str, Any]:
        return desk.page(key).header

    @api.get("/api/recordings/{key}/card")
    def card(key: str) -> dict[str, Any]:
        return desk.card(key)

    @api.get("/api/recordings/{key}/blocks/{number}", **_gives(BYTES))
    def block(key: str, number: int) -> Response:
        blocks = desk.page(key).blocks
        if not 0 <= number < len(blocks):
            raise HTTPException(404, f"the recording has blocks 0 to {len(blocks) - 1}")
        block = blocks[number]
        return Response(block if isinstance(block, bytes) else block(), media_type=BYTES)

    def added(model: str, work: Callable[[Job], None]) -> dict[str, str]:
        return {"id": jobs.add(model, work).id}

    @api.post("/api/jobs/open")
    def open_model(given: Given) -> dict[str, str]:
        return added(given.model, lambda job: desk.takes(job, given.model))

    @api.post("/api/jobs/look")
    def look(given: Given) -> dict[str, str]:
        return added(given.model, lambda job: desk.look(job, given))

    @api.post("/api/jobs/change")
    def change(asked: Change) -> dict[str, str]:
        model = desk.card(asked.recording)["model"]
        return added(model, lambda job: desk.change(job, asked))

    @api.post("/api/jobs/methods")
    def methods(asked: Asked) -> dict[str, str]:
        return added(desk.card(asked.recording)["model"], lambda job: fitting(desk, job, asked))

    @api.post("/api/jobs/explain")
    def explaining(asked: Asked) -> dict[str, str]:
        return added(desk.card(asked.recording)["model"], lambda job: explain(desk, job, asked))

    @api.post("/api/jobs/example")
    def known_prompt(asked: Example) -> dict[str, str]:
        return added(asked.model, lambda job: example(job, desk.model(asked.model), asked))

    @api.post("/api/jobs/circuit")
    def patch(asked: Contrasted) -> dict[str, str]:
        return added(asked.model, lambda job: circuit(job, desk.model(asked.model), asked))

    @api.post("/api/jobs/gaze")
    def fixations(asked: Gazed) -> dict[str, str]:
        return added(desk.card(asked.recording)["model"], lambda job: gazed(desk, job, asked))

    @api.post("/api/jobs/edit")
    def by_hand(asked: Edited) -> dict[str, str]:
        return added("viewer by hand", lambda job: edit(desk, job, asked))

    @api.post("/api/jobs/claim/{key}")
    def claim(key: str) -> dict[str, str]:
        row = catalog.row(key)
        if not row.claim:
            raise ValueError(f"{key} has no claim to run")
        return added("claims", lambda job: _claimed(job, key))

    @api.get("/api/jobs/{number}/events", **_gives("text/event-stream"))
    async def events(number: str) -> Response:
        job = jobs.all.get(number)
        if job is None:
            raise HTTPException(404, f"there is no job {number[:20]!r}")

        async def stream() -> AsyncIterator[str]:
            async for name, what in job.told():
                yield f"event: {name}\ndata: {json.dumps(what)}\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    @api.delete("/api/jobs/{number}")
    def cancel(number: str) -> dict[str, bool]:
        if number not in jobs.all:
            raise HTTPException(404, f"there is no job {number[:20]!r}")
        jobs.cancel(number)
        return {"cancelled": True}

    @api.post("/api/python")
    def python(asked: Change) -> dict[str, str]:
        return {"code": desk.python(asked)}

    @api.get("/api/interventions")
    def interventions() -> list[dict[str, Any]]:
        return stepping.forms()

    @api.get("/api/papers")
    def papers(words: str = Query("", max_length=200)) -> list[dict[str, Any]]:
        return [_short(row) for row in catalog.search(words)]

    @api.get("/api/papers/{key}")
    def paper(key: str) -> dict[str, Any]:
        return _long(catalog.row(key))

    return Guard(api, token, hosts)


def _short(row: catalog.Row) -> dict[str, Any]:
    return {"key": row.key, "title": row.title, "room": row.room, "status": row.status, "parity": row.parity}


def _long(row: catalog.Row) -> dict[str, Any]:
    runs = [
        {
            "scale": run.scale,
            "verdict": run.finding.verdict,
            "measured": run.finding.measured,
            "expected": run.finding.expected,
            "seconds": run.finding.seconds,
            "premises": [{"text": str(one), "met": one.met} for one in run.finding.premises],
        }
        for run in row.found
    ]
    words = {name: getattr(row, name) for name in ("about", "works", "expects", "link", "object")}
    return {**_short(row), **words, "tags": list(row.tags), "claim": bool(row.claim), "runs": runs}


def _claimed(job: Job, key: str) -> None:
    """Run a claim in a process of its own, which a cancelled job ends; what it found is remembered as ever."""
    command = [sys.executable, "-m", "regard", "reproduce", key]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        waited = 0.0
        try:
            while True:
                try:
                    _, said = process.communicate(timeout=0.25)
                    break
                except subprocess.TimeoutExpired:
                    waited += 0.25
                    job.tell("progress", what=f"running the claim of {key}", done=int(waited), of=0)
                    job.check()
        except BaseException:
            process.kill()
            process.communicate()
            raise
    if process.returncode:
        raise ValueError((said.strip().splitlines() or [f"{key}: the claim broke"])[-1])
    job.tell("paper", **_long(catalog.row(key)))


def serve(
    model: str | None = None,
    *,
    folder: Path,
    models: Path | None = None,
    port: int = 0,
    host: str = "127.0.0.1",
    browser: bool = True,
    told: Callable[[str], None] = print,
) -> None:
    """Serve the studio until it is interrupted. port: 0 for any that is free. told: is given the address."""
    import socket

    if models is not None and not models.is_dir():
        raise ValueError(f"--models {models} is no folder")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(128)  # who is told the address may come before the server is ready, and waits
        port = bound.getsockname()[1]
        named = f"[{host}]" if ":" in host else host
        token = secrets.token_urlsafe(32)
        hosts = {f"{name}:{port}" for name in {named, "127.0.0.1", "localhost"}}
        address = f"http://{named}:{port}/?token={token}"
        desk = Desk(folder, models, model)
        if model is not None and model not in desk.names():
            raise ValueError(f"{model} is no model of this studio")
        server = uvicorn.Server(
            uvicorn.Config(app(desk, token, hosts), log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        )
        told(address)
        if browser:
            threading.Timer(0.8, webbrowser.open, (address,)).start()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        server.run(sockets=[bound])
