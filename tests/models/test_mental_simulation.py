"""Mental simulation: the network by hand, windows, what stands still, fits corrected for noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from regard.models.mental_simulation import (
    DYNAMICS,
    ContinuousTimeRNN,
    LatentPredictor,
    PixelPredictor,
    mental_simulation,
    neural_fit,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_network_by_hand():
    net = ContinuousTimeRNN(1, 1)
    with torch.no_grad():
        for part in net.parameters():
            part.zero_()
        net.input.weight.fill_(1)
        net.output.weight.fill_(1)
    found = net(torch.ones(1, 3, 1))[0, :, 0]  # a: 0.1, 0.19, 0.271
    torch.testing.assert_close(found, torch.tensor([0.1, 0.19, 0.271]).tanh())
    with torch.no_grad():
        net.input.weight.fill_(-1)
    assert not net(torch.ones(1, 3, 1)).any()  # rectified
    with torch.no_grad():
        net.input.weight.fill_(1)
        net.recurrent.weight.fill_(2)
    second = 0.1 + 0.1 * (1 + 2 * np.tanh(0.1) - 0.1)
    assert net(torch.ones(1, 2, 1))[0, 1, 0].item() == pytest.approx(np.tanh(second))


def test_what_stands_still():
    model, latents = LatentPredictor(3, dynamics="identity", past=2), torch.randn(2, 4, 3)
    torch.testing.assert_close(model.rollout(latents, 3), latents[:, -1:].expand(-1, 3, -1))
    assert not list(model.parameters())


@pytest.mark.parametrize("dynamics", DYNAMICS[:3])
def test_it_starts_anew_over_its_window(dynamics):
    model, latents = LatentPredictor(3, dynamics=dynamics, past=2, units=8), torch.randn(1, 2, 3)
    found = model.rollout(latents, 3)
    torch.testing.assert_close(found[:, 2], model(found[:, :2]))  # of what it said itself alone
    longer = torch.cat([torch.randn(1, 5, 3), latents], 1)
    torch.testing.assert_close(model.rollout(longer, 3), found)


@pytest.mark.parametrize("dynamics", DYNAMICS[:3])
def test_it_learns(dynamics):
    angle = torch.arange(12) * 0.4 + 6 * torch.rand(32, 1)
    latents = torch.stack([angle.sin(), angle.cos()], -1)
    model = LatentPredictor(2, dynamics=dynamics, past=3, units=32)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    still = LatentPredictor(2, dynamics="identity", past=3).loss(latents)
    for _ in range(100):
        optimiser.zero_grad()
        model.loss(latents).backward()
        optimiser.step()
    assert model.loss(latents) < 0.2 * still


def test_the_loss_is_of_every_window():
    model, latents = LatentPredictor(1, dynamics="identity", past=2), torch.tensor([[[0.0], [1.0], [3.0], [6.0]]])
    assert model.loss(latents).item() == (2**2 + 3**2) / 2


def test_an_encoder_is_frozen():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Dropout(0.5))
    model = mental_simulation(3, encoder=encoder, past=2, units=4)
    with pytest.raises(ValueError, match=r"frozen: call its eval\(\) first"):
        model.latents(torch.rand(2, 4, 3, 2, 2))
    encoder.eval()
    found = model.latents(torch.rand(2, 4, 3, 2, 2))
    assert found.shape == (2, 4, 3)
    assert not found.requires_grad


def test_pixels():
    model, films = PixelPredictor(1, 8, 5, past=3, units=6, width=4), torch.rand(2, 4, 1, 8, 8)
    pictures, codes = model.rollout(films, 2)
    assert (pictures.shape, codes.shape) == ((2, 2, 1, 8, 8), (2, 2, 5))
    torch.testing.assert_close(pictures[:, 1], model(torch.cat([films[:, -2:], pictures[:, :1]], 1))[0])


def test_fits_are_corrected_for_noise():
    draws = np.random.default_rng(0)
    x = draws.normal(size=(600, 5))
    clean = x @ draws.normal(size=(5, 8))
    halves = np.stack([clean + 2 * draws.normal(size=clean.shape) for _ in range(2)])
    other = draws.normal(size=clean.shape)[None].repeat(2, 0) + 0.1 * draws.normal(size=(2, *clean.shape))
    train = np.arange(600) < 300
    found = neural_fit(x, halves, train)
    assert np.allclose(found.corrected, 1, atol=0.15)
    assert (found.raw < found.corrected - 0.05).all()
    assert np.abs(np.nan_to_num(neural_fit(x, other, train).raw)).max() < 0.2
    # what the reliability is, by hand: a share of the variance that both halves have
    expected = clean.var(0) / (clean.var(0) + 4)
    assert np.allclose(found.reliability, expected, atol=0.15)


def test_refusals():
    with pytest.raises(ValueError, match="dynamics is one of lstm, ctrnn, mlp, identity"):
        LatentPredictor(3, dynamics="gru")
    with pytest.raises(ValueError, match=r"\[batch, 7 or more, 3\]; got \[1, 4, 3\]"):
        LatentPredictor(3, units=4)(torch.randn(1, 4, 3))
    with pytest.raises(ValueError, match="no encoder was given"):
        LatentPredictor(3, units=4).latents(torch.rand(1, 8, 3, 2, 2))
    with pytest.raises(ValueError, match=r"encoder gives \[batch, 3\]; got \[8, 12\]"):
        LatentPredictor(3, units=4, encoder=nn.Flatten().eval()).latents(torch.rand(1, 8, 3, 2, 2))
    with pytest.raises(ValueError, match="multiple of 4"):
        PixelPredictor(1, 10, 5)
    with pytest.raises(ValueError, match="films have 3 frames or more"):
        PixelPredictor(1, 8, 5, past=3)(torch.rand(1, 2, 1, 8, 8))
    with pytest.raises(ValueError, match="three samples or more"):
        neural_fit(np.ones((4, 2)), np.ones((2, 4, 1)), np.array([True, False, False, False]))
    with pytest.raises(ValueError, match=r"responses \[2, sample, unit\]"):
        neural_fit(np.ones((4, 2)), np.ones((4, 1)), np.ones(4, bool))
    with pytest.raises(ValueError, match="one step or more; got 0"):
        mental_simulation(3, units=4).rollout(torch.randn(1, 7, 3), 0)
    with pytest.raises(ValueError, match="one step or more; got 0"):
        PixelPredictor(1, 8, 4, past=3).rollout(torch.randn(1, 3, 1, 8, 8), 0)
    for time in (4, 7):  # of seven there is none that has seven before it
        with pytest.raises(ValueError, match="more than 7, 3"):
            mental_simulation(3, units=4).loss(torch.randn(1, time, 3))
