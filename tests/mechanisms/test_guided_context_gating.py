"""Guided context gating: context by hand in both forms, half-open gates, positions in any order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regard.mechanisms.guided_context_gating import GuidedContextGating, cost


@pytest.mark.parametrize(("pool", "context"), [("softmax", 2.0), ("sum", 5.0)])
def test_context_by_hand(pool, context):
    """One channel of ones, 2 x 2, weights of 1: the mean of positions is 1, their sum 4."""
    block = GuidedContextGating(1, reduction=1, pool=pool)
    for layer in (block.squeeze, block.widen):
        nn.init.ones_(layer.weight)
    nn.init.zeros_(block.score.weight)
    torch.testing.assert_close(block.context(torch.ones(1, 1, 2, 2)), torch.full((1, 1, 2, 2), context))


def test_softmax_weighs_positions():
    block = GuidedContextGating(1, reduction=1)
    for layer in (block.score, block.squeeze, block.widen):
        nn.init.ones_(layer.weight)
    x = torch.tensor([0.0, 3.0]).log1p().view(1, 1, 1, 2)  # logits 0 and log 4: weights of 1/5 and 4/5
    want = x + 0.8 * torch.tensor(4.0).log()
    torch.testing.assert_close(block.context(x), want)


def test_a_switch_without_weights_is_half_open():
    block, x = GuidedContextGating(16), torch.randn(2, 16, 4, 5)
    nn.init.zeros_(block.switch.weight)
    torch.testing.assert_close(block(x), x / 2)


def test_without_a_way_back_the_context_is_the_features():
    block, x = GuidedContextGating(16), torch.randn(2, 16, 4, 5)
    nn.init.zeros_(block.widen.weight)
    assert torch.equal(block.context(x), x)


def test_positions_in_any_order():
    torch.manual_seed(0)
    block, x = GuidedContextGating(16), torch.randn(2, 16, 4, 5)
    order = torch.randperm(20)

    def shuffled(x):
        return x.flatten(2)[..., order].unflatten(2, (4, 5))

    torch.testing.assert_close(block(shuffled(x)), shuffled(block(x)))
    assert block.gate(x).shape == (2, 1, 4, 5)


def test_cost():
    assert cost(4, 5, 16).operations == 4 * 20 * 256 + 8 * 20 * 16 + 4 * 256 // 8


def test_refusals():
    with pytest.raises(ValueError, match=r"pool is one of .*'softmax', 'sum'"):
        GuidedContextGating(16, pool="mean")
    with pytest.raises(ValueError, match="a bottleneck of 4 / 8 channels has none"):
        GuidedContextGating(4)
