"""Combiner: values of the authors' code by hand, all three forms beside their regions, reach."""

from __future__ import annotations

import pytest
import torch

from regard.mechanisms.combiner import FORMS, combiner


def tensors(n, heads=4, kv_heads=2):
    generator = torch.Generator().manual_seed(n)
    shapes = (2, heads, n, 4), (2, kv_heads, n, 4), (2, kv_heads, n, 4)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize(
    ("form", "right"),
    [
        ("fixed", [1.0, 1.5, 2.75, 4.5]),
        ("logsparse", [1.0, 1.5, 2.75, 4.5]),
        ("mixture", [1.0, 1.5, 2.25, 3.2]),
    ],
)
def test_scores_of_zero(form, right):
    """Each near key and each region weighs as much: 4 of 1, 2, 4, 8 sees 8, 4 and the mean of 1 and 2."""
    zero, value = torch.zeros(1, 1, 4, 2), torch.tensor([1.0, 2.0, 4.0, 8.0])[None, None, :, None]
    torch.testing.assert_close(combiner(zero, zero, value, form=form, segment=2).flatten(), torch.tensor(right))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "segment"), [(17, 4), (16, None), (13, 20), (9, 1)])
def test_every_form_is_what_its_regions_say(form, n, segment):
    """Also of 2^k + 1 tokens, of segments that are not full, and where keys are masked."""
    query, key, value = leaves = tensors(n)
    there = torch.rand(2, 1, 1, n, generator=torch.Generator().manual_seed(1)) < 0.6
    for mask in (None, there):
        how = {"causal": True, "mask": mask, "scale": 0.7, "form": form, "segment": segment}
        found = combiner(query, key, value, **how)
        right = combiner.spec.weights(query, key, **how) @ value.repeat_interleave(2, 1)
        torch.testing.assert_close(found, right)
        given = torch.randn_like(right)
        for ours, theirs in zip(torch.autograd.grad(found, leaves, given), torch.autograd.grad(right, leaves, given)):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_all_that_came_before_counts_and_no_more(form):
    query, key, _ = tensors(19)
    weights = combiner(query, key, torch.eye(19, dtype=torch.float64).expand(2, 2, -1, -1), form=form)
    assert torch.equal(weights > 0, torch.ones(19, 19, dtype=torch.bool).tril().expand_as(weights))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_one_segment_is_full_attention():
    query, key, value = tensors(12)
    right = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(combiner(query, key, value, segment=12), right)


def test_refusals():
    x = torch.randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match="form is one of"):
        combiner(x, x, x, form="axial")
    with pytest.raises(ValueError, match="causal only"):
        combiner(x, x, x, causal=False, form="mixture")
    with pytest.raises(ValueError, match="1 key or more"):
        combiner(x, x, x, segment=0)
