"""Where gaze shifts point, and what gift makes of them, on the zoo's describer.

On Qi et al., Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination Mitigation
(arXiv:2510.22067). Questions ask for the colour of one of many small objects, so that it is known which patches they
are about. Beside the saliency by shifts stands one by plain attention, made of the weights of the same words in place
of what they gain. Control: the shifts of another question of the same batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import zoo
from ...catalog import Finding
from ...interventions._method import image_tokens
from ...interventions.gift import Gaze, gaze_shifts, gift
from .. import _oracles as oracles
from .._judged import Compared, Tried, draw_bars, headroom, judged, kept
from .._shown import BATCH, MODELS, Asked, Shown, paired

SCENES = {"small": 150, "large": 1000}
TIMES = 1.5
EXPECTED = (
    f"shifts lie {TIMES:g} times as much as plain attention on the patches of what is asked about, or more, by two "
    "standard errors of the difference; with gift fewer of the objects that captions name are absent, or more colours "
    "are right, than plainly and than with another question's shifts, each by two standard errors, and neither is "
    "worse than plainly; and more colours are right than with plain attention in place of shifts"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """What a question makes a model look at is what it asks about, and to look there more is to invent less."""
    tried, drawn = [], {}
    for name in MODELS:
        processor = zoo.load(name)[1]
        other = partial(_under, processor, rolled=True)
        found = Compared(name, SCENES[scale], seed, partial(_under, processor), other, oracles.attention)
        crowded, questions = found.crowded, found.asked
        plain = crowded.right(questions, under=partial(_under, processor, static=True))
        over = paired(found.right["method"], plain)
        on = {static: _on_asked(crowded, questions, processor, static=static) for static in (False, True)}
        points = paired(on[False], TIMES * on[True])
        measured = (
            f"of the saliency by shifts {on[False].mean():.1%} is on what is asked about, by plain attention "
            f"{on[True].mean():.1%}, {chance(crowded, questions):.1%} by chance; {found.told('gift', 'other shifts')}; "
            f"over plain attention {over}."
        )
        premises = [*kept(name, "P1", "P3", "P7", "P9"), headroom("attention", found.family)]
        tried.append(Tried(name, premises, points.sure() and found.helps and over.sure(), measured))
        drawn[name] = found.bars("gift", "other shifts") | {"plain attention": float(plain.mean())}
    return judged(tried, EXPECTED, seed, partial(draw_bars, drawn))


def _under(
    processor: Any,
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    at: slice,
    *,
    static: bool = False,
    rolled: bool = False,
) -> gift:
    """gift by shifts; by plain attention; or by the shifts of the question before."""
    gaze = gaze_shifts(model, inputs, processor, static=static)
    if rolled:
        gaze = Gaze(_rolled(gaze.saliency, inputs["attention_mask"]), gaze.question)
    return gift(gaze=gaze)


def _rolled(saliency: Tensor, mask: Tensor) -> Tensor:
    """Each row's picture with what another row's has; rows are padded on the left by as much as they are short."""
    by = (mask == 0).sum(1)
    place = torch.arange(saliency.shape[1])
    others = by.roll(1)
    at = (place[None] - by[:, None] + others[:, None]).clamp(0, len(place) - 1)
    return saliency.roll(1, 0).gather(1, at)


def _on_asked(shown: Shown, asked: Sequence[Asked], processor: Any, *, static: bool) -> Tensor:
    """Share of each question's saliency that lies on what it asks about. [question]"""
    found = []
    for first in range(0, len(asked), BATCH):
        some = asked[first : first + BATCH]
        inputs = shown.inputs(some)
        saliency = gaze_shifts(shown.model, inputs, processor, static=static).saliency
        image = image_tokens(shown.model, inputs["input_ids"], "the claim")
        of_patches = saliency[image].view(len(some), -1)
        patches = oracles.asked_patches(shown, some)
        found.append((of_patches * patches).sum(1) / of_patches.sum(1).clamp(min=1e-9))
    return torch.cat(found)


def chance(shown: Shown, asked: Sequence[Asked]) -> Tensor:
    """Share of the patches that questions are about."""
    return oracles.asked_patches(shown, asked).float().mean()
