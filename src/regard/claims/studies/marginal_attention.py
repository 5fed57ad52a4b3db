"""Singh and Buckley (arXiv:2304.04556): one posterior over graphs, and the kinds of attention that are its marginals.

Up to four queries and five keys, random scores and priors, some of them 0, so that every graph can be gone through.
This is arithmetic: nothing here can fail to be told. What must come out differently are the same forms with the axes
exchanged, and matchings, whose marginals are neither softmax nor Sinkhorn's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding
from ...models.slot_attention import CompetitiveAttention
from ...studies.marginal_attention import EDGES, Edges, enumerate_marginals, iterate, marginal_attention, sample_edges
from .._measure import Mean, exponent, mean

SCALES = "small", "large"
DRAWS, RUNS = {"small": 200, "large": 2000}, {"small": 250, "large": 2500}  # of each kind of iteration
CLOSED = EDGES[:-1]
SAMPLES, REPEATS = (16, 64, 256, 1024, 4096), 40
SHARP, EXACT = 200.0, 1e-12

EXPECTED = (
    "with one key a query, any edges, k keys and one query a key, closed forms are equal to sums over all graphs "
    "within 1e-12, priors of 0 among them; softmax and the library's slot attention are two of them; the mean of "
    "sampled graphs nears the marginals as samples to the -0.5, +-0.05, and as scores grow the most likely key has "
    "all weight; no step of the iterative forms raises the energy, and with keys of one length the step is that of a "
    "modern Hopfield network within 1e-12, else not (1e-3 or more); the controls differ: softmax over the other axis "
    "by 0.05 in the mean, one-to-one marginals from softmax and from Sinkhorn's by 0.01, by two standard errors"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Softmax, sigmoid, k-of-n and slot attention are marginals of one posterior; matchings are no such form."""
    generator = torch.Generator().manual_seed(seed)
    off: dict[Edges, float] = dict.fromkeys(CLOSED, 0.0)
    crossed, matched, balanced = [], [], []
    for _ in range(DRAWS[scale]):
        queries, keys = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((2, 5), (3, 6)))
        scores = 2 * torch.randn(queries, keys, generator=generator, dtype=torch.float64)
        prior = torch.rand(queries, keys, generator=generator, dtype=torch.float64)
        prior = prior * (torch.rand(queries, keys, generator=generator) < 0.8)
        for edges in off:
            # Free edges make too many graphs of more than three queries and four keys.
            some, of = (t[:3, :4] if edges == "any" else t for t in (scores, prior))
            k = 2 if edges == "k_keys" else 1
            if edges in ("one_key", "k_keys"):  # every query has keys enough
                of = of + 0.1 * (of.count_nonzero(-1) < k)[:, None]
            if edges == "one_query":
                of = of + 0.1 * (of.count_nonzero(0) == 0)
            ways = [way(some, prior=of, edges=edges, k=k) for way in (marginal_attention, enumerate_marginals)]
            off[edges] = max(off[edges], float((ways[0] - ways[1]).abs().max()))
        softmax = scores.softmax(-1)
        crossed.append(float((softmax - scores.softmax(-2)).abs().mean()))
        square = scores[:, :queries] if queries <= keys else scores[:keys]
        once = marginal_attention(square, edges="one_to_one")
        matched.append(float((once - square.softmax(-1)).abs().mean()))
        balanced.append(float((once - _sinkhorn(square)).abs().mean()))
    controls = {"axes exchanged": mean(crossed), "one to one": mean(matched), "Sinkhorn": mean(balanced)}

    code = _library(generator)
    sampled, rate, mode = _hard(generator)
    rises, same, other = _iterated(RUNS[scale], generator)
    exact = max(*off.values(), *code.values(), same)
    holds = exact <= EXACT and abs(rate + 0.5) <= 0.05 and mode <= EXACT and rises <= EXACT and other >= 1e-3
    holds = holds and controls["axes exchanged"].above(0.05)
    holds = holds and all(controls[name].above(0.01) for name in ("one to one", "Sinkhorn"))
    measured = (
        f"{DRAWS[scale]} draws: off sums over graphs by at most "
        + ", ".join(f"{edges} {by:.0e}" for edges, by in off.items())
        + f"; softmax by {code['softmax']:.0e}, slot attention's update by {code['slots']:.0e} (its recurrent cell is "
        f"no part of it); samples near marginals as their number to the {rate:.2f}, with scores grown {mode:.0e} "
        f"off their mode; largest rise of an energy in {2 * RUNS[scale]} runs {rises:.0e}; Hopfield's step off by "
        f"{same:.0e} with keys of one length, {other:.2f} without; differences of controls in the mean: "
        + ", ".join(f"{name} {by:.3f}" for name, by in controls.items())
    )

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        left.loglog(SAMPLES, sampled, "o-")
        left.loglog(SAMPLES, [sampled[0] * (s / SAMPLES[0]) ** -0.5 for s in SAMPLES], ":", color="grey")
        left.set(xlabel="graphs sampled", title="Hard attention: distance of their mean\n(dotted: power -0.5)")
        _bars(right, controls)

    return Finding(holds, measured, EXPECTED, seed, draw=draw)


def _bars(axes: Any, controls: dict[str, Mean]) -> None:
    names = [name.replace(" ", "\n") for name in controls]
    axes.bar(names, [by.value for by in controls.values()], yerr=[by.error for by in controls.values()])
    axes.set(title="Mean difference of what must differ")


def _sinkhorn(scores: Tensor) -> Tensor:
    """Rows and columns of exp(scores), normalised in turn."""
    for _ in range(500):
        scores = scores - scores.logsumexp(-1, keepdim=True)
        scores = scores - scores.logsumexp(-2, keepdim=True)
    return scores.exp()


def _library(generator: torch.Generator) -> dict[str, float]:
    """How far marginals are from softmax, with a mask and a position bias, and from the update of slot attention."""
    query, key, value = torch.randn(3, 1, 5, 4, generator=generator, dtype=torch.float64)
    place = torch.arange(5)
    away = (place[:, None] - place).double()
    prior = torch.exp(-0.3 * away.abs()) * (away >= 0)
    scores = query @ key.mT / 2
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=prior.log())
    shares = marginal_attention(scores, edges="one_query")
    slots = CompetitiveAttention(epsilon=0.0)(query, key, value)
    return {
        "softmax": float((marginal_attention(scores, prior=prior) @ value - theirs).abs().max()),
        "slots": float((shares / shares.sum(-1, keepdim=True) @ value - slots).abs().max()),
    }


def _hard(generator: torch.Generator) -> tuple[list[float], float, float]:
    """Distance of means of samples (root mean square), the power it follows, and that of sharp scores from a mode."""
    scores = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    right = marginal_attention(scores)
    found = []
    for count in SAMPLES:
        drawn = sample_edges(scores, count * REPEATS, generator=generator).double()
        means = drawn.unflatten(0, (REPEATS, count)).mean(1)
        found.append(math.sqrt(float((means - right).square().mean())))
    best, second = scores.topk(2).values.unbind(-1)
    grown = SHARP / float((best - second).min()) * scores  # a mode that nothing comes near
    mode = F.one_hot(scores.argmax(-1), 4)
    return found, exponent(SAMPLES, found), float((marginal_attention(grown) - mode).abs().max())


def _iterated(runs: int, generator: torch.Generator) -> tuple[float, float, float]:
    """Largest rise of an energy; largest difference from Hopfield's step with keys of one length, and mean without."""
    rises, same, other = [], [], []
    for competes in (False, True):
        for _ in range(runs):
            keys, queries = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (8, 3))
            beta = torch.rand(3, generator=generator, dtype=torch.float64) * 4 + 0.1
            found = iterate(keys, queries, beta=beta, steps=8, competes=competes)
            rises.append(float(found.energy.diff().max()))
            if not competes:
                for kept, of in ((same, F.normalize(keys, dim=-1)), (other, keys)):
                    step = (beta[:, None] * queries @ of.mT).softmax(-1) @ of
                    kept.append(float((iterate(of, queries, beta=beta).queries - step).abs().max()))
    return max(rises), max(same), float(mean(other).value)
