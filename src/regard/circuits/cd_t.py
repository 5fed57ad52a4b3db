"""A model's output split exactly into what chosen heads or tokens bring to it, and the rest; and circuits from that.

Hsu, Zhou, Cherapanamjeri, Huang, Odisho, Carroll and Yu, Efficient Automated Circuit Discovery in Transformers using
Contextual Decomposition (arXiv:2407.00886), with the rules of their code at adelaidehsu/CD_Circuit for GPT-2. Each
state is a pair, relevant + irrelevant:

- a matrix multiplies both; its bias is shared out by the sizes of what it gave to each;
- a norm scales both by the whole's deviation, and shares its shift out by the sizes of what it was given;
- attention gives softmax(r q . r k) r v as relevant, and what is left of the whole's output as irrelevant;
- an activation f gives f(r + i) - f(i) and f(i);
- after feed-forward matrices and after layers, where the two have unlike signs the smaller is taken out of the larger.

A head is made a source by setting its pair to (its output - its mean over a reference, that mean), before the output
projection.

With weights="whole", the rule of the paper's first version and of its code until September 2024, attention weights are
the whole's and mix both parts' values: then a head acts through what others copy, not through where they look.
`regard.circuits.attention_decomposition` sees the latter.

Ours: where both parts are 0 all of a bias is irrelevant (the code loses it). A product of two parts, as in gated
feed-forward modules, which the paper does not have, gives (r + i)(r' + i') - i i' and i i', the rule for activations.
`circuit` follows Algorithm 1 in outline (sources of the score, then sources of these, then greedy pruning); we had no
text of its thresholds, so `take` and `least` are ours.

The pairs run through the model's own code as rows of one batch, and hooks apply the rules. Whether the parts add up to
the model's own score is checked; models that compute something else on the way (T5's two stacks, experts, softcapped
logits, activations that are no modules) are refused by that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import xarray as xr
from torch import Tensor, nn

from ..call import Call, Site, UnreachableAttention
from ..seam import intervene
from ..sites import find
from ._gates import Gates, Head, frozen, layout, table, without
from ._norms import hold, is_norm
from ._parts import is_matrix

Inputs = Mapping[str, Any]
Score = Callable[[Tensor], Tensor]  # of logits [batch, ...], linear: [batch]
Rule = Literal["split", "whole"]  # of attention weights
_TOLERANCE = 1e-3  # of the score's size, for the parts to count as adding up


class Source(NamedTuple):
    """What is relevant: a head's output, at one token or all; or, where `layer` is None, what a token brings in."""

    layer: int | None = None
    head: int = 0
    token: int | None = None


def cd_t(
    model: nn.Module,
    inputs: Inputs,
    score: Score,
    *,
    reference: Inputs | None = None,
    by_token: bool = False,
    weights: Rule = "split",
    stack: str | None = None,
    at_once: int = 16,
) -> xr.Dataset:
    """What each head brings to a score, along all paths. [layer, head] or [layer, head, token]

    `relevance`, of either sign, and `rest`, means over rows; they add up to the attribute `score`, to rounding.

    inputs: of the model. score: linear in logits [batch, ...], such as the difference of two, for each row [batch].
    reference: inputs of as many tokens; a head counts as far as it departs from its mean over these. Without, from 0.
    by_token: each token of a head's output for itself. weights: "split" lets a head act through what others look at,
    "whole" leaves that as it is; see this module. at_once: sources in a pass, two rows of each for every row.

    Raises UnreachableAttention where relevance and rest do not add up to the model's own score; see this module.

    >>> import regard
    >>> model, tokenizer = regard.load("reader")
    >>> inputs = tokenizer("the king and the queen and the", return_tensors="pt")
    >>> found = cd_t(model, inputs, lambda logits: logits[:, -1, 300] - logits[:, -1, 301])
    >>> parts = found["relevance"] + found["rest"]
    >>> bool(abs(parts - found.attrs["score"]).max() < 1e-3)
    True
    """
    stack, sites, _ = _layout(model, inputs, stack)
    means = None if reference is None else _means(model, reference, stack)
    n_tokens = _n_tokens(inputs) if by_token else 1
    sources = [
        Source(layer, head, token if by_token else None)
        for layer, site in sites.items()
        for head in range(site.heads)
        for token in range(n_tokens)
    ]
    split = _split(model, inputs, score, stack, sources, means, at_once, weights)
    found = {}
    for name, part in (("relevance", split.relevant), ("rest", split.rest)):
        means_of = part.mean(1)
        if by_token:
            tables = [table(_by_layer(means_of[token::n_tokens], sites)) for token in range(n_tokens)]
            found[name] = xr.concat(tables, "token").transpose("layer", "head", "token")
        else:
            found[name] = table(_by_layer(means_of, sites))
    return xr.Dataset(found, attrs={"score": float(split.score.mean()), "stack": stack})


def attributions(
    model: nn.Module,
    inputs: Inputs,
    score: Score,
    *,
    weights: Rule = "split",
    stack: str | None = None,
    at_once: int = 16,
) -> xr.DataArray:
    """What each token brings to a score of its own row, of either sign. [batch, token]

    A token is what it is when it enters the first layer, position included. See `cd_t`.
    """
    stack, _, _ = _layout(model, inputs, stack)
    sources = [Source(token=token) for token in range(_n_tokens(inputs))]
    split = _split(model, inputs, score, stack, sources, None, at_once, weights)
    return xr.DataArray(split.relevant.T.double().cpu().numpy(), dims=("batch", "token"), attrs={"stack": stack})


def circuit(
    model: nn.Module,
    inputs: Inputs,
    score: Score,
    *,
    reference: Inputs | None = None,
    take: int = 4,
    rounds: int = 3,
    least: float = 0.01,
    weights: Rule = "split",
    stack: str | None = None,
    at_once: int = 16,
) -> list[Head]:
    """The heads (layer, head) that bring about a score: its main sources, the main sources of these, and so on.

    take: heads that a round adds at most. rounds: how often to look for sources of what was found. least: a source
    gives this share of the largest one's at least; and in the end a head goes that changes faithfulness by less.
    weights: as in `cd_t`.
    """
    stack, sites, _ = _layout(model, inputs, stack)
    means = None if reference is None else _means(model, reference, stack)
    heads = [(layer, head) for layer, site in sites.items() for head in range(site.heads)]
    split = _split(model, inputs, score, stack, [Source(*head) for head in heads], means, at_once, weights)
    found: list[Head] = []
    given = split.relevant.mean(1).abs()
    for _ in range(rounds):
        best = [heads[i] for i in given.argsort(descending=True).tolist() if given[i] >= least * given.max() > 0]
        new = [head for head in best if head not in found][:take]
        if not new:
            break
        found += new
        # what each head brings to the outputs of those just found, as a share of these
        given = torch.stack([split.told[:, heads.index(head)] for head in new]).mean(0)
    whole = _faithful(model, inputs, score, stack, sites, found, means)
    for head in reversed(found.copy()):
        fewer = [other for other in found if other != head]
        now = _faithful(model, inputs, score, stack, sites, fewer, means)
        if abs(now - whole) < least:
            found = fewer
    return sorted(found)


def faithfulness(
    model: nn.Module,
    inputs: Inputs,
    score: Score,
    heads: Sequence[Head],
    *,
    reference: Inputs | None = None,
    stack: str | None = None,
) -> float:
    """How much of a score these heads alone make: 1 as much as the model, 0 as little as no heads at all.

    All other heads give their mean over the reference; without one, nothing. ValueError for heads that are not there.
    """
    stack, sites, _ = _layout(model, inputs, stack)
    means = None if reference is None else _means(model, reference, stack)
    return _faithful(model, inputs, score, stack, sites, heads, means)


Means = Mapping[int, Tensor]  # by layer [head, token, dim]


class _Split(NamedTuple):
    relevant: Tensor  # [source, batch]
    rest: Tensor
    score: Tensor  # [batch]
    told: Tensor  # [source, target head]: its output's relevant part over the whole, by norms, mean over rows


def _layout(model: nn.Module, inputs: Inputs, stack: str | None) -> tuple[str, dict[int, Site], int]:
    with frozen(model):
        return layout(model, lambda model: model(**inputs), stack)


def _n_tokens(inputs: Inputs) -> int:
    for name in ("input_ids", "inputs_embeds"):
        if name in inputs:
            return inputs[name].shape[1]
    raise ValueError(f"tokens are counted in input_ids or inputs_embeds, and there are only {', '.join(inputs)}")


def _by_layer(values: Tensor, sites: Mapping[int, Site]) -> dict[int, Tensor]:
    return dict(zip(sites, values.split([site.heads for site in sites.values()])))


def _logits(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


class _Mean:
    """Notes the mean over rows of what heads give."""

    def __init__(self, stack: str) -> None:
        self.stack, self.means = stack, {}

    def output(self, call: Call, output: Tensor) -> Tensor:
        if call.site.stack == self.stack:
            self.means[call.site.layer] = output.mean(0)
        return output


@torch.no_grad()
def _means(model: nn.Module, reference: Inputs, stack: str) -> Means:
    mean = _Mean(stack)
    with frozen(model), intervene(model, mean):
        model(**reference)
    return mean.means


class _Only(Gates):
    """Heads whose gate is 0 give their mean."""

    def __init__(self, stack: str, gates: Mapping[int, Tensor], means: Means | None) -> None:
        super().__init__(stack, gates)
        self.means = means

    def output(self, call: Call, output: Tensor) -> Tensor:
        kept = super().output(call, output)
        if self.means is None or call.site.stack != self.stack:
            return kept
        return kept + (1 - self.gates[call.site.layer].to(output))[:, None, None] * self.means[call.site.layer]


@torch.no_grad()
def _faithful(
    model: nn.Module,
    inputs: Inputs,
    score: Score,
    stack: str,
    sites: Mapping[int, Site],
    heads: Sequence[Head],
    means: Means | None,
) -> float:
    found = []
    everything = [(layer, head) for layer, site in sites.items() for head in range(site.heads)]
    for kept in (heads, everything, ()):
        gates = {layer: 1 - gate for layer, gate in without(sites, kept).items()}
        with frozen(model), intervene(model, _Only(stack, gates, means)):
            found.append(float(score(_logits(model(**inputs))).mean()))
    some, whole, none = found
    return (some - none) / (whole - none)


@torch.no_grad()
def _split(
    model: nn.Module,
    inputs: Inputs,
    score: Score,
    stack: str,
    sources: Sequence[Source],
    means: Means | None,
    at_once: int,
    weights: Rule,
) -> _Split:
    if weights not in Rule.__args__:
        raise ValueError(f"weights are 'split' or 'whole', got {weights!r}")
    with frozen(model):
        own = score(_logits(model(**inputs)))
        if not isinstance(own, Tensor) or own.ndim != 1:
            raise ValueError("`score` takes logits [batch, ...] and gives a score for each row, a tensor [batch]")
        n_own = {name: len(value) for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
        if packed := [name for name, n in n_own.items() if n != len(own)]:
            raise ValueError(
                f"{', '.join(packed)} has no entry for each of the {len(own)} rows, so it cannot be repeated"
            )
        relevant, rest, told = [], [], []
        for start in range(0, len(sources), at_once):
            some = sources[start : start + at_once]
            pairs = _Pairs(model, stack, some, len(own), means, weights)
            with pairs:
                repeated = {
                    name: value.repeat(2 * len(some), *[1] * (value.ndim - 1)) if name in n_own else value
                    for name, value in inputs.items()
                }
                logits = _logits(model(**repeated)).unflatten(0, (2, len(some), len(own)))
            relevant += [score(logits[0, s]) for s in range(len(some))]
            rest += [score(logits[1, s]) for s in range(len(some))]
            told.append(torch.cat([pairs.told[layer] for layer in sorted(pairs.told)], 1))
    split = _Split(torch.stack(relevant), torch.stack(rest), own, torch.cat(told))
    off = (split.relevant + split.rest - own).abs().max()
    if not off <= _TOLERANCE * (own.abs().max() + split.relevant.abs().max()):
        raise UnreachableAttention(
            f"{type(model).__name__}: the parts do not add up to the model's own score (off by {float(off):.2g}): "
            f"something on the way follows none of the rules, or the score is not linear in the logits"
        )
    return split


class _Pairs:
    """Hooks that make a model carry relevant parts in the first half of its rows, and the rest in the other half."""

    def __init__(
        self, model: nn.Module, stack: str, sources: Sequence[Source], rows: int, means: Means | None, weights: Rule
    ) -> None:
        self.model, self.stack, self.sources, self.rows, self.means = model, stack, sources, rows, means
        self.rule = weights
        self.started = False
        self.activated: Tensor | None = None
        self.gave: list[Tensor] = []  # by matrices, since the layer began
        self.told: dict[int, Tensor] = {}
        self.undo = ExitStack()

    def __enter__(self) -> None:
        sites = [site for site in find(self.model).values() if site.stack == self.stack]
        blocks = {found[0]: None for site in sites if (found := re.match(r"(.*?\.)?\d+(?=\.)", site.name))}
        if not blocks:
            raise UnreachableAttention(f"the heads of {self.stack} lie in no numbered layers")
        attention = tuple(f"{site.name}." for site in sites)
        with ExitStack() as undo:
            for name, module in self.model.named_modules():
                if name in blocks:
                    undo.callback(module.register_forward_pre_hook(self.enter, with_kwargs=True).remove)
                    undo.callback(module.register_forward_hook(self.leave).remove)
                elif is_norm(module):
                    undo.callback(module.register_forward_hook(self.norm).remove)
                elif is_matrix(module):
                    undo.callback(module.register_forward_pre_hook(self.product).remove)
                    settle = name.startswith(tuple(blocks)) and not name.startswith(attention)
                    undo.callback(module.register_forward_hook(partial(self.matrix, settle)).remove)
                elif not any(module.children()) and next(module.parameters(), None) is None:
                    undo.callback(module.register_forward_hook(self.activation).remove)
            undo.enter_context(intervene(self.model, self))
            self.undo = undo.pop_all()

    def __exit__(self, *error: Any) -> None:
        self.undo.close()

    def enter(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self.gave, self.activated = [], None
        if self.started:
            return None
        self.started = True
        hidden = args[0] if args else kwargs["hidden_states"]
        if len(hidden) != 2 * len(self.sources) * self.rows:
            raise UnreachableAttention(f"{self.stack}: its layers do not take one row for each row of the inputs")
        relevant, rest = (part.clone() for part in hidden.unflatten(0, (2, len(self.sources), self.rows)))
        for i, source in enumerate(self.sources):
            kept = torch.zeros(hidden.shape[1], 1, dtype=torch.bool, device=hidden.device)
            if source.layer is None:
                kept[source.token] = True
            relevant[i] *= kept
            rest[i] *= ~kept
        hidden = torch.stack([relevant, rest]).flatten(0, 2)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def leave(self, block: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.cat(_settled(*hidden.chunk(2)))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def norm(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        if not self.started:
            return None
        relevant, rest = args[0].chunk(2)
        whole = relevant + rest
        held = hold(module, whole, module.forward(whole))
        return torch.cat(_shared(held.linear(relevant), held.linear(rest), held.shift, (relevant, rest)))

    def product(self, module: nn.Module, args: Any) -> Any:
        """What a gated feed-forward module multiplied part by part, as a product of the wholes."""
        given, active = args[0] if args else None, self.activated
        if not self.started or active is None or given is None or active.shape != given.shape or given is active:
            return None
        other = next((o for o in self.gave if o.shape == given.shape and torch.equal(o * active, given)), None)
        if other is None:
            return None
        rest = given.chunk(2)[1]
        whole = sum(active.chunk(2)) * sum(other.chunk(2))
        return (torch.cat([whole - rest, rest]), *args[1:])

    def matrix(self, settle: bool, module: nn.Module, args: Any, output: Tensor) -> Any:
        if not self.started or not isinstance(output, Tensor):
            return None
        bias = getattr(module, "bias", None)
        relevant, rest = output.chunk(2)
        if bias is not None:
            relevant, rest = relevant - bias, rest - bias
            relevant, rest = _shared(relevant, rest, bias, (relevant, rest))
        if settle:
            relevant, rest = _settled(relevant, rest)
        output = torch.cat([relevant, rest])
        self.gave.append(output)
        return output

    def activation(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.started or len(args) != 1 or not isinstance(output, Tensor) or output.shape != args[0].shape:
            return None
        relevant, rest = args[0].chunk(2)
        rest_gives = module.forward(rest)
        self.activated = torch.cat([module.forward(relevant + rest) - rest_gives, rest_gives])
        return self.activated

    def splits(self, call: Call) -> bool:
        return self.rule == "split" and call.site.stack == self.stack

    def inputs(self, call: Call) -> Call:
        if not self.started:
            return call
        states = {name: getattr(call, name) for name in ("query", "key", "value")}
        wholes = {name: part.unflatten(0, (2, -1)).sum(0) for name, part in states.items()}
        if self.splits(call):  # relevant parts alone, and the wholes
            return call.but(**{name: torch.cat([states[name].chunk(2)[0], whole]) for name, whole in wholes.items()})
        return call.but(query=wholes["query"].repeat(2, 1, 1, 1), key=wholes["key"].repeat(2, 1, 1, 1))

    def output(self, call: Call, output: Tensor) -> Tensor:
        layer = call.site.layer
        if call.site.stack != self.stack:
            return output
        if self.splits(call):
            relevant, whole = output.chunk(2)
            output = torch.cat([relevant, whole - relevant])
        relevant, rest = (part.clone() for part in output.unflatten(0, (2, len(self.sources), self.rows)))
        sizes = (part.flatten(-2).norm(dim=-1) for part in (relevant.transpose(-2, -1), relevant + rest))
        size, whole = sizes
        self.told[layer] = (size / whole.clamp(min=1e-30)).mean(1)
        for i, source in enumerate(self.sources):
            if source.layer != layer:
                continue
            at = (i, slice(None), source.head, slice(None) if source.token is None else source.token)
            mean = torch.zeros(()) if self.means is None else self.means[layer][at[2:]]
            whole = relevant[at] + rest[at]
            relevant[at], rest[at] = whole - mean, mean.to(whole)
        return torch.stack([relevant, rest]).flatten(0, 2)


def _shared(relevant: Tensor, rest: Tensor, bias: Tensor, by: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both with their shares of a bias, by the sizes of `by`."""
    size, other = (part.abs() for part in by)
    share = size / (size + other).clamp(min=1e-30)
    return relevant + bias * share, rest + bias * (1 - share)


def _settled(relevant: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Where signs are unlike, the larger is the sum, and the other 0."""
    whole, unlike = relevant + rest, relevant * rest < 0
    first = relevant.abs() >= rest.abs()
    zero = torch.zeros_like(whole)
    return (
        torch.where(unlike, torch.where(first, whole, zero), relevant),
        torch.where(unlike, torch.where(first, zero, whole), rest),
    )
