"""Votes of corresponding patches: by hand, and what an edit does."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch

from regard.attribution import chm_corr
from regard.attribution.chm_corr import CorrespondenceClassifier, attention, similarities, top_scores, vote

SIMILAR = torch.tensor([[[0.9, 0.1], [0.2, 0.3]], [[0.1, 0.8], [0.7, 0.2]]])


def drawn(items=6, channels=5, side=3, seed=0):
    return torch.rand(items, channels, side, side, generator=torch.Generator().manual_seed(seed)).double()


def test_an_edit_turns_the_vote_by_hand():
    labels = torch.tensor([0, 1])
    for mask, scores, label in (([[1, 1], [1, 1]], [0.375, 0.45], 1), ([[1, 0], [0, 0]], [0.225, 0.025], 0)):
        found = (SIMILAR * torch.tensor(mask)).flatten(1).mean(-1)
        assert found.tolist() == pytest.approx(scores)
        assert vote(found, labels, 1)[:2] == (label, 1)
    # the two highest, with zeros where the mask is none
    assert top_scores(SIMILAR, torch.tensor([[1, 0], [1, 0]]), 2).tolist() == pytest.approx([0.55, 0.4])
    assert top_scores(SIMILAR, torch.tensor([[1, 0], [0, 0]]), 2).tolist() == pytest.approx([0.45, 0.05])


def test_ties():
    labels = torch.tensor([2, 1, 1, 2])
    found = vote(torch.tensor([0.5, 0.5, 0.5, 0.1]), labels, 2)
    assert found.order.tolist() == [2, 1]  # of equal scores the later one first
    assert vote(torch.arange(4.0), labels, 4)[:2] == (1, 2)  # two labels of two votes: the smaller


def test_the_classifier_is_its_parts():
    known = drawn()
    labels = [0, 1, 0, 2, 1, 0]
    query = drawn(1, seed=1)[0]
    found = CorrespondenceClassifier(known, labels, neighbours=4, votes=3, threshold=0.4, top=2).explain(query)
    means = known.flatten(2).mean(-1)
    cosines = torch.nn.functional.cosine_similarity(means, query.flatten(1).mean(-1)[None])
    assert found.item.values.tolist() == cosines.argsort(descending=True)[:4].tolist()
    near = known[found.item.values]
    mask = attention(query, near) >= 0.4
    assert np.allclose(found.score, top_scores(similarities(query, near), mask, 2))
    assert (
        found.attrs["prediction"]
        == vote(torch.tensor(found.score.values), torch.tensor(labels)[found.item.values], 3).label
    )
    won = [i for i in found.attrs["order"] if labels[found.item.values[i]] == found.attrs["prediction"]]
    assert np.allclose(found["map"], (found.similarity * found["mask"]).values[won].mean(0))


def test_edits_are_linear_and_their_scale_counts_nothing():
    classifier = CorrespondenceClassifier(drawn(), [0, 1, 0, 2, 1, 0], neighbours=6, votes=3)
    query, generator = drawn(1, seed=1)[0], torch.Generator().manual_seed(2)
    one = torch.rand(3, 3, generator=generator) < 0.5
    whole, part, rest, twice = (classifier.explain(query, m) for m in (torch.ones(3, 3), one, ~one, 2.0 * one))
    assert np.allclose(part.score + rest.score, whole.score)
    assert np.allclose(whole.score, whole.similarity.mean(("row", "column")))
    assert part.attrs == twice.attrs
    cell = torch.zeros(3, 3)
    cell[1, 2] = 1
    assert np.allclose(classifier.explain(query, cell).score * 9, whole.similarity[:, 1, 2])


def test_a_picture_that_is_known_corresponds_to_itself():
    known = drawn()
    found = CorrespondenceClassifier(known, range(6), neighbours=6, votes=1).explain(known[3], torch.ones(3, 3))
    assert found.attrs["prediction"] == 3
    assert np.allclose(found.similarity[0], 1)
    cells = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    assert torch.allclose(similarities(known[3], known[3:4], cells[None]), torch.ones(1, 3, 3).double())
    turned = cells.flip(-1)[None]  # row and column are not crossed
    assert torch.allclose(similarities(known[3], known[3:4].mT, turned), torch.ones(1, 3, 3).double())


def test_attention_is_of_each_neighbour():
    found = attention(drawn(1)[0], drawn(seed=3))
    assert torch.allclose(found.amin((1, 2)), torch.zeros(6).double())
    assert torch.allclose(found.amax((1, 2)), torch.ones(6).double())


def test_refusals():
    classifier = CorrespondenceClassifier(drawn(), [0] * 6, neighbours=4, votes=2)
    query = drawn(1)[0]
    for mask, said in ((torch.ones(2, 2), "does not fit"), (torch.zeros(3, 3), "chooses no patch")):
        with pytest.raises(ValueError, match=said):
            classifier.explain(query, mask)
    with pytest.raises(ValueError, match="those known"):
        classifier.explain(query[:2])
    with pytest.raises(ValueError, match="votes <= neighbours"):
        CorrespondenceClassifier(drawn(), [0] * 6, neighbours=4, votes=5)
    with pytest.raises(ValueError, match="a label each"):
        CorrespondenceClassifier(drawn(), [0], neighbours=1, votes=1)
    with pytest.raises(ValueError, match="from 0"):
        CorrespondenceClassifier(drawn(), [-1] * 6, neighbours=1, votes=1)
    with pytest.raises(ValueError, match="correspondence"):
        classifier.explain(query, correspondence=torch.zeros(4, 8, 2, dtype=torch.long))


def test_example():
    failed, attempted = doctest.testmod(chm_corr)
    assert attempted
    assert not failed
