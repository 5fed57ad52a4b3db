"""Subspace attention: a uniform map by hand, what a map sums to, groups apart from each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regard.mechanisms.ulsam import ULSAM, cost


def test_without_weights_every_position_counts_alike():
    """Zero convolutions: 1 + 1/4 of a picture of 2 x 2."""
    block = ULSAM(8, groups=2).eval()
    for layer in (block.depthwise, block.pointwise):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = torch.randn(2, 8, 2, 2)
    torch.testing.assert_close(block(x), 1.25 * x)


def test_by_hand():
    """Logits of 0, 0, 0 and log 3 after the pooling: weights of 1/6 and 1/2."""
    block = ULSAM(1, groups=1).eval()
    block.depthwise_norm, block.pointwise_norm = nn.Identity(), nn.Identity()
    with torch.no_grad():
        for layer in (block.depthwise, block.pointwise):
            layer.weight.fill_(1.0)
            layer.bias.zero_()
    x = torch.zeros(1, 1, 1, 5)
    x[..., 0] = torch.log(torch.tensor(3.0))  # pooled to its neighbour too
    torch.testing.assert_close(block.maps(x)[0, 0, 0], torch.tensor([3.0, 3.0, 1.0, 1.0, 1.0]) / 9)


def test_maps_sum_to_one_and_groups_are_apart():
    torch.manual_seed(0)
    block, x = ULSAM(12, groups=3).eval(), torch.randn(2, 12, 5, 6)
    torch.testing.assert_close(block.maps(x).sum((2, 3)), torch.ones(2, 3))
    other = x.clone()
    other[:, 4:8] += 1
    changed = (block(other) != block(x)).any(0).any(1).any(1)
    assert changed.tolist() == [4 <= i < 8 for i in range(12)]


def test_a_map_of_negative_logits_has_no_gradient():
    block, x = ULSAM(4, groups=1).eval(), torch.randn(1, 4, 3, 3)
    nn.init.constant_(block.pointwise.bias, -1e3)
    block(x).square().sum().backward()
    assert not block.pointwise.weight.grad.any()


def test_parameters_and_cost():
    block = ULSAM(32, groups=4)
    assert sum(p.numel() for p in block.parameters()) == 5 * 32 + 3 * 4
    assert cost(14, 14, 32).operations == 2 * cost(7, 14, 32).operations == 6 * 14 * 14 * 32


def test_refusals():
    with pytest.raises(ValueError, match="ULSAM: 6 channels do not divide evenly by groups=4"):
        ULSAM(6, groups=4)
