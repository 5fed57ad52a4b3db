"""Position bias of retrieval: how well a document is found, by where in it stands what was asked for.

Zeng et al., PosIR: Position-Aware Heterogeneous Information Retrieval Benchmark (arXiv:2601.08363), and the authors'
repository, for its metrics and bins. Relevance is tied to a span, so that place and length of a document can be told
apart: results are taken within buckets of length, over twenty bins of the span's middle, closed at their end. The
position sensitivity index is 1 - least / largest mean nDCG@10 of these bins. Saliency of a position is the length of
the gradient of the similarity in the embedding of its token.

    >>> import torch
    >>> from regard.evaluation.posir import PositionedQuery, posir
    >>> corpus = ["red apple then blue sea", "green tree then grey sky"]
    >>> asked = [PositionedQuery("blue", 0, 15, 23), PositionedQuery("green", 1, 0, 10)]
    >>> def encode(texts):  # one number a word
    ...     words = ["red", "blue", "green", "grey"]
    ...     return torch.tensor([[float(word in text) for word in words] for text in texts])
    >>> found = posir(encode, asked, corpus, edges=(), bins=2)
    >>> found["ndcg"].values.tolist(), found["sensitivity"].values.tolist()
    ([[1.0, 1.0]], [0.0])

Any encoder of transformers is made such a function by `pooled`; questions with spans, such as those of
`regard.data.loaders.xquad`, are made queries by `positioned`. The paper's data are not shipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn import functional as F

from ..data.loaders.language import SpanQuestion

Encode = Callable[[Sequence[str]], Tensor]
Pooling = Literal["mean", "cls", "last"]


@dataclass(frozen=True)
class PositionedQuery:
    """A query, and where its answer stands: characters `start` to `stop` of document number `document`."""

    text: str
    document: int
    start: int
    stop: int


def positioned(questions: Sequence[SpanQuestion], *, paragraphs: int = 1) -> tuple[list[PositionedQuery], list[str]]:
    """Queries and the corpus of questions with spans: a document is so many paragraphs of one article in a row.

    What is left of an article, fewer than `paragraphs`, is a shorter document.
    """
    if paragraphs < 1:
        raise ValueError(f"a document has 1 paragraph or more, got {paragraphs}")
    articles: dict[str, list[str]] = {}
    for question in questions:
        held = articles.setdefault(question.title, [])
        if question.context not in held:
            held.append(question.context)
    corpus, places = [], {}
    for title, contexts in articles.items():
        for first in range(0, len(contexts), paragraphs):
            at = 0
            for context in contexts[first : first + paragraphs]:
                places[title, context] = (len(corpus), at)
                at += len(context) + 1
            corpus.append("\n".join(contexts[first : first + paragraphs]))
    queries = []
    for question in questions:
        document, offset = places[question.title, question.context]
        start = offset + question.start
        queries.append(PositionedQuery(question.question, document, start, start + len(question.answer)))
    return queries, corpus


def posir(
    encode: Encode,
    queries: Sequence[PositionedQuery],
    corpus: Sequence[str],
    *,
    lengths: Sequence[int] | None = None,
    edges: Sequence[int] = (512, 1024, 1536),
    bins: int = 20,
    depth: int = 10,
) -> xr.Dataset:
    """nDCG of each query's document, 0 to 1, by the document's length and the place of what was asked for.

    encode: texts to vectors [text, dim]; similarity is their cosine. lengths: of each document, in the unit of `edges`,
    as from `token_lengths`; words if not given. A bucket of length holds documents longer than one edge and up to the
    next. depth: rank after which a document counts as not found.

    In the result, `score` and `place` (0: the document begins with it, 1: it ends) are those of each query; `ndcg` and
    `count` are by [length, position], NaN where no query falls; `mean`, `sensitivity` (0: no bias of position, 1: not
    found at all in some place) and `slope` (below 0: what stands early is found better) are by [length].
    """
    if not queries:
        raise ValueError("no queries: there is nothing to find")
    for query in queries:
        if not 0 <= query.document < len(corpus) or not 0 <= query.start < query.stop <= len(corpus[query.document]):
            raise ValueError(f"{query} is no span of a document of this corpus, which has {len(corpus)}")
    if lengths is None:
        lengths = [len(document.split()) for document in corpus]
    with torch.no_grad():
        asked, held = (F.normalize(encode(texts), dim=-1) for texts in ([q.text for q in queries], list(corpus)))
    similarity = asked @ held.mT
    own = similarity.gather(1, torch.tensor([[q.document] for q in queries], device=similarity.device))
    # Of documents that are as similar, half count as before it.
    rank = 1 + (similarity > own).sum(1) + ((similarity == own).sum(1) - 1) / 2
    score = torch.where(rank <= depth, 1 / (1 + rank).log2(), 0).cpu().numpy()
    place = np.array([(q.start + q.stop) / 2 / len(corpus[q.document]) for q in queries])
    bucket = np.searchsorted(list(edges), [lengths[q.document] for q in queries])
    position = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], place)  # the lower one for what stands on an edge
    count, total = np.zeros((len(edges) + 1, bins)), np.zeros((len(edges) + 1, bins))
    np.add.at(count, (bucket, position), 1)
    np.add.at(total, (bucket, position), score)
    with np.errstate(invalid="ignore"):
        ndcg = total / count
    middle = (np.arange(bins) + 0.5) / bins
    summary = np.full((3, len(edges) + 1), np.nan)
    for i, row in enumerate(ndcg):
        there = np.isfinite(row)
        if there.any():
            summary[0, i] = row[there].mean()
        if there.sum() > 1:
            summary[1, i] = 1 - row[there].min() / row[there].max() if row[there].max() else 0
            summary[2, i] = np.polyfit(middle[there], row[there], 1)[0]
    names = [f"up to {edge}" for edge in edges] + [f"over {edges[-1]}" if len(edges) else "all"]
    return xr.Dataset(
        {
            "ndcg": (("length", "position"), ndcg),
            "count": (("length", "position"), count.astype(int)),
            "mean": ("length", summary[0]),
            "sensitivity": ("length", summary[1]),
            "slope": ("length", summary[2]),
            "score": ("query", score),
            "place": ("query", place),
            "bucket": ("query", bucket),
        },
        {"length": names, "position": middle},
    )


def pooled(model: Any, tokenizer: Any, *, pooling: Pooling = "mean", batch: int = 32, **options: Any) -> Encode:
    """Make a model of transformers an encoder of texts: the mean of its last hidden states, its first, or its last.

    options: for the tokenizer, such as `max_length=512, truncation=True`. The model stays in the mode that it is in.
    Where gradients are enabled they flow, so that it can be trained by what this gives.
    """

    def encode(texts: Sequence[str]) -> Tensor:
        found = []
        for first in range(0, len(texts), batch):
            some = list(texts[first : first + batch])
            inputs = tokenizer(some, return_tensors="pt", padding=True, **options).to(model.device)
            found.append(_pool(_hidden(model, **inputs), inputs["attention_mask"], pooling))
        return torch.cat(found)

    return encode


def token_lengths(tokenizer: Any, corpus: Sequence[str]) -> list[int]:
    """Tokens of each document."""
    return [len(ids) for ids in tokenizer(list(corpus))["input_ids"]]


def saliency(
    model: Any, tokenizer: Any, query: str, document: str, *, pooling: Pooling = "mean", **options: Any
) -> xr.DataArray:
    """How much each token of the document moves its similarity to the query: length of the gradient, 0 and up. [token]

    The gradient is in the input embeddings; the model's own gradients are left alone.
    """
    with torch.no_grad():
        asked = F.normalize(pooled(model, tokenizer, pooling=pooling, **options)([query])[0], dim=-1)
    inputs = tokenizer(document, return_tensors="pt", **options).to(model.device)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.enable_grad():
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        hidden = _hidden(model, inputs_embeds=embeddings, attention_mask=mask)
        similarity = asked @ F.normalize(_pool(hidden, mask, pooling)[0], dim=-1)
        (slope,) = torch.autograd.grad(similarity, embeddings)
    texts = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    return xr.DataArray(slope[0].norm(dim=-1).cpu().numpy(), {"token_text": ("token", texts)}, "token", "saliency")


def _hidden(model: Any, **inputs: Any) -> Tensor:
    """Last hidden states. [batch, token, dim]"""
    return model(**inputs, output_hidden_states=True).hidden_states[-1].float()


def _pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """[batch, token, dim] to [batch, dim], whichever side padding is on."""
    if pooling == "mean":
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    if pooling not in ("cls", "last"):
        raise ValueError(f"pooling is 'mean', 'cls' or 'last', got {pooling!r}")
    at = torch.arange(mask.shape[1], device=mask.device) * mask
    chosen = mask.argmax(1) if pooling == "cls" else at.argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), chosen]
