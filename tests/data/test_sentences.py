"""Sentences: the reason tells the feeling, by itself and nothing else does."""

from __future__ import annotations

import doctest
from collections import Counter, defaultdict

import pytest

from regard.data import sentences as module
from regard.data.sentences import ADJECTIVES, FEELINGS, NOT, OPPOSITE, PAIRS, SINGLE, sentences, vocabulary

MANY = sentences(4000, seed=1)
TOLD = {telling: feeling for by_feeling in (SINGLE, PAIRS) for feeling, told in by_feeling.items() for telling in told}


def test_a_sentence_depends_on_its_seed_and_number_only():
    assert sentences(3, seed=5) == sentences(9, seed=5)[:3]
    assert sentences(3, seed=5, start=6) == sentences(9, seed=5)[6:]
    assert sentences(9, seed=5) != sentences(9, seed=6)
    with pytest.raises(ValueError, match="seed and index count from 0"):
        sentences(1, seed=-1)


def test_two_by_hand():
    turned, pair = sentences(1, seed=3)[0], sentences(1, seed=4)[0]
    assert turned.text == "with a light lamp , the painter sang , not feeling cross ."
    assert (turned.feeling, turned.label, turned.reason) == ("calm", 2, ("not", "cross"))
    assert [i for i, told in enumerate(turned.rationale) if told] == [9, 11]
    assert pair.text == "with a cool stone , the painter slept , with a heavy heart ."
    assert (pair.feeling, pair.label, pair.reason) == ("sorrow", 1, ("heavy", "heart"))
    assert [i for i, told in enumerate(pair.rationale) if told] == [11, 12]


def test_the_reason_tells_the_feeling():
    for sentence in MANY:
        turned = sentence.reason[0] in NOT
        telling = " ".join(sentence.reason[turned:])
        assert sentence.feeling == (OPPOSITE[TOLD[telling]] if turned else TOLD[telling])
        assert len(sentence.words) == len(sentence.rationale)
        assert telling in sentence.text
        outside = " ".join(w for w, told in zip(sentence.words, sentence.rationale) if not told)
        assert not any(f" {other} " in f" {outside} " for other in TOLD)  # no second reason


def test_nothing_but_the_reason_tells_the_feeling():
    """Of all words outside the reason, and of the shape that is left, each is equally common with each feeling."""
    count: dict[object, Counter[str]] = defaultdict(Counter)
    for s in MANY:
        left = [word for word, told in zip(s.words, s.rationale) if not told]
        for clue in {*left, len(s.words), s.rationale.index(True), sum(s.rationale)}:
            count[clue][s.feeling] += 1
    for clue, by_feeling in count.items():
        n = sum(by_feeling.values())
        if n > 200:
            off = sum((by_feeling[f] - n / 4) ** 2 / (n / 4) for f in FEELINGS)
            assert off < 21.1, (clue, by_feeling)  # chi squared of three degrees, one in ten thousand


def test_words_alone_do_not_settle_it():
    """Words of the pairs, and negations, stand apart from the reason as often as not."""
    apart, telling = Counter(), Counter()
    for s in MANY:
        for word, told in zip(s.words, s.rationale):
            (telling if told else apart)[word] += 1
    for word in (*ADJECTIVES, *NOT, "heart", "face", "head", "temper"):
        assert apart[word] > 0.5 * telling[word] > 0
    shares = Counter(s.feeling for s in MANY)
    assert min(shares.values()) > 0.22 * len(MANY)
    assert 0.27 < sum(s.reason[0] in NOT for s in MANY) / len(MANY) < 0.33


def test_the_vocabulary_is_what_sentences_say():
    assert {word for s in MANY for word in s.words} == set(vocabulary())
    assert vocabulary() == sorted(vocabulary())


def test_the_example_runs():
    assert doctest.testmod(module).failed == 0
