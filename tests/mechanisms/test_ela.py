"""Efficient local attention: what zero weights do, strips by hand, brightness, sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regard.mechanisms.ela import ELA, SIZES, cost


def test_without_weights_a_quarter_is_left():
    block, x = ELA(16), torch.randn(2, 16, 5, 6)
    nn.init.zeros_(block.rows[0].weight)
    torch.testing.assert_close(block(x), 0.25 * x)


def test_by_hand():
    """A kernel that passes the strip on: row means of -1 and 1 are normed to themselves, column means are all 0."""
    block = ELA(16)
    nn.init.zeros_(block.rows[0].weight)
    block.rows[0].weight.data[:, :, 3] = 1
    x = torch.ones(1, 16, 2, 4)
    x[:, :, 0] = -1
    rows = torch.tensor([-1.0, 1.0]).sigmoid()
    want = (0.5 * rows)[:, None].expand(2, 4)
    torch.testing.assert_close(block.maps(x)[0, 7], want, atol=1e-4, rtol=1e-4)


def test_rows_and_columns_are_treated_alike_where_shared():
    torch.manual_seed(0)
    x = torch.randn(2, 32, 5, 8)
    for shared in (True, False):
        block = ELA(32, size="T", shared=shared)
        assert torch.allclose(block(x.mT).mT, block(x), atol=1e-6) == shared


def test_brightness_changes_no_map():
    torch.manual_seed(0)
    block, x = ELA(16, size="S"), torch.randn(2, 16, 9, 8)
    torch.testing.assert_close(block.maps(100 * x), block.maps(10 * x), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(block.maps(x + x.roll(1, 2)), block.maps(x), atol=1e-2)


@pytest.mark.parametrize(("size", "each"), [("T", 7), ("B", 9), ("S", 42), ("L", 58)])
def test_sizes(size, each):
    assert sum(p.numel() for p in ELA(64, size=size).parameters()) == each * 64
    kernel, group, _ = SIZES[size]
    assert cost(3, 4, 64, size=size).operations == 64 * (4 * 12 + 2 * kernel * (group or 1) * 7)


def test_refusals():
    with pytest.raises(ValueError, match="size is one of T, B, S, L"):
        ELA(32, size="M")
    with pytest.raises(ValueError, match="size 'T' needs a multiple of 32 channels; got 48, which size 'B' takes"):
        ELA(48, size="T")
    with pytest.raises(ValueError, match="got 8, which no size takes"):
        ELA(8)
