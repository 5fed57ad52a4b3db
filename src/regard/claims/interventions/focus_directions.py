"""The zoo's reader: contextual heads, learned directions, and passages of random tokens read back from many.

On Zhu et al., Focus Directions Make Your Language Models Pay More Attention to Relevant Contexts (arXiv:2503.23306). A
prompt is ten passages of 20 random tokens; then four tokens of one of them come again, and the eight that follow them
are to be told. The relevant context is that passage. Directions are learned on other prompts, in as many heads as the
paper's 20 of 672 would be (at least four), ten times through all prompts as the authors run it, and in fewer steps at a
higher rate, so that a number can move as far. Control: random directions of the same lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...catalog import Finding, Premise
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
from .._passages import Retold, retold, told
from .._shown import Gain, paired

SCALES = "small", "large"
BATCH = 8
BATCHES = {"small": (12, 24), "large": (60, 120)}  # to learn from, and to judge on
HEADS, EPOCHS = 4, 10
REACH = 66.0  # steps times rate, as of the authors' ten epochs of 6,600 prompts at 0.001
STRENGTHS = (0.0, STRENGTH, 0.5, 1.0)
EXPECTED = (
    f"at the paper's strength of {STRENGTH}, the chosen heads give the relevant passage more of their attention, and "
    "more of the tokens are told rightly, than plainly and than with random directions of the same lengths, each by "
    "two standard errors over prompts that directions were not learned from"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Directions learned elsewhere draw attention to what is relevant, and more is told rightly."""
    model, tokenizer = load("reader")
    learning, judging = (
        [retold(model, tokenizer.bos_token_id, batch=BATCH, seed=1000 * (2 * seed + part) + i) for i in range(n)]
        for part, n in enumerate(BATCHES[scale])
    )
    shown = [Example({"input_ids": p.ids}, p.relevant, p.answer) for p in learning]
    heads = contextual_heads(model, shown, n=HEADS)
    learned = learn_directions(model, shown, heads, epochs=EPOCHS, rate=REACH / (EPOCHS * len(shown)), seed=seed)
    draw = torch.Generator().manual_seed(seed)
    random = {
        pair: nn.functional.normalize(torch.randn(d.shape, generator=draw), dim=0) * d.norm()
        for pair, d in learned.items()
    }
    found = {}
    for name, directions, strength in (
        *((f"{s:g}", learned, s) for s in STRENGTHS),
        ("random", random, STRENGTH),
    ):
        with intervene(model, focus_directions(directions=directions, strength=strength)):
            found[name] = _on_relevant(model, judging, heads), torch.cat([told(model, p) for p in judging])
    paper = f"{STRENGTH:g}"
    gains: dict[str, list[Gain]] = {
        other: [paired(a, b) for a, b in zip(found[paper], found[other])] for other in ("0", "random")
    }
    plain, focused = ([float(part.mean()) for part in found[name]] for name in ("0", paper))
    others = sum(float(p.relevant.float().sum(1).mean() / p.ids.shape[1]) for p in judging) / len(judging)
    premise = Premise(
        "heads read what is relevant, and there is more to tell: weight on the passage, tokens told rightly",
        "twice its share of the prompt; 95% or less",
        f"{plain[0]:.1%} of {others:.1%}; {plain[1]:.1%}",
        plain[0] >= 2 * others and plain[1] <= 0.95,
    )
    measured = (
        f"Contextual heads: {', '.join(f'layer {layer} head {head}' for layer, head in heads)}. On "
        f"{BATCH * len(judging)} prompts they give the relevant passage {plain[0]:.1%} of their attention, with "
        f"directions {focused[0]:.1%} ({gains['0'][0]}; over random ones {gains['random'][0]}); of the tokens "
        f"{plain[1]:.1%} are told rightly, with directions {focused[1]:.1%} ({gains['0'][1]}; over random ones "
        f"{gains['random'][1]}). At strengths of "
        + ", ".join(f"{s:g} {found[f'{s:g}'][0].mean():.1%} and {found[f'{s:g}'][1].mean():.1%}" for s in STRENGTHS[2:])
        + "."
    )
    holds = all(gain.sure() for some in gains.values() for gain in some)
    shares = [[float(part.mean()) for part in found[f"{s:g}"]] for s in STRENGTHS]
    return Finding(holds, measured, EXPECTED, seed, premises=[premise], draw=partial(_draw, shares))


def _draw(shares: Sequence[Sequence[float]], figure: Any) -> None:
    labels = ("Weight on the relevant passage", "Tokens told rightly")
    for part, (each, label) in enumerate(zip(figure.subplots(1, 2), labels)):
        each.plot(STRENGTHS, [some[part] for some in shares], "o-", color=("C2", "C0")[part])
        each.axvline(STRENGTH, color="grey", linewidth=0.8, linestyle=":")
        each.set(xlabel="strength (dotted: the paper's)", title=label, ylim=(0, 1))


@torch.no_grad()
def _on_relevant(model: nn.Module, prompts: Sequence[Retold], heads: Sequence[tuple[int, int]]) -> Tensor:
    """Mean weight of the heads' queries in the answers on the relevant passage, 0 to 1. [prompt]"""
    found = []
    for prompt in prompts:
        on: list[Tensor] = []

        @statistic("batch head", title="Weight on what is relevant")
        def read(call: Any, prompt: Retold = prompt, on: list[Tensor] = on) -> Any:  # nothing is recorded
            own = [head for layer, head in heads if layer == call.site.layer]
            if own:
                mass = call.weights.mass(prompt.relevant)[:, own]  # [batch, head, query]
                answers = prompt.answer.to(mass)[:, None]
                on.append((mass * answers).sum(2) / answers.sum(2))

        with record(model, read):
            model(prompt.ids)
        found.append(torch.cat(on, 1).mean(1))
    return torch.cat(found)
