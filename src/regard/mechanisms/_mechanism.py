"""What a mechanism declares, and the checks that all of them share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..extras import shortened
from ..functions import innermost
from ..kernels import misfit
from ..kernels.derivatives import transformed

PATTERNS = ("causal", "full", "cross")


class Cost(NamedTuple):
    """What one head of one sequence costs forward; the bound that a fast implementation is measured against."""

    operations: float  # floating point operations of matrix products; a multiply-add is two
    elements: float  # read and written: query, output, keys and values as often as they are taken up, states

    def bytes(self, dtype: torch.dtype = torch.float32) -> float:
        return self.elements * dtype.itemsize


@dataclass(frozen=True)
class Spec:
    """What an operator supports, what it amounts to, and what it costs.

    patterns: of "causal" (key j is visible to query i where j <= i + key - query, so that the last query sees all),
    "full" (each query sees every key, and there are as many) and "cross" (any number of keys).
    mask: "keys" (which keys there are: boolean [batch|1, 1, 1, key]) or "pairs" (boolean, broadcasts to
    [batch, head, query, key]). True: visible. A query that sees nothing gives zeros. What no query sees may be
    anything, also NaN: an operator is given 0 for that.
    sized: where the paper's blocks or windows would hold all of a short input, those with which the operator does there
    what it is for.
    """

    patterns: tuple[str, ...]
    mask: str
    weights: Callable[..., Tensor]  # dense [batch, head, query, key]: output = weights @ value. The truth for tests
    cost: Callable[..., Cost]  # (n_query, n_key, dim, *, causal, **knobs)
    step: Callable[..., tuple[Tensor, Any]] | None  # (state, query, key, value, **) -> output, state; state None first
    scaled: bool  # scores are multiplied by `scale`; otherwise the paper has none, and a model's is not passed on
    sized: Callable[[tuple[int, ...]], dict[str, Any]] | None = None  # knobs for a short input, (key,) or (row, column)
    apart: bool = False  # keys and values may have other numbers of heads
    ahead: bool = False  # causal as to values only: which keys a query meets depends on later tokens too
    whole: bool = False  # only with all queries at once: others count too, or how many, and a cache of keys has none
    peeks: bool = False  # keys that a mask hides may count in a choice of others, as far as they are numbers


def mechanism(
    *patterns: str,
    mask: str,
    weights: Callable[..., Tensor],
    cost: Callable[..., Cost],
    step: Callable[..., tuple[Tensor, Any]] | None = None,
    scaled: bool = True,
    sized: Callable[[tuple[int, ...]], dict[str, Any]] | None = None,
    apart: bool = False,
    whole: bool = False,
    ahead: bool = False,
    peeks: bool = False,
):
    """Declare an operator (see `Spec`); its inputs are then checked before it runs."""
    spec = Spec(patterns, mask, weights, cost, step, scaled, sized, apart, ahead, whole, peeks)
    if not patterns or set(patterns) - set(PATTERNS) or mask not in ("keys", "pairs"):
        raise ValueError(f"patterns are of {PATTERNS}, mask is 'keys' or 'pairs'; got {patterns}, {mask!r}")

    def declare(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        parameters = inspect.signature(function).parameters
        default = parameters["causal"].default

        @functools.wraps(function)
        def checked(query: Tensor, key: Tensor, value: Tensor, **knobs: Any) -> Tensor:
            problem = foreign(parameters, knobs)
            problem = problem or _problem(spec, query, key, value, knobs.get("causal", default), knobs.get("mask"))
            if problem:
                raise ValueError(f"{function.__name__}: {problem}")
            if (mask := knobs.get("mask")) is not None:
                there = anywhere(mask).mT  # 0 times what overflows would not be 0
                key = kept(key, there) if spec.peeks else key.where(there, 0.0)
                value = value.where(there, 0.0)
            return function(query, key, value, **knobs)

        checked.spec = spec  # type: ignore[attr-defined]
        return checked

    return declare


def _int(given: Any) -> bool:
    return hasattr(given, "__index__") and not isinstance(given, bool | Tensor)


def _float(given: Any) -> bool:
    if isinstance(given, Tensor):
        return given.ndim == 0
    return hasattr(given, "__float__") and not isinstance(given, bool) and given == given  # not NaN


def _each(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda given: isinstance(given, Sequence) and not isinstance(given, str) and all(map(kind, given))


_KINDS: dict[str, Callable[[Any], bool]] = {
    "Axes": lambda given: _int(given) or _each(_int)(given),
    "None": lambda given: given is None,
    "Sequence[bool]": _each(lambda given: isinstance(given, bool)),
    "Sequence[int]": _each(_int),
    "Tensor": lambda given: isinstance(given, Tensor),
    "bool": lambda given: isinstance(given, bool),
    "float": _float,
    "int": _int,
    "str": lambda given: isinstance(given, str),
    "tuple[int, int]": lambda given: _each(_int)(given) and len(given) == 2,
}


def _said(given: Any) -> str:
    return f"a tensor {list(given.shape)}" if isinstance(given, Tensor) else shortened(repr(given))


def foreign(parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> str | None:
    """What was given of another kind than is annotated, in words; nothing is said of kinds other than `_KINDS`."""
    for name, value in given.items():
        written = str(parameters[name].annotation) if name in parameters else ""
        kinds = written.split(" | ")
        if all(kind in _KINDS for kind in kinds) and not any(_KINDS[kind](value) for kind in kinds):
            return f"{name} is {written}; got {_said(value)}"
    return None


def spec_of(function: Any) -> Spec:
    spec = getattr(innermost(function), "spec", None)
    if not isinstance(spec, Spec):
        raise TypeError(f"{function!r} is not a mechanism: declare it with @regard.mechanisms.mechanism(...)")
    return spec


def _problem(spec: Spec, query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None) -> str | None:
    if any(not isinstance(t, Tensor) for t in (query, key, value)):
        return f"takes tensors; got {', '.join(type(t).__name__ for t in (query, key, value))}"
    one = value[:, :1].expand(-1, key.shape[1], -1, -1) if spec.apart and value.ndim == key.ndim == 4 else value
    if query.ndim == key.ndim == value.ndim == 4 and 0 in (*query.shape, *key.shape, *value.shape):
        shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
        return f"takes one sequence, head, token and dim or more; got {shapes}"
    if problem := misfit(query, key, one):
        return problem
    if query.shape[1] % value.shape[1]:
        return f"{query.shape[1]} query heads do not share {value.shape[1]} value heads evenly"
    if not query.is_floating_point() or not (query.dtype == key.dtype == value.dtype):
        return f"takes one floating-point dtype for all; got {query.dtype}, {key.dtype}, {value.dtype}"
    n_query, n_key = query.shape[2], key.shape[2]
    does = " or ".join(spec.patterns)
    if causal and "causal" not in spec.patterns:
        return f"is not defined for causal attention (causal=True); it does {does}"
    if causal and n_query > n_key:
        return f"causal attention of {n_query} queries to {n_key} keys would leave the first ones nothing to see"
    if causal and n_query < n_key and spec.whole:
        return (
            f"takes all positions at once, since earlier queries count too; got {n_query} queries and {n_key} keys: "
            f"run a model with use_cache=False"
        )
    if not causal and not {"full", "cross"} & set(spec.patterns):
        return f"is causal only: pass causal=True; without it every query would see every key (it does {does})"
    if not causal and n_query != n_key and "cross" not in spec.patterns:
        return f"takes as many keys as queries; got {n_query} queries and {n_key} keys (it does {does})"
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        return f"takes a boolean mask (True: visible), not {mask.dtype}; what is added to scores belongs elsewhere"
    if mask.ndim != 4 or any(m not in (1, n) for m, n in zip(mask.shape, (*query.shape[:2], n_query, n_key))):
        return f"mask broadcasts to {[*query.shape[:2], n_query, n_key]}; got {list(mask.shape)}"
    if spec.mask == "keys" and mask.shape[1:3] != (1, 1):
        return (
            f"can only be told which keys there are, by a mask [batch, 1, 1, key], not which pairs are visible: got "
            f"{list(mask.shape)} (sliding windows, packed sequences and static caches need such a one)"
        )
    return None


def anywhere(mask: Tensor) -> Tensor:
    """Which keys a mask of keys or of pairs shows to any query at all. [batch|1, 1, 1, key]"""
    return mask if mask.shape[1:3] == (1, 1) else mask.any(2, keepdim=True).any(1, keepdim=True)


def kept(tensor: Tensor, there: Tensor) -> Tensor:
    """With zeros for what is neither there nor a number, so that it does not spread: 0 times NaN is not 0."""
    return tensor.where(there | tensor.isfinite(), 0.0)


def visible(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None) -> Tensor | None:
    """Which pairs are visible, as a mask; None: all."""
    if not causal:
        return mask
    n_query, n_key = query.shape[2], key.shape[2]
    past = torch.ones(n_query, n_key, dtype=torch.bool, device=query.device).tril(n_key - n_query)
    return past[None, None] if mask is None else past & mask


def softmax(scores: Tensor, seen: Tensor | None) -> Tensor:
    """Softmax over the visible keys; zeros where there is none."""
    if seen is None:
        return scores.softmax(-1)
    # The lowest finite score: with -inf, a row that sees nothing would have NaN for its gradient.
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).where(seen, 0.0)


def by_head(tensor: Tensor, heads: int) -> Tensor:
    """Keys or values of each query head: [batch, kv_head, key, dim] to [batch, head, key, dim]."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments); what it makes on the way is made anew in the backward pass, not kept."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    kept = torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and not transformed(*tensors)
    return checkpoint(function, *arguments, use_reentrant=False) if kept else function(*arguments)


def scale_of(query: Tensor, scale: float | None) -> float:
    """The scale of softmax attention where none is given."""
    return query.shape[-1] ** -0.5 if scale is None else scale


def pairs(n_query: int, n_key: int, causal: bool) -> float:
    """How many query-key pairs are visible."""
    return n_query * (n_key - (n_query - 1) / 2) if causal else n_query * n_key
