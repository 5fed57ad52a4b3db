"""Mega: the moving average by hand and token by token, chunks, and a layer in another model."""

from __future__ import annotations

import math

import pytest
import torch
from families import GROUPED, NO_IDS, VISION
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from regard.mechanisms.mega import Mega, MovingAverage, cost, mega


def average(**knobs):
    layer = MovingAverage(1, order=1, **knobs)
    for name, value in (("delta", 0.0), ("alpha", 0.0), ("beta", 1.0), ("gamma", 1.0), ("omega", 0.0)):
        nn.init.constant_(getattr(layer, name), value)
    return layer


def test_average_by_hand():
    """Half of a token is added, and three quarters kept: 1/2, 3/8, 9/32, through SiLU."""
    found = average()(torch.tensor([1.0, 0.0, 0.0])[None, :, None])
    assert found.flatten().tolist() == pytest.approx([0.3112, 0.2222, 0.1603], abs=1e-4)
    both = average(bidirectional=True)(torch.tensor([0.0, 1.0, 0.0])[None, :, None])
    silu = nn.functional.silu(torch.tensor([0.375, 1.0, 0.375]))
    torch.testing.assert_close(both.flatten(), silu)
    cut = average(truncation=2)(torch.tensor([1.0, 0.0, 0.0])[None, :, None])
    assert cut.flatten().tolist() == pytest.approx([0.3112, 0.2222, 0.0], abs=1e-4)


def test_average_token_by_token():
    layer, hidden = MovingAverage(3, order=4).double(), torch.randn(2, 40, 3, dtype=torch.float64)
    state, parts = None, []
    for token in hidden.split(1, 1):
        output, state = layer.step(state, token)
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, 1), layer(hidden))


@pytest.mark.parametrize("attention", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_token_by_token(attention, chunk):
    layer = Mega(6, z=4, order=2, attention=attention, chunk=chunk, causal=True, positions=20).double()
    nn.init.normal_(layer.gamma)
    hidden = torch.randn(2, 15, 6, dtype=torch.float64)
    state, parts = None, []
    for i, token in enumerate(hidden.split(1, 1)):
        output, state = layer.step(state, token)
        assert chunk is None or state.key.shape[1] == i % chunk + 1
        parts.append(output)
    whole = layer(hidden)
    if attention != "softmax":  # a step divides by the keys so far, and a pass too
        assert torch.isfinite(whole).all()
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_only_the_average_crosses_chunks():
    layer = Mega(6, z=4, chunk=4, order=2).double()
    hidden = torch.randn(1, 8, 6, dtype=torch.float64)
    other = hidden.clone()
    other[:, 4:] += torch.randn(1, 4, 6)
    assert (layer(hidden) - layer(other))[:, :4].abs().max() > 1e-9
    layer.move = _Still()
    torch.testing.assert_close(layer(hidden)[:, :4], layer(other)[:, :4], rtol=0, atol=1e-12)
    whole = Mega(6, z=4, order=2, positions=8).double()
    one = Mega(6, z=4, order=2, chunk=8).double()
    one.load_state_dict(whole.state_dict())
    torch.testing.assert_close(one(hidden), whole(hidden))


class _Still(nn.Module):
    def forward(self, hidden, *, mask=None):
        return hidden


def test_causal_padding_and_gates():
    layer, hidden = Mega(6, z=4, order=2, causal=True, positions=8).double(), torch.randn(2, 8, 6).double()
    other = hidden.clone()
    other[:, 5:] += torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(hidden)[:, :5], layer(other)[:, :5], rtol=0, atol=1e-12)
    there = torch.arange(8).lt(5).expand(2, -1)
    both = Mega(6, z=4, order=2, positions=8).double()
    torch.testing.assert_close(both(hidden, mask=there)[:, :5], both(other, mask=there)[:, :5])
    nn.init.constant_(layer.to_parts.bias, -1e4)  # the update gate is shut
    torch.testing.assert_close(layer(hidden), hidden)


def test_laplace_by_hand():
    layer = Mega(2, z=2, attention="laplace", positions=1)
    nn.init.zeros_(layer.gamma)
    for bias, right in ((0.0, 0.00609), (math.sqrt(0.5), 0.5), (1.0, 0.8504)):
        nn.init.constant_(layer.bias.table, bias)
        assert layer.weights(torch.ones(1, 1, 2)).item() == pytest.approx(right, abs=1e-4)


def test_in_other_models():
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**VISION)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(pixels).logits
    undo = mega(model, z=8, positions=17)
    model(pixels, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="one already"):
        mega(model)
    undo()
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, before)
    causal = LlamaForCausalLM(LlamaConfig(**GROUPED, **NO_IDS)).eval()
    mega(causal, z=8, positions=20)
    tokens = torch.randint(3, 90, (2, 12))
    with torch.no_grad():
        logits = causal(tokens, use_cache=False).logits
        cut = causal(tokens[:, :7], use_cache=False).logits
        torch.testing.assert_close(logits[:, :7], cut, atol=1e-5, rtol=1e-4)
        with pytest.raises(ValueError, match="use_cache=False"):
            causal(tokens)
        with pytest.raises(ValueError, match="a mask cannot be honoured"):
            causal(tokens, attention_mask=(torch.arange(12) < 9).long().expand(2, -1), use_cache=False)


def test_refuses():
    hidden = torch.randn(1, 7, 6)
    with pytest.raises(ValueError, match="whole chunks"):
        Mega(6, z=4, chunk=4)(hidden)
    with pytest.raises(ValueError, match="positions"):
        Mega(6, z=4, positions=4)(hidden)
    with pytest.raises(ValueError, match="is not bidirectional"):
        Mega(6, z=4, causal=True, bidirectional=True)
    with pytest.raises(ValueError, match="stand at the end"):
        Mega(6, z=4)(hidden, mask=torch.arange(7).gt(2)[None])
    with pytest.raises(
        ValueError, match=r"Mega: a mask is boolean .*\[batch, token\] = \[1, 7\].*got torch.bool \[1, 1\]"
    ):
        Mega(6, z=4)(hidden, mask=torch.ones(1, 1, dtype=torch.bool))  # would be that of every token
    with pytest.raises(ValueError, match="Mega: takes hidden"):
        Mega(6, z=4)(hidden[:, :0])
    with pytest.raises(ValueError, match="neither with bidirectional"):
        MovingAverage(3, bidirectional=True).step(None, hidden[:, :1, :3])


def test_cost_is_linear_in_chunks():
    grown = [cost(2 * n, 64, chunk=128).operations / cost(n, 64, chunk=128).operations for n in (2**12, 2**16)]
    assert all(2 < g < 2.1 for g in grown)
    assert cost(2**16, 64).operations / cost(2**15, 64).operations > 3.8
