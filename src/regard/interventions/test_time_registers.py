"""Neurons that make a few patches huge write into an added token instead, and patches stay clean.

Jiang, Dravid, Efros and Gandelsman, Vision Transformers Don't Need Trained Registers (arXiv:2506.08010), by the
authors' code; we had the code and not the paper's tables. A neuron is a hidden unit of a feed-forward network after its
nonlinearity (of a gated one, the product). Those that are strong where a layer gives outliers, tokens of large norm,
are the register neurons (their algorithm 1). While the model runs, each picture's largest activation of them goes to a
token of zeros that stands behind its own, without a position, and on patches they are 0; `[CLS]` keeps what it has.

As in the authors' code one number, the largest over all chosen neurons of a layer with its sign, goes to all of them;
their text reads as one for each neuron, which is `per_neuron=True`. The code does so for the first picture of a batch;
here each has its own. What a tower gives on, also the states of its layers, is without the token. The paper's
thresholds are norms of two models (30 for CLIP ViT-B/16, 150 for DINOv2 ViT-L/14); without one, `fit` takes three
median norms of the picture's tokens. Towers with registers of their own are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args

import torch
import xarray as xr
from torch import Tensor, nn

from ..call import Call, Site
from ..seam import intervene
from ._method import Method, picture_tower

Rest = Literal["zero", "mean", "only_outliers", "same"]
Neurons = Mapping[int, Sequence[int]]  # by layer


@dataclass(kw_only=True)
class test_time_registers(Method):
    """Move what register neurons write on patches to added tokens.

    chosen: neurons by layer, as `strongest` gives them. registers: how many tokens, all given the same. scale: of what
    they are given. rest: what is left on patches: "zero", the "mean" over a picture's patches, "only_outliers" (the
    mean where a patch is more than a standard deviation above it) or the "same". per_neuron: see the module.

    ValueError where the model has no tower of patches, lacks a layer or neuron, or has registers of its own.

    >>> import regard
    >>> from regard.interventions.test_time_registers import register_neurons, strongest, test_time_registers
    >>> from regard.data.scenes import Dials, render, sample
    >>> model, processor = regard.load("lookout")
    >>> pictures = render([sample(Dials(objects=(2, 4)), 7, i) for i in range(8)], 64)
    >>> inputs = processor(images=[pictures.image(i) for i in range(8)], return_tensors="pt")
    >>> found = strongest(register_neurons(model, inputs["pixel_values"]), top_k=8)
    >>> found == {2: [384, 385, 386, 387, 388, 389, 390, 391]}  # those that were planted
    True
    >>> with regard.intervene(model, test_time_registers(chosen=found)):
    ...     logits = model(**inputs).logits
    """

    needs = "neurons that make outliers in the picture"

    off: ClassVar = {"chosen": {}}

    chosen: Neurons
    registers: int = 1
    scale: float = 1.0
    rest: Rest = "zero"
    per_neuron: bool = False
    _stack: str = field(default="", init=False, repr=False)
    _patches: Tensor | None = field(default=None, init=False, repr=False)  # of the newest call, [batch, token]

    def __post_init__(self) -> None:
        if self.rest not in get_args(Rest):
            raise ValueError(f"test-time-registers: rest is one of {', '.join(get_args(Rest))}, not {self.rest!r}")
        if self.registers < 1:
            raise ValueError(f"test-time-registers: registers is a number of tokens, 1 or more, not {self.registers}")

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        inputs: Mapping[str, Any],
        processor: Any = None,
        *,
        threshold: float | None = None,
        top_k: int = 10,
        highest: int | None = None,
        **knobs: Any,
    ) -> Self:
        """With the neurons that make outliers in the pictures of `inputs`: see `register_neurons`, `strongest`."""
        if "chosen" not in knobs:
            picture_tower(model, "test-time-registers")
            if "pixel_values" not in inputs:
                raise ValueError(f"test-time-registers: {type(model).__name__} is given no picture to find neurons on")
            scores = register_neurons(model, inputs["pixel_values"], threshold=threshold)
            knobs["chosen"] = strongest(scores, top_k=top_k, highest=highest)
        return cls(**knobs)

    def begin(self, model: nn.Module) -> None:
        _, stack, known = picture_tower(model, "test-time-registers")
        if missing := set(self.chosen) - set(known):
            raise ValueError(
                f"test-time-registers: {type(model).__name__} has no layer {min(missing)}: find neurons on this model"
            )
        configs = (getattr(m, "config", None) for m in model.modules())
        if any(getattr(config, "num_register_tokens", 0) for config in configs):
            raise ValueError(f"test-time-registers: {type(model).__name__} was trained with registers of its own")
        self._stack, self._patches = stack, None

    def appended(self, site: Site, hidden: Tensor) -> Tensor | None:
        if site.stack != self._stack or not self.chosen:
            return None
        return hidden.new_zeros(len(hidden), self.registers, hidden.shape[2])

    def inputs(self, call: Call) -> Call:
        if call.site.stack == self._stack:
            self._patches = None if call.query_tokens is None else call.query_tokens.role("image")
        return call

    def neurons(self, site: Site, activations: Tensor) -> Tensor:
        chosen = list(self.chosen.get(site.layer, ())) if site.stack == self._stack else []
        if not chosen:
            return activations
        if max(chosen) >= activations.shape[-1]:
            raise ValueError(
                f"test-time-registers: {site} has {activations.shape[-1]} neurons, and no neuron {max(chosen)}"
            )
        if self._patches is None or not bool(self._patches.any(1).all()):
            raise ValueError(f"test-time-registers: which tokens of {site} are patches is not known")
        new = activations.clone()
        new[..., chosen] = shifted(
            activations[..., chosen],
            self._patches,
            self.registers,
            scale=self.scale,
            rest=self.rest,
            per_neuron=self.per_neuron,
        )
        return new


def shifted(
    activations: Tensor,
    patches: Tensor,
    registers: int = 1,
    *,
    scale: float = 1.0,
    rest: Rest = "zero",
    per_neuron: bool = False,
) -> Tensor:
    """Activations of register neurons, moved from `patches` to the last `registers` tokens. [batch, token, neuron]

    patches: bool [batch, token]. Other knobs as of the class.

    >>> import torch
    >>> from regard.interventions.test_time_registers import shifted
    >>> some = torch.tensor([0.1, 2.0, -5.0, 1.0, 0.0])[None, :, None]  # [CLS], three patches, a register
    >>> print(shifted(some, torch.tensor([[False, True, True, True, False]]))[0, :, 0])
    tensor([ 0.1000,  0.0000,  0.0000,  0.0000, -5.0000])
    """
    over = 1 if per_neuron else (1, 2)
    highest, lowest = activations.amax(over, keepdim=True), activations.amin(over, keepdim=True)
    largest = torch.where(highest > -lowest, highest, lowest)
    where = patches.to(activations.device)[..., None]
    if rest == "zero":
        new = activations.masked_fill(where, 0)
    elif rest == "same":
        new = activations.clone()
    else:
        count = where.sum(1, keepdim=True)
        mean = activations.masked_fill(~where, 0).sum(1, keepdim=True) / count
        if rest == "only_outliers":
            squares = (activations - mean).square().masked_fill(~where, 0).sum(1, keepdim=True)
            where = where & (activations > mean + (squares / (count - 1)).sqrt())
        new = torch.where(where, mean, activations)
    new[:, -registers:] = scale * largest
    return new


@torch.no_grad()
def register_neurons(
    model: nn.Module,
    pictures: Tensor,
    *,
    threshold: float | None = None,
    layer: int = -1,
    sparse: bool = True,
) -> xr.DataArray:
    """How strong each neuron is on outliers, 0 and up, mean over pictures that have some. [layer, neuron]

    pictures: as the model is given them, `pixel_values` [batch, channel, row, column]. threshold: the norm of a token's
    state, beyond which it is an outlier; None for three times the median of its picture. layer: whose states are
    judged, -1 for the last. sparse: neurons that reach 0.5 on more than half of a picture's tokens count 0 there.
    ValueError where no picture has outliers.

    The coordinate `outliers` [layer] says in how many pictures the layer already has some: see `strongest`.
    """
    tower, stack, layers = picture_tower(model, "test-time-registers")
    reader = _Reader(stack)
    with intervene(model, reader):
        tower(pixel_values=pictures)
    hidden, activations = (torch.stack([held[i] for i in layers], 1) for held in (reader.states, reader.activations))
    where = outliers(hidden, threshold)
    found = scores(activations, where[:, layer], sparse=sparse)
    counts = ("layer", where.any(2).sum(0).tolist())
    return xr.DataArray(found.cpu().numpy(), {"layer": layers, "outliers": counts}, ("layer", "neuron"), "score")


def outliers(hidden: Tensor, threshold: float | None = None) -> Tensor:
    """Which tokens have a norm above `threshold`, by default three median norms of their picture. [..., token]

    hidden: [..., token, dim].
    """
    norms = hidden.float().norm(dim=-1)
    return norms > (3 * norms.median(-1, keepdim=True).values if threshold is None else threshold)


def scores(activations: Tensor, where: Tensor, *, sparse: bool = True) -> Tensor:
    """As `register_neurons`, of activations [batch, layer, token, neuron], outliers [batch, token]. [layer, neuron]"""
    kept = where.any(1)
    if not kept.any():
        raise ValueError(
            "test-time-registers: no picture has outliers: no token's norm is above the threshold; the tower may be "
            "too small to have any, or give a lower `threshold`, or another `layer`"
        )
    activations, where = activations[kept].float(), where[kept]
    counted = where[:, None, :, None]
    found = (activations.abs() * counted).sum(2) / counted.sum(2)
    if sparse:
        found = found * ((activations < 0.5).float().mean(2) >= 0.5)
    return found.mean(0)


def strongest(scores: xr.DataArray, *, top_k: int = 10, highest: int | None = None) -> dict[int, list[int]]:
    """The neurons with the `top_k` highest scores, by layer.

    highest: the last layer to choose from, by the paper the one in which outliers first appear; None for the first
    layer that gives some in half as many pictures as any layer does.
    """
    if highest is None:
        counts = scores["outliers"].values
        highest = int(scores["layer"].values[(2 * counts >= counts.max()).argmax()])
    some = scores.where(scores["layer"] <= highest, drop=True)
    width = some.sizes["neuron"]
    best = torch.as_tensor(some.values).flatten().argsort(descending=True, stable=True)[:top_k].tolist()
    found: dict[int, list[int]] = {}
    for layer, neuron in sorted((int(some["layer"][i // width]), i % width) for i in best):
        found.setdefault(layer, []).append(neuron)
    return found


class _Reader:
    """Keeps what layers give, and their neurons."""

    def __init__(self, stack: str) -> None:
        self.stack = stack
        self.states: dict[int, Tensor] = {}
        self.activations: dict[int, Tensor] = {}

    def hidden(self, site: Site, hidden: Tensor) -> Tensor:
        if site.stack == self.stack:
            self.states[site.layer] = hidden
        return hidden

    def neurons(self, site: Site, activations: Tensor) -> Tensor:
        if site.stack == self.stack:
            self.activations[site.layer] = activations
        return activations
