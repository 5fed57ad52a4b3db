"""Amizadeh et al. (arXiv:2509.15448): the block form nearest to softmax, and what a trained model keeps with it.

The model is the zoo's viewer, which names pairs of colour and shape; its tree has the class token and 16 squares of 2
x 2 patches. Controls: a tree of patches at random, each square by itself with the class token, and weights all alike.
Layers and bars were settled on other pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import zoo
from ...adapters.mechanisms import held
from ...catalog import Finding, Premise
from ...data.scenes import render, sample
from ...mechanisms import spec_of
from ...mechanisms.hierarchical import hierarchical, quadtree
from ...zoo.recipes import viewer
from .._measure import mean, seconds

SCALES = "small", "large"
PICTURES = {"small": 200, "large": 2000}
LAYERS: tuple[tuple[int, ...], ...] = (5,), (1, 3, 5)
OTHERS, MATRICES = 200, 5
N, SIDE = 1024, 8


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Distance to softmax beside other block forms; pairs named by a model that was not trained for it; cost."""
    expected = (
        "no other block form of 200 random ones, softmax averaged over blocks and softmax inside blocks has a lower "
        "divergence from softmax, for five matrices of scores; in the last layer of a model, and in every second one, "
        "at most half the loss of each control in pairs named, by two standard errors, and at most 4 points in the "
        "last layer alone; of 1024 tokens in eights, at most 0.1 of the operations of flat attention and half its time"
    )
    torch.manual_seed(seed)
    best = sum(_nearest() for _ in range(MATRICES))
    right = _named(PICTURES[scale], seed)
    dense = right.pop(((), "softmax"))
    lost = {way: dense - each for way, each in right.items()}
    ours = {layers: lost[layers, "tree"] for layers in LAYERS}
    gains = {(layers, name): mean(0.5 * each - ours[layers]) for (layers, name), each in lost.items() if name != "tree"}
    query, key, value = torch.randn(3, 1, 4, N, 64)
    own, flat = seconds(
        lambda: hierarchical(query, key, value, tree=(SIDE, SIDE)),
        lambda: F.scaled_dot_product_attention(query, key, value),
    )
    operations = spec_of(hierarchical).cost(N, N, 64, tree=(SIDE, SIDE)).operations / (4 * 64 * N * N)
    late = mean(ours[LAYERS[0]])
    holds = best == MATRICES and all(gain.above() for gain in gains.values()) and late.value <= 0.04
    holds = holds and operations <= 0.1 and own <= 0.5 * flat
    blind = {layers: mean(lost[layers, "all alike"]) for layers in LAYERS}
    matters = Premise(
        "attention matters there: weights all alike lose something",
        "5 points or more",
        ", ".join(f"{100 * each.value:.1f}" for each in blind.values()),
        all(each.value >= 0.05 for each in blind.values()),
    )

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        names = list(dict.fromkeys(name for _, name in lost))
        for i, layers in enumerate(LAYERS):
            heights = [100 * mean(lost[layers, name]).value for name in names]
            axes.bar([j + 0.4 * i for j in range(len(names))], heights, 0.4, label=f"layers {_said(layers)}")
        axes.set_xticks([j + 0.2 for j in range(len(names))], names)
        axes.set(ylabel="points lost", title="Pairs named, not trained for it")
        axes.legend()

    measured = (
        f"nearest to softmax for {best} of {MATRICES} matrices; dense names {mean(dense):.1%} of pairs; points lost: "
        + "; ".join(f"layer {_said(at)}, {name} {100 * mean(each).value:.1f}" for (at, name), each in lost.items())
        + f" (standard errors to {max(100 * mean(each).error for each in lost.values()):.1f}); {operations:.2f} of the "
        f"operations, {own / flat:.2f} of the time of flat attention"
    )
    return Finding(holds, measured, expected, seed, premises=[matters], draw=draw)


def _said(layers: Sequence[int]) -> str:
    return " ".join(map(str, layers))


def _nearest(n: int = 16, group: int = 4) -> bool:
    scores = torch.randn(n, n, dtype=torch.float64) * 1.5
    eye = torch.eye(n, dtype=torch.float64)[None, None]
    block = torch.arange(n) // group

    def form(scores: Tensor) -> Tensor:
        how = {"causal": False, "mask": None, "scale": 1.0, "tree": group}
        return spec_of(hierarchical).weights(scores[None, None], eye, **how)[0, 0]

    def far(weights: Tensor) -> float:
        return float((weights * (weights.clamp_min(1e-300).log() - scores.log_softmax(-1))).sum())

    same = block[:, None] == block
    mixing = F.one_hot(block).double() / group**0.5
    soft = scores.softmax(-1)
    averaged = torch.where(same, soft, mixing @ (mixing.T @ soft @ mixing) @ mixing.T)
    averaged = averaged / averaged.sum(-1, keepdim=True)
    others = [form(scores + 0.3 * torch.randn_like(scores)) for _ in range(OTHERS)]
    others += [averaged, scores.masked_fill(~same, -torch.inf).softmax(-1)]
    return far(form(scores)) <= min(map(far, others))


@torch.no_grad()
def _named(count: int, seed: int) -> dict[tuple[tuple[int, ...], str], Tensor]:
    """Share of each picture's pairs that are among as many highest scores. [picture] of each way"""
    model, _ = zoo.load("viewer")
    scenes = [sample(viewer.SEVERAL, viewer.HELD_OUT + seed, i) for i in range(count)]
    images, labels = viewer.pixels(render(scenes, viewer.SIZE)), viewer.labels(scenes)
    patches = viewer.SIZE // viewer.PATCH
    tree = quadtree((patches, patches), 1, before=1)
    shuffled = torch.cat([tree[:, :1], tree[:, 1:][:, torch.randperm(patches**2)]], 1)
    own = (tree[0][:, None] == tree[0]) | (tree[0] == 0) | (tree[0] == 0)[:, None]
    ways: dict[str, Callable[..., Tensor]] = {
        "tree": partial(hierarchical, tree=tree),
        "tree at random": partial(hierarchical, tree=shuffled),
        "own square": partial(_softmax, seen=own),
        "all alike": lambda query, key, value, **_: value.mean(2, keepdim=True).expand_as(value),
    }
    found = {}
    for layers, name, way in [((), "softmax", _softmax), *((ls, n, w) for ls in LAYERS for n, w in ways.items())]:
        with _with(model, layers, way):
            logits = torch.cat([model(part).logits for part in images.split(50)])
        pairs = labels.sum(-1).long()
        top = logits.argsort(-1, descending=True).argsort(-1) < pairs[:, None]
        found[layers, name] = (top & (labels > 0)).sum(-1) / pairs
    return found


def _softmax(query: Tensor, key: Tensor, value: Tensor, *, scale: float, seen: Any = None, **_: Any) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)


@contextmanager
def _with(model: Any, layers: Sequence[int], way: Callable[..., Tensor]) -> Iterator[None]:
    """In these layers attention is this operator, in the others softmax attention."""
    modules = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    before = model.config._attn_implementation
    for i, module in enumerate(modules):
        module.mechanism = way if i in layers else _softmax
    model.set_attn_implementation(held(hierarchical))
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for module in modules:
            del module.mechanism
