"""What several statistics need."""

import torch
from torch import Tensor

from ..call import Call

UNCOUNTED = ("image", "frame", "pad")  # roles whose ids say nothing of what stands there


def undefined(call: Call) -> Tensor:
    """NaN for each query. [batch, head, query]"""
    return torch.full(call.query.shape[:3], float("nan"), device=call.query.device)


def total(call: Call) -> Tensor | float:
    """Sum of each row: 1, but where sinks take a part or an intervention edits weights. [batch, head, query]"""
    if call.sinks is None and not call.edits:
        return 1.0
    return call.weights.mass(torch.ones(1, call.key.shape[2], dtype=torch.bool, device=call.query.device))


def at_offset(call: Call, offset: int) -> Tensor:
    """Weight on the key `offset` positions on; NaN where there is none, or padding. [batch, head, query]"""
    if call.site.cross:
        return undefined(call)
    n_query, n_key = call.query.shape[2], call.key.shape[2]
    keys = torch.arange(n_query, device=call.query.device) + call.query_start + offset - call.key_start
    there = ((keys >= 0) & (keys < n_key))[None]
    if call.tokens is not None:
        there = there & call.tokens.role("real")[:, keys.clamp(0, n_key - 1)]
    found = call.weights.at(torch.where(there, keys, -1))
    return found.masked_fill(~there[:, None], float("nan"))


def on_copies(call: Call, after: int) -> Tensor:
    """Weight on the keys `after` positions behind earlier copies of the query's token. [batch, head, query]

    All earlier copies count together. NaN for queries without one, and where tokens have no ids.
    """
    found = undefined(call)
    if call.site.cross or call.tokens is None or call.query_tokens is None:
        return found
    # What has left a sliding cache is still an earlier copy, of no weight.
    tokens = call.tokens if call.earlier is None else call.earlier.to(call.query.device).then(call.tokens)
    device, n = call.query.device, len(tokens)
    left = n - call.key.shape[2]
    counted = tokens.ids >= 0
    for role in UNCOUNTED:
        counted &= ~tokens.role(role).cpu()
    ids = torch.where(counted, tokens.ids, -1).to(device)
    asked = call.query_tokens.ids.to(device)
    key_at = torch.arange(n, device=device) + call.key_start - left
    query_at = torch.arange(call.query.shape[2], device=device)[:, None] + call.query_start
    for rows, weights in call.weights.strips():
        a, b = rows.start, rows.stop
        copies = (asked[:, a:b, None] == ids[:, None]) & (asked[:, a:b, None] >= 0) & (key_at < query_at[a:b] - after)
        chosen = torch.nn.functional.pad(copies, (after, 0))[..., :n]
        mass = (weights * chosen[:, None, :, left:]).sum(-1)
        found[:, :, a:b] = mass.masked_fill(~chosen.any(-1)[:, None], float("nan"))
    return found


def real(call: Call) -> Tensor:
    """Which queries are not padding. [batch, query] boolean"""
    if call.query_tokens is None:
        return torch.ones(call.query.shape[0], call.query.shape[2], dtype=torch.bool, device=call.query.device)
    return ~call.query_tokens.role("pad")
