"""Claim of Zheng et al., Attention Heads of Large Language Models: A Survey (arXiv:2409.03752), section 4.

Heads that other papers found belong to four stages. Here: the atlas gives the zoo reader's heads, known from its card,
the kind that they have and the stage that the survey gives that kind; and the four stages are tags of the catalog.
"""

from __future__ import annotations

from typing import Any

from ... import catalog, zoo
from ...atlas import SCORES, STAGES, TAXONOMY, atlas
from ...catalog import Finding

KNOWN = {"previous_token": "previous token", "induction": "induction"}  # score on the card: kind
EXPECTED = (
    "the heads that the reader's card names for the previous token and for induction have that kind and its stage, and "
    "the highest such score of all heads; each of the four stages is a tag"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """The atlas puts heads that are known under their kind and stage."""
    card = zoo.measured("reader")
    card = card.get("abilities", card)
    node = atlas(*zoo.load("reader"), seed=seed).tree["language_model"].to_dataset()
    right, words, unsure = [], [], False
    for score, kind in KNOWN.items():
        known, stage = card[score], TAXONOMY[kind].stage
        at = {"layer": known["layer"], "head": known["head"]}
        head, value = node.sel(at), float(node[score].sel(at))
        unsure |= known["score"] < SCORES[score].threshold  # the card itself does not say that it is one
        right.append(
            kind in str(head["kinds"].values).split(", ")
            and stage in str(head["stages"].values).split(", ")
            and value == float(node[score].max())
        )
        kinds, stages = str(head["kinds"].values) or "no kind", str(head["stages"].values) or "no stage"
        words.append(f"layer {at['layer']} head {at['head']}, on the card for {kind}: {kinds} ({stages}), {value:.2f}")
    tags = {stage.replace(" ", "-") for stage in STAGES} <= set(catalog.tags())
    measured = "; ".join(words) + f"; {'all four' if tags else 'not all'} stages are tags."

    def draw(figure: Any) -> None:
        for axes, (score, kind) in zip(figure.subplots(1, len(KNOWN)), KNOWN.items()):
            shown = axes.imshow(node[score].transpose("layer", "head"), vmin=0, vmax=1, cmap="Blues")
            axes.plot(card[score]["head"], card[score]["layer"], "s", ms=22, mfc="none", mec="darkorange", mew=2)
            axes.set(title=f"{kind}\n{TAXONOMY[kind].stage}", xlabel="head", ylabel="layer")
            figure.colorbar(shown, ax=axes, label="mean weight", shrink=0.7)
        figure.suptitle("Scores of the reader's heads; framed: the head that its card names")

    return Finding(None if unsure else tags and all(right), measured, EXPECTED, seed, draw=draw)
