"""Attention to the keys that an estimate of the map, made at linear cost, holds to count.

Lee, Kim, Willette and Hwang, SEA: Sparse Linear Attention with Estimated Attention Mask (arXiv:2310.01777), section 3,
and the authors' code.

A Performer mixes values and codes of positions; from what each query gets of both, a small network draws a picture of
the map, as many cells wide as one chooses, whatever the number of keys. The best cells of a query over all heads, so
many that a head has `k` keys on average, are blown up to the keys that they stand for, and softmax attention runs over
these. A row is scaled by a learned factor and mixed with an average of values, by a learned share. All this is taught
by the map of a dense teacher; the choice has no gradient.

As in the code: random features are those of softmax where all tokens are seen and ReLU where causal, and keys of
padding still count in the Performer's denominator. Where causal, padding comes last. Left out: shifting positions by
chance in training, other ways to share the budget out, and oversampling. `distil` trains the estimate alone, layer by
layer beside dense attention, where the authors train the whole model. Dtypes below float32 are estimated in float32.
The cost is linear in tokens, yet on a CPU dense attention is still the faster one at 4,096 of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _pairs
from ._layers import attentions, distilled, own
from ._mechanism import Cost, by_head, mechanism, pairs, scale_of, softmax, visible
from ._scan import scan, tokens
from ._softmax import attend, runs_native
from .memory_efficient import memory_efficient

REDRAW = 1000  # calls in training after which random features are drawn anew


def counted(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """How many keys each query sees [batch, query], and of each key how many there are before it [batch, key]."""
    n = key.shape[2]
    there = torch.ones(len(query), n, dtype=torch.bool, device=key.device)
    there = there if mask is None else mask[:, 0, 0].expand(len(query), -1)
    number = there.cumsum(-1)
    return number if causal else number[:, -1:].expand(-1, query.shape[2]), number - 1


def cell(rank: Tensor, number: Tensor, width: int) -> Tensor:
    """The cell that stands for key `rank` of `number`, of a row `width` cells wide."""
    return ((rank + 0.5) / number.clamp_min(1) * width - 1e-4).floor().long().clamp(0, width)


def widened(small: Tensor, number: Tensor, rank: Tensor, seen: Tensor | None, fill: float) -> Tensor:
    """A map of cells [batch, head, query, cell] as one of keys, `fill` where nothing is seen. Holds the map"""
    at = cell(rank[:, None].float(), number[..., None].float(), small.shape[-1]).clamp_max(small.shape[-1] - 1)
    found = small.gather(-1, at[:, None].expand(*small.shape[:3], -1))
    return found if seen is None else found.masked_fill(~seen, fill)


def _first(at: Tensor, number: Tensor, width: int) -> Tensor:
    """The first key, of `number`, for which a cell from `at` on stands; `number` where there is none."""
    first = ((at * number).float() / width - 2).floor().clamp_min(0).long()
    for _ in range(4):  # what rounding does to the borders is left to `cell`
        first = first + ((first < number) & (cell(first.float(), number.float(), width) < at)).long()
    return torch.minimum(first, number)


def listed(cells: Tensor, number: Tensor, rank: Tensor, there: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pairs of the chosen cells [batch, head, query, cell], as `_pairs.attend` takes them, at the cost of these."""
    (_, heads, n_query, width), n = cells.shape, rank.shape[1]
    batch, head, query, at = cells.nonzero().unbind(1)
    seen = number[batch, query]
    begin = _first(at, seen, width)
    count = (_first(at + 1, seen, width).where(at + 1 < width, seen) - begin).clamp_min(0)
    of = torch.repeat_interleave(torch.arange(len(at), device=at.device), count)
    key = begin[of] + torch.arange(len(of), device=at.device) - (count.cumsum(0) - count)[of]
    if there is not None:
        order = (~there).to(torch.uint8).argsort(dim=-1, stable=True)  # those that are there, in their order
        key = order[batch[of], key]
    plane = (batch * heads + head)[of]
    return plane * n_query + query[of], plane * n + key


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    seen = _seen(query, key, causal=causal, mask=mask, cells=knobs.get("cells"))
    return softmax(query @ by_head(key, query.shape[1]).mT * scale_of(query, scale), seen)


def _seen(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, cells: Tensor | None) -> Tensor | None:
    seen = visible(query, key, causal=causal, mask=mask)
    if cells is None:
        return seen
    cells = cells.expand(*query.shape[:2], -1, -1)
    return widened(cells, *counted(query, key, causal=causal, mask=mask), seen, False)


def _cost(n_query: int, n_key: int, dim: int, *, causal: bool = True, cells: Tensor | None = None) -> Cost:
    """cells: of one head. What the estimate costs is `EstimatedMask.cost`."""
    taken = pairs(n_query, n_key, causal)
    if cells is not None:
        number = torch.arange(1, n_query + 1) if causal else torch.full((n_query,), n_key)
        taken = float((cells.sum(-1).flatten() * number / cells.shape[-1]).sum())
    return Cost(4 * dim * taken, 2 * dim * (n_query + (n_key if cells is None else taken)))


@mechanism("causal", "full", mask="keys", weights=_weights, cost=_cost)
def sea(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    cells: Tensor | None = None,
) -> Tensor:
    """Softmax attention to the keys of the chosen cells, at the cost of these. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]. cells: which parts of what it sees each
    query attends to, boolean [batch|1, head|1, query, cell], as `EstimatedMask` chooses them; None: all, which is
    softmax attention. mask: which keys there are, [batch, 1, 1, key]. Raises ValueError where cells and queries do not
    fit, and for cells of fewer queries than keys.

        >>> x = torch.randn(1, 4, 1000, 64)
        >>> sea(x, x, x, cells=torch.rand(1, 4, 1000, 32) < 0.1).shape
        torch.Size([1, 4, 1000, 64])
    """
    if cells is None:
        dense = attend if runs_native(query) else memory_efficient
        return dense(query, key, value, causal=causal, mask=mask, scale=scale_of(query, scale))
    n, shape = query.shape[2], query.shape[:2]
    if n != key.shape[2]:
        raise ValueError(f"sea: cells are of as many queries as keys; got {n} and {key.shape[2]}: pass all at once")
    fits = cells.ndim == 4 and cells.shape[2] == n and all(c in (1, s) for c, s in zip(cells.shape, shape))
    if cells.dtype != torch.bool or not fits:
        raise ValueError(
            f"sea: cells are boolean [batch, head, {n}, cell], for {n} queries; got {cells.dtype} {list(cells.shape)}"
        )
    number, rank = counted(query, key, causal=causal, mask=mask)
    there = None if mask is None else mask[:, 0, 0].expand(len(query), -1)
    row, column = listed(cells.expand(*shape, -1, -1), number, rank, there)
    return _pairs.attend(query, key, value, row, column, scale=scale_of(query, scale)).to(value.dtype)


class Estimate(NamedTuple):
    """What is known of the map before any score of a query and a key is made."""

    scores: Tensor  # [batch, head, query, cell]
    weights: Tensor  # softmax of these over cells; 0 for queries of padding
    cells: Tensor  # boolean, those that are attended to
    row: Tensor  # [batch, head, query, 1] by which the sparse map is scaled
    share: Tensor  # [batch, head, query, 1] of the sparse attention in the output, beside the average of values


class EstimatedMask(nn.Module):
    """The estimate, and attention by it; takes query, key and value.

    dim: of a head; width: cells of the estimate, a multiple of 2, of 4 where causal; k: keys that a query attends to in
    a head, on average; features: random ones of the Performer, dim log dim unless given; tokens: how many can be told
    apart where causal. While `learning`, attention is dense, and `loss` is how far the estimate, and the output by it,
    are from this.
    """

    projection: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool,
        width: int = 128,
        k: int = 7,
        features: int | None = None,
        tokens: int = 2048,
    ) -> None:
        step, planes = (4, 2) if causal else (2, 4)
        if width < 1 or width % step or k < 1 or dim < 2:
            raise ValueError(
                f"sea: width is a multiple of {step}, k is 1 or more, and a head has 2 channels or more; got {width=}, "
                f"{k=}, {dim=}"
            )
        super().__init__()
        self.dim, self.heads, self.causal, self.width, self.k, self.tokens = dim, heads, causal, width, k, tokens
        self.planes, self.learning, self.calls = planes, False, 0
        self.loss: Tensor | None = None
        self.estimated: Estimate | None = None  # of the last forward pass
        self.encode = nn.Sequential(nn.Linear(3 * dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU())
        self.draw = nn.Linear(2 * dim, width // step * planes)
        self.picture: _Causal | _Full = (_Causal if causal else _Full)(heads, width)
        self.scales = nn.Linear(2 * dim, 2)
        self.codes = nn.Parameter(torch.randn(1, 1, tokens, dim)) if causal else None
        self.register_buffer("projection", torch.empty(features or max(int(dim * math.log(dim)), 1), dim))
        self.redraw()

    @torch.no_grad()
    def redraw(self) -> None:
        """Draw the random features anew: orthogonal ones, as long as those of a normal distribution."""
        rows, dim = self.projection.shape
        blocks = [torch.linalg.qr(torch.randn(dim, dim)).Q.mT for _ in range(-(-rows // dim))]
        length = torch.randn(rows, dim).norm(dim=-1, keepdim=True)
        self.projection.copy_(torch.cat(blocks)[:rows] * length)

    def mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What the Performer makes of them. [batch, head, query, dim]"""
        raw = [t @ self.projection.mT * self.dim**-0.25 for t in (query, key)]
        if not self.causal:
            size = [t.square().sum(-1, keepdim=True) / (2 * self.dim**0.5) for t in (query, key)]
            most = raw[0].amax(-1, keepdim=True).detach(), raw[1].amax((-1, -2), keepdim=True).detach()
            each = ((r - s - m).exp() + 1e-4 for r, s, m in zip(raw, size, most, strict=True))
            q, k = (len(self.projection) ** -0.5 * e for e in each)
            return q @ (k.mT @ value) / (q @ k.sum(-2)[..., None])
        q, k = (r.relu() + 1e-3 for r in raw)
        with_one = torch.cat([value, torch.ones_like(value[..., :1])], -1)
        start = q.new_zeros(*q.shape[:2], q.shape[-1], with_one.shape[-1])
        found, _ = scan(_strip, (start,), (q, k, with_one), strip=min(tokens(with_one), 256))
        assert found is not None
        return found[..., :-1] / (found[..., -1:] + 1e-6 * q.sum(-1, keepdim=True))

    def estimate(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None) -> Estimate:
        """From query, key and value [batch, head, token, dim], at a cost linear in tokens.

        mask: which keys there are, [batch, 1, 1, token].
        """
        n = query.shape[2]
        if n != key.shape[2]:
            raise ValueError(
                f"sea: estimates the map of all tokens at once; got {n} queries and {key.shape[2]} keys: run a model "
                f"with use_cache=False"
            )
        if query.shape[1] != self.heads:
            raise ValueError(f"sea: was made for {self.heads} heads; got {query.shape[1]}")
        there = None if mask is None else mask[:, 0, 0].expand(len(query), -1)
        if self.causal and there is not None and (there.long().diff(dim=-1) > 0).any():
            raise ValueError("sea: where causal, padding comes after all tokens: pad on the right")
        number, rank = counted(query, key, causal=self.causal, mask=mask)
        key, value = (by_head(t, self.heads) for t in (key, value))
        if self.codes is not None:
            if n > self.tokens:
                raise ValueError(f"sea: was made for {self.tokens} tokens at most; got {n}: give more as tokens={n}")
            codes = self.codes[:, :, :n]
        else:
            codes = _places(rank, number[:, :1], self.dim).to(value)[:, None]
            if mask is not None:
                codes, value = codes * mask.mT, value * mask.mT
        given = torch.cat([self.mixed(query, key, torch.cat([codes.expand_as(value), value], -1)), value], -1)
        known = self.encode(given)
        drawn = self.draw(known).unflatten(-1, (self.planes, -1)).transpose(2, 3).flatten(1, 2)
        scores = self.picture(drawn)
        weights = scores.softmax(-1)
        row, share = self.scales(known).sigmoid().chunk(2, -1)
        if mask is not None and not self.causal:
            weights = weights * mask.mT
        return Estimate(scores, weights, self.choose(weights.detach(), number, there), row, share)

    @torch.no_grad()
    def choose(self, weights: Tensor, number: Tensor, there: Tensor | None) -> Tensor:
        """The best cells of each query, over all heads together. [batch, head, query, cell], boolean"""
        flat = weights.transpose(1, 2).flatten(2)
        budget = (self.heads * self.k * self.width / number.clamp_min(1).float()).round()
        budget = budget.clamp(1, flat.shape[-1]).long()
        best = flat.topk(int(budget.max()), dim=-1).indices
        taken = (torch.arange(best.shape[-1], device=best.device) < budget[..., None]).expand_as(best)
        if there is not None and not self.causal:
            taken = taken & there[..., None]
        cells = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, best, taken)
        return cells.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def shown(self, small: Tensor, *, mask: Tensor | None = None, fill: float = 0.0) -> Tensor:
        """A map of cells, of an estimate, as one of keys; `fill` at what is not seen. [batch, head, query, key]"""
        like = small[..., :1]
        seen = visible(like, like, causal=self.causal, mask=mask)
        return widened(small, *counted(like, like, causal=self.causal, mask=mask), seen, fill)

    def average(self, value: Tensor, estimated: Estimate, *, mask: Tensor | None) -> Tensor:
        """Of values: by the mean row of the estimate, or of all so far where causal. [batch, head, query|1, dim]"""
        if self.causal:
            number = torch.arange(1, value.shape[2] + 1, device=value.device)
            return value.cumsum(2) / number[:, None]
        number, rank = counted(value[:, :, :1], value, causal=False, mask=mask)
        return widened(estimated.weights.mean(2, keepdim=True), number, rank, mask, 0.0) @ value

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        causal: bool | None = None,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """[batch, head, query, dim]. scale: of the scores; None: dim^-0.5. The estimate sees queries as given."""
        if causal is not None and causal != self.causal:
            raise ValueError(f"sea: was made with causal={self.causal}; got causal={causal}")
        how = {"causal": self.causal, "mask": mask, "scale": scale}
        if self.training or self.learning:
            self.calls += 1
            if self.calls % REDRAW == 0:
                self.redraw()
        dtype, exact = value.dtype, torch.promote_types(value.dtype, self.draw.weight.dtype)
        query, key, value = (t.to(exact) for t in (query, key, value))
        found = self.estimated = self.estimate(query, key, value, mask=mask)
        output = sea(query, key, value, cells=found.cells, **how) * found.row
        average = self.average(by_head(value, self.heads), found, mask=mask)
        output = found.share * output + (1 - found.share) * average
        self.loss = None
        if not self.learning:
            return output.to(dtype)
        right = sea(query, key, value, **how)
        teacher = query @ by_head(key, self.heads).mT * scale_of(query, scale)
        wide = self.shown(found.scores, mask=mask)
        self.loss = map_loss(wide, teacher.detach(), causal=self.causal, mask=mask)
        self.loss = self.loss + F.mse_loss(output, right.detach())
        return right.to(dtype)

    def cost(self, n: int) -> float:
        """Operations of the estimate, of one head of n tokens."""
        width, dim = self.draw.weight.shape
        performer = 2 * n * len(self.projection) * (self.dim * 2 + 2 * (dim + 1))
        return performer + 2 * n * (3 * self.dim * dim + dim * width + 2 * dim) + self.picture.cost(n) / self.heads


def map_loss(scores: Tensor, teacher: Tensor, *, causal: bool, mask: Tensor | None = None) -> Tensor:
    """How far the softmax of scores is from that of a teacher's, both [batch, head, query, key]. []

    0.1 times the divergence of a token, of all heads together or, where causal, their mean, and the mean squared
    difference of all weights. An estimate's scores are made as wide by `EstimatedMask.shown`.
    """
    if scores.shape != teacher.shape or teacher.shape[2] != teacher.shape[3]:
        raise ValueError(f"sea: compares maps of all keys; got {list(scores.shape)} and {list(teacher.shape)}")
    seen = visible(teacher, teacher, causal=causal, mask=mask)
    lowest = torch.finfo(scores.dtype).min / 2
    ours, right = (t if seen is None else t.masked_fill(~seen, lowest) for t in (scores, teacher))
    log_ours, right = ours.log_softmax(-1), right.softmax(-1)
    apart = torch.xlogy(right, right) - right * log_ours
    if causal:
        divergence = apart.sum() / apart[..., 0].numel()
    else:
        there = apart.new_ones(apart[:, 0, 0].shape) if mask is None else mask[:, 0, 0].expand(len(apart), -1)
        divergence = (apart * there[:, None, :, None]).sum() / there.sum()
    return 0.1 * divergence + F.mse_loss(log_ours.exp(), right)


def _strip(state: tuple[Tensor, ...], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    (before,) = state
    return (query @ key.mT).tril() @ value + query @ before, (before + key.mT @ value,)


def _places(rank: Tensor, number: Tensor, dim: int) -> Tensor:
    """Codes of positions: rows of the identity, in between them where there are other tokens. [batch, token, dim]"""
    at = (rank / (number - 1).clamp_min(1) * (dim - 1)).clamp(0, dim - 1)
    return (1 - (at[..., None] - torch.arange(dim, device=at.device)).abs()).clamp_min(0)


class _Full(nn.Module):
    """The picture drawn over: [batch, 4 head, token, width / 2] to [batch, head, token, width]."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width, inner = heads, width, 4 * heads
        self.convs = nn.ModuleList(
            (
                nn.Conv2d(inner, inner, 3, padding=1, stride=(2, 1)),
                nn.Conv2d(inner, inner, 3, padding=1),
                nn.Conv2d(inner, heads, 3, padding=1),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.convs
        found = last(F.interpolate(second(first(x).relu()).relu(), scale_factor=(2, 1), mode="nearest"))
        return F.interpolate(found, (x.shape[2], self.width), mode="bilinear")

    def cost(self, n: int) -> float:
        # the two first ones at half the rows
        return 2 * 9 * n * self.width / 2 * (8 + 8 + 4) * self.heads**2


class _Causal(nn.Module):
    """The same of [batch, 2 head, token, width / 4], each row of what stands in it and above it."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width, inner = heads, width, 2 * heads
        self.norms = nn.ModuleList((nn.LayerNorm(width // 4), nn.LayerNorm(width)))
        self.convs = nn.ModuleList(
            (
                nn.Conv2d(inner, inner, 3, dilation=2),
                nn.Conv2d(inner, inner, 3, dilation=2),
                nn.Conv2d(inner, heads, 1, padding=(0, 1)),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        n, x = x.shape[2], self.norms[0](x)
        for conv in list(self.convs)[:2]:
            x = conv(F.pad(x, (2, 2, 4, 0))).relu()
        found = self.convs[2](F.interpolate(x, scale_factor=(1, 4), mode="nearest"))
        return self.norms[1](F.interpolate(found, (n, self.width), mode="area"))

    def cost(self, n: int) -> float:
        return 2 * n * self.width * (9 * 2 + 2) * self.heads**2


def convert(model: nn.Module, *, causal: bool | None = None, **of_mask: Any) -> Callable[[], None]:
    """Give every attention of a model an estimate, with new weights to train; gives the function that undoes it.

    causal: what the model's attention is, by what it says unless given. of_mask: as `EstimatedMask` takes it. A causal
    model then runs without a cache. Raises ValueError where the model is none of transformers'.

        undo = convert(model, width=32, k=8)
        distil(model, batches)
        undo()
    """
    if causal is None:
        causal = any(getattr(a, "is_causal", False) for a, _ in attentions(model, None, "sea").values())

    def made(dim: int, heads: int, kv_heads: int) -> nn.Module:
        return EstimatedMask(dim, heads, causal=causal, **of_mask)

    return own(model, sea, made)


def distil(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, rate: float = 1e-3) -> list[float]:
    """Train the estimates of a converted model on its own dense attention; the loss of each step, mean over layers.

    batches: inputs of the model. Nothing else of it is trained.
    """
    modules = [m for m in model.modules() if isinstance(m, EstimatedMask)]
    if not modules:
        raise ValueError("sea.distil: the model has no estimates; call convert(model)")
    return distilled(model, modules, (p for m in modules for p in m.parameters()), batches, rate)
