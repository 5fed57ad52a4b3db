"""Mixtures of heads: gates by hand, what a router picks, balance, conversion and back."""

from __future__ import annotations

import math

import pytest
import torch
from families import build
from torch import nn

import regard
from regard.mechanisms.moh import MixtureOfHeads, balance, cost, moh


class TinyAttention(nn.Module):
    """Passes its input on, as four heads of one channel."""

    head_dim = 1

    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.q_proj.weight)
        nn.init.eye_(self.o_proj.weight)

    def forward(self, hidden_states):
        return self.o_proj(self.q_proj(hidden_states))


def test_norms_by_hand():
    """One shared head; of norms 2, 3 and 1/2 the second is picked, at another token the last."""
    model = nn.Sequential(TinyAttention())
    undo = moh(model, active=0.5, shared=0.25)
    hidden = torch.tensor([[[1.0, 2.0, -3.0, 0.5], [1.0, 0.0, 1.0, 4.0]]])
    assert torch.equal(model(hidden), torch.tensor([[[1.0, 0.0, -3.0, 0.0], [1.0, 0.0, 0.0, 4.0]]]))
    assert torch.equal(model[0].load, torch.tensor([0.0, 0.5, 0.5]))
    norms = hidden[0, :, 1:].abs()
    scores = (norms / norms.std(-1, keepdim=True)).softmax(-1).mean(0)
    torch.testing.assert_close(balance(model), 3 * (scores[1] + scores[2]) / 2)
    undo()
    assert torch.equal(model(hidden), hidden)


def test_learned_by_hand():
    """Scores 1/6, 3/6, 2/6, of which two are picked: 6/5 and 4/5. Stages 1/2 and 3/2."""
    model = nn.Sequential(TinyAttention())
    moh(model, active=0.75, shared=0.25, router="learned")
    for name in ("route", "stage", "share"):
        nn.init.zeros_(getattr(model[0], name).weight)
    model[0].route.weight.data[:, 0] = torch.tensor([0.0, math.log(3), math.log(2)])
    model[0].stage.weight.data[1, 0] = math.log(3)
    hidden = torch.ones(1, 1, 4)
    torch.testing.assert_close(model(hidden), torch.tensor([[[0.5, 0.0, 1.8, 1.2]]]))
    torch.testing.assert_close(balance(model), torch.tensor(3 * (1 / 2 + 1 / 3)))


def test_gradients_go_straight_through():
    """Gates of 0 and 1 move as their scores do: also that of a head that was not picked."""
    model = nn.Sequential(TinyAttention())
    moh(model, active=0.5, shared=0.25)
    query = torch.tensor([[[1.0, 2.0, 3.0, 0.5]]], requires_grad=True)
    gates = model[0].gates(query, query)
    assert gates.flatten().tolist() == [1.0, 0.0, 1.0, 0.0]
    (grad,) = torch.autograd.grad(gates[..., 1].sum(), query)
    norms = query[..., 1:].abs()
    (right,) = torch.autograd.grad((norms / norms.std(-1, keepdim=True)).softmax(-1)[..., 0].sum(), query)
    torch.testing.assert_close(grad, right)
    assert grad[..., 1:].all()


def test_heads_that_score_alike():
    """Two are picked all the same, and gradients are finite."""
    model = nn.Sequential(TinyAttention())
    moh(model, active=0.75, shared=0.25)
    for value in (0.0, 2.0):
        query = torch.full((1, 1, 4), value, requires_grad=True)
        gates = model[0].gates(query, query)
        assert gates.sum() == 3
        (grad,) = torch.autograd.grad(gates[..., 1].sum(), query)
        assert grad.isfinite().all()


def test_balance_is_least_where_all_are_picked_alike():
    model = nn.Sequential(TinyAttention())
    moh(model, active=0.5, shared=0.0, router="learned")
    model[0].route.weight.data.copy_(5 * torch.eye(4))
    assert not hasattr(model[0], "stage")
    turns = torch.tensor([[1.0, 0.9, 0.0, 0.0], [0.0, 1.0, 0.9, 0.0], [0.0, 0.0, 1.0, 0.9], [0.9, 0.0, 0.0, 1.0]])
    model(turns[None])
    torch.testing.assert_close(balance(model), torch.tensor(2.0))
    model(turns[None, :1].expand(1, 4, 4))
    assert balance(model) > 2.5


@pytest.mark.parametrize("family", ["llama", "bart", "qwen3"])
def test_all_heads_active_is_the_model(family):
    """With every head picked, gates of 1 change nothing; undone, nothing is left."""
    model, inputs = build(family)
    model.eval()
    with torch.no_grad():
        before = model(**inputs).logits
        names = [name for name, _ in model.named_modules()]
        undo = moh(model, active=1.0)
        torch.testing.assert_close(model(**inputs).logits, before)
        undo()
        assert [name for name, _ in model.named_modules()] == names
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize(("family", "router"), [("llama", "norms"), ("llama", "learned"), ("gpt2", "learned")])
def test_trains_on(family, router):
    """As many heads count as were asked for; every weight gets a gradient; statistics record it."""
    model, inputs = build(family)
    model.eval()
    with torch.no_grad():
        before = model(**inputs).logits
    moh(model, router=router)
    logits = model(**inputs).logits
    assert not torch.allclose(logits, before)
    mixtures = [m for m in model.modules() if isinstance(m, MixtureOfHeads)]
    for mixture in mixtures:
        assert mixture.shared + mixture.routed == round(0.75 * mixture.heads)
        torch.testing.assert_close(mixture.load.sum(), torch.tensor(float(mixture.routed)))
    (logits.square().mean() + balance(model)).backward()
    learned = [
        p for name, p in model.named_parameters() if any(n in name for n in ("route", "stage", "share", "q_proj"))
    ]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in learned)
    with torch.no_grad(), regard.record(model, "entropy") as recording:
        model(**inputs)
    assert len(recording.tree.children) >= 1


@pytest.mark.parametrize("router", ["norms", "learned"])
def test_is_causal_through_a_cache_and_sees_no_padding(router):
    """Each token's heads depend on itself alone."""
    torch.manual_seed(0)
    model, inputs = build("llama")
    model.eval()
    moh(model, router=router)
    ids = inputs["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        part = model(ids[:, :5], use_cache=True)
        rest = model(ids[:, 5:], past_key_values=part.past_key_values).logits
        padded, there = nn.functional.pad(ids, (3, 0), value=7), nn.functional.pad(torch.ones_like(ids), (3, 0))
        positions = there.cumsum(-1).sub(1).clamp_min(0)
        shifted = model(padded, attention_mask=there, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(torch.cat([part.logits, rest], 1), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(shifted, whole, atol=1e-5, rtol=1e-4)


def test_cost_follows_the_heads_that_count():
    half, all_of_them = (cost(100, 100, 32, heads=8, active=a).operations for a in (0.5, 1.0))
    assert all_of_them == 2 * half == 4 * 32 * 8 * 100 * 100


def test_refusals():
    model = nn.Sequential(TinyAttention())
    with pytest.raises(ValueError, match="router is one of"):
        moh(model, router="random")
    with pytest.raises(ValueError, match="have to be fewer shared ones"):
        moh(model, active=0.5, shared=0.5)
    with pytest.raises(ValueError, match="2 or more others"):
        moh(model, active=1.0, shared=0.75)
    with pytest.raises(ValueError, match=r"name it with projection"):
        moh(model, projection="out")
    with pytest.raises(ValueError, match="no mixtures"):
        balance(model)
    moh(model)
    with pytest.raises(ValueError, match="have run"):
        balance(model)
    with pytest.raises(ValueError, match="mixture already"):
        moh(model)
    with pytest.raises(ValueError, match="use router='learned'"):
        moh(build("gpt2")[0])
