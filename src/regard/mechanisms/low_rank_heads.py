"""Heads that pool a text by one low-rank form: hidden states are scored against one context vector.

Mehta et al., Low Rank Factorization for Compact Multi-Head Self-Attention (arXiv:1912.00835), section 3, equation 3.13.

With c the context, head r scores token t by tanh((p_r . c) (q_r . h_t)), an affinity c^T (p_r q_r^T) h_t of rank one.
Scores of a token are made to have length 1 over heads, then each head takes a softmax over tokens. Since no score is
over 1, no token weighs more than e^2 = 7.4 times another of the same head: maps are never sharp. It pools, one vector a
head, and takes the place of a mean over tokens, not of self-attention: there is no model to convert.

The context is the mean of the real tokens, or a learned vector, the paper's other variant. The encoder around it
(a recurrent network) and the paper's penalty on heads that overlap are left out. A token that no head scores has no
length to divide by: its scores stay 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters import register
from ._mechanism import Cost, softmax

CONTEXTS = ("mean", "learned")


def low_rank_heads(
    hidden: Tensor, left: Tensor, right: Tensor, *, context: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What each head takes from the tokens [batch, head, dim], and its weights [batch, head, key].

    hidden: [batch, token, dim]; left, right: [dim, head], which meet the context and the tokens. context: [dim] or
    [batch, dim]; the mean of the tokens unless given. mask: which tokens there are, boolean [batch, token]; without
    any, zeros. Weights are 0 or more and sum to 1. Raises ValueError where the shapes do not fit.

        >>> pooled, weights = low_rank_heads(torch.randn(2, 9, 16), torch.randn(16, 4), torch.randn(16, 4))
        >>> pooled.shape, weights.shape
        (torch.Size([2, 4, 16]), torch.Size([2, 4, 9]))
    """
    if hidden.ndim != 3 or left.ndim != 2 or left.shape != right.shape or len(left) != hidden.shape[-1]:
        raise ValueError(
            f"low_rank_heads: takes hidden [batch, token, dim] and two factors [dim, head]; got {list(hidden.shape)}, "
            f"{list(left.shape)} and {list(right.shape)}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != hidden.shape[:2]):
        raise ValueError(
            f"low_rank_heads: a mask says which tokens there are, boolean {list(hidden.shape[:2])}; got {mask.dtype} "
            f"{list(mask.shape)}"
        )
    there = None if mask is None else mask[..., None]
    if there is not None:
        hidden = hidden.where(there, 0.0)
    if context is None:
        count = hidden.shape[1] if there is None else there.sum(1).clamp_min(1)
        context = hidden.sum(1) / count
    scores = F.normalize(torch.tanh((context @ left).unsqueeze(-2) * (hidden @ right)), dim=-1)
    weights = softmax(scores.mT, None if mask is None else mask[:, None])
    # an axis of queries, one a head, as all attention has it
    return (weights[:, :, None] @ hidden[:, None])[:, :, 0], weights


class LowRankHeads(nn.Module):
    """A pooler with 2 x dim x heads parameters: [batch, token, dim] to [batch, head, dim] and weights.

    context: "mean" of the tokens, or "learned". `regard.record` sees its weights, of one query a head.

    >>> pooled, weights = LowRankHeads(16, 4)(torch.randn(2, 9, 16))
    >>> pooled.shape
    torch.Size([2, 4, 16])
    """

    is_causal, is_cross_attention = False, True

    def __init__(self, dim: int, heads: int, *, context: str = "mean") -> None:
        super().__init__()
        if context not in CONTEXTS:
            raise ValueError(f"low_rank_heads: context is one of {CONTEXTS}; got {context!r}")
        self.left, self.right = nn.Parameter(torch.empty(dim, heads)), nn.Parameter(torch.empty(dim, heads))
        for factor in (self.left, self.right):
            nn.init.kaiming_uniform_(factor, a=5**0.5)
        self.context = nn.Parameter(torch.randn(dim) * dim**-0.5) if context == "learned" else None

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """mask: which tokens there are, boolean [batch, token]."""
        context = None if self.context is None else self.context.expand(len(hidden), -1)
        return low_rank_heads(hidden, self.left, self.right, context=context, mask=mask)


register(LowRankHeads)


def cost(n: int, dim: int, *, heads: int) -> Cost:
    """Of a text of `n` tokens, all heads, the context among it."""
    return Cost(2 * dim * heads * (2 * n + 1), 2 * n * dim + 2 * dim * heads + heads * dim)
