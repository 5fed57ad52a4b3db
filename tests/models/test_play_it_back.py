"""Play It Back: moments and replays by hand, slots that compete, a net that learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regard
from regard.models.play_it_back import PlayItBack, TimeSlots, chosen, loss, play_it_back, ranked, replay, segments

SIZES = {"time": 20, "channels": 16, "classes": 3, "latents": 4, "width": 16, "heads": 2, "blocks": 1}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_runs_and_pairs_by_hand():
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, [2, 3, 4, 7]] = True
    mask[1] = True
    assert segments(mask) == [[(2, 5), (7, 8)], [(0, 9)], []]
    assert segments(mask, pairs=True) == [[(2, 3), (4, 7)], [(0, 1), (2, 3), (4, 5), (6, 7), (8, 8)], []]


def test_what_is_chosen_by_hand():
    first, second = torch.tensor([0.0, 1, 0, 1]), torch.tensor([0.0, 0, 1, 1])
    # |second - 1| - first: 1, 0, 0, -1, as 0 to 1: 1, 1/2, 1/2, 0; the mean is 1/2
    slots = torch.stack([first, second])[None]
    assert chosen(slots).tolist() == [[True, False, False, False]]
    assert chosen(slots, sign=-1).tolist() == [[False, False, False, True]]
    assert not chosen(torch.ones(1, 2, 4)).any()


def test_a_replay_by_hand():
    coarse, fine = torch.arange(4.0).view(1, 1, 4), 10 + torch.arange(8.0).view(1, 1, 8)
    assert torch.equal(replay(coarse, fine, [[]]), coarse)
    whole = replay(coarse, fine, [[(0, 4)]])
    assert torch.equal(whole, F.interpolate(fine, 4))
    # 0, then 12 to 15 for the two in the middle, then 3: six, of which four are taken
    assert replay(coarse, fine, [[(1, 3)]]).tolist() == [[[0, 12, 14, 15]]]


@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_a_replay_is_as_long_as_before(ratio):
    coarse, fine = torch.randn(5, 3, 12), torch.randn(5, 3, 12 * ratio)
    assert replay(coarse, fine, segments(torch.rand(5, 12) > 0.6)).shape == coarse.shape


def test_slots_compete_for_channels():
    model = TimeSlots(6, 16)
    noise = torch.randn(2, 2, 16)
    features = torch.randn(2, 6, 5)
    found = model(features, noise=noise)
    torch.testing.assert_close(model(features[1:], noise=noise[1:]), found[1:])
    assert (model(features, noise=noise[:, [1, 0]])[:, [1, 0]] - found).abs().max() < 1e-5  # slots have no order
    with regard.record(model, "entropy") as recording:
        model(features)
    (node,) = recording.tree.children.values()
    assert dict(node["entropy"].sizes)["query"] == 2


def test_rounds_are_drawn_together_by_hand():
    assert ranked(torch.tensor([[0.2, 0.5, 0.4]])).item() == pytest.approx((0.35 + 0.15 + 0.25 / 2) / 3)
    assert ranked(torch.ones(2, 1)).tolist() == [0, 0]


def test_it_learns_from_what_only_the_finer_one_has():
    encoder = nn.Conv1d(8, 16, 1)
    model = PlayItBack(encoder, play_it_back(encoder, **SIZES, rounds=2).config)
    label = torch.randint(3, (24,))
    coarse = torch.zeros(24, 8, 20)
    fine = coarse.repeat(1, 1, 2) + F.one_hot(label, 8)[..., None]  # the class is nowhere else
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(80):
        torch.manual_seed(1)
        found = model([coarse, fine])
        losses.append(loss(found, label))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert any(found.parts[0])
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in model.parameters())
    assert model.slots[0].mean.grad.abs().max() > 0


def test_refusals():
    encoder = nn.Conv1d(8, 16, 4, 4)
    with pytest.raises(ValueError, match=r"2 spectrograms, the first of 20 frames; got \[\["):
        play_it_back(encoder, **SIZES, rounds=2)([torch.randn(2, 8, 20)])
    with pytest.raises(ValueError, match=r"whole multiple as long; got \[2, 8, 20\] and \[2, 8, 30\]"):
        replay(torch.randn(2, 8, 20), torch.randn(2, 8, 30), [[(0, 1)]] * 2)
    with pytest.raises(ValueError, match="sign 1 or -1"):
        play_it_back(encoder, **SIZES, sign=2)
    with pytest.raises(ValueError, match="compete for channels"):
        TimeSlots(1, 16)
