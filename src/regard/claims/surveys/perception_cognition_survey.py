"""Claim of From Perception to Cognition, a survey of vision-language reasoning (arXiv:2509.25373).

The survey orders work on multimodal models in two layers, and reasoning rests on perception: what was not perceived
cannot be reasoned over. Here, first, every paper of the catalog on vision and language carries the tag of a layer;
papers were placed by their abstracts, since the survey's own lists were not at hand. Second, the zoo's describer on
scenes of which 40% is veiled, with the biases of its training turned round, so that it errs in quantity: of each scene
a kind of thing that is there is counted (several glances put together), and whether it is there and which colour it has
are asked (perception). How much more often is the count wrong where an answer on the counted things is wrong?

Controls: the same with answers on another kind of thing in the scene, since some scenes are harder in everything. And,
since a veil on one side hides one thing or the other, so that errors on both come apart, the same of both among scenes
matched by how much of the counted things is veiled, with the risk ratio of Mantel and Haenszel. That a false perception
makes the count false is not tested: the model never learned to take the right one from text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import catalog, zoo
from ...catalog import Finding, Premise
from ...data.scenes import SHAPES, Question, Scene, questions, render
from ...zoo.recipes import describer
from ...zoo.recipes.viewer import SIZE

LAYERS = ("perception-layer", "cognition-layer")
SCENES, VEIL, DRAWS, FEWEST = 600, 0.4, 2000, 60
VEILED = (0.01, 0.5, 0.99)  # between strata of the veiled share
Bools = NDArray[np.bool_]
EXPECTED = (
    "every vision-language paper here carries a layer; counts are wrong at least twice as often where an answer on the "
    "counted things is wrong, the 95% interval over scenes above 1.3, and above 1 among scenes matched by what is "
    "veiled; with answers on other things in the scene the ratio is lower by a third, and the interval of the two "
    "ratios' quotient below 1, also among matched scenes"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Papers have a layer, and counts fail where perception failed."""
    papers = [row for row in catalog.tagged("vision-language") if "survey" not in row.tags]
    without = [row.key for row in papers if not set(row.tags) & set(LAYERS)]
    layered = ", ".join(f"{sum(layer in row.tags for row in papers)} {layer}" for layer in LAYERS)

    counted, own, other, hidden = _asked(seed)
    stratum = np.searchsorted(VEILED, hidden)
    ratios: dict[str, Callable[[NDArray[np.int64]], float]] = {
        "counted": lambda at: risk_ratio(counted[at], own[at]),
        "other": lambda at: risk_ratio(counted[at], other[at]),
        "matched": lambda at: risk_ratio(counted[at], own[at], stratum[at]),
        "other matched": lambda at: risk_ratio(counted[at], other[at], stratum[at]),
        "other to counted": lambda at: risk_ratio(counted[at], other[at]) / risk_ratio(counted[at], own[at]),
        "matched other to counted": lambda at: (
            risk_ratio(counted[at], other[at], stratum[at]) / risk_ratio(counted[at], own[at], stratum[at])
        ),
    }
    every, rng = np.arange(len(counted)), np.random.default_rng(seed)
    drawn = [rng.integers(len(every), size=len(every)) for _ in range(DRAWS)]
    found = {
        name: (of(every), *np.nanquantile([of(at) for at in drawn], (0.025, 0.975))) for name, of in ratios.items()
    }
    holds = (
        not without
        and found["counted"][0] >= 2
        and found["counted"][1] > 1.3
        and found["matched"][1] > 1
        and found["other to counted"][0] <= 2 / 3
        and found["other to counted"][2] < 1
        and found["matched other to counted"][2] < 1
    )
    said = ", ".join(f"{name} {value:.2f} ({low:.2f} to {high:.2f})" for name, (value, low, high) in found.items())
    measured = (
        f"of {len(papers)} papers {layered}; {f'without: {chr(44).join(without)}' if without else 'none without'}. "
        f"Counts wrong in {counted[own].mean():.0%} where an answer on the counted things is wrong, "
        f"{counted[~own].mean():.0%} where none is ({len(counted)} scenes); risk ratios: {said}"
    )
    premises = [
        Premise(f"wrong {what}", f"{FEWEST} or more", f"{wrong.sum()} of {len(wrong)}", wrong.sum() >= FEWEST)
        for what, wrong in (("counts", counted), ("answers on what is counted", own), ("answers on others", other))
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        shown = [found[name] for name in ("counted", "matched", "other", "other matched")]
        value, low, high = np.array(shown).T
        axes.errorbar(range(4), value, [value - low, high - value], fmt="o", capsize=5)
        axes.axhline(1, color="0.6", lw=1)
        axes.set_xticks(
            range(4), ["the counted things", "the same,\nmatched by veil", "other things", "the same,\nmatched by veil"]
        )
        axes.set(title="How much more often counts are wrong\nwhere perception is, of", ylabel="risk ratio")

    return Finding(holds, measured, EXPECTED, seed, premises=premises, draw=draw)


def risk_ratio(wrong: Bools, exposed: Bools, stratum: NDArray[np.integer] | None = None) -> float:
    """How many times as often `wrong` where `exposed` as where not; Mantel and Haenszel's over strata. [case] each.

    NaN where nothing is wrong without exposure.

    >>> import numpy as np
    >>> risk_ratio(np.array([True, True, True, False]), np.array([True, True, False, False]))
    2.0
    """
    above = below = 0.0
    for one in np.unique(stratum) if stratum is not None else (None,):
        here = np.ones(len(wrong), bool) if one is None else stratum == one
        n, with_it = here.sum(), (here & exposed).sum()
        above += (here & exposed & wrong).sum() * (n - with_it) / n
        below += (here & ~exposed & wrong).sum() * with_it / n
    return float(above / below) if below else float("nan")


def _asked(seed: int) -> tuple[Bools, Bools, Bools, NDArray[np.float64]]:
    """Of each scene with two kinds of things: whether the count of one, an answer on it, or one on the other is wrong.

    And which share of what is counted is veiled.
    """
    every = describer.tempting(SCENES, countered=True, seed=seed)
    scenes = [scene for scene in every if len({o.shape for o in scene.objects}) > 1]
    images, clear = (describer.pictures(scenes, veil=veil, seed=seed) for veil in (VEIL, 0.0))
    model, processor = zoo.load("describer")
    chance = np.random.default_rng(seed)
    kinds = [chance.choice(sorted({o.shape for o in scene.objects}), 2, replace=False).tolist() for scene in scenes]
    asked: list[tuple[int, str, Question]] = []
    for i, (scene, (one, two)) in enumerate(zip(scenes, kinds)):
        asked += [(i, "count", _of(scene, "count", one))]
        asked += [(i, what, q) for what, kind in (("own", one), ("other", two)) for q in _perceived(scene, kind)]
    said = describer.reply(model, processor, [images[i] for i, *_ in asked], [q.text for *_, q in asked], length=1)
    wrong = {what: np.zeros(len(scenes), bool) for what in ("count", "own", "other")}
    for (i, what, question), answer in zip(asked, said):
        wrong[what][i] |= answer.split()[:1] != [question.answer]
    drawn = render(scenes, SIZE)
    hidden = []
    for i, (one, _) in enumerate(kinds):
        covered = drawn.masks(i)[scenes[i].find(one)].any(0)
        changed = (np.asarray(images[i]) != np.asarray(clear[i])).any(-1)
        hidden.append(changed[covered].mean() if covered.any() else 1.0)
    return wrong["count"], wrong["own"], wrong["other"], np.array(hidden)


def _perceived(scene: Scene, shape: str) -> list[Question]:
    """Whether it is there, and where there is one, its colour."""
    colours = [q for q in questions(scene, "colour") if scene.objects[q.about[0]].shape == shape]
    return [_of(scene, "presence", shape), *colours]


def _of(scene: Scene, kind: str, shape: str) -> Question:
    return questions(scene, kind)[SHAPES.index(shape)]
