"""Attention that reaches an earlier block only through the landmark token at its end.

Mohtashami and Jaggi, Landmark Attention: Random-Access Infinite Context Length for Transformers (arXiv:2305.16300),
sections 3.1 and 3.2, and the authors' code.

One softmax is over the tokens of a query's own block and the landmarks of earlier blocks; the share of a landmark goes
to the tokens of its block, by a softmax among these. So a landmark's score says what its block is worth, and at run
time only the `top` blocks have to be fetched. A landmark belongs to the block that it ends, sees it, and not itself;
its own value counts nowhere. A query that sees nothing, such as a landmark right after another, gets zeros.

Deviations: fetched blocks keep their places. The authors' positions for a model with rotary ones, which number fetched
blocks anew, belong to a cache of theirs and are left out, as is the choice that heads or tokens share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._mechanism import Cost, by_head, mechanism, pairs, recomputed, scale_of, softmax

SPACE = 2**22  # scores held at once


def insert(tokens: Tensor, token: int, *, block: int = 50) -> Tensor:
    """Tokens [batch, token] with a landmark after each `block` of them."""
    cut = tokens.split(block, -1)
    mark = tokens.new_full((*tokens.shape[:-1], 1), token)
    return torch.cat([part for c in cut for part in ((c, mark) if c.shape[-1] == block else (c,))], -1)


def _marked(key: Tensor, mask: Tensor | None, landmarks: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """Which keys there are, and which of them are landmarks. [batch, key]"""
    there = torch.ones(len(key), key.shape[2], dtype=torch.bool, device=key.device)
    there = there if mask is None else there & mask[:, 0, 0]
    if landmarks is None:
        return there, there & (there.cumsum(-1) % (block + 1) == 0)
    return there, there & landmarks


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    """Section by section."""
    there, marks = _marked(key, mask, knobs.get("landmarks"), knobs.get("block", 50))
    scores = query @ by_head(key, query.shape[1]).mT * scale_of(query, scale)
    section = (marks.cumsum(-1) - marks.long())[:, None, None]
    own = section.transpose(2, 3)[:, :, -query.shape[2] :]
    past = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    seen = there[:, None, None] & past
    marks, ordinary = marks[:, None, None], seen & ~marks[:, None, None]
    gates = seen & marks & (section < own)
    if (top := knobs.get("top")) is not None and marks.any():
        least = scores.masked_fill(~gates, float("-inf")).topk(min(top, scores.shape[-1]), -1).values[..., -1:]
        gates = gates & (scores >= least) if top else gates & False
    first = softmax(scores, gates | ordinary & (section == own))
    weights = first * (ordinary & (section == own))
    for c in range(int(section.max()) + 1):
        gate = (first * (gates & (section == c))).sum(-1, keepdim=True)
        weights = weights + gate * softmax(scores, ordinary & (section == c) & (section < own))
    return weights


def _cost(
    n_query: int, n_key: int, dim: int, *, causal: bool = True, block: int = 50, top: int | None = None, **_: Any
) -> Cost:
    if top is None:
        return Cost(4 * dim * pairs(n_query, n_key, causal), 2 * dim * (n_query + n_query / block * n_key / 2))
    blocks, taken = n_key / (block + 1), (min(top, n_key / (block + 1)) + 0.5) * (block + 1)
    return Cost(n_query * dim * (blocks + 4 * taken), 2 * dim * (n_query + n_key + n_query * taken))


@mechanism("causal", mask="keys", weights=_weights, cost=_cost)
def landmark(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    landmarks: Tensor | None = None,
    block: int = 50,
    top: int | None = None,
) -> Tensor:
    """Causal attention to the own block, and to earlier ones through their landmarks. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]; of more keys than queries, the queries are
    the last. landmarks: which keys are, boolean [batch, key]; else each one after `block` others, counted from the
    first that is there (see `insert`). top: earlier blocks that each query and head fetches, those whose landmarks
    score best; None: all. mask: which keys there are, [batch, 1, 1, key]. Raises ValueError without causal=True, and
    where blocks are to be fetched and no key is a landmark.

        >>> x = torch.randn(1, 4, 3000, 64)
        >>> landmark(x, x, x, top=4).shape
        torch.Size([1, 4, 3000, 64])
    """
    shape = [len(query), key.shape[2]]
    if landmarks is not None and (landmarks.dtype != torch.bool or list(landmarks.shape) != shape):
        raise ValueError(
            f"landmark: landmarks says which keys are, boolean {shape}; got {landmarks.dtype} {list(landmarks.shape)}"
        )
    if block < 1 or (top is not None and top < 1):
        raise ValueError(f"landmark: a block holds 1 key or more, and 1 or more are fetched; got {block=}, {top=}")
    if top is not None and landmarks is not None and not landmarks.any():
        raise ValueError(f"landmark: {top} blocks are to be fetched, but no key is a landmark; see `insert`")
    there, marks = _marked(key, mask, landmarks, block)
    scale, heads = scale_of(query, scale), query.shape[1]
    first, parts = key.shape[2] - query.shape[2], []
    if top is None:
        step = max(1, SPACE // (len(query) * heads * key.shape[2]))
        for a in range(0, query.shape[2], step):
            b = first + min(a + step, query.shape[2])
            rows, known = query[:, :, a : a + step], (there[:, :b], marks[:, :b])
            parts.append(recomputed(_strip, rows, key[:, :, :b], value[:, :, :b], *known, scale))
        return torch.cat(parts, 2)
    return fetched(query, key, value, there, marks, choice(query, key, there, marks, top=top, scale=scale), scale)


def _strip(query: Tensor, key: Tensor, value: Tensor, there: Tensor, marks: Tensor, scale: float) -> Tensor:
    """The last of the keys are the queries."""
    exact, heads, n = torch.promote_types(query.dtype, torch.float32), query.shape[1], query.shape[2]
    scores = query.to(exact) @ by_head(key, heads).to(exact).mT * scale
    section = (marks.cumsum(-1) - marks.long())[:, None, None].expand(-1, 1, n, -1)
    own = section[..., -n:].diagonal(dim1=2, dim2=3)[..., None]  # of the key where the query is
    past = torch.ones(n, key.shape[2], dtype=torch.bool, device=key.device).tril(key.shape[2] - n)
    seen = there[:, None, None] & past
    marks = marks[:, None, None]
    near = softmax(scores, seen & (marks ^ (section == own)))  # own tokens and earlier landmarks
    # Of each earlier section, a softmax that its landmark's share is spread by; what is of none is in the last one.
    far = seen & ~marks & (section < own)
    count = int(section.max()) + 2
    at = section.where(far, count - 1).expand(scores.shape)
    low = torch.finfo(exact).min
    tops = scores.new_full((*scores.shape[:3], count), low).scatter_reduce(-1, at, scores.detach(), "amax")
    shares = (scores - tops.gather(-1, at)).masked_fill(~far, low).exp()
    sums = scores.new_zeros(tops.shape).scatter_add(-1, at, shares)
    gates = scores.new_zeros(tops.shape).scatter_add(-1, section.expand(scores.shape), near * marks)
    factor = gates / sums.where(sums > 0, 1.0)
    weights = near * ~marks + shares * factor.gather(-1, at)
    return (weights @ by_head(value, heads).to(exact)).to(value.dtype)


def _sections(marks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each landmark in order, its place and the first of its section, and how many there are. [batch, section]"""
    count = marks.sum(-1)
    ends = marks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, : int(count.max())]
    ends = ends.where(torch.arange(ends.shape[1], device=ends.device) < count[:, None], marks.shape[1])
    starts = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1] + 1], -1) if ends.shape[1] else ends
    return ends, starts, count


@torch.no_grad()
def choice(query: Tensor, key: Tensor, there: Tensor, marks: Tensor, *, top: int, scale: float) -> Tensor:
    """The earlier sections whose landmarks score best. [batch, head, query, slot] numbers of sections; -1: none"""
    ends, _, _ = _sections(marks)
    n, heads = key.shape[2], query.shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    at = ends.clamp_max(n - 1)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    scores = query.to(exact) @ by_head(key.gather(2, at), heads).to(exact).mT * scale
    where = torch.arange(n - query.shape[2], n, device=query.device)[:, None]
    scores.masked_fill_(ends[:, None, None] >= where, float("-inf"))
    best = scores.topk(min(top, ends.shape[1]), dim=-1)
    return best.indices.where(best.values > float("-inf"), -1)


def fetched(
    query: Tensor, key: Tensor, value: Tensor, there: Tensor, marks: Tensor, chosen: Tensor, scale: float
) -> Tensor:
    """Attention to the own section and to the chosen ones, at the cost of these. [batch, head, query, dim]

    there, marks: which keys are there, and landmarks, [batch, key]. chosen: as of `choice`.
    """
    ends, starts, count = _sections(marks)
    longest = int((ends.clamp_max(key.shape[2]) - starts)[ends < key.shape[2]].amax()) if int(count.max()) else 0
    section = marks.cumsum(-1) - marks.long()
    before = torch.cat([torch.zeros_like(ends[:, :1]), ends + 1], -1) if ends.shape[1] else ends.new_zeros(len(ends), 1)
    opens = before.gather(-1, section)[:, -query.shape[2] :]  # the first key of the section that each query is in
    n = key.shape[2]
    last = torch.arange(n - query.shape[2], n, device=query.device)
    widest = int((last - opens).amax()) + 1
    taken = widest + chosen.shape[-1] * (longest + 1)
    step = max(1, SPACE // (len(query) * query.shape[1] * taken * query.shape[3]))
    parts = []
    for a in range(0, query.shape[2], step):
        rows = slice(a, a + step)
        settings = (opens[:, rows], last[rows], widest, longest, chosen[:, :, rows], ends, starts, there, marks, scale)
        parts.append(recomputed(_gathered, query[:, :, rows], key, value, *settings))
    return torch.cat(parts, 2)


def _gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    opens: Tensor,
    last: Tensor,
    widest: int,
    longest: int,
    chosen: Tensor,
    ends: Tensor,
    starts: Tensor,
    there: Tensor,
    marks: Tensor,
    scale: float,
) -> Tensor:
    exact, (batch, heads, n, _) = torch.promote_types(query.dtype, torch.float32), query.shape
    key, value = (by_head(t, heads) for t in (key, value))
    query, limit = query.to(exact)[:, :, :, None], key.shape[2] - 1

    def take(tensor: Tensor, at: Tensor) -> Tensor:
        spot = at.expand(batch, heads, n, -1).clamp(0, limit).flatten(2)[..., None].expand(-1, -1, -1, tensor.shape[-1])
        return tensor.gather(2, spot).unflatten(2, (n, -1)).to(exact)

    def known(which: Tensor, at: Tensor) -> Tensor:
        return which[:, None, None].expand(*at.shape[:3], -1).gather(-1, at.clamp(0, limit))

    near = opens[:, None, :, None] + torch.arange(widest, device=query.device)
    seen = (near <= last[:, None]) & known(there & ~marks, near)
    picked = chosen.clamp_min(0)
    gate, start = (t[:, None, None].expand(*picked.shape[:3], -1).gather(-1, picked) for t in (ends, starts))
    scores = torch.cat([(query @ take(key, t).mT)[..., 0, :] * scale for t in (near, gate)], -1)
    own, share = softmax(scores, torch.cat([seen.expand(batch, heads, n, -1), chosen >= 0], -1)).split(
        [widest, chosen.shape[-1]], -1
    )
    output = own[..., None, :] @ take(value, near)
    if chosen.shape[-1]:
        far = start[..., None] + torch.arange(longest, device=query.device)
        inside = ((far < gate[..., None]) & (chosen >= 0)[..., None]).flatten(3)
        far = far.flatten(3)
        inside = inside & known(there, far)
        scores = (query @ take(key, far).mT)[..., 0, :] * scale
        slots = chosen.shape[-1], longest
        weights = softmax(scores.unflatten(-1, slots), inside.unflatten(-1, slots)) * share[..., None]
        output = output + weights.flatten(3)[..., None, :] @ take(value, far)
    return output[..., 0, :].to(value.dtype)
