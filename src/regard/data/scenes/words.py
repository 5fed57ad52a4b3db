"""Scenes in words: captions, and questions with their answers.

Every text is made of `VOCABULARY`, so that a word-level tokenizer of some seventy words reads them all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from .._common import known
from .scene import COLOURS, RELATIONS, SHAPES, TEXTURES, Scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KINDS = ("presence", "count", "colour", "relation")
_FRAMES = (
    "a an and on the is there ? how many are what colour nothing , yes no more than",
    " ".join((*NUMBERS, *SHAPES, *COLOURS, *TEXTURES[1:], *RELATIONS)),
)


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _number(n: int) -> str:
    return NUMBERS[n] if n < len(NUMBERS) else "more than nine"


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


VOCABULARY = tuple(dict.fromkeys(" ".join((*_FRAMES, *map(_plural, SHAPES))).split()))


class Question(NamedTuple):
    """A question about a scene, with the one right answer.

    `about` are the indices of the objects that the answer rests on, none where what is asked for is absent.
    """

    kind: str
    text: str
    answer: str
    about: tuple[int, ...]


def caption(scene: Scene, *, last: Collection[str] = ()) -> str:
    """Every object with its colour, from left to right, alike ones together, and the background unless it is plain.

    last: shapes that are named after all others.

    >>> from regard.data.scenes import Object, Scene, caption
    >>> caption(Scene((Object("star", "red", "small", 0.7, 0.5), Object("fork", "orange", "small", 0.3, 0.5))))
    'an orange fork and a red star'
    """
    kinds = Counter((o.colour, o.shape) for o in sorted(scene.objects, key=lambda o: (o.shape in last, o.x)))
    parts = [
        _a(f"{colour} {shape}") if n == 1 else f"{_number(n)} {colour} {_plural(shape)}"
        for (colour, shape), n in kinds.items()
    ]
    listed = " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:]))) or "nothing"
    return listed if scene.texture == "plain" else f"{listed} on {scene.texture}"


def questions(scene: Scene, kind: str | None = None) -> list[Question]:
    """Every question of a kind, or of all kinds, that has one right answer.

    Presence and count ask about each shape that exists, also where it is absent; colour about shapes that occur once;
    relation about pairs of objects that can be named without doubt and whose centres differ enough.
    """
    if kind is None:
        return [q for k in KINDS for q in questions(scene, k)]
    known("kind of question", kind, KINDS)
    return list(_ASKED[kind](scene))


def _presence(scene: Scene):
    for shape in SHAPES:
        found = scene.find(shape)
        yield Question("presence", f"is there {_a(shape)}?", "yes" if found else "no", tuple(found))


def _count(scene: Scene):
    for shape in SHAPES:
        found = scene.find(shape)
        yield Question("count", f"how many {_plural(shape)} are there?", _number(len(found)), tuple(found))


def _colour(scene: Scene):
    for i, o in enumerate(scene.objects):
        if len(scene.find(o.shape)) == 1:
            yield Question("colour", f"what colour is the {o.shape}?", o.colour, (i,))


def _relation(scene: Scene):
    names = [_name(scene, i) for i in range(len(scene.objects))]
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if i == j or not a or not b:
                continue
            for relation in RELATIONS:
                if (holds := scene.related(i, relation, j)) is not None:
                    yield Question("relation", f"is {a} {relation} {b}?", "yes" if holds else "no", (i, j))


_ASKED = {"presence": _presence, "count": _count, "colour": _colour, "relation": _relation}


def _name(scene: Scene, i: int) -> str | None:
    """The shortest name that fits object `i` only."""
    o = scene.objects[i]
    if len(scene.find(o.shape)) == 1:
        return f"the {o.shape}"
    return f"the {o.colour} {o.shape}" if len(scene.find(o.shape, o.colour)) == 1 else None


def ask(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> Question:
    """One question at random. Each answer that the scene allows is equally likely, so "yes" is as frequent as "no".

    Where the scene allows no question of this kind, one about presence.
    """
    choices = questions(scene, kind or KINDS[rng.integers(len(KINDS))]) or questions(scene, "presence")
    answers = sorted({q.answer for q in choices})
    answer = answers[rng.integers(len(answers))]
    alike = [q for q in choices if q.answer == answer]
    return alike[rng.integers(len(alike))]


def split(text: str) -> list[str]:
    """The words of a caption, question or answer, as in `VOCABULARY`."""
    return re.findall(r"\w+|[^\w\s]", text)
