"""The zoo's describer: text without visual sinks, text without other patches, and what var makes of its captions.

On Kang et al., See What You Are Told: Visual Attention Sink in Large Multimodal Models (arXiv:2503.03321). Scenes hold
a shape whose partner the model expects, have their biases turned round, and are veiled in part, so that it invents
objects. Captions are scored by what they name and is absent, questions on presence (half are to be answered with yes)
by accuracy. In the language model, from its third layer on, text after the picture is made blind to the sinks of each
layer, or to as many other patches, drawn by seed; to all others where the sinks are more than half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...call import Call
from ...catalog import Finding
from ...interventions._method import image_keys, layers
from ...interventions.var import after, var
from ...zoo.recipes import describer
from .._veiled import LEAST, Veiled, bars, told

SCENES = {"small": 120, "full": 1000}
EXPECTED = (
    "with text blind to the sinks, accuracy falls by at most 0.02, and by less than half of what it falls by when "
    "text is blind to as many other patches; with var, the share of the objects named that are absent is lower by a "
    "tenth of itself or more, and accuracy is lower by at most 0.01"
)


@dataclass(kw_only=True)
class Blind(var):
    """Text after the picture does not see its sinks, or (`others`) as many of its other patches."""

    others: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shares: list[float] = []
        self.first: Tensor | None = None  # sinks of the first layer and call [batch, key]

    def begin(self, model: nn.Module) -> None:
        super().begin(model)
        self._layers = set(layers(model, "var")[2:])

    def weights(self, call: Call, weights: Tensor, rows: range) -> Tensor:
        image = image_keys(call)
        assert image is not None
        sink = self.sinks(call) & image
        self.shares.append(float(sink.sum() / image.sum()))
        self.first = sink if self.first is None else self.first
        hidden = self._others(image, sink) if self.others else sink
        seen = weights * ~(hidden[:, None] & after(call, image, rows)[..., None])[:, None]
        return seen / seen.sum(-1, keepdim=True).clamp(min=1e-12)

    def _others(self, image: Tensor, sink: Tensor) -> Tensor:
        chance = torch.rand(image.shape[1], generator=torch.Generator().manual_seed(self.seed))
        order = chance.masked_fill(~(image & ~sink), 2.0).argsort(1).argsort(1)
        return (order < sink.sum(1, keepdim=True)) & image & ~sink


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Text misses nothing without visual sinks, and invents less where their attention goes to the picture."""
    veiled = Veiled(SCENES[scale], seed)
    sinks, others = Blind(), Blind(others=True, seed=seed)
    answers = {
        "plain": veiled.accuracy(),
        "blind to\nsinks": veiled.accuracy(lambda *_: sinks),
        "blind to\nothers": veiled.accuracy(lambda *_: others),
        "var": veiled.accuracy(var.fit),
    }
    plainly, steered = veiled.captions(), veiled.captions(var.fit)
    if plainly["chair_i"] < LEAST:
        return Finding(None, f"plainly it invents only {plainly['chair_i']:.1%} of the objects", EXPECTED, seed)

    plain, without_sinks, without_others, with_var = answers.values()
    cost, control = plain - without_sinks, plain - without_others
    holds = (
        cost <= 0.02
        and cost < control / 2
        and steered["chair_i"] <= 0.9 * plainly["chair_i"]
        and with_var >= plain - 0.01
    )
    measured = (
        f"{np.mean(sinks.shares):.0%} of the patches are sinks. Accuracy on {len(veiled.polls)} questions {plain:.1%}; "
        f"blind to sinks {without_sinks:.1%}, to as many others {without_others:.1%}; with var {with_var:.1%}. "
        f"{told(plainly, steered, 'var')}"
    )

    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.4, 1.4])
        _mark(left, veiled, sinks.first)
        middle.bar(list(answers), list(answers.values()), color=["0.6", "C0", "C3", "C2"])
        middle.set(ylim=(0.4, 1), title="Right answers on presence")
        bars(right, plainly, steered, "var")

    return Finding(holds, measured, EXPECTED, seed, draw=draw)


def _mark(axes: Any, veiled: Veiled, sinks: Tensor | None) -> None:
    """The picture that was asked about first, and which of its patches are sinks."""
    assert sinks is not None
    first = veiled.polls[0]
    picture = veiled.images[first.scene]
    ids = describer.asked(veiled.processor, [picture], [first.text])["input_ids"][0]
    patches = sinks[0, -len(ids) :][ids == veiled.model.config.image_token_id].reshape(
        2 * [round(describer.PATCHES**0.5)]
    )
    size = picture.width / len(patches)
    row, column = (patches.nonzero().T + 0.5) * size
    axes.imshow(picture)
    axes.plot(column, row, "x", color="black", markersize=5)
    axes.set(xticks=[], yticks=[], title="Sinks (x) of a picture")
