"""Jaegle et al. (arXiv:2103.03206): one model, and here one set of weights, on pictures, sound and points.

Real handwritten digits (MNIST), real spoken digits (Free Spoken Digit Dataset), and points on the surfaces of four
solids. Nothing in the model is made for any of them but the last linear layer. Controls: positions taken away, and a
model trained as long that reads its input once. One design was tried.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding
from ...data.loaders import mnist, spoken_digits
from ...models.perceiver import Kind, Perceiver, grid
from .._data import folder
from .._measure import mean

SCALES = "small", "large"
STEPS = {"small": 300, "large": 6000}  # of each kind
SIZE, RATE = 32, 2e-3
FRAMES, CHANNELS, POINTS = 48, 32, 96
SOLIDS = ("sphere", "cube", "cylinder", "torus")
LEAST = {"pictures": 0.6, "sound": 0.4, "points": 0.6}
Data = tuple[Tensor | None, Tensor, Tensor]  # elements, positions, labels


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """One Perceiver trained on the three in turn, each named on examples held out."""
    expected = (
        "one set of weights names 60% or more of handwritten digits (chance: 10%), 40% of spoken ones (10%) and 60% of "
        "solids from their points (25%), all held out; with positions taken away, each falls by 10 points or more, and "
        "by "
        "two standard errors; a model that reads once names fewer of all three together, by two standard errors"
    )
    torch.manual_seed(seed)
    data = {"pictures": _pictures(), "sound": _sound(), "points": _points(4000)}
    split = {name: torch.randperm(len(found[-1])) for name, found in data.items()}
    held = {name: order[: len(order) // 6][:500] for name, order in split.items()}
    train = {name: split[name][len(split[name]) // 6 :] for name in split}
    model, once = (_trained(data, train, STEPS[scale], seed, reads) for reads in (3, 1))
    each = {name: _right(model, name, data[name], held[name]) for name in data}
    blind = {name: _right(model, name, data[name], held[name], placed=False) for name in data}
    falls = {name: mean(each[name] - blind[name]) for name in data}
    more = mean(torch.cat([each[name] - _right(once, name, data[name], held[name]) for name in data]))
    right, nowhere = ({name: float(of[name].mean()) for name in data} for of in (each, blind))
    holds = all(right[name] >= LEAST[name] and falls[name].value >= 0.1 and falls[name].above() for name in data)
    holds = holds and more.above()
    measured = "; ".join(
        f"{name} {right[name]:.1%}, less without positions by {falls[name]:.1%} ({len(held[name])} held out)"
        for name in data
    )
    measured += f"; together more than by a model that reads once by {more:.1%}"

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for shift, (label, shares) in enumerate((("as they are", right), ("all at one position", nowhere))):
            axes.bar([i + 0.4 * shift for i in range(3)], list(shares.values()), width=0.38, label=label)
        chances = (0.1, 0.1, 1 / len(SOLIDS))
        axes.hlines(chances, [-0.3, 0.7, 1.7], [0.7, 1.7, 2.7], color="grey", linestyle=":", label="chance")
        axes.set_xticks([i + 0.2 for i in range(3)], ["handwritten digits", "spoken digits", "points on solids"])
        axes.set(ylim=(0, 1.12), ylabel="share named, held out", title="One Perceiver, one set of weights")
        axes.legend(loc="upper left", ncols=3)

    return Finding(holds, measured, expected, seed, draw=draw)


def _trained(data: dict[str, Data], train: dict[str, Tensor], steps: int, seed: int, reads: int) -> Perceiver:
    torch.manual_seed(seed)
    model = Perceiver(
        {
            "pictures": Kind(1, 2, 10, bands=8, resolution=14),
            "sound": Kind(CHANNELS, 1, 10, bands=8, resolution=FRAMES),
            "points": Kind(0, 3, len(SOLIDS), bands=8, resolution=14),
        },
        num_latents=16,
        d_latents=64,
        num_blocks=reads,
    )
    _train(model, data, train, steps)
    return model


def _pictures() -> Data:
    digits = mnist(folder("mnist_t10k"))
    pixels = F.avg_pool2d(torch.from_numpy(digits.images).float()[:, None] / 255, 2)  # 14 x 14
    return pixels.flatten(1)[..., None], grid(14, 14), torch.from_numpy(digits.labels).long()


def _sound() -> Data:
    """Loudness of 32 bands of frequency in each of 48 frames, which a sound fills from its start."""
    spoken = list(spoken_digits(folder("audio_fsdd") / "recordings.zip"))
    length, window = 8000, torch.hann_window(256)  # a second
    waves = torch.zeros(len(spoken), length)
    for row, said in zip(waves, spoken):
        row[: len(said.wave)] = torch.from_numpy(said.wave[:length])
    heard = torch.stft(waves, 256, length // FRAMES, window=window, return_complex=True).abs()[:, 1:, :FRAMES]
    bands = F.avg_pool1d(heard.mT, heard.shape[1] // CHANNELS)  # [sound, frame, channel]
    loud = bands.clamp_min(1e-3).log()
    return (loud - loud.mean()) / loud.std(), grid(FRAMES), torch.tensor([s.digit for s in spoken])


def _points(count: int) -> Data:
    """Points on the surface of a solid, turned at random. [solid, point, axis], within -1 and 1"""
    label = torch.randint(len(SOLIDS), (count,))
    a, b, side = 2 * torch.pi * torch.rand(count, POINTS), torch.rand(count, POINTS), torch.randint(6, (count, POINTS))
    around = torch.stack([a.cos(), a.sin()], -1)
    normal = torch.randn(count, POINTS, 3)
    sphere = 0.9 * normal / normal.norm(dim=-1, keepdim=True)
    cube = 1.1 * torch.rand(count, POINTS, 3) - 0.55
    face = F.one_hot(side % 3, 3).bool()
    cube = torch.where(face, (0.55 * (1 - 2 * (side // 3)))[..., None].expand_as(cube), cube)
    lid = side < 2
    radius, height = torch.where(lid, 0.6 * b.sqrt(), 0.6), torch.where(lid, 0.6 * (1 - 2 * side), 1.2 * b - 0.6)
    cylinder = torch.cat([radius[..., None] * around, height[..., None]], -1)
    angle = 2 * torch.pi * b
    torus = torch.cat([(0.6 + 0.28 * angle.cos())[..., None] * around, (0.28 * angle.sin())[..., None]], -1)
    solids = torch.stack([sphere, cube, cylinder, torus])[label, torch.arange(count)]
    turned, _ = torch.linalg.qr(torch.randn(count, 3, 3))
    return None, solids @ turned, label


def _batch(found: Data, at: Tensor) -> Data:
    elements, positions, labels = found
    return None if elements is None else elements[at], positions if positions.ndim == 2 else positions[at], labels[at]


def _train(model: Perceiver, data: dict[str, Data], train: dict[str, Tensor], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 30, 2 * (steps - step) / steps)
        optimizer.zero_grad()
        for name, found in data.items():
            elements, positions, labels = _batch(found, train[name][torch.randint(len(train[name]), (SIZE,))])
            F.cross_entropy(model(name, elements, positions), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def _right(model: Perceiver, name: str, found: Data, at: Tensor, *, placed: bool = True) -> Tensor:
    """Which of those held out are named, with their positions or with all elements in the middle."""
    elements, positions, labels = _batch(found, at)
    scores = model(name, elements, positions if placed else torch.zeros_like(positions))
    return (scores.argmax(-1) == labels).float()
