"""Several checks of one map in one place, each beside what the same scores do elsewhere.

The checks are those of `faithfulness` and `randomisation`; what they are compared with is
ours. A map drawn pixel by pixel is a poor rival: what it takes away is everywhere, so that a picture is destroyed by it
as fast as by a good map. Rivals are the map itself, moved: its scores in another order of the tokens, or, of a picture,
shifted around its edges and turned over, as smooth as they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from .. import catalog
from ..prediction import Prediction, Question, predict
from .faithfulness import curve, sensitivity_error
from .randomisation import randomisation_error


def judge(
    model: nn.Module,
    inputs: Mapping[str, Any],
    attribution: xr.DataArray,
    explain: Callable[..., xr.DataArray] | None = None,
    *,
    steps: int = 20,
    draws: int = 20,
    radius: float = 0.02,
    samples: int = 5,
    stages: int = 4,
    baseline: Tensor | float = 0.0,
    seed: int = 0,
) -> xr.Dataset:
    """What speaks for believing a map, and what against. [batch], [batch, share], [draw, batch], [layer, batch]

    deletion, insertion: the probability without, and with only, each `share` of the features, the most important first;
    deletion_error and insertion_score are the areas under them, 0 to 1. moved_deletion_error, moved_insertion_score: of
    `draws` maps with the same scores elsewhere; moved_deletion and moved_insertion are their mean curves. A map that
    knows what matters has the lower deletion and the higher insertion of almost all of them. The curves can tell where
    the first and the last probability differ.

    sensitivity_error: how far the map changes at most, as a share of itself, at `samples` inputs that are off by up to
    `radius` of the input's root mean square. alike: rank correlation of sizes with the map of the model whose layers,
    from the output to `layer`, have their weights in another order, at `stages` of them; near 0 is right, 1 is a map
    that does not depend on what the model learned.

    attribution: of `regard.attribute`, before words are joined. explain: (model, inputs, target) -> scores, a partial
    where the map was made with other knobs than the defaults; None: the method that the attribution names.

    >>> import regard
    >>> model, tokenizer = regard.load("namer")
    >>> inputs = tokenizer("with a heavy heart , the sailor stood .", return_tensors="pt")
    >>> found = regard.attribute(model, inputs, method="attention_x_gradient")
    >>> judged = judge(model, inputs, found)
    >>> bool((judged.deletion_error < judged.moved_deletion_error).mean() > 0.9)
    True
    """
    found = curves(model, inputs, attribution, steps=steps, draws=draws, baseline=baseline, seed=seed)
    ask = catalog.method("attribution", str(attribution.name)) if explain is None else explain
    with predict(model, inputs, Question.of(attribution)) as prediction, torch.no_grad():
        asked, question = prediction.inputs, prediction.question
        size = float(prediction.given.square().mean().sqrt()) or 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a method says of models that have forgotten is no news
        off = sensitivity_error(model, asked, ask, question, radius=radius * size, samples=samples, seed=seed)
        alike = randomisation_error(model, asked, ask, question, stages=stages, seed=seed)
    return found.assign({"sensitivity_error": ("batch", off), "alike": alike})


def curves(
    model: nn.Module,
    inputs: Mapping[str, Any],
    attribution: xr.DataArray,
    *,
    steps: int = 20,
    draws: int = 20,
    baseline: Tensor | float = 0.0,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> xr.Dataset:
    """The curves of `judge` alone, of a map and of the same scores elsewhere. tick: called before each map.

    >>> import regard
    >>> model, tokenizer = regard.load("namer")
    >>> inputs = tokenizer("with a heavy heart , the sailor stood .", return_tensors="pt")
    >>> found = curves(model, inputs, regard.attribute(model, inputs, method="attention_x_gradient"), steps=5, draws=2)
    >>> dict(found.sizes)
    {'batch': 1, 'share': 6, 'draw': 2}
    """
    if steps < 1 or draws < 1:
        raise ValueError(f"steps={steps}, draws={draws}: one at least")
    shares = np.linspace(0, 1, steps + 1)
    generator = torch.Generator().manual_seed(seed)
    with predict(model, inputs, Question.of(attribution)) as prediction, torch.no_grad():
        if attribution.shape != prediction.shape:
            raise ValueError(
                f"the attribution is {list(attribution.shape)}, and the inputs have features {list(prediction.shape)}; "
                f"judge it before words are joined"
            )
        own = torch.from_numpy(np.ascontiguousarray(attribution.values)).double()
        maps = [own, *(_moved(prediction, own, generator) for _ in range(draws))]
        drawn: dict[str, list[Any]] = {"deletion": [], "insertion": []}
        for one in maps:
            tick()
            for name, of in drawn.items():
                of.append(curve(prediction, one, shares.tolist(), baseline, keep=name == "insertion"))
    found: dict[str, Any] = {}
    for name, of in drawn.items():
        values = np.stack(of)  # [map, share, batch]
        area, kind = (values[:, 1:] + values[:, :-1]).mean(1) / 2, "error" if name == "deletion" else "score"
        found |= {name: (("batch", "share"), values[0].T), f"{name}_{kind}": ("batch", area[0])}
        found[f"moved_{name}"] = ("batch", "share"), values[1:].mean(0).T
        found[f"moved_{name}_{kind}"] = ("draw", "batch"), area[1:]
    return xr.Dataset(found, {"share": shares}, {"method": str(attribution.name)})


def _moved(prediction: Prediction, scores: Tensor, generator: torch.Generator) -> Tensor:
    """The same scores elsewhere: among words in another order, in a picture shifted and turned over."""
    moved = scores.clone()
    if prediction.dims[-1] == "token":
        real = torch.ones_like(scores, dtype=torch.bool) if prediction.real is None else prediction.real.cpu()
        for i, here in enumerate(real):
            values = scores[i][here]
            moved[i][here] = values[torch.randperm(len(values), generator=generator)]
        return moved
    for axis in range(1, scores.ndim):
        moved = moved.roll(int(torch.randint(scores.shape[axis], (), generator=generator)), axis)
        moved = moved.flip(axis) if torch.rand((), generator=generator) < 0.5 else moved
    return moved
