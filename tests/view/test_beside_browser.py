"""The page of `regard steer` in a real browser: what it draws is what was found; no network, no errors; both themes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from regard.cli import app
from regard.cli import steer as work
from regard.zoo.recipes.describer import pictures, tempting


def made(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "ROUNDS", (2, 2))
        done = CliRunner().invoke(app, ["steer", *map(str, arguments)], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    return Path(arguments[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("beside")


@pytest.fixture(scope="module")
def seeing(folder) -> Path:
    picture = folder / "scene.png"
    pictures(tempting(3))[2].save(picture)
    arguments = ["--with", "vhr", "--knob", "alpha=3", "--text", "describe", "--generate", 12]
    return made("describer", picture, *arguments, "--out", folder / "vhr.html")


@pytest.fixture(scope="module")
def redrawn(folder, seeing) -> Path:
    arguments = ["--with", "carve", "--text", "what colour is the cross?", "--generate", 4]
    return made("describer", folder / "scene.png", *arguments, "--out", folder / "carve.html")


@pytest.fixture(scope="module")
def painting(folder) -> Path:
    (folder / "texts.txt").write_text("a red circle and a blue star\na red circle and a green star\n")
    return made("painter", folder / "texts.txt", "--with", "locatedit", "--out", folder / "painter.html")


@pytest.fixture(scope="module")
def sorting(folder, seeing) -> Path:
    arguments = ["--with", "test-time-registers", "--out", folder / "registers.html"]
    return made("lookout", folder / "scene.png", *arguments)


def shade(page, layer: int, head: int) -> str:
    """Of a head in the atlas of changes."""
    cell = page.locator(".atlas").nth(2).locator(f'.cell[data-layer="{layer}"][data-head="{head}"]')
    return cell.evaluate("cell => cell.style.background")


def header(page) -> dict:
    return json.loads(page.locator("#header").text_content())


def test_texts_stand_beside_each_other_with_what_differs_marked(visit, seeing):
    page = visit(seeing)
    assert page.locator("h1").text_content() == "describer under vhr alpha=3.0"
    before, after = (page.locator(f".texts .said.{when}") for when in ("before", "after"))
    assert before.text_content().split() != after.text_content().split()
    marks = [mark.text_content() for mark in page.locator("mark").all()]
    assert marks
    kept = [" ".join(re.sub(r"<mark>.*?</mark>", "", one.inner_html()).split()) for one in (before, after)]
    assert kept[0] == kept[1]
    boxes = [one.bounding_box() for one in (page.locator(".pictured"), page.locator(".texts"))]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]  # one picture leaves room beside it
    assert page.locator(".views img").count() == 1


def test_bars_are_as_long_as_the_probabilities(visit, seeing):
    page = visit(seeing)
    step = header(page)["step"]
    assert step["changed"]
    assert all(max(row[1:]) >= 0.005 for row in step["rows"][3:])
    most = max(max(row[1:]) for row in step["rows"])
    frame = page.locator(".bars tbody .track").first.bounding_box()["width"]
    for i, (_, *shares) in enumerate(step["rows"]):
        for side, share in zip(("before", "after"), shares):
            wide = page.locator(f".bars i.{side}").nth(i).bounding_box()["width"]
            assert abs(wide - max(1, frame * share / most)) < 1
    first, then = (max(step["rows"], key=lambda row, side=side: row[side])[0].strip() for side in (1, 2))
    assert f"‘{then}’ in place of ‘{first}’" in page.locator(".steps .lead").text_content()


def test_heads_are_those_that_were_recorded_and_what_is_chosen_is_told(visit, seeing):
    page = visit(seeing)
    stacks = {stack["name"]: stack for stack in header(page)["stacks"]}
    assert not stacks["vision tower"]["variables"]  # vhr leaves the tower alone
    assert page.locator('.choice button:has-text("vision tower")').is_disabled()
    variables = stacks["language model"]["variables"]
    assert [one["share"] for one in variables] == sorted((one["share"] for one in variables), reverse=True)
    names = page.locator(".changed select option").all_text_contents()
    assert names == [one["label"] for one in variables]
    wanted = names.index("Entropy")
    page.locator(".changed select").select_option(index=wanted)
    page.locator(".atlas").nth(2).locator('.cell[data-layer="3"][data-head="1"]').click()
    a, b = (variables[wanted][way][3][1] for way in ("before", "after"))
    told = page.locator(".changed .readout").text_content()
    numbers = [float(x.replace("−", "-")) for x in re.findall(r"[-+−]?\d*\.\d+(?:e-?\d+)?", told)]
    assert numbers[:2] == pytest.approx([a, b], rel=0.01)
    assert numbers[2] == pytest.approx(b - a, rel=0.1, abs=1e-3)
    assert page.locator(".cell.chosen").count() == 3
    ways = [variables[wanted][way] for way in ("before", "after")]
    unmoved = [(layer, head) for layer in range(6) for head in range(4) if ways[0][layer][head] == ways[1][layer][head]]
    assert unmoved
    colours = {shade(page, *place) for place in unmoved}
    assert len(colours) == 1  # the middle of the scale
    assert shade(page, 3, 1) not in colours


def test_a_picture_that_a_method_redraws_stands_beside_the_first(visit, redrawn):
    page = visit(redrawn)
    assert page.locator(".views figcaption").all_text_contents()[:2] == ["before", "after"]
    sources = [image.get_attribute("src") for image in page.locator(".views img").all()]
    assert len(set(sources)) == len(sources) >= 2
    page.locator('.choice button:has-text("vision tower")').click()
    assert page.locator(".changed select option").count() > 0  # another picture is looked at otherwise


def test_what_is_painted_stands_beside_each_other(visit, painting):
    page = visit(painting)
    assert page.locator(".prompt").all_text_contents() == [
        "a red circle and a blue star",
        "a red circle and a green star",
    ]
    captions = page.locator(".views figcaption").all_text_contents()
    assert captions == ["before and after: the same", "before", "after", "where they differ"]
    assert page.locator(".atlas").count() == 3
    assert page.locator(".texts").count() == 0


def test_classes_are_bars_of_both(visit, sorting):
    page = visit(sorting)
    assert page.locator(".classes h2").text_content() == "What it takes it for"
    rows = [[cell.text_content() for cell in row.locator("th, td.number").all()]
            for row in page.locator(".classes tbody tr").all()]  # fmt: skip
    wanted = header(page)["classes"]
    assert [row[0] for row in rows] == [row["label"] for row in wanted]
    shares = [[float(share.strip("%")) / 100 for share in row[1:]] for row in rows]
    assert shares == [pytest.approx([row["before"], row["after"]], abs=0.006) for row in wanted]
    assert "Both are given the same input" in page.locator("footer").text_content()
    assert page.locator(".texts, .steps").count() == 0
    assert page.locator(".atlas").count() == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_and_none_scrolls_sideways(visit, seeing, painting, scheme):
    for path in (seeing, painting):
        page = visit(path, color_scheme=scheme, viewport={"width": 390, "height": 800})
        assert page.locator("html").get_attribute("data-theme") == scheme
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        before = page.locator(".atlas .cell").first.evaluate("cell => cell.style.background")
        page.locator("#theme").click()
        assert page.locator("html").get_attribute("data-theme") != scheme
        assert page.locator(".atlas .cell").first.evaluate("cell => cell.style.background") != before


def test_the_file_holds_all_and_may_run_nothing_else(seeing):
    text = seeing.read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
