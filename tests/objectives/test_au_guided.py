"""Features of a layer against maps of where the class shows."""

import pytest
import torch

from regard.objectives.au_guided import au_guided, channel_mean


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand():
    features = torch.tensor([[[[2.0, 0.0]], [[0.0, 0.0]]]])  # two channels, whose mean is (1, 0)
    assert float(au_guided(features, torch.ones(1, 1, 2))) == pytest.approx(1 - 0.5**0.5)
    assert float(au_guided(features, torch.tensor([[[1.0, 0.0]]]))) == pytest.approx(0)
    assert float(au_guided(-features, torch.tensor([[[3.0, 0.0]]]))) == pytest.approx(2)


def test_standardised_by_hand():
    features, cue = torch.tensor([[[[3.0, 1.0, 2.0]]]]), torch.tensor([[[1.0, 0.0, 0.0]]])
    # (1, -1, 0) over a deviation of 1
    assert float(au_guided(features, cue, standardised=True)) == pytest.approx(1 - 0.5**0.5)


def test_scale_is_free_and_offset_only_where_standardised():
    features, cue = drawn(2, 3, 4, 5), drawn(2, 4, 5, seed=1).abs()
    for standardised in (False, True):
        plain, moved = (au_guided(f, cue, standardised=standardised) for f in (features, features + 1))
        assert float(au_guided(7 * features, cue, standardised=standardised)) == pytest.approx(float(plain), rel=1e-3)
        assert (float(moved) == pytest.approx(float(plain))) == standardised


def test_features_of_zero_have_a_finite_gradient():
    features = torch.zeros(1, 2, 3, 3, requires_grad=True)
    for standardised in (False, True):
        loss = au_guided(features, torch.rand(1, 3, 3), standardised=standardised)
        (slope,) = torch.autograd.grad(loss, features)
        assert float(loss.detach()) == 1
        assert slope.isfinite().all()


def test_pictures_without_a_map_are_left_out():
    features, cue = drawn(3, 2, 4, 4).requires_grad_(), drawn(3, 8, 8, seed=1).abs()
    cue[1, 2, 3] = torch.inf
    loss = au_guided(features, cue)
    torch.testing.assert_close(loss, au_guided(features[::2], cue[::2]))
    (slope,) = torch.autograd.grad(loss, features)
    assert not slope[1].any()
    assert slope[0].any()
    none = au_guided(features, torch.full_like(cue, torch.nan))
    (slope,) = torch.autograd.grad(none, features)
    assert float(none.detach()) == 0
    assert not slope.any()


def test_gradient_is_that_of_differences():
    cue = drawn(2, 9, 7, seed=1).abs()
    for standardised in (False, True):
        assert torch.autograd.gradcheck(
            lambda f, s=standardised: au_guided(f, cue, standardised=s), drawn(2, 3, 4, 3).requires_grad_()
        )


def test_a_larger_map_is_made_smaller_as_in_the_code():
    # From 5 places to 3 with a step of (5 - 1) / (3 - 1) = 2: place i takes in triangles around 2 i + 1, 2 wide on
    # each side. Of the middle, at 2.5, they take 1 / 4 of 7 / 4, 3 / 4 of 2, and nothing.
    cue = torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0]]])
    found = torch.tensor([[[[1 / 7, 3 / 8, 0.0]]]])
    assert float(au_guided(found, cue)) == pytest.approx(0, abs=1e-6)


def test_tokens_lie_on_their_grid():
    features, cue = drawn(2, 5, 3, 4), drawn(2, 3, 4, seed=1)
    tokens = features.flatten(2).mT
    torch.testing.assert_close(channel_mean(tokens, grid=(3, 4)), features.mean(1))
    torch.testing.assert_close(au_guided(tokens, cue, grid=(3, 4)), au_guided(features, cue))


@pytest.mark.parametrize(
    ("shape", "cue", "options", "match"),
    [
        ((2, 3, 4), (2, 2, 2), {}, "with `grid`"),
        ((2, 3, 4), (2, 2, 2), {"grid": (2, 2)}, "as many tokens"),
        ((2, 3, 4, 4), (2, 2, 2), {"grid": (4, 4)}, "with `grid`"),
        ((2, 3, 4, 4), (3, 2, 2), {}, "for 2 pictures"),
        ((2, 3, 4, 4), (2, 1, 2, 2), {}, "cue is"),
        ((2, 3, 1, 1), (2, 2, 2), {"standardised": True}, "single place"),
    ],
)
def test_other_shapes_are_refused(shape, cue, options, match):
    with pytest.raises(ValueError, match=match):
        au_guided(torch.ones(shape), torch.ones(cue), **options)
