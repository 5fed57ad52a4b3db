"""Regions that ask patches."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from regard.gaze.brain_encoder import BrainEncoder, BrainEncoderConfig, explained_variance, sine_position

REGIONS, VOXELS, DIM = 3, 5, 8
MEMBERSHIP = torch.arange(REGIONS)[:, None] == torch.tensor([0, 0, 1, 2, 2])


def model(kind: str = "transformer", seed: int = 0, **knobs) -> BrainEncoder:
    torch.manual_seed(seed)
    sizes = {"heads": 2, "feedforward": 6, "places": 6, **knobs}
    net = BrainEncoder(
        BrainEncoderConfig(dim=DIM, regions=REGIONS, voxels=VOXELS, kind=kind, **sizes), MEMBERSHIP
    ).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def features(seed: int = 1, rows: int = 2, columns: int = 3):
    return torch.randn(2, DIM, rows, columns, generator=torch.Generator().manual_seed(seed))


def test_a_fixed_map_by_hand():
    net = BrainEncoder(BrainEncoderConfig(dim=1, regions=1, voxels=1, kind="spatial", places=2), torch.ones(1, 1))
    with torch.no_grad():
        net.maps.weight.copy_(torch.tensor([[0.0, math.log(3)]]))
        net.read.weight.fill_(2.0)
        net.read.bias.fill_(1.0)
    some = torch.tensor([2.0, 6.0]).view(1, 1, 1, 2)
    assert net.tokens(some).item() == pytest.approx(5)
    assert net(some).item() == pytest.approx(11)
    assert net.routing(some).flatten().tolist() == pytest.approx([0.25, 0.75])


def dense(net: BrainEncoder, some, position, mask):
    """The definition, head by head; custom attention has no value projection and takes the token's place."""
    value = some.flatten(2).mT
    key = value if position is None else value + position.flatten(1).T
    token = torch.zeros(len(some), REGIONS, DIM)
    custom = net.config.kind == "custom"
    for layer in net.layers:
        if custom:
            wq, wk, wv = layer.query.weight, layer.key.weight, torch.eye(DIM)
            bq, bk, bv = layer.query.bias, layer.key.bias, torch.zeros(DIM)
            out, asked = layer.out, token + net.queries.weight
        else:
            wq, wk, wv = layer.attention.in_proj_weight.chunk(3)
            bq, bk, bv = layer.attention.in_proj_bias.chunk(3)
            out, asked = layer.attention.out_proj, layer.norm_query(token) + net.queries.weight
        width, parts, maps = DIM // net.config.heads, [], []
        for head in range(net.config.heads):
            at = slice(head * width, (head + 1) * width)
            scores = (asked @ wq[at].T + bq[at]) @ (key @ wk[at].T + bk[at]).mT / width**0.5
            if mask is not None:
                scores = scores.masked_fill(mask.flatten(1)[:, None], -torch.inf)
            maps.append(scores.softmax(-1))
            parts.append(maps[-1] @ (value @ wv[at].T + bv[at]))
        found = out(torch.cat(parts, -1))
        token = found if custom else token + found
        token = token + layer.down(F.relu(layer.up(layer.norm_token(token))))
    return (token if custom else net.norm(token)), torch.stack(maps, 1)


@pytest.mark.parametrize("kind", ["transformer", "custom"])
@pytest.mark.parametrize("layers", [1, 2])
def test_it_is_the_definition(kind, layers):
    net, some = model(kind, layers=layers), features()
    position = sine_position(DIM, 2, 3)
    mask = torch.zeros(2, 2, 3, dtype=torch.bool)
    mask[0, 1] = True
    expected, maps = dense(net, some, position, mask)
    torch.testing.assert_close(net.tokens(some, position, mask), expected)
    torch.testing.assert_close(net.routing(some, position, mask).flatten(-2), maps)
    every = net.read(expected)
    by_hand = torch.stack([every[:, r, v] for v, r in enumerate([0, 0, 1, 2, 2])], 1)
    torch.testing.assert_close(net(some, position, mask), by_hand)


@pytest.mark.parametrize("kind", ["transformer", "custom"])
def test_attention_follows_content_and_a_fixed_map_does_not(kind):
    net, some, order = model(kind), features(), torch.tensor([4, 0, 5, 2, 1, 3])

    def moved(x):
        return x.flatten(-2)[..., order].unflatten(-1, x.shape[-2:])

    torch.testing.assert_close(net.tokens(moved(some)), net.tokens(some))
    position = sine_position(DIM, 2, 3)
    torch.testing.assert_close(net.tokens(moved(some), moved(position)), net.tokens(some, position))
    assert not torch.allclose(net.tokens(moved(some), position), net.tokens(some, position), atol=1e-3)
    torch.testing.assert_close(net.routing(moved(some)), moved(net.routing(some)))
    fixed = model("spatial")
    assert not torch.allclose(fixed.tokens(moved(some)), fixed.tokens(some), atol=1e-3)


@pytest.mark.parametrize("kind", ["transformer", "custom"])
def test_of_one_place_the_query_does_not_matter(kind):
    net, some = model(kind), features(rows=1, columns=1)
    before = net.tokens(some)
    with torch.no_grad():
        net.queries.weight.mul_(7)
    torch.testing.assert_close(net.tokens(some), before)


@pytest.mark.parametrize("kind", ["transformer", "custom"])
def test_places_behind_a_mask_may_hold_anything(kind):
    net, some, mask = model(kind), features(), torch.zeros(2, 2, 3, dtype=torch.bool)
    mask[:, :, 2] = True
    other = torch.where(mask[:, None], 50 * torch.ones_like(some), some)
    torch.testing.assert_close(net(some, None, mask), net(other, None, mask))
    assert not torch.allclose(net(some), net(other), atol=1e-3)
    with pytest.raises(ValueError, match="every place of picture 1"):
        mask[1] = True
        net(some, None, mask)


def test_positions_are_not_in_the_values():
    net, some = model("custom"), torch.ones(1, DIM, 2, 3)
    position = sine_position(DIM, 2, 3)
    torch.testing.assert_close(net.tokens(some, position), net.tokens(some))


def test_positions_are_detrs():
    code = sine_position(8, 3, 5)
    assert code.shape == (8, 3, 5)
    assert code[0, 1, 0].item() == pytest.approx(math.sin(2 / 3 * 2 * math.pi), abs=1e-5)  # second of three rows
    assert code[3, 1, 4].item() == pytest.approx(math.cos(2 / 3 * 2 * math.pi / 100), abs=1e-5)
    assert code[4, 2, 0].item() == pytest.approx(math.sin(2 * math.pi / 5), abs=1e-5)  # first of five columns
    assert torch.equal(code[:4, :, 0], code[:4, :, 3])
    with pytest.raises(ValueError, match="dim=6"):
        sine_position(6, 2, 2)


def test_gradients_reach_everything():
    for kind in ("transformer", "custom", "spatial"):
        net, some = model(kind), features().requires_grad_()
        net(some).square().sum().backward()
        assert some.grad.abs().sum() > 0
        for name, parameter in net.named_parameters():
            assert kind == "custom" or parameter.grad is not None, name


def test_a_double_check_of_gradients():
    net = model("custom").double()
    assert torch.autograd.gradcheck(lambda x: net(x), features().double().requires_grad_())


def test_explained_variance():
    response = torch.tensor([[0.0, 1, 1], [1, 1, 2], [2, 1, 4]])
    found = explained_variance(torch.tensor([[5.0, 0, 2], [7, 1, 4], [9, 2, 8]]), response)
    assert found[[0, 2]].tolist() == pytest.approx([1, 1])
    assert found[1].isnan()
    half = explained_variance(torch.tensor([[1.0], [0], [1]]), torch.tensor([[1.0], [0], [0]]), torch.tensor([0.5]))
    assert half.item() == pytest.approx(0.25 / 0.5)
    assert explained_variance(response, response, torch.tensor([0.5, 1, 0]))[2].isnan()
    with pytest.raises(ValueError, match=r"\[3, 3\] and \[3, 1\]"):
        explained_variance(response, response[:, :1])


@pytest.mark.parametrize(
    ("knobs", "membership", "message"),
    [
        ({}, torch.zeros(3, 5), "voxel 0 is in 0"),
        ({}, torch.ones(3, 5), "voxel 0 is in 3"),
        ({}, torch.ones(2, 5), r"3 by 5: got \[2, 5\]"),
        ({"kind": "linear"}, MEMBERSHIP, "'linear'"),
        ({"kind": "spatial"}, MEMBERSHIP, "places="),
        ({"heads": 3}, MEMBERSHIP, "heads=3"),
    ],
)
def test_refusals(knobs, membership, message):
    with pytest.raises(ValueError, match=message):
        BrainEncoder(BrainEncoderConfig(dim=DIM, regions=REGIONS, voxels=VOXELS, **{"heads": 2, **knobs}), membership)


def test_more_refusals():
    with pytest.raises(ValueError, match=r"\[batch, 8, row, column\]"):
        model()(torch.randn(2, 6, 4))
    with pytest.raises(ValueError, match="6 places: got 8"):
        model("spatial")(features(rows=2, columns=4))
