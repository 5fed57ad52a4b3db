"""Fixations that people recorded themselves: tables of any columns, and EyeLink's text files.

What a file means is guessed from its header and its numbers; every guess is told (`print(read_gaze(...))`) and can be
corrected. What cannot be read is an error with file, line and column, or, where that is asked for, left out and listed.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .. import media
from .._common import DataError, known
from .files import Where, content, csv_rows
from .gaze import Scanpath, visual_search, webqamgaze

Units = Literal["pixels", "degrees", "share"]
UNITS = ("pixels", "degrees", "share")
TIMES = {"ms": 1.0, "s": 1000.0}
PLACED = ("centre", "fit", "fill")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
TABLES = (".csv", ".tsv", ".txt", ".asc")
MISSING = {"", ".", "-", "na", "n/a", "nan", "null", "none", "missing"}
TRIAL = r"TRIALID\s+(.*)"  # what EyeLink's own software says
STIMULUS = r"!V (?:TRIAL_VAR\s+(?:stimulus|image|picture|img|stim)\w*\s+|IMGLOAD\s+\w+\s+)(\S+)"
MOST_LISTED = 5  # rows in one message

# What columns are called, without case and punctuation; the first that is there is taken.
_ROLES = {
    "subject": (
        "subject subjectid subjectnr subjectname subj subjid sub participant participantid participantname "
        "participantnr recordingsessionlabel ppt pp observer observerid reader readerid viewer"
    ),
    "stimulus": (
        "stimulus stimulusid stimulusname stim image imageid imagename imagefile img picture pictureid picturename "
        "scene sceneid presentedstimulusname presentedmedianame medianame filename textid text itemid item page"
    ),
    "trial": "trial trialid trialindex trialnr trialnumber trialno",
    "x": (
        "x fixx xfix currentfixx fixationx xfixation fixationpointx xpos posx positionx xposition meanx xmean avgx "
        "xavg gazex locationx xpx xpixel xdeg xdegrees fixxpos axp"
    ),
    "y": (
        "y fixy yfix currentfixy fixationy yfixation fixationpointy ypos posy positiony yposition meany ymean avgy "
        "yavg gazey locationy ypx ypixel ydeg ydegrees fixypos ayp"
    ),
    "duration": (
        "duration durationms dur durms durs durations fixdur fixduration fixdurms fixdurationms currentfixduration "
        "fixationduration fixationdurationms gazeeventduration gazeeventdurationms eventduration durationsec "
        "durationseconds"
    ),
    "start": (
        "start starttime startms starts onset onsetms begin tms t time timestart currentfixstart fixstart "
        "fixationstart starttimems timestamp timems"
    ),
    "end": ("end endtime endms ends offset offsetms stop timeend currentfixend fixend fixationend endtimems"),
    "order": (
        "fixationindex fixindex currentfixindex fixationnumber fixnumber fixationid fixid fixation fixnr order index "
        "eyemovementtypeindex"
    ),
}
ROLES = {role: tuple(names.split()) for role, names in _ROLES.items()}
NUMBERS = ("x", "y", "duration", "start", "end", "order")


class LeftOut(NamedTuple):
    """A row that was not read, and why."""

    file: str
    line: int
    column: str
    why: str

    def __str__(self) -> str:
        column = f", column {self.column}" if self.column else ""
        return f"{self.file}, line {self.line}{column}: {self.why}"


@dataclass(frozen=True, eq=False)
class GazeTrial:
    """One person looking at one picture or text once.

    trial: what the file calls it, "" where it has no name. starts: float [fixation], ms as the file counts them, of an
    `.asc` from the trial's begin; None where they are not known.
    """

    subject: str
    stimulus: str
    trial: str
    scanpath: Scanpath
    starts: NDArray[np.floating] | None = None


@dataclass(frozen=True, eq=False)
class GazeData:
    """Scanpaths of several people on several pictures or texts, and how they were read. `print` it to see that.

    trials: in the order of the file. stimulus_folder: where the pictures lie, None where that was not said.
    degree: pixels of one degree of visual angle at the screen's middle, None where distance and size are not known.
    notes: what was guessed or found; left_out: rows that were not read, where that was asked for.
    """

    trials: tuple[GazeTrial, ...]
    source: str = ""
    stimulus_folder: Path | None = None
    degree: float | None = None
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.trials)

    def __iter__(self) -> Iterator[GazeTrial]:
        return iter(self.trials)

    @property
    def subjects(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(trial.subject for trial in self.trials))

    @property
    def stimuli(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(trial.stimulus for trial in self.trials))

    def of(self, stimulus: str) -> list[GazeTrial]:
        """The trials with this picture or text."""
        return [trial for trial in self.trials if trial.stimulus == stimulus]

    def only(self, *, subjects: Iterable[str] | None = None, stimuli: Iterable[str] | None = None) -> GazeData:
        """The trials of these people, with these pictures. KeyError for one that is not there."""
        kept = self.trials
        for what, names, there in (("subject", subjects, self.subjects), ("stimulus", stimuli, self.stimuli)):
            if names is None:
                continue
            chosen = set(names)
            if missing := sorted(chosen - set(there)):
                near = difflib.get_close_matches(missing[0], there, n=2)
                raise KeyError(f"no {what} {missing[0]!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
            kept = tuple(trial for trial in kept if getattr(trial, what) in chosen)
        return replace(self, trials=kept)

    def later(self, skip: int) -> GazeData:
        """Without the first `skip` fixations of each trial, such as the one on the cross; empty trials go."""
        if skip < 0:
            raise ValueError(f"skip={skip}: a number of fixations, 0 or more")
        cut = [replace(trial, **_cut(trial, slice(skip, None))) for trial in self.trials]
        kept = tuple(trial for trial in cut if len(trial.scanpath))
        gone = f", which left nothing of {len(cut) - len(kept)} trials" if len(kept) < len(cut) else ""
        note = f"the first {skip} fixations of each trial do not count{gone}"
        return replace(self, trials=kept, notes=(*self.notes, note)) if skip else self

    def picture(self, stimulus: str) -> Image.Image:
        """The picture of a stimulus, from the folder. FileNotFoundError where it is not there."""
        return media.picture(self.picture_file(stimulus), stimulus)

    def picture_file(self, stimulus: str) -> Path:
        """A file of the stimulus' name, with or without a picture's ending, in any case of letters."""
        if self.stimulus_folder is None:
            raise FileNotFoundError(
                f"no folder of pictures was given, so {stimulus!r} cannot be shown: stimulus_folder="
            )
        found = _named(self.stimulus_folder, stimulus)
        if found is None:
            raise FileNotFoundError(f"{self.stimulus_folder} holds no picture {stimulus!r}")
        return found

    def write(self, path: Where) -> None:
        """A CSV file that `read_gaze` reads again: one fixation a row, pixels and ms."""
        timed = any(trial.scanpath.durations is not None for trial in self.trials)
        started = all(trial.starts is not None for trial in self.trials) and bool(self.trials)
        names = ["subject", "stimulus", "trial", "x", "y"] + ["duration"] * timed + ["start"] * started
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(names)
            for trial in self.trials:
                durations = trial.scanpath.durations
                for i, (x, y) in enumerate(trial.scanpath.places.tolist()):
                    row = [trial.subject, trial.stimulus, trial.trial, repr(x), repr(y)]
                    row += ["" if durations is None else repr(float(durations[i]))] * timed
                    row += [repr(float(trial.starts[i])) for _ in range(started) if trial.starts is not None]
                    table.writerow(row)

    def summary(self) -> str:
        """What was read, and how, in lines."""
        fixations = sum(len(trial.scanpath) for trial in self.trials)
        lines = [
            f"{fixations:,} fixations in {len(self):,} trial{'s' * (len(self) != 1)}: "
            f"{_counted(self.subjects, 'subject')}, "
            f"{_counted(self.stimuli, 'stimulus', 'stimuli')}"
        ]
        sizes = Counter(trial.scanpath.size for trial in self.trials)
        if sizes:
            shown = ", ".join(f"{w} x {h}" for (w, h), _ in sizes.most_common(3)) + ", ..." * (len(sizes) > 3)
            outside = sum(int(_outside(trial.scanpath).sum()) for trial in self.trials)
            off = f"; {outside:,} fixations ({outside / max(fixations, 1):.1%}) lie outside" if outside else ""
            lines.append(f"screen of {shown} pixels{off}")
        timed = [t.scanpath.durations for t in self.trials if t.scanpath.durations is not None]
        if timed:
            middle, low, high = (float(f(np.concatenate(timed))) for f in (np.median, np.min, np.max))
            untimed = len(self.trials) - len(timed)
            without = f"; {untimed:,} trials have none" if untimed else ""
            lines.append(f"durations of {low:.0f} to {high:.0f} ms, median {middle:.0f}{without}")
        elif self.trials:
            lines.append("no durations")
        if self.degree:
            lines.append(f"one degree is {self.degree:.1f} pixels")
        lines += self.notes
        if self.left_out:
            lines.append(f"{len(self.left_out):,} rows were left out:")
            lines += [f"  {one}" for one in self.left_out[:MOST_LISTED]]
            if len(self.left_out) > MOST_LISTED:
                lines.append(f"  and {len(self.left_out) - MOST_LISTED:,} more, in .left_out")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<GazeData {self.source}\n{self.summary()}>"


def read_gaze(
    where: Where,
    *,
    columns: Mapping[str, str | None] | None = None,
    screen: tuple[int, int] | None = None,
    stimulus_folder: Where | None = None,
    units: Units = "pixels",
    origin: Literal["corner", "centre"] | None = None,
    up: bool = False,
    distance: float | None = None,
    screen_cm: tuple[float, float] | None = None,
    time: Literal["ms", "s"] | None = None,
    separator: str | None = None,
    decimal: Literal[".", ","] | None = None,
    encoding: str | None = None,
    only: Mapping[str, str] | None = None,
    subject: str | None = None,
    stimulus: str | None = None,
    eye: Literal["left", "right"] | None = None,
    trial_message: str = TRIAL,
    stimulus_message: str = STIMULUS,
    keep_going: bool = False,
) -> GazeData:
    """Fixations of your own data: CSV, TSV, fixation reports, EyeLink's `.asc`, or a set that Regard knows.

    Columns, separator, decimal comma and the unit of time are guessed, told in the result, and set by the arguments.

    where: a file (also .gz), a folder of such files, the folder of WebQAmGaze, or one of `visual_search`.
    columns: what your columns are called, of `subject`, `stimulus`, `trial`, `x`, `y`, `duration`, `start`, `end`,
        `order`; those left out are guessed, and None says that there is none. x and y are needed.
    screen: width and height in pixels of what x and y are in; that of the pictures otherwise, where they have one.
    stimulus_folder: pictures, named as the stimuli are.
    units: pixels, degrees of visual angle from the screen's middle (which needs screen, distance, screen_cm), or shares
        of the screen, 0 to 1. origin: where x and y are 0, the left top corner, or the centre, as degrees always are.
        up: whether y grows upwards (then the corner is the left lower one). distance: from eye to screen in cm.
        screen_cm: width and height of the screen in cm.
    only: {column: value} of the rows that are fixations, or of one condition; others are counted and set aside.
    subject, stimulus: a name for all rows of a file without such a column.
    eye: of recordings of both. trial_message, stimulus_message: regular expressions of what an `.asc` says as a trial
        begins, and of its picture, each with one group.
    keep_going: broken rows are left out, and listed in `left_out`; otherwise the first is a DataError.

    Fixations outside the screen are kept, and counted. Broken are rows with too few or many cells, a missing or wrong
    number, a name that is missing, a negative duration, and a fixation that begins before the last one ended.

    DataError says file, line and column. ValueError for arguments that do not fit together.

        data = regard.gaze.read("fixations.csv", screen=(1920, 1080), stimulus_folder="pictures")
        print(data)
    """
    known("unit", units, UNITS)
    reader = _Reader(
        columns=dict(columns or {}),
        screen=screen,
        units=units,
        origin=origin or ("centre" if units == "degrees" else "corner"),
        up=up,
        distance=distance,
        screen_cm=screen_cm,
        time=time,
        separator=separator,
        decimal=decimal,
        encoding=encoding,
        only=dict(only or {}),
        subject=subject,
        stimulus=stimulus,
        eye=eye,
        trial_message=trial_message,
        stimulus_message=stimulus_message,
        keep_going=keep_going,
        pictures=None if stimulus_folder is None else Path(stimulus_folder),
    )
    reader.check()
    path = Path(where)
    if reader.pictures is not None and not reader.pictures.is_dir():
        raise NotADirectoryError(f"stimulus_folder: {reader.pictures} is no folder")
    if known_set := _known_set(path):
        usual = vars(_Reader(pictures=reader.pictures))
        if given := [name for name, value in vars(reader).items() if value != usual[name]]:
            raise ValueError(f"{path} is a set that says all of its fixations itself; leave out {', '.join(given)}")
        data = known_set(path)
        return replace(data, source=str(where), stimulus_folder=reader.pictures)
    return replace(reader.read(path), source=str(where))


def _known_set(path: Path) -> Callable[[Path], GazeData] | None:
    if path.is_dir():
        names = {file.name.removesuffix(".gz") for file in path.iterdir()}
        if any(re.fullmatch(r"words_\w+\.csv", name) for name in names):
            return _of_readings
        return _of_searches if names & {"scanpaths.json", "human_scanpaths"} else None
    return _of_searches if path.name.removesuffix(".gz").endswith(".json") else None


def _of_searches(path: Path) -> GazeData:
    trials = [GazeTrial(t.subject, t.image, "", t.scanpath) for t in visual_search(path)]
    note = "a set of visual search; its pictures are no part of it"
    return GazeData(tuple(t for t in trials if len(t.scanpath)), notes=(note,))


def _of_readings(path: Path) -> GazeData:
    """Pages of one name and several texts get a number behind the name."""
    languages = sorted(f.name for f in path.iterdir() if f.name.startswith("words_"))
    language = languages[0].removeprefix("words_").partition(".")[0]
    pages: dict[str, dict[tuple[str, ...], int]] = defaultdict(dict)
    trials = []
    for reading in webqamgaze(path, language):
        number = pages[reading.text_id].setdefault(reading.words, len(pages[reading.text_id]) + 1)
        name = reading.text_id if number == 1 else f"{reading.text_id} ({number})"
        starts = reading.fixations[:, 2]
        if len(reading.fixations):
            trials.append(GazeTrial(reading.participant, name, reading.task, reading.scanpath, starts))
    return GazeData(tuple(trials), notes=("WebQAmGaze: pages of text; pictures of them are no part of it",))


class _Row(NamedTuple):
    """A fixation as the file has it."""

    file: str
    line: int
    subject: str
    stimulus: str
    trial: str
    x: float
    y: float
    duration: float
    start: float
    order: float


class _Broken(Exception):
    def __init__(self, line: int, column: str, why: str) -> None:
        self.line, self.column, self.why = line, column, why


@dataclass
class _Reader:
    columns: dict[str, str | None] = field(default_factory=dict)
    screen: tuple[int, int] | None = None
    units: str = "pixels"
    origin: str = "corner"
    up: bool = False
    distance: float | None = None
    screen_cm: tuple[float, float] | None = None
    time: str | None = None
    separator: str | None = None
    decimal: str | None = None
    encoding: str | None = None
    only: dict[str, str] = field(default_factory=dict)
    subject: str | None = None
    stimulus: str | None = None
    eye: str | None = None
    trial_message: str = TRIAL
    stimulus_message: str = STIMULUS
    keep_going: bool = False
    pictures: Path | None = None
    notes: list[str] = field(default_factory=list)
    broken: list[LeftOut] = field(default_factory=list)
    rows: list[_Row] = field(default_factory=list)
    called: dict[str, str] = field(default_factory=dict)  # role -> column, for messages
    clocked: bool = False

    def check(self) -> None:
        for role in self.columns:
            if role not in ROLES:
                near = difflib.get_close_matches(role, ROLES, n=1)
                guess = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"columns: there is no role {role!r}, only {', '.join(ROLES)}{guess}")
        if self.screen is not None and (len(self.screen) != 2 or min(self.screen) < 1):
            raise ValueError(f"screen={self.screen}: width and height in pixels")
        known("origin", self.origin, ("corner", "centre"))
        if (self.distance is None) != (self.screen_cm is None):
            raise ValueError("distance and screen_cm (both in cm) are given together, or not at all")
        if self.distance is not None and min(self.distance, *(self.screen_cm or ())) <= 0:
            raise ValueError(f"distance={self.distance}, screen_cm={self.screen_cm}: lengths in cm, above 0")
        if self.units == "degrees":
            if self.screen is None or self.distance is None:
                raise ValueError(
                    "units='degrees' need screen=(width, height) in pixels, screen_cm=(width, height) and distance=, "
                    "both in cm"
                )
            if self.origin != "centre":
                raise ValueError("degrees are counted from the screen's middle: leave origin out, or say 'centre'")
        if self.time is not None:
            known("unit of time", self.time, TIMES)
        if self.decimal is not None:
            known("decimal sign", self.decimal, (".", ","))
        if self.eye is not None:
            known("eye", self.eye, ("left", "right"))
        for name in ("trial_message", "stimulus_message"):
            try:
                groups = re.compile(getattr(self, name)).groups
            except re.error as error:
                raise ValueError(f"{name}: not a regular expression ({error})") from None
            if groups != 1:
                raise ValueError(f"{name}: needs one group, for the name; got {groups}")

    def read(self, path: Path) -> GazeData:
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file or folder")
        files = [path]
        if path.is_dir():
            plain = {file: Path(file.name.removesuffix(".gz")).suffix.lower() for file in path.iterdir()}
            files = sorted(file for file, suffix in plain.items() if suffix in TABLES and file.is_file())
            if not files:
                raise FileNotFoundError(f"{path} holds no {', '.join(TABLES)}")
            self.notes.append(f"{len(files)} files, from {files[0].name} to {files[-1].name}")
        for file in files:
            text = self._text(file)
            before = len(self.rows)
            if file.name.removesuffix(".gz").lower().endswith(".asc"):
                self._asc(file, text)
            else:
                self._table(file, text, folder=path.is_dir())
            if len(self.rows) == before and not self.broken:
                raise DataError(f"{file}: holds no fixation")
        trials = self._trials()
        self.broken.sort(key=lambda one: (one.file, one.line))
        self._refuse_broken()
        if not trials:
            raise DataError(f"{path}: no row could be read; the first: {self.broken[0]}")
        self._doubt(trials, path)
        return GazeData(
            tuple(trials),
            stimulus_folder=self.pictures,
            degree=self._degree(),
            notes=tuple(dict.fromkeys(self.notes)),
            left_out=tuple(self.broken),
        )

    def _refuse_broken(self) -> None:
        if not self.broken or self.keep_going:
            return
        first, more = self.broken[0], self.broken[1:]
        others = ""
        if more:
            listed = ", ".join(str(one.line) for one in more[:MOST_LISTED])
            others = f"; {len(more)} more rows are broken, in lines {listed}{', ...' * (len(more) > MOST_LISTED)}"
        raise DataError(f"{first}{others}. keep_going=True leaves such rows out, and lists them")

    def _text(self, file: Path) -> str:
        raw = content(file)
        marks = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
        code = self.encoding or next((code for mark, code in marks.items() if raw.startswith(mark)), "utf-8")
        if self.encoding is None and code != "utf-8":
            self.notes.append(f"encoded as {code}, as its first bytes say")
        try:
            return raw.decode(code)
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n") + 1
            raise DataError(f"{file}, line {line}: not {code} text; say which, such as encoding='cp1252'") from None
        except LookupError:
            raise ValueError(f"encoding={self.encoding!r}: Python knows none of that name") from None

    # Tables

    def _table(self, file: Path, text: str, *, folder: bool) -> None:
        separator = self.separator or _separator(text)
        try:
            lines = list(_cells(text, separator))
        except csv.Error as error:
            raise DataError(f"{file}: {error}; a quote is left open, perhaps") from error
        if not lines:
            raise DataError(f"{file}: empty")
        (_, header), *rows = lines
        header = [name.strip() for name in header]
        if twice := [name for name, n in Counter(header).items() if n > 1 and name]:
            raise DataError(f"{file}, line 1: two columns are named {twice[0]!r}; give one another name")
        if not rows:
            raise DataError(f"{file}: a header and no rows")
        named = self._named(header, file)
        shown = {"\t": "tabs", ",": "commas", ";": "semicolons", " ": "blanks", "|": "bars"}.get(separator, separator)
        self.notes.append(
            f"separated by {shown}; " + ", ".join(f"{role} = {header[at]!r}" for role, at in named.items())
        )
        self.called |= {role: header[at] for role, at in named.items()}
        wanted = self._wanted(header, file)
        whole: list[tuple[int, list[str]]] = []
        for line, cells in rows:
            if len(cells) != len(header):
                self._leave(file, line, "", f"{len(cells)} cells, expected {len(header)}")
            else:
                whole.append((line, [cell.strip() for cell in cells]))
        kept = [(line, cells) for line, cells in whole if all(cells[at] == value for at, value in wanted.items())]
        if wanted:
            said = ", ".join(f"{header[at]} = {value!r}" for at, value in wanted.items())
            self.notes.append(f"{len(whole) - len(kept):,} rows were set aside: only those with {said} count")
            if whole and not kept:
                at = next(iter(wanted))
                there = list(dict.fromkeys(cells[at] for _, cells in whole))[:MOST_LISTED]
                raise DataError(f"{file}, column {header[at]}: never {wanted[at]!r}; it has {', '.join(there)}")
        numeric = [at for role, at in named.items() if role in NUMBERS]
        decimal = self.decimal or _decimal(kept, numeric, separator)
        if decimal == ",":
            self.notes.append("numbers with a decimal comma")
        scale, said = self._time(kept, named, header, decimal)
        if said:
            self.notes.append(said)
        self.clocked |= "start" in named
        constant = {"subject": self.subject, "stimulus": self.stimulus, "trial": ""}
        if "subject" not in named and self.subject is None:
            if not folder:
                raise DataError(
                    f"{file}: no column says who looked; it has {', '.join(header)}. Say columns={{'subject': ...}}, "
                    f"or subject='p1' where all rows are of one person"
                )
            constant["subject"] = file.name.partition(".")[0]
            self.notes.append("subjects are named by their files")
        if "stimulus" not in named and self.stimulus is None:
            raise DataError(
                f"{file}: no column says what was looked at; it has {', '.join(header)}. Say "
                f"columns={{'stimulus': ...}}, or stimulus='cat.jpg' where all rows are of one picture"
            )
        for line, cells in kept:
            try:
                self.rows.append(self._row(file, line, cells, named, header, decimal, scale, constant))
            except _Broken as why:
                self._leave(file, why.line, why.column, why.why)

    def _named(self, header: list[str], file: Path) -> dict[str, int]:
        """Role -> which column."""
        bare = [re.sub(r"[\W_]+", "", name.lower()) for name in header]
        found: dict[str, int] = {}
        for role, names in ROLES.items():
            if role in self.columns:
                column = self.columns[role]
                if column is None:
                    continue
                if column not in header:
                    near = difflib.get_close_matches(column, header, n=1)
                    guess = f"; did you mean {near[0]!r}?" if near else ""
                    raise DataError(f"{file}: no column {column!r} for {role}; it has {', '.join(header)}{guess}")
                found[role] = header.index(column)
            elif (role == "subject" and self.subject is not None) or (role == "stimulus" and self.stimulus is not None):
                continue  # a name for all rows was given
            else:
                taken = {header.index(c) for c in self.columns.values() if c in header} | set(found.values())
                at = next((bare.index(name) for name in names if name in bare and bare.index(name) not in taken), None)
                if at is not None:
                    found[role] = at
        if missing := [axis for axis in ("x", "y") if axis not in found]:
            raise DataError(
                f"{file}: no column for {' and '.join(missing)} was recognised among {', '.join(header)}; say "
                f"columns={{{', '.join(f'{axis!r}: ...' for axis in missing)}}}"
                + ("" if len(header) > 1 else ", or which separator=")
                + (". The first line has numbers: put names of columns above it" if _numbers(header) else "")
            )
        return found

    def _wanted(self, header: list[str], file: Path) -> dict[int, str]:
        for name in self.only:
            if name not in header:
                raise DataError(f"{file}: only={{{name!r}: ...}}: no such column; it has {', '.join(header)}")
        return {header.index(name): str(value) for name, value in self.only.items()}

    def _time(
        self, rows: list[tuple[int, list[str]]], named: Mapping[str, int], header: list[str], decimal: str
    ) -> tuple[float, str]:
        """How many ms a unit of time is, and how that is known."""
        there = [role for role in ("duration", "start", "end") if role in named]
        if not there:
            return 1.0, ""
        if self.time is not None:
            return TIMES[self.time], f"times are in {self.time}"
        at = named.get("duration")
        if at is not None:
            values = [v for _, cells in rows if (v := _number(cells[at], decimal)) is not None]
        elif "end" in named:
            pairs = (
                [(_number(c[named["start"]], decimal), _number(c[named["end"]], decimal)) for _, c in rows]
                if ("start" in named)
                else []
            )
            values = [e - s for s, e in pairs if s is not None and e is not None]
        else:
            return 1.0, "times are taken for ms"
        middle = float(np.median(values)) if values else math.nan
        unit = "s" if middle < 10 else "ms"  # nobody fixates for less than 10 ms, or longer than 10 s
        return TIMES[unit], f"times are taken for {unit}: the median duration is {middle:g}"

    def _row(
        self,
        file: Path,
        line: int,
        cells: list[str],
        named: Mapping[str, int],
        header: list[str],
        decimal: str,
        scale: float,
        constant: Mapping[str, str | None],
    ) -> _Row:
        names = {}
        for role in ("subject", "stimulus", "trial"):
            if role in named:
                if cells[named[role]].lower() in MISSING and not (role == "trial" and cells[named[role]] == ""):
                    raise _Broken(line, header[named[role]], f"no {role}, got {cells[named[role]]!r}")
                names[role] = cells[named[role]]
            else:
                names[role] = constant[role] or ""
        values = {}
        for role in NUMBERS:
            if role not in named:
                continue
            cell = cells[named[role]]
            if cell.lower() in MISSING:
                raise _Broken(line, header[named[role]], f"missing, got {cell!r}")
            value = _number(cell, decimal)
            if value is None:
                comma = " (numbers have a decimal comma elsewhere)" if decimal == "," and "." in cell else ""
                raise _Broken(line, header[named[role]], f"expected a number, got {cell!r}{comma}")
            values[role] = value * (scale if role in ("duration", "start", "end") else 1.0)
        start, duration = values.get("start", math.nan), values.get("duration", math.nan)
        told = "duration" if "duration" in named else "end"
        if "duration" not in named and "end" in values and "start" in values:
            duration = values["end"] - start
        if duration < 0:
            raise _Broken(line, header[named[told]], f"a duration of {duration:g} ms is below 0")
        return _Row(
            str(file),
            line,
            **names,
            x=values["x"],
            y=values["y"],
            duration=duration,
            start=start,
            order=values.get("order", math.nan),
        )

    # EyeLink

    def _asc(self, file: Path, text: str) -> None:
        subject = self.subject or file.name.partition(".")[0]
        fixations: list[
            tuple[int, str, str, list[str], float, str | None]
        ] = []  # line, eye, trial, cells, begin, block
        trial, begin, block = None, math.nan, 0
        stimulus_of: dict[str, str] = {}
        samples = outside = 0
        messages: list[str] = []
        for number, line in enumerate(text.splitlines(), 1):
            cells = line.split()
            if not cells:
                continue
            if cells[0] == "MSG" and len(cells) > 2:
                said = line.split(None, 2)[2].strip()
                if found := re.search(self.trial_message, said):
                    block += 1
                    trial, begin = f"{block}\n{found[1].strip()}", _float(cells[1])
                elif found := re.search(self.stimulus_message, said):
                    if trial is not None:
                        stimulus_of.setdefault(trial, found[1])
                elif found := re.search(r"(?:DISPLAY|GAZE)_COORDS\s+([\d.\s-]+)", said):
                    corners = [float(v) for v in found[1].split()[:4]]
                    if self.screen is None and len(corners) == 4:
                        self.screen = (round(corners[2] - corners[0] + 1), round(corners[3] - corners[1] + 1))
                        self.notes.append(f"screen of {self.screen[0]} x {self.screen[1]} as line {number} says")
                elif len(messages) < 3 and trial is None:
                    messages.append(said[:60])
            elif cells[0] == "EFIX":
                if trial is None:
                    outside += 1
                else:
                    fixations.append((number, cells[1] if len(cells) > 1 else "", trial, cells, begin, None))
            elif cells[0][0].isdigit():
                samples += 1
        if not fixations:
            if samples and not outside:
                raise DataError(
                    f"{file}: {samples:,} raw samples and no fixations (EFIX). Have them found: edf2asc writes EFIX "
                    f"lines unless it is told -s or -ne; or use pymovements (gaze.from_asc, pix2deg, pos2vel, "
                    f"detect('ivt')), and write its fixations as a table"
                )
            if outside:
                raise DataError(
                    f"{file}: {outside:,} fixations, and no message begins a trial as trial_message="
                    f"{self.trial_message!r} says; there are messages such as {'; '.join(messages) or 'none'}"
                )
            raise DataError(f"{file}: no fixations (EFIX) and no samples; is it what edf2asc wrote?")
        eyes = Counter(eye for _, eye, *_ in fixations)
        if len(eyes) > 1 and self.eye is None:
            raise DataError(f"{file}: both eyes were recorded ({dict(eyes)}); say eye='left' or eye='right'")
        chosen = {"left": "L", "right": "R"}[self.eye] if self.eye else next(iter(eyes))
        if chosen not in eyes:
            raise DataError(f"{file}: no fixation of the {self.eye} eye; it has {', '.join(eyes)}")
        if outside:
            self.notes.append(f"{outside:,} fixations before the first trial were set aside")
        if len(eyes) > 1:
            self.notes.append(f"{eyes.total() - eyes[chosen]:,} fixations of the other eye were set aside")
        self.notes.append(f"EyeLink: trials by {self.trial_message!r}, times in ms")
        self.clocked = True
        self.called |= {"start": "start", "x": "x", "y": "y"}
        for number, eye, name, cells, began, _ in fixations:
            if eye != chosen:
                continue
            stimulus = self.stimulus or stimulus_of.get(name)
            label = name.partition("\n")[2]
            if stimulus is None:
                raise DataError(
                    f"{file}, line {number}: no message says what trial {label!r} showed; say stimulus_message=, a "
                    f"regular expression with one group (now {self.stimulus_message!r}), or stimulus="
                )
            if len(cells) < 7:
                self._leave(file, number, "", f"an EFIX line of {len(cells)} parts, expected 8 or more")
                continue
            held = dict(zip(("start", "end", "duration", "x", "y"), cells[2:7]))
            if bad := [(n, v) for n, v in held.items() if not math.isfinite(_float(v))]:
                name_of, value = bad[0]
                why = f"missing, got {value!r}" if value in MISSING else f"expected a number, got {value!r}"
                self._leave(file, number, name_of, why)
                continue
            v = {n: float(value) for n, value in held.items()}
            if v["duration"] < 0 or v["end"] < v["start"]:
                self._leave(file, number, "duration", f"a duration of {min(v['duration'], v['end'] - v['start']):g} ms")
                continue
            self.rows.append(
                _Row(
                    str(file),
                    number,
                    subject,
                    _base(stimulus),
                    label,
                    v["x"],
                    v["y"],
                    v["duration"],
                    v["start"] - began,
                    math.nan,
                )
            )

    # What rows become

    def _trials(self) -> list[GazeTrial]:
        groups: dict[tuple[str, str, str], list[tuple[int, _Row]]] = defaultdict(list)
        for at, row in enumerate(self.rows):
            groups[row.subject, row.stimulus, row.trial].append((at, row))
        sizes: dict[str, tuple[int, int]] = {}
        trials, turned = [], 0
        for (subject, stimulus, trial), placed in groups.items():
            rows = [row for _, row in placed]
            keys = [row.start if self.clocked else row.order for row in rows]
            if not any(map(math.isnan, keys)):
                ordered = [row for _, row in sorted(zip(keys, rows), key=lambda pair: pair[0])]
                turned += ordered != rows
                rows = ordered
            elif not trial and placed[-1][0] - placed[0][0] >= len(placed) and (gap := _gap(placed)) is not None:
                first, second = (f"{row.line}" for row in gap)
                raise DataError(
                    f"{rows[0].file}: rows of {subject!r} looking at {stimulus!r} stand in two places (lines {first} "
                    f"and {second}), and nothing says in what order: name the column of the trial, the start or order"
                )
            rows = list(self._after_each_other(rows))
            if not rows:
                continue
            size = sizes.setdefault(stimulus, self._size(stimulus))
            places = self._pixels(np.array([[row.x, row.y] for row in rows]), size)
            durations = np.array([row.duration for row in rows])
            starts = np.array([row.start for row in rows]) if self.clocked else None
            path = Scanpath(places, size, None if np.isnan(durations).any() else durations)
            trials.append(GazeTrial(subject, stimulus, trial, path, starts))
        if turned:
            self.notes.append(f"rows of {turned:,} trials were put in order of {'start' if self.clocked else 'order'}")
        return trials

    def _after_each_other(self, rows: list[_Row]) -> Iterator[_Row]:
        last: _Row | None = None
        for row in rows:
            if self.clocked and last is not None:
                ended = last.start + (0 if math.isnan(last.duration) else last.duration)
                if row.start < ended - 1.001:  # trackers count whole ms
                    self._leave(
                        Path(row.file),
                        row.line,
                        self.called.get("start", "start"),
                        f"begins at {row.start:g} ms, before the fixation of line {last.line} ends ({ended:g} ms); "
                        f"of another trial, perhaps: name the trial's column",
                    )
                    continue
            last = row
            yield row

    def _size(self, stimulus: str) -> tuple[int, int]:
        if self.screen is not None:
            return self.screen
        file = None if self.pictures is None else _named(self.pictures, stimulus)
        if file is None:
            raise ValueError(
                "screen=(width, height) in pixels is needed, of what x and y are in"
                + (f": {self.pictures} holds no picture {stimulus!r} to take it from" if self.pictures else "")
            )
        self.notes.append("x and y are taken for pixels of the pictures, as no screen was given")
        return media.opened(file, stimulus).size

    def _pixels(self, places: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
        width, height = size
        places = places * [1, -1 if self.up else 1]
        if self.units == "degrees":
            assert self.distance is not None
            assert self.screen_cm is not None
            cm = np.tan(np.deg2rad(places)) * self.distance
            return cm / self.screen_cm * size + np.array(size) / 2
        if self.units == "share":
            places = places * size
        if self.origin == "centre":
            return places + np.array(size) / 2
        return places + np.array([0, height if self.up else 0])

    def _degree(self) -> float | None:
        if self.distance is None or self.screen_cm is None or self.screen is None:
            return None
        return self.screen[0] / self.screen_cm[0] * self.distance * math.tan(math.radians(1))

    def _doubt(self, trials: Sequence[GazeTrial], path: Path) -> None:
        """Refuse what cannot be fixations in these units."""
        places = np.concatenate([trial.scanpath.places for trial in trials])
        outside = np.concatenate([_outside(trial.scanpath) for trial in trials])
        columns = f"columns {self.called.get('x', 'x')} and {self.called.get('y', 'y')}"
        span = np.ptp(places, axis=0)
        if self.units == "pixels" and len(places) > 1 and span.max() <= 2 and span.max() > 0:
            raise DataError(
                f"{path}, {columns}: all {len(places):,} lie within {span.max():.2g} pixels; say units='share' (of the "
                f"screen) or units='degrees'"
            )
        if outside.mean() > 0.5:
            (x, y), (right, low) = places.min(0), places.max(0)
            size = trials[0].scanpath.size
            raise DataError(
                f"{path}, {columns}: {outside.mean():.0%} of the fixations lie outside the screen of {size[0]} x "
                f"{size[1]} (x from {x:.0f} to {right:.0f}, y from {y:.0f} to {low:.0f}); check screen=, units= and "
                f"origin= ('corner' or 'centre')"
            )
        if self.called.get("start") and all(trial.scanpath.durations is None for trial in trials):
            steps = [np.diff(t.starts) for t in trials if t.starts is not None and len(t.starts) > 1]
            if steps and len(places) > 100 and float(np.median(np.concatenate(steps))) < 40:
                raise DataError(
                    f"{path}, column {self.called['start']}: a row every "
                    f"{float(np.median(np.concatenate(steps))):g} ms is a raw sample, not a fixation. Have fixations "
                    f"found by your tracker's software, or by pymovements (pix2deg, pos2vel, detect('ivt'))"
                )

    def _leave(self, file: Path, line: int, column: str, why: str) -> None:
        self.broken.append(LeftOut(str(file), line, column, why))


def _separator(text: str) -> str:
    """The sign that cuts most of the first lines into equally many cells, more than one."""
    lines = [line for line in text.splitlines() if line.strip()][:20]
    if not lines:
        return ","
    best, most = ",", (0.0, 0)
    for sign in "\t;,|":
        counts = [len(next(csv.reader([line], delimiter=sign), [])) for line in lines]
        alike = sum(n == counts[0] for n in counts) / len(counts)
        if counts[0] > 1 and (round(alike, 1), counts[0]) > most:
            best, most = sign, (round(alike, 1), counts[0])
    if not most[1]:
        counts = [len(line.split()) for line in lines]
        return " " if counts[0] > 1 else ","
    return best


def _cells(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with the line they end in; empty ones are none."""
    if separator == " ":
        yield from ((n, line.split()) for n, line in enumerate(text.splitlines(), 1) if line.strip())
        return
    if len(separator) != 1:
        raise ValueError(f"separator={separator!r}: one sign, such as ',', ';' or a tab")
    reader = csv_rows(io.StringIO(text, newline=""), separator)
    for row in reader:
        if any(cell.strip() for cell in row):
            yield reader.line_num, row


def _decimal(rows: list[tuple[int, list[str]]], columns: list[int], separator: str) -> str:
    """What most numbers with a fraction are written with."""
    if separator == "," and not any("," in cells[at] for _, cells in rows[:1000] for at in columns):
        return "."
    commas = sum(bool(re.fullmatch(r"[+-]?\d*,\d+", cells[at])) for _, cells in rows for at in columns)
    points = sum(bool(re.fullmatch(r"[+-]?\d*\.\d+", cells[at])) for _, cells in rows for at in columns)
    return "," if commas > points else "."


def _number(cell: str, decimal: str) -> float | None:
    """None where it is none."""
    if decimal == ",":
        if "." in cell:
            return None
        cell = cell.replace(",", ".")
    if "_" in cell:  # Python's own way to group digits
        return None
    value = _float(cell)
    return value if math.isfinite(value) else None


def _float(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _gap(placed: Sequence[tuple[int, _Row]]) -> tuple[_Row, _Row] | None:
    """The rows before and after the first place where rows do not follow each other."""
    return next((((a[1], b[1])) for a, b in pairwise(placed) if b[0] != a[0] + 1), None)


def _base(stimulus: str) -> str:
    """The name without the folders before it, whichever way they are written."""
    return re.split(r"[\\/]", stimulus)[-1]


def _named(folder: Path, stimulus: str) -> Path | None:
    exact = folder / stimulus
    if exact.is_file() and exact.suffix.lower() in PICTURES:
        return exact
    name = _base(stimulus).lower()
    files = {file.name.lower(): file for file in sorted(folder.iterdir()) if file.suffix.lower() in PICTURES}
    stem = name.rpartition(".")[0] if Path(name).suffix in PICTURES else name
    return files.get(name) or next((file for n, file in files.items() if n.rpartition(".")[0] == stem), None)


def _outside(path: Scanpath) -> NDArray[np.bool_]:
    return np.any((path.places < 0) | (path.places >= path.size), axis=1)


def _cut(trial: GazeTrial, kept: slice) -> dict:
    path = trial.scanpath
    durations = None if path.durations is None else path.durations[kept]
    starts = None if trial.starts is None else trial.starts[kept]
    return {"scanpath": Scanpath(path.places[kept], path.size, durations), "starts": starts}


def _numbers(header: Sequence[str]) -> bool:
    """Whether two cells or more of what should be names are numbers."""
    return sum(bool(re.fullmatch(r"\s*[-+]?\d+([.,]\d+)?\s*", name)) for name in header) > 1


def _counted(names: Sequence[str], one: str, many: str | None = None) -> str:
    shown = f" ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" if names else ""
    return f"{len(names):,} {one if len(names) == 1 else many or one + 's'}{shown}"
