"""Is a model scored on every dimension, and are confounds found that are known to be there?

On answerers whose skill is known by construction: one that is always right, one that guesses, one that is right but
says of three in ten blue things that they are faster, whatever is shown, and one that perceives and guesses what comes
next. Then the bundled describer, on what one picture shows it: its card says how often it is right on colours, counts
and relations, on scenes of its training; here the scenes are others. Its bias is planted: nine times in ten there was a
plate where a fork was, and half of the pictures were veiled in part. Whether there is a plate is asked with and without
a fork, under a veil of 40%; of a pair without bias, whether there is a square, with and without a circle.

Tried on seed 100 with few items: the describer, which was asked mostly of one or none while it learned, does not count
to four, so that counts are reported, and only colours and relations have to agree with its card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from ... import zoo
from ...catalog import Finding, Premise
from ...data.scenes import questions, sample
from ...evaluation.wm_abench import DIMENSIONS, PREDICTION, Answer, Entanglement, Item, entanglement, items, wm_abench
from ...zoo.recipes import describer
from ...zoo.recipes.viewer import HELD_OUT

EXPECTED = (
    "an answerer that is right is 100% right in all tasks; intervals of five that guess hold chance in 90% of cases; a "
    "planted confound has z of 4 or more and the largest of all pairs of task and nuisance, of one that is right no z "
    "is above 3; perception and prediction are 30 points apart where prediction is guessed; of the describer, colour "
    "and relation are within 6 points of its card, or two standard errors, and relation not above chance; a plate is "
    "seen more with a fork, z of 4 or more, and a square no more with a circle, z below 3"
)
N, OF_SPEED, ASKED, FORKS, GUESSERS = 120, 640, 160, 300, 5
LIE = 0.3
_NUMBER = {task: i for i, task in enumerate(task for some in DIMENSIONS.values() for task in some)}
CARD = {"colour": 0.8275, "count": 0.9533, "relation": 0.469}  # of the describer
BIASED, PLAIN = ("fork", "plate"), ("circle", "square")


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Synthetic answerers on all tasks, the describer on four."""
    answerers = {
        "right": lambda asked: [item.answer for item in asked],
        "believes blue fast": partial(_blue, seed=seed),
        "perceives": partial(_perceives, seed=seed),
    }
    found = {name: wm_abench(answer, n=N, seed=seed) for name, answer in answerers.items()}
    right, blue, perceives = found.values()
    guessed = [wm_abench(partial(_guess, seed=seed + i), n=N, seed=seed + i) for i in range(GUESSERS)]
    held = float(np.mean([_holds_chance(one) for one in guessed]))
    by_chance = max(float(one["z"].max()) for one in guessed)
    speed = wm_abench(answerers["believes blue fast"], tasks=["faster"], n=OF_SPEED, seed=seed)
    planted = float(speed["z"].sel(nuisance="colour")[0])
    others = blue["z"].where((blue["task"] != "faster") | (blue["nuisance"] != "colour"))
    most = max(float(others.max()), float(speed["z"].where(speed["nuisance"] != "colour").max()))
    stage = perceives.groupby("stage").mean()["accuracy"]
    gap = float(stage.sel(stage="perception") - stage.sel(stage="prediction"))
    works = (
        bool((right["accuracy"] == 1).all())
        and held >= 0.9
        and planted >= 4
        and planted > most
        and float(right["z"].max()) <= 3
        and gap >= 0.3
    )

    model, processor = zoo.load("describer")
    says = partial(_says, model, processor)
    own = wm_abench(says, tasks=list(CARD), n=ASKED, seed=seed)
    accuracy = {task: float(own["accuracy"].sel(task=task)) for task in CARD}
    low = float(own["interval"].sel(task="relation", end="low"))
    bias = {pair: _pull(says, *pair, seed) for pair in (BIASED, PLAIN)}
    error = {task: (CARD[task] * (1 - CARD[task]) / ASKED) ** 0.5 for task in CARD}
    near = {task: abs(accuracy[task] - CARD[task]) <= max(0.06, 2 * error[task]) for task in CARD}
    agrees = near["colour"] and near["relation"] and low <= 0.5
    pulled = bias[BIASED][0].z >= 4 and bias[PLAIN][0].z < 3

    asked = ", ".join(f"{task} {accuracy[task]:.1%} (card {CARD[task]:.1%} ± {error[task]:.1%})" for task in CARD)
    measured = (
        f"right: {float(right['accuracy'].min()):.0%} at least, z {float(right['z'].max()):.1f} at most; guessing: "
        f"chance is in {held:.0%} of intervals, z {by_chance:.1f} at most; blue believed fast: z {planted:.1f}, of "
        f"other pairs {most:.1f} at most; perceives: {100 * gap:.0f} points between the stages; the describer: "
        f"{asked}, relation from {low:.1%}, unread {float(own['unread'].max()):.0%} at most; a plate with a fork: "
        f"effect {bias[BIASED][0].effect:.2f}, z {bias[BIASED][0].z:.1f}; a square with a circle: effect "
        f"{bias[PLAIN][0].effect:.2f}, z {bias[PLAIN][0].z:.1f}"
    )
    cell = min(count for _, count in bias.values())
    blues = sum(item.attributes["colour"] == "blue" for item in items("faster", OF_SPEED, seed=seed))
    least = min(blues, cell)
    premises = [Premise("items in a cell of an entanglement that is judged", "60", str(least), least >= 60)]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        tasks = right["task"].values
        for name, of in {**found, "guesses": guessed[0]}.items():
            axes.plot(of["accuracy"].values, range(len(tasks)), "o", label=name)
        axes.plot(right["chance"].values, range(len(tasks)), "k|", label="chance")
        axes.set(yticks=range(len(tasks)), yticklabels=tasks, xlabel="accuracy", xlim=(0, 1.02))
        axes.legend(fontsize=8)

    return Finding(works and agrees and pulled, measured, EXPECTED, seed, premises=premises, draw=draw)


def _holds_chance(found: xr.Dataset) -> list[bool]:
    low, high = (found["interval"].sel(end=end) for end in ("low", "high"))
    return ((low <= found["chance"]) & (found["chance"] <= high)).values.tolist()


def _guess(asked: Sequence[Item], seed: int) -> list[Answer]:
    rng = np.random.default_rng((seed, 7, _NUMBER[asked[0].task]))
    return [int(rng.integers(len(item.options))) for item in asked]


def _blue(asked: Sequence[Item], seed: int) -> list[Answer]:
    rng = np.random.default_rng((seed, 8))
    lies = rng.random(len(asked)) < LIE
    return [
        "yes" if lie and item.task == "faster" and item.attributes["colour"] == "blue" else item.answer
        for item, lie in zip(asked, lies)
    ]


def _perceives(asked: Sequence[Item], seed: int) -> list[Answer]:
    predicts = any(asked[0].task in DIMENSIONS[name] for name in PREDICTION)
    return _guess(asked, seed) if predicts else [item.answer for item in asked]


def _says(model: Any, processor: Any, asked: Sequence[Item], veil: float = 0.0) -> list[Answer]:
    """What the describer answers to questions on one picture."""
    images = describer.pictures([item.frames[0] for item in asked], veil=veil)
    return list(describer.reply(model, processor, images, [item.question for item in asked], length=1))


def _pull(says: Any, cue: str, shape: str, seed: int) -> tuple[Entanglement, int]:
    """How far seeing the one shape moves whether the other is there; and how many items are in the smaller cell."""
    wanted, asked = {(a, b): FORKS // 4 for a in (False, True) for b in (False, True)}, []
    dials = replace(describer.MIXTURE[0], together=None)
    for i in range(10**5):
        scene = sample(dials, HELD_OUT + seed, i)
        there = bool(scene.find(cue)), bool(scene.find(shape))
        if wanted[there]:
            wanted[there] -= 1
            question = next(q for q in questions(scene, "presence") if q.text.split()[-1] == f"{shape}?")
            options = ("yes", "no")
            seen = {"cue": "there" if there[0] else "absent"}
            asked.append(Item("presence", (scene,), question.text, options, options.index(question.answer), (), seen))
        if not any(wanted.values()):
            break
    cells = [sum(item.attributes["cue"] == value for item in asked) for value in ("there", "absent")]
    return entanglement(asked, says(asked, veil=describer.VEIL), "cue"), min(cells)
