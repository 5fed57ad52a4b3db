"""Claim of Zheng et al., Attention Heads of Large Language Models: A Survey (arXiv:2409.03752), section 4.

Heads that other papers found belong to four stages. Here: the atlas gives the zoo reader's heads, known from its card,
the kind that they have and the stage that the survey gives that kind; and the four stages are tags of the catalog. This
tests a table by what it was made for: that heads of the reader, found by their scores, are put where the survey puts
their kind. The control draws a stage at random.
"""

from __future__ import annotations

import random
from typing import Any

from ... import catalog, zoo
from ...atlas import SCORES, STAGES, TAXONOMY, atlas
from ...catalog import Finding, Premise

KNOWN = {"previous_token": "previous token", "induction": "induction"}  # score on the card: kind
EXPECTED = (
    "the heads that the reader's card names for the previous token and for induction have that kind and its stage, and "
    "a score at most 0.05 below the highest of all heads; every head of a kind has that kind's stage; a "
    "stage at random is none of theirs in most of 100 draws; each of the four stages is a tag"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """The atlas puts heads that are known under their kind and stage."""
    card = zoo.measured("reader")
    card = card.get("abilities", card)
    node = atlas(*zoo.load("reader"), seed=seed).tree["language_model"].to_dataset()
    listed = [
        (str(kinds).split(", "), str(stages).split(", "))
        for kinds, stages in zip(node["kinds"].values.ravel(), node["stages"].values.ravel())
    ]
    staged = {kind: of.stage for kind, of in TAXONOMY.items() if of.stage}
    placed = [(kind, staged[kind] in stages) for kinds, stages in listed for kind in kinds if kind in staged]
    right, words, shuffled = [], [], []
    rng = random.Random(seed)
    for score, kind in KNOWN.items():
        known, stage = card[score], TAXONOMY[kind].stage
        at = {"layer": known["layer"], "head": known["head"]}
        head, value, highest = node.sel(at), float(node[score].sel(at)), float(node[score].max())
        stages = str(head["stages"].values).split(", ")
        right.append(kind in str(head["kinds"].values).split(", ") and stage in stages and value >= highest - 0.05)
        shuffled += [rng.choice(STAGES) in stages for _ in range(50)]
        words.append(
            f"layer {at['layer']} head {at['head']}, on the card for {kind}: {head['kinds'].values or 'no kind'} "
            f"({head['stages'].values or 'no stage'}), {value:.2f}, highest {highest:.2f}"
        )
    tags = {stage.replace(" ", "-") for stage in STAGES} <= set(catalog.tags())
    by_chance = sum(shuffled) / len(shuffled)
    holds = tags and all(right) and all(fits for _, fits in placed) and by_chance < 0.5
    measured = (
        "; ".join(words) + f"; of {len(placed)} kinds of heads {sum(fits for _, fits in placed)} are in their stage; "
        f"a stage at random fits in {by_chance:.0%}; {'all four' if tags else 'not all'} stages are tags"
    )
    premises = [
        Premise(
            f"the reader has a head for {kind}",
            f"a score of {SCORES[score].threshold} or more on its card",
            f"{card[score]['score']:.2f}",
            card[score]["score"] >= SCORES[score].threshold,
        )
        for score, kind in KNOWN.items()
    ]

    def draw(figure: Any) -> None:
        for axes, (score, kind) in zip(figure.subplots(1, len(KNOWN)), KNOWN.items()):
            shown = axes.imshow(node[score].transpose("layer", "head"), vmin=0, vmax=1, cmap="Blues")
            axes.plot(card[score]["head"], card[score]["layer"], "s", ms=22, mfc="none", mec="darkorange", mew=2)
            axes.set(title=f"{kind}\n{TAXONOMY[kind].stage}", xlabel="head", ylabel="layer")
            figure.colorbar(shown, ax=axes, label="mean weight", shrink=0.7)
        figure.suptitle("Scores of the reader's heads; framed: the head that its card names")

    return Finding(holds, measured, EXPECTED, seed, premises=premises, draw=draw)
