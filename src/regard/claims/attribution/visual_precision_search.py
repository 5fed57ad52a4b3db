"""A search for regions beside gradients and random masks: who needs the fewest regions, and are both parts needed?

On Chen et al., Visual Precision Search (arXiv:2411.16198), who explain Grounding DINO and Florence-2. A small network
that names the colours in scenes stands in for them; it has no boxes, so that the overlap is 1. All ways rank the same
64 squares of 8 pixels. The search optimises what it is judged by, so its control is itself without one of its parts,
and where its maximum falls is compared as well. Random masks are those of RISE, on these squares. Nothing was tuned;
two seeds were looked at before the one that is reported.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...attribution import attribute
from ...catalog import Finding, Premise
from ...evaluation.faithfulness import deletion_error, insertion_score
from ...evaluation.localisation import pointing_game_score
from .. import _colours as colours
from .._measure import Mean, mean

SCALES = "small", "large"
SCENES, MASKS = {"small": 10, "large": 200}, 500
STEPS = 12  # that the search takes; what is left is ranked by what it would add
SIDE, ENOUGH = 8, 0.8  # regions a side, of 8 pixels; share of the whole probability that is enough
RIVALS = {"Grad-CAM": "grad_cam", "integrated gradients": "integrated_gradients"}
EXPECTED = (
    "of the search, the area under insertion is higher than of the best of Grad-CAM, integrated gradients and random "
    "masks, by 15% or more and by two standard errors, and 80% of the whole probability is reached with half of the "
    "regions or fewer; without collaboration the area under deletion is larger, and without consistency that under "
    "insertion smaller, each by two standard errors; its maximum is on the object not less often than Grad-CAM's, but "
    "for 5 percentage points"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Areas under both curves, regions needed and pointing, of all ways; the search without each of its parts."""
    model = colours.network(seed)
    drawn = colours.held_out(colours.PAIR, 4 * SCENES[scale], seed, distinct=True)
    target = colours.colour_of(drawn, 0)
    with torch.no_grad():
        pixels = colours.pixels(drawn)
        rows = torch.arange(len(drawn))
        whole = model(pixels).logits.sigmoid()[rows, target].numpy()
        empty = model(torch.zeros_like(pixels)).logits.sigmoid()[rows, target].numpy()
    clear = [i for i in rows.tolist() if whole[i] > 0.8 and empty[i] < 0.2][: SCENES[scale]]
    kept = Premise(
        "the network sees the colour, and not in an empty picture",
        f"{SCENES[scale]} of {len(drawn)} pictures from above 0.8 to below 0.2",
        f"{np.sum((whole > 0.8) & (empty < 0.2))}",
        len(clear) == SCENES[scale],
    )
    if not clear:
        return Finding(None, "no picture to explain", EXPECTED, seed, premises=[kept])
    scenes, classes, inputs = [drawn[i] for i in clear], [target[i] for i in clear], {"pixel_values": pixels[clear]}
    look = partial(attribute, model, inputs, classes)
    search = partial(look, method="visual_precision_search", regions=SIDE**2, steps=STEPS, batch=64)
    found = {"search": search(), "without collaboration": search(collaboration=0.0)}
    found["without consistency"] = search(consistency=0.0)
    for name, method in RIVALS.items():
        found[name] = _on_regions(look(method=method))
    found["random masks"] = found["search"].copy(data=_random_masks(model, inputs["pixel_values"], classes, seed))
    insertion = {name: insertion_score(model, inputs, one, steps=SIDE**2) for name, one in found.items()}
    deletion = {name: deletion_error(model, inputs, one, steps=SIDE**2) for name, one in found.items()}
    needed = {name: _needed(model, inputs, one, whole[clear]) for name, one in found.items()}
    points = {n: pointing_game_score(found[n], colours.boxes(scenes, 0)).mean() for n in ("search", "Grad-CAM")}
    rivals = (*RIVALS, "random masks")
    best = max(rivals, key=lambda name: insertion[name].mean())
    fewest = min(rivals, key=lambda name: needed[name].mean())
    gain = mean(insertion["search"] - insertion[best])
    worse = mean(deletion["without collaboration"] - deletion["search"])
    lower = mean(insertion["search"] - insertion["without consistency"])
    holds = (
        insertion["search"].mean() >= 1.15 * insertion[best].mean()
        and gain.above()
        and needed["search"].mean() <= 0.5 * needed[fewest].mean()
        and worse.above()
        and lower.above()
        and points["search"] >= points["Grad-CAM"] - 0.05
    )
    areas = {name: (mean(insertion[name]), mean(deletion[name])) for name in found}
    listed = ", ".join(
        f"{name} {areas[name][0]:.3f} and {areas[name][1]:.3f} ({needed[name].mean():.1f} regions)" for name in found
    )
    measured = (
        f"areas under insertion and deletion, and regions needed: {listed}; against {best} {gain:+.3f}; without "
        f"collaboration deletion {worse:+.3f}, without consistency insertion {-lower.value:+.3f} ± {lower.error:.3f}; "
        f"the maximum is on the object in {points['search']:.0%}, Grad-CAM's in {points['Grad-CAM']:.0%}"
    )
    premises = [kept, colours.learned(model, scenes)]
    return Finding(holds, measured, EXPECTED, seed, premises=premises, draw=partial(_draw, areas))


def _on_regions(found: Any) -> Any:
    """Means over the squares, at each of their pixels."""
    values = found.values.reshape(len(found), SIDE, found.shape[1] // SIDE, SIDE, -1).mean((2, 4))
    size = found.shape[1] // SIDE
    return found.copy(data=values.repeat(size, 1).repeat(size, 2))


@torch.no_grad()
def _random_masks(model: nn.Module, pixels: torch.Tensor, classes: list[int], seed: int) -> NDArray[Any]:
    """Mean probability where a square is shown among others at random."""
    size = pixels.shape[-1] // SIDE
    masks = (torch.rand(MASKS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) < 0.5).float()
    large = masks.repeat_interleave(size, 1).repeat_interleave(size, 2)
    scores = [model(one * large[:, None]).logits.sigmoid()[:, label] for one, label in zip(pixels, classes)]
    return np.stack([torch.einsum("m,mhw->hw", score, large).numpy() / MASKS for score in scores])


@torch.no_grad()
def _needed(model: nn.Module, inputs: dict[str, Any], found: Any, whole: NDArray[Any]) -> NDArray[Any]:
    """How many squares, the highest first, reach enough of the probability. [picture]"""
    size = found.shape[1] // SIDE
    needed = []
    for pixels, values, label, full in zip(inputs["pixel_values"], found.values, found.target.values, whole):
        order = np.argsort(-values[::size, ::size].ravel(), kind="stable")
        shown = torch.from_numpy(np.cumsum(np.eye(SIDE**2)[order], 0)).float().unflatten(1, (SIDE, SIDE))
        large = shown.repeat_interleave(size, 1).repeat_interleave(size, 2)
        reached = model(pixels * large[:, None]).logits.sigmoid()[:, label].numpy() >= ENOUGH * full
        needed.append(1 + int(reached.argmax()))
    return np.array(needed)


def _draw(areas: dict[str, tuple[Mean, Mean]], figure: Any) -> None:
    axes = figure.subplots()
    for name, (insertion, deletion) in areas.items():
        axes.errorbar(deletion.value, insertion.value, insertion.error, deletion.error, "o", label=name)
    axes.set_xlabel("area under deletion (lower is better)")
    axes.set_ylabel("area under insertion (higher is better)")
    axes.legend()
