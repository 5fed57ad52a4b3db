"""One run: a small model with a mechanism, trained on a task, judged, and measured beside one with softmax attention.

Models are equal but for their mechanism, and as large: the width of the feed-forward layers makes up for what weights a
mechanism has, or lacks. Time is processor time of training steps, taken in turns with softmax attention's.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..claims._measure import peak_bytes
from ..mechanisms._layers import SelfAttention
from .candidates import SOFTMAX, Candidate, Heads, candidate, first, softmax
from .tasks import Data, Task

RATE, CLIP = 3e-3, 1.0
WARM = 0.1  # share of the steps in which the rate rises; then it falls to 0 in a straight line


@dataclass(frozen=True)
class Scale:
    """How large models are, how long they are trained, and how long one may take."""

    steps: int
    layers: int = 2
    dim: int = 64
    heads: int = 4
    wide: int = 2  # feed-forward layers over dim, beside softmax attention
    seeds: int = 3
    limit: float = 60.0  # processor seconds of a training; what would take longer is left out
    rounds: int = 9  # of timing, after one that does not count


SCALES = {
    "tiny": Scale(4, dim=32, seeds=2, rounds=2),  # for trying out: nothing is learned
    "small": Scale(300),
    "large": Scale(3000, layers=4, dim=128, limit=1200.0, rounds=15),
}


class Block(nn.Module):
    def __init__(self, mixing: nn.Module, dim: int, wide: int) -> None:
        super().__init__()
        self.mixing = mixing
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(dim, wide), nn.GELU(), nn.Linear(wide, dim))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.mixing(self.norms[0](hidden))
        return hidden + self.mlp(self.norms[1](hidden))


class LeftOut(ValueError):
    """Why a mechanism is not measured on a task."""


def model(way: Candidate, task: Task, data: Data, scale: Scale) -> nn.Sequential:
    """A model with this mechanism, of as many parameters as with softmax attention, to half a channel a layer.

    Of more where a mechanism alone has too many for that: feed-forward layers keep a quarter of dim.
    """
    dim, causal = scale.dim, task.pattern == "causal"

    def layers() -> list[nn.Module]:
        return [way.layer(dim, scale.heads, causal=causal, shape=data.shape) for _ in range(scale.layers)]

    embed, read = data.embed(dim), data.read(dim)  # first, so that they begin alike with every mechanism
    mixing = layers()
    spare = 4 * dim * (dim + 1) - sum(p.numel() for layer in mixing for p in layer.parameters()) / scale.layers
    wide = max(dim // 4, round(scale.wide * dim + spare / (2 * dim + 1)))
    body = [Block(layer, dim, wide) for layer in mixing]
    return nn.Sequential(embed, *body, nn.LayerNorm(dim), read)


def run(way: Candidate, task: Task, seed: int, scale: Scale) -> dict[str, Any]:
    """Train, judge and measure. Quality is None where training diverged. Raises LeftOut where that cannot be done."""
    steps, data = max(1, round(task.share * scale.steps)), data_of(task, seed)
    torch.manual_seed(seed)
    net = model(way, task, data, scale)
    size = sum(p.numel() for p in net.parameters())
    began = time.process_time()
    finite = train(net, way, data, steps, scale.limit)
    trained = time.process_time() - began
    quality = judged(net, data) if finite else None
    usual = candidate(SOFTMAX, softmax)
    peer = model(usual, task, data, scale)
    own, theirs = in_turn(step_of(net, way, data), step_of(peer, usual, data), scale.rounds)
    items = len(data.batch(0)[0]) * (1 if task.pictures else math.prod(data.shape))
    return {
        "quality": quality,
        "per_second": items / own,
        "time": own / theirs,  # over softmax attention's
        "peak_mb": peak_bytes(step_of(net, way, data)) / 1e6,
        "parameters": size,
        "state": held(way, net, task, data, scale),
        "exact": exact(net, task, data),
        "seconds": trained,
    }


@lru_cache(2)
def data_of(task: Task, seed: int) -> Data:
    """What was made last stays, since one mechanism after the other takes it."""
    return task.make(seed)


def train(net: nn.Module, way: Candidate, data: Data, steps: int, limit: float) -> bool:
    """Whether the loss stayed finite. LeftOut where the steps would take longer than `limit` processor seconds."""
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.01)
    began, taken = time.process_time(), step_of(net, way, data)
    for step in range(steps):
        warm = WARM * steps
        share = (step + 1) / warm if step < warm else (steps - step) / (steps - warm)
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, share)
        optimizer.zero_grad()
        loss = taken(step)
        if not math.isfinite(loss):
            return False
        nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        spent = time.process_time() - began
        if step in (2, 9) and spent / (step + 1) * steps > limit:
            raise LeftOut(f"{steps} steps would take {spent / (step + 1) * steps:,.0f} s, more than {limit:,.0f}")
    return True


def step_of(net: nn.Module, way: Candidate, data: Data) -> Callable[..., float]:
    """Forward and backward pass of a step's batch; the loss."""
    blocks = [m for m in net.modules() if isinstance(m, Block)]

    def taken(step: int = 0) -> float:
        inputs, targets = data.batch(step)
        loss = whole = data.loss(net(inputs), targets)
        if way.loss is not None:
            for block in blocks:
                whole = whole + way.loss(block.mixing.inner) / len(blocks)
        whole.backward()
        return float(loss.detach())

    return taken


@torch.no_grad()
def judged(net: nn.Module, data: Data) -> float | None:
    net.eval()
    inputs, targets = data.held_out
    outputs = torch.cat([net(part) for part in inputs.split(128)])
    net.train()
    quality = float(data.quality(outputs, targets))
    return quality if math.isfinite(quality) else None


def in_turn(own: Callable[[], Any], peer: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median processor seconds of each, the one and the other first; a first round does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for i in (0, 1) if turn % 2 else (1, 0):
            began = time.process_time()
            (own, peer)[i]()
            if turn:
                times[i].append(time.process_time() - began)
    return statistics.median(times[0]), statistics.median(times[1])


@torch.no_grad()
def held(way: Candidate, net: nn.Sequential, task: Task, data: Data, scale: Scale) -> float | None:
    """Numbers that one layer holds at decoding after the task's tokens; None where there is no decoding, or none known.

    The state of a `step`, or keys and values where softmax attention is inside or an operator has no step.
    """
    if task.pattern != "causal":
        return None
    n, dim, mixing = math.prod(data.shape), scale.dim, net.get_submodule("1.mixing")
    if way.made is None:
        return 0
    if way.held is not None:
        return way.held(n, dim, scale.heads)
    hidden, state = torch.randn(1, n, dim), None
    step = way.step or getattr(mixing.inner, "step", None)
    if step is None:
        inside = isinstance(mixing, Heads) or any(isinstance(m, SelfAttention) for m in mixing.modules())
        return 2 * n * dim if inside else None
    parts = mixing.split(hidden) if isinstance(mixing, Heads) else [hidden]
    try:
        for i in range(n):
            _, state = step(state, *(t.narrow(-2, i, 1) for t in parts))
    except (TypeError, ValueError):  # it takes more than a token
        return None
    leaves = tree_leaves(state)
    known = all(isinstance(leaf, (Tensor, int, float, type(None))) for leaf in leaves)
    return sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor)) if known else None


@torch.no_grad()
def exact(net: nn.Sequential, task: Task, data: Data) -> bool:
    """Whether what takes query, key and value, and has no weights, gives here what softmax attention gives."""
    mixing, n = net.get_submodule("1.mixing"), math.prod(data.shape)
    if not isinstance(mixing, Heads) or any(True for _ in mixing.inner.parameters()):
        return False
    parts = [torch.randn(2, mixing.heads, n, 16) for _ in range(3)]
    found = first(mixing.inner(*parts, **mixing.told))
    return torch.allclose(found, softmax(*parts, causal=task.pattern == "causal"), atol=1e-4)
