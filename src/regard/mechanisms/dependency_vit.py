"""Attention applied the other way round: each token picks its parents, and sends them what it holds.

Ding et al., Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention (arXiv:2304.03282). No code
of the authors was at hand: details are those of a public reading of the paper, marked unverified by its author.

A = softmax over keys of query . key says how child i spreads over parents j. It is applied transposed: output_j = sum
over i of A[i, j] p[i, head] m[i] value_i. p, the head selector, is a softmax over heads of W x_i / 0.1; m, the message
controller, is sigmoid(W2 gelu(W1 x_i)) times what it was in the layer before, so that it only falls. Rows of the
applied map do not sum to 1: `regard.record` refuses such weights, and `ReversedAttention` keeps them as `dependency`.

Our readings: a token's parent is the argmax of what it sends to others, and the tree is only as acyclic as that (the
paper takes a maximum spanning tree, which `tree` does not); tokens are pruned by what they receive, as the public
reading has it, or by what they send, as the paper's text has it: `prune` takes either score. Pruned tokens are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._layers import exchanged, fill, not_causal, square
from ._mechanism import Cost, by_head, mechanism, pairs, recomputed, scale_of, softmax
from ._modules import module

STRIP = 2**22  # weights made at once


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    sent = softmax(query @ by_head(key, query.shape[1]).mT * scale_of(query, scale), mask)
    return _sent(sent, mask, knobs.get("head_weight"), knobs.get("message")).mT


def _sent(weights: Tensor, mask: Tensor | None, head_weight: Tensor | None, message: Tensor | None) -> Tensor:
    """[batch, head, child, parent]; a child that is not there sends nothing."""
    if head_weight is not None:
        weights = weights * head_weight.mT[..., None]
    if message is not None:
        weights = weights * message[:, None, :, None]
    return weights if mask is None else weights.where(mask.mT, 0.0)


def _cost(n_query: int, n_key: int, dim: int, *, causal: bool = False, **_: Any) -> Cost:
    return Cost(4 * dim * pairs(n_query, n_key, causal), 2 * dim * (n_query + n_key))


@mechanism("full", mask="keys", weights=_weights, cost=_cost)
def dependency_vit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    head_weight: Tensor | None = None,
    message: Tensor | None = None,
) -> Tensor:
    """What each token is sent by those that chose it as a parent. [batch, head, query, dim]

    query: of children, [batch, head, query, dim]; key: of parents; value: of children; [batch, kv_head, key, dim].
    causal: must be False. mask: which tokens there are, [batch, 1, 1, key]; others neither send nor are sent anything.
    head_weight: how much of its message a child sends by each head, [batch, query, head]; message: how much it sends at
    all, [batch, query]; 1 unless given. Over parents, what child i sends by a head sums to head_weight times message.
    Raises ValueError where these do not fit.

        >>> x = torch.randn(1, 4, 50, 16)
        >>> dependency_vit(x, x, x).shape
        torch.Size([1, 4, 50, 16])
    """
    batch, heads, n, _ = query.shape
    for name, given, shape in (("head_weight", head_weight, (batch, n, heads)), ("message", message, (batch, n))):
        if given is not None and given.shape != shape:
            raise ValueError(f"dependency_vit: {name} is {list(shape)}; got {list(given.shape)}")
    scale, output = scale_of(query, scale), None
    step = max(1, STRIP // (batch * heads * n))
    for start in range(0, n, step):
        part = recomputed(_strip, query, key, value, mask, scale, head_weight, message, slice(start, start + step))
        output = part if output is None else output + part
    assert output is not None
    return output.to(value.dtype)


def _strip(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    head_weight: Tensor | None,
    message: Tensor | None,
    rows: slice,
) -> Tensor:
    """What the children of these rows send to all."""
    exact, heads = torch.promote_types(query.dtype, torch.float32), query.shape[1]
    scores = query[:, :, rows].to(exact) @ by_head(key, heads).to(exact).mT * scale
    sent = softmax(scores, mask)
    if mask is not None:
        sent = sent.where(mask.mT[:, :, rows], 0.0)
    chosen = None if head_weight is None else head_weight[:, rows].to(exact)
    sent = _sent(sent, None, chosen, None if message is None else message[:, rows].to(exact))
    return sent.mT @ by_head(value, heads)[:, :, rows].to(exact)


@module("full", build=lambda dim, heads: ReversedAttention(dim, heads))
class ReversedAttention(nn.Module):
    """The paper's layer: hidden states and messages so far, to the same of the next layer, and who sent whom what.

    temperature: of the head selector; the public reading says that 0.1 gave NaN in training, and that 1 did not.

    >>> output, message, dependency = ReversedAttention(16, 4)(torch.randn(2, 9, 16))
    >>> output.shape, message.shape, dependency.shape
    (torch.Size([2, 9, 16]), torch.Size([2, 9]), torch.Size([2, 9, 9]))
    """

    is_causal = False

    def __init__(self, dim: int, heads: int, *, temperature: float = 0.1, bias: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dependency_vit: {heads} heads do not share {dim} channels evenly")
        self.heads, self.temperature = heads, temperature
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim)
        self.selector = nn.Linear(dim, heads, bias=False)
        self.controller = nn.Sequential(
            nn.Linear(dim, dim // 2, bias=False), nn.GELU(), nn.Linear(dim // 2, 1, bias=False)
        )

    def forward(
        self, hidden: Tensor, message: Tensor | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """message: [batch, token], 1 before the first layer; mask: which tokens there are, boolean [batch, token].

        The last of the three, [batch, parent, child], is summed over heads.
        """
        if message is not None and message.shape != hidden.shape[:2]:
            raise ValueError(
                f"dependency_vit: messages so far are [batch, token] = {list(hidden.shape[:2])}; got "
                f"{list(message.shape)}: all layers of a model have to have the same tokens"
            )
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        chosen = (self.selector(hidden) / self.temperature).softmax(-1)
        now = self.controller(hidden)[..., 0].sigmoid()
        so_far = now if message is None else message * now
        there = None if mask is None else mask[:, None, None]
        sent = _sent(softmax(query @ key.mT * scale_of(query, None), there), there, chosen, so_far).mT
        output = self.proj((sent @ value).transpose(1, 2).flatten(2))
        return output, so_far, sent.sum(1)


def tree(dependency: Tensor) -> Tensor:
    """Each token's parent: whom it sends most to beside itself. [batch, token], an index

    dependency: [batch, parent, child], of a layer or summed over several. The root is the token that `root` gives.
    """
    own = torch.eye(dependency.shape[-1], dtype=torch.bool, device=dependency.device)
    return dependency.masked_fill(own, float("-inf")).argmax(1)


def root(dependency: Tensor) -> Tensor:
    """The token that is sent most by others. [batch], an index"""
    own = torch.eye(dependency.shape[-1], dtype=torch.bool, device=dependency.device)
    return dependency.masked_fill(own, 0.0).sum(2).argmax(1)


def received(dependency: Tensor) -> Tensor:
    """What each token is sent, itself among the senders. [batch, token]"""
    return dependency.abs().sum(2)


def prune(hidden: Tensor, score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` tokens of the highest score, in their order: [batch, keep, dim], and their indices [batch, keep].

    The paper's lite models drop 16% of all tokens after layers 2, 5, 8 and 11.
    """
    if score.shape != hidden.shape[:2] or not 1 <= keep <= hidden.shape[1]:
        raise ValueError(
            f"dependency_vit.prune: takes a score {list(hidden.shape[:2])} and keeps 1 to {hidden.shape[1]} tokens; "
            f"got {list(score.shape)} and {keep=}"
        )
    kept = score.topk(keep, 1).indices.sort(1).values
    return hidden.take_along_dim(kept[..., None], 1), kept


class InTurn(nn.Module):
    """A layer that takes up the messages where the one before it left them."""

    def __init__(self, attention: ReversedAttention, before: InTurn | None) -> None:
        super().__init__()
        self.attention, self.before = attention, [before]
        self.message: Tensor | None = None  # of the last forward pass [batch, token]
        self.dependency: Tensor | None = None  # of the last forward pass [batch, parent, child]

    def forward(self, hidden: Tensor) -> Tensor:
        before = self.before[0]
        output, self.message, self.dependency = self.attention(hidden, None if before is None else before.message)
        return output


def convert(model: nn.Module, *, temperature: float = 1.0) -> Callable[[], None]:
    """Put reversed attention where every attention of an encoder is; gives the function that undoes it.

    Queries, keys, values and outputs keep their weights, but send now what they fetched; the model is to be trained on.
    `turns(model)` gives the layers, each with `message` and `dependency` of the last forward pass. temperature: of the
    head selector. Raises ValueError where a layer has no such weights.

        undo = convert(model)
        model(pixel_values=pixels)
        parents = tree(turns(model)[-1].dependency)
        undo()
    """
    last: list[InTurn | None] = [None]

    def made(attention: nn.Module, dim: int) -> nn.Module:
        not_causal(attention, "dependency_vit")
        heads, parts = square(attention, dim, "dependency_vit")
        layer = ReversedAttention(dim, heads, temperature=temperature, bias=parts[0].bias is not None)
        fill(layer.qkv, *parts[:3])
        fill(layer.proj, parts[3])
        last[0] = InTurn(layer, last[0])
        return last[0]

    return exchanged(model, made, None, "dependency_vit")


def turns(model: nn.Module) -> list[InTurn]:
    """The layers of a converted model, in order."""
    return [module for module in model.modules() if isinstance(module, InTurn)]
