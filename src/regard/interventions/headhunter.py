"""Pictures led away from what a model paints with some heads dulled, and the heads for which that serves a purpose.

Ahn et al., Fine-Grained Perturbation Guidance via Attention Head Selection (arXiv:2506.10978), sections 2 to 4,
algorithm 1, equations 1 to 7; there was no code of the authors. A second run has the self-attention maps of some heads
moved towards the identity, (1 - u) A + u I (SoftPAG; u = 1 is perturbed-attention guidance, Ahn et al.,
arXiv:2403.17377). What the model gives becomes output + w (output - second). HeadHunter takes, in each of some rounds,
the heads that raise a score of pictures most beside those it has.

Where pictures and words attend together, only what picture tokens give to other picture tokens is taken away and the
rest of the row made up to 1, as diffusers' processors for such guidance do; words are left alone. Under classifier-free
guidance pipelines run a model on two halves, without words and with them: then w times what the second half differs by
is added to both, so that it counts once (`halved`). The paper scores by PickScore, which is a model of its own;
without `score`, `fit` hunts for vivid colours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..call import Call
from ..seam import intervene
from ._method import Method
from ._painting import attention, painted, prompts

Head = tuple[str, int]  # the name of an attention module, and the number of a head in it
SHARE = 24 / 576  # of the heads of SD3-medium, that the paper takes for quality


class headhunter(Method):
    """Lead pictures away from what a model paints where `heads` see only the place itself.

    heads: names of self-attention modules and their heads, as `hunt` finds them among `self_attention(model)`.
    u: how far their maps are moved towards the identity, 0 to 1. w: how far pictures are led away; 0 changes nothing.
    halved: the model runs on two halves, without words and with them, as under classifier-free guidance.

    ValueError where the model has no such head, or a batch is not of two halves.

    >>> import regard
    >>> from regard.interventions.headhunter import headhunter
    >>> transformer, pipeline = regard.load("painter")
    >>> heads = [("transformer_blocks.2.attn1", 0), ("transformer_blocks.2.attn1", 3)]
    >>> with regard.intervene(transformer, headhunter(heads=heads, u=0.5, w=2.0)):
    ...     image = pipeline("a red circle and a blue star", generator=torch.manual_seed(0)).images[0]
    """

    off: ClassVar[Mapping[str, Any]] = {"w": 0.0}
    needs = "heads, by painting with each of them dulled"

    def __init__(self, *, heads: Sequence[Head], u: float = 1.0, w: float = 3.0, halved: bool = True) -> None:
        self.aside = Dulled(heads, u)
        self.w, self.halved = w, halved

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        inputs: Mapping[str, Any],
        processor: Any = None,
        *,
        score: Callable[[NDArray[np.float32]], Any] | None = None,
        k: int | None = None,
        rounds: int = 1,
        seed: int = 0,
        **knobs: Any,
    ) -> Self:
        """Without `heads`, those that raise `score` of the pictures [picture, row, column, 3] of `inputs` most.

        processor: the pipeline, which paints a picture for each prompt with each head by itself, in each round.
        score: without, mean chroma. k: heads a round; without, a 24th of all, at least one.
        """
        if "heads" not in knobs:
            known, told = self_attention(model), prompts(inputs, "headhunter")

            def make(heads: Sequence[Head]) -> NDArray[np.float32]:
                with intervene(model, cls(heads=heads, **knobs)):
                    return painted(processor, {**inputs, "prompt": told}, seed=seed)

            count = max(1, round(SHARE * len(known))) if k is None else k
            knobs = {**knobs, "heads": hunt(make, score or chroma, known, k=count, rounds=rounds)}
        return cls(**knobs)

    def begin(self, model: nn.Module) -> None:
        self.aside.begin(model)

    def guided(self, output: Tensor, other: Tensor) -> Tensor:
        if self.w == 0:
            return output
        away = self.w * (output - other)
        if self.halved:
            if len(output) % 2:
                raise ValueError(
                    f"headhunter: a batch of {len(output)} is not one without and one with words; where the pipeline "
                    f"paints without classifier-free guidance, give halved=False"
                )
            away = away.chunk(2)[1].repeat(2, *[1] * (output.ndim - 1))
        return output + away


class Dulled:
    """Moves the self-attention maps of some heads towards the identity, by `u`."""

    def __init__(self, heads: Sequence[Head], u: float = 1.0) -> None:
        if not 0 <= u <= 1:
            raise ValueError(f"headhunter: u is a share, 0 to 1, not {u}")
        self.u = u
        self.heads: dict[str, list[int]] = {}
        for name, head in heads:
            self.heads.setdefault(name, []).append(head)

    def begin(self, model: nn.Module) -> None:
        known = attention(model, "headhunter")
        for name, some in self.heads.items():
            cross, count = known.get(name, (False, 0))
            if cross or not all(0 <= head < count for head in some):
                kind = "cross attention, not self-attention" if cross else f"not among its heads ({count})"
                raise ValueError(
                    f"headhunter: {name} of {type(model).__name__}, heads {some}: {kind}; see self_attention(model)"
                )

    def output(self, call: Call, output: Tensor) -> Tensor:
        heads = self.heads.get(call.site.name)
        if heads is None or self.u == 0:
            return output
        new = output.clone()
        new[:, heads] += self.u * (alone(call, heads) - output[:, heads])
        return new


def alone(call: Call, heads: Sequence[int]) -> Tensor:
    """Output of some heads if no picture token saw another one. [batch, head, query, dim]

    ValueError where which tokens are of the picture is not known, or queries are not the keys.
    """
    known = call.query_tokens is not None and call.tokens is not None and call.query.shape[2] == call.key.shape[2]
    query, key = (t.role("image") for t in (call.query_tokens, call.tokens)) if known else (None, None)  # type: ignore
    if query is None or key is None or not bool(query.any(1).all()):
        raise ValueError(f"headhunter: which tokens of {call.site} are of the picture is not known")
    every = list(heads)
    of = [head // (call.query.shape[1] // call.key.shape[1]) for head in every]
    if bool(query.all()) and call.mask is None:
        return call.value[:, of]
    n = query.shape[1]
    others = query[:, :, None] & key[:, None] & ~torch.eye(n, dtype=torch.bool, device=query.device)
    hidden = torch.zeros(others.shape, dtype=call.query.dtype, device=query.device).masked_fill(others, -torch.inf)
    bias = hidden[:, None] if call.bias is None else call.bias + hidden[:, None]
    bias = bias if bias.shape[1] == 1 else bias[:, every]
    mask = call.mask if call.mask is None or call.mask.ndim < 4 or call.mask.shape[1] == 1 else call.mask[:, every]
    part = call.but(query=call.query[:, every], key=call.key[:, of], value=call.value[:, of], bias=bias, mask=mask)
    return part.weights.output()


def self_attention(model: nn.Module) -> list[Head]:
    """All heads of self-attention of a model that denoises; ValueError where it has none."""
    return [
        (name, head)
        for name, (cross, count) in attention(model, "headhunter").items()
        if not cross
        for head in range(count)
    ]


def hunt(
    make: Callable[[Sequence[Head]], Any],
    score: Callable[[Any], Any],
    heads: Sequence[Head],
    *,
    k: int = 24,
    rounds: int = 1,
) -> list[Head]:
    """The heads that raise a score most, `k` a round, best first.

    make: pictures painted with these heads dulled; it has to draw the same noise each time. score: of each picture,
    higher is better. ValueError for more heads than there are.

    >>> from regard.interventions.headhunter import hunt
    >>> worth = {("attn", 0): 1.0, ("attn", 1): 3.0, ("attn", 2): 2.0}
    >>> hunt(lambda some: [sum(worth[head] for head in some)], list, list(worth), k=1, rounds=2)
    [('attn', 1), ('attn', 2)]
    """
    if not 0 < k * rounds <= len(heads):
        raise ValueError(f"headhunter: {rounds} rounds of {k} heads, and there are {len(heads)}")
    found: list[Head] = []
    for _ in range(rounds):
        left = [head for head in heads if head not in found]
        means = [float(np.mean(np.asarray(score(make([*found, head]))))) for head in left]
        found += [left[i] for i in np.argsort(means, kind="stable")[::-1][:k]]
    return found


def chroma(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    """How vivid each picture is, 0 to 1: its pixels' largest less their smallest channel, in the mean. [picture]"""
    return np.ptp(np.asarray(pictures), axis=-1).mean((1, 2))
