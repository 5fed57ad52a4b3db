"""Dynamic subspaces: loss, scores and split by hand, the gate's limits, and that learners stay apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from regard.models.dynamic_subspace import (
    SubspaceLearners,
    balanced,
    clusters,
    dynamic_subspace,
    importance,
    kept_dimensions,
    margin_loss,
    pairs,
    train,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def model() -> SubspaceLearners:
    return dynamic_subspace(nn.Identity(), channels=32, width=16).eval()


def at(*angles: float) -> torch.Tensor:
    return torch.tensor([[math.cos(a), math.sin(a)] for a in angles])


def test_loss_by_hand():
    # chords of 1.3 between positives and 1.1 to the negative: 0.3 + 0.3 for the first, one triplet
    near, far = (2 * math.asin(d / 2) for d in (1.3, 1.1))
    embedding = at(0, near, -far)
    anchors, positives, negatives = pairs(embedding, torch.tensor([0, 0, 1]))
    assert (anchors.tolist(), positives.tolist(), negatives.tolist()) == ([0, 1], [1, 0], [2, 2])
    first = margin_loss(embedding[[0, 1, 2]], torch.tensor([0, 0, 1]))
    second = 2 * math.sin((near + far) / 2)  # from the other anchor to the negative: beyond 1.4
    assert second > 1.4
    torch.testing.assert_close(first, torch.tensor((0.6 + 0.3) / 2), rtol=1e-4, atol=1e-4)


def test_a_triplet_counts_where_either_term_does():
    # positives are near enough, both negatives too near, at 1.1 and 1.0: 0.3 and 0.4
    far, less = (2 * math.asin(d / 2) for d in (1.1, 1.0))
    loss = margin_loss(at(0.0, far - less, far), torch.tensor([0, 0, 1]))
    torch.testing.assert_close(loss, torch.tensor(0.35), rtol=1e-4, atol=1e-4)


def test_negatives_are_the_nearest_beyond_the_cutoff():
    labels = torch.tensor([0, 0, 1, 1])
    embedding = at(0.0, 0.1, 0.2, 1.0)  # the third is nearer than half
    _, _, negatives = pairs(embedding, labels)
    assert negatives.tolist()[:2] == [3, 3]
    assert pairs(embedding, labels, cutoff=0.0)[2].tolist()[:2] == [2, 2]


def test_scores_by_hand():
    scores = importance(torch.tensor([[0.2, -0.9, 0.4, 9.0]]), torch.ones(1, 4), torch.arange(3))
    torch.testing.assert_close(scores, torch.tensor([0, 1, 2 / 7, 0]))
    assert kept_dimensions(scores, torch.arange(3)).tolist() == [1]


def test_a_gate_of_zeros_counts_all_places_half(model):
    maps = torch.randn(2, 32, 3, 3)
    for part in model.attention.layers[-1].parameters():
        nn.init.zeros_(part)
    found = model(maps)
    torch.testing.assert_close(found.gate, torch.full((2, 1, 3, 3), 0.5))
    torch.testing.assert_close(found.pooled, maps.mean((2, 3)) / 2)
    plain = SubspaceLearners(nn.Identity(), channels=32, width=4, gated=False).eval()
    torch.testing.assert_close(plain(maps).pooled, maps.mean((2, 3)))


def test_a_split_keeps_what_mattered_and_draws_the_rest_anew(model):
    nn.init.ones_(model.linear.bias)
    before, scores = model.linear.weight.clone(), torch.zeros(16)
    kept = torch.tensor([1, 3, 4, 9, 10, 15])
    scores[kept] = 0.9
    assert model.split(scores)
    assert [own.tolist() for own in model.learners] == [kept.tolist(), [i for i in range(16) if i not in kept.tolist()]]
    changed = (model.linear.weight != before).any(1)
    assert changed.nonzero()[:, 0].tolist() == model.learners[1].tolist()
    assert (model.linear.bias == 0).nonzero()[:, 0].tolist() == model.learners[1].tolist()
    with torch.no_grad():
        found = model(torch.randn(3, 32, 2, 2)).embedding
    for own in model.learners:
        torch.testing.assert_close(found[:, own].norm(dim=1), torch.ones(3))
    assert not model.split(scores)  # the last learner has ten, and none of them scores


@pytest.mark.parametrize(("above", "done"), [(4, False), (5, True), (16, False)])
def test_too_few_or_all_are_not_split_off(model, above, done):
    assert model.split((torch.arange(16) < above).float()) is done
    assert sorted(torch.cat(model.learners).tolist()) == list(range(16))


def test_a_learner_leaves_the_rows_of_others_alone(model):
    model.split((torch.arange(16) < 6).float())
    found = model(torch.randn(6, 32, 2, 2)).embedding[:, model.learners[0]]
    margin_loss(found, torch.tensor([0, 0, 1, 1, 2, 2])).backward()
    assert (model.linear.weight.grad[6:] == 0).all()
    assert model.linear.weight.grad[:6].abs().sum() > 0


def test_clusters_keep_their_numbers():
    features = torch.cat([at(0.0), at(0.02), at(1.5), at(1.52), at(3.0), at(3.02)])
    before = torch.tensor([2, 2, 0, 0, 1, 1])
    assert clusters(features, 3, before=before).tolist() == before.tolist()
    assert clusters(features, 1).tolist() == [0] * 6


def test_batches_are_balanced_and_of_their_cluster():
    labels, among = torch.arange(40) % 4, torch.arange(40) < 20
    rows = balanced(labels, among, 12, 3, torch.Generator().manual_seed(0))
    assert rows.max() < 20
    assert sorted(labels[rows].bincount().tolist())[-3:] == [4, 4, 4]


def test_training_splits_when_it_stalls():
    labels = torch.arange(48) % 4
    maps = torch.randn(4, 32, 2, 2)[labels] + 2 * torch.randn(48, 32, 2, 2)
    how = {"batch": 16, "classes": 4, "rate": 3e-3, "patience": 1, "least": 1}
    kept = dynamic_subspace(nn.Identity(), channels=32, width=16)
    start = margin_loss(kept.eval()(maps).embedding, labels)
    assert train(kept, maps, labels, lambda _: 0.0, epochs=12, splits=False, **how) == [1] * 12
    assert margin_loss(kept.eval()(maps).embedding, labels) < 0.8 * start
    model = dynamic_subspace(nn.Identity(), channels=32, width=16)
    counts = train(model, maps, labels, lambda _: 0.0, epochs=12, **how)
    assert counts[0] == 1
    assert counts[-1] >= 2


def test_state_has_the_learners(model):
    model.split((torch.arange(16) < 6).float())
    again = dynamic_subspace(nn.Identity(), channels=32, width=16).eval()
    again.load_state_dict(model.state_dict())
    maps = torch.randn(2, 32, 3, 3)
    torch.testing.assert_close(again(maps).embedding, model(maps).embedding)
    torch.testing.assert_close(again(maps[:1]).embedding, model(maps).embedding[:1])


def test_refusals(model):
    with pytest.raises(ValueError, match=r"\[batch, 32, row, column\]; got \[2, 8, 3, 3\]"):
        model(torch.randn(2, 8, 3, 3))
    with pytest.raises(ValueError, match="two rows or more of a class"):
        margin_loss(torch.eye(3), torch.arange(3))
    with pytest.raises(ValueError, match="32 channels or more"):
        dynamic_subspace(nn.Identity(), channels=16)


def test_a_split_in_double_precision():
    model = SubspaceLearners(nn.Identity(), channels=32, width=24).double()
    assert model.split(torch.arange(24).double() < 6)
    assert model.linear.weight.dtype == torch.float64
    assert model(torch.randn(2, 32, 3, 3).double()).embedding.isfinite().all()
