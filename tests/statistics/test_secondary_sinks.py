"""Sinks are found where they were planted, and scored as by hand."""

from __future__ import annotations

import doctest
import importlib

import numpy as np
import pytest
import torch
import xarray as xr
from families import build

import regard
from regard import Site
from regard.claims.statistics.secondary_sinks import DECOY, LAYERS, Plant, planted, sinks_of
from regard.statistics.secondary_sinks import SinkReader, _primary, levels, secondary_sinks
from regard.statistics.sink_score import sink_score


def recorded(received, causal, roles=None):
    received = np.asarray(received, float)
    n = received.shape[-1]
    coords = {"query": np.arange(n), "key": np.arange(n)}
    if roles is not None:
        coords["query_role"] = (("batch", "query"), np.array(roles, object))
    data = {"received": (("batch", "layer", "head", "key"), received)}
    return xr.Dataset(data, coords, {"causal": causal})


def test_the_score_of_even_attention_by_hand():
    # Four queries over what comes before: 1, 1/2 1/2, 1/3 1/3 1/3, 1/4 1/4 1/4 1/4.
    columns = [1 + 1 / 2 + 1 / 3 + 1 / 4, 1 / 2 + 1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 1 / 4]
    found = sink_score(recorded([[[columns]]], causal=True))
    np.testing.assert_allclose(found.values[0, 0, 0], [columns[0] / 4, columns[1] / 3, columns[2] / 2, columns[3]])
    np.testing.assert_allclose(sink_score(recorded([[[[1.0] * 4]]], causal=False)).values, 0.25)


def test_padding_is_no_query():
    left = recorded([[[[0, 1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3]]]], True, [["pad", "text", "text", "text"]])
    np.testing.assert_allclose(sink_score(left).values[0, 0, 0, 1:], [11 / 18, 5 / 12, 1 / 3])
    right = recorded([[[[1 + 1 / 2, 1 / 2, 0]]]], True, [["text", "text", "pad"]])
    np.testing.assert_allclose(sink_score(right).values[0, 0, 0], [3 / 4, 1 / 2, np.nan])


@pytest.mark.parametrize("family", ["llama", "mistral", "bert"])
def test_the_score_is_the_mean_of_a_column(family):
    model, inputs = build(family)
    with torch.no_grad(), regard.record(model, "received", "rows") as recording:
        model(**inputs)
    stack = next(iter(recording.tree.children.values())).to_dataset()
    maps = stack["rows"].transpose("batch", "layer", "head", "query", "key").values.astype(float)
    n = maps.shape[-1]
    for key in range(n):
        first = key if stack.attrs["causal"] else 0
        expected = maps[..., first:, key].mean(-1)
        np.testing.assert_allclose(sink_score(stack).values[..., key], expected, atol=1e-6)


def test_a_score_needs_received():
    with pytest.raises(ValueError, match="'received'"):
        sink_score(recorded([[[[1.0]]]], True).drop_vars("received"))


def test_the_primary_sink_lasts_from_its_leap_to_its_fall():
    norms = [[4, 5, 60, 61, 62, 9, 5], [4, 30, 31, 32, 33, 34, 35]]  # before the first layer, and after each of six
    begin, end = _primary(np.array(norms, float))
    assert begin.tolist() == [1, 0]
    assert end.tolist() == [4, 6]  # the second never falls


PLANTS = [Plant(1, LAYERS - 2), Plant(3, 6), Plant(6, 5), Plant(5, direction=DECOY), Plant(7, 3)]


@pytest.fixture(scope="module")
def found():
    model, ids, places = planted([PLANTS], seed=3)
    return sinks_of(model, ids), model, ids, places[0]


def test_planted_sinks_are_found(found):
    sinks, _, _, places = found
    kinds = dict(zip(places, ("primary", "secondary", "secondary", "", "")))
    for token, kind in enumerate(sinks["kind"].values[0]):
        assert kind == ("primary" if token == 0 else kinds.get(token, "")), token
    assert [int(sinks["onset"][0, p]) for p in places] == [1, 3, 6, -1, 7]
    assert [int(sinks["lifetime"][0, p]) for p in places] == [LAYERS - 2, 6, 5, 0, 3]
    assert levels(sinks) == {(3, 6): 1, (6, 5): 1}
    made = sinks["mlp_alignment"].values[0, [3, 6], places[1:3]]
    assert (made > 0.9).all()
    assert abs(float(sinks["mlp_alignment"][0, 5, places[3]])) < 0.5, "the decoy was written along another direction"
    assert float(sinks["mlp_norm"][0, 5, places[3]]) > 20


def test_a_sinks_strength_is_its_mean_score_in_the_layers_that_read_it(found):
    sinks, _, _, places = found
    at = places[1]
    np.testing.assert_allclose(sinks["strength"][0, at], sinks["score"][0, 4:10, at].mean(), rtol=1e-5)
    assert float(sinks["strength"][0, at]) > 5 * float(sinks["score"][0, 12:, at].mean()), "erased, it is none"
    assert np.isnan(sinks["strength"][0, places[3]])


def test_a_sink_may_point_the_other_way():
    """The first token leaps in layer 1; the third takes on the opposite direction in layer 2, and keeps it."""
    hidden = np.full((8, 3, 4), 0.1)
    hidden[:, 1, 1] = 5.0
    hidden[1:, 0, 0] = 100.0
    hidden[2:, 2, 0] = -100.0
    reader = SinkReader()
    for layer, states in enumerate(torch.tensor(hidden).float()):
        site = Site(f"layers.{layer}", "language_model", layer, causal=True)
        reader.mlp(site, (states - torch.tensor(hidden[max(layer - 1, 0)]).float())[None])
        reader.hidden(site, states[None])
    stack = xr.Dataset(
        {"received": (("batch", "layer", "head", "key"), np.ones((1, 8, 1, 3)))},
        {"layer": range(8), "query": range(3), "key": range(3)},
        {"kind": "self", "causal": True},
    )
    found = secondary_sinks(stack, reader, shortest=3)
    assert found["onset"].values[0].tolist() == [1, -1, 2]
    assert found["kind"].values[0].tolist() == ["primary", "", "secondary"]


def test_padding_moves_sinks_and_changes_nothing_else(found):
    sinks, model, ids, _ = found
    padded = torch.cat([ids[:, 5:8], ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    moved = sinks_of(model, padded, mask)
    assert (moved["kind"].values[0, :3] == "").all()
    for name in ("kind", "onset", "lifetime"):
        assert (moved[name].values[0, 3:] == sinks[name].values[0]).all(), name
    np.testing.assert_allclose(moved["score"].values[..., 3:], sinks["score"].values, atol=1e-5)


def test_alignment_is_that_of_the_hidden_states():
    model, inputs = build("qwen3")
    found = sinks_of(model, inputs["input_ids"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states[1]
    expected = torch.nn.functional.cosine_similarity(states, states[:, :1], dim=-1)
    np.testing.assert_allclose(found["alignment"].values[:, 0], expected, atol=1e-5)


def test_a_reader_and_a_recording_of_other_passes_are_told_apart():
    model, inputs = build("llama")
    reader = SinkReader()
    with torch.no_grad(), regard.record(model, "received") as recording:
        model(**inputs)
    stack = recording.tree["language_model"].to_dataset()
    with pytest.raises(ValueError, match="the reader holds 0 layers"):
        secondary_sinks(stack, reader)
    with torch.no_grad(), regard.intervene(model, reader):
        model(inputs["input_ids"][:, :5])
    with pytest.raises(ValueError, match="2 layers of 2 x 5 tokens, and the recording 2 of 2 x 12"):
        secondary_sinks(stack, reader)
    with torch.no_grad(), regard.intervene(model, reader):
        model(**inputs)
    assert secondary_sinks(stack, reader)["kind"].shape == (2, 12)


def test_layers_without_one_feed_forward_module_are_refused():
    with pytest.raises(regard.UnreachableAttention, match="feed-forward"):
        sinks_of(*build("bert")[:1], build("bert")[1]["input_ids"])


@pytest.mark.parametrize("name", ["secondary_sinks", "sink_score"])
def test_examples_in_docstrings(name):
    failed, tried = doctest.testmod(importlib.import_module(f"regard.statistics.{name}"))
    assert tried
    assert not failed
