"""Two small encoders, one pooled by the mean and one by [CLS], learn to retrieve: what bias of position do they show?

On Zeng et al., PosIR (arXiv:2601.08363). Documents are 8, 16 or 32 random words, a query is three words in a row out of
one. In training most queries ask for an early part of their document, as in data gathered from readers (the place is
the square of a uniform number); in the benchmark all places are equally likely. Encoders are BERT's, and learn from
nothing, by telling a query's document from the others of its batch. There is bias where the sensitivity index exceeds
95% of those found with the places of the queries shuffled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding
from ...evaluation.posir import Pooling, PositionedQuery, pooled, posir, saliency

SCALES = "small", "large"
WORDS, SPAN, LENGTHS, BINS = 200, 3, (8, 16, 32), 10
STEPS, BATCH, RATE, TEMPERATURE = {"small": 1000, "large": 10_000}, 64, 3e-3, 0.05
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")  # ids 0 to 3; words follow
DOCUMENTS, QUERIES, SHUFFLED = 200, 5, 200  # documents of each length, queries of each document, shuffles
POOLINGS: tuple[Pooling, ...] = ("mean", "cls")

EXPECTED = (
    "in documents of 32 words, both encoders have a sensitivity index above 95% of those with shuffled places, and the "
    "two differ by at least 0.1; it cannot be told where an encoder finds documents of that length with a mean nDCG@10 "
    "below 0.2"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Encoders pooled by the mean and by [CLS] show bias of position, of different size."""
    tokenizer = _tokenizer()
    models: dict[Pooling, Any] = {pooling: _trained(pooling, STEPS[scale], seed) for pooling in POOLINGS}
    rng = np.random.default_rng(seed + 1)
    queries, corpus = [], []
    for length in LENGTHS:
        for words in rng.integers(0, WORDS, (DOCUMENTS, length)):
            starts = rng.integers(0, length - SPAN + 1, QUERIES)
            queries += [_query(words, len(corpus), int(start)) for start in starts]
            corpus.append(_text(words))
    found, chance, moved = {}, {}, {}
    for pooling, model in models.items():
        encode = pooled(model, tokenizer, pooling=pooling, batch=128)
        found[pooling] = posir(encode, queries, corpus, edges=LENGTHS[:-1], bins=BINS)
        chance[pooling] = _chance(found[pooling], rng)
        some = queries[-50:]
        maps = [saliency(model, tokenizer, q.text, corpus[q.document], pooling=pooling).values[1:-1] for q in some]
        moved[pooling] = np.mean([m / m.sum() for m in maps], axis=0)
    index = {pooling: float(found[pooling]["sensitivity"][-1]) for pooling in POOLINGS}
    mean = {pooling: float(found[pooling]["mean"][-1]) for pooling in POOLINGS}
    holds: bool | None = all(index[p] > chance[p] for p in POOLINGS) and abs(index["mean"] - index["cls"]) >= 0.1
    if min(mean.values()) < 0.2:
        holds = None
    measured = "; ".join(
        f"{pooling}: nDCG@10 {mean[pooling]:.2f}, sensitivity {index[pooling]:.2f} (shuffled: 95% below "
        f"{chance[pooling]:.2f}), slope {float(found[pooling]['slope'][-1]):+.2f}, in documents of {LENGTHS[0]} words "
        f"sensitivity {float(found[pooling]['sensitivity'][0]):.2f}"
        for pooling in POOLINGS
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

    return Finding(holds, measured + ".", EXPECTED, seed, draw=draw)


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


def _trained(pooling: Pooling, steps: int, seed: int) -> Any:
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
        starts = (rng.random((BATCH, 1)) ** 2 * (length - SPAN + 1)).astype(int)
        documents = rng.integers(0, WORDS, (BATCH, length))
        queries = np.take_along_axis(documents, starts + np.arange(SPAN), axis=1)
        F.cross_entropy(encode(queries) @ encode(documents).mT / TEMPERATURE, torch.arange(BATCH)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _chance(found: Any, rng: np.random.Generator) -> float:
    """The sensitivity index of the longest documents that 95% of shuffles of their queries' places stay below."""
    longest = found["bucket"].values == len(LENGTHS) - 1
    score, place = found["score"].values[longest], found["place"].values[longest]
    bins = np.minimum((place * BINS).astype(int), BINS - 1)
    drawn = []
    for _ in range(SHUFFLED):
        shuffled = rng.permutation(score)
        means = [shuffled[bins == i].mean() for i in range(BINS) if (bins == i).any()]
        drawn.append(1 - min(means) / max(means))
    return float(np.quantile(drawn, 0.95))
