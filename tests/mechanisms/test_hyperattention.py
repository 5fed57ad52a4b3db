"""HyperAttention: when it is exact, what a sample stands for, the order of buckets."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from regard.mechanisms.hyperattention import _joined, hyperattention, rank


def tensors(n, n_key=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(1, 2, m, 8, generator=generator, dtype=dtype) for m in (n, n_key or n, n_key or n)]


def test_parts_join_by_hand():
    """Sums of 1 and 3: a quarter of 1 and three of 5."""
    one, other = ((torch.full((1, 1, 1, 1), v), torch.full((1, 1, 1), math.log(s))) for v, s in ((1.0, 1), (5.0, 3)))
    output, lse = _joined(one, other)
    assert output.item() == pytest.approx(4.0)
    assert lse.item() == pytest.approx(math.log(4))


def test_buckets_by_hand():
    """Signs + - spell 1, + + spell 3, - + spell 2; their Gray codes are 1, 2 and 3."""
    found = rank(torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]]), torch.eye(2))
    assert found.tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("n_key", [40, 64])
def test_one_block_is_exact(n_key):
    query, key, value = tensors(40, n_key)
    found = hyperattention(query, key, value, block=64, sample=16, least=1)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, value))


def test_every_key_drawn_once_is_exact():
    """Those of the own block are left out, so that none counts twice; without that they do."""
    query, key, value = tensors(40)
    every = torch.arange(40).expand(1, 2, -1)
    found, twice = (
        hyperattention(query, key, value, block=8, sample=40, least=1, sampled=[every], mask_sampled=m)
        for m in (True, False)
    )
    right = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(found, right)
    assert not torch.allclose(twice, right)


def test_sums_are_right_on_average():
    """Rows of ones: the estimate of a row's sum over many draws, by what a value of one key gets."""
    from regard.mechanisms.hyperattention import _planned, parts

    query, key, value = tensors(32)
    right = (query @ key.mT * 8**-0.5).logsumexp(-1).exp()
    sums = []
    for seed in range(300):
        plan = _planned(block=4, sample=8, least=1, seed=seed)
        sums.append(parts(query, key, value, plan, causal=False, mask=None, scale=None)[1].exp())
    sums = torch.stack(sums)
    error = sums.std(0) / len(sums) ** 0.5
    assert ((sums.mean(0) - right).abs() < 5 * error + 1e-9).all()


def test_repeats_under_a_seed_and_differs_under_another():
    query, key, value = tensors(64)
    one, again, other = (hyperattention(query, key, value, block=8, sample=4, least=1, seed=s) for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


def test_more_queries_than_blocks_fill():
    query, key, value = tensors(50, 24)
    how = {"causal": False, "mask": None, "scale": None, "block": 8, "sample": 5, "least": 4}
    right = hyperattention.spec.weights(query, key, **how) @ value
    torch.testing.assert_close(hyperattention(query, key, value, **how), right)


def test_refusals():
    x = torch.randn(1, 1, 4, 2)
    for knobs in ({"block": 0}, {"sample": -1}, {"projections": 0}, {"projections": 63}, {"least": 0}):
        with pytest.raises(ValueError, match="1 key or more"):
            hyperattention(x, x, x, **knobs)
