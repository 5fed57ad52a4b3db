"""Queries of the heads that read the context are moved to where they look at what matters.

Zhu et al., Focus Directions Make Your Language Models Pay More Attention to Relevant Contexts (arXiv:2503.23306), by
the authors' code. Contextual heads are those whose queries in the answer give most attention to the relevant part of
the prompt. For each head an offset of its queries is learned, on queries and keys as the plain model makes them, that
makes that attention largest: AdamW, one prompt a step, ten times through all prompts, at a rate of 0.001, from
numbers of standard deviation 0.01. `strength` (0.2) times this offset is then added to every query of the 20 most
contextual heads, after the position embedding; nothing tells the model what is relevant.

Deviations: the paper learns an offset of the keys too. It adds the same to all scores of a query, which softmax
cancels, so there is none here. The paper learns from about 6,600 prompts on public questions with 20 documents each;
`fit`, which `regard steer` uses, from 16 generated ones that hide a pass key, at a rate of 0.1. We had the code, not
the paper's text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..call import Call
from ..data import prompts
from ..data.prompts.arguments import NAMES
from ..data.prompts.copying import WORDS
from ..recording import statistic
from ..seam import intervene, record
from ._method import STACK, Method, layers, require

N_HEADS, STRENGTH = 20, 0.2
Directions = Mapping[tuple[int, int], Tensor]  # layer and head -> offset of its queries [dim]


class Example(NamedTuple):
    """A prompt and its answer, and which tokens are which: boolean, [batch, token]."""

    inputs: Mapping[str, Any]
    relevant: Tensor  # what the answer is to be read from
    answer: Tensor  # whose queries are to read it


@dataclass(kw_only=True)
class focus_directions(Method):
    """Add a learned offset to the queries of some heads, so that they attend to the relevant part of the context.

    directions: the offsets, as `learn_directions` finds them for the heads of `contextual_heads`. strength: how much
    of them is added; 0 changes nothing, and below 0 heads look away.

    ValueError where the model has no language model that reads from left to right, or not these layers and heads.

    >>> import torch, regard
    >>> from regard.interventions.focus_directions import Example, contextual_heads, focus_directions, learn_directions
    >>> model, tokenizer = regard.load("reader")
    >>> inputs = tokenizer("the queen saw a cat and the king saw a dog . the queen saw a cat", return_tensors="pt")
    >>> place = torch.arange(inputs["input_ids"].shape[1])[None]
    >>> examples = [Example(inputs, relevant=place < 6, answer=place > 12)]
    >>> heads = contextual_heads(model, examples, n=4)
    >>> focus = focus_directions(directions=learn_directions(model, examples, heads))
    >>> with torch.no_grad(), regard.intervene(model, focus):
    ...     logits = model(**inputs).logits
    """

    needs = "directions, from prompts that hide a pass key"

    off: ClassVar = {"strength": 0.0}

    directions: Directions
    strength: float = STRENGTH
    _offsets: dict[int, Tensor | None] = field(default_factory=dict, init=False, repr=False)  # by layer [head, 1, dim]

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        inputs: Mapping[str, Any],
        processor: Any = None,
        *,
        strength: float = STRENGTH,
        **knobs: Any,
    ) -> Self:
        """With directions learned from prompts that hide a pass key, in the tokens of `processor`."""
        if "directions" not in knobs:
            layers(model, "focus-directions")
            examples = hidden_keys(getattr(processor, "tokenizer", processor))
            heads = contextual_heads(model, examples)
            knobs["directions"] = learn_directions(model, examples, heads, rate=0.1)
        return cls(strength=strength, **knobs)

    def begin(self, model: nn.Module) -> None:
        require(model, "focus-directions", (layer for layer, _ in self.directions), "learn directions on this model")
        self._offsets = {}

    def inputs(self, call: Call) -> Call:
        if call.site.stack != STACK or not self.strength:
            return call
        offset = self._offset(call)
        return call if offset is None else call.but(query=call.query + self.strength * offset)

    def _offset(self, call: Call) -> Tensor | None:
        layer = call.site.layer
        if layer not in self._offsets:
            own = {head: direction for (at, head), direction in self.directions.items() if at == layer}
            heads, dim = call.query.shape[1], call.query.shape[3]
            for head, direction in own.items():
                if not 0 <= head < heads or direction.shape != (dim,):
                    raise ValueError(
                        f"focus-directions: {call.site} has {heads} heads of {dim} numbers, and no head {head} for a "
                        f"direction {list(direction.shape)}: learn directions on this model"
                    )
            self._offsets[layer] = placed(own, call.query) if own else None
        return self._offsets[layer]


def placed(own: Mapping[int, Tensor], query: Tensor) -> Tensor:
    """Offsets of all heads of a call, zeros but for `own` ones. [head, 1, dim]"""
    zero = query.new_zeros(query.shape[3])
    return torch.stack([own.get(head, zero).to(query) for head in range(query.shape[1])])[:, None]


@torch.no_grad()
def contextual_heads(model: nn.Module, examples: Sequence[Example], *, n: int = N_HEADS) -> list[tuple[int, int]]:
    """The `n` pairs of layer and head whose queries in the answers attend most to what is relevant, the most first."""
    layers(model, "focus-directions")
    scores: dict[int, list[Tensor]] = {}
    for example in examples:

        @statistic("batch head", title="Weight on what is relevant")
        def read(call: Call, example: Example = example) -> Any:  # nothing is recorded
            if call.site.stack == STACK:
                mass = call.weights.mass(example.relevant.to(call.key.device))
                scores.setdefault(call.site.layer, []).append(_mean(mass, example.answer))

        with record(model, read):
            model(**example.inputs)
    by_layer = torch.stack([torch.stack(scores[layer]).mean(0) for layer in sorted(scores)])
    best = by_layer.flatten().argsort(descending=True)[:n].tolist()
    return [(sorted(scores)[i // by_layer.shape[1]], i % by_layer.shape[1]) for i in best]


def learn_directions(
    model: nn.Module,
    examples: Sequence[Example],
    heads: Sequence[tuple[int, int]],
    *,
    epochs: int = 10,
    rate: float = 1e-3,
    start: Directions | None = None,
    seed: int = 0,
) -> dict[tuple[int, int], Tensor]:
    """For each of `heads` the offset of its queries that makes answers attend to what is relevant, [dim].

    rate: AdamW's; the offsets move by about that much in each number a step, one step an example, so few examples want
    a larger one than the paper's. start: offsets to go on from; where there are none they are drawn by `seed`, which
    also shuffles the examples. The model's own weights stay as they are, and so does the course of its run: each
    offset is learned as if it were alone.
    """
    learner = _Learner(heads, rate, torch.Generator().manual_seed(seed), start or {})
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for i in torch.randperm(len(examples), generator=shuffle).tolist():
            learner.example = examples[i]
            with torch.no_grad(), intervene(model, learner):
                model(**examples[i].inputs)
    return {pair: direction.detach() for pair, direction in learner.directions.items()}


class _Learner:
    """Takes a step of the offsets of each layer as the model runs; changes nothing."""

    def __init__(
        self, heads: Sequence[tuple[int, int]], rate: float, generator: torch.Generator, start: Directions
    ) -> None:
        self.heads, self.rate, self.generator, self.start = heads, rate, generator, start
        self.directions: dict[tuple[int, int], Tensor] = {}
        self.optimisers: dict[int, torch.optim.Optimizer] = {}
        self.example: Example

    def inputs(self, call: Call) -> Call:
        layer = call.site.layer
        own = [head for at, head in self.heads if at == layer] if call.site.stack == STACK else []
        if not own:
            return call
        if layer not in self.optimisers:
            made = 0.01 * torch.randn(len(own), call.query.shape[3], generator=self.generator)
            for head, numbers in zip(own, made):
                numbers = self.start.get((layer, head), numbers).to(call.query.device)
                self.directions[layer, head] = numbers.detach().clone().requires_grad_()
            self.optimisers[layer] = torch.optim.AdamW([self.directions[layer, head] for head in own], lr=self.rate)
        answer, relevant = (where.to(call.query.device) for where in (self.example.answer, self.example.relevant))
        at = answer.any(0).nonzero()[:, 0]
        first, last = int(at[0]), int(at[-1]) + 1
        with torch.enable_grad():
            offset = placed({head: self.directions[layer, head] for head in own}, call.query)
            moved = call.but(query=call.query.detach() + offset, key=call.key.detach())
            mass = (moved.weights.rows(first, last) * relevant[:, None, None]).sum(-1)
            loss = -_mean(mass[:, own], answer[:, first:last]).mean()
        self.optimisers[layer].zero_grad()
        loss.backward()
        self.optimisers[layer].step()
        return call


def hidden_keys(tokenizer: Any, n: int = 16, *, seed: int = 0) -> list[Example]:
    """Prompts that hide a pass key in other text and ask for it, and the key as their answer."""
    if tokenizer is None:
        raise ValueError("focus-directions: prompts to learn from need the model's tokenizer; or give directions")
    words = prompts.single((*NAMES, *WORDS), tokenizer)
    if len(words) < 2:
        raise ValueError("focus-directions: the tokenizer knows too few words to hide one; learn from your own prompts")
    found = []
    for prompt in prompts.passkey(n, seed=seed, keys=words):
        encoded = prompts.encode(prompt, tokenizer)
        ids = torch.tensor([[*encoded.ids, encoded.answers[0]]])
        relevant, answer = (torch.zeros_like(ids, dtype=torch.bool) for _ in range(2))
        relevant[0, [*encoded.positions["KEY"], *encoded.positions["KEY_AGAIN"]]] = True
        answer[0, -2:] = True  # the token from which the key is told, and the key
        found.append(Example({"input_ids": ids}, relevant, answer))
    return found


def _mean(mass: Tensor, answer: Tensor) -> Tensor:
    """Mean of [batch, head, query] over the queries of the answers [batch, query]. [head]"""
    counted = answer.to(mass)[:, None]
    return (mass * counted).sum((0, 2)) / counted.sum()
