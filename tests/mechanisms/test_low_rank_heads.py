"""Pooling heads of low rank: scores by hand, bounds, padding, gradients, a recording."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import regard
from regard.mechanisms.low_rank_heads import LowRankHeads, cost, low_rank_heads


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_by_hand():
    """Of one channel, tokens 1 and 2: one head scores both 1, the other 0; then each is even."""
    hidden = torch.tensor([[[1.0], [2.0]]])
    pooled, weights = low_rank_heads(hidden, torch.ones(1, 2), torch.tensor([[1.0, 0.0]]))
    assert torch.equal(weights, torch.full((1, 2, 2), 0.5))
    assert torch.equal(pooled, torch.full((1, 2, 1), 1.5))


def test_of_one_head_only_the_sign_is_left():
    hidden = torch.tensor([[[3.0], [-1.0], [0.5]]])
    _, weights = low_rank_heads(hidden, torch.ones(1, 1), torch.ones(1, 1))
    e = math.e
    torch.testing.assert_close(weights[0, 0], torch.tensor([e, 1 / e, e]) / (2 * e + 1 / e))


def test_equals_the_bilinear_form_and_is_never_sharp():
    """c^T (p q^T) h of each head, by loops over heads and tokens; the largest weight is e^2 of the smallest at most."""
    hidden, left, right, context = double(2, 9, 6), double(6, 4), double(6, 4), double(2, 6)
    scores = torch.zeros(2, 4, 9, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            for t in range(9):
                scores[b, h, t] = context[b] @ torch.outer(left[:, h], right[:, h]) @ hidden[b, t]
    scores = scores.tanh()
    right_weights = (scores / scores.norm(dim=1, keepdim=True)).softmax(-1)
    pooled, weights = low_rank_heads(hidden, left, right, context=context)
    torch.testing.assert_close(weights, right_weights)
    torch.testing.assert_close(pooled, right_weights @ hidden)
    assert (weights.amax(-1) / weights.amin(-1)).max() <= math.e**2 + 1e-9


def test_padding_changes_nothing():
    hidden, left, right = double(2, 9, 6), double(6, 4), double(6, 4)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 6:] = False
    hidden[:, 6:] = math.nan
    pooled, weights = low_rank_heads(hidden, left, right, mask=mask)
    alone = low_rank_heads(hidden[:, :6], left, right)
    torch.testing.assert_close(pooled, alone[0])
    torch.testing.assert_close(weights[..., :6], alone[1])
    assert not weights[..., 6:].any()
    assert not low_rank_heads(hidden, left, right, mask=torch.zeros_like(mask))[0].any()


def test_gradients():
    leaves = [t.requires_grad_() for t in (double(1, 5, 3), double(3, 2), double(3, 2))]
    mask = torch.tensor([[True, True, True, True, False]])
    assert torch.autograd.gradcheck(lambda *given: low_rank_heads(*given, mask=mask), leaves)


@pytest.mark.parametrize("context", ["mean", "learned"])
def test_is_recorded(context):
    """As cross attention of one query a head, whatever the batch: weights and output as they are."""
    model = nn.Sequential(LowRankHeads(6, 2, context=context))
    hidden = torch.randn(4, 5, 6)
    with regard.record(model, "entropy") as recording:
        _, weights = model(hidden)
    (node,) = recording.tree.children.values()
    found = torch.from_numpy(node["entropy"].values).squeeze()
    right = torch.special.entr(weights).sum(-1)
    torch.testing.assert_close(found.reshape(right.shape), right.detach())
    assert sum(p.numel() for p in model.parameters()) == 24 + 6 * (context == "learned")


def test_cost():
    assert cost(100, 48, heads=8).operations == 2 * 48 * 8 * 201
    assert cost(2000, 48, heads=8).operations < 20 * cost(100, 48, heads=8).operations


def test_refusals():
    x, factor = torch.randn(1, 4, 3), torch.randn(3, 2)
    with pytest.raises(ValueError, match="context is one of"):
        LowRankHeads(3, 2, context="last")
    with pytest.raises(ValueError, match="two factors"):
        low_rank_heads(x, factor, torch.randn(3, 3))
    with pytest.raises(ValueError, match="which tokens there are"):
        low_rank_heads(x, factor, factor, mask=torch.ones(1, 4))
