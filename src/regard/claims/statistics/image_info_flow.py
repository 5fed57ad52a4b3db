"""The zoo's describer: which layers carry the picture to the words, what the question keeps, where words look.

The describer captions generated scenes whose objects are known, so an answer is scored without a judge: F1 of the
objects named (colour and shape) against those of the scene, over all scenes. Attention along a path is blocked in a
sliding window of a quarter of the layers. Where words look is read from true captions, as objects' patches are known.

The paper's models are language models of up to 80 layers, of which pictures were made a part later. The describer has
six layers, and learned words and pictures at once. What is asked of it is what the paper says, and no less.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
import xarray as xr
from torch.nn import functional as F

from ... import zoo
from ...catalog import Finding, Premise
from ...data.scenes import COLOURS, Dials, Scene, caption, render, sample, split
from ...evaluation.hallucination import SHAPE_WORDS
from ...statistics.image_info_flow import Word, image_info_flow, localised_reading, query_storage
from ...zoo.recipes import describer
from .._measure import failed

SCALES = "small", "large"
SIZE, PATCH = 64, 8  # pixels
DIALS = Dials(objects=(2, 3))
SCENES = {"small": 48, "large": 500}
PROMPT, SAID = "user: <image> describe assistant:", 28  # tokens of an answer at most

EXPECTED = (
    "blocking image tokens costs most F1 in a window of layers that is neither the first nor the last, and the first "
    "and the last cost at most half of that each; query tokens alone keep at least 0.3 of what the picture adds; at "
    "the layer that reads best, words of objects put at least twice as much of their attention to the image on the "
    "object's patches as chance would, and more on them than on those of another object"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Middle layers carry the picture, the question stores its gist, and words look at their objects."""
    model, processor = zoo.load("describer")
    scenes = [sample(DIALS, 2000 + seed, i) for i in range(SCENES[scale])]
    images = describer.pictures(scenes)

    def score() -> float:
        return _f1(describer.reply(model, processor, images, ["describe"] * len(scenes), length=SAID), scenes)

    flow = image_info_flow(model, score)
    free = flow.attrs["free"]
    able = Premise("the describer names objects", "F1 0.5 or more", f"{free:.2f}", free >= 0.5)
    cost = free - flow.sel(path="image to both").values
    stored = query_storage(flow)

    texts = [f"{PROMPT} {caption(scene)}" for scene in scenes]
    given = processor(text=texts, images=images, padding=True, return_tensors="pt")
    own, other = _words(processor, given["input_ids"], scenes)
    read, astray = (localised_reading(model, dict(given), words) for words in (own, other))
    gain = (read["inside"] / read["chance"]).mean(["word", "head"])
    best = int(gain.argmax("layer"))
    elsewhere = (astray["inside"] / astray["chance"]).mean(["word", "head"])
    hit, chance = float(read["hit"].mean(["word", "head"])[best]), float(read["chance"].mean())

    top = int(cost.argmax())
    asked = {
        f"the first layers carry the picture, not middle ones ({cost[0]:.0%} of the objects are lost without them, "
        f"{max(cost[1:]):.0%} at most without others)": 0 < top < len(cost) - 1
        and max(cost[0], cost[-1]) <= cost[top] / 2,
        "the question stores next to nothing of the picture": stored >= 0.3,
        "words do not look at their objects": float(gain[best]) >= 2 and float(gain[best]) > float(elsewhere[best]),
    }
    size = flow.attrs["window"]
    measured = (
        f"F1 {free:.2f}; image tokens blocked in {size} layers from layer "
        f"{', '.join(f'{int(layer)}: -{c:.2f}' for layer, c in zip(flow['layer'], cost))}; query tokens alone keep "
        f"{stored:.2f} of what the picture adds. At layer {int(read['layer'][best])} words put {float(gain[best]):.1f} "
        f"times chance on their object's patches ({float(elsewhere[best]):.1f} on another's), and the most attended "
        f"patch is the object's in {hit:.0%} (chance {chance:.0%}){failed(asked)}"
    )
    return Finding(
        all(asked.values()), measured, EXPECTED, seed, premises=[able], draw=partial(_draw, flow, gain, elsewhere)
    )


def _named(text: str) -> set[tuple[str, str]]:
    """Colour and shape of what a caption names."""
    words = split(text)
    return {(a, SHAPE_WORDS[b]) for a, b in itertools.pairwise(words) if a in COLOURS and b in SHAPE_WORDS}


def _f1(said: list[str], scenes: list[Scene]) -> float:
    pairs = [(_named(text), {(o.colour, o.shape) for o in scene.objects}) for text, scene in zip(said, scenes)]
    both, named, there = (sum(len(x) for x in some) for some in zip(*((a & b, a, b) for a, b in pairs)))
    return 2 * both / (named + there)


def _words(processor: Any, ids: torch.Tensor, scenes: list[Scene]) -> tuple[list[Word], list[Word]]:
    """The words of shapes that occur once, with their own patches; and with those of another object of the scene."""
    owner = torch.from_numpy(render(scenes, SIZE).owner).long() + 1
    most = int(owner.max()) + 1
    shown = F.avg_pool2d(F.one_hot(owner, most).movedim(-1, 1).float(), PATCH).flatten(2)[:, 1:] > 0.25
    own, other = [], []
    for row, scene in enumerate(scenes):
        names = [processor.tokenizer.decode([i]).strip() for i in ids[row].tolist()]
        for k, thing in enumerate(scene.objects):
            if len(scene.find(thing.shape)) > 1 or not shown[row, k].any():
                continue
            position = len(names) - 1 - names[::-1].index(thing.shape)
            own.append(Word(row, position, shown[row, k]))
            another = next(j for j in range(len(scene.objects)) if j != k)
            if shown[row, another].any():
                other.append(Word(row, position, shown[row, another]))
    return own, other


def _draw(flow: xr.DataArray, gain: xr.DataArray, elsewhere: xr.DataArray, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    size = flow.attrs["window"]
    for path, blocked in zip(flow["path"].values, flow.attrs["blocked"]):
        (line,) = left.plot(flow["layer"] + (size - 1) / 2, flow.sel(path=path), "o-", label=path)
        left.axhline(blocked, color=line.get_color(), linewidth=0.8, linestyle=":")
    left.axhline(flow.attrs["free"], color="black", linewidth=0.8)
    left.set(
        xlabel=f"middle of the {size} layers blocked",
        ylabel="F1 of objects",
        title="Dotted: in all layers; black: none",
    )
    left.legend(frameon=False, fontsize=8)
    right.plot(gain["layer"], gain, "o-", label="its own object")
    right.plot(elsewhere["layer"], elsewhere, "o-", label="another object")
    right.axhline(1, color="grey", linewidth=0.8)
    right.set(xlabel="layer", ylabel="attention, times chance", title="Patches that a word looks at")
    right.legend(frameon=False)
