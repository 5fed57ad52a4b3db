"""What statistics saw, labelled: an xarray DataTree with one node a stack."""

from __future__ import annotations

import datetime
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from zarr.errors import ZarrUserWarning

from . import ranks
from .call import Call, Site, UnreachableAttention
from .described import as_html, as_text
from .files import ROOT, intact, replaced
from .functions import innermost
from .tokens import ROLES, Tokens

_Declared = TypeVar("_Declared", bound=Callable[..., Any])

_SIDES = ("query", "key")
_PARTS = ("token", "role", "image", "row", "column", "frame")  # what a coordinate says of each position of a side
# What a recording or a profile has beside what statistics say.
_COORDINATES = {"batch", "layer", "step", "head", "role", "quantile", "exemplar", "item", "item_id", "item_text"}
_COORDINATES |= {*_SIDES, *(f"{side}_{part}" for side in _SIDES for part in _PARTS)}
_GIVEN_AXES = {"layer", "step", "quantile", "exemplar", "item"}  # axes that no call has
_NAME = re.compile(r"(?!\.|__|zarr\.json$)[\w.-]{1,60}")  # what may be a folder of a zarr
_WIDER = {torch.uint8: torch.int64, torch.uint16: torch.int64, torch.uint32: torch.int64}  # room for -1
_KEPT = {torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64}
_MOST_PACKED = 2**15  # bytes that one byte of a compressed file can stand for


@dataclass(frozen=True)
class Spec:
    """How a statistic's tensor is labelled."""

    dims: tuple[str, ...]  # of what the statistic returns for one call
    title: str
    units: str = ""
    limits: tuple[float | None, float | None] = (None, None)
    about: str = ""


class Statistic(Protocol):
    """Call -> Tensor (None leaves the call out), with a `spec` (see `statistic`)."""

    def __call__(self, call: Call, /) -> Tensor | None: ...


def statistic(dims: str, *, title: str, units: str = "", limits: tuple[float | None, float | None] = (None, None)):
    """Declare a function `call -> Tensor` a statistic whose tensor has these axes, in `batch head query key role rank`.

    One that remembers calls (across layers, or steps) is a class, whose objects are such functions and whose knobs
    `__init__` takes: `record` makes one of its own of it, which lives as long as the recording. Keep what it holds
    small, and say it.

    Over generation, tensors with a query axis are laid end to end; those with only a key axis are summed; others get
    a `step` axis. Floats of 16 bits and fewer are recorded as float32; complex numbers are refused.
    """

    def declare(function: _Declared) -> _Declared:
        first = next(iter((function.__doc__ or "").strip().splitlines()), "")
        about = re.sub(r"\s*\[[a-z, ]*\]$", "", first)  # the axes, which `dims` says
        function.spec = Spec(tuple(dims.split()), title, units, limits, about)  # type: ignore[attr-defined]
        return function

    return declare


def spec_of(function: Any) -> Spec:
    spec = getattr(innermost(function), "spec", None)
    if not isinstance(spec, Spec):
        raise TypeError(
            f"{function!r} is not a statistic: declare its axes with @regard.statistic('batch head query', ...)"
        )
    return spec


class Sink(Protocol):
    """Takes what a statistic of this name says of a call, as it comes, in place of a recording that keeps it."""

    def __call__(self, name: str, call: Call, seen: Tensor, /) -> None: ...


class Place(NamedTuple):
    """Where a call's tensors belong in the whole."""

    batch: int
    heads: int
    query: range
    key: range
    order: int = 0  # how often rows had been put in another order before


@dataclass(eq=False)
class Run:
    """One sequence from its start: a forward pass, or a prefill and its decoding steps."""

    parts: dict[str, dict[str, dict[int, list[tuple[Place, Tensor]]]]] = field(default_factory=dict)
    sites: dict[str, dict[int, Site]] = field(default_factory=dict)
    tokens: dict[str, Tokens] = field(default_factory=dict)  # by stack, as far as its sequence has come
    starts: dict[str, set[int]] = field(default_factory=dict)  # where the queries of each step of a stack begin
    keys: dict[str, Tokens] = field(default_factory=dict)  # of a cross stack: what it looks at
    ends: dict[tuple[str, int], int] = field(default_factory=dict)  # where the last call of a layer ended
    cached: set[str] = field(default_factory=set)  # stacks whose positions a cache holds
    orders: list[Tensor] = field(default_factory=list)  # of which rows the cache's became copies, time after time
    rows: list[Tensor] | None = None  # of what was recorded after so many orders: the rows that came out, -1 for none
    latest: list[Call] = field(default_factory=list)  # the newest calls that may yet be cropped
    changes: int = 0  # of what was recorded before

    @property
    def batch(self) -> int | None:
        """Rows of the cache."""
        return next((len(self.tokens[stack].ids) for stack in self.cached if stack in self.tokens), None)

    def reorder(self, rows: Tensor) -> None:
        """The cache's rows are copies of these from now on; and so is what was recorded of them."""
        self.orders.append(rows)
        for known in (self.tokens, self.keys):
            known |= {stack: known[stack].of_rows(rows) for stack in self.cached & known.keys()}
        self.changes += 1

    def crop(self, end: int) -> None:
        """What stands at `end` and after is taken back."""
        for stack in self.cached & self.tokens.keys():
            self.tokens[stack] = self.tokens[stack][:end]
        self.ends |= {key: min(at, end) for key, at in self.ends.items() if key[0] in self.cached}
        self.latest.clear()
        self.changes += 1

    def choose(self, beams: Tensor, before: int, begins: int, ids: Tensor) -> None:
        """Of all rows that were tried, these came out.

        beams [sequence, step]: the row that each was in at each step after `before` orders; -1 after its end. ids
        [sequence, token]: what was generated, from position `begins` on.
        """
        steps = beams.shape[1]
        if len(self.orders) - before < steps:
            raise ValueError(
                "beam search put the rows of the cache in another order in a way that Regard does not see, so what was "
                "recorded cannot be told apart; record with num_beams=1, or run the sequence that it found through "
                "model(ids): its attention is the same"
            )
        first, ended = beams[:, 0], beams[:, 1:] < 0
        self.rows = [*_followed(self.orders[:before], first)[:-1], *beams.T]
        made = Tokens.plain("generated", len(beams), steps - 1, ids[:, : steps - 1]).marked("pad", ended)
        for stack in self.cached & self.tokens.keys():
            self.tokens[stack] = self.tokens[stack].of_rows(first)[:begins].then(made)
        self.keys |= {stack: self.keys[stack].of_rows(first) for stack in self.cached & self.keys.keys()}
        self.changes += 1

    def settled(
        self, stack: str, dims: tuple[str, ...], parts: list[tuple[Place, Tensor]]
    ) -> list[tuple[Place, Tensor]]:
        """What was recorded, of the rows that came out."""
        if not self.orders or stack not in self.cached or "batch" not in dims:
            return parts
        rows = self.rows or _followed(self.orders, torch.arange(len(self.orders[-1])))
        summed = "key" in dims and "query" not in dims
        found = []
        for place, tensor in parts[: sum(place.order < len(rows) for place, _ in parts)]:
            here = rows[place.order]
            chosen = tensor.index_select(dims.index("batch"), here.clamp_min(0))
            if (none := here < 0).any():
                none = none.reshape([-1 if dim == "batch" else 1 for dim in dims])
                nothing = float("nan") if chosen.is_floating_point() else -1 * (chosen.dtype != torch.bool)
                chosen = chosen.masked_fill(none, 0 if summed else nothing)
            found.append((place._replace(batch=len(here)), chosen))
        return found


def _followed(orders: list[Tensor], last: Tensor) -> list[Tensor]:
    """The rows before and after each order that `last` are copies of, or are in the end."""
    rows = [last]
    for order in reversed(orders):
        rows.append(order[rows[-1]])
    return rows[::-1]


class Recording:
    """What was recorded, run by run. `tree` is the one run; with several, index them: `recording[0]`."""

    spread = False  # whether it holds rows of one process of several
    copy = 0  # number of this process among those that recorded the same

    def __init__(self, trees: list[xr.DataTree]) -> None:
        self._trees = trees

    @property
    def tree(self) -> xr.DataTree:
        trees = self._all()
        if len(trees) != 1:
            raise ValueError(
                f"{len(trees)} runs were recorded; take one with recording[i], i from 0 to {len(trees) - 1}"
            )
        return trees[0]

    @property
    def partial(self) -> bool:
        """Whether recording ended before the model did."""
        return any(bool(tree.attrs.get("partial")) for tree in self._all())

    def __len__(self) -> int:
        return len(self._trees)

    def __getitem__(self, i: int) -> xr.DataTree:
        return self._all()[i]

    def __iter__(self) -> Iterator[xr.DataTree]:
        return iter(self._all())

    def gather(self) -> Recording | None:
        """What all processes of torch.distributed recorded, on process 0; None on the others. Each calls it.

        Processes that run rows of their own (DDP, FSDP) are joined along the batch, in the order of their ranks; where
        their rows are not equally long, the shorter end in positions of the role "pad", without values. Of those
        that run a model's heads together (tensor parallelism), each has recorded all of them, and the first is taken.
        In one process: the recording itself. ValueError, on process 0, where a process recorded nothing, or other
        runs, layers or statistics than the others; or a statistic without a batch axis.
        """
        if not ranks.several():
            return Recording(self._all())
        parts = ranks.brought((self.copy, self._there()))
        if parts is None:
            return None
        if nothing := [rank for rank, (_, trees) in enumerate(parts) if not trees]:
            raise ValueError(f"process {nothing[0]} recorded nothing, or gave it to a sink")
        parts = [trees for copy, trees in parts if not copy]
        return Recording(ranks.joined(parts) if len(parts) > 1 else parts[0])

    def save(self, path: str | Path) -> Path:
        """Write a zarr folder, with a list of its files and their checksums.

        It is written aside, then renamed: an old recording stays whole until the new one is. What is no recording of
        Regard's, or holds other files too, is not replaced: FileExistsError. Under DDP and FSDP, where each process has
        recorded its own rows, RuntimeError: save what `gather` gives.
        """
        path, trees = Path(path), self._all()
        if self.spread and ranks.several():
            raise RuntimeError(
                f"this is what one of several processes recorded, of its own rows; on all of them call "
                f"`whole = recording.gather()`, and where that is not None, on process 0, `whole.save({str(path)!r})`"
            )
        runs = xr.DataTree.from_dict({f"/run_{i}": _plain(tree) for i, tree in enumerate(trees)})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced(path) as draft:
                runs.to_zarr(draft, zarr_format=3, consolidated=False)
        except FileExistsError:
            raise
        except OSError as error:
            raise OSError(
                error.errno, f"the recording could not be written to {path}: {error.strerror or error}"
            ) from error
        return path

    def report(self, path: str | Path, *, run: int | None = None, **options: Any) -> Path:
        """Write the page of the one run, or of this one of several, with what stands out in it; returns its path.

        options: `pictures`, `budget`, of `regard.report.write`.
        """
        report, observations = (import_module(f"regard.{name}") for name in ("report", "observations"))
        tree = self.tree if run is None else self[run]
        return report.write(tree, Path(path), **{"findings": observations.observe(tree), **options})

    def show(self, *, run: int | None = None, height: int = 900, **options: Any) -> Any:
        """The page of the one run, or of this one of several, in a notebook: as `report` writes it, in a frame.

        It is HTML alone, so it stays in pages made of notebooks, and asks no server. Sites that drop frames show what
        `print(recording)` says. height: in pixels.
        options: `pictures`, and `budget`, 3,000,000 bytes unless told otherwise, since the notebook keeps it.
        """
        tree, page = self._shown(run, options)
        return import_module("regard.report").Shown(page, as_text([tree]), height)

    def widget(self, *, run: int | None = None, height: int = 900, **options: Any) -> Any:
        """The same page as a widget: what is chosen on it is its `selected`, and `select` chooses on it.

        Pages made of the notebook, and places where no widget runs, have the frame of `show`. Needs anywidget, of the
        extra `notebook`. run, height, options: as of `show`.
        """
        tree, page = self._shown(run, options)
        return import_module("regard.widget").Widget(tree, page, as_text([tree]), height)

    def _shown(self, run: int | None, options: dict[str, Any]) -> tuple[xr.DataTree, bytes]:
        report, observations = (import_module(f"regard.{name}") for name in ("report", "observations"))
        tree = self.tree if run is None else self[run]
        return tree, report.html(tree, **{"findings": observations.observe(tree), "budget": 3_000_000, **options})

    def plot(self, kind: str = "atlas", statistic: str | None = None, *, run: int | None = None, **options: Any) -> Any:
        """Draw the one run, or this one of several, and return the matplotlib axes.

        kind: "atlas", a statistic of every head, its mean over all else; "rows", who looks where, [query, key];
        "profile", a statistic along the tokens; "map", where a token looks on a picture, or all of them on average.
        statistic: the first that is recorded where none is named.
        options: `stack`, of several; `layer` and `head` by their numbers, the mean of what is not named (not of an
        atlas); `sample`, from 0; `role` of a statistic that is by role; `token`, the query of a map by its position;
        `picture`, a PIL image under a map, and `image`, which of several; `ax`, axes to draw into.
        Needs matplotlib. ValueError, with what there is, for what was not recorded.

        >>> import matplotlib
        >>> import regard
        >>> matplotlib.use("agg")
        >>> model, tokenizer = regard.load("reader")
        >>> with regard.record(model, "entropy", "rows", processor=tokenizer) as recording:
        ...     _ = model(**tokenizer("It was the best of times", return_tensors="pt"))
        >>> axes = recording.plot("rows", layer=2, head=1)
        >>> axes.get_xlabel(), axes.get_ylabel()
        ('key', 'query')
        >>> from matplotlib import pyplot
        >>> pyplot.close("all")
        """
        plots = import_module("regard.plots")
        return plots.plot(self.tree if run is None else self[run], kind, statistic, **options)

    def __repr__(self) -> str:
        return as_text(self._there())

    def _repr_html_(self) -> str:
        return as_html(self._there())

    def _there(self) -> list[xr.DataTree]:
        try:
            return self._all()
        except ValueError:  # nothing yet, or all of it went to a sink
            return []

    def _all(self) -> list[xr.DataTree]:
        if not self._trees:
            raise ValueError("nothing was recorded: run the model inside the `with` block")
        return self._trees


def open(path: str | Path) -> Recording:
    """Open a saved recording. Reads zarr format 3 only, which cannot carry code.

    ValueError where a file is missing, too many or other than it was written, with its name. A recording of a version
    that kept no checksums is opened with a warning.
    """
    path = Path(path)
    if not (path / ROOT).is_file():
        raise FileNotFoundError(f"{path} is not a recording (no {ROOT} in it)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ZarrUserWarning)  # of what file managers leave there
            checked, names = intact(path), _declared(path)
            with xr.open_datatree(path, engine="zarr", consolidated=False, chunks=None) as runs:
                runs.load()
            trees = [_labelled(runs.children[name]) for name in names]
    except Exception as error:  # a broken folder makes zarr and xarray fail in any way
        why = f"it declares more than fits in memory ({error})" if isinstance(error, MemoryError) else error
        raise ValueError(f"{path} cannot be read as a recording: {why or type(error).__name__}") from error
    if not checked:
        warnings.warn(
            f"{path} was written without checksums: whether its numbers are as they were recorded cannot be told; "
            f"save it again to add them",
            stacklevel=2,
        )
    return Recording(trees)


def _declared(path: Path) -> list[str]:
    """The runs in a folder. Raises where it holds something else, or declares more bytes than its files can hold."""
    import zarr

    root = zarr.open_group(path, mode="r", zarr_format=3)
    members = dict(root.members())
    runs = [f"run_{i}" for i in range(len(members))]
    if not runs or set(members) != set(runs) or not all(isinstance(run, zarr.Group) for run in members.values()):
        raise ValueError("it is a zarr that Regard did not record: what is in it is not run_0, run_1, ...")
    held, declared = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()), 0
    for name, array in root.members(max_depth=None):
        if isinstance(array, zarr.Array):
            declared += max(math.prod(array.shape), math.prod(array.chunks)) * array.dtype.itemsize
        if declared > _MOST_PACKED * held:
            raise ValueError(f"with {name}, it declares {declared:,} bytes, which {held:,} bytes of files cannot hold")
    return runs


class Recorder(Recording):
    """A recording under way; the seam feeds it."""

    def __init__(
        self,
        statistics: dict[str, Callable[..., Tensor | None]],
        processor: Any,
        attributes: dict[str, Any],
        sink: Sink | None = None,
    ) -> None:
        super().__init__([])
        self.sink = sink
        self.specs = {name: spec_of(function) for name, function in statistics.items()}
        _refuse_names(self.specs)
        self.statistics = statistics
        self.processor = processor
        self.attributes = {"created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **attributes}
        self.runs: list[Run] = []
        self.interrupted = False
        self.sums = any("query" not in spec.dims for spec in self.specs.values())
        self._built: tuple[Any, list[xr.DataTree]] = (None, [])
        self._count = 0
        self._last: Run | None = None  # what was added to last
        self._told: set[str] = set()  # statistics that have said something of what is recorded

    def begin(self, run: Run) -> None:
        """A run starts. What a sink has taken is not kept, so only the newest run matters."""
        if self.sink is not None:
            self.runs.clear()
        self.runs.append(run)

    def leave_out(self, names: set[str]) -> bool:
        """Forget what was seen of the modules of these names; False where a sink has taken it."""
        held = [(run, stack, i) for run in self.runs for stack in run.sites for i in run.sites[stack]]
        held = [(run, stack, i) for run, stack, i in held if run.sites[stack][i].name in names]
        if held and self.sink is not None:
            return False
        for run, stack, i in held:
            del run.sites[stack][i]
            for by_layer in run.parts.get(stack, {}).values():
                by_layer.pop(i, None)
            if not run.sites[stack]:
                del run.sites[stack]
                run.parts.pop(stack, None)
        self.runs = [run for run in self.runs if run.sites]
        self._told = {name for run in self.runs for found in run.parts.values() for name in found if found[name]}
        self._count += 1
        return True

    def refuse_lost(self) -> None:
        """Raise for statistics that could be asked of nothing but what was left out."""
        refused = self.attributes.get("refused")
        if refused and (lost := sorted(self.specs.keys() - self._told)):
            raise UnreachableAttention(
                f"{', '.join(lost)}: nothing was seen but of stacks that cannot be read: {'; '.join(refused)}"
            )

    def refuse_order(self) -> None:
        """Raise where what was recorded cannot be put in another order."""
        lost = [name for name, spec in self.specs.items() if "batch" not in spec.dims]
        if lost or self.sink is not None:
            what = f"statistic {lost[0]!r} has no batch axis" if lost else "a sink has taken what was seen"
            raise ValueError(
                f"the rows of a cache were put in another order, as beam search does, but {what}; record with "
                f"num_beams=1, or run the sequence that it found through model(ids): its attention is the same"
            )

    @torch.no_grad()
    def crop(self, run: Run, end: int) -> None:
        """Take back what was recorded at position `end` and after, as the cache did."""
        if self.sink is not None:
            raise ValueError(
                "a cache was cropped, as assisted decoding does, but a sink has taken what was seen; run the sequence "
                "that came out through model(ids): its attention is the same"
            )
        for stack in run.cached & run.parts.keys():
            run.starts[stack] = {start for start in run.starts[stack] if start < end}
            for name, layers in run.parts[stack].items():
                for layer, parts in layers.items():
                    kept = [(p, t) for p, t in parts if p.query.start < end]
                    if kept and kept[-1][0].query.stop > end:
                        kept[-1] = self._cropped(run, stack, name, layer, *kept[-1], end)
                    layers[layer] = kept

    def _cropped(
        self, run: Run, stack: str, name: str, layer: int, place: Place, tensor: Tensor, end: int
    ) -> tuple[Place, Tensor]:
        """The part of one call that stands before `end`."""
        dims, n = self.specs[name].dims, end - place.query.start
        if "query" in dims:
            tensor = tensor.narrow(dims.index("query"), 0, n)
        else:
            at = stack, layer, place.query.start
            call = next((c for c in run.latest if (c.site.stack, c.site.layer, c.query_start) == at), None)
            found = None if call is None else self.statistics[name](call.of_queries(n))
            if found is None:
                raise ValueError(
                    f"a cache was cropped to {end} positions inside what one call added to it, and statistic {name!r} "
                    f"says nothing of single queries; record it over model(ids) of the sequence that came out"
                )
            tensor = found.detach().cpu()
        keys = range(place.key.start, min(place.key.stop, end)) if place.key.stop == place.query.stop else place.key
        if "key" in dims:
            tensor = tensor.narrow(dims.index("key"), 0, len(keys))
        return place._replace(query=range(place.query.start, end), key=keys), tensor

    def add(self, run: Run, call: Call, name: str, seen: Tensor | None) -> None:
        run.starts.setdefault(call.site.stack, set()).add(call.query_start)
        self._last, self._count = run, self._count + 1
        if seen is None:  # the statistic leaves this call out
            return
        self._told.add(name)
        kind = _checked(name, self.specs[name].dims, call, seen)
        # Always a copy: neither a statistic nor what it read may change afterwards what was seen.
        if self.sink is not None:
            self.sink(name, call, seen.detach().to(kind, copy=True))
            return
        layers = run.parts.setdefault(call.site.stack, {}).setdefault(name, {})
        batch, heads = call.query.shape[:2]
        place = Place(batch, heads, call.query_positions, call.key_positions, len(run.orders))
        layers.setdefault(call.site.layer, []).append((place, seen.detach().to("cpu", kind, copy=True)))

    def __len__(self) -> int:
        return len(self.runs)

    def _all(self) -> list[xr.DataTree]:
        if self.sink is not None:
            raise ValueError("what was seen went to the sink; nothing of it is recorded")
        now = (self._count, len(self.runs), self.interrupted, sum(run.changes for run in self.runs))
        if self._built[0] != now:
            self._built = (now, [self._tree(run) for run in self.runs])
        self._trees = self._built[1]
        return super()._all()

    def _tree(self, run: Run) -> xr.DataTree:
        packages = {name: version(name) for name in ("regard", "torch", "transformers")}
        stacks = {stack: self._dataset(run, stack) for stack in run.parts if any(_placed(run.parts[stack]))}
        partial = self.interrupted and (run is self._last or run is self.runs[-1])
        return _with_attributes(stacks, {**self.attributes, **packages, "partial": partial})

    def _dataset(self, run: Run, stack: str) -> xr.Dataset:
        sites, layers = run.sites[stack], sorted(run.sites[stack])
        found = {
            name: {i: s for i, parts in by_layer.items() if (s := run.settled(stack, self.specs[name].dims, parts))}
            for name, by_layer in run.parts[stack].items()
        }
        found = {name: by_layer for name, by_layer in found.items() if by_layer}
        places = list(_placed(found))
        query0, key0 = min(p.query.start for p in places), min(p.key.start for p in places)
        sizes = {
            "batch": max(p.batch for p in places),
            "head": max(p.heads for p in places),
            "query": max(p.query.stop for p in places) - query0,
            "key": max(p.key.stop for p in places) - key0,
        }
        for name, by_layer in found.items():  # an axis of several statistics is as long as the longest
            for axis, dim in enumerate(self.specs[name].dims):
                if dim not in ("batch", "head", "query", "key"):
                    longest = max(part.shape[axis] for parts in by_layer.values() for _, part in parts)
                    sizes[dim] = max(sizes.get(dim, 0), longest)
        starts, data = run.starts[stack], {}
        if run.rows is not None:  # steps of beams that did not come out
            starts = starts & {place.query.start for place in places}
        starts = sorted(starts)
        for name, by_layer in found.items():
            spec = self.specs[name]
            array, dims = _join(by_layer, layers, spec.dims, sizes, query0, key0, starts)
            limits = {} if None in spec.limits else {"range": list(spec.limits)}
            data[name] = (dims, array, {"long_name": spec.title, "units": spec.units, "about": spec.about, **limits})
        first = sites[layers[0]]
        queries = run.tokens.get(stack)
        keys = run.keys.get(stack, None if first.cross else queries)
        coords: dict[str, Any] = {"layer": layers, "head": np.arange(sizes["head"])}
        coords |= self._labels("query", queries, query0, sizes["query"], sizes["batch"])
        coords |= self._labels("key", keys, key0, sizes["key"], sizes["batch"])
        attrs = {
            "kind": "cross" if first.cross else "self",
            "causal": any(site.causal for site in sites.values()),
            "sites": [sites[i].name for i in layers],
            "grids": json.dumps(next((t.grids for t in (keys, queries) if t is not None and t.grids), ())),
        }
        if queries is not None and queries.grids and json.dumps(queries.grids) != attrs["grids"]:
            attrs["query_grids"] = json.dumps(queries.grids)
        dataset = xr.Dataset(data, coords, attrs)
        if "role" in dataset.dims:
            present = {ROLES.index(r) for r in np.unique(coords["key_role"][1])} if "key_role" in coords else set()
            for variable in dataset.data_vars.values():  # and roles of queries, where a statistic tells those
                if "role" in variable.dims:
                    held = np.nan_to_num(variable.values).any(
                        tuple(i for i, d in enumerate(variable.dims) if d != "role")
                    )
                    present |= set(np.flatnonzero(held).tolist())
            dataset = dataset.assign_coords(role=list(ROLES)).isel(role=sorted(present))
        return dataset

    def _labels(self, axis: str, tokens: Tokens | None, start: int, n: int, batch: int) -> dict[str, Any]:
        labels: dict[str, Any] = {axis: np.arange(start, start + n)}
        if tokens is None or len(tokens) < start + n or len(tokens.roles) != batch:
            return labels
        texts = np.array(tokens.texts(self.processor), dtype=object)[:, start : start + n]
        tokens = tokens[start : start + n]
        names = np.array(ROLES)
        labels[f"{axis}_token"] = (("batch", axis), texts)
        labels[f"{axis}_role"] = (("batch", axis), names[tokens.roles.numpy()].astype(object))
        for i, part in enumerate(_PARTS[2:]):
            labels[f"{axis}_{part}"] = (("batch", axis), tokens.places[..., i].numpy())
        return labels


def _placed(found: dict[str, dict[int, list[tuple[Place, Tensor]]]]) -> Iterator[Place]:
    return (place for by_layer in found.values() for parts in by_layer.values() for place, _ in parts)


def _refuse_names(specs: Mapping[str, Spec]) -> None:
    """Raise for names and axes that would take the place of others."""
    for name, spec in specs.items():
        if wrong := [dim for i, dim in enumerate(spec.dims) if dim in spec.dims[:i] or dim in _GIVEN_AXES]:
            raise ValueError(f"statistic {name!r} declares the axis {wrong[0]!r} twice, or one that no call has")
        if not _NAME.fullmatch(name):
            raise ValueError(f"a statistic cannot be named {name!r}: use letters, digits and _, and at most 60 of them")
        if name in _COORDINATES or any(name in other.dims for other in specs.values()):
            raise ValueError(
                f"a statistic cannot be named {name!r}, which is an axis or a coordinate of recordings; give it "
                f"another: record(model, my_{name}=...)"
            )


def _checked(name: str, dims: tuple[str, ...], call: Call, seen: Tensor) -> torch.dtype:
    """The type in which a recording holds what a statistic gave; raises where that is not what it declares."""
    if not isinstance(seen, Tensor) or seen.layout != torch.strided:
        raise TypeError(f"statistic {name!r} gave a {type(seen).__name__} at {call.site}; it must give a dense tensor")
    batch, head, query, _ = call.query.shape
    known = {"batch": batch, "head": head, "query": query, "key": call.key.shape[2], "kv_head": call.key.shape[1]}
    known |= {"role": len(ROLES)}
    if seen.ndim != len(dims) or any(known.get(dim, n) != n for dim, n in zip(dims, seen.shape)):
        declared = " ".join(f"{dim}={known[dim]}" if dim in known else dim for dim in dims)
        raise ValueError(
            f"statistic {name!r} declares axes [{declared}], but gave {list(seen.shape)} at {call.site}; give one "
            f"number for each, NaN where there is none, or None to leave the call out"
        )
    if seen.dtype in _KEPT:
        return seen.dtype
    if seen.is_floating_point():
        return torch.float32
    if seen.dtype not in _WIDER:
        raise ValueError(
            f"statistic {name!r} gave {seen.dtype} at {call.site}; a recording holds real numbers of at most 64 bits, "
            f"such as the absolute value of complex ones"
        )
    return _WIDER[seen.dtype]


def _join(
    by_layer: dict[int, list[tuple[Place, Tensor]]],
    layers: list[int],
    dims: tuple[str, ...],
    sizes: dict[str, int],
    query0: int,
    key0: int,
    starts: list[int],
) -> tuple[np.ndarray, tuple[str, ...]]:
    """One array from the tensors of all layers and steps: batch, layer, then the other dims."""
    summed = "key" in dims and "query" not in dims
    stepped = len(starts) > 1 and not {"query", "key"} & set(dims)
    parts = [(layer, place, part.numpy()) for layer, held in by_layer.items() for place, part in held]
    kind = np.result_type(*(part.dtype for _, _, part in parts))
    if summed and kind.kind in "bi":
        kind = np.result_type(kind, np.int64)
    array = np.zeros([len(layers), *([len(starts)] if stepped else []), *(sizes[d] for d in dims)], kind)
    there = np.zeros(array.shape, bool)
    for layer, place, part in parts:
        where: list[Any] = [slice(None, n) for n in part.shape]
        for axis, start in (("query", place.query.start - query0), ("key", place.key.start - key0)):
            if axis in dims:
                i = dims.index(axis)
                where[i] = slice(start, start + part.shape[i])
        at = (layers.index(layer), *([starts.index(place.query.start)] if stepped else []), *where)
        array[at] = array[at] + part if summed else part
        there[at] = True
    # What is not there: heads of a narrower layer, keys of a later step, calls that were left out.
    array[~there] = {"f": np.nan, "i": -1, "b": False}[kind.kind]
    order = ["layer", *(["step"] if stepped else []), *dims]
    if "batch" in dims:
        i = order.index("batch")
        array, order = np.moveaxis(array, i, 0), ["batch", *order[:i], *order[i + 1 :]]
    return array, tuple(order)


def _plain(tree: xr.DataTree) -> xr.DataTree:
    """Texts as JSON attributes: zarr 3 has no settled type for them yet."""
    plain = {}
    for path, node in _nodes(tree):
        dataset = node.to_dataset(inherit=False)
        texts = [name for name, v in dataset.coords.items() if v.dtype.kind in "OUT"]
        labels = {str(name): [list(dataset[name].dims), dataset[name].values.tolist()] for name in texts}
        plain[path] = dataset.drop_vars(texts).assign_attrs(texts=json.dumps(labels))
    return _with_attributes(plain, {k: v for k, v in tree.attrs.items() if v is not None})


def _labelled(tree: xr.DataTree) -> xr.DataTree:
    labelled = {}
    for path, node in _nodes(tree):
        dataset = node.to_dataset(inherit=False)
        coords = {}
        for name, (dims, values) in dict(json.loads(dataset.attrs.pop("texts", "{}"))).items():
            texts = np.array(values, dtype=object)
            if texts.ndim != len(dims) or not all(isinstance(text, str) for text in texts.flat):
                raise ValueError(f"the texts {name!r:.60} of {path!r:.60} are not texts along {dims!r:.60}")
            coords[name] = (dims, texts)
        labelled[path] = dataset.assign_coords(coords)
    return _with_attributes(labelled, tree.attrs)


def _nodes(tree: xr.DataTree) -> Iterator[tuple[str, xr.DataTree]]:
    """All nodes below the root, by path, parents first."""
    return ((path, node) for path, node in tree.subtree_with_keys if path != ".")


def _with_attributes(nodes: dict[str, xr.Dataset], attributes: Mapping[Any, Any]) -> xr.DataTree:
    tree = xr.DataTree.from_dict({f"/{path}": dataset for path, dataset in nodes.items()})
    tree.attrs = dict(attributes)
    return tree
