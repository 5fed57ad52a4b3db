"""How much attention lands on the anchors of a rule, what repeating them costs, and what a rule's format has to do.

Diederich, Rule Encoding and Compliance in Large Language Models: An Information-Theoretic Analysis (arXiv:2510.05106).
Rules in a prompt act through attention to anchor tokens. Pointer fidelity is the weight on the right anchors. Repeating
an anchor buys fidelity and, once that is high, pays with the entropy of attention.

The paper's theorems and constants were not at hand. All bounds here are ours, after the words of its abstract: with r
anchors among n visible keys, and a margin between the least anchor's score and the largest other. What depends on the
form of attention is what is visible (`in_sight`), and whether scores pass an exponential. Of hot reloading of verified
rules, the chain of two states is all that can be stated.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ..call import Call
from ..recording import statistic
from ..seam import record

Form = Literal["causal", "full", "window", "cross"]


class Pointing(NamedTuple):
    """How a call's queries look at anchors; each tensor is [batch, head, query]."""

    fidelity: Tensor  # weight on anchors, 0 to 1
    entropy: Tensor  # of all weights, nats
    anchors: Tensor  # that are visible
    keys: Tensor  # that are visible, anchors among them


def rule_encoding(call: Call, anchors: Tensor, *, apart: Tensor | None = None) -> Pointing:
    """Pointer fidelity of each query, 0 to 1, and what its bounds depend on; anchors is boolean [batch, key].

    apart: keys [batch, key], such as the first token, that fidelity leaves out: its share of the weight on the others.
    No map is made. NaN for queries that see no anchor; ValueError where none does.

    >>> import torch
    >>> from regard import Call, Site
    >>> zero = torch.zeros(1, 1, 4, 2)  # all scores equal
    >>> call = Call(Site("attention", "language_model", 0), zero, zero, zero, 1.0, causal=True)
    >>> rule_encoding(call, torch.tensor([[False, True, False, False]])).fidelity
    tensor([[[   nan, 0.5000, 0.3333, 0.2500]]])
    """
    weights = call.weights
    count = weights.visible(anchors)
    if not (count > 0).any():
        raise ValueError(f"none of {int(anchors.sum())} anchors is visible to any query of {call.site}")
    fidelity = weights.mass(anchors)
    if apart is not None:
        if (anchors & apart).any():
            raise ValueError("keys that are set apart are no anchors")
        fidelity = fidelity / (1 - weights.mass(apart)).clamp(min=torch.finfo(fidelity.dtype).tiny)
    return Pointing(
        torch.where(count > 0, fidelity, torch.nan), weights.entropy(), count, weights.visible().expand_as(count)
    )


def in_sight(anchors: Sequence[int], tokens: int, *, query: int, form: Form, window: int = 0) -> tuple[int, int]:
    """How many anchors, and how many keys, a query at a position sees, for each form of attention.

    anchors: positions. "causal": up to the query; "full" and "cross" (the other sequence's tokens): all; "window": the
    last `window` tokens, the query's own among them.

    >>> in_sight([3, 90], 100, query=99, form="window", window=16)
    (1, 16)
    """
    if (form == "window") != (window > 0):
        raise ValueError(f"a window is for form='window', of one token or more: got {window} with {form!r}")
    if form not in ("causal", "full", "window", "cross"):
        raise ValueError(f"form is one of causal, full, window, cross, got {form!r}")
    first = max(0, query + 1 - window) if form == "window" else 0
    last = query + 1 if form in ("causal", "window") else tokens
    return sum(first <= at < last for at in set(anchors)), last - first


def fidelity_bound(margin: float, anchors: int, keys: int, *, form: Literal["softmax", "kernel"] = "softmax") -> float:
    """The least weight on `anchors` of `keys` visible keys, 0 to 1; reached where scores are alike in both groups.

    margin: for softmax the least anchor's score less the largest other; for a kernel, whose weights are products of
    positive features, the ratio of the two, from 0 up, which features of a bounded ratio cannot take to infinity.

    >>> fidelity_bound(math.log(4), 2, 10), fidelity_bound(1.0, 2, 10, form="kernel")
    (0.5, 0.2)
    """
    _check(anchors, keys)
    if form not in ("softmax", "kernel"):
        raise ValueError(f"form is softmax or kernel, got {form!r}")
    if form == "kernel" and margin < 0:
        raise ValueError(f"a ratio of kernel values is from 0 up, got {margin}")
    if anchors in (0, keys):
        return float(anchors > 0)
    if form == "kernel":
        return anchors * margin / (anchors * margin + keys - anchors)
    log_odds = margin + math.log(anchors / (keys - anchors))
    return 1 / (1 + math.exp(-log_odds)) if log_odds > -700 else 0.0


def entropy_bounds(fidelity: float, anchors: int, keys: int) -> tuple[float, float]:
    """Least and largest entropy in nats of weights with this fidelity on `anchors` of `keys` keys.

    h(F) with h the binary entropy, where each group's weight is on one key, and that plus F ln r + (1 - F) ln(n - r),
    where it is spread evenly. So as F goes to 1, the entropy is at most ln r: redundancy pays.

    >>> [round(bound, 4) for bound in entropy_bounds(0.5, 2, 10)]
    [0.6931, 2.0794]
    """
    _check(anchors, keys)
    if not 0 <= fidelity <= 1 or (anchors == 0 and fidelity > 0) or (anchors == keys and fidelity < 1):
        raise ValueError(f"fidelity with {anchors} of {keys} keys as anchors cannot be {fidelity}")
    parts = [(fidelity, anchors), (1 - fidelity, keys - anchors)]
    least = -sum(share * math.log(share) for share, _ in parts if share > 0)
    return least, least + sum(share * math.log(count) for share, count in parts if share > 0)


def _check(anchors: int, keys: int) -> None:
    if not 0 <= anchors <= keys or keys < 1:
        raise ValueError(f"anchors are some of the keys, got {anchors} of {keys}")


def syntactic_entropy(rules: Iterable[Sequence[Any]]) -> float:
    """Entropy of a rule's tokens given its format, nats a token; 0 where all are alike.

    rules: many rules of one format, or many places where one rule stands, as tokens. Counted at each position by
    itself, over the rules that reach it (the plug-in estimate, at most the logarithm of their number: compare formats
    by as many rules).

    >>> syntactic_entropy([["if", "red", "stop"], ["if", "green", "stop"]])  # ln 2 in three tokens
    0.23104906018664842
    """
    rules = list(rules)
    tokens = sum(map(len, rules))
    if not tokens:
        raise ValueError("there are no tokens of rules")
    nothing = object()
    total = 0.0
    for position in zip_longest(*rules, fillvalue=nothing):
        counts = Counter(token for token in position if token is not nothing)
        total += sum(count * math.log(counts.total() / count) for count in counts.values())
    return total / tokens


def compliance(spoiled: float, restored: float, rounds: int | None = None) -> float:
    """Probability that a rule set is right after so many rounds, or in the end, 0 to 1; it is right at first.

    A chain of two states: right rules go wrong with probability `spoiled` a round, wrong ones are verified and replaced
    with `restored`. In the end restored / (spoiled + restored): without reloading 0.

    >>> compliance(0.25, 0.75), compliance(0.25, 0.0), compliance(0.25, 0.5, rounds=1)
    (0.75, 0.0, 0.75)
    """
    if not (0 <= spoiled <= 1 and 0 <= restored <= 1):
        raise ValueError(f"probabilities are from 0 to 1, got {spoiled} and {restored}")
    change = spoiled + restored
    if change == 0:
        return 1.0
    end = restored / change
    return end if rounds is None else end + (1 - end) * (1 - change) ** rounds


def anchor_sweep(
    model: nn.Module,
    prompt: Callable[[int], tuple[Mapping[str, Any], Tensor]],
    counts: Sequence[int],
    *,
    stack: str = "language_model",
) -> xr.Dataset:
    """What the last query makes of prompts with other numbers of anchors: fidelity, entropy, anchors and keys it sees.

    prompt: of a number of anchors, the model's inputs, unpadded, and where anchors are, boolean [batch, key]. One
    forward pass each. Variables [count, batch, layer, head].
    """
    found = []
    for count in counts:
        inputs, anchors = prompt(count)
        names = Pointing._fields
        named: dict[str, Any] = {name: partial(_part, anchors=anchors, name=name) for name in names}
        with record(model, **named) as recording, torch.no_grad():
            model(**inputs)
        if stack not in recording.tree.children:
            raise ValueError(f"the model has no stack {stack!r}; it has {', '.join(recording.tree.children)}")
        node = recording.tree[stack]
        found.append(xr.Dataset({name: node[name].isel(query=-1, drop=True) for name in names}))
    table = xr.concat(found, "count").assign_coords(count=np.asarray(counts))
    return table.drop_vars([name for name in table.coords if name not in ("count", "layer", "head")])


@statistic("batch head query", title="How queries look at anchors")
def _part(call: Call, *, anchors: Tensor, name: str) -> Tensor:
    return getattr(rule_encoding(call, anchors), name).float()
