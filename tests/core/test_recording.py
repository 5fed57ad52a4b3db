"""A recording keeps its labels, survives being written and read, and is never half there."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import words
from families import build

import regard


@pytest.fixture
def recording():
    model, inputs = build("llava", "sdpa")
    with torch.no_grad(), regard.record(model, "entropy", "received", "mass", "top_keys", processor=words()) as found:
        model(**inputs)
    return found


def test_dims_and_coordinates(recording):
    stack = recording.tree["language_model"]
    assert stack["entropy"].dims == ("batch", "layer", "head", "query")
    assert stack["received"].dims == ("batch", "layer", "head", "key")
    assert stack["mass"].dims == ("batch", "layer", "head", "query", "role")
    assert list(stack["role"].values) == ["text", "image"]
    assert stack["entropy"].attrs["units"] == "nats"
    assert stack["mass"].attrs["range"] == [0, 1]
    assert stack["entropy"].attrs["about"].startswith("Spread of each query's attention")
    assert stack.attrs["sites"] == [
        "model.language_model.layers.0.self_attn",
        "model.language_model.layers.1.self_attn",
    ]
    assert float(stack["entropy"].sel(layer=1, head=2, query=0, batch=0)) == 0.0
    rows, columns = stack["key_row"].values[0, 2:18], stack["key_column"].values[0, 2:18]
    assert list(rows) == [i // 4 for i in range(16)]
    assert list(columns) == [i % 4 for i in range(16)]
    assert list(stack["key_image"].values[:, 2]) == [0, 1]  # row b of the batch has picture b


def test_saved_and_opened_again_is_the_same(recording, tmp_path):
    path = recording.save(tmp_path / "one.zarr")
    again = regard.open(path)
    assert again.tree.identical(recording.tree)
    assert not again.partial
    for stack in recording.tree.children:
        assert again.tree[stack].dataset.identical(recording.tree[stack].dataset)
    assert again.tree["language_model"]["key_token"].values[0, 2] == "<image>"


def test_saving_again_replaces_the_whole(recording, tmp_path):
    path = recording.save(tmp_path / "one.zarr")
    recording.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["one.zarr"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(FileExistsError, match="is not a recording"):
        recording.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "file").exists()


def test_a_failed_save_leaves_the_old_one(recording, tmp_path, monkeypatch):
    path = recording.save(tmp_path / "one.zarr")
    before = sorted(p.read_bytes() for p in path.rglob("*") if p.is_file())
    import os

    rename = os.rename

    def fails(source, target):
        if str(source).endswith(".part"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match=r"could not be written to .*No space left"):
        recording.save(path)
    assert sorted(p.read_bytes() for p in path.rglob("*") if p.is_file()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["one.zarr"]


def test_several_runs(tmp_path):
    model, inputs = build("llama")
    with torch.no_grad(), regard.record(model, "entropy") as recording:
        for n in (5, 7):
            model(input_ids=inputs["input_ids"][:, :n])
    assert [tree["language_model"].sizes["query"] for tree in recording] == [5, 7]
    again = regard.open(recording.save(tmp_path / "two.zarr"))
    assert len(again) == 2
    assert again[1].identical(recording[1])


def test_what_is_no_recording_is_refused(recording, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a recording"):
        regard.open(tmp_path)
    path = recording.save(tmp_path / "one.zarr")
    meta = path / "run_0" / "language_model" / "entropy" / "zarr.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "codecs": [{"name": "pickle"}]}))
    with pytest.raises(ValueError, match="cannot be read as a recording"):
        regard.open(path)


def test_zarr_2_stores_which_may_hold_pickles_are_refused(tmp_path):
    (tmp_path / ".zgroup").write_text('{"zarr_format": 2}')
    with pytest.raises(FileNotFoundError, match="is not a recording"):
        regard.open(tmp_path)


def test_heads_of_unlike_layers_are_nan_where_missing():
    """A pruned layer: fewer heads than the others."""
    from regard.call import Site
    from regard.recording import Recorder, Run, Spec
    from regard.seam import Call

    recorder = Recorder({}, None, {})
    recorder.specs = {"entropy": Spec(("batch", "head", "query"), "Entropy", "nats")}
    run = Run()
    recorder.runs.append(run)
    for layer, heads in ((3, 4), (7, 2)):
        zero = torch.zeros(1, heads, 5, 2)
        call = Call(Site(f"layers.{layer}", "language_model", layer), zero, zero, zero, 1.0)
        run.sites.setdefault("language_model", {})[layer] = call.site
        recorder.add(run, call, "entropy", call.weights.entropy())
    entropy = recorder.tree["language_model"]["entropy"]
    assert list(entropy["layer"].values) == [3, 7]
    assert not np.isnan(entropy.sel(layer=3)).any()
    assert np.isnan(entropy.sel(layer=7, head=[2, 3])).all()
    assert not np.isnan(entropy.sel(layer=7, head=[0, 1])).any()
