"""Following a model's forward passes: where in its sequence each call stands, and what its tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .call import Call, Site, UnreachableAttention
from .functions import bound
from .names import Names
from .tokens import Tokens

_BESIDE = "<text encoder>"  # stands for a stack that is not the model's own


@dataclass
class _Entry:
    """A model, or a model inside it, that is running: what it was given."""

    name: str
    inputs: dict[str, Any]
    start: int = 0  # positions that were in its cache before


class Passes:
    """What the running model was given, pass by pass."""

    def __init__(
        self, model: nn.Module, sites: dict[nn.Module, Site], processor: Any, roles: Sequence[str] | None
    ) -> None:
        self.sites, self.names = sites, Names(model, processor, roles)
        self.count = 0  # forward passes so far
        self.entries: list[_Entry] = []  # running now, outermost first
        self.turns: dict[nn.Module, tuple[int, int, int]] = {}  # of a site: pass, runs in it, queries in this run
        self.tokens: dict[str, Tokens] = {}  # by stack, as far as its sequence has come; the newest last
        self.extended: dict[str, int] = {}  # last pass of a stack's tokens
        self.key_stack: dict[str, str] = {}  # whose tokens a cross stack's keys are

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A model, or a model inside it, starts to run; gives its cache, if it has one."""
        while self.entries and not f"{name}.".startswith(self.entries[-1].name + "." * bool(self.entries[-1].name)):
            self.entries.pop()  # left over from a pass that failed
        if not self.entries:
            self.count += 1
        entry = _Entry(name, bound(module, args, kwargs))
        self.entries.append(entry)
        self.names.given(name, entry.inputs)
        cache = entry.inputs.get("past_key_values")
        if cache is None or not hasattr(cache, "get_seq_length"):
            return None
        entry.start = int(cache.get_seq_length())
        return cache

    def leave(self, *_: Any) -> None:
        if self.entries:
            self.entries.pop()

    def turn(self, module: nn.Module, *_: Any) -> None:
        """An attention module starts to run."""
        last, runs, _seen = self.turns.get(module, (0, 0, 0))
        self.turns[module] = (self.count, runs + 1 if last == self.count else 0, 0)

    def check_seen(self, module: nn.Module, *_: Any) -> None:
        if self.entries and self.turns[module][2] == 0:
            raise UnreachableAttention(f"{self.sites[module].name} ran without calling AttentionInterface")

    def site(self, module: nn.Module) -> Site:
        """The site, as the layer that it now serves as: one module may be several, as in ALBERT."""
        return self._nth(module, self.turns.get(module, (0, 0, 0))[1])

    def coming(self, module: nn.Module) -> Site:
        """The site, as the layer that it will serve as when it next runs."""
        last, runs, _ = self.turns.get(module, (0, 0, 0))
        return self._nth(module, runs + 1 if last == self.count else 0)

    def _nth(self, module: nn.Module, runs: int) -> Site:
        site = self.sites[module]
        return replace(site, layer=site.layer + runs * sum(s.stack == site.stack for s in self.sites.values()))

    def where(self, module: nn.Module, call: Call) -> dict[str, Any]:
        """Site, positions and tokens of a call, as fields of it."""
        site = self.sites[module]
        if not self.entries:  # a module run by itself, or again for a checkpoint's gradient
            return {"site": replace(site, heads=call.query.shape[1], kv_heads=call.key.shape[1])}
        _, _, seen = self.turns.get(module, (self.count, 0, 0))
        n_query, n_key = call.query.shape[2], call.key.shape[2]
        causal = not site.cross and (bool(getattr(module, "is_causal", False)) or _looks_causal(call))
        site = replace(self.site(module), heads=call.query.shape[1], kv_heads=call.key.shape[1], causal=causal)
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
        if known is None or len(known.roles) != batch or (call.query_start == 0 and self.extended[stack] != self.count):
            known = Tokens.plain("other", batch, call.query_start)
        missing = call.query_positions.stop - len(known)
        if missing > 0:
            known = known.then(self.names.new(call, source.name, source.inputs, missing, known))
        self.tokens.pop(stack, None)  # the newest stands last
        self.tokens[stack], self.extended[stack] = known, self.count
        return known

    def _keys_of(self, site: Site, call: Call) -> Tokens | None:
        """Tokens of the sequence that cross attention looks at: the newest other stack of this length."""
        self.tokens.pop(_BESIDE, None)
        if (words := self.names.words(call, self.entries[self._source()].inputs)) is not None:
            self.tokens[_BESIDE], self.key_stack[site.stack] = words, _BESIDE
            return words
        for stack, tokens in reversed(self.tokens.items()):
            if stack != site.stack and len(tokens) == call.key.shape[2] and len(tokens.roles) == len(call.key):
                self.key_stack[site.stack] = stack
                return tokens
        self.key_stack.pop(site.stack, None)
        return None

    def advance(self, module: nn.Module, n_query: int) -> None:
        last, runs, seen = self.turns.get(module, (self.count, 0, 0))
        self.turns[module] = (last, runs, seen + n_query)


def _looks_causal(call: Call) -> bool:
    """Whether, of two neighbours, the later sees the earlier and not the other way round."""
    mask = call.mask
    if mask is None or call.query.shape[2] < 2 or mask.shape[-2] != mask.shape[-1]:
        return call.causal
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    pairs = (seen[..., i, i - 1] & ~seen[..., i - 1, i] for i in (1, -1))
    return any(bool(pair.any()) for pair in pairs)
