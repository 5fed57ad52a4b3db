"""World modelling one skill at a time: what is there now, and what comes next.

Gao et al., Do Vision-Language Models Have Internal World Models? Towards an Atomic Evaluation (arXiv:2506.21876). The
design is theirs: perception and prediction, each in dimensions, each of these in tasks of their own; options that
differ from the right one in what is asked; all else drawn independently, so that it can be measured how far an answer
is moved by what it should not depend on. We had public summaries, not the repository.

Ours: the worlds. In place of six simulators there are the flat scenes of `regard.data.scenes` and films of them, so
that of 23 tasks 16 are had; `NOT_COVERED` names what such scenes cannot hold. The formula of entanglement is ours too.

    >>> from regard.evaluation.wm_abench import entanglement, items, wm_abench
    >>> def blue_is_fast(asked):
    ...     return ["yes" if item.attributes["colour"] == "blue" else "no" for item in asked]
    >>> found = wm_abench(blue_is_fast, tasks=["faster"], n=60)
    >>> float(found["effect"].sel(task="faster", nuisance="colour")) > 0.7
    True
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from PIL import Image

from ..data.scenes import COLOURS, RELATIONS, SHAPES, SIZES, Dials, Scene, film, questions, render, sample
from ..data.scenes.words import NUMBERS

DIMENSIONS = {
    "visual": ("colour", "shape"),
    "spatial": ("relation", "vacancy"),
    "quantitative": ("count", "more", "larger"),
    "temporal": ("before", "longer"),
    "motion": ("moves", "faster", "direction", "path"),
    "mechanics": ("bounce",),
    "transitivity": ("bounces",),
    "composition": ("both",),
}
PREDICTION = ("mechanics", "transitivity", "composition")
NOT_COVERED = ("material", "views from elsewhere", "drop and slide", "navigation", "manipulation", "many agents")
NUISANCES = ("colour", "shape", "size")
FRAMES = 5
APART = 0.08  # widths of the picture, by which places in options differ at least
DRAWS = 200  # permutations of a nuisance
QUARTERS = {"upper left": (0, 0), "upper right": (1, 0), "lower left": (0, 1), "lower right": (1, 1)}
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Answer = int | str | None


@dataclass(frozen=True)
class Item:
    """A question on a film, or on a picture of one frame, with options of which number `answer` is right.

    pictures: what the options show, in their order, where they are pictures. attributes: what is true of the thing that
    is asked about and should not matter.
    """

    task: str
    frames: tuple[Scene, ...]
    question: str
    options: tuple[str, ...]
    answer: int
    pictures: tuple[Scene, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)

    def images(self, size: int = 64) -> list[Image.Image]:
        """Its frames, drawn."""
        drawn = render(self.frames, size)
        return [drawn.image(i) for i in range(len(self.frames))]

    def sheet(self, size: int = 64) -> Image.Image:
        """All frames side by side, and below them the pictures that are options: for models of one picture."""
        rows = [of for of in (self.frames, self.pictures) if of]
        sheet = Image.new("RGB", (size * max(map(len, rows)), size * len(rows)), "white")
        for row, scenes in enumerate(rows):
            drawn = render(scenes, size)
            for column in range(len(scenes)):
                sheet.paste(drawn.image(column), (column * size, row * size))
        return sheet

    def recoloured(self, colour: str) -> Item:
        """The same, where the thing that is asked about has another colour, which nothing is asked about."""
        if not {"colour", "shape"} <= set(self.attributes):
            raise ValueError(f"the task {self.task!r} asks about colour, or names things by it")

        def scenes(of: Sequence[Scene]) -> tuple[Scene, ...]:
            return tuple(_painted(scene, scene.find(self.attributes["shape"]), colour) for scene in of)

        attributes = {**self.attributes, "colour": colour}
        return replace(self, frames=scenes(self.frames), pictures=scenes(self.pictures), attributes=attributes)


def items(task: str, n: int, *, seed: int = 0) -> list[Item]:
    """`n` items of a task. Right options are at each place, and of each kind, as often as any other."""
    if task not in _TASKS:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(_TASKS)}")
    rng = np.random.default_rng((seed, list(_TASKS).index(task)))
    make, kinds = _TASKS[task]
    truths = rng.permutation(np.arange(n) % kinds).tolist()
    made = [make(rng, truth) for truth in truths]
    most = max(1 + len(one.wrong) for one in made) if made else 1
    places = rng.permutation(np.arange(n) % most).tolist()
    return [one.item(task, place, rng) for one, place in zip(made, places)]


def wm_abench(
    answer: Callable[[list[Item]], Sequence[Answer]],
    *,
    tasks: Sequence[str] | None = None,
    n: int = 100,
    seed: int = 0,
) -> xr.Dataset:
    """How often a model is right in each task, beside chance, and what moves its answers that should not. [task]

    answer: gives the number of an option for each item, or a text, in which one option, and no other, has to occur as a
    whole word; or None where a task is not for this model: such tasks are NaN, not 0. tasks: all of `DIMENSIONS`
    unless given. n: items of each.

    `accuracy`, with the 95% `interval` of Wilson [task, end]; `chance`; `unread`, the share of texts that name no
    option, which are wrong; coordinates `dimension` and `stage` (perception, prediction). `effect` and `z` are
    `entanglement` by [task, nuisance], NaN where that is not defined.
    """
    if n < 1:
        raise ValueError(f"n is 1 or more items of each task, got {n}")
    chosen = [task for some in DIMENSIONS.values() for task in some] if tasks is None else list(tasks)
    where = {task: name for name, some in DIMENSIONS.items() for task in some}
    columns: dict[str, list[float]] = {name: [] for name in ("accuracy", "chance", "unread", "low", "high")}
    moved: list[list[Entanglement]] = []
    for task in chosen:
        asked = items(task, n, seed=seed)
        given = list(answer(asked))
        if len(given) != len(asked):
            raise ValueError(f"{len(asked)} items of {task!r} were asked, and {len(given)} answers given")
        fits = any(one is not None for one in given)
        read = [chosen_option(item, one) for item, one in zip(asked, given)]
        right = sum(at == item.answer for item, at in zip(asked, read))
        low, high = wilson(right, len(asked)) if fits else (math.nan, math.nan)
        values = (right / n, sum(at is None for at in read) / n) if fits else (math.nan, math.nan)
        chance = sum(1 / len(item.options) for item in asked) / n
        for name, value in zip(columns, (values[0], chance, values[1], low, high)):
            columns[name].append(value)
        moved.append([entanglement(asked, read, of) if fits else NOTHING for of in NUISANCES])
    stages = ["prediction" if where[task] in PREDICTION else "perception" for task in chosen]
    return xr.Dataset(
        {
            **{name: ("task", columns[name]) for name in ("accuracy", "chance", "unread")},
            "interval": (("task", "end"), np.stack([columns["low"], columns["high"]], 1)),
            "effect": (("task", "nuisance"), np.array([[one.effect for one in row] for row in moved])),
            "z": (("task", "nuisance"), np.array([[one.z for one in row] for row in moved])),
        },
        {
            "task": chosen,
            "dimension": ("task", [where[task] for task in chosen]),
            "stage": ("task", stages),
            "end": ["low", "high"],
            "nuisance": list(NUISANCES),
        },
        attrs={"n": n, "seed": seed, "not_covered": ", ".join(NOT_COVERED)},
    )


class Entanglement(NamedTuple):
    """How far a nuisance moves an answer, 0 to 2, and by how many standard deviations more than by chance."""

    effect: float
    z: float


NOTHING = Entanglement(math.nan, math.nan)


def entanglement(
    items: Sequence[Item], answers: Sequence[Answer], nuisance: str, *, draws: int = DRAWS, seed: int = 0
) -> Entanglement:
    """How far the value of an attribute moves the answers, apart from the truth. NaN where fewer than two values are.

    effect: for each answer and each value of the nuisance, the share of answers less the share of truths; the largest
    difference of any two values, of the answer in which it is largest. 0: not moved; 1: the value decides. Where
    options are pictures, whether the answer is right takes the place of the answer. z: standard deviations above its
    mean where the values are dealt anew at random; correct it for the number of pairs that are looked at.

    >>> asked = items("faster", 40)
    >>> entanglement(asked, [item.answer for item in asked], "colour")
    Entanglement(effect=0.0, z=0.0)
    """
    if len(items) != len(answers):
        raise ValueError(f"there are {len(items)} items and {len(answers)} answers")
    if not items or any(nuisance not in item.attributes for item in items):
        return NOTHING
    values, at = np.unique([item.attributes[nuisance] for item in items], return_inverse=True)
    if len(values) < 2:
        return NOTHING
    read = [chosen_option(item, one) for item, one in zip(items, answers)]
    if all(item.pictures for item in items):
        excess = np.array([[float(one == item.answer)] for item, one in zip(items, read)])
    else:
        said = [None if one is None else item.options[one] for item, one in zip(items, read)]
        true = [item.options[item.answer] for item in items]
        known = sorted({*true, *(one for one in said if one is not None)})
        excess = np.array([[(a == k) - (b == k) for k in known] for a, b in zip(said, true)], float)
    effect = _spread(excess, at, len(values))
    if not np.ptp(excess, axis=0).any():
        return Entanglement(effect, 0.0)
    rng = np.random.default_rng(seed)
    chance = np.array([_spread(excess, rng.permutation(at), len(values)) for _ in range(draws)])
    return Entanglement(effect, float((effect - chance.mean()) / max(chance.std(), 1e-12)))


def _spread(excess: NDArray[np.floating], at: NDArray[np.integer], n: int) -> float:
    sums = np.zeros((n, excess.shape[1]))
    np.add.at(sums, at, excess)
    means = sums / np.bincount(at, minlength=n)[:, None]
    return float(np.ptp(means, axis=0).max())


def chosen_option(item: Item, answer: Answer) -> int | None:
    """The number of the option that an answer names; None where it names none, or several."""
    if answer is None:
        return None
    if isinstance(answer, str):
        said = answer.lower()
        named = [i for i, o in enumerate(item.options) if re.search(rf"(?<!\w){re.escape(o.lower())}(?!\w)", said)]
        return named[0] if len(named) == 1 else None
    if not 0 <= answer < len(item.options):
        raise ValueError(f"option {answer} of {item.task!r}: there are {len(item.options)}, from 0 on")
    return int(answer)


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share, by Wilson.

    >>> [round(end, 2) for end in wilson(8, 10)]
    [0.49, 0.94]
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"{right} of {n} is no share")
    share, over = right / n, z * z / n
    middle = (share + over / 2) / (1 + over)
    half = z * math.sqrt(share * (1 - share) / n + over / (4 * n)) / (1 + over)
    return max(0.0, middle - half), min(1.0, middle + half)


# --- worlds -----------------------------------------------------------------------------------------------------------


class _Made(NamedTuple):
    """An item before its options are put in order; options are words, or pictures."""

    frames: Sequence[Scene]
    question: str
    right: Any
    wrong: Sequence[Any]
    attributes: Mapping[str, str]

    def item(self, task: str, place: int, rng: np.random.Generator) -> Item:
        wrong = [self.wrong[i] for i in rng.permutation(len(self.wrong))]
        place %= len(wrong) + 1
        options = [*wrong[:place], self.right, *wrong[place:]]
        seen = isinstance(self.right, Scene)
        words = [f"picture {i + 1}" for i in range(len(options))] if seen else options
        shown = tuple(options) if seen else ()
        return Item(task, tuple(self.frames), self.question, tuple(words), place, shown, dict(self.attributes))


def _scene(rng: np.random.Generator, objects: int, *, scale: float = 1.0, colours: bool = False) -> Scene:
    """Objects of different shapes, and, where asked for, of different colours, somewhere."""
    drawn = sample(Dials(objects=(objects, objects), scale=scale), int(rng.integers(2**62)), 0)
    shapes = rng.permutation(SHAPES)[:objects].tolist()
    paint = rng.permutation(list(COLOURS))[:objects].tolist() if colours else [o.colour for o in drawn.objects]
    for i, (shape, colour) in enumerate(zip(shapes, paint)):
        drawn = drawn.but(i, shape=shape, colour=colour)
    return drawn


def _of(scene: Scene, *without: str) -> dict[str, str]:
    """Attributes of the first object, which is the one that is asked about."""
    one = scene.objects[0]
    return {name: getattr(one, name) for name in NUISANCES if name not in without}


def _painted(scene: Scene, which: Sequence[int], colour: str) -> Scene:
    for i in which:
        scene = scene.but(i, colour=colour)
    return scene


def _yes(frames: Sequence[Scene], question: str, truth: int, attributes: Mapping[str, str]) -> _Made:
    answers = ("yes", "no") if truth else ("no", "yes")
    return _Made(frames, question, answers[0], answers[1:], attributes)


def _some(choices: Sequence[str], n: int, rng: np.random.Generator) -> list[str]:
    return [choices[i] for i in rng.permutation(len(choices))[:n].tolist()]


def _colour(rng: np.random.Generator, truth: int) -> _Made:
    colour = list(COLOURS)[truth]
    scene = _scene(rng, 3, colours=True)
    scene = _painted(scene, scene.find(colour=colour), scene.objects[0].colour).but(0, colour=colour)
    near = list(dict.fromkeys(o.colour for o in scene.objects[1:]))
    far = _some([c for c in COLOURS if c != colour and c not in near], 3 - len(near), rng)
    question = next(q for q in questions(scene, "colour") if q.about == (0,))
    return _Made([scene], question.text, colour, [*near, *far], _of(scene, "colour"))


def _shape(rng: np.random.Generator, truth: int) -> _Made:
    shape = SHAPES[truth]
    scene = _scene(rng, 3, colours=True)
    if there := scene.find(shape):
        scene = scene.but(there[0], shape=scene.objects[0].shape)
    scene = scene.but(0, shape=shape)
    near = [o.shape for o in scene.objects[1:]]
    far = _some([s for s in SHAPES if s != shape and s not in near], 1, rng)
    return _Made([scene], f"which shape is {scene.objects[0].colour}?", shape, [*near, *far], _of(scene, "shape"))


def _relation(rng: np.random.Generator, truth: int) -> _Made:
    while True:
        scene, relation = _scene(rng, 2), RELATIONS[int(rng.integers(len(RELATIONS)))]
        holds = scene.related(0, relation, 1)
        if holds is not None:
            relation = relation if holds == truth else OPPOSITE[relation]
            a, b = scene.objects
            return _yes([scene], f"is the {a.shape} {relation} the {b.shape}?", truth, _of(scene))


def _vacancy(rng: np.random.Generator, truth: int) -> _Made:
    scene, names = _scene(rng, 3, scale=0.6), list(QUARTERS)
    taken = [name for i, name in enumerate(names) if i != truth]
    for i, name in enumerate(_some(taken, 3, rng)):
        x, y = (0.25 + 0.5 * at + rng.uniform(-0.09, 0.09) for at in QUARTERS[name])
        scene = scene.but(i, x=x, y=y)
    return _Made([scene], "which quarter of the picture is empty?", names[truth], taken, _of(scene))


def _counted(rng: np.random.Generator, n: int, others: int) -> Scene:
    """So many of a shape, and so many of another."""
    drawn = sample(Dials(objects=(n + others, n + others), scale=0.7), int(rng.integers(2**62)), 0)
    one, other = rng.permutation(SHAPES)[:2].tolist()
    colour = drawn.objects[0].colour
    for i in range(n + others):
        drawn = drawn.but(i, shape=one, colour=colour) if i < n else drawn.but(i, shape=other)
    return drawn


def _plural(shape: str) -> str:
    """As questions on scenes call it."""
    return questions(Scene(), "count")[SHAPES.index(shape)].text.split()[2]


def _count(rng: np.random.Generator, truth: int) -> _Made:
    n = truth + 1
    scene = _counted(rng, n, int(rng.integers(0, 5 - n)))
    near = [NUMBERS[i] for i in range(1, 5) if i != n]
    asked = f"how many {_plural(scene.objects[0].shape)} are there?"
    return _Made([scene], asked, NUMBERS[n], near, _of(scene, "size"))


def _more(rng: np.random.Generator, truth: int) -> _Made:
    few, many = ((1, 2), (1, 3), (2, 3))[int(rng.integers(3))]
    scene = _counted(rng, *((many, few) if truth else (few, many)))
    one, other = scene.objects[0].shape, scene.objects[-1].shape
    return _yes([scene], f"are there more {_plural(one)} than {_plural(other)}?", truth, _of(scene, "size"))


def _larger(rng: np.random.Generator, truth: int) -> _Made:
    names = list(SIZES)
    small, large = ((0, 1), (0, 2), (1, 2))[int(rng.integers(3))]
    scene, sizes = _scene(rng, 2, scale=0.8), (names[large], names[small]) if truth else (names[small], names[large])
    scene = scene.but(0, size=sizes[0], x=0.27).but(1, size=sizes[1], x=0.73)
    if rng.random() < 0.5:
        scene = scene.but(0, x=0.73).but(1, x=0.27)
    scene = scene.but(0, y=rng.uniform(0.25, 0.75)).but(1, y=rng.uniform(0.25, 0.75))
    a, b = scene.objects
    return _yes([scene], f"is the {a.shape} larger than the {b.shape}?", truth, _of(scene, "size"))


def _shown(scene: Scene, first: range, second: range) -> list[Scene]:
    """A film in which both objects are there in these frames alone."""
    return [
        replace(scene, objects=tuple(o for o, of in zip(scene.objects, (first, second)) if t in of))
        for t in range(FRAMES)
    ]


def _before(rng: np.random.Generator, truth: int) -> _Made:
    scene, (early, late) = _scene(rng, 2, scale=0.7), sorted(rng.permutation(FRAMES)[:2].tolist())
    starts = (early, late) if truth else (late, early)
    frames = _shown(scene, *(range(start, FRAMES) for start in starts))
    a, b = scene.objects
    return _yes(frames, f"does the {a.shape} appear before the {b.shape}?", truth, _of(scene))


def _longer(rng: np.random.Generator, truth: int) -> _Made:
    scene, (short, long) = _scene(rng, 2, scale=0.7), sorted((1 + rng.permutation(FRAMES)[:2]).tolist())
    spans = []
    for n in (long, short) if truth else (short, long):
        start = int(rng.integers(FRAMES - n + 1))
        spans.append(range(start, start + n))
    a, b = scene.objects
    question = f"is the {a.shape} there longer than the {b.shape}?"
    return _yes(_shown(scene, *spans), question, truth, _of(scene))


def _going(rng: np.random.Generator, speed: float) -> tuple[float, float]:
    angle = rng.uniform(0, 2 * np.pi)
    return speed * math.cos(angle), speed * math.sin(angle)


def _moves(rng: np.random.Generator, truth: int) -> _Made:
    scene, speed = _scene(rng, 2, scale=0.7), rng.uniform(0.05, 0.12)
    ways = (_going(rng, speed), (0.0, 0.0)) if truth else ((0.0, 0.0), _going(rng, speed))
    return _yes(film(scene, ways, FRAMES), f"does the {scene.objects[0].shape} move?", truth, _of(scene))


def _faster(rng: np.random.Generator, truth: int) -> _Made:
    scene, slow = _scene(rng, 2, scale=0.7), rng.uniform(0.03, 0.05)
    fast = slow * rng.uniform(2, 3)
    ways = [_going(rng, speed) for speed in ((fast, slow) if truth else (slow, fast))]
    a, b = scene.objects
    return _yes(film(scene, ways, FRAMES), f"is the {a.shape} faster than the {b.shape}?", truth, _of(scene))


def _straight(rng: np.random.Generator, way: tuple[int, int], speed: float, scene: Scene) -> Scene:
    """The scene with its first object where it can go this way without touching an edge."""
    r, far = scene.radius(0), speed * (FRAMES - 1)
    at = []
    for sign in way:
        low, high = r + far * (sign < 0), 1 - r - far * (sign > 0)
        at.append(rng.uniform(low, high))
    return scene.but(0, x=at[0], y=at[1])


def _direction(rng: np.random.Generator, truth: int) -> _Made:
    name, speed = list(WAYS)[truth], rng.uniform(0.05, 0.1)
    scene = _straight(rng, WAYS[name], speed, _scene(rng, 1, scale=0.7))
    way = [tuple(speed * sign for sign in WAYS[name])]
    question = f"which way does the {scene.objects[0].shape} go?"
    return _Made(film(scene, way, FRAMES), question, name, [other for other in WAYS if other != name], _of(scene))


def _path(rng: np.random.Generator, truth: int) -> _Made:
    names, speed = ("straight on", "round a corner", "back again"), rng.uniform(0.06, 0.1)
    (x, y), scene = list(WAYS.values())[int(rng.integers(4))], _scene(rng, 1, scale=0.7)
    turn = ((x, y), (y, x), (-x, -y))[truth]
    scene = scene.but(0, x=rng.uniform(0.45, 0.55), y=rng.uniform(0.45, 0.55))
    scene = scene.but(0, x=scene.objects[0].x - 2 * speed * x, y=scene.objects[0].y - 2 * speed * y)
    frames = film(scene, [(speed * x, speed * y)], 3)
    frames += film(frames[-1], [(speed * turn[0], speed * turn[1])], FRAMES - 2)[1:]
    question = f"how does the {scene.objects[0].shape} go?"
    return _Made(frames, question, names[truth], [name for name in names if name != names[truth]], _of(scene))


def _hits(scene: Scene, way: NDArray[np.floating], steps: float, which: int = 0) -> list[float]:
    """When an object, the first, meets an edge, in frames, until then."""
    r, one = scene.radius(which), scene.objects[which]
    found = []
    for at, v in zip((one.x, one.y), way.tolist()):
        span, ahead = 1 - 2 * r, ((1 - r - at) if v > 0 else (at - r)) / max(abs(v), 1e-9)
        while ahead <= steps:
            found.append(ahead)
            ahead += span / abs(v)
    return sorted(found)


def _next(rng: np.random.Generator, hits: int, ahead: int) -> _Made:
    """What comes `ahead` frames after a film, of a thing that until then meets so many edges after the film's end."""
    while True:
        scene, way = _scene(rng, 1, scale=0.6), np.array(_going(rng, rng.uniform(0.06, 0.14)))
        whole = film(scene, [way], FRAMES + ahead)
        before, after = (_hits(scene, way, at) for at in (FRAMES - 1, FRAMES - 1 + ahead))
        if before or len(after) != hits or min(abs(way)) < 0.03:
            continue
        last, right = whole[FRAMES - 1], whole[-1]
        wrong = [film(last, [way * sign], ahead + 1)[-1] for sign in ((-1, 1), (1, -1), (-1, -1))]
        if _different([right, *wrong]):
            question = "what comes next?" if ahead == 1 else f"what comes {NUMBERS[ahead]} frames later?"
            return _Made(whole[:FRAMES], question, right, wrong, _of(scene))


def _different(scenes: Sequence[Scene]) -> bool:
    places = np.array([[(o.x, o.y) for o in scene.objects] for scene in scenes])
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1).max(-1)
    return bool((apart + np.eye(len(scenes)) >= APART).all())


def _bounce(rng: np.random.Generator, truth: int) -> _Made:
    return _next(rng, 1, 2)


def _bounces(rng: np.random.Generator, truth: int) -> _Made:
    return _next(rng, 2, 8)


def _both(rng: np.random.Generator, truth: int) -> _Made:
    while True:
        scene = _scene(rng, 2, scale=0.6)
        ways = np.array([_going(rng, rng.uniform(0.05, 0.1)) for _ in range(2)])
        if any(_hits(scene, way, FRAMES + 1, i) for i, way in enumerate(ways)):
            continue
        whole = film(scene, ways, FRAMES + 2)
        last, right = whole[FRAMES - 1], whole[-1]
        turns = (np.array([[1], [-1]]), np.array([[-1], [1]]), np.array([[-1], [-1]]))
        wrong = [film(last, ways * turn, 3)[-1] for turn in turns]
        if _different([right, *wrong]):
            return _Made(whole[:FRAMES], "what comes two frames later?", right, wrong, _of(scene))


_TASKS: dict[str, tuple[Callable[[np.random.Generator, int], _Made], int]] = {  # how one is made, and kinds of truths
    "colour": (_colour, len(COLOURS)),
    "shape": (_shape, len(SHAPES)),
    "relation": (_relation, 2),
    "vacancy": (_vacancy, len(QUARTERS)),
    "count": (_count, 4),
    "more": (_more, 2),
    "larger": (_larger, 2),
    "before": (_before, 2),
    "longer": (_longer, 2),
    "moves": (_moves, 2),
    "faster": (_faster, 2),
    "direction": (_direction, len(WAYS)),
    "path": (_path, 3),
    "bounce": (_bounce, 1),
    "bounces": (_bounces, 1),
    "both": (_both, 1),
}
