"""What interventions change around attention: what a model is given and gives, its tokens, states and neurons.

What they change in a call itself, its inputs, weights and output, is for the seam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from . import sites
from .adapters import caches, generation, parallel
from .adapters.dropping import Dropping
from .adapters.registers import Longer
from .call import Site, UnreachableAttention
from .functions import bound
from .hooks import attach
from .passes import Passes, aside

HOOKS = ("given", "entering", "keeps", "appended", "inputs", "weights", "output", "neurons", "mlp", "hidden", "guided")

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def has(thing: Any, hook: str) -> bool:
    return callable(getattr(thing, hook, None))


def result(thing: Any, hook: str, new: Any, old: Any) -> Any:
    """What a hook gave; TypeError, which names the intervention, where it is of another type or shape than before."""
    if type(new) is not type(old) or (isinstance(old, Tensor) and new.shape != old.shape):
        kind = f"a {type(old).__name__}" + (f" {list(old.shape)}" if isinstance(old, Tensor) else "")
        got = f"{type(new).__name__}" + (f" {list(new.shape)}" if isinstance(new, Tensor) else "")
        raise TypeError(f"{thing!r}.{hook} must return {kind}, not {got}")
    return new


class Editing:
    """The interventions of one session on one model, and its sites. `intervene`: the seam's, to run the model aside."""

    def __init__(
        self,
        model: nn.Module,
        found: Mapping[nn.Module, Site],
        passes: Passes,
        interventions: Sequence[Any],
        intervene: Callable[..., AbstractContextManager[None]],
    ) -> None:
        self.model, self.sites, self.passes = model, found, passes
        self.intervene = intervene
        self.having = {hook: [thing for thing in interventions if has(thing, hook)] for hook in HOOKS}  # of each hook

    def attach_first(self, undo: ExitStack) -> None:
        """What has to be changed before anything reads it."""
        if self.having["given"]:
            root = getattr(self.model, "_orig_mod", self.model)
            undo.enter_context(generation.changed(root, self._given))
            attach(undo, root.register_forward_pre_hook, self._called, with_kwargs=True)

    def refuse_beside(self, others: Sequence[Editing]) -> None:
        """Raise where tokens may leave a model, or come to it, by two blocks: neither follows the other's."""
        for hook, theirs in (("keeps", "keeps"), ("keeps", "appended"), ("appended", "keeps")):
            other = next((thing for one in others for thing in one.having[theirs]), None)
            if other is not None and (mine := self.having[hook]):
                raise RuntimeError(
                    f"{mine[0]!r} has `{hook}`, and {other!r} of another open block has `{theirs}`: give both to one "
                    f"block, as in intervene(model, one, other)"
                )

    def attach(self, undo: ExitStack) -> None:
        """The rest."""
        if self.having["appended"]:
            for longer in self._longer():
                longer.attach(undo)
        for hook, find in (("mlp", sites.feed_forwards), ("hidden", sites.blocks)):
            for part, module in self._parts(hook, find):
                attach(undo, part.register_forward_hook, partial(self._states, hook, module))
        for part, module in self._parts("entering", sites.blocks):
            attach(undo, part.register_forward_pre_hook, partial(self._entering, module), with_kwargs=True)
        self._attach_dropping(undo)
        for part, module in self._parts("neurons", sites.downs):
            attach(undo, part.register_forward_pre_hook, partial(self._neurons, module))
        for thing in self.having["guided"]:
            guide = _Guide(thing, partial(self.intervene, self.model))
            attach(undo, self.model.register_forward_pre_hook, guide.run_aside, with_kwargs=True, prepend=True)
            attach(undo, self.model.register_forward_hook, guide.combine)

    def _parts(self, hook: str, find: Callable[..., dict[nn.Module, nn.Module]]) -> list[tuple[nn.Module, nn.Module]]:
        """The modules that a hook acts on, each with its layer's first site; none where nothing has the hook."""
        return list(find(self.model, self.sites).items()) if self.having[hook] else []

    # What the model is given

    def _called(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        now = generation.now()
        if now is not None and now.model is model:  # whose inputs are changed already
            return args, kwargs
        return (), self._given(bound(model, args, kwargs))

    def _given(self, inputs: dict[str, Any]) -> dict[str, Any]:
        new = inputs
        for thing in self.having["given"]:
            old, new = new, result(thing, "given", thing.given(dict(new)), new)
            if new.keys() != old.keys():
                raise TypeError(f"{thing!r}.given must return {', '.join(old)}, not {', '.join(new)}")
            for name in (name for name in new if new[name] is not old[name]):
                result(thing, f"given, of {name},", new[name], old[name])
        return new

    # What layers are given, hold and give

    def _states(self, hook: str, module: nn.Module, part: nn.Module, args: Any, output: Any) -> Any:
        states = new = output[0] if isinstance(output, tuple) else output
        for thing in self.having[hook]:
            new = result(thing, hook, getattr(thing, hook)(self.passes.site(module), new), states)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def _entering(self, module: nn.Module, part: nn.Module, args: Any, kwargs: dict[str, Any]) -> Arguments:
        states = new = args[0] if args else kwargs["hidden_states"]
        for thing in self.having["entering"]:
            new = result(thing, "entering", thing.entering(self.passes.coming(module), new), states)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def _neurons(self, module: nn.Module, part: nn.Module, args: Any) -> Any:
        n, dim = args[0].shape[-1], args[0].ndim - 1
        share = parallel.share_of_neurons(part, n)
        old = new = args[0] if share is None else share.joined(args[0], dim)
        for thing in self.having["neurons"]:
            new = result(thing, "neurons", thing.neurons(self.passes.site(module), new), old)
        return (new if share is None else share.mine(new, n, dim), *args[1:])

    # Which tokens there are

    def _longer(self) -> Iterator[Longer]:
        """Of each stack, what makes it longer."""
        stacks: dict[str, list[tuple[nn.Module, nn.Module]]] = {}
        blocks = sites.blocks(self.model, self.sites)
        for block, module in blocks.items():
            stacks.setdefault(self.sites[module].stack, []).append((block, module))

        def made(module: nn.Module, hidden: Tensor) -> list[Tensor]:
            site = self.passes.coming(module)
            found = [thing.appended(site, hidden) for thing in self.having["appended"]]
            return [tokens for tokens in found if tokens is not None]

        models = [m for m in self.model.modules() if isinstance(m, PreTrainedModel)]
        for stack, layers in stacks.items():
            own = {block for block, _ in layers}
            towers = [m for m in models if blocks.keys() & set(m.modules()) == own]
            yield Longer(stack, [block for block, _ in layers], towers, partial(made, layers[0][1]))

    def _attach_dropping(self, undo: ExitStack) -> None:
        """Where tokens may leave, follow them through the layers of each stack."""
        stacks: dict[str, dict[nn.Module, tuple[nn.Module, int]]] = {}
        for part, module in self._parts("keeps", sites.blocks):
            site = self.sites[module]
            if not (site.also or any(self.sites[m].cross for m in part.modules() if m in self.sites)):
                stacks.setdefault(site.stack, {})[part] = module, site.layer
        if self.having["keeps"] and not stacks:
            raise UnreachableAttention(
                f"{type(self.model).__name__} has no layers that tokens can leave: they are shared, or attend to "
                f"another sequence too"
            )
        for stack, blocks in stacks.items():
            dropping = self.passes.dropping[stack] = Dropping(self.having["keeps"], blocks)
            for part, (module, _) in blocks.items():
                attach(undo, part.register_forward_pre_hook, partial(self._before, dropping, module), with_kwargs=True)
                attach(undo, part.register_forward_hook, partial(self._after, dropping, module))

    def _before(self, dropping: Dropping, module: nn.Module, part: nn.Module, args: Any, kwargs: Any) -> Any:
        return dropping.before(self.passes.first(module), part, args, kwargs)

    def _after(self, dropping: Dropping, module: nn.Module, part: nn.Module, args: Any, output: Any) -> Any:
        return dropping.after(self.passes.site(module), part, output)


class _Guide:
    """Runs a model once more before each of its passes, and lets an intervention bring both outputs together."""

    def __init__(self, thing: Any, under: Callable[[Any], AbstractContextManager[None]]) -> None:
        self.thing, self.under = thing, under
        self.other: Tensor | None = None

    def run_aside(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if aside.on():  # of another guide: what was run for this one is kept
            return
        self.other = None
        if any(caches.of(value) is not None for value in (*args, *kwargs.values())):
            raise ValueError(
                f"{type(model).__name__} is given a cache, in which both runs of {self.thing!r} would write; "
                f"run it with use_cache=False"
            )
        with aside(), self.under(self.thing.aside):
            self.other = _first_tensor(model(*args, **kwargs))

    def combine(self, model: nn.Module, args: Any, output: Any) -> Any:
        if aside.on() or self.other is None:
            return output
        own, other, self.other = _first_tensor(output), self.other, None
        new = result(self.thing, "guided", self.thing.guided(own, other), own)
        if isinstance(output, MutableMapping):
            output[next(name for name, value in output.items() if value is own)] = new
            return output
        return new if isinstance(output, Tensor) else (new, *output[1:])


def _first_tensor(output: Any) -> Tensor:
    first = next(iter(output.values())) if isinstance(output, Mapping) else output
    first = first[0] if isinstance(first, tuple) else first
    if not isinstance(first, Tensor):
        raise TypeError(f"a model that gives {type(output).__name__}, not first a tensor, cannot be guided")
    return first
