"""Landmarks: worked values, sections of any length, blocks fetched."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from regard.mechanisms.landmark import insert, landmark


def tensors(n, batch=2):
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(batch, h, n, 4, generator=generator, dtype=torch.float64).requires_grad_() for h in (4, 2, 2)]


def weights(marks):
    zero = torch.zeros(1, 1, marks.shape[1], 2)
    return landmark.spec.weights(zero, zero, causal=True, mask=None, scale=1.0, landmarks=marks)[0, 0]


def test_scores_of_zero():
    """Of a, b, landmark, c the last gives half to itself and half to the landmark, which a and b share."""
    found = weights(torch.tensor([[False, False, True, False]]))
    assert found[3].tolist() == [0.25, 0.25, 0.0, 0.5]
    assert found[2].tolist() == [0.5, 0.5, 0.0, 0.0]  # the landmark sees its block, and not itself
    lone = weights(torch.tensor([[False, True, True, False]]))
    assert lone[2].tolist() == [1.0, 0.0, 0.0, 0.0]  # its own block is empty
    assert lone[3].tolist() == [pytest.approx(1 / 3), 0.0, 0.0, pytest.approx(1 / 3)]  # an empty block's share is lost
    assert not weights(torch.tensor([[True, False]]))[0].any()  # nothing to see


def test_blocks_share_alike_whatever_their_size():
    marks = torch.zeros(1, 9, dtype=torch.bool)
    marks[0, [1, 7]] = True
    last = weights(marks)[-1]
    torch.testing.assert_close(torch.stack([last[0], last[2:7].sum(), last[8]]), torch.full((3,), 1 / 3))


@pytest.mark.parametrize("top", [None, 1, 2, 9])
def test_sections_of_any_length(top):
    """Values and gradients beside the dense form; of more keys than queries too, with gaps."""
    query, key, value = leaves = tensors(31)
    marks = torch.rand(2, 31, generator=torch.Generator().manual_seed(3)) < 0.2
    marks[1] = False
    there = torch.rand(2, 1, 1, 31, generator=torch.Generator().manual_seed(4)) < 0.8
    for mask in (None, there):
        how = {"causal": True, "mask": mask, "scale": 0.9, "landmarks": marks, "top": top}
        found = landmark(query, key, value, **how)
        right = landmark.spec.weights(query, key, **how) @ value.repeat_interleave(2, 1)
        torch.testing.assert_close(found, right)
        given = torch.randn_like(right)
        for ours, theirs in zip(torch.autograd.grad(found, leaves, given), torch.autograd.grad(right, leaves, given)):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(landmark(query[:, :, 20:], key, value, **how), found[:, :, 20:])
    torch.testing.assert_close(  # no landmarks in the second row: plain attention
        landmark(query, key, value, landmarks=marks, top=top)[1:],
        F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[1:],
    )


def test_landmarks_stand_after_each_block():
    assert insert(torch.arange(5)[None], 9, block=2).tolist() == [[0, 1, 9, 2, 3, 9, 4]]
    query, key, value = tensors(11)
    marks = (insert(torch.zeros(2, 8, dtype=torch.long), 1, block=2) == 1)[:, :11]
    torch.testing.assert_close(landmark(query, key, value, block=2), landmark(query, key, value, landmarks=marks))


def test_refusals():
    x = torch.randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match="boolean"):
        landmark(x, x, x, landmarks=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="no key is a landmark"):
        landmark(x, x, x, landmarks=torch.zeros(1, 4, dtype=torch.bool), top=1)
    with pytest.raises(ValueError, match="1 or more are fetched"):
        landmark(x, x, x, top=0)
