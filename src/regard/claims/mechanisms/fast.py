"""Gerami et al. (arXiv:2402.07901): the factorised form is its full map, at a cost linear in length.

The map is written out here by its own formula; the control leaves out the half before the quadratic term. Where it
overtakes softmax attention is printed beside the number of monomials, which is where operations are about equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding
from ...mechanisms.fast import fast
from .._measure import exponent, lines, peak_bytes, seconds

SCALES = "small", "large"
LENGTHS = {"small": (1024, 2048, 4096, 8192), "large": (4096, 8192, 16384, 32768)}
DENSE = 4096  # the longest that softmax attention is timed at
HEADS, DIM = 2, 16


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Equal to its map, values and gradients; time and memory follow length; where it overtakes softmax attention."""
    monomials = 1 + DIM + DIM * (DIM + 1) // 2
    expected = (
        "values and gradients within 1e-9 of the full map in float64, of both orders, causal and not, and 0.01 or more "
        "from a map with another polynomial; time grows with a power of length of 1.15 at most and memory of 1.1, "
        "softmax attention's time with one of 1.7 or more"
    )
    torch.manual_seed(seed)
    settings = [(order, causal) for order in (1, 2) for causal in (False, True)]
    off = max(_off(order, causal) for order, causal in settings)
    control = _off(2, True, half=1.0)
    lengths = LENGTHS[scale]
    ours, memory, theirs = {}, {}, {}
    for n in lengths:
        x = torch.randn(1, HEADS, n, DIM)
        ours[n] = seconds(lambda x=x: fast(x, x, x))[0]
        memory[n] = peak_bytes(lambda x=x: fast(x, x, x))
    for n in (256, 512, 1024, 2048, DENSE):
        x = torch.randn(1, HEADS, n, DIM)
        theirs[n], mine = seconds(lambda x=x: _softmax(x), lambda x=x: fast(x, x, x))
        ours.setdefault(n, mine)
    powers = [exponent(list(of), list(of.values())) for of in ({n: ours[n] for n in lengths}, memory)]
    soft = {n: t for n, t in theirs.items() if n >= 1024}
    powers.append(exponent(list(soft), list(soft.values())))
    crossed = next((n for n in theirs if ours[n] < theirs[n]), None)

    def draw(figure: Any) -> None:
        series = {
            name: (sorted(of), [of[n] * 1e3 for n in sorted(of)]) for name, of in (("fast", ours), ("softmax", theirs))
        }
        lines(figure.subplots(), series, xlabel="tokens", ylabel="milliseconds", title=f"{HEADS} heads of {DIM}")

    measured = (
        f"off by {off:.1e} at most, by {control:.2f} from another polynomial's map; time grows with a power of length "
        f"of {powers[0]:.2f} and memory of {powers[1]:.2f}, softmax attention's time of {powers[2]:.2f}; it is faster "
        f"from {crossed or 'more than the longest'} tokens on, with {monomials} monomials"
    )
    holds = off <= 1e-9 and control >= 0.01 and powers[0] <= 1.15 and powers[1] <= 1.1 and powers[2] >= 1.7
    return Finding(holds, measured, expected, seed, draw=draw)


def _off(order: int, causal: bool, half: float = 0.5) -> float:
    """Largest difference of outputs and gradients from those of the map."""
    leaves = [(0.5 * torch.randn(2, 2, 300, 8, dtype=torch.float64)).requires_grad_() for _ in range(3)]
    found, right = fast(*leaves, causal=causal, order=order), _map(*leaves, order, causal, half)
    given = torch.randn_like(right)
    pairs = zip(*(torch.autograd.grad(output, leaves, given) for output in (found, right)))
    return max(float((a - b).detach().abs().max()) for a, b in ((found, right), *pairs))


def _map(query: Tensor, key: Tensor, value: Tensor, order: int, causal: bool, half: float) -> Tensor:
    scores = query @ key.mT / query.shape[-1] ** 0.5
    weights = 1 + scores + (half * scores**2 if order == 2 else 0)
    weights = weights.tril() if causal else weights
    return weights / weights.sum(-1, keepdim=True) @ value


def _softmax(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)
