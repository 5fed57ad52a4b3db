"""Lookback Lens: a linear detector of answers that ignore their context, and decoding guided by it.

Chuang et al., Lookback Lens: Detecting and Mitigating Contextual Hallucinations in Large Language Models Using Only
Attention Maps (arXiv:2407.07071). Section 2.1: lookback ratios of all heads, averaged over the tokens of a span, go
into a logistic regression. Section 4.1: of `candidates` sampled continuations of `chunk` tokens the one that the
detector trusts most is kept, and so on to the end. Numbers are those of the paper and of the authors' code
(voidism/Lookback-Lens): chunks of 8 tokens, 8 candidates, temperature 0.9, nucleus 0.95, at most 256 new tokens.

Deviations: the cache is kept and extended, where the authors' code is a changed `generate`; a candidate that ends
within its chunk is judged by its tokens up to the end. Annotated spans that the code joins over gaps are spans each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..call import Call
from ..extras import needs
from ..recording import statistic
from ..seam import record
from .lookback_ratio import lookback_ratio


class Span(NamedTuple):
    """Generated tokens `start` to `stop` (left out) of one row of a batch, counted from the sequence's start."""

    batch: int
    start: int
    stop: int


def span_features(ratio: xr.DataArray, spans: Sequence[Span]) -> Tensor:
    """Mean lookback ratio of the tokens of each span, 0 to 1. [span, layer, head]

    ratio: `lookback_ratio` as recorded, with axes batch, layer, head and query. The ratio of a token stands at the
    position before it, from which it was predicted. ValueError for spans that the recording does not hold.
    """
    first, last = int(ratio["query"][0]), int(ratio["query"][-1])
    rows = []
    for span in spans:
        if not first < span.start < span.stop <= last + 2:
            raise ValueError(
                f"{span} is empty or lies outside the tokens that were predicted, {first + 1} to {last + 1}"
            )
        predicted = ratio.isel(batch=span.batch, query=slice(span.start - 1 - first, span.stop - 1 - first))
        rows.append(predicted.mean("query").transpose("layer", "head").values)
    return torch.from_numpy(np.stack(rows)).double()


@dataclass(frozen=True, eq=False)
class LookbackLens:
    """Probability that a span is drawn from its context, by a linear function of lookback ratios.

    weight [layer, head]: positive where looking back speaks for the context. Make one with `fit`, or `load` one.

        with regard.record(model, "lookback_ratio") as recording:
            model.generate(**inputs)
        ratio = recording.tree["language_model"]["lookback_ratio"]
        lens = LookbackLens.fit(span_features(ratio, spans), grounded)
        lens.score(span_features(ratio, others))
    """

    weight: Tensor
    bias: float

    @classmethod
    def fit(cls, features: Tensor, grounded: Sequence[bool] | Tensor, *, max_iter: int = 1000) -> LookbackLens:
        """Logistic regression, scikit-learn's with its own penalty, as in the paper.

        features [span, layer, head]; grounded [span], True where the context supports the span.
        """
        with needs("fitting", "claims"):
            from sklearn.linear_model import LogisticRegression
        labels = np.asarray(grounded, dtype=bool)
        if features.ndim != 3 or len(labels) != len(features):
            raise ValueError(
                f"features are [span, layer, head], one label a span: got {list(features.shape)} and "
                f"{len(labels)} labels"
            )
        if not features.isfinite().all():
            raise ValueError("features hold NaN: leave out spans of queries that see no key")
        if labels.all() or not labels.any():
            raise ValueError("a detector is fitted on spans of both kinds; all of these are of one")
        fitted = LogisticRegression(max_iter=max_iter).fit(features.flatten(1).numpy(), labels)
        weight = torch.from_numpy(fitted.coef_[0]).double().unflatten(0, features.shape[1:])
        return cls(weight, float(fitted.intercept_[0]))

    def score(self, features: Tensor) -> Tensor:
        """Probability that a span is drawn from its context, 0 to 1. [span]; features [span, layer, head]"""
        if features.shape[1:] != self.weight.shape:
            raise ValueError(
                f"this lens reads layers and heads {list(self.weight.shape)}, but features are {list(features.shape)}"
            )
        return torch.sigmoid((features.double() * self.weight.to(features.device)).sum((1, 2)) + self.bias)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        save_file({"weight": self.weight, "bias": torch.tensor([self.bias], dtype=torch.float64)}, path)

    @classmethod
    def load(cls, path: str | Path) -> LookbackLens:
        kept = load_file(path)
        if kept.keys() != {"weight", "bias"}:
            raise ValueError(f"{path} holds {', '.join(sorted(kept))}, not the weight and bias of a lens")
        return cls(kept["weight"], float(kept["bias"]))


class Guided(NamedTuple):
    """What guided decoding wrote: ids [token] after the prompt, and the score of each chunk that was kept."""

    ids: Tensor
    scores: list[float]


@torch.no_grad()
def guided_decoding(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    lens: LookbackLens,
    *,
    chunk: int = 8,
    candidates: int = 8,
    max_new_tokens: int = 256,
    temperature: float = 0.9,
    top_p: float = 0.95,
    start: int | None = None,
    stack: str = "language_model",
    seed: int = 0,
) -> Guided:
    """Continue one prompt chunk by chunk, keeping of `candidates` sampled chunks the one that `lens` scores highest.

    For any causal model of transformers whose cache can be copied along the batch. inputs: what the model takes, batch
    of one; a prompt of one row has no padding. start: position of the first token that counts as new for the ratios,
    the prompt's length unless a part of the prompt, such as the cue of the answer, is to count. stack: whose heads
    the lens reads. Costs `candidates` times plain sampling, the prompt apart.
    """
    if len(inputs["input_ids"]) != 1:
        raise ValueError(f"guided decoding continues one prompt at a time, got a batch of {len(inputs['input_ids'])}")
    if min(chunk, candidates, max_new_tokens) < 1:
        raise ValueError(f"{chunk=}, {candidates=} and {max_new_tokens=} are 1 or more")
    length = inputs["input_ids"].shape[1]
    generator = torch.Generator().manual_seed(seed)
    config = getattr(model, "generation_config", None)
    ends = torch.tensor(np.atleast_1d(getattr(config, "eos_token_id", None) or []), dtype=torch.long)
    seen: list[Tensor] = []
    ratio = partial(lookback_ratio, start=length if start is None else start)

    @statistic("batch head query", title="Lookback ratio")
    def last_ratio(call: Call) -> Any:  # nothing is recorded
        if call.site.stack == stack and not call.site.cross:
            seen.append(ratio(call)[..., -1])

    def step(**given: Any) -> tuple[Tensor, Tensor, Any]:
        """Scores of the next token, the ratios that belong to it [candidate, layer, head], and the cache."""
        seen.clear()
        output = model(**given, use_cache=True)
        if not seen:
            raise ValueError(f"the model has no stack {stack!r} to read lookback ratios from")
        return output.logits[:, -1].float().cpu(), torch.stack(seen, dim=1).cpu(), output.past_key_values

    # The prompt alone first, then as many rows as candidates: a recording holds batches of one size.
    with record(model, last_ratio):
        logits, ratios, cache = step(**inputs)
    cache.batch_repeat_interleave(candidates)
    logits, ratios = (t.expand(candidates, *t.shape[1:]) for t in (logits, ratios))
    device, written, scores = inputs["input_ids"].device, [], []
    with record(model, last_ratio):
        while len(written) < max_new_tokens:
            ids, features = [], []
            for _ in range(min(chunk, max_new_tokens - len(written))):
                ids.append(_sample(logits, temperature, top_p, generator))
                features.append(ratios)
                logits, ratios, cache = step(input_ids=ids[-1][:, None].to(device), past_key_values=cache)
            tokens = torch.stack(ids, dim=1)
            ended = torch.isin(tokens, ends)
            alive = ended.cumsum(1) - ended.int() == 0  # up to the end token, and with it
            weight = (alive / alive.sum(1, keepdim=True))[..., None, None]
            trusted = lens.score((torch.stack(features, dim=1).double() * weight).sum(1))
            best = int(trusted.argmax())
            written += tokens[best, alive[best]].tolist()
            scores.append(float(trusted[best]))
            if bool(ended[best].any()):
                break
            cache.batch_select_indices(torch.full((candidates,), best, device=device))
            logits, ratios = (t[best : best + 1].expand_as(t) for t in (logits, ratios))
    return Guided(torch.tensor(written), scores)


def _sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """A token a row, from the most probable ones that together reach `top_p`. [batch]"""
    probability, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True)
    outside = probability.cumsum(-1) - probability >= top_p
    chosen = torch.multinomial(probability.masked_fill(outside, 0.0), 1, generator=generator)
    return order.gather(1, chosen)[:, 0]
