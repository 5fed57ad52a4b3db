"""Does what the eye did before tell where it goes next, and for how long, in search and in reading?

Real gaze: search in 134 interiors (Bujia et al., 2022), and reading of English texts before a webcam (Ribeiro et al.,
2023). Pictures are not at hand: of an interior the target's box is known, of a page the box of its text. Networks learn
from some people on some pictures, and are scored on other people on other pictures. Two baselines know places only: a
density of all fixations, and the same network without durations in its history; both give every fixation a duration
from one distribution. Fixations outside the screen, or of no duration, are left out, and paths are cut. The network
without durations differs from the whole one by these alone: ScanMatch, whose letters are of 50 ms, hardly sees what
they add, so that there it is compared with the density. One design was tried before, which asked for that too.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...catalog import Finding, Premise
from ...data import loaders
from ...data.loaders import Scanpath
from ...gaze.scanmatch import scanmatch
from ...gaze.tpp_gaze import TPPGaze, TPPGazeConfig, tensors
from .._data import folder
from .._measure import mean

SCALES = "small", "large"
LONGEST = 20  # fixations of a path
HIDDEN, DROPOUT, BATCH, RATE = 64, 0.1, 64, 2e-3
STEPS = {"small": 400, "large": 4000}
BIN = 50.0  # ms, of ScanMatch
DRAWN, PEOPLE = 8, 8  # paths drawn for a picture, and compared with as many people's
WAYS = ("TPP-Gaze", "places alone", "density")

EXPECTED = (
    "in both sets, on people and pictures not learned from, the log-likelihood of a fixation is higher than under the "
    "same network of places alone and under a density, that of its duration alone is higher than under the network of "
    "places, and paths drawn are more alike to people's, by ScanMatch with durations, than those drawn from the "
    "density: by two standard errors over pictures, each"
)


class Looked(NamedTuple):
    """One person on one picture."""

    person: str
    picture: str
    path: Scanpath
    scene: NDArray[np.float32]  # left, top, right, bottom of what is known, from -1 to 1


@dataclass(frozen=True, eq=False)
class Scores:
    """Of each way, a number a picture: nats a fixation, and ScanMatch."""

    likelihood: dict[str, NDArray]
    durations: dict[str, NDArray]  # nats a fixation, of the duration alone
    likeness: dict[str, NDArray]
    people: NDArray  # ScanMatch with each other
    parts: dict[str, tuple[float, float]]  # mean log-likelihood of place and of duration


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """A point process of places and durations is likelier than models of places alone."""
    found = {}
    for name, read in (("search", _search), ("reading", _reading)):
        found[name] = _scores(*_split(read(), np.random.default_rng(seed)), STEPS[scale], seed)
    gains = {
        f"{name}, {what}": mean(of_way["TPP-Gaze"] - of_way[other])
        for name, scores in found.items()
        for what, of_way, other in (
            ("likelihood beside places alone", scores.likelihood, "places alone"),
            ("beside the density", scores.likelihood, "density"),
            ("of durations", scores.durations, "places alone"),
            ("ScanMatch beside the density", scores.likeness, "density"),
        )
    }
    holds = all(gain.above() for gain in gains.values())
    alike = {name: mean(scores.people - scores.likeness["density"]) for name, scores in found.items()}
    premises = [
        Premise(
            f"people are alike, in {name}",
            "more, by ScanMatch with each other, than to the density, by two standard errors",
            f"{gain:.3f}",
            gain.above(),
        )
        for name, gain in alike.items()
    ]
    figures = ". ".join(
        f"{name} ({len(scores.people)} pictures): "
        + ", ".join(
            f"{way} {scores.likelihood[way].mean():.2f} nats (place {scores.parts[way][0]:.2f}, duration "
            f"{scores.parts[way][1]:.2f}), ScanMatch {scores.likeness[way].mean():.3f}"
            for way in WAYS
        )
        + f"; people {scores.people.mean():.3f}"
        for name, scores in found.items()
    )
    more = "; ".join(f"{name} {gain:+.3f}" for name, gain in gains.items())
    measured = f"{figures}. Gains: {more}"
    return Finding(holds, measured, EXPECTED, seed, premises=premises, draw=partial(_draw, found))


def _search() -> list[Looked]:
    found = []
    for trial in loaders.visual_search(folder("gaze_search_interiors")):
        if trial.durations is not None and (path := _seen(trial.scanpath)) is not None:
            box = 2 * trial.target_box.reshape(2, 2) / trial.size - 1
            found.append(Looked(trial.subject, trial.image, path, box.ravel().astype(np.float32)))
    return found


def _reading() -> list[Looked]:
    found = []
    for reading in loaders.webqamgaze(folder("gaze_reading_webqamgaze")):
        path = _seen(reading.scanpath)
        if reading.task == "reading" and path is not None and np.isfinite(reading.boxes).any():
            low, high = np.nanmin(reading.boxes[:, :2], 0), np.nanmax(reading.boxes[:, 2:], 0)
            box = 2 * np.stack([low, high]) / path.size - 1
            found.append(Looked(reading.participant, reading.text_id, path, box.ravel().astype(np.float32)))
    return found


def _seen(path: Scanpath) -> Scanpath | None:
    """The first fixations on the screen that last; None where there are fewer than three."""
    assert path.durations is not None
    kept = ((path.places >= 0) & (path.places <= path.size)).all(1) & (path.durations > 0)
    places, durations = path.places[kept][:LONGEST], path.durations[kept][:LONGEST]
    return Scanpath(places, path.size, durations) if len(places) > 2 else None


def _split(looked: list[Looked], rng: np.random.Generator) -> tuple[list[Looked], list[Looked]]:
    """Those of both other people and other pictures: a fifth of the pictures, a third of the people."""
    pictures = rng.permutation(sorted({one.picture for one in looked}))
    people = rng.permutation(sorted({one.person for one in looked}))
    new_pictures, new_people = set(pictures[: len(pictures) // 5]), set(people[: len(people) // 3])
    train = [one for one in looked if one.picture not in new_pictures and one.person not in new_people]
    test = [one for one in looked if one.picture in new_pictures and one.person in new_people]
    return train, test


def _scores(train: list[Looked], test: list[Looked], steps: int, seed: int) -> Scores:
    density = _Density([one.path for one in train], seed)
    models = {"TPP-Gaze": _trained(train, True, steps, seed), "places alone": _trained(train, False, steps, seed)}
    of_picture: dict[str, list[Looked]] = defaultdict(list)
    for one in test:
        of_picture[one.picture].append(one)
    pictures = [ones for ones in of_picture.values() if len(ones) > 1]
    likelihood: dict[str, list] = defaultdict(list)
    likeness: dict[str, list[float]] = defaultdict(list)
    people = []
    for number, ones in enumerate(pictures):
        paths = [one.path for one in ones]
        places, durations, mask = tensors(paths)
        scene = torch.from_numpy(np.stack([one.scene for one in ones]))
        seconds = float(np.mean([path.durations.sum() for path in paths])) / 1000  # type: ignore[union-attr]
        drawn = {"density": density.sample(seconds)}
        with torch.no_grad():
            for way, model in models.items():
                parts = model.log_likelihood(places, durations, scene)
                likelihood[way].append([float(part[mask].mean()) for part in parts])
                drawn[way] = model.sample(
                    paths[0].size, DRAWN, seconds=seconds, scene=scene[0], longest=LONGEST, seed=seed + number
                )
        likelihood["density"].append(density.log_likelihood(places[mask], durations[mask]))
        for way, made in drawn.items():
            likeness[way].append(np.mean([scanmatch(a, b, bin=BIN) for a in made for b in paths[:PEOPLE] if _lasts(a)]))
        pairs = [(a, b) for i, a in enumerate(paths[:PEOPLE]) for b in paths[:i]]
        people.append(np.mean([scanmatch(a, b, bin=BIN) for a, b in pairs]))
    both = {way: np.array(values) for way, values in likelihood.items()}
    return Scores(
        {way: values.sum(1) for way, values in both.items()},
        {way: values[:, 1] for way, values in both.items()},
        {way: np.array(values) for way, values in likeness.items()},
        np.array(people),
        {way: (values[:, 0].mean(), values[:, 1].mean()) for way, values in both.items()},
    )


def _lasts(path: Scanpath) -> bool:
    """Whether any fixation lasts half a bin, so that ScanMatch has a letter."""
    return bool((path.durations >= BIN / 2).any())  # type: ignore[union-attr]


def _trained(train: list[Looked], timed: bool, steps: int, seed: int) -> TPPGaze:
    torch.manual_seed(seed)
    places, durations, mask = tensors([one.path for one in train])
    scene = torch.from_numpy(np.stack([one.scene for one in train]))
    log = durations[mask].log()
    config = TPPGazeConfig(
        scene=4, hidden=HIDDEN, dropout=DROPOUT, log_mean=float(log.mean()), log_std=float(log.std()), timed=timed
    )
    model = TPPGaze(config)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(train), (BATCH,), generator=generator)
        model.loss(places[rows], durations[rows], mask[rows], scene[rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


class _Density:
    """Places and log durations of all fixations, each smoothed by a Gaussian (Scott's rule)."""

    def __init__(self, paths: list[Scanpath], seed: int) -> None:
        from scipy.stats import gaussian_kde

        self.rng, self.size = np.random.default_rng(seed), paths[0].size
        places, durations, mask = tensors(paths)
        some = self.rng.permutation(int(mask.sum()))[:5000]
        self.place = gaussian_kde(places[mask][some].double().numpy().T)
        self.log = gaussian_kde(durations[mask][some].double().log().numpy())

    def log_likelihood(self, places: Tensor, durations: Tensor) -> list[float]:
        log = durations.double().log().numpy()
        return [float(self.place.logpdf(places.double().numpy().T).mean()), float((self.log.logpdf(log) - log).mean())]

    def sample(self, seconds: float) -> list[Scanpath]:
        found = []
        for _ in range(DRAWN):
            durations = np.exp(self.log.resample(LONGEST, self.rng)[0])
            n = max(1, int((durations.cumsum() <= seconds).sum()))
            places = (self.place.resample(n, self.rng).T.clip(-1, 1) + 1) / 2 * self.size
            found.append(Scanpath(places, self.size, 1000 * durations[:n]))
        return found


def _draw(found: dict[str, Scores], figure: Any) -> None:
    axes = figure.subplots(2, 2)
    colours = dict(zip(("people", *WAYS), ("black", "tab:blue", "tab:orange", "tab:green")))
    for column, (name, scores) in zip(axes.T, found.items()):
        rows = (
            ("log-likelihood of a fixation, nats, less density's", scores.likelihood, scores.likelihood["density"]),
            ("ScanMatch with people", {"people": scores.people} | scores.likeness, 0.0),
        )
        for axis, (label, of_way, less) in zip(column, rows):
            shown = [way for way in colours if way in of_way]
            for row, way in enumerate(shown):
                values = of_way[way] - less
                error = 2 * values.std(ddof=1) / len(values) ** 0.5
                axis.errorbar(values.mean(), row, xerr=error, fmt="o", color=colours[way], capsize=4)
            axis.set_yticks(range(len(shown)), shown)
            axis.set_ylim(len(shown) - 0.5, -0.5)
            axis.grid(axis="x", alpha=0.3)
            axis.set_xlabel(label, fontsize=8)
        column[0].set_title(f"{name}: {len(scores.people)} new pictures, new people", fontsize=10)
