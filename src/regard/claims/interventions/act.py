"""The zoo's reader: calibration in heads that helped on other prompts, in all heads, and in none.

On Yu et al., Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through
Attention Calibration (arXiv:2406.15765). The paper's tasks are public sets of questions; here a passage of random
tokens, one of ten, is to be told again. Before, it was tried on the describer and 768 questions on presence, to which
calibration of all heads but those of the first two layers and the last left 79.6% of the answers right, as without.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from ...catalog import Finding
from ...interventions._method import layers
from ...interventions.act import act, helpful_heads
from ...loading import load
from ...seam import intervene
from .._passages import retold, rightly

BATCH = 8
BATCHES = {"small": (6, 24), "large": (60, 240)}  # to choose heads on, and to judge on
EXPECTED = (
    "with the chosen heads calibrated, at least 0.01 more of the tokens of new prompts are told rightly than without, "
    "and at least as many as with all heads calibrated"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Less attention for sinks, in heads where that helped before, and more is told rightly."""
    model, tokenizer = load("reader")
    choosing, judging = (
        [retold(model, tokenizer.bos_token_id, batch=BATCH, seed=1000 * (2 * seed + part) + i) for i in range(n)]
        for part, n in enumerate(BATCHES[scale])
    )
    config: Any = model.config
    n_heads = config.num_attention_heads
    tried = list(itertools.product(layers(model, "act")[2:-1], range(n_heads)))
    scores: list[float] = []  # without, then with each head

    def score() -> float:
        scores.append(rightly(model, choosing))
        return scores[-1]

    chosen = helpful_heads(model, score, among=tried)
    rates = {"none": rightly(model, judging)}
    for name, heads in (("chosen", chosen), ("all", tried)):
        with intervene(model, act(heads=heads)):
            rates[name] = rightly(model, judging)
    holds = rates["chosen"] >= rates["none"] + 0.01 and rates["chosen"] >= rates["all"]
    measured = (
        f"{len(chosen)} of {len(tried)} heads raise the share of tokens told rightly on {BATCH * len(choosing)} "
        f"prompts. On {BATCH * len(judging)} others {rates['none']:.1%} are, with these heads calibrated "
        f"{rates['chosen']:.1%}, with all {rates['all']:.1%}."
    )

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        grid = 100 * (np.array(scores[1:]) - scores[0]).reshape(-1, n_heads)
        most = max(abs(grid).max(), 0.1)
        picture = left.imshow(grid, cmap="RdBu", vmin=-most, vmax=most)
        left.set_yticks(range(len(grid)), sorted({layer for layer, _ in tried}))
        left.set(xlabel="head", ylabel="layer", title="Gain of each head alone", xticks=range(n_heads))
        figure.colorbar(picture, ax=left, label="points", shrink=0.6)
        right.bar(list(rates), list(rates.values()), color=["0.6", "C2", "C0"])
        right.set(ylim=(0, 1), xlabel="heads that are calibrated", title="Tokens told rightly")

    return Finding(holds, measured, EXPECTED, seed, draw=draw)
