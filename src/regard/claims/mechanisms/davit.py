"""Ding et al. (arXiv:2204.03645): channel attention sees the whole picture in one layer, at a cost linear in pixels.

The learned part: two coloured squares at far places, of one colour or not, read out at one corner token, since a mean
over tokens would carry what windows cannot. Two layers of windows cannot meet; a layer of windows and one of channels
can, and so can two layers of attention over all tokens.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...mechanisms.davit import ChannelBlock, WindowBlock, channel
from .._measure import exponent, mean, peak_bytes, seconds
from .._nets import bars, right, train

SIDES = {"small": (32, 64, 96, 128), "large": (32, 64, 128, 256)}
GRID, PATCH, DIM, COLOURS, WINDOW = 12, 4, 32, 4, 4  # patches a side, pixels of one, of a window patches
STEPS, BATCH, RUNS, TRAINING, HELD_OUT = 300, 16, 2, 4000, 500
WAYS = "windows twice", "windows, channels", "all tokens twice"


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Channel attention against its dense form, its cost over pixels, how far one layer sees, and what that is for."""
    expected = (
        "channel attention within 1e-5 of its dense form, gradients too, and 0.1 or more from it with the softmax "
        "over the other axis; time and memory grow with pixels to a power of at most 1.2; of one block, the gradient "
        "at the farthest pixel above 1e-8 for channels and 0 for windows; two squares far apart: windows and channels "
        "right in 85% or more and within 10 points of attention over all tokens, windows twice in 60% or less"
    )
    torch.manual_seed(seed)
    apart, control = _apart(), _apart(axis=-2)
    sides = SIDES[scale]
    inputs = [torch.randn(1, 3, side * side, 32) for side in sides]
    runs = [partial(channel, x, x, x) for x in inputs]
    powers = {
        "time": exponent([s * s for s in sides], seconds(*runs)),
        "memory": exponent([s * s for s in sides], [peak_bytes(run) for run in runs]),
    }
    far = {name: _far(block) for name, block in (("channels", _block("channels")), ("windows", _block("windows")))}
    shares: dict[str, list[float]] = {way: [] for way in WAYS}
    for run in range(RUNS):
        at = RUNS * seed + run
        generator = torch.Generator().manual_seed(at)
        (x, y), (held, held_y) = _pictures(TRAINING, generator), _pictures(HELD_OUT, generator)
        for way, of in shares.items():
            torch.manual_seed(at)
            model = train(_Model(way), x, y, steps=STEPS, seed=at, rate=2e-3, batch=BATCH)
            of.append(float(right(model, held, held_y).float().mean()))
    twice, both, whole = (mean(of) for of in shares.values())
    holds = apart <= 1e-5 and control >= 0.1 and max(powers.values()) <= 1.2
    holds = holds and far["channels"] > 1e-8 and far["windows"] == 0
    holds = holds and min(shares[WAYS[1]]) >= 0.85 and both.value >= whole.value - 0.1 and twice.value <= 0.6
    premise = Premise(
        "the task can be learned: attention over all tokens is right",
        "85% or more",
        f"{whole:.2f}",
        whole.value >= 0.85,
    )
    measured = (
        f"at most {apart:.1e} from the dense form ({control:.2f} over the other axis); time grows with pixels to the "
        f"power {powers['time']:.2f}, memory {powers['memory']:.2f}; gradient at the farthest pixel "
        f"{far['channels']:.1e} for channels, {far['windows']:g} for windows; right {twice:.2f} with windows twice, "
        f"{both:.2f} with windows and channels, {whole:.2f} with all tokens twice"
    )
    draw = partial(bars, values=shares, ylabel="right", title="Are two squares far apart of one colour?")
    return Finding(holds, measured, expected, seed, premises=[premise], draw=draw)


def _apart(axis: int = -1) -> float:
    """Largest difference of values and gradients to the form written out."""
    leaves = [torch.randn(2, 3, 50, 16, requires_grad=True) for _ in range(3)]
    query, key, value = leaves
    scores = torch.einsum("bhnc,bhnd->bhcd", query, key) / math.sqrt(16)
    dense = torch.einsum("bhcd,bhnd->bhnc", torch.softmax(scores, axis), value)
    given = torch.randn_like(dense)
    both = [(o, *torch.autograd.grad(o, leaves, given)) for o in (channel(*leaves), dense)]
    return max(float((one - other).detach().abs().max()) for one, other in zip(*both, strict=True))


def _block(kind: str) -> nn.Module:
    return ChannelBlock(DIM, 4) if kind == "channels" else WindowBlock(DIM, 4, window=WINDOW)


def _far(block: nn.Module) -> float:
    """The largest gradient of one corner's output by the other corner's pixel."""
    x = torch.randn(1, DIM, 24, 24, requires_grad=True)
    block(x)[0, :, 0, 0].sum().backward()
    assert x.grad is not None
    return float(x.grad[..., -1, -1].abs().max())


class _Model(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, PATCH, PATCH)
        whole, window = partial(WindowBlock, DIM, 4, window=GRID), partial(WindowBlock, DIM, 4, window=WINDOW)
        of: dict[str, Any] = {
            WAYS[0]: (window, window),
            WAYS[1]: (window, partial(ChannelBlock, DIM, 4)),
            WAYS[2]: (whole, whole),
        }
        self.layers, self.read = nn.Sequential(*(make() for make in of[way])), nn.Linear(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.layers(self.patches(x))[:, :, 0, 0])


def _pictures(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two squares, each a patch, in the halves of the grid that are away from the corner; of one colour or not."""
    x = 0.1 * torch.randn(n, 3, GRID * PATCH, GRID * PATCH, generator=generator)
    colours = torch.randn(COLOURS, 3, generator=torch.Generator().manual_seed(5))
    first = torch.randint(COLOURS, (n,), generator=generator)
    same = torch.rand(n, generator=generator) < 0.5
    second = torch.where(same, first, (first + torch.randint(1, COLOURS, (n,), generator=generator)) % COLOURS)
    third = GRID // 3
    upper = torch.stack([torch.randint(third, (n,), generator=generator), _last(n, third, generator)], 1)
    lower = torch.stack([_last(n, third, generator), torch.randint(third, (n,), generator=generator)], 1)
    for which, places in ((first, upper), (second, lower)):
        for i, (row, column) in enumerate((places * PATCH).tolist()):
            x[i, :, row : row + PATCH, column : column + PATCH] += colours[which[i], :, None, None]
    return x, same.long()


def _last(n: int, third: int, generator: torch.Generator) -> Tensor:
    return GRID - 1 - torch.randint(third, (n,), generator=generator)
