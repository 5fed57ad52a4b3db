"""Stergiou and Damen (arXiv:2210.11328): what is replayed at a finer scale is named better than what is heard once.

Sounds of two seconds: steady tones and noise that say nothing, and one event of two clicks 8, 12, 16 or 20 ms apart
at one of two pitches, whose eight kinds a spectrogram with a hop of 40 ms does not tell apart and one of 10 ms does.
Four models see the same sounds and steps: heard once; with one replay; with a replay of moments elsewhere, as many of
them (the control); and the whole fine spectrogram heard once, which bounds what a replay can do. Piloted once on
another seed, where as few steps taught neither to tell the kinds apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...models.play_it_back import PlayItBack, PlayItBackConfig, loss
from .. import _nets
from .._measure import mean

SCALES = "small", "large"
STEPS = {"small": 220, "large": 3000}
TRAIN, HELD, BATCH, RATE = 1200, 600, 32, 2e-3
HZ, SECONDS, COARSE, RATIO, BANDS, WIDE = 4000, 2, 160, 4, 32, 48  # samples a second, s, samples a coarse hop
GAPS, PITCHES = (8, 12, 16, 20), (500.0, 1100.0)  # ms, Hz
SIZES = {"channels": WIDE, "classes": len(GAPS) * len(PITCHES), "latents": 8, "width": WIDE, "heads": 4, "blocks": 1}
TIME = HZ * SECONDS // COARSE
OVER_ONCE, OVER_RANDOM, BOUND, ROOM, MOST = 0.08, 0.05, 0.85, 0.2, 0.5
WAYS = {  # rounds, whether moments are random, whether the fine spectrogram is heard
    "once": (1, False, False),
    "replay": (2, False, False),
    "random replay": (2, True, False),
    "all fine": (1, False, True),
}


class Encoder(nn.Module):
    """A small transformer over frames. [batch, band, time] -> [batch, channel, time]"""

    def __init__(self, time: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(BANDS, WIDE), nn.Parameter(0.02 * torch.randn(time, WIDE))
        layer = nn.TransformerEncoderLayer(WIDE, 4, 2 * WIDE, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.embed(x.mT) + self.place).mT


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Share of sounds named by four models of as many steps."""
    expected = (
        f"of eight kinds of sounds held out: one replay names {OVER_ONCE:.0%} more than hearing once and "
        f"{OVER_RANDOM:.0%} more than a replay of moments elsewhere, beyond two standard errors over sounds"
    )
    coarse, fine, label, at = sounds(TRAIN + HELD, seed)
    right, inside, covered = {}, 0.0, 1.0
    for name, (rounds, random, all_fine) in WAYS.items():
        torch.manual_seed(seed)
        time = RATIO * TIME if all_fine else TIME
        model = PlayItBack(Encoder(time), PlayItBackConfig(time=time, rounds=rounds, random=random, **SIZES))
        given = [fine] if all_fine else [coarse, fine][:rounds]
        _nets.fit(
            model.parameters(),
            lambda some, m=model, of=given: loss(m([x[some] for x in of]), label[some]),
            TRAIN,
            STEPS[scale],
            seed,
            batch=BATCH,
            rate=RATE,
        )
        with torch.no_grad():
            found = model.eval()([x[TRAIN:] for x in given])
        right[name] = (found.logits.argmax(1) == label[TRAIN:]).float()
        if name == "replay":
            covered = float(np.mean([sum(b - a for a, b in row) for row in found.parts[0]]) / TIME)
            pairs = zip(found.parts[0], at[TRAIN:].tolist(), strict=True)
            inside = float(np.mean([any(a <= t < b for a, b in row) for row, t in pairs]))
    over = {name: mean(right["replay"] - right[name]) for name in ("once", "random replay")}
    holds = over["once"].value >= OVER_ONCE and over["once"].above()
    holds = holds and over["random replay"].value >= OVER_RANDOM and over["random replay"].above()
    named = {name: mean(of) for name, of in right.items()}
    measured = (
        "named: "
        + ", ".join(f"{name} {of:.1%}" for name, of in named.items())
        + f"; a replay above hearing once by {over['once']:.1%}, above a random one by {over['random replay']:.1%}; "
        f"the event is among what is replayed in {inside:.0%}"
    )
    bound, once = named["all fine"].value, named["once"].value
    premises = [
        Premise("the fine one tells", f"{BOUND:.0%} named or more", f"{bound:.1%}", bound >= BOUND),
        Premise("the coarse one does not", f"{ROOM:.0%} fewer", f"{bound - once:.1%} fewer", bound - once >= ROOM),
        Premise("a replay chooses", f"at most {MOST:.0%} of the time", f"{covered:.0%}", covered <= MOST),
    ]

    def draw(figure: Any) -> None:
        _nets.bars(figure, {name: [of.value] for name, of in named.items()}, ylabel="share named, held out")

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def sounds(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spectrograms, coarse and fine [n, band, time], kinds [n], and the coarse frame of each event [n]."""
    draws, samples = np.random.default_rng(seed), HZ * SECONDS
    label, start = draws.integers(len(GAPS) * len(PITCHES), size=n), draws.integers(HZ // 10, samples - HZ // 5, n)
    t = np.arange(samples) / HZ
    waves = 0.02 * draws.normal(size=(n, samples))
    waves += 0.1 * np.sin(2 * np.pi * draws.uniform(200, 1800, (n, 1)) * t + draws.uniform(0, 6, (n, 1)))
    length = int(0.003 * HZ)
    for wave, kind, at in zip(waves, label, start, strict=True):
        gap, pitch = GAPS[kind // len(PITCHES)] * HZ // 1000, PITCHES[kind % len(PITCHES)]
        click = np.sin(2 * np.pi * pitch * np.arange(length) / HZ) * np.hanning(length)
        for begin in (at, at + gap):
            wave[begin : begin + length] += 2 * click
    found = [spectrogram(torch.from_numpy(waves).float(), COARSE // ratio) for ratio in (1, RATIO)]
    return found[0], found[1], torch.from_numpy(label), torch.from_numpy(start // COARSE)


def spectrogram(waves: Tensor, hop: int) -> Tensor:
    """Logarithm of power in `BANDS` bands, in windows of twice the hop."""
    size = max(2 * hop, 2 * BANDS)
    power = torch.stft(waves, size, hop, 2 * hop, torch.hann_window(2 * hop), return_complex=True).abs()[
        :, 1:, : waves.shape[1] // hop
    ]
    bands = F.adaptive_avg_pool2d(power, (BANDS, power.shape[-1])).clamp_min(1e-3).log()
    return (bands - bands.mean()) / bands.std()
