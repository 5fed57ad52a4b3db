"""Attention to the key blocks that a learned gate predicts to hold the weight.

Gao et al., SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs (arXiv:2410.13276), section 3, and the
authors' code for prefill.

Queries and keys of a block, before rotary positions, are pooled and mapped by a small matrix of each head; with rotary
positions of the blocks' first tokens, their products are the scores of a map of blocks. Blocks of low probability are
skipped. Only the gates are trained, so that this map is that of the largest weights in each block of the model's own
attention, each row over its sum. Released defaults: blocks of 64, means of queries, and of keys maximum, minimum and
mean.

Deviations: a query block always takes its own key block, without which a row may have no key; padding is left out of
means, maxima and minima. One query after a cache sees all keys, as in the prefill code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters.mechanisms import alone
from ..kernels.native import Blocks
from ._blocks import attend, listed
from ._layers import attentions, distilled, own
from ._mechanism import Cost, by_head, mechanism, pairs, scale_of, softmax, visible

POOLS = ("max", "min", "mean")
LOWEST = -1e9  # what hidden scores are


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    seen = visible(query, key, causal=causal, mask=mask)
    blocks, block = knobs.get("blocks"), knobs.get("block", 64)
    if blocks is not None:
        at = torch.arange(key.shape[2], device=query.device) // block
        taken = (blocks | torch.eye(blocks.shape[-1], dtype=torch.bool))[:, :, at][..., at]
        seen = taken if seen is None else taken & seen
    return softmax(query @ by_head(key, query.shape[1]).mT * scale_of(query, scale), seen)


def _cost(
    n_query: int, n_key: int, dim: int, *, causal: bool = True, blocks: Tensor | None = None, block: int = 64
) -> Cost:
    """blocks: of one head."""
    if blocks is None:
        return Cost(4 * dim * pairs(n_query, n_key, True), 2 * dim * (n_query + n_query / block * n_key / 2))
    taken = float(blocks.sum())
    own = n_query * (block - 1) / 2  # of a block's own square, what lies in the future
    return Cost(4 * dim * (taken * block**2 - own), 2 * dim * (n_query + taken * block))


@mechanism("causal", mask="keys", weights=_weights, cost=_cost)
def seerattention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    blocks: Tensor | None = None,
    block: int = 64,
) -> Tensor:
    """Causal softmax attention to the key blocks that were chosen, and the own one. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]. blocks: boolean [batch|1, head|1,
    query block, key block], as `Gate` makes it; None: all, which is full attention. block: tokens. mask: which keys
    there are, [batch, 1, 1, key]. Raises ValueError without causal=True, and for chosen blocks of fewer queries than
    keys.

        >>> x = torch.randn(1, 4, 3000, 64)
        >>> seerattention(x, x, x, blocks=torch.rand(1, 4, 47, 47) < 0.2).shape
        torch.Size([1, 4, 3000, 64])
    """
    if block < 1:
        raise ValueError(f"seerattention: a block holds 1 token or more; got {block=}")
    n_query, n_key = query.shape[2], key.shape[2]
    scale, count = scale_of(query, scale), -(-n_key // block)
    past = torch.ones(count, count, dtype=torch.bool, device=query.device).tril()
    if blocks is None:
        everything = Blocks(*listed(past[None, None, -1:]), max(n_query, 1), block)
        return attend(query, key, value, everything, causal=True, mask=mask, scale=scale)
    if n_query != n_key:
        raise ValueError(f"seerattention: blocks are of as many queries as keys; got {n_query} and {n_key}")
    if blocks.dtype != torch.bool or blocks.ndim != 4 or blocks.shape[2:] != (count, count):
        raise ValueError(
            f"seerattention: blocks is boolean [batch, head, {count}, {count}], for {n_key} tokens in blocks of "
            f"{block}; got {blocks.dtype} {list(blocks.shape)}"
        )
    itself = torch.eye(count, dtype=torch.bool, device=query.device)
    chosen = Blocks(*listed((blocks | itself) & past), block, block)
    return attend(query, key, value, chosen, causal=True, mask=mask, scale=scale)


def pooled(tensor: Tensor, block: int, how: str, there: Tensor | None = None) -> Tensor:
    """ "max", "min" or "mean" over blocks of tokens. [batch, head, block, dim]

    tensor: [batch, head, token, dim]; there: which tokens there are, [batch, 1, 1, token]; 0 where there is none.
    """
    n = tensor.shape[2]
    known = torch.ones(1, 1, n, 1, dtype=torch.bool, device=tensor.device) if there is None else there.mT
    tensor, known = (F.pad(t, (0, 0, 0, -n % block)).unflatten(2, (-1, block)) for t in (tensor, known))
    if how == "mean":
        return tensor.where(known, 0.0).sum(3) / known.sum(3).clamp_min(1)
    worst = torch.finfo(tensor.dtype).min * (1 if how == "max" else -1)
    found = tensor.masked_fill(~known, worst)
    return (found.amax(3) if how == "max" else found.amin(3)).where(known.any(3), 0.0)


def positions(count: int, block: int, width: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions of the blocks' first tokens. [block, width]"""
    rates = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(count, dtype=torch.float64)[:, None] * block * rates
    angles = torch.cat([angles, angles], -1).to(like.device)
    return angles.cos().to(like), angles.sin().to(like)


def _turned(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, last = tensor.chunk(2, -1)
    return tensor * cos + torch.cat([-last, first], -1) * sin


class Gate(nn.Module):
    """Scores of key blocks for query blocks, of each head, from queries and keys without positions.

    dim: of a head; width: of the gate; queries, keys: how each is pooled, of "max", "min" and "mean", in the order of
    the weights' rows; base: of the rotary positions, the model's. With one pool of queries and width == dim, queries
    have no weights, and keys one matrix for each query head.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        *,
        block: int = 64,
        width: int = 128,
        queries: tuple[str, ...] = ("mean",),
        keys: tuple[str, ...] = POOLS,
        base: float = 10000.0,
    ) -> None:
        if not queries or not keys or {*queries, *keys} - set(POOLS):
            raise ValueError(f"Gate: queries and keys are pooled by some of {POOLS}; got {queries}, {keys}")
        super().__init__()
        self.heads, self.block, self.width, self.base = heads, block, width, base
        self.queries, self.keys = queries, keys
        mapped = len(queries) > 1 or width != dim
        self.query = nn.Parameter(torch.empty(heads, len(queries) * dim, width)) if mapped else None
        self.key = nn.Parameter(torch.empty(kv_heads if mapped else heads, len(keys) * dim, width))
        for weight in self.parameters():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def logits(
        self,
        query: Tensor,
        key: Tensor,
        *,
        mask: Tensor | None = None,
        positions_of: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Scores [batch, head, query block, key block], LOWEST after the own block.

        query: [batch, head, token, dim]; key: [batch, kv_head, token, dim], both before positions. mask: which tokens
        there are, [batch, 1, 1, token]. positions_of: cosines and sines [.., block, width] to be used otherwise.
        """
        q, k = (
            torch.cat([pooled(t, self.block, how, mask) for how in ways], -1)
            for t, ways in ((query, self.queries), (key, self.keys))
        )
        q = q if self.query is None else q @ self.query
        k = by_head(k, self.heads) @ self.key if len(self.key) == self.heads else by_head(k @ self.key, self.heads)
        cos, sin = positions_of or positions(q.shape[2], self.block, self.width, self.base, q)
        cos, sin = (t[:, None] if t.ndim == 3 else t for t in (cos, sin))
        scores = _turned(q, cos, sin) @ _turned(k, cos, sin).mT * self.width**-0.5
        return scores.masked_fill(~torch.ones_like(scores[0, 0], dtype=torch.bool).tril(), LOWEST)

    def forward(self, query: Tensor, key: Tensor, **how: Any) -> Tensor:
        """Probabilities of key blocks. [batch, head, query block, key block]"""
        return self.logits(query, key, **how).softmax(-1)


def choose(
    scores: Tensor, *, threshold: float | None = None, ratio: float | None = None, last_dense: bool = True
) -> Tensor:
    """Key blocks with a probability above `threshold`, or the best of each row. [batch, head, query block, key block]

    ratio: share of the pairs of blocks in the past that is kept; last_dense: the last two query blocks take all.
    """
    if (threshold is None) == (ratio is None):
        raise ValueError(f"seerattention: either a threshold or a ratio chooses; got {threshold=}, {ratio=}")
    count = scores.shape[-1]
    if threshold is not None:
        taken = scores > threshold
    else:
        assert ratio is not None
        if not 0 <= ratio <= 1:
            raise ValueError(f"seerattention: a ratio is 0 to 1; got {ratio=}")
        best = scores.topk(max(1, int((1 - (1 - ratio) ** 0.5) * count)), dim=-1).indices
        taken = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    if last_dense:
        taken = taken | (torch.arange(count, device=scores.device) >= count - 2)[:, None]
    return taken & torch.ones(count, count, dtype=torch.bool, device=scores.device).tril()


@torch.no_grad()
def truth(query: Tensor, key: Tensor, *, block: int = 64, mask: Tensor | None = None, scale: float | None = None):
    """Largest weight of causal attention in each block, over its row's sum. [batch, head, query block, key block]

    query, key: as attention is given them. One row of blocks of the map is held at a time.
    """
    n, rows = query.shape[2], []
    at, key = torch.arange(n, device=query.device), by_head(key, query.shape[1])
    for a in range(0, n, block):
        seen = (at <= at[a : a + block, None]) if mask is None else (at <= at[a : a + block, None]) & mask
        weights = softmax(query[:, :, a : a + block] @ key.mT * scale_of(query, scale), seen)
        rows.append(F.pad(weights.amax(2), (0, -n % block)).unflatten(-1, (-1, block)).amax(-1))
    found = torch.stack(rows, 2)
    return found / found.sum(-1, keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)


def gate_loss(logits: Tensor, right: Tensor) -> Tensor:
    """Ten times the divergence of the gate's map from the true one, over all elements, as the authors have it. []

    The first quarter of the query blocks is left out.
    """
    first = logits.shape[2] // 4
    return 10 * F.kl_div(logits[:, :, first:].log_softmax(-1), right[:, :, first:], reduction="none").mean()


class SeerAttention(nn.Module):
    """A gate and attention to what it chooses; takes query, key and value, and is told those without positions.

    While `learning`, attention is full and `loss` is that of the gate.
    """

    def __init__(self, gate: Gate, threshold: float | None, ratio: float | None) -> None:
        super().__init__()
        self.gate, self.threshold, self.ratio = gate, threshold, ratio
        self.learning = False
        self.loss: Tensor | None = None
        self.blocks: Tensor | None = None  # of the last forward pass; of a padded batch, of the rows that ran last
        self.given: dict[str, Tensor] = {}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, **how: Any) -> Tensor:
        block = self.gate.block
        if query.shape[2] != key.shape[2]:  # after a cache
            return seerattention(query, key, value, mask=mask, block=block, **how)
        raw = [self.given[name].flatten(2).unflatten(-1, (-1, query.shape[3])).transpose(1, 2) for name in ("q", "k")]
        if self.learning:
            logits = self.gate.logits(*(t.detach() for t in raw), mask=mask)
            self.loss = gate_loss(logits, truth(query, key, block=block, mask=mask, scale=how.get("scale")))
            return seerattention(query, key, value, mask=mask, block=block, **how)
        # How many blocks there are, and which are the last, is to be that of the text.
        run = partial(self._sparse, **how)
        return alone(run, [query, raw[0]], [raw[1], key, value], mask, itself=True, ahead=True)

    def _sparse(self, query: Tensor, raw_q: Tensor, raw_k: Tensor, key: Tensor, value: Tensor, mask: Any, **how: Any):
        with torch.no_grad():
            self.blocks = choose(self.gate(raw_q, raw_k, mask=mask), threshold=self.threshold, ratio=self.ratio)
        return seerattention(query, key, value, mask=mask, blocks=self.blocks, block=self.gate.block, **how)


def convert(
    model: nn.Module,
    *,
    threshold: float | None = None,
    ratio: float | None = None,
    base: float = 10000.0,
    **of_gate: Any,
) -> Callable[[], None]:
    """Give every attention of a model a gate, with new weights to be trained; gives the function that undoes it.

    threshold, ratio: as `choose` takes them; a threshold of 5e-4, that of the released gates, unless given. base: of
    the model's rotary positions. of_gate: as `Gate` takes it. Raises ValueError where an attention has no q_proj and
    k_proj, from which the gate takes what has no positions yet.

        undo = convert(model, block=64)
        distil(model, batches)
        undo()
    """
    threshold = 5e-4 if threshold is None and ratio is None else threshold
    found = attentions(model, None, "seerattention")
    places: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, (attention, _) in found.items():
        if not getattr(attention, "is_causal", True):
            raise ValueError(f"seerattention: {type(attention).__name__} sees later tokens too; it takes causal models")
        norms = [getattr(attention, f"{p}_norm", None) or getattr(attention, f"{p}_proj", None) for p in "qk"]
        if not all(isinstance(m, nn.Module) for m in norms):
            raise ValueError(f"seerattention: {name} has no q_proj and k_proj, whose queries and keys the gate pools")
        places[name] = list(zip("qk", norms, strict=True))  # type: ignore[arg-type]

    def made(dim: int, heads: int, kv_heads: int) -> nn.Module:
        return SeerAttention(Gate(dim, heads, kv_heads, base=base, **of_gate), threshold, ratio)

    take_away, handles = own(model, seerattention, made), []
    for name, each in places.items():
        given = found[name][0].mechanism.given  # type: ignore[union-attr]
        for which, module in each:
            handles.append(
                module.register_forward_hook(
                    lambda _, __, output, given=given, which=which: given.__setitem__(which, output)  # type: ignore[index]
                )
            )

    def undo() -> None:
        for handle in handles:
            handle.remove()
        take_away()

    return undo


def distil(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, rate: float = 1e-3) -> list[float]:
    """Train the gates of a converted model on its own attention; the loss of each step, mean over layers.

    batches: inputs of the model. Nothing else of it is trained.
    """
    modules = [m for m in model.modules() if isinstance(m, SeerAttention)]
    if not modules:
        raise ValueError("seerattention.distil: the model has no gates; call convert(model)")
    return distilled(model, modules, (p for m in modules for p in m.gate.parameters()), batches, rate)
