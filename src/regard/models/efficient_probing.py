"""A probe of a frozen encoder: learned queries look straight at its tokens, and each gathers channels of its own.

Psomas et al., Attention, Please! Revisiting Attentive Probing for Masked Image Modeling (arXiv:2506.10178), section 3:
scores are products of queries with the tokens themselves, without maps for queries, keys or the output, and one map of
the values is shared out among the queries. Initial values, and the head of a batch norm without weights and a linear
layer, are those of the authors' code. Beside it stands what it is compared with: the mean of the tokens, and attention
of one learned query with all four maps (`torch.nn.MultiheadAttention`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ProbeAttention(nn.Module):
    """Softmax of each query's scores over tokens, and with it the mean of the channels that are this query's."""

    is_cross_attention = True

    def forward(self, queries: Tensor, tokens: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [query, dim], tokens [batch, key, dim], value [batch, key, channel] -> [batch, channel]"""
        scores = queries.unsqueeze(1) @ tokens.unsqueeze(1).mT * tokens.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        parts = value.unflatten(-1, (len(queries), -1)).transpose(1, 2)
        return (scores.softmax(-1) @ parts).flatten(1)


class EfficientProbing(nn.Module):
    """Pools tokens by learned queries. [batch, key, dim] -> [batch, dim / reduce]

    queries: how many; reduce: how much narrower the result is than the tokens; bias: of the map of values. It has
    `queries * dim + dim ** 2 / reduce` weights, and takes tokens as they come: the encoder's last norm belongs before.
    `regard.record` sees one layer of cross attention, each query as a head, since each has channels of its own.

    Raises ValueError where dim does not divide by `queries * reduce`.

    >>> import torch
    >>> from regard.models.efficient_probing import EfficientProbing
    >>> EfficientProbing(64, queries=8, reduce=2)(torch.randn(3, 50, 64)).shape
    torch.Size([3, 32])
    """

    def __init__(self, dim: int, *, queries: int = 32, reduce: int = 1, bias: bool = False) -> None:
        super().__init__()
        if queries < 1 or reduce < 1 or dim % (queries * reduce):
            raise ValueError(
                f"EfficientProbing: {dim} channels do not divide by {queries} queries times a reduction of {reduce}"
            )
        self.queries = nn.Parameter(0.02 * torch.randn(queries, dim))
        self.value = nn.Linear(dim, dim // reduce, bias=bias)
        self.attention = ProbeAttention()
        self.channels = dim // reduce

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """tokens: [batch, key, dim]; mask: boolean [batch, key], False where a row is filled up.

        ValueError for other shapes, and where a row has no token.
        """
        _fits(tokens, self.queries.shape[-1], mask, "EfficientProbing")
        return self.attention(self.queries, tokens, self.value(tokens), mask)


class MeanPooling(nn.Module):
    """The mean of the tokens, of which linear probes read. [batch, key, dim] -> [batch, dim]"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.channels = dim

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        _fits(tokens, self.channels, mask, "MeanPooling")
        if mask is None:
            return tokens.mean(1)
        return tokens.where(mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True)


class AttentiveProbing(nn.Module):
    """One learned query in attention with all its maps, of `4 * dim ** 2` weights. [batch, key, dim] -> [batch, dim]"""

    def __init__(self, dim: int, *, heads: int = 8) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(1, dim))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.channels = dim

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        _fits(tokens, self.channels, mask, "AttentiveProbing")
        query, hidden = self.query.expand(len(tokens), -1, -1), None if mask is None else ~mask
        return self.attention(query, tokens, tokens, key_padding_mask=hidden)[0][:, 0]


class Probe(nn.Module):
    """Scores of classes from what a pooling makes of tokens; all probes share this head. [batch, class]"""

    def __init__(self, pool: EfficientProbing | MeanPooling | AttentiveProbing, classes: int) -> None:
        super().__init__()
        self.pool = pool
        self.norm = nn.BatchNorm1d(pool.channels, affine=False, eps=1e-6)
        self.linear = nn.Linear(pool.channels, classes)

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.linear(self.norm(self.pool(tokens, mask=mask)))


def efficient_probing(dim: int, classes: int, *, queries: int = 32, reduce: int = 1, bias: bool = False) -> Probe:
    """An untrained probe of tokens of `dim` channels: what to train on an encoder's outputs, the encoder frozen.

    >>> import torch
    >>> from regard.models.efficient_probing import efficient_probing
    >>> probe = efficient_probing(64, 10, queries=8)
    >>> probe(torch.randn(3, 50, 64)).shape
    torch.Size([3, 10])
    """
    return Probe(EfficientProbing(dim, queries=queries, reduce=reduce, bias=bias), classes)


def _fits(tokens: Tensor, dim: int, mask: Tensor | None, asked_by: str) -> None:
    if tokens.ndim != 3 or tokens.shape[-1] != dim or not tokens.shape[1]:
        raise ValueError(f"{asked_by}: takes tokens [batch, key, {dim}], one or more; got {list(tokens.shape)}")
    if mask is None:
        return
    if mask.shape != tokens.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"{asked_by}: a mask is boolean [batch, key], here {list(tokens.shape[:2])}; got {mask.dtype} "
            f"{list(mask.shape)}"
        )
    if not mask.any(1).all():
        raise ValueError(f"{asked_by}: row {int((~mask.any(1)).nonzero()[0])} of the mask has no token")
