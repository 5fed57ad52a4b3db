"""astigmatism: prototypes, refined features, the aligning loss and the distance of attention by hand and at limits."""

from __future__ import annotations

import math

import pytest
import torch
from families import build
from torch.nn import functional as F

import regard
from regard.objectives.astigmatism import (
    alignment,
    astigmatism,
    attention_distance,
    centre_periphery,
    covered,
    like,
    prototypes,
)

CLASSES, APART = torch.tensor([[0.8, 0.6], [0.0, 1.0]]), torch.tensor([0.0, -1.0])


def test_a_feature_takes_from_the_classes_that_it_is_like_by_hand():
    first, second = math.exp(0.8), 1.0
    w = first / (first + second)
    got = centre_periphery(torch.tensor([1.0, 0.0]), CLASSES, APART)
    assert torch.allclose(got, torch.tensor([1 + 0.8 * w, 0.6 * w + 1 - w]))
    assert torch.allclose(got, torch.tensor([1.552, 0.724]), atol=1e-3)
    sharp = centre_periphery(torch.tensor([1.0, 0.0]), CLASSES, APART, temperature=1e-3)
    assert torch.allclose(sharp, torch.tensor([1.8, 0.6]), atol=1e-5)
    alone = centre_periphery(torch.tensor([1.0, 0.0]), CLASSES[:1], APART, gamma_fg=2.0)
    assert torch.allclose(alone, torch.tensor([2.6, 1.2]))


def test_the_background_takes_of_its_own_and_the_rest_is_none():
    feature = torch.tensor([[0.1, -2.0], [-1.0, 0.0]])
    got = centre_periphery(feature, CLASSES, APART)
    assert torch.allclose(got, torch.tensor([[0.1, -2.5], [0.0, 0.0]]))
    kept = centre_periphery(feature, CLASSES, APART, keep=True)
    assert torch.allclose(kept, torch.tensor([[0.1, -2.5], [-1.0, 0.0]]))
    assert torch.equal(centre_periphery(feature, CLASSES, APART, tau_fg=1.0, tau_bg=1.0), torch.zeros(2, 2))
    assert torch.equal(centre_periphery(feature, CLASSES, APART, tau_fg=1.0, tau_bg=1.0, keep=True), feature)
    still = centre_periphery(feature, CLASSES, APART, tau_fg=-1.0, tau_bg=1.0, gamma_fg=0.0)
    assert torch.equal(still, feature)
    twice = centre_periphery(feature, CLASSES, APART, tau_fg=-1.1, tau_bg=-1.1, gamma_fg=0.0, gamma_bg=0.0)
    assert torch.equal(twice, 2 * feature)


def test_prototypes_are_means_inside_and_outside_of_boxes():
    boxes, classes = torch.tensor([[0.2, 0.2, 0.5, 0.5], [0.5, 0.0, 1.0, 0.4]]), torch.tensor([1, 0])
    inside = covered(boxes, classes, (2, 2), 3)
    assert inside.tolist() == [[False, True, False, False], [True, False, False, False], [False] * 4]
    features = torch.tensor([[[1.0, 2], [3, 4], [5, 6], [7, 8]], [[1.0, 0], [0, 1], [0, 0], [3, 3]]])
    both = torch.stack([inside[:2], covered(boxes[:1], classes[:1], (2, 2), 2)])
    foreground, background = prototypes(features, both)
    assert torch.allclose(foreground, torch.tensor([[3.0, 4], [1, 1]]))
    assert torch.allclose(background, torch.tensor([15.0, 18]) / 5)
    with pytest.raises(ValueError, match="no token lies in a box of class 2: leave"):
        prototypes(features[:1], inside[None])
    with pytest.raises(ValueError, match="no background"):
        prototypes(features[:1], torch.ones(1, 1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got \[2, 4, 2\] and \[1, 3, 4\]"):
        prototypes(features, inside[None])


def test_alignment_by_hand_and_at_its_limits():
    visual, text = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    rows = -math.log(math.e / (math.e + math.exp(0.6))), -math.log(math.exp(0.8) / (1 + math.exp(0.8)))
    columns = -math.log(math.e / (math.e + 1)), -math.log(math.exp(0.8) / (math.exp(0.6) + math.exp(0.8)))
    assert alignment(visual, text, tau=1.0).item() == pytest.approx((sum(rows) + sum(columns)) / 4)
    assert alignment(visual, visual, tau=1e-3).item() == pytest.approx(0, abs=1e-6)
    assert alignment(visual, visual.flip(0)).item() > 10
    leaf = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda some: alignment(some, F.one_hot(torch.arange(3), 4).double()), leaf)
    with pytest.raises(ValueError, match=r"got \[2, 2\], \[3, 2\]"):
        alignment(visual, torch.zeros(3, 2))


def test_distance_of_attention():
    own = torch.eye(5)[None, None]
    assert attention_distance(own, (2, 2)).item() == 0
    cls = torch.zeros(1, 1, 5, 5)
    cls[..., 0] = 1
    assert attention_distance(cls, (2, 2)).item() == 0  # its weight is left out
    uniform = torch.full((1, 3, 4, 4), 0.25)
    assert attention_distance(uniform, (2, 2), others=0).item() == pytest.approx((2 + math.sqrt(2)) / 4)
    with pytest.raises(ValueError, match="2 x 3 patches and 1 others"):
        attention_distance(own, (2, 3))


@torch.no_grad()
def test_in_a_model_patches_of_one_layer_are_refined_and_gammas_learn():
    model, inputs = build("vit")
    outer = [site.stack for site in regard.seam.sites.find(model).values()]
    states = model(**inputs, output_hidden_states=True).hidden_states[1]
    width = states.shape[-1]
    foreground, background = states[0, 1:3], states[1, 5]
    refine = astigmatism(foreground, background, layer=0, stack=outer[0])
    plain = model(**inputs).logits

    class Looker:
        def hidden(self, site, hidden):
            seen.append(hidden)
            return hidden

    seen = []
    with regard.intervene(model, refine, Looker()):
        changed = model(**inputs).logits
    assert torch.equal(seen[0][:, :1], states[:, :1])
    assert torch.allclose(seen[0][:, 1:], centre_periphery(states[:, 1:], foreground, background), atol=1e-5)
    assert not torch.allclose(changed, plain, atol=1e-4)
    assert torch.equal(model(**inputs).logits, plain)
    with torch.enable_grad():
        refine(states[:, 1:]).square().sum().backward()
    assert refine.raw.grad.abs().min() > 0
    with (
        pytest.raises(ValueError, match="has no layer 9"),
        regard.intervene(model, astigmatism(foreground, background, layer=9, stack=outer[0])),
    ):
        pass
    with pytest.raises(ValueError, match=rf"not as wide as prototypes, {width - 1}"):
        like(states, foreground[:, 1:], background[1:])


def test_prototypes_that_are_like_nothing_are_refused():
    with pytest.raises(ValueError, match="prototype of zeros"):
        centre_periphery(CLASSES, torch.zeros(2, 2), APART)
    with pytest.raises(ValueError, match=r"got \[2, 2\], \[3\]"):
        astigmatism(CLASSES, torch.ones(3), layer=0)
    with pytest.raises(ValueError, match="above 0, not 0 and 1"):
        astigmatism(CLASSES, APART, layer=0, gamma_fg=0, gamma_bg=1)
