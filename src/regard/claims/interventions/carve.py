"""The zoo's describer on tiny shapes, asked again of what the question's attention points at.

On Ge et al., Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning (arXiv:2509.06461). Scenes are drawn
at 256 pixels and read at 64, so that a crop brings detail; the general instruction is the one that the model was
trained on. Controls: the crop by the question's attention without the contrast, and that by another question's on the
same scene. Beside them, in clutter: whether attention is spread more, and answers are worse where it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...data.scenes import questions
from ...interventions._look import looks
from ...interventions._method import layers
from ...interventions.carve import carve, depth, relevance
from ...zoo.recipes import describer
from .. import _oracles as oracles
from .._judged import Tried, draw_bars, headroom, judged, kept
from .._locator import hit
from .._shown import BATCH, JUDGED, MODELS, Asked, Shown, Under, paired

SCENES = {"small": 150, "large": 1000}
GENERAL = describer.PROMPTS[0]
STEPS = 4  # of an answer, which is a word and the end
MARGIN, OVER = 0.1, 0.05
EXPECTED = (
    "with carve 10 points more colours are right than plainly, 5 more than with the crop by the question's attention "
    "alone, and than with that of another question, each by two standard errors; Spearman's correlation of clutter "
    "with the entropy of attention is 0.3 or more, and answers are 5 points worse in its upper half"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """What a question looks at and a general instruction does not is where the answer is."""
    tried, drawn = [], {}
    for name in MODELS:
        shown = Shown(name, "tiny", SCENES[scale], JUDGED + seed)
        asked = shown.colours()
        others = [_another(shown, a, seed) for a in asked]
        right = {
            "plain": shown.right(asked),
            "carve": shown.right(asked, under=_under(shown, asked)),
            "without contrast": shown.right(asked, under=_under(shown, asked, contrasted=False)),
            "another question": shown.right(asked, under=_under(shown, asked, prompts=others)),
        }
        over = {way: paired(right["carve"], some) for way, some in right.items()}
        spread = _entropies(shown, asked)
        clutter = np.array([shown.scenes[a.scene].clutter + len(shown.scenes[a.scene].objects) for a in asked])
        along = float(spearmanr(clutter, spread).statistic)
        upper = torch.from_numpy(spread > np.median(spread))
        low, high = (right["plain"][some] for some in (~upper, upper))
        worse = float(low.mean() - high.mean())
        error = float((low.var() / len(low) + high.var() / len(high)).sqrt())
        family = oracles.crops(shown, asked, right["plain"])
        hits = np.mean([hit(m, *_place(shown, a)) for m, a in zip(_maps(shown, asked), asked)])
        points = Premise(
            "the contrast points at what is asked about: its most relevant patch is near",
            "50%",
            f"{hits:.0%}",
            bool(hits >= 0.5),
        )
        measured = (
            f"colours right {right['plain'].mean():.1%}, with carve {over['plain']}, over the crop without contrast "
            f"{over['without contrast']}, over that of another question {over['another question']}; Spearman's "
            f"correlation of clutter with entropy {along:.2f}; answers in the upper half of entropy worse by "
            f"{100 * worse:+.1f} ± {100 * error:.1f} points."
        )
        helps = over["plain"].sure(MARGIN) and all(
            over[way].sure(OVER) for way in ("without contrast", "another question")
        )
        holds = helps and along >= 0.3 and worse >= 0.05 and worse >= 2 * error
        tried.append(Tried(name, [*kept(name, "P9", "P11"), headroom("a crop", family), points], holds, measured))
        drawn[name] = {way: float(some.mean()) for way, some in right.items()}
        drawn[name]["oracle"] = drawn[name]["plain"] + family.oracle.value
    return judged(tried, EXPECTED, seed, partial(draw_bars, drawn))


def _under(
    shown: Shown, asked: Sequence[Asked], *, contrasted: bool = True, prompts: Sequence[Asked] | None = None
) -> Under:
    """carve; without its contrast; or as if the prompts were other ones."""

    def under(model: nn.Module, inputs: Mapping[str, Tensor], at: slice) -> carve:
        images = [shown.images[a.scene] for a in asked[at]]
        looked = inputs if prompts is None else shown.inputs(prompts[at])
        how = {"steps": STEPS, "images": images, "general": GENERAL if contrasted else None}
        return carve.fit(model, looked, shown.processor, **how)

    return under


def _maps(shown: Shown, asked: Sequence[Asked]) -> list[NDArray[np.float32]]:
    found = []
    for i in range(0, len(asked), BATCH):
        inputs = shown.inputs(asked[i : i + BATCH])
        found += relevance(shown.model, inputs, shown.processor, steps=STEPS, general=GENERAL)
    return found


def _entropies(shown: Shown, asked: Sequence[Asked]) -> NDArray[np.float64]:
    """Of the last step's weights on the picture, in nats, mean over the layers."""
    among, found = depth(layers(shown.model, "carve")), []
    for i in range(0, len(asked), BATCH):
        for one in looks(shown.model, shown.inputs(asked[i : i + BATCH]), "carve", steps=STEPS, among=among):
            rows = one[-1].flatten(1)  # [layer, patch]
            found.append(float(-(rows * rows.clamp(min=1e-12).log()).sum(1).mean()))
    return np.array(found)


def _place(shown: Shown, a: Asked) -> tuple[float, float]:
    thing = shown.scenes[a.scene].objects[a.about[0]]
    return thing.x, thing.y


def _another(shown: Shown, a: Asked, seed: int) -> Asked:
    """Another question on a colour of the same scene; the same where it has no other."""
    some = [q for q in questions(shown.scenes[a.scene], "colour") if q.text != a.text]
    if not some:
        return a
    chosen = some[np.random.default_rng((seed, a.scene)).integers(len(some))]
    return Asked(a.scene, chosen.text, chosen.answer, chosen.about)
