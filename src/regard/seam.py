"""The one place where Regard touches a model.

transformers looks the attention function of most architectures up in `AttentionInterface`, at every call. While a
session is open that look-up answers with `_route`, which hands calls of other modules on untouched and lets the
session see its own. The model, its configuration and its masks stay as they are, so output under `record` is the
model's own to the bit, whatever implementation each part of it runs with.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from . import catalog, sites
from .call import Call, Site
from .recording import Recorder, Run
from .sites import UnreachableAttention
from .tokens import ROLES, Tokens
from .weights import Reduction, union

READABLE = ("eager", "sdpa")  # implementations whose semantics `_read` knows
_HOOKS = ("inputs", "weights", "output", "hidden")
# How far the output may be from weights @ value, as a share of the largest value, before a call counts as misread.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}

_sessions: dict[nn.Module, list[_Session]] = {}  # open ones by attention module, outermost first
_get_interface = AttentionInterface.get_interface
# What each statistic asked of its last call: most likely what it asks of the next, so that one pass can serve all.
_asked: weakref.WeakKeyDictionary[Callable[..., Tensor], set[Reduction]] = weakref.WeakKeyDictionary()


@contextmanager
def record(
    model: nn.Module,
    *statistics: str | Callable[..., Tensor],
    processor: Any = None,
    roles: Sequence[str] | None = None,
    attributes: Mapping[str, Any] | None = None,
    **named: str | Callable[..., Tensor],
) -> Iterator[Recorder]:
    """Record statistics of every attention call that `model` makes inside the block.

    statistics: names from `regard.statistics`, or functions declared with `@regard.statistic`; keyword arguments give
    one a name of its own: `record(model, near=partial(distance, clip=16))`.
    processor: tokenizer or processor, for the text of tokens. roles: the role of each token of the first forward pass,
    as from `regard.chat_roles`, where inputs do not tell. attributes: kept with the recording.

    With gradients enabled the model trains as usual; what is recorded is detached.

        with regard.record(model, "entropy", "received") as recording:
            model.generate(**inputs)
        recording.tree["language_model"]["entropy"].sel(layer=3, head=5)
    """
    chosen = {**{_name(s): s for s in statistics}, **named}
    if not chosen:
        raise ValueError("record(model) needs at least one statistic, such as 'entropy'")
    resolved = {name: catalog.statistic(s) if isinstance(s, str) else s for name, s in chosen.items()}
    recorder = Recorder(resolved, processor, dict(attributes or {}))
    with _open(_Session(model, recorder=recorder, roles=roles)):
        try:
            yield recorder
        except BaseException:
            recorder.interrupted = True
            raise


@contextmanager
def intervene(model: nn.Module, *interventions: Any) -> Iterator[None]:
    """Change every attention call that `model` makes inside the block, left to right; `record` sees the result.

    An intervention is an object with any of: `inputs(call) -> call`; `weights(call, weights, rows) -> weights`, given
    dense weights [batch, head, rows, key] of a range of queries; `output(call, output) -> output`, both
    [batch, head, query, dim]; `hidden(site, hidden) -> hidden`, the layer's hidden states [batch, query, dim].
    """
    for thing in interventions:
        if not any(callable(getattr(thing, hook, None)) for hook in _HOOKS):
            raise TypeError(f"{thing!r} is not an intervention: it has none of {', '.join(_HOOKS)}")
    with _open(_Session(model, interventions=interventions)):
        yield


def _name(statistic: str | Callable[..., Tensor]) -> str:
    if isinstance(statistic, str):
        return statistic
    name = getattr(statistic, "__name__", None)
    if name is None:
        raise TypeError(f"{statistic!r} has no name; give it one: record(model, some_name=...)")
    return name


@dataclass
class _Entry:
    """A model, or a model inside it, that is running: what it was given."""

    name: str
    inputs: dict[str, Any]
    start: int = 0  # positions that were in its cache before


@dataclass
class _Session:
    """One open `record` or `intervene`."""

    model: nn.Module
    recorder: Recorder | None = None
    interventions: Sequence[Any] = ()
    roles: Sequence[str] | None = None
    sites: dict[nn.Module, Site] = field(default_factory=dict)
    vocabulary: dict[str, set[int]] = field(default_factory=dict)
    entries: list[_Entry] = field(default_factory=list)  # running now, outermost first
    passes: int = 0  # forward passes so far
    turns: dict[nn.Module, tuple[int, int, int]] = field(default_factory=dict)  # pass, runs in it, queries in this run
    seen_in: dict[tuple[str, int], int] = field(default_factory=dict)  # last pass of a stack's layer
    extended: dict[str, int] = field(default_factory=dict)  # last pass of a stack's tokens
    key_stack: dict[str, str] = field(default_factory=dict)  # whose tokens a cross stack's keys are
    tokens: dict[str, Tokens] = field(default_factory=dict)  # by stack, as far as the sequence has come
    checked: set[nn.Module] = field(default_factory=set)
    caches: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sites = sites.find(self.model)
        missed = sites.unreached(self.model, self.sites)
        if not self.sites:
            sites.refuse_unreached(self.model, missed)
        if self.recorder is not None:
            self.recorder.attributes.setdefault("unreached", missed)
        for module, site in self.sites.items():
            used = _implementation(module)
            if used not in READABLE:
                raise UnreachableAttention(
                    f"{site.name} runs with attn_implementation={used!r}, which Regard cannot read exactly; "
                    f"call model.set_attn_implementation('sdpa') (or 'eager') first"
                )
        self.vocabulary = _vocabulary(self.model, self.recorder.processor if self.recorder else None)

    # Following the model's passes

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        while self.entries and not f"{name}.".startswith(self.entries[-1].name + "." * bool(self.entries[-1].name)):
            self.entries.pop()  # left over from a pass that failed
        if not self.entries:
            self.passes += 1
        entry = _Entry(name, _inputs(module, args, kwargs))
        cache = entry.inputs.get("past_key_values")
        if cache is not None and hasattr(cache, "get_seq_length"):
            entry.start = int(cache.get_seq_length())
            if self.recorder is not None and not any(cache is c for c in self.caches):
                cache.reorder_cache = _refuse_beams
                self.caches.append(cache)
        self.entries.append(entry)

    def free_caches(self) -> None:
        for cache in self.caches:
            cache.__dict__.pop("reorder_cache", None)

    def leave(self, *_: Any) -> None:
        if self.entries:
            self.entries.pop()

    def turn(self, module: nn.Module, *_: Any) -> None:
        """An attention module starts to run."""
        last, runs, _ = self.turns.get(module, (0, 0, 0))
        self.turns[module] = (self.passes, runs + 1 if last == self.passes else 0, 0)

    def check_seen(self, module: nn.Module, *_: Any) -> None:
        if self.entries and self.turns[module][2] == 0:
            raise UnreachableAttention(f"{self.sites[module].name} ran without calling AttentionInterface")

    # Placing a call

    def where(self, module: nn.Module, call: Call) -> dict[str, Any]:
        """Site, positions and tokens of a call, as fields of it."""
        site = self.sites[module]
        if not self.entries:  # a module run by itself, or again for a checkpoint's gradient
            return {"site": replace(site, heads=call.query.shape[1], kv_heads=call.key.shape[1])}
        _, runs, seen = self.turns.get(module, (self.passes, 0, 0))
        n_query, n_key = call.query.shape[2], call.key.shape[2]
        layer = site.layer
        if runs:  # one module serves as several layers, as in ALBERT
            layer += runs * sum(s.stack == site.stack for s in self.sites.values())
        causal = call.causal or (not site.cross and bool(getattr(module, "is_causal", False)))
        site = replace(site, layer=layer, heads=call.query.shape[1], kv_heads=call.key.shape[1], causal=causal)
        source = self._source()
        start = max(e.start for e in self.entries[source:]) + seen
        # A sliding cache holds the newest keys only; a packed sequence comes in pieces that see only themselves.
        key_start = 0 if site.cross else (seen or max(0, start + n_query - n_key))
        context: dict[str, Any] = {"site": site, "query_start": start, "key_start": key_start}
        own = self._extend(call.but(**context), self.entries[source])
        keys = self._keys_of(site, call) if site.cross else own
        if keys is not None:
            if len(keys) < key_start + n_key:  # a static cache is longer than what it holds
                keys = keys.then(Tokens.plain("pad", len(keys.roles), key_start + n_key - len(keys)))
            context["tokens"] = keys[key_start : key_start + n_key].to(call.query.device)
        return context | {"query_tokens": own[start : start + n_query].to(call.query.device)}

    def _source(self) -> int:
        """Which running model was given what the innermost one works on: ids, pictures or frames, not embeddings."""
        for i in reversed(range(len(self.entries))):
            inputs = self.entries[i].inputs
            if inputs.get("input_ids") is not None or inputs.get("inputs_embeds") is None:
                return i
        return 0

    def _extend(self, call: Call, source: _Entry) -> Tokens:
        """Tokens of the stack's sequence, up to the last query of this call."""
        stack, batch = call.site.stack, call.query.shape[0]
        known = self.tokens.get(stack)
        if known is None or (call.query_start == 0 and self.extended[stack] != self.passes):
            known = Tokens.plain("other", batch, call.query_start)
        missing = call.query_positions.stop - len(known)
        if missing > 0:
            known = known.then(self._describe(call, source, missing))
        self.tokens.pop(stack, None)  # the newest stands last
        self.tokens[stack], self.extended[stack] = known, self.passes
        return known

    def _describe(self, call: Call, source: _Entry, n: int) -> Tokens:
        batch, ids = call.query.shape[0], source.inputs.get("input_ids")
        if isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape == (batch, n):
            return self._describe_text(call, source, ids)
        pixels = source.inputs.get("pixel_values")
        if isinstance(pixels, Tensor) and not call.site.cross:
            tokens = Tokens.plain("image", batch, n)
            grid = _patches(self.model, source.name, pixels)
            extra = n - grid[0] * grid[1] if grid else -1
            if grid and 0 <= extra <= 16 and len(pixels) == batch:  # class token and registers come first
                tokens = tokens.marked("special", (torch.arange(n) < extra).expand(batch, n))
                for sample in range(batch):
                    tokens = tokens.on_grid(sample, extra, grid)
            return tokens
        if source.inputs.get("grid_thw") is not None:
            return Tokens.plain("image", batch, n)
        sound = any(source.inputs.get(name) is not None for name in ("input_features", "input_values"))
        return Tokens.plain("frame" if sound else "other", batch, n)

    def _describe_text(self, call: Call, source: _Entry, ids: Tensor) -> Tokens:
        batch, n = ids.shape
        ids, start = ids.detach().cpu().long(), call.query_start
        step = start > 0 and n == 1
        tokens = Tokens.plain("generated" if step else "text", batch, n, ids)
        if self.roles is not None and start == 0:
            if len(self.roles) != n or set(self.roles) - set(ROLES):
                raise ValueError(f"roles: {len(self.roles)} given for {n} tokens, each one of {', '.join(ROLES)}")
            numbers = torch.tensor([ROLES.index(r) for r in self.roles])
            tokens = replace(tokens, roles=numbers.expand(batch, n).clone())
        if step:  # after its end, generate feeds a finished row padding with the mask left on
            before = self.tokens[call.site.stack] if call.site.stack in self.tokens else tokens[:0]
            ended = before.role("generated") & _isin(before.ids, self.vocabulary["eos"])
            tokens = tokens.marked("pad", ended.any(1, keepdim=True))
        else:
            bos = _isin(ids, self.vocabulary["bos"])
            if start == 0:
                bos[:, 0] |= _isin(ids[:, 0], self.vocabulary["decoder_start"])
            tokens = tokens.marked("special", _isin(ids, self.vocabulary["special"])).marked("bos", bos)
            image = _isin(ids, self.vocabulary["image"])
            if image.any():
                tokens = self._on_pictures(tokens.marked("image", image), image)
        mask = source.inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= start + n and len(mask) == batch:
            tokens = tokens.marked("pad", mask[:, start : start + n].cpu() == 0)
        return tokens

    def _on_pictures(self, tokens: Tokens, image: Tensor) -> Tokens:
        """Lay each run of image tokens on the grid of its picture, where their numbers agree."""
        outer = self.entries[0].inputs
        runs = [(b, m.span()) for b, row in enumerate(image.tolist()) for m in re.finditer("1+", "".join("01"[i] for i in row))]
        sizes, pixels = outer.get("image_grid_thw"), outer.get("pixel_values")
        shape = _patches(self.model, "", pixels) if isinstance(pixels, Tensor) else None
        for number, (sample, (a, b)) in enumerate(runs):
            if isinstance(sizes, Tensor) and len(sizes) == len(runs):
                frames, *shape = sizes[number].tolist()
                shape = tuple(shape) if frames == 1 else None
            tokens = tokens.on_grid(sample, a, _merged(shape, b - a))
        return tokens

    def _keys_of(self, site: Site, call: Call) -> Tokens | None:
        """Tokens of the sequence that cross attention looks at: the newest other stack of this length."""
        for stack, tokens in reversed(self.tokens.items()):
            if stack != site.stack and len(tokens) == call.key.shape[2] and len(tokens.roles) == len(call.key):
                self.key_stack[site.stack] = stack
                return tokens
        return None

    def advance(self, module: nn.Module, n_query: int) -> None:
        last, runs, seen = self.turns.get(module, (self.passes, 0, 0))
        self.turns[module] = (last, runs, seen + n_query)

    # Changing a call, and seeing it

    def change(self, module: nn.Module, call: Call) -> Call:
        for thing in self.interventions:
            if hasattr(thing, "inputs"):
                call = _result(thing, "inputs", thing.inputs(call), call)
            if hasattr(thing, "weights"):
                call = call.but(_given={"edits": (*call._given.get("edits", ()), partial(_edit_weights, thing))})
        return call

    @torch.no_grad()
    def see(self, module: nn.Module, call: Call, dropped: bool) -> None:
        recorder = self.recorder
        assert recorder is not None
        if module not in self.checked and not dropped:
            _check(call)
            self.checked.add(module)
        key = (call.site.stack, call.site.layer)
        again = self.seen_in.get(key) not in (None, self.passes)
        self.seen_in[key] = self.passes
        if not recorder.runs or (again and call.query_start == 0 and key in recorder.runs[-1].ends):
            recorder.runs.append(Run())
        run = recorder.runs[-1]
        end = run.ends.get(key, call.query_start)
        if end != call.query_start:
            raise ValueError(
                f"{call.site}: this call starts at position {call.query_start}, the one before ended at {end}. Decoding "
                f"that steps back (assisted, speculative) cannot be recorded; run the sequence that it found through "
                f"model(ids) instead: the attention is the same"
            )
        run.ends[key] = call.query_positions.stop
        run.sites.setdefault(call.site.stack, {})[call.site.layer] = call.site
        run.tokens[call.site.stack] = self.tokens[call.site.stack]
        run.key_stack |= self.key_stack
        call.weights.expected = union(_asked.get(f, set()) for f in recorder.statistics.values())
        for name, function in recorder.statistics.items():
            call.weights.asked = set()
            recorder.add(run, call, name, function(call))
            _asked[function] = union([call.weights.asked])


@contextmanager
def _open(session: _Session) -> Iterator[None]:
    with ExitStack() as undo:
        undo.callback(_close)
        # A compiled model would not look the function up again; inside a session it runs uncompiled.
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in session.model.named_modules():
            if module is session.model or isinstance(module, PreTrainedModel):
                enter = partial(session.enter, name)
                undo.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(session.leave, always_call=True).remove)
        for module, site in session.sites.items():
            undo.callback(module.register_forward_pre_hook(session.turn).remove)
            undo.callback(module.register_forward_hook(session.check_seen).remove)
            _sessions.setdefault(module, []).append(session)
            undo.callback(_forget, module, session)
        editors = [thing for thing in session.interventions if hasattr(thing, "hidden")]
        for block, site in _blocks(session).items() if editors else ():
            undo.callback(block.register_forward_hook(partial(_edit_hidden, editors, site)).remove)
        undo.callback(session.free_caches)
        AttentionInterface.get_interface = _look_up  # type: ignore[method-assign]
        yield


def _forget(module: nn.Module, session: _Session) -> None:
    _sessions[module].remove(session)
    if not _sessions[module]:
        del _sessions[module]


def _close() -> None:
    if not _sessions:
        AttentionInterface.get_interface = _get_interface  # type: ignore[method-assign]


def _look_up(self: AttentionInterface, implementation: str | None, default: Callable[..., Any]) -> Callable[..., Any]:
    return partial(_route, implementation or "eager", _get_interface(self, implementation, default))


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
    sessions = _sessions.get(module, ())
    if not sessions:
        return function(module, query, key, value, attention_mask, **kwargs)
    call = given = _read(sessions[0], implementation, function, module, query, key, value, attention_mask, kwargs)
    contexts = [session.where(module, given) for session in sessions]
    for session, context in zip(sessions, contexts):
        call = session.change(module, call.but(**context))

    untouched = all(getattr(call, f) is getattr(given, f) for f in ("scale", "mask", "causal", "bias", "softcap", "sinks"))
    if untouched and "edits" not in call._given:  # the model's own function still says what is wanted
        changed = (call.query, query), (call.key, given.key), (call.value, given.value)
        query, key, value = (new if new is not old else own for (new, old), own in zip(changed, (query, key, value)))
        result, weights = function(module, query, key, value, attention_mask, **kwargs)
        output = result.reshape(*result.shape[:2], query.shape[1], -1).transpose(1, 2)
        call._given["output"] = output
    else:
        result, output = None, call.output
        weights = call.weights.dense() if implementation == "eager" else None

    edited = output
    for session, context in zip(sessions, contexts):
        for thing in session.interventions:
            if hasattr(thing, "output"):
                edited = _result(thing, "output", thing.output(call.but(**context), edited), edited)
    for session, context in zip(sessions, contexts):
        if session.entries:
            if session.recorder is not None:
                seen = replace(call, **context)
                session.see(module, seen, dropped=bool(kwargs.get("dropout")) and module.training)
            session.advance(module, call.query.shape[2])
    if result is None or edited is not output:
        result = edited.transpose(1, 2).contiguous()
    return result, weights


def _read(
    session: _Session,
    implementation: str,
    function: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Call:
    """The call in terms of what this implementation does with its arguments."""
    site = session.sites[module]
    if implementation not in READABLE or not (mask is None or isinstance(mask, Tensor)):
        raise UnreachableAttention(f"{site.name} runs with {implementation!r}, which Regard cannot read exactly")
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    bias, softcap, sinks, causal = kwargs.get("position_bias"), None, None, False
    if implementation == "sdpa":
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        causal = bool(causal) and mask is None and query.shape[2] > 1
        if causal and key.shape[2] > query.shape[2]:  # prefill into a longer static cache
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
            bias = None if bias is None else bias[..., : query.shape[2]]
    else:
        code = inspect.unwrap(function)
        honoured = inspect.signature(code).parameters
        bias = bias if "position_bias" in honoured else None
        softcap = kwargs.get("softcap") if "softcap" in honoured else None
        sinks = kwargs.get("sinks") if "sinks" in honoured else None
        if sinks is None and "sinks" in getattr(code, "__code__", code).co_names:
            sinks = module.sinks
    return Call(site, query, key, value, scale, mask, causal, bias, softcap, sinks)


def _check(call: Call) -> None:
    """Raise where the model's own output does not follow from the weights as read: nothing inexact is recorded."""
    n_query, value = call.query.shape[2], call.value
    group = call.query.shape[1] // value.shape[1]
    for at in sorted({0, n_query // 2, n_query - 1}):
        weights = call.weights.rows(at, at + 1)
        grouped = weights.unflatten(1, (value.shape[1], group)).flatten(2, 3)
        ours = (grouped @ value.to(weights.dtype)).unflatten(2, (group, 1)).flatten(1, 2)
        theirs = call.output[:, :, at : at + 1].to(ours.dtype)
        limit = _TOLERANCE[call.query.dtype] * float(value.abs().amax().nan_to_num(1.0)) + 1e-30
        if not torch.allclose(ours, theirs, rtol=0.0, atol=limit, equal_nan=True):
            off = float((ours - theirs).abs().max())
            raise UnreachableAttention(
                f"{call.site}: the output of its attention does not follow from the query, key, value and mask seen at "
                f"the seam (off by {off:.2g}), so its weights would be wrong; this model needs an adapter"
            )


def _result(thing: Any, hook: str, new: Any, old: Any) -> Any:
    if type(new) is not type(old) or (isinstance(old, Tensor) and new.shape != old.shape):
        kind = f"a {type(old).__name__}" + (f" {list(old.shape)}" if isinstance(old, Tensor) else "")
        got = f"{type(new).__name__}" + (f" {list(new.shape)}" if isinstance(new, Tensor) else "")
        raise TypeError(f"{thing!r}.{hook} must return {kind}, not {got}")
    return new


def _edit_weights(thing: Any, call: Call, weights: Tensor, rows: range) -> Tensor:
    return _result(thing, "weights", thing.weights(call, weights, rows), weights)


def _edit_hidden(editors: Sequence[Any], site: Site, block: nn.Module, args: Any, output: Any) -> Any:
    hidden = new = output[0] if isinstance(output, tuple) else output
    for thing in editors:
        new = _result(thing, "hidden", thing.hidden(site, new), hidden)
    return (new, *output[1:]) if isinstance(output, tuple) else new


def _blocks(session: _Session) -> dict[nn.Module, Site]:
    """The layer around each site: the module at the first number of its path."""
    found: dict[nn.Module, Site] = {}
    root = getattr(session.model, "_orig_mod", session.model)
    for site in session.sites.values():
        if path := re.match(r"(.*?\.)?\d+(?=\.)", site.name):
            found.setdefault(root.get_submodule(path[0]), site)
    return found


def _implementation(module: nn.Module) -> str:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"


def _inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [p for p in inspect.signature(module.forward).parameters]
    return dict(zip(names, args)) | kwargs


def _vocabulary(model: nn.Module, processor: Any) -> dict[str, set[int]]:
    """Ids that tell a token's role, as the configurations of the model and of its parts name them."""
    tokenizer = getattr(processor, "tokenizer", processor)
    parts = [c for m in model.modules() if (c := getattr(m, "config", None)) is not None]
    parts += [c for c in (getattr(model, "generation_config", None), tokenizer) if c is not None]

    def ids(*names: str) -> set[int]:
        values = [getattr(part, name, None) for part in parts for name in names]
        listed = [v if isinstance(v, (list, tuple)) else [v] for v in values]
        return {i for v in listed for i in v if isinstance(i, int) and i >= 0}

    image = ids("image_token_id", "image_token_index", "video_token_id")
    special = ids("eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id") - image
    special |= set(getattr(tokenizer, "all_special_ids", ())) - image
    bos, eos = ids("bos_token_id"), ids("eos_token_id")
    return {"bos": bos, "eos": eos, "special": special, "image": image, "decoder_start": ids("decoder_start_token_id")}


def _isin(ids: Tensor, among: set[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(among), dtype=ids.dtype))


def _patches(model: nn.Module, name: str, pixels: Tensor) -> tuple[int, int] | None:
    """Rows and columns of the patches that the vision model at `name` cuts pictures [..., row, column] into."""
    config = getattr(getattr(model, "_orig_mod", model).get_submodule(name), "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(config, "patch_size", None)
    if size is None or pixels.ndim < 4:
        return None
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return pixels.shape[-2] // height, pixels.shape[-1] // width


def _merged(grid: tuple[int, int] | None, n: int) -> tuple[int, int] | None:
    """The grid of `n` tokens that patches on `grid` were merged into, in squares."""
    for side in (1, 2, 3, 4) if grid else ():
        if (grid[0] // side) * (grid[1] // side) == n:
            return grid[0] // side, grid[1] // side
    return None


def _refuse_beams(*_: Any, **__: Any) -> None:
    raise ValueError(
        "beam search swaps the rows of a batch between steps, so steps cannot be joined; record with num_beams=1, or "
        "run the sequence that it found through model(ids): its attention is the same"
    )
