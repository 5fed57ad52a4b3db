"""Short and long convolutions that become one, and linear attention in tiles."""

from __future__ import annotations

import pytest
import torch
from families import VISION
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from regard.mechanisms.chela import Chela, ShortLongConvolution, chela, cost, linear


def test_convolution_by_hand():
    """A short kernel of 1 and 1/2 and a long one of 1/4 at its third: 1, 1/2, 1/4, 0 before SiLU."""
    layer = ShortLongConvolution(1, short=2, length=4)
    nn.init.zeros_(layer.omega)
    layer.short.data = torch.tensor([[1.0, 0.5]])
    layer.reach = lambda: torch.tensor([[0.0, 0.0, 0.25, 0.0]])
    found = layer(torch.tensor([1.0, 0.0, 0.0, 0.0])[None, :, None])
    torch.testing.assert_close(found.flatten(), nn.functional.silu(torch.tensor([1.0, 0.5, 0.25, 0.0])))


def test_long_kernel():
    """Pieces of 16, 16, 32 and 64, half the weight each, of unit energy; without it nothing reaches past the taps."""
    layer = ShortLongConvolution(2, short=3, length=100).double()
    assert [p.shape for p in layer.long] == [(2, 16)] * 4
    torch.testing.assert_close(layer.reach().norm(dim=1), torch.ones(2).double())
    nn.init.ones_(layer.long)
    kernel = layer.reach()[0]
    torch.testing.assert_close(kernel[[0, 16, 40, 99]] / kernel[0], torch.tensor([1.0, 0.5, 0.25, 0.125]).double())
    impulse = torch.zeros(1, 100, 2).double()
    impulse[:, 0] = 1
    assert layer(impulse)[0, -1].abs().min() > 1e-3
    nn.init.zeros_(layer.long)
    assert layer(impulse)[0, 3:].abs().max() < 1e-12


@pytest.mark.parametrize("causal", [False, True])
def test_merged_equals_unmerged(causal):
    layer = Chela(8, z=4, length=50, causal=causal, chunk=8).double()
    hidden, there = torch.randn(2, 40, 8).double(), torch.arange(40).lt(30).expand(2, -1)
    other = hidden.clone()
    other[:, 30:] += torch.randn(2, 10, 8)
    before = layer(hidden)
    torch.testing.assert_close(layer(hidden, mask=there)[:, :30], layer(other, mask=there)[:, :30])
    if causal:
        torch.testing.assert_close(before[:, :30], layer(other)[:, :30], rtol=0, atol=1e-12)
    before.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    numbers = sum(p.numel() for p in layer.move.parameters())
    layer.move.merge()
    torch.testing.assert_close(layer(hidden), before, rtol=0, atol=1e-12)
    assert sum(p.numel() for p in layer.move.parameters()) != numbers


def test_tiles_equal_the_map():
    leaves = [torch.randn(2, 1, 37, d, dtype=torch.float64).requires_grad_() for d in (4, 4, 6)]
    found, right = linear(*leaves, causal=True, chunk=8), (leaves[0] @ leaves[1].mT).tril() @ leaves[2]
    torch.testing.assert_close(found, right)
    given = torch.randn_like(right)
    for ours, theirs in zip(torch.autograd.grad(found, leaves, given), torch.autograd.grad(right, leaves, given)):
        torch.testing.assert_close(ours, theirs)


def test_in_another_model():
    model = ViTForImageClassification(ViTConfig(**VISION)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(pixels).logits
    undo = chela(model, z=8, length=17)
    model(pixels, labels=torch.tensor([0, 1])).loss.backward()
    undo()
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, before)


def test_refuses_and_cost():
    with pytest.raises(ValueError, match="give it a length"):
        Chela(8, z=4, length=20)(torch.randn(1, 21, 8))
    with pytest.raises(ValueError, match="1 tap or more"):
        ShortLongConvolution(8, short=0)
    with pytest.raises(ValueError, match="1 token or more"):
        Chela(8, z=4, chunk=0)
    assert 2 < cost(2**17, 64).operations / cost(2**16, 64).operations < 2.1
