"""The report's page in a real browser: what it draws is what was recorded; keyboard; no network; no errors."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from PIL import Image

from regard import report

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = "/usr/bin/chromium"
pytestmark = pytest.mark.skipif(shutil.which(CHROMIUM) is None, reason=f"needs {CHROMIUM}")

SAID = ["<s>", "The", " cat", " sat", "\n", "</script>", " on", " שלום", "", " mat", "."]


def softmax(scores: np.ndarray) -> np.ndarray:
    exp = np.exp(scores - scores.max(-1, keepdims=True))
    return (exp / exp.sum(-1, keepdims=True)).astype(np.float32)


def node(rows: np.ndarray, tokens: list[str], *, keys: list[str] | None = None, **attrs) -> xr.Dataset:
    head, keys = ("batch", "layer", "head"), keys or tokens
    rng = np.random.default_rng(1)
    coords = {"layer": np.arange(rows.shape[1]), "head": np.arange(rows.shape[2])}
    for side, words in (("query", tokens), ("key", keys)):
        coords[side] = np.arange(len(words))
        coords[f"{side}_token"] = (("batch", side), np.array([words] * len(rows), dtype=object))
    return xr.Dataset(
        {
            "rows": ((*head, "query", "key"), rows),
            "level": ((*head, "query"), rng.gamma(2, size=rows.shape[:4]), {"long_name": "Level", "units": "m"}),
            "given": ((*head, "key"), rows.sum(3), {"long_name": "Given"}),
        },
        coords,
        {"kind": "self", "causal": True, **attrs},
    )


def causal(layers: int, heads: int, tokens: int, batch: int = 1) -> np.ndarray:
    scores = 2 * np.random.default_rng(0).normal(size=(batch, layers, heads, tokens, tokens))
    return softmax(np.where(np.tri(tokens, dtype=bool), scores, -np.inf))


def vision(side: int = 4) -> xr.Dataset:
    n = side * side + 1
    rows = softmax(2 * np.random.default_rng(3).normal(size=(1, 2, 3, n, n)))
    place = {"image": np.r_[-1, np.zeros(n - 1, int)]}
    place["row"], place["column"] = (np.r_[-1, x] for x in np.divmod(np.arange(n - 1), side))
    made = node(rows, ["[CLS]"] + [""] * (n - 1), causal=False, grids=f"[[{side}, {side}]]")
    coords = {f"{s}_{name}": (("batch", s), x[None]) for s in ("query", "key") for name, x in place.items()}
    return made.assign_coords(coords)


@pytest.fixture(scope="module")
def recorded() -> xr.DataTree:
    cross = softmax(np.random.default_rng(2).normal(size=(1, 2, 2, 3, 4)))
    return xr.DataTree.from_dict(
        {
            "/": xr.Dataset(attrs={"model": "a/model"}),
            "language_model": node(causal(3, 4, len(SAID), batch=2), SAID),
            "vision_tower": vision(),
            "decoder_cross": node(cross, ["a", "b", "c"], keys=["w", "x", "y", "z"], kind="cross", causal=False),
        }
    )


@pytest.fixture(scope="module")
def path(recorded, tmp_path_factory) -> Path:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    return report.write(recorded, tmp_path_factory.mktemp("report") / "page.html", pictures=[picture])


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


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


def listed(page, which: int) -> dict[int, float]:
    """The list's shares by position."""
    found = {}
    for entry in page.locator(".list").nth(which).locator("button").all():
        found[int(entry.get_attribute("data-position"))] = entry.locator(".share").text_content()
    return {place: 0.0 if share == "<0.01%" else float(share.rstrip("%")) / 100 for place, share in found.items()}


def agree(shown: dict[int, float], true: np.ndarray) -> None:
    """Shown in order, the largest ten, each within half a step of 8 bits and of its last digit."""
    largest = -np.sort(-true)[: len(shown)]
    assert len(shown) == min(10, (true > 4e-6).sum())
    for (place, share), best in zip(shown.items(), largest, strict=True):
        digit = 0.005 if share >= 0.0995 else 0.0005 if share >= 0.00995 else 0.00005
        allowed = np.sqrt(true[place]) / 255 + 1 / 510**2 + digit * 1.01
        assert abs(share - true[place]) <= allowed
        assert abs(share - best) <= allowed


def test_a_head_chosen_in_the_atlas_draws_its_own_row_and_column(visit, path, recorded):
    page = visit(path)
    page.locator('.cell[data-layer="2"][data-head="1"]').click()
    page.locator(".token").nth(9).click()
    page.wait_for_selector("text=Where ‘mat’ looks")
    rows = recorded["language_model"]["rows"].values[0, 2, 1]
    agree(listed(page, 0), rows[9])
    agree(listed(page, 1), rows[:, 9])
    assert page.evaluate("location.hash") == "#language_model/2/1/9"
    assert page.locator(".cell.chosen").get_attribute("aria-selected") == "true"


@pytest.mark.parametrize("scope", ["layer", "all", "rollout"])
def test_means_and_rollout_are_those_of_the_recording(visit, path, recorded, scope):
    page = visit(path, f"#language_model/1/0/9/{scope}")
    page.wait_for_selector("text=Where ‘mat’ looks")
    rows = recorded["language_model"]["rows"].values[0].astype(float)
    rolled = np.eye(len(SAID))
    for layer in rows:
        rolled = (0.5 * layer.mean(0) + 0.5 * np.eye(len(SAID))) @ rolled
    agree(listed(page, 0), {"layer": rows[1].mean(0), "all": rows.mean((0, 1)), "rollout": rolled}[scope][9])


def test_the_address_opens_stack_layer_head_token_and_sample(visit, path, recorded):
    page = visit(path, "#language_model/1/3/6/head/1")
    agree(listed(page, 0), recorded["language_model"]["rows"].values[1, 1, 3, 6])
    assert page.locator(".numbers h2").text_content() == "Layer 1, head 3"
    page.evaluate("location.hash = '#decoder_cross/1/0/2'")
    page.wait_for_selector("text=Where ‘c’ looks")
    cross = recorded["decoder_cross"]["rows"].values[0, 1, 0]
    agree(listed(page, 0), cross[2])
    page.locator(".text-box").nth(1).locator(".token").nth(3).click()
    page.wait_for_selector("text=Who looks at ‘z’")
    agree(listed(page, 1), cross[:, 3])
    assert page.evaluate("location.hash") == "#decoder_cross/1/0/k3"


def test_an_address_that_says_nonsense_opens_the_page_all_the_same(visit, path):
    page = visit(path, "#nowhere/%E0%A4%A/x//////")
    assert page.locator(".cell.chosen").count() == 1


def test_hostile_tokens_are_shown_as_text(visit, path):
    page = visit(path)
    texts = page.locator(".token").all_text_contents()
    assert texts[5] == "</script>"
    assert texts[4] == "↵"
    assert texts[8] == "∅"
    assert texts[7] == " שלום"


def test_the_atlas_shows_the_means(visit, path, recorded):
    page = visit(path)
    page.locator('.cell[data-layer="1"][data-head="2"]').hover()
    mean = recorded["language_model"]["level"].values[0, 1, 2].mean()
    shown = page.locator(".heads .readout").text_content()
    assert shown.startswith("Layer 1, head 2: ")
    assert shown.endswith(" m")
    assert float(shown.split()[-2]) == pytest.approx(mean, abs=0.006)


def test_keys_alone_choose_head_and_token(visit, path, recorded):
    page = visit(path, "#language_model/0/0")
    page.locator('.cell[tabindex="0"]').focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert page.evaluate("location.hash") == "#language_model/1/2/-"
    assert page.locator('.cell[tabindex="0"]').count() == 1
    page.locator('.token[tabindex="0"]').focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector("text=Where ‘sat’ looks")
    agree(listed(page, 0), recorded["language_model"]["rows"].values[0, 1, 2, 3])
    page.keyboard.press("Escape")
    page.keyboard.press("Tab")
    assert page.evaluate("location.hash") == "#language_model/1/2/-"


def test_the_lists_and_the_stacks_keep_the_focus(visit, path):
    page = visit(path, "#language_model/1/2/9")
    page.wait_for_selector("text=Where ‘mat’ looks")
    page.locator(".list").first.locator("button").nth(1).focus()
    assert page.locator(".token.marked").count() == 1
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement === document.querySelectorAll('.list button')[2]")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Where ‘mat’ looks", state="detached")
    assert page.evaluate("document.activeElement === document.querySelector('.list button')")
    page.locator("nav button", has_text="vision tower").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".picture-frame")
    assert page.evaluate("document.activeElement.textContent") == "vision tower"


def test_a_mean_leaves_out_heads_without_the_row(visit, tmp_path):
    rows = causal(1, 3, 6)
    rows[0, 0, 2] = np.nan
    rows[0, 0, 1, 4] = np.nan
    tree = xr.DataTree.from_dict({"language_model": node(rows, list("abcdef"))})
    page = visit(report.write(tree, tmp_path / "page.html"), "#language_model/0/0/1/layer")
    page.wait_for_selector("text=Who looks at ‘b’")
    agree(listed(page, 1), np.nanmean(rows[0, 0], 0)[:, 1])


def test_pointing_at_a_token_moves_nothing(visit, path):
    page = visit(path)
    token = page.locator(".token").nth(3)
    before = token.bounding_box()
    token.hover()
    page.wait_for_selector("text=Where ‘sat’ looks")
    assert token.bounding_box() == before


def test_a_patch_chosen_in_the_picture_draws_its_row(visit, path, recorded):
    page = visit(path, "#vision_tower/1/2/0")
    assert page.locator(".picture-frame img").evaluate("image => image.naturalWidth") == 40
    rows = recorded["vision_tower"]["rows"].values[0, 1, 2]
    share = re.search(r"gives (\d+)% of its attention", page.locator(".picture .readout").text_content())[1]
    assert float(share) / 100 == pytest.approx(rows[0, 1:].sum(), abs=0.02)
    box = page.locator(".picture-frame").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 2.5 / 4, box["y"] + box["height"] * 1.5 / 4)
    page.wait_for_selector("text=Where patch row 2, column 3 looks")
    agree(listed(page, 0), rows[7])
    agree(listed(page, 1), rows[:, 7])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_ink_reads_on_every_fill_and_the_theme_can_be_changed(visit, path, scheme):
    page = visit(path, "#language_model/2/1/9", color_scheme=scheme)
    contrast = """tokens => Math.min(...tokens.map((token) => {
        const light = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
            .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const style = getComputedStyle(token), pair = [light(style.color), light(style.backgroundColor)].sort();
        return token.style.background ? (pair[1] + 0.05) / (pair[0] + 0.05) : 21;
    }))"""
    assert page.locator(".token").evaluate_all(contrast) >= 4.5
    ground = page.evaluate("getComputedStyle(document.body.parentElement).backgroundColor")
    page.locator("#theme").click()
    assert page.locator("html").get_attribute("data-theme") != scheme
    assert page.evaluate("getComputedStyle(document.body.parentElement).backgroundColor") != ground
    assert page.locator(".token").evaluate_all(contrast) >= 4.5


@pytest.mark.parametrize("address", ["#language_model/1/1/9", "#vision_tower/1/1/0", "#decoder_cross/1/1/2"])
def test_nothing_is_wider_than_a_narrow_window(visit, path, address):
    page = visit(path, address, viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_print_is_light_and_without_controls(visit, path):
    page = visit(path, color_scheme="dark")
    page.emulate_media(media="print")
    page.wait_for_selector('html[data-theme="light"]')
    assert not page.locator("#theme").is_visible()
    assert not page.locator("select").first.is_visible()
    assert page.locator(".atlas").is_visible()
    assert page.locator(".text").first.is_visible()


def test_time_to_the_first_drawing(visit, tmp_path, capsys):
    rows = causal(12, 12, 128)
    tree = xr.DataTree.from_dict({"language_model": node(rows, [f" t{i}" for i in range(128)])})
    page = visit(report.write(tree, tmp_path / "page.html"))
    drawn = int(page.locator("html").get_attribute("data-drawn"))
    with capsys.disabled():
        print(f"\nreport of 12 x 12 heads x 128 tokens: drawn {drawn} ms after opening")
