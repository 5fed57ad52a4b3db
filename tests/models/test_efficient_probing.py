"""Efficient probing: a value by hand, its limits, and what `record` sees of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import regard
from regard.models.efficient_probing import AttentiveProbing, EfficientProbing, MeanPooling, Probe, efficient_probing

POOLS = [EfficientProbing(16, queries=4), MeanPooling(16), AttentiveProbing(16, heads=4)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def _with(queries, value, **knobs) -> EfficientProbing:
    model = EfficientProbing(queries.shape[1], queries=len(queries), **knobs)
    model.queries = nn.Parameter(queries)
    model.value.weight = nn.Parameter(value)
    return model


def test_by_hand():
    # scores of the first query over sqrt(2): log 3 and 0, so weights 3/4 and 1/4; of the second: a half each
    model = _with(torch.tensor([[math.sqrt(2) * math.log(3), 0.0], [0.0, 0.0]]), torch.eye(2))
    torch.testing.assert_close(model(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])), torch.tensor([[0.75, 0.5]]))


def test_queries_of_zero_take_the_mean():
    tokens, value = torch.randn(3, 7, 8), torch.randn(4, 8)
    model = _with(torch.zeros(2, 8), value, reduce=2)
    torch.testing.assert_close(model(tokens), tokens.mean(1) @ value.T)
    torch.testing.assert_close(_with(torch.zeros(1, 8), torch.eye(8))(tokens), MeanPooling(8)(tokens))


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: type(pool).__name__)
def test_tokens_have_no_order_and_padding_is_not_there(pool):
    tokens = torch.randn(2, 9, 16)
    found = pool(tokens)
    torch.testing.assert_close(pool(tokens[:, torch.randperm(9)]), found)
    filled = torch.cat([tokens, torch.full((2, 3, 16), 1e3)], 1)
    torch.testing.assert_close(pool(filled, mask=torch.arange(12).expand(2, -1) < 9), found)


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: type(pool).__name__)
def test_refusals(pool):
    name = type(pool).__name__
    with pytest.raises(ValueError, match=rf"{name}: takes tokens \[batch, key, 16\].*got \[2, 9, 8\]"):
        pool(torch.randn(2, 9, 8))
    with pytest.raises(ValueError, match=f"{name}: a mask is boolean"):
        pool(torch.randn(2, 9, 16), mask=torch.ones(2, 9))
    with pytest.raises(ValueError, match=f"{name}: row 1 of the mask has no token"):
        pool(torch.randn(2, 9, 16), mask=torch.tensor([[True] * 9, [False] * 9]))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="24 channels do not divide by 5 queries"):
        EfficientProbing(24, queries=5)


def test_has_the_weights_it_says():
    assert sum(p.numel() for p in EfficientProbing(48, queries=6, reduce=2).parameters()) == 6 * 48 + 48 * 48 // 2


def test_gradients():
    model = efficient_probing(6, 2, queries=3).double().eval()
    assert torch.autograd.gradcheck(model, torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True))


def test_record_sees_each_query_as_a_head():
    model = efficient_probing(16, 3, queries=4).eval()
    with torch.no_grad():
        model.pool.queries.mul_(50)
    tokens = torch.randn(2, 9, 16)
    with torch.no_grad(), regard.record(model, "rows", "entropy") as recording:
        model(tokens)
    (stack,) = (node for node in recording.tree.subtree if "rows" in node)
    expected = (model.pool.queries @ tokens.mT / 4).softmax(-1)
    np.testing.assert_allclose(np.asarray(stack["rows"]).reshape(2, 4, 9), expected.detach(), rtol=1e-5, atol=1e-7)


def test_the_head_is_a_batch_norm_without_weights_and_a_linear_layer():
    probe = Probe(MeanPooling(8), 3)
    tokens = torch.randn(5, 4, 8)
    pooled = tokens.mean(1)
    normed = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(probe(tokens), probe.linear(normed))
