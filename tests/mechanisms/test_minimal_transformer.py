"""Fewer matrices: sizes that the paper prints, what each variant keeps and loses, real models, and back."""

from __future__ import annotations

import pytest
import torch
from families import build
from torch import nn
from torch.nn import functional as F

import regard
from regard.mechanisms.minimal_transformer import QUERY_KEY, MinimalAttention, cost, minimal_transformer, parameters


def layers(**knobs):
    """A layer of each variant that there is."""
    return {(q, v): MinimalAttention(6, query_key=q, value_output=v, **knobs) for q in QUERY_KEY for v in (True, False)}


def test_sizes():
    """The paper's models of width 60: 192 pixels to a patch, six layers, ten classes."""
    around = 193 * 60 + 61 * 10
    assert parameters(60, hidden=256, layers=6) + around == 287_686
    assert parameters(60, layers=6) + around == 101_470
    for (query_key, value_output), layer in layers().items():
        found = sum(p.numel() for p in layer.parameters())
        assert found == parameters(6, query_key=query_key, value_output=value_output, norms=0)
    full = parameters(60, hidden=240, norms=0, bias=False)
    reduced = [
        parameters(60, norms=0, bias=False, query_key=q, value_output=v) for q, v in (("one", True), ("one", False))
    ]
    assert [of / full for of in reduced] == [3 / 12, 1 / 12]


def test_by_hand():
    """Scores are W_QK itself where inputs are the axes: weights 0.804 and 0.196 in the second row, 1/2 in the first."""
    layer = MinimalAttention(2, query_key="one", value_output=False, bias=False)
    layer.q_proj.weight.data = torch.tensor([[0.0, 0.0], [2.0, 0.0]]).T
    found = layer(torch.eye(2)[None])[0]
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5], [0.8044, 0.1956]]), atol=1e-4, rtol=0)


def test_one_matrix_is_the_product_of_two():
    one, two = (MinimalAttention(6, query_key=q, bias=False).double() for q in ("one", "separate"))
    for name in ("v_proj", "o_proj"):
        getattr(one, name).load_state_dict(getattr(two, name).state_dict())
    one.q_proj.weight.data = two.k_proj.weight.T @ two.q_proj.weight
    hidden = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(one(hidden), two(hidden))


@pytest.mark.parametrize(("query_key", "heads"), [("symmetric", 1), ("symmetric", 3), ("cholesky", 1)])
def test_symmetric_scores(query_key, heads):
    layer = MinimalAttention(6, heads, query_key=query_key)
    query, key = layer.query_and_key(torch.randn(2, 5, 6))
    scores = query @ key.mT
    assert torch.equal(scores, scores.mT)
    assert (scores.diagonal(dim1=-2, dim2=-1) >= 0).all()
    assert (torch.linalg.eigvalsh(scores.double()) > -1e-5).all()


def test_without_values_outputs_lie_among_inputs():
    hidden = torch.randn(3, 7, 6)
    for (_, value_output), layer in layers().items():
        inside = (layer(hidden) <= hidden.amax(1, keepdim=True) + 1e-6) & (
            layer(hidden) >= hidden.amin(1, keepdim=True) - 1e-6
        )
        assert bool(inside.all()) or value_output


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_attention(causal, masked):
    """PyTorch's, of what each variant takes for query, key and value; with gradients."""
    for (query_key, _), layer in layers().items():
        layer.double()
        hidden = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
        mask = torch.tensor([True, True, True, True, False])[None, None, None] if masked else None
        query, key = layer.query_and_key(hidden)
        value = (hidden if layer.v_proj is None else layer.v_proj(hidden))[:, None]
        seen = torch.ones(5, 5, dtype=torch.bool)
        seen = seen.tril() if causal else seen
        right = F.scaled_dot_product_attention(query, key, value, seen if mask is None else seen & mask)[:, 0]
        right = right if layer.o_proj is None else layer.o_proj(right)
        found = layer(hidden, causal=causal, mask=mask)
        torch.testing.assert_close(found, right, msg=query_key)
        wanted = [hidden, *layer.parameters()]
        for ours, theirs in zip(torch.autograd.grad(found.sum(), wanted), torch.autograd.grad(right.sum(), wanted)):
            torch.testing.assert_close(ours, theirs)


def test_is_recorded():
    model = nn.Sequential(MinimalAttention(6, 2, query_key="symmetric"))
    hidden = torch.randn(2, 5, 6)
    with regard.record(model, "entropy") as recording:
        model(hidden)
    (node,) = recording.tree.children.values()
    query, key = model[0].query_and_key(hidden)
    right = torch.special.entr((query @ key.mT * 3**-0.5).softmax(-1)).sum(-1)
    found = torch.from_numpy(node["entropy"].values).reshape(right.shape)
    torch.testing.assert_close(found, right.detach())


@pytest.mark.parametrize("mlp", [False, True])
def test_of_a_real_model(mlp):
    """Keys come from the query projection, which is trained for both; nothing but attention adds; put back."""
    model, inputs = build("vit")
    output = model(**inputs).logits.detach()
    undo = minimal_transformer(model, mlp=mlp)
    query, key = (getattr(model.vit.layers[0].attention, f"{name}_proj") for name in "qk")
    assert query is key
    seen = {}
    layer = model.vit.layers[0]
    layer.register_forward_hook(lambda module, given, out: seen.update(given=given[0], out=out))
    layer.attention.register_forward_hook(lambda module, given, out: seen.update(added=out[0]))
    found = model(**inputs).logits
    assert not torch.allclose(found, output)
    if not mlp:
        torch.testing.assert_close(seen["out"], seen["given"] + seen["added"])
    found.square().mean().backward()
    assert query.weight.grad.any()
    undo()
    assert torch.equal(model(**inputs).logits, output)


def test_cost():
    assert cost(10, 6).operations == 2 * 10 * 36 * 4 + 4 * 6 * 100
    assert cost(10, 6, query_key="one", value_output=False).operations == 2 * 10 * 36 + 4 * 6 * 100


def test_refusals():
    with pytest.raises(ValueError, match="query_key is one of"):
        MinimalAttention(6, query_key="none")
    for knobs in ({"query_key": "one"}, {"query_key": "cholesky"}, {"value_output": False}):
        with pytest.raises(ValueError, match="for one head"):
            MinimalAttention(6, 2, **knobs)
    with pytest.raises(ValueError, match="evenly"):
        parameters(6, heads=4)
    with pytest.raises(ValueError, match="which one matrix cannot make"):
        minimal_transformer(build("llama")[0])
    with pytest.raises(ValueError, match="nothing is left out"):
        minimal_transformer(nn.Linear(2, 2), mlp=True, symmetric=False)
    with pytest.raises(ValueError, match="has no MLPs"):
        minimal_transformer(nn.Linear(2, 2))
    model, _ = build("vit")
    minimal_transformer(model)
    with pytest.raises(ValueError, match="symmetric already"):
        minimal_transformer(model, mlp=True)
