"""Xu and Wan (arXiv:2403.01123): two strips locate an object better than coordinate attention of equal size.

A small residual network names the colour of one object before clutter, with the block before its residual sum:
efficient local attention (size B), coordinate attention whose reduction makes parameters alike, or ELA with batch norm
in place of group norm, the paper's own diagnosis. How well a block locates is the share of its map, the mean over
channels less its smallest value, that lies on the object's box, beyond the share of the box in the picture.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...data.scenes import COLOURS, Dials, Scene, render, sample
from ...mechanisms.ela import ELA
from .._measure import mean
from .._nets import Network, bars, pixels, right, size, train

NAMES = tuple(COLOURS)
DIALS = Dials(objects=(1, 1), textures=("plain", "grain"), clutter=(0, 6))
SIZE, WIDTHS, HIDDEN = 32, (16, 32), 2
TRAINING, HELD_OUT, STEPS, RUNS = 2000, 500, 120, 2
ELA_B, CA, NORMED = "ELA", "coordinate attention", "ELA with batch norm"


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Share of each block's map on the object, beyond that of the object's box, and accuracy."""
    expected = (
        "ELA's share on the object higher than coordinate attention's by 0.05 or more, and by two standard errors over "
        "trainings, with parameters within 10% and accuracy no more than 0.5 points lower, two standard errors allowed"
    )
    on: dict[str, list[float]] = {way: [] for way in BLOCKS}
    share: dict[str, list[float]] = {way: [] for way in BLOCKS}
    for run in range(RUNS):
        at = RUNS * seed + run
        scenes, judged = (
            [sample(DIALS, at + extra, i) for i in range(n)] for n, extra in ((TRAINING, 0), (HELD_OUT, 10**6))
        )
        (x, y), (held, held_y) = ((pixels(s, SIZE), _colours(s)) for s in (scenes, judged))
        boxes = _boxes(judged)
        for way in BLOCKS:
            torch.manual_seed(at)
            model = train(Network(WIDTHS, len(COLOURS), BLOCKS[way]), x, y, steps=STEPS, seed=at)
            share[way].append(float(right(model, held, held_y).float().mean()))
            on[way].append(_located(model, held, boxes))
    sizes = {way: size(BLOCKS[way](WIDTHS[-1])) for way in BLOCKS}
    more = mean([a - b for a, b in zip(on[ELA_B], on[CA], strict=True)])
    better = mean([a - b for a, b in zip(share[ELA_B], share[CA], strict=True)])
    alike = abs(sizes[CA] / sizes[ELA_B] - 1)
    holds = more.value >= 0.05 and more.above() and alike <= 0.1 and better.value >= -0.005 - 2 * better.error
    least, most = min(mean(of).value for of in share.values()), max(mean(of).value for of in on.values())
    premises = [
        Premise("the networks have learned the task", "80% or more", f"{least:.1%}", least >= 0.8),
        Premise(
            "a map locates at all: its share on the object beyond the box's",
            "0.05 or more",
            f"{most:.3f}",
            most >= 0.05,
        ),
    ]
    measured = (
        f"share on the object beyond its box {', '.join(f'{mean(of):.3f} {way}' for way, of in on.items())}; ELA less "
        f"coordinate attention {more:+.3f}; accuracy "
        f"{', '.join(f'{mean(of):.1%} {way}' for way, of in share.items())}; parameters {sizes[ELA_B]} and {sizes[CA]}"
    )
    draw = partial(bars, values=on, ylabel="share of the map on the object, beyond its box", title="Where maps lie")
    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


class _Coordinate(nn.Module):
    """Coordinate attention: both strips through one bottleneck, with a convolution each afterwards."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(nn.Conv1d(channels, HIDDEN, 1), nn.BatchNorm1d(HIDDEN), nn.Hardswish())
        self.rows, self.columns = (nn.Conv1d(HIDDEN, channels, 1) for _ in range(2))

    def maps(self, x: Tensor) -> Tensor:
        strips = self.squeeze(torch.cat([x.mean(3), x.mean(2)], 2))
        rows, columns = strips.split([x.shape[2], x.shape[3]], 2)
        return self.rows(rows).sigmoid().unsqueeze(3) * self.columns(columns).sigmoid().unsqueeze(2)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.maps(x)


def _batch_normed(channels: int) -> ELA:
    block = ELA(channels)
    block.rows[1] = nn.BatchNorm1d(channels)
    return block


BLOCKS: dict[str, Any] = {ELA_B: ELA, CA: _Coordinate, NORMED: _batch_normed}


@torch.no_grad()
def _located(model: Network, x: Tensor, boxes: Tensor) -> float:
    """Share of the last block's map on the boxes, beyond theirs in the picture, mean over pictures."""
    seen: list[Tensor] = []
    block: Any = model.stages[-1].block
    handle = block.register_forward_pre_hook(lambda _, given: seen.append(block.maps(given[0]).mean(1, keepdim=True)))
    model(x)
    handle.remove()
    maps = F.interpolate(seen[0], size=boxes.shape[1:], mode="nearest")[:, 0]
    maps = maps - maps.amin((1, 2), keepdim=True)
    share = (maps * boxes).sum((1, 2)) / maps.sum((1, 2)).clamp_min(1e-12)
    return float((share - boxes.mean((1, 2))).mean())


def _colours(scenes: list[Scene]) -> Tensor:
    return torch.tensor([NAMES.index(s.objects[0].colour) for s in scenes])


def _boxes(scenes: list[Scene]) -> Tensor:
    found = torch.zeros(len(scenes), SIZE, SIZE)
    for mask, (left, top, right_, bottom) in zip(found, render(scenes, SIZE).boxes(slice(None))[:, 0], strict=True):
        mask[top:bottom, left:right_] = 1
    return found
