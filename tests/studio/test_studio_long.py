"""A recording of 16,384 tokens in the studio: it opens, rows come when they are asked for, and are those recorded."""

from __future__ import annotations

import json
import time
import zlib

import numpy as np
import pytest
import xarray as xr

from regard.recording import Recording

pytest.importorskip("fastapi")
from regard.studio.work import Desk

TOKENS, LAYERS, HEADS, RANKS = 16_384, 3, 4, 8
KEY = "20260101-000000-abcdef"


@pytest.fixture(scope="session")
def long_tree() -> xr.DataTree:
    rng = np.random.default_rng(0)
    head, size = ("batch", "layer", "head"), (1, LAYERS, HEADS)
    back = rng.integers(0, 40, (*size, TOKENS, RANKS)).cumsum(-1)
    keys = np.where(back <= np.arange(TOKENS)[:, None], np.arange(TOKENS)[:, None] - back, -1)
    weights = np.where(keys < 0, 0, 2.0 ** -np.arange(1, RANKS + 1)).astype(np.float32)
    words = np.array([f" word{i % 97}" if i % 12 else "." for i in range(TOKENS)], dtype=object)
    side = {"token": words, "role": np.full(TOKENS, "text", dtype=object)}
    coords = {f"{of}_{part}": (("batch", of), values[None]) for of in ("query", "key") for part, values in side.items()}
    node = xr.Dataset(
        {
            "entropy": ((*head, "query"), rng.gamma(2, size=(*size, TOKENS)).astype(np.float32), {"units": "nats"}),
            "received": ((*head, "key"), rng.gamma(2, size=(*size, TOKENS)).astype(np.float32), {}),
            "top_keys": ((*head, "query", "rank"), keys),
            "top_weights": ((*head, "query", "rank"), weights),
        },
        {**coords, "query": range(TOKENS), "key": range(TOKENS), "layer": range(LAYERS), "head": range(HEADS)},
        {"kind": "self", "causal": True, "sites": [f"layer {i}" for i in range(LAYERS)], "grids": "[]"},
    )
    tree = xr.DataTree.from_dict({"/language_model": node})
    tree.attrs = {"model": "a long text"}
    return tree


@pytest.fixture(scope="session")
def long_folder(tmp_path_factory, long_tree):
    folder = tmp_path_factory.mktemp("long")
    (folder / KEY).mkdir()
    Recording([long_tree]).save(folder / KEY / "recording.zarr")
    card = {"model": "reader", "title": "a long text", "when": 0, "said": "", "base": None, "steps": []}
    (folder / KEY / "card.json").write_text(json.dumps({**card, "given": {"model": "reader", "text": "A long text"}}))
    return folder


def test_blocks_are_made_when_they_are_asked_for_and_hold_every_rank(long_folder, long_tree):
    page = Desk(long_folder).page(KEY)
    (stack,) = page.header["stacks"]
    assert (stack["weights"]["form"], stack["weights"]["k"]) == ("top", RANKS)
    numbers = np.ravel(stack["weights"]["blocks"])
    assert all(callable(page.blocks[number]) for number in numbers)
    assert all(variable["pooled"] == 1 for variable in stack["variables"])
    planes = zlib.decompress(page.blocks[stack["weights"]["blocks"][0][1]](), -zlib.MAX_WBITS)
    planes = np.frombuffer(planes, np.uint8).astype(int).reshape(RANKS, 1 + stack["weights"]["width"], HEADS, TOKENS)
    node = long_tree["language_model"]
    np.testing.assert_allclose(
        (planes[:, 0] / 255.0) ** 2, np.moveaxis(node["top_weights"].values[0, 1], -1, 0), atol=0.003
    )
    keys = planes[:, 1] + 256 * planes[:, 2]
    known = np.moveaxis(node["top_keys"].values[0, 1], -1, 0)
    assert (keys == np.maximum(known, 0)).all()


@pytest.mark.browser
def test_a_recording_of_16384_tokens_opens(opened, serve, long_folder, capsys):
    page = opened(serve(long_folder))

    def asked() -> set[str]:
        return {url for _, url in opened.asked if "/blocks/" in url}

    page.get_by_text("Recordings", exact=True).click()
    began = time.perf_counter()
    page.locator(f'[data-id="{KEY}"]').click()
    page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
    took = time.perf_counter() - began
    assert page.locator("#views .token").count() >= TOKENS - 1
    first = asked()
    page.locator('#views .heads .cell[data-layer="2"][data-head="1"]').click()
    page.locator("#views .token").nth(900).click()
    page.wait_for_selector("#views .list button")
    later = asked() - first
    assert later  # another layer's rows came when they were looked at
    assert len(first | later) < 8
    pressed = time.perf_counter()
    page.locator("#views .token").nth(905).click()
    page.wait_for_selector("#views .token.chosen")
    with capsys.disabled():
        print(f"\nstudio: 16,384 tokens drawn in {took:.1f} s; a token chosen in {time.perf_counter() - pressed:.2f} s")
