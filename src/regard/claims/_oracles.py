"""What a method could gain at best: interventions that know the answer's place, and as much of them at random places.

Of each family of methods: weights of words on patches (`reweighed`), pictures without what is not asked about (`kept`,
`cropped`), a contrast with the picture without what is asked about (`contrasted`), states of right answers (`moved`),
patches that are dropped, and planted neurons. A family can be judged on a model only where its oracle gains `LEAST`,
and more than its control by two standard errors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..call import Call, Site
from ..data.scenes import render
from ..interventions._branch import Branch
from ..interventions._method import STACK, image_keys, layers
from ..interventions.var import after
from ._shown import LARGE, ROWS, Asked, Gain, Shown, Under, paired

LEAST = 0.05
STRENGTH = float(np.exp(3))
WINDOW = 0.4  # of the picture, that a crop holds


@dataclass(eq=False)
class Reweighed:
    """Weights on each patch, times a factor, in some layers of the language model; rows sum to one again.

    factors: [batch, patch]. words: whether only queries after the picture; otherwise all that see it.
    """

    factors: Tensor
    among: Collection[int]
    words: bool = True

    def where(self, call: Call) -> bool:
        return call.site.stack == STACK and call.site.layer in self.among and image_keys(call) is not None

    def weights(self, call: Call, weights: Tensor, rows: range) -> Tensor:
        image = image_keys(call)
        assert image is not None
        scale = torch.ones(image.shape)
        scale[image] = self.factors.flatten().float()
        changed = weights * scale[:, None, None]
        changed = changed / changed.sum(-1, keepdim=True).clamp(min=1e-12)
        if not self.words:
            return changed
        return torch.where(after(call, image, rows)[:, None, :, None], changed, weights)


@dataclass(eq=False)
class Muted:
    """Heads of the language model that give nothing."""

    heads: Collection[tuple[int, int]]

    def output(self, call: Call, output: Tensor) -> Tensor:
        mute = [head for layer, head in self.heads if call.site.stack == STACK and layer == call.site.layer]
        if not mute:
            return output
        changed = output.clone()
        changed[:, mute] = 0
        return changed


@dataclass(eq=False)
class Moved:
    """A direction added to the states of the last query that a layer of the language model gives."""

    direction: Tensor
    layer: int

    def hidden(self, site: Site, hidden: Tensor) -> Tensor:
        if site.stack != STACK or site.layer != self.layer:
            return hidden
        changed = hidden.clone()
        changed[:, -1] += self.direction
        return changed


def as_many(chosen: Tensor, seed: int) -> Tensor:
    """As many other patches of each row, at random. bool [row, patch]"""
    chance = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(chosen, 2.0)
    return (chance.argsort(1).argsort(1) < chosen.sum(1, keepdim=True)) & ~chosen


def reweighed(factors: Tensor, among: Collection[int], *, words: bool = True) -> Under:
    """Factors of patches for each question. [question, patch]"""
    return lambda model, inputs, at: Reweighed(factors[at], among, words)


def late(model: nn.Module) -> list[int]:
    """All layers of the language model but the first."""
    return layers(model, "the oracle")[1:]


def asked_patches(shown: Shown, asked: Sequence[Asked]) -> Tensor:
    return torch.stack([shown.patches(a) for a in asked])


def kept(image: Image.Image, patches: Tensor) -> Image.Image:
    """The picture with all but some of its patches [patch] black."""
    side = image.width // ROWS
    seen = patches.view(ROWS, ROWS).numpy().repeat(side, 0).repeat(side, 1)
    return Image.fromarray(np.where(seen[..., None], np.asarray(image), np.uint8(0)))


def shifted(patches: Tensor, seed: int) -> Tensor:
    """The same shape of patches elsewhere on the grid, the edges joined. [patch]"""
    rng = np.random.default_rng(seed)
    by = rng.integers(2, ROWS - 1, size=2).tolist()
    return patches.view(ROWS, ROWS).roll(by, (0, 1)).flatten()


def cropped(image: Image.Image, x: float, y: float) -> Image.Image:
    """A window of a picture around a point, within its edges."""
    left, top = (min(max(at - WINDOW / 2, 0), 1 - WINDOW) * image.width for at in (x, y))
    side = round(WINDOW * image.width)
    return image.crop((round(left), round(top), round(left) + side, round(top) + side))


def contrasted(shown: Shown, images: Sequence[Image.Image], alpha: float = 1.0) -> Under:
    """Logits, and `alpha` times what they are above those on other pictures, one for each question."""

    def under(model: nn.Module, inputs: Mapping[str, Tensor], at: slice) -> Any:
        pixels = shown.processor.image_processor(images=list(images[at]), return_tensors="pt")["pixel_values"]
        branch = Branch(model, {**inputs, "pixel_values": pixels}, nullcontext)

        def process(ids: Tensor, scores: Tensor) -> Tensor:
            return (1 + alpha) * scores - alpha * branch.logits(ids)

        return process

    return under


class Family(NamedTuple):
    """What an oracle and its control gain over plain answers, and the oracle over its control."""

    oracle: Gain
    control: Gain
    over: Gain

    @property
    def headroom(self) -> bool:
        return self.oracle.sure(LEAST) and self.over.sure()

    def __str__(self) -> str:
        return f"oracle {self.oracle}, control {self.control}"


def _family(plain: Tensor, oracle: Tensor, control: Tensor) -> Family:
    return Family(paired(oracle, plain), paired(control, plain), paired(oracle, control))


def attention(shown: Shown, asked: Sequence[Asked], plain: Tensor) -> Family:
    """Words look at the patches of what is asked about e^3 times as much; or at as many others."""
    patches = asked_patches(shown, asked)
    ways = [
        shown.right(asked, under=reweighed(1 + (STRENGTH - 1) * some.float(), late(shown.model)))
        for some in (patches, as_many(patches, shown.seed))
    ]
    return _family(plain, *ways)


def masks(shown: Shown, asked: Sequence[Asked], plain: Tensor) -> Family:
    """What is asked about alone, the rest black; or a part of the same shape elsewhere."""
    patches = asked_patches(shown, asked)
    others = [shifted(some, shown.seed + i) for i, some in enumerate(patches)]
    ways = [
        shown.right(asked, images=[kept(shown.images[a.scene], p) for a, p in zip(asked, some)])
        for some in (patches, others)
    ]
    return _family(plain, *ways)


def crops(shown: Shown, asked: Sequence[Asked], plain: Tensor) -> Family:
    """A window around what is asked about, of the picture drawn at 256 pixels; or a window anywhere."""
    large = render(shown.scenes, LARGE)
    rng = np.random.default_rng(shown.seed)
    places = [(shown.scenes[a.scene].objects[a.about[0]].x, shown.scenes[a.scene].objects[a.about[0]].y) for a in asked]
    ways = [
        shown.right(asked, images=[cropped(large.image(a.scene), x, y) for a, (x, y) in zip(asked, some)])
        for some in (places, rng.random((len(asked), 2)).tolist())
    ]
    return _family(plain, *ways)


def contrasts(shown: Shown, asked: Sequence[Asked], plain: Tensor) -> Family:
    """Less what it says without what is asked about; or without another object."""
    rng = np.random.default_rng(shown.seed)
    ways = []
    for which in ("asked", "other"):
        scenes = []
        for a in asked:
            scene = shown.scenes[a.scene]
            others = [i for i in range(len(scene.objects)) if i not in a.about]
            gone = a.about if which == "asked" or not others else (others[rng.integers(len(others))],)
            for i in sorted(gone, reverse=True):
                scene = scene.without(i)
            scenes.append(scene)
        drawn = render(scenes, shown.size)
        ways.append(shown.right(asked, under=contrasted(shown, [drawn.image(i) for i in range(len(asked))])))
    return _family(plain, *ways)


def states(shown: Shown, asked: Sequence[Asked], plain: Tensor) -> Family:
    """Half of the questions tell how states of right answers differ; the other half is answered with that added."""
    middle = len(layers(shown.model, "the oracle")) // 2
    half = len(asked) // 2
    with torch.inference_mode():
        found = torch.cat(
            [
                shown.model(**shown.inputs(asked[i : min(i + 64, half)]), output_hidden_states=True)
                .hidden_states[middle + 1][:, -1]
                .float()
                for i in range(0, half, 64)
            ]
        )
    right = plain[:half] > 0
    direction = found[right].mean(0) - found[~right].mean(0)
    other = torch.randn(direction.shape, generator=torch.Generator().manual_seed(shown.seed))
    other = other / other.norm() * direction.norm()
    ways = [
        shown.right(asked[half:], under=lambda model, inputs, at, d=d: Moved(d, middle)) for d in (direction, other)
    ]
    return _family(plain[half:], *ways)


def pruning(shown: Shown, asked: Sequence[Asked], plain: Tensor) -> Family:
    """Words see the patches of objects only; or as many patches at random. What each loses: gains are below zero."""
    objects = torch.stack([shown.owned[a.scene].any(0) for a in asked])
    chance = torch.rand(objects.shape, generator=torch.Generator().manual_seed(shown.seed))
    some = chance.argsort(1).argsort(1) < objects.sum(1, keepdim=True)
    every = layers(shown.model, "the oracle")
    return _family(
        plain, *(shown.right(asked, under=reweighed(k.float(), every, words=False)) for k in (objects, some))
    )


def registers(shown: Shown, asked: Sequence[Asked], plain: Tensor) -> Family | None:
    """The planted neurons of the tower write nothing; or as many other neurons of their layer. None without any."""
    config = shown.model.config.vision_config
    planted = getattr(config, "planted", None)
    if planted is None:
        return None
    rng = np.random.default_rng(shown.seed)
    others = rng.choice(planted["neurons"][0], len(planted["neurons"]), replace=False).tolist()
    write = shown.model.model.vision_tower.layers[planted["layer"]].mlp.fc2.weight
    ways = []
    for neurons in (planted["neurons"], others):
        before = write[:, neurons].clone()
        try:
            with torch.no_grad():
                write[:, neurons] = 0
            ways.append(shown.right(asked))
        finally:
            with torch.no_grad():
                write[:, neurons] = before
    return _family(plain, *ways)


FAMILIES: dict[str, Callable[[Shown, Sequence[Asked], Tensor], Family | None]] = {
    "attention": attention,
    "masks": masks,
    "crops": crops,
    "contrasts": contrasts,
    "states": states,
    "pruning": pruning,
    "registers": registers,
}
