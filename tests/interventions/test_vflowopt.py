"""What matters in a picture by hand, what leaves and what is merged, and in which models."""

from __future__ import annotations

import pytest
import torch
from pictured import KINDS, as_alone, call, deep, logits

import regard
from regard.interventions import vflowopt as module
from regard.interventions.gift import gift
from regard.interventions.var import var
from regard.interventions.vflowopt import (
    Importance,
    budgeted,
    cost,
    importance,
    least_out,
    mattering,
    recycle,
    vflowopt,
)


def test_what_matters_is_what_global_patches_look_at():
    rows = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.6, 0.4, 0.0, 0.0], [0.2, 0.2, 0.4, 0.2]])
    every = torch.ones(1, 4, dtype=torch.bool)
    weights = call(rows[None], [True] * 4).weights  # received .4 .3 .2 .1 of a mean of .25
    assert torch.allclose(importance(weights, every, t=1.0), torch.tensor([[0.4, 0.3, 0.2, 0.1]]), atol=1e-6)
    assert torch.allclose(importance(weights, every, t=9.0), rows.mean(0)[None], atol=1e-6)  # none is: all are
    some = torch.tensor([[False, True, True, True]])  # the class token neither asks nor is asked
    found = importance(weights, some, t=1.2)[0, 1:]
    assert torch.allclose(found, rows[1, 1:], atol=1e-6)  # of .3 .2 .2 received, only the first is above 1.2 times


def test_so_many_leave_and_so_many_are_merged():
    torch.manual_seed(0)
    value, features = torch.rand(64), torch.randn(64, 3)
    places = torch.stack([torch.zeros(64), torch.arange(64) // 8, torch.arange(64) % 8], 1).long()
    kept, merged = recycle(features, value, places, torch.full((64,), 4.0), keep=0.5)
    order = value.argsort()
    assert int(kept.sum()) == 64 - 36 + 4  # 32 leave, 4 more are taken out, and each of 4 windows gives one back
    assert kept[order[36:]].all()
    assert torch.equal(merged[order[36:]], features[order[36:]])
    window = [i for i in order[:36].tolist() if i // 8 < 4 and i % 8 < 4]
    expected = (value[window, None] * features[window]).sum(0) / value[window].sum()
    assert torch.allclose(merged[window[-1]], expected, atol=1e-6)
    assert kept[window].tolist() == [False] * (len(window) - 1) + [True]
    lost, same = recycle(features, value, places, None, keep=0.5)
    assert int(lost.sum()) == 32
    assert torch.equal(same, features)


def test_later_stages_keep_what_matters_most_of_what_is_left():
    value = torch.tensor([[0.1, 0.5, torch.nan, 0.3, 0.4]])
    left = torch.tensor([[True, False, False, True, True]])
    assert least_out(value, left, 2 / 3).tolist() == [[False, False, False, True, True]]
    assert cost((1.0, 1.0, 1.0)) == 1
    assert abs(cost(budgeted(0.3, 0.9, 0.25)) - 0.25) < 1e-9
    assert budgeted(0.25, 0.55, 0.25) is None


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_as_alone(kind):
    as_alone(kind, lambda model, inputs: vflowopt.fit(model, inputs, ratios=(0.5, 0.5, 0.5)))


@torch.no_grad()
def test_tokens_leave_by_what_they_matter_and_caches_shrink():
    model, inputs = deep("llava")
    n, image = inputs["input_ids"].shape[1], inputs["input_ids"] == 98
    method = vflowopt.fit(model, inputs, ratios=(0.5, 0.5, 0.5), window=0.0)
    seen = {}

    class Look:
        def inputs(self, call):
            seen[call.site.stack, call.site.layer] = call.positions
            return call

    with regard.intervene(model, method, Look()):
        cache = model(**inputs).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [n - 8] * 2 + [n - 12] * 2 + [n - 14] * 2
    best = method.importance.value.nan_to_num(torch.inf).argsort(1, descending=True)[:, : n - 14].sort(1).values
    assert torch.equal(seen["language_model", 5], best)
    assert int(image.sum()) == 32
    merging = vflowopt.fit(model, inputs, ratios=(0.5, 1.0, 1.0), window=0.5)
    lost = vflowopt.fit(model, inputs, ratios=(0.5, 1.0, 1.0), window=0.0)
    assert not torch.allclose(logits(model, inputs, merging), logits(model, inputs, lost), atol=1e-4)


def test_entropy_counts_where_it_is_asked_for():
    model, inputs = deep("llava")
    plain, more = (mattering(model, inputs, alpha=alpha).value for alpha in (0.0, 0.5))
    added = (more - plain)[inputs["input_ids"] == 98].view(2, 16)
    assert torch.allclose(added.sum(1), torch.full((2,), 0.5), atol=1e-5)
    with pytest.raises(ValueError, match="alpha=0"):
        mattering(*deep("qwen2_vl"), alpha=0.5)


def test_searched_settings_meet_the_budget_and_keep_more():
    model, inputs = deep("llava")
    settings, score = module.tune(model, inputs, target=0.25, calls=4)
    _, first = module.tune(model, inputs, target=0.25, calls=1)
    assert score >= first
    assert abs(cost(settings["ratios"], 6) - 0.25) < 0.06  # the paper's are made for 28 layers
    with pytest.raises(ValueError, match="target is a share"):
        module.tune(model, inputs, target=1.5)


def test_it_composes_and_refuses():
    model, inputs = deep("llava")
    fitted = vflowopt.fit(model, inputs, ratios=(0.5, 0.5, 1.0))
    ways = [logits(model, inputs, *things) for things in ((fitted,), (gift.fit(model, inputs), fitted))]
    assert not torch.allclose(*ways, atol=1e-4)
    with pytest.raises(ValueError, match="var: tokens have left before"):
        logits(model, inputs, fitted, var())
    with pytest.raises(ValueError, match=r"fitted to a prompt \[2, 27\], and the model reads \[1, 27\]"):
        logits(model, {n: v[:1] for n, v in inputs.items()}, fitted)
    with pytest.raises(ValueError, match="three shares"):
        vflowopt(importance=fitted.importance, ratios=(0.5, 0.5))
    with pytest.raises(ValueError, match="window is a share"):
        vflowopt(importance=fitted.importance, window=4.0)
    assert isinstance(fitted.importance, Importance)
