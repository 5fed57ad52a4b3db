"""The report's file: size, precision, content, escaping, errors."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image

import regard
from regard import report
from regard.observations import observe
from regard.tokens import ROLES

VIEW = Path(report.__file__).parent / "view"


def weights(rng, layers=2, heads=3, queries=8, keys=8, *, batch=1, causal=True, spread=1.0, sink=0.0) -> np.ndarray:
    """Softmax maps (batch, layer, head, query, key); queries are the last positions."""
    scores = spread * rng.normal(size=(batch, layers, heads, queries, keys))
    scores[..., 0] += sink
    if causal:
        scores[..., np.arange(keys) > np.arange(keys - queries, keys)[:, None]] = -np.inf
    scores -= scores.max(-1, keepdims=True)
    exp = np.exp(scores)
    return (exp / exp.sum(-1, keepdims=True)).astype(np.float32)


def stack(rows=None, top=None, *, tokens=None, roles=None, first=0, layers=None, extra=None, **attrs) -> xr.Dataset:
    """A node with the weights and one variable of each kind of dims. `top` is (keys, weights)."""
    batch, n_layers, heads, queries = (rows if rows is not None else top[0]).shape[:4]
    keys = rows.shape[4] if rows is not None else len(tokens)
    rng = np.random.default_rng(7)
    position = np.arange(first, first + keys)
    tokens = tokens or [f" t{i}" for i in range(keys)]
    roles = roles or ["bos"] + ["user"] * (keys - 1)
    head = ("batch", "layer", "head")
    data = {
        "level": (head, rng.normal(size=(batch, n_layers, heads)), {"long_name": "Level", "units": "m"}),
        "along_query": ((*head, "query"), rng.gamma(2, size=(batch, n_layers, heads, queries)), {"units": "nats"}),
        "along_key": ((*head, "key"), rng.gamma(2, size=(batch, n_layers, heads, keys)), {"long_name": "Along key"}),
        "parts": ((*head, "query", "role"), rng.dirichlet([1, 1], size=(batch, n_layers, heads, queries))),
    }
    if rows is not None:
        data["rows"] = ((*head, "query", "key"), rows)
    if top is not None:
        data |= {name: ((*head, "query", "rank"), x) for name, x in zip(("top_keys", "top_weights"), top, strict=True)}
    coords = {
        "layer": np.arange(n_layers) if layers is None else layers,
        "head": np.arange(heads),
        "query": position[-queries:],
        "key": position,
        "role": ["bos", "user"],
    }
    for side, n in (("query", queries), ("key", keys)):
        for name, values in (("token", tokens), ("role", roles)):
            coords[f"{side}_{name}"] = (("batch", side), np.array([list(values)[-n:]] * batch, dtype=object))
    return xr.Dataset(data, coords | (extra or {}), {"kind": "self", "causal": True, **attrs})


def tree(node: xr.Dataset, name="language_model", **attrs) -> xr.DataTree:
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs={"model": "a/model", **attrs}), name: node})


class Page:
    """A written report, taken apart again."""

    def __init__(self, path: Path) -> None:
        self.bytes = path.read_bytes()
        self.html = self.bytes.decode()
        self.header = json.loads(re.search(r'id="header">(.*?)</script>', self.html, re.S)[1])
        self.blocks = re.findall(r'<script type="text/plain" id="block-\d+">(.*?)</script>', self.html)

    def block(self, number: int) -> np.ndarray:
        return np.frombuffer(zlib.decompress(base64.b64decode(self.blocks[number]), -zlib.MAX_WBITS), np.uint8)

    def dense(self, stack=0, sample=0) -> np.ndarray:
        """(layer, head, query, key) of a causal stack with every row."""
        one = self.header["stacks"][stack]
        key, query = (np.asarray(one[side]["position"]) for side in ("key", "query"))
        inside = key <= query[:, None] if one["weights"]["triangle"] else np.ones((len(query), len(key)), bool)
        out = np.zeros((len(one["layers"]), len(one["heads"]), len(query), len(key)), np.float32)
        for layer, number in enumerate(one["weights"]["blocks"][sample]):
            out[layer][:, inside] = (self.block(number).reshape(len(one["heads"]), -1) / np.float32(255)) ** 2
        return out

    def top(self, stack=0, sample=0) -> tuple[np.ndarray, np.ndarray]:
        """Key indices and weights (layer, head, query, rank)."""
        one = self.header["stacks"][stack]
        kept, shape = one["weights"], (len(one["heads"]), len(one["query"]["position"]))
        layers = [self.block(n).reshape(kept["k"], 1 + kept["width"], *shape) for n in kept["blocks"][sample]]
        planes = np.moveaxis(np.stack(layers), (1, 2), (4, 0)).astype(np.int64)
        keys = sum(plane * 256**i for i, plane in enumerate(planes[1:]))
        return keys, (planes[0] / 255) ** 2


def bound(p: np.ndarray) -> np.ndarray:
    """Largest error of a weight kept as round(255 sqrt(p)): half a step of the root."""
    return np.sqrt(p) / 255 + 1 / 510**2 + 1e-6


def write(tmp_path, given, **knobs) -> Page:
    return Page(report.write(given, tmp_path / "page.html", **knobs))


@pytest.mark.parametrize(("spread", "sink"), [(1.0, 0.0), (0.3, 0.0), (2.0, 6.0)])
def test_every_row_of_128_tokens_takes_less_than_two_megabytes(tmp_path, spread, sink):
    rows = weights(np.random.default_rng(0), 12, 12, 128, 128, spread=spread, sink=sink)
    page = write(tmp_path, tree(stack(rows)))
    assert len(page.bytes) < 2_000_000
    assert page.header["stacks"][0]["weights"]["form"] == "dense"
    assert (np.abs(page.dense() - rows[0]) <= bound(rows[0])).all()


def diffuse_top(rng, layers, heads, tokens, k):
    """Random keys and nearly even weights: nothing to compress."""
    keys = rng.integers(0, tokens, size=(1, layers, heads, tokens, k))
    rates = -np.sort(-rng.uniform(0.1, 1, size=keys.shape), axis=-1)
    return keys, (rates / rates.sum(-1, keepdims=True)).astype(np.float32)


def test_1024_tokens_fit_the_budget_with_as_many_keys_as_fit(tmp_path):
    top = diffuse_top(np.random.default_rng(0), 12, 12, 1024, 24)
    page = write(tmp_path, tree(stack(top=top, tokens=[f" t{i}" for i in range(1024)])))
    k = page.header["stacks"][0]["weights"]["k"]
    assert len(page.bytes) < 12_000_000
    assert 8 <= k <= 24
    keys, kept = page.top()
    np.testing.assert_array_equal(keys, top[0][0, ..., :k])
    assert (np.abs(kept - top[1][0, ..., :k]) <= bound(top[1][0, ..., :k])).all()


@pytest.mark.parametrize("budget", [600_000, 400_000, 300_000])
def test_a_smaller_budget_keeps_fewer_keys_and_is_never_exceeded(tmp_path, budget):
    top = diffuse_top(np.random.default_rng(0), 4, 8, 300, 20)
    page = write(tmp_path, tree(stack(top=top, tokens=[f" t{i}" for i in range(300)])), budget=budget)
    assert budget * 0.75 < len(page.bytes) <= budget
    assert 1 <= page.header["stacks"][0]["weights"]["k"] < 20


def test_long_texts_keep_means_of_neighbours_and_no_weights_and_say_so(tmp_path):
    top = diffuse_top(np.random.default_rng(0), 4, 8, 3000, 2)
    node = stack(top=top, tokens=[f" t{i}" for i in range(3000)])
    node["along_query"][0, 2, 3, 4:6] = np.nan
    page = write(tmp_path, tree(node), budget=420_000)
    assert len(page.bytes) <= 420_000
    one = page.header["stacks"][0]
    assert one["weights"] is None
    assert "not even the largest of each row fits" in one["notices"][0]
    (variable,) = (v for v in one["variables"] if v["name"] == "along_query")
    n = variable["pooled"]
    assert n > 1
    assert f"mean of {n} neighbours" in page.html
    codes = page.block(variable["block"]).reshape(1, 4, 8, -(-3000 // n)).astype(float)
    drawn = variable["low"] + codes * (variable["high"] - variable["low"]) / 254
    wide = np.pad(node["along_query"].values, [(0, 0)] * 3 + [(0, -3000 % n)], constant_values=np.nan)
    true = np.nanmean(wide.reshape(1, 4, 8, -1, n), -1)
    np.testing.assert_allclose(drawn, true, atol=0.51 * (variable["high"] - variable["low"]) / 254 + 1e-6)


def test_a_budget_too_small_for_the_page_is_refused_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    top = diffuse_top(np.random.default_rng(0), 4, 8, 300, 20)
    with pytest.raises(ValueError, match=r"over budget=50,000.*fewer layers"):
        report.write(tree(stack(top=top, tokens=[f" t{i}" for i in range(300)])), path, budget=50_000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_rows_too_many_for_the_budget_become_the_largest_keys(tmp_path):
    rows = weights(np.random.default_rng(1), 3, 4, 200, 200)
    page = write(tmp_path, tree(stack(rows)), budget=300_000)
    one = page.header["stacks"][0]["weights"]
    keys, kept = page.top()
    assert one["form"] == "top"
    assert len(page.bytes) <= 300_000
    largest = -np.sort(-rows[0], axis=-1)[..., : one["k"]]
    assert (np.abs(kept - largest) <= bound(largest)).all()
    picked = np.take_along_axis(rows[0], keys, -1)
    np.testing.assert_array_equal(picked[kept > 0], largest[kept > 0])


def test_stacks_share_the_budget(tmp_path):
    rng = np.random.default_rng(1)
    both = {"small": stack(weights(rng, 2, 2, 20, 20)), "large": stack(weights(rng, 4, 8, 160, 160))}
    page = write(tmp_path, xr.DataTree.from_dict(both), budget=400_000)
    assert [one["weights"]["form"] for one in page.header["stacks"]] == ["dense", "top"]
    assert len(page.bytes) <= 400_000


def test_a_row_or_head_that_is_not_there_stays_away_and_queries_may_be_the_last_ones(tmp_path):
    rows = weights(np.random.default_rng(2), 2, 3, 4, 9)
    rows[0, 1, 2] = np.nan
    rows[0, 0, 0, 1] = np.nan
    page = write(tmp_path, tree(stack(rows, first=100, layers=[3, 11])))
    drawn = page.dense()
    assert not drawn[1, 2].any()
    assert not drawn[0, 0, 1].any()
    assert page.header["stacks"][0]["weights"]["triangle"]
    assert page.header["stacks"][0]["layers"] == [3, 11]
    known = np.nan_to_num(rows[0])
    assert (np.abs(drawn - known) <= bound(known)).all()


def test_a_causal_stack_with_weight_on_the_future_is_stored_whole(tmp_path):
    rows = weights(np.random.default_rng(2), causal=False)
    page = write(tmp_path, tree(stack(rows)))
    assert not page.header["stacks"][0]["weights"]["triangle"]
    assert (np.abs(page.dense() - rows[0]) <= bound(rows[0])).all()


def test_top_keys_are_absolute_positions_and_minus_one_is_none(tmp_path):
    keys = np.array([[[[[100, 102], [103, -1], [101, 103], [100, 101]]]]])
    kept = np.array([[[[[0.6, 0.4], [1.0, 0.0], [0.2, 0.5], [0.5, np.nan]]]]], np.float32)
    page = write(tmp_path, tree(stack(top=(keys, kept), tokens=list("abcd"), first=100)))
    places, drawn = page.top()
    assert places[0, 0, 0].tolist() == [0, 2]
    assert places[0, 0, 2].tolist() == [3, 1]  # given the wrong way round
    assert drawn[0, 0, :, 1] == pytest.approx([0.4, 0, 0.2, 0], abs=0.003)


def test_variables_keep_sixteen_bits_and_their_means_are_exact(tmp_path):
    node = stack(weights(np.random.default_rng(3)))
    node["along_query"][0, 1, 1, 3] = np.nan
    page = write(tmp_path, tree(node))
    one = page.header["stacks"][0]
    atlas = page.block(one["atlas"]).view("<f4").reshape(-1, 1, 2, 3)
    for variable in one["variables"]:
        true = node[variable["name"]]
        rest = [dim for dim in true.dims if dim in ("query", "key")]
        mean = true.mean(rest).transpose(..., "batch", "layer", "head").values.reshape(-1, 1, 2, 3)
        np.testing.assert_allclose(atlas[variable["atlas"] : variable["atlas"] + len(mean)], mean, rtol=1e-6)
        if variable["along"]:
            codes = page.block(variable["block"]).view("<u2").astype(float)
            step = (variable["high"] - variable["low"]) / 65534
            drawn = np.where(codes == 65535, np.nan, variable["low"] + codes * step)
            order = ["batch", "layer", "head", *(["role"] if variable["roles"] else []), variable["along"]]
            np.testing.assert_allclose(drawn, true.transpose(*order).values.ravel(), atol=0.51 * step + 1e-6)


def batch(pads: int = 5) -> tuple[xr.Dataset, xr.Dataset]:
    """A text alone, and the same after padding, beside a longer one; the padding's own numbers are nonsense."""
    rng = np.random.default_rng(9)
    rows = weights(rng, queries=8, keys=8, sink=3.0)
    alone = stack(rows)
    wide = np.zeros((2, 2, 3, 8 + pads, 8 + pads), np.float32)
    wide[0] = weights(rng, queries=8 + pads, keys=8 + pads)[0]
    wide[1, ..., pads:, pads:] = rows[0]
    wide[1, ..., :pads, :] = 1 / (8 + pads)
    both = stack(wide)
    for name in ("along_query", "along_key", "parts"):
        both[name].values[1] = 99.0
        both[name].values[1, :, :, pads:] = alone[name].values[0]
    both["level"].values[1] = alone["level"].values[0]
    roles = both["query_role"].values
    roles[1] = ["pad"] * pads + list(alone["query_role"].values[0])
    return alone, both.assign_coords({f"{side}_role": (("batch", side), roles) for side in ("query", "key")})


def test_a_padded_text_has_the_numbers_of_the_text_alone(tmp_path):
    alone, both = (write(tmp_path, tree(node)) for node in batch())
    one, two = alone.header["stacks"][0], both.header["stacks"][0]
    atlas = [
        page.block(s["atlas"]).view("<f4").reshape(-1, s["samples"], 2, 3) for page, s in ((alone, one), (both, two))
    ]
    np.testing.assert_allclose(atlas[1][:, 1], atlas[0][:, 0], rtol=1e-5)
    assert "2 samples of at most 13 tokens" in both.html
    np.testing.assert_array_equal(both.dense(sample=1)[..., 5:, 5:], alone.dense())
    assert not both.dense(sample=1)[..., :5, :].any()
    for mine, theirs in zip(two["sinks"][1], one["sinks"][0], strict=True):
        assert {**mine, "key": mine["key"] - 5} == theirs
    for v, w in zip(one["variables"], two["variables"], strict=True):
        if v["along"]:
            series = []
            for page, variable, samples in ((alone, v, 1), (both, w, 2)):
                codes = (
                    page.block(variable["block"])
                    .view("<u2")
                    .astype(float)
                    .reshape(samples, -1, 8 if samples == 1 else 13)
                )
                step = (variable["high"] - variable["low"]) / 65534
                series.append(np.where(codes == 65535, np.nan, variable["low"] + codes * step))
            np.testing.assert_allclose(series[1][1][:, 5:], series[0][0], atol=1e-3)
            assert np.isnan(series[1][1][:, :5]).all()
    rolled = [np.asarray(page.block(s["rollout"]["blocks"][-1])) for page, s in ((alone, one), (both, two))]
    assert rolled[1][:15].sum() == 0
    assert rolled[1][15:].sum() == rolled[0].sum()


def test_the_page_has_the_sinks_of_the_observations(tmp_path):
    node = stack(weights(np.random.default_rng(0), 3, 4, 64, 64, sink=6.0))
    node["received"] = node["rows"].sum("query")
    (found,) = (one for one in observe(tree(node)) if "of all attention" in one.text)
    page = write(tmp_path, tree(node))
    (one,) = page.header["stacks"][0]["sinks"][0]
    assert (one["key"], one["found"]) == (0, True)
    assert np.mean(one["share"]) == pytest.approx(found.score, rel=1e-3)
    assert f"goes to the first token ('t0'), most in layer {np.argmax(one['share'])}" in found.text
    assert page.header["sink"] == {"share": 0.1, "times": 3.0}
    even = write(tmp_path, tree(stack(weights(np.random.default_rng(0), 2, 4, 2048, 2048, spread=0.02))))
    assert not any(one["found"] for one in even.header["stacks"][0]["sinks"][0])


def test_a_statistic_that_is_nowhere_defined_is_not_shown(tmp_path):
    node = stack(weights(np.random.default_rng(5), causal=False), kind="cross", causal=False)
    node["distance"] = node["along_query"] * np.nan
    page = write(tmp_path, tree(node, "decoder_cross"))
    assert "distance" not in [one["name"] for one in page.header["stacks"][0]["variables"]]
    assert "distance of decoder_cross, which is not defined there" in page.html


def test_ids_and_the_last_generated_token_are_told(tmp_path):
    rows = weights(np.random.default_rng(5))
    one = write(tmp_path, tree(stack(rows, tokens=[str(i) for i in range(8)], unread=["17"]))).header["stacks"][0]
    assert one["query"]["ids"]
    assert one["key"]["ids"]
    assert one["unread"] == ["17"]
    one = write(tmp_path, tree(stack(rows))).header["stacks"][0]
    assert not one["key"]["ids"]
    assert one["unread"] is None


def test_every_role_has_a_colour_of_its_own():
    style = (VIEW / "report.css").read_text("utf-8")
    colours = dict(re.findall(r"--role-(\w+): (#[0-9a-f]{6});", style))
    assert set(colours) == set(ROLES)
    assert len(set(colours.values())) == len(ROLES)


def test_rollout_is_the_product_of_half_identity_means(tmp_path):
    rows = weights(np.random.default_rng(4), 3, 2, 6, 6)
    page = write(tmp_path, tree(stack(rows)))
    rolled = np.eye(6)
    for layer in rows[0].astype(float):
        rolled = (0.5 * layer.mean(0) + 0.5 * np.eye(6)) @ rolled
    drawn = np.zeros((6, 6))
    drawn[np.tril_indices(6)] = (page.block(page.header["stacks"][0]["rollout"]["blocks"][0]) / 255) ** 2
    assert (np.abs(drawn - rolled) <= bound(rolled)).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"layers": [0, 2]}, "every layer"), ({"kind": "cross"}, "self attention"), ({"suffix": True}, "all tokens")],
)
def test_rollout_says_why_it_is_absent(tmp_path, change, reason):
    rows = weights(np.random.default_rng(4), queries=4 if change.pop("suffix", False) else 8)
    page = write(tmp_path, tree(stack(rows, **change)))
    assert reason in page.header["stacks"][0]["rollout"]["reason"]


def test_head_notices_findings_and_versions_are_in_the_page(tmp_path):
    given = tree(
        stack(weights(np.random.default_rng(5))),
        partial=True,
        unreached=["model.resampler"],
        regard="0.1",
        torch="2.13",
        created="2026-03-05T14:03:11",
    )
    findings = [
        SimpleNamespace(text="One head looks back.", stack="language_model", layer=1, head=2),
        SimpleNamespace(text="Elsewhere.", stack="not recorded", layer=0, head=0),
        SimpleNamespace(text="All of it.", stack="language_model", layer=None, head=None),
    ]
    page = write(tmp_path, given, findings=findings)
    for words in ("a/model", "8 tokens, 2 layers × 3 heads", "5 March 2026, 14:03", "interrupted", "model.resampler"):
        assert words in page.html
    assert "regard 0.1 · torch 2.13" in page.html
    assert re.findall(r'<a href="(#lang[^"]*)"', page.html) == ["#language_model/1/2", "#language_model"]
    assert page.header["starts"] == [[1, 2]]


def test_what_cannot_be_shown_is_named(tmp_path):
    node = stack(weights(np.random.default_rng(5)))
    node["odd"] = (("layer", "query"), np.zeros((2, 8)))
    node["words"] = (("batch", "layer", "head"), np.full((1, 2, 3), "x"))
    html = write(tmp_path, tree(node)).html
    assert "odd of language_model" in html
    assert "words of language_model" in html


def test_without_a_variable_by_key_the_weights_give_one(tmp_path):
    rows = weights(np.random.default_rng(5))
    page = write(tmp_path, tree(stack(rows).drop_vars(["along_key", "level", "along_query", "parts"])))
    (variable,) = page.header["stacks"][0]["variables"]
    codes = page.block(variable["block"]).view("<u2")
    drawn = variable["low"] + codes * (variable["high"] - variable["low"]) / 65534
    np.testing.assert_allclose(drawn, rows.sum(3).ravel(), atol=1e-3)


def test_statistics_alone_make_a_page(tmp_path):
    node = stack(weights(np.random.default_rng(5))).drop_vars("rows")
    page = write(tmp_path, tree(node))
    assert page.header["stacks"][0]["weights"] is None
    bare = xr.Dataset({"level": (("layer", "head"), np.ones((2, 3)))})
    assert write(tmp_path, tree(bare)).header["stacks"][0]["layers"] == [0, 1]


HOSTILE = ["</script><script>alert(1)</script>", "<!--", "\u2028", "\u2029", "\x00", "\u202e", '"&amp;', "]]>"]


def test_nothing_given_becomes_markup(tmp_path):
    node = stack(weights(np.random.default_rng(5)), tokens=HOSTILE, sites=["<i>"] * 2)
    node["level"].attrs["long_name"] = "<b>"
    finding = SimpleNamespace(text="</ul><script>", stack="<script>", layer=0, head=0)
    page = write(tmp_path, tree(node, "<script>", model="</title><script>", note="<script>"), findings=[finding])
    opened = re.findall(r"<script[^>]*>", page.html)
    assert opened.count('<script type="module">') == 1
    assert all(re.fullmatch(r'<script type="(application/json|text/plain|module)"[^>]*>', tag) for tag in opened)
    assert page.header["stacks"][0]["key"]["token"][0] == HOSTILE
    assert "<b>" not in page.html
    assert "<i>" not in page.html


def test_the_policy_forbids_the_network_and_allows_only_this_script(tmp_path):
    page = write(tmp_path, tree(stack(weights(np.random.default_rng(5)))))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page.html)[1]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    for tag, rule in (("style", "style-src"), ('script type="module"', "script-src")):
        text = re.search(rf"<{tag}>(.*?)</{tag.split()[0]}>", page.html, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy
    assert not re.search(r"""(src|href)=["']?(https?:|//)|@import|url\(""", page.html)


@pytest.mark.parametrize("first", ["page.js", "beside.js"])
def test_what_a_page_joins_shares_no_names(first):
    names = re.findall(r"^(?:async )?(?:const|let|function\*?|class) (\w+)", report._bundle(VIEW, first), re.M)
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)


def test_the_modules_parse_nothing_as_markup():
    for module in VIEW.glob("*.js"):
        source = module.read_text("utf-8")
        unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|</script"
        asks = "" if module.name == "wire.js" else r"|fetch\(|EventSource"  # of the studio: what asks its server
        assert not re.search(unsafe + asks, source), module


def test_pictures_are_scaled_and_kept_inside(tmp_path):
    rng = np.random.default_rng(6)
    photo = Image.fromarray(rng.integers(0, 255, (700, 1400, 3), np.uint8))
    clear = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    page = write(tmp_path, tree(stack(weights(rng))), pictures=[photo, clear])
    first, second = page.header["pictures"]
    assert (first["width"], first["height"]) == (512, 256)
    assert first["source"].startswith("data:image/jpeg;base64,")
    assert (second["width"], second["height"]) == (40, 20)
    assert second["source"].startswith("data:image/png;base64,")


def test_the_same_input_gives_the_same_bytes(tmp_path):
    given = tree(stack(weights(np.random.default_rng(6))))
    assert write(tmp_path, given).bytes == write(tmp_path, given).bytes
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_weights_outside_zero_to_one_are_told(tmp_path):
    rows = weights(np.random.default_rng(6))
    rows[0, 0, 0, 3, 1] = -0.4
    (notice,) = write(tmp_path, tree(stack(rows))).header["stacks"][0]["notices"]
    assert "-0.4" in notice


def broken(**changes):
    node = stack(weights(np.random.default_rng(6)))
    keys = np.zeros((1, 2, 3, 8, 2), int)
    if "alone" in changes:
        node["top_keys"] = (("batch", "layer", "head", "query", "rank"), keys)
    if "unknown" in changes:
        node = node.drop_vars("rows")
        node["top_keys"] = (("batch", "layer", "head", "query", "rank"), keys + 4711)
        node["top_weights"] = (("batch", "layer", "head", "query", "rank"), keys + 0.5)
    if "dims" in changes:
        node["rows"] = node["rows"].isel(query=0)
    return tree(node)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (xr.Dataset(), TypeError, "Dataset; give a DataTree"),
        (xr.DataTree.from_dict({"/a": xr.Dataset()}), ValueError, r"\['a'\] none has the dims layer and head"),
        (broken(alone=True), ValueError, "top_keys alone"),
        (broken(unknown=True), ValueError, "position 4711.*absolute positions"),
        (broken(dims=True), ValueError, "rows has the dims"),
    ],
)
def test_bad_trees_are_refused_in_words(tmp_path, given, error, words):
    with pytest.raises(error, match=words):
        report.write(given, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_other_bad_input_is_refused_in_words(tmp_path):
    given = tree(stack(weights(np.random.default_rng(6))))
    with pytest.raises(FileNotFoundError, match="missing does not exist; create it"):
        report.write(given, tmp_path / "missing" / "page.html")
    with pytest.raises(TypeError, match="pictures holds a ndarray; give PIL images"):
        report.write(given, tmp_path / "page.html", pictures=[np.zeros((3, 3))])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seconds", "<b>"),
        ("seconds", [1, 2]),
        ("seconds", {}),
        ("grids", "<b>"),
        ("grids", "[" * 100_000),
        ("grids", 5),
        ("grids", "[5]"),
        ("grids", "[[1]]"),
        ("range", "<b>"),
        ("range", [0]),
        ("range", [0, float("nan")]),
        ("unread", 5),
    ],
)
def test_attributes_of_a_wrong_kind_are_named(tmp_path, name, value):
    model, tokenizer = regard.load("reader")
    with torch.no_grad(), regard.record(model, "entropy", processor=tokenizer) as recording:
        model(**tokenizer("to be", return_tensors="pt"))
    tree = recording.tree
    stack = tree["language_model"]
    {"seconds": tree, "range": stack["entropy"]}.get(name, stack).attrs[name] = value
    with pytest.raises(ValueError, match=f"report: the attribute {name} of .*; it needs"):
        report.write(tree, tmp_path / "a.html")
    assert not list(tmp_path.iterdir())
