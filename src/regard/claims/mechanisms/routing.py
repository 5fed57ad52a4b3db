"""Roy et al. (arXiv:2003.05997): clusters by learned means hold what belongs together, at a cost of n^1.5.

The task: half of the tokens show one of 16 colours and a symbol, the others ask by a colour for its symbol, which
differs between sequences. One layer; each of 16 clusters takes an eighth of the tokens. Controls: clusters of as many
tokens at random, and a window of as many. Rate of the means and steps were settled on seed 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...mechanisms import spec_of
from ...mechanisms.memory_efficient import memory_efficient
from ...mechanisms.routing import Routing, members, routing
from .. import _passkey as passkey
from .._measure import beside, grown, mean

SCALES = "small", "large"
LENGTHS = {"small": (2048, 4096, 8192, 16384), "large": (2048, 4096, 8192, 16384, 32768, 65536)}
STEPS = {"small": 250, "large": 2000}
COLOURS, SYMBOLS, PAIRS, DIM, HEADS, WINDOW = 16, 8, 48, 32, 2, 12
DECAY = 0.98  # of the means, for a short training


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Equal to the map of shared clusters; time; symbols found by learned clusters and by others."""
    expected = (
        "within 1e-9 of the average over clusters of attention masked to each, gradients too; time grows as length to "
        "the power of 1.65 at most, that of full attention of 1.7 or more; learned means find 85% of symbols or more, "
        "as many tokens at random, and a window of as many, 35% or fewer (chance: 12.5%)"
    )
    torch.manual_seed(seed)
    off = _off()
    ways: dict[str, Any] = {
        "full": memory_efficient,
        "learned means": Routing(DIM // HEADS, HEADS, COLOURS, window=WINDOW, decay=DECAY),
        "at random": _at_random,
        "window": _near,
    }
    right, models = {}, {}
    for name, way in ways.items():
        models[name] = _trained(way, STEPS[scale], seed)
        right[name] = mean(_right(models[name], seed))
    together = _together(models["learned means"], seed)
    lengths = LENGTHS[scale]
    times, powers = grown({"routing": routing, "full": memory_efficient}, lengths)
    holds = off <= 1e-9 and powers["routing"] <= 1.65 and powers["full"] >= 1.7
    holds = holds and right["learned means"].value >= 0.85
    holds = holds and all(right[name].value <= 0.35 for name in ("at random", "window"))
    learned = Premise(
        "full attention learns the task", "95% or more", f"{right['full']:.1%}", right["full"].value >= 0.95
    )

    def draw(figure: Any) -> None:
        beside(figure, right, lengths, times, ylabel="share right", title="Symbol of a colour")

    measured = (
        f"off by {off:.1e} at most; symbols found: {', '.join(f'{name} {share:.1%}' for name, share in right.items())}"
        f"; {together:.0%} of queries share a cluster with their colour; time grows with powers of "
        f"{', '.join(f'{power:.2f} ({name})' for name, power in powers.items())}"
    )
    return Finding(holds, measured, expected, seed, premises=[learned], draw=draw)


def _off() -> float:
    leaves = [torch.randn(1, 2, 60, 8, dtype=torch.float64).requires_grad_() for _ in range(3)]
    means = F.normalize(torch.randn(2, 6, 8, dtype=torch.float64), dim=-1)
    found = routing(*leaves, means=means, window=12)
    right = spec_of(routing).weights(*leaves[:2], causal=False, mask=None, scale=None, means=means, window=12)
    right = right @ leaves[2]
    given = torch.randn_like(right)
    grads = zip(torch.autograd.grad(found, leaves, given), torch.autograd.grad(right, leaves, given), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in [(found, right), *grads])


def _sequences(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Colours and what is shown of each token, a symbol or the question; the right symbols."""
    meant = torch.randint(SYMBOLS, (count, COLOURS))
    colours = torch.cat([torch.rand(count, COLOURS).argsort(-1)] * (PAIRS // COLOURS) * 2, -1)
    shown = torch.cat([meant.gather(1, colours[:, :PAIRS]), torch.full((count, PAIRS), SYMBOLS)], -1)
    mixed = torch.rand(count, 2 * PAIRS).argsort(-1)
    colours, shown = colours.gather(1, mixed), shown.gather(1, mixed)
    return colours, shown, meant.gather(1, colours)


class _Net(nn.Module):
    def __init__(self, way: Any) -> None:
        super().__init__()
        self.colours, self.shown = nn.Embedding(COLOURS, DIM), nn.Embedding(SYMBOLS + 1, DIM)
        self.layer, self.head = passkey.Layer(way, DIM, HEADS), nn.Linear(DIM, SYMBOLS)

    def forward(self, colours: Tensor, shown: Tensor) -> Tensor:
        return self.head(self.layer(self.colours(colours) + self.shown(shown)))


def _trained(way: Any, steps: int, seed: int) -> _Net:
    torch.manual_seed(seed)
    net = _Net(way)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 30)
        colours, shown, meant = _sequences(64)
        asks = shown == SYMBOLS
        loss = F.cross_entropy(net(colours, shown)[asks], meant[asks])
        if isinstance(way, Routing) and way.loss is not None:
            loss = loss + way.loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if isinstance(way, Routing):
            way.update()
    return net.eval()


@torch.no_grad()
def _right(net: _Net, seed: int) -> Tensor:
    """Share of each sequence."""
    torch.manual_seed(seed + 10_000)
    colours, shown, meant = _sequences(500)
    right = (net(colours, shown).argmax(-1) == meant).float()
    asks = shown == SYMBOLS
    return (right * asks).sum(-1) / asks.sum(-1)


@torch.no_grad()
def _together(net: _Net, seed: int) -> float:
    """Share of questions that meet a key of their colour with a symbol in a cluster of a head."""
    torch.manual_seed(seed + 10_000)
    colours, shown, _ = _sequences(100)
    layer = net.layer
    hidden = layer.norms[0](net.colours(colours) + net.shown(shown))
    query, key, _ = layer.parts(hidden).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    way = layer.attention
    assert isinstance(way, Routing)
    inside = []
    for tensor in (query, key):
        at = members(tensor, way.means, WINDOW, None)  # type: ignore[arg-type]
        inside.append(torch.zeros(*at.shape[:3], tensor.shape[2]).scatter_(-1, at, 1.0))
    meet = torch.einsum("bhcq,bhck->bqk", *inside) > 0
    same = (colours[:, :, None] == colours[:, None]) & (shown != SYMBOLS)[:, None]
    return float((meet & same).any(-1)[shown == SYMBOLS].float().mean())


def _at_random(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Routed by noise: clusters of as many tokens, the same for queries and keys."""
    noise = torch.randn_like(query)
    means = F.normalize(torch.randn(HEADS, COLOURS, query.shape[-1]), dim=-1)
    rows = members(noise, means, WINDOW, None)
    inside = torch.zeros(*rows.shape[:3], query.shape[2]).scatter_(-1, rows, 1.0)
    seen = torch.einsum("bhcq,bhck->bhqk", inside, inside) > 0
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen | ~seen.any(-1, keepdim=True))


def _near(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    at = torch.arange(query.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=(at[:, None] - at).abs() <= WINDOW // 2)
