"""Attention by a polynomial: values by hand, its distance to softmax, normalisation and refusals."""

from __future__ import annotations

import pytest
import torch

from regard.mechanisms.fast import fast, normalised


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)[None, None, :, None]


@pytest.mark.parametrize(("order", "right"), [(1, 2 / 3), (2, 2.5 / 3.5)])
def test_by_hand(order, right):
    found = fast(column(1.0), column(1.0, 0.0), column(1.0, 0.0), scale=1.0, order=order)
    assert found.item() == pytest.approx(right)


def test_far_below_nothing_it_grows_again():
    """At -1 the second order gives 1/2, at -3 more than at 0; the first order of one key at -1 is nothing at all."""
    found = fast(column(1.0), column(-1.0, 0.0), column(1.0, 0.0), scale=1.0)
    assert found.item() == pytest.approx(0.5 / 1.5)
    assert fast(column(1.0), column(-3.0, 0.0), column(1.0, 0.0), scale=1.0).item() > 0.5
    assert fast(column(1.0), column(-1.0), column(1.0), scale=1.0, order=1).item() == 0


def test_near_softmax_where_scores_are_small():
    query, key = torch.rand(1, 2, 9, 4, dtype=torch.float64), torch.rand(1, 2, 9, 4, dtype=torch.float64)
    soft = (query @ key.mT * 0.02).softmax(-1)
    weights = fast.spec.weights(query, key, causal=False, mask=None, scale=0.02)
    assert ((weights / soft - 1).abs() < 4e-4).all()
    shifted = torch.cat([query, torch.ones(1, 2, 9, 1)], -1), torch.cat([key, torch.full((1, 2, 9, 1), 50.0)], -1)
    moved = fast.spec.weights(*shifted, causal=False, mask=None, scale=0.02)
    assert not torch.allclose(moved, weights, rtol=0, atol=1e-4)  # softmax would not change


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_each_order(order, causal):
    query, key, value = (0.3 * torch.randn(2, 3, 20, 4, dtype=torch.float64) for _ in range(3))
    right = fast.spec.weights(query, key, causal=causal, mask=None, scale=None, order=order) @ value
    torch.testing.assert_close(fast(query, key, value, causal=causal, order=order, block=6), right)


def test_normalised():
    """Means are taken off; the longest of those that are there has length 1."""
    tokens = torch.tensor([[3.0, 1.0], [1.0, 5.0], [9.0, -9.0]], dtype=torch.float64)[None, None]
    there = torch.tensor([True, True, False])[None, None, None]
    right = torch.tensor([[0.5, -0.5], [-1.0, 1.0]]).double() / 2**0.5
    torch.testing.assert_close(normalised(tokens, there)[0, 0, :2], right)
    query, key, value = (torch.randn(1, 2, 7, 4, dtype=torch.float64) for _ in range(3))
    knobs = {"normalise": "token", "mask": torch.arange(7).lt(5)[None, None, None]}
    right = fast.spec.weights(query, key, causal=False, scale=None, **knobs) @ value
    torch.testing.assert_close(fast(query, key, value, **knobs), right)


def test_refuses():
    x = torch.randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match="order is 1 or 2"):
        fast(x, x, x, order=3)
    with pytest.raises(ValueError, match="later ones too"):
        fast(x, x, x, causal=True, normalise="token")
