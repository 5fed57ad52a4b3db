"""The lookout is what its card says: it names many small shapes, and its planted registers are where they should be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import regard
from regard import zoo
from regard.data.scenes import Object, Scene, render, sample
from regard.zoo import training
from regard.zoo.recipes import lookout, viewer


@pytest.fixture(scope="module")
def loaded():
    return regard.load("lookout")


def test_it_names_what_fresh_scenes_show(loaded):
    card = zoo.measured("lookout")["abilities"]
    for name, (_, dials) in lookout.MEASURED.items():
        scenes = [sample(dials, lookout.HELD_OUT + 1, i) for i in range(100)]
        now = viewer.accuracies(lookout.scores(loaded.model, viewer.pixels(render(scenes))), scenes)
        assert now["pair_accuracy"] > max(0.85, card[f"{name}pair_accuracy"] - 0.04), name


def test_its_registers_are_as_on_the_card(loaded):
    now, card = lookout.registers(loaded.model, seed=1, n=100), zoo.measured("lookout")["abilities"]
    assert now["outliers"] == pytest.approx(card["outliers"], abs=0.3)
    assert now["outlier_norm"] == pytest.approx(card["outlier_norm"], abs=0.5)
    assert now["outlier_background"] > 0.95
    assert abs(now["without_all_points"]) <= 2


def test_the_planted_neurons_make_the_outliers(loaded):
    config = loaded.model.config
    planted = config.planted
    scenes = [sample(lookout.many(0.7), lookout.HELD_OUT + 2, i) for i in range(40)]
    pixels = viewer.pixels(render(scenes))
    write = loaded.model.vit.layers[planted["layer"]].mlp.fc2.weight

    @torch.inference_mode()
    def count() -> float:
        hidden = loaded.model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        return float(lookout.outliers(hidden).sum(1).float().mean())

    before = write[:, planted["neurons"]].detach().clone()
    with torch.no_grad():
        there = count()
        write[:, planted["neurons"]] = 0
        gone = count()
        write[:, planted["neurons"]] = before
    assert there > 0.5
    assert gone < there / 10
    directions = torch.nn.functional.normalize(before, dim=0)
    assert torch.allclose((directions.T @ directions).abs(), torch.ones(8, 8), atol=1e-2)  # all write along one


def test_outliers_by_hand():
    hidden = torch.ones(1, 5, 4)
    hidden[0, 3] *= 3
    hidden[0, 4] *= 2.9
    assert lookout.outliers(hidden).tolist() == [[False, False, False, True, False]]


def test_black_blocks_and_what_is_left():
    scene = Scene((Object("square", "green", "large", 0.5, 0.5), Object("star", "red", "small", 0.15, 0.15)))
    whole = render([scene] * 200)
    left = lookout.blackened(whole, np.random.default_rng(0))
    black = (left.owner != whole.owner) | ((left.pixels == 0).all(-1) & (whole.pixels != 0).any(-1))
    assert 0.15 < black.any((1, 2)).mean() < 0.35  # a quarter of the pictures
    assert (left.owner[black] == -1).all()
    assert black[black.any((1, 2))].mean((1, 2)).max() < 0.8
    labels, known = lookout.remaining([scene] * 200, whole, left)
    square, star = (viewer.PAIRS.index(pair) for pair in ("green square", "red star"))
    assert labels[~torch.from_numpy(black.any((1, 2)))][:, [square, star]].all()
    for i in range(200):
        share = (left.owner[i] == 1).sum() / (whole.owner[i] == 1).sum()
        assert labels[i, star] == (share >= 0.5)
        assert bool(known[i, star]) == (share >= 0.5 or share <= 0.15)
    assert labels.sum(1).max() == 2


def test_the_flattest_patches_are_background():
    scene = Scene((Object("square", "green", "large", 0.5, 0.5),), texture="grain")
    pictures = render([scene])
    background = viewer.covered([scene], pictures)[..., -1]
    chosen = lookout.flattest(viewer.pixels(pictures), background)
    assert chosen.sum() == lookout.CHOSEN
    assert (background[chosen] == 1).all()
    flat = viewer.pixels(pictures)
    flat[:, :, 8:16, 16:24] = 0.3  # patch of row 1, column 2
    assert lookout.flattest(flat, background)[0, 8 + 2]


def test_the_grown_viewer_is_the_viewer():
    taught = regard.load("viewer").model
    grown = lookout.grown(taught).eval()
    pixels = viewer.pixels(render([sample(viewer.SEVERAL, 1, i) for i in range(4)]))
    with torch.inference_mode():
        assert torch.allclose(grown(pixels).logits, taught(pixels).logits, atol=1e-4)
    assert grown.config.intermediate_size == taught.config.intermediate_size + lookout.PLANTED


def test_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT", 1)
    lookout.train(tmp_path / "whole", steps=2, after=2, batch=6)
    render_, calls = lookout.render, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) > 3 * len(lookout.MIXTURE):
            raise KeyboardInterrupt
        return render_(*arguments)

    monkeypatch.setattr(lookout, "render", stop)
    with pytest.raises(KeyboardInterrupt):
        lookout.train(tmp_path / "stopped", steps=2, after=2, batch=6)
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    monkeypatch.setattr(lookout, "render", render_)
    lookout.train(tmp_path / "stopped", steps=2, after=2, batch=6)
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "stopped")]
    assert weights[0] == weights[1]


def test_it_is_small_and_whole():
    assert (zoo.folder("lookout") / "model.safetensors").stat().st_size <= 2_500_000
    assert {p.name for p in zoo.folder("lookout").iterdir()} == {
        "README.md",
        "config.json",
        "measured.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
