"""Misra et al. (arXiv:2010.03045): triplet attention improves a convolutional network at hardly a cost.

A small residual network reads handwritten digits after few of them: without the block, and with it before each
residual sum, from the same initial weights of what both have and with the same batches. Controls: gates that are
learned but the same for every picture, and gates that were made from another picture, with which a trained network must
do worse if they say anything of what is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...mechanisms.triplet import Triplet
from .._measure import mean
from .._nets import Network, bars, digits, operations, right, size, train

SIDE, WIDTHS = 14, (8, 16, 32)
TRAINING, HELD_OUT, STEPS, RUNS = 600, 3000, 150, 4
BARE, TRIPLET, CONSTANT = "bare", "triplet", "constant gates"


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Accuracy with the block and without, what constant gates and gates of other pictures do, and the cost."""
    expected = (
        "with the block, accuracy higher by 0.5 points or more and by two standard errors over 4 trainings, and higher "
        "than with constant gates by the same; with gates of other pictures lower by two standard errors; parameters "
        "more by 1% at most, operations by 3% at most, of a network of ResNet-18's widths"
    )
    share: dict[str, list[float]] = {way: [] for way in (BARE, TRIPLET, CONSTANT)}
    others: list[float] = []
    for run in range(RUNS):
        at = RUNS * seed + run
        x, y, held, held_y = digits(TRAINING, HELD_OUT, at)
        for way, of in share.items():
            model = train(_network(way, at), x, y, steps=STEPS, seed=at)
            of.append(float(right(model, held, held_y).float().mean()))
            if way == TRIPLET:
                with _of_others(model):
                    others.append(float(right(model, held, held_y).float().mean()))

    def more(way: str, than: list[float]):
        return mean([100 * (a - b) for a, b in zip(share[way], than, strict=True)])

    gain, over, fall = more(TRIPLET, share[BARE]), more(TRIPLET, share[CONSTANT]), more(TRIPLET, others)
    added = _added()
    holds = gain.value >= 0.5 and gain.above() and over.value >= 0.5 and over.above() and fall.above()
    holds = holds and added[0] <= 0.01 and added[1] <= 0.03
    accuracy = mean(share[BARE])
    premises = [
        Premise(
            "the bare network is neither at chance nor done",
            "40% to 97%",
            f"{accuracy:.1%}",
            0.4 <= accuracy.value <= 0.97,
        ),
        Premise("4 trainings tell a point", "a standard error of 1 at most", f"{gain.error:.2f}", gain.error <= 1),
    ]
    measured = (
        f"accuracy {', '.join(f'{mean(of):.1%} {way}' for way, of in share.items())}; gain {gain:+.1f} points, on "
        f"constant gates {over:+.1f}, on gates of other pictures {fall:+.1f}; parameters +{added[0]:.1%}, operations "
        f"+{added[1]:.1%}"
    )
    draw = partial(
        bars, values={**share, "gates of others": others}, ylabel="accuracy", title="Handwritten digits, after 600"
    )
    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _added() -> tuple[float, float]:
    """Parameters and operations that the block adds to a network as large as ResNet-18 at 224 pixels, in shares."""
    with torch.device("meta"):  # sizes alone
        bare, with_it = (Network((64, 64, 128, 256, 512), 1000, block) for block in (None, lambda _: Triplet()))
        picture = torch.zeros(1, 3, 224, 224)
        return size(with_it) / size(bare) - 1, operations(with_it, picture) / operations(bare, picture) - 1


class _Constant(nn.Module):
    """A number a gate, learned, whatever the picture; as many gates as the block has."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.logits.sigmoid().mean()


def _network(way: str, seed: int) -> nn.Module:
    blocks = {BARE: None, TRIPLET: lambda _: Triplet(), CONSTANT: lambda _: _Constant()}
    torch.manual_seed(seed)
    bare = Network(WIDTHS, 10, channels=1)
    model = Network(WIDTHS, 10, blocks[way], channels=1)
    model.load_state_dict(bare.state_dict(), strict=False)
    return model


@contextmanager
def _of_others(model: nn.Module) -> Iterator[None]:
    """Each picture passes the gates of the one before it."""

    class Shifted(Triplet):
        def gates(self, x: Tensor) -> list[Tensor]:
            return [gate.roll(1, 0) for gate in super().gates(x)]

    blocks = [m for m in model.modules() if isinstance(m, Triplet)]
    for block in blocks:
        block.__class__ = Shifted
    try:
        yield
    finally:
        for block in blocks:
            block.__class__ = Triplet
