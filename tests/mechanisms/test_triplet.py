"""Triplet attention: by hand, without weights, the three axes under transposition, bounds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from regard.mechanisms.triplet import Triplet, cost


def filled(block: Triplet, centre: float, bias: float = 0.0) -> Triplet:
    for gate in (block.over_row, block.over_column, block.over_channel):
        nn.init.zeros_(gate.convolution.weight)
        gate.convolution.weight.data[:, :, 3, 3] = centre
        nn.init.constant_(gate.norm.bias, bias)
        gate.norm.eps = 0.0
    return block.eval()


def test_by_hand():
    """A map of the one number 2: all planes hold 2 and 2; centre weights of 1/4 make gates of sigmoid(1)."""
    output = filled(Triplet(), 0.25)(torch.full((1, 1, 1, 1), 2.0))
    torch.testing.assert_close(output, torch.full((1, 1, 1, 1), 1.4621172))


def test_without_weights_gates_are_of_the_bias():
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(filled(Triplet(), 0.0, 1.0)(x), torch.tensor(1.0).sigmoid() * x)


def test_written_out():
    """Each gate by permutation, as the paper draws it: the pooled axis first, largest before mean."""
    torch.manual_seed(0)
    block, x = Triplet().eval(), torch.randn(2, 4, 5, 6)

    def gated(gate, order):
        y = x.permute(order)
        planes = torch.stack([y.amax(1), y.mean(1)], 1)
        return (y * gate.norm(gate.convolution(planes)).sigmoid()).permute(order)  # each order undoes itself

    orders = (0, 2, 1, 3), (0, 3, 2, 1), (0, 1, 2, 3)
    gates = block.over_row, block.over_column, block.over_channel
    want = sum(gated(gate, order) for gate, order in zip(gates, orders, strict=True)) / 3
    torch.testing.assert_close(block(x), want)
    block.over_channel = None
    want = sum(gated(gate, order) for gate, order in zip(gates[:2], orders[:2], strict=True)) / 2
    torch.testing.assert_close(block(x), want)


def test_rows_and_columns_change_places():
    torch.manual_seed(0)
    block, x = Triplet().eval(), torch.randn(2, 4, 5, 6)
    other = copy.deepcopy(block)
    other.over_row, other.over_column = other.over_column, other.over_row
    for gate in (other.over_row, other.over_column, other.over_channel):
        gate.convolution.weight.data = gate.convolution.weight.data.mT.clone()
    torch.testing.assert_close(other(x.mT).mT, block(x))


def test_only_weakens():
    torch.manual_seed(0)
    block, x = Triplet().eval(), torch.randn(2, 4, 5, 6)
    assert (block(x).abs() <= x.abs()).all()
    assert (block(x).sign() == x.sign()).all()


def test_parameters_and_cost():
    block = Triplet()
    assert sum(p.numel() for p in block.parameters()) == 300
    assert block.over_row.norm.momentum == 0.01
    assert cost(3, 4, 5).operations == 2 * (98 * (5 * 4 + 3 * 5 + 3 * 4) + 3 * 60)


def test_refusals():
    with pytest.raises(ValueError, match="kernel is odd"):
        Triplet(kernel=4)
