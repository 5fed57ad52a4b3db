"""The zoo's describer and witness with avisc and without, and where its blind tokens lie.

On Woo et al., Don't Miss the Forest for the Trees: Attentional Vision Calibration for Large Vision Language Models
(arXiv:2405.17820). Blind tokens are to lie on background: what they say is taken off, and where they are what is asked
about, that cannot help. Knobs are those of the paper's script for LLaVA-1.5. It samples; here all is greedy. Control:
as many tokens of the picture at random in place of the blind ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...interventions._branch import Branch
from ...interventions._method import image_ids
from ...interventions.avisc import _Emptied, avisc, blind_tokens
from ...seam import intervene
from .. import _oracles as oracles
from .._judged import Compared, Tried, draw_bars, headroom, judged, kept
from .._shown import MODELS, means

SCENES = {"small": 100, "large": 600}
EXPECTED = (
    "with avisc fewer of the objects that captions name are absent, or more colours are right, than plainly and than "
    "with as many random tokens of the picture, each by two standard errors, and neither is worse than plainly"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Attentional vision calibration lowers hallucination."""
    tried, drawn = [], {}
    for name in MODELS:
        found = Compared(name, SCENES[scale], seed, means(avisc), partial(_random, seed), oracles.contrasts)
        inputs = found.crowded.inputs(found.asked)
        image = torch.isin(inputs["input_ids"], torch.tensor(sorted(image_ids(found.crowded.model, "avisc"))))
        objects = torch.stack([found.crowded.owned[a.scene].any(0) for a in found.asked])
        blind = blind_tokens(found.crowded.model, inputs)[image].view_as(objects)
        on, chance = float((blind & objects).sum() / blind.sum()), float(objects.float().mean())
        where = Premise(
            "blind tokens are background: share of them on objects",
            "no more than of all patches",
            f"{on:.0%}, of all {chance:.0%}",
            on <= chance,
        )
        premises = [where, *kept(name, "P1", "P2"), headroom("a contrast", found.family)]
        tried.append(Tried(name, premises, found.helps, f"{found.told('avisc', 'random tokens')}."))
        drawn[name] = found.bars("avisc", "random tokens")
    return judged(tried, EXPECTED, seed, partial(draw_bars, drawn))


def _random(seed: int, model: nn.Module, inputs: Mapping[str, Tensor], at: slice) -> avisc:
    """avisc with as many tokens of each picture at random."""
    made = avisc(model, inputs)
    ids = inputs["input_ids"]
    image = torch.isin(ids, torch.tensor(sorted(image_ids(model, "avisc"))))
    chance = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed + at.start)).masked_fill(~image, 2.0)
    some = chance.argsort(1).argsort(1) < made.blind.sum(1, keepdim=True)
    made.branch = Branch(model, inputs, partial(intervene, model, _Emptied(image & ~some)))
    return made
