"""Ultra3D (arXiv:2507.17745): attention within parts is about as much faster as there are fewer pairs.

Of the paper's statement the speed is checked, with sorting and gathering; that a generator loses no quality is not,
since none of that kind runs here. The control names a speedup by the number of parts, which unequal parts must miss.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...mechanisms.part_attention import part_attention
from .._measure import seconds

SCALES = "small", "large"
LENGTHS = {"small": (4096, 8192), "large": (16384, 32768)}
PARTS = 8


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Speedup over full attention of eight equal parts and of unequal ones, over n^2 / sum of n_p^2."""
    expected = (
        "within 1e-4 of the dense map of the parts, with gradients; with eight equal parts and with one of half the "
        "tokens, a speedup of 0.6 or more of n^2 / sum n_p^2, and with the latter at most 0.6 of the number of parts"
    )
    torch.manual_seed(seed)
    apart = max(_apart(labels) for labels in (torch.randint(0, 5, (2, 300)), torch.arange(300).repeat(2, 1) // 90))
    found: dict[tuple[int, str], tuple[float, float]] = {}
    took = []
    for n in LENGTHS[scale]:
        query, key, value = torch.randn(3, 1, 4, n, 64)
        splits = {"equal": torch.arange(n) % PARTS, "unequal": _unequal(n)}
        ways = [partial(part_attention, query, key, value, parts=parts[None]) for parts in splits.values()]
        full, *times = seconds(partial(part_attention, query, key, value), *ways, least=2)
        took.append(full)
        for (name, parts), time in zip(splits.items(), times, strict=True):
            ideal = n**2 / float(parts.bincount().double().square().sum())
            found[n, name] = full / time, ideal
    near = min(speed / ideal for speed, ideal in found.values())
    control = max(speed for (_, name), (speed, _) in found.items() if name == "unequal") / PARTS
    holds = apart <= 1e-4 and near >= 0.6 and control <= 0.6
    grows = Premise(
        "full attention's time is that of pairs", "3 times or more with twice the tokens", f"{took[1] / took[0]:.1f}",
        took[1] >= 3 * took[0],
    )  # fmt: skip

    def draw(figure: Any) -> None:
        axes, names = figure.subplots(), [f"{n} tokens,\n{name}" for n, name in found]
        at = range(len(found))
        axes.bar([i - 0.2 for i in at], [s for s, _ in found.values()], 0.4, label="measured")
        axes.bar([i + 0.2 for i in at], [s for _, s in found.values()], 0.4, label="ideal")
        axes.set_xticks(at, names, fontsize=7)
        axes.set(ylabel="speedup over full attention", title=f"{PARTS} parts")
        axes.legend()

    each = ", ".join(f"{n} {name} {speed:.2f} of {ideal:.2f}" for (n, name), (speed, ideal) in found.items())
    measured = (
        f"at most {apart:.1e} from the dense map; speedup of the ideal: {each}; unequal {control:.2f} of the parts"
    )
    return Finding(holds, measured, expected, seed, premises=[grows], draw=draw)


def _unequal(n: int) -> Tensor:
    """One part of half the tokens, the others equal, in no order."""
    at = torch.arange(n)
    return torch.where(at < n // 2, 0, 1 + at % (PARTS - 1))[torch.randperm(n)]


def _apart(parts: Tensor) -> float:
    leaves = [torch.randn(2, 2, parts.shape[1], 16, requires_grad=True) for _ in range(3)]
    seen = torch.stack([torch.stack([row == label for label in row]) for row in parts])[:, None]
    dense = F.scaled_dot_product_attention(*leaves, attn_mask=seen)
    given = torch.randn_like(dense)
    both = [(o, *torch.autograd.grad(o, leaves, given)) for o in (part_attention(*leaves, parts=parts), dense)]
    return max(float((one - other).detach().abs().max()) for one, other in zip(*both, strict=True))
