"""Claim of Chaudhari et al., An Attentive Survey of Attention Models (arXiv:1904.02874), its taxonomy.

Attention models differ along four axes: the number of sequences, of levels of abstraction, of positions and of
representations. Here: the tags of the axes that can be told from outside, against what the operators of the room of
mechanisms do on random inputs. One sequence or two: whether an operator takes one, and as many keys as it likes of
another. Positions: soft, where every visible key has a weight; else hard, where which keys have one changes with what
the inputs hold, or local, where it does not; and no gradient may pass to a key that was not chosen, such as are keys
without a weight that have one in another draw, or where positions are local. Operators that are given their choice of
positions from outside are not judged by these. Representations: whether a weight is the same for
all features of a value. Levels cannot be told from outside. The control deals the papers' tags out anew, at random.

The survey says too that hard and local attention cost less. That is read off the costs that operators declare, at
their defaults, and reported.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import catalog
from ...catalog import Finding
from ...mechanisms import operators, spec_of
from ...mechanisms._mechanism import pairs

TOKENS, DIM, DRAWS, LONG = 64, 16, 8, 4096
# Where the defaults, or those for a short input, would hold all of it.
KNOBS: dict[str, dict[str, Any]] = {
    "attendre": {"chunk": 8, "memory": 16, "wait": 8},
    "agent_attention": {"agents": 8},
    "hyperattention": {"block": 8, "sample": 8, "least": 16},
    "landmark": {"block": 8, "top": 2},
}
# Take their choice of positions as an argument, from a gate or as a label.
CHOSEN_OUTSIDE = ("dynamic_mask", "part_attention", "sea", "seerattention", "select_and_pack", "sparsifiner")
SHUFFLES = 200
EXPECTED = (
    "tags of sequences, positions and representations agree with what each operator does; soft, hard and local all "
    "occur; and of tags dealt out at random among the operators more than 30% disagree"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """The survey's tags say what operators do."""
    keys = {row.object.partition(":")[0].rpartition(".")[2]: row for row in catalog.rows().values() if row.object}
    found = {name: operator for name, operator in operators().items() if name in keys}
    done = {name: behaviour(name, operator, seed) for name, operator in found.items()}
    tags = {name: set(keys[name].tags) for name in found}
    wrong = {keys[name].key: odd for name in found if (odd := disagreements(done[name], tags[name]))}
    kinds = {kind: sum(of["positions"] == kind for of in done.values()) for kind in ("soft", "hard", "local")}
    rng, shuffled = random.Random(seed), 0
    for _ in range(SHUFFLES):
        dealt = rng.sample(list(tags.values()), len(tags))
        shuffled += sum(bool(disagreements(of, given)) for of, given in zip(done.values(), dealt))
    by_chance = shuffled / SHUFFLES / len(found)

    costs = {name: _cost(operator) for name, operator in found.items()}
    dear = {
        kind: [keys[name].key for name in found if done[name]["positions"] == kind and costs[name] >= most]
        for kind, most in (("local", 0.5), ("hard", 1.0))
    }
    holds = not wrong and all(kinds.values()) and by_chance > 0.3
    listed = "; ".join(f"{key}: {', '.join(odd)}" for key, odd in wrong.items())
    counted = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    unsaid = sum(of["positions"] is None for of in done.values())
    measured = (
        f"of {len(found)} operators {len(found) - len(wrong)} do as their tags say"
        + (f" ({listed})" if wrong else "")
        + f"; {counted}, {unsaid} chosen from outside; of tags at random {by_chance:.0%} disagree. At {LONG} tokens "
        + "and the papers' settings, local ones that cost half of full attention or more: "
        + f"{', '.join(dear['local']) or 'none'}; hard ones that cost no less: {', '.join(dear['hard']) or 'none'}"
    )

    def draw(figure: Any) -> None:
        for axes, kind in zip(figure.subplots(1, 3, sharex=True), ("soft", "hard", "local")):
            shown = sorted((costs[name], keys[name].key) for name in found if done[name]["positions"] == kind)
            axes.barh([key for _, key in shown], [cost for cost, _ in shown])
            axes.axvline(1, color="0.6", lw=1)
            axes.tick_params(axis="y", labelsize=7)
            axes.set(xscale="log", title=kind)
        figure.supxlabel(f"operations, of full attention's, for {LONG} tokens", fontsize=9)

    return Finding(holds, measured, EXPECTED, seed, draw=draw)


def behaviour(name: str, operator: Callable[..., Tensor], seed: int = 0) -> dict[str, Any]:
    """What an operator does on random inputs.

    sequences: which of "self-attention" and "distinctive" it takes. positions: "soft", "hard" or "local", None where
    they are chosen outside. leaks: whether a key that was not chosen has a gradient. features: whether weights of one
    value differ among its features.
    """
    spec = spec_of(operator)
    knobs = {**(spec.sized((TOKENS,)) if spec.sized else {}), **KNOBS.get(name, {})}
    causal = not {"full", "cross"} & set(spec.patterns)
    generator = torch.Generator().manual_seed(seed)

    def inputs(keys: int = TOKENS) -> list[Tensor]:
        return [torch.randn(1, 1, n, DIM, generator=generator, dtype=torch.float64) for n in (TOKENS, keys, keys)]

    takes = {"self-attention": TOKENS, "distinctive": TOKENS + TOKENS // 2}
    sequences = {tag for tag, keys in takes.items() if _runs(operator, inputs(keys), causal, knobs)}
    # Of more keys than queries a causal operator takes the last queries of one sequence, not two.
    sequences -= {"distinctive"} if causal else set()

    drawn = [inputs() for _ in range(DRAWS)]
    weighed = torch.stack([spec.weights(q, k, causal=causal, mask=None, scale=None, **knobs) != 0 for q, k, _ in drawn])
    there = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    there = there.tril() if causal else there
    positions = "soft" if weighed[..., there].all() else "local" if (weighed == weighed[:1]).all() else "hard"

    query, key, value = drawn[0]
    key.requires_grad_()
    value.requires_grad_()
    rows = range(0, TOKENS, TOKENS // 4)
    output = operator(query, key, value, causal=causal, **knobs)[0, 0]
    along = torch.randn(DIM, generator=generator, dtype=torch.float64)
    leaks = features = False
    for row in rows:
        grad_key, grad_value = torch.autograd.grad(output[row] @ along, (key, value), retain_graph=True)
        left = ~weighed[0, 0, 0, row]  # among them, where positions are hard, those that can be chosen at all
        left &= weighed[:, 0, 0, row].any(0) if positions == "hard" else positions == "local"
        leaks |= bool((grad_key[0, 0, left] != 0).any() or (grad_value[0, 0, left] != 0).any())
        weight = grad_value[0, 0] / along  # [key, feature]: one and the same for all features, or not
        features |= not torch.allclose(weight, weight[:, :1].expand_as(weight), atol=1e-9)
    return {
        "sequences": sequences,
        "positions": None if name in CHOSEN_OUTSIDE else positions,
        "leaks": leaks,
        "features": features,
    }


def disagreements(done: dict[str, Any], tags: set[str]) -> list[str]:
    """In which ways tags say other than what an operator did; see `behaviour`."""
    odd = []
    if tags & {"self-attention", "distinctive"} != done["sequences"]:
        odd.append(f"takes {' and '.join(sorted(done['sequences']))}")
    if (kind := done["positions"]) and f"{kind}-positions" not in tags:
        odd.append(f"is {kind}")
    if done["leaks"]:
        odd.append("has a gradient for keys not chosen")
    if done["features"] != ("multi-dimension" in tags):
        odd.append(f"has {'other weights' if done['features'] else 'the same weight'} for other features")
    return odd


def _runs(operator: Callable[..., Tensor], inputs: list[Tensor], causal: bool, knobs: dict[str, Any]) -> bool:
    try:
        operator(*inputs, causal=causal, **knobs)
    except ValueError:
        return False
    return True


def _cost(operator: Callable[..., Tensor]) -> float:
    """Operations for one head of a long sequence, of those of full attention to as many pairs."""
    spec = spec_of(operator)
    parameters = list(inspect.signature(operator).parameters.values())[6:]
    knobs = {p.name: p.default for p in parameters if p.name in inspect.signature(spec.cost).parameters}
    causal = not {"full", "cross"} & set(spec.patterns)
    return spec.cost(LONG, LONG, DIM, causal=causal, **knobs).operations / (4 * DIM * pairs(LONG, LONG, causal))
