"""Chen et al. (arXiv:2104.09497): a branch with attention weighed against one without beats attention always on.

Small networks enlarge pictures twofold: three blocks, trained alike on generated scenes. Arms: the block, whose
two weights each picture makes (dynamic), both branches at one half (fixed), and attention always on, in channels as
many as make parameters alike. The paper's differences are below 0.1 dB, so trainings are paired. Premise: in the
network whose attention is always on, some attention does not help: with one block's gate at its mean, nothing is lost.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...data.scenes import TEXTURES, Dials, sample
from ...mechanisms.attention_in_attention import AttentionInAttention
from .._measure import mean
from .._nets import bars, pixels, size

DIALS = Dials(objects=(1, 2), sizes=("medium", "large"), textures=TEXTURES, clutter=(0, 8))
LOW, CHANNELS, WIDER, BLOCKS = 12, 12, 14, 3  # WIDER: of the arm without a second branch
TRAINING, HELD_OUT, STEPS, BATCH, RUNS = 1500, 200, 120, 8, 3
DYNAMIC, FIXED, ON = "dynamic", "both at one half", "always on"


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """PSNR of the three arms, and how much the weights vary between pictures."""
    expected = (
        "dynamic weights above attention always on by 0.03 dB or more, and by two standard errors over trainings, and "
        "above both branches at one half by 0.01 dB: otherwise two branches gain, not switching; parameters within 3%"
    )
    found: dict[str, list[float]] = {way: [] for way in (DYNAMIC, FIXED, ON)}
    spread, least, bilinear = [], [], 0.0
    for run in range(RUNS):
        at = RUNS * seed + run
        x, held = (_pictures(n, at + extra) for n, extra in ((TRAINING, 0), (HELD_OUT, 10**6)))
        bilinear = _psnr(_wider(_smaller(held)), held)
        for way, of in found.items():
            torch.manual_seed(at)
            model = _Network(way)
            _train(model, x, at)
            of.append(_psnr(model(_smaller(held)), held))
            if way == DYNAMIC:
                spread.append(_spread(model, _smaller(held)))
            if way == ON:
                least.append(of[-1] - max(_flat(model, i, held) for i in range(BLOCKS)))
    over_on, over_fixed = (
        mean([a - b for a, b in zip(found[DYNAMIC], found[way], strict=True)]) for way in (ON, FIXED)
    )
    alike = size(_Network(ON)) / size(_Network(DYNAMIC)) - 1
    holds = over_on.value >= 0.03 and over_on.above() and over_fixed.value >= 0.01 and abs(alike) <= 0.03
    trained = min(found[ON]) - bilinear
    premises = [
        Premise("the networks are trained: better than bilinear", "by 0.5 dB", f"{trained:+.2f} dB", trained >= 0.5),
        Premise(
            "some attention does not help where it is always on",
            "0.01 dB lost at most",
            f"{min(least):.3f}",
            min(least) <= 0.01,
        ),
        Premise(
            "trainings tell 0.03 dB", "a standard error of 0.03 at most", f"{over_on.error:.3f}", over_on.error <= 0.03
        ),
    ]
    measured = (
        f"PSNR {', '.join(f'{mean(of):.2f} {way}' for way, of in found.items())}, bilinear {bilinear:.2f}; "
        f"dynamic over always on {over_on:+.3f} dB, over one half {over_fixed:+.3f}; the weight of attention varies "
        f"between pictures by {mean(spread).value:.1e}; parameters {alike:+.1%}"
    )
    draw = partial(bars, values=found, ylabel="PSNR, dB", title="Twofold enlargement")
    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


class _Fixed(AttentionInAttention):
    """The branches weigh alike for every picture. share: of the one with attention."""

    share = 0.5

    def _weights(self, features: Tensor) -> Tensor:
        weights = features.new_tensor([self.share, 1 - self.share])
        return weights.expand(len(features), -1)


class _Always(_Fixed):
    share = 1.0

    def __init__(self, channels: int, **knobs: Any) -> None:
        super().__init__(channels, **knobs)
        del self.squeeze
        self.plain = nn.Identity()  # weighs nothing


class _Network(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        channels = WIDER if way == ON else CHANNELS
        kind = {DYNAMIC: AttentionInAttention, FIXED: _Fixed, ON: _Always}[way]
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(kind(channels, reduction=2) for _ in range(BLOCKS)))
        self.last = nn.Conv2d(channels, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.first(x)
        return F.pixel_shuffle(self.last(features + self.blocks(features)), 2) + _wider(x)


def _train(model: _Network, x: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=STEPS)
    for _ in range(STEPS):
        some = x[torch.randint(len(x), (BATCH,), generator=generator)]
        optimiser.zero_grad()
        (model(_smaller(some)) - some).abs().mean().backward()
        optimiser.step()
        schedule.step()
    model.requires_grad_(False)


def _psnr(said: Tensor, truth: Tensor) -> float:
    """Of a range of 1, mean over pictures."""
    return float((-10 * (said - truth).square().mean((1, 2, 3)).log10()).mean())


def _spread(model: _Network, x: Tensor) -> float:
    """Deviation between pictures of the weight of attention, mean over blocks."""
    features, found = model.first(x), []
    for block in model.blocks:
        found.append(float(block.branch_weights(features)[:, 0].std()))  # type: ignore[operator]
        features = block(features)
    return sum(found) / len(found)


def _flat(model: _Network, which: int, held: Tensor) -> float:
    """PSNR with the gate of one block at its mean over positions and pictures."""
    block: Any = model.blocks[which]
    handle = block.pixel.register_forward_hook(
        lambda _, __, out: torch.logit(out.sigmoid().mean((0, 2, 3), keepdim=True))
    )
    found = _psnr(model(_smaller(held)), held)
    handle.remove()
    return found


def _smaller(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def _wider(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _pictures(n: int, seed: int) -> Tensor:
    return (pixels([sample(DIALS, seed, i) for i in range(n)], 2 * LOW) + 1) / 2
