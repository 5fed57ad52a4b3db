"""Jiang et al. (arXiv:2502.16794): answers follow the talker whom a listener attends to, read from neural signals.

Two talkers of six say five digits each, from 0 to 4, at once; asked is what the attended one says last. Streams are
log spectrograms of the last digits, each with 15% of the other's power, in place of a separator. Kinds are of K-means
over mean log spectra of a talker's takes. A recording is simulated: 24 electrodes, each a random delayed response to
the loudness in bands of the attended talker, with 0.3 of the other's, and pink noise, over all five digits; one
listener. The language model learns with true kinds, one talker of each mixture drawn as attended. Other takes are
tested, of talkers of different kinds whose last digits differ; pairs of one kind, which no token can part, are counted
only. Controls: recordings of other trials, the other talker's kind, a random one of both. Errors are over trials, of
one training. Settings were chosen on seed 100, in one pilot, which decoded too little of shorter recordings, and by
short trainings of the language model and of the decoder alone. The paper's ablations without chain or separator are not
tried.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...data.loaders.series import spoken_digits
from ...models.aad import Aad, VoiceKinds, aad
from .._data import folder
from .._measure import mean
from .._nets import fit

SCALES = "small", "large"
STEPS, BATCH, RATE = {"small": 400, "large": 4000}, 48, 3e-3
LISTENED, TESTED, DECODING = {"small": 400, "large": 2000}, {"small": 400, "large": 2000}, 400
BANDS, FRAMES, ELECTRODES, LAGS, KINDS, SAID, DIGITS = 20, 24, 24, 12, 4, 5, 5
LEAK, HEARD, NOISE = 0.15, 0.3, 0.5
FOLLOWS, GAIN, FLIPS, DECODED, KNOWN = 4.0, 0.2, 0.7, 0.7, 0.4
ASK, FIRST, SECOND, KIND, DIGIT = 0, 1, 2, 3, 3 + KINDS  # word ids; kinds and digits begin there


class Takes(NamedTuple):
    """Spoken digits. power: [take, band, frame]"""

    power: Tensor
    digit: Tensor
    talker: Tensor


class Trials(NamedTuple):
    """power: of both talkers' digits [trial, 2, digit, band, frame]; the attended is 0 or 1 [trial]"""

    power: Tensor
    digits: Tensor  # the last [trial, 2]
    talkers: Tensor  # [trial, 2]
    attended: Tensor

    @property
    def streams(self) -> Tensor:
        """Of the last digits, each with some of the other. [trial, 2, band, frame]"""
        last = self.power[:, :, -1]
        return (last + LEAK * last.flip(1) + 1e-3).log() / 2


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Whose digit is answered, by what the token says; how well kinds are decoded."""
    expected = (
        f"the attended talker's digit is answered {FOLLOWS:.0f} times as often as the other's or more, and {GAIN:.0%} "
        f"more often than by a random talker's kind, by two standard errors; with other trials' recordings both are "
        f"answered alike often, within two standard errors; the other's kind turns {FLIPS:.0%} of right answers"
    )
    train, test = takes()
    kinds, vectors = _kinds(train)
    of = kinds.kind(vectors)  # [talker]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = aad(
        kinds=KINDS, electrodes=ELECTRODES, bands=BANDS, frames=FRAMES, voice=BANDS, words=DIGIT + DIGITS, window=FRAMES
    )
    model.kinds = kinds
    _teach(model, train, of, STEPS[scale], seed)
    brain = torch.randn(ELECTRODES, BANDS, generator=generator) / BANDS**0.5
    delays = torch.randint(LAGS, (ELECTRODES,), generator=generator)
    heard = trials(train, LISTENED[scale], generator)
    _listen(model, recorded(heard, brain, delays, generator), _at(of[heard.talkers], heard.attended), seed)
    every = trials(test, 2 * TESTED[scale], generator)
    recordings = recorded(every, brain, delays, generator)
    differ = (of[every.talkers[:, 0]] != of[every.talkers[:, 1]]).nonzero()[: TESTED[scale], 0]
    asked, recordings = Trials(*(x[differ] for x in every)), recordings[differ]
    both = of[asked.talkers]
    own, other = _at(both, asked.attended), _at(both, 1 - asked.attended)
    with torch.no_grad():
        scores = model.decoder(recordings)
    ways = {
        "decoded": scores.argmax(1),
        "true": own,
        "random": _at(both, torch.randint(2, own.shape, generator=generator)),
        "other recordings": scores.argmax(1).roll(1),
        "flipped": other,
    }
    right, wrong = {}, {}
    for name, kind in ways.items():
        said = answered(model, asked.streams, kinds.centroids[kind])
        right[name] = (said == _at(asked.digits, asked.attended)).double()
        wrong[name] = (said == _at(asked.digits, 1 - asked.attended)).double()
    follows = float(right["decoded"].mean() / wrong["decoded"].mean().clamp_min(1e-3))
    gain = mean(right["decoded"] - right["random"])
    even = mean(right["other recordings"] - wrong["other recordings"])
    flips = mean(wrong["flipped"][right["true"] == 1])
    holds = follows >= FOLLOWS and gain.above(GAIN) and abs(even.value) <= 2 * even.error and flips.value >= FLIPS
    decoded = mean((scores.gather(1, own[:, None]) > scores.gather(1, other[:, None])).double())
    same = float((of[every.talkers[:, 0]] == of[every.talkers[:, 1]]).double().mean())
    measured = (
        "attended and other talker answered: "
        + "; ".join(f"{name} kind {mean(right[name]):.0%}, {mean(wrong[name]):.0%}" for name in ways)
        + f"; {follows:.1f} times as often, above a random one's by {gain:.0%}; by other recordings the attended more "
        f"often by {even:.0%}; flipped turns {flips:.0%} of right answers; {len(asked.digits)} trials, {same:.0%} more "
        f"were of one kind"
    )
    premises = [
        Premise("which of both is decoded", f"{DECODED:.0%} or more", f"{decoded:.0%}", decoded.value >= DECODED),
        Premise(
            "with the true kind answers are right", f"{1 - KNOWN:.0%} or more", f"{mean(right['true']):.0%}",
            float(right["true"].mean()) >= 1 - KNOWN,
        ),
    ]  # fmt: skip

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        at = np.arange(len(ways))
        axes.bar(at - 0.2, [float(right[name].mean()) for name in ways], 0.4, label="the attended talker's")
        axes.bar(at + 0.2, [float(wrong[name].mean()) for name in ways], 0.4, label="the other's")
        axes.set_xticks(at, [name.replace(" ", "\n") for name in ways])
        axes.set(
            ylim=(0, 1), ylabel="share of trials", xlabel="kind of voice that is named", title="Whose digit is answered"
        )
        axes.legend()

    return Finding(bool(holds), measured, expected, seed, premises=premises, draw=draw)


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[:, None])[:, 0]


def takes() -> tuple[Takes, Takes]:
    """To learn from and to be tested on: every fifth take of a digit by a talker is held out."""
    spoken = list(spoken_digits(folder("audio_fsdd") / "recordings.zip"))
    talkers = sorted({s.speaker for s in spoken})
    window = torch.hann_window(256)
    power = []
    for s in spoken:
        wave = torch.from_numpy(np.asarray(s.wave, np.float32))[:4800]  # 0.6 seconds
        wave = F.pad(wave, (0, 4800 - len(wave)))
        found = torch.stft(wave, 256, 200, window=window, return_complex=True, center=True).abs().square()
        bands = F.avg_pool1d(found[1:121].T, 120 // BANDS).T[:, :FRAMES]
        power.append(bands / bands.mean().clamp_min(1e-9))
    every = Takes(
        torch.stack(power),
        torch.tensor([s.digit for s in spoken]),
        torch.tensor([talkers.index(s.speaker) for s in spoken]),
    )
    held = torch.tensor([s.take % 5 == 0 for s in spoken])
    return Takes(*(x[~held] for x in every)), Takes(*(x[held] for x in every))


def _kinds(train: Takes) -> tuple[VoiceKinds, Tensor]:
    """Kinds of voices, and the vector of each talker [talker, dim]: K-means of means over fifty takes."""
    spectra = (train.power.mean(-1) + 1e-3).log()
    spectra = (spectra - spectra.mean(0)) / spectra.std(0)
    groups, vectors = [], []
    for talker in range(int(train.talker.max()) + 1):
        own = spectra[train.talker == talker]
        vectors.append(own.mean(0))
        groups += [
            part.mean(0) for part in own[torch.randperm(len(own), generator=torch.Generator().manual_seed(0))].split(50)
        ]
    return VoiceKinds.fit(torch.stack(groups), kinds=KINDS), torch.stack(vectors)


def trials(of: Takes, count: int, generator: torch.Generator) -> Trials:
    """Two talkers a trial, whose last digits differ."""
    places = {(t, d): ((of.talker == t) & (of.digit == d)).nonzero()[:, 0] for t in range(6) for d in range(DIGITS)}
    pairs = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(count)])
    digits = torch.randint(DIGITS, (count, 2, SAID), generator=generator)
    digits[:, 1, -1] = (digits[:, 0, -1] + torch.randint(1, DIGITS, (count,), generator=generator)) % DIGITS
    draws = torch.rand(count, 2, SAID, generator=generator)
    chosen = [
        places[int(pairs[i, t]), int(digits[i, t, k])][
            int(draws[i, t, k] * len(places[int(pairs[i, t]), int(digits[i, t, k])]))
        ]
        for i in range(count)
        for t in range(2)
        for k in range(SAID)
    ]
    power = of.power[torch.stack(chosen)].view(count, 2, SAID, BANDS, FRAMES)
    return Trials(power, digits[:, :, -1], pairs, torch.randint(2, (count,), generator=generator))


def recorded(of: Trials, brain: Tensor, delays: Tensor, generator: torch.Generator) -> Tensor:
    """What electrodes give of all that is said. [trial, time, electrode]"""
    loud = (of.power + 1e-2).log().transpose(2, 3).flatten(3)  # [trial, 2, band, time]
    rows = torch.arange(len(loud))
    heard = loud[rows, of.attended] + HEARD * loud[rows, 1 - of.attended]
    driven = torch.einsum("tbs,eb->tes", heard, brain)
    driven = torch.stack([F.pad(driven[:, e], (int(d), 0))[:, : driven.shape[-1]] for e, d in enumerate(delays)], 1)
    white = torch.fft.rfft(torch.randn(driven.shape, generator=generator))
    white[..., 0] = 0  # a recording has no mean
    pink = torch.fft.irfft(white / torch.arange(1, white.shape[-1] + 1).sqrt(), n=driven.shape[-1])
    pink = pink / pink.std()
    return ((driven - driven.mean()) / driven.std() + NOISE * pink).mT


def _words(of: Trials, kinds: Tensor) -> Tensor:
    """The question, the kinds of both streams, which is attended, and its digit. [trial, 5]"""
    chain = [torch.full_like(of.attended, ASK), *(KIND + kinds[of.talkers]).T, FIRST + of.attended]
    return torch.stack([*chain, DIGIT + _at(of.digits, of.attended)], 1)


def _teach(model: Aad, train: Takes, kinds: Tensor, steps: int, seed: int) -> None:
    """The answerer, by true kinds; pairs of one kind are left out."""
    some = trials(train, 6000, torch.Generator().manual_seed(seed))
    some = Trials(*(x[kinds[some.talkers[:, 0]] != kinds[some.talkers[:, 1]]] for x in some))
    streams, words = some.streams, _words(some, kinds)
    meant = model.kinds.centroids[_at(kinds[some.talkers], some.attended)]
    answerer = model.answerer.train()
    fit(
        answerer.parameters(),
        lambda i: answerer.loss(streams[i], meant[i], words[i], prompt=1),
        len(words),
        steps,
        seed,
        batch=BATCH,
        rate=RATE,
    )
    model.eval()


def _listen(model: Aad, recordings: Tensor, kinds: Tensor, seed: int) -> None:
    """The decoder."""
    decoder = model.decoder.train()
    fit(
        decoder.parameters(),
        lambda i: F.cross_entropy(decoder(recordings[i]), kinds[i]),
        len(kinds),
        DECODING,
        seed,
        rate=5e-3,
    )
    model.eval()


def answered(model: Aad, streams: Tensor, meant: Tensor) -> Tensor:
    """The digit at the end of the chain. [trial]"""
    prompt = torch.full((len(streams), 1), ASK)
    return model.answerer.write(streams, meant, prompt, 4)[:, -1] - DIGIT
