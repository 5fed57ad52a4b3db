"""Reference frames and graphs of attention, on maps whose shape is known."""

from __future__ import annotations

import doctest
import importlib
import math

import numpy as np
import pytest
import torch
import xarray as xr
from families import build

import regard
from regard.statistics.sink_geometry import _betti, reference_frame, sink_geometry

N = 40


def stack(maps, causal=False, roles=None):
    """maps [layer, head, query, key] of one text."""
    maps = np.asarray(maps, float)[None]
    n = maps.shape[-1]
    coords = {"query": np.arange(n), "key": np.arange(n), "layer": np.arange(maps.shape[1])}
    if roles is not None:
        coords |= {f"{axis}_role": (("batch", axis), np.array([roles], object)) for axis in ("query", "key")}
    dims = ("batch", "layer", "head")
    data = {"rows": ((*dims, "query", "key"), maps), "received": ((*dims, "key"), maps.sum(-2))}
    return xr.Dataset(data, coords, {"kind": "self", "causal": causal})


def even(n, causal=False):
    ones = np.tril(np.ones((n, n))) if causal else np.ones((n, n))
    return ones / ones.sum(-1, keepdims=True)


def towards(keys, n=N, share=0.6, causal=False):
    """Even attention, `share` of which goes to some keys instead, in equal parts."""
    found = (1 - share) * even(n, causal)
    found[:, keys] += share / len(keys)
    return found


@pytest.mark.parametrize(
    ("heads", "frame"),
    [
        ([towards([0])] * 4, "centralised"),
        ([towards([7])] * 3 + [towards([20])], "centralised"),
        ([towards([0])] * 2 + [towards([N - 1])] * 2, "bidirectional"),
        ([towards([0, N - 1])] * 4, "bidirectional"),
        ([towards([0]), towards([9]), towards([17]), towards([30])], "distributed"),
        ([towards([5, 15, 25], share=0.9)] * 4, "distributed"),
        ([even(N)] * 4, ""),
        ([np.eye(N)] * 4, ""),  # every token looks at itself: no column stands out
    ],
)
def test_the_kind_of_frame(heads, frame):
    assert reference_frame(stack([heads]))["frame"].item() == frame


def test_reference_points_are_shares_of_heads():
    found = reference_frame(stack([[towards([0]), towards([3])], [towards([0]), even(N)]]))
    expected = np.zeros(N)
    expected[[0, 3]] = 1 / 2, 1 / 4
    np.testing.assert_allclose(found["reference"].values[0], expected)
    assert float(found["anchored"][0]) == 3 / 4


def test_early_keys_of_a_causal_map_are_no_sinks_for_being_early():
    assert reference_frame(stack([[even(N, causal=True)] * 2], causal=True))["frame"].item() == ""
    one = towards([0], share=0.3, causal=True)
    assert reference_frame(stack([[one] * 2], causal=True))["frame"].item() == "centralised"
    previous = np.eye(N, k=-1)
    previous[0, 0] = 1
    assert reference_frame(stack([[previous] * 2], causal=True))["frame"].item() == "", "few queries see the last keys"


def test_padding_is_no_token():
    n, pads = N, 6
    maps = np.zeros((n, n))
    maps[pads:, pads:] = towards([0, n - pads - 1], n - pads)
    maps[:pads] = 1 / n
    padded = stack([[maps] * 2], roles=["pad"] * pads + ["text"] * (n - pads))
    found, alone = sink_geometry(padded), sink_geometry(stack([[towards([0, n - pads - 1], n - pads)] * 2]))
    assert found["frame"].item() == "bidirectional"
    np.testing.assert_allclose(found["reference"].values[0, pads:], alone["reference"].values[0])
    for name in ("centralisation", "star_likeness", "algebraic_connectivity", "betti_0", "betti_1"):
        np.testing.assert_allclose(found[name].values, alone[name].values, err_msg=name)


def test_a_star_by_hand():
    star = np.zeros((6, 6))
    star[:, 0] = 1
    found = sink_geometry(stack([[star]]), edges=(0.4, 0.6))
    assert float(found["centralisation"].squeeze()) == 1
    assert float(found["star_likeness"].squeeze()) == 1
    assert float(found["algebraic_connectivity"].squeeze()) == pytest.approx(0.5)  # edges weigh a half
    assert found["betti_0"].values.ravel().tolist() == [1, 6]
    assert found["betti_1"].values.ravel().tolist() == [0, 0]


def test_even_attention_by_hand():
    found = sink_geometry(stack([[even(4)]]), edges=(0.2, 0.3))
    assert float(found["centralisation"].squeeze()) == pytest.approx(0, abs=1e-12)
    assert float(found["star_likeness"].squeeze()) == pytest.approx(2 / 4)
    assert float(found["algebraic_connectivity"].squeeze()) == pytest.approx(4 * 1 / 4)
    assert found["betti_1"].values.ravel().tolist() == [6 - 4 + 1, 0]


def test_tokens_that_look_within_two_groups():
    apart = np.kron(np.eye(2), even(3))
    found = sink_geometry(stack([[apart]]), edges=(0.1,))
    assert float(found["algebraic_connectivity"].squeeze()) == pytest.approx(0, abs=1e-12)
    assert found["betti_0"].item() == 2
    assert found["betti_1"].item() == 2  # two triangles


def test_betti_numbers_of_small_graphs():
    path = np.eye(5, k=1, dtype=bool)[[4, 0, 3, 1, 2]][:, [4, 0, 3, 1, 2]]  # in any order
    path |= path.T
    assert _betti(path) == (1, 0)
    ring = path.copy()
    ends = np.flatnonzero(path.sum(0) == 1)
    ring[ends[0], ends[1]] = ring[ends[1], ends[0]] = True
    assert _betti(ring) == (1, 1)
    assert _betti(np.zeros((3, 3), bool)) == (3, 0)


def test_divergence_between_layers():
    found = sink_geometry(stack([[np.eye(4)], [np.eye(4)], [np.roll(np.eye(4), 1, 1)]]))
    assert np.isnan(found["divergence"].values[0, 0])
    np.testing.assert_allclose(found["divergence"].values[0, 1:], [0, math.log(2)], atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_recording_of_maps_and_one_of_sums_say_the_same(family):
    model, inputs = build(family)
    inputs = {"input_ids": inputs["input_ids"].repeat(1, 3)}
    with torch.no_grad(), regard.record(model, "rows", "received") as recording:
        model(**inputs)
    found = next(iter(recording.tree.children.values())).to_dataset()
    sums = reference_frame(found, threshold=0.01)
    assert family != "bert" or float(sums["anchored"].min()) > 0, "the test should see reference points"
    shape = sink_geometry(found, threshold=0.01)
    assert sums.equals(shape[list(sums.data_vars)])
    for name in ("centralisation", "star_likeness", "algebraic_connectivity"):
        assert shape[name].dims == ("batch", "layer")
        assert bool(shape[name].notnull().all())


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="'rows'"):
        sink_geometry(stack([[even(4)]]).drop_vars("rows"))
    with pytest.raises(ValueError, match="self-attention"):
        sink_geometry(stack([[even(4)]]).assign_attrs(kind="cross"))


@pytest.mark.parametrize("name", ["sink_geometry"])
def test_examples_in_docstrings(name):
    failed, tried = doctest.testmod(importlib.import_module(f"regard.statistics.{name}"))
    assert tried
    assert not failed
