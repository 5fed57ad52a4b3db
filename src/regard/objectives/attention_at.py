"""Training against the worst small change of attention.

Kitada and Iyatomi, Attention Meets Perturbations: Robust and Interpretable Attention with Adversarial Training
(arXiv:2009.12064), section 3: the loss, plus `strength` times the loss with scores (before softmax) moved by epsilon
along their gradient, as Goodfellow et al. do with inputs. Attention iAT moves them along differences between the
scores of a row. epsilon has no default: the paper tunes it for each data set.

Deviations. The paper's models attend once, from one query; here a perturbation runs over all attention of an example
together: every site, head and row, unless `where` and `queries` choose. For iAT, with differences d[t, k] = score k -
score t and a weight a[t, k] for each, the perturbation of key t is the sum over k of a[t, k] d[t, k], and a is epsilon
long along its gradient. Normalising d for each t by itself gives the perturbation of AT to the letter, since the
gradient of a[t, k] is g[t] d[t, k]; here d is normalised over its row as a whole, so that keys whose scores stand out
are moved more. Negative epsilons, which would lower the loss, are refused.

The authors' code for iAT does something else, which is not offered: its differences are between the sentences of a
batch, at the same place, and as it starts from weights of 0, they do not reach the gradient. What is left is the step
of AT with the other sign, towards a smaller loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..call import Call, Site
from ..seam import intervene

Key = tuple[str, int]  # stack and layer of a call


def attention_at(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    epsilon: float,
    strength: float = 1.0,
    interpretable: bool = False,
    where: Callable[[Site], bool] = lambda site: True,
    queries: slice = slice(None),
) -> Tensor:
    """The loss, plus `strength` times the loss under the worst change of attention scores. A scalar, with gradient.

    loss: runs the model and gives its loss, the mean or the sum over examples; it is called twice. epsilon: how far the
    scores of one example are moved, by the 2-norm. interpretable: Attention iAT instead of Attention AT. where: which
    sites are changed; queries: which rows of them, such as `slice(0, 1)` for `[CLS]`. Rows keep what was masked masked.
    It costs two runs of the model and a backward pass more than the loss alone, and holds the maps of what it changes;
    dropout differs between the two runs. Raises ValueError for a negative epsilon, where nothing is changed, or where
    `loss` runs a layer more than once.

        attention_at(model, lambda: model(**batch).loss, epsilon=5.0).backward()
    """
    worst = perturbation(model, loss, epsilon=epsilon, interpretable=interpretable, where=where, queries=queries)
    with intervene(model, worst):
        adversarial = loss()
    return worst.loss + strength * adversarial


class Perturbation:
    """An intervention: attention scores plus `scores`, one tensor [batch, head, query, key] for each stack and layer.

    loss: that of the run in which the perturbation was found, before any change, with gradient.
    """

    def __init__(self, loss: Tensor, scores: dict[Key, Tensor], queries: slice) -> None:
        self.loss, self.scores, self.queries = loss, scores, queries

    def weights(self, call: Call, weights: Tensor, rows: range) -> Tensor:
        moved = self.scores.get((call.site.stack, call.site.layer))
        return weights if moved is None else _moved(weights, moved, call, rows, self.queries)


def perturbation(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    epsilon: float,
    interpretable: bool = False,
    where: Callable[[Site], bool] = lambda site: True,
    queries: slice = slice(None),
) -> Perturbation:
    """The change of attention scores, `epsilon` long for each example, that raises the loss most to first order.

    Arguments as in `attention_at`. To measure how much a model stands: `with intervene(model, perturbation(...))`.
    """
    if epsilon < 0:
        raise ValueError(f"attention_at: epsilon is a length, 0 or more, got {epsilon}: below 0 the loss would fall")
    probe = _Probe(where, queries, interpretable)
    with torch.enable_grad(), intervene(model, probe):
        before = loss()
    if not probe.zeros:
        raise ValueError("attention_at: `loss` ran no attention that `where` and `queries` choose")
    keys = list(probe.zeros)
    found = torch.autograd.grad(before, [probe.zeros[k] for k in keys], retain_graph=True)
    gradients = dict(zip(keys, found))
    if interpretable:
        apart = {key: _apart(rows) for key, rows in probe.logs.items()}
        length = _norm({key: g * apart[key].sqrt() for key, g in gradients.items()})
        scores = {key: g * apart[key] for key, g in gradients.items()}
    else:
        length, scores = _norm(gradients), gradients
    steps = {key: epsilon * s / length.view(-1, 1, 1, 1) for key, s in scores.items()}
    return Perturbation(before, steps, queries)


class _Probe:
    """Adds nothing to scores, in a way that the loss can be differentiated by; keeps logarithms of weights for iAT."""

    def __init__(self, where: Callable[[Site], bool], queries: slice, keep: bool) -> None:
        self.here, self.queries, self.keep = where, queries, keep
        self.zeros: dict[Key, Tensor] = {}
        self.logs: dict[Key, Tensor] = {}

    def inputs(self, call: Call) -> Call:
        chosen = range(call.query.shape[2])[self.queries]
        key = (call.site.stack, call.site.layer)
        if not chosen or not self.here(call.site):
            return call
        if key in self.zeros:
            raise ValueError(f"attention_at: `loss` runs {call.site} more than once")
        shape = (*call.query.shape[:2], len(chosen), call.key.shape[2])
        self.zeros[key] = torch.zeros(shape, dtype=call.value.dtype, device=call.value.device, requires_grad=True)
        self.logs[key] = torch.full_like(self.zeros[key], float("-inf")).detach()
        return call

    def weights(self, call: Call, weights: Tensor, rows: range) -> Tensor:
        key = (call.site.stack, call.site.layer)
        if key not in self.zeros:
            return weights
        if self.keep:
            at, inside = _rows(call, rows, self.queries)
            logs = weights.detach()[:, :, inside].log()
            self.logs[key][:, :, at, : weights.shape[-1]] = logs.to(self.logs[key].dtype)
        return _moved(weights, self.zeros[key], call, rows, self.queries)


def _moved(weights: Tensor, scores: Tensor, call: Call, rows: range, queries: slice) -> Tensor:
    """softmax(log weights + scores), where what is missing to 1 (a sink's share) stays a score of its own."""
    at, inside = _rows(call, rows, queries)
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


def _rows(call: Call, rows: range, queries: slice) -> tuple[list[int], list[int]]:
    """Of the chosen queries those among `rows`: their numbers among the chosen, and among `rows`."""
    chosen = range(call.query.shape[2])[queries]
    found = [(i, q - rows.start) for i, q in enumerate(chosen) if q in rows]
    return [i for i, _ in found], [q for _, q in found]


def _apart(logs: Tensor) -> Tensor:
    """Of each key, its share in the squared differences between all scores of its row; 0 where all are the same."""
    seen = logs.isfinite()
    logs = torch.where(seen, logs, 0.0)
    n, sums, squares = seen.sum(-1, keepdim=True), logs.sum(-1, keepdim=True), logs.square().sum(-1, keepdim=True)
    apart = torch.where(seen, squares - 2 * logs * sums + n * logs.square(), 0.0).clamp_min(0)
    return apart / apart.sum(-1, keepdim=True).clamp_min(torch.finfo(apart.dtype).tiny)


def _norm(tensors: dict[Key, Tensor]) -> Tensor:
    """2-norm over all of an example. [batch]"""
    squares = torch.stack([t.square().flatten(1).sum(1) for t in tensors.values()]).sum(0)
    return squares.sqrt().clamp_min(torch.finfo(squares.dtype).tiny)
