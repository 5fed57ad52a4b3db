"""Pages in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def visit(browser):
    """Opens a file at an address; at the end nothing may have been complained of and nothing else asked for."""
    pages, said, asked = [], [], []

    def go(path: Path, address: str = "", **context):
        page = browser.new_page(**context)
        pages.append(page)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{path.as_uri()}{address}")
        page.wait_for_selector("html[data-drawn]", state="attached", timeout=10_000)
        return page

    yield go
    for page in pages:
        page.close()
    assert not said
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    assert len([url for url in asked if url.startswith("file:")]) == len(pages)
