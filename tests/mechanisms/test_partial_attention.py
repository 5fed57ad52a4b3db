"""Partial attention: gates by hand, which channels meet which, distances, and a site of its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import regard
from regard.mechanisms.partial_attention import PartialChannel, PartialSelf, PartialSpatial, buckets, cost


def test_gates_without_weights_are_half_open():
    block, x = PartialChannel(8).eval(), torch.randn(2, 8, 4, 5)
    nn.init.zeros_(block.mix.weight)
    torch.testing.assert_close(block(x)[:, 2:], 0.5 * x[:, 2:] / math.sqrt(1 + 1e-5))
    block = PartialSpatial(8).eval()
    nn.init.zeros_(block.score.weight)
    torch.testing.assert_close(block(x)[:, :4], 0.5 * x[:, :4] / math.sqrt(1 + 1e-5))


def test_a_gate_by_hand():
    """Of a channel of 0 and 2, mean 1 and deviation sqrt 2; weights of 3 and 0: hardsigmoid(3) is 1, of -1.5, 1/4."""
    block = PartialChannel(2, split=2).eval()
    block.norm_gate = nn.Identity()
    x = torch.zeros(1, 2, 1, 2)
    x[0, 1, 0, 1] = 2
    for weights, gate in (((3.0, 0.0), 1.0), ((-1.5, 0.0), 0.25), ((0.0, 1.0), math.sqrt(2) / 6 + 0.5)):
        block.mix.weight.data = torch.tensor(weights).view(1, 1, 1, 2)
        torch.testing.assert_close(block.gate(x[:, 1:]), torch.full((1, 1, 1, 1), gate))


@pytest.mark.parametrize("kind", [PartialChannel, PartialSelf])
def test_the_first_channels_are_convolved_and_meet_no_others(kind):
    torch.manual_seed(0)
    block = kind(16, **({"heads": 4} if kind is PartialSelf else {})).eval()
    x = torch.randn(1, 16, 4, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(block(x)[:, :4].square().sum(), x)
    assert grad[:, :4].all()
    assert not grad[:, 4:].any()
    (grad,) = torch.autograd.grad(block(x)[:, 4:].square().sum(), x)
    assert not grad[:, :4].any()
    assert grad[:, 4:].all()


def test_the_full_form_convolves_and_attends_to_all():
    block = PartialChannel(8, split=1).eval()
    x = torch.randn(2, 8, 4, 5)
    assert block.convolution.weight.shape == (8, 8, 3, 3)
    torch.testing.assert_close(block(x), block.attend(block.convolution(x)))
    assert cost(8, 8, 64, split=1).operations > 9 * cost(8, 8, 64).operations


def test_buckets_by_hand():
    """40 + the rounded distance up to 20; 40 away, 20 + 20 log 2 / log 8 = 26.7; never beyond 80."""
    line = buckets(1, 400)[0]
    assert line[:4].tolist() == [40, 41, 42, 43]
    assert (line[20], line[21], line[40], line[160], line[399]) == (60, 60, 67, 80, 80)
    square = buckets(2, 3)
    assert square[0].tolist() == [40, 41, 42, 41, 41, 42]  # sqrt 2 is 1, sqrt 5 is 2
    assert torch.equal(square, square.mT)


def test_self_attention_without_a_bias_is_attention():
    torch.manual_seed(0)
    block, x = PartialSelf(16, heads=4).eval(), torch.randn(2, 16, 3, 4)
    tokens = block.norm(x[:, 4:]).flatten(2).mT
    query, key, value = block.attention.parts(tokens).unflatten(-1, (3, 4, 3)).permute(2, 0, 3, 1, 4)
    mixed = (query @ key.mT / math.sqrt(3)).softmax(-1) @ value
    want = block.attention.output(mixed.transpose(1, 2).flatten(2)).mT.unflatten(2, (3, 4))
    torch.testing.assert_close(block(x)[:, 4:], want)


def test_self_attention_is_recorded_with_its_bias():
    """A bias that only distance 0 escapes: each position looks at itself."""
    block, x = PartialSelf(16, heads=4).eval(), torch.randn(2, 16, 3, 4)
    block.attention.bias.data.fill_(-1e4)
    block.attention.bias.data[:, 40] = 0
    with torch.no_grad(), regard.record(block, "self_mass", "entropy") as recording:
        block(x)
    (node,) = (n for n in recording.tree.subtree if "entropy" in n.data_vars)
    assert float(node["entropy"].max()) < 1e-6
    assert node["entropy"].sizes["query"] == 12


def test_refusals():
    with pytest.raises(ValueError, match="split=16 leaves none of 8 channels"):
        PartialChannel(8, split=16)
    with pytest.raises(ValueError, match="24 channels do not divide evenly by heads=5"):
        PartialSelf(32, heads=5)
    with pytest.raises(ValueError, match="leaves none for one of the parts"):
        PartialSpatial(8, share=1.0)
    with pytest.raises(ValueError, match="one position has no deviation"):
        PartialChannel(8)(torch.randn(2, 8, 1, 1))
    with pytest.raises(ValueError, match="kind is 'channel' or 'self'"):
        cost(8, 8, 64, kind="spatial")
