"""Estimated masks: cells and keys by hand, pairs beside the map, random features, what a model learns."""

from __future__ import annotations

import math

import pytest
import torch
from families import build
from torch.nn import functional as F

from regard.mechanisms.sea import EstimatedMask, cell, convert, counted, distil, map_loss, sea


def made(causal, *, n=24, heads=2, dim=8, **knobs):
    torch.manual_seed(0)
    module = EstimatedMask(dim, heads, causal=causal, **{"width": 8, "k": 3, "tokens": n, **knobs}).eval()
    return module, [torch.randn(2, heads, n, dim) for _ in range(3)]


def test_cells_by_hand():
    """As many cells as keys are these; four for eight stand for two each, those of a border for what is before it."""
    keys = torch.arange(8.0)
    assert cell(keys, torch.tensor(8.0), 8).tolist() == list(range(8))
    assert cell(keys, torch.tensor(8.0), 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert cell(torch.arange(3.0), torch.tensor(3.0), 4).tolist() == [0, 1, 3]
    assert cell(torch.arange(3.0), torch.tensor(3.0), 2).tolist() == [0, 0, 1]  # the border lies at 1 less 1e-4


def test_two_keys_by_hand():
    """The third of three queries sees the second half of its keys: the last alone."""
    query, value = torch.ones(1, 1, 3, 1), torch.tensor([1.0, 5.0, 7.0])[None, None, :, None]
    cells = torch.tensor([[1, 1], [1, 1], [0, 1]], dtype=torch.bool)[None, None]
    found = sea(query, torch.zeros_like(query), value, cells=cells)
    assert found.flatten().tolist() == pytest.approx([1.0, 3.0, 7.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [4, 7, 30, 64])
def test_equals_the_masked_map(dtype, causal, width, monkeypatch):
    """Values and gradients over several parts, with gaps in the keys, grouped heads and rows without a cell."""
    monkeypatch.setattr("regard.mechanisms._pairs.SPACE", 8 * 100)
    leaves = [torch.randn(2, h, 30, 8, dtype=dtype).requires_grad_() for h in (4, 2, 2)]
    cells = torch.rand(2, 4, 30, width, generator=torch.Generator().manual_seed(0)) < 0.3
    cells[:, :, 17] = False
    there = torch.rand(2, 1, 1, 30, generator=torch.Generator().manual_seed(1)) < 0.7
    for mask in (None, there):
        how = {"causal": causal, "mask": mask, "scale": None, "cells": cells}
        found = sea(*leaves, **how)
        right = sea.spec.weights(*leaves[:2], **how) @ leaves[2].repeat_interleave(2, 1)
        near = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {}
        torch.testing.assert_close(found, right, **near)
        assert not found[:, :, 17].any()
        given = torch.randn_like(right)
        for ours, theirs in zip(torch.autograd.grad(found, leaves, given), torch.autograd.grad(right, leaves, given)):
            torch.testing.assert_close(ours, theirs, **near)
    everything = sea(*leaves, causal=causal, cells=torch.ones_like(cells))
    torch.testing.assert_close(everything, sea(*leaves, causal=causal), atol=1e-5, rtol=1e-4)


def test_borders_of_long_rows():
    """What is listed cell by cell is what the map has, where rounding decides."""
    from regard.mechanisms.sea import listed

    n, width = 700, 48
    x = torch.zeros(1, 1, n, 1)
    cells = torch.rand(1, 1, n, width, generator=torch.Generator().manual_seed(0)) < 0.5
    number, rank = counted(x, x, causal=True, mask=None)
    row, column = listed(cells, number, rank, None)
    found = torch.zeros(n, n, dtype=torch.bool)
    found[row, column] = True
    assert int(found.sum()) == len(row)
    right = sea.spec.weights(x, x, causal=True, mask=None, scale=None, cells=cells)[0, 0] > 0
    assert torch.equal(found, right)


@pytest.mark.parametrize("causal", [True, False])
def test_budget(causal):
    """Of all heads together: as many cells as stand for k keys of each; an estimate sums to 1."""
    module, parts = made(causal, n=40)
    found = module.estimate(*parts)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, 2, 40))
    number = torch.arange(1, 41) if causal else torch.full((40,), 40)
    budget = (2 * 3 * 8 / number).round().clamp(1, 16)
    assert torch.equal(found.cells.sum((1, 3)), budget.long().expand(2, -1))
    assert found.cells.sum(-1).float().std() > 0
    best = found.weights.where(found.cells, math.inf).amin((1, 3))
    assert (found.weights.where(~found.cells, 0.0).amax((1, 3)) <= best).all()


def test_random_features_stand_for_what_they_should():
    """Very many of them give softmax attention; where causal, a sum with weights of ReLU features."""
    module, (query, key, value) = made(False, features=20_000, dim=4)
    query, key = query / 2, key / 2
    right = F.scaled_dot_product_attention(query, key, value)
    off = (module.mixed(query, key, value) - right).square().mean()
    assert off < 0.3 * (right - value.mean(2, keepdim=True)).square().mean()
    module, (query, key, value) = made(True)
    q, k = ((t @ module.projection.mT * 8**-0.25).relu() + 1e-3 for t in (query, key))
    weights = (q @ k.mT).tril()
    torch.testing.assert_close(
        module.mixed(query, key, value), weights @ value / weights.sum(-1, keepdim=True), atol=1e-4, rtol=1e-3
    )
    rows = module.projection / module.projection.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(rows[:8] @ rows[:8].mT, torch.eye(8), atol=1e-5, rtol=0)


def test_later_tokens_change_nothing():
    module, parts = made(True)
    before = module(*parts)
    for part in parts:
        part[:, :, 10:] += 3.0
    torch.testing.assert_close(module(*parts)[:, :, :10], before[:, :, :10], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_all_keys_by_hand(causal):
    """With a budget for all, and a share of 1, the output is softmax attention times the row's factor."""
    module, parts = made(causal, k=24)
    found = module.estimate(*parts)
    assert found.cells.all()
    right = F.scaled_dot_product_attention(*parts, is_causal=causal)
    module.scales.weight.data[1], module.scales.bias.data[1] = 0.0, 50.0
    torch.testing.assert_close(module(*parts), right * found.row, atol=1e-5, rtol=1e-4)
    module.scales.bias.data[1] = -50.0
    number = torch.arange(1.0, 25)[:, None]
    mean = parts[2].cumsum(2) / number if causal else module.shown(found.weights).mean(2, keepdim=True) @ parts[2]
    torch.testing.assert_close(module(*parts), mean.expand_as(right), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_padding(causal):
    """Padded tokens fetch nothing by the sparse map, and nobody fetches their values."""
    module, parts = made(causal)
    mask = (torch.arange(24) < torch.tensor([[20], [24]]))[:, None, None]
    before = module(*parts, mask=mask)
    parts[2][0, :, 20:] += 5.0
    after = module(*parts, mask=mask)
    torch.testing.assert_close(after[0, :, :20], before[0, :, :20])
    torch.testing.assert_close(after[1], before[1])
    if not causal:
        assert not module.estimated.cells[0, :, 20:].any()
        assert not module.estimated.weights[0, :, 20:].any()


def test_loss_by_hand():
    teacher = torch.randn(2, 2, 5, 5)
    right = teacher.softmax(-1)
    even = torch.full_like(right, 0.2)
    apart = (right * (right / 0.2).log()).sum((1, 3)).mean()
    expected = 0.1 * apart + (right - even).square().mean()
    torch.testing.assert_close(map_loss(torch.zeros_like(teacher), teacher, causal=False), expected)
    right = teacher.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    even = torch.ones(5, 5).tril() / torch.arange(1.0, 6)[:, None]
    apart = torch.xlogy(right, right / even.where(even > 0, 1.0)).sum(-1).mean()
    expected = 0.1 * apart + (right - even).square().mean()
    torch.testing.assert_close(map_loss(torch.zeros_like(teacher), teacher, causal=True), expected)
    hidden = teacher.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -1e9)
    torch.testing.assert_close(map_loss(hidden, teacher, causal=True), torch.zeros(()))


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_a_converted_model_learns_its_own_map(family):
    torch.manual_seed(0)
    model, inputs = build(family)
    model.eval()
    causal = family == "llama"
    given = {**inputs, "use_cache": False} if causal else inputs
    with torch.no_grad():
        before = model(**given).logits
    undo = convert(model, width=8, k=4, tokens=32)
    modules = [m for m in model.modules() if isinstance(m, EstimatedMask)]
    assert all(m.causal == causal for m in modules)
    state = {name: p.clone() for name, p in model.named_parameters()}
    losses = distil(model, [given] * 30, rate=1e-2)
    assert losses[-1] < 0.8 * losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, state[name])}
    assert moved <= {name for name in state if ".mechanism." in name}
    assert any(".picture." in name for name in moved)
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert not torch.allclose(model(**given).logits, before, atol=1e-4)
    if causal:
        part = model(inputs["input_ids"][:, :7], use_cache=True)
        with pytest.raises(ValueError, match="use_cache=False"):
            model(inputs["input_ids"][:, 7:], past_key_values=part.past_key_values)
    undo()
    with torch.no_grad():
        assert torch.equal(model(**given).logits, before)


def test_cost_is_linear():
    module, _ = made(True)
    assert module.cost(2000) == pytest.approx(2 * module.cost(1000))
    cells = torch.zeros(10, 4, dtype=torch.bool)
    cells[:, 0] = True
    assert sea.spec.cost(10, 10, 8, causal=False, cells=cells).operations == 4 * 8 * 25


def test_refusals():
    x = torch.randn(1, 2, 9, 4)
    with pytest.raises(ValueError, match="as many queries as keys"):
        sea(x[:, :, 3:], x, x, cells=torch.ones(1, 2, 6, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"boolean \[batch, head, 9, cell\]"):
        sea(x, x, x, cells=torch.ones(1, 2, 9, 4))
    with pytest.raises(ValueError, match="multiple of 4"):
        EstimatedMask(4, 2, causal=True, width=10)
    module = EstimatedMask(4, 2, causal=True, width=8, tokens=8)
    with pytest.raises(ValueError, match="8 tokens at most"):
        module(x, x, x)
    with pytest.raises(ValueError, match="was made with causal=True"):
        module(x, x, x, causal=False)
    with pytest.raises(ValueError, match="made for 2 heads"):
        module(x[:, :1], x[:, :1], x[:, :1])
    with pytest.raises(ValueError, match="pad on the right"):
        module(x, x, x, mask=torch.arange(9)[None, None, None] > 2)
    with pytest.raises(ValueError, match="maps of all keys"):
        map_loss(x, x, causal=False)
    with pytest.raises(ValueError, match="no estimates"):
        distil(torch.nn.Linear(1, 1), [])
