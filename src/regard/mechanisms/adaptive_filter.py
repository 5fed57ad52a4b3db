"""Attention as a filter: each value is carried to the query's time by linear dynamics, and weighed by its precision.

Racioppo, Attention as an Adaptive Filter (arXiv:2509.04154), the isotropic form, as in
PCR-git/Adaptive-Filter-Attention. Channels are complex, d of them, the first half of the last axis real
parts, the second imaginary ones. Over a time t = t_i - t_j, with decay mu <= 0, frequencies omega, and variances of the
process s2, the measurement e2 and the anchor g2,

    E = exp(mu t)    V = s2 (1 - E^2) / (-2 mu) + e2 E^2 + g2    R = |exp(-i omega t_i) q_i - E exp(-i omega t_j) k_j|^2
    score = -log V - log(1 + R / (nu d V)), robust, or -log V - R / (nu d V)
    estimate_i = exp(i omega t_i) sum_j softmax_j(tau^2 score) E exp(-i omega t_j) v_j

so that rows of the weights times E do not sum to 1. Without dynamics or process noise, not robust, and with queries and
keys of unit length it is softmax attention to 2 q.k / (nu d V). Causal only: the other way round, time would run
backwards. Deviation: the form with a covariance for each channel is not offered, nor learned gates around the filter.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._mechanism import Cost, by_head, mechanism, pairs, recomputed, softmax, visible
from ._modules import module

_EPS = 1e-5
_STRIP = 2**18  # scores of all heads that are made at once


class _Noise(NamedTuple):
    """Of each head, or one for all: [head, 1, 1]."""

    decay: Tensor
    process: Tensor
    measurement: Tensor
    anchor: Tensor

    def kept(self, time: Tensor) -> Tensor:
        return torch.exp(self.decay * time)

    def variance(self, time: Tensor) -> Tensor:
        """Of what is carried over this time. The solution of the differential Lyapunov equation."""
        kept = torch.exp(2 * self.decay * time)
        still = self.decay.abs() < _EPS
        grown = (1 - kept) / (-2 * self.decay.where(~still, -1.0))
        return self.process * time.where(still, grown) + self.measurement * kept + self.anchor


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    """A times E: with frequencies, of values that are turned as well."""
    noise, robust, nu, tau = _noise(query, knobs), knobs.get("robust", True), *_knobs(query, knobs)
    query, key = (t if scale is None else t * scale**0.5 for t in (query, key))
    query, key = (
        turned(query, knobs.get("frequency"), -_times(query, key)),
        turned(key, knobs.get("frequency"), -_times(key, key)),
    )
    key = by_head(key, query.shape[1])
    time = (_times(query, key)[:, None] - _times(key, key)).clamp_min(0)
    kept, variance, size = noise.kept(time), noise.variance(time), query.shape[-1] // 2
    off = (query[..., :, None, :] - kept[..., None] * key[..., None, :, :]).square().sum(-1) / (nu * size * variance)
    scores = tau**2 * (-variance.log() - (off.log1p() if robust else off))
    return softmax(scores, visible(query, key, causal=causal, mask=mask)) * kept


def _cost(n_query: int, n_key: int, dim: int, **_: Any) -> Cost:
    return Cost(4 * dim * pairs(n_query, n_key, True), 2 * dim * (n_query + n_key))


@mechanism("causal", mask="keys", weights=_weights, cost=_cost, scaled=False)
def adaptive_filter(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    decay: Tensor | float = -1e-2,
    frequency: Tensor | None = None,
    process: Tensor | float = 0.1,
    measurement: Tensor | float = 1.0,
    anchor: Tensor | float = 0.1,
    robust: bool = True,
    nu: Tensor | float = 1.0,
    tau: Tensor | float = 1.0,
) -> Tensor:
    """What a filter of linear dynamics estimates from all tokens so far. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim], of even dim: real parts, then imaginary
    ones; of more keys than queries, the queries are the last. mask: which keys there are, [batch, 1, 1, key]; masked
    ones still count as time. scale: multiplies the products of queries and keys, whose squares it scales with them; the
    paper has none. decay (0 or less a token), process, measurement, anchor, nu and tau: numbers, or [head], with
    gradient. frequency: radians a token, [head, dim / 2]; None: none, as for queries and keys that are turned already.
    Raises ValueError without causal=True and for odd widths.

        >>> x = torch.randn(1, 4, 300, 64)
        >>> adaptive_filter(x, x, x).shape
        torch.Size([1, 4, 300, 64])
    """
    knobs = {"decay": decay, "process": process, "measurement": measurement, "anchor": anchor, "nu": nu, "tau": tau}
    if query.shape[-1] % 2 or value.shape[-1] % 2:
        raise ValueError(
            f"adaptive_filter: channels are complex, half of the width real parts; got {query.shape[-1]} channels of "
            f"queries and {value.shape[-1]} of values"
        )
    size = query.shape[-1] // 2
    if frequency is not None and (frequency.shape != (query.shape[1], size) or value.shape[-1] != 2 * size):
        raise ValueError(
            f"adaptive_filter: frequency is [head={query.shape[1]}, dim / 2={size}], for values as well; got "
            f"{list(frequency.shape)}, and values of {value.shape[-1]} channels"
        )
    if scale is not None and scale < 0:
        raise ValueError(f"adaptive_filter: the scale of products that are squared is 0 or more; got {scale=}")
    exact, heads, n_key = torch.promote_types(query.dtype, torch.float32), query.shape[1], key.shape[2]
    noise, (nu, tau) = _noise(query, knobs), _knobs(query, knobs)
    query, key = (t.to(exact) if scale is None else t.to(exact) * scale**0.5 for t in (query, key))
    at, of_keys = _times(query, key), _times(key, key)
    query = turned(query, frequency, -at)
    key, moved = (turned(by_head(t, heads).to(exact), frequency, -of_keys) for t in (key, value))
    if mask is not None:
        key, moved = (t.where(mask.mT, 0.0) for t in (key, moved))
    # Of equal times, all that depends on time is a function of the difference.
    times = torch.arange(n_key, device=query.device, dtype=exact)[:, None]
    kept, variance = noise.kept(times)[..., 0], noise.variance(times)[..., 0]
    strip, parts = max(1, _STRIP // (query.shape[0] * heads * n_key)), []
    for a in range(0, query.shape[2], strip):
        first = n_key - query.shape[2] + a
        rows = query[:, :, a : a + strip]
        last = first + rows.shape[2]
        seen = None if mask is None else mask[..., :last]
        arguments = rows, key[:, :, :last], moved[:, :, :last], kept, variance, nu * size, tau, seen, first, robust
        parts.append(recomputed(_rows, *arguments))
    return turned(torch.cat(parts, 2), frequency, at).to(value.dtype)


def _rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    variance: Tensor,
    width: Tensor,
    tau: Tensor,
    mask: Tensor | None,
    first: int,
    robust: bool,
) -> Tensor:
    """Estimates of some queries, the first at time `first`, not turned back yet."""
    lags = torch.arange(first, first + query.shape[2], device=query.device)[:, None] - torch.arange(
        key.shape[2], device=query.device
    )
    seen = (lags >= 0) if mask is None else (lags >= 0) & mask
    lags = lags.clamp_min(0)
    kept, variance = kept[:, lags], variance[:, lags]
    squares = query.square().sum(-1, keepdim=True) + kept.square() * key.square().sum(-1)[:, :, None]
    off = (squares - 2 * kept * (query @ key.mT)).clamp_min(0) / (width * variance)
    scores = tau**2 * (-variance.log() - (off.log1p() if robust else off))
    return (softmax(scores, seen) * kept) @ value


def _times(tensor: Tensor, key: Tensor) -> Tensor:
    """Of tokens that are the last of the keys."""
    n = key.shape[2]
    exact = torch.promote_types(tensor.dtype, torch.float32)
    return torch.arange(n - tensor.shape[2], n, device=tensor.device, dtype=exact)


def turned(tensor: Tensor, frequency: Tensor | None, times: Tensor) -> Tensor:
    """Times exp(i omega t), of tokens at these times."""
    if frequency is None:
        return tensor
    angle = times[:, None] * frequency.to(tensor.dtype)[:, None]  # [head, token, channel]
    real, imaginary = tensor.chunk(2, -1)
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat([real * cosine - imaginary * sine, real * sine + imaginary * cosine], -1)


def _of_heads(query: Tensor, name: str, given: Tensor | float) -> Tensor:
    exact = torch.promote_types(query.dtype, torch.float32)
    found = torch.as_tensor(given, dtype=exact, device=query.device)
    if found.ndim > 1 or (found.ndim == 1 and found.shape != query.shape[1:2]):
        raise ValueError(f"adaptive_filter: {name} is a number, or one of each head; got {list(found.shape)}")
    return found.expand(query.shape[1])[:, None, None]


def _noise(query: Tensor, knobs: dict[str, Any]) -> _Noise:
    default = {"decay": -1e-2, "process": 0.1, "measurement": 1.0, "anchor": 0.1}
    noise = _Noise(*(_of_heads(query, name, knobs.get(name, value)) for name, value in default.items()))
    if (
        (noise.decay > 0).any()
        or any((n < 0).any() for n in noise[1:])
        or (noise.measurement + noise.anchor <= 0).any()
    ):
        raise ValueError(
            "adaptive_filter: decay is 0 or less, process, measurement and anchor are variances, and of the last two "
            "one is above 0"
        )
    return noise


def _knobs(query: Tensor, knobs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    nu, tau = (_of_heads(query, name, knobs.get(name, 1.0)) for name in ("nu", "tau"))
    if (nu <= 0).any():
        raise ValueError("adaptive_filter: nu is above 0")
    return nu, tau


@module(
    "causal",
    build=lambda dim, heads, tokens: AdaptiveFilter(
        dim, heads=heads, length=tokens, width=max(2, dim // heads // 4 * 2)
    ),
)
class AdaptiveFilter(nn.Module):
    """The paper's layer in place of self-attention: [batch, token, dim] to the same, causal.

    width: complex channels of a head. length: tokens that decay and frequencies are set for; sequences may be shorter,
    or longer. norms: complex RMS norms of queries, keys and values; predict: the estimate, carried one token on;
    residual: add the values; still: no decay.

    >>> AdaptiveFilter(32, heads=2, length=50)(torch.randn(2, 50, 32)).shape
    torch.Size([2, 50, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        length: int,
        width: int | None = None,
        robust: bool = True,
        norms: bool = False,
        predict: bool = False,
        residual: bool = False,
        still: bool = False,
        noiseless: bool = False,
    ) -> None:
        super().__init__()
        width = dim // heads if width is None else width
        if width < 2 or width % 2 or length < 1:
            raise ValueError(
                f"AdaptiveFilter: frequencies come in pairs, so that width is even; got {width=}, {length=}"
            )
        self.heads, self.width, self.length, self.robust = heads, width, length, robust
        self.predict, self.residual, self.still, self.noiseless = predict, residual, still, noiseless
        wide = 2 * heads * width
        self.query, self.key, self.value = (_complex(nn.Linear(dim, wide)) for _ in range(3))
        self.output = _complex(nn.Linear(wide, dim))
        self.norms = nn.ModuleList(ComplexNorm(heads, width) for _ in range(3)) if norms else None
        self.decay, self.process, self.measurement, self.anchor = (nn.Parameter(torch.randn(heads)) for _ in range(4))
        self.frequency = nn.Parameter(torch.randn(heads, width // 2))
        self.nu, self.tau = nn.Parameter(torch.full((heads,), math.log(math.e - 1))), nn.Parameter(torch.ones(heads))

    def knobs(self) -> dict[str, Tensor]:
        """Those of `adaptive_filter`, of each head."""
        reach = 10 / (2 * self.length)
        turns = self.frequency * reach * 2 * math.pi
        decay = (self.decay.sigmoid() - 1) * reach - _EPS
        process = F.softplus(self.process)
        return {
            "decay": torch.zeros_like(decay) if self.still else decay,
            "frequency": torch.stack([turns, -turns], -1).flatten(1),
            "process": torch.zeros_like(process) if self.noiseless else process,
            "measurement": F.softplus(self.measurement) + _EPS,
            "anchor": F.softplus(self.anchor) + _EPS,
            "nu": F.softplus(self.nu) + _EPS,
            "tau": self.tau,
        }

    def estimate(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Of each token's state. [batch, head, token, 2 width], real parts first"""
        given = [self._by_head(to(hidden)) for to in (self.query, self.key, self.value)]
        normed = given if self.norms is None else [norm(t) for norm, t in zip(self.norms, given)]
        knobs, mask = self.knobs(), None if mask is None else mask[:, None, None]
        found = adaptive_filter(*normed, mask=mask, robust=self.robust, **knobs)
        return found + given[2] if self.residual else found

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """mask: which tokens there are, boolean [batch, token]."""
        found = self.estimate(hidden, mask=mask)
        if self.predict:
            knobs = self.knobs()
            found = turned(found, knobs["frequency"], torch.ones(1, dtype=found.dtype, device=found.device))
            found = found * knobs["decay"].exp()[:, None, None]
        real, imaginary = (part.transpose(1, 2).flatten(2) for part in found.chunk(2, -1))
        return self.output(torch.cat([real, imaginary], -1))

    def _by_head(self, tensor: Tensor) -> Tensor:
        return torch.cat(list(tensor.unflatten(-1, (2, self.heads, self.width)).unbind(2)), -1).transpose(1, 2)


class ComplexNorm(nn.Module):
    """Complex channels of each head over the root of their mean square, times a gain. [batch, head, token, 2 width]"""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(heads, width))

    def forward(self, tensor: Tensor) -> Tensor:
        squares = tensor.square().mean(-1, keepdim=True)
        return tensor / (squares + 1e-6).sqrt() * self.gain.repeat(1, 2)[:, None]


def _complex(layer: nn.Linear) -> nn.Linear:
    """Weights of random magnitude and phase, of real and imaginary parts together."""
    with torch.no_grad():
        size = layer.weight.numel() // 2
        magnitude = torch.randn(size) * math.sqrt(2 / (layer.in_features + layer.out_features))
        phase = torch.rand(size) * 2 * math.pi
        parts = torch.stack([magnitude * phase.cos(), magnitude * phase.sin()])
        stacked = layer.out_features >= layer.in_features  # the axis that holds real parts, then imaginary ones
        layer.weight.copy_(
            parts.view(2, -1, layer.in_features).flatten(0, 1)
            if stacked
            else parts.view(2, layer.out_features, -1).transpose(0, 1).flatten(1)
        )
        layer.bias.zero_()
    return layer
