"""Conserved flow: values by hand, bounds on competition, and where sums begin."""

from __future__ import annotations

import math

import pytest
import torch

from regard.mechanisms.flow_attention import flow_attention, step


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)[None, None, :, None]


def test_by_hand():
    """Into 0.625, out of 0.5 and 0.75, kept into 1, kept out of 0.8 and 1.2, which is cut to 1."""
    query, key, value = column(0.0, 0.0), column(0.0, math.log(3)), column(1.0, 3.0)
    assert flow_attention(query, key, value).flatten().tolist() == pytest.approx([1.710332] * 2, abs=1e-5)
    causal = flow_attention(query, key, value, causal=True)
    assert causal.flatten().tolist() == pytest.approx([0.731055, 1.608325], abs=1e-5)


def test_keys_alike_do_not_compete():
    value = torch.randn(1, 1, 5, 3)
    found = flow_attention(torch.zeros(1, 1, 5, 2), torch.ones(1, 1, 5, 2), value)
    gate = torch.tensor(1.0).sigmoid()  # what reaches each query is what there is for it
    torch.testing.assert_close(found, (gate * value.mean(2, keepdim=True)).expand_as(found), atol=1e-4, rtol=1e-4)


def test_no_key_outdoes_another_by_more_than_e_squared():
    """Of like keys to a query, by the cut at 1 and -1."""
    query, key = torch.randn(1, 1, 40, 4), 5 * torch.randn(1, 1, 40, 4)
    weights = flow_attention.spec.weights(query, key, causal=False, mask=None, scale=None)
    strength = weights / (query.sigmoid() @ key.sigmoid().mT)
    assert (strength.amax(-1) / strength.amin(-1) <= math.exp(2) * (1 + 1e-4)).all()


def test_step_takes_the_scale_too():
    tensors = [torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3)]
    state, outputs = None, []
    for i in range(6):
        output, state = step(state, *(t[:, :, i : i + 1] for t in tensors), scale=0.3)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 2), flow_attention(*tensors, causal=True, scale=0.3))


def test_long_sums_keep_their_digits():
    """In float32 as in float64, after as many tokens as make sums of thousands."""
    tensors = [torch.randn(1, 1, 5000, 4) for _ in range(3)]
    for causal in (False, True):
        right = flow_attention(*(t.double() for t in tensors), causal=causal)
        torch.testing.assert_close(flow_attention(*tensors, causal=causal).double(), right, atol=2e-5, rtol=1e-4)
