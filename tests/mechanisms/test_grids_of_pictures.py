"""Windows under other names: those of freeswim, and of regional attention with its shadow."""

from __future__ import annotations

import math

import pytest
import torch

from regard.mechanisms.freeswim import freeswim
from regard.mechanisms.neighborhood import neighborhood
from regard.mechanisms.regional_attention import regional_attention


def test_freeswim_by_hand():
    """Six rows, trained on 3: row 0 sees 0 to 2, row 3 sees 2 to 4, row 5 sees 3 to 5."""
    zero = torch.zeros(1, 1, 6, 1)
    settings = {"causal": False, "mask": None, "scale": 1.0, "shape": (1, 6, 1), "train_shape": (3, 2)}
    weights = freeswim.spec.weights(zero, zero, **settings)[0, 0]
    assert [weights[i].nonzero().flatten().tolist() for i in (0, 3, 5)] == [[0, 1, 2], [2, 3, 4], [3, 4, 5]]


def test_freeswim_is_a_window_with_a_scale_of_its_own():
    query, key, value = torch.randn(3, 1, 2, 2 * 9 * 11, 8)
    shape = (2, 9, 11)
    found = freeswim(query, key, value, shape=shape, train_shape=(4, 6))
    longer = math.sqrt(math.log(2 * 24) / math.log(24))
    right = neighborhood(query, key, value, shape=shape, window=(2, 5, 7), scale=8**-0.5 * longer)
    torch.testing.assert_close(found, right)
    plain = freeswim(query, key, value, shape=shape, train_shape=(9, 11), tokens_ratio=1.0)
    torch.testing.assert_close(plain, (query @ key.mT * 8**-0.5).softmax(-1) @ value, atol=1e-5, rtol=1e-5)


def test_freeswim_refuses():
    x = torch.randn(1, 1, 12, 4)
    with pytest.raises(ValueError, match="frames, rows and columns"):
        freeswim(x, x, x, shape=(12,))
    with pytest.raises(ValueError, match="has 24 positions"):
        freeswim(x, x, x, shape=(2, 3, 4))
    with pytest.raises(ValueError, match="above 1"):
        freeswim(x, x, x, tokens_ratio=0.0)
    with pytest.raises(ValueError, match="half_window is 0 or more"):
        freeswim(x, x, x, half_window=(-1, 2))


def test_regional_by_hand():
    """Five pixels, window 3, two apart: pixel 2 sees 0, 2, 4, and so does pixel 0, whose window is moved inside."""
    zero = torch.zeros(1, 1, 5, 1)
    settings = {"causal": False, "mask": None, "scale": 1.0, "window": 3, "dilation": 2}
    weights = regional_attention.spec.weights(zero, zero, **settings)[0, 0]
    assert [weights[i].nonzero().flatten().tolist() for i in (0, 2)] == [[0, 2, 4]] * 2
    # in the shadow: 0 and 2, which see 4 alone; pixels 1 and 3 see each other
    value = torch.arange(5.0)[None, None, :, None]
    dark = torch.tensor([[True, False, True, False, False]])
    found = regional_attention(zero, zero, value, window=3, region=dark, lit_only=True)
    assert found.flatten().tolist() == [4.0, 2.0, 4.0, 2.0, 4.0]
    dark = torch.tensor([[True, False, True, False, True]])  # no lit one in reach: all are seen
    found = regional_attention(zero, zero, value, window=3, region=dark, lit_only=True)
    assert found.flatten().tolist() == [2.0] * 5


def test_regional_is_a_window_and_its_shadow_a_mask():
    torch.manual_seed(0)
    leaves = [torch.randn(2, h, 14 * 16, 8, requires_grad=True) for h in (4, 2, 2)]
    knobs = {"shape": (14, 16), "window": 5, "dilation": 2}
    query, key, value = leaves
    assert torch.equal(regional_attention(*leaves, **knobs), neighborhood(*leaves, **knobs))
    dark = torch.rand(2, 224) < 0.9
    nothing = regional_attention(*leaves, **knobs, region=torch.zeros_like(dark), lit_only=True)
    torch.testing.assert_close(nothing, neighborhood(*leaves, **knobs))
    mask = torch.rand(2, 1, 1, 224) < 0.8
    settings = {**knobs, "region": dark, "lit_only": True, "mask": mask, "scale": None}
    found = regional_attention(*leaves, **settings)
    weights = regional_attention.spec.weights(query, key, causal=False, **settings)
    right = weights @ value.repeat_interleave(2, 1)
    given = torch.randn_like(right)
    ours, theirs = ([o, *torch.autograd.grad(o, leaves, given)] for o in (found, right))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_regional_refuses():
    x = torch.randn(1, 1, 12, 4)
    with pytest.raises(ValueError, match="lit_only needs region"):
        regional_attention(x, x, x, lit_only=True)
    with pytest.raises(ValueError, match="region is boolean"):
        regional_attention(x, x, x, region=torch.zeros(1, 12), lit_only=True)
    with pytest.raises(ValueError, match="1 or more"):
        regional_attention(x, x, x, window=0)
