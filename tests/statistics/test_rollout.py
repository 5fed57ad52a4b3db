"""Rollout and flow: worked by hand, limits, invariants, and another solver."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
import torch
import xarray as xr
from families import build

import regard
from regard.statistics.flow import flow
from regard.statistics.rollout import rollout


def recorded(*layers: list[list[float]] | list[list[list[float]]], **attrs) -> xr.Dataset:
    """Rows of layers, each [query, key] or [head, query, key]."""
    rows = np.stack([np.asarray(one, dtype=np.float32).reshape(-1, *np.shape(one)[-2:]) for one in layers])[None]
    return xr.Dataset(
        {"rows": (("batch", "layer", "head", "query", "key"), rows)}, {"layer": range(len(layers))}, attrs
    )


FIRST, SECOND = [[1, 0], [0.5, 0.5]], [[1, 0], [1, 0]]


def test_rollout_worked_by_hand():
    # half identity: [[1, 0], [1/4, 3/4]], then [[1, 0], [1/2, 1/2]]: the last token keeps 1/2 * 3/4 of itself
    rolled = rollout(recorded(FIRST, SECOND))
    assert rolled.dims == ("batch", "layer", "query", "key")
    np.testing.assert_allclose(rolled.values[0, 0], [[1, 0], [0.25, 0.75]])
    np.testing.assert_allclose(rolled.values[0, 1], [[1, 0], [1 / 2 + 1 / 8, 3 / 8]])
    np.testing.assert_allclose(rollout(recorded(FIRST, SECOND), residual=0).values[0, 1], [[1, 0], [1, 0]])
    np.testing.assert_allclose(rollout(recorded(FIRST, SECOND), residual=1).values[0, 1], np.eye(2))
    heads = rollout(recorded([[[1, 0], [1, 0]], [[1, 0], [0, 1]]]))  # their mean is FIRST
    np.testing.assert_allclose(heads.values[0, 0], rolled.values[0, 0])


def test_flow_worked_by_hand():
    # to token 1: the direct pipe of 1/2, then 3/4. To token 0: 1/2 * 1, and 1/4 of the other 1/2
    found = flow(recorded(FIRST, SECOND))
    assert found.dims == ("batch", "key")
    np.testing.assert_allclose(found.values[0], [1 / 2 + 1 / 4, 1 / 2], atol=1e-8)
    np.testing.assert_allclose(flow(recorded(FIRST, SECOND), query=0).values[0], [1, 0])
    np.testing.assert_allclose(flow(recorded(FIRST)).values[0], [0.25, 0.75])  # one layer: the weights


def test_a_row_without_weight_passes_on_what_it_has():
    blind = [[0, 0], [0.5, 0.5]]
    np.testing.assert_allclose(rollout(recorded(blind)).values[0, 0], [[1, 0], [0.25, 0.75]])
    missing = recorded([[1, np.nan], [0.5, 0.5]])  # a key of a later step
    np.testing.assert_allclose(rollout(missing).values[0, 0], [[1, 0], [0.25, 0.75]])


def test_rows_of_a_model_that_has_sinks_sum_to_one_again():
    model, inputs = build("gpt_oss")
    with torch.no_grad(), regard.record(model, "rows") as recording:
        model(**inputs)
    rolled = rollout(recording.tree["language_model"])
    np.testing.assert_allclose(rolled.sum("key"), 1)
    assert float(rolled.min()) >= 0
    assert not np.triu(rolled.values[0, -1], 1).any()


def test_flow_equals_another_solver_and_is_no_less_than_one_path():
    model, inputs = build("bert")
    inputs = {"input_ids": inputs["input_ids"][:1, :6]}
    with torch.no_grad(), regard.record(model, "rows") as recording:
        model(**inputs)
    node = recording.tree["language_model" if "language_model" in recording.tree.children else "encoder"]
    found = flow(node, query=2).values[0]
    rows = node["rows"].mean("head").values[0].astype(float)
    mixed = 0.5 * rows / rows.sum(-1, keepdims=True) + 0.5 * np.eye(6)
    graph = networkx.DiGraph()
    for layer, at, key in np.ndindex(mixed.shape):
        graph.add_edge((layer + 1, at), (layer, key), capacity=mixed[layer, at, key])
    theirs = [networkx.maximum_flow_value(graph, (len(mixed), 2), (0, k)) for k in range(6)]
    np.testing.assert_allclose(found, theirs, atol=1e-6)
    assert (found >= rollout(node).values[0, -1, 2] - 1e-6).all()  # all of a token's paths, without competition


def test_generation_folds_as_one_pass_does():
    model, inputs = build("llama")
    inputs = {"input_ids": inputs["input_ids"][:1]}
    with torch.no_grad(), regard.record(model, "rows") as stepwise:
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad(), regard.record(model, "rows") as whole:
        model(ids[:, :-1])
    one, other = (rollout(r.tree["language_model"]).values for r in (stepwise, whole))
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_what_does_not_chain_is_refused():
    good = recorded(FIRST, SECOND)
    for fold in (rollout, flow):
        with pytest.raises(ValueError, match="no rows: record"):
            fold(good.drop_vars("rows"))
        with pytest.raises(ValueError, match="needs self attention"):
            fold(good.assign_attrs(kind="cross"))
        with pytest.raises(ValueError, match="needs self attention"):
            fold(good.isel(query=[0]))
        with pytest.raises(ValueError, match="every layer, and only 1"):
            fold(good.isel(layer=[1]))
    with pytest.raises(ValueError, match="residual=2"):
        rollout(good, residual=2)
