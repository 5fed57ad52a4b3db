"""Attention through agents: by hand, its rank, how queries are pooled, and the layer."""

from __future__ import annotations

import pytest
import torch

from regard.mechanisms.agent_attention import AgentAttention, agent_attention, pooled


def test_one_agent_gives_all_queries_the_same():
    """An agent of zeros: the mean of the values; any agent: one output."""
    query, key, value = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    found = agent_attention(query, key, value, agent=torch.zeros(1, 2, 1, 4, dtype=torch.float64))
    torch.testing.assert_close(found, value.mean(2, keepdim=True).expand_as(found))
    found = agent_attention(query, key, value, agents=1)
    right = (query.mean(2, keepdim=True) @ key.mT / 2).softmax(-1) @ value
    torch.testing.assert_close(found, right.expand_as(found))


def test_rows_sum_to_one_and_rank_is_the_number_of_agents():
    query, key = torch.randn(1, 2, 30, 8, dtype=torch.float64), torch.randn(1, 2, 30, 8, dtype=torch.float64)
    weights = agent_attention.spec.weights(query, key, causal=False, mask=None, scale=None, agents=4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 30).double())
    values = torch.linalg.svdvals(weights)
    assert (values[..., 4:] < 1e-12).all()
    assert (values[..., 3] > 1e-8).all()


def test_pooling():
    """Runs of 2 and 3 of five overlap by one; cells of a grid; what is not there is in none."""
    query = torch.arange(5.0)[None, None, :, None]
    assert pooled(query, 2).flatten().tolist() == [1.0, 3.0]
    there = torch.tensor([True, False, True, True, True])[None, None, None]
    assert pooled(query, 2, mask=there).flatten().tolist() == [1.0, 3.5]
    grid = torch.arange(16.0)[None, None, :, None]
    assert pooled(grid, 4, (4, 4)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    with pytest.raises(ValueError, match="square number"):
        pooled(grid, 3, (4, 4))
    with pytest.raises(ValueError, match="fill theirs"):
        pooled(grid, 4, (4, 3))


def test_bias_scales_and_shortcut():
    """Those of its maps written out, with gradients to biases and agents, in float64."""
    query, key, value = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    agent, first = torch.randn(1, 2, 3, 4).double(), torch.randn(1, 2, 3, 6).double()
    second = torch.randn(1, 2, 6, 3).double()
    leaves = [t.requires_grad_() for t in (agent, first, second)]
    found = agent_attention(
        query, key, value, agent=agent, bias=(first, second), scale=0.4, second_scale=0.7, shortcut=0.1
    )
    gathered = (agent @ key.mT * 0.4 + first).softmax(-1) @ value
    right = (query @ agent.mT * 0.7 + second).softmax(-1) @ gathered + 0.1 * value
    torch.testing.assert_close(found, right)
    for ours, theirs in zip(torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(right.sum(), leaves)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("knobs", [{}, {"class_token": True}, {"reduction": 2}])
def test_the_layer_trains(knobs):
    layer = AgentAttention(8, heads=2, shape=(6, 4), agents=4, **knobs)
    hidden = torch.randn(2, 24 + ("class_token" in knobs), 8)
    layer(hidden).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    with pytest.raises(ValueError, match="takes 2"):
        layer(hidden[:, 1:])


def test_refuses():
    with pytest.raises(ValueError, match="square number"):
        AgentAttention(8, heads=2, shape=(6, 6), agents=5)
    x = torch.randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match="1 agent or more"):
        agent_attention(x, x, x, agents=0)
