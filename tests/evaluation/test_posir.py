"""Position bias of retrieval, on encoders whose bias is known."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
import transformers as t
from conftest import words
from families import NO_IDS, SIZES, VOCAB

from regard.data.loaders.language import SpanQuestion, xquad
from regard.evaluation.posir import PositionedQuery, pooled, posir, positioned, saliency, token_lengths

DATA = os.environ.get("REGARD_DATA")


def counting(first: int | None = None):
    """An encoder that counts which of 200 words a text has, among its first so many."""

    def encode(texts):
        rows = [[int(word[1:]) for word in text.split()[:first]] for text in texts]
        return torch.stack([torch.bincount(torch.tensor(row), minlength=200).float() for row in rows])

    return encode


def task(length=20, documents=100):
    """Documents of as many words; each is asked for by one word, at all places in turn."""
    rng = np.random.default_rng(length)
    corpus, queries = [], []
    for i in range(documents):
        drawn = [f"w{j}" for j in rng.choice(200, length, replace=False)]
        start = len(" ".join([*drawn[: i % length], ""]))
        queries.append(PositionedQuery(drawn[i % length], i, start, start + len(drawn[i % length])))
        corpus.append(" ".join(drawn))
    return queries, corpus


def test_an_encoder_that_reads_only_the_beginning_is_biased():
    queries, corpus = task()
    blind = posir(counting(first=10), queries, corpus, edges=(), bins=4)
    assert (blind["ndcg"][0, :2] > 0.3).all()
    assert (blind["ndcg"][0, 2:] == 0).all()
    assert blind["sensitivity"].item() == 1
    assert blind["slope"].item() < -0.5
    seeing = posir(counting(), queries, corpus, edges=(), bins=4)
    assert seeing["sensitivity"].item() < 0.3
    assert abs(seeing["slope"].item()) < 0.2


def test_scores_by_hand():
    corpus = ["w0", "w0 w1", "w0 w1 w2 w3", "w4"]
    queries = [PositionedQuery("w0", 2, 0, 2), PositionedQuery("w3", 2, 9, 11), PositionedQuery("w4", 3, 0, 2)]
    found = posir(counting(), queries, corpus, edges=(2,), bins=2)
    # the cosines of "w0" with the first three are 1, 1 / sqrt(2) and 1 / 2: it is third
    np.testing.assert_allclose(found["score"], [1 / math.log2(4), 1, 1])
    np.testing.assert_allclose(found["place"], [1 / 11, 10 / 11, 0.5])
    assert found["length"].values.tolist() == ["up to 2", "over 2"]
    # the middle of "w4" stands on the edge of two places, and belongs to the first
    np.testing.assert_allclose(found["ndcg"], [[1, np.nan], [0.5, 1]])
    assert found["count"].values.tolist() == [[1, 0], [1, 1]]
    np.testing.assert_allclose(found["sensitivity"], [np.nan, 0.5])
    np.testing.assert_allclose(found["slope"], [np.nan, 1])
    np.testing.assert_allclose(posir(counting(), queries, corpus, depth=2)["score"], [0, 1, 1])


def test_an_encoder_that_tells_nothing_apart_is_not_flattered():
    queries, corpus = task()
    same = posir(lambda texts: torch.ones(len(texts), 3), queries, corpus, edges=())
    assert same["mean"].item() == 0


def test_length_and_place_are_apart():
    """Long documents are harder here, whatever the place: buckets differ, places within them do not."""
    (short, few), (long, many) = task(5), task(50)
    queries = short + [PositionedQuery(q.text, q.document + len(few), q.start, q.stop) for q in long]
    found = posir(counting(), queries, few + many, edges=(10,), bins=5)
    assert found["mean"][0] > found["mean"][1] + 0.2
    assert found["count"].sum("position").values.tolist() == [100, 100]


def test_documents_of_several_paragraphs_keep_the_place_of_answers():
    def ask(title, context, answer):
        return SpanQuestion("", title, context, f"what of {answer}?", answer, context.index(answer))

    questions = [
        ask("A", "one two", "two"), ask("A", "three four", "four"), ask("A", "five", "five"), ask("B", "six", "six")
    ]  # fmt: skip
    queries, corpus = positioned(questions, paragraphs=2)
    assert corpus == ["one two\nthree four", "five", "six"]
    assert [corpus[q.document][q.start : q.stop] for q in queries] == ["two", "four", "five", "six"]
    assert len(positioned(questions)[1]) == 4


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_does_not_see_padding(side):
    torch.manual_seed(0)
    tokenizer = words()
    tokenizer.padding_side = side
    model = t.BertModel(t.BertConfig(**SIZES, max_position_embeddings=64), add_pooling_layer=False).eval()
    texts = ["it was the best of times", "worst age"]
    with torch.no_grad():
        for pooling in ("mean", "cls", "last"):
            encode = pooled(model, tokenizer, pooling=pooling)
            together, alone = encode(texts), torch.cat([encode([text]) for text in texts])
            rows = [0] if side == "left" else [0, 1]  # bert counts positions from the left, padding included
            torch.testing.assert_close(together[rows], alone[rows], rtol=1e-4, atol=1e-5)
        hidden = model(**tokenizer(texts[0], return_tensors="pt")).last_hidden_state[0]
        for pooling, expected in (("mean", hidden.mean(0)), ("cls", hidden[0]), ("last", hidden[-1])):
            torch.testing.assert_close(
                pooled(model, tokenizer, pooling=pooling)(texts)[0], expected, rtol=1e-4, atol=1e-5
            )


def test_saliency_is_the_change_of_similarity():
    torch.manual_seed(0)
    tokenizer = words()
    model = t.GPT2Model(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64, **NO_IDS)).eval()
    document = "it was the best of times"
    found = saliency(model, tokenizer, "worst", document, pooling="cls")
    assert found.dims == ("token",)
    assert found["token_text"].values.tolist() == document.split()
    assert found[0] > 0
    assert (found[1:] == 0).all(), "the first token of a causal model sees no other"
    assert (saliency(model, tokenizer, "worst", document, pooling="last") > 0).all()
    assert all(p.grad is None for p in model.parameters())
    assert token_lengths(tokenizer, [document, "worst"]) == [6, 1]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="no queries"):
        posir(counting(), [], ["w1"])
    with pytest.raises(ValueError, match="no span of a document of this corpus, which has 1"):
        posir(counting(), [PositionedQuery("w1", 1, 0, 2)], ["w1"])
    with pytest.raises(ValueError, match="'mean', 'cls' or 'last', got 'max'"):
        model = t.BertModel(t.BertConfig(**SIZES), add_pooling_layer=False)
        pooled(model, words(), pooling="max")(["it"])  # pyright: ignore


@pytest.mark.skipif(DATA is None, reason="REGARD_DATA names no folder with XQuAD")
def test_questions_of_xquad():
    queries, corpus = positioned(xquad(f"{DATA}/xquad_en"), paragraphs=5)
    assert (len(queries), len(corpus)) == (1190, 48)

    def encode(texts):  # which words of the corpus a text has
        known = {word: i for i, word in enumerate(sorted({w for d in corpus for w in d.lower().split()}))}
        rows = torch.zeros(len(texts), len(known))
        for row, text in zip(rows, texts):
            row[[known[word] for word in text.lower().split() if word in known]] = 1
        return rows / rows.sum(0).clamp(min=1)

    found = posir(encode, queries, corpus, edges=(600,), bins=5)
    assert (found["mean"] > 0.5).all()
    assert int(found["count"].sum()) == 1190
