"""Attention among the tokens of a picture that a gate selects, packed row after row into dense batches.

Zhang, Li, Seo and Cao, Context-Aware Token Selection and Packing for Enhanced Vision Transformer (arXiv:2410.23608).
No code is published.

A linear gate scores every token; a token is selected by a straight-through Gumbel decision in training, where its score
is positive afterwards. Selected tokens of all pictures are packed into rows of a fixed length, of which only the last
has padding, and a token sees those of its own picture in its row. What is not selected passes by. The loss of the gate,
beside that of the task, is the cross entropy of the scores and of where objects are.

A picture that lies across two rows is cut there, so with a length its output depends on how many tokens its neighbours
in the batch have. `length=None` never cuts: rows are pictures. Deviations: the paper does not say what the logits of
the decision are, nor its threshold; here these are the score against 0, and 0. The shift of windows is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import native
from ..kernels.derivatives import transformed
from ._mechanism import Cost, by_head, mechanism, scale_of, softmax
from ._softmax import runs_native


class Packing(NamedTuple):
    """Where selected tokens lie."""

    at: Tensor  # [row, slot] places in the batch's tokens, one picture after the other; -1: none
    seen: Tensor  # [row, 1, slot|1, slot] boolean: who sees whom

    def pack(self, tensor: Tensor) -> Tensor:
        """[batch, head, token, dim] to [row, head, slot, dim]; what stands where there is none is not seen."""
        return tensor.transpose(1, 2).flatten(0, 1)[self.at.clamp_min(0)].transpose(1, 2)

    def unpack(self, tensor: Tensor, batch: int, n: int) -> Tensor:
        """[row, head, slot, dim] to [batch, head, token, dim]; 0 where nothing was packed."""
        flat = tensor.transpose(1, 2)[self.at >= 0]
        found = flat.new_zeros(batch * n, *flat.shape[1:]).index_copy(0, self.at[self.at >= 0], flat)
        return found.unflatten(0, (batch, n)).transpose(1, 2)


def pack(keep: Tensor, length: int | None = None) -> Packing:
    """Pack the kept tokens of `keep` [batch, token] into rows of this length; None: a row for each picture."""
    batch, n = keep.shape
    if length is None:
        order = keep.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, : max(1, int(keep.sum(-1).max()))]
        there = keep.gather(-1, order)
        at = (order + torch.arange(batch, device=keep.device)[:, None] * n).where(there, -1)
        return Packing(at, there[:, None, None])
    kept = keep.flatten().nonzero()[:, 0]
    length = min(length, max(1, len(kept)))
    rows = max(1, -(-len(kept) // length))
    at = F.pad(kept, (0, rows * length - len(kept)), value=-1).unflatten(0, (rows, length))
    picture = (at // n).where(at >= 0, -1)
    return Packing(at, ((picture[:, :, None] == picture[:, None]) & (at >= 0)[:, None])[:, None])


def _kept(query: Tensor, keep: Tensor | None, mask: Tensor | None) -> Tensor:
    shape = len(query), query.shape[2]
    there = torch.ones(shape, dtype=torch.bool, device=query.device) if keep is None else keep
    if there.dtype != torch.bool or there.shape != shape:
        raise ValueError(
            f"select_and_pack: keep says which tokens are kept, boolean {list(shape)}; got {there.dtype} "
            f"{list(there.shape)}: decide first, with scores > 0"
        )
    return there if mask is None else there & mask[:, 0, 0]


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    keep, length = _kept(query, knobs.get("keep"), mask), knobs.get("length")
    seen = keep[:, :, None] & keep[:, None]
    if length is not None:
        row = (keep.flatten().cumsum(0) - 1).view(keep.shape) // length
        seen = seen & (row[:, :, None] == row[:, None])
    return softmax(query @ by_head(key, query.shape[1]).mT * scale_of(query, scale), seen[:, None])


def _cost(n_query: int, n_key: int, dim: int, *, causal: bool = False, length: int | None = None, **knobs: Any) -> Cost:
    """keep: of one picture."""
    keep = knobs.get("keep")
    kept = n_query if keep is None else int(keep.sum())
    return Cost(4 * dim * kept * (kept if length is None else length), 8 * dim * kept)


@mechanism("full", mask="keys", weights=_weights, cost=_cost)
def select_and_pack(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    keep: Tensor | None = None,
    length: int | None = None,
) -> Tensor:
    """Softmax attention among the kept tokens of each picture, at the cost of these. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]. keep: which tokens are kept, boolean
    [batch, token]; None: all, which is full attention. The others get zeros. length: tokens of a row, which may cut a
    picture; None: never. mask: which keys there are, [batch, 1, 1, key]; the others are not kept. Raises ValueError for
    causal attention, and where `keep` is not boolean.

        >>> x = torch.randn(2, 4, 3000, 64)
        >>> select_and_pack(x, x, x, keep=torch.rand(2, 3000) < 0.2, length=49).shape
        torch.Size([2, 4, 3000, 64])
    """
    if length is not None and length < 1:
        raise ValueError(f"select_and_pack: a row holds 1 token or more; got {length=}")
    packing = pack(_kept(query, keep, mask), length)
    rows = (packing.pack(t) for t in (query, key, value))
    found = _attend(packing.seen, scale_of(query, scale), *rows)
    return packing.unpack(found, len(query), query.shape[2])


def _attend(seen: Tensor, scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if runs_native(query) and not transformed(query, key, value):
        return native.attention(query, key, value, mask=seen, scale=scale)
    exact, heads = torch.promote_types(query.dtype, torch.float32), query.shape[1]
    scores = query.to(exact) @ by_head(key, heads).to(exact).mT * scale
    return (softmax(scores, seen) @ by_head(value, heads).to(exact)).to(value.dtype)


class SelectAndPack(nn.Module):
    """Attention of selected tokens, before a norm and with what passes by; takes and gives [batch, token, dim].

    length: of a row, as `select_and_pack` takes it. `score` and `keep` are those of the last forward pass, [batch,
    token]; a later block takes the score as `above`.
    """

    def __init__(self, dim: int, heads: int, *, length: int | None = None) -> None:
        super().__init__()
        self.heads, self.length = heads, length
        self.gate, self.norm = nn.Linear(dim, 1), nn.LayerNorm(dim)
        self.parts, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.score: Tensor | None = None
        self.keep: Tensor | None = None

    def forward(self, hidden: Tensor, *, above: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """above: scores of an earlier block, the larger counts; keep: decided elsewhere, [batch, token]."""
        score = self.gate(hidden)[..., 0]
        score = score if above is None else torch.maximum(score, above)
        if keep is not None:
            decision = keep.to(score)
        elif self.training:
            decision = F.gumbel_softmax(torch.stack([score, torch.zeros_like(score)], -1), hard=True)[..., 0]
        else:
            decision = (score > 0).to(score)
        self.score, self.keep = score, decision > 0.5
        gated = score.sigmoid()[..., None] * hidden
        taken = decision[..., None] * gated
        query, key, value = self.parts(self.norm(taken)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = select_and_pack(query, key, value, keep=self.keep, length=self.length)
        found = taken + self.output(mixed.transpose(1, 2).flatten(2))
        return hidden + decision[..., None] * (found - hidden)


def selection_loss(scores: Sequence[Tensor], there: Tensor) -> Tensor:
    """Cross entropy of each block's scores [batch, token] and of where objects are, summed over blocks. []"""
    target = there.to(scores[0])
    return torch.stack([F.binary_cross_entropy_with_logits(score, target) for score in scores]).sum()
