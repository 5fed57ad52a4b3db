"""Attention without one of its principles: formulas by hand, what fixed maps depend on, where layers go, and back."""

from __future__ import annotations

import math

import pytest
import torch
from families import build
from torch.nn import functional as F

import regard
from regard.mechanisms.deconstructed import VARIANTS, NoMixing, SimplerAttention, deconstruct, deconstructed


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)[None, None, :, None]


def test_taylor_by_hand():
    """Scores 0 and 1: weights 1 to 2.5."""
    found = deconstructed(column(1.0, 1.0), column(0.0, 1.0), column(7.0, 14.0), scale=1.0).flatten()
    assert found.tolist() == pytest.approx([7.0, 7 + 7 * 2.5 / 3.5])


def test_running_by_hand():
    """A score of log 3 after one of 0: a quarter of the first, three quarters of the second, whatever the query was."""
    q = 2.0
    key = math.log(3) / float(F.silu(torch.tensor(q, dtype=torch.float64)))
    found = deconstructed(column(5.0, q), column(0.0, key), column(1.0, 3.0), scale=1.0, form="running")
    assert found.flatten().tolist() == pytest.approx([1.0, 2.5])


@pytest.mark.parametrize("form", ["taylor", "running"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("n", [1, 70])
def test_equals_its_map(form, masked, n):
    """Values and gradients, with grouped heads and padding."""
    leaves = [torch.randn(2, h, n, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    mask = torch.rand(2, 1, 1, n, generator=torch.Generator().manual_seed(0)) < 0.7 if masked else None
    found = deconstructed(*leaves, form=form, mask=mask)
    weights = deconstructed.spec.weights(*leaves[:2], causal=True, mask=mask, scale=None, form=form)
    right = weights @ leaves[2].repeat_interleave(2, 1)
    torch.testing.assert_close(found, right)
    given = torch.randn_like(right)
    for ours, theirs in zip(torch.autograd.grad(found, leaves, given), torch.autograd.grad(right, leaves, given)):
        torch.testing.assert_close(ours, theirs)
    assert deconstructed.spec.cost(n, n, 8, form="running").operations == 32 * n


def given(variant):
    return {"text": torch.arange(5, 45)} if variant == "text" else {"length": 40} if variant == "random" else {}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_of_real_models(variant, family):
    """In every second layer: causal, through a cache where there can be one, trained in all parts, and put back."""
    model, inputs = build(family, "sdpa")
    ids = inputs["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
        undo = deconstruct(model, variant, layers="odd", **given(variant))
        whole = model(ids, use_cache=False).logits
        other = ids.clone()
        other[:, 8:] = 50
        torch.testing.assert_close(model(other, use_cache=False).logits[:, :8], whole[:, :8], atol=1e-3, rtol=1e-3)
    assert not torch.equal(whole, before)
    made = [m for m in model.modules() if isinstance(m, (SimplerAttention, NoMixing))]
    assert len(made) == 1
    assert made[0] is model.model.layers[0].self_attn
    if variant != "running":
        with torch.no_grad():
            part = model(ids[:, :5], use_cache=True)
            rest = model(ids[:, 5:], past_key_values=part.past_key_values)
        torch.testing.assert_close(torch.cat([part.logits, rest.logits], 1), whole, atol=1e-3, rtol=1e-3)
    there = torch.ones_like(ids)
    there[0, -3:] = 0
    with torch.no_grad():
        padded = model(ids, attention_mask=there, use_cache=False).logits
    torch.testing.assert_close(padded[there.bool()], whole[there.bool()], atol=1e-3, rtol=1e-3)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in made[0].parameters() if p.requires_grad)
    undo()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("variant", ["random", "text", "static"])
def test_what_maps_depend_on(variant):
    """Fixed ones not on the input, static ones on its tokens but not on the layers below; as recorded."""
    model, inputs = build("llama", "sdpa")
    deconstruct(model, variant, **given(variant))

    def maps(ids):
        with torch.no_grad(), regard.record(model, "entropy") as recording:
            model(ids)
        run = recording.tree if variant == "static" else recording[1]  # the fixed text is a run of its own, the first
        return torch.from_numpy(run["language_model"]["entropy"].values)

    one, other = maps(inputs["input_ids"][:1]), maps(inputs["input_ids"][1:])
    assert torch.equal(one, other) == (variant != "static")
    model.model.layers[0].mlp.down_proj.weight.data.mul_(3.0)
    again = maps(inputs["input_ids"][:1])
    assert torch.equal(again, one) == (variant == "static")


def test_without_mixing_tokens_stay_apart():
    model, inputs = build("llama", "sdpa")
    deconstruct(model, "no-mixing")
    ids = inputs["input_ids"]
    changed = ids.clone()
    changed[:, 3] = 50
    with torch.no_grad():
        same = (model(ids).logits == model(changed).logits).all(-1)
    assert same.tolist() == (ids == changed).tolist()
    weights = sum(p.numel() for p in model.model.layers[0].self_attn.parameters())
    assert weights == pytest.approx(32 * 32 * 2 + 32 * 16 * 2, rel=0.02)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_on_the_left(implementation):
    """Other formulas do not see it; fixed texts refuse it, as all refuse packed sequences."""
    model, inputs = build("llama", implementation)
    ids = inputs["input_ids"]
    padded, there = F.pad(ids, (3, 0), value=7), F.pad(torch.ones_like(ids), (3, 0))
    more = {"attention_mask": there, "position_ids": there.cumsum(-1).sub(1).clamp_min(0), "use_cache": False}
    for variant in ("taylor", "running", "static"):
        undo = deconstruct(model, variant)
        with torch.no_grad():
            found = model(padded, **more).logits[:, 3:]
            torch.testing.assert_close(found, model(ids, use_cache=False).logits, atol=1e-3, rtol=1e-3)
        undo()
    undo = deconstruct(model, "random", length=20)
    with pytest.raises(ValueError, match="no padding on the left"):
        model(padded, **more)
    with pytest.raises(ValueError, match="has 20 tokens, the sequence 24"):
        model(torch.cat([ids, ids], 1))
    undo()
    deconstruct(model, "taylor")
    packed = torch.cat([torch.arange(5), torch.arange(7)])[None].expand(2, -1)
    with pytest.raises(ValueError, match="which keys there are"):
        model(ids, position_ids=packed, use_cache=False)


def test_refusals():
    x = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="form is one of"):
        deconstructed(x, x, x, form="exp")
    with pytest.raises(ValueError, match="needs the query of every key"):
        deconstructed(x[:, :, 3:], x, x, form="running")
    model, _ = build("llama")
    with pytest.raises(ValueError, match="variant is one of"):
        deconstruct(model, "none")
    with pytest.raises(ValueError, match="text=ids"):
        deconstruct(model, "text")
    with pytest.raises(ValueError, match="layers is"):
        deconstruct(model, "taylor", layers=[2])
    with pytest.raises(ValueError, match="text is ids"):
        deconstruct(model, "text", text=torch.ones(3))
    with pytest.raises(ValueError, match="sliding_window"):
        deconstruct(build("mistral")[0], "taylor")
    deconstruct(model, "taylor", layers=[1])
    with pytest.raises(ValueError, match="deconstructed already"):
        deconstruct(model, "taylor")
