"""A search for the few regions that a prediction needs.

Chen et al., Interpreting Object-level Foundation Models via Visual Precision Search (arXiv:2411.16198), section 3, with
the arithmetic of the authors' code: regions are shown one after another, each time the one that most raises
consistency, the score with what is shown alone, plus collaboration, one minus the score with all but that. The map
falls along the order by as much as this sum moves.

A detector's score is the largest, over its boxes, of the overlap with the target's box times the class probability;
that of another model is its probability. Regions are squares of a grid; theirs are superpixels (SLICO), which may be
given. So are ours of words: each token is a region. What is not shown is 0 after the processor's normalisation, as in
their code. `steps` stops early and ranks what is left by what it would have added; that, and texts, are ours. Their
second search from the other end, for models that write a box or nothing, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from ..prediction import Prediction, Target, predict

Array = NDArray[np.float64]
PASSES = 100_000  # of the model, above which a search has to be asked for by `steps`


class Searched(NamedTuple):
    """What a search found, by step; the regions that it did not come to stand at the end of the order."""

    order: NDArray[np.int64]  # [region]
    insertion: Array  # score of what is shown [step]
    deletion: Array  # of the rest [step]
    value: Array  # the sum that is raised [step]
    start: float  # the same of nothing shown
    rest: Array  # the sum that each region after the last step would have given, by order


def visual_precision_search(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: Target = None,
    *,
    regions: int | Tensor = 64,
    consistency: float = 1.0,
    collaboration: float = 1.0,
    steps: int | None = None,
    mode: Literal["object", "cls"] = "object",
    baseline: Tensor | float = 0.0,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> xr.DataArray:
    """How early the search shows each region, 0 to 1; of the first, 1. [batch, token] or pixels

    regions: squares of a picture, about so many, or a number for each pixel, [row, column], the same for all samples.
    Tokens are each a region. consistency, collaboration: weights of the two parts of the sum. steps: how many regions
    are searched for; None: all. A search takes two passes a candidate, r (r + 1) for all of r regions. mode: of
    detectors, "object" multiplies by the overlap of boxes, "cls" asks for more than half of it. baseline: what stands
    for what is not shown. batch: inputs that run together at most. progress: told steps done, and steps in all.

    attrs hold, of each step of each sample, the region, insertion, deletion and value, and area, the share that is
    shown. What a detector says of `target` it says of the box that `predict` reads: its own most likely, or that of
    `at`. ValueError where the search is of more than 100000 passes and `steps` is not given.

    >>> import regard
    >>> model, tokenizer = regard.load("namer")
    >>> inputs = tokenizer("the baker sang , feeling merry .", return_tensors="pt")
    >>> found = regard.attribute(model, inputs, method="visual_precision_search", steps=2, processor=tokenizer)
    >>> str(found.text[0, found[0].argmax("token")].item())
    'merry'
    """
    with predict(model, inputs, target) as prediction, torch.no_grad():
        maps, curves, n_steps = [], [], 0
        labels = _regions(prediction, regions)
        for i in range(len(prediction.given)):
            one, label = prediction.sample(i), labels[i]
            sizes = torch.bincount(label[label >= 0])
            n = len(sizes)
            n_steps = n if steps is None else min(steps, n)
            passes = sum(2 * (n - k) for k in range(n_steps))
            if n_steps < 1 or batch < 1:
                raise ValueError(f"steps={steps}, batch={batch}: search for one region at least")
            if steps is None and passes > PASSES:
                raise ValueError(f"{n} regions take {passes} passes; take fewer regions, or say how many steps=")
            score = _scorer(one, label, baseline, mode, batch)
            found = search(
                score, n, consistency=consistency, collaboration=collaboration, steps=n_steps, progress=progress
            )
            maps.append(_spread(ranks(found), label))
            area = sizes[found.order].cumsum(0)[:n_steps] / sizes.sum()
            curves.append((found, area.numpy()))
        steps_of = min(len(found.value) for found, _ in curves)  # texts of a batch differ in length
        result = prediction.labelled(torch.stack(maps), "visual_precision_search")
    said = {"region": "order", "insertion": "insertion", "deletion": "deletion", "value": "value"}
    along = {name: np.stack([getattr(f, of)[:steps_of] for f, _ in curves]) for name, of in said.items()}
    along["area"] = np.stack([area[:steps_of] for _, area in curves])
    return result.assign_attrs({name: values.tolist() for name, values in along.items()})


def search(
    score: Callable[[NDArray[np.bool_]], Array],
    regions: int,
    *,
    consistency: float = 1.0,
    collaboration: float = 1.0,
    steps: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Searched:
    """The greedy order of regions, and its curves; of candidates that are alike, the first.

    score: of what is shown, [picture, region] boolean, the scores [picture].

    >>> parts = np.array([0.1, 0.5, 0.3])
    >>> search(lambda shown: shown @ parts, 3).order.tolist()
    [1, 2, 0]
    """
    if min(consistency, collaboration) < 0 or not consistency + collaboration:
        raise ValueError(f"consistency={consistency}, collaboration={collaboration}: weights from 0, and one above it")
    steps = regions if steps is None else steps
    shown, chosen = np.zeros(regions, bool), []
    whole, none = score(np.stack([~shown, shown]))
    start = consistency * none + collaboration * (1 - whole)
    curves: list[tuple[float, float, float]] = []
    rest, behind = np.empty(0), np.empty(0, int)
    for step in range(min(steps, regions)):
        left = np.flatnonzero(~shown)
        with_each = shown | (np.arange(regions) == left[:, None])
        parts = [with_each] * bool(consistency) + [~with_each] * bool(collaboration)  # what has no weight costs nothing
        both = score(np.concatenate(parts))
        inserted = both[: len(left)] if consistency else np.zeros(len(left))
        deleted = both[-len(left) :] if collaboration else np.zeros(len(left))
        values = consistency * inserted + collaboration * (1 - deleted)
        best = int(values.argmax())
        if not consistency:
            inserted = np.repeat(score(with_each[best : best + 1]), len(left))
        if not collaboration:
            deleted = np.repeat(score(~with_each[best : best + 1]), len(left))
        curves.append((float(inserted[best]), float(deleted[best]), float(values[best])))
        chosen.append(int(left[best]))
        shown[left[best]] = True
        others = np.delete(np.arange(len(left)), best)
        by = others[np.argsort(-values[others], kind="stable")]
        rest, behind = values[by], left[by]
        if progress is not None:
            progress(step + 1, min(steps, regions))
    order = np.array([*chosen, *behind.tolist()])
    insertion, deletion, value = np.array(curves).T
    return Searched(order, insertion, deletion, value, float(start), rest)


def ranks(found: Searched) -> Array:
    """The map of a search, from 1 at the first region to 0 at the last. [region]

    It falls along the order by the size of the change of the sum; after the last step, from there on by how much less
    each would have given than the best.
    """
    moved = np.abs(np.diff([found.start, *found.value]))
    if len(found.rest):
        last = found.rest.max() + moved[-1] * 1e-6  # behind all that was searched for
        moved = np.concatenate([moved, np.diff([last, *found.rest]).clip(None, 0) * -1])
    falls = -moved.cumsum()
    low, high = falls.min(), falls.max()
    along = (falls - low) / (high - low) if high > low else np.ones_like(falls)
    values = np.empty(len(falls))
    values[found.order] = along
    return values


def overlap(boxes: Tensor, box: Tensor) -> Tensor:
    """Intersection over union of each box with one, 0 to 1; boxes are left, top, right, bottom. [..., box]"""
    high, low = torch.minimum(boxes[..., 2:], box[..., 2:]), torch.maximum(boxes[..., :2], box[..., :2])
    both = (high - low).clamp(min=0).prod(-1)
    sizes = [(of[..., 2:] - of[..., :2]).clamp(min=0).prod(-1) for of in (boxes, box)]
    return both / (sizes[0] + sizes[1] - both).clamp(min=1e-12)


def best_box(
    boxes: Tensor, probabilities: Tensor, box: Tensor, classes: Sequence[int], mode: str = "object"
) -> tuple[Tensor, Tensor, Tensor]:
    """Score of each picture, and overlap and probability of the box that is nearest to the target. [picture]

    boxes: [picture, box, 4]. probabilities: [picture, box, class]. classes: those of the target, of which the likeliest
    counts.
    """
    if mode not in ("object", "cls"):
        raise ValueError(f"mode={mode!r}: object or cls")
    near, likely = overlap(boxes, box), probabilities[..., list(classes)].amax(-1)
    score = ((near > 0.5).to(likely) if mode == "cls" else near) * likely
    at = (near * likely).argmax(-1, keepdim=True)
    return score.amax(-1), near.gather(-1, at)[..., 0], likely.gather(-1, at)[..., 0]


def _scorer(
    one: Prediction, label: Tensor, baseline: Tensor | float, mode: str, batch: int
) -> Callable[[NDArray[np.bool_]], Array]:
    """The score of a sample of which some regions are shown."""
    found = one.boxes() if one.kind == "object" else None

    def score(shown: NDArray[np.bool_]) -> Array:
        values = []
        padded = torch.nn.functional.pad(torch.from_numpy(shown), (0, 1), value=True)  # what is of no region stays
        for part in padded.split(batch if one.repeats else 1):
            given = one.without(part[:, label][:, None], baseline).flatten(0, 1)
            if found is None:
                values.append(one.probability(given))
                continue
            boxes, probabilities = one.boxes(given)
            own = found[0][0, int(cast(Tensor, one.question.at))]
            values.append(best_box(boxes, probabilities, own, one.target.tolist(), mode)[0])
        return torch.cat(values).double().cpu().numpy()

    return score


def _regions(prediction: Prediction, regions: int | Tensor) -> Tensor:
    """The region of each feature, from 0 on, -1 of padding; of the features' shape."""
    shape = prediction.shape
    if prediction.dims[-1] == "token":
        real = torch.ones(shape, dtype=torch.bool) if prediction.real is None else prediction.real.cpu()
        flat = real.flatten(1)
        return torch.where(flat, flat.cumsum(1) - 1, -1).reshape(shape)
    if isinstance(regions, int):
        height, width = shape[-2:]
        if not 1 <= regions <= height * width:
            raise ValueError(f"regions={regions}: from 1 to the {height * width} pixels")
        rows = min(height, max(1, round(math.sqrt(regions * height / width))))
        columns = min(width, max(1, round(regions / rows)))
        row, column = (torch.arange(n) * k // n for n, k in ((height, rows), (width, columns)))
        regions = row[:, None] * columns + column
    if regions.shape != shape[-2:] or not torch.equal(regions.unique(), torch.arange(int(regions.max()) + 1)):
        raise ValueError(
            f"regions are a number for each of {shape[-2]} x {shape[-1]} pixels, from 0 on with none left out; got "
            f"{list(regions.shape)}"
        )
    return regions.long().expand(shape)


def _spread(values: Array, label: Tensor) -> Tensor:
    padded = torch.from_numpy(np.append(values, 0.0))
    return padded[label]
