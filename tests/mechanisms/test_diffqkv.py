"""Keys and values apart: groups by hand, selective values, the layer, conversion of trained decoders."""

from __future__ import annotations

import pytest
import torch
from families import build
from torch import nn
from torch.nn import functional as F

import regard
from regard.mechanisms.diffqkv import DiffAttention, DiffQKV, convert, diffqkv


def parts(heads, n_query=9, n_key=9, dim=4, dim_v=6):
    counts = (heads[0], n_query, dim), (heads[1], n_key, dim), (heads[2], n_key, dim_v)
    return [torch.randn(2, *c, dtype=torch.float64, requires_grad=True) for c in counts]


def test_groups_by_hand():
    """Of 8 query heads, 2 key heads and 4 value heads: head 5 reads key head 1 and value head 2."""
    query = torch.ones(1, 8, 1, 1)
    key = torch.tensor([[0.0, 0.0], [0.0, 30.0]])[None, :, :, None]  # key head 1 looks at the second key only
    value = torch.tensor([[10.0 * h, 10.0 * h + 1] for h in range(4)])[None, :, :, None]
    found = diffqkv(query, key, value, scale=1.0).flatten().tolist()
    assert found == pytest.approx([0.5, 0.5, 10.5, 10.5, 21, 21, 31, 31], abs=1e-5)


@pytest.mark.parametrize("heads", [(8, 2, 4), (8, 4, 2), (6, 2, 3), (4, 1, 4), (4, 4, 1), (4, 2, 2)])
@pytest.mark.parametrize(("n_query", "n_key"), [(3, 9), (20, 23)])
def test_equals_attention_of_copied_heads(heads, n_query, n_key):
    """PyTorch's, with keys and values copied for each query head; with gradients, by both ways of computing."""
    leaves = parts(heads, n_query, n_key)
    seen = torch.ones(n_query, n_key, dtype=torch.bool).tril(n_key - n_query)
    copies = [t.repeat_interleave(heads[0] // t.shape[1], 1) for t in leaves]
    right, found = F.scaled_dot_product_attention(*copies, seen), diffqkv(*leaves)
    torch.testing.assert_close(found, right)
    given = torch.randn_like(right)
    for ours, theirs in zip(torch.autograd.grad(found, leaves, given), torch.autograd.grad(right, leaves, given)):
        torch.testing.assert_close(ours, theirs)


def test_selective_values():
    """The two largest of weights 0.1, 0.2, 0.3, 0.4 are summed as they are; all of them are exact."""
    key = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()[None, None, :, None]
    one = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    value = torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64)[None, :, :, None]
    assert diffqkv(one, key, value, scale=1.0, top_values=2).flatten().tolist() == pytest.approx([4.4, 4.4])
    leaves = parts((4, 2, 1), 20, 23)
    torch.testing.assert_close(diffqkv(*leaves, top_values=23), diffqkv(*leaves))
    weights = diffqkv.spec.weights(*leaves[:2], causal=True, mask=None, scale=None, top_values=3)
    assert int((weights > 0).sum(-1).max()) == 3
    torch.testing.assert_close(diffqkv(*leaves, top_values=3), weights @ leaves[2].repeat_interleave(4, 1))


def test_the_layer():
    """Causal, with a query that goes through its own width and keys that are narrow; counts what a cache holds."""
    layer = DiffQKV(32, 8, key_heads=2, value_heads=4, key_dim=2, augmented=48, activation=nn.SiLU).double()
    hidden = torch.randn(2, 20, 32, dtype=torch.float64)
    output = layer(hidden)
    assert layer.cached() == 2 * 2 + 4 * 4
    hidden = hidden.index_fill(1, torch.arange(12, 20), 0.0)
    torch.testing.assert_close(layer(hidden)[:, :12], output[:, :12])
    output.square().mean().backward()
    assert all(p.grad.any() for p in layer.parameters())
    key = layer.widen(layer.k_proj(hidden).unflatten(-1, (2, 2)).transpose(1, 2))
    query = layer.q_proj(hidden).unflatten(-1, (8, 4)).transpose(1, 2)
    value = layer.v_proj(hidden).unflatten(-1, (4, 4)).transpose(1, 2)
    weights = diffqkv.spec.weights(query, key, causal=True, mask=None, scale=None)
    right = layer.o_proj((weights @ value.repeat_interleave(2, 1)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(hidden), right)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("knobs", [{"key_heads": 1}, {"value_heads": 1}, {"key_heads": 1, "key_dim": 4}])
def test_of_real_models(family, implementation, knobs):
    """Decodes through its cache as in one pass, also after padding; trains; is recorded; is put back."""
    model, inputs = build(family, implementation)
    ids = inputs["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
        undo = convert(model, **knobs)
        whole = model(ids).logits
        part = model(ids[:, :5], use_cache=True)
        step = model(ids[:, 5:6], past_key_values=part.past_key_values, use_cache=True)
        rest = model(ids[:, 6:], past_key_values=step.past_key_values, use_cache=True)
    assert not torch.allclose(whole, before, atol=1e-3)
    close = {"atol": 1e-3, "rtol": 1e-3}  # their weights are large
    torch.testing.assert_close(torch.cat([part.logits, step.logits, rest.logits], 1), whole, **close)
    layer = rest.past_key_values.layers[0]
    assert layer.keys.shape[1::2] == (knobs.get("key_heads", 2), knobs.get("key_dim", 8))
    assert layer.values.shape[1] == knobs.get("value_heads", 2)
    padded, there = F.pad(ids, (3, 0), value=7), F.pad(torch.ones_like(ids), (3, 0))
    with torch.no_grad(), regard.record(model, "entropy") as recording:
        positions = there.cumsum(-1).sub(1).clamp_min(0)
        part = model(padded[:, :9], attention_mask=there[:, :9], position_ids=positions[:, :9], use_cache=True)
        cache = part.past_key_values
        rest = model(padded[:, 9:], attention_mask=there, position_ids=positions[:, 9:], past_key_values=cache)
    torch.testing.assert_close(torch.cat([part.logits, rest.logits], 1)[:, 3:], whole, **close)
    (node,) = recording.tree.children.values()
    assert node["entropy"].sizes["head"] == 4
    model(ids, labels=ids).loss.backward()
    made = [m for m in model.modules() if isinstance(m, DiffAttention)]
    assert all(p.grad.isfinite().all() for m in made for p in m.parameters())
    undo()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_what_agrees_is_kept():
    """Key heads that are alike, and keys of few directions, are converted without loss."""
    model, inputs = build("llama")
    for layer in model.model.layers:
        weight = layer.self_attn.k_proj.weight.data.unflatten(0, (2, 8))
        weight[1] = weight[0] = torch.randn(8, 3) @ torch.randn(3, 32)
    with torch.no_grad():
        before = model(**inputs).logits
        convert(model, key_heads=1, key_dim=4)
        torch.testing.assert_close(model(**inputs).logits, before, atol=1e-3, rtol=1e-3)


def test_cost():
    assert diffqkv.spec.cost(1, 1000, 64).operations == 4 * 64 * 1000
    assert diffqkv.spec.cost(1, 1000, 64, top_values=100).operations == 2 * 64 * 1100


def test_refusals():
    query, key, value = (t.detach() for t in parts((4, 2, 4)))
    with pytest.raises(ValueError, match="3 value heads evenly"):
        diffqkv(query, key, value[:, :3])
    with pytest.raises(ValueError, match="belong together"):
        diffqkv(query, key, value[:, :, 1:])
    with pytest.raises(ValueError, match="1 value or more"):
        diffqkv(query, key, value, top_values=0)
    with pytest.raises(ValueError, match="have to divide 8 query heads"):
        DiffQKV(32, 8, key_heads=3, value_heads=2)
    for family, what in (("gpt2", "not a decoder like"), ("mistral", "sliding_window"), ("bert", "not a decoder")):
        with pytest.raises(ValueError, match=what):
            convert(build(family)[0])
    model, _ = build("llama")
    with pytest.raises(ValueError, match="3 key heads do not divide"):
        convert(model, key_heads=3)
    with pytest.raises(ValueError, match="key_dim is 1 to 8"):
        convert(model, key_dim=9)
    convert(model, key_heads=1)
    with pytest.raises(ValueError, match="converted already"):
        convert(model, key_heads=1)
