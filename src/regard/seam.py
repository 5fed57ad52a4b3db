"""The one place where Regard touches a model.

transformers looks the attention function of most architectures up in `AttentionInterface`, at every call. While a
session is open that look-up answers with `_route`, which hands calls of other modules on untouched and lets the
session see its own. The model, its configuration and its masks stay as they are, so output under `record` is the
model's own to the bit, whatever implementation each part of it runs with.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from . import adapters, catalog, editing, kernels, sites
from .adapters import caches, checkpoints, generation, interface, parallel, pictures
from .adapters.interface import Asked
from .call import Call, Unreadable
from .functions import innermost
from .hooks import attach
from .kernels import Reduction
from .passes import Passes
from .recording import Recorder, Run, Sink
from .shared import shared
from .sites import UnreachableAttention
from .weights import union

_sessions: dict[nn.Module, list[_Session]] = {}  # open ones by attention module, outermost first
_watches: dict[nn.Module, Callable[[], AbstractContextManager[None]]] = {}  # of those that an adapter reads
_followed: weakref.WeakKeyDictionary[nn.Module, Callable[[], AbstractContextManager[None]]] = (
    weakref.WeakKeyDictionary()  # models whose pictures are followed
)
_get_interface = AttentionInterface.get_interface
# What each statistic asked of its last call: most likely what it asks of the next, so that one pass can serve all.
_asked: weakref.WeakKeyDictionary[Callable[..., Tensor | None], set[Reduction]] = weakref.WeakKeyDictionary()


@contextmanager
def record(
    model: nn.Module,
    *statistics: str | Callable[..., Tensor | None],
    processor: Any = None,
    roles: Sequence[str] | None = None,
    attributes: Mapping[str, Any] | None = None,
    own_output: bool = False,
    sink: Sink | None = None,
    **named: str | Callable[..., Tensor | None],
) -> Iterator[Recorder]:
    """Record statistics of every attention call that `model` makes inside the block.

    statistics: names from `regard.statistics`, or functions declared with `@regard.statistic`; keyword arguments give
    one a name of its own: `record(model, near=partial(distance, clip=16))`.
    processor: tokenizer, processor or diffusers pipeline, for the text of tokens. roles: the role of each token of the
    first forward pass, as from `regard.chat_roles`, where inputs do not tell. attributes: kept with the recording.
    own_output: keep the model's output its own to the bit, at the cost of a second pass for the statistics. Otherwise,
    where Regard's kernel can, output and statistics come out of one pass, and the output equals the model's to rounding
    (1e-6 or so in float32). The kernel cannot, and the output is the model's own, with gradients, with dropout, with
    attn_implementation="eager", off the CPU, in float64, or where it was not built (`regard info`).

    sink: takes `(name, call, tensor)` of each statistic and call as it comes; then nothing is kept here.

    With gradients enabled the model trains as usual; what is recorded is detached.

        with regard.record(model, "entropy", "received") as recording:
            model.generate(**inputs)
        recording.tree["language_model"]["entropy"].sel(layer=3, head=5)
    """
    made = {name: _made(statistic) for name, statistic in chosen(statistics, named).items()}
    recorder = Recorder(made, processor, dict(attributes or {}), sink)
    with _open(_Session(model, recorder=recorder, roles=roles, own_output=own_output)):
        try:
            yield recorder
        except BaseException:
            recorder.interrupted = True
            raise
        recorder.refuse_lost()


@contextmanager
def intervene(model: nn.Module, *interventions: Any) -> Iterator[None]:
    """Change every attention call that `model` makes inside the block, left to right; `record` sees the result.

    An intervention is an object with any of: `inputs(call) -> call`; `weights(call, weights, rows) -> weights`, given
    dense weights [batch, head, rows, key] of a range of queries; `output(call, output) -> output`, both
    [batch, head, query, dim]; `mlp(site, output) -> output`, what the layer's feed-forward module gives, before it is
    added; `hidden(site, hidden) -> hidden`, what the layer gives on; `entering(site, hidden) -> hidden`, what it is
    given; all three mostly [batch, query, dim]. `neurons(site, activations) -> activations`: hidden units of the
    feed-forward module after its nonlinearity (where it is gated, the product), mostly [batch, query, neuron].

    `given(inputs) -> inputs`, what the model or its `generate` is given by name, to be changed to others of the same
    names and shapes.

    `appended(site, hidden) -> tokens`, asked of the first layer of each stack: tokens [batch, register, dim], or None,
    to stand behind `hidden` in all layers, with role "register"; what the stack gives on is without them.

    `guided(output, other) -> output`, what the model as a whole gives, its first tensor, and the same of another run on
    the same inputs, under the intervention that is its attribute `aside`; `record` does not see that run. For models
    that denoise, not for those that keep a cache.

    `keeps(site, hidden, positions) -> keep` says as a layer begins which of its tokens go on, boolean [batch, query],
    or None for all: the others leave, this layer and those after it run on fewer, and so do their caches, while
    positions stay those of the whole sequence, `positions` [batch, query]. What the model gives in the end has all
    tokens; those that left are as they were then. A recording leaves out what layers do that some did not come to.

    Beside these it may have `begin(model)`, called as the block opens, to refuse a model that it does not fit and to
    forget what it kept of another run; and `where(call) -> bool`: only there is it asked for `weights`.
    """
    for thing in interventions:
        if not any(editing.has(thing, hook) for hook in editing.HOOKS):
            raise TypeError(f"{thing!r} is not an intervention: it has none of {', '.join(editing.HOOKS)}")
        if hasattr(thing, "begin"):
            thing.begin(model)
    with _open(_Session(model, interventions=interventions)):
        yield


def chosen(
    statistics: Sequence[str | Callable[..., Tensor | None]], named: Mapping[str, str | Callable[..., Tensor | None]]
) -> dict[str, Callable[..., Tensor | None]]:
    """Statistics by the names that they are recorded under."""
    names = [*map(_name, statistics), *named]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ValueError(f"two statistics are named {twice!r}; give one another name: record(model, my_{twice}=...)")
    found = dict(zip(names, (*statistics, *named.values())))
    if not found:
        raise ValueError("give at least one statistic, such as 'entropy'")
    return {name: catalog.statistic(s) if isinstance(s, str) else s for name, s in found.items()}


def _name(statistic: str | Callable[..., Tensor | None]) -> str:
    if isinstance(statistic, str):
        return statistic
    name = getattr(statistic, "__name__", None)
    if name is None:
        raise TypeError(f"{statistic!r} has no name; give it one: record(model, some_name=...)")
    return name


def _made(statistic: Callable[..., Any]) -> Callable[..., Any]:
    """The statistic to call: of a class, which holds state, an object that lives as long as the recording."""
    return statistic() if isinstance(innermost(statistic), type) else statistic


class _Session:
    """One open `record` or `intervene`."""

    def __init__(
        self,
        model: nn.Module,
        recorder: Recorder | None = None,
        interventions: Sequence[Any] = (),
        roles: Sequence[str] | None = None,
        own_output: bool = False,
    ) -> None:
        self.own_output = own_output
        self.model, self.recorder, self.interventions = model, recorder, interventions
        parallel.refuse(model)
        self.sites = sites.find(model)
        missed, other = sites.unreached(model, self.sites)
        if not self.sites:
            sites.refuse_unreached(model, missed, other)
        if recorder is not None:
            recorder.attributes.setdefault("architecture", type(getattr(model, "_orig_mod", model)).__name__)
            recorder.spread, recorder.copy = parallel.spread(model), parallel.copy(model)
            recorder.attributes.setdefault("unreached", missed)
            recorder.attributes.setdefault("not_softmax", other)
        self.passes = Passes(model, self.sites, recorder, roles, changes=bool(interventions))
        self.editing = editing.Editing(model, self.sites, self.passes, interventions, intervene)
        self.closed = False
        statistics = () if recorder is None else recorder.statistics
        self.does = ", ".join([*(type(thing).__name__ for thing in interventions), *statistics])
        self.agreed: set[Any] = set()  # groups of processes that have said to each other that they do the same
        self.expected: set[Reduction] | None = None  # of a call; None: ask what was asked of the last one
        self.refused: dict[str, str] = {}  # stacks that are not recorded, and why
        for module, site in self.sites.items():
            if not sites.calls_interface(module):
                continue
            used = getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"
            if not interface.readable(used):
                why = (
                    f"{site.name} runs with attn_implementation={used!r}, which Regard cannot read exactly; "
                    f"call model.set_attn_implementation('sdpa') (or 'eager') first"
                )
                self.refuse(module, Unreadable(why))

    def refuse(self, module: nn.Module, why: Unreadable) -> None:
        """Leave out the stack of a module. Raises where no other is left, and where it was to be changed."""
        stack = self.sites[module].stack
        if stack in self.refused:
            return
        left = {site.stack for site in self.sites.values()} - {stack, *self.refused}
        if self.recorder is None or not left:
            raise why
        names = {site.name for site in self.sites.values() if site.stack == stack}
        if not self.recorder.leave_out(names):
            raise why
        self.refused[stack] = str(why)
        self.recorder.attributes["refused"] = [f"{name}: {reason}" for name, reason in self.refused.items()]
        warnings.warn(f"the stack {stack!r} is not recorded: {why}", stacklevel=2)

    def change(self, call: Call) -> Call:
        for thing in self.interventions:
            if editing.has(thing, "inputs"):
                call = editing.result(thing, "inputs", thing.inputs(call), call)
            if editing.has(thing, "weights") and (not hasattr(thing, "where") or thing.where(call)):
                call = call.but(edits=(*call.edits, partial(_edit_weights, thing, call)))
        return call

    def expect(self, call: Call) -> None:
        """Say which reductions its statistics will likely ask of a call."""
        assert self.recorder is not None
        if self.expected is None:
            self.expected = union(_asked.get(f, set()) for f in self.recorder.statistics.values())
        known = call.tokens is not None  # otherwise there are no roles to ask for
        call.weights.expected = {r for r in self.expected if known or not isinstance(r.knob, str)}

    @torch.no_grad()
    def see(self, call: Call, run: Run) -> None:
        recorder = self.recorder
        assert recorder is not None
        if not run.sites:
            recorder.begin(run)
        run.sites.setdefault(call.site.stack, {})[call.site.layer] = call.site
        self.expect(call)
        weights = call.weights
        for name, function in recorder.statistics.items():
            weights.asked = set()
            recorder.add(run, call, name, function(call))
            if self.expected is None or not weights.asked <= self.expected:
                _asked[function], self.expected = union([weights.asked]), None


@contextmanager
def _open(session: _Session) -> Iterator[None]:
    passes = session.passes
    with ExitStack() as undo:
        undo.enter_context(_watching())
        undo.enter_context(caches.heard(passes.heard))
        session.editing.attach_first(undo)
        for name, module in session.model.named_modules():
            if module is session.model or isinstance(module, PreTrainedModel):
                attach(undo, module.register_forward_pre_hook, partial(passes.enter, name), with_kwargs=True)
                attach(undo, module.register_forward_hook, passes.leave)
                if pictures.takes(module):
                    watch = _followed.setdefault(module, shared(partial(pictures.watch, module)))
                    undo.enter_context(watch())
        for name, module in passes.plain.items():
            attach(undo, module.register_forward_pre_hook, partial(passes.enter_plain, name), with_kwargs=True)
            attach(undo, module.register_forward_hook, passes.leave_plain)
        reader = getattr(getattr(session.recorder, "processor", None), "text_encoder", None)
        if isinstance(reader, nn.Module):  # the processor is a pipeline, whose texts the model sees as states only
            attach(undo, reader.register_forward_hook, passes.names.read, with_kwargs=True)
        for module, site in session.sites.items():
            if any(other.passes.thread != passes.thread for other in _sessions.get(module, ())):
                raise RuntimeError(
                    f"{site.name} is in a block of record or intervene that another thread opened: a model with a "
                    f"session is one thread's; give each thread a model of its own"
                )
            attach(undo, module.register_forward_pre_hook, passes.turn)
            if sites.calls_interface(module):
                attach(undo, module.register_forward_hook, partial(_check_seen, session))
            else:
                watch = _watches.setdefault(module, shared(partial(adapters.watch, module, _route, _refuse)))
                undo.enter_context(watch())
            _sessions.setdefault(module, []).append(session)
            undo.callback(_forget, module, session)
        others = {other: None for module in session.sites for other in _sessions[module] if other is not session}
        session.editing.refuse_beside([other.editing for other in others])
        session.editing.attach(undo)
        try:
            yield
        finally:
            session.closed = True


def _forget(module: nn.Module, session: _Session) -> None:
    _sessions[module].remove(session)
    if not _sessions[module]:
        del _sessions[module]
        _watches.pop(module, None)


@shared
@contextmanager
def _watching() -> Iterator[None]:
    """What is changed outside of models while any session is open."""
    with ExitStack() as undo:
        # A compiled model would not look the function up again; inside a session it runs uncompiled.
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.enter_context(generation.watched())
        undo.enter_context(caches.watched())
        undo.enter_context(checkpoints.watched(_stand))
        AttentionInterface.get_interface = _look_up  # type: ignore[method-assign]
        undo.callback(setattr, AttentionInterface, "get_interface", _get_interface)
        yield


def _stand() -> Callable[[], AbstractContextManager[None]] | None:
    """How to run a part of a model again under the sessions that see it now."""
    sessions = {session: None for of_module in tuple(_sessions.values()) for session in of_module}
    stands = [(s, stand) for s in sessions if s.passes.here and (stand := s.passes.stand()) is not None]
    return partial(_repeated, stands) if stands else None


@contextmanager
def _repeated(stands: Sequence[tuple[_Session, Any]]) -> Iterator[None]:
    with ExitStack() as undo:
        for session, stand in stands:
            if session.closed and session.interventions:
                raise RuntimeError(
                    f"a part of {type(session.model).__name__} runs again for its gradient, but the block of intervene "
                    f"that it ran in has ended; run backward inside the block, or turn gradient checkpointing off"
                )
            undo.enter_context(session.passes.repeated(stand))
        yield


def _look_up(self: AttentionInterface, implementation: str | None, default: Callable[..., Any]) -> Callable[..., Any]:
    return partial(_route, implementation or "eager", _get_interface(self, implementation, default))  # type: ignore[arg-type]


def _route(
    implementation: str,
    function: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Stand in for the attention function: the open sessions of this module change the call, and see it."""
    sessions = [s for s in _sessions.get(module, ()) if s.sites[module].stack not in s.refused]
    if not sessions:
        return function(module, query, key, value, attention_mask, **kwargs)
    asked = Asked(implementation, function, module, query, key, value, attention_mask, kwargs)
    try:
        return _read(asked, sessions)
    except Unreadable as error:
        _refuse(module, error)
        return asked.run(query, key, value)


def _read(asked: Asked, sessions: Sequence[_Session]) -> tuple[Tensor, Tensor | None]:
    module = asked.module
    with pictures.unfollowed():
        given = interface.read(asked, sessions[0].sites[module])
        asked, given = _brought_together(asked, given, sessions)
        contexts = [session.passes.where(module, given) for session in sessions]
        call = _changed(sessions, contexts, given)
        seen, result, weights = _attended(asked, given, call, sessions, contexts)
        output = seen[0].output
        edited = _edited(sessions, seen, output)
        _shown(sessions, seen, module)
        if result is None or edited is not output:
            result = asked.mine(edited, asked.query).transpose(1, 2).contiguous()
        weights = None if weights is None else asked.mine(weights, asked.query)
    sessions[0].passes.pictures.gave(result)
    return result, weights


def _refuse(module: nn.Module, why: Unreadable) -> None:
    for session in _sessions.get(module, ()):
        session.refuse(module, why)


def _check_seen(session: _Session, module: nn.Module, *_: Any) -> None:
    if session.sites[module].stack not in session.refused:
        try:
            session.passes.check_seen(module)
        except Unreadable as error:
            session.refuse(module, error)


def _brought_together(asked: Asked, given: Call, sessions: Sequence[_Session]) -> tuple[Asked, Call]:
    """The call of all heads, where several processes have some each."""
    share = parallel.share(asked.module, given, asked.function)
    if share is None:
        return asked, given
    if any(share.group not in session.agreed for session in sessions):
        parallel.agree(share, " | ".join(session.does for session in sessions))
    for session in sessions:
        session.agreed.add(share.group)
    return replace(asked, share=share), share.whole(given)


def _changed(sessions: Sequence[_Session], contexts: Sequence[dict[str, Any]], given: Call) -> Call:
    """The call as the interventions of each session, outermost first, leave it."""
    call = given
    for session, context in zip(sessions, contexts):
        if session.interventions:
            call = session.change(call.but(**context))
    own = bool(given.edits)  # an adapter's: the module computes its weights by itself
    if own and not (_untouched(call, given) and call.query is given.query and call.key is given.key):
        raise UnreachableAttention(
            f"{call.site} computes its weights by itself, so an intervention can change its values, weights and "
            f"output, but not its query, key, mask or scale"
        )
    return call


def _untouched(call: Call, given: Call) -> bool:
    """Whether all but query, key, value and weights is as the model gave it."""
    return all(
        getattr(call, f) is getattr(given, f)
        for f in ("scale", "mask", "causal", "bias", "factors", "softcap", "sinks")
    )


def _attended(
    asked: Asked, given: Call, call: Call, sessions: Sequence[_Session], contexts: Sequence[dict[str, Any]]
) -> tuple[list[Call], Tensor | None, Tensor | None]:
    """The call as each session sees it, with its output; the model's own result and weights where its function ran."""
    seen = [call.but(**context) for context in contexts]
    if call.edits is not given.edits or not _untouched(call, given):
        seen = _with_output([its.but(dropout=asked.dropout) for its in seen], sessions)
        # whoever runs eager attention has the map in memory anyway, and may have asked for it
        eager = asked.implementation == "eager"
        return seen, None, seen[0].weights.dense(budget=sys.maxsize) if eager else None
    # The model's own function still says what is wanted. Each kind of call of a module is once compared with it.
    fused = asked.implementation == "sdpa" and not asked.dropout and _fuses(sessions, seen[0])
    result = weights = None
    if asked.new or not fused:
        changed = (call.query, given.query), (call.key, given.key), (call.value, given.value)
        theirs = (asked.query, asked.key, asked.value)
        used = (asked.mine(ours, own) if ours is not old else own for (ours, old), own in zip(changed, theirs))
        result, weights = asked.run(*used)
        own = asked.whole(result.reshape(*result.shape[:2], asked.query.shape[1], -1).transpose(1, 2))
        if asked.new:
            interface.check(asked, call.but(own_output=own))
        if not fused:
            return [its.but(own_output=own) for its in seen], result, weights
    return _with_output(seen, sessions), None, weights


def _edited(sessions: Sequence[_Session], seen: Sequence[Call], output: Tensor) -> Tensor:
    for session, call in zip(sessions, seen):
        for thing in session.interventions:
            if editing.has(thing, "output"):
                output = editing.result(thing, "output", thing.output(call, output), output)
    return output


def _shown(sessions: Sequence[_Session], seen: Sequence[Call], module: nn.Module) -> None:
    for session, call in zip(sessions, seen):
        run = session.passes.attended(module, call)
        if run is not None and session.recorder is not None and call.positions is None:
            session.see(call, run)


def _fuses(sessions: Sequence[_Session], call: Call) -> bool:
    recording = any(session.recorder is not None and session.passes.recording for session in sessions)
    return recording and not any(session.own_output for session in sessions) and kernels.fuses(call.operands)


def _with_output(seen: Sequence[Call], sessions: Sequence[_Session]) -> list[Call]:
    """The same with Regard's own output, made along with what the first recorder will ask of its call."""
    first = next((i for i, session in enumerate(sessions) if session.recorder is not None), 0)
    if sessions[first].recorder is not None:
        sessions[first].expect(seen[first])
    output = seen[first].output
    return [call if i == first else call.but(own_output=output) for i, call in enumerate(seen)]


def _edit_weights(thing: Any, call: Call, weights: Tensor, rows: range) -> Tensor:
    return editing.result(thing, "weights", thing.weights(call, weights, rows), weights)
