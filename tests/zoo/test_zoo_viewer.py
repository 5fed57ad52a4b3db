"""The viewer is what its card says, and can be trained again."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import regard
from regard import zoo
from regard.cli import app
from regard.data.scenes import Object, Scene, render
from regard.zoo import training
from regard.zoo.recipes import viewer


@pytest.fixture(scope="module")
def loaded():
    return regard.load("viewer")


def test_it_names_what_fresh_scenes_show(loaded):
    now, card = viewer.measure(*loaded, seed=1, n=150), zoo.measured("viewer")["abilities"]
    for kind in viewer.MEASURED:
        for ability in ("class_accuracy", "attribute_accuracy"):
            assert now[kind + ability] > max(0.9, card[kind + ability] - 0.04), kind + ability


def test_it_is_small_and_whole(loaded):
    size = (zoo.folder("viewer") / "model.safetensors").stat().st_size
    assert size <= 2_500_000
    assert {p.name for p in zoo.folder("viewer").iterdir()} == {
        "README.md",
        "config.json",
        "measured.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    labels = loaded.model.config.id2label
    assert [labels[i] for i in range(80)] == list(viewer.PAIRS)
    assert labels[0] == "red circle"


def test_look(tmp_path):
    picture = tmp_path / "scene.png"
    render(Scene((Object("star", "red", "large", 0.5, 0.5),)), 32).image().save(picture)
    done = CliRunner().invoke(app, ["look", "viewer", "--image", str(picture), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "report.html").is_file()
    tree = regard.open(tmp_path / "out" / "recording.zarr").tree
    assert tree["encoder"].sizes["query"] == 65
    assert int(tree["encoder"]["key_row"].max()) == 7


TWO = Scene((Object("star", "red", "large", 0.3, 0.5), Object("fork", "blue", "large", 0.7, 0.5)))
ONE = Scene((Object("plate", "green", "small", 0.5, 0.5),))


def scores(*named: str) -> torch.Tensor:
    found = torch.full((len(viewer.PAIRS),), -5.0)
    for rank, pair in enumerate(named):
        found[viewer.PAIRS.index(pair)] = 2.0 - rank
    return found


def test_accuracies_by_hand():
    # two red stars are one label; the second best has the right shape only, and there is no third to name
    logits = torch.stack([scores("red star", "pink fork", "blue fork"), scores("green ring")])
    found = viewer.accuracies(logits, [TWO.plus(TWO.objects[0]), ONE])
    assert found["pair_accuracy"] == 1 / 3
    assert found["class_accuracy"] == 2 / 3  # star and fork, not the plate
    assert found["attribute_accuracy"] == 2 / 3  # red and green, not blue
    assert found["precision"] == 1 / 3  # red star of that, pink fork and green ring; zero is not above one half
    assert found["recall"] == 1 / 3


def test_a_shape_that_two_pairs_share_is_to_be_named_twice():
    scene = Scene((Object("star", "red", "large", 0.3, 0.5), Object("star", "blue", "large", 0.7, 0.5)))
    found = viewer.accuracies(scores("red star", "red fork")[None], [scene])
    assert found["class_accuracy"] == found["attribute_accuracy"] == found["pair_accuracy"] == 0.5


@pytest.mark.parametrize("size", [32, 64])
def test_what_covers_each_patch(size):
    scene = Scene((Object("square", "green", "large", 0.5, 0.5),))
    pictures = render(scene, size)
    shares = viewer.covered([scene], pictures)[0]
    assert torch.allclose(shares.sum(1), torch.ones(64))
    middle = 8 * 4 + 4
    assert shares[middle, viewer.PAIRS.index("green square")] == 1
    assert shares[0, -1] == 1
    assert shares[:, viewer.PAIRS.index("green square")].mean() == pytest.approx((pictures.owner == 0).mean())


def test_a_small_picture_is_enlarged_as_the_processor_does():
    image = render(TWO, 32)
    processed = viewer.processor()(images=image.image(), return_tensors="pt")["pixel_values"]
    assert (viewer.pixels(image) - processed).abs().max() < 0.01
    processed = viewer.processor()(images=render(TWO, 64).image(), return_tensors="pt")["pixel_values"]
    assert torch.allclose(viewer.pixels(render(TWO, 64)), processed, atol=1e-6)


def test_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT", 1)
    viewer.train(tmp_path / "whole", steps=3, batch=4)
    render_ = viewer.render
    calls = []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) > 2 * len(viewer.MIXTURE):
            raise KeyboardInterrupt
        return render_(*arguments)

    monkeypatch.setattr(viewer, "render", stop)
    with pytest.raises(KeyboardInterrupt):
        viewer.train(tmp_path / "stopped", steps=3, batch=4)
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    monkeypatch.setattr(viewer, "render", render_)
    viewer.train(tmp_path / "stopped", steps=3, batch=4)
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "stopped")]
    assert weights[0] == weights[1]
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "float32"
