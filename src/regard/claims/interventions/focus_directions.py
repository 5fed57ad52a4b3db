"""The zoo's reader: contextual heads, learned directions, and passages of random tokens read back from many.

On Zhu et al., Focus Directions Make Your Language Models Pay More Attention to Relevant Contexts (arXiv:2503.23306). A
prompt is ten passages of 20 random tokens; then four tokens of one of them come again, and the eight that follow them
are to be told. The relevant context is that passage. Directions are learned on other prompts, in as many heads as the
paper's 20 of 672 would be (at least four), and in fewer steps at a higher rate, so that a number can move as far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...catalog import Finding
from ...interventions.focus_directions import (
    STRENGTH,
    Example,
    contextual_heads,
    focus_directions,
    learn_directions,
)
from ...loading import load
from ...recording import statistic
from ...seam import intervene, record
from .._passages import retold, rightly

BATCH = 8
BATCHES = {"small": (12, 12), "large": (60, 120)}  # to learn from, and to judge on
HEADS, EPOCHS = 4, 3
REACH = 20.0  # steps times rate: about that of the paper
STRENGTHS = (0.0, STRENGTH, 0.5, 1.0)
EXPECTED = (
    f"at the paper's strength of {STRENGTH}, the chosen heads give the relevant passage at least a tenth more of their "
    "attention than plainly, and at least 0.02 more of the tokens are told rightly, on prompts that directions were "
    "not learned from"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Directions learned elsewhere draw attention to what is relevant, and more is told rightly."""
    model, tokenizer = load("reader")
    learning, judging = (
        [retold(model, tokenizer.bos_token_id, batch=BATCH, seed=1000 * (2 * seed + part) + i) for i in range(n)]
        for part, n in enumerate(BATCHES[scale])
    )
    shown, asked = ([Example({"input_ids": p.ids}, p.relevant, p.answer) for p in some] for some in (learning, judging))
    heads = contextual_heads(model, shown, n=HEADS)
    directions = learn_directions(model, shown, heads, epochs=EPOCHS, rate=REACH / (EPOCHS * len(learning)), seed=seed)
    found = {}
    for strength in STRENGTHS:
        with intervene(model, focus_directions(directions=directions, strength=strength)):
            found[strength] = _on_relevant(model, asked, heads), rightly(model, judging)
    (plain, right), (focused, better) = found[0.0], found[STRENGTH]
    holds = focused >= 1.1 * plain and better >= right + 0.02
    named = ", ".join(f"layer {layer} head {head}" for layer, head in heads)
    measured = (
        f"Contextual heads: {named}. On {BATCH * len(judging)} prompts they give the relevant passage {plain:.1%} of "
        f"their attention, with directions {focused:.1%}; of the tokens {right:.1%} are told rightly, with "
        f"directions {better:.1%}. At strengths of "
        + ", ".join(f"{s:g} {found[s][0]:.1%} and {found[s][1]:.1%}" for s in STRENGTHS[2:])
        + "."
    )

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 2)
        labels = ("Weight on the relevant passage", "Tokens told rightly")
        for part, (each, label) in enumerate(zip(axes, labels)):
            each.plot(STRENGTHS, [found[s][part] for s in STRENGTHS], "o-", color=("C2", "C0")[part])
            each.axvline(STRENGTH, color="grey", linewidth=0.8, linestyle=":")
            each.set(xlabel="strength (dotted: the paper's)", title=label, ylim=(0, 1))

    return Finding(holds, measured, EXPECTED, seed, draw=draw)


@torch.no_grad()
def _on_relevant(model: nn.Module, examples: list[Example], heads: list[tuple[int, int]]) -> float:
    """Mean weight of the heads' queries in the answers on the relevant passage, 0 to 1."""
    on: list[Tensor] = []
    for example in examples:

        @statistic("batch head", title="Weight on what is relevant")
        def read(call: Any, example: Example = example) -> Any:  # nothing is recorded
            own = [head for layer, head in heads if layer == call.site.layer]
            if own:
                mass = call.weights.mass(example.relevant)[:, own]
                on.extend(mass.transpose(1, 2)[example.answer].mean(0))

        with record(model, read):
            model(**example.inputs)
    return float(torch.stack(on).mean())
