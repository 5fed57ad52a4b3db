"""Chen et al. (arXiv:2503.03588): powers of two reach 2^d blocks in d layers, at about the cost of a window.

Trained on far passkeys alone nothing is learned in hundreds of steps, since six hops pass no gradient at first. So the
passkey stands anywhere for the first 60% of the steps. Two curricula were tried, on other seeds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...kernels.native import Blocks
from ...mechanisms._blocks import attend, listed
from ...mechanisms.power import pattern, power
from .. import _passkey as passkey
from .._measure import lines, mean, seconds

SCALES = "small", "large"
LENGTHS = {"small": (2048, 4096, 8192), "large": (4096, 8192, 16384, 32768)}
BLOCK = 256
LAYERS, NEAR = 6, 7  # of the passkey task; NEAR keys a row, as many as powers of two below 64, and itself
BEFORE = passkey.TOKENS - 1 - LAYERS * (NEAR - 1)  # where passkeys lie: farther than six layers of the window reach
ANYWHERE = 0.6  # of the steps, the digit stands anywhere, not only far
STEPS = {"small": 400, "large": 2000}


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Receptive field measured by gradients, time beside a window of as many blocks, and a passkey task learned."""
    expected = (
        "after 1 to 6 layers the last token depends on every token of the last 2^d blocks; at the longest sequence at "
        "most 1.25 times the time of a window of as many blocks; a passkey farther away than six layers of a window "
        "reach is named in 90% of prompts or more, by the same model with that window, the control, in 25% or fewer "
        "(chance: 10%)"
    )
    torch.manual_seed(seed)
    reached = [_reached(layers) for layers in range(1, 7)]
    times = {n: _times(n) for n in LENGTHS[scale]}
    own, window, whole = list(times.values())[-1]
    ways = {"powers of two": _powers, "window": _window, "full attention": _full}
    right = {}
    for name, way in ways.items():
        model = passkey.trained(way, layers=LAYERS, before=BEFORE, steps=STEPS[scale], seed=seed, anywhere=ANYWHERE)
        right[name] = mean(passkey.judged(model, before=BEFORE, seed=seed)[1])
    holds = all(reached) and own <= 1.25 * window
    holds = holds and right["powers of two"].value >= 0.9 and right["window"].value <= 0.25
    full = right["full attention"]
    learned = Premise("full attention learns the task", "90% named or more", f"{full:.1%}", full.value >= 0.9)

    def draw(figure: Any) -> None:
        left, right_side = figure.subplots(1, 2)
        names = ("powers of two", "window of as many blocks", "full attention")
        series = {name: (list(times), [t[i] * 1e3 for t in times.values()]) for i, name in enumerate(names)}
        lines(left, series, xlabel="tokens", ylabel="milliseconds", title="Forward pass, 4 heads of 64")
        right_side.bar(list(right), [share.value for share in right.values()])
        right_side.axhline(1 / passkey.DIGITS, color="grey", linestyle=":")
        right_side.set(ylim=(0, 1), ylabel="share named", title="Passkey beyond the window's reach")

    shares = ", ".join(f"{name} {share:.1%}" for name, share in right.items())
    measured = (
        f"the 2^d blocks are reached for {sum(reached)} of 6 depths; at {max(times)} tokens {own / window:.2f} times "
        f"the time of the window, {own / whole:.2f} of full attention's; passkey named: {shares}"
    )
    return Finding(holds, measured, expected, seed, premises=[learned], draw=draw)


def _reached(layers: int, block: int = 2) -> bool:
    """Whether the last token depends on all tokens of the last 2^layers blocks."""
    given = torch.randn(1, 1, 64 * block, 4, dtype=torch.float64, requires_grad=True)
    hidden: Tensor = given
    for _ in range(layers):
        hidden = hidden + power(hidden, hidden, hidden, block=block, window=1, sink=0)
    (grad,) = torch.autograd.grad(hidden[0, 0, -1].sum(), given)
    return bool(grad[0, 0].any(-1)[-block * 2**layers :].all())


def _times(n: int) -> list[float]:
    """Seconds of power, of a window of as many blocks or a few more, and of full attention."""
    x = torch.randn(1, 4, n, 64)
    count = n // BLOCK
    taken = pattern(count)
    at = torch.arange(count)
    apart = at[:, None] - at
    windows = ((apart >= 0) & (apart < width) for width in range(1, count + 1))
    window = next(w for w in windows if w.sum() >= taken.sum())
    blocks = Blocks(*listed(window[None, None]), BLOCK, BLOCK)
    return seconds(
        lambda: power(x, x, x, block=BLOCK),
        lambda: attend(x, x, x, blocks, causal=True, mask=None, scale=0.125),
        lambda: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    )


def _seen(visible: Tensor) -> passkey.Attention:
    """Softmax attention to what is visible, [query, key]."""
    return partial(F.scaled_dot_product_attention, attn_mask=visible)


_at = torch.arange(passkey.TOKENS)
_past = _at[:, None] >= _at
_powers = _seen(pattern(passkey.TOKENS, window=1, sink=0))
_window = _seen(_past & (_at[:, None] - _at < NEAR))
_full = _seen(_past)
