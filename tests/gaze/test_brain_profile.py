"""Encoding models and representational similarity."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import regard
from regard.data import loaders
from regard.gaze.brain_profile import PENALTIES, brain_features, brain_profile, noise_ceiling, ridge
from regard.gaze.rsa import dissimilarities, rsa

DATA = Path(os.environ.get("REGARD_DATA", "")) / "brain_92objects"
needs_data = pytest.mark.skipif("REGARD_DATA" not in os.environ or not DATA.is_dir(), reason="set REGARD_DATA")


def planted(n: int = 120, seed: int = 0):
    """Two layers of two heads; voxel 0 reads head 1 of layer 0, voxel 1 all of layer 1, voxel 2 nothing."""
    rng = np.random.default_rng(seed)
    heads = rng.normal(size=(2, 2, n, 4))
    layers = np.concatenate([heads[:, 0], heads[:, 1]], -1)
    signal = np.stack([heads[0, 1] @ rng.normal(size=4), layers[1] @ rng.normal(size=8), np.zeros(n)], 1)
    signal += np.array([3.0, -2.0, 1.0])
    repeats = signal + rng.normal(size=(3, n, 3))
    features = {
        "layers": xr.DataArray(layers, dims=("layer", "batch", "dim")),
        "heads": xr.DataArray(heads, dims=("layer", "head", "batch", "dim")),
    }
    return features, repeats, signal


def test_what_was_planted_is_found():
    features, repeats, _ = planted()
    found = brain_profile(features, repeats.mean(0))
    assert found.layers.dims == ("layer", "voxel")
    assert found.heads.dims == ("layer", "head", "voxel")
    assert np.unravel_index(int(np.argmax(found.heads[..., 0].values)), (2, 2)) == (0, 1)
    assert found.heads[0, 1, 0] > 0.8
    assert abs(found.heads[1, 0, 0]) < 0.1
    assert found.layers[1, 1] > 0.8 > 0.3 > found.layers[0, 1]
    assert (found.layers[:, 2] < 0.05).all()
    assert (found.layers_error > 0).all()


def test_as_a_share_of_the_ceiling_a_planted_map_explains_about_all():
    features, repeats, signal = planted(400)
    ceiling = noise_ceiling(repeats)
    truth = signal.var(0) / (signal.var(0) + 1 / 3)
    assert ceiling == pytest.approx(truth, abs=0.1)
    assert ceiling[:2] == pytest.approx(truth[:2], abs=0.02)
    share = brain_profile({"heads": features["heads"]}, repeats.mean(0), ceiling=np.where(ceiling > 0.5, ceiling, 0))
    plain = brain_profile({"heads": features["heads"]}, repeats.mean(0))
    assert float(share.heads[0, 1, 0]) == pytest.approx(1, abs=0.05)
    assert float(share.heads[0, 1, 0]) == pytest.approx(float(plain.heads[0, 1, 0]) / ceiling[0])
    assert share.heads[..., 2].isnull().all()


def test_the_ceiling_by_hand():
    """Means 1 and 3, of variance 2; repeats differ by 2 each, a variance of 2, of which the mean has half."""
    assert noise_ceiling(np.array([[[0.0], [2.0]], [[2.0], [4.0]]])) == pytest.approx([0.5])
    assert noise_ceiling(np.ones((2, 3, 1))) == pytest.approx([0])


def test_ridge_is_that_of_the_normal_equations_and_chooses_as_leaving_out_does():
    rng = np.random.default_rng(1)
    for dim in (3, 30):
        x, new = rng.normal(size=(12, dim)), rng.normal(size=(5, dim))
        y = x[:, :2] @ rng.normal(size=(2, 4)) + rng.normal(size=(12, 4)) * [0.1, 1, 3, 10]
        size = (np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2).mean()

        def direct(x, y, new, scale, dim=dim):
            centred = x - x.mean(0)
            weights = np.linalg.solve(centred.T @ centred + scale * np.eye(dim), centred.T @ (y - y.mean(0)))
            return y.mean(0) + (new - x.mean(0)) @ weights

        losses = []
        for penalty in PENALTIES:
            left = [
                y[i] - direct(np.delete(x, i, 0), np.delete(y, i, 0), x[i : i + 1], penalty * size)[0]
                for i in range(12)
            ]
            losses.append(np.square(left).sum(0))
        best = np.argmin(losses, 0)
        assert len(set(best.tolist())) > 1
        expected = np.stack([direct(x, y, new, PENALTIES[b] * size)[:, v] for v, b in enumerate(best)], 1)
        np.testing.assert_allclose(ridge(x, y, new), expected, rtol=1e-7, atol=1e-9)


def test_scale_and_mean_of_features_do_not_matter():
    features, repeats, _ = planted()
    other = {"layers": features["layers"] * 1000 + 7}
    one, two = (brain_profile(f, repeats[0]).layers for f in ({"layers": features["layers"]}, other))
    np.testing.assert_allclose(one, two, atol=1e-8)


def test_nothing_is_told_of_shuffled_pictures():
    features, repeats, _ = planted()
    order = np.random.default_rng(3).permutation(120)
    assert (brain_profile(features, repeats.mean(0)[order]).heads < 0.1).all()
    even = brain_profile({"layers": features["layers"]}, np.full((120, 1), 2.0))
    assert even.layers.isnull().all()
    blank = brain_profile({"layers": 0 * features["layers"] + 4}, repeats[0])
    np.testing.assert_allclose(blank.layers, 0, atol=1e-9)


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_features_of_a_model(pool):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    model = ViTModel(config).eval()
    pixels = torch.randn(5, 3, 8, 8)
    found = brain_features(model, ({"pixel_values": some} for some in pixels.split(2)), pool=pool)
    assert {name: array.shape for name, array in found.items()} == {
        "inputs": (5, 16),
        "layers": (2, 5, 16),
        "heads": (2, 2, 5, 8),
    }
    kept = []
    last = model.layers[1].attention if hasattr(model, "layers") else model.encoder.layer[1].attention
    wide = next(m for name, m in last.named_modules() if name.endswith(("o_proj", "output.dense")))
    wide.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    states = model(pixels, output_hidden_states=True).hidden_states

    def pooled(x):
        return (x[:, 0] if pool == "first" else x.mean(1)).detach().numpy()

    np.testing.assert_allclose(found["layers"][1], pooled(states[2]), atol=1e-5)
    np.testing.assert_allclose(found["inputs"], pooled(states[0]), atol=1e-5)
    heads = pooled(kept[0]).reshape(5, 2, 8).swapaxes(0, 1)
    np.testing.assert_allclose(found["heads"][1], heads, atol=1e-5)


def test_rsa_of_a_copy_and_of_its_shuffle():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 30, 6))
    features = {"layers": xr.DataArray(x, dims=("layer", "batch", "dim"))}
    people = np.stack([dissimilarities(x[1] + 0.3 * rng.normal(size=x[1].shape)) for _ in range(5)])
    found = rsa(features, people)
    assert found.layers.argmax("layer") == 1
    assert found.layers[1] > found.attrs["ceiling_low"] - 0.05
    assert found.attrs["ceiling_low"] < found.attrs["ceiling_high"] < 1
    assert abs(found.layers[0]) < found.layers.attrs["chance"] < found.layers[1]
    given = {"layers": xr.DataArray(dissimilarities(x), dims=("layer", "batch", "other"))}
    np.testing.assert_allclose(rsa(given, people).layers, found.layers)


def test_rsa_by_an_oracle():
    from scipy.spatial.distance import pdist, squareform
    from scipy.stats import spearmanr

    rng = np.random.default_rng(2)
    x = rng.integers(0, 3, size=(9, 4)) + rng.normal(size=(9, 4)) * 0.01
    for distance in ("correlation", "euclidean"):
        np.testing.assert_allclose(dissimilarities(x, distance=distance), squareform(pdist(x, distance)), atol=1e-7)
    subject = squareform(rng.integers(0, 4, size=36).astype(float))  # with ties
    found = rsa({"layers": xr.DataArray(x, dims=("batch", "dim"))}, subject[None], distance="euclidean")
    assert float(found.layers) == pytest.approx(spearmanr(pdist(x), squareform(subject)).statistic)
    assert found.layers_error.isnull()
    assert np.isnan(found.attrs["ceiling_low"])


def test_the_ceiling_of_two_subjects():
    """Of two, the mean of the others is the other; ranks of three pairs: 1 2 3 and 1 3 2 correlate by 1/2."""
    one, two = np.zeros((3, 3)), np.zeros((3, 3))
    row, column = np.triu_indices(3, 1)
    one[row, column] = one[column, row] = [1, 2, 3]
    two[row, column] = two[column, row] = [1, 3, 2]
    found = rsa({"layers": xr.DataArray(one, dims=("batch", "other"))}, [one, two], shuffles=0)
    assert found.attrs["ceiling_low"] == pytest.approx(0.5)
    assert found.attrs["ceiling_high"] == pytest.approx(3 / 12**0.5)
    assert float(found.layers) == pytest.approx(0.75)


@needs_data
def test_92_objects():
    """Monkeys' cortex is nearer to people's than shapes of nothing, and so is animacy; both below the ceiling."""
    brains = loaders.brain_rdms(DATA)
    people = brains.human_sessions.mean(1)
    animate = brains.groups["animate"]
    models = {
        "monkey": xr.DataArray(brains.monkey, dims=("batch", "other")),
        "animate": xr.DataArray((animate[:, None] != animate).astype(float), dims=("batch", "other")),
        "random": xr.DataArray(np.random.default_rng(0).normal(size=(92, 20)), dims=("batch", "dim")),
    }
    found = rsa(models, people)
    assert found.attrs["subjects"] == 4
    assert 0.1 < found.attrs["ceiling_low"] < found.attrs["ceiling_high"] < 0.7
    assert found.monkey > found.monkey.attrs["chance"]
    assert found.animate > found.animate.attrs["chance"]
    assert abs(found.random) < 0.05
    assert found.monkey < found.attrs["ceiling_high"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": np.ones(5)}, "batch, voxel"),
        ({"folds": 1}, "folds=1 of 120"),
        ({"penalties": (0.0,)}, "above 0"),
        ({"ceiling": np.ones(2)}, "one number a voxel, 3"),
        ({"features": {}}, "no features"),
        ({"features": {"layer": xr.DataArray(np.ones((2, 120, 1)), dims=("layer", "batch", "dim"))}}, "than an axis"),
        ({"features": {"layers": xr.DataArray(np.ones((2, 120)), dims=("batch", "dim"))}}, "'layers' are"),
    ],
)
def test_refusals(change, message):
    features, repeats, _ = planted()
    given = {"features": features, "responses": repeats[0], **change}
    with pytest.raises(ValueError, match=message):
        brain_profile(given.pop("features"), given.pop("responses"), **given)


def test_more_refusals():
    model, tokenizer = regard.load("reader")
    padded = {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.tensor([[0, 1, 1]])}
    with pytest.raises(ValueError, match="batch 0 is padded"):
        brain_features(model, [padded])
    with pytest.raises(ValueError, match="no inputs"):
        brain_features(model, [])
    with pytest.raises(ValueError, match="of 4 things, subjects of 3"):
        rsa({"layers": xr.DataArray(np.eye(4), dims=("batch", "dim"))}, np.zeros((1, 3, 3)))
    with pytest.raises(ValueError, match="two of each at least"):
        noise_ceiling(np.ones((1, 3, 2)))
