"""Which words people looked at as they read the text of a recording, in time, and how well the model tells it."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np

from ..cli.inputs import InputError
from ..data.loaders.fixations import ROLES
from ..extras import needs
from ..gaze.compare import measures
from .jobs import Job
from .work import Again

UNTIMED = 300.0  # ms of a fixation whose duration is not known
MOST = 200_000  # fixations in one file
WORD = (
    "word",
    "wordid",
    "wordnumber",
    "iaid",
    "interestarea",
    "currentfixinterestareaid",
    "currentfixinterestareaindex",
)


def reading(job: Job, again: Again, data: bytes) -> None:
    """Tell the fixations, reader by reader, and then what the model does with each word, with rank correlations."""
    words = tuple((again.given.text or "").split())
    if not words or again.given.turns:
        raise InputError("fixations on words are laid over a text: look at one first")
    trials, notes = _trials(data, len(words))
    job.tell("reading", words=words, trials=trials, summary=notes)
    total = np.zeros(len(words))
    for trial in trials:
        np.add.at(total, trial["places"], trial["durations"])
    job.tell("progress", what="reading the text")
    found = measures(again.loaded.model, again.loaded.processor, words)
    job.check()
    with needs("rank correlations", "claims"):
        from scipy.stats import rankdata

    def told(name: Any, values: np.ndarray) -> dict[str, Any]:
        there = np.isfinite(values)
        ranks = [rankdata(of[there]) for of in (total, values)]
        flat = there.sum() < 3 or any(np.ptp(of) == 0 for of in ranks)
        score = 0.0 if flat else float(np.corrcoef(*ranks)[0, 1])
        shown = np.where(there, values, 0) - np.nanmin(values, initial=np.inf)
        most = float(shown.max()) or 1.0
        return {"name": name, "map": (shown / most).clip(0).round(3).tolist(), "scores": {"rank correlation": score}}

    received = found["received"]
    maps = [{"name": "people", "map": (total / (total.max() or 1)).round(3).tolist(), "scores": {}}]
    maps += [told("surprisal", found["surprisal"])] if "surprisal" in found else []
    maps.append(told("rollout", found["rollout"][-1]))
    heads = [[told([layer, head], received[layer, head]) for head in range(received.shape[1])]
             for layer in range(received.shape[0])]  # fmt: skip
    table = [[one["scores"]["rank correlation"] for one in row] for row in heads]
    job.tell("maps", maps=[*maps, *(one for row in heads for one in row)], heads=table, notes=[])


def _trials(data: bytes, words: int) -> tuple[list[dict[str, Any]], list[str]]:
    """A table with a column that says the word, by its number; who read, and how long, where columns say it."""
    try:
        text = data.decode("utf-8-sig")
        head = text.partition("\n")[0]
        rows = list(csv.reader(io.StringIO(text), delimiter=max(",;\t", key=head.count)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"the file is no table: {error}") from error
    names = ["".join(c for c in name.lower() if c.isalnum()) for name in rows[0]] if rows else []

    def column(role: tuple[str, ...]) -> int | None:
        return next((names.index(name) for name in role if name in names), None)

    at, lasting, who = column(WORD), column(ROLES["duration"]), column(ROLES["subject"])
    if at is None:
        raise InputError("no column says which word was looked at: name one word, with the words' numbers")
    if len(rows) > MOST:
        raise InputError(f"the file has {len(rows):,} rows; at most {MOST:,} are read")
    found: list[tuple[str, int, float]] = []
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        try:
            duration = UNTIMED if lasting is None else float(row[lasting])
            found.append(("one person" if who is None else row[who], int(row[at]), duration))
        except (ValueError, IndexError):
            raise InputError(f"the file, line {number}: {', '.join(row)[:80]!r} has no number of a word") from None
        if not 0 <= duration < np.inf:
            raise InputError(f"the file, line {number}: a duration of {duration}")
    numbers = [word for _, word, _ in found]
    first = 1 if numbers and (max(numbers) == words or min(numbers) == 1) and min(numbers) >= 1 else 0
    if not numbers or min(numbers) < first or max(numbers) >= words + first:
        raise InputError(f"words are numbered from 0 or from 1, and the text has {words}; the file names {numbers[:5]}")
    trials: dict[str, dict[str, Any]] = {}
    for person, word, duration in found:
        one = trials.setdefault(person, {"subject": person, "trial": "", "places": [], "durations": [], "starts": []})
        one["starts"].append(one["starts"][-1] + one["durations"][-1] if one["starts"] else 0.0)
        one["places"].append(word - first)
        one["durations"].append(duration)
    notes = [
        f"{len(found):,} fixations of {len(trials):,} readers on {words} words",
        f"words are numbered from {first}",
    ]
    return list(trials.values()), notes
