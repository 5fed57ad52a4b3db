"""A head in a panorama."""

from __future__ import annotations

import math

import pytest
import torch

from regard.gaze.humanoid_search import (
    Action,
    Box,
    Episode,
    HeadPolicy,
    HeadPolicyConfig,
    HeadSearch,
    by_likeness,
    humanoid_search,
    imitate,
    panorama_view,
    reinforce,
    roll,
    search_score,
)

SMALL = {"size": (6, 8)}


def panorama(rows: int = 16, seed: int = 0):
    return torch.rand(3, rows, 2 * rows, generator=torch.Generator().manual_seed(seed))


def episode(yaw=(100, 110), pitch=(-5, 5), start=0.0, **more):
    return Episode(panorama(), "the door", yaw, pitch, start, **more)


def test_straight_ahead_is_the_middle():
    whole = panorama()
    view = panorama_view(whole, 0, 0, size=(6, 8))
    torch.testing.assert_close(view[:, 3, 4], whole[:, 8, 16])
    up = panorama_view(whole, 0, 45, size=(6, 8))
    torch.testing.assert_close(up[:, 3, 4], whole[:, 4, 16])  # a quarter of the height higher
    right = panorama_view(whole, 90, 0, size=(6, 8))
    torch.testing.assert_close(right[:, 3, 4], whole[:, 8, 24])


def test_a_view_by_hand():
    """Width 2, fov 90: the left pixel's ray is (-1, 0, 1), 45 degrees to the left."""
    whole = panorama()
    view = panorama_view(whole, 0, 0, size=(2, 2), fov=90)
    torch.testing.assert_close(view[:, 1, 0], whole[:, 8, 12])
    # Up and to the left: (-1, -1, 1) is 45 degrees left, and asin(1 / sqrt 3) up.
    row = (0.5 - math.asin(1 / 3**0.5) / math.pi) * 16
    share = row - math.floor(row)
    expected = whole[:, math.floor(row), 12] * (1 - share) + whole[:, math.floor(row) + 1, 12] * share
    torch.testing.assert_close(view[:, 0, 0], expected)


def test_turning_the_head_is_turning_the_world():
    whole = panorama()
    turned = panorama_view(whole, 45, 20, size=(6, 8))
    torch.testing.assert_close(panorama_view(whole.roll(-4, -1), 0, 20, size=(6, 8)), turned)
    torch.testing.assert_close(panorama_view(whole, 45 - 360, 20, size=(6, 8)), turned)


def test_several_directions_and_panoramas():
    some = torch.stack([panorama(seed=1), panorama(seed=2)])
    yaw, pitch = torch.tensor([10.0, 200]), torch.tensor([-80.0, 30])
    together = panorama_view(some, yaw, pitch, size=(6, 8), fov=70)
    for one, a, p, view in zip(some, yaw, pitch, together):
        torch.testing.assert_close(panorama_view(one, float(a), float(p), size=(6, 8), fov=70), view)
    torch.testing.assert_close(panorama_view(some[0], yaw, pitch, size=(6, 8), fov=70)[0], together[0])


def test_gradients():
    whole = torch.rand(1, 4, 8, dtype=torch.float64, requires_grad=True)
    yaw = torch.tensor([33.0], dtype=torch.float64, requires_grad=True)
    pitch = torch.tensor([11.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, a, p: panorama_view(w, a, p, size=(3, 3)), (whole, yaw, pitch))


def test_a_search_by_hand():
    search = HeadSearch(episode(), **SMALL)
    assert search.box == Box(75, 135, -20, 20)
    for action, yaw, pitch in (("rotate(90,0)", 90, 0), ("rotate(30, 5)", 120, 5)):
        view, reward, done, info = search.step(action)
        assert (info["yaw"], info["pitch"], reward, done) == (yaw, pitch, 0.0, False)
    torch.testing.assert_close(view, panorama_view(panorama(), 120, 5, **SMALL))
    _, reward, done, info = search.step(Action("submit", 120, 5))
    assert (reward, done, info["success"]) == (0.5, True, True)
    with pytest.raises(ValueError, match="has ended"):
        search.step("rotate(1,1)")
    search.reset()
    assert (search.yaw, search.done) == (0, False)


def test_boxes():
    assert episode((350, 8)).box() == Box(329, 29, -20, 20)
    assert episode((40, 130), (-60, 30)).box() == Box(40, 130, -60, 30)
    assert episode((355, 355), None).box() == Box(345, 5, -90, 90)
    assert episode((0, 0), (85, 89)).box() == Box(330, 30, 67, 90)
    assert episode((0, 0), None).box(path_tolerance=30) == Box(330, 30, -90, 90)
    with pytest.raises(ValueError, match="every direction"):
        episode((0, 360)).box()


@pytest.mark.parametrize(
    ("answer", "right"), [((329, 20), True), ((29, -20), True), ((328, 0), False), ((30, 0), False)]
)
def test_the_ends_of_a_box_are_in_it(answer, right):
    assert episode((350, 8)).box().holds(*answer) is right


def test_pitch_counts_in_boxes_that_wrap_unless_as_in_the_code():
    box = episode((350, 8)).box()
    assert not box.holds(0, 60)
    assert box.holds(0, 60, as_code=True)
    assert not episode().box().holds(100, 60, as_code=True)


def test_rewards_of_turning():
    search = HeadSearch(episode((60, 60), None, start=90), effective=1.0, ineffective=0.5, **SMALL)
    assert search.step("rotate(-30,20)")[1] == pytest.approx((60 - 20) / 180)  # 40 and 20 away, then 10 and 10
    assert search.step("rotate(60,0)")[1] == pytest.approx(-0.5 * 100 / 180)  # then 70 and 50
    failed = HeadSearch(episode(), failure=-0.2, **SMALL)
    assert failed.step("submit(0,0)")[1:3] == (-0.2, True)


def test_pitch_is_clamped_and_a_malformed_action_costs_a_turn():
    search = HeadSearch(episode(), turns=3, **SMALL)
    assert search.step("rotate(-30,95)")[3] == {"yaw": 330, "pitch": 90, "valid": True, "success": False}
    assert search.step("look up")[2:] == (False, {"yaw": 330, "pitch": 90, "valid": False, "success": False})
    assert search.step("rotate(1.5,0)")[2] is True
    assert search.turn == 3


def test_a_whole_search_and_its_scanpath():
    asked = []

    def agent(view, instruction, headings):
        asked.append((view.shape, instruction, headings[-1]))
        return ["rotate(90,10)", "nonsense", "submit(-170,20)"][len(asked) - 1]

    found = humanoid_search(agent, episode((185, 195)), **SMALL)
    assert asked[2] == ((3, 6, 8), "the door", (90, 10))
    assert found.success
    assert found.answer == (190, 20)
    path = found.scanpath
    assert path.size == (32, 16)
    expected = [[16, 8], [24, (0.5 - 10 / 180) * 16], [(10 / 360) * 32, (0.5 - 20 / 180) * 16]]
    assert path.places.tolist() == [pytest.approx(place) for place in expected]
    lost = humanoid_search(lambda *_: "rotate(1,0)", episode(), turns=4, **SMALL)
    assert (lost.success, lost.answer, len(lost.headings)) == (False, None, 5)


def test_scores_by_task_and_level():
    some = [episode(level=1), episode(level=1), episode(level=2), episode((0, 0), None)]
    answers = [(100, 0), (200, 0), None, (20, 0)]
    assert search_score(answers, some) == {("object", 1): 0.5, ("object", 2): 0.0, ("path", 0): 0.0}
    assert search_score(answers, some, path_tolerance=30.0)["path", 0] == 1
    with pytest.raises(ValueError, match="got 1 for 4"):
        search_score(answers[:1], some)


def marked(yaw: float, columns: int = 64):
    """A bright spot in the dark, at this yaw on the horizon."""
    whole = torch.zeros(3, columns // 2, columns)
    middle = slice(columns // 2 - 2, columns // 2 + 2)
    whole[:, columns // 4 - 2 : columns // 4 + 2, middle] = 1
    return whole.roll(round(yaw / 360 * columns), -1)


def test_the_agent_of_likeness_finds_what_is_like():
    def encode(view):
        return torch.stack([view[:, 0, 3:5, 3:5].mean((1, 2)), torch.full((len(view),), 0.1)], 1)

    found = humanoid_search(
        by_likeness(encode, torch.tensor([1.0, 0.1])),
        Episode(marked(135), "", (130, 140), (-5, 5)),
        size=(8, 8),
    )
    assert found.answer == (135, 0)
    assert found.success
    assert len(found.headings) == 8


def test_a_policy_learns_to_face_a_spot():
    torch.manual_seed(0)
    config = HeadPolicyConfig(1, size=(12, 12), width=16, yaws=8, pitches=(0.0,))
    policy = HeadPolicy(config)
    yaws = torch.arange(8) * 45.0
    worlds = torch.stack([marked(float(yaw)) for yaw in yaws])
    none, start = torch.zeros(8, dtype=torch.long), torch.zeros(8)

    def teacher(heading):
        away = (yaws - heading[:, 0] + 180) % 360 - 180
        turn = policy.nearest(torch.stack([torch.where(away.abs() > 45, 90.0, away), 0 * away], 1))
        return torch.where(away.abs() < 10, policy.rotations, turn)

    optimiser = torch.optim.Adam(policy.parameters(), 1e-2)
    first = imitate(policy, worlds, none, start, teacher, turns=6).item()
    for _ in range(60):
        optimiser.zero_grad()
        loss = imitate(policy, worlds, none, start, teacher, turns=6)
        loss.backward()
        optimiser.step()
    assert loss.item() < first / 4
    done = roll(policy, worlds, none, start, turns=6, greedy=True)
    assert [answer and answer[0] for answer in done.answers] == yaws.tolist()
    assert done.headings.shape == (7, 8, 2)


def test_rotations_and_back():
    policy = HeadPolicy(HeadPolicyConfig(1))
    every = torch.arange(policy.rotations)
    assert torch.equal(policy.nearest(policy.rotation(every)), every)
    assert policy.rotation(torch.tensor([23, 12, 24 + 1])).tolist() == [[-15, -30], [-180, -30], [15, 0]]


def test_the_policy_gradient_by_hand():
    """Of one search made four times; those that are rewarded get more likely, and equal rewards teach nothing."""
    torch.manual_seed(0)
    policy = HeadPolicy(HeadPolicyConfig(1, size=(8, 8), width=8, yaws=4, pitches=(0.0,)))
    world, none, start = panorama()[None], torch.zeros(1, dtype=torch.long), torch.zeros(1)
    kept = []

    def reward(rolled):
        kept.append(rolled)
        return torch.tensor([1.0, 0, 0, 1])

    loss, gained = reinforce(
        policy, world, none, start, reward, group=4, turns=2, generator=torch.Generator().manual_seed(1)
    )
    assert gained == 0.5
    (rolled,) = kept
    advantage = torch.tensor([0.5, -0.5, -0.5, 0.5]) / torch.tensor([1.0, 0, 0, 1]).std()
    torch.testing.assert_close(loss, -(advantage * rolled.log_chance * rolled.live).sum() / rolled.live.sum())
    nothing, _ = reinforce(policy, world, none, start, lambda r: torch.ones(4), group=4, turns=2)
    nothing.backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: panorama_view(torch.rand(3, 8, 8), 0, 0, size=(2, 2)), r"twice as wide.*\[3, 8, 8\]"),
        (lambda: Episode(torch.rand(3, 8, 20), "", (0, 0)), "twice as wide"),
        (lambda: panorama_view(panorama(), 0, 0, size=(2, 2), fov=180), "fov=180"),
        (lambda: reinforce(None, None, None, None, None, group=1), "group=1"),
    ],
)
def test_refusals(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_parsing():
    assert Action.parse("submit( 350 ,-4 )") == Action("submit", 350, -4)
    for text in ("rotate(1.5,0)", "rotate(1)", "zoom(in)", "submit(1,2) now", ""):
        assert Action.parse(text) is None
