"""Gates of mixed tokens: by hand, what they are not, costs, conversion and back."""

from __future__ import annotations

import pytest
import torch
from families import build
from torch import nn

from regard.mechanisms.ninformer import GatingUnit, NiNBlock, attention_cost, cost, ninformer


def test_by_hand():
    """A mixer whose MLPs give nothing passes its input; with the identity before it, the gate squares."""
    unit = GatingUnit(3, tokens=2, hidden=4)
    for mlp in (unit.mixer.token_mlp, unit.mixer.channel_mlp):
        for parameter in mlp[3].parameters():
            nn.init.zeros_(parameter)
    nn.init.eye_(unit.proj.weight)
    nn.init.zeros_(unit.proj.bias)
    hidden = torch.tensor([[[1.0, -2.0, 3.0], [0.0, 0.5, 4.0]]])
    assert torch.equal(unit(hidden), hidden**2)


def test_tokens_are_mixed_by_place():
    """Every output token depends on every input token, and another order gives other outputs: it is no attention."""
    torch.manual_seed(0)
    unit = GatingUnit(4, tokens=5, hidden=6).double()
    hidden = torch.randn(1, 5, 4, dtype=torch.float64)
    slopes = torch.autograd.functional.jacobian(unit, hidden)[0, :, :, 0]
    assert (slopes.abs().sum((1, 3)) > 0).all()
    order = torch.tensor([1, 0, 2, 3, 4])
    assert not torch.allclose(unit(hidden[:, order]), unit(hidden)[:, order])
    assert torch.autograd.gradcheck(unit, hidden.requires_grad_())


def test_the_norm_of_a_block_is_one():
    block = NiNBlock(4, tokens=5, hidden=6)
    norms = [name for name, module in block.named_modules() if isinstance(module, nn.LayerNorm)]
    assert norms == ["norm", "unit.mixer.token_norm", "unit.mixer.channel_norm"]


def test_cost_beside_attention():
    """As the authors' script has it the gate costs more; narrow ones cost less."""
    ours, theirs = cost(64, 256, hidden=512), attention_cost(64, 256)
    assert ours.operations == (2 * 256 + 8 * 512) * 64 * 256
    assert ours.operations / theirs.operations == pytest.approx((2 * 256 + 8 * 512) / (8 * 256 + 4 * 64))
    assert cost(64, 256, hidden=128).operations < theirs.operations


def test_of_a_real_model():
    """Trains, and leaves the model as it was."""
    model, inputs = build("vit")
    output = next(iter(model(**inputs).values())).detach()
    names = [name for name, _ in model.named_modules()]
    undo = ninformer(model, tokens=17, hidden=8)
    units = [m for m in model.modules() if isinstance(m, GatingUnit)]
    assert units
    assert not units[0].training
    loss = next(iter(model(**inputs).values())).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for unit in units for p in unit.parameters())
    undo()
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(next(iter(model(**inputs).values())), output)


def test_refusals():
    with pytest.raises(ValueError, match="5 tokens, 4 channels"):
        GatingUnit(4, tokens=5, hidden=6)(torch.randn(1, 6, 4))
    model, inputs = build("llama")
    with pytest.raises(ValueError, match="is causal"):
        ninformer(model, tokens=12)
    model, inputs = build("vit")
    undo = ninformer(model, tokens=16)
    with pytest.raises(ValueError, match="16 tokens, 32 channels"):
        model(**inputs)
    with pytest.raises(ValueError, match="is one already"):
        ninformer(model, tokens=17)
    undo()
    with pytest.raises(ValueError, match="no module called"):
        ninformer(nn.Linear(2, 2), tokens=4)
