"""Channel attention by hand and against timm; windows, their padding, and what a recording sees of them."""

from __future__ import annotations

import math

import pytest
import torch
from golden.mechanisms import davit as theirs
from golden.mechanisms._maps import loaded
from torch import nn

import regard
from regard.mechanisms.davit import ChannelAttention, ChannelBlock, WindowBlock, channel, cost


def test_by_hand():
    """One token, query (1, 0), key (2, 0): weights softmax(sqrt 2, 0) and 1/2 each."""
    query, key, value = (torch.tensor(v).view(1, 1, 1, 2) for v in ([1.0, 0.0], [2.0, 0.0], [3.0, 5.0]))
    share = math.exp(math.sqrt(2)) / (math.exp(math.sqrt(2)) + 1)
    assert share == pytest.approx(0.8044, abs=1e-4)
    want = torch.tensor([3 * share + 5 * (1 - share), 4.0])
    torch.testing.assert_close(channel(query, key, value)[0, 0, 0], want)


def test_without_queries_channels_are_averaged():
    query, value = torch.zeros(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    torch.testing.assert_close(
        channel(query, torch.randn_like(value), value), value.mean(-1, keepdim=True).expand_as(value)
    )


def test_tokens_in_any_order_and_masked_ones_left_out():
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, 7, 4) for _ in range(3)]
    order = torch.randperm(7)
    torch.testing.assert_close(channel(*(p[:, :, order] for p in parts)), channel(*parts)[:, :, order])
    there = torch.tensor([True] * 5 + [False] * 2).view(1, 1, 1, 7)
    output = channel(*parts, mask=there)
    torch.testing.assert_close(output[:, :, :5], channel(*(p[:, :, :5] for p in parts)))
    assert not output[:, :, 5:].any()


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("bent", [False, True])
def test_channel_blocks_are_timms(second, bent):
    timm = pytest.importorskip("timm.models.davit", exc_type=ImportError)
    torch.manual_seed(0)
    block = timm.ChannelBlock(16, 4, qkv_bias=True, cpe_act=bent, v2=second).double().eval()
    ours = ChannelBlock(16, 4, bent=bent, scaled_by="positions" if second else "dim")
    loaded(ours, theirs.to_ours(block.state_dict(), second=second, spatial=False), theirs.NAMES)
    x = torch.randn(2, 16, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(ours(x), block(x))


@pytest.mark.parametrize("size", [(8, 12), (9, 11)])
def test_window_blocks_are_timms(size):
    timm = pytest.importorskip("timm.models.davit", exc_type=ImportError)
    torch.manual_seed(0)
    block = timm.SpatialBlock(16, 4, window_size=4).double().eval()
    ours = loaded(WindowBlock(16, 4, window=4), block.state_dict(), theirs.NAMES)
    x = torch.randn(2, 16, *size, dtype=torch.float64)
    torch.testing.assert_close(ours(x), block(x))


def test_windows_keep_to_themselves_and_channels_see_all():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 12, 12, requires_grad=True)
    for block, far in ((WindowBlock(8, 2, window=4), False), (ChannelBlock(8, 2), True)):
        (grad,) = torch.autograd.grad(block(x)[..., 0, 0].sum(), x)
        assert bool(grad[..., -1, -1].any()) == far
        assert grad[..., 0, 0].any()


def test_masked_padding_takes_no_part():
    """A window that is half padding attends like one that is cut there."""
    torch.manual_seed(0)
    masked, zeros = (WindowBlock(8, 2, window=4, padding=p) for p in ("masked", "zeros"))
    zeros.load_state_dict(masked.state_dict())
    cut = WindowBlock(8, 2, window=2)
    cut.load_state_dict(masked.state_dict())
    x = torch.randn(2, 2, 2, 8)
    torch.testing.assert_close(masked.attend(x), cut.attend(x))
    assert not torch.allclose(zeros.attend(x), cut.attend(x))
    whole = torch.randn(1, 8, 8, 8)
    torch.testing.assert_close(masked(whole), zeros(whole))


def test_recorded():
    """Each window is a row of the batch, its tokens are the keys; channel attention is no site."""
    model = nn.Sequential(ChannelBlock(8, 2), WindowBlock(8, 2, window=4)).eval()
    x = torch.randn(2, 8, 8, 12)
    with torch.no_grad():
        want = model(x)
        with regard.record(model, "entropy") as recording:
            got = model(x)
    torch.testing.assert_close(got, want)
    (node,) = (n for n in recording.tree.subtree if "entropy" in n.data_vars)
    assert dict(node["entropy"].sizes) | {"layer": 1} == {"layer": 1, "batch": 12, "head": 2, "query": 16}
    assert "0.attention" not in str(recording.tree.attrs.get("sites", ""))


def test_cost():
    assert cost(8, 8, 32, heads=4).operations == 4 * 64 * 32 * 8
    assert cost(8, 8, 32, heads=4, window=7).operations == 4 * 64 * 49 * 32


def test_refusals():
    x = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="of the same tokens"):
        channel(x, x[:, :, :3], x)
    with pytest.raises(ValueError, match="which tokens there are"):
        channel(x, x, x, mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="scaled_by is one of"):
        ChannelAttention(8, 2, scaled_by="tokens")
    with pytest.raises(ValueError, match="9 channels do not divide evenly by heads=2"):
        WindowBlock(9, 2)
    with pytest.raises(ValueError, match="padding 'zeros' or 'masked'"):
        WindowBlock(8, 2, padding="reflect")
