"""CACE-Net: guidance at its limits, the contrast by hand, a net that learns, what is recorded."""

from __future__ import annotations

import math

import pytest
import torch

import regard
from regard.models.cace_net import CoGuidance, UnscaledAttention, cace_net, contrast

SIZES = {"visual": 16, "audio": 8, "hidden": 16, "classes": 3}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def inputs(segments: int = 5, rows: int = 3):
    return torch.randn(2, segments, rows, rows, 16), torch.randn(2, segments, 8)


def test_one_way():
    video, sound = inputs()
    model = CoGuidance(16, 8, psi=0.0).eval()
    assert torch.equal(model(video, sound)[1], sound)


def test_sound_is_raised_between_nothing_and_psi():
    video, sound = inputs()
    model = CoGuidance(16, 8).eval()
    raised = (model(video, sound)[1] / sound - 1) / 0.3
    assert ((raised > 0) & (raised < 1)).all()
    with torch.no_grad():
        model.guide.value.weight.zero_()
        model.guide.value.bias.zero_()
    torch.testing.assert_close(model(video, sound)[1], 1.15 * sound)  # a guide of zeros: half of psi


def test_places_have_no_order_and_one_place_is_all():
    video, sound = inputs()
    model = CoGuidance(16, 8).eval()
    seen, heard, places = model(video, sound)
    order = torch.randperm(9)
    moved = video.flatten(2, 3)[:, :, order].unflatten(2, (3, 3))
    again = model(moved, sound)
    torch.testing.assert_close(again[0], seen)
    torch.testing.assert_close(again[1], heard)
    torch.testing.assert_close(again[2].flatten(2), places.flatten(2)[..., order])
    torch.testing.assert_close(places.sum((2, 3)), torch.ones(2, 5))
    assert (model(*inputs(rows=1))[2] == 1).all()


def test_one_segment_is_guided_by_its_own_sound():
    video, sound = inputs(segments=1)
    model = CoGuidance(16, 8).eval()
    own = model.sound_norm(sound + model.sounds.value(sound))
    torch.testing.assert_close(model(video, sound)[1], sound * (1 + 0.3 * model.guide.value(own).sigmoid()))


def test_attention_by_hand():
    x = torch.tensor([[[math.log(3.0)], [0.0]]])
    # scores of the first: log 3 squared and 0, not scaled
    first = 3 ** math.log(3) / (3 ** math.log(3) + 1) * math.log(3)
    torch.testing.assert_close(UnscaledAttention()(x, x, x), torch.tensor([[[first], [math.log(3) / 2]]]))


def test_the_contrast_by_hand():
    alike, nothing = torch.ones(1, 2, 1), torch.zeros(1, 2, dtype=torch.bool)
    assert contrast(alike, alike, nothing).item() == pytest.approx(math.log(3), abs=1e-5)  # one of three belongs
    assert contrast(alike, alike, ~nothing).item() == pytest.approx(math.log(3), abs=1e-5)  # all three do: 0, and log 3
    apart = torch.tensor([[[1.0, 0], [0, 1]]])
    mixed = torch.tensor([[True, False]])
    # of each vector its other view belongs, at 1 / 0.5; two others are at 0
    expected = math.log(math.exp(2) + 2) - 2
    assert contrast(apart, apart, mixed, temperature=0.5).item() == pytest.approx(expected, abs=1e-6)


def test_it_learns_and_everything_has_a_gradient():
    video, sound = inputs()
    event, label = (
        torch.tensor([[True, True, False, False, False], [False, False, True, True, True]]),
        torch.tensor([0, 2]),
    )
    model = cace_net(**SIZES)
    optimiser, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(40):
        losses.append(model.loss(model(video, sound), event, label))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in model.parameters())
    found = model.eval()(video, sound)
    assert ((found.event > 0) == event).all()
    assert found.classes.argmax(1).tolist() == [0, 2]


def test_a_video_has_nothing_of_another():
    video, sound = inputs()
    model = cace_net(**SIZES).eval()
    torch.testing.assert_close(model(video, sound).event[1:], model(video[1:], sound[1:]).event)


def test_what_is_recorded():
    video, sound = inputs()
    model = CoGuidance(16, 8).eval()
    with regard.record(model, "entropy") as recording:
        model(video, sound)
    stacks = {name: dict(node["entropy"].sizes) for name, node in recording.tree.children.items()}
    assert stacks == {
        "sights": {"batch": 10, "layer": 2, "head": 1, "query": 9},
        "sounds": {"batch": 2, "layer": 1, "head": 1, "query": 5},
        "guide_cross": {"batch": 2, "layer": 1, "head": 1, "query": 5},
    }


def test_refusals():
    video, sound = inputs()
    with pytest.raises(ValueError, match=r"of as many segments; got \[2, 5, 3, 3, 16\] and \[2, 4, 8\]"):
        CoGuidance(16, 8)(video, sound[:, :4])
    with pytest.raises(ValueError, match="two views"):
        contrast(torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 3, dtype=torch.bool))
