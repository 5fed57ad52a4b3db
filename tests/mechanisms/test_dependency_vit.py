"""Reversed attention: by hand, what is sent in all, strips, trees, pruning, conversion and back."""

from __future__ import annotations

import pytest
import torch
from families import build

import regard
from regard.mechanisms import dependency_vit as module
from regard.mechanisms.dependency_vit import (
    ReversedAttention,
    convert,
    dependency_vit,
    prune,
    received,
    root,
    tree,
    turns,
)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_by_hand():
    """Two tokens that look everywhere alike, messages of one half: each is sent a quarter of both values."""
    zero, value = torch.zeros(1, 1, 2, 1), torch.tensor([4.0, 8.0])[None, None, :, None]
    assert dependency_vit(zero, zero, value).flatten().tolist() == [6.0, 6.0]
    half = torch.full((1, 2), 0.5)
    assert dependency_vit(zero, zero, value, message=half).flatten().tolist() == [3.0, 3.0]
    chosen = torch.tensor([[[1.0], [0.0]]])  # the first sends, the second does not
    assert dependency_vit(zero, zero, value, head_weight=chosen).flatten().tolist() == [2.0, 2.0]


@pytest.mark.parametrize("strip", [1, 100, 10**6])
@pytest.mark.parametrize("masked", [False, True])
def test_strips_change_nothing(monkeypatch, strip, masked):
    """Values and gradients of all that it is given, against the dense map."""
    monkeypatch.setattr(module, "STRIP", strip)
    parts = double(2, 4, 9, 3), double(2, 2, 9, 3), double(2, 2, 9, 5), double(2, 9, 4), double(2, 9)
    leaves = [t.requires_grad_() for t in parts]
    mask = torch.rand(2, 1, 1, 9, generator=torch.Generator().manual_seed(0)) < 0.7 if masked else None
    knobs = {"mask": mask, "scale": 0.4, "head_weight": leaves[3], "message": leaves[4]}
    found = dependency_vit(*leaves[:3], **knobs)
    weights = dependency_vit.spec.weights(*leaves[:2], causal=False, **knobs)
    right = weights @ leaves[2].repeat_interleave(2, 1)
    torch.testing.assert_close(found, right)
    given = torch.randn_like(right)
    for ours, theirs in zip(torch.autograd.grad(found, leaves, given), torch.autograd.grad(right, leaves, given)):
        torch.testing.assert_close(ours, theirs)
    there = torch.ones(2, 9) if mask is None else mask[:, 0, 0].double()
    torch.testing.assert_close(weights.sum(2), (leaves[3] * (leaves[4] * there)[..., None]).mT, check_dtype=False)


def test_messages_only_fall_and_all_is_sent_once():
    """Over heads and parents, what a child sends sums to its message; a token that is not there takes no part."""
    first, second = (ReversedAttention(8, 2).double() for _ in range(2))
    hidden = double(2, 7, 8)
    output, message, dependency = first(hidden)
    torch.testing.assert_close(dependency.sum(1), message)
    _, later, _ = second(output, message)
    assert (later < message).all()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 5:] = False
    with_junk = torch.where(mask[..., None], hidden, 1e3)
    for x in (hidden, with_junk):
        found, _, sent = first(x, mask=mask)
        torch.testing.assert_close(found[:, :5], first(hidden[:, :5])[0])
        assert not sent[:, 5:].any()
        assert not sent[:, :, 5:].any()
    given = hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: first(x)[:2], given)


def test_a_planted_tree():
    """Tokens 1 and 2 send to 0, 3 sends to 1; what a token keeps for itself does not count."""
    sent = torch.zeros(1, 4, 4)
    sent[0, 0, 1], sent[0, 0, 2], sent[0, 1, 3], sent[0, 2, 0] = 0.6, 0.7, 0.8, 0.1
    sent[0].fill_diagonal_(0.9)
    assert tree(sent).tolist() == [[2, 0, 0, 1]]
    assert root(sent).tolist() == [0]
    assert received(sent)[0].tolist() == pytest.approx([2.2, 1.7, 1.0, 0.9])


def test_pruning_keeps_order():
    hidden = torch.arange(8.0).view(1, 4, 2)
    kept, at = prune(hidden, torch.tensor([[0.5, 0.1, 0.9, 0.7]]), 3)
    assert at.tolist() == [[0, 2, 3]]
    assert torch.equal(kept, hidden[:, [0, 2, 3]])
    for wrong in (0, 5):
        with pytest.raises(ValueError, match="keeps 1 to 4 tokens"):
            prune(hidden, torch.ones(1, 4), wrong)


def test_a_converted_model():
    """Messages go from layer to layer; it trains, no recording takes it, since rows do not sum to 1, and is undone."""
    model, inputs = build("vit")
    output = model(**inputs).logits.detach()
    undo = convert(model)
    layers = turns(model)
    model(**inputs).logits.square().mean().backward()
    assert len(layers) == 2
    assert (layers[1].message < layers[0].message).all()
    assert layers[0].dependency.shape == (2, 17, 17)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layers[0].attention.parameters())
    with pytest.raises(regard.UnreachableAttention), regard.record(model, "entropy"):
        model(**inputs)
    undo()
    assert torch.equal(model(**inputs).logits, output)


def test_refusals():
    x = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"head_weight is \[1, 5, 2\]"):
        dependency_vit(x, x, x, head_weight=torch.ones(1, 2, 5))
    with pytest.raises(ValueError, match=r"message is \[1, 5\]"):
        dependency_vit(x, x, x, message=torch.ones(5))
    with pytest.raises(ValueError, match="not defined for causal"):
        dependency_vit(x, x, x, causal=True)
    with pytest.raises(ValueError, match="evenly"):
        ReversedAttention(6, 4)
    model, inputs = build("llama")
    with pytest.raises(ValueError, match="is causal"):
        convert(model)
