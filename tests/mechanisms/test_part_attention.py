"""Attention within parts: by hand, labels that change nothing, pictures that parts share."""

from __future__ import annotations

import pytest
import torch

from regard.mechanisms.part_attention import part_attention


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)[None, None, :, None]


def test_by_hand():
    """The first and last are of one part, whose scores are alike; the second sees itself."""
    x, parts = column(0.0, 5, 0), torch.tensor([[0, 1, 0]])
    assert part_attention(x, x, column(1.0, 7, 3), parts=parts).flatten().tolist() == [2.0, 7.0, 2.0]
    # to patches: the part of the first sees two of them, the other one, and a part without any sees all
    own = torch.tensor([[[True, False, True], [False, True, False], [False, False, False]]])
    found = part_attention(x, x, column(1.0, 7, 4), parts=torch.tensor([[0, 1, 2]]), key_parts=own, scale=0.0)
    assert found.flatten().tolist() == [2.5, 7.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_masked_map(dtype, shared):
    """Other parts in each sequence; gradients, grouped heads and key masks."""
    torch.manual_seed(0)
    leaves = [torch.randn(3, h, n, 8, dtype=dtype, requires_grad=True) for h, n in ((4, 50), (2, 40), (2, 40))]
    parts = torch.randint(0, 4, (3, 50))
    keys = torch.rand(3, 4, 40) < 0.4 if shared else torch.randint(0, 4, (3, 40))
    settings = {"parts": parts, "key_parts": keys, "mask": torch.rand(3, 1, 1, 40) < 0.8, "scale": None}
    found = part_attention(*leaves, **settings)
    right = part_attention.spec.weights(*leaves[:2], causal=False, **settings) @ leaves[2].repeat_interleave(2, 1)
    given = torch.randn_like(right)
    ours, theirs = ([o, *torch.autograd.grad(o, leaves, given)] for o in (found, right))
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {}
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, **close)


def test_names_and_order_of_parts_change_nothing():
    query, key, value = torch.randn(3, 1, 2, 40, 8)
    parts = torch.randint(0, 4, (1, 40))
    found = part_attention(query, key, value, parts=parts)
    torch.testing.assert_close(part_attention(query, key, value, parts=9 - 2 * parts), found)
    order = torch.randperm(40)
    turned = part_attention(*(t[:, :, order] for t in (query, key, value)), parts=parts[:, order])
    torch.testing.assert_close(turned, found[:, :, order])
    torch.testing.assert_close(part_attention(query, key, value, parts=torch.arange(40)), value)


def test_cost_is_that_of_the_parts():
    cost = part_attention.spec.cost
    even = cost(80, 80, 16, parts=torch.arange(80)[None] % 8).operations
    assert cost(80, 80, 16).operations == 8 * even == 4 * 16 * 80 * 80


def test_refusals():
    x = torch.randn(1, 1, 12, 4)
    for wrong in (torch.zeros(1, 12), -torch.ones(1, 12, dtype=torch.long), torch.zeros(1, 11, dtype=torch.long)):
        with pytest.raises(ValueError, match="whole numbers from 0"):
            part_attention(x, x, x, parts=wrong)
    with pytest.raises(ValueError, match="which part each key is of"):
        part_attention(x, x[:, :, 1:], x[:, :, 1:], parts=torch.zeros(1, 12, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[batch, part, key\] of the 3 parts"):
        part_attention(x, x, x, parts=torch.arange(12)[None] % 3, key_parts=torch.ones(1, 2, 12, dtype=torch.bool))
