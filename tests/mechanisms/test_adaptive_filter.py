"""The filter: variances by hand, its limit, what no change of times or phases changes, and a perfect estimate."""

from __future__ import annotations

import pytest
import torch

from regard.mechanisms.adaptive_filter import AdaptiveFilter, _Noise, adaptive_filter


def complex_pair(numbers):
    return torch.cat([numbers.real, numbers.imag], -1)


def test_variance_by_hand():
    noise = _Noise(*(torch.tensor(v, dtype=torch.float64) for v in (-0.1, 1.0, 0.5, 0.25)))
    found = noise.variance(torch.tensor([0.0, 1.0, 5.0]).double())
    assert found.tolist() == pytest.approx([0.75, 1.5657, 3.5945], abs=1e-4)
    still = noise._replace(decay=torch.tensor(0.0).double())
    assert still.variance(torch.tensor([0.0, 2.0]).double()).tolist() == pytest.approx([0.75, 2.75])


def test_without_dynamics_it_is_softmax():
    query, key, value = (torch.randn(2, 2, 9, 6, dtype=torch.float64) for _ in range(3))
    query, key = (t / t.norm(dim=-1, keepdim=True) for t in (query, key))
    found = adaptive_filter(
        query, key, value, decay=0.0, process=0.0, measurement=0.3, anchor=0.2, robust=False, nu=1.5
    )
    scores = 2 * query @ key.mT / (1.5 * 3 * 0.5)
    past = torch.ones(9, 9, dtype=torch.bool).tril()
    right = scores.masked_fill(~past, float("-inf")).softmax(-1) @ value
    torch.testing.assert_close(found, right, rtol=0, atol=1e-9)


def test_noiseless_data_are_estimated_exactly():
    """Values that follow the dynamics: each, carried to the query's time, is the state there. Weights are of sum 1."""
    frequency, decay = torch.tensor([[0.3, -0.3]]).double(), -0.05
    times = torch.arange(12.0).double()[:, None]
    state = torch.exp(torch.complex(decay * times.expand(-1, 2), times * frequency)) * torch.tensor([1 + 2j, 0.5 - 1j])
    tokens = complex_pair(state)[None, None]
    found = adaptive_filter(tokens, tokens, tokens, decay=decay, frequency=frequency, measurement=1e-6, anchor=1e-9)
    torch.testing.assert_close(found, tokens)
    wrong = adaptive_filter(tokens, tokens, tokens, decay=decay, frequency=-frequency)
    assert not torch.allclose(wrong, tokens, atol=1e-2)


def test_conjugates():
    frequency = torch.randn(2, 3).double()
    tensors = [torch.randn(1, 2, 8, 6).double() for _ in range(3)]
    sign = torch.tensor([1.0] * 3 + [-1.0] * 3).double()
    found = adaptive_filter(*tensors, frequency=frequency)
    other = adaptive_filter(*(t * sign for t in tensors), frequency=-frequency)
    torch.testing.assert_close(other, found * sign)


@pytest.mark.parametrize("robust", [False, True])
def test_knobs_get_gradients(robust, monkeypatch):
    """Also where rows are taken a few at a time."""
    tensors = [torch.randn(1, 2, 8, 4).double() for _ in range(3)]
    knobs = {
        "decay": -torch.rand(2).double(),
        **{name: torch.rand(2).double() + 0.1 for name in ("process", "measurement", "anchor", "nu", "tau")},
    }
    leaves = [t.requires_grad_() for t in knobs.values()]
    monkeypatch.setattr("regard.mechanisms.adaptive_filter._STRIP", 3 * 16)
    found = adaptive_filter(*tensors, robust=robust, **knobs)
    right = adaptive_filter.spec.weights(*tensors[:2], causal=True, mask=None, scale=None, robust=robust, **knobs)
    right = right @ tensors[2]
    torch.testing.assert_close(found, right)
    for ours, theirs in zip(torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(right.sum(), leaves)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("knobs", [{}, {"norms": True, "predict": True}, {"residual": True, "robust": False}])
def test_the_layer(knobs):
    layer = AdaptiveFilter(6, heads=2, length=9, width=4, **knobs).double()
    hidden = torch.randn(2, 9, 6).double()
    other = hidden.clone()
    other[:, 5:] += 1
    torch.testing.assert_close(layer(hidden)[:, :5], layer(other)[:, :5])
    layer(hidden).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    there = torch.arange(9).ne(3).expand(2, -1)
    other = hidden.clone()
    other[:, 3] += 1
    torch.testing.assert_close(layer(hidden, mask=there)[:, 4:], layer(other, mask=there)[:, 4:])


def test_refuses():
    x = torch.randn(1, 2, 4, 6)
    with pytest.raises(ValueError, match="half of the width"):
        adaptive_filter(x[..., :5], x[..., :5], x)
    with pytest.raises(ValueError, match="decay is 0 or less"):
        adaptive_filter(x, x, x, decay=0.1)
    with pytest.raises(ValueError, match="frequency is"):
        adaptive_filter(x, x, x, frequency=torch.ones(2, 2))
    with pytest.raises(ValueError, match="one of each head"):
        adaptive_filter(x, x, x, tau=torch.ones(3))
    with pytest.raises(ValueError, match="nu is above"):
        adaptive_filter(x, x, x, nu=0.0)
    with pytest.raises(ValueError, match="width is even"):
        AdaptiveFilter(6, heads=2, length=9)
