"""The zoo's describer answers polls with contrastive decoding, beside several ways to induce hallucination.

Inducing heads are found on labelled polls of other scenes: the right word, and the other one, as answers. Each way is
contrasted with the same alpha: the chosen heads dispersed (the method), the same heads cut, as many heads at random
dispersed, and all heads dispersed. Scenes are those in which the biases of training are turned round, clear and veiled.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ... import sites, zoo
from ...call import Call
from ...catalog import Finding
from ...evaluation import hallucination
from ...interventions._branch import Branch
from ...interventions.hicd import Dispersed, Heads, hicd, inducing_heads
from ...seam import intervene
from ...zoo.recipes import describer

SETS = ("countered", "countered_veiled")
SCENES = {"small": 40, "full": 400}
LABELLED = 48  # polls that heads are found on
DRAWS = 3  # of heads at random
LEAST = 0.01  # differences within it tell nothing
CHOSEN, CUT, RANDOM, ALL = "chosen dispersed", "chosen cut", "random dispersed", "all dispersed"

EXPECTED = (
    "with the chosen heads dispersed, more polls are right than with greedy decoding, than with the same heads cut, "
    "and than with as many random heads or all heads dispersed, each by more than one point"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Dispersing inducing heads makes more faithful contrasts than other ways to induce hallucination."""
    model, processor = zoo.load("describer")
    chosen = inducing_heads(model, *(_labelled(processor, seed, right) for right in (True, False)))
    language = [s for s in sites.find(model).values() if s.stack == "language_model"]
    every = list(itertools.product((s.layer for s in language), range(model.config.text_config.num_attention_heads)))
    draw = random.Random(seed)
    drawn = [draw.sample(sorted(set(every) - set(chosen)), len(chosen)) for _ in range(DRAWS)]
    ways: dict[str, list[Any]] = {
        "greedy": [None],
        CHOSEN: [Dispersed(chosen)],
        CUT: [_Cut(chosen)],
        RANDOM: [Dispersed(heads) for heads in drawn],
        ALL: [Dispersed(every)],
    }
    polls = {name: _polls(name, SCENES[scale], seed) for name in SETS}
    right = {
        way: {name: fmean(_right(model, processor, polls[name], thing) for thing in things) for name in SETS}
        for way, things in ways.items()
    }
    mean = {way: fmean(some.values()) for way, some in right.items()}
    gains = [mean[CHOSEN] - mean[other] for other in mean if other != CHOSEN]
    holds = None if all(abs(gain) <= LEAST for gain in gains) else min(gains) > LEAST
    measured = (
        f"{sum(len(some[1]) for some in polls.values())} polls; right: "
        f"{', '.join(f'{way} {share:.1%}' for way, share in mean.items())}. Chosen: "
        f"{', '.join(f'layer {layer} head {head}' for layer, head in chosen)}."
    )
    return Finding(holds, measured, EXPECTED, seed, draw=partial(_draw, right))


class _Cut:
    """Some heads of the language model give nothing."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads

    def output(self, call: Call, output: Tensor) -> Tensor:
        heads = [head for layer, head in self.heads if layer == call.site.layer and call.site.stack == "language_model"]
        changed = output.clone()
        changed[:, heads] = 0
        return changed


def _contrast(inducing: Any, model: nn.Module, inputs: Mapping[str, Any]) -> hicd:
    made = hicd(model, inputs, heads=[])
    made.branch = Branch(model, inputs, partial(intervene, model, inducing))
    return made


def _polls(name: str, n: int, seed: int) -> tuple[list[Any], list[hallucination.Poll]]:
    """Pictures, and adversarial and random polls on them."""
    countered, veil = describer.SETS[name]
    scenes = describer.tempting(n, countered=countered, seed=100 + seed)
    known = describer.tempting(n, seed=100 + seed)
    polls = [
        poll for kind in ("random", "adversarial") for poll in hallucination.polls(scenes, kind, known=known, seed=seed)
    ]
    return describer.pictures(scenes, veil=veil, seed=seed), polls


def _right(model: nn.Module, processor: Any, asked: tuple[list[Any], list[hallucination.Poll]], inducing: Any) -> float:
    images, polls = asked
    once = list(dict.fromkeys((poll.scene, poll.text) for poll in polls))
    method = None if inducing is None else partial(_contrast, inducing)
    shown, texts = [images[scene] for scene, _ in once], [text for _, text in once]
    said = dict(zip(once, describer.reply(model, processor, shown, texts, length=1, method=method)))
    return hallucination.pope([said[p.scene, p.text] for p in polls], [p.answer for p in polls])["accuracy"]


def _labelled(processor: Any, seed: int, right: bool) -> dict[str, Tensor]:
    """Polls of other scenes, as many with either answer, with the right or the wrong one as label."""
    images, polls = _polls("countered_veiled", LABELLED, seed + 500)
    some = polls[:LABELLED]
    inputs = describer.asked(processor, [images[p.scene] for p in some], [p.text for p in some])
    words = [p.answer if right else {"yes": "no", "no": "yes"}[p.answer] for p in some]
    answer = torch.tensor([[describer.WORD[word]] for word in words])
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], dim=1)
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1)
    return {**inputs, "input_ids": ids, "attention_mask": mask, "labels": labels}


def _draw(right: Mapping[str, Mapping[str, float]], figure: Any) -> None:
    axes = figure.subplots()
    for shift, name in zip((-0.2, 0.2), SETS):
        shares = [some[name] for some in right.values()]
        bars = axes.bar([i + shift for i in range(len(shares))], shares, width=0.38, label=name.replace("_", ", "))
        axes.bar_label(bars, [f"{share:.0%}" for share in shares], fontsize=8)
    axes.set_xticks(range(len(right)), list(right))
    axes.axhline(0.5, color="grey", linewidth=0.8)
    axes.set(ylabel="polls right", ylim=(0, 1.1))
    axes.legend(frameon=False, loc="upper right", ncols=2)
