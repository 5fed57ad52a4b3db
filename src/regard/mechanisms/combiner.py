"""Attention to near keys one by one, and to the rest through summaries of regions, all in one softmax.

Ren et al., Combiner: Full Attention Transformer with Sparse Computation Cost (arXiv:2107.05768), section 4, and the
authors' code for JAX.

The weight of a key is the weight of its region times its weight inside that region. A region's summary key is the
largest of its keys on each channel, its summary query that of its queries; its summary value is what the summary query
gets from the region's keys. Scores of near keys and of summary keys go into one softmax. Forms:

    fixed      near: a query's own segment up to itself; regions: each earlier segment
    logsparse  near: itself; regions: the blocks of 1, 2, 4, ... keys that together are all before it
    mixture    tokens in rows of a segment. near: its row up to itself, and its column above it; regions: of each other
               column what is above, of each earlier row what is left of its column, and what is right of it. A key is
               reached in more ways than one, as the paper means it

Deviations: a segment that the sequence does not fill is shorter, where the code takes whole ones only; of 2^k + 1
tokens the code's logsparse form lets the last see only itself. Masked keys are in no region. With causal=False, the
fixed form has a summary of every segment, the own one too. The axial form needs the layer's input, and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._mechanism import Cost, by_head, mechanism, scale_of, softmax

FORMS = ("fixed", "logsparse", "mixture")


def _regions(form: str, i: int, n: int, r: int, causal: bool) -> Iterator[list[int]]:
    """What query i looks at: each near key by itself, then its regions."""
    row, column = divmod(i, r)
    if form == "fixed":
        own = range(row * r, i + 1 if causal else min(row * r + r, n))
        yield from ([j] for j in own)
        yield from (list(range(a, min(a + r, n))) for a in range(0, row * r if causal else n, r))
    elif form == "logsparse":
        yield [i]
        yield from (list(range((i >> b << b) - 2**b, i >> b << b)) for b in range(i.bit_length()) if i >> b & 1)
    else:
        yield from ([j] for j in (*range(column, i, r), *range(row * r, i + 1)))
        yield from (list(range(c, row * r, r)) for c in range(r) if c != column)
        yield from (list(range(p * r, p * r + column)) for p in range(row))
        yield from (list(range(p * r + column + 1, p * r + r)) for p in range(row))


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    n, scale = query.shape[2], scale_of(query, scale)
    form, r = knobs.get("form", "fixed"), knobs.get("segment") or round(n**0.5)
    key = by_head(key, query.shape[1])
    there = torch.ones(1, n, dtype=torch.bool) if mask is None else mask[:, 0, 0]
    rows = []
    for b in range(len(query)):
        known = there[min(b, len(there) - 1)]
        for i in range(n):
            regions = [[j for j in region if known[j]] for region in _regions(form, i, n, r, causal)]
            regions = [region for region in regions if region]
            row = query.new_zeros(query.shape[1], n)
            if regions:
                tops = torch.stack([key[b][:, region].amax(1) for region in regions], 1)
                shares = ((tops @ query[b, :, i, :, None])[..., 0] * scale).softmax(-1)
                for share, region in zip(shares.T, regions, strict=True):
                    asked = query[b][:, region].amax(1)[:, None]
                    inside = (asked @ key[b][:, region].mT * scale).softmax(-1)[:, 0]
                    row = row.index_add(1, torch.tensor(region), share[:, None] * inside)
            rows.append(row)
    return torch.stack(rows).unflatten(0, (len(query), n)).transpose(1, 2)


def _cost(
    n_query: int, n_key: int, dim: int, *, causal: bool = True, form: str = "fixed", segment: int | None = None
) -> Cost:
    n, r = n_key, segment or round(n_key**0.5)
    near, far, inside = {
        "fixed": (r, n / r, 1),
        "logsparse": (1, n.bit_length(), n.bit_length()),
        "mixture": (r + n / r, r + 2 * n / r, n / r + 2 * r),
    }[form]
    return Cost(4 * dim * n * (near + far + inside), dim * n * (4 + inside))


@mechanism("causal", "full", mask="keys", weights=_weights, cost=_cost, whole=True)
def combiner(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    form: str = "fixed",
    segment: int | None = None,
) -> Tensor:
    """Attention to all keys, those far away through summaries, in n^1.5 or n log n. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim], as many keys as queries, since queries
    make summaries too. form: "fixed", "logsparse" or "mixture"; the last two are causal only. segment: keys of a
    segment, or a row of the mixture; about the square root of their number unless given. Each row of the weights sums
    to 1. mask: which keys there are, [batch, 1, 1, key]. Raises ValueError for other forms, and through a cache.

        >>> x = torch.randn(1, 4, 3000, 64)
        >>> combiner(x, x, x).shape
        torch.Size([1, 4, 3000, 64])
    """
    if form not in FORMS:
        raise ValueError(f"combiner: form is one of {FORMS}; got {form!r}")
    if not causal and form != "fixed":
        raise ValueError(f"combiner: the form {form!r} is causal only; use form='fixed', or causal=True")
    if segment is not None and segment < 1:
        raise ValueError(f"combiner: a segment holds 1 key or more; got {segment=}")
    batch, heads, n = query.shape[:3]
    r = min(segment or round(n**0.5), n)
    size = 2 ** (n - 1).bit_length() if form == "logsparse" else -(-n // r) * r
    there = torch.ones(1, 1, 1, n, dtype=torch.bool, device=key.device) if mask is None else mask
    there = F.pad(there.expand(batch, -1, -1, -1)[:, :, 0], (0, size - n))
    exact = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (
        F.pad(by_head(t, heads).to(exact), (0, 0, 0, size - n)).where(there[..., None], 0.0)
        for t in (query, key, value)
    )
    # A query that is no key still asks, so only its part in summaries is left out.
    q, asked = F.pad(query.to(exact), (0, 0, 0, size - n)) * scale_of(query, scale), q * scale_of(query, scale)
    if form == "logsparse":
        output = _logsparse(q, asked, k, v, there)
    else:
        cut = [t.unflatten(2, (-1, r)) for t in (q, asked, k, v, there)]
        output = _fixed(*cut, causal=causal) if form == "fixed" else _mixture(*cut)
        output = output.flatten(2, 3)
    return output[:, :, :n].to(value.dtype)


def _largest(tensor: Tensor, there: Tensor, dim: int) -> Tensor:
    """On each channel, of those that are there; 0 where none is."""
    lowest = torch.finfo(tensor.dtype).min
    return tensor.masked_fill(~there[..., None], lowest).amax(dim).where(there.any(dim)[..., None], 0.0)


def _fixed(q: Tensor, asked: Tensor, k: Tensor, v: Tensor, there: Tensor, *, causal: bool) -> Tensor:
    """All [batch, head, segment, token, dim], there [batch, 1, segment, token]."""
    count, r = q.shape[2:4]
    tops, some = _largest(k, there, 3), there.any(3)
    inside = softmax(_largest(asked, there, 3)[..., None, :] @ k.mT, there[..., None, :])
    summaries = (inside @ v)[..., 0, :]
    near, far = q @ k.mT, q @ tops[:, :, None].mT
    own = there[..., None, :].expand(-1, -1, -1, r, -1)
    other = some[:, :, None, None].expand(-1, -1, count, r, -1)
    if causal:
        own = own & torch.ones(r, r, dtype=torch.bool, device=q.device).tril()
        other = other & torch.ones(count, count, dtype=torch.bool, device=q.device).tril(-1)[:, None]
    near, far = softmax(torch.cat([near, far], -1), torch.cat([own, other], -1)).split([r, count], -1)
    return near @ v + far @ summaries[:, :, None]


def _logsparse(q: Tensor, asked: Tensor, k: Tensor, v: Tensor, there: Tensor) -> Tensor:
    """All [batch, head, token, dim], there [batch, 1, token]; a power of two of tokens."""
    n = q.shape[2]
    at, scores, seen, values = torch.arange(n, device=q.device), [(q * k).sum(-1)], [there], [v]
    for level in range((n - 1).bit_length()):
        # Of each pair of blocks the left one, which is a region of the queries in the right one.
        blocks = (t.unflatten(2, (-1, 2, 2**level))[:, :, :, 0] for t in (asked, k, v, there))
        asked_of, keys, inner, known = blocks
        tops, some = _largest(keys, known, 3), known.any(3)
        inside = softmax(_largest(asked_of, known, 3)[..., None, :] @ keys.mT, known[..., None, :])
        tops, summaries, some = (
            t.repeat_interleave(2 ** (level + 1), 2) for t in (tops, (inside @ inner)[..., 0, :], some)
        )
        scores.append((q * tops).sum(-1))
        seen.append(some & (at >> level & 1).bool())
        values.append(summaries)
    shares = softmax(torch.stack(scores, -1), torch.stack(seen, -1))
    return torch.stack([share[..., None] * of for share, of in zip(shares.unbind(-1), values, strict=True)]).sum(0)


def _mixture(q: Tensor, asked: Tensor, k: Tensor, v: Tensor, there: Tensor) -> Tensor:
    """All [batch, head, row, column, dim], there [batch, 1, row, column]."""
    rows, columns = q.shape[2:4]
    row, column = torch.arange(rows, device=q.device), torch.arange(columns, device=q.device)
    above, left = row[:, None] > row, column[:, None] > column
    down = _before(*[t.transpose(2, 3) for t in (asked, k, v, there)], inside=above)
    tops, summaries, some = (t.transpose(2, 3) for t in down)
    own_column = torch.einsum("bhrcd,bhpcd->bhrcp", q, k), there.transpose(2, 3)[:, :, None] & above[:, None]
    own_row = q @ k.mT, there[..., None, :] & ~left.T
    others = q @ tops.mT, some[..., None, :] & (column[:, None] != column)
    parts = [(*own_column, "bhrcp,bhpcd->bhrcd", v), (*own_row, "bhrcp,bhrpd->bhrcd", v)]
    parts.append((*others, "bhrcp,bhrpd->bhrcd", summaries))
    for side in (left, left.T):
        tops, summaries, some = _before(asked, k, v, there, side)
        scores = torch.einsum("bhrcd,bhpcd->bhrcp", q, tops)
        parts.append((scores, some.transpose(2, 3)[:, :, None] & above[:, None], "bhrcp,bhpcd->bhrcd", summaries))
    shapes = [p[0].shape[-1] for p in parts]
    seen = torch.cat([p[1].expand(len(q), 1, rows, columns, -1) for p in parts], -1)
    shares = softmax(torch.cat([p[0] for p in parts], -1), seen).split(shapes, -1)
    outputs = [torch.einsum(how, share, of) for share, (*_, how, of) in zip(shares, parts, strict=True)]
    return torch.stack(outputs).sum(0)


def _before(asked: Tensor, k: Tensor, v: Tensor, there: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Summary keys and values of lines [.., line, place, dim], for each place of what `inside` says is before it."""
    members = there[..., None, :] & inside  # [batch, 1, line, place, member]
    back = bool(inside[0].any())  # from the other end
    largest = []
    for tensor in (asked, k):
        lowest = torch.finfo(tensor.dtype).min
        held = tensor.masked_fill(~there[..., None], lowest)
        held = (held.flip(3) if back else held).cummax(3).values
        held = F.pad(held[..., :-1, :], (0, 0, 1, 0), value=lowest)
        held = held.flip(3) if back else held
        largest.append(held.where(members.any(-1)[..., None], 0.0))
    shares = softmax(largest[0] @ k.mT, members)
    return largest[1], shares @ v, members.any(-1)
