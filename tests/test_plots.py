"""`recording.plot`: what is drawn is what was recorded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import regard
from regard.cli.inputs import prepare

pyplot = pytest.importorskip("matplotlib.pyplot")
TEXT = "The king spoke to the queen, and the queen spoke to the"


@pytest.fixture(autouse=True)
def closed():
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


@pytest.fixture(scope="module")
def recording():
    model, tokenizer = regard.load("reader")
    with torch.no_grad(), regard.record(model, "entropy", "mass", "rows", processor=tokenizer) as recording:
        model(**tokenizer(TEXT, return_tensors="pt"))
    return recording


@pytest.fixture(scope="module")
def seen():
    model, processor = regard.load("viewer")
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("red", (8, 8, 40, 40))
    inputs, _ = prepare(regard.loading.Loaded(model, processor), "viewer", None, picture, False, 0)
    with torch.no_grad(), regard.record(model, "rows", processor=processor) as recording:
        model(**inputs)
    return recording, picture


def test_the_atlas_holds_the_mean_of_every_head(recording):
    axes = recording.plot("atlas", "entropy")
    node = recording.tree["language_model"]
    np.testing.assert_allclose(axes.images[0].get_array(), node["entropy"].mean(["batch", "query"]), rtol=1e-6)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")
    bar = axes.images[0].colorbar
    assert "Entropy" in bar.ax.get_ylabel()
    assert "nats" in bar.ax.get_ylabel()
    by_role = recording.plot("atlas", "mass", role="bos")
    np.testing.assert_allclose(
        by_role.images[0].get_array(), node["mass"].sel(role="bos").mean(["batch", "query"]), rtol=1e-6
    )


def test_rows_and_their_mean(recording):
    rows = recording.tree["language_model"]["rows"]
    figure, (one, two) = pyplot.subplots(1, 2)
    assert recording.plot("rows", layer=1, head=2, ax=one) is one
    np.testing.assert_allclose(one.images[0].get_array() ** 2, rows.sel(layer=1, head=2)[0], atol=1e-6)
    recording.plot("rows", layer=1, ax=two)
    np.testing.assert_allclose(two.images[0].get_array() ** 2, rows.sel(layer=1).mean("head")[0], atol=1e-6)
    names = [label.get_text() for label in one.get_xticklabels()]
    assert names[1:3] == ["The", "king"]
    figure.canvas.draw()


def test_the_profile_runs_along_the_tokens(recording):
    axes = recording.plot("profile", "entropy", layer=4, head=0)
    wanted = recording.tree["language_model"]["entropy"].sel(layer=4, head=0)[0].values
    np.testing.assert_allclose(axes.lines[0].get_ydata()[:-1], wanted, rtol=1e-6)


def test_the_map_lies_over_the_picture(seen):
    recording, picture = seen
    axes = recording.plot("map", layer=3, head=1, token=0, picture=picture)
    node = recording[0].children[next(iter(recording[0].children))]
    row = node["rows"].sel(layer=3, head=1, query=0)[0].values
    heat = axes.images[1].get_array()
    assert heat.shape == (8, 8)
    keys = np.flatnonzero(node["key_image"].values.ravel()[: row.size] == 0)
    places = node["key_row"].values.ravel()[keys], node["key_column"].values.ravel()[keys]
    np.testing.assert_allclose(np.asarray(heat)[places], row[keys], rtol=1e-5)
    assert axes.images[0].get_extent() == axes.images[1].get_extent() == [0, 64, 64, 0]


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"kind": "pie"}, "atlas, rows, profile, map"),
        ({"statistic": "distance"}, "has entropy, mass"),
        ({"kind": "rows", "layer": 99}, "layers"),
        ({"stack": "vision_tower"}, "language_model"),
        ({"sample": 1}, "has 1"),
        ({"statistic": "mass", "role": "none"}, "bos"),
        ({"statistic": "entropy", "role": "bos"}, "not by role"),
        ({"kind": "map"}, "0 pictures"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(recording, asked, match):
    with pytest.raises(ValueError, match=match):
        recording.plot(**asked)


def test_without_rows_it_says_what_to_record():
    model, tokenizer = regard.load("reader")
    with torch.no_grad(), regard.record(model, "entropy", processor=tokenizer) as recording:
        model(**tokenizer(TEXT, return_tensors="pt"))
    with pytest.raises(ValueError, match="record the statistic 'rows'"):
        recording.plot("rows")
