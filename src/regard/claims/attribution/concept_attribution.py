"""Concepts of a network that names colours: are they the colours, and is their importance true?

On Fel et al., A Holistic Approach to Unifying Automatic Concept Extraction and Concept Importance Estimation
(arXiv:2306.07304), who factor layers of networks for ImageNet, where nobody knows the concepts. Here they are known:
the network names the colours of objects, and masks say where each is. The control of the factors is a dictionary drawn
at random, that of the importance concepts taken away in an order drawn at random, and that of the theorem (after the
last layer with a rectifier, three importances are one) a layer before it. On one other seed colours were first told
from the ground as well, which any map does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...attribution.concept_attribution import Dictionary, activations, concept_importance, concepts
from ...catalog import Finding, Premise
from ...data.scenes import Scene, render
from ...evaluation.concepts import concept_deletion_error, reconstruction_error, stability_score
from ...extras import needs
from .. import _colours as colours
from .._measure import mean

SCENES, CONCEPTS, DRAWS, FEW = 200, 16, 10, 4
LAST, BEFORE = "resnet.encoder.stages.1", "resnet.encoder.stages.0"
EXPECTED = (
    "non-negative factors hold a concept whose map tells a colour's places from those of other colours, with an area "
    "under the curve of 0.9 or more, for 6 of the 8 colours at least, a random dictionary for less than 3; taken away "
    "by gradient x input, concepts leave an area under the logit that is smaller by 20% or more, and by two standard "
    "errors, than in a random order; gradient x input, integrated gradients and occlusion are equal to 0.0001 of the "
    "largest at the last layer, and not before it"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Colours that each dictionary finds, areas under deletion, and how far importances are apart."""
    model: Any = colours.network(seed)
    scenes = colours.held_out(colours.TRAINING, SCENES, seed)
    inputs = {"pixel_values": colours.pixels(scenes)}
    states = activations(model, inputs, LAST).numpy()
    where = _places(scenes, states.shape[1])
    made = {method: concepts(states, n=CONCEPTS, method=method, seed=seed) for method in ("nmf", "kmeans", "pca")}
    made["random"] = _random(states, seed)
    found = {name: _found(one.codes, where) for name, one in made.items()}
    told = {name: int(sum(best >= 0.9 for best in of)) for name, of in found.items()}
    errors = {name: reconstruction_error(states, one.codes, one.atoms) for name, one in made.items()}
    stable = {}
    for name in ("nmf", "kmeans"):
        halves = (concepts(states[i::2], n=CONCEPTS, method=name, seed=seed).atoms for i in (0, 1))
        stable[name] = stability_score(*halves)

    head, atoms = model.classifier[-1], torch.from_numpy(made["nmf"].atoms)
    classes = torch.tensor(colours.colour_of(scenes, 0))
    codes = torch.from_numpy(made["nmf"].codes).float()

    def score(given: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return head((given @ atoms).mean((1, 2))).gather(1, classes[:, None])[:, 0]

    with torch.no_grad():
        slopes = codes.mean((1, 2)) * (head.weight[classes] @ atoms.T)  # gradient x input, summed over places
    end = score(torch.zeros_like(codes)).numpy()
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(slopes.shape, generator=generator) for _ in range(DRAWS)]
    areas = [concept_deletion_error(codes, order, score) - end for order in drawn]
    own, random = concept_deletion_error(codes, slopes, score) - end, np.mean(areas, 0)
    spared = mean(random - own)

    few = {"pixel_values": inputs["pixel_values"][:FEW]}
    ask = partial(concept_importance, model, few, classes[:FEW])
    last = {m: ask(dictionary=made["nmf"], layer=LAST, method=m).values for m in ("gradient_x_input", *OTHERS)}
    early = concepts(activations(model, few, BEFORE).numpy(), n=FEW, seed=seed)
    before = {m: ask(dictionary=early, layer=BEFORE, method=m).values for m in ("gradient_x_input", *OTHERS[:1])}
    apart, apart_before = (
        max(float(abs(of[m] - of["gradient_x_input"]).max() / abs(of["gradient_x_input"]).max()) for m in of)
        for of in (last, before)
    )
    holds = (
        told["nmf"] >= 6
        and told["random"] < 3
        and spared.above()
        and spared.value >= 0.2 * random.mean()
        and apart <= 1e-4 < apart_before
    )
    measured = (
        "colours with a concept of their own: "
        + ", ".join(f"{name} {n} of 8" for name, n in told.items())
        + f"; the area under the logit is {mean(own):.2f} with the order of gradient x input, {mean(random):.2f} at "
        f"random ({-spared.value:+.2f} ± {spared.error:.2f}); importances are {apart:.1e} apart at the last layer, "
        f"{apart_before:.2f} before it. Left out of the activations: "
        + ", ".join(f"{name} {errors[name]:.0%}" for name in errors)
        + f"; atoms of halves of the data have a cosine of {stable['nmf']:.2f} (factors) and {stable['kmeans']:.2f} "
        "(means of clusters)"
    )
    premises = [
        colours.learned(model, scenes),
        Premise(
            "the factors hold the layer", "they leave out half at most", f"{errors['nmf']:.0%}", errors["nmf"] <= 0.5
        ),
    ]
    return Finding(holds, measured, EXPECTED, seed, premises=premises, draw=partial(_draw, found))


OTHERS = ("integrated_gradients", "occlusion")


def _places(scenes: list[Scene], side: int) -> NDArray[np.float64]:
    """Share of each place that a colour covers. [scene, row, column, colour]"""
    pictures = render(scenes, colours.SIZE)
    shares = np.zeros((len(scenes), side, side, len(colours.NAMES)))
    for i, scene in enumerate(scenes):
        for mask, one in zip(pictures.masks(i), scene.objects):
            step = mask.shape[0] // side
            shares[i, :, :, colours.NAMES.index(one.colour)] += mask.reshape(side, step, side, step).mean((1, 3))
    return shares


def _found(codes: NDArray[Any], where: NDArray[np.float64]) -> list[float]:
    """Of each colour the area under the curve of the concept that best tells its places from those of others."""
    with needs("this claim", "claims"):
        from sklearn.metrics import roc_auc_score

    maps, best = codes.reshape(-1, codes.shape[-1]), []
    shares = where.reshape(-1, where.shape[-1])
    for colour in range(shares.shape[1]):
        own = shares[:, colour] > 0.5
        clear = own | (np.delete(shares, colour, 1) > 0.5).any(1)  # of some object: what is ground is told by any map
        best.append(max(float(roc_auc_score(own[clear], one[clear])) for one in maps.T))
    return best


def _random(states: NDArray[Any], seed: int) -> Dictionary:
    """Atoms of independent numbers from 0 up, of the size of the activations, and codes that fit best."""
    rng = np.random.default_rng(seed)
    atoms = (abs(rng.normal(size=(CONCEPTS, states.shape[-1]))) * states.std()).astype(states.dtype)
    empty = Dictionary(np.empty(0), atoms, "nmf")
    return Dictionary(empty.transform(states), atoms, "nmf")


def _draw(found: dict[str, list[float]], figure: Any) -> None:
    axes = figure.subplots()
    for i, (name, values) in enumerate(found.items()):
        axes.bar(np.arange(len(values)) + 0.2 * i, values, 0.2, label=name)
    axes.axhline(0.9, color="0.6", linestyle=":")
    axes.set_xticks(np.arange(len(colours.NAMES)) + 0.3, colours.NAMES)
    axes.set_ylabel("best concept's area under the curve")
    axes.set_ylim(0.5, 1)
    axes.legend()
