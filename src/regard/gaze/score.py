"""Scanpaths of two groups, people or models, on the same pictures.

Every person of one group is compared with every person of the other who looked at the same picture, by all metrics of
this room: how alike two groups look is told by the mean over pairs, beside how alike the people of one group are
among themselves. The test permutes who belongs to which group, as Feusner and Lukoff, Testing for statistically
significant differences between groups of scan patterns (ETRA 2008). Intervals and the level of other pictures are
ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ..data.loaders import GazeData, Scanpath
from ..extras import needs
from ._maps import density
from ._people import Floats, interval, p_value
from .auc_judd import auc_judd
from .cc import cc
from .fixation_map import fixation_map
from .information_gain import information_gain
from .kl import kl
from .multimatch import multimatch
from .nss import nss
from .scanmatch import scanmatch
from .sequence_score import clusters, sequence_score
from .string_edit import string_edit

PATHS = (
    "string_edit",
    "scanmatch",
    "sequence_score",
    "multimatch_shape",
    "multimatch_direction",
    "multimatch_length",
    "multimatch_position",
    "multimatch_duration",
)
MAPS = ("nss", "auc_judd", "cc", "kl", "information_gain")
METRICS = (*PATHS, *MAPS)
LOWER = ("kl",)  # is better
ROWS = 48  # of the maps
EVEN = 0.05  # share of an even map in each, so that nothing is impossible
WIDE = 1 / 24  # of a screen's width is sigma, where a degree is not known


class _Node(NamedTuple):
    """A person in a group."""

    group: int
    person: int


def score(
    a: GazeData,
    b: GazeData,
    *,
    same_people: bool | None = None,
    metrics: Sequence[str] | None = None,
    sigma: float | None = None,
    pairs: int = 20_000,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """How alike two groups look at the same pictures, metric by metric. [metric]

    - between: mean over pairs of one of `a` and one of `b` on one picture, `_low` and `_high` 95% of draws of people
    - within_a, within_b: of two people of one group, likewise; the most that can be expected; NaN for one person,
      and without `_low` and `_high` for two
    - other: a pair on two different pictures of one size: what is alike without seeing the same
    - p: how often groups of the same sizes, drawn anew from all people, differ as much: two people of one group are
      more alike than two of both (one-sided). Small means that the groups look differently, not that they are unlike.

    Maps are of the first person's fixations (of `a`, in between and other), judged by the second's. People count
    evenly, whatever pictures they saw; of several trials of one person with one picture, all count. kl is lower where
    looks are alike.

    same_people: whether a name that stands in both means one person, who is not compared with himself, and who is
        drawn and permuted as one; needed where names stand in both. metrics: of `METRICS`, all unless told.
        sequence_score is of clusters of both groups' fixations on the picture, and needs scikit-learn.
    sigma: of the maps, in pixels of the screen; otherwise one degree, where the data say it, or 1/24 of its width.
    pairs: at most so many pairs are compared, for each of between, within and other, evenly drawn over pictures; the
        attributes tell how many of all. progress: called with pairs done, and all.

    ValueError where there is no common picture, screens differ, or nothing says what a name in both means.

        people, model = regard.gaze.read("people.csv", screen=(1024, 768)), regard.gaze.read("model.csv", ...)
        print(regard.gaze.score(model, people).to_dataframe())
    """
    chosen = _chosen(metrics)
    common = [name for name in a.stimuli if name in set(b.stimuli)]
    if not common:
        raise ValueError(f"no picture is in both: one has {_some(a.stimuli)}, the other {_some(b.stimuli)}")
    shared = sorted(set(a.subjects) & set(b.subjects))
    if shared and same_people is None:
        raise ValueError(
            f"{_some(shared)} stand in both: say whether these are the same people, same_people=True or False"
        )
    people = {name: i for i, name in enumerate(dict.fromkeys((*a.subjects, *b.subjects)))}
    if not same_people:
        people = {(g, name): i for i, (g, name) in enumerate((g, n) for g, d in enumerate((a, b)) for n in d.subjects)}
    nodes = [
        _Node(g, people[name] if same_people else people[g, name])  # type: ignore[index]
        for g, data in enumerate((a, b))
        for name in data.subjects
    ]
    of_name = [{name: i for i, name in enumerate(a.subjects)}]
    of_name.append({name: i + len(a.subjects) for i, name in enumerate(b.subjects)})
    seen: dict[str, list[tuple[int, Scanpath]]] = {name: [] for name in common}
    for group, data in enumerate((a, b)):
        for trial in data:
            if trial.stimulus in seen and len(trial.scanpath):
                seen[trial.stimulus].append((of_name[group][trial.subject], trial.scanpath))
    for name, trials in seen.items():
        if len(sizes := {path.size for _, path in trials}) > 1:
            raise ValueError(f"{name!r} was shown on screens of {' and '.join(map(str, sorted(sizes)))}: scale one")
    wide = sigma if sigma is not None else (b.degree or a.degree)
    measure = _Measure(seen, chosen, wide)

    rng = np.random.default_rng(seed)
    same, possible = _same_picture(seen, nodes, pairs, rng)
    other = _other_picture(seen, nodes, pairs, rng)
    total, done = len(same) + len(other), 0
    sums = np.zeros((2, len(chosen), len(nodes), len(nodes)))
    for which, drawn in enumerate((same, other)):
        counts = np.zeros_like(sums[0])
        for one, two in drawn:
            if progress is not None and done % 50 == 0:
                progress(done, total)
            done += 1
            (i, *_), (j, *_) = seen[one[0]][one[1]], seen[two[0]][two[1]]
            found = measure(one, two)
            there = ~np.isnan(found)
            sums[which, there, i, j] += found[there]
            counts[there, i, j] += 1
        with np.errstate(invalid="ignore"):
            sums[which] /= np.where(counts, counts, np.nan)
    same_mean, other_mean = sums
    group, person = (np.array([getattr(node, f) for node in nodes]) for f in ("group", "person"))

    def estimate(count: Floats) -> Floats:
        weight = count[person]
        means = [_mean(same_mean, weight * (group == g), weight * (group == h)) for g, h in ((0, 1), (0, 0), (1, 1))]
        return np.stack([*means, _mean(other_mean, weight * (group == 0), weight * (group == 1))])

    each = np.ones(int(person.max()) + 1)
    value = estimate(each)
    low, high = interval(estimate, len(each), resamples, rng)
    names = ("between", "within_a", "within_b", "other")
    for i, size in ((1, len(a.subjects)), (2, len(b.subjects))):
        if size < 3:  # two people make one pair, of which every draw is the same
            low[i] = high[i] = np.nan
    made: dict[str, tuple] = {}
    for i, name in enumerate(names):
        for suffix, of in (("", value), ("_low", low), ("_high", high)):
            made[name + suffix] = ("metric", of[i])
    better = np.array([-1.0 if name in LOWER else 1.0 for name in chosen])
    own = better * _contrast(same_mean, group)
    chance = [better * _contrast(same_mean, _regrouped(group, person, rng)) for _ in range(resamples)]
    made["p"] = ("metric", p_value(own, np.stack(chance)) if chance else np.full(len(chosen), np.nan))
    return xr.Dataset(
        made,
        {"metric": list(chosen)},
        attrs={
            "pictures": len(common),
            "left_out_a": len(a.stimuli) - len(common),
            "left_out_b": len(b.stimuli) - len(common),
            "people_a": len(a.subjects),
            "people_b": len(b.subjects),
            "pairs": len(same),
            "pairs_possible": possible,
            "sigma": measure.sigma(common[0]),
            "lower": [name for name in chosen if name in LOWER],
        },
    )


def _chosen(metrics: Sequence[str] | None) -> tuple[str, ...]:
    chosen = METRICS if metrics is None else tuple(metrics)
    for name in chosen:
        if name not in METRICS:
            raise ValueError(f"no metric {name!r}; there are {', '.join(METRICS)}")
    if not chosen:
        raise ValueError("metrics: none was named")
    return chosen


def _mean(values: Floats, one: Floats, two: Floats) -> Floats:
    """Mean over pairs that were compared, with these weights of the first and the second person. [metric]"""
    weight = one[:, None] * two
    there = ~np.isnan(values)
    total = (weight * there).sum((1, 2))
    with np.errstate(invalid="ignore"):
        return np.where(total > 0, (weight * np.where(there, values, 0)).sum((1, 2)) / total, np.nan)


def _contrast(values: Floats, group: NDArray) -> Floats:
    """How much more alike pairs of one group are than pairs of both. [metric]"""
    alike = group[:, None] == group
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        within, between = (
            np.where(there & kind, values, 0).sum((1, 2)) / (there & kind).sum((1, 2)) for kind in (alike, ~alike)
        )
    return within - between


def _regrouped(group: NDArray, person: NDArray, rng: np.random.Generator) -> NDArray:
    """Who is in both groups swaps or not; the others are dealt out anew."""
    new = group.copy()
    both = np.bincount(person)[person] > 1
    swapped = rng.random(int(person.max()) + 1) < 0.5
    new[both] = np.where(swapped[person[both]], 1 - group[both], group[both])
    new[~both] = rng.permutation(group[~both])
    return new


Place = tuple[str, int]  # a picture, and which of its trials


def _same_picture(
    seen: Mapping[str, list[tuple[int, Scanpath]]], nodes: Sequence[_Node], most: int, rng: np.random.Generator
) -> tuple[list[tuple[Place, Place]], int]:
    """Ordered pairs of two people on one picture: of both groups, all if they are at most `most`; of one, likewise."""
    chosen: list[tuple[Place, Place]] = []
    possible = 0
    kinds: dict[bool, dict[str, NDArray]] = {True: {}, False: {}}
    for name, trials in seen.items():
        node = np.array([i for i, _ in trials])
        person, group = (np.array([getattr(nodes[i], f) for i in node]) for f in ("person", "group"))
        two_people = person[:, None] != person
        across = group[:, None] != group
        kinds[True][name] = np.argwhere(two_people & across)
        kinds[False][name] = np.argwhere(two_people & ~across)
        possible += int(two_people.sum())
    for of_kind in kinds.values():
        for name, number in _evenly({name: len(found) for name, found in of_kind.items()}, most).items():
            found = of_kind[name]
            some = found if number >= len(found) else found[np.sort(rng.permutation(len(found))[:number])]
            chosen += [((name, int(i)), (name, int(j))) for i, j in some]
    return chosen, possible


def _evenly(there: Mapping[str, int], most: int) -> dict[str, int]:
    """So many of each, at most as many as there are, that their sum is at most `most`; at least one of each."""
    left, named, given = most, dict(sorted(there.items(), key=lambda pair: pair[1])), {}
    for done, (name, n) in enumerate(named.items()):
        given[name] = min(n, max(1, left // (len(named) - done)))
        left -= given[name]
    return given


def _other_picture(
    seen: Mapping[str, list[tuple[int, Scanpath]]], nodes: Sequence[_Node], most: int, rng: np.random.Generator
) -> list[tuple[Place, Place]]:
    """Pairs of one of the first group and one of the second on two different pictures of one size, drawn by chance."""
    sides: list[dict[tuple[int, int], list[Place]]] = [{}, {}]
    for name, trials in seen.items():
        for at, (node, path) in enumerate(trials):
            sides[nodes[node].group].setdefault(path.size, []).append((name, at))
    drawn: set[tuple[Place, Place]] = set()
    sizes = [size for size in sides[0] if size in sides[1] and len({n for n, _ in sides[0][size] + sides[1][size]}) > 1]
    for size in sizes:
        one, two = sides[0][size], sides[1][size]
        number = min(max(1, most // len(sizes)), len(one) * len(two))
        for i, j in zip(rng.integers(0, len(one), number), rng.integers(0, len(two), number)):
            apart = nodes[seen[one[i][0]][one[i][1]][0]].person != nodes[seen[two[j][0]][two[j][1]][0]].person
            if one[i][0] != two[j][0] and apart:
                drawn.add((one[i], two[j]))
    return sorted(drawn)


class _Measure:
    """All metrics of a pair of trials, with what is made once for each trial and each picture."""

    def __init__(
        self, seen: Mapping[str, list[tuple[int, Scanpath]]], chosen: Sequence[str], sigma: float | None
    ) -> None:
        self.seen, self.chosen, self.wide = seen, chosen, sigma
        self.maps: dict[Place, Floats | None] = {}
        self.centres: dict[str, Floats] = {}
        self.base: dict[str, Floats | None] = {}
        self.counts: dict[tuple[int, int], dict[str, Floats]] = {}

    def sigma(self, name: str) -> float:
        """In pixels of the screen."""
        return self.wide if self.wide is not None else self.seen[name][0][1].size[0] * WIDE

    def __call__(self, one: Place, two: Place) -> Floats:
        first, second = self.seen[one[0]][one[1]][1], self.seen[two[0]][two[1]][1]
        found = dict.fromkeys(self.chosen, np.nan)
        if "string_edit" in found:
            found["string_edit"] = string_edit(first, second)
        if "scanmatch" in found:
            found["scanmatch"] = scanmatch(first, second)
        if "sequence_score" in found:
            found["sequence_score"] = sequence_score(first, second, centres=self._clusters(two[0]))
        if any(name.startswith("multimatch") for name in found):
            for name, value in multimatch(first, second)._asdict().items():
                if f"multimatch_{name}" in found:
                    found[f"multimatch_{name}"] = value
        if any(name in found for name in MAPS):
            found |= {n: v for n, v in self._of_maps(one, two, second).items() if n in found}
        return np.array(list(found.values()), np.float64)

    def _of_maps(self, one: Place, two: Place, path: Scanpath) -> dict[str, float]:
        predicted, human = self._map(one), self._map(two)
        if predicted is None or human is None:  # none of its fixations lies on the screen
            return {}
        found = {
            "nss": nss(predicted, path),
            "auc_judd": auc_judd(predicted, path),
            "cc": cc(predicted, human),
            "kl": kl(predicted, human),
        }
        base = self._others(two[0])
        if base is not None and "information_gain" in self.chosen:
            found["information_gain"] = information_gain(predicted, path, baseline=base)
        return found

    def _map(self, place: Place) -> Floats | None:
        if place not in self.maps:
            path = self.seen[place[0]][place[1]][1]
            self.maps[place] = smooth_map([path], self.sigma(place[0]))
        return self.maps[place]

    def _clusters(self, name: str) -> Floats:
        if name not in self.centres:
            self.centres[name] = clusters(
                [path for _, path in self.seen[name]], bandwidth=2 * self.sigma(name), binned=True
            )
        return self.centres[name]

    def _others(self, name: str) -> Floats | None:
        """Where people look on other pictures of the same size: the centre, mostly."""
        if name not in self.base:
            size = self.seen[name][0][1].size
            if size not in self.counts:
                of_size = {n: [p for _, p in of] for n, of in self.seen.items() if of[0][1].size == size}
                self.counts[size] = {n: counts for n, of in of_size.items() if (counts := _counts(of)) is not None}
            others = [counts for n, counts in self.counts[size].items() if n != name]
            self.base[name] = _smooth(np.sum(others, axis=0), self.sigma(name) * ROWS / size[1]) if others else None
        return self.base[name]


def smooth_map(paths: Sequence[Scanpath], sigma: float) -> Floats | None:
    """`fixation_map` with a little of an even one; sigma in pixels of the screen; None where no fixation is on it."""
    counts = _counts(paths)
    return None if counts is None else _smooth(counts, sigma * ROWS / paths[0].size[1])


def _counts(paths: Sequence[Scanpath]) -> Floats | None:
    inside = [path for path in paths if on_screen(path).any()]
    if not inside:
        return None
    width, height = inside[0].size
    shape = (ROWS, max(1, round(ROWS * width / height)))
    return fixation_map(inside, shape, sigma=0) * sum(int(on_screen(path).sum()) for path in inside)


def _smooth(counts: Floats, sigma: float) -> Floats:
    with needs("smoothing", "claims"):
        from scipy.ndimage import gaussian_filter
    found = density(gaussian_filter(counts, sigma, mode="constant"))
    return (1 - EVEN) * found + EVEN / found.size


def on_screen(path: Scanpath) -> NDArray[np.bool_]:
    """[fixation]"""
    return np.all((path.places >= 0) & (path.places < path.size), axis=1)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + ", ..." * (len(names) > 3)
