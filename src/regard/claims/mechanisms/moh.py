"""Jin et al. (arXiv:2410.11842): a model with three quarters of its heads active hardly loses, once trained on so.

The model is the zoo's reader, the text the first file of its recipe, in the folder that REGARD_DATA names. The model
is trained on with what it was trained with, and judged by the part that it never saw, beside a dense model that is
trained on as long. The control, before any training on, picks as many heads at random for each token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...mechanisms.moh import MixtureOfHeads, balance, moh
from .._measure import mean
from ._reader import losses_of, prose, train

SCALES = "small", "large"
ACTIVE = 0.75
STEPS = {"small": 70, "large": 1500}
WEIGHT = 0.01  # of the load-balance loss: the paper's


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Loss of the reader with 6 of 8 heads active, when converted and after training on, over that of the dense one."""
    expected = (
        "with 75% of heads active, after training on, a loss at most 1% above that of the dense model after as much, "
        "on prose that neither was trained on; before it, heads that the router picks lose less than as many at "
        "random, by two standard errors"
    )
    torch.manual_seed(seed)
    dense, held_out, batches = prose(STEPS[scale], seed=seed)
    model = copy.deepcopy(dense)
    moh(model, active=ACTIVE)
    each = {"dense": losses_of(dense, held_out), "converted": losses_of(model, held_out)}
    with _at_random(model):
        each["at random"] = losses_of(model, held_out)
    train(model, batches, lambda: WEIGHT * balance(model))
    each["trained on"] = losses_of(model, held_out)
    train(dense, batches)
    each["dense, trained on"] = losses_of(dense, held_out)
    losses = {name: float(loss.mean()) for name, loss in each.items()}
    over = {name: loss / losses["dense"] - 1 for name, loss in losses.items()}
    worse = mean(each["at random"] - each["converted"])
    left = mean((each["trained on"] - each["dense, trained on"]) / losses["dense, trained on"])
    holds = left.value <= 0.01 and worse.above()
    costs = Premise(
        "heads matter: leaving a quarter out costs something before training on",
        "more than 1%",
        f"{over['converted']:+.1%}",
        over["converted"] > 0.01,
    )
    loads = torch.stack([m.load for m in model.modules() if isinstance(m, MixtureOfHeads) and m.load is not None])

    measured = (
        f"dense {losses['dense']:.3f} nats a token; with 75% of heads {losses['converted']:.3f} when converted "
        f"({over['converted']:+.1%}; at random more by {worse:.3f}), {losses['trained on']:.3f} after {len(batches)} "
        f"steps, the dense model after as many {losses['dense, trained on']:.3f} ({left:+.2%}); "
        f"routed heads are picked by {float(loads.min()):.0%} to {float(loads.max()):.0%} of tokens"
    )
    return Finding(holds, measured, expected, seed, premises=[costs], draw=partial(_draw, over=over, loads=loads))


def _draw(figure: Any, *, over: dict[str, float], loads: Tensor) -> None:
    left, right = figure.subplots(1, 2)
    names = [name for name in over if name != "dense"]
    left.bar([name.replace(", ", ",\n") for name in names], [100 * over[name] for name in names])
    left.axhline(1, color="grey", linestyle=":")
    left.axhline(0, color="black", linewidth=0.8)
    left.set(ylabel="loss over the dense model's, %", title="On prose that none was trained on")
    image = right.imshow(loads, vmin=0, vmax=1, cmap="viridis")
    routed = range(loads.shape[1])
    right.set_xticks(routed, [f"{head + 8 - len(routed)}" for head in routed])
    right.set(xlabel="routed head", ylabel="layer", title="Share of tokens that pick it")
    figure.colorbar(image, ax=right)


@contextmanager
def _at_random(model: nn.Module) -> Iterator[None]:
    """Routed heads are picked at random, as many as by the router."""

    class Random(MixtureOfHeads):
        def gates(self, hidden: Tensor, query: Tensor | None) -> Tensor:
            gates = super().gates(hidden, query)
            routed = gates[..., self.shared :]
            mixed = routed.gather(-1, torch.rand_like(routed).argsort(-1))
            return torch.cat([gates[..., : self.shared], mixed], -1)

    mixtures = [m for m in model.modules() if isinstance(m, MixtureOfHeads)]
    for mixture in mixtures:
        mixture.__class__ = Random
    try:
        yield
    finally:
        for mixture in mixtures:
            mixture.__class__ = MixtureOfHeads
