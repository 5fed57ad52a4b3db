"""Two small encoders, one pooled by the mean and one by [CLS], learn to retrieve: what bias of position do they show?

On Zeng et al., PosIR (arXiv:2601.08363). Documents are 8, 16 or 32 random words, a query is three words in a row out of
one. In training most queries ask for an early part of their document, as in data gathered from readers (the place is a
uniform number to the power of 1.5); in the benchmark all places are equally likely. Encoders are BERT's, and learn from
nothing, by telling a query's document from the others of its batch. Bias is the slope of nDCG over the place, divided
by the mean; errors are those of a bootstrap over documents. The control learns from queries of all places alike. The
sensitivity index, one less the lowest bin's mean over the highest's, is reported: with places squared both poolings
come to its ceiling. Two powers were tried, on other seeds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...evaluation.posir import Pooling, PositionedQuery, pooled, posir, saliency
from .._measure import Mean

SCALES = "small", "large"
WORDS, SPAN, LENGTHS, BINS, POWER = 200, 3, (8, 16, 32), 10, 1.5
STEPS, BATCH, RATE, TEMPERATURE = {"small": 700, "large": 10_000}, 64, 3e-3, 0.05
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")  # ids 0 to 3; words follow
DOCUMENTS, QUERIES, RESAMPLES = (50, 50, 500), 5, 200  # documents of each length, queries of each, for errors
POOLINGS: tuple[Pooling, ...] = ("mean", "cls")

EXPECTED = (
    "in documents of 32 words, the slope of nDCG over place, relative to its mean, is below 0 by two standard errors "
    "with both poolings, that of the two differs by two standard errors, and an encoder that learned from all places "
    "alike has at most a third of the slope of the one of its pooling"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Encoders pooled by the mean and by [CLS] show bias of position, of different size."""
    tokenizer = _tokenizer()
    ways: dict[str, tuple[Pooling, float]] = {p: (p, POWER) for p in POOLINGS}
    ways["mean, all places alike"] = ("mean", 1.0)
    models = {name: _trained(*way, STEPS[scale], seed) for name, way in ways.items()}
    rng = np.random.default_rng(seed + 1)
    queries, corpus = [], []
    for length, count in zip(LENGTHS, DOCUMENTS):
        for words in rng.integers(0, WORDS, (count, length)):
            starts = rng.integers(0, length - SPAN + 1, QUERIES)
            queries += [_query(words, len(corpus), int(start)) for start in starts]
            corpus.append(_text(words))
    found, slopes, moved = {}, {}, {}
    for name, model in models.items():
        pooling = ways[name][0]
        encode = pooled(model, tokenizer, pooling=pooling, batch=128)
        found[name] = posir(encode, queries, corpus, edges=LENGTHS[:-1], bins=BINS)
        slopes[name] = _slope(found[name], np.random.default_rng(seed))
        some = queries[-50:]
        maps = [saliency(model, tokenizer, q.text, corpus[q.document], pooling=pooling).values[1:-1] for q in some]
        moved[name] = np.mean([m / m.sum() for m in maps], axis=0)
    scores = {name: float(found[name]["mean"][-1]) for name in ways}
    (by_mean, by_cls, even), apart = (
        [Mean(v[0], float(v.std())) for v in slopes.values()],
        slopes["mean"] - slopes["cls"],
    )
    differ = Mean(abs(apart[0]), float(apart.std()))
    holds = by_mean.below() and by_cls.below() and differ.above() and abs(even.value) <= abs(by_mean.value) / 3
    measured = (
        f"relative slope {by_mean:.2f} pooled by the mean, {by_cls:.2f} by [CLS] (apart by {differ:.2f}), {even:.2f} "
        "where places were alike; "
        + "; ".join(
            f"{name}: nDCG@10 {scores[name]:.2f}, sensitivity {float(found[name]['sensitivity'][-1]):.2f}"
            for name in ways
        )
    )
    finds = Premise(
        f"encoders find documents of {LENGTHS[-1]} words",
        "mean nDCG@10 0.2 or more",
        ", ".join(f"{score:.2f}" for score in scores.values()),
        min(scores.values()) >= 0.2,
    )

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 3)
        for axes, pooling in zip(panels, POOLINGS):
            for i, length in enumerate(LENGTHS):
                axes.plot(found[pooling]["position"], found[pooling]["ndcg"][i], "o-", label=f"{length} words")
            axes.set(title=f"nDCG@10, pooled by {pooling}", xlabel="place of the answer", ylim=(0, 1.5))
            axes.legend(loc="upper right")
        for pooling in POOLINGS:
            panels[2].plot((np.arange(LENGTHS[-1]) + 0.5) / LENGTHS[-1], moved[pooling], label=pooling)
        panels[2].set(title="Saliency", xlabel="place of the token", ylabel="share", ylim=(0, None))
        panels[2].legend()

    return Finding(holds, measured, EXPECTED, seed, premises=[finds], draw=draw)


def _tokenizer() -> Any:
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [*SPECIAL, *(f"w{i}" for i in range(WORDS))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return t.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", cls_token="[CLS]", unk_token="[UNK]")


def _text(words: np.ndarray) -> str:
    return " ".join(f"w{i}" for i in words)


def _query(words: np.ndarray, document: int, start: int) -> PositionedQuery:
    """A query for the span of words from `start`."""
    text, before = _text(words[start : start + SPAN]), len(_text(words[:start]))
    first = before + 1 if start else 0
    return PositionedQuery(text, document, first, first + len(text))


def _trained(pooling: Pooling, power: float, steps: int, seed: int) -> Any:
    import transformers as t

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    config = t.BertConfig(
        vocab_size=len(SPECIAL) + WORDS,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTHS[-1] + 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )
    model = t.BertModel(config, add_pooling_layer=False)

    def encode(words: np.ndarray) -> Tensor:
        ids = F.pad(F.pad(torch.from_numpy(words) + len(SPECIAL), (1, 0), value=1), (0, 1), value=2)
        hidden = model(ids).last_hidden_state
        return F.normalize(hidden.mean(1) if pooling == "mean" else hidden[:, 0], dim=-1)

    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 40, (steps - step) / (0.5 * steps))
        length = int(rng.choice(LENGTHS))
        starts = (rng.random((BATCH, 1)) ** power * (length - SPAN + 1)).astype(int)
        documents = rng.integers(0, WORDS, (BATCH, length))
        queries = np.take_along_axis(documents, starts + np.arange(SPAN), axis=1)
        F.cross_entropy(encode(queries) @ encode(documents).mT / TEMPERATURE, torch.arange(BATCH)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _slope(found: Any, rng: np.random.Generator) -> np.ndarray:
    """Slope of the longest documents' nDCG over place, divided by their mean; then the same of resampled documents."""
    longest = found["bucket"].values == len(LENGTHS) - 1
    score, place = (found[name].values[longest].reshape(-1, QUERIES) for name in ("score", "place"))

    def slope(rows: Any) -> float:
        y, x = score[rows].ravel(), place[rows].ravel()
        return float(np.polyfit(x, y, 1)[0] / y.mean())

    return np.array([slope(slice(None)), *(slope(rng.integers(0, len(score), len(score))) for _ in range(RESAMPLES))])
