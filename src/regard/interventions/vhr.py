"""Heads whose output the picture changes most speak louder.

He et al., Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence (arXiv:2412.13949), section 3
and algorithm 1. The divergence of a head (equation 4) is how far its output at the last token of the prompt is from
what it is when the picture is removed. Where both that and the squared length of the output without the picture are
more than a standard deviation above the layer's mean (equation 6), the head answers to the absence of the picture, and
counts as 0. Heads above their layer's median are aware (equation 7): for this prompt, their outputs are `alpha` times
as large, in the second layer and the last 14 of 32. No code of the authors was at hand to compare with.

Both readings of the prompt run as one batch, with heads of earlier layers raised in both, so that heads are found layer
by layer in a single pass, as the paper asks; that the reading without a picture is raised too, it does not say. That
pass stands before generation, so the prompt is read twice more, where the paper reads it once more. In models with more
or fewer than 32 layers the last 14 / 32 are raised. The paper gives InstructBLIP the last 18; such a model, whose
pictures are not tokens among words, is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import xarray as xr
from torch import Tensor, nn

from ..call import Call
from ..seam import intervene
from ._method import STACK, Method, image_ids, image_tokens, layers, padded_left
from ._prompt import cut

LAST = 14 / 32


@dataclass(kw_only=True)
class vhr(Method):
    """Scale up the output of the heads that the picture changes most.

    heads: which, as `aware_heads` finds them for a prompt. Boolean, [batch, layer, head]; a batch of 1 stands for all
    rows. alpha: the factor; 1 changes nothing.

    ValueError where the model reads no image tokens, or the heads are of another batch or model.

    >>> import regard
    >>> from regard.interventions.vhr import aware_heads, vhr
    >>> from regard.zoo.recipes.describer import pictures, tempting
    >>> model, processor = regard.load("describer")
    >>> inputs = processor(text="user: <image> describe assistant:", images=pictures(tempting(1)), return_tensors="pt")
    >>> heads = aware_heads(model, inputs)
    >>> heads.dims
    ('batch', 'layer', 'head')
    >>> with regard.intervene(model, vhr(heads=heads)):
    ...     ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    """

    needs = "heads that the picture changes most"

    off: ClassVar = {"alpha": 1.0}

    heads: xr.DataArray
    alpha: float = 2.0
    _scale: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)  # by layer, [batch, head, 1, 1]

    @classmethod
    def fit(
        cls, model: nn.Module, inputs: Mapping[str, Any], processor: Any = None, *, alpha: float = 2.0, **knobs: Any
    ) -> Self:
        """With the heads that are aware of the picture in `inputs`."""
        heads = knobs.pop("heads", None)
        return cls(heads=aware_heads(model, inputs, alpha=alpha) if heads is None else heads, alpha=alpha, **knobs)

    def begin(self, model: nn.Module) -> None:
        image_ids(model, "vhr")
        known = set(layers(model, "vhr"))
        if more := sorted(set(self.heads["layer"].values.tolist()) - known):
            raise ValueError(f"vhr: heads are of layer {more[0]}, which {type(model).__name__} has not: find them anew")
        self._scale = {
            int(layer): 1 + (self.alpha - 1) * torch.as_tensor(some.values).float()[:, :, None, None]
            for layer, some in zip(self.heads["layer"].values, self.heads.transpose("layer", "batch", "head"))
        }

    def output(self, call: Call, output: Tensor) -> Tensor:
        scale = self._scale.get(call.site.layer) if call.site.stack == STACK else None
        if scale is None or self.alpha == 1:
            return output
        if len(scale) not in (1, len(output)) or scale.shape[1] != output.shape[1]:
            raise ValueError(
                f"vhr: heads were found for a batch of {len(scale)} and {scale.shape[1]} heads, and {call.site} runs "
                f"with {len(output)} and {output.shape[1]}: find them with aware_heads on what the model is given"
            )
        return output * scale.to(output)


def aware_heads(
    model: nn.Module, inputs: Mapping[str, Any], *, alpha: float = 2.0, among: Collection[int] | None = None
) -> xr.DataArray:
    """The heads of each row of `inputs` that are aware of its picture, by layer. [batch, layer, head] boolean

    alpha: the factor by which those of earlier layers are raised meanwhile. among: layers of the language model; None
    for the second and the last 14 / 32. Of a row without a picture, no head is aware. ValueError where no row has one,
    or rows are padded on the right.
    """
    return divergence(model, inputs, alpha=alpha, among=among)["aware"]


@torch.no_grad()
def divergence(
    model: nn.Module, inputs: Mapping[str, Any], *, alpha: float = 1.0, among: Collection[int] | None = None
) -> xr.Dataset:
    """How far each head's output at the last token is from what it is without the picture. [batch, layer, head]

    `divergence` and `without`, the length of the output without the picture, in the units of the values, 0 and up;
    `aware` says which heads that makes aware. See `aware_heads`.
    """
    known = layers(model, "vhr")
    chosen = reinforced(known) if among is None else sorted(among)
    reader = _Reader(chosen, alpha, len(inputs["input_ids"]))
    with intervene(model, reader):
        model(**with_and_without(model, inputs), use_cache=False)
    data = {name: (("batch", "layer", "head"), torch.stack(some, 1).numpy()) for name, some in reader.found.items()}
    return xr.Dataset(data, {"layer": chosen})


def reinforced(known: list[int]) -> list[int]:
    """The second layer and the last 14 of 32, or as many in proportion."""
    return sorted({known[min(1, len(known) - 1)], *known[-max(1, round(LAST * len(known))) :]})


def aware(divergence: Tensor, without: Tensor) -> Tensor:
    """Which heads of a layer are above its median, those that answer to the absence apart. [batch, head] boolean

    divergence, without: [batch, head], see `divergence`.
    """
    surge = without.square()
    outliers = torch.stack([x > x.mean(1, keepdim=True) + x.std(1, keepdim=True) for x in (divergence, surge)]).all(0)
    kept = divergence.masked_fill(outliers, 0.0)
    return kept > kept.median(1, keepdim=True).values


def with_and_without(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a batch twice as large: its rows as they are, then without their image tokens, padded on the left."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    padded_left(inputs, "vhr")
    image = image_tokens(model, ids, "vhr")
    if not image.any():
        raise ValueError("vhr: no row of the inputs holds a picture")
    bare = cut(inputs, image)
    both = dict(inputs) | {"attention_mask": torch.cat([mask, bare["attention_mask"]])}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == ids.shape and name != "attention_mask":
            both[name] = torch.cat([value, bare[name]])
    return both


class _Reader:
    """Compares the two halves of a batch layer by layer, and raises the heads that it finds aware in both."""

    def __init__(self, among: Collection[int], alpha: float, batch: int) -> None:
        self.among, self.alpha, self.batch = among, alpha, batch
        self.found: dict[str, list[Tensor]] = {"divergence": [], "without": [], "aware": []}

    def output(self, call: Call, output: Tensor) -> Tensor:
        if call.site.stack != STACK or call.site.layer not in self.among:
            return output
        whole, bare = output[:, :, -1].float().split(self.batch)
        found = {"divergence": (whole - bare).norm(dim=-1), "without": bare.norm(dim=-1)}
        found["aware"] = aware(**found)
        for name, value in found.items():
            self.found[name].append(value.cpu())
        scale = 1 + (self.alpha - 1) * found["aware"].to(output)
        return output * scale.repeat(2, 1)[:, :, None, None]
