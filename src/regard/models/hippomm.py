"""A memory for hours of sound and video: cut into segments, thinned to key frames, recalled by gist or by detail.

Lin et al., HippoMM: Hippocampal-inspired Multimodal Memory for Long Audiovisual Event Understanding (arXiv:2504.10739).
Streams are cut where the picture changes or the sound pauses; embeddings of both in one space are kept with their
times, frames unlike one another as key frames, and a gist of each event in words. A question is answered from the gists
where that is sure enough; otherwise moments are searched in the modality that the question names, and the answer is
read in the other modality at the same *time*. There is no learned attention in it.

Thresholds are those of the authors' code. What embeds, sums up and answers is handed in as functions (ImageBind and a
large vision-language model in the paper). Deviations: an event is one segment, where the authors merge all segments of
a film; a hit has the time of its own frame (their code reads the times of key frames there); the step in which a
language model weighs both answers is left to `answer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
SILENCE = -100.0  # dB of no sound at all
MODALITIES = "picture", "sound"


def levels(wave: ArrayLike, rate: float, *, window: float = 0.5) -> Array:
    """Level of each whole window of a mono wave, 20 log10 of its root mean square, in dB; -100 for zeros. [window]"""
    wave = np.asarray(wave, float)
    size = round(window * rate)
    if wave.ndim != 1 or size < 1:
        raise ValueError(f"hippomm: a wave is mono [sample], a window one sample or more; got {wave.shape}, {size=}")
    power = np.sqrt((wave[: len(wave) // size * size].reshape(-1, size) ** 2).mean(1))
    return np.where(power > 0, 20 * np.log10(np.maximum(power, 1e-300)), SILENCE)


def segment(
    similar: ArrayLike | None = None,
    wave: ArrayLike | None = None,
    *,
    rate: float = 16_000,
    longest: float = 30.0,
    shortest: float = 10.0,
    alike: float = 0.95,
    silence: float = -40.0,
    window: float = 0.5,
) -> Array:
    """Start and end of each segment, in seconds. [segment, 2]

    similar: of each frame to the one before, one a second, the first ignored (structural similarity in the paper);
    wave: mono sound at `rate` samples a second. A cut is made at the latest change of picture (below `alike`) within
    `longest` seconds of the last cut, or there; with sound, at the start of the latest pause instead, a window whose
    level is below `silence` dB, counted back from the end of those seconds. A segment lasts `shortest` seconds or more,
    but for the last.

    ValueError where there is neither picture nor sound, or a length is not above 0.

    >>> from regard.models.hippomm import segment
    >>> segment([1.0] * 61).tolist()
    [[0.0, 30.0], [30.0, 60.0]]
    """
    if similar is None and wave is None:
        raise ValueError("hippomm: segments are of pictures, of sound, or of both; got neither")
    if not 0 < shortest <= longest:
        raise ValueError(
            f"hippomm: segments last `shortest` to `longest` seconds, above 0; got {shortest=}, {longest=}"
        )
    if rate <= 0 or window <= 0:
        raise ValueError(f"hippomm: rate and window are above 0; got {rate=}, {window=}")
    unlike = np.flatnonzero(np.asarray([] if similar is None else similar, float) < alike)
    sound = None if wave is None else np.asarray(wave, float)
    end = len(np.asarray(similar)) - 1.0 if similar is not None else len(sound) / rate if sound is not None else 0.0
    found, start = [], 0.0
    while start < end:
        last = min(start + longest, end)
        cut = last
        changes = unlike[(unlike > start) & (unlike <= last)]
        if len(changes):
            cut = float(changes[-1])
        if sound is not None:
            pause = _latest_pause(sound, rate, start, last, window, silence)
            cut = cut if pause is None else pause
        cut = min(max(cut, start + shortest), end)
        found.append((start, cut))
        start = cut
    return np.array(found).reshape(-1, 2)


def _latest_pause(wave: Array, rate: float, start: float, last: float, window: float, silence: float) -> float | None:
    at = last - window
    while at > start:
        level = levels(wave[round(at * rate) : round((at + window) * rate)], rate, window=window)
        if len(level) and level[0] < silence:
            return at
        at -= window
    return None


def key_frames(features: ArrayLike, *, alike: float = 0.9) -> NDArray[np.int64]:
    """Frames whose cosine with every key frame before is below `alike`; of two or fewer, all. [key]

    >>> import numpy as np
    >>> from regard.models.hippomm import key_frames
    >>> angles = np.radians([0, 20, 60, 61])
    >>> key_frames(np.stack([np.cos(angles), np.sin(angles)], 1)).tolist()
    [0, 2]
    """
    features = _unit(features)
    if len(features) <= 2:
        return np.arange(len(features))
    kept = [0] if len(features) else []
    for i in range(1, len(features)):
        if (features[kept] @ features[i] < alike).all():
            kept.append(i)
    return np.array(kept, np.int64)


def nearest(query: ArrayLike, features: ArrayLike, *, top: int = 5) -> tuple[NDArray[np.int64], Array]:
    """The `top` rows of features by their cosine with the query, best first, and these. [hit] twice"""
    cosines = _unit(features) @ _unit(np.asarray(query, float)[None])[0]
    order = np.argsort(-cosines, kind="stable")[:top]
    return order, cosines[order]


class Moment(NamedTuple):
    """A hit: what is kept of it, and when it was."""

    time: float  # seconds
    event: int
    place: int  # among the event's pictures or sounds
    cosine: float


class Recall(NamedTuple):
    answer: object
    used_gist: bool
    moments: tuple[Moment, ...]  # that were searched out, best first
    operations: int  # products of embeddings with the question's


@dataclass
class Event:
    """A segment of a stream, as it is kept."""

    start: float
    end: float
    times: dict[str, Array]  # of pictures and of sounds, in seconds
    features: dict[str, Array]  # in the shared space [time, dim]
    keys: NDArray[np.int64]  # among the pictures
    gist: object = None
    gist_feature: Array | None = None


@dataclass
class Memory:
    """Watches streams, and answers questions about them.

    embed: by modality ("picture", "sound", "text"), what turns a list of such things into [thing, dim] of one space;
    gist: of an event, what is kept in words (None: no gists); answer: of a question and what was recalled (a list of
    gists, or of events with moments), an answer and how sure it is, 0 to 1.

    >>> from regard.models.hippomm import Memory
    >>> Memory(embed={"picture": lambda x: x}, answer=lambda question, found: (found, 1.0)).events
    []
    """

    embed: dict[str, Callable[[Sequence], ArrayLike]]
    answer: Callable[[object, list], tuple[object, float]]
    gist: Callable[[Event], object] | None = None
    sure: float = 0.7  # above which an answer from gists is taken
    alike: float = 0.9  # of key frames
    top: int = 5
    around: float = 1.0  # seconds before and after a hit in which the other modality is read
    thinned: bool = True  # details are searched among key frames; otherwise among all
    events: list[Event] = field(default_factory=list)

    def watch(
        self,
        segments: ArrayLike,
        *,
        pictures: Sequence = (),
        picture_times: ArrayLike = (),
        sounds: Sequence = (),
        sound_times: ArrayLike = (),
    ) -> None:
        """Keep a stream. segments: of `segment`; each picture and each sound has a time, in seconds.

        ValueError where times do not rise, there are fewer or more than things, or a modality has no `embed`.
        """
        given = {"picture": (pictures, picture_times), "sound": (sounds, sound_times)}
        kept: dict[str, tuple[Array, Array]] = {}
        for modality, (things, times) in given.items():
            times = np.asarray(times, float)
            if len(times) != len(things) or (np.diff(times) <= 0).any():
                raise ValueError(f"hippomm: each {modality} has a time, and times rise; got {len(things)} and {times}")
            if len(things):
                kept[modality] = times, _unit(self._embedded(modality, things))
        for start, end in np.asarray(segments, float).reshape(-1, 2):
            inside = {m: (times >= start) & (times < end) for m, (times, _) in kept.items()}
            event = Event(
                float(start),
                float(end),
                {m: kept[m][0][here] for m, here in inside.items()},
                {m: kept[m][1][here] for m, here in inside.items()},
                key_frames(kept["picture"][1][inside["picture"]], alike=self.alike)
                if "picture" in kept
                else np.arange(0),
            )
            if self.gist is not None:
                event.gist = self.gist(event)
                if "text" in self.embed:
                    event.gist_feature = _unit(self._embedded("text", [event.gist]))[0]
            self.events.append(event)

    def recall(self, question: object, *, about: str = "gist", to: str | None = None, cue: object = None) -> Recall:
        """Answer a question.

        about: "gist" (of everything: the gists alone), or "picture" or "sound", which the cue is searched among; to:
        the modality that the answer is read in, at the times of the hits; cue: what is searched for, of the modality
        `about` or, where that has no `embed`, text; the question unless given. Gists are tried first in any case.
        """
        operations = 0
        if self.gist is not None:
            operations += len(self.events)
            found, sure = self.answer(question, [event.gist for event in self.events])
            if about == "gist" or sure > self.sure:
                return Recall(found, True, (), operations)
        if about not in MODALITIES or (to or about) not in MODALITIES:
            raise ValueError(
                f"hippomm: a question is about gist, picture or sound, read in one of them; got {about=}, {to=}"
            )
        query = _unit(self._embedded(about, [question if cue is None else cue]))[0]
        moments: list[Moment] = []
        for number, event in enumerate(self.events):
            some = event.features.get(about, np.empty((0, len(query))))
            among = event.keys if about == "picture" and self.thinned else np.arange(len(some))
            order, cosines = nearest(query, some[among], top=self.top) if len(among) else ((), ())
            operations += len(among)
            moments += [
                Moment(float(event.times[about][among[i]]), number, int(among[i]), float(c))
                for i, c in zip(order, cosines, strict=True)
            ]
        moments = sorted(moments, key=lambda moment: -moment.cosine)[: self.top]
        read = [(moment, self._at(moment, to or about)) for moment in moments]
        return Recall(self.answer(question, read)[0], False, tuple(moments), operations)

    def _at(self, moment: Moment, modality: str) -> NDArray[np.int64]:
        """Which of an event's things of a modality are near a moment."""
        times = self.events[moment.event].times.get(modality, np.empty(0))
        return np.flatnonzero(np.abs(times - moment.time) <= self.around)

    def _embedded(self, modality: str, things: Sequence) -> ArrayLike:
        if modality not in self.embed:
            raise ValueError(f"hippomm: nothing embeds {modality}; `embed` has {', '.join(self.embed) or 'nothing'}")
        return self.embed[modality](things)


def hippomm(**parts: object) -> Memory:
    """An empty `Memory` of these parts."""
    return Memory(**parts)  # pyright: ignore[reportArgumentType]


def _unit(features: ArrayLike) -> Array:
    features = np.asarray(features, float)
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
