"""Small encoders, some pooled by the mean and some by [CLS], learn to retrieve: what bias of position do they show?

On Zeng et al., PosIR (arXiv:2601.08363): bias of position is pervasive, mostly for what stands early, and grows with
the length of documents. Documents are 8, 16 or 32 random words, a query is three words in a row out of one. In training
most queries ask for an early part of their document, as in data gathered from readers (the place is a uniform number to
the power of 1.5); in the benchmark all places are equally likely. Encoders are BERT's, and learn from nothing, by
telling a query's document from the others of its batch. Bias is the slope of nDCG over the place, divided by the mean.
The control learns from queries of all places alike. The sensitivity index, one less the lowest bin's mean over the
highest's, is reported: with places squared both poolings come to its ceiling.

That poolings differ is not the paper's, which compares models that differ in all; it is asked here of pairs of
trainings that share their seed, and errors are over pairs. Three designs were tried, the last without a pilot. Before
it, one training of each was compared by a bootstrap over documents, whose error of 0.10 left a difference of 0.14 on
seed 0 undecided, and knew nothing of how trainings differ; and that bias grows with length was not asked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...evaluation.posir import Pooling, PositionedQuery, pooled, posir, saliency
from .._measure import failed, mean

SCALES = "small", "large"
WORDS, SPAN, LENGTHS, BINS, POWER = 200, 3, (8, 16, 32), 10, 1.5
STEPS, BATCH, RATE, TEMPERATURE = {"small": 700, "large": 10_000}, 64, 3e-3, 0.05
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")  # ids 0 to 3; words follow
DOCUMENTS, QUERIES = (50, 50, 500), 5  # documents of each length, queries of each
PAIRS = 4
POOLINGS: tuple[Pooling, ...] = ("mean", "cls")

EXPECTED = (
    "in documents of 32 words, the slope of nDCG over place, relative to its mean, is below 0 by two standard errors "
    "over trainings with both poolings, that of the two differs by two standard errors over pairs, and an encoder that "
    "learned from all places alike has at most a third of the slope of those of its pooling; with both poolings the "
    "slope is steeper by two standard errors in documents of 32 words than of 8"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Encoders pooled by the mean and by [CLS] show bias of position, of different size, more in longer documents."""
    tokenizer = _tokenizer()
    rng = np.random.default_rng(seed + 1)
    queries, corpus = [], []
    for length, count in zip(LENGTHS, DOCUMENTS):
        for words in rng.integers(0, WORDS, (count, length)):
            starts = rng.integers(0, length - SPAN + 1, QUERIES)
            queries += [_query(words, len(corpus), int(start)) for start in starts]
            corpus.append(_text(words))

    def judged(pooling: Pooling, power: float, number: int) -> tuple[Any, np.ndarray]:
        """What the benchmark finds, and the saliency of each place of the longest documents."""
        model = _trained(pooling, power, STEPS[scale], number)
        found = posir(
            pooled(model, tokenizer, pooling=pooling, batch=128), queries, corpus, edges=LENGTHS[:-1], bins=BINS
        )
        some = queries[-50:] if number == 1000 * seed else []
        maps = [saliency(model, tokenizer, q.text, corpus[q.document], pooling=pooling).values[1:-1] for q in some]
        return found, np.mean([m / m.sum() for m in maps], axis=0) if maps else np.array(())

    numbers = range(1000 * seed, 1000 * seed + PAIRS)
    made = {pooling: [judged(pooling, POWER, number) for number in numbers] for pooling in POOLINGS}
    alike, _ = judged("mean", 1.0, 1000 * seed)
    found = {pooling: [one for one, _ in each] for pooling, each in made.items()}
    slopes = {p: np.array([[_slope(one, i) for i in range(len(LENGTHS))] for one in found[p]]) for p in POOLINGS}
    even = _slope(alike, -1)
    by_mean, by_cls = (mean(slopes[p][:, -1]) for p in POOLINGS)
    differ = mean(slopes["cls"][:, -1] - slopes["mean"][:, -1])
    steeper = {p: mean(slopes[p][:, 0] - slopes[p][:, -1]) for p in POOLINGS}
    asked = {
        "an encoder shows no bias for what stands early": by_mean.below() and by_cls.below(),
        "the two poolings do not differ by two standard errors": differ.above() or differ.below(),
        "an encoder that learned from all places alike is biased too": abs(even) <= abs(by_mean.value) / 3,
        "bias does not grow with length": all(more.above() for more in steeper.values()),
    }
    kinds = {**found, "places alike": [alike]}
    scores = [float(np.mean([one["mean"][-1] for one in each])) for each in kinds.values()]
    measured = (
        f"relative slope {by_mean:.2f} pooled by the mean, {by_cls:.2f} by [CLS] (of {PAIRS} pairs, apart by "
        f"{differ:+.2f}), {even:.2f} where places were alike; from {LENGTHS[0]} to {LENGTHS[-1]} words it falls by "
        f"{steeper['mean']:.2f} and {steeper['cls']:.2f}; sensitivity "
        + ", ".join(f"{np.mean([one['sensitivity'][-1] for one in each]):.2f} {name}" for name, each in kinds.items())
        + failed(asked)
    )
    finds = Premise(
        f"encoders find documents of {LENGTHS[-1]} words",
        "mean nDCG@10 0.2 or more, of each kind",
        ", ".join(f"{score:.2f}" for score in scores),
        min(scores) >= 0.2,
    )

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 3)
        for axes, pooling in zip(panels, POOLINGS):
            for i, length in enumerate(LENGTHS):
                curve = np.mean([one["ndcg"][i] for one in found[pooling]], axis=0)
                axes.plot(found[pooling][0]["position"], curve, "o-", label=f"{length} words")
            axes.set(title=f"nDCG@10, pooled by {pooling}", xlabel="place of the answer", ylim=(0, 1.5))
            axes.legend(loc="upper right")
        for pooling in POOLINGS:
            panels[2].plot((np.arange(LENGTHS[-1]) + 0.5) / LENGTHS[-1], made[pooling][0][1], label=pooling)
        panels[2].set(title="Saliency", xlabel="place of the token", ylabel="share", ylim=(0, None))
        panels[2].legend()

    return Finding(all(asked.values()), measured, EXPECTED, seed, premises=[finds], draw=draw)


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


def _slope(found: Any, bucket: int) -> float:
    """Slope of nDCG over place in the documents of a length, divided by their mean."""
    of = found["bucket"].values == range(len(LENGTHS))[bucket]
    score, place = (found[name].values[of] for name in ("score", "place"))
    return float(np.polyfit(place, score, 1)[0] / score.mean())
