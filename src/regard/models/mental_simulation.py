"""The future of a scene, predicted in the latents of a frozen encoder or in pixels, and compared with brains.

Nayebi et al., Neural Foundations of Mental Simulation: Future Prediction of Latent Representations on Dynamic Scenes
(arXiv:2305.11772), after the authors' code. From the last frames' latents a small recurrent network says the next;
what it says is appended, the oldest frame is dropped, and it starts anew over that window. What a model holds while
something is hidden is read out by regression against neurons, and the fit is corrected by how well they agree with
themselves.

The paper's encoders are video models for manipulation and its neurons are of monkeys that play Pong; here the encoder
is any module, and responses are handed in. There is no attention in the dynamics; `regard.record` sees the encoder's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..gaze.brain_profile import ridge

DYNAMICS = "lstm", "ctrnn", "mlp", "identity"
Array = NDArray[np.float64]


class ContinuousTimeRNN(nn.Module):
    """A leaky network in continuous time, in steps of `dt`. [batch, step, input] -> [batch, step, unit]

    a grows by dt / tau (W h + V x + b - a), from 0; h is tanh a, not below 0; what comes out is a linear map of h.

    >>> import torch
    >>> from regard.models.mental_simulation import ContinuousTimeRNN
    >>> ContinuousTimeRNN(6, 12)(torch.randn(2, 7, 6)).shape
    torch.Size([2, 7, 12])
    """

    def __init__(self, inputs: int, units: int, *, dt: float = 1.0, tau: float = 10.0) -> None:
        super().__init__()
        self.rate = dt / tau
        self.input, self.recurrent = nn.Linear(inputs, units), nn.Linear(units, units, bias=False)
        self.output = nn.Linear(units, units)
        self.register_buffer("start", torch.zeros(units))
        self.start: Tensor

    def forward(self, x: Tensor) -> Tensor:
        driven, found = self.input(x), []
        a = self.start.expand(len(x), -1)
        h = a.tanh().relu()
        for step in range(x.shape[1]):
            a = a + self.rate * (self.recurrent(h) + driven[:, step] - a)
            h = a.tanh().relu()
            found.append(h)
        return self.output(torch.stack(found, 1))


class LatentPredictor(nn.Module):
    """The next latent from the last ones.

    encoder: what makes latents [batch, dim] of pictures [batch, ...], never trained; dim: of a latent; dynamics:
    "lstm", "ctrnn", "mlp" (of all joined) or "identity" (the last again, the control that stands still); past: how many
    latents it sees; units: of the network.

    >>> import torch
    >>> from regard.models.mental_simulation import LatentPredictor
    >>> LatentPredictor(6, units=12).rollout(torch.randn(2, 7, 6), 4).shape
    torch.Size([2, 4, 6])
    """

    def __init__(
        self,
        dim: int,
        *,
        encoder: Callable[[Tensor], Tensor] | None = None,
        dynamics: str = "lstm",
        past: int = 7,
        units: int = 1024,
    ) -> None:
        super().__init__()
        if dynamics not in DYNAMICS or past < 1:
            raise ValueError(f"mental_simulation: dynamics is one of {', '.join(DYNAMICS)}, past 1 or more; got "
                             f"{dynamics!r}, {past}")  # fmt: skip
        self.dim, self.past, self.dynamics = dim, past, dynamics
        self.encoder = encoder
        self.network: nn.Module = nn.Identity()
        if dynamics == "lstm":
            self.network = nn.LSTM(dim, units, batch_first=True)
        elif dynamics == "ctrnn":
            self.network = ContinuousTimeRNN(dim, units)
        elif dynamics == "mlp":
            self.network = nn.Sequential(nn.Flatten(), nn.Linear(past * dim, units), nn.ReLU())
        self.read = nn.Identity() if dynamics == "identity" else nn.Linear(units, dim)

    @torch.no_grad()
    def latents(self, frames: Tensor) -> Tensor:
        """Of films [batch, frame, ...]. [batch, frame, dim] ValueError for an encoder that is none, or in training."""
        if self.encoder is None:
            raise ValueError("mental_simulation: no encoder was given; hand in latents, or build it with `encoder`")
        if getattr(self.encoder, "training", False):
            raise ValueError("mental_simulation: the encoder is frozen: call its eval() first")
        found = self.encoder(frames.flatten(0, 1))
        if found.ndim != 2 or found.shape[1] != self.dim:
            raise ValueError(f"mental_simulation: the encoder gives [batch, {self.dim}]; got {list(found.shape)}")
        return found.unflatten(0, frames.shape[:2])

    def forward(self, latents: Tensor) -> Tensor:
        """The next of latents [batch, past, dim]. [batch, dim] ValueError for fewer."""
        if latents.ndim != 3 or latents.shape[1] < self.past or latents.shape[2] != self.dim:
            raise ValueError(
                f"mental_simulation: latents are [batch, {self.past} or more, {self.dim}]; got {list(latents.shape)}"
            )
        seen = latents[:, -self.past :]
        if self.dynamics == "identity":
            return seen[:, -1]
        if self.dynamics == "mlp":
            return self.read(self.network(seen))
        found = self.network(seen)
        return self.read((found[0] if self.dynamics == "lstm" else found)[:, -1])

    def rollout(self, latents: Tensor, steps: int) -> Tensor:
        """The next `steps` latents, each from the window with those before. [batch, step, dim]

        ValueError for fewer than one.
        """
        window, found = latents, []
        _some(steps)
        for _ in range(steps):
            found.append(self(window))
            window = torch.cat([window, found[-1][:, None]], 1)
        return torch.stack(found, 1)

    def loss(self, latents: Tensor) -> Tensor:
        """Mean squared error one step ahead, at every place of [batch, time, dim] that has `past` before it.

        ValueError where there is none.
        """
        if latents.ndim != 3 or latents.shape[1] <= self.past:
            raise ValueError(
                f"mental_simulation: the loss takes [batch, more than {self.past}, {self.dim}]; got "
                f"{list(latents.shape)}"
            )
        windows = latents.unfold(1, self.past, 1)[:, :-1].mT  # [batch, window, past, dim]
        return F.mse_loss(self(windows.flatten(0, 1)), latents[:, self.past :].flatten(0, 1))


class PixelPredictor(nn.Module):
    """The next picture from the last ones, trained end to end: what latents are compared with.

    channels, size: of a picture, `size` a multiple of 4; dim: of its inner code, of which `states` are read out.
    """

    def __init__(self, channels: int, size: int, dim: int, *, past: int = 7, units: int = 64, width: int = 16) -> None:
        super().__init__()
        if size % 4:
            raise ValueError(f"mental_simulation: pictures have a multiple of 4 rows and columns; got {size}")
        self.past, small = past, size // 4
        self.encode = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 4, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(2 * width * small**2, dim),
        )  # fmt: skip
        self.network, self.read = nn.LSTM(dim, units, batch_first=True), nn.Linear(units, dim)
        self.decode = nn.Sequential(
            nn.Linear(dim, 2 * width * small**2), nn.ReLU(), nn.Unflatten(1, (2 * width, small, small)),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(width, channels, 4, 2, 1),
        )  # fmt: skip

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The next of films [batch, past or more, channel, row, column], and the code that it shows [batch, dim]."""
        if frames.ndim != 5 or frames.shape[1] < self.past:
            raise ValueError(f"mental_simulation: films have {self.past} frames or more; got {list(frames.shape)}")
        seen = frames[:, -self.past :]
        codes = self.encode(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])
        code = self.read(self.network(codes)[0][:, -1])
        return self.decode(code), code

    def rollout(self, frames: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Pictures [batch, step, channel, row, column], and codes [batch, step, dim]. ValueError for no step."""
        _some(steps)
        made: list[Tensor] = []
        codes: list[Tensor] = []
        for _ in range(steps):
            picture, code = self(frames)
            made.append(picture)
            codes.append(code)
            frames = torch.cat([frames, picture[:, None]], 1)
        return torch.stack(made, 1), torch.stack(codes, 1)


def _some(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"mental_simulation: one step or more; got {steps}")


class Fit(NamedTuple):
    corrected: Array  # of each unit, NaN where it does not agree with itself [unit]
    raw: Array  # correlation without correction [unit]
    reliability: Array  # of the responses' halves [unit]


def neural_fit(features: ArrayLike, responses: ArrayLike, train: ArrayLike) -> Fit:
    """How well a linear map of features says responses it was not fitted to, by unit; 1 is as well as noise allows.

    features: [sample, feature]; responses: two halves of the trials [2, sample, unit]; train: which samples the map is
    fitted on, boolean [sample]. A map is fitted to each half; the correlation of one half's map with the other half's
    responses is divided by the root of the product of both halves' agreement, of maps and of responses, and the mean of
    both ways is given. Ridge regression with the penalty that predicts best within the training samples.

    ValueError for other shapes, or for fewer than three samples on either side.
    """
    x, halves, train = np.asarray(features, float), np.asarray(responses, float), np.asarray(train, bool)
    if halves.ndim != 3 or len(halves) != 2 or x.ndim != 2 or train.shape != (len(x),) or halves.shape[1] != len(x):
        raise ValueError(
            f"neural_fit: features [sample, feature], responses [2, sample, unit], train [sample]; got {x.shape}, "
            f"{halves.shape}, {train.shape}"
        )
    if min(train.sum(), (~train).sum()) < 3:
        raise ValueError(f"neural_fit: three samples or more on either side; got {train.sum()} and {(~train).sum()}")
    mean, spread = x[train].mean(0), x[train].std(0)
    x = (x - mean) / np.where(spread > 0, spread, 1)
    maps = [ridge(x[train], half[train], x[~train]) for half in halves]
    tests = [half[~train] for half in halves]
    agree, own = _correlation(*tests), _correlation(*maps)
    raw = (_correlation(maps[0], tests[1]) + _correlation(maps[1], tests[0])) / 2
    both = agree * own
    corrected = np.where(both > 0, raw / np.sqrt(np.where(both > 0, both, 1)), np.nan)
    return Fit(corrected, raw, agree)


def _correlation(a: Array, b: Array) -> Array:
    a, b = a - a.mean(0), b - b.mean(0)
    norm = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.where(norm > 0, (a * b).sum(0) / np.where(norm > 0, norm, 1), 0.0)


def mental_simulation(dim: int, **knobs: Any) -> LatentPredictor:
    """An untrained `LatentPredictor`."""
    return LatentPredictor(dim, **knobs)
