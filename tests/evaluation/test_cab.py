"""The benchmark of attention mechanisms under four patterns."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from regard.evaluation.cab import (
    ASKED,
    PAIRS,
    PATTERNS,
    SYMBOLS,
    cab,
    compositional_index,
    efficiency_length,
    recall,
    supported,
    task,
)
from regard.mechanisms import Cost, mechanism, operators


def weights(query, key, *, causal, mask, scale):
    return torch.ones(query.shape[2], key.shape[2]) / key.shape[2]


def declared(*patterns):
    return mechanism(*patterns, mask="keys", weights=weights, cost=lambda *a, **k: Cost(1, 1))


@declared("full", "cross")
def mean(query: Tensor, key: Tensor, value: Tensor, *, causal=False, mask=None, scale=None) -> Tensor:
    """The mean of the values, whatever is asked."""
    return value.mean(2, keepdim=True).expand(*query.shape[:3], value.shape[3])


@declared("cross")
def mixes_queries(query: Tensor, key: Tensor, value: Tensor, *, causal=False, mask=None, scale=None) -> Tensor:
    return mean(query, key, value) + query.mean(2, keepdim=True)


def test_which_patterns_are_supported():
    found = operators()
    assert supported(found["memory_efficient"]) == list(PATTERNS)
    assert supported(partial(found["power"], block=4)) == ["causal self"]
    assert supported(mean) == ["noncausal self", "noncausal cross", "causal cross"]
    assert supported(mixes_queries) == ["noncausal cross"]
    with pytest.raises(TypeError, match="mechanism"):
        supported(max)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_asked_for_is_shown_once(pattern):
    key, value, asked, answer = task(pattern, 5, torch.Generator().manual_seed(0))
    known = value < SYMBOLS
    assert (known.sum(1) == PAIRS).all()
    assert (asked is None) == pattern.endswith("self")
    for row in range(5):
        pairs = dict(zip(key[row][known[row]].tolist(), value[row][known[row]].tolist()))
        assert len(pairs) == PAIRS
        places = answer[row] >= 0
        assert int(places.sum()) == ASKED
        questions = key[row][places] if asked is None else asked[row]
        assert [pairs[k] for k in questions.tolist()] == answer[row][places].tolist()
        if asked is None:
            assert (value[row][places] == SYMBOLS).all()
        if pattern == "causal self":  # shown before
            assert int(places.nonzero().min()) >= PAIRS
        if pattern == "causal cross":  # what comes next is what was answered
            assert torch.equal(asked[row, 1:], answer[row, :-1])


def test_softmax_attention_learns_to_recall_and_the_mean_does_not():
    exact = recall(operators()["memory_efficient"], "noncausal cross", steps=250)
    blind = recall(mean, "noncausal cross", steps=60)
    assert exact > 0.9
    assert blind < 0.1
    assert recall(mean, "noncausal cross", steps=60) == blind


def test_the_table_has_gaps_where_a_pattern_is_not_supported():
    found = cab({"mean": mean, "mixes": mixes_queries}, steps=1)
    assert found["accuracy"].dims == ("mechanism", "pattern")
    assert found["accuracy"].isnull().sel(mechanism="mixes").values.tolist() == [True, True, False, True]
    assert found["index"].isnull().equals(found["accuracy"].isnull())


def test_index_by_hand():
    scores = xr.DataArray([[1.0, 0.5], [0.0, 0.5], [np.nan, 0.5]], dims=("mechanism", "pattern"))
    assert compositional_index(scores).values[:2].tolist() == [[1, 0], [-1, 0]]
    assert np.isnan(compositional_index(scores).values[2, 0])


def test_efficiency_length_by_hand():
    lengths = [1.0, 2.0, 3.0, 4.0]
    square, line = [n * n for n in lengths], [2 * n + 4 for n in lengths]
    assert efficiency_length(lengths, line, square) == pytest.approx(1 + 5**0.5)  # n * n = 2 * n + 4
    assert efficiency_length(lengths, [0.1 * n for n in lengths], [n * n + 1 for n in lengths]) == 0
    assert efficiency_length(lengths, line, [9 - n * n for n in lengths]) == math.inf
    with pytest.raises(ValueError, match="three or more"):
        efficiency_length([1, 2], [1, 2], [1, 4])
