"""Blocks on feature maps keep the contract: any size, each picture by itself, gradients, refusals, sites."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from torch import nn

import regard
from regard.mechanisms import (
    attention_in_attention,
    bevanet,
    davit,
    ela,
    guided_context_gating,
    overlock,
    partial_attention,
    triplet,
    ulsam,
)
from regard.sites import find

BLOCKS = {
    "ULSAM": lambda: ulsam.ULSAM(32),
    "ELA": lambda: ela.ELA(32),
    "Triplet": lambda: triplet.Triplet(),
    "GuidedContextGating": lambda: guided_context_gating.GuidedContextGating(32),
    "AttentionInAttention": lambda: attention_in_attention.AttentionInAttention(32),
    "PartialChannel": lambda: partial_attention.PartialChannel(32),
    "PartialSpatial": lambda: partial_attention.PartialSpatial(32),
    "PartialSelf": lambda: partial_attention.PartialSelf(32, heads=3, dropout=0.0),
    "SparseKernel": lambda: bevanet.SparseKernel(32, kernel=11),
    "SeparableKernel": lambda: bevanet.SeparableKernel(32, kernel=11),
    "VisualBlock": lambda: bevanet.VisualBlock(32, kernel=11),
    "LargeKernelPyramid": lambda: bevanet.LargeKernelPyramid(32, 8, 32),
    "ContextMix": lambda: overlock.ContextMix(32, kernel=5, small=3),
    "ContextMixBlock": lambda: overlock.ContextMixBlock(32, kernel=5, small=3, scale=1.0),
    "ChannelBlock": lambda: davit.ChannelBlock(32, 4),
    "WindowBlock": lambda: davit.WindowBlock(32, 4, window=4),
}
SITES = {"PartialSelf": "attention", "WindowBlock": "attention"}
ROWS = (ulsam, ela, triplet, guided_context_gating, attention_in_attention, partial_attention, bevanet, overlock, davit)


def made(name: str) -> nn.Module:
    """With batch norms that have seen something, and layer scales at which a layer counts."""
    torch.manual_seed(0)
    block = BLOCKS[name]()
    with torch.no_grad():
        for layer in block.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(std=0.1)
                layer.running_var.uniform_(0.5, 1.5)
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block.double().eval()


@pytest.mark.parametrize("name", BLOCKS)
def test_each_picture_by_itself_at_any_size(name):
    block = made(name)
    for size in ((9, 11), (8, 7)):
        x = torch.randn(3, 32, *size, dtype=torch.float64)
        output = block(x)
        assert output.shape == x.shape
        assert not torch.allclose(output, x)
        torch.testing.assert_close(block(x[[2, 0]]), output[[2, 0]])


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients(name):
    """Of the input, against finite differences; every parameter gets one."""
    block = made(name)
    x = torch.randn(1, 32, 7, 8, dtype=torch.float64, requires_grad=True)
    given, way = torch.randn_like(x), torch.randn_like(x)
    (block(x) * given).sum().backward()
    step = 1e-6
    with torch.no_grad():
        ahead, behind = ((block(x + side * step * way) * given).sum() for side in (1, -1))
    torch.testing.assert_close((x.grad * way).sum(), (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    assert sum(bool(p.grad.any()) for p in block.parameters()) >= 0.9 * len(list(block.parameters()))


@pytest.mark.parametrize("name", BLOCKS)
def test_refuses_what_is_no_feature_map(name):
    block = BLOCKS[name]()
    with pytest.raises(ValueError, match=r"takes feature maps.*tokens.mT.unflatten"):
        block(torch.randn(2, 49, 32))
    with pytest.raises(ValueError, match="floating-point feature maps"):
        block(torch.ones(2, 32, 8, 8, dtype=torch.long))
    if name != "Triplet":  # which takes any number
        with pytest.raises(ValueError, match=r"was made for 32 channels.*\[2, 16, 8, 8\]"):
            block(torch.randn(2, 16, 8, 8))


@pytest.mark.parametrize("name", BLOCKS)
def test_half_precision_and_training(name):
    block = BLOCKS[name]().to(torch.bfloat16)
    assert block(torch.randn(2, 32, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    block = BLOCKS[name]()
    x = torch.randn(4, 32, 8, 8)
    assert block(x).isfinite().all()  # batch statistics


@pytest.mark.parametrize("name", BLOCKS)
def test_only_softmax_over_tokens_is_a_site(name):
    """Also in a model that has attention elsewhere, which is recorded as if the block were not there."""
    block = made(name)
    names = {site.name for site in find(block).values()}
    assert names == ({SITES[name]} if name in SITES else set())

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.tokens = BLOCKS[name](), nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x):
            x = self.block(x).flatten(2).mT
            return self.tokens(x, x, x)[0]

    model = Model().eval()
    x = torch.randn(2, 32, 6, 6)
    with torch.no_grad():
        want = model(x)
        with regard.record(model, "entropy") as recording:
            got = model(x)
    torch.testing.assert_close(got, want)
    found = [node for node in recording.tree.subtree if "entropy" in node.data_vars]
    assert found
    assert all(node["entropy"].notnull().any() for node in found)


@pytest.mark.parametrize("row", ROWS)
def test_examples(row):
    assert not doctest.testmod(importlib.import_module(row.__name__)).failed
