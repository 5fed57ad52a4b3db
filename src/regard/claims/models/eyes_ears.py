"""Jang et al. (arXiv:2506.00421): a memory of pictures and sounds is found again late in the talk, by what was in it.

Episodes of ten sessions: a place, two partners, a scene that is seen and a tune that is heard; what is remembered of
each is a line of who and where, with the picture's or the sound's features. In a later session someone asks for one by
who and where ("text"), or by what was seen or heard, which no text says ("percept"), amid chatter. Training has three
sessions a talk, as in the paper; longer talks are the test, where all past units are candidates, whatever their age.
Scenes are seen by the zoo's viewer, frozen; tunes are patterns of three tones of one timbre, as noisy spectrograms.
Controls: the same retriever without pictures and sounds in what it reads, of equal training; pictures and sounds dealt
out anew among the units of a talk. Errors are over talks, of one training; one unit of each session is asked for.
Settings were chosen on seed 100, in one pilot. Captions in place of raw features are not tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import zoo
from ...catalog import Finding, Premise
from ...data.scenes import COLOURS, SHAPES, Object, Scene, render
from ...models.eyes_ears import Memory, Perceived, Retriever, Unit, ranks
from ...zoo.recipes import viewer
from .._measure import mean
from .._nets import fit

SCALES = "small", "large"
STEPS, TALKS, BATCH, RATE = {"small": 350, "large": 3000}, {"small": 200, "large": 1000}, 12, 3e-3
SESSIONS, LONG, COPIES = 3, 10, 8
LATE, LESS, GAIN, READ = 0.75, 0.15, 0.3, 0.7
NAMES, VERBS = ("ben", "eve", "tom"), ("saw", "heard")
PLACES = (
    "lake",
    "park",
    "house",
    "market",
    "station",
    "beach",
    "forest",
    "tower",
    "bridge",
    "garden",
    "school",
    "pier",
)
TIMBRES, TUNES = ("flute", "horn", "bell", "string"), ("rising", "falling", "level", "peaked", "dipped")
CHATTER = ("well", "yes", "maybe", "today", "again", "so", "nice", "really", "time", "day", "long", "good")
FRAME = ("we", "something", "with", "and", "at", "the", "do", "you", "remember", "what")
LEXICON = (*FRAME, *NAMES, *VERBS, *PLACES, *TIMBRES, *TUNES, *CHATTER, *COLOURS, *SHAPES)
CODE = {word: i for i, word in enumerate(LEXICON)}
BANDS, FRAMES = 12, 6
OLD, NEW = slice(0, LONG - 6), slice(LONG - 2, LONG)  # sessions


class Bank(NamedTuple):
    """Features of things by what they are: [kind, copy, feature]"""

    pictures: Tensor
    sounds: Tensor


class Question(NamedTuple):
    context: Perceived
    target: int  # place in the memory
    by: str  # "text" or "percept"


class Talk(NamedTuple):
    memory: Memory
    questions: list[Question]  # asked in the session after the last


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """How often the right memory comes first, by kind of question, length of the talk and age of the memory."""
    expected = (
        f"asked by percept after ten sessions, of what is seven or more sessions old, right first {LATE:.0%} or more, "
        f"at most {LESS:.0%} below what is at most two old, and {GAIN:.0%} more often than read without pictures and "
        f"sounds and than with these dealt out anew, each by two standard errors"
    )
    draws = np.random.default_rng(seed)
    train, test = bank(seed), bank(seed + 1000)
    full, blind = (_trained(train, STEPS[scale], seed, perceives) for perceives in (True, False))
    talks = [talk(draws, test, LONG) for _ in range(TALKS[scale])]
    short = [talk(draws, test, SESSIONS) for _ in range(TALKS[scale])]
    found = {
        "whole": asked(full, talks),
        "text alone": asked(blind, talks, perceives=False),
        "dealt anew": asked(full, [_dealt(t, draws) for t in talks]),
    }
    early = (asked(full, short)["percept"] == 1).double()
    hits = {name: {by: (of[by] == 1).double() for by in of} for name, of in found.items()}
    old = {name: {by: mean(of[by][:, OLD].mean(1)) for by in of} for name, of in hits.items()}
    percept = {name: of["percept"] for name, of in hits.items()}
    faded = mean(percept["whole"][:, NEW].mean(1) - percept["whole"][:, OLD].mean(1))
    gains = {name: mean((percept["whole"] - percept[name])[:, OLD].mean(1)) for name in ("text alone", "dealt anew")}
    size = len(talks[0].memory.units)
    holds = old["whole"]["percept"].value >= LATE and faded.below(LESS) and all(g.above(GAIN) for g in gains.values())
    mrr = float((1 / found["whole"]["percept"][:, OLD]).mean())
    measured = (
        "right first of old ones, by percept and by text: "
        + "; ".join(f"{name} {of['percept']:.0%}, {of['text']:.0%}" for name, of in old.items())
        + f" (chance {1 / size:.0%}); old below new by {faded:.0%}, mean reciprocal rank of old ones {mrr:.2f}; gain "
        f"over text alone {gains['text alone']:.0%}, over dealt anew {gains['dealt anew']:.0%}; after three sessions "
        f"by percept {mean(early.mean(1)):.0%} (chance {1 / len(short[0].memory.units):.0%})"
    )
    fitting = 2 / size  # what was seen, or what was heard: the text tells which
    blindly, reads = old["text alone"]["percept"], old["text alone"]["text"]
    premises = [
        Premise(
            "text alone does not answer by percept",
            f"{1.5 * fitting:.0%} at most, 1.5 times chance among units that fit",
            f"{blindly:.0%}",
            blindly.value - 2 * blindly.error <= 1.5 * fitting,
        ),
        Premise("text alone answers by text", f"{READ:.0%} or more", f"{reads:.0%}", reads.value >= READ),
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, of in percept.items():
            axes.plot(range(LONG, 0, -1), of.mean(0), "o-", label=name)
        axes.axhline(1 / size, color="grey", linewidth=0.8, label="chance")
        axes.set(xlabel="sessions ago", ylabel="right first", ylim=(0, 1.02), title="The thing that we saw, or heard")
        axes.legend()

    return Finding(bool(holds), measured, expected, seed, premises=premises, draw=draw)


def bank(seed: int) -> Bank:
    """COPIES of each coloured shape, as the viewer sees it, and of each tune."""
    draws = np.random.default_rng(seed)
    scenes = [
        Scene((Object(shape, colour, "large", *draws.uniform(0.35, 0.65, 2)),), variation=int(draws.integers(2**31)))
        for colour in COLOURS
        for shape in SHAPES
        for _ in range(COPIES)
    ]
    model: Any = zoo.load("viewer")[0]
    with torch.no_grad():
        states = [
            model(pixel_values=viewer.pixels(render(scenes[at : at + 100], viewer.SIZE)), output_hidden_states=True)
            .hidden_states[-1][:, 1:]
            .mean(1)
            for at in range(0, len(scenes), 100)
        ]
    pictures = torch.cat(states)
    pictures = (pictures - pictures.mean(0)) / (pictures.std(0) + 1e-6)
    sounds = torch.from_numpy(np.stack([_tune(i, j, draws) for i in range(4) for j in range(5) for _ in range(COPIES)]))
    return Bank(pictures.unflatten(0, (-1, COPIES)), sounds.float().unflatten(0, (-1, COPIES)))


def _tune(timbre: int, tune: int, draws: np.random.Generator) -> np.ndarray:
    """A spectrogram: three tones from a random start, each with overtones of the timbre, and noise."""
    steps = ((0, 2, 4), (4, 2, 0), (2, 2, 2), (0, 4, 0), (4, 0, 4))[tune]
    overtones = ((0,), (0, 3), (0, 5), (0, 3, 5))[timbre]
    spectrum = draws.normal(0, 0.3, (FRAMES, BANDS))
    start = draws.integers(0, 3)
    for i, step in enumerate(steps):
        for over in overtones:
            spectrum[2 * i : 2 * i + 2, (start + step + over) % BANDS] += draws.uniform(0.8, 1.2)
    return spectrum.ravel()


def talk(draws: np.random.Generator, things: Bank, sessions: int) -> Talk:
    """A talk, and of one unit of each session a question of each kind, asked in the session after the last."""
    places = draws.permutation(len(PLACES))[:sessions]
    seen, heard = (draws.permutation(len(x))[:sessions] for x in things)
    memory, questions = Memory(), []
    for session in range(sessions):
        who = [NAMES[i] for i in sorted(draws.permutation(len(NAMES))[:2])]
        where = f"with {who[0]} and {who[1]} at the {PLACES[places[session]]}"
        asked_for = int(draws.integers(2))
        for i, (verb, of, kinds) in enumerate(zip(VERBS, ("picture", "sound"), (seen, heard), strict=True)):
            kind = int(kinds[session])
            features = getattr(things, f"{of}s")[kind, draws.integers(COPIES)]
            unit = Unit(f"we {verb} something {where}", session, ("ann", *who), **{of: features})
            place = memory.add(unit)
            if i == asked_for:
                for by, what in (("text", where), ("percept", f"the {_name(of, kind)}")):
                    words = f"{' '.join(draws.choice(CHATTER, 3))} do you remember what we {verb} {what}"
                    questions.append(Question(Perceived(_ids(words)), place, by))
    return Talk(memory, questions)


def _name(of: str, kind: int) -> str:
    if of == "picture":
        return f"{list(COLOURS)[kind // len(SHAPES)]} {SHAPES[kind % len(SHAPES)]}"
    return f"{TUNES[kind % len(TUNES)]} {TIMBRES[kind // len(TUNES)]}"


def _ids(text: str) -> Tensor:
    return torch.tensor([CODE[word] for word in text.split()])


def _things(units: Sequence[Unit], perceives: bool) -> list[Perceived]:
    made = []
    for unit in units:
        features = [x[None] if perceives and x is not None else None for x in (unit.picture, unit.sound)]
        made.append(Perceived(_ids(unit.text), *features))
    return made


def _trained(things: Bank, steps: int, seed: int, perceives: bool) -> Retriever:
    torch.manual_seed(seed)
    model = Retriever(words=len(LEXICON), picture=things.pictures.shape[-1], sound=BANDS * FRAMES)
    draws = np.random.default_rng(seed)

    def loss(_: Tensor) -> Tensor:
        talks = [talk(draws, things, SESSIONS) for _ in range(BATCH)]
        units = [unit for t in talks for unit in _things(t.memory.units, perceives)]
        target = [i * 2 * SESSIONS + q.target for i, t in enumerate(talks) for q in t.questions]
        return model.loss([q.context for t in talks for q in t.questions], units, torch.tensor(target))

    fit(model.parameters(), loss, 1, steps, seed, batch=1, rate=RATE)
    return model.eval()


@torch.no_grad()
def asked(model: Retriever, talks: Sequence[Talk], *, perceives: bool = True) -> dict[str, Tensor]:
    """The rank of the right unit, by kind of question. [talk, session] each"""
    found: dict[str, list[Tensor]] = {"percept": [], "text": []}
    for t in talks:
        units = model.embed_memory(_things(t.memory.units, perceives))
        for by, of in found.items():
            questions = [q for q in t.questions if q.by == by]
            scores = model.embed_context([q.context for q in questions]) @ units.T
            of.append(ranks(scores, torch.tensor([q.target for q in questions])))
    return {by: torch.stack(of) for by, of in found.items()}


def _dealt(t: Talk, draws: np.random.Generator) -> Talk:
    """Pictures and sounds, each among the units that have one, in another order."""
    units = list(t.memory.units)
    for of in ("picture", "sound"):
        at = [i for i, unit in enumerate(units) if getattr(unit, of) is not None]
        turned = np.roll(at, int(draws.integers(1, len(at))))
        given = [getattr(t.memory.units[j], of) for j in turned]
        for i, features in zip(at, given, strict=True):
            units[i] = Unit(units[i].text, units[i].session, units[i].speakers, **{of: features})
    return Talk(Memory(units), t.questions)
