"""Marginals of graphs: by hand, by going through every graph, and the limits that the reading has."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from regard.studies.marginal_attention import (
    EDGES,
    enumerate_marginals,
    graphs,
    iterate,
    marginal_attention,
    sample_edges,
)

THREE = torch.tensor([[0.0, math.log(3)]])


def drawn(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_two_keys_by_hand():
    right = {"one_key": [0.25, 0.75], "any": [0.5, 0.75], "one_query": [1.0, 1.0], "one_to_one": [0.25, 0.75]}
    for edges, row in right.items():
        assert marginal_attention(THREE, edges=edges)[0].tolist() == pytest.approx(row)
    assert marginal_attention(THREE, edges="k_keys", k=2)[0].tolist() == pytest.approx([1, 1])


def test_two_queries_that_compete_for_one_key_by_hand():
    assert marginal_attention(THREE.mT, edges="one_query")[:, 0].tolist() == pytest.approx([0.25, 0.75])


def test_two_of_three_keys_by_hand():
    # pairs have weights 1 * 2, 1 * 3 and 2 * 3
    found = marginal_attention(torch.tensor([[1.0, 2.0, 3.0]]).log(), edges="k_keys", k=2)
    assert found[0].tolist() == pytest.approx([5 / 11, 8 / 11, 9 / 11])


def test_a_matching_by_hand():
    # both to themselves: 1 * 4, crossed: 2 * 3; so neither row is its softmax (1/3, 2/3)
    found = marginal_attention(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).log(), edges="one_to_one")
    assert found.flatten().tolist() == pytest.approx([0.4, 0.6, 0.6, 0.4])


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_equal_to_going_through_every_graph(edges, k):
    if k > 1 and edges != "k_keys":
        return
    scores, prior = drawn(5, 3, 4), torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(1)).double()
    prior[:, 0, 0] = prior[1, 2, 1] = 0
    found = marginal_attention(scores, prior=prior, edges=edges, k=k)
    torch.testing.assert_close(found, enumerate_marginals(scores, prior=prior, edges=edges, k=k), atol=1e-13, rtol=0)
    assert (found[prior == 0] == 0).all()


def test_counts_of_graphs():
    counts = {edges: len(graphs(2, 3, edges=edges)) for edges in EDGES}
    assert counts == {"one_key": 9, "any": 64, "k_keys": 9, "one_query": 8, "one_to_one": 6}
    assert len(graphs(2, 3, edges="k_keys", k=2)) == 9
    assert (graphs(2, 3, edges="one_query").sum(1) == 1).all()
    assert (graphs(2, 3, edges="one_to_one").sum(1) <= 1).all()


def test_each_kind_has_its_sums():
    scores = drawn(2, 4, 6)
    one = torch.ones(2, 4, dtype=torch.float64)
    torch.testing.assert_close(marginal_attention(scores).sum(-1), one)
    torch.testing.assert_close(marginal_attention(scores, edges="k_keys", k=3).sum(-1), 3 * one)
    torch.testing.assert_close(marginal_attention(scores, edges="k_keys", k=1), marginal_attention(scores))
    torch.testing.assert_close(marginal_attention(scores, edges="one_to_one").sum(-1), one)
    columns = marginal_attention(scores, edges="one_query").sum(-2)
    torch.testing.assert_close(columns, torch.ones_like(columns))


def test_priors_are_masks_position_biases_and_keys_that_must_be_there():
    scores = drawn(3, 3)
    mask, bias = torch.ones(3, 3).tril(), -0.5 * torch.arange(3.0)
    found = marginal_attention(scores, prior=mask * bias.exp())
    torch.testing.assert_close(found, (scores + bias.double()).masked_fill(mask == 0, -torch.inf).softmax(-1))
    sure = torch.tensor([[1.0, 0.5, 0.0]])
    for way in (marginal_attention, enumerate_marginals):
        row = way(scores[:1], prior=sure, edges="any")[0]
        assert row.tolist() == pytest.approx([1, float(scores[0, 1].sigmoid()), 0])


@pytest.mark.parametrize("edges", EDGES)
def test_what_has_no_graph_is_zero_and_not_nan(edges):
    prior = torch.tensor([[0.0, 0.0], [1.0, 0.5]])
    found = marginal_attention(torch.zeros(2, 2), prior=prior, edges=edges)
    assert found.isfinite().all()
    assert found[0].tolist() == [0, 0]


def test_scores_far_apart_do_not_overflow():
    scores = torch.tensor([[2000.0, 0.0, -2000.0]])
    assert marginal_attention(scores, edges="k_keys", k=2)[0].tolist() == pytest.approx([1, 1, 0])
    assert marginal_attention(scores)[0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("edges", EDGES)
def test_samples_are_allowed_and_have_the_marginals_as_their_mean(edges):
    scores = drawn(2, 3)
    found = sample_edges(scores, 4000, edges=edges, generator=torch.Generator().manual_seed(0))
    assert (found[:, None] == graphs(2, 3, edges=edges)).flatten(2).all(-1).any(1).all()
    assert (found.double().mean(0) - marginal_attention(scores, edges=edges)).abs().max() < 0.03


def test_one_step_by_hand():
    found = iterate(torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.5]]), beta=1.0)
    assert float(found.queries) == pytest.approx(math.tanh(0.5))
    assert float(found.energy[0]) == pytest.approx(-math.log(math.exp(-0.125) + math.exp(-1.125)))


@pytest.mark.parametrize("competes", [False, True])
def test_the_energy_never_rises(competes):
    prior = torch.tensor([0.2, 1.0, 0.0, 0.7])
    for seed in range(20):
        keys, queries = drawn(4 if not competes else 7, 3, seed=seed), drawn(4, 3, seed=seed + 100)
        beta = torch.tensor([0.3, 1.0, 2.0, 5.0])
        found = iterate(keys, queries, beta=beta, steps=10, prior=prior, competes=competes)
        assert found.energy.diff().max() < 1e-12
        assert found.energy[0] - found.energy[-1] > 1e-3
        if competes:  # a query that cannot be chosen
            torch.testing.assert_close(found.queries[2], queries[2])


def test_with_precisions_that_differ_the_step_is_the_best_of_its_bound():
    keys, queries, beta = drawn(7, 3), drawn(3, 3, seed=1), torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)

    def loss(of):
        potentials = 1.5 * beta.log()[:, None] - beta[:, None] / 2 * (of[:, None] - keys).square().sum(-1)
        return -potentials.logsumexp(0).sum()

    found = iterate(keys, queries, beta=beta, competes=True)
    assert float(found.energy[0]) == pytest.approx(float(loss(queries)))
    moved = queries.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(moved), moved)[0]
    # A step of EM is one along the gradient, over precision times what a query owns.
    shares = marginal_attention(
        1.5 * beta.log()[:, None] - beta[:, None] / 2 * (queries[:, None] - keys).square().sum(-1), edges="one_query"
    )
    torch.testing.assert_close(found.queries, queries - gradient / (beta * shares.sum(-1))[:, None])


def test_a_hopfield_step_where_keys_have_one_length_and_not_else():
    keys, queries = drawn(6, 4), drawn(3, 4, seed=1)
    for of, equal in ((F.normalize(keys, dim=-1), True), (keys, False)):
        step = (1.7 * queries @ of.mT).softmax(-1) @ of
        assert torch.allclose(iterate(of, queries, beta=1.7).queries, step, atol=1e-12) == equal


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"edges": "two_keys"}, "one of one_key, any.*'two_keys'"),
        ({"edges": "k_keys", "k": 4}, "1 to the 3 keys, got 4"),
        ({"k": 2}, "edges='k_keys' only, got k=2"),
        ({"prior": torch.tensor(-1.0)}, "0 and up"),
        ({"prior": torch.tensor(2.0), "edges": "any"}, "at most 1"),
    ],
)
def test_what_makes_no_sense_is_refused(given, match):
    with pytest.raises(ValueError, match=match):
        marginal_attention(torch.zeros(2, 3), **given)


def test_what_is_too_large_is_refused():
    with pytest.raises(ValueError, match="at most 8 keys: got 9"):
        marginal_attention(torch.zeros(2, 9), edges="one_to_one")
    with pytest.raises(ValueError, match="3 queries cannot have a key each of 2"):
        marginal_attention(torch.zeros(3, 2), edges="one_to_one")
    with pytest.raises(ValueError, match="33554432 graphs"):
        enumerate_marginals(torch.zeros(5, 5), edges="any")
    with pytest.raises(ValueError, match="no graph that could be drawn"):
        sample_edges(torch.zeros(1, 2), 3, prior=torch.zeros(2))
    with pytest.raises(ValueError, match="beta is above 0"):
        iterate(torch.zeros(2, 1), torch.zeros(1, 1), beta=0.0)
    with pytest.raises(ValueError, match=r"keys are \[key, dim\], got \[2\]"):
        iterate(torch.zeros(2), torch.zeros(1, 1))
