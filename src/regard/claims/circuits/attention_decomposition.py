"""Are planted paths traced with few vectors, and is the reader's induction head told by its previous-token head?

The planted model: a mover is told by an induction head what to look for, which is told by a previous-token head where.
The reader: its card names an induction head and a previous-token head; random tokens repeat, and the trace starts at
the last of them. The signal is then taken out of the stream, as the paper does, or a random one of its norm.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ... import zoo
from ...call import Call
from ...catalog import Finding
from ...circuits.attention_decomposition import Decomposition, Signal, attention_decomposition
from ...seam import intervene
from .._planted import INDUCTION, MOVER, PREVIOUS, planted, repeats

SCALES = "small", "large"
EXPECTED = (
    "in every planted row the trace from the mover is the planted path and nothing else, with at most 2 of 16 vectors "
    "a step for 0.9 of the score; in the reader's repeats, 9 of 10 traces from the induction head where it fires reach "
    "the previous-token head at the key, firings use at most a quarter of the vectors (median) for 0.9 of the score, "
    "and without the signal the weight falls below half, without a random one of the same norm it does not"
)
ROWS = {"small": 12, "large": 100}
SEGMENT = 12  # random tokens, then the same again


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Trace planted paths, then the reader's induction."""
    hand_made, task = planted(seed=seed), repeats(ROWS[scale], seed=seed)
    path = {(MOVER, "query", INDUCTION), (INDUCTION, "key", PREVIOUS)}
    exact, used = 0, []
    for row in task.ids:
        found = _taken_apart(hand_made, row[None])
        signals = found.trace(*MOVER, len(row) - 1)
        exact += {(s.to, s.side, s.by) for s in signals} == path and len(signals) == len(path)
        used += [_chosen(found, s.to, s.query, s.key) for s in signals]

    model, tokenizer = zoo.load("reader")
    named = zoo.measured("reader")["abilities"]
    head, told_by = ((named[kind]["layer"], named[kind]["head"]) for kind in ("induction", "previous_token"))
    generator = torch.Generator().manual_seed(seed)
    reached, starts, vectors, kept, random_kept, example = 0, 0, [], [], [], None
    for _ in range(ROWS[scale]):
        segment = 300 + torch.randperm(1500, generator=generator)[:SEGMENT]
        ids = torch.cat([torch.tensor([tokenizer.bos_token_id]), segment, segment])[None]
        found = _taken_apart(model, ids)
        for query in range(SEGMENT + 2, 2 * SEGMENT + 1):
            key = query - SEGMENT + 1
            if key not in found.fires(*head, query):
                continue
            starts += 1
            vectors.append(_chosen(found, head, query, key))
            signals = [s for s in found.trace(*head, query) if (s.to, s.key, s.side) == (head, key, "key")]
            told = next((s for s in signals if s.by == told_by), None)
            reached += told is not None
            if told is None or len(kept) >= ROWS[scale]:
                continue
            example = example or (found, told)
            signal = found.signal(told)
            noise = torch.randn(signal.shape, generator=generator)
            for where, lost in ((kept, signal), (random_kept, noise * signal.norm() / noise.norm())):
                where.append(
                    _weight(model, ids, told, lost) / float(found.layers[head[0]].weights[head[1], query, key])
                )

    dim = model.config.head_dim
    traced = starts > 0 and reached >= 0.9 * starts
    causal = bool(kept) and median(kept) < 0.5 <= median(random_kept)
    holds = (
        exact == len(task.ids)
        and max(used, default=99) <= 2
        and traced
        and median(vectors or [dim]) <= dim / 4
        and causal
    )
    measured = (
        f"{exact} of {len(task.ids)} planted paths traced exactly, at most {max(used, default=0)} of 16 vectors a "
        f"step; in the reader layer {head[0]} head {head[1]} fires {starts} times, {reached} traces reach layer "
        f"{told_by[0]} head {told_by[1]}; a firing takes {median(vectors or [dim])} of {dim} vectors (median); without "
        f"the signal {median(kept or [1.0]):.2f} of the weight is left, without a random one "
        f"{median(random_kept or [1.0]):.2f}"
    )

    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3)
        left.hist(vectors, bins=range(dim + 2))
        left.set(xlabel=f"vectors of {dim} for 0.9 of a score", ylabel="firings", title="The reader's induction head")
        if example is not None:
            found, told = example
            given = found.contributions(*told.to, told.query, told.key)
            middle.bar(range(given.sizes["head"]), given["by_key"].sel(layer=told_by[0]) / given.attrs["score"])
            middle.set(xlabel=f"head of layer {told_by[0]}", ylabel="share of the score", title="Who told it where")
            middle.set_xticks(range(given.sizes["head"]))
        right.boxplot([kept, random_kept], tick_labels=["the signal", "a random one"])
        right.set(ylabel="weight that is left without", title="Taken out of the stream", ylim=(0, None))

    return Finding(holds, measured, EXPECTED, seed, draw=draw)


def _taken_apart(model: nn.Module, ids: Tensor) -> Decomposition:
    return attention_decomposition(model, lambda model: model(ids))


def _chosen(found: Decomposition, head: tuple[int, int], query: int, key: int) -> int:
    return int(found.vectors(*head, query, key, share=0.9)["chosen"].sum())


@torch.no_grad()
def _weight(model: nn.Module, ids: Tensor, told: Signal, lost: Tensor) -> float:
    """The weight of the pair where the stream at its key, after the earlier head's layer, lacks this."""

    class Without:
        weight = float("nan")

        def hidden(self, site: Any, hidden: Tensor) -> Tensor:
            if site.layer != told.by[0]:
                return hidden
            hidden = hidden.clone()
            hidden[:, told.key] -= lost
            return hidden

        def inputs(self, call: Call) -> Call:
            if call.site.layer == told.to[0]:
                self.weight = float(call.weights.dense()[0, told.to[1], told.query, told.key])
            return call

    without = Without()
    with intervene(model, without):
        model(ids)
    return without.weight
