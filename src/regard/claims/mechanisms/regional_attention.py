"""Regional attention (arXiv:2411.14201): a wide, thinned neighbourhood, at a fraction of what full attention costs.

What the paper says of restoration error cannot be told here: no network is trained at this scale, so the verdict is
open whatever comes out. Checked are who sees whom, written out pixel by pixel, against a window a pixel off, how far a
pixel reaches beside a window of as many pixels, and the time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from ...catalog import Finding
from ...mechanisms.regional_attention import regional_attention
from .._measure import seconds

SIDE = 64


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Distance to the dense map written out; reach and time beside full attention."""
    expected = (
        "within 1e-4 of the dense map of the pixels written out and 0.1 or more from one that lies a place off; at "
        "most 0.35 of full attention's time on 64 x 64; whether shadows are removed as well: open"
    )
    torch.manual_seed(seed)
    n = 26
    query, key, value = torch.randn(3, 1, 2, n * n, 16)
    found = regional_attention(query, key, value, shape=(n, n))
    apart, control = (
        float((found - F.scaled_dot_product_attention(query, key, value, attn_mask=_map(n, off))).abs().max())
        for off in (0, 1)
    )
    x = torch.randn(1, 2, SIDE * SIDE, 64)
    time, whole = seconds(
        partial(regional_attention, x, x, x, shape=(SIDE, SIDE)), partial(F.scaled_dot_product_attention, x, x, x)
    )
    exact = apart <= 1e-4 and control >= 0.1 and time <= 0.35 * whole

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.imshow(_map(n, 0)[n * n // 2 + n // 2].view(n, n), cmap="gray_r")
        axes.set(title="What the pixel in the middle sees", xlabel="column", ylabel="row")

    measured = (
        f"{apart:.1e} from the map written out, {control:.2f} from one a place off; a pixel sees 121 over 21 x 21, "
        f"{time / whole:.3f} of full attention's time; no network was trained"
    )
    return Finding(None if exact else False, measured, expected, seed, draw=draw)


def _map(n: int, off: int) -> torch.Tensor:
    """Windows of 11, two apart, shifted inside at borders. [query, key]"""
    seen = torch.zeros(n, n)
    for i in range(n):
        line = list(range(i % 2, n, 2))
        start = min(max(line.index(i) - 5 + off, 0), len(line) - 11)
        seen[i, line[start : start + 11]] = 1
    return torch.kron(seen, seen).bool()
