"""Rooms of known volume, as speech sounds in them: impulse responses made of a few laws of room acoustics.

The direct sound comes first, then reflections at random times, whose number by a time t is that of an image source
model, 4/3 pi (c t)^3 / V; each is the softer the longer its way is, and the walls take as much from it as the
reverberation time says, whatever the volume. Where reflections come faster than a sample can tell, noise of the same
power stands for them. Walls have no frequency response, and rooms no shape.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._common import generator

SPEED = 343.0  # of sound, m/s
DENSE = 20_000.0  # reflections a second, from which on they are noise
DECAY = 3 * np.log(10.0)  # 60 dB, as an exponent of amplitude

Array = NDArray[np.float64]


def reflections(volume: float, time: ArrayLike) -> Array:
    """How many are expected by a time in seconds, in a room of so many cubic metres.

    >>> from regard.data.rooms import reflections
    >>> round(float(reflections(200, 0.02)), 2)
    6.76
    """
    return 4 / 3 * np.pi * (SPEED * np.asarray(time, np.float64)) ** 3 / volume


def impulse_response(
    volume: float, reverberation: float, distance: float, *, rate: int = 8000, seed: int = 0, index: int = 0
) -> Array:
    """What is heard of a click, until it is 60 dB down; response `index` of a seed. [sample]

    volume: cubic metres; reverberation: seconds to fall by 60 dB; distance: of the source, metres; rate: samples a
    second. A metre away, the direct sound is 1. ValueError for what is not above 0, and a source whose sound comes
    after the reverberation.

    >>> from regard.data.rooms import impulse_response
    >>> impulse_response(100, 0.5, 1.0).shape
    (4000,)
    """
    if not min(volume, reverberation, distance, rate) > 0 or not distance / SPEED < reverberation:
        raise ValueError(
            "rooms: volume, reverberation, distance and rate are above 0, and the source is near; got "
            f"{volume}, {reverberation}, {distance}, {rate}"
        )
    draw, first = generator(seed, index), distance / SPEED
    samples = round(reverberation * rate)
    found = np.zeros(samples)
    dense = min(np.sqrt(DENSE * volume / (4 * np.pi * SPEED**3)), reverberation)
    start, most = (float(reflections(volume, at)) for at in (first, dense))
    counts = start + draw.exponential(size=int(max(most - start, 0) * 1.5 + 50)).cumsum()
    times = (counts[counts < most] * volume * 3 / (4 * np.pi)) ** (1 / 3) / SPEED
    signs = draw.choice([-1.0, 1.0], len(times))
    at = np.minimum(np.round(np.concatenate([[first], times]) * rate).astype(int), samples - 1)
    times = np.concatenate([[first], times])
    np.add.at(found, at, np.concatenate([[1.0], signs]) * np.exp(-DECAY * times / reverberation) / (SPEED * times))
    late = np.arange(max(int(np.ceil(max(dense, first) * rate)), 1), samples) / rate
    often = 4 * np.pi * SPEED**3 * late**2 / volume / rate  # reflections a sample
    loud = np.exp(-DECAY * late / reverberation) / (SPEED * late)
    found[samples - len(late) :] += draw.standard_normal(len(late)) * np.sqrt(often) * loud
    return found


def heard(
    speech: ArrayLike, response: ArrayLike, ratio: float, *, seed: int = 0, index: int = 0
) -> NDArray[np.float32]:
    """Speech in a room with white noise `ratio` dB below it, as long as the speech, of mean power 1. [sample]

    Of mean power 1, so that loudness tells nothing of the room. ValueError for silence.
    """
    wave, room = np.asarray(speech, np.float64), np.asarray(response, np.float64)
    size = len(wave) + len(room) - 1
    wet = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(room, size), size)[: len(wave)]
    power = np.square(wet).mean() if len(wet) else 0.0
    if not power > 0:
        raise ValueError("rooms: the speech is silent, or there is none; give a wave that is not 0 throughout")
    wet += generator(seed, index, 1).standard_normal(len(wet)) * np.sqrt(power / 10 ** (ratio / 10))
    return (wet / np.sqrt(np.square(wet).mean())).astype(np.float32)
