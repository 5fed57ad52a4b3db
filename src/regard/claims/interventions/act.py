"""The zoo's describer and witness: calibration in heads that helped on other scenes, in random heads, and in none.

On Yu et al., Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through
Attention Calibration (arXiv:2406.15765). The paper's tasks are public sets of questions; here colours of one of many
objects are asked for. What is calibrated has to be there: sinks beyond the first token, which the last tokens of a
prompt, that few see, do not count as; and some that hurt.
"""

from __future__ import annotations

import itertools
import random
from functools import partial

import torch
from torch import Tensor

from ...call import Call
from ...catalog import Finding, Premise
from ...interventions._method import STACK, layers
from ...interventions.act import act, helpful_heads, sinks
from ...recording import statistic
from ...seam import record
from .. import _oracles as oracles
from .._judged import Compared, Tried, draw_bars, headroom, judged
from .._shown import MODELS, Shown, paired

SCENES = {"small": (120, 150), "large": (300, 1000)}  # to choose heads on, and to judge on
LAST = 10  # tokens of a prompt that are seen by too few to be sinks
FEWEST = 0.5  # sinks of a head
EXPECTED = (
    "with the chosen heads calibrated fewer of the objects that captions name are absent, or more colours are right, "
    "than plainly and than with as many random heads calibrated, each by two standard errors, and neither is worse "
    "than plainly; and at least as many colours are right as with all heads calibrated"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Less attention for sinks, in heads where that helped before, and more is told rightly."""
    tried, drawn = [], {}
    choose, judge = SCENES[scale]
    for name in MODELS:
        choosing = Shown(name, "crowded", choose, seed)
        asked, model = choosing.colours(), choosing.model
        every = list(itertools.product(layers(model, "act")[2:-1], range(model.config.text_config.num_attention_heads)))
        chosen = helpful_heads(model, lambda: float(choosing.right(asked).mean()), among=every)  # noqa: B023
        others = random.Random(seed).sample(
            sorted(set(every) - set(chosen)), min(len(chosen), len(every) - len(chosen))
        )
        methods = [act(heads=heads) for heads in (chosen, others, every)]
        found = Compared(name, judge, seed, lambda *_, m=methods: m[0], lambda *_, m=methods: m[1], oracles.attention)
        in_all = found.crowded.right(found.asked, under=lambda *_, m=methods: m[2])
        over = paired(found.right["method"], in_all)
        many = _sinks(found.crowded, {layer for layer, _ in every})
        there = Premise(
            "sinks beyond the first token, the last ten of a prompt apart, a head",
            f"{FEWEST:g} or more",
            f"{many:.2f}",
            many >= FEWEST,
        )
        measured = f"{found.told('act', 'random heads')}; over all heads calibrated {over}."
        hurt = Premise(
            "some sinks hurt: heads that help when theirs are calibrated, on other scenes",
            "one or more",
            f"{len(chosen)} of {len(every)}",
            bool(chosen),
        )
        premises = [there, hurt, headroom("attention", found.family)]
        tried.append(Tried(name, premises, found.helps and over.value >= 0, measured))
        drawn[name] = found.bars("chosen heads", "random heads") | {"all heads": float(in_all.mean())}
    return judged(tried, EXPECTED, seed, partial(draw_bars, drawn))


def _sinks(shown: Shown, among: set[int]) -> float:
    """Mean number of sinks that may be calibrated in a head of these layers."""
    counts: list[Tensor] = []

    @statistic("batch head", title="Sinks")
    def count(call: Call) -> Tensor:
        found = sinks(call)[..., :-LAST].sum(-1)
        if call.site.stack == STACK and call.site.layer in among:
            counts.append(found.float())
        return found

    with record(shown.model, count), torch.inference_mode():
        shown.model(**shown.inputs(shown.colours()[:64]))
    return float(torch.cat(counts).mean())
