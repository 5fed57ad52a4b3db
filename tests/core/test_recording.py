"""A recording keeps its labels, survives being written and read, and is never half there."""

from __future__ import annotations

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import zarr
from conftest import words
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st

import regard
from regard.statistics.top_keys import top_keys


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


# ------------------------------------------------------------------------------------------- what a statistic may give


def stat(dims: str, give):
    """A statistic with these axes."""

    @regard.statistic(dims, title="x")
    def gives(call):
        return give(call)

    return gives


def entropy(call):
    return call.weights.entropy()


def recorded(steps: int = 0, model_and_inputs=None, **statistics):
    model, inputs = model_and_inputs or build("llama")
    with torch.no_grad(), regard.record(model, **statistics) as found:
        if steps:
            model.generate(inputs["input_ids"][:, :5], max_new_tokens=steps + 1, do_sample=False, eos_token_id=None)
        else:
            model(input_ids=inputs["input_ids"])
    return found.tree["language_model"]


KINDS = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.bool]
KINDS += [torch.uint8, torch.uint16, torch.int8, torch.int16, torch.int32, torch.int64]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), st.sampled_from(["query", "key", ""]))
def test_no_dtype_changes_what_is_recorded(kinds, axis):
    """Numbers that every type holds, of another type at each call: they come back as they were, beside the entropy."""
    count = [0]

    def ones(call):
        count[0] += 1
        shape = [*call.query.shape[:2], *([{"query": call.query, "key": call.key}[axis].shape[2]] if axis else [])]
        return torch.ones(shape).to(kinds[count[0] % len(kinds)])

    node = recorded(steps=2, ones=stat(f"batch head {axis}", ones), plain=stat("batch head query", entropy))
    alone = recorded(steps=2, plain=stat("batch head query", entropy))
    assert node["plain"].identical(alone["plain"])
    values = node["ones"].values
    if axis == "key":  # 5 keys are seen three times, one twice, one once
        assert (values == [3, 3, 3, 3, 3, 2, 1]).all()
    else:
        assert (values == 1).all()
    assert values.shape[-1 if axis else 2] == {"query": 7, "key": 7, "": 3}[axis]
    assert values.dtype.kind in "fib"


def test_whole_numbers_first_and_fractions_later():
    node = recorded(
        half=stat(
            "batch head", lambda c: torch.ones(2, 4, dtype=torch.int32) if not c.site.layer else torch.full((2, 4), 0.5)
        )
    )
    assert node["half"].sel(layer=0).values.tolist() == [[1.0] * 4] * 2
    assert node["half"].sel(layer=1).values.tolist() == [[0.5] * 4] * 2


def test_what_is_not_there():
    """An early query has no weight on keys of a later step: NaN, -1 for integers, False for booleans."""
    above = stat("batch head query key", lambda c: c.weights.dense() > 2)
    whole = stat("batch head query key", lambda c: torch.full_like(c.weights.dense(), 7).to(torch.uint8))
    node = recorded(steps=1, above=above, whole=whole, rows=stat("batch head query key", lambda c: c.weights.dense()))
    missing = np.isnan(node["rows"].values)
    assert missing.any()
    assert missing[0, 0, 0].sum() == 5  # one key more than five queries know of
    assert not node["above"].values.any()
    assert node["above"].dtype == bool
    assert (node["whole"].values == np.where(missing, -1, 7)).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_beam_that_ended_says_nothing(dtype):
    """Of two sequences the second, of the first row, has ended at the step."""
    from regard.recording import Place, Run

    run = Run(cached={"s"}, orders=[torch.tensor([0, 0])], rows=[torch.tensor([0, -1]), torch.tensor([0, -1])])
    part = (Place(2, 1, range(1), range(1)), torch.ones(2, 1, 1, dtype=dtype))
    ((_, found),) = run.settled("s", ("batch", "head", "query"), [part])
    nothing = {torch.bool: False, torch.int64: -1, torch.float32: np.nan}[dtype]
    np.testing.assert_equal(found[:, 0, 0].tolist(), [1, nothing])


def test_nan_and_infinity_stay():
    def odd(call):
        first = call.query_start == 0
        return torch.full((2, 4, call.key.shape[2]), float("nan" if first and call.site.layer else "inf"))

    values = recorded(steps=1, odd=stat("batch head key", odd))["odd"].values
    assert np.isposinf(values[:, 0]).all()
    assert np.isnan(values[:, 1, :, :5]).all()
    assert np.isposinf(values[:, 1, :, 5]).all()


def test_a_call_that_is_left_out_moves_no_other():
    late = stat(
        "batch", lambda c: None if c.site.layer == 0 and c.query_start == 5 else torch.full((2,), 1.0 * c.query_start)
    )
    rare = stat("batch", lambda c: torch.ones(2) if c.query_start == 6 else None)
    node = recorded(steps=3, late=late, rare=rare)
    assert node["late"].dims == ("batch", "layer", "step")
    np.testing.assert_equal(node["late"].values[0], [[0, np.nan, 6, 7], [0, 5, 6, 7]])
    np.testing.assert_equal(node["rare"].values[1], [[np.nan, np.nan, 1, np.nan]] * 2)


def test_axes_of_different_lengths_are_filled():
    node = recorded(one=partial(top_keys, k=1), three=partial(top_keys, k=3))
    assert (node["one"].values[..., 0] == node["three"].values[..., 0]).all()
    assert (node["one"].values[..., 1:] == -1).all()


@pytest.mark.parametrize(
    ("dims", "give", "why"),
    [
        ("batch head query", lambda c: c.weights.entropy()[:1], r"\[batch=2 head=4 query=12\], but gave \[1, 4, 12\]"),
        ("batch head query", lambda c: c.weights.entropy()[:1, :, 2:], r"gave \[1, 4, 10\] at language_model layer 0"),
        ("batch head key", lambda c: c.weights.received()[:, :3], r"key=12\], but gave \[2, 3, 12\]"),
        ("batch head query", lambda c: c.weights.entropy().transpose(1, 2), r"gave \[2, 12, 4\]"),
        ("batch head role", lambda c: torch.ones(2, 4, 3), "role=12"),
        ("batch head", lambda c: torch.ones(2, 4, dtype=torch.complex64), "gave torch.complex64"),
        ("batch head", lambda c: torch.ones(2, 4, dtype=torch.uint64), "gave torch.uint64"),
        ("batch head", lambda c: 3.0, "gave a float"),
        ("batch head", lambda c: torch.ones(2, 4).to_sparse(), "dense tensor"),
    ],
)
def test_what_a_spec_does_not_say_is_refused_at_once(dims, give, why):
    model, inputs = build("llama")
    with pytest.raises((ValueError, TypeError), match=f"'odd'.*{why}"), regard.record(model, odd=stat(dims, give)):
        model(**inputs)
    with torch.no_grad(), regard.record(model, "entropy") as recording:  # the model is as it was
        model(**inputs)
    assert np.isfinite(recording.tree["language_model"]["entropy"]).all()


NAMES = ["batch", "layer", "head", "query", "key", "role", "step", "key_token", "query_row", "item", "quantile", "rank"]


@pytest.mark.parametrize("name", [*NAMES, "a/b", "..", ".a", "", "zarr.json", "__a", "a b", "\ud800", "a" * 100])
def test_names_that_would_take_a_place_are_refused(name):
    model, _ = build("llama")
    named = {name: stat("batch head query", entropy), "best": top_keys}
    with pytest.raises(ValueError, match="cannot be named"), regard.record(model, **named):
        pass


@pytest.mark.parametrize("dims", ["batch batch", "batch layer", "batch head step", "batch item"])
def test_axes_that_no_call_has_are_refused(dims):
    model, _ = build("llama")
    with pytest.raises(ValueError, match="declares the axis"), regard.record(model, odd=stat(dims, entropy)):
        pass


def test_roles_of_queries_stay_too():
    """A statistic that tells queries by their role, in cross attention: its keys have other roles."""
    model, inputs = build("t5")
    roles = regard.tokens.ROLES

    def asking(call):
        found = torch.zeros(*call.query.shape[:2], len(roles))
        found[..., roles.index("generated")] = 1
        return found

    with torch.no_grad(), regard.record(model, asking=stat("batch head role", asking)) as found:
        model(**inputs)
    node = found.tree["decoder_cross"]["asking"]
    assert (node.sel(role="generated") == 1).all()


# -------------------------------------------------------------------------------- what happens between and after calls


def test_what_a_statistic_gave_and_changes_later_stays():
    """It keeps one tensor, gives it at each call, and counts in it."""

    class Count:
        def __init__(self):
            self.seen = torch.zeros(2)

        def __call__(self, call):
            self.seen += 1
            return self.seen

    count = regard.statistic("batch", title="x")(Count)
    assert recorded(count=count)["count"].values.tolist() == [[1, 2], [1, 2]]


def test_a_look_inside_the_block_changes_nothing():
    model, inputs = build("llama")
    with torch.no_grad(), pytest.raises(KeyboardInterrupt), regard.record(model, "entropy", "received") as peeked:
        model(**inputs)
        assert not peeked.tree.attrs["partial"]
        raise KeyboardInterrupt
    assert peeked.partial
    assert peeked.tree.attrs["partial"]
    with torch.no_grad(), regard.record(model, "entropy", "received") as whole:
        model(**inputs)
    for name in ("entropy", "received"):
        assert peeked.tree["language_model"][name].identical(whole.tree["language_model"][name])


def test_only_the_run_that_was_cut_is_partial(tmp_path):
    model, inputs = build("llama")
    calls = [0]

    def raises(call):
        calls[0] += 1
        if calls[0] == 4:
            raise RuntimeError("no more")

    raising = regard.record(model, "entropy", raises=stat("batch", raises))
    with torch.no_grad(), pytest.raises(RuntimeError, match="no more"), raising as found:
        model(**inputs)
        model(**inputs)
    assert [tree.attrs["partial"] for tree in found] == [False, True]
    assert found[0]["language_model"].sizes["layer"] == 2
    again = regard.open(found.save(tmp_path / "a.zarr"))
    assert [tree.attrs["partial"] for tree in again] == [False, True]


def test_a_sink_that_raises_leaves_the_model_as_it_was():
    model, inputs = build("llama")

    def sink(name, call, seen):
        raise RuntimeError("full")

    with torch.no_grad():
        before = model(**inputs).logits
        with pytest.raises(RuntimeError, match="full"), regard.record(model, "entropy", sink=sink) as found:
            model(**inputs)
        assert (model(**inputs).logits == before).all()
    with pytest.raises(ValueError, match="went to the sink"):
        _ = found.tree


# -------------------------------------------------------------------------------------------------------------- on disk


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    model, inputs = build("llama")
    with torch.no_grad(), regard.record(model, "entropy", "received", processor=words()) as found:
        model(**inputs)
    return found.save(tmp_path_factory.mktemp("small") / "a.zarr")


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_file_that_is_missing_or_damaged_is_named(small, tmp_path):
    """Each file of the folder, in turn: gone, or with a byte turned."""
    whole = regard.open(small)
    for name in files(small):
        for how in ("gone", "turned"):
            shutil.copytree(small, tmp_path / "b.zarr")
            file = tmp_path / "b.zarr" / name
            raw = bytearray(file.read_bytes())
            raw[len(raw) // 2] ^= 1
            file.unlink() if how == "gone" else file.write_bytes(raw)
            with pytest.raises((ValueError, FileNotFoundError), match=name.replace(".", r"\.")):
                regard.open(tmp_path / "b.zarr")
            shutil.rmtree(tmp_path / "b.zarr")
    assert regard.open(small).tree.identical(whole.tree)


def test_every_byte_of_the_list_counts(small, tmp_path):
    shutil.copytree(small, tmp_path / "b.zarr")
    root = tmp_path / "b.zarr" / "zarr.json"
    raw = root.read_bytes()
    for at in range(0, len(raw), len(raw) // 40):
        root.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(ValueError, match=r"zarr\.json"):
            regard.open(tmp_path / "b.zarr")


def test_a_file_too_many_is_named(small, tmp_path):
    shutil.copytree(small, tmp_path / "b.zarr")
    (tmp_path / "b.zarr" / "run_0" / "more.txt").touch()
    with pytest.raises(ValueError, match=r"run_0/more\.txt was not there"):
        regard.open(tmp_path / "b.zarr")


def unsealed(small, to, change=None):
    """A copy as it was written before there were checksums, with a change."""
    shutil.copytree(small, to)
    root = json.loads((to / "zarr.json").read_text())
    (to / "zarr.json").write_text(json.dumps({**root, "attributes": {}}))
    if change:
        meta = to / "run_0" / "language_model" / "zarr.json"
        held = json.loads(meta.read_text())
        change(held["attributes"])
        meta.write_text(json.dumps(held))
    return to


def test_what_was_written_without_checksums_says_so(small, tmp_path):
    with pytest.warns(UserWarning, match="without checksums"):
        again = regard.open(unsealed(small, tmp_path / "old.zarr"))
    assert again.tree.identical(regard.open(small).tree)
    with pytest.raises(FileExistsError, match="lacks the mark"):
        again.save(tmp_path / "old.zarr")


@pytest.mark.parametrize(
    "texts",
    [
        [],
        5,
        None,
        "5",
        "[1]",
        "{",
        "[" * 100_000,
        '{"key_token": 5}',
        '{"key_token": [["batch"], [["a"]]]}',
        '{"key_token": [["batch", "key"], [[{}]]]}',
        '{"key_token": [5, ["a"]]}',
        '{"key_token": [["key"], [["a"], []]]}',
    ],
)
def test_texts_of_a_wrong_kind_are_one_error(small, tmp_path, texts):
    folder = unsealed(small, tmp_path / "b.zarr", lambda attributes: attributes.update(texts=texts))
    with pytest.raises(ValueError, match=r"b\.zarr cannot be read as a recording"):
        regard.open(folder)


def test_what_declares_more_than_it_holds_is_refused_before_memory_is_asked_for(tmp_path):
    for name, shape, chunks in (("a", (10**10,), (10**10,)), ("b", (10**10,), (10,)), ("c", (4,), (10**10,))):
        group = zarr.open_group(tmp_path / f"{name}.zarr", mode="w")
        run = group.create_group("run_0").create_group("language_model")
        run.create_array("entropy", shape=shape, chunks=chunks, dtype="f8", dimension_names=["query"])
        with pytest.raises(ValueError, match=r"entropy, it declares .*cannot hold"):
            regard.open(tmp_path / f"{name}.zarr")


def test_a_zarr_of_someone_else_is_no_recording_and_stays(recording, tmp_path):
    mine = tmp_path / "mine.zarr"
    zarr.open_group(mine, mode="w").create_array("precious", data=np.arange(5))
    (mine / "notes.txt").write_text("mine")
    before = {name: (mine / name).read_bytes() for name in files(mine)}
    with pytest.raises(ValueError, match="Regard did not record"):
        regard.open(mine)
    with pytest.raises(FileExistsError, match="is not a recording"):
        recording.save(mine)
    (tmp_path / "file.zarr").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a recording"):
        recording.save(tmp_path / "file.zarr")
    assert {name: (mine / name).read_bytes() for name in files(mine)} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.zarr", "mine.zarr"]


def test_a_file_beside_a_recording_keeps_it_from_being_replaced(recording, tmp_path):
    path = recording.save(tmp_path / "a.zarr")
    (path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        recording.save(path)
    assert (path / "notes.txt").read_text() == "mine"


def test_what_a_link_points_to_is_replaced(recording, tmp_path):
    (tmp_path / "deep").mkdir()
    recording.save(tmp_path / "deep" / "a.zarr")
    (tmp_path / "link.zarr").symlink_to(tmp_path / "deep" / "a.zarr")
    recording.save(tmp_path / "link.zarr")
    assert (tmp_path / "link.zarr").is_symlink()
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["a.zarr"]


def test_what_cannot_be_written_leaves_the_old_one(recording, tmp_path):
    path = recording.save(tmp_path / "a.zarr")
    before = regard.open(path).tree
    odd = regard.recording.Recording([recording.tree.copy()])
    odd.tree.attrs["odd"] = object()
    with pytest.raises(TypeError):
        odd.save(path)
    assert regard.open(path).tree.identical(before)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]


@torch.no_grad()
def test_what_a_statistic_changes_in_place_does_not_reach_the_others():
    @regard.statistic("batch head query", title="Twice the entropy")
    def twice(call):
        return call.weights.entropy().mul_(2)

    model, inputs = build("llama")
    with regard.record(model, twice, "entropy") as recording:
        model(**inputs)
    stack = recording.tree["language_model"]
    assert stack["twice"].equals(stack["entropy"] * 2)


def test_two_statistics_of_one_name_are_refused():
    @regard.statistic("batch head query", title="Another")
    def entropy(call):
        return call.weights.entropy()

    model, _ = build("llama")
    with (
        pytest.raises(ValueError, match="two statistics are named 'entropy'"),
        regard.record(model, "entropy", entropy),
    ):
        pass


def test_a_recording_says_what_it_holds():
    model, inputs = build("llama", "sdpa")
    inputs["input_ids"] = inputs["input_ids"][:, :6].expand(2, -1)
    inputs["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with torch.no_grad(), regard.record(model, "entropy", "received", attributes={"model": "<b>"}) as found:
        assert repr(found) == "Recording: nothing in it"
        model(**inputs)
        node = found.tree["language_model"]
    size = f"{node.sizes['layer']} × {node.sizes['head']}"
    assert repr(found).splitlines()[0].startswith("Recording of <b>")
    line = f"  language_model: causal self attention, {size} heads, 2 rows, 4 to 6 tokens; entropy, received"
    assert line in repr(found)
    html = found._repr_html_()
    for words_ in ("Recording of &lt;b&gt;", f"<td>{size}</td>", "<td>2</td>", "<td>4 to 6</td>", "entropy, received"):
        assert words_ in html
    assert html.count("<b>") == 1
    assert "partial" not in repr(found)


def test_a_recording_says_that_it_is_partial_and_how_many_runs_there_are():
    model, inputs = build("llama", "sdpa")
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), regard.record(model, "entropy") as found:
        for _ in range(5):
            model(**inputs)
        raise KeyboardInterrupt
    assert ", 5 runs, partial" in repr(found)
    assert "run 2, language_model" in repr(found)
    assert "and 2 more runs" in repr(found)
    assert "<th>run</th>" in found._repr_html_()


def test_a_recording_writes_its_page(tmp_path):
    model, inputs = build("llama", "sdpa")
    with torch.no_grad(), regard.record(model, "entropy", "rows") as found:
        model(**inputs)
        model(**inputs)
    with pytest.raises(ValueError, match="2 runs were recorded"):
        found.report(tmp_path / "page.html")
    page = found.report(str(tmp_path / "page.html"), run=1)
    assert page.read_text("utf-8").startswith("<!doctype html>")
