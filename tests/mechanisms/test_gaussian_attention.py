"""Gaussian weights: by hand, what they cannot know, and importance."""

from __future__ import annotations

import pytest
import torch

from regard.mechanisms.gaussian_attention import GaussianAttention, cost, importance


def layer(heads=1, gaussians=1, axis=-1, offset=0.0):
    made = GaussianAttention(heads, gaussians, axis).double()
    torch.nn.init.constant_(made.offsets, offset)
    torch.nn.init.ones_(made.widths)
    return made


def test_by_hand():
    """-1 and 1 are alike to a Gaussian at their mean; to one an offset of 1 above it the second is nearer."""
    features = torch.tensor([-1.0, 1.0]).double()
    assert layer()(features).tolist() == pytest.approx([-0.5, 0.5])
    assert layer(offset=1.0).weights(features).tolist() == pytest.approx([0.2689, 0.7311], abs=1e-4)


def test_a_product_of_gaussians_is_one():
    """Three of width 1 are one of width 1 / sqrt 3."""
    features, narrow = torch.randn(5, 8).double(), layer()
    torch.nn.init.constant_(narrow.widths, 3**-0.5)
    torch.testing.assert_close(layer(gaussians=3).weights(features), narrow.weights(features))


def test_knows_values_not_places():
    features, made = torch.randn(4, 9).double(), GaussianAttention(1, 2).double()
    order = torch.randperm(9)
    torch.testing.assert_close(made.weights(features[:, order]), made.weights(features)[:, order])
    plain = layer(gaussians=2)
    torch.testing.assert_close(plain.weights(features + 3), plain.weights(features))
    torch.nn.init.constant_(made.widths, 1e4)
    torch.testing.assert_close(made.weights(features), torch.full((4, 9), 1 / 9).double())


def test_axes_and_parts():
    """The last part takes the rest; another axis is the same, turned round; parts see nothing of each other."""
    features, made = torch.randn(3, 7, 4).double(), GaussianAttention(3, 2, axis=1).double()
    other = GaussianAttention(3, 2).double()
    other.load_state_dict(made.state_dict())
    torch.testing.assert_close(made(features), other(features.mT).mT)
    sums = torch.stack([p.sum(1) for p in made.weights(features).split([2, 2, 3], 1)])
    assert (sums <= 1 + 1e-9).all()
    changed = features.clone()
    changed[:, 4:] += torch.randn(3, 3, 4)
    torch.testing.assert_close(made.weights(changed)[:, :4], made.weights(features)[:, :4])


def test_far_from_all_features_weights_vanish():
    """Where densities sum to less than the least that is divided by; gradients are finite."""
    made = layer(offset=50.0)
    features = torch.randn(2, 6).double().requires_grad_()
    weights = made.weights(features)
    assert (weights.sum(-1) < 1e-6).all()
    weights.sum().backward()
    assert features.grad.isfinite().all()


def test_importance():
    weights = torch.tensor([[0.1, 0.3, 0.2], [0.3, 0.5, 0.2]])
    torch.testing.assert_close(importance(weights), torch.tensor([0.0, 1.0, 0.0]))
    assert not importance(torch.ones(4, 3)).any()


def test_refuses_and_cost():
    with pytest.raises(ValueError, match="2 or more features each"):
        GaussianAttention(4, 1)(torch.randn(2, 7))
    with pytest.raises(ValueError, match="1 or more of each"):
        GaussianAttention(0, 1)
    assert cost(64, 4, 3) == (192, 24)
