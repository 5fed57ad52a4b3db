"""Weights of positions alone: by hand, shifts, a wave function, and a layer in another model."""

from __future__ import annotations

import pytest
import torch
from families import VISION
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from regard.mechanisms.position_only import PositionOnly, WaveFunction, cost, log_cosh, position_only, shifts


def test_by_hand():
    """V 3, W 1, alpha [[0, 1], [2, 0]], tokens 1 and 10: 30 and 6."""
    layer = PositionOnly(1, heads=1, tokens=2)
    for linear, weight in ((layer.value, 3.0), (layer.output, 1.0)):
        nn.init.constant_(linear.weight, weight)
    layer.alpha.data = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
    assert layer(torch.tensor([[[1.0], [10.0]]])).flatten().tolist() == [30.0, 6.0]
    causal = PositionOnly(1, heads=1, tokens=2, causal=True)
    causal.load_state_dict(layer.state_dict())
    assert causal(torch.tensor([[[1.0], [10.0]]])).flatten().tolist() == [0.0, 6.0]


def test_shifts():
    """On a ring of three a query's own number is the first, the next token's the second."""
    assert shifts((3,)).tolist() == [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
    assert shifts((2, 2))[1].tolist() == [1, 0, 3, 2]


def test_shifting_tokens_of_a_grid():
    layer, hidden = PositionOnly(6, heads=2, tokens=12, grid=(3, 4)).double(), torch.randn(2, 3, 4, 6).double()

    def run(tokens):
        return layer(tokens.flatten(1, 2)).unflatten(1, (3, 4))

    moved = run(hidden.roll((1, 2), (1, 2)))
    torch.testing.assert_close(moved, run(hidden).roll((1, 2), (1, 2)))
    plain = PositionOnly(6, heads=2, tokens=12).double()
    assert not torch.allclose(plain(hidden.flatten(1, 2)).roll(1, 1), plain(hidden.flatten(1, 2).roll(1, 1)))


def test_wave_function_under_shifts():
    """By a patch nothing changes; by part of one it may."""
    model = WaveFunction((4, 6), (2, 2), dim=8, heads=2, layers=2).double()
    spins = torch.randint(0, 2, (5, 4, 6)).double() * 2 - 1
    found = model(spins)
    assert found.dtype == torch.complex128
    torch.testing.assert_close(model(spins.roll((2, 4), (1, 2))), found, rtol=0, atol=1e-10)
    assert not torch.allclose(model(spins.roll(1, 1)), found)
    with pytest.raises(ValueError, match="takes spins"):
        model(spins[:, :2])


def test_log_cosh():
    z = torch.complex(torch.randn(20), torch.randn(20)).to(torch.complex128)
    torch.testing.assert_close(log_cosh(z).exp(), z.cosh())
    assert log_cosh(torch.tensor(-800 + 1j).to(torch.complex128)).real.item() == pytest.approx(800 - 0.693147)


def test_in_another_model():
    model = ViTForImageClassification(ViTConfig(**VISION)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(pixels).logits
    undo = position_only(model, tokens=17)
    model(pixels, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    undo()
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, before)
    position_only(model, tokens=16)
    with pytest.raises(ValueError, match="has weights for 16 tokens"):
        model(pixels)


def test_refuses_and_cost():
    with pytest.raises(ValueError, match="a grid holds the tokens"):
        PositionOnly(4, heads=2, tokens=5, grid=(2, 2))
    with pytest.raises(ValueError, match="patches fill the lattice"):
        WaveFunction((4, 5), (2, 2))
    assert cost(100, 8).operations == 2 * 8 * 100**2
