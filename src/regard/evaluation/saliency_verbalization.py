"""A map of words in sentences, and whether sentences are true to a map.

Feldhus et al., Saliency Map Verbalization: Comparing Feature Importance Representations from Model-free and
Instruction-based Methods (arXiv:2210.07222), section 3, with the searches of the authors' code: binary filters slide
over the words, what scores above a threshold is a snippet, and a template says what share of the prediction it covers.

Their code leaves out the last start of a filter, and lets no snippet speak against the prediction; with `published` so
does ours. Otherwise filters reach the last word, and sign "-" searches what speaks against the prediction as "+" does
what speaks for it. Their summary takes the share of a span without its last word, so that words alone count nothing;
ours takes all of it. Their samples are of 100 words at most, and their best snippets cover more than a tenth; ours are
any. Nine parts of a picture as words, the score of sentences and the wording of the instruction are ours.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

Array = NDArray[np.floating]
Search = Literal["convolution", "span", "total"]
Threshold = tuple[Literal["mean", "quantile", "variance"], float]
SEARCHES: tuple[Search, ...] = ("convolution", "span", "total")
MEAN: Threshold = ("mean", 0.4)
OFF = 0.0051  # of a percentage that is told with two digits
LONG = 8  # words of a filter, from which on there are too many
_TOLD = re.compile(r"^(?:snippet: '(.*) ' contains|Token '(.*)' with) (-?[\d.]+)% of prediction score\.?$", re.DOTALL)
_NAMED = re.compile(
    r"^The (?:word|phrase|span) >> (.*) << is (most important|also salient) (?:for|against) the prediction\.$",
    re.DOTALL,
)


@dataclass(frozen=True)
class Statement:
    """A sentence about a map, the words that it is about, and their share of what speaks for the prediction."""

    text: str
    tokens: tuple[int, ...]
    share: float

    def __str__(self) -> str:
        return self.text


def saliency_verbalization(
    attribution: xr.DataArray,
    *,
    search: Search | Literal["all"] = "all",
    length: int = 5,
    threshold: Threshold = MEAN,
    sign: Literal["+", "-"] | None = "+",
    most: int | None = 5,
    published: bool = False,
) -> list[Statement]:
    """Sentences that say which words the prediction rests on, the largest shares first.

    attribution: of one sample, [token] with the coordinate `text`, or [row, column], whose nine parts are its words.
    search: "convolution" tries 2 to `length` - 2 of `length` words in a row, "span" what stands together around a
    middle, "total" every word alone; all after each other. A snippet's mean score is above the threshold: the mean of
    this share of the highest scores, or so many standard deviations or variances, of scores as shares of the highest.
    sign: "+", every word of a snippet speaks for the prediction; "-", against it; None, as it may be. most: sentences
    of a search. published: as the authors' code.

    ValueError where no word speaks for the prediction (or, with "-", against it): there is nothing to take shares of.

    >>> words = ["a", "heavy", "heart", ",", "the", "end"]
    >>> scores = xr.DataArray([0.1, 2.0, 1.5, 0.0, -0.2, 0.0], {"text": ("token", words)}, ("token",))
    >>> print(saliency_verbalization(scores, search="span", length=3, threshold=("mean", 0.9))[0])
    snippet: 'a heavy heart ' contains 100.0% of prediction score.
    """
    wanted = SEARCHES if search == "all" else (search,)
    if not set(wanted) <= set(SEARCHES):
        raise ValueError(f"search={search!r}: one of {', '.join(SEARCHES)}, or all")
    scores, words = _read(attribution, sign, published)
    placed = "row" in attribution.dims  # parts of a picture are no sequence
    found: list[Statement] = []
    for name in wanted:
        if name == "total":
            statements = [Statement(_total(words, scores, i), (i,), _share(scores, [i])) for i in _order(scores)]
        elif placed and search == "all":
            continue
        elif placed:
            raise ValueError(f"search={name!r}: parts of a picture do not stand in a row; search='total'")
        else:
            hits, _ = snippets(scores, search=name, length=length, threshold=threshold, sign=sign, published=published)
            made = (Statement(_snippet(words, scores, hit), hit, _share(scores, hit)) for hit in hits)
            statements = sorted(made, key=lambda one: -one.share)
        found += statements[:most]
    return found


def summary(
    attribution: xr.DataArray, *, length: int = 5, threshold: Threshold = MEAN, sign: str = "+"
) -> list[Statement]:
    """What is most important, and what is also salient: spans of the words that the searches name, in a sentence each.

    Of the five largest of each search, words that stand together are joined, and the spans whose share is in the upper
    quarter are told. For the rest see `saliency_verbalization`.

    >>> words = ["a", "heavy", "heart", ",", "the", "end"]
    >>> scores = xr.DataArray([0.1, 2.0, 1.5, 0.0, -0.2, 0.0], {"text": ("token", words)}, ("token",))
    >>> print(summary(scores)[0])
    The phrase >> a heavy heart , << is most important for the prediction.
    """
    told = saliency_verbalization(attribution, length=length, threshold=threshold, sign=sign)  # type: ignore[arg-type]
    scores, words = _read(attribution, sign, False)
    pool = sorted({i for one in told for i in one.tokens})
    spans: list[tuple[int, ...]] = [(i,) for i in pool]
    if "row" not in attribution.dims:
        spans = [tuple(i for _, i in run) for _, run in groupby(enumerate(pool), lambda at: at[1] - at[0])]
    shares = [_share(scores, span) for span in spans]
    high = [(share, span) for share, span in zip(shares, spans) if share >= np.quantile(shares, 0.75)]
    ends, found = "against" if sign == "-" else "for", []
    for share, span in sorted(high, key=lambda one: (-one[0], one[1])):
        text = " ".join(words[i] for i in span)
        kind = "word" if len(span) == 1 else "span" if "." in text else "phrase"
        how = "also salient" if found else "most important"
        found.append(Statement(f"The {kind} >> {text} << is {how} {ends} the prediction.", span, share))
    return found


def snippets(
    scores: Array,
    *,
    search: Search,
    length: int = 5,
    threshold: Threshold = MEAN,
    sign: str | None = "+",
    published: bool = False,
) -> tuple[list[tuple[int, ...]], list[float]]:
    """The words of each snippet that a search finds, and their mean as a share of the highest score; the last first.

    scores: [token], of which those above 0 speak for what is told
    """
    if length < 2:
        raise ValueError(f"length={length}: a filter spans two words at least")
    if length > LONG:
        warnings.warn(f"length={length}: there are {2**length} filters; {LONG} are many", stacklevel=2)
    scores = scores / abs(scores.max())
    level = level_of(scores, threshold)
    found: dict[tuple[int, ...], float] = {}
    for ones in _filters(search, length):
        for start in range(len(scores) - length + (not published)):
            at = tuple(start + i for i in ones)
            value = scores[list(at)].mean()
            window = np.zeros(length, scores.dtype)
            window[list(ones)] = scores[list(at)]
            fits = sign is None or bool((window < 0).all() if published and sign == "-" else (window >= 0).all())
            if value > level and fits:
                found[at] = float(value)
    order = sorted(found, reverse=True)
    return order, [found[at] for at in order]


def level_of(scores: Array, threshold: Threshold = MEAN) -> float:
    """What the mean of a snippet has to exceed; of scores as shares of the highest."""
    kind, much = threshold
    if kind == "mean":
        top = max(1, int(much * len(scores)))
        return float(np.sort(scores)[::-1][:top].mean())
    if kind not in ("quantile", "variance"):
        raise ValueError(f"threshold={threshold!r}: ('mean', share), ('quantile', deviations) or ('variance', times)")
    return float(much * (scores.std() if kind == "quantile" else scores.var()))


def _filters(search: str, length: int) -> Iterator[tuple[int, ...]]:
    """Which words of a window count."""
    if search == "span":
        middle = length // 2
        for wide in range(3, length + 1, 2):
            yield tuple(range(middle - wide // 2, middle + wide // 2 + 1))
        return
    for n in range(2, length - 1):
        yield from combinations(range(length), n)


def instruction(attribution: xr.DataArray, prediction: str) -> str:
    """What a language model may be asked, to tell the map in its own words; `coverage_score` judges its answer."""
    scores, words = _read(attribution, None, False)
    listed = "\n".join(f"{word}: {score:+.2f}" for word, score in zip(words, scores / abs(scores).max()))
    return (
        f"A model read this text and predicted {prediction!r}.\n\nText: {' '.join(words)}\n\nHow much each word "
        f"speaks for the prediction (above 0) or against it (below 0), 1 at most:\n{listed}\n\nSay in one or two "
        f"sentences which words the prediction rests on, without naming numbers."
    )


def faithfulness_score(statements: Sequence[Statement | str], attribution: xr.DataArray, *, sign: str = "+") -> float:
    """Share of sentences that are true of the map, 0 to 1. NaN of none.

    Sentences are read anew, from their text alone. True is a percentage within 0.01 of the share that these words have,
    in some place where they stand in this order, and "most important" what no other named part exceeds. A sentence that
    is none of the templates, or names words that are not there, is not true.

    >>> scores = xr.DataArray([1.0, 3.0], {"text": ("token", ["heavy", "heart"])}, "token")
    >>> told = [f"Token '{word}' with 75.0% of prediction score" for word in ("heavy", "heart")]
    >>> faithfulness_score(told, scores)
    0.5
    """
    scores, words = _read(attribution, sign, False)
    texts = [str(one) for one in statements]
    named = [m for text in texts if (m := _NAMED.match(text))]
    whole = {m[1]: max((_share(scores, at) for at in _found(words, m[1])), default=-np.inf) for m in named}

    def true(text: str) -> bool:
        if told := _TOLD.match(text):
            part = told[1] if told[1] is not None else told[2]
            return any(
                abs(100 * _share(scores, at) - float(told[3])) < OFF for at in _found(words, part, told[1] is not None)
            )
        if told := _NAMED.match(text):
            own = whole[told[1]]
            return np.isfinite(own) and (told[2] == "also salient" or own >= max(whole.values()))
        return False

    return float(np.mean([true(text) for text in texts])) if texts else float("nan")


def named_tokens(text: str, words: Sequence[str]) -> list[int]:
    """Which of the words a text names, in any case of letters; signs that are no words are not looked for."""
    said = set(re.findall(r"\w+", text.lower()))
    return [i for i, word in enumerate(words) if word.lower() in said]


def coverage_score(text: str, attribution: xr.DataArray) -> float:
    """Share of what speaks for the prediction that the words named in a text hold; 1 names all that does."""
    scores, words = _read(attribution, "+", False)
    return _share(scores, named_tokens(text, words))


def rank_score(text: str, attribution: xr.DataArray) -> float:
    """Share of the words named in a text that are among as many highest, 0 to 1; NaN where it names none."""
    scores, words = _read(attribution, "+", False)
    named = named_tokens(text, words)
    return len({*named} & {*_order(scores)[: len(named)].tolist()}) / len(named) if named else float("nan")


def _read(attribution: xr.DataArray, sign: str | None, published: bool) -> tuple[Array, list[str]]:
    """Scores that are above 0 where they speak for what is told, and words."""
    if sign not in ("+", "-", None):
        raise ValueError(f"sign={sign!r}: '+', '-' or None")
    if attribution.dims == ("row", "column"):
        attribution = _parts(attribution)
    if attribution.dims != ("token",) or "text" not in attribution.coords:
        raise ValueError(
            f"sentences are of one sample's words, [token] with the coordinate text, or of a picture, [row, column]; "
            f"got [{', '.join(map(str, attribution.dims))}]; take a sample, and give regard.attribute the processor"
        )
    scores, words = attribution.values, [str(word).strip() or "_" for word in attribution.text.values]
    if not np.isfinite(scores).all():
        raise ValueError("some scores are not finite")
    scores = -scores if sign == "-" and not published else scores
    if not (scores > 0).any():
        raise ValueError(
            f"nothing speaks {'against' if sign == '-' else 'for'} the prediction, so no share of it can be told"
        )
    return scores, words


def _parts(attribution: xr.DataArray) -> xr.DataArray:
    """Nine parts of a picture, each with the sum of its scores, and how it is called."""
    bands = [np.array_split(np.arange(n), 3) for n in attribution.shape]
    if min(attribution.shape) < 3:
        raise ValueError(f"a picture of {attribution.shape[0]} x {attribution.shape[1]} has no nine parts to name")
    names = [
        " ".join(filter(None, (row, column))) or "centre"
        for row in ("upper", "", "lower")
        for column in ("left", "", "right")
    ]
    sums = [attribution.values[np.ix_(rows, columns)].sum() for rows in bands[0] for columns in bands[1]]
    return xr.DataArray(np.array(sums), {"text": ("token", names)}, ("token",))


def _share(scores: Array, at: Sequence[int]) -> float:
    return float(scores[list(at)].sum() / scores[scores > 0].sum())


def _order(scores: Array) -> NDArray[np.intp]:
    return np.argsort(-scores, kind="stable")


def _percent(share: float) -> float:
    return round(100 * share, 2)


def _snippet(words: Sequence[str], scores: Array, at: Sequence[int]) -> str:
    return f"snippet: '{' '.join(words[i] for i in at)} ' contains {_percent(_share(scores, at))}% of prediction score."


def _total(words: Sequence[str], scores: Array, i: int) -> str:
    return f"Token '{words[i]}' with {_percent(_share(scores, [i]))}% of prediction score"


def _found(words: Sequence[str], part: str, apart: bool = False) -> Iterator[tuple[int, ...]]:
    """Where these words stand in this order, one after another or, `apart`, with others between them."""
    wanted = part.split(" ")

    def go(start: int, left: Sequence[str]) -> Iterator[tuple[int, ...]]:
        if not left:
            yield ()
            return
        near = start + 1 if not apart and start else len(words)
        for i in range(start, min(near, len(words))):
            if words[i] == left[0]:
                yield from ((i, *rest) for rest in go(i + 1, left[1:]))

    yield from go(0, wanted)
