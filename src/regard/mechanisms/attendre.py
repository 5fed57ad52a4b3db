"""A stream that attends to a bounded memory; queries wait until the keys that follow them have come.

Yang and Hua, Attendre: Wait To Attend By Retrieval With Evicted Queries in Memory-Based Transformers for Long Context
Processing (arXiv:2401.04881). Tokens come in chunks. Their keys and values enter a memory, out of which others are
evicted: the oldest ("fifo"), those used least recently ("lra"), or least ("lfa"). Their queries enter a queue; those
that leave it, `wait` tokens later, attend to what the memory then holds, which is before and after them. At the end of
the stream the queue is emptied.

No code was at hand, and of the paper its abstract; these are our choices: attention is to all of the memory, not to a
retrieved part of it; an entry's use is the weight that it gets from the queries of its key head, whose sum counts for
"lfa"; for "lra" it is used by a query that gives no other more; a new entry counts as used once, and is not evicted in
the step it comes in; of entries alike the oldest is evicted; each key head has a memory of its own. Without
waiting, queries see their own chunk whole, or causal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._mechanism import Cost, by_head, mechanism, scale_of, softmax
from .memory_efficient import fold

POLICIES = ("fifo", "lra", "lfa")


class _Memory(NamedTuple):
    """Entries of each key head. [batch, kv_head, entry, ...]"""

    key: Tensor
    value: Tensor
    position: Tensor  # -1: nothing there
    use: Tensor  # what the policy goes by; the least is evicted


class Attendre:
    """Attention to a stream, a chunk at a time; memory and queue are as long at its end as at its beginning.

    memory, wait: tokens, whole chunks; policy: of eviction; causal: of the own chunk, where queries do not wait.

    >>> stream = Attendre(chunk=16, memory=64, wait=32)
    >>> for part in torch.randn(1, 4, 160, 8).split(16, 2):
    ...     output, positions = stream.step(part, part, part)
    >>> output.shape, positions[0].item(), stream.flush()[0].shape
    (torch.Size([1, 4, 16, 8]), 112, torch.Size([1, 4, 32, 8]))
    """

    def __init__(
        self,
        *,
        chunk: int,
        memory: int,
        wait: int = 0,
        policy: str = "fifo",
        causal: bool = False,
        scale: float | None = None,
    ) -> None:
        _check(chunk, memory, wait, policy)
        if causal and wait:
            raise ValueError(f"attendre: causal queries have nothing to wait for; got {wait=}")
        self.chunk, self.memory, self.wait, self.policy = chunk, memory, wait, policy
        self.causal, self.scale = causal, scale
        self.held: _Memory | None = None
        self.queue: list[tuple[Tensor, Tensor, Tensor]] = []  # chunks of queries, their positions, which there are
        self.taken = self.steps = 0

    def step(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A chunk more: the outputs of the queries that attend now, none at first, and their positions.

        query: [batch, head, token, dim]; key, value: [batch, kv_head, token, dim]; mask: which keys there are,
        [batch, 1, 1, token].
        """
        n = query.shape[2]
        if n > self.chunk or key.shape[2] != n:
            raise ValueError(
                f"attendre: takes chunks of {self.chunk} tokens or fewer; got {n}, and {key.shape[2]} keys"
            )
        at = torch.arange(self.taken, self.taken + n, device=query.device)
        there = torch.ones(1, 1, 1, n, dtype=torch.bool, device=query.device) if mask is None else mask
        self._insert(key, value, at, there)
        self.queue.append((query, at, there))
        self.taken, self.steps = self.taken + n, self.steps + 1
        if len(self.queue) * self.chunk <= self.wait:
            return query.new_empty(*query.shape[:2], 0, value.shape[-1]), at[:0]
        return self._attend(*self.queue.pop(0))

    def flush(self) -> tuple[Tensor, Tensor]:
        """The end of the stream: the outputs of all queries that still wait, and their positions."""
        if not self.queue:
            raise ValueError("attendre: no query waits")
        parts = [self._attend(*waiting) for waiting in self.queue]
        self.queue = []
        return torch.cat([output for output, _ in parts], 2), torch.cat([at for _, at in parts])

    def bytes(self) -> int:
        """What memory and queue hold now."""
        held = [] if self.held is None else list(self.held)
        return sum(t.nbytes for t in (*held, *(query for query, *_ in self.queue)))

    def _insert(self, key: Tensor, value: Tensor, at: Tensor, there: Tensor) -> None:
        batch, heads, n = key.shape[:3]
        position = at.expand(batch, heads, n).where(there[:, 0], -1)
        exact = torch.promote_types(key.dtype, torch.float32)
        use = at if self.policy == "fifo" else torch.full_like(at, self.steps if self.policy == "lra" else 1)
        new = _Memory(key, value, position, use.to(exact).expand(batch, heads, n))
        fresh = torch.full_like(new.use, float("inf"))
        if self.held is not None:
            fresh = torch.cat([self.held.use, fresh], 2)
            new = _Memory(*(torch.cat([old, added], 2) for old, added in zip(self.held, new)))
        if fresh.shape[2] > self.memory:
            # The least used last, the older one of two alike; entries are in the order of their coming.
            use = fresh.masked_fill(new.position < 0, float("-inf")).flip(2)
            order = use.sort(dim=2, descending=True, stable=True).indices[:, :, : self.memory]
            order = (use.shape[2] - 1 - order).sort(dim=2).values
            new = _Memory(*(_taken(t, order) for t in new))
        self.held = new

    def _attend(self, query: Tensor, at: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        held = self.held
        assert held is not None
        heads, kv_heads, exact = query.shape[1], held.key.shape[1], torch.promote_types(query.dtype, torch.float32)
        scores = query.to(exact) @ by_head(held.key, heads).to(exact).mT * scale_of(query, self.scale)
        seen = (held.position >= 0)[:, :, None]
        if self.causal:
            seen = seen & (held.position[:, :, None] <= at[:, None])
        seen = by_head(seen, heads)
        weights = softmax(scores, seen)
        if self.policy != "fifo":
            shares = fold(weights.detach().where(there.mT, 0.0), kv_heads)
            if self.policy == "lfa":
                use = held.use + shares.sum(2)
            else:
                most = torch.zeros_like(shares).scatter(-1, shares.argmax(-1, keepdim=True), 1.0) * (shares > 0)
                use = held.use.where(most.amax(2) == 0, float(self.steps))
            self.held = held._replace(use=use)
        return (weights @ by_head(held.value, heads).to(exact)).to(held.value.dtype), at


def _taken(tensor: Tensor, order: Tensor) -> Tensor:
    return tensor.gather(2, order if tensor.ndim == 3 else order[..., None].expand(-1, -1, -1, tensor.shape[3]))


def _check(chunk: int, memory: int, wait: int, policy: str) -> None:
    if chunk < 1 or memory < chunk or memory % chunk or wait < 0 or wait % chunk or policy not in POLICIES:
        raise ValueError(
            f"attendre: memory and wait are whole chunks, of memory one or more, and policy is one of {POLICIES}; got "
            f"{chunk=}, {memory=}, {wait=}, {policy=}"
        )


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    """Which key goes where depends on the weights themselves, so keys are followed by values that name them."""
    named = torch.eye(key.shape[2], dtype=query.dtype, device=query.device).expand(*key.shape[:3], -1)
    return attendre(query, key, named, causal=causal, mask=mask, scale=scale, **knobs)


def _cost(n_query: int, n_key: int, dim: int, *, chunk: int = 64, memory: int = 512, **_: Any) -> Cost:
    chunks = -(-n_query // chunk)
    return Cost(4 * dim * n_query * min(memory, n_key), 2 * dim * (n_query + chunks * min(memory, n_key)))


@mechanism("causal", "full", mask="keys", weights=_weights, cost=_cost, whole=True)
def attendre(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    chunk: int = 64,
    memory: int = 512,
    wait: int = 256,
    policy: str = "fifo",
) -> Tensor:
    """Softmax attention of a stream to a bounded memory, before and after each query. [batch, head, query, dim]

    query: [batch, head, token, dim]; key, value: [batch, kv_head, token, dim]. mask: which keys there are,
    [batch, 1, 1, key]; the others take no place in the memory. chunk: tokens that come at once; memory: keys held, of
    each key head; wait: tokens that a query waits for, 0 where attention is causal; policy: which entries go, "fifo",
    "lra" or "lfa". With "fifo", wait w and memory m, query i in chunk a sees the m keys up to the end of chunk
    a + w / chunk; with as much memory and wait as there are tokens, all of them. For a stream that never ends, and to
    go on token by token, use `Attendre`. Raises ValueError for what are no whole chunks.

        >>> x = torch.randn(1, 4, 1000, 64)
        >>> attendre(x, x, x).shape
        torch.Size([1, 4, 1000, 64])
    """
    stream = Attendre(chunk=chunk, memory=memory, wait=0 if causal else wait, policy=policy, causal=causal, scale=scale)
    parts = []
    for a in range(0, query.shape[2], chunk):
        where = slice(a, a + chunk)
        there = None if mask is None else mask[..., where]
        parts.append(stream.step(query[:, :, where], key[:, :, where], value[:, :, where], mask=there)[0])
    if stream.queue:
        parts.append(stream.flush()[0])
    return torch.cat(parts, 2)
