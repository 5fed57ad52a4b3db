"""Importance is what pruning changes, strength what the map holds, and patterns that were planted are found again."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from families import build
from sklearn.metrics import adjusted_rand_score

import regard
from regard.call import Call, Site
from regard.statistics.vit_analytics import (
    PatternAutoencoder,
    _divergence,
    attention_patterns,
    attention_strength,
    head_importance,
    patch_maps,
)
from regard.tokens import Tokens


def sees():
    model, inputs = build("vit", "sdpa")
    model.config.problem_type = None
    return model, inputs


def test_a_head_that_gives_nothing_is_of_no_importance():
    """Its columns of the output projection are 0; the others count, each as if its own were 0."""
    model, inputs = sees()
    out = _output_projection(model, 1)
    with torch.no_grad():
        out.weight[:, 8:16] = 0  # head 1 of 4, 8 wide
    found = head_importance(model, inputs)
    assert found["fall"].dims == ("layer", "head")
    assert found["fall"].shape == (2, 4)
    for name in ("fall", "divergence", "turn"):
        assert abs(float(found[name].sel(layer=1)[1])) < 1e-6
    assert (found["divergence"].values.ravel()[[0, 1, 2, 3, 4, 6, 7]] > 1e-6).all()
    with torch.no_grad():
        before = model(**inputs).logits.softmax(-1)
        out.weight[:, 16:24] = 0
        after = model(**inputs).logits.softmax(-1)
    top = before.argmax(-1, keepdim=True)
    fall = float((before - after).gather(1, top).mean())
    assert float(found["fall"].sel(layer=1)[2]) == pytest.approx(fall, abs=1e-6)


def _output_projection(model, layer):
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and f".{layer}." in f".{n}."]
    return model.get_submodule(next(n for n in names if n.endswith(("o_proj", "attention.output.dense"))))


def test_several_labels_are_judged_each_by_itself():
    model, inputs = build("vit", "sdpa")
    model.config.problem_type = "multi_label_classification"
    target = torch.tensor([[True, False], [True, True]])
    found = head_importance(model, inputs, target=target)
    with torch.no_grad():
        before = model(**inputs).logits.sigmoid()
        with regard.intervene(model, Mute(0, 3)):
            after = model(**inputs).logits.sigmoid()
    assert float(found["fall"].sel(layer=0)[3]) == pytest.approx(float((before - after)[target].mean()), abs=1e-6)


class Mute:
    def __init__(self, layer, head):
        self.layer, self.head = layer, head

    def output(self, call, output):
        keep = torch.ones(output.shape[1])
        keep[self.head] = 0 if call.site.layer == self.layer else 1
        return output * keep[:, None, None]


def test_divergence_by_hand():
    p, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert float(_divergence(p, q, False)) == pytest.approx(math.log(2))
    assert float(_divergence(p, p, False)) == 0.0
    assert _divergence(p, q, True)[0].tolist() == pytest.approx([math.log(2)] * 2)


def test_bad_targets_and_stacks_are_named():
    model, inputs = sees()
    with pytest.raises(ValueError, match="target is a class for each of 2 pictures"):
        head_importance(model, inputs, target=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="has no stack 'language_model'; it has encoder"):
        head_importance(model, inputs, stack="language_model")
    with pytest.raises(ValueError, match="has no stack 'decoder'"):
        patch_maps(model, inputs, stack="decoder")
    with pytest.raises(ValueError, match="as many maps or more"):
        attention_patterns(torch.rand(3, 4, 4), 4)
    with pytest.raises(ValueError, match="multiple of 8"):
        PatternAutoencoder(20)


def grid(side):
    return Tokens.plain("image", 1, side * side).on_grid(0, 0, (side, side))


def test_even_attention_is_as_strong_at_every_hop():
    zero, tokens = torch.zeros(1, 1, 9, 2), grid(3)
    call = Call(Site("a", "encoder", 0), zero, zero, zero, 1.0, tokens=tokens, query_tokens=tokens)
    found = attention_strength(call, hops=4)[0, 0]
    assert found[0, :3].tolist() == pytest.approx([1 / 9] * 3)  # a corner has patches up to two hops away
    assert found[4, :2].tolist() == pytest.approx([1 / 9] * 2)  # the middle up to one
    assert found[4, 2:].isnan().all()
    assert found[:, 3].isnan().all()


def test_strength_adds_up_to_the_attention_on_patches():
    model, inputs = sees()
    with torch.no_grad(), regard.record(model, "rows", strength=partial(attention_strength, hops=4)) as recording:
        model(**inputs)
    tree = recording.tree["encoder"]
    strength, rows = tree["strength"].values, tree["rows"].values
    assert np.isnan(strength[:, :, :, 0]).all()  # the class token
    place = np.stack(np.divmod(np.arange(16), 4), -1)
    apart = np.abs(place[:, None] - place).max(-1)
    for hop in range(4):
        ring = apart == hop
        with np.errstate(invalid="ignore"):
            wanted = (rows[..., 1:, 1:] * ring).sum(-1) / ring.sum(-1)
        np.testing.assert_allclose(strength[..., 1:, hop], wanted, atol=1e-6)


def test_maps_are_of_patches_only():
    model, inputs = sees()
    maps = patch_maps(model, inputs)
    assert maps.shape == (2, 4, 2, 16, 16)
    with torch.no_grad(), regard.record(model, "rows") as recording:
        model(**inputs)
    rows = recording.tree["encoder"]["rows"].sel(layer=1, head=2)
    np.testing.assert_allclose(maps[1, 2], rows[:, 1:, 1:], atol=1e-6)


def planted(n, side=8, seed=0):
    """Noisy maps of four kinds: itself, the patches around, the same row, and a few patches for all."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.stack([torch.arange(side * side) // side, torch.arange(side * side) % side], -1)
    apart = (place[:, None] - place).abs()
    itself = (apart.amax(-1) == 0) * 6.0
    around = (apart.amax(-1) <= 2) * 4.0
    same_row = (apart[..., 0] == 0) * 4.0
    maps, kinds = [], []
    for i in range(n):
        few = torch.zeros(side * side)
        few[torch.randperm(side * side, generator=generator)[:4]] = 5.0
        scores = [itself, around, same_row, few.expand(side * side, -1)][i % 4]
        noise = torch.randn(side * side, side * side, generator=generator) * 0.5
        maps.append((scores + noise).softmax(-1))
        kinds.append(i % 4)
    return torch.stack(maps), kinds


def test_planted_patterns_are_found():
    maps, kinds = planted(60)
    found = attention_patterns(maps, 4, steps=120)
    assert found.plane.shape == (60, 2)
    assert adjusted_rand_score(kinds, found.pattern) > 0.8
    one, two = (attention_patterns(maps, 4, steps=2) for _ in range(2))
    assert torch.equal(one.plane, two.plane)
    mixed = adjusted_rand_score(np.random.default_rng(0).permutation(kinds), found.pattern)
    assert mixed < 0.2
