"""The page in a notebook's frame: it draws, its links stay inside, and it gets at nothing around it."""

from __future__ import annotations

import pytest
import torch

import regard

pytestmark = pytest.mark.browser
TEXT = "The king spoke to the queen, and the queen spoke to the"


@pytest.fixture(scope="module")
def shown():
    model, tokenizer = regard.load("reader")
    with torch.no_grad(), regard.record(model, "entropy", "received", "rows", processor=tokenizer) as recording:
        model(**tokenizer(TEXT, return_tensors="pt"))
    return recording.show(height=700)


def test_it_draws_in_a_frame_and_its_links_stay_inside(browser, shown, tmp_path):
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><title>Notebook</title><h1>Notebook</h1>{shown._repr_html_()}", "utf-8")
    page, said, asked = browser.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(notebook.as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("html[data-drawn]").wait_for(state="attached")
    frame.locator('.heads .cell[data-layer="2"][data-head="3"]').click()
    assert "Layer 2, head 3" in frame.locator(".numbers h2").inner_text()
    frame.locator(".token").nth(3).click()
    frame.locator(".token.chosen").wait_for()
    link = frame.locator(".findings a").first
    wanted = link.locator(".where").inner_text()
    link.click()
    assert wanted.partition(" →")[0].strip().lower() in frame.locator(".numbers h2").inner_text().lower()
    assert frame.locator("h1").count() == 1
    assert page.frames[1].evaluate("() => { try { return parent.document.title; } catch { return null; } }") is None
    assert not said
    assert [url for url in asked if not url.startswith(("data:", "about:"))] == [notebook.as_uri()]
    page.close()


def test_what_is_chosen_is_told_to_the_page_around_and_chosen_as_that_says(browser, shown, tmp_path):
    """What the widget rests on. Addresses of nothing that is there, and other messages, change nothing."""
    notebook = tmp_path / "notebook.html"
    heard = "<script>heard = []; addEventListener('message', ({ data }) => heard.push(data))</script>"
    notebook.write_text(f"<!doctype html><title>Notebook</title>{heard}{shown._repr_html_()}", "utf-8")
    page, said = browser.new_page(), []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(notebook.as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("html[data-drawn]").wait_for(state="attached")
    first = page.evaluate("heard")
    assert [one["begins"] for one in first] == [True]
    frame.locator('.heads .cell[data-layer="2"][data-head="3"]').click()
    frame.locator(".token").nth(4).click()
    frame.locator(".token.chosen").wait_for()
    assert page.evaluate("heard.slice(1)") == [
        {"regard": "#language_model/2/3/-", "begins": False},
        {"regard": "#language_model/2/3/4", "begins": False},
    ]
    frame.locator(".findings a").first.click()  # links choose, too
    assert page.evaluate("heard.length") == 4
    for message in ("null", "7", "{ regard: 7 }", "{ regard: '#nothing/1/1' }", "{ regard: '#language_model/5/7/9' }"):
        page.evaluate(f"document.querySelector('iframe').contentWindow.postMessage({message}, '*')")
    frame.locator(".numbers h2").get_by_text("Layer 5, head 7", exact=True).wait_for()
    assert frame.locator(".token.chosen").count() == 1
    assert page.evaluate("heard.length") == 4  # what it was told it does not say again
    assert not said
    page.close()


def test_without_html_it_is_the_summary(shown):
    assert "language_model" in repr(shown)
    assert "<iframe" not in repr(shown)
