"""Do gates tell planted roles, and what ablation says of the reader's heads?

The planted model solves two tasks with heads of their own, one head hurts, the others do nothing. The reader names the
indirect object: gates are fitted on some prompts, heads ablated on others.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import torch

from ... import zoo
from ...catalog import Finding
from ...circuits.causal_head_gating import ROLES, causal_head_gating
from ...circuits.sixteen_heads import Masked, ablation
from ...data.prompts import ioi
from ...extras import needs
from ...seam import intervene
from .._asked import ask
from .._planted import INDUCTIVE, TELLING, WRONG, planted, questions, repeats

SCALES = "small", "large"
EXPECTED = (
    "all 18 heads of the planted model have their planted role for the induction task; with the question task to be "
    "unlearned, the same heads facilitate, of the question's two heads one at least interferes, and no other. On the "
    "reader's naming of the indirect object, the facilitating score and what ablation costs have a rank correlation of "
    "0.5 or more, a facilitating head costs more on average than an irrelevant one, and the loss without all "
    "interfering heads is not higher than with them"
)
PLANTED = {"steps": 200}
BATCH, BATCHES, OTHERS, STEPS = 8, 16, 4, {"small": 120, "large": 500}  # batches, and for ablation


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Roles by gates, against what was planted and against ablation."""
    with needs("this claim", "claims"):
        from scipy.stats import spearmanr

    hand_made = planted(seed=seed)
    task, other = repeats(32, seed=seed), questions(32, seed=seed)
    plain = causal_head_gating(hand_made, task.losses, seed=seed, **PLANTED)
    contrast = causal_head_gating(hand_made, task.losses, forget=other.losses, seed=seed, **PLANTED)
    right = sum(_role(plain, head) == role for head, role in _truth({WRONG}).items())
    # A head that answers wrong helps to unlearn, and one of the question's two heads shut is enough.
    told = {head: _role(contrast, head) for head in _truth(set()) if head not in {WRONG, *TELLING}}
    apart = sum(_truth(set())[head] == role for head, role in told.items())
    shut = sum(_role(contrast, head) == "interfering" for head in TELLING)

    model, tokenizer = zoo.load("reader")
    drawn = ioi(BATCH * (BATCHES + OTHERS), seed=seed)
    batches = [ask(drawn[i : i + BATCH], tokenizer) for i in range(0, BATCH * BATCHES, BATCH)]
    turns = cycle(batches)
    found = causal_head_gating(model, lambda model: next(turns).losses(model), steps=STEPS[scale], seed=seed)
    unseen = ask(drawn[BATCH * BATCHES :], tokenizer)
    costs = ablation(model, unseen.losses)
    cost, score, role = (x.values.ravel() for x in (costs["without"], found["facilitating"], found["role"]))
    rank = float(spearmanr(score, cost)[0])
    mean = {name: float(cost[role == name].mean()) if (role == name).any() else np.nan for name in ROLES}
    hurts = [(int(a), int(b)) for a, b in np.argwhere(found["role"].values == "interfering")]
    with torch.no_grad(), intervene(model, Masked(hurts)):
        less = float(unseen.losses(model).mean())

    planted_right = right == 18 and apart == len(told) and shut > 0
    agrees = rank >= 0.5 and mean["facilitating"] > mean["irrelevant"] and less <= costs.attrs["loss"]
    counts = ", ".join(f"{int((role == name).sum())} {name}" for name in ROLES)
    measured = (
        f"{right} of 18 planted roles told, {apart} of {len(told)} in the contrast, where {shut} of the "
        f"question's 2 heads interfere; the reader has {counts} heads, rank "
        f"correlation with ablation {rank:.2f}, mean cost of a facilitating head {mean['facilitating']:.4f} nats, of "
        f"an irrelevant one {mean['irrelevant']:.4f}; loss {costs.attrs['loss']:.4f}, without all interfering heads "
        f"{less:.4f}"
    )

    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3, width_ratios=(2, 2, 3))
        for axes, one, title in ((left, plain, "Planted: induction"), (middle, contrast, "and not the question")):
            shown = np.stack([1 - one[role] for role in ("facilitating", "interfering")], -1)
            picture = np.concatenate([shown, shown.min(-1, keepdims=True)], -1)  # green helps, red hurts
            axes.imshow(picture.clip(0, 1))
            for name, heads in (("task", INDUCTIVE), ("wrong", (WRONG,)), ("asked", TELLING)):
                for layer, head in heads:
                    axes.text(head, layer, name, ha="center", va="center", fontsize=6)
            axes.set(xlabel="head", title=title, yticks=range(3))
        left.set_ylabel("layer")
        for name, colour in zip(ROLES, ("tab:green", "tab:red", "tab:grey")):
            right.scatter(score[role == name], cost[role == name], c=colour, label=name, s=18)
        right.set(xlabel="facilitating score", ylabel="cost of ablation, nats", title="The reader's 48 heads")
        right.set_yscale("symlog", linthresh=1e-3)
        right.legend(fontsize=8)

    return Finding(planted_right and agrees, measured, EXPECTED, seed, draw=draw)


def _truth(hurting: set[tuple[int, int]]) -> dict[tuple[int, int], str]:
    heads = {(layer, head): "irrelevant" for layer in range(3) for head in range(6)}
    return heads | dict.fromkeys(INDUCTIVE, "facilitating") | dict.fromkeys(hurting, "interfering")


def _role(found: Any, head: tuple[int, int]) -> str:
    return str(found["role"].sel(layer=head[0], head=head[1]).values)
