"""Promise 1: every reduction equals the same reduction of the eager map, on every family."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from families import EAGER_ONLY, FAMILIES, GENERATE, build
from oracle import eager_maps, reductions

import regard
from regard.statistics.distance import distance

TOLERANCE = 1e-5
ALL = ("entropy", "received", "mass", "top_weights", "rows")


def recorded(model, **options):
    near = partial(distance, clip=2)
    return regard.record(model, *ALL, "distance", near=near, **options)


def placeless(dataset, maps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cross attention has no distances: places of two sequences do not compare."""
    nowhere = torch.full(maps.shape[:3], torch.nan, dtype=torch.double)
    return dict.fromkeys(("distance", "near"), nowhere) if dataset.attrs["kind"] == "cross" else {}


def check(dataset, layer: int, maps: torch.Tensor, queries: torch.Tensor | None = None) -> None:
    """The recorded layer against a dense map; `queries` [batch, query] leaves padding out."""
    at = dataset.sel(layer=layer)
    keep = torch.ones(maps.shape[0], maps.shape[2], dtype=torch.bool) if queries is None else queries
    rows = torch.from_numpy(at["rows"].values)
    chosen = keep[:, None].expand(maps.shape[:3])
    torch.testing.assert_close(rows[chosen], maps.float()[chosen], atol=TOLERANCE, rtol=0)
    truth = reductions(maps) | placeless(dataset, maps)
    for name in ("entropy", "distance", "near", "top_weights"):
        seen = (
            torch.from_numpy(at[name].values)[..., :3] if name == "top_weights" else torch.from_numpy(at[name].values)
        )
        torch.testing.assert_close(
            seen[chosen].double(), truth[name][chosen], atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True
        )
    received = (maps.double() * keep[:, None, :, None]).sum(-2)
    torch.testing.assert_close(
        torch.from_numpy(at["received"].values).double(), received, atol=TOLERANCE, rtol=TOLERANCE
    )
    if "key_role" in dataset.coords:
        for role in dataset["role"].values:
            is_role = torch.from_numpy(dataset["key_role"].values == role)
            mass = (maps.double() * is_role[:, None, None]).sum(-1)
            seen = torch.from_numpy(at["mass"].sel(role=role).values).double()
            torch.testing.assert_close(seen[chosen], mass[chosen], atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_eager(family):
    model, inputs = build(family)
    with recorded(model) as recording, eager_maps(model) as maps:
        model(**inputs)
    assert set(recording.tree.children) == set(maps)
    for stack, layers in maps.items():
        dataset = recording.tree[stack].to_dataset()
        assert list(dataset["layer"].values) == sorted(layers)
        for layer, calls in layers.items():
            if stack == "visual":  # pictures are packed: each call is one, and sees only itself
                rows = recording.tree[stack]["rows"]
                assert np.isnan(rows.sel(layer=layer).values[..., :24, 24:]).all()
                assert np.isnan(rows.sel(layer=layer).values[..., 24:, :24]).all()
                dataset = dataset.assign(rows=rows.fillna(0.0))
                calls = [block_diagonal(calls)]
            check(dataset, layer, calls[0])


def block_diagonal(maps: list[torch.Tensor]) -> torch.Tensor:
    heads = [torch.block_diag(*(m[0, head] for m in maps)) for head in range(maps[0].shape[1])]
    return torch.stack(heads)[None]


@torch.no_grad()
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in EAGER_ONLY and f != "qwen2_vl"])
def test_sdpa(family):
    """Without a materialised mask (is_causal) as with one, against the map of the same model run eagerly."""
    model, inputs = build(family)
    with eager_maps(model) as maps:
        model(**inputs)
    model.set_attn_implementation("sdpa")
    with recorded(model) as recording:
        model(**inputs)
    for stack, layers in maps.items():
        for layer, calls in layers.items():
            check(recording.tree[stack].to_dataset(), layer, calls[0])


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "gpt_oss", "bert", "t5", "llava"])
def test_padding(family, side, implementation):
    if implementation == "sdpa" and family in EAGER_ONLY:
        pytest.skip("transformers refuses sdpa for this family")
    model, inputs = build(family)
    mask = torch.ones_like(inputs["input_ids"])
    if family == "llava":
        mask[0, :2] = 0  # before the picture
        if side == "right":
            mask[0, :2], mask[0, -3:] = 1, 0
    else:
        mask[0, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    inputs["attention_mask"] = mask
    with eager_maps(model) as maps:
        model(**inputs)
    model.set_attn_implementation(implementation)
    with recorded(model) as recording:
        model(**inputs)
    for stack, layers in maps.items():
        dataset = recording.tree[stack].to_dataset()
        for layer, calls in layers.items():
            real = torch.from_numpy(dataset["query_role"].values != "pad")
            assert stack in ("decoder", "decoder_cross", "vision_tower") or not real.all()
            check(dataset, layer, calls[0], real)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", GENERATE)
def test_generation(family, implementation):
    """Prefill and every step, joined on absolute positions, against the map of each step."""
    if implementation == "sdpa" and family in EAGER_ONLY:
        pytest.skip("transformers refuses sdpa for this family")
    model, inputs = build(family)
    inputs.pop("decoder_input_ids", None)
    inputs.pop("mm_token_type_ids", None) if family != "qwen2_vl" else None
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with eager_maps(model) as maps:
        model.generate(**inputs, **settings)
    model.set_attn_implementation(implementation)
    with recorded(model) as recording:
        model.generate(**inputs, **settings)
    assert len(recording) == 1
    for stack, layers in maps.items():
        if stack in ("encoder", "vision_tower", "visual"):
            continue
        dataset = recording.tree[stack].to_dataset()
        for layer, calls in layers.items():
            at = dataset.sel(layer=layer)
            start, total = 0, 0
            n_keys = dataset.sizes["key"]
            received = torch.zeros(*calls[0].shape[:2], n_keys, dtype=torch.double)
            for step in calls:
                n, n_key = step.shape[-2:]
                key_start = 0 if "cross" in stack else start + n - n_key  # a sliding cache keeps the newest
                assert key_start >= 0
                total += key_start > 0
                span = slice(start, start + n)
                rows = torch.from_numpy(at["rows"].values)[:, :, span, key_start : key_start + n_key]
                torch.testing.assert_close(rows, step.float(), atol=TOLERANCE, rtol=0)
                truth = reductions(step, query_start=start, key_start=key_start) | placeless(dataset, step)
                for name in ("entropy", "distance", "near"):
                    seen = torch.from_numpy(at[name].values)[:, :, span].double()
                    torch.testing.assert_close(seen, truth[name], atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True)
                received[..., key_start : key_start + n_key] += step.double().sum(-2)
                start += n
            assert start == dataset.sizes["query"]
            assert (total > 0) == (family in ("mistral", "gemma3", "gemma2", "gpt_oss") and window(model, layer))
            seen = torch.from_numpy(at["received"].values).double()
            torch.testing.assert_close(seen, received, atol=TOLERANCE, rtol=TOLERANCE)
        if stack == "language_model" and family in ("llava", "qwen2_vl"):
            assert dataset["key_row"].values.max() == (3 if family == "llava" else 1)
        if "decoder" not in stack:
            assert (dataset["query_role"].values[:, -5:] == "generated").all()
            assert not (dataset["query_role"].values[:, :-5] == "generated").any()


def window(model, layer: int) -> bool:
    kinds = getattr(model.config, "layer_types", None)
    return kinds is None or kinds[layer] == "sliding_attention"
