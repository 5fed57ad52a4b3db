"""Anchors of a rule: bounds by hand and beside random weights, fidelity beside the dense map, entropy of formats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regard
from regard import Call, Site
from regard.studies.rule_encoding import (
    anchor_sweep,
    compliance,
    entropy_bounds,
    fidelity_bound,
    in_sight,
    rule_encoding,
    syntactic_entropy,
)


def call(queries=5, keys=5, **more):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, n, 4, generator=generator) for n in (queries, keys))
    return Call(Site("attention", "language_model", 0), query, key, key, 0.5, causal=True, **more)


def test_bounds_by_hand():
    assert fidelity_bound(math.log(4), 2, 10) == pytest.approx(0.5)  # 8 / (8 + 8)
    assert entropy_bounds(0.5, 2, 10)[1] == pytest.approx(3 * math.log(2))  # ln 2, and half of ln 2 and ln 8
    assert fidelity_bound(3.0, 2, 10, form="kernel") == pytest.approx(6 / 14)
    assert fidelity_bound(1.0, 3, 10, form="kernel") == pytest.approx(0.3)


def test_limits_of_bounds():
    assert fidelity_bound(1e4, 2, 10) == 1.0
    assert fidelity_bound(-1e4, 2, 10) == 0.0
    assert fidelity_bound(5.0, 0, 10) == 0.0
    assert fidelity_bound(5.0, 10, 10) == 1.0
    assert entropy_bounds(1.0, 4, 10) == (0.0, pytest.approx(math.log(4)))
    assert entropy_bounds(1.0, 10, 10)[1] == pytest.approx(math.log(10))
    # Of even groups, entropy first falls with the number of anchors, and rises later.
    even = [entropy_bounds(fidelity_bound(4.0, r, 100), r, 100)[1] for r in (1, 4, 90)]
    assert even[1] < even[0]
    assert even[1] < even[2]


@given(
    scores=st.lists(st.floats(-20, 20), min_size=2, max_size=12),
    anchors=st.integers(1, 12),
)
@settings(deadline=None)
def test_bounds_hold_for_any_scores(scores, anchors):
    n, r = len(scores), min(anchors, len(scores) - 1)
    weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
    fidelity, entropy = float(weights[:r].sum()), float(torch.special.entr(weights).sum())
    low, high = entropy_bounds(min(fidelity, 1.0), r, n)
    assert low - 1e-9 <= entropy <= high + 1e-9
    margin = min(scores[:r]) - max(scores[r:])
    assert fidelity >= fidelity_bound(margin, r, n) - 1e-12
    assert fidelity >= fidelity_bound(math.exp(margin), r, n, form="kernel") - 1e-12


@given(inside=st.floats(-5, 5), r=st.integers(1, 8))
@settings(deadline=None)
def test_bounds_are_reached_by_even_groups(inside, r):
    weights = torch.tensor([inside] * r + [0.0] * (9 - r), dtype=torch.float64).softmax(0)
    fidelity = float(weights[:r].sum())
    assert fidelity == pytest.approx(fidelity_bound(inside, r, 9))
    assert float(torch.special.entr(weights).sum()) == pytest.approx(entropy_bounds(fidelity, r, 9)[1])


def test_fidelity_is_that_of_the_dense_map():
    of = call()
    anchors = torch.tensor([[False, True, False, True, False], [False, False, False, False, True]])
    found, dense = rule_encoding(of, anchors), of.weights.dense()
    expected = (dense * anchors[:, None, None]).sum(-1)
    there = torch.tensor([[0, 1, 1, 2, 2], [0, 0, 0, 0, 1]])[:, None].expand(2, 3, 5)
    assert torch.equal(found.anchors, there.to(found.anchors))
    assert torch.equal(found.keys[0, 0].long(), torch.arange(1, 6))
    assert torch.equal(found.fidelity.isnan(), there == 0)
    torch.testing.assert_close(found.fidelity[there > 0], expected[there > 0])
    torch.testing.assert_close(found.entropy, torch.special.entr(dense).sum(-1))


def test_keys_set_apart_leave_a_share_of_the_rest():
    of, first = call(), torch.zeros(2, 5, dtype=torch.bool)
    first[:, 0] = True
    anchors = torch.tensor([[False, False, True, False, False]] * 2)
    found, dense = rule_encoding(of, anchors, apart=first), of.weights.dense()[:, :, 2:]
    torch.testing.assert_close(found.fidelity[:, :, 2:], dense[..., 2] / (1 - dense[..., 0]))
    with pytest.raises(ValueError, match=r"set apart are no anchors"):
        rule_encoding(of, first, apart=first)


def test_anchors_that_nothing_sees_are_refused():
    with pytest.raises(ValueError, match=r"none of 2 anchors is visible.*language_model layer 0"):
        rule_encoding(call(queries=3), torch.tensor([[False] * 4 + [True]] * 2))


def test_what_is_in_sight():
    anchors = [0, 4, 8]
    found = {form: in_sight(anchors, 10, query=5, form=form) for form in ("causal", "full", "cross")}
    assert found == {"causal": (2, 6), "full": (3, 10), "cross": (3, 10)}
    assert in_sight(anchors, 10, query=5, form="window", window=2) == (1, 2)
    assert in_sight(anchors, 10, query=3, form="window", window=3) == (0, 3)
    assert in_sight(anchors, 10, query=1, form="window", window=9) == (1, 2)
    with pytest.raises(ValueError, match="got 0 with 'window'"):
        in_sight(anchors, 10, query=1, form="window")
    with pytest.raises(ValueError, match="got 'local'"):
        in_sight(anchors, 10, query=1, form="local")


def test_entropy_of_formats():
    assert syntactic_entropy([[1, 2], [1, 2], [1, 2]]) == 0
    assert syntactic_entropy([[1, 2], [1, 3]]) == pytest.approx(math.log(2) / 2)
    assert syntactic_entropy([[1], [2], [3], [4, 5]]) == pytest.approx(4 * math.log(4) / 5)  # one reaches the second
    with pytest.raises(ValueError, match="no tokens"):
        syntactic_entropy([])


def test_reloading_by_running_the_chain():
    right = 1.0
    for rounds in range(1, 6):
        right = right * (1 - 0.2) + (1 - right) * 0.5
        assert compliance(0.2, 0.5, rounds=rounds) == pytest.approx(right)
    assert compliance(0.2, 0.5) == pytest.approx(5 / 7)
    assert (compliance(0.2, 0.0), compliance(0.0, 0.0)) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"0 to 1, got 0\.2 and 2"):
        compliance(0.2, 2)


def test_bounds_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="got 5 of 4"):
        fidelity_bound(1.0, 5, 4)
    with pytest.raises(ValueError, match="ratio of kernel values"):
        fidelity_bound(-1.0, 1, 4, form="kernel")
    with pytest.raises(ValueError, match="softmax or kernel, got 'window'"):
        fidelity_bound(1.0, 1, 4, form="window")
    with pytest.raises(ValueError, match=r"0 of 4 keys as anchors cannot be 0\.5"):
        entropy_bounds(0.5, 0, 4)


def test_a_sweep_over_the_reader_is_that_of_its_rows():
    model, _ = regard.zoo.load("reader")
    ids = torch.from_numpy(np.random.default_rng(0).integers(300, 2000, (2, 12)))

    def prompt(count):
        anchors = torch.zeros(2, 12, dtype=torch.bool)
        anchors[:, 2 : 2 + count] = True
        return {"input_ids": ids}, anchors

    table = anchor_sweep(model, prompt, [1, 3]).transpose("count", "batch", "layer", "head")
    with regard.record(model, "rows") as recording, torch.no_grad():
        model(input_ids=ids)
    rows = recording.tree["language_model"]["rows"].isel(query=-1).transpose("batch", "layer", "head", "key").values
    for i, count in enumerate((1, 3)):
        assert np.allclose(table["fidelity"][i], rows[..., 2 : 2 + count].sum(-1), atol=1e-5)
        assert (table["anchors"][i] == count).all()
        assert (table["keys"][i] == 12).all()
    assert table["count"].values.tolist() == [1, 3]
    with pytest.raises(ValueError, match="no stack 'encoder'; it has language_model"):
        anchor_sweep(model, prompt, [1], stack="encoder")
