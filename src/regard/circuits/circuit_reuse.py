"""The heads of a task, by path patching from the answer backwards, and how many of them two tasks share.

Merullo, Eickhoff and Pavlick, Circuit Component Reuse Across Tasks in Transformer Language Models (arXiv:2310.08744),
with the rules of their code at jmerullo/circuit_reuse. Path patching (section 2; after Wang et al., Interpretability in
the Wild, arXiv:2211.00593): a sender gives what it gives on the corrupted prompt, all other heads at the token are held
to the clean run; what receivers are then given is put, alone, into another clean run. `circuit_reuse` follows paths
backwards: heads that change the answer directly, heads that change where these look, heads that change what those are
given. `overlap` is how many heads two circuits share (section 4), `look_at` the repair (section 5): heads of the first
task's circuit are made to look at the words that are not the answer.

Ours: a head is of a circuit from an effect of 2% on, as close as we could make out; the repair's code is not in the
repository. Receivers take the query in the second round and the value in the third, all tokens at the last only, as in
the code. A receiver of the whole output is noted before it is held; their code notes it afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ..call import Call
from ._gates import Head
from ._patching import Component, Contrast, Inputs, Receiver, Score

__all__ = ["Overlap", "Receiver", "circuit_reuse", "head_patching", "look_at", "overlap", "path_patching"]

_ROUNDS: tuple[Component, ...] = ("residual", "query", "value")


def path_patching(
    model: nn.Module,
    clean: Inputs,
    corrupted: Inputs,
    score: Score,
    *,
    receivers: Iterable[tuple[int, int | None]] | None = None,
    component: Component = "residual",
    token: int | Tensor | None = -1,
    freeze_mlps: bool = False,
    stack: str | None = None,
    at_once: int = 16,
) -> xr.DataArray:
    """How much of what a corruption does each head does through the receivers, 0 none, 1 all, of either sign.
    [layer, head]

    clean, corrupted: inputs of the model, of as many rows and tokens. score: of logits [batch, token, vocabulary], for
    each row [batch]; effects are of its mean. receivers: (layer, head), whose `component` is patched, or (layer, None)
    for what the layer gives on, "residual"; the last layer's where none are named, which is the direct effect. token:
    at which all is patched, one for all or [batch]; None patches all tokens. freeze_mlps: feed-forward modules too are
    held there; those after the receivers are not. at_once: senders in a pass. Keys and values that heads share are
    changed for all that share them.

    Senders in layers after the first receiver's, and receivers themselves, have 0. Raises ValueError where both
    prompts have the same score.

    >>> import torch
    >>> from regard.claims._planted import planted, questions
    >>> task, other = questions(8), questions(8, seed=1)
    >>> def score(logits):
    ...     return logits[:, -1].gather(1, task.answers[:, None])[:, 0] - logits[:, -1].mean(-1)
    >>> found = path_patching(planted(), {"input_ids": task.ids}, {"input_ids": other.ids}, score)
    >>> [int(found.argmax(...)[axis]) for axis in ("layer", "head")]  # what makes the first word the answer
    [2, 4]
    """
    contrast = Contrast(model, clean, corrupted, score, stack=stack)
    chosen = [Receiver(*one) for one in receivers] if receivers is not None else [Receiver(max(contrast.sites))]
    _check(contrast, chosen, component)
    return contrast.paths(chosen, component, token, freeze_mlps=freeze_mlps, at_once=at_once)


def head_patching(
    model: nn.Module,
    clean: Inputs,
    corrupted: Inputs,
    score: Score,
    *,
    by_token: bool = False,
    stack: str | None = None,
    at_once: int = 16,
) -> xr.DataArray:
    """How much of what a corruption does each head does by all paths, 0 none, 1 all, of either sign. [layer, head]

    Its output on the corrupted prompt takes the place of that on the clean one, at all tokens together or, `by_token`,
    at each by itself, [layer, head, token]. The arguments are those of `path_patching`.
    """
    contrast = Contrast(model, clean, corrupted, score, stack=stack)
    return contrast.by_token(at_once=at_once) if by_token else contrast.by_head(at_once=at_once)


def circuit_reuse(
    model: nn.Module,
    clean: Inputs,
    corrupted: Inputs,
    score: Score,
    *,
    threshold: float = 0.02,
    rounds: int = 3,
    token: int | Tensor | None = -1,
    stack: str | None = None,
    at_once: int = 16,
) -> xr.Dataset:
    """The circuit of a task, and the effect by which each of its heads was found. [layer, head]

    `effect`: of the size that is largest over rounds, of either sign; `round`: in which a head first had `threshold`, 0
    for direct effects on the answer, 1 on the queries of these heads, 2 on the values of those; NaN for heads that are
    not of the circuit. The other arguments are those of `path_patching`; circuits of two tasks meet in `overlap`.

    >>> from regard.claims._planted import planted, questions
    >>> task, other = questions(8), questions(8, seed=1)
    >>> def score(logits):
    ...     return logits[:, -1].gather(1, task.answers[:, None])[:, 0] - logits[:, -1].mean(-1)
    >>> found = circuit_reuse(planted(), {"input_ids": task.ids}, {"input_ids": other.ids}, score)
    >>> int(found["round"].sel(layer=1, head=5))  # gives the other what to copy
    2
    """
    if not 0 < rounds <= len(_ROUNDS):
        raise ValueError(f"there are 1 to {len(_ROUNDS)} rounds, got {rounds}")
    contrast = Contrast(model, clean, corrupted, score, stack=stack)
    receivers = [Receiver(max(contrast.sites))]
    effect: xr.DataArray | None = None
    joined: dict[Head, int] = {}
    for number, component in enumerate(_ROUNDS[:rounds]):
        told = contrast.paths(receivers, component, token, at_once=at_once) if receivers else None
        if told is not None:
            effect = told if effect is None else effect.where(abs(effect) >= abs(told), told)
            for head in contrast.heads:
                if abs(float(told.sel(layer=head[0], head=head[1]))) >= threshold:
                    joined.setdefault(head, number)
        # values are looked for of all heads found so far, since a head may be given what to copy at any point
        receivers = [Receiver(*head) for head, at in joined.items() if number or at == number]
    assert effect is not None
    rounds_of = xr.full_like(effect, np.nan, dtype=float)
    for (layer, head), number in joined.items():
        rounds_of.loc[{"layer": layer, "head": head}] = number
    return xr.Dataset({"effect": effect, "round": rounds_of}, attrs={"stack": contrast.stack, "threshold": threshold})


class Overlap(NamedTuple):
    """Heads that two circuits share: of those in either, and of the smaller one's. 0 to 1; NaN where one is empty."""

    shared: list[Head]
    jaccard: float
    of_smaller: float


def overlap(one: xr.Dataset, other: xr.Dataset) -> Overlap:
    """How many heads two circuits of `circuit_reuse` share; the paper's 78% is of the heads in one of them."""
    first, second = (
        {(int(d["layer"][i]), int(d["head"][j])) for i, j in np.argwhere(d["round"].notnull().values)}
        for d in (one, other)
    )
    shared = sorted(first & second)
    if not first or not second:
        return Overlap(shared, float("nan"), float("nan"))
    return Overlap(shared, len(shared) / len(first | second), len(shared) / min(len(first), len(second)))


class look_at:
    """An intervention: these (layer, head) look from one token at these tokens alone, evenly or by `shares`.

    tokens: [batch, k]. query: from which, an index from the end where negative, or [batch]. shares: [k], together 1.
    Raises ValueError where a token is not there, or is not yet there to be looked at.
    """

    def __init__(
        self,
        heads: Sequence[Head],
        tokens: Tensor,
        *,
        query: int | Tensor = -1,
        shares: Tensor | None = None,
        stack: str | None = None,
    ) -> None:
        if not heads:
            raise ValueError("no heads are named, so nothing would change")
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens are indices [batch, k], got {list(tokens.shape)} of {tokens.dtype}")
        k = tokens.shape[1]
        shares = torch.full((k,), 1 / k) if shares is None else shares
        if shares.shape != (k,) or abs(float(shares.sum()) - 1) > 1e-5 or (shares < 0).any():
            raise ValueError(f"shares are {k} numbers of 0 or more that make 1, got {shares.tolist()}")
        self.heads, self.tokens, self.query, self.shares, self.stack = list(heads), tokens, query, shares, stack

    def begin(self, model: nn.Module) -> None:
        from ..sites import find

        stacks = {site.stack for site in find(model).values()}
        if self.stack is None and len(stacks) != 1:
            raise ValueError(f"say stack=, one of {', '.join(sorted(stacks))}")
        known = {site.layer for site in find(model).values() if self.stack in (None, site.stack)}
        if absent := sorted({layer for layer, _ in self.heads} - known):
            raise ValueError(f"there are no heads in layers {absent}; there are layers {sorted(known)}")

    def where(self, call: Call) -> bool:
        return self.stack in (None, call.site.stack) and any(layer == call.site.layer for layer, _ in self.heads)

    def weights(self, call: Call, weights: Tensor, rows: range) -> Tensor:
        batch, n_heads, _, n_keys = weights.shape
        n_queries = call.query.shape[2]
        if len(self.tokens) != batch:
            raise ValueError(f"tokens are given for {len(self.tokens)} rows, and the model was run on {batch}")
        query = torch.as_tensor(self.query).expand(batch)
        query = torch.where(query < 0, query + n_queries, query)
        if self.tokens.min() < 0 or self.tokens.max() >= n_keys:
            raise ValueError(f"{call.site} has keys 0 to {n_keys - 1}, and is to look at {self.tokens.tolist()}")
        mine = ((query >= rows.start) & (query < rows.stop)).nonzero()[:, 0]
        seen = call.weights.seen(rows.start, rows.stop).expand(batch, n_heads, -1, -1)
        for head in (head for layer, head in self.heads if layer == call.site.layer):
            if not 0 <= head < n_heads:
                raise ValueError(f"{call.site} has heads 0 to {n_heads - 1}, and no {head}")
            if not seen[mine, head, query[mine] - rows.start].gather(-1, self.tokens[mine].to(seen.device)).all():
                raise ValueError(f"{call.site}: a query does not see all of its tokens {self.tokens.tolist()}")
        row = weights.new_zeros(batch, n_keys).scatter_add_(
            1, self.tokens.to(weights.device), self.shares.to(weights).expand(batch, -1)
        )
        weights = weights.clone()
        for layer, head in self.heads:
            if layer == call.site.layer:
                weights[mine, head, query[mine] - rows.start] = row[mine]
        return weights


def _check(contrast: Contrast, receivers: Sequence[Receiver], component: Component) -> None:
    if component not in Component.__args__:
        raise ValueError(f"component is one of {', '.join(Component.__args__)}, got {component!r}")
    if not receivers:
        raise ValueError("no receivers are named; leave them out for the direct effect on the score")
    for layer, head in receivers:
        if layer not in contrast.sites or (head is not None and not 0 <= head < contrast.sites[layer].heads):
            raise ValueError(f"there is no receiver {(layer, head)} in {contrast.stack}")
        if (head is None) != (component == "residual"):
            raise ValueError(
                f"receiver {(layer, head)} has no {component}: a layer has the residual, a head the others"
            )
