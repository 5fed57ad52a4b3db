"""Dynamic masks: worked values, what is dropped stays dropped, gradients of the bias, a model converted and back."""

from __future__ import annotations

import math

import pytest
import torch
from families import build
from torch.nn import functional as F

from regard.mechanisms.dynamic_mask import DynamicMask, convert, dynamic_mask, kept


def test_two_keys_by_hand():
    """Scores 1 and 0, biases 2 and 1: softmax of 3 and 1."""
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 0.0])[None, None, :, None]
    found = dynamic_mask(query, key, key, scale=1.0, bias=torch.tensor([[[2.0, 1.0]]]))
    assert found.item() == pytest.approx(1 / (1 + math.exp(-2)))


def test_bias_by_hand():
    """softplus(0) is log 2: exp of that 2, of its negative a half; without exp, log 2."""
    value = torch.zeros(1, 2, 3, 4)
    module = DynamicMask(4, 2)
    module.A.data = torch.tensor([1.0, -1.0])
    torch.testing.assert_close(module.bias(value)[0, :, 0], torch.tensor([2.0, 0.5]))
    module.form = "linear"
    torch.testing.assert_close(module.bias(value)[0, :, 0], torch.tensor([math.log(2), -math.log(2)]))


def test_one_key_is_the_largest_so_far():
    value = torch.randn(1, 1, 200, 3)
    bias = torch.randn(1, 1, 200)
    found = dynamic_mask(value, value, value, bias=bias, window=1)
    best = [int(bias[0, 0, : i + 1].argmax()) for i in range(200)]
    torch.testing.assert_close(found[0, 0], value[0, 0, best])


def test_without_a_bias_it_is_a_window():
    x = torch.randn(1, 2, 150, 4, dtype=torch.float64)
    at = torch.arange(150)
    seen = (at[:, None] >= at) & (at[:, None] - at < 20)
    torch.testing.assert_close(dynamic_mask(x, x, x, window=20), F.scaled_dot_product_attention(x, x, x, seen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_of_queries_keep_what_each_row_keeps(dtype):
    """Over several blocks, with a bias, gaps and grouped heads, forward and backward; dropped stays dropped."""
    leaves = [torch.randn(2, h, 200, 8, dtype=dtype).requires_grad_() for h in (4, 2, 2)]
    bias = torch.randn(2, 2, 200, dtype=dtype).requires_grad_()
    there = torch.rand(2, 1, 1, 200) < 0.8
    how = {"causal": True, "mask": there, "scale": None, "bias": bias, "window": 30}
    found = dynamic_mask(*leaves, **how)
    right = dynamic_mask.spec.weights(*leaves[:2], **how) @ leaves[2].repeat_interleave(2, 1)
    near = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(found, right, **near)
    given = torch.randn_like(right)
    ours, theirs = (torch.autograd.grad(o, [*leaves, bias], given) for o in (found, right))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, **(near and {"atol": 1e-4, "rtol": 1e-3}))
    seen = kept(bias.detach(), 200, causal=True, mask=there, window=30)
    assert (seen.sum(-1) == there.cumsum(-1)[:, :, 0].clamp_max(30)).all()
    gone = ~seen & torch.ones(200, 200, dtype=torch.bool).tril()
    assert (gone.long().diff(dim=2) >= 0).all()
    never = ~seen.any(2)
    assert not ours[-1][never].any()
    assert ours[-1][seen.sum(2) > 50].all()


def test_a_converted_model():
    """A window as long as the text leaves it as it was; a short one trains its choice; undone, nothing is left."""
    model, inputs = build("llama")
    model.eval()
    with torch.no_grad():
        before = model(**inputs).logits
    names = [name for name, _ in model.named_modules()]
    undo = convert(model, window=64, std=0.0)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="already"):
        convert(model)
    undo()
    undo = convert(model, window=4)
    logits = model(**inputs).logits
    assert not torch.allclose(logits, before, atol=1e-4)
    logits.square().mean().backward()
    learned = [p for name, p in model.named_parameters() if "mechanism" in name]
    assert len(learned) == 4
    assert all(p.grad.any() for p in learned)
    with torch.no_grad():  # through a cache
        part = model(inputs["input_ids"][:, :7], use_cache=True)
        rest = model(inputs["input_ids"][:, 7:], past_key_values=part.past_key_values)
        torch.testing.assert_close(rest.logits, logits[:, 7:], atol=1e-5, rtol=1e-4)
    undo()
    assert [name for name, _ in model.named_modules()] == names
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_refusals():
    x = torch.randn(1, 2, 4, 2)
    with pytest.raises(ValueError, match="1 key or more"):
        dynamic_mask(x, x, x, window=0)
    with pytest.raises(ValueError, match="a number for each key"):
        dynamic_mask(x, x, x, bias=torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="form is one of"):
        DynamicMask(2, 2, form="log")
    with pytest.raises(ValueError, match="no model of transformers"):
        convert(torch.nn.Linear(2, 2))
