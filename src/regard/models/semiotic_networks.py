"""Perception as a loop: what is observed is drawn, what is drawn is observed again, until it settles.

Kupeev and Nitzany, Semiotics Networks Representing Perceptual Inference (arXiv:2310.05212): the observed-to-seen step
is an autoencoder; the orbit of a picture under it ends at an attractor, the percept; two autoencoders that observe each
other's percepts hold a dialogue; a classifier that is given percepts in place of pictures is perceptualised, in its
stochastic form with the mean percept of several variants of a picture.

No code of the authors is at hand: the loop and the classifier around it follow the paper's description, rounds, draws
and noise are defaults of ours, and variants are made by Gaussian noise. Autoencoder and classifier are any modules.
There is no attention here, so `regard.record` has nothing to read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Percepts(NamedTuple):
    """Where pictures settled."""

    pictures: Tensor  # [batch, channel, row, column]
    rounds: Tensor  # how many each took [batch]
    settled: Tensor  # whether the last round changed no pixel by `tolerance` [batch]
    orbit: Tensor | None  # the picture and what was seen after each round, if asked for [round, batch, ...]


@torch.no_grad()
def observe(
    autoencoder: nn.Module, pictures: Tensor, *, rounds: int = 50, tolerance: float = 1e-3, orbit: bool = False
) -> Percepts:
    """Let an autoencoder observe pictures, and what it draws of them, until no pixel changes by `tolerance`.

    autoencoder: in evaluation mode, where it has layers that differ in training; rounds: at most; orbit: keep every
    round; pictures [batch, ...]. Pictures that have settled are left as they are, so that each is as it would be alone.
    ValueError for an autoencoder whose output has another shape.

    >>> import torch
    >>> from torch import nn
    >>> from regard.models.semiotic_networks import observe
    >>> half = nn.Linear(1, 1)
    >>> _ = half.weight.data.fill_(0.5), half.bias.data.fill_(1.0)
    >>> found = observe(half, torch.zeros(1, 1), tolerance=0.3)  # 0, 1, 1.5, 1.75
    >>> found.pictures.item(), found.rounds.item()
    (1.75, 3)
    """
    if rounds < 1:
        raise ValueError(f"observe: one round or more, got {rounds}")
    seen, taken = pictures.clone(), torch.zeros(len(pictures), dtype=torch.long, device=pictures.device)
    settled = torch.zeros_like(taken, dtype=torch.bool)
    kept = [pictures]
    for _ in range(rounds):
        moving = ~settled
        if not moving.any():
            break
        before = seen[moving]
        after = autoencoder(before)
        if after.shape != before.shape:
            raise ValueError(
                f"observe: the autoencoder makes {list(after.shape)} of {list(before.shape)}; what it draws has to be "
                "a picture that it can observe again"
            )
        seen[moving], taken[moving] = after, taken[moving] + 1
        settled[moving] = (after - before).flatten(1).abs().amax(1) < tolerance
        kept.append(seen.clone())
    return Percepts(seen, taken, settled, torch.stack(kept) if orbit else None)


def perceive(
    autoencoder: nn.Module,
    pictures: Tensor,
    *,
    draws: int = 16,
    noise: float = 0.3,
    rounds: int = 50,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The mean percept of `draws` variants of each picture, with Gaussian noise of this deviation. As pictures.

    Variants settle each for itself, and then the mean is taken. One draw without noise is `observe`.
    """
    if draws < 1:
        raise ValueError(f"perceive: one draw or more, got {draws}")
    variants = pictures[:, None].expand(-1, draws, *pictures.shape[1:])
    lots = torch.randn(variants.shape, generator=generator, device=pictures.device, dtype=pictures.dtype)
    found = observe(autoencoder, (variants + noise * lots).flatten(0, 1), rounds=rounds, tolerance=tolerance)
    return found.pictures.unflatten(0, (-1, draws)).mean(1)


@torch.no_grad()
def dialogue(
    first: nn.Module, second: nn.Module, pictures: Tensor, *, turns: int, steps: tuple[int, int] = (1, 1)
) -> list[Tensor]:
    """Two autoencoders observe what the other has drawn, in turn, each for its number of steps. What each turn ended in

    In the long run what they show each other comes round again: a bipartite orbit.
    """
    said = []
    for turn in range(turns):
        for _ in range(steps[turn % 2]):
            drawn = (first, second)[turn % 2](pictures)
            if drawn.shape != pictures.shape:
                raise ValueError(f"dialogue: {list(drawn.shape)} of {list(pictures.shape)} is no picture to go on with")
            pictures = drawn
        said.append(pictures)
    return said


class Perceptualised(nn.Module):
    """A classifier of what an autoencoder perceives. [batch, channel, row, column] -> logits [batch, class]

    draws, noise: 1 and 0 for the vanilla form; rounds, tolerance: of `observe`. The autoencoder is frozen and stays in
    evaluation mode; no gradient passes through it. `seen` keeps what the classifier was last given.

    >>> import torch
    >>> from torch import nn
    >>> from regard.models.semiotic_networks import semiotic_networks
    >>> model = semiotic_networks(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), nn.Identity(), draws=1, noise=0.0)
    >>> model(torch.randn(2, 1, 4, 4)).shape, model.seen.shape
    (torch.Size([2, 3]), torch.Size([2, 1, 4, 4]))
    """

    seen: Tensor | None

    def __init__(
        self,
        classifier: nn.Module,
        autoencoder: nn.Module,
        *,
        draws: int = 16,
        noise: float = 0.3,
        rounds: int = 50,
        tolerance: float = 1e-3,
    ) -> None:
        super().__init__()
        if draws < 1 or rounds < 1:
            raise ValueError(f"Perceptualised: one draw and one round or more, got {draws} and {rounds}")
        self.classifier, self.autoencoder = classifier, autoencoder.eval().requires_grad_(False)
        self.draws, self.noise, self.rounds, self.tolerance = draws, noise, rounds, tolerance
        self.seen = None

    def train(self, mode: bool = True) -> Perceptualised:
        super().train(mode)
        self.autoencoder.eval()
        return self

    def forward(self, pictures: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """generator: of the variants; without it they differ from call to call."""
        self.seen = perceive(
            self.autoencoder,
            pictures,
            draws=self.draws,
            noise=self.noise,
            rounds=self.rounds,
            tolerance=self.tolerance,
            generator=generator,
        )
        return self.classifier(self.seen)


def semiotic_networks(
    classifier: nn.Module,
    autoencoder: nn.Module,
    *,
    draws: int = 16,
    noise: float = 0.3,
    rounds: int = 50,
    tolerance: float = 1e-3,
) -> Perceptualised:
    """A classifier, perceptualised: `Perceptualised` with these knobs. Train it on the same pictures as ever."""
    return Perceptualised(classifier, autoencoder, draws=draws, noise=noise, rounds=rounds, tolerance=tolerance)
