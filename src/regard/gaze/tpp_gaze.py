"""Where the next fixation falls and how long it lasts, as one neural temporal point process.

D'Amelio et al., TPP-Gaze: Modelling Gaze Dynamics in Space and Time with Neural Temporal Point Processes
(arXiv:2410.23409; WACV 2025), section 3, after the authors' code. A recurrent network reads the fixations so far, each
its place and the logarithm of its duration; its state and a code of the picture give a mixture of Gaussians for the
next place and a mixture of log-normals for the next duration. Learned by maximum likelihood.

Deviations. The picture comes as a vector of numbers (the paper has a convolutional network), or not at all. The history
is read by the GRU of the authors' code, not by the transformer that they set by default. `timed=False` is ours: a model
of places alone, the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributions as D

from ..data.loaders import Scanpath


@dataclass(frozen=True)
class TPPGazeConfig:
    """Defaults are the authors', but for the two of log durations, which are those of their data: give your own."""

    scene: int = 0  # numbers that describe a picture; 0 for none
    hidden: int = 256  # of the history's state, and of the picture's code
    place_components: int = 16
    duration_components: int = 4
    dropout: float = 0.4
    log_mean: float = -1.5126  # of durations in seconds
    log_std: float = 0.5892
    timed: bool = True  # False: the history holds no durations, and all durations are of one distribution


class TPPGaze(nn.Module):
    """A distribution of the place, and one of the duration, of each fixation, given those before.

    Places [batch, fixation, 2] are x and y, from -1 to 1 over the screen; durations [batch, fixation] are in seconds;
    scene [batch, scene] where the configuration has one. `tensors` makes them of scanpaths.
    """

    def __init__(self, config: TPPGazeConfig) -> None:
        super().__init__()
        self.config = config
        self.first = nn.Parameter(torch.zeros(config.hidden))  # the state before any fixation
        self.history = nn.GRU(3, config.hidden, batch_first=True)
        self.picture = nn.Sequential(nn.Linear(config.scene, config.hidden), nn.GELU()) if config.scene else None
        self.dropout = nn.Dropout(config.dropout)
        width = config.hidden * (2 if config.scene else 1)
        self.place = nn.Linear(width, 5 * config.place_components)
        self.duration = nn.Linear(width, 3 * config.duration_components)

    def forward(
        self, places: Tensor, durations: Tensor, scene: Tensor | None = None, *, temperature: float = 1.0
    ) -> tuple[D.Distribution, D.Distribution]:
        """Place and duration of each fixation, and of the one after the last. Batch shape [batch, fixation + 1]

        temperature: by which the logarithms of the spreads of places are multiplied.
        """
        context = self._context(places, durations, scene)
        where = self.place(context).unflatten(-1, (5, self.config.place_components))
        spread = _within(where[..., 2:4, :]) * temperature
        place = D.MixtureSameFamily(
            D.Categorical(logits=where[..., 4, :]),
            D.Independent(D.Normal(where[..., :2, :].tanh().mT, spread.exp().mT), 1),
        )
        if not self.config.timed:
            context = torch.zeros_like(context)
        mean, spread, weight = self.duration(context).unflatten(-1, (3, self.config.duration_components)).unbind(-2)
        scaled = D.MixtureSameFamily(D.Categorical(logits=weight), D.Normal(mean, _within(spread).exp()))
        transforms = [D.AffineTransform(self.config.log_mean, self.config.log_std), D.ExpTransform()]
        return place, D.TransformedDistribution(scaled, transforms)

    def log_likelihood(self, places: Tensor, durations: Tensor, scene: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log density of each place, over the square from -1 to 1, and of each duration, a second. [batch, fixation]"""
        place, duration = self._of_given(places, durations, scene)
        return place.log_prob(places), duration.log_prob(durations)

    def loss(self, places: Tensor, durations: Tensor, mask: Tensor, scene: Tensor | None = None) -> Tensor:
        """Mean negative log-likelihood of a fixation, place and duration, nats. mask [batch, fixation]: what counts."""
        place, duration = self.log_likelihood(places, durations, scene)
        return -(place + duration)[mask].mean()

    @torch.no_grad()
    def sample(
        self,
        size: tuple[int, int],
        n: int,
        *,
        seconds: float,
        scene: Tensor | None = None,
        temperature: float = 2.0,
        longest: int = 200,
        seed: int = 0,
    ) -> list[Scanpath]:
        """n scanpaths of the fixations that end within `seconds`, at most `longest`, and one at least.

        size: of the screen in pixels; what is drawn outside it is moved to its border in what is given, and stays where
        it is in what the next fixation follows, as in the authors' code, whose temperature is the default too: spreads
        below 1 get smaller. scene [scene]. The network is to be in evaluation
        mode. Torch's own random state stays as it is.
        """
        device = self.first.device
        places, durations = torch.zeros(n, 0, 2, device=device), torch.zeros(n, 0, device=device)
        pictures = None if scene is None else scene.expand(n, -1)
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            torch.manual_seed(seed)
            while places.shape[1] < longest and (places.shape[1] == 0 or bool((durations.sum(1) < seconds).any())):
                place, duration = self(places, durations, pictures, temperature=temperature)
                places = torch.cat([places, place.sample()[:, -1:]], 1)
                durations = torch.cat([durations, duration.sample()[:, -1:]], 1)
        lengths = (durations.cumsum(1) <= seconds).sum(1).clamp(min=1).tolist()
        pixels = (places.clamp(-1, 1) + 1) / 2 * torch.tensor(size, device=device)
        return [
            Scanpath(path[:length].double().cpu().numpy(), size, 1000 * of[:length].double().cpu().numpy())
            for path, of, length in zip(pixels, durations, lengths)
        ]

    def _of_given(
        self, places: Tensor, durations: Tensor, scene: Tensor | None
    ) -> tuple[D.Distribution, D.Distribution]:
        if not bool((durations > 0).all()):
            raise ValueError("durations are above 0: leave out fixations without, and pad with any other number")
        if places.shape[1] == 0:
            raise ValueError("there is no fixation to tell the likelihood of")
        return self(places[:, :-1], durations[:, :-1], scene)

    def _context(self, places: Tensor, durations: Tensor, scene: Tensor | None) -> Tensor:
        if (scene is None) != (self.picture is None):
            raise ValueError(f"this model is made for {self.config.scene} numbers a picture: got scene={scene}")
        log = (durations.log() - self.config.log_mean) / self.config.log_std
        seen = torch.cat([places, (log if self.config.timed else torch.zeros_like(log))[..., None]], -1)
        state = self.first.expand(len(places), 1, -1)
        if places.shape[1]:
            state = torch.cat([state, self.history(seen)[0]], 1)
        if self.picture is not None:
            state = torch.cat([state, self.picture(scene)[:, None].expand_as(state)], -1)
        return self.dropout(state)


def _within(log_spread: Tensor) -> Tensor:
    """Logarithms of spreads held from -5 to 3; gradients pass, so that what lies outside can come back."""
    return log_spread + (log_spread.clamp(-5, 3) - log_spread).detach()


def tensors(paths: Sequence[Scanpath]) -> tuple[Tensor, Tensor, Tensor]:
    """Places, durations and which are fixations, padded to the longest path; what `TPPGaze` takes.

    ValueError where a path has no durations.
    """
    if not all(path.durations is not None for path in paths):
        raise ValueError("a point process needs durations, which a path lacks")
    places = [torch.from_numpy(2 * path.places / path.size - 1).float() for path in paths]
    durations = [torch.from_numpy(path.durations / 1000).float() for path in paths]  # type: ignore[operator]
    mask = [torch.ones(len(path), dtype=torch.bool) for path in paths]
    pad = nn.utils.rnn.pad_sequence
    return pad(places, True), pad(durations, True, padding_value=1.0), pad(mask, True)
