"""Attention over trees: worked values, limits, and that no block form is nearer to softmax."""

from __future__ import annotations

import pytest
import torch

from regard.mechanisms.hierarchical import hierarchical, quadtree

SCORES = [[1, 0, 0.5, -0.5], [0, 2, 0.3, 0.1], [0.2, 0.4, 0, 1], [-0.6, 0.8, 0.7, 0.9]]


def weights(scores, tree, mask=None):
    n = len(scores)
    eye = torch.eye(n, dtype=torch.float64)[None, None]
    found = hierarchical(scores[None, None], eye, eye, scale=1.0, tree=tree, mask=mask)[0, 0]
    right = hierarchical.spec.weights(scores[None, None], eye, causal=False, mask=mask, scale=1.0, tree=tree)
    torch.testing.assert_close(found, right[0, 0])
    return found


def test_four_tokens_by_hand():
    scores = torch.tensor(SCORES, dtype=torch.float64)
    found = weights(scores, 2)
    right = [
        [0.5238, 0.1927, 0.1418, 0.1418],
        [0.0854, 0.6311, 0.1418, 0.1418],
        [0.1873, 0.1873, 0.1682, 0.4572],
        [0.1873, 0.1873, 0.2815, 0.3439],
    ]
    torch.testing.assert_close(found, torch.tensor(right, dtype=torch.float64), atol=1e-4, rtol=0)
    assert (found * (found.log() - scores.log_softmax(-1))).sum().item() == pytest.approx(0.15567, abs=1e-5)


def test_limits():
    scores = torch.randn(12, 12, dtype=torch.float64)
    for tree in (12, (1, 1), torch.zeros(1, 12, dtype=torch.long), (12, 3)):  # flat
        torch.testing.assert_close(weights(scores, tree), scores.softmax(-1))
    chain = torch.stack([torch.arange(12) // 3, torch.arange(12) // 3])
    torch.testing.assert_close(weights(scores, chain), weights(scores, 3))
    torch.testing.assert_close(weights(0 * scores, (2, 3)), torch.full_like(scores, 1 / 12))


@pytest.mark.parametrize("tree", [5, (2, 2, 2), torch.tensor([[0, 0, 1, 1, 1, 2, 9, 9, 3, 3, 3, 3, 3]])])
def test_no_change_inside_the_family_is_nearer(tree):
    """Every weight of a tree is what other scores give; small changes only raise the divergence."""
    scores = torch.randn(13, 13, dtype=torch.float64)
    there = torch.ones(1, 1, 1, 13, dtype=torch.bool)
    there[..., [3, 8]] = False
    for mask in (None, there):
        known = torch.ones(13, dtype=torch.bool) if mask is None else mask[0, 0, 0]
        soft = scores.masked_fill(~known, -torch.inf).log_softmax(-1)

        def far(given, mask=mask, known=known, soft=soft):
            found = weights(given, tree, mask)[known][:, known]
            torch.testing.assert_close(found.sum(-1), torch.ones_like(found[0]))
            return float((found * (found.log() - soft[known][:, known])).sum())

        best = far(scores)
        assert all(far(scores + by * torch.randn_like(scores)) > best for by in (0.01, 0.1, 1.0) for _ in range(5))


def test_squares_of_a_grid():
    tree = quadtree((4, 4), 2, before=1)
    assert tree[0].unique_consecutive().tolist() == [0, 1, 2, 1, 2, 3, 4, 3, 4]
    assert tree[1].tolist() == [0] + [1] * 16
    x = torch.randn(2, 3, 17, 4, dtype=torch.float64)
    right = hierarchical.spec.weights(x, x, causal=False, mask=None, scale=None, tree=tree) @ x
    torch.testing.assert_close(hierarchical(x, x, x, tree=tree), right)


def test_refusals():
    x = torch.randn(1, 1, 4, 2)
    for tree in (torch.zeros(4), torch.zeros(1, 5, dtype=torch.long)):
        with pytest.raises(ValueError, match="numbers of groups, of 4 tokens"):
            hierarchical(x, x, x, tree=tree)
    with pytest.raises(ValueError, match="nest them"):
        hierarchical(x, x, x, tree=torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]))
    with pytest.raises(ValueError, match="1 node or more"):
        hierarchical(x, x, x, tree=(2, 0))
