"""Context mixing: box means by hand, against convolution written out, what an overview lets every place see."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regard.mechanisms import overlock
from regard.mechanisms.overlock import ContextMix, ContextMixBlock, cost, mix


def uniform(block: ContextMix) -> ContextMix:
    for tensor in (block.make.weight, block.make.bias, block.offsets, block.offsets_small):
        nn.init.zeros_(tensor)
    return block.eval()


def test_without_weights_windows_are_averaged():
    """One half of the channels over 3 x 3, the other over 5 x 5; in the corner over the window shifted inside."""
    torch.manual_seed(0)
    block, x = uniform(ContextMix(8, kernel=5, small=3)), torch.randn(2, 8, 9, 8)
    value, mixed = block.value(x), block(x)
    small, large = F.avg_pool2d(value[:, :4], 3, 1), F.avg_pool2d(value[:, 4:], 5, 1)
    torch.testing.assert_close(mixed[:, :4, 1:-1, 1:-1], small)
    torch.testing.assert_close(mixed[:, 4:, 2:-2, 2:-2], large)
    torch.testing.assert_close(mixed[:, 4:, 0, 0], large[:, :, 0, 0])
    torch.testing.assert_close(mixed[:, :4, -1, 0], small[:, :, -1, 0])


@pytest.mark.parametrize("rows", [2**22, 1])
def test_mix_written_out(monkeypatch, rows):
    """Place by place; also a row at a time, gradients too."""
    monkeypatch.setattr(overlock, "ROWS", rows)
    value = torch.randn(1, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(1, 2, 5, 6, 9, dtype=torch.float64, requires_grad=True)
    want = torch.zeros(1, 4, 5, 6, dtype=torch.float64)
    for row in range(5):
        for column in range(6):
            top, left = min(max(row - 1, 0), 2), min(max(column - 1, 0), 3)
            window = value[0, :, top : top + 3, left : left + 3].flatten(1)
            for channel in range(4):
                want[0, channel, row, column] = window[channel] @ weights[0, channel // 2, row, column]
    found = mix(value, weights, 3)
    torch.testing.assert_close(found, want)
    given = torch.randn_like(want)
    for one, other in zip(
        torch.autograd.grad(found, (value, weights), given), torch.autograd.grad(want, (value, weights), given)
    ):
        torch.testing.assert_close(one, other)


def test_the_bias_goes_by_offset_also_where_windows_are_shifted():
    """All weight on the place itself: values come out as they are, at borders too."""
    block, x = uniform(ContextMix(8, kernel=5, small=3)), torch.randn(2, 8, 7, 6)
    block.offsets.data[:, 4, 4] = 1e4
    block.offsets_small.data[:, 2, 2] = 1e4
    torch.testing.assert_close(block(x), block.value(x))
    block.offsets.data[:, 4, 4] = 0
    block.offsets.data[:, 4, 5] = 1e4  # one column on
    torch.testing.assert_close(block(x)[:, 4:, :, :-1], block.value(x)[:, 4:, :, 1:])


def test_kernels_are_shares_and_every_place_sees_every_other():
    torch.manual_seed(0)
    block, x = ContextMix(8, kernel=5, small=3).eval(), torch.randn(1, 8, 21, 21, requires_grad=True)
    for kernels in block.kernels(x):
        torch.testing.assert_close(kernels.sum(-1), torch.ones(1, 4, 21, 21))
    block(x)[..., 0, 0].sum().backward()
    assert x.grad[..., -1, -1].any()


def test_context_guides():
    """Kernels are made of it, values are not; of any size."""
    torch.manual_seed(0)
    block, x = ContextMix(8, kernel=5, small=3).eval(), torch.randn(1, 8, 9, 9)
    context = torch.randn(1, 8, 5, 4)
    assert not torch.allclose(block(x, context), block(x))
    torch.testing.assert_close(block(x, x), block(x))
    assert not torch.allclose(ContextMixBlock(8, kernel=5, small=3).eval()(x, context), x)


def test_smaller_than_the_kernel():
    """Enlarged for the mixing: a constant map comes out as its values are."""
    block = uniform(ContextMix(8, kernel=7, small=3))
    x = torch.randn(1, 8, 1, 1).expand(1, 8, 4, 6)
    torch.testing.assert_close(block(x), block.value(x), atol=1e-5, rtol=1e-4)


def test_cost_and_refusals():
    assert cost(4, 4, 8, kernel=5, small=3).operations == 16 * (8 * 49 + 8 * 49 * 34 + 8 * 34 + 3 * 64)
    with pytest.raises(ValueError, match="kernels are odd, and the small one no larger"):
        ContextMix(8, kernel=4)
    with pytest.raises(ValueError, match="kernels are odd, and the small one no larger"):
        ContextMix(8, kernel=3, small=5)
    with pytest.raises(ValueError, match=r"12 channels do not divide evenly by 4 \* heads=8"):
        ContextMix(12)
    with pytest.raises(ValueError, match="kernel is one of 5, 7, 9, 13, 17; got 11"):
        ContextMixBlock(8, kernel=11)
    with pytest.raises(ValueError, match="holds no window of 5"):
        mix(torch.ones(1, 2, 3, 3), torch.ones(1, 1, 3, 3, 25), 5)
    with pytest.raises(ValueError, match="was made for 8 channels"):
        ContextMix(8, kernel=5)(torch.ones(1, 8, 9, 9), torch.ones(1, 4, 9, 9))
