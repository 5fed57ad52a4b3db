"""Predicted connections: choices by hand, masked attention beside the map, a guess that learns, a model and back."""

from __future__ import annotations

import pytest
import torch
from families import build
from torch.nn import functional as F

from regard.mechanisms.sparsifiner import (
    Connectivity,
    Sparsifiner,
    connectivity_loss,
    convert,
    distil,
    sparsifiner,
)


def test_connections_by_hand():
    """One row of connections (0.2, -0.5, 0.1), which counts 1: only magnitudes choose, while learning signs stay."""
    guess = Connectivity(4, 1, 3, keep=1 / 3, tokens_per_basis=3)
    guess.back.data = torch.tensor([[0.2], [-0.5], [0.1]])
    x = torch.randn(2, 1, 3, 4)
    score = guess(x, x)
    torch.testing.assert_close(score, torch.tensor([0.2, 0.5, 0.1]).expand(2, 1, 2, 3))
    assert guess.choose(score)[0, 0].long().tolist() == [[1, 1, 1], [0, 1, 0], [0, 1, 0]]
    torch.testing.assert_close(guess(x, x, raw=True), torch.tensor([0.2, -0.5, 0.1]).expand(2, 1, 2, 3))
    guess.threshold = 0.2
    torch.testing.assert_close(guess(x, x)[0, 0, 0], torch.tensor([0.0, 0.5, 0.0]))
    guess.above = 0.15
    assert guess.choose(torch.tensor([[[[0.2, 0.15, 0.1]]]]))[0, 0].long().tolist() == [[1, 1, 1], [1, 0, 0]]
    away = torch.tensor([True, False, True])[None, None, None]
    guess.above = None
    assert guess.choose(score, mask=away)[0, 0].long().tolist() == [[1, 0, 1], [1, 0, 0], [1, 0, 0]]


def test_coefficients_by_hand():
    """Scaled by the number of heads, not their width; only the largest count, without being made to sum to 1."""
    guess = Connectivity(2, 4, 8, tokens_per_basis=2, channels_per=1, top=2)
    query, key = torch.randn(1, 4, 8, 2), torch.randn(1, 2, 8, 2)
    keys = guess.key(key).repeat_interleave(2, 1).mT @ guess.mix
    right = (guess.query(query)[:, :, 1:] @ keys / 2).softmax(-1)
    torch.testing.assert_close(guess.coefficients(query, key, raw=True), right)
    found = guess.coefficients(query, key)
    assert ((found > 0).sum(-1) == 2).all()
    torch.testing.assert_close(found[found > 0], right[right >= right.topk(2).values[..., -1:]])
    guess.top, guess.least = None, 0.25
    torch.testing.assert_close(guess.coefficients(query, key), right * (right > 0.25))


def test_every_row_keeps_its_share_and_alike_queries_keep_the_same():
    query, key = torch.randn(2, 3, 2, 17, 8)
    query[:, :, 5] = query[:, :, 9]
    guess = Connectivity(8, 2, 17, keep=0.25, tokens_per_basis=4)
    seen = guess.choose(guess(query, key))
    assert seen[:, :, 0].all()
    assert (seen[:, :, 1:].sum(-1) == 5).all()
    assert torch.equal(seen[:, :, 5], seen[:, :, 9])
    bare = Connectivity(8, 2, 17, keep=0.25, tokens_per_basis=4, cls=False)
    assert (bare.choose(bare(query, key)).sum(-1) == 5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_masked_map(dtype):
    """Values and gradients, with grouped heads and rows without a pair; what is not connected changes nothing."""
    leaves = [torch.randn(2, h, 20, 8, dtype=dtype).requires_grad_() for h in (4, 2, 2)]
    seen = torch.rand(2, 4, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.3
    seen[:, :, 3] = False
    seen[..., 7] = False
    there = torch.rand(2, 1, 1, 20, generator=torch.Generator().manual_seed(1)) < 0.8
    for mask in (None, there):
        how = {"causal": False, "mask": mask, "scale": None, "seen": seen}
        found = sparsifiner(*leaves, **how)
        right = sparsifiner.spec.weights(*leaves[:2], **how) @ leaves[2].repeat_interleave(2, 1)
        near = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {}
        torch.testing.assert_close(found, right, **near)
        assert not found[:, :, 3].any()
        given = torch.randn_like(right)
        for ours, theirs in zip(torch.autograd.grad(found, leaves, given), torch.autograd.grad(right, leaves, given)):
            torch.testing.assert_close(ours, theirs, **near)
    moved = leaves[2].detach().clone()
    moved[:, :, 7] += 9
    torch.testing.assert_close(sparsifiner(*leaves[:2], moved, seen=seen), sparsifiner(*leaves, seen=seen))


def test_only_its_own_loss_trains_the_guess():
    torch.manual_seed(0)
    leaves = [torch.randn(2, 2, 9, 8).requires_grad_() for _ in range(3)]
    module = Sparsifiner(8, 2, 9, tokens_per_basis=3)
    found = module(*leaves)
    guess = list(module.guess.parameters())
    assert torch.autograd.grad(found.sum(), guess, allow_unused=True, retain_graph=True) == (None,) * len(guess)
    assert all(g.any() for g in torch.autograd.grad(module.loss, guess))
    module.learning = True
    torch.testing.assert_close(module(*leaves), F.scaled_dot_product_attention(*leaves))
    weights = sparsifiner.spec.weights(*leaves[:2], causal=False, mask=None, scale=None)
    score = module.guess(*leaves[:2], raw=True)
    torch.testing.assert_close(module.loss, (score - weights[:, :, 1:]).square().sum())
    torch.testing.assert_close(connectivity_loss(weights, weights), torch.zeros(()))
    module.eval().learning = False
    module.guess.keep = 1.0
    torch.testing.assert_close(module(*leaves), F.scaled_dot_product_attention(*leaves))
    assert module.loss is None


def test_cost_by_hand():
    """Of 16 rows and 17 keys, 8 wide to 4, 17 tokens to 4; 3 coefficients count."""
    guess = Connectivity(8, 2, 17, tokens_per_basis=4, top=3)
    assert guess.cost == 2 * (33 * 8 * 4 + 33 * 4 * 4 + 16 * 3 * 17)
    seen = torch.arange(17 * 17).view(17, 17) < 60
    assert sparsifiner.spec.cost(17, 17, 8, seen=seen).operations == 4 * 8 * 60


def test_a_converted_model_learns_its_own_map():
    torch.manual_seed(0)
    model, inputs = build("vit")
    model.eval()
    with torch.no_grad():
        before = model(**inputs).logits
    undo = convert(model, tokens=17, keep=0.25, tokens_per_basis=4)
    state = {name: p.clone() for name, p in model.named_parameters()}
    losses = distil(model, [inputs] * 30)
    assert losses[-1] < 0.8 * losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, state[name])}
    assert moved == {name for name in state if "mechanism.guess" in name}
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, before, atol=1e-4)
        modules = [m for m in model.modules() if isinstance(m, Sparsifiner)]
        assert all((m.seen[:, :, 1:].sum(-1) == 5).all() for m in modules)
        for module in modules:
            module.guess.keep = 1.0
        torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=1e-4)
    undo()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_refusals():
    x = torch.randn(1, 2, 9, 4)
    with pytest.raises(ValueError, match="not defined for causal"):
        sparsifiner(x, x, x, causal=True)
    with pytest.raises(ValueError, match=r"broadcasts to \[batch, head, query, key\] = \[1, 2, 9, 9\]"):
        sparsifiner(x, x, x, seen=torch.ones(9, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="made for 8 tokens"):
        Connectivity(4, 2, 8)(x, x)
    with pytest.raises(ValueError, match="keep is above 0"):
        Connectivity(4, 2, 9, keep=0.0)
    with pytest.raises(ValueError, match="narrowed to 1 or more"):
        Connectivity(4, 2, 7)
    with pytest.raises(ValueError, match="1 to 2 coefficients"):
        Connectivity(4, 2, 9, tokens_per_basis=4, top=3)
    with pytest.raises(ValueError, match="no guesses"):
        distil(torch.nn.Linear(1, 1), [])
