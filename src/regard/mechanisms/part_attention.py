"""Attention of each token to those of its own part.

Ultra3D: Efficient and High-Fidelity 3D Generation with Part Attention (arXiv:2507.17745): tokens are occupied voxels,
each with the number of the part that it belongs to. Among themselves they attend within parts; to a picture, those of a
part attend to the patches onto which any of them projects.

Tokens are sorted by part, and each part is dense attention of its own. No code was published. Ours: a part without
patches sees all of them. Out of scope are the generator, its annotation of parts, and its positions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._mechanism import Cost, by_head, mechanism, scale_of, softmax
from ._softmax import attend, runs_native
from .memory_efficient import memory_efficient


def _labels(parts: Tensor | None, batch: int, n: int, name: str) -> Tensor:
    """[batch, token]; one part where none is given."""
    if parts is None:
        return torch.zeros(1, n, dtype=torch.long).expand(batch, -1)
    parts = parts[None] if parts.ndim == 1 else parts
    whole = not parts.is_floating_point() and not parts.is_complex() and parts.dtype != torch.bool
    if parts.ndim != 2 or len(parts) not in (1, batch) or parts.shape[1] != n or not whole or parts.min() < 0:
        raise ValueError(
            f"part_attention: {name} are whole numbers from 0, [batch, token] = {[batch, n]}; got {list(parts.shape)} "
            f"of {parts.dtype}" + (f", down to {parts.min()}" if whole and parts.numel() else "")
        )
    return parts.long().expand(batch, -1)


def _seen(query: Tensor, key: Tensor, parts: Tensor | None, key_parts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Labels of the queries [batch, query], and which keys each label sees [batch, label, key]."""
    (batch, _, n_query), n_key = query.shape[:3], key.shape[2]
    of_query = _labels(parts, batch, n_query, "parts").to(query.device)
    if key_parts is None and n_query != n_key and parts is not None:
        raise ValueError(
            f"part_attention: {n_query} queries in parts and {n_key} other keys: key_parts says which part each key is "
            "of"
        )
    if key_parts is not None and key_parts.dtype == torch.bool:
        held = key_parts[None] if key_parts.ndim == 2 else key_parts
        if held.ndim != 3 or held.shape[2] != n_key or len(held) not in (1, batch) or of_query.max() >= held.shape[1]:
            raise ValueError(
                f"part_attention: boolean key_parts are [batch, part, key] of the {int(of_query.max()) + 1} parts and "
                f"{n_key} keys; got {list(held.shape)}"
            )
        held = held.to(query.device).expand(batch, -1, -1)
    else:
        given = parts if key_parts is None and n_query == n_key else key_parts
        of_key = _labels(given, batch, n_key, "key_parts").to(query.device)
        held = of_key[:, None] == torch.arange(int(of_query.max()) + 1, device=query.device)[:, None]
    return of_query, held | ~held.any(-1, keepdim=True)


def _weights(
    query: Tensor,
    key: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    scale: float | None,
    parts: Tensor | None = None,
    key_parts: Tensor | None = None,
) -> Tensor:
    of_query, held = _seen(query, key, parts, key_parts)
    seen = held.gather(1, of_query[..., None].expand(-1, -1, key.shape[2]))[:, None]
    return softmax(
        query @ by_head(key, query.shape[1]).mT * scale_of(query, scale), seen if mask is None else seen & mask
    )


def _cost(
    n_query: int,
    n_key: int,
    dim: int,
    *,
    causal: bool = False,
    parts: Tensor | None = None,
    key_parts: Tensor | None = None,
) -> Cost:
    """Of the first sequence of the batch; without parts that of full attention."""
    if parts is None and key_parts is None:
        return Cost(4 * dim * n_query * n_key, 2 * dim * (n_query + n_key))
    one = torch.zeros(1, 1, 1, 1)
    of_query, held = _seen(one.expand(1, 1, n_query, 1), one.expand(1, 1, n_key, 1), parts, key_parts)
    numbers = of_query[0].bincount(minlength=held.shape[1]).double()
    return Cost(4 * dim * float(numbers @ held[0].sum(-1).double()), 2 * dim * (n_query + float(held[0].sum())))


@mechanism("full", "cross", mask="keys", weights=_weights, cost=_cost)
def part_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    parts: Tensor | None = None,
    key_parts: Tensor | None = None,
) -> Tensor:
    """Softmax attention within parts, at the cost of these. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]. parts: the part of each query, whole
    numbers from 0, [batch, query]; without them all are of one. key_parts: the part of each key, [batch, key], or
    boolean [batch, part, key] where one may be of several; those of the queries unless given. A part that has no key
    sees all. mask: which keys there are, [batch, 1, 1, key]. Raises ValueError where labels and tokens do not fit.

        >>> x = torch.randn(1, 4, 1000, 64)
        >>> part_attention(x, x, x, parts=torch.arange(1000)[None] % 8).shape
        torch.Size([1, 4, 1000, 64])
    """
    of_query, held = _seen(query, key, parts, key_parts)
    scale, outputs, dense = scale_of(query, scale), [], attend if runs_native(query) else memory_efficient
    for row in range(len(query)):
        found, places = [], []
        for rows, keys in _groups(of_query[row], held[row]):
            seen = None if mask is None else mask[row % len(mask)][None].index_select(3, keys)
            few = (t[row, None].index_select(2, i) for t, i in ((query, rows), (key, keys), (value, keys)))
            found.append(dense(*few, causal=False, mask=seen, scale=scale))
            places.append(rows)
        place = torch.cat(places)
        back = torch.empty_like(place).scatter_(0, place, torch.arange(len(place), device=place.device))
        outputs.append(torch.cat(found, 2).index_select(2, back))
    return torch.cat(outputs)


def _groups(of_query: Tensor, held: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each part that has queries: these, and the keys that it sees."""
    order = of_query.argsort(stable=True)
    numbers, counts = of_query.unique(return_counts=True)
    for part, rows in zip(numbers.tolist(), order.split(counts.tolist()), strict=True):
        yield rows, held[part].nonzero().flatten()
