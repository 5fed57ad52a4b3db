"""VLANet: windows and surrogates by hand, the margin loss, and what thinning out and padding must not change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import regard
from regard.models.vlanet import CrossModal, Vlanet, contrastive, groups, recall_at, surrogates, vlanet, windows

SMALL = {"frame": 6, "word": 5, "dim": 16, "heads": 2, "lengths": (4, 8), "group": 2}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_windows_and_groups_by_hand():
    found = windows(12, (4, 8))
    assert found.tolist() == [[0, 4], [2, 6], [4, 8], [6, 10], [8, 12], [0, 8], [4, 12]]
    assert groups(found, 2).tolist() == [0, 0, 1, 1, 2, 3, 3]
    assert groups(found, 1).tolist() == list(range(7))
    assert windows(6, (4, 8)).tolist() == [[0, 4], [2, 6]]


def test_the_nearest_of_a_group_stands_for_it():
    near = torch.tensor([[0.2, 0.9, 0.5, -0.3], [0.7, 0.1, 0.2, 0.9]])
    assert surrogates(near, torch.tensor([0, 0, 0, 1])).tolist() == [[1, 3], [0, 3]]


def test_margin_by_hand():
    scores = torch.tensor([[0.5, 0.4], [0.1, 0.2]])
    # rows: 0.2 - 0.5 + 0.4 and 0.2 - 0.2 + 0.1; columns: 0.2 - 0.2 + 0.4 and 0.2 - 0.5 + 0.1
    torch.testing.assert_close(contrastive(scores), torch.tensor((0.1 + 0.1 + 0.4 + 0.0) / 4))
    wrong = torch.tensor([[False, True], [False, False]])
    torch.testing.assert_close(contrastive(scores, wrong=wrong), torch.tensor((0.1 + 0.4) / 2))
    assert contrastive(scores, wrong=torch.zeros(2, 2, dtype=torch.bool)) == 0


def test_recall_by_hand():
    found = torch.tensor([[[0, 4], [2, 6]], [[0, 4], [8, 12]]])
    truth = torch.tensor([[3, 6], [4, 8]])
    assert recall_at(found, truth).tolist() == [True, False]
    assert recall_at(found[:, :1], truth).tolist() == [False, False]


def test_weights_are_of_what_was_kept():
    found = vlanet(**SMALL)(torch.randn(3, 16, 6), torch.randn(3, 4, 5))
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(3))
    assert (found.weights > 0).sum(1).tolist() == [found.kept.shape[1]] * 3
    entropy = -(found.weights * found.weights.clamp_min(1e-12).log()).sum(-1)
    assert (entropy <= math.log(found.kept.shape[1]) + 1e-5).all()
    best = found.windows[found.weights.argmax(-1)]
    assert found.best()[:, 0].tolist() == best.tolist()


def test_groups_of_one_keep_all():
    model = vlanet(**{**SMALL, "group": 1})
    found = model(torch.randn(2, 16, 6), torch.randn(2, 4, 5))
    assert found.kept.tolist() == [list(range(len(found.windows)))] * 2


def test_equal_windows_get_equal_weights():
    cross = CrossModal(16, 2)
    _, weights = cross(torch.randn(2, 1, 16).expand(-1, 5, -1), torch.randn(2, 3, 16), torch.randn(2, 16), _real(2, 3))
    torch.testing.assert_close(weights, torch.full((2, 5), 0.2))


def _real(batch, words):
    return torch.ones(batch, words, dtype=torch.bool)


def test_one_way_is_the_last_step_alone():
    cross, found, sentence = CrossModal(16, 2, cascade=False), torch.randn(2, 5, 16), torch.randn(2, 16)
    seen, weights = cross(found, torch.randn(2, 3, 16), sentence, _real(2, 3))
    scores = torch.einsum("bd,bwd->bw", cross.last.query(sentence), cross.last.key(found)) / 4
    torch.testing.assert_close(weights, scores.softmax(-1))
    torch.testing.assert_close(seen, torch.einsum("bw,bwd->bd", weights, found))


@pytest.mark.parametrize("cascade", [True, False])
def test_words_that_are_filled_up_are_not_there_and_pairs_do_not_meet(cascade):
    model, frames, words = vlanet(**SMALL, cascade=cascade).eval(), torch.randn(3, 16, 6), torch.randn(3, 4, 5)
    found = model(frames, words)
    filled = torch.cat([words, torch.full((3, 2, 5), 9.0)], 1)
    padded = model(frames, filled, torch.arange(6).expand(3, -1) < 4)
    torch.testing.assert_close(padded.score, found.score)
    torch.testing.assert_close(padded.weights, found.weights)
    every = model(frames, words, every=True)
    torch.testing.assert_close(every.score.view(3, 3).diagonal(), found.score)
    other = model(frames[1:2], words[2:])
    torch.testing.assert_close(every.score.view(3, 3)[1, 2], other.score[0])


def test_it_trains_and_is_saved(tmp_path):
    model, frames, words = vlanet(**SMALL), torch.randn(3, 16, 6), torch.randn(3, 4, 5)
    found = model(frames, words, every=True)
    (contrastive(found.score.view(3, 3)) + contrastive(found.nearness.view(3, 3))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.save_pretrained(tmp_path)
    again = Vlanet.from_pretrained(tmp_path)
    torch.testing.assert_close(again(frames, words).weights, model(frames, words).weights)


def test_record_sees_the_weights_that_rank():
    model = vlanet(**SMALL).eval()
    with torch.no_grad(), regard.record(model, "rows") as recording:
        found = model(torch.randn(2, 16, 6), torch.randn(2, 4, 5))
    rows = [np.asarray(node["rows"]) for node in recording.tree.subtree if "rows" in node]
    last = next(row for row in rows if row.shape[-2] == 1)
    kept = found.weights.gather(1, found.kept)
    np.testing.assert_allclose(last.reshape(2, -1), kept, rtol=1e-5)


def masked(mask: torch.Tensor):
    return vlanet(**SMALL)(torch.randn(1, 8, 6), torch.randn(1, 2, 5), mask)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: vlanet(**SMALL)(torch.randn(1, 3, 6), torch.randn(1, 2, 5)),
            "3 frames, and the shortest window has 4",
        ),
        (lambda: vlanet(**{**SMALL, "dim": 15}), "dim is even"),
        (lambda: vlanet(**{**SMALL, "lengths": ()}), "lengths are of one frame or more"),
        (lambda: vlanet(**SMALL)(torch.randn(2, 8, 6), torch.randn(3, 2, 5)), "as many sentences"),
        (lambda: masked(torch.ones(1, 2)), "a mask is boolean"),
        (lambda: masked(torch.tensor([[False, False]])), "each sentence has a word"),
        (lambda: masked(torch.tensor([[False, True]])), "filled up at its end"),
        (lambda: vlanet(**{**SMALL, "heads": 3}), "16 channels do not divide by 3"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()
