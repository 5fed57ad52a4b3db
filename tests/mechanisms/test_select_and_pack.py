"""Selection and packing: rows by hand, exact and cut, the gate's gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from regard.mechanisms.select_and_pack import SelectAndPack, pack, select_and_pack, selection_loss


def counts(*kept, n=6):
    return torch.stack([torch.arange(n) < k for k in kept])


def test_rows_by_hand():
    """Of 3 and 4 kept tokens the second picture is cut after two, as rows hold 5."""
    found = pack(counts(3, 4), 5)
    assert found.at.tolist() == [[0, 1, 2, 6, 7], [8, 9, -1, -1, -1]]
    assert found.seen[0, 0].long().tolist() == [[1, 1, 1, 0, 0]] * 3 + [[0, 0, 0, 1, 1]] * 2
    assert found.seen[1, 0, :2].long().tolist() == [[1, 1, 0, 0, 0]] * 2
    whole = pack(counts(3, 4))
    assert whole.at.tolist() == [[0, 1, 2, -1], [6, 7, 8, 9]]


@pytest.mark.parametrize("length", [None, 4, 7, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_masked_map(length, dtype):
    """Values and gradients, with grouped heads and masked keys; the others get zeros."""
    leaves = [torch.randn(3, h, 20, 8, dtype=dtype).requires_grad_() for h in (4, 2, 2)]
    keep = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = torch.rand(3, 1, 1, 20, generator=torch.Generator().manual_seed(1)) < 0.8
    how = {"mask": mask, "scale": None, "keep": keep, "length": length}
    found = select_and_pack(*leaves, **how)
    right = select_and_pack.spec.weights(*leaves[:2], causal=False, **how) @ leaves[2].repeat_interleave(2, 1)
    near = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(found, right, **near)
    given = torch.randn_like(right)
    for ours, theirs in zip(torch.autograd.grad(found, leaves, given), torch.autograd.grad(right, leaves, given)):
        torch.testing.assert_close(ours, theirs, **near)
    assert not found.transpose(1, 2)[~(keep & mask[:, 0, 0])].any()


def test_rows_that_hold_all_cut_nothing():
    x = torch.randn(2, 2, 6, 4)
    exact, wide, narrow = (select_and_pack(x, x, x, keep=counts(3, 4), length=length) for length in (None, 7, 5))
    torch.testing.assert_close(wide, exact)
    torch.testing.assert_close(narrow[0], exact[0])
    assert not torch.allclose(narrow[1], exact[1])
    torch.testing.assert_close(select_and_pack(x, x, x), F.scaled_dot_product_attention(x, x, x))
    assert not select_and_pack(x, x, x, keep=counts(0, 0), length=5).any()


def test_the_gate_learns_also_of_what_it_left_out():
    torch.manual_seed(0)
    block = SelectAndPack(8, 2, length=5)
    hidden = torch.randn(2, 6, 8)
    found = block(hidden)
    assert torch.equal(found[~block.keep], hidden[~block.keep])
    assert 0 < block.keep.sum() < 12
    (grad,) = torch.autograd.grad(found[~block.keep].sum(), block.gate.weight)
    assert grad.any()
    block.eval()
    block(hidden)
    assert torch.equal(block.keep, block.score > 0)
    block(hidden, above=torch.full((2, 6), 99.0))
    assert block.keep.all()


def test_selection_loss_by_hand():
    scores = [torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])]
    found = selection_loss(scores, torch.tensor([[True, False]]))
    assert found.item() == pytest.approx(math.log(2) + (math.log(4 / 3) + math.log(2)) / 2)


def test_refusals():
    x = torch.randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match="scores > 0"):
        select_and_pack(x, x, x, keep=torch.rand(1, 4))
    with pytest.raises(ValueError, match="1 token or more"):
        select_and_pack(x, x, x, length=0)
