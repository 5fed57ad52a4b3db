"""TransNormerLLM: values by hand, one token after another as all at once, padding, files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regard
from regard.models.lightning_tnl import TnlAttention, TnlConfig, TnlForCausalLM, lightning_tnl, rates, simple_rms_norm


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def model() -> TnlForCausalLM:
    made = lightning_tnl(vocab_size=30, dim=24, layers=3, heads=6).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3)
    return made


def test_by_hand():
    # one head and channel, query = key = value = 1, half forgotten at each token: 1, 1.5, 1.75 before norm and gate
    module = TnlAttention(1, 1, layer=0, layers=1, gate=False)
    module.rates.fill_(math.log(2))
    one = 1.2784645427610738  # whose silu is 1
    module.norm, module.output = nn.Identity(), nn.Identity()
    for part in (module.query, module.key, module.value):
        part.weight = nn.Parameter(torch.full((1, 1), one))
    found, _ = module(torch.ones(1, 3, 1))
    torch.testing.assert_close(found[0, :, 0], torch.tensor([1.0, 1.5, 1.75]), rtol=1e-5, atol=1e-5)


def test_rates_fall_with_the_layer():
    torch.testing.assert_close(rates(4, 0, 3), torch.tensor([0.25, 1 / 16, 1 / 64, 1 / 256]) * (1 + 1e-5))
    torch.testing.assert_close(rates(4, 2, 3), rates(4, 0, 1) * 1e-5)


def test_without_decay_it_is_a_running_sum():
    module = TnlAttention(8, 2, layer=0, layers=2, decay=False)
    x = torch.randn(2, 5, 8)
    q, k, v = (F.silu(part(x)).unflatten(-1, (2, 4)) for part in (module.query, module.key, module.value))
    sums = torch.einsum("bihd,bjhd,bjhe->bijhe", q, k, v) * torch.ones(5, 5).tril()[None, :, :, None, None]
    mixed = module.norm(sums.sum(2).flatten(2)) * module.gate(x).sigmoid()
    torch.testing.assert_close(module(x)[0], module.output(mixed))


def test_norm_of_a_constant_is_one():
    torch.testing.assert_close(simple_rms_norm(torch.full((2, 7), -4.0)), torch.full((2, 7), -1.0))


def test_token_by_token_is_the_whole(model):
    ids = torch.randint(30, (2, 11))
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, use_cache=True).logits, whole, rtol=1e-4, atol=1e-4)
    first = model(ids[:, :7], use_cache=True)
    rest = model(ids[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, 7:], rtol=1e-4, atol=1e-4)
    assert [tuple(state.shape) for state in rest.past_key_values] == [(2, 6, 4, 4)] * 3


def test_later_tokens_change_nothing_before(model):
    ids = torch.randint(30, (1, 9))
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 30
    torch.testing.assert_close(model(other).logits[:, :5], model(ids).logits[:, :5])


def test_padding_in_front_changes_nothing(model):
    ids = torch.randint(30, (1, 6))
    filled = torch.cat([torch.randint(30, (1, 4)), ids], 1)
    mask = (torch.arange(10) >= 4).long()[None]
    torch.testing.assert_close(model(filled, mask).logits[:, 4:], model(ids).logits, rtol=1e-4, atol=1e-4)
    found = model.continued(filled, 5, attention_mask=mask)
    assert found[:, 10:].tolist() == model.continued(ids, 5)[:, 6:].tolist()


def test_continues_with_the_likeliest(model):
    ids = torch.randint(30, (2, 5))
    expected = ids
    for _ in range(4):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert model.continued(ids, 4).tolist() == expected.tolist()


def test_saves_and_loads(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert [path.suffix for path in tmp_path.glob("model*")] == [".safetensors"]
    ids = torch.randint(30, (1, 8))
    again = TnlForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    torch.testing.assert_close(again.layers[1].attention.rates, model.layers[1].attention.rates)


def test_loss_is_of_the_next_token(model):
    ids = torch.randint(30, (2, 5))
    found = model(ids, labels=ids)
    expected = -found.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(found.loss, expected)


def test_record_finds_no_softmax(model):
    with (
        pytest.raises(regard.UnreachableAttention, match=r"TnlAttention does not call .* softmax"),
        regard.record(model, "entropy"),
    ):
        model(torch.randint(30, (1, 4)))


def test_gradients():
    module = TnlAttention(4, 2, layer=0, layers=2).double()
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x)[0], x)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="10 channels do not divide by 4 heads"):
        TnlConfig(dim=10, heads=4)
    assert TnlConfig(dim=64).mlp_dim == 176
    assert np.isclose(TnlConfig(dim=48).mlp_dim, 128)
