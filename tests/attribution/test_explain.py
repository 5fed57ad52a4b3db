"""`regard explain` writes a page or a picture, and says what it cannot do."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from PIL import Image
from typer.testing import CliRunner

import regard
from regard.cli import app
from regard.cli.explain import AGAINST, FOR, PLAIN, Part, _colour, _page, _quarters
from regard.data.scenes import Object, Scene, render

SCENE = Scene((Object("star", "red", "large", 0.25, 0.5), Object("fork", "blue", "large", 0.75, 0.5)))


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    render(SCENE, 64).image().save(path)
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["explain", *map(str, arguments)], env={"COLUMNS": "100"})


def test_a_page_of_words(tmp_path):
    out = tmp_path / "page.html"
    text = "with a heavy heart , the sailor stood ."
    done = run("namer", "--text", text, "--method", "attention-x-gradient", "--out", out)
    assert done.exit_code == 0, done.output
    assert "namer: sorrow" in done.output
    assert done.output.splitlines()[2].split()[1] in ("'heavy'", "'heart'")  # the first row
    page = out.read_text()
    assert f'<span style="background: rgb{FOR}; color: rgb{PLAIN}"' in page
    assert page.count("<span") == 11
    assert "against it" not in page  # this method has no sign
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_the_next_token(tmp_path):
    done = run("reader", "-t", "to be or not to", "--target", " be", "-m", "gradient_x_input", "-o", tmp_path / "a.png")
    assert done.exit_code == 0, done.output
    assert "reader: ' be'" in done.output
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels == FOR).all(-1).any() or (pixels == AGAINST).all(-1).any()  # the largest score


def test_a_picture_is_coloured_where_it_speaks_for_the_class(tmp_path, scene):
    model, processor = regard.load("viewer")
    with Image.open(scene) as image:
        inputs = processor(image, return_tensors="pt")
    for target in ("red star", "blue fork"):
        out = tmp_path / f"{target}.png"
        done = run("viewer", "--image", scene, "--target", target, "--method", "grad_cam", "--out", out)
        assert done.exit_code == 0, done.output
        assert f"viewer: {target}" in done.output
        with Image.open(out) as image:
            assert image.size == (448 + 24 + 448, 448)
            heat = np.asarray(image.crop((472, 0, 920, 448))).astype(int)
        orange = (heat[..., 0] - heat[..., 2]).clip(min=0)
        found = regard.attribute(model, inputs, target, method="grad_cam").values[0]
        there, shown = (np.unravel_index(map_.argmax(), map_.shape) for map_ in (found, orange))
        assert np.allclose(np.array(there) * 7 + 3, shown, atol=8)
    page = tmp_path / "page.html"
    assert run("viewer", "--image", scene, "--target", "0", "--method", "gradient_x_input", "-o", page).exit_code == 0
    assert page.read_text().count("data:image/png;base64,") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("namer", "-t", "a lamp .", "--target", "joi"), "did you mean joy"),
        (("namer", "-t", "a lamp .", "-m", "grad-kam"), "did you mean grad_cam"),
        (("namer", "-t", "a lamp .", "-o", "a.svg"), "ends in .html or .png"),
        (("namer", "-t", "a lamp .", "-m", "layerwise_relevance"), "reads text"),
        (("viewer", "-t", "a lamp"), "give one with --image"),
        (("reader", "-t", " "), "the text is empty"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 2
    assert said in done.output.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_colours():
    assert _colour(1.0) == FOR
    assert _colour(-1.0) == AGAINST
    assert _colour(0.0) == PLAIN


def test_quarters_add_up():
    values = np.arange(64.0).reshape(8, 8)
    sums, places = _quarters(values)
    assert sums.sum() == values.sum()
    assert (sums[0], places[0]) == (0 + 1 + 8 + 9, ["0-1", "0-1"])
    assert (sums[-1], places[-1]) == (54 + 55 + 62 + 63, ["6-7", "6-7"])


def test_a_page_of_nothing_important():
    found = xr.DataArray(np.zeros(2), {"text": ("token", ["<b>", "\n"])}, ("token",))
    page = _page([Part("words", found)], "title", "about").decode()
    assert page.count(f"background: rgb{PLAIN}") == 2
    assert "↵" in page
    assert "<b>" not in page
