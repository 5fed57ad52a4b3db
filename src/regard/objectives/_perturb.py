"""Attention scores that are moved by a given length, for objectives that train on the worst of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..call import Call, Site

Key = tuple[str, int]  # stack and layer of a call


class Moved:
    """An intervention: attention scores plus `scores`, a tensor [batch, head, query, key] for each stack and layer."""

    def __init__(self, scores: Mapping[Key, Tensor], queries: slice) -> None:
        self.scores, self.queries = dict(scores), queries

    def weights(self, call: Call, weights: Tensor, rows: range) -> Tensor:
        by = self.scores.get((call.site.stack, call.site.layer))
        return weights if by is None else moved(weights, by, call, rows, self.queries)


class Probe:
    """Adds nothing to scores, in a way that the loss can be differentiated by; keeps logarithms of weights if asked."""

    def __init__(self, name: str, where: Callable[[Site], bool], queries: slice, *, keep: bool) -> None:
        self.name, self.here, self.queries, self.keep = name, where, queries, keep
        self.zeros: dict[Key, Tensor] = {}
        self.logs: dict[Key, Tensor] = {}

    def inputs(self, call: Call) -> Call:
        chosen = range(call.query.shape[2])[self.queries]
        key = (call.site.stack, call.site.layer)
        if not chosen or not self.here(call.site):
            return call
        if key in self.zeros:
            raise ValueError(f"{self.name}: what it is given runs {call.site} more than once")
        shape = (*call.query.shape[:2], len(chosen), call.key.shape[2])
        self.zeros[key] = torch.zeros(shape, dtype=call.value.dtype, device=call.value.device, requires_grad=True)
        self.logs[key] = torch.full_like(self.zeros[key], float("-inf")).detach()
        return call

    def chosen(self, given: str) -> list[Key]:
        """Which calls were seen; ValueError where there are none."""
        if not self.zeros:
            raise ValueError(f"{self.name}: `{given}` ran no attention that `where` and `queries` choose")
        return list(self.zeros)

    def weights(self, call: Call, weights: Tensor, rows: range) -> Tensor:
        key = (call.site.stack, call.site.layer)
        if key not in self.zeros:
            return weights
        if self.keep:
            at, inside = rows_of(call, rows, self.queries)
            logs = weights.detach()[:, :, inside].log()
            self.logs[key][:, :, at, : weights.shape[-1]] = logs.to(self.logs[key].dtype)
        return moved(weights, self.zeros[key], call, rows, self.queries)


def moved(weights: Tensor, scores: Tensor, call: Call, rows: range, queries: slice) -> Tensor:
    """softmax(log weights + scores), where what is missing to 1 (a sink's share) stays a score of its own."""
    at, inside = rows_of(call, rows, queries)
    if not inside:
        return weights
    old = weights[:, :, inside]
    new = old * scores[:, :, at, : weights.shape[-1]].to(old.dtype).exp()
    new = new / (new.sum(-1, keepdim=True) + (1 - old.sum(-1, keepdim=True)).clamp_min(0))
    if len(inside) == len(rows):
        return new
    whole = weights.clone()
    whole[:, :, inside] = new
    return whole


def rows_of(call: Call, rows: range, queries: slice) -> tuple[list[int], list[int]]:
    """Of the chosen queries those among `rows`: their numbers among the chosen, and among `rows`."""
    chosen = range(call.query.shape[2])[queries]
    found = [(i, q - rows.start) for i, q in enumerate(chosen) if q in rows]
    return [i for i, _ in found], [q for _, q in found]


def apart_of(logs: Tensor) -> Tensor:
    """Of each key, its share in the squared differences between all scores of its row; 0 where all are the same."""
    seen = logs.isfinite()
    logs = torch.where(seen, logs, 0.0)
    n, sums, squares = seen.sum(-1, keepdim=True), logs.sum(-1, keepdim=True), logs.square().sum(-1, keepdim=True)
    apart = torch.where(seen, squares - 2 * logs * sums + n * logs.square(), 0.0).clamp_min(0)
    return apart / apart.sum(-1, keepdim=True).clamp_min(torch.finfo(apart.dtype).tiny)


def norm(tensors: Mapping[Key, Tensor]) -> Tensor:
    """2-norm over all of an example. [batch]"""
    squares = torch.stack([t.square().flatten(1).sum(1) for t in tensors.values()]).sum(0)
    return squares.sqrt().clamp_min(torch.finfo(squares.dtype).tiny)


def stepped(
    gradients: Mapping[Key, Tensor], length: float, logs: Mapping[Key, Tensor] | None = None
) -> dict[Key, Tensor]:
    """Steps along these gradients by scores, so long for each example over all that is moved.

    logs: of the weights, for weights of differences in place of scores: keys whose scores stand out are moved more.
    """
    if logs is None:
        long, scores = norm(gradients), gradients
    else:
        apart = {key: apart_of(rows) for key, rows in logs.items()}
        long = norm({key: g * apart[key].sqrt() for key, g in gradients.items()})
        scores = {key: g * apart[key] for key, g in gradients.items()}
    return {key: length * s / long.view(-1, 1, 1, 1) for key, s in scores.items()}
