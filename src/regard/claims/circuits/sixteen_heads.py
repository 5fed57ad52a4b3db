"""How many of the reader's heads can go at no loss, and is what is left faster?

Heads go greedily, by their importance for a task on some prompts; what that costs is seen on others. Three tasks each
for itself, as the paper prunes for each data set. In the planted model the truth is known.
"""

from __future__ import annotations

from typing import Any

import torch

from ... import zoo
from ...catalog import Finding
from ...circuits.sixteen_heads import Masked, gone, greedy, prune, sixteen_heads
from ...data import prompts
from ...seam import intervene
from .._asked import Asked, ask
from .._measure import seconds
from .._planted import INDUCTIVE, WRONG, planted, repeats

SCALES = "small", "large"
EXPECTED = (
    "for each of three tasks at least half of the reader's 48 heads go before it is right on 0.02 fewer of other "
    "prompts; without that half, cut out of its matrices, it gives what it gives with them masked, and takes at most "
    "0.95 of the time; in the planted model the heads that are least important are those that do nothing"
)
TASKS = {"ioi": prompts.ioi, "greater_than": prompts.greater_than, "docstring": prompts.docstring}
PROMPTS = {"small": 64, "large": 512}
LENGTH, ROWS, BY = 512, 4, 1 / 12  # tokens and rows that are timed; share of the heads that go at a time


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Prune for each task, then time what is left."""
    model, tokenizer = zoo.load("reader")
    n = PROMPTS[scale]
    curves, free = {}, {}
    for name, task in TASKS.items():
        drawn = task(2 * n, seed=seed)
        known, other = ask(drawn[:n], tokenizer), ask(drawn[n:], tokenizer)
        found = greedy(model, known.losses, by=BY)
        rights = [_right(model, other, gone(found, step)) for step in range(len(found["step"]))]
        shares = found["gone"].values / 48
        fine = [share for share, right in zip(shares, rights) if right >= rights[0] - 0.02]
        curves[name], free[name] = (shares, rights), max(fine)
        if name == "ioi":
            half = gone(found, int((shares <= 0.5).sum()) - 1)

    text = torch.randint(3, len(tokenizer), (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    pruned = prune(model, half, lambda model: model(text).logits)  # raises where it is not the masked model

    def run(which: Any) -> None:
        with torch.no_grad():
            which(text)

    whole, less = seconds(lambda: run(model), lambda: run(pruned), least=5)
    fewer = 1 - sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in model.parameters())

    hand_made = sixteen_heads(planted(seed=seed), repeats(64, seed=seed).losses, normalise=False)
    ranked = hand_made.stack(at=("layer", "head"))
    matter = set(ranked.sortby(ranked)["at"].values[-4:])
    holds = min(free.values()) >= 0.5 and less <= 0.95 * whole and matter == {*INDUCTIVE, WRONG}
    shares = ", ".join(f"{share:.0%} for {name}" for name, share in free.items())
    told = "those" if matter == {*INDUCTIVE, WRONG} else "not those"
    measured = (
        f"heads that go before it is right on 0.02 fewer: {shares}; with {len(half)} of 48 heads cut out "
        f"({fewer:.0%} of all weights), a pass over {ROWS} rows of {LENGTH} tokens takes {less / whole:.2f} of the "
        f"time; in the planted model the four most important heads are {told} that do something"
    )

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        for name, (shares, rights) in curves.items():
            left.plot(shares, rights, "o-", label=name.replace("_", "-"))
        left.axvline(0.5, color="grey", linewidth=0.8)
        left.set(xlabel="share of the reader's heads that are gone", ylabel="share of other prompts right")
        left.legend()
        picture = right.imshow(hand_made, cmap="viridis")
        for layer, head in INDUCTIVE:
            right.text(head, layer, "task", ha="center", va="center", color="black", fontsize=8)
        right.text(WRONG[1], WRONG[0], "wrong", ha="center", va="center", color="white", fontsize=8)
        right.set(xlabel="head", ylabel="layer", title="The planted model", yticks=range(3))
        figure.colorbar(picture, ax=right, label="|d loss / d gate|", shrink=0.6)

    return Finding(holds, measured, EXPECTED, seed, draw=draw)


def _right(model: Any, asked: Asked, heads: list[tuple[int, int]]) -> float:
    """How often the model is right without these heads."""
    with intervene(model, Masked(heads)):
        return asked.right(model)
