"""What mechanisms are compared on. A task is a function here, declared with `@task`; nothing else names one.

It makes the data of a seed: the same for every mechanism, so that differences between two are paired.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..claims._data import folder
from ..claims._passkey import DIGITS, NOISE, TOKENS, noise
from ..data.loaders import omniglot_drawings
from ..data.scenes import SHAPES, Dials, Scenes, render
from ..evaluation import cab

BATCH, HELD_OUT = 32, 512  # items of a step of training, and of the judgement
SIZE, PATCH = 32, 4  # pixels of a picture's side, and of a token's
TRAIN = 2048  # scenes that are trained on, over and over


class Data(NamedTuple):
    """Of one seed. What is between `embed` and `read` is the same for all tasks: [batch, token, dim] to the same."""

    shape: tuple[int, ...]  # (token,) or (row, column)
    embed: Callable[[int], nn.Module]  # of dim: from inputs to [batch, token, dim]
    read: Callable[[int], nn.Module]  # of dim: from [batch, token, dim] to outputs
    batch: Callable[[int], tuple[Tensor, Tensor]]  # of a step: inputs [batch, ...] and targets
    held_out: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]  # of outputs and targets, to train by: a mean
    quality: Callable[[Tensor, Tensor], Tensor]  # of outputs and targets: what is reported, a mean


@dataclass(frozen=True)
class Task:
    name: str
    about: str
    pattern: str  # "causal" or "full"
    measure: str  # what quality is
    higher: bool  # whether more of it is better
    unit: str  # what is counted a second: tokens or pictures
    share: float  # of a scale's steps that it is trained for
    folder: str | None  # of public data that it needs
    make: Callable[[int], Data]  # of a seed

    @property
    def pictures(self) -> bool:
        return self.unit == "pictures"

    def lacking(self) -> str | None:
        """Why its data are not at hand, None where they are."""
        try:
            if self.folder is not None:
                folder(self.folder)
        except ValueError as error:
            return str(error)
        return None


TASKS: dict[str, Task] = {}


def task(
    about: str, *, pattern: str, measure: str, higher: bool, unit: str, share: float = 1.0, data: str | None = None
) -> Callable[[Callable[[int], Data]], Callable[[int], Data]]:
    """Declare a task: see `Task` and `Data`."""

    def declare(make: Callable[[int], Data]) -> Callable[[int], Data]:
        name = make.__name__.replace("_", "-")
        TASKS[name] = Task(name, about, pattern, measure, higher, unit, share, data, make)
        return make

    return declare


# ------------------------------------------------------------------------------------------------------------ sequences


@task(
    "the next character of children's books; judged on the last fiftieth, which was held out",
    pattern="causal",
    measure="loss, nats a character",
    higher=False,
    unit="tokens",
    share=1.5,
    data="text_books",
)
def language(seed: int) -> Data:
    ids, characters = _book()
    cut, length = len(ids) - len(ids) // 50, 128
    known, unknown = ids[:cut], ids[cut:]

    def drawn(text: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(text) - length, (n, 1), generator=generator) + torch.arange(length + 1)
        return text[at[:, :-1]], text[at[:, 1:]]

    return Data(
        (length,),
        lambda dim: Tokens(characters, length, dim),
        lambda dim: nn.Linear(dim, characters),
        lambda step: drawn(known, BATCH // 2, _generator(seed, step)),
        drawn(unknown, HELD_OUT // 2, _generator(seed, -1)),
        _cross_entropy,
        _cross_entropy,
    )


@task(
    "of pairs of a key and a value shown before, the value of each key that is asked for (CAB's causal pattern)",
    pattern="causal",
    measure="accuracy",
    higher=True,
    unit="tokens",
    share=1.5,
)
def recall(seed: int) -> Data:
    def drawn(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        key, value, _, answer = cab.task("causal self", n, generator)
        return torch.stack([key, value], -1), answer

    return Data(
        (cab.PAIRS + cab.ASKED,),
        Pairs,
        lambda dim: nn.Linear(dim, cab.SYMBOLS),
        lambda step: drawn(BATCH, _generator(seed, step)),
        drawn(HELD_OUT, _generator(seed, -1)),
        _cross_entropy,
        _accuracy,
    )


@task(
    f"at the end of {TOKENS} tokens of noise, the one digit that stood anywhere among them",
    pattern="causal",
    measure="accuracy",
    higher=True,
    unit="tokens",
)
def passkey(seed: int) -> Data:
    return Data(
        (TOKENS,),
        lambda dim: Tokens(NOISE + DIGITS, TOKENS, dim),
        lambda dim: Last(dim, DIGITS),
        lambda step: noise(BATCH, TOKENS - 1, generator=_generator(seed, step)),
        noise(HELD_OUT, TOKENS - 1, generator=_generator(seed, -1)),
        _cross_entropy,
        _accuracy,
    )


# ------------------------------------------------------------------------------------------------------------- pictures


@task(
    "which of ten shapes a picture shows, anywhere, in any colour and of three sizes",
    pattern="full",
    measure="accuracy",
    higher=True,
    unit="pictures",
    share=1.5,
)
def classify(seed: int) -> Data:
    dials = Dials(objects=(1, 1), scale=1.5)

    def made(n: int, of: int) -> tuple[Tensor, Tensor]:
        items = Scenes(n, dials, size=SIZE, seed=of)
        shown = [SHAPES.index(items.scene(i).objects[0].shape) for i in range(n)]
        return items.render(range(n)).tensor(), torch.tensor(shown)

    return _pictures(made, seed, lambda dim: Mean(dim, len(SHAPES)), _cross_entropy, _accuracy)


@task(
    f"where the star is, among two other shapes: which token of {PATCH} x {PATCH} pixels shows most of it; right where "
    "it shows any",
    pattern="full",
    measure="accuracy",
    higher=True,
    unit="pictures",
)
def localise(seed: int) -> Data:
    dials = Dials(objects=(3, 3), shapes=tuple(shape for shape in SHAPES if shape != "star"))

    def made(n: int, of: int) -> tuple[Tensor, Tensor]:
        items = Scenes(n, dials, size=SIZE, seed=of)
        pictures = render([items.scene(i).but(i % 3, shape="star") for i in range(n)], SIZE)
        seen = (torch.from_numpy(pictures.owner).long() == (torch.arange(n) % 3)[:, None, None]).float()
        return pictures.tensor(), F.avg_pool2d(seen[:, None], PATCH).flatten(1)

    def loss(scores: Tensor, share: Tensor) -> Tensor:
        return F.cross_entropy(scores, share / share.sum(-1, keepdim=True).clamp_min(1e-6))

    def quality(scores: Tensor, share: Tensor) -> Tensor:
        return (share.gather(1, scores.argmax(-1, keepdim=True)) > 0).float().mean()

    return _pictures(made, seed, Each, loss, quality)


@task(
    "which of 136 characters of five alphabets (Omniglot) a drawing shows; judged on drawings by five other people",
    pattern="full",
    measure="accuracy",
    higher=True,
    unit="pictures",
    share=1.5,
    data="omniglot_small",
)
def omniglot(seed: int) -> Data:
    drawings, labels, test = _omniglot()
    known, unknown = drawings[~test], drawings[test]

    def batch(step: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(known), (BATCH,), generator=_generator(seed, step))
        return known[at], labels[~test][at]

    characters = int(labels.max()) + 1
    return Data(
        (SIZE // PATCH,) * 2,
        lambda dim: Patches(1, dim),
        lambda dim: Mean(dim, characters),
        batch,
        (unknown, labels[test]),
        _cross_entropy,
        _accuracy,
    )


def _pictures(
    made: Callable[[int, int], tuple[Tensor, Tensor]],
    seed: int,
    read: Callable[[int], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    quality: Callable[[Tensor, Tensor], Tensor],
) -> Data:
    """Of scenes. made: pictures and targets of a number of scenes of a seed."""
    images, targets = made(TRAIN, 2 * seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(images), (BATCH,), generator=_generator(seed, step))
        return images[at], targets[at]

    shape = (SIZE // PATCH,) * 2
    return Data(shape, lambda dim: Patches(3, dim), read, batch, made(HELD_OUT, 2 * seed + 1), loss, quality)


@cache
def _book() -> tuple[Tensor, int]:
    """Characters of a book as numbers, and how many kinds there are."""
    with gzip.open(folder("text_books") / "children_a.txt.gz", "rt", encoding="utf-8") as file:
        codes = np.frombuffer(file.read().encode("utf-32-le"), np.uint32)
    kinds, ids = np.unique(codes, return_inverse=True)
    return torch.from_numpy(ids.astype(np.int64)), len(kinds)


@cache
def _omniglot() -> tuple[Tensor, Tensor, Tensor]:
    """Drawings [drawing, 1, row, column], the character of each, and which are by the people who are judged by."""
    found = list(omniglot_drawings(folder("omniglot_small") / "images_background_small1.zip"))
    kinds = sorted({(d.alphabet, d.character) for d in found})
    ink = torch.from_numpy(np.stack([d.ink for d in found])).float()[:, None]
    labels = torch.tensor([kinds.index((d.alphabet, d.character)) for d in found])
    return F.adaptive_avg_pool2d(ink, SIZE), labels, torch.tensor([d.drawer > 15 for d in found])


# ---------------------------------------------------------------------------------------- first and last layers, scores


class Tokens(nn.Module):
    def __init__(self, kinds: int, length: int, dim: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(kinds, dim), nn.Parameter(0.02 * torch.randn(length, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.place


class Pairs(nn.Module):
    """A key and its value, or that it is hidden, in one token; where it stands says nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.keys, self.values = nn.Embedding(cab.SYMBOLS, dim // 2), nn.Embedding(cab.SYMBOLS + 1, dim // 2)

    def forward(self, pairs: Tensor) -> Tensor:
        return torch.cat([self.keys(pairs[..., 0]), self.values(pairs[..., 1])], -1)


class Patches(nn.Module):
    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, dim, PATCH, PATCH)
        self.place = nn.Parameter(0.02 * torch.randn((SIZE // PATCH) ** 2, dim))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.patch(pictures).flatten(2).mT + self.place


class Last(nn.Linear):
    """Scores of the last token."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input[:, -1])


class Mean(nn.Linear):
    """Scores of the mean over tokens."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.mean(1))


class Each(nn.Linear):
    """One score of each token."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 1)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[..., 0]


def _cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, -2), target.flatten(), ignore_index=-1)


def _accuracy(scores: Tensor, target: Tensor) -> Tensor:
    return (scores.argmax(-1) == target)[target >= 0].float().mean()


def _generator(seed: int, step: int) -> torch.Generator:
    """Of one step of a seed: a run that goes on sees what an unbroken one would have."""
    return torch.Generator().manual_seed((seed + 1) * 1_000_003 + step)
