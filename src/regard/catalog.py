"""The catalog: one row a paper, in `catalog/<room>.toml`; statistics by name. Status is computed, never typed in."""

from __future__ import annotations

import base64
import difflib
import json
import os
import re
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .extras import needs, shortened
from .files import MARK, refuse_foreign, replaced, written_aside

if TYPE_CHECKING:
    from torch import Tensor

# Nothing here imports torch, or a room, before a method is asked for: names of methods are read from their files.
_HERE = Path(__file__).parent
_FOLDER = _HERE / "catalog"
SHIPPED = _FOLDER / "found.json"
SCALES = ("small", "real", "large")
_PLOTS = {".svg": "Creator", ".png": "Software"}  # where their metadata say who made them
DENSE = 150  # points of a plot, above which they are drawn as pixels
VERDICTS = {True: "held", False: "did not hold", None: "cannot tell"}


@dataclass(frozen=True)
class Row:
    """One paper."""

    key: str
    room: str
    title: str
    link: str  # empty where it could not be established
    about: str
    works: str  # what has to work
    expects: str  # what its claim checks
    tags: tuple[str, ...]
    object: str = ""  # "package.module:name", empty until built
    claim: str = ""

    def load(self) -> Any:
        """The method itself."""
        if not self.object:
            raise NotImplementedError(f"{self.key!r} is in the catalog but not built yet")
        module, _, name = self.object.partition(":")
        return getattr(import_module(module), name)

    @property
    def status(self) -> str:
        """`not built`, `broken`, `built`, or what the last run of its claim found: see `runs`."""
        if not self.object:
            return "not built"
        module, _, name = self.object.partition(":")
        path = _HERE.joinpath(*module.split(".")[1:])
        if not any(_defines(file, name) for file in (path.with_suffix(".py"), path / "__init__.py")):
            return "broken"
        return self.last.finding.verdict if self.last else "built"

    @property
    def parity(self) -> str:
        """Whether its values are equal to its authors' code: `equal`, `differs` or `not compared`, then the details."""
        found = parities().get(self.key)
        return str(found) if found else "not compared: no code was at hand" if self.object else "not compared"

    @property
    def found(self) -> list[Run]:
        """The last run of its claim at each scale: see `runs`."""
        return list(runs().get(self.key, {}).values())

    @property
    def last(self) -> Run | None:
        return max(self.found, key=lambda run: run.when, default=None)

    @property
    def scales(self) -> tuple[str, ...]:
        """The scales that its claim has."""
        return getattr(import_module(self.claim), "SCALES", ("small",)) if self.claim else ()


@dataclass(frozen=True)
class Parity:
    """How far a method was off values that others made; `tests/golden` holds what compares them, and writes this."""

    kind: Literal["authors", "reimplementation"]
    source: str  # whose code, and what of it
    off: float  # the largest difference, in shares of the largest value
    equal: bool  # within the tolerance of the dtype
    cases: int

    def __str__(self) -> str:
        whose = "the authors' code" if self.kind == "authors" else "a reimplementation"
        cases = f"{self.cases} case{'s' if self.cases > 1 else ''}"
        how = f"equal to {whose} within {self.off:.0e}" if self.equal else f"differs from {whose} by {self.off:.0e}"
        return f"{how}, {cases} ({self.source})"


@dataclass(frozen=True)
class Premise:
    """What a paper takes for granted of the model or the data, what was needed here, and what was measured."""

    what: str
    needed: str
    measured: str
    met: bool

    def __str__(self) -> str:
        return f"{self.what}: {self.measured} ({self.needed}{'' if self.met else ', not met'})"


@dataclass(frozen=True)
class Finding:
    """What a run of a claim found. `seconds` are of processor time.

    holds: None where it cannot be told: always where a premise is not met, whatever else was found.
    draw: draws what was found into a matplotlib `Figure` that it is given; the claim itself needs no matplotlib.
    """

    holds: bool | None
    measured: str
    expected: str
    seed: int
    seconds: float = 0.0
    premises: Sequence[Premise] = ()
    draw: Callable[[Any], None] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "premises", tuple(self.premises))
        if not all(premise.met for premise in self.premises):
            object.__setattr__(self, "holds", None)

    @property
    def verdict(self) -> str:
        return VERDICTS[self.holds]


@dataclass(frozen=True)
class Run:
    """A finding, and when and at which scale it was made."""

    finding: Finding
    scale: str
    when: float  # seconds since 1970


@cache
def rows() -> dict[str, Row]:
    """All rows by key."""
    found: dict[str, Row] = {}
    placed = [of for headings in taxonomies().values() for tagging in headings.values() for of in tagging.items()]
    for path in sorted(_FOLDER.glob("*.toml")):
        if path.stem not in ("tags", "taxonomies", "parity"):
            for key, entry in tomllib.loads(path.read_text()).items():
                # In this order, and none twice: a taxonomy may take up a tag that rows carry anyway.
                carried = dict.fromkeys([*entry["tags"], *(tag for tag, keys in placed if key in keys)])
                found[key] = Row(key, path.stem, **{**entry, "tags": tuple(carried)})
    return found


@cache
def taxonomies() -> dict[str, dict[str, dict[str, list[str]]]]:
    """Survey, heading, tag: the papers that are placed there, beside those whose own row has the tag."""
    return tomllib.loads((_FOLDER / "taxonomies.toml").read_text())


def taxonomy(survey: str) -> dict[str, dict[str, list[Row]]]:
    """The taxonomy of a survey: by heading and tag, the papers here that carry the tag.

    A heading without tags is one that no paper here belongs under. KeyError for what is no survey with a taxonomy.

    >>> positions = taxonomy("attention-survey")["positions"]
    >>> list(positions)
    ['soft-positions', 'hard-positions', 'local-positions']
    >>> "halonet" in [row.key for row in positions["local-positions"]]
    True
    """
    if survey not in taxonomies():
        raise KeyError(f"no taxonomy of {_near(survey, taxonomies())}; there are those of {', '.join(taxonomies())}")
    return {
        heading: {tag: [row for row in tagged(tag) if row.key != survey] for tag in tagging}
        for heading, tagging in taxonomies()[survey].items()
    }


@cache
def parities() -> dict[str, Parity]:
    """What was compared with the code of others, by key."""
    return {key: Parity(**entry) for key, entry in tomllib.loads((_FOLDER / "parity.toml").read_text()).items()}


@cache
def tags() -> dict[str, str]:
    """What each tag means."""
    return tomllib.loads((_FOLDER / "tags.toml").read_text())["tags"]


def heads(tag: str) -> list[str]:
    """The kinds of heads of this tag that `regard atlas` finds.

    >>> heads("latent-reasoning")
    ['induction', 'suppression']
    """
    kinds = tomllib.loads((_FOLDER / "tags.toml").read_text())["heads"]
    return [kind for kind, of in kinds.items() if tag in of]


def surveys(tag: str) -> list[tuple[str, str]]:
    """The surveys whose taxonomy has this tag, and under which heading."""
    every = ((survey, heading, of) for survey, headings in taxonomies().items() for heading, of in headings.items())
    return [(survey, heading) for survey, heading, of in every if tag in of]


def tagged(*wanted: str) -> list[Row]:
    """Rows that carry all of these tags."""
    for tag in wanted:
        if tag not in tags():
            raise KeyError(f"no tag {_near(tag, tags())}; `regard papers tags` lists all {len(tags())}")
    return [found for found in rows().values() if set(wanted) <= set(found.tags)]


def chosen(
    among: Sequence[Row], *, verdict: str | None = None, premise: str | None = None, parity: str | None = None
) -> list[Row]:
    """Those rows whose last run had this verdict, and whose premises were then `met` or `unmet`.

    parity: how `Row.parity` begins.
    """
    words = {"verdict": (verdict, tuple(VERDICTS.values())), "premise": (premise, ("met", "unmet"))}
    for name, (given, known) in words.items():
        if given is not None and given not in known:
            raise ValueError(f"{name} {given!r} is none of {', '.join(known)}")

    def fits(row: Row) -> bool:
        last = row.last
        if verdict is not None and (last is None or last.finding.verdict != verdict):
            return False
        if premise is not None:
            measured = last.finding.premises if last else ()
            if not measured or all(p.met for p in measured) != (premise == "met"):
                return False
        return parity is None or row.parity.startswith(parity)

    return [row for row in among if fits(row)]


def row(key: str) -> Row:
    try:
        return rows()[key]
    except KeyError:
        raise KeyError(f"no paper {_near(key, rows())}; `regard papers` lists all {len(rows())}") from None


def search(words: str) -> list[Row]:
    """Rows that hold all words (or words that start so), best first."""
    terms = [f'"{w.replace(chr(34), "")}"*' for w in words.split()]
    if not terms:
        return list(rows().values())
    import sqlite3

    with sqlite3.connect(":memory:") as base:
        base.execute(
            "create virtual table paper using fts5(key, title, about, works, expects, tags, room, tokenize='porter')"
        )
        fields = ((r.key, r.title, r.about, r.works, r.expects, " ".join(r.tags), r.room) for r in rows().values())
        base.executemany("insert into paper values (?, ?, ?, ?, ?, ?, ?)", fields)
        rank = "bm25(paper, 8, 8, 2, 2, 1, 4, 1)"
        hits = base.execute(f"select key from paper where paper match ? order by {rank}", (" ".join(terms),)).fetchall()
    return [rows()[key] for (key,) in hits]


def methods(room: str) -> list[str]:
    """Names of the methods of a room: its files that define something of their own name."""
    return [name for name in files(room) if _defines(_file(room, name), name)]


def method(room: str, name: str) -> Any:
    """The method of this name: `name` in `regard/<room>/<name>.py`, whatever else there is left alone."""
    if name not in methods(room):
        raise KeyError(f"no method {_near(name, methods(room), f' in {room}')}; there are {', '.join(methods(room))}")
    return getattr(import_module(f"regard.{room}.{name}"), name)


@cache
def statistics() -> list[str]:
    """Names of the statistics that `record` takes: those of the room that are declared with `@statistic`.

    The others are analyses, plain functions of a model or of what was recorded.
    """
    return [name for name in files("statistics") if _defines(_file("statistics", name), name, r"@statistic\([^@]+\)\n")]


def statistic(name: str) -> Callable[..., Tensor | None]:
    """The statistic of this name: function `name` in `regard/statistics/name.py`."""
    if name not in statistics():
        raise KeyError(f"no statistic {_near(name, statistics())}; there are {', '.join(statistics())}")
    return method("statistics", name)


def files(room: str) -> list[str]:
    """Names of a room's files, without those that begin with an underscore."""
    return sorted(path.stem for path in (_HERE / room).glob("[!_]*.py"))


def _file(room: str, name: str) -> Path:
    return _HERE / room / f"{name}.py"


@cache
def _defines(path: Path, name: str, before: str = "") -> bool:
    """Whether this file defines this name at its top level, after these lines."""
    defined = rf"^{before}(?:(?:def|class) {re.escape(name)}\b|{re.escape(name)}\b[^\n=]* = )"
    return path.is_file() and re.search(defined, path.read_text(encoding="utf-8"), re.MULTILINE) is not None


def reproduce(key: str, *, scale: str = "small", seed: int = 0, plot: Path | None = None) -> Finding:
    """Run a paper's claim, and remember what came out; `plot` is a picture file to draw it into."""
    found = row(key)
    if not found.claim:
        raise NotImplementedError(f"{key!r} has no claim yet; when built, it will check: {found.expects}")
    if scale not in found.scales:
        raise ValueError(f"the claim of {key} has no scale {scale!r}; it has {', '.join(found.scales)}")
    if plot is not None:
        check_plot(plot)
    began = time.process_time()
    finding: Finding = import_module(found.claim).claim(scale=scale, seed=seed)
    finding = replace(finding, seconds=time.process_time() - began)
    made = Run(finding, scale, time.time())
    path = _runs_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    known = here()
    with written_aside(path) as draft:
        draft.write_text(written({**known, key: {**known.get(key, {}), scale: made}}))
    if plot is not None and finding.draw is not None:
        drawn(finding.draw, plot)
    return finding


def check_plot(path: Path) -> None:
    """Raise ValueError where a plot cannot be drawn into a file of this name, FileExistsError where it is not ours."""
    if path.suffix not in _PLOTS:
        raise ValueError(f"{path}: a plot is drawn into a file that ends in {' or '.join(_PLOTS)}")
    refuse_foreign(path)


def drawn(draw: Callable[[Any], None], path: Path, *, size: tuple[float, float] = (8, 4)) -> None:
    """Write what `draw` draws into a matplotlib `Figure`, small, as SVG or PNG. size: inches."""
    check_plot(path)
    with needs("plots", "claims"):
        import matplotlib
        import numpy as np
        from matplotlib.collections import Collection, QuadMesh
        from matplotlib.figure import Figure
        from matplotlib.image import AxesImage
        from matplotlib.lines import Line2D
    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    for part in figure.findobj(Collection):
        if isinstance(part, QuadMesh) or len(np.asarray(part.get_offsets())) > DENSE:  # such as colour bars
            part.set_rasterized(True)
    for part in figure.findobj(Line2D):
        part.set_rasterized(part.get_rasterized() or len(np.asarray(part.get_xdata())) > DENSE)
    for part in figure.findobj(AxesImage):
        part.set_interpolation("none")  # as large as its pixels are, not as the picture is
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same picture makes the same file; letters as such, pictures as they are.
    same: dict[Any, Any] = {"svg.hashsalt": path.stem, "svg.fonttype": "none", "image.composite_image": False}
    metadata = {_PLOTS[path.suffix]: MARK} | ({"Date": None} if path.suffix == ".svg" else {})
    with matplotlib.rc_context(same), replaced(path) as draft:
        figure.savefig(draft, format=path.suffix[1:], dpi=90, metadata=metadata)
        if path.suffix == ".svg":
            draft.write_text(_lighter(draft.read_text(encoding="utf-8")), encoding="utf-8")


def _lighter(svg: str) -> str:
    """The same plot with hundredths of a point, and pictures as WebP."""

    from PIL import Image

    def webp(found: re.Match[str]) -> str:
        made = BytesIO()
        Image.open(BytesIO(base64.b64decode(found[1]))).save(made, "webp", quality=70)
        return f"data:image/webp;base64,{base64.b64encode(made.getvalue()).decode()}"

    return re.sub(r"data:image/png;base64,([^\"]+)", webp, re.sub(r"(\.\d\d)\d+", r"\1", svg))


def claimed() -> list[str]:
    """Keys of the papers that have a claim."""
    return [key for key, found in rows().items() if found.claim]


def remembered(key: str, *, scale: str, seed: int) -> Finding | None:
    """What the last run of a claim on this machine at this scale found, if it was of this seed."""
    last = here().get(key, {}).get(scale)
    return last.finding if last and last.finding.seed == seed else None


def runs() -> dict[str, dict[str, Run]]:
    """The last run of each claim, by key and scale: on this machine, or else where this version was made."""
    found = dict(shipped())
    for key, at in here().items():
        found[key] = {**found.get(key, {}), **at}
    return found


def shipped() -> dict[str, dict[str, Run]]:
    """What came out where this version was made."""
    return _read(SHIPPED.read_text(encoding="utf-8")) if SHIPPED.exists() else {}


def here() -> dict[str, dict[str, Run]]:
    """What came out on this machine."""
    try:
        return _read(_runs_file().read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # none yet, or a file of another version


@lru_cache(maxsize=4)
def _read(text: str) -> dict[str, dict[str, Run]]:
    def run(scale: str, kept: dict[str, Any]) -> Run:
        when = kept.pop("when")
        return Run(Finding(**{**kept, "premises": tuple(Premise(**p) for p in kept["premises"])}), scale, when)

    return {key: {scale: run(scale, kept) for scale, kept in at.items()} for key, at in json.loads(text).items()}


def written(found: dict[str, dict[str, Run]]) -> str:
    """As `_read` reads it."""

    def kept(run: Run) -> dict[str, Any]:
        entry = {name: getattr(run.finding, name) for name in ("holds", "measured", "expected", "seed", "seconds")}
        return {**entry, "premises": [asdict(p) for p in run.finding.premises], "when": run.when}

    entries = {key: {scale: kept(run) for scale, run in at.items()} for key, at in found.items()}
    return json.dumps(entries, indent=1, default=lambda number: number.item())  # numpy's and torch's


def _runs_file() -> Path:
    home = os.environ.get("REGARD_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regard"
    return Path(home) / "claims.json"


def _near(name: str, among: Any, where: str = "") -> str:
    """What was given, and what may have been meant."""
    close = difflib.get_close_matches(name, among, n=3)
    return f"{shortened(name)!r}{where}" + (f" (did you mean {' or '.join(close)}?)" if close else "")
