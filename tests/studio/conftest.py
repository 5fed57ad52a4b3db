"""The studio in a real browser."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager

import pytest

TOKEN = "a-token-of-the-tests"


@contextmanager
def served(folder):
    """The address of a studio that keeps its recordings here, and its desk."""
    uvicorn = pytest.importorskip("uvicorn")
    from regard.studio.server import app
    from regard.studio.work import Desk

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{bound.getsockname()[1]}"
        config = uvicorn.Config(app(Desk(folder), TOKEN, {host}), log_level="error", access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        yield f"http://{host}"
        server.should_exit = True
        server.force_exit = True
        thread.join(10)


@pytest.fixture
def ask():
    """Asks a studio: (address, path, body or None) -> its answer, and gives the status of what it refuses."""

    def go(address: str, path: str, body=None, **headers: str):
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        kinds = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json", **headers}
        try:
            with urllib.request.urlopen(urllib.request.Request(address + path, data, kinds), timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    return go


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """Its address; it serves until the module's tests are done."""
    with served(tmp_path_factory.mktemp("studio")) as address:
        yield address


@pytest.fixture
def opened(browser):
    """Opens a studio at its address, in a context of its own or in `beside`'s; gives the page and what it asks for.

    At the end nothing may have been complained of, and no other host asked.
    """
    contexts, said, asked = [], [], []

    def go(address: str, beside=None, **context):
        one = beside.context if beside is not None else browser.new_context(**context)
        if beside is None:
            contexts.append(one)
        page = one.new_page()
        page.set_default_timeout(30_000)

        def wrong(answer) -> None:
            if answer.status >= 400:
                said.append(f"{answer.status} {answer.url}")

        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("response", wrong)
        page.on("request", lambda request: asked.append((address, request.url)))
        page.goto(f"{address}/?token={TOKEN}")
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    go.asked = asked
    yield go
    for one in contexts:
        one.close()
    assert not said
    assert not [url for address, url in asked if not url.startswith((address, "data:"))]


@pytest.fixture
def visit(opened, studio):
    """Opens the module's studio."""
    return lambda **context: opened(studio, **context)


@pytest.fixture
def serve():
    """Serves a studio of a folder until the test is done; gives its address."""
    with ExitStack() as stack:
        yield lambda folder: stack.enter_context(served(folder))
