"""Two branches and what weighs them: by hand, at both ends of the temperature, pictures apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regard.mechanisms.attention_in_attention import AttentionInAttention, cost


def test_weights_by_hand():
    """Logits of 3 and 0 over 30: softmax(0.1, 0), the branch with attention first."""
    block = AttentionInAttention(4)
    nn.init.eye_(block.first.weight.data[..., 0, 0])
    block.squeeze[0].weight.data.fill_(0.25)
    block.squeeze[2].weight.data = torch.tensor([[3.0], [0.0]])
    torch.testing.assert_close(
        block.branch_weights(torch.ones(1, 4, 3, 3))[0], torch.tensor([0.52498, 0.47502]), atol=1e-5, rtol=0
    )


def test_without_logits_branches_count_alike():
    """And without the plain branch and with gates of a half, a quarter of what two convolutions make is left."""
    torch.manual_seed(0)
    block, x = AttentionInAttention(8), torch.randn(2, 8, 5, 6)
    for layer in (block.squeeze[2], block.plain, block.pixel):
        nn.init.zeros_(layer.weight)
    nn.init.zeros_(block.pixel.bias)
    features = nn.functional.leaky_relu(block.first(x), 0.2)
    mixed = block.after(block.inside(features) / 2) / 2
    torch.testing.assert_close(block(x), x + block.last(nn.functional.leaky_relu(mixed, 0.2)))
    assert torch.equal(block.branch_weights(x), torch.full((2, 2), 0.5))


def test_both_ends_of_the_temperature():
    torch.manual_seed(0)
    x = torch.randn(8, 16, 5, 6)
    blocks = [AttentionInAttention(16, temperature=t) for t in (1e-7, 1e7)]
    for block in blocks:
        block.squeeze[1] = nn.Identity()  # a ReLU may leave both logits at 0
    cold, warm = (block.branch_weights(x) for block in blocks)
    assert (cold.amax(1) > 0.999).all()
    torch.testing.assert_close(warm, torch.full((8, 2), 0.5))


def test_the_lighter_form():
    block = AttentionInAttention(40, plain=1)
    assert block.plain.weight.shape == (40, 40, 1, 1)
    assert cost(10, 10, 40).operations == 2 * 39 * 100 * 1600
    assert cost(10, 10, 40, plain=1).operations == 2 * 31 * 100 * 1600


def test_refusals():
    with pytest.raises(ValueError, match="6 channels do not divide evenly by reduction=4"):
        AttentionInAttention(6)
    with pytest.raises(ValueError, match="temperature is above 0 and plain odd"):
        AttentionInAttention(8, temperature=0)
    with pytest.raises(ValueError, match="plain odd"):
        AttentionInAttention(8, plain=2)
