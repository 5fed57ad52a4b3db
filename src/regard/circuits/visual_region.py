"""The layers of a language model that learn to see: which to tune, and which of the others to leave out.

Wang et al., Activating Distributed Visual Region within LLMs for Efficient and Effective Vision-Language Training and
Inference (arXiv:2412.12785). A quarter of the layers, spread over the depth, is tuned with the projector, all else is
frozen; afterwards layers outside this region are dropped, those first that turn their input least. No code is
published: this follows the text and public notes. Of 32 layers the region is the paper's list, which is not quite even;
the rule for other depths is ours.

Rivals are kept beside it: a block of layers at either end, and layers ranked on a model that was tuned whole, by how
much they change states (`block_influence`, 1 - cos), by the angle that they turn them (`angular`), by their weight on
the picture (`image_attention`), and by how far tuning moved their parameters (`change`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ..call import Call, Site
from ..seam import intervene
from ..sites import find
from ._gates import frozen

How = Literal["spread", "first", "last", "ends", "block_influence", "angular", "image_attention", "change"]
STACK = "language_model"
PAPERS = {(32, 8): [0, 4, 8, 12, 18, 22, 26, 30]}
_PROJECTOR = re.compile(r"(^|\.)(\w*projector\w*|\w*connector\w*|merger|mm_\w+)$")

__all__ = ["change_ratio", "layer_scores", "skip_layers", "spread", "train_only", "visual_region"]


def spread(layers: int, n: int) -> list[int]:
    """`n` of so many layers, evenly from the first to the last; of 32, 8 as in the paper.

    >>> spread(6, 2), spread(24, 6)
    ([0, 5], [0, 5, 9, 14, 18, 23])
    """
    if not 0 < n <= layers:
        raise ValueError(f"of {layers} layers, 1 to {layers} can be chosen, not {n}")
    if (layers, n) in PAPERS:
        return list(PAPERS[layers, n])
    return [int(i * (layers - 1) / max(n - 1, 1) + 0.5) for i in range(n)]


def visual_region(
    model: nn.Module,
    n: int | None = None,
    *,
    how: How = "spread",
    inputs: Mapping[str, Any] | None = None,
    before: nn.Module | None = None,
    stack: str = STACK,
) -> list[int]:
    """Which layers to tune for seeing: numbers, in rising order.

    n: how many, a quarter unless given. how: "spread" over the depth, "first", "last", half at both "ends"; or those
    with the largest of `layer_scores` on `inputs`, or of `change_ratio` to the model `before` it was tuned.

    >>> import regard
    >>> model, _ = regard.load("describer")
    >>> visual_region(model, 2)
    [0, 5]
    """
    layers = list(_layers(model, stack))
    n = max(1, round(len(layers) / 4)) if n is None else n
    chosen = spread(len(layers), n)  # refuses what cannot be chosen
    if how not in How.__args__:
        raise ValueError(f"how is one of {', '.join(How.__args__)}, got {how!r}")
    if how in ("first", "last", "ends"):
        early = {"first": n, "last": 0, "ends": (n + 1) // 2}[how]
        return layers[:early] + layers[len(layers) - (n - early) :]
    if how == "spread":
        return [layers[i] for i in chosen]
    if how == "change":
        if before is None:
            raise ValueError("how='change' compares with the model as it was: give before=")
        scores = change_ratio(before, model, stack=stack)
    else:
        if inputs is None:
            raise ValueError(f"how={how!r} ranks layers by what they do on inputs: give inputs=")
        scores = layer_scores(model, inputs, stack=stack)[how]
        if scores.isnull().any():
            raise ValueError(f"how={how!r}: the inputs hold no picture among their words")
    order = np.argsort(-scores.values, kind="stable")[:n]
    return sorted(int(layer) for layer in scores["layer"].values[order])


def layer_scores(model: nn.Module, inputs: Mapping[str, Any], *, stack: str = STACK) -> xr.Dataset:
    """What each layer does to the states that it is given, padding left out. [layer]

    `block_influence`: 1 less the mean cosine of what a layer is given and gives on, 0 to 2, and
    `block_influence_image`, of patches alone; `angular`: the mean angle between both, 0 to 1 (opposite);
    `image_attention`: the mean weight of words that come after a picture on its patches, 0 to 1. The two that need a
    picture are NaN without any.
    """
    _layers(model, stack)
    given: dict[int, Tensor] = {}
    found: dict[str, dict[int, float]] = {name: {} for name in _SCORES}
    marks: dict[int, tuple[Tensor, Tensor]] = {}

    def look(call: Call) -> Call:
        if call.site.stack == stack:
            tokens = call.tokens
            if tokens is None:
                every = torch.ones(call.query.shape[0], call.query.shape[2], dtype=torch.bool)
                marks[call.site.layer] = every, torch.zeros_like(every)
                return call
            image, real = tokens.role("image"), tokens.role("real")
            marks[call.site.layer] = real, image
            after = real & ~image & (image.int().cumsum(1) > 0)
            if after.any() and len(tokens) == call.key.shape[2]:
                on = call.weights.mass(image.to(call.query.device)).mean(1)
                found["image_attention"][call.site.layer] = float(on[after.to(on.device)].mean())
        return call

    def entering(site: Site, hidden: Tensor) -> Tensor:
        if site.stack == stack:
            given[site.layer] = hidden
        return hidden

    def leaving(site: Site, hidden: Tensor) -> Tensor:
        if site.stack == stack:
            alike = cosine_similarity(given[site.layer].double(), hidden.double(), dim=-1).clamp(-1, 1).cpu()
            real, image = (mark.cpu() for mark in marks[site.layer])
            found["block_influence"][site.layer] = float(1 - alike[real].mean())
            found["block_influence_image"][site.layer] = float(1 - alike[image].mean())
            found["angular"][site.layer] = float(alike[real].arccos().mean() / torch.pi)
        return hidden

    with frozen(model), torch.no_grad(), intervene(model, _Hooks(inputs=look, entering=entering, hidden=leaving)):
        model(**inputs)
    layers = sorted(found["angular"])
    columns = {name: ("layer", [of.get(layer, np.nan) for layer in layers]) for name, of in found.items()}
    return xr.Dataset(columns, {"layer": layers}, attrs={"stack": stack})


_SCORES = ("block_influence", "block_influence_image", "angular", "image_attention")


def change_ratio(before: nn.Module, after: nn.Module, *, stack: str = STACK) -> xr.DataArray:
    """How far tuning moved each layer's parameters: length of the change over length before. [layer]"""
    old, new = _layers(before, stack), _layers(after, stack)
    if list(old) != list(new):
        raise ValueError(f"the models have layers {list(old)} and {list(new)}")
    found = []
    for one, other in zip(old.values(), new.values()):
        a, b = (torch.cat([p.detach().double().flatten().cpu() for p in of.parameters()]) for of in (one, other))
        if a.shape != b.shape:
            raise ValueError(f"layers have {len(a)} and {len(b)} parameters: give two states of one model")
        found.append(float((b - a).norm() / a.norm()))
    return xr.DataArray(found, {"layer": list(old)}, ("layer",), name="change")


@contextmanager
def train_only(
    model: nn.Module, layers: Sequence[int], *, also: Sequence[str] | None = None, stack: str = STACK
) -> Iterator[list[nn.Parameter]]:
    """Inside the block these layers and the projector alone require gradients; gives their parameters.

    also: names of modules that are trained beside the layers; the projector of the picture unless given, () for none.
    Afterwards each parameter requires a gradient as before.
    """
    known = _layers(model, stack)
    if absent := sorted(set(layers) - set(known)):
        raise ValueError(f"there are no layers {absent} in {stack}; there are {', '.join(map(str, known))}")
    if also is None:
        also = [name for name, _ in model.named_modules() if _PROJECTOR.search(name)]
        if not also:
            raise ValueError(f"{type(model).__name__} has no projector that its name tells: say also=, or also=()")
    modules = [known[layer] for layer in layers] + [model.get_submodule(name) for name in also]
    wanted = {id(p): p for module in modules for p in module.parameters()}
    if not wanted:
        raise ValueError("no layer and no module is named, so that nothing would be trained")
    held = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in held:
            parameter.requires_grad_(id(parameter) in wanted)
        yield list(wanted.values())
    finally:
        for parameter, flag in held:
            parameter.requires_grad_(flag)


class skip_layers:
    """An intervention: these layers give on what they are given. They still run, so that caches stay as they are."""

    def __init__(self, layers: Sequence[int], *, stack: str = STACK) -> None:
        if not layers:
            raise ValueError("no layers are named, so nothing would change")
        self.layers, self.stack = set(layers), stack
        self.given: dict[int, Tensor] = {}

    def begin(self, model: nn.Module) -> None:
        self.given.clear()
        if absent := sorted(self.layers - set(_layers(model, self.stack))):
            raise ValueError(f"there are no layers {absent} in {self.stack} to skip")

    def entering(self, site: Site, hidden: Tensor) -> Tensor:
        if site.stack == self.stack and site.layer in self.layers:
            self.given[site.layer] = hidden
        return hidden

    def hidden(self, site: Site, hidden: Tensor) -> Tensor:
        if site.stack == self.stack and site.layer in self.layers:
            return self.given.pop(site.layer)
        return hidden


class _Hooks:
    def __init__(self, **hooks: Any) -> None:
        self.__dict__.update(hooks)


def _layers(model: nn.Module, stack: str) -> dict[int, nn.Module]:
    """The modules of a stack's layers, by number."""
    sites = find(model)
    if any(site.cross for site in sites.values()):
        raise ValueError(f"{type(model).__name__} has an encoder and a decoder: regions are of one stack of layers")
    mine = [site for site in sites.values() if site.stack == stack]
    if not mine:
        raise ValueError(
            f"there is no stack {stack!r}; there are {', '.join(sorted({s.stack for s in sites.values()}))}"
        )
    found = {}
    for site in mine:
        name = re.match(r"(.*\.\d+)\.", site.name)
        if name is None or site.also:
            raise ValueError(f"{site.name}: layers share one module, so that none can be trained or left out by itself")
        found[site.layer] = model.get_submodule(name[1])
    said = [
        getattr(getattr(m, "config", None), "num_hidden_layers", None) for m, s in sites.items() if s.stack == stack
    ]
    if said[0] is not None and said[0] != len(found):
        raise ValueError(
            f"{stack} has {said[0]} layers, and attention in {len(found)} modules: layers share one module, or do not "
            f"all attend, so that none can be trained or left out by its number"
        )
    return dict(sorted(found.items()))
