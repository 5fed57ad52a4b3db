"""Attention over a tree of tokens: the one closest to softmax attention whose weights are the same within blocks.

Amizadeh et al., Hierarchical Self-Attention: Generalizing Neural Attention Mechanics to Multi-Scale Problems
(arXiv:2509.15448), sections 3 and 4.

Tokens are the leaves of a given tree. Between the leaves of two siblings all weights of a row are the same, and a row
is the same for all leaves of a node as far as it leads out of it. Of all such weights these have the least sum over
rows of KL(weights || softmax). With s(B, C) the mean score between the leaves of siblings B and C, |C| the leaves of C,
and e(leaf) its score with itself, up the tree

    Z(B) = exp e(B) + sum over siblings C of |C| exp s(B, C)
    e(A) = sum over children B of |B| / |A| log Z(B)

and down it, a leaf of B puts exp s(B, C) / Z(B) on each leaf of C, and exp e(B) / Z(B) stays inside B. Mean scores are
scores of mean queries and keys, so only means of subtrees are needed. A tree of one level is softmax attention.

Deviation: the paper writes energies as distances of normalised queries and keys, and adds codes of positions of
siblings; these are dot products, as for a model that was trained with them. Masked tokens are leaves of no node, and
get zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._mechanism import Cost, by_head, mechanism, scale_of

Tree = int | Sequence[int] | Tensor


def quadtree(shape: Sequence[int], levels: int, *, before: int = 0) -> Tensor:
    """Nested squares of a grid of 2, 4, ... to a side, as a tree of `levels`; tokens before it hang from the root.

    [level, token] numbers of groups.
    """
    rows, columns = shape
    at = torch.arange(rows * columns)
    found = []
    for level in range(1, levels + 1):
        side = 2**level
        group = at // columns // side * -(-columns // side) + at % columns // side
        found.append(torch.cat([torch.arange(before), before + group]))
    return torch.stack(found)


def _levels(tree: Tree, n: int) -> list[Tensor]:
    """Of each level, from the leaves up, the parent of each node; the root is that of the last."""
    if isinstance(tree, Tensor):
        if tree.ndim != 2 or tree.shape[1] != n or tree.is_floating_point() or not len(tree):
            raise ValueError(
                f"hierarchical: a tree is [level, token] numbers of groups, of {n} tokens; got {list(tree.shape)} "
                f"{tree.dtype}"
            )
        found, node = [], torch.arange(n)
        for level, group in enumerate(tree.cpu()):
            _, parent = group.unique(return_inverse=True)
            count = int(node.max()) + 1
            of = torch.zeros(count, dtype=torch.long).scatter_(0, node, parent)
            if not torch.equal(of[node], parent):
                raise ValueError(f"hierarchical: groups of level {level} cut groups of the level below; nest them")
            found.append(of)
            node = parent
        count = int(node.max()) + 1
    else:
        sizes = [tree] if isinstance(tree, int) else list(tree)
        if any(size < 1 for size in sizes):
            raise ValueError(f"hierarchical: a group holds 1 node or more; got {tree}")
        found, count = [], n
        for size in sizes:
            found.append(torch.arange(count) // size)
            count = -(-count // size)
    return [*found, torch.zeros(count, dtype=torch.long)]


def _children(parent: Tensor) -> Tensor:
    """[node, slot] the children of each node; -1: none"""
    count = parent.bincount()
    found = torch.full((len(count), int(count.max())), -1)
    found[parent, _slots(parent)] = torch.arange(len(parent))
    return found


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    """From scores of all pairs and their means over blocks."""
    heads, n = query.shape[1:3]
    scores = query @ by_head(key, heads).mT * scale_of(query, scale)
    there = torch.ones(1, 1, 1, n, dtype=torch.bool) if mask is None else mask
    there = there.expand(len(query), -1, -1, -1)[:, 0, 0].to(query.dtype)
    found = torch.zeros_like(scores)
    for b in range(len(query)):
        node = torch.arange(n)
        energy = scores[b].diagonal(dim1=1, dim2=2)
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        for parent in _levels(knobs.get("tree", 8), n):
            of = torch.nn.functional.one_hot(node, len(parent)).to(scores) * there[b, :, None]  # [leaf, node]
            size = of.sum(0)
            means = of.T @ scores[b] @ of / (size[:, None] * size).clamp_min(1)
            own = torch.eye(len(parent), dtype=torch.bool)
            means = torch.where(own, energy[:, :, None], means + size.clamp_min(1).log())
            siblings = (parent[:, None] == parent) & (size > 0)
            inside = means.masked_fill(~siblings, torch.finfo(scores.dtype).min)
            kept.append((of, size, torch.where(siblings & (size > 0)[:, None], inside.softmax(-1), 0.0)))
            up = torch.nn.functional.one_hot(parent).to(scores) * size[:, None]
            energy = (inside.logsumexp(-1) @ up) / up.sum(0).clamp_min(1)
            node = parent[node]
        mass = torch.ones_like(energy[:, node])  # [head, leaf] that stays inside the node of each
        for of, size, shares in reversed(kept):
            own = torch.eye(len(size), dtype=torch.bool)
            out = of @ (shares.masked_fill(own, 0.0) / size.clamp_min(1)) @ of.T
            found[b] = found[b] + mass[..., None] * out
            mass = mass * (of @ shares.diagonal(dim1=1, dim2=2)[..., None])[..., 0]
        found[b] = found[b] + torch.diag_embed(mass)
    return found


def _cost(n_query: int, n_key: int, dim: int, *, causal: bool = False, tree: Tree = 8, **_: Any) -> Cost:
    taken = sum(float(parent.bincount().double().square().sum()) for parent in _levels(tree, n_key))
    return Cost(4 * dim * taken + 6 * dim * n_key, 8 * dim * n_key)


@mechanism("full", mask="keys", weights=_weights, cost=_cost)
def hierarchical(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    tree: int | Sequence[int] | Tensor = 8,
) -> Tensor:
    """Attention with one weight for each pair of siblings of a tree, the nearest to softmax. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]. tree: tokens of a group; sizes of groups,
    groups of groups and so on; or numbers of groups [level, token], from the leaves up, each level of whole groups of
    the one below (see `quadtree`). What has no group yet at the last level are the root's children. Each row of the
    weights sums to 1. mask: which keys there are, [batch, 1, 1, key]; the others' queries get zeros. Raises ValueError
    for causal attention, as the paper has none, and for a tree of other tokens.

        >>> x = torch.randn(1, 4, 3000, 64)
        >>> hierarchical(x, x, x, tree=(8, 8)).shape
        torch.Size([1, 4, 3000, 64])
    """
    heads, n = query.shape[1:3]
    exact = torch.promote_types(query.dtype, torch.float32)
    there = torch.ones(1, 1, 1, n, dtype=torch.bool, device=key.device) if mask is None else mask
    count = there[:, :, 0, :, None].to(exact)  # [batch|1, 1, node, 1]
    # A node is its leaves' means, and at first the leaf itself.
    q, k, v = (by_head(t, heads).to(exact).where(count > 0, 0.0) for t in (query * scale_of(query, scale), key, value))
    energy = (q * k).sum(-1)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for parent in _levels(tree, n):
        at = _children(parent).to(query.device)
        none, slots = at < 0, at.clamp_min(0)
        qs, ks, vs = (t[:, :, slots] for t in (q, k, v))  # [batch, head, node, child, dim]
        size = count[:, :, slots, 0].masked_fill(none, 0.0)
        logits = qs @ ks.mT + size.clamp_min(1).log()[..., None, :]
        own = torch.eye(at.shape[1], dtype=torch.bool, device=at.device)
        logits = torch.where(own, energy[:, :, slots][..., None], logits)
        logits = logits.masked_fill(~(size > 0)[..., None, :], torch.finfo(exact).min)
        shares = torch.where((size > 0)[..., None] & (size > 0)[..., None, :], logits.softmax(-1), 0.0)
        kept.append((parent.to(query.device), shares, shares.masked_fill(own, 0.0) @ vs))
        count = size.sum(-1, keepdim=True)
        of = size[..., None] / count.clamp_min(1)[..., None]
        energy = (logits.logsumexp(-1) * of[..., 0]).sum(-1)
        q, k, v = ((t * of).sum(-2) for t in (qs, ks, vs))
    output, mass = torch.zeros_like(v), torch.ones_like(energy)
    for parent, shares, outside in reversed(kept):
        # Back from [node, child] to the children in order.
        slot = _slots(parent)
        inside = shares.diagonal(dim1=-2, dim2=-1)[:, :, parent, slot]
        mass = mass[:, :, parent]
        output = output[:, :, parent] + mass[..., None] * outside[:, :, parent, slot]
        mass = mass * inside
    own = by_head(value, heads).to(exact).where(there[:, :, 0, :, None], 0.0)
    return (output + mass[..., None] * own).where(there[:, :, 0, :, None], 0.0).to(value.dtype)


def _slots(parent: Tensor) -> Tensor:
    """Which child of its parent each node is."""
    order = parent.argsort(stable=True)
    count = parent.bincount()
    found = torch.empty_like(parent)
    found[order] = torch.arange(len(parent), device=parent.device) - (count.cumsum(0) - count)[parent[order]]
    return found
