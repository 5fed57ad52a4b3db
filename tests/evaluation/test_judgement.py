"""One map, judged: the checks are those of the metrics, and rivals are the map itself, moved."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import regard
from regard.evaluation.faithfulness import deletion_error, insertion_score
from regard.evaluation.judgement import _moved, judge
from regard.prediction import Question, predict


class Sum(nn.Module):
    """The logit of class 1 is the mean of the first quarter of a picture; that of class 0 is 0."""

    config = SimpleNamespace(problem_type=None)

    def __init__(self):
        super().__init__()
        weights = torch.zeros(1, 1, 4, 4)
        weights[..., :2, :2] = 2
        self.weights = nn.Parameter(weights)

    def forward(self, pixel_values):
        logit = (pixel_values * self.weights).sum((1, 2, 3))
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(logit), logit], 1))


ONES = {"pixel_values": torch.ones(2, 1, 4, 4)}


def test_the_checks_are_those_of_the_metrics():
    model = Sum()
    found = regard.attribute(model, ONES, 1, method="gradient_x_input")
    judged = judge(model, ONES, found, steps=4, draws=30)
    assert judged.deletion_error.values == pytest.approx(deletion_error(model, ONES, found, steps=4))
    assert judged.insertion_score.values == pytest.approx(insertion_score(model, ONES, found, steps=4))
    gone = [1 / (1 + np.exp(-x)) for x in (8, 0, 0, 0, 0)]  # four of sixteen pixels hold all of it
    assert judged.deletion.values[0] == pytest.approx(gone)
    # a shifted square overlaps the right one in all, half, a quarter or nothing, so it never takes away more
    assert (judged.moved_deletion_error >= judged.deletion_error - 1e-9).all()
    assert (judged.moved_insertion_score.mean("draw") < judged.insertion_score - 0.05).all()
    assert judged.alike.dims == ("layer", "batch")


def test_a_map_that_knows_nothing_fails():
    model, tokenizer = regard.load("namer")
    inputs = tokenizer("with a heavy heart , the sailor stood .", return_tensors="pt")
    found = regard.attribute(model, inputs, method="gradient_x_input")
    blind = found.copy(data=np.arange(found.size, dtype=float).reshape(found.shape))
    judged = judge(model, inputs, blind, lambda model, inputs, target: blind, steps=5, draws=5)
    assert (judged.alike == 1).all()
    assert (judged.sensitivity_error == 0).all()
    assert judged.sizes["layer"] == 4


def test_the_whole_question_is_handed_on():
    model, tokenizer = regard.load("namer")
    inputs = tokenizer(["a heavy heart .", "the baker sang , feeling merry ."], padding=True, return_tensors="pt")
    plain = partial(regard.attribute, method="gradient_x_input")
    found = plain(model, inputs, "sorrow", against="joy")
    asked = []

    def explain(model, inputs, target):
        asked.append(target)
        return plain(model, inputs, target)

    judged = judge(model, inputs, found, explain, steps=4, draws=2, samples=1, stages=1)
    assert judged.insertion[:, -1].values == pytest.approx(1 / (1 + np.exp(-found.score.values)), abs=1e-5)
    assert {tuple(q.against.tolist()) for q in asked} == {(model.config.label2id["joy"],) * 2}


def test_moved_maps_have_the_same_scores():
    model, tokenizer = regard.load("namer")
    inputs = tokenizer(["a heavy heart .", "the baker sang , feeling merry ."], padding=True, return_tensors="pt")
    generator = torch.Generator().manual_seed(0)
    with predict(model, inputs) as prediction:
        scores = torch.arange(torch.Size(prediction.shape).numel()).reshape(prediction.shape).double()
        moved = _moved(prediction, scores, generator)
        real = prediction.real
    assert torch.equal(moved[~real], scores[~real])
    assert not torch.equal(moved, scores)
    for i in range(2):
        assert torch.equal(moved[i][real[i]].sort().values, scores[i][real[i]])
    with predict(Sum(), ONES, 1) as prediction:
        scores = torch.arange(32).reshape(2, 4, 4).double()
        moved = _moved(prediction, scores, generator)
    rows = {tuple(sorted(row.tolist())) for row in moved.flatten(0, 1)}
    assert rows == {tuple(row.tolist()) for row in scores.flatten(0, 1)}  # neighbours stay neighbours


@pytest.mark.parametrize("name", ["namer", "viewer"])
def test_a_shifted_input_is_read_as_such(name):
    model, processor = regard.load(name)
    if name == "namer":
        inputs = dict(processor("a heavy heart .", return_tensors="pt"))
    else:
        inputs = {"pixel_values": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    with predict(model, inputs, 0) as outer:
        by = torch.full_like(outer.given, 0.25)
        with outer.shifted(by) as nearby:
            for _ in range(2):  # every time, and not the first alone
                with predict(model, nearby, 0) as inner:
                    assert torch.allclose(inner.given, outer.given + by)
                    assert torch.allclose(inner.score(outer.given), outer.score(), atol=1e-5)
        with predict(model, inputs, 0) as after:
            assert torch.equal(after.given, outer.given)


def test_what_cannot_be_judged_is_refused():
    model, pieces = regard.load("reader")
    inputs = pieces("unbelievable", return_tensors="pt")
    found = regard.attribute(model, inputs, words=True, processor=pieces, method="gradient_x_input")
    with pytest.raises(ValueError, match="before words are joined"):
        judge(model, inputs, found)
    with pytest.raises(ValueError, match="draws=0"):
        judge(Sum(), ONES, regard.attribute(Sum(), ONES, method="gradient_x_input"), draws=0)


def test_a_question_may_be_changed():
    model, tokenizer = regard.load("namer")
    inputs = tokenizer("a heavy heart .", return_tensors="pt")
    ask = partial(regard.attribute, model, inputs, method="gradient_x_input")
    both = ask(Question(target=2, against=1), against="joy")
    assert (int(both.target[0]), int(both.against[0])) == (2, model.config.label2id["joy"])
