"""Maps of words against the mask of their group."""

import pytest
import torch
from families import FAMILIES
from torch.nn.functional import avg_pool2d

from regard.objectives import collect
from regard.objectives.daring import by_head, daring


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand():
    weights = torch.tensor([[[[0.0, 0.5, 0.5], [0.5, 0.25, 0.25]]]])  # two pixels; words 1 and 2 are the group
    mask = torch.tensor([[[[1.0, 0.0]]]])
    assert float(daring(weights, mask, [[(1, 3)]])) == pytest.approx((0.5**2 + 0.25**2) / 2)
    assert float(daring(weights, torch.zeros(1, 1, 1, 2), [[(1, 3)]])) == pytest.approx((0.5**2 + 0.25**2) / 2)
    # words 0 and 1, and their mean: (0, .5), (.5, .25), (.25, .375)
    squares = (1 + 0.5**2 + 0.5**2 + 0.25**2 + 0.75**2 + 0.375**2) / 6
    assert float(daring(weights, mask, [[(0, 2)]])) == pytest.approx(squares)


def test_groups_count_by_their_maps():
    weights, masks = drawn(1, 2, 6, 5).softmax(-1), torch.rand(1, 2, 2, 3).double()
    one, two = (by_head(weights, masks, [g])[0] for g in ([(0, 1), None], [None, (2, 5)]))
    both = by_head(weights, masks, [[(0, 1), (2, 5)]])[0]
    torch.testing.assert_close(both, (2 * one + 4 * two) / 6)  # a word and its mean; three words and their mean


def test_zero_only_where_words_are_their_masks():
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    weights = torch.stack([mask.flatten(), 1 - mask.flatten()], -1)[None, None]
    assert float(daring(weights, mask, [[(0, 1)]])) == 0
    assert float(daring(weights, mask, [[(1, 2)]])) == 1


def test_masks_are_made_to_fit():
    small = torch.rand(1, 1, 3, 2).double()
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(avg_pool2d(large, 4), small)
    weights = drawn(1, 2, 6, 4).softmax(-1)
    expected = daring(weights, small, [[(1, 3)]])
    torch.testing.assert_close(daring(weights, large, [[(1, 3)]]), expected)
    torch.testing.assert_close(daring(weights, small[..., [0, 0, 1, 1]], [[(1, 3)]], grid=(3, 2)), expected)


def test_a_mask_is_read_between_its_pixels():
    mask = torch.tensor([0.0, 0.2, 0.4, 1.0]).expand(1, 1, 2, 4)  # two pixels wide and high each: 0.1 and 0.7
    weights = torch.tensor([[[[0.1, 0.9], [0.7, 0.3]]]])
    assert float(daring(weights, mask, [[(0, 1)]])) == pytest.approx(0, abs=1e-12)


def test_pictures_without_groups_are_left_out():
    weights = drawn(2, 3, 4, 5).softmax(-1).requires_grad_()
    masks, groups = torch.ones(2, 1, 2, 2), [[None], [(0, 2)]]
    heads = by_head(weights, masks, groups)
    assert heads.isnan().tolist() == [[True] * 3, [False] * 3]
    loss = daring(weights, masks, groups)
    torch.testing.assert_close(loss, heads[1].mean())
    (slope,) = torch.autograd.grad(loss, weights)
    assert not slope[0].any()
    assert not slope[1, ..., 2:].any()
    assert slope[1, ..., :2].all()
    none = daring(weights, masks, [[None], [None]])
    (slope,) = torch.autograd.grad(none, weights)
    assert float(none.detach()) == 0
    assert not slope.any()


def test_gradient_is_that_of_differences():
    masks = torch.rand(2, 2, 4, 6).double()
    groups = [[(0, 2), None], [(1, 2), (2, 5)]]
    assert torch.autograd.gradcheck(lambda s: daring(s.softmax(-1), masks, groups), drawn(2, 2, 6, 5).requires_grad_())


def test_heads_are_told_apart():
    weights, masks = drawn(1, 3, 4, 4).softmax(-1), torch.rand(1, 1, 2, 2).double()
    heads = by_head(weights, masks, [[(1, 3)]])
    torch.testing.assert_close(by_head(weights[:, [2, 0, 1]], masks, [[(1, 3)]]), heads[:, [2, 0, 1]])
    assert heads.unique().numel() == 3


def test_it_pulls_the_cross_attention_of_a_model():
    model, inputs = FAMILIES["t5"]()
    with collect(model, lambda call: call.weights.dense() if call.site.cross else None) as seen:
        model(**inputs)
    weights = torch.cat([s.value for s in seen], 1)  # sites joined along head
    masks = torch.ones(len(weights), 1, 1, weights.shape[2])
    groups = [[(1, 3)]] * len(weights)
    daring(weights, masks, groups, grid=(1, weights.shape[2])).backward()
    pulled = [model.get_submodule(s.site.name).q.weight.grad for s in seen]
    assert pulled
    assert all(g is not None and g.abs().sum() > 0 for g in pulled)


@pytest.mark.parametrize(
    ("weights", "masks", "groups", "match"),
    [
        ((1, 2, 4), (1, 1, 2, 2), [[(0, 1)]], "weights are"),
        ((2, 2, 4, 3), (1, 1, 2, 2), [[(0, 1)]], "weights are"),
        ((1, 2, 4, 3), (1, 1, 2, 2), [[(0, 1), None]], "1 masks and 2 groups"),
        ((1, 2, 4, 3), (1, 1, 2, 2), [[(1, 1)]], "at least one"),
        ((1, 2, 4, 3), (1, 1, 2, 2), [[(-1, 1)]], "among 3 tokens"),
        ((1, 2, 4, 3), (1, 1, 2, 2), [[(2, 4)]], "among 3 tokens"),
        ((1, 2, 5, 3), (1, 1, 4, 4), [[(0, 1)]], "do not fill"),
    ],
)
def test_what_does_not_fit_is_refused(weights, masks, groups, match):
    with pytest.raises(ValueError, match=match):
        daring(torch.ones(weights), torch.ones(masks), groups)
