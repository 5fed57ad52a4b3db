"""Sentences of a map: shares by hand, what no search finds, and whether sentences are true."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

import regard
from regard.evaluation.saliency_verbalization import (
    Statement,
    coverage_score,
    faithfulness_score,
    instruction,
    level_of,
    named_tokens,
    rank_score,
    saliency_verbalization,
    snippets,
    summary,
)


def told(scores, words=None):
    words = words or [f"w{i}" for i in range(len(scores))]
    return xr.DataArray(np.array(scores, float), {"text": ("token", words)}, ("token",))


def test_shares_and_the_threshold_by_hand():
    scores = np.array([1, 0, 0.5, 0.5, -1])
    assert level_of(scores) == pytest.approx(0.75)  # the mean of the two highest of five
    assert level_of(scores, ("quantile", 2.0)) == pytest.approx(2 * scores.std())
    assert level_of(scores, ("variance", 2.0)) == pytest.approx(2 * scores.var())
    words = saliency_verbalization(told(scores), search="total", most=3)
    assert [one.share for one in words] == [0.5, 0.25, 0.25]
    assert str(words[0]) == "Token 'w0' with 50.0% of prediction score"


def test_a_span_and_the_last_start():
    scores = np.array([0, 0, 0, 0, 1.0, 4.0, 1.0])
    hits, values = snippets(scores, search="span", length=3, threshold=("mean", 0.6))
    assert hits == [(4, 5, 6), (3, 4, 5)]  # the first is the window that ends at the last word
    assert values == pytest.approx([0.5, 5 / 12])  # above 6 / 4 / 4, the mean of the four highest
    assert snippets(scores, search="span", length=3, threshold=("mean", 0.6), published=True)[0] == [(3, 4, 5)]
    assert snippets(scores, search="span", length=3, threshold=("mean", 0.5))[0] == []  # 0.5 is not above 6 / 4 / 3


def test_scores_that_are_alike_have_no_snippet():
    every = saliency_verbalization(told([2.0] * 8), search="convolution")
    assert every == []


def test_scale_changes_nothing_and_reversal_mirrors():
    scores = np.random.default_rng(0).normal(size=14)
    found = saliency_verbalization(told(scores))
    assert [str(one) for one in found] == [str(one) for one in saliency_verbalization(told(3 * scores))]
    hits, back = (set(snippets(s, search="convolution", sign=None)[0]) for s in (scores, scores[::-1]))
    assert hits
    assert {tuple(13 - i for i in hit[::-1]) for hit in hits} == back


def test_what_speaks_against_it():
    scores = np.array([0.5, -1, -3, -2, 0.2, 0.1, 0.3])
    against = saliency_verbalization(told(scores), search="span", length=3, sign="-", threshold=("mean", 0.6))
    assert [one.tokens for one in against] == [(1, 2, 3)]
    assert against[0].share == pytest.approx(1)
    assert saliency_verbalization(told(scores), search="span", length=3, sign="-", published=True) == []
    for_it = saliency_verbalization(told(scores), search="span", length=3)
    assert all(scores[list(one.tokens)].min() >= 0 for one in for_it)
    mixed = np.array([0, 0, 3, 4, -0.5, 0, 0])
    either, only = (snippets(mixed, search="span", length=3, threshold=("mean", 0.8), sign=s)[0] for s in (None, "+"))
    assert set(either) - set(only) == {(2, 3, 4)}


def test_a_summary_joins_neighbours():
    scores = told([0.1, 5, 4, 0.1, 0, 0, 3, 0.1], ["a", "heavy", "heart", "and", "a", ".", "sad", "man"])
    found = summary(scores)
    assert found[0].share == max(one.share for one in found)
    assert "heavy heart" in found[0].text
    assert "most important" in found[0].text
    assert all("also salient" in one.text for one in found[1:])
    assert found[0].share == pytest.approx(scores.values[list(found[0].tokens)].sum() / scores.values.sum())


def test_sentences_are_true_of_their_map_and_not_of_another():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=20)
    words = ["the", "a", ",", "x"] * 5  # words that stand there several times
    own, other = told(scores, words), told(rng.permutation(scores), words)
    said = [*saliency_verbalization(own), *summary(own)]
    assert faithfulness_score(said, own) == 1
    assert faithfulness_score(said, other) < 0.5
    off = [
        "Token 'x' with 99.0% of prediction score",
        "The word >> none << is most important for the prediction.",
        "so",
    ]
    assert faithfulness_score(off, own) == 0
    assert np.isnan(faithfulness_score([], own))
    least = words[int(scores.argmin())]
    ranks = [str(summary(own)[0]), f"The word >> {least} << is also salient for the prediction."]
    assert faithfulness_score(ranks, own) == 1


def test_free_text():
    scores = told([0.0, 2, 1, 1, -1], ["The", "heavy", "heart", "stone", "."])
    text = "It rests on heavy, and on the stone."
    assert named_tokens(text, [str(w) for w in scores.text.values]) == [0, 1, 3]
    assert coverage_score(text, scores) == pytest.approx(3 / 4)
    assert rank_score(text, scores) == pytest.approx(2 / 3)  # heavy and stone are among the three highest
    assert rank_score("heavy", scores) == 1
    assert np.isnan(rank_score("nothing", scores))
    asked = instruction(scores, "sorrow")
    assert "heavy: +1.00" in asked
    assert "'sorrow'" in asked


def test_parts_of_a_picture():
    pixels = np.zeros((6, 9))
    pixels[4:, 6:], pixels[:2, :3] = 3, 1
    found = saliency_verbalization(xr.DataArray(pixels, dims=("row", "column")))
    assert [str(one) for one in found[:2]] == [
        "Token 'lower right' with 75.0% of prediction score",
        "Token 'upper left' with 25.0% of prediction score",
    ]
    assert "lower right" in str(summary(xr.DataArray(pixels, dims=("row", "column")))[0])
    with pytest.raises(ValueError, match="do not stand in a row"):
        saliency_verbalization(xr.DataArray(pixels, dims=("row", "column")), search="span")


def test_refusals():
    with pytest.raises(ValueError, match="nothing speaks for"):
        saliency_verbalization(told([-1.0, 0]))
    with pytest.raises(ValueError, match="one sample"):
        saliency_verbalization(told([1.0, 0]).expand_dims("batch"))
    with pytest.raises(ValueError, match="not finite"):
        saliency_verbalization(told([1.0, np.nan]))
    with pytest.raises(ValueError, match="search"):
        saliency_verbalization(told([1.0]), search="best")
    with pytest.raises(ValueError, match="threshold"):
        saliency_verbalization(told([1.0] * 6), threshold=("median", 1.0))
    with pytest.raises(ValueError, match="length=1"):
        saliency_verbalization(told([1.0] * 6), length=1)
    with pytest.warns(UserWarning, match="512 filters"):
        snippets(np.ones(12), search="span", length=9)


def test_of_a_trained_model():
    model, tokenizer = regard.load("namer")
    inputs = tokenizer("with a heavy heart , the sailor stood .", return_tensors="pt")
    found = regard.attribute(model, inputs, method="attention_x_gradient", processor=tokenizer, words=True)[0]
    said = summary(found)
    assert isinstance(said[0], Statement)
    assert "heavy" in said[0].text
    assert faithfulness_score(said, found) == 1
