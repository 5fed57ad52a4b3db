"""Voxels as agents: rewards by hand, clicks where the errors are, supervoxels that follow edges, an episode's loss."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from regard.models.supervoxel_agents import (
    VoxelAgents,
    boundary_weights,
    episode_loss,
    marked,
    refine,
    rewards,
    simulated_clicks,
    supervoxel_agents,
    supervoxels,
)

SHAPE = 4, 8, 8


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def model(**knobs):
    return supervoxel_agents(**{"width": 4, "dilations": (1, 2), **knobs})


def scene(n=2):
    truth = torch.zeros(n, *SHAPE)
    truth[:, 1:3, 2:6, 2:6] = 1
    grey = truth + 0.05 * torch.randn(n, *SHAPE)
    return grey, truth, (0.3 + 0.4 * torch.rand(n, *SHAPE))


def test_rewards_by_hand():
    before, truth = torch.tensor([0.5, 0.5, 0.95]), torch.tensor([1.0, 0.0, 1.0])
    after = torch.tensor([0.9, 0.9, 1.0])
    found = rewards(before, after, truth)
    torch.testing.assert_close(found[:2], torch.tensor([0.5878, -1.6094]), atol=1e-4, rtol=0)
    assert float(found[2]) == pytest.approx(-math.log(0.95), abs=1e-5)
    weights = torch.tensor([1.0, 0.5, 0.0])
    torch.testing.assert_close(rewards(before, after, truth, weights, weight=2.0), found * torch.tensor([3.0, 2, 1]))
    torch.testing.assert_close(rewards(before, after, truth, weights, weight=0.0), found)
    last = F.binary_cross_entropy(after, truth, reduction="none").clamp_max(20)
    torch.testing.assert_close(rewards(before, after, truth, kind="absolute"), -last, atol=1e-5, rtol=1e-5)
    assert rewards(torch.ones(1), torch.zeros(1), torch.ones(1)).isfinite().all()


def test_returns_without_discount_are_what_the_whole_episode_won():
    grey, truth, coarse = scene()
    agents = model()
    path = refine(agents, grey, coarse, lambda p: simulated_clicks(p, truth), rounds=3)
    won = sum(rewards(a, b, truth) for a, b in itertools.pairwise(path))
    torch.testing.assert_close(won, rewards(path[0], path[-1], truth), atol=1e-5, rtol=1e-4)


def test_actions_change_by_their_amount_and_stay_probabilities():
    now = torch.tensor([0.95, 0.5, 0.05])
    agents = model()
    torch.testing.assert_close(agents.moved(now, torch.tensor([5, 0, 0])), torch.tensor([1.0, 0.1, 0.0]))
    torch.testing.assert_close(agents.moved(now, torch.tensor([2, 3, 4])), torch.tensor([0.85, 0.6, 0.25]))


def test_clicks_are_in_the_middle_of_the_largest_errors():
    truth, said = torch.zeros(2, 5, 9, 9), torch.zeros(2, 5, 9, 9)
    truth[0, 1:4, 1:4, 1:4] = 1  # missed, 27 voxels
    said[0, 1:4, 5:7, 5:7] = 1  # not there, 12 voxels
    said[0, 0, 8, 0] = 1
    first, second = simulated_clicks(said, truth, 2)
    assert first.tolist()[0] == [2, 2, 2, 1]
    assert first.tolist()[1][3] == 0
    assert said[0][tuple(first[1, :3])] == 1
    assert second.shape == (0, 4)  # nothing is wrong
    assert simulated_clicks(said, truth, 6)[0].tolist()[2] == [0, 8, 0, 0]
    # one region missed and one made up that touch are two
    said = torch.zeros(1, 1, 4, 4)
    said[..., 2:] = 1
    assert [c[3] for c in simulated_clicks(said, 1 - said, 6)[0].tolist()] == [1, 0]


def test_supervoxels_follow_edges_and_cover_all():
    grey = torch.zeros(1, 4, 8, 8)
    grey[..., 3:] = 1.0  # an edge that is not at a cell's border
    sharp = supervoxels(grey, 4, compactness=0.05)
    assert not set(sharp[..., :3].unique().tolist()) & set(sharp[..., 3:].unique().tolist())
    flat = supervoxels(grey, 4, compactness=1e6)
    assert flat.unique().numel() == 4
    assert torch.equal(flat[0, 0, :, 3], flat[0, 0, :, 0])  # by place alone, the edge counts nothing
    line = torch.ones(1, 1, 1, 16)
    line[..., :4], line[..., 15] = 0, 0  # its last is as grey as the first supervoxel, which is too far away
    assert supervoxels(line, 4, compactness=0.01)[0, 0, 0, 15] >= 2
    both = torch.cat([grey, torch.rand(1, 4, 8, 8)])
    assert torch.equal(supervoxels(both, 4, compactness=0.05)[:1], sharp)


def test_boundary_weights_by_hand():
    truth = (torch.arange(8) >= 4).float().expand(1, 1, 3, 8)
    away = torch.tensor([3.5, 2.5, 1.5, 0.5, 0.5, 1.5, 2.5, 3.5])
    torch.testing.assert_close(boundary_weights(truth, reach=1.5)[0, 0, 0], (-(away**2) / 4.5).exp())
    assert not boundary_weights(torch.ones(1, 1, 3, 8)).any()


def test_a_click_marks_its_supervoxel_and_the_last_one_counts():
    regions = (torch.arange(8) // 4).expand(1, 1, 3, 8)
    hints = marked(torch.zeros(1, 2, 1, 3, 8), regions, [torch.tensor([[0, 1, 2, 1], [0, 0, 5, 0]])])
    assert torch.equal(hints[0, 0], (regions[0] == 0).float())
    assert torch.equal(hints[0, 1], (regions[0] == 1).float())
    turned = marked(hints, regions, [torch.tensor([[0, 2, 7, 1]])])
    assert turned[0, 0].all()
    assert not turned[0, 1].any()
    assert hints[0, 1].any()  # those given are left as they were


def test_refining_asks_the_user_only_and_each_volume_is_its_own():
    grey, truth, coarse = scene()
    agents, asked = model(), []

    def user(p):
        asked.append(p)
        return simulated_clicks(p, truth[: len(p)])

    found = refine(agents, grey, coarse, user, rounds=3)
    assert len(found) == 4
    assert len(asked) == 3
    assert torch.equal(asked[0], coarse)
    for before, after in itertools.pairwise(found):
        change = (after - before).abs()
        inside = (after > 0) & (after < 1)
        amounts = torch.tensor([0.1, 0.2, 0.4])
        assert ((change[inside][:, None] - amounts).abs().amin(1) < 1e-5).all()
    alone = refine(agents, grey[:1], coarse[:1], user, rounds=3)
    torch.testing.assert_close(alone[-1], found[-1][:1])


def test_hints_reach_only_as_far_as_the_trunk_sees():
    agents, state = model(), torch.rand(1, 4, 4, 12, 12)
    other = state.clone()
    other[0, 2, 0, 0, 0] += 1
    changed = (agents(state)[0] != agents(other)[0]).any(1)[0]
    assert changed[:, :4, :4].any()
    assert not changed[:, 4:].any()
    assert not changed[:, :, 4:].any()


def test_two_rounds_of_the_loss_by_hand():
    grey, truth, coarse = scene(1)
    agents, regions = model(), supervoxels(grey)
    clicks = simulated_clicks(coarse, truth)
    weights = boundary_weights(truth)
    found = episode_loss(
        agents, grey, coarse, truth, lambda p: clicks, rounds=2, regions=regions, boundary=weights, entropy=0.1,
        gamma=0.5, generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    draws, now, parts = torch.Generator().manual_seed(3), coarse, []
    for _ in range(2):
        state = torch.cat([grey[:, None], now[:, None], marked(torch.zeros(1, 2, *SHAPE), regions, clicks)], 1)
        logits, value = agents(state)
        flat = logits.softmax(1).movedim(1, -1).flatten(0, -2)
        actions = torch.multinomial(flat, 1, generator=draws).view_as(now)
        after = agents.moved(now, actions)
        entropy = torch.distributions.Categorical(logits=logits.movedim(1, -1)).entropy().mean()
        log = logits.log_softmax(1).gather(1, actions[:, None])[:, 0]
        parts.append((rewards(now, after, truth, weights), value, log, entropy))
        now = after
    expected = torch.zeros(())
    for won, value, log, entropy in ((parts[0][0] + 0.5 * parts[1][0], *parts[0][1:]), parts[1]):
        gain = won - value
        expected = expected + (-(log * gain.detach()).mean() + 0.5 * gain.square().mean() - 0.1 * entropy) / 2
    torch.testing.assert_close(found, expected)


def test_agents_learn_what_is_bright():
    grey, truth, coarse = scene()
    agents = model(width=8)
    optimiser, draws = torch.optim.Adam(agents.parameters(), 0.01), torch.Generator().manual_seed(0)

    def nobody(p):
        return [torch.zeros(0, 4, dtype=torch.long)] * len(p)

    for _ in range(90):
        optimiser.zero_grad()
        episode_loss(agents, grey, coarse, truth, nobody, rounds=2, generator=draws).backward()
        optimiser.step()
    found = refine(agents, grey, coarse, nobody, rounds=2)[-1]
    assert ((found > 0.5) == (truth > 0.5)).float().mean() > 0.95
    assert all(p.grad is not None for p in agents.parameters())


def test_saved_and_loaded(tmp_path):
    agents = model(changes=(-0.3, 0.3))
    agents.save_pretrained(tmp_path)
    again, state = VoxelAgents.from_pretrained(tmp_path), torch.rand(1, 4, *SHAPE)
    torch.testing.assert_close(again(state), agents(state))
    assert tuple(again.changes) == (-0.3, 0.3)


def test_refusals():
    grey, truth, coarse = scene()
    for ask, said in [
        (lambda: model()(torch.zeros(1, 3, 4, 4, 4)), r"\[batch, 4"),
        (lambda: model(dilations=()), "one layer"),
        (lambda: rewards(coarse, coarse, truth[:1]), "the same"),
        (lambda: rewards(coarse, coarse, truth, kind="sparse"), "relative, absolute"),
        (lambda: refine(model(), grey, coarse[:1], lambda p: []), "the same"),
        (lambda: refine(model(), grey, coarse * 9, lambda p: []), "probabilities"),
        (lambda: refine(model(), grey, coarse * math.nan, lambda p: []), "probabilities"),
        (lambda: refine(model(), grey, coarse, lambda p: []), "for each of 2"),
        (lambda: refine(model(), grey, coarse, lambda p: [torch.tensor([[9, 0, 0, 1]])] * 2), "no place"),
        (lambda: supervoxels(grey, 0), "1 or more"),
    ]:
        with pytest.raises(ValueError, match=said):
            ask()


def test_what_has_no_reward_and_no_supervoxels():
    grey, truth, coarse = scene()
    for ask, said in [
        (lambda: rewards(coarse, coarse, truth * 255), "from 0 to 1"),
        (lambda: rewards(coarse * math.nan, coarse, truth), "from 0 to 1"),
        (lambda: rewards(coarse, coarse, truth, torch.ones(8)), "the same"),
        (lambda: episode_loss(model(), grey, coarse, truth, lambda p: [], rounds=0), "rounds are 1 or more"),
        (lambda: supervoxels(grey * math.nan), "not finite"),
        (lambda: boundary_weights(truth, reach=0.0), "reach above 0"),
        (lambda: boundary_weights(truth[0]), r"\[batch, depth, row, column\]"),
    ]:
        with pytest.raises(ValueError, match=said):
            ask()
