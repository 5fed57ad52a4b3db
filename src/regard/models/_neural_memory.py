"""The memory of `regard.models.titans`: a network for each row and head, trained on its tokens one after another."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Weights = dict[str, Tensor]  # of the memory's network, each [batch, head, ...]


class State(NamedTuple):
    """What a memory holds between two calls."""

    weights: Weights
    momentum: Weights
    start: Weights  # the weights at the start of the batch, of which gradients are taken
    chunks: int  # learned so far
    waiting: Tensor  # tokens that do not fill a chunk yet [batch, token, dim]


class NeuralMemory(nn.Module):
    """Recalls by a network that it trains on each token in turn. [batch, query, dim] -> [batch, query, dim]

    heads, head_dim: of independent networks, and how wide each is, dim unless given; depth, expansion: matrices of a
    network, with GELU between, and how much wider the hidden layers are; chunk: tokens of one update; batch: tokens
    whose gradients are taken at the same weights, None: all of a text at the first ones; max_step: the largest step;
    residual: the network adds to its input; normed: query and key have length 1, and the three maps pass a SiLU, as in
    the text. A token recalls with what the chunks that end before or with it have left. It has no softmax for
    `regard.record` to see.

    Raises ValueError where batch is no multiple of chunk.

    >>> import torch
    >>> from regard.models.titans import NeuralMemory
    >>> memory, x = NeuralMemory(8, heads=2), torch.randn(1, 6, 8)
    >>> found, state = memory(x[:, :4])
    >>> rest, _ = memory(x[:, 4:], state)
    >>> torch.allclose(torch.cat([found, rest], 1), memory(x)[0], atol=1e-5)
    True
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        head_dim: int | None = None,
        depth: int = 2,
        expansion: float = 4.0,
        chunk: int = 1,
        batch: int | None = None,
        max_step: float = 1.0,
        residual: bool = True,
        normed: bool = False,
    ) -> None:
        super().__init__()
        if min(heads, depth, chunk) < 1 or (batch is not None and (batch < 1 or batch % chunk)):
            raise ValueError(
                f"NeuralMemory: heads, depth and chunk are 1 or more, and batch a multiple of chunk; "
                f"got {heads=}, {depth=}, {chunk=}, {batch=}"
            )
        self.heads, self.chunk, self.batch, self.max_step = heads, chunk, batch, max_step
        self.residual, self.normed = residual, normed
        own = dim if head_dim is None else head_dim
        self.store_norm, self.retrieve_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, heads * own, bias=False) for _ in range(3))
        self.step, self.momentum, self.decay = (nn.Linear(dim, heads) for _ in range(3))
        joined = heads > 1 or own != dim
        self.gate = nn.Linear(dim, heads, bias=False) if heads > 1 else None
        self.output = nn.Linear(heads * own, dim, bias=False) if joined else nn.Identity()
        widths = [own, *[int(own * expansion)] * (depth - 1), own]
        first = {str(i): torch.empty(heads, a, b) for i, (a, b) in enumerate(pairwise(widths))}
        for weight in (w for of in first.values() for w in of):
            nn.init.xavier_uniform_(weight)
        if residual:
            first["gain"] = torch.zeros(heads, 1, own)
        self.first = nn.ParameterDict({name: nn.Parameter(weight) for name, weight in first.items()})

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """x: [batch, query, dim] -> what each token recalls, and the state to go on from."""
        state = self._state(x, state)
        query, found = self._split(self.query(self.retrieve_norm(x)), unit=True), []
        weights, at = state.weights, 0
        whole = torch.cat([state.waiting, x], 1)
        count = whole.shape[1] // self.chunk
        parts = self._parts(whole[:, : count * self.chunk], count) if count else {}
        surprise, first = {}, 0
        for i in range(count):
            if i == 0 or self._starts(state.chunks):  # gradients of the batch, at its first weights
                left = count if self.batch is None else self.batch // self.chunk
                left -= 0 if self.batch is None else state.chunks % left
                surprise = self._surprise(state.start, {n: part[:, :, i : i + left] for n, part in parts.items()})
                first = i
            last = (i + 1) * self.chunk - state.waiting.shape[1] - 1  # the chunk's last token is the first to recall it
            found.append(self._network(weights, query[:, :, at:last]))
            eta, alpha = (parts[name][:, :, i, None] for name in ("momentum", "decay"))
            momentum = {n: eta * s - surprise[n][:, :, i - first] for n, s in state.momentum.items()}
            weights = {n: (1 - alpha) * w + momentum[n] for n, w in weights.items()}
            start = weights if self._starts(state.chunks + 1) else state.start
            state, at = State(weights, momentum, start, state.chunks + 1, state.waiting), last
        found.append(self._network(weights, query[:, :, at:]))
        state = state._replace(waiting=whole[:, count * self.chunk :])
        return self._joined(torch.cat(found, 2), x), state

    def recalled(self, x: Tensor, state: State | None = None) -> Tensor:
        """What tokens [batch, query, dim] recall with the weights as they are; nothing is learned."""
        state = self._state(x, state)
        return self._joined(self._network(state.weights, self._split(self.query(self.retrieve_norm(x)), unit=True)), x)

    def _state(self, x: Tensor, state: State | None) -> State:
        if x.ndim != 3 or x.shape[-1] != self.query.in_features:
            raise ValueError(f"NeuralMemory: takes [batch, query, {self.query.in_features}]; got {list(x.shape)}")
        if state is not None:
            return state
        first = {name: w.expand(len(x), *w.shape) for name, w in self.first.items()}
        return State(first, {n: torch.zeros_like(w) for n, w in first.items()}, first, 0, x[:, :0])

    def _starts(self, chunks: int) -> bool:
        return self.batch is not None and chunks % (self.batch // self.chunk) == 0

    def _split(self, x: Tensor, *, unit: bool) -> Tensor:
        x = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if not self.normed:
            return x
        return F.normalize(F.silu(x), dim=-1) if unit else F.silu(x)

    def _parts(self, x: Tensor, count: int) -> Weights:
        """Of each chunk: key, value, step [batch, head, chunk, token, ...]; momentum, decay [batch, head, chunk, 1]."""
        x = self.store_norm(x)
        mean = x.unflatten(1, (count, self.chunk)).mean(2)
        found = {
            "key": self._split(self.key(x), unit=True),
            "value": self._split(self.value(x), unit=False),
            "step": self.step(x).sigmoid().mT[..., None] * self.max_step,
        }
        found = {name: of.unflatten(2, (count, self.chunk)) for name, of in found.items()}
        return found | {name: getattr(self, name)(mean).sigmoid().mT[..., None] for name in ("momentum", "decay")}

    def _surprise(self, weights: Weights, parts: Mapping[str, Tensor]) -> Weights:
        """The gradient of each chunk's error, its tokens weighed by their steps. [batch, head, chunk, ...]"""
        count = parts["key"].shape[2]

        def error(each: Weights) -> Tensor:
            off = (self._network(each, parts["key"]) - parts["value"]).square().mean(-1, keepdim=True)
            return (off * parts["step"]).sum()

        return torch.func.grad(error)({n: w[:, :, None].expand(-1, -1, count, -1, -1) for n, w in weights.items()})

    def _network(self, weights: Weights, x: Tensor) -> Tensor:
        found = x
        for i in range(len(weights) - self.residual):
            found = (F.gelu(found) if i else found) @ weights[str(i)]
        if not self.residual:
            return found
        return F.layer_norm(found, found.shape[-1:]) * (weights["gain"] + 1) + x

    def _joined(self, found: Tensor, x: Tensor) -> Tensor:
        found = found.transpose(1, 2)
        if self.gate is not None:
            found = found * self.gate(self.retrieve_norm(x)).sigmoid()[..., None]
        return self.output(found.flatten(2))
