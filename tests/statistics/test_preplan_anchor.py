"""Preplan and anchor tokens follow the paper's equations, without its maps."""

from __future__ import annotations

import doctest
import importlib
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from families import build, text

import regard
from regard import Call, Site
from regard.statistics import received_ahead as file
from regard.statistics.preplan_anchor import NEEDED, credit, middle_layers, preplan_anchor
from regard.statistics.received_ahead import received_ahead
from regard.statistics.windowed_distance import windowed_distance


def even(n):
    zero = torch.zeros(1, 1, n, 2)
    return Call(Site("attention", "language_model", 0, causal=True), zero, zero, zero, 1.0, causal=True)


def test_an_even_row_in_a_window_by_hand():
    # Query 4 gives 1/5 to each of the distances 0 to 4, which count 0 1 2 2 2.
    assert torch.allclose(windowed_distance(even(5), window=2)[0, 0, 4], torch.tensor(7 / 5))


def test_even_attention_from_ahead_by_hand():
    found = received_ahead(even(6), near=2, far=3)[0, 0]
    expected = [1 / 3 + 1 / 4, 1 / 4 + 1 / 5, 1 / 5 + 1 / 6, 1 / 6, 0, 0]
    assert torch.allclose(found, torch.tensor(expected))
    assert torch.allclose(received_ahead(even(6), near=0, far=None), even(6).weights.received())
    with pytest.raises(ValueError, match="0 <= near <= far"):
        received_ahead(even(6), near=3, far=2)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "bert"])
@pytest.mark.parametrize("strip", [1, 100, 2**22])
def test_what_is_received_from_ahead_is_that_of_the_map(family, strip, monkeypatch):
    monkeypatch.setattr(file, "_STRIP", strip)
    model, inputs = build(family)
    ahead = partial(received_ahead, near=2, far=5)
    with torch.no_grad(), regard.record(model, "rows", ahead=ahead) as recording:
        model(**inputs)
    stack = next(iter(recording.tree.children.values())).to_dataset()
    maps = stack["rows"].transpose("batch", "layer", "head", "query", "key").values.astype(float)
    apart = np.arange(12)[:, None] - np.arange(12)
    expected = (maps * ((apart >= 2) & (apart <= 5))).sum(-2)
    np.testing.assert_allclose(stack["ahead"].transpose("batch", "layer", "head", "key"), expected, atol=1e-6)


def generated(model, n=20, **inputs):
    few = {
        "windowed_distance": partial(windowed_distance, window=3),
        "received_ahead": partial(received_ahead, near=2, far=6),
    }
    with torch.no_grad(), regard.record(model, "distance", "rows", **few) as steps:
        ids = model.generate(**inputs, max_new_tokens=n, do_sample=False, pad_token_id=0)
    return ids, steps.tree["language_model"].to_dataset()


def test_decoding_adds_up_to_what_one_pass_gives():
    model, _ = build("llama", "sdpa")
    ids, stack = generated(model, **text())
    with torch.no_grad(), regard.record(model, ahead=partial(received_ahead, near=2, far=6)) as whole:
        model(ids[:, :-1])
    np.testing.assert_allclose(stack["received_ahead"], whole.tree["language_model"]["ahead"], atol=1e-5)


def paper(maps, response, *, window, near, far, share, top):
    """Equations 7 to 15 for one sequence, on maps [head, query, key]."""
    n = maps.shape[-1]
    rows = np.flatnonzero(response)
    back = np.arange(n)[:, None] - np.arange(n)
    reach = (maps * back).sum(-1)[:, rows].mean(-1)
    order = np.argsort(reach)
    count = max(1, round(share * len(order)))
    local, far_away = maps[order[:count]].mean(0), maps[order[-count:]].mean(0)
    waad = (local * np.minimum(back, window)).sum(-1)
    fai = np.full(n, np.nan)
    for s in rows:
        later = [t for t in rows if s + near <= t <= s + far]
        if later:
            fai[s] = far_away[later, s].mean()
    change = np.full(n, np.nan)
    change[rows[:-1]] = np.abs(waad[rows[:-1]] - waad[rows[1:]])
    k = round(top * len(rows))
    preplan, anchor = (set(np.argsort(np.where(np.isnan(v), -np.inf, v))[-k:]) for v in (change, fai))
    return waad, fai, change, preplan, anchor, reach


def test_the_papers_equations():
    model, _ = build("llama", "sdpa")
    _, stack = generated(model, **text(batch=1))
    found = preplan_anchor(stack, near=2, far=6)
    maps = stack["rows"].isel(batch=0).transpose("layer", "head", "query", "key").values.astype(float)
    maps = np.nan_to_num(maps.reshape(-1, *maps.shape[-2:]))  # a step has no weight on keys yet to come
    response = found["response"].values[0]
    assert response.sum() == 19, "the token that is generated last is never looked from"
    waad, fai, change, preplan, anchor, reach = paper(maps, response, window=3, near=2, far=6, share=0.3, top=0.4)
    np.testing.assert_allclose(found["reach"].values.ravel(), reach, rtol=1e-5)
    np.testing.assert_allclose(found["waad"].values[0][response], waad[response], rtol=1e-5)
    np.testing.assert_allclose(found["fai"].values[0], fai, rtol=1e-4)
    np.testing.assert_allclose(found["change"].values[0], change, rtol=1e-3)
    assert set(np.flatnonzero(found["preplan"].values[0])) == preplan
    assert set(np.flatnonzero(found["anchor"].values[0])) == anchor
    assert len(anchor) == len(preplan) == 8


def stack_of(waad, fai, roles, near=1, far=1):
    """Three heads: one local, one global, one between; FAI over the next token only is what that gives."""
    n = len(waad)
    other = np.zeros(n)
    distance = np.stack([np.full(n, 1.0), np.full(n, 9.0), np.full(n, 5.0)])
    coords = {"query": np.arange(n), "key": np.arange(n), "layer": [0], "head": [0, 1, 2]}
    coords["query_role"] = (("batch", "query"), np.array([roles], object))
    dims = ("batch", "layer", "head", "query")
    data = {
        "distance": (dims, distance[None, None]),
        "windowed_distance": (dims, np.stack([waad, other, other])[None, None]),
        "received_ahead": ((*dims[:3], "key"), np.stack([other, fai, other])[None, None]),
    }
    return xr.Dataset(data, coords, {"kind": "self", "causal": True})


def test_credit_by_hand():
    roles = ["text"] * 2 + ["generated"] * 10
    waad = [9, 9, 1, 1, 6, 1, 1, 1, 5, 5, 1, 1.0]
    fai = [1, 1, 0, 0, 0, 0.9, 0, 0, 0.8, 0, 0, 0.7]  # the last has no later token
    stack = stack_of(np.array(waad), np.array(fai), roles)
    found = preplan_anchor(stack, near=1, far=1, top=0.2)
    assert found["local_head"].values.tolist() == [[True, False, False]]
    assert found["global_head"].values.tolist() == [[False, True, False]]
    np.testing.assert_allclose(found["change"].values[0, 2:], [0, 5, 5, 0, 0, 4, 0, 4, 0, np.nan])
    assert np.flatnonzero(found["preplan"].values[0]).tolist() == [3, 4]
    assert np.flatnonzero(found["anchor"].values[0]).tolist() == [5, 8]
    # Token 5 is low (median 1) and the largest change before it, 5, is first at token 3; token 8 is high itself.
    assert np.flatnonzero(found["dominated"].values[0]).tolist() == [5]
    assert np.flatnonzero(found["introduction"].values[0]).tolist() == [3]
    expected = np.ones(12)
    expected[[3, 5, 8]] = 1.25, 1.25, 1.5
    np.testing.assert_allclose(credit(found).values[0], expected)
    expected[[3, 5, 8]] = 1.1, 1.4, 1.5
    np.testing.assert_allclose(credit(found, alpha=0.2).values[0], expected)
    assert np.flatnonzero(credit(found, by="local").values[0] == 1.5).tolist() == [3, 4]
    assert np.flatnonzero(credit(found, by="global").values[0] == 1.5).tolist() == [5, 8]
    both = found.assign(introduction=found["anchor"])
    assert float(credit(both).sel(token=8)[0]) == 1.75, "terms of equation 18 add up"
    with pytest.raises(ValueError, match="'local', 'global' or 'coupled'"):
        credit(found, by="both")


def test_rows_of_a_batch_do_not_mix():
    model, _ = build("llama", "sdpa")
    ids = text()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    _, both = generated(model, input_ids=ids, attention_mask=mask)
    found = preplan_anchor(both, near=2, far=6)
    per_row = found["preplan"].sum("token").values.tolist(), found["anchor"].sum("token").values.tolist()
    assert per_row == ([8, 8], [8, 8])
    assert (found["response"].values[:, 12:]).all()
    assert not found["anchor"].values[:, :12].any()


def test_what_is_missing_is_named():
    model, inputs = build("llama")
    with torch.no_grad(), regard.record(model, "distance") as recording:
        model(**inputs)
    with pytest.raises(ValueError, match="lacks windowed_distance, received_ahead"):
        preplan_anchor(recording.tree["language_model"].to_dataset())
    with torch.no_grad(), regard.record(model, *NEEDED) as recording:
        model(**inputs)
    stack = recording.tree["language_model"].to_dataset()
    with pytest.raises(ValueError, match=r"no token has a role of \('generated', 'assistant'\), only text"):
        preplan_anchor(stack)
    with pytest.raises(ValueError, match=r"share=0\.6"):
        preplan_anchor(stack, roles=("text",), share=0.6)
    assert preplan_anchor(stack, roles=("text",))["response"].values.all()


def test_layers_of_the_middle_third():
    assert middle_layers(36) == [12, 15, 18, 21, 24]
    assert middle_layers(3) == [1, 2]


@pytest.mark.parametrize("name", ["preplan_anchor"])
def test_examples_in_docstrings(name):
    failed, tried = doctest.testmod(importlib.import_module(f"regard.statistics.{name}"))
    assert tried
    assert not failed
