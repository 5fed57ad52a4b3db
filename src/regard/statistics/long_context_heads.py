"""Which heads need distant keys, query by query, foreseen from the local keys alone.

Donhauser, Arnal, Pezeshki, Cabannes, Lopez-Paz and Ahuja, Unveiling Simplicities of Attention: Adaptive Long-Context
Head Identification (arXiv:2502.09647). The first `n_sink` and the last `window` keys are local (16 and 1024 in the
paper), the others distant. The oracle calls a head local at a query where local keys hold at least `threshold` of its
attention. The paper's criterion, QAdA, foresees that share: the mass of the local keys is computed; that of the n
distant ones is taken for n times the mean of exp(score) over Gaussian keys, exp(q mean + q covariance q / 2) with q the
scaled query, so that no distant key is visited.

We worked from the abstract and the public reviews of the paper. The formula is theirs. Ours are: mean and covariance
are those of keys as they are compared, after rotary embedding, a pair for each key head, of all keys but the sinks of
another text (`key_moments`) or, by default, of the keys of this call that are distant to the query; `threshold` is 0.6,
where the paper sweeps it; a learned sink logit counts as local; in `judge` the criterion costs as much as visiting
`dim` keys. Scores with a softcap or a position bias are not Gaussian where keys are, and are refused.

Gaussian keys stand for scores that are sums of many small parts. A query that looks near by a few strong
frequencies of a rotary embedding is foreseen to look afar: keys on a circle reach less far than Gaussian ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import xarray as xr
from torch import Tensor, nn

from ..call import Call
from ..recording import statistic
from ..seam import record

N_SINK, WINDOW, THRESHOLD = 16, 1024, 0.6
STEP = 64  # queries for which sums over keys are taken once


class Moments(NamedTuple):
    """Mean [batch|1, kv_head, dim] and covariance [batch|1, kv_head, dim, dim] of one layer's keys."""

    mean: Tensor
    covariance: Tensor


Known = Mapping[tuple[str, int], Moments]  # (stack, layer) -> moments


def moments_of(call: Call, *, n_sink: int = N_SINK) -> Moments:
    """Moments of a call's keys, all rows together; the first `n_sink` and padding are left out."""
    key = call.key.transpose(0, 1).flatten(1, 2)[None]
    return _moments(key, _beyond_sinks(call, n_sink).flatten()[None])


@torch.no_grad()
def key_moments(model: nn.Module, inputs: Mapping[str, Any], *, n_sink: int = N_SINK) -> Known:
    """Moments of the keys that `model` makes of `inputs`, all rows together: (stack, layer) -> `Moments`.

    See `moments_of`. Take a text about as long as those to come: rotary embedding makes keys depend on their positions.
    """
    found: dict[tuple[str, int], Moments] = {}

    @statistic("batch head query", title="Moments of keys")
    def collect(call: Call) -> Any:  # nothing is recorded
        if _reads_back(call):
            found[call.site.stack, call.site.layer] = moments_of(call, n_sink=n_sink)

    with record(model, collect):
        model(**inputs)
    return found


@statistic("batch head query", title="Mass on distant keys", units="share", limits=(0, 1))
def distant_mass(call: Call, *, n_sink: int = N_SINK, window: int = WINDOW) -> Tensor | None:
    """Weight on keys that are neither the first `n_sink` nor the last `window`, 0 to 1. [batch, head, query]

    The oracle: the exact value of what `foreseen_mass` foresees. Calls other than causal self-attention are left out.
    """
    if not _reads_back(call):
        return None
    parts = []
    for rows, weights in call.weights.strips():
        parts.append(weights.masked_fill(_local(call, rows, n_sink, window), 0.0).sum(-1))
    return torch.cat(parts, dim=-1)


@statistic("batch head query", title="Mass on distant keys, foreseen", units="share", limits=(0, 1))
def foreseen_mass(
    call: Call, *, n_sink: int = N_SINK, window: int = WINDOW, moments: Known | None = None
) -> Tensor | None:
    """What `distant_mass` will be, by the local keys and two moments of the distant ones. [batch, head, query]

    moments: from `key_moments`; None for those of the query's own distant keys, by running sums. ValueError for
    scores with a softcap or a position bias.
    """
    if not _reads_back(call):
        return None
    _refuse(call)
    n_group = call.query.shape[1] // call.key.shape[1]
    scaled = (call.query * call.scale).unflatten(1, (-1, n_group))  # [batch, kv_head, group, query, dim]
    if moments is None:
        mean, variance = _of_distant(scaled, call, n_sink, window)
    else:
        known = _known(moments, call)
        first, second = (t.to(scaled)[:, :, None] for t in known)
        mean, variance = (scaled @ first[..., None])[..., 0], ((scaled @ second) * scaled).sum(-1)
    log_mean = (mean + variance / 2).flatten(1, 2)
    parts = []
    for rows in call.weights.spans():
        local, seen = _local(call, rows, n_sink, window), call.weights.seen(rows.start, rows.stop)
        near = local.any(0)
        scores = (scaled[..., rows.start : rows.stop, :] @ call.key[:, :, None, near].mT).flatten(1, 2)
        held = scores.masked_fill(~(seen & local)[..., near], -math.inf).logsumexp(-1)
        if call.sinks is not None:
            held = torch.logaddexp(held, call.sinks.to(held).view(-1, call.query.shape[1], 1).expand_as(held))
        distant = (seen & ~local).sum(-1).log() + log_mean[..., rows.start : rows.stop]
        parts.append(torch.sigmoid(distant - held))
    return torch.cat(parts, dim=-1)


def long_context_heads(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    n_sink: int = N_SINK,
    window: int = WINDOW,
    moments: Known | None = None,
    stack: str = "language_model",
) -> xr.Dataset:
    """`distant` and `foreseen` mass of every head at every query of one forward pass, 0 to 1.

    Each has axes batch, layer, head and query. `judge` says how well one tells the other. moments: see `foreseen_mass`.

    >>> import regard
    >>> from regard.statistics.long_context_heads import judge, long_context_heads
    >>> model, tokenizer = regard.load("reader")
    >>> text = tokenizer("It was the best of times, it was the worst of times. " * 8, return_tensors="pt")
    >>> found = long_context_heads(model, text, n_sink=4, window=16)
    >>> 0 < judge(found).needy < 1
    True
    """
    knobs = {"n_sink": n_sink, "window": window}
    both: dict[str, Any] = {
        "distant": partial(distant_mass, **knobs),
        "foreseen": partial(foreseen_mass, moments=moments, **knobs),
    }
    with torch.no_grad(), record(model, **both) as recording:
        model(**inputs)
    if stack not in recording.tree.children:
        raise ValueError(
            f"no causal self-attention in a stack {stack!r}; there is {', '.join(recording.tree.children)}"
        )
    return recording.tree[stack].to_dataset().assign_attrs(knobs)


class Judged(NamedTuple):
    """How well needy heads were foreseen, over all heads and all queries that have distant keys."""

    needy: float  # share of (head, query) that the oracle calls long-context
    called: float  # share that the criterion calls long-context
    recall: float  # of the needy ones, the share that was called; NaN where there are none
    precision: float  # of those called, the share that is needy; NaN where there are none
    saved: float  # share of the visits to keys that were spared, over all queries


def judge(found: xr.Dataset, *, threshold: float = THRESHOLD, dim: int = 128) -> Judged:
    """Compare what was `foreseen` with what was `distant`, as `long_context_heads` gives them.

    A head is long-context at a query where distant keys hold more than 1 - `threshold`. dim: width of a head; the
    covariance costs as much as visiting that many keys.
    """
    n_sink, window = found.attrs["n_sink"], found.attrs["window"]
    n_keys = found["query"] + 1
    n_distant = (n_keys - n_sink - window).clip(min=0)
    open_to_doubt = (n_distant > 0) & found["distant"].notnull()
    needy = ((found["distant"] > 1 - threshold) & open_to_doubt).transpose(*found["distant"].dims)
    called = ((found["foreseen"] > 1 - threshold) & open_to_doubt).transpose(*found["distant"].dims)
    both, n_needy, n_called = (float(x.sum()) for x in (needy & called, needy, called))
    total = float(xr.ones_like(found["distant"]).where(open_to_doubt).sum())
    if not total:
        raise ValueError(f"no query has distant keys: all {found.sizes['query']} lie within {n_sink=} and {window=}")
    visits = (n_keys - n_distant + n_distant * called + dim * (n_distant > 0)) * xr.ones_like(found["distant"])
    dense = float((n_keys * xr.ones_like(found["distant"])).sum())
    return Judged(
        needy=n_needy / total,
        called=n_called / total,
        recall=both / n_needy if n_needy else math.nan,
        precision=both / n_called if n_called else math.nan,
        saved=1 - float(visits.sum()) / dense,
    )


@dataclass(frozen=True)
class KeepLocal:
    """An intervention: heads see local keys only, at each query where they are not foreseen to need distant ones.

    Shows what the criterion costs in quality. It saves no time, and makes a mask of batch x head x query x key.
    """

    n_sink: int = N_SINK
    window: int = WINDOW
    threshold: float = THRESHOLD
    moments: Known | None = None

    def inputs(self, call: Call) -> Call:
        mass = foreseen_mass(call, n_sink=self.n_sink, window=self.window, moments=self.moments)
        if mass is None:
            return call
        return restrict(call, mass > 1 - self.threshold, n_sink=self.n_sink, window=self.window)


def restrict(call: Call, whole: Tensor, *, n_sink: int = N_SINK, window: int = WINDOW) -> Call:
    """The call with local keys only, but where `whole` [batch, head, query] is True."""
    n_query = call.query.shape[2]
    local = _local(call, range(n_query), n_sink, window)
    return call.but(mask=call.weights.seen(0, n_query) & (local | whole[..., None]), causal=False)


def _reads_back(call: Call) -> bool:
    return call.site.causal and not call.site.cross


def _local(call: Call, rows: range, n_sink: int, window: int) -> Tensor:
    """Which keys are local to the queries `rows`. [rows, key] boolean"""
    device = call.query.device
    query = torch.arange(rows.start, rows.stop, device=device)[:, None] + call.query_start
    key = torch.arange(call.key.shape[2], device=device) + call.key_start
    return (key < n_sink) | (query - key < window)


def _of_distant(scaled: Tensor, call: Call, n_sink: int, window: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each query's scores with its distant keys. Both [batch, kv_head, group, query]

    scaled: queries [batch, kv_head, group, query, dim]. Sums over keys that are distant to all of some queries, and the
    few that are to the later of these only, one by one.
    """
    chosen = _beyond_sinks(call, n_sink)
    among = chosen[:, None, :, None].to(call.key)
    middle = (call.key * among).sum(2, keepdim=True) / among.sum(2, keepdim=True).clamp(min=1)
    key = ((call.key - middle) * among).to(scaled)  # variances are differences of squares: taken around the middle
    n_key, n_query = key.shape[2], scaled.shape[3]
    total = key.new_zeros(*key.shape[:2], key.shape[-1])
    square = key.new_zeros(*key.shape[:2], key.shape[-1], key.shape[-1])
    number, held = chosen.new_zeros(len(key), dtype=torch.long), 0
    means, variances = [], []
    for a in range(0, n_query, STEP):
        rows = torch.arange(a, min(a + STEP, n_query), device=key.device)
        ends = (rows + call.query_start - window - call.key_start + 1).clamp(0, n_key)  # of what is distant to each
        first, last = int(ends[0]), int(ends[-1])
        more = key[:, :, held:first]
        total, square = total + more.sum(2), square + more.mT @ more
        number, held = number + chosen[:, held:first].sum(1), first
        query = scaled[..., rows, :]
        later = (torch.arange(first, last, device=key.device) < ends[:, None]) & chosen[:, None, first:last]
        scores = (query @ key[:, :, None, first:last].mT) * later[:, None, None]
        count = (number[:, None] + later.sum(-1))[:, None, None].clamp(min=1)  # [batch, 1, 1, rows]
        mean = ((query @ total[:, :, None, :, None])[..., 0] + scores.sum(-1)) / count
        mean_square = (((query @ square[:, :, None]) * query).sum(-1) + scores.square().sum(-1)) / count
        means.append(mean)
        variances.append((mean_square - mean.square()).clamp(min=0))
    away = (scaled @ middle.to(scaled)[:, :, None].mT)[..., 0]
    return torch.cat(means, -1) + away, torch.cat(variances, -1)


def _beyond_sinks(call: Call, n_sink: int) -> Tensor:
    """Which keys may be distant to some query: neither sinks nor padding. [batch, key] boolean"""
    beyond = torch.arange(call.key.shape[2], device=call.key.device) + call.key_start >= n_sink
    real = torch.ones_like(beyond)[None] if call.tokens is None else ~call.tokens.role("pad")
    return (beyond & real).expand(len(call.key), -1)


def _moments(key: Tensor, chosen: Tensor) -> Moments:
    """Of the chosen keys; key [batch, kv_head, key, dim], chosen [batch, key] boolean. Zeros where none is."""
    share = chosen / chosen.sum(1, keepdim=True).clamp(min=1)
    share = share[:, None, :, None].to(key)
    mean = (key * share).sum(2)
    apart = key - mean[:, :, None]
    return Moments(mean, (apart * share).mT @ apart)


def _known(moments: Known, call: Call) -> Moments:
    try:
        return moments[call.site.stack, call.site.layer]
    except KeyError:
        raise ValueError(f"moments hold nothing for {call.site}: take them from this model with key_moments") from None


def _refuse(call: Call) -> None:
    mask = call.mask
    biased = call.bias is not None
    if mask is not None and mask.dtype != torch.bool:
        biased |= bool(((mask != 0) & call.weights.seen(0, call.query.shape[2])).any())
    if biased or call.softcap is not None:
        what = "a position bias" if biased else "a softcap"
        raise ValueError(f"{call.site}: scores with {what} cannot be foreseen from moments of keys; use distant_mass")
