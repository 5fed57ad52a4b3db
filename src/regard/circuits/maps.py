"""What a head does, read from its parameters: the words that its matrices map to which words.

Elhelo and Geva, Inferring Functionality of Attention Heads from their Parameters (MAPS; arXiv:2412.11965), section 3,
with the rules of their code at amitelhelo/MAPS. A head multiplies the state of a token by its value matrix and its part
of the output projection; between embedding and unembedding that is a map of the vocabulary into itself, and no text is
run. `maps` is section 3.1, how much of a relation, pairs of words such as a country and its capital, a head maps;
`salient` section 3.2, what it maps most strongly; `dynamic_scores` section 4, what heads give in text. Norms are not
folded in and biases are left out, as in the code. In layers after the first the state of a word is what the first
feed-forward module makes of it, without the embedding (`first_mlp=True`).

Ours: first_mlp="residual", embedding and feed-forward output together, as they are in the stream, for models whose
first feed-forward module does not carry what a word is. Where two words tie, the target counts as the lower one, so
that a head that writes nothing implements nothing. A text about a head from a language model is left to the reader.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import xarray as xr
from torch import Tensor, nn

from ..call import Call, UnreachableAttention
from ..hooks import attach
from ..seam import intervene
from ..sites import feed_forwards, find
from ..stream import read
from ._gates import Run, frozen, layout, table
from ._norms import is_norm
from ._parts import Matrix, Rows, parts

First = Literal["residual"] | bool
Pairs = Tensor | Sequence[tuple[int, int]]  # of token ids, [pair, 2]


@dataclass(frozen=True, eq=False)
class Heads:
    """The matrices of a model's heads, between its embedding and its unembedding.

    embedding: [token, dim]. unembedding: [dim, token]. value: [kv_head, dim, head_dim] of each layer; output: [head,
    head_dim, dim]. first: what makes of embeddings the states that layers after the first are given; None leaves them.
    """

    embedding: Tensor
    unembedding: Tensor
    value: Mapping[int, Tensor]
    output: Mapping[int, Tensor]
    first: Callable[[Tensor], Tensor] | None = None
    stack: str = "language_model"

    def states(self, tokens: Tensor | slice, layer: int) -> Tensor:
        """What stands for these tokens at a layer. [token, dim]"""
        embedded = self.embedding[tokens]
        return embedded if self.first is None or layer == min(self.output) else self.first(embedded)

    def written(self, states: Tensor, layer: int, head: int) -> Tensor:
        """What a head writes to the stream of states [..., dim] that it looks at. [..., dim]"""
        if layer not in self.output or not 0 <= head < len(self.output[layer]):
            known = ", ".join(f"layer {at} has {len(of)}" for at, of in self.output.items())
            raise ValueError(f"there is no head {head} in layer {layer}: {known} heads")
        value, output = self.value[layer], self.output[layer]
        return states @ value[head * len(value) // len(output)] @ output[head]

    @torch.no_grad()
    def scores(self, pairs: Pairs, *, k: int = 10) -> xr.Dataset:
        """Share of pairs whose target is among the `k` words that a head maps their source to. See `maps`."""
        sources, targets = _checked(pairs, k, self.unembedding.shape[1]).T
        found: dict[str, dict[int, Tensor]] = {"score": {}, "suppression": {}}
        for layer, output in self.output.items():
            states = self.states(sources, layer)
            logits = [self.written(states, layer, head) @ self.unembedding for head in range(len(output))]
            for name, sign in (("score", 1), ("suppression", -1)):
                found[name][layer] = torch.stack([_within(sign * each, targets, k).double().mean() for each in logits])
        tables = {name: table(values) for name, values in found.items()}
        return xr.Dataset(tables, attrs={"stack": self.stack, "k": k, "pairs": len(sources)})

    @torch.no_grad()
    def salient(self, layer: int, head: int, *, tokens: int = 30, mappings: int = 5) -> xr.Dataset:
        """The tokens that a head amplifies most, and what it maps each to. See `salient`."""
        if not 0 < tokens <= len(self.embedding) or not 0 < mappings <= self.unembedding.shape[1]:
            raise ValueError(
                f"of {len(self.embedding)} tokens, {tokens} with {mappings} mappings each were asked for: say 1 or more"
            )
        states = self.states(slice(None), layer)
        written = self.written(states, layer, head)
        strength, chosen = (written.norm(dim=-1) / states.norm(dim=-1).clamp(min=1e-30)).topk(tokens)
        mapped = (written[chosen] @ self.unembedding).topk(mappings).indices
        return xr.Dataset(
            {
                "source": ("token", chosen.cpu().numpy()),
                "strength": ("token", strength.double().cpu().numpy()),
                "target": (("token", "rank"), mapped.cpu().numpy()),
            },
            attrs={"stack": self.stack, "layer": layer, "head": head},
        )


def heads(model: nn.Module, *, first_mlp: First = True, run: Run | None = None, stack: str | None = None) -> Heads:
    """What `maps` and `salient` read of a model, to be read once. The arguments are those of `maps`."""
    if first_mlp not in (True, False, "residual"):
        raise ValueError(f"first_mlp is True, False or 'residual', got {first_mlp!r}")
    embed, unembed = (
        get() if (get := getattr(model, name, None)) else None
        for name in ("get_input_embeddings", "get_output_embeddings")
    )
    if embed is None or unembed is None:
        raise UnreachableAttention(f"{type(model).__name__} does not both embed and unembed words")
    run = run or _a_word(embed)
    stack, sites, _ = layout(model, run, stack)
    stream = read(model, lambda: run(model))
    for site in sites.values():
        if not stream.holds(site):
            why = stream.missing or "what its heads write does not simply add to the stream"
            raise UnreachableAttention(f"{site}: no matrix says what its heads write: {why}")
    value, output = {}, {}
    for layer, found in parts(model, run, stack).items():
        if len(found.writes) > 1 or any(len(rows) != 1 for rows in found.value):
            raise UnreachableAttention(f"{found.site}: its heads have several matrices each; merge the adapters")
        write = found.writes[0].weight.detach()
        value[layer] = torch.stack([_of(rows).detach().T for rows in found.value])
        output[layer] = torch.stack([write[:, found.columns(head)].T for head in range(len(found.query))])
    first = _first(model, run, stack, min(output), residual=first_mlp == "residual") if first_mlp else None
    with frozen(model), torch.no_grad():
        words = torch.arange(embed.weight.shape[0], device=embed.weight.device)
        embedding = embed(words)
    return Heads(embedding, Matrix(unembed, "").weight.detach().T, value, output, first, stack)


def maps(
    model: nn.Module,
    pairs: Pairs,
    *,
    k: int = 10,
    first_mlp: First = True,
    least: int = 30,
    run: Run | None = None,
    stack: str | None = None,
) -> xr.Dataset:
    """How much of a relation between words each head implements, read from its matrices, 0 to 1. [layer, head]

    `score` is the share of pairs whose target is among the `k` words that the head maps the source to most; the paper
    counts a head as implementing the relation from 0.15 on. `suppression` is the same of the words it maps to least.

    pairs: token ids of sources and targets, [pair, 2]; `token_pairs` makes them of words. k: the paper has 10, 25 for
    Llama 3.1, 1 for relations that copy. first_mlp: what stands for a word in layers after the first: what the first
    feed-forward module makes of it (True), that and the embedding ("residual"), or the embedding. least: with fewer
    pairs it raises ValueError. run: runs the model, where it takes more than `input_ids`. stack: where heads of several
    stacks run.

    Raises UnreachableAttention where what a head writes is no matrix times the states: a norm comes after attention.

    >>> import regard
    >>> model, tokenizer = regard.load("reader")
    >>> found = maps(model, [(i, i) for i in range(300, 400)], first_mlp="residual")
    >>> found["score"].sel(layer=1, head=2).item()  # copies
    1.0
    """
    if len(pairs) < least:
        raise ValueError(f"a relation of {len(pairs)} pairs says little: give {least} or more, or say least=")
    return heads(model, first_mlp=first_mlp, run=run, stack=stack).scores(pairs, k=k)


def salient(
    model: nn.Module,
    layer: int,
    head: int,
    *,
    tokens: int = 30,
    mappings: int = 5,
    first_mlp: First = True,
    tokenizer: Any = None,
    run: Run | None = None,
    stack: str | None = None,
) -> xr.Dataset:
    """The words that a head amplifies most, and what it maps each to, the strongest first.

    `source` [token] and `target` [token, rank] are token ids, with a tokenizer its tokens; `strength` [token] is the
    length of what the head writes over that of the state, 0 and up. The other arguments are those of `maps`.
    """
    found = heads(model, first_mlp=first_mlp, run=run, stack=stack).salient(
        layer, head, tokens=tokens, mappings=mappings
    )
    if tokenizer is None:
        return found
    return found.assign(
        {name: (found[name].dims, _words(found[name].values, tokenizer)) for name in ("source", "target")}
    )


@torch.no_grad()
def dynamic_scores(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets: Tensor | Sequence[int],
    *,
    k: int = 10,
    at: int | Tensor = -1,
    sources: Tensor | None = None,
    stack: str | None = None,
) -> xr.DataArray:
    """Share of rows in which what a head writes has the target among its `k` strongest words, 0 to 1. [layer, head]

    The other side of `maps`: what heads really give in a text, by the unembedding.

    inputs: of the model. targets: a token id for each row. at: the position that is read, one for all or [batch].
    sources: positions [batch] of the source words; then a head is taken to look at that word alone ("without context"),
    each for itself, so that later heads are given what they are given in the text.

    Raises ValueError where a position lies outside, or is padding; UnreachableAttention as `maps`.
    """
    with frozen(model):
        stack, sites, rows = layout(model, lambda model: model(**inputs), stack)
        stream = read(model, lambda: model(**inputs))
        for site in sites.values():
            if not stream.holds(site):
                raise UnreachableAttention(f"{site}: {stream.missing or 'its heads do not simply add to the stream'}")
        wanted = torch.as_tensor(targets)
        if wanted.shape != (rows,):
            raise ValueError(f"there are {rows} rows, so targets are [{rows}], got {list(wanted.shape)}")
        found: dict[int, Tensor] = {}

        def output(call: Call, output: Tensor) -> Tensor:
            if call.site.stack != stack:
                return output
            if sources is None:
                given = _picked(output, at, inputs)
            else:
                each = output.shape[1] // call.value.shape[1]
                given = _picked(call.value, sources, inputs).repeat_interleave(each, 1)
            shares = []
            for head in range(output.shape[1]):
                logits = stream.unembed(stream.written(sites[call.site.layer], head, given[:, head]))  # type: ignore[misc]
                bias = getattr(stream.unembed, "bias", None)
                shares.append(_within(logits if bias is None else logits - bias, wanted.to(logits.device), k))
            found[call.site.layer] = torch.stack(shares).double().mean(1)
            return output

        with intervene(model, _Output(output)):
            model(**inputs)
    return table(dict(sorted(found.items())), stack=stack, k=k)


def token_pairs(pairs: Iterable[tuple[str, str]], tokenizer: Any) -> Tensor:
    """Token ids of pairs of words, as they stand within a sentence. [pair, 2]

    Pairs of which a word is several tokens are left out, with a warning that counts them.
    """
    kept, left = [], 0
    for pair in pairs:
        ids = [tokenizer(f" {word.strip()}", add_special_tokens=False)["input_ids"] for word in pair]
        if all(len(one) == 1 for one in ids):
            kept.append([one[0] for one in ids])
        else:
            left += 1
    if left:
        warnings.warn(
            f"{left} of {left + len(kept)} pairs have a word of several tokens, and are left out", stacklevel=2
        )
    return torch.tensor(kept, dtype=torch.long).reshape(-1, 2)


class _Output:
    def __init__(self, output: Callable[[Call, Tensor], Tensor]) -> None:
        self.output = output


def _checked(pairs: Pairs, k: int, words: int) -> Tensor:
    given = torch.as_tensor(pairs)
    if given.ndim != 2 or given.shape[1] != 2 or not len(given) or given.is_floating_point():
        raise ValueError(f"pairs are token ids [pair, 2], got {list(given.shape)} of {given.dtype}")
    if given.min() < 0 or given.max() >= words:
        raise ValueError(f"pairs have ids from {given.min()} to {given.max()}, and the vocabulary 0 to {words - 1}")
    if not 0 < k <= words:
        raise ValueError(f"k is 1 to the {words} words of the vocabulary, got {k}")
    return given


def _within(logits: Tensor, targets: Tensor, k: int) -> Tensor:
    """Whether each target is among the `k` highest, the lower one of those that tie. [row]"""
    own = logits.gather(-1, targets[:, None])
    return (logits >= own).sum(-1) <= k


def _of(rows: Rows) -> Tensor:
    [(matrix, of)] = rows
    return matrix.weight[of]


def _a_word(embed: nn.Module) -> Run:
    device = next(embed.parameters()).device
    return lambda model: model(input_ids=torch.arange(2, device=device)[None])


def _picked(states: Tensor, at: int | Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """[batch, head, dim] of [batch, head, token, dim]"""
    rows, n = len(states), states.shape[2]
    where = torch.as_tensor(at, device=states.device).expand(rows)
    where = torch.where(where < 0, where + n, where)
    if where.min() < 0 or where.max() >= n:
        raise ValueError(f"a position lies outside the {n} tokens of the inputs: {at}")
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not mask[torch.arange(rows), where].all():
        raise ValueError(f"position {at} is padding in some rows: say at= for each row, or pad on the left")
    return states[torch.arange(rows), :, where]


def _first(model: nn.Module, run: Run, stack: str, layer: int, *, residual: bool) -> Callable[[Tensor], Tensor]:
    """The feed-forward module of the first layer after the norm that it reads from."""
    sites = {module: site for module, site in find(model).items() if (site.stack, site.layer) == (stack, layer)}
    [(feed, _)] = feed_forwards(model, sites).items()
    normed: list[tuple[nn.Module, Tensor]] = []
    before: list[nn.Module] = []

    def enter(module: nn.Module, args: Any) -> None:
        before.extend(norm for norm, output in normed if args and args[0] is output)

    with ExitStack() as undo:
        for module in model.modules():
            if is_norm(module):
                attach(undo, module.register_forward_hook, lambda norm, _, output: normed.append((norm, output)))
        attach(undo, feed.register_forward_pre_hook, enter)
        with frozen(model), torch.no_grad():
            run(model)
    if len(before) != 1:
        raise UnreachableAttention(
            f"{type(model).__name__}: its first feed-forward module is not given what a norm gives: say first_mlp=False"
        )

    def first(embedded: Tensor) -> Tensor:
        with frozen(model), torch.no_grad():
            output = feed(before[0](embedded[None]))
        if not isinstance(output, Tensor):
            raise UnreachableAttention(
                f"{type(model).__name__}: its first feed-forward module gives more than states: say first_mlp=False"
            )
        return embedded + output[0] if residual else output[0]

    return first


def _words(ids: Any, tokenizer: Any) -> Any:
    words = tokenizer.convert_ids_to_tokens([int(i) for i in ids.ravel()])
    return [words[row : row + ids.shape[1]] for row in range(0, len(words), ids.shape[1])] if ids.ndim == 2 else words
