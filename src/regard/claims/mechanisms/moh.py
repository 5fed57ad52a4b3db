"""Jin et al. (arXiv:2410.11842): a model with three quarters of its heads active hardly loses, once trained on so.

The model is the zoo's reader, the text the first file of its recipe, in the folder that REGARD_DATA names. The model
is trained on with what it was trained with, and judged by the part that it never saw.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import zoo
from ...catalog import Finding
from ...mechanisms.moh import MixtureOfHeads, balance, moh
from ...zoo.recipes import reader
from .._data import folder

SCALES = "small", "large"
ACTIVE = 0.75
PHASE, HELD_OUT = reader.Phase(1, 128, 16, 0.0, 0.0), reader.Phase(1, 128, 256, 0.0, 0.0)
STEPS = {"small": 80, "large": 1500}
RATE, WEIGHT = 1e-3, 0.01  # WEIGHT of the load-balance loss: the paper's


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Loss of the reader with 6 of 8 heads active, when converted and after training on, over that of the dense one."""
    expected = (
        "with 75% of heads active, after training on, a loss at most 1% above that of the dense model, on prose that "
        "neither was trained on (cannot tell where leaving the heads out loses no more than that before training)"
    )
    torch.manual_seed(seed)
    dense, tokenizer = zoo.load("reader")
    known, unknown = reader.split(_texts()[:1], tokenizer)
    of_tokenizer = len(tokenizer), seed
    held_out = reader.batch(unknown, HELD_OUT, *of_tokenizer, 0, tokenizer.bos_token_id)
    batches = [reader.batch(known, PHASE, *of_tokenizer, i + 1, tokenizer.bos_token_id) for i in range(STEPS[scale])]
    model = copy.deepcopy(dense)
    moh(model, active=ACTIVE)
    losses = {"dense": _loss(dense, held_out), "converted": _loss(model, held_out)}
    _train(model, batches)
    losses["trained on"] = _loss(model, held_out)
    _train(dense, batches)
    losses["dense, trained on"] = _loss(dense, held_out)  # beside the claim: what training on gives by itself
    over = {name: loss / losses["dense"] - 1 for name, loss in losses.items()}
    holds = None if over["converted"] <= 0.01 else over["trained on"] <= 0.01
    loads = torch.stack([m.load for m in model.modules() if isinstance(m, MixtureOfHeads) and m.load is not None])

    measured = (
        f"dense {losses['dense']:.3f} nats a token; with 75% of heads {losses['converted']:.3f} when converted "
        f"({over['converted']:+.1%}), {losses['trained on']:.3f} after {len(batches)} steps "
        f"({over['trained on']:+.1%}; the dense model after as many {losses['dense, trained on']:.3f}); "
        f"routed heads are picked by {float(loads.min()):.0%} to {float(loads.max()):.0%} of tokens"
    )
    return Finding(holds, measured, expected, seed, draw=partial(_draw, over=over, loads=loads))


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


def _texts() -> list[str]:
    return reader.texts(folder("text_books").parent)


@torch.no_grad()
def _loss(model: Any, texts: Tensor) -> float:
    return sum(float(model(part, labels=part).loss) for part in texts.split(64)) / len(texts.split(64))


def _train(model: Any, batches: list[Tensor]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    mixed = any(isinstance(m, MixtureOfHeads) for m in model.modules())
    for step, texts in enumerate(batches):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 10, (len(batches) - step) / len(batches) * 2)
        loss = model(texts, labels=texts).loss
        optimizer.zero_grad()
        (loss + WEIGHT * balance(model) if mixed else loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
