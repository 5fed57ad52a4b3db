"""What goes on in time: spoken digits, heart beats, load of a grid."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import media
from .files import DataError, Files, Lazy, Table, Where, arrays, find, text


@dataclass(frozen=True, eq=False)
class SpokenDigit:
    """One person saying one digit. wave: float32 [sample], -1 to 1; rate: samples a second"""

    digit: int
    speaker: str
    take: int
    wave: NDArray[np.float32]
    rate: int


def spoken_digits(where: Where) -> Lazy[SpokenDigit]:
    """Digits spoken in English. where: a zip or folder with `{digit}_{speaker}_{take}.wav`, 16-bit, one channel.

    Jackson et al., Free Spoken Digit Dataset (github.com/Jakobovski/free-spoken-digit-dataset). Licence CC BY-SA 4.0.
    """
    files = Files(where)
    matched = [(name, m) for name in files.names if (m := re.search(r"(?:^|/)(\d)_([^_/]+)_(\d+)\.wav$", name))]
    if not matched:
        raise DataError(f"{files.where}: no files such as 7_jackson_0.wav in it")

    return Lazy([(name, int(m[1]), m[2], int(m[3])) for name, m in matched], partial(_digit, files))


def _digit(files: Files, key: tuple[str, int, str, int]) -> SpokenDigit:
    name, *said = key
    sound = media.sound(files.read(name), f"{files.where}, {name}")
    if sound.channels != 1 or sound.bits != 16:
        found = f"{sound.channels} channels of {sound.bits} bits"
        raise DataError(f"{files.where}, {name}: {found}; expected one channel of 16 bits")
    return SpokenDigit(*said, sound.wave, sound.rate)


@dataclass(frozen=True, eq=False)
class Ecg:
    """An electrocardiogram with marked beats.

    signal: float32 [sample, lead], mV
    rate: samples a second
    beats: int64 [beat], the sample of each mark
    symbols: what each mark is, in the code of PhysioNet: N normal, A atrial premature, V ventricular premature, ...
        "+" is a note on the rhythm and no beat
    """

    signal: NDArray[np.float32]
    rate: float
    leads: tuple[str, ...]
    beats: NDArray[np.int64]
    symbols: tuple[str, ...]


# PhysioNet's codes of annotations, 1 to 41
_CODES = {code: mark for code, mark in enumerate('NLRaVFJASEj/Q~ | sT*D"=pB^t+u?![]en@xf()r', 1) if mark != " "}
_SKIP, _AUXILIARY, _NO_TIME = 59, 63, (60, 61, 62)


def mitbih(where: Where, record: str = "100") -> Ecg:
    """A record of the MIT-BIH Arrhythmia Database: two leads for half an hour, every beat labelled.

    where: the folder with `{record}.hea`, `{record}.dat` (format 212) and `{record}.atr`, or an npz file with
    signal_adu [sample, lead], fs, gain, baseline, leads, beat_sample and beat_symbol.

    Moody and Mark, The impact of the MIT-BIH Arrhythmia Database (IEEE Eng. Med. Biol., 2001), from PhysioNet. Licence
    ODC-By 1.0.
    """
    path = find(where, f"{record}.hea", f"mitdb_{record}.npz")
    if path.suffix != ".npz":
        return _wfdb(path)
    names = ("signal_adu", "fs", "gain", "baseline", "leads", "beat_sample", "beat_symbol")
    held = arrays(path, *names)
    units, leads = held["signal_adu"], tuple(map(str, held["leads"]))
    beats, symbols = held["beat_sample"].astype(np.int64), tuple(map(str, held["beat_symbol"]))
    if units.ndim != 2 or units.shape[1] != len(leads):
        raise DataError(f"{path}: signal_adu has shape {units.shape}, expected [sample, {len(leads)}]")
    signal = (units.astype(np.float32) - held["baseline"]) / held["gain"]
    return _marked(path, signal.astype(np.float32), float(held["fs"]), leads, beats, symbols)


def _marked(
    path: Path,
    signal: NDArray[np.float32],
    rate: float,
    leads: tuple[str, ...],
    beats: NDArray[np.int64],
    symbols: tuple[str, ...],
) -> Ecg:
    ordered = (np.diff(beats, prepend=0, append=len(signal) - 1) >= 0).all()
    if len(beats) != len(symbols) or not ordered:
        raise DataError(f"{path}: marks do not run in order within the {len(signal):,} samples")
    return Ecg(signal, rate, leads, beats, symbols)


def _wfdb(header: Path) -> Ecg:
    lines = [line.split() for line in text(header).splitlines() if line.strip() and not line.startswith("#")]
    try:
        _, count, rate, samples = (lines[0][i] for i in range(4))
        count, rate, samples = int(count), float(rate.partition("/")[0]), int(samples)
        leads = [
            (file, kind, float(gain.partition("/")[0].partition("(")[0]), int(zero), int(check), name)
            for file, kind, gain, _, zero, _, check, _, name in (line[:9] for line in lines[1 : count + 1])
        ]
    except (IndexError, ValueError) as error:
        raise DataError(f"{header}: not a header of two leads with gain, zero and checksum ({error})") from error
    if count != 2 or len(leads) != 2 or len({(file, kind) for file, kind, *_ in leads}) != 1 or leads[0][1] != "212":
        raise DataError(f"{header}: expected two leads in one file of format 212, got {[lead[:2] for lead in leads]}")
    data = header.parent / leads[0][0]
    raw = np.frombuffer(data.read_bytes(), np.uint8).astype(np.int64)
    if len(raw) != 3 * samples:
        raise DataError(f"{data}: {len(raw):,} bytes, but {samples:,} samples need {3 * samples:,}; get it again")
    low, high, second = raw.reshape(-1, 3).T
    units = np.stack([low | (high & 0x0F) << 8, second | (high & 0xF0) << 4], -1)
    units -= (units >= 2048) * 4096
    for k, (*_, check, name) in enumerate(leads):
        if (int(units[:, k].sum()) - check) % 65536:
            raise DataError(f"{data}: lead {name} does not have the checksum of {header.name}; get it again")
    zero, gain = np.array([lead[3] for lead in leads]), np.array([lead[2] for lead in leads])
    signal = ((units - zero) / gain).astype(np.float32)
    return _marked(header, signal, rate, tuple(lead[5] for lead in leads), *_annotations(header.with_suffix(".atr")))


def _annotations(path: Path) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Pairs of bytes: six bits of code, ten of samples since the last mark; 0 0 ends the file."""
    raw = path.read_bytes()
    time, at, beats, symbols = 0, 0, [], []
    while at + 2 <= len(raw):
        pair = int.from_bytes(raw[at : at + 2], "little")
        code, value = pair >> 10, pair & 0x3FF
        at += 2
        if code == 0 and value == 0:
            return np.array(beats, np.int64), tuple(symbols)
        if code == _SKIP:  # a longer interval follows, its high half first
            high, low = (int.from_bytes(raw[at + i : at + i + 2], "little") for i in (0, 2))
            interval = high << 16 | low
            time += interval - (interval >> 31 << 32)
            at += 4
        elif code == _AUXILIARY:  # so many bytes of text follow
            at += value + value % 2
        elif code not in _NO_TIME:
            time += value
            if code not in _CODES:
                raise DataError(f"{path}, byte {at - 2}: there is no annotation with code {code}")
            beats.append(time)
            symbols.append(_CODES[code])
    raise DataError(f"{path}: ends without an end mark; get it again")


@dataclass(frozen=True, eq=False)
class Series:
    """Several series with one clock. time: datetime64[s] [step]; values: float32 [step, series]"""

    time: NDArray[np.datetime64]
    values: NDArray[np.float32]
    names: tuple[str, ...]


def ett(where: Where, name: str = "ETTh1") -> Series:
    """Loads of an electricity transformer and its oil temperature (OT, in degrees Celsius), the last series.

    where: a CSV file with a column date and series beside it at even steps, or the folder with `{name}.csv`.

    Zhou et al., Informer (arXiv:2012.07436). Licence CC BY-ND 4.0: pass the file on whole or not at all.
    """
    table = Table(find(where, f"{name}.csv"), "date")
    names = tuple(n for n in table.names if n != "date")
    time = table.times("date", "s")
    steps = np.diff(time)
    uneven = (steps != steps[:1]) | (steps <= np.timedelta64(0))
    if uneven.any():
        raise table.error(int(uneven.argmax()) + 1, "date", "even steps forward")
    values = np.stack([table.numbers(n, np.float32) for n in names], -1)
    return Series(time, values, names)
