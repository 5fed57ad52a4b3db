"""Padding: what even attention gives, and what is left of a row, against sums over every pair."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.padding import evenly, real, unpadded, visible


def stack(pad: np.ndarray, *, causal: bool = True, first: int = 0) -> xr.Dataset:
    batch, n = pad.shape
    roles = np.where(pad, "pad", "text").astype(object)
    at = np.arange(first, first + n)
    coords = {"query": at, "key": at, "query_role": (("batch", "query"), roles), "key_role": (("batch", "key"), roles)}
    head = ("batch", "layer", "head")
    data = {
        "entropy": ((*head, "query"), np.ones((batch, 1, 1, n), np.float32), {"units": "nats"}),
        "received": ((*head, "key"), np.ones((batch, 1, 1, n), np.float32)),
        "rows": ((*head, "query", "key"), np.ones((batch, 1, 1, n, n), np.float32)),
        "top_keys": ((*head, "query", "rank"), np.zeros((batch, 1, 1, n, 1), np.int32)),
        "mass": ((*head, "query", "role"), np.ones((batch, 1, 1, n, 2), np.float32)),
    }
    return xr.Dataset(data, {**coords, "role": ["text", "pad"]}, {"kind": "self", "causal": causal})


LEFT = np.array([[False] * 4, [True, True, False, False]])


def test_even_attention_by_hand():
    third = 1 + 1 / 2 + 1 / 3 + 1 / 4
    np.testing.assert_allclose(
        evenly(stack(LEFT)), [[third, third - 1, third - 1.5, 1 / 4], [np.nan, np.nan, 1.5, 0.5]]
    )
    np.testing.assert_allclose(evenly(stack(LEFT, causal=False)), [[1] * 4, [np.nan, np.nan, 1, 1]])
    assert visible(stack(LEFT)).values.tolist() == [[1, 2, 3, 4], [0, 0, 1, 2]]


@settings(max_examples=60, deadline=None)
@given(
    pad=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3),
    causal=st.booleans(),
    first=st.integers(0, 5),
    queries=st.integers(1, 6),
)
def test_even_attention_equals_the_sum_over_pairs(pad, causal, first, queries):
    """Also of the last queries alone, as after a cache."""
    node = stack(np.array(pad), causal=causal, first=first).isel(query=slice(6 - queries, None))
    keys, asks = ~np.array(pad), ~np.array(pad)[:, 6 - queries :]
    at, to = node["query"].values, node["key"].values
    seen = keys[:, None] & ((to <= at[:, None]) if causal else np.ones((queries, 6), bool))
    weights = seen / np.maximum(seen.sum(-1, keepdims=True), 1) * asks[..., None]
    np.testing.assert_allclose(evenly(node), np.where(keys, weights.sum(1), np.nan))
    np.testing.assert_array_equal(visible(node), seen.sum(-1))


def test_what_is_left_without_padding():
    node = stack(LEFT)
    left = unpadded(node)
    assert left["entropy"].isnull().values[:, 0, 0].tolist() == LEFT.tolist()
    assert left["received"].isnull().values[:, 0, 0].tolist() == LEFT.tolist()
    np.testing.assert_array_equal(left["rows"].notnull()[1, 0, 0], ~LEFT[1] & ~LEFT[1][:, None])
    assert left["role"].values.tolist() == ["text"]
    assert left["top_keys"].identical(node["top_keys"])
    assert left["entropy"].attrs == {"units": "nats"}
    assert left["entropy"].dims == node["entropy"].dims


def test_without_roles_nothing_is_padding():
    node = stack(LEFT).drop_vars(["query_role", "key_role"])
    assert real(node, "query").all()
    assert unpadded(node)["entropy"].notnull().all()


@pytest.mark.parametrize("axis", ["query", "key"])
def test_roles_may_be_the_same_in_every_row(axis):
    node = stack(LEFT)
    node = node.assign_coords({f"{axis}_role": ((axis,), np.array(["pad", "text", "text", "text"], dtype=object))})
    assert real(node, axis).values.tolist() == [[False, True, True, True]]
