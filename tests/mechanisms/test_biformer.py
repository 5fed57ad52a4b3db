"""Routing between regions: by hand, given graphs, all regions, and the layer."""

from __future__ import annotations

import pytest
import torch

from regard.mechanisms.biformer import BiLevelRoutingAttention, biformer, route


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)[None, None, :, None]


def test_by_hand():
    """Mean queries 1 and -1, mean keys 2 and -2: each region picks itself, whose keys are alike."""
    query, key, value = column(1.0, 1, -1, -1), column(2.0, 2, -2, -2), column(1.0, 3, 5, 9)
    knobs = {"shape": (1, 4), "regions": (1, 2), "top": 1}
    assert route(query, key, **knobs).flatten().tolist() == [0, 1]
    assert biformer(query, key, value, **knobs).flatten().tolist() == [2.0, 2.0, 7.0, 7.0]
    assert biformer(-query, key, value, **knobs).flatten().tolist() == [7.0, 7.0, 2.0, 2.0]


@pytest.mark.parametrize("knobs", [{"regions": 3, "top": 9}, {"regions": 3, "top": 99}, {"regions": 1, "top": 1}])
def test_all_regions_are_full_attention(knobs):
    query, key, value = torch.randn(3, 2, 2, 77, 8)
    full = (query @ key.mT * 16**-0.5).softmax(-1) @ value
    torch.testing.assert_close(biformer(query, key, value, shape=(7, 11), **knobs), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads", [1, 4])
def test_a_given_graph(dtype, heads):
    """Other regions for each head and picture, of sizes that divide nothing; also what of a region is there."""
    torch.manual_seed(0)
    leaves = [torch.randn(2, h, 13 * 10, 8, dtype=dtype, requires_grad=True) for h in (4, 2, 2)]
    graph = torch.rand(2, heads, 12, 12).topk(3).indices
    mask = torch.rand(2, 1, 1, 130) < 0.8
    settings = {"shape": (13, 10), "size": (4, 4), "graph": graph, "mask": mask, "scale": 0.3}
    found = biformer(*leaves, **settings)
    right = biformer.spec.weights(*leaves[:2], causal=False, **settings) @ leaves[2].repeat_interleave(2, 1)
    given = torch.randn_like(right)
    ours, theirs = ([o, *torch.autograd.grad(o, leaves, given)] for o in (found, right))
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {}
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, **close)


def test_regions_that_change_places_take_their_output_along():
    query, key, value = torch.randn(3, 1, 2, 4, 16, 8)
    knobs = {"regions": 4, "top": 2}
    found = biformer(*(t.flatten(2, 3) for t in (query, key, value)), **knobs).unflatten(2, (4, 16))
    turned = biformer(*(t[:, :, [2, 0, 3, 1]].flatten(2, 3) for t in (query, key, value)), **knobs)
    torch.testing.assert_close(turned.unflatten(2, (4, 16)), found[:, :, [2, 0, 3, 1]])


def test_the_layer():
    """Padding that is masked leaves a picture that regions divide as it is; zeros that take part change another."""
    torch.manual_seed(0)
    layer, zeros = BiLevelRoutingAttention(16, 4, regions=3, top=2), None
    zeros = BiLevelRoutingAttention(16, 4, regions=3, top=2, padding="zeros")
    zeros.load_state_dict(layer.state_dict())
    whole, odd = torch.randn(2, 9, 12, 16), torch.randn(2, 10, 11, 16)
    torch.testing.assert_close(layer(whole), zeros(whole))
    assert layer(odd).shape == odd.shape
    assert not torch.allclose(layer(odd), zeros(odd), atol=1e-3)
    layer(odd).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


def test_refusals():
    x = torch.randn(1, 1, 12, 4)
    with pytest.raises(ValueError, match="has 16 positions"):
        biformer(x, x, x, shape=(4, 4))
    with pytest.raises(ValueError, match="1 region or more, of 1 token"):
        biformer(x, x, x, regions=0)
    with pytest.raises(ValueError, match="takes 1 region or more"):
        biformer(x, x, x, top=0)
    with pytest.raises(ValueError, match="numbers of the 3 regions"):
        biformer(x, x, x, size=4, graph=torch.full((1, 1, 3, 1), 3))
    with pytest.raises(ValueError, match="each region once"):
        biformer(x, x, x, size=4, graph=torch.zeros(1, 1, 3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="heads divide dim"):
        BiLevelRoutingAttention(10, 4)
