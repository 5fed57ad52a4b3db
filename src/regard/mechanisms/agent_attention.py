"""Attention in two steps over a few agents: they gather from the keys by softmax, and hand out to the queries.

Han et al., Agent Attention: On the Integration of Softmax and Linear Attention (arXiv:2312.08874), sections 3.2 and
3.3; `AgentAttention` as in LeapLabTHU/Agent-Attention. With agents A, s = dim^-0.5 and biases B,

    output = softmax(s Q A^T + B_2) softmax(s A K^T + B_1) V

which is linear attention with the two softmaxes for feature maps, of rank at most the number of agents. Agents are
means of the queries: of square cells of the grid of patches, or without a grid of runs of the sequence, our reading for
text. The paper's diffusion models use other scales and add values (`second_scale`, `shortcut`).

Deviation: of as many keys as queries, what a mask leaves out is no query either, and enters no agent.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._mechanism import Cost, by_head, mechanism, scale_of, softmax
from ._scan import State, scan, tokens

Bias = tuple[Tensor | None, Tensor | None]  # [batch|1, head|1, agent, key], [batch|1, head|1, query, agent]


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    (first, second), scale = feature_maps(query, key, mask=mask, scale=scale, **knobs)
    return second @ first


def feature_maps(
    query: Tensor, key: Tensor, *, mask: Tensor | None = None, scale: float | None = None, **knobs: Any
) -> tuple[tuple[Tensor, Tensor], float]:
    """The two maps, [batch, head, agent, key] and [batch, head, query, agent], and the scale."""
    scale, bias = scale_of(query, scale), knobs.get("bias", (None, None))
    agent = knobs.get("agent")
    if agent is None:
        agent = pooled(query, knobs.get("agents", 49), knobs.get("shape"), mask if _same(query, key) else None)
    gathering = agent @ by_head(key, query.shape[1]).mT * scale
    handing = query @ agent.mT * (knobs.get("second_scale") or scale)
    first, second = (s if b is None else s + b for s, b in zip((gathering, handing), bias))
    return (softmax(first, mask), second.softmax(-1)), scale


def _cost(n_query: int, n_key: int, dim: int, *, agents: int = 49, **_: Any) -> Cost:
    return Cost(4 * dim * agents * (n_query + n_key), 2 * dim * (n_query + n_key) + 3 * dim * agents)


def _same(query: Tensor, key: Tensor) -> bool:
    return query.shape[2] == key.shape[2]


def pooled(query: Tensor, agents: int, shape: tuple[int, int] | None = None, mask: Tensor | None = None) -> Tensor:
    """Means of queries, over cells of a grid of this shape or over runs of the sequence. [batch, head, agent, dim]

    Cells and runs are of equal size, but for rounding, and then overlap by one. mask: which queries there are,
    [batch, 1, 1, query].
    """
    if shape is not None:
        side = math.isqrt(agents)
        if side * side != agents or math.prod(shape) != query.shape[2] or mask is not None:
            raise ValueError(
                f"agent_attention: agents stand on a grid, so that they are a square number, and patches fill theirs, "
                f"without a mask; got {agents=}, {shape=}, {query.shape[2]} queries"
                f"{'' if mask is None else ', and a mask'}"
            )
        grid = query.mT.flatten(0, 1).unflatten(-1, shape)
        return F.adaptive_avg_pool2d(grid, side).flatten(2).unflatten(0, query.shape[:2]).mT
    if mask is None:
        return F.adaptive_avg_pool1d(query.mT.flatten(0, 1), agents).unflatten(0, query.shape[:2]).mT
    there = mask.to(query.dtype)
    rank, count = there.cumsum(-1) - 1, there.sum(-1, keepdim=True)
    run = torch.arange(agents, device=query.device, dtype=query.dtype)[:, None]
    start, end = (run * count / agents).floor(), ((run + 1) * count / agents).ceil()
    share = ((rank >= start) & (rank < end)).to(query.dtype) * there
    return share / share.sum(-1, keepdim=True).clamp_min(1) @ query.where(mask.mT, 0.0)


@mechanism("full", "cross", mask="keys", weights=_weights, cost=_cost)
def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    agents: int = 49,
    shape: tuple[int, int] | None = None,
    agent: Tensor | None = None,
    bias: Bias = (None, None),
    second_scale: float | None = None,
    shortcut: float = 0.0,
) -> Tensor:
    """Attention through a few agents, in linear time. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]. Rows of the weights are 0 or more and sum
    to 1. mask: which keys there are, [batch, 1, 1, key], and which queries where there are as many. agents: how many;
    shape: rows and columns of patches, where agents are a square number; agent: other agents, [batch, head, agent,
    dim]. bias: added to the scores of keys, [batch|1, head|1, agent, key], and of agents, [batch|1, head|1, query,
    agent]. second_scale: of the agents' scores, as `scale` unless given. shortcut: share of the values that is added.
    Raises ValueError for causal attention.

        >>> x = torch.randn(1, 4, 3000, 64)
        >>> agent_attention(x, x, x).shape
        torch.Size([1, 4, 3000, 64])
    """
    if agents < 1 or (shortcut and not _same(query, key)):
        raise ValueError(
            f"agent_attention: takes 1 agent or more, and a shortcut of as many values as queries; got {agents=}, "
            f"{shortcut=}, {query.shape[2]} queries and {key.shape[2]} keys"
        )
    heads, exact = query.shape[1], torch.promote_types(query.dtype, torch.float32)
    of_keys, of_agents = bias
    if agent is None:
        agent = pooled(query.to(exact), agents, shape, mask if _same(query, key) else None)
    scale = scale_of(query, scale)
    second = scale if second_scale is None else second_scale
    named = {"mask": None if mask is None else mask.mT, "bias": None if of_keys is None else of_keys.mT}
    extra = {name: t for name, t in named.items() if t is not None}

    def gather(state: State, key: Tensor, value: Tensor, *more: Tensor) -> tuple[None, State]:
        agent, top, total, mixed = state
        given = dict(zip(extra, more, strict=True))
        scores = agent @ by_head(key, heads).to(exact).mT * scale
        scores = scores + given["bias"].mT if "bias" in given else scores
        scores = scores.masked_fill(~given["mask"].mT, float("-inf")) if "mask" in given else scores
        higher = torch.maximum(top, scores.detach().amax(-1, keepdim=True))
        shares, kept = torch.exp(scores - higher), torch.exp(top - higher)
        total = total * kept + shares.sum(-1, keepdim=True)
        return None, (agent, higher, total, mixed * kept + shares @ by_head(value, heads).to(exact))

    def hand_out(state: State, query: Tensor, *bias: Tensor) -> tuple[Tensor, State]:
        agent, gathered = state
        scores = query.to(exact) @ agent.mT * second
        scores = scores + bias[0] if bias else scores
        return (scores.softmax(-1) @ gathered).to(value.dtype), state

    agent = agent.to(exact)
    top = agent.new_full((*agent.shape[:3], 1), torch.finfo(exact).min)
    held = agent, top, torch.zeros_like(top), agent.new_zeros(*agent.shape[:3], value.shape[-1])
    strip = tokens(query)
    total, mixed = scan(gather, held, (key, value, *extra.values()), strip=strip)[1][2:]
    strips = (query,) if of_agents is None else (query, of_agents)
    output, _ = scan(hand_out, (agent, mixed / total.where(total > 0, 1.0)), strips, strip=strip)
    assert output is not None
    return output if not shortcut else output + shortcut * by_head(value, heads)


class AgentAttention(nn.Module):
    """The paper's layer in place of self-attention over a grid of patches: [batch, token, dim] to the same.

    Adds learned biases, enlarged from 7 x 7, and a depthwise convolution of the values. shape: rows and columns of
    patches; a class token, if there is one, comes first. reduction: of rows and columns of keys and values, by a
    strided convolution, as in pyramid models.

    >>> layer = AgentAttention(64, heads=4, shape=(14, 14))
    >>> layer(torch.randn(2, 196, 64)).shape
    torch.Size([2, 196, 64])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        shape: tuple[int, int],
        agents: int = 49,
        class_token: bool = False,
        reduction: int = 1,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        if dim % heads or math.isqrt(agents) ** 2 != agents or any(side % reduction for side in shape):
            raise ValueError(
                f"AgentAttention: heads share channels evenly, agents are a square number, and a reduction divides "
                f"rows and columns; got {dim=}, {heads=}, {agents=}, {shape=}, {reduction=}"
            )
        self.heads, self.agents, self.shape, self.class_token = heads, agents, shape, class_token
        self.reduction = reduction
        keys = tuple(side // reduction for side in shape)
        self.query, self.key_value = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.output = nn.Linear(dim, dim)
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        if reduction > 1:
            self.reduce, self.norm = nn.Conv2d(dim, dim, reduction, stride=reduction), nn.LayerNorm(dim)

        def learned(*sizes: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(sizes), std=0.02))

        # Of an agent and each patch; of an agent and each row, and column; of an agent and the class token.
        self.key_bias, self.key_rows, self.key_columns = (
            learned(heads, agents, 7, 7),
            learned(heads, agents, keys[0], 1),
            learned(heads, agents, 1, keys[1]),
        )
        self.query_bias, self.query_rows, self.query_columns = (
            learned(heads, agents, 7, 7),
            learned(heads, agents, shape[0], 1),
            learned(heads, agents, 1, shape[1]),
        )
        if class_token:
            self.key_class, self.query_class = learned(heads, agents, 1), learned(heads, agents, 1)

    def biases(self) -> tuple[Tensor, Tensor]:
        """[1, head, agent, key] and [1, head, query, agent]"""
        found = []
        for which in ("key", "query"):
            rows, columns = getattr(self, f"{which}_rows"), getattr(self, f"{which}_columns")
            coarse, sides = getattr(self, f"{which}_bias"), (rows.shape[2], columns.shape[3])
            bias = (F.interpolate(coarse, sides, mode="bilinear") + rows + columns).flatten(2)
            found.append(torch.cat([getattr(self, f"{which}_class"), bias], -1) if self.class_token else bias)
        return found[0][None], found[1][None].mT

    def forward(self, hidden: Tensor) -> Tensor:
        first = int(self.class_token)
        if hidden.ndim != 3 or hidden.shape[1] != first + math.prod(self.shape):
            raise ValueError(
                f"AgentAttention: takes {first + math.prod(self.shape)} tokens, of {self.shape} patches"
                f"{' after a class token' if first else ''}; got {list(hidden.shape)}"
            )
        source = hidden
        if self.reduction > 1:
            source = self.norm(self.reduce(hidden[:, first:].mT.unflatten(2, self.shape)).flatten(2).mT)
            source = torch.cat([hidden[:, :first], source], 1)
        query = self._by_head(self.query(hidden))
        key, value = (self._by_head(t) for t in self.key_value(source).chunk(2, -1))
        agent = pooled(query[:, :, first:], self.agents, self.shape)
        mixed = agent_attention(query, key, value, agent=agent, bias=self.biases())
        picture = value[:, :, first:].transpose(1, 2).flatten(2).mT.unflatten(2, self._key_shape())
        if self.reduction > 1:
            picture = F.interpolate(picture, self.shape, mode="bilinear")
        local = F.pad(self.local(picture).flatten(2).mT, (0, 0, first, 0))
        return self.output(mixed.transpose(1, 2).flatten(2) + local)

    def _by_head(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _key_shape(self) -> tuple[int, int]:
        return self.shape[0] // self.reduction, self.shape[1] // self.reduction
