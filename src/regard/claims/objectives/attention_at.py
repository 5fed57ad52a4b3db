"""Kitada and Iyatomi (arXiv:2009.12064): training on perturbed attention makes it steadier and closer to gradients.

The paper's own architecture: word embeddings, a bidirectional LSTM, one additive attention over words, a linear layer.
The paper chooses the length of perturbations for each data set; here that was done on another seed, where 2 is too far
for AT, and 1 too short for iAT to make it much steadier. On that seed AT came closer to gradients, and iAT did not.

This is the third design. The first had one length for all, far too large. The second had 400 sentences, some with a
wrong label, from which plain training did not learn the task. It also took for granted that plain attention follows
gradients little; how much is no matter of the paper. What decides is closeness to gradients: attention becomes several
times as steady, as the paper says, and comes no closer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import loading
from ...catalog import Finding, Premise
from ...objectives import collect
from ...objectives.attention_at import attention_at, perturbation
from ...seam import intervene
from .._measure import Mean, mean
from .._sentences import Batch, Namer, batches, encoded

SCALES = "small", "large"
STEPS = {"small": 300, "large": 3000}
SIZE, RATE, SENTENCES = 64, 2e-3, 2500
WAYS = {"plain": 0.0, "AT": 1.0, "iAT": 2.0}  # lengths of perturbations in training
JUDGED, TRAININGS = 5.0, 3  # the length that all stand


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """The same model trained three ways, then its attention compared with gradients and perturbed."""
    expected = (
        "with Attention AT, and with iAT: attention and the length of the loss's gradient by word correlate more "
        "(Pearson, a sentence each) than with plain training, by two standard errors over sentences; accuracy is at "
        f"most a point lower; and the worst perturbation of length {JUDGED:g} raises the loss at most half as much as "
        "after plain training"
    )
    _, tokenizer = loading.load("namer")
    alike: dict[str, list[Tensor]] = {way: [] for way in WAYS}
    right: dict[str, list[Tensor]] = {way: [] for way in WAYS}
    risen: dict[str, list[float]] = {way: [] for way in WAYS}
    for run in range(TRAININGS):
        at = TRAININGS * seed + run
        pool = encoded(tokenizer, SENTENCES, seed=at, held=False)
        held = encoded(tokenizer, 700, seed=at, held=True)
        for way, length in WAYS.items():
            model = _train(way, length, pool, len(tokenizer), STEPS[scale], at)
            alike[way].append(_correlations(model, held))
            (plainly, named), (moved, _) = (_judged(model, held, length) for length in (0.0, JUDGED))
            right[way].append(named)
            risen[way].append(float((moved - plainly).mean()))

    def gain(of: dict[str, list[Tensor]], way: str) -> Mean:
        return mean(torch.stack(of[way]).nanmean(0) - torch.stack(of["plain"]).nanmean(0))

    ours = [way for way in WAYS if way != "plain"]
    closer = {way: gain(alike, way) for way in ours}
    steadier = {way: sum(risen[way]) / sum(risen["plain"]) for way in ours}
    holds = all(closer[way].above() and gain(right, way).value >= -0.01 and steadier[way] <= 0.5 for way in ours)
    plain = mean(torch.stack(alike["plain"]).nanmean(0))
    parts = [f"plain: correlation {plain:.3f}, accuracy {mean(torch.stack(right['plain']).mean(0)):.1%}"] + [
        f"{way} (length {WAYS[way]:g}): correlation higher by {closer[way]:.3f}, "
        f"accuracy by {gain(right, way):.1%}, the worst perturbation raises the loss {steadier[way]:.2f} times as much"
        for way in ours
    ]
    named = float(torch.stack(right["plain"]).mean())
    premises = [
        Premise("plain training learns the task", "70% right or more", f"{named:.1%}", named >= 0.7),
    ]

    def draw(figure: Any) -> None:
        left, side = figure.subplots(1, 2)
        left.bar(list(WAYS), [float(torch.stack(alike[way]).nanmean()) for way in WAYS])
        left.set(ylabel="mean Pearson correlation", title="Attention and gradients, by word")
        side.bar(list(WAYS), [sum(risen[way]) / TRAININGS for way in WAYS])
        side.set(ylabel="nats", title=f"What the worst perturbation of length {JUDGED:g} adds to the loss")

    return Finding(holds, "; ".join(parts), expected, seed, premises=premises, draw=draw)


def _train(way: str, length: float, pool: Batch, words: int, steps: int, seed: int) -> Namer:
    torch.manual_seed(seed)
    model = Namer(words)
    optimizer = torch.optim.Adam(model.parameters(), RATE, weight_decay=1e-5, amsgrad=True)
    for batch in batches(pool, SIZE, steps):
        run = partial(model.loss, batch)
        loss = run() if way == "plain" else attention_at(model, run, epsilon=length, interpretable=way == "iAT")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def _judged(model: Namer, held: Batch, length: float) -> tuple[Tensor, Tensor]:
    """Loss and whether the feeling is named, where each sentence's attention is moved to raise its own loss."""
    worst = perturbation(model, lambda: model.loss(held, "sum"), epsilon=length)
    with torch.no_grad(), intervene(model, worst):
        logits = model(held)
    loss = F.cross_entropy(logits, held["labels"], reduction="none")
    return loss, (logits.argmax(-1) == held["labels"]).float()


def _correlations(model: Namer, held: Batch) -> Tensor:
    """Of a word's attention and the length of the loss's gradient by it. [sentence]"""
    mask = held["attention_mask"].bool()
    words = model.embedding(held["input_ids"]).detach().requires_grad_()
    with collect(model, lambda call: call.weights.dense()) as seen:
        loss = F.cross_entropy(model.read(words, mask), held["labels"], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, words)
    pairs = torch.stack([seen[0].value[:, 0, 0].detach(), gradient.norm(dim=-1)])  # [2, sentence, token]
    return torch.stack([torch.corrcoef(pairs[:, i, mask[i]])[0, 1] for i in range(len(mask))])
