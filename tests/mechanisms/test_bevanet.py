"""Sparse large kernels: the support of one layer, selection and fusion by hand, the identity they begin as."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regard.mechanisms.bevanet import (
    BoundaryFusion,
    KernelSelection,
    LargeKernelPyramid,
    SeparableKernel,
    SparseKernel,
    VisualBlock,
    cost,
    fused,
)


class Sum(nn.Module):
    """In place of the selection, without its view of the whole map."""

    def forward(self, *maps):
        return sum(maps)


@pytest.mark.parametrize(("kernel", "small"), [(7, 3), (11, 3), (23, 5), (35, 5)])
def test_support_is_a_cross(kernel, small):
    """All of a bar along the row and one along the column, as wide as the small kernel, and nothing else."""
    block = SparseKernel(1, kernel=kernel)
    block.select = Sum()
    x = torch.ones(1, 1, 41, 41, requires_grad=True)
    block.mix(block.select(s := block.small(x), block.along_row(s), block.along_column(s)))[0, 0, 20, 20].backward()
    seen = x.grad[0, 0] != 0
    off = (torch.arange(41) - 20).abs()
    along, across = off[None] <= kernel // 2, off[:, None] <= small // 2
    bar = along & across
    assert torch.equal(seen, bar | bar.mT)
    assert seen.sum() == 2 * kernel * small - small**2


def test_without_mixing_the_input_is_multiplied_by_the_bias():
    x = torch.randn(2, 8, 9, 9)
    for block in (SparseKernel(8, kernel=7), SeparableKernel(8, kernel=7)):
        nn.init.zeros_(block.mix.weight)
        nn.init.ones_(block.mix.bias)
        torch.testing.assert_close(block(x), x)


def test_separable_strips_stand_one_after_another():
    """All weights 1, no bias: a box of the kernel's width, which all but dilation gaps fill."""
    block = SeparableKernel(1, kernel=7)
    for layer in (*block.strips, block.mix):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = torch.ones(1, 1, 21, 21)
    assert block(x)[0, 0, 10, 10] == (3 * 3) ** 2


def test_selection_by_hand():
    """Without weights channel weights are sigmoid(0) = 1/2 and places 1/2: a quarter of the sum; ReLU: never below."""
    select = KernelSelection(4).eval()
    for layer in select.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    maps = [torch.randn(2, 4, 5, 5) for _ in range(3)]
    torch.testing.assert_close(select(*maps), sum(maps) / 4)
    nn.init.constant_(select.expand[0][1].bias, -5.0)
    torch.testing.assert_close(select(*maps), sum(maps) / 4)
    nn.init.constant_(select.expand[0][1].bias, 50.0)
    torch.testing.assert_close(select(*maps), maps[0] / 2 + (maps[1] + maps[2]) / 4, atol=1e-4, rtol=1e-4)


def test_a_block_begins_close_to_the_identity():
    torch.manual_seed(0)
    block, x = VisualBlock(16, kernel=7).eval(), torch.randn(2, 16, 9, 9)
    assert (block(x) - x).norm() < 0.3 * x.norm()
    nn.init.zeros_(block.scale)
    nn.init.zeros_(block.scale_mlp)
    assert torch.equal(block(x), x)


def test_fusion_by_hand():
    """Details of 1, semantics of 3, an undecided boundary: 0.5 + 1.5 + 1 + 3."""
    one = torch.ones(1, 1, 2, 2)
    assert torch.equal(fused(one, 3 * one, 0 * one), 6 * one)
    torch.testing.assert_close(fused(one, 3 * one, 50 * one), 5 * one)  # all details: 1 + 1 + 3
    block = BoundaryFusion(4).eval()
    detail, semantic, boundary = (torch.randn(2, 4, 6, 5) for _ in range(3))
    want = block.output(fused(block.of_detail(detail), block.of_semantic(semantic), boundary))
    assert torch.equal(block(detail, semantic, boundary), want)
    with pytest.raises(ValueError, match="BoundaryFusion: was made for 4 channels"):
        block(detail, semantic[:, :2], boundary)


def test_pyramid_sees_the_whole_map():
    block = LargeKernelPyramid(6, 4, 5).eval()
    x = torch.randn(1, 6, 32, 40, requires_grad=True)
    output = block(x)
    assert output.shape == (1, 5, 32, 40)
    output[0, :, 0, 0].sum().backward()
    assert x.grad[0, :, -1, -1].any()


def test_cost_and_refusals():
    assert cost(8, 8, 64).operations == 2 * 64 * (64 * (25 + 22) + 64**2 + 294)
    with pytest.raises(ValueError, match="two pictures or more"):
        SparseKernel(8)(torch.randn(1, 8, 9, 9))
    with pytest.raises(ValueError, match="SparseKernel: kernel is one of 7, 11, 23, 35; got 53"):
        SparseKernel(8, kernel=53)
    with pytest.raises(ValueError, match="kernel is one of 7, 11, 23, 35, 41, 53; got 9"):
        SeparableKernel(8, kernel=9)
