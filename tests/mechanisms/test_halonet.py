"""Blocks with halos: by hand, limits, strides and positions."""

from __future__ import annotations

import pytest
import torch

from regard.mechanisms.halonet import HaloAttention, Positions, halonet


def test_by_hand():
    """Of a corner block's window of 16 places 9 are inside; with zeros outside these weigh 9/16."""
    zero, one = torch.zeros(1, 1, 16, 4), torch.ones(1, 1, 16, 1)
    knobs = {"shape": (4, 4), "block": 2, "halo": 1}
    assert torch.equal(halonet(zero, zero, one, **knobs), one)
    found = halonet(zero, zero, one, **knobs, padding="zeros").unflatten(2, (4, 4))[0, 0, :, :, 0]
    torch.testing.assert_close(found, torch.full((4, 4), 9 / 16))


def test_limits():
    """No halo: windows; blocks of one: sliding windows, cut; a halo as large as the picture: full attention."""
    query, key, value = torch.randn(3, 1, 2, 48, 8)
    full = (query @ key.mT * 8**-0.5).softmax(-1) @ value
    torch.testing.assert_close(halonet(query, key, value, shape=(6, 8), block=2, halo=8), full)
    corner = halonet(query, key, value, shape=(6, 8), block=2, halo=0).unflatten(2, (6, 8))[:, :, :2, :2]
    few = [t.unflatten(2, (6, 8))[:, :, :2, :2].flatten(2, 3) for t in (query, key, value)]
    right = (few[0] @ few[1].mT * 8**-0.5).softmax(-1) @ few[2]
    torch.testing.assert_close(corner.flatten(2, 3), right)
    weights = halonet.spec.weights(query, key, causal=False, mask=None, scale=None, shape=(6, 8), block=1, halo=1)
    assert (weights[0, 0] > 0).sum(1).unflatten(0, (6, 8))[0].tolist() == [4, 6, 6, 6, 6, 6, 6, 4]


@pytest.mark.parametrize("shape", [(8, 12), (7, 10)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strided_rows_are_those_of_the_whole(shape, bias, dtype):
    """With positions and key masks, values and gradients; the dense map, and rows of the output at stride 1."""
    torch.manual_seed(0)
    leaves = [torch.randn(2, h, shape[0] * shape[1], 8, dtype=dtype, requires_grad=True) for h in (4, 2, 2)]
    knobs = {"shape": shape, "block": 4, "halo": 2, "mask": torch.rand(2, 1, 1, shape[0] * shape[1]) < 0.8}
    if bias:
        leaves += [torch.randn(15, 8, dtype=dtype, requires_grad=True) for _ in range(2)]
        knobs["bias"] = Positions(*leaves[3:])
    whole = halonet(*leaves[:3], **knobs)
    for stride in (1, 2):
        found = halonet(*leaves[:3], **knobs, stride=stride)
        weights = halonet.spec.weights(*leaves[:2], causal=False, scale=None, **knobs, stride=stride)
        right = weights @ leaves[2].repeat_interleave(2, 1)
        rows = whole.unflatten(2, shape)[:, :, ::stride, ::stride].flatten(2, 3)
        close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {}
        torch.testing.assert_close(found, rows, **close)
        given = torch.randn_like(right)
        ours, theirs = ([o, *torch.autograd.grad(o, leaves, given, retain_graph=True)] for o in (found, right))
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other, **close)


def test_the_layer():
    """Channels and strides; every weight gets a gradient; means of 2 x 2 of the whole."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 8, 12)
    layer = HaloAttention(8, 2, dim_out=16, block=4, halo=1, stride=2)
    assert layer(x).shape == (2, 16, 4, 6)
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    mean = HaloAttention(8, 2, block=4, halo=1, stride=2, average=True)
    whole = HaloAttention(8, 2, block=4, halo=1)
    whole.load_state_dict(mean.state_dict())
    torch.testing.assert_close(mean(x), whole(x).unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5)))


def test_refusals():
    x = torch.randn(1, 1, 12, 4)
    with pytest.raises(ValueError, match="stride divides block"):
        halonet(x, x, x, shape=(3, 4), block=3, stride=2)
    with pytest.raises(ValueError, match="has 16 positions"):
        halonet(x, x, x, shape=(4, 4))
    with pytest.raises(ValueError, match="two tables of 7 vectors"):
        halonet(x, x, x, shape=(3, 4), block=2, halo=1, bias=Positions(torch.zeros(6, 4), torch.zeros(6, 4)))
    with pytest.raises(ValueError, match="padding is 'masked'"):
        halonet(x, x, x, shape=(3, 4), padding="mirror")
    with pytest.raises(ValueError, match="HaloAttention: was made for 8 channels"):
        HaloAttention(8, 2)(torch.randn(1, 6, 8, 8))
    with pytest.raises(ValueError, match="stride is 1 or 2"):
        HaloAttention(8, 2, stride=3)
