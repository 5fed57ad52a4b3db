"""Register neurons of the zoo's lookout, found and moved to an added token; and whether DINOv2-small has any.

On Jiang et al., Vision Transformers Don't Need Trained Registers (arXiv:2506.08010). The lookout's outliers are made by
eight neurons that were planted, so that what is found can be judged. Its class token looks little at them: attention to
outliers is told, and what is judged is their states. They show background; one that is clean is like the mean of the
other background patches of its picture. Controls: as many random neurons of the same layers; and the same neurons set
to 0, with no token that holds what they said. `--scale real` looks for outliers in photographs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...call import Call
from ...catalog import Finding, Premise
from ...data.scenes import render, sample
from ...interventions.test_time_registers import outliers, register_neurons, strongest, test_time_registers
from ...loading import load
from ...recording import statistic
from ...seam import intervene, record
from ...zoo.recipes import lookout, viewer
from .._data import photographs
from .._measure import Mean, mean
from .._models import pretrained

SCALES = "small", "real"
PICTURES, FOUND_ON = 300, 100  # to judge on, and to find neurons on
SHARE = 0.5  # of the pictures that have to have an outlier
EXPECTED = (
    "of the eight strongest neurons on outliers at least six are among those planted; moved to a token, no patch has "
    "three median norms in 19 of 20 pictures that had one, while the token has four; patches that were outliers are "
    "more like the rest of the background than plainly, and than with random neurons moved, by two standard "
    "errors; pairs are named no worse than plainly by half a point"
)


class Zeroed:
    """Sets neurons to 0 on every token, and adds none."""

    def __init__(self, chosen: Mapping[int, Sequence[int]]) -> None:
        self.chosen = chosen

    def neurons(self, site: Any, activations: Tensor) -> Tensor:
        new = activations.clone()
        new[..., list(self.chosen.get(site.layer, ()))] = 0
        return new


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """The neurons behind outliers are found, and with an added token patches are clean."""
    if scale == "real":
        return _real(seed)
    model, _ = load("lookout")
    drawn = [sample(lookout.MIXTURE[1 + i % 5], viewer.HELD_OUT + seed, i) for i in range(PICTURES + FOUND_ON)]
    pictures, scenes = render(drawn, viewer.SIZE), drawn[FOUND_ON:]
    pixels = viewer.pixels(pictures)
    background = viewer.covered(drawn, pictures)[FOUND_ON:, :, -1] == 1
    scores = register_neurons(model, pixels[:FOUND_ON], layer=-2)
    config: Any = model.config
    planted = {(config.planted["layer"], neuron) for neuron in config.planted["neurons"]}
    chosen = strongest(scores, top_k=len(planted))
    right = sum((layer, neuron) in planted for layer, some in chosen.items() for neuron in some)

    draw = torch.Generator().manual_seed(seed)
    random = {
        layer: torch.randperm(scores.sizes["neuron"], generator=draw)[: len(some)].tolist()
        for layer, some in chosen.items()
    }
    ways = {
        "plain": (),
        "moved": (test_time_registers(chosen=chosen),),
        "random": (test_time_registers(chosen=random),),
        "zeroed": (Zeroed(chosen),),
    }
    looks = {name: _look(model, pixels[FOUND_ON:], things) for name, things in ways.items()}
    there = outliers(looks["plain"]["states"])[:, 1:] & background
    has = there.any(1)
    alike = {name: _alike(look["states"][:, 1:65], there, background)[has] for name, look in looks.items()}
    named = {name: _named(look["logits"], scenes) for name, look in looks.items()}
    after = outliers(looks["moved"]["states"][:, :65])[has, 1:].any(1)
    norms = looks["moved"]["states"].norm(dim=-1)
    token = (norms[:, 65] / norms[:, 1:65].median(1).values).median()
    gains = {name: mean(alike["moved"] - alike[name]) for name in ("plain", "random")}
    costs = {name: mean(named[name] - named["plain"]) for name in ("moved", "zeroed", "random")}
    looked = {name: float(_looked(looks[name]["looked"], there)) for name in ("plain", "moved")}
    premise = Premise(
        "patches of background have three median norms or more, in the last layer but one",
        f"in {SHARE:.0%} of the pictures",
        f"in {has.float().mean():.0%}",
        float(has.float().mean()) >= SHARE,
    )
    measured = (
        f"{right} of the {len(planted)} strongest neurons are planted; moved, {after.float().mean():.1%} of pictures "
        f"keep an outlier, and the token has {token:.1f} median norms; cosine of outliers with other background "
        f"{alike['plain'].mean():.2f} plainly, {alike['moved'].mean():.2f} moved ({gains['plain']:+.2f}), "
        f"{alike['random'].mean():.2f} with random neurons ({gains['random']:+.2f}), {alike['zeroed'].mean():.2f} with "
        f"the neurons at 0; pairs named {_points(costs['moved'])} moved, {_points(costs['zeroed'])} at 0, "
        f"{_points(costs['random'])} random, of {named['plain'].mean():.1%}; the class token looks at outliers "
        f"{looked['plain']:.2f} times as much as at any patch in layers 3 to 5, moved {looked['moved']:.2f}"
    )
    holds = (
        right >= 6
        and float(after.float().mean()) <= 0.05
        and float(token) >= 4
        and all(gain.above() for gain in gains.values())
        and costs["moved"].value >= -0.005
    )
    drawing = partial(_draw, {name: mean(some) for name, some in alike.items()})
    return Finding(holds, measured, EXPECTED, seed, premises=[premise], draw=drawing)


def _real(seed: int) -> Finding:
    """What DINOv2-small does on photographs: whether a patch stands out at all."""
    model, processor = pretrained("dinov2-small")
    pixels = processor(images=list(photographs().values()), return_tensors="pt")["pixel_values"]
    hidden = _look(model, pixels, ())["states"]
    norms = hidden[:, 1:].norm(dim=-1)
    most = (norms.amax(1) / norms.median(1).values).numpy()
    has = (most >= 3).mean()
    premise = Premise(
        "patches of photographs have three median norms or more, in the last layer but one",
        f"in {SHARE:.0%} of the pictures",
        f"in {has:.0%}, at most {most.max():.1f} median norms",
        bool(has >= SHARE),
    )
    holds = None
    measured = f"the largest norm of a patch is {most.mean():.2f} median norms on average, at most {most.max():.1f}"
    if premise.met:
        chosen = strongest(register_neurons(model, pixels, layer=-2))
        moved = _look(model, pixels, (test_time_registers(chosen=chosen),))["states"][:, 1:-1].norm(dim=-1)
        left = moved.amax(1) / moved.median(1).values
        holds = bool(left.median() < 3)
        measured += f", with neurons moved {left.mean():.2f}"
    return Finding(holds, measured, EXPECTED, seed, premises=[premise])


@torch.no_grad()
def _look(model: nn.Module, pixels: Tensor, things: Sequence[Any]) -> dict[str, Tensor]:
    """Logits, states after the last layer but one with what was appended, and what `[CLS]` looks at, by patch."""
    config: Any = model.config
    last = config.num_hidden_layers - 2
    states: list[Tensor] = []

    class Keep:
        def hidden(self, site: Any, hidden: Tensor) -> Tensor:
            if site.layer == last:
                states.append(hidden)
            return hidden

    @statistic("batch head key", title="Weight of the class token")
    def looked(call: Call) -> Tensor:
        return call.weights.rows(0, 1)[:, :, 0]

    with record(model, looked) as recording, intervene(model, *things, Keep()):
        found = model(pixel_values=pixels)
    (tree,) = recording.tree.children.values()
    weights = torch.from_numpy(tree["looked"].mean("head").transpose("batch", "layer", "key").values)
    return {"logits": getattr(found, "logits", pixels[:0]), "states": states[0], "looked": weights}


def _alike(states: Tensor, there: Tensor, background: Tensor) -> Tensor:
    """Cosine of each picture's outliers with the mean of the rest of its background. [picture]"""
    rest = (background & ~there).float()[..., None]
    centre = (states * rest).sum(1, keepdim=True) / rest.sum(1, keepdim=True).clamp_min(1)
    each = F.cosine_similarity(states, centre, dim=-1)
    return (each * there).sum(1) / there.sum(1).clamp_min(1)


def _named(logits: Tensor, scenes: Sequence[Any]) -> Tensor:
    """Of the pairs that each scene shows, the share that is among as many highest scores. [scene]"""
    truth = viewer.labels(scenes).bool()
    ranks = logits.argsort(1, descending=True).argsort(1)
    return ((ranks < truth.sum(1, keepdim=True)) & truth).sum(1) / truth.sum(1)


def _looked(weights: Tensor, there: Tensor) -> Tensor:
    patches = weights[:, 3:, 1:65]
    on = (patches * there[:, None]).sum((0, 2)) / there.sum()
    return (on / patches.mean((0, 2))).mean()


def _points(cost: Mean) -> str:
    return f"{100 * cost.value:+.1f} ± {100 * cost.error:.1f} points"


def _draw(alike: dict[str, Mean], figure: Any) -> None:
    axes = figure.subplots()
    names = list(alike)
    axes.bar(names, [m.value for m in alike.values()], yerr=[2 * m.error for m in alike.values()], color="C0")
    axes.set(ylabel="cosine of outliers with the rest of the background", ylim=(0, 1))
