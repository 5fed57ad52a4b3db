"""Sentences are true of recordings whose truth is planted."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from regard.observations import observe, sinks


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


def padded(tree: xr.DataTree, left: int, alone: bool = False) -> xr.DataTree:
    """The same row with so much padding in front; beside it, unless alone, the row itself with padding after it."""
    node = tree["language_model"].to_dataset()
    n = node.sizes["query"]
    rows = []
    for before in (left,) if alone else (left, 0):
        at = np.arange(n + left) - before
        there = (at >= 0) & (at < n)
        row = node.isel(query=at.clip(0, n - 1), key=at.clip(0, n - 1))
        row = row.assign_coords(query=np.arange(n + left), key=np.arange(n + left))
        for side in ("query", "key"):
            roles = np.where(there, "text", "pad")[None].astype(object)
            row = row.assign_coords({f"{side}_role": (("batch", side), roles)})
        row["top_keys"] = row["top_keys"] + before
        row["received"] = row["received"].where(xr.DataArray(there, dims="key"), 0)
        rows.append(row)
    whole = xr.concat(rows, "batch", data_vars="minimal", coords="minimal", compat="override", join="override")
    return xr.DataTree.from_dict({"/language_model": whole.assign_attrs(node.attrs)})


SINK = np.full(20, 4 / 19)
SINK[0] = 16.0


@pytest.mark.parametrize("alone", [True, False])
def test_padding_changes_no_sentence(alone):
    texts = [f"t{i % 10}" for i in range(20)]
    keys = np.where(np.arange(20) >= 10, np.arange(20) - 9, 0)
    given = planted(keys, texts, SINK)
    said = [one.text for one in observe(given)]
    assert any("induction" in one for one in said)
    assert any("80% of all attention goes to the first token ('t0')" in one for one in said)
    found = [one.text.replace("(20 of 20)", "(10 of 10)") for one in observe(padded(given, 7, alone))]
    assert [one.split(" in ")[0] for one in found] == [one.split(" in ")[0] for one in said]
    if alone:
        assert found == said


@pytest.mark.parametrize(("left", "n"), [(0, 2048), (0, 40), (2000, 48), (2000, 4096)])
def test_attention_that_is_even_but_for_noise_has_no_sink(left, n):
    """Of a long text the first tokens get many times the average key's, and so do a few real ones among padding."""
    even = np.concatenate([np.zeros(left), np.cumsum(1 / np.arange(n, 0, -1))[::-1]])
    noisy = even * np.random.default_rng(0).uniform(0.9, 1.1, n + left)
    roles = np.where(np.arange(n + left) < left, "pad", "text")[None].astype(object)
    node = planted(np.full(n + left, -1), [f"t{i}" for i in range(n + left)], noisy)["language_model"].to_dataset()
    node = node.assign_coords(query_role=(("batch", "query"), roles), key_role=(("batch", "key"), roles))
    judged = sinks(node)
    assert not judged["found"].any()
    np.testing.assert_allclose(judged["times"].values[0, 0, left:], (noisy / np.maximum(even, 1e-9))[left:])
    assert observe(xr.DataTree.from_dict({"/language_model": node})) == []


def test_a_patch_that_is_a_sink_is_named_by_its_place():
    node = planted(np.full(20, -1), [""] * 20, np.roll(SINK, 6), causal=False)["language_model"].to_dataset()
    place = {"image": np.zeros(20, int), "row": np.arange(20) // 5, "column": np.arange(20) % 5}
    node = node.assign_coords({f"key_{name}": (("batch", "key"), x[None]) for name, x in place.items()})
    (found,) = observe(xr.DataTree.from_dict({"/vision_tower": node}))
    assert "80% of all attention goes to the patch in row 2, column 2, most" in found.text


def test_rows_say_what_the_largest_keys_say():
    keys = np.arange(20) - 1
    given = planted(keys, UNLIKE)
    node = given["language_model"].to_dataset()
    rows = np.full((1, 1, 1, 20, 20), 0.01, np.float32)
    rows[..., np.arange(1, 20), keys[1:]] = 0.8
    rows[..., 3, 7:] = np.nan  # a key of a later step
    node["rows"] = (("batch", "layer", "head", "query", "key"), rows)
    found = observe(xr.DataTree.from_dict({"/language_model": node.drop_vars("top_keys")}))
    assert [one.text for one in found] == [one.text for one in observe(given)]


def test_too_few_positions_say_nothing():
    assert observe(planted(np.arange(5) - 1, UNLIKE[:5])) == []
