"""Secondary sinks: tokens that take on the first token's direction in a middle layer, and draw attention for a while.

Wong et al., On the Existence and Behaviour of Secondary Attention Sinks (arXiv:2512.22213), and the authors' code
(github.com/JeffreyWong20/Secondary-Attention-Sinks: `hidden_state_base.py`, `mlp_base.py`, `02.hierarchical_levels`).
The paper's text beyond its abstract, and the notebook that draws its figure 7 (scores), were not at hand.

From that code: the primary sink is there from the layer where the norm of the first token's hidden state grows most,
to before the layer where it then falls most. While it is there, a token is a sink after each layer where the absolute
cosine of its hidden state with the first token's is above 0.9. The first such layer is its onset (`l_start`), their
number its lifetime, and the pair its level. The module that makes it is the feed-forward module of the onset layer:
the cosine of what that gives with the primary sink's direction, and its norm, are what the paper looks at.

Deviations. The first token that is no padding is the primary sink; the code takes, in chats, the one of the first three
tokens with the largest norm. Of the first layer, what its feed-forward module adds counts as growth, so that a sink may
begin there; in the code it cannot. (Where a norm stands between, as in Gemma 2, that is not what is added.) A primary
sink whose norm never falls lasts to the end; the code cuts at its least growth. Kinds follow the abstract: a primary
sink begins in the same layer as the first token's, a secondary one later; the code calls a sink primary that misses at
most 15 layers. As there, those that live fewer than 5 layers are left out. Parts of the feed-forward module are
compared in the code with the first token's same part; here what it gives, with that token's hidden state. What is
compared is the hidden state that a layer gives, also for the last one, where transformers' `hidden_states` are those
after the last norm. The score of a sink is ours: see `sink_score`.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..call import Site
from .sink_score import sink_score


def secondary_sinks(stack: xr.Dataset, reader: SinkReader, *, cosine: float = 0.9, shortest: int = 5) -> xr.Dataset:
    """Which tokens are attention sinks, from which layer on, for how many layers, and what made them so.

    stack: a node of a recording of "received" of one pass. reader: what read the hidden states of the same pass.
    cosine: a token is a sink after a layer where its hidden state lies this close to the primary sink's. shortest:
    layers that a sink lives at least.

    Of each token [batch, token]: `kind` ("primary", "secondary", or "" where it is no sink), `onset` (the layer after
    which it is first one; -1: never), `lifetime` (after how many layers it is one, also where they are too few for a
    kind), and `strength` (its mean score, 0 to 1, in the layers that read it while it is one; NaN: none does).
    Of each layer and token [batch, layer, token]: `score`, the mean of `sink_score` over heads; `alignment`, the cosine
    of the hidden state that the layer gives with the first token's; `mlp_alignment` and `mlp_norm`, the cosine with it
    and the norm of what the layer's feed-forward module gives.

    A sink with onset l is made by layer l, and read by the attention of layer l + 1.

    >>> import regard
    >>> model, tokenizer = regard.load("reader")
    >>> inputs = tokenizer("to be or not to be", return_tensors="pt")
    >>> reader = SinkReader(inputs["attention_mask"])
    >>> with regard.intervene(model, reader), regard.record(model, "received") as recording:
    ...     _ = model(**inputs)
    >>> found = secondary_sinks(recording.tree["language_model"].to_dataset(), reader, shortest=2)
    >>> int((found["kind"] == "secondary").sum())
    0
    """
    layers = sorted(reader.alignment)
    n = reader.alignment[layers[0]].shape if layers else (0, 0)
    if layers != stack["layer"].values.tolist() or n != (stack.sizes["batch"], stack.sizes["key"]):
        raise ValueError(
            f"the reader holds {len(layers)} layers of {n[0]} x {n[1]} tokens, and the recording "
            f"{stack.sizes['layer']} of {stack.sizes['batch']} x {stack.sizes['key']}: run the model once, inside "
            f"both regard.intervene(model, reader) and regard.record(model, 'received')"
        )
    alignment, mlp_alignment, mlp_norm, norm = (
        np.stack([part[layer] for layer in layers], axis=1)
        for part in (reader.alignment, reader.mlp_alignment, reader.mlp_norm, reader.norm)
    )
    real = np.ones(n, bool) if reader.mask is None else reader.mask.bool().cpu().numpy()
    begin, end = _primary(np.concatenate([reader.before[:, None], norm], axis=1))
    number = np.arange(len(layers))
    there = (number >= begin[:, None]) & (number < end[:, None])  # [batch, layer]
    sink = (np.abs(alignment) > cosine) & there[..., None] & real[:, None]
    onset = np.where(sink.any(1), sink.argmax(1), -1)
    lifetime = sink.sum(1)
    kind = np.where(onset == begin[:, None], "primary", "secondary")
    kind = np.where(lifetime >= shortest, kind, "").astype(object)

    score = sink_score(stack).mean("head").values  # [batch, layer, token]
    reads = np.roll(sink, 1, axis=1)  # a layer reads what the one before gave
    reads[:, 0] = False
    read = reads.sum(1)
    strength = np.where(read > 0, np.nansum(score * reads, axis=1) / np.maximum(read, 1), np.nan)

    each, by_layer = ("batch", "token"), ("batch", "layer", "token")
    texts = {"token_text": (each, stack["key_token"].values)} if "key_token" in stack.coords else {}
    return xr.Dataset(
        {
            "kind": (each, kind),
            "onset": (each, np.where(onset >= 0, np.array(layers)[onset], -1), {"units": "layer"}),
            "lifetime": (each, lifetime, {"units": "layers"}),
            "strength": (each, strength, {"units": "share"}),
            "score": (by_layer, score, {"units": "share"}),
            "alignment": (by_layer, alignment, {"units": "cosine"}),
            "mlp_alignment": (by_layer, mlp_alignment, {"units": "cosine"}),
            "mlp_norm": (by_layer, mlp_norm),
        },
        {"layer": layers, "token": stack["key"].values, **texts},
    )


def levels(found: xr.Dataset) -> dict[tuple[int, int], int]:
    """How many secondary sinks there are of each level, a pair of onset and lifetime, in layers; most frequent first.

    found: what `secondary_sinks` gives; several, of several texts, may be joined along `batch`.
    """
    secondary = found["kind"].values == "secondary"
    pairs = zip(found["onset"].values[secondary].tolist(), found["lifetime"].values[secondary].tolist())
    return dict(Counter(pairs).most_common())


def _primary(norm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From which layer to before which the first token is a sink, given its norm, at first without what layer 0 adds.

    [batch, 1 + layer] to [batch], twice.
    """
    growth = np.diff(norm, axis=1)
    begin = growth.argmax(1)
    later = np.arange(growth.shape[1]) > begin[:, None]
    fall = np.where(later, growth, 0.0)
    return begin, np.where(fall.min(1) < 0, fall.argmin(1), growth.shape[1])


class SinkReader:
    """How the hidden states of each layer lie to the first token's: given to `regard.intervene`, it changes nothing.

    mask: [batch, token], 0 where there is padding, as a model takes it. stack: whose layers are read. Numbers are kept
    of each token, not vectors; of the model's last pass.
    """

    def __init__(self, mask: Tensor | None = None, *, stack: str = "language_model") -> None:
        self.mask, self.stack = mask, stack
        self.alignment: dict[int, np.ndarray] = {}
        self.mlp_alignment: dict[int, np.ndarray] = {}
        self.mlp_norm: dict[int, np.ndarray] = {}
        self.norm: dict[int, np.ndarray] = {}  # of the first token
        self.before = np.empty(0)  # the same, without what the first layer's feed-forward module adds
        self._added: dict[int, Tensor] = {}

    @torch.no_grad()
    def mlp(self, site: Site, output: Tensor) -> Tensor:
        if site.stack == self.stack:
            self._added[site.layer] = output.float()
        return output

    @torch.no_grad()
    def hidden(self, site: Site, hidden: Tensor) -> Tensor:
        if site.stack == self.stack:
            added, states, direction = self._added.pop(site.layer), hidden.float(), self._first(hidden)
            if site.layer == min(self.norm, default=site.layer):
                self.before = _numbers((direction - self._first(added)).norm(dim=-1)[:, 0])
            self.norm[site.layer] = _numbers(direction.norm(dim=-1)[:, 0])
            self.alignment[site.layer] = _numbers(cosine_similarity(states, direction, dim=-1))
            self.mlp_alignment[site.layer] = _numbers(cosine_similarity(added, direction, dim=-1))
            self.mlp_norm[site.layer] = _numbers(added.norm(dim=-1))
        return hidden

    def _first(self, hidden: Tensor) -> Tensor:
        """The first token that is no padding, [batch, 1, dim] of [batch, token, dim]."""
        at = torch.zeros(len(hidden), dtype=torch.long) if self.mask is None else self.mask.long().argmax(1).cpu()
        return hidden[torch.arange(len(hidden)), at][:, None].float()


def _numbers(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()
