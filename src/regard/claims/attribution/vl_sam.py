"""The zoo's describer lists what it sees: does the flow of attention from its words point at the objects?

On Lin et al., VL-SAM (arXiv:2410.05963), whose ablation on CODA goes from attention (2.2) by flow alone (0.1) and
regularised flow (8.5) to weighted heads (10.1), points (12.3) and refinement (14.1); what crops and further questions
add (to 40.1) is not tried. Scenes are plain, so that the segmenter, which takes the region that looks like the point,
errs only where the point does: refinement has little to mend, and is reported. Controls: the map of another word of the
same caption, and points drawn at random. Besides, the mean over layers of plain attention is reported.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ... import loading
from ...attribution import attribute
from ...attribution.vl_sam import alike, segment
from ...call import Call
from ...catalog import Finding, Premise
from ...data.scenes import SHAPES, Dials, Scene, render, sample
from ...evaluation.localisation import pointing_game_score
from ...recording import statistic
from ...seam import record
from ...zoo.recipes import describer, viewer
from .._measure import Mean, mean

SCALES = "small", "large"
EXPECTED = (
    "the maximum of the regularised flow from a word lies on its object at least three times as often as without "
    "regularisation, and at least 5 percentage points more often than that of the last layer's attention; weighting "
    "heads lowers it by no more than two standard errors; the boxes of masks from its points fit, by an intersection "
    "over union of 0.5, at least twice as many objects as from points at random, and at least 10 points more than from "
    "another word's points; each by two standard errors"
)
SCENES = {"small": 40, "large": 1000}
HELD = 10**6
DIALS = Dials(objects=(2, 3), textures=("plain",))


class Asked(NamedTuple):
    """Captions with their pictures, one row for each word of an object, and the objects."""

    inputs: dict[str, Tensor]
    before: list[int]  # the position that predicts the word
    scene: list[int]
    masks: NDArray[np.bool_]  # [word, row, column]
    pixels: Tensor  # [word, channel, row, column], 0 to 1
    named: float  # share of the objects of which there is a word


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Where the flow from words points, with its parts and without, and what a segmenter makes of it."""
    model, processor = loading.load("describer")
    asked = captioned(model, processor, drawn(SCENES[scale], seed))

    def maps(**knobs: Any) -> Tensor:
        found = attribute(model, asked.inputs, at=asked.before, method="vl_sam", **knobs)
        return torch.from_numpy(found.values[found.image.values >= 0]).view(
            len(found), *(viewer.SIZE // viewer.PATCH,) * 2
        )

    whole = maps()
    last, everywhere = plain(model, asked)
    found = {
        "flow": whole,
        "not regularised": maps(regularised=False),
        "even heads": maps(head_weights=False),
        "collapsed": maps(regularised=False, head_weights=False),
        "last layer": last,
        "mean of layers": everywhere,
    }
    hits = {name: pointing_game_score(_large(one), asked.masks).astype(float) for name, one in found.items()}
    boxes = {
        "flow": fits(segment(whole, asked.pixels, alike), asked.masks),
        "one round": fits(segment(whole, asked.pixels, alike, rounds=1), asked.masks),
        "another word": fits(segment(whole[_others(asked.scene)], asked.pixels, alike), asked.masks),
        "at random": fits(segment(_random(whole, seed), asked.pixels, alike), asked.masks),
    }

    def over(values: NDArray[np.float64]) -> Mean:
        """Words of a scene are one draw."""
        return mean([values[np.array(asked.scene) == s].mean() for s in sorted(set(asked.scene))])

    times = over(hits["even heads"] - 3 * hits["collapsed"])
    ahead, weighted = over(hits["flow"] - hits["last layer"]), over(hits["flow"] - hits["even heads"])
    twice, own = over(boxes["flow"] - 2 * boxes["at random"]), over(boxes["flow"] - boxes["another word"])
    holds = (
        times.above()
        and ahead.value >= 0.05
        and ahead.above()
        and not weighted.below()
        and twice.above()
        and own.value >= 0.1
        and own.above()
    )
    points = ", ".join(f"{name} {over(hit):.1%}" for name, hit in hits.items())
    fit = ", ".join(f"{name} {over(one):.1%}" for name, one in boxes.items())
    chance = float(asked.masks.mean())
    measured = (
        f"the maximum lies on the object, {chance:.0%} of the picture: {points}; flow over the last layer {ahead:.1%}, "
        f"over even heads {weighted:.1%}; boxes that fit: {fit}; over another word {own:.1%} "
        f"({len(asked.before)} words of {SCENES[scale]} scenes)"
    )
    informed = over(hits["mean of layers"])
    premises = [
        Premise("objects that are named", "70%", f"{asked.named:.0%}", asked.named >= 0.7),
        Premise("an object is a small part of the picture", "20%", f"{chance:.0%}", chance <= 0.2),
        Premise(
            "plain attention of words finds objects: twice as often as chance",
            f"{2 * chance:.0%}",
            f"{informed.value:.0%}",
            informed.above(2 * chance),
        ),
    ]
    return Finding(holds, measured, EXPECTED, seed, premises=premises, draw=partial(_draw, asked, found, hits))


def drawn(n: int, seed: int) -> list[Scene]:
    """Scenes of objects of different shapes, which their words name without doubt."""
    kept: list[Scene] = []
    i = 0
    while len(kept) < n:
        scene = sample(DIALS, HELD + seed, i)
        i += 1
        if len({o.shape for o in scene.objects}) == len(scene.objects):
            kept.append(scene)
    return kept


def captioned(model: Any, processor: Any, scenes: list[Scene]) -> Asked:
    """What the model says of the scenes, word by word of their objects."""
    pictures = render(scenes, viewer.SIZE)
    images = [pictures.image(i) for i in range(len(scenes))]
    said = describer.reply(model, processor, images, [describer.PROMPTS[0]] * len(scenes))
    texts = [f"user: <image> {describer.PROMPTS[0]} assistant: {one}" for one in said]
    inputs = dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
    word = {shape: processor.tokenizer(shape, add_special_tokens=False)["input_ids"][0] for shape in SHAPES}
    found = []
    for i, scene in enumerate(scenes):
        for j, thing in enumerate(scene.objects):
            at = (inputs["input_ids"][i] == word[thing.shape]).nonzero()[:, 0].tolist()
            found += [(i, j, one) for one in at] if len(at) == 1 else []  # named twice, it is not told which is which
    rows = [i for i, _, _ in found]
    return Asked(
        {name: value[rows] for name, value in inputs.items()},
        [at - 1 for _, _, at in found],
        rows,
        np.stack([pictures.owner[i] == j for i, j, _ in found]),
        pictures.tensor()[rows],
        len(found) / sum(len(scene.objects) for scene in scenes),
    )


def plain(model: Any, asked: Asked) -> tuple[Tensor, Tensor]:
    """Attention to the patches where a word is predicted, mean over heads: of the last layer, and of all."""
    rows, side = torch.arange(len(asked.before)), viewer.SIZE // viewer.PATCH
    seen = []

    @statistic("batch key", title="Attention to patches")
    def read(call: Call) -> None:
        if call.site.stack == "language_model" and call.tokens is not None:
            weights = call.weights.dense()[rows, :, asked.before].mean(1)
            seen.append(weights[call.tokens.role("image")].view(-1, side, side))

    with torch.no_grad(), record(model, read):
        model(**asked.inputs)
    return seen[-1], torch.stack(seen).mean(0)


def fits(found: Tensor, masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Whether the boxes around masks overlap those around the objects by half. [word]"""

    def box(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        within = np.zeros_like(mask)
        if mask.any():
            (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (1, 0))
            within[top : bottom + 1, left : right + 1] = True
        return within

    pairs = [(box(a), box(b)) for a, b in zip(found.numpy(), masks)]
    return np.array([(a & b).sum() / (a | b).sum() >= 0.5 for a, b in pairs], float)


def _large(maps: Tensor) -> NDArray[np.float64]:
    grown = torch.nn.functional.interpolate(maps[:, None], (viewer.SIZE,) * 2, mode="bilinear")
    return grown[:, 0].double().numpy()


def _others(scene: list[int]) -> list[int]:
    """For each word the next one of its scene, in a circle; itself where it is alone."""
    same = [[j for j, s in enumerate(scene) if s == own] for own in scene]
    return [some[(some.index(i) + 1) % len(some)] for i, some in enumerate(same)]


def _random(maps: Tensor, seed: int) -> Tensor:
    """Maps with their values in any order, so that points lie anywhere."""
    chance = torch.rand(maps.flatten(1).shape, generator=torch.Generator().manual_seed(seed))
    return maps.flatten(1).gather(1, chance.argsort(1)).view_as(maps)


def _draw(asked: Asked, found: dict[str, Tensor], hits: dict[str, NDArray[np.float64]], figure: Any) -> None:
    axes = figure.subplots(5, 1 + len(found))
    for i, line in enumerate(axes):
        line[0].imshow(asked.pixels[i].permute(1, 2, 0).numpy())
        line[0].contour(asked.masks[i], levels=[0.5], colors="black", linewidths=1)
        for axis, (name, maps) in zip(line[1:], found.items()):
            axis.imshow(maps[i].numpy(), cmap="magma")
            axis.set_title(f"{name}\n{hits[name].mean():.0%}" if i == 0 else "", fontsize=7)
        for axis in line:
            axis.set_axis_off()
