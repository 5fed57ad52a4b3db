"""Attention of a graph's relations: what nodes of one kind tell nodes of another, and several such messages in one.

As Tran et al. have it (arXiv:2307.12729, see `persistent_transient`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import register


class Told(NamedTuple):
    """What receivers are told, by which weights of which values."""

    message: Tensor  # [batch, receiver, head * dim]
    weights: Tensor  # over senders; sums to 1, or to 0 where there is none to hear [batch, head, receiver, sender]
    values: Tensor  # [batch, head, sender, dim]


class RelationAttention(nn.Module):
    """What senders of one kind tell receivers of another. [batch, receiver, dim], [batch, sender, dim] to `Told`

    Scores are an MLP of both sides' linear maps, with a ReLU after its last layer too; with several heads, one linear
    layer without a bias and that ReLU. same: whether both kinds are one, and share their map. `regard.record` sees
    cross attention.

    >>> import torch
    >>> from regard.models._relations import RelationAttention
    >>> RelationAttention(6, 4)(torch.randn(2, 3, 6), torch.randn(2, 5, 6)).message.shape
    torch.Size([2, 3, 4])
    """

    def __init__(self, dim: int, width: int, *, heads: int = 1, same: bool = False) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"RelationAttention: a width of {width} does not divide by {heads} heads")
        self.heads, each = heads, width // heads
        self.send = nn.Linear(dim, width, bias=False)
        self.receive = self.send if same else nn.Linear(dim, width, bias=False)
        if heads == 1:
            self.score = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1), nn.ReLU())
        else:
            self.score = nn.Sequential(nn.Linear(2 * each, 1, bias=False), nn.ReLU())

    def forward(self, receivers: Tensor, senders: Tensor, mask: Tensor | None = None) -> Told:
        """mask: boolean [batch, receiver, sender], True for who is heard; a receiver that hears none is told zeros."""
        asked, told = (
            some.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for some in (self.receive(receivers), self.send(senders))
        )
        n, k = asked.shape[2], told.shape[2]
        pairs = torch.cat(
            [told[:, :, None].expand(-1, -1, n, -1, -1), asked[:, :, :, None].expand(-1, -1, -1, k, -1)], -1
        )
        scores = self.score(pairs)[..., 0]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        if mask is not None:
            weights = weights * mask[:, None]
        return Told((weights @ told).transpose(1, 2).flatten(2), weights, told)


def _read(module: nn.Module, args: Any, kwargs: Any, output: Told) -> tuple[Tensor, Tensor]:
    return output.weights, output.values


register(RelationAttention, _read)


class Mixed(nn.Module):
    """Messages of several relations in one, by weights of the relations that are the same for all nodes of a sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project, self.weigh = nn.Linear(width, width), nn.Linear(width, 1, bias=False)

    def forward(self, *messages: Tensor) -> Tensor:
        """Each [batch, node, width]."""
        every = torch.stack(messages, 1)
        beta = self.weigh(self.project(every).tanh()).mean(2).softmax(1)
        return (beta[..., None, :] * every).sum(1)
