"""The zoo's describer, where picture and question say only together what the next word is.

On Dong et al., INTER: Mitigating Hallucination in Large Vision-Language Models by Interaction Guidance Sampling
(arXiv:2507.05056), whose text was not at hand. Interaction is to vary more at words of objects and colours than at
others, and guidance there is to help. The paper samples; here all is greedy. Control: guidance at every step. Beside
it, the plain contrast of the picture's logits with those without it. A model that was never shown a text without its
picture says nothing of use there: its loss on captions without the picture is to be below that of words by frequency.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...data.scenes import COLOURS
from ...evaluation.hallucination import SHAPE_WORDS
from ...interventions._picture import one_picture
from ...interventions._prompt import cut, narrowed
from ...interventions.inter import inter, variances
from ...zoo.recipes import describer
from .. import _oracles as oracles
from .._judged import Compared, Tried, draw_bars, headroom, judged, kept
from .._shown import MODELS, Asked, Shown, paired

SCENES = {"small": 60, "large": 600}
TIMES = 3.0
EXPECTED = (
    "interaction varies three times as much at words of objects and colours as at others; with inter fewer of the "
    "objects that captions name are absent, or more colours are right, than plainly and than with guidance at every "
    "step, each by two standard errors, and neither is worse than plainly"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """What picture and question say only together, at the words that say something, lowers hallucination."""
    tried, drawn = [], {}
    for name in MODELS:
        found = Compared(name, SCENES[scale], seed, _under(name), _under(name, threshold=0.0), oracles.contrasts)
        contrast = paired(found.crowded.right(found.asked, under=_contrast), found.right["plain"])
        times, counts = _varies(found.tempted)
        losses = _losses(found.tempted)
        learned = Premise(
            "text without a picture was learned: loss of captions without it, a word",
            "below that of the words' frequency",
            f"{losses[0]:.2f}, of the frequency {losses[1]:.2f} nats",
            losses[0] < losses[1],
        )
        measured = (
            f"interaction varies {times:.1f} times as much at words of objects and colours ({counts[0]}) as at others "
            f"({counts[1]}); {found.told('inter', 'guidance at every step')}; the contrast with no picture alone "
            f"{contrast}."
        )
        premises = [learned, *kept(name, "P1", "P2"), headroom("a contrast", found.family)]
        tried.append(Tried(name, premises, times >= TIMES and found.helps, measured))
        drawn[name] = found.bars("inter", "every step")
    return judged(tried, EXPECTED, seed, partial(draw_bars, drawn))


def _under(name: str, **knobs: float):
    def under(model: nn.Module, inputs: Mapping[str, Tensor], at: slice) -> inter:
        return inter.fit(model, inputs, tail=len(describer.ASSISTANT), **knobs)

    return under


class _Contrast:
    """Logits, and what they are above those of the prompt without its picture."""

    def __init__(self, made: inter) -> None:
        self.text = made.text

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return 2 * scores - self.text.logits(ids).to(scores)


def _contrast(model: nn.Module, inputs: Mapping[str, Tensor], at: slice) -> _Contrast:
    return _Contrast(inter.fit(model, inputs, tail=len(describer.ASSISTANT), threshold=0.0))


def _describing(shown: Shown) -> dict[str, Tensor]:
    return shown.inputs([Asked(i, describer.PROMPTS[0], "") for i in range(shown.n)])


def _varies(shown: Shown) -> tuple[float, tuple[int, int]]:
    """Mean variance of the interaction at words of objects and colours over that at others, and how many of each."""
    inputs = _describing(shown)
    made = inter.fit(shown.model, inputs, tail=len(describer.ASSISTANT), threshold=0.0)
    means: dict[bool, list[float]] = {True: [], False: []}
    for found, ids in variances(shown.model, inputs, made):
        for one, i in zip(found.tolist(), ids.tolist()):
            word = shown.processor.tokenizer.decode([i]).strip()
            means[word in SHAPE_WORDS or word in COLOURS].append(one)
    return float(np.mean(means[True]) / np.mean(means[False])), (len(means[True]), len(means[False]))


@torch.no_grad()
def _losses(shown: Shown) -> tuple[float, float]:
    """Of true captions after the prompt without its picture, and by how often each word is in captions. Nats a word"""
    tokenizer, inputs = shown.processor.tokenizer, _describing(shown)
    image = one_picture(shown.model, inputs, "inter")
    text = narrowed(cut({name: v for name, v in inputs.items() if v.shape == image.shape}, image))
    captions = [tokenizer(shown.recipe.said(scene), add_special_tokens=False)["input_ids"] for scene in shown.scenes]
    counts = Counter(i for ids in captions for i in ids)
    total, lost = sum(counts.values()), []
    for row, ids in zip(range(shown.n), captions):
        prompt = text["input_ids"][row][text["attention_mask"][row].bool()]
        whole = torch.cat([prompt, torch.tensor(ids)])[None]
        logits = shown.model(input_ids=whole).logits[0, len(prompt) - 1 : -1]
        lost.append(F.cross_entropy(logits, torch.tensor(ids), reduction="sum"))
    known = -sum(n * np.log(n / total) for n in counts.values()) / total
    return float(sum(lost) / total), float(known)
