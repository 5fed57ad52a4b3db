"""Distances between years by hand, timelines planted and absent, and units that prefer years."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from regard.studies.temporal_cognition import (
    distance,
    embedding_similarity,
    layer_profile,
    preferential_units,
    temporal_cognition,
)

YEARS = np.arange(1600, 2400, 16)


def planted(kind, reference=None, noise=0.3, seed=0):
    rng = np.random.default_rng(seed)
    away = distance(YEARS, kind, reference=reference)
    return -away / away.std() + noise * rng.standard_normal(away.shape)


def test_a_reference_by_hand():
    found = distance([1899, 1900, 1999, 2000, 2001], reference=2000)
    assert found[2, 4] == pytest.approx(2 * math.log(2))
    assert found[0, 1] == pytest.approx(math.log(102 / 101))  # 0.0099
    assert found[3, 4] == pytest.approx(math.log(2))
    assert found[1, 4] == pytest.approx(math.log(101) + math.log(2))


def test_digits_by_hand():
    found = distance([1999, 2000, 1975, 1985, 999, 19995], "digits")
    assert found[0, 1] == 4
    assert found[2, 3] == 1
    assert found[0, 4] == 1  # one taken away
    assert found[0, 5] == 1  # one added
    assert (found == found.T).all()


def test_other_distances_by_hand():
    assert distance([1, 3], "linear")[0, 1] == 2
    assert distance([1, 3], "log")[0, 1] == pytest.approx(math.log(3))


def test_far_from_its_reference_a_timeline_is_a_logarithm_and_further_a_line():
    near, far = (distance(YEARS, reference=YEARS[0] - by)[0] for by in (1000, 1e7))
    assert near == pytest.approx(np.log((YEARS - YEARS[0] + 1001) / 1001))
    assert far / far[-1] == pytest.approx((YEARS - YEARS[0]) / (YEARS[-1] - YEARS[0]), abs=1e-4)


@pytest.mark.parametrize("reference", [1760, 2000, 2240])
def test_a_planted_timeline_is_detected_at_its_reference(reference):
    found = temporal_cognition(planted("reference", reference), YEARS, draws=20)
    assert found.detected
    assert abs(found.reference - reference) <= 32
    assert found.reference_low <= found.reference <= found.reference_high
    assert found.reference_high - found.reference_low <= 120
    assert float(found.share.sel(kind="reference")) > 0.7


@pytest.mark.parametrize("kind", ["log", "linear", "digits"])
def test_other_structure_is_no_timeline(kind):
    found = temporal_cognition(planted(kind), YEARS, draws=0)
    assert not found.detected
    if kind == "digits":
        assert found.covered > 0.8
    else:
        assert float(found.share.sel(kind=kind)) > float(found.share.sel(kind="reference"))
    assert np.isnan(found.reference_low)


def test_noise_is_no_timeline_and_explains_nothing():
    rng = np.random.default_rng(0)
    found = temporal_cognition(rng.standard_normal((50, 50)), YEARS, draws=0)
    assert not found.detected
    assert np.abs(found.share).max() < 0.1
    assert abs(found.covered) < 0.1


def test_shares_are_of_what_digits_leave():
    away, digits = distance(YEARS, reference=2000), distance(YEARS, "digits")
    similarity = -away / away.std() - digits / digits.std() + np.random.default_rng(0).standard_normal(away.shape)
    found = temporal_cognition(similarity, YEARS, draws=0)
    left = 1 / similarity[np.triu_indices(len(YEARS), 1)].var()  # the noise, of all
    assert found.covered > 0.2
    assert float(found.share.sel(kind="reference")) == pytest.approx(1 - left / (1 - float(found.covered)), abs=0.08)


def test_a_year_is_never_compared_with_itself():
    similarity = planted("reference", 2000)
    np.fill_diagonal(similarity, np.nan)
    found = temporal_cognition(similarity, YEARS, draws=5)
    assert found.detected
    assert abs(found.reference_low - 2000) <= 48


def test_a_reference_at_the_border_does_not_count():
    found = temporal_cognition(planted("reference", YEARS[1]), YEARS, draws=0)
    assert found.reference <= YEARS[2]
    assert not found.detected


def test_what_a_covariate_explains_is_no_timeline():
    steps = np.round(np.sign(YEARS - 2000) * np.log1p(np.abs(YEARS - 2000)) / 4)
    group = -np.abs(steps[:, None] - steps)
    similarity = group + 0.3 * np.random.default_rng(0).standard_normal(group.shape)
    found = [temporal_cognition(similarity, YEARS, covariates=c, draws=0) for c in ([], [group])]
    assert found[0].detected
    assert not found[1].detected
    assert found[1].covered > 0.9


def test_units_that_prefer_years_and_their_trough():
    rng = np.random.default_rng(0)
    year, number = rng.standard_normal((2, len(YEARS), 40))
    code = np.log1p(np.abs(YEARS - 2000))
    year[:, 3] += 4 * code
    year[:, 5] += 2 * code
    year[:, 7] += 5 * code
    number[:, 7] += 5 * code  # to numbers, too
    number[:, 9] += 5 * code  # to numbers only
    year[:10, 11] += 50  # to few years
    found = preferential_units(year, number, YEARS)
    assert found.unit.tolist() == [3, 5]
    assert found.effect[0] > found.effect[1] >= 2
    assert abs(found.reference - 2000) <= 16
    assert found.slope > 0
    assert preferential_units(year, number, YEARS, most=1).unit.tolist() == [3]
    peak = preferential_units(30 - year, number, YEARS)
    assert peak.slope < 0
    nothing = preferential_units(number, number, YEARS)
    assert (len(nothing.unit), math.isnan(nothing.reference)) == (0, True)


def test_the_criterion_of_units_by_hand():
    apart = np.array([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [4.0, 1.0], *[[2.5, 1.0]] * 5, [2.5, -0.1]])
    found = preferential_units(apart, np.zeros((10, 2)), range(10))
    assert found.unit.tolist() == [0]  # the other's effect is larger, 2.56, but its sign is that of 9 in 10
    assert found.effect == pytest.approx(2.5 / math.sqrt(5 / 9))
    assert preferential_units(apart, np.zeros((10, 2)), range(10), agree=0.9).unit.tolist() == [0, 1]


def test_layers_are_explained_by_what_their_states_hold():
    rng = np.random.default_rng(0)
    line, shift = np.linspace(0, 0.5, len(YEARS)), np.log1p(np.abs(YEARS - 2000)) * np.sign(YEARS - 2000) / 14
    states = np.stack([np.stack([np.cos(a), np.sin(a)], -1) for a in (line, shift)])
    found = layer_profile(states + 1e-4 * rng.standard_normal(states.shape), YEARS, reference=2000)
    assert found.dims == ("layer", "kind")
    assert found.sel(kind="linear")[0] > 0.85
    assert found.sel(kind="reference")[1] > 0.85
    assert found.sel(kind="linear")[0] > found.sel(kind="reference")[0]
    assert found.sel(kind="reference")[1] > found.sel(kind="linear")[1]


def test_embeddings_are_compared_over_their_tokens():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def forward(self, input_ids):
            return SimpleNamespace(last_hidden_state=self.table(input_ids))

    def tokenizer(text, return_tensors):
        return BatchEncoding({"input_ids": torch.tensor([[int(digit) for digit in text.removeprefix("y")]])})

    torch.manual_seed(0)
    model = Encoder()
    similarity, tokens = embedding_similarity(model, tokenizer, [12, 21, 345], "y{}")
    assert tokens.tolist() == [2, 2, 3]
    assert similarity[0, 1] == pytest.approx(1)
    means = [model.table.weight[list(of)].mean(0) for of in ((1, 2), (3, 4, 5))]
    assert similarity[0, 2] == pytest.approx(float(torch.cosine_similarity(*means, dim=0).detach()), abs=1e-6)


@pytest.mark.parametrize(
    ("way", "match"),
    [
        (lambda: temporal_cognition(np.zeros((5, 5)), range(5)), "20 years or more, got 5"),
        (lambda: temporal_cognition(np.zeros((50, 50)), YEARS), "all similarities are 0"),
        (lambda: temporal_cognition(np.eye(49), YEARS), r"\[50, 50\], got \[49, 49\]"),
        (lambda: distance([1, 2]), "got None with 'reference'"),
        (lambda: distance([1, 2], "log", reference=3), "got 3 with 'log'"),
        (lambda: distance([0, 2], "log"), "above 0, got 0"),
        (lambda: distance([1, 2], "cubic"), "got 'cubic'"),
        (lambda: distance([2, 2], "log"), "different numbers"),
        (lambda: preferential_units(np.ones((3, 2)), np.ones((3, 2)), YEARS), r"\[50 years, unit\], got \[3, 2\]"),
        (lambda: layer_profile(np.ones((1, 3, 2)), YEARS, reference=2000), r"50 years, dim\], got \[1, 3, 2\]"),
    ],
)
def test_what_makes_no_sense_is_refused(way, match):
    with pytest.raises(ValueError, match=match):
        way()
