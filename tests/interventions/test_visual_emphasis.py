"""Scores that are raised by their size, of patches that a tower marks, and in which models."""

from __future__ import annotations

import pytest
import torch
from pictured import as_alone, call, deep, logits

from regard.interventions._method import scores
from regard.interventions.act import act
from regard.interventions.visual_emphasis import Emphasis, emphasised, outliers, salient, visual_emphasis

IMAGE = [False, True, True, False]


def marked(*where):
    return torch.tensor([[i in where for i in range(4)]])


def test_scores_rise_by_their_size_whatever_their_sign():
    given = torch.tensor([[[0.0, 2.0, -2.0, 1.0], [0.0, -2.0, -2.0, 1.0]]])
    method = visual_emphasis(tokens=Emphasis(marked(1), marked(2)))
    method._layers = {2}
    of = call(given.exp(), IMAGE)  # whose scores these are
    changed = method.inputs(of)
    expected = torch.tensor([[0.0, 2.0, -2.0, 1.0], [0.0, -0.6, -1.4, 1.0]]).softmax(-1)
    assert torch.allclose(changed.weights.dense()[0, 0], expected, atol=1e-6)
    assert torch.allclose(scores(changed, 1, "it")[0, 0], torch.tensor([0.0, -0.6, -1.4, 1.0]))
    positive = visual_emphasis(tokens=Emphasis(marked(1, 2), marked(2)), alpha=0.7, beta=0.0)
    positive._layers = {2}
    first = positive.inputs(of.of_queries(1)).weights.dense()[0, 0, 0]
    assert torch.allclose(first, torch.tensor([0.0, 3.4, -2.0, 1.0]).softmax(-1), atol=1e-6)  # an outlier is no top


def test_marks_are_the_largest_and_those_beyond_the_fence():
    looks = torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 9], [1, 2, 3, 4, 5, 6, 7, 8]])
    assert outliers(looks).nonzero().tolist() == [[0, 7]]
    assert not outliers(torch.ones(1, 8)).any()
    assert salient(looks, 0.25)[1].nonzero()[:, 0].tolist() == [6, 7]


@pytest.mark.parametrize("kind", ["llava", "internvl"])
def test_rows_are_as_alone(kind):
    as_alone(kind, visual_emphasis.fit)


def test_each_picture_has_its_share_of_marks():
    model, inputs = deep("llava")
    tokens = emphasised(model, inputs, ratio=0.25)
    assert tokens.top.sum(1).tolist() == [4, 4]
    assert not (tokens.top & (inputs["input_ids"] != 98)).any()


@pytest.mark.parametrize("kind", ["qwen2_vl", "paligemma"])
def test_a_tower_without_a_class_token_is_refused(kind):
    model, inputs = deep(kind)
    with pytest.raises(ValueError, match=f"class token looks at, and {type(model).__name__}'s has none"):
        emphasised(model, inputs)


def test_what_leaves_no_scores_is_refused():
    model, inputs = deep("llava")
    thing = visual_emphasis.fit(model, inputs)

    class Edits:
        def weights(self, call, weights, rows):
            return weights

    with pytest.raises(ValueError, match="put visual-emphasis first"):
        logits(model, inputs, Edits(), thing)
    logits(model, inputs, act(heads=[(2, 1)], threshold=0.02), thing, Edits())
    with pytest.raises(ValueError, match="ratio is a share"):
        emphasised(model, inputs, ratio=0.0)
    with pytest.raises(ValueError, match="alpha and beta are 0 or more"):
        visual_emphasis(tokens=thing.tokens, alpha=-0.1)
