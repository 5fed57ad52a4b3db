"""The zoo's describer with damro and without, and where its outlier patches lie.

On Gong et al., DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination (arXiv:2410.04514). The
patches that the tower's first token attends to most are to be background, and the language model is to look at them
too: what they say is taken off, and where they are what is asked about, that cannot help. Knobs are the defaults of the
authors' program, a 576th times ten of the patches. They sample; here all is greedy. Control: as many patches at random
in their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...interventions._look import looks
from ...interventions._method import layers
from ...interventions.damro import damro, only, outliers
from .. import _oracles as oracles
from .._judged import Compared, Tried, draw_bars, headroom, judged, kept
from .._shown import MODELS, ROWS, means

SCENES = {"small": 100, "large": 600}
EXPECTED = (
    "with damro fewer of the objects that captions name are absent, or more colours are right, than plainly and than "
    "with as many random patches, each by two standard errors, and neither is worse than plainly"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """A contrast with the tower's outlier patches lowers hallucination."""
    tried, drawn = [], {}
    for name in MODELS:
        found = Compared(name, SCENES[scale], seed, means(damro), partial(_random, seed), oracles.contrasts)
        shown = found.crowded
        inputs = shown.inputs(found.asked)
        chosen = outliers(shown.model, inputs)
        objects = torch.stack([shown.owned[a.scene].any(0) for a in found.asked])
        on, chance = float(objects.gather(1, chosen).float().mean()), float(objects.float().mean())
        look = torch.stack(looks(shown.model, inputs, "damro", steps=1, among=layers(shown.model, "damro")[2:]))
        weight = look.mean((1, 2)).flatten(1)
        times = float(weight.gather(1, chosen).mean() / weight.mean())
        premises = [
            Premise(
                "outlier patches are background: share of them on objects",
                "15% or less",
                f"{on:.0%}, of all {chance:.0%}",
                on <= 0.15,
            ),
            Premise(
                "the language model looks at them: its weight on them over that on any patch, layers from the third on",
                "3 or more",
                f"{times:.1f}",
                times >= 3,
            ),
            *kept(name, "P1", "P2", "P6"),
            headroom("a contrast", found.family),
        ]
        tried.append(Tried(name, premises, found.helps, f"{found.told('damro', 'random patches')}."))
        drawn[name] = found.bars("damro", "random patches")
    return judged(tried, EXPECTED, seed, partial(draw_bars, drawn))


def _random(seed: int, model: nn.Module, inputs: Mapping[str, Tensor], at: slice) -> damro:
    """damro with as many patches of each picture at random."""
    made = damro(model, inputs)
    chance = torch.rand(len(made.kept), ROWS**2, generator=torch.Generator().manual_seed(seed + at.start))
    made.branch = only(model, inputs, chance.topk(made.kept.shape[1]).indices)
    return made
