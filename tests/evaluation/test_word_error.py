"""Word errors, counted by hand."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regard.evaluation import word_error as module
from regard.evaluation.word_error import word_error_rate

WORDS = st.lists(st.sampled_from(["one", "two", "six"]), max_size=6)


@pytest.mark.parametrize(
    ("said", "heard", "rate"),
    [
        ("one two three four", "one two three four", 0),
        ("one two three four", "one two four", 1 / 4),  # left out
        ("one two three four", "one two two three four", 1 / 4),  # added
        ("one two three four", "one six three four", 1 / 4),  # replaced
        ("one two three four", "two three four one", 2 / 4),  # left out at the start and added at the end
        ("one", "two three", 2),  # more than all
        ("one two", "", 1),
        (["one two three", "six"], ["one three", "six six"], 2 / 4),
        (["six", ""], ["six", "one"], 1),
    ],
)
def test_by_hand(said, heard, rate):
    assert word_error_rate(said, heard) == pytest.approx(rate)


def by_recursion(said, heard):
    if not said or not heard:
        return len(said) + len(heard)
    replaced = by_recursion(said[1:], heard[1:]) + (said[0] != heard[0])
    return min(replaced, by_recursion(said[1:], heard) + 1, by_recursion(said, heard[1:]) + 1)


@given(WORDS.filter(bool), WORDS)
def test_it_is_the_fewest_edits(said, heard):
    assert word_error_rate(" ".join(said), " ".join(heard)) == by_recursion(said, heard) / len(said)


def test_nothing_said():
    with pytest.raises(ValueError, match="nothing was said"):
        word_error_rate(["", " "], ["one", ""])
    with pytest.raises(ValueError, match="shorter"):
        word_error_rate(["one", "two"], ["one"])


def test_the_example_runs():
    assert doctest.testmod(module).failed == 0
