"""The studio in a real browser: look, change a head, see the answer change; keyboard, dark, phone; no other network."""

from __future__ import annotations

import os
import re
import statistics
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("uvicorn")
pytestmark = [
    pytest.mark.browser,
    # sockets that a browser leaves open as it closes are found by the collector of another test
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]
SHOTS = os.environ.get("REGARD_SHOTS")  # a folder for pictures of the page
PROMPT = "The king spoke to the queen, and the queen spoke to the"


def shot(page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


def look(page, text: str | None = PROMPT, generate: int = 8) -> None:
    if text is not None:
        page.get_by_label("Text", exact=True).fill(text)
    page.get_by_label("Tokens to generate").fill(str(generate))
    page.locator("#look").click()
    page.wait_for_selector("#changing:not([hidden])")
    page.wait_for_selector("#look:enabled")


def pick_model(page, name: str, kind: str) -> None:
    page.locator(".look .menu select").first.select_option(name)
    page.wait_for_selector(f"text={kind}")


def look_at_a_square(page, folder) -> None:
    pick_model(page, "viewer", "ViTForImageClassification")
    image = Image.new("RGB", (64, 64), "white")
    image.paste("blue", (10, 10, 40, 40))
    image.save(folder / "square.png")
    page.get_by_label("Picture or sound").set_input_files(folder / "square.png")
    page.wait_for_selector("text=64 × 64 pixels")
    page.locator("#look").click()
    page.wait_for_selector("#changing:not([hidden])")


def mute(page, layer: int, head: int) -> None:
    page.locator(f'.change .cell[data-layer="{layer}"][data-head="{head}"]').click()


def test_a_hub_id_that_cannot_be_had_does_not_stay_beside_the_model(visit):
    page = visit()
    field = page.get_by_label("Hub id")
    field.fill("../x")
    field.press("Enter")
    page.wait_for_selector("text=is no model of this studio")
    page.wait_for_selector("#look:enabled")
    assert field.input_value() == ""


def test_a_head_is_muted_and_the_answer_changes(visit):
    page = visit(viewport={"width": 1360, "height": 1000})
    look(page)
    assert page.locator("#views .token").count() > 10
    assert page.locator(".gives .said").inner_text().strip()
    shot(page, "look")
    mute(page, 3, 5)
    page.wait_for_selector(".differences .cell")
    assert "mute layer 3, head 5" in page.locator(".steps").inner_text()
    assert page.locator(".change .readout").first.inner_text() == "Layer 3, head 5: muted"
    rows = page.locator(".before-after .bars tbody tr").all()
    shares = [[cell.inner_text() for cell in row.locator(".number").all()] for row in rows]
    assert any(before != after for before, after in shares)
    page.wait_for_selector("text=The views below show")
    shot(page, "change")

    page.get_by_role("button", name="As Python").click()
    code = page.get_by_label("The change as Python")
    code.wait_for()
    assert "scale_heads({(3, 5): 0.0}" in code.inner_text()

    page.get_by_label("Step 1 is on").uncheck()  # nothing is on: the views show what was before
    page.wait_for_selector(".before-after", state="detached")
    assert page.locator("#run").is_disabled()


def test_a_token_is_cut_and_a_form_of_the_catalog_is_filled(visit):
    page = visit()
    look(page, generate=4)
    page.get_by_label("Run after each change").uncheck()
    page.get_by_text("What flows between tokens").click()
    page.locator("#views .token").nth(2).click()
    page.get_by_role("button", name="Add the chosen token").first.click()
    assert page.get_by_label("Keys: positions").input_value().isdecimal()
    page.get_by_role("button", name="Add this step").click()
    page.get_by_text("An intervention of the catalog").click()
    page.locator(".change .menu select").last.select_option("attention_buckets")
    page.get_by_role("button", name="Add attention_buckets").click()
    assert page.locator(".steps li").count() == 2
    page.get_by_label("Step 2 is on").uncheck()
    page.locator("#run").click()
    page.wait_for_selector(".before-after")
    page.get_by_label("Keys: positions").fill("three")
    page.get_by_role("button", name="Add this step").click()
    assert "no position" in page.get_by_role("alert").inner_text()


def tab_to(page, selector: str) -> None:
    for _ in range(400):
        page.keyboard.press("Tab")
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            return
    raise AssertionError(f"Tab never comes to {selector}")


def test_keyboard_alone(visit):
    page = visit()

    tab_to(page, "#text")
    page.keyboard.type(PROMPT)
    tab_to(page, "#look")
    page.keyboard.press("Enter")
    page.wait_for_selector("#changing:not([hidden])")
    page.wait_for_selector("#look:enabled")
    tab_to(page, ".change .cell")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector(".before-after .bars")
    assert "mute layer 1, head 1" in page.locator(".steps").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(visit, scheme):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    look(page, generate=3)
    mute(page, 2, 1)
    page.wait_for_selector(".differences .cell")
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shot(page, f"phone-{scheme}")


def test_papers_are_searched_and_opened(visit):
    page = visit(color_scheme="dark")
    page.get_by_role("button", name="Papers").click()
    page.get_by_label("Search the papers").fill("visual sink")
    page.wait_for_selector('.paper-list [data-key="var"]')
    page.locator('.paper-list [data-key="var"]').click()
    page.wait_for_selector(".paper dl")
    words = page.locator(".paper").inner_text()
    assert "Parity" in words
    assert "What its claim checks" in words
    shot(page, "papers")


def test_two_recordings_are_compared(visit):
    page = visit()
    look(page, generate=2)
    look(page, "A dog ran after the cat, and the cat ran after the", generate=2)
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector("#compare .cell")
    assert page.locator("#compare select").count() >= 3
    shot(page, "compare")


def test_a_picture_is_asked_about(visit, tmp_path):
    page = visit(viewport={"width": 1360, "height": 1000})
    pick_model(page, "describer", "LlavaForConditionalGeneration")
    image = Image.new("RGB", (64, 64), "white")
    image.paste("red", (10, 10, 40, 40))
    image.save(tmp_path / "square.png")
    page.get_by_label("Picture or sound").set_input_files(tmp_path / "square.png")
    page.wait_for_selector("text=64 × 64 pixels")
    look(page, "describe", generate=6)
    page.wait_for_selector(".picture-frame img")
    mute(page, 0, 0)
    page.wait_for_selector(".differences .cell")
    shot(page, "picture")


def open_tab(page, name: str) -> None:
    page.get_by_role("group", name="Parts of the studio").get_by_role("button", name=name, exact=True).click()


def test_two_methods_explain_a_generated_token_beside_random_maps(visit):
    page = visit(viewport={"width": 1360, "height": 1000})
    look(page, generate=3)
    open_tab(page, "Explain")
    page.wait_for_selector("#explain:enabled")
    methods = page.locator("#explain-tab .menu select").first.locator("option").all_inner_texts()
    assert {"rollout", "grad cam"} <= set(methods)
    assert "guided grad cam" not in methods  # there is no ReLU
    page.locator(".word-choice button").nth(1).click()
    word = page.locator(".word-choice button").nth(1).inner_text().replace("·", " ")
    page.locator("#explain").click()
    page.wait_for_selector(".explained:nth-child(2) .curves")
    heads = page.locator(".explained h3").all_inner_texts()
    assert [head.partition(":")[0] for head in heads] == ["integrated gradients", "gradient x input"]
    assert all(repr(word) in head for head in heads)
    assert page.locator(".explained .scored span[style]").count() >= 2
    assert page.locator(".chart .curve").count() == 8
    assert len({path.get_attribute("d") for path in page.locator(".chart .curve").all()}) == 8
    shot(page, "explain")


def test_a_class_is_explained_over_the_picture(visit, tmp_path):
    page = visit(viewport={"width": 1360, "height": 1000}, color_scheme="dark")
    look_at_a_square(page, tmp_path)
    open_tab(page, "Explain")
    page.wait_for_selector("#explain:enabled")
    page.locator(".word-choice select").select_option(index=3)  # another class
    wanted = page.locator(".word-choice select").locator("option").nth(3).inner_text()
    page.locator("#explain-tab .menu select").nth(1).select_option("grad cam")
    page.locator("#explain").click()
    page.wait_for_selector(".explained:nth-child(2) .curves")
    assert page.locator(".score-map img").count() == 2
    assert all(f": {wanted} (" in head for head in page.locator(".explained h3").all_inner_texts())
    shot(page, "explain-picture")


def test_a_circuit_is_found_and_its_paths_are_drawn(visit):
    page = visit(viewport={"width": 1360, "height": 1000})
    open_tab(page, "Circuits")
    page.get_by_role("button", name="An example").click()
    page.wait_for_selector("#circuits-tab .working:has-text('Took')")
    page.get_by_label("Heads in the circuit").fill("4")
    page.locator("#circuit").click()
    page.wait_for_selector(".graph", timeout=90_000)
    assert page.locator(".found h2").count() == 5
    rows = page.locator(".atlas.worded .atlas-row").count() - 1
    assert rows == 4
    assert page.locator(".graph g").count() == 5
    assert page.locator(".graph .edge").count() >= 1
    assert re.search(r"\d%", page.locator(".found .readout").first.inner_text())
    shot(page, "circuits")


def test_a_circuit_is_found_by_keyboard_alone(visit):
    page = visit(color_scheme="dark")
    tab_to(page, "#tabs button")
    for _ in range(2):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Circuits"
    page.keyboard.press("Enter")
    tab_to(page, "#circuits-tab .quiet-button")
    page.keyboard.press("Enter")
    page.wait_for_selector("#circuits-tab .working:has-text('Took')")
    tab_to(page, "#circuit")
    page.keyboard.press("Enter")
    page.wait_for_selector(".found .cell")
    page.wait_for_selector("#circuits-tab .working:has-text('Took')")
    tab_to(page, ".found .cell")
    page.keyboard.press("ArrowDown")
    assert page.locator(".found .readout").first.inner_text().startswith("layer 1, head 0")


def test_a_circuit_is_stopped(visit):
    page = visit()
    open_tab(page, "Circuits")
    page.get_by_role("button", name="An example").click()
    page.wait_for_selector("#circuits-tab .working:has-text('Took')")
    page.get_by_label("Heads in the circuit").fill("24")
    page.locator("#circuit").click()
    page.locator("#circuits-tab .working").get_by_role("button", name="Stop").click()
    page.wait_for_selector("#circuits-tab .working:has-text('Stopped')")


def test_fixations_are_drawn_in_time_beside_the_models_map(visit, tmp_path):
    page = visit(viewport={"width": 1360, "height": 1000})
    look_at_a_square(page, tmp_path)
    open_tab(page, "Gaze")
    rows = [("ann", 20 + 2 * i, 22 + (i % 3), 300) for i in range(6)] + [("bob", 12, 50, 200), ("bob", 30, 30, 500)]
    lines = ["subject,stimulus,x,y,duration", *(f"{who},square,{x},{y},{ms}" for who, x, y, ms in rows)]
    (tmp_path / "fixations.csv").write_text("\n".join(lines))
    page.get_by_label("File of fixations").set_input_files(tmp_path / "fixations.csv")
    page.wait_for_selector(".maps .cell")
    page.wait_for_selector(".gazed button:has-text('Play')")  # it has played to its end
    assert page.locator(".scanpath circle").count() == 6
    slider = page.get_by_label("Time in ms")
    slider.fill("700")
    assert page.locator(".scanpath circle").count() == 3
    assert page.locator(".scanpath circle.present").count() == 1
    page.get_by_label("Trial").select_option(index=1)
    assert page.locator(".scanpath circle").count() == 2
    before = page.locator(".maps td.value").first.inner_text()
    page.locator('.maps .cell[data-layer="0"][data-head="0"]').click()
    assert "layer 0, head 0" in page.locator(".maps h3").inner_text()
    assert page.locator(".maps td.value").first.inner_text() != before
    page.get_by_label("Trial").select_option(index=0)
    shot(page, "gaze")


def test_the_painter_paints_both(visit):
    page = visit(viewport={"width": 1360, "height": 1000})
    pick_model(page, "painter", "PixArtTransformer2DModel")
    page.get_by_label("Text", exact=True).fill("a red circle and a blue star")
    page.get_by_role("button", name="Paint").click()
    page.wait_for_selector(".gives img")
    page.wait_for_selector("#changing:not([hidden])")
    page.wait_for_selector("#look:enabled")
    mute(page, 0, 0)
    page.wait_for_selector(".before-after .views figure:nth-child(3)")
    page.wait_for_selector(".differences .cell")
    assert page.locator(".before-after figcaption").all_inner_texts() == ["before", "after", "where they differ"]
    shot(page, "painter")


def test_a_sound_is_heard_and_a_head_changed(visit, tmp_path):
    page = visit(viewport={"width": 1360, "height": 1000})
    pick_model(page, "listener", "WhisperForConditionalGeneration")
    time = np.arange(16000) / 16000
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setparams((1, 2, 16000, len(time), "NONE", ""))
        file.writeframes((8000 * np.sin(2 * np.pi * (300 + 200 * time) * time)).astype("<i2").tobytes())
    page.get_by_label("Picture or sound").set_input_files(tmp_path / "tone.wav")
    page.wait_for_selector("text=1 s")
    page.get_by_role("button", name="Listen").click()
    page.wait_for_selector("#changing:not([hidden])")
    page.wait_for_selector("#look:enabled")
    mute(page, 0, 1)
    page.wait_for_selector(".differences .cell, .differences .lead")
    page.get_by_role("button", name="As Python").click()
    page.get_by_label("The change as Python").wait_for()
    assert "hear(" in page.get_by_label("The change as Python").inner_text()
    shot(page, "sound")


def test_turns_of_a_chat_are_looked_at(visit):
    page = visit()
    pick_model(page, "describer", "LlavaForConditionalGeneration")
    add = page.get_by_role("button", name="Add a turn")
    assert add.is_hidden()
    page.get_by_role("button", name="Chat").click()
    assert add.is_visible()
    page.get_by_label("Turn", exact=True).fill("what colour is the cross?")
    page.get_by_label("Tokens to generate").fill("3")
    page.locator("#look").click()
    page.wait_for_selector("#look:enabled")
    told = page.locator(".look .working").inner_text()
    assert page.locator("#changing:not([hidden])").count() or "template" in told, told
    assert page.locator(".turn-role").count() or "template" in told


def test_correspondences_are_edited_by_hand(visit):
    page = visit(viewport={"width": 1360, "height": 1000})
    open_tab(page, "By hand")
    page.wait_for_selector(".by-hand .tie")
    box = page.locator(".by-hand").bounding_box()
    assert page.locator(".by-hand path").count() == 5

    def at(column: float, row: float, right: bool = False) -> tuple[float, float]:
        unit = box["width"] / 224
        return box["x"] + unit * (124 * right + 12.5 * (column + 0.5)), box["y"] + unit * 12.5 * (row + 0.5)

    before = page.locator(".by-hand-card .share-of").first.inner_text()
    page.mouse.move(*at(3, 3))
    page.mouse.down()
    page.mouse.move(*at(6, 1, right=True), steps=4)
    page.mouse.up()
    page.wait_for_selector(".by-hand path.edited")
    page.mouse.click(*at(2, 2))  # now it alone counts
    page.wait_for_selector("text=1 patches count")
    page.wait_for_selector(".by-hand-card .working:has-text('Took')")
    assert page.locator(".by-hand-card .share-of").first.inner_text() != before
    page.locator(".by-hand").focus()
    for key in ("ArrowRight", "Space"):
        page.keyboard.press(key)
    page.wait_for_selector("text=2 patches count")
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.locator(".by-hand path.edited").nth(1).wait_for()
    shot(page, "by-hand")
    page.get_by_role("button", name="Undo the edits").click()
    page.wait_for_selector(".by-hand path.edited", state="detached")


def test_a_picture_of_one_s_own_is_named_by_hand(visit, tmp_path):
    page = visit()
    open_tab(page, "By hand")
    page.wait_for_selector(".by-hand .tie")
    first = page.locator(".by-hand image").first.get_attribute("href")
    Image.new("RGB", (90, 60), "blue").save(tmp_path / "own.png")
    page.get_by_label("A picture of your own").set_input_files(tmp_path / "own.png")
    page.wait_for_selector("text=after its neighbours alone")
    own = page.locator(".by-hand image").first.get_attribute("href")
    assert own != first
    page.get_by_role("button", name="Undo the edits").click()  # it stays
    page.wait_for_selector(".by-hand-card .working:has-text('Took')")
    assert page.locator(".by-hand image").first.get_attribute("href") == own
    shot(page, "by-hand-own")
    page.get_by_role("button", name="Another picture").click()
    page.wait_for_selector("text=it is a")
    assert page.get_by_label("A picture of your own").input_value() == ""


def test_words_that_were_read_are_shaded_in_time(visit, tmp_path):
    page = visit(viewport={"width": 1360, "height": 1000}, reduced_motion="reduce")
    look(page, generate=0)
    open_tab(page, "Gaze")
    lines = ["subject,word,duration", *(f"ann,{i},{200 + 100 * (i % 3)}" for i in range(11))]
    (tmp_path / "read.csv").write_text("\n".join(lines))
    page.get_by_label("File of fixations").set_input_files(tmp_path / "read.csv")
    page.wait_for_selector(".maps .cell")
    assert page.locator(".gazed .scored span[style]").count() == 11  # all at once, where motion is not wanted
    page.get_by_label("Time in ms").fill("250")
    assert page.locator(".gazed .scored .present").inner_text() == "king"
    assert page.locator(".gazed .scored span[style]").count() == 2
    page.get_by_role("button", name="surprisal").click()
    assert page.locator(".maps .scored span").count() == len(PROMPT.split())
    shot(page, "reading")


def test_how_long_a_new_answer_takes(visit, record_property, capsys):
    """From the click on a head to the new answer, on a text of 130 tokens: printed, not asserted."""
    page = visit()
    look(page, " ".join(["It was the best of times, it was the worst of times,"] * 10)[:520], generate=0)
    tokens = page.locator("#views .stacks .facts").inner_text()
    times = []
    for head in range(5):
        page.evaluate("delete document.documentElement.dataset.answered")
        mute(page, 1, head)
        page.wait_for_selector("html[data-answered]", state="attached")
        times.append(int(page.evaluate("document.documentElement.dataset.answered")))
        page.wait_for_selector(".change .working:has-text('Took')")
    median = statistics.median(times)
    record_property("click_to_answer_ms", median)
    with capsys.disabled():
        print(f"\nstudio: from click to new answer {median:.0f} ms, median of {len(times)} ({times}; {tokens})")
    assert re.search(r"\d+ tokens", tokens)
