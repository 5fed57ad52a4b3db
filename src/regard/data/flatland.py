"""Discs in a plane, and what cameras on its rim see of them: geometry and hiding, in pictures that are one line.

A picture is traced exactly, one ray a pixel, and for each pixel it is known which disc it shows, how far away, and from
which other cameras that very point of the disc can be seen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._common import generator

Array = NDArray[np.float64]


class Discs(NamedTuple):
    """A world of opaque discs, each of one colour, within the unit disc."""

    centres: Array  # [disc, 2]
    radii: Array  # [disc]
    colours: Array  # 0 to 1 [disc, 3]


class Line(NamedTuple):
    """A picture of one row, and its truth."""

    colours: Array  # white where nothing is [pixel, 3]
    disc: NDArray[np.int64]  # which is seen, -1 for none [pixel]
    points: Array  # where its surface is met, NaN for none [pixel, 2]


def discs(n: int = 3, *, radius: tuple[float, float] = (0.3, 0.3), seed: int = 0, index: int = 0) -> Discs:
    """World `index` of a seed: discs that do not overlap, with radii even between the two given.

    Raises ValueError where `n` of them hardly fit.

    >>> from regard.data.flatland import discs
    >>> discs(2, seed=1).centres.shape
    (2, 2)
    """
    draw = generator(seed, index)
    if not 0 < radius[0] <= radius[1] < 1:
        raise ValueError(f"radii rise, above 0 and below 1; got {radius}")
    for _ in range(1000):
        radii = draw.uniform(*radius, n)
        angles, reach = draw.uniform(0, 2 * np.pi, n), (1 - radii) * draw.uniform(0, 1, n) ** 0.5
        centres = reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        apart = np.linalg.norm(centres[:, None] - centres, axis=-1) + 9 * np.eye(n)
        if (apart > radii[:, None] + radii).all():
            return Discs(centres, radii, draw.uniform(0, 1, (n, 3)))
    raise ValueError(f"{n} discs of radii {radius} hardly fit into the unit disc; ask for fewer or smaller ones")


def camera(angle: float, *, pixels: int = 24, distance: float = 2.0, reach: float = 1.0) -> tuple[Array, Array]:
    """Where a camera on the rim stands [2], and the unit directions of its pixels [pixel, 2], from left to right.

    It looks at the middle of the world; pixels are as wide as one another on a line across the world, which they cover
    as far as `reach` to either side.
    """
    forward, right = -np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    across = (2 * np.arange(pixels) + 1 - pixels) / pixels * reach
    rays = distance * forward + across[:, None] * right
    return -distance * forward, rays / np.linalg.norm(rays, axis=1, keepdims=True)


def trace(world: Discs, origin: Array, directions: Array) -> Line:
    """What each ray meets first."""
    middle = world.centres - origin
    along = directions @ middle.T  # [pixel, disc]
    deep = along**2 - (middle**2).sum(1) + world.radii**2
    near = np.where((deep > 0) & (along > 0), along - np.sqrt(np.clip(deep, 0, None)), np.inf)
    first = near.argmin(1)
    seen = np.isfinite(near.min(1))
    with np.errstate(invalid="ignore"):
        points = np.where(seen[:, None], origin + near.min(1)[:, None] * directions, np.nan)
    return Line(np.where(seen[:, None], world.colours[first], 1.0), np.where(seen, first, -1), points)


def visible(world: Discs, points: Array, origin: Array) -> NDArray[np.bool_]:
    """Whether points on discs can be seen from a place: no disc is before them. [point]"""
    away = points - origin
    far = np.linalg.norm(away, axis=1)
    met = trace(world, origin, away / far[:, None]).points
    return np.linalg.norm(met - points, axis=1) < 1e-6 * far
