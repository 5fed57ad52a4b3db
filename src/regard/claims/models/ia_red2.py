"""Pan et al. (arXiv:2106.12620): patches that tell nothing can go early, and an interpreter learns which these are.

The zoo's viewer in three groups of two blocks, on scenes of one object with clutter and texture; right is where its
label scores highest. The first group keeps all; interpreters of the other two learn one after another. Controls, of as
many patches dropped at the same places: at random; by the class token's attention in the layer before (reported). The
viewer was trained to say of each patch what it shows, so that what its object's patches know is no discovery. Settings
were chosen on seed 100, in two pilots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import regard

from ... import zoo
from ...catalog import Finding, Premise
from ...data.scenes import render, sample
from ...models.ia_red2 import IaRed2, chosen, cost, ia_red2, policy_gradient
from ...zoo.recipes import viewer
from .._measure import mean, seconds

SCALES = "small", "large"
GROUPS, HEADS, TAU = (2, 2, 2), 4, 5.0
TRAIN, HELD = {"small": 1000, "large": 10_000}, 600
STEPS, BATCH, RATE = {"small": 120, "large": 1500}, 48, 2e-3
OWNED = 0.1  # share of a patch that the object covers, from which on it is the object's
Keep = Callable[[int, Tensor, Tensor], Tensor]


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Accuracy, cost and time with patches dropped by trained interpreters, and what these keep."""
    expected = (
        "at most 0.7 points of accuracy lost at a relative cost of 0.75 or less, in a time shorter by a factor of 1.15 "
        "or more; of the object's patches 80% or more stay; random dropping of as many loses 3 points more, by two "
        "standard errors; the object's share of what stays is 1.5 times that of the class token's attention or more"
    )
    vit, _ = zoo.load("viewer")
    torch.manual_seed(seed)
    model = ia_red2(cast(Any, vit), GROUPS, heads=HEADS)
    pixels, labels, owned = _shown(TRAIN[scale] + HELD, seed)
    new = slice(TRAIN[scale], None)
    with torch.no_grad():
        stage = [_after_first(model, some) for some in pixels.split(200)]
    tokens = torch.cat(stage)
    _learn(model, tokens[: new.start], labels[: new.start], STEPS[scale], seed)

    entered, truth, own = tokens[new], labels[new], owned[new]
    plain = _right(model, entered, truth, lambda _, scores, alive: alive)
    hits, kept = _run(model, entered, truth, lambda _, scores, alive: chosen(scores, alive))
    generator = torch.Generator().manual_seed(seed)
    numbers = kept.sum(-1)  # [scene, group]

    def as_many(by: Callable[[Tensor], Tensor]) -> Keep:
        def keep(group: int, scores: Tensor, alive: Tensor) -> Tensor:
            rank = by(scores).masked_fill(~alive, -torch.inf)[:, 1:].argsort(1, descending=True).argsort(1)
            return F.pad(rank < numbers[:, group - 1, None], (1, 0), value=True)

        return keep

    blind, _ = _run(model, entered, truth, as_many(lambda scores: torch.rand(scores.shape, generator=generator)))
    looked = F.pad(_attention(vit, pixels[new]), (1, 0))
    attended, by_attention = _run(model, entered, truth, as_many(lambda _: looked))
    oracle = _right(model, entered, truth, lambda _, scores, alive: F.pad(own, (1, 0), value=True))

    shares = torch.cat([torch.ones(len(kept), 1, own.shape[1], dtype=torch.bool), kept], 1)
    left = cost(shares, GROUPS)
    lost, more = mean(plain - hits), mean(hits - blind)
    covered = mean((kept[:, -1] & own).sum(1) / own.sum(1))
    touching, others = (float((k[:, -1] & own).sum() / k[:, -1].sum()) for k in (kept, by_attention))
    with torch.no_grad():
        slow, fast = seconds(lambda: model(pixels[:100], only=()), lambda: model(pixels[:100], only=(1, 2)))
    holds = lost.value <= 0.007 and float(left.mean()) <= 0.75 and slow / fast >= 1.15
    holds = holds and covered.value >= 0.8 and more.above(0.03) and touching >= 1.5 * others
    measured = (
        f"right {mean(plain):.1%} whole, {mean(hits):.1%} pruned (lost {lost:.2%}), {mean(blind):.1%} at random, "
        f"{mean(attended):.1%} by attention; kept {', '.join(f'{x:.0%}' for x in kept.float().mean((0, 2)).tolist())}, "
        f"relative cost {mean(left):.2f}, {slow / fast:.2f} times as fast; of the object's patches {covered:.1%} stay; "
        f"{touching:.0%} of what stays is the object's, {others:.0%} by attention"
    )
    premises = [
        Premise("the model is right", "98% or more", f"{float(plain.mean()):.1%}", float(plain.mean()) >= 0.98),
        Premise(
            "the object's patches are enough",
            "less than one point lost with these alone",
            f"{float((plain - oracle).mean()):.2%}",
            float((plain - oracle).mean()) < 0.01,
        ),
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots(2, 5)
        for i in range(5):
            picture = (pixels[new.start + i].permute(1, 2, 0) + 1) / 2
            gone = np.kron(~kept[i, -1].view(8, 8).numpy(), np.ones((viewer.PATCH,) * 2, bool))
            axes[0][i].imshow(picture)
            axes[1][i].imshow(np.where(gone[..., None], 0.15 * picture.numpy(), picture.numpy()))
            for axis in axes[:, i]:
                axis.set_axis_off()
        figure.suptitle("Pictures, and what is left of them in the last two blocks")

    return Finding(bool(holds), measured, expected, seed, premises=premises, draw=draw)


def _shown(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, labels, and which patches are the object's [scene, patch]."""
    scenes = [sample(viewer.ONE, viewer.HELD_OUT + seed, i) for i in range(count)]
    pixels, owned = [], []
    for at in range(0, count, 200):
        pictures = render(scenes[at : at + 200], viewer.SIZE)
        pixels.append(viewer.pixels(pictures))
        masks = torch.stack([torch.from_numpy(pictures.masks(i))[:1] for i in range(len(pixels[-1]))])
        owned.append(F.avg_pool2d(masks.float(), viewer.PATCH).flatten(1) >= OWNED)
    return torch.cat(pixels), torch.tensor([viewer.pairs(s)[0] for s in scenes]), torch.cat(owned)


def _after_first(model: IaRed2, pixels: Tensor) -> Tensor:
    return next(model.stages(model.vit.vit.embeddings(pixels), lambda _, scores, alive: alive)).tokens


def _learn(model: IaRed2, tokens: Tensor, labels: Tensor, steps: int, seed: int) -> None:
    """The interpreters of the second and the third group, one after the other."""
    torch.manual_seed(seed)
    for group in (1, 2):
        optimiser = torch.optim.Adam(model.interpreters[group].parameters(), RATE)
        for _ in range(steps):
            some = torch.randint(len(tokens), (BATCH,))
            optimiser.zero_grad()
            policy_gradient(model, tokens[some], labels[some], group=group, tau=TAU, first=1).backward()
            optimiser.step()


@torch.no_grad()
def _run(model: IaRed2, tokens: Tensor, labels: Tensor, keep: Keep) -> tuple[Tensor, Tensor]:
    """Which scenes are named rightly, and the patches kept by the later groups [scene, group, patch]."""
    stages = list(model.stages(tokens, keep, first=1))
    hits = (model.read(stages[-1].tokens).argmax(-1) == labels).double()
    return hits, torch.stack([s.kept[:, 1:] for s in stages], 1)


def _right(model: IaRed2, tokens: Tensor, labels: Tensor, keep: Keep) -> Tensor:
    return _run(model, tokens, labels, keep)[0]


@torch.no_grad()
def _attention(vit: Any, pixels: Tensor) -> Tensor:
    """The class token's weights on patches in the last layer of the first group, mean of heads. [scene, patch]"""
    with regard.record(vit, "rows") as recording:
        vit(pixel_values=pixels)
    (stack,) = (node for node in recording.tree.subtree if "rows" in node)
    rows = torch.from_numpy(
        np.asarray(stack["rows"].sel(layer=GROUPS[0] - 1).transpose("batch", "head", "query", "key"))
    )
    return rows[:, :, 0, 1:].mean(1)
