"""Dynamic focus: a tree search over parts of the picture, between the model and an expert that gives boxes for words.

Li, Xu, Zhao and Peng, DyFo: A Training-Free Dynamic Focus Visual Search for Enhancing LMMs in Fine-Grained Visual
Understanding (arXiv:2504.14920, CVPR 2025). Neither the paper's text beyond its abstract nor the authors' code was at
hand; what follows is how others describe it, not checked. A focus is a part of the picture and words. Two actions
change it: the expert finds the words in the part, and the focus goes there; or the part grows around its middle, so
that context returns. Where expert and model agree that the words are there, a focus is worth the more the smaller it
is. Monte Carlo tree search chooses which focus to go on from, and the answers at good foci vote.

Ours, for want of the paper's: worth is 1 less the share of the picture, where both agree, and 0 elsewhere; a part grows
by one half; `weight` of exploration 1; there is no roll-out, a new focus' worth counts for all above it. The words are
those of the prompt, and the model agrees where it answers `confirm` with yes. Parts have the shape of the picture, so
that the model is given none of another size. The expert is a knob; without one, the model's own attention is asked, as
in `carve`. In the end the model is given the best of the parts that gave the winning answer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ._picture import WHOLE, Box, Redrawn, asking, cropped, finer, given, row_of, seen
from .carve import relevance

GROWN = 1.5  # by which a part grows
LEAST = 0.2  # of the picture's side, that a part has

STEPS = 16  # of an answer, at most

# Where in a picture a prompt's words are, in shares of the picture; none where they are not.
Expert = Callable[[Image.Image, str], Sequence[Box]]


@dataclass(eq=False)
class Focus:
    """A part of the picture that was looked at, and what it is worth, 0 to 1. visits, mean: of all below it, too."""

    box: Box
    worth: float = 0.0
    visits: int = 0
    mean: float = 0.0
    below: list[Focus] = field(default_factory=list)

    def visited(self, worth: float) -> None:
        self.visits += 1
        self.mean += (worth - self.mean) / self.visits


class Found(NamedTuple):
    """The answer that won, the best focus at which it was given, and all foci, the whole picture first."""

    answer: Any
    focus: Focus
    foci: list[Focus]


class dyfo(Redrawn):
    """Search the picture for the part to ask about, and ask of that.

    `fit` makes it: `dyfo.fit(model, inputs, processor)`. Inside the block the model is given the parts that were found.

    expert: gives of a picture and a prompt the boxes of what the prompt is about; None for the model's own attention.
    confirm: makes of a prompt a question that is answered with yes where the picture shows that; None for none, so that
    the expert's word is enough. budget: how many foci are gone on from; 0 leaves the picture as it is. depth: of the
    tree. weight: of exploring. images: the pictures before the processor, one a row, where they are finer than the
    model sees them: only then does a part bring detail.

    ValueError where the model reads no image tokens, or a row has not one picture.

    >>> import regard
    >>> from regard.interventions.dyfo import dyfo
    >>> from regard.zoo.recipes.describer import asked, pictures, tempting
    >>> model, processor = regard.load("describer")
    >>> inputs = asked(processor, pictures(tempting(1)), ["is there a fork?"])
    >>> with regard.intervene(model, dyfo.fit(model, inputs, processor, budget=1)):
    ...     ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    """

    off: ClassVar[Mapping[str, Any]] = {"budget": 0}
    needs = "the part of the picture to ask about, by a tree search"

    @classmethod
    def fit(  # type: ignore[override] - all of its knobs are known
        cls,
        model: nn.Module,
        inputs: Mapping[str, Any],
        processor: Any = None,
        *,
        expert: Expert | None = None,
        confirm: Callable[[str], str] | None = None,
        budget: int = 6,
        depth: int = 4,
        weight: float = 1.0,
        images: Sequence[Image.Image] | None = None,
    ) -> Self:
        shown = seen(model, inputs, processor, "dyfo")
        texts = processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
        new: list[Image.Image | None] = []
        kept: list[Tensor] = []
        for i, (fine, text) in enumerate(zip(finer(shown, images, "dyfo"), texts)):
            row, size = row_of(inputs, i), shown[i].size
            looker = _Looker(model, row, processor, fine, size, text, expert, confirm)
            found = search(looker.answer, looker.ground, looker.agree, budget=budget, depth=depth, weight=weight)
            new.append(None if found.focus.box == WHOLE else cropped(fine, found.focus.box, size))
            left, top, right, bottom = found.focus.box.pixels(fine.size)
            kept.append(torch.zeros(fine.size[::-1]))
            kept[-1][top:bottom, left:right] = 1
        return cls(inputs, given(model, inputs, processor, new, "dyfo"), kept)


def search(
    answer: Callable[[Box], Any],
    ground: Callable[[Box], Box | None],
    agree: Callable[[Box], bool],
    *,
    budget: int = 6,
    depth: int = 4,
    weight: float = 1.0,
) -> Found:
    """Search a picture for the part to answer from.

    answer: to the question, of a part. ground: where in a part what is asked about is. agree: whether expert and model
    agree that it is there. Each is asked once of a part. Answers are weighed by what their parts are worth; that of the
    whole picture, which is worth nothing, is given where no other is, or where others are even.
    """
    root = Focus(WHOLE, visits=1)
    worth = {WHOLE: 0.0}
    for _ in range(budget):
        path = [root]
        while path[-1].below:
            path.append(max(path[-1].below, key=lambda one: bound(one.mean, one.visits, path[-1].visits, weight)))
        leaf = path[-1]
        to = (ground(leaf.box), leaf.box.grown(GROWN)) if len(path) <= depth else ()
        boxes = [box for box in dict.fromkeys(to) if box is not None and box != leaf.box]
        for box in boxes:
            if box not in worth:
                worth[box] = 1 - box.area if agree(box) else 0.0
            leaf.below.append(Focus(box, worth[box]))
            for one in (*path, leaf.below[-1]):
                one.visited(worth[box])
        if not boxes:
            if leaf is root:
                break
            for one in path:
                one.visited(leaf.worth)
    foci = _under(root)
    return _voted(foci, answer)


def bound(mean: float, visits: int, above: int, weight: float = 1.0) -> float:
    """How promising a focus is: the mean worth below it, and more where it was seldom visited (UCT)."""
    return mean + weight * math.sqrt(math.log(above) / visits)


def _under(focus: Focus) -> list[Focus]:
    return [focus, *(one for some in focus.below for one in _under(some))]


def _voted(foci: Sequence[Focus], answer: Callable[[Box], Any]) -> Found:
    best = {focus.box: focus for focus in foci}  # parts that were come to twice vote once
    said = {box: answer(box) for box, focus in best.items() if focus.worth > 0 or box == WHOLE}
    votes: dict[Any, float] = defaultdict(float)
    for box, text in said.items():
        votes[text] += best[box].worth
    most = max(votes.values())
    won = said[WHOLE] if votes[said[WHOLE]] == most else max(votes, key=lambda text: votes[text])
    focus = max((best[box] for box, text in said.items() if text == won), key=lambda one: one.worth)
    return Found(won, focus, list(foci))


class _Looker:
    """Asks the model and the expert of parts of one picture."""

    def __init__(
        self,
        model: nn.Module,
        row: Mapping[str, Any],
        processor: Any,
        picture: Image.Image,
        size: tuple[int, int],
        text: str,
        expert: Expert | None,
        confirm: Callable[[str], str] | None,
    ) -> None:
        self.model, self.row, self.processor, self.picture, self.size = model, row, processor, picture, size
        self.text, self.expert = text, self.own if expert is None else expert
        self.confirm = None if confirm is None else confirm(text)

    def answer(self, box: Box) -> tuple[int, ...]:
        """Ids of the answer to the prompt, of a part."""
        return tuple(self.generated(self.shown(box))[0].tolist())

    def ground(self, box: Box) -> Box | None:
        """Where in a part the expert finds what is asked about, in shares of the whole."""
        boxes = self.expert(self.part(box), self.text)
        if not boxes:
            return None
        wide, high = box.right - box.left, box.bottom - box.top
        around = Box(
            box.left + wide * min(one.left for one in boxes),
            box.top + high * min(one.top for one in boxes),
            box.left + wide * max(one.right for one in boxes),
            box.top + high * max(one.bottom for one in boxes),
        )
        return around.grown(GROWN, LEAST)

    def agree(self, box: Box) -> bool:
        if not self.expert(self.part(box), self.text):
            return False
        if self.confirm is None:
            return True
        asked = asking(self.model, self.shown(box), self.processor, [self.confirm], "dyfo")
        said = self.processor.batch_decode(self.generated(asked), skip_special_tokens=True)[0]
        return said.strip().lower().startswith("yes")

    def own(self, picture: Image.Image, text: str) -> list[Box]:
        """A box around the patches that the model looks at half as much as at the first, or more."""
        looked = given(self.model, self.row, self.processor, [picture.resize(self.size)], "dyfo")
        values = relevance(self.model, looked, self.processor, steps=STEPS, general=None, method="dyfo")[0]
        rows, columns = (np.flatnonzero((values >= values.max() / 2).any(axis)) for axis in (1, 0))
        high, wide = values.shape
        return [Box(columns[0] / wide, rows[0] / high, (columns[-1] + 1) / wide, (rows[-1] + 1) / high)]

    def part(self, box: Box) -> Image.Image:
        return self.picture.crop(box.pixels(self.picture.size))

    def shown(self, box: Box) -> dict[str, Any]:
        """The row's inputs with a part in place of its picture."""
        if box == WHOLE:
            return dict(self.row)
        return given(self.model, self.row, self.processor, [cropped(self.picture, box, self.size)], "dyfo")

    @torch.no_grad()
    def generated(self, inputs: Mapping[str, Any]) -> Tensor:
        found = self.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, num_beams=1)  # type: ignore[operator]
        return found[:, inputs["input_ids"].shape[1] :]
