"""What goes wrong for people: two tabs, a browser that is closed, a studio that is killed, nonsense that is sent."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
from regard.studio.work import Desk

PROMPT = "The king spoke to the queen, and the queen spoke to the"
AXE = os.environ.get("REGARD_AXE", "node_modules/axe-core/axe.min.js")  # of the npm package axe-core
pytestmark = pytest.mark.filterwarnings(
    # sockets that a browser leaves open as it closes are found by the collector of another test
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::ResourceWarning",
)


def look(page, text: str, generate: int) -> None:
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_label("Tokens to generate").fill(str(generate))
    page.locator("#look").click()


def events(ask, address: str, job: str) -> list[str]:
    _, told = ask(address, f"/api/jobs/{job}/events")
    return re.findall(r"^event: (\w+)$", told.decode(), re.M)


@pytest.mark.browser
def test_two_tabs_do_not_disturb_each_other(opened, studio):
    one = opened(studio, viewport={"width": 1200, "height": 900})
    two = opened(studio, beside=one)
    look(one, PROMPT, 30)
    look(two, "A dog ran after the cat, and the cat ran after the", 6)
    for page, word in ((two, "dog"), (one, "king")):
        page.wait_for_selector("#changing:not([hidden])")
        page.wait_for_selector("#look:enabled")
        assert word in page.locator("#views .text").first.inner_text()
    one.locator('.change .cell[data-layer="2"][data-head="1"]').click()
    one.wait_for_selector(".before-after")
    assert not two.locator(".before-after").count()


@pytest.mark.browser
def test_a_browser_that_is_closed_in_the_middle_leaves_a_whole_recording(opened, serve, tmp_path):
    address = serve(tmp_path / "kept")
    page = opened(address)
    look(page, PROMPT, 60)
    page.wait_for_selector(".said.live")
    page.context.close()
    for _ in range(300):
        if Desk(tmp_path / "kept").listed():
            break
        time.sleep(0.1)
    (kept,) = Desk(tmp_path / "kept").listed()
    assert len(Desk(tmp_path / "kept").page(kept["id"]).header["stacks"][0]["query"]["position"]) > 60
    again = opened(address)  # and the studio goes on
    again.get_by_text("Recordings", exact=True).click()
    assert again.locator(".kept button").count() == 1


def test_a_studio_that_is_killed_loses_nothing_that_was_saved(tmp_path, ask):
    command = [sys.executable, "-m", "regard", "studio", "--no-browser", "--out", str(tmp_path / "kept")]
    studio = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address, token = next(
            m for line in studio.stdout if (m := re.search(r"(http://\S+)/\?token=(\S+)", line))
        ).groups()
        known = {"authorization": f"Bearer {token}"}

        def started(generate: int) -> str:
            body = {"model": "reader", "text": PROMPT, "generate": generate}
            return json.loads(ask(address, "/api/jobs/look", body, **known)[1])["id"]

        first = started(3)
        assert b"event: saved" in ask(address, f"/api/jobs/{first}/events", None, **known)[1]
        started(400)
        time.sleep(0.5)
    finally:
        studio.send_signal(signal.SIGKILL)
        studio.wait()
        studio.stdout.close()
    desk = Desk(tmp_path / "kept")
    (kept,) = desk.listed()
    assert kept["given"]["text"] == PROMPT
    assert desk.page(kept["id"]).header["stacks"]
    # What was being written as it was killed has no card, and is not listed.
    whole = tmp_path / "kept" / kept["id"]
    torn = whole.with_name("20991231-235959-abcdef")
    shutil.copytree(whole, torn)
    (torn / "card.json").unlink()
    (torn / ".card.json.part").write_text("{")
    assert [one["id"] for one in desk.listed()] == [kept["id"]]


def test_fifty_clients_at_once_hear_the_same(serve, ask, tmp_path):
    address = serve(tmp_path)
    job = json.loads(ask(address, "/api/jobs/look", {"model": "reader", "text": PROMPT, "generate": 20})[1])["id"]

    def client(i: int) -> tuple[int, bool]:
        status, _ = ask(address, ("/api/models", "/api/papers?words=sink", "/view/studio.js")[i % 3])
        return status, {"page", "saved", "done"} <= set(events(ask, address, job))

    with ThreadPoolExecutor(50) as pool:
        assert set(pool.map(client, range(50))) == {(200, True)}


def test_jobs_beyond_what_may_wait_are_refused(serve, ask, tmp_path):
    address, body = serve(tmp_path), {"model": "reader", "text": PROMPT, "generate": 500}
    told = [ask(address, "/api/jobs/look", body) for _ in range(40)]
    assert {status for status, _ in told} == {200, 429}
    for status, answer in told:
        if status == 200:
            request = json.loads(answer)["id"]
            assert ask(address, f"/api/jobs/{request}")[0] == 405  # to stop is a DELETE
    assert ask(address, "/api/models")[0] == 200


def nonsense(draw: random.Random, deep: int = 0):
    """Any JSON."""
    kinds = [None, True, -1, 0, 10**30, 1e308, "", "x" * 300, "../../etc/passwd", "\x00", "‮", "0" * 16, "reader"]
    if deep < 3 and draw.random() < 0.4:
        keys = ["recording", "steps", "model", "text", "kind", "heads", "mask", "moved", "methods", "upload", "item"]
        if draw.random() < 0.5:
            return {draw.choice(keys): nonsense(draw, deep + 1) for _ in range(draw.randrange(5))}
        return [nonsense(draw, deep + 1) for _ in range(draw.randrange(4))]
    return draw.choice(kinds)


def test_nonsense_is_refused_in_words_and_breaks_nothing(serve, ask, tmp_path):
    address, draw = serve(tmp_path), random.Random(0)
    described = json.loads(ask(address, "/api/openapi.json")[1])["paths"]
    paths = [path for path, methods in described.items() if "post" in methods and "claim" not in path]
    assert len(paths) >= 9
    for i in range(240):
        body = nonsense(draw)
        raw = json.dumps(body).encode()
        status, told = ask(
            address, paths[i % len(paths)], raw[: draw.randrange(1, len(raw) + 1)] if i % 5 == 0 else raw
        )
        assert status < 500, (paths[i % len(paths)], body)
        assert status == 200 or json.loads(told)["why"]
        if status == 429:
            time.sleep(0.2)
    assert ask(address, "/api/models")[0] == 200


def test_broken_files_of_fixations_are_told_of_by_line(serve, ask, tmp_path, picture):
    address, draw = serve(tmp_path), random.Random(0)
    sent = json.loads(ask(address, "/api/uploads", picture.read_bytes())[1])["id"]
    job = json.loads(ask(address, "/api/jobs/look", {"model": "viewer", "upload": sent})[1])["id"]
    _, told = ask(address, f"/api/jobs/{job}/events")
    key = json.loads(re.search(rb"event: saved\ndata: (.*)", told)[1])["id"]
    whole = "subject,stimulus,x,y,duration\n" + "".join(f"ann,a,{i},{i},200\n" for i in range(12))
    for _ in range(25):
        broken = bytearray(whole.encode()[: draw.randrange(len(whole))])
        for _ in range(draw.randrange(6)):
            if broken:
                broken[draw.randrange(len(broken))] = draw.randrange(256)
        file = json.loads(ask(address, "/api/files", bytes(broken))[1])["id"]
        job = json.loads(ask(address, "/api/jobs/gaze", {"recording": key, "upload": file})[1])["id"]
        told = ask(address, f"/api/jobs/{job}/events")[1].decode()
        ended = re.search(r"event: (done|failed)\ndata: (.*)", told)
        assert ended
        assert not re.search(r"^\{.why.: .\w*(Error|Exception)\b", ended[2]), ended[2]


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault_and_a_phone_scrolls_no_part_sideways(opened, studio, scheme, capsys):
    if not Path(AXE).is_file():
        pytest.skip("needs npm's axe-core: npm install axe-core, or REGARD_AXE=.../axe.min.js")
    page = opened(studio, color_scheme=scheme, viewport={"width": 390, "height": 844})
    look(page, PROMPT, 3)
    page.wait_for_selector("#changing:not([hidden])")
    page.wait_for_selector("#look:enabled")
    page.locator('.change .cell[data-layer="2"][data-head="1"]').click()
    page.wait_for_selector(".differences .cell")
    page.evaluate(Path(AXE).read_text("utf-8"))
    found = []
    tabs = page.get_by_role("group", name="Parts of the studio").get_by_role("button").all()
    assert len(tabs) >= 6
    for tab in tabs:
        name = tab.inner_text()
        tab.click()
        if name == "Explain":
            page.wait_for_selector("#explain:enabled")
            page.locator("#explain").click()
            page.wait_for_selector(".curves")
        if name == "By hand":
            page.wait_for_selector(".by-hand .tie")
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        found += [
            (name, one["impact"], one["id"], one["nodes"][0]["html"][:160], one["nodes"][0]["failureSummary"][:200])
            for one in result["violations"]
            if one["impact"] in ("serious", "critical")
        ]
        if shots := os.environ.get("REGARD_SHOTS"):
            page.screenshot(path=str(Path(shots) / f"phone-{scheme}-{name.replace(' ', '-')}.png"), full_page=True)
    assert not found
