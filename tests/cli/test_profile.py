"""A profile is what one would get from all items at once, however it is batched, stopped or spread."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
import transformers
import xarray as xr
from conftest import WORDS, words
from families import GROUPED, NO_IDS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import regard
from regard.cli import app
from regard.profile import Item, profile, read
from regard.profile import journal as journals
from regard.profile.items import items as as_items
from regard.profile.numbers import Numbers, Seen
from regard.profile.summary import QUANTILES, SMALLEST, Summary, bins, middles
from regard.recording import Spec

STATISTICS = ("entropy", "received", "distance", "mass")


def sentences(n: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS[4:], k=draw.randint(1, 30))) for _ in range(n)]


@pytest.fixture(scope="module")
def reading(folders):
    return regard.load(folders["gpt2"])


@pytest.fixture
def taken(reading):
    return profile(*reading, sentences(60), *STATISTICS).tree


def same(a: xr.DataTree, b: xr.DataTree, *, exactly: bool = False) -> None:
    """Equal numbers in every node: to the bit, or to rounding."""
    assert [path for path, _ in a.subtree_with_keys] == [path for path, _ in b.subtree_with_keys]
    assert a.attrs["items"] == b.attrs["items"]
    for path, node in a.subtree_with_keys:
        other = b[path] if path != "." else b
        for name, values in node.data_vars.items():
            assert values.dims == other[name].dims
            if exactly:
                assert values.identical(other[name]), f"{path} {name}"
            elif name == "quantiles":  # a value at the edge of a bin may fall to either side
                np.testing.assert_allclose(values, other[name], rtol=1 / 60, atol=2 * SMALLEST)
            elif not name.endswith(("_item", "_token")):
                np.testing.assert_allclose(values, other[name], rtol=2e-4, atol=2e-5, err_msg=f"{path} {name}")


def exemplars(tree: xr.DataTree, path: str, which: str) -> np.ndarray:
    """Texts of exemplars [layer, head, exemplar]."""
    stack, _, _ = path.partition("/")
    labels = tree[stack]
    text = dict(zip(labels["item"].values.tolist(), labels["item_text"].values))
    return np.vectorize(text.get)(tree[path][f"{which}_item"].values)


# ------------------------------------------------------------------------------------------------------ what is kept


def test_every_number_is_that_of_the_items_recorded_one_by_one(reading, taken):
    model, tokenizer = reading
    texts = sentences(60)
    found: dict[str, list[np.ndarray]] = {name: [] for name in STATISTICS}
    tokens = []
    for text in texts:
        with torch.no_grad(), regard.record(model, *STATISTICS, processor=tokenizer) as recording:
            model(**{k: v for k, v in tokenizer(text, return_tensors="pt").items() if k != "token_type_ids"})
        node = recording.tree["language_model"].to_dataset().isel(batch=0)
        for name in ("entropy", "distance"):
            found[name].append(node[name].mean("query").values)
        found["received"].append((node["received"].max("key") / node.sizes["query"]).values)
        found["mass"].append(node["mass"].mean("query").sel(role="text").values)
        tokens.append(node["entropy"].argmax("query").values)
    for name, rows in found.items():
        values = np.stack(rows).astype(np.float64)  # [item, layer, head]
        node = taken[f"language_model/{name}"].to_dataset()
        node = node.sel(role="text") if "role" in node.dims else node
        close = {"rtol": 1e-4, "atol": 1e-6}
        assert (node["count"] == 60).all()
        np.testing.assert_allclose(node["mean"], values.mean(0), **close)
        np.testing.assert_allclose(node["variance"], values.var(0), rtol=1e-3, atol=1e-8)
        np.testing.assert_allclose(node["minimum"], values.min(0), **close)
        np.testing.assert_allclose(node["maximum"], values.max(0), **close)
        exact = np.moveaxis(np.quantile(values, QUANTILES, axis=0, method="lower"), 0, -1)
        np.testing.assert_allclose(node["quantiles"], exact, rtol=1 / 100, atol=2 * SMALLEST)
        order = np.argsort(-values, axis=0)[:5]
        np.testing.assert_allclose(
            np.moveaxis(node["highest"].values, -1, 0), np.take_along_axis(values, order, 0), **close
        )
        assert (np.moveaxis(node["lowest"].values, -1, 0) <= np.take_along_axis(values, order, 0) + 1e-6).all()
    node = taken["language_model/entropy"]
    for layer, head in ((0, 0), (1, 3)):
        at = node["highest_item"].values[layer, head, 0]
        assert node["highest_token"].values[layer, head, 0] == tokens[at][layer, head]


@pytest.mark.parametrize("sizes", [{"batch": 1}, {"batch": 7, "batch_tokens": 100}, {"buffer": 9}])
def test_neither_batches_nor_buffers_matter(reading, taken, sizes):
    same(taken, profile(*reading, sentences(60), *STATISTICS, **sizes).tree)


def test_the_order_of_items_does_not_matter(reading, taken):
    texts = sentences(60)
    random.Random(3).shuffle(texts)
    other = profile(*reading, texts, *STATISTICS).tree
    same(taken, other)
    path = "language_model/distance"
    gaps = np.abs(np.diff(taken[path]["highest"].values)).min(-1) > 1e-3  # no two that rounding could swap
    assert gaps.any()
    first, second = exemplars(taken, path, "highest"), exemplars(other, path, "highest")
    assert (first[gaps][:, :4] == second[gaps][:, :4]).all()


def test_a_result_is_saved_and_opened_whole(reading, tmp_path):
    found = profile(*reading, sentences(9), "entropy", "mass", out=tmp_path / "a.zarr", exemplars=3)
    again = regard.open(tmp_path / "a.zarr")
    assert again.tree.identical(found.tree)
    assert not again.partial
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]  # the state is gone
    assert again.tree["language_model"].dims == {"layer": 2, "quantile": 7, "exemplar": 3, **item_size(again.tree)}
    assert again.tree["language_model/mass"]["mean"].dims == ("layer", "head", "role")
    assert again.tree["language_model/mass"]["quantiles"].dims == ("layer", "head", "role", "quantile")
    assert list(again.tree["language_model/mass"]["role"].values) == ["text"]  # padding is no role of an item
    assert again.tree["language_model/entropy"].attrs["number"] == "mean over queries"
    assert (tmp_path / "a.zarr").is_dir()


def item_size(tree: xr.DataTree) -> dict[str, int]:
    return {"item": tree["language_model"].sizes["item"]}


def test_other_axes_stay_and_statistics_have_knobs(reading):
    from functools import partial

    from regard.statistics.top_weights import top_weights

    found = profile(*reading, sentences(5), best=partial(top_weights, k=2)).tree["language_model/best"]
    assert found["mean"].dims == ("layer", "head", "rank")
    assert (found["mean"].isel(rank=0) >= found["mean"].isel(rank=1)).all()


def test_numbers_by_hand():
    """Two items of 3 and 2 tokens; the padded query and key hold what must not count."""
    nan = float("nan")
    spec = {
        "q": Spec(("batch", "head", "query"), "q"),
        "finite": Spec(("batch", "head", "query"), "finite"),
        "k": Spec(("batch", "head", "key"), "k"),
        "qk": Spec(("batch", "head", "query", "key"), "qk"),
        "h": Spec(("batch", "head"), "h"),
        "r": Spec(("batch", "head", "query", "role"), "r"),
    }
    roles = torch.zeros(2, 3, dtype=torch.long)
    roles[1, 2] = regard.tokens.ROLES.index("pad")
    roles[0, 0] = regard.tokens.ROLES.index("bos")
    tokens = regard.Tokens(roles, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, 3, dtype=torch.long))
    empty = torch.zeros(2, 1, 3, 4)
    site = regard.Site("attention", "language_model", 0)
    call = regard.Call(site, empty, empty, empty, 1.0, tokens=tokens, query_tokens=tokens)
    numbers = Numbers(spec)
    numbers.begin(2)
    numbers("q", call, torch.tensor([[[1.0, nan, 4.0]], [[2.0, 6.0, 99.0]]]))
    numbers("finite", call, torch.tensor([[[1.0, 0.0, 5.0]], [[2.0, 6.0, 99.0]]]))
    numbers("k", call, torch.tensor([[[1.5, 1.0, 0.5]], [[0.5, 1.5, 99.0]]]))
    per_key = torch.tensor([[[[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.2, 0.6]]], [[[1.0, 0, 9], [0.5, 0.5, 9], [9, 9, 9]]]])
    numbers("qk", call, per_key)
    numbers("h", call, torch.tensor([[3.0], [nan]]))
    numbers("r", call, torch.arange(2.0 * 3 * 12).reshape(2, 1, 3, 12))
    seen = Seen.from_bytes(numbers.take().to_bytes())
    values = {name: v[:, 0, 0].tolist() for (_, name), v in seen.values.items()}
    places = {name: p[:, :, 0, 0].tolist() for (_, name), p in seen.places.items()}
    assert values["q"] == [2.5, 4.0]
    assert places["q"] == [[2, 1], [0, 0]]
    assert values["finite"] == [2.0, 4.0]
    assert places["finite"] == [[2, 1], [1, 0]]
    assert values["k"] == [0.5, 0.75]  # 1.5 of 3 queries, 1.5 of 2
    assert places["k"] == [[0, 1], [0, 1]]
    np.testing.assert_allclose(values["qk"], [(1 + 0.5 + 0.6) / 3, (1 + 0.5) / 2], rtol=1e-6)
    by_role = dict(zip(regard.tokens.ROLES, seen.values["language_model", "r"][:, 0, 0].T.tolist()))
    assert by_role["text"] == [12.0, 42.0]  # 0, 12, 24; 36, 48
    assert by_role["bos"][0] == 13.0
    assert np.isnan([by_role["bos"][1], *by_role["image"], *by_role["pad"]]).all()
    assert values["h"][0] == 3.0
    assert np.isnan(values["h"][1])
    assert places["h"] == [[-1, -1], [-1, -1]]


# ------------------------------------------------------------------------------------------------------ the summary


@given(
    st.lists(st.floats(-1e6, 1e6, width=32) | st.floats(-1, 1, width=32) | st.just(float("nan")), max_size=60),
    st.integers(1, 60),
)
@settings(max_examples=100, deadline=None)
def test_a_summary_is_that_of_all_values_however_they_come(drawn, step):
    values = np.array(drawn, np.float32)[:, None]
    places = np.arange(len(values))[None, :, None].repeat(2, 0)
    one, parts = Summary(1, 3), Summary(1, 3)
    for size, summary in ((max(1, len(values)), one), (step, parts)):
        for a in range(0, len(values), size):
            summary.add(values[a : a + size], places[:, a : a + size], np.arange(a, min(a + size, len(values))))
    for name in ("count", "minimum", "maximum", "item", "place"):
        np.testing.assert_array_equal(getattr(one, name), getattr(parts, name))
    np.testing.assert_array_equal(one.quantiles(), parts.quantiles())
    known = values[~np.isnan(values)].astype(np.float64)
    if not len(known):
        assert np.isnan(parts.quantiles()).all()
        return
    scale = np.abs(known).max()
    np.testing.assert_allclose(parts.mean[0], known.mean(), rtol=1e-9, atol=1e-9 * scale)
    np.testing.assert_allclose(parts.variance()[0], known.var(), rtol=1e-6, atol=1e-9 * scale**2)
    exact = np.quantile(known, QUANTILES, method="lower")
    assert (np.abs(parts.quantiles()[0] - exact) <= np.maximum(np.abs(exact) / 128, SMALLEST)).all()
    order = np.lexsort((np.arange(len(values)), -values[:, 0]))[: min(3, len(known))]
    assert parts.item[0, : len(order), 0].tolist() == order.tolist()


def test_bins_are_in_order_and_hold_what_they_say():
    values = np.sort(np.concatenate([np.geomspace(1e-9, 1e30, 4000), -np.geomspace(1e-9, 1e30, 4000), [0.0]]))
    keys = bins(values.astype(np.float32))
    assert (np.diff(keys) >= 0).all()
    off = np.abs(middles(keys) - values)
    assert (off <= np.maximum(np.abs(values) / 127.9, SMALLEST)).all()
    assert len(np.unique(keys)) > 4000


# ----------------------------------------------------------------------------------------------- stopped, and going on


def test_killed_it_goes_on_and_ends_as_if_it_had_not_been(folders, tmp_path):
    """kill -9 at an arbitrary moment; then SIGINT, which exits with 130; then to the end."""
    data, out = tmp_path / "texts.txt", tmp_path / "broken.zarr"
    data.write_text("\n".join(sentences(300)))
    options = ["-s", "entropy", "-s", "received", "--batch", "2"]
    command = [sys.executable, "-m", "regard", "profile", str(folders["gpt2"]), str(data), "-o", str(out), *options]
    log = tmp_path / "broken.zarr.state" / "journal.0"

    def until(size: int, number: signal.Signals) -> tuple[int, str]:
        environment = {**os.environ, "COLUMNS": "200"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as child:
            while child.poll() is None and (not log.exists() or log.stat().st_size < size):
                time.sleep(0.005)
            child.send_signal(number)
            said, _ = child.communicate(timeout=120)
        return child.returncode, said.decode()

    code, _ = until(8_000, signal.SIGKILL)
    assert code == -signal.SIGKILL
    done = log.stat().st_size
    with log.open("ab") as file:  # and a record that was under way
        file.write(b"\0" * 7 + b"torn")
    code, said = until(done + 8_000, signal.SIGINT)
    assert code == 130
    assert "give the same command again" in said
    assert "going on after" in said
    assert not out.exists()

    model, tokenizer = regard.load(folders["gpt2"])
    resumed: list[int] = []
    broken = profile(
        model, tokenizer, data, "entropy", "received", out=out, batch=2, progress=lambda p: resumed.append(p.resumed)
    )
    assert 0 < resumed[0] < 300
    whole = profile(model, tokenizer, data, "entropy", "received", batch=2)
    same(broken.tree, whole.tree, exactly=True)
    assert not log.parent.exists()


class Stop(Exception):
    pass


def stop_after(n: int):
    def tick(progress) -> None:
        if progress.items >= n:
            raise Stop

    return tick


def test_snapshots_stand_for_the_journal(reading, tmp_path, monkeypatch):
    texts, out = sentences(80), tmp_path / "a.zarr"
    monkeypatch.setattr(journals, "SNAPSHOT_BYTES", 5000)
    for n in (20, 50):
        with pytest.raises(Stop):
            profile(*reading, texts, *STATISTICS, out=out, batch=3, buffer=16, progress=stop_after(n))
    state = tmp_path / "a.zarr.state"
    names = sorted(p.name for p in state.iterdir())
    assert [n.partition(".")[0] for n in names] == ["journal", "lock", "origin", "snapshot"]
    assert "snapshot.1" not in names  # more than one was taken
    broken = profile(*reading, texts, *STATISTICS, out=out, batch=3, buffer=16)
    same(broken.tree, profile(*reading, texts, *STATISTICS, batch=3, buffer=16).tree, exactly=True)


def test_a_torn_record_costs_no_other(reading, tmp_path):
    texts, out, resumed = sentences(40), tmp_path / "a.zarr", []
    for n in (10, 20):
        with pytest.raises(Stop):
            profile(*reading, texts, "entropy", out=out, batch=2, progress=stop_after(n))
        with (tmp_path / "a.zarr.state" / "journal.0").open("ab") as file:
            file.write(b"\5" + b"\0" * 11 + b"torn")
    profile(*reading, texts, "entropy", out=out, batch=2, progress=lambda p: resumed.append(p.resumed))
    assert resumed[0] == 20


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"\xff" * 64, b"\0" * 5, b"\x10" + b"\0" * 200, os.urandom(300)])
def test_what_follows_the_last_whole_record_is_cut_and_said(reading, tmp_path, tail):
    texts, out, told = sentences(20), tmp_path / "a.zarr", []
    with pytest.raises(Stop):
        profile(*reading, texts, "entropy", out=out, batch=2, progress=stop_after(10))
    log = tmp_path / "a.zarr.state" / "journal.0"
    log.write_bytes(log.read_bytes() + tail)
    found = profile(*reading, texts, "entropy", out=out, batch=2, progress=told.append)
    assert (told[0].resumed, told[0].cut) == (10, len(tail))
    same(found.tree, profile(*reading, texts, "entropy", batch=2).tree, exactly=True)


def test_a_damaged_record_costs_what_follows_it(reading, tmp_path):
    texts, out, told = sentences(20), tmp_path / "a.zarr", []
    with pytest.raises(Stop):
        profile(*reading, texts, "entropy", out=out, batch=2, progress=stop_after(10))
    log = tmp_path / "a.zarr.state" / "journal.0"
    raw = bytearray(log.read_bytes())
    raw[len(raw) // 2] ^= 1
    log.write_bytes(raw)
    found = profile(*reading, texts, "entropy", out=out, batch=2, progress=lambda p: told.append((p.resumed, p.cut)))
    assert 0 < told[0][0] < 10
    assert told[0][1] > len(raw) / 3
    same(found.tree, profile(*reading, texts, "entropy", batch=2).tree, exactly=True)


def test_a_damaged_snapshot_is_named(reading, tmp_path, monkeypatch):
    texts, out = sentences(40), tmp_path / "a.zarr"
    monkeypatch.setattr(journals, "SNAPSHOT_BYTES", 3000)
    with pytest.raises(Stop):
        profile(*reading, texts, "entropy", out=out, batch=2, progress=stop_after(30))
    (snapshot,) = (tmp_path / "a.zarr.state").glob("snapshot.*")
    raw = bytearray(snapshot.read_bytes())
    raw[-20] ^= 1
    snapshot.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{snapshot.name} is damaged.*delete .*a\.zarr\.state"):
        profile(*reading, texts, "entropy", out=out, batch=2)


@pytest.mark.parametrize("origin", ["", "[]", "5", "null", "{", "[" * 100_000, '"text"'])
def test_an_origin_that_says_nothing_is_named(reading, tmp_path, origin):
    out = tmp_path / "a.zarr"
    with pytest.raises(Stop):
        profile(*reading, sentences(9), "entropy", out=out, batch=2, progress=stop_after(4))
    (tmp_path / "a.zarr.state" / "origin.json").write_text(origin)
    with pytest.raises(ValueError, match=r"origin\.json .*delete .*a\.zarr\.state"):
        profile(*reading, sentences(9), "entropy", out=out, batch=2)


def test_what_lies_in_the_state_of_a_profile_stays(reading, tmp_path):
    out = tmp_path / "a.zarr"
    with pytest.raises(Stop):
        profile(*reading, sentences(9), "entropy", out=out, batch=2, progress=stop_after(4))
    (tmp_path / "a.zarr.state" / "notes.txt").write_text("mine")
    profile(*reading, sentences(9), "entropy", out=out, batch=2)
    assert [p.name for p in (tmp_path / "a.zarr.state").iterdir()] == ["notes.txt"]


def test_what_changed_is_refused_and_named(reading, folders, tmp_path):
    model, tokenizer = reading
    data, out = tmp_path / "texts.txt", tmp_path / "a.zarr"
    data.write_text("\n".join(sentences(20)))

    def again(*statistics: str, model=model, data=data, **options):
        return profile(model, tokenizer, data, *statistics, out=out, batch=2, **options)

    with pytest.raises(Stop):
        again("entropy", progress=stop_after(4))
    with pytest.raises(ValueError, match=r"begun otherwise \(statistics: .*delete that folder to begin anew"):
        again("entropy", "received")
    with pytest.raises(ValueError, match=r"begun otherwise \(options: .*\"limit\": 3"):
        again("entropy", limit=3)
    other = regard.load(folders["gpt2"]).model
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.bias[0] += 1e-3
    with pytest.raises(ValueError, match=r"begun otherwise \(model: "):
        again("entropy", model=other)
    before = data.read_text()
    data.write_text(before + "\nmore")
    with pytest.raises(ValueError, match=r"begun otherwise \(data: "):
        again("entropy")
    (tmp_path / "a.zarr.state" / "origin.json").unlink()
    with pytest.raises(FileExistsError, match="is not the state of a profile"):
        again("entropy")
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="is not a recording"):
        profile(model, tokenizer, data, "entropy", out=tmp_path / "mine")


def test_changed_items_are_found_also_where_no_file_tells(reading, tmp_path):
    texts, out = sentences(20), tmp_path / "a.zarr"
    with pytest.raises(Stop):
        profile(*reading, texts, "entropy", out=out, batch=2, buffer=10, progress=stop_after(14))
    changed = [*texts[:3], "another", *texts[4:]]
    with pytest.raises(ValueError, match="not those that this profile began with"):
        profile(*reading, changed, "entropy", out=out, batch=2, buffer=10)
    with pytest.raises(ValueError, match="not those that this profile began with"):
        profile(*reading, texts[:5], "entropy", out=out, batch=2, buffer=10)
    assert profile(*reading, iter(texts), "entropy", out=out / ".." / "b.zarr").tree.attrs["items"] == 20


def test_two_at_once_are_refused(reading, tmp_path):
    texts, out = sentences(4), tmp_path / "a.zarr"

    def tick(progress) -> None:
        if progress.items:
            with pytest.raises(ValueError, match="in use"):
                profile(*reading, texts, "entropy", out=out)
            raise Stop

    with pytest.raises(Stop):
        profile(*reading, texts, "entropy", out=out, progress=tick)


# ------------------------------------------------------------------------------------------------------------ the data


def test_all_rows_are_read_from_one_column(tmp_path):
    """Never from another where it is missing; named or not, in files and in Python."""

    def rows(*rows, field=None):
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        with pytest.raises(ValueError, match=r"a\.jsonl, line ") as caught:
            list(read(tmp_path / "a.jsonl", field))
        said = str(caught.value)
        with pytest.raises(ValueError, match="field") as caught:
            list(as_items(rows, field))
        assert said.endswith(str(caught.value)[len("item 1") :])
        return said

    assert "line 2: no field text; it has id" in rows({"text": "a"}, {"id": 5})
    assert "line 2: which field to read? It has id" in rows({"text": "a", "id": "1"}, {"id": "2"})
    assert "line 3: which field to read? It has id, text" in rows({"id": "1"}, {"id": "2"}, {"id": "3", "text": "c"})
    assert "line 2: which field to read? It has more, body" in rows({"body": "a"}, {"more": "b", "body": "b"})
    assert "line 2, field text: expected a text or a picture, got None" in rows(
        {"text": "a"}, {"text": None, "id": "b"}
    )
    assert "line 2: no field body; it has text" in rows({"body": "a", "text": "b"}, {"text": "c"}, field="body")


def test_bad_rows_are_named_or_left_out_and_counted(reading, tmp_path, folders):
    lines = ['{"text": "of times"}', '{"id": 1}', '{"text": "worst age"}', "not JSON", '{"text": null}', "[1]"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "good.jsonl").write_text("\n".join(lines[::2][:2]))
    source = read(tmp_path / "a.jsonl", skip_bad=True)
    for _ in range(2):  # the count is of one reading
        assert [item.id for item in source] == ["a.jsonl:1", "a.jsonl:3"]
        assert source.skipped.count == 4
    assert source.skipped.first[0].endswith("a.jsonl, line 2: no field text; it has id")
    assert len(source.skipped.first) == 3
    (tmp_path / "a.csv").write_text("id,text\n0,a\n1\n2,b\n")
    assert [item.id for item in read(tmp_path / "a.csv", skip_bad=True)] == ["a.csv:2", "a.csv:4"]
    with pytest.raises(ValueError, match=r"a\.csv, line 3: not as many cells"):
        list(read(tmp_path / "a.csv"))

    found = profile(*reading, tmp_path / "a.jsonl", "entropy", skip_bad=True).tree
    assert found.attrs["skipped"] == 4
    want = profile(*reading, tmp_path / "good.jsonl", "entropy").tree
    assert "skipped" not in want.attrs
    stack = next(iter(want.children))
    xr.testing.assert_equal(found[f"{stack}/entropy"]["mean"], want[f"{stack}/entropy"]["mean"])
    with pytest.raises(ValueError, match="needs engine='local'"):
        profile(*reading, tmp_path / "a.jsonl", "entropy", skip_bad=True, engine="ray")

    command = ["profile", str(folders["gpt2"]), str(tmp_path / "a.jsonl"), "-s", "entropy", "-o"]
    wrong = CliRunner().invoke(app, [*command, str(tmp_path / "no.zarr")], env={"COLUMNS": "300"})
    assert wrong.exit_code == 2
    assert "line 2: no field text; it has id; mend that row, or leave out what cannot be read with --skip-bad" in (
        wrong.output
    )
    done = CliRunner().invoke(app, [*command, str(tmp_path / "a.zarr"), "--skip-bad"], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    said = "".join(done.output.split())  # a console breaks lines where it likes
    assert "4rowscouldnotbereadandwereleftout" in said
    assert "a.jsonl,line4" in said


def test_texts_that_no_tokenizer_reads_are_named(reading, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine \\ud83d\\ude00"}\n{"text": "half \\ud83d of one"}')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2, field text: the text is not Unicode at character 6"):
        list(read(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match="item 1: the text is not Unicode"):
        profile(*reading, ["fine", "\ud83d"], "entropy")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + "[" * 200_000 + "]" * 200_000)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: JSON that cannot be read"):
        list(read(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ' + "9" * 5000 + "}")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: JSON that cannot be read"):
        list(read(tmp_path / "a.jsonl"))


def test_cells_may_be_long_and_columns_unnamed(tmp_path):
    (tmp_path / "a.csv").write_text(",text\n0," + "a" * 200_000 + "\n\n1,b\n")
    assert [len(item.text) for item in read(tmp_path / "a.csv", "text")] == [200_000, 1]
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    with pytest.raises(ValueError, match=r"a\.csv, line 1: two columns are named 'text'"):
        list(read(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text("text,n\na,1\nb\n")
    with pytest.raises(ValueError, match=r"a\.csv, line 3: not as many cells as the 2 columns"):
        list(read(tmp_path / "a.csv"))


@pytest.mark.parametrize("held", ["", "[]", '{"splits": 5}', "{}"])
def test_broken_data_sets_are_named(tmp_path, held):
    (tmp_path / "dataset_dict.json").write_text(held)
    with pytest.raises(ValueError, match=r"dataset_dict\.json"):
        read(tmp_path)
    (tmp_path / "dataset_dict.json").unlink()
    (tmp_path / "dataset_info.json").write_text(held)
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="not a whole data set"):
        list(read(tmp_path))


def test_each_kind_of_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = ["one", "two, and", 'three "3"']
    (tmp_path / "a.txt").write_text('one\n\n two, and\nthree "3"\n')
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"n": i, "body": t}) for i, t in enumerate(texts)))
    data = datasets.Dataset.from_dict({"n": ["x", "y", "z"], "body": texts})
    data.to_parquet(tmp_path / "a.parquet")
    data.to_csv(tmp_path / "a.csv")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for i, text in enumerate(texts):
        (tmp_path / "folder" / "deep" / f"{i}.txt").write_text(text)
    found = {name: list(read(tmp_path / name)) for name in ("a.txt", "a.jsonl", "folder")}
    found |= {name: list(read(tmp_path / name, "body")) for name in ("a.jsonl", "a.parquet", "a.csv", "saved")}
    for name, made in found.items():
        assert [item.text for item in made] == texts, name
    assert [item.id for item in found["a.txt"]] == ["a.txt:1", "a.txt:3", "a.txt:4"]
    assert [item.id for item in found["folder"]] == ["deep/0.txt", "deep/1.txt", "deep/2.txt"]
    assert [item.text for item in as_items(data, "body")] == texts
    with pytest.raises(ValueError, match=r"several splits; give one.*splits/train"):
        read(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"a.csv, line 2: which field to read\? It has n, body"):
        list(read(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match="no field x; it has n, body"):
        list(read(tmp_path / "a.parquet", "x"))
    with pytest.raises(ValueError, match="has no fields"):
        read(tmp_path / "a.txt", "x")
    (tmp_path / "a.zip").touch()
    with pytest.raises(ValueError, match=r"expected a folder or a file that ends in \.jsonl"):
        read(tmp_path / "a.zip")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2, column 8: not JSON"):
        list(read(tmp_path / "bad.jsonl"))
    with pytest.raises(TypeError, match="item 1 is a int"):
        list(as_items(["a", 3]))


def test_long_and_empty_texts_are_counted(reading):
    texts = ["worst " * 100, "", "worst of times", "worst " * 65]
    found = profile(*reading, [Item(f"t{i}", text=t) for i, t in enumerate(texts)], "entropy").tree
    assert {k: found.attrs[k] for k in ("items", "truncated", "empty", "tokens")} == {
        "items": 3,
        "truncated": 2,
        "empty": 1,
        "tokens": 64 + 3 + 64,
    }
    assert set(found["language_model"]["item_id"].values) == {"t0", "t2", "t3"}
    with pytest.raises(ValueError, match="nothing to read"):
        profile(*reading, [""], "entropy")
    with pytest.raises(ValueError, match=r"length=65: GPT2LMHeadModel has 64 positions"):
        profile(*reading, ["a"], "entropy", length=65)


def test_pictures_and_questions_about_them(folders, tmp_path):
    for i in range(5):
        Image.new("RGB", (24 + i, 20), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    found = profile(*regard.load(folders["vit"]), tmp_path, "entropy", batch=2).tree
    assert (found["encoder/entropy"]["count"] == 5).all()
    assert set(found["encoder"]["item_id"].values) == {f"{i}.png" for i in range(5)}
    one = profile(*regard.load(folders["vit"]), tmp_path, "entropy", batch=1).tree
    same(found, one)
    seen = profile(*regard.load(folders["llava"]), tmp_path, "mass", batch=2, prompt="what is this").tree
    assert "image" in seen["language_model/mass"]["role"].values
    assert {s: int(seen[f"{s}/mass"]["count"].max()) for s in seen.children} == dict.fromkeys(seen.children, 5)
    with pytest.raises(ValueError, match=r"0\.png is a picture, but GPT2LMHeadModel reads text only"):
        profile(*regard.load(folders["gpt2"]), tmp_path, "entropy")
    with pytest.raises(ValueError, match="0 is a text, but ViTForImageClassification looks at pictures only"):
        profile(*regard.load(folders["vit"]), ["text"], "entropy")
    (tmp_path / "9.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"9\.png: not a whole picture"):
        profile(*regard.load(folders["vit"]), tmp_path, "entropy")


def test_a_model_that_writes_is_profiled_by_its_encoder(folders):
    model, tokenizer = regard.load(folders["t5"])
    with pytest.raises(ValueError, match=r"profile its encoder: profile\(model.get_encoder\(\)"):
        profile(model, tokenizer, ["a"], "entropy")
    texts = sentences(6)
    found = profile(model.get_encoder(), tokenizer, texts, "entropy").tree
    same(found, profile(model.get_encoder(), tokenizer, texts, "entropy", batch=1).tree)


def test_other_families_do_not_depend_on_batches_either(folders):
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, **NO_IDS)).eval()
    texts = sentences(12)
    for model, tokenizer in ((llama, words()), regard.load(folders["bert"])):
        same(*(profile(model, tokenizer, texts, *STATISTICS, batch=n).tree for n in (1, 12)))


def test_what_cannot_be_profiled_is_refused(reading):
    model, tokenizer = reading

    @regard.statistic("head query", title="No batch")
    def unbatched(call):
        return call.weights.maximum()[0]

    with pytest.raises(ValueError, match="no axis batch"):
        profile(model, tokenizer, ["a"], unbatched)
    with pytest.raises(ValueError, match=r"'top_keys' gives torch.int32, of which there is no mean"):
        profile(model, tokenizer, ["it was"], "top_keys")
    with pytest.raises(ValueError, match="batch=0"):
        profile(model, tokenizer, ["a"], "entropy", batch=0)
    with pytest.raises(ValueError, match="engine='dask'"):
        profile(model, tokenizer, ["a"], "entropy", engine="dask")
    with pytest.raises(KeyError, match="no statistic 'entrpy'"):
        profile(model, tokenizer, ["a"], "entrpy")
    model.train()
    try:
        with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
            profile(model, tokenizer, ["a"], "entropy")
    finally:
        model.eval()


def test_a_sink_takes_what_is_seen_and_nothing_is_kept(reading):
    model, tokenizer = reading
    taken = []
    with torch.no_grad(), regard.record(model, "entropy", sink=lambda *seen: taken.append(seen)) as recording:
        for _ in range(3):
            model(torch.tensor([[5, 6, 7]]))
    assert [(name, call.site.layer, tuple(seen.shape)) for name, call, seen in taken] == [
        ("entropy", layer, (1, 4, 3)) for layer in (0, 1)
    ] * 3
    assert len(recording.runs) == 1
    with pytest.raises(ValueError, match="went to the sink"):
        _ = recording.tree


# ---------------------------------------------------------------------------------------------- the command, and ray


def test_the_command_prints_tables_heads_and_the_comparison(folders, tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": t}) for t in sentences(30)))
    out = tmp_path / "a.zarr"
    command = ["profile", str(folders["gpt2"]), str(data), "-s", "entropy", "-s", "mass", "-o", str(out)]
    done = CliRunner().invoke(app, [*command, "--batch", "4", "--compare"], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    tree = regard.open(out).tree
    mean = tree["language_model/entropy"]["mean"]
    at = {dim: int(i) for dim, i in mean.argmax(...).items()}
    assert f"entropy: highest in layer {at['layer']} head {at['head']}, mean {float(mean.max()):.3g}" in done.output
    assert "texts.jsonl:" in done.output
    assert "30 items" in done.output
    assert "of the plain forward pass" in done.output
    wrong = CliRunner().invoke(app, ["profile", str(folders["gpt2"]), str(tmp_path / "no.txt"), "-s", "entropy"])
    assert wrong.exit_code == 2
    assert "no such file" in wrong.output


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray")
    import logging

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Ray itself warns of
        store = 100 * 2**20
        ray.init(
            num_cpus=2,
            object_store_memory=store,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        yield
        ray.shutdown()


def test_ray_gives_the_same_and_goes_on_too(reading, tmp_path, cluster):
    texts, out, options = sentences(40), tmp_path / "a.zarr", {"batch": 4, "buffer": 16}
    with pytest.raises(Stop):
        profile(*reading, texts, *STATISTICS, out=out, progress=stop_after(12), **options)
    spread = profile(*reading, texts, *STATISTICS, out=out, engine="ray", workers=2, **options)
    same(spread.tree, profile(*reading, texts, *STATISTICS, **options).tree)
    with pytest.raises(ValueError, match="give a path or a list"):
        profile(*reading, iter(texts), "entropy", engine="ray")
