"""Concepts and their importance: by hand, where methods have to agree, and on a network."""

from __future__ import annotations

import doctest
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t
from PIL import Image

from regard.attribution import concept_attribution
from regard.attribution.concept_attribution import activations, concept_importance, concepts, design, importance
from regard.evaluation import concepts as metrics
from regard.evaluation.concepts import concept_deletion_error, reconstruction_error, stability_score

DINO = Path(os.environ.get("REGARD_MODELS", "")) / "dinov2-small"
PICTURES = Path(os.environ.get("REGARD_DATA", "")) / "pictures"


def affine(codes):
    return 2 * codes[:, 0] - codes[:, 1] + 5


def test_an_affine_score_by_hand():
    codes = torch.tensor([[3.0, 1.0], [0.5, 2.0]])
    for method in ("gradient_x_input", "integrated_gradients", "occlusion"):
        assert torch.allclose(importance(codes, affine, method=method), torch.tensor([[6.0, -1], [1, -2]]), atol=1e-5)
    assert importance(codes, affine, method="gradient").tolist() == [[2, -1], [2, -1]]
    shares = importance(codes[:1], affine, method="sobol", steps=512)
    assert shares[0].tolist() == pytest.approx([36 / 37, 1 / 37], abs=0.03)
    few = importance(codes[:1], affine, method="sobol")
    assert few[0].tolist() == pytest.approx([36 / 37, 1 / 37], abs=0.15)


def test_methods_differ_where_the_score_is_not_affine():
    codes = torch.tensor([[2.0, 1.0]])
    square = lambda u: u[:, 0] ** 2 + u[:, 0] * u[:, 1]  # noqa: E731
    assert importance(codes, square).tolist() == [[10, 2]]
    assert importance(codes, square, method="occlusion").tolist() == [[6, 2]]
    whole = importance(codes, square, method="integrated_gradients", steps=64)
    assert whole.sum().item() == pytest.approx(6, abs=1e-3)  # it adds up


def test_one_concept_has_all_of_the_variance():
    codes = torch.tensor([[3.0]])
    assert importance(codes, lambda u: u[:, 0], method="sobol", steps=256).item() == pytest.approx(1, abs=0.05)
    masks = design(3, 8)
    assert masks.shape == (8 * 5, 3)
    assert (masks[0] == 0).all()  # the sequence is not scrambled
    mixed = masks[16:].reshape(3, 8, 3)
    for i in range(3):
        assert np.array_equal(mixed[i][:, i], masks[8:16, i])
        assert np.array_equal(np.delete(mixed[i], i, 1), np.delete(masks[:8], i, 1))


def test_the_scale_of_an_atom_changes_nothing():
    atoms, codes = torch.rand(3, 4), torch.rand(5, 3)
    head, scale = torch.rand(4), torch.tensor([1.0, 3.0, 0.5])
    for method in ("gradient_x_input", "integrated_gradients", "occlusion", "sobol"):
        one, other = (
            importance(u, lambda x, v=v: ((x @ v) @ head).tanh(), method=method)
            for u, v in ((codes, atoms), (codes / scale, atoms * scale[:, None]))
        )
        assert torch.allclose(one, other, atol=1e-5)


def test_factors():
    rng = np.random.default_rng(0)
    truth = np.array([[1.0, 0, 0, 2], [0, 3, 1, 0]])
    codes = rng.random((6, 5, 2)) * (rng.random((6, 5, 2)) < 0.5)
    given = codes @ truth
    for method in ("nmf", "pca"):
        made = concepts(given, n=2, method=method)
        assert made.codes.shape == (6, 5, 2)
        assert reconstruction_error(given, made.codes, made.atoms) < 0.02
        assert np.allclose(made.transform(given) @ made.atoms, given, atol=0.05)
    assert stability_score(concepts(given, n=2).atoms, truth) > 0.99
    clusters = concepts(given, n=2, method="kmeans")
    assert set(clusters.codes.sum(-1).flat) == {1}
    assert np.array_equal(clusters.transform(given), clusters.codes)
    assert reconstruction_error(given, clusters.codes, clusters.atoms) > 0.3


def test_refusals():
    with pytest.raises(ValueError, match="from 0 up"):
        concepts(-np.eye(3), n=2)
    with pytest.raises(ValueError, match="1 to 3 concepts"):
        concepts(np.eye(3), n=4)
    with pytest.raises(ValueError, match="finite"):
        concepts(np.array([[np.nan, 1.0]]), n=1)
    with pytest.raises(ValueError, match="kmeans"):
        concepts(np.eye(3), n=2, method="ica")
    with pytest.raises(ValueError, match="does not depend"):
        importance(torch.ones(1, 2), lambda u: torch.ones(1))
    with pytest.raises(ValueError, match="steps=1"):
        importance(torch.ones(1, 2), affine, steps=1)
    with pytest.raises(ValueError, match="dimensions"):
        concepts(np.eye(3), n=2).transform(np.eye(2))
    with pytest.raises(ValueError, match="one a concept"):
        concept_deletion_error(torch.ones(1, 2), torch.ones(1, 3), affine)


def resnet():
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "num_labels": 3, "layer_type": "basic"}
    return t.ResNetForImageClassification(t.ResNetConfig(**sizes)).eval()


def test_concepts_of_a_layer():
    model, inputs = resnet(), {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    layer = "resnet.encoder.stages.1"
    states = activations(model, inputs, layer)
    assert states.shape[-1] == 12
    made = concepts(states.numpy(), n=8, method="pca")  # as many as places
    ask = lambda method, of=layer, d=made: concept_importance(model, inputs, 1, dictionary=d, layer=of, method=method)  # noqa: E731
    found = ask("gradient_x_input")
    assert found.dims == ("batch", "row", "column", "concept")
    assert np.allclose(found.score, found.whole, atol=1e-4)  # so nothing is left out
    for method in ("integrated_gradients", "occlusion"):
        assert np.allclose(found, ask(method), atol=1e-4)  # a mean and a linear map are all that follows
    early = "resnet.encoder.stages.0"
    before = concepts(activations(model, inputs, early).numpy(), n=4, method="pca")
    assert not np.allclose(ask("gradient_x_input", early, before), ask("occlusion", early, before), atol=1e-2)
    shares = ask("sobol")
    assert shares.dims == ("batch", "concept")
    assert (shares.values >= 0).all()
    largest = abs(found.sum(("row", "column"))).values.argmax(1)
    assert (shares.values.argmax(1) == largest).all()  # of an additive score
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="has no module"):
        ask("occlusion", "resnet.none")


def test_deletion_of_concepts_by_hand():
    codes = torch.tensor([[1.0, 2.0, 3.0]])
    score = lambda u: u.sum(1)  # noqa: E731
    # without 3, 2 and 1, the score falls from 6 to 3, 1 and 0
    assert concept_deletion_error(codes, codes, score).tolist() == pytest.approx([7 / 3])
    assert concept_deletion_error(codes, -codes, score)[0] > concept_deletion_error(codes, codes, score)[0]
    places = torch.stack([codes, 0 * codes], 1)  # [item, place, concept]
    assert concept_deletion_error(places, codes, lambda u: u.sum((1, 2))) == concept_deletion_error(codes, codes, score)


@pytest.mark.skipif(not (DINO.is_dir() and PICTURES.is_dir()), reason="needs REGARD_MODELS and REGARD_DATA")
def test_concepts_of_photographs():
    model = t.AutoModel.from_pretrained(DINO).eval()
    photographs = [Image.open(PICTURES / f"{name}.jpg").convert("RGB").resize((112, 112)) for name in ("cat", "coffee")]
    pixels = torch.from_numpy(np.stack([np.asarray(one) for one in photographs])).movedim(-1, 1) / 255
    with torch.no_grad():
        states = model(pixel_values=(pixels - 0.45) / 0.226).last_hidden_state[:, 1:].double().numpy()
    halves = np.concatenate([states.clip(0), (-states).clip(0)], -1)  # from 0 up, with nothing lost
    made = {method: concepts(halves, n=6, method=method, iterations=1000) for method in ("nmf", "kmeans", "pca")}
    errors = {method: reconstruction_error(halves, one.codes, one.atoms) for method, one in made.items()}
    assert errors["pca"] < errors["nmf"] < errors["kmeans"] < 1
    own = made["nmf"].codes.mean(1)
    assert len(set((own / own.mean(0)).argmax(1))) == 2  # each has more of another concept than the other has


@pytest.mark.parametrize("module", [concept_attribution, metrics])
def test_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted
    assert not failed
