"""Nayebi et al. (arXiv:2305.11772): dynamics in a frozen encoder's latents hold what is hidden better than pixels do.

A stand-in, since no recordings of moving scenes are at hand: films of a ball that flies and bounces, of which the
first frames are seen and the others, behind a screen, have to be simulated; "neurons" are made here, 60 as smooth
functions of the ball's true place and velocity and 20 of the last frame seen, each with noise in two halves of the
trials. So it is assumed that brains hold the state, and asked which models do: a network in continuous time on the
latents of a small autoencoder that was trained on other films, the same latents standing still, and a predictor of
pixels trained end to end, with a code as wide, as many units and as many steps. All are read out alike. Control:
units of the last frame seen are fitted by what stands still as well as by what moves. Settings were tried on one
other seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...models.mental_simulation import LatentPredictor, PixelPredictor, neural_fit
from .. import _nets
from .._measure import lines, mean

SCALES = "small", "large"
STEPS = {"small": 1000, "large": 10_000}
FILMS, HELD, BATCH, RATE = 600, 200, 32, 2e-3
SIZE, SEEN, HIDDEN, PAST, DIM, UNITS = 24, 9, 7, 7, 24, 64
STATE, LAST = 60, 20  # units tuned to the ball's state, and to the last frame seen
OVER_PIXELS, OVER_STILL, CEILING = 0.05, 0.1, 0.85


class Autoencoder(nn.Module):
    """Single frames [batch, 1, row, column] through `DIM` numbers."""

    def __init__(self) -> None:
        super().__init__()
        whole = PixelPredictor(1, SIZE, DIM)  # its encoder and decoder, without its network
        self.encode, self.decode = whole.encode, whole.decode

    def forward(self, frames: Tensor) -> Tensor:
        return self.decode(self.encode(frames))


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Fit of 60 units while the ball is hidden, by what each model simulates."""
    expected = (
        f"of films held out, while the ball is hidden, corrected for noise, in the median of {STATE} units: latent "
        f"dynamics above pixels by {OVER_PIXELS} and above what stands still by {OVER_STILL}, beyond two standard "
        f"errors over units"
    )
    other, _ = films(FILMS, seed + 1_000_000)
    shown, state = films(HELD, seed)
    torch.manual_seed(seed)
    coder, pixels, steps = Autoencoder(), PixelPredictor(1, SIZE, DIM, past=PAST, units=UNITS), STEPS[scale]
    told = {"batch": BATCH, "rate": RATE, "decay": 0.0}
    _nets.fit(
        coder.parameters(), lambda some: F.mse_loss(coder(other[some, 5]), other[some, 5]), FILMS, steps, seed, **told
    )
    model = LatentPredictor(DIM, encoder=coder.encode.eval(), dynamics="ctrnn", past=PAST, units=UNITS)
    still = LatentPredictor(DIM, encoder=coder.encode, dynamics="identity", past=PAST)
    known, seen = model.latents(other), model.latents(shown)
    dynamics = [*model.network.parameters(), *model.read.parameters()]
    _nets.fit(dynamics, lambda some: model.loss(known[some]), FILMS, 2 * steps, seed, **told)
    at = np.random.default_rng(seed)

    def next_frame(some: Tensor) -> Tensor:
        start = int(at.integers(SEEN + HIDDEN - PAST))
        return F.mse_loss(pixels(other[some, start : start + PAST])[0], other[some, start + PAST])

    _nets.fit(pixels.parameters(), next_frame, FILMS, steps, seed, **told)
    with torch.no_grad():
        codes = pixels.rollout(shown[:, :SEEN], HIDDEN)[1]
        features = {
            "latent": model.rollout(seen[:, :SEEN], HIDDEN),
            "pixels": codes,
            "still": still.rollout(seen[:, :SEEN], HIDDEN),
        }
        own = float(model.loss(seen) / still.loss(seen))
        made, copied = pixels(shown[:, :SEEN])[0], shown[:, SEEN - 1]
        drawn = float(F.mse_loss(made, shown[:, SEEN]) / F.mse_loss(copied, shown[:, SEEN]))
    responses = units(shown[:, SEEN - 1], state[:, SEEN:], seed)
    train = np.repeat(np.arange(HELD) < HELD // 2, HIDDEN)
    truth = state[:, SEEN:].reshape(-1, 4)
    squares = np.stack([truth[:, i] * truth[:, j] for i in range(4) for j in range(i, 4)], 1)
    fits = {name: neural_fit(of.flatten(0, 1).numpy(), responses, train).corrected for name, of in features.items()}
    fits["true state"] = neural_fit(np.concatenate([truth, squares], 1), responses, train).corrected
    median = {name: float(np.nanmedian(of[:STATE])) for name, of in fits.items()}
    over = {name: mean((fits["latent"] - fits[name])[:STATE]) for name in ("pixels", "still")}
    holds = all(
        median["latent"] - median[name] >= least and over[name].above()
        for name, least in (("pixels", OVER_PIXELS), ("still", OVER_STILL))
    )
    last = {name: float(np.nanmedian(of[STATE:])) for name, of in fits.items()}
    holds = holds and last["still"] >= last["latent"]
    measured = (
        "fit of the state's units: "
        + ", ".join(f"{name} {of:.2f}" for name, of in median.items())
        + f"; latent above pixels by {over['pixels']:.2f}, above what stands still by {over['still']:.2f}; of the last "
        "frame's units: " + ", ".join(f"{name} {of:.2f}" for name, of in last.items())
    )
    premises = [
        Premise(
            "the state tells", f"fit of {CEILING} or more", f"{median['true state']:.2f}",
            median["true state"] >= CEILING,
        ),
        Premise(
            "both predict", "at most 90% of the error of a copy", f"latent {own:.0%}, pixels {drawn:.0%}",
            max(own, drawn) <= 0.9,
        ),
    ]  # fmt: skip

    def draw(figure: Any) -> None:
        series = {}
        for name, of in features.items():
            by_step = [
                np.nanmedian(
                    neural_fit(
                        of[:, t].numpy(), responses.reshape(2, HELD, HIDDEN, -1)[:, :, t], train[::HIDDEN]
                    ).corrected[:STATE]
                )
                for t in range(HIDDEN)
            ]
            series[name] = (list(range(1, HIDDEN + 1)), by_step)
        lines(figure.subplots(), series, xlabel="frames since the ball was seen", ylabel="fit, corrected for noise")

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def films(n: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Films [n, frame, 1, row, column] without a screen; the ball's place and velocity [n, frame, 4], each about 1."""
    draws = np.random.default_rng(seed)
    place = draws.uniform([3, 4], [8, SIZE - 4], (n, 2))
    velocity = np.stack([draws.uniform(0.5, 1.0, n), draws.uniform(-1.2, 1.2, n)], 1)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    frames, states = [], []
    for _ in range(SEEN + HIDDEN):
        away = np.hypot(columns - place[:, 0, None, None], rows - place[:, 1, None, None])
        frames.append(np.clip(2.5 - away, 0, 1))
        states.append(np.concatenate([(place - SIZE / 2) / (SIZE / 3), velocity], 1))
        velocity[:, 1] *= np.where((place + velocity)[:, 1] % (SIZE - 3) < 3, -1, 1)  # off the upper and the lower edge
        place = place + velocity
    return torch.from_numpy(np.stack(frames, 1)[:, :, None]).float(), np.stack(states, 1)


def units(last: Tensor, state: np.ndarray, seed: int) -> np.ndarray:
    """Responses in two halves of the trials [2, sample, unit]: to the state [film, frame, 4], and to the last frame."""
    draws = np.random.default_rng(seed + 7)
    flat = state.reshape(-1, 4)
    tuned = np.cos(flat @ draws.normal(0, 0.6, (4, STATE)) + draws.uniform(0, 2 * np.pi, STATE))
    small = F.avg_pool2d(last, 4).flatten(1).double().numpy() @ draws.normal(size=((SIZE // 4) ** 2, LAST))
    clean = np.concatenate([tuned, np.repeat(small, state.shape[1], 0)], 1)
    clean = (clean - clean.mean(0)) / clean.std(0)
    share = draws.uniform(0.5, 0.8, clean.shape[1])  # of the variance that both halves have
    return np.stack([clean + draws.normal(size=clean.shape) * np.sqrt(1 / share - 1) for _ in range(2)])
