"""JupyterLab itself, in a real browser: the frame draws, and a head that is chosen in the widget is read in a cell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

jupyterlab = pytest.importorskip("jupyterlab", reason="needs jupyterlab")
expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect
pytest.importorskip("anywidget", reason="needs anywidget")
pytest.importorskip("ipykernel", reason="needs ipykernel")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]
SHOTS = os.environ.get("REGARD_SHOTS")  # a folder for pictures of the page
TOKEN = "a-token-of-the-tests"
CELLS = [
    """\
import torch, regard
model, tokenizer = regard.load("reader")
with torch.no_grad(), regard.record(model, "entropy", "received", "rows", processor=tokenizer) as recording:
    model(**tokenizer("The king spoke to the queen, and the queen spoke to the", return_tensors="pt"))
widget = recording.widget(height=700)
widget""",
    """print("chosen", widget.selected)""",
    """widget.select(layer=4, head=1, token=3)""",
    """recording.show(height=500)""",
    """widget""",
]
PAINTED = "one => new Set(one.getContext('2d').getImageData(0, 0, one.width, one.height).data).size"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a dark JupyterLab that has all its files in a folder of the test's, look.ipynb among them."""
    at = tmp_path_factory.mktemp("lab")
    shared = Path(jupyterlab.__file__).parents[4] / "share" / "jupyter"  # beside the packages, not the interpreter
    if not (shared / "lab" / "static").is_dir():
        pytest.skip(f"JupyterLab's page is not in {shared}")
    cells = [
        {
            "cell_type": "code",
            "id": f"cell-{i}",
            "metadata": {},
            "execution_count": None,
            "outputs": [],
            "source": source,
        }
        for i, source in enumerate(CELLS)
    ]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    (at / "work").mkdir()
    (at / "work" / "look.ipynb").write_text(
        json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})
    )
    own = (
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "JUPYTERLAB_SETTINGS_DIR",
        "JUPYTERLAB_WORKSPACES_DIR",
        "IPYTHONDIR",
    )
    settings = at / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "themes.jupyterlab-settings").write_text('{"theme": "JupyterLab Dark"}')
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    folders = {name: str(at / name) for name in (*own, "JUPYTER_RUNTIME_DIR")}
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=18888", f"--IdentityProvider.token={TOKEN}"]
    options += [f"--ServerApp.root_dir={at / 'work'}", f"--app-dir={shared / 'lab'}"]
    env = {**os.environ, **folders, "JUPYTER_PATH": str(shared)}
    with open(at / "log", "wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not (told := list((at / "JUPYTER_RUNTIME_DIR").glob("jpserver-*.json"))):
            assert server.poll() is None, (at / "log").read_text()
            assert time.monotonic() < deadline, (at / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{json.loads(told[0].read_text())['port']}"
    finally:
        server.terminate()
        server.wait(20)


def test_a_head_that_is_chosen_in_the_widget_is_read_in_a_cell(browser, lab):
    page = browser.new_page(
        viewport={"width": 1360, "height": 1700}, color_scheme="null"
    )  # what frames prefer is theirs
    page.set_default_timeout(30_000)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{lab}/lab/tree/look.ipynb?token={TOKEN}")
    cells = page.locator(".jp-Notebook .jp-CodeCell")
    cells.nth(4).wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()

    def run(i: int) -> None:
        """As people do; until it is done."""
        cells.nth(i).locator(".cm-content").click()
        page.keyboard.press("Control+Enter")
        expect(cells.nth(i).locator(".jp-InputPrompt")).to_have_text(re.compile(r"^\[\d+\]:$"), timeout=30_000)

    run(0)
    frame = cells.nth(0).frame_locator('iframe[title="Regard"]')
    frame.locator("html[data-drawn]").wait_for(state="attached")
    assert cells.nth(0).locator("iframe").count() == 1  # the widget alone, not its substitute beside it
    assert frame.locator('html[data-theme="dark"]').count() == 1  # as JupyterLab is, and the system is not
    expect(frame.locator(".heads .cell")).to_have_count(48)
    deadline = time.monotonic() + 10
    while frame.locator(".map canvas").evaluate(PAINTED) < 20:  # numbers of colours; the map comes after the rest
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)
    frame.locator('.heads .cell[data-layer="2"][data-head="3"]').click()
    frame.locator(".token").nth(5).click()
    frame.locator(".token.chosen").wait_for()
    run(1)
    said = cells.nth(1).locator(".jp-OutputArea-output").inner_text()
    assert "'layer': 2, 'head': 3" in said
    assert "'query': 5, 'key': 5" in said
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / "lab.png"))

    run(2)  # and the other way
    expect(frame.locator(".numbers h2")).to_have_text("Layer 4, head 1")
    assert frame.locator(".token.chosen").count() == 1
    run(3)
    plain = cells.nth(3).frame_locator('iframe[title="Regard"]')
    plain.locator("html[data-drawn]").wait_for(state="attached")
    plain.locator('.heads .cell[data-layer="1"][data-head="2"]').click()
    expect(plain.locator(".numbers h2")).to_have_text("Layer 1, head 2")

    run(4)  # shown again it is where it was, and both follow each other
    again = cells.nth(4).frame_locator('iframe[title="Regard"]')
    expect(again.locator(".numbers h2")).to_have_text("Layer 4, head 1")
    again.locator('.heads .cell[data-layer="5"][data-head="0"]').click()
    expect(frame.locator(".numbers h2")).to_have_text("Layer 5, head 0")
    assert not [url for url in asked if not url.startswith((lab, "data:", "about:", "blob:"))]
    page.close()
