"""Heads with frozen queries and keys: by hand, what cannot matter, and the kernel of endless heads."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from regard.studies.random_feature_attention import (
    RandomFeatureAttention,
    correlation,
    kernel,
    mean_power,
    random_features,
    ridge,
)


def points(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def layer(dim=3, heads=5, **more):
    return RandomFeatureAttention(dim, heads, generator=torch.Generator().manual_seed(0), **more)


def test_one_head_by_hand():
    of = RandomFeatureAttention(1, 1)
    of.matrix = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])  # scores are query * key + 2
    found = of.features(torch.tensor([[1.0]]), torch.tensor([[[1.0], [-3.0]]]))
    assert found.tolist() == [[1.5, 1.5]]  # relu of 3 and -1, weighing (1, 1) and (-3, 1), over two keys


def test_scores_by_a_loop_over_heads_and_keys():
    of, query, key = layer(), points(2, 3), points(2, 4, 3, seed=1)
    found = of.features(query, key).unflatten(1, (5, 4))
    for b in range(2):
        for h in range(5):
            expected = torch.zeros(4)
            for k in range(4):
                x, y = F.pad(query[b], (0, 1), value=1.0), F.pad(key[b, k], (0, 1), value=1.0)
                expected += (x @ of.matrix[h] @ y).relu() * y / 4
            torch.testing.assert_close(found[b, h], expected)


def test_neither_the_order_of_keys_nor_their_doubles_matter():
    of, query, key = layer(), points(2, 3), points(2, 6, 3, seed=1)
    right = of.features(query, key)
    torch.testing.assert_close(of.features(query, key[:, torch.randperm(6)]), right)
    torch.testing.assert_close(of.features(query, torch.cat([key, key], 1)), right)
    other = of.features(query, key.flip(-1))
    assert not torch.allclose(other, right, atol=1e-2)


def test_a_key_that_is_masked_is_as_one_that_is_not_there():
    of, query, key = layer(), points(2, 3), points(2, 6, 3, seed=1)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    found = of.features(query, key, mask)
    torch.testing.assert_close(found[:1], of.features(query[:1], key[:1, :4]))
    torch.testing.assert_close(found[1:], of.features(query[1:], key[1:]))
    with pytest.raises(ValueError, match="no key"):
        of.features(query, key, mask & mask.new_tensor([[False], [True]]))


def test_the_output_is_linear_in_values():
    of, query, key = layer(), points(2, 3), points(2, 6, 3, seed=1)
    one, other = torch.randn(2, 5, 4).unbind()
    both = of(query, key, one) + 2 * of(query, key, other)
    torch.testing.assert_close(of(query, key, one + 2 * other), both)


def test_a_bias_adds_the_product_of_query_and_key_to_scores():
    query, key = points(1, 3), points(1, 1, 3, seed=1)
    plain, biased = layer(heads=1), layer(heads=1, bias=100.0)
    scores = [
        (F.pad(query[0], (0, 1), value=1.0) @ of.matrix[0] @ F.pad(key[0, 0], (0, 1), value=1.0))
        for of in (plain, biased)
    ]
    torch.testing.assert_close(scores[1] - scores[0], 100 * query[0] @ key[0, 0], rtol=1e-4, atol=1e-4)


def test_many_heads_come_near_the_kernel_of_endless_ones():
    query, key = points(3, 4), points(3, 5, 4, seed=1)
    found = layer(4, 20_000).features(query, key).double()
    right = kernel(query, key, query, key)
    assert (found @ found.mT / 20_000 / right - 1).abs().max() < 0.03


def test_scores_of_unit_points_have_a_variance_of_one():
    query, key = points(1, 6), points(1, 1, 6, seed=1)
    matrix = layer(6, 20_000).matrix
    scores = torch.einsum("d,hde,e->h", F.pad(query[0], (0, 1), value=1.0), matrix, F.pad(key[0, 0], (0, 1), value=1.0))
    assert float(scores.var()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_ridge_is_where_the_gradient_of_its_loss_is_zero(shape):
    features, target = torch.randn(*shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
    every = ridge(features, target, [0.1, 0.5])
    for penalty, weights in zip((0.1, 0.5), every):
        weights = weights.clone().requires_grad_()
        loss = (features @ weights - target).square().mean() + penalty * weights.square().sum()
        assert torch.autograd.grad(loss, weights)[0].abs().max() < 1e-12
    torch.testing.assert_close(ridge(features, target, 0.5), every[1])


def test_plain_features_by_hand():
    assert random_features(torch.tensor([[2.0]]), torch.tensor([[1.0, -1.0], [-0.5, 1.0]])).tolist() == [[1.5, 0.0]]


def test_targets_by_hand():
    query, key = torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.6, 0.8], [-1.0, 0.0]]])
    beta = torch.tensor([0.0, 1.0])
    assert float(mean_power(key, beta, 2)) == pytest.approx(0.32)
    assert float(correlation(query, key, beta, 1)) == pytest.approx(0.24)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"query is \[batch, 3\], got \[2, 4\]"):
        layer().features(points(2, 4), points(2, 5, 3))
    with pytest.raises(ValueError, match=r"key is \[batch, key, 3\], got \[2, 3\]"):
        layer().features(points(2, 3), points(2, 3))
    with pytest.raises(ValueError, match="above 0, got 0"):
        ridge(torch.eye(2), torch.ones(2), 0.0)
    with pytest.raises(ValueError, match="one head or more, got 3 and 0"):
        RandomFeatureAttention(3, 0)
