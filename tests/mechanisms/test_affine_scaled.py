"""Scaled and shifted weights: by hand, limits, running means, the dense map, real models, caches and refusals."""

from __future__ import annotations

import pytest
import torch
from families import build
from torch.nn import functional as F

import regard
from regard.mechanisms.affine_scaled import ACTIVATIONS, AffineScaled, affine_scaled, attend, cost, weights


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)[None, None, :, None]


def test_by_hand():
    """Scores 2 and 0, factor 0.8, mean 0.5, two keys: weights 0.5546 and -0.0546, which sum to the mean."""
    alpha, mean = torch.full((1, 1, 1), 0.8, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)
    found = weights(column(1.0), column(2.0, 0.0), alpha, mean, scale=1.0).flatten()
    assert found.tolist() == pytest.approx([0.5546, -0.0546], abs=1e-4)
    output = attend(column(1.0), column(2.0, 0.0), column(10.0, 20.0), alpha, mean, scale=1.0)
    assert output.item() == pytest.approx(float(found @ torch.tensor([10.0, 20.0], dtype=torch.float64)))


def test_the_factor():
    x = torch.tensor([-9.0, -5.0, 0.0, 5.0, 9.0, 2.0], requires_grad=True)
    found = ACTIVATIONS["clip"](x)
    assert found.tolist() == pytest.approx([0, 0, 0.5, 1, 1, 0.7])
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert grad[[0, 2, 4]].tolist() == pytest.approx([0, 0.1, 0])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("count", ["keys", "visible", 50])
@pytest.mark.parametrize("mask", [None, "keys", "pairs", "heads"])
@pytest.mark.parametrize("n_query", [9, 4])
def test_equals_the_dense_map(causal, count, mask, n_query):
    """Values and gradients of all that it is given, with grouped heads."""
    shapes = (2, 4, n_query, 3), (2, 2, 9, 3), (2, 2, 9, 5), (2, 4, n_query), (4,)
    leaves = [torch.rand(s, dtype=torch.float64).requires_grad_() for s in shapes]
    seen = None
    if mask is not None:
        shape = {"keys": (2, 1, 1, 9), "pairs": (2, 1, n_query, 9), "heads": (2, 4, n_query, 9)}[mask]
        seen = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.7
        seen[..., 0] = True
    knobs = {"causal": causal, "count": count, "mask": seen}
    found = attend(*leaves, **knobs)
    map_ = weights(leaves[0], leaves[1], *leaves[3:], **knobs)
    right = map_ @ leaves[2].repeat_interleave(2, 1)
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)
    given = torch.randn_like(right)
    for ours, theirs in zip(torch.autograd.grad(found, leaves, given), torch.autograd.grad(right, leaves, given)):
        torch.testing.assert_close(ours, theirs)
    if count == "visible":
        torch.testing.assert_close(map_.sum(-1), leaves[4][:, None].expand(2, 4, n_query))


def test_padding_is_no_key():
    """Of N too: weights and outputs of the text alone, whatever stands beside it."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 5, 3), torch.randn(1, 2, 5, 3), torch.randn(1, 2, 5, 4)
    alpha, mean = torch.rand(1, 2, 5), torch.rand(2)
    right = attend(query, key, value, alpha, mean)
    more = [F.pad(t, (0, 0, 2, 1), value=float("nan")) for t in (key, value)]
    there = F.pad(torch.ones(1, 1, 1, 5, dtype=torch.bool), (2, 1))
    causal = there & torch.ones(8, 8, dtype=torch.bool).tril()[2:7]
    torch.testing.assert_close(attend(query, *more, alpha, mean, causal=False, mask=causal), right)


def test_limits():
    """Factor and mean 1: attention itself. Factor 0: the mean of what is seen, by its share of the keys."""
    query, key, value = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    one, mean = torch.ones(1, 2, 6, dtype=torch.float64), torch.tensor([0.3, 0.6], dtype=torch.float64)
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(attend(query, key, value, one, torch.ones_like(mean)), plain)
    found = attend(query, key, value, 0 * one, mean)
    torch.testing.assert_close(found, value.cumsum(2) / 6 * mean[:, None, None])


def test_the_running_mean():
    """A tenth of the batch's mean after one step, and left alone in evaluation."""
    model, inputs = build("llama")
    affine_scaled(model)
    scaled = [m for m in model.modules() if isinstance(m, AffineScaled)]
    model(**inputs)
    assert not scaled[0].mean.any()
    model.train()(**inputs)
    torch.testing.assert_close(scaled[0].mean, 0.1 * scaled[0].alpha.mean((0, 2)).detach())
    assert "model.layers.0.self_attn.mean" in model.state_dict()


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "vit"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_of_real_models(family, implementation):
    """Equal to the dense map put in by hand; trains; its softmax part is recorded; put back."""
    model, inputs = build(family, implementation)
    with torch.no_grad():
        before = model(**inputs).logits
    undo = affine_scaled(model)
    scaled = [m for m in model.modules() if isinstance(m, AffineScaled)]
    for module in scaled:
        module.mean.fill_(0.4)
    with torch.no_grad(), regard.record(model, "entropy") as recording:
        found = model(**inputs).logits
    assert not torch.allclose(found, before, atol=1e-3)
    assert sum(node["entropy"].sizes["layer"] for node in recording.tree.children.values()) == 2
    model(**inputs).logits.square().mean().backward()
    assert all(m.factor.weight.grad.isfinite().all() and m.factor.weight.grad.any() for m in scaled)
    # factors of 1, whose mean is 1, change nothing
    for module in scaled:
        module.mean.fill_(1.0)
        module.activation = "one"
    ACTIVATIONS["one"] = torch.ones_like
    try:
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, before, atol=1e-4, rtol=1e-4)
    finally:
        del ACTIVATIONS["one"]
    undo()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generates_through_a_cache(implementation):
    """With a fixed count, token by token as in one pass; not with the keys of the call. Padding is no key."""
    model, inputs = build("llama", implementation)
    ids = inputs["input_ids"]
    for count, same in ((12, True), ("visible", True), ("keys", False)):
        undo = affine_scaled(model, count=count)
        for module in model.modules():
            if isinstance(module, AffineScaled):
                module.mean.fill_(0.9)
        with torch.no_grad():
            whole = model(ids).logits
            part = model(ids[:, :5], use_cache=True)
            rest = model(ids[:, 5:], past_key_values=part.past_key_values).logits
            padded, there = F.pad(ids, (3, 0), value=7), F.pad(torch.ones_like(ids), (3, 0))
            positions = there.cumsum(-1).sub(1).clamp_min(0)
            behind = model(padded, attention_mask=there, position_ids=positions).logits[:, 3:]
        joined = torch.cat([part.logits, rest], 1)
        assert torch.allclose(joined, whole, atol=1e-3, rtol=1e-3) == same
        assert torch.allclose(behind, whole, atol=1e-3, rtol=1e-3)
        undo()


def test_cost():
    assert cost(100, 100, 8, channels=16).operations == 4 * 8 * 5050 + 2 * 16 * 100 + 4 * 8 * 100


def test_refusals():
    x = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="alpha is"):
        attend(x, x, x, torch.ones(1, 5, 2), torch.ones(2))
    with pytest.raises(ValueError, match="count is"):
        attend(x, x, x, torch.ones(1, 2, 5), torch.ones(2), count=0)
    model, _ = build("llama")
    with pytest.raises(ValueError, match="activation is one of"):
        affine_scaled(model, activation="tanh")
    with pytest.raises(ValueError, match="no linear layer called"):
        affine_scaled(build("gpt2")[0])
    affine_scaled(model)
    with pytest.raises(ValueError, match="scaled already"):
        affine_scaled(model)
    model, inputs = build("mistral")  # its cache holds a window
    affine_scaled(model)
    part = model(**inputs, use_cache=True)
    with pytest.raises(ValueError, match="no sliding window"):
        model(inputs["input_ids"][:, -1:], past_key_values=part.past_key_values)
