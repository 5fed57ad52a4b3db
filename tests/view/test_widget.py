"""The widget without a browser: addresses as what is selected, and back."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import xarray as xr

pytest.importorskip("anywidget")

import regard
from regard.recording import Recording
from regard.widget import _selected


@pytest.fixture(scope="module")
def recording():
    model, tokenizer = regard.load("reader")
    inputs = tokenizer(["The king spoke to the queen", "Yes"], padding=True, return_tensors="pt")
    with torch.no_grad(), regard.record(model, "entropy", "rows", processor=tokenizer) as recording:
        model(**inputs)
    return recording


def crossed() -> Recording:
    """Two stacks: a cross one of 2 queries and 3 keys, and one whose layers begin at 4."""
    numbers = {"layer": [0, 1], "head": [0, 1, 2], "query": [0, 1], "key": [5, 6, 7]}
    rows = np.full((1, 2, 3, 2, 3), 1 / 3, np.float32)
    cross = xr.Dataset({"rows": (("batch", *numbers), rows)}, numbers, {"kind": "cross"})
    own = xr.Dataset({"entropy": (("batch", "layer", "head", "query"), np.ones((1, 1, 3, 2), np.float32))},
                     {"layer": [4], "head": [0, 1, 2], "query": [0, 1]})  # fmt: skip
    return Recording([xr.DataTree.from_dict({"to from": cross, "own": own})])


def test_what_the_page_says_is_selected_and_told(recording):
    widget, heard = recording.widget(), []
    assert widget.selected == {}
    widget.observe(lambda change: heard.append(change["new"]), "selected")
    widget.set_state({"address": "#language_model/2/5/3"})  # as a browser does
    head = {"stack": "language_model", "layer": 2, "head": 5, "scope": "head", "batch": 0}
    assert widget.selected == {**head, "query": 3, "key": 3}
    widget.set_state({"address": "#language_model/2/5/-/rollout/1"})
    assert widget.selected == {**head, "query": None, "key": None, "scope": "rollout", "batch": 1}
    assert len(heard) == 2
    entropy = recording.tree[widget.selected["stack"]]["entropy"]
    assert entropy.sel(layer=widget.selected["layer"], head=widget.selected["head"]).dims == ("batch", "query")


@pytest.mark.parametrize(
    "address", ["", "#", "#other/0/0/-", "#language_model/1", "#language_model/a/0/-", "#a/0/0/-/x"]
)
def test_what_is_no_address_selects_nothing(recording, address):
    assert _selected(recording.tree, address) == {}


def test_what_is_selected_in_python_is_an_address_of_the_page(recording):
    widget = recording.widget()
    widget.select(layer=np.int64(3), head=5.0, token=2, batch=1, scope="layer")
    assert widget.address == "#language_model/3/5/2/layer/1"
    widget.select(head=1)  # layer and sample stay
    assert widget.address == "#language_model/3/1/-/head/1"
    with pytest.raises(Exception, match="read-only"):
        widget.selected = {}


@pytest.mark.parametrize(
    ("given", "there"),
    [
        ({"stack": "decoder"}, "language_model"),
        ({"layer": 6}, "0, 1, 2, 3, 4, 5"),
        ({"head": "x" * 500}, "0, 1, 2"),
        ({"token": 99}, "0, 1, 2"),
        ({"token": "k"}, "0, 1, 2"),
        ({"batch": 2}, "0, 1"),
        ({"batch": -1}, "0, 1"),
        ({"scope": "heads"}, "head, layer, all, rollout"),
    ],
)
def test_what_was_not_recorded_is_refused_with_what_was(recording, given, there):
    widget = recording.widget()
    widget.select(layer=1)
    with pytest.raises(ValueError, match=rf"select: {next(iter(given))}=.*was not recorded; there is {there}") as error:
        widget.select(**given)
    assert len(str(error.value)) < 200
    assert widget.selected["layer"] == 1


def test_of_cross_attention_a_token_is_a_query_or_a_key():
    widget = crossed().widget()
    widget.select(layer=1, head=2, token=1)
    assert (widget.selected["query"], widget.selected["key"]) == (1, None)
    widget.select(token="k6")
    assert widget.address == "#to%20from/1/2/k6/head/0"
    assert (widget.selected["query"], widget.selected["key"]) == (None, 6)
    with pytest.raises(ValueError, match="there is 5, 6, 7"):
        widget.select(token="k1")
    widget.select(stack="own", token=1)  # another stack begins at its first head, and has no keys
    assert widget.selected == {
        "stack": "own",
        "layer": 4,
        "head": 0,
        "batch": 0,
        "query": 1,
        "key": None,
        "scope": "head",
    }


def test_where_no_widget_runs_the_page_stands_in_a_frame(recording):
    data, _ = recording.widget(height=333)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/html"] == recording.show(height=333)._repr_html_()
    assert data["text/plain"] == repr(recording.show())


def test_without_its_package_it_says_how_to_get_it(tmp_path):
    code = "import regard.widget"
    (tmp_path / "anywidget.py").write_text("raise ImportError(name='anywidget')")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert 'the package anywidget is missing; pip install "regard[notebook]"' in done.stderr
