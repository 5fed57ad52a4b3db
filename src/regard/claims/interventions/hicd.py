"""The zoo's describer and witness: heads that answers hang on dispersed, and taken off; other ways to induce errors.

On Jiang et al., HICD: Hallucination-Inducing via Attention Dispersion for Contrastive Decoding to Mitigate
Hallucinations in Large Language Models (arXiv:2503.12908). Heads are found on polls of other scenes. What is taken off
has to be wrong in the direction in which the model errs: with the heads dispersed, it must affirm absent partners more
often than plainly. Control: as many heads at random, dispersed; beside it, the same heads cut, and all dispersed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import sites
from ...catalog import Finding, Premise
from ...interventions._branch import Branch
from ...interventions._method import STACK
from ...interventions.hicd import Dispersed, hicd, inducing_heads
from ...seam import intervene
from .. import _oracles as oracles
from .._judged import Compared, Tried, draw_bars, headroom, judged, kept
from .._shown import MODELS, Shown, Under, paired

SCENES = {"small": 100, "large": 600}
LABELLED = 48  # polls that heads are found on
EXPECTED = (
    "with the chosen heads dispersed and taken off, fewer of the objects that captions name are absent, or more "
    "colours are right, than plainly and than with as many random heads, each by two standard errors, and neither is "
    "worse than plainly; and at least as many colours are right as with the same heads cut, and with all dispersed"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Dispersing inducing heads makes more faithful contrasts than other ways to induce hallucination."""
    tried, drawn = [], {}
    for name in MODELS:
        choosing = Shown(name, "tempted", LABELLED, seed)
        model: Any = choosing.model
        chosen = inducing_heads(model, *(_labelled(choosing, right) for right in (True, False)))
        found_sites = [s for s in sites.find(model).values() if s.stack == STACK]
        every = list(itertools.product(sorted({s.layer for s in found_sites}), range(found_sites[0].heads)))
        rest = sorted(set(every) - set(chosen))
        others = random.Random(seed).sample(rest, min(len(chosen), len(rest)))
        found = Compared(
            name,
            SCENES[scale],
            seed,
            _contrast(Dispersed(chosen)),
            _contrast(Dispersed(others)),
            oracles.contrasts,
        )
        ways = {"chosen cut": oracles.Muted(chosen), "all dispersed": Dispersed(every)}
        right = {way: found.crowded.right(found.asked, under=_contrast(thing)) for way, thing in ways.items()}
        over = {way: paired(found.right["method"], some) for way, some in right.items()}
        induced = _induced(found.tempted, Dispersed(chosen))
        heads = ", ".join(f"layer {layer} head {head}" for layer, head in chosen)
        measured = (
            f"{found.told('hicd', 'random heads')}; over the same heads cut {over['chosen cut']}, over all dispersed "
            f"{over['all dispersed']}. Chosen: {heads}."
        )
        holds = found.helps and all(gain.value >= 0 for gain in over.values())
        few = Premise(
            "the chosen heads are some of all",
            "half at most",
            f"{len(chosen)} of {len(every)}",
            len(chosen) <= len(rest),
        )
        premises = [few, induced, *kept(name, "P1", "P2"), headroom("a contrast", found.family)]
        tried.append(Tried(name, premises, holds, measured))
        drawn[name] = found.bars("chosen dispersed", "random dispersed") | {
            way: float(some.mean()) for way, some in right.items()
        }
    return judged(tried, EXPECTED, seed, partial(draw_bars, drawn))


def _induced(shown: Shown, inducing: Any) -> Premise:
    """Whether absent shapes that usually come along are affirmed more often when heads are dispersed."""
    asked = [a for a in shown.polls() if a.answer == "no"]
    more = paired(
        *(1 - shown.right(asked, under=under) for under in (lambda *_: inducing, None)), [a.scene for a in asked]
    )
    needed = "more than plainly, by two standard errors"
    return Premise("the induced run invents: absent shapes that it affirms", needed, str(more), more.sure())


def _contrast(inducing: Any) -> Under:
    def under(model: nn.Module, inputs: Mapping[str, Tensor], at: slice) -> hicd:
        made = hicd(model, inputs, heads=[])
        made.branch = Branch(model, inputs, partial(intervene, model, inducing))
        return made

    return under


def _labelled(shown: Shown, right: bool) -> dict[str, Tensor]:
    """Polls, as many with either answer, with the right or the wrong one as label."""
    some = shown.polls()[:LABELLED]
    inputs = shown.inputs(some)
    words = [a.answer if right else {"yes": "no", "no": "yes"}[a.answer] for a in some]
    answer = torch.tensor([[shown.recipe.WORD[word]] for word in words])
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], dim=1)
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1)
    return {**inputs, "input_ids": ids, "attention_mask": mask, "labels": labels}
