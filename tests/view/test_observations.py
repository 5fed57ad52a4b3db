"""Sentences are true of recordings whose truth is planted."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from regard.observations import observe


def planted(keys: np.ndarray, texts: list[str], received: np.ndarray | None = None, causal: bool = True) -> xr.DataTree:
    """One layer, one head, whose largest weight is on `keys`."""
    n = len(texts)
    dataset = xr.Dataset(
        {
            "top_keys": (("batch", "layer", "head", "query", "rank"), keys.reshape(1, 1, 1, n, 1)),
            "received": (
                ("batch", "layer", "head", "key"),
                (np.ones(n) if received is None else received).reshape(1, 1, 1, n),
            ),
        },
        coords={
            "layer": [3],
            "head": [5],
            "query": np.arange(n),
            "key": np.arange(n),
            "query_token": (("batch", "query"), np.array([texts], dtype=object)),
            "key_token": (("batch", "key"), np.array([texts], dtype=object)),
            "query_role": (("batch", "query"), np.full((1, n), "text", dtype=object)),
        },
        attrs={"kind": "self", "causal": causal},
    ).assign_coords(head=[0])
    return xr.DataTree.from_dict({"/language_model": dataset})


UNLIKE = [f"t{i}" for i in range(20)]


def test_previous_token():
    keys = np.arange(20) - 1
    keys[4] = 0  # one miss of 18
    (found,) = observe(planted(keys, UNLIKE))
    assert found.text == "Language model layer 3 head 0 looks at the previous token in 94% of positions (17 of 18)."
    assert (found.stack, found.layer, found.head) == ("language_model", 3, 0)
    assert found.score == pytest.approx(17 / 18)


def test_induction_is_what_followed_an_earlier_copy():
    texts = [f"t{i % 10}" for i in range(20)]
    keys = np.where(np.arange(20) >= 10, np.arange(20) - 9, 0)
    names = [o.text for o in observe(planted(keys, texts))]
    assert any("followed an earlier copy of the token (induction) in 100% of positions (10 of 10)" in t for t in names)
    assert not any("looks at an earlier copy" in t for t in names)


def test_the_same_token_over_and_over_shows_no_rule():
    assert not [o for o in observe(planted(np.arange(20) - 3, ["a"] * 20)) if "copy" in o.text]


def test_a_sink_gets_much_more_than_its_place_would():
    even = np.array([(1 / np.arange(j + 1, 21)).sum() for j in range(20)])
    assert observe(planted(np.full(20, -1), UNLIKE, even)) == []  # early keys are seen by more queries: no sink
    sink = np.full(20, 4 / 19)
    sink[0] = 16.0
    (found,) = observe(planted(np.full(20, -1), UNLIKE, sink))
    assert found.text == "Language model: 80% of all attention goes to the first token ('t0'), most in layer 3 (80%)."


def test_too_few_positions_say_nothing():
    assert observe(planted(np.arange(5) - 1, UNLIKE[:5])) == []
