"""Scenes of 16 classes that one object tells apart: does the true class's prompt look at it?

On Chowdhury et al., Prompt-CAM (arXiv:2501.09333), section 4, who have people judge the maps of birds; the bars here
are ours. The backbone is the zoo's viewer, which was trained to say of its patches what they show. Each scene has a
blue square, a green circle, and an object by whose colour and shape its class goes. Controls: the prompt of a class
that shares neither; and the class token of the same backbone tuned with as many prompts and an ordinary head. With 4
classes instead of 16, prompts learned to look at what speaks against their class just as often. Trained by AdamW for 20
seconds, where the authors have SGD for 130 epochs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ... import loading
from ...attribution import attribute
from ...attribution.prompt_cam import PromptCAM, rank_heads
from ...call import Call
from ...catalog import Finding, Premise
from ...data.scenes import Dials, Scene, render, sample
from ...evaluation.localisation import inside_score, pointing_game_score
from ...recording import statistic
from ...seam import record
from ...zoo.recipes import viewer
from .._measure import Mean, mean

SCALES = "small", "large"
EXPECTED = (
    "the map of the true class, mean over heads, points at the object that sets the class apart in at least 40% of "
    "scenes, and its weight there is at least twice the object's share of the picture; the prompt of another class, "
    "and the class token of a tuned classifier, point at it at least 10 percentage points less often, each by two "
    "standard errors"
)
STEPS, BATCH, RATE = 120, 16, 5e-3
SCENES = {"small": 120, "large": 1000}
HELD = 10**6  # added to the seed of scenes that are not trained on
COLOURS, SHAPES = ("red", "yellow", "cyan", "purple"), ("star", "heart", "ring", "cross")
CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
ELSE = 5  # classes further on, neither colour nor shape is the same
ALIKE = (("blue", "square"), ("green", "circle"))
DIALS = Dials(objects=(3, 3), textures=("plain", "grain"))


class Tuned(PromptCAM):
    """The same prompts, and a head for each class that reads the class token: visual prompt tuning."""

    def __init__(self, *given: Any, **knobs: Any) -> None:
        super().__init__(*given, **knobs)
        self.head = nn.Linear(self.prompts.shape[2], self.prompts.shape[1])

    def read(self, states: Tensor) -> Tensor:
        return self.head(states[:, self.prompts.shape[1]])


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Where the true class's prompt, that of another and a class token look."""
    scenes, classes = drawn(SCENES[scale], HELD + seed)
    pictures = render(scenes, viewer.SIZE)
    inputs, masks = {"pixel_values": viewer.pixels(pictures)}, pictures.owner == len(ALIKE)
    model, tuned = trained(PromptCAM, seed), trained(Tuned, seed)
    with torch.no_grad():
        right = [float((one(**inputs).logits.argmax(-1) == classes).float().mean()) for one in (model, tuned)]
    maps = {
        "true class": attribute(model, inputs, classes, method="prompt_cam").values,
        "another class": attribute(model, inputs, (classes + ELSE) % len(CLASSES), method="prompt_cam").values,
        "class token": class_token(tuned, inputs),
    }
    hits = {name: pointing_game_score(found, masks).astype(float) for name, found in maps.items()}
    points = {name: mean(hit) for name, hit in hits.items()}
    ahead = {name: mean(hits["true class"] - hits[name]) for name in list(hits)[1:]}
    share, held = mean(masks.mean((1, 2))), mean(inside_score(maps["true class"], masks))
    best = mean(_best_head(model, inputs, classes, masks))
    holds = (
        points["true class"].value >= 0.4
        and held.value >= 2 * share.value
        and all(by.value >= 0.1 and by.above() for by in ahead.values())
    )
    measured = (
        f"the true class's prompt points at the object in {points['true class']:.1%}, its head that ranks first in "
        f"{best:.1%}, another class's in {points['another class']:.1%} ({ahead['another class']:.1%} apart), the class "
        f"token in {points['class token']:.1%} ({ahead['class token']:.1%} apart); {held:.1%} of the weight on patches "
        f"falls on the object, which is {share.value:.1%} of the picture ({len(scenes)} scenes)"
    )
    told = _told(scenes, masks, inputs, classes)
    premises = [
        Premise(
            "both classifiers are right on scenes held out",
            "90%",
            " and ".join(f"{r:.0%}" for r in right),
            min(right) >= 0.9,
        ),
        Premise(
            "patches of the object tell its class before the last layer, by the nearest mean",
            "70%",
            f"{told:.0%}",
            told >= 0.7,
        ),
        Premise(
            "the class token does not point at it anyway",
            "less than 95%",
            f"{points['class token'].value:.0%}",
            points["class token"].value < 0.95,
        ),
    ]
    return Finding(holds, measured, EXPECTED, seed, premises=premises, draw=partial(_draw, scenes[:6], maps, points))


def drawn(n: int, seed: int, start: int = 0) -> tuple[list[Scene], Tensor]:
    """Scenes and their classes; the object that decides is the last, and may lie anywhere."""
    scenes, classes = [], torch.arange(start, start + n) % len(CLASSES)
    for i, which in enumerate(classes.tolist(), start):
        scene = sample(DIALS, seed, i)
        for at, (colour, shape) in enumerate((*ALIKE, CLASSES[which].split())):
            scene = scene.but(at, colour=colour, shape=shape)
        scenes.append(scene)
    return scenes, classes


def trained(kind: type[PromptCAM], seed: int) -> PromptCAM:
    torch.manual_seed(seed)
    backbone: Any = loading.load("viewer").model.base_model
    model = kind(backbone, CLASSES).train()
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), RATE)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=STEPS)
    for step in range(STEPS):
        scenes, classes = drawn(BATCH, seed, step * BATCH)
        loss = F.cross_entropy(model(viewer.pixels(render(scenes, viewer.SIZE))).logits, classes)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
    return model.eval()


def class_token(model: Tuned | PromptCAM, inputs: dict[str, Tensor]) -> NDArray[np.float32]:
    """Weight of the class token on patches in the last layer, mean over heads, in pixels."""
    count, seen = model.prompts.shape[1], []

    @statistic("batch head key", title="Weights of the class token")
    def read(call: Call) -> None:
        seen.append(call.weights.rows(count, count + 1)[:, :, 0, count + 1 :])

    with torch.no_grad(), record(model, read):
        model(**inputs)
    side = viewer.SIZE // viewer.PATCH
    weights = seen[-1].mean(1).unflatten(-1, (side, side))
    return F.interpolate(weights[:, None], viewer.SIZE, mode="bicubic")[:, 0].numpy()


def _best_head(
    model: PromptCAM, inputs: dict[str, Tensor], classes: Tensor, masks: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Whether the head that ranks first points at the object."""
    first = rank_heads(model, inputs, classes).values[:, 0]
    hits = [
        pointing_game_score(attribute(model, inputs, classes, method="prompt_cam", head=head), masks)
        for head in range(first.max() + 1)
    ]
    return np.stack(hits)[first, np.arange(len(first))]


def _told(scenes: list[Scene], masks: NDArray[np.bool_], inputs: dict[str, Tensor], classes: Tensor) -> float:
    """How often the object's patches are nearest to the mean of those of its class in the other half of the scenes."""
    backbone: Any = loading.load("viewer").model.base_model
    with torch.no_grad():
        states = backbone(**inputs, output_hidden_states=True).hidden_states[-2][:, 1:]
    own = F.avg_pool2d(torch.from_numpy(masks).float()[:, None], viewer.PATCH).flatten(1) > 0.5
    half = torch.arange(len(scenes)) < len(scenes) // 2
    known, asked = (own & part[:, None] for part in (half, ~half))
    of_known, of_asked = (classes[:, None].expand_as(own)[part] for part in (known, asked))
    means = torch.stack([states[known][of_known == c].mean(0) for c in range(len(CLASSES))])
    return float((torch.cdist(states[asked], means).argmin(-1) == of_asked).float().mean())


def _draw(scenes: list[Scene], maps: dict[str, Any], points: dict[str, Mean], figure: Any) -> None:
    pictures = render(scenes, viewer.SIZE).pixels
    axes = figure.subplots(1 + len(maps), len(scenes))
    for axis, picture, scene in zip(axes[0], pictures, scenes):
        axis.imshow(picture)
        axis.set_title(f"{scene.objects[-1].colour} {scene.objects[-1].shape}", fontsize=8)
    for line, (name, found) in zip(axes[1:], maps.items()):
        for axis, one in zip(line, found):
            axis.imshow(one, cmap="magma")
        line[0].set_ylabel(f"{name}\n{points[name].value:.0%}", fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
