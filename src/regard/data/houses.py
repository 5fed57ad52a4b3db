"""Generated houses: rooms of a few places each, joined by doors, with things that are where such things are.

Rooms have kinds, and stand beside kinds that they are usually beside, and hold what they usually hold, both four times
in five. Some houses have two rooms of a kind. What is seen of a place may be a mistake, always the same one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from ._common import generator

HOLDS = {
    "hall": ("coat", "mirror"),
    "living-room": ("sofa", "vase"),
    "dining-room": ("table", "candle"),
    "kitchen": ("kettle", "pan"),
    "laundry": ("basket", "iron"),
    "bedroom": ("pillow", "lamp"),
    "bathroom": ("towel", "soap"),
    "office": ("desk", "printer"),
}
BESIDE = {
    "hall": ("living-room", "bedroom", "office"),
    "living-room": ("hall", "dining-room"),
    "dining-room": ("living-room", "kitchen"),
    "kitchen": ("dining-room", "laundry"),
    "laundry": ("kitchen",),
    "bedroom": ("hall", "bathroom"),
    "bathroom": ("bedroom",),
    "office": ("hall",),
}
ROOMS, THINGS = tuple(HOLDS), tuple(thing for things in HOLDS.values() for thing in things)


class Seen(NamedTuple):
    """What is seen of a place."""

    room: str
    things: tuple[str, ...]


@dataclass(frozen=True)
class House:
    """Places by number: what each is and holds, what is seen of it, and which are a step away."""

    true: tuple[Seen, ...]
    seen: tuple[Seen, ...]
    doors: tuple[tuple[int, ...], ...]

    def places(self, thing: str, room: str) -> list[int]:
        """Where such a thing is, in such a room."""
        return [i for i, of in enumerate(self.true) if of.room == room and thing in of.things]

    def steps(self, goals: list[int]) -> list[int]:
        """From each place to the nearest goal."""
        found = dict.fromkeys(goals, 0)
        waiting = deque(goals)
        while waiting:
            at = waiting.popleft()
            for beside in self.doors[at]:
                if beside not in found:
                    found[beside] = found[at] + 1
                    waiting.append(beside)
        return [found[i] for i in range(len(self.doors))]


def house(
    seed: int = 0, index: int = 0, *, rooms: tuple[int, int] = (8, 14), usual: float = 0.8, right: float = 0.85
) -> House:
    """House `index` of a seed, whatever was drawn before; all its places can be reached.

    rooms: fewest and most; usual: how often a room stands, and a thing is, where it usually does; right: how often the
    room of a place is seen for what it is. ValueError where these are no such numbers.

    >>> from regard.data.houses import house
    >>> found = house(3, rooms=(2, 2), usual=1.0)
    >>> sorted({of.room for of in found.true})
    ['bathroom', 'bedroom']
    """
    if not 1 <= rooms[0] <= rooms[1] or not (0 <= usual <= 1 and 0 <= right <= 1):
        raise ValueError(f"house: has a room or more, and shares are 0 to 1; got {rooms=}, {usual=}, {right=}")
    draws = generator(seed, index)
    kinds, doors, true, seen = [str(draws.choice(ROOMS))], [], [], []
    for room in range(int(draws.integers(rooms[0], rooms[1] + 1))):
        first, beside = len(doors), None
        if room:
            beside = int(draws.integers(first))
            kind = true[beside].room
            kinds.append(str(draws.choice(BESIDE[kind] if draws.random() < usual else ROOMS)))
        for at in range(first, first + int(draws.integers(3, 6))):
            doors.append([at - 1] if at > first else [])
            if at > first:
                doors[at - 1].append(at)
            usually = draws.random() < usual
            things = tuple(sorted({str(x) for x in draws.choice(HOLDS[kinds[-1]] if usually else THINGS, 2)}))
            true.append(Seen(kinds[-1], things))
            mistaken = draws.random() >= right
            seen.append(Seen(str(draws.choice(ROOMS)) if mistaken else kinds[-1], things))
        if beside is not None:
            at = int(draws.integers(first, len(doors)))
            doors[at].append(beside)
            doors[beside].append(at)
    return House(tuple(true), tuple(seen), tuple(tuple(of) for of in doors))
