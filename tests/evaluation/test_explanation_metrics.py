"""Metrics of attributions: values by hand, limits, what has to hold of any."""

from __future__ import annotations

import copy
import doctest
import importlib
from functools import partial
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import xarray as xr
from families import build
from torch import nn

import regard
from regard.evaluation import disagreement as agreement
from regard.evaluation.disagreement import disagreement, kendall_top
from regard.evaluation.faithfulness import (
    comprehensiveness_score,
    deletion_error,
    infidelity_error,
    insertion_score,
    sensitivity_error,
    sufficiency_error,
)
from regard.evaluation.localisation import inside_score, iou_score, pointing_game_score
from regard.evaluation.randomisation import class_sensitivity, randomisation_error
from regard.evaluation.sparseness import sparseness_score
from regard.prediction import predict


class Linear(nn.Module):
    """The logit of class 1 is a weighted sum of four pixels; that of class 0 is 0."""

    config = SimpleNamespace(problem_type=None)

    def __init__(self, weights=(3.0, -1.0, 2.0, 0.0)):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights).reshape(1, 1, 2, 2))

    def forward(self, pixel_values):
        logit = (pixel_values * self.weights).sum((1, 2, 3))
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(logit), logit], 1))


ONES = {"pixel_values": torch.ones(1, 1, 2, 2)}


def chance(logit):
    return 1 / (1 + np.exp(-logit))


def explained(model=None, target=1, **other):
    return regard.attribute(model or Linear(), ONES, target, method="gradient_x_input", **other)


def test_deletion_and_insertion_by_hand():
    found = explained()  # 3, -1, 2, 0: so the order is 0, 2, 3, 1
    gone = [4, 1, -1, -1, 0]
    there = [0, 3, 5, 5, 4]
    area = lambda logits: np.trapezoid([chance(x) for x in logits], dx=0.25)  # noqa: E731
    assert deletion_error(Linear(), ONES, found, steps=4) == pytest.approx([area(gone)])
    assert insertion_score(Linear(), ONES, found, steps=4) == pytest.approx([area(there)])
    worse = found.copy(data=-found.values)
    assert deletion_error(Linear(), ONES, worse, steps=4) > deletion_error(Linear(), ONES, found, steps=4)


def test_comprehensiveness_and_sufficiency_by_hand():
    found = explained()
    shares = (0.01, 0.5)  # of four pixels: one at least, and two
    assert comprehensiveness_score(Linear(), ONES, found, shares=shares) == pytest.approx(
        [chance(4) - (chance(1) + chance(-1)) / 2]
    )
    assert sufficiency_error(Linear(), ONES, found, shares=shares) == pytest.approx(
        [chance(4) - (chance(3) + chance(5)) / 2], abs=1e-6
    )
    assert sufficiency_error(Linear(), ONES, found, shares=(1.0,)) == pytest.approx([0])
    other = comprehensiveness_score(Linear(), ONES, found, shares=(1.0,), baseline=2.0)
    assert other == pytest.approx([chance(4) - chance(8)], abs=1e-6)


def test_what_adds_up_has_no_infidelity():
    found = explained()
    assert infidelity_error(Linear(), ONES, found) == pytest.approx([0], abs=1e-10)
    off = found.copy(data=found.values + np.array([[1.0, 0.0], [0.0, 0.0]]))
    # one feature is off by 1, and taken in one of five perturbations
    assert infidelity_error(Linear(), ONES, off, samples=2000) == pytest.approx([0.2], abs=0.03)
    assert infidelity_error(Linear(), ONES, off, share=1.0) == pytest.approx([1.0])
    twice = infidelity_error(Linear(), ONES, off), infidelity_error(Linear(), ONES, off)
    assert twice[0] == twice[1]


def test_metrics_of_a_batch_are_those_of_its_samples():
    model, tokenizer = regard.load("namer")
    told = ["the baker sang , feeling merry .", "with a heavy heart , the sailor stood , at noon ."]
    both = tokenizer(told, padding=True, return_tensors="pt")
    found = regard.attribute(model, both, method="attention_x_gradient")
    one = tokenizer(told[:1], return_tensors="pt")
    alone = found[:1, : one["input_ids"].shape[1]]
    for metric in (deletion_error, insertion_score, comprehensiveness_score, sufficiency_error, infidelity_error):
        values = metric(model, both, found)
        assert values.shape == (2,)
        assert values[0] == pytest.approx(metric(model, one, alone)[0], abs=1e-4), metric.__name__


def test_sensitivity_of_what_does_not_change_and_of_what_does():
    constant = partial(regard.attribute, method="gradient_x_input")
    # x * w moves by at most radius * |w|, pixel by pixel
    (found,) = sensitivity_error(Linear(), ONES, constant, 1, radius=0.1, samples=200)
    assert 0.03 < found <= 0.1 + 1e-6
    fixed = lambda model, inputs, target: explained()[[0] * len(inputs["pixel_values"])]  # noqa: E731
    state = torch.random.get_rng_state()
    assert sensitivity_error(Linear(), ONES, fixed, 1) == [0]
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match="radius"):
        sensitivity_error(Linear(), ONES, constant, radius=0)


def test_sensitivity_of_words_is_to_their_embeddings():
    class Reads(nn.Module):
        """The logit is the sum over tokens of embeddings times weights."""

        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(3, 2), nn.Linear(2, 1, bias=False)

        def forward(self, input_ids):
            return SimpleNamespace(logits=self.head(self.table(input_ids)).sum(1))

    model, inputs = Reads(), {"input_ids": torch.tensor([[0, 1], [2, 2]])}
    plain = partial(regard.attribute, method="gradient_x_input")
    found = sensitivity_error(model, inputs, plain, radius=0.1, samples=300)
    weights = model.head.weight[0].detach()
    norms = (model.table(inputs["input_ids"]) @ weights).norm(dim=1).detach()
    most = 0.1 * weights.abs().sum() * 2**0.5 / norms  # both tokens off by as much as can be, the same way
    assert (found <= most.numpy() + 1e-6).all()
    assert (found > 0.75 * most.numpy()).all()


def test_where_attributions_fall():
    scores = np.array([[[1.0, 2.0, 0.0], [0.0, 5.0, -4.0]], [[0.0, 0.0, 3.0], [1.0, 0.0, 0.0]]])
    masks = np.array([[[1, 1, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 0]]], bool)
    assert pointing_game_score(scores, masks).tolist() == [False, True]
    assert pointing_game_score(scores, masks, tolerance=1).tolist() == [True, True]
    assert iou_score(scores, masks).tolist() == [1 / 3, 1.0]
    assert iou_score(scores, masks, threshold=0.3).tolist() == [1 / 3, 1 / 2]
    assert inside_score(scores, masks).tolist() == [3 / 8, 3 / 4]
    assert np.isnan(inside_score(-scores[1:], masks[1:])).all()
    assert iou_score(-scores[1:], masks[1:], threshold=0.5).tolist() == [0]
    for metric in (pointing_game_score, iou_score, inside_score):
        with pytest.raises(ValueError, match="of its shape"):
            metric(scores, masks[0])
        with pytest.raises(ValueError, match="empty"):
            metric(scores, np.zeros_like(masks))


def test_sparseness_is_the_gini_of_sizes():
    assert sparseness_score([[0, 0, -2.0, 0, 0]]) == pytest.approx([1 - 1 / 5])
    assert sparseness_score(np.ones((2, 3, 3))) == pytest.approx([0, 0])
    assert np.isnan(sparseness_score([[0.0, 0.0]])).all()
    assert sparseness_score([[1.0, 2.0, 3.0]]) == pytest.approx([2 / 9])  # sum over pairs |x - y| / (2 n^2 mean)
    with pytest.raises(ValueError, match="batch"):
        sparseness_score([1.0, 2.0])


def test_a_map_that_ignores_the_weights_fails_the_randomisation_check():
    base, inputs = build("bert")
    model = transformers.BertForSequenceClassification(base.config).train()
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        first = model.get_input_embeddings()(inputs["input_ids"]).norm(dim=-1)

    def blind(model, inputs, target):
        return xr.DataArray(first.numpy(), dims=("batch", "token"), name="blind")

    assert (randomisation_error(model, inputs, blind) == 1).all()
    found = randomisation_error(model, inputs, partial(regard.attribute, method="gradient_x_input"))
    assert found.layer.values[0] == "classifier"
    assert found.layer.values[-1] == "bert.embeddings.word_embeddings"
    assert found.shape == (len(found.layer), 2)
    assert abs(found.values[-5:]).mean() < 0.6
    few = randomisation_error(model, inputs, partial(regard.attribute, method="gradient_x_input"), stages=2)
    half = round(len(found) / 2) - 1
    assert few.layer.values.tolist() == [found.layer.values[half], found.layer.values[-1]]
    assert np.array_equal(found[[half, -1]], few)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert model.training


def test_class_sensitivity_of_opposite_classes():
    def signed(model, inputs, target):
        return explained(target=target) if int(target[0]) else explained(target=1) * -1

    assert class_sensitivity(Linear(), ONES, signed) == pytest.approx([-1])
    assert class_sensitivity(Linear(), ONES, lambda m, i, t: explained()) == pytest.approx([1])
    assert np.isnan(class_sensitivity(Linear(), ONES, lambda m, i, t: explained() * 0))


# Agreement


def scores(*rows):
    return xr.DataArray(np.array(rows, float), dims=("batch", "token"))


def test_agreement_by_hand():
    one, other = scores([4, 3, 2, 1, 0]), scores([4, 3, 0, 1, 2])
    found = disagreement({"one": one, "other": other}, k=2).sel(one="one", other="other", batch=0)
    assert found["kendall"] == pytest.approx((7 - 3) / 10)
    assert found["spearman"] == pytest.approx(1 - 6 * (4 + 4) / (5 * 24))
    assert found["pearson"] == found["spearman"]
    assert found["overlap"] == 1
    assert found["chance"] == 2 / 5
    assert found["tail"] == 1  # all three discordant pairs are of words that neither holds for important
    assert found["top"] == 1
    assert 0.5 < found["weighted"] < 1


def test_agreement_with_itself_and_with_its_opposite():
    one = scores([3, 1, 2, 0], [0, 1, 2, 3])
    found = disagreement({"one": one, "same": 2 * one + 1, "opposite": -one}, k=1)
    for name in ("kendall", "spearman", "pearson", "weighted"):
        assert np.allclose(found[name].sel(one="one", other="same"), 1)
        assert np.allclose(found[name].sel(one="one", other="opposite"), -1)
        assert np.allclose(found[name], found[name].transpose("other", "one", "batch"))
    assert (found["overlap"].sel(one="one", other="opposite") == 0).all()
    assert found["tail"].isnull().sel(one="one", other="same").all()


def test_padding_does_not_count():
    one, other = scores([3, 2, 1, 9]), scores([3, 2, 1, -9])
    counted = np.array([[True, True, True, False]])
    found = disagreement({"one": one, "other": other}, features=counted)
    assert found["kendall"].sel(one="one", other="other") == pytest.approx([1])
    nothing = disagreement({"one": one, "other": other}, features=np.array([[True, False, False, False]]))
    assert nothing["kendall"].isnull().all()
    flat = disagreement({"one": one, "flat": one * 0})
    assert flat["spearman"].isnull().sel(one="one", other="flat").all()


def test_the_top_k_against_a_count_of_pairs():
    # ranks 0 1 1 2 and 1 0 2 2; the highest of each: {0, 1, 2} and {0, 1}
    one, other = np.array([3.0, 2, 2, 1]), np.array([2.0, 3, 1, 1])
    # pairs of one of each: 01 turned round, 02 alike, 12 tied in one only
    assert kendall_top(one, other, 2) == pytest.approx(1 - 2 * (1 + 0 + 0.5) / 3)
    assert kendall_top(one, other, 2, penalty=1.0) == pytest.approx(1 - 2 * 2 / 3)
    assert kendall_top(one, one, 4) == 1
    generator = np.random.default_rng(0)
    a, b = generator.permutation(7).astype(float), generator.permutation(7).astype(float)
    turned = sum((a[i] - a[j]) * (b[i] - b[j]) < 0 for i, j in combinations(range(7), 2))
    assert kendall_top(a, b, 7) == pytest.approx(1 - 2 * turned / 21)  # all of them: Kendall's own


def test_what_cannot_be_compared_is_refused():
    one = scores([1, 2, 3])
    with pytest.raises(ValueError, match="two attributions"):
        disagreement({"one": one})
    with pytest.raises(ValueError, match="one shape"):
        disagreement({"one": one, "other": scores([1, 2])})
    with pytest.raises(ValueError, match="k counts"):
        disagreement({"one": one, "other": one}, k=0)
    with pytest.raises(ValueError, match="features"):
        disagreement({"one": one, "other": one}, features=np.array([True]))


def test_attributions_that_do_not_fit_are_refused():
    found = explained()
    with pytest.raises(ValueError, match="does not say what it explains"):
        deletion_error(Linear(), ONES, found.drop_vars("target"))
    with pytest.raises(ValueError, match="have features"):
        deletion_error(Linear(), ONES, found[:, :1])
    with pytest.raises(ValueError, match="steps"):
        deletion_error(Linear(), ONES, found, steps=0)
    with pytest.raises(ValueError, match="shares"):
        comprehensiveness_score(Linear(), ONES, found, shares=(0.0,))


def test_probability_of_labels_that_may_hold_together():
    model = Linear()
    model.config = SimpleNamespace(problem_type="multi_label_classification")
    with predict(model, ONES, 0) as prediction:
        assert prediction.probability().item() == pytest.approx(0.5)
    with predict(Linear(), ONES, 0) as prediction:
        assert prediction.probability().item() == pytest.approx(1 - chance(4))


@pytest.mark.parametrize(
    "name", ["disagreement", "faithfulness", "judgement", "localisation", "randomisation", "sparseness"]
)
def test_examples_in_docstrings(name):
    failed, attempted = doctest.testmod(importlib.import_module(f"regard.evaluation.{name}"))
    assert not failed
    assert attempted


def test_the_tail_is_a_share_of_discordant_pairs():
    one, other = np.array([5.0, 1, 2, 3, 0]), np.array([1.0, 5, 2, 3, 0])
    high = np.array([True, True, False, False, False])
    # discordant: 01, 02, 03, 12, 13 - all with one of the two highest
    assert agreement._tail(one, other, high) == 0
