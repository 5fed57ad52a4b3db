"""Recordings of several processes, joined along the batch as if one had run all rows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import xarray as xr
from families import build

import regard
from regard import ranks

STATISTICS = ("entropy", "received", "mass", "rows", "top_keys")


@torch.no_grad()
def parts(model, *inputs):
    found = []
    for given in inputs:
        with regard.record(model, *STATISTICS) as recording:
            model(**given)
        found.append(list(recording))
    return found


@pytest.fixture(scope="module")
def seeing():
    model, inputs = build("llava")
    return model, {name: value for name, value in inputs.items() if name in ("input_ids", "pixel_values")}


def test_rows_join_as_one_process_records_them(seeing):
    model, inputs = seeing
    halves = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(2)]
    (tree,) = ranks.joined(parts(model, *halves))
    ((whole,),) = parts(model, inputs)
    for stack in whole.children:
        ours, theirs = (t[stack].to_dataset(inherit=False) for t in (tree, whole))
        xr.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
        assert ours.attrs == theirs.attrs
    assert len(json.loads(whole["language_model"].attrs["grids"])) == 2, "nothing to number anew"


@torch.no_grad()
def test_a_role_that_only_some_rows_have_draws_nothing_in_the_others():
    model, inputs = build("llama")
    found = []
    for roles in (["user"] * 12, ["system"] * 5 + ["user"] * 7):
        with regard.record(model, "mass", roles=roles) as recording:
            model(**inputs)
        found.append(list(recording))
    (tree,) = ranks.joined(found)
    mass = tree["language_model"]["mass"]
    assert list(mass["role"].values) == list(found[1][0]["language_model"]["role"].values) == ["system", "user"]
    assert float(mass.isel(batch=slice(2)).sel(role="system").max()) == 0.0
    assert float(mass.isel(batch=slice(2, None)).sel(role="system").min()) > 0.1
    np.testing.assert_allclose(mass.sum("role"), 1.0, atol=1e-5)


def test_shorter_rows_end_in_padding():
    model, inputs = build("llama")
    long, short = inputs["input_ids"][:1], inputs["input_ids"][1:, :7]
    (tree,) = ranks.joined(parts(model, {"input_ids": short}, {"input_ids": long}))
    stack = tree["language_model"]
    assert list(stack["query_role"].values[0]) == [*stack["query_role"].values[1, :7], *["pad"] * 5]
    assert list(stack["key_token"].values[0, 6:8]) == [str(int(short[0, 6])), ""]
    for name, missing in (
        ("entropy", np.isnan),
        ("received", np.isnan),
        ("rows", np.isnan),
        ("top_keys", lambda x: x == -1),
    ):
        values = stack[name].values
        assert missing(values[0][:, :, 7:]).all(), name
        assert not missing(values[1][:, :, 6:, ..., 0] if values.ndim > 4 else values[1]).any(), name
    ((alone,),) = parts(model, {"input_ids": short})
    np.testing.assert_array_equal(stack["entropy"].values[0, ..., :7], alone["language_model"]["entropy"].values[0])


def test_what_cannot_be_joined_is_refused():
    model, inputs = build("llama")
    other, pictures = build("vit")
    (one,), (two,) = parts(model, inputs), parts(other, pictures)
    with pytest.raises(ValueError, match="1 to 2 runs each"):
        ranks.joined([one, [*one, *one]])
    with pytest.raises(ValueError, match="other stacks"):
        ranks.joined([one, two])
    fewer = [xr.DataTree.from_dict({"/language_model": one[0]["language_model"].to_dataset().drop_vars("mass")})]
    with pytest.raises(ValueError, match="other layers, heads or statistics of 'language_model'"):
        ranks.joined([one, fewer])
    lost = one[0]["language_model"].to_dataset()
    lost["overall"] = lost["entropy"].mean("batch")
    lost = [xr.DataTree.from_dict({"/language_model": lost})]
    with pytest.raises(ValueError, match="'overall' has no batch axis"):
        ranks.joined([lost, lost])


def test_one_process_gathers_itself():
    model, inputs = build("llama")
    with torch.no_grad(), regard.record(model, "entropy") as recording:
        model(**inputs)
    whole = recording.gather()
    assert whole is not None
    xr.testing.assert_identical(whole.tree, recording.tree)
