"""Sentences of maps of sentences: are they true of their map, and do they name the reason?

On Feldhus et al., Saliency Map Verbalization (arXiv:2210.07222). Their search-based sentences are true by construction,
and crowd workers rate model-written ones as easier and find them less true. Only the first half is tested here: what a
language model writes needs a larger one than the zoo has. Sentences are read anew by a reader of their text that shares
no code with what wrote them; the control are the sentences of the same scores in another order of the words. Settings
are those of the paper, and none was tried beside them.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import xarray as xr

from ... import zoo
from ...attribution import attribute
from ...catalog import Finding, Premise
from ...data.sentences import Sentence, sentences
from ...evaluation.saliency_verbalization import saliency_verbalization, summary
from .._measure import mean

SCALES = "small", "large"
SENTENCES = {"small": 200, "large": 2000}
HELD = 10**6  # number of the first sentence that is explained
EXPECTED = (
    "every sentence is true of its map, and what is called most important by two standard errors more often than of a "
    "map with the scores in another order, the control, where it is in less than 60%; the part that is called most "
    "important holds a word of the reason in 80% of sentences or more, and in a share less by two standard errors with "
    "scores in another order"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Truth of the sentences of all searches and of summaries; how often they name the reason."""
    model, tokenizer = zoo.load("namer")
    told = sentences(SENTENCES[scale], seed=seed, start=HELD)
    rng = np.random.default_rng(seed)
    numbers: list[bool] = []
    ranks: dict[str, list[bool]] = {"own": [], "shuffled": []}
    named: dict[str, list[bool]] = {"own": [], "shuffled": []}
    tops = []
    for one in told:
        inputs = dict(tokenizer([one.text], return_tensors="pt"))
        found = attribute(model, inputs, one.label, method="attention_x_gradient", processor=tokenizer, words=True)
        scores = found[0].values[1:-1]  # without the tokens around the sentence
        own, shuffled = (_map(one, of) for of in (scores, rng.permutation(scores)))
        tops.append(one.rationale[int(scores.argmax())])
        numbers += [_true(str(statement), own) for statement in saliency_verbalization(own)]
        for kind, of in (("own", own), ("shuffled", shuffled)):
            said = summary(of)
            ranks[kind].append(_largest([str(statement) for statement in said], own))
            named[kind].append(any(one.rationale[i] for i in said[0].tokens))
    true, top = mean(numbers), mean(tops)
    rank, reason = ({kind: mean(values) for kind, values in of.items()} for of in (ranks, named))
    gains = [mean(np.subtract(of["own"], of["shuffled"], dtype=float)) for of in (ranks, named)]
    holds = (
        true.value == 1
        and rank["own"].value == 1
        and rank["shuffled"].below(0.6)
        and reason["own"].value >= 0.8
        and all(gain.above() for gain in gains)
    )
    measured = (
        f"{true.value:.1%} of {len(numbers)} sentences about shares are true; what is called most important is in "
        f"{rank['own']:.1%}, and of shuffled scores in {rank['shuffled']:.1%}; it holds a word of the reason in "
        f"{reason['own']:.1%}, of shuffled scores in {reason['shuffled']:.1%}. What a language model would write "
        f"of the maps was not tested"
    )
    finds = Premise("the map finds the reason", "its top word in 85% of sentences", f"{top:.0%}", top.value >= 0.85)
    return Finding(holds, measured, EXPECTED, seed, premises=[finds], draw=lambda figure: _draw(rank, reason, figure))


def _map(sentence: Sentence, scores: np.ndarray) -> xr.DataArray:
    return xr.DataArray(scores, {"text": ("token", list(sentence.words))}, ("token",))


def _true(text: str, found: xr.DataArray) -> bool:
    """Whether some words that read so have that share of the positive scores, by trying all of them."""
    words, part = found.text.values.tolist(), found.values / found.values.clip(0).sum()
    quoted, said = re.findall(r"'(.*)'", text)[0].split(), float(re.findall(r"([-\d.]+)%", text)[0])
    places = [[i for i, word in enumerate(words) if word == one] for one in quoted]
    ways = (at for at in itertools.product(*places) if list(at) == sorted(set(at)))
    return any(abs(100 * part[list(at)].sum() - said) <= 0.006 for at in ways)


def _largest(texts: list[str], found: xr.DataArray) -> bool:
    """Whether no part that the summary names has a larger share than the first."""
    words, whole = found.text.values.tolist(), []
    for text in texts:
        quoted = text.split(">> ")[1].split(" <<")[0].split()
        starts = (i for i in range(len(words)) if words[i : i + len(quoted)] == quoted)
        whole.append(max((found.values[i : i + len(quoted)].sum() for i in starts), default=-np.inf))
    every = [found.values[i : i + 1].sum() for i in range(len(words))]
    return whole[0] >= max(*whole, *every) - 1e-9


def _draw(rank: dict[str, Any], reason: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    for i, of in enumerate((rank, reason)):
        for j, (kind, value) in enumerate(of.items()):
            axes.bar(i + 0.35 * j, value.value, 0.3, yerr=value.error, color=f"C{j}", label=kind if i == 0 else None)
    axes.set_xticks([0.175, 1.175], ["'most important' is true", "it holds the reason"])
    axes.set_ylabel("share of sentences")
    axes.set_ylim(0, 1)
    axes.legend()
