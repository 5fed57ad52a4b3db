"""What there is to compare: operators, modules, softmax attention, and none; which fits a task, and as what layer."""

from __future__ import annotations

import difflib
import hashlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..extras import shortened
from ..functions import innermost
from ..mechanisms import modules, operators
from ..mechanisms._modules import ALSO, ModuleSpec, declared_of
from .tasks import Task

SOFTMAX, NONE = "softmax", "none"
_USUAL = {"causal", "mask", "scale", "shape"}  # what an operator is told, or has no need of here


@dataclass(frozen=True)
class Candidate:
    """A way for tokens to learn of each other.

    takes: as in `regard.mechanisms`: "heads" (query, key, value), "hidden" (the layer's input) or "map" (a picture of
    it); "" where nothing is taken.
    """

    key: str
    patterns: tuple[str, ...]
    takes: str
    made: Callable[..., nn.Module] | None  # from dim, heads, causal and shape; takes what `takes` says
    needs: tuple[str, ...] = ()  # arguments that nothing here can give
    loss: Callable[[Any], Tensor] | None = None
    held: Callable[[int, int, int], float] | None = None
    step: Callable[..., tuple[Tensor, Any]] | None = None
    sized: Callable[[tuple[int, ...]], dict[str, Any]] | None = None
    ahead: bool = False
    code: str = ""  # a hash of the file that it is from

    def unfit(self, task: Task) -> str | None:
        """Why it cannot do a task, None where it can."""
        if self.needs:
            return f"needs {', '.join(self.needs)}, which no task gives"
        if task.pattern == "causal" and "causal" not in self.patterns:
            return f"is not causal; it does {' or '.join(self.patterns)}"
        if task.pattern == "causal" and self.ahead:
            return "chooses keys by later tokens too, so a prediction of the next one says nothing"
        if task.pattern == "full" and not {"full", "cross"} & set(self.patterns):
            return "is causal only"
        if self.takes == "map" and not task.pictures:
            return "takes a feature map [batch, channel, row, column]"
        return None

    def layer(self, dim: int, heads: int, *, causal: bool, shape: tuple[int, ...]) -> nn.Module:
        """A layer [batch, token, dim] to the same, with what projections it needs."""
        if self.made is None:
            return Nothing()
        inner = self.made(dim=dim, heads=heads, causal=causal, shape=shape)
        told = {"causal": causal, "shape": shape}
        if self.takes == "heads":
            knobs = {} if self.sized is None else self.sized(shape)
            return Heads(inner, dim, heads, {**told_to(inner, told), **knobs})
        return (Map if self.takes == "map" else Hidden)(inner, told_to(inner, told), shape)


class Nothing(nn.Module):
    """Gives nothing to the residual stream."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(())


class Operator(nn.Module):
    """An operator as a module without weights."""

    def __init__(self, operator: Callable[..., Tensor]) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **told: Any) -> Tensor:
        return self.operator(query, key, value, **told)


class Heads(nn.Module):
    """Projections around what takes query, key and value."""

    def __init__(self, inner: nn.Module, dim: int, heads: int, told: dict[str, Any]) -> None:
        super().__init__()
        self.inner, self.heads, self.told = inner, heads, told
        self.parts, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def split(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.parts(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4))

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = first(self.inner(*self.split(hidden), **self.told))
        return self.output(mixed.transpose(1, 2).flatten(2))


class Hidden(nn.Module):
    """What takes the layer's input."""

    def __init__(self, inner: nn.Module, told: dict[str, Any], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.inner, self.told = inner, told

    def forward(self, hidden: Tensor) -> Tensor:
        return first(self.inner(hidden, **self.told))


class Map(nn.Module):
    """What takes a feature map, given the tokens of a picture as one, and what it makes of it as tokens again."""

    def __init__(self, inner: nn.Module, told: dict[str, Any], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.inner, self.told, self.shape = inner, told, shape

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.mT.unflatten(-1, self.shape)
        return first(self.inner(rows, **self.told)).flatten(2).mT


def first(output: Any) -> Tensor:
    """The output of what gives more beside it."""
    return output[0] if isinstance(output, tuple) else output


def told_to(inner: nn.Module, told: dict[str, Any]) -> dict[str, Any]:
    """What of this a forward names."""
    function = inner.operator if isinstance(inner, Operator) else inner.forward
    names = inspect.signature(function).parameters
    return {name: told[name] for name in ALSO if name in names}


def candidates() -> dict[str, Candidate]:
    """Everything that the room of mechanisms declares, by key, after softmax attention and no attention at all."""
    found = {SOFTMAX: candidate(SOFTMAX, softmax), NONE: Candidate(NONE, ("causal", "full", "cross"), "", None)}
    declared: dict[str, Any] = {**operators(), **modules()}
    return found | {key: candidate(key, declared[name]) for name in sorted(declared) if (key := _key(name))}


def chosen(keys: Iterable[str] | None) -> dict[str, Candidate]:
    """Those of these keys, softmax attention and no attention first; all without keys. KeyError names near ones."""
    every = candidates()
    if keys is None:
        return every
    wanted = [SOFTMAX, NONE]
    for key in keys:
        if _key(key) not in every:
            near = difflib.get_close_matches(_key(key), every, n=3, cutoff=0.5)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise KeyError(f"no mechanism {shortened(key)!r}{hint}; there are {', '.join(every)}")
        wanted.append(_key(key))
    return {key: every[key] for key in dict.fromkeys(wanted)}


def softmax(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """PyTorch's own."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def candidate(key: str, thing: Any) -> Candidate:
    """An operator or a declared module as a candidate."""
    if (spec := declared_of(thing)) is not None:
        return _of_module(key, thing, spec)
    spec = getattr(innermost(thing), "spec", None)
    if spec is None and thing is not softmax:
        raise TypeError(
            f"{thing!r} is neither an operator declared with @regard.mechanisms.mechanism nor a module declared with "
            f"@regard.mechanisms.module"
        )
    parameters = inspect.signature(thing).parameters.values()
    needs = tuple(
        p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in _USUAL
    )
    return Candidate(
        key,
        getattr(spec, "patterns", ("causal", "full")),
        "heads",
        lambda **_: Operator(thing),
        needs,
        step=getattr(spec, "step", None),
        ahead=getattr(spec, "ahead", False),
        sized=getattr(spec, "sized", None) if thing is innermost(thing) else None,  # knobs that were given stand
        code=_code(innermost(thing)),
    )


def _of_module(key: str, cls: Any, spec: ModuleSpec) -> Candidate:
    return Candidate(key, spec.patterns, spec.takes, spec.made, (), spec.loss, spec.held, code=_code(cls))


def _key(name: str) -> str:
    return name.replace("_", "-")


def _code(thing: Any) -> str:
    try:
        source = inspect.getsource(inspect.getmodule(thing) or thing)
    except (OSError, TypeError):
        source = repr(thing)
    return hashlib.blake2b(source.encode(), digest_size=8).hexdigest()
