"""Gates on attention: where they stand, what they do by hand, and that they can be undone."""

from __future__ import annotations

import pytest
import torch
from families import build
from torch import nn

import regard
from regard.mechanisms.gated_attention import GatedAttention, gated_attention


class TinyAttention(nn.Module):
    """Passes its input on, as two heads of two channels."""

    head_dim = 2

    def __init__(self):
        super().__init__()
        self.o_proj = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.o_proj.weight)

    def forward(self, hidden_states):
        return self.o_proj(hidden_states)


def test_by_hand():
    """Gates of log-odds 0 and log 3 let one half and three quarters of a head through."""
    model = nn.Sequential(TinyAttention())
    undo = gated_attention(model, granularity="headwise")
    gate = model[0].gate.weight.data.zero_()
    gate[1, 0] = torch.log(torch.tensor(3.0))
    hidden = torch.tensor([[[1.0, 2.0, 4.0, 8.0]]])
    torch.testing.assert_close(model(hidden), torch.tensor([[[0.5, 1.0, 3.0, 6.0]]]))
    undo()
    assert torch.equal(model(hidden), hidden)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "bart", "vit"])
@pytest.mark.parametrize("granularity", ["elementwise", "headwise"])
def test_of_real_models(family, granularity):
    """Trains, is recorded, halves attention with gates at zero, and leaves the model as it was."""
    model, inputs = build(family)
    model.eval()
    key = "logits"
    with torch.no_grad():
        before = model(**inputs)[key]
    names = [name for name, _ in model.named_modules()]
    undo = gated_attention(model, granularity=granularity)
    gates = [m.gate for m in model.modules() if isinstance(m, GatedAttention)]
    loss = model(**inputs)[key].square().mean()
    loss.backward()
    assert all(g.weight.grad.isfinite().all() and g.weight.grad.any() for g in gates)
    for gate in gates:
        nn.init.zeros_(gate.weight)
    with torch.no_grad(), regard.record(model, "entropy") as recording:
        halved = model(**inputs)[key]
    assert len(recording.tree.children) >= 1
    assert not torch.allclose(halved, before)
    undo()
    assert [name for name, _ in model.named_modules()] == names
    with torch.no_grad():
        assert torch.equal(model(**inputs)[key], before)


def test_generates_through_a_cache():
    model, inputs = build("llama")
    model.eval()
    gated_attention(model)
    with torch.no_grad():
        whole = model(**inputs).logits
        part = model(inputs["input_ids"][:, :5], use_cache=True)
        rest = model(inputs["input_ids"][:, 5:], past_key_values=part.past_key_values).logits
    torch.testing.assert_close(torch.cat([part.logits, rest], 1), whole, atol=1e-5, rtol=1e-4)


def test_refusals():
    model = nn.Sequential(TinyAttention())
    with pytest.raises(ValueError, match="granularity is one of"):
        gated_attention(model, granularity="blockwise")
    with pytest.raises(ValueError, match="no module called"):
        gated_attention(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="no module called"):
        gated_attention(model, projection="elsewhere")
    del TinyAttention.head_dim
    try:
        with pytest.raises(ValueError, match="head_dim"):
            gated_attention(model, granularity="headwise")
    finally:
        TinyAttention.head_dim = 2
    assert isinstance(model[0], TinyAttention)
    gated_attention(model)
    with pytest.raises(ValueError, match="gated already"):
        gated_attention(model)
