"""Ding et al. (arXiv:2304.03282): patches of one object find each other as parents, and leaves can be pruned.

Pictures of 6 x 6 cells hold two objects of 2 x 3 cells, of four kinds; a model of two layers is trained to name both
kinds, with reversed attention and with ordinary attention of the same size. Labels alone are given; the paper trains
on its own features too. A token's parent is whom it sends most to, or, in ordinary attention, whom it looks at most,
beside itself, over both layers. Chance is the share of other cells on the same object. Pruned are 17 of 36 tokens
between the layers, by what they are sent, and as many at random, which is the control. The head selector's temperature
is 1. Rate and steps were chosen on seed 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...mechanisms.dependency_vit import ReversedAttention, prune, received, tree
from .._measure import mean

SIDE, KINDS, CHANNELS, DIM, HEADS, STEPS, BATCH, RATE, TESTED, KEPT = 6, 4, 8, 32, 2, 250, 64, 3e-3, 1000, 19


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Share of parents on the same object, and pictures named with all tokens, with the pruned and with random ones."""
    expected = (
        "cells of an object have their parent on it 15 points more often than chance, and 5 more than with ordinary "
        "attention; without 17 of 36 tokens 2 points fewer are named, without as many at random 5 or more; each by two "
        "standard errors over pictures"
    )
    cells, kinds, owner = _pictures(TESTED, torch.Generator().manual_seed(10_000 + seed), _looks(seed))
    backward, ordinary = (_trained(reverse, seed) for reverse in (True, False))
    with torch.no_grad():
        right, sent = _named(backward, cells, kinds)
        plain, looked = _named(ordinary, cells, kinds)
        fewer, _ = _named(backward, cells, kinds, keep="received")
        random, _ = _named(backward, cells, kinds, keep="random")
    chance = 5 / (SIDE * SIDE - 1)
    ours, theirs = (_together(tree(of), owner) for of in (sent, looked))
    over, beside = mean(ours - chance), mean(ours - theirs)
    pruned, lost = mean(right - fewer), mean(right - random)
    holds = over.above(0.15) and beside.above(0.05) and pruned.below(0.02) and lost.above(0.05)
    planted = torch.zeros(1, 3, 3)
    planted[0, 0, 1:], planted[0, 2, 0] = 1.0, 0.5
    parents = tree(planted)[0].tolist()
    premises = [
        Premise("a planted tree is found", "parents 2, 0, 0", f"{parents}", parents == [2, 0, 0]),
        Premise("the task is learned", "70% or more", f"{float(right.mean()):.1%}", float(right.mean()) >= 0.7),
    ]
    measured = (
        f"parents on the same object {float(ours.mean()):.2f}, chance {chance:.2f}, ordinary attention "
        f"{float(theirs.mean()):.2f} (more by {beside:.3f}); named {float(right.mean()):.1%} (ordinary "
        f"{float(plain.mean()):.1%}), pruned less by {pruned:.3f}, at random by {lost:.3f}"
    )
    shares = {"reversed": float(ours.mean()), "ordinary": float(theirs.mean()), "chance": chance}
    return Finding(holds, measured, expected, seed, premises=premises, draw=partial(_draw, shares=shares))


def _draw(figure: Any, *, shares: dict[str, float]) -> None:
    axes = figure.subplots()
    axes.bar(list(shares), list(shares.values()))
    axes.set(ylabel="share of parents on the same object", ylim=(0, 1))


def _looks(seed: int) -> Tensor:
    """What each kind looks like. [kind, channel]"""
    return torch.randn(KINDS, CHANNELS, generator=torch.Generator().manual_seed(seed))


def _pictures(count: int, generator: torch.Generator, looks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cells [picture, token, channel], which kinds there are [picture, kind], and each token's object, 0 for none."""
    cells = 0.7 * torch.randn(count, SIDE, SIDE, CHANNELS, generator=generator)
    owner = torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    kinds = torch.rand(count, KINDS, generator=generator).argsort(-1)[:, :2]
    column = torch.randint(SIDE - 2, (count, 2), generator=generator)
    row = torch.randint(2, (count, 2), generator=generator) + torch.tensor([0, 3])
    each = torch.arange(count)
    for i in range(2):
        for down in range(2):
            for right in range(3):
                at = each, row[:, i] + down, column[:, i] + right
                cells[at] += 1.5 * looks[kinds[:, i]]
                owner[at] = i + 1
    return cells.flatten(1, 2), F.one_hot(kinds, KINDS).sum(1).float(), owner.flatten(1)


class _Ordinary(nn.Module):
    """Attention of the same size; gives what a reversed one gives, [batch, key, query] for who looks at whom."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, hidden: Tensor, message: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        query, key, value = self.qkv(hidden).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2)), None, weights.sum(1).mT


class _Model(nn.Module):
    def __init__(self, reverse: bool) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(CHANNELS, DIM), nn.Parameter(0.1 * torch.randn(SIDE * SIDE, DIM))
        self.attentions = nn.ModuleList(
            ReversedAttention(DIM, HEADS, temperature=1.0, bias=True) if reverse else _Ordinary() for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(5))
        mlps = (nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)) for _ in range(2))
        self.mlps, self.output = nn.ModuleList(mlps), nn.Linear(DIM, KINDS)

    def forward(self, cells: Tensor, keep: str = "all") -> tuple[Tensor, Tensor]:
        """Logits of the kinds, and who sent whom how much, of both layers where none is pruned."""
        hidden, message, sent = self.embed(cells) + self.places, None, torch.zeros(())
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            added, message, now = attention(self.norms[2 * i](hidden), message)
            hidden = hidden + added
            hidden = hidden + mlp(self.norms[2 * i + 1](hidden))
            sent = now if keep != "all" else sent + now
            if keep != "all" and not i:
                score = received(now) if keep == "received" else torch.rand(now.shape[:2])
                hidden, at = prune(hidden, score, KEPT)
                message = None if message is None else message.gather(1, at)
        hidden = self.norms[4](hidden)
        hidden = hidden if message is None else hidden * message[..., None]
        return self.output(hidden.mean(1)), sent


def _named(model: _Model, cells: Tensor, kinds: Tensor, keep: str = "all") -> tuple[Tensor, Tensor]:
    """Whether both kinds of each picture are named, and who sent whom how much."""
    torch.manual_seed(0)
    logits, sent = model(cells, keep)
    best = torch.zeros_like(kinds).scatter(1, logits.topk(2, 1).indices, 1.0)
    return (best == kinds).all(1).double(), sent


def _together(parents: Tensor, owner: Tensor) -> Tensor:
    """Share of each picture's object cells whose parent lies on the same object."""
    same = (owner.gather(1, parents) == owner) & (owner > 0)
    return same.double().sum(1) / (owner > 0).sum(1)


def _trained(reverse: bool, seed: int) -> _Model:
    torch.manual_seed(seed)
    model, generator, looks = _Model(reverse), torch.Generator().manual_seed(seed), _looks(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 20, 2 * (STEPS - step) / STEPS)
        cells, kinds, _ = _pictures(BATCH, generator, looks)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(cells)[0], kinds).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model
