"""Following a model's forward passes: which run each call belongs to, and where in its sequence it stands.

A pass is known by its outermost call, a sequence by its cache. What is not known is left open: no role but `other`.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence, ValuesView
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapters import caches, checkpoints, generation, parallel, pictures, transforms
from .adapters.caches import Rows
from .adapters.dropping import Dropping, Left
from .adapters.generation import Generation
from .adapters.grids import NONE
from .call import Call, Site, UnreachableAttention, Unreadable
from .functions import bound
from .names import Names, shows
from .recording import Recorder, Run
from .sites import links, plain_stacks
from .tokens import Tokens


class aside:
    """What models run in this block is another run on the same inputs: changed like the first, and not recorded."""

    _local = threading.local()

    @classmethod
    def on(cls) -> bool:
        return getattr(cls._local, "on", False)

    def __enter__(self) -> None:
        self.before, self._local.on = self.on(), True

    def __exit__(self, *_: Any) -> None:
        self._local.on = self.before


@dataclass
class _Turn:
    """One time that an attention module runs."""

    layer: int
    seen: int = 0  # queries so far: of a packed batch, one piece comes after the other
    stack: str = ""  # the part of its stack that it was found to belong to
    query: weakref.ref[Tensor] | None = None  # of the last call
    times: int = 0  # that the same positions asked before


@dataclass
class _Layout:
    """Where in their pictures the positions of some layers are: labels [batch, query], and [batch, key] if others."""

    queries: Tensor
    keys: Tensor | None

    def holds(self, start: int, queries: Tensor, keys: Tensor | None) -> bool:
        """Whether these, from `start` on, are its own, or follow on them."""
        known = self.queries[:, start : start + queries.shape[1]]
        same = (self.keys is None) == (keys is None) and (keys is None or torch.equal(keys, self.keys))  # type: ignore
        there = len(known) == len(queries) and start <= self.queries.shape[1]
        return same and there and torch.equal(known, queries[:, : known.shape[1]])

    def add(self, start: int, queries: Tensor) -> None:
        self.queries = torch.cat([self.queries, queries[:, self.queries.shape[1] - start :]], dim=1)


@dataclass(eq=False)
class _Entry:
    """A model, or a model inside it, that is running."""

    name: str
    module: nn.Module
    inputs: Mapping[str, Any]
    frame: FrameType | None  # of its call; None: it runs as long as it is listed
    within: _Entry | None  # the one that called it
    source: _Entry = field(init=False)  # the innermost that was given ids, pictures or frames, not embeddings
    cache: Any = None
    start: int = 0  # positions that the cache held before
    again: bool = False  # for a checkpoint's gradient
    called: set[nn.Module] = field(default_factory=set)  # models inside it, so far
    gave: dict[nn.Module, list[weakref.ref[Tensor]]] = field(default_factory=dict)  # what plain encoders in it did
    caches: dict[nn.Module, Any] = field(default_factory=dict)  # that plain encoders in it were given last
    turns: dict[nn.Module, _Turn] = field(default_factory=dict)
    layers: dict[str, set[int]] = field(default_factory=dict)  # that ran, by stack
    runs: dict[str, Run] = field(default_factory=dict)  # that the stacks' calls belong to
    known: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)  # fields of calls alike
    layouts: dict[str, list[_Layout]] = field(default_factory=dict)  # of each stack that sees pictures
    parts: dict[tuple[nn.Module, int], str] = field(default_factory=dict)  # of its stack, by module and layer

    def copy(self) -> _Entry:
        """The same from here on, for a checkpoint's gradient."""
        turns = {module: replace(turn) for module, turn in self.turns.items()}
        layers = {stack: set(ran) for stack, ran in self.layers.items()}
        copied = replace(self, frame=None, again=True, turns=turns, layers=layers, gave=dict(self.gave))
        copied.source = copied if self.source is self else self.source
        return copied

    def told(self) -> Mapping[str, Any]:
        """What tells of its positions: what the source was given, and the nearest mask."""
        masks = []
        for entry in self.outwards():
            masks.append(entry.inputs.get("attention_mask"))
            if entry is self.source:
                break
        mask = next((mask for mask in masks if mask is not None), None)
        hidden = (entry.inputs.get("bool_masked_pos") for entry in self.outwards())
        hidden = next((mask for mask in hidden if mask is not None), None)
        return {**self.source.inputs, "attention_mask": mask, "bool_masked_pos": hidden}

    def outwards(self) -> Iterator[_Entry]:
        entry: _Entry | None = self
        while entry is not None:
            yield entry
            entry = entry.within


class _Given(NamedTuple):
    """The states that a model gave on, and what stands at their positions."""

    states: weakref.ref[Tensor]
    tokens: Tokens
    run: Run

    def rows(self, states: Tensor) -> Tensor | None:
        """Which of these rows others are copies of; None where one is of none."""
        mine = self.states()
        if states is mine:
            return torch.arange(len(states))
        if mine is None or (mine.shape[1:], mine.dtype, mine.device) != (states.shape[1:], states.dtype, states.device):
            return None
        found = [next((i for i, row in enumerate(mine) if torch.equal(row, state)), -1) for state in states]
        return None if -1 in found else torch.tensor(found)


class Passes:
    """What the running model was given, pass by pass. One thread's."""

    def __init__(
        self,
        model: nn.Module,
        sites: dict[nn.Module, Site],
        recorder: Recorder | None,
        roles: Sequence[str] | None,
        changes: bool,
    ) -> None:
        self.model, self.sites, self.recorder, self.changes = model, sites, recorder, changes
        self.pictures = pictures.here()
        self.names = Names(model, None if recorder is None else recorder.processor, roles, self.pictures)
        self.modules = set(model.modules())
        self.thread = threading.get_ident()
        self.crosses = any(site.cross for site in sites.values())
        self.selfs = {site.stack for site in sites.values() if not site.cross}
        self.plain = plain_stacks(model, sites)
        self.links = {link for site in sites.values() for link in links(model, site.name)}
        self.served: dict[tuple[Any, ...], Site] = {}  # a site as the layers that it has been
        self.entries: list[_Entry] = []  # running now, outermost first
        self.run: Run | None = None  # of the outermost call, as soon as it attends
        self.ran: dict[str, Tokens] = {}  # stacks of the outermost call
        self.open: Run | None = None  # of parts that ran by themselves: what they are for may follow
        self.held: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()  # by the cache that holds it
        self.given: list[_Given] = []
        self.dropping: dict[str, Dropping] = {}  # of stacks that tokens may leave
        self.newest: dict[str, Tensor] = {}  # kept, as copies of them may be all that a decoder is given

    # What the hooks tell

    def enter(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType | None = None,
    ) -> None:
        """A model, or a model inside it, starts to run."""
        self._own_thread()
        inputs = bound(module, args, kwargs)
        within = self._innermost()
        if within is None:
            transforms.refuse(inputs.values())
            parallel.refuse(self.model)
            self._unchanged()
            self.run, self.ran = None, {}
        entry = _Entry(name, module, inputs, frame or sys._getframe(1), within)
        given = inputs.get("input_ids") is not None or inputs.get("inputs_embeds") is None
        # A model that is given embeddings once more in one pass may be given another text's.
        entry.source = entry if given or within is None or module in within.called else within.source
        if within is not None:
            within.called.add(module)
        entry.again = aside.on() if within is None else within.again
        entry.cache = caches.of(inputs.get("past_key_values"))
        if within is not None and entry.source is not entry:
            entry.cache = within.cache if entry.cache is None else entry.cache
        if entry.cache is not None:
            same = within is not None and within.cache is entry.cache
            entry.start = within.start if same else int(entry.cache.get_seq_length())  # type: ignore[union-attr]
        self.entries.append(entry)
        if not entry.again:
            self.names.given()

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """It has run; one that fails says nothing, and is found by its frame."""
        while self.entries:
            entry = self.entries.pop()
            if entry.module is module:
                break
        else:
            return
        if entry.runs and not entry.again:
            run = list(entry.runs.values())[-1]
            cache = caches.of(_cache_in(output))
            if cache is not None and cache is not entry.cache:  # made inside
                self.held[cache] = run
                run.cached |= entry.runs.keys()
            self._gave(entry, output)

    def enter_plain(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A stack of layers, no model of transformers, starts to run: for a second time on what it did not give itself
        it reads another text, as a model would.
        """
        within = self._innermost()
        if within is None:
            return
        given = (*args, *kwargs.values())
        cache = next((held for value in given if (held := caches.of(value)) is not None), None)
        goes_on = cache is not None and cache is within.caches.get(module)  # in cycles over one text, as in HRM
        within.caches[module] = cache
        before = None if goes_on else within.gave.get(module)
        if before is not None and not any(v is one() for v in given if isinstance(v, Tensor) for one in before):
            self.enter(name, module, args, kwargs, sys._getframe(1))

    def leave_plain(self, module: nn.Module, args: Any, output: Any) -> None:
        if (entry := self._innermost()) is None:
            return
        if entry.module is module:
            self.leave(module, args, output)
            entry = entry.within
        if entry is not None:
            held = output.values() if isinstance(output, Mapping) else output
            held = held if isinstance(held, (tuple, list, ValuesView)) else [held]
            entry.gave[module] = [weakref.ref(value) for value in held if isinstance(value, Tensor)]

    def turn(self, module: nn.Module, *_: Any) -> None:
        """An attention module starts to run."""
        self._own_thread()
        entry, site = self._innermost(), self.sites[module]
        if entry is not None:
            layer = self._layer(entry, site)
            entry.turns[module] = _Turn(layer)
            entry.layers.setdefault(site.stack, set()).add(layer)
            self.pictures.products.clear()

    def check_seen(self, module: nn.Module, *_: Any) -> None:
        if self.entries and (turn := self.entries[-1].turns.get(module)) is not None and turn.seen == 0:
            raise Unreadable(f"{self.sites[module].name} ran without calling AttentionInterface")

    def attended(self, module: nn.Module, call: Call) -> Run | None:
        """It has attended; the run that this belongs to, unless it is none or was seen before."""
        if not self.entries:
            return None
        entry, stack = self.entries[-1], call.site.stack
        entry.turns[module].seen += call.query.shape[2]
        run = entry.runs[stack]
        run.ends[stack, call.site.layer] = call.query_positions.stop
        if entry.again:
            return None
        several = entry.cache is not None and call.query.shape[2] > 1
        # Some of these may be taken back. A long prompt would be much to keep in case.
        if several and self.recorder is not None and self.recorder.sums and (call.query_start or generation.tried()):
            run.latest.append(call)
        return run

    # Layers

    def site(self, module: nn.Module) -> Site:
        """The site, as the layer that it now serves as: one module may be several, as in ALBERT."""
        entry, site = self._innermost(), self.sites[module]
        self._refuse_unknown(entry)
        turn = None if entry is None else entry.turns.get(module)
        return site if turn is None else replace(site, layer=turn.layer)

    def coming(self, module: nn.Module) -> Site:
        """The site, as the layer that it will serve as when it next runs."""
        entry, site = self._innermost(), self.sites[module]
        self._refuse_unknown(entry)
        return site if entry is None else replace(site, layer=self._layer(entry, site))

    def first(self, module: nn.Module) -> Site:
        """The same where tokens may leave, which they do once: RuntimeError where it runs again for its gradient."""
        if (entry := self._innermost()) is not None and entry.again:
            raise RuntimeError(
                "tokens cannot leave a model whose layers run again for their gradient: turn gradient checkpointing off"
            )
        return self.coming(module)

    @staticmethod
    def _layer(entry: _Entry, site: Site) -> int:
        """The first of its numbers that no layer of this pass has had yet; after them all, the next one."""
        ran = entry.layers.get(site.stack, ())
        return next((layer for layer in (site.layer, *site.also) if layer not in ran), max(ran, default=-1) + 1)

    # Calls

    @property
    def here(self) -> bool:
        """Whether the model is this thread's."""
        return threading.get_ident() == self.thread

    @property
    def recording(self) -> bool:
        """Whether a model runs, for the first time."""
        return bool(self.entries) and not self.entries[-1].again

    def where(self, module: nn.Module, call: Call) -> dict[str, Any]:
        """Site, positions and tokens of a call, as fields of it."""
        site, entry = self.sites[module], self._innermost()
        heads, kv_heads = call.query.shape[1], call.key.shape[1]
        if entry is None:  # a module run by itself
            self._refuse_unknown(entry)
            return {"site": replace(site, heads=heads, kv_heads=kv_heads)}
        if (turn := entry.turns.get(module)) is None:  # not by the call that runs hooks
            turn = entry.turns[module] = _Turn(self._layer(entry, site))
        same = turn.query is not None and turn.query() is call.query  # once more, for other values, as in DiffLlama
        if same or call.again:
            turn.seen, turn.times = 0, turn.times + 1
        turn.query = weakref.ref(call.query)
        if (left := self._left(site.stack, turn.layer)) is not None:
            return self._of_left(entry, module, turn, site, call, left)
        causal = not site.cross and (bool(getattr(module, "is_causal", False)) or _looks_causal(call))
        labels = self._labels(entry, call)
        stack = self._part(entry, module, turn, site, call, labels)
        stack = f"{stack}.{turn.times + 1}" if turn.times else stack
        serves = module, turn.layer, heads, kv_heads, causal, stack
        if serves not in self.served:
            changes = {"layer": turn.layer, "heads": heads, "kv_heads": kv_heads, "causal": causal, "stack": stack}
            self.served[serves] = replace(site, **changes)
        site = self.served[serves]
        alike = (site.stack, turn.seen, *call.query.shape[:3:2], *call.key.shape[:3:2])
        if (known := entry.known.get(alike)) is None:
            known = entry.known[alike] = self._known(entry, replace(call, site=site), turn.seen, *labels)
        return {"site": site, **known}

    def _left(self, stack: str, layer: int) -> Left | None:
        """What is left of the tokens at a layer, where some have left before."""
        left = self.dropping[stack].layers.get(layer) if stack in self.dropping else None
        return left if left is not None and left.cut else None

    def _of_left(
        self, entry: _Entry, module: nn.Module, turn: _Turn, site: Site, call: Call, left: Left
    ) -> dict[str, Any]:
        """The same where tokens have left: those of the whole sequence, of which some are taken."""
        (batch, heads, m, _), kv_heads = call.query.shape, call.key.shape[1]
        query = call.query.new_empty(batch, heads, left.n, 0)
        key = call.key.new_empty(batch, kv_heads, left.start + left.n, 0)
        site = replace(site, layer=turn.layer, heads=heads, kv_heads=kv_heads, causal=True)
        labels, _ = self._labels(entry, call)
        if labels is not None:
            labels = torch.full((batch, left.n), NONE).scatter(1, left.at.cpu(), labels)
        known = self._known(entry, replace(call, site=site, query=query, key=key), turn.seen, labels)
        at, blind = left.keys
        tokens = known["tokens"].taken(at).marked("pad", blind)
        queries = known["query_tokens"].taken(left.at).marked("pad", left.blind)
        new = {"tokens": tokens.to(call.query.device), "query_tokens": queries.to(call.query.device)}
        return {"site": site, **known, **new, "positions": at, "query_start": at.shape[1] - m, "key_start": 0}

    def _labels(self, entry: _Entry, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """Where in pictures and texts queries and keys come from; of keys, None where they are as the queries."""
        if not self.pictures.on:
            return None, None
        (batch, heads, n, _), n_key = call.query.shape, call.key.shape[2]
        queries, keys = self.pictures.of(call.query, call.key)
        if call.edits:  # an adapter's, which knows scores and values only
            queries, keys = self.pictures.of_product(batch, heads, n, n_key)
            _, valued = self.pictures.of(call.query, call.value)
            keys = valued if keys is None else keys
            queries = keys if queries is None and n == n_key else queries
        self.pictures.attended = queries
        queries = torch.full((batch, n), NONE) if queries is None else queries
        keys = torch.full((len(call.key), n_key), NONE) if keys is None else keys
        alike = not call.site.cross and (torch.equal(keys, queries) or entry.cache is not None)
        return queries, None if alike else keys

    def _part(
        self, entry: _Entry, module: nn.Module, turn: _Turn, site: Site, call: Call, labels: Sequence[Tensor | None]
    ) -> str:
        """The name of its stack, or of the part of it whose positions are these: of a stage, of shifted windows."""
        (queries, keys), (batch, n) = labels, (len(call.query), call.query.shape[2])
        if turn.stack or queries is None:
            name = turn.stack or entry.parts.get((module, turn.layer), site.stack)
            if queries is not None and (layouts := entry.layouts.get(site.stack)):
                layouts[self._number(site, name)].add(turn.seen, queries)
            return name
        ids = entry.source.inputs.get("input_ids")
        if entry.cache is not None or (isinstance(ids, Tensor) and ids.shape == (batch, n)):
            return site.stack
        layouts = entry.layouts.setdefault(site.stack, [])
        number = next((i for i, one in enumerate(layouts) if one.holds(turn.seen, queries, keys)), len(layouts))
        if number == len(layouts):
            layouts.append(_Layout(queries, keys))
        layouts[number].add(turn.seen, queries)
        turn.stack = site.stack if not number else f"{site.stack}.{number + 1}"
        entry.parts[module, turn.layer] = turn.stack
        return turn.stack

    @staticmethod
    def _number(site: Site, part: str) -> int:
        return int(part.removeprefix(f"{site.stack}.")) - 1 if part != site.stack else 0

    def _known(
        self, entry: _Entry, call: Call, seen: int, queries: Tensor | None = None, others: Tensor | None = None
    ) -> dict[str, Any]:
        """Positions and tokens, which are the same for all layers of a stack, or of a part of it."""
        stack, n_query, n_key = call.site.stack, call.query.shape[2], call.key.shape[2]
        start = entry.start + seen
        call = replace(call, query_start=start)
        if stack not in entry.runs:
            entry.runs[stack] = self._begun(entry, call)
        run = entry.runs[stack]
        own = self._own(entry, run, call, queries)
        if not call.site.cross:
            self.ran[stack] = own
        # A sliding cache holds the newest keys only; a packed sequence comes in pieces that see only themselves.
        key_start = 0 if call.site.cross else (seen or max(0, start + n_query - n_key))
        earlier = own[:key_start] if key_start and not seen else None
        told = others is not None and bool((others != NONE).any())
        if call.site.cross:
            keys = self.names.labelled(stack, others, entry.told()) if told else self._keys(entry, run, call)  # type: ignore
            run.keys[stack] = keys
        elif (
            entry.cache is None and not seen and (told or n_key - n_query not in (0, call.appended))
        ):  # pooled, or others
            keys, key_start, earlier = Tokens.plain("other", len(call.key), n_key), 0, None
            if others is not None:
                keys = run.keys[stack] = self.names.labelled(stack, others, entry.told())
        else:
            keys = own
        if len(keys) < key_start + n_key:  # a static cache is longer than what it holds
            role = "special" if call.appended else "pad"
            keys = keys.then(Tokens.plain(role, len(keys.ids), key_start + n_key - len(keys)))
            if call.appended:
                run.keys[stack] = keys
        device = call.query.device
        return {
            "query_start": start,
            "key_start": key_start,
            "tokens": keys[key_start : key_start + n_key].to(device),
            "query_tokens": own[start : start + n_query].to(device),
            "earlier": earlier,
        }

    def _own(self, entry: _Entry, run: Run, call: Call, labels: Tensor | None) -> Tokens:
        """Tokens of the stack's sequence, up to the last query of this call."""
        stack, batch, start, n = call.site.stack, len(call.query), call.query_start, call.query.shape[2]
        known = run.tokens.get(stack)
        if known is not None and (len(known.ids) != batch or (start == 0 and len(known) != n)):
            known = None  # a layer of another width, as in a pyramid
        decoding = self._decoding(entry)
        if known is None:
            known = self.names.before(call, entry.told(), decoding)
        if len(known) < start:
            known = known.then(Tokens.plain("other", batch, start - len(known)))
        if start + n > len(known):
            late, more = replace(call, query_start=len(known)), start + n - len(known)
            labels = None if labels is None else labels[:, n - more :]
            after = len(known.grids) if entry.start else 0
            known = known.then(self.names.new(late, entry.told(), more, decoding, labels, after))
        if len(known) >= len(run.tokens.get(stack, ())):
            run.tokens[stack] = known
        return known

    def _keys(self, entry: _Entry, run: Run, call: Call) -> Tokens:
        """Tokens of the sequence that cross attention looks at."""
        known = self.names.words(call, entry.source.inputs) or self._looked_at(entry, run, call)
        if known is not None and (len(known.ids), len(known)) != (len(call.key), call.key.shape[2]):
            known = None
        masks = (e.inputs.get("encoder_attention_mask") for e in entry.outwards())
        return self.names.keys(call, known, next((m for m in masks if m is not None), None))

    def _looked_at(self, entry: _Entry, run: Run, call: Call) -> Tokens | None:
        """What the cache holds of it; or of the states that the model was given; or the one other stack of this pass
        that has so many positions, where the states were made in it."""
        if entry.cache is not None and entry.start:
            return run.keys.get(call.site.stack)
        for states in [states for e in entry.outwards() if (states := _states(e.inputs)) is not None]:
            for given in reversed(self.given):
                if (rows := given.rows(states)) is not None:
                    return given.tokens.of_rows(rows)
        shape, own = (len(call.key), call.key.shape[2]), call.site.stack.removesuffix("_cross")
        alike = [t for stack, t in self.ran.items() if stack != own and (len(t.ids), len(t)) == shape]
        return alike[0] if len(alike) == 1 and self._outside() is None else None

    def _outside(self) -> Tensor | None:
        """Another model's states, where the outermost call was given them."""
        return _states(self.entries[0].inputs)

    def _gave(self, entry: _Entry, output: Any) -> None:
        """Remember what a model gave on, in case that a decoder is given it."""
        states = output if isinstance(output, Tensor) else _first(output)
        if not self.crosses or not isinstance(states, Tensor) or states.ndim != 3:
            return
        for stack, run in entry.runs.items():
            tokens = run.tokens.get(stack)
            if tokens is not None and _added(tokens[states.shape[1] :]):  # for itself
                tokens = tokens[: states.shape[1]]
            if tokens is not None and tokens.ids.shape == states.shape[:2] and stack in self.selfs:
                self.newest[entry.name] = states
                self.given = [given for given in self.given if given.states() is not None]
                self.given.append(_Given(weakref.ref(states), tokens, run))
                return

    # Runs

    def _begun(self, entry: _Entry, call: Call) -> Run:
        """The run that the calls of a stack belong to, from its first call in this model on."""
        if entry.again:
            return Run()
        stack, mine = call.site.stack, self._mine(entry)
        run = None if entry.cache is None else self.held.get(entry.cache)
        if run is None or not entry.start or run.batch != len(call.query):
            run = self._joined(entry, (stack, call.site.layer), mine) or Run()
        elif run is not self.run:
            self._shorten(run, entry.start)  # by code that does not say so
        if entry.cache is not None:
            self.held[entry.cache] = run
            run.cached.add(stack)
        if mine is not None:
            mine.runs.setdefault(self, run)
            if mine.prompt is not None and self._decoding(entry) is mine:
                mine.decoded.setdefault(self, (run, len(run.orders)))
        if run is not self.run and (call.query.shape[2] > 1 or not generation.tried()):
            run.latest.clear()
        self.run, self.open = run, None if self.entries[0].module is self.model else run
        return run

    def _joined(self, entry: _Entry, key: tuple[str, int], mine: Generation | None) -> Run | None:
        """The run of a new sequence, where it has one: that of this pass, or of this call of `generate`; of the states
        that it was given; of parts that have run by themselves."""
        found, outside = self.run, self._outside()
        if found is None and mine is not None:
            found = mine.runs.get(self)
        if found is None and outside is not None:
            found = next((given.run for given in reversed(self.given) if given.rows(outside) is not None), None)
        whole = (now := generation.now()) is not None and now.model is self.model  # then it ran the parts itself
        if found is None and outside is None and not whole and not entry.start:
            found = self.open
        return found if found is not None and key not in found.ends else None

    def _mine(self, entry: _Entry) -> Generation | None:
        """The call of `generate` that this model runs for."""
        now = generation.now()
        if now is None or not (now.model in self.modules or any(m is self.model for m in now.model.modules())):
            return None
        cache = caches.of(now.cache)
        return now if cache is None or entry.cache is None or cache is entry.cache else None

    def _decoding(self, entry: _Entry) -> Generation | None:
        """The call of `generate` whose sequence this model is given."""
        mine = self._mine(entry)
        if mine is None or mine.prompt is None or entry.start:
            return mine
        if (cache := caches.of(mine.cache)) is not None:
            return mine if cache is entry.cache else None
        ids, n = entry.source.inputs.get("input_ids"), mine.prompt.shape[1]
        whole = isinstance(ids, Tensor) and torch.equal(ids[:, :n].cpu(), mine.prompt)
        return mine if whole else None

    def heard(self, cache: Any, rows: Rows | None) -> None:
        """A cache has other rows, or fewer positions, than before."""
        if cache is None or (run := self.held.get(cache)) is None or run.batch is None:
            return
        if rows is None:
            self._shorten(run, int(cache.get_seq_length()))
            return
        order = rows(run.batch)
        if self.recorder is not None and not torch.equal(order, torch.arange(run.batch)):
            self.recorder.refuse_order()
        run.reorder(order)

    def _shorten(self, run: Run, end: int) -> None:
        if any(len(run.tokens.get(stack, ())) > end for stack in run.cached):
            if self.recorder is not None:
                self.recorder.crop(run, end)
            run.crop(end)

    def came_out(self, generation: Generation) -> None:
        """A beam search is over: the run is of the sequences that it found. Its cache is of those that ran last."""
        run, before = generation.decoded[self]
        if run.cached:  # otherwise each step is a run
            run.choose(generation.beams, before, generation.begins, generation.made)
            for cache in [cache for cache, held in self.held.items() if held is run]:
                del self.held[cache]

    # A checkpoint's gradient

    def stand(self) -> _Entry | None:
        """How things stand, for a part of a model that will run again from here."""
        entry = self._innermost()
        return None if entry is None else entry.copy()

    @contextmanager
    def repeated(self, stand: _Entry) -> Iterator[None]:
        """Once more from there. Of a GPU, the gradient has a thread of its own."""
        before = self.entries, self.thread
        self.entries, self.thread = [stand.copy()], threading.get_ident()
        try:
            yield
        finally:
            self.entries, self.thread = before

    # What cannot be followed

    def _innermost(self) -> _Entry | None:
        """The innermost model that runs. Whatever an interrupt has ended is left out, as its hooks were."""
        while self.entries and not _runs(self.entries[-1].frame):
            self.entries.pop()
        return self.entries[-1] if self.entries else None

    def _own_thread(self) -> None:
        if not self.here:
            raise RuntimeError(
                f"{type(self.model).__name__} runs in another thread than the one that opened the block of record or "
                f"intervene: a session is one thread's; open it in the thread that runs the model"
            )

    def _unchanged(self) -> None:
        for holder, name, module in self.links:
            if holder._modules.get(name) is not module:
                raise UnreachableAttention(
                    f"{name!r} of {type(holder).__name__}, which holds attention, was replaced inside the block of "
                    f"record or intervene; open the block after the change"
                )

    def _refuse_unknown(self, entry: _Entry | None) -> None:
        if entry is None and self.changes and checkpoints.in_backward():
            raise RuntimeError(
                f"a part of {type(self.model).__name__} runs again for its gradient, and where in the model's pass is "
                f"not known, so interventions would not be the same as in the pass: run forward and backward inside "
                f"one block, with torch.utils.checkpoint, or turn gradient checkpointing off"
            )


def _runs(frame: FrameType | None) -> bool:
    """Whether a frame is being executed: one that has ended can be cleared."""
    try:
        if frame is not None:
            frame.clear()
    except RuntimeError:
        return True
    return frame is None


def _states(inputs: Mapping[str, Any]) -> Tensor | None:
    """The states of another model that a model was given."""
    for name in ("encoder_hidden_states", "encoder_outputs"):
        states = inputs.get(name)
        states = states if isinstance(states, Tensor) else _first(states)
        if isinstance(states, Tensor) and states.ndim == 3:
            return states
    return None


def _first(output: Any) -> Any:
    """The first of several outputs, as a tuple or a mapping holds them."""
    values = output.values() if isinstance(output, Mapping) else output
    return next(iter(values), None) if isinstance(values, (tuple, list, ValuesView)) else None


def _added(tokens: Tokens) -> bool:
    """Whether these are positions that a model adds to its text, if any."""
    return bool((tokens.role("pad") | tokens.role("special")).all())


def _cache_in(output: Any) -> Any:
    if isinstance(output, (tuple, list)):
        return next((value for value in output if caches.of(value) is not None), None)
    return getattr(output, "past_key_values", None)


def _looks_causal(call: Call) -> bool:
    """Whether, of two neighbours, the later sees the earlier and not the other way round."""
    mask = call.mask
    if mask is None or call.query.shape[2] < 2 or mask.shape[-2] != mask.shape[-1]:
        return call.causal
    seen = shows(mask)
    pairs = (seen[..., i, i - 1] & ~seen[..., i - 1, i] for i in (1, -1))
    return any(bool(pair.any()) for pair in pairs)
