"""Relations and symbols: by hand, both ways of computing them, what a recording sees, refusals."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

import regard
from regard.mechanisms import dual_attention
from regard.mechanisms.dual_attention import DualAttention, RelationalAttention, cost


def relational(*args, **knobs) -> RelationalAttention:
    torch.manual_seed(0)
    return RelationalAttention(*args, **knobs).double()


def identity(x):
    return x


@pytest.mark.parametrize("activation", [None, identity])
def test_by_hand(activation):
    """Tokens 1 and 2, all projections 1, no symbols: relations of token 1 are 1 and 2, of token 2, 2 and 4."""
    module = RelationalAttention(1, 1, 1, 1, activation=activation)
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    nn.init.zeros_(module.symbol.weight)
    x = torch.tensor([[[1.0], [2.0]]])
    torch.testing.assert_close(module(x, x).flatten(), torch.tensor([1.7310586, 3.7615942]))


@pytest.mark.parametrize("settings", [{}, {"causal": True}, {"mask": True}, {"causal": True, "mask": True}])
@pytest.mark.parametrize("symmetric", [False, True])
def test_without_laying_out_pairs_is_the_same(settings, symmetric):
    """Values and gradients of the two ways, and of the formula written out."""
    module = relational(12, 2, 3, 1, 3, symmetric=symmetric)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    symbols = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    if "mask" in settings:
        settings = {**settings, "mask": torch.rand(2, 1, 5, 5) < 0.7}
        settings["mask"][..., 0] = True
    found = module(x, symbols, **settings)
    module.activation = identity
    other = module(x, symbols, **settings)
    torch.testing.assert_close(found, other)
    weights, related = module.weights(x, **settings), module.related(x)
    told = torch.einsum("bhij,bjd->bihd", weights, module.symbol(symbols))
    fetched = torch.einsum("bhij,bijr,hdr->bihd", weights, related, module.mix)
    torch.testing.assert_close(found, module.output((fetched + told).flatten(2)))
    given = torch.randn_like(found)
    for one, another in zip(*(torch.autograd.grad(o, (x, symbols), given) for o in (found, other)), strict=True):
        torch.testing.assert_close(one, another)
    if symmetric:
        torch.testing.assert_close(related, related.transpose(1, 2))


def test_without_relational_heads_is_attention():
    torch.manual_seed(0)
    module, x = DualAttention(16, 4, 0), torch.randn(2, 6, 16)
    parts = [
        part(x).unflatten(-1, (4, 4)).transpose(1, 2)
        for part in (module.sensory.query, module.sensory.key, module.sensory.value)
    ]
    mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
    torch.testing.assert_close(module(x, causal=True), module.sensory.output(mixed.transpose(1, 2).flatten(2)))


def test_without_mixing_relations_symbols_are_the_values():
    module = relational(8, 2, 4, 2)
    nn.init.zeros_(module.mix)
    x, symbols = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    want = module.weights(x) @ module.symbol(symbols).unflatten(-1, (2, 4)).transpose(1, 2)
    torch.testing.assert_close(module(x, symbols), module.output(want.transpose(1, 2).flatten(2)))


def test_tokens_in_any_order_with_their_symbols():
    torch.manual_seed(0)
    module, x, order = DualAttention(16, 2, 2), torch.randn(2, 6, 16), torch.randperm(6)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])
    module = DualAttention(16, 2, 2, symbols="positional")
    assert not torch.allclose(module(x[:, order]), module(x)[:, order])


def test_symbols_by_distance():
    """Of every pair, clipped; as if they had been given."""
    torch.manual_seed(0)
    module, x = DualAttention(16, 2, 2, symbols="relative", length=2), torch.randn(2, 6, 16)
    symbols = module.symbols_of(x)
    assert symbols.shape == (1, 6, 6, 16)
    assert torch.equal(symbols[0, 0, 1], module.retrieve.weight[3])
    assert torch.equal(symbols[0, 5, 0], module.retrieve.weight[0])
    output = module(x)
    torch.testing.assert_close(module(x, symbols=symbols), output)
    assert not torch.allclose(module(x, symbols=symbols.mT.mT.transpose(1, 2)), output)


def test_causal_tokens_see_nothing_later():
    torch.manual_seed(0)
    for symbols in ("symbolic", "positional", "relative"):
        module, x = DualAttention(16, 2, 2, symbols=symbols), torch.randn(2, 6, 16)
        torch.testing.assert_close(module(x[:, :4], causal=True), module(x, causal=True)[:, :4])


def test_recorded():
    """All three attentions, exactly; relations that no product makes are refused, not left out."""
    torch.manual_seed(0)
    module, x = DualAttention(16, 2, 2).eval(), torch.randn(2, 6, 16)
    with torch.no_grad():
        want = module(x, causal=True)
        with regard.record(module, "entropy") as recording:
            got = module(x, causal=True)
    torch.testing.assert_close(got, want)
    assert {"sensory", "relational", "retrieve_cross"} == set(recording.tree.children)
    for name in ("sensory", "relational"):
        want = torch.special.entr(getattr(module, name).weights(x, causal=True)).sum(-1)
        found = recording.tree[name]["entropy"].transpose("layer", "batch", "head", "query")
        torch.testing.assert_close(torch.tensor(found.values[0]), want.detach())
    module = DualAttention(16, 2, 2, activation=torch.tanh)
    with pytest.warns(UserWarning, match="'relational' is not recorded"), regard.record(module, "entropy") as recording:
        module(x)
    assert "sensory" in recording.tree.children
    assert "relational" not in recording.tree.children


def test_cost():
    assert cost(10, 16, sensory=2, relational=2).operations == 100 * (32 + 32 + 16 + 8)
    assert cost(10, 16, sensory=4, relational=0).operations == 4 * 16 * 100


def test_examples():
    assert not doctest.testmod(dual_attention).failed


def test_refusals():
    x = torch.randn(2, 6, 16)
    with pytest.raises(ValueError, match="symbols is one of"):
        DualAttention(16, 2, 2, symbols="sinusoidal")
    with pytest.raises(ValueError, match=r"16 channels do not divide evenly by sensory \+ relational=3"):
        DualAttention(16, 2, 1)
    with pytest.raises(ValueError, match="8 channels do not divide evenly by relations=3"):
        DualAttention(16, 2, 2, relations=3)
    with pytest.raises(ValueError, match="2 heads do not divide evenly by kv_heads=3"):
        DualAttention(16, 2, 2, kv_heads=(3, 1))
    with pytest.raises(ValueError, match="0 or more heads"):
        DualAttention(16, -2, 6)
    with pytest.raises(ValueError, match="symbols are given with each call"):
        DualAttention(16, 2, 2, symbols="given")(x)
    with pytest.raises(ValueError, match=r"symbols are \[batch, token, dim\].*got \[2, 5, 16\]"):
        DualAttention(16, 2, 2)(x, symbols=x[:, :5])
    with pytest.raises(ValueError, match="6 tokens, but symbols for length=4"):
        DualAttention(16, 2, 2, symbols="positional", length=4)(x)
    with pytest.raises(ValueError, match=r"takes hidden \[batch, token, dim=16\]; got \[2, 6, 8\]"):
        DualAttention(16, 2, 2)(x[..., :8])
    with pytest.raises(ValueError, match="mask is boolean"):
        DualAttention(16, 2, 2)(x, mask=torch.zeros(2, 1, 6, 6))
