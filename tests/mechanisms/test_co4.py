"""Triadic modulation: by hand, permutations, and a layer in another model."""

from __future__ import annotations

import pytest
import torch
from families import GROUPED, NO_IDS, VISION
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from regard.mechanisms.co4 import TriadicModulation, co4, cost


def test_modulation_by_hand():
    """Values 1 and -1, query and key of the latent token 1/2 and 1, its value -3: 5 and 1."""
    layer = TriadicModulation(3, top=1, qkv_bias=False)
    with torch.no_grad():  # tokens that say their query, key and value, which have but one channel
        layer.qkv.weight.zero_()[[0, 3, 6], [0, 1, 2]] = 1.0
    hidden = torch.tensor([[[0.5, 1.0, -3.0], [2.0, 3.0, 1.0], [1.0, -1.0, -1.0]]])
    latent, (query, key, value) = layer.modulated(hidden)
    assert [t[..., 0].item() for t in latent] == [0.5, 1.0, -3.0]
    assert query[..., 0].flatten().tolist() == [0.5 * 3 + 2, 0.5 * -1 + 1]
    assert key[..., 0].flatten().tolist() == [2 + 3, 1 - 1]
    assert value[..., 0].flatten().tolist() == [5.0, 1.0]
    # The largest query 3.5 and key 5, of the same token here; its value 5 is mixed with the latent's -3.
    scores = torch.tensor([[0.5 * 1, 0.5 * 5], [3.5 * 1, 3.5 * 5]])
    given = (scores * 3**-0.5).softmax(-1) @ torch.tensor([-3.0, 5.0])
    torch.testing.assert_close(layer(hidden)[..., 0].flatten(), torch.tensor([given[0], 5 + given[1], 1.0]))


def test_patches_have_no_order():
    layer, hidden = TriadicModulation(6, top=4).double(), torch.randn(2, 10, 6).double()
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(9)])
    torch.testing.assert_close(layer(hidden[:, order]), layer(hidden)[:, order])


def test_only_what_is_chosen_changes_beyond_modulation():
    layer, hidden = TriadicModulation(5, top=3).double(), torch.randn(1, 9, 5).double()
    changed = (layer(hidden)[:, 1:] - layer.modulated(hidden)[1][2]).ne(0)
    assert changed.sum(1).tolist() == [[3] * 5]


def test_in_other_models():
    model = ViTForImageClassification(ViTConfig(**VISION)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(pixels).logits
    undo = co4(model)
    model(pixels, labels=torch.tensor([0, 1])).loss.backward()
    undo()
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, before)
    with pytest.raises(ValueError, match="is causal"):
        co4(LlamaForCausalLM(LlamaConfig(**GROUPED, **NO_IDS)))


def test_refuses_and_cost():
    with pytest.raises(ValueError, match="12 patches or more"):
        TriadicModulation(4)(torch.randn(1, 12, 4))
    with pytest.raises(ValueError, match="1 patch or more"):
        TriadicModulation(4, top=0)
    assert 1.9 < cost(2000, 8).operations / cost(1000, 8).operations <= 2
