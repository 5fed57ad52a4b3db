"""Scenes that a vision-language model of the zoo is shown, what it is asked of them, and what it says.

Scenes of a set come from a seed; those of seeds from `JUDGED` on are for what is reported, the others for choosing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from .. import zoo
from ..data.scenes import Pictures, Scene, questions, render, sample
from ..evaluation import hallucination
from ..zoo.recipes import describer, lookout, witness
from ..zoo.recipes.viewer import HELD_OUT, PATCH, SIZE
from ._measure import Mean

MODELS = ("describer",)
JUDGED = 1000
ROWS = SIZE // PATCH
LARGE = 256  # pixels, of pictures that hold more than the model reads
OWNED = 0.1  # share of a patch that an object covers, from which on the patch is the object's
BATCH = 64

Under = Callable[[nn.Module, Mapping[str, Tensor], slice], Any]  # what to answer under, for a batch of the questions


SETS = {
    "tempted": "five to seven objects, of which one seldom comes alone, and does here nine times in ten",
    "crowded": "five to nine small objects",
    "tiny": f"five to nine very small ones, drawn at {LARGE} pixels and read at {SIZE}",
    "plain": "as in training",
}


class Asked(NamedTuple):
    """A question about scene number `scene`. about: the objects that the answer rests on."""

    scene: int
    text: str
    answer: str
    about: tuple[int, ...] = ()


class Gain(Mean):
    """A difference of shares, in points where it is written out."""

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} ± {100 * self.error:.1f} points"

    def __format__(self, spec: str) -> str:
        return super().__format__(spec) if spec else str(self)

    def sure(self, least: float = 0.0) -> bool:
        """Whether it is `least` or more, and two standard errors above zero."""
        return self.value >= least and self.above()


def paired(after: Tensor, before: Tensor, groups: Sequence[int] | None = None) -> Gain:
    """How much higher `after` is than `before`, both [case]. groups: of cases that are not independent, as one scene's.

    >>> import torch
    >>> paired(torch.tensor([1.0, 1, 1, 0]), torch.tensor([0.0, 1, 0, 0])).value
    0.5
    """
    difference = after.double() - before.double()
    mean = float(difference.mean())
    if groups is not None:
        index = torch.as_tensor(groups)
        sums = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add_(0, index, difference - mean)
        present = torch.bincount(index, minlength=len(sums)) > 0
        count = int(present.sum())
        return Gain(mean, float((sums[present].square().sum() * count / max(1, count - 1)).sqrt() / len(difference)))
    return Gain(mean, float(difference.std() / len(difference) ** 0.5))


class Shown:
    """`n` scenes of one of `SETS`, shown to a model. Pictures are read as the processor reads them."""

    def __init__(self, model: str, name: str, n: int, seed: int = 0) -> None:
        if name not in SETS:
            raise ValueError(f"no scenes {name!r}; there are {', '.join(SETS)}")
        self.name, self.n, self.seed = model, n, seed
        self.recipe = zoo.recipe(model)
        self.model, self.processor = zoo.load(model)
        self.size = LARGE if name == "tiny" else SIZE
        self.scenes: list[Scene]
        if name == "tempted":
            self.scenes = describer.tempting(n, seed=seed, mixture=witness.TEMPTED)
        elif name == "plain":
            self.scenes = self.recipe.plain(n, seed)
        else:
            dials = lookout.many(0.6 if name == "crowded" else 0.4)
            self.scenes = [sample(dials, HELD_OUT + seed, i) for i in range(n)]

    @cached_property
    def drawn(self) -> Pictures:
        return render(self.scenes, self.size)

    @cached_property
    def images(self) -> list[Image.Image]:
        return [self.drawn.image(i) for i in range(self.n)]

    @cached_property
    def owned(self) -> list[Tensor]:
        """Of each scene, which patches each object covers in part. bool [object, patch]"""
        masks = (torch.from_numpy(self.drawn.masks(i)).float() for i in range(self.n))
        return [F.avg_pool2d(some, self.size // ROWS).flatten(1) >= OWNED for some in masks]

    def patches(self, asked: Asked) -> Tensor:
        """What a question rests on. bool [patch]"""
        return self.owned[asked.scene][list(asked.about)].any(0)

    def colours(self) -> list[Asked]:
        """A question on a colour of each scene that has a shape once, at random."""
        found = []
        for i, scene in enumerate(self.scenes):
            if choices := questions(scene, "colour"):
                chosen = choices[np.random.default_rng((self.seed, i)).integers(len(choices))]
                found.append(Asked(i, chosen.text, chosen.answer, chosen.about))
        return found

    def polls(self, negatives: hallucination.Negatives = "adversarial") -> list[Asked]:
        """Questions on presence, half of them to be answered with yes; what comes together is counted in training's."""
        known = self.recipe.usual(600, self.seed)
        return [
            Asked(p.scene, p.text, p.answer, tuple(self.scenes[p.scene].find(p.shape)))
            for p in hallucination.polls(self.scenes, negatives, known=known, seed=self.seed)
        ]

    def answers(
        self,
        asked: Sequence[Asked],
        *,
        images: Sequence[Image.Image] | None = None,
        under: Under | None = None,
        length: int = 1,
        **options: Any,
    ) -> list[str]:
        """What the model says. images: of each question, in place of its scene's. `options` go to `generate`."""
        images = [self.images[a.scene] for a in asked] if images is None else images
        said = []
        for first in range(0, len(asked), BATCH):
            at = slice(first, first + BATCH)

            def method(model: nn.Module, inputs: Mapping[str, Tensor], at: slice = at) -> Any:
                assert under is not None
                return under(model, inputs, at)

            said += describer.reply(
                self.model,
                self.processor,
                images[at],
                [a.text for a in asked[at]],
                length=length,
                method=None if under is None else method,
                **options,
            )
        return said

    def right(self, asked: Sequence[Asked], **how: Any) -> Tensor:
        """Which answers are right, 0 or 1. [question]"""
        said = self.answers(asked, **how)
        return torch.tensor([float(text.split()[:1] == [a.answer]) for text, a in zip(said, asked)])

    def captions(self, **how: Any) -> list[str]:
        """What the model says of each scene."""
        describing = [Asked(i, describer.PROMPTS[0], "") for i in range(self.n)]
        return self.answers(describing, **{"length": 48, **how})

    def inputs(self, asked: Sequence[Asked], images: Sequence[Image.Image] | None = None) -> dict[str, Tensor]:
        images = [self.images[a.scene] for a in asked] if images is None else images
        return describer.asked(self.processor, images, [a.text for a in asked])


def named(captions: Sequence[str]) -> list[list[str]]:
    """The shapes that each caption names, in order."""
    known = hallucination.SHAPE_WORDS
    return [[known[word] for word in text.replace(",", " ").split() if word in known] for text in captions]


def invented(captions: Sequence[str], scenes: Sequence[Scene]) -> Tensor:
    """How many objects each caption names, how many of them are absent, and how many of those present it names."""
    rows = []
    for things, scene in zip(named(captions), scenes):
        there = hallucination.shapes(scene)
        rows.append([len(things), sum(t not in there for t in things), len(there & set(things)), len(there)])
    return torch.tensor(rows, dtype=torch.float64)


def means(method: Any, **knobs: Any) -> Under:
    """A method of the room `interventions` at its defaults, fitted to each batch."""
    return lambda model, inputs, at: method.fit(model, inputs, **knobs)


def share(counts: Tensor) -> float:
    """chair_i of `invented`."""
    return float(counts[:, 1].sum() / counts[:, 0].sum().clamp(min=1))


def fewer(before: Tensor, after: Tensor, draws: int = 500) -> Gain:
    """How much lower the share of absent objects is after than before, error by drawing scenes anew."""
    chance = torch.randint(len(before), (draws, len(before)), generator=torch.Generator().manual_seed(0))
    shares = [(t[chance][..., 1].sum(1) / t[chance][..., 0].sum(1).clamp(min=1)) for t in (before, after)]
    return Gain(share(before) - share(after), float((shares[0] - shares[1]).std()))
