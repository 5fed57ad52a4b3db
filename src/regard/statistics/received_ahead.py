"""Attention received from queries a given distance ahead: what a token still means to what comes later.

Li et al., Attention Illuminates LLM Reasoning (arXiv:2510.13554), definition 4.1 (FAI), of one head and as a sum, which
adds up over the steps of decoding; `preplan_anchor` takes the mean.
"""

import torch
from torch import Tensor

from ..call import Call
from ..recording import statistic

_STRIP = 2**22  # weights held at once


@statistic("batch head key", title="Attention received from ahead", units="queries", limits=(0, None))
def received_ahead(call: Call, *, near: int = 10, far: int | None = 50) -> Tensor:
    """Sum of the weights on each key over the queries `near` to `far` positions after it. [batch, head, key]

    At most far - near + 1. far: None for all that come later. Padding counts as no query. NaN in cross attention,
    whose positions do not compare.

    No reduction gives this, so rows are made a strip at a time: exact, in memory that grows with the keys alone.

    >>> import regard
    >>> model, tokenizer = regard.load("reader")
    >>> with regard.record(model, "received_ahead") as recording:
    ...     _ = model(**tokenizer("to be or not to be, that is the question", return_tensors="pt"))
    >>> float(recording.tree["language_model"]["received_ahead"].sel(key=10).max())
    0.0
    """
    if not 0 <= near <= (near if far is None else far):
        raise ValueError(f"received_ahead(near={near}, far={far}): 0 <= near <= far is needed")
    batch, head, n_query, _ = call.query.shape
    n_key, device = call.key.shape[2], call.query.device
    if call.site.cross:
        return torch.full((batch, head, n_key), torch.nan, device=device)
    found = torch.zeros(batch, head, n_key, device=device)
    real = None if call.query_tokens is None else ~call.query_tokens.role("pad")
    keys = torch.arange(n_key, device=device) + call.key_start
    strip = max(1, _STRIP // (batch * head * n_key))
    for a in range(0, n_query, strip):
        b = min(a + strip, n_query)
        ahead = (torch.arange(a, b, device=device) + call.query_start)[:, None] - keys
        counted = (ahead >= near) & (ahead <= (ahead if far is None else far))
        if not bool(counted.any()):
            continue
        counted = counted if real is None else counted & real[:, None, a:b, None]
        found += (call.weights.rows(a, b) * counted).sum(2)
    return found
