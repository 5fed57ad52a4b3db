"""Do gates tell planted roles, and what ablation says of the reader's heads?

The planted model solves two tasks with heads of their own, one head hurts, the others do nothing. The reader names the
indirect object: gates are fitted on some prompts, heads ablated on others. Most heads of the reader do nothing there,
so that ranks among all of them are ranks of noise; what is asked is whether those that matter stand out. What goes
without the interfering heads is reported: there may be none. An earlier design counted every cost above two standard
errors, however small.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import zoo
from ...catalog import Finding, Premise
from ...circuits.causal_head_gating import ROLES, causal_head_gating
from ...circuits.sixteen_heads import Masked
from ...data.prompts import ioi
from ...extras import needs
from ...seam import intervene
from .._asked import Asked, ask
from .._measure import Mean, mean
from .._planted import INDUCTIVE, TELLING, WRONG, planted, questions, repeats

SCALES = "small", "large"
EXPECTED = (
    "all 18 heads of the planted model have their planted role for the induction task; with the question task to be "
    "unlearned, the same heads facilitate, of the question's two heads one at least interferes, and no other. On the "
    "reader's naming of the indirect object, heads whose ablation costs two standard errors and 1% of the costliest or "
    "more have a higher "
    "facilitating score than the others: area under the ROC curve 0.8 or more, and above that of shuffled scores by "
    "two standard errors; a facilitating head costs more on average than an irrelevant one, by two standard errors"
)
PLANTED, SHUFFLES = {"steps": 200}, 200
BATCH, BATCHES, OTHERS, STEPS = 8, 16, 4, {"small": 120, "large": 500}  # batches, and for ablation


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Roles by gates, against what was planted and against ablation."""
    with needs("this claim", "claims"):
        from sklearn.metrics import roc_auc_score

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
    with torch.no_grad():
        whole = unseen.losses(model)
    costs = {at: mean(_without(model, unseen, [at]) - whole) for at in np.ndindex(found["facilitating"].shape)}
    score, role = (found[name].values.ravel() for name in ("facilitating", "role"))
    cost = np.array([each.value for each in costs.values()])
    matter = np.array([each.above() for each in costs.values()]) & (cost >= 0.01 * cost.max())
    rng = np.random.default_rng(seed)
    area, chance = np.nan, np.array([0.5])
    if 0 < matter.sum() < len(matter):
        area = float(roc_auc_score(matter, score))
        chance = np.array([roc_auc_score(matter, rng.permutation(score)) for _ in range(SHUFFLES)])
    groups = {name: [at for at, of in zip(costs, role) if of == name] for name in ROLES}
    of_group = {
        name: mean(torch.stack([_without(model, unseen, [at]) - whole for at in heads]).mean(0)) if heads else None
        for name, heads in groups.items()
    }
    facilitating, irrelevant = of_group["facilitating"], of_group["irrelevant"]
    less = float(_without(model, unseen, groups["interfering"]).mean())

    planted_right = right == 18 and apart == len(told) and shut > 0
    agrees = area >= 0.8 and Mean(area, float(chance.std())).above(chance.mean())
    more = facilitating is not None and irrelevant is not None and facilitating.above(irrelevant.value)
    counts = ", ".join(f"{len(groups[name])} {name}" for name in ROLES)
    measured = (
        f"{right} of 18 planted roles told, {apart} of {len(told)} in the contrast, where {shut} of the question's 2 "
        f"heads interfere; the reader has {counts} heads; {matter.sum()} matter, told from "
        f"the others by the facilitating score with an area of {area:.2f} (shuffled {chance.mean():.2f} ± "
        f"{chance.std():.2f}); cost of a facilitating head {facilitating or Mean(np.nan, np.nan):.4f} nats, of an "
        f"irrelevant one {irrelevant or Mean(np.nan, np.nan):.4f}; loss {float(whole.mean()):.4f}, without all "
        f"interfering heads {less:.4f}"
    )
    enough = Premise(
        "some of the reader's heads matter for the task, some do not",
        "3 to 24 of 48 cost two standard errors and 1% of the costliest",
        str(matter.sum()),
        3 <= matter.sum() <= 24,
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

    return Finding(planted_right and agrees and more, measured, EXPECTED, seed, premises=[enough], draw=draw)


@torch.no_grad()
def _without(model: nn.Module, asked: Asked, heads: Sequence[tuple[int, ...]]) -> Tensor:
    """Loss without these heads, nats. [prompt]"""
    with intervene(model, Masked([(layer, head) for layer, head in heads])):
        return asked.losses(model)


def _truth(hurting: set[tuple[int, int]]) -> dict[tuple[int, int], str]:
    heads = {(layer, head): "irrelevant" for layer in range(3) for head in range(6)}
    return heads | dict.fromkeys(INDUCTIVE, "facilitating") | dict.fromkeys(hurting, "interfering")


def _role(found: Any, head: tuple[int, int]) -> str:
    return str(found["role"].sel(layer=head[0], head=head[1]).values)
