"""Windows that queries share: by hand, blocked and full ones, the paths that run them, and the simulator."""

from __future__ import annotations

import math

import pytest
import torch

from regard.mechanisms.gna import gna, simulate
from regard.mechanisms.neighborhood import neighborhood


def seen_by(n, causal=False, **knobs):
    zero = torch.zeros(1, 1, n, 1)
    weights = gna.spec.weights(zero, zero, causal=causal, mask=None, scale=1.0, **knobs)[0, 0]
    return [row.nonzero().flatten().tolist() for row in weights]


def test_by_hand():
    """The window of an even stride is that of the right one in the middle; an even window looks one further left."""
    four = [[0, 1, 2, 3]] * 2 + [[1, 2, 3, 4]] * 2 + [[3, 4, 5, 6]] * 2 + [[4, 5, 6, 7]] * 2
    assert seen_by(8, window=4, stride=2) == four
    assert seen_by(6, window=3, stride=3) == [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3
    # causal: of the window that ends with the last of the group, what the query may see; the last group is short
    assert seen_by(5, window=3, stride=2, causal=True) == [[0], [0, 1], [1, 2], [1, 2, 3], [2, 3, 4]]
    assert seen_by(8, window=2, stride=2, dilation=2) == [
        [0, 2],
        [1, 3],
        [0, 2],
        [1, 3],
        [4, 6],
        [5, 7],
        [4, 6],
        [5, 7],
    ]


CASES = [
    ((64, 64), {"window": 24, "stride": 8}),  # blocks of the engine
    ((40, 24), {"window": 8, "stride": 8}),
    ((20, 27), {"window": (12, 11), "stride": (5, 6)}),  # tiles laid out
    ((19, 30), {"window": 7, "stride": (2, 3)}),  # the kernel of lanes
    ((19, 30), {"window": (5, 7), "stride": (2, 3), "causal": (True, False)}),
    ((8, 9, 16), {"window": 4, "stride": (4, 2, 4)}),
    ((130,), {"window": 9, "stride": 4, "dilation": 3}),
]


@pytest.mark.parametrize(("shape", "knobs"), CASES)
def test_equals_the_masked_map(shape, knobs):
    """Values and gradients, whichever path runs it; also where padding makes the picture smaller."""
    torch.manual_seed(0)
    n = math.prod(shape)
    there = torch.zeros(2, *shape, dtype=torch.bool)
    there[0], there[1, 1:-2] = True, True
    for mask in (None, there.flatten(1)[:, None, None]) if n < 2000 else (None,):
        leaves = [torch.randn(2, 2, n, 8, requires_grad=True) for _ in range(3)]
        settings = {"shape": shape, "causal": False, "mask": mask, "scale": None, **knobs}
        found, right = gna(*leaves, **settings), gna.spec.weights(*leaves[:2], **settings) @ leaves[2]
        given = torch.randn_like(right)
        ours, theirs = ([o, *torch.autograd.grad(o, leaves, given)] for o in (found, right))
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_stride_one_slides_and_a_whole_window_is_full_attention():
    query, key, value = torch.randn(3, 1, 2, 11 * 13, 8)
    knobs = {"shape": (11, 13), "window": (3, 5), "dilation": (2, 1), "causal": (True, False)}
    assert torch.equal(gna(query, key, value, **knobs), neighborhood(query, key, value, **knobs))
    full = (query @ key.mT * 8**-0.5).softmax(-1) @ value
    torch.testing.assert_close(gna(query, key, value, shape=(11, 13), window=(11, 13), stride=2), full)


def test_simulator_by_hand():
    """64 tokens in tiles of 8: 24 keys are 3 tiles of 8; 16 lie across 3, which is not what operations say."""
    bound = simulate((64,), 24, 8, query_tile=8, key_tile=8)
    assert (bound.most, bound.total, bound.perfect) == (3, 8, True)
    assert bound.speedup == bound.flops == pytest.approx(8 / 3)
    bound = simulate((64,), 16, 8, query_tile=8, key_tile=8)
    assert (bound.most, bound.perfect, bound.flops) == (3, False, 4.0)
    assert simulate((64,), 16, 8, query_tile=8, key_tile=8, dynamic=True).speedup == 4.0
    square = simulate((64, 64), 24, 8, query_tile=8, key_tile=8)
    assert (square.most, square.total, len(square.visited)) == (9, 64, 64)
    # in one line of tokens a tile of 8 is part of a row, whose window takes 3 of them in each of 24 rows
    assert simulate((16, 16), 8, 8, query_tile=8, key_tile=8, flat=True).most == 8


def test_refusals():
    x = torch.randn(1, 1, 12, 4)
    with pytest.raises(ValueError, match="stride is at most the window"):
        gna(x, x, x, window=3, stride=4)
    with pytest.raises(ValueError, match="lies within the axis"):
        gna(x, x, x, window=7, stride=2, dilation=2)
    with pytest.raises(ValueError, match="1 or more"):
        gna(x, x, x, stride=0)
    with pytest.raises(ValueError, match="with stride 1"):
        gna(x[:, :, :1], x, x, window=4, stride=2, causal=True)
    with pytest.raises(ValueError, match="1 token or more"):
        simulate((8,), 3, query_tile=0, key_tile=2)
