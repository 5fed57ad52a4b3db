"""A vision model beside fixations on pictures: a known truth, what stands beside it, and the command."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import regard
from regard.cli import app
from regard.data import media
from regard.data.scenes import Object, Scene, render
from regard.gaze import GazeData, GazeTrial, Scanpath, compare_pictures, draw
from regard.gaze.compare_pictures import SIDE, _nss_table, model_maps, on_picture
from regard.gaze.nss import nss

SIZE = (64, 64)


@pytest.fixture(scope="module")
def viewer():
    return regard.load("viewer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("pictures")
    for i, (x, y) in enumerate([(0.25, 0.3), (0.75, 0.7), (0.3, 0.75), (0.7, 0.25)]):
        render(Scene((Object("star", "red", "large", x, y),))).image().resize(SIZE).save(where / f"pic{i}.png")
    return where


def looked(folder: Path, where, *, people: int = 3, n: int = 6, spread: float = 3.0) -> GazeData:
    """where: picture -> x and y that everyone looks around."""
    rng = np.random.default_rng(0)
    trials = []
    for who in range(people):
        for name, place in where.items():
            places = np.clip(rng.normal(place, spread, (n, 2)), 0, 63.9)
            trials.append(GazeTrial(f"p{who}", name, "", Scanpath(places, SIZE, rng.uniform(100, 400, n))))
    return GazeData(tuple(trials), stimulus_folder=folder)


def peaks(viewer, folder: Path, kind) -> dict[str, tuple[float, float]]:
    """Where a map of the model is highest in each picture."""
    found = {}
    for i in range(4):
        values = model_maps(*viewer, media.picture(folder / f"pic{i}.png", "it"), {})[kind]
        row, column = np.unravel_index(values.argmax(), values.shape)
        found[f"pic{i}"] = ((column + 0.5) * 64 / values.shape[1], (row + 0.5) * 64 / values.shape[0])
    return found


def test_people_who_look_where_the_model_does_are_found(viewer, folder):
    """Fixations around the peaks of one map: people agree with each other beyond the centre bias."""
    model, processor = viewer
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = looked(folder, peaks(viewer, folder, "grad_cam"))
    found = compare_pictures(model, processor, data, resamples=100, seed=1)
    of = found["mean"].sel(metric="nss")
    assert float(of.sel(map="grad_cam")) > 0.8
    assert float(of.sel(map="people")) > float(of.sel(map="centre bias"))
    assert float(found["over_centre"].sel(map="people", metric="nss")) == pytest.approx(
        float(of.sel(map="people") - of.sel(map="centre bias"))
    )
    assert float(found["mean"].sel(map="centre bias", metric="information_gain")) == pytest.approx(0)
    assert float(found["p"].sel(map="grad_cam")) < 0.2  # of 24 orders of four pictures
    assert (found["low"].sel(map="people") <= found["mean"].sel(map="people") + 1e-9).all()
    layer, head = found.attrs["best_head"]
    assert float(found["heads"][layer, head]) == pytest.approx(float(of.sel(map="best head")))
    assert float(found["heads"].max()) == float(found["heads"][layer, head])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_table_of_all_pictures_is_nss(viewer):
    rng = np.random.default_rng(0)
    maps = rng.random((2, 3, SIDE, SIDE))
    paths = [
        {f"p{i}": Scanpath(rng.uniform(0, SIDE, (4, 2)), (SIDE, SIDE)) for i in range(2) if (i, j) != (1, 2)}
        for j in range(3)
    ]
    table = _nss_table(maps, paths, ["p0", "p1"])
    p0 = np.mean([nss(maps[1, (j + 1) % 3], paths[j]["p0"]) for j in range(3)])
    p1 = np.mean([nss(maps[1, (j + 1) % 3], paths[j]["p1"]) for j in range(2)])
    assert sum(table[1, (j + 1) % 3, j] for j in range(3)) == pytest.approx((p0 + p1) / 2)


def test_the_ceiling_needs_others(viewer, folder):
    found = compare_pictures(*viewer, looked(folder, {"pic0": (20, 20), "pic1": (40, 40)}, people=1), resamples=5)
    assert np.isnan(found["mean"].sel(map="people")).all()
    assert np.isfinite(found["mean"].sel(map="rollout")).all()


def test_places_on_the_screen_by_hand():
    path = Scanpath(np.array([[100.0, 50.0], [60.0, 40.0]]), (200, 100))
    assert on_picture(path, (100, 80), "centre").places.tolist() == [[50, 40], [10, 30]]
    assert on_picture(path, (50, 50), "fit").places.tolist() == [[25, 25], [5, 20]]  # twice as large, 50 from the left
    assert on_picture(path, (100, 100), "fill").places.tolist() == [[50, 50], [30, 40]]
    assert on_picture(path, (10, 10), (50, 0, 150, 100)).places.tolist() == [[5, 5], [1, 4]]
    assert on_picture(path, (200, 100), None).places.tolist() == path.places.tolist()
    with pytest.raises(ValueError, match=r"cat\.jpg is 10 x 10 and the screen 200 x 100 pixels: say how it was shown"):
        on_picture(path, (10, 10), None, "cat.jpg")
    with pytest.raises(ValueError, match="placed='left'"):
        on_picture(path, (10, 10), "left")


def test_what_is_missing_is_named(viewer, folder):
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 2 pictures: lost\. Give a folder"):
        compare_pictures(*viewer, looked(folder, {"pic0": (1, 1), "lost": (2, 2)}))
    with pytest.raises(ValueError, match="two that were looked at are needed: got 1"):
        compare_pictures(*viewer, looked(folder, {"pic0": (20, 20)}))


def test_it_is_drawn(viewer, folder, tmp_path):
    data = looked(folder, {"pic0": (20, 20), "pic1": (40, 40)})
    found = compare_pictures(*viewer, data, resamples=5)
    draw(found, tmp_path / "a.png", data)
    assert media.picture(tmp_path / "a.png", "it").width > 1000
    with pytest.raises(ValueError, match="and the data that it was given"):
        draw(found, tmp_path / "b.png")


def run(*given: object):
    return CliRunner().invoke(app, ["gaze", "compare", *map(str, given)], env={"COLUMNS": "240"})


def test_the_command(folder, tmp_path):
    looked(folder, {"pic0": (20, 20), "pic1": (40, 40)}).write(tmp_path / "a.csv")
    kept, plot = tmp_path / "a.json", tmp_path / "a.png"
    done = run("viewer", tmp_path / "a.csv", "--stimuli", folder, "--resamples", 9, "--json", kept, "--plot", plot)
    assert done.exit_code == 0, done.output
    for part in ("best head (layer", "centre bias", "people", "rollout", "grad_cam"):
        assert part in done.output
    told = json.loads(kept.read_text())
    assert told["mean"]["axes"] == ["map", "metric"]
    assert plot.stat().st_size > 10_000
    missing = run("viewer", tmp_path / "a.csv", "--screen", "64x64")
    assert missing.exit_code == 2
    assert "the 2 pictures that were looked at are no part of the data: pic0, pic1" in missing.output
    assert "no model that looks at pictures alone" in run("reader", tmp_path / "a.csv", "--stimuli", folder).output
    assert "of reading data in words" in run("viewer", tmp_path / "a.csv", "--out", tmp_path / "x").output
    apart = run("viewer", tmp_path / "a.csv", "--stimuli", folder, "--screen", "100x100")
    assert "pic0 is 64 x 64 and the screen 100 x 100 pixels: say how" in apart.output


@pytest.mark.skipif("REGARD_DATA" not in os.environ, reason="REGARD_DATA names no folder of public data")
@pytest.mark.parametrize("name", ["gaze_search_hybrid", "gaze_search_interiors"])
def test_sets_without_their_pictures_say_so(name):
    done = run("viewer", f"{os.environ['REGARD_DATA']}/{name}")
    assert done.exit_code == 2
    assert "pictures that were looked at are no part of the data" in done.output
    assert "--stimuli FOLDER" in done.output


@pytest.mark.skipif("REGARD_DATA" not in os.environ, reason="REGARD_DATA names no folder of public data")
def test_a_set_of_texts_wants_a_model_that_reads():
    done = run("viewer", f"{os.environ['REGARD_DATA']}/gaze_reading_webqamgaze")
    assert done.exit_code == 2
    assert "holds texts that people read" in done.output


@pytest.mark.skipif(
    not {"REGARD_DATA", "REGARD_MODELS"} <= set(os.environ), reason="needs public data and a real model"
)
def test_a_real_model_on_photographs():
    """People who look at the cat's face and the astronaut's; the last layers of DINOv2 do, too."""
    pictures = Path(os.environ["REGARD_DATA"]) / "pictures"
    rng = np.random.default_rng(0)
    trials = []
    for who in range(3):
        for name, place in (("cat.jpg", (215, 110)), ("astronaut.jpg", (195, 105)), ("flower.jpg", (235, 140))):
            size = media.picture(pictures / name, name).size
            trials.append(GazeTrial(f"p{who}", name, "", Scanpath(rng.normal(place, 20, (6, 2)), size)))
    model, processor = regard.load(f"{os.environ['REGARD_MODELS']}/dinov2-small", dtype=torch.float32)
    found = compare_pictures(model, processor, GazeData(tuple(trials), stimulus_folder=pictures), resamples=20)
    nss_of = found["mean"].sel(metric="nss")
    assert float(nss_of.sel(map="best head")) > 1
    assert float(nss_of.sel(map="people")) > float(nss_of.sel(map="centre bias"))
    assert found["heads"].shape == (12, 6)
    assert "grad_cam is left out" in found.attrs["notes"][0]
