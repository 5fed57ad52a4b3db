"""The point process of fixations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from regard.gaze import Scanpath
from regard.gaze.tpp_gaze import TPPGaze, TPPGazeConfig, tensors

SIZE = (200, 100)


def model(seed: int = 0, **knobs) -> TPPGaze:
    torch.manual_seed(seed)
    return TPPGaze(TPPGazeConfig(hidden=16, dropout=0.0, **knobs)).eval()


def drawn(batch: int = 3, n: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, n, 2, generator=generator) * 2 - 1, torch.rand(batch, n, generator=generator) + 0.1


def test_scanpaths_become_tensors():
    one = Scanpath(np.array([[0, 0], [100, 100.0]]), SIZE, np.array([250.0, 500]))
    two = Scanpath(np.array([[200, 50.0]]), SIZE, np.array([100.0]))
    places, durations, mask = tensors([one, two])
    assert places.tolist() == [[[-1, -1], [0, 1]], [[1, 0], [0, 0]]]
    assert durations[mask].tolist() == pytest.approx([0.25, 0.5, 0.1])
    assert mask.tolist() == [[True, True], [True, False]]
    with pytest.raises(ValueError, match="lacks"):
        tensors([Scanpath(np.zeros((1, 2)), SIZE)])


def test_likelihood_by_hand():
    """With every weight 0, all components are alike: standard Gaussians, and one log-normal."""
    net = model(log_mean=-1.0, log_std=0.5)
    for parameter in net.parameters():
        parameter.data.zero_()
    places, durations = torch.tensor([[[0.6, -0.8]]]), torch.tensor([[0.3]])
    with torch.no_grad():
        place, duration = net.log_likelihood(places, durations)
    assert float(place) == pytest.approx(-0.5 - math.log(2 * math.pi), abs=1e-5)
    z = (math.log(0.3) + 1) / 0.5
    assert float(duration) == pytest.approx(-z * z / 2 - math.log(math.sqrt(2 * math.pi) * 0.5 * 0.3), abs=1e-5)


def test_densities_sum_to_one():
    with torch.no_grad():
        place, duration = model()(*drawn(1, 2))
    grid = torch.linspace(-12, 12, 481)
    x, y = torch.meshgrid(grid, grid, indexing="ij")
    at = torch.stack([x, y], -1).flatten(0, 1)[:, None, None]
    assert float(place.log_prob(at).exp()[:, 0, 1].sum() * 0.05**2) == pytest.approx(1, abs=1e-3)
    log = torch.linspace(-12, 9, 20001)
    density = duration.log_prob(log.exp()[:, None, None].expand(-1, 1, 3)).exp()[:, 0, 1] * log.exp()
    assert float(density.sum() * (log[1] - log[0])) == pytest.approx(1, abs=1e-3)


def test_a_fixation_depends_on_those_before_alone():
    net, (places, durations) = model(), drawn()
    later, longer = places.clone(), durations.clone()
    later[:, 3:] = 0
    longer[:, 3:] = 9
    one, two = net.log_likelihood(places, durations), net.log_likelihood(later, longer)
    for a, b in zip(one, two):
        assert torch.equal(a[:, :3], b[:, :3])
    longer = durations.clone()
    longer[:, 1] = 5
    changed = net.log_likelihood(places, longer)
    assert torch.equal(one[0][:, :2], changed[0][:, :2])
    assert not torch.allclose(one[0][:, 2], changed[0][:, 2])


def test_a_model_of_places_alone_does_not_see_durations():
    net, (places, durations) = model(timed=False), drawn()
    other = durations.roll(1, 1)
    assert torch.equal(net.log_likelihood(places, durations)[0], net.log_likelihood(places, other)[0])
    one, two = (net.log_likelihood(places.roll(k, 1), durations)[1] for k in (0, 1))
    assert torch.equal(one, two)


def test_padding_does_not_count():
    net, (places, durations) = model(), drawn()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1:, 3:] = False
    other = places.clone()
    other[~mask] = 7
    assert torch.equal(net.loss(places, durations, mask), net.loss(other, durations, mask))
    with pytest.raises(ValueError, match="above 0"):
        net.loss(places, torch.zeros(3, 5), mask)


def test_a_picture_matters_where_there_is_one():
    net, (places, durations) = model(scene=2), drawn()
    one = net.log_likelihood(places, durations, torch.zeros(3, 2))[0]
    assert not torch.allclose(one, net.log_likelihood(places, durations, torch.ones(3, 2))[0])
    with pytest.raises(ValueError, match="2 numbers a picture"):
        net.log_likelihood(places, durations)
    with pytest.raises(ValueError, match="0 numbers a picture"):
        model().log_likelihood(places, durations, torch.ones(3, 2))


def test_samples_end_in_time_and_repeat_under_a_seed():
    net = model()
    state = torch.get_rng_state()
    paths = net.sample(SIZE, 10, seconds=2.0, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert len(paths) == 10
    for path in paths:
        assert path.size == SIZE
        assert len(path) == 1 or path.durations.sum() <= 2000
        assert (path.places >= 0).all()
        assert (path.places <= SIZE).all()
    again = net.sample(SIZE, 10, seconds=2.0, seed=3)
    assert all((a.places == b.places).all() for a, b in zip(paths, again))
    assert all(len(path) == 1 for path in net.sample(SIZE, 4, seconds=1e-9))
    assert max(len(path) for path in net.sample(SIZE, 4, seconds=1e9, longest=7)) == 7


def test_it_learns_a_rhythm_that_places_do_not_tell():
    """Long and short fixations in turn, at places drawn at random: only the timed model foresees the next."""

    def rhythm(seed):
        generator = torch.Generator().manual_seed(seed)
        places = torch.rand(32, 8, 2, generator=generator) - 0.5
        turn = (torch.arange(8) + torch.randint(2, (32, 1), generator=generator)) % 2
        return places, torch.where(turn == 1, 0.4, 0.1) * (0.1 * torch.randn(32, 8, generator=generator)).exp()

    found = {}
    for timed in (True, False):
        net = model(timed=timed)
        optimizer = torch.optim.Adam(net.parameters(), 0.02)
        for step in range(80):
            places, durations = rhythm(step)
            net.loss(places, durations, torch.ones(32, 8, dtype=torch.bool)).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            found[timed] = float(net.log_likelihood(*rhythm(999))[1][:, 1:].mean())
    assert found[True] > found[False] + 0.4  # the entropy of the turn is log 2


def test_temperature_multiplies_the_logarithms_of_the_spreads_of_places():
    net = model(place_components=1)
    for parameter in net.parameters():
        parameter.data.zero_()
    net.place.bias.data[2:4] = torch.tensor([-0.5, 1.0])
    place, duration = net(*drawn(1, 2), temperature=2.0)
    assert place.variance[0, 0].detach().tolist() == pytest.approx([math.exp(-2), math.exp(4)], rel=1e-5)
    _, plain = net(*drawn(1, 2))
    assert torch.equal(duration.log_prob(torch.ones(1, 3)), plain.log_prob(torch.ones(1, 3)))


def test_the_history_holds_places_and_standard_logarithms_of_durations():
    net, seen = model(log_mean=-1.0, log_std=0.5), []
    net.history.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    places, durations = drawn()
    net(places, durations)
    assert torch.equal(seen[0][..., :2], places)
    assert torch.allclose(seen[0][..., 2], (durations.log() + 1) / 0.5)


def test_spreads_beyond_their_limits_are_held_and_can_come_back():
    net = model(place_components=1, duration_components=1)
    for parameter in net.parameters():
        parameter.data.zero_()
    net.place.bias.data[2:4] = torch.tensor([9.0, -9.0])
    net.duration.bias.data[1] = 9.0
    place, duration = net(*drawn(1, 1))
    assert place.variance[0, 0].detach().tolist() == pytest.approx([math.exp(6), math.exp(-10)], rel=1e-5)
    (place.variance.sum() + duration.base_dist.variance.sum()).backward()
    assert (net.place.bias.grad[2:4] != 0).all()
    assert net.duration.bias.grad[1] != 0


def test_the_next_fixation_follows_what_was_drawn_and_not_what_was_moved_to_the_border():
    net, seen = model(place_components=1), []
    for parameter in net.parameters():
        parameter.data.zero_()
    net.place.bias.data[2:4] = 2.0  # nearly all that is drawn lies outside
    net.history.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    paths = net.sample(SIZE, 8, seconds=2.0, temperature=1.0)
    assert float(seen[-1][..., :2].abs().max()) > 1
    assert all((path.places >= 0).all() and (path.places <= SIZE).all() for path in paths)
