"""Semiotic networks: an orbit by hand, limits where perceptualised and plain classifiers agree, and dialogues."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regard.models.semiotic_networks import Perceptualised, dialogue, observe, perceive, semiotic_networks


class Towards(nn.Module):
    """Half the way to a number."""

    def __init__(self, goal: float, share: float = 0.5) -> None:
        super().__init__()
        self.goal, self.share = nn.Parameter(torch.tensor(goal)), share

    def forward(self, x):
        return x + self.share * (self.goal - x)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_an_orbit_by_hand():
    found = observe(Towards(2.0), torch.zeros(1, 1, 1, 1), tolerance=0.3, orbit=True)
    assert found.orbit.flatten().tolist() == [0.0, 1.0, 1.5, 1.75]
    assert (found.rounds.item(), found.settled.item(), found.pictures.item()) == (3, True, 1.75)
    short = observe(Towards(2.0), torch.zeros(1, 1, 1, 1), tolerance=0.3, rounds=2)
    assert (short.rounds.item(), short.settled.item(), short.pictures.item()) == (2, False, 1.5)


def test_the_wildest_pixel_counts_and_each_picture_for_itself():
    pictures = torch.tensor([[2.0, 2.0], [2.0, 0.0], [1.9, 1.9]])[:, None, None]
    found = observe(Towards(2.0), pictures, tolerance=0.3)
    assert found.rounds.tolist() == [1, 3, 1]
    alone = torch.cat([observe(Towards(2.0), one[None], tolerance=0.3).pictures for one in pictures])
    torch.testing.assert_close(found.pictures, alone)
    torch.testing.assert_close(found.pictures[2], torch.full((1, 1, 2), 1.95))


def test_what_settled_stays_and_the_input_is_left_alone():
    pictures = torch.rand(3, 1, 4, 4)
    before = pictures.clone()
    found = observe(Towards(0.5), pictures, tolerance=1e-4)
    again = observe(Towards(0.5), found.pictures, tolerance=1e-4)
    assert again.rounds.tolist() == [1, 1, 1]
    torch.testing.assert_close(again.pictures, found.pictures, atol=1e-4, rtol=0)
    assert torch.equal(pictures, before)


def test_one_draw_without_noise_is_the_vanilla_form_and_the_identity_is_no_loop():
    pictures, classifier = torch.rand(3, 1, 4, 4), nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    vanilla = perceive(Towards(0.5), pictures, draws=1, noise=0.0)
    torch.testing.assert_close(vanilla, observe(Towards(0.5), pictures).pictures)
    plain = Perceptualised(classifier, nn.Identity(), draws=3, noise=0.0)
    torch.testing.assert_close(plain(pictures), classifier(pictures))


def test_variants_settle_before_their_mean_is_taken():
    def sign(x):
        return torch.where(x > 0, 1.0, -1.0)

    class Sign(nn.Module):
        forward = staticmethod(sign)

    pictures = torch.full((1, 1, 20, 20), 0.1)
    found = perceive(Sign(), pictures, draws=400, noise=0.3, generator=torch.Generator().manual_seed(0))
    share = 0.5 * (1 + torch.erf(torch.tensor(0.1 / 0.3 / 2**0.5)))  # of variants above 0
    assert found.mean().item() == pytest.approx(2 * share.item() - 1, abs=0.02)
    assert found.std() > 0.01  # the mean taken first would be 1 everywhere


def test_two_who_pull_apart_come_round_again():
    said = dialogue(Towards(1.0), Towards(0.0), torch.zeros(1, 1, 1, 1), turns=40, steps=(2, 1))
    first, second = said[-2].item(), said[-1].item()
    assert second == pytest.approx(first / 2)
    assert first == pytest.approx(second + 0.75 * (1 - second))
    assert said[0].item() == 0.75


def test_only_the_classifier_learns_and_what_it_saw_is_kept():
    model = semiotic_networks(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(16, 2)), Towards(0.5), rounds=2)
    model.train()
    assert model.classifier.training
    assert not model.autoencoder.training
    pictures = torch.rand(3, 1, 4, 4)
    model(pictures, generator=torch.Generator().manual_seed(0)).sum().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {"classifier.2.weight", "classifier.2.bias"}
    seen = model.seen.clone()
    model(pictures, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.seen, seen)
    model(pictures)
    assert not torch.equal(model.seen, seen)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: observe(nn.Flatten(), torch.rand(2, 1, 4, 4)), r"makes \[2, 16\] of \[2, 1, 4, 4\]"),
        (lambda: observe(nn.Identity(), torch.rand(2, 1, 4, 4), rounds=0), "one round"),
        (lambda: perceive(nn.Identity(), torch.rand(2, 1, 4, 4), draws=0), "one draw"),
        (lambda: semiotic_networks(nn.Identity(), nn.Identity(), rounds=0), "one draw and one round"),
        (lambda: dialogue(nn.Flatten(), nn.Identity(), torch.rand(2, 1, 4, 4), turns=1), "no picture"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()
