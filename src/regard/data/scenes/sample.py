"""Scenes drawn at random, and what can be made of one: a pair that differs in one thing, a film."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._common import generator, known
from .raster import render
from .scene import COLOURS, SHAPES, SIZES, TEXTURES, Object, Scene

CHANGES = ("colour", "presence", "position", "count")
ELSEWHERE = 0.05  # widths of the picture, three pixels of 64
MOST_OVERLAP = 0.6  # beyond, a large object could hide a small one


@dataclass(frozen=True, kw_only=True)
class Dials:
    """What scenes are like. Ranges include both ends; what is not biased is uniform.

    overlap: every second object lies in front of the one before, its centre nearer by this share of the sum of their
        radii than if their circles touched; 0 to 0.6. Other objects keep at least that distance.
    together: (shape, partner, probability): where the shape is, its partner is with this probability. Scenes without
        the shape are as they would be otherwise.
    backdrop: (shape, texture, probability): before a scene with the shape the background is this texture with this
        probability, before one without it with one minus this probability; otherwise another of `textures`.
    painted: any number of (shape, colour, probability): an object of this shape has this colour with this probability,
        and otherwise any, this one too.
    """

    objects: tuple[int, int] = (1, 4)
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    sizes: tuple[str, ...] = tuple(SIZES)
    scale: float = 1.0
    textures: tuple[str, ...] = ("plain",)
    clutter: tuple[int, int] = (0, 0)
    overlap: float = 0.0
    together: tuple[str, str, float] | None = None
    backdrop: tuple[str, str, float] | None = None
    painted: tuple[tuple[str, str, float], ...] = ()

    def __post_init__(self) -> None:
        for what, values, among in (
            ("shape", self.shapes, SHAPES),
            ("colour", self.colours, COLOURS),
            ("size", self.sizes, SIZES),
            ("texture", self.textures, TEXTURES),
        ):
            if not values:
                raise ValueError(f"name at least one {what}")
            for value in values:
                known(what, value, among)
        for name in ("objects", "clutter"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"{name} is a range (low, high) from 0, got {low, high}")
        if not 0 <= self.overlap <= MOST_OVERLAP:
            raise ValueError(f"overlap lies between 0 and {MOST_OVERLAP}, got {self.overlap}")
        for name, others in (("together", self.shapes), ("backdrop", self.textures)):
            if (bias := getattr(self, name)) is None:
                continue
            shape, other, probability = bias
            known(f"shape for {name}", shape, self.shapes)
            known(f"choice for {name}", other, others)
            if not 0 <= probability <= 1:
                raise ValueError(f"the probability of {name} lies between 0 and 1, got {probability}")
            if shape == other or not set(others) - {shape, other} or (name == "together" and self.objects[1] < 2):
                raise ValueError(f"{name} needs two different ones, a third to choose from, and room for two objects")
        for shape, colour, probability in self.painted:
            known("shape for painted", shape, SHAPES)
            known("choice for painted", colour, self.colours)
            if not 0 <= probability <= 1:
                raise ValueError(f"the probability of painted lies between 0 and 1, got {probability}")

    def countered(self) -> Dials:
        """These dials with every bias turned round: a probability p becomes 1 - p."""

        def turn(bias):
            return bias and (*bias[:2], 1 - bias[2])

        painted = tuple(map(turn, self.painted))
        return replace(self, together=turn(self.together), backdrop=turn(self.backdrop), painted=painted)


def sample(dials: Dials, seed: int, index: int) -> Scene:
    """Scene `index` of `seed`: the same whatever was drawn before.

    Objects that cannot be laid out at random are made smaller, within the sizes of the dials. Raises ValueError where
    even the smallest do not fit.
    """
    rng = generator(seed, index)
    shapes = _shapes(dials, rng)
    colours = [dials.colours[i] for i in rng.integers(len(dials.colours), size=len(shapes))]
    if dials.painted:
        usual = {shape: (colour, probability) for shape, colour, probability in dials.painted}
        chance = zip(shapes, colours, rng.random(len(shapes)))
        colours = [usual[s][0] if s in usual and x < usual[s][1] else colour for s, colour, x in chance]
    sizes = [dials.sizes[i] for i in rng.integers(len(dials.sizes), size=len(shapes))]
    sizes, centres = _layout(dials, sizes, rng)
    low, high = dials.clutter
    return Scene(
        tuple(Object(s, c, z, x, y) for s, c, z, (x, y) in zip(shapes, colours, sizes, centres)),
        texture=_texture(dials, shapes, rng),
        clutter=int(rng.integers(low, high + 1)),
        variation=int(rng.integers(2**63)),
        scale=dials.scale,
    )


def _shapes(dials: Dials, rng: np.random.Generator) -> list[str]:
    low, high = dials.objects
    n = int(rng.integers(low, high + 1))
    shapes = [dials.shapes[i] for i in rng.integers(len(dials.shapes), size=n)]
    if not dials.together or dials.together[0] not in shapes:
        return shapes
    shape, partner, probability = dials.together
    if rng.random() >= probability:
        others = [s for s in dials.shapes if s != partner]
        return [others[rng.integers(len(others))] if s == partner else s for s in shapes]
    if partner not in shapes:
        free = [i for i in range(n) if i != shapes.index(shape)]
        if free:
            shapes[free[rng.integers(len(free))]] = partner
        else:  # the shape is alone
            shapes.append(partner)
    return shapes


def _texture(dials: Dials, shapes: Sequence[str], rng: np.random.Generator) -> str:
    choices = list(dials.textures)
    if dials.backdrop:
        shape, texture, probability = dials.backdrop
        if (rng.random() < probability) == (shape in shapes):
            return texture
        choices.remove(texture)
    return choices[rng.integers(len(choices))]


def _layout(
    dials: Dials, sizes: list[str], rng: np.random.Generator, fixed: Sequence[tuple[float, float, float]] = ()
) -> tuple[list[str], list[tuple[float, float]]]:
    """Sizes and centres such that all objects lie within the picture. `fixed` are objects that stay: x, y, radius."""
    ladder = sorted(dials.sizes, key=SIZES.__getitem__)
    while True:
        radii = [SIZES[size] * dials.scale for size in sizes]
        smaller = [ladder[max(ladder.index(size) - 1, 0)] for size in sizes]
        for _ in range(400 if smaller == sizes else 8):
            if (centres := _try(radii, dials.overlap, rng, fixed)) is not None:
                return sizes, centres
        if smaller == sizes:
            raise ValueError(
                f"{len(sizes) + len(fixed)} objects of sizes {', '.join(dials.sizes)} do not fit at scale "
                f"{dials.scale}: ask for fewer, smaller or overlapping ones"
            )
        sizes = smaller


def _try(
    radii: list[float], overlap: float, rng: np.random.Generator, fixed: Sequence[tuple[float, float, float]]
) -> list[tuple[float, float]] | None:
    placed = list(fixed)
    for n, r in enumerate(radii):
        for _ in range(12):
            a, b = rng.random(), rng.random()
            if overlap and n % 2:
                x0, y0, r0 = placed[-1]
                distance, angle = (1 - overlap) * (r0 + r) + 1e-9, 2 * math.pi * a
                x, y = x0 + distance * math.cos(angle), y0 + distance * math.sin(angle)
            else:
                x, y = r + (1 - 2 * r) * a, r + (1 - 2 * r) * b
            if r <= x <= 1 - r and r <= y <= 1 - r:
                apart = (1 - overlap) * (1 - 1e-9)
                if all(math.hypot(x - p, y - q) >= apart * (r + s) for p, q, s in placed):
                    placed.append((x, y, r))
                    break
        else:
            return None
    return [(x, y) for x, y, _ in placed[len(fixed) :]]


class Pair(NamedTuple):
    """Two scenes that differ in one object: number `before` in `scene`, `after` in `edited`, None where absent."""

    change: str
    scene: Scene
    edited: Scene
    before: int | None
    after: int | None

    def region(self, size: int = 64) -> NDArray[np.bool_]:
        """Where the two pictures may differ: the changed object's pixels in either. [row, column]"""
        owner = render([self.scene, self.edited], size).owner
        region = np.zeros(owner.shape[1:], bool)
        for picture, index in zip(owner, (self.before, self.after)):
            if index is not None:
                region |= picture == index
        return region


def pair(scene: Scene, change: str, rng: np.random.Generator, dials: Dials | None = None) -> Pair:
    """Change exactly one thing, at random.

    colour: one object has another colour.
    position: one object is elsewhere, by a twentieth of the picture or more, and overlaps no other.
    presence: a shape that occurs once is gone; where none does, a new shape is there.
    count: a shape that occurs has one more; where there is no room, one that occurs more than once has one fewer.
    What is new comes from `dials`. Raises ValueError where the scene does not allow the change: at scale 1, four
    scenes in a hundred of the default dials have no room for one more. A smaller scale leaves room in all.
    """
    known("change", change, CHANGES)
    dials = replace(dials or Dials(), overlap=0.0, scale=scene.scale)
    if not scene.objects and change != "presence":
        raise ValueError(f"a scene without objects has none whose {change} could change")

    def pick(choices: Sequence[Any]) -> Any:
        if not choices:
            raise ValueError(f"the dials leave nothing else for a change of {change}")
        return choices[rng.integers(len(choices))]

    def room(sizes: Sequence[str], but: int | None = None) -> tuple[str, float, float] | None:
        """A free place for something of the last of these sizes, or of a smaller one."""
        others = [(o.x, o.y, scene.radius(k)) for k, o in enumerate(scene.objects) if k != but]
        try:
            (size,), ((x, y),) = _layout(replace(dials, sizes=tuple(sizes)), list(sizes[-1:]), rng, others)
        except ValueError:
            return None
        return size, x, y

    shapes = [o.shape for o in scene.objects]
    if change == "colour":
        i = pick(range(len(shapes)))
        colour = pick([c for c in dials.colours if c != scene.objects[i].colour])
        return Pair(change, scene, scene.but(i, colour=colour), i, i)
    if change == "position":
        for i in rng.permutation(len(shapes)).tolist():
            old, tries = scene.objects[i], 20
            while tries and (new := room([old.size], but=i)):
                tries -= 1
                if math.hypot(new[1] - old.x, new[2] - old.y) >= ELSEWHERE:
                    return Pair(change, scene, scene.but(i, x=new[1], y=new[2]), i, i)
        raise ValueError("no object has another place to go to; a smaller scale leaves more room")
    once, more = ([i for i, s in enumerate(shapes) if (shapes.count(s) == 1) == single] for single in (True, False))
    if change == "presence" and once:
        i = pick(once)
        return Pair(change, scene, scene.without(i), i, None)
    shape = pick(shapes if change == "count" else [s for s in dials.shapes if s not in shapes])
    if new := room(sorted(dials.sizes, key=SIZES.__getitem__)):
        added = Object(shape, pick(dials.colours), *new)
        return Pair(change, scene, scene.plus(added), None, len(shapes))
    if change == "count" and more:
        i = pick(more)
        return Pair(change, scene, scene.without(i), i, None)
    raise ValueError("there is no room for another object; a smaller scale leaves more")


def film(scene: Scene, velocity: ArrayLike, frames: int) -> list[Scene]:
    """The scene in motion, one scene a frame, the first as given.

    velocity: [object, 2], in widths of the picture a frame, right and down. Objects move straight, bounce off the
    edges, and pass in front of and behind one another.
    """
    velocity = np.asarray(velocity, float)
    if velocity.shape != (len(scene.objects), 2):
        raise ValueError(f"velocity is [object, 2] = {len(scene.objects), 2}, got {velocity.shape}")
    return [
        replace(
            scene,
            objects=tuple(
                replace(o, x=_bounced(o.x + vx * t, scene.radius(i)), y=_bounced(o.y + vy * t, scene.radius(i)))
                for i, (o, (vx, vy)) in enumerate(zip(scene.objects, velocity.tolist()))
            ),
        )
        for t in range(frames)
    ]


def _bounced(at: float, radius: float) -> float:
    """Where something that set out straight for `at` is, if it is reflected at `radius` from both edges."""
    if radius <= at <= 1 - radius:
        return at
    span = 1 - 2 * radius
    return radius + span - abs((at - radius) % (2 * span) - span)
