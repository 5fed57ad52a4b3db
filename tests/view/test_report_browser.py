"""The report's page in a real browser: what it draws is what was recorded; keyboard; no network; no errors."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image

import regard
from regard import report

sync_api = pytest.importorskip("playwright.sync_api")

SAID = ["<s>", "The", " cat", " sat", "\n", "</script>", " on", " שלום", "", " mat", "."]


def map_drawn(page) -> None:
    """Waits for the map of all pairs, which comes last; the page's policy keeps playwright from waiting in it."""
    page.locator(".map-frame canvas:not([width='1'])").first.wait_for(timeout=60_000)


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


def test_pointing_at_a_token_without_a_row_moves_nothing(visit, tmp_path):
    page = visit(
        report.write(xr.DataTree.from_dict({"language_model": conversation([" star"])}), tmp_path / "page.html")
    )
    token = page.locator(".token.unread")
    token.scroll_into_view_if_needed()
    before = token.bounding_box()
    token.hover()
    page.wait_for_selector("text=never run on it")
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


def shown_numbers(page) -> list[str]:
    """The chosen head's numbers, the medians along the tokens, and what the sinks say."""
    page.wait_for_selector(".line svg path", state="attached")
    medians = page.locator(".line output").all_text_contents()
    return [*page.locator(".numbers td.value").all_text_contents(), *medians, page.locator(".sink-body").text_content()]


def test_a_padded_text_shows_the_numbers_of_the_text_alone(visit, tmp_path):
    model, tokenizer = regard.load("reader")
    texts = ["To be, or not to be, that is the question: whether it is nobler in the mind to suffer.", "Yes, it is so."]
    pages = []
    for name, some, address in (
        ("both", texts, "#language_model/2/3/-/head/1"),
        ("one", texts[1:], "#language_model/2/3"),
    ):
        inputs = tokenizer(some, padding=True, return_tensors="pt")
        with torch.no_grad(), regard.record(model, "entropy", "received", "mass", "rows", processor=tokenizer) as made:
            model(**inputs)
        pages.append(visit(made.report(tmp_path / f"{name}.html"), address))
    both, one = pages
    assert both.locator("nav").text_content().endswith("7 tokensSample1 of 22 of 2")
    assert re.search(r"\d+ of padding", both.locator(".reading").text_content())
    numbers = [re.sub(r" at \d+", "", words) for words in shown_numbers(both)]
    assert numbers == [re.sub(r" at \d+", "", words) for words in shown_numbers(one)]
    assert not any("nan" in words.lower() for words in numbers)


def test_sinks_are_those_that_the_report_found(visit, tmp_path):
    rows = softmax(np.where(np.tri(30, dtype=bool), np.eye(1, 30)[0] * 6.0, -np.inf)[None, None, None])
    tree = xr.DataTree.from_dict({"language_model": node(rows, [f" t{i}" for i in range(30)])})
    page = visit(report.write(tree, tmp_path / "page.html"))
    assert page.locator(".sinks tbody tr").count() == 1
    share = rows[0, 0, 0].sum(0)[0] / 30
    assert f"{100 * share:.0f}%" in page.locator(".sinks tbody tr").text_content()
    even = softmax(np.where(np.tri(2048, dtype=bool), 0.0, -np.inf)[None, None, None])
    tree = xr.DataTree.from_dict({"language_model": node(even, [f" t{i}" for i in range(2048)])})
    page = visit(report.write(tree, tmp_path / "even.html"))
    assert "No key stands out" in page.locator(".sink").text_content()
    assert "at most 1.0 times" in page.locator(".sink").text_content()


def conversation(unread: list[str]) -> xr.Dataset:
    """A picture of 2 x 2 patches, a question, and words that were generated."""
    said = ["<|image|>"] * 4 + [" what", "?", "<|assistant|>", " a", " red"]
    roles = ["image"] * 4 + ["user", "user", "special", "generated", "generated"]
    made = node(causal(2, 3, 9), said, grids="[[2, 2]]", unread=unread)
    place = {"image": np.r_[[0] * 4, [-1] * 5]}
    place["row"], place["column"] = (np.r_[x, [-1] * 5] for x in np.divmod(np.arange(4), 2))
    coords = {f"{s}_{name}": (("batch", s), x[None]) for s in ("query", "key") for name, x in place.items()}
    both = {f"{s}_role": (("batch", s), np.array([roles], dtype=object)) for s in ("query", "key")}
    return made.assign_coords(coords | both)


def test_every_generated_word_has_its_map_on_the_picture(visit, tmp_path):
    given = conversation([" star"])
    page = visit(
        report.write(xr.DataTree.from_dict({"language_model": given}), tmp_path / "page.html"), "#language_model/1/2"
    )
    rows = given["rows"].values[0, 1, 2]
    page.wait_for_selector(".words")
    strip = page.locator(".pictures > .thumbs button")
    assert [one.strip("·") for one in strip.locator("bdi").all_text_contents()] == ["a", "red", "star"]
    assert "the row of the token before the word" in page.locator(".pictures").text_content()

    def shares() -> list[str]:
        return strip.locator(".share-of").all_text_contents()

    def near(words: str, true: float) -> None:
        assert float(words.rstrip("%")) == pytest.approx(100 * true, abs=1.5)

    for words, query in zip(shares(), (6, 7, 8), strict=True):
        near(words, rows[query, :4].sum())
    strip.nth(2).click()  # the last word was never run: its map is the row of the one before
    page.wait_for_selector("text=Where ‘red’ looks")
    assert page.evaluate("location.hash") == "#language_model/1/2/8"
    page.locator("button", has_text="Once it is read").click()
    own = shares()
    near(own[0], rows[7, :4].sum())
    near(own[1], rows[8, :4].sum())
    assert own[2] == "no row"


def test_what_was_generated_begins_with_its_first_word_and_holds_the_last(visit, tmp_path):
    page = visit(
        report.write(xr.DataTree.from_dict({"language_model": conversation([" star"])}), tmp_path / "page.html")
    )
    assert page.locator(".turn.generated .turn-text").text_content() == " a red star"
    assert "<|assistant|>" in page.locator(".turn.user .turn-text").text_content()
    page.locator(".token", has_text="star").click()
    page.wait_for_selector("text=never run on it")


def test_ids_stand_apart(visit, tmp_path):
    tree = xr.DataTree.from_dict({"language_model": node(causal(1, 1, 4), ["17", "203", "4", "5"])})
    page = visit(report.write(tree, tmp_path / "page.html"))
    boxes = [token.bounding_box() for token in page.locator(".token").all()]
    for a, b in pairwise(boxes):
        assert b["x"] >= a["x"] + a["width"] + 2


def test_a_role_has_the_same_colour_whatever_else_there_is(visit, tmp_path):
    colours = []
    for roles in (["text", "generated"], ["bos", "generated"]):
        given = node(causal(1, 1, 6), list("abcdef"))
        part = np.full((1, 1, 1, 6, 2), 0.5)
        given = given.assign(mass=(("batch", "layer", "head", "query", "role"), part)).assign_coords(role=roles)
        page = visit(report.write(xr.DataTree.from_dict({"language_model": given}), tmp_path / f"{roles[0]}.html"))
        page.wait_for_selector(".role-keys i", state="attached")
        colours.append(
            page.locator(".role-keys i").evaluate_all("all => all.map((i) => getComputedStyle(i).backgroundColor)")
        )
    assert colours[0][1] == colours[1][1]
    assert len({*colours[0], *colours[1]}) == 3


PIXELS = """canvas => {
    const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
    const context = copy.getContext("2d", { willReadFrequently: true });
    context.drawImage(canvas, 0, 0);
    return [[copy.height, copy.width], Array.from(context.getImageData(0, 0, copy.width, copy.height).data)];
}"""


def pixels(page) -> np.ndarray:
    """The map's canvas: [row, column, red green blue]."""
    shape, values = page.locator(".map-frame canvas").evaluate(PIXELS)
    return np.array(values).reshape(*shape, 4)[..., :3]


def test_no_share_is_more_than_all(visit, tmp_path):
    """Of even rows of few tokens, four times the mean, to which colours go, is more than one."""
    weights = causal(1, 2, 3)
    weights[:] = np.tri(3) / np.tri(3).sum(1, keepdims=True)
    page = visit(report.write(xr.DataTree.from_dict({"m": node(weights, ["a", "b", "c"])}), tmp_path / "page.html"))
    map_drawn(page)
    assert page.locator(".all-pairs .key .ticks span").all_inner_texts() == ["0%", "25%", "100%"]


def test_the_map_of_a_long_text_is_drawn_in_blocks_that_open(visit, tmp_path):
    """Even weights of 16,384 tokens, of which each row keeps a few: what is drawn is not blank, and exact up close."""
    n, k = 16_384, 4
    keys = np.minimum(np.random.default_rng(0).integers(0, n, (1, 1, 2, n, k)), np.arange(n)[:, None]).astype(np.int32)
    keys = np.sort(keys, -1)
    given = xr.Dataset(
        {
            "top_keys": (("batch", "layer", "head", "query", "rank"), keys),
            "top_weights": (("batch", "layer", "head", "query", "rank"), np.full(keys.shape, 1e-4, np.float32)),
        },
        {"layer": [0], "head": [0, 1], "query": np.arange(n), "key": np.arange(n)},
        {"kind": "self", "causal": True},
    )
    page = visit(report.write(xr.DataTree.from_dict({"language_model": given}), tmp_path / "page.html"))
    map_drawn(page)
    drawn = pixels(page)
    inside = np.tri(len(drawn), dtype=bool)  # above it is the future
    assert (drawn != drawn[0, -1]).any(-1)[inside].mean() > 0.25
    assert "pairs" in page.locator(".all-pairs .key").text_content()
    page.locator(".map-frame").focus()
    for _ in range(11):
        page.keyboard.press("+")
    assert pixels(page).shape[:2] == (8, 8)
    words = page.locator(".map .axis.down").text_content()
    first, last = (int(x) for x in re.findall(r"\d+", words))
    assert last - first == 7
    page.locator(".choice button", has_text="All").last.click()
    assert "query 0 to 16383" in page.locator(".map .axis.down").text_content()


def test_a_box_drawn_on_the_map_opens_it(visit, path):
    page = visit(path, "#language_model/1/2")
    map_drawn(page)
    canvas = page.locator(".map-frame canvas")
    canvas.scroll_into_view_if_needed()
    box, n = canvas.bounding_box(), len(SAID)
    at = [
        (box["x"] + box["width"] * (k + 0.5) / n, box["y"] + box["height"] * (q + 0.5) / n) for q, k in ((4, 1), (9, 5))
    ]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=4)
    page.mouse.up()
    assert "query 4 to 9" in page.locator(".map .axis.down").text_content()
    assert "key 1 to 5" in page.locator(".map .axis").first.text_content()
    assert pixels(page).shape[:2] == (6, 5)


@pytest.mark.parametrize("name", ["heads", "numbers", "reading", "lists", "all-pairs", "lines", "sink", "pictures"])
def test_every_card_is_saved_as_svg_and_png(visit, path, tmp_path, name):
    page = visit(path, "#vision_tower/1/1/0" if name == "pictures" else "#language_model/1/1/9")
    map_drawn(page)
    card = page.locator(f".card.{name}")
    kept = {}
    for kind in ("SVG", "PNG"):
        with page.expect_download() as told:
            card.locator(".save button", has_text=kind).click()
        assert told.value.suggested_filename.endswith(f".{kind.lower()}")
        told.value.save_as(kept.setdefault(kind, tmp_path / f"card.{kind.lower()}"))
    drawn = ElementTree.parse(kept["SVG"]).getroot()
    words = "".join(drawn.itertext())
    assert card.locator("h2").text_content() in words
    assert "foreignObject" not in kept["SVG"].read_text()
    assert "Save" not in words
    box = card.bounding_box()
    assert float(drawn.get("width")) == pytest.approx(box["width"], abs=1)
    with Image.open(kept["PNG"]) as picture:
        assert picture.width == pytest.approx(2 * box["width"], abs=3)
        assert len(picture.convert("RGB").getcolors(2**20)) > 10
    if name == "all-pairs":
        assert drawn.find(".//{*}image").get("href").startswith("data:image/png")
    if name == "reading":
        assert " mat" in words


CUT = """all => all.filter((e) => {
    const style = getComputedStyle(e), wide = e.scrollWidth > e.clientWidth + 1 && style.overflow !== "visible";
    return wide || (style.display !== "inline" && e.scrollHeight > e.clientHeight + 2);
}).map((e) => `${e.className}: ${e.textContent}`)"""


@pytest.mark.parametrize("width", [390, 1200, 1600])
def test_no_words_are_cut(visit, path, width):
    for address in ("", "#language_model/2/1/9", "#vision_tower/1/1/7"):
        page = visit(path, address, viewport={"width": width, "height": 900})
        map_drawn(page)
        cut = page.locator(".status, .hint, .second-key, .legend p, .note, .list.patches .context, figcaption > span")
        assert cut.evaluate_all(CUT) == []


def test_print_holds_the_map_and_keeps_headings_with_what_they_head(visit, path, tmp_path):
    page = visit(path, "#language_model/1/1/9")
    map_drawn(page)
    page.emulate_media(media="print")
    assert page.locator(".map-frame").is_visible()
    assert not page.locator(".save").first.is_visible()
    breaks = page.locator("h2, h3, .card-head").evaluate_all("all => all.map((e) => getComputedStyle(e).breakAfter)")
    assert set(breaks) == {"avoid"}
    whole = page.locator(".all-pairs, .lines, .heads, .numbers, .sink")
    assert set(whole.evaluate_all("all => all.map((e) => getComputedStyle(e).breakInside)")) == {"avoid"}


def test_time_to_the_first_drawing(visit, tmp_path, capsys):
    rows = causal(12, 12, 128)
    tree = xr.DataTree.from_dict({"language_model": node(rows, [f" t{i}" for i in range(128)])})
    page = visit(report.write(tree, tmp_path / "page.html"))
    drawn = int(page.locator("html").get_attribute("data-drawn"))
    with capsys.disabled():
        print(f"\nreport of 12 x 12 heads x 128 tokens: drawn {drawn} ms after opening")
