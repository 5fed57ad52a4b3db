"""Lou and Yu (arXiv:2502.20087): kernels made by an overview widen the effective receptive field.

Four blocks at 12 x 12 positions with a residual around each: a static depthwise convolution, kernels made from the
block's own overview (bottom-up), or from that of a coarse branch which has looked at the picture before (top-down). A
network names the pair of colours of two objects. The effective receptive field is the radius that holds 90% of the
absolute gradient of the centre's features to the blocks' input, and the share outside what four static convolutions
can see.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...data.scenes import COLOURS, Dials, sample
from ...mechanisms.overlock import ContextMix
from .._measure import mean
from .._nets import bars, normed, pixels, train

DIALS = Dials(objects=(2, 2), textures=("plain", "grain"), clutter=(0, 4))
SIZE, WIDTH, KERNEL, BLOCKS = 48, 16, 3, 4  # four 3 x 3 convolutions see 9 of 12 positions
TRAINING, HELD_OUT, STEPS, BATCH, RUNS = 1000, 200, 80, 8, 1
STATIC, OWN, GUIDED = "static", "own overview", "overview first"


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Radius and outside share of the gradient of trained twins, and their accuracy."""
    expected = (
        "with an overview first, the radius that holds 90% of the gradient at least 1.2 times that of static "
        "convolutions and no smaller than with the block's own overview, each by two standard errors of the pictures "
        "or equal to 2%; 5% of the gradient outside what the static ones see, where theirs is 0"
    )
    names = tuple(COLOURS)
    radius: dict[str, list[Tensor]] = {way: [] for way in (STATIC, OWN, GUIDED)}
    outside: dict[str, list[float]] = {way: [] for way in radius}
    share: dict[str, list[float]] = {way: [] for way in radius}
    for run in range(RUNS):
        at = RUNS * seed + run
        data = []
        for n, extra in ((TRAINING, 0), (HELD_OUT, 10**6)):
            scenes = [sample(DIALS, at + extra, i) for i in range(n)]
            there = torch.zeros(n, len(names))
            for row, scene in zip(there, scenes, strict=True):
                row[[names.index(o.colour) for o in scene.objects]] = 1
            data.append((pixels(scenes, SIZE), there))
        (x, y), (held, held_y) = data
        for way in radius:
            torch.manual_seed(at)
            model = _Network(way)
            train(model, x, y, steps=STEPS, seed=at, batch=BATCH, loss=F.binary_cross_entropy_with_logits)
            with torch.no_grad():
                share[way].append(float(((model(held) > 0) == held_y.bool()).all(1).float().mean()))
            found = _fields(model, held[:64])
            radius[way].append(found[0])
            outside[way].append(float(found[1].mean()))
    all_of = {way: torch.cat(of) for way, of in radius.items()}
    over_static, over_own = (mean(all_of[GUIDED] / all_of[way] - 1) for way in (STATIC, OWN))
    wider = over_static.value >= 0.2 and over_static.above()
    guided = over_own.value >= -0.02
    holds = wider and guided and mean(outside[GUIDED]).value >= 0.05 and max(outside[STATIC]) == 0
    kept = mean(share[GUIDED]).value - mean(share[STATIC]).value
    premise = Premise(
        "it names the colours no worse than static convolutions",
        "2 points less at most",
        f"{100 * kept:+.1f}",
        kept >= -0.02,
    )
    measured = (
        f"radius {', '.join(f'{mean(of).value:.2f} {way}' for way, of in all_of.items())}; over static "
        f"{over_static:+.0%}, over the own overview {over_own:+.1%}; outside what static ones see "
        f"{', '.join(f'{mean(of).value:.1%} {way}' for way, of in outside.items())}; right "
        f"{', '.join(f'{mean(of).value:.0%} {way}' for way, of in share.items())}; of one training each"
    )
    values = {way: of.tolist() for way, of in all_of.items()}
    draw = partial(bars, values=values, ylabel="radius of 90% of the gradient", title="Receptive field of four blocks")
    return Finding(holds, measured, expected, seed, premises=[premise], draw=draw)


class _Block(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.norm = way, nn.BatchNorm2d(WIDTH)
        static = nn.Conv2d(WIDTH, WIDTH, KERNEL, padding=KERNEL // 2, groups=WIDTH)
        self.mix = static if way == STATIC else ContextMix(WIDTH, kernel=KERNEL, small=KERNEL, heads=2)
        self.mlp = nn.Sequential(nn.Conv2d(WIDTH, 2 * WIDTH, 1), nn.ReLU(), nn.Conv2d(2 * WIDTH, WIDTH, 1))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        normed_x = self.norm(x)
        x = x + (self.mix(normed_x, context) if self.way == GUIDED else self.mix(normed_x))
        return x + self.mlp(x)


class _Network(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(*normed(3, WIDTH // 2, 2), nn.ReLU(), *normed(WIDTH // 2, WIDTH, 2))
        self.overview = nn.Sequential(*normed(WIDTH, WIDTH, 2), nn.ReLU(), *normed(WIDTH, WIDTH, 1), nn.ReLU())
        self.blocks = nn.ModuleList(_Block(way) for _ in range(BLOCKS))
        self.read = nn.Linear(WIDTH, len(COLOURS))

    def mixed(self, features: Tensor) -> Tensor:
        context = self.overview(features)
        for block in self.blocks:
            features = block(features, context)
        return features

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.mixed(self.stem(x)).amax((2, 3)))


def _fields(model: _Network, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each picture, the radius that holds 90% of the gradient, and the share outside what static blocks see."""
    with torch.no_grad():
        features = model.stem(x)
    features.requires_grad_()
    side = features.shape[-1]
    centre = side // 2
    (grad,) = torch.autograd.grad(model.mixed(features)[:, :, centre, centre].sum(), features)
    weight = grad.abs().sum(1)
    at = torch.arange(side) - centre
    far = torch.maximum(at[:, None].abs(), at[None].abs())
    held = torch.stack([(weight * (far <= r)).sum((1, 2)) for r in range(side)], 1) / weight.sum((1, 2))[:, None]
    # between whole radii, by the line through both
    first = (held >= 0.9).int().argmax(1, keepdim=True)
    high, low = held.gather(1, first), held.gather(1, (first - 1).clamp_min(0)) * (first > 0)
    return (first + 1 - (high - 0.9) / (high - low)).squeeze(1), 1 - held[:, BLOCKS * (KERNEL // 2)]
